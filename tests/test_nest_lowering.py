"""Operators as linen modules compute what the plain interpreter computes: random convolutions, random programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnopt.errors import NestError
from nnopt.nests import (
    Bottleneck,
    Depthwise,
    Fuse,
    Group,
    Program,
    Restrict,
    Share,
    Slabs,
    Split,
    StripMine,
    Tie,
    Untie,
    Widen,
    canonical,
    convolution,
    dense,
)
from nnopt.nests.gather import gathered
from nnopt.nests.interpret import interpret, kernel_box
from nnopt.nests.lower import pieces, run
from nnopt.nests.module import ProgramConv, ProgramDense, carried, nest_of, prepared
from nnopt.nests.named import depthwise, grouped, sequence1, sequence2, sequence3
from nnopt.nests.sample import distinct, draw

PAIRS = 8  # pairs that are compiled together: one program of eight compiles faster than eight


@st.composite
def convolutions(draw_):
    """A small convolution in 1 to 3 dimensions, or a dense layer."""
    rank = draw_(st.sampled_from((0, 1, 2, 2, 2, 2, 3)))
    inputs, outputs = draw_(st.sampled_from(((4, 4), (4, 8), (6, 4), (8, 8), (1, 4))))
    if rank == 0:
        return dense(inputs, outputs)
    each = {"min_size": rank, "max_size": rank}
    window = draw_(st.lists(st.sampled_from((1, 2, 3, 3)), **each))
    padding = draw_(
        st.one_of(
            st.sampled_from(("SAME", "SAME", "VALID")),
            st.lists(st.tuples(*[st.integers(0, 2)] * 2), **each),
        )
    )
    groups = draw_(st.sampled_from((1, 1, 1, 2))) if inputs % 2 == 0 else 1
    return convolution(
        draw_(st.lists(st.sampled_from((4, 5, 6)), **each)),
        inputs,
        outputs,
        window,
        strides=draw_(st.lists(st.sampled_from((1, 1, 2)), **each)),
        padding=padding,
        dilation=[draw_(st.integers(1, 2)) if k < 3 else 1 for k in window],
        groups=groups,
    )


def compared(operators, rng):
    """Largest relative difference of each operator from the interpreter, compiled in one program."""
    functions, arguments, wanted = [], [], []
    for operator in operators:
        canon, kept = prepared(operator)
        lows, extents = kernel_box(operator)
        weights = rng.normal(size=extents)
        x = rng.normal(size=(2, *operator.input))
        arrays = [
            weights[tuple(np.moveaxis(v.places - np.array(lows), -1, 0))].astype(np.float32)
            for v in kept.variables
        ]

        def function(x, *arrays, operator=operator, canon=canon, kept=kept):
            return run(canon, x, kept.kernels(arrays), operator.output)

        functions.append(function)
        arguments.append((x.astype(np.float32), *arrays))
        wanted.append(interpret(operator, x, weights))
    together = jax.jit(lambda all_: [f(*a) for f, a in zip(functions, all_, strict=True)])
    # Compiled once and run once: what LLVM would win is not worth its time.
    results = together.lower(arguments).compile({"xla_backend_optimization_level": 0})(arguments)
    return [
        float(np.abs(y - z).max() / max(np.abs(z).max(), 1.0))
        for y, z in zip(results, wanted, strict=True)
    ]


# 4 x 65 x 8 = 2,080 pairs; four tests, so that several processes share them.
@pytest.mark.parametrize("stream", range(4))
def test_random_operators_are_as_interpreted(stream):
    seen = []

    @given(
        st.lists(
            st.tuples(convolutions(), st.integers(0, 2**32 - 1)), min_size=PAIRS, max_size=PAIRS
        )
    )
    @settings(max_examples=65, deadline=None, suppress_health_check=list(HealthCheck))
    def check(pairs):
        drawn = [draw(conv, np.random.default_rng([stream, seed])) for conv, seed in pairs]
        differences = compared([d.operator for d in drawn], np.random.default_rng(0))
        for (conv, _), d, difference in zip(pairs, drawn, differences, strict=True):
            assert difference < 1e-5, f"{conv}\n{d.program}"
        seen.extend(d.canon for d in drawn)

    check()
    assert len(seen) >= 65 * PAIRS
    assert len(set(seen)) > 100


def test_what_no_convolution_computes_is_gathered():
    conv = convolution((6, 5), 6, 8, (3, 3))
    rng = np.random.default_rng(0)
    for d in distinct(conv, 40, rng):
        x = rng.normal(size=(2, *conv.input))
        weights = rng.normal(size=kernel_box(d.operator)[1])
        canon, kept = prepared(d.operator)
        lows, _ = kernel_box(d.operator)
        arrays = [
            jnp.asarray(weights[tuple(np.moveaxis(v.places - np.array(lows), -1, 0))], jnp.float32)
            for v in kept.variables
        ]
        whole = interpret(d.operator, x, weights)
        for form, kernel in zip(canon.forms, kept.kernels(arrays), strict=True):
            values = np.asarray(gathered(form, jnp.asarray(x, jnp.float32), kernel))
            order = [b for b in form.bands if b.writes and (b.weighs or any(b.x))]
            for at in np.ndindex(*(b.extent for b in order)):
                place = tuple(
                    s + sum(b.y[i] * n for b, n in zip(order, at, strict=True))
                    for i, s in enumerate(form.y)
                )
                np.testing.assert_allclose(
                    values[(slice(None), *at)], whole[(slice(None), *place)], rtol=1e-4, atol=1e-4
                )


def test_many_pieces_are_gathered():
    conv = convolution((128,), 128, 2, (3,))
    program = Program((Tie("ow", "ci"),))
    (form,) = canonical(program(conv)).forms
    assert pieces(form) == 128
    assert compared([program(conv)], np.random.default_rng(0))[0] < 1e-5


MODULES = [
    (nn.Conv(8, (3, 3)), grouped(4), {"feature_group_count": 4}),
    (nn.Conv(8, (3, 3), strides=2), depthwise(), {"feature_group_count": 8}),
    (nn.Conv(8, (3, 3), padding=((2, 0), (1, 1))), sequence1(8, (1, 1)), {}),
    (nn.Conv(8, (3, 5), use_bias=False, kernel_dilation=(2, 1)), sequence3(1), {}),
    (nn.Conv(8, 3), Program((Group("co", "ci", 2),)), {"feature_group_count": 2}),
    (
        nn.Conv(8, (3, 3), feature_group_count=2),
        Program((Group("co", "ci", 2),)),
        {"feature_group_count": 4},
    ),
]


@pytest.mark.parametrize(("module", "program", "fields"), MODULES, ids=lambda v: str(v)[:30])
def test_modules_equal_the_convolutions_they_name(module, program, fields):
    """Programs that have a native counterpart give its parameters, its output, and its spread of fresh weights."""
    rank = len(module.kernel_size) if isinstance(module.kernel_size, tuple) else 1
    x = jax.random.normal(jax.random.key(0), (3, *(8, 6, 5)[:rank], 8))
    native = module.clone(**fields)
    ours = ProgramConv(
        **{
            f: getattr(module, f)
            for f in module.__dataclass_fields__
            if f not in ("parent", "name")
        },
        program=program,
    )
    variables = ours.init(jax.random.key(1), x)
    theirs = native.init(jax.random.key(1), x)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(v)) for v in (variables, theirs)]
    assert sizes[0] == sizes[1]
    kernel = np.asarray(variables["params"]["kernel"])
    assert np.std(kernel) == pytest.approx(np.std(np.asarray(theirs["params"]["kernel"])), rel=0.15)
    # `[*window, in, group, out]` of ours is `[*window, in, group * out]` of theirs.
    groups = fields.get("feature_group_count", 1)
    shape = theirs["params"]["kernel"].shape
    moved = kernel.reshape(*shape[:-2], shape[-2], groups, -1) if groups > 1 else kernel
    same = {"params": {**variables["params"], "kernel": moved.reshape(shape)}}
    np.testing.assert_allclose(ours.apply(variables, x), native.apply(same, x), atol=2e-5)


def test_fresh_weights_have_the_fan_in_that_is_left():
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 64))
    for program in (
        Program(),
        Program((Group("co", "ci", 16),)),
        sequence2(64, 16, 4),
        Program((Bottleneck("kh", 3), Bottleneck("ci", 8))),
        Program((Share("ci"),)),
        Program((Split("oh", (4,)), Restrict("kh", 1, 2, part=0))),
        Program((Slabs("oh", 2), Untie("oh_o"), Widen("kw", 5))),
    ):
        module = ProgramConv(64, (3, 3), padding="SAME", use_bias=False, program=program)
        y = module.apply(module.init(jax.random.key(1), x), x)
        assert 0.6 < float(y[:, 2:-2, 2:-2].std()) < 1.4, program


def test_weights_are_carried():
    conv = nn.Conv(8, (3, 3))
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    params = conv.init(jax.random.key(1), x)["params"]
    params["bias"] = jnp.arange(8.0)
    nest = nest_of(conv, (6, 6, 4))

    def through(*steps):
        module = ProgramConv(8, (3, 3), program=Program(steps))
        found = carried(Program(steps)(nest), params)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(
            jnp.shape, dict(module.init(jax.random.key(2), x)["params"])
        )
        return module.apply({"params": found}, x)

    full = conv.apply({"params": params}, x)
    keeping = [
        (), (StripMine("co", 2), Split("co_o", (1,))), (Fuse("oh", "ow"),), (Widen("kh", 5),), (Untie("oh"),),
        (Split("oh", (2,)), Untie()),
    ]  # fmt: skip
    for steps in keeping:
        np.testing.assert_allclose(through(*steps), full, atol=1e-5)
    blocks = jnp.kron(jnp.eye(4), jnp.ones((1, 2)))  # of input and output channels
    masked = conv.apply({"params": {**params, "kernel": params["kernel"] * blocks[None, None]}}, x)
    np.testing.assert_allclose(through(Depthwise("co", "ci")), masked, atol=1e-5)


def test_dense_layers_and_batches():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    module = ProgramDense(12, program=Program((Group("co", "ci", 4),)))
    variables = module.init(jax.random.key(1), x)
    kernel = variables["params"]["kernel"]
    assert kernel.shape == (2, 4, 3)
    wanted = jnp.einsum("abgi,igo->abgo", x.reshape(2, 3, 4, 2), kernel).reshape(2, 3, 12)
    np.testing.assert_allclose(module.apply(variables, x), wanted, atol=1e-5)
    image = jax.random.normal(jax.random.key(0), (6, 6, 4))
    conv = ProgramConv(8, (3, 3), program=Program((Bottleneck("oh", 2),)))
    one = conv.init_with_output(jax.random.key(0), image)[0]
    assert one.shape == (6, 6, 8)
    np.testing.assert_array_equal(one[::2], one[1::2])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv(8, (3, 3), padding="CIRCULAR"), "CIRCULAR padding repeats what it reads"),
        (nn.Conv(8, (3, 3), input_dilation=2), "no nest with affine indices"),
        (nn.Conv(8, (3, 3), mask=jnp.ones((3, 3, 4, 8))), "a masked convolution has no nest"),
        (nn.ConvTranspose(8, (3, 3)), "ConvTranspose is no convolution or dense layer"),
        (nn.Conv(8, (3,)), "a window of (3,) on an image of shape (6, 6, 4)"),
    ],
)
def test_layers_without_a_nest(module, message):
    with pytest.raises(NestError) as error:
        nest_of(module, (6, 6, 4))
    assert message in str(error.value)
