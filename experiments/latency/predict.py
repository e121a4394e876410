"""Latency of BlockSwap candidates predicted from a table, against measured ones, on each backend; one core, one image a call.

python -m experiments.latency.predict            # 8 minutes for each backend on one core: compiling takes most of it
python -m experiments.latency.predict --network wrn-10-1 --size 8 --samples 6 --fit 4      # a trial, 2 minutes

For each backend: every distinct part of the WRN-40-2 space is measured (113: each of the 23 choices at each shape of a position,
the base network's own blocks, the stem, the head), then 8 networks for a line from sums of parts to latencies, then 50 random
candidates that the line has not seen. Writes `predicted.csv`, `predicted.png` and the tables themselves to a folder; killed, it
resumes. Run it on a machine that does nothing else: XLA hands work to threads of its own, and waits for them where others compete
for the core.

What is asked of it: a median error of at most 15 % and a rank correlation of at least 0.9 on each backend. On one core of an AMD
EPYC (Zen 5), jax 0.10.2 and TVM 0.27:

    tvm  error 0.6 % [0.4, 0.9]    Spearman 0.998 [0.991, 0.999]    latency = 1.03 x sum of parts
    xla  error 2.7 % [2.0, 3.5]    Spearman 0.957 [0.897, 0.982]    latency = 1.53 x sum of parts - 0.33 ms

XLA's networks suffer from whatever else runs: with another program on the core's other thread the rank correlation was 0.81.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.command import run
from nnopt.backends import backend, pinned
from nnopt.backends.prediction import pairs
from nnopt.backends.table import LatencyTable, SetupTimes
from nnopt.cli.bars import Bars
from nnopt.core import Example
from nnopt.core.files import write_whole
from nnopt.reports.latency import setup_text
from nnopt.reports.latency_table import accuracy_table, checked, parts_table
from nnopt.search.blockswap import network_named
from nnopt.search.folders import writing_to
from nnopt.search.table import Builder, Space

_COLOURS = {"xla": "#355070", "tvm": "#b5651d"}


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Build latency tables and hold random candidates against them."""

    network: str = "wrn-40-2"
    """Base network of the space."""
    backends: tuple[str, ...] = ("xla", "tvm")
    """Backends, one after the other."""
    samples: int = 50
    """Random candidates to measure."""
    fit: int = 8
    """Networks that the line is fitted to."""
    size: int = 32
    """Height and width of the images."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path("results/latency")
    """Result folder."""

    def run(self) -> None:
        """Measures, prints, draws."""
        console = Console()
        with writing_to(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        with pinned(1):
            image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), jnp.float32)
            space = Space(network_named(self.network, 10), Example(image))
            for name in self.backends:
                with LatencyTable(self.out / f"{name}.sqlite", create=True) as table:
                    times = self._measure(space, name, table, console)
                    found[name] = pairs(times, "check")
        with writing_to(self.out):
            write_csv(self.out / "predicted.csv", found)
            picture(found, self.network).savefig(self.out / "predicted.png", dpi=130)
        console.print(
            f"{self.out / 'predicted.csv'}, {self.out / 'predicted.png'}", highlight=False
        )

    def _measure(
        self, space: Space, name: str, table: LatencyTable, console: Console
    ) -> SetupTimes:
        with Bars(console) as bars:
            builder = Builder(space, backend(name), table)
            builder.parts(bars)
            builder.fit(bars, self.fit)
            builder.check(bars, self.samples)
        console.print(parts_table(builder.times, 8))
        accuracy = checked(builder.times)
        if accuracy is not None:
            console.print(accuracy_table(builder.times, accuracy))
        console.print(setup_text(builder.times.setup), highlight=False)
        return builder.times


def write_csv(path: pathlib.Path, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """One row for each candidate and backend."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["backend", "candidate", "predicted_ms", "measured_ms"])
    for name, (predicted, measured) in found.items():
        for i, (p, m) in enumerate(zip(predicted, measured, strict=True)):
            rows.writerow([name, i, f"{p:.5g}", f"{m:.5g}"])
    write_whole(path, text.getvalue())


def picture(found: dict[str, tuple[np.ndarray, np.ndarray]], network: str) -> Any:
    """Measured against predicted latency, a panel for each backend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(found), 4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, (predicted, measured)) in zip(panels, found.items(), strict=True):
        ends = [float(f((*predicted, *measured))) for f in (min, max)]
        axes.plot(ends, ends, "-", lw=0.8, color="#7a7a7a")
        axes.plot(predicted, measured, "o", ms=4, alpha=0.8, color=_COLOURS.get(name, "#0b6e4f"))
        axes.set_title(f"{network}, {name}")
        axes.set_xlabel("predicted, ms")
        axes.set_ylabel("measured, ms")
        axes.grid(alpha=0.25)
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(
        PredictCommand, "predict", __doc__, args, "the same command takes up where this one stopped"
    )


if __name__ == "__main__":
    main()
