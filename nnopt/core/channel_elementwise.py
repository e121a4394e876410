"""Rules of primitives that compute element by element, that reduce, and that draw random numbers."""

from collections.abc import Sequence

import numpy as np
from jax.extend import core as jex

from nnopt.core.channel_ties import (
    Axes,
    Labels,
    Ties,
    note_on,
    rule,
    shapes_of,
    unknown,
    unmoved,
)
from nnopt.core.flatten import FlatEquation

_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "cos", "cosh",
    "digamma", "div", "eq",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "one_minus_square", "optimization_barrier", "or", "population_count", "pow", "random_gamma", "real", "reduce_precision", "rem",
    "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "xor", "name", "sharding_constraint", "device_put",
)  # fmt: skip
_KEEPS_ZERO = frozenset(
    (
        "abs", "add", "add_any", "convert_element_type", "copy", "mul", "neg", "reduce_precision", "sign", "sin", "sqrt",
        "square", "stop_gradient", "sub", "tan", "tanh", "transpose", "reshape", "broadcast_in_dim", "squeeze",
        "rev", "stack", "tile",
    )
)  # fmt: skip
"""Operations that make zeros of zeros."""

_SUMS = frozenset(("add", "sub", "add_any"))


_INFINITE_AT_ZERO = frozenset(("log", "log2", "rsqrt", "digamma", "lgamma", "acosh"))


def keeps_zero(equation: FlatEquation, inputs: Sequence[Axes]) -> bool:
    """Whether the outputs are made of weights and numbers alone, and are zero where all operands with axes are."""
    name = equation.primitive.name
    if name == "div":
        return inputs[0].weights and not inputs[1].shape
    if name == "integer_pow":
        return inputs[0].weights and equation.params["y"] > 0
    shifted = name in _SUMS and not all(a.shape for a in inputs)
    return name in _KEEPS_ZERO and not shifted and all(a.weights for a in inputs if a.shape)


def _zero(
    equation: FlatEquation, inputs: Sequence[Axes], shape: Sequence[int]
) -> tuple[bool, ...] | None:
    """See `Axes.zero`: a product is zero along an axis where one operand is, anything else where all are.

    An operand that is repeated along an axis is not zero along it: `w + b` of `w [in, out]` and `b [out]` is `b` where `w` is zero.
    """
    if not keeps_zero(equation, inputs):
        return None
    arrays = [a for a in inputs if a.shape]
    holds = any if equation.primitive.name == "mul" else all
    return tuple(
        bool(arrays) and holds(a.shape[axis] == extent and a.vanishes(axis) for a in arrays)
        for axis, extent in enumerate(shape)
    )


def _divisor(equation: FlatEquation, inputs: Sequence[Axes]) -> Axes | None:
    """The operand that must not be zero, if it is made of weights."""
    name, found = equation.primitive.name, None
    if name in ("div", "rem"):
        found = inputs[1]
    elif name in _INFINITE_AT_ZERO or (name == "integer_pow" and equation.params["y"] < 0):
        found = inputs[0]
    elif name == "pow":
        exponent = equation.inputs[1]
        positive = isinstance(exponent, jex.Literal) and np.all(np.asarray(exponent.val) >= 0)
        found = None if positive else inputs[0]
    return found if found is not None and found.weights else None


@rule(*_ELEMENTWISE)
def _elementwise(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    if equation.primitive.name == "optimization_barrier":
        return inputs
    shapes = shapes_of(equation)
    if any(len(a.shape) not in (0, len(shape)) for shape in shapes for a in inputs):
        return unknown(ties, equation, inputs)  # bits regrouped along a new axis
    divisor = _divisor(equation, inputs)
    if divisor is not None:
        note = note_on(equation, "is not finite where these weights are zero")
        for axis in range(len(divisor.shape)):
            if divisor.vanishes(axis):
                ties.mark(divisor, axis, note)
    note = note_on(equation, "combines channels with what has a fixed number of them")
    found = []
    for shape in shapes:
        labels: list[Labels] = [None] * len(shape)
        for array in inputs:  # an axis of one element is repeated
            for axis, extent in enumerate(array.shape):
                if extent == shape[axis]:
                    labels[axis] = ties.join(labels[axis], array.labels[axis], note)
        found.append(Axes(shape, tuple(labels), _zero(equation, inputs, shape)))
    return found


@rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"
)  # fmt: skip
def _reduce(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    note = note_on(equation, "runs over channels, so what stays changes when one goes")
    axes = equation.params["axes"]
    for axis in axes:
        ties.mark(inputs[0], axis, note)
        ties.count((inputs[0], axis))
    left = [a for a in range(len(inputs[0].shape)) if a not in axes]
    labels = tuple(inputs[0].labels[a] for a in left)
    # Sums and extremes of zeros are zero.
    keeps = equation.primitive.name in ("reduce_sum", "reduce_max", "reduce_min")
    zero = tuple(map(inputs[0].vanishes, left)) if keeps and inputs[0].weights else None
    return [Axes(shape, labels, zero) for shape in shapes_of(equation)]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    note = note_on(equation, "runs over channels, so what stays changes when one goes")
    array, along = inputs[0], equation.params["axis"]
    ties.mark(array, along, note)
    ties.count((array, along))
    labels = list(array.labels)
    if labels[along] is None:
        # No index is like another any more, however often the network has repeated a number.
        labels[along] = unmoved(array.shape[along])
    return [Axes(array.shape, tuple(labels))]


@rule("sort", "top_k")
def _sort(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    axis = equation.params.get("dimension", len(inputs[0].shape) - 1)
    for array in inputs:
        ties.keep(array, axis, note_on(equation, "mixes the channels it sorts"))
    joined = ties.join_all(inputs)
    return [
        Axes(shape, tuple(unmoved(n) if a == axis else joined[a] for a, n in enumerate(shape)))
        for shape in shapes_of(equation)
    ]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _reduce_window(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    note = note_on(equation, "slides over channels, so what stays changes when one goes")
    (shape,) = shapes_of(equation)[:1]
    array, labels = inputs[0], []
    for axis, extent in enumerate(equation.params["window_dimensions"]):
        if extent == 1 and shape[axis] == array.shape[axis]:
            labels.append(array.labels[axis])
        elif shape[axis] == array.shape[axis] and array.moves(axis):
            ties.mark(array, axis, note)
            labels.append(array.labels[axis])
        else:
            ties.keep(array, axis, note)
            labels.append(unmoved(shape[axis]))
    return [Axes(shape, tuple(labels))]


@rule("random_bits", "threefry2x32")
def _drawn(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    """Random numbers are as many as the network wants, and all are others when there are fewer."""
    note = note_on(equation, "draws other random numbers when a channel goes")
    ties.drawn.append(note)
    found = [Axes(shape, tuple(ties.fresh(n) for n in shape)) for shape in shapes_of(equation)]
    for array in found:
        for axis in range(len(array.shape)):
            ties.mark(array, axis, note)
    return found


@rule(
    "iota",
    "random_wrap",
    "random_unwrap",
    "random_seed",
    "random_fold_in",
    "random_split",
    "random_clone",
)
def _fixed(ties: Ties, equation: FlatEquation, inputs: Sequence[Axes]) -> Sequence[Axes]:
    return [Axes.whole(shape) for shape in shapes_of(equation)]
