"""Distinct operators drawn at random, on one core: seconds for many of them.

    .venv/bin/python scripts/bench/sampling.py [--count 10000] [--repeats 3]

Programs of transformations of the 3x3 convolution of 64 to 64 channels at 32 x 32 are drawn until so many compute something that
none before does; canonical forms tell. Each repeat has a seed of its own. Processor seconds, which other programs on the machine
disturb less than wall time. The target is 10,000 in 10 seconds. Half a minute in all.
"""

import dataclasses
import os
import sys
import time

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time the drawing of distinct operators."""

    count: int = 10_000
    """Operators to draw."""
    channels: int = 64
    """Inputs and outputs of the convolution."""
    size: int = 32
    """Height and width of its image."""
    repeats: int = 3
    """Draws of so many, from different seeds."""

    def run(self) -> None:
        """Measures and prints."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
        from nnopt.nests import convolution
        from nnopt.nests.sample import distinct

        conv = convolution((self.size,) * 2, self.channels, self.channels, (3, 3))
        distinct(conv, 50, np.random.default_rng(self.repeats))  # what is cached at the first draw
        console = Console()
        table = Table(title=f"{self.count:,} distinct operators of {conv.input} to {conv.output}")
        for name in ("seed", "processor s", "wall s", "operators a second", "kinds of steps"):
            table.add_column(name, justify="right")
        for seed in range(self.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            found = distinct(conv, self.count, np.random.default_rng(seed))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            kinds = {type(step) for drawn in found for step in drawn.program.steps}
            table.add_row(
                str(seed), f"{cpu:.2f}", f"{wall:.2f}", f"{len(found) / cpu:,.0f}", str(len(kinds))
            )
        console.print(table)


if __name__ == "__main__":
    sys.exit(tyro.cli(Bench, description=__doc__).run())
