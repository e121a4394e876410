"""Invariances of each score, as its definition says, and what is found in traced networks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_oracle import BATCH, QUICK, Small, problem

from nnopt.core import Example
from nnopt.errors import ScoreError
from nnopt.layers import Conv
from nnopt.networks import WideResNet
from nnopt.scores import (
    EpeNas,
    Fisher,
    GradNorm,
    Grasp,
    JacobCov,
    L2Norm,
    LayerFisher,
    MeCo,
    Naswot,
    NtkCondition,
    Plain,
    Scorer,
    Snip,
    Swap,
    SynFlow,
    Zen,
    Zico,
    mean_cross_entropy,
)
from nnopt.scores.flow import Scaled
from nnopt.scores.network import trace, trace_sites
from nnopt.scores.swap import _distinct, _patterns

OF_LOSS = (GradNorm(), Snip(), Plain(), Grasp(), LayerFisher(), Fisher(), Zico())
OF_INPUT = (JacobCov(), EpeNas(), Naswot(), Swap(), MeCo(), NtkCondition(), Zen())
EVERY = (*OF_LOSS, *OF_INPUT, L2Norm(), SynFlow())


class Ends(nn.Module):
    """A convolution straight into a ReLU, a normalised one, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name="first")(x))
        x = nn.Conv(5, (3, 3), use_bias=False, name="second")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=0.0, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def setup():
    images = np.random.default_rng(0).normal(size=(BATCH, 5, 5, 2)).astype(np.float32)
    labels = np.asarray([0, 2, 1, 1, 0, 2])
    variables = Example(images).init(Ends(), jax.random.key(0))
    scores = [s for s in EVERY if s != Fisher()]
    scorer = Scorer(Ends(), Example(images, train=True), scores, compiler_options=QUICK)
    return scorer, variables, images, labels, scorer(variables, images, labels)


def scaled(variables, site, factor):
    params = dict(variables["params"])
    params[site] = jax.tree.map(lambda v: factor * v, params[site])
    return {**variables, "params": params}


def same(value, other, rel=1e-3, absolute=1e-5):
    assert value.total == pytest.approx(other.total, rel=rel, abs=absolute)


def test_images_in_another_order(setup):
    scorer, variables, images, labels, values = setup
    order = np.asarray([3, 0, 5, 1, 4, 2])
    moved = scorer(variables, images[order], labels[order])
    for score, value in values.items():
        if score not in (MeCo(), Zico()):  # of the first image; of the two halves
            same(moved[score], value, rel=5e-3, absolute=1e-4)


def test_labels_do_not_matter_to_scores_without_a_loss(setup):
    scorer, variables, images, labels, values = setup
    others = scorer(variables, images, (labels + 1) % 3)
    for score, value in values.items():
        if score in OF_LOSS:
            assert others[score] != value
        else:  # class names change, the partition into classes does not
            same(others[score], value, rel=1e-6)
    regrouped = scorer(variables, images, np.asarray([0, 0, 0, 1, 1, 2]))
    assert regrouped[EpeNas()] != values[EpeNas()]
    assert regrouped[JacobCov()] == values[JacobCov()]


def test_images_do_not_matter_to_scores_without_data(setup):
    scorer, variables, images, labels, values = setup
    others = scorer(variables, images[::-1] * 2 + 1, labels)
    for score in (L2Norm(), SynFlow(), Zen()):
        assert others[score] == values[score]
    assert others[Naswot()] != values[Naswot()]


def test_a_layer_before_a_relu_at_another_scale(setup):
    """Codes, and correlations of what depends on it, stay: so do all gradients of normalised layers behind it."""
    scorer, variables, images, labels, values = setup
    others = scorer(scaled(variables, "first", 3.0), images, labels)
    for score in (Naswot(), Swap(), MeCo(), JacobCov(), EpeNas(), Snip(), Zen()):
        same(others[score], values[score])
    sites, before = others[GradNorm()].sites, values[GradNorm()].sites
    assert sites["first"] == pytest.approx(before["first"] / 3, rel=1e-3)
    assert sites["second"] == pytest.approx(before["second"], rel=1e-3)  # three times the input
    assert sites["head"] == pytest.approx(before["head"], rel=1e-3)


def test_a_normalised_layer_at_another_scale(setup):
    scorer, variables, images, labels, values = setup
    others = scorer(scaled(variables, "second", 4.0), images, labels)
    for score in (Snip(), Naswot(), Swap(), JacobCov(), MeCo(), LayerFisher()):
        same(others[score], values[score])
    assert values[Plain()].sites["second"] == pytest.approx(0, abs=1e-5)
    assert others[GradNorm()].sites["second"] == pytest.approx(
        values[GradNorm()].sites["second"] / 4, rel=1e-3
    )
    assert others[SynFlow()].total > 3 * values[SynFlow()].total


