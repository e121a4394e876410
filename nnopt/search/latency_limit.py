"""A budget on latency that a table predicts: candidates above it are never scored."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from nnopt.backends.prediction import Predictor
from nnopt.backends.table import LatencyTable
from nnopt.errors import BudgetError, SearchError
from nnopt.search.parts import SpaceParts

_TRIAL = 1000  # draws that tell how many pass
_AT_ONCE = 64
_MOST = 100_000
_AGAIN = 2**32
"""Attempt `k` of candidate `i` is draw `i + k * 2^32`: the first is the one without a limit."""


@dataclasses.dataclass(frozen=True)
class LatencyLimit:
    """A table and how slow a candidate may be by it.

    Attributes:
        table: path of the file.
        backend: of the times in it.
        max_ms: most milliseconds of a call.
        digest: of what the table said when the search was made; another makes another search.
    """

    table: str
    backend: str
    max_ms: float
    digest: str

    def __post_init__(self) -> None:
        """Checks the limit.

        Raises:
            BudgetError: it is no positive number.
        """
        if not 0 < self.max_ms < math.inf:
            raise BudgetError(f"a latency of {self.max_ms} ms is no limit; give a number above 0")

    @classmethod
    def read(cls, table: str, max_ms: float, backend: str | None = None) -> "LatencyLimit":
        """The limit that a table makes as it is now.

        Raises:
            MeasurementError: there is no such table, or it has times of several set-ups.
            BudgetError: the limit is no positive number.
        """
        with LatencyTable(table) as file:
            times = file.only(backend)
            return cls(table, times.backend, max_ms, _digest(Predictor.of(times)))

    def predictor(self) -> Predictor:
        """The table's.

        Raises:
            MeasurementError: it is not there any more.
            SearchError: it says something else than when the search was made.
        """
        with LatencyTable(self.table) as file:
            found = Predictor.of(file.only(self.backend))
        if _digest(found) != self.digest:
            raise SearchError(
                f"the latency table {self.table} has changed since this search was made; give another folder with --out"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


class LimitedSampler:
    """Draws until a candidate is predicted to be fast enough: uniform over those that are.

    Attributes:
        limit: as given.
        accepted: share of candidates that pass, of a thousand draws.
    """

    def __init__(
        self,
        limit: LatencyLimit,
        parts: SpaceParts,
        draws: Callable[[Iterable[int]], np.ndarray],
    ) -> None:
        """Reads the table.

        Args:
            limit: how slow a candidate may be.
            parts: of the space.
            draws: numbers -> candidates `[draws, positions]`, each uniform over those within the other budgets.

        Raises:
            MeasurementError: the table is not there, or lacks a part of the space.
            SearchError: it has changed since the search was made.
            BudgetError: none of a thousand draws is fast enough.
        """
        self.limit, self._draws = limit, draws
        predictor = limit.predictor()
        self._line = predictor.fit
        self._fixed = predictor.sum_ms([part.workload for part in parts.fixed])
        self._each = [
            np.array([predictor.sum_ms([p.workload]) for p in here]) for here in parts.choices
        ]
        self._known: dict[int, tuple[int, ...]] = {}
        times = self.predict(draws(range(_TRIAL)))
        self.accepted = float(np.mean(times <= limit.max_ms))
        if not self.accepted:
            raise BudgetError(
                f"none of {_TRIAL} candidates is predicted to take at most {limit.max_ms:g} ms; they take {times.min():.3g} to "
                f"{times.max():.3g} on {limit.backend}; raise --max-latency or change --budget"
            )

    def predict(self, candidates: np.ndarray) -> np.ndarray:
        """Milliseconds `[candidates]` of candidates `[candidates, positions]`."""
        sums = self._fixed + sum(
            each[candidates[:, i]] for i, each in enumerate(self._each)
        )  # fmt: skip
        return np.maximum(0.0, self._line.intercept_ms + self._line.slope * sums)

    def draw(self, index: int) -> tuple[int, ...]:
        """Candidate number `index`, always the same.

        Raises:
            BudgetError: chance finds none.
        """
        if index not in self._known:
            for first in range(0, _MOST, _AT_ONCE):
                drawn = self._draws(index + k * _AGAIN for k in range(first, first + _AT_ONCE))
                passing = np.flatnonzero(self.predict(drawn) <= self.limit.max_ms)
                if len(passing):
                    self._known[index] = tuple(drawn[passing[0]].tolist())
                    break
            else:
                raise BudgetError(
                    f"none of {_MOST} draws is predicted to take at most {self.limit.max_ms:g} ms; raise --max-latency"
                )
        return self._known[index]


def _digest(predictor: Predictor) -> str:
    said = [sorted(predictor.parts.items()), dataclasses.astuple(predictor.fit)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
