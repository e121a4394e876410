"""The report of a BlockSwap search: tables for the terminal, pictures, and one self-contained HTML page."""

import base64
import html
import io
import math
import pathlib
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnopt.core.files import write_whole
from nnopt.rewrites import choice
from nnopt.search.blockswap import best, not_finite
from nnopt.search.folders import writing_to
from nnopt.search.run import SearchResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _RED, _GREY = "#3b6ea5", "#c8442b", "#8a8f98"


def write_report(result: SearchResult) -> pathlib.Path:
    """Writes `table.txt`, `score.png`, `winner.png` and `report.html` into the result folder.

    Returns:
        The path of the HTML page.

    Raises:
        ResultFolderError: the folder cannot be written.
    """
    folder = result.folder
    text = render(summary_table(result), width=78) + "\n" + render(block_table(result), width=78)
    pictures = {
        "score.png": _png(score_picture(result)),
        "winner.png": _png(winner_picture(result)),
    }
    page = folder / "report.html"
    with writing_to(folder):
        write_whole(folder / "table.txt", text)
        for name, data in pictures.items():
            write_whole(folder / name, data)
        write_whole(page, _page(result, pictures))
    return page


def summary_table(result: SearchResult) -> Table:
    """Base network and winner side by side: parameters, multiply-accumulates, latency, accuracy, score."""
    s = result.summary
    base, winner = s["base"], s["winner"]
    table = Table(title=Text(_title(s), style="table.title"), title_justify="left")
    for name, justify in (("", "left"), ("base", "right"), ("winner", "right"), ("ratio", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for label, key in (("parameters", "parameters"), ("multiply-accumulates", "macs")):
        table.add_row(
            label, f"{base[key]:,}", f"{winner[key]:,}", f"{base[key] / winner[key]:.2f}x fewer"
        )
    for batch, row in s["latency"].items():
        cells = [_milliseconds(row[name]) for name in ("base", "winner")]
        ratio = row["speedup"]
        table.add_row(
            f"latency, batch {batch}",
            *cells,
            f"{ratio['median']:.2f}x faster"
            if ratio["median"] >= 1
            else f"{1 / ratio['median']:.2f}x slower",
        )
    table.add_row("Fisher potential", "", f"{winner['score']:.4g}", "")
    table.add_row("test accuracy", "", f"{s['training']['test_accuracy']:.2%}", "")
    note = unranked(result)
    if any(row[n]["below_overhead"] for row in s["latency"].values() for n in ("base", "winner")):
        note += "* a call takes less than 20 times what calling takes. "
    # A Text, because a string would be searched for markup such as [bold].
    table.caption = Text(
        f"Latency: median on XLA, {_device(s)}, weights constant, interleaved. {note}"
        f"Accuracy: {s['training']['measured_on']}",
        style="table.caption",
    )
    table.caption_justify = "left"
    return table


def unranked(result: SearchResult) -> str:
    """How many candidates have no finite score, as a sentence and a space; nothing if all have one."""
    # Counted in the rows: folders of older searches do not say.
    count = not_finite(result.rows)
    if not count:
        return ""
    return f"{count:,} of {len(result.rows):,} candidates have a score that is not finite: they rank nothing. "


def block_table(result: SearchResult) -> Table:
    """The winner's block at each position, with parameters and share of the score."""
    winner = result.summary["winner"]
    table = Table(title="The winner, block by block", title_justify="left")
    table.add_column("position")
    table.add_column("block")
    table.add_column("parameters", justify="right")
    table.add_column("share of score", justify="right")
    total = sum(winner["block_scores"]) or 1.0
    for position, name, cost, score in zip(
        result.summary["space"]["positions"],
        winner["blocks"],
        winner["block_parameters"],
        winner["block_scores"],
        strict=True,
    ):
        table.add_row(Text(position), Text(name), f"{cost:,}", f"{score / total:.1%}")
    return table


def score_picture(result: SearchResult) -> "Figure":
    """Fisher potential against parameters, one dot for each candidate of finite score, the winner marked."""
    from matplotlib.figure import Figure

    spec = result.summary["search"]
    top = best(result.rows)
    rows = [r for r in result.rows if math.isfinite(r.score)]
    missing = len(result.rows) - len(rows)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    budget, tolerance = spec["budget"], spec["tolerance"]
    axes.axvspan(
        budget * (1 - tolerance) / 1e3, budget * (1 + tolerance) / 1e3, color=_GREY, alpha=0.12, lw=0,
        label=f"budget ± {tolerance:.1%}",
    )  # fmt: skip
    axes.scatter(
        [r.parameters / 1e3 for r in rows],
        [r.score for r in rows],
        s=22, color=_BLUE, alpha=0.7, linewidths=0,
        label=f"{len(rows):,} candidates" + (f", {missing:,} more not finite" if missing else ""),
    )  # fmt: skip
    axes.scatter(
        [top.parameters / 1e3], [top.score], s=170, marker="*", color=_RED, zorder=3,
        label=f"winner: {top.score:.3g} at {top.parameters:,} parameters",
    )  # fmt: skip
    lowest, highest = (
        min((r.score for r in rows), default=0),
        max((r.score for r in rows), default=0),
    )
    if 0 < 10 * lowest < highest:  # a logarithmic axis within one decade has hardly a tick
        axes.set_yscale("log")
    axes.set_xlabel("parameters (thousands)")
    axes.set_ylabel("Fisher potential (higher is better)")
    axes.set_title(f"BlockSwap on {spec['network']}, {spec['data']}", loc="left")
    axes.grid(True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def winner_picture(result: SearchResult) -> "Figure":
    """The winner's block at each position: its share of the score, and its parameters."""
    from matplotlib.figure import Figure

    winner, positions = result.summary["winner"], result.summary["space"]["positions"]
    figure = Figure(figsize=(7.2, max(2.4, 0.9 + 0.3 * len(positions))), layout="constrained")
    shares, sizes = figure.subplots(1, 2, sharey=True)
    rows = range(len(positions))
    total = sum(winner["block_scores"]) or 1.0
    labels = [f"{p}  {choice(n).name}" for p, n in zip(positions, winner["blocks"], strict=True)]
    shares.barh(rows, [100 * s / total for s in winner["block_scores"]], color=_RED, height=0.65)
    shares.set_xlabel("share of Fisher potential (%)")
    sizes.barh(rows, [p / 1e3 for p in winner["block_parameters"]], color=_BLUE, height=0.65)
    sizes.set_xlabel("parameters (thousands)")
    shares.set_yticks(list(rows), labels, fontsize=9)
    shares.set_ylim(len(positions) - 0.4, -0.6)  # the first position on top
    for axes in (shares, sizes):
        axes.grid(True, axis="x", alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def render(table: Table, width: int) -> str:
    """A table as plain text of at most `width` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _title(summary: dict[str, Any]) -> str:
    spec = summary["search"]
    return (
        f"BlockSwap on {spec['network']}, {spec['data']}: best of {summary['scoring']['candidates']:,} candidates "
        f"at {spec['budget']:,} parameters"
    )


def _device(summary: dict[str, Any]) -> str:
    """What the latencies were measured on: the model of the processor or accelerator."""
    first = next(iter(summary["latency"].values()))
    return str(first["device"]["device_kind"])


def _count(number: float) -> str:
    """A number of candidates, which may have twenty digits."""
    return f"{number:,.0f}" if number < 1e6 else f"{number:.2e}"


def _milliseconds(latency: dict[str, Any]) -> str:
    flag = "*" if latency["below_overhead"] else ""
    return f"{latency['median_ms']:.3g} ms{flag}"


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _html_table(table: Table) -> str:
    """A rich table as an HTML table."""
    columns = [list(column.cells) for column in table.columns]
    head = "".join(f"<th>{html.escape(str(c.header))}</th>" for c in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in zip(*columns, strict=True)
    )
    caption = f"<p class=note>{html.escape(str(table.caption))}</p>" if table.caption else ""
    return f"<table><tr>{head}</tr>{body}</table>{caption}"


def _page(result: SearchResult, pictures: dict[str, bytes]) -> str:
    s = result.summary
    spec, space = s["search"], s["space"]
    history = "".join(
        f"<tr><td>{r['epoch']}</td><td>{r['loss']:.4f}</td><td>{r['train_accuracy']:.2%}</td>"
        f"<td>{r['test_accuracy']:.2%}</td><td>{r['seconds']:.1f}</td></tr>"
        for r in s["training"]["history"]
    )
    where = s["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in where["packages"].items())
    environment = html.escape(
        f"Python {where['python']}, {packages}; {_device(s)}, {where['cores']} cores; finished {where['finished']}"
    )
    data_note = html.escape(s["training"]["measured_on"])
    settings = html.escape(", ".join(f"{k} = {v}" for k, v in spec.items() if k != "recipe"))
    recipe = html.escape(", ".join(f"{k} = {v}" for k, v in spec["recipe"].items()))
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    image = '<img alt="{}" src="data:image/png;base64,{}">'
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(_title(s))}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 780px; margin: 2rem auto; padding: 0 1rem; }}
 h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
 table {{ border-collapse: collapse; }} th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
 th:first-child, td:first-child {{ text-align: left; }} img {{ max-width: 100%; }} .note {{ color: #666; font-size: .9rem; }}
</style>
<h1>{html.escape(_title(s))}</h1>
{_html_table(summary_table(result))}
<h2>Score against parameters</h2>
{image.format("Fisher potential of all candidates against their parameters", encoded["score.png"])}
<p class=note>{s["scoring"]["candidates"]:,} candidates, drawn uniformly from the {_count(space["within_budget"])} of
{_count(space["candidates"])} that lie within the budget ({space["fraction_within_budget"]:.2%}); all scored on
{_minibatches(spec)}, {1000 * s["scoring"]["seconds_each"]:.0f} ms each. {unranked(result)}</p>
<h2>The winner</h2>
{image.format("Share of score and parameters of the winner, block by block", encoded["winner.png"])}
{_html_table(block_table(result))}
<h2>Training the winner</h2>
<table><tr><th>epoch</th><th>loss</th><th>train accuracy</th><th>test accuracy</th><th>seconds</th></tr>{history}</table>
<p class=note>{data_note}</p>
<h2>How to repeat it</h2>
<p class=note>{settings}. Recipe: {recipe}.</p>
<p class=note>{environment}.</p>
</html>
"""


def _minibatches(spec: dict[str, Any]) -> str:
    """What candidates were scored on."""
    seeds, batch = spec.get("score_seeds", 1), spec["score_batch"]
    if seeds == 1:
        return f"one minibatch of {batch} images"
    return f"{seeds} minibatches of {batch} images, each with weights of its own"