@pytest.mark.parametrize(
    ("score", "power"),
    [
        (GradNorm(), 1),
        (Snip(), 1),
        (Plain(), 1),
        (Grasp(), 2),
        (LayerFisher(), 2),
        (Fisher(), 2),
        (Zico(), 0),
    ],
)
def test_the_loss_at_another_scale(score, power):
    _, variables, images, labels = problem()
    images = images.astype(np.float32)
    variables = jax.tree.map(lambda v: v.astype(np.float32), variables)
    totals = []
    for factor in (1.0, 8.0):
        scorer = Scorer(
            Small(), Example(images, train=True), [score], compiler_options=QUICK,
            loss=lambda outputs, labels, factor=factor: factor * mean_cross_entropy(outputs, labels),
        )  # fmt: skip
        totals.append(scorer(variables, images, labels)[score].total)
    assert totals[1] == pytest.approx(8.0**power * totals[0], rel=1e-5)


@pytest.mark.parametrize("score", [Fisher(), LayerFisher()])
def test_every_image_twice_divides_fisher_by_four(score):
    """The batch convention: the mean in the loss puts `1/N` into each gradient."""
    _, variables, images, labels = problem()
    images = images.astype(np.float32)
    variables = jax.tree.map(lambda v: v.astype(np.float32), variables)
    once, twice = (
        Scorer(Small(), Example(x, train=True), [score], compiler_options=QUICK)(variables, x, y)[
            score
        ]
        for x, y in ((images, labels), (np.repeat(images, 2, 0), np.repeat(labels, 2)))
    )
    assert twice.total == pytest.approx(once.total / 4, rel=1e-3)


def test_zen_takes_back_what_normalisation_divides_by():
    """With and without batch normalisation the score is the same: that is what its second part is for."""

    class Chain(nn.Module):
        norm: bool

        @nn.compact
        def __call__(self, x, train=False):
            for i in range(3):
                x = nn.Conv(16, (3, 3), use_bias=False, name=f"conv{i}")(x)
                if self.norm:
                    x = nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(x)
                x = nn.relu(x)
            return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))

    images = np.zeros((8, 8, 8, 3), np.float32)
    with_norm, without = [], []
    for found, norm in ((with_norm, True), (without, False)):
        net = Chain(norm)
        scorer = Scorer(net, Example(images, train=True), [Zen()], compiler_options=QUICK)
        variables = Example(images).init(net, jax.random.key(0))
        for seed in range(6):
            found.append(scorer(variables, images, key=jax.random.key(seed))[Zen()].total)
    assert np.mean(with_norm) == pytest.approx(np.mean(without), abs=0.5)
    assert np.std(with_norm) > 0


# --- synaptic flow ---


class Deep(nn.Module):
    """Wide convolutions with weights of order one: flow beyond float32 after a few."""

    depth: int
    residual: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(self.depth):
            y = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{i}")(x)
            y = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"norm{i}")(y))
            x = x + y if self.residual and i else y
        return nn.Dense(3, use_bias=False, name="head")(x.mean(axis=(1, 2)))


def flow_of(net, variables, size=6, dtype=np.float32):
    images = np.zeros((2, size, size, 2), dtype)
    scorer = Scorer(
        net, Example(images, train=True), [SynFlow(), SynFlow(log=True)], compiler_options=QUICK
    )
    values = scorer(variables)
    return values[SynFlow()], values[SynFlow(log=True)]


