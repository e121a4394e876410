"""Latency tables as tables for the terminal."""

import dataclasses
from typing import Any

from rich.table import Table
from rich.text import Text

from nnopt.backends.prediction import Predictor, pairs
from nnopt.backends.table import SetupTimes
from nnopt.reports.latency import setup_text
from nnopt.scores.agreement import Interval
from nnopt.search.accuracy import Accuracy, accuracy


def parts_table(times: SetupTimes, top: int) -> Table:
    """The slowest parts of a set-up.

    Args:
        times: of the set-up.
        top: rows at most.
    """
    rows = times.parts()
    predictor = Predictor.of(times)
    slow = sorted(rows.values(), key=lambda row: -predictor.parts[row.workload])
    table = Table(title=Text(f"{times.table.path.name}: {times.backend}", style="table.title"), title_justify="left")  # fmt: skip
    table.caption_justify = "left"
    table.add_column("part", overflow="fold")
    table.add_column("ms", justify="right", no_wrap=True)
    for row in slow[:top]:
        table.add_row(Text(row.label), f"{predictor.parts[row.workload]:.3g}")
    if len(slow) > top:
        table.add_row(f"and {len(slow) - top} more", "")
    line = predictor.fit
    caption = f"{setup_text(times.setup)}. {len(rows)} parts. "
    if line.networks:
        caption += (
            f"Latency of a network = {line.intercept_ms:.3g} ms + {line.slope:.3g} x sum of its parts, "
            f"fitted to {line.networks} measured networks."
        )
    else:
        caption += "Latency of a network = sum of its parts: no networks were measured for a fit."
    table.caption = Text(caption, style="table.caption")
    return table


def checked(times: SetupTimes) -> Accuracy | None:
    """How well the candidates that a table was checked with are predicted; None if there are fewer than two."""
    predicted, measured = pairs(times, "check")
    return accuracy(predicted, measured) if len(predicted) > 1 else None


def accuracy_table(times: SetupTimes, found: Accuracy) -> Table:
    """Errors and rank correlations.

    Args:
        times: of the set-up.
        found: what was found out about it.
    """
    title = f"{found.candidates} random candidates, predicted against measured, {times.backend}"
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    table.caption_justify = "left"
    for name in ("", "value", "95% interval"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    error = found.error
    table.add_row(
        "median absolute error", f"{error.value:.1%}", f"{error.low:.1%} to {error.high:.1%}"
    )
    table.add_row("largest error", f"{found.worst:.1%}", "")
    table.add_row("Spearman", f"{found.spearman.value:.3f}", _interval(found.spearman))
    table.add_row("Kendall", f"{found.kendall.value:.3f}", _interval(found.kendall))
    table.caption = Text(
        "All times are at one speed of the machine, by a reference timed beside each.",
        style="table.caption",
    )
    return table


def accuracy_json(times: SetupTimes, found: Accuracy) -> dict[str, Any]:
    """Everything about a check, as JSON values."""
    predicted, measured = pairs(times, "check")
    return {
        "backend": times.backend,
        "setup": times.setup.to_json(),
        "fit": dataclasses.asdict(Predictor.of(times).fit),
        "accuracy": dataclasses.asdict(found),
        "predicted_ms": predicted.tolist(),
        "measured_ms": measured.tolist(),
    }


def _interval(of: Interval) -> str:
    return f"{of.low:.3f} to {of.high:.3f}"
