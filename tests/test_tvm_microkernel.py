"""Convolutions whose groups share vectors on TVM: their inner kernel against JAX, and its schedule replayed from JSON."""

import dataclasses
import math

import jax
import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'nnopt[tvm]'")

from tvm import s_tir, te  # noqa: E402
from tvm_ffi import structural_equal  # noqa: E402

from nnopt.backends.tvm import microkernel  # noqa: E402
from nnopt.backends.tvm.conv import ConvWorkload, convolve, pack  # noqa: E402
from nnopt.backends.tvm.kernels import build_conv  # noqa: E402
from nnopt.backends.tvm.schedule import replay, schedule, trace_json  # noqa: E402
from nnopt.backends.tvm.targets import target_of, vectors  # noqa: E402
from nnopt.backends.tvm.tiles import tiles  # noqa: E402

ONE = (1, 1)
CONV = ConvWorkload(1, (8, 8), 16, 16, (3, 3), ONE, ONE, ONE, ONE, ONE)

SMALL_GROUPS = {
    "two inputs": {"groups": 8},
    "strided": {"groups": 8, "strides": (2, 2)},
    "more inputs": {"groups": 8, "inputs": 32},
    "fewer inputs than lanes": {"groups": 4, "inputs": 4, "outputs": 8},
    "window of one": {"groups": 8, "window": ONE, "low": (0, 0), "high": (0, 0)},
    "dilated, uneven": {"groups": 8, "dilation": (2, 1), "low": (2, 0), "high": (1, 3), "size": (7, 9)},
    "zeros between": {"groups": 8, "input_dilation": (2, 2)},
    "channels left over": {"groups": 6, "inputs": 12, "outputs": 12},
    "depthwise": {"groups": 16},
    "two for each": {"groups": 16, "outputs": 32},
    "a row": dict(size=(9,), window=(3,), groups=8, batch=2, **dict.fromkeys(
        ("strides", "low", "high", "dilation", "input_dilation"), (1,))),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_GROUPS)
def test_groups_that_share_vectors_are_convolved(name):
    """Against JAX; the tile is the first whose reduction is unrolled, and one of few pixels."""
    target = target_of(None, 1)
    lanes, registers = vectors(target)
    work = dataclasses.replace(CONV, **SMALL_GROUPS[name])
    unrolled = [tile for tile in tiles(work, lanes, registers) if tile.unrolled]
    assert all(tile.across * work.outputs // work.groups == lanes for tile in unrolled)
    few = min(unrolled, key=lambda tile: tile.accumulators)
    places = "HW"[: len(work.size)]
    numbers = f"N{places}C", f"{places}IO", f"N{places}C"
    for tile in (unrolled[0], few):
        kernel = build_conv(work, tile, target, 1, lanes)
        kernel.module.mod["main"](*kernel.arrays)
        image, packed, result = (array.numpy() for array in kernel.arrays)
        # Packing is a permutation with zeros: undone by what `pack` does to numbers of the weights.
        shape = (*work.window, work.inputs // work.groups, work.outputs)
        order = pack(1.0 + np.arange(math.prod(shape)).reshape(shape), work, tile)
        weights = np.zeros(math.prod(shape), np.float32)
        weights[order[order > 0].astype(int) - 1] = packed[order > 0]
        wanted = jax.lax.conv_general_dilated(
            image, weights.reshape(shape), work.strides, list(zip(work.low, work.high, strict=True)), work.input_dilation,
            work.dilation, jax.lax.conv_dimension_numbers(image.shape, shape, numbers), work.groups,
        )  # fmt: skip
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)


def test_schedules_of_shared_vectors_replay():
    """The trace names the inner kernel, which is made anew where it is not known."""
    work = dataclasses.replace(CONV, groups=8)
    tile = next(tile for tile in tiles(work, 16, 32) if tile.unrolled)
    x = te.placeholder((1, 8, 8, 16), "float32", name="x")
    k = te.placeholder(pack(np.zeros((3, 3, 2, 16)), work, tile).shape, "float32", name="k")
    function = te.create_prim_func([x, k, convolve(x, k, work, tile, "conv")])
    made = schedule(function, {"conv": (work, tile)}, 1, 16)
    named = microkernel.Microkernel.of(work, tile).name
    trace = trace_json(made)
    assert named in trace
    microkernel._registered.cache_clear()
    s_tir.TensorIntrin.register(named, *(te.create_prim_func([x]) for _ in range(2)), override=True)
    again = replay(function, trace)
    assert structural_equal(again.mod, made.mod)
