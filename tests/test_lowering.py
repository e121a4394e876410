"""Lowerings of convolutions against literal loops, the primitives against JAX's own convolution, and the rule that chooses."""

import functools
import itertools
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnopt.layers import (
    Conv,
    ConvShape,
    Direction,
    Fenced,
    LoweredConvolution,
    Native,
    Patches,
    Pointwise,
    ShiftedPlanes,
    ShiftedSum,
    SplitGroups,
    block_diagonal,
    choose,
    convolve,
    diagonal_blocks,
    explain,
)
from nnopt.layers.lowering import Lowering

FAST_COMPILE = {"xla_backend_optimization_level": 0}


def loops(shape, x=None, k=None, y=None):
    """The product of which the two operands are given, in plain loops over the definition, in `float64`."""
    arrays = {"x": (x, shape.input), "k": (k, shape.kernel), "y": (y, shape.output)}
    (missing,) = (name for name, (array, _) in arrays.items() if array is None)
    full = {n: np.zeros(s) if a is None else np.array(a, float) for n, (a, s) in arrays.items()}
    (_, height, width, _), (high, wide, inner, out) = shape.input, shape.kernel
    outer = out // shape.groups
    for i, j, a, b in np.ndindex(*shape.output[1:3], high, wide):
        row = i * shape.strides[0] + a * shape.dilation[0] - shape.padding[0][0]
        column = j * shape.strides[1] + b * shape.dilation[1] - shape.padding[1][0]
        if not (0 <= row < height and 0 <= column < width):
            continue
        for g in range(shape.groups):
            ins, outs = (slice(g * n, (g + 1) * n) for n in (inner, outer))
            seen, kernel = full["x"][:, row, column, ins], full["k"][a, b, :, outs]
            made = full["y"][:, i, j, outs]
            if missing == "x":
                full["x"][:, row, column, ins] += made @ kernel.T
            elif missing == "k":
                full["k"][a, b, :, outs] += seen.T @ made
            else:
                full["y"][:, i, j, outs] += seen @ kernel
    return full[missing]


def expected(shape, direction, first, second):
    names = {
        Direction.FORWARD: ("x", "k"),
        Direction.INPUT_GRADIENT: ("y", "k"),
        Direction.WEIGHT_GRADIENT: ("x", "y"),
    }[direction]
    return loops(shape, **dict(zip(names, (first, second), strict=True)))


def operands(shape, direction, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), shape.dtype) for s in shape.operands(direction)]


@st.composite
def shapes(draw):
    groups = draw(st.integers(1, 4))
    inner, outer = draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 4)]))
    pair = st.tuples
    return ConvShape(
        (draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), groups * inner),
        (draw(st.integers(1, 3)), draw(st.integers(1, 3)), inner, groups * outer),
        draw(pair(st.integers(1, 3), st.integers(1, 3))),
        draw(pair(*[st.tuples(st.integers(-1, 3), st.integers(-1, 3))] * 2)),
        draw(pair(st.integers(1, 2), st.integers(1, 2))),
        groups,
        "float64",
    )


@st.composite
def lowerings(draw, groups):
    parts = draw(st.sampled_from([p for p in range(1, groups + 1) if groups % p == 0]))
    tile = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return SplitGroups(parts, tile, loop=draw(st.booleans()))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(shape=shapes(), data=st.data())
def test_every_lowering_is_the_convolution(shape, data):
    if min(shape.output) < 1:
        return
    tried = [
        Native(),
        Pointwise(),
        Patches(),
        ShiftedSum(),
        ShiftedPlanes(),
        Fenced(ShiftedSum()),
        data.draw(lowerings(shape.groups)),
    ]
    with jax.enable_x64(True):
        for direction in Direction:
            first, second = operands(shape, direction)
            kinds = [low for low in tried if low.applies(shape, direction)]
            kinds += [choose(shape, direction, "cpu", alone=alone) for alone in (False, True)]

            @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
            def run(first, second, direction=direction, kinds=kinds):
                return [low(shape, direction, first, second) for low in kinds]

            right = expected(shape, direction, first, second)
            for low, got in zip(kinds, run(first, second), strict=True):
                assert got.dtype == jnp.float64
                np.testing.assert_allclose(got, right, rtol=1e-12, atol=1e-12, err_msg=f"{low}")


