"""Which channels of a network belong together: found in its jaxpr, so for any network, also one never seen before.

A channel that goes takes with it a filter of the convolution that makes it, its entry in a batch norm, a slice of each kernel
that reads it, and, where values are added, the channels that it is added to. `channel_groups` follows every axis of every
variable through the network (`core.channel_analysis`), and finds the sets of indices that stay or go together.

Example:
    >>> from nnopt.networks import WideResNet
    >>> import jax.numpy as jnp
    >>> found = channel_groups(WideResNet(10, 1.0), jnp.zeros((1, 32, 32, 3)))
    >>> print(found["stage2_block0/conv1"])
    stage2_block0/conv1: 32 channels of 6 axes
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from nnopt.core.channel_analysis import Analysis, analyse
from nnopt.core.channel_rules import Note, Ties, consumed
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
    """Where weights read channels for good: sum over them, and not pass them on as a depthwise convolution does.

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
        draws: whether it draws random numbers.
    """

    def __init__(
        self,
        sites: Sites,
        found: Analysis,
        groups: Sequence[ChannelGroup],
        reads: Sequence[Read],
    ) -> None:
        self.sites = sites
        self.kept_whole = found.kept_whole
        self.leaves = dict(found.program.leaves)
        self.flat = found.program.flat
        self.outputs = found.program.outputs
        self.reads = tuple(reads)
        self.units = found.units
        self.draws = bool(found.ties.drawn)
        self._read_inside = [(found.unit[v], note) for v, note in found.ties.read_inside]
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

    def axes(self) -> dict[Leaf, np.ndarray]:
        """Axis of a variable -> `[extent]`, the unit of each of its indices; 0 for what always stays. Axes that have channels."""
        found: dict[Leaf, np.ndarray] = {}
        for group in self.values():
            for member in group.members:
                key = member.leaf, member.axis
                if key not in found:
                    found[key] = np.zeros(self.leaves[member.leaf][member.axis], np.int64)
                found[key][member.indices] = group.units[member.channels]
        return found

    def unread(self, name: str) -> str | None:
        """Why no derivative tells how important the channels of a group are: a place where they are read is not in `reads`.

        None if all places are.
        """
        units = self[name].units
        for inside, note in self._read_inside:
            if np.isin(inside, units).any():
                return str(note)
        seen = [np.isin(units, read.units) for read in self.reads]
        return None if np.any(seen, axis=0).all() else "no weights sum over them"

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
    found = analyse(sites)
    program, known, ties, unit = found.program, found.known, found.ties, found.unit
    reads = []
    for number, equation in enumerate(program.flat.equations):
        before = [found.of(atom) for atom in equation.inputs]
        for operand, axis in consumed(equation, before):
            labels = before[operand].labels[axis]
            if labels is not None and unit[labels].any():
                reads.append(Read(number, operand, axis, unit[labels]))
    own = {
        (leaf, axis): labels
        for value, leaf in zip(program.variables, program.leaves, strict=True)
        for axis, labels in enumerate(known[value].labels)
        if labels is not None
    }
    return ChannelGroups(sites, found, _groups(own, ties, unit, sites), reads)


def _groups(
    own: Mapping[Leaf, np.ndarray], ties: Ties, unit: np.ndarray, sites: Sites
) -> list[ChannelGroup]:
    """Units that the same axes have are channels of one group."""
    count = int(unit.max()) + 1
    # Equal sets of axes have equal sums of random numbers.
    marks = np.random.default_rng(0).integers(1, 2**62, len(own), dtype=np.int64)
    signature = np.zeros(count, np.int64)
    for mark, labels in zip(marks, own.values(), strict=True):
        signature[np.unique(unit[labels])] += mark
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
    for (leaf, axis), labels in own.items():
        units = unit[labels]
        kinds = kind[units]
        for k in np.unique(kinds[kinds >= 0]):
            where = np.flatnonzero(kinds == k)
            member = Member(leaf, axis, where, number[units[where]])
            members.setdefault(int(k), []).append(member)
            # Of indices that are one channel the labels of the first stand for all in what is made.
            if np.isin(units[where], units[where][made[labels[where]]]).all():
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
