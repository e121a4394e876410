"""Counts against formulas written by hand, and the lowering of grouped convolutions against Flax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from foreign_networks import CASES, VECTOR, Ensemble, Scanned
from hypothesis import given, settings
from hypothesis import strategies as st

from nnopt.core import All, Example, rewrite
from nnopt.costs import macs, macs_by_site, parameters
from nnopt.layers import Conv
from nnopt.networks import named
from nnopt.rewrites import LowerGroupedConvs

IMAGE = jax.ShapeDtypeStruct((2, 9, 7, 8), jnp.float32)


@pytest.mark.parametrize("kind", [nn.Conv, Conv])
@pytest.mark.parametrize(
    ("fields", "positions", "window", "groups"),
    [
        ({}, 9 * 7, 9, 1),
        ({"use_bias": False}, 9 * 7, 9, 1),
        ({"strides": 2}, 5 * 4, 9, 1),
        ({"strides": (2, 1)}, 5 * 7, 9, 1),
        ({"padding": "VALID"}, 7 * 5, 9, 1),
        ({"padding": "VALID", "kernel_dilation": 2}, 5 * 3, 9, 1),
        ({"padding": 2}, 11 * 9, 9, 1),
        ({"kernel_size": (1, 5)}, 9 * 7, 5, 1),
        ({"feature_group_count": 2}, 9 * 7, 9, 2),
        ({"feature_group_count": 4, "strides": 2}, 5 * 4, 9, 4),
        ({"feature_group_count": 8}, 9 * 7, 9, 8),
    ],
)
def test_convolutions(kind, fields, positions, window, groups):
    net = kind(16, **{"kernel_size": (3, 3), **fields})
    assert macs(net, IMAGE) == 2 * positions * window * 8 * 16 // groups
    bias = 0 if fields.get("use_bias") is False else 16
    assert parameters(net, IMAGE) == window * 8 * 16 // groups + bias
    assert macs(net, jax.ShapeDtypeStruct((1, *IMAGE.shape[1:]), jnp.float32)) * 2 == macs(
        net, IMAGE
    )


def test_a_transposed_convolution():
    # Zeros put between the inputs count, as padding does.
    net = nn.ConvTranspose(4, (2, 2), strides=(2, 2))
    assert macs(net, IMAGE) == 2 * 18 * 14 * 4 * 8 * 4


def test_dense_attention_and_einsum():
    assert macs(nn.Dense(5), VECTOR) == 2 * 6 * 5
    x = jax.ShapeDtypeStruct((3, 7, 8), jnp.float32)
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    projections, products = 4 * 3 * 7 * 8 * 8, 2 * 3 * 2 * 7 * 7 * 4
    assert macs(attention, Example(x, x)) == projections + products
    assert parameters(attention, Example(x, x)) == 4 * (8 * 8 + 8)
    assert macs(nn.Einsum((8, 2, 5), "abc,cde->abde"), x) == 3 * 7 * 8 * 10
    assert macs(nn.LayerNorm(), x) == 0


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_multiplies(length, remat):
    one = 2 * (6 * 12 + 12 * 6)
    net = Scanned(length, remat)
    assert macs(net, VECTOR) == length * one + 2 * 6 * 3
    assert macs_by_site(net, VECTOR) == {
        ("layers", "mlp", "hidden"): length * 2 * 6 * 12,
        ("layers", "mlp", "out"): length * 2 * 12 * 6,
        ("head",): 2 * 6 * 3,
    }
    assert parameters(net, VECTOR) == length * (6 * 12 + 12 + 12 * 6 + 6) + 6 * 3 + 3


@pytest.mark.parametrize("members", [1, 4])
def test_an_ensemble_counts_every_member(members):
    assert macs(Ensemble(members), VECTOR) == members * 2 * (6 * 12 + 12 * 6) + 2 * 6 * 3


def test_a_shared_module_counts_for_every_call():
    case = CASES["shared_twice"]
    assert macs_by_site(case.net, VECTOR) == {("layer",): 2 * 2 * 6 * 6}
    assert parameters(case.net, VECTOR) == 6 * 6 + 6


@pytest.mark.parametrize("name", ["resnext-29"])
def test_a_lowering_does_not_change_counts(name):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    net = named(name)
    lowered = rewrite(net, LowerGroupedConvs(All()), example=image)
    assert lowered is not net
    assert macs_by_site(lowered, image) == macs_by_site(net, image)
    assert parameters(lowered, image) == parameters(net, image)


def test_subclasses_are_not_lowered():
    case = CASES["conv_subclass"]
    assert rewrite(case.net, LowerGroupedConvs(All()), example=case.inputs[0]) is case.net


CONVOLUTIONS = {
    "window": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.integers(1, 2),
    "padding": st.sampled_from(["SAME", "VALID", 1, ((2, 0), (0, 1))]),
    "dilation": st.integers(1, 2),
    "size": st.tuples(st.integers(5, 7), st.integers(5, 7)),
}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(groups=st.integers(1, 4), inner=st.integers(1, 3), outer=st.integers(1, 3), **CONVOLUTIONS)
def test_the_lowering_is_the_convolution(groups, inner, outer, **convolution):
    check_lowering(groups, inner, outer, **convolution)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(channels=st.integers(2, 5), **CONVOLUTIONS)
def test_the_depthwise_lowering_is_the_convolution(channels, **convolution):
    check_lowering(channels, 1, 1, **convolution)


def check_lowering(groups, inner, outer, window, stride, padding, dilation, size):
    """Values and gradients of `Conv` are those of `nn.Conv`."""
    fields = {
        "features": groups * outer,
        "kernel_size": window,
        "strides": stride,
        "padding": padding,
        "kernel_dilation": dilation,
        "feature_group_count": groups,
    }
    native, ours = nn.Conv(**fields), Conv(**fields)
    rng = np.random.default_rng(groups)
    x = jnp.asarray(rng.normal(size=(2, *size, groups * inner)), jnp.float32)
    variables = {
        "params": {
            "kernel": jnp.asarray(rng.normal(size=(*window, inner, groups * outer)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=groups * outer), jnp.float32),
        }
    }

    def loss(net, variables, x):
        y = net.apply(variables, x)
        return (y**3).sum(), y

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(variables, x):
        run = jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)
        return run(native, variables, x), run(ours, variables, x)

    expected, got = both(variables, x)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("features", [4, 8])
def test_the_lowering_under_vmap(features):
    native, ours = (kind(features, (3, 3), feature_group_count=4) for kind in (nn.Conv, Conv))
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 5, 4))
    variables = native.init(jax.random.key(1), x[0])
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v]), variables)
    for axes in ((None, 0), (0, 0)):
        given_ = variables if axes[0] is None else stacked
        a, b = (jax.vmap(net.apply, axes)(given_, x) for net in (native, ours))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_derivatives_of_the_depthwise_lowering():
    """Forward mode, and a gradient of a gradient."""
    native, ours = (kind(3, (3, 3), feature_group_count=3) for kind in (nn.Conv, Conv))
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
    variables = native.init(jax.random.key(1), x)

    def curved(net):
        return lambda v: (net.apply(v, x) ** 3).sum()

    direction = jax.tree.map(jnp.ones_like, variables)
    for derive in (
        lambda f: jax.jvp(f, (variables,), (direction,)),
        lambda f: jax.jvp(jax.grad(f), (variables,), (direction,)),
        lambda f: jax.grad(lambda v: sum(g.sum() for g in jax.tree.leaves(jax.grad(f)(v))))(
            variables
        ),
    ):
        a, b = (jax.tree.leaves(derive(curved(net))) for net in (native, ours))
        for left, right in zip(a, b, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-3)


def test_depthwise_is_lowered_to_a_sum_on_a_cpu():
    """What is compiled for a CPU holds no convolution, and for another platform nothing else."""
    net = Conv(8, (3, 3), feature_group_count=8)
    x = jax.ShapeDtypeStruct((1, 5, 5, 8), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    traced = jax.jit(net.apply).trace(variables, x)
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == 1
        assert "feature_group_count = 8" in text
