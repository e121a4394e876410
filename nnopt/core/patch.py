"""The one primitive: at a path of a network, another module stands in for whatever is there."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import flax.linen as nn

from nnopt.core.encode import decode, digest, encode
from nnopt.core.modules import (
    External,
    Following,
    bind_in_place_of,
    configuration,
    is_method,
    share_scope,
)
from nnopt.core.paths import path_text
from nnopt.errors import RecordError, RewriteError
from nnopt.typing import Path

# Paths whose stand-in is running. Events at such a path come from the stand-in itself (its own methods, or a module
# that shares its scope) and pass. A set of paths, not a mark on objects: Flax clones modules freely.
_active: ContextVar[frozenset[Path]] = ContextVar("active stand-ins", default=frozenset())


class Patch:
    """An immutable map from paths to the unbound modules that stand there.

    Deliberately neither a pytree nor a mapping: Flax would adopt the modules in one as children.
    """

    def __init__(self, edits: Mapping[Path, nn.Module]) -> None:
        self._edits = dict(edits)
        self._digest: str | None = None

    def get(self, path: Path) -> nn.Module | None:
        """The module standing at `path`, or None."""
        return self._edits.get(path)

    def items(self) -> Iterable[tuple[Path, nn.Module]]:
        """Pairs of path and module."""
        return self._edits.items()

    def __reduce__(self) -> tuple[Any, ...]:
        # Flax's layers hold initialisers that cannot be pickled, but can be named.
        try:
            edits = [(path, encode(module, strict=True)) for path, module in self._edits.items()]
        except RecordError:
            return Patch, (self._edits,)
        return _unpickled, (edits,)

    def __contains__(self, path: object) -> bool:
        return path in self._edits

    def __len__(self) -> int:
        return len(self._edits)

    def encoded(self) -> Any:
        """JSON: path text -> module, sorted by path so that the order of edits does not matter."""
        return {path_text(p): encode(self._edits[p], strict=False) for p in sorted(self._edits)}

    def digest(self) -> str:
        """SHA-256 of the encoding."""
        if self._digest is None:
            self._digest = digest(self.encoded())
        return self._digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        places = ", ".join(f"{path_text(p)}: {type(m).__name__}" for p, m in self._edits.items())
        return f"Patch({places})"


def _unpickled(edits: Iterable[tuple[Path, Any]]) -> Patch:
    return Patch({path: decode(module) for path, module in edits})


class Steps:
    """How a network came about. Opaque to Flax, and no part of what the network is: all are equal."""

    def __init__(self, steps: Iterable[Any] = ()) -> None:
        self._steps = tuple(steps)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def encoded(self) -> str:
        """The same for all: the way to a network is no part of it."""
        return "steps"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"Steps({list(self._steps)})"


class Patched(nn.Module):
    """A network with other modules standing at some of its paths.

    An ordinary linen module: `init`, `apply`, `jit`, `grad` and pickling work. Made by `rewrite`, which checks what it
    makes. It adds no level to the variable tree: the variables of everything untouched keep their paths and values.

    Attributes:
        base: the network as its author wrote it, never itself `Patched`.
        patch: what stands where.
        steps: the rewrites that led here.
    """

    base: nn.Module
    patch: Patch
    steps: Steps = Steps()

    def __reduce__(self) -> tuple[Any, ...]:
        try:  # as for `Patch`
            return _unpickled_network, (encode(self.base, strict=True), self.patch, self.steps)
        except RecordError:
            return Patched, (self.base, self.patch, self.steps)

    def setup(self) -> None:
        """Gives the base network this module's own scope."""
        share_scope(self, self.base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base network with the stand-ins in place."""
        return self.run("__call__", *args, **kwargs)

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls any method of the base network: `net.apply(variables, "encode", x, method="run")`."""
        assert self.scope is not None
        with nn.intercept_methods(_stand_in(self.patch, self.scope.path)):
            return getattr(self.base, method)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patched) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    @nn.nowrap
    def _identity(self) -> str:
        return digest(encode(self, strict=False))


def _unpickled_network(base: Any, patch: Patch, steps: Steps) -> Patched:
    return Patched(decode(base), patch, steps)


def _stand_in(patch: Patch, root: Path) -> Callable[..., Any]:
    """The method interceptor that runs stand-ins for a network whose own scope is at `root`."""

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        live, method = context.module, context.method_name
        if live.scope is None or not is_method(live, method):
            return next_fun(*args, **kwargs)
        path = live.scope.path
        module = patch.get(path[len(root) :]) if path[: len(root)] == root else None
        if module is None or path in _active.get():
            return next_fun(*args, **kwargs)
        if method == "setup":
            return next_fun() if _take_configuration(live, module) else None
        bound = bind_in_place_of(live, module)
        if not hasattr(type(bound), method):
            raise RewriteError(
                f"{type(module).__name__} cannot stand at {path_text(path)!r}: the network calls its method {method!r}, "
                f"which it does not have; give it one, or leave this {type(live).__name__} in place"
            )
        token = _active.set(_active.get() | {path})
        try:
            return getattr(bound, method)(*args, **kwargs)
        finally:
            _active.reset(token)

    return intercept


def is_standing_in(path: Path) -> bool:
    """Whether a stand-in is running at this absolute path."""
    return path in _active.get()


def _take_configuration(live: nn.Module, module: nn.Module) -> bool:
    """Lets a setup-style original take over the stand-in's configuration; False where the classes differ.

    The original's `setup` must not run as written, since it would declare parameters that nobody uses. But where the
    stand-in is of the same class, the network may read attributes that `setup` makes (a tied embedding), so it
    runs with the stand-in's configuration.
    """
    while (wrapped := getattr(type(module), "wraps", None)) is not None:
        module = getattr(module, wrapped)
    if type(module) is not type(live):
        return False
    for field, value in configuration(module).items():
        if not isinstance(value, nn.Module | External | Following | list | tuple | Mapping):
            object.__setattr__(live, field, value)
    return True
