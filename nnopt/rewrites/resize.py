"""Networks with other widths: the one rule behind scaling and pruning.

What changes is written down variable by variable. The modules that hold them are given other `features` (and group counts), and
where a network decides by its own fields what to build (`if x.shape[-1] != self.features`) those follow.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from nnopt.core import Dataflow, Example, Rewrite, Site, Sites
from nnopt.core.channel_check import difference
from nnopt.core.example import rngs
from nnopt.core.modules import configuration
from nnopt.core.paths import as_path, path_text
from nnopt.core.rewrite import attempt, base_of
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
        exact: refuse a network that is not what this one is with the weights of the channels that go at zero. Else it need only
            do the same operations one by one; numbers in its code may follow its widths, as those of a mean over channels do.
    """

    extents: tuple[Extent, ...]
    exact: bool = False

    @property
    def pins(self) -> frozenset[str]:
        """See `Rewrite`."""
        return frozenset(("features", "feature_group_count"))

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: a variable is not in the network, or the network builds other layers, or layers of other widths, when it
                is narrower; or it is another function, and `exact` is set. Recurrent cells stay as wide as they are.
        """
        edits = self._edits(sites)
        if self.exact:
            self._check(sites, edits)
        return edits

    def _edits(self, sites: Sites) -> Edits:
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
        # An edit replaces what a network calls, and `nn.RNN` asks the cell in its own field how wide the first carry is.
        for site in sites:
            within = any(p[: len(site.path)] == site.path for p in edits)
            if isinstance(site.module, nn.RNNCellBase) and within:
                raise RewriteError(
                    f"{path_text(site.path)!r} of {type(sites.net).__name__}, a {type(site.module).__name__}, starts from a carry "
                    "as wide as the network says; leave its channels as they are, or make the network with a smaller cell"
                )
        raise RewriteError(
            f"{type(sites.net).__name__} does not run at these widths: {problem.why}; leave the channels there as they are"
        )

    def _check(self, sites: Sites, edits: Edits) -> None:
        """Refuses a network that is another function."""
        trace = attempt(sites, edits).trace
        narrow = Sites(trace.net, sites.example, trace.outputs, trace.variables, ())
        kept = {(e.leaf, e.axis): e.kept for e in self.extents if e.kept is not None}
        found = difference(sites, narrow, kept)
        if found is not None:
            raise RewriteError(
                f"{type(base_of(sites.net)).__name__} is another function at these widths: {path_text(found.path)!r} {found.why}; "
                "leave the channels there as they are, or allow it with exact=False"
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
    field that holds the old extent of an axis gets the new one, if the axis is as long as the field says.

    Raises:
        RewriteError: which of several fields an axis follows cannot be told.
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
        # Axes are counted from the last one: where layers are stacked the module alone has one less.
        wanted = {
            (key, axis - len(old[key]), a, b)
            for key in old
            for axis, (a, b) in enumerate(zip(old[key], new[key], strict=True))
            if a != b
        }
        for a, b in sorted({(a, b) for *_, a, b in wanted}):
            updates |= _fields_for(site, a, b, wanted)
    return module.clone(parent=None, **updates)


Change = tuple[Any, int, int, int]
"""A variable or output, one of its axes counted from the last, its old and its new extent."""
_NAMES_OF_WIDTHS = (
    "features",
    "num_features",
    "out_features",
    "hidden_features",
    "channels",
    "filters",
    "width",
)


def _fields_for(site: Site, a: int, b: int, wanted: Collection[Change]) -> dict[str, Any]:
    """Fields of a site's module that hold `a`, and with `b` in place of it make some of these changes."""
    names = [n for n, v in configuration(site.module).items() if type(v) is int and v == a]
    answers = {name: _changes(site, {name: b}) for name in names}
    sure = {name: b for name in names if any(c in wanted for c in answers[name] or ())}
    if sure:
        return sure
    # On the old inputs it does not run, as if it adds them to what it makes: it may be such a field, and says so by its name.
    unsure = [name for name in names if answers[name] is None]
    named = [name for name in _NAMES_OF_WIDTHS if name in unsure][:1] or unsure
    if len(named) > 1:
        raise RewriteError(
            f"{path_text(site.path)!r} of {type(site.module).__name__} would be {b} wide in place of {a}, which may be "
            f"{' or '.join(map(repr, named))}; call the field features, or leave the channels there as they are"
        )
    return dict.fromkeys(named, b)


def _changes(site: Site, updates: Mapping[str, int]) -> set[Change] | None:
    """What changes in the shapes of a module's variables and outputs with other fields; None if it does not run so."""
    call = site.calls[0]
    example = Example(*call.args, **call.kwargs)

    def shapes(fields: Mapping[str, Any]) -> dict[Any, tuple[int, ...]]:
        module = site.module.clone(parent=None, **fields)
        outputs, variables = example.abstractly(
            lambda key, *args, **kwargs: module.init_with_output(rngs(key), *args, method=call.method, **kwargs),
            jax.random.key(0),
        )  # fmt: skip
        found = {(c, "/".join(names)): v.shape for (c, *names), v in _flat(variables).items()}
        return found | {i: leaf.shape for i, leaf in enumerate(jax.tree.leaves(outputs))}

    try:
        old, new = shapes({}), shapes(updates)
    except Exception:  # whatever a module says of inputs that do not fit
        return None
    return {
        (key, axis - len(old[key]), a, b)
        for key in old.keys() & new.keys()
        for axis, (a, b) in enumerate(zip(old[key], new[key], strict=False))
        if a != b
    }


def _enclosing(sites: Sites, edits: Edits) -> Edits:
    """Modules around the edited ones whose field says how many features they return.

    Such a field has the number of channels of one of the module's outputs, and of the last linear layer in it that makes as many;
    it gets what that layer makes now.
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
        leaves = [v.shape for v in jax.tree.leaves(site.outputs) if getattr(v, "shape", ())]
        if not inside or not site.path:
            continue
        for value in dict.fromkeys(shape[-1] for shape in leaves):
            last = [p for p in sorted(inside, key=order.__getitem__) if made[p][0] == value]
            if not last or made[last[-1]][1] == value:
                continue
            new = made[last[-1]][1]
            wanted = [(i, -1, value, new) for i, s in enumerate(leaves) if s[-1] == value]
            updates = _fields_for(site, value, new, wanted)
            if updates:
                base = found.get(site.path, site.module)
                found[site.path] = base.clone(parent=None, **updates)
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
