"""Candidates per second: scoring BlockSwap candidates by Fisher potential, with nnopt and with PyTorch, in one run.

    .venv/bin/python scripts/bench/scoring.py [--quick] [--out scoring.json]

Same candidates for all contenders (drawn within the budget), same minibatch, same number of threads, interleaved rounds. Each
contender lives in processes of its own, which sleep while others run: first one process with a thread for each core, then one
process for each core. What is timed is the way from a candidate's choices to its score: whatever a contender must build or compile
for each candidate counts; what it makes once is its cold start, from an empty process to the first score, imports and all
compilation included, no compilation cache on disk.

- engine: `nnopt.scores.fisher_engine`, programs and weights of the space made beforehand.
- whole network: each candidate is rewritten, initialised, compiled as one program and run once (`nnopt.scores.fisher`).
- PyTorch published, PyTorch tuned: see `torch_blockswap.py`, which also checks that they compute the same potentials (`--check`).
  Left out if PyTorch is not installed; nothing else of nnopt needs it. Their cold start includes a second of importing JAX.

Two tables for each way of using the cores. "Same protocol" is one minibatch of 128 and one seed for everyone. "Default setting" is
what the engine is meant to be used at, a small minibatch and several seeds of the weights, against the published batch of 128.
Whether the rankings are equally faithful, `nnopt.scores.statistics.fidelity` says.

"Of peak" sets the multiply-accumulates of a forward pass and of the gradients of activations against what a dense convolution or
matrix product reached in the same rounds. Normalisation, ReLU and memory traffic are not in that bound, so nobody gets near 100%.

Linux and CPU only, on a machine that does nothing else: threads that wait for each other suffer out of proportion from company, so
the share that other processes took is printed. About 10 minutes on two cores, 4 with `--quick`; 16 GB of memory.
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tyro
from processes import Processes, Scorer, Turn
from rich.console import Console
from rich.table import Table

from nnopt.rewrites.choice import Choice

Candidate = tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a contender is given to get ready with.

    Attributes:
        depth: of the wide residual network.
        width: likewise.
        choices: what may stand at each position.
        images: `[batch, height, width, 3]`, float32.
        labels: `[batch]`, int32.
        seeds: how many draws of the weights each candidate is scored with; the score is the geometric mean.
        threads: that it may use.
    """

    depth: int
    width: int
    choices: tuple[tuple[Choice, ...], ...]
    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    seeds: int
    threads: int

    @property
    def network(self) -> str:
        """The name that `nnopt.networks.named` knows it by."""
        return f"wrn-{self.depth}-{self.width}"


# --- contenders: what gets each ready; an ImportError leaves it out ---


def engine(setting: Setting) -> Scorer:
    """(a) The engine: chains of programs that all candidates share, made ready here for the whole space."""
    import jax
    import jax.numpy as jnp

    from nnopt.core import Example, ResidualBlocks, select, sites
    from nnopt.networks import named
    from nnopt.rewrites.block import block_for
    from nnopt.scores.fisher_engine import FisherEngine
    from nnopt.search.workers import release_freed_memory, tune_process

    tune_process()
    images, labels = jnp.asarray(setting.images), jnp.asarray(setting.labels, jnp.int32)
    base = named(setting.network, 10)
    found = sites(base, Example(images[:1]))
    modules = {
        site.path: {choice: block_for(site, found, choice) for choice in here}
        for site, here in zip(select(found, ResidualBlocks()), setting.choices, strict=True)
    }
    fisher = FisherEngine(base, Example(images, train=True))
    keys = [jax.random.key(seed) for seed in range(setting.seeds)]

    def edits(candidate: Candidate) -> dict[Any, Any]:
        return {path: here[c] for (path, here), c in zip(modules.items(), candidate, strict=True)}

    def score(candidate: Candidate) -> float:
        made = edits(candidate)
        return _geometric_mean([fisher(made, images, labels, key).total for key in keys])

    most = max(map(len, setting.choices))
    every = [tuple(c[k % len(c)] for c in setting.choices) for k in range(most)]
    fisher.prepare(map(edits, every))  # programs
    for candidate in every:  # weights, which are made at first use
        score(candidate)
    release_freed_memory()
    return lambda candidates: [score(c) for c in candidates]


