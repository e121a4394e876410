"""Lowerings of convolutions, each against XLA's own and against PyTorch's: forward, input gradient, weight gradient.

    .venv/bin/python scripts/bench/lowering.py [--quick] [--batch 16] [--threads 1] [--every]

The 3x3 convolutions of wide residual networks' block substitutes (BlockSwap, https://arxiv.org/abs/1906.04113): 128 channels at 8
pixels up to 32 at 32, and the narrower ones of bottlenecks, strides of 1 and 2, in all numbers of groups, and dense. Each
convolution is a program of its own, kernels prepared beforehand.

A row is one product of one convolution: XLA's own form in milliseconds, then the lowering that `nnopt.layers.choose` takes, the
fastest of the others (`--every` prints all), PyTorch with contiguous and channels-last arrays, and how many times as fast as the
better of PyTorch's and as XLA's own the chosen one is (above 1: nnopt is faster). Medians of interleaved rounds in one process;
what takes over 50 times the fastest is timed once. With one thread processor seconds are counted, which other programs on the
machine disturb little.

Then the figures to watch: the geometric mean over grouped convolutions of PyTorch's time over ours (forward and input gradient
together), the shape where we are furthest behind, and the weight gradient of grouped convolutions against that of
the dense one of the same channels.

Without PyTorch its columns are left out. On a CPU that does nothing else; on a GPU or TPU all but XLA's own is untuned. 8 minutes
on one core, 2 with `--quick`.
"""

import collections
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from nnopt.layers import ConvShape, Direction, Lowering

TOO_SLOW = 50
TILES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4))


@dataclasses.dataclass(frozen=True)
class Bench:
    """Compare lowerings of convolutions."""

    batch: int = 16
    """Images in a batch."""
    threads: int = 1
    """Processor cores to use; scoring runs one process for each core."""
    repeats: int = 9
    """Interleaved rounds."""
    quick: bool = False
    """Few shapes, three rounds."""
    every: bool = False
    """Print every lowering, not just the chosen and the fastest other."""
    torch: bool = True
    """Compare with PyTorch, if it is installed."""

    def run(self) -> None:
        """Measures and prints."""
        # XLA has as many threads as the process has cores when JAX starts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-self.threads :])
        import jax

        torch = _torch(self.threads) if self.torch else None
        console = Console(width=150)
        if self.torch and torch is None:
            console.print("PyTorch is not installed: its columns are left out")
        title = f"3x3 convolutions, batch {self.batch}, {self.threads} thread(s), {jax.devices()[0].device_kind}, milliseconds"
        table = Table(title=title)
        for name in (
            "convolution", "product", "XLA", "chosen", "", "best other", "",
            "torch", "torch cl", "x torch", "x XLA",
        ):  # fmt: skip
            table.add_column(name, justify="right", no_wrap=True)
        rows: dict[ConvShape, dict[Direction, dict[str, float]]] = {}
        for shape in _shapes(self.batch, self.quick):
            rows[shape] = {}
            for direction, times, chosen in self._products(shape, torch):
                rows[shape][direction] = times
                self._print(table, shape, direction, times, chosen)
            console.print(f"[dim]{_label(shape)}[/dim]")
        console.print(table)
        _summary(rows, console)

    def _products(
        self, shape: "ConvShape", torch: Any
    ) -> Iterator[tuple["Direction", dict[str, float], str]]:
        import jax
        import jax.numpy as jnp

        from nnopt.layers import Direction, choose

        platform = jax.default_backend()
        one = self.threads == 1 and platform == "cpu"
        clock = time.process_time if one else time.perf_counter
        for direction in Direction:
            rng = np.random.default_rng(0)
            first, second = (
                jnp.asarray(rng.normal(size=s), jnp.float32) for s in shape.operands(direction)
            )
            chosen = choose(shape, direction, platform, alone=True)
            calls: dict[str, Callable[[], Any]] = {}
            for lowering in dict.fromkeys((chosen, *_candidates(shape, direction))):
                calls[str(lowering)] = _call(lowering, shape, direction, first, second)
            if torch is not None:
                calls |= _torch_calls(torch, shape, direction)
            times = _interleaved(calls, 3 if self.quick else self.repeats, clock)
            times["chosen"] = times[str(chosen)]
            yield direction, times, str(chosen)

    def _print(
        self,
        table: Table,
        shape: "ConvShape",
        direction: "Direction",
        times: dict[str, float],
        chosen: str,
    ) -> None:
        mine = times["chosen"]
        others = {
            k: v for k, v in times.items() if k not in (chosen, "chosen", "Native()") and "torch" not in k
        }  # fmt: skip
        ranked = sorted(others, key=lambda k: others[k]) or [""]
        torch = [times[k] for k in ("torch", "torch cl") if k in times]
        for i, other in enumerate(ranked if self.every else ranked[:1]):
            cells = (
                _label(shape),
                direction.value,
                f"{times['Native()']:.3f}",
                _short(chosen),
                f"{mine:.3f}",
            )
            ratios = (
                *(f"{t:.3f}" for t in torch or ("", "")),
                f"{min(torch) / mine:.2f}" if torch else "",
                f"{times['Native()'] / mine:.1f}",
            ) if torch else ("", "", "", f"{times['Native()'] / mine:.1f}")  # fmt: skip
            found = (_short(other), f"{others[other]:.3f}" if other else "")
            table.add_row(*(cells if i == 0 else ("",) * 5), *found, *(ratios if i == 0 else ()))


