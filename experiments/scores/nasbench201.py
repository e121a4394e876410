"""NAS-Bench-201's networks in plain linen (Dong and Yang, https://arxiv.org/abs/2001.00326, figure 1), and their published counts.

    stem -> stem_norm -> stage1 (5 cells, 16 channels, 32 x 32)
         -> reduction2 -> stage2 (5 cells, 32 channels, 16 x 16)
         -> reduction3 -> stage3 (5 cells, 64 channels, 8 x 8) -> norm -> relu -> global mean -> head

All fifteen cells are equal. A cell has four nodes; node 0 is its input, node 3 its output, and each node is the sum of one
operation on each earlier node: five operations on six edges, 15,625 cells.

As published, every operation of a cell is part of the network, those on edges that lead nowhere as well: they have parameters,
they run, and their gradients are zero. An edge of `none` adds nothing. A cell may thus have a constant output: such a network is
a network all the same, and its scores are degenerate.

Counting. The published parameters are everything trainable, affine batch normalisation included. The published FLOPs
count a multiply-accumulate as one, and beside convolutions and the head's matrix product (`nnopt.costs.macs`) also
normalisation (2 for each value), ReLU (1 for each value) and average pooling (the size of its window for each output). Nothing is
counted for `skip_connect`, `none`, sums and the head's bias. With these rules all 4,000 figures are met to the last digit
if the global mean counts 81 for each channel; its window is 8 x 8, so that factor is solved for, not explained.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Operation = Literal["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""(from, to) of a cell's edges, in the order in which the benchmark writes them."""

STAGES = ((16, 32), (32, 16), (64, 8))
"""(channels, side of the square image) of each stage, for 32 x 32 images."""

CELLS_PER_STAGE = 5

Initializer = Callable[..., jax.Array]

# PyTorch's default for convolutions and linear layers, kaiming_uniform with a = sqrt(5), is U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
TORCH_DEFAULT: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


def mean_3x3(x: jax.Array) -> jax.Array:
    """Mean over the 3 x 3 neighbours that lie inside the image, `[batch, height, width, channels]` to the same shape."""
    total = nn.pooling.pool(x, 0.0, jax.lax.add, (3, 3), (1, 1), ((1, 1), (1, 1)))
    # `nn.avg_pool` divides by whole numbers, which strict dtype promotion refuses.
    rows, columns = (
        np.minimum(np.arange(extent) + 2, extent) - np.maximum(np.arange(extent) - 1, 0)
        for extent in x.shape[1:3]
    )
    counts = np.outer(rows, columns).reshape(1, *x.shape[1:3], 1)
    return total / counts.astype(x.dtype)


def mean_2x2(x: jax.Array) -> jax.Array:
    """Mean over squares of 2 x 2, `[batch, height, width, channels]` to `[batch, height/2, width/2, channels]`."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


@dataclasses.dataclass(frozen=True)
class Cell:
    """The operation on each edge of a cell.

    Attributes:
        operations: in the order of `EDGES`.

    Raises:
        ValueError: not six operations, or one that the benchmark does not have.
    """

    operations: tuple[Operation, ...]

    def __post_init__(self) -> None:
        if len(self.operations) != len(EDGES):
            raise ValueError(f"a cell has {len(EDGES)} operations, not {len(self.operations)}")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise ValueError(f"no operation is called {operation!r}; {', '.join(OPERATIONS)}")

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Reads the benchmark's notation.

        Raises:
            ValueError: `text` is not a cell in that notation.

        Example:
            >>> cell = Cell.parse("|none~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|none~1|avg_pool_3x3~2|")
            >>> cell.operations[3:]
            ('nor_conv_1x1', 'none', 'avg_pool_3x3')
        """
        nodes = text.split("+")
        edges: list[Any] = []
        for number, node in enumerate(nodes, start=1):
            found = [edge.rpartition("~") for edge in node.strip("|").split("|")]
            sources = [source for _, _, source in found]
            if sources != [str(i) for i in range(number)] or len(nodes) != 3:
                raise ValueError(f"{text!r} is not of the form |op~0|+|op~0|op~1|+|op~0|op~1|op~2|")
            edges.extend(name for name, _, _ in found)
        return cls(tuple(edges))

    def __str__(self) -> str:
        parts: dict[int, str] = {}
        for (source, node), operation in zip(EDGES, self.operations, strict=True):
            parts[node] = parts.get(node, "|") + f"{operation}~{source}|"
        return "+".join(parts.values())

    def count(self, operation: Operation) -> int:
        """How many edges have this operation."""
        return self.operations.count(operation)


