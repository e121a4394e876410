"""Networks timed against the one they come from, side by side."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.backends import compile_network, measure, speedup
from nnopt.core import Example, Site, fingerprint, sites
from nnopt.typing import Variables

BATCHES = (1, 32)


class Watcher(Protocol):
    """Is told how a job gets on."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A phase of `total` units begins, `done` of them finished earlier."""

    def advance(self, note: str = "") -> None:
        """One unit is done."""


def latency_against_base(
    networks: Mapping[str, tuple[nn.Module, Variables]], example: Example, watcher: Watcher
) -> dict[str, Any]:
    """Inference latency of two networks, for each of `BATCHES`.

    Args:
        networks: `base`, and another by any name, each with its variables.
        example: of one image.
        watcher: is told how it gets on.

    Returns:
        Batch size as text -> latencies by name, the speed-up of the other, the device; JSON values.
    """
    watcher.phase("measuring latency", len(BATCHES))
    (other,) = [name for name in networks if name != "base"]
    table: dict[str, Any] = {}
    for batch in BATCHES:
        image = jax.ShapeDtypeStruct((batch, *example.args[0].shape[1:]), jnp.float32)
        many = Example(image, *example.args[1:], **example.kwargs)
        compiled = {name: compile_network(*pair, many) for name, pair in networks.items()}
        times = measure(compiled)
        ratio = speedup(times["base"], times[other])
        table[str(batch)] = {
            **{name: dataclasses.asdict(t) for name, t in times.items()},
            "speedup": dataclasses.asdict(ratio),
            "device": compiled[other].device,
        }
        watcher.advance(f"batch {batch}: {ratio.median:.2f}x")
    return table


class SiteLatencies:
    """What a network takes, as the sum of what its linear layers take alone: a table that fills itself, for one device.

    A layer is measured the first time that its shape is asked for. Widths are rounded up to a grid, so that a pruning that tries a
    hundred shapes measures a few. Good for telling shapes apart, such as for the budget of `nnopt.rewrites.weakest`; not for
    what is fused or moved between layers.

    Attributes:
        table: layer, input and output widths -> milliseconds.
    """

    def __init__(self, *, grid: int = 8, repeats: int = 5) -> None:
        """An empty table.

        Args:
            grid: widths are rounded up to multiples of it.
            repeats: rounds of a measurement.
        """
        self._grid, self._repeats = grid, repeats
        self.table: dict[str, float] = {}

    def __call__(self, net: nn.Module, example: Any) -> float:
        """Milliseconds of a call of the network, by the table."""
        return sum(self._of(site) for site in sites(net, example) if _is_linear(site))

    def _of(self, site: Site) -> float:
        (inputs, *_), module = site.inputs, site.module
        groups = getattr(module, "feature_group_count", 1)
        step = self._grid * groups if 1 < groups < inputs.shape[-1] else self._grid
        taken, made = (-(-n // step) * step for n in (inputs.shape[-1], module.features))
        if groups == inputs.shape[-1] > 1:  # depthwise: groups follow
            module, made = module.clone(feature_group_count=taken), taken * (module.features // groups)  # fmt: skip
        module = module.clone(parent=None, name=None, features=made)
        example = Example(jax.ShapeDtypeStruct((*inputs.shape[:-1], taken), inputs.dtype))
        key = f"{fingerprint(module)[:16]} {example}"
        if key not in self.table:
            variables = module.lazy_init(jax.random.key(0), *example.args)
            compiled = compile_network(module, variables, example)
            self.table[key] = measure({"it": compiled}, repeats=self._repeats)["it"].median_ms
        return self.table[key]


def _is_linear(site: Site) -> bool:
    return isinstance(site.module, nn.Conv | nn.Dense) and isinstance(site.module.features, int)