def test_flow_is_conserved_from_layer_to_layer():
    net = Deep(4)
    variables = Example(np.zeros((2, 6, 6, 2), np.float32)).init(net, jax.random.key(0))
    value, _ = flow_of(net, variables)
    flows = list(value.sites.values())
    assert flows == pytest.approx([flows[0]] * 5, rel=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("depth", [4, 14])
def test_flow_beyond_float32(depth, residual):
    """14 layers of about 10^3 each, in float32, against float64."""
    net = Deep(depth, residual)
    rng = np.random.default_rng(depth)
    images = np.zeros((2, 6, 6, 2), np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda s: rng.normal(0, 40, s.shape).astype(np.float32), shapes)
    value, log = flow_of(net, variables)
    params = {
        k: np.abs(v["kernel"].astype(np.float64))
        for k, v in variables["params"].items()
        if "kernel" in v
    }

    def run(kernels):
        x = np.ones((6, 6, 2))
        for i in range(depth):
            kernel, padded = kernels[f"conv{i}"], np.pad(x, ((1, 1), (1, 1), (0, 0)))
            y = sum(padded[a : a + 6, b : b + 6] @ kernel[a, b] for a in range(3) for b in range(3))
            x = x + y if residual and i else y
        return float((x.mean(axis=(0, 1)) @ kernels["head"]).sum())

    flow = run(params)
    assert flow > (1e40 if depth == 14 else 1e10)
    # R is linear in each kernel (plus what goes round it): sum W dR/dW = R(W) - R(0).
    expected = {name: flow - run({**params, name: 0 * kernel}) for name, kernel in params.items()}
    assert value.sites == pytest.approx(expected, rel=1e-4)
    assert log.total == pytest.approx(math.log(sum(expected.values())), rel=1e-6)
    assert value.finite


def test_flow_of_nothing_is_zero_and_has_no_logarithm():
    net = Deep(3)
    variables = Example(np.zeros((2, 6, 6, 2), np.float32)).init(net, jax.random.key(0))
    variables["params"]["conv1"]["kernel"] *= 0
    value, log = flow_of(net, variables)
    assert value.total == 0
    assert log.total == -math.inf
    assert not log.finite


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=5
    ),
    st.integers(-500, 500),
)
def test_scaled_numbers_are_exact(values, exponent):
    array = jnp.asarray(values, jnp.float32)
    number = Scaled.of(array, exponent)
    mantissa, found = np.asarray(number.mantissa), int(number.exponent)
    for value, part in zip(np.asarray(array).tolist(), mantissa.tolist(), strict=True):
        if abs(value) > 1e-30 * max(map(abs, values)) or value == 0:
            assert math.ldexp(part, max(found, -2000)) == math.ldexp(value, exponent)


