"""Networks on both backends: reference networks, what rewrites make of them, other people's, and random chains of layers.

With NNOPT_RANDOM_NETWORKS=500 it is that many chains, and every block choice and foreign network instead of some.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from foreign_networks import CASES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm_ffi")

from nnopt.backends import XlaBackend, stand_in_variables
from nnopt.backends.agreement import agreement, difference
from nnopt.backends.compiled import as_function
from nnopt.backends.tvm import TvmBackend
from nnopt.core import Example, rewrite
from nnopt.nests import named as operators
from nnopt.networks import (
    VGG,
    BasicBlock,
    Bottleneck,
    DenseNet,
    InvertedResidual,
    MobileNetV2,
    PreActBlock,
    ResNet,
    ResNeXt,
    WideResNet,
)
from nnopt.rewrites import (
    CODE_CHOICES,
    PAPER_CHOICES,
    LowerGroupedConvs,
    MutateConv,
    ReplaceBlock,
)

CHAINS = int(os.environ.get("NNOPT_RANDOM_NETWORKS", "12"))
DEEP = CHAINS > 12
TVM, XLA = TvmBackend(threads=1), XlaBackend()
IMAGE = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
WRN = WideResNet(10, 1.0)


def agree(net, example=IMAGE):
    """Three ways to compute a network, within 1e-4 of the largest magnitude of each output."""
    example = Example.of(example)
    found = agreement(net, stand_in_variables(net, example), example, [XLA, TVM], tolerance=1e-4)
    assert found.agrees, found.worst


def alike(net, example=IMAGE):
    """As `agree`, without 64 bits: for many small networks."""
    function, inputs = as_function(net, stand_in_variables(net, example), example)
    results = [jax.tree.leaves(b.compile(function, inputs).outputs()) for b in (XLA, TVM)]
    for a, b in zip(*results, strict=True):
        d = difference("output", "xla", "tvm", a, b)
        assert d.within(1e-4), d


# --- reference networks ---

REFERENCE = {
    "wide_resnet": WRN,
    "resnet_basic": ResNet((1, 1), BasicBlock, widths=(8, 16)),
    "resnet_bottleneck": ResNet((1, 1), Bottleneck, stem="imagenet", widths=(16, 32)),
    "resnet_preact": ResNet((1, 1), PreActBlock, widths=(8, 16), final_norm=True),
    "resnext": ResNeXt(11, 2, 4),
    "densenet": DenseNet(10, 4),
    "vgg": VGG((1, 1), (8, 16), hidden=(24, 16)),
    "mobilenet_v2": (
        InvertedResidual(8, 3, 2),
        IMAGE,
        False,
    ),  # of the whole, 11 s: experiments/backends
}


if DEEP:
    REFERENCE["mobilenet_v2_whole"] = (MobileNetV2(width=0.25, stem="imagenet"), IMAGE, False)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_networks(name):
    net, *inputs = (
        REFERENCE[name] if isinstance(REFERENCE[name], tuple) else (REFERENCE[name], IMAGE)
    )
    (agree if name == "wide_resnet" or DEEP else alike)(net, Example(*inputs))


# --- rewritten ones ---

SMALL = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
PROGRAMS = {
    "grouped": operators.grouped(4),
    "depthwise": operators.depthwise(),
    "pointwise": operators.pointwise((3, 3)),
    "dilated": operators.dilated(),
    "spatial_bottleneck": operators.spatial_bottleneck(2),
    "sequence1": operators.sequence1(16, (2, 4)),
    "sequence2": operators.sequence2(16, 4, 2),
    "sequence3": operators.sequence3(2),
    "sequence4": operators.sequence4(16, (3, 3), (3, 1)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operators_in_a_network(name):
    rule = MutateConv("stage1_block0/conv2", PROGRAMS[name])
    alike(rewrite(Two(), rule, example=SMALL), SMALL)


class Two(nn.Module):
    """The smallest network that has a convolution of 16 channels, of the name that the rule asks for."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        return nn.Dense(3, name="head")(Block16(name="stage1_block0")(x).mean((1, 2)))


