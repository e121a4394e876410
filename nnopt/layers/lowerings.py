"""Equal ways to compute a convolution and its two gradients.

XLA's CPU backend hands a dense convolution to a matrix product that runs near the machine's peak, but computes a grouped one
with plain loops, tens of times slower, and its weight gradient slower still. Everything here is a dense convolution, a
matrix product or a fused sum in disguise, and equal to the native form up to rounding.

A lowering of an input gradient never transposes: it is a plain convolution of the cotangent with the flipped kernel, for XLA
computes transposed convolutions inside loops and conditionals slowly, and the derivative of a sum of slices too.

Which lowering is fast depends on platform and shape: see `nnopt.layers.lowering`.
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from nnopt.layers.conv_shape import LAYOUT, ConvShape, Direction, Pair


@dataclasses.dataclass(frozen=True)
class Lowering(abc.ABC):
    """One way to compute the products of a convolution.

    A product has two operands. What depends on the second alone is prepared apart, so that a caller who uses the same weights many
    times prepares them once:

    | direction       | first operand                            | second operand                           | result       |
    |-----------------|------------------------------------------|------------------------------------------|--------------|
    | FORWARD         | `x`, `[batch, height, width, in]`        | `k`, `[*window, in / groups, out]`       | like `y`     |
    | INPUT_GRADIENT  | `y'`, `[batch, out height, ..., out]`    | `k`                                      | like `x`     |
    | WEIGHT_GRADIENT | `x`                                      | `y'`                                     | like `k`     |
    """

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """Whether this can compute that product."""
        return True

    @abc.abstractmethod
    def prepare(
        self, shape: ConvShape, direction: Direction, second: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The second operand, in the form that `run` takes. In a weight gradient it is the cotangent, and left as it is."""

    @abc.abstractmethod
    def run(
        self,
        shape: ConvShape,
        direction: Direction,
        first: jax.Array,
        prepared: Sequence[jax.Array],
    ) -> jax.Array:
        """The product of the first operand and what `prepare` made of the second."""

    def __call__(
        self, shape: ConvShape, direction: Direction, first: jax.Array, second: jax.Array
    ) -> jax.Array:
        """The product of two operands."""
        return self.run(shape, direction, first, self.prepare(shape, direction, second))


@dataclasses.dataclass(frozen=True)
class Native(Lowering):
    """XLA's convolution with feature groups, and the transposes that JAX derives from it."""

    def prepare(
        self, shape: ConvShape, direction: Direction, second: jax.Array
    ) -> tuple[jax.Array, ...]:
        """See `Lowering`."""
        return (second,)

    def run(
        self,
        shape: ConvShape,
        direction: Direction,
        first: jax.Array,
        prepared: Sequence[jax.Array],
    ) -> jax.Array:
        """See `Lowering`."""
        (second,) = prepared
        return native(shape, direction, first, second)


def native(
    shape: ConvShape,
    direction: Direction,
    first: jax.Array,
    second: jax.Array,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """A product of a convolution, as JAX computes it.

    Args:
        shape: the convolution.
        direction: which product.
        first: as in `Lowering`.
        second: likewise.
        precision: as in `jax.lax.conv_general_dilated`.
    """

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            shape.strides,
            shape.padding,
            rhs_dilation=shape.dilation,
            dimension_numbers=LAYOUT,
            feature_group_count=shape.groups,
            precision=precision,
        )

    if direction is Direction.FORWARD:
        return conv(first, second)
    # Inside `jax.shard_map` it varies over the mesh as the operands do; else JAX would sum over devices here.
    result = jax.typeof(first).update(shape=shape.result(direction))
    if direction is Direction.INPUT_GRADIENT:
        (gradient,) = jax.linear_transpose(lambda x: conv(x, second), result)(first)
    else:
        (gradient,) = jax.linear_transpose(lambda k: conv(first, k), result)(second)
    return gradient


