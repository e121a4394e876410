"""Curves of families of networks, in the same colours in every picture."""

from collections.abc import Iterable, Sequence
from typing import Any

COLOURS = {
    "depth": "#0b6e4f",
    "width": "#1d9a6c",
    "bottleneck": "#e09f3e",
    "bottleneck x 8": "#b5651d",
    "Fisher": "#9e2a2b",
    "L1": "#c65b7c",
    "random": "#7a7a7a",
    "Fisher, tuned": "#9e2a2b",
    "L1, tuned": "#c65b7c",
    "Fisher, from scratch": "#355070",
    "L1, from scratch": "#6d597a",
    "Fisher profile": "#540b0e",
}
SCALED = ("depth", "width", "bottleneck", "bottleneck x 8")
"""Schemes that scale, drawn solid; those that prune are dashed."""


def curves(axes: Any, schemes: Iterable[str], points: Sequence[tuple[str, int, float]]) -> None:
    """A curve for each scheme, from its smallest member to the base network.

    Args:
        axes: of matplotlib.
        schemes: in the order of the legend.
        points: (scheme, parameters, what is drawn against them) of each network, the base among them as scheme `base`.
    """
    for scheme in schemes:
        line = sorted((count / 1e6, value) for s, count, value in points if s in (scheme, "base"))
        axes.plot(
            *zip(*line, strict=True), "-" if scheme in SCALED else "--",
            marker="o", ms=3.5, lw=1.4, color=COLOURS[scheme], label=scheme,
        )  # fmt: skip
    axes.set_xlabel("parameters, millions")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, which="both")
