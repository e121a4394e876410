"""Convolutions as dense convolutions and matrix products, which XLA's CPU backend runs near the machine's peak."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nnopt.layers.conv_shape import (
    LAYOUT,
    AxisTaps,
    AxisTiles,
    ConvShape,
    Direction,
    Pair,
    axis_tiles,
)
from nnopt.layers.lowerings import Wide, native, padded, spread


@dataclasses.dataclass(frozen=True)
class Pointwise(Wide):
    """A window of one position, one group: a matrix product over the positions that the stride keeps."""

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """See `Lowering`."""
        plain = shape.padding == ((0, 0), (0, 0)) and shape.groups == 1
        return plain and shape.kernel[:2] == (1, 1)

    def _prepare(
        self, shape: ConvShape, direction: Direction, kernel: jax.Array
    ) -> tuple[jax.Array, ...]:
        matrix = kernel.reshape(kernel.shape[2:])
        return (matrix if direction is Direction.FORWARD else matrix.T,)

    def _run(
        self,
        shape: ConvShape,
        direction: Direction,
        operand: jax.Array,
        prepared: tuple[jax.Array, ...],
    ) -> jax.Array:
        (matrix,) = prepared
        if direction is Direction.FORWARD:
            return _times(self._kept(shape, operand), matrix)
        gradient = _times(operand, matrix)
        if shape.strides == (1, 1):
            return gradient
        return spread(gradient, (0, 0), shape.strides, (shape.input[1], shape.input[2]))

    def _weight_gradient(self, shape: ConvShape, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        x = self._kept(shape, x).reshape(-1, shape.input[3])
        y = cotangent.reshape(-1, shape.kernel[3])
        return lax.dot_general(x, y, (((0,), (0,)), ((), ()))).reshape(shape.kernel)

    @staticmethod
    def _kept(shape: ConvShape, x: jax.Array) -> jax.Array:
        return x[:, :: shape.strides[0], :: shape.strides[1]] if shape.strides != (1, 1) else x


@dataclasses.dataclass(frozen=True)
class Patches(Wide):
    """What each window sees, in a row, times the kernel as a matrix (im2col): `y = C(x, k)` of one group.

    Forward products of one group alone: `nnopt.layers.lowering` says what was measured elsewhere.
    """

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """See `Lowering`."""
        return shape.groups == 1 and direction is Direction.FORWARD

    def _prepare(
        self, shape: ConvShape, direction: Direction, kernel: jax.Array
    ) -> tuple[jax.Array, ...]:
        return (kernel.reshape(-1, kernel.shape[3]),)

    def _run(
        self,
        shape: ConvShape,
        direction: Direction,
        operand: jax.Array,
        prepared: tuple[jax.Array, ...],
    ) -> jax.Array:
        (matrix,) = prepared
        image = padded(operand, shape.padding)
        _, height, width, _ = shape.output
        (down, across), (rows, columns) = shape.strides, shape.dilation
        seen = [
            image[
                :,
                i * rows : i * rows + (height - 1) * down + 1 : down,
                j * columns : j * columns + (width - 1) * across + 1 : across,
            ]
            for i in range(shape.kernel[0])
            for j in range(shape.kernel[1])
        ]
        return _times(jnp.concatenate(seen, -1), matrix)

    def _weight_gradient(self, shape: ConvShape, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        raise NotImplementedError("forward products alone: see `applies`")


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.dot(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], matrix.shape[1])


@dataclasses.dataclass(frozen=True)
class SplitGroups(Wide):
    """Dense convolutions on slices of the channels, each of which computes a tile of neighbouring positions at once.

    Before -> after: `conv(x, k, groups=g)` -> `parts` times `conv(x[part], block_diagonal(k[part]), groups=1)`, side by side.
    With `parts = g` no product is wasted; with fewer, the zeros between the `g / parts` groups of a part are multiplied too, but
    matrix products of few columns run far below the machine's peak. `tile` widens them in another way: a tile of
    `t` positions has `t` times the columns, from one window that covers all of them. In an input gradient of stride `s` a tile is
    `s` times as large, so that every tile is alike.

    The weight gradient is that of the dense parts, of which the blocks on the diagonal are taken; `tile` plays no role in it.

    Attributes:
        parts: number of dense convolutions; divides the number of groups.
        tile: positions computed at once, vertical and horizontal.
        loop: run the parts in a loop, one after another, rather than as separate operations: many parts then compile as one.
    """

    parts: int = 1
    tile: Pair = (1, 1)
    loop: bool = False

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """See `Lowering`."""
        return shape.groups % self.parts == 0

    def _tiles(
        self, shape: ConvShape, direction: Direction
    ) -> tuple[tuple[int, int], tuple[AxisTiles, AxisTiles]]:
        high, wide = self.tile
        if direction is Direction.INPUT_GRADIENT:
            high, wide = high * shape.strides[0], wide * shape.strides[1]
        axes = (axis_tiles(shape, direction, 0, high), axis_tiles(shape, direction, 1, wide))
        return (high, wide), axes

    def _prepare(
        self, shape: ConvShape, direction: Direction, kernel: jax.Array
    ) -> tuple[jax.Array, ...]:
        if direction is Direction.INPUT_GRADIENT:
            kernel = swapped(kernel, shape.groups)
        _, (rows, columns) = self._tiles(shape, direction)

        def part(k: jax.Array) -> jax.Array:
            return _tiled(block_diagonal(k, shape.groups // self.parts), rows, columns)

        if self.loop:
            return (jax.vmap(part)(_apart(kernel, self.parts)),)
        return tuple(part(k) for k in jnp.split(kernel, self.parts, axis=-1))

    def _run(
        self,
        shape: ConvShape,
        direction: Direction,
        operand: jax.Array,
        prepared: tuple[jax.Array, ...],
    ) -> jax.Array:
        (high, wide), (rows, columns) = self._tiles(shape, direction)
        dilation = _dilation(rows), _dilation(columns)
        strides, padding = (rows.stride, columns.stride), (rows.padding, columns.padding)
        batch, height, width, channels = shape.result(direction)
        each = channels // self.parts

        def part(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _dense(x, kernel, strides, padding, dilation).reshape(
                batch, rows.count, columns.count, high, wide, each
            )

        if self.loop:
            found = lax.map(lambda xk: part(*xk), (_apart(operand, self.parts), prepared[0]))
            y = jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], channels)
        else:
            slices = jnp.split(operand, self.parts, axis=-1)
            y = _joined([part(x, k) for x, k in zip(slices, prepared, strict=True)])
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(
            batch, rows.count * high, columns.count * wide, channels
        )
        return y[:, :height, :width]

    def _weight_gradient(self, shape: ConvShape, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        size, each = shape.input[:3], shape.groups // self.parts
        inputs, outputs = shape.input[3] // self.parts, shape.kernel[3] // self.parts
        dense = dataclasses.replace(
            shape,
            input=(*size, inputs),
            kernel=(*shape.kernel[:2], inputs, outputs),
            groups=1,
            dtype=str(x.dtype),
        )

        def part(x: jax.Array, y: jax.Array) -> jax.Array:
            return diagonal_blocks(native(dense, Direction.WEIGHT_GRADIENT, x, y), each)

        if self.loop:
            apart = _apart(x, self.parts), _apart(cotangent, self.parts)
            found = lax.map(lambda xy: part(*xy), apart)
            return jnp.moveaxis(found, 0, -2).reshape(shape.kernel)
        slices = (jnp.split(a, self.parts, axis=-1) for a in (x, cotangent))
        return _joined([part(a, b) for a, b in zip(*slices, strict=True)])


def _apart(x: jax.Array, parts: int) -> jax.Array:
    """Parts of the last axis, in a first axis of their own."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], parts, -1), -2, 0)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _dense(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    padding: tuple[Pair, Pair],
    dilation: Pair,
) -> jax.Array:
    # A convolution that cuts off is not among those that run fast.
    cut = tuple((min(low, 0), min(high, 0)) for low, high in padding)
    added = tuple((max(low, 0), max(high, 0)) for low, high in padding)
    x = padded(x, cut) if any(map(any, cut)) else x
    return lax.conv_general_dilated(
        x, kernel, strides, added, rhs_dilation=dilation, dimension_numbers=LAYOUT
    )


