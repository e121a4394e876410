"""What every score promises: any linen network, one program, values that repeat, and clear errors."""

import dataclasses
import functools
import math

import chex
import flax.linen as nn
import foreign_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from score_oracle import QUICK, Small, doubles, problem

from nnopt.core import Example, rewrite
from nnopt.errors import ScoreError, SelectionError, UnsupportedNetworkError
from nnopt.networks import VGG, DenseNet, InvertedResidual, WideResNet
from nnopt.rewrites import Genotype, choice
from nnopt.scores import (
    EpeNas,
    Fisher,
    GradNorm,
    Grasp,
    JacobCov,
    L2Norm,
    LayerFisher,
    LogSum,
    Macs,
    MeCo,
    Naswot,
    NtkCondition,
    Parameters,
    Plain,
    RelativeTo,
    Scorer,
    ScoreValue,
    Snip,
    Swap,
    SynFlow,
    Zen,
    Zico,
    mean_cross_entropy,
)

BATCH, CLASSES = 4, 5
EVERY = (
    GradNorm(), Snip(), Plain(), Grasp(), L2Norm(), LayerFisher(), Fisher(), Zico(), JacobCov(), EpeNas(), Naswot(), Swap(), MeCo(),
    SynFlow(), SynFlow(log=True), Zen(), NtkCondition(), Parameters(), Macs(),
)  # fmt: skip
QUICK_TO_COMPILE = tuple({type(s) for s in EVERY} - {Grasp, Zico, Zen, NtkCondition})
ADDITIVE = (
    GradNorm,
    Snip,
    Plain,
    Grasp,
    L2Norm,
    LayerFisher,
    Fisher,
    Zico,
    EpeNas,
    MeCo,
    Zen,
    Parameters,
    Macs,
)
WITHOUT_DATA = (L2Norm(), SynFlow(), SynFlow(log=True), Parameters(), Macs())
WITHOUT_LABELS = (*WITHOUT_DATA, JacobCov(), Naswot(), Swap(), MeCo(), Zen(), NtkCondition())


class Mobile(nn.Module):
    """Two inverted residuals: depthwise convolutions, relu6, a linear bottleneck."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = InvertedResidual(8, 2, name="block0")(x, train)
        x = nn.relu6(InvertedResidual(8, 2, stride=2, name="block1")(x, train))
        return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)))


class Mlp(nn.Module):
    """No convolution, no normalisation, no flag."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES, name="head")(x)


class Attention(nn.Module):
    """Patches, one transformer layer with ReLU and dropout, kernels with many axes."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.Conv(8, (4, 4), strides=4, name="patches")(x).reshape(x.shape[0], -1, 8)
        y = nn.LayerNorm(name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
        x = x + nn.Dropout(0.1, deterministic=deterministic, name="drop")(y)
        y = nn.relu(nn.Dense(16, name="wide")(nn.LayerNorm(name="norm2")(x)))
        x = x + nn.Dense(8, name="narrow")(y)
        return nn.Dense(CLASSES, name="head")(x.mean(axis=1))


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, how it is called in training, and the scores that are not defined for it."""

    net: nn.Module
    train: tuple[tuple[str, object], ...] = (("train", True),)
    without: tuple[type, ...] = ()
    heavy: tuple[type, ...] = (
        Grasp,
        Zico,
        Zen,
        NtkCondition,
    )  # not every one on every network: they take long to compile


CASES = {
    "wrn": Case(WideResNet(10, 0.25, CLASSES), heavy=(Zen,)),
    "densenet": Case(DenseNet(10, 4, num_classes=CLASSES), without=(Fisher,), heavy=()),
    "vgg": Case(
        VGG((1, 1), (8, 8), CLASSES, hidden=(6,), dropout=0.5), without=(Fisher,), heavy=(Zico,)
    ),
    "mobilenet": Case(Mobile(), heavy=(Zen, NtkCondition)),
    "mlp": Case(Mlp(), (), (Fisher, MeCo)),
    "attention": Case(Attention(), (("deterministic", False),), (Fisher,)),
}


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(BATCH, 8, 8, 3)).astype(np.float32), np.asarray([0, 4, 2, 2])


