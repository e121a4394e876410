"""How values flow through a network, read off its jaxpr: which equations belong to which site, and where residual additions are.

The network is traced with a name written on what enters and leaves each site (`jax.ad_checkpoint.checkpoint_name`, an
identity). Tracing writes equations down in the order of execution, so whatever lies between the two names of a
site belongs to it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from nnopt.core.example import Example, rngs
from nnopt.core.modules import is_method
from nnopt.core.patch import Patched
from nnopt.core.paths import path_text
from nnopt.core.select import Selector
from nnopt.core.sites import Sites
from nnopt.errors import SelectionError
from nnopt.typing import Path

_ENTER, _LEAVE = "nnopt enter ", "nnopt leave "


@dataclasses.dataclass(frozen=True)
class Equation:
    """One equation of the network's jaxpr.

    Attributes:
        primitive: name of its JAX primitive.
        params: parameters of the primitive.
        inputs: abstract values of its inputs.
        outputs: abstract values of its outputs.
        path: the innermost site it belongs to.
        repeats: how often it runs in one call of the network (`nn.scan` repeats it).
    """

    primitive: str
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    path: Path
    repeats: int


@dataclasses.dataclass(frozen=True)
class ResidualAdd:
    """An addition of two values of the same shape which both depend on the network's input, one through more convolutions.

    Attributes:
        path: the innermost site that adds: the residual block.
        branch: the last convolution on the way with more of them.
        shortcut: the last convolution on the other way, often in the block before; None if there is none.
    """

    path: Path
    branch: Path
    shortcut: Path | None


@dataclasses.dataclass(frozen=True)
class _Reach:
    """What a value depends on: the network's input, through `depth` convolutions, `last` being the last of them."""

    depth: int = 0
    last: Path | None = None


class Dataflow:
    """The equations and residual additions of a network.

    Attributes:
        equations: in order of execution, those inside called functions included.
        residual_adds: in order of execution.
    """

    def __init__(self, net: nn.Module, example: Any) -> None:
        self.equations: list[Equation] = []
        self.residual_adds: list[ResidualAdd] = []
        self._open: list[Path] = [()]
        example = Example.of(example)
        with nn.intercept_methods(_name_sites):
            closed, own = example.jaxpr(
                lambda key, *args, **kwargs: net.init_with_output(rngs(key), *args, **kwargs)[0],
                jax.random.key(0),
            )
        jaxpr = closed.jaxpr
        reaches = [_Reach() if i < own else None for i in range(len(jaxpr.invars))]
        self._run(jaxpr, reaches, 1)

    def _run(self, jaxpr: Any, inputs: list[_Reach | None], repeats: int) -> list[_Reach | None]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def reach(atom: Any) -> _Reach | None:
            return None if isinstance(atom, jex.Literal) else known.get(atom)

        for eqn in jaxpr.eqns:
            before = [reach(v) for v in eqn.invars]
            deepest = max((r for r in before if r), key=lambda r: r.depth, default=None)
            after: list[_Reach | None] = [deepest] * len(eqn.outvars)
            inner = list(_inner_jaxprs(eqn))
            if eqn.primitive.name == "name" and eqn.params["name"].startswith((_ENTER, _LEAVE)):
                self._mark(eqn.params["name"])
            elif inner:
                times = repeats * eqn.params["length"] if eqn.primitive.name == "scan" else repeats
                # Of the branches of a conditional the last is the default one.
                body = inner[-1]
                fitting = before[len(before) - len(body.invars) :]
                if len(fitting) == len(body.invars):
                    found = self._run(body, fitting, times)
                    after = found if len(found) == len(after) else after
                else:
                    self._run(body, [deepest] * len(body.invars), times)
            else:
                after = self._equation(eqn, before, deepest, repeats)
            known.update(zip(eqn.outvars, after, strict=True))
        return [reach(v) for v in jaxpr.outvars]

    def _equation(
        self, eqn: Any, before: list[_Reach | None], deepest: _Reach | None, repeats: int
    ) -> list[_Reach | None]:
        path = self._open[-1]
        name = eqn.primitive.name
        inputs, outputs = (tuple(v.aval for v in vs) for vs in (eqn.invars, eqn.outvars))
        self.equations.append(Equation(name, eqn.params, inputs, outputs, path, repeats))
        if name == "conv_general_dilated" and deepest is not None:
            deepest = _Reach(deepest.depth + 1, path)
        elif name in ("add", "add_any") and all(before) and inputs[0].shape == inputs[1].shape:
            a, b = sorted((r for r in before if r), key=lambda r: r.depth)
            if a.depth < b.depth and b.last is not None and len(inputs[0].shape) > 2:
                self.residual_adds.append(ResidualAdd(path, b.last, a.last))
        return [deepest] * len(eqn.outvars)

    def _mark(self, name: str) -> None:
        path = tuple(name.split(" ", 2)[2].split("/"))
        if name.startswith(_ENTER):
            self._open.append(path)
        elif path in self._open:
            while self._open.pop() != path:
                pass


def _name_sites(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    module, method = context.module, context.method_name
    if module.scope is None or not module.scope.path or isinstance(module, Patched):
        return next_fun(*args, **kwargs)
    if method == "setup" or not is_method(module, method):
        return next_fun(*args, **kwargs)
    text = path_text(module.scope.path)
    args = _with_name(args, f"{_ENTER}{text}")
    return _with_name(next_fun(*args, **kwargs), f"{_LEAVE}{text}")


def _with_name(tree: Any, name: str) -> Any:
    """Writes a name on the first array of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            leaves[i] = checkpoint_name(leaf, name)
            break
    return jax.tree.unflatten(structure, leaves)


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


@dataclasses.dataclass(frozen=True)
class ResidualBlocks(Selector):
    """The innermost modules that add a branch of convolutions to a shortcut, found in the network's dataflow.

    Finding none is an error.
    """

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`.

        Raises:
            SelectionError: no module of the network is a residual block.
        """
        blocks = {add.path for add in Dataflow(sites.net, sites.example).residual_adds}
        found = sites.where(lambda s: bool(s.path) and s.path in blocks)
        if not len(found):
            raise SelectionError(
                f"{type(sites.net).__name__} has no module that adds a branch of convolutions to a shortcut; "
                "name the blocks to replace by their paths"
            )
        return found
