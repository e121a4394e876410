"""Scaling a network down: width, depth, resolution, and the inner width of its residual blocks.

The alternatives to pruning (Crowley et al., "A Closer Look at Structured Pruning", https://arxiv.org/abs/1810.04622): smaller
members of the same family, trained from scratch. Channels that belong together are found in the network's own program
(`core.channels`), so the rules take any linen network. Weights are carried as far as they fit: a narrower network starts
from the first channels of the wide one.
"""

import abc
import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnopt.core import Dataflow, Rewrite, Selector, Site, Sites, select
from nnopt.core.channels import ChannelGroup, ChannelGroups, channel_groups_traced
from nnopt.core.dataflow import LAYERS
from nnopt.core.example import spec_text
from nnopt.core.paths import path_text
from nnopt.errors import RewriteError, SelectionError
from nnopt.layers import AtResolution, Identity
from nnopt.rewrites.resize import Extent, Resize
from nnopt.typing import Edits, Path

_MOST_CHANNELS = 2**20
_LONGEST_SIDE = 2**16
"""Far above what any network has, and far below what a mistyped factor asks for."""


def resize_groups(groups: ChannelGroups, sizes: Mapping[str, int]) -> Resize:
    """The rule that gives groups of channels other sizes.

    Args:
        groups: of the network.
        sizes: group -> how many channels it shall have. Smaller ones keep their first channels, the weights of larger
            ones are initialised afresh.

    Raises:
        SelectionError: there is no such group.
        RewriteError: a size that is no whole number, below 1, or above a million.
    """
    kept: dict[tuple[Path, int], np.ndarray] = {}
    grown: dict[tuple[Path, int], int] = {}
    for name, wanted in sizes.items():
        group = groups[name]
        if not (_is_number(wanted) and wanted % 1 == 0):
            raise RewriteError(f"{name!r} would have {wanted!r} channels; give a whole number")
        size = int(wanted)
        if size < 1:
            raise RewriteError(f"{name!r} would be left with {size} channels; keep at least one")
        if size > _MOST_CHANNELS:
            raise RewriteError(
                f"{name!r} would have {size:,} channels; give it {_MOST_CHANNELS:,} or fewer"
            )
        if size == group.size:
            continue
        for member in group.members:
            key = member.leaf, member.axis
            extent = groups.leaves[member.leaf][member.axis]
            stays = kept.setdefault(key, np.ones(extent, bool))
            stays[member.indices] &= member.channels < size
            if size > group.size:
                each = len(member.indices) // group.size
                grown[key] = grown.get(key, 0) + each * (size - group.size)
    extents = []
    for (leaf, axis), stays in kept.items():
        more = grown.get((leaf, axis), 0)
        indices = None if more else tuple(np.flatnonzero(stays).tolist())
        extents.append(Extent(path_text(leaf), axis, int(stays.sum()) + more, indices))
    return Resize(tuple(extents))


def _check_factor(rule: Rewrite, field: str, most: float = math.inf) -> None:
    """Refuses what is no number above 0, infinity among it, or above `most`."""
    value = getattr(rule, field)
    if _is_number(value) and 0 < value < math.inf and value <= most:
        return
    bound = f" and up to {most:g}" if most < math.inf else ""
    raise RewriteError(
        f"{type(rule).__name__}: {field}={value!r}; give a finite number above 0{bound}"
    )


