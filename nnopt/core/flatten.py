"""A traced function as one flat list of equations, each with its site: calls are inlined, control flow is kept.

A jaxpr nests: `jax.jit` and `jax.checkpoint` inside a function are equations that hold a jaxpr. Whoever cuts a network into
pieces, or looks at values inside it, wants one list. Equations with a derivative rule of their own (`jax.custom_jvp`, such as
ReLU) stay whole, and so do loops and conditionals.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core as jex

from nnopt.core.marks import OpenSites
from nnopt.typing import Path

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
}
_CALLS |= {"closed_call": "call_jaxpr", "core_call": "call_jaxpr", "core_closed_call": "call_jaxpr"}


class Value:
    """A value of a flat program.

    Attributes:
        aval: its shape and dtype.
    """

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        self.aval = aval

    def __repr__(self) -> str:
        return f"Value({self.aval.str_short()})"


Atom = Value | jex.Literal


@dataclasses.dataclass(frozen=True, eq=False)
class FlatEquation:
    """One equation of a flat program.

    Attributes:
        primitive: the JAX primitive.
        params: its parameters.
        inputs: values and literals.
        outputs: values.
        path: the innermost site it belongs to, `()` for none.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    path: Path

    def run(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Outputs for these inputs; traceable."""
        params = self.primitive.get_bind_params(self.params)
        outputs = self.primitive.bind(*inputs, **params)
        return outputs if self.primitive.multiple_results else (outputs,)


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A flat program.

    Attributes:
        inputs: its inputs.
        constants: values that tracing found closed over, each with its array.
        equations: in order of execution.
        outputs: values and literals.
        left: site -> the first array that it returned, in each of its calls.
        named: name -> values that the traced function gave it with `jax.ad_checkpoint.checkpoint_name`.
    """

    inputs: tuple[Value, ...]
    constants: tuple[tuple[Value, Any], ...]
    equations: tuple[FlatEquation, ...]
    outputs: tuple[Atom, ...]
    left: dict[Path, tuple[Value, ...]]
    named: dict[str, tuple[Value, ...]]

    def run(
        self,
        inputs: Iterable[Any],
        observe: Callable[[FlatEquation, Sequence[Any], Sequence[Any]], None] | None = None,
    ) -> list[Any]:
        """Outputs for these inputs; traceable.

        Args:
            inputs: one array for each input.
            observe: called after each equation with the equation, its inputs and its outputs.
        """
        known = dict(zip(self.inputs, inputs, strict=True)) | dict(self.constants)
        run_equations(self.equations, known, observe)
        return [atom.val if isinstance(atom, jex.Literal) else known[atom] for atom in self.outputs]

    def keeping(self, outputs: Iterable[Atom]) -> "Flat":
        """The same program with other outputs, without the equations that these do not need."""
        outputs = tuple(outputs)
        needed = {atom for atom in outputs if isinstance(atom, Value)}
        kept = []
        for equation in reversed(self.equations):
            if needed.intersection(equation.outputs):
                kept.append(equation)
                needed.update(a for a in equation.inputs if isinstance(a, Value))
        constants = tuple((v, c) for v, c in self.constants if v in needed)
        return Flat(self.inputs, constants, tuple(reversed(kept)), outputs, self.left, self.named)


def run_equations(
    equations: Iterable[FlatEquation],
    known: dict[Value, Any],
    observe: Callable[[FlatEquation, Sequence[Any], Sequence[Any]], None] | None = None,
) -> None:
    """Runs equations in order; `known` holds the values they start from, and gets those they make. Traceable.

    An equation all of whose outputs are known already is not run: this is how a caller puts a value of its own in place.
    """
    for equation in equations:
        if all(value in known for value in equation.outputs):
            continue
        inputs = [a.val if isinstance(a, jex.Literal) else known[a] for a in equation.inputs]
        outputs = equation.run(inputs)
        known.update(zip(equation.outputs, outputs, strict=True))
        if observe is not None:
            observe(equation, inputs, outputs)


def flatten(closed: Any) -> Flat:
    """A closed jaxpr as a flat program.

    Sites are known if it was traced under `nn.intercept_methods(mark_sites)`; the marks themselves are dropped.

    Args:
        closed: what `jax.make_jaxpr` returns.
    """
    builder = _Builder()
    jaxpr = closed.jaxpr
    inputs = [Value(v.aval) for v in jaxpr.invars]
    outputs = builder.inline(closed, inputs)
    return Flat(
        tuple(inputs),
        tuple(builder.constants),
        tuple(builder.equations),
        tuple(outputs),
        {path: tuple(values) for path, values in builder.left.items()},
        {name: tuple(values) for name, values in builder.named.items()},
    )


class _Builder:
    def __init__(self) -> None:
        self.equations: list[FlatEquation] = []
        self.constants: list[tuple[Value, Any]] = []
        self.left: dict[Path, list[Value]] = {}
        self.named: dict[str, list[Value]] = {}
        self._open = OpenSites()

    def inline(self, closed: Any, inputs: Sequence[Atom]) -> list[Atom]:
        jaxpr = getattr(closed, "jaxpr", closed)
        known: dict[Any, Atom] = {}
        for var, constant in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            known[var] = value = Value(var.aval)
            self.constants.append((value, constant))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def look_up(atom: Any) -> Atom:
            return atom if isinstance(atom, jex.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            before = [look_up(v) for v in eqn.invars]
            name = eqn.primitive.name
            if name == "name":
                mark = self._open.see(eqn)
                if isinstance(before[0], Value):
                    if mark is None:
                        self.named.setdefault(eqn.params["name"], []).append(before[0])
                    elif mark[1]:
                        seen = self.left.setdefault(mark[0], [])
                        # A module that stands in for another leaves the same place twice with one value.
                        if not seen or seen[-1] is not before[0]:
                            seen.append(before[0])
                after: Sequence[Atom] = before
            elif name in _CALLS:
                after = self.inline(eqn.params[_CALLS[name]], before)
            else:
                outputs = tuple(Value(v.aval) for v in eqn.outvars)
                self.equations.append(
                    FlatEquation(
                        eqn.primitive, eqn.params, tuple(before), outputs, self._open.innermost
                    )
                )
                after = outputs
            known.update(zip(eqn.outvars, after, strict=True))
        return [look_up(v) for v in jaxpr.outvars]
