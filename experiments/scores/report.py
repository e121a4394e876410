"""What the scores are worth: tables for the terminal and pictures, ours beside the published figures."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments.scores.correlation import (
    Estimate,
    best_of,
    equal_count_bins,
    estimate,
    kendall,
    spearman,
)
from nnopt.core.files import write_whole

_BLUE, _RED, _GREY = "#3b6ea5", "#c8442b", "#8a8f98"

PUBLISHED_SPEARMAN = {
    "grad_norm": 0.594,
    "snip": 0.596,
    "grasp": 0.514,
    "layer_fisher": 0.36,
    "synflow": 0.737,
    "jacob_cov": 0.731,
}
"""Abdelfattah et al., https://arxiv.org/abs/2101.08134, as their code gives them: CIFAR-10, batch 64, all 15,625 cells."""

PUBLISHED_KENDALL = {"naswot": 0.574}
"""Mellor et al., https://arxiv.org/abs/2006.04647: CIFAR-10, batch 128."""

BINS = 10
"""Bins of equal cost: each holds a tenth of the networks."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How well one score ranks networks by accuracy.

    Attributes:
        score: its name.
        spearman: over all networks.
        kendall: over all networks.
        by_parameters: mean Spearman within bins of equal parameters.
        by_flops: mean Spearman within bins of equal FLOPs.
        not_finite: networks for which the score is NaN or infinite.
    """

    score: str
    spearman: Estimate
    kendall: Estimate
    by_parameters: Estimate
    by_flops: Estimate
    not_finite: int


