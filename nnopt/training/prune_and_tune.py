"""Prune-and-tune: a few training steps, one channel less, again and again.

The procedure of "A Closer Look at Structured Pruning" (https://arxiv.org/abs/1810.04622): 100 steps at the learning rate with which
training ended, then the least important channel of the whole network goes. The network is trained with zeros in place of what has
gone, so that it is compiled once; `Pruner.finish` removes the channels in earnest.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from nnopt.core import Example, carry, channel_groups, rewrite
from nnopt.errors import BudgetError, DataError, PruneError, UnsupportedNetworkError
from nnopt.rewrites import (
    at_random,
    batch_norm_scale,
    fisher,
    gated,
    inner_groups,
    magnitude,
    parameters_without,
    prunable,
    prune,
    taylor,
)
from nnopt.rewrites.importance import check_derivatives
from nnopt.training.apply import mode_of
from nnopt.training.evaluation import Evaluator
from nnopt.training.loop import Trainer, cross_entropy
from nnopt.training.recipe import Recipe
from nnopt.training.state import TrainState
from nnopt.typing import Variables

Criterion = Literal["fisher", "taylor", "l1", "l2", "batch_norm", "random"]


@dataclasses.dataclass(frozen=True)
class PruneRecipe:
    """How channels are removed.

    Attributes:
        tuning: how the network is trained between removals; its epochs do not count, its schedule is best constant.
        criterion: which channel goes. `fisher` and `taylor` are means over the steps since the last removal, while weights move;
            the others look at the weights as they are.
        steps: minibatches between removals.
        at_once: channels that go at a removal.
        only: which channels may go: those inside residual blocks, as in the paper, or any.
    """

    tuning: Recipe
    criterion: Criterion = "fisher"
    steps: int = 100
    at_once: int = 1
    only: Literal["inner", "all"] = "inner"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.at_once < 1:
            raise BudgetError(
                f"{self.at_once} channels each {self.steps} steps; give at least one of both"
            )


class PruneState(flax.struct.PyTreeNode):
    """All that changes while a network is pruned.

    Attributes:
        train: weights, statistics, optimiser.
        live: `[units]`, 0 where a channel has gone; see `ChannelGroups.units`.
        sums: `[units]`, what the criterion has summed since the last removal.
        order: `[units]`, int32, when a channel went, counted from 1; 0 for those that are there.
    """

    train: TrainState
    live: Array
    sums: Array
    order: Array


@dataclasses.dataclass(frozen=True)
class PruneRow:
    """What one round came to.

    Attributes:
        removed: channels that have gone so far.
        parameters: that are left.
        loss: mean over the round's minibatches.
        train_accuracy: likewise, of the augmented images.
        last: `group:channel` of those that went in this round.
        seconds: that it took.
    """

    removed: int
    parameters: int
    loss: float
    train_accuracy: float
    last: tuple[str, ...]
    seconds: float


class Pruner:
    """A network, a data set and a recipe; callers hold the states.

    Attributes:
        groups: channels that belong together.
        names: the groups that lose channels.
        most: how many channels can go, each group keeping one.
        whole: parameters of the network.
        smallest: parameters that are left when `most` channels have gone.

    Example:
        Down to half of the parameters::

            pruner = Pruner(net, dataset, PruneRecipe(CLOSER_LOOK_TUNING_WRN))
            state = pruner.start(variables, jax.random.key(0))
            while pruner.parameters(state) > budget:
                state, row = pruner.round(state)
            small, variables = pruner.finish(state)
    """

    def __init__(self, net: nn.Module, dataset: Any, recipe: PruneRecipe) -> None:
        """Finds the channels and prepares the step.

        Raises:
            UnsupportedNetworkError: the network draws random numbers, has none of these channels, or reads some where the criterion
                does not see them.
            DataError, UnsupportedNetworkError: see `Trainer` and `channel_groups`.
        """
        self._net, self._dataset, self.recipe = net, dataset, recipe
        self._trainer = Trainer(net, dataset, recipe.tuning)
        batch = recipe.tuning.batch
        images = jax.ShapeDtypeStruct((batch, *dataset.image_shape), jnp.float32)
        self.example = Example(images, **mode_of(net, True))
        self.groups = channel_groups(net, self.example)
        if self.groups.draws:
            raise UnsupportedNetworkError(
                f"{type(net).__name__} draws random numbers in training (dropout?), which are not drawn anew here; "
                "set its rate to zero for pruning"
            )
        chosen = inner_groups(self.groups) if recipe.only == "inner" else None
        self.names = prunable(self.groups, chosen)
        self.most = sum(self.groups[n].size - 1 for n in self.names)
        if not self.names:
            raise UnsupportedNetworkError(
                f"{type(net).__name__} has no channels that could go; with only='all' those outside of residual blocks may"
            )
        self.whole = parameters_without(self.groups, {})
        last = {n: range(self.groups[n].size - 1) for n in self.names}
        self.smallest = parameters_without(self.groups, last)
        if recipe.criterion in ("fisher", "taylor"):
            check_derivatives(self.groups, self.names)
        self._axes = self.groups.axes()
        self._step = jax.jit(self._make_step(), donate_argnames=("state", "sums"))
        self._evaluator = Evaluator(net, dataset.mean, dataset.std)

    def start(self, variables: Variables, key: Array) -> PruneState:
        """The state before the first step.

        Args:
            variables: of the trained network; they stay the caller's.
            key: decides every minibatch.
        """
        units = self.groups.units
        return PruneState(
            train=self._trainer.start(variables, key),
            live=jnp.ones(units, jnp.float32),
            sums=jnp.zeros(units, jnp.float32),
            order=jnp.zeros(units, jnp.int32),
        )

    def round(self, state: PruneState) -> tuple[PruneState, PruneRow]:
        """Trains for some steps, then removes the least important channels.

        Args:
            state: its arrays are donated: use the returned state instead.

        Returns:
            The new state, and what the round came to.

        Raises:
            BudgetError: every group has one channel left.
            PruneError: the importance of a channel is not a number, because the training diverges.
        """
        began = time.perf_counter()
        gone = self.count(state)
        if gone >= self.most:
            raise BudgetError(f"all of the {self.most} channels that can go have gone")
        sums = {"loss": jnp.zeros((), jnp.float32), "right": jnp.zeros((), jnp.int32)}
        trainer = self._trainer
        per_epoch = trainer.steps_per_epoch
        order, epoch = None, -1
        first = int(state.train.step)
        for step in range(first, first + self.recipe.steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = trainer.order(state.train.key, epoch)
            state, sums = self._step(state=state, sums=sums, order=order)
        scores = self._finite(state, self._scores(state))
        went = self._weakest(state, scores, min(self.recipe.at_once, self.most - gone))
        numbers = np.array(state.order)
        numbers[went] = gone + 1 + np.arange(len(went))
        live = jnp.asarray(numbers == 0, jnp.float32)
        train = state.train.replace(params=self._masked(state.train.params, live))
        state = PruneState(train, live, jnp.zeros_like(state.sums), jnp.asarray(numbers, jnp.int32))
        images = self.recipe.steps * self.recipe.tuning.batch
        row = PruneRow(
            gone + len(went),
            self.parameters(state),
            float(sums["loss"]) / self.recipe.steps,
            int(sums["right"]) / images,
            tuple(self._name(u) for u in went),
            time.perf_counter() - began,
        )
        return state, row

    def count(self, state: PruneState) -> int:
        """Channels that have gone."""
        return int((np.asarray(state.order) > 0).sum())

    def removed(self, state: PruneState, count: int | None = None) -> dict[str, list[int]]:
        """What has gone, or the first `count` of it: the history of one run holds a whole family."""
        order = np.asarray(state.order)
        last = order.max() if count is None else count
        found = {}
        for name in self.names:
            went = order[self.groups[name].units]
            channels = np.flatnonzero((went > 0) & (went <= last))
            if len(channels):
                found[name] = channels.tolist()
        return found

    def parameters(self, state: PruneState) -> int:
        """Parameters that are left."""
        return parameters_without(self.groups, self.removed(state))

    def accuracy(self, state: PruneState) -> float:
        """Of the test images, 0..1, by the network with zeros."""
        dataset = self._dataset
        return self._evaluator(state.train.variables, dataset.test_images, dataset.test_labels)

    def finish(self, state: PruneState) -> tuple[nn.Module, Variables]:
        """The network without its channels, and its variables: it computes what the network with zeros does."""
        example = Example(
            jax.ShapeDtypeStruct((1, *self._dataset.image_shape), jnp.float32),
            **mode_of(self._net, False),
        )
        removed = self.removed(state)
        if not removed:
            return self._net, state.train.variables
        small = rewrite(self._net, prune(self.groups, removed), example=example)
        variables, _ = carry(
            self._net, small, state.train.variables, example=example, key=jax.random.key(0)
        )
        return small, variables

    def _make_step(self) -> Callable[..., Any]:
        trainer, groups, recipe = self._trainer, self.groups, self.recipe
        gradients_needed = recipe.criterion in ("fisher", "taylor")
        collections = sorted({leaf[0] for leaf in groups.leaves} - {"params"})
        specs = unflatten_dict({p: 0 for p in groups.leaves if p[0] in collections})

        def step(
            state: PruneState, sums: dict[str, Array], order: Array
        ) -> tuple[PruneState, dict[str, Array]]:
            train = state.train
            images, labels = trainer.minibatch(train, order)

            def loss_of(params: Any, gates: Array) -> tuple[Array, Any]:
                variables = {**train.variables, "params": params}
                outputs, changed = gated(groups, [images], variables, gates)
                updates = jax.tree.unflatten(jax.tree.structure(specs), changed) if specs else {}
                loss = cross_entropy(outputs[0], labels, recipe.tuning.label_smoothing)
                return loss, (outputs[0], updates)

            gates = jnp.ones((len(images), groups.units), jnp.float32)
            which = (0, 1) if gradients_needed else (0,)
            run = jax.value_and_grad(loss_of, which, has_aux=True)
            (loss, (logits, updates)), (gradient, *rest) = run(train.params, gates)
            changes, opt_state = trainer.optimizer.update(gradient, train.opt_state, train.params)
            params = self._masked(optax.apply_updates(train.params, changes), state.live)
            added = state.sums
            if rest:
                added += fisher(rest[0]) if recipe.criterion == "fisher" else taylor(rest[0])
            train = train.replace(
                step=train.step + 1,
                params=params,
                batch_stats=updates.get("batch_stats", train.batch_stats),
                opt_state=opt_state,
            )
            answers = jnp.argmax(logits, axis=-1).astype(labels.dtype)
            right = jnp.sum(answers == labels, dtype=jnp.int32)
            new_sums = {"loss": sums["loss"] + loss, "right": sums["right"] + right}
            return state.replace(train=train, sums=added), new_sums

        return step

    def _masked(self, params: Any, live: Array) -> Any:
        flat = dict(flatten_dict(params))
        for (leaf, axis), units in self._axes.items():
            if leaf[0] == "params":
                array = flat[leaf[1:]]
                shape = [1] * array.ndim
                shape[axis] = -1
                flat[leaf[1:]] = jnp.where(live[units].reshape(shape) > 0, array, 0)
        return unflatten_dict(flat)

    def _scores(self, state: PruneState) -> np.ndarray:
        """`[units]`."""
        criterion, groups, variables = self.recipe.criterion, self.groups, state.train.variables
        if criterion in ("fisher", "taylor"):
            return np.asarray(state.sums) / self.recipe.steps
        if criterion == "random":
            key = jax.random.fold_in(state.train.key, 1 + self.count(state))
            scores = at_random(groups, key)
        elif criterion == "batch_norm":
            scores = batch_norm_scale(groups, variables)
            if missing := [n for n in self.names if n not in scores]:
                raise DataError(f"{missing[0]!r} has no normalisation to judge its channels by")
        else:
            scores = magnitude(groups, variables, 1 if criterion == "l1" else 2)
        found = np.zeros(groups.units)
        for name in self.names:
            found[groups[name].units] = scores[name]
        return found

    def _finite(self, state: PruneState, scores: np.ndarray) -> np.ndarray:
        """The scores `[units]`, of which those that count must be numbers."""
        gone = np.asarray(state.order)
        for name in self.names:
            own = self.groups[name].units
            bad = np.flatnonzero(~np.isfinite(scores[own]) & (gone[own] == 0))
            if len(bad):
                done = int(state.train.step) // self.recipe.steps
                raise PruneError(
                    f"round {done}: {self.recipe.criterion} of channel {bad[0]} of {name!r} is {scores[own[bad[0]]]}, so the "
                    "training diverges; start again with a smaller learning rate"
                )
        return scores

    def _weakest(self, state: PruneState, scores: np.ndarray, count: int) -> np.ndarray:
        """Units of the least important channels; each group keeps one."""
        live = np.asarray(state.order) == 0
        units, room = [], {}
        owner = np.zeros(len(scores), np.int64)
        for number, name in enumerate(self.names):
            own = self.groups[name].units
            owner[own] = number
            room[number] = int(live[own].sum()) - 1
            units.append(own[live[own]])
        candidates = np.concatenate(units)
        chosen: list[int] = []
        for unit in candidates[np.argsort(scores[candidates], kind="stable")]:
            if len(chosen) == count:
                break
            if room[int(owner[unit])] > 0:
                room[int(owner[unit])] -= 1
                chosen.append(int(unit))
        return np.array(chosen, np.int64)

    def _name(self, unit: int) -> str:
        for name in self.names:
            where = np.flatnonzero(self.groups[name].units == unit)
            if len(where):
                return f"{name}:{where[0]}"
        raise AssertionError(unit)