# --- SWAP's counting ---


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 31, 32, 33, 70]), st.sampled_from([1, 40]), st.integers(0, 100))
def test_patterns_are_counted(images, units, seed):
    few = np.random.default_rng(seed).normal(size=(images, max(units // 3, 1)))
    inputs = few[:, np.random.default_rng(seed).integers(0, few.shape[1], units)]
    expected = len({tuple(column) for column in (inputs > 0).T})
    assert _distinct(np.asarray(_patterns(jnp.asarray(inputs, jnp.float32)))) == expected


# --- what is found in a traced network ---


def traced(net, shape=(4, 6, 6, 4), **train):
    example = Example(jax.ShapeDtypeStruct(shape, jnp.float32), **train)
    return trace(trace_sites(net, example), shape[0])


class Rectified(nn.Module):
    """ReLUs written in many ways, and much that looks like one."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        found = [
            nn.relu(x),
            jax.nn.relu6(x),
            jnp.maximum(x, 0),
            jnp.maximum(0.0, x),
            jnp.clip(x, 0),
            jnp.maximum(x, jnp.zeros_like(x)),
            jax.jit(lambda v: jnp.maximum(v, 0))(x),
            jax.checkpoint(nn.relu)(x),
        ]
        not_relus = [nn.gelu(x), nn.softplus(x), nn.silu(x), jnp.maximum(x, 0.1), nn.tanh(x)]
        not_relus += [nn.LayerNorm(name="layer")(x), nn.GroupNorm(2, name="group")(x)]
        not_relus += [
            nn.BatchNorm(use_running_average=not train, name="batch")(x),
            jax.nn.softmax(x),
        ]
        not_relus += [nn.Dropout(0.5, deterministic=not train)(x)]
        scale = nn.relu(self.param("scale", nn.initializers.ones, (1, 1, 1, 4)))  # of no example
        total = sum(found) + sum(not_relus)
        return nn.Dense(3, name="head")((total * scale).mean(axis=(1, 2)))


def test_relus_however_they_are_called():
    """Normalisations clip their variance with a maximum of zero, and that is no unit."""
    assert len(traced(Rectified(), train=True).relus) == 8


def test_relus_of_positions_folded_into_the_batch():
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(nn.Dense(5, name="dense")(x.reshape(-1, x.shape[-1])))
            return nn.Dense(3, name="head")(y.reshape(*x.shape[:3], -1).mean(axis=(1, 2)))

    images = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype(np.float32)
    variables = Example(images).init(Folded(), jax.random.key(0))
    scorer = Scorer(Folded(), Example(images), [Naswot()], compiler_options=QUICK)
    dense = variables["params"]["dense"]
    bits = (np.asarray(images) @ np.asarray(dense["kernel"]) > 0).reshape(4, -1)
    kernel = (bits[:, None] == bits[None]).sum(axis=-1).astype(float)
    expected = np.linalg.slogdet(kernel)[1]
    assert scorer(variables, images)[Naswot()].total == pytest.approx(expected, rel=1e-12)


class Functional(nn.Module):
    """Kernels without layers: a convolution through `lax`, an einsum with the kernel first, a standardised one."""

    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.normal()
        first = self.param("first", draw, (3, 3, 4, 6))
        x = jax.lax.conv_general_dilated(
            x, first, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        second = self.param("second", draw, (5, 6))
        x = jnp.einsum("oi,bhwi->bhwo", second, x)
        third = self.param("third", draw, (5, 3))
        third = third - jnp.broadcast_to(third.mean(axis=0, keepdims=True), third.shape)
        return x.mean(axis=(1, 2)) @ third


def test_kernels_without_layers():
    network = traced(Functional())
    assert [k[-1] for k in network.kernels] == ["first", "second", "third"]
    assert list(network.named_kernels) == ["first", "second", "third"]
    assert [u.weights_per_feature for u in network.uses] == [36, 6, 5]
    for use, features in zip(network.uses, (6, 5, 3), strict=True):
        shape = use.output.aval.shape
        assert shape[use.batch_axis] == 4
        assert [shape[a] for a in use.feature_axes] == [features]


def test_lowered_convolutions_score_like_plain_ones():
    """`nnopt.layers.Conv` is another primitive, and the same function with the same kernel."""

    class Grouped(nn.Module):
        kind: type

        @nn.compact
        def __call__(self, x):
            x = nn.relu(self.kind(8, (3, 3), feature_group_count=4, padding=1, name="grouped")(x))
            x = nn.relu(
                self.kind(8, (3, 3), feature_group_count=8, strides=2, padding=1, name="depthwise")(
                    x
                )
            )
            return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))

    images = np.random.default_rng(0).normal(size=(4, 6, 6, 4)).astype(np.float32)
    labels = np.asarray([0, 1, 2, 2])
    variables = Example(images).init(Grouped(nn.Conv), jax.random.key(0))
    scores = [GradNorm(), Grasp(), LayerFisher(), SynFlow(), MeCo(), Naswot(), JacobCov()]
    plain, lowered = (
        Scorer(Grouped(kind), Example(images), scores, compiler_options=QUICK)(
            variables, images, labels
        )
        for kind in (nn.Conv, Conv)
    )
    for score in scores:
        assert list(lowered[score].sites) == list(plain[score].sites)
        same(lowered[score], plain[score])


class OwnDerivative(nn.Module):
    """A layer inside a function with a derivative rule of its own, and one that mixes the examples."""

    @nn.compact
    def __call__(self, x):
        @jax.custom_jvp
        def double(x, kernel):
            return 2 * x @ kernel

        @double.defjvp
        def _(primals, tangents):
            (x, kernel), (dx, dkernel) = primals, tangents
            return double(x, kernel), 2 * (dx @ kernel + x @ dkernel)

        draw = nn.initializers.normal()
        x = double(x.mean(axis=(1, 2)), self.param("own", draw, (4, 5)))
        return self.param("mixing", draw, (4, 4)) @ x


def test_kernels_out_of_sight_are_found_but_have_no_channels():
    images = np.random.default_rng(0).normal(size=(4, 6, 6, 4)).astype(np.float32)
    net, labels = OwnDerivative(), np.asarray([0, 1, 2, 4])
    value = Scorer(net, Example(images), [GradNorm()], compiler_options=QUICK)(
        Example(images).init(net, jax.random.key(0)), images, labels
    )
    assert set(value[GradNorm()].sites) == {"own", "mixing"}
    with pytest.raises(ScoreError, match="loop"):
        Scorer(net, Example(images), [LayerFisher()])

    class Mixing(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = self.param("mixing", nn.initializers.normal(), (4, 4)) @ x.mean(axis=(1, 2))
            return nn.Dense(3, name="head")(x)

    with pytest.raises(ScoreError, match="'mixing' adds up over the examples"):
        Scorer(Mixing(), Example(images), [LayerFisher()])


def test_gates_stand_after_the_bias():
    network = traced(Small(), (6, 5, 5, 2), train=True)
    with_bias = [u.path[-1] for u in network.uses if network.parameters.get((*u.path, "bias"))]
    assert with_bias == ["last", "down", "hidden", "head"]
    makers = {v: e.primitive.name for e in network.flat.equations for v in e.outputs}
    assert [makers[u.output] for u in network.uses] == ["conv_general_dilated"] * 2 + ["add"] * 4


def test_residual_additions_and_features():
    network = traced(WideResNet(10, 0.5, 3), (4, 16, 16, 3), train=True)
    assert len(network.residuals) == 3
    makers = {v: (e.primitive.name, e.path) for e in network.flat.equations for v in e.outputs}
    assert [makers[b] for b in network.residuals.values()] == [
        ("conv_general_dilated", (f"stage{i}_block0", "conv2")) for i in (1, 2, 3)
    ]
    assert network.features.aval.shape == (4, 4, 4, 32)
    assert [layer.path[-1] for layer in network.normalisations] == ["norm1", "norm2"] * 3 + ["norm"]
