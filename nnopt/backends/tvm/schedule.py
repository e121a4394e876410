"""Schedules of fused kernels on a CPU: a template for convolutions and products, and one for everything else.

A kernel is what TVM has fused: perhaps zeros around an image, perhaps one convolution, then element-wise work. The template
holds a tile of results in registers over the whole reduction, applies the element-wise work to it there, and stores it once.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from nnopt.backends.tvm.conv import MAIN, ConvWorkload, Tile
from nnopt.backends.tvm.given import schedule_as_given
from nnopt.backends.tvm.microkernel import Microkernel, register, register_named
from nnopt.nests import Nest

_LEAST_PARALLEL = 1 << 14
"""Elements below which threads cost more than they bring."""


Work: TypeAlias = tuple[ConvWorkload, Tile] | Nest
"""What a template, or a program, says how to run."""


def schedule(function: Any, works: Mapping[str, Work], threads: int, lanes: int) -> Any:
    """Schedules one kernel.

    Args:
        function: a PrimFunc.
        works: what is scheduled as it says, by the name that its blocks have.
        threads: to spread the work over.
        lanes: elements in a vector register.

    Returns:
        The `tvm.s_tir.Schedule`, with its trace.
    """
    import tvm
    from tvm import s_tir

    sch = s_tir.Schedule(
        tvm.IRModule({"main": function}), error_render_level="fast", debug_mask="none"
    )
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    main = [(b, works[str(name)]) for b in blocks if (name := sch.get(b).annotations.get(MAIN))]
    for block, _ in main:
        sch.unannotate(block, MAIN)
    if not main:
        _others(sch, blocks, threads, lanes)
    elif nests := {block: work for block, work in main if isinstance(work, Nest)}:
        _nests(sch, blocks, nests, threads, lanes)
    else:
        for block, work in main:  # one: no two are fused
            assert isinstance(work, tuple)
            _convolution(sch, blocks, block, *work, threads, lanes)
    return sch


def trace_json(sch: Any) -> str:
    """The instructions of a schedule: `replay` gives the same for the same kernel."""

    def plain(value: Any) -> Any:
        if isinstance(value, str | float | bool | None):
            return str(value) if isinstance(value, str) else value
        if isinstance(value, int):
            return int(value)
        if hasattr(value, "value"):  # TVM's own numbers
            return value.value
        if hasattr(value, "items"):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value]

    # With the second part of those that MetaSchedule made: their vectors and threads are in it.
    return json.dumps(plain(sch.trace.simplified(False).as_json()))


def replay(function: Any, trace: str) -> Any:
    """A kernel scheduled again.

    Args:
        function: the PrimFunc as it was before.
        trace: of `trace_json`.
    """
    import tvm
    from tvm import s_tir

    sch = s_tir.Schedule(tvm.IRModule({"main": function}))
    register_named(trace)
    s_tir.schedule.Trace.apply_json_to_schedule(json.loads(trace), sch)
    return sch


def _convolution(
    sch: Any,
    blocks: list[Any],
    conv: Any,
    work: ConvWorkload,
    tile: Tile,
    threads: int,
    lanes: int,
) -> None:
    at = next(i for i, b in enumerate(blocks) if sch.get(b).same_as(sch.get(conv)))
    before, after = blocks[:at], blocks[at + 1 :]
    for block in after[:-1]:
        sch.compute_inline(block)
    epilogue = after[-1] if after else None
    shape = _extents(sch, conv, "spatial")
    if epilogue is not None and not _in_place(sch, epilogue, conv, shape):
        # It moves elements, such as a reshape: no part of a tile's result is a tile of it.
        _others(sch, [epilogue], threads, lanes)
        epilogue = None
        kept = sch.cache_write(conv, 0, "local")
    elif epilogue is None:
        kept = sch.cache_write(conv, 0, "local")
    else:
        kept = epilogue
        sch.set_scope(conv, 0, "local")
    rank = len(tile.pixels)
    n, *loops = sch.get_loops(conv)
    spatial, channel, reduction = loops[:rank], loops[rank], loops[rank + 1 :]
    outer, inner = [], []
    for loop, size in zip(spatial, tile.pixels, strict=True):
        a, b = sch.split(loop, [None, size])
        outer.append(a)
        inner.append(b)
    blocks_of, vectors, vector = sch.split(channel, [None, tile.vectors, tile.lanes])
    first = [n, *outer]
    extent = {id(loop): int(sch.get(loop).extent) for loop in [*first, blocks_of]}
    # The operand that is larger is read once: its loop is the outer one.
    weights_first = work.weight_bytes > work.image_bytes
    order = [blocks_of, *first] if weights_first or tile.unrolled else [*first, blocks_of]
    rest = [*reduction, *inner, vectors, vector]
    if tile.unrolled:  # loops of one pass go outside: its microkernel has none
        rest.sort(key=lambda loop: int(sch.get(loop).extent) > 1)
        body = next(loop for loop in rest if int(sch.get(loop).extent) > 1)
    sch.reorder(*order, *rest)
    if threads > 1:
        lead, count = [], 1
        for loop in order[:-1]:
            lead.append(loop)
            count *= extent[id(loop)]
            if count >= 4 * threads:
                break
        fused = sch.fuse(*lead) if len(lead) > 1 else lead[0]
        sch.parallel(fused)
    last = order[-1]
    sch.reverse_compute_at(kept, last, preserve_unit_loops=True)
    inside = sch.get_loops(kept)[-(rank + 2) :]
    split = sch.split(inside[-1], [None, tile.lanes])
    sch.vectorize(split[-1])
    for loop in (*inside[1:-1], split[0]):
        sch.unroll(loop)
    if tile.unrolled:
        before = [block for block in before if not _at_tile(sch, block, conv, last, tile)]
    else:
        for loop in (*inner, vectors):
            sch.unroll(loop)
        sch.vectorize(vector)
    init = sch.decompose_reduction(conv, rest[0])
    *others, lane = sch.get_loops(init)[-(rank + 2) :]
    sch.vectorize(lane)
    for loop in others:
        sch.unroll(loop)
    if tile.unrolled:
        sch.tensorize(body, register(Microkernel.of(work, tile)))
    for block in before:
        # Not inlined: the products would be tested one by one.
        _vectorized(sch, block, threads, lanes)


def _at_tile(sch: Any, block: Any, conv: Any, loop: Any, tile: Tile) -> bool:
    """Zeros around what one tile reads, in the nearest cache; made for all of the image they take as long as the products.

    Returns:
        Whether the block is such zeros.
    """
    if not any(sch.get(b).same_as(sch.get(conv)) for b in sch.get_consumers(block)):
        return False
    if len(_extents(sch, block, "spatial")) != len(tile.pixels) + 2:  # a kernel that is packed here
        return False
    sch.compute_at(block, loop)
    *_, channel = sch.get_loops(block)
    if int(sch.get(channel).extent) % tile.lanes == 0:
        channel = sch.split(channel, [None, tile.lanes])[-1]
    sch.vectorize(channel)
    return True


def _nests(
    sch: Any, blocks: list[Any], nests: Mapping[Any, Nest], threads: int, lanes: int
) -> None:
    """Nests as they are given; what is around them is no part of a program."""
    given = {sch.get(b).name_hint: nest for b, nest in nests.items()}
    last = max(i for i, b in enumerate(blocks) if sch.get(b).name_hint in given)
    before = [b for b in blocks[:last] if sch.get(b).name_hint not in given]
    for block in before:
        _vectorized(sch, block, threads, lanes)
    _others(sch, blocks[last + 1 :], threads, lanes)
    for block, nest in nests.items():
        schedule_as_given(sch, block, nest)


def _in_place(sch: Any, epilogue: Any, conv: Any, shape: list[int]) -> bool:
    """Whether each element is made of the convolution's element at the same place, of which perhaps not all are needed."""
    from tvm import tirx

    sizes = _extents(sch, epilogue, "spatial")
    if len(sizes) != len(shape) or any(e > c for e, c in zip(sizes, shape, strict=True)):
        return False
    block, (made,) = sch.get(epilogue), sch.get(conv).writes

    def same(read: Any, variable: Any, size: int) -> bool:
        at = read.min
        return at.same_as(variable.var) or (
            size == 1 and isinstance(at, tirx.IntImm) and int(at) == 0
        )

    return all(
        int(read.extent) == 1 and same(read, variable, size)
        for part in block.reads
        if part.source.same_as(made.source)
        for read, variable, size in zip(part.region, block.iter_vars, shape, strict=True)
    )