def _shapes(batch: int, quick: bool) -> "list[ConvShape]":
    from nnopt.layers import ConvShape

    channels = (
        ((64, 16), (128, 8))
        if quick
        else ((32, 32), (64, 16), (128, 8), (16, 32), (32, 16), (64, 8), (8, 32), (16, 16), (32, 8))
    )
    found = []
    for stride, (width, size) in ((s, c) for s in (1, 2) for c in channels):
        if stride == 2 and size == 8:
            continue
        each = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < width] + [width]
        for inner in each[:: 2 if quick else 1]:
            found.append(
                ConvShape(
                    (batch, size, size, width),
                    (3, 3, inner, width),
                    (stride, stride),
                    ((1, 1), (1, 1)),
                    groups=width // inner,
                )
            )
    return found


def _candidates(shape: "ConvShape", direction: "Direction") -> "list[Lowering]":
    """What may be worth trying: no part narrower than eight channels, no tile that makes over 64 columns."""
    from nnopt.layers import Direction, Native, ShiftedPlanes, ShiftedSum, SplitGroups

    inner, channels = shape.kernel[2], shape.input[3]
    found: list[Lowering] = [Native()]
    if inner <= 2 or (inner <= 8 and shape.strides != (1, 1)):
        found.append(ShiftedSum())
    if 2 <= inner <= 4:
        found.append(ShiftedPlanes())
    for parts in (1, 2, 4, 8, 16):
        width = channels // parts
        if shape.groups % parts or (width < max(inner, 8) and parts > 1):
            continue
        for tile in TILES:
            columns = width * math.prod(tile)
            if direction is Direction.INPUT_GRADIENT:
                columns *= math.prod(shape.strides)
            useless = direction is Direction.WEIGHT_GRADIENT or not 16 <= columns <= 64
            if tile == (1, 1) or not (useless or inner == 1):
                found.append(SplitGroups(parts, tile))
    return [lowering for lowering in found if lowering.applies(shape, direction)]


def _call(
    lowering: "Lowering", shape: "ConvShape", direction: "Direction", first: Any, second: Any
) -> Callable[[], Any]:
    import jax

    prepared = jax.jit(lambda k: lowering.prepare(shape, direction, k))(second)
    run = jax.jit(lambda x, *p: lowering.run(shape, direction, x, p))
    compiled = run.lower(first, *prepared).compile()
    return lambda: compiled(first, *prepared).block_until_ready()


def _torch(threads: int) -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch


