"""Modules as values: detaching one from a running network and binding one in the place of another."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift

from nnopt.errors import RewriteError, UnsupportedNetworkError
from nnopt.typing import Path

_NOT_CONFIGURATION = ("parent", "name")


@dataclasses.dataclass(frozen=True)
class External:
    """In a field of a detached module: a module (or traced array) that belongs to somebody else in the network.

    `nn.Sequential([nn.Dense(4)])` written inside a compact method is the common case: the `Dense` belongs to the caller.
    A detached module cannot own it, so it remembers where its own fields held it, and takes it from the module
    it stands in for when the network runs.
    """

    field: str
    keys: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Following:
    """In a field of a stand-in: the value that the module it stands in for has there in the same call.

    `nn.BatchNorm(use_running_average=not train)` is another configuration in each mode, but one trace sees only one of them.
    `value` is what the trace saw; it counts where a module of another class stands below.
    """

    field: str
    value: Any


def configuration(module: nn.Module) -> dict[str, Any]:
    """The fields that define what a module is: everything a constructor takes but parent and name."""
    return {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(module)
        if f.init and f.name not in _NOT_CONFIGURATION
    }


def is_method(module: nn.Module, name: str) -> bool:
    """Whether an intercepted name is one of the module's methods.

    Flax also reports functions that it lifts over a module: `<lambda>`, or the body of the scan in `nn.RNN`.
    """
    return hasattr(type(module), name)


def map_values(
    fn: Callable[[Any, tuple[Any, ...]], Any], tree: Any, keys: tuple[Any, ...] = ()
) -> Any:
    """Applies `fn(leaf, keys)` to the leaves of nested lists, tuples and mappings, keeping containers' types."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_values(fn, v, (*keys, i)) for i, v in enumerate(tree)))
    if isinstance(tree, list | tuple):
        return type(tree)(map_values(fn, v, (*keys, i)) for i, v in enumerate(tree))
    if isinstance(tree, Mapping):
        return {k: map_values(fn, v, (*keys, k)) for k, v in tree.items()}
    return fn(tree, keys)


def detach(module: nn.Module) -> nn.Module:
    """A module bound in a running network -> an unbound value with the same configuration.

    Children held in fields come along; modules that belong to somebody else become `External`.
    """
    copies: dict[int, nn.Module] = {}  # one copy for a child held by two fields keeps it shared

    def copy(owner: nn.Module) -> nn.Module:
        updates = {}
        for field, value in configuration(owner).items():
            updates[field] = map_values(functools.partial(convert, owner, field), value)
        return owner.clone(parent=None, name=None, **updates)

    def convert(owner: nn.Module, field: str, value: Any, keys: tuple[Any, ...]) -> Any:
        if isinstance(value, jax.core.Tracer):
            return External(field, keys)
        if not isinstance(value, nn.Module):
            return value
        owned = value.scope is None or (
            owner.scope is not None
            and value.scope.path in (owner.scope.path, (*owner.scope.path, value.name))
        )
        if not owned:
            return External(field, keys)
        if id(value) not in copies:
            copies[id(value)] = copy(value)
        return copies[id(value)]

    return copy(module)


def share_scope(wrapper: nn.Module, inner: nn.Module) -> None:
    """`nn.share_scope`, for modules that hold modules in fields as well.

    Flax gives such children a scope when `inner` is bound, below the one that it is about to leave, and moves their
    variables but not their paths and random streams.
    """
    assert wrapper.scope is not None
    assert inner.scope is not None
    left = inner.scope
    if left.parent is wrapper.scope:  # a child of `inner` may have the name of the field
        wrapper.scope.reservations.pop(str(left.name), None)
    nn.share_scope(wrapper, inner)
    if inner.scope is left:
        return

    _move_children(inner, left.path)


def rename_child(owner: nn.Module, child: nn.Module, name: str) -> None:
    """Gives a child held in a field of `owner` another name than the field's, before either has run."""
    assert owner.scope is not None
    assert child.scope is not None
    old = child.scope.path
    if old[-1] == name:
        return
    owner.scope.reservations.pop(old[-1], None)
    owner._state.children[name] = owner._state.children.pop(old[-1])
    object.__setattr__(child, "name", name)
    object.__setattr__(child, "scope", owner.scope.push(name, reuse=True))
    _move_children(child, old)


def _move_children(owner: nn.Module, old: Path) -> None:
    """Gives the modules in fields of `owner` scopes below its own, which was at `old` when they were bound."""

    def moved(value: Any, _: tuple[Any, ...]) -> Any:
        if isinstance(value, nn.Module) and value.scope is not None:
            path = value.scope.path
            if path == (*old, value.name):
                assert owner.scope is not None
                object.__setattr__(value, "scope", owner.scope.push(value.name, reuse=True))
                _move_children(value, path)
        return value

    for field in configuration(owner).values():
        map_values(moved, field)


