"""Throughput of wide residual networks made smaller in every way, against their parameters. No training: shapes decide.

python -m experiments.skeletons.throughput

The claim of "A Closer Look at Structured Pruning" (https://arxiv.org/abs/1810.04622): at equal parameters networks scaled down
run faster than pruned ones. On every backend that is there all members of all families are compiled and timed in one interleaved
run, at a batch of one and a large one, on the platform that JAX finds. Writes `throughput.csv` and `throughput.png`.
"""

import csv
import dataclasses
import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.command import run
from experiments.skeletons.families import PRUNED, SCHEMES, Member, check_counts, members
from experiments.skeletons.pictures import curves
from nnopt.backends import Backend, compile_network, measure
from nnopt.cli.bars import Bars
from nnopt.cli.measure import chosen_backends
from nnopt.core import Example
from nnopt.core.files import write_whole
from nnopt.costs import macs, parameters
from nnopt.data import load, minibatch
from nnopt.search.blockswap import network_named
from nnopt.search.folders import writing_to


@dataclasses.dataclass(frozen=True)
class Point:
    """One network, timed.

    Attributes:
        scheme: how it became smaller.
        detail: by how much.
        parameters: of it.
        macs: of one image.
        batch: images in a call.
        platform: as JAX names it.
        backend: that compiled it.
        median_ms: of a call.
        low_ms: lower quartile.
        high_ms: upper quartile.
    """

    scheme: str
    detail: str
    parameters: int
    macs: int
    batch: int
    platform: str
    backend: str
    median_ms: float
    low_ms: float
    high_ms: float

    @property
    def throughput(self) -> float:
        """Images a second."""
        return 1e3 * self.batch / self.median_ms


