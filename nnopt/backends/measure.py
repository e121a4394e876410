"""Time what is compiled, side by side.

What is measured: the wall-clock time of one call, from the call to the moment its outputs are ready,
with the inputs already on the device and the weights inside the executable. Copying inputs in and
outputs out is no part of it; dispatching the call is, and `below_overhead` says where it matters.

Candidates take turns (A B A B ...), so that whatever slows the machine down for a while slows all of them,
and each round gives one paired ratio. Medians and quartiles are reported, for times on a shared
machine have a long upper tail.

Each latency carries its set-up (device, cores, threads, versions, warm or cold caches), and latencies of
different set-ups are neither compared nor merged.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.backends.cold import evictor
from nnopt.backends.compiled import Compiled
from nnopt.backends.setup import Setup, check_comparable, check_same, pinned
from nnopt.errors import MeasurementError

# A sample this long makes the clock's resolution and its own cost negligible.
_SAMPLE_SECONDS = 2e-3
_WARM_UP_SECONDS = 20e-3
_WARM_UP_CALLS = (3, 1000)  # at least, at most
_OVERHEAD_FACTOR = 20


@dataclasses.dataclass(frozen=True)
class Latency:
    """The time of one call.

    Attributes:
        median_ms: median over the rounds.
        low_ms: lower quartile.
        high_ms: upper quartile.
        samples_ms: `[rounds]`, in the order of measurement; each is the mean of `inner_calls` calls.
            Equal positions in two latencies of one measurement belong to one round.
        inner_calls: calls in a sample, each of which waits for its outputs.
        below_overhead: one call takes less than 20 times what calling takes, so that the figure says
            more about dispatch than about the network.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    samples_ms: tuple[float, ...]
    inner_calls: int
    below_overhead: bool
    setup: Setup | None = None


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How many times as fast something is; above 1 is faster.

    Attributes:
        median: median over the rounds of the ratio within a round.
        low: lower quartile.
        high: upper quartile.
    """

    median: float
    low: float
    high: float


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 50,
    min_seconds: float = 0.0,
    cold: bool = False,
    cores: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    overhead_ms: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    evict: Callable[[], Any] | None = None,
) -> dict[str, Latency]:
    """Times candidates in interleaved rounds.

    Each is first called until it is warm, then timed to see how many calls make a sample of 2 ms.
    A round then takes one sample of each, in the order given.

    Args:
        candidates: name -> something to call without arguments, such as what `compile_network` gives
            (which has its weights as constants; time nothing that takes them as arguments). JAX
            arrays that it returns are waited for.
        repeats: rounds, at least.
        min_seconds: more rounds, so that all of them together take about this long.
        cold: empty the caches before each timed call, which makes a sample one call. That is how a
            network runs that is called now and then; by default it is called again and again.
        cores: keep the process to so many cores meanwhile; as it is if None.
        on_progress: called after each round with the rounds done and the rounds in all.
        overhead_ms: what an empty call takes; that of a compiled JAX function if None.
        clock: seconds, of any origin.
        evict: what empties the caches; `nnopt.backends.cold.evictor` if None.

    Returns:
        A latency for each name.

    Raises:
        ValueError: no candidates, or not one round.
        MeasurementError: the process cannot be kept to so many cores.

    Example:
        >>> times = measure({"base": lambda: sum(range(9)), "other": lambda: 45}, repeats=3)
        >>> [len(t.samples_ms) for t in times.values()]
        [3, 3]
    """
    if not candidates or repeats < 1:
        raise ValueError(
            f"measure: {len(candidates)} candidates, {repeats} repeats; give at least one of both"
        )

    with pinned(cores):
        return _measure(
            candidates,
            rounds=(repeats, min_seconds),
            evict=(evict or evictor(_device(candidates))) if cold else None,
            on_progress=on_progress,
            overhead_ms=dispatch_ms(clock) if overhead_ms is None else overhead_ms,
            clock=clock,
        )


def _measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: tuple[int, float],
    evict: Callable[[], Any] | None,
    on_progress: Callable[[int, int], None] | None,
    overhead_ms: float,
    clock: Callable[[], float],
) -> dict[str, Latency]:
    def sample(call: Callable[[], Any], calls: int) -> float:
        if isinstance(call, Compiled) and call.timer is not None:
            return call.timer(calls, evict is not None)
        if evict is not None:  # and then there is one call in a sample
            evict()
        began = clock()
        for _ in range(calls):
            jax.block_until_ready(call())
        return (clock() - began) / calls

    once = {}
    for name, call in candidates.items():
        _warm_up(call, clock)
        once[name] = float(np.median([sample(call, 1) for _ in range(3)]))
    inner = {
        name: 1 if evict else max(1, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9)))
        for name, seconds in once.items()
    }
    repeats, min_seconds = rounds
    round_seconds = sum(inner[name] * once[name] for name in candidates)
    count = max(repeats, math.ceil(min_seconds / max(round_seconds, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(1, count + 1):
        for name, call in candidates.items():
            samples[name].append(1e3 * sample(call, inner[name]))
        if on_progress is not None:
            on_progress(done, count)
    return {
        name: _latency(samples[name], inner[name], overhead_ms, _setup(call, evict is not None))
        for name, call in candidates.items()
    }


def speedup(base: Latency, other: Latency) -> Speedup:
    """How many times as fast `other` is as `base`: the ratio of their times, round by round.

    The two may be of different backends or schedules.

    Raises:
        ValueError: the two were not measured together.
        MeasurementError: their set-ups differ: device, cores, threads, versions, warm or cold.
    """
    check_comparable(base.setup, other.setup)
    if len(base.samples_ms) != len(other.samples_ms):
        raise ValueError(
            f"speedup: {len(base.samples_ms)} rounds of one, {len(other.samples_ms)} of the other; "
            "measure both in one call"
        )
    low, median, high = _quartiles(np.asarray(base.samples_ms) / np.asarray(other.samples_ms))
    return Speedup(median, low, high)


def merged(latencies: Iterable[Latency]) -> Latency:
    """One latency of several of the same function, measured one after the other.

    Raises:
        MeasurementError: there are none, or their set-ups differ.
    """
    found = tuple(latencies)
    if not found:
        raise MeasurementError("no latencies to merge; measure at least one")
    for other in found[1:]:
        check_same(found[0].setup, other.setup)
    samples = tuple(sample for latency in found for sample in latency.samples_ms)
    low, median, high = _quartiles(np.asarray(samples))
    below = any(latency.below_overhead for latency in found)
    return Latency(low_ms=low, median_ms=median, high_ms=high, samples_ms=samples,
        inner_calls=found[0].inner_calls, below_overhead=below, setup=found[0].setup)  # fmt: skip


def dispatch_ms(clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of calling a compiled JAX function that does next to nothing, in milliseconds."""
    x = jnp.zeros(())
    run = jax.jit(lambda x: x + 1).lower(x).compile()
    times = []
    for _ in range(200):
        began = clock()
        jax.block_until_ready(run(x))
        times.append(clock() - began)
    return 1e3 * float(np.median(times))


def _warm_up(call: Callable[[], Any], clock: Callable[[], float]) -> None:
    """The first calls allocate memory, start threads and fill caches."""
    least, most = _WARM_UP_CALLS
    began = clock()
    for done in range(most):
        if done >= least and clock() - began >= _WARM_UP_SECONDS:
            return
        jax.block_until_ready(call())


def _device(candidates: Mapping[str, Callable[[], Any]]) -> jax.Device | None:
    """Where the first of them runs."""
    for call in candidates.values():
        if isinstance(call, Compiled):
            for array in call.inputs:
                return next(iter(array.devices()))
    return None


def _setup(call: Callable[[], Any], cold: bool) -> Setup | None:
    if not isinstance(call, Compiled):
        return None
    return Setup.now(call.device, call.schedule, cold=cold)


def _latency(samples: list[float], inner: int, overhead_ms: float, setup: Setup | None) -> Latency:
    low, median, high = _quartiles(np.asarray(samples))
    below = median < _OVERHEAD_FACTOR * overhead_ms
    return Latency(median, low, high, tuple(samples), inner, below, setup)


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(median), float(high)
