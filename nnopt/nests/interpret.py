"""A plain interpreter of loop nests, in NumPy and double precision: what every lowering is checked against."""

import numpy as np

from nnopt.nests.nest import Dim, Nest, Operator


def kernel_box(operator: Operator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the weights that an operator uses lie.

    They are addressed as in the kernel `[*window, in, out, *copies]` that the operator began with; a widened window lies outside.

    Returns:
        The smallest index along each dimension, and the extents from there on.
    """
    bounds = [[d.at.bounds for d in nest.k] for nest in operator.nests]
    lows = tuple(min(low for low, _ in dim) for dim in zip(*bounds, strict=True))
    highs = tuple(max(high for _, high in dim) for dim in zip(*bounds, strict=True))
    return lows, tuple(high - low + 1 for low, high in zip(lows, highs, strict=True))


def interpret(operator: Operator, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Runs every iteration of every nest.

    Args:
        operator: loop nests.
        x: `[batch, *operator.input]`.
        weights: of the extents that `kernel_box` says.

    Returns:
        `[batch, *operator.output]`, float64.
    """
    y = np.zeros((len(x), *operator.output))
    lows, _ = kernel_box(operator)
    for nest in operator.nests:
        loops = np.indices([loop.extent for loop in nest.loops]).reshape(len(nest.loops), -1)
        values = dict(zip((loop.name for loop in nest.loops), loops, strict=True))
        to = tuple(_at(d, values) for d in nest.y)
        weight = weights[tuple(_at(d, values) - low for d, low in zip(nest.k, lows, strict=True))]
        read, inside = _read(nest, operator.input, values)
        for n in range(len(x)):
            np.add.at(y[n], to, np.where(inside, x[n][read], 0.0) * weight)
    return y


def _at(dim: Dim, values: dict[str, np.ndarray]) -> np.ndarray:
    place = np.asarray(dim.at.constant)
    for t in dim.at.terms:
        place = place + t.coefficient * (values[t.loop] // t.divisor % t.extent)
    return np.broadcast_to(place, next(iter(values.values())).shape)


def _read(
    nest: Nest, shape: tuple[int, ...], values: dict[str, np.ndarray]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Places in the input, and whether they are inside of every dimension of the view."""
    count = next(iter(values.values())).shape
    places = [np.zeros(count, np.int64) for _ in shape]
    inside = np.ones(count, bool)
    for dim in nest.x:
        at = _at(dim, values)
        inside &= (at >= 0) & (at < dim.size)
        places[dim.axis] = places[dim.axis] * dim.size + at
    return tuple(np.where(inside, p, 0) for p in places), inside
