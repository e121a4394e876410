"""Sites: the modules of a network as it calls them, found by one abstract trace."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax

from nnopt.core.example import Example, rngs, spec_of, spec_text
from nnopt.core.modules import detach, is_method, refuse_jit
from nnopt.core.patch import Patched, is_standing_in
from nnopt.core.paths import as_path, path_text, subtree, suggestion
from nnopt.errors import SelectionError, UnsupportedNetworkError
from nnopt.typing import Path


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a site.

    Attributes:
        method: the method called, mostly `__call__`.
        args: positional arguments, arrays as `jax.ShapeDtypeStruct`.
        kwargs: keyword arguments, likewise.
        outputs: what it returned, likewise.
    """

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any


@dataclasses.dataclass(frozen=True)
class Site:
    """One module as the network calls it.

    Attributes:
        path: where it stands, `()` for the network itself.
        module: the module as an unbound value: same class, same configuration. Inside `nn.remat`, `nn.scan` or `nn.vmap`
            this is the module that is lifted, not the lifting.
        calls: its calls in order; a shared module has several. Inside `nn.vmap` and `nn.scan` shapes are those of one slice.
        variables: its own variables, collection -> name -> `jax.ShapeDtypeStruct`, without those of sites below it.
        lifted: the Flax transforms it stands under, from the outside in: `("scan", "remat")`.
        original: what the network itself has there, if a rewrite stands something else in; else the same as `module`.
    """

    path: Path
    module: nn.Module
    calls: tuple[Call, ...]
    variables: dict[str, dict[str, Any]]
    lifted: tuple[str, ...]
    original: nn.Module

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Positional arguments of the first call."""
        return self.calls[0].args

    @property
    def outputs(self) -> Any:
        """What the first call returned."""
        return self.calls[0].outputs

    @property
    def parameters(self) -> int:
        """Number of trainable values that belong to this site itself."""
        return count_leaves(self.variables.get("params", {}))

    def __repr__(self) -> str:
        return (
            f"Site({path_text(self.path)}: {type(self.module).__name__}, "
            f"{spec_text(self.inputs)} -> {spec_text(self.outputs)})"
        )


def count_leaves(tree: Any) -> int:
    """Number of values in all arrays (or specs) of a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


