"""Set-ups of measurements, and `nnopt measure`. Nothing here depends on how fast the machine is."""

import dataclasses
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_backends import Machine
from test_cli import printed, said

from nnopt.backends import (
    Compiled,
    Latency,
    Setup,
    backend,
    describe_device,
    measure,
    merged,
    pinned,
    speedup,
    stand_in_variables,
)
from nnopt.backends.cold import evictor, last_level_bytes
from nnopt.backends.setup import difference
from nnopt.core import Example
from nnopt.errors import BackendError, MeasurementError
from nnopt.networks import WideResNet
from nnopt.reports.latency import layer_table, network_table, setup_text
from nnopt.search.timing import Layer, TimedRun, layers

DEVICE = {"platform": "cpu", "device_kind": "Z80", "cores": 1, "pinned": True, "threads": 1, "jax": "1"}  # fmt: skip
SETUP = Setup(DEVICE, "as XLA chose")


def latency(ms, setup=SETUP):
    times = np.atleast_1d(ms).tolist()
    return Latency(times[0], times[0], times[0], tuple(times), 1, False, setup)


def changed(**device):
    return dataclasses.replace(SETUP, device=DEVICE | device)


# --- set-ups ---


def test_a_compiled_function_says_its_setup():
    x = jnp.ones(3)
    compiled = backend("xla").compile(lambda x: x + 1.0, (x,))
    machine = Machine()
    call = machine.taking("c", 3.0)
    compiled = dataclasses.replace(compiled, run=lambda x: call())
    times = machine.measure({"a": compiled, "b": call}, repeats=2)
    setup = times["a"].setup
    assert times["b"].setup is None
    assert not setup.cold
    assert setup.schedule == "as XLA chose"
    assert setup.device == {k: v for k, v in describe_device().items() if k != "load_average"}
    assert Setup.from_json(json.loads(json.dumps(setup.to_json()))) == setup
    assert len(setup.fingerprint) == 16
    for values in ({}, {"device": 1, "schedule": ""}, 3):
        with pytest.raises((ValueError, TypeError)):
            Setup.from_json(values)


def test_load_is_recorded_but_makes_no_difference():
    busy = dataclasses.replace(SETUP, load_average=7.0)
    assert busy == SETUP
    assert busy.fingerprint == SETUP.fingerprint
    assert speedup(latency(2.0), latency(1.0, busy)).median == 2.0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (changed(cores=2), "cores is 1 and 2"),
        (changed(threads=2), "threads is 1 and 2"),
        (changed(jax="2"), "jax is '1' and '2'"),
        (changed(device_kind="6502"), "device_kind is 'Z80' and '6502'"),
        (dataclasses.replace(SETUP, cold=True), "cold is False and True"),
    ],
)
def test_other_setups_do_not_compare(other, words):
    for mix in (speedup, lambda a, b: merged([a, b])):
        with pytest.raises(MeasurementError, match=words) as caught:
            mix(latency(1.0), latency(1.0, other))
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
    assert other.fingerprint != SETUP.fingerprint


def test_backends_compare_but_do_not_merge():
    tvm = dataclasses.replace(changed(tvm="0.27"), schedule="templates")
    assert speedup(latency(2.0), latency(1.0, tvm)).median == 2.0
    assert difference(SETUP, tvm, backends=True) is None
    with pytest.raises(MeasurementError, match=r"schedule is .* tvm is None and '0.27'.*merged"):
        merged([latency(1.0), latency(1.0, tvm)])


def test_merging():
    one = merged([latency([1.0, 2.0]), latency([3.0, 4.0, 5.0])])
    assert one.samples_ms == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert (one.low_ms, one.median_ms, one.high_ms) == (2.0, 3.0, 4.0)
    assert one.setup == SETUP
    with pytest.raises(MeasurementError, match="does not say its set-up"):
        merged([latency(1.0), latency(1.0, None)])
    with pytest.raises(MeasurementError, match="no latencies to merge"):
        merged([])


# --- cold caches and cores ---


