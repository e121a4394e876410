"""How near Fisher potential in single precision is to double precision: block by block, for random networks of a search space.

python -m experiments.scores.precision

Both run in the engine, with the same weights, images and labels. Where rounding turns a ReLU on or off, a block moves by more
than rounding, the more the fewer images there are.

With --literal, the engine in double precision is held against whole networks in double precision, each compiled as one program, of
which the engine has cut and lowered nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.command import run
from nnopt.core import Example, sites
from nnopt.core.rewrite import rewrite_traced
from nnopt.networks import named
from nnopt.rewrites.block import block_for
from nnopt.scores.cut_out import Stand
from nnopt.scores.engine import Engine
from nnopt.scores.fisher import FisherPotential
from nnopt.scores.looks import LookForFisherPotential
from nnopt.scores.programs import ProgramCache
from nnopt.scores.sources import mean_cross_entropy
from nnopt.scores.units import Initialiser
from nnopt.search.sampler import BudgetSampler
from nnopt.search.space import block_space
from nnopt.search.workers import tune_process
from nnopt.typing import Path

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class PrecisionCommand:
    """Relative differences between single and double precision, of blocks and of networks."""

    network: str = "wrn-40-2"
    """Name of the network whose blocks are replaced."""
    budget: int = 400_000
    """Parameters of the candidates."""
    candidates: int = 200
    """Random candidates."""
    batch: int = 64
    """Images, random ones."""
    seed: int = 0
    """Of candidates, weights and images."""
    literal: int = 0
    """So many of the candidates are also scored as whole networks in double precision; each compiles for up to a minute."""

    def run(self) -> None:
        """Scores the candidates twice and prints quantiles."""
        tune_process()
        console = Console()
        net = named(self.network, 10)
        one = Example(jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
        space = block_space(net, one)
        sampler = BudgetSampler(space, self.budget, 0.025)
        traced = sites(net, one)
        modules = [
            [block_for(traced[path], traced, choice) for choice in choices]
            for path, choices in zip(space.paths, space.choices, strict=True)
        ]
        drawn = [
            {p: m[k] for p, m, k in zip(space.paths, modules, sampler.draw(self.seed, i), strict=True)}
            for i in range(self.candidates)
        ]  # fmt: skip
        key = jax.random.key(self.seed)
        images = np.asarray(jax.random.normal(key, (self.batch, 32, 32, 3), jnp.float32))
        labels = np.arange(self.batch, dtype=np.int32) % 10

        def scores(dtype: str) -> list[np.ndarray]:
            batch = jnp.asarray(images, dtype)
            engine = Engine(net, Example(batch, train=True), LookForFisherPotential(), loss=mean_cross_entropy)  # fmt: skip
            found = []
            for edits in track(drawn, dtype, console=console, disable=not console.is_terminal):
                value = engine.score(engine.candidate(edits), batch, labels, key)
                found.append(np.array(list(value.blocks.values()), np.float64))
            return found

        def literally(edits: Mapping[Path, nn.Module]) -> np.ndarray:
            batch = jnp.asarray(images, "float64")
            example = Example(batch, train=True)
            whole = rewrite_traced(sites(net, example), Stand(tuple(edits.items())))
            initialise = Initialiser(whole, example, ())
            leaves = initialise(key, ProgramCache(), ())
            variables = jax.tree.unflatten(jax.tree.structure(initialise.variables), leaves)
            options = {"xla_backend_optimization_level": 0}
            score = FisherPotential(whole, example, compiler_options=options)
            value = score(variables, batch, labels, jax.random.fold_in(key, 2))
            return np.array(list(value.blocks.values()), np.float64)

        single = scores("float32")
        with jax.enable_x64(True):
            double = scores("float64")
            whole = [literally(edits) for edits in drawn[: self.literal]]
        blocks = np.concatenate([abs(a / b - 1) for a, b in zip(single, double, strict=True)])
        totals = np.array([abs(a.sum() / b.sum() - 1) for a, b in zip(single, double, strict=True)])
        title = f"{self.candidates} candidates of {self.network} at {self.budget:,} parameters, {self.batch} images"
        table = Table(title=title, caption="|float32 / float64 - 1|")
        for name in (
            "",
            "number",
            *("all below" if q == 1 else f"{q:.0%} below" for q in QUANTILES),
            "above 1 %",
        ):
            table.add_column(name, justify="right" if name else "left")
        for name, errors in (("blocks", blocks), ("networks", totals)):
            cells = [f"{np.quantile(errors, q):.1e}" for q in QUANTILES]
            table.add_row(name, f"{len(errors):,}", *cells, str(int((errors > 1e-2).sum())))
        console.print(table)
        if whole:
            off = max(abs(a / b - 1).max() for a, b in zip(double, whole, strict=False))
            console.print(
                f"Engine and whole network, both in double precision: no block differs by more than {off:.1e}, "
                f"candidates {len(whole)}"
            )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(PrecisionCommand, "precision", __doc__, args)


if __name__ == "__main__":
    main()
