"""Convolutions as tensor expressions, with kernels packed for vectors of output channels.

A convolution of any rank reads `x [batch, *size, inputs]` and a packed kernel `[blocks, *window, inputs / groups, lanes]`, so that
the innermost loop multiplies one input by a vector of consecutive weights. What does not divide is computed in full tiles and
cropped: no loop has a condition in it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nnopt.backends.tvm.padding import padded

MAIN = "nnopt.main"
"""Annotation of the block that a schedule is for."""


@dataclasses.dataclass(frozen=True)
class ConvWorkload:
    """A convolution, channels last, apart from its values; a dense layer is one of window 1.

    Attributes:
        batch: number of images.
        size: of an image, along each axis.
        inputs: channels.
        outputs: channels.
        window: of the kernel.
        strides: of the window.
        low: zeros before the image along each axis; below zero, what is cut off.
        high: zeros after it.
        dilation: of the window.
        input_dilation: distance of the image's elements, as in a transposed convolution.
        groups: of channels.
        dtype: of all arrays.
    """

    batch: int
    size: tuple[int, ...]
    inputs: int
    outputs: int
    window: tuple[int, ...]
    strides: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    groups: int = 1
    dtype: str = "float32"

    @property
    def output(self) -> tuple[int, ...]:
        """Size of the result, along each axis."""
        return tuple(
            max(0, ((n - 1) * e + 1 + lo + hi - ((k - 1) * d + 1)) // s + 1)
            for n, e, lo, hi, k, d, s in zip(
                self.size, self.input_dilation, self.low, self.high, self.window, self.dilation, self.strides, strict=True,
            )
        )  # fmt: skip

    @property
    def depthwise(self) -> bool:
        """Each output channel has an input channel of its own."""
        return self.groups == self.inputs == self.outputs and self.groups > 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates, those with padding counted."""
        return (
            self.batch
            * math.prod(self.output)
            * self.outputs
            * math.prod(self.window)
            * (self.inputs // self.groups)
        )

    @property
    def image_bytes(self) -> int:
        """Size of the input."""
        return self.batch * math.prod(self.size) * self.inputs * np.dtype(self.dtype).itemsize

    @property
    def weight_bytes(self) -> int:
        """Size of the kernel."""
        item = np.dtype(self.dtype).itemsize
        return math.prod(self.window) * self.inputs // self.groups * self.outputs * item


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one pass over the reduction computes.

    Attributes:
        lanes: output channels in a vector.
        vectors: of them side by side.
        pixels: output elements along each spatial axis.
    """

    lanes: int
    vectors: int
    pixels: tuple[int, ...]

    @property
    def accumulators(self) -> int:
        """Vector registers for results."""
        return self.vectors * math.prod(self.pixels)

    def rounded(self, work: ConvWorkload) -> tuple[tuple[int, ...], int]:
        """Spatial size and channels of a group (all channels if depthwise), in full tiles."""
        channels = work.outputs if work.depthwise else work.outputs // work.groups
        size = tuple(_up(n, p) for n, p in zip(work.output, self.pixels, strict=True))
        return size, _up(channels, self.lanes * self.vectors)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def pack(kernel: np.ndarray, work: ConvWorkload, tile: Tile) -> np.ndarray:
    """Lays a kernel out for a tile.

    Args:
        kernel: `[*window, inputs / groups, outputs]`.
        work: the convolution.
        tile: of it.

    Returns:
        `[padded outputs / lanes, *window, inputs / groups, lanes]`, zeros for channels that there are not.
    """
    _, channels = tile.rounded(work)
    groups = 1 if work.depthwise else work.groups
    split = kernel.reshape(*kernel.shape[:-1], groups, -1)
    missing = channels - split.shape[-1]
    split = np.pad(split, [(0, 0)] * (split.ndim - 1) + [(0, missing)])
    blocks = split.reshape(*kernel.shape[:-1], -1, tile.lanes)
    return np.ascontiguousarray(np.moveaxis(blocks, -2, 0))


def convolve(x: Any, kernel: Any, work: ConvWorkload, tile: Tile, name: str = "") -> Any:
    """The tensor expression: zeros around the image where there are any, products, and a crop where tiles are too large.

    Args:
        x: `[batch, *size, inputs]`.
        kernel: packed.
        work: the convolution.
        tile: of it.
        name: by which a schedule finds the block.

    Returns:
        `[batch, *output, outputs]`.
    """
    from tvm import te, tirx

    rank = len(work.size)
    size, channels = tile.rounded(work)
    groups = 1 if work.depthwise else work.groups
    read = tuple(
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(size, work.strides, work.window, work.dilation, strict=True)
    )
    image = _padded(x, read, channels if work.depthwise else work.inputs, work)
    each = work.inputs // work.groups
    window = [te.reduce_axis((0, k), f"k{a}") for a, k in enumerate(work.window)]
    inner = [] if work.depthwise else [te.reduce_axis((0, each), "ci")]

    def product(*at: Any) -> Any:
        n, *place, co = at
        where = [
            p * s + k * d
            for p, s, k, d in zip(place, work.strides, window, work.dilation, strict=True)
        ]
        first = 0 if groups == 1 else co // channels * each
        ci = co if work.depthwise else first + inner[0]
        weight = kernel[(co // tile.lanes, *window, inner[0] if inner else 0, co % tile.lanes)]
        return te.sum(image[(n, *where, ci)] * weight, axis=[*window, *inner])

    made = te.compute(
        (work.batch, *size, groups * channels),
        product,
        name="conv",
        attrs={MAIN: name},
        varargs_names=["n", *(f"o{a}" for a in range(rank)), "co"],
    )
    if (*size, groups * channels) == (*work.output, work.outputs):
        return made
    per_group = work.outputs // groups

    def cropped(*at: Any) -> Any:
        *place, co = at
        if groups > 1 and per_group != channels:
            co = co // per_group * channels + tirx.indexmod(co, per_group)
        return made[(*place, co)]

    return te.compute((work.batch, *work.output, work.outputs), cropped, name="crop")


def _padded(x: Any, read: Sequence[int], channels: int, work: ConvWorkload) -> Any:
    """The image with the zeros that are read, or itself if there are none."""
    from tvm import tirx

    whole = [
        lo == 0 and e == 1 and r <= n
        for lo, e, r, n in zip(work.low, work.input_dilation, read, work.size, strict=True)
    ]
    if all(whole) and channels == work.inputs:
        return x
    shape = (work.batch, *read, channels)
    steps = (1, *work.input_dilation, 1)
    return padded(x, shape, (0, *work.low, 0), steps, lambda: tirx.const(0, work.dtype))


def tiles(work: ConvWorkload, lanes: int, registers: int) -> list[Tile]:
    """Tiles that may be fast, the best by a simple model first.

    The model counts the cycles of one step of the reduction, of a core that does two products and two loads in each: those of
    products, loads of weights and inputs, and the latency of a product, whichever is most; and the work on what is cropped.

    Args:
        work: the convolution.
        lanes: elements in a vector register.
        registers: number of them.
    """
    channels = work.outputs if work.depthwise else work.outputs // work.groups
    lanes = min(lanes, 1 << (channels - 1).bit_length())
    found = []
    for pixels in _products(work.output, registers):
        for vectors in (1, 2, 3, 4, 6, 8):
            tile = Tile(lanes, vectors, pixels)
            if tile.accumulators > registers - 4 or (vectors - 1) * lanes >= channels:
                continue
            size, padded = tile.rounded(work)
            steps = math.prod(size) // math.prod(pixels) * padded // (lanes * vectors)
            count = math.prod(pixels)
            inputs = tile.accumulators if work.depthwise else count
            cycles = max(tile.accumulators / 2, 4, (vectors + inputs) / 2)
            # A weight that serves few pixels is loaded often, from farther away; many accumulators leave few registers for it.
            cost = steps * cycles * (1 + 0.3 / count + 0.004 * max(0, tile.accumulators - 16))
            found.append((cost, -tile.accumulators, abs(pixels[0] - pixels[-1]), tile))
    return [tile for *_, tile in sorted(found, key=lambda f: f[:3])]


def _products(size: Sequence[int], most: int) -> list[tuple[int, ...]]:
    if not size:
        return [()]
    return [
        (n, *rest)
        for n in range(1, min(size[0], most) + 1)
        for rest in _products(size[1:], most // n)
    ]
