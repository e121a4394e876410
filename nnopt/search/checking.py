"""Networks run on several backends: whether they compute the same, and whether they rank the same way."""

import itertools
from collections.abc import Mapping, Sequence

import flax.linen as nn

from nnopt.backends import Backend, stand_in_variables
from nnopt.backends.agreement import Agreement, agreement
from nnopt.core import Example
from nnopt.errors import BackendError
from nnopt.scores.agreement import Agreement as RankAgreement
from nnopt.scores.agreement import agreement as rank_agreement
from nnopt.search.latency import Watcher
from nnopt.search.timing import TimedRun, time_all


def check_networks(
    networks: Mapping[str, tuple[nn.Module, Example]],
    backends: Sequence[Backend],
    watcher: Watcher,
    *,
    tolerance: float,
    layers: bool = False,
    seed: int = 0,
) -> dict[str, Agreement]:
    """Compares outputs of each network on all backends, with random weights: see `nnopt.backends.agreement`.

    Args:
        networks: by name, each with what it is called with.
        backends: to compare.
        watcher: is told how it gets on.
        tolerance: of the relative difference.
        layers: also of convolutions and dense layers.
        seed: of the weights.

    Raises:
        BackendError: a backend cannot compile one of them.
    """
    watcher.phase("checking", len(networks))
    found = {}
    for name, (net, example) in networks.items():
        variables = stand_in_variables(net, example, seed)
        try:
            found[name] = agreement(
                net, variables, example, backends, tolerance=tolerance, layers=layers
            )
        except BackendError as error:
            raise type(error)(f"{name}: {error}") from error
        watcher.advance(name)
    return found


def time_checked(
    networks: Mapping[str, tuple[nn.Module, Example]],
    checked: Mapping[str, Agreement],
    backends: Sequence[Backend],
    watcher: Watcher,
    *,
    repeats: int,
) -> list[TimedRun]:
    """Latencies of the networks on which the backends agree; there is none of the others."""
    agreed = {name: pair for name, pair in networks.items() if checked[name].agrees}
    return time_all(agreed, backends, watcher, what="networks", repeats=repeats) if agreed else []


def rank_agreements(
    runs: Sequence[TimedRun], *, seed: int = 0
) -> dict[tuple[str, str], RankAgreement]:
    """How alike each two backends rank networks by their latency.

    Args:
        runs: of the same networks on each backend.
        seed: of the resampling that intervals come from.

    Returns:
        By the names of two backends; nothing if there are fewer than two networks.
    """
    times: dict[str, dict[str, float]] = {}
    for run in runs:
        times.setdefault(run.backend, {})[run.name] = run.latency.median_ms
    pairs = {}
    for (a, first), (b, second) in itertools.combinations(times.items(), 2):
        both = [name for name in first if name in second]
        if len(both) > 1:
            pairs[a, b] = rank_agreement(
                [-first[n] for n in both], [-second[n] for n in both], seed=seed
            )
    return pairs
