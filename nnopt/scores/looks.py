"""What scores look at when the engine runs a network.

There is one look, for Fisher potential, so the engine scores networks with residual blocks alone. Every other score, and every
other network, goes through `Scorer`, which runs whole networks; with `programs` it compiles hardly anything of each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core.dataflow import Equation, Reach, reach
from nnopt.core.flatten import Value
from nnopt.core.paths import path_text
from nnopt.errors import UnsupportedNetworkError
from nnopt.scores.chain import Observer, Probe
from nnopt.scores.fisher import FisherScore
from nnopt.scores.units import Unit
from nnopt.typing import Path


@dataclasses.dataclass(frozen=True)
class GateEnergy(Observer):
    """`mean_n (sum_ij a_nijc g_nijc)^2` as `(s, e)` with `s^2 e_c` the energy of channel `c` and `e` of order one."""

    needs_gradient: ClassVar[bool] = True

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`a` and `g`, `[batch, *positions, channels]` -> a number, and `[channels]`."""
        a, g = arrays
        gates = jnp.sum(a * g, axis=tuple(range(1, a.ndim - 1)))
        scale = jnp.max(jnp.abs(gates))
        safe = jnp.where(scale > 0, scale, jnp.ones_like(scale))
        return scale, jnp.mean((gates / safe) ** 2, axis=0)


@dataclasses.dataclass(frozen=True)
class LookForFisherPotential:
    """Fisher potential of each residual block, those of `probes.block_probes`; see `nnopt.scores.fisher`."""

    def probes(self, unit: Unit) -> list[Probe]:
        """See `engine.Look`."""
        flat = unit.flat
        reaches: dict[Value, Reach | None] = dict.fromkeys(unit.arrays, Reach())
        branches: dict[Path, Path] = {}
        for e in flat.equations:
            before = [reaches.get(a) if isinstance(a, Value) else None for a in e.inputs]
            inputs, outputs = (tuple(a.aval for a in atoms) for atoms in (e.inputs, e.outputs))
            equation = Equation(e.primitive.name, e.params, inputs, outputs, e.path, 1)
            after, addition = reach(equation, before)
            reaches.update(dict.fromkeys(e.outputs, after))
            # The network itself is no block, as it is none for `block_probes`. In a unit the root is the unit.
            if addition is not None and (addition.path or not unit.skeleton):
                branches[addition.path] = addition.branch
        probes = []
        for block, branch in branches.items():
            values = flat.left.get(branch, ())
            if len(values) != 1:
                raise UnsupportedNetworkError(
                    f"the probe {path_text(branch)!r} of a block is called {len(values)} times"
                )
            probes.append(Probe(block, values[0], GateEnergy()))
        return probes

    def result(self, observed: Mapping[str, Sequence[np.ndarray]], batch: int) -> FisherScore:
        """See `engine.Look`."""
        channels = {}
        for block, (scale, energy) in observed.items():
            mean_square = np.asarray(energy, np.float64) * float(scale) ** 2
            channels[block] = 0.5 * mean_square / batch**2
        blocks = {block: float(values.sum()) for block, values in channels.items()}
        return FisherScore(sum(blocks.values()), blocks, channels)
