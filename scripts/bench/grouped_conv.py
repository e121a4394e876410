"""Grouped convolution: XLA's native lowering against the one of `nnopt.layers.Conv`, forward and gradients, interleaved.

    .venv/bin/python scripts/bench/grouped_conv.py [--batch 16]

Prints, for each shape, both medians in milliseconds and their ratio (above 1: `nnopt.layers.Conv` is faster). On a GPU or TPU both
are the same program. About one minute on two cores.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from nnopt.backends import measure, speedup
from nnopt.layers import Conv

SHAPES = ((32, 32, 4), (32, 32, 32), (64, 16, 8), (64, 16, 64), (128, 8, 16), (128, 8, 128))
"""Channels, height and width, groups: the 3x3 convolutions of WRN-40-2's blocks."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Compare lowerings of grouped convolution."""

    batch: int = 16
    """Images in a batch."""
    repeats: int = 15
    """Interleaved rounds."""

    def run(self) -> None:
        """Measures and prints the table."""
        table = Table(
            title=f"3x3 grouped convolution, batch {self.batch}, {jax.devices()[0].device_kind}"
        )
        for name in (
            "channels",
            "size",
            "groups",
            "pass",
            "native ms",
            "nnopt ms",
            "speed-up (quartiles)",
        ):
            table.add_column(name, justify="right")
        for channels, size, groups in SHAPES:
            x = jax.random.normal(jax.random.key(0), (self.batch, size, size, channels))
            for label, make in (("forward", _forward), ("gradients", _gradients)):
                runs = {
                    "native": make(nn.Conv(channels, (3, 3), feature_group_count=groups), x),
                    "nnopt": make(Conv(channels, (3, 3), feature_group_count=groups), x),
                }
                times = measure(runs, repeats=self.repeats)
                ratio = speedup(times["native"], times["nnopt"])
                table.add_row(
                    str(channels), str(size), str(groups), label,
                    f"{times['native'].median_ms:.2f}", f"{times['nnopt'].median_ms:.2f}",
                    f"{ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
                )  # fmt: skip
        Console(width=100).print(table)


def _forward(layer, x):
    variables = layer.init(jax.random.key(1), x)
    run = jax.jit(lambda v, x: layer.apply(v, x))
    return lambda: run(variables, x)


def _gradients(layer, x):
    """Gradients of kernel and input."""
    variables = layer.init(jax.random.key(1), x)
    run = jax.jit(jax.grad(lambda v, x: jnp.sum(layer.apply(v, x) ** 2), argnums=(0, 1)))
    return lambda: run(variables, x)


if __name__ == "__main__":
    tyro.cli(Bench).run()
