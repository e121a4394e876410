"""Structured pruning that really removes channels: which ones, and the network without them.

groups = channel_groups(net, example)                   # what belongs together
scores = magnitude(groups, variables)                   # or another of `rewrites.importance`
removed = weakest(groups, scores, fraction=0.3)         # or until a budget is met
small = rewrite(net, prune(groups, removed), example=example)
variables, report = carry(net, small, variables, example=example, key=key)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core.channels import ChannelGroup, ChannelGroups
from nnopt.core.paths import path_text
from nnopt.errors import BudgetError, RewriteError
from nnopt.rewrites.resize import Extent, Resize
from nnopt.typing import Path, Variables

Removed = Mapping[str, Sequence[int]]
"""Group -> its channels that go."""
Scores = Mapping[str, np.ndarray]
"""Group -> `[channels]`, higher is more important."""
Cost = Callable[[Removed], float]
"""What the network costs without these channels."""


def prune(groups: ChannelGroups, removed: Removed, *, exact: bool = True) -> Resize:
    """The rule that removes channels.

    Before -> after: every variable of a group loses the slices of its channels. The outputs are those of the network whose
    variables are `masked(groups, removed, variables)`.

    Args:
        groups: of the network that the rule is for.
        removed: what goes.
        exact: refuse groups of which that would not be true, because a mean or maximum is taken over their channels.

    Raises:
        SelectionError: there is no such group.
        RewriteError: a group would be left without a channel, has no such channel, or is not exact.
    """
    lost: dict[tuple[Path, int], list[np.ndarray]] = {}
    for name, channels in removed.items():
        group = groups[name]
        gone = _checked(group, channels, exact)
        if not gone.any():
            continue
        for member in group.members:
            going = member.indices[gone[member.channels]]
            lost.setdefault((member.leaf, member.axis), []).append(going)
    extents = []
    for (leaf, axis), parts in lost.items():
        kept = np.setdiff1d(np.arange(groups.leaves[leaf][axis]), np.concatenate(parts))
        extents.append(Extent(path_text(leaf), axis, len(kept), tuple(kept.tolist())))
    return Resize(tuple(extents))


def _checked(group: ChannelGroup, channels: Sequence[int], exact: bool) -> np.ndarray:
    """`[channels]`, whether each goes."""
    index = np.asarray(channels, np.int64)
    if index.size and not (index.min() >= 0 and index.max() < group.size):
        raise RewriteError(
            f"{group.name!r} has channels 0 to {group.size - 1}, not {index.max() if index.min() >= 0 else index.min()}"
        )
    gone = np.zeros(group.size, bool)
    gone[index] = True
    if gone.all():
        raise RewriteError(
            f"{group.name!r} would lose all of its {group.size} channels; keep at least one"
        )
    if exact and gone.any() and not group.exact:
        raise RewriteError(
            f"{group.name!r} cannot be pruned exactly: {group.inexact[0]}; leave it out, or allow it with exact=False"
        )
    return gone


def masked(groups: ChannelGroups, removed: Removed, variables: Variables) -> Variables:
    """The same variables with zeros where channels are to go: what `prune` makes smaller without changing the outputs."""
    flat = dict(flatten_dict(dict(variables)))
    for name, channels in removed.items():
        group = groups[name]
        gone = _checked(group, channels, exact=False)
        for member in group.members:
            going = member.indices[gone[member.channels]]
            index = (slice(None),) * member.axis + (going,)
            flat[member.leaf] = jnp.asarray(flat[member.leaf]).at[index].set(0)
    return unflatten_dict(flat)


def removed_by(groups: ChannelGroups, masks: Mapping[str, Sequence[bool]]) -> dict[str, list[int]]:
    """What goes if these outputs of these modules go.

    Args:
        groups: of the network.
        masks: path of a module -> `[features]`, whether each of its outputs stays.

    Raises:
        RewriteError: a mask is of the wrong length, cuts what must stay, or cuts one part of channels that are tied to others.
    """
    makers: dict[str, list[tuple[ChannelGroup, np.ndarray, np.ndarray]]] = {}
    extents: dict[str, int] = {}
    for group in groups.values():
        for maker in group.makers:
            where = path_text(maker.module)
            makers.setdefault(where, []).append((group, maker.indices, maker.channels))
            extents[where] = groups.leaves[maker.leaf][maker.axis]
    removed: dict[str, list[int]] = {}
    for where, mask in masks.items():
        going = ~np.asarray(mask, bool)
        if where not in makers:
            raise RewriteError(f"no channel that {where!r} makes can go")
        if len(going) != extents[where]:
            raise RewriteError(
                f"the mask of {where!r} has {len(going)} entries, and the module makes {extents[where]} channels"
            )
        free = np.zeros(len(going), bool)
        for group, indices, channels in makers[where]:
            free[indices] = True
            count = np.bincount(channels, minlength=group.size)
            cut = np.bincount(channels, weights=going[indices], minlength=group.size)
            half = np.flatnonzero((cut > 0) & (cut < count))
            if len(half):
                raise RewriteError(
                    f"the mask of {where!r} cuts part of channel {half[0]} of {group.name!r}, whose {count[half[0]]} outputs "
                    "stay or go together"
                )
            removed.setdefault(group.name, np.flatnonzero(cut).tolist())
            gone = set(np.flatnonzero(cut).tolist())
            for maker in group.makers:
                other = path_text(maker.module)
                theirs = ~np.asarray(masks.get(other, np.ones(extents[other], bool)), bool)
                same = len(theirs) == extents[other] and gone == set(
                    maker.channels[theirs[maker.indices]].tolist()
                )
                if gone and not same:
                    raise RewriteError(
                        f"the mask of {where!r} cuts half of a tied group: {other!r} makes the same channels and its mask "
                        "does not say so; give both the same mask"
                    )
        if (going & ~free).any():
            raise RewriteError(
                f"output {np.flatnonzero(going & ~free)[0]} of {where!r} must stay: the network's outputs, or an operation "
                "that is not known, depend on it"
            )
    return removed


def parameters_without(groups: ChannelGroups, removed: Removed) -> int:
    """Number of trainable values that are left, without tracing anything."""
    lost: dict[Path, dict[int, int]] = {}
    for name, channels in removed.items():
        group = groups[name]
        gone = np.zeros(group.size, bool)
        gone[np.asarray(channels, np.int64)] = True
        for member in group.members:
            if member.leaf[0] == "params":
                axes = lost.setdefault(member.leaf, {})
                axes[member.axis] = axes.get(member.axis, 0) + int(gone[member.channels].sum())
    return sum(
        math.prod(n - lost.get(leaf, {}).get(axis, 0) for axis, n in enumerate(shape))
        for leaf, shape in groups.leaves.items()
        if leaf[0] == "params"
    )


def weakest(
    groups: ChannelGroups,
    scores: Scores,
    *,
    fraction: float | None = None,
    count: int | None = None,
    budget: float | None = None,
    cost: Cost | None = None,
    scope: Literal["global", "group", "isomorphic"] = "global",
    multiple: int = 1,
) -> dict[str, list[int]]:
    """The least important channels.

    Args:
        groups: of the network.
        scores: of the groups that may lose channels; others lose none.
        fraction: how much of all these channels goes.
        count: how many channels go.
        budget: remove as few as bring the cost to this or below.
        cost: what is held against the budget; parameters if None.
        scope: compare channels of all groups with each other (`global`), only with those of groups that are made alike
            (`isomorphic`), or take the same share of each group (`group`).
        multiple: groups keep a multiple of this many channels; one that has fewer to begin with keeps all.

    Returns:
        Group -> channels, only groups that lose some.

    Raises:
        BudgetError: not exactly one of fraction, count and budget, or one that cannot be met.
    """
    if sum(v is not None for v in (fraction, count, budget)) != 1:
        raise BudgetError("give one of a fraction, a number of channels, or a budget")
    names = list(scores)
    order = _order(groups, scores, names, scope)
    every = len(order)
    if fraction is not None and not 0 <= fraction < 1:
        raise BudgetError(f"a fraction of {fraction} cannot be removed; give one from 0 to below 1")
    taken = _Taken(groups, names, order, multiple)
    if fraction is not None:
        count = min(round(fraction * every), taken.most)
    if count is not None:
        if not 0 <= count <= taken.most:
            raise BudgetError(
                f"{count} channels cannot be removed: of {every} channels {taken.most} can, so that each group keeps some"
            )
        return taken.first(count)
    assert budget is not None
    price = cost if cost is not None else lambda r: parameters_without(groups, r)
    low, high = 0, taken.most
    cheapest = price(taken.first(high))
    if cheapest > budget:
        raise BudgetError(
            f"the smallest network costs {cheapest:,.6g}, and the budget is {budget:,.6g}; give a larger budget or let more "
            "groups lose channels"
        )
    while low < high:  # the cost falls as channels go
        middle = (low + high) // 2
        if price(taken.first(middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    return taken.first(low)


def _order(groups: ChannelGroups, scores: Scores, names: Sequence[str], scope: str) -> np.ndarray:
    """`[channels, 2]`: number of the group and of the channel, least important first."""
    rows = []
    for number, name in enumerate(names):
        values = np.asarray(scores[name], np.float64)
        if values.shape != (groups[name].size,):
            raise BudgetError(
                f"{name!r} has {groups[name].size} channels and scores of shape {values.shape}"
            )
        rows.append(np.stack([np.full(len(values), number), np.arange(len(values)), values], 1))
    table = np.concatenate(rows) if rows else np.zeros((0, 3))
    kind = np.zeros(len(names), np.int64)
    if scope == "group":
        kind = np.arange(len(names))
    elif scope == "isomorphic":
        for k, alike in enumerate(groups.isomorphic().values()):
            kind[[i for i, n in enumerate(names) if n in alike]] = k
    # Within a class by score, between classes by the share of the class that has gone.
    group = table[:, 0].astype(np.int64)
    by_score = np.lexsort((table[:, 2], kind[group]))
    sizes = np.bincount(kind[group], minlength=len(names) + 1)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    place = np.empty(len(table))
    place[by_score] = np.arange(len(table)) - starts[kind[group[by_score]]]
    share = place / np.maximum(sizes[kind[group]], 1)
    return table[np.lexsort((table[:, 2], share))][:, :2].astype(np.int64)


class _Taken:
    """Channels in the order in which they go, no group losing its last ones."""

    def __init__(
        self, groups: ChannelGroups, names: Sequence[str], order: np.ndarray, multiple: int
    ) -> None:
        self._names = names
        self._sizes = np.array([groups[n].size for n in names], np.int64)
        self._multiple = multiple
        # A group smaller than the multiple keeps all it has.
        floor = np.minimum(self._sizes, multiple)
        position = np.zeros(len(order), np.int64)
        for number in range(len(names)):
            mine = order[:, 0] == number
            position[mine] = np.arange(mine.sum())
        may = position < (self._sizes - floor)[order[:, 0]] if len(order) else np.zeros(0, bool)
        self._order = order[may]

    @property
    def most(self) -> int:
        """How many can go."""
        return len(self._order)

    def first(self, count: int) -> dict[str, list[int]]:
        """What has gone after `count` of them, groups rounded up to the multiple."""
        part = self._order[:count]
        found = {}
        for number in np.unique(part[:, 0]):
            channels = part[part[:, 0] == number, 1]
            kept = self._sizes[number] - len(channels)
            rounded = min(-(-kept // self._multiple) * self._multiple, self._sizes[number])
            channels = channels[: self._sizes[number] - rounded]
            if len(channels):
                found[self._names[number]] = sorted(channels.tolist())
        return found


def combined(*removals: Removed) -> dict[str, list[int]]:
    """Several removals from one network as one."""
    found: dict[str, set[int]] = {}
    for removed in removals:
        for name, channels in removed.items():
            found.setdefault(name, set()).update(int(c) for c in channels)
    return {name: sorted(channels) for name, channels in found.items()}


def prunable(
    groups: ChannelGroups, names: Iterable[str] | None = None, *, exact: bool = True
) -> list[str]:
    """The groups that can lose channels: those named (all by default) with several channels, exact ones if asked."""
    chosen = groups if names is None else [groups[n].name for n in names]
    return [n for n in chosen if groups[n].size > 1 and (groups[n].exact or not exact)]