def whole_network(setting: Setting) -> Scorer:
    """(b) A program for each candidate, compiled fast rather than well because it runs once."""
    import jax
    import jax.numpy as jnp

    from nnopt.core import Example, sites
    from nnopt.core.rewrite import rewrite_traced
    from nnopt.networks import named
    from nnopt.rewrites import Genotype
    from nnopt.scores.fisher import FisherPotential

    images, labels = jnp.asarray(setting.images), jnp.asarray(setting.labels)
    one = Example(images[:1])
    found = sites(named(setting.network, 10), one)

    def score(candidate: Candidate) -> float:
        net = rewrite_traced(found, Genotype(candidate))
        fisher = FisherPotential(
            net,
            Example(images, train=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        totals = []
        for seed in range(setting.seeds):
            variables = net.lazy_init(jax.random.key(seed), *one.args)
            totals.append(fisher(variables, images, labels).total)
        return _geometric_mean(totals)

    return lambda candidates: [score(c) for c in candidates]


def torch_published(setting: Setting) -> Scorer:
    """(c) The released code's protocol."""
    import torch
    from torch_blockswap import Published, Skeleton

    score = Published(Skeleton(setting.depth, setting.width), *_torch_batch(torch, setting))

    def mean(candidate: Candidate) -> float:
        return _geometric_mean([sum(score(candidate)) for _ in range(setting.seeds)])

    return lambda candidates: [mean(c) for c in candidates]


def torch_tuned(setting: Setting) -> Scorer:
    """(d) The same score, without what it does not need."""
    import torch
    from torch_blockswap import Skeleton, Tuned

    batch = _torch_batch(torch, setting)
    skeleton = Skeleton(setting.depth, setting.width)
    seeds = [Tuned(skeleton, *batch, setting.choices) for _ in range(setting.seeds)]

    def mean(candidate: Candidate) -> float:
        return _geometric_mean([sum(score(candidate)) for score in seeds])

    return lambda candidates: [mean(c) for c in candidates]


def _torch_batch(torch: Any, setting: Setting) -> tuple[Any, Any]:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    images = torch.from_numpy(setting.images).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(setting.labels).long()


def _geometric_mean(scores: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, scores)) / len(scores))


# --- peaks: contenders that score nothing and return GFLOP/s of a dense convolution and of a matrix product ---

_SIDE = 2048
_CONV = (64, 16, 128)
"""Images, height and width, channels."""


def jax_peak(setting: Setting) -> Scorer:
    """By XLA."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    batch, size, channels = _CONV
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
    square = jax.random.normal(jax.random.key(2), (_SIDE, _SIDE))
    conv = jax.jit(
        lambda x, k: lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    return _peak(
        lambda: conv(x, kernel).block_until_ready(),
        lambda: jnp.matmul(square, square).block_until_ready(),
    )


def torch_peak(setting: Setting) -> Scorer:
    """By PyTorch."""
    import torch

    torch.set_num_threads(setting.threads)
    batch, size, channels = _CONV
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    square = torch.randn(_SIDE, _SIDE)
    return _peak(lambda: torch.nn.functional.conv2d(x, kernel, padding=1), lambda: square @ square)


def _peak(conv: Callable[[], Any], matmul: Callable[[], Any]) -> Scorer:
    batch, size, channels = _CONV
    work = {conv: 2 * batch * size**2 * 9 * channels**2, matmul: 2 * _SIDE**3}

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return work[call] / min(times) / 1e9

    return lambda candidates: [best(conv), best(matmul)]


PEAKS = {"XLA": jax_peak, "PyTorch": torch_peak}


# --- the benchmark ---

PUBLISHED = "PyTorch published"
_QUIET = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender at one setting.

    Attributes:
        name: of the contender.
        make: what gets it ready.
        batch: images in its minibatch.
        seeds: draws of the weights.
    """

    name: str
    make: Callable[[Setting], Scorer]
    batch: int
    seeds: int

    @property
    def setting(self) -> str:
        """Such as `4 x 2`."""
        return f"{self.batch} x {self.seeds}"


