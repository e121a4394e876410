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
    def surrounded(self) -> bool:
        """Whether there are zeros around the image, or in it."""
        return any(self.low) or any(self.high) or any(e > 1 for e in self.input_dilation)

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
        across: groups whose output channels share a vector.
        unrolled: the reduction is, with everything in registers that several products need: see `nnopt.backends.tvm.microkernel`.
    """

    lanes: int
    vectors: int
    pixels: tuple[int, ...]
    across: int = 1
    unrolled: bool = False

    @property
    def accumulators(self) -> int:
        """Vector registers for results."""
        return self.vectors * math.prod(self.pixels)

    def apart(self, work: ConvWorkload) -> int:
        """Groups that begin with a vector of their own."""
        return 1 if self.across > 1 else work.groups

    def rounded(self, work: ConvWorkload) -> tuple[tuple[int, ...], int]:
        """Spatial size and channels of a group (all channels where vectors run across groups), in full tiles."""
        channels = work.outputs // self.apart(work)
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
    split = kernel.reshape(*kernel.shape[:-1], tile.apart(work), -1)
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
    groups = tile.apart(work)
    read = tuple(
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(size, work.strides, work.window, work.dilation, strict=True)
    )
    each, per_group = work.inputs // work.groups, work.outputs // work.groups
    across = tile.across > 1
    image = _padded(x, read, channels // per_group * each if across else work.inputs, work)
    window = [te.reduce_axis((0, k), f"k{a}") for a, k in enumerate(work.window)]
    inner = te.reduce_axis((0, each), "ci")

    def product(*at: Any) -> Any:
        n, *place, co = at
        where = [
            p * s + k * d
            for p, s, k, d in zip(place, work.strides, window, work.dilation, strict=True)
        ]
        group = co // per_group if across else co // channels if groups > 1 else 0
        weight = kernel[(co // tile.lanes, *window, inner, co % tile.lanes)]
        return te.sum(image[(n, *where, group * each + inner)] * weight, axis=[*window, inner])

    made = te.compute(
        (work.batch, *size, groups * channels),
        product,
        name="conv",
        attrs={MAIN: name},
        varargs_names=["n", *(f"o{a}" for a in range(rank)), "co"],
    )
    if (*size, groups * channels) == (*work.output, work.outputs):
        return made

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
