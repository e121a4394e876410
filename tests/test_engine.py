import gc
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.core import At, Example, fingerprint, sites
from nnopt.core.rewrite import rewrite_traced
from nnopt.errors import ScoreError, SelectionError, UnsupportedNetworkError
from nnopt.layers import Conv
from nnopt.nests import Bottleneck, Group, Program
from nnopt.networks import InvertedResidual, ResNet, WideResNet
from nnopt.rewrites import CODE_CHOICES, MutateConv, choice
from nnopt.rewrites.block import block_for
from nnopt.scores.cut_out import Stand
from nnopt.scores.engine import KEYS_KEPT, Engine
from nnopt.scores.fisher import FisherPotential, mean_cross_entropy
from nnopt.scores.fisher_engine import FisherEngine
from nnopt.scores.looks import LookForFisherPotential
from nnopt.scores.programs import ProgramCache
from nnopt.scores.units import Initialiser
from nnopt.search.space import block_space

KEY = jax.random.key(11)


def batch_of(size=4, side=8, dtype=jnp.float32):
    """Images and labels."""
    # Drawn in single precision: numbers of twice the bits are others.
    images = jax.random.normal(jax.random.key(1), (size, side, side, 3), jnp.float32)
    return images.astype(dtype), jnp.arange(size, dtype=jnp.int32) % 10


def engine_for(net, images, **options):
    example = Example(images, train=True)
    return Engine(net, example, LookForFisherPotential(), loss=mean_cross_entropy, **options)


def plainly(net, edits, images, labels, key=KEY):
    """Fisher potential of the whole network, compiled as one program, its convolutions as XLA has them."""
    example = Example(images, train=True)
    whole = rewrite_traced(sites(net, example), Stand(tuple(edits.items()))) if edits else net
    # The same draws to the last bit, which are those of `init` but for rounding (tested below).
    initialise = Initialiser(whole, example, ())
    leaves = initialise(key, ProgramCache(), ())
    variables = jax.tree.unflatten(jax.tree.structure(initialise.variables), leaves)
    native = Conv.conv_general_dilated
    Conv.conv_general_dilated = None
    try:
        options = {"xla_backend_optimization_level": 0}
        score = FisherPotential(whole, example, compiler_options=options)
        return score(variables, images, labels, jax.random.fold_in(key, 2))
    finally:
        Conv.conv_general_dilated = native


def modules_of(net, images, choices=CODE_CHOICES):
    """Path of each block -> modules of each choice that is possible there."""
    space = block_space(net, images[:1], choices)
    traced = sites(net, images[:1])
    return {
        path: [block_for(traced[path], traced, c) for c in here]
        for path, here in zip(space.paths, space.choices, strict=True)
    }


def assert_same(found, wanted, tolerance):
    assert list(found.blocks) == list(wanted.blocks)
    for block, channels in wanted.channels.items():
        np.testing.assert_allclose(found.blocks[block], wanted.blocks[block], rtol=tolerance)
        # Single channels may cancel to nothing: they are held to the size of the block.
        scale = np.abs(channels).max()
        np.testing.assert_allclose(
            found.channels[block], channels, rtol=tolerance, atol=tolerance * scale
        )


# --- the engine computes what a whole network computes ---


