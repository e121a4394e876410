"""NAS-Bench-Macro's networks in plain linen (Su et al., https://arxiv.org/abs/2103.11922, section 5), and their published counts.

    stem (3x3) -> stem_norm -> relu -> layer1 ... layer8 -> tail (1x1) -> tail_norm -> relu -> global mean -> head

Eight layers in stages of 2, 3 and 3; the first layer of a stage halves the resolution and doubles the channels
(32 -> 64 -> 128 -> 256).
Each layer is one of three blocks, 6,561 networks:

    0   identity; where the shape changes, a strided 1x1 convolution and its normalisation
    1   MobileNetV2 block, expansion 3, 3x3 window
    2   MobileNetV2 block, expansion 6, 5x5 window

Unlike in MobileNetV2 the activation is ReLU, not ReLU6. The published FLOPs are multiply-accumulates of convolutions and
of the head's matrix product, as `nnopt.costs.macs` counts them; the published parameters are everything trainable.
"""

import dataclasses
from functools import partial

import jax
from flax import linen as nn

from experiments.scores.nasbench201 import TORCH_DEFAULT, Initializer, torch_bias

STAGES = (2, 3, 3)
"""Layers of each stage."""

STEM_WIDTH = 32
TAIL_WIDTH = 1280
SIDE = 32
"""Side of the square input image in pixels."""

BLOCKS: tuple[tuple[int, int] | None, ...] = (None, (3, 3), (6, 5))
"""(expansion, window) of each choice; None is the identity."""

batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The block of each layer.

    Attributes:
        choices: eight of 0, 1, 2.

    Raises:
        ValueError: not eight choices, or another digit.
    """

    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.choices) != sum(STAGES) or not set(self.choices) <= set(range(len(BLOCKS))):
            raise ValueError(f"{str(self)!r} is not {sum(STAGES)} digits of 0, 1 and 2")

    @classmethod
    def parse(cls, text: str) -> "Layers":
        """Reads the benchmark's notation, such as `00111012`.

        Raises:
            ValueError: `text` is not eight digits of 0, 1 and 2.
        """
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{text!r} is not {sum(STAGES)} digits of 0, 1 and 2")
        return cls(tuple(int(digit) for digit in text))

    def __str__(self) -> str:
        return "".join(str(choice) for choice in self.choices)


class Projection(nn.Module):
    """What stands for the identity where the shape changes: conv (1x1) -> norm.

    Attributes:
        features: channels of the output.
        stride: stride of the convolution.
        kernel_init: initialiser of its kernel.
    """

    features: int
    stride: int
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        convolve = nn.Conv(
            self.features,
            (1, 1),
            strides=self.stride,
            padding=0,
            use_bias=False,
            kernel_init=self.kernel_init,
            name="conv",
        )
        return batch_norm(use_running_average=not train, name="norm")(convolve(x))


class InvertedResidual(nn.Module):
    """MobileNetV2's block with ReLU.

        x --+--> conv1 (1x1) -> norm1 -> relu -> conv2 (depthwise) -> norm2 -> relu
            |                                          -> conv3 (1x1) -> norm3 --(+)--> y
            +--> identity, where the shapes agree --------------------------------+

    Attributes:
        features: channels of the output.
        expansion: channels of the depthwise convolution as a multiple of the input's.
        window: side of the depthwise convolution's window.
        stride: its stride.
        kernel_init: initialiser of convolution kernels.
    """

    features: int
    expansion: int
    window: int
    stride: int = 1
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        inner = x.shape[-1] * self.expansion
        conv = partial(nn.Conv, use_bias=False, kernel_init=self.kernel_init)
        norm = partial(batch_norm, use_running_average=not train)
        y = nn.relu(norm(name="norm1")(conv(inner, (1, 1), name="conv1")(x)))
        y = conv(
            inner,
            (self.window, self.window),
            strides=self.stride,
            padding=self.window // 2,
            feature_group_count=inner,
            name="conv2",
        )(y)
        y = nn.relu(norm(name="norm2")(y))
        y = norm(name="norm3")(conv(self.features, (1, 1), name="conv3")(y))
        return x + y if x.shape == y.shape else y


class NASBenchMacro(nn.Module):
    """The network of eight choices; see the module's docstring.

    Attributes:
        layers: the choices.
        num_classes: number of logits.
        kernel_init: initialiser of convolution kernels and of the head's kernel; PyTorch's default, from which the benchmark
            trains.
    """

    layers: Layers
    num_classes: int = 10
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`."""
        conv = partial(nn.Conv, use_bias=False, kernel_init=self.kernel_init)
        norm = partial(batch_norm, use_running_average=not train)
        x = nn.relu(norm(name="stem_norm")(conv(STEM_WIDTH, (3, 3), padding=1, name="stem")(x)))
        for number, (choice, features, stride) in enumerate(_plan(self.layers), start=1):
            name, init = f"layer{number}", self.kernel_init
            block = BLOCKS[choice]
            if block is not None:
                residual = InvertedResidual(features, *block, stride, init, name=name)
                x = residual(x, train)
            elif stride != 1:
                x = Projection(features, stride, init, name=name)(x, train)
        x = nn.relu(norm(name="tail_norm")(conv(TAIL_WIDTH, (1, 1), name="tail")(x)))
        head = nn.Dense(
            self.num_classes,
            kernel_init=self.kernel_init,
            bias_init=torch_bias(TAIL_WIDTH),
            name="head",
        )
        return head(x.mean(axis=(1, 2)))


def published_parameters(layers: Layers, num_classes: int = 10) -> int:
    """Number of trainable values, as the benchmark publishes it."""
    before = STEM_WIDTH
    total = 3 * 9 * before + 2 * before
    for choice, features, stride in _plan(layers):
        block = BLOCKS[choice]
        if block is not None:
            inner = before * block[0]
            total += before * inner + block[1] ** 2 * inner + inner * features
            total += 2 * (inner + inner + features)
        elif stride != 1:
            total += before * features + 2 * features
        before = features
    total += before * TAIL_WIDTH + 2 * TAIL_WIDTH
    return total + TAIL_WIDTH * num_classes + num_classes


def published_flops(layers: Layers, num_classes: int = 10) -> int:
    """Multiply-accumulates for one 32 x 32 image, as the benchmark publishes them."""
    before, side = STEM_WIDTH, SIDE
    total = 3 * 9 * before * side**2
    for choice, features, stride in _plan(layers):
        after = side // stride
        block = BLOCKS[choice]
        if block is not None:
            inner = before * block[0]
            total += before * inner * side**2
            total += (block[1] ** 2 * inner + inner * features) * after**2
        elif stride != 1:
            total += before * features * after**2
        before, side = features, after
    return total + before * TAIL_WIDTH * side**2 + TAIL_WIDTH * num_classes


def _plan(layers: Layers) -> list[tuple[int, int, int]]:
    """(choice, channels of the output, stride) of each layer."""
    plan, choices, features = [], iter(layers.choices), STEM_WIDTH
    for size in STAGES:
        features *= 2
        plan += [(next(choices), features, 2 if i == 0 else 1) for i in range(size)]
    return plan
