"""Pre-activation residual blocks around interchangeable operators (BlockSwap, https://arxiv.org/abs/1906.04113, appendix A)."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from nnopt.layers.conv import Conv

HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features: int, window: int, stride: int = 1, groups: int = 1, *, name: str) -> Conv:
    """A convolution with "same" padding on both sides and no bias, He-initialised for `window^2 * features`."""
    return Conv(
        features,
        (window, window),
        strides=stride,
        padding=window // 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=HE_FAN_OUT,
        name=name,
    )


def norm_relu(x: jax.Array, running: bool, *, name: str) -> jax.Array:
    """Batch normalisation, with running statistics or those of the batch, and ReLU."""
    norm = nn.BatchNorm(use_running_average=running, momentum=0.9, epsilon=1e-5, name=name)
    return nn.relu(norm(x))


class DenseOperator(nn.Module):
    """`conv 3x3, in -> features`.

    Attributes:
        features: channels of the output.
        stride: of the convolution.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, running: bool) -> jax.Array:
        """`[batch, height, width, in]` -> `[batch, height/stride, width/stride, features]`."""
        return conv(self.features, 3, self.stride, name="conv")(x)


class GroupedOperator(nn.Module):
    """`conv 3x3, in -> in, grouped` - norm - relu - `conv 1x1, in -> features`.

    Attributes:
        features: channels of the output.
        groups: of the 3x3 convolution.
        stride: of the 3x3 convolution.
    """

    features: int
    groups: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, running: bool) -> jax.Array:
        """`[batch, height, width, in]` -> `[batch, height/stride, width/stride, features]`."""
        x = conv(x.shape[-1], 3, self.stride, self.groups, name="spatial")(x)
        return conv(self.features, 1, name="pointwise")(norm_relu(x, running, name="norm"))


class BottleneckOperator(nn.Module):
    """`conv 1x1, in -> inner` - norm - relu - `conv 3x3, inner, grouped` - norm - relu - `conv 1x1, inner -> features`.

    Attributes:
        features: channels of the output.
        inner: channels of the 3x3 convolution.
        groups: of the 3x3 convolution.
        stride: of the 3x3 convolution.
    """

    features: int
    inner: int
    groups: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, running: bool) -> jax.Array:
        """`[batch, height, width, in]` -> `[batch, height/stride, width/stride, features]`."""
        x = conv(self.inner, 1, name="reduce")(x)
        x = norm_relu(x, running, name="norm1")
        x = conv(self.inner, 3, self.stride, self.groups, name="spatial")(x)
        return conv(self.features, 1, name="expand")(norm_relu(x, running, name="norm2"))


@dataclasses.dataclass(frozen=True)
class TrainingFlag:
    """Where a block finds out whether its normalisations use running statistics, as the block it stands in for did.

    Attributes:
        running_when: the value of the flag which means running statistics.
        name: of the argument that is the flag; None if it has none, or if a field of the replaced module is the flag.
        position: of that argument; None if it is passed by name alone.
        default: its value where a call leaves it out.
    """

    running_when: bool
    name: str | None = None
    position: int | None = None
    default: bool = False

    def running(self, args: tuple[Any, ...], kwargs: dict[str, Any], source: Any) -> bool:
        """Whether to use running statistics in this call; `source` is the field's value, if a field says so."""
        if self.name is None and self.position is None:
            partial = isinstance(source, functools.partial)
            value = source.keywords["use_running_average"] if partial else source
        elif self.position is not None and self.position < len(args):
            value = args[self.position]
        else:
            value = kwargs.get(self.name or "", self.default)
        return bool(value) == self.running_when


class PreActivationBlock(nn.Module):
    """A residual block of one or two operators.

        x ---+--> norm1 -> relu --+--> op1 [-> norm2 -> relu -> op2] --(+)--> y
             |                    |                                     |
             | same shape         +--> shortcut (1x1, another shape) ---+
             +----------------------------------------------------------+

    It is called like the block it stands in for; all arguments but the first are looked at for the training flag alone.

    Attributes:
        features: channels of the output.
        stride: of `op1` and of the shortcut.
        op1: maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`.
        op2: maps that to the same shape; None for blocks of one operator.
        flag: how to tell training from inference.
        flag_source: the value the flag is read from, if it is a field of the replaced module.
    """

    features: int
    stride: int
    op1: nn.Module
    op2: nn.Module | None
    flag: TrainingFlag
    flag_source: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """`[batch, height, width, in]` -> `[batch, height/stride, width/stride, features]`."""
        running = self.flag.running((x, *args), kwargs, self.flag_source)
        active = norm_relu(x, running, name="norm1")
        y = self.op1(active, running)
        if self.op2 is not None:
            y = self.op2(norm_relu(y, running, name="norm2"), running)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, self.stride, name="shortcut")(active)
        return x + y