def rank(
    scores: Mapping[str, np.ndarray],
    accuracies: np.ndarray,
    parameters: np.ndarray,
    flops: np.ndarray,
    resamples: int = 1000,
) -> list[Ranking]:
    """Rank correlations of each score.

    Args:
        scores: name -> `[n]`.
        accuracies: `[n]`.
        parameters: `[n]`.
        flops: `[n]`.
        resamples: of the bootstrap.

    Returns:
        One ranking a score, best Spearman first.
    """
    number = min(BINS, len(accuracies) // 5)
    parameter_bins = equal_count_bins(parameters, number)
    flop_bins = equal_count_bins(flops, number)
    rankings = []
    for name, values in scores.items():
        # The same resamples for every score, so that differences between scores are not noise of the draw.
        def of(statistic, bins=None, values=values):  # type: ignore[no-untyped-def]
            rng = np.random.default_rng(0)
            return estimate(statistic, values, accuracies, rng, bins, resamples)

        rankings.append(
            Ranking(
                name,
                of(spearman),
                of(kendall),
                of(spearman, parameter_bins),
                of(spearman, flop_bins),
                int((~np.isfinite(values)).sum()),
            )
        )
    return sorted(rankings, key=lambda r: -r.spearman.value)


def table(
    title: str,
    rankings: Sequence[Ranking],
    published_spearman: Mapping[str, float] | None = None,
    published_kendall: Mapping[str, float] | None = None,
) -> Table:
    """All rankings, beside what is published of the benchmark."""
    made = Table(title=title, title_justify="left")
    made.add_column("score")
    for kind, figures in (("Spearman", published_spearman), ("Kendall", published_kendall)):
        made.add_column(kind, justify="right")
        if figures is not None:
            made.add_column("publ.", justify="right")
    for cost in ("parameters", "FLOPs"):
        made.add_column(f"Spearman at equal {cost}", justify="right")
    made.add_column("not finite", justify="right")
    for r in rankings:
        cells = [r.score]
        for value, figures in ((r.spearman, published_spearman), (r.kendall, published_kendall)):
            cells.append(str(value))
            if figures is not None:
                cells.append(f"{figures[r.score]:+.3f}" if r.score in figures else "")
        made.add_row(*cells, str(r.by_parameters), str(r.by_flops), str(r.not_finite or ""))
    return made


def search_table(title: str, scores: Mapping[str, np.ndarray], accuracies: np.ndarray) -> Table:
    """Expected accuracy of the best-scored of 10, 100 and 1,000 random networks."""
    made = Table(title=title, title_justify="left", caption="expected test accuracy, %")
    draws = [n for n in (1, 10, 100, 1000) if n <= len(accuracies)]
    for heading in ("score", *(f"best of {n:,}" for n in draws)):
        made.add_column(heading, justify="left" if heading == "score" else "right")
    for name, values in scores.items():
        made.add_row(name, *(f"{best_of(values, accuracies, n):.2f}" for n in draws))
    return made


def write_csv(path: pathlib.Path, rankings: Sequence[Ranking]) -> None:
    """The rankings, one line a score."""
    kinds = ("spearman", "kendall", "by_parameters", "by_flops")
    columns = [f"{kind}{end}" for kind in kinds for end in ("", "_low", "_high")]
    lines = [",".join(["score", *columns, "not_finite"])]
    for r in rankings:
        estimates = [getattr(r, kind) for kind in kinds]
        figures = [f"{v:.4f}" for e in estimates for v in (e.value, e.low, e.high)]
        lines.append(",".join([r.score, *figures, str(r.not_finite)]))
    write_whole(path, "\n".join(lines) + "\n")


def nasbench201_picture(rankings: Sequence[Ranking], cells: int) -> Figure:
    """Bars of our Spearman and Kendall correlations with their intervals, published figures as diamonds."""
    figure = Figure(figsize=(9.2, 1.2 + 0.34 * len(rankings)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, "Spearman", "spearman", PUBLISHED_SPEARMAN),
        (right, "Kendall", "kendall", PUBLISHED_KENDALL),
    )
    for axes, heading, kind, figures in panels:
        _bars(axes, [getattr(r, kind) for r in rankings], _BLUE, "ours, 95 % interval")
        marked = [(figures[r.score], i) for i, r in enumerate(rankings) if r.score in figures]
        axes.scatter(
            [v for v, _ in marked], [i for _, i in marked],
            marker="D", s=34, color=_RED, edgecolors="white", linewidths=0.8, zorder=4, label="published, all cells",
        )  # fmt: skip
        axes.set_xlabel(f"{heading} correlation with test accuracy")
    left.set_yticks(range(len(rankings)), [r.score for r in rankings], fontsize=9)
    left.set_ylim(len(rankings) - 0.4, -0.6)
    figure.suptitle(f"NAS-Bench-201, CIFAR-10, {cells:,} cells", x=0.01, ha="left")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def nasbench_macro_picture(rankings: Sequence[Ranking], networks: int) -> Figure:
    """Bars of Spearman correlations: over all networks, and within bins of equal parameters and FLOPs."""
    figure = Figure(figsize=(9.2, 1.2 + 0.34 * len(rankings)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    kinds = (
        ("spearman", "all networks", _BLUE),
        ("by_parameters", "at equal parameters", _RED),
        ("by_flops", "at equal FLOPs", _GREY),
    )
    for axes, (kind, heading, colour) in zip(panels, kinds, strict=True):
        _bars(axes, [getattr(r, kind) for r in rankings], colour, heading)
        axes.set_title(heading, fontsize=10, loc="left")
        axes.set_xlabel("Spearman correlation")
    panels[0].set_yticks(range(len(rankings)), [r.score for r in rankings], fontsize=9)
    panels[0].set_ylim(len(rankings) - 0.4, -0.6)
    figure.suptitle(f"NAS-Bench-Macro, CIFAR-10, {networks:,} networks", x=0.01, ha="left")
    return figure


def _bars(axes, estimates: Sequence[Estimate], colour: str, label: str) -> None:  # type: ignore[no-untyped-def]
    values = np.array([e.value for e in estimates])
    # A percentile interval need not hold the estimate itself.
    spread = np.clip(
        [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]], 0, None
    )
    axes.barh(
        range(len(values)), values, xerr=spread, color=colour, height=0.62, label=label,
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333"},
    )  # fmt: skip
    axes.axvline(0, color="#333", linewidth=0.8)
    axes.set_xlim(min(-0.25, values.min() - 0.15), 1)
    axes.grid(True, axis="x", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
