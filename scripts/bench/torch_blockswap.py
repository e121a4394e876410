"""BlockSwap's Fisher potential in PyTorch: what nnopt is checked against, and timed against by `scoring.py`.

    .venv/bin/python scripts/bench/torch_blockswap.py

Needs PyTorch, which nothing else of nnopt does. Loads the weights of nnopt's networks into those below and compares the potential
of each block, in float64 and in float32, for networks that have every block choice at every position. About four minutes on two
cores, most of it compilation of the networks on nnopt's side; `--quick` compares three of them.

Written from the definitions (https://arxiv.org/abs/1906.04113, section 3 and appendix A; block structures as in the table at the
top of `nnopt.rewrites.choice`), with two protocols:

- `Published`: as the released code scores. Contiguous images, a network of fresh weights for each candidate, gradients of all
  weights by `loss.backward()`, a hook at each probe. Left out in its favour: the loading of a fresh minibatch for each candidate
  and the second pass that makes its masks. Its habit of giving all blocks of a stage the structure of the first is not copied.
- `Tuned`: what its owner could make of it without leaving PyTorch. Channels last, frozen weights that are made once for each choice
  at each position, no running statistics, gradients of activations alone and none before the first probe.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy, relu

from nnopt.rewrites.choice import CODE_CHOICES, PAPER_CHOICES, Choice

Candidate = Sequence[Choice]
"""The choice at each position."""


def conv(inputs: int, features: int, window: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Padding on both sides, no bias, He-initialised for `window^2 * features`."""
    layer = nn.Conv2d(
        inputs, features, window, stride, padding=window // 2, groups=groups, bias=False
    )
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (window**2 * features)))
    return layer


def norm_relu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In place where that is safe: nothing but the ReLU reads what the normalisation writes."""
    return relu(norm(x), inplace=True)


def groups_of(choice: Choice, channels: int) -> int:
    """Number of groups of a choice's 3x3 convolution."""
    groups = choice.groups
    if groups is None:
        return 1
    return groups.count if groups.count is not None else channels // groups.size


class Operator(nn.Module):
    """What stands for a convolution `inputs -> features`; the names of its layers are nnopt's.

    Attributes:
        layers: convolutions and, between them, normalisations, each of which is followed by a ReLU.
    """

    def __init__(
        self, choice: Choice, inputs: int, features: int, stride: int, running: bool
    ) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, track_running_stats=running)
        if choice.bottleneck is not None:
            inner = features // choice.bottleneck
            self.reduce = conv(inputs, inner, 1)
            self.norm1 = norm(inner)
            self.spatial = conv(inner, inner, 3, stride, groups_of(choice, inner))
            self.norm2 = norm(inner)
            self.expand = conv(inner, features, 1)
        elif choice.groups is not None:
            self.spatial = conv(inputs, inputs, 3, stride, groups_of(choice, inputs))
            self.norm = norm(inputs)
            self.pointwise = conv(inputs, features, 1)
        else:
            self.conv = conv(inputs, features, 3, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, inputs, height, width]` -> `[batch, features, height/stride, width/stride]`."""
        for layer in self.children():  # in the order of the definition above
            x = layer(x) if isinstance(layer, nn.Conv2d) else norm_relu(layer, x)
        return x


class Block(nn.Module):
    """Pre-activation block: two operators for S and G, one for B and BG.

    norm - relu - operator [- norm - relu - operator], plus the input, or its 1x1 convolution after the first ReLU.
    """

    def __init__(
        self, choice: Choice, inputs: int, features: int, stride: int, running: bool
    ) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, track_running_stats=running)
        self.norm1 = norm(inputs)
        self.op1 = Operator(choice, inputs, features, stride, running)
        two = choice.bottleneck is None
        self.norm2 = norm(features) if two else None
        self.op2 = Operator(choice, features, features, 1, running) if two else None
        changes = stride != 1 or inputs != features
        self.shortcut = conv(inputs, features, 1, stride) if changes else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The probe, which is the output of the last convolution, and what is added to it."""
        active = norm_relu(self.norm1, x)
        probe = self.op1(active)
        if self.op2 is not None:
            probe = self.op2(norm_relu(self.norm2, probe))
        return probe, x if self.shortcut is None else self.shortcut(active)


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """WRN-depth-width without its blocks.

    Attributes:
        depth: `6n + 4` for `n` blocks in a stage.
        width: multiple of the stages' widths (16, 32, 64).
        classes: number of logits.
        running: keep running statistics, which no score reads.
    """

    depth: int
    width: int
    classes: int = 10
    running: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks, which are nnopt's."""
        return tuple(f"stage{s}_block{b}" for s in (1, 2, 3) for b in range((self.depth - 4) // 6))

    def block(self, position: int, choice: Choice) -> Block:
        """A block with fresh weights."""
        stage, within = divmod(position, (self.depth - 4) // 6)
        features = (16, 32, 64)[stage] * self.width
        if within > 0:
            return Block(choice, features, features, 1, self.running)
        inputs = features // 2 if stage > 0 else 16
        return Block(choice, inputs, features, 2 if stage > 0 else 1, self.running)

    def stem(self) -> nn.Module:
        """The first convolution."""
        return conv(3, 16, 3)

    def tail(self) -> "Tail":
        """What follows the blocks."""
        return Tail(64 * self.width, self.classes, self.running)


class Tail(nn.Module):
    """Normalisation, ReLU, mean over positions, linear layer."""

    def __init__(self, features: int, classes: int, running: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(features, track_running_stats=running)
        self.head = nn.Linear(features, classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, features, height, width]` -> `[batch, classes]`."""
        return self.head(norm_relu(self.norm, x).mean((2, 3)))


class Network(nn.Module):
    """Stem, blocks, tail."""

    def __init__(self, skeleton: Skeleton, candidate: Candidate) -> None:
        super().__init__()
        self.stem = skeleton.stem()
        self.blocks = nn.ModuleDict(
            {
                name: skeleton.block(i, choice)
                for i, (name, choice) in enumerate(zip(skeleton.names, candidate, strict=True))
            }
        )
        self.tail = skeleton.tail()


def _potential(probe: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`1/(2N) sum_n (sum_ij a g)^2`, summed over channels."""
    return (probe * gradient).sum((2, 3)).pow(2).mean(0).sum().mul(0.5)


