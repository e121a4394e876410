"""What the rules of `core.channel_rules` say of a whole network: which of the indices of its variables are one channel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core.channel_rules import Axes, Note, Ties, of_literal, run
from nnopt.core.example import rngs
from nnopt.core.flatten import Flat, Value, flatten
from nnopt.core.marks import mark_sites
from nnopt.core.sites import Sites
from nnopt.typing import Path


@dataclasses.dataclass(frozen=True)
class Program:
    """A network as a flat program.

    Attributes:
        flat: the program.
        arguments: those of its inputs that are the example's arrays.
        variables: those that are variables.
        leaves: variable -> its shape, in the order of `variables`.
        outputs: how many of its first outputs are the network's; updated variables follow.
    """

    flat: Flat
    arguments: tuple[Value, ...]
    variables: tuple[Value, ...]
    leaves: dict[Path, tuple[int, ...]]
    outputs: int


def program_of(sites: Sites) -> Program:
    """The network as a flat program; updates of its running averages are outputs too."""
    net, specs = sites.net, flatten_dict(nn.meta.unbox(dict(sites.variables)))
    mutable = sorted({leaf[0] for leaf in specs} - {"params"})
    counts: list[int] = []

    def apply(arrays: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        variables = unflatten_dict(dict(zip(specs, arrays, strict=True)))
        streams = {k: v for k, v in rngs(jax.random.key(0)).items() if k != "params"}
        outputs, changed = net.apply(variables, *args, rngs=streams, mutable=mutable, **kwargs)
        counts.append(len(jax.tree.leaves(outputs)))
        return outputs, changed

    with nn.intercept_methods(mark_sites):
        closed, own = sites.example.jaxpr(apply, list(specs.values()))
    flat = flatten(closed)
    leaves = {leaf: tuple(spec.shape) for leaf, spec in specs.items()}
    return Program(flat, flat.inputs[:own], flat.inputs[own:], leaves, counts[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What the rules say of a network.

    Attributes:
        program: the network.
        known: value of the program -> labels of its axes.
        ties: what holds between labels.
        unit: `[labels]`, the channel that a label belongs to; 0 for what always stays.
        units: number of channels, and one for what always stays.
        kept_whole: what keeps channels from going that otherwise could.
        counted: for each equation of the program, see `Ties.counted`.
    """

    program: Program
    known: dict[Value, Axes]
    ties: Ties
    unit: np.ndarray
    units: int
    kept_whole: tuple[Note, ...]
    counted: tuple[tuple[int, ...], ...]

    def of(self, atom: Any) -> Axes:
        """What is known of a value or literal."""
        return self.known[atom] if isinstance(atom, Value) else of_literal(atom)


def analyse(sites: Sites) -> Analysis:
    """Runs the rules over a network."""
    program = program_of(sites)
    ties = Ties()
    known: dict[Value, Axes] = {}
    for value, shape in zip(program.variables, program.leaves.values(), strict=True):
        labels = tuple(ties.fresh(n) for n in shape)
        known[value] = Axes(shape, labels, (True,) * len(shape))
    for value in (*program.arguments, *(v for v, _ in program.flat.constants)):
        known[value] = Axes.whole(value.aval.shape)
    counted: list[tuple[int, ...]] = []
    for equation in program.flat.equations:
        start = len(ties.counted)
        before = [known[a] if isinstance(a, Value) else of_literal(a) for a in equation.inputs]
        known.update(zip(equation.outputs, run(ties, equation, before), strict=True))
        counted.append(tuple(ties.counted[start:]))
    for atom in program.flat.outputs[: program.outputs]:
        if isinstance(atom, Value):
            for axis in range(len(known[atom].shape)):
                ties.keep(known[atom], axis)
    unit, kept = _components(ties)
    # Only what some variable has can go; all else is one unit, that stays.
    used = [unit[v] for value in program.variables for v in known[value].labels if v is not None]
    count, unit = _numbered(unit, used)
    return Analysis(program, known, ties, unit, count, kept, tuple(counted))


def _components(ties: Ties) -> tuple[np.ndarray, tuple[Note, ...]]:
    """Label -> the set it belongs to, that of label 0 being 0; and what alone keeps a channel that weights make from going."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    none = np.zeros(0, np.int64)
    pairs = [np.concatenate([none, *(p[i] for p in ties.joins)]) for i in (0, 1)]
    size = (ties.labels, ties.labels)
    graph = coo_array((np.ones(len(pairs[0]), bool), tuple(pairs)), shape=size)
    found: np.ndarray = connected_components(graph, directed=False)[1]
    could_go = np.zeros(ties.labels, bool)
    could_go[found[np.concatenate([none, *ties.made])]] = True
    could_go[found[0]] = False
    whole = np.zeros(ties.labels, bool)
    whole[found[0]] = True
    reported: dict[Note, None] = {}
    for labels, note in ties.kept_whole:
        whole[found[labels]] = True
        if could_go[found[labels]].any():
            reported[note] = None
    for labels, note in ties.split:
        if could_go[found[labels]].any():
            reported[note] = None
    return np.where(whole[found], 0, found + 1), tuple(reported)


def _numbered(unit: np.ndarray, used: Sequence[np.ndarray]) -> tuple[int, np.ndarray]:
    """Units that are used, numbered in order of appearance; all others are 0."""
    seen = np.concatenate([np.zeros(1, unit.dtype), *used])
    values, first = np.unique(seen, return_index=True)
    number = np.zeros(int(unit.max()) + 1, np.int64)
    number[values[np.argsort(first)]] = np.arange(len(values))
    return len(values), number[unit]
