"""Error and throughput against parameters: pruning, and the alternatives to it, from one run.

python -m experiments.skeletons.compare --quick

Every scheme of `nnopt prune` makes networks of several sizes from one trained base network: prune-and-tune by Fisher information
and by L1 norms, the shapes these leave trained from scratch, and networks scaled down in depth, width or inner width. All are
then timed on every backend that is there, in one interleaved run on each. A killed run takes up where it stopped. Writes
`compare.csv` and `compare.png`.

`--quick` compares wide residual networks on the digits, in half an hour on two cores: enough to see every part at work, not to rank
the schemes. The full recipe (WRN-40-2 on CIFAR-10, 200 epochs each, one channel per 100 steps) is for a GPU and days.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments.command import run
from experiments.skeletons.families import Member, blocks_in_a_stage, check_counts
from experiments.skeletons.pictures import curves
from experiments.skeletons.throughput import Point, timed
from nnopt.cli.bars import Bars
from nnopt.cli.measure import chosen_backends
from nnopt.core import load_record
from nnopt.core.files import write_whole
from nnopt.data import Augmentation, load
from nnopt.errors import PruneError, SearchError
from nnopt.search.blockswap import network_named
from nnopt.search.folders import writing_to
from nnopt.search.pruning import PruneJob, prune_network
from nnopt.training import (
    CLOSER_LOOK_TUNING_WRN,
    CLOSER_LOOK_WRN,
    QUICK,
    PruneRecipe,
    Recipe,
    evaluate_test,
    save_checkpoint,
    train_in,
)

Points = dict[tuple[str, int], list[Point]]
"""Backend and batch -> every network, timed."""
# name -> scheme of `nnopt prune`, criterion of those that prune
SCHEMES: dict[str, tuple[Any, Any]] = {
    "depth": ("depth", None),
    "width": ("width", None),
    "bottleneck": ("bottleneck", None),
    "Fisher, tuned": ("tune", "fisher"),
    "L1, tuned": ("tune", "l1"),
    "Fisher, from scratch": ("scratch", "fisher"),
    "L1, from scratch": ("scratch", "l1"),
    "Fisher profile": ("profile", None),
}


@dataclasses.dataclass(frozen=True)
class CompareCommand:
    """Compare pruning with scaling down: error and throughput against parameters."""

    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """WRN-16-1 on the digits instead of WRN-40-2 on CIFAR-10."""
    network: str | None = None
    """Another base network of the same family, such as wrn-28-10."""
    fractions: tuple[float, ...] = (0.7, 0.45, 0.25)
    """Sizes, as fractions of the base network's parameters."""
    batches: tuple[int, ...] = (1, 32)
    """Images in a timed call."""
    data_dir: str | None = None
    """Folder of CIFAR-10; NNOPT_DATA by default."""
    backends: tuple[str, ...] = ()
    """xla, tvm; by default those that are installed."""
    seed: int = 0
    """Seed of everything random."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path("results/compare")
    """Result folder."""

    def run(self) -> None:
        """Makes the networks, times them, prints, draws."""
        self._check()
        backends = chosen_backends(self.backends)
        console = Console()
        dataset = load("digits") if self.quick else load("cifar10", self.data_dir)
        name = self.network or ("wrn-16-1" if self.quick else "wrn-40-2")
        base = network_named(name, len(dataset.classes))
        blocks_in_a_stage(base, dataset.image_shape)  # before the base is trained
        recipe, steps, at_once = CLOSER_LOOK_WRN, 100, 1
        tuning = dataclasses.replace(CLOSER_LOOK_TUNING_WRN, epochs=1)
        if self.quick:
            recipe, steps, at_once = QUICK, 10, 4
            plain = Augmentation(pad=2, pad_mode="constant", flip=False)
            tuning = Recipe(epochs=1, batch=QUICK.batch, learning_rate=2e-3, schedule="constant", augmentation=plain)  # fmt: skip
        with Bars(console) as bars:
            checkpoint, trained = self._base(base, dataset, recipe, bars)
            whole = sum(leaf.size for leaf in jax.tree.leaves(trained["params"]))
            profile: tuple[int, ...] = ()
            rows: list[tuple[str, Member, float]] = []
            for label, (scheme, criterion) in SCHEMES.items():
                for fraction in self.fractions:
                    pruning = criterion and PruneRecipe(tuning, criterion, steps, at_once)
                    job = PruneJob(
                        scheme, round(fraction * whole), recipe, pruning, self.seed,
                        "stem" if scheme == "width" else None, profile if scheme == "profile" else (),
                    )  # fmt: skip
                    place = self.out / f"{label.replace(', ', '-').replace(' ', '-')}-{fraction:g}"
                    console.print(f"{label}, {job.budget:,} parameters", highlight=False)
                    start = checkpoint if pruning else None
                    result = prune_network(job, base, dataset, place, bars, checkpoint=start)
                    if label == "Fisher, tuned" and fraction == self.fractions[len(self.fractions) // 2]:  # fmt: skip
                        profile = tuple(result.summary["inner_widths"])
                    net = load_record(place / "network.json")
                    member = Member(label, f"{fraction:g}", net)
                    rows.append((label, member, 1 - result.summary["test_accuracy"]))
            error = 1 - evaluate_test(base, trained, dataset)
            rows.insert(0, ("base", Member("base", "1", base), error))
            family = [member for _, member, _ in rows]
            points = {
                (made.name, batch): timed(family, batch, dataset.image_shape, 15, bars, made)
                for made in backends
                for batch in self.batches
            }
        errors = [error for *_, error in rows]
        with writing_to(self.out):
            self._write(errors, points)
            picture = figure(errors, points, f"{name}, {dataset.name}")
            picture.savefig(self.out / "compare.png", dpi=130)
        console.print(table(errors, points, dataset.split_note))
        console.print(f"{self.out / 'compare.csv'}, {self.out / 'compare.png'}", highlight=False)

    def _check(self) -> None:
        check_counts(batches=self.batches)
        if not self.fractions or not all(0 < f < 1 for f in self.fractions):
            given = " ".join(map(str, self.fractions)) or "empty"
            raise PruneError(f"--fractions is {given}; give numbers between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise SearchError(f"the seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")

    def _base(
        self, base: Any, dataset: Any, recipe: Recipe, bars: Bars
    ) -> tuple[pathlib.Path, Any]:
        folder = self.out / "base"
        shape = jax.ShapeDtypeStruct((1, *dataset.image_shape), jax.numpy.float32)
        fresh = base.lazy_init(jax.random.key(self.seed), shape)
        variables, _ = train_in(
            folder / "training", base, fresh, dataset, recipe, jax.random.key(self.seed + 1),
            on_start=lambda done, total: bars.phase("training the base", total, done),
            on_epoch=lambda row: bars.advance(f"test accuracy {row.test_accuracy:.1%}"),
        )  # fmt: skip
        save_checkpoint(folder / "variables", base, variables)
        return folder / "variables", variables

    def _write(self, errors: Sequence[float], points: Points) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        batches = list(dict.fromkeys(batch for _, batch in points))
        speeds = [f"images_per_second_batch_{b}" for b in batches]
        writer.writerow(["backend", "scheme", "fraction", "parameters", "macs", "test_error", *speeds])  # fmt: skip
        for backend in dict.fromkeys(name for name, _ in points):
            for i, error in enumerate(errors):
                here = [points[backend, b][i] for b in batches]
                first = here[0]
                writer.writerow([
                    backend, first.scheme, first.detail, first.parameters, first.macs, f"{error:.4f}",
                    *(f"{p.throughput:.1f}" for p in here),
                ])  # fmt: skip
        write_whole(self.out / "compare.csv", text.getvalue())


def table(errors: Sequence[float], points: Points, note: str) -> Table:
    """Every network: parameters, error, throughput relative to the base."""
    found = Table(title=note)
    found.add_column("scheme")
    found.add_column("parameters", justify="right")
    found.add_column("error", justify="right")
    for backend, batch in points:
        found.add_column(f"x base, {backend}, batch {batch}", justify="right")
    for i, error in enumerate(errors):
        here = [p[i] for p in points.values()]
        ratios = [p[i].throughput / p[0].throughput for p in points.values()]
        found.add_row(here[0].scheme, f"{here[0].parameters:,}", f"{error:.2%}", *(f"{r:.2f}" for r in ratios))  # fmt: skip
    return found


def figure(errors: Sequence[float], points: Points, title: str) -> Any:
    """Error, and throughput for each backend and batch, against parameters."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(4.6 * (1 + len(points)), 4.2), layout="constrained")
    panels = {"test error, %": [100 * e for e in errors]}
    panels |= {f"images / s, {n}, batch {b}": [p.throughput for p in here] for (n, b), here in points.items()}  # fmt: skip
    first = next(iter(points.values()))
    for number, (label, values) in enumerate(panels.items()):
        axes = made.add_subplot(1, len(panels), number + 1)
        drawn = [(p.scheme, p.parameters, v) for p, v in zip(first, values, strict=True)]
        curves(axes, SCHEMES, drawn)
        axes.set_ylabel(label)
        if number == 0:
            axes.set_title(title, fontsize=10)
            axes.legend(fontsize=7)
    return made


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(
        CompareCommand, "compare", __doc__, args, "the same command takes up where this one stopped"
    )


if __name__ == "__main__":
    main()
