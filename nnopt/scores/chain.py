"""A flat program run as a chain of small compiled ones, with its reverse pass.

Where it is cut: see `scores.steps`.

The reverse pass. Each program has a reverse one that takes its inputs and the cotangents of its outputs, computes what it
needs again, and returns the cotangents of its inputs, already added to those that came from elsewhere. Only values that come
after a probe have cotangents: no gradient of a weight is computed, and none of the network's input.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax.extend import core as jex

from nnopt.core.flatten import Flat, Value, run_equations
from nnopt.errors import UnsupportedNetworkError
from nnopt.layers.lowering import ConvShape, Direction, Lowering, choose
from nnopt.scores.programs import Program, ProgramCache, equations_key
from nnopt.scores.steps import Step, Steps
from nnopt.typing import Path

Instruction = tuple[Program, tuple[int, ...], tuple[int, ...]]
"""A program, the slots it reads and the slots it writes."""
Flags = tuple[bool, ...]
HoleFlags = Callable[[int, Flags], Flags]


class Observer(abc.ABC):
    """What a score computes at a probe; a frozen dataclass.

    Attributes:
        needs_gradient: whether it looks at the cotangent too.
    """

    needs_gradient: ClassVar[bool]

    @abc.abstractmethod
    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """`(activation)` or, with a gradient, `(activation, cotangent)` -> small arrays; traceable."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A value that is looked at.

    Attributes:
        path: what it is called in the result: a path in the chain's module.
        value: of the flat program.
        observer: what is computed from it.
    """

    path: Path
    value: Value
    observer: Observer


@dataclasses.dataclass(frozen=True)
class Hole:
    """A place in a flat program where another chain is run.

    Attributes:
        index: which, in the order of the program.
        inputs: slots of the values that go in.
        outputs: slots of the values that come out.
    """

    index: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The reverse pass of a chain for one pattern of activity.

    Attributes:
        parts: what to run, in order: instructions, or the index of a hole whose own reverse pass stands there with the slots of
            its cotangents that go in, and that come out.
        inputs: for each input that may be active the slot of its cotangent, None without one.
        observed: for each probe with a gradient: its position among the probes, and the slots of what was observed.
        spent: for each instruction of the forward pass, then of this one: the slots that nobody reads any more. Their memory is
            used again while it is in the cache.
    """

    parts: "tuple[Instruction | HoleReverse, ...]"
    inputs: tuple[int | None, ...]
    observed: tuple[tuple[int, tuple[int, ...]], ...]
    spent: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]


@dataclasses.dataclass(frozen=True)
class HoleReverse:
    """A hole in a reverse pass: slots of the cotangents that go in (of its outputs) and come out (of its inputs), None for none."""

    index: int
    cotangents: tuple[int | None, ...]
    gradients: tuple[int | None, ...]


