"""Operators for a CIFAR ResNet-34: layer by layer, and a whole network of them.

python -m experiments.operations.resnet34

For every distinct convolution operators are generated and timed on this machine, beside the named ones, in one interleaved run;
then the network's Fisher potential is computed with each of the faster ones in place of the first such layer. Legal operators are
those with which it is not lower. The whole network then gets, layer by layer, the fastest operators with which *its* potential
stays legal, and is timed against the original. Neither takes operators with less than an eighth of a convolution's work, which the
potential would allow (`--least`). A killed run takes up where it stopped. About 15 minutes on two cores.

Writes `layers.csv`, `layers.png`, `network.json` (a record that `nnopt.core.load_record` reads) and `network.txt`.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.command import run
from experiments.operations.candidates import (
    MOST_MACS,
    Candidate,
    Layer,
    Legality,
    candidates,
    layers,
    mutated,
    timed,
)
from experiments.operations.report import Row, beaten, picture, table, write_csv
from nnopt.backends import compile_network, describe_device, measure, speedup
from nnopt.cli.bars import Bars
from nnopt.core import Example, save_record
from nnopt.core.files import write_whole
from nnopt.costs import macs, parameters
from nnopt.data import load, minibatch
from nnopt.errors import BudgetError
from nnopt.nests import Program
from nnopt.search.blockswap import network_named


@dataclasses.dataclass(frozen=True)
class MutateCommand:
    """Faster operators for the convolutions of a network, and the network made of them."""

    network: str = "resnet-34"
    """Name of a reference network for 32 x 32 images."""
    count: int = 30
    """Generated operators that are timed for each distinct convolution."""
    tests: int = 8
    """Generated operators, the fastest, whose legality is tested for each."""
    least: float = 0.125
    """Part of a convolution's multiply-accumulates that a generated operator has at least, and any operator of the whole network:
    Fisher potential at initialisation does not see that too little is left. 0 for no limit."""
    batch: int = 1
    """Images in a timed call."""
    repeats: int = 15
    """Timed rounds."""
    fisher_batch: int = 16
    """Images in the minibatch of the Fisher potential."""
    seed: int = 0
    """Of the draws and the minibatch."""
    data_dir: str | None = None
    """Folder of CIFAR-10; NNOPT_DATA by default."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FOLDER")] = pathlib.Path(
        "results/operations"
    )
    """Result folder."""

    def run(self) -> None:
        """Layers, then the network."""
        for name in ("count", "tests", "batch", "repeats", "fisher_batch"):
            if getattr(self, name) < 1:
                raise BudgetError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if not 0 <= self.least < MOST_MACS:
            raise BudgetError(f"--least {self.least} is not from 0 to below {MOST_MACS}")
        console = Console() if sys.stdout.isatty() else Console(width=110)
        net = network_named(self.network, 10)
        images, labels = minibatch(
            load("cifar10", self.data_dir), self.fisher_batch, jax.random.key(self.seed)
        )
        example = Example(images[:1], train=False)
        found = layers(net, example)
        with Bars(console) as bars:
            bars.phase("Fisher potential", 1)
            legality = Legality(net, images, labels)
            bars.advance(f"{legality.potential:.4g}")
            rows: list[Row] = []
            for number, layer in enumerate(found):
                rows += self._layer(number, layer, legality, bars)
            write_csv(self.out / "layers.csv", rows)
            console.print(table(found, rows))
            console.print(beaten(found, rows), highlight=False)
            picture(found, rows).savefig(self.out / "layers.png", dpi=130)
            chosen, ratio = self._chosen(found, rows, legality, bars, console)
            small = mutated(net, chosen, example)
            self._report(console, net, small, images, ratio, bars)

    def _layer(self, number: int, layer: Layer, legality: Legality, bars: Bars) -> list[Row]:
        """Rows of one layer, computed or read."""
        path = self.out / f"layer{number}.json"
        settings = {
            f: getattr(self, f)
            for f in (
                "network",
                "count",
                "tests",
                "least",
                "batch",
                "repeats",
                "fisher_batch",
                "seed",
            )
        }
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] == settings:
                return [Row(**row) for row in stored["rows"]]
        tried = candidates(
            layer, self.count, np.random.default_rng([self.seed, number]), self.least
        )
        times = timed(layer, tried, self.batch, self.repeats, bars)
        by_speed = sorted(
            (i for i, c in enumerate(tried) if not c.name), key=lambda i: times[1 + i]["ms"]
        )
        tested = {i for i, c in enumerate(tried) if c.name} | set(by_speed[: self.tests])
        bars.phase(f"legality {layer.name}", len(tested))
        rows = [
            Row(
                layer.name,
                "conv",
                int(np.prod(layer.operator.kernel)),
                layer.operator.domain_size,
                **times[0],
                fisher=1.0,
                program="[]",
            )
        ]
        for i, candidate in enumerate(tried):
            ratio = float("nan")
            if i in tested:
                ratio = legality.of({layer.paths[0]: candidate.program}) / legality.potential
                bars.advance(f"{ratio:.3f}")
            rows.append(_row(layer, candidate, times[1 + i], ratio))
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(
            path, json.dumps({"settings": settings, "rows": [dataclasses.asdict(r) for r in rows]})
        )
        return rows

    def _chosen(
        self,
        found: Sequence[Layer],
        rows: Sequence[Row],
        legality: Legality,
        bars: Bars,
        console: Console,
    ) -> tuple[dict[str, Program], float]:
        """Path -> program of the fastest operators with which the network stays legal, and its potential over the original's."""
        chosen: dict[str, Program] = {}
        ratio = 1.0
        base = {r.layer: r for r in rows if r.name == "conv"}
        # Where most of the time is, first.
        order = sorted(found, key=lambda layer: -base[layer.name].ms * len(layer.paths))
        bars.phase("whole network", len(order))
        for layer in order:
            least = self.least * layer.operator.domain_size
            legal = sorted(
                (
                    r
                    for r in rows
                    if r.layer == layer.name and r.legal and r.faster and r.macs >= least
                ),
                key=lambda r: r.ms,
            )
            note = "stays"
            for row in legal[:4]:
                trial = chosen | dict.fromkeys(layer.paths, Program.from_json(row.program))
                now = legality.of(trial) / legality.potential
                if now >= 1.0:
                    chosen, ratio, note = trial, now, f"{row.speedup:.2f}x"
                    break
            bars.advance(f"{layer.name}: {note}")
        return chosen, ratio

    def _report(
        self, console: Console, net: Any, small: Any, images: jax.Array, ratio: float, bars: Bars
    ) -> None:
        """Times both networks in one run, writes the record."""
        example = Example(
            jax.ShapeDtypeStruct((self.batch, *images.shape[1:]), jnp.float32), train=False
        )
        bars.phase("compiling", 2)
        compiled = {}
        for name, network in (("original", net), ("mutated", small)):
            fresh = network.lazy_init(jax.random.key(0), images[:1], train=False)
            compiled[name] = compile_network(network, fresh, example)
            bars.advance(name)
        times = measure(compiled, repeats=4 * self.repeats)
        over = speedup(times["original"], times["mutated"])
        save_record(small, self.out / "network.json")
        one = Example(images[:1], train=False)
        lines = [
            f"{self.network}, batch {self.batch}, {describe_device()['device_kind']}",
            f"original: {times['original'].median_ms:.2f} ms, {parameters(net, one):,} parameters, {macs(net, one):,} MACs",
            f"mutated:  {times['mutated'].median_ms:.2f} ms, {parameters(small, one):,} parameters, {macs(small, one):,} MACs",
            f"speed-up {over.median:.2f} [{over.low:.2f}, {over.high:.2f}], Fisher potential {ratio:.3f} of the original's",
        ]
        write_whole(self.out / "network.txt", "\n".join(lines) + "\n")
        console.print("\n".join(lines), highlight=False)
        console.print(
            f"{self.out / 'layers.csv'}, {self.out / 'layers.png'}, {self.out / 'network.json'}",
            highlight=False,
        )


def _row(layer: Layer, candidate: Candidate, times: dict[str, float], ratio: float) -> Row:
    program = json.dumps(candidate.program.to_json())
    return Row(
        layer.name,
        candidate.name,
        candidate.weights,
        candidate.macs,
        **times,
        fisher=ratio,
        program=program,
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    run(
        MutateCommand, "resnet34", __doc__, args, "the same command takes up where this one stopped"
    )


if __name__ == "__main__":
    main()
