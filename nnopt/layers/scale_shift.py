"""A multiplication and an addition for each channel."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype


class ScaleShift(nn.Module):
    """`x -> scale * x + shift`, with a scale and a shift for each channel.

    A batch norm with stored averages is this function, so this can stand where it stood and takes the same arguments.

    Attributes:
        axis: the axis of `x` that holds the channels, or several, as for `nn.BatchNorm`.
        dtype: of the result; None for that of `x`, promoted with `at_least`.
        at_least: None, or a dtype: see `dtype`.
        param_dtype: of the parameters; the arithmetic is in this dtype promoted with that of `x`.
    """

    axis: int | Sequence[int] = -1
    dtype: Any = None
    at_least: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Array `[..., channels]`, or with its channels elsewhere -> array of the same shape.

        Args:
            x: as the class says.
            use_running_average: of a batch norm, ignored: the scale and the shift hold what is stored.
            mask: likewise.
        """
        axes = feature_axes(self.axis, x.ndim)
        shape = tuple(x.shape[axis] for axis in axes)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        shift = self.param("shift", nn.initializers.zeros, shape, self.param_dtype)
        along = [n if axis in axes else 1 for axis, n in enumerate(x.shape)]
        wide = jnp.promote_types(x.dtype, self.param_dtype)
        factor, summand = (a.astype(wide).reshape(along) for a in (scale, shift))
        least = () if self.at_least is None else (jnp.zeros((), self.at_least),)
        result = canonicalize_dtype(x, *least, dtype=self.dtype)
        return (x.astype(wide) * factor + summand).astype(result)


def feature_axes(axis: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    """The axis or axes of an `nn.BatchNorm`, counted from the front of an array of `ndim` dimensions, in ascending order."""
    axes = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({a % ndim for a in axes}))
