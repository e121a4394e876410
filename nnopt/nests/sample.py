"""Operators drawn at random, from what is possible: every argument is chosen among those that fit.

A draw is a few *moves*, each a handful of steps that change the function of one part or of all. Random choice lives here alone:
what comes out is a program with every decision in it.
"""

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nnopt.errors import NestError
from nnopt.nests.canonical import Canonical, canonical
from nnopt.nests.lower import MOST_PIECES, pieces
from nnopt.nests.nest import Nest, Operator
from nnopt.nests.neural import (
    Bottleneck,
    Dilate,
    Group,
    Restrict,
    Share,
    Shift,
    Slabs,
    Tie,
    Untie,
    is_window,
    spatial_dim,
)
from nnopt.nests.program import Program
from nnopt.nests.schedule import Split, StripMine
from nnopt.nests.step import Step, halves

_MOST_PARTS = 8


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A program with what it makes.

    Attributes:
        program: of every step.
        operator: the convolution after the program.
        canon: canonical form of it.
    """

    program: Program
    operator: Operator
    canon: Canonical


def draw(operator: Operator, rng: np.random.Generator, moves: int = 3) -> Drawn:
    """One program, drawn at random.

    The number of moves is uniform, the kind of each is uniform among those that are possible, and so are its arguments.

    Args:
        operator: a convolution.
        rng: source of the decisions.
        moves: largest number of moves.

    Raises:
        NestError: nothing is possible, as for a convolution of one channel and one element.
    """
    steps: list[Step] = []
    # Integers in one go: drawing them singly takes longer than everything else here.
    choose = _Chooser(rng)
    for _ in range(1 + choose(moves)):
        move = _move(operator, choose)
        if not move:
            break
        for step in move:
            operator = step(operator)
        steps += move
    if not steps:
        raise NestError(
            f"no transformation is possible on a convolution of {operator.input} to {operator.output}"
        )
    return Drawn(Program(tuple(steps)), operator, canonical(operator))


def draws(operator: Operator, rng: np.random.Generator, moves: int = 3) -> Iterator[Drawn | None]:
    """Draws without end.

    Args:
        operator: a convolution.
        rng: source of the decisions.
        moves: largest number of moves of each.

    Yields:
        What was drawn; None where it computes the same as the convolution, or as what was drawn before.
    """
    seen = {canonical(operator)}
    while True:
        drawn = draw(operator, rng, moves)
        known = len(seen)
        seen.add(drawn.canon)
        yield drawn if len(seen) > known else None


def distinct(
    operator: Operator,
    count: int,
    rng: np.random.Generator,
    *,
    moves: int = 3,
    accept: Callable[[Drawn], bool] = lambda drawn: True,
    patience: int = 1000,
) -> list[Drawn]:
    """Programs of which no two compute the same operator, nor the convolution itself.

    Args:
        operator: a convolution.
        count: of programs.
        rng: source of the decisions.
        moves: largest number of moves of each.
        accept: a filter, such as of parameters or data reuse; it sees each operator once.
        patience: draws in a row that add nothing, after which there are taken to be no more.

    Returns:
        As many, or fewer if there are no more.
    """
    found: list[Drawn] = []
    idle = 0
    with _rarely_collected():
        for drawn in draws(operator, rng, moves):
            idle += 1
            if drawn is not None and _is_fast(drawn) and accept(drawn):
                found.append(drawn)
                idle = 0
            if len(found) == count or idle == patience:
                break
    return found


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Draws are many small objects that stay, none in a circle of references: looking for such takes a quarter of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], 100_000) if usual[0] else 0, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _is_fast(drawn: Drawn) -> bool:
    """A nest in very many pieces would be lowered to index arrays, which are slow."""
    return all(pieces(form) <= MOST_PIECES for form in drawn.canon.forms)


class _Chooser:
    """Uniform choices."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._bits: list[float] = []

    def __call__(self, count: int) -> int:
        if not self._bits:
            self._bits = self._rng.random(64).tolist()
        return int(self._bits.pop() * count)

    def of(self, values: Sequence[int]) -> int:
        return values[self(len(values))]


