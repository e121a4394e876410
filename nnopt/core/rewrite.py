"""Rewrites: pure functions from the sites of a network to edits, applied, checked and remembered."""

import abc
import copyreg
import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from nnopt.core.encode import decode, encode
from nnopt.core.example import Example, spec_text
from nnopt.core.fingerprint import fingerprint
from nnopt.core.modules import follow
from nnopt.core.patch import Patch, Patched, Steps
from nnopt.core.paths import path_text, suggestion
from nnopt.core.sites import Sites, Trace, sites
from nnopt.errors import RecordError, RewriteError, SelectionError
from nnopt.typing import Edits, Path


class Keeps(enum.Enum):
    """What a rewrite keeps of the network."""

    FUNCTION = "function"
    """With the weights carried over, outputs are equal up to rounding."""

    OUTPUT_SPEC = "output spec"
    """Outputs have the same shapes and dtypes."""


class Rewrite(abc.ABC):
    """A rule `Sites -> Edits`. Subclasses are frozen dataclasses, so a rule prints, hashes, compares and is recorded.

    A rule looks at the sites of a network and says which module shall stand at which path. It does not look at weights and
    draws no random numbers: a random choice is made by whoever builds the rule.
    """

    keeps: ClassVar[Keeps] = Keeps.OUTPUT_SPEC

    @abc.abstractmethod
    def __call__(self, sites: Sites) -> Edits:
        """What shall stand where; an empty mapping leaves the network as it is."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A rule may hold layers of Flax, whose initialisers cannot be pickled, but can be named.
        try:
            return decode, (encode(self, strict=True),)
        except RecordError:
            return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]

    @property
    def pins(self) -> frozenset[str]:
        """Fields that this rule sets on purpose, in every call of the network.

        An edit is made from what one trace saw. A boolean field that it leaves as it was, such as the
        `use_running_average` of a batch norm, follows the network, which sets it anew in each call.
        """
        return frozenset()

    def written_out(self, sites: Sites) -> "Rewrite":
        """The rule with all that it decides for these sites written out, so that `carry` needs to see no network; mostly itself."""
        return self

    def carry(
        self, path: Path, old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.Array]:
        """The weights below an edited path that follow from the old ones.

        A function-keeping rule copies what has the same name, shape and dtype; any other rule starts afresh. Rules with
        mathematics of their own override this.

        Args:
            path: the edited path.
            old: arrays below it, by `"collection/name/..."` relative to the path.
            new: specs of what the rewritten network wants there, by the same keys.

        Returns:
            Arrays for some of the keys of `new`; the others are initialised afresh.
        """
        return copy_equal(old, new) if self.keeps is Keeps.FUNCTION else {}

    def carry_all(
        self,
        old: Mapping[Path, Mapping[str, jax.Array]],
        new: Mapping[Path, Mapping[str, jax.ShapeDtypeStruct]],
    ) -> Mapping[Path, Mapping[str, jax.Array]]:
        """`carry` at each edited path. A rule overrides this where weights at one path follow from those at another.

        Args:
            old: edited path -> arrays below it, as for `carry`.
            new: edited path -> specs of what is wanted there, with the same paths.
        """
        return {path: self.carry(path, old[path], new[path]) for path in new}


def copy_equal(
    old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of `old` whose key, shape and dtype are also in `new`."""
    return {
        k: old[k]
        for k, spec in new.items()
        if k in old and (old[k].shape, old[k].dtype) == (spec.shape, spec.dtype)
    }


@dataclasses.dataclass(frozen=True)
class Step:
    """One applied rewrite.

    Attributes:
        rule: the rule.
        example: the inputs its sites were traced with.
        paths: what it edited.
        fingerprint: of the network it made.
        patch: everything that stands in that network.
    """

    rule: Rewrite
    example: Example
    paths: tuple[Path, ...]
    fingerprint: str
    patch: Patch = dataclasses.field(repr=False, compare=False)


def rewrite(net: nn.Module, *rules: Rewrite, example: Any) -> nn.Module:
    """Applies rules one after another and checks each result.

    Before -> after: `net` -> a network whose `init` and `apply` take and return the same, with other modules standing at the
    edited paths. Parameters of everything untouched keep their paths and, for the same seed, their exact values.

    Args:
        net: any linen module, rewritten before or not.
        *rules: rewrites, applied in this order; each sees the sites that the ones before it left.
        example: an array of the network's input shape, or an `Example`.

    Returns:
        The rewritten network, or `net` itself if no rule edits anything.

    Raises:
        SelectionError: a rule names a path that is not in the network.
        RewriteError: an edit is never reached, the network fails with it, or its outputs change shape or dtype.
        UnsupportedNetworkError: see `sites`.
    """
    return rewrite_traced(sites(net, example), *rules)