class Chain:
    """A flat program cut into small ones.

    The cache compiles what is new. Values are kept in a list, `env`, by slots.

    Attributes:
        probes: what is looked at.
        forward: instructions of the forward pass, and holes, in order.
        inputs: slots of the inputs that a caller fills.
        outputs: slots of the outputs.
        observed: for each probe without gradient: its position, and the slots of what was observed.
    """

    def __init__(
        self,
        flat: Flat,
        inputs: Sequence[Value],
        cache: ProgramCache,
        probes: Sequence[Probe] = (),
        *,
        lanes: int | None = None,
        platform: str,
    ) -> None:
        """Cuts.

        Args:
            flat: the program. Inputs of it that are not `inputs` are weights (or PRNG keys), the same in each call.
            inputs: those that differ from call to call and may be differentiated.
            cache: where programs come from.
            probes: what to look at.
            lanes: run this many calls side by side, on arrays with one more axis in front; weights are shared.
            platform: what to lower convolutions for.

        Raises:
            UnsupportedNetworkError: an output does not depend on an input.
        """
        self.probes = tuple(probes)
        self._cache = cache
        self._lanes = lanes
        self._platform = platform
        self._slots: dict[Any, int] = {}
        self._flat = flat
        self._inputs = tuple(inputs)
        self._probed = frozenset(p.value for p in self.probes if p.observer.needs_gradient)
        steps = Steps(flat, self._inputs, [p.value for p in self.probes])
        self._steps, self._makers = steps.steps, steps.makers
        self._sources: dict[int, Value] = {}
        self._prepared: dict[Any, tuple[int, ...]] = {}
        self.forward: list[Instruction | Hole] = [self._forward(step) for step in self._steps]
        self.observed: list[tuple[int, tuple[int, ...]]] = []
        for i, probe in enumerate(self.probes):
            if not probe.observer.needs_gradient:
                instruction, slots = self._observe(i, (self._slot(probe.value),))
                self.forward.append(instruction)
                self.observed.append((i, slots))
        self.inputs = tuple(self._slot(v) for v in self._inputs)
        for atom in flat.outputs:
            if isinstance(atom, jex.Literal) or atom not in steps.dependent:
                raise UnsupportedNetworkError(
                    "an output does not depend on the input, so there is nothing to run as a chain"
                )
        self.outputs = tuple(self._slot(v) for v in flat.outputs if isinstance(v, Value))
        self._reverses: dict[Any, Reverse] = {}

    # -- slots and weights --------------------------------------------------------------------------------------------

    def _slot(self, key: Any) -> int:
        return self._slots.setdefault(key, len(self._slots))

    def _weight_slots(self, weights: Iterable[Value]) -> tuple[int, ...]:
        for value in weights:
            self._sources[self._slot(value)] = value
        return tuple(self._slot(v) for v in weights)

    def bind(self, weights: Mapping[Value, Any]) -> list[Any]:
        """An `env` that holds the weights, each prepared for its uses; copy it for each call.

        Args:
            weights: array of each input of the flat program that is a weight.
        """
        known: dict[Value, Any] = {**dict(self._flat.constants), **weights}
        env: list[Any] = [None] * len(self._slots)
        for slot, value in self._sources.items():
            env[slot] = jax.device_put(self._weight(value, known), self._cache.device)
        for (kernel, shape, direction, lowering), slots in self._prepared.items():
            program = self._preparation(shape, direction, lowering)
            arrays = program.run(self._weight(kernel, known))
            for slot, array in zip(slots, arrays, strict=True):
                env[slot] = array
        return env

    def _preparation(self, shape: ConvShape, direction: Direction, lowering: Lowering) -> Program:
        """The program that prepares a kernel for a lowering."""

        def run(kernel: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(lowering.prepare(shape, direction, kernel))

        kernel = jax.ShapeDtypeStruct(shape.kernel, shape.dtype)
        return self._cache.get(("prepare", shape, direction, lowering), run, [kernel])

    def _weight(self, value: Value, known: dict[Value, Any]) -> Any:
        if value not in known:
            maker = self._makers[value]
            for atom in maker.inputs:
                if isinstance(atom, Value):
                    self._weight(atom, known)
            run_equations([maker], known)
        return known[value]

    @property
    def weights(self) -> int:
        """How many weights a bound `env` holds; grows when a reverse pass is planned that needs others."""
        return len(self._sources) + len(self._prepared)

    def grown(self, bound: list[Any]) -> list[Any]:
        """A copy of a bound `env` with room for every value."""
        return bound + [None] * (len(self._slots) - len(bound))

    def missed(self, reverse: Reverse | None) -> list[Path]:
        """Paths of the probes with a gradient that a reverse pass does not come by."""
        seen = {i for i, _ in reverse.observed} if reverse is not None else set()
        needed = (i for i, p in enumerate(self.probes) if p.observer.needs_gradient)
        return [self.probes[i].path for i in needed if i not in seen]

    # -- programs -----------------------------------------------------------------------------------------------------

    def _program(
        self,
        key: Hashable,
        function: Callable[..., Any],
        moving: Sequence[Any],
        fixed: Sequence[Any],
    ) -> Program:
        """A program of `moving` arrays, which have lanes if there are any, and `fixed` ones, which have not."""
        specs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in moving]
        if self._lanes is not None:
            specs = [jax.ShapeDtypeStruct((self._lanes, *s.shape), s.dtype) for s in specs]
            axes = (*[0] * len(moving), *[None] * len(fixed))
            function = jax.vmap(function, in_axes=axes)
        return self._cache.get((key, self._lanes), function, [*specs, *fixed])

    def _forward(self, step: Step) -> Instruction | Hole:
        reads = tuple(self._slot(v) for v in step.inputs)
        writes = tuple(self._slot(v) for v in (*step.outputs, *step.kept))
        if step.hole is not None:
            return Hole(step.hole, reads, writes)
        if step.conv is not None:
            program, slots = self._conv_program(step, Direction.FORWARD, accumulate=False)
            return program, (*reads, *slots), writes
        inputs, weights = step.inputs, step.weights
        outputs = (*step.outputs, *step.kept)

        def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            known = dict(zip((*inputs, *weights), arrays, strict=True))
            run_equations(step.equations, known)
            return tuple(known[v] for v in outputs)

        key = ("forward", equations_key(step.equations, (*inputs, *weights), outputs))
        program = self._program(key, run, _avals(inputs), _avals(weights))
        return program, (*reads, *self._weight_slots(weights)), writes

    def _conv_program(
        self, step: Step, direction: Direction, *, accumulate: bool
    ) -> tuple[Program, tuple[int, ...]]:
        """The program of a convolution, or of its input gradient, and the slots of its prepared kernel."""
        shape, (kernel,) = step.conv, step.weights
        assert shape is not None
        lowering, prepared = _lowered(shape, direction, self._platform)
        where = (kernel, shape, direction, lowering)
        self._preparation(shape, direction, lowering)
        if where not in self._prepared:
            slots = tuple(self._slot((*where, i)) for i in range(len(prepared)))
            self._prepared[where] = slots
        moving = [step.inputs[0] if direction is Direction.FORWARD else step.outputs[0]]
        moving += [step.inputs[0]] if accumulate else []

        def run(operand: jax.Array, *rest: jax.Array) -> tuple[jax.Array, ...]:
            if not accumulate:
                return (lowering.run(shape, direction, operand, rest),)
            return (lowering.run(shape, direction, operand, rest[1:]) + rest[0],)

        key = ("conv", shape, direction, lowering, accumulate)
        program = self._program(key, run, _avals(moving), prepared)
        return program, self._prepared[where]

    def _observe(self, index: int, reads: tuple[int, ...]) -> tuple[Instruction, tuple[int, ...]]:
        probe = self.probes[index]
        arrays = _avals([probe.value] * len(reads))
        program = self._program(("observe", probe.observer), probe.observer, arrays, ())
        count = _outputs_of(probe.observer, *((a.shape, a.dtype) for a in arrays))
        slots = tuple(self._slot(("observed", index, i)) for i in range(count))
        return (program, reads, slots), slots

    # -- reverse pass -------------------------------------------------------------------------------------------------

    def active(self, inputs: Flags, hole: HoleFlags | None = None) -> tuple[bool, ...]:
        """Whether the cotangent of each output is needed: whether it comes after a probe with a gradient or an active input.

        Args:
            inputs: for each input whether it is active.
            hole: `(index, flags of its inputs) -> flags of its outputs`.
        """
        found = self._active(inputs, hole)
        return tuple(v in found for v in self._flat.outputs)

    def _active(self, inputs: Flags, hole: HoleFlags | None) -> set[Value]:
        found = {v for v, on in zip(self._inputs, inputs, strict=True) if on}
        found |= self._probed.intersection(self._inputs)
        for step in self._steps:
            if step.hole is not None:
                assert hole is not None, (
                    "a chain with holes needs to know what they are filled with"
                )
                flags = hole(step.hole, tuple(v in found for v in step.inputs))
                found.update(v for v, on in zip(step.outputs, flags, strict=True) if on)
            elif not found.isdisjoint(step.inputs):
                found.update(step.outputs)
            found |= self._probed.intersection(step.outputs)
        return found

    def reverse(self, inputs: Flags, outputs: Flags, hole_flags: tuple[Flags, ...] = ()) -> Reverse:
        """The reverse pass when these inputs are active and these outputs have cotangents.

        Args:
            inputs: for each input whether it is active.
            outputs: for each output whether it has a cotangent, in its `cotangent_slot`.
            hole_flags: for each hole whether each of its outputs is active.
        """
        key = inputs, outputs, hole_flags
        if key not in self._reverses:
            self._reverses[key] = self._reversed(*key)
        return self._reverses[key]

    def cotangent_slot(self, output: int) -> int:
        """The slot in which the reverse pass expects the cotangent of an output (one slot for one value)."""
        return self._slot(("cotangent", self._flat.outputs[output]))

    def _reversed(
        self,
        inputs: Flags,
        outputs: Flags,
        hole_flags: tuple[Flags, ...],
    ) -> Reverse:
        active = self._active(inputs, lambda index, _: hole_flags[index])
        parts: list[Instruction | HoleReverse] = []
        observed: list[tuple[int, tuple[int, ...]]] = []
        by_value: dict[Value, list[int]] = {}
        for i, probe in enumerate(self.probes):
            if probe.observer.needs_gradient:
                by_value.setdefault(probe.value, []).append(i)
        at = {  # where the cotangent of a value is, or what there is of it so far
            value: self.cotangent_slot(i)
            for i, (value, on) in enumerate(zip(self._flat.outputs, outputs, strict=True))
            if on
        }

        def fresh(value: Value) -> int:
            return self._slot(("cotangent", value, len(parts)))

        def look(values: Iterable[Value]) -> None:
            for value in values:
                for i in by_value.get(value, ()) if value in at else ():
                    instruction, slots = self._observe(i, (self._slot(value), at[value]))
                    parts.append(instruction)
                    observed.append((i, slots))

        def add(value: Value, slot: int) -> None:
            """Takes a cotangent that is in a slot."""
            if value in at:
                to = fresh(value)
                parts.append(self._sum(value, (at[value], slot), to))
                slot = to
            at[value] = slot

        for step in reversed(self._steps):
            look(step.outputs)
            given = [v for v in step.outputs if v in at]
            wanted = [v for v in step.inputs if v in active]
            if not given or not (wanted or step.hole is not None):
                continue
            if step.hole is not None:
                ins = tuple(at.get(v) for v in step.outputs)
                slots = tuple(fresh(v) if v in active else None for v in step.inputs)
                parts.append(HoleReverse(step.hole, ins, slots))
                for value, slot in zip(step.inputs, slots, strict=True):
                    if slot is not None:
                        add(value, slot)
            elif step.is_addition:
                for value in wanted:
                    add(value, at[given[0]])
            else:
                known = [v for v in wanted if v in at]
                sums = [at[v] for v in known]
                writes = tuple(map(fresh, wanted))
                program, reads, weights = self._reverse_program(step, given, wanted, known)
                cotangents = [at[v] for v in given]
                parts.append((program, (*reads, *cotangents, *sums, *weights), writes))
                at.update(zip(wanted, writes, strict=True))
        look(self._inputs)
        gradients = tuple(
            at.get(v) if on else None for v, on in zip(self._inputs, inputs, strict=True)
        )
        kept = [*self.inputs, *self.outputs, *(s for s in gradients if s is not None)]
        kept += [s for _, slots in (*self.observed, *observed) for s in slots]
        forward, backward = len(self.forward), (*self.forward, *parts)
        # Holes move values between chains, so a chain with holes keeps all of its own.
        whole = all(isinstance(part, tuple) for part in backward)
        spent = _spent([p for p in backward if isinstance(p, tuple)], kept) if whole else ()
        return Reverse(tuple(parts), gradients, tuple(observed), (spent[:forward], spent[forward:]))

    def _sum(self, value: Value, terms: tuple[int, ...], to: int) -> Instruction:
        def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            return (sum(arrays[1:], arrays[0]),)

        program = self._program(("sum", len(terms)), run, _avals([value] * len(terms)), ())
        return program, terms, (to,)

    def _reverse_program(
        self, step: Step, given: list[Value], wanted: list[Value], known: list[Value]
    ) -> tuple[Program, tuple[int, ...], tuple[int, ...]]:
        """The reverse program of a step, and the slots of the values and of the weights that it computes from.

        It reads those values, cotangents of `given`, what is known of the cotangents of `wanted`, and those weights.
        """
        if step.conv is not None:
            direction = Direction.INPUT_GRADIENT
            program, slots = self._conv_program(step, direction, accumulate=bool(known))
            return program, (), slots
        values = (*step.inputs, *step.kept)
        weights = step.weights
        numbers = {v: i for i, v in enumerate(values)}
        adds = [wanted.index(v) for v in known]

        def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            rest = iter(arrays)
            fixed = {v: next(rest) for v in values}
            cotangents = [next(rest) for _ in given]
            sums = [next(rest) for _ in known]
            fixed.update((v, next(rest)) for v in weights)

            def forward(active: list[jax.Array]) -> list[jax.Array]:
                env = {**fixed, **dict(zip(wanted, active, strict=True))}
                run_equations(step.equations, env)
                return [env[v] for v in given]

            _, transpose = jax.vjp(forward, [fixed[v] for v in wanted])
            (gradients,) = transpose(cotangents)
            for i, other in zip(adds, sums, strict=True):
                gradients[i] = gradients[i] + other
            return tuple(gradients)

        key = (
            "reverse",
            equations_key(step.equations, (*values, *weights), given),
            tuple(numbers[v] for v in wanted),
            tuple(adds),
        )
        moving = _avals((*values, *given, *known))
        program = self._program(key, run, moving, _avals(weights))
        return program, tuple(self._slot(v) for v in values), self._weight_slots(weights)


def _spent(instructions: Sequence[Instruction], kept: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """After each instruction: the slots that it reads or writes, but none after it, and that are not kept."""
    needed, spent = set(kept), []
    for _, reads, writes in reversed(instructions):
        here = {*reads, *writes} - needed
        spent.append(tuple(here))
        needed |= here
    return tuple(reversed(spent))


def _avals(values: Iterable[Value]) -> list[Any]:
    return [v.aval for v in values]


@functools.cache
def _lowered(
    shape: ConvShape, direction: Direction, platform: str
) -> tuple[Lowering, tuple[jax.ShapeDtypeStruct, ...]]:
    """The lowering of a convolution, and the shapes of its prepared kernel."""
    lowering = choose(shape, direction, platform, alone=True)
    kernel = jax.ShapeDtypeStruct(shape.kernel, shape.dtype)
    return lowering, jax.eval_shape(lambda k: lowering.prepare(shape, direction, k), kernel)


@functools.cache
def _outputs_of(observer: Any, *arrays: tuple[tuple[int, ...], Any]) -> int:
    return len(jax.eval_shape(observer, *(jax.ShapeDtypeStruct(*a) for a in arrays)))