class _Hooks:
    """Potentials of blocks, computed as the gradient of each probe passes by.

    A hook needs the activation but must not keep alive what led to it: hence the detached view.
    """

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}

    def add(self, position: int, probe: torch.Tensor) -> None:
        activation = probe.detach()

        def hook(gradient: torch.Tensor) -> None:
            self.found[position] = _potential(activation, gradient)

        probe.register_hook(hook)

    def in_order(self) -> list[float]:
        return torch.stack([self.found[i] for i in sorted(self.found)]).tolist()


@dataclasses.dataclass
class Published:
    """The released code's protocol.

    Attributes:
        skeleton: of all candidates.
        images: `[batch, 3, height, width]`.
        labels: `[batch]`.
    """

    skeleton: Skeleton
    images: torch.Tensor
    labels: torch.Tensor

    def __call__(self, candidate: Candidate) -> list[float]:
        """Potential of each block of a network with fresh weights."""
        return self.score(Network(self.skeleton, candidate))

    def score(self, net: Network) -> list[float]:
        """Potential of each block."""
        hooks = _Hooks()
        x = net.stem(self.images)
        for i, block in enumerate(net.blocks.values()):
            probe, shortcut = block(x)
            hooks.add(i, probe)
            x = probe + shortcut
        cross_entropy(net.tail(x), self.labels).backward()
        return hooks.in_order()


class Tuned:
    """The same score, without what it does not need."""

    def __init__(
        self,
        skeleton: Skeleton,
        images: torch.Tensor,
        labels: torch.Tensor,
        choices: Sequence[Candidate] = (),
    ) -> None:
        """Makes the weights of every block.

        Args:
            skeleton: of all candidates.
            images: `[batch, 3, height, width]`.
            labels: `[batch]`.
            choices: what may stand at each position.
        """
        skeleton = dataclasses.replace(skeleton, running=False)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = labels
        self.stem, self.tail = _frozen(skeleton.stem()), _frozen(skeleton.tail())
        self.blocks = [
            {choice: _frozen(skeleton.block(i, choice)) for choice in here}
            for i, here in enumerate(choices)
        ]

    def __call__(self, candidate: Candidate) -> list[float]:
        """Potential of each block, with the same weights for a choice at a position whatever the candidate."""
        blocks = [here[c] for here, c in zip(self.blocks, candidate, strict=True)]
        return self.score(self.stem, blocks, self.tail)

    def score(self, stem: nn.Module, blocks: Sequence[Block], tail: nn.Module) -> list[float]:
        """Potential of each block of a network with frozen weights."""
        hooks = _Hooks()
        x = stem(self.images)
        for i, block in enumerate(blocks):
            probe, shortcut = block(x)
            if i == 0:  # where gradients end
                probe.requires_grad_()
            hooks.add(i, probe)
            x = probe + shortcut
        cross_entropy(tail(x), self.labels).backward()
        return hooks.in_order()


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).to(memory_format=torch.channels_last)


# --- against nnopt ---


