"""`nnopt measure`: networks timed on every backend that is there."""

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from nnopt.cli.bars import Bars
from nnopt.errors import MeasurementError, ResultFolderError

if TYPE_CHECKING:
    from nnopt.backends import Backend
    from nnopt.core import Example
    from nnopt.search.timing import Layer, TimedRun


@dataclasses.dataclass(frozen=True)
class MeasureCommand:
    """Time networks end to end on this machine, on every backend that is there, in one interleaved run.

    Weights are random constants inside the executable. Shown are the median time of a call, the distance of its quartiles (spread),
    images a second, the speed-up over the first row, and how the backend came by its loops. With --layers also each distinct
    convolution and matrix product alone. Latencies of different set-ups (device, threads, versions, warm or cold) do not compare.

    Example: nnopt measure wrn-16-1 slim.json --threads 1

    Example: nnopt measure wrn-16-1 --backends xla --layers --out times.json
    """

    networks: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK|FILE ...")
    ]
    """Names of networks (wrn-40-2, resnet-18, ...) or paths of network records, the one to compare with first."""
    backends: tuple[str, ...] = ()
    """xla, tvm; by default those that are installed."""
    layers: bool = False
    """Also time each distinct convolution and matrix product."""
    batch: int = 1
    """Images in a call."""
    size: int = 32
    """Height and width of the images."""
    threads: Literal["1", "all"] = "all"
    """Threads of a backend; with 1 the process is kept to one core, which is the most repeatable."""
    cold: bool = False
    """Empty the caches before each timed call, for networks that run now and then."""
    repeats: int = 50
    """Rounds; each takes a sample of everything."""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Where to write everything, set-up and all samples included."""

    def run(self) -> None:
        """Compiles, measures, prints and writes."""
        at_least_one(self, "batch", "repeats")
        if not self.networks:
            raise MeasurementError("there is nothing to measure; name a network, such as wrn-16-1")
        check_file(self.out)
        with one_core(self.threads):
            self._run()

    def _run(self) -> None:
        from nnopt.core.files import write_whole
        from nnopt.reports.latency import (
            layer_table,
            measurement_json,
            network_table,
            setup_lines,
        )
        from nnopt.search.timing import time_all

        backends = chosen_backends(self.backends)
        names = dict.fromkeys(self.networks)
        modules = {name: _network(name, self.size, self.batch) for name in names}
        console = Console()
        found: dict[str, tuple[dict[str, Layer], list[TimedRun]]] = {}
        with Bars(console) as bars:
            rows = time_all(
                modules, backends, bars, what="networks", repeats=self.repeats, cold=self.cold
            )
            if self.layers:
                found = {name: self._layers(name, m[0], m[1], backends, bars) for name, m in modules.items()}  # fmt: skip
        if self.out is not None:
            options = dataclasses.asdict(self) | {"out": str(self.out)}
            written = measurement_json(options, rows, found, self.batch)
            try:
                write_whole(self.out, json.dumps(written, indent=1) + "\n")
            except OSError as e:
                raise ResultFolderError(
                    f"cannot write {self.out}: {e.strerror or e}; give another --out"
                ) from e
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        call = f"{images} of {self.size} x {self.size} a call"
        console.print(network_table(f"Networks, {call}", rows, self.batch))
        for name, (layers, timed) in found.items():
            whole = {r.backend: r.latency.median_ms for r in rows if r.name == name}
            console.print(layer_table(f"Layers of {name}, {call}", layers, timed, whole))
        for line in setup_lines(rows):
            console.print(line, highlight=False)
        if self.out is not None:
            console.print(f"Everything: {self.out}", soft_wrap=True, highlight=False)

    def _layers(
        self, name: str, net: Any, example: "Example", backends: "list[Backend]", bars: Bars
    ) -> "tuple[dict[str, Layer], list[TimedRun]]":
        from nnopt.search.timing import layers, time_all

        found = {f"{n} {layer.name}": layer for n, layer in enumerate(layers(net, example), 1)}
        if not found:
            raise MeasurementError(
                f"{name} has no convolutions or matrix products in modules of their own; leave out --layers"
            )
        modules = {key: (layer.module, layer.example) for key, layer in found.items()}
        what = f"layers of {pathlib.Path(name).name}"
        rows = time_all(modules, backends, bars, what=what, repeats=self.repeats, cold=self.cold)
        return found, rows


def chosen_backends(names: tuple[str, ...]) -> "list[Backend]":
    """The backends of these names; without any, those that are installed.

    Raises:
        BackendError: there is none of a name, or what it needs is not installed.
    """
    from nnopt.backends import BACKENDS, backend
    from nnopt.errors import BackendError

    found = []
    for name in dict.fromkeys(names or BACKENDS):
        made = backend(name)
        try:
            made.describe()
        except BackendError:
            if names:
                raise
        else:
            found.append(made)
    return found


def one_core(threads: str) -> Any:
    """Keeps the process to one core if that many threads are asked for. Before JAX starts: its pool has a thread for each core."""
    from nnopt.backends.setup import pinned

    return pinned(1 if threads == "1" else None)


def at_least_one(command: Any, *names: str) -> None:
    """Checks that these options are positive.

    Raises:
        MeasurementError: one is not.
    """
    for name in names:
        if getattr(command, name) < 1:
            option = name.replace("_", "-")
            raise MeasurementError(f"--{option} is {getattr(command, name)}; give 1 or more")


def check_file(path: pathlib.Path | None) -> None:
    """Checks that a file can be written, before the work.

    Raises:
        ResultFolderError: it cannot.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = "it is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise ResultFolderError(f"cannot write {path}: {problem}; give another --out")


def _network(name: str, size: int, batch: int) -> Any:
    from nnopt.cli.networks import example_for, load_network

    net = load_network(name)
    return net, example_for(net, size, batch)
