"""Contenders of a benchmark in processes of their own, which sleep while others have their turn.

Libraries that keep threads cannot be timed side by side in one process, and what one leaves behind (arenas, thread pools, spinning
threads) must not slow down the next.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

Scorer = Callable[[Sequence[Any]], list[float]]
"""Scores candidates."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a contender.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads of all its processes.
        scores: of the candidates, in no particular order.
        memory_mb: the most that one of its processes has held so far.
        others: share of all cores that was taken by something else.
    """

    seconds: float
    cpu_seconds: float
    scores: list[float]
    memory_mb: float
    others: float


class Processes:
    """A contender in processes of its own.

    Attributes:
        missing: why it is left out; None if it is not.
        cold_seconds: from starting the processes until each has a first score.
    """

    def __init__(
        self,
        make: Callable[[Any], Scorer],
        setting: Any,
        cores: Sequence[set[int]],
        first: Any,
    ) -> None:
        """Starts one process on each set of cores and waits until all are ready.

        Raises:
            RuntimeError: a process failed.
        """
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        self.missing: str | None = None
        began = time.perf_counter()
        for own in cores:
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, make, setting, own, first), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)
        replies = [pipe.recv() for pipe in self._pipes]
        self.cold_seconds = time.perf_counter() - began
        for kind, value in replies:
            if kind == "missing":
                self.missing = value
            elif kind == "failed":
                raise RuntimeError(value)

    def turn(self, candidates: Sequence[Any]) -> Turn:
        """Scores candidates, shared out among the processes.

        Raises:
            RuntimeError: a process failed.
        """
        busy, began = _busy_seconds(), time.perf_counter()
        for i, pipe in enumerate(self._pipes):
            pipe.send(candidates[i :: len(self._pipes)])
        replies = [pipe.recv() for pipe in self._pipes]
        seconds = time.perf_counter() - began
        busy = _busy_seconds() - busy
        for kind, value in replies:
            if kind == "failed":
                raise RuntimeError(value)
        done = [value for _, value in replies]
        own = sum(cpu for cpu, _, _ in done)
        return Turn(
            seconds,
            own,
            [s for _, scores, _ in done for s in scores],
            max(memory for _, _, memory in done),
            max(busy - own, 0.0) / (seconds * (os.cpu_count() or 1)),
        )

    def close(self) -> None:
        """Ends the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()


def _busy_seconds() -> float:
    """CPU time that all processes of the machine have taken, and what its host has taken from it."""
    user, nice, system, _, _, irq, softirq, steal, *_ = (
        int(v) for v in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _serve(
    pipe: Any,
    make: Callable[[Any], Scorer],
    setting: Any,
    cores: set[int],
    first: Any,
) -> None:
    """The life of one process."""
    try:
        # Before any library counts the cores to make its threads.
        os.sched_setaffinity(0, cores)
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        try:
            scorer = make(setting)
        except ImportError as e:
            pipe.send(("missing", str(e)))
            return
        scorer([first])
        pipe.send(("ready", None))
        while True:
            candidates = pipe.recv()
            began = time.process_time()
            scores = scorer(candidates)
            unit = 1e-3 if sys.platform != "darwin" else 1e-6  # kilobytes, bytes on macOS
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            pipe.send(("done", (time.process_time() - began, scores, memory)))
    except EOFError:  # closed: no more turns
        return
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