def test_caches_are_emptied_outside_of_the_timed_region():
    machine = Machine()

    def evict():
        machine.log.append("e")
        machine.now += 99.0

    calls = {"a": machine.taking("a", 0.1), "b": machine.taking("b", 0.2)}
    times = machine.measure(calls, repeats=2, cold=True, evict=evict)
    assert "".join(machine.log).endswith("eaebeaeb")
    np.testing.assert_allclose([t.median_ms for t in times.values()], [0.1, 0.2])
    assert [t.inner_calls for t in times.values()] == [1, 1]


def test_a_cold_setup_says_so():
    compiled = Compiled(lambda x: x, (jnp.ones(3),), 0.0, describe_device())
    (time,) = measure({"a": compiled}, repeats=1, cold=True, evict=lambda: None).values()
    assert time.setup.cold
    assert "cold caches" in setup_text(time.setup)
    assert last_level_bytes() >= 0
    evictor(jax.devices("cpu")[0])()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot pin")
def test_pinning_is_for_a_while():
    before = os.sched_getaffinity(0)
    seen = []
    compiled = Compiled(lambda x: seen.append(os.sched_getaffinity(0)), (jnp.ones(3),), 0.0, describe_device())  # fmt: skip
    (time,) = measure({"a": compiled}, repeats=1, cores=1, overhead_ms=0.0).values()
    assert set(map(len, seen)) == {1}
    assert os.sched_getaffinity(0) == before
    assert time.setup.device["cores"] == 1
    assert time.setup.device["pinned"] == (os.cpu_count() > 1)
    with pytest.raises(RuntimeError), pinned(1):
        raise RuntimeError
    assert os.sched_getaffinity(0) == before
    for cores in (0, 10**6):
        with pytest.raises(MeasurementError, match=f"cannot pin to {cores} cores"), pinned(cores):
            pass


def test_systems_that_cannot_pin(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(MeasurementError, match="this system cannot pin"), pinned(1):
        pass
    with pinned(None):
        pass


# --- weights and layers ---


def test_stand_in_variables_cannot_be_simplified_away():
    net, example = WideResNet(10, 0.25), Example(jnp.zeros((1, 8, 8, 3)))
    made = stand_in_variables(net, example)
    shapes = jax.eval_shape(lambda: example.init(net, jax.random.key(0)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    assert all(float(a.std()) > 0 for a in jax.tree.leaves(made) if a.size > 1)
    assert all(
        float(a.min()) > 0
        for path, a in jax.tree_util.tree_leaves_with_path(made)
        if path[-1].key == "var"
    )
    again = stand_in_variables(net, example)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), made, again))
    assert bool(jnp.isfinite(jax.jit(net.apply)(made, jnp.ones((1, 8, 8, 3)))).all())


def test_layers_are_counted_once_for_each_shape():
    found = layers(WideResNet(16, 0.25), Example(jnp.zeros((2, 8, 8, 3))))
    by_name = {f"{layer.name}: {layer.shapes}": layer for layer in found}
    row = by_name["conv 3x3: 2x8x8x4 -> 2x8x8x4"]
    assert row.count == len(row.paths) == 3
    assert row.macs == 2 * 64 * 9 * 4 * 4
    assert by_name["conv 3x3 /2: 2x8x8x4 -> 2x4x4x8"].count == 1
    assert by_name["dense: 2x16 -> 2x10"].macs == 320


def test_layers_of_shared_modules():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            return dense(dense(x)) + dense(x[:1])

    found = layers(Net(), Example(jnp.zeros((2, 4))))
    assert [(layer.count, layer.macs) for layer in found] == [(2, 32), (1, 16)]


# --- tables ---


def run(name, backend_name, ms, setup=SETUP, **kwargs):
    time = dataclasses.replace(latency([ms] * 3, setup), **kwargs)
    return TimedRun(name, backend_name, time, 1.5, "templates, tiles by a model", DEVICE)


def text_of(table, capsys):
    from rich.console import Console

    Console(width=100).print(table)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    return out