def load_weights(net: Network, params: Mapping[str, object], dtype: torch.dtype) -> None:
    """Copies the parameters of an nnopt network, transposed, into one of the same candidate.

    Raises:
        KeyError: one of the two has a parameter that the other has not.
    """
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    given = {}
    for path, value in _leaves(params):
        where = path[:-1]
        where = ("blocks", *where) if where[0] in net.blocks else where
        where = ("tail", *where) if where[0] in ("norm", "head") else where
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
        given[".".join((*where, names[path[-1]]))] = value.transpose(axes)
    net.to(dtype)
    own = dict(net.named_parameters())
    if own.keys() != given.keys():
        raise KeyError(f"parameters of one network alone: {sorted(own.keys() ^ given.keys())}")
    with torch.no_grad():
        for name, value in given.items():
            assert own[name].shape == value.shape, name
            own[name].copy_(torch.from_numpy(np.array(value)))


def _leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), np.asarray(value)


@dataclasses.dataclass(frozen=True)
class Check:
    """Compare the Fisher potential of each block with nnopt's, weights and images being the same."""

    depth: int = 16
    """Depth of the network, 6n + 4. 16 has a first and a later block in each stage."""
    width: int = 2
    """Its width."""
    batch: int = 8
    """Images in the minibatch, handwritten digits."""
    seed: int = 0
    """Of weights and minibatch."""
    quick: bool = False
    """Three networks only."""
    tolerance64: float = 1e-9
    """Largest relative difference of a block in float64."""
    tolerance32: float = 1e-2
    """In float32, where ReLUs that change sides amplify rounding."""

    def run(self) -> bool:
        """Prints the largest differences; False if one is too large."""
        choices = tuple(dict.fromkeys((*CODE_CHOICES, *PAPER_CHOICES)))
        skeleton = Skeleton(self.depth, self.width)
        positions = len(skeleton.names)
        worst = {}
        # Every choice stands at every position once, next to another neighbour each time.
        for first in range(3 if self.quick else len(choices)):
            candidate = tuple(choices[(first + 5 * i) % len(choices)] for i in range(positions))
            for precision, errors in self._errors(skeleton, candidate).items():
                for protocol, error in errors.items():
                    key = (precision, protocol)
                    worst[key] = float(np.maximum(worst.get(key, 0.0), error))  # NaN stays
        table = Table(
            title=f"PyTorch {torch.__version__} against nnopt, WRN-{self.depth}-{self.width}, batch {self.batch}"
        )
        for name in (
            "precision",
            "protocol",
            "largest relative difference of a block",
            "allowed",
            "",
        ):
            table.add_column(name)
        passed = True
        for (precision, protocol), error in worst.items():
            allowed = {"float64": self.tolerance64, "float32": self.tolerance32}[precision]
            fine = error <= allowed  # False for NaN
            passed &= fine
            table.add_row(
                precision,
                protocol,
                f"{error:.1e}",
                f"{allowed:.0e}",
                "agrees" if fine else "DIFFERS",
            )
        Console(width=100).print(table)
        return passed

    def _errors(self, skeleton: Skeleton, candidate: Candidate) -> dict[str, dict[str, float]]:
        """The largest relative difference of a block, by precision and protocol."""
        import jax
        import jax.numpy as jnp

        from nnopt.core import Example, rewrite
        from nnopt.data import load, minibatch
        from nnopt.networks import named
        from nnopt.rewrites import Genotype
        from nnopt.scores.fisher import FisherPotential

        images, labels = minibatch(load("digits"), self.batch, jax.random.key(self.seed))
        base = named(f"wrn-{self.depth}-{self.width}", skeleton.classes)
        net = rewrite(base, Genotype(candidate), example=images)
        variables = net.lazy_init(jax.random.key(self.seed), images)
        errors = {}
        for precision in ("float64", "float32"):
            with jax.enable_x64(precision == "float64"):
                cast = functools.partial(jnp.asarray, dtype=precision)
                given = jax.tree.map(cast, variables)
                fisher = FisherPotential(
                    net,
                    Example(cast(images), train=True),
                    compiler_options={"xla_backend_optimization_level": 0},
                )
                score = fisher(given, cast(images), labels)
            wanted = [score.blocks[name] for name in skeleton.names]
            dtype = getattr(torch, precision)
            pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(dtype)
            classes = torch.from_numpy(np.array(labels)).long()
            peer = Network(skeleton, candidate)
            load_weights(peer, given["params"], dtype)
            published = Published(skeleton, pixels.contiguous(), classes).score(peer)
            frozen = Network(dataclasses.replace(skeleton, running=False), candidate)
            load_weights(frozen, given["params"], dtype)
            blocks = [_frozen(block) for block in frozen.blocks.values()]
            tuned = Tuned(skeleton, pixels, classes).score(
                _frozen(frozen.stem), blocks, _frozen(frozen.tail)
            )
            found = {"published": published, "tuned": tuned}
            errors[precision] = {
                k: float(np.max(np.abs(np.array(v) / wanted - 1))) for k, v in found.items()
            }
        return errors


if __name__ == "__main__":
    raise SystemExit(0 if tyro.cli(Check).run() else 1)
