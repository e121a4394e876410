"""Small modules that edits are built from: nothing, one after another, record, multiply."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from nnopt.core.modules import rename_child, share_scope

TAPS = "taps"
"""The variable collection that `Tap` writes to."""

GATES = "gates"
"""The variable collection that `Gate` reads from."""


class Identity(nn.Module):
    """Returns its first argument and ignores the rest, such as a `train` flag."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`x` -> `x`."""
        return x


class Then(nn.Module):
    """`x -> after(module(x))`, standing exactly where `module` stood.

    It shares the scope of `module`, so the variables of `module` keep their paths; those of `after` live below `after`,
    or, where `module` is itself a `Then`, below `after2`, `after3` and so on: those inside keep their paths as well.

    Attributes:
        module: what runs first, with all arguments.
        after: runs on its result.
    """

    wraps: ClassVar[str] = "module"

    module: nn.Module
    after: nn.Module

    def setup(self) -> None:
        """Takes over the scope of `module`."""
        rename_child(self, self.after, after_name(self.module))
        share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments of `module` -> result of `after`."""
        return self.after(self.module(*args, **kwargs))


class AtResolution(nn.Module):
    """`x -> module(x resized by factor)`, standing exactly where `module` stood, mostly at the network itself.

    Attributes:
        module: takes `[batch, height, width, channels]` first; its variables keep their paths.
        factor: of height and width; linear interpolation, antialiased.
    """

    wraps: ClassVar[str] = "module"

    module: nn.Module
    factor: float

    def setup(self) -> None:
        """Takes over the scope of `module`."""
        share_scope(self, self.module)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Arguments of `module` -> its result on smaller or larger images."""
        batch, height, width, channels = x.shape
        size = (max(1, round(height * self.factor)), max(1, round(width * self.factor)))
        x = jax.image.resize(x, (batch, *size, channels), "linear")
        return self.module(x, *args, **kwargs)


def after_name(module: nn.Module) -> str:
    """The name below which `Then(module, ...)` keeps the variables of what it runs after: `after`, `after2`, ..."""
    depth = 1
    while isinstance(module, Then):
        module, depth = module.module, depth + 1
    return "after" if depth == 1 else f"after{depth}"


class Tap(nn.Module):
    """Passes `x` on and writes it down: `apply(..., mutable=["taps"])` returns it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[...]` -> the same array."""
        self.sow(TAPS, "value", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return x


class Gate(nn.Module):
    """Multiplies `x` by a gate if one is given in the `gates` collection, else passes it on untouched.

    The derivative of a loss with respect to a gate of ones is the sum over positions of activation times gradient, without
    an activation gradient ever being stored.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, ..., channels]` times a gate `[batch, channels]` -> `[batch, ..., channels]`."""
        if not self.has_variable(GATES, "gate"):
            return x
        gate: jax.Array = self.get_variable(GATES, "gate")
        return x * gate.reshape(gate.shape[0], *(1,) * (x.ndim - 2), gate.shape[-1])
