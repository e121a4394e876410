"""The microkernel of convolutions in small groups: a vector of output channels that belong to several groups.

Each lane needs an input of its own group. A vector of neighbouring inputs is loaded once and spread over the lanes in a register,

    channels of the image   a0 a1 a2 a3 | b0 b1 b2 b3 | ...
    input 1 of each group   a1 a1 a1 a1 | b1 b1 b1 b1 | ...

and serves, as one operand, every product of the tile that it is part of: with a window of 3 x 3, nine at most. The weights of an
input stand in registers as well. No loop of TVM's can say that, so the loops over a tile and its reduction are replaced as a whole
(`tensorize`) by straight-line code; TVM checks that they are the loops which that code is for.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from nnopt.backends.tvm.conv import ConvWorkload, Tile

Place: TypeAlias = tuple[int, ...]
_NAME = re.compile(r"nnopt\.microkernel (\S+) (\S+) (\S+) (\S+) (\d+) (\d+) (\d+) (\w+)")


@dataclasses.dataclass(frozen=True)
class Microkernel:
    """That of one tile of a convolution.

    Attributes:
        pixels: of the result, along each spatial axis.
        window: of the kernel.
        strides: of the window.
        dilation: of it.
        inputs: channels of a group.
        outputs: channels of a group.
        lanes: elements of a vector: `outputs` of several groups.
        dtype: of all arrays.
    """

    pixels: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    inputs: int
    outputs: int
    lanes: int
    dtype: str

    @classmethod
    def of(cls, work: ConvWorkload, tile: Tile) -> "Microkernel":
        """Of a tile."""
        return cls(
            tile.pixels, work.window, work.strides, work.dilation, work.inputs // work.groups, work.outputs // work.groups,
            tile.lanes, work.dtype,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """By which a schedule, and its trace, names it."""
        shapes = (self.pixels, self.window, self.strides, self.dilation)
        counts = (self.inputs, self.outputs, self.lanes, self.dtype)
        return " ".join(
            ["nnopt.microkernel", *("x".join(map(str, s)) for s in shapes), *map(str, counts)]
        )

    @property
    def size(self) -> tuple[int, ...]:
        """Of the image that is read, along each spatial axis."""
        return tuple(
            (n - 1) * s + (k - 1) * d + 1
            for n, k, s, d in zip(
                self.pixels, self.window, self.strides, self.dilation, strict=True
            )
        )

    @property
    def channels(self) -> int:
        """Of the image that are read."""
        return self.lanes // self.outputs * self.inputs

    @property
    def plain(self) -> bool:
        """Whether inputs are in their lanes as they are loaded: in a depthwise convolution."""
        return self.inputs == self.outputs == 1

    @property
    def products(self) -> int:
        """Vectors of them."""
        return math.prod(self.pixels) * self.weights

    @property
    def weights(self) -> int:
        """Vectors of them."""
        return math.prod(self.window) * self.inputs

    @functools.cached_property
    def reads(self) -> int:
        """Vectors of inputs."""
        return self.inputs * sum(1 for _ in self.uses())

    def uses(self) -> Iterator[tuple[Place, list[tuple[Place, Place]]]]:
        """Places of the image, and for each the results that need it with the place of the weight that they need it for."""
        axes = []
        for n, k, s, d in zip(self.pixels, self.window, self.strides, self.dilation, strict=True):
            found: dict[int, list[tuple[int, int]]] = {}
            for pixel, tap in itertools.product(range(n), range(k)):
                found.setdefault(pixel * s + tap * d, []).append((pixel, tap))
            axes.append(sorted(found.items()))
        for places in itertools.product(*axes):
            uses = [
                (tuple(pixel for pixel, _ in use), tuple(tap for _, tap in use))
                for use in itertools.product(*(pairs for _, pairs in places))
            ]
            yield tuple(at for at, _ in places), uses


def register(kernel: Microkernel) -> str:
    """Makes a microkernel known to TVM.

    Returns:
        The name for `tensorize`.
    """
    _registered(kernel)
    return kernel.name


def register_named(trace: str) -> None:
    """Makes the microkernels known that a schedule's trace names."""
    for *shapes, inputs, outputs, lanes, dtype in _NAME.findall(trace):
        pixels, window, strides, dilation = (tuple(map(int, s.split("x"))) for s in shapes)
        counts = int(inputs), int(outputs), int(lanes)
        register(Microkernel(pixels, window, strides, dilation, *counts, dtype))


@functools.cache
def _registered(kernel: Microkernel) -> None:
    from tvm import s_tir

    loops = _function(kernel, lambda *buffers: _loops(kernel, *buffers))
    code = _function(kernel, lambda *buffers: _straight(kernel, *buffers))
    s_tir.TensorIntrin.register(kernel.name, loops, code, override=True)