def test_pointwise():
    shape = ConvShape((2, 5, 4, 3), (1, 1, 3, 2), (2, 3))
    for direction in Direction:
        first, second = operands(shape, direction)
        got = Pointwise()(shape, direction, first, second)
        np.testing.assert_allclose(
            got, expected(shape, direction, first, second), rtol=1e-5, atol=1e-5
        )
    assert not Pointwise().applies(ConvShape((1, 4, 4, 2), (1, 1, 1, 2), groups=2), direction)
    padded = ConvShape((1, 4, 4, 2), (1, 1, 2, 2), padding=((1, 0), (0, 0)))
    assert not Pointwise().applies(padded, direction)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("low", [ShiftedSum(), Fenced(ShiftedSum()), SplitGroups(2, (1, 2))])
def test_half_precision_keeps_its_type_and_sums_in_single(dtype, low):
    shape = ConvShape((2, 6, 5, 4), (3, 3, 1, 4), (1, 2), ((1, 1), (1, 1)), groups=4, dtype=dtype)
    for direction in Direction:
        first, second = operands(shape, direction)
        got = low(shape, direction, first, second)
        assert got.dtype == dtype
        # One rounding of the result, and no more.
        right = expected(shape, direction, first, second)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, float), right, rtol=eps, atol=1e-5)


def test_what_depends_on_the_kernel_alone_is_prepared_once():
    shape = ConvShape((2, 6, 6, 4), (3, 3, 2, 4), (2, 2), ((1, 1), (1, 1)), groups=2)
    for low in (Native(), ShiftedSum(), SplitGroups(2, (1, 2)), SplitGroups(1)):
        for direction in Direction:
            if not low.applies(shape, direction):
                continue
            first, second = operands(shape, direction)
            prepared = low.prepare(shape, direction, second)
            np.testing.assert_array_equal(
                jax.jit(low.run, static_argnums=(0, 1))(shape, direction, first, prepared),
                jax.jit(low.run, static_argnums=(0, 1))(shape, direction, first, prepared),
            )
            traced = jax.make_jaxpr(lambda x, p: low.run(shape, direction, x, p))(first, prepared)  # noqa: B023
            if direction is Direction.INPUT_GRADIENT and low != Native():
                assert "rev" not in str(traced)


def test_block_diagonals():
    kernel = jnp.arange(12.0).reshape(1, 1, 2, 6)
    full = block_diagonal(kernel, 3)
    assert full.shape == (1, 1, 6, 6)
    assert float(full[0, 0, 2, 3]) == float(kernel[0, 0, 0, 3])
    assert float(full[0, 0, 2, 4]) == 0 == float(full[0, 0, 0, 2])
    np.testing.assert_array_equal(diagonal_blocks(full, 3), kernel)
    infinite = block_diagonal(kernel.at[0, 0, 0, 0].set(jnp.inf), 3)
    assert int(jnp.isfinite(infinite).sum()) == 35


# -- primitives --------------------------------------------------------------------------------------------------------

CASES = {
    "dense": ConvShape((2, 5, 4, 3), (3, 2, 3, 2), padding=((1, 1), (0, 1)), dtype="float64"),
    "grouped, strided": ConvShape(
        (2, 6, 5, 4), (3, 3, 2, 6), (2, 1), ((1, 1), (1, 1)), groups=2, dtype="float64"
    ),
    "depthwise": ConvShape(
        (2, 4, 5, 3), (3, 3, 1, 3), padding=((1, 1), (1, 1)), groups=3, dtype="float64"
    ),
}


def derivatives(conv, x, k, dx, dk):
    """Values and derivatives, of first and second order, one by one and mapped over either operand or both."""

    def loss(x, k):
        return (conv(x, k) ** 3).sum()

    gradient = jax.grad(loss, (0, 1))

    def hessian_product(x, k):
        return jax.jvp(gradient, (x, k), (dx, dk))[1]

    def of_gradient(x, k):
        return sum((g**2).sum() for g in gradient(x, k))

    found = {
        "value": conv(x, k),
        "jvp": jax.jvp(conv, (x, k), (dx, dk))[1],
        "gradient": gradient(x, k),
        "hessian product": hessian_product(x, k),
        "gradient of a gradient": jax.grad(of_gradient, (0, 1))(x, k),
        "remat": jax.grad(jax.checkpoint(loss), (0, 1))(x, k),
        "scan": jax.lax.scan(lambda c, x: (c, gradient(x, k)), 0, jnp.stack([x, dx]))[1],
    }
    xs, ks = jnp.stack([x, dx, x - dx], 1), jnp.stack([k, dk, k + dk], 3)
    for (name, f), (axes, args) in itertools.product(
        {"conv": conv, "gradient": gradient, "hessian product": hessian_product}.items(),
        {(1, None): (xs, k), (None, 3): (x, ks), (1, 3): (xs, ks)}.items(),
    ):
        found[f"{name} over {axes}"] = jax.vmap(f, axes)(*args)
    return found