def _torch_calls(
    torch: Any, shape: "ConvShape", direction: "Direction"
) -> dict[str, Callable[[], Any]]:
    from nnopt.layers import Direction

    batch, height, width, channels = shape.input
    calls = {}
    for name, layout in (("torch", torch.contiguous_format), ("torch cl", torch.channels_last)):
        x = torch.randn(batch, channels, height, width).to(memory_format=layout)
        kernel = torch.randn(shape.kernel[3], shape.kernel[2], *shape.kernel[:2])
        kernel = kernel.to(memory_format=layout)
        options = (list(shape.strides), [1, 1], [1, 1], False, [0, 0], shape.groups)
        y = torch.conv2d(x, kernel, None, shape.strides, 1, 1, shape.groups)
        gradient = torch.randn_like(y)
        wanted = [direction is Direction.INPUT_GRADIENT, direction is Direction.WEIGHT_GRADIENT]

        def forward(x=x, kernel=kernel):
            return torch.conv2d(x, kernel, None, shape.strides, 1, 1, shape.groups)

        def backward(x=x, kernel=kernel, gradient=gradient, wanted=wanted, options=options):
            return torch.ops.aten.convolution_backward(
                gradient, x, kernel, None, *options, [*wanted, False]
            )

        calls[name] = forward if direction is Direction.FORWARD else backward
    return calls


def _interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Medians in milliseconds; what is far slower than the fastest is not called again."""

    def sample(call: Callable[[], Any], times: int) -> float:
        if times > 1:
            # Wakes the threads that slept while the others' ran.
            call()
        began = clock()
        for _ in range(times):
            call()
        return 1e3 * (clock() - began) / times

    once = {name: min(sample(call, 1), sample(call, 1)) for name, call in calls.items()}
    limit = TOO_SLOW * min(once.values())
    samples: dict[str, list[float]] = collections.defaultdict(list)
    names = [name for name in calls if once[name] <= limit]
    for i in range(repeats):
        # Each starts once in a while: what runs first finds the caches full of another library's arrays.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times = max(2, math.ceil(3 / max(once[name], 1e-3)))
            samples[name].append(sample(calls[name], times))
    return {name: float(np.median(samples.get(name, [once[name]]))) for name in calls}


def _label(shape: "ConvShape") -> str:
    stride = " /2" if shape.strides != (1, 1) else ""
    return f"{shape.input[3]} at {shape.input[1]}{stride}, {shape.groups} x {shape.kernel[2]}"


def _short(lowering: str) -> str:
    return (
        lowering.replace("parts=", "").replace("tile=", "").replace(", loop=False", "")
        .replace(", (1, 1)", "").replace("SplitGroups", "Split").replace("()", "")
    )  # fmt: skip


def _summary(rows: "dict[ConvShape, dict[Direction, dict[str, float]]]", console: Console) -> None:
    from nnopt.layers import Direction

    both = (Direction.FORWARD, Direction.INPUT_GRADIENT)
    grouped = {shape: row for shape, row in rows.items() if shape.groups > 1}
    against_torch = {
        shape: min(sum(row[d][k] for d in both) for k in ("torch", "torch cl"))
        / sum(row[d]["chosen"] for d in both)
        for shape, row in grouped.items()
        if "torch" in row[Direction.FORWARD]
    }
    if against_torch:
        mean = math.exp(float(np.mean(np.log(list(against_torch.values())))))
        worst = min(against_torch, key=lambda s: against_torch[s])
        console.print(
            f"grouped, forward + input gradient: {mean:.2f} times as fast as PyTorch's better layout (geometric mean of "
            f"{len(against_torch)}); worst {against_torch[worst]:.2f} ({_label(worst)})"
        )
    for name, kept in (("depthwise", True), ("other grouped", False)):
        for direction in Direction:
            found = {
                s: row[direction]["Native()"] / row[direction]["chosen"]
                for s, row in grouped.items()
                if (s.kernel[2] == 1) is kept
            }
            mean = math.exp(float(np.mean(np.log(list(found.values())))))
            low = min(found, key=lambda s: found[s])
            console.print(
                f"{name}, {direction.value}: {mean:.1f} times as fast as XLA's own (geometric mean); "
                f"least {found[low]:.1f} ({_label(low)})"
            )
    dense = {(s.input, s.strides): row for s, row in rows.items() if s.groups == 1}
    weight = {
        s: row[Direction.WEIGHT_GRADIENT]["chosen"]
        / dense[s.input, s.strides][Direction.WEIGHT_GRADIENT]["chosen"]
        for s, row in grouped.items()
        if (s.input, s.strides) in dense
    }
    if weight:
        worst = max(weight, key=lambda s: weight[s])
        console.print(
            f"grouped weight gradients take {weight[worst]:.2f} times the dense one at most ({_label(worst)})"
        )


if __name__ == "__main__":
    sys.exit(tyro.cli(Bench, description=__doc__).run())
