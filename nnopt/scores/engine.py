"""The engine: scores a stream of networks that differ in their units, without compiling one of them as a whole.

A network is cut at *units* (its residual blocks, or any sites). What is left is the skeleton, with holes. Skeleton and units are
each a chain of small compiled programs (`scores.chain`) that equal pieces share, so after a few candidates of a space nothing is
traced or compiled any more: a candidate is a row of calls.

The other way to compile once is a supernet: one program in which a `lax.switch` chooses among all units at each position, by an
array that says which. Measured on two cores for the equal blocks of a stage of WRN-40-2 (`lax.scan` over the blocks, a reverse pass
written by hand), it ran 1.1 to 2.1 times as long as the chain, and with JAX's own derivative 7 times, so it was left.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core import (
    Example,
    ResidualBlocks,
    Selector,
    fingerprint,
    select,
    sites,
)
from nnopt.core.patch import Patch, Patched
from nnopt.core.paths import path_text
from nnopt.core.rewrite import rewrite_traced
from nnopt.errors import SelectionError, UnsupportedNetworkError
from nnopt.scores.cache import keep_compiled_programs
from nnopt.scores.chain import Chain, Flags, Hole, HoleReverse, Probe, Reverse
from nnopt.scores.cut_out import CutOut, Stand, units_of
from nnopt.scores.kept import KeptByKey
from nnopt.scores.minibatch import guarded
from nnopt.scores.programs import ProgramCache
from nnopt.scores.units import Initialiser, Unit, trace_unit
from nnopt.typing import Edits, Path

Result = TypeVar("Result", covariant=True)
KEYS_KEPT = 8
"""Of how many PRNG keys an engine keeps weights, unless it is told of more."""


class Look(Protocol[Result]):
    """What a score looks at, and what it makes of what was observed."""

    def probes(self, unit: Unit) -> list[Probe]:
        """Where to look in a unit, or in the skeleton. Labels are paths in it."""
        ...

    def result(self, observed: Mapping[str, Sequence[np.ndarray]], batch: int) -> Result:
        """The score, from what was observed at each probe, in the order of the network."""
        ...


@dataclasses.dataclass(frozen=True)
class EngineStatistics:
    """What an engine has done so far.

    Attributes:
        evaluations: networks run, once for each key.
        units: distinct units traced.
        skeletons: distinct skeletons traced.
        programs: distinct programs.
        compiled: programs compiled.
        compile_seconds: wall time of compiling them.
    """

    evaluations: int
    units: int
    skeletons: int
    programs: int
    compiled: int
    compile_seconds: float


class Plan:
    """A unit or skeleton: traced, cut, and what initialises it.

    Attributes:
        unit: what was traced.
        initialise: what initialises it.
        chain: what runs it.
    """

    def __init__(
        self, unit: Unit, initialise: Initialiser, cut: Callable[[Unit, int | None], Chain]
    ) -> None:
        self.unit = unit
        self.initialise = initialise
        self.chain = cut(unit, None)
        self._cut = cut
        self._lanes: dict[int, Chain] = {}

    def lanes(self, width: int | None) -> Chain:
        """What runs it for several candidates at once; see `scores.lanes`."""
        if width is None:
            return self.chain
        if width not in self._lanes:
            self._lanes[width] = self._cut(self.unit, width)
        return self._lanes[width]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A plan at a path. Equal units at several paths share a plan."""

    path: Path
    plan: Plan

    @property
    def chain(self) -> Chain:
        """What runs one candidate."""
        return self.plan.chain


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A network made ready to be run.

    Attributes:
        skeleton: what is left around the units.
        pieces: the units, in call order.
        activity: which values of the skeleton have cotangents: the arguments of `Chain.reverse`.
        keys: the same for each unit; None for a unit that has no reverse pass.
        reverse: the reverse pass of the skeleton.
        reverses: those of the units.
    """

    skeleton: Piece
    pieces: tuple[Piece, ...]
    activity: tuple[Flags, Flags, tuple[Flags, ...]]
    keys: tuple[tuple[Flags, Flags] | None, ...]
    reverse: Reverse
    reverses: tuple[Reverse | None, ...]

    @property
    def looked_at(self) -> list[str]:
        """What is observed, by the paths of the probes."""
        parts = *self.pieces, self.skeleton
        return [path_text((*p.path, *probe.path)) for p in parts for probe in p.chain.probes]


class Engine(Generic[Result]):
    """Scores networks that share a skeleton.

    Attributes:
        units: paths of the units, in call order.
        device: where it runs; JAX's default device if None.
        cache: its programs.
        kept: weights by key: of each piece, the number of weights that were bound, and those.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Any,
        look: Look[Result],
        *,
        loss: Callable[[jax.Array, jax.Array], jax.Array],
        where: Selector | str | None = None,
        device: Any = None,
        keep_programs: bool = True,
    ) -> None:
        """Cuts a network.

        Args:
            net: any linen network.
            example: an `Example` of the scored batch as the network takes it in training, `Example(images, train=True)`.
            look: which score.
            loss: `(outputs, labels) -> scalar`, a mean over the batch.
            where: the units; residual blocks by default.
            device: where to run; JAX's default device if None.
            keep_programs: turn on JAX's persistent compilation cache, for the whole process, if it is off; see `scores.cache`.

        Raises:
            SelectionError: `where` selects nothing, one unit inside another, or a site that cannot be cut out.
        """
        if keep_programs:
            keep_compiled_programs()
        self.device = device
        self._example = Example.of(example)
        self._look = look
        self._loss = loss
        self.cache = ProgramCache(device)
        self.kept = KeptByKey(KEYS_KEPT)
        self._platform = (device or jax.devices()[0]).platform
        self._sites = sites(net, self._example)
        self.units = units_of(select(self._sites, ResidualBlocks() if where is None else where))
        images = self._example.args[0]
        self._batch = images.shape[0]
        self._codes: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._calls = {
            path: Example(*self._sites[path].calls[0].args, **self._sites[path].calls[0].kwargs)
            for path in self.units
        }
        self._plans: dict[tuple[str, str | Path], Plan] = {}
        self._pieces: dict[tuple[Path, str], Piece] = {}
        self._evaluations = 0
        self._one = jax.device_put(jnp.ones((), images.dtype), device)

    @property
    def statistics(self) -> EngineStatistics:
        """What it has done so far."""
        done = self.cache.statistics
        skeletons = sum(not path for path, _ in self._pieces)
        return EngineStatistics(
            self._evaluations,
            len(self._plans),
            skeletons,
            done.programs,
            done.compiled,
            done.seconds,
        )

    # -- planning -----------------------------------------------------------------------------------------------------

    def candidate(self, edits: Mapping[Path, nn.Module] | None = None) -> Candidate:
        """Makes a network ready: the base network with these modules standing at these paths.

        Units that are new are traced and cut here; programs are compiled when they first run (or by `prepare`).

        Raises:
            SelectionError: nothing is left that the score looks at.
            UnsupportedNetworkError: the loss does not depend on a unit or probe, or the network cannot be run as a chain.
        """
        outside, inside = self._split(edits or {})
        skeleton = self._skeleton(outside)
        pieces = tuple(
            self._piece(path, inside.get(path, self._sites[path].module)) for path in self.units
        )
        if not any(piece.chain.probes for piece in (skeleton, *pieces)):
            raise SelectionError(
                f"{self._look} finds nothing to look at in {type(self._sites.net).__name__}, as edited; "
                "keep a residual block, or choose a score that needs none"
            )
        seen: dict[int, tuple[Flags, Flags]] = {}

        def fill(index: int, inputs: Flags) -> Flags:
            seen[index] = inputs, pieces[index].chain.active(inputs)
            return seen[index][1]

        still = (False,) * len(skeleton.plan.unit.arrays)
        skeleton.chain.active(still, fill)
        if len(seen) < len(pieces):
            lost = next(path for i, path in enumerate(self.units) if i not in seen)
            raise _blind(lost)
        outputs = tuple(seen[i][1] for i in range(len(pieces)))
        activity = still, (True,), outputs
        reverse = skeleton.chain.reverse(*activity)
        keys: list[tuple[Flags, Flags] | None] = [None] * len(pieces)
        for part in reverse.parts:
            if isinstance(part, HoleReverse):
                given = tuple(slot is not None for slot in part.cotangents)
                keys[part.index] = seen[part.index][0], given
        reverses = tuple(
            None if flags is None else piece.chain.reverse(*flags)
            for piece, flags in zip(pieces, keys, strict=True)
        )
        for piece, done in ((skeleton, reverse), *zip(pieces, reverses, strict=True)):
            missed = piece.chain.missed(done)
            if missed:
                raise _blind((*piece.path, *missed[0]))
        return Candidate(skeleton, pieces, activity, tuple(keys), reverse, reverses)

    def prepare(
        self,
        candidates: Iterable[Mapping[Path, nn.Module]],
        worker: int = 0,
        workers: int = 1,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Traces and compiles all that these candidates need, so that running them does neither.

        Args:
            candidates: edits of each.
            worker: number of this process among `workers` that prepare the same; each begins at another place, and finds what
                others have compiled in JAX's persistent cache.
            workers: how many there are.
            on_progress: told how many of how many programs are compiled.
        """
        seen: set[tuple[Path, int]] = set()
        for edits in candidates:
            places = {(path, id(module)) for path, module in edits.items()}
            if not places <= seen or not seen:
                seen |= places
                self.candidate(edits)
        programs = self.cache.pending()
        first = len(programs) * worker // workers
        for i, program in enumerate([*programs[first:], *programs[:first]]):
            program.compile()
            on_progress(i + 1, len(programs))

    def _split(self, edits: Mapping[Path, nn.Module]) -> tuple[Edits, dict[Path, nn.Module]]:
        """Edits of the skeleton, and the module of each unit that is edited."""
        outside: dict[Path, nn.Module] = {}
        inside: dict[Path, dict[Path, nn.Module]] = {}
        for path, module in edits.items():
            unit = next((u for u in self.units if path[: len(u)] == u), None)
            if unit is None:
                outside[path] = module
            else:
                inside.setdefault(unit, {})[path[len(unit) :]] = module
        modules = {}
        for unit, below in inside.items():
            base = below.pop((), self._sites[unit].module)
            modules[unit] = Patched(base, Patch(below), parent=None) if below else base
        return outside, modules

    def _piece(self, path: Path, module: nn.Module) -> Piece:
        code = self._code(module)
        if (path, code) not in self._pieces:
            call = self._calls[path]
            for key in ((code, repr(call)), (code, path)):
                if key in self._plans:
                    break
            else:
                initialise = Initialiser(module, call, path)
                unit = trace_unit(module, call, initialise.variables, path)
                alike = initialise.anywhere and not unit.random
                key = (code, repr(call)) if alike else (code, path)
                self._plans[key] = self._plan(unit, initialise)
            self._pieces[path, code] = Piece(path, self._plans[key])
        return self._pieces[path, code]

    def _skeleton(self, edits: Edits) -> Piece:
        code = Patch(edits).digest()
        if ((), code) not in self._pieces:
            edited = rewrite_traced(self._sites, Stand(tuple(edits.items()))) if edits else None
            found = self._sites if edited is None else sites(edited, self._example)
            skeleton = rewrite_traced(found, CutOut(self.units))

            def summed_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
                # The sum instead of the mean keeps cotangents of order one.
                return guarded(self._loss)(outputs, labels) * self._batch

            initialise = Initialiser(skeleton, self._example, ())
            unit = trace_unit(
                skeleton,
                self._example,
                initialise.variables,
                extra=(jax.ShapeDtypeStruct((self._batch,), jnp.int32),),
                finish=summed_loss,
            )
            self._pieces[(), code] = Piece((), self._plan(unit, initialise))
        return self._pieces[(), code]

    def _plan(self, unit: Unit, initialise: Initialiser) -> Plan:
        initialise.keep(unit.used())
        initialise.plan(self.cache)

        def cut(unit: Unit, lanes: int | None) -> Chain:
            probes = self._look.probes(unit)
            return Chain(
                unit.flat, unit.arrays, self.cache, probes, lanes=lanes, platform=self._platform
            )

        return Plan(unit, initialise, cut)

    def _code(self, module: nn.Module) -> str:
        """The fingerprint of a module; one that was seen before is known by its identity."""
        known = self._codes.get(id(module))
        if known is None or known[0]() is not module:
            identity = id(module)
            reference = weakref.ref(module, lambda _: self._codes.pop(identity, None))
            known = self._codes[identity] = (reference, fingerprint(module))
        return known[1]

    # -- running ------------------------------------------------------------------------------------------------------

    def run(
        self, candidate: Candidate, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> dict[str, list[jax.Array]]:
        """Runs a network forward and back; on an accelerator, returns before that is done.

        Args:
            candidate: from `candidate`.
            images: `[batch, height, width, channels]`, on the engine's device.
            labels: int32 `[batch]`, likewise.
            key: the weights are those of `net.init(key, ...)`. They are kept, and used again for the same key, until as many other
                keys as `kept` holds have been used since.

        Returns:
            What was observed at each probe.
        """
        self._evaluations += 1
        skeleton, pieces = candidate.skeleton, candidate.pieces
        code = code_of(key)
        env = self.weights(skeleton, key, code)
        envs = [self.weights(piece, key, code) for piece in pieces]
        for slot, array in zip(skeleton.chain.inputs, (images, labels), strict=True):
            env[slot] = array
        for part in skeleton.chain.forward:
            if isinstance(part, Hole):
                chain, inner = pieces[part.index].chain, envs[part.index]
                _move(env, part.inputs, inner, chain.inputs)
                back = candidate.reverses[part.index]
                run_instructions(chain.forward, inner, back.spent[0] if back is not None else ())
                _move(inner, chain.outputs, env, part.outputs)
            else:
                run_instructions((part,), env)
        env[skeleton.chain.cotangent_slot(0)] = self._one
        found: list[dict[str, list[jax.Array]]] = [{} for _ in pieces]
        for step in candidate.reverse.parts:
            if isinstance(step, HoleReverse):
                index = step.index
                chain, inner, reverse = pieces[index].chain, envs[index], candidate.reverses[index]
                assert reverse is not None
                slots = map(chain.cotangent_slot, range(len(step.cotangents)))
                _move(env, step.cotangents, inner, slots)
                run_instructions(reverse.parts, inner, reverse.spent[1])
                _move(inner, reverse.inputs, env, step.gradients)
                for source, target in zip(chain.inputs, step.gradients, strict=True):
                    if (
                        target is not None and env[target] is None
                    ):  # active, but the loss does not see it
                        env[target] = jnp.zeros_like(inner[source])
                found[index] = _observed(pieces[index], inner, reverse)
                inner.clear()  # lets its arrays go: the next unit's reverse pass takes their place
            else:
                run_instructions((step,), env)
        for index, reverse in enumerate(candidate.reverses):
            if reverse is None:
                found[index] = _observed(pieces[index], envs[index], None)
        own = _observed(skeleton, env, candidate.reverse)
        return {label: arrays for part in [*found, own] for label, arrays in part.items()}

    def score(
        self,
        candidate: Candidate,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
    ) -> Result:
        """`run`, and the score of what was observed."""
        return self.result(self.run(candidate, images, labels, key))

    def result(self, observed: Mapping[str, Sequence[Any]]) -> Result:
        """The score of what was observed; waits for it."""
        return self._look.result(jax.device_get(dict(observed)), self._batch)

    def weights(
        self, piece: Piece, key: jax.Array, code: bytes, lanes: int | None = None
    ) -> list[Any]:
        """A fresh `env` of a piece with its weights in place: made once for a key, and kept while the key is in use.

        Args:
            piece: the piece.
            key: PRNG key of the network's weights.
            code: `code_of(key)`.
            lanes: how many candidates at once.
        """
        chain = piece.plan.lanes(lanes)
        kept = self.kept.of(code)
        count, bound = kept.get((piece, lanes), (-1, []))
        if count != chain.weights:
            unit = piece.plan.unit
            values = [unit.variables[i] for i in unit.used()]
            leaves = piece.plan.initialise(key, self.cache, piece.path)
            weights = dict(zip(values, leaves, strict=True))
            weights[unit.key] = jax.random.fold_in(key, 2)
            bound = chain.bind(weights)
            kept[piece, lanes] = chain.weights, bound
        return chain.grown(bound)


def _blind(path: Path) -> UnsupportedNetworkError:
    return UnsupportedNetworkError(
        f"the loss does not depend on {path_text(path)!r}, so there is nothing to score there; "
        "select other units, or mend the network"
    )


def _observed(piece: Piece, env: list[Any], reverse: Reverse | None) -> dict[str, list[jax.Array]]:
    """What was observed in a piece, by the paths of its probes."""
    done = reverse.observed if reverse is not None else ()
    return {
        path_text((*piece.path, *piece.chain.probes[i].path)): [env[slot] for slot in slots]
        for i, slots in sorted([*piece.chain.observed, *done])
    }


def code_of(key: jax.Array) -> bytes:
    """What a PRNG key is known by."""
    return np.asarray(jax.random.key_data(key)).tobytes()


def run_instructions(
    instructions: Iterable[Any], env: list[Any], spent: Sequence[Sequence[int]] = ()
) -> None:
    """Runs programs on slots of an `env`, in order.

    Args:
        instructions: the programs, with the slots that they read and write.
        env: arrays.
        spent: for each instruction the slots to let go after it; none by default.
    """
    for (program, reads, writes), last in zip(
        instructions, itertools.chain(spent, itertools.repeat(())), strict=False
    ):
        results = program.run(*[env[i] for i in reads])
        for slot, result in zip(writes, results, strict=True):
            env[slot] = result
        for slot in last:
            env[slot] = None


def _move(
    source: list[Any], reads: Iterable[int | None], target: list[Any], writes: Iterable[int | None]
) -> None:
    for read, write in zip(reads, writes, strict=True):
        if read is not None and write is not None:
            target[write] = source[read]