@pytest.mark.parametrize("name", CASES)
def test_derivatives_and_maps(name):
    shape = CASES[name]
    with jax.enable_x64(True):
        x, k = operands(shape, Direction.FORWARD)
        dx, dk = operands(shape, Direction.FORWARD, seed=1)

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def both(*args):
            ours = derivatives(lambda x, k: convolve(x, k, shape), *args)
            native = derivatives(lambda x, k: Native()(shape, Direction.FORWARD, x, k), *args)
            return ours, native

        ours, native = both(x, k, dx, dk)
        assert ours.keys() == native.keys()
        for key, value in ours.items():
            for a, b in zip(*map(jax.tree.leaves, (value, native[key])), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=key)


def primitives_of(jaxpr):
    """Names of the primitives of a jaxpr that convolve, those of inner jaxprs included."""
    found = []
    for eqn in jaxpr.eqns:
        if "conv" in eqn.primitive.name and "convert" not in eqn.primitive.name:
            found.append(eqn.primitive.name)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "jaxpr"):
                found += primitives_of(inner.jaxpr)
    return found


def test_derivatives_of_any_order_are_made_of_the_three_products():
    shape = CASES["grouped, strided"]
    with jax.enable_x64(True):
        x, k = operands(shape, Direction.FORWARD)

        def loss(x, k):
            return (convolve(x, k, shape) ** 3).sum()

        def hessian_product(x, k):
            return jax.jvp(jax.grad(loss, (0, 1)), (x, k), (x, k))[1]

        found = set(primitives_of(jax.make_jaxpr(hessian_product)(x, k).jaxpr))
        found |= set(
            primitives_of(jax.make_jaxpr(jax.vmap(jax.grad(loss)))(x[None], k[None]).jaxpr)
        )
    assert found == {"nnopt_conv", "nnopt_conv_input_gradient", "nnopt_conv_weight_gradient"}


def test_operands_of_another_shape_are_refused():
    shape = ConvShape((1, 4, 4, 2), (3, 3, 2, 2))
    with pytest.raises(TypeError, match="is not of shape"):
        convolve(jnp.zeros((1, 4, 5, 2)), jnp.zeros((3, 3, 2, 2)), shape)
    with pytest.raises(TypeError, match="is not of shape"):
        convolve(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2), jnp.bfloat16), shape)


def test_several_devices(tmp_path):
    """Batches over two devices, by `jax.jit` with shardings, by `jax.shard_map`, and on a mesh of explicit axes."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from nnopt.layers import Conv

        def loss(params, x, net):
            return (net.apply({"params": params}, x) ** 2).mean()

        x = jax.random.normal(jax.random.key(0), (4, 6, 6, 4))
        for groups in (1, 2, 4):
            net = Conv(4, (3, 3), feature_group_count=groups)
            params = net.init(jax.random.key(1), x)["params"]
            step = jax.value_and_grad(lambda p, x: loss(p, x, net))
            expected = step(params, x)
            for kind in (AxisType.Auto, AxisType.Explicit):
                mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
                with jax.set_mesh(mesh):
                    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
                    weights = jax.device_put(params, NamedSharding(mesh, P()))
                    found = [jax.jit(step)(weights, placed)]

                    def mean(p, x):
                        return jax.lax.pmean(loss(p, x, net), "data")

                    mapped = jax.shard_map(
                        jax.value_and_grad(mean), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
                    )
                    found.append(jax.jit(mapped)(weights, placed))
                for got in found:
                    jax.tree.map(
                        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected
                    )
        print("equal")
    """
    path = tmp_path / "devices.py"
    path.write_text(textwrap.dedent(script))
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**__import__("os").environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal"]


# -- Conv --------------------------------------------------------------------------------------------------------------


def lowered_text(net, x, platform, derive=lambda f: f):
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    run = derive(lambda v, x: net.apply(v, x))
    return jax.jit(run).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()


