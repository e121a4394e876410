"""Where kernels meet data: convolutions and matrix products of a value that depends on the images with one made of parameters."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import core as jex

from nnopt.core.dataflow import CONVOLUTIONS
from nnopt.core.flatten import Atom, FlatEquation, Value
from nnopt.typing import Path

PRODUCTS = (*CONVOLUTIONS, "dot_general")
"""Names of the primitives that multiply data with kernels."""


@dataclasses.dataclass(frozen=True, eq=False)
class KernelUse:
    """A convolution or matrix product of data with parameters.

    Attributes:
        path: the site that computes it.
        kernels: the parameters that its kernel is made of.
        output: what it returns, after the bias if one is added.
        batch_axis: the axis of the output that counts the examples.
        feature_axes: the axes of the output that come from the kernel: channels.
        weights_per_feature: values of the kernel that make one of them, `k^2 in / groups` for a convolution.
        data: its input.
        is_convolution: whether its output has positions.
    """

    path: Path
    kernels: tuple[Path, ...]
    output: Value
    batch_axis: int
    feature_axes: tuple[int, ...]
    weights_per_feature: int
    data: Atom
    is_convolution: bool


def kernel_use(
    equation: FlatEquation, data: int, kernels: tuple[Path, ...], output: Value
) -> KernelUse | None:
    """The use that an equation of `PRODUCTS` makes of a kernel.

    Args:
        equation: the equation.
        data: which of its two inputs is data.
        kernels: the parameters that the other is made of.
        output: what it returns, after the bias.

    Returns:
        None if it adds up over the first axis of the data, so that no axis of the output counts the examples.
    """
    shape, param = output.aval.shape, equation.inputs[1 - data]
    features: tuple[int, ...]
    if equation.primitive.name == "dot_general":
        axes = _product_axes(equation, data)
        if axes is None:
            return None
        batch, features = axes
    else:
        numbers: Any = equation.params.get("dimension_numbers")
        # Without dimension numbers it is the primitive of `nnopt.layers.Conv`, whose channels come last.
        spec = numbers.out_spec if hasattr(numbers, "out_spec") else (0, len(shape) - 1)
        batch, features = spec[0], (spec[1],)
    size = math.prod(_shape(param))
    return KernelUse(
        equation.path,
        kernels,
        output,
        batch,
        features,
        size // math.prod(shape[a] for a in features),
        equation.inputs[data],
        equation.primitive.name in CONVOLUTIONS,
    )


def _shape(atom: Atom) -> tuple[int, ...]:
    aval: Any = atom.aval
    return tuple(aval.shape)


def _product_axes(equation: FlatEquation, data: int) -> tuple[int, tuple[int, ...]] | None:
    """Axes of a `dot_general`'s output that count the examples (the first of the data) and the kernel's features."""
    contracting, batched = equation.params["dimension_numbers"]
    if 0 in contracting[data]:
        return None
    ranks = [len(_shape(a)) for a in equation.inputs]
    free = [
        [i for i in range(ranks[s]) if i not in contracting[s] and i not in batched[s]]
        for s in (0, 1)
    ]
    # Axes of the output: those of both, then the free ones of the left, then of the right operand.
    order: Sequence[tuple[int, int]] = (
        [(data, i) for i in batched[data]] + [(0, i) for i in free[0]] + [(1, i) for i in free[1]]
    )
    of_data = dict(zip(batched[data], batched[1 - data], strict=True))
    batch = order.index((data, 0))
    features = tuple(
        axis
        for axis, (side, i) in enumerate(order)
        if axis != batch and (side != data or i in of_data)
    )
    return batch, features


def kernels_inside(
    equation: FlatEquation, is_data: Sequence[bool], origins: Sequence[frozenset[Path]]
) -> list[Path]:
    """Parameters that meet data in a convolution or product inside a loop or conditional."""
    found: list[Path] = []

    def walk(jaxpr: Any, data: Sequence[bool], params: Sequence[frozenset[Path]]) -> list[bool]:
        flows = dict(zip(jaxpr.invars, data, strict=True))
        made = dict(zip(jaxpr.invars, params, strict=True))
        for eqn in jaxpr.eqns:
            values = [None if isinstance(a, jex.Literal) else a for a in eqn.invars]
            here = [v is not None and flows.get(v, False) for v in values]
            origin = [made.get(v, frozenset()) if v is not None else frozenset() for v in values]
            after = [any(here)] * len(eqn.outvars)
            if eqn.primitive.name in PRODUCTS and sum(here) == 1:
                found.extend(sorted(origin[1 - here.index(True)]))
            for inner in _inner(eqn):
                if len(inner.invars) <= len(values):
                    skip = len(values) - len(inner.invars)
                    out = walk(inner, here[skip:], origin[skip:])
                    after = out if len(out) == len(after) else after
            flows.update(zip(eqn.outvars, after, strict=True))
            if not any(here):
                union = frozenset().union(*origin)
                made.update(dict.fromkeys(eqn.outvars, union))
        return [not isinstance(a, jex.Literal) and flows.get(a, False) for a in jaxpr.outvars]

    for inner in _inner(equation):
        skip = len(equation.inputs) - len(inner.invars)
        if skip >= 0:
            walk(inner, is_data[skip:], origins[skip:])
    return found


def primitives_inside(equation: Any) -> set[str]:
    """Names of all primitives inside an equation."""
    names = set()
    for inner in _inner(equation):
        for eqn in inner.eqns:
            names |= {eqn.primitive.name} | primitives_inside(eqn)
    return names


def _inner(equation: Any) -> Iterable[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item
