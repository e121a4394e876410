"""Who reads a value: for what each site returns and for each variable, the sites whose equations read it."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from nnopt.core.channel_analysis import program_of
from nnopt.core.dataflow import inner_jaxprs
from nnopt.core.flatten import FlatEquation, Value
from nnopt.core.marks import OpenSites
from nnopt.core.sites import Sites
from nnopt.typing import Path


class Reads:
    """The readers of values in a network, found in its jaxpr.

    What runs inside of a loop or conditional returns nothing here, and what a loop or conditional takes is read by the site
    around it. Variables are followed into both.
    """

    def __init__(self, sites: Sites) -> None:
        """Traces the network.

        Args:
            sites: all sites of the network, or some of them.
        """
        program = program_of(sites)
        own = dict(zip(program.variables, program.leaves, strict=True))
        self._left = program.flat.left
        self._readers: dict[Value, set[Path]] = {}
        for equation in program.flat.equations:
            for place, atom in enumerate(equation.inputs):
                if isinstance(atom, Value):
                    paths = _inside(equation, [place]) if atom in own else {equation.path}
                    self._readers.setdefault(atom, set()).update(paths)
        for place, atom in enumerate(program.flat.outputs):
            # A variable among the updated ones is there because nothing updates it.
            if isinstance(atom, Value) and (place < program.outputs or atom not in own):
                self._readers.setdefault(atom, set()).add(())
        self._variables = {leaf: value for value, leaf in own.items()}

    def returned(self, path: Path) -> tuple[Value, ...]:
        """The first array that a site returns, in each of its calls."""
        return self._left.get(path, ())

    def of(self, value: Value) -> set[Path]:
        """The sites that read a value; the network itself, `()`, reads what it returns or writes down."""
        return self._readers.get(value, set())

    def of_variable(self, leaf: Path) -> set[Path]:
        """The same of a variable, `(collection, *path, name)`."""
        return self.of(self._variables[leaf])


def _inside(equation: Any, places: Sequence[int], path: Path | None = None) -> set[Path]:
    """The sites that read some operands of an equation, inside of it if it holds programs.

    Args:
        equation: of a flat program or of a jaxpr.
        places: which operands.
        path: the site it belongs to; that of a flat equation by default.
    """
    flat = isinstance(equation, FlatEquation)
    path = equation.path if path is None else path
    count = len(equation.inputs if flat else equation.invars)
    bodies = list(inner_jaxprs(equation))
    # A conditional's operands begin with its index; those of a while loop are divided among two programs.
    begin = {count - len(body.invars) for body in bodies}
    if len(begin) != 1 or equation.primitive.name == "while":
        return {path}
    (first,) = begin
    if not 0 <= first <= min(places):
        return {path}
    found: set[Path] = set()
    for body in bodies:
        found |= _in_body(body, {body.invars[place - first] for place in places}, path)
    return found


def _in_body(jaxpr: Any, followed: set[Any], path: Path) -> set[Path]:
    opened = OpenSites()
    found: set[Path] = set()
    for eqn in jaxpr.eqns:
        opened.see(eqn)
        places = [
            i for i, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and v in followed
        ]
        if places and eqn.primitive.name == "name":
            followed.add(eqn.outvars[0])
        elif places:
            found |= _inside(eqn, places, opened.innermost or path)
    return found