def _dilation(axis: AxisTiles) -> int:
    """What the convolution spreads the taps by: it does so where a tile is one position, and the kernel holds zeros elsewhere."""
    taps = axis.positions[0]
    return taps.step if len(axis.positions) == 1 and taps is not None else 1


def _tiled(kernel: jax.Array, rows: AxisTiles, columns: AxisTiles) -> jax.Array:
    """`[*window, in, out]` -> `[*window of a tile, in, tile height * tile width * out]`."""
    axes = rows, columns
    window = tuple(
        kernel.shape[i] if len(axis.positions) == 1 else axis.window for i, axis in enumerate(axes)
    )
    found = []
    for pair in itertools.product(rows.positions, columns.positions):
        k, spread = kernel, []
        for i, taps in enumerate(pair):
            if taps is None:
                break
            k = taken(k, i, taps)
            single = len(axes[i].positions) == 1
            spread.append((0, 0, 0) if single else _spread_axis(k.shape[i], taps, window[i]))
        if len(spread) < 2:
            found.append(jnp.zeros((*window, *kernel.shape[2:]), kernel.dtype))
        elif any(map(any, spread)):
            found.append(lax.pad(k, jnp.zeros((), k.dtype), (*spread, (0, 0, 0), (0, 0, 0))))
        else:
            found.append(k)
    return _joined(found)