def test_an_override_is_part_of_the_module_and_is_obeyed():
    x = jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)

    def convolutions(low):
        net = Conv(8, (3, 3), feature_group_count=4, conv_general_dilated=LoweredConvolution(low))
        return [lowered_text(net, x, p).count("stablehlo.convolution") for p in ("cpu", "cuda")]

    assert convolutions(ShiftedSum()) == [0, 0]
    assert convolutions(SplitGroups(4)) == [4, 4]
    assert convolutions(SplitGroups(1)) == [1, 1]
    assert convolutions(None)[1] == 1
    # What does not apply is not obeyed: five parts of four groups.
    assert convolutions(SplitGroups(5)) == convolutions(None)
    nets = [
        Conv(8, (3, 3), conv_general_dilated=LoweredConvolution(low)) for low in (None, Native())
    ]
    assert nets[0] == Conv(8, (3, 3)) != nets[1]


def test_other_platforms_keep_the_native_form_and_its_gradients():
    x = jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)
    for groups, stride in ((1, 1), (4, 2), (8, 1)):
        net = Conv(8, (3, 3), stride, feature_group_count=groups)
        native = nn.Conv(8, (3, 3), stride, feature_group_count=groups)

        def derive(f):
            return jax.grad(lambda v, x: f(v, x).sum(), (0, 1))

        for platform in ("cuda", "tpu"):
            ours, theirs = (
                sorted(
                    line.split("=", 1)[1].split("(", 1)[0] + line.split(")", 1)[1]
                    for line in lowered_text(n, x, platform, derive).splitlines()
                    if "stablehlo.convolution" in line
                )
                for n in (net, native)
            )
            assert len(ours) == len(theirs) == 2
            assert [o.split("batch_group_count")[0] for o in ours] == [
                t.split("batch_group_count")[0] for t in theirs
            ]


def test_precision_is_passed_on():
    x = jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)
    for low in (None, SplitGroups(2)):
        net = Conv(
            8,
            (3, 3),
            feature_group_count=4,
            precision="highest",
            conv_general_dilated=LoweredConvolution(low),
        )
        text = lowered_text(net, x, "cuda")
        assert 2 * text.count("stablehlo.convolution") == text.count("precision HIGHEST") > 0


def test_input_gradients_on_a_cpu_are_not_transposed_convolutions():
    x = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
    for groups, stride in itertools.product((1, 2, 4, 16), (1, 2)):
        net = Conv(16, (3, 3), stride, feature_group_count=groups, use_bias=False)
        text = lowered_text(
            net, x, "cpu", lambda f: jax.grad(lambda v, x: (f(v, x) ** 2).sum(), argnums=1)
        )
        assert "lhs_dilate = [2" not in text
        assert "feature_group_count = 1 " in text or "stablehlo.convolution" not in text


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"kernel_size": (3,), "feature_group_count": 2}, (2, 7, 4)),
        ({"kernel_size": (2, 3, 2), "feature_group_count": 2}, (1, 4, 4, 4, 4)),
        ({"kernel_size": (3, 3), "feature_group_count": 2, "input_dilation": 2, "padding": 1}, (1, 4, 4, 4)),
        ({"kernel_size": (3, 3), "feature_group_count": 2, "padding": "CIRCULAR"}, (2, 5, 5, 4)),
        ({"kernel_size": (3, 3), "strides": (2, 1), "kernel_dilation": (1, 2)}, (2, 7, 6, 4)),
        ({"kernel_size": (1, 1), "strides": 2}, (3, 5, 5, 4)),
        ({"kernel_size": (3, 3), "padding": "VALID"}, (5, 5, 4)),
        ({"kernel_size": (3, 3), "mask": np.tri(4).reshape(1, 1, 4, 4).repeat(3, 0).repeat(3, 1)}, (2, 5, 5, 4)),
    ],
)  # fmt: skip
def test_conv_stands_where_the_one_of_flax_stands(fields, size):
    ours, theirs = (kind(4, **fields) for kind in (Conv, nn.Conv))
    x = jax.random.normal(jax.random.key(0), size)
    variables = theirs.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(
        jnp.shape, variables
    )

    def loss(v, x, net):
        return (net.apply(v, x) ** 2).sum()

    a, b = (jax.grad(loss, (0, 1))(variables, x, net) for net in (ours, theirs))
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_what_flax_refuses_is_refused():
    x = jnp.zeros((1, 5, 5, 4))
    for kind in (nn.Conv, Conv):
        with pytest.raises(ValueError, match=r"divisible|multiple"):
            kind(6, (3, 3), feature_group_count=4).init(jax.random.key(0), x)


