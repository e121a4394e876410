"""Single kernels: convolutions compiled alone, for the search of tiles, and what a core can do at most."""

import dataclasses
from typing import Any

import numpy as np

from nnopt.backends.tvm.conv import ConvWorkload, Tile, convolve, pack
from nnopt.backends.tvm.load import tvm
from nnopt.backends.tvm.schedule import schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled kernel with arrays to run it on.

    Attributes:
        module: the executable.
        arrays: what it reads, and at last its result, as TVM tensors.
    """

    module: Any
    arrays: tuple[Any, ...]

    def milliseconds(self, samples: int = 3, sample_ms: float = 2.0) -> float:
        """Time of a call, without what calling it from Python takes: the least of a few samples."""
        timer = self.module.mod.time_evaluator(
            "main", tvm().cpu(), number=1, repeat=samples, min_repeat_ms=int(sample_ms)
        )
        return 1e3 * float(timer(*self.arrays).min)


def build_conv(work: ConvWorkload, tile: Tile, target: Any, threads: int, lanes: int) -> Kernel:
    """Compiles a convolution of random values.

    Args:
        work: what is convolved.
        tile: of it.
        target: of TVM.
        threads: to spread it over.
        lanes: elements in a vector register.
    """
    from tvm import te

    each = work.inputs // work.groups
    random = np.random.default_rng(0)
    image = random.standard_normal((work.batch, *work.size, work.inputs)).astype(work.dtype)
    kernel = random.standard_normal((*work.window, each, work.outputs)).astype(work.dtype)
    packed = pack(kernel, work, tile)
    x = te.placeholder(image.shape, work.dtype, name="x")
    k = te.placeholder(packed.shape, work.dtype, name="k")
    function = te.create_prim_func([x, k, convolve(x, k, work, tile, "conv")])
    made = schedule(function, {"conv": (work, tile)}, threads, lanes)
    module = tvm().compile(made.mod, target)
    result = np.empty((work.batch, *work.output, work.outputs), work.dtype)
    arrays = tuple(tvm().runtime.tensor(a) for a in (image, packed, result))
    return Kernel(module, arrays)


def multiply_adds(target: Any, lanes: int, registers: int) -> tuple[Kernel, int]:
    """Independent multiply-adds in registers, as many as a core can do: its peak.

    Returns:
        The kernel, and the floating-point operations of a call, two for a multiply-add.
    """
    from tvm import s_tir, te, tirx

    rows, rounds = 20 if registers >= 32 else 12, 200_000
    step = te.comm_reducer(
        lambda a, b: a * tirx.const(0.999, "float32") + b, lambda dtype: tirx.const(0, dtype)
    )
    x = te.placeholder((lanes,), "float32", name="x")
    r = te.reduce_axis((0, rounds), "r")
    y = te.compute((rows, lanes), lambda i, j: step(x[j], axis=r), name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, y]))
    block = sch.get_sblock("y")
    kept = sch.cache_write(block, 0, "local")
    i, j, k = sch.get_loops(block)
    sch.reorder(k, i, j)
    sch.unroll(i)
    sch.vectorize(j)
    init = sch.decompose_reduction(block, k)
    for part in (init, kept):
        rows_of, lane = sch.get_loops(part)
        sch.unroll(rows_of)
        sch.vectorize(lane)
    module = tvm().compile(sch.mod, target)
    arrays = np.ones(lanes, np.float32), np.empty((rows, lanes), np.float32)
    kernel = Kernel(module, tuple(tvm().runtime.tensor(a) for a in arrays))
    return kernel, 2 * rows * lanes * rounds
