"""Memory of the scoring engine over thousands of candidates: resident set, programs and time, after each tenth of them.

    .venv/bin/python scripts/bench/scoring_memory.py [--candidates 10000] [--network wrn-16-2] [--budget 200K]

Once every unit of the space has been seen, neither programs nor memory grow: the table's last rows are alike. About four minutes on
one core as called above.
"""

import dataclasses
import gc
import os
import pathlib
import time

import tyro
from rich.console import Console
from rich.table import Table

from nnopt.search.blockswap import BlockSwap, Problem
from nnopt.search.budget import parse_budget


@dataclasses.dataclass(frozen=True)
class Bench:
    """Watch the memory of the scoring engine."""

    candidates: int = 10_000
    """How many networks to score."""
    network: str = "wrn-16-2"
    """Base network."""
    budget: str = "200K"
    """Parameters of a candidate."""
    data: str = "digits"
    """Data set of the minibatch."""
    score_batch: int = 4
    """Images in the minibatch."""

    def run(self) -> None:
        """Scores and prints a row for each tenth."""
        spec = BlockSwap(
            self.network,
            self.data,
            parse_budget(self.budget),
            samples=self.candidates,
            score_batch=self.score_batch,
            score_seeds=1,
        )
        problem = Problem(spec)
        table = Table(title=f"{self.network} at {self.budget}, batch {self.score_batch}, one seed")
        for name in ("candidates", "resident MiB", "programs", "compiled", "ms a candidate"):
            table.add_column(name, justify="right")
        console = Console(width=100)
        step = max(1, self.candidates // 10)
        start = time.perf_counter()
        for number, _ in enumerate(problem.score_each(range(self.candidates)), 1):
            if number % step:
                continue
            gc.collect()
            done = problem.scorer.statistics
            milliseconds = 1000 * (time.perf_counter() - start) / step
            console.print(f"{number} candidates, {resident_mib():.0f} MiB")
            table.add_row(
                str(number), f"{resident_mib():.0f}", str(done.programs), str(done.compiled),
                f"{milliseconds:.1f}",
            )  # fmt: skip
            start = time.perf_counter()
        console.print(table)


def resident_mib() -> float:
    """Memory of this process that is in RAM, in MiB (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    tyro.cli(Bench).run()
