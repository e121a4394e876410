"""Networks with other widths: the one rule behind scaling and pruning.

What changes is written down variable by variable. The modules that hold them are given other `features` (and group counts), and
where a network decides by its own fields what to build (`if x.shape[-1] != self.features`) those follow.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from nnopt.core import Dataflow, Rewrite, Site, Sites
from nnopt.core.modules import configuration
from nnopt.core.paths import as_path, path_text
from nnopt.core.rewrite import attempt
from nnopt.errors import RewriteError
from nnopt.typing import Edits, Path

Shapes = Mapping[tuple[str, str], tuple[int, ...]]
"""(collection, name) -> shape, of the variables of one site."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """What becomes of one axis of one variable.

    Attributes:
        variable: such as `"params/stage1_block0/conv1/kernel"`.
        axis: of it.
        size: its new extent.
        kept: the old indices that it has, in order; None for new ones, initialised afresh.
    """

    variable: str
    axis: int
    size: int
    kept: tuple[int, ...] | None = None

    @property
    def leaf(self) -> Path:
        """`(collection, *path, name)`."""
        return as_path(self.variable)


@dataclasses.dataclass(frozen=True)
class Resize(Rewrite):
    """Variables of other shapes: `Conv(64) -> Conv(48)`, and all that belongs to it.

    Made by the rules that scale and by `prune`; it stands in records in their place, so that what a network is does not depend on
    how its widths were found.

    Attributes:
        extents: every axis that changes.
    """

    extents: tuple[Extent, ...]

    @property
    def pins(self) -> frozenset[str]:
        """See `Rewrite`."""
        return frozenset(("features", "feature_group_count"))

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: a variable is not in the network, or the network builds other layers, or layers of other widths, when it
                is narrower.
        """
        owners = {e.leaf: _owner(e, sites) for e in self.extents}
        wanted = self._shapes(sites, owners)
        edits: dict[Path, nn.Module] = {}
        for site in {site.path: site for site in owners.values()}.values():
            old = {(c, n): v.shape for c, names in site.variables.items() for n, v in names.items()}
            new = {key: wanted.get((key[0], *site.path, *as_path(key[1])), shape) for key, shape in old.items()}  # fmt: skip
            edits[site.path] = resized(site, old, new)
        problem = _problem(sites, edits, wanted)
        if problem is None:
            return edits
        # A network that decides by its own fields what to build needs those to follow, unless that makes it decide otherwise.
        around = dict(_enclosing(sites, edits))
        while around:
            if (problem := _problem(sites, {**around, **edits}, wanted)) is None:
                return {**around, **edits}
            guilty = [p for p in around if problem.path[: len(p)] == p]
            if not guilty:
                break
            del around[max(guilty, key=len)]
        raise RewriteError(
            f"{type(sites.net).__name__} does not run at these widths: {problem.why}; leave the channels there as they are"
        )

    def _shapes(self, sites: Sites, owners: Mapping[Path, Site]) -> dict[Path, tuple[int, ...]]:
        shapes: dict[Path, tuple[int, ...]] = {}
        for extent in self.extents:
            leaf, site = extent.leaf, owners[extent.leaf]
            name = "/".join(leaf[1 + len(site.path) :])
            shape = list(shapes.get(leaf, site.variables[leaf[0]][name].shape))
            if extent.size < 1 or not 0 <= extent.axis < len(shape):
                raise RewriteError(
                    f"{extent.variable!r} {tuple(shape)} cannot have {extent.size} along axis {extent.axis}; "
                    "keep at least one channel"
                )
            shape[extent.axis] = extent.size
            shapes[leaf] = tuple(shape)
        return shapes

    def carry(
        self, path: Path, old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.Array]:
        """Copies what is kept of each variable; one with new channels is initialised afresh."""
        changes: dict[Path, list[Extent]] = {}
        for extent in self.extents:
            changes.setdefault(extent.leaf, []).append(extent)
        carried = {}
        for key in old.keys() & new.keys():
            collection, *names = key.split("/")
            array = old[key]
            for extent in changes.get((collection, *path, *names), ()):
                if extent.kept is not None:
                    array = jnp.take(array, np.asarray(extent.kept, np.int32), extent.axis)
            if array.shape == new[key].shape:
                carried[key] = array
        return carried


