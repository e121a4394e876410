"""The three published sequences on ResNet-34's layers, on both backends, beside what others published.

taskset -c 0 python -m experiments.operations.sequences

Sequences 1 to 3 of Turner et al. (Neural Architecture Search as Program Transformation Exploration, ASPLOS 2021) with the arguments
of an independent study of ten ResNet-34 layers on three devices: two parts of 2 and 4 groups; 16 outputs of all inputs and the rest
in two groups; two slabs. As there, the 1x1 convolutions of shortcuts are replaced by 3x3 sequences. Layers of 7 x 7 are measured
at 8 x 8 here: seven rows are no two slabs.

Each layer's convolution and sequences run on XLA and TVM in one interleaved run, one image, weights inside the executable; an
operator whose outputs differ between the two by more than 1e-4 of the largest ends the run. About 2 minutes on one core.

Writes `sequences.csv`, `sequences.png` and `sequences.txt`.
"""

import csv
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.command import run
from experiments.operations.report import write_csv
from nnopt.backends import backend, compile_network, describe_device, measure, speedup
from nnopt.cli.bars import Bars
from nnopt.core.files import write_whole
from nnopt.errors import BudgetError, DataError
from nnopt.nests import Program
from nnopt.nests.module import ProgramConv
from nnopt.nests.named import sequence1, sequence2, sequence3

LAYERS = {
    "conv 64, 56": (64, 64, 56, 3), "conv 64-128, 28": (64, 128, 28, 3), "conv 128, 28": (128, 128, 28, 3),
    "conv 128-256, 14": (128, 256, 14, 3), "conv 256, 14": (256, 256, 14, 3), "conv 256-512, 8": (256, 512, 8, 3),
    "conv 512, 8": (512, 512, 8, 3), "shortcut 64-128, 28": (64, 128, 28, 1), "shortcut 128-256, 14": (128, 256, 14, 1),
    "shortcut 256-512, 8": (256, 512, 8, 1),
}  # fmt: skip
"""Name -> inputs, outputs, height and width, window."""
SEQUENCES = ("Seq1", "Seq2", "Seq3")
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """One operator of one layer on one backend.

    Attributes:
        layer: its name.
        backend: its name.
        operator: `conv` or one of `SEQUENCES`.
        macs: of one image.
        ms: median latency.
        speedup: over the convolution on the same backend, median of the rounds' ratios.
        low: lower quartile of it.
        high: upper quartile of it.
    """

    layer: str
    backend: str
    operator: str
    macs: int
    ms: float
    speedup: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class SequencesCommand:
    """Published sequences on ResNet-34's layers, on XLA and TVM."""

    repeats: int = 25
    """Timed rounds."""
    layers: tuple[str, ...] = tuple(LAYERS)
    """Which of them."""
    data_dir: str | None = None
    """Folder with the published figures in `reference/`; NNOPT_DATA by default. They are left out where there is none."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path(
        "results/sequences"
    )
    """Result folder."""

    def run(self) -> None:
        """Measures, writes and prints."""
        if self.repeats < 1:
            raise BudgetError(f"--repeats {self.repeats} is below 1")
        if not self.layers:
            raise BudgetError("--layers is empty; name one, or leave it out for all")
        if unknown := [name for name in self.layers if name not in LAYERS]:
            raise BudgetError(f"no layer is called {unknown[0]!r}; there are {', '.join(LAYERS)}")
        console = Console() if sys.stdout.isatty() else Console(width=110)
        backends = {name: backend(name) for name in ("xla", "tvm")}
        rows: list[Row] = []
        with Bars(console) as bars:
            bars.phase("layers", len(self.layers))
            for name in self.layers:
                rows += measured(name, backends, self.repeats)
                bars.advance(name)
        published = _published(self.data_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        write_csv(self.out / "sequences.csv", rows)
        picture(rows, published).savefig(self.out / "sequences.png", dpi=130)
        text = Console(width=110, file=io.StringIO(), force_terminal=False)
        device = describe_device()
        for place in (text, console):
            place.print(table(rows, published))
            place.print(f"here: {device['device_kind']}, {device['cores']} cores", highlight=False)
        write_whole(self.out / "sequences.txt", text.file.getvalue())  # type: ignore[attr-defined]


def operators(inputs: int, outputs: int, size: int, window: int) -> dict[str, nn.Module]:
    """The convolution and the sequences in its place."""
    fields: dict[str, Any] = {"features": outputs, "use_bias": False}
    programs: dict[str, Program] = {
        "Seq1": sequence1(outputs, (2, 4)),
        "Seq2": sequence2(inputs, 16, 2),
        "Seq3": sequence3(2),
    }
    made: dict[str, nn.Module] = {"conv": nn.Conv(kernel_size=(window,) * 2, **fields)}
    return made | {
        name: ProgramConv(kernel_size=(3, 3), program=program, **fields)
        for name, program in programs.items()
    }


def measured(name: str, backends: Any, repeats: int) -> list[Row]:
    """All operators of a layer on all backends, in one interleaved run.

    Raises:
        DataError: backends disagree about an operator.
    """
    inputs, outputs, size, window = LAYERS[name]
    image = jax.ShapeDtypeStruct((1, size, size, inputs), jnp.float32)
    compiled, weights = {}, {}
    for operator, module in operators(inputs, outputs, size, window).items():
        variables = module.lazy_init(jax.random.key(0), image)
        weights[operator] = sum(a.size for a in jax.tree.leaves(variables))
        results = []
        for where, place in backends.items():
            compiled[where, operator] = compile_network(module, variables, image, backend=place)
            results.append(np.asarray(compiled[where, operator].outputs()))
        worst = max(np.abs(r - results[0]).max() for r in results) / np.abs(results[0]).max()
        if worst > TOLERANCE:
            raise DataError(f"{operator} of {name}: outputs differ by {worst:.1e} between backends")
    times = measure({f"{b} {o}": c for (b, o), c in compiled.items()}, repeats=repeats)
    rows = []
    for where, operator in compiled:
        time = times[f"{where} {operator}"]
        over = speedup(times[f"{where} conv"], time)
        # Every slab has weights of its own for half of the rows.
        places = size * size // (2 if operator == "Seq3" else 1)
        macs = weights[operator] * places
        rows.append(
            Row(name, where, operator, macs, time.median_ms, over.median, over.low, over.high)
        )
    return rows


def _published(data_dir: str | None) -> dict[str, dict[str, list[float]]]:
    """Platform -> sequence -> speed-ups of ten layers."""
    folder = data_dir or os.environ.get("NNOPT_DATA")
    if not folder:
        return {}
    path = pathlib.Path(folder) / "reference" / "sequence_operator_latency_resnet34_layers.csv"
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give another --data-dir") from error
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        here = found.setdefault(f"{row['platform']}, {row['backend']}", {s: [] for s in SEQUENCES})
        for s in SEQUENCES:
            here[s].append(float(row[f"{s.lower()}_speedup"]))
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def speedups(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Backend -> sequence -> speed-ups of the layers."""
    return {
        where: {s: [r.speedup for r in rows if (r.backend, r.operator) == (where, s)] for s in SEQUENCES}
        for where in dict.fromkeys(r.backend for r in rows)
    }  # fmt: skip