class Block16(nn.Module):
    """A residual block around it."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Conv(16, (3, 3), name="conv2")(nn.relu(x))


CHOICES = tuple(dict.fromkeys((*PAPER_CHOICES, *CODE_CHOICES)))


@pytest.mark.parametrize("kind", CHOICES[:: 1 if DEEP else 4], ids=lambda c: c.name)
def test_blocks_of_choices(kind):
    net = ResNet((1,), PreActBlock, widths=(32,))
    alike(rewrite(net, ReplaceBlock("stage1_block0", kind), example=SMALL), SMALL)


def test_lowered_groups():
    alike(rewrite(Grouped(), LowerGroupedConvs("**"), example=SMALL), SMALL)


class Grouped(nn.Module):
    """A grouped and a depthwise convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=4, name="grouped")(x))
        return nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)


# --- other people's ---


class Chain(nn.Module):
    """Functions of images one after another, then a dense layer."""

    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def shuffled(x, groups=4):
    """Channel shuffle (Zhang et al., ShuffleNet, 2018)."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, groups, c // groups).swapaxes(3, 4).reshape(n, h, w, c)


def excited(x):
    gate = nn.sigmoid(nn.Dense(x.shape[-1])(nn.relu(nn.Dense(2)(x.mean((1, 2), keepdims=True)))))
    return x * jnp.broadcast_to(gate, x.shape)


def attended(x):
    n, h, w, c = x.shape
    y = nn.LayerNorm()(x.reshape(n, h * w, c))
    return (x.reshape(n, h * w, c) + nn.MultiHeadDotProductAttention(2)(y, y)).reshape(x.shape)


def recurred(x):
    return nn.RNN(nn.OptimizedLSTMCell(6))(x.reshape(x.shape[0], 8, -1)[:, :3])


CONV = functools.partial(nn.Conv, 8, (3, 3))
FOREIGN = {
    "pools": lambda x: jnp.concatenate(
        [
            nn.max_pool(x, (3, 3), (2, 2), "SAME"), nn.avg_pool(x, (3, 3), (2, 2), "SAME"),
            nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False), -nn.max_pool(-x, (2, 2), (2, 2)),
        ],
        -1,
    ),
    "channel_shuffle": lambda x: shuffled(CONV(feature_group_count=4)(shuffled(x))),
    "squeeze_excite": excited,
    "layer_norm": lambda x: nn.relu(nn.LayerNorm()(x)),
    "group_norm": lambda x: nn.swish(nn.GroupNorm(4)(x)),
    "instance_norm": lambda x: nn.gelu(nn.InstanceNorm()(x)),
    "rms_norm": lambda x: nn.elu(nn.RMSNorm()(x)),
    "weight_norm": lambda x: nn.WeightNorm(CONV())(x),
    "attention": attended,
    "transposed": lambda x: nn.ConvTranspose(6, (3, 3), (2, 2))(x),
    "transposed_valid": lambda x: nn.ConvTranspose(6, (4, 3), (2, 1), padding="VALID", kernel_dilation=(1, 2))(x),
    "resize": lambda x: jax.image.resize(x, (x.shape[0], 12, 5, x.shape[3]), "bilinear"),
    "circular": lambda x: nn.Conv(6, (3, 3), padding="CIRCULAR")(nn.Conv(6, (3, 3), padding="REFLECT")(x)),
    "causal": lambda x: nn.Conv(6, 3, padding="CAUSAL")(x.reshape(1, -1, 8)[:, :20]),
    "local": lambda x: nn.ConvLocal(4, (3, 3), strides=2)(x),
    "lstm": recurred,
    "mixed": lambda x: jnp.einsum("nhwc,nhkc->nhwk", x, nn.softmax(x, -1)),
    "normalised": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "prelu": lambda x: nn.PReLU()(x),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_layers_of_other_people(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        alike(Chain((lambda x: CONV()(x), nn.relu, FOREIGN[name])), SMALL)


SOME_CASES = (
    "transformer",
    "scanned",
    "ensemble",
    "conv_subclass",
    "u_net",
    "recurrent",
    "tied_attend",
)


@pytest.mark.parametrize("name", CASES if DEEP else SOME_CASES)
def test_foreign_networks(name):
    case = CASES[name]
    alike(case.net, Example(*case.inputs, **case.eval))


# --- random chains ---


@st.composite
def chains(draw):
    """Two to four random layers on images of about 8 x 8, as descriptions that can be read in a message."""
    size = draw(st.tuples(*[st.integers(5, 9)] * 2))
    layers, channels = [], draw(st.sampled_from([3, 4, 8]))
    start = channels
    for _ in range(draw(st.integers(2, 4))):
        kind = draw(
            st.sampled_from(
                ["conv"] * 5 + ["depthwise", "norm", "pool", "residual", "concat", "up"]
            )
        )
        if kind == "conv":
            groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, 4) if channels % g == 0]))
            features = groups * draw(st.sampled_from([1, 3, 4, 5, 8]))
            window = draw(st.tuples(*[st.integers(1, 4)] * 2))
            stride = draw(st.tuples(*[st.integers(1, 2)] * 2))
            dilation = draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 2))
            sides = st.tuples(st.integers(0, 2), st.integers(0, 2))
            padding = draw(st.one_of(st.just("SAME"), st.tuples(sides, sides)))
            layers.append(
                (kind, features, window, stride, dilation, padding, groups, draw(st.booleans()))
            )
            channels = features
        elif kind in ("depthwise", "residual"):
            layers.append((kind, draw(st.integers(1, 3))))
        elif kind == "pool":
            which = draw(st.sampled_from(["max", "avg"]))
            k, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            layers.append((kind, which, k, stride, draw(st.sampled_from(["SAME", "VALID"]))))
        elif kind == "concat":
            layers.append((kind,))
            channels *= 2
        elif kind == "up":
            layers.append((kind, draw(st.sampled_from([3, 4]))))
            channels = layers[-1][1]
        else:
            layers.append((kind, draw(st.sampled_from(["batch", "layer", "group"]))))
        layers.append(
            (draw(st.sampled_from(["relu", "none", "gelu", "swish", "relu6", "tanh", "elu"])),)
        )
    return (draw(st.integers(1, 2)), *size, start), tuple(layers)


class Random(nn.Module):
    """What a description says; windows that would be larger than the image are cut."""

    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, x):
        for kind, *rest in self.layers:
            x = self.layer(kind, rest, x)
        return nn.Dense(3)(x.mean((1, 2)))

    def layer(self, kind, rest, x):
        c = x.shape[-1]
        if kind == "conv":
            features, window, stride, dilation, padding, groups, bias = rest
            if padding != "SAME":  # at least one position must be left
                padding = [
                    (lo, hi + max(0, (k - 1) * d + 1 - n - lo - hi))
                    for (lo, hi), k, d, n in zip(padding, window, dilation, x.shape[1:3], strict=True)
                ]  # fmt: skip
            conv = nn.Conv(
                features, window, stride, padding, kernel_dilation=dilation, feature_group_count=groups, use_bias=bias
            )  # fmt: skip
            return conv(x)
        if kind == "depthwise":
            return nn.Conv(c, (rest[0],) * 2, feature_group_count=c)(x)
        if kind == "residual":
            return x + nn.Conv(c, (rest[0],) * 2)(nn.relu(x))
        if kind == "pool":
            which, size, stride, padding = rest
            window = tuple(min(size, n) for n in x.shape[1:3])
            return {"max": nn.max_pool, "avg": nn.avg_pool}[which](
                x, window, (stride, stride), padding
            )
        if kind == "concat":
            return jnp.concatenate([x, nn.Conv(c, (1, 1))(x)], -1)
        if kind == "up":
            return nn.ConvTranspose(rest[0], (2, 2), (2, 2))(x[:, :4, :4])
        if kind == "norm":
            norms = {"batch": nn.BatchNorm(True), "layer": nn.LayerNorm(), "group": nn.GroupNorm(1)}
            return norms[rest[0]](x)
        return x if kind == "none" else getattr(nn, kind)(x)


def compare_chains(described):
    """All in one compiled function each: XLA and TVM start only once."""
    nets, inputs, variables = [], [], []
    for i, (shape, layers) in enumerate(described):
        net = Random(layers)
        nets.append(net)
        inputs.append(jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32))
        with jax.numpy_dtype_promotion("standard"):
            variables.append(stand_in_variables(net, inputs[-1], i))

    def together(*arrays):
        return [net.apply(v, x) for net, v, x in zip(nets, variables, arrays, strict=True)]

    with jax.numpy_dtype_promotion("standard"):
        results = [b.compile(together, inputs).outputs() for b in (XLA, TVM)]
    for layers, a, b in zip(described, *results, strict=True):
        d = difference("output", "xla", "tvm", a, b)
        assert d.within(1e-4), (layers, d)


@settings(
    max_examples=CHAINS // 4, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)  # fmt: skip
@given(st.lists(chains(), min_size=4, max_size=4))
def test_random_chains(described):
    compare_chains(described)
