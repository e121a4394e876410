"""The schedule half of a program, applied to a kernel as given."""

from collections.abc import Sequence
from typing import Any

from nnopt.errors import BackendError
from nnopt.nests import Nest


def axes(nest: Nest) -> tuple[list[str], list[str]]:
    """Loops of the output that products differ in, and loops of the reduction, in the nest's order."""
    multiplies = [loop.name for loop in nest.loops if nest.computes(loop.name)]
    return (
        [name for name in multiplies if nest.is_output(name)],
        [name for name in multiplies if not nest.is_output(name)],
    )


def schedule_as_given(sch: Any, block: Any, nest: Nest) -> None:
    """Order and marks of a nest's loops, applied to its block; the batch is the outermost loop.

    Raises:
        BackendError: a mark has no meaning on a CPU, or two of them none together.
    """
    outputs, reductions = axes(nest)
    batch, *loops = sch.get_loops(block)
    at = dict(zip([*outputs, *reductions], loops, strict=True))
    order = [loop for loop in nest.loops if loop.name in at]
    sch.reorder(batch, *(at[loop.name] for loop in order))
    marks = {loop.name: loop.marks for loop in order}
    if bound := [name for name, m in marks.items() if any("." in mark for mark in m)]:
        raise BackendError(
            f"tvm: {bound[0]} is bound to {marks[bound[0]][0]}, which a CPU does not have"
        )
    if len(parallel := [name for name, m in marks.items() if "parallel" in m]) > 1:
        raise BackendError(
            f"tvm: {parallel[0]} and {parallel[1]} are both parallel, which TVM's threads cannot do one within the other; "
            "fuse the two and mark the one loop"
        )
    for name, m in marks.items():
        if "vectorize" in m and any(mark.startswith("prefetch") for mark in m):
            raise BackendError(
                f"tvm: {name} is vectorized, and something is to be fetched for each of its iterations, which are one; "
                "prefetch at a loop around it"
            )
    for loop in order:
        if "parallel" in loop.marks:
            sch.parallel(at[loop.name])
        for mark in loop.marks:
            if mark.startswith("prefetch"):
                array = 0 if mark.endswith("x") else 1
                # For this nest alone: others read the same kernel, outside of this loop.
                fetched = sch.cache_read(block, array, "global", consumer_blocks=[block])
                sch.compute_at(fetched, at[loop.name])
    # Before the reduction has a beginning of its own: what is left then is no whole block, and takes no marks.
    for loop in order:
        _mark(sch, at[loop.name], loop.marks)
    first = next((loop.name for loop in order if loop.name in reductions), None)
    within = [loop for loop in order if loop.name in outputs]
    if first is not None:
        within = [loop for loop in order[order_of(order, first) :] if loop.name in outputs]
        init = sch.decompose_reduction(block, at[first])
        copies = sch.get_loops(init)[len(sch.get_loops(init)) - len(within) :]
        for loop, copy in zip(within, copies, strict=True):
            _mark(sch, copy, loop.marks)


def order_of(loops: Sequence[Any], name: str) -> int:
    """Which of the loops has a name."""
    return next(i for i, loop in enumerate(loops) if loop.name == name)


def _mark(sch: Any, loop: Any, marks: Sequence[str]) -> None:
    if "vectorize" in marks:
        sch.vectorize(loop)
    if "unroll" in marks:
        sch.unroll(loop)
