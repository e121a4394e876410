"""`nnopt prune`: a smaller network, by pruning or by scaling its skeleton down."""

import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from nnopt.cli.bars import Bars
from nnopt.search.budget import parse_budget

if TYPE_CHECKING:
    from nnopt.training import PruneRecipe, Recipe


@dataclasses.dataclass(frozen=True)
class PruneCommand:
    """Make a network smaller: remove channels and tune, or scale width, depth or inner widths down and train.

    Schemes: tune removes the least important channels one by one while the network trains on (prune-and-tune). scratch trains the
    shape that this leaves from random weights. width, depth and bottleneck train a smaller member of the family from scratch, and
    profile one with the inner widths of --profile times a factor. All end at --budget parameters, and are timed against the base
    network. The base is trained first where a scheme needs it and no --checkpoint is given. A killed run resumes with the same
    command.

    Example: nnopt prune --network wrn-16-1 --budget 100K --scheme tune --steps 5 --at-once 4

    Example: nnopt prune --network wrn-16-1 --budget 100K --scheme bottleneck --out results/bottleneck
    """

    budget: str
    """Parameters of the smaller network: 250000, 400K or 1.6M."""
    scheme: Literal["tune", "scratch", "width", "depth", "bottleneck", "profile"] = "tune"
    """How it becomes smaller."""
    network: str = "wrn-16-1"
    """Base network, such as wrn-40-2, resnet-18, or the path of a network record; an unknown name lists them all."""
    checkpoint: pathlib.Path | None = None
    """Folder of a checkpoint of the base network's trained variables, for schemes tune and scratch."""
    data: str = "digits"
    """Data set: digits (embedded), cifar10 or cifar100."""
    data_dir: str | None = None
    """Folder of the data set's files; NNOPT_DATA by default."""
    criterion: Literal["fisher", "taylor", "l1", "l2", "batch_norm", "random"] | None = None
    """Which channel goes: by default fisher, the one with the least Fisher information. Schemes tune and scratch, as all until
    --learning-rate."""
    steps: int | None = None
    """Minibatches between removals, by default 100."""
    at_once: int | None = None
    """Channels that go at a removal, by default 1."""
    only: Literal["inner", "all"] | None = None
    """Which channels may go: those inside residual blocks, by default, or any."""
    learning_rate: float | None = None
    """While pruning; by default 8e-4, the rate with which training ended."""
    keep: str | None = None
    """A module that scheme width leaves as wide as it is: stem, for wide residual networks."""
    profile: tuple[int, ...] = ()
    """Inner widths for scheme profile, such as pruning prints them."""
    epochs: int | None = None
    """Epochs of training from scratch; by default a short training, 8 on digits and 20 on CIFAR."""
    seed: int = 0
    """Seed of everything random."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path("results/prune")
    """Result folder. One job lives in one folder."""

    def run(self) -> None:
        """Makes the network and prints what it is worth."""
        # Imported here so that --help and bad flags answer at once.
        from nnopt.cli.networks import load_network
        from nnopt.data import load
        from nnopt.errors import PruneError, SearchError
        from nnopt.search.pruning import PruneJob, prune_network

        if not 0 <= self.seed < 2**32:
            raise SearchError(f"the seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        if self.epochs is not None and self.epochs < 1:
            raise PruneError(f"--epochs is {self.epochs}; give 1 or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise PruneError(f"--learning-rate is {self.learning_rate}; give a number above 0")
        self._check_all_are_read()
        budget = parse_budget(self.budget)
        dataset = load(self.data, self.data_dir)
        base = load_network(self.network, len(dataset.classes))
        recipe, pruning = self._recipes(dataset.name)
        job = PruneJob(
            self.scheme, budget, recipe, pruning, self.seed, self.keep, tuple(self.profile)
        )
        console = Console()
        with Bars(console) as bars:
            result = prune_network(job, base, dataset, self.out, bars, checkpoint=self.checkpoint)
        _print(console, result.summary, self.scheme)
        console.print(f"Everything: {result.folder}", soft_wrap=True)

    def _pruning(self) -> dict[str, Any]:
        """What is given of how channels are removed, by the names of `PruneRecipe`."""
        given = {name: getattr(self, name) for name in ("criterion", "steps", "at_once", "only")}
        return {name: value for name, value in given.items() if value is not None}

    def _check_all_are_read(self) -> None:
        """Refuses options that the scheme does not look at: whoever gives one believes that it does something."""
        from nnopt.errors import PruneError
        from nnopt.search.pruning import PRUNING

        if self.scheme in PRUNING:
            if self.scheme == "tune" and self.checkpoint is not None and self.epochs is not None:
                raise PruneError(
                    "--epochs is of training from scratch, and scheme tune only tunes what --checkpoint holds; leave one out"
                )
            return
        unread = [*self._pruning()]
        unread += [n for n in ("learning_rate", "checkpoint") if getattr(self, n) is not None]
        if unread:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
            raise PruneError(
                f"scheme {self.scheme} removes no channels of a trained network; leave out {flags}, or take scheme tune or scratch"
            )

    def _recipes(self, data: str) -> "tuple[Recipe, PruneRecipe | None]":
        from nnopt.data import Augmentation
        from nnopt.search.pruning import PRUNING
        from nnopt.training import QUICK, PruneRecipe, Recipe

        small = data == "digits"
        recipe = QUICK if small else Recipe(epochs=20)
        if self.epochs is not None:
            recipe = dataclasses.replace(recipe, epochs=self.epochs)
        if self.scheme not in PRUNING:
            return recipe, None
        augmentation = recipe.augmentation if small else Augmentation(pad_mode="constant")
        tuning = Recipe(
            epochs=1,
            batch=recipe.batch,
            learning_rate=8e-4 if self.learning_rate is None else self.learning_rate,
            schedule="constant",
            augmentation=augmentation,
        )
        return recipe, PruneRecipe(tuning, **self._pruning())


def _print(console: Console, summary: dict[str, Any], scheme: str) -> None:
    table = Table(title=f"{scheme}: {summary['split_note']}")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("smaller", justify="right")
    for name in ("parameters", "macs"):
        table.add_row(
            "MACs" if name == "macs" else name, f"{summary[f'base_{name}']:,}", f"{summary[name]:,}"
        )
    accuracy = summary.get("base_test_accuracy")
    table.add_row(
        "test accuracy",
        "" if accuracy is None else f"{accuracy:.2%}",
        f"{summary['test_accuracy']:.2%}",
    )
    for batch, row in summary["latency"].items():
        table.add_row(
            f"batch {batch}, ms", f"{row['base']['median_ms']:.2f}",
            f"{row['small']['median_ms']:.2f} ({row['speedup']['median']:.2f}x)",
        )  # fmt: skip
    console.print(table)
    widths = " ".join(map(str, summary["inner_widths"]))
    if widths:
        console.print(f"Inner widths: {widths}", soft_wrap=True)
