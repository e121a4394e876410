"""Structured pruning that really removes channels: which ones, and the network without them.

groups = channel_groups(net, example)                   # what belongs together
scores = magnitude(groups, variables)                   # or another of `rewrites.importance`
removed = weakest(groups, scores, fraction=0.3)         # or until a budget is met
small = rewrite(net, prune(groups, removed), example=example)
variables, report = carry(net, small, variables, example=example, key=key)
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core.channels import ChannelGroup, ChannelGroups, Member
from nnopt.core.paths import path_text
from nnopt.errors import BudgetError, PruneError, RewriteError
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
        exact: refuse groups of which that would not be true, because a mean or maximum is taken over their channels; and, when the
            rule is applied, code of which it would not be true, because it has the number of channels in it.

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
    return Resize(tuple(extents), exact)


def _gone(group: ChannelGroup, channels: Sequence[int]) -> np.ndarray:
    """`[channels]`, whether each goes."""
    index = np.asarray(channels)
    if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
        raise RewriteError(
            f"{group.name!r} loses channels by their numbers, in a flat list of integers, not "
            f"{index.dtype.name}{list(index.shape)}; of a mask of what goes take np.flatnonzero"
        )
    index = index.astype(np.int64)
    if index.size and not (index.min() >= 0 and index.max() < group.size):
        raise RewriteError(
            f"{group.name!r} has channels 0 to {group.size - 1}, not {index.max() if index.min() >= 0 else index.min()}"
        )
    gone = np.zeros(group.size, bool)
    gone[index] = True
    return gone


def _checked(group: ChannelGroup, channels: Sequence[int], exact: bool) -> np.ndarray:
    """`[channels]`, whether each goes; some stay, and all may go."""
    gone = _gone(group, channels)
    if gone.all():
        raise RewriteError(
            f"{group.name!r} would lose all of its {group.size} channels; keep at least one"
        )
    if exact and gone.any() and not group.exact:
        raise RewriteError(
            f"{group.name!r} cannot be pruned exactly: {group.inexact[0]}; leave it out, or allow it with exact=False"
        )
    return gone


def leaves_of(
    groups: ChannelGroups, variables: Variables, needed: Iterable[Path]
) -> dict[Path, Any]:
    """Variables of the network, by their paths.

    Raises:
        PruneError: one of those needed is not there, or has another shape than the network's.
    """
    flat = dict(flatten_dict(dict(variables)))
    for leaf in needed:
        shape, found = groups.leaves[leaf], getattr(flat.get(leaf), "shape", None)
        if found != shape:
            what = "are missing" if leaf not in flat else f"are {found} and not {shape}"
            raise PruneError(
                f"{type(groups.sites.net).__name__}: variables {path_text(leaf)!r} {what}; give those of the network that the "
                "groups of channels are of"
            )
    return flat


def masked(groups: ChannelGroups, removed: Removed, variables: Variables) -> Variables:
    """The same variables with zeros where channels are to go: what `prune` makes smaller without changing the outputs.

    Raises:
        SelectionError, RewriteError: see `prune`.
        PruneError: the variables are not the network's.
    """
    flat = leaves_of(groups, variables, (m.leaf for n in removed for m in groups[n].members))
    for name, channels in removed.items():
        group = groups[name]
        gone = _checked(group, channels, exact=False)
        for member in group.members:
            going = member.indices[gone[member.channels]]
            index = (slice(None),) * member.axis + (going,)
            flat[member.leaf] = jnp.asarray(flat[member.leaf]).at[index].set(0)
    return unflatten_dict(flat)


def removed_by(groups: ChannelGroups, masks: Mapping[str, Sequence[bool]]) -> dict[str, list[int]]:
    """What goes if these outputs of these modules, or these channels of these groups, go.

    Args:
        groups: of the network.
        masks: path of a module -> `[features]`, whether each of its outputs stays; or name of a group -> `[channels]`, whether each
            of its channels does. Groups have names of modules: one of a module that makes channels along several axes, as
            attention does (heads, and what is in a head), or with several variables, is the group's.

    Raises:
        RewriteError: a mask is no list of booleans, is of the wrong length, cuts what must stay, or cuts one part of channels that
            are tied to others; or two masks say different things of a group.
    """
    makers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in groups.values():
        for maker in group.makers:
            makers.setdefault(path_text(maker.module), []).append((group, maker))
    several = {w for w, made in makers.items() if len({(m.leaf, m.axis) for _, m in made}) > 1}
    removed: dict[str, list[int]] = {}
    for where, mask in masks.items():
        stays = np.asarray(mask)
        if stays.dtype != bool or stays.ndim != 1:
            raise RewriteError(
                f"the mask of {where!r} is {stays.dtype.name}{list(stays.shape)}; give a flat list of booleans, true for what stays"
            )
        if where in makers and where not in several:
            found = _cut(groups, where, ~stays, makers[where], masks, makers.keys() - several)
        elif where in groups:
            if len(stays) != groups[where].size:
                own = dict.fromkeys(f"{g.name!r} ({g.size})" for g, _ in makers.get(where, ()))
                raise RewriteError(
                    f"the mask of {where!r} has {len(stays)} entries, and the group has {groups[where].size} channels; "
                    f"the module makes channels of {', '.join(own)}: give each group a mask by its name"
                )
            found = {where: np.flatnonzero(~stays).tolist()}
        else:
            raise RewriteError(f"no channel that {where!r} makes can go")
        for name, gone in found.items():
            if removed.setdefault(name, gone) != gone:
                raise RewriteError(
                    f"the mask of {where!r} and another one say different things of {name!r}; leave one out"
                )
    return {name: gone for name, gone in removed.items() if gone}


def _cut(
    groups: ChannelGroups,
    where: str,
    going: np.ndarray,
    makers: Sequence[tuple[ChannelGroup, Member]],
    masks: Mapping[str, Sequence[bool]],
    modules: Collection[str],
) -> dict[str, list[int]]:
    """What goes if these outputs `[features]` of a module go."""
    extent = groups.leaves[makers[0][1].leaf][makers[0][1].axis]
    if len(going) != extent:
        raise RewriteError(
            f"the mask of {where!r} has {len(going)} entries, and the module makes {extent} channels"
        )
    free = np.zeros(extent, bool)
    found = {}
    for group, made in makers:
        free[made.indices] = True
        count = np.bincount(made.channels, minlength=group.size)
        cut = np.bincount(made.channels, weights=going[made.indices], minlength=group.size)
        half = np.flatnonzero((cut > 0) & (cut < count))
        if len(half):
            raise RewriteError(
                f"the mask of {where!r} cuts part of channel {half[0]} of {group.name!r}, whose {count[half[0]]} outputs "
                "stay or go together"
            )
        found[group.name] = gone = np.flatnonzero(cut).tolist()
        for maker in group.makers if gone else ():
            other = path_text(maker.module)
            if not _says(group, maker, masks, modules, gone):
                raise RewriteError(
                    f"the mask of {where!r} cuts half of a tied group: {other!r} makes the same channels and its mask "
                    f"does not say so; give both the same mask, or one to the group {group.name!r}"
                )
    if (going & ~free).any():
        raise RewriteError(
            f"output {np.flatnonzero(going & ~free)[0]} of {where!r} must stay: the network's outputs, or an operation "
            "that is not known, depend on it"
        )
    return found


def _says(
    group: ChannelGroup,
    maker: Member,
    masks: Mapping[str, Sequence[bool]],
    modules: Collection[str],
    gone: Sequence[int],
) -> bool:
    """Whether a module's mask, or that of the group, has these channels of the group go."""
    where = path_text(maker.module)
    if where in modules and where in masks:
        going = ~np.asarray(masks[where], bool)
        fits = maker.indices.max() < len(going)
        return bool(fits) and sorted({*maker.channels[going[maker.indices]].tolist()}) == list(gone)
    if group.name in modules or group.name not in masks:
        return False
    return np.flatnonzero(~np.asarray(masks[group.name], bool)).tolist() == list(gone)


