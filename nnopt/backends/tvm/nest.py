"""Loop nests as tensor expressions with the loops, and the schedule, that a program gave them.

A program has two halves. What changes the function, and what cuts loops, decides the domain: the expression has an axis for each
loop of the nest. Order and marks are the schedule: they are applied to the kernel as given, and nothing is added to them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.extend.core import Primitive
from jax.interpreters import batching

from nnopt.backends.tvm.conv import MAIN
from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.given import axes
from nnopt.backends.tvm.padding import all_of, padded
from nnopt.backends.tvm.values import Value
from nnopt.errors import BackendError
from nnopt.nests import Nest, Operator
from nnopt.nests.interpret import interpret, kernel_box
from nnopt.nests.module import ProgramConv, ProgramDense, nest_of, prepared, spatial_rank

NEST = Primitive("nnopt_nest")
"""An operator on images `[batch, *input]` and weights of the extents of `kernel_box`."""


def _shape(x: Any, kernel: Any, *, operator: Operator) -> Any:
    return x.update(shape=(x.shape[0], *operator.output), weak_type=False)


def _known(x: Any, kernel: Any, *, operator: Operator) -> jax.Array:
    return jnp.asarray(interpret(operator, np.asarray(x), np.asarray(kernel)), x.dtype)


NEST.def_abstract_eval(_shape)
NEST.def_impl(_known)  # of an image that is known when the function is compiled


def _of_a_batch(values: Any, axes: Any, *, operator: Operator) -> tuple[Any, int]:
    """Images are a part of the batch that there is; where weights differ, each has a nest of its own."""
    (x, kernel), (images, weights) = values, axes
    if images is not None:
        x = jnp.moveaxis(x, images, 0)
    if weights is None:
        y = NEST.bind(x.reshape(-1, *operator.input), kernel, operator=operator)
        return y.reshape(*x.shape[:2], *operator.output), 0
    each = [
        NEST.bind(x if images is None else x[i], k, operator=operator)
        for i, k in enumerate(jnp.moveaxis(kernel, weights, 0))
    ]
    return jnp.stack(each), 0


batching.primitive_batchers[NEST] = _of_a_batch


def as_given(
    next_fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:  # fmt: skip
    """An interceptor (for `nn.intercept_methods`): operators whose program has a schedule are run as it says.

    Others are left to their lowering, whose convolutions get a template.
    """
    module = context.module
    if (
        context.method_name != "__call__"
        or not isinstance(module, ProgramConv | ProgramDense)
        or module.is_initializing()
    ):
        return next_fun(*args, **kwargs)
    (x,) = args
    rank = spatial_rank(module)
    image = x.shape[x.ndim - rank - 1 :]
    operator = module.program(nest_of(module, image))
    if not any(loop.marks for nest in operator.nests for loop in nest.loops):
        return next_fun(*args, **kwargs)
    params = module.variables["params"]
    bias = params["bias"] if module.use_bias else None
    y, weights, bias = promote_dtype(x, boxed(operator, params), bias, dtype=module.dtype)
    y = NEST.bind(y.reshape(-1, *image), weights, operator=operator)
    y = y.reshape(*x.shape[: x.ndim - rank - 1], *operator.output)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def boxed(operator: Operator, params: Mapping[str, Any]) -> jax.Array:
    """The parameters of `ProgramConv` where the nests' indices into the kernel find them.

    Args:
        operator: what they are for.
        params: by name.

    Returns:
        Of the extents of `kernel_box`; zero where there is no weight.
    """
    lows, extents = kernel_box(operator)
    variables = prepared(operator)[1].variables
    # By reading, not by writing: weights may be a function's arguments, and TVM's backend has no rule for most writes.
    source = np.zeros(extents, np.int32)
    count = 1
    for variable in variables:
        places = variable.places - np.asarray(lows)
        numbers = np.arange(count, count + math.prod(variable.shape), dtype=np.int32)
        source[tuple(np.moveaxis(places, -1, 0))] = numbers.reshape(variable.shape)
        count += math.prod(variable.shape)
    flat = [jnp.ravel(params[variable.name]) for variable in variables]
    return jnp.take(jnp.concatenate([jnp.zeros(1, flat[0].dtype), *flat]), source, mode="clip")


@rule("nnopt_nest")
def _nest(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    operator: Operator = equation.params["operator"]
    x, kernel = (emitter.full(v) for v in values)
    shape = tuple(equation.outvars[0].aval.shape)
    names = []
    for number, nest in enumerate(operator.nests):
        names.append(f"nest {number} of {operator.output} {nest.loops}")
        emitter.works[names[-1]] = nest
    return emitter.te(
        lambda x, k: expression(operator, x, k, names), [x, kernel], shape, x.dtype, name="nest"
    )


def expression(operator: Operator, x: Any, kernel: Any, names: Sequence[str]) -> Any:
    """The tensor expression of an operator.

    Args:
        operator: loop nests.
        x: `[batch, *operator.input]`.
        kernel: of the extents of `kernel_box`.
        names: of the nests, by which a schedule finds their blocks.

    Returns:
        `[batch, *operator.output]`.

    Raises:
        BackendError: a loop is partly the output's and partly a reduction's.
    """
    from tvm import te, tirx

    batch = int(x.shape[0])
    lows, _ = kernel_box(operator)
    parts = [
        _products(nest, operator, x, kernel, lows, batch, name)
        for nest, name in zip(operator.nests, names, strict=True)
    ]

    def element(n: Any, *at: Any) -> Any:
        # From the last nest to the first: the first has no condition, for each element is some nest's.
        result = None
        for nest, part in reversed(list(zip(operator.nests, parts, strict=True))):
            loops, inside = _written(nest, operator, at)
            value = part[(n, *(loops[name] for name in axes(nest)[0]))]
            result = value if result is None else tirx.if_then_else(inside, value, result)
        return result

    return te.compute((batch, *operator.output), element, name="assembled")


def _products(
    nest: Nest, operator: Operator, x: Any, kernel: Any, lows: Sequence[int], batch: int, name: str
) -> Any:
    from tvm import te, tirx

    _check_whole(nest)
    outputs, reductions = axes(nest)
    extents = nest.extents
    over = {r: te.reduce_axis((0, extents[r]), r) for r in reductions}
    image, shift = _padded(nest, operator, x, batch)

    def product(n: Any, *at: Any) -> Any:
        values = dict(zip(outputs, at, strict=True)) | over
        places: list[Any] = [0] * len(operator.input)
        conditions = []
        for number, dim in enumerate(nest.x):
            place = _at(dim.at, values)
            low, high = dim.at.bounds
            if number in shift:
                place = place + shift[number]
            else:
                if low < 0:
                    conditions.append(place >= 0)
                if high >= dim.size:
                    conditions.append(place < dim.size)
            places[dim.axis] = places[dim.axis] * dim.size + place
        read = image[(n, *places)]
        if conditions:
            read = tirx.if_then_else(all_of(conditions), read, tirx.const(0, x.dtype))
        weight = kernel[
            tuple(_at(dim.at, values) - low for dim, low in zip(nest.k, lows, strict=True))
        ]
        if not over:
            return read * weight
        return te.sum(read * weight, axis=list(over.values()))

    shape = (batch, *(extents[o] for o in outputs))
    return te.compute(shape, product, name="products", attrs={MAIN: name}, varargs_names=outputs)


def _padded(nest: Nest, operator: Operator, x: Any, batch: int) -> tuple[Any, dict[int, int]]:
    """The image with the zeros that the nest reads around it, and how far that moves each dimension.

    Dimensions that are digits of one axis have no place for zeros between them: their reads are tested.
    """
    from tvm import tirx

    axis_of = [dim.axis for dim in nest.x]
    alone = [i for i, dim in enumerate(nest.x) if axis_of.count(dim.axis) == 1]
    low, shape = [0] * len(operator.input), list(operator.input)
    for i in alone:
        dim = nest.x[i]
        first, last = dim.at.bounds
        low[dim.axis] = max(0, -first)
        shape[dim.axis] = low[dim.axis] + max(dim.size, last + 1)
    shift = {i: low[nest.x[i].axis] for i in alone}
    if tuple(shape) == operator.input:
        return x, shift

    steps = [1] * (1 + len(shape))
    made = padded(x, (batch, *shape), (0, *low), steps, lambda: tirx.const(0, x.dtype))
    return made, shift


def _written(nest: Nest, operator: Operator, at: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """Which iteration of the output's loops writes an element, and whether one does.

    A place is taken apart from the largest step down, by remainders: after a split a loop need not run to where the next one steps.
    """
    from tvm import tirx

    loops: dict[str, Any] = {loop.name: tirx.const(0, "int64") for loop in nest.loops}
    conditions = []
    for axis, place in enumerate(at):
        dims = [dim for dim in nest.y if dim.axis == axis]
        rest, digits = place, []
        for dim in reversed(dims):
            digits.append(tirx.indexmod(rest, dim.size))
            rest = tirx.indexdiv(rest, dim.size)
        for dim, digit in zip(dims, reversed(digits), strict=True):
            start = dim.at.constant
            left, most = digit - start if start else digit, dim.size - 1 - start
            if start > 0:
                conditions.append(left >= 0)
                left = tirx.max(left, tirx.const(0, "int64"))
            for term in sorted(dim.at.terms, key=lambda t: -t.coefficient):
                found = tirx.indexdiv(left, term.coefficient)
                if most < term.coefficient * term.extent:
                    left, most = tirx.indexmod(left, term.coefficient), term.coefficient - 1
                else:
                    last = term.extent - 1
                    found = tirx.min(found, tirx.const(last, "int64"))
                    left = left - found * term.coefficient
                    most = max(most - last * term.coefficient, term.coefficient - 1)
                loops[term.loop] = loops[term.loop] + found * term.divisor
            if most:
                conditions.append(left == 0)
    return loops, all_of(conditions) if conditions else tirx.const(True, "bool")


def _at(index: Any, values: dict[str, Any]) -> Any:
    from tvm import tirx

    place: Any = index.constant
    for t in index.terms:
        value = values[t.loop]
        if t.divisor > 1:
            value = tirx.indexdiv(value, t.divisor)
        value = tirx.indexmod(value, t.extent)
        place = value * t.coefficient + place
    return place


def _check_whole(nest: Nest) -> None:
    for loop in nest.loops:
        if not nest.is_output(loop.name):
            continue
        if not nest.writes_apart(loop.name):
            raise BackendError(
                f"tvm: the loop {loop.name} was fused from loops of the output and of a reduction, which no TVM loop can be; "
                "leave the two apart"
            )
