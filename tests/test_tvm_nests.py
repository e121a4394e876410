"""Operators on TVM with the loops and the schedule that a program gave them, and schedules replayed from JSON."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnopt.backends import compile_network
from nnopt.errors import BackendError
from nnopt.nests import (
    Bind,
    Bottleneck,
    Fuse,
    Group,
    Interchange,
    Parallel,
    Prefetch,
    Program,
    Split,
    StripMine,
    Tile,
    Unroll,
    Vectorize,
    convolution,
)
from nnopt.nests.interpret import interpret, kernel_box
from nnopt.nests.module import ProgramConv
from nnopt.nests.named import sequence1, sequence3
from nnopt.nests.sample import draw

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'nnopt[tvm]'")

from tvm import te, tirx  # noqa: E402
from tvm_ffi import structural_equal  # noqa: E402

from nnopt.backends.tvm import TvmBackend  # noqa: E402
from nnopt.backends.tvm.backend import emitted, fused  # noqa: E402
from nnopt.backends.tvm.nest import expression  # noqa: E402
from nnopt.backends.tvm.schedule import replay, schedule, trace_json  # noqa: E402
from nnopt.backends.tvm.tiles import tiles  # noqa: E402

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)


class Net(nn.Module):
    program: Program

    @nn.compact
    def __call__(self, x):
        return nn.relu(ProgramConv(16, (3, 3), program=self.program)(x)) + x


def kernels(module, works):
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            yield str(variable.name_hint), function


TABLE = {
    "tiles": (
        StripMine("co", 8), Interchange("co_i", "kw"), Vectorize("co_i"), Unroll("kh"), Parallel("co_o"),
    ),
    "groups": (Group("co", "ci", 2), Parallel("g")),
    "groups by hand": (Tile("co", "ci", 4, 4), Unroll("kw"), Parallel("oh")),
    "fused": (Fuse("oh", "ow"), Parallel("oh.ow")),
    "copies": (Bottleneck("oh", 2), Parallel("co")),
    "parts": (*sequence1(16, (1, 2)).steps, Parallel("co", part=0)),
    "unequal parts of groups": (Group("co", "ci", 2), Split("co", (3,)), Parallel("g", part=0)),
    "slabs": (*sequence3(2).steps, Parallel("co")),
    "prefetch of one part": (Split("co", (4,)), Prefetch("k", "kh", part=1), Parallel("oh", part=0)),
    "prefetch": (Split("co", (4,)), Bottleneck("ci", 2, part=1), Prefetch("x", "oh"), Unroll("kw")),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_program_with_a_schedule_runs_as_it_says(name):
    net = Net(Program(TABLE[name]))
    variables = net.lazy_init(jax.random.key(0), IMAGE)
    expected = compile_network(net, variables, IMAGE).outputs()
    compiled = compile_network(net, variables, IMAGE, backend=TvmBackend())
    np.testing.assert_allclose(compiled.outputs(), expected, rtol=1e-5, atol=1e-5)
    texts = " ".join(compiled.traces.values())
    for step in TABLE[name]:
        if isinstance(step, Unroll | Vectorize | Parallel):
            assert f'"{type(step).__name__}"' in texts
    assert '"Reorder"' in texts


class Lifted(nn.Module):
    """A schedule in what linen has around modules."""

    @nn.compact
    def __call__(self, x):
        arguments = {"features": 4, "kernel_size": (3, 3), "program": Program((Parallel("oh"),))}
        x = nn.remat(nn.jit(ProgramConv))(**arguments)(x)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.vmap(ProgramConv, **axes)(**arguments)(x)


def test_schedules_within_lifted_modules_and_of_weights_that_are_arguments():
    net, x = Lifted(), jax.random.normal(jax.random.key(1), (2, 1, 3, 3, 4))
    weights, tree = jax.tree.flatten(net.init(jax.random.key(0), x))
    plain = ProgramConv(4, (3, 3), program=Program((Parallel("co"),)))
    variables = plain.init(jax.random.key(0), x)

    def function(x, *weights):
        of_each = jax.vmap(lambda y: plain.apply(variables, y), in_axes=1)(x)
        return net.apply(jax.tree.unflatten(tree, weights), x), of_each

    compiled = TvmBackend(threads=1).compile(function, (x, *weights))
    assert '"Parallel"' in " ".join(compiled.traces.values())
    for got, want in zip(compiled.outputs(), function(x, *weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@jax.numpy_dtype_promotion("standard")
def test_numbers_are_of_the_type_that_the_module_says():
    x = jnp.arange(2 * 3 * 3 * 4).reshape(2, 3, 3, 4) % 7 - 3
    for dtype in (None, jnp.float32):
        conv = ProgramConv(4, (3, 3), program=Program((Parallel("co"),)), dtype=dtype)
        variables = conv.init(jax.random.key(0), x)

        def function(x, conv=conv, variables=variables):
            return conv.apply(variables, x), conv.apply(variables, jnp.ones((1, 3, 3, 4)))

        for got, want in zip(
            TvmBackend(threads=1).compile(function, (x,)).outputs(), function(x), strict=True
        ):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_elementwise_work_is_fused_into_a_nest():
    net = Net(Program(TABLE["tiles"]))
    variables = net.lazy_init(jax.random.key(0), IMAGE)
    module, works, _ = emitted(
        lambda x: net.apply(variables, x), (jnp.zeros(IMAGE.shape),), lambda work: tiles(work, 16, 32)[0]
    )  # fmt: skip
    assert len(list(kernels(fused(module), works))) == 1


def test_schedules_are_replayed():
    net = Net(Program(TABLE["parts"]))
    variables = net.lazy_init(jax.random.key(0), IMAGE)

    def function(x):
        x = net.apply(variables, x)
        return jax.lax.reduce_window(
            nn.Conv(8, (3, 3)).apply({"params": {"kernel": jnp.ones((3, 3, 16, 8)), "bias": jnp.ones(8)}}, x),
            -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID",
        )  # fmt: skip

    module, works, _ = emitted(
        function, (jnp.zeros(IMAGE.shape),), lambda work: tiles(work, 16, 32)[0]
    )
    found = dict(kernels(fused(module), works))
    assert len(found) == 3
    for kernel in found.values():
        made = schedule(kernel, works, 2, 16)
        assert structural_equal(replay(kernel, trace_json(made)).mod, made.mod)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_program_is_its_interpretation(seed, data):
    size = data.draw(st.sampled_from([(6, 6), (4, 8)]))
    conv = convolution(
        size,
        8,
        6,
        (3, 3),
        strides=data.draw(st.sampled_from([(1, 1), (2, 2)])),
        groups=data.draw(st.sampled_from([1, 2])),
    )
    if data.draw(st.booleans()):  # what is drawn divides: here are parts that do not
        loop = data.draw(st.sampled_from(["co", "oh", "ow"]))
        at = data.draw(st.integers(1, conv.nests[0].extents[loop] - 1))
        conv = Split(loop, (at,))(conv)
    rng = np.random.default_rng(seed)
    operator = draw(conv, rng, 3).operator
    x = rng.normal(size=(1, *operator.input)).astype(np.float32)
    weights = rng.normal(size=kernel_box(operator)[1]).astype(np.float32)
    places = [te.placeholder(a.shape, "float32") for a in (x, weights)]
    names = [str(i) for i in range(len(operator.nests))]
    function = te.create_prim_func([*places, expression(operator, *places, names)])
    works = dict(zip(names, operator.nests, strict=True))
    compiled = tvm.compile(
        schedule(function, works, 1, 16).mod, tvm.target.Target({"kind": "llvm"})
    )
    y = tvm.runtime.tensor(np.empty((1, *operator.output), np.float32))
    compiled["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(weights), y)
    expected = interpret(operator, x.astype(np.float64), weights.astype(np.float64))
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Bind("co", "threadIdx.x"),), "co is bound to threadIdx.x, which a CPU does not have"),
        (
            (Parallel("oh"), Parallel("co")),
            "co and oh are both parallel, .* fuse the two and mark the one loop",
        ),
        (
            (Interchange("co", "kw"), Prefetch("k", "co"), Vectorize("co")),
            "co is vectorized, .* prefetch at a loop around it",
        ),
        ((Fuse("co", "ci"), Parallel("oh")), "co.ci was fused from loops of the output and of a"),
    ],
)
def test_what_tvm_cannot_run(steps, message):
    net = Net(Program(steps))
    variables = net.lazy_init(jax.random.key(0), IMAGE)
    with pytest.raises(BackendError, match=message):
        compile_network(net, variables, IMAGE, backend=TvmBackend())
