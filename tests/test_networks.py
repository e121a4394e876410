import ast
import csv
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from nnopt import networks
from nnopt.networks import (
    NAMES,
    VGG,
    BasicBlock,
    Bottleneck,
    DenseNet,
    MobileNetV2,
    PreActBlock,
    ResNet,
    ResNeXt,
    WideResNet,
    named,
    preact_resnet34,
)

# Small members of every family: cheap enough to initialise and run.
TINY = {
    "wide_resnet": WideResNet(10, 1.0),
    "wide_resnet_inner": WideResNet(10, 1.0, inner=0.5),
    "resnet_basic": ResNet((1, 1), BasicBlock, widths=(16, 32)),
    "resnet_bottleneck": ResNet((1, 1), Bottleneck, stem="imagenet", widths=(32, 64)),
    "resnet_preact": ResNet((1, 1), PreActBlock, widths=(16, 32), final_norm=True),
    "resnext": ResNeXt(11, 4, 4),
    "densenet": DenseNet(10, 8),
    "vgg": VGG((1, 1, 1), (16, 32, 32)),
    "vgg_hidden": VGG((1, 1), (16, 32), hidden=(24, 16)),
    "mobilenet_v2": MobileNetV2(width=0.25, stem="imagenet"),
}
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def shapes(net: nn.Module, size: int = 32) -> dict:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return jax.eval_shape(net.init, key, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def parameter_count(net: nn.Module, size: int = 32) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(net, size)["params"]))


