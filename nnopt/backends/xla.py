"""Compile networks with XLA, for any platform that JAX runs on."""

import dataclasses
import importlib.metadata
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core import Example
from nnopt.typing import Variables


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A network compiled for one input shape, ready to be called and timed.

    Attributes:
        run: the executable: arrays of the example, in the order of `inputs`, -> what the network
            returns.
        inputs: the arrays it is called with unless others are given.
        compile_seconds: wall-clock time of tracing, lowering and compilation.
        device: where it runs, as JSON values: see `describe_device`.
    """

    run: Callable[..., Any]
    inputs: tuple[jax.Array, ...]
    compile_seconds: float
    device: dict[str, Any]

    def __call__(self, *arrays: Any) -> Any:
        """Runs once, on `inputs` if no arrays are given; the result may not be ready yet."""
        return self.run(*(arrays or self.inputs))


def compile_network(
    net: nn.Module, variables: Variables, example: Any, *, device: jax.Device | None = None
) -> Compiled:
    """Compiles a network's inference, with its weights as constants.

    A network is deployed with weights that no longer change, and XLA makes use of that: it packs
    kernels for the convolution at hand and folds what depends on weights alone. With weights as
    arguments that work is done again in each call, so nnopt never measures it that way.

    Args:
        net: any linen network, rewritten or not.
        variables: its variables; they are copied into the executable.
        example: an array of the network's input shape, or an `Example`. Whatever is no array in it is
            static, such as the mode: `Example(x, train=False)`.
        device: where to run; JAX's default device if None.

    Returns:
        The compiled network. Its inputs are drawn from a normal distribution with a fixed seed, so
        that two networks compiled for one example can be compared; integers and booleans are zeros.
    """
    example = Example.of(example)
    device = device or _default_device()
    leaves, tree = jax.tree.flatten((example.args, example.kwargs))
    is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    random = np.random.default_rng(0)
    inputs = tuple(
        jax.device_put(_values(spec, random), device)
        for spec, array in zip(leaves, is_array, strict=True)
        if array
    )
    constants = jax.device_put(variables, device)

    def infer(*arrays: jax.Array) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return net.apply(constants, *args, **kwargs)

    began = time.perf_counter()
    run = jax.jit(infer).lower(*inputs).compile()
    return Compiled(run, inputs, time.perf_counter() - began, describe_device(device))


def describe_device(device: jax.Device | None = None) -> dict[str, Any]:
    """What a latency depends on besides the network.

    Args:
        device: which one; JAX's default device if None.

    Returns:
        `platform` (`cpu`, `gpu`, `tpu`), `device_kind` (of a CPU, the processor's model where the
        system tells it), `cores` that this process may use, `jax` and `jaxlib` versions, and
        `load_average` of the host over the last minute, None where the system has none. Above
        `cores`, something else kept the host busy.
    """
    device = device or _default_device()
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "platform": device.platform,
        "device_kind": (device.platform == "cpu" and _processor()) or device.device_kind,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "load_average": load,
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


def _values(spec: jax.ShapeDtypeStruct, random: np.random.Generator) -> np.ndarray:
    if jnp.issubdtype(spec.dtype, jnp.inexact):
        return random.standard_normal(spec.shape).astype(spec.dtype)
    return np.zeros(spec.shape, spec.dtype)
