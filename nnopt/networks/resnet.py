"""Residual networks (He et al., https://arxiv.org/abs/1512.03385, https://arxiv.org/abs/1603.05027).

Two arrangements share one skeleton:

* `BasicBlock` and `Bottleneck` normalise after each convolution, as torchvision does. ResNet-34 for
  ImageNet then has 21,797,672 parameters.
* `PreActBlock` normalises before each convolution, as BlockSwap's ImageNet networks do
  (https://arxiv.org/abs/1906.04113). ResNet-34 for ImageNet then has 21,794,984 parameters: 1,792
  fewer because the shortcuts are not normalised, and 896 fewer because the first normalisation of a
  widening block covers its input, not its output. The stem is normalised and the last block's sum
  is not; `final_norm=True` normalises it (21,796,008 parameters).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
from flax import linen as nn

Stem = Literal["cifar", "imagenet"]

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Padding is written out: "SAME" would pad a strided convolution on one side only.
conv7x7 = partial(nn.Conv, kernel_size=(7, 7), padding=3, use_bias=False, kernel_init=HE_FAN_OUT)
conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=HE_FAN_OUT)
conv1x1 = partial(nn.Conv, kernel_size=(1, 1), padding=0, use_bias=False, kernel_init=HE_FAN_OUT)
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class BasicBlock(nn.Module):
    """Post-activation block of two 3x3 convolutions.

        x --+--> conv1 -> norm1 -> relu -> conv2 -> norm2 --(+)--> relu --> y
            |                                                |
            +--> identity, or shortcut (1x1) -> shortcut_norm

    Attributes:
        features: channels of the output and between the convolutions.
        stride: stride of `conv1` and of `shortcut`.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        y = conv3x3(self.features, strides=self.stride, name="conv1")(x)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm1")(y))
        y = conv3x3(self.features, name="conv2")(y)
        y = batch_norm(use_running_average=not train, name="norm2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv1x1(self.features, strides=self.stride, name="shortcut")(x)
            x = batch_norm(use_running_average=not train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """Post-activation block whose 3x3 convolution is four times narrower than its output.

        x --+--> conv1 (1x1) -> norm1 -> relu -> conv2 (3x3) -> norm2 -> relu
            |                               -> conv3 (1x1) -> norm3 --(+)--> relu --> y
            +--> identity, or shortcut (1x1) -> shortcut_norm ---------+

    Attributes:
        features: channels of the output.
        stride: stride of `conv2` and of `shortcut`. (The paper strides `conv1`, which discards
            three quarters of its input; torchvision strides the 3x3.)
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        inner = self.features // 4
        y = conv1x1(inner, name="conv1")(x)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm1")(y))
        y = conv3x3(inner, strides=self.stride, name="conv2")(y)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm2")(y))
        y = conv1x1(self.features, name="conv3")(y)
        y = batch_norm(use_running_average=not train, name="norm3")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv1x1(self.features, strides=self.stride, name="shortcut")(x)
            x = batch_norm(use_running_average=not train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class PreActBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions.

        x ---+--> norm1 -> relu --+--> conv1 -> norm2 -> relu -> conv2 --(+)--> y
             |                    |                                      |
             | same shape         +--> shortcut (1x1, another shape) ----+
             +-----------------------------------------------------------+

    Attributes:
        features: channels of the output and between the convolutions.
        stride: stride of `conv1` and of `shortcut`.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        active = nn.relu(batch_norm(use_running_average=not train, name="norm1")(x))
        y = conv3x3(self.features, strides=self.stride, name="conv1")(active)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm2")(y))
        y = conv3x3(self.features, name="conv2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv1x1(self.features, strides=self.stride, name="shortcut")(active)
        return x + y


class ResNet(nn.Module):
    """Residual network of four stages; every stage but the first halves the resolution.

        stem -> stem_norm -> relu [-> max-pool] -> stage1 -> stage2 -> stage3 -> stage4
             [-> norm -> relu] -> global mean -> head

    Attributes:
        stage_sizes: number of blocks in each stage.
        block: class of the blocks, called as `block(features=..., stride=..., name=...)`.
        num_classes: number of logits.
        stem: `"cifar"` is a 3x3 convolution; `"imagenet"` a 7x7 one with stride 2 and then a
            3x3 max-pool with stride 2.
        widths: channels of each stage's output.
        stem_features: channels of the stem.
        final_norm: whether a normalisation and a ReLU precede the global mean, as pre-activation
            networks have them in He et al. (not in BlockSwap).
    """

    stage_sizes: Sequence[int]
    block: Callable[..., nn.Module] = BasicBlock
    num_classes: int = 10
    stem: Stem = "cifar"
    widths: Sequence[int] = (64, 128, 256, 512)
    stem_features: int = 64
    final_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`.

        Raises:
            ValueError: the stem is neither `"cifar"` nor `"imagenet"`.
        """
        if self.stem == "imagenet":
            x = conv7x7(self.stem_features, strides=2, name="stem")(x)
        elif self.stem == "cifar":
            x = conv3x3(self.stem_features, name="stem")(x)
        else:
            raise ValueError(f"ResNet: stem must be 'cifar' or 'imagenet', not {self.stem!r}")
        x = nn.relu(batch_norm(use_running_average=not train, name="stem_norm")(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        stages = zip(self.stage_sizes, self.widths, strict=True)
        for stage, (blocks, features) in enumerate(stages, start=1):
            for block in range(blocks):
                x = self.block(
                    features=features,
                    stride=2 if stage > 1 and block == 0 else 1,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        if self.final_norm:
            x = nn.relu(batch_norm(use_running_average=not train, name="norm")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=TORCH_LINEAR, name="head")(x)


def resnet18(num_classes: int = 10, stem: Stem = "cifar") -> ResNet:
    """ResNet-18: two basic blocks in each stage."""
    return ResNet((2, 2, 2, 2), BasicBlock, num_classes, stem)


def resnet34(num_classes: int = 10, stem: Stem = "cifar") -> ResNet:
    """ResNet-34: 3, 4, 6, 3 basic blocks."""
    return ResNet((3, 4, 6, 3), BasicBlock, num_classes, stem)


def resnet50(num_classes: int = 10, stem: Stem = "cifar") -> ResNet:
    """ResNet-50: 3, 4, 6, 3 bottleneck blocks."""
    return ResNet((3, 4, 6, 3), Bottleneck, num_classes, stem, widths=(256, 512, 1024, 2048))


def preact_resnet18(
    num_classes: int = 10, stem: Stem = "cifar", final_norm: bool = False
) -> ResNet:
    """ResNet-18 of pre-activation blocks."""
    return ResNet((2, 2, 2, 2), PreActBlock, num_classes, stem, final_norm=final_norm)


def preact_resnet34(
    num_classes: int = 10, stem: Stem = "cifar", final_norm: bool = False
) -> ResNet:
    """ResNet-34 of pre-activation blocks, BlockSwap's ImageNet skeleton."""
    return ResNet((3, 4, 6, 3), PreActBlock, num_classes, stem, final_norm=final_norm)