@functools.cache
def tiny_run(family: str) -> tuple[jax.Array, dict]:
    images = np.random.default_rng(0).normal(size=IMAGE.shape).astype(np.float32)
    # Each runs once, so compile time is all there is to save.
    run = jax.jit(
        functools.partial(TINY[family].init_with_output, train=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return run(jax.random.PRNGKey(0), images)


@pytest.mark.parametrize(
    ("name", "num_classes", "count"),
    [
        ("wrn-40-2", 10, 2_243_546),
        ("wrn-16-2", 10, 691_674),
        ("wrn-40-1", 10, 563_930),
        ("wrn-16-1", 10, 175_066),
        ("densenet-bc-100-12", 10, 769_162),
        ("resnet-34", 10, 21_282_122),
        ("resnet-18-imagenet", 1000, 11_689_512),
        ("resnet-34-imagenet", 1000, 21_797_672),
        ("resnet-50-imagenet", 1000, 25_557_032),
        ("preact-resnet-34-imagenet", 1000, 21_794_984),
        ("mobilenet-v2-imagenet", 1000, 3_504_872),
    ],
)
def test_published_parameter_counts(name: str, num_classes: int, count: int) -> None:
    assert parameter_count(named(name, num_classes)) == count


def test_parameter_counts_of_vgg16() -> None:
    # The hidden layers of the ImageNet classifier bind the count to images of 224 x 224.
    assert parameter_count(named("vgg-16-imagenet", 1000), size=224) == 138_365_992
    # The same 13 normalised convolutions, and one linear layer of 512 inputs.
    classifier = 25_088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert parameter_count(named("vgg-16")) == 138_365_992 - classifier + 512 * 10 + 10


def test_parameter_count_of_resnext29() -> None:
    # Published as 34.4 M (arXiv 1611.05431, table 7).
    assert round(parameter_count(named("resnext-29")) / 1e6, 1) == 34.4


def test_final_norm_adds_one_normalisation() -> None:
    assert parameter_count(preact_resnet34(1000, "imagenet", final_norm=True)) == 21_794_984 + 1024


def test_reduced_wide_resnets_have_the_recorded_counts(data_dir: Path) -> None:
    with (data_dir / "reference" / "reduced_wrn_counts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        net = WideResNet(
            depth=int(row["depth"]),
            width=float(row["width_or_growth"]),
            inner=float(row["bottle_mult"]),
        )
        assert parameter_count(net) == int(row["params"]), row


@pytest.mark.parametrize("name", NAMES)
def test_every_known_name_builds_a_network(name: str) -> None:
    net = named(name, num_classes=7)
    variables = shapes(net)
    assert set(variables) == {"params", "batch_stats"}
    assert variables["params"]["head"]["kernel"].shape[-1] == 7
    # Names that Flax invents ("Conv_0") shift when a layer is added.
    parts = {part for path in flatten_dict(variables["params"]) for part in path}
    assert all(part == part.lower() for part in parts)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("train", [False, True])
def test_output_is_one_row_of_logits_per_image(family: str, train: bool) -> None:
    net = TINY[family]
    images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
    logits, updates = jax.eval_shape(
        functools.partial(net.apply, train=train, mutable=["batch_stats"]), shapes(net), images
    )
    assert (logits.shape, logits.dtype) == ((5, 10), jnp.float32)
    assert bool(updates) is True


@pytest.mark.parametrize("family", sorted(TINY.keys() - {"vgg_hidden"}))
def test_any_image_size_is_accepted(family: str) -> None:
    net = TINY[family]
    images = jax.ShapeDtypeStruct((1, 48, 40, 3), jnp.float32)
    assert jax.eval_shape(net.apply, shapes(net), images).shape == (1, 10)


@pytest.mark.parametrize("family", TINY)
def test_convolutions_are_padded_as_in_torch(family: str) -> None:
    net = TINY[family]
    jaxpr = jax.make_jaxpr(net.apply)(shapes(net), IMAGE).jaxpr
    convs = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    kernels = [leaf for leaf in jax.tree.leaves(shapes(net)["params"]) if len(leaf.shape) == 4]
    assert len(convs) == len(kernels)
    for conv in convs:
        pad = conv.invars[1].aval.shape[0] // 2
        assert tuple(conv.params["padding"]) == ((pad, pad), (pad, pad))


@pytest.mark.parametrize("family", TINY)
def test_a_real_forward_pass_is_finite(family: str) -> None:
    logits, variables = tiny_run(family)
    assert logits.shape == (1, 10)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((logits, variables)))


@pytest.mark.parametrize("family", TINY)
def test_initialisation(family: str) -> None:
    _, variables = tiny_run(family)
    params = flatten_dict(jax.device_get(variables["params"]))
    standardised = []
    for path, value in params.items():
        if value.ndim == 4:
            height, width, _, out = value.shape
            standardised.append(value.ravel() * math.sqrt(height * width * out / 2))
        elif value.ndim == 2:
            bound = 1 / math.sqrt(value.shape[0])
            assert 0.8 * bound < np.abs(value).max() <= bound, path
        else:
            assert np.all(value == (1.0 if path[-1] == "scale" else 0.0)), path
    pooled = np.concatenate(standardised)
    # Five standard errors of the standard deviation of a normal sample.
    assert abs(pooled.std() - 1) < 5 / math.sqrt(2 * pooled.size)
    # A truncated normal would end at two standard deviations.
    assert np.abs(pooled).max() > 3


@pytest.mark.parametrize("train", [False, True])
def test_dropout_needs_a_key_only_while_training(train: bool) -> None:
    net = WideResNet(10, 1.0, dropout=0.3)
    assert "dropout" not in shapes(net)["params"]["stage1_block0"]
    apply = functools.partial(net.apply, train=train, mutable=["batch_stats"])
    rngs = {"rngs": {"dropout": jax.random.PRNGKey(0)}} if train else {}
    logits, _ = jax.eval_shape(functools.partial(apply, **rngs), shapes(net), IMAGE)
    assert logits.shape == (1, 10)


def test_submodules_have_stable_names() -> None:
    params = shapes(WideResNet(16, 1.0))["params"]
    blocks = [f"stage{stage}_block{block}" for stage in (1, 2, 3) for block in (0, 1)]
    assert set(params) == {"stem", *blocks, "norm", "head"}
    assert set(params["stage1_block0"]) == {"norm1", "conv1", "norm2", "conv2"}
    assert set(params["stage2_block0"]) == {"norm1", "conv1", "norm2", "conv2", "shortcut"}
    bottleneck = shapes(TINY["resnet_bottleneck"])["params"]["stage2_block0"]
    triple = {f"{kind}{i}" for kind in ("conv", "norm") for i in (1, 2, 3)}
    assert set(bottleneck) == {*triple, "shortcut", "shortcut_norm"}
    inverted = shapes(TINY["mobilenet_v2"])["params"]
    assert set(inverted["stage1_block0"]) == {"conv2", "norm2", "conv3", "norm3"}
    assert set(inverted["stage2_block0"]) == triple


def test_named_understands_parameters() -> None:
    assert named("wrn-40-1.5") == WideResNet(40, 1.5)
    assert named("wrn-10-0.5", 100) == WideResNet(10, 0.5, 100)
    assert named("densenet-bc-40-24") == DenseNet(40, 24)
    assert named("resnext-29-2x64d") == ResNeXt(29, 2, 64)
    assert named("resnext-29") == named("resnext-29-8x64d")
    assert named("mobilenet-v2-0.5-imagenet", 1000) == MobileNetV2(1000, 0.5, "imagenet")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "wrn",
        "wrn-40",
        "wrn-41-2",
        "wrn-4-2",
        "wrn-40-0",
        "wrn-40-x",
        "wrn-40-2\n",
        "wrn-40-2-imagenet",
        "WRN-40-2",
        "resnet-19",
        "resnext-29-0x64d",
        "densenet-bc-100-0",
        "densenet-bc-101-12",
        "mobilenet-v2-0",
        "vgg-16-imagenet-imagenet",
    ],
)
def test_malformed_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))) as caught:
        named(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(", ".join(NAMES))


def test_depth_errors_say_what_a_depth_is() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 4"):
        named("wrn-41-2")
    for net in (WideResNet(12), DenseNet(12), ResNeXt(12)):
        with pytest.raises(ValueError, match="depth must be"):
            shapes(net)


def test_unknown_stems_are_refused() -> None:
    for net in (ResNet((1,), widths=(8,), stem="cifar10"), MobileNetV2(stem="cifar10")):
        with pytest.raises(ValueError, match="stem must be 'cifar' or 'imagenet'"):
            shapes(net)


def test_networks_import_nothing_else_of_nnopt() -> None:
    folder = Path(networks.__file__).parent
    for file in folder.glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add("." * node.level + (node.module or ""))
        ours = {module for module in imported if module.startswith((".", "nnopt"))}
        if file.name == "__init__.py":
            ours = {module for module in ours if not module.startswith("nnopt.networks.")}
        assert not ours, file.name
