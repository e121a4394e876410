"""Which channels of a network belong together: found in its jaxpr, so for any network, also one never seen before.

A channel that goes takes with it a filter of the convolution that makes it, its entry in a batch norm, a slice of each kernel
that reads it, and, where values are added, the channels that it is added to. `channel_groups` follows every axis of every
variable through the network by the rules of `core.channel_rules`, and finds the sets of indices that stay or go together.

Example:
    >>> from nnopt.networks import WideResNet
    >>> import jax.numpy as jnp
    >>> found = channel_groups(WideResNet(10, 1.0), jnp.zeros((1, 32, 32, 3)))
    >>> print(found["stage2_block0/conv1"])
    stage2_block0/conv1: 32 channels of 7 axes
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core.channel_rules import Axes, Note, Ties, of_literal, run
from nnopt.core.example import rngs
from nnopt.core.flatten import Flat, Value, flatten
from nnopt.core.marks import mark_sites
from nnopt.core.paths import path_text, suggestion
from nnopt.core.sites import Sites
from nnopt.core.sites import sites as trace_sites
from nnopt.errors import SelectionError
from nnopt.typing import Path

Leaf = tuple[Path, int]
"""A variable, `(collection, *path, name)`, and one of its axes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """What a group has of one axis of one variable.

    Attributes:
        leaf: the variable, `(collection, *path, name)`.
        axis: of it.
        indices: `[n]` along the axis.
        channels: `[n]`, the channel of the group that each index belongs to.
    """

    leaf: Path
    axis: int
    indices: np.ndarray
    channels: np.ndarray

    @property
    def module(self) -> Path:
        """The site whose variable it is."""
        return self.leaf[1:-1]


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that the same axes of variables have, and that can go one by one.

    Attributes:
        name: path of the module that makes them first, with `#2`, ... for a second group of one module.
        units: `[channels]`, their numbers among the channels of all groups.
        members: every axis that has them.
        makers: of these, those along which weights make them.
        inexact: why the network without a channel is another function than the network with its weights at zero.
    """

    name: str
    units: np.ndarray
    members: tuple[Member, ...]
    makers: tuple[Member, ...]
    inexact: tuple[Note, ...]

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.units)

    @property
    def exact(self) -> bool:
        """Whether the network without a channel is what it is with the channel's weights at zero."""
        return not self.inexact

    @property
    def modules(self) -> tuple[Path, ...]:
        """Paths of the modules whose variables have these channels."""
        return tuple(dict.fromkeys(m.module for m in self.members))

    def __str__(self) -> str:
        text = f"{self.name}: {self.size} channels of {len(self.members)} axes"
        return text if self.exact else f"{text}, not exact: {self.inexact[0]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """Where weights read channels.

    Attributes:
        equation: number of the equation of the flat program.
        operand: which of its inputs holds the channels.
        axis: of the operand.
        units: `[extent]`, the channel of each index; 0 for what always stays.
    """

    equation: int
    operand: int
    axis: int
    units: np.ndarray


class ChannelGroups(Mapping[str, ChannelGroup]):
    """The groups of a network by name, in the order in which the network makes them.

    Attributes:
        sites: of the network.
        kept_whole: operations that keep channels from going, and why.
        leaves: variable -> its shape, in the order of `flat.inputs`, which begin with the example's arrays.
        flat: the network as a flat program of the example's arrays and its variables.
        outputs: how many of its first outputs are the network's; updated variables follow.
        reads: where weights read channels.
        units: number of channels of all groups, and one for what always stays.
    """

    def __init__(
        self,
        sites: Sites,
        program: "_Program",
        groups: Sequence[ChannelGroup],
        kept_whole: Sequence[Note],
        reads: Sequence[Read],
        units: int,
    ) -> None:
        self.sites = sites
        self.kept_whole = tuple(kept_whole)
        self.leaves = dict(program.leaves)
        self.flat = program.flat
        self.outputs = program.outputs
        self.reads = tuple(reads)
        self.units = units
        self._groups = {g.name: g for g in groups}

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group of a name.

        Raises:
            SelectionError: there is none.
        """
        found = self._groups.get(name)
        if found is None:
            names = [tuple(n.split("/")) for n in self._groups]
            raise SelectionError(
                f"no group of channels is called {name!r}: {suggestion(tuple(name.split('/')), names)}"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, name: object) -> bool:
        return name in self._groups

    def isomorphic(self) -> dict[Any, tuple[str, ...]]:
        """Groups by what they are made of: scores of alike groups may be compared one with one.

        Two groups are alike if their axes stand in variables of the same names and shapes.
        """
        found: dict[Any, list[str]] = {}
        for name, group in self.items():
            what = sorted((m.leaf[-1], m.axis, self.leaves[m.leaf]) for m in group.members)
            found.setdefault((group.size, tuple(what)), []).append(name)
        return {what: tuple(names) for what, names in found.items()}


def channel_groups(net: nn.Module, example: Any) -> ChannelGroups:
    """Finds the groups of channels that can go from a network.

    Args:
        net: any linen module.
        example: an array of the network's input shape, or an `Example`.

    Returns:
        The groups. What operations without a rule touch is in none of them, and is reported in `kept_whole`.

    Raises:
        UnsupportedNetworkError: see `sites`.
    """
    return channel_groups_traced(trace_sites(net, example))


