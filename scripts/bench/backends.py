"""Whole networks on XLA and on TVM, one image, one core, in one interleaved run.

    taskset -c 0 .venv/bin/python scripts/bench/backends.py [--networks ...] [--repeats 40] [--fold]

Weights are inside the executables. For each network: median latencies, that of XLA also with nnopt's lowerings of grouped
convolutions where there are any, how many times as fast TVM is as the faster one (median and quartiles of the rounds' ratios), what
compilation took, and how far the outputs differ (of the largest). Needs the extra `tvm`; three minutes, and
nothing else running.
"""

import dataclasses
import sys

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Bench:
    """Compare backends on networks for 32 x 32 images."""

    networks: tuple[str, ...] = ("wrn-16-1", "wrn-40-2", "resnet-18", "resnet-34", "mobilenet-v2")
    """By name."""
    batch: int = 1
    """Images in a call."""
    repeats: int = 40
    """Interleaved rounds."""
    search: bool = False
    """Let TVM search tiles first, in place of those of the model."""
    fold: bool = False
    """Fold batch norms first, for both."""

    def run(self) -> None:
        """Compiles, measures and prints."""
        from nnopt.backends import backend, compile_network, measure, speedup
        from nnopt.cli.bars import Bars
        from nnopt.core import Example, Leaves, carry, rewrite
        from nnopt.networks import named
        from nnopt.rewrites import FoldBatchNorm, LowerGroupedConvs

        console = Console() if sys.stdout.isatty() else Console(width=110)
        places = {
            "xla": backend("xla"),
            "tvm": backend("tvm", scheduled="search" if self.search else "template"),
        }
        example = Example(jax.ShapeDtypeStruct((self.batch, 32, 32, 3), np.float32), train=False)
        table = Table(title=f"Milliseconds a call, batch {self.batch}", title_justify="left")
        heads = (
            "XLA",
            "lowered",
            "TVM",
            "TVM is faster",
            "XLA compiles",
            "TVM compiles",
            "difference",
        )
        for name in ("network", *heads):
            table.add_column(name, justify="left" if name == "network" else "right")
        with Bars(console) as bars:
            bars.phase("networks", len(self.networks))
            for name in self.networks:
                net = named(name, 10)
                variables = net.lazy_init(jax.random.key(0), example.args[0], train=False)
                if self.fold:
                    folded = rewrite(net, FoldBatchNorm(), example=example)
                    variables, _ = carry(
                        net, folded, variables, example=example, key=jax.random.key(0)
                    )
                    net = folded
                made = {
                    k: compile_network(net, variables, example, backend=b)
                    for k, b in places.items()
                }
                a, b = (np.asarray(made[k].outputs()) for k in places)
                lowered = rewrite(net, LowerGroupedConvs(Leaves()), example=example)
                if lowered is not net:  # it has grouped convolutions, which XLA has better forms of
                    made["lowered"] = compile_network(lowered, variables, example)
                times = measure(made, repeats=self.repeats)
                base = min((k for k in times if k != "tvm"), key=lambda k: times[k].median_ms)
                over = speedup(times[base], times["tvm"])
                table.add_row(
                    name, f"{times['xla'].median_ms:.3f}",
                    f"{times['lowered'].median_ms:.3f}" if "lowered" in times else "", f"{times['tvm'].median_ms:.3f}",
                    f"{over.median:.2f} [{over.low:.2f}, {over.high:.2f}]",
                    *(f"{made[k].compile_seconds:.1f} s" for k in places),
                    f"{np.abs(a - b).max() / np.abs(a).max():.0e}",
                )  # fmt: skip
                bars.advance(name)
        console.print(table)


if __name__ == "__main__":
    tyro.cli(Bench, description=__doc__).run()