def initialised(net, images, seed=0):
    return Example(jnp.zeros_like(images[:1])).init(net, jax.random.key(seed))


def scorer_of(net, scores, images=None, loss=mean_cross_entropy, **train):
    images = batch()[0] if images is None else images
    return Scorer(net, Example(images, **train), scores, loss=loss, compiler_options=QUICK)


@functools.cache
def made(name):
    """A scorer of every score that is defined, variables, and its values on the minibatch."""
    case = CASES[name]
    images, labels = batch()
    scores = [
        s
        for s in EVERY
        if not isinstance(s, case.without) and isinstance(s, (*case.heavy, *QUICK_TO_COMPILE))
    ]
    with pytest.MonkeyPatch.context() as patch:
        chex.clear_trace_counter()
        # Python code that runs a second time is a second trace.
        once = chex.assert_max_traces(Scorer._reduce_all, n=1)
        patch.setattr(Scorer, "_reduce_all", lambda *args: once(*args))
        scorer = scorer_of(case.net, scores, **dict(case.train))
        variables = initialised(case.net, images)
        values = scorer(variables, images, labels)
        other = jax.tree.map(lambda v: v + 1, variables)
        scorer(other, images + 1, labels[::-1], jax.random.key(3))
    return scorer, variables, values


# --- every score, on every network ---


@pytest.mark.parametrize("name", CASES)
def test_scores_are_finite_and_repeat(name):
    scorer, variables, values = made(name)
    assert list(values) == list(scorer.scores)
    assert all(isinstance(v, ScoreValue) and isinstance(v.total, float) for v in values.values())
    not_finite = [s for s, v in values.items() if not v.finite]
    assert not not_finite
    again = scorer(variables, *batch())
    assert again == values
    assert all(again[s].sites == v.sites for s, v in values.items())


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_traced_again(name):
    scorer, *_ = made(name)
    programs = [scorer._program, *scorer._repeated.values()]
    assert all(program._cache_size() == 1 for program in programs)


@pytest.mark.parametrize("name", CASES)
def test_sites_add_up(name):
    scorer, _, values = made(name)
    for score, value in values.items():
        if isinstance(score, ADDITIVE):
            assert value.sites
            assert value.total == pytest.approx(sum(value.sites.values()), rel=1e-12)
    order = [scorer.network.order[site] for site in values[Parameters()].sites]
    assert order == sorted(order)


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_convolutions_and_products(name):
    _, variables, values = made(name)
    kernels = jax.tree_util.tree_leaves_with_path(variables["params"])
    named = [p for p, _ in kernels if p[-1].key == "kernel"]
    assert len(values[L2Norm()].sites) == len(named) == len(values[Macs()].sites) - extra(name)
    assert len(values[LayerFisher()].sites) == len(named)


def extra(name):
    """Sites that multiply data with data."""
    return {"attention": 1}.get(name, 0)


@pytest.mark.parametrize("name", CASES)
def test_scores_that_need_no_data(name):
    case = CASES[name]
    _, variables, values = made(name)
    scorer = scorer_of(case.net, WITHOUT_DATA, **dict(case.train))
    alone = scorer(variables)
    for score in WITHOUT_DATA:
        assert alone[score].total == pytest.approx(values[score].total, rel=1e-5)
    with pytest.raises(ScoreError, match="looks at images; give float32"):
        scorer_of(case.net, [Naswot()], **dict(case.train))(variables)


def test_scores_that_need_no_labels():
    scorer = scorer_of(Small(), WITHOUT_LABELS, batch()[0][:, :5, :5, :2], train=True)
    images = batch()[0][:, :5, :5, :2]
    values = scorer(initialised(Small(), images), images)
    assert all(v.finite for v in values.values())
    for score in (GradNorm(), EpeNas(), Zico()):
        with pytest.raises(ScoreError, match=r"looks at labels; give integer classes \[4\]"):
            scorer_of(Small(), [score], images, train=True)(initialised(Small(), images), images)


