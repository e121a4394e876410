"""The set-up of a measurement: what a latency depends on besides the function. Latencies of different set-ups do not mix."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from nnopt.errors import MeasurementError

_THREADS = pathlib.Path("/proc/self/task")  # Linux


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a latency depends on besides the function that is timed.

    Attributes:
        device: what the backend's `describe` says, as JSON values, without the load: device, cores, threads, versions.
        schedule: how the function came by its loops, see `Compiled`.
        cold: caches are emptied before each call.
        load_average: of the host over the last minute. It tells how far to trust a figure; set-ups do not differ by it.
    """

    device: dict[str, Any]
    schedule: str
    cold: bool = False
    load_average: float | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def now(cls, device: dict[str, Any], schedule: str, *, cold: bool = False) -> "Setup":
        """The set-up of something compiled, as it runs now.

        Args:
            device: `Compiled.device`: cores may have been taken away since.
            schedule: `Compiled.schedule`.
            cold: caches are emptied before each call.
        """
        fixed = {name: value for name, value in device.items() if name != "load_average"}
        if "remote" in fixed:  # this process's cores and load are no part of it
            return cls(fixed, schedule, cold)
        return cls(fixed | affinity(), schedule, cold, load_average())

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal for equal set-ups."""
        same = [self.device, self.schedule, self.cold]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Setup":
        """The set-up that `to_json` described.

        Raises:
            ValueError: it is none.
        """
        try:
            made = cls(**values)
        except TypeError as error:
            raise ValueError(f"no set-up: {error}") from error
        if not isinstance(made.device, dict):
            raise ValueError("no set-up: its device is no object")
        return made


def difference(one: Setup, other: Setup, *, backends: bool = False) -> str | None:
    """In what two set-ups differ, in words; None if their latencies may be compared.

    Args:
        one: a set-up.
        other: another.
        backends: they may be of two backends, and of two schedules: whatever both describe must be the same.
    """
    parts: list[tuple[str, Any, Any]] = [("cold", one.cold, other.cold)]
    if not backends:
        parts.append(("schedule", one.schedule, other.schedule))
    for name in dict.fromkeys((*one.device, *other.device)):
        if backends and not (name in one.device and name in other.device):
            continue
        parts.append((name, one.device.get(name), other.device.get(name)))
    differing = [f"{name} is {a!r} and {b!r}" for name, a, b in parts if a != b]
    return ", ".join(differing) or None


def check_comparable(one: Setup | None, other: Setup | None) -> None:
    """Checks that a latency of one set-up says something about one of the other; backends and schedules may differ.

    Raises:
        MeasurementError: it does not.
    """
    if one is not None and other is not None:
        found = difference(one, other, backends=True)
        if found:
            raise MeasurementError(
                f"these latencies are of different set-ups ({found}); measure both in one run"
            )


def check_same(one: Setup | None, other: Setup | None) -> None:
    """Checks that latencies of both set-ups may be put together.

    Raises:
        MeasurementError: they may not.
    """
    if (one is None) != (other is None):
        raise MeasurementError("one of these latencies does not say its set-up; measure both again")
    if one is not None and other is not None:
        found = difference(one, other)
        if found:
            raise MeasurementError(
                f"these latencies are of different set-ups ({found}) and cannot be merged; measure all again in one"
            )


def affinity() -> dict[str, Any]:
    """`cores` that this process may use, and whether it is `pinned`: kept from using some that are there."""
    known = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    there = os.cpu_count() or 1
    cores = len(known(0)) if known else there
    return {"cores": cores, "pinned": cores < there}


def load_average() -> float | None:
    """Of the host over the last minute; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@contextlib.contextmanager
def pinned(cores: int | None) -> Iterator[None]:
    """Keeps this process, all of its threads, to so many cores for a while.

    Threads that a library starts meanwhile inherit it, so pin before JAX starts for a pool of threads of that size.

    Args:
        cores: how many, the last of those that it may use: the first serves most interrupts. None leaves everything as it is.

    Raises:
        MeasurementError: the system cannot, or there are not so many.
    """
    if cores is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise MeasurementError(
            "this system cannot pin a process to cores; measure with all of them"
        )
    allowed = os.sched_getaffinity(0)
    if not 1 <= cores <= len(allowed):
        raise MeasurementError(
            f"cannot pin to {cores} cores, this process may use {len(allowed)}; give 1 to {len(allowed)}"
        )
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    _pin({thread: set(sorted(allowed)[-cores:]) for thread in before})
    try:
        yield
    finally:
        _pin({thread: before.get(thread, allowed) for thread in _threads()})


def _threads() -> list[int]:
    """Those of this process; 0, the calling one, where the system does not list them."""
    return [int(path.name) for path in _THREADS.iterdir()] if _THREADS.is_dir() else [0]


def _pin(threads: dict[int, set[int]]) -> None:
    for thread, cores in threads.items():
        with contextlib.suppress(ProcessLookupError):  # it ended
            os.sched_setaffinity(thread, cores)
