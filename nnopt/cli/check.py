"""`nnopt check`: whether all backends compute the same."""

import dataclasses
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from nnopt.cli.bars import Bars

if TYPE_CHECKING:
    from nnopt.backends.agreement import Agreement


@dataclasses.dataclass(frozen=True)
class CheckCommand:
    """Run networks on every backend that is there, and on JAX in 64 bits, and compare what comes out.

    Weights and images are random, the same everywhere. Backends agree on a network if no element of an output differs by more than
    --tolerance times the largest magnitude in that output. With --layers the outputs of convolutions and dense layers are compared
    as well, which tells where a difference begins. With --latency the networks that agree are timed on all backends, and it is told
    how alike the backends rank them. The exit code is 1 if a network disagrees.

    Example: nnopt check wrn-16-1 slim.json --layers

    Example: nnopt check a.json b.json c.json d.json --latency
    """

    networks: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK|FILE ...")
    ]
    """Names of networks (wrn-40-2, resnet-18, ...) or paths of network records."""
    backends: tuple[str, ...] = ()
    """xla, tvm; by default those that are installed."""
    tolerance: float = 1e-4
    """Largest difference of an output, relative to the largest magnitude in it."""
    layers: bool = False
    """Also compare the outputs of convolutions and dense layers."""
    top: int = 20
    """Layers to show, those that differ most."""
    latency: bool = False
    """Also time what agrees, and tell how alike the backends rank it."""
    repeats: int = 30
    """Rounds of timing."""
    size: int = 32
    """Height and width of the images."""
    batch: int = 1
    """Images in a call."""
    seed: int = 0
    """Seed of the weights."""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """Where to write all differences."""

    def run(self) -> None:
        """Compiles, compares, prints and writes."""
        # Imported here so that --help and bad flags answer at once.
        from nnopt.cli.measure import at_least_one, check_file, chosen_backends
        from nnopt.cli.networks import example_for, load_network
        from nnopt.errors import BackendError, SearchError
        from nnopt.reports.check import agreement_table, layer_agreement_table, rank_table
        from nnopt.search.checking import check_networks, rank_agreements, time_checked

        at_least_one(self, "batch", "repeats", "top")
        if not 0 < self.tolerance < math.inf:
            raise BackendError(
                f"--tolerance is {self.tolerance}; give a number above 0, such as 1e-4"
            )
        if not self.networks:
            raise BackendError("there is nothing to check; name a network, such as wrn-16-1")
        if not 0 <= self.seed < 2**32:
            raise SearchError(f"the seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        check_file(self.out)
        backends = chosen_backends(self.backends)
        networks: dict[str, Any] = {}
        for name in self.networks:
            net = load_network(name)
            networks[name] = net, example_for(net, self.size, self.batch)
        console = Console()
        with Bars(console) as bars:
            checked = check_networks(
                networks,
                backends,
                bars,
                tolerance=self.tolerance,
                layers=self.layers,
                seed=self.seed,
            )
            runs = []
            if self.latency:
                runs = time_checked(networks, checked, backends, bars, repeats=self.repeats)
        self._write(checked)
        console.print(agreement_table(checked, self.tolerance))
        for name, found in checked.items():
            if found.layers:
                console.print(layer_agreement_table(name, found, self.top))
        if runs:
            console.print(rank_table(runs, rank_agreements(runs, seed=self.seed)))
        if self.out is not None:
            console.print(f"Everything: {self.out}", soft_wrap=True, highlight=False)
        wrong = [name for name, found in checked.items() if not found.agrees]
        if not wrong:
            console.print(
                f"All agree: {', '.join(b.name for b in backends)} and float64.", highlight=False
            )
            return
        for name in wrong:
            begins = checked[name].first_wrong_layer
            where = f", from the layer {begins.place} on" if begins else ""
            console.print(f"{name} disagrees{where}.", style="red", highlight=False, soft_wrap=True)
        sys.stdout.flush()
        sys.exit(1)

    def _write(self, checked: "dict[str, Agreement]") -> None:
        from nnopt.reports.ranking import write_csv

        if self.out is None:
            return
        rows = [
            {"network": name, "kind": kind}
            | dataclasses.asdict(d)
            | {"agrees": d.within(self.tolerance)}
            for name, found in checked.items()
            for kind, differences in (("output", found.outputs), ("layer", found.layers))
            for d in differences
        ]
        write_csv(self.out, rows)
