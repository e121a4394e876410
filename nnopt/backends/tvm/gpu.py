"""Kernels for a GPU: schedules that TVM has ready (dlight), of convolutions whose kernels are not packed for vectors of a CPU."""

from collections.abc import Mapping
from typing import Any

from nnopt.backends.tvm.conv import MAIN, ConvWorkload, Tile
from nnopt.backends.tvm.schedule import Work
from nnopt.errors import BackendError


def whole(work: ConvWorkload) -> Tile:
    """The tile with which a kernel is not packed: all channels of a group stay side by side, and nothing is cropped."""
    across = work.groups if work.depthwise else 1
    return Tile(across * work.outputs // work.groups, 1, (1,) * len(work.output), across)


def scheduled_for_gpu(module: Any, works: Mapping[str, Work], target: Any) -> Any:
    """Every kernel by the first of dlight's rules that knows it, the last of which knows any.

    Args:
        module: fused.
        works: what would be scheduled as it says on a CPU.
        target: the GPU.

    Returns:
        The module; each of its kernels binds loops to threads.

    Raises:
        BackendError: part of the function is a program with a schedule of its own.
    """
    from tvm import tirx
    from tvm.s_tir import dlight

    if any(not isinstance(work, tuple) for work in works.values()):
        raise BackendError(
            "tvm: a program says how its loops run on a CPU; leave its order and marks out to compile it for a GPU"
        )
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            module.update_func(variable, plain(function)[0])
    gpu = dlight.gpu
    rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]
    with target:
        return dlight.ApplyDefaultSchedule(*rules)(module)


def plain(function: Any) -> tuple[Any, list[str]]:
    """A kernel without the names of what is scheduled in it, which are for our templates; and those names."""
    import tvm
    from tvm import s_tir

    sch = s_tir.Schedule(tvm.IRModule({"main": function}), debug_mask="none")
    names = []
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if (name := sch.get(block).annotations.get(MAIN)) is not None:
            names.append(str(name))
            sch.unannotate(block, MAIN)
    return (sch.mod["main"] if names else function), names