def parameters_without(groups: ChannelGroups, removed: Removed) -> int:
    """Number of trainable values that are left, without tracing anything.

    Raises:
        SelectionError: there is no such group.
        RewriteError: a group has no such channel.
    """
    lost: dict[Path, dict[int, int]] = {}
    for name, channels in removed.items():
        group = groups[name]
        gone = _gone(group, channels)
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
        SelectionError: there is no such group.
        BudgetError: not exactly one of fraction, count and budget, or one that cannot be met; a multiple, scope or scores that
            make no sense.
    """
    if sum(v is not None for v in (fraction, count, budget)) != 1:
        raise BudgetError("give one of a fraction, a number of channels, or a budget")
    if scope not in ("global", "group", "isomorphic"):
        raise BudgetError(f"channels are compared global, group or isomorphic, not {scope!r}")
    if not _whole(multiple) or multiple < 1:
        raise BudgetError(f"widths cannot be multiples of {multiple}; give a whole number from 1")
    if count is not None and not _whole(count):
        raise BudgetError(f"{count} channels cannot be removed; give a whole number")
    if budget is not None and not (_number(budget) and math.isfinite(budget)):
        raise BudgetError(f"a budget of {budget!r} cannot be met; give a finite number")
    names = list(scores)
    order = _order(groups, scores, names, scope)
    every = len(order)
    if fraction is not None and not (_number(fraction) and 0 <= fraction < 1):
        raise BudgetError(
            f"a fraction of {fraction!r} cannot be removed; give one from 0 to below 1"
        )
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


def _number(number: object) -> bool:
    return isinstance(number, int | float | np.number) and not isinstance(number, bool)


def _whole(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _order(groups: ChannelGroups, scores: Scores, names: Sequence[str], scope: str) -> np.ndarray:
    """`[channels, 2]`: number of the group and of the channel, least important first."""
    rows = []
    for number, name in enumerate(names):
        values = np.asarray(scores[name], np.float64)
        if values.shape != (groups[name].size,):
            raise BudgetError(
                f"{name!r} has {groups[name].size} channels and scores of shape {values.shape}"
            )
        if not np.isfinite(values).all():
            raise BudgetError(
                f"channel {np.flatnonzero(~np.isfinite(values))[0]} of {name!r} has a score of "
                f"{values[~np.isfinite(values)][0]}; give finite scores, or leave the group out"
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
