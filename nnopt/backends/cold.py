"""Emptying caches between timed calls, as a network finds them that runs now and then."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LEAST_BYTES, _MOST_BYTES = 64 << 20, 1 << 30
_ACCELERATOR_BYTES = 256 << 20  # the largest second-level cache of a GPU is a few times smaller
_CACHES = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")  # Linux


def evictor(device: jax.Device | None = None) -> Callable[[], Any]:
    """Something to call that leaves nothing of a network in the caches of a device.

    It writes to a buffer of twice the last-level cache, 64 MiB at least. On a CPU the caches of the calling core and those that
    cores share are emptied, the private ones of other cores are not.

    Args:
        device: which; a CPU if None.
    """
    if device is not None and device.platform != "cpu":
        buffer = jax.device_put(jnp.zeros(_ACCELERATOR_BYTES // 4, jnp.float32), device)
        touch = jax.jit(lambda x: x + 1).lower(buffer).compile()
        return lambda: jax.block_until_ready(touch(buffer))
    bytes_there = np.zeros(min(max(_LEAST_BYTES, 2 * last_level_bytes()), _MOST_BYTES) // 8)

    def write() -> None:
        np.add(bytes_there, 1.0, out=bytes_there)

    return write


def last_level_bytes() -> int:
    """Size of the largest cache of the CPU; 0 where the system does not tell."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes.append(int(digits) * unit if digits.isdigit() else 0)
    return max(sizes)