def _owner(extent: Extent, sites: Sites) -> Site:
    """The site that a variable belongs to."""
    collection, *names = extent.leaf
    for length in range(len(names) - 1, -1, -1):
        path = tuple(names[:length])
        if path in sites and "/".join(names[length:]) in sites[path].variables.get(collection, {}):
            return sites[path]
    raise RewriteError(
        f"no module of {type(sites.net).__name__} has a variable {extent.variable!r}; was the rule made for another network?"
    )


def resized(site: Site, old: Shapes, new: Shapes) -> nn.Module:
    """The module of a site, for variables of other shapes.

    Linear layers make as many features as their kernel has along its last axes, and a convolution of single channels has as many
    groups as channels. What infers its widths, as normalisation does, is left as it is. In any other module a
    field that holds the old extent of an axis gets the new one.
    """
    module = site.module
    fields = configuration(module)
    if old == new:
        return module.clone(parent=None)
    before, after = (s.get(("params", "kernel")) for s in (old, new))
    updates: dict[str, Any] = {}
    if "features" in fields and before is not None and after is not None:
        features = fields["features"]
        if isinstance(features, Sequence):
            updates["features"] = tuple(after[len(after) - len(features) :])
        elif getattr(module, "transpose_kernel", False):
            updates["features"] = after[-2]
        else:
            updates["features"] = after[-1]
        groups = fields.get("feature_group_count", 1)
        if groups > 1 and before[-2] == 1:
            updates["feature_group_count"] = after[-1] * groups // before[-1]
    elif "features" in fields and ("params", "embedding") in old:
        updates["features"] = new["params", "embedding"][-1]
    else:
        changes = {(a, b) for key in old for a, b in zip(old[key], new[key], strict=True) if a != b}
        for a, b in changes:
            for name, value in fields.items():
                if type(value) is int and value == a:
                    updates[name] = b
    return module.clone(parent=None, **updates)


def _enclosing(sites: Sites, edits: Edits) -> Edits:
    """Modules around the edited ones whose field says how many features they return.

    Such a field has the number of channels of the module's output, and of the last linear layer in it that makes as many; it
    gets what that layer makes now.
    """
    found: dict[Path, nn.Module] = {}
    made = {
        path: (sites[path].module.features, module.features)
        for path, module in edits.items()
        if isinstance(getattr(module, "features", None), int)
    }
    order = {path: i for i, path in enumerate(sites.paths)}
    for site in sites:
        inside = [p for p in made if len(p) > len(site.path) and p[: len(site.path)] == site.path]
        shape = getattr(site.outputs, "shape", None)
        if not inside or not site.path or not shape:
            continue
        for name, value in configuration(site.module).items():
            if type(value) is not int or value != shape[-1]:
                continue
            last = [p for p in sorted(inside, key=order.__getitem__) if made[p][0] == value]
            if last and made[last[-1]][1] != value:
                base = found.get(site.path, site.module)
                found[site.path] = base.clone(parent=None, **{name: made[last[-1]][1]})
    return found


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Why an edited network is not the one with other shapes, and where."""

    path: Path
    why: str


def _problem(sites: Sites, edits: Edits, wanted: Mapping[Path, tuple[int, ...]]) -> _Problem | None:
    """What is wrong with the edited network: it must have these shapes, and compute what it did."""
    tried = attempt(sites, edits)
    trace = tried.trace
    if trace.error is not None:
        path = trace.recorder.failed or ()
        reason = (str(trace.error).strip().splitlines() or [""])[0]
        return _Problem(path, f"{path_text(path)!r} raises {type(trace.error).__name__}: {reason}")
    if tried.unreached:
        path = tried.unreached[0]
        return _Problem(path, f"it does not call {path_text(path)!r} any more")
    old, new = (_flat(v) for v in (sites.variables, trace.variables))
    for leaf, spec in old.items():
        shape, found = wanted.get(leaf, spec.shape), new.get(leaf)
        if found is None or found.shape != shape:
            becomes = found.shape if found is not None else "nothing"
            return _Problem(leaf[1:-1], f"{path_text(leaf)!r} {shape} becomes {becomes}")
    if extra := next((leaf for leaf in new if leaf not in old), None):
        return _Problem(extra[1:-1], f"it has {path_text(extra)!r} as well")
    before, after = (Dataflow(n, sites.example).equations for n in (sites.net, tried.net))
    for a, b in itertools.zip_longest(before, after):
        if a is None or b is None or a.primitive != b.primitive:
            path = (b or a).path
            return _Problem(path, f"{path_text(path)!r} computes something else")
    return None


def _flat(variables: Any) -> dict[Path, Any]:
    return flatten_dict(nn.meta.unbox(dict(variables)))
