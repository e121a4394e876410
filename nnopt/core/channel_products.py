"""Rules of convolutions and matrix products, and of equations that hold a program of their own."""

from collections.abc import Sequence

import numpy as np

from nnopt.core.channel_ties import (
    Axes,
    Labels,
    Ties,
    convolution_axes,
    note_on,
    rule,
    run_jaxpr,
    shapes_of,
    unknown,
    unmoved,
)
from nnopt.core.flatten import FlatEquation

_NOT_ZERO = "sums channels by weights that are not zero for one that goes"


@rule("conv_general_dilated", "nnopt_conv")
def _convolution(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    x, kernel = inputs[:2]
    (shape,) = shapes_of(equation)
    lhs, rhs, out, groups, batch_groups = convolution_axes(equation, len(x.shape))
    if batch_groups > 1:
        return unknown(ties, equation, inputs)
    note = note_on(equation, "slides over channels")
    for axis in (*lhs[2:], lhs[0]):
        ties.keep(x, axis, note)
    for axis in rhs[2:]:
        ties.keep(kernel, axis)
    ties.count((x, lhs[1]), (kernel, rhs[1]))
    made, taken = kernel.labels[rhs[0]], kernel.labels[rhs[1]]
    depthwise = groups > 1 and kernel.shape[rhs[1]] == 1
    if depthwise and made is None:
        # A filter that is the same for all channels, such as one that blurs: each makes channels of its own.
        found = x.labels[lhs[1]]
        made = None if found is None else np.repeat(found, kernel.shape[rhs[0]] // groups)
    else:
        if not kernel.weights:
            ties.mark(x, lhs[1], note_on(equation, "has a kernel that is no weight"))
        elif not depthwise and not kernel.vanishes(rhs[1]):
            ties.mark(x, lhs[1], note_on(equation, _NOT_ZERO))
        if made is not None and kernel.weights:
            ties.made.append(made)
        _read(ties, equation, x.labels[lhs[1]], made, taken, groups, depthwise)
    labels: list[Labels] = [unmoved(n) for n in shape]
    labels[out[0]] = x.labels[lhs[0]]
    labels[out[1]] = made
    return [Axes(shape, tuple(labels))]


def _read(
    ties: Ties,
    equation: FlatEquation,
    read: Labels,
    made: Labels,
    taken: Labels,
    groups: int,
    depthwise: bool,
) -> None:
    """Ties the channels of an image to the inputs and outputs of a kernel."""
    note = note_on(equation, "has a kernel for a fixed number of channels")
    if groups == 1:
        ties.join(read, taken, note)
    elif depthwise:
        # A channel and its filters go together, and with them the group.
        if taken is not None:
            ties.join(np.zeros_like(taken), taken)
        if made is not None:
            for column in made.reshape(groups, -1).T:
                ties.join(read, column, note)
    else:
        # Each group loses the same channels, so that all stay alike.
        if read is not None:
            ties.join(ties.couple(read.reshape(groups, -1)), taken, note)
        if made is not None:
            ties.couple(made.reshape(groups, -1))


@rule("dot_general")
def _dot_general(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    a, b = inputs
    (contract_a, contract_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    weights = a.weights or b.weights
    note = note_on(equation, _NOT_ZERO if weights else "multiplies two activations over channels")
    whole = note_on(equation, "multiplies channels by what has a fixed number of them")
    for i, j in zip(contract_a, contract_b, strict=True):
        joined = ties.join(a.labels[i], b.labels[j], whole)
        ties.count((a, i), (b, j))
        if joined is not None and not (a.vanishes(i) or b.vanishes(j)):
            ties.mark(Axes((len(joined),), (joined,)), 0, note)
    labels, zero = [], []
    for i, j in zip(batch_a, batch_b, strict=True):
        labels.append(ties.join(a.labels[i], b.labels[j], whole))
        zero.append(a.vanishes(i) or b.vanishes(j))
    for array, used in ((a, {*contract_a, *batch_a}), (b, {*contract_b, *batch_b})):
        rest = [axis for axis in range(len(array.shape)) if axis not in used]
        labels += [array.labels[axis] for axis in rest]
        zero += map(array.vanishes, rest)
        if array.weights:
            ties.made += [v for axis in rest if (v := array.labels[axis]) is not None]
    (shape,) = shapes_of(equation)
    return [Axes(shape, tuple(labels), tuple(zero) if a.weights and b.weights else None)]


@rule("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "run_state")
def _call(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    body = equation.params.get("call_jaxpr") or equation.params.get("fun_jaxpr")
    if body is None:
        return unknown(ties, equation, inputs)
    return run_jaxpr(ties, body, inputs, equation.path)


@rule("cond")
def _cond(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    branches = equation.params["branches"]
    found = [run_jaxpr(ties, b, inputs[1:], equation.path) for b in branches]
    note = note_on(equation, "returns channels or what has a fixed number of them")
    return [Axes(many[0].shape, ties.join_all(many, note)) for many in zip(*found, strict=True)]


@rule("scan")
def _scan(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    body = equation.params["jaxpr"]
    note = note_on(equation, "loops over channels")
    # JAX's versions name the numbers of operands differently; what is looped over has an axis less in the body.
    start = sum(len(a.shape) == len(v.shape) for a, v in zip(inputs, body.in_avals, strict=True))
    carried = sum(
        len(v.aval.shape) == len(w.shape)
        for v, w in zip(equation.outputs, body.out_avals, strict=True)
    )
    consts = start - carried
    for array in inputs[start:]:
        ties.keep(array, 0, note)
    slices = [Axes(a.shape[1:], a.labels[1:], a.zero and a.zero[1:]) for a in inputs[start:]]
    # What is carried may be as long as the loop wants only if it is so throughout.
    before = [
        Axes(a.shape, tuple(ties.fresh(n) if v is None else v for n, v in zip(a.shape, a.labels, strict=True)))
        for a in inputs[consts:start]
    ]  # fmt: skip
    found = run_jaxpr(ties, body, [*inputs[:consts], *before, *slices], equation.path)
    after = [
        Axes(a.shape, ties.join_all([a, b], note))
        for a, b in zip(before, found[:carried], strict=True)
    ]
    stacked = [
        Axes((equation.params["length"], *a.shape), (unmoved(equation.params["length"]), *a.labels))
        for a in found[carried:]
    ]
    return [*after, *stacked]