def test_rewritten_network():
    images, labels = batch()
    net = WideResNet(10, 0.5, CLASSES)
    units = Genotype(tuple(map(choice, ("G(4)", "BG(2,2)", "G(N)"))))
    rewritten = rewrite(net, units, example=images)
    scores = [LayerFisher(), Fisher(), SynFlow()]
    scorer = scorer_of(rewritten, scores, train=True)
    values = scorer(initialised(rewritten, images), images, labels)
    assert all(v.finite for v in values.values())
    sites = set(values[LayerFisher()].sites)
    assert {"stage1_block0/op1/spatial", "stage2_block0/op1/expand"} <= sites
    assert sites == set(values[SynFlow()].sites)


def test_float64_stays_float64():
    _, variables, images, labels = problem()
    with doubles():
        exact = jax.tree.map(jnp.asarray, variables)
        scorer = Scorer(
            Small(),
            Example(jnp.asarray(images), train=True),
            [Snip(), L2Norm()],
            compiler_options=QUICK,
        )
        text = scorer._program.lower(
            exact, jnp.asarray(images), labels, jax.random.key(0), []
        ).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    assert not [line for line in convolutions if "f32" in line]


def test_bfloat16():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), dtype=jnp.bfloat16, name="conv")(x))
            return nn.Dense(CLASSES, name="head")(x.mean(axis=(1, 2)).astype(jnp.float32))

    images, labels = batch()
    scores = [GradNorm(), Grasp(), SynFlow(), LayerFisher(), Naswot(), MeCo(), Zico(), JacobCov()]
    values = scorer_of(Half(), scores)(initialised(Half(), images), images, labels)
    assert all(v.finite for v in values.values())
    exact = scorer_of(Half().clone(), [SynFlow()])(initialised(Half(), images))
    assert values[SynFlow()] == exact[SynFlow()]


# --- foreign networks ---


def token_loss(outputs, labels):
    flat = outputs.reshape(-1, outputs.shape[-1])
    return mean_cross_entropy(flat, labels.reshape(-1))


def test_transformer_of_tokens():
    net = foreign_networks.Transformer()
    tokens = np.asarray([[1, 2, 3, 4, 5], [5, 0, 7, 7, 10]], np.int32)
    scores = [GradNorm(), LayerFisher(), SynFlow(), NtkCondition(), Parameters(), Macs()]
    scorer = scorer_of(net, scores, tokens, token_loss, deterministic=False)
    values = scorer(initialised(net, tokens), tokens, tokens)
    assert all(v.finite for v in values.values())
    assert "layer0/MultiHeadDotProductAttention_0/query" in values[GradNorm()].sites
    assert len(values[GradNorm()].sites) == 2 * 6 + 1
    for score, said in (
        (JacobCov(), "int32 inputs"),
        (Zen(), "int32 inputs"),
        (Naswot(), "no ReLU"),
    ):
        with pytest.raises(ScoreError, match=said):
            scorer_of(net, [score], tokens, token_loss)
    with pytest.raises(ScoreError, match="cross-entropy is of logits"):
        scorer_of(net, [GradNorm()], tokens)(initialised(net, tokens), tokens, tokens)


def test_tied_weights_count_once():
    net = foreign_networks.TiedAttend()
    tokens = np.asarray([[1, 2, 3], [4, 5, 6]], np.int32)
    variables = initialised(net, tokens)
    value = scorer_of(net, [L2Norm()], tokens)(variables)[L2Norm()]
    kernel = variables["params"]["Dense_0"]["kernel"]
    expected = {"embed": variables["params"]["embed"]["embedding"], "Dense_0": kernel}
    assert value.sites == pytest.approx({k: float(jnp.linalg.norm(v)) for k, v in expected.items()})


def test_shared_layer_adds_up_its_calls():
    net = foreign_networks.SharedTwice()
    inputs = np.asarray(np.random.default_rng(0).normal(size=(4, 6)), np.float32)
    labels = np.asarray([0, 5, 1, 1])
    scorer = scorer_of(net, [LayerFisher(), GradNorm(), Naswot()], inputs)
    values = scorer(initialised(net, inputs), inputs, labels)
    assert len(scorer.network.uses) == 2
    assert list(values[LayerFisher()].sites) == list(values[GradNorm()].sites) == ["layer"]


