"""Networks scaled down: counts of the natively smaller ones, weights carried, places named in errors."""

import csv
import math
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import prunable_networks as networks
import pytest

from nnopt.core import Rewrite, carry, channel_groups, from_record, rewrite, sites, to_record
from nnopt.costs import macs, parameters
from nnopt.errors import RewriteError, SelectionError
from nnopt.networks import (
    VGG,
    BasicBlock,
    DenseNet,
    PreActBlock,
    ResNet,
    ResNeXt,
    WideResNet,
    mobilenet_v2,
    named,
)
from nnopt.networks.resnet import Bottleneck as BottleneckBlock
from nnopt.rewrites import (
    Bottleneck,
    ReplaceBlock,
    ScaleDepth,
    ScaleProfile,
    ScaleResolution,
    ScaleWidth,
    choice,
    inner_groups,
    parameters_without,
    prune,
)
from nnopt.rewrites.family import parameters_resized
from nnopt.rewrites.skeleton import resize_groups
from nnopt.search.pruning import inner_widths

IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
KEY = jax.random.key(0)
INF, NAN = math.inf, math.nan


class Narrow(nn.Module):
    """A network of somebody else: a stream, depthwise convolutions, squeeze and excite, a width that everything follows."""

    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), strides=2, name="stem")(x)
        for i, features in enumerate((self.width, 2 * self.width)):
            x = Mixed(features, name=f"block{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class Mixed(nn.Module):
    """Its own arithmetic of widths."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        inner = 3 * self.features
        y = nn.relu(nn.BatchNorm(not train, name="norm")(nn.Conv(inner, (1, 1), name="up")(x)))
        y = nn.Conv(inner, (3, 3), feature_group_count=inner, name="depthwise")(y)
        gate = nn.Dense(self.features // 2, name="squeeze")(y.mean((1, 2)))
        y = y * nn.sigmoid(nn.Dense(inner, name="excite")(nn.relu(gate)))[:, None, None]
        y = nn.Conv(self.features, (1, 1), name="down")(y)
        return x + y if x.shape[-1] == self.features else y


class Concatenated(nn.Module):
    """Another: branches side by side, halves that gate each other, a flattened image, all in setup."""

    width: int

    def setup(self):
        self.left, self.right = nn.Conv(self.width, (3, 3), strides=4), nn.Conv(2 * self.width, (5, 5), strides=4)  # fmt: skip
        self.mix = nn.Conv(4 * self.width, (1, 1))
        self.hidden, self.head = nn.Dense(8 * self.width), nn.Dense(10)

    def __call__(self, x, train=False):
        x = nn.relu(jnp.concatenate([self.left(x), self.right(x)], -1))
        a, b = jnp.split(self.mix(x), 2, -1)
        x = a * nn.sigmoid(b)
        return self.head(nn.relu(self.hidden(x.reshape(x.shape[0], -1))))


class Layer(nn.Module):
    """A layer of a transformer."""

    heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(y))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class Transformer(nn.Module):
    """A vision transformer."""

    width: int
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (8, 8), strides=8, name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.param("places", nn.initializers.normal(), (1, 16, self.width))
        for i in range(self.depth):
            x = Layer(self.heads, name=f"layer{i}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


class Perceptron(nn.Module):
    """A residual block of dense layers."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1], name="down")(nn.relu(nn.Dense(64, name="up")(x)))


class Perceptrons(nn.Module):
    """A network of them, for vectors."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, name="stem")(x)
        for i in range(self.depth):
            x = Perceptron(name=f"layer{i}")(x)
        return nn.Dense(10, name="head")(x)


def resnet(sizes, block, stem, widths):
    return ResNet(sizes, block, widths=widths, stem_features=stem)


BASIC, BOTTLENECK = BasicBlock, BottleneckBlock
# (wide, factor, multiple, what keeps its width, narrow)
SCALED = {
    "ResNet-18": (named("resnet-18", 10), 0.5, 8, None, resnet((2, 2, 2, 2), BASIC, 32, (32, 64, 128, 256))),
    "ResNet-34": (named("resnet-34", 10), 0.75, 8, None, resnet((3, 4, 6, 3), BASIC, 48, (48, 96, 192, 384))),
    "ResNet-50": (named("resnet-50", 10), 0.5, 8, None, resnet((3, 4, 6, 3), BOTTLENECK, 32, (128, 256, 512, 1024))),
    "ResNet-18, stem kept": (
        resnet((2, 2, 2, 2), PreActBlock, 16, (64, 128, 256, 512)), 0.5, 8, "stem",
        resnet((2, 2, 2, 2), PreActBlock, 16, (32, 64, 128, 256)),
    ),
    "WRN-40-4": (WideResNet(40, 4.0), 0.5, 8, "stem", WideResNet(40, 2.0)),
    "WRN-16-4": (WideResNet(16, 4.0), 0.75, 8, "stem", WideResNet(16, 3.0)),
    "DenseNet": (DenseNet(40, 24), 0.5, 4, None, DenseNet(40, 12)),
    "VGG-16": (VGG(), 0.5, 8, None, VGG(widths=(32, 64, 128, 256, 256))),
    "VGG-16, hidden layers": (VGG(hidden=(128,)), 0.25, 8, None, VGG(widths=(16, 32, 64, 128, 128), hidden=(32,))),
    "ResNeXt-29": (ResNeXt(29, 8, 64), 0.5, 8, None, None),
    "MobileNetV2": (mobilenet_v2(width=2.0), 0.5, 8, None, mobilenet_v2()),
    "foreign stream": (Narrow(16), 0.5, 4, None, Narrow(8)),
    "foreign stream, wider": (Narrow(8), 2.0, 4, None, Narrow(16)),
    "transformer": (Transformer(16, heads=4), 0.5, 4, None, Transformer(8, heads=4)),
    "transformer, wider": (Transformer(16), 2.0, 8, None, Transformer(32)),
    "foreign branches": (Concatenated(16), 0.25, 4, None, Concatenated(4)),
}  # fmt: skip


def scaled(net, factor, multiple, keep, example=IMAGE):
    return rewrite(net, ScaleWidth(factor, multiple, keep), example=example)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_widths_have_the_parameters_of_the_narrower_network(name):
    net, factor, multiple, keep, narrow = SCALED[name]
    made = scaled(net, factor, multiple, keep)
    variables = jax.eval_shape(made.init, KEY, jnp.zeros(IMAGE.shape))
    assert from_record(to_record(made)) == made
    if narrow is None:
        assert 0.2 < parameters(made, IMAGE) / parameters(net, IMAGE) < 0.3
        return
    wanted = jax.eval_shape(narrow.init, KEY, jnp.zeros(IMAGE.shape))
    assert jax.tree.map(lambda a: a.shape, variables) == jax.tree.map(lambda a: a.shape, wanted)
    assert macs(made, IMAGE) == macs(narrow, IMAGE)


def test_a_narrower_network_starts_from_the_first_channels():
    net = networks.DenseConcat()
    images = jax.random.normal(KEY, networks.IMAGES.shape)
    variables = net.init(KEY, images)
    made = scaled(net, 0.5, 1, None, networks.IMAGES)
    carried, report = carry(net, made, variables, example=networks.IMAGES, key=KEY)
    assert not report.fresh
    assert len(report.transformed) > 5
    # What follows is pruning: the last channels of each group go.
    groups = channel_groups(net, networks.IMAGES)
    removed = {n: range(g.size // 2, g.size) for n, g in groups.items()}
    pruned = rewrite(net, prune(groups, removed), example=networks.IMAGES)
    wanted, _ = carry(net, pruned, variables, example=networks.IMAGES, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, carried, wanted)
    assert parameters(made, networks.IMAGES) == parameters_without(groups, removed)


def test_a_wider_network_keeps_what_does_not_change():
    net = networks.Plain()
    variables = net.init(KEY, jnp.zeros(networks.IMAGES.shape))
    made = scaled(net, 2.0, 1, "second", networks.IMAGES)
    carried, report = carry(net, made, variables, example=networks.IMAGES, key=KEY)
    assert carried["params"]["first"]["kernel"].shape == (3, 3, 3, 16)
    assert "params/first/kernel" in report.fresh
    np.testing.assert_array_equal(carried["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])  # fmt: skip


def test_scaled_networks_are_rewritten_again():
    net = rewrite(WideResNet(16, 2.0), ScaleWidth(0.5, keep="stem"), ScaleDepth(0.5), example=IMAGE)
    net = rewrite(net, ReplaceBlock("stage2_block0", choice("G(4)")), example=IMAGE)
    assert from_record(to_record(net)) == net
    jax.eval_shape(net.init, KEY, jnp.zeros(IMAGE.shape))


# --- depth ---


@pytest.mark.parametrize(("depth", "of"), [(34, 5), (28, 4), (22, 3), (16, 2), (10, 1)])
def test_fewer_blocks_have_the_parameters_of_the_shallower_network(depth, of):
    made = rewrite(WideResNet(40, 2.0), ScaleDepth(of / 6), example=IMAGE)
    native = WideResNet(depth, 2.0)
    assert parameters(made, IMAGE) == parameters(native, IMAGE)
    assert macs(made, IMAGE) == macs(native, IMAGE)


@pytest.mark.parametrize(
    ("net", "example"),
    [(Transformer(16, 4), IMAGE), (Perceptrons(16, 4), jax.ShapeDtypeStruct((1, 7), jnp.float32))],
    ids=["transformer", "perceptrons"],
)
def test_blocks_of_dense_layers(net, example):
    """Fewer of them, narrower inside, and as wide as a list says."""
    for rule, blocks, inner in (
        (ScaleDepth(0.5), 2, 64),
        (Bottleneck(0.25), 4, 16),
        (ScaleProfile(tuple(inner_widths(net, example)), 0.5), 4, 32),
    ):
        made = rewrite(net, rule, example=example)
        specs = jax.eval_shape(made.init, KEY, jnp.zeros(example.shape))["params"]
        layers = [k for k in specs if k.startswith("layer")]
        assert len(layers) == blocks
        assert {specs[k]["up"]["kernel"].shape for k in layers} == {(16, inner)}
        attention = [specs[k]["attention"]["query"]["kernel"].shape for k in layers if "attention" in specs[k]]  # fmt: skip
        assert all(shape == (16, 2, 8 * inner // 64) for shape in attention)
    assert len(rewrite(net, ScaleDepth(drop=("layer1",)), example=example).patch.items()) == 1


def test_networks_without_blocks():
    message = r"VGG has no module that adds a branch of convolutions or dense .*ScaleDepth\(drop="
    for rule in (ScaleDepth(0.5), Bottleneck(0.5)):
        with pytest.raises(SelectionError, match=message):
            rewrite(VGG(), rule, example=IMAGE)


def test_blocks_that_go_are_spread_over_a_stage():
    made = rewrite(WideResNet(40, 2.0), ScaleDepth(0.5), example=IMAGE)
    dropped = [p for p, m in made.patch.items() if type(m).__name__ == "Identity"]
    assert [int(p[0][-1]) for p in dropped if p[0].startswith("stage2")] == [1, 3, 5]
    assert len(dropped) == 9
    by_name = rewrite(WideResNet(16, 1.0), ScaleDepth(drop=("stage2_block1",)), example=IMAGE)
    assert [p for p, _ in by_name.patch.items()] == [("stage2_block1",)]
    assert rewrite(WideResNet(16, 1.0), ScaleDepth(1.0), example=IMAGE) == WideResNet(16, 1.0)


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50", "preact-resnet-18", "mobilenet-v2"])
def test_depth_of_other_networks(name):
    net = named(name, 10)
    made = rewrite(net, ScaleDepth(0.5), example=IMAGE)
    assert parameters(made, IMAGE) < parameters(net, IMAGE)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (ScaleDepth(), RewriteError, "either a factor or"),
        (ScaleDepth(0.5, ("stage1_block1",)), RewriteError, "either a factor or"),
        (ScaleDepth(0.0), RewriteError, "ScaleDepth: factor=0.0; .* up to 1"),
        (ScaleDepth(1.5), RewriteError, "ScaleDepth: factor=1.5; .* up to 1"),
        (ScaleDepth(NAN), RewriteError, "ScaleDepth: factor=nan; "),
        (ScaleDepth("all"), RewriteError, "ScaleDepth: factor='all'; "),
        (ScaleDepth(drop=("stage2_block0",)), RewriteError, "'stage2_block0' cannot be dropped"),
        (ScaleDepth(drop="stage1_block1"), RewriteError, r"drop=\('stage1_block1',\)"),
        (ScaleDepth(drop=("stage9",)), SelectionError, "no module at 'stage9'"),
        (ScaleWidth(0.001, 1), RewriteError, "none of the 16 channels of 'stem'"),
        (ScaleWidth(-1.0), RewriteError, "ScaleWidth: factor=-1.0; give a finite number above 0"),
        (ScaleWidth(INF), RewriteError, "ScaleWidth: factor=inf; "),
        (ScaleWidth(1e12), RewriteError, "gives 'stem' more than 1,048,576 channels"),
        (ScaleWidth(0.5, 0), RewriteError, "ScaleWidth: multiple=0; give a whole number from 1"),
        (ScaleWidth(0.5, 2.5), RewriteError, "ScaleWidth: multiple=2.5; "),
        (ScaleWidth(0.5, keep="nothing"), SelectionError, "no module at 'nothing'"),
        (ScaleResolution(0.0), RewriteError, "ScaleResolution: factor=0.0; "),
        (ScaleResolution(NAN), RewriteError, "ScaleResolution: factor=nan; "),
        (ScaleResolution(1e-9), RewriteError, "32 pixels cannot be scaled by 1e-09"),
        (ScaleResolution(1e9), RewriteError, "32 pixels cannot be scaled by 1000000000.0"),
        (Bottleneck(0.01), RewriteError, "leaves 'stage1_block0/conv1' without"),
        (Bottleneck(INF), RewriteError, "Bottleneck: z=inf; give a finite number above 0"),
        (Bottleneck(NAN), RewriteError, "Bottleneck: z=nan; "),
        (Bottleneck(-0.5), RewriteError, "Bottleneck: z=-0.5; "),
        (Bottleneck(1e308), RewriteError, "gives 'stage1_block0/conv1' more than 1,048,576"),
        (Bottleneck(10**400), RewriteError, "gives 'stage1_block0/conv1' more than 1,048,576"),
        (Bottleneck(0.5, multiple=0), RewriteError, "Bottleneck: multiple=0; "),
        (Bottleneck(0.5, multiple=INF), RewriteError, "Bottleneck: multiple=inf; "),
        (Bottleneck(0.5, multiple=10**9), RewriteError, "would have 1,000,000,000 channels"),
        (ScaleProfile((8, 8)), RewriteError, "has 2 widths, and WideResNet has 6 inner ones"),
        (ScaleProfile((8,) * 6, 0.1), RewriteError, "8 x 0.1 leaves 'stage1_block0/conv1'"),
        (ScaleProfile((8,) * 6, INF), RewriteError, "ScaleProfile: factor=inf; "),
        (ScaleProfile((8,) * 5 + (0,)), RewriteError, "width 5 .* is 0; widths are positive whole"),
        (ScaleProfile((8, -3) * 3), RewriteError, "width 1 .* is -3; widths are positive whole"),
        (ScaleProfile((8.5,) * 6), RewriteError, "width 0 .* is 8.5; widths are positive whole"),
        (ScaleProfile((NAN,) * 6), RewriteError, "width 0 .* is nan; widths are positive whole"),
        (ScaleProfile(("a",) * 6), RewriteError, "width 0 .* is 'a'; widths are positive whole"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, Rewrite) else "",
)
def test_bad_rules(rule, error, message):
    with pytest.raises(error, match=message):
        rewrite(WideResNet(16, 1.0), rule, example=IMAGE)


@pytest.mark.parametrize(
    ("size", "message"),
    [("8", "have '8' channels; give a whole"), (8.5, "8.5 channels; give a"), (0, "with 0 channels; keep")],
)  # fmt: skip
def test_bad_sizes(size, message):
    groups = channel_groups(networks.Plain(), networks.IMAGES)
    with pytest.raises(RewriteError, match=f"'first' would .*{message}"):
        resize_groups(groups, {"first": size})


class WithSide(nn.Module):
    """A residual block that hands a second value along."""

    @nn.compact
    def __call__(self, x, side):
        y = nn.Conv(x.shape[-1], (3, 3))(x)
        return x + y, side + y.mean()


class WithSides(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, side = nn.Conv(8, (3, 3), name="stem")(x), jnp.zeros(())
        for i in range(2):
            x, side = WithSide(name=f"block{i}")(x, side)
        return nn.Dense(10, name="head")(x.mean((1, 2))) + side


def test_blocks_that_return_several_arrays():
    with pytest.raises(RewriteError, match="ScaleDepth: block 'block0' returns "):
        rewrite(WithSides(), ScaleDepth(0.5), example=IMAGE)
    with pytest.raises(RewriteError, match="'block1' cannot be dropped"):
        rewrite(WithSides(), ScaleDepth(drop=("block1",)), example=IMAGE)


# --- inner widths ---


def reference(name):
    folder = os.environ.get("NNOPT_DATA")
    path = pathlib.Path(folder or "", "reference", name)
    if not folder or not path.exists():
        pytest.skip(f"needs NNOPT_DATA with reference/{name}")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_families_of_wide_residual_networks():
    """Width, depth and bottleneck of WRN-40-2, as counted from the published code."""
    rows = reference("reduced_wrn_counts.csv")
    seen, shallower = 0, {}
    for row in rows:
        depth, width, z = (
            int(row["depth"]),
            float(row["width_or_growth"]),
            float(row["bottle_mult"]),
        )
        if width == 1.0:  # as wide as the stem, so that the native network has one projection less
            continue
        if depth not in shallower:
            made = rewrite(WideResNet(40, 2.0), ScaleDepth((depth - 4) // 6 / 6), example=IMAGE)
            shallower[depth] = sites(made, IMAGE)
        found = shallower[depth]
        rules = [ScaleWidth(width / 2, 1, "stem")] if width != 2 else []
        rules += [Bottleneck(z)] if z != 1 else []
        if len(rules) == 1:
            count = parameters_resized(found, rules[0].written_out(found))
        else:
            count = parameters(rewrite(found.net, *rules, example=IMAGE), IMAGE)
        assert count == int(row["params"]), row
        seen += 1
    assert seen >= 15


def test_the_published_prune_curve_is_reachable():
    """Removing inner channels costs 9 in + 9 out + 2 parameters each; every consistent point is some choice of them."""
    net = WideResNet(40, 2.0)
    groups = channel_groups(net, IMAGE)
    inner = inner_groups(groups)
    assert sum(groups[n].size for n in inner) == 1344
    whole = parameters(net, IMAGE)
    price = {n: whole - parameters_without(groups, {n: [0]}) for n in inner}
    assert set(price.values()) == {434, 578, 866, 1154, 1730, 2306}
    points = [
        (int(next(iter(r.values()))), int(r["params"])) for r in reference("wrn40_2_fisher_prune_curve.csv")
    ]  # fmt: skip
    consistent = [p for p in points if p[0] != 500]
    assert len(consistent) == 12
    for count, left in consistent:
        removed = _channels(price, {n: groups[n].size - 1 for n in inner}, count, whole - left)
        assert sum(map(len, removed.values())) == count
        assert parameters_without(groups, removed) == left
    made = rewrite(net, prune(groups, removed), example=IMAGE)  # the last point, in earnest
    assert parameters(made, IMAGE) == consistent[-1][1]
    inconsistent = dict(points)[500]
    assert (whole - inconsistent - 2 * 500) % 144


def _channels(price, most, count, cost):
    """How many channels each group loses, so that `count` go at a cost: a knapsack, solved in units of 144 parameters."""
    kinds = sorted(set(price.values()))
    unit = {p: (p - 434) // 144 for p in kinds}
    room = {p: sum(most[n] for n in price if price[n] == p) for p in kinds}
    target = (cost - 434 * count) // 144
    assert cost - 434 * count == 144 * target

    def solve(kinds, count, target):
        if not kinds:
            return {} if count == target == 0 else None
        kind, *others = kinds
        low = max(0, count - sum(room[k] for k in others))
        for number in range(min(room[kind], count), low - 1, -1):
            left = target - number * unit[kind]
            every = sorted(u for k in others for u in [unit[k]] * min(room[k], count))
            rest = count - number
            possible = sum(every[:rest]) <= left <= sum(every[len(every) - rest :])
            if possible and (found := solve(others, rest, left)) is not None:
                return {kind: number, **found}
        return None

    best = solve(kinds[::-1], count, target)
    assert best is not None
    removed = {}
    for name, kind in price.items():
        take = min(best[kind], most[name])
        best[kind] -= take
        if take:
            removed[name] = range(take)
    return removed


def test_bottleneck_is_one_factor_for_all():
    made = rewrite(WideResNet(16, 2.0), Bottleneck(0.3), example=IMAGE)
    shapes = jax.eval_shape(made.init, KEY, jnp.zeros(IMAGE.shape))["params"]
    inner = [
        shapes[f"stage{s}_block{b}"]["conv1"]["kernel"].shape[-1] for s in (1, 2, 3) for b in (0, 1)
    ]
    assert inner == [9, 9, 19, 19, 38, 38]
    assert shapes["stage1_block0"]["conv2"]["kernel"].shape == (3, 3, 9, 32)
    wide = rewrite(WideResNet(16, 2.0), Bottleneck(0.3, multiple=8), example=IMAGE)
    shapes = jax.eval_shape(wide.init, KEY, jnp.zeros(IMAGE.shape))["params"]
    assert shapes["stage2_block0"]["conv1"]["kernel"].shape[-1] == 16


def test_a_profile_makes_a_family():
    profile = (6, 20, 50)
    net = WideResNet(10, 1.0)
    for factor in (1.0, 0.5, 1.2):
        made = rewrite(net, ScaleProfile(profile, factor), example=IMAGE)
        shapes = jax.eval_shape(made.init, KEY, jnp.zeros(IMAGE.shape))["params"]
        names = [f"stage{s}_block0" for s in (1, 2, 3)]
        assert [shapes[n]["conv2"]["kernel"].shape[2] for n in names] == [
            int(p * factor) for p in profile
        ]
    # Narrower blocks start from the wide ones.
    specs = jax.eval_shape(net.init, KEY, jnp.zeros(IMAGE.shape))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape), s.dtype), specs)
    made = rewrite(net, ScaleProfile(profile), example=IMAGE)
    carried, report = carry(net, made, variables, example=IMAGE, key=KEY)
    assert not report.fresh
    np.testing.assert_array_equal(
        carried["params"]["stage1_block0"]["conv1"]["kernel"],
        variables["params"]["stage1_block0"]["conv1"]["kernel"][..., :6],
    )


# --- resolution ---


def test_resolution():
    net = resnet((1,), PreActBlock, 16, (16,))
    images = jax.random.normal(KEY, (2, 32, 32, 3))
    variables = net.init(KEY, images)
    made = rewrite(net, ScaleResolution(0.5), example=images)
    carried, report = carry(net, made, variables, example=images, key=KEY)
    assert not report.fresh + report.transformed
    small = jax.image.resize(images, (2, 16, 16, 3), "linear")
    np.testing.assert_allclose(made.apply(carried, images), net.apply(variables, small), rtol=1e-5)
    assert macs(made, IMAGE) < 0.3 * macs(net, IMAGE)
    both = rewrite(made, ScaleWidth(0.5), example=images)
    assert from_record(to_record(both)) == both
    assert rewrite(net, ScaleResolution(1.0), example=images) is net
    with pytest.raises(RewriteError, match="Dense takes an input of shape"):
        rewrite(nn.Dense(3), ScaleResolution(0.5), example=jnp.zeros((2, 4)))