def _extents(sch: Any, block: Any, kind: str) -> list[int]:
    from tvm import tirx

    wanted = tirx.IterVar.DataPar if kind == "spatial" else tirx.IterVar.CommReduce
    return [int(v.dom.extent) for v in sch.get(block).iter_vars if v.iter_type == wanted]


def _others(sch: Any, blocks: list[Any], threads: int, lanes: int) -> None:
    """Element-wise work is inlined as far as it goes; each loop nest that is left runs in vectors along its last axis."""
    from tvm import s_tir

    left = []
    for block in blocks:
        if not _extents(sch, block, "reduction") and sch.get_consumers(block):
            try:
                sch.compute_inline(block)
                continue
            except s_tir.ScheduleError:  # such as what is read at several places by a reduction
                pass
        left.append(block)
    for block in left:
        _vectorized(sch, block, threads, lanes)


def _vectorized(sch: Any, block: Any, threads: int, lanes: int) -> None:
    spatial, reduction = _extents(sch, block, "spatial"), _extents(sch, block, "reduction")
    loops = sch.get_loops(block)
    if len(loops) != len(spatial) + len(reduction) or not spatial:
        return
    outer, over = loops[: len(spatial)], loops[len(spatial) :]
    last = outer.pop()
    width = next((w for w in (lanes, lanes // 2, lanes // 4) if w > 1 and spatial[-1] % w == 0), 1)
    if width == 1 and spatial[-1] >= lanes:
        width = lanes
    work = math.prod(spatial) * math.prod(reduction)
    if width > 1:
        rest, vector = sch.split(last, [None, width])
        sch.reorder(*outer, rest, *over, vector)
        outer.append(rest)
    elif not over:
        return
    else:
        outer.append(last)
        vector = None
    if threads > 1 and work >= _LEAST_PARALLEL:
        sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])
    if vector is not None and (not over or spatial[-1] % width == 0):
        sch.vectorize(vector)
    if over:
        init = sch.decompose_reduction(block, over[0])
        if vector is not None and spatial[-1] % width == 0:
            sch.vectorize(sch.get_loops(init)[-1])
