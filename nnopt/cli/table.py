"""`nnopt table`: latency tables, from which the latency of any candidate of a space is an addition."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from nnopt.cli.bars import Bars
from nnopt.cli.measure import at_least_one, check_file, one_core
from nnopt.errors import MeasurementError

if TYPE_CHECKING:
    from nnopt.search.table import Space


@dataclasses.dataclass(frozen=True)
class _Space:
    """Which space, and how it runs."""

    network: str = "wrn-40-2"
    """Base network of the space, such as wrn-40-2 or resnet-18, or the path of a network record."""
    backend: str = "xla"
    """xla or tvm."""
    choices: Literal["code", "paper"] = "code"
    """Block choices: the 23 of the released BlockSwap code, or the 21 of the paper."""
    batch: int = 1
    """Images in a call."""
    size: int = 32
    """Height and width of the images."""
    classes: int = 10
    """Classes of the data set."""
    threads: Literal["1", "all"] = "all"
    """Threads of the backend; with 1 the process is kept to one core, which is the most repeatable."""

    def space(self) -> "Space":
        """It, traced."""
        from nnopt.cli.networks import example_for, load_network
        from nnopt.rewrites import CODE_CHOICES, PAPER_CHOICES
        from nnopt.search.table import Space

        at_least_one(self, "batch", "classes")
        net = load_network(self.network, self.classes)
        example = example_for(net, self.size, self.batch)
        choices = CODE_CHOICES if self.choices == "code" else PAPER_CHOICES
        return Space(net, example, choices)


@dataclasses.dataclass(frozen=True)
class BuildCommand(_Space):
    """Measure every distinct part of a block space once, and a few whole networks for a fit.

    Parts are blocks (each choice at each shape of a position) and the layers outside of them. A killed build resumes with the same
    command; a set-up that differs (device, threads, versions) gets rows of its own.

    Example: nnopt table build --network wrn-16-1 --threads 1 --out wrn.sqlite
    """

    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE.sqlite")] = pathlib.Path(
        "latency.sqlite"
    )
    """The table; made if it is not there."""
    fit: int = 8
    """Networks to fit the line to that leads from sums of parts to latencies; 0 for none."""
    repeats: int = 11
    """Rounds for a part; twice as many for a network."""

    def run(self) -> None:
        """Measures and prints."""
        at_least_one(self, "repeats")
        if self.fit < 0:
            raise MeasurementError(f"--fit is {self.fit}; give 0 or more")
        check_file(self.out)
        with one_core(self.threads):
            self._run()

    def _run(self) -> None:
        from nnopt.backends import backend
        from nnopt.backends.table import LatencyTable
        from nnopt.reports.latency_table import parts_table
        from nnopt.search.table import Builder, Rounds

        made, space = backend(self.backend), self.space()
        rounds = Rounds(part=self.repeats, network=2 * self.repeats)
        console = Console()
        with LatencyTable(self.out, create=True) as table:
            with Bars(console) as bars:
                builder = Builder(space, made, table, rounds=rounds)
                builder.parts(bars)
                if self.fit:
                    builder.fit(bars, self.fit)
            console.print(parts_table(builder.times, 10))
        console.print(f"Table: {self.out}", soft_wrap=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class CheckCommand(_Space):
    """Measure random candidates of a space and hold them against what a table predicts.

    They have nothing to do with those of the fit, and are kept in the file. Reported are the median absolute error and the rank
    correlations, with bootstrap intervals. The set-up must be that of the table.

    Example: nnopt table check wrn.sqlite --network wrn-16-1 --threads 1 --samples 10
    """

    table: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.sqlite")
    ] = pathlib.Path("latency.sqlite")  # fmt: skip
    """The table."""
    samples: int = 50
    """Candidates to measure."""
    repeats: int = 21
    """Rounds for each."""

    def run(self) -> None:
        """Measures, compares and prints."""
        at_least_one(self, "repeats")
        if self.samples < 2:
            raise MeasurementError(f"--samples is {self.samples}; give 2 or more")
        with one_core(self.threads):
            self._run()

    def _run(self) -> None:
        from nnopt.backends import backend
        from nnopt.backends.table import LatencyTable
        from nnopt.reports.latency import setup_text
        from nnopt.reports.latency_table import accuracy_table, checked
        from nnopt.search.table import Builder, Rounds

        with LatencyTable(self.table) as table:
            made, space = backend(self.backend), self.space()
            console = Console()
            with Bars(console) as bars:
                rounds = Rounds(network=self.repeats)
                builder = Builder(space, made, table, rounds=rounds, must_exist=True)
                builder.parts(bars)
                builder.check(bars, self.samples)
            found = checked(builder.times)
            assert found is not None
            console.print(accuracy_table(builder.times, found))
            console.print(setup_text(builder.times.setup), highlight=False)


@dataclasses.dataclass(frozen=True)
class ShowCommand:
    """Print what a table holds: set-ups, slowest parts, the fit, and how well it predicts where that was checked.

    Example: nnopt table show wrn.sqlite
    """

    table: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.sqlite")]
    """The table."""
    top: int = 20
    """Parts to show."""

    def run(self) -> None:
        """Prints."""
        at_least_one(self, "top")
        from nnopt.backends.table import LatencyTable
        from nnopt.reports.latency_table import accuracy_table, checked, parts_table

        with LatencyTable(self.table) as table:
            setups = [times for times in table.setups() if times.parts()]
            if not setups:
                raise MeasurementError(
                    f"{self.table} is empty; fill it with `nnopt table build --out {self.table}`"
                )
            console = Console()
            for times in setups:
                console.print(parts_table(times, self.top))
                found = checked(times)
                if found is not None:
                    console.print(accuracy_table(times, found))


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Predict the latency of networks from a table, without running anything.

    Example: nnopt table predict wrn-16-1 slim.json --table wrn.sqlite
    """

    networks: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK|FILE ...")
    ]
    """Names of networks, or paths of network records: of the space that the table was built for."""
    table: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE.sqlite")] = pathlib.Path(
        "latency.sqlite"
    )
    """The table."""
    backend: str | None = None
    """xla or tvm, where the table has both."""
    batch: int = 1
    """Images in a call, as the table was built."""
    size: int = 32
    """Height and width of the images, as the table was built."""

    def run(self) -> None:
        """Adds up and prints."""
        at_least_one(self, "batch")
        if not self.networks:
            raise MeasurementError("there is nothing to predict; name a network, such as wrn-16-1")
        import jax
        import jax.numpy as jnp

        from nnopt.backends.prediction import Predictor
        from nnopt.backends.table import LatencyTable
        from nnopt.cli.networks import example_for, load_network
        from nnopt.core import Example
        from nnopt.search.parts import network_parts

        with LatencyTable(self.table) as table:
            predictor = Predictor.of(table.only(self.backend))
            image = jax.ShapeDtypeStruct((self.batch, self.size, self.size, 3), jnp.float32)
            lines = []
            for name in self.networks:
                net = load_network(name)
                example_for(net, self.size)
                parts = network_parts(net, Example(image))
                lines.append(f"{name}: {predictor([p.workload for p in parts]):.3g} ms")
        print("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class TableCommand:
    """Build, check, show and use latency tables: parts measured once, from which any candidate's latency is an addition."""

    command: Annotated[
        Annotated[BuildCommand, tyro.conf.subcommand("build")]
        | Annotated[CheckCommand, tyro.conf.subcommand("check")]
        | Annotated[ShowCommand, tyro.conf.subcommand("show")]
        | Annotated[PredictCommand, tyro.conf.subcommand("predict")],
        tyro.conf.OmitSubcommandPrefixes,
    ]

    def run(self) -> None:
        """Runs what was chosen."""
        self.command.run()