def rewrite_traced(before: Sites, *rules: Rewrite) -> nn.Module:
    """`rewrite` for a network that has been traced already.

    Args:
        before: all sites of the network, not a selection of them.
        *rules: as for `rewrite`.

    Returns:
        The rewritten network, or the traced one if no rule edits anything.

    Raises:
        SelectionError, RewriteError, UnsupportedNetworkError: as `rewrite`.
    """
    net, example = before.net, before.example
    for rule in rules:
        edits = dict(rule(before))
        if not edits:
            continue
        _check_edits(rule, edits, before)
        attempted = attempt(before, edits, rule.pins)
        edits, trace = attempted.edits, attempted.trace
        _check_result(rule, edits, before, trace)
        if attempted.unreached:
            raise RewriteError(
                f"{_one_line(rule)} edits {path_text(attempted.unreached[0])!r}, but the rewritten network never calls what stands "
                "there; edit the module around it instead"
            )
        living = attempted.living
        print_ = fingerprint(Patched(base_of(net), living))
        step = Step(rule, example, tuple(edits), print_, living)
        net = Patched(base_of(net), living, Steps((*history(net), step)))
        after = trace.sites()
        before = Sites(net, example, after.outputs, after.variables, after)
    return net


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What edits lead to, whether it works or not.

    Attributes:
        edits: as they stand: what they leave alone is bound to the network.
        kept: what earlier rules put elsewhere, or at the same places.
        shadowed: what earlier rules put below the edits.
        trace: the run.
    """

    edits: dict[Path, nn.Module]
    kept: dict[Path, nn.Module]
    shadowed: dict[Path, nn.Module]
    trace: Trace

    @property
    def net(self) -> nn.Module:
        """The network that was run."""
        return self.trace.net

    @property
    def living(self) -> Patch:
        """Everything that stands in it."""
        stood_in = self.trace.recorder.stood_in
        below = {p: m for p, m in self.shadowed.items() if p in stood_in}
        return Patch({**self.kept, **below, **self.edits})

    @property
    def unreached(self) -> list[Path]:
        """Edited paths at which the network calls nothing."""
        stood_in = self.trace.recorder.stood_in
        return [p for p in (*self.kept, *self.edits) if p not in stood_in]


def attempt(before: Sites, edits: Edits, pins: frozenset[str] = frozenset()) -> Attempt:
    """Runs a network with edits, and raises nothing whatever becomes of it.

    Args:
        before: all sites of the network.
        edits: path -> what shall stand there.
        pins: see `Rewrite.pins`.
    """
    base = base_of(before.net)
    patch = before.net.patch if isinstance(before.net, Patched) else Patch({})
    standing = {p: follow(m, before[p].module, patch.get(p), pins) for p, m in edits.items()}
    kept = {
        p: m for p, m in patch.items() if p in standing or not any(_above(e, p) for e in standing)
    }
    # Edits of an earlier rule below a new one survive if the new stand-in still calls what they edit.
    shadowed = {p: m for p, m in patch.items() if p not in kept}
    trace = Trace(Patched(base, Patch({**kept, **shadowed, **standing})), before.example)
    return Attempt(standing, kept, shadowed, trace)


def history(net: nn.Module) -> tuple[Step, ...]:
    """The rewrites that made a network, oldest first; empty for a network as its author wrote it."""
    return tuple(net.steps) if isinstance(net, Patched) else ()


def replay(base: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """Makes a network again from its base and history.

    Raises:
        RewriteError: a step leads to another network than it did, because a rule, a module or the base has changed.
    """
    net = base
    for step in steps:
        net = rewrite(net, step.rule, example=step.example)
        made = fingerprint(net)
        if made != step.fingerprint:
            raise RewriteError(
                f"replaying {_one_line(step.rule)} gives another network than it did (fingerprint {made[:12]}, expected "
                f"{step.fingerprint[:12]}); the base network or the rule has changed since"
            )
    return net


def base_of(net: nn.Module) -> nn.Module:
    """The network as its author wrote it."""
    return net.base if isinstance(net, Patched) else net


def _above(ancestor: Path, path: Path) -> bool:
    return len(ancestor) < len(path) and path[: len(ancestor)] == ancestor


def _check_edits(rule: Rewrite, edits: Mapping[Path, Any], before: Sites) -> None:
    for path, module in edits.items():
        if path not in before:
            raise SelectionError(
                f"{_one_line(rule)} edits {path_text(path)!r}, which is not in {type(base_of(before.net)).__name__}: "
                f"{suggestion(path, before.paths)}"
            )
        if not isinstance(module, nn.Module) or module.scope is not None:
            raise RewriteError(
                f"{_one_line(rule)} puts {_one_line(module)} at {path_text(path)!r}; "
                "expected an unbound linen module, made with parent=None"
            )


def _check_result(rule: Rewrite, edits: Edits, before: Sites, trace: Trace) -> None:
    def changed(path: Path) -> tuple[str, str] | None:
        old = before[path].outputs
        calls = trace.recorder.calls.get(path)
        if not calls or _same_spec(old, calls[0].outputs):
            return None
        return spec_text(old), spec_text(calls[0].outputs)

    guilty = next(((p, c) for p in before.paths if p in edits and (c := changed(p))), None)
    if trace.error is not None:
        if guilty:
            path, (old, new) = guilty
            where = f"{path_text(path)!r} now returns {new} instead of {old}"
        else:
            failed = path_text(trace.recorder.failed or ())
            where = f"{failed!r} raises {type(trace.error).__name__}: {_first_line(trace.error)}"
        raise RewriteError(
            f"{_one_line(rule)}: the network no longer runs, {where}; keep the output shape there, or edit what takes it as well"
        ) from trace.error
    if not _same_spec(before.outputs, trace.outputs):
        where = ""
        if guilty:
            path, (old, new) = guilty
            where = f", because {path_text(path)!r} now returns {new} instead of {old}"
        raise RewriteError(
            f"{_one_line(rule)}: the network returns {spec_text(trace.outputs)} instead of {spec_text(before.outputs)}{where}; "
            "a rewrite must keep the network's output"
        )


def _same_spec(a: Any, b: Any) -> bool:
    old, new = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    return len(old) == len(new) and all(
        key == other
        and getattr(x, "shape", x) == getattr(y, "shape", y)
        and getattr(x, "dtype", None) == getattr(y, "dtype", None)
        for (key, x), (other, y) in zip(old, new, strict=True)
    )


def _one_line(thing: Any) -> str:
    """A rule or module in a message: Flax prints modules over many lines."""
    return " ".join(repr(thing).replace("# attributes", "").split())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
