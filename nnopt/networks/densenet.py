"""DenseNet-BC for CIFAR (Huang et al., https://arxiv.org/abs/1608.06993)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=HE_FAN_OUT)
conv1x1 = partial(nn.Conv, kernel_size=(1, 1), padding=0, use_bias=False, kernel_init=HE_FAN_OUT)
batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class DenseLayer(nn.Module):
    """Bottleneck layer that appends its output to its input.

        x --+--> norm1 -> relu -> conv1 (1x1) -> norm2 -> relu -> conv2 (3x3) --> concatenate --> y
            +------------------------------------------------------------------------^

    Attributes:
        growth: channels appended.
        inner: channels between the two convolutions.
    """

    growth: int
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height, width, in + growth]`."""
        y = nn.relu(batch_norm(use_running_average=not train, name="norm1")(x))
        y = conv1x1(self.inner, name="conv1")(y)
        y = nn.relu(batch_norm(use_running_average=not train, name="norm2")(y))
        y = conv3x3(self.growth, name="conv2")(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Narrows the concatenation and halves its resolution: norm1, relu, conv1 (1x1), average pool.

    Attributes:
        features: channels of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/2, width/2, features]`."""
        x = nn.relu(batch_norm(use_running_average=not train, name="norm1")(x))
        x = conv1x1(self.features, name="conv1")(x)
        return nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4


class DenseNet(nn.Module):
    """DenseNet-BC-depth-growth: three dense stages with a transition after the first two.

        stem 3x3, 2k -> stage1 -> transition1 -> stage2 -> transition2 -> stage3
             -> norm -> relu -> global mean -> head

    Attributes:
        depth: number of convolutions along the main path and the head, `6n + 4` for `n` layers in a
            stage.
        growth: channels each layer appends, the paper's k.
        reduction: share of the channels that a transition keeps, rounded down to whole channels.
        num_classes: number of logits.
        inner: channels inside a layer as a multiple of `4 * growth`, rounded down.
    """

    depth: int = 100
    growth: int = 12
    reduction: float = 0.5
    num_classes: int = 10
    inner: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`.

        Raises:
            ValueError: the depth is not `6n + 4`.
        """
        layers, remainder = divmod(self.depth - 4, 6)
        if layers < 1 or remainder:
            raise ValueError(f"DenseNet: depth must be 6n + 4 (10, 16, 22, ...), not {self.depth}")
        x = conv3x3(2 * self.growth, name="stem")(x)
        for stage in (1, 2, 3):
            for layer in range(layers):
                x = DenseLayer(
                    growth=self.growth,
                    inner=int(4 * self.growth * self.inner),
                    name=f"stage{stage}_block{layer}",
                )(x, train)
            if stage < 3:
                kept = int(x.shape[-1] * self.reduction)
                x = Transition(kept, name=f"transition{stage}")(x, train)
        x = nn.relu(batch_norm(use_running_average=not train, name="norm")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=TORCH_LINEAR, name="head")(x)
