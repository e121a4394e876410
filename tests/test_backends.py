import dataclasses
import itertools
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.backends import (
    Latency,
    Speedup,
    XlaBackend,
    compile_network,
    describe_device,
    dispatch_ms,
    measure,
    speedup,
)
from nnopt.core import Example, Patched, rewrite
from nnopt.networks import WideResNet
from nnopt.rewrites import Configure, ReplaceBlock, choice

WRN = WideResNet(depth=10, width=0.25)
EXAMPLE = Example(jnp.zeros((2, 8, 8, 3)))


def init(net):
    """Variables with positive values: JAX's own initialisation compiles for seconds."""
    specs = jax.eval_shape(lambda: EXAMPLE.init(net, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 0.2, s.shape), s.dtype), specs)


@pytest.fixture(scope="module")
def variables():
    return init(WRN)


@pytest.fixture(scope="module")
def rewritten():
    rules = (
        ReplaceBlock("stage2_block0", choice("G(4)")),
        Configure.of("stage3_block0/norm1", epsilon=1e-3),
    )
    net = rewrite(WRN, *rules, example=EXAMPLE)
    assert isinstance(net, Patched)
    return net, init(net)


class Machine:
    """Things to call that take a known time on a clock of their own, and a log of their calls."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def clock(self):
        return self.now

    def taking(self, name, milliseconds):
        durations = itertools.cycle(np.atleast_1d(milliseconds))

        def call():
            self.log.append(name)
            self.now += next(durations) / 1e3

        return call

    def measure(self, candidates, **settings):
        return measure(candidates, clock=self.clock, **{"overhead_ms": 0.01, **settings})


# --- compiling ---


def test_a_compiled_network_is_the_network(variables):
    compiled = compile_network(WRN, variables, EXAMPLE)
    (x,) = compiled.inputs
    assert (x.shape, x.dtype) == ((2, 8, 8, 3), jnp.float32)
    assert float(x.std()) > 0.5
    chex.assert_trees_all_close(compiled(), WRN.apply(variables, x), rtol=1e-4)
    other = jax.random.normal(jax.random.key(1), x.shape)
    chex.assert_trees_all_close(compiled(other), WRN.apply(variables, other), rtol=1e-4)
    assert compiled.compile_seconds > 0
    (again,) = compile_network(WRN, variables, EXAMPLE).inputs
    chex.assert_trees_all_equal(x, again)


def test_weights_are_constants(variables):
    compiled = compile_network(WRN, variables, EXAMPLE)
    assert jax.tree.leaves(compiled.run.in_avals) == [jax.core.ShapedArray((2, 8, 8, 3), "float32")]
    assert compiled.run.memory_analysis().argument_size_in_bytes == 2 * 8 * 8 * 3 * 4


def test_rewritten_networks_compile(rewritten):
    net, fresh = rewritten
    compiled = compile_network(net, fresh, EXAMPLE)
    chex.assert_trees_all_close(compiled(), net.apply(fresh, *compiled.inputs), rtol=1e-4)


def test_several_inputs_and_static_ones():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, inputs, *, train):
            assert train is False
            y = nn.Embed(5, 3)(inputs["ids"]) + nn.Dense(3)(x.astype(jnp.float32))
            return {"y": jnp.where(inputs["mask"][:, None], y, 0.0)}

    example = Example(
        jnp.zeros((4, 2), jnp.float16),
        {"ids": jnp.zeros(4, jnp.int32), "mask": jnp.zeros(4, bool)},
        train=False,
    )
    net = Net()
    variables = example.init(net, jax.random.key(0))
    compiled = compile_network(net, variables, example, backend=XlaBackend(jax.devices()[0]))
    ids = jnp.asarray([0, 1, 2, 3])
    x, mask = compiled.inputs[0], jnp.asarray([True, False, True, True])
    assert [a.dtype for a in compiled.inputs] == [jnp.float16, jnp.int32, jnp.bool_]
    expected = net.apply(variables, x, {"ids": ids, "mask": mask}, train=False)
    chex.assert_trees_all_close(compiled(x, ids, mask), expected, rtol=1e-4)


def test_the_device_is_described(variables):
    device = compile_network(WRN, variables, EXAMPLE).device
    assert json.loads(json.dumps(device)) == device
    assert set(device) == set(describe_device())
    assert device["platform"] == jax.devices()[0].platform
    assert device["jax"] == jax.__version__
    assert device["device_kind"]
    assert device["cores"] >= 1


# --- measuring ---


def test_candidates_take_turns():
    machine = Machine()
    seen = []
    machine.measure(
        {"base": machine.taking("b", 3.0), "winner": machine.taking("w", 0.9)},
        repeats=4,
        on_progress=lambda done, rounds: seen.append((done, rounds)),
    )
    # A sample of the first is one call of 3 ms, one of the second three calls of 0.9 ms.
    assert "".join(machine.log).endswith("w" + 4 * "bwww")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_warm_up_comes_first():
    machine = Machine()
    slow, fast = machine.taking("s", 50.0), machine.taking("f", 5.0)
    machine.measure({"slow": slow, "fast": fast}, repeats=1)
    # Three calls or 20 ms of warm-up, whichever is more, three to see how long one takes, one to measure.
    assert "".join(machine.log) == "sss" + "sss" + "ffff" + "fff" + "sf"


def test_medians_and_quartiles():
    machine = Machine()
    durations = [10.0] * 6 + [10.0, 30.0, 20.0, 50.0, 40.0]
    latency = machine.measure({"net": machine.taking("n", durations)}, repeats=5)["net"]
    np.testing.assert_allclose(latency.samples_ms, [10, 30, 20, 50, 40])
    np.testing.assert_allclose((latency.low_ms, latency.median_ms, latency.high_ms), (20, 30, 40))
    assert latency.inner_calls == 1
    assert not latency.below_overhead
    assert Latency(**json.loads(json.dumps(dataclasses.asdict(latency)))) == dataclasses.replace(
        latency, samples_ms=list(latency.samples_ms)
    )


def test_short_calls_share_a_sample_and_are_flagged():
    machine = Machine()
    latencies = machine.measure(
        {"short": machine.taking("s", 0.125), "long": machine.taking("l", 0.25)}, repeats=2
    )
    assert [x.inner_calls for x in latencies.values()] == [16, 8]
    np.testing.assert_allclose([x.median_ms for x in latencies.values()], [0.125, 0.25])
    assert [x.below_overhead for x in latencies.values()] == [True, False]


def test_more_rounds_for_a_minimum_time():
    machine = Machine()
    calls = {"a": machine.taking("a", 4.0), "b": machine.taking("b", 6.0)}
    latencies = machine.measure(calls, repeats=3, min_seconds=0.095)
    assert [len(x.samples_ms) for x in latencies.values()] == [10, 10]


def test_a_clock_that_stands_still():
    calls = []
    latencies = measure(
        {"a": lambda: calls.append(1)}, repeats=1, overhead_ms=0.0, clock=lambda: 0.0
    )
    assert latencies["a"].median_ms == 0.0


def test_speedups_are_paired():
    def latency(samples):
        return Latency(0.0, 0.0, 0.0, tuple(samples), 1, False)

    # The machine is twice as slow in the second half, which the ratios do not see.
    base, other = latency([2.0, 2.0, 4.0, 4.0]), latency([1.0, 1.0, 2.0, 2.0])
    assert speedup(base, other) == Speedup(2.0, 2.0, 2.0)
    result = speedup(latency([1.0, 2.0, 3.0, 4.0, 5.0]), latency([1.0] * 5))
    assert dataclasses.astuple(result) == (3.0, 2.0, 4.0)
    assert dataclasses.asdict(result) == {"median": 3.0, "low": 2.0, "high": 4.0}
    with pytest.raises(ValueError, match="measure both in one call"):
        speedup(base, latency([1.0]))


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="0 candidates"):
        measure({})
    with pytest.raises(ValueError, match="0 repeats"):
        measure({"a": lambda: None}, repeats=0)


def test_real_networks_can_be_measured(variables, rewritten):
    compiled = {
        "base": compile_network(WRN, variables, EXAMPLE),
        "winner": compile_network(*rewritten, EXAMPLE),
    }
    latencies = measure(compiled, repeats=3)
    assert all(len(x.samples_ms) == 3 and x.median_ms > 0 for x in latencies.values())
    assert speedup(latencies["base"], latencies["winner"]).median > 0
    assert dispatch_ms() > 0
