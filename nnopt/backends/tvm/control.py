"""Loops of a known length, written out, and branches that are known."""

from collections.abc import Sequence
from typing import Any

from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.products import zeros
from nnopt.backends.tvm.shapes import sliced
from nnopt.backends.tvm.values import Value

MOST_ROUNDS = 256
"""Of a loop that is written out."""


@rule("scan")
def _scan(emitter: Emitter, equation: Any, values: list[Value]) -> Sequence[Value]:
    p = equation.params
    length, carried, fixed = p["length"], p["num_carry"], p["num_consts"]
    if length > MOST_ROUNDS:
        raise emitter.unsupported(equation, f" of more than {MOST_ROUNDS} rounds")
    constants, carry, series = (
        values[:fixed],
        values[fixed : fixed + carried],
        values[fixed + carried :],
    )
    body = p["jaxpr"]
    made: list[list[Value]] = []
    order = range(length - 1, -1, -1) if p["reverse"] else range(length)
    for i in order:
        items = [_item(emitter, s, i) for s in series]
        outputs = emitter.run(body.jaxpr, body.consts, [*constants, *carry, *items])
        carry = outputs[:carried]
        made.append(outputs[carried:])
    if p["reverse"]:
        made.reverse()
    if not made:
        outputs = [v.aval for v in equation.outvars[carried:]]
        return [*carry, *(zeros(emitter, v.shape, str(v.dtype)) for v in outputs)]
    return [*carry, *(_stacked(emitter, list(column)) for column in zip(*made, strict=True))]


def _item(emitter: Emitter, value: Value, i: int) -> Value:
    value = emitter.full(value)
    rank = len(value.shape)
    cut = sliced(emitter, value, [i] + [0] * (rank - 1), [i + 1, *value.shape[1:]], [1] * rank)
    return emitter.reshaped(cut, value.shape[1:])


def _stacked(emitter: Emitter, values: list[Value]) -> Value:
    from tvm import topi

    values = [emitter.full(v) for v in values]
    shape = (len(values), *values[0].shape)
    return emitter.te(
        lambda *xs: topi.stack(list(xs), axis=0), values, shape, values[0].dtype, name="stack"
    )


@rule("cond")
def _cond(emitter: Emitter, equation: Any, values: list[Value]) -> Sequence[Value]:
    which, *operands = values
    if not which.constant:
        raise emitter.unsupported(equation, " that depends on the input")
    branches = equation.params["branches"]
    branch = branches[min(max(int(which.data), 0), len(branches) - 1)]
    return emitter.run(branch.jaxpr, branch.consts, operands)