@dataclasses.dataclass(frozen=True)
class Bench:
    """Compare how fast candidates are scored."""

    rounds: int = 7
    """Interleaved rounds; every round has other candidates."""
    candidates: int = 4
    """Candidates in a round, best a multiple of the number of cores."""
    batch: int = 128
    """Images of the published protocol."""
    small_batch: int = 4
    """Images of the default setting, which is that of `nnopt.search.blockswap`."""
    small_seeds: int = 2
    """Seeds of the default setting."""
    depth: int = 40
    """Depth of the wide residual network."""
    width: int = 2
    """Its width."""
    budget: int = 400_000
    """Parameters of a candidate."""
    seed: int = 0
    """Of candidates and minibatch."""
    threads: bool = True
    """Measure one process with a thread for each core too."""
    quick: bool = False
    """Two rounds of two candidates."""
    check: bool = False
    """Compare PyTorch's potentials with nnopt's first, see torch_blockswap.py."""
    out: pathlib.Path | None = None
    """JSON file for the raw figures."""

    def run(self) -> None:
        """Measures and prints the tables."""
        console = Console(width=132)
        if self.quick:
            small = dataclasses.replace(self, rounds=2, candidates=2, quick=False)
            return small.run()
        if self.check:
            try:
                from torch_blockswap import Check
            except ImportError as e:
                sys.exit(f"--check needs PyTorch: {e}")
            if not Check(quick=self.rounds < 5).run():
                sys.exit("the potentials differ: nothing to compare")
        cores = sorted(os.sched_getaffinity(0))
        problem = _Problem(self)
        rows = [
            Row("engine", engine, self.batch, 1),
            Row("whole network", whole_network, self.batch, 1),
            Row("PyTorch tuned", torch_tuned, self.batch, 1),
            Row(PUBLISHED, torch_published, self.batch, 1),
            Row("engine", engine, self.small_batch, self.small_seeds),
            Row("PyTorch tuned", torch_tuned, self.small_batch, self.small_seeds),
        ]
        layouts = {f"one process, {len(cores)} threads": [set(cores)]} if self.threads else {}
        if len(cores) > 1:
            layouts[f"{len(cores)} processes, one core each"] = [{core} for core in cores]
        record: dict[str, Any] = {"bench": {**dataclasses.asdict(self), "out": None}}
        for layout, shares in layouts.items():
            # A program for each candidate is hopeless either way, and needs memory that the others lack.
            several = len(shares) > 1
            here = [row for row in rows if not (several and row.make is whole_network)]
            result = _measure(problem, here, shares, console)
            record[layout] = result
            _report(self, layout, here, result, problem, console)
        if self.out is not None:
            self.out.write_text(json.dumps(record, indent=1))
        return None