def table(rows: Sequence[Row], published: Any) -> Table:
    """Geometric mean over the layers and best layer, as the published ones."""
    made = Table(title="Speed-up over the convolution: geometric mean (best layer)", title_justify="left")  # fmt: skip
    made.add_column("platform, compiler")
    for name in SEQUENCES:
        made.add_column(name, justify="right")
    here = {f"here, {name}": values for name, values in speedups(rows).items()}
    for name, values in (here | published).items():
        cells = [f"{_mean(values[s]):.2f} ({max(values[s]):.2f})" for s in SEQUENCES]
        made.add_row(name, *cells, style="bold" if name in here else None)
    return made


def picture(rows: Sequence[Row], published: Any) -> Any:
    """Layer by layer here; means of all platforms beside."""
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(r.layer for r in rows))
    figure = Figure(figsize=(11, 0.9 + 0.42 * max(len(layers), 8)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    colours = dict(zip(SEQUENCES, ("#2c7fb8", "#e08214", "#7b3294"), strict=True))
    shapes = {"xla": "o", "tvm": "s"}
    for row in rows:
        if row.operator == "conv":
            continue
        i = layers.index(row.layer) + 0.2 * (SEQUENCES.index(row.operator) - 1)
        full = row.backend == "tvm"
        left.plot(
            row.speedup, i, shapes[row.backend], ms=6, color=colours[row.operator], mfc=None if full else "white",
        )  # fmt: skip
    for backend_name, shape in shapes.items():
        left.plot([], [], shape, color="0.3", mfc="white" if backend_name == "xla" else None, label=backend_name)  # fmt: skip
    for name, colour in colours.items():
        left.plot([], [], "-", lw=4, color=colour, label=name)
    left.set_yticks(range(len(layers)), layers, fontsize=8)
    left.set_title("here, layer by layer", fontsize=9)
    platforms = {f"here, {n}": v for n, v in speedups(rows).items()} | published
    for i, values in enumerate(platforms.values()):
        for s in SEQUENCES:
            right.plot(_mean(values[s]), i, "D", ms=6, color=colours[s])
    right.set_yticks(range(len(platforms)), list(platforms), fontsize=8)
    right.set_title("geometric mean over ten layers", fontsize=9)
    for axes in (left, right):
        axes.axvline(1.0, color="0.6", lw=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
        axes.set_xlabel("speed-up over the convolution")
        axes.grid(axis="x", alpha=0.25)
        axes.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=5)  # fmt: skip
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(SequencesCommand, "sequences", __doc__, args)


if __name__ == "__main__":
    main()
