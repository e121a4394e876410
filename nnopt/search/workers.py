"""Processes that share a stream of jobs: one for each core, or for each device.

Small programs run faster in several single-threaded processes than in one process with several threads. A worker is pinned to its
core before XLA starts, so XLA makes no more threads than fit; on an accelerator it sees one device. All share one cache of
compiled programs, and each begins to compile at another place, so together they compile everything about once.
"""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from nnopt.errors import SearchError

OnProgress = Callable[[int, int], None]
_CHUNK = 4
_POLL_SECONDS = 0.1


class Job(Protocol):
    """What workers do; picklable, and made ready once in each worker."""

    def start(self, worker: int, workers: int, on_progress: OnProgress) -> Callable[[int], Any]:
        """Makes ready in worker number `worker`.

        Args:
            worker: its number, from 0.
            workers: how many there are.
            on_progress: told how many of how many steps of making ready are done.

        Returns:
            What gives the result of a number.
        """
        ...


def cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def default_workers() -> int:
    """One for each core; one for each GPU; one on a TPU, which a single process owns."""
    import jax

    counts = {"cpu": len(cores()), "gpu": jax.local_device_count()}
    return counts.get(jax.default_backend(), 1)


def tune_process() -> None:
    """Makes this process one that runs thousands of small programs in turn.

    On a CPU, a program is over in microseconds: handing it to another thread takes as long. And scoring makes and drops arrays of
    megabytes all the time, which glibc hands back to the system and asks for again, page by page: a third of the time at a batch of
    128 images, a quarter at 4. It is told to keep what is freed; other allocators are left alone.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_TOP_PAD, 1 << 28)


def release_freed_memory() -> None:
    """Gives back to the system what this process has freed: gigabytes lie between what compiling many programs has left behind."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def map_in_processes(
    job: Job,
    numbers: Sequence[int],
    workers: int,
    on_progress: OnProgress = lambda done, total: None,
) -> Iterator[Any]:
    """The job's result for each number, in order, computed by several processes.

    Args:
        job: what to do.
        numbers: whose results are wanted.
        workers: how many processes.
        on_progress: told of the worker that is furthest in making ready, until the first result is there.

    Raises:
        SearchError: a worker died.
        Exception: what the job raised.
    """
    import jax

    places = cores() if jax.default_backend() == "cpu" else _visible_gpus()
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    steps = context.Array("i", 2)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, _begin, (job, workers, places, number, steps, os.getpid())
    )
    try:
        chunks = [numbers[i : i + _CHUNK] for i in range(0, len(numbers), _CHUNK)]
        futures = [pool.submit(_work, list(chunk)) for chunk in chunks]
        told = -1
        while futures and not futures[0].done():
            done, total = steps[:]
            if done > told and total:
                on_progress(done, total)
                told = done
            time.sleep(_POLL_SECONDS)
        for future in _in_turn(futures):
            yield from future.result()
    except BrokenProcessPool as e:
        raise SearchError(
            "a worker process died (its own message stands above); is there enough memory? Give fewer with --workers"
        ) from e
    finally:
        # Nothing is lost by ending them at once: what they had finished has been handed over.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _in_turn(items: list[Any]) -> Iterator[Any]:
    """The items in order, each let go before the next."""
    items.reverse()
    while items:
        yield items.pop()


def _visible_gpus() -> list[str]:
    import jax

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(d.local_hardware_id) for d in jax.local_devices()]


_run: Callable[[int], Any] | BaseException


def _begin(
    job: Job,
    workers: int,
    places: list[int] | list[str],
    next_number: Any,
    steps: Any,
    parent: int,
) -> None:
    """Runs once in each worker, before XLA starts."""
    global _run
    with next_number.get_lock():
        worker = next_number.value
        next_number.value += 1
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    place = places[worker % len(places)]
    if isinstance(place, str):
        os.environ["CUDA_VISIBLE_DEVICES"] = place
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {place})
    tune_process()

    def on_progress(done: int, total: int) -> None:
        with steps.get_lock():
            if done >= steps[0]:
                steps[:] = [done, total]

    try:
        _run = job.start(worker, workers, on_progress)
        release_freed_memory()
    except BaseException as e:  # raised where somebody waits for a result
        _run = e


def _work(numbers: list[int]) -> list[Any]:
    if isinstance(_run, BaseException):
        raise _run
    return [_run(number) for number in numbers]


def _leave_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, however that went."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