class Wide(Lowering):
    """What the lowerings below share: half-precision operands are computed with in `float32`, as XLA's own convolution does."""

    def prepare(
        self, shape: ConvShape, direction: Direction, second: jax.Array
    ) -> tuple[jax.Array, ...]:
        """See `Lowering`."""
        second = widened(second)
        if direction is Direction.WEIGHT_GRADIENT:
            return (second,)
        return self._prepare(shape, direction, second)

    def run(
        self,
        shape: ConvShape,
        direction: Direction,
        first: jax.Array,
        prepared: Sequence[jax.Array],
    ) -> jax.Array:
        """See `Lowering`."""
        first = widened(first)
        if direction is Direction.WEIGHT_GRADIENT:
            (cotangent,) = prepared
            result = self._weight_gradient(shape, first, cotangent)
        else:
            result = self._run(shape, direction, first, tuple(prepared))
        return result.astype(shape.dtype)

    @abc.abstractmethod
    def _prepare(
        self, shape: ConvShape, direction: Direction, kernel: jax.Array
    ) -> tuple[jax.Array, ...]: ...

    @abc.abstractmethod
    def _run(
        self,
        shape: ConvShape,
        direction: Direction,
        operand: jax.Array,
        prepared: tuple[jax.Array, ...],
    ) -> jax.Array: ...

    @abc.abstractmethod
    def _weight_gradient(
        self, shape: ConvShape, x: jax.Array, cotangent: jax.Array
    ) -> jax.Array: ...


def widened(x: jax.Array) -> jax.Array:
    """Half precision as `float32`, anything else as it is."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


@dataclasses.dataclass(frozen=True)
class Fenced(Lowering):
    """Another lowering, behind a fence that XLA does not fuse over.

    XLA's CPU backend fuses a sum of shifted images into whatever reads it, and computes it again in each reader: the mean, the
    variance and the normalisation of a batch norm that follows. Within a larger program this costs more than the sum itself. What a
    conditional computes is computed once; the condition, a bit that is no more than one, always holds, which XLA does
    not see. (`jax.lax.optimization_barrier` does not last until fusion there.) Alone, a fence is of no use.

    Attributes:
        lowering: the other one.
    """

    lowering: Lowering

    def applies(self, shape: ConvShape, direction: Direction) -> bool:
        """See `Lowering`."""
        return self.lowering.applies(shape, direction)

    def prepare(
        self, shape: ConvShape, direction: Direction, second: jax.Array
    ) -> tuple[jax.Array, ...]:
        """See `Lowering`."""
        return self.lowering.prepare(shape, direction, second)

    def run(
        self,
        shape: ConvShape,
        direction: Direction,
        first: jax.Array,
        prepared: Sequence[jax.Array],
    ) -> jax.Array:
        """See `Lowering`."""

        def inside(first: jax.Array, *prepared: jax.Array) -> jax.Array:
            return self.lowering.run(shape, direction, first, prepared)

        def never(first: jax.Array, *prepared: jax.Array) -> jax.Array:
            return jnp.zeros_like(first, shape=shape.result(direction), dtype=shape.dtype)

        bits = lax.bitcast_convert_type(first[0, 0, 0, 0], f"uint{8 * first.dtype.itemsize}")
        result: jax.Array = lax.cond(bits % 2 <= 1, inside, never, first, *prepared)
        return result


def padded(x: jax.Array, padding: Sequence[Pair]) -> jax.Array:
    """Zeros around height and width; what is below zero is cut off.

    Args:
        x: `[batch, height, width, channels]`.
        padding: before and after, vertical and horizontal.
    """
    if not any(map(any, padding)):
        return x
    batch, height, width, channels = x.shape
    (top, bottom), (left, right) = padding
    # Rows as one long axis: XLA's inner loop is then long, which makes padding up to twice as fast.
    rows = lax.pad(
        x.reshape(batch, height, width * channels),
        jnp.zeros((), x.dtype),
        ((0, 0, 0), (top, bottom, 0), (left * channels, right * channels, 0)),
    )
    return rows.reshape(batch, height + top + bottom, width + left + right, channels)


def spread(y: jax.Array, offset: Pair, strides: Pair, size: Pair) -> jax.Array:
    """Puts positions `q` at `offset + strides * q` of an image of zeros of that size."""
    config = [(0, 0, 0)]
    for n, count, first, s in zip(size, y.shape[1:3], offset, strides, strict=True):
        config.append((first, n - first - (count - 1) * s - 1, s - 1))
    return lax.pad(y, jnp.zeros((), y.dtype), (*config, (0, 0, 0)))
