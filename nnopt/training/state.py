"""What a training run holds and what it returns."""

import dataclasses
from typing import Any

import flax.struct
from jax import Array

from nnopt.training.recipe import Recipe


class TrainState(flax.struct.PyTreeNode):
    """All that changes during a run, and the key that decides the rest: a checkpoint's content.

    Attributes:
        step: `[]`, int32, minibatches done.
        params: the network's parameters.
        batch_stats: its normalisation statistics; `{}` for networks without.
        constants: its other collections, which training leaves as they are.
        opt_state: the optimiser's state.
        key: the run's random key; it never changes.
    """

    step: Array
    params: Any
    batch_stats: Any
    constants: Any
    opt_state: Any
    key: Array

    @property
    def variables(self) -> dict[str, Any]:
        """The network's variables, as `net.apply` takes them."""
        statistics = {"batch_stats": self.batch_stats} if self.batch_stats else {}
        return {"params": self.params, **statistics, **self.constants}


@dataclasses.dataclass(frozen=True)
class EpochRow:
    """What one epoch came to.

    Attributes:
        epoch: epochs done, from 1.
        loss: mean over the epoch's minibatches, each measured before its own update.
        train_accuracy: of the augmented training images during the epoch, 0..1.
        test_accuracy: of the whole test split after the epoch, 0..1.
        seconds: wall-clock time of training and evaluation, with compilation where it happened.
    """

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained network's variables and how they came about.

    Attributes:
        variables: what `net.apply` takes.
        history: one row for each epoch that was run.
        state: the last state, to save or to run on from; it shares its arrays with `variables`, so
            that running on consumes both.
        recipe: what was run.
        split_note: what the test accuracy was measured on.
    """

    variables: dict[str, Any]
    history: tuple[EpochRow, ...]
    state: TrainState
    recipe: Recipe
    split_note: str

    @property
    def test_accuracy(self) -> float:
        """The last epoch's test accuracy, 0..1."""
        return self.history[-1].test_accuracy
