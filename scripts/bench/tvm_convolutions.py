"""Convolutions by the TVM templates on one core: GFLOP/s beside the peak of the core, and time beside multiply-accumulates.

    taskset -c 0 .venv/bin/python scripts/bench/tvm_convolutions.py [--search] [--repeats 25]

The distinct convolutions of a CIFAR ResNet-34 and of WRN-40-2, one image, weights packed beforehand, dense and in 2, 4, 8 and 16
groups and depthwise as far as channels allow. The peak is a loop of independent multiply-adds in registers. All of them, and the
peak, take turns in one run; medians of the rounds are shown.

GFLOP/s count two operations for a multiply-accumulate. "of promise" is how fast a grouped convolution is against what its share of
the dense one's multiply-accumulates promises: 100% where time follows them. Needs the extra `tvm`; three minutes, and nothing else
running.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

GROUPS = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure templates of convolutions."""

    networks: tuple[str, ...] = ("resnet-34", "wrn-40-2")
    """Whose convolutions."""
    repeats: int = 25
    """Interleaved rounds."""
    search: bool = False
    """Search tiles first, in place of those of the model."""

    def run(self) -> None:
        """Compiles, measures and prints."""
        from nnopt.backends.tvm.kernels import build_conv, multiply_adds
        from nnopt.backends.tvm.targets import target_of, vectors
        from nnopt.backends.tvm.tiles import tiles
        from nnopt.backends.tvm.tune import TileCache, default_cache, searched
        from nnopt.cli.bars import Bars

        console = Console() if sys.stdout.isatty() else Console(width=132)
        target = target_of(None, 1)
        lanes, registers = vectors(target)
        peak, operations = multiply_adds(target, lanes, registers)
        works = {dense: variants(dense) for dense in distinct(self.networks)}
        flat = [work for some in works.values() for work in some.values()]
        kernels = [peak]
        with Bars(console) as bars:
            bars.phase("compiling", len(flat))
            cache = TileCache(default_cache()) if self.search else None
            for work in flat:
                tile = (
                    searched(work, cache, target, 1, lanes, registers)
                    if cache
                    else tiles(work, lanes, registers)[0]
                )
                kernels.append(build_conv(work, tile, target, 1, lanes))
                bars.advance()
            bars.phase("timing", self.repeats)
            rounds = []
            for _ in range(self.repeats):
                rounds.append([kernel.milliseconds(1) for kernel in kernels])
                bars.advance()
        first, *others = np.median(rounds, axis=0)
        top = operations / first / 1e6
        ms = dict(zip(flat, others, strict=True))
        console.print(table(works, ms, top))


def distinct(names: Sequence[str]) -> list:
    """Convolutions of networks for 32 x 32 images."""
    from nnopt.backends.tvm.conv import ConvWorkload
    from nnopt.core import Example, sites
    from nnopt.networks import named

    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    found = {}
    for name in names:
        for site in sites(named(name, 10), Example(image, train=False)):
            if type(site.module).__name__ != "Conv":
                continue
            (_, *size, inputs), (_, *out, outputs) = site.inputs[0].shape, site.outputs.shape
            window = tuple(site.module.kernel_size)
            strides = tuple(-(-n // o) for n, o in zip(size, out, strict=True))
            zeros = [
                max((o - 1) * s + k - n, 0)
                for o, s, k, n in zip(out, strides, window, size, strict=True)
            ]
            low = tuple(n // 2 for n in zeros)
            high = tuple(n - n // 2 for n in zeros)
            found[ConvWorkload(1, tuple(size), inputs, outputs, window, strides, low, high, (1, 1), (1, 1))] = None  # fmt: skip
    return list(found)


def variants(dense) -> dict:
    """The convolution and its grouped forms, by name."""
    made = {"dense": dense}
    for groups in GROUPS:
        if dense.inputs % groups == 0 and dense.outputs % groups == 0:
            made[str(groups)] = dataclasses.replace(dense, groups=groups)
    if dense.inputs == dense.outputs and math.prod(dense.window) > 1:
        made["depthwise"] = dataclasses.replace(dense, groups=dense.inputs)
    return made


def table(works, ms, top) -> Table:
    """A row for each convolution, and geometric means."""
    made = Table(
        title=f"One core, peak {top:.0f} GFLOP/s: GFLOP/s (of peak), and GFLOP/s (of promise) in groups",
        title_justify="left",
    )
    made.add_column("convolution")
    names = ["dense", *map(str, GROUPS), "depthwise"]
    for name in names:
        made.add_column(name if name in ("dense", "depthwise") else f"{name} groups", justify="right")  # fmt: skip
    means: dict[str, list[float]] = {name: [] for name in names}
    for dense, some in works.items():
        speed = {name: 2 * w.macs / ms[w] / 1e6 for name, w in some.items()}
        cells = []
        for name in names:
            if name not in speed:
                cells.append("")
                continue
            part = speed[name] / (top if name == "dense" else speed["dense"])
            means[name].append(part)
            cells.append(f"{speed[name]:.0f} ({part:.0%})")
        stride = "" if max(dense.strides) == 1 else f" /{dense.strides[0]}"
        made.add_row(
            f"{dense.inputs} -> {dense.outputs}, {dense.window[0]}x{dense.window[1]}{stride}, {dense.size[0]}x{dense.size[1]}",
            *cells,
        )
    made.add_section()
    made.add_row(
        "geometric mean",
        *(f"{math.exp(np.mean(np.log(v))):.0%}" if v else "" for v in means.values()),
    )
    return made


if __name__ == "__main__":
    tyro.cli(Bench, description=__doc__).run()
