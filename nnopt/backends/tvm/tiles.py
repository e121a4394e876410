"""Which tiles of a convolution may be fast on a CPU, the best by a simple model first.

The model counts the cycles of a core that does two vector operations and two loads in each: those of products, of zeros around the
image, and of results. There are three kinds of tile:

- vectors of one group's channels, the reduction in loops. Groups that fill half a vector waste the other half;
- vectors across groups of a depthwise convolution, the reduction in loops: each product loads its own input;
- vectors across groups, the reduction unrolled (`nnopt.backends.tvm.microkernel`): inputs are loaded, and spread over the lanes of
  their groups, once for all the products of a tile that need them.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from nnopt.backends.tvm.conv import ConvWorkload, Tile
from nnopt.backends.tvm.microkernel import Microkernel

_MOST_PRODUCTS = 3000
"""That are unrolled: code beyond that is slow to compile, and no part of it is in a cache for long."""

_STACK_BYTES = 1024
"""From which on TVM takes an array from the heap, where LLVM can't make registers of it."""


def tiles(work: ConvWorkload, lanes: int, registers: int) -> list[Tile]:
    """Tiles that may be fast, the best first.

    Args:
        work: the convolution.
        lanes: elements in a vector register.
        registers: number of them.
    """
    costs = dict(
        itertools.chain(_looped(work, lanes, registers), _unrolled(work, lanes, registers))
    )

    def order(tile: Tile) -> tuple[float, int, int]:
        return costs[tile], -tile.accumulators, abs(tile.pixels[0] - tile.pixels[-1])

    return sorted(costs, key=order)


def _looped(work: ConvWorkload, lanes: int, registers: int) -> Iterator[tuple[Tile, float]]:
    """Tiles, and cycles that they take: those of products, loads, or the latency of a product, whichever is most."""
    across = work.groups if work.depthwise else 1
    channels = across * work.outputs // work.groups
    lanes = min(lanes, 1 << (channels - 1).bit_length())
    reduction = math.prod(work.window) * work.inputs // work.groups
    zeros = 3 * work.image_bytes / (4 * lanes) if work.surrounded else 0.0
    for pixels in _products(work.output, registers):
        for vectors in (1, 2, 3, 4, 6, 8):
            tile = Tile(lanes, vectors, pixels, min(across, lanes))
            if tile.accumulators > registers - 4 or (vectors - 1) * lanes >= channels:
                continue
            count = math.prod(pixels)
            inputs = tile.accumulators if work.depthwise else count
            cycles = max(tile.accumulators / 2, 4, (vectors + inputs) / 2)
            if work.depthwise:  # loops over the window alone are short
                cycles += 2
            # A weight that serves few pixels is loaded often, from farther away; many accumulators leave few registers for it.
            cycles *= 1 + 0.3 / count + 0.004 * max(0, tile.accumulators - 16)
            yield tile, _passes(work, tile) * (reduction * cycles + _results(work, tile)) + zeros


def _unrolled(work: ConvWorkload, lanes: int, registers: int) -> Iterator[tuple[Tile, float]]:
    """Tiles of several groups to a vector, where groups are small and divide it."""
    per_group, each = work.outputs // work.groups, work.inputs // work.groups
    if not work.groups > 1 or per_group >= lanes or lanes % per_group or not work.output:
        return
    across = lanes // per_group
    if each > 2 * per_group and across * each > lanes:  # spread from more than two vectors
        return
    for pixels in _products(work.output, registers):
        tile = Tile(lanes, 1, pixels, across, unrolled=True)
        kernel = Microkernel.of(work, tile)
        if tile.accumulators > registers - 8 or kernel.products > _MOST_PRODUCTS:
            continue
        spreads = 0 if kernel.plain else kernel.reads
        operations = (kernel.products + spreads) / 2, (kernel.reads + kernel.weights) / 2
        latency = 4 * kernel.products / tile.accumulators
        zeros = 1.5 * math.prod(kernel.size) if work.surrounded else 0.0
        cycles = max(*operations, latency) + zeros + _results(work, tile)
        yield tile, _passes(work, tile) * cycles


def _results(work: ConvWorkload, tile: Tile) -> float:
    """Cycles that it takes to begin, finish and store those of a pass."""
    size, channels = tile.rounded(work)
    even = size == work.output and channels * tile.apart(work) == work.outputs
    heap = tile.accumulators * tile.lanes * 4 >= _STACK_BYTES
    return tile.accumulators * (2 if even else 6) + 40 * heap


def _passes(work: ConvWorkload, tile: Tile) -> int:
    """Of tiles over the result of an image."""
    size, channels = tile.rounded(work)
    pixels = math.prod(size) // math.prod(tile.pixels)
    return pixels * tile.apart(work) * channels // (tile.lanes * tile.vectors)


def _products(size: Sequence[int], most: int) -> list[tuple[int, ...]]:
    if not size:
        return [()]
    return [
        (n, *rest)
        for n in range(1, min(size[0], most) + 1)
        for rest in _products(size[1:], most // n)
    ]
