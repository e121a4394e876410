"""What training-free scores are worth: their rank correlation with accuracy on NAS-Bench-201 and NAS-Bench-Macro.

python -m experiments.scores.ranking --quick
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.command import run
from experiments.scores import report
from experiments.scores.chosen import SCORES
from experiments.scores.correlation import spearman
from experiments.scores.nasbench201 import Cell, NASBench201
from experiments.scores.nasbench_macro import Layers, NASBenchMacro
from experiments.scores.scoring import Job, ResultFile, ScoredNetwork, score_all
from experiments.scores.tables import TrainedCell, TrainedLayers, nasbench201, nasbench_macro
from nnopt.search.workers import cores

QUICK_NETWORKS = {"nasbench201": 300, "nasbench_macro": 300}
"""Of each benchmark in quick mode: the first of a fixed random order, so that a full run goes on where a quick one ended."""

Row = TrainedCell | TrainedLayers


@dataclasses.dataclass(frozen=True)
class RankingCommand:
    """Rank correlation of training-free scores with accuracy on NAS-Bench-201 and NAS-Bench-Macro.

    Scores networks at initialisation on one minibatch of CIFAR-10, and sets the correlations beside the published ones. A killed
    run takes up where it stopped with the same command.
    """

    benchmark: Literal["nasbench201", "nasbench_macro", "both"] = "both"
    """Whose networks."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only 300 cells of NAS-Bench-201 and 300 networks of NAS-Bench-Macro instead of all 4,000 and 2,000 of the tables."""
    batch: int = 16
    """Images in the minibatch. Scores compare only at equal batch."""
    seed: int = 0
    """Seed of the minibatch and of the weights."""
    workers: int = dataclasses.field(default_factory=lambda: len(cores()))
    """Processes, each on a core of its own."""
    data_dir: str | None = None
    """Folder that holds cifar-10-batches-py/, nasbench201/ and nasbench_macro/; NNOPT_DATA by default."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path("results/scores")
    """Result folder."""

    def run(self) -> None:
        """Scores what has not been scored, then prints the tables and writes figures beside the scores."""
        # Tables are wide; a file has no width of its own.
        console = Console() if sys.stdout.isatty() else Console(width=140)
        if self.benchmark in ("nasbench201", "both"):
            cells = shuffled(nasbench201(self.data_dir))
            covering = (Cell(("nor_conv_1x1",) * 6), Cell(("nor_conv_3x3",) * 6))
            job = Job(
                "nasbench201", NASBench201, covering, SCORES, self.data_dir, self.batch, self.seed
            )
            self._report_nasbench201(console, *self._score(console, job, cells))
        if self.benchmark in ("nasbench_macro", "both"):
            layers = shuffled(nasbench_macro(self.data_dir))
            covering = tuple(Layers((choice,) * 8) for choice in range(3))
            job = Job(
                "nasbench_macro",
                NASBenchMacro,
                covering,
                SCORES,
                self.data_dir,
                self.batch,
                self.seed,
                grouped=True,
            )
            self._report_nasbench_macro(console, *self._score(console, job, layers))

    def _score(
        self, console: Console, job: Job, rows: Sequence[Any]
    ) -> tuple[list[Any], dict[str, np.ndarray]]:
        """The chosen rows of a benchmark, and the scores of each."""
        chosen = rows[: QUICK_NETWORKS[job.benchmark]] if self.quick else rows
        results = ResultFile(self.out, job)
        scored = results.rows()
        missing = {row.index: row.network for row in chosen if row.index not in scored}
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(job.benchmark, total=len(chosen))
            progress.update(task, completed=len(chosen) - len(missing))

            def on_row(row: ScoredNetwork) -> None:
                results.add(row)
                scored[row.index] = row
                progress.advance(task)
                state = progress.tasks[task]
                if not console.is_terminal and state.completed % 10 == 0:
                    left = f"{(state.time_remaining or 0) / 60:.0f} min left"
                    console.print(f"{job.benchmark}: {state.completed:.0f}/{len(chosen)}, {left}")

            if missing:
                score_all(job, missing, self.workers, on_row)
        values = {
            name: np.array([scored[row.index].scores[name] for row in chosen])
            for name in job.scores
        }
        return list(chosen), values

    def _report_nasbench201(
        self, console: Console, rows: Sequence[TrainedCell], scores: dict[str, np.ndarray]
    ) -> None:
        accuracies = np.array([row.accuracy for row in rows])
        with console.status("bootstrap"):
            rankings = report.rank(
                scores,
                accuracies,
                np.array([row.parameters_million for row in rows]),
                np.array([row.flops_million for row in rows]),
            )
        title = f"NAS-Bench-201, {len(rows):,} cells, batch {self.batch}: correlation with test accuracy"
        console.print(
            report.table(title, rankings, report.PUBLISHED_SPEARMAN, report.PUBLISHED_KENDALL)
        )
        console.print(
            report.search_table("A random search that picks by score", scores, accuracies)
        )
        for name in ("synflow", "naswot"):
            theirs = np.array([getattr(row, name) for row in rows])
            console.print(
                f"{name} as published for the same cells: Spearman {spearman(theirs, accuracies):+.3f} with accuracy, "
                f"{spearman(theirs, scores[name]):+.4f} with ours",
                highlight=False,
            )
        report.write_csv(self.out / "nasbench201_ranking.csv", rankings)
        picture = report.nasbench201_picture(rankings, len(rows))
        self._save(console, picture, "nasbench201.png")

    def _report_nasbench_macro(
        self, console: Console, rows: Sequence[TrainedLayers], scores: dict[str, np.ndarray]
    ) -> None:
        accuracies = np.array([row.accuracy for row in rows])
        with console.status("bootstrap"):
            rankings = report.rank(
                scores,
                accuracies,
                np.array([row.parameters for row in rows]),
                np.array([row.flops for row in rows]),
            )
        title = f"NAS-Bench-Macro, {len(rows):,} networks, batch {self.batch}: correlation with test accuracy"
        console.print(report.table(title, rankings))
        console.print(
            report.search_table("A random search that picks by score", scores, accuracies)
        )
        report.write_csv(self.out / "nasbench_macro_ranking.csv", rankings)
        picture = report.nasbench_macro_picture(rankings, len(rows))
        self._save(console, picture, "nasbench_macro.png")

    def _save(self, console: Console, picture: Any, name: str) -> None:
        path = self.out / name
        picture.savefig(path, dpi=130)
        console.print(f"picture: {path}", highlight=False)


def shuffled(rows: Sequence[Any]) -> list[Any]:
    """The rows in the random order in which they are scored, always the same."""
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i] for i in order]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(
        RankingCommand, "ranking", __doc__, args, "the same command takes up where this one stopped"
    )


if __name__ == "__main__":
    main()
