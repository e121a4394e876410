"""What a two-dimensional convolution is, apart from its values, and how its windows meet its input.

A convolution is linear in its input `x` and in its kernel `k`, so it has three products, each the transpose of the
others: `y = C(x, k)`, the input gradient `x' = T(y', k)` and the weight gradient `k' = W(x, y')`.
"""

import dataclasses
import enum
import functools
import math
from typing import Any, TypeAlias

import numpy as np
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
"""Channels last, as Flax has them."""

Pair: TypeAlias = tuple[int, int]

CONV = "nnopt_conv"
CONV_INPUT_GRADIENT = "nnopt_conv_input_gradient"
CONV_WEIGHT_GRADIENT = "nnopt_conv_weight_gradient"


class Direction(enum.Enum):
    """One of the three products of a convolution."""

    FORWARD = "forward"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """A two-dimensional convolution, channels last: everything about it but the values.

    Attributes:
        input: `[batch, height, width, in]`.
        kernel: `[window height, window width, in / groups, out]`.
        strides: of the window, vertical and horizontal.
        padding: zeros before and after, vertical and horizontal; below zero, what is cut off.
        dilation: of the kernel, vertical and horizontal.
        groups: of channels; the first `out / groups` outputs see the first `in / groups` inputs, and so on.
        dtype: name of the type of both operands and of the result.

    Example:
        >>> ConvShape((8, 32, 32, 16), (3, 3, 1, 16), padding=((1, 1), (1, 1)), groups=16).output
        (8, 32, 32, 16)
    """

    input: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    strides: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    dtype: str = "float32"

    @property
    def output(self) -> tuple[int, int, int, int]:
        """`[batch, out height, out width, out]`."""
        height, width = (
            max(0, (n + sum(pads) - d * (k - 1) - 1) // s + 1)
            for n, pads, d, k, s in zip(
                self.input[1:3], self.padding, self.dilation, self.kernel[:2], self.strides, strict=True
            )
        )  # fmt: skip
        return self.input[0], height, width, self.kernel[3]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of each of the three products, padding counted."""
        return math.prod(self.output) * math.prod(self.kernel[:3])

    def operands(
        self, direction: Direction
    ) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Shapes of the two operands of a product, in the order of its arguments."""
        return {
            Direction.FORWARD: (self.input, self.kernel),
            Direction.INPUT_GRADIENT: (self.output, self.kernel),
            Direction.WEIGHT_GRADIENT: (self.input, self.output),
        }[direction]

    def result(self, direction: Direction) -> tuple[int, int, int, int]:
        """Shape of a product."""
        return {
            Direction.FORWARD: self.output,
            Direction.INPUT_GRADIENT: self.input,
            Direction.WEIGHT_GRADIENT: self.kernel,
        }[direction]

    @staticmethod
    def of_equation(equation: Any) -> "ConvShape | None":
        """The convolution that an equation of a jaxpr computes; None if it computes none, or none that is channels-last and plain.

        Args:
            equation: has `primitive` (or its name), `params`, `inputs` (or `invars`) and `outputs` (or `outvars`), the latter two
                being abstract values or things that have an `aval`.
        """
        name = getattr(equation.primitive, "name", equation.primitive)
        params = equation.params
        if name == CONV:
            shape: ConvShape = params["shape"]
            return shape
        if name != "conv_general_dilated":
            return None
        atoms = equation.invars if hasattr(equation, "invars") else equation.inputs
        x, kernel = (getattr(atom, "aval", atom) for atom in atoms)
        if len(x.shape) != 4 or x.dtype != kernel.dtype:
            return None
        wanted = lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
        wider = params.get("preferred_element_type") not in (None, x.dtype)
        strange = params["batch_group_count"] != 1 or any(d != 1 for d in params["lhs_dilation"])
        if params["dimension_numbers"] != wanted or wider or strange:
            return None
        return ConvShape(
            tuple(x.shape),
            tuple(kernel.shape),
            _pair(params["window_strides"]),
            tuple((int(low), int(high)) for low, high in params["padding"]),  # type: ignore[arg-type]
            _pair(params["rhs_dilation"]),
            int(params["feature_group_count"]),
            str(np.dtype(x.dtype)),
        )


def _pair(values: Any) -> Pair:
    first, second = values
    return int(first), int(second)


@dataclasses.dataclass(frozen=True)
class AxisTaps:
    """Along one axis: which tap of the kernel stands where, seen from one position of a result.

    Attributes:
        taps: the taps, a slice of the kernel's axis.
        flipped: whether later taps stand earlier, as they do in an input gradient.
        start: where the first of them stands.
        step: how far they stand apart.
    """

    taps: slice
    flipped: bool
    start: int
    step: int


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """Along one axis: a result cut into tiles, each computed from one window of the operand.

        result[tile * q + r] = sum over taps of operand[stride * q - low + start + step * t] * kernel[tap t]

    with `start`, `step` and taps of `positions[r]`. The window covers what all positions of a tile see.

    Attributes:
        positions: for each position of a tile, its taps; None without one.
        window: extent of the operand that a tile sees.
        stride: from the window of a tile to the next.
        padding: of the operand.
        count: number of tiles; the last may reach beyond the result.
    """

    positions: tuple[AxisTaps | None, ...]
    window: int
    stride: int
    padding: Pair
    count: int


@functools.lru_cache(maxsize=4096)
def axis_tiles(shape: ConvShape, direction: Direction, axis: int, tile: int) -> AxisTiles:
    """Cuts the output (`Direction.FORWARD`) or the input gradient into tiles.

    Args:
        shape: the convolution.
        direction: which of the two.
        axis: 0 for the vertical, 1 for the horizontal.
        tile: positions of a tile. In an input gradient a multiple of the stride.
    """
    n, out = shape.input[1 + axis], shape.output[1 + axis]
    k, s, d = shape.kernel[axis], shape.strides[axis], shape.dilation[axis]
    low, high = shape.padding[axis]
    if direction is Direction.FORWARD:
        positions: list[AxisTaps | None] = [
            AxisTaps(slice(0, k), False, r * s, d) for r in range(tile)
        ]
        window, stride, count = s * (tile - 1) + d * (k - 1) + 1, s * tile, -(-out // tile)
        length = n
    else:
        # x[i] meets y[m] by tap a where s m + a d - low = i.
        reached: dict[int, tuple[range, int]] = {}
        for r in range(tile):
            taps = [a for a in range(k) if (r + low - a * d) % s == 0]
            if taps:
                apart = s // math.gcd(s, d)
                reached[r] = range(taps[0], k, apart), (r + low - taps[-1] * d) // s
        first = min((start for _, start in reached.values()), default=0)
        step = d // math.gcd(s, d)
        window = max(
            (start - first + step * (len(taps) - 1) + 1 for taps, start in reached.values()),
            default=1,
        )
        positions = [
            AxisTaps(
                slice(reached[r][0].start, k, reached[r][0].step), True, reached[r][1] - first, step
            )
            if r in reached
            else None
            for r in range(tile)
        ]
        stride, count, low, length = tile // s, -(-n // tile), -first, out
    high = (count - 1) * stride + window - length - low
    return AxisTiles(tuple(positions), window, stride, (low, high), count)
