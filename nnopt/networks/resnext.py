"""ResNeXt for CIFAR (Xie et al., https://arxiv.org/abs/1611.05431)."""

from functools import partial

import jax
from flax import linen as nn

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Padding is written out: "SAME" would pad a strided convolution on one side only.
conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=HE_FAN_OUT)
conv1x1 = partial(nn.Conv, kernel_size=(1, 1), padding=0, use_bias=False, kernel_init=HE_FAN_OUT)
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class ResNeXtBlock(nn.Module):
    """Post-activation block around a grouped 3x3 convolution.

        x --+--> conv1 (1x1) -> norm1 -> relu -> conv2 (3x3, groups) -> norm2 -> relu
            |                                       -> conv3 (1x1) -> norm3 --(+)--> relu --> y
            +--> identity, or shortcut (1x1) -> shortcut_norm -----------------+

    Attributes:
        features: channels of the output.
        inner: channels into and out of the grouped convolution.
        groups: number of groups of the grouped convolution.
        stride: stride of `conv2` and of `shortcut`.
    """

    features: int
    inner: int
    groups: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        y = conv1x1(self.inner, name="conv1")(x)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm1")(y))
        y = conv3x3(self.inner, strides=self.stride, feature_group_count=self.groups, name="conv2")(
            y
        )
        y = nn.relu(batch_norm(use_running_average=not train, name="norm2")(y))
        y = conv1x1(self.features, name="conv3")(y)
        y = batch_norm(use_running_average=not train, name="norm3")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv1x1(self.features, strides=self.stride, name="shortcut")(x)
            x = batch_norm(use_running_average=not train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNeXt(nn.Module):
    """ResNeXt-depth, cardinality x base_width d: three stages of grouped bottlenecks.

        stem 3x3, 64 -> stem_norm -> relu -> stage1: 256 -> stage2: 512, stride 2
             -> stage3: 1024, stride 2 -> global mean -> head

    Attributes:
        depth: number of convolutions along the main path and the head, `9n + 2` for `n` blocks in a
            stage.
        cardinality: number of groups.
        base_width: channels of one group in the first stage; doubled with each stage.
        num_classes: number of logits.
    """

    depth: int = 29
    cardinality: int = 8
    base_width: int = 64
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`.

        Raises:
            ValueError: the depth is not `9n + 2`.
        """
        blocks, remainder = divmod(self.depth - 2, 9)
        if blocks < 1 or remainder:
            raise ValueError(f"ResNeXt: depth must be 9n + 2 (11, 20, 29, ...), not {self.depth}")
        x = conv3x3(64, name="stem")(x)
        x = nn.relu(batch_norm(use_running_average=not train, name="stem_norm")(x))
        for stage, features in enumerate((256, 512, 1024), start=1):
            for block in range(blocks):
                x = ResNeXtBlock(
                    features=features,
                    inner=self.cardinality * self.base_width * 2 ** (stage - 1),
                    groups=self.cardinality,
                    stride=2 if stage > 1 and block == 0 else 1,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=TORCH_LINEAR, name="head")(x)


def resnext29(num_classes: int = 10, cardinality: int = 8, base_width: int = 64) -> ResNeXt:
    """ResNeXt-29, by default the paper's 8x64d."""
    return ResNeXt(29, cardinality, base_width, num_classes)
