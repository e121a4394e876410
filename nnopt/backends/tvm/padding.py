"""Arrays with other elements around them and between theirs: what convolutions, windows, nests and `lax.pad` have in common."""

from collections.abc import Callable, Sequence
from typing import Any


def padded(
    x: Any,
    shape: Sequence[int],
    low: Sequence[int],
    steps: Sequence[int],
    outside: Callable[[], Any],
) -> Any:
    """The tensor expression; a condition only where something may be outside.

    Args:
        x: a tensor of any rank.
        shape: of the result.
        low: elements before those of `x` along each axis; below zero, what is cut off.
        steps: distance of the elements of `x` along each axis.
        outside: makes what stands where `x` has nothing.

    Returns:
        A tensor of that shape.
    """
    from tvm import te, tirx

    sizes = [int(n) for n in x.shape]

    def element(*at: Any) -> Any:
        where, conditions = [], []
        for i, before, step, size, whole in zip(at, low, steps, sizes, shape, strict=True):
            place = i - before
            if before > 0:
                conditions.append(place >= 0)
            if whole - before > (size - 1) * step + 1:
                conditions.append(place <= (size - 1) * step)
            if step > 1:
                conditions.append(tirx.indexmod(place, step) == 0)
            where.append(place if step == 1 else tirx.indexdiv(place, step))
        if not conditions:
            return x[tuple(where)]
        return tirx.if_then_else(all_of(conditions), x[tuple(where)], outside())

    return te.compute(tuple(shape), element, name="pad")


def all_of(conditions: Sequence[Any]) -> Any:
    """One condition of at least one: TVM's own `all` takes two and more."""
    from tvm import tirx

    return conditions[0] if len(conditions) == 1 else tirx.all(*conditions)
