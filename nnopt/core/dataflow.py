"""How values flow through a network, read off its jaxpr: which equations belong to which site, and where residual additions are.

The network is traced with the marks of `core.marks`, so each equation knows its site.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core as jex

from nnopt.core.example import Example, rngs
from nnopt.core.marks import OpenSites, mark_sites
from nnopt.core.select import Selector
from nnopt.core.sites import Sites
from nnopt.errors import SelectionError
from nnopt.typing import Path

CONVOLUTIONS = ("conv_general_dilated", "nnopt_conv")
"""Names of the primitives that convolve: JAX's own and that of `nnopt.layers.Conv`."""
LAYERS = (*CONVOLUTIONS, "dot_general")
"""And those of dense layers."""


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
    """An addition of two values of the same shape which both depend on the network's input, one through more layers.

    Layers are convolutions, unless `reach` is told otherwise.

    Attributes:
        path: the innermost site that adds: the residual block.
        branch: the last convolution on the way with more of them.
        shortcut: the last convolution on the other way, often in the block before; None if there is none.
    """

    path: Path
    branch: Path
    shortcut: Path | None


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a value depends on: the network's input, through `depth` convolutions, `last` being the last of them."""

    depth: int = 0
    last: Path | None = None


def reach(
    equation: "Equation", before: Sequence[Reach | None], layers: Sequence[str] = CONVOLUTIONS
) -> tuple[Reach | None, ResidualAdd | None]:
    """What the outputs of an equation depend on, and the residual addition that it is.

    Args:
        equation: any.
        before: what each of its inputs depends on, None for a value that does not depend on the network's input.
        layers: the primitives that count: `CONVOLUTIONS`, or `LAYERS`, which work on more than images.

    Returns:
        The same of its outputs, and None unless the equation adds two images that depend on the input through unequally many
        convolutions.
    """
    deepest = max((r for r in before if r), key=lambda r: r.depth, default=None)
    if deepest is None:
        return None, None
    if equation.primitive in layers:
        return Reach(deepest.depth + 1, equation.path), None
    inputs = equation.inputs
    if equation.primitive in ("add", "add_any") and all(before):
        a, b = sorted((r for r in before if r), key=lambda r: r.depth)
        rank = 2 if "dot_general" in layers else 3
        same = inputs[0].shape == inputs[1].shape and len(inputs[0].shape) >= rank
        if same and a.depth < b.depth and b.last is not None:
            return deepest, ResidualAdd(equation.path, b.last, a.last)
    return deepest, None


class Dataflow:
    """The equations and residual additions of a network.

    Attributes:
        equations: in order of execution, those inside called functions included.
        residual_adds: in order of execution.
    """

    def __init__(self, net: nn.Module, example: Any) -> None:
        example = Example.of(example)
        with nn.intercept_methods(mark_sites):
            closed, own = example.jaxpr(
                lambda key, *args, **kwargs: net.init_with_output(rngs(key), *args, **kwargs)[0],
                jax.random.key(0),
            )
        self._jaxpr, self._own = closed.jaxpr, own
        flow = _Flow(CONVOLUTIONS)
        self.residual_adds = self._adds(flow)
        self.equations = flow.equations

    def residual_adds_over(self, layers: Sequence[str]) -> list[ResidualAdd]:
        """Additions of a branch with more of these layers, named by their primitives, to a shortcut with fewer."""
        return self._adds(_Flow(layers))

    def _adds(self, flow: "_Flow") -> list[ResidualAdd]:
        reaches = [Reach() if i < self._own else None for i in range(len(self._jaxpr.invars))]
        flow.run(self._jaxpr, reaches, 1)
        return flow.residual_adds


class _Flow:
    """Goes through a program once, counting layers."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers
        self._open = OpenSites()
        self.equations: list[Equation] = []
        self.residual_adds: list[ResidualAdd] = []

    def run(self, jaxpr: Any, inputs: list[Reach | None], repeats: int) -> list[Reach | None]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def look_up(atom: Any) -> Reach | None:
            return None if isinstance(atom, jex.Literal) else known.get(atom)

        for eqn in jaxpr.eqns:
            before = [look_up(v) for v in eqn.invars]
            deepest = max((r for r in before if r), key=lambda r: r.depth, default=None)
            after: list[Reach | None] = [deepest] * len(eqn.outvars)
            inner = list(inner_jaxprs(eqn))
            is_mark = self._open.see(eqn) is not None
            if inner:
                times = repeats * eqn.params["length"] if eqn.primitive.name == "scan" else repeats
                # Of the branches of a conditional the last is the default one.
                body = inner[-1]
                fitting = before[len(before) - len(body.invars) :]
                if len(fitting) == len(body.invars):
                    found = self.run(body, fitting, times)
                    after = found if len(found) == len(after) else after
                else:
                    self.run(body, [deepest] * len(body.invars), times)
            elif not is_mark:
                equation = Equation(
                    eqn.primitive.name,
                    eqn.params,
                    tuple(v.aval for v in eqn.invars),
                    tuple(v.aval for v in eqn.outvars),
                    self._open.innermost,
                    repeats,
                )
                self.equations.append(equation)
                flows_on, addition = reach(equation, before, self._layers)
                after = [flows_on] * len(eqn.outvars)
                if addition is not None:
                    self.residual_adds.append(addition)
            known.update(zip(eqn.outvars, after, strict=True))
        return [look_up(v) for v in jaxpr.outvars]


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The programs that an equation holds: the body of a call or loop, the branches of a conditional."""
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