class Sites:
    """The sites of a network in call order, or a selection of them. A value: it can be counted, sliced, searched.

    Attributes:
        net: the network they belong to.
        example: the inputs it was traced with.
        outputs: what the network returns for them, arrays as `jax.ShapeDtypeStruct`.
        variables: the network's whole variable tree, likewise.
    """

    def __init__(
        self, net: nn.Module, example: Example, outputs: Any, variables: Any, sites: Iterable[Site]
    ) -> None:
        self.net = net
        self.example = example
        self.outputs = outputs
        self.variables = variables
        self._sites = {site.path: site for site in sites}

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, path: object) -> bool:
        return (as_path(path) if isinstance(path, str) else path) in self._sites

    def __getitem__(self, path: str | Path) -> Site:
        """The site at a path.

        Raises:
            SelectionError: there is none; the message names paths that look like it.
        """
        found = self._sites.get(as_path(path))
        if found is None:
            raise SelectionError(
                f"no module at {path_text(as_path(path))!r} in {_title(self.net)}: {suggestion(as_path(path), self.paths)}"
            )
        return found

    def __repr__(self) -> str:
        return f"Sites of {_title(self.net)} ({len(self)}):\n" + "\n".join(f"  {s}" for s in self)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Paths in call order."""
        return tuple(self._sites)

    def where(self, keep: Callable[[Site], bool]) -> "Sites":
        """The sites for which `keep` is true, in the same order."""
        return Sites(self.net, self.example, self.outputs, self.variables, filter(keep, self))

    def below(self, path: str | Path) -> "Sites":
        """The sites strictly below a path."""
        path = as_path(path)
        return self.where(lambda s: len(s.path) > len(path) and s.path[: len(path)] == path)

    def assert_count_is(self, count: int) -> "Sites":
        """Returns the selection itself if it holds `count` sites.

        Raises:
            SelectionError: it holds more or fewer.
        """
        if len(self) != count:
            found = ", ".join(map(path_text, self.paths[:5])) + (", ..." if len(self) > 5 else "")
            raise SelectionError(
                f"the selection holds {len(self)} sites of {_title(self.net)} ({found or 'none'}), expected {count}; "
                "narrow or widen the selector"
            )
        return self


def sites(net: nn.Module, example: Any) -> Sites:
    """Lists the modules of a network in the order it calls them, from one abstract trace: nothing is computed.

    Works for any linen module, written in compact or setup style, with lists of blocks, shared modules, `nn.remat`,
    `nn.scan` (stacked layers are one site) and `nn.vmap`.

    Args:
        net: the network.
        example: an array of the network's input shape, or an `Example` of all its arguments.

    Returns:
        All sites. The first is the network itself, at path `()`.

    Raises:
        UnsupportedNetworkError: the network uses `nn.jit` inside, or cannot be called with this example.
    """
    trace = Trace(net, Example.of(example))
    if trace.error is None:
        return trace.sites()
    if not _can_be_called(net, trace.example):
        raise UnsupportedNetworkError(
            f"{_title(net)} cannot be called with {trace.example}: {trace.error}; give the arguments that its __call__ takes"
        ) from trace.error
    raise trace.error


def _can_be_called(net: nn.Module, example: Example) -> bool:
    called = net.base if isinstance(net, Patched) else net
    try:
        inspect.signature(called.__call__).bind(*example.args, **example.kwargs)
    except TypeError:
        return False
    return True


class Trace:
    """One abstract run of a network: what was called, what came out, and where it failed if it did.

    Attributes:
        recorder: everything called, up to the failure.
        error: the exception that ended the run, or None.
    """

    def __init__(self, net: nn.Module, example: Example) -> None:
        self.net = net
        self.example = example
        self.recorder = Recorder()
        self.outputs: Any = None
        self.variables: Any = None
        self.error: Exception | None = None
        with nn.intercept_methods(self.recorder.intercept):
            try:
                self.outputs, self.variables = example.abstractly(
                    lambda key, *args, **kwargs: net.init_with_output(rngs(key), *args, **kwargs),
                    jax.random.key(0),
                )
            except Exception as e:
                # Foreign code may raise anything; the caller decides what it means.
                self.error = e

    def sites(self) -> Sites:
        """The sites of a run that succeeded."""
        found = self.recorder.sites(self.variables)
        return Sites(self.net, self.example, self.outputs, self.variables, found)


def _title(net: nn.Module) -> str:
    return type(net.base if isinstance(net, Patched) else net).__name__


class Recorder:
    """A method interceptor that writes down what is called, before any patch below it acts."""

    def __init__(self) -> None:
        self.modules: dict[Path, nn.Module] = {}  # in order of first entry
        self.originals: dict[Path, nn.Module] = {}  # without what stands in
        self.calls: dict[Path, list[Call]] = {}
        self.lifted: dict[Path, tuple[str, ...]] = {}
        self.open: dict[Path, bool] = {}  # running now -> whether its stand-in has been seen
        self.stood_in: set[Path] = set()  # where a stand-in has run
        self.failed: Path | None = None  # the innermost call that raised

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Writes a call down and lets it happen."""
        module, method = context.module, context.method_name
        if module.scope is None:
            return next_fun(*args, **kwargs)
        path = module.scope.path
        refuse_jit(module, path)
        if method == "setup" or not is_method(module, method) or isinstance(module, Patched):
            return next_fun(*args, **kwargs)
        if path in self.open:
            if is_standing_in(path) and not self.open[path]:
                self.modules[path] = detach(module)
                self.open[path] = True
                self.stood_in.add(path)
            return next_fun(*args, **kwargs)
        if path not in self.modules:
            self.modules[path] = self.originals[path] = detach(module)
        calls = self.calls.setdefault(path, [])
        self.lifted[path] = _transforms(module.scope.debug_path)
        self.open[path] = False
        try:
            outputs = next_fun(*args, **kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            del self.open[path]
        calls.append(Call(method, spec_of(args), spec_of(kwargs), spec_of(outputs)))
        return outputs

    def sites(self, variables: Any) -> Iterator[Site]:
        """What was called, each module with its own share of the network's variables."""
        for path, module in self.modules.items():
            own = {
                collection: own_leaves(subtree(tree, path), path, self.modules)
                for collection, tree in variables.items()
            }
            own = {collection: leaves for collection, leaves in own.items() if leaves}
            calls, lifted = tuple(self.calls[path]), self.lifted[path]
            yield Site(path, module, calls, own, lifted, self.originals[path])


def own_leaves(tree: Any, path: Path, known: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a subtree at `path` that lie below no deeper path in `known`; nested names joined by `/`."""
    leaves: dict[str, Any] = {}
    if not hasattr(tree, "items"):
        return leaves
    for name, value in tree.items():
        below = (*path, name)
        if below in known:
            continue
        if hasattr(value, "items"):
            leaves |= own_leaves(value, below, known, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _transforms(debug_path: tuple[str, ...]) -> tuple[str, ...]:
    """`("remat(scan(layers))", "conv")` -> `("scan", "remat")`: Flax writes its transforms into the debug path, outermost last."""
    names: list[str] = []
    for part in debug_path:
        here: list[str] = []
        while part.endswith(")") and "(" in part:
            name, part = part[:-1].split("(", 1)
            here.insert(0, name)
        names += here
    return tuple(names)
