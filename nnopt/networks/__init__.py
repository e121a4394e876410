"""Reference networks in plain Flax linen, to be rewritten, scored, trained and measured.

Images are `[batch, height, width, channels]` in float32. Every submodule has an explicit name, so
that paths stay the same from version to version. Nothing here knows of the rest of nnopt: a network
of your own is as good a start as one of these.
"""

import re

from flax import linen as nn

from nnopt.networks.densenet import DenseLayer, DenseNet, Transition
from nnopt.networks.mobilenet_v2 import InvertedResidual, MobileNetV2, mobilenet_v2
from nnopt.networks.resnet import (
    BasicBlock,
    Bottleneck,
    PreActBlock,
    ResNet,
    Stem,
    preact_resnet18,
    preact_resnet34,
    resnet18,
    resnet34,
    resnet50,
)
from nnopt.networks.resnext import ResNeXt, ResNeXtBlock, resnext29
from nnopt.networks.vgg import VGG, vgg16
from nnopt.networks.wide_resnet import WideBlock, WideResNet

__all__ = [
    "NAMES",
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "DenseLayer",
    "DenseNet",
    "InvertedResidual",
    "MobileNetV2",
    "PreActBlock",
    "ResNeXt",
    "ResNeXtBlock",
    "ResNet",
    "Stem",
    "Transition",
    "WideBlock",
    "WideResNet",
    "mobilenet_v2",
    "named",
    "preact_resnet18",
    "preact_resnet34",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext29",
    "vgg16",
]

NAMES: tuple[str, ...] = (
    "wrn-40-2",
    "wrn-40-1",
    "wrn-16-2",
    "wrn-16-1",
    "resnet-18",
    "resnet-34",
    "resnet-50",
    "resnet-18-imagenet",
    "resnet-34-imagenet",
    "resnet-50-imagenet",
    "preact-resnet-18",
    "preact-resnet-34",
    "preact-resnet-18-imagenet",
    "preact-resnet-34-imagenet",
    "resnext-29",
    "resnext-29-2x64d",
    "densenet-bc-100-12",
    "vgg-16",
    "vgg-16-imagenet",
    "mobilenet-v2",
    "mobilenet-v2-imagenet",
)

_RESNETS = {
    "resnet-18": resnet18,
    "resnet-34": resnet34,
    "resnet-50": resnet50,
    "preact-resnet-18": preact_resnet18,
    "preact-resnet-34": preact_resnet34,
}


def named(name: str, num_classes: int = 10) -> nn.Module:
    """Returns the network of this name.

    Besides `NAMES`, any depth `6n + 4` and width of `wrn-40-1.5` and `densenet-bc-100-12`, any
    cardinality and base width of `resnext-29-8x64d`, and any width of `mobilenet-v2-0.5` may be
    given. The ending `-imagenet` chooses the layers for large images; the number of classes remains
    `num_classes`.

    >>> named("wrn-16-1.5")
    WideResNet(
        # attributes
        depth = 16
        width = 1.5
        num_classes = 10
        inner = 1.0
        dropout = 0.0
    )

    Raises:
        ValueError: no network has this name. The message is one line and ends with the known names.
    """
    base = name.removesuffix("-imagenet")
    stem: Stem = "cifar" if base == name else "imagenet"
    if base in _RESNETS:
        return _RESNETS[base](num_classes, stem)
    if base == "vgg-16":
        return vgg16(num_classes, hidden=() if stem == "cifar" else (4096, 4096))
    if match := re.fullmatch(r"mobilenet-v2(?:-(\d+(?:\.\d+)?))?", base, re.ASCII):
        width = float(match[1] or 1)
        if width == 0:
            raise _unknown(name, "its width is 0")
        return mobilenet_v2(num_classes, width, stem)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+(?:\.\d+)?)", name, re.ASCII):
        depth, width = int(match[1]), float(match[2])
        _check_depth(name, depth)
        if int(16 * width) < 1:
            raise _unknown(name, "its width leaves no channels")
        return WideResNet(depth, width, num_classes)
    if match := re.fullmatch(r"densenet-bc-(\d+)-(\d+)", name, re.ASCII):
        depth, growth = int(match[1]), int(match[2])
        _check_depth(name, depth)
        if growth < 1:
            raise _unknown(name, "its growth is 0")
        return DenseNet(depth, growth, num_classes=num_classes)
    if match := re.fullmatch(r"resnext-29(?:-(\d+)x(\d+)d)?", name, re.ASCII):
        cardinality, base_width = int(match[1] or 8), int(match[2] or 64)
        if cardinality < 1 or base_width < 1:
            raise _unknown(name, "its cardinality or its base width is 0")
        return resnext29(num_classes, cardinality, base_width)
    raise _unknown(name)


def _check_depth(name: str, depth: int) -> None:
    if depth < 10 or depth % 6 != 4:
        raise _unknown(name, f"its depth must be 6n + 4 (10, 16, 22, ...), not {depth}")


def _unknown(name: str, reason: str = "") -> ValueError:
    detail = f" ({reason})" if reason else ""
    return ValueError(f"no network is named {name!r}{detail}; known names: {', '.join(NAMES)}")
