"""Nests as loop code."""

from nnopt.nests.index import Index, Term
from nnopt.nests.nest import Dim, Nest, Operator


def code(operator: Operator) -> str:
    """Loop code of every nest, one after the other."""
    return "\n".join(_nest(nest) for nest in operator.nests)


def _nest(nest: Nest) -> str:
    lines = []
    for depth, loop in enumerate(nest.loops):
        copies = not nest.computes(loop.name) and nest.is_output(loop.name)
        marks = ", ".join((*loop.marks, *(("copies",) if copies else ())))
        lines.append(
            f"{'  ' * depth}for {loop.name} in {loop.extent}:{f'  # {marks}' if marks else ''}"
        )
    arrays = {a: ", ".join(_index(nest, d) for d in getattr(nest, a)) for a in "yxk"}
    lines.append(f"{'  ' * len(nest.loops)}y[{arrays['y']}] += x[{arrays['x']}] * k[{arrays['k']}]")
    return "\n".join(lines)


def _index(nest: Nest, dim: Dim) -> str:
    order = [loop.name for loop in nest.loops]
    extents = nest.extents
    index: Index = dim.at
    terms = sorted(index.terms, key=lambda t: (-t.coefficient, order.index(t.loop)))
    text = ""
    for t in terms:
        sign = "-" if t.coefficient < 0 else "+"
        text += (
            f" {sign} {_term(t, extents[t.loop])}"
            if text
            else ("-" if sign == "-" else "") + _term(t, extents[t.loop])
        )
    if index.constant or not text:
        sign = "-" if index.constant < 0 else "+"
        text = f"{text} {sign} {abs(index.constant)}" if text else str(index.constant)
    return text


def _term(term: Term, extent: int) -> str:
    text = term.loop
    if term.divisor > 1:
        text = f"{text}//{term.divisor}"
    if term.divisor * term.extent < extent:
        text = f"{text}%{term.extent}"
    factor = abs(term.coefficient)
    if factor == 1:
        return text
    return f"{factor}*({text})" if text != term.loop else f"{factor}*{text}"
