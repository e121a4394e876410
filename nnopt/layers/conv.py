"""`flax.linen.Conv` with a convolution that is lowered as suits the platform.

XLA's CPU backend runs a grouped convolution tens of times slower than need be, and its gradients slower still
(`scripts/bench/lowering.py` measures it). Equal forms are much faster; see `nnopt.layers.lowering`. Other platforms keep
the native form.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nnopt.layers.conv_primitives import convolve
from nnopt.layers.conv_shape import LAYOUT, ConvShape
from nnopt.layers.dense_lowerings import block_diagonal
from nnopt.layers.lowerings import Lowering

_OPTIONS = {"dimension_numbers", "lhs_dilation", "rhs_dilation", "precision"}


@dataclasses.dataclass(frozen=True)
class LoweredConvolution:
    """Stands in for `jax.lax.conv_general_dilated` where kernels are laid out `[*window, in, out]`.

    Two-dimensional channels-last convolutions of floating-point images become the primitive `nnopt_conv`. Others stay native,
    but for grouped ones on a CPU, whose kernel is made block-diagonal.

    Attributes:
        lowering: what two-dimensional ones are lowered to, on any platform, as far as it applies; None for what
            `nnopt.layers.lowering.choose` says.
    """

    lowering: Lowering | None = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: Any,
        *,
        feature_group_count: int = 1,
        **kwargs: Any,
    ) -> jax.Array:
        """The same values as `jax.lax.conv_general_dilated`, up to rounding.

        Args:
            lhs: input, in the layout that `dimension_numbers` says.
            rhs: kernel `[*window, in / groups, out]`.
            window_strides: as `jax.lax.conv_general_dilated`.
            padding: likewise.
            feature_group_count: number of groups.
            **kwargs: as `jax.lax.conv_general_dilated`.
        """

        def native(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
            return lax.conv_general_dilated(
                x, kernel, window_strides, padding, feature_group_count=groups, **kwargs
            )

        shape = _plain_shape(lhs, rhs, window_strides, padding, feature_group_count, kwargs)
        if shape is not None:
            precision = _precisions(kwargs.get("precision"))
            return convolve(lhs, rhs, shape, lowering=self.lowering, precision=precision)
        if feature_group_count == 1 or rhs.shape[-1] % feature_group_count:
            return native(lhs, rhs, feature_group_count)
        # The native form is the default branch, and only the branch of the platform is compiled.
        return lax.platform_dependent(
            lhs,
            rhs,
            cpu=lambda x, k: native(x, block_diagonal(k, feature_group_count), 1),
            default=lambda x, k: native(x, k, feature_group_count),
        )


def _plain_shape(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: Any,
    groups: int,
    options: dict[str, Any],
) -> ConvShape | None:
    """The shape of a two-dimensional channels-last convolution of floating-point images; None for any other."""
    if lhs.ndim != 4 or lhs.dtype != rhs.dtype or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return None
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
    wanted = lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
    input_dilated = any(d != 1 for d in options.get("lhs_dilation") or ())
    if layout != wanted or input_dilated or not options.keys() <= _OPTIONS:
        return None
    if any(axis is not None for a in (lhs, rhs) for axis in jax.typeof(a).sharding.spec):
        # A mesh of explicit axes: JAX's own convolution has the rules of sharding.
        return None
    first, second = options.get("rhs_dilation") or (1, 1)
    if isinstance(padding, str):
        window = [d * (k - 1) + 1 for d, k in zip((first, second), rhs.shape[:2], strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:3], window, strides, padding)
    vertical, horizontal = ((int(low), int(high)) for low, high in padding)
    shape = ConvShape(
        (lhs.shape[0], lhs.shape[1], lhs.shape[2], lhs.shape[3]),
        (rhs.shape[0], rhs.shape[1], rhs.shape[2], rhs.shape[3]),
        (int(strides[0]), int(strides[1])),
        (vertical, horizontal),
        (int(first), int(second)),
        groups,
        lhs.dtype.name,
    )
    fits = lhs.shape[3] == rhs.shape[2] * groups and rhs.shape[3] % groups == 0
    # What does not fit is left to JAX, which says why.
    return shape if fits and min((*shape.output, *shape.input, *shape.kernel)) > 0 else None


def _precisions(precision: Any) -> tuple[lax.Precision, lax.Precision] | None:
    if precision is None:
        return None
    first, second = precision if isinstance(precision, tuple) else (precision, precision)
    return lax.Precision(first), lax.Precision(second)


class Conv(nn.Conv):
    """`flax.linen.Conv`, same fields, same parameters, same function, lowered by platform.

    Where `nn.Conv` stands, this can stand. `conv_general_dilated=LoweredConvolution(ShiftedSum())` fixes what it is lowered to.
    """

    conv_general_dilated: Any = LoweredConvolution()