def _function(kernel: Microkernel, body: Callable[[Any, Any, Any], Any]) -> Any:
    """A function of `x [*size, channels]`, `k [*window, inputs, lanes]` and `y [*pixels, lanes]`, parts of larger arrays."""
    from tvm import ir, s_tir, tirx

    def buffer(name: str, shape: tuple[int, ...], scope: str) -> Any:
        strides = [tirx.Var(f"{name}{i}", "int32") for i in range(len(shape) - 1)]
        return tirx.decl_buffer(
            shape, kernel.dtype, name, strides=[*strides, 1], scope=scope, offset_factor=1, layout=None
        )  # fmt: skip

    x = buffer("x", (*kernel.size, kernel.channels), "")
    k = buffer("k", (*kernel.window, kernel.inputs, kernel.lanes), "")
    y = buffer("y", (*kernel.pixels, kernel.lanes), "local")
    whole = [
        tirx.BufferRegion(b, [ir.Range.from_min_extent(0, n) for n in b.shape]) for b in (y, x, k)
    ]
    block = s_tir.SBlock([], whole, whole[:1], "root", body(x, k, y))
    realized = s_tir.SBlockRealize([], True, block)
    return tirx.PrimFunc([x, k, y], realized).with_attr("s_tir", True)


def _loops(kernel: Microkernel, x: Any, k: Any, y: Any) -> Any:
    """What is replaced, as TVM has it then: loops of the reduction and of the tile, those of one pass left out."""
    from tvm import ir, s_tir, tirx

    rank = len(kernel.pixels)
    spatial = [
        (f"o{a}", n, tirx.IterVar.DataPar) for a, n in enumerate((*kernel.pixels, kernel.lanes))
    ]
    over = [
        (f"k{a}", n, tirx.IterVar.CommReduce) for a, n in enumerate((*kernel.window, kernel.inputs))
    ]
    variables, loops, values = [], {}, {}
    for name, extent, kind in (*spatial, *over):
        values[name] = 0 if extent == 1 else tirx.Var(f"v{name}", "int32")
        if extent > 1:
            variables.append(tirx.IterVar(ir.Range(0, extent), values[name], kind))
            loops[name] = tirx.Var(name, "int32"), extent
    *place, lane = (values[name] for name, *_ in spatial)
    *window, ci = (values[name] for name, *_ in over)
    read = [
        p * s + t * d
        for p, t, s, d in zip(place, window, kernel.strides, kernel.dilation, strict=True)
    ]
    at_x = [*read, lane // kernel.outputs * kernel.inputs + ci]
    at_k, at_y = [*window, ci, lane], [*place, lane]

    def element(buffer: Any, at: list[Any]) -> Any:
        return tirx.BufferRegion(buffer, [ir.Range.from_min_extent(i, 1) for i in at])

    total = tirx.BufferLoad(y, at_y) + tirx.BufferLoad(x, at_x) * tirx.BufferLoad(k, at_k)
    reads = [element(y, at_y), element(x, at_x), element(k, at_k)]
    block = s_tir.SBlock(variables, reads, reads[:1], "conv", tirx.BufferStore(y, total, at_y))
    body: Any = s_tir.SBlockRealize([loop for loop, _ in loops.values()], True, block)
    order = [*(name for name, *_ in over), *(name for name, *_ in spatial[:rank]), spatial[rank][0]]
    for name in reversed(order):
        if name in loops:
            loop, extent = loops[name]
            body = tirx.For(loop, 0, extent, tirx.ForKind.SERIAL, body)
    return body


def _straight(kernel: Microkernel, x: Any, k: Any, y: Any) -> Any:
    """The code: for each input of a group, each place of the image with all products that it is part of."""
    from tvm import tirx

    made = []

    def load(buffer: Any, at: Place, count: int) -> Any:
        return tirx.BufferLoad(buffer, [*at, tirx.Ramp(0, 1, count)])

    for ci in range(kernel.inputs):
        lanes = [lane // kernel.outputs * kernel.inputs + ci for lane in range(kernel.lanes)]
        spread = [tirx.const(lane, "int32") for lane in lanes]
        for place, uses in kernel.uses():
            value = load(x, place, kernel.channels)
            if not kernel.plain:  # of vectors that have as many lanes in all
                value = tirx.Shuffle([value] * -(-kernel.lanes // kernel.channels), spread)
            variable = tirx.Var("value", value.ty)
            made.append(tirx.Bind(variable, value))
            for at, tap in uses:
                # LLVM keeps results and weights in registers from here on.
                total = load(y, at, kernel.lanes) + variable * load(k, (*tap, ci), kernel.lanes)
                made.append(tirx.BufferStore(y, total, [*at, tirx.Ramp(0, 1, kernel.lanes)]))
    return tirx.SeqStmt(made)
