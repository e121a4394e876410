"""`nnopt search`: a BlockSwap search from network to report."""

import dataclasses
import os
import pathlib
from typing import Annotated, Literal

import tyro
from rich.console import Console

from nnopt.cli.bars import Bars as _Bars
from nnopt.errors import BudgetError
from nnopt.search.budget import parse_budget


@dataclasses.dataclass(frozen=True)
class SearchCommand:
    """Find the best network within a parameter budget by replacing its blocks, guided by Fisher potential.

    Draws candidates inside the budget, scores them all on a few images without training, trains the best one, times it against the
    base network, and writes a report. A killed search resumes with the same command.

    Example: nnopt search --network wrn-16-2 --data digits --budget 200K --samples 50
    """

    budget: str
    """Parameters of the whole network: 250000, 400K or 1.6M."""
    network: str = "wrn-40-2"
    """Base network, such as wrn-40-2, wrn-16-1, resnet-18; an unknown name lists them all."""
    data: str = "digits"
    """Data set: digits (embedded), cifar10 or cifar100."""
    data_dir: str | None = None
    """Folder of the data set's files; NNOPT_DATA by default."""
    download: bool = False
    """Fetch CIFAR into that folder first, if it is not there."""
    validation: bool = False
    """Test on the last 10,000 training images of CIFAR, held out, instead of its test set."""
    samples: int = 1000
    """Candidates to score."""
    seed: int = 0
    """Seed of everything random; a search is determined by its options and this."""
    tolerance: float = 0.025
    """How far a candidate may be from the budget, as a fraction of it."""
    choices: Literal["code", "paper"] = "code"
    """Block choices: the 23 of the released BlockSwap code, or the 21 of the paper."""
    score_batch: int = 4
    """Images in a minibatch that scores. Scores compare only at equal batch."""
    score_seeds: int = 2
    """Minibatches, each with other weights. Two seeds of a small batch rank as well as one of a large batch; the paper takes
    one of 128 images."""
    epochs: int | None = None
    """Epochs to train the winner for; by default a short training, 8 on digits and 20 on CIFAR."""
    latency_table: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.sqlite")] = None
    """A table of `nnopt table build` for this network and image size: with --max-latency."""
    max_latency: float | None = None
    """Milliseconds of a call that a candidate may take by that table; slower ones are not scored."""
    latency_backend: str | None = None
    """Backend of the times, where the table has several."""
    workers: int | None = None
    """Processes that score; by default one for each core, or a single one if there are few candidates."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path("results/search")
    """Result folder. One search lives in one folder."""

    def run(self) -> None:
        """Runs the search and prints where the report is, and the table."""
        # Imported here so that --help and bad flags answer at once.
        from nnopt.data import canonical_name
        from nnopt.reports.blockswap import block_table, summary_table, write_report
        from nnopt.search.blockswap import BlockSwap
        from nnopt.search.latency_limit import LatencyLimit
        from nnopt.search.run import run
        from nnopt.training import BLOCKSWAP, QUICK

        data = canonical_name(self.data)
        recipe = QUICK if data == "digits" else dataclasses.replace(BLOCKSWAP, epochs=20)
        if self.epochs is not None:
            recipe = dataclasses.replace(recipe, epochs=self.epochs)
        limit = None
        if (self.latency_table is None) != (self.max_latency is None):
            raise BudgetError("--latency-table and --max-latency go together; give both or none")
        if self.latency_table is not None and self.max_latency is not None:
            limit = LatencyLimit.read(
                str(self.latency_table), self.max_latency, self.latency_backend
            )
        spec = BlockSwap(
            network=self.network,
            data=data,
            latency=limit,
            validation=self.validation,
            budget=parse_budget(self.budget),
            tolerance=self.tolerance,
            samples=self.samples,
            seed=self.seed,
            choices=self.choices,
            score_batch=self.score_batch,
            score_seeds=self.score_seeds,
            recipe=recipe,
        )
        if self.download:
            _download(data, self.data_dir)
        console = Console()
        with _Bars(console) as bars:
            result = run(spec, self.out, data_dir=self.data_dir, watcher=bars, workers=self.workers)
        page = write_report(result)
        console.print(summary_table(result))
        console.print(block_table(result))
        space = result.summary["space"]
        if limit is not None and "winner_predicted_ms" in space:
            console.print(
                f"Limit of {limit.max_ms:g} ms on {limit.backend}: {space['fraction_fast_enough']:.1%} of candidates within the "
                f"budget pass, the winner is predicted to take {space['winner_predicted_ms']:.3g} ms",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
        console.print(f"Report: {page}", soft_wrap=True)


def _download(data: str, folder: str | None) -> None:
    from nnopt.data import download_cifar
    from nnopt.errors import DataError

    folder = folder or os.environ.get("NNOPT_DATA")
    if not folder:
        raise DataError(
            "--download needs a folder to put the data set into: give --data-dir or set NNOPT_DATA"
        )
    download_cifar(data, folder)
