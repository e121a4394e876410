"""How a network is trained: optimiser, learning-rate schedule and augmentation as one value."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from nnopt.data import Augmentation
from nnopt.errors import RecipeError

Schedule = Literal["cosine", "multistep", "constant"]

_STANDARD = Augmentation()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum, as the image classification literature runs it.

    Attributes:
        epochs: passes over the training images.
        batch: images in a minibatch; a last partial minibatch is dropped.
        learning_rate: peak learning rate.
        momentum: 0 for none.
        weight_decay: L2 coefficient, added to the gradient (times the weight) before momentum.
        decay_all: decay every parameter, as `torch.optim.SGD` does; otherwise only those of rank 2
            and more, which leaves out biases and normalisation.
        schedule: `cosine` to zero (Loshchilov and Hutter, arXiv 1608.03983, without restarts,
            stepped each minibatch), `multistep`, or `constant`.
        milestones: epochs at which `multistep` multiplies the rate by `gamma`.
        gamma: factor of `multistep`.
        warmup_steps: minibatches over which the rate rises linearly to its peak.
        nesterov: use Nesterov's momentum.
        label_smoothing: mass that is spread evenly over all classes (Szegedy et al., arXiv
            1512.00567).
        augmentation: of the training images. Flips are left out for data sets with `flip_ok=False`.

    Raises:
        RecipeError: a value that no training can be run with.

    Example:
        >>> recipe = Recipe(epochs=2, batch=32)
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_all: bool = True
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.2
    warmup_steps: int = 0
    nesterov: bool = False
    label_smoothing: float = 0.0
    augmentation: Augmentation = _STANDARD

    def __post_init__(self) -> None:
        def check(holds: bool, field: str, wanted: str) -> None:
            if not holds:
                raise RecipeError(f"Recipe: {field}={getattr(self, field)!r}; give {wanted}")

        for field, least in (("epochs", 1), ("batch", 1), ("warmup_steps", 0)):
            value = getattr(self, field)
            check(isinstance(value, int) and value >= least, field, f"an integer from {least}")
        for field in ("learning_rate", "weight_decay", "gamma"):
            value = getattr(self, field)
            check(value >= 0 and math.isfinite(value), field, "0 or more")
        for field in ("momentum", "label_smoothing"):
            check(0 <= getattr(self, field) < 1, field, "0 or more, below 1")
        known = ("cosine", "multistep", "constant")
        check(self.schedule in known, "schedule", f"one of {', '.join(known)}")
        ordered = list(self.milestones) == sorted(set(self.milestones))
        check(ordered, "milestones", "epochs in increasing order")
        check(not self.nesterov or self.momentum > 0, "nesterov", "a momentum above 0 with it")

    def learning_rate_schedule(self, steps_per_epoch: int) -> optax.Schedule:
        """The learning rate at each step, counted in minibatches from 0.

        With warm-up, step `i < warmup_steps` runs at `learning_rate (i + 1) / (warmup_steps + 1)`,
        and the cosine spans the steps after it; milestones are counted from the first step in any
        case.

        Args:
            steps_per_epoch: whole minibatches in the training set.

        Returns:
            A function of the step's number.

        Raises:
            RecipeError: the warm-up is as long as the training.
        """
        total_steps, warmup = self.epochs * steps_per_epoch, self.warmup_steps
        if warmup >= total_steps:
            raise RecipeError(
                f"Recipe: warmup_steps={warmup} leaves nothing of {total_steps} steps; give fewer"
            )
        # Written out rather than taken from optax, whose schedules rely on implicit promotion.
        milestones = self.milestones if self.schedule == "multistep" else ()
        boundaries = np.asarray([epoch * steps_per_epoch for epoch in milestones], np.int32)
        levels = self.learning_rate * self.gamma ** np.arange(len(milestones) + 1)

        def rate(step: ArrayLike) -> jax.Array:
            count = jnp.asarray(step, jnp.int32)
            if self.schedule == "cosine":
                done = (count - warmup).astype(jnp.float32) / (total_steps - warmup)
                value = (
                    0.5 * self.learning_rate * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
                )
            else:
                passed = jnp.searchsorted(boundaries, count, side="right")
                value = jnp.asarray(levels, jnp.float32)[passed]
            rising = self.learning_rate * (count + 1).astype(jnp.float32) / (warmup + 1)
            return jnp.where(count < warmup, rising, value)

        return rate

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The optimiser, whose steps are those of `torch.optim.SGD` with the same settings.

        With gradient `g`, weight `w`, momentum buffer `b` and rate `r`: `g <- g + weight_decay w`;
        `b <- momentum b + g`; `w <- w - r b`, or `w <- w - r (g + momentum b)` with Nesterov's
        momentum.

        Args:
            steps_per_epoch: whole minibatches in the training set.

        Returns:
            An optax transformation of the parameters' gradients.

        Raises:
            RecipeError: the warm-up is as long as the training.
        """
        sgd = optax.sgd(
            self.learning_rate_schedule(steps_per_epoch),
            momentum=self.momentum or None,
            nesterov=self.nesterov,
        )
        if not self.weight_decay:
            return sgd
        mask = None if self.decay_all else _is_kernel
        return optax.chain(optax.add_decayed_weights(self.weight_decay, mask), sgd)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {**dataclasses.asdict(self), "milestones": list(self.milestones)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_json` gave; fields that are absent have their defaults.

        Raises:
            RecipeError: an unknown field, a missing one, or a value of the wrong type.
        """
        try:
            values = dict(record)
            if "milestones" in values:
                values["milestones"] = tuple(values["milestones"])
            if "augmentation" in values:
                values["augmentation"] = Augmentation(**values["augmentation"])
            return cls(**values)
        except TypeError as error:
            raise RecipeError(
                f"no training recipe: {error}; give the fields of Recipe.to_json()"
            ) from None


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


QUICK = Recipe(
    epochs=8,
    batch=64,
    learning_rate=0.05,
    augmentation=Augmentation(pad=2, pad_mode="constant", flip=False),
)
"""Some seconds to minutes on the digits, to see that a network learns; not tuned."""

CLOSER_LOOK_WRN = Recipe(epochs=200, schedule="multistep", milestones=(60, 120, 160), gamma=0.2)
"""Wide ResNets of "A Closer Look at Structured Pruning" (arXiv 1810.04622); data as
`CIFAR10_CLOSER_LOOK`."""

CLOSER_LOOK_DENSENET = Recipe(
    epochs=300,
    batch=64,
    weight_decay=1e-4,
    schedule="multistep",
    milestones=(150, 225),
    gamma=0.1,
)
"""DenseNets of the same study."""

CLOSER_LOOK_TUNING_WRN = Recipe(
    epochs=1,
    learning_rate=8e-4,
    schedule="constant",
    augmentation=Augmentation(pad_mode="constant"),
)
"""Training between two removals of a channel from a Wide ResNet, in the same study. The rate is the
base training's last, 0.1 x 0.2^3. The length is given in steps there (100 for each removal):
`epochs` is not it."""

CLOSER_LOOK_TUNING_DENSENET = dataclasses.replace(
    CLOSER_LOOK_TUNING_WRN, batch=64, learning_rate=1e-3, weight_decay=1e-4
)
"""The same for a DenseNet."""

BLOCKSWAP = Recipe(epochs=200, augmentation=Augmentation(pad_mode="constant", cutout=16))
"""Networks of BlockSwap (arXiv 1906.04113), without its distillation; data as
`CIFAR10_BLOCKSWAP`."""

MOONSHINE = CLOSER_LOOK_WRN
"""Networks of "Moonshine" (arXiv 1711.02613), without its distillation. The augmentation is not
known for sure."""