def test_every_choice_at_every_position_in_double_precision():
    """23 networks, in each of which the three blocks differ; 69 pairs of position and choice in all."""
    net = WideResNet(10, 1.0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images, labels = batch_of(dtype=jnp.float64)
        modules = modules_of(net, images)
        engine = engine_for(net, images)
        for number in range(max(map(len, modules.values()))):
            edits = {p: m[(number + 7 * i) % len(m)] for i, (p, m) in enumerate(modules.items())}
            found = engine.score(engine.candidate(edits), images, labels, KEY)
            assert_same(found, plainly(net, edits, images, labels), 1e-9)
    assert engine.statistics.units >= len({fingerprint(m) for ms in modules.values() for m in ms})


class PostActivation(nn.Module):
    """A block as somebody else may write it: bias, its own normalisation, a projection that is normalised too."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.features, (3, 3), self.stride, name="first")(x)
        y = nn.relu(nn.BatchNorm(not train, name="norm")(y))
        y = nn.Conv(self.features, (3, 3), feature_group_count=2, name="last")(y)
        if x.shape != y.shape:
            x = nn.GroupNorm(2, name="own")(
                nn.Conv(self.features, (1, 1), self.stride, name="side")(x)
            )
        return nn.relu(x + nn.silu(y))


class Foreign(nn.Module):
    """Residual blocks in a row, one dense concatenation around them, dropout, pooling."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        before = x
        for i, features in enumerate((8, 12, 12)):
            x = PostActivation(features, 1 + (i == 1), name=f"block{i}")(x, train)
            if i == 0:
                x = jnp.concatenate([x, before], -1)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=True)(x)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Branch(nn.Module):
    """Two convolutions, dropout between them, and no addition."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Conv(8, (3, 3), name="first")(x)))
        return nn.Conv(8, (3, 3), name="last")(y)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x + Branch(name="branch")(x, train)


class AddsItself(nn.Module):
    """Residual blocks, and between them an addition in the network itself, which is no block."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Residual(name="block0")(nn.Conv(8, (3, 3), name="stem")(x), train)
        x = x + Branch(name="middle")(x, train)
        x = Residual(name="block1")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class One(nn.Module):
    """A single residual block."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Residual(name="block")(nn.Conv(8, (1, 1), name="stem")(x), train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Mobile(nn.Module):
    """Inverted residuals, one with a stride and no shortcut."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i, stride in enumerate((1, 2, 1)):
            x = InvertedResidual(8, 2, stride, name=f"block{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


THREE = (("block0",), ("block1",), ("block2",))
OTHERS = {
    "foreign": (Foreign(), THREE),
    "dropout, additions outside of blocks": (AddsItself(), (("block0",), ("block1",))),
    "inverted residuals": (Mobile(), (THREE[0], THREE[2])),
    "resnet": (ResNet((2, 1), widths=(8, 12), stem_features=8), None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name):
    net, blocks = OTHERS[name]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images, labels = batch_of(dtype=jnp.float64)
        engine = engine_for(net, images)
        assert blocks is None or engine.units == blocks
        found = engine.score(engine.candidate(), images, labels, KEY)
        assert_same(found, plainly(net, {}, images, labels), 1e-9)


def test_operators_that_a_program_made():
    net = WideResNet(10, 1.0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images, labels = batch_of(dtype=jnp.float64)
        rule = MutateConv("*/*conv2", Program((Group("co", "ci", 2), Bottleneck("oh", 2))))
        edits = dict(rule(sites(net, Example(images, train=True))))
        assert len(edits) == 3
        engine = engine_for(net, images)
        found = engine.score(engine.candidate(edits), images, labels, KEY)
        assert_same(found, plainly(net, edits, images, labels), 1e-9)


def test_as_a_whole_dropout_draws_what_it_draws_in_the_engine():
    images, labels = batch_of(side=4)
    scorer = FisherEngine(One(), Example(images, train=True))
    found = scorer({}, images, labels, KEY)
    assert_same(found, scorer._whole({}, images, labels, KEY), 1e-4)


def test_edits_below_units_and_outside_of_them():
    """An operator rewritten inside of a block, a block replaced, and the stem."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images, labels = batch_of(dtype=jnp.float64)
        net = Foreign()
        engine = engine_for(net, images)
        edits = {
            ("block0", "first"): nn.Conv(8, (5, 5), feature_group_count=4, parent=None),
            ("block2",): PostActivation(12, parent=None),
            ("block2", "last"): Conv(12, (3, 3), feature_group_count=12, parent=None),
            ("stem",): nn.Conv(8, (1, 1), parent=None),
        }
        found = engine.score(engine.candidate(edits), images, labels, KEY)
        below = {
            p: m for p, m in edits.items() if p != ("block2",)
        }  # it is what stands there anyway
        assert_same(found, plainly(net, below, images, labels), 1e-9)
        assert engine.statistics.skeletons == 1


def test_single_precision_is_as_near_to_double_as_rounding_lets_it():
    """8 networks, both by the engine, whose double precision is tested above.

    Most blocks are within rounding; where rounding turns a ReLU on or off, a block moves more.
    `experiments/scores/precision.py` has the errors of larger networks.
    """
    net = WideResNet(10, 1.0)
    modules = modules_of(net, batch_of()[0])
    rng = np.random.default_rng(0)
    drawn = [{p: m[rng.integers(len(m))] for p, m in modules.items()} for _ in range(8)]

    def scores(dtype):
        images, labels = batch_of(8, 32, dtype)
        engine = engine_for(net, images)
        return [engine.score(engine.candidate(e), images, labels, KEY) for e in drawn]

    single = scores(jnp.float32)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double = scores(jnp.float64)
    errors = np.array(
        [
            abs(a.blocks[block] / b.blocks[block] - 1)
            for a, b in zip(single, double, strict=True)
            for block in b.blocks
        ]
    )
    assert np.median(errors) < 1e-6
    assert errors.max() < 1e-2


# --- nothing is traced or compiled in steady state ---


class Events:
    """Counts what JAX traces, lowers and compiles while it is on."""

    def __init__(self):
        self.on, self.seen = False, []
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event, duration, **kwargs):
        if self.on and event.startswith("/jax/core/compile/"):
            self.seen.append(event)


def test_steady_state():
    net = WideResNet(10, 1.0)
    images, labels = batch_of()
    modules = modules_of(net, images, [choice("S"), choice("G(4)"), choice("B(2)")])
    engine = engine_for(net, images)
    every = [{p: m[i] for p, m in modules.items()} for i in range(3)]
    told = []
    engine.prepare(every, worker=1, workers=2, on_progress=lambda *t: told.append(t))
    compiled = engine.statistics.compiled
    assert told == [(i + 1, compiled) for i in range(compiled)]
    assert compiled == engine.statistics.programs > 20
    for edits in every:
        engine.score(engine.candidate(edits), images, labels, KEY)
    assert engine.statistics.compiled == compiled

    events = Events()
    events.on = True
    jax.jit(lambda x: x * 3.0)(images)
    assert events.seen  # the listener hears
    events.seen.clear()
    # Networks that nobody has seen, of units that were.
    mixed = [{p: m[(i + k) % 3] for k, (p, m) in enumerate(modules.items())} for i in range(3)]
    scores = [engine.score(engine.candidate(edits), images, labels, KEY) for edits in mixed]
    events.on = False
    assert not events.seen
    assert len({s.total for s in scores}) == 3
    assert engine.statistics.compiled == engine.statistics.programs == compiled
    assert engine.statistics.evaluations == 6


def test_equal_pieces_share_programs():
    """Two equal blocks in a row need one block's programs; what stands in the first has no reverse pass of its own to the input."""
    images, _ = batch_of()
    two = engine_for(WideResNet(16, 1.0), images)
    two.prepare([{}])
    three = engine_for(WideResNet(22, 1.0), images)
    three.prepare([{}])
    assert three.statistics.programs == two.statistics.programs


def test_the_same_unit_has_the_same_weights_in_every_candidate():
    """The last block's score changes with what stands before it; the first block's forward pass does not: its own score moves only
    through the gradient. Seen from scratch, in an engine of its own, a candidate has the same score."""
    net = WideResNet(10, 1.0)
    images, labels = batch_of()
    modules = modules_of(net, images, [choice("S"), choice("G(4)")])
    mixed = {p: m[i % 2] for i, (p, m) in enumerate(modules.items())}
    engine = engine_for(net, images)
    engine.score(engine.candidate(), images, labels, KEY)
    found = engine.score(engine.candidate(mixed), images, labels, KEY)
    fresh = engine_for(net, images)
    again = fresh.score(fresh.candidate(mixed), images, labels, KEY)
    assert found == again
    other = engine.score(engine.candidate(mixed), images, labels, jax.random.key(12))
    assert other.total != found.total


# --- weights ---


@pytest.mark.parametrize("net", [WideResNet(10, 1.0), Foreign()], ids=["wrn", "foreign"])
def test_weights_are_those_of_init(net):
    example = Example(batch_of(2)[0], train=True)
    initialise = Initialiser(net, example, ())
    assert initialise.anywhere
    cache = ProgramCache()
    found = initialise(KEY, cache, ())
    wanted = jax.tree.leaves(example.init(net, KEY))
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)
    # One program for each size, not for each shape.
    assert cache.statistics.programs < len({a.shape for a in wanted})


class Odd(nn.Module):
    """Draws its weights in ways that no table of initialisers knows."""

    @nn.compact
    def __call__(self, x):
        rotation = self.param("rotation", nn.initializers.orthogonal(), (3, 3))
        split = self.param("split", lambda key: jax.random.normal(jax.random.split(key)[0], (3,)))
        return x @ rotation + split[None]


def test_weights_drawn_in_other_ways():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Odd(name="odd")(x)

    example = Example(jnp.zeros((2, 3)))
    wanted = jax.tree.leaves(example.init(Outer(), KEY))
    inner = Initialiser(Odd(), example, ("odd",))
    assert not inner.anywhere  # it splits a key: only the path it was made for is sure
    for a, b in zip(inner(KEY, ProgramCache(), ("odd",)), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- several candidates at once ---


def drawn_from(net, images, count):
    modules = modules_of(net, images, [choice("S"), choice("G(4)"), choice("B(2)")])
    rng = np.random.default_rng(1)
    return [{p: m[rng.integers(3)] for p, m in modules.items()} for _ in range(count)]


@pytest.mark.parametrize(("lanes", "ahead"), [(4, 0), (1, 2)])
def test_side_by_side_and_in_flight(lanes, ahead):
    net = WideResNet(10, 1.0)
    images, labels = batch_of()
    candidates = drawn_from(net, images, 6)  # a row of four, and one that is not full
    scorer = FisherEngine(net, Example(images, train=True))
    batches = [(images, labels, KEY), (images[::-1], labels, jax.random.key(12))]
    alone = [[scorer(edits, *batch) for batch in batches] for edits in candidates]
    found = list(scorer.stream(candidates, batches, lanes=lanes, ahead=ahead))
    for a, b in zip(found, alone, strict=True):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other, 1e-4)


def test_weights_of_few_keys_are_kept():
    """As many as there are minibatches: those that come round again are not drawn again."""
    images, labels = batch_of(side=4)
    scorer = FisherEngine(One(), Example(images, train=True))
    (engine,) = scorer.engines
    bound = []
    for number in range(KEYS_KEPT + 3):
        scorer({}, images, labels, jax.random.key(number))
        bound.append(len(engine.kept))
    assert bound == [*range(1, KEYS_KEPT), *[KEYS_KEPT] * 4]
    with pytest.MonkeyPatch.context() as patch:
        drawn = []
        draw = Initialiser.__call__
        patch.setattr(Initialiser, "__call__", lambda *a: drawn.append(1) or draw(*a))
        batches = [(images, labels, jax.random.key(n)) for n in range(KEYS_KEPT + 1)]
        (first,) = scorer.stream([{}], batches)
        once = len(drawn)
        again = list(scorer.stream([{}] * 2, batches))
        assert len(drawn) == once > 0
    assert again == [first, first]
    assert len(engine.kept) == len(batches)

    # Weights of its own for each candidate, the same whenever it is scored again.
    own = [
        [s.total for s in scores]
        for scores in scorer.stream([{}] * 3, batches[:1], independent=True)
    ]
    assert len({total for (total,) in own}) == 3
    key = jax.random.fold_in(batches[0][2], 2)
    assert own[2] == [scorer({}, images, labels, key).total]
    assert len(engine.kept) == KEYS_KEPT + 1
    with pytest.raises(ScoreError, match="4 candidates side by side share their weights"):
        list(scorer.stream([{}], batches, lanes=4, independent=True))


DEVICES = """
import sys; sys.path.insert(0, {tests!r})
from test_engine import *
net = WideResNet(10, 1.0)
images, labels = batch_of()
candidates = drawn_from(net, images, 5)
devices = jax.local_devices()
assert len(devices) == 2
scorer = FisherEngine(net, Example(images, train=True), devices=devices)
one = [s[0].total for s in scorer.stream(candidates[:1] * 5, [(images, labels, KEY)], ahead=1)]
assert len(set(one)) == 1, one
both = [s[0].total for s in scorer.stream(candidates, [(images, labels, KEY)], ahead=1)]
assert both == [scorer(edits, images, labels, KEY).total for edits in candidates]
assert [e.statistics.evaluations for e in scorer.engines] == [3 + 3 + 5, 2 + 2]
"""


def test_two_devices():
    env = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
    }
    code = DEVICES.format(tests=str(pathlib.Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


# --- what cannot be cut ---


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = PostActivation(8, name="block")(x, train)
        twice = PostActivation(8, name="shared")
        return nn.Dense(10, name="head")(twice(twice(x, train), train).mean((1, 2)))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("shared", "is called 2 times"),
        (At(("block", "block/first")), "lie inside one another"),
        ("nothing*", "no module matches"),
    ],
)
def test_units_that_cannot_be_cut_out(where, said):
    with pytest.raises(SelectionError, match=said):
        engine_for(Scanned(), batch_of()[0], where=where)


def test_a_loss_that_does_not_see_a_block():
    class Deaf(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(8, (3, 3), name="stem")(x)
            PostActivation(8, name="lost")(x, train)
            x = PostActivation(8, name="block")(x, train)
            return nn.Dense(10, name="head")(x.mean((1, 2)))

    engine = engine_for(Deaf(), batch_of()[0], where=At(("lost", "block")))
    with pytest.raises(UnsupportedNetworkError, match="does not depend on 'lost'"):
        engine.candidate()


def test_networks_that_cannot_be_cut_are_scored_as_a_whole():
    images, labels = batch_of()
    with pytest.warns(UserWarning, match="scored as a whole"):
        scorer = FisherEngine(Scanned(), Example(images, train=True), where="block")
    assert not scorer.engines
    assert scorer.statistics is None
    scorer.prepare([{}])
    found = scorer({}, images, labels, KEY)
    assert found.blocks["block"] > 0


def test_networks_without_residual_blocks():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(10)(nn.Conv(4, (3, 3))(x).mean((1, 2)))

    with pytest.raises(SelectionError, match="no module that adds a branch"):
        FisherEngine(Plain(), Example(batch_of()[0], train=True))


def test_units_that_hide_a_probe():
    """Cut out of the middle of a block, a branch takes the convolutions with it by which the block is known."""
    example = Example(batch_of()[0], train=True)
    with pytest.warns(UserWarning, match="middle of the block 'block0', whose probe it hides"):
        assert not FisherEngine(AddsItself(), example, where="block0/branch").engines


def test_candidates_in_which_nothing_is_left_to_look_at():
    images, _ = batch_of()
    engine = engine_for(AddsItself(), images)
    one = {("block0",): Branch(parent=None)}
    assert engine.candidate(one).looked_at == ["block1"]
    with pytest.raises(SelectionError, match="nothing to look at in AddsItself, as edited"):
        engine.candidate(one | {("block1",): Branch(parent=None)})
    with pytest.raises(SelectionError, match="nothing to look at in Deep"):
        engine_for(Deep(), images, where="layer?").candidate()
    with pytest.raises(SelectionError, match="choose a score that needs no residual blocks"):
        FisherEngine(Deep(), Example(images, train=True), where="layer?")


class Deep(nn.Module):
    """No shortcut."""

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(2):
            x = Branch(name=f"layer{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def test_modules_that_are_gone_are_forgotten():
    images, _ = batch_of()
    net = WideResNet(10, 1.0)
    engine = engine_for(net, images)
    path = engine.units[0]
    for _ in range(3):
        fresh = modules_of(net, images, [choice("S")])[path][0]
        engine.candidate({path: fresh})
        plans = engine.statistics.units
    gc.collect()
    del fresh
    gc.collect()
    assert engine.statistics.units == plans  # equal modules are one unit
    assert len(engine._codes) <= len(engine.units) + 1
