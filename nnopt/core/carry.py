"""Carrying weights from a network into a rewritten one, with a report of what became of each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core.example import Example, rngs
from nnopt.core.fingerprint import fingerprint
from nnopt.core.patch import Patched
from nnopt.core.rewrite import Rewrite, Step, base_of, history
from nnopt.core.sites import sites
from nnopt.errors import CarryError
from nnopt.typing import Path, Variables


@dataclasses.dataclass(frozen=True)
class CarryReport:
    """What became of each array, named `"collection/path/name"`.

    Attributes:
        copied: the same array as before.
        transformed: computed from old arrays by a rule.
        fresh: newly initialised.
        dropped: arrays of the old network that the new one has no place for.
    """

    copied: tuple[str, ...]
    transformed: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """One line of counts."""
        return (
            f"{len(self.copied)} arrays copied, {len(self.transformed)} transformed, "
            f"{len(self.fresh)} fresh, {len(self.dropped)} dropped"
        )


def carry(
    old: nn.Module, new: nn.Module, variables: Variables, *, example: Any, key: jax.Array
) -> tuple[Any, CarryReport]:
    """Brings the weights of `old` into `new`, which was rewritten from it.

    Each step of the history carries in turn: what it did not touch is copied, what it did touch follows the rule's own
    `Rewrite.carry`, and what is left is initialised afresh.

    Args:
        old: the network the weights belong to.
        new: `rewrite(old, ...)`.
        variables: variable dictionary of `old`.
        example: inputs to initialise fresh weights with.
        key: PRNG key for fresh weights.

    Returns:
        The variable dictionary of `new`, and the report.

    Raises:
        CarryError: `new` was not rewritten from `old`, or `variables` are not those of `old`.
    """
    steps = _steps_between(old, new)
    example = Example.of(example)
    arrays = _flat(variables)
    expected = _flat(_specs(old, example))
    for name, spec in expected.items():
        found = arrays.get(name)
        if found is None or found.shape != spec.shape:
            raise CarryError(
                f"the variables given are not those of the old network: {'/'.join(name)!r} should have shape {spec.shape}, "
                f"found {None if found is None else found.shape}; pass what its init or training returned"
            )
    current: dict[Path, Any] = dict(arrays)
    origin: dict[Path, str] = dict.fromkeys(arrays, "copied")
    base, before = base_of(new), old
    for step in steps:
        after = Patched(base, step.patch)
        rule = step.rule
        if type(rule).written_out is not Rewrite.written_out:
            rule = rule.written_out(sites(before, step.example))
        current, origin = _carry_step(step, rule, current, origin, _flat(_specs(after, example)))
        before = after
    wanted = _flat(_specs(new, example))
    missing = [name for name in wanted if name not in current]

    @jax.jit  # only what is missing is compiled and computed
    def fresh(key: jax.Array) -> dict[Path, Any]:
        made = _flat(example.init(new, key))
        return {name: made[name] for name in missing}

    current |= fresh(key) if missing else {}
    result = {name: current[name] for name in wanted}
    named = {
        kind: tuple("/".join(n) for n in wanted if origin.get(n, "fresh") == kind)
        for kind in ("copied", "transformed", "fresh")
    }
    dropped = tuple("/".join(n) for n in arrays if origin.get(n) != "copied")
    return unflatten_dict(result), CarryReport(**named, dropped=dropped)


def _carry_step(
    step: Step,
    rule: Rewrite,
    arrays: Mapping[Path, Any],
    origin: Mapping[Path, str],
    specs: Mapping[Path, Any],
) -> tuple[dict[Path, Any], dict[Path, str]]:
    """One step: names are `(collection, *path, leaf)`."""
    out: dict[Path, Any] = {}
    source: dict[Path, str] = {}

    def edited(name: Path) -> Path | None:
        within = [p for p in step.paths if name[1 : 1 + len(p)] == p]
        return max(within, key=len, default=None)

    for name, spec in specs.items():
        # What stands behind an edit may take more or fewer channels than it did.
        if edited(name) is None and name in arrays and arrays[name].shape == spec.shape:
            out[name], source[name] = arrays[name], origin[name]
    names = {
        path: {n: _relative(n, path) for n in {*arrays, *specs} if edited(n) == path}
        for path in step.paths
    }
    old = {
        path: {text: arrays[n] for n, text in inside.items() if n in arrays}
        for path, inside in names.items()
    }
    new = {
        path: {text: specs[n] for n, text in inside.items() if n in specs}
        for path, inside in names.items()
    }
    carried = rule.carry_all(old, new)
    for path, inside in names.items():
        for name, text in inside.items():
            if text in carried[path] and name in specs:
                value = carried[path][text]
                if value.shape != specs[name].shape:
                    raise CarryError(
                        f"{type(rule).__name__} carries {'/'.join(name)!r} with shape {value.shape}, the network wants "
                        f"{specs[name].shape}; mend the rule's carry"
                    )
                out[name] = value
                source[name] = origin[name] if old[path].get(text) is value else "transformed"
    return out, source


def _relative(name: Path, path: Path) -> str:
    return "/".join((name[0], *name[1 + len(path) :]))


def _steps_between(old: nn.Module, new: nn.Module) -> tuple[Step, ...]:
    before, after = history(old), history(new)
    same = fingerprint(base_of(old)) == fingerprint(base_of(new)) and [
        s.fingerprint for s in before
    ] == [s.fingerprint for s in after[: len(before)]]
    if not same:
        raise CarryError(
            f"weights cannot be carried: the new network was not rewritten from the old {type(base_of(old)).__name__}; "
            "pass the network that was given to rewrite, and what rewrite returned"
        )
    return after[len(before) :]


def _specs(net: nn.Module, example: Example) -> Any:
    return example.abstractly(lambda k, *a, **kw: net.init(rngs(k), *a, **kw), jax.random.key(0))


def _flat(tree: Any) -> dict[Path, Any]:
    return flatten_dict(nn.meta.unbox(dict(tree)))
