"""Latency of a network from that of its parts.

The sum of what parts take alone is no network's latency: caches are warmer, calls cost something, and what lies between parts is
missing. On one backend that is nearly the same for all networks of a space, so a line through a few measured ones makes up for it:

    latency = intercept + slope * sum of parts
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from nnopt.backends.table import Role, SetupTimes, TimedNetwork
from nnopt.errors import MeasurementError


@dataclasses.dataclass(frozen=True)
class Fit:
    """A line from sums of parts to latencies.

    Attributes:
        intercept_ms: latency of a network without parts.
        slope: milliseconds in a network for each that parts take alone.
        networks: measured networks that it was fitted to; with none it is the sum itself.
    """

    intercept_ms: float = 0.0
    slope: float = 1.0
    networks: int = 0

    def __call__(self, sum_ms: float) -> float:
        """Latency in milliseconds, never below zero."""
        return max(0.0, self.intercept_ms + self.slope * sum_ms)


def fit(sums_ms: Sequence[float], latencies_ms: Sequence[float]) -> Fit:
    """The line of Theil (1950) and Sen (1968): its slope is the median of those through any two.

    One network that was disturbed cannot move it.
    Where that does not rise, or there are fewer than three networks, it is the median ratio and passes through zero.

    Args:
        sums_ms: of the parts of each network.
        latencies_ms: what was measured of it.

    Example:
        >>> fit([1.0, 2.0, 3.0, 4.0, 5.0], [2.5, 4.5, 6.5, 8.5, 99.0])
        Fit(intercept_ms=0.5, slope=2.0, networks=5)
        >>> fit([2.0], [3.0])
        Fit(intercept_ms=0.0, slope=1.5, networks=1)
        >>> fit([], [])
        Fit(intercept_ms=0.0, slope=1.0, networks=0)
    """
    sums, measured = np.asarray(sums_ms, float), np.asarray(latencies_ms, float)
    if len(sums) == 0:
        return Fit()
    first, second = np.triu_indices(len(sums), 1)
    apart = np.abs(sums[second] - sums[first]) > 1e-6 * sums.max()
    first, second = first[apart], second[apart]
    if len(sums) > 2 and len(first):
        slopes = (measured[second] - measured[first]) / (sums[second] - sums[first])
        slope = float(np.median(slopes))
        if slope > 0:
            return Fit(float(np.median(measured - slope * sums)), slope, len(sums))
    return Fit(0.0, float(np.median(measured / sums)), len(sums))


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Latencies from a table.

    Attributes:
        parts: workload -> milliseconds, at the machine's median speed.
        reference_ms: what the reference for networks takes at that speed.
        fit: from their sum to a latency.
        source: what it was read from, for errors.
    """

    parts: Mapping[str, float]
    reference_ms: float
    fit: Fit
    source: str

    @classmethod
    def of(cls, times: SetupTimes) -> "Predictor":
        """Reads parts and fits to the networks of a table.

        Raises:
            MeasurementError: it is empty, or a network has a part that it does not hold.
        """
        speed = times.reference_ms("parts")
        parts = {w: row.ms * speed / row.reference_ms for w, row in times.parts().items()}
        if not parts:
            raise MeasurementError(
                f"{times.table.path} has no times of {times.backend}; build them with `nnopt table build`"
            )
        bare = cls(parts, times.reference_ms("networks"), Fit(), str(times.table.path))
        networks = list(times.networks("fit").values())
        found = fit([bare.sum_ms(n.parts) for n in networks], [bare.at_speed(n) for n in networks])
        return dataclasses.replace(bare, fit=found)

    def sum_ms(self, workloads: Sequence[str]) -> float:
        """What parts take alone.

        Raises:
            MeasurementError: one of them is not in the table.
        """
        missing = [w for w in workloads if w not in self.parts]
        if missing:
            raise MeasurementError(
                f"{self.source} has no time of {len(missing)} of {len(workloads)} parts of the network, such as "
                f"{missing[0]}; build the table for this network and image size"
            )
        return sum(self.parts[w] for w in workloads)

    def __call__(self, workloads: Sequence[str]) -> float:
        """Latency in milliseconds of a network of these parts.

        Raises:
            MeasurementError: one of them is not in the table.
        """
        return self.fit(self.sum_ms(workloads))

    def at_speed(self, network: TimedNetwork) -> float:
        """What was measured of a network, in milliseconds at the machine's median speed."""
        return network.ms * self.reference_ms / network.reference_ms


def pairs(times: SetupTimes, role: Role) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured latencies `[networks]` of a table, in milliseconds.

    Args:
        times: of a set-up.
        role: of the networks that it was fitted to, or of those that it is checked with.
    """
    predictor = Predictor.of(times)
    found = list(times.networks(role).values())
    predicted = np.array([predictor(n.parts) for n in found])
    return predicted, np.array([predictor.at_speed(n) for n in found])
