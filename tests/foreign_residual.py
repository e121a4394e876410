"""Residual networks as other people write them, one for each way to tell a block whether it is training."""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn


class PartialBlock(nn.Module):
    """The residual block of Flax's ImageNet example: convolution and norm come as factories in fields."""

    filters: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    act: Callable[..., Any] = nn.relu
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class PartialResNet(nn.Module):
    """The ResNet of Flax's ImageNet example."""

    stages: tuple[int, ...] = (1, 2)
    filters: int = 8
    block_cls: Callable[..., nn.Module] = PartialBlock

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="bn_init")(conv(self.filters, (3, 3), name="conv_init")(x)))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = self.block_cls(
                    self.filters * 2**stage,
                    conv=conv,
                    norm=norm,
                    strides=(2, 2) if stage > 0 and block == 0 else (1, 1),
                )(x)
        return nn.Dense(4)(x.mean(axis=(1, 2)))


class FieldBlock(nn.Module):
    """A residual block whose field says whether it is training."""

    features: int
    train: bool

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3))(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not self.train)(y))
        return x + nn.Conv(self.features, (3, 3))(y)


class TrainField(nn.Module):
    """A network told by its call, blocks told by a field, one of them under `nn.remat`."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i in range(2):
            block = nn.remat(FieldBlock) if i else FieldBlock
            x = block(8, train, name=f"block{i}")(x)
        return nn.Dense(4, name="head")(x.mean(axis=(1, 2)))


class Branch(nn.Module):
    """norm, relu, convolution, convolution."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, running: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=running, name="norm")(x))
        x = nn.Conv(self.features, (3, 3), strides=self.stride, name="conv")(x)
        return nn.Conv(self.features, (3, 3), name="mix")(x)


class PositionalBlock(nn.Module):
    """`block(x, train)`."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        y = Branch(self.features, self.stride, name="branch")(x, not train)
        if y.shape != x.shape:
            x = nn.Conv(self.features, (1, 1), strides=self.stride, name="shortcut")(x)
        return x + y


class KeywordBlock(PositionalBlock):
    """`block(x, train=train)`."""

    @nn.compact
    def __call__(self, x, *, train=False):
        y = Branch(self.features, self.stride, name="branch")(x, not train)
        if y.shape != x.shape:
            x = nn.Conv(self.features, (1, 1), strides=self.stride, name="shortcut")(x)
        return x + y


class DeterministicBlock(PositionalBlock):
    """`block(x, deterministic=...)`."""

    @nn.compact
    def __call__(self, x, *, deterministic):
        y = Branch(self.features, self.stride, name="branch")(x, deterministic)
        if y.shape != x.shape:
            x = nn.Conv(self.features, (1, 1), strides=self.stride, name="shortcut")(x)
        return x + y


class InferenceFieldBlock(nn.Module):
    """A setup-style block with a boolean field for inference."""

    features: int
    stride: int = 1
    use_running_average: bool = True

    def setup(self):
        self.norm = nn.BatchNorm(use_running_average=self.use_running_average)
        self.conv = nn.Conv(self.features, (3, 3), strides=self.stride)
        self.mix = nn.Conv(self.features, (3, 3))
        self.shortcut = nn.Conv(self.features, (1, 1), strides=self.stride)

    def __call__(self, x):
        return self.shortcut(x) + self.mix(self.conv(nn.relu(self.norm(x))))


class Residual(nn.Module):
    """A stem, two residual blocks of a style, a head."""

    style: str = "positional"

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for i, (features, stride) in enumerate(((8, 1), (16, 2))):
            name = f"block{i}"
            if self.style == "positional":
                x = PositionalBlock(features, stride, name=name)(x, train)
            elif self.style == "keyword":
                x = KeywordBlock(features, stride, name=name)(x, train=train)
            elif self.style == "deterministic":
                x = DeterministicBlock(features, stride, name=name)(x, deterministic=not train)
            else:
                x = InferenceFieldBlock(features, stride, not train, name=name)(x)
        return nn.Dense(4, name="head")(x.mean(axis=(1, 2)))
