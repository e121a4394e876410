"""From a jaxpr to Relax: any JAX function of the primitives that networks are made of.

Each equation becomes a tensor expression, emitted through Relax's block builder, so that TVM fuses what is element-wise into what
is before it. Equations of constants alone are computed at once. A primitive that has no rule here is an error, never a guess.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from nnopt.backends.tvm.conv import ConvWorkload, Tile, convolve, pack
from nnopt.backends.tvm.schedule import Work
from nnopt.backends.tvm.values import Value
from nnopt.core.marks import OpenSites
from nnopt.core.paths import path_text
from nnopt.errors import UnsupportedPrimitiveError

Rule = Callable[["Emitter", Any, list[Value]], Value | Sequence[Value]]
RULES: dict[str, Rule] = {}
"""By name of the primitive."""
CALLS = (
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2", "custom_lin",
    "composite",
)  # fmt: skip
"""Primitives that run one jaxpr on their operands."""
DTYPES = ("float32", "float64", "int32", "int64", "uint8", "int8", "uint32", "bool")
_INDEX = "int64"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers what primitives become."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Emitter:
    """Writes equations into a block builder, whose function and dataflow block are open.

    Attributes:
        builder: `relax.BlockBuilder`.
        tile: which tile a convolution gets.
        works: convolutions with their tiles, and nests with a schedule, by the name that their blocks have.
    """

    def __init__(self, builder: Any, tile: Callable[[ConvWorkload], Tile]) -> None:
        """Begins with nothing."""
        self.builder = builder
        self.tile = tile
        self.works: dict[str, Work] = {}
        self._sites = OpenSites()

    def run(self, jaxpr: Any, constants: Iterable[Any], values: Iterable[Value]) -> list[Value]:
        """Emits a jaxpr.

        Args:
            jaxpr: open.
            constants: of it.
            values: what it is called with.

        Returns:
            Its outputs.

        Raises:
            UnsupportedPrimitiveError: there is no rule for one of its equations.
        """
        known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(Value.of, constants), strict=True))
        known |= zip(jaxpr.invars, values, strict=True)

        def read(atom: Any) -> Value:
            if isinstance(atom, jex.Literal):  # perhaps a number of Python's, which knows no width
                return Value.of(np.asarray(atom.val, _dtype(atom)))
            return known[atom]

        for equation in jaxpr.eqns:
            outputs = self.equation(equation, [read(v) for v in equation.invars])
            known |= zip(equation.outvars, outputs, strict=True)
        return [read(v) for v in jaxpr.outvars]

    def equation(self, equation: Any, values: list[Value]) -> Sequence[Value]:
        """The outputs of one equation."""
        name = equation.primitive.name
        if name == "name":
            self._sites.see(equation)
            return values
        if name in CALLS:
            inner = next(
                p
                for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")
                if (p := equation.params.get(key)) is not None
            )
            if isinstance(inner, jex.ClosedJaxpr):
                return self.run(inner.jaxpr, inner.consts, values)
            return self.run(inner, (), values)
        made = RULES.get(name)
        lazy = made is not None and getattr(made, "lazy", False)
        foreign = any(v.dtype not in DTYPES for v in values)  # such as keys of random numbers
        if all(v.constant for v in values) and name not in _CONTROL and (foreign or not lazy):
            return self._evaluated(equation, values)
        if made is None:
            raise self.unsupported(equation)
        for v in (*equation.invars, *equation.outvars):
            if str(v.aval.dtype) not in DTYPES:
                raise self.unsupported(equation, f" of {v.aval.dtype}")
        result = made(self, equation, values)
        return [result] if isinstance(result, Value) else result

    def unsupported(self, equation: Any, what: str = "") -> UnsupportedPrimitiveError:
        """An error that says what is not supported, and where it stands."""
        where = path_text(self._sites.innermost) if self._sites.innermost else "the function itself"
        shapes = ", ".join(v.aval.str_short() for v in equation.invars)
        return UnsupportedPrimitiveError(
            f"tvm: no rule for the JAX primitive {equation.primitive.name}{what} ({shapes}) in {where}; "
            "use the backend xla for it"
        )

    def _evaluated(self, equation: Any, values: list[Value]) -> list[Value]:
        with jax.ensure_compile_time_eval():
            outputs = equation.primitive.bind(
                *(
                    v.data if v.held == v.shape else np.broadcast_to(v.data, v.shape)
                    for v in values
                ),
                **equation.params,
            )
        return [
            Value.of(o) for o in (outputs if equation.primitive.multiple_results else [outputs])
        ]

    # --- tensor expressions ---

    def te(
        self,
        expression: Callable[..., Any],
        values: Sequence[Value],
        held: Sequence[int],
        dtype: str,
        shape: Sequence[int] | None = None,
        name: str = "te",
    ) -> Value:
        """Emits a tensor expression.

        Args:
            expression: of a tensor for each value -> tensor.
            values: its arguments, as they are held.
            held: shape of what it makes.
            dtype: of that.
            shape: that it stands for; `held` by default.
            name: of the kernel.
        """
        data = self.builder.emit_te(
            expression, *(self._argument(v) for v in values), primfunc_name_hint=name
        )
        return Value(data, tuple(held if shape is None else shape), tuple(held), dtype)

    def _argument(self, value: Value) -> Any:
        from tvm import relax

        return relax.const(value.data, value.dtype) if value.constant else value.data

    def indexed(
        self,
        value: Value,
        held: Sequence[int],
        index: Callable[..., Sequence[Any]],
        shape: Sequence[int] | None = None,
        name: str = "move",
    ) -> Value:
        """Elements of a value in other places: `index` of a place is where its element comes from."""
        from tvm import te

        def expression(x: Any) -> Any:
            if not held:
                return te.compute((), lambda *_: x[tuple(index())], name=name)
            return te.compute(tuple(held), lambda *at: x[tuple(index(*at))], name=name)

        return self.te(expression, [value], held, value.dtype, shape, name)

    def full(self, value: Value) -> Value:
        """The value with nothing left to be repeated."""
        if value.held == value.shape:
            return value
        if value.constant:
            return Value.of(np.ascontiguousarray(np.broadcast_to(value.data, value.shape)))
        held = value.held
        return self.indexed(
            value,
            value.shape,
            lambda *at: [0 if n == 1 else i for i, n in zip(at, held, strict=True)],
            name="broadcast",
        )

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The elements in their order, in another shape."""
        from tvm import topi

        value = self.full(value)
        if value.shape == tuple(shape):
            return value
        if value.constant:
            return Value.of(value.data.reshape(shape))
        return self.te(
            lambda x: topi.reshape(x, tuple(shape)), [value], shape, value.dtype, name="reshape"
        )

    def transposed(self, value: Value, permutation: Sequence[int]) -> Value:
        """Axes in another order, nothing repeated that was not."""
        if list(permutation) == sorted(permutation):
            return value
        held = tuple(value.held[p] for p in permutation)
        shape = tuple(value.shape[p] for p in permutation)
        if value.constant:
            return Value(np.transpose(value.data, permutation), shape, held, value.dtype)
        places = np.argsort(permutation).tolist()
        return self.indexed(value, held, lambda *at: [at[p] for p in places], shape, "transpose")

    def conv(self, x: Value, kernel: Value, work: ConvWorkload) -> Value:
        """A convolution.

        Args:
            x: `[batch, *size, inputs]`.
            kernel: `[*window, inputs / groups, outputs]`.
            work: the two.

        Returns:
            `[batch, *output, outputs]`.
        """
        x, kernel = self.full(x), self.full(kernel)
        shape = (work.batch, *work.output, work.outputs)
        tile = self.tile(work)
        _, channels = tile.rounded(work)
        groups = tile.apart(work)
        each = work.outputs // groups
        blocks = groups * channels // tile.lanes
        packed_shape = (blocks, *kernel.shape[:-1], tile.lanes)
        if kernel.constant:
            packed = Value.of(pack(kernel.data, work, tile))
        else:
            packed = self._packed(kernel, packed_shape, channels, each, tile.lanes)
        name = f"{work} {tile}"  # the same for kernels that are the same, so that they become one
        self.works[name] = work, tile
        return self.te(
            lambda x, k: convolve(x, k, work, tile, name),
            [x, packed],
            shape,
            x.dtype,
            name="conv",
        )

    def _packed(
        self, kernel: Value, shape: Sequence[int], channels: int, each: int, lanes: int
    ) -> Value:
        from tvm import te, tirx

        def expression(k: Any) -> Any:
            def element(block: Any, *rest: Any) -> Any:
                *window, lane = rest
                padded = block * lanes + lane
                if channels == each:
                    return k[(*window, padded)]
                within = tirx.indexmod(padded, channels)
                real = tirx.indexdiv(padded, channels) * each + within
                return tirx.if_then_else(
                    within < each, k[(*window, real)], tirx.const(0, kernel.dtype)
                )

            return te.compute(tuple(shape), element, name="pack")

        return self.te(expression, [kernel], shape, kernel.dtype, name="pack")


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype


_CONTROL = ("scan", "cond", "while")


@functools.cache
def load_rules() -> dict[str, Rule]:
    """Rules of all files."""
    from nnopt.backends.tvm import (  # noqa: F401
        control,
        elementwise,
        places,
        products,
        shapes,
        windows,
    )

    return RULES
