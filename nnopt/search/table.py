"""Latency tables of block spaces: built, fitted and checked.

Each distinct part of a space is compiled and timed once, a few whole networks are timed for the fit, and from then on the latency
of a candidate is an addition. What is in the file already is not measured again, so a killed build resumes.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.backends import (
    Backend,
    Compiled,
    Latency,
    Setup,
    compile_network,
    measure,
    stand_in_variables,
)
from nnopt.backends.prediction import Predictor
from nnopt.backends.table import LatencyTable, Role, SetupTimes, TimedNetwork, TimedPart
from nnopt.core import Example, fingerprint, sites
from nnopt.core.rewrite import rewrite_traced
from nnopt.rewrites import CODE_CHOICES, Choice
from nnopt.search.latency import Watcher
from nnopt.search.parts import COPIES, chained, compile_part, space_parts
from nnopt.search.space import block_space

FIT_NETWORKS = 8
"""Networks that the line is fitted to, by default."""
_CALM = 0.1
"""Distance of the quartiles, relative to the median, of a stretch in which nothing else ran."""
_PAUSE_SECONDS = 0.1
_SEEDS = {"fit": 0, "check": 1}


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How carefully to time.

    Attributes:
        part: rounds for a part.
        network: rounds for a whole network.
        tries: how often something is timed at most, where the machine is disturbed.
        clock: seconds, of any origin.
    """

    part: int = 11
    network: int = 21
    tries: int = 6
    clock: Callable[[], float] = time.perf_counter


class Space:
    """A block space with its parts, ready to be measured or predicted.

    Attributes:
        net: the network.
        example: what it is called with; a table is for this batch and image size.
        blocks: which choices may stand where.
        parts: what they are made of.
    """

    def __init__(
        self, net: nn.Module, example: Example, choices: Iterable[Choice] = CODE_CHOICES
    ) -> None:
        """Traces and counts.

        Raises:
            SelectionError: the network has no residual blocks.
        """
        self.net, self.example = net, example
        self.traced = sites(net, example)
        self.blocks = block_space(net, example, choices)
        self.parts = space_parts(self.blocks, self.traced)

    def build(self, indices: Sequence[int]) -> nn.Module:
        """A candidate as a network."""
        return rewrite_traced(self.traced, self.blocks.genotype(indices))

    def draw(self, seed: int, index: int) -> tuple[int, ...]:
        """One candidate, uniformly: the same for the same seed and index."""
        words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))).random_raw(
            len(self.blocks.choices)
        )
        return tuple(
            int(word) % len(here) for word, here in zip(words, self.blocks.choices, strict=True)
        )

    def workload(self, indices: Sequence[int]) -> str:
        """What a candidate is and is called with, for the table."""
        base = fingerprint(self.net)[:16]
        return f"{base} {','.join(self.blocks.names(indices))} {self.example}"


