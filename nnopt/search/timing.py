"""Networks and their layers timed on several backends in one interleaved run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from nnopt.backends import (
    Backend,
    Compiled,
    Latency,
    compile_network,
    measure,
    stand_in_variables,
)
from nnopt.core import Example, Site, fingerprint, sites
from nnopt.core.example import spec_text
from nnopt.costs import macs
from nnopt.search.latency import Watcher
from nnopt.search.parts import computing


@dataclasses.dataclass(frozen=True)
class TimedRun:
    """Something compiled by one backend, and timed.

    Attributes:
        name: of the network or the layer.
        backend: name of the backend.
        latency: of a call.
        compile_seconds: see `Compiled`.
        schedule: see `Compiled`.
        device: see `Compiled`.
    """

    name: str
    backend: str
    latency: Latency
    compile_seconds: float
    schedule: str
    device: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or matrix product as a network calls it, and how often it does.

    Attributes:
        name: what it is, for people.
        shapes: of what it takes and returns, for people.
        paths: where it stands.
        count: calls in one call of the network.
        macs: multiply-accumulates of one call.
        module: it.
        example: what it is called with.
    """

    name: str
    shapes: str
    paths: tuple[str, ...]
    count: int
    macs: int
    module: nn.Module
    example: Example


def time_all(
    modules: Mapping[str, tuple[nn.Module, Example]],
    backends: Sequence[Backend],
    watcher: Watcher,
    *,
    what: str,
    repeats: int,
    cold: bool = False,
) -> list[TimedRun]:
    """Compiles everything on every backend and times all of it side by side, with random weights as constants.

    Args:
        modules: by name, each with what it is called with.
        backends: to compile with.
        watcher: is told how it gets on.
        what: they are, for the watcher.
        repeats: rounds; each takes a sample of everything.
        cold: see `measure`.

    Returns:
        A row for each pair, all backends of a module before the next module.

    Raises:
        BackendError: a backend cannot compile one of them.
    """
    watcher.phase(f"compiling {what}", len(modules) * len(backends))
    compiled: dict[tuple[str, str], Compiled] = {}
    for name, (module, example) in modules.items():
        variables = stand_in_variables(module, example)
        for backend in backends:
            pair = (name, backend.name)
            compiled[pair] = compile_network(module, variables, example, backend=backend)
            watcher.advance(f"{name} {backend.name}")
    watcher.phase(f"measuring {what}", repeats)
    keys = {f"{name} {backend}": (name, backend) for name, backend in compiled}
    times = measure(
        {key: compiled[pair] for key, pair in keys.items()},
        repeats=repeats,
        cold=cold,
        on_progress=lambda *_: watcher.advance(),
    )
    return [
        TimedRun(*pair, times[key], c.compile_seconds, c.schedule, c.device)
        for key, pair in keys.items()
        for c in (compiled[pair],)
    ]


def layers(net: nn.Module, example: Example) -> list[Layer]:
    """The distinct convolutions and matrix products of a network, in the order of their first call.

    Layers of one configuration that are called with arrays of one shape are one row. What a network multiplies outside of any
    module is left out.
    """
    found: dict[str, Layer] = {}
    traced = sites(net, example)
    for path, total in computing(traced).items():
        site = traced[path]
        module = site.module.clone(parent=None, name=None)
        # A shared module that is called with several shapes is a layer for each.
        each: dict[str, list[Example]] = {}
        for call in site.calls:
            one = Example(*call.args, **call.kwargs)
            each.setdefault(str(one), []).append(one)
        alone = {text: macs(module, ones[0]) for text, ones in each.items()}
        counted = sum(alone[text] * len(ones) for text, ones in each.items())
        repeats = max(1, round(total / counted)) if counted else 1  # of what `nn.scan` repeats
        for text, ones in each.items():
            key = f"{fingerprint(module)} {text}"
            row = found.get(key)
            count, paths = len(ones) * repeats, ("/".join(path),)
            if row is None:
                shapes = f"{_shape(ones[0].args[0])} -> {_shape(site.outputs)}"
                found[key] = Layer(_name(site), shapes, paths, count, alone[text], module, ones[0])
            else:
                found[key] = dataclasses.replace(
                    row, count=row.count + count, paths=row.paths + paths
                )
    return list(found.values())


def _shape(spec: Any) -> str:
    if isinstance(spec, jax.ShapeDtypeStruct):
        return "x".join(map(str, spec.shape))
    return spec_text(spec)


def _name(site: Site) -> str:
    """Such as `conv 3x3 /2 g4`."""
    module = site.module
    window = getattr(module, "kernel_size", None)
    if window is None:
        return type(module).__name__.lower()
    window = (window,) if isinstance(window, int) else tuple(window)
    strides = getattr(module, "strides", None) or 1
    strides = (strides,) if isinstance(strides, int) else tuple(strides)
    groups = getattr(module, "feature_group_count", 1)
    name = f"{'conv' if 'Conv' in type(module).__name__ else type(module).__name__.lower()} {'x'.join(map(str, window))}"
    if math.prod(strides) > 1:
        name += f" /{'x'.join(map(str, dict.fromkeys(strides)))}"
    return f"{name} g{groups}" if groups > 1 else name
