"""Operators for one convolution of a network: what they cost, how long they take, and whether the network keeps its capacity."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.backends import compile_network, measure, speedup
from nnopt.cli.bars import Bars
from nnopt.core import At, Example, Site, rewrite, sites
from nnopt.errors import NestError
from nnopt.nests import Operator, Program, canonical
from nnopt.nests.canonical import weights
from nnopt.nests.lower import pieces
from nnopt.nests.module import ProgramConv, nest_of, prepared
from nnopt.nests.named import (
    depthwise,
    grouped,
    sequence1,
    sequence2,
    sequence3,
    spatial_bottleneck,
)
from nnopt.nests.sample import Drawn, distinct
from nnopt.rewrites import MutateConv
from nnopt.rewrites.operation import operator_at
from nnopt.scores import Fisher, Scorer
from nnopt.scores.programs import ProgramCache

MOST_MACS = 0.6
"""Of the convolution's own: a generated operator that multiplies more is not tried."""
MOST_PIECES = 8
"""Convolutions that a generated operator is lowered to."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Convolutions of a network that are alike.

    Attributes:
        name: such as `64 -> 128, 3x3 /2, 32x32`.
        paths: where they stand.
        conv: any of them.
        operator: it as a nest.
    """

    name: str
    paths: tuple[str, ...]
    conv: nn.Conv
    operator: Operator


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An operator for a layer.

    Attributes:
        name: of a named one; empty for a generated one.
        program: that makes it.
        weights: number of them.
        macs: of one image.
    """

    name: str
    program: Program
    weights: int
    macs: int


def layers(net: nn.Module, example: Example) -> list[Layer]:
    """The distinct convolutions of a network, in order of first call."""
    found: dict[Any, list[Site]] = {}
    for site in sites(net, example):
        if isinstance(site.module, nn.Conv):
            found.setdefault(nest_of(site.module, site.inputs[0].shape[1:]), []).append(site)
    return [
        Layer(_name(op, s[0].module), tuple("/".join(site.path) for site in s), s[0].module, op)
        for op, s in found.items()
    ]


def _name(operator: Operator, conv: Any) -> str:
    *window, _, outputs = operator.kernel
    *size, inputs = operator.input
    stride = conv.strides if isinstance(conv.strides, int) else (conv.strides or (1,))[0]
    by = f" /{stride}" if stride > 1 else ""
    return f"{inputs} -> {outputs}, {'x'.join(map(str, window))}{by}, {'x'.join(map(str, size))}"


def candidates(
    layer: Layer, count: int, rng: np.random.Generator, least: float = 0.0
) -> list[Candidate]:
    """Named operators as far as they are possible, then generated ones, no two of which are the same operator.

    Args:
        layer: to replace.
        count: of generated operators.
        rng: source of the draws.
        least: part of the convolution's multiply-accumulates that a generated one has at least.
    """
    operator = layer.operator
    inputs, outputs = operator.input[-1], operator.output[-1]
    named = {f"G({g})": grouped(g) for g in (2, 4, 8, 16)}
    named |= {"depthwise": depthwise(), "spatial(2)": spatial_bottleneck(2)}
    named |= {
        "Seq1(1,4)": sequence1(outputs, (1, 4)),
        "Seq1(2,4)": sequence1(outputs, (2, 4)),
        "Seq1(4,8)": sequence1(outputs, (4, 8)),
    }
    named |= {f"Seq2({u},{g})": sequence2(inputs, u, g) for u, g in ((16, 2), (8, 4))}
    named |= {"Seq3(2)": sequence3(2), "Seq3(4)": sequence3(4)}
    found = []
    seen = {canonical(operator)}
    for name, program in named.items():
        try:
            made = program(operator)
        except NestError:  # not for these channels
            continue
        canon = canonical(made)
        if canon not in seen:
            seen.add(canon)
            found.append(Candidate(name, program, weights(canon), made.domain_size))

    def accept(drawn: Drawn) -> bool:
        part = drawn.operator.domain_size / operator.domain_size
        return (
            least <= part <= MOST_MACS
            and drawn.canon not in seen
            and sum(map(pieces, drawn.canon.forms)) <= MOST_PIECES
        )

    for drawn in distinct(operator, count, rng, accept=accept):
        found.append(Candidate("", drawn.program, weights(drawn.canon), drawn.operator.domain_size))
    return found


def timed(
    layer: Layer, tried: Sequence[Candidate], batch: int, repeats: int, bars: Bars
) -> list[dict[str, float]]:
    """Latency of the layer's convolution and of operators, all in one interleaved run.

    Args:
        layer: whose convolution.
        tried: operators.
        batch: images in a call.
        repeats: rounds.
        bars: shows how it gets on.

    Returns:
        For the convolution and then for each operator: `ms`, and `speedup` over the convolution with its quartiles `low`, `high`.
    """
    fields = {
        f.name: getattr(layer.conv, f.name)
        for f in dataclasses.fields(nn.Conv)
        if f.name not in ("parent", "name")
    }
    example = Example(jax.ShapeDtypeStruct((batch, *layer.operator.input), jnp.float32))
    bars.phase(f"compiling {layer.name}", 1 + len(tried))
    compiled: dict[str, Any] = {}
    for i, candidate in enumerate((None, *tried)):
        module = (
            nn.Conv(**fields)
            if candidate is None
            else ProgramConv(**fields, program=candidate.program)
        )
        fresh = module.lazy_init(jax.random.key(0), *example.args)
        compiled[str(i)] = compile_network(module, fresh, example)
        bars.advance()
    started: list[int] = []

    def on_progress(done: int, total: int) -> None:
        if not started:
            bars.phase(f"timing {layer.name}", total)
            started.append(total)
        bars.advance()

    times = measure(compiled, repeats=repeats, on_progress=on_progress)
    over = [speedup(times["0"], latency) for latency in times.values()]
    return [
        {"ms": t.median_ms, "speedup": o.median, "low": o.low, "high": o.high}
        for t, o in zip(times.values(), over, strict=True)
    ]


def mutated(net: nn.Module, programs: Mapping[str, Program], example: Example) -> nn.Module:
    """A network with a program at each of some sites, given by their paths."""
    sites_of: dict[Program, list[str]] = {}
    for path, program in programs.items():
        sites_of.setdefault(program, []).append(path)
    rules = [MutateConv(At(tuple(paths)), program) for program, paths in sites_of.items()]
    return rewrite(net, *rules, example=example) if rules else net


class Legality:
    """Fisher potential of a whole network, with operators standing in it: capacity is kept where it is not below the network's own.

    After Turner et al. (Neural Architecture Search as Program Transformation Exploration, ASPLOS 2021): transformations that change
    the function are legal if the network's Fisher potential at initialisation, on one minibatch, is not lower than before.

    Attributes:
        potential: of the network as it is.
    """

    def __init__(
        self, net: nn.Module, images: jax.Array, labels: jax.Array, seeds: int = 2
    ) -> None:
        self.net = net
        self._images, self._labels = images, labels
        self._example = Example(images, train=True)
        self._programs = ProgramCache()
        self._sites = sites(net, self._example)
        keys = [jax.random.key(seed) for seed in range(seeds)]
        self._variables = [(key, net.lazy_init(key, images, train=True)) for key in keys]
        self.potential = self.of({})

    def of(self, programs: Mapping[str, Program]) -> float:
        """Fisher potential with a program at each of some sites; a mean over seeds of the weights.

        All other sites have the same weights each time.

        Args:
            programs: by path.
        """
        net = mutated(self.net, programs, self._example)
        scorer = Scorer(net, self._example, [Fisher()], programs=self._programs)
        totals = []
        for key, variables in self._variables:
            flat = flatten_dict(dict(variables))
            for number, (path, program) in enumerate(programs.items()):
                site = self._sites[path]
                old = flat.pop(("params", *site.path, "kernel"))
                _, kept = prepared(operator_at(site, program))
                for variable in kept.variables:
                    drawn = variable.init(
                        site.module.kernel_init, jax.random.fold_in(key, number), old.dtype
                    )
                    flat[("params", *site.path, variable.name)] = drawn
            (score,) = scorer(
                unflatten_dict(flat), self._images, self._labels, jax.random.key(0)
            ).values()
            totals.append(score.total)
        return float(np.mean(totals))
