"""Convolution with a lowering that suits the platform.

XLA's CPU backend runs a grouped convolution written with `feature_group_count` slower than a dense one of the same
channels, and its weight gradient tens of times slower (`scripts/bench/grouped_conv.py` measures both). Two other forms
of the same function are exact: a dense convolution whose kernel is block-diagonal, which costs what a dense one does
and makes training on a CPU possible, and for depthwise convolution a sum of shifted images, which is faster still.
Other platforms keep the native form.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Bilinear: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


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


def shifted_sum(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> jax.Array:
    """Depthwise convolution as a sum over the window: `y[n, i, j, c] = sum_ab x[n, s i + d a - p, s j + d b - p, c] k[a, b, c]`.

    Args:
        x: `[batch, height, width, channels]`.
        kernel: `[window height, window width, 1, channels]`.
        strides: of the window, vertical and horizontal.
        padding: zeros before and after, vertical and horizontal.
        dilation: of the kernel, vertical and horizontal.

    Returns:
        `[batch, out height, out width, channels]`.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, *size, channels = x.shape
    reach = [d * (k - 1) for d, k in zip(dilation, kernel.shape, strict=False)]
    last = [(n - 1 - r) // s * s for n, r, s in zip(size, reach, strides, strict=True)]
    terms = []
    for a, b in np.ndindex(*kernel.shape[:2]):
        top, left = a * dilation[0], b * dilation[1]
        end = (batch, top + last[0] + 1, left + last[1] + 1, channels)
        window = lax.slice(x, (0, top, left, 0), end, (1, *strides, 1))
        terms.append(window * kernel[a : a + 1, b : b + 1])
    return functools.reduce(operator.add, terms)


def grouped_conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    feature_group_count: int = 1,
    **kwargs: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for kernels laid out `[*window, in, out]`; on a CPU, groups are lowered otherwise.

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

    on_cpu: _Bilinear = dense
    if _is_plain_depthwise(lhs, rhs, feature_group_count, kwargs):
        dilation = kwargs.get("rhs_dilation") or (1, 1)
        pads = _explicit_padding(lhs, rhs, window_strides, padding, dilation)
        on_cpu = _with_derivative_of(
            dense, lambda x, kernel: shifted_sum(x, kernel, window_strides, pads, dilation)
        )
    # The native form is the default branch, and only the branch of the platform is compiled.
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=grouped)


def _is_plain_depthwise(
    lhs: jax.Array, rhs: jax.Array, groups: int, options: Mapping[str, Any]
) -> bool:
    """Whether `shifted_sum` computes this: two dimensions, one channel in and out of each group, input not dilated."""
    if lhs.ndim != 4 or not groups == lhs.shape[-1] == rhs.shape[-1]:
        return False
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
    wanted = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    dilated = any(d != 1 for d in options.get("lhs_dilation") or ())
    known = {"dimension_numbers", "lhs_dilation", "rhs_dilation", "precision"}
    return layout == wanted and not dilated and options.keys() <= known


def _explicit_padding(
    lhs: jax.Array, rhs: jax.Array, strides: Sequence[int], padding: Any, dilation: Sequence[int]
) -> list[tuple[int, int]]:
    if not isinstance(padding, str):
        return [(low, high) for low, high in padding]
    window = [d * (k - 1) + 1 for d, k in zip(dilation, rhs.shape, strict=False)]
    return list(lax.padtype_to_pads(lhs.shape[1:3], window, strides, padding))


def _with_derivative_of(bilinear: _Bilinear, fast: _Bilinear) -> _Bilinear:
    """`fast`, differentiated as `bilinear`, which is the same function of an image and a kernel.

    The transpose of a sum of shifted slices runs at a small part of the speed of the sum itself.
    """
    run = jax.custom_jvp(fast)

    @run.defjvp
    def _(
        primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (x, kernel), (dx, dkernel) = primals, tangents
        return run(x, kernel), bilinear(dx, kernel) + bilinear(x, dkernel)

    return run


class Conv(nn.Conv):
    """`flax.linen.Conv`, same fields, same parameters, same function; grouped convolutions are lowered by platform.

    Where `nn.Conv` stands, this can stand.
    """

    conv_general_dilated: Any = grouped_conv_general_dilated