def follow(
    edit: nn.Module, seen: nn.Module, stands: nn.Module | None, pins: frozenset[str] = frozenset()
) -> nn.Module:
    """An edit, with what it leaves alone in the module it was made from bound to the network again.

    Args:
        edit: what a rule wants to stand at a site.
        seen: the module of the site, as the rule saw it: with the values of the traced call.
        stands: what stands there already, if an earlier rule put it there; its own marks are kept.
        pins: fields that keep the value `edit` gives them in every call.
    """
    if stands is None:
        flags: dict[str, Any] = {
            k: Following(k, v) for k, v in configuration(seen).items() if _may_be_flag(v)
        }
        stands = seen.clone(parent=None, name=None, **flags)
    was, now = configuration(seen), configuration(stands)
    copies: dict[int, nn.Module] = {id(seen): stands}

    def walk(module: nn.Module, in_place: bool) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        wrapped = getattr(type(module), "wraps", None) if in_place else None

        def inner(name: str, value: Any, _: tuple[Any, ...]) -> Any:
            return walk(value, name == wrapped) if isinstance(value, nn.Module) else value

        same = in_place and type(module) is type(seen)
        updates = {
            name: now[name]
            if same and name not in pins and value is was[name]
            else map_values(functools.partial(inner, name), value)
            for name, value in configuration(module).items()
        }
        copies[id(module)] = module.clone(parent=None, name=None, **updates)
        return copies[id(module)]

    return walk(edit, True)


def _may_be_flag(value: Any) -> bool:
    """Whether a field could tell training from inference: a boolean, or a factory that was given one."""
    if isinstance(value, functools.partial):
        return any(isinstance(v, bool) for v in value.keywords.values())
    return isinstance(value, bool)


def bind_in_place_of(live: nn.Module, stand_in: nn.Module) -> nn.Module:
    """Binds the unbound `stand_in` to the scope of `live`, so that its variables live at the same path."""
    assert live.scope is not None
    copies: dict[int, nn.Module] = {}

    def resolve(owner: nn.Module, value: Any, _: tuple[Any, ...]) -> Any:
        if isinstance(value, nn.Module):
            return resolved(value)
        if isinstance(value, Following):
            return getattr(live, value.field) if type(live) is type(owner) else value.value
        if not isinstance(value, External):
            return value
        try:
            found = getattr(live, value.field)
            for key in value.keys:
                found = found[key]
        except (AttributeError, KeyError, IndexError, TypeError) as e:
            raise RewriteError(
                f"{type(stand_in).__name__} standing at {'/'.join(live.path)!r} shares a module that the network "
                f"passes in field {value.field!r}, but the {type(live).__name__} it stands in for has no such field; "
                "replace the module that passes it instead"
            ) from e
        return found

    def resolved(module: nn.Module) -> nn.Module:
        if not _holds(module, External | Following):
            return module
        if id(module) not in copies:
            resolve_in = functools.partial(resolve, module)
            fields = {k: map_values(resolve_in, v) for k, v in configuration(module).items()}
            copies[id(module)] = module.clone(parent=None, name=None, **fields)
        return copies[id(module)]

    # A rewound scope forgets which child names the original has reserved: its children are not run.
    return resolved(stand_in).clone(parent=live.scope.rewound(), name=live.name)


def _holds(module: nn.Module, kind: Any) -> bool:
    found = False

    def look(value: Any, _: tuple[Any, ...]) -> Any:
        nonlocal found
        found = (
            found
            or isinstance(value, kind)
            or (isinstance(value, nn.Module) and _holds(value, kind))
        )
        return value

    for value in configuration(module).values():
        map_values(look, value)
    return found


def refuse_jit(module: nn.Module, path: Path) -> None:
    """Raises if the module's class lifts a method with `nn.jit`.

    Such a method keeps the trace of its first call: a later rewrite inside it would be ignored without a word.

    Raises:
        UnsupportedNetworkError: naming the class and the path.
    """
    for base in type(module).__mro__:
        if base is nn.Module:
            break
        for name, attribute in vars(base).items():
            if callable(attribute) and lift.jit in _closed_over(attribute):
                raise UnsupportedNetworkError(
                    f"{type(module).__name__} at {'/'.join(path) or '.'!r} wraps {name!r} in nn.jit, which keeps stale traces and "
                    "would ignore a rewrite; remove nn.jit from the network and jit the call of the whole network"
                )


def _closed_over(function: Any) -> Iterable[Any]:
    """Everything in the closures of a function and of the functions it wraps (a few levels deep)."""
    found, queue = [], [function]
    for _ in range(64):
        if not queue:
            break
        current = queue.pop()
        for cell in getattr(current, "__closure__", None) or ():
            try:
                value = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            found.append(value)
            if hasattr(value, "__closure__") and getattr(value, "__module__", "").startswith(
                "flax."
            ):
                queue.append(value)
        if hasattr(current, "__wrapped__"):
            queue.append(current.__wrapped__)
    return [v for v in found if callable(v)]