def test_the_table_of_networks(capsys):
    rows = [
        run("wrn-40-2", "xla", 2.0),
        run("wrn-40-2", "tvm", 1.0, below_overhead=True),
        run("a/long/path/of/some/network.json", "xla", 0.5, changed(cores=2)),
    ]
    out = text_of(network_table("Networks", rows, batch=4), capsys)
    assert "2,000.0" in out
    assert "2.00x" in out
    assert "~1" in out
    assert "cores is 1 and 2" in " ".join(out.split())


def test_the_table_of_layers(capsys):
    layer = Layer("conv 3x3", "1x32x32x64 -> 1x32x32x64", ("a", "b"), 2, 1_000_000, None, None)
    rows = [run("1", "xla", 2.0), run("1", "tvm", 1.0)]
    out = text_of(layer_table("Layers", {"1": layer}, rows, {"xla": 8.0, "tvm": 1.0}), capsys)
    assert "200%" in out  # the network takes twice the sum of its layers on one backend
    assert " 50%" in out
    assert "sum is not the network's latency" in " ".join(out.split())


# --- the command ---


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return tmp_path_factory.mktemp("measure") / "times.json"


def test_measure(capsys, result):
    args = ["wrn-10-0.25", "--size", 8, "--repeats", 2, "--layers", "--threads", 1, "--backends", "xla"]  # fmt: skip
    out = printed(capsys, "measure", *args, "--out", result)
    assert "Networks, 1 image of 8 x 8 a call" in out
    assert "Layers of wrn-10-0.25" in out
    assert "1 core" in out
    assert str(result) in out
    written = json.loads(result.read_text())
    assert written["format"] == "nnopt measurement"
    (row,) = written["networks"]
    assert row["speedup"]["median"] == 1.0
    assert row["setup"]["device"]["cores"] == 1
    assert len(row["samples_ms"]) == 2
    assert {layer["network"] for layer in written["layers"]} == {"wrn-10-0.25"}
    assert sum(layer["count"] for layer in written["layers"]) == 11


def test_two_backends(capsys):
    args = ["wrn-10-0.25", "--size", 8, "--repeats", 1, "--batch", 2, "--cold"]
    out = printed(capsys, "measure", *args)
    assert {"xla", "tvm"} <= set(out.split())
    assert "cold caches" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["wrn-10-1", "--batch", "0"], "--batch is 0; give 1 or more"),
        (["wrn-10-1", "--repeats", "0"], "--repeats is 0"),
        (["wrn-10-1", "--size", "0"], "there are no images of 0 pixels"),
        (["wrn-10-1", "--backends", "cuda"], "no backend is called 'cuda'; there are xla, tvm"),
        (["wrn-10-1", "--batch", "9" * 20], "numbers; give a smaller --batch"),
        (
            ["wrn-10-1", "--size", "1000000"],
            "1 images of 1000000 x 1000000 pixels are more than 268,435,456",
        ),
        (["wrn"], "no network is named 'wrn'"),
        (["wrn-10-1", "--out", "/nowhere/a.json"], "/nowhere is no folder; give another --out"),
    ],
)
def test_measure_refuses(args, words, capsys):
    assert words in said(capsys, "measure", *args)


def test_a_number_of_threads_that_is_none(capsys, monkeypatch):
    pytest.importorskip("tvm_ffi")
    monkeypatch.setenv("TVM_NUM_THREADS", "abc")
    refused = said(capsys, "measure", "wrn-10-1", "--backends", "tvm")
    assert "TVM_NUM_THREADS is 'abc' in the environment" in refused


def test_tvm_that_is_not_installed(capsys, monkeypatch):
    from nnopt.backends.tvm import TvmBackend

    def describe(self):
        raise BackendError("the backend tvm needs TVM, which is not installed; install it")

    monkeypatch.setattr(TvmBackend, "describe", describe)
    assert "not installed" in said(capsys, "measure", "wrn-10-1", "--backends", "tvm")
    out = printed(capsys, "measure", "wrn-10-0.25", "--size", 8, "--repeats", 1)
    assert "tvm" not in out