@functools.cache
def divisors(n: int) -> tuple[int, ...]:
    """Those between 1 and n, both left out."""
    return tuple(d for d in range(2, n) if n % d == 0)


def _move(operator: Operator, choose: _Chooser) -> list[Step]:
    """Steps of one move; none if nothing is possible."""
    count = len(operator.nests)
    part = choose(count + 1) - 1 if count > 1 else -1
    at = None if part < 0 else part
    nest = operator.nests[max(part, 0)]
    kinds = list(_KINDS)
    while kinds:
        kind = kinds.pop(choose(len(kinds)))
        if steps := kind(nest, operator, choose, at):
            return steps
    return []


def _loops(
    nest: Nest, operator: Operator, at: int | None, wanted: Callable[[Nest, str], bool]
) -> list[tuple[str, int]]:
    """Loops of a kind that may be reshaped; where all parts are meant, those that all have."""
    others = [n for n in operator.nests if n is not nest] if at is None else []
    return [
        (loop.name, loop.extent)
        for loop in nest.loops
        if loop.extent > 1
        and wanted(nest, loop.name)
        and all(loop in other.loops and wanted(other, loop.name) for other in others)
    ]


def _is_co(nest: Nest, name: str) -> bool:
    return nest.is_output(name) and nest.uses("k", name) and not nest.uses("x", name)


def _is_ci(nest: Nest, name: str) -> bool:
    return (
        not nest.is_output(name)
        and nest.uses("k", name)
        and [d.axis for d in nest.x if d.at.of(name)] == [nest.x[-1].axis]
    )


def _is_row(nest: Nest, name: str) -> bool:
    return spatial_dim(nest, name) is not None


