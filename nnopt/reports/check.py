"""Agreement of backends as tables for the terminal."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from nnopt.backends.agreement import Agreement, Difference, worst
from nnopt.scores.agreement import Agreement as RankAgreement
from nnopt.scores.agreement import Interval
from nnopt.search.timing import TimedRun


def agreement_table(checked: Mapping[str, Agreement], tolerance: float) -> Table:
    """A row for each network, output and pair."""
    table = Table(title=Text("Outputs on all backends", style="table.title"), title_justify="left")
    for name in ("network", "output", "between"):
        table.add_column(name, overflow="fold")
    for name in ("difference", "relative"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for name, found in checked.items():
        for d in found.outputs:
            table.add_row(
                Text(name),
                Text(d.place),
                Text(f"{d.first}, {d.second}"),
                *_numbers(d),
                _verdict(d, tolerance),
            )
    table.caption = Text(
        f"Difference: the largest of an element. Relative: to the largest magnitude in the output. "
        f"Agree: no more than {tolerance:g}. float64: JAX with all numbers of 64 bits.",
        style="table.caption",
    )
    table.caption_justify = "left"
    return table


def layer_agreement_table(name: str, found: Agreement, top: int) -> Table:
    """The layers that differ most, in the order in which the network calls them."""
    layers: dict[str, list[Difference]] = {}
    for d in found.layers:
        layers.setdefault(d.place, []).append(d)
    order = list(layers)
    most = sorted(order, key=lambda p: -_size(worst(layers[p])))[:top]
    title = Text(f"Layers of {name}", style="table.title")
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("between")
    for column in ("difference", "relative"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for place in sorted(most, key=order.index):
        d = worst(layers[place])
        table.add_row(
            Text(place), Text(f"{d.first}, {d.second}"), *_numbers(d), _verdict(d, found.tolerance)
        )
    more = len(order) - len(most)
    table.caption = Text(
        "Outputs of convolutions and dense layers, in the order of their calls"
        + (f"; {more} that differ less are not shown." if more else "."),
        style="table.caption",
    )
    table.caption_justify = "left"
    return table


def rank_table(runs: Sequence[TimedRun], ranks: Mapping[tuple[str, str], RankAgreement]) -> Table:
    """Latencies on each backend, and how alike they rank."""
    backends = list(dict.fromkeys(r.backend for r in runs))
    table = Table(title=Text("Latencies of what agrees", style="table.title"), title_justify="left")
    table.add_column("network", overflow="fold")
    for name in backends:
        table.add_column(f"{name}, ms", justify="right")
    for name in dict.fromkeys(r.name for r in runs):
        times = {r.backend: r.latency.median_ms for r in runs if r.name == name}
        table.add_row(Text(name), *(f"{times[b]:.3g}" if b in times else "-" for b in backends))
    lines = [
        f"{a} and {b} rank {r.candidates} networks with Spearman {_interval(r.spearman)}, Kendall {_interval(r.kendall)}."
        for (a, b), r in ranks.items()
    ]
    if lines:
        lines.append("Intervals: 95%, bootstrap over networks.")
    table.caption = Text(" ".join(lines), style="table.caption")
    table.caption_justify = "left"
    return table


def _interval(value: Interval) -> str:
    return f"{value.value:.3f} [{value.low:.2f}, {value.high:.2f}]"


def _size(d: Difference) -> float:
    return d.relative if d.relative == d.relative else float("inf")


def _numbers(d: Difference) -> tuple[str, str]:
    return f"{d.absolute:.2g}", f"{d.relative:.2g}"


def _verdict(d: Difference, tolerance: float) -> Text:
    return (
        Text("agree", style="green") if d.within(tolerance) else Text("DISAGREE", style="bold red")
    )
