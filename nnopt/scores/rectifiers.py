"""ReLU units in a traced program, however they are written."""

import math
from collections.abc import Collection, Sequence

from jax.extend import core as jex

from nnopt.core.flatten import Atom, FlatEquation, Value, flatten

_KEEPS_ZERO = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "copy")


def is_zero(atom: Atom, zeros: Collection[Value]) -> bool:
    """Whether an atom is the number zero, or one of some values known to be."""
    if isinstance(atom, jex.Literal):
        return bool(getattr(atom.val, "ndim", 0) == 0 and atom.val == 0)
    return atom in zeros


def keeps_zero(equation: FlatEquation) -> bool:
    """Whether zeros are all that an equation makes of zero."""
    return equation.primitive.name in _KEEPS_ZERO


def rectifier(equation: FlatEquation) -> float | None:
    """The value at which a rectifier with a derivative of its own saturates: infinity for `jax.nn.relu`, 6 for `relu6`.

    Returns:
        None if the equation is no such rectifier.
    """
    if equation.primitive.name != "custom_jvp_call" or len(equation.inputs) != 1:
        return None
    body = flatten(equation.params["call_jaxpr"])
    steps = [(e.primitive.name, e.inputs) for e in body.equations]
    if (
        not steps
        or steps[0][0] != "max"
        or _maximum_with_zero(steps[0][1], ()) is not body.inputs[0]
    ):
        return None
    if len(steps) == 1:
        return math.inf
    caps = [a.val for a in steps[1][1] if isinstance(a, jex.Literal)]
    return float(caps[0]) if len(steps) == 2 and steps[1][0] == "min" and caps else None


def relu_input(equation: FlatEquation, zeros: Collection[Value]) -> Value | None:
    """What enters a ReLU: of `jax.nn.relu` and `relu6`, and of any maximum with zero."""
    if equation.primitive.name == "max":
        return _maximum_with_zero(equation.inputs, zeros)
    entered = equation.inputs[0] if rectifier(equation) is not None else None
    return entered if isinstance(entered, Value) else None


def _maximum_with_zero(inputs: Sequence[Atom], zeros: Collection[Value]) -> Value | None:
    for value, other in (inputs, inputs[::-1]):
        if isinstance(value, Value) and is_zero(other, zeros):
            return value
    return None