def _group(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    outputs, inputs = _loops(nest, operator, at, _is_co), _loops(nest, operator, at, _is_ci)
    fits = [
        (co, ci, g)
        for co, n in outputs
        for ci, m in inputs
        for g in (*divisors(n), n)
        if m % g == 0
    ]
    return [Group(*fits[choose(len(fits))], part=at)] if fits else []


def _bottleneck(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    loops = [
        (name, n)
        for name, n in _loops(nest, operator, at, Nest.computes)
        if _free(operator, at, name + "_r")
    ]
    if not loops:
        return []
    name, n = loops[choose(len(loops))]
    if nest.is_output(name):
        return [Bottleneck(name, choose.of((*divisors(n), n)[:3]), part=at)]
    return [Bottleneck(name, choose.of((*divisors(n), n)), part=at)]


def _half(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    """Bottleneck of the outer half of a loop: a run of neighbours stays."""
    loops = _cuttable(
        operator,
        at,
        _loops(nest, operator, at, lambda n, name: n.is_output(name) and n.computes(name)),
    )
    if not loops:
        return []
    name, n = loops[choose(len(loops))]
    size = choose.of(divisors(n))
    outer = halves(name)[0]
    rest = n // size
    return [
        StripMine(name, size, part=at),
        Bottleneck(outer, choose.of((*divisors(rest), rest)), part=at),
    ]


def _range(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    loops = _loops(nest, operator, at, _is_ci)
    if not loops:
        return []
    name, n = loops[choose(len(loops))]
    size = choose.of((1, *divisors(n)))
    return [Restrict(name, (start := choose(n // size) * size), start + size, part=at)]


def _split(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    if len(operator.nests) > 1 and at is None:
        return []
    loops = _loops(nest, operator, at, lambda n, name: n.is_output(name) and n.computes(name))
    room = _MOST_PARTS - len(operator.nests) + 1
    fits = [(name, n, d) for name, n in loops for d in (*divisors(n), n) if d <= room]
    if not fits:
        return []
    name, n, parts = fits[choose(len(fits))]
    size = n // parts
    # Each part is changed on its own right away: a split alone changes nothing.
    steps: list[Step] = [Split(name, tuple(range(size, n, size)), part=at)]
    split = operator
    for step in steps:
        split = step(split)
    first = 0 if at is None else at
    for offset in range(parts):
        part = first + offset
        change = _simple(split.nests[part], split, choose, part)
        if change and choose(3):
            split = change[0](split)
            steps += change
    return steps


def _simple(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    """A move of one step that keeps the number of parts."""
    kinds = [_group, _bottleneck, _range, _dilate]
    return kinds[choose(len(kinds))](nest, operator, choose, at)


def _tie(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    """A diagonal: of two loops of a window, or of blocks of a loop of rows and of input channels."""
    windows = _loops(nest, operator, at, is_window)
    pairs = [(a, b) for i, (a, n) in enumerate(windows) for b, m in windows[i + 1 :] if n == m]
    if pairs and choose(2):
        return [Tie(*pairs[choose(len(pairs))], part=at)]
    rows = _cuttable(operator, at, _loops(nest, operator, at, _is_row))
    inputs = _cuttable(operator, at, _loops(nest, operator, at, _is_ci))
    fits = [
        (r, n, c, m, g)
        for r, n in rows
        for c, m in inputs
        for g in divisors(n)
        if g <= 8 and g in divisors(m)
    ]
    if not fits:
        return []
    row, _, channel, m, g = fits[choose(len(fits))]
    return [
        StripMine(row, g, part=at),
        StripMine(channel, m // g, part=at),
        Tie(halves(row)[1], halves(channel)[0], part=at),
    ]


def _share(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    """Weights that repeat along half of a loop of groups or input channels, or along a window."""
    loops = _loops(nest, operator, at, lambda n, name: n.uses("k", name) and n.uses("x", name))
    others = [name for name, n in nest.extents.items() if n > 1 and nest.uses("k", name)]
    if not loops or len(others) < 3:
        return []
    name, _ = loops[choose(len(loops))]
    cuts = [n for other, n in _cuttable(operator, at, loops) if other == name]
    if cuts and choose(2):
        size = choose.of(divisors(cuts[0]))
        return [StripMine(name, size, part=at), Share(halves(name)[choose(2)], part=at)]
    return [Share(name, part=at)]


def _shift(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    rows = _loops(nest, operator, at, _is_row)
    loops = _cuttable(
        operator, at, _loops(nest, operator, at, lambda n, name: _is_ci(n, name) or _is_co(n, name))
    )
    fits = [(name, n, s) for name, n in loops for s in divisors(n) if n // s <= 8]
    if not rows or not fits:
        return []
    name, _, size = fits[choose(len(fits))]
    row = rows[choose(len(rows))][0]
    return [StripMine(name, size, part=at), Shift(halves(name)[0], row, 1 + choose(2), part=at)]


def _dilate(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    loops = _loops(nest, operator, at, is_window)
    return [Dilate(loops[choose(len(loops))][0], 2 + choose(2), part=at)] if loops else []


def _slabs(nest: Nest, operator: Operator, choose: _Chooser, at: int | None) -> list[Step]:
    nests = operator.nests if at is None else (nest,)
    rows = _cuttable(operator, at, _loops(nest, operator, at, _is_row))
    fits = [
        (name, s)
        for name, n in rows
        for s in divisors(n)
        if s <= 8 and all(_covers(other, name, n) for other in nests)
    ]
    if not fits:
        return []
    name, count = fits[choose(len(fits))]
    steps: list[Step] = [Slabs(name, count, part=at)]
    return [*steps, Untie(halves(name)[0], part=at)] if choose(2) else steps


def _covers(nest: Nest, name: str, extent: int) -> bool:
    place = spatial_dim(nest, name)
    return (
        place is not None
        and sum(t.coefficient for t in nest.x[place].at.of(name)) * extent == nest.x[place].size
    )


def _cuttable(
    operator: Operator, at: int | None, loops: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    return [
        (name, n)
        for name, n in loops
        if divisors(n) and all(_free(operator, at, half) for half in halves(name))
    ]


def _free(operator: Operator, at: int | None, name: str) -> bool:
    nests = operator.nests if at is None else operator.nests[at : at + 1]
    return all(name not in nest.extents for nest in nests)


_KINDS = (_group, _bottleneck, _half, _range, _split, _tie, _share, _shift, _dilate, _slabs)