def test_layers_under_scan():
    """Their kernels are found; scores that look between layers refuse."""
    net = foreign_networks.Scanned()
    inputs = np.asarray(np.random.default_rng(0).normal(size=(4, 6)), np.float32)
    variables = initialised(net, inputs)
    value = scorer_of(net, [GradNorm(), SynFlow()], inputs)(
        variables, inputs, np.asarray([0, 1, 2, 0])
    )
    assert set(value[GradNorm()].sites) == {"layers/mlp/hidden", "layers/mlp/out", "head"}
    for score in (LayerFisher(), Naswot(), Swap()):
        with pytest.raises(ScoreError, match=r"'layers/mlp/\w+' runs inside a loop \(nn.scan\)"):
            scorer_of(net, [score], inputs)


# --- what is refused ---


@pytest.mark.parametrize("score", [JacobCov(), EpeNas(), Naswot(), Swap(), NtkCondition(), Zico()])
def test_one_image_is_too_few(score):
    with pytest.raises(ScoreError, match=r"minibatch and got 1|got 1 images"):
        scorer_of(Small(), [score], np.zeros((1, 5, 5, 2), np.float32), train=True)


@pytest.mark.parametrize(
    ("net", "score", "error", "said"),
    [
        (foreign_networks.Encoder(), Naswot(), ScoreError, "no ReLU"),
        (Mlp(), MeCo(), ScoreError, "Mlp has no convolution"),
        (Mlp(), Fisher(), SelectionError, "Mlp has no module that adds"),
        (Small(), Fisher(where="stem"), SelectionError, "'stem' adds no branch"),
        (Small(), Zico(4), ScoreError, "got 6 images; give a multiple of 4, 8 or more"),
        (
            Small(),
            Zico(6),
            ScoreError,
            "which ZiCo reads, .* got 6 images; give a multiple of 6, 12 or more",
        ),
        (Small(), Zico(1), ScoreError, "got 6 images; give two or more parts"),
    ],
)
def test_networks_without_what_is_scored(net, score, error, said):
    shape = (6, 5, 8) if isinstance(net, foreign_networks.Encoder) else (6, 5, 5, 2)
    train = {"deterministic": True} if isinstance(net, foreign_networks.Encoder) else {}
    train = {"train": True} if isinstance(net, Small) else train
    with pytest.raises(error, match=said) as caught:
        scorer_of(net, [score], np.zeros(shape, np.float32), **train)
    assert "\n" not in str(caught.value)


def test_classes_of_one_image():
    """They correlate with nobody: they add one constant, exactly, and alone say nothing of a network."""
    rows = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    for factor in (1, 1e-20, 3e7):
        found = EpeNas().value({"rows": rows * factor, "labels": np.asarray([3, 0, 3, 7, 4])}, None)
        alone = [found.sites[f"class {c}"] for c in (0, 4, 7)]
        assert alone == [abs(math.log(1 + 1e-5))] * 3
        assert found.sites["class 3"] > 1
    with pytest.raises(
        ScoreError, match="each of the 5 images is alone in its class; give a larger"
    ):
        EpeNas().value({"rows": rows, "labels": np.arange(5)}, None)
    rows[1] = 1.0  # constant: it has no correlations, not even with itself
    found = EpeNas().value({"rows": rows, "labels": np.asarray([3, 0, 3, 7, 4])}, None)
    assert math.isnan(found.sites["class 0"])


class NoKernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.mean(axis=(1, 2)) * self.param("scale", nn.initializers.ones, (1, 3))


@pytest.mark.parametrize(
    "score",
    [
        GradNorm(),
        Snip(),
        Grasp(),
        L2Norm(),
        SynFlow(),
        LayerFisher(),
        Zico(),
        NtkCondition(),
        Zen(),
    ],
)
def test_networks_without_kernels(score):
    with pytest.raises(ScoreError, match="NoKernel has no convolution or matrix product"):
        scorer_of(NoKernel(), [score])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 2, 5], "labels go from 0 to 5, and the network has 5 classes"),
        ([0, -1, 2, 4], "labels go from -1 to 4"),
        ([0, 1, 2], r"labels are int64\[3\]; give integer classes \[4\]"),
        ([0.0, 1.0, 2.0, 3.0], r"float64\[4\]"),
        ([[0], [1], [2], [3]], r"int64\[4,1\]"),
    ],
)
def test_labels_that_do_not_fit(labels, said):
    images, _ = batch()
    with pytest.raises(ScoreError, match=said):
        scorer_of(Mlp(), [GradNorm()])(initialised(Mlp(), images), images, np.asarray(labels))