class ReLUConvNorm(nn.Module):
    """relu -> conv -> norm.

    Attributes:
        features: channels of the output.
        kernel: side of the convolution's square window.
        stride: its stride.
        kernel_init: initialiser of its kernel.
    """

    features: int
    kernel: int
    stride: int = 1
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/stride, width/stride, features]`."""
        x = nn.Conv(
            self.features,
            kernel_size=(self.kernel, self.kernel),
            strides=self.stride,
            padding=self.kernel // 2,
            use_bias=False,
            kernel_init=self.kernel_init,
            name="conv",
        )(nn.relu(x))
        return batch_norm(use_running_average=not train, name="norm")(x)


class CellNetwork(nn.Module):
    """One cell: each node is the sum of an operation on each earlier node.

    Attributes:
        cell: the operation on each edge.
        kernel_init: initialiser of convolution kernels.
    """

    cell: Cell
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, channels]` to the same shape."""
        terms: dict[int, list[jax.Array]] = {1: [], 2: [], 3: []}
        nodes = [x]
        for (source, node), operation in zip(EDGES, self.cell.operations, strict=True):
            if len(nodes) < node:
                nodes.append(_sum(terms[node - 1], x))
            y = nodes[source]
            match operation:
                case "skip_connect":
                    terms[node].append(y)
                case "avg_pool_3x3":
                    terms[node].append(mean_3x3(y))
                case "nor_conv_1x1" | "nor_conv_3x3":
                    convolve = ReLUConvNorm(
                        x.shape[-1],
                        kernel=3 if operation == "nor_conv_3x3" else 1,
                        kernel_init=self.kernel_init,
                        name=f"edge{source}{node}",
                    )
                    terms[node].append(convolve(y, train))
        return _sum(terms[3], x)


def _sum(terms: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    # Nothing but `none` is written as published, as the input times zero: a layer behind it still depends on the input.
    return sum(terms[1:], start=terms[0]) if terms else 0.0 * like


class Reduction(nn.Module):
    """Residual block that halves the resolution.

        x --+--> a (relu-conv3x3-norm, stride 2) -> b (relu-conv3x3-norm) --(+)--> y
            +--> 2 x 2 mean -> shortcut (1x1) ------------------------------+

    Attributes:
        features: channels of the output.
        kernel_init: initialiser of convolution kernels.
    """

    features: int
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height/2, width/2, features]`."""
        init = self.kernel_init
        y = ReLUConvNorm(self.features, kernel=3, stride=2, kernel_init=init, name="a")(x, train)
        y = ReLUConvNorm(self.features, kernel=3, kernel_init=init, name="b")(y, train)
        x = mean_2x2(x)
        shortcut = nn.Conv(self.features, (1, 1), use_bias=False, kernel_init=init, name="shortcut")
        return shortcut(x) + y


class NASBench201(nn.Module):
    """The network of a cell; see the module's docstring.

    Attributes:
        cell: stands in all fifteen places.
        num_classes: number of logits.
        kernel_init: initialiser of convolution kernels and of the head's kernel. The benchmark trains from PyTorch's default, and
            training-free scores are published at it (zero-cost proxies, NASWOT).
    """

    cell: Cell
    num_classes: int = 10
    kernel_init: Initializer = TORCH_DEFAULT

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits `[batch, num_classes]` for images `[batch, height, width, channels]`."""
        init = self.kernel_init
        width = STAGES[0][0]
        x = nn.Conv(width, (3, 3), padding=1, use_bias=False, kernel_init=init, name="stem")(x)
        x = batch_norm(use_running_average=not train, name="stem_norm")(x)
        for stage, (features, _) in enumerate(STAGES, start=1):
            if stage > 1:
                x = Reduction(features, kernel_init=init, name=f"reduction{stage}")(x, train)
            for i in range(CELLS_PER_STAGE):
                name = f"stage{stage}_cell{i}"
                x = CellNetwork(self.cell, kernel_init=init, name=name)(x, train)
        x = nn.relu(batch_norm(use_running_average=not train, name="norm")(x))
        x = x.mean(axis=(1, 2))
        head = nn.Dense(
            self.num_classes, kernel_init=init, bias_init=torch_bias(x.shape[-1]), name="head"
        )
        return head(x)


def torch_bias(fan_in: int) -> Initializer:
    """PyTorch's default bias, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); a bias's own shape does not tell `fan_in`."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def published_parameters(cell: Cell, num_classes: int = 10) -> int:
    """Number of trainable values, as the benchmark publishes it."""
    total = 3 * 9 * STAGES[0][0] + 2 * STAGES[0][0]
    for before, features in _reductions():
        total += 9 * before * features + 9 * features**2 + 4 * features + before * features
    for features, _ in STAGES:
        for operation, window in (("nor_conv_1x1", 1), ("nor_conv_3x3", 9)):
            each = window * features**2 + 2 * features
            total += CELLS_PER_STAGE * cell.count(operation) * each
    last = STAGES[-1][0]
    return total + 2 * last + last * num_classes + num_classes


def convolution_macs(cell: Cell, num_classes: int = 10) -> int:
    """Multiply-accumulates of convolutions and the head for one 32 x 32 image: what `nnopt.costs.macs` counts."""
    total = 3 * 9 * STAGES[0][0] * STAGES[0][1] ** 2
    for (before, features), (_, side) in zip(_reductions(), STAGES[1:], strict=True):
        total += (9 * before * features + 9 * features**2 + before * features) * side**2
    for features, side in STAGES:
        windows = cell.count("nor_conv_1x1") + 9 * cell.count("nor_conv_3x3")
        total += CELLS_PER_STAGE * windows * features**2 * side**2
    return total + STAGES[-1][0] * num_classes


def published_flops(cell: Cell, num_classes: int = 10) -> int:
    """FLOPs for one 32 x 32 image, as the benchmark's table gives them; the module's docstring says what is counted."""
    values = [features * side**2 for features, side in STAGES]
    convolutions = cell.count("nor_conv_1x1") + cell.count("nor_conv_3x3")
    norms = values[0] + sum(2 * v for v in values[1:]) + values[-1]
    # A reduction's first ReLU stands before its stride.
    relus = sum(values[:-1]) + sum(values[1:]) + values[-1]
    pools = sum(4 * features * side**2 for (features, _), (_, side) in itertools.pairwise(STAGES))
    in_cells = (3 * convolutions + 9 * cell.count("avg_pool_3x3")) * sum(values)
    return (
        convolution_macs(cell, num_classes)
        + CELLS_PER_STAGE * in_cells
        + 2 * norms
        + relus
        + pools
        + 81 * STAGES[-1][0]
    )


def _reductions() -> list[tuple[int, int]]:
    widths = [features for features, _ in STAGES]
    return list(itertools.pairwise(widths))