@pytest.mark.parametrize("kind", [nn.Conv, Conv])
def test_the_shape_is_read_off_an_equation(kind):
    net = kind(
        6, (3, 2), (2, 1), ((2, 1), (0, 3)), 1, (1, 2), feature_group_count=2, use_bias=False
    )
    x = jnp.zeros((2, 9, 8, 4))
    jaxpr = jax.make_jaxpr(lambda x: net.init_with_output(jax.random.key(0), x)[0])(x)
    (equation,) = (
        e for e in jaxpr.eqns if e.primitive.name.endswith(("conv", "conv_general_dilated"))
    )
    shape = ConvShape.of_equation(equation)
    assert shape == ConvShape(
        (2, 9, 8, 4), (3, 2, 2, 6), (2, 1), ((2, 1), (0, 3)), (1, 2), 2, "float32"
    )
    assert shape.output == equation.outvars[0].aval.shape
    assert shape.macs == int(np.prod(shape.output)) * 3 * 2 * 2


def test_no_shape_is_read_off_others():
    x = jnp.zeros((2, 9, 8, 4))
    for run in (
        lambda x: x + 1,
        lambda x: nn.ConvTranspose(3, (2, 2), (2, 2)).init_with_output(jax.random.key(0), x)[0],
        lambda x: nn.Conv(3, (3,)).init_with_output(jax.random.key(0), x)[0],
        lambda x: jax.lax.conv_general_dilated(x, jnp.zeros((2, 9, 3, 3)), (1, 1), "SAME"),
    ):
        equations = jax.make_jaxpr(run)(x).eqns
        assert [ConvShape.of_equation(e) for e in equations] == [None] * len(equations)


# -- the rule ----------------------------------------------------------------------------------------------------------

SPACE = [
    ConvShape(
        (8, size, size, channels), (3, 3, channels // groups, channels), (s, s), ((1, 1), (1, 1)), groups=groups
    )
    for width, size in ((32, 32), (64, 16), (128, 8))
    for channels in (width, width // 2, width // 4)
    for groups in (1, 2, 4, 8, 16, 32, 64, 128)
    for s in (1, 2)
    if channels % groups == 0
]  # fmt: skip


@pytest.mark.parametrize("alone", [False, True])
def test_the_rule_gives_what_applies_and_says_why(alone):
    kinds = set()
    for shape, direction in itertools.product(SPACE, Direction):
        chosen = choose(shape, direction, "cpu", alone=alone)
        kinds.add(type(chosen))
        assert isinstance(chosen, Lowering)
        assert chosen.applies(shape, direction)
        assert not (isinstance(chosen, Native) and shape.groups > 1)
        assert explain(shape, direction, "cpu", alone=alone).startswith(f"{chosen}: ")
        for platform in ("gpu", "cuda", "rocm", "tpu"):
            assert choose(shape, direction, platform, alone=alone) == Native()
    assert (Fenced in kinds) is not alone
    assert (ShiftedSum in kinds) is alone
    assert SplitGroups in kinds


def test_programs_stay_small():
    """Many groups, as vmapped weights make them, and large windows do not make programs of thousands of operations."""
    many = ConvShape((2, 8, 8, 2048), (3, 3, 8, 2048), padding=((1, 1), (1, 1)), groups=256)
    large = ConvShape((2, 40, 40, 8), (31, 31, 1, 8), padding=((15, 15), (15, 15)), groups=8)
    for shape, direction, alone in itertools.product((many, large), Direction, (True, False)):
        lowering = choose(shape, direction, "cpu", alone=alone)
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shape.operands(direction)]
        run = functools.partial(lowering, shape, direction)
        assert jax.jit(run).trace(*args).lower().as_text().count("\n") < 2000


def test_convolutions_run_where_compilation_is_switched_off():
    x, conv = jnp.ones((1, 4, 4, 2)), Conv(2, (3, 3), feature_group_count=2)
    variables = conv.init(jax.random.key(0), x)
    wanted = conv.apply(variables, x)
    with jax.disable_jit():
        found = conv.apply(variables, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
