"""What was found, layer by layer: rows, tables, a picture."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from experiments.operations.candidates import Layer
from nnopt.core.files import write_whole
from nnopt.nests import Program


@dataclasses.dataclass(frozen=True)
class Row:
    """One operator of one layer; the convolution itself has an empty program and is named `conv`.

    Attributes:
        layer: its name.
        name: of a named operator; empty for a generated one.
        weights: number of them.
        macs: of one image.
        ms: median latency.
        speedup: over the convolution, median of the rounds' ratios.
        low: lower quartile of it.
        high: upper quartile of it.
        fisher: potential of the network with the operator, over that of the network as it is; NaN where it was not computed.
        program: JSON.
    """

    layer: str
    name: str
    weights: int
    macs: int
    ms: float
    speedup: float
    low: float
    high: float
    fisher: float
    program: str

    @property
    def legal(self) -> bool:
        """Whether the network keeps its potential."""
        return self.fisher >= 1.0

    @property
    def faster(self) -> bool:
        """Whether it is, by the quartiles of the ratio and not by chance."""
        return self.low > 1.0


def write_csv(path: pathlib.Path, rows: Sequence[Any]) -> None:
    """One line for each row, which are dataclasses of one kind and at least one."""
    text = io.StringIO()
    names = [f.name for f in dataclasses.fields(rows[0])]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(
        [f"{v:.5g}" if isinstance(v := getattr(r, n), float) else v for n in names] for r in rows
    )
    write_whole(path, text.getvalue())


def best(rows: Sequence[Row], layer: str, kind: str) -> Row | None:
    """The fastest legal operator of a layer.

    Args:
        rows: of all layers.
        layer: its name.
        kind: `named` or `generated`.
    """
    legal = [
        r
        for r in rows
        if r.layer == layer and r.legal and r.name != "conv" and bool(r.name) == (kind == "named")
    ]
    return min(legal, key=lambda r: r.ms, default=None)


def table(found: Sequence[Layer], rows: Sequence[Row]) -> Table:
    """For each layer the fastest legal operators."""
    made = Table(
        title="Fastest legal operators: speed-up over the convolution [quartiles], MACs, Fisher potential of the network"
    )
    for heading in ("convolution", "ms", "generated", "named", "legal / tested"):
        made.add_column(
            heading, justify="left" if heading in ("convolution", "generated", "named") else "right"
        )
    for layer in found:
        (conv,) = (r for r in rows if r.layer == layer.name and r.name == "conv")
        cells = []
        for kind in ("generated", "named"):
            r = best(rows, layer.name, kind)
            text = (
                "none"
                if r is None
                else f"{r.name} {r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}], {r.macs / conv.macs:.0%}, {r.fisher:.3f}"
            )
            cells.append(text.strip())
        tested = [
            r for r in rows if r.layer == layer.name and r.name != "conv" and np.isfinite(r.fisher)
        ]
        made.add_row(
            layer.name, f"{conv.ms:.3f}", *cells, f"{sum(r.legal for r in tested)} / {len(tested)}"
        )
    return made


def beaten(found: Sequence[Layer], rows: Sequence[Row]) -> str:
    """Generated operators that are faster than a named one, by the quartiles, at no lower Fisher potential."""
    lines = ["Generated operators that beat named ones at no lower potential:"]
    for layer in found:
        here = [
            r for r in rows if r.layer == layer.name and np.isfinite(r.fisher) and r.name != "conv"
        ]
        for new in sorted((r for r in here if not r.name and r.faster), key=lambda r: -r.speedup)[
            :3
        ]:
            behind = [
                r.name for r in here if r.name and new.low > r.high and new.fisher >= r.fisher
            ]
            if behind:
                program = Program.from_json(new.program)
                lines.append(
                    f"  {layer.name}: {program}\n    {new.speedup:.2f}x, potential {new.fisher:.3f}, beats {', '.join(behind)}"
                )
    return (
        "\n".join(lines)
        if len(lines) > 1
        else "No generated operator beats a named one at equal potential."
    )


def picture(found: Sequence[Layer], rows: Sequence[Row]) -> Any:
    """Speed-ups layer by layer: the fastest legal operators, and all that were tried."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 0.9 + 0.52 * len(found)), layout="constrained")
    axes = figure.add_subplot(1, 1, 1)
    axes.axvline(1.0, color="0.6", lw=1)
    for i, layer in enumerate(found):
        here = [r for r in rows if r.layer == layer.name and r.name != "conv"]
        for legal, colour, label in (
            (False, "0.78", "tried, not legal or not tested"),
            (True, "#5b9bd5", "legal"),
        ):
            some = [r.speedup for r in here if r.legal == legal]
            axes.plot(
                some, [i] * len(some), "|", ms=11, color=colour, label=label if i == 0 else None
            )
        for kind, colour, offset in (("generated", "#c0392b", -0.16), ("named", "#2c3e50", 0.16)):
            row = best(rows, layer.name, kind)
            if row is not None:
                error = [[row.speedup - row.low], [row.high - row.speedup]]
                axes.errorbar(
                    row.speedup, i + offset, xerr=error, fmt="o", ms=5, color=colour, label=None
                )
                if row.name:
                    axes.annotate(
                        row.name,
                        (row.high, i + offset),
                        xytext=(5, -3),
                        textcoords="offset points",
                        fontsize=7,
                        color=colour,
                    )
    for kind, colour in (
        ("fastest legal generated", "#c0392b"),
        ("fastest legal named", "#2c3e50"),
    ):
        axes.plot([], [], "o", color=colour, ms=5, label=kind)
    axes.set_yticks(range(len(found)), [layer.name for layer in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("speed-up over the convolution")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(fontsize=8, loc="outside upper center", ncols=4)
    return figure
