"""MobileNetV2 (Sandler et al., https://arxiv.org/abs/1801.04381)."""

from functools import partial
from typing import Literal

import jax
from flax import linen as nn

Stem = Literal["cifar", "imagenet"]

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Padding is written out: "SAME" would pad a strided convolution on one side only.
conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=HE_FAN_OUT)
conv1x1 = partial(nn.Conv, kernel_size=(1, 1), padding=0, use_bias=False, kernel_init=HE_FAN_OUT)
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)

# (expansion, channels, blocks, stride) of each stage: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def round_to_eight(channels: float) -> int:
    """Nearest multiple of 8, at least 8, and never more than a tenth below `channels`.

    >>> round_to_eight(24 * 0.75), round_to_eight(16 * 0.75), round_to_eight(1)
    (24, 16, 8)
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class InvertedResidual(nn.Module):
    """Block whose depthwise 3x3 convolution is `expansion` times wider than its input.

        x --+--> conv1 (1x1) -> norm1 -> relu6 -> conv2 (3x3, depthwise) -> norm2 -> relu6
            |                                          -> conv3 (1x1) -> norm3 --(+)--> y
            +--> identity, where the shapes agree --------------------------------+

    Without expansion there is no `conv1` and no `norm1`; the others keep their names.

    Attributes:
        features: channels of the output.
        expansion: channels of the depthwise convolution as a multiple of the input's.
        stride: stride of `conv2`.
    """

    features: int
    expansion: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        inner = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = conv1x1(inner, name="conv1")(y)
            y = nn.relu6(batch_norm(use_running_average=not train, name="norm1")(y))
        y = conv3x3(inner, strides=self.stride, feature_group_count=inner, name="conv2")(y)
        y = nn.relu6(batch_norm(use_running_average=not train, name="norm2")(y))
        y = conv1x1(self.features, name="conv3")(y)
        y = batch_norm(use_running_average=not train, name="norm3")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """Seven stages of inverted residuals between a 3x3 stem and a 1x1 tail.

        stem -> stem_norm -> relu6 -> stage1 -> ... -> stage7
             -> tail (1x1) -> tail_norm -> relu6 -> global mean -> head

    Attributes:
        num_classes: number of logits.
        width: multiple of all widths (of the tail's only if above 1), rounded to multiples of 8.
        stem: `"imagenet"` halves the resolution in the stem and in stages 2, 3, 4 and 6; `"cifar"`
            only in stages 3, 4 and 6, so that 32 x 32 images end at 4 x 4.
        dropout: probability of dropping an input of `head` while training (0.2 in torchvision).
    """

    num_classes: int = 10
    width: float = 1.0
    stem: Stem = "cifar"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`.

        Raises:
            ValueError: the stem is neither `"cifar"` nor `"imagenet"`.
        """
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f"MobileNetV2: stem must be 'cifar' or 'imagenet', not {self.stem!r}")
        imagenet = self.stem == "imagenet"
        features = round_to_eight(32 * self.width)
        x = conv3x3(features, strides=2 if imagenet else 1, name="stem")(x)
        x = nn.relu6(batch_norm(use_running_average=not train, name="stem_norm")(x))
        for stage, (expansion, channels, blocks, stride) in enumerate(STAGES, start=1):
            if stage == 2 and not imagenet:
                stride = 1
            for block in range(blocks):
                x = InvertedResidual(
                    features=round_to_eight(channels * self.width),
                    expansion=expansion,
                    stride=stride if block == 0 else 1,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = conv1x1(round_to_eight(1280 * max(1.0, self.width)), name="tail")(x)
        x = nn.relu6(batch_norm(use_running_average=not train, name="tail_norm")(x))
        x = x.mean(axis=(1, 2))
        if self.dropout > 0:
            x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=TORCH_LINEAR, name="head")(x)


def mobilenet_v2(num_classes: int = 10, width: float = 1.0, stem: Stem = "cifar") -> MobileNetV2:
    """MobileNetV2 with all widths multiplied by `width`."""
    return MobileNetV2(num_classes, width, stem)
