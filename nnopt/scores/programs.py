"""Small compiled programs, keyed by what they compute: equal pieces of different networks share one.

A program is compiled ahead of time for fixed shapes, so calling it can neither trace nor compile.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import flax
import jax
import numpy as np
from jax.extend import core as jex

import nnopt
from nnopt.core.flatten import FlatEquation, Value

_LIBRARIES = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (jax, flax, nnopt))


class Program:
    """One small program.

    Attributes:
        key: what it computes, equal for equal programs.
        run: `(*arrays) -> sequence of arrays`; compiles itself when first called.
    """

    def __init__(
        self,
        key: Hashable,
        function: Callable[..., Any],
        inputs: Sequence[jax.ShapeDtypeStruct],
        cache: "ProgramCache",
    ) -> None:
        self.key = key
        self.inputs = tuple(inputs)
        self._function = function
        self._cache = cache
        self._lock = threading.Lock()
        self._compiled: Any = None
        self.run: Callable[..., Sequence[Any]] = self._compile_and_run

    def specs(self) -> Any:
        """Shapes and dtypes of its outputs; costs one trace."""
        return jax.eval_shape(self._function, *self.inputs)

    def compile(self) -> None:
        """Compiles it, unless that is done."""
        with self._lock:
            if self._compiled is None:
                start = time.perf_counter()
                lowered = jax.jit(self._function).lower(*self.inputs)
                self._compiled = lowered.compile()
                self._cache.count(time.perf_counter() - start)
                self.run = self._compiled

    def _compile_and_run(self, *arrays: Any) -> Sequence[Any]:
        self.compile()
        return self.run(*arrays)


@dataclasses.dataclass
class CompilationStatistics:
    """How much a cache has compiled.

    Attributes:
        programs: distinct programs asked for.
        compiled: those that have been compiled.
        seconds: wall time of lowering and compiling them, summed over threads.
    """

    programs: int = 0
    compiled: int = 0
    seconds: float = 0.0


class ProgramCache:
    """The programs of one device.

    Attributes:
        device: where they run; the default device if None.
        statistics: how much has been compiled so far.
    """

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.statistics = CompilationStatistics()
        self._programs: dict[Hashable, Program] = {}
        self._lock = threading.Lock()
        self._sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def get(
        self,
        key: Hashable,
        function: Callable[..., Any],
        inputs: Iterable[Any],
    ) -> Program:
        """The program of a key, made from a function if it is new.

        Args:
            key: hashable; two functions of one key must compute the same.
            function: `(*arrays) -> tuple of arrays`, traceable.
            inputs: shape and dtype of each input (anything that has both).
        """
        specs = tuple(
            jax.ShapeDtypeStruct(i.shape, i.dtype, sharding=self._sharding) for i in inputs
        )
        full = (key, tuple((s.shape, s.dtype) for s in specs))
        with self._lock:
            program = self._programs.get(full)
            if program is None:
                program = self._programs[full] = Program(full, function, specs, self)
                self.statistics.programs += 1
        return program

    def pending(self) -> list[Program]:
        """Programs that have not been compiled yet, in the order they were asked for."""
        with self._lock:
            return [p for p in self._programs.values() if p._compiled is None]

    def count(self, seconds: float) -> None:
        """Adds one compilation to the statistics."""
        with self._lock:
            self.statistics.compiled += 1
            self.statistics.seconds += seconds


class _Same:
    """Equal to itself alone; keeps its object alive, so that no other can take its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def equations_key(
    equations: Sequence[FlatEquation], inputs: Sequence[Value], outputs: Sequence[Value]
) -> Hashable:
    """A key that is equal for equal computations, whatever their values are called.

    A function that an equation holds (a derivative rule) counts by identity, unless JAX or Flax define it: a rule of theirs
    is known by where its function is written.

    Args:
        equations: in order of execution.
        inputs: the values they start from, in order.
        outputs: the values that are asked for, in order.
    """
    number: dict[Value, int] = {}

    def look_up(atom: Any) -> Hashable:
        return _parameter(atom) if isinstance(atom, jex.Literal) else number[atom]

    for value in inputs:
        number[value] = len(number)
    lines = []
    for equation in equations:
        read = tuple(map(look_up, equation.inputs))
        for value in equation.outputs:
            number.setdefault(value, len(number))
        written = tuple((number[v], _aval(v.aval)) for v in equation.outputs)
        lines.append((equation.primitive.name, read, written, _parameters(equation.params)))
    return tuple(_aval(v.aval) for v in inputs), tuple(lines), tuple(map(look_up, outputs))


def _aval(aval: Any) -> Hashable:
    return aval.shape, str(aval.dtype), getattr(aval, "weak_type", False)


def _parameters(params: dict[str, Any]) -> Hashable:
    rule_source = None
    for body in ("call_jaxpr", "fun_jaxpr"):
        if body in params:
            rule_source = _library_source(params[body])
    items = []
    for name, value in sorted(params.items()):
        is_rule = callable(value) or hasattr(value, "call_wrapped")
        items.append((name, rule_source if is_rule and rule_source else _parameter(value)))
    return tuple(items)


def _library_source(jaxpr: Any) -> str | None:
    """Where the traced function is written, if it belongs to JAX, Flax or nnopt."""
    info = getattr(getattr(jaxpr, "jaxpr", jaxpr), "debug_info", None)
    source = getattr(info, "func_src_info", None) or ""
    return source if source.rpartition(" at ")[2].startswith(_LIBRARIES) else None


def _parameter(value: Any) -> Hashable:
    if isinstance(value, jex.Literal):
        return "literal", _parameter(value.val), _aval(value.aval)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return "array", array.shape, str(array.dtype), array.tobytes()
    if isinstance(value, float):
        return "float", float(value).hex()  # one NaN is like another here
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(_parameter, value))
    if isinstance(value, dict):
        return "dict", tuple((k, _parameter(v)) for k, v in sorted(value.items()))
    if isinstance(value, jex.ClosedJaxpr):
        return "closed", _jaxpr(value.jaxpr), tuple(map(_parameter, value.consts))
    if isinstance(value, jex.Jaxpr):
        return _jaxpr(value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return type(value).__name__, value


def _jaxpr(jaxpr: Any) -> Hashable:
    number: dict[Any, int] = {}
    for var in (*jaxpr.constvars, *jaxpr.invars):
        number[var] = len(number)

    def look_up(atom: Any) -> Hashable:
        return _parameter(atom) if isinstance(atom, jex.Literal) else number[atom]

    lines = []
    for eqn in jaxpr.eqns:
        read = tuple(map(look_up, eqn.invars))
        for var in eqn.outvars:
            number[var] = len(number)
        written = tuple((number[v], _aval(v.aval)) for v in eqn.outvars)
        lines.append((eqn.primitive.name, read, written, _parameters(eqn.params)))
    inputs = tuple(_aval(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    return "jaxpr", inputs, tuple(lines), tuple(map(look_up, jaxpr.outvars))