@dataclasses.dataclass(frozen=True)
class ThroughputCommand:
    """Time families of smaller networks against each other."""

    network: str = "wrn-40-2"
    """Base network, one of residual blocks; an unknown name lists them all."""
    batches: tuple[int, ...] = (1, 64)
    """Images in a call."""
    points: int = 6
    """Members of each family."""
    repeats: int = 15
    """Interleaved rounds, at least."""
    data: str = "digits"
    """Where the images come from that Fisher information is of: digits, cifar10."""
    backends: tuple[str, ...] = ()
    """xla, tvm; by default those that are installed."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path(
        "results/skeletons"
    )
    """Result folder."""

    def run(self) -> None:
        """Compiles, times, prints, draws."""
        check_counts(batches=self.batches, points=self.points, repeats=self.repeats)
        backends = chosen_backends(self.backends)
        console = Console()
        dataset = load(self.data)
        images, labels = minibatch(dataset, 64, jax.random.key(0))
        net = network_named(self.network, len(dataset.classes))
        variables = net.lazy_init(jax.random.key(0), images[:1])
        with console.status("making the families"):
            family = list(members(net, variables, images, labels, points=self.points))
        with writing_to(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        points = []
        with Bars(console) as bars:
            for made in backends:
                for batch in self.batches:
                    points += timed(family, batch, images.shape[1:], self.repeats, bars, made)
        with writing_to(self.out):
            write_csv(self.out / "throughput.csv", points)
            picture(points, self.network).savefig(self.out / "throughput.png", dpi=130)
        for made in backends:
            for batch in self.batches:
                here = [p for p in points if (p.backend, p.batch) == (made.name, batch)]
                console.print(summary(here, batch))
        console.print(
            f"{self.out / 'throughput.csv'}, {self.out / 'throughput.png'}", highlight=False
        )


def timed(
    family: Sequence[Member],
    batch: int,
    image: tuple[int, ...],
    repeats: int,
    bars: Bars,
    backend: Backend,
) -> list[Point]:
    """Compiles networks and times them in one interleaved run.

    Args:
        family: the networks.
        batch: images in a call.
        image: shape of one.
        repeats: rounds, at least.
        bars: shows how it gets on.
        backend: compiles them. Each is timed by itself, for the threads of two would wait for each other.

    Raises:
        BackendError: it cannot compile a network.
    """
    one = Example(jnp.zeros((1, *image)))
    example = Example(jax.ShapeDtypeStruct((batch, *image), jnp.float32))
    bars.phase(f"compiling, {backend.name}, batch {batch}", len(family))
    compiled: dict[str, Any] = {}
    for i, member in enumerate(family):
        fresh = member.net.lazy_init(jax.random.key(0), *one.args)
        compiled[str(i)] = compile_network(member.net, fresh, example, backend=backend)
        bars.advance(member.scheme)
    started: list[int] = []

    def on_progress(done: int, total: int) -> None:
        if not started:
            bars.phase(f"timing, {backend.name}, batch {batch}", total)
            started.append(total)
        bars.advance()

    times = measure(compiled, repeats=repeats, on_progress=on_progress)
    return [
        Point(
            m.scheme, m.detail, parameters(m.net, one), macs(m.net, one), batch, jax.default_backend(),
            backend.name, times[str(i)].median_ms, times[str(i)].low_ms, times[str(i)].high_ms,
        )
        for i, m in enumerate(family)
    ]  # fmt: skip


def write_csv(path: pathlib.Path, points: Sequence[Point]) -> None:
    """One row for each network, batch and backend."""
    text = io.StringIO()
    names = [f.name for f in dataclasses.fields(Point)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "images_per_second"])
    for p in points:
        writer.writerow([*(getattr(p, n) for n in names), f"{p.throughput:.2f}"])
    write_whole(path, text.getvalue())


def throughput_at(points: Sequence[Point], scheme: str, count: float) -> float | None:
    """Of a family at a number of parameters, by interpolation between its members and the base; None outside of them."""
    chosen = sorted((p for p in points if p.scheme in (scheme, "base")), key=lambda p: p.parameters)
    if len(chosen) < 2 or not chosen[0].parameters <= count <= chosen[-1].parameters:
        return None
    logs = np.log([[p.parameters, p.throughput] for p in chosen])
    return float(np.exp(np.interp(np.log(count), logs[:, 0], logs[:, 1])))


def summary(points: Sequence[Point], batch: int) -> Table:
    """Throughput of each family at fractions of the base's parameters, as multiples of the base's."""
    (base,) = [p for p in points if p.scheme == "base"]
    fractions = (0.75, 0.5, 0.35, 0.25)
    table = Table(
        title=f"Batch {batch}, {base.platform}, {base.backend}: throughput over that of the base ({base.throughput:,.0f} images/s)",
        caption=f"at fractions of the base's parameters, by interpolation; scaled: mean of depth and width; pruned: mean of "
        f"{', '.join(PRUNED)}",
    )
    table.add_column("scheme")
    for f in fractions:
        table.add_column(f"{f:.0%}", justify="right")
    for scheme in SCHEMES:
        cells = [throughput_at(points, scheme, f * base.parameters) for f in fractions]
        texts = ("" if c is None else f"{c / base.throughput:.2f}" for c in cells)
        table.add_row(scheme, *texts, end_section=scheme == "bottleneck x 8")
    ratios = []
    for f in fractions:
        scaled = [throughput_at(points, s, f * base.parameters) for s in ("depth", "width")]
        pruned = [throughput_at(points, s, f * base.parameters) for s in PRUNED]
        known = [[v for v in side if v is not None] for side in (scaled, pruned)]
        ratios.append(f"{np.mean(known[0]) / np.mean(known[1]):.2f}" if all(known) else "")
    table.add_row("scaled / pruned", *ratios, style="bold")
    return table


def picture(points: Sequence[Point], network: str) -> Any:
    """Throughput against parameters, a row of panels for each backend and a column for each batch."""
    from matplotlib.figure import Figure

    batches = sorted({p.batch for p in points})
    backends = list(dict.fromkeys(p.backend for p in points))
    figure = Figure(figsize=(5.4 * len(batches), 4.4 * len(backends)), layout="constrained")
    for i, (backend, batch) in enumerate(itertools.product(backends, batches)):
        axes = figure.add_subplot(len(backends), len(batches), i + 1)
        here = [p for p in points if (p.backend, p.batch) == (backend, batch)]
        curves(axes, SCHEMES, [(p.scheme, p.parameters, p.throughput) for p in here])
        axes.set_ylabel("images / s")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_title(f"{network}, batch {batch}, {here[0].platform}, {backend}", fontsize=10)
        if i == 0:
            axes.legend(fontsize=8, title="solid: scaled, dashed: pruned", title_fontsize=8)
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(ThroughputCommand, "throughput", __doc__, args)


if __name__ == "__main__":
    main()
