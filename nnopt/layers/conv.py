"""Convolution with a lowering that suits the platform.

XLA's CPU backend runs a grouped convolution written with `feature_group_count` slower than a dense one of the same
channels, and its weight gradient tens of times slower (`scripts/bench/grouped_conv.py` measures both). Spreading the
kernel over a block-diagonal dense one is exact and costs what a dense convolution does, which makes training on a CPU
possible. Other platforms keep the native form.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
    """The dense kernel of a grouped one: zero where input and output channel belong to different groups.

    Args:
        kernel: `[*window, in // groups, out]`.
        groups: number of groups.

    Returns:
        `[*window, in, out]`.
    """
    per_group_in, out = kernel.shape[-2:]
    group_of_input = np.arange(per_group_in * groups)[:, None] // per_group_in
    group_of_output = np.arange(out)[None, :] // (out // groups)
    mask = (group_of_input == group_of_output).astype(kernel.dtype)
    repeats = (1,) * (kernel.ndim - 2) + (groups, 1)
    return jnp.tile(kernel, repeats) * mask.reshape((1,) * (kernel.ndim - 2) + mask.shape)


def grouped_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    feature_group_count: int = 1,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for kernels laid out `[*window, in, out]`; on a CPU, groups become block diagonals.

    Args:
        lhs: input, in the layout that `dimension_numbers` says.
        rhs: kernel `[*window, in // groups, out]`.
        window_strides: as `lax.conv_general_dilated`.
        padding: likewise.
        feature_group_count: number of groups.
        **kwargs: as `lax.conv_general_dilated`.

    Returns:
        The same values as `lax.conv_general_dilated`, up to rounding.
    """

    def native(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, window_strides, padding, feature_group_count=groups, **kwargs
        )

    if feature_group_count == 1:
        return native(lhs, rhs, 1)

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return native(x, block_diagonal(kernel, feature_group_count), 1)

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return native(x, kernel, feature_group_count)

    # The native form is the default branch, and only the branch of the platform is compiled.
    return lax.platform_dependent(lhs, rhs, cpu=dense, default=grouped)


class Conv(nn.Conv):
    """`flax.linen.Conv`, same fields, same parameters, same function; grouped convolutions are lowered by platform.

    Where `nn.Conv` stands, this can stand.
    """

    conv_general_dilated: Any = grouped_conv_general_dilated
