"""Rankings as tables for the terminal, and as rows for a file."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from nnopt.core.files import write_whole
from nnopt.errors import ResultFolderError
from nnopt.search.ranking import Comparison, Ranking, Scored


def ranking_table(
    ranking: Ranking,
    title: str,
    what: str,
    names: Sequence[str],
    parameters: Sequence[int],
    top: int,
) -> Table:
    """The best `top` candidates, with what is known about their ranks."""
    repeats, confidence = ranking.repeats, ranking.confidence
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column(what, justify="left" if what == "network" else "right", overflow="fold")
    for name in ("parameters", "score", "spread", "95% of ranks", "best"):
        table.add_column(name, justify="right")
    ranks = repeats.ranks
    for i in ranking.order[:top]:
        usable = not repeats.unusable[i]
        spread, best = ranking.spread[i], confidence.best[i]
        low, high = math.floor(confidence.low[i]) + 1, math.ceil(confidence.high[i]) + 1
        unknown = confidence.says_nothing
        table.add_row(
            f"{ranks[i] + 1:g}",
            Text(names[i]),
            f"{parameters[i]:,}",
            f"{repeats.score[i]:.4g}" if usable else Text("not finite", style="red"),
            _spread(spread, repeats.geometric),
            "-" if unknown else f"{low}" if low == high else f"{low}-{high}",
            "-" if unknown else f"{best:.0%}",
        )
    table.caption = Text(_caption(ranking, len(names) - top), style="table.caption")
    table.caption_justify = "left"
    return table


def _spread(value: float, geometric: bool) -> str:
    if not math.isfinite(value):
        return "-"
    if not geometric:
        return f"{value:.3g}"
    factor = math.exp(min(value, 700.0))  # beyond is no float
    return f"x{factor:.2f}" if factor < 1000 else f"x{factor:.1e}"


def _caption(ranking: Ranking, more: int) -> str:
    repeats = ranking.repeats
    seeds = repeats.scores.shape[1]
    parts = []
    if more > 0:
        parts.append(f"{more:,} more are not shown.")
    bad = int((repeats.unusable > 0).sum())
    if bad:
        kind = "positive finite" if repeats.geometric else "finite"
        has = "candidate has" if bad == 1 else "candidates have"
        parts.append(
            f"{bad:,} {has} a score that is no {kind} number with some seed and {'is' if bad == 1 else 'are'} ranked last."
        )
    if seeds == 1:
        parts.append(
            "One seed: nothing can be said about how sure this ranking is; give --seeds 2 or more."
        )
        return " ".join(parts)
    mean = "geometric" if repeats.geometric else "arithmetic"
    parts.append(f"Score: {mean} mean of {seeds} seeds; higher is better.")
    if math.isfinite(ranking.noise):
        noise = _spread(ranking.noise, repeats.geometric)
        difference = _spread(ranking.difference, repeats.geometric)
        parts.append(
            f"Spread: between seeds, without what moves all alike; "
            f"{noise} over all, while candidates differ by {difference}."
        )
    parts.append("Best: probability of being it. Ranks and probabilities: bootstrap over seeds.")
    return " ".join(parts)


def fidelity_table(rows: Sequence[Comparison], candidates: int, workers: int) -> Table:
    """How well each setting ranks."""
    title = f"How well settings rank: {candidates} candidates against a consensus of other seeds"
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    top = f"top {rows[0].top}"
    for name in ("batch x seeds", "s each", "against", "Spearman", "its best", top):
        table.add_column(name, justify="right")
    for row in rows:
        rho = row.spearman
        table.add_row(
            f"{row.setting.batch} x {len(row.setting.seeds)}",
            f"{row.seconds:.3f}",
            f"{row.yardstick} seed{'s' if row.yardstick > 1 else ''}",
            Text(f"{rho.value:.3f} [{rho.low:.2f}, {rho.high:.2f}]"),
            f"no. {row.best_rank + 1:.1f}",
            f"{row.overlap:.1f}",
        )
    beside = f", {workers} processes side by side" if workers > 1 else ""
    table.caption = Text(
        f"Against: the mean logarithm of that many reference seeds of batch {rows[-1].setting.batch}, none of them the setting's; "
        "where there is a choice of seeds, means over all. Intervals: 95%, bootstrap over candidates. "
        f"Seconds: median a candidate, all compiled{beside}.",
        style="table.caption",
    )
    table.caption_justify = "left"
    return table


def csv_rows(
    score: str,
    ranking: Ranking,
    scored: Scored,
    parameters: Sequence[int],
    cells: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each candidate, the best first; what is not known is empty."""
    repeats, confidence = ranking.repeats, ranking.confidence
    rows = []
    for i in ranking.order:
        row = {
            "score": score,
            "rank": repeats.ranks[i] + 1,
            **cells[i],
            "parameters": parameters[i],
            "mean": repeats.score[i],
            "spread": ranking.spread[i],
            "rank_low": math.nan if confidence.says_nothing else confidence.low[i] + 1,
            "rank_high": math.nan if confidence.says_nothing else confidence.high[i] + 1,
            "probability_best": confidence.best[i],
            f"probability_top_{confidence.top}": confidence.in_top[i],
            "unusable_seeds": int(repeats.unusable[i]),
            "seconds": scored.seconds[i],
        }
        numbers = zip(scored.setting.seeds, repeats.scores[i], strict=True)
        rows.append(row | {f"seed_{s}": str(float(value)) for s, value in numbers})
    return rows


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal keys, complete or not at all; what is NaN is empty.

    Raises:
        ResultFolderError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(value) for k, value in row.items()})
    try:
        write_whole(path, text.getvalue())
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it names no file"
        raise ResultFolderError(
            f"cannot write {path}: {reason}; give another path with --out"
        ) from e


def _cell(value: Any) -> str:
    if isinstance(value, float):  # NumPy's as well, whose repr names its type
        return "" if math.isnan(value) else repr(float(value))
    return str(value)
