"""Code for what this machine is not: GPUs, which need not be there to compile for, and other CPUs."""

import shutil
import subprocess
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip("tvm_ffi")

from nnopt.backends import XlaBackend
from nnopt.backends.compiled import compile_network
from nnopt.backends.tvm import TvmBackend
from nnopt.backends.tvm.load import tvm
from nnopt.backends.tvm.targets import hindrance, target_of, target_text, vectors
from nnopt.errors import BackendError

CUDA = {"kind": "cuda", "arch": "sm_90"}
ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}
X = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 6)), jnp.float32)


class Net(nn.Module):
    """Convolutions of all kinds, a normalisation, a pool, attention, a dense layer, two outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3), strides=2)(x))
        x = x + nn.Conv(12, (3, 3), feature_group_count=4)(x)
        x = nn.Conv(12, (3, 3), feature_group_count=12)(x)
        x = nn.LayerNorm()(nn.max_pool(x, (2, 2)))
        a = x.reshape(1, -1, 12)
        a = nn.softmax(a @ a.swapaxes(1, 2)) @ a
        y = nn.Dense(10)(a.mean(1))
        return nn.log_softmax(y), jnp.argmax(y, -1)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(jax.random.key(0), X)


@pytest.fixture(scope="module")
def on_gpu(variables):
    return compile_network(Net(), variables, X, backend=TvmBackend(target=CUDA))


def no_gpu():
    return not tvm().cuda(0).exist


def test_network_compiles_for_a_gpu(on_gpu, tmp_path):
    assert on_gpu.schedule == "dlight's schedules for a GPU"
    assert on_gpu.device["platform"] == "cuda"
    assert on_gpu.device["device_kind"] == "cuda sm_90"
    on_gpu.export(tmp_path / "net.so")
    assert (tmp_path / "net.so").read_bytes()[:4] == b"\x7fELF"
    on_gpu.export(tmp_path / "net.tar")
    with tarfile.open(tmp_path / "net.tar") as objects:
        assert [name for name in objects.getnames() if name.endswith(".o")]
    on_gpu.export(tmp_path / "net.cu")
    assert "__global__" in (tmp_path / "net.cu").read_text()


def test_running_it_without_a_gpu_is_one_line(on_gpu):
    if not no_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="compiled for cuda sm_90, and this machine has no cuda device; export it"):  # fmt: skip
        on_gpu.outputs()


def test_on_a_gpu_it_agrees(on_gpu, variables):
    if no_gpu():
        pytest.skip("needs an NVIDIA GPU")
    want = compile_network(Net(), variables, X, backend=XlaBackend()).outputs()
    for a, b in zip(on_gpu.outputs(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nvcc_takes_the_source(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc: it is not on the path")
    kernel = jnp.ones((3, 3, 6, 12))
    made = TvmBackend(target=CUDA).compile(
        lambda x: jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        ),
        (X,),
    )
    made.export(tmp_path / "net.cu")
    command = [nvcc, "-arch=sm_90", "-cubin", "-o", tmp_path / "net.cubin", tmp_path / "net.cu"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "net.cubin").stat().st_size > 0


@pytest.mark.parametrize("mcpu", ["x86-64", "x86-64-v3"])
def test_other_cpus(mcpu, variables):
    target = {"kind": "llvm", "mcpu": mcpu}
    if why := hindrance(target_of(target_text(target), 1)):
        pytest.skip(why)
    made = compile_network(Net(), variables, X, backend=TvmBackend(threads=1, target=target))
    assert made.device["target"] == target_text(target)
    want = compile_network(Net(), variables, X, backend=XlaBackend()).outputs()
    for a, b in zip(made.outputs(), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_lanes_and_registers_are_the_targets():
    def of(**values):
        return vectors(target_of(target_text({"kind": "llvm"} | values), 1))

    triple = {"mtriple": "x86_64-linux-gnu"}
    assert of(mcpu="x86-64", **triple) == (4, 16)
    assert of(mcpu="x86-64-v3", **triple) == (8, 16)
    assert of(mcpu="x86-64-v4", **triple) == (16, 32)
    assert of(mtriple=ARM["mtriple"], mcpu=ARM["mcpu"]) == (4, 32)


def test_another_architecture_compiles_but_does_not_run(variables, tmp_path):
    if hindrance(target_of(target_text(ARM), 1)) is None:
        pytest.skip("this machine is of aarch64")
    made = compile_network(Net(), variables, X, backend=TvmBackend(threads=1, target=ARM))
    with pytest.raises(BackendError, match="compiled for cortex-a76, and this machine is of x86_64; export it"):  # fmt: skip
        made.outputs()
    made.export(tmp_path / "net.tar")
    with tarfile.open(tmp_path / "net.tar") as objects:
        name = next(name for name in objects.getnames() if name.startswith("lib0"))
        header = objects.extractfile(name).read(20)
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183
    with pytest.raises(
        BackendError, match=r"linker of this machine cannot make .*; export a \.tar"
    ):
        made.export(tmp_path / "net.so")
    assert not (tmp_path / "net.so").exists()


def test_backends_with_equal_targets_are_equal():
    one = TvmBackend(target={"kind": "cuda", "arch": "sm_90"})
    assert one == TvmBackend(target='{"arch": "sm_90", "kind": "cuda"}')
    assert hash(one) == hash(TvmBackend(target=CUDA))
    assert one != TvmBackend()


def test_files_that_cannot_be_written(on_gpu, tmp_path):
    with pytest.raises(BackendError, match="give a file that ends in"):
        on_gpu.export(tmp_path / "net.onnx")
    with pytest.raises(BackendError, match=r"cannot write .*No such file or directory"):
        on_gpu.export(tmp_path / "nowhere" / "net.so")
    made = TvmBackend(threads=1).compile(lambda x: x + 1, (X,))
    with pytest.raises(BackendError, match="no CUDA source in code for a CPU"):
        made.export(tmp_path / "net.cu")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ({"kind": "lvm"}, "no target is of kind 'lvm'; there are llvm, cuda"),
        ({}, "no target is of kind None"),
        ({"kind": "cuda"}, 'give "arch", such as "sm_90"'),
        ({"kind": "llvm", "mcpu": "nonsense"}, "LLVM knows no CPU 'nonsense'"),
        ({"kind": "llvm", "mtriple": "abacus-linux-gnu"}, "no architecture 'abacus-linux-gnu'"),
        ({"kind": "llvm", "mcu": "z80"}, "is no target: .*Unknown config option 'mcu'"),
    ],
)
def test_wrong_targets(target, message, capfd):
    with pytest.raises(BackendError, match=message) as raised:
        TvmBackend(target=target).describe()
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("scheduled", ["none", "search", "metaschedule"])
def test_a_gpu_has_one_way_to_schedule(scheduled):
    with pytest.raises(BackendError, match=f"{scheduled} is for a CPU"):
        TvmBackend(target=CUDA, scheduled=scheduled).compile(lambda x: x + 1, (X,))


def test_nothing_is_measured_for_a_cpu_that_is_not_here():
    if hindrance(target_of(target_text(ARM), 1)) is None:
        pytest.skip("this machine is of aarch64")
    with pytest.raises(BackendError, match="search runs code for cortex-a76, and this machine"):
        TvmBackend(target=ARM, scheduled="search").compile(lambda x: x + 1, (X,))
