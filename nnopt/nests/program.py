"""A sequence of transformations, with every decision in it: it prints, hashes, and is made again from JSON."""

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any

from nnopt.errors import NestError
from nnopt.nests import neural, schedule
from nnopt.nests.nest import Operator
from nnopt.nests.step import Step

STEPS: dict[str, type[Step]] = {
    s.__name__: s
    for s in (
        schedule.Interchange, schedule.StripMine, schedule.Tile, schedule.Fuse, schedule.Split, schedule.Unroll,
        schedule.Vectorize, schedule.Parallel, schedule.Prefetch, schedule.Bind, neural.Bottleneck, neural.Restrict, neural.Tie,
        neural.Group, neural.Depthwise, neural.Widen, neural.Dilate, neural.Shift, neural.Share, neural.Untie, neural.Slabs,
    )
}  # fmt: skip
"""Every transformation, by name."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Transformations, applied in order.

    Attributes:
        steps: in order.

    Example:
        >>> from nnopt.nests import Group, Program, convolution
        >>> print(Program((Group("co", "ci", 2),))(convolution((8,), 4, 6, (3,))))
        for g in 2:
          for co in 3:
            for ci in 2:
              for ow in 8:
                for kw in 3:
                  y[ow, 3*g + co] += x[ow + kw - 1, 2*g + ci] * k[kw, 2*g + ci, 3*g + co]
    """

    steps: tuple[Step, ...] = ()

    def __call__(self, operator: Operator) -> Operator:
        """The operator transformed by every step.

        Raises:
            NestError: a step is not possible; the message has its number. Nothing is half applied.
        """
        for number, step in enumerate(self.steps, 1):
            try:
                operator = step(operator)
            except NestError as error:
                raise NestError(f"step {number} of {len(self.steps)}, {step}: {error}") from None
        return operator

    @property
    def keeps_function(self) -> bool:
        """Whether every step does."""
        return all(step.keeps_function for step in self.steps)

    def __str__(self) -> str:
        """Its steps as calls."""
        return ", ".join(map(str, self.steps)) or "unchanged"

    def to_json(self) -> list[dict[str, Any]]:
        """A list of `{"step": name, field: value, ...}`, without fields at their default."""
        return [
            {"step": type(s).__name__}
            | {f.name: v for f in dataclasses.fields(s) if (v := getattr(s, f.name)) != f.default}
            for s in self.steps
        ]

    @classmethod
    def from_json(cls, value: Any) -> "Program":
        """The program that `to_json` wrote, from the value or its text.

        Raises:
            NestError: it is not one; the message says where.
        """
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise NestError(f"a program is a JSON list of steps: {error}") from None
        if not isinstance(value, list):
            raise NestError(f"a program is a list of steps, not {value!r:.60}")
        return cls(tuple(_step(number, entry) for number, entry in enumerate(value, 1)))


def _step(number: int, entry: Any) -> Step:
    where = f"step {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), str):
        raise NestError(f'{where} is {entry!r:.60}; it is {{"step": name, field: value, ...}}')
    kind = STEPS.get(entry["step"])
    if kind is None:
        raise NestError(f"{where}: there is no {entry['step']!r}; there are {', '.join(STEPS)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given = {name: _value(v) for name, v in entry.items() if name != "step"}
    unknown = sorted(given.keys() - fields.keys())
    required = [f.name for f in fields.values() if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in given]
    if unknown or missing:
        wrong = f"has no {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise NestError(f"{where}: {kind.__name__} {wrong}; its fields are {', '.join(fields)}")
    for name, v in given.items():
        if not _fits(v, hints[name]):
            raise NestError(f"{where}: {name} of {kind.__name__} is {v!r:.60}, which does not fit")
    return kind(**given)


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint == tuple[int, ...]:
        return (
            isinstance(value, Sequence)
            and all(_fits(v, int) for v in value)
            and not isinstance(value, str)
        )
    if hint == int | None:
        return value is None or _fits(value, int)
    return isinstance(value, str)
