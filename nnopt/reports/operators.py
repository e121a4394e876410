"""Operators of one convolution as tables for the terminal: what they cost, what their steps do, how fast they are."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnopt.errors import NestError
from nnopt.nests import Nest, Operator, Program, canonical
from nnopt.nests.lower import MOST_PIECES, pieces
from nnopt.nests.reuse import data_reuse, distinct
from nnopt.nests.roofline import arithmetic_intensity

if TYPE_CHECKING:
    from nnopt.backends import Latency

# Larger arrays are not what one layer has, and counting in them would take very long.
MOST_ELEMENTS = 2**28
_MOST_WEIGHTS = 2**27

ABOUT_REUSE = """Reuse is how often an element is used each time that it is moved into a cache that holds what the loops \
from one inwards touch, with 4 bytes an element: x the input, k the kernel, y the output. FLOP/byte is for all that moves."""


class Facts(NamedTuple):
    """What an operator costs.

    Attributes:
        weights: number of them.
        macs: multiply-accumulates for one image.
        intensity: FLOP per byte if everything fits into the cache.
        pieces: convolutions that it is run as.
        gathered: nests in so many pieces that they are index arrays and `einsum` instead.
    """

    weights: int
    macs: int
    intensity: float
    pieces: int
    gathered: int


def facts(operator: Operator, what: str = "what the program makes") -> Facts:
    """What an operator costs.

    Args:
        operator: any.
        what: its name in an error.

    Raises:
        NestError: arrays are too large to be counted, or to be one layer's.
    """
    _check_extent(operator, what)
    counts = [pieces(form) for form in canonical(operator).forms]
    return Facts(
        # As `canonical.weights`, which takes seconds where parts share weights.
        distinct(operator, "k"),
        operator.domain_size,
        arithmetic_intensity(operator),
        sum(counts),
        sum(n > MOST_PIECES for n in counts),
    )


def sample_table(
    title: str, whole: Facts, found: Sequence[tuple[Program, Facts]], told: str
) -> Table:
    """Operators beside the convolution, relative to it.

    Args:
        title: of the table.
        whole: the convolution.
        found: operators.
        told: how they were found, for the caption.
    """
    table = _table(title)
    table.add_column("#", justify="right")
    table.add_column("program", overflow="fold")
    for name in ("weights", "MACs", "FLOP/byte", "run as"):
        table.add_column(name, justify="right")
    table.add_row("", "the convolution", *_cells(whole, whole), style="bold")
    for number, (program, costs) in enumerate(found, 1):
        table.add_row(str(number), _short(program), *_cells(costs, whole))
    caption = f"1 is {whole.weights:,} weights or {whole.macs:,} MACs. {told}"
    caption += _about_parts(program for program, _ in found)
    table.caption = Text(caption, style="table.caption")
    return table


def latency_table(
    title: str,
    whole: Facts,
    operators: "Mapping[str, tuple[Program, Facts, Latency]]",
    base: "Latency",
    *,
    named: bool,
) -> Table:
    """Operators beside the convolution in one interleaved run, fastest first.

    Args:
        title: of the table.
        whole: the convolution.
        operators: by name or number.
        base: time of the convolution.
        named: they have names, which say what they are, in place of numbers.
    """
    from nnopt.backends import speedup

    table = _table(title)
    table.add_column("#", justify="right")
    table.add_column("program", overflow="fold")
    for column in ("ms", "spread", "speed-up", "MACs", "of promise"):
        table.add_column(column, justify="right")
    table.add_row("", "the convolution", *_time_cells(base), "1.00x", "1", "", style="bold")
    slower = 0
    for name, (program, costs, time) in sorted(operators.items(), key=lambda o: o[1][2].median_ms):
        faster = speedup(base, time)
        ratio = costs.macs / whole.macs
        # A quarter of the rounds may well be slower by chance alone.
        slower += faster.high * ratio < 1
        table.add_row(
            *(("", name) if named else (name, _short(program))), *_time_cells(time),
            f"{faster.median:.2f}x", f"{ratio:.3g}", f"{faster.median * ratio:.0%}",
        )  # fmt: skip
    caption = f"1 is {whole.macs:,} MACs an image. "
    caption += f"{slower} of {len(operators)} are slower than their MACs promise."
    if any(time.below_overhead for time in (base, *(o[2] for o in operators.values()))):
        caption += " ~ is less than 20 times what calling alone takes, so that it says little; give a larger --batch."
    caption += _about_parts(() if named else (o[0] for o in operators.values()))
    table.caption = Text(caption, style="table.caption")
    return table


def print_code(console: Console, title: str, operator: Operator) -> None:
    """Loop code under a title."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    # Brackets are indices here, no markup.
    console.print(Text(str(operator)), soft_wrap=True)
    console.print()