def _check_multiple(rule: Rewrite, multiple: Any) -> None:
    if not (_is_number(multiple) and multiple >= 1 and multiple % 1 == 0):
        raise RewriteError(
            f"{type(rule).__name__}: multiple={multiple!r}; give a whole number from 1"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _scaled(name: str, width: float, factor: float) -> float:
    """The width times the factor.

    Raises:
        RewriteError: it is beyond any network.
    """
    # Each for itself first: Python's integers multiply to more than a float holds.
    if max(width, factor) > _MOST_CHANNELS or width * factor > _MOST_CHANNELS:
        raise RewriteError(
            f"a width of {width} x {factor} gives {name!r} more than {_MOST_CHANNELS:,} channels; give a smaller factor"
        )
    return width * factor


class Widths(Rewrite):
    """A rule that sets the sizes of groups of channels."""

    @property
    def pins(self) -> frozenset[str]:
        """See `Rewrite`."""
        return Resize(()).pins

    @abc.abstractmethod
    def sizes(self, groups: ChannelGroups) -> Mapping[str, int]:
        """Group -> its new size."""

    def written_out(self, sites: Sites) -> Resize:
        """See `Rewrite`."""
        groups = channel_groups_traced(sites)
        return resize_groups(groups, self.sizes(groups))

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""
        return self.written_out(sites)(sites)

    def carry(
        self, path: Path, old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.Array]:
        """Never called: `written_out` is carried instead."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ScaleWidth(Widths):
    """Every convolution and dense layer but the last, `factor` times as wide.

    Before -> after with a factor of 1/2: `Conv(64) -> Conv(32)`, its batch norm and what reads it likewise. Numbers of groups stay
    as they are, those of depthwise convolutions follow their channels. Of attention the heads become narrower, and stay as many.

    Attributes:
        factor: of the number of channels.
        multiple: widths are rounded to the nearest multiple, up if that would lose more than a tenth (as MobileNet does,
            https://arxiv.org/abs/1801.04381). Widths that are none to begin with are rounded to whole channels.
        keep: modules that stay as wide as they are; the stem of a wide residual network, which all members of the family share.
    """

    factor: float
    multiple: int = 8
    keep: Selector | str | None = None

    def sizes(self, groups: ChannelGroups) -> Mapping[str, int]:
        """See `Widths`.

        Raises:
            RewriteError: the factor or the multiple is not positive, or the factor leaves a layer without channels.
        """
        _check_factor(self, "factor")
        _check_multiple(self, self.multiple)
        chosen = select(groups.sites, self.keep).paths if self.keep is not None else ()
        names = [n for n, g in groups.items() if not any(m.module in chosen for m in g.makers)]
        scaled = _one_for_each_variable(groups, names)
        left = (groups[n] for n in names if n not in scaled)
        heads = {maker.leaf: len(maker.indices) for group in left for maker in group.makers}
        return {n: self._size(groups[n], heads.get(groups[n].makers[0].leaf, 1)) for n in scaled}

    def _size(self, group: ChannelGroup, heads: int) -> int:
        # A convolution in groups makes several outputs for each channel of its group, and so does attention, one for each head.
        each = len(group.makers[0].indices) // group.size * heads
        wanted = _scaled(group.name, group.size * each, self.factor)
        multiple = self.multiple if group.size * each % self.multiple == 0 else 1
        if wanted < 0.5 * each:
            raise RewriteError(
                f"a factor of {self.factor} leaves none of the {group.size} channels of {group.name!r}; give a larger one"
            )
        step = math.lcm(multiple, each)
        found = max(step, int(wanted + step / 2) // step * step)
        return (found if found >= 0.9 * wanted else found + step) // each


@dataclasses.dataclass(frozen=True)
class Bottleneck(Widths):
    """The inner width of residual blocks, `z` times what it is: `block(64 -> 64 -> 64)` -> `block(64 -> int(64 z) -> 64)`.

    What only one block has is inner: between its layers. The widths of the residual stream stay, as they do when inner
    channels are pruned.

    Attributes:
        z: factor of the inner widths.
        multiple: inner widths are multiples of it, rounded down, at least one multiple.
    """

    z: float
    multiple: int = 1

    def sizes(self, groups: ChannelGroups) -> Mapping[str, int]:
        """See `Widths`.

        Raises:
            RewriteError: `z` or the multiple is not positive, or `z` leaves a block without channels.
        """
        _check_factor(self, "z")
        _check_multiple(self, self.multiple)
        found = {}
        for name in scaled_inner_groups(groups):
            size = int(_scaled(name, groups[name].size, self.z) + 1e-9)
            if size < 1:
                raise RewriteError(
                    f"an inner width of {groups[name].size} x {self.z} leaves {name!r} without channels; give a larger z"
                )
            found[name] = max(size // self.multiple, 1) * self.multiple
        return found


@dataclasses.dataclass(frozen=True)
class ScaleProfile(Widths):
    """Inner widths from a list, such as those that pruning has left, times a factor: one pruned network makes a family.

    Attributes:
        profile: a width for each inner group of channels, in the order of the network; positive whole numbers.
        factor: of all of them.
    """

    profile: tuple[int, ...]
    factor: float = 1.0

    def sizes(self, groups: ChannelGroups) -> Mapping[str, int]:
        """See `Widths`.

        Raises:
            RewriteError: a width is no positive whole number, the profile has another length than the network has inner widths, or
                the factor leaves one empty.
        """
        for number, width in enumerate(self.profile):
            # Infinity and NaN are no multiples of 1 either.
            if not (_is_number(width) and width > 0 and width % 1 == 0):
                raise RewriteError(
                    f"ScaleProfile: width {number} of the profile is {width!r}; widths are positive whole numbers"
                )
        _check_factor(self, "factor")
        names = scaled_inner_groups(groups)
        if len(names) != len(self.profile):
            raise RewriteError(
                f"the profile has {len(self.profile)} widths, and {type(groups.sites.net).__name__} has {len(names)} inner ones "
                f"({names[0] if names else 'none'}, ...); give one for each"
            )
        found = {}
        for name, width in zip(names, self.profile, strict=True):
            found[name] = int(_scaled(name, width, self.factor) + 1e-9)
            if found[name] < 1:
                raise RewriteError(
                    f"a width of {width} x {self.factor} leaves {name!r} without channels; give a larger factor"
                )
        return found


def residual_blocks(sites: Sites) -> Sites:
    """The innermost modules that add a branch of convolutions to a shortcut, or, outside of these, one of dense layers.

    Raises:
        SelectionError: the network has none.
    """
    flow = Dataflow(sites.net, sites.example)
    blocks = {add.path for add in flow.residual_adds if add.path}
    for add in flow.residual_adds_over(LAYERS):
        if add.path and not any(add.path[: len(b)] == b for b in blocks if b != add.path):
            blocks.add(add.path)
    found = sites.where(lambda s: s.path in blocks)
    if not len(found):
        raise SelectionError(
            f"{type(sites.net).__name__} has no module that adds a branch of convolutions or dense layers to a shortcut; scale its "
            "width, or name the blocks that go: ScaleDepth(drop=(...))"
        )
    return found


def scaled_inner_groups(groups: ChannelGroups) -> list[str]:
    """The inner groups that `Bottleneck` and `ScaleProfile` set: all but the heads of attention, which stay as many.

    Raises:
        SelectionError: the network has no residual block.
    """
    return _one_for_each_variable(groups, inner_groups(groups))


def _one_for_each_variable(groups: ChannelGroups, names: Sequence[str]) -> list[str]:
    """Of these groups those that widths are scaled by: where variables make channels along several axes, those of the last.

    A query of attention has a kernel `[features, heads, features of a head]`: scaled along both it would follow the factor twice.
    """
    last: dict[Path, int] = {}
    for name in names:
        for maker in groups[name].makers:
            last[maker.leaf] = max(last.get(maker.leaf, 0), maker.axis)
    return [n for n in names if any(m.axis == last[m.leaf] for m in groups[n].makers)]


def inner_groups(groups: ChannelGroups) -> list[str]:
    """Groups that all belong to one residual block, in the order of the network.

    Raises:
        SelectionError: the network has no residual block.
    """
    blocks = residual_blocks(groups.sites).paths

    def inside(group: ChannelGroup) -> bool:
        owners = {next((b for b in blocks if m[: len(b)] == b), None) for m in group.modules}
        return len(owners) == 1 and None not in owners

    return [name for name, group in groups.items() if inside(group)]


@dataclasses.dataclass(frozen=True)
class ScaleDepth(Rewrite):
    """Fewer blocks: of each stage about `factor` times as many, those that go spread evenly.

    Before -> after: `block -> Identity` for blocks that return what they take in shape. The first block of a stage stays.

    Attributes:
        factor: share of each stage's blocks that stays, at least one.
        drop: in its place, the blocks that go.
    """

    factor: float | None = None
    drop: tuple[str, ...] = ()

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: both or neither of factor and drop, a factor outside of 0 to 1, a text in place of paths to drop, a block
                to drop that changes the shape, or a factor for blocks that return several arrays.
            SelectionError: the network has no residual blocks, or none at a path to drop.
        """
        if (self.factor is None) == (not self.drop):
            raise RewriteError("ScaleDepth takes either a factor or the blocks to drop")
        if isinstance(self.drop, str):
            raise RewriteError(
                f"ScaleDepth: drop={self.drop!r} is one text; give a tuple of paths, such as drop=({self.drop!r},)"
            )
        if self.factor is not None:
            _check_factor(self, "factor", 1.0)
            return {path: Identity() for path in self._spread(residual_blocks(sites))}
        for path in self.drop:
            if not _keeps_shape(sites[path]):
                raise RewriteError(
                    f"{path!r} cannot be dropped: it returns another shape than it takes"
                )
        return {sites[path].path: Identity() for path in self.drop}

    def _spread(self, blocks: Sites) -> Iterator[Path]:
        assert self.factor is not None
        for stage in _stages(blocks):
            going = len(stage) - max(1, round(len(stage) * self.factor))
            able = [s.path for s in stage[1:] if _keeps_shape(s)]
            going = min(going, len(able))
            for i in range(going):
                yield able[(2 * i + 1) * len(able) // (2 * going)]


def _keeps_shape(site: Site) -> bool:
    taken, made = site.inputs[0] if site.inputs else None, site.outputs
    return (
        getattr(taken, "shape", None) == getattr(made, "shape", ())
        and taken is not None
        and taken.dtype == made.dtype
    )


def _stages(blocks: Sites) -> list[list[Site]]:
    """Neighbouring blocks that return the same shape.

    Raises:
        RewriteError: a block does not return one array.
    """
    stages: list[list[Site]] = []
    for site in blocks:
        if not hasattr(site.outputs, "shape"):
            raise RewriteError(
                f"ScaleDepth: block {path_text(site.path)!r} returns {spec_text(site.outputs)} and not one array, so that stages "
                "cannot be told apart; name the blocks that go, with drop=(...)"
            )
        same = bool(stages) and stages[-1][-1].outputs.shape == site.outputs.shape
        if not same or not _keeps_shape(site):
            stages.append([])
        stages[-1].append(site)
    return stages


@dataclasses.dataclass(frozen=True)
class ScaleResolution(Rewrite):
    """Images of another size: `net(x) -> net(resize(x, factor))`. No weight changes.

    Attributes:
        factor: of height and width.
    """

    factor: float

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: a factor that is not positive, or that leaves no pixel or far too many, or a network that takes no images.
        """
        _check_factor(self, "factor")
        root = sites[()]
        shape = getattr(root.inputs[0], "shape", ()) if root.inputs else ()
        if len(shape) != 4:
            raise RewriteError(
                f"ScaleResolution: {type(sites.net).__name__} takes an input of shape {tuple(shape)}; give a network of images "
                "[batch, height, width, channels]"
            )
        # A side of one pixel cannot shrink, and `AtResolution` leaves it.
        for side in (n for n in shape[1:3] if n > 1):
            if not 1 <= round(side * min(self.factor, _LONGEST_SIDE)) <= _LONGEST_SIDE:
                raise RewriteError(
                    f"ScaleResolution: {side} pixels cannot be scaled by {self.factor}; give a factor that leaves 1 to "
                    f"{_LONGEST_SIDE:,} of them"
                )
        return {(): AtResolution(root.module, self.factor)} if self.factor != 1 else {}

    def carry(
        self, path: Path, old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.Array]:
        """All weights as they are."""
        return {k: old[k] for k in new if k in old}