class Builder:
    """Measures what a table lacks.

    Attributes:
        space: what it is for.
        backend: what compiles.
        times: where rows go.
    """

    def __init__(
        self,
        space: Space,
        backend: Backend,
        table: LatencyTable,
        *,
        rounds: Rounds | None = None,
        must_exist: bool = False,
    ) -> None:
        """Compiles the reference, and thereby finds out the set-up.

        Args:
            space: what it is for.
            backend: what compiles.
            table: where rows go.
            rounds: how carefully to time.
            must_exist: the table must hold times of this set-up already.

        Raises:
            MeasurementError: it does not, or the file cannot be written.
            BackendError: the backend cannot compile.
        """
        self.space, self.backend = space, backend
        self._rounds = rounds or Rounds()
        reference = _small_network(backend)
        self._small = _Reference(reference)
        self._nothing = backend.compile(lambda x: x * 2.0, (jnp.ones(8),))
        setup = Setup.now(reference.device, reference.schedule)
        find = table.check_setup if must_exist else table.of
        self.times: SetupTimes = find(backend.name, setup)

    def parts(self, watcher: Watcher) -> int:
        """Measures every distinct part of the space that the table lacks, and says how many these were."""
        there = self.times.parts()
        wanted = self.space.parts.distinct
        missing = [part for part in wanted if part.workload not in there]
        watcher.phase("measuring parts", len(wanted), len(wanted) - len(missing))
        for part in missing:
            copies = COPIES if chained(part) else 1
            compiled = compile_part(part, self.backend, copies)
            latency, reference_ms = self._time(compiled, self._rounds.part, self._small)
            alone = (latency.median_ms - self._call_ms) / copies
            # What takes hardly longer than a call takes something.
            ms = max(alone, 0.01 * latency.median_ms)
            self.times.add_part(TimedPart(part.workload, part.label, ms, reference_ms))
            watcher.advance(part.label)
        return len(missing)

    def fit(self, watcher: Watcher, count: int = FIT_NETWORKS) -> int:
        """Measures the networks that the line is fitted to, and says how many were new.

        Half of them are random; the others have at each position the choice of one and the same rank, from fast to slow, so
        that the line is held at both ends.
        """
        extremes = count // 2
        ranks = [(i + 1) / (extremes + 1) for i in range(extremes)]
        spread = [self._of_rank(rank) for rank in ranks]
        return self._networks("fit", self._with_random("fit", spread, count), watcher)

    def check(self, watcher: Watcher, count: int) -> int:
        """Measures random candidates that have nothing to do with the fit, and says how many were new."""
        return self._networks("check", self._with_random("check", [], count), watcher)

    def _with_random(
        self, role: Role, candidates: Sequence[tuple[int, ...]], count: int
    ) -> list[tuple[int, ...]]:
        """Different candidates, so many if the space has them: those given, and random ones."""
        found = dict.fromkeys(candidates)
        for index in range(10 * count):
            if len(found) >= count:
                break
            found[self.space.draw(_SEEDS[role], index)] = None
        return list(found)

    def _networks(self, role: Role, candidates: Sequence[tuple[int, ...]], watcher: Watcher) -> int:
        there = self.times.networks(role)
        wanted = {self.space.workload(indices): indices for indices in candidates}
        missing = {name: indices for name, indices in wanted.items() if name not in there}
        what = {"fit": "measuring networks", "check": "checking networks"}[role]
        watcher.phase(what, len(wanted), len(wanted) - len(missing))
        for name, indices in missing.items():
            net = self.space.build(indices)
            variables = stand_in_variables(net, self.space.example)
            compiled = compile_network(net, variables, self.space.example, backend=self.backend)
            latency, reference_ms = self._time(compiled, self._rounds.network, self._large)
            parts = self.space.parts.of(indices)
            row = TimedNetwork(name, parts, latency.median_ms, reference_ms)
            self.times.add_network(role, row)
            watcher.advance(f"{latency.median_ms:.3g} ms")
        return len(missing)

    def _of_rank(self, rank: float) -> tuple[int, ...]:
        times = self.times.parts()
        picked = []
        for here in self.space.parts.choices:
            order = sorted(range(len(here)), key=lambda j: times[here[j].workload].ms)
            picked.append(order[min(len(order) - 1, int(rank * len(order)))])
        return tuple(picked)

    @functools.cached_property
    def _call_ms(self) -> float:
        """What calling alone takes."""
        return self._time(self._nothing, self._rounds.part, self._small)[0].median_ms

    @functools.cached_property
    def _large(self) -> "_Reference":
        """A candidate of the space: what else runs on the host takes memory bandwidth and cache from large networks above all."""
        net = self.space.build(self._of_rank(0.5))
        variables = stand_in_variables(net, self.space.example)
        return _Reference(compile_network(net, variables, self.space.example, backend=self.backend))

    def _time(
        self, compiled: Compiled, rounds: int, reference: "_Reference"
    ) -> tuple[Latency, float]:
        """Its latency, and that of the reference in the same rounds.

        One at a time: with many in one run each would find the caches full of the others, which is not how a network runs. A
        calm stretch is waited for: one in which quartiles are near each other and the reference is as fast as it has been
        before. Where none comes, the fastest of each counts.
        """
        both = {"it": compiled, "reference": reference.compiled}
        best, reference_ms = None, math.inf
        for attempt in range(self._rounds.tries):
            if attempt:
                time.sleep(_PAUSE_SECONDS * 2**attempt)
            times = measure(both, repeats=rounds, overhead_ms=0.0, clock=self._rounds.clock)
            it, beside = times["it"], times["reference"]
            if best is None or it.median_ms < best.median_ms:
                best = it
            reference_ms = min(reference_ms, beside.median_ms)
            reference.fastest_ms = min(reference.fastest_ms, beside.median_ms)
            spread = max((t.high_ms - t.low_ms) / max(t.median_ms, 1e-9) for t in (it, beside))
            if spread <= _CALM and beside.median_ms <= (1 + _CALM) * reference.fastest_ms:
                break
        assert best is not None
        return best, reference_ms


def predict(space: Space, times: SetupTimes, candidates: Iterable[Sequence[int]]) -> list[float]:
    """Latencies of candidates in milliseconds, from a table alone.

    Raises:
        MeasurementError: the table lacks a part of one of them.
    """
    predictor = Predictor.of(times)
    return [predictor(space.parts.of(indices)) for indices in candidates]


@dataclasses.dataclass
class _Reference:
    """Something that is timed beside others.

    Attributes:
        compiled: it.
        fastest_ms: what it took when the machine was least disturbed.
    """

    compiled: Compiled
    fastest_ms: float = math.inf


def _small_network(backend: Backend) -> Compiled:
    """A convolution of 9 million multiply-accumulates, which computes as networks do and stays in the nearest caches."""
    module = nn.Conv(32, (3, 3))
    example = Example(jax.ShapeDtypeStruct((1, 32, 32, 32), jnp.float32))
    variables = stand_in_variables(module, example)
    return compile_network(module, variables, example, backend=backend)