def steps_table(program: Program, operator: Operator) -> Table:
    """What each step of a program makes of the operator before it.

    Raises:
        NestError: arrays are too large to be counted.
    """
    table = _table("What each step does")
    table.add_column("step", overflow="fold")
    table.add_column("function")
    for name in ("MACs", "of before", "weights", "nests"):
        table.add_column(name, justify="right")
    for step in program.steps:
        before, operator = operator, step(operator)
        costs = facts(operator, f"what {step} makes")
        table.add_row(
            str(step), "same" if step.keeps_function else "another", f"{costs.macs:,}",
            _fraction(costs.macs, before.domain_size), f"{costs.weights:,}", str(len(operator.nests)),
        )  # fmt: skip
    return table


def totals_table(conv: Operator, operator: Operator) -> Table:
    """A convolution and what a program made of it."""
    whole, costs = facts(conv), facts(operator)
    table = _table("In all")
    table.add_column("")
    for name in ("convolution", "operator", "ratio"):
        table.add_column(name, justify="right")
    for name, a, b in (
        ("weights", whole.weights, costs.weights),
        ("MACs of one image", whole.macs, costs.macs),
    ):
        table.add_row(name, f"{a:,}", f"{b:,}", _fraction(b, a))
    table.add_row(
        "FLOP/byte, all cached",
        _number(whole.intensity), _number(costs.intensity), f"{costs.intensity / whole.intensity:.3g}",
    )  # fmt: skip
    table.add_row("nests", str(len(conv.nests)), str(len(operator.nests)), "")
    table.add_row("convolutions it is run as", str(whole.pieces), _pieces(costs), "")
    return table


def reuse_tables(operator: Operator) -> Iterable[Table]:
    """A table of data reuse for each nest; one for all that are alike."""
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for number, nest in enumerate(operator.nests):
        alike.setdefault(tuple(_level_rows(nest)), []).append(number)
    for rows, numbers in alike.items():
        title = "Data reuse"
        if len(operator.nests) > 1:
            title += f", part{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"
        table = _table(title)
        table.add_column("held from loop", overflow="fold")
        for name in ("cache", "reuse of x", "of k", "of y", "FLOP/byte"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        yield table


def _level_rows(nest: Nest) -> Iterable[tuple[str, ...]]:
    found = data_reuse(nest)
    for level in range(len(found.loops) + 1):
        inner = nest.loops[level:]
        what = f"{inner[0].name} in {inner[0].extent}" if inner else "one iteration"
        held = 4 * found.footprint(level)
        yield (
            what, _bytes(held), *(_number(a.reuse(level)) for a in (found.x, found.k, found.y)),
            _number(arithmetic_intensity(nest, held)),
        )  # fmt: skip


def ran_on(device: Mapping[str, Any]) -> str:
    """The machine of `Compiled.device`, in a line."""
    text = f"{device['device_kind']} ({device['platform']}), {device['cores']} cores, JAX {device['jax']}"
    load = device["load_average"]
    if load is not None and load > device["cores"]:
        text += f"; load average {load:.1f}: the machine was busy"
    return text


def _check_extent(operator: Operator, what: str) -> None:
    """Checks that arrays are of a size that can be counted.

    Raises:
        NestError: they are not.
    """
    arrays = max(math.prod(operator.input), math.prod(operator.output))
    weights = sum(
        math.prod(loop.extent for loop in nest.loops if nest.uses("k", loop.name))
        for nest in operator.nests
    )
    far = max(abs(b) for n in operator.nests for d in (*n.x, *n.k) for b in d.at.bounds)
    if arrays > MOST_ELEMENTS or weights > _MOST_WEIGHTS or far > MOST_ELEMENTS:
        raise NestError(
            f"{what} is too large: at most {MOST_ELEMENTS:,} elements of input or output and {_MOST_WEIGHTS:,} weights"
        )


def _table(title: str) -> Table:
    made = Table(title=Text(title, style="table.title"), title_justify="left")
    made.caption_justify = "left"
    return made


def _short(program: Program) -> str:
    """Steps in few letters, with spaces between them alone, where lines are broken."""
    steps = []
    for step in program.steps:
        text = str(dataclasses.replace(step, part=None)).replace("'", "").replace(", ", ",")
        steps.append(text if step.part is None else f"{text}@{step.part}")
    return " ".join(steps) or "unchanged"


def _about_parts(programs: Iterable[Program]) -> str:
    several = any(step.part is not None for program in programs for step in program.steps)
    return " @1 changes part 1 of what was split." if several else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _fraction(part: int, whole: int) -> str:
    exact = str(Fraction(part, whole))
    return exact if len(exact) <= 7 else f"{part / whole:.3g}"


def _pieces(costs: Facts) -> str:
    return f"{costs.pieces:,}" if not costs.gathered else "index arrays"


def _cells(costs: Facts, whole: Facts) -> list[str]:
    return [
        f"{costs.weights / whole.weights:.3g}", f"{costs.macs / whole.macs:.3g}", _number(costs.intensity), _pieces(costs),
    ]  # fmt: skip


def _time_cells(time: "Latency") -> list[str]:
    mark = "~" if time.below_overhead else ""
    return [f"{mark}{time.median_ms:.3g}", f"{(time.high_ms - time.low_ms) / time.median_ms:.0%}"]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{_number(count / size)} {unit}"
    return f"{count} B"
