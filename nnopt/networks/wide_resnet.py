"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, https://arxiv.org/abs/1605.07146)."""

from functools import partial

import jax
from flax import linen as nn

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Padding is written out: "SAME" would pad a strided convolution on one side only.
conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=HE_FAN_OUT)
conv1x1 = partial(nn.Conv, kernel_size=(1, 1), padding=0, use_bias=False, kernel_init=HE_FAN_OUT)
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class WideBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions.

        x ---+--> norm1 -> relu --+--> conv1 -> norm2 -> relu -> conv2 --(+)--> y
             |                    |                                      |
             | same shape         +--> shortcut (1x1, another shape) ----+
             +-----------------------------------------------------------+

    Attributes:
        features: channels of the output.
        inner: channels between the two convolutions.
        stride: stride of `conv1` and of `shortcut`.
        dropout: probability of dropping an input of `conv2` while training.
    """

    features: int
    inner: int
    stride: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        active = nn.relu(batch_norm(use_running_average=not train, name="norm1")(x))
        y = conv3x3(self.inner, strides=self.stride, name="conv1")(active)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm2")(y))
        if self.dropout > 0:
            y = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(y)
        y = conv3x3(self.features, name="conv2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            # The shortcut shares the branch's activation, so it needs no normalisation of its own.
            x = conv1x1(self.features, strides=self.stride, name="shortcut")(active)
        return x + y


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of pre-activation blocks.

        stem 3x3, 16 -> stage1: 16w -> stage2: 32w, stride 2 -> stage3: 64w, stride 2
             -> norm -> relu -> global mean -> head

    Attributes:
        depth: number of convolutions along the main path, `6n + 4` for `n` blocks in a stage.
        width: multiple of the stages' widths (16, 32, 64), rounded down to whole channels.
        num_classes: number of logits.
        inner: channels inside a block as a multiple of its output, rounded down to whole channels.
        dropout: probability of dropping an input of `conv2` while training.
    """

    depth: int = 40
    width: float = 2.0
    num_classes: int = 10
    inner: float = 1.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`.

        Raises:
            ValueError: the depth is not `6n + 4`.
        """
        blocks, remainder = divmod(self.depth - 4, 6)
        if blocks < 1 or remainder:
            raise ValueError(
                f"WideResNet: depth must be 6n + 4 (10, 16, 22, ...), not {self.depth}"
            )
        x = conv3x3(16, name="stem")(x)
        for stage, base in enumerate((16, 32, 64), start=1):
            features = int(base * self.width)
            for block in range(blocks):
                x = WideBlock(
                    features=features,
                    inner=int(features * self.inner),
                    stride=2 if stage > 1 and block == 0 else 1,
                    dropout=self.dropout,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = nn.relu(batch_norm(use_running_average=not train, name="norm")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=TORCH_LINEAR, name="head")(x)