class _Problem:
    """Candidates, minibatches, multiply-accumulates."""

    def __init__(self, bench: Bench) -> None:
        import jax
        import jax.numpy as jnp

        from nnopt.core import Example, sites
        from nnopt.core.rewrite import rewrite_traced
        from nnopt.costs.counts import macs
        from nnopt.data import load, minibatch
        from nnopt.networks import named
        from nnopt.rewrites import Genotype
        from nnopt.search.sampler import BudgetSampler
        from nnopt.search.space import block_space

        self._bench = bench
        images, labels = minibatch(load("digits"), bench.batch, jax.random.key(bench.seed))
        self._images, self._labels = np.array(images), np.array(labels)
        example = Example(jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32))
        net = named(f"wrn-{bench.depth}-{bench.width}", 10)
        space = block_space(net, example)
        self._choices = space.choices
        sampler = BudgetSampler(space, bench.budget)
        count = bench.rounds * bench.candidates
        drawn = sampler.draws(bench.seed, range(count + 1)).tolist()
        first, *rest = (
            tuple(c[i] for c, i in zip(space.choices, indices, strict=True)) for indices in drawn
        )
        self.first: Candidate = first
        self.rounds = [rest[i : i + bench.candidates] for i in range(0, count, bench.candidates)]
        found = sites(net, example)
        some = rest[:: max(1, count // 8)]  # candidates within one budget differ little
        self.macs = float(
            np.mean([macs(rewrite_traced(found, Genotype(c)), example) for c in some])
        )

    def setting(self, row: Row, threads: int) -> Setting:
        """What a contender is given."""
        bench = self._bench
        return Setting(
            bench.depth,
            bench.width,
            self._choices,
            self._images[: row.batch],
            self._labels[: row.batch],
            row.seeds,
            threads,
        )


def _measure(
    problem: _Problem, rows: Sequence[Row], shares: Sequence[set[int]], console: Console
) -> dict[str, Any]:
    """Figures of each row by its number, and of each peak by its name."""
    peaks = [Row(name, make, 1, 1) for name, make in PEAKS.items()]
    runs: dict[Any, Processes] = {}
    missing: dict[str, str] = {}
    try:
        for key, row in (*enumerate(rows), *((p.name, p) for p in peaks)):
            setting = problem.setting(row, len(shares[0]))
            runs[key] = Processes(row.make, setting, shares, problem.first)
            if runs[key].missing:
                missing[row.name] = runs[key].missing
                runs.pop(key).close()
        for name, why in missing.items():
            console.print(f"{name} is left out: {why}", highlight=False)
        turns: dict[Any, list[Turn]] = {key: [] for key in runs}
        for done, candidates in enumerate(problem.rounds, start=1):
            for key, run in runs.items():
                turns[key].append(run.turn(candidates))
            if console.is_terminal:
                console.print(f"round {done} of {len(problem.rounds)}", end="\r")
        return {
            str(key): {
                "cold_seconds": runs[key].cold_seconds,
                "turns": [dataclasses.asdict(t) for t in turns[key]],
            }
            for key in runs
        }
    finally:
        for run in runs.values():
            run.close()


def _report(
    bench: Bench,
    layout: str,
    rows: Sequence[Row],
    result: dict[str, Any],
    problem: _Problem,
    console: Console,
) -> None:
    processes = 1 if layout.startswith("one") else int(layout.split()[0])
    reached = {}
    for name in [name for name in PEAKS if name in result]:
        per_turn = [np.reshape(t["scores"], (processes, 2)).sum(0) for t in result[name]["turns"]]
        conv, matmul = np.median(per_turn, axis=0)
        reached |= {f"convolution by {name}": conv, f"matrix product by {name}": matmul}
    best = max(reached, key=lambda k: reached[k])
    peak = reached[best]
    others = float(np.median([t["others"] for run in result.values() for t in run["turns"]]))
    numbers = [i for i in range(len(rows)) if str(i) in result]
    published = next((i for i in numbers if rows[i].name == PUBLISHED), None)

    def per_candidate(i: int, what: str = "seconds") -> np.ndarray:
        return np.array([t[what] for t in result[str(i)]["turns"]]) / bench.candidates

    console.print(
        f"\n[bold]{layout}[/bold]: {len(problem.rounds)} rounds of {bench.candidates} candidates, WRN-{bench.depth}-{bench.width}, "
        f"{bench.budget:,} parameters, {problem.macs / 1e6:.1f} M multiply-accumulates; "
        f"peak {peak:.0f} GFLOP/s ({best}); other processes took {others:.0%} of the cores",
        highlight=False,
    )
    if others > _QUIET:
        console.print(
            "The machine was busy: do not quote these figures. Threads that wait for each other suffer most."
        )
    same = [i for i in numbers if rows[i].seeds == 1 and rows[i].batch == bench.batch]
    default = [i for i in numbers if i not in same or i == published]
    for title, shown in (("same protocol", same), ("default setting", default)):
        table = Table(title=f"{title}; medians (quartiles below) over rounds", show_lines=True)
        for name in (
            "contender", "batch\nx seeds", "candidates\n/ s", "CPU s\neach", "times\npublished",
            "by CPU\ntime", "of\npeak", "cold\nstart s", "1000 in\nmin", "MB",
        ):  # fmt: skip
            table.add_column(name, justify="left" if name == "contender" else "right", no_wrap=True)
        for i in shown:
            row, seconds = rows[i], per_candidate(i)
            median = float(np.median(seconds))
            bound = 2 * 2 * problem.macs * row.batch * row.seeds / (peak * 1e9)
            cold = result[str(i)]["cold_seconds"]
            ratios = [
                "" if published is None
                else _quartiles(per_candidate(published, what) / per_candidate(i, what))
                for what in ("seconds", "cpu_seconds")
            ]  # fmt: skip
            table.add_row(
                row.name, row.setting, _quartiles(1 / seconds), _quartiles(per_candidate(i, "cpu_seconds")),
                *ratios, f"{bound / median:.0%}", f"{cold:.1f}", f"{(cold + 1000 * median) / 60:.1f}",
                f"{result[str(i)]['turns'][-1]['memory_mb']:.0f}",
            )  # fmt: skip
        console.print(table)


def _quartiles(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{median:.3g}\n{low:.2g}-{high:.2g}"


if __name__ == "__main__":
    tyro.cli(Bench).run()
