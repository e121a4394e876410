"""Convolutions as sums of shifted images, for groups of one or a few channels."""

import abc
import dataclasses
import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nnopt.layers.conv_shape import AxisTaps, ConvShape, Direction, Pair, axis_tiles
from nnopt.layers.dense_lowerings import swapped, taken
from nnopt.layers.lowerings import Wide, padded, spread

_SUMMED_ROWS = 8
"""Rows added before a reduction. More of them are streams that fall on each other in the cache."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """Positions `offset + strides * q` of an input gradient: a convolution of stride one with some of the taps.

    Attributes:
        offset: the first of them, vertical and horizontal.
        rows: the taps, vertical.
        columns: horizontal.
        shape: of that convolution.
    """

    offset: Pair
    rows: AxisTaps
    columns: AxisTaps
    shape: ConvShape


def phases(shape: ConvShape) -> tuple[Phase, ...]:
    """The input gradient of a strided convolution as convolutions of stride one, one for each position modulo the strides."""
    axes = [axis_tiles(shape, Direction.INPUT_GRADIENT, i, shape.strides[i]) for i in (0, 1)]
    inner = shape.kernel[3] // shape.groups
    found = []
    for a, b in np.ndindex(*shape.strides):
        row, column = axes[0].positions[a], axes[1].positions[b]
        if row is None or column is None or a >= shape.input[1] or b >= shape.input[2]:
            continue
        window, padding = [], []
        for i, (r, taps) in enumerate(((a, row), (b, column))):
            count = len(range(*taps.taps.indices(shape.kernel[i])))
            positions = -(-(shape.input[1 + i] - r) // shape.strides[i])
            low = axes[i].padding[0] - taps.start
            window.append(count)
            padding.append((low, positions + taps.step * (count - 1) - shape.output[1 + i] - low))
        found.append(
            Phase(
                (a, b),
                row,
                column,
                ConvShape(
                    shape.output,
                    (window[0], window[1], inner, shape.input[3]),
                    padding=(padding[0], padding[1]),
                    dilation=(row.step, column.step),
                    groups=shape.groups,
                    dtype=shape.dtype,
                ),
            )
        )
    return tuple(found)


class _Shifted(Wide):
    """What the sums of shifted images share: an input gradient is a forward product for each phase."""

    def _prepare(
        self, shape: ConvShape, direction: Direction, kernel: jax.Array
    ) -> tuple[jax.Array, ...]:
        if direction is Direction.FORWARD:
            return (self._weights(shape, kernel),)
        kernel = swapped(kernel, shape.groups)
        return tuple(
            self._weights(p.shape, taken(taken(kernel, 0, p.rows), 1, p.columns))
            for p in phases(shape)
        )

    def _run(
        self,
        shape: ConvShape,
        direction: Direction,
        operand: jax.Array,
        prepared: tuple[jax.Array, ...],
    ) -> jax.Array:
        if direction is Direction.FORWARD:
            return self._sum(shape, operand, *prepared)
        images = [
            (p.offset, self._sum(p.shape, operand, weights))
            for p, weights in zip(phases(shape), prepared, strict=True)
        ]
        if not images:
            return jnp.zeros(shape.input, operand.dtype)
        if shape.strides == (1, 1):
            return images[0][1]
        size = shape.input[1], shape.input[2]
        return functools.reduce(
            operator.add, (spread(y, offset, shape.strides, size) for offset, y in images)
        )

    @abc.abstractmethod
    def _weights(self, shape: ConvShape, kernel: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _sum(self, shape: ConvShape, x: jax.Array, weights: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class ShiftedSum(_Shifted):
    """A sum over the window, and over the inputs of a group, of shifted images times weights.

        y[n, i, j, c] = sum over a, b, m of x[n, s i + d a - p, s j + d b - p, group(c) * in/groups + m] * k[a, b, m, c]

    For depthwise convolutions the least that can be done: one multiplication for each weight and position, fused. The weight
    gradient (depthwise only) is a sum of products over positions, a few rows at a time before XLA reduces the rest.
    """

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """See `Lowering`."""
        depthwise = shape.groups == shape.input[3] == shape.kernel[3]
        return depthwise or direction is not Direction.WEIGHT_GRADIENT

    def _weights(self, shape: ConvShape, kernel: jax.Array) -> jax.Array:
        return kernel

    def _sum(self, shape: ConvShape, x: jax.Array, weights: jax.Array) -> jax.Array:
        inner, output = shape.kernel[2], shape.output
        single = inner == 1 and shape.input[3] == shape.kernel[3]
        terms = []
        for (a, b), window in _windows(shape, padded(x, shape.padding)):
            if single:
                terms.append(window * weights[a : a + 1, b : b + 1])
                continue
            apart = window.reshape(*output[:3], shape.groups, inner)
            for m in range(inner):
                k = weights[a, b, m].reshape(1, 1, 1, shape.groups, -1)
                terms.append((apart[..., m : m + 1] * k).reshape(output))
        return functools.reduce(operator.add, terms)

    def _weight_gradient(self, shape: ConvShape, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        batch, height, width, channels = shape.output
        terms = min(_SUMMED_ROWS, height)
        each = -(-height // terms)
        # Zero rows make the blocks of rows equal; those of the input are multiplied by them.
        more = terms * each - height
        (top, bottom), sides = shape.padding
        x = padded(x, ((top, bottom + more * shape.strides[0]), sides))
        cotangent = padded(cotangent, ((0, more), (0, 0)))
        taller = dataclasses.replace(
            shape, padding=((top, bottom + more * shape.strides[0]), sides)
        )
        sums = []
        for _, window in _windows(taller, x):
            blocks = (
                window[:, i * each : (i + 1) * each] * cotangent[:, i * each : (i + 1) * each]
                for i in range(terms)
            )
            sums.append(functools.reduce(operator.add, blocks))
        stacked = jnp.stack(sums).reshape(len(sums), batch * each * width, channels)
        return stacked.sum(1).reshape(shape.kernel)


def _windows(shape: ConvShape, x: jax.Array) -> Iterator[tuple[Pair, jax.Array]]:
    """For each tap, what it sees of a padded input: `[batch, out height, out width, in]`."""
    batch, height, width, _ = shape.output
    for a, b in np.ndindex(*shape.kernel[:2]):
        top, left = a * shape.dilation[0], b * shape.dilation[1]
        end = (
            batch,
            top + (height - 1) * shape.strides[0] + 1,
            left + (width - 1) * shape.strides[1] + 1,
            x.shape[3],
        )
        yield (a, b), lax.slice(x, (0, top, left, 0), end, (1, *shape.strides, 1))


@dataclasses.dataclass(frozen=True)
class ShiftedPlanes(_Shifted):
    """`ShiftedSum` with the channels of a group taken apart first and put together afterwards, for groups of a few channels.

    Plane `m` holds input `m` of every group, `[batch, height, width * groups]`, so that one shifted plane times one row of
    weights serves all groups, and no channel is repeated. One fused sum makes output `o` of every group. Strides of one only.
    """

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """See `Lowering`."""
        return direction is not Direction.WEIGHT_GRADIENT and shape.strides == (1, 1)

    def _weights(self, shape: ConvShape, kernel: jax.Array) -> jax.Array:
        """`[out / groups, in / groups, taps, groups]`."""
        height, width, inner, out = kernel.shape
        split = kernel.reshape(height * width, inner, shape.groups, out // shape.groups)
        return split.transpose(3, 1, 0, 2)

    def _sum(self, shape: ConvShape, x: jax.Array, weights: jax.Array) -> jax.Array:
        outer, inner, taps, groups = weights.shape
        batch, height, width, _ = shape.output
        planes = x.reshape(*x.shape[:3], groups, inner).transpose(4, 0, 1, 2, 3)
        planes = padded(planes.reshape(-1, *x.shape[1:3], groups), shape.padding)
        planes = planes.reshape(inner, batch, planes.shape[1], -1)
        # A row of weights repeated over the width, so that the inner loop is a whole row, however few groups there are.
        rows = jnp.tile(weights[:, :, :, None], (1, 1, 1, width, 1))
        rows = rows.reshape(outer, inner, taps, width * groups)
        results = []
        for o in range(outer):
            terms = []
            for t, (a, b) in enumerate(np.ndindex(*shape.kernel[:2])):
                top, left = a * shape.dilation[0], b * shape.dilation[1] * groups
                for m in range(inner):
                    seen = planes[m, :, top : top + height, left : left + width * groups]
                    terms.append(seen * rows[o, m, t][None, None])
            results.append(functools.reduce(operator.add, terms))
        if outer == 1:
            return results[0].reshape(shape.output)
        # Stacking is not fused with what reads it, so the sums are not computed again in each reader.
        return jnp.stack(results, axis=-1).reshape(shape.output)

    def _weight_gradient(self, shape: ConvShape, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        raise NotImplementedError("ShiftedPlanes has no weight gradient: ask `applies` first")