def test_images_of_another_shape():
    images, labels = batch()
    scorer = scorer_of(Mlp(), [GradNorm()])
    with pytest.raises(
        ScoreError, match=r"images are float32\[3,8,8,3\], and .* float32\[4,8,8,3\]"
    ):
        scorer(initialised(Mlp(), images), images[:3], labels[:3])


def test_other_refusals():
    with pytest.raises(ScoreError, match="give at least one"):
        scorer_of(Mlp(), [])
    with pytest.raises(UnsupportedNetworkError, match="mask"):
        Scorer(Mlp(), Example(batch()[0], mask=jnp.ones(4)), [GradNorm()])


# --- values that are not finite ---


def test_what_is_not_finite_is_kept_and_counted():
    images, labels = batch()
    variables = initialised(Mlp(), images)
    poisoned = jax.tree.map(lambda v: v.at[0].set(jnp.nan), variables)
    scores = [s for s in EVERY if not isinstance(s, (Fisher, MeCo, Zen, Parameters, Macs))]
    scorer = scorer_of(Mlp(), scores)
    for times in (1, 2):
        values = scorer(poisoned, images, labels)
        for score in scores:
            assert math.isnan(values[score].total), score
            assert not values[score].finite
            assert scorer.not_finite[score] == times
    assert all(v.finite for v in scorer(variables, images, labels).values())
    assert scorer.not_finite[GradNorm()] == 2


def test_not_a_number_in_a_feature_map():
    images, _ = batch()
    value = scorer_of(Mobile(), [MeCo()], train=True)(
        initialised(Mobile(), images), np.full_like(images, np.nan)
    )
    assert math.isnan(value[MeCo()].total)


def test_two_equal_images_have_no_determinant():
    images, labels = batch()
    twice = np.concatenate([images[:2], images[:2]])
    values = scorer_of(Mlp(), [Naswot(), NtkCondition()])(initialised(Mlp(), images), twice, labels)
    assert values[Naswot()].total == values[NtkCondition()].total == -math.inf
    assert not values[Naswot()].finite


def test_a_dead_block_has_no_logarithm():
    net, (images, labels) = CASES["wrn"].net, batch()
    variables = initialised(net, images)
    variables["params"]["stage2_block0"]["conv2"]["kernel"] *= 0
    units = {f"stage{i}_block0": 0.5 * i for i in (1, 2, 3)}
    relative = Fisher(RelativeTo.of(units))
    values = scorer_of(net, [Fisher(), Fisher(LogSum()), relative, Zico()], train=True)(
        variables, images, labels
    )
    wanted = {block: part / units[block] for block, part in values[Fisher()].sites.items()}
    assert values[relative].sites == pytest.approx(wanted, rel=1e-12)
    assert values[relative].total == pytest.approx(sum(wanted.values()), rel=1e-12)
    assert values[Fisher()].finite
    assert values[Fisher()].sites["stage2_block0"] == 0
    assert values[Fisher(LogSum())].total == -math.inf
    assert values[Fisher(LogSum())].sites["stage2_block0"] == -math.inf
    # The paper's code leaves out a layer whose gradients are all zero.
    assert "stage2_block0/conv1" not in values[Zico()].sites
    assert values[Zico()].finite


def test_a_reference_that_is_none():
    with pytest.raises(ScoreError, match=r"'block' of the reference has the potential 0\.0"):
        RelativeTo.of({"block": 0.0})
    with pytest.raises(ScoreError, match="the reference has no block 'b'; it has a, c"):
        RelativeTo.of({"a": 1.0, "c": 2.0})("b", np.ones(3))


def test_a_score_prints_and_hashes():
    assert repr(Zico(4)) == "Zico(parts=4)"
    assert Fisher(LogSum()) == Fisher(LogSum()) != Fisher()
    assert len({*EVERY, *EVERY}) == len(EVERY)
    assert "sites" not in repr(ScoreValue(1.0, {"a": 1.0}))
