"""XLA, for any platform that JAX runs on."""

import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnopt.backends.compiled import Compiled
from nnopt.backends.setup import affinity, load_average


@dataclasses.dataclass(frozen=True)
class XlaBackend:
    """Compiles with XLA, ahead of time.

    Attributes:
        device: where to run; JAX's default device if None.
    """

    device: jax.Device | None = None

    @property
    def name(self) -> str:
        """See `Backend`."""
        return "xla"

    def describe(self) -> dict[str, Any]:
        """See `Backend`."""
        return describe_device(self.device)

    def compile(self, function: Callable[..., Any], inputs: Sequence[jax.Array]) -> Compiled:
        """See `Backend`."""
        arrays = jax.device_put(tuple(inputs), self.device or _default_device())
        began = time.perf_counter()
        run = jax.jit(function).lower(*arrays).compile()
        return Compiled(run, arrays, time.perf_counter() - began, self.describe())


def describe_device(device: jax.Device | None = None) -> dict[str, Any]:
    """What a latency depends on besides the network.

    Args:
        device: which one; JAX's default device if None.

    Returns:
        `platform` (`cpu`, `gpu`, `tpu`), `device_kind` (of a CPU, the processor's model where the
        system tells it), `cores` that this process may use and whether it is `pinned` to them,
        `threads` that a kernel may be spread over (None on an accelerator), `jax` and `jaxlib`
        versions, and `load_average` of the host over the last minute, None where the system has
        none. Above `cores`, something else kept the host busy.
    """
    device = device or _default_device()
    on = affinity()
    return {
        "platform": device.platform,
        "device_kind": (device.platform == "cpu" and _processor()) or device.device_kind,
        **on,
        "threads": on["cores"] if device.platform == "cpu" else None,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "load_average": load_average(),
    }


def _default_device() -> jax.Device:
    (device,) = jnp.zeros(()).devices()
    return device


def _processor() -> str | None:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)
