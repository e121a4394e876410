"""Latencies as tables for the terminal, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from nnopt.backends import Latency, Setup, Speedup, speedup
from nnopt.errors import MeasurementError
from nnopt.search.timing import Layer, TimedRun

FORMAT = "nnopt measurement"
VERSION = 1


def network_table(title: str, rows: Sequence[TimedRun], batch: int) -> Table:
    """Whole networks, one row for each backend, with the speed-up over the first.

    Args:
        title: of the table.
        rows: of one interleaved run.
        batch: images in a call.
    """
    table = _table(title)
    table.add_column("network", overflow="fold")
    table.add_column("backend")
    for name in ("ms", "spread", "images/s", "speed-up", "compile s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("scheduled", overflow="fold")
    told = []
    for row in rows:
        try:
            over = speedup(rows[0].latency, row.latency)
            faster = f"{over.median:.2f}x"
        except MeasurementError as error:
            faster = "-"
            told.append(f"No speed-up for {row.backend}: {error}.")
        table.add_row(
            row.name, row.backend, *time_cells(row.latency),
            f"{1e3 * batch / row.latency.median_ms:,.1f}", faster, f"{row.compile_seconds:.1f}", row.schedule,
        )  # fmt: skip
    caption = "Median of a call and the distance of its quartiles (spread), all in turns; speed-up over the first row."
    if any(row.latency.below_overhead for row in rows):
        caption += f" {_BELOW}"
    return _captioned(table, " ".join((caption, *dict.fromkeys(told))))


def layer_table(
    title: str, layers: Mapping[str, Layer], rows: Sequence[TimedRun], whole: Mapping[str, float]
) -> Table:
    """The layers of one network, one row for each backend, and their sum against the measured whole.

    Args:
        title: of the table.
        layers: by name.
        rows: their times.
        whole: backend -> milliseconds of the network.
    """
    table = _table(title)
    table.add_column("layer", overflow="fold")
    table.add_column("input -> output", overflow="fold")
    for name in ("count", "MMACs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("backend")
    for name in ("ms", "GFLOP/s", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    sums = {b: sum(layers[r.name].count * r.latency.median_ms for r in rows if r.backend == b) for b in whole}  # fmt: skip
    before = None
    for row in rows:
        layer, ms = layers[row.name], row.latency.median_ms
        about = (layer.name, layer.shapes, str(layer.count), f"{layer.macs / 1e6:,.2f}")
        table.add_row(
            *(about if row.name != before else ("",) * 4), row.backend, time_cells(row.latency)[0],
            f"{2e-6 * layer.macs / ms:,.1f}", f"{layer.count * ms / sums[row.backend]:.1%}",
        )  # fmt: skip
        before = row.name
    table.add_section()
    for name, least in sums.items():
        table.add_row("sum", "", "", "", name, f"{least:.3g}", "", "100%")
        part = f"{whole[name] / least:.0%}"
        table.add_row("whole network", "", "", "", name, f"{whole[name]:.3g}", "", part)
    caption = (
        "ms is for one call, share counts all calls of a layer. The sum is not the network's latency: alone, a layer finds its "
        "weights in a warm cache and pays for a call of its own, and what is fused with it or lies between layers is missing. "
        "Shares are of the sum."
    )
    if any(row.latency.below_overhead for row in rows):
        caption += f" {_BELOW}"
    return _captioned(table, caption)


_BELOW = "~ is less than 20 times what calling alone takes, so that it says little."


def setup_lines(rows: Sequence[TimedRun]) -> list[str]:
    """The machine and what ran on it, a line for each backend."""
    lines = {}
    for row in rows:
        setup = row.latency.setup
        if setup is not None and row.backend not in lines:
            lines[row.backend] = f"{row.backend}: {setup_text(setup)}"
    return list(lines.values())


def setup_text(setup: Setup) -> str:
    """A set-up in a line."""
    device = setup.device
    cores = device.get("cores")
    text = f"{device.get('device_kind')} ({device.get('platform')}), {cores} core{'s' if cores != 1 else ''}"
    text += " pinned" if device.get("pinned") else ""
    if device.get("threads") not in (None, cores):
        text += f", {device['threads']} threads"
    named = ((key, device[key]) for key in ("jax", "tvm", "target") if key in device)
    text += "".join(f", {name} {value}" for name, value in named)
    text += f", {'cold' if setup.cold else 'warm'} caches"
    if setup.load_average is not None:
        text += f", load average {setup.load_average:.1f}"
        if setup.load_average > (cores or 1) + 0.5:
            text += ": the machine was busy"
    return text


def time_cells(time: Latency) -> tuple[str, str]:
    """Median and spread."""
    mark = "~" if time.below_overhead else ""
    return f"{mark}{time.median_ms:.3g}", f"{(time.high_ms - time.low_ms) / time.median_ms:.0%}"


def measurement_json(
    options: Mapping[str, Any],
    networks: Sequence[TimedRun],
    layers: Mapping[str, tuple[Mapping[str, Layer], Sequence[TimedRun]]],
    batch: int,
) -> dict[str, Any]:
    """Everything, as JSON values.

    Args:
        options: of the command.
        networks: whole networks.
        layers: network -> its layers by name, and their times.
        batch: images in a call.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": dict(options),
        "networks": [
            _run_json(row)
            | {
                "images_per_second": 1e3 * batch / row.latency.median_ms,
                "speedup": _speedup_json(networks[0].latency, row.latency),
            }
            for row in networks
        ],
        "layers": [
            _run_json(row)
            | {
                "network": network,
                "layer": found[row.name].name,
                "shapes": found[row.name].shapes,
                "paths": list(found[row.name].paths),
                "count": found[row.name].count,
                "macs": found[row.name].macs,
            }
            for network, (found, rows) in layers.items()
            for row in rows
        ],
    }


def _run_json(row: TimedRun) -> dict[str, Any]:
    time = row.latency
    return {
        "name": row.name, "backend": row.backend, "median_ms": time.median_ms, "low_ms": time.low_ms, "high_ms": time.high_ms,
        "samples_ms": list(time.samples_ms), "inner_calls": time.inner_calls, "below_overhead": time.below_overhead,
        "compile_seconds": row.compile_seconds, "setup": time.setup.to_json() if time.setup else None,
    }  # fmt: skip


def _speedup_json(base: Latency, other: Latency) -> dict[str, float] | None:
    try:
        over: Speedup = speedup(base, other)
    except MeasurementError:
        return None
    return {"median": over.median, "low": over.low, "high": over.high}


def _table(title: str) -> Table:
    made = Table(title=Text(title, style="table.title"), title_justify="left", padding=(0, 1))
    made.caption_justify = "left"
    return made


def _captioned(table: Table, caption: str) -> Table:
    table.caption = Text(caption, style="table.caption")
    return table