def taken(kernel: jax.Array, axis: int, taps: AxisTaps) -> jax.Array:
    """Some of the taps of a kernel along an axis, in the order in which they stand."""
    index = [slice(None)] * kernel.ndim
    index[axis] = taps.taps
    kernel = kernel[tuple(index)]
    return jnp.flip(kernel, axis) if taps.flipped else kernel


def _spread_axis(count: int, taps: AxisTaps, window: int) -> tuple[int, int, int]:
    last = taps.start + taps.step * (count - 1)
    return taps.start, window - 1 - last, taps.step - 1


def block_diagonal(kernel: jax.Array, groups: int) -> jax.Array:
    """The dense kernel of a grouped one: zero where input and output channel belong to different groups.

    Args:
        kernel: `[*window, in / groups, out]`.
        groups: number of groups.

    Returns:
        `[*window, in, out]`.
    """
    if groups == 1:
        return kernel
    per_group, out = kernel.shape[-2:]
    repeated = jnp.tile(kernel, (1,) * (kernel.ndim - 2) + (groups, 1))
    # A choice rather than a product, so that a weight that is not finite stays in its group.
    return jnp.where(_same_group(per_group * groups, out, groups, kernel.ndim), repeated, 0)


def diagonal_blocks(kernel: jax.Array, groups: int) -> jax.Array:
    """The blocks of a dense kernel that a grouped one has: the transpose of `block_diagonal`.

    Args:
        kernel: `[*window, in, out]`.
        groups: number of groups.

    Returns:
        `[*window, in / groups, out]`.
    """
    if groups == 1:
        return kernel
    *window, total, out = kernel.shape
    kept = jnp.where(_same_group(total, out, groups, kernel.ndim), kernel, 0)
    return kept.reshape(*window, groups, total // groups, out).sum(-3)


def _same_group(inputs: int, outputs: int, groups: int, dimensions: int) -> np.ndarray:
    group_of_input = np.arange(inputs)[:, None] // (inputs // groups)
    group_of_output = np.arange(outputs)[None, :] // (outputs // groups)
    same: np.ndarray = group_of_input == group_of_output
    return same.reshape((1,) * (dimensions - 2) + same.shape)


def swapped(kernel: jax.Array, groups: int) -> jax.Array:
    """The kernel with inputs and outputs exchanged in each group.

    Args:
        kernel: `[height, width, in / groups, out]`.
        groups: number of groups.

    Returns:
        `[height, width, out / groups, in]`, taps in the same order.
    """
    height, width, inner, out = kernel.shape
    split = kernel.reshape(height, width, inner, groups, out // groups)
    return split.transpose(0, 1, 4, 3, 2).reshape(height, width, out // groups, groups * inner)
