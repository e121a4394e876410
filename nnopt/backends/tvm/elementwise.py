"""Element-wise primitives as tensor expressions."""

from typing import Any

import jax
import numpy as np

from nnopt.backends.tvm.arithmetic import dtype_of
from nnopt.backends.tvm.emit import Emitter, rule
from nnopt.backends.tvm.scalars import NAMES, expressions
from nnopt.backends.tvm.values import Value

_PARAMETERS = ("y", "new_dtype", "rounding_method")


def _elementwise(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Broadcasts what is held with size 1, or is a scalar."""
    (out,) = equation.outvars
    shape, dtype = tuple(out.aval.shape), str(out.aval.dtype)
    held = tuple(
        max((v.held[axis] for v in values if v.held), default=1) for axis in range(len(shape))
    )
    if all(v.constant for v in values):
        arrays = [np.broadcast_to(v.data, held) if v.held else v.data for v in values]
        with jax.ensure_compile_time_eval():
            result = np.asarray(equation.primitive.bind(*arrays, **equation.params))
        # Operands that are all scalars, or a size 1 that stands for more.
        return Value(np.broadcast_to(result, held), shape, held, dtype)
    from tvm import te, tirx

    name = equation.primitive.name
    if name == "pow" and not dtype.startswith("float"):
        raise emitter.unsupported(equation, " of integers")
    function = expressions()[name]
    parameters = {k: v for k, v in equation.params.items() if k in _PARAMETERS}
    scalars = {i: v.data.item() for i, v in enumerate(values) if v.constant and v.data.size == 1}
    tensors = [v for i, v in enumerate(values) if i not in scalars]

    def expression(*arrays: Any) -> Any:
        def element(*at: Any) -> Any:
            rest = iter(zip(arrays, tensors, strict=True))
            operands = []
            for i, value in enumerate(values):
                if i in scalars:
                    operands.append(tirx.const(scalars[i], value.dtype))
                    continue
                array, tensor = next(rest)
                operands.append(
                    array[tuple(0 if n == 1 else a for a, n in zip(at, tensor.held, strict=False))]
                )
            result = function(*operands, **parameters)
            return result if dtype_of(result) == dtype else tirx.Cast(dtype, result)

        return te.compute(held, element, name=name)

    return emitter.te(expression, tensors, held, dtype, shape, name)


_elementwise.lazy = True  # type: ignore[attr-defined]
rule(*NAMES)(_elementwise)


@rule("optimization_barrier")
def _barrier(emitter: Emitter, equation: Any, values: list[Value]) -> list[Value]:
    return values


@rule("reduce_precision")
def _reduce_precision(emitter: Emitter, equation: Any, values: list[Value]) -> Value:
    """Nothing to do for what has no more digits."""
    bits = equation.params["exponent_bits"], equation.params["mantissa_bits"]
    if values[0].dtype != "float32" or bits[0] < 8 or bits[1] < 23:
        raise emitter.unsupported(equation, f" to {bits[1]} bits of {values[0].dtype}")
    return values[0]