def channel_groups_traced(sites: Sites) -> ChannelGroups:
    """`channel_groups` for a network that has been traced already."""
    program = _program(sites)
    ties = Ties()
    known: dict[Value, Axes] = {}
    for value, shape in zip(program.variables, program.leaves.values(), strict=True):
        labels = tuple(ties.fresh(n) for n in shape)
        known[value] = Axes(shape, labels, weights=True)
    for value in (*program.arguments, *(v for v, _ in program.flat.constants)):
        known[value] = Axes.whole(value.aval.shape)
    read: list[tuple[int, int, Axes]] = []
    for number, equation in enumerate(program.flat.equations):
        before = [known[a] if isinstance(a, Value) else of_literal(a) for a in equation.inputs]
        known.update(zip(equation.outputs, run(ties, equation, before), strict=True))
        if equation.primitive.name in _KERNELS and any(a.weights for a in before):
            read += [(number, i, a) for i, a in enumerate(before) if not a.weights]
    for atom in program.flat.outputs[: program.outputs]:
        if isinstance(atom, Value):
            for axis in range(len(known[atom].shape)):
                ties.keep(known[atom], axis)
    unit = _components(ties)
    own = {
        (leaf, axis): (labels, unit[labels])
        for value, leaf in zip(program.variables, program.leaves, strict=True)
        for axis, labels in enumerate(known[value].labels)
        if labels is not None
    }
    # Only what some variable has can go; all else is one unit, that stays.
    count, unit = _numbered(unit, [units for _, units in own.values()])
    own = {leaf: (labels, unit[labels]) for leaf, (labels, _) in own.items()}
    reads = [
        Read(number, i, axis, unit[labels])
        for number, i, array in read
        for axis, labels in enumerate(array.labels)
        if labels is not None and unit[labels].any()
    ]
    whole = list(dict.fromkeys(note for labels, note in ties.kept_whole))
    return ChannelGroups(sites, program, _groups(own, ties, unit, sites), whole, reads, count)


_KERNELS = ("conv_general_dilated", "nnopt_conv", "dot_general")


@dataclasses.dataclass(frozen=True)
class _Program:
    flat: Flat
    arguments: tuple[Value, ...]
    variables: tuple[Value, ...]
    leaves: dict[Path, tuple[int, ...]]
    outputs: int


def _program(sites: Sites) -> _Program:
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
    return _Program(flat, flat.inputs[:own], flat.inputs[own:], leaves, counts[-1])


def _components(ties: Ties) -> np.ndarray:
    """Label -> the set it belongs to; that of label 0 is 0."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    none = np.zeros(0, np.int64)
    pairs = [np.concatenate([none, *(p[i] for p in ties.joins)]) for i in (0, 1)]
    size = (ties.labels, ties.labels)
    graph = coo_array((np.ones(len(pairs[0]), bool), tuple(pairs)), shape=size)
    found: np.ndarray = connected_components(graph, directed=False)[1]
    return np.where(found == found[0], 0, found + 1)


def _numbered(unit: np.ndarray, used: Sequence[np.ndarray]) -> tuple[int, np.ndarray]:
    """Units that are used, numbered in order of appearance; all others are 0."""
    seen = np.concatenate([np.zeros(1, unit.dtype), *used])
    values, first = np.unique(seen, return_index=True)
    number = np.zeros(int(unit.max()) + 1, np.int64)
    number[values[np.argsort(first)]] = np.arange(len(values))
    return len(values), number[unit]


def _groups(
    own: Mapping[Leaf, tuple[np.ndarray, np.ndarray]], ties: Ties, unit: np.ndarray, sites: Sites
) -> list[ChannelGroup]:
    """Units that the same axes have are channels of one group."""
    count = int(unit.max()) + 1
    # Equal sets of axes have equal sums of random numbers.
    marks = np.random.default_rng(0).integers(1, 2**62, len(own), dtype=np.int64)
    signature = np.zeros(count, np.int64)
    for mark, (_, units) in zip(marks, own.values(), strict=True):
        signature[np.unique(units)] += mark
    _, kind = np.unique(signature, return_inverse=True)
    kind = np.where(np.arange(count) == 0, -1, kind)
    notes: dict[int, dict[Note, None]] = {}
    for labels, note in ties.inexact:
        for k in np.unique(kind[unit[labels]]):
            notes.setdefault(int(k), {})[note] = None
    made = np.zeros(ties.labels, bool)
    for labels in ties.made:
        made[labels] = True
    order = {path: i for i, path in enumerate(sites.paths)}
    number = np.zeros(count, np.int64)
    for k in range(int(kind.max()) + 1):
        units = np.flatnonzero(kind == k)
        number[units] = np.arange(len(units))
    members: dict[int, list[Member]] = {}
    makers: dict[int, list[Member]] = {}
    for (leaf, axis), (labels, units) in own.items():
        kinds = kind[units]
        for k in np.unique(kinds[kinds >= 0]):
            where = np.flatnonzero(kinds == k)
            member = Member(leaf, axis, where, number[units[where]])
            members.setdefault(int(k), []).append(member)
            if made[labels[where]].all():
                makers.setdefault(int(k), []).append(member)

    def place(member: Member) -> tuple[int, Path, int]:
        return order.get(member.module, len(order)), member.leaf, member.axis

    found = []
    for k, parts in members.items():
        if k in makers:
            first = sorted(makers[k], key=place)
            units, why = np.flatnonzero(kind == k), tuple(notes.get(k, ()))
            parts.sort(key=place)
            found.append(ChannelGroup("", units, tuple(parts), tuple(first), why))
    found.sort(key=lambda g: place(g.makers[0]))
    return _named(found)


def _named(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        name = path_text(group.makers[0].module)
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        named.append(dataclasses.replace(group, name=name))
    return named
