"""What a score is: which passes over the network it needs, how it reduces them, and how the pieces add up.

    network, minibatch --(passes)--> evidence --(Score.reduce)--> arrays --(Score.value)--> ScoreValue
                       one compiled program for all scores               float64, on the host

A *pass* is a way of running the network: forward and backward of the loss, the gradient of the outputs in the images, a flow of
ones through absolute weights. Scores that ask for the same pass share it. Higher is better for every score.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nnopt.errors import ScoreError
from nnopt.scores.network import TracedNetwork


@dataclasses.dataclass(frozen=True)
class ScoreValue:
    """What a score says about one network.

    Attributes:
        total: the score; higher is better. Never repaired: NaN and infinities are kept.
        sites: path text of a site (or parameter) -> its part of the score, in the order of the network; empty for a score that
            does not split.
    """

    total: float
    sites: dict[str, float] = dataclasses.field(repr=False, default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the total is a finite number: one that is not ranks nothing."""
        return math.isfinite(self.total)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One way of running a network. What it finds is called evidence.

    A frozen dataclass: scores that need equal passes share one.

    Attributes:
        needs_images: whether it looks at the minibatch.
        needs_labels: whether it looks at the labels.
    """

    needs_images = True
    needs_labels = False

    def check(self, network: TracedNetwork) -> None:
        """Refuses networks and batches that it is not defined for.

        Raises:
            ScoreError: what is missing, and what to do.
        """


Evidence = Mapping[Pass, Any]
"""What each pass found."""


@dataclasses.dataclass(frozen=True)
class Score(abc.ABC):
    """A training-free score: a frozen dataclass that prints, hashes and compares.

    Attributes:
        needs: the passes it reads.
        smallest_batch: with fewer images the score says nothing.
    """

    smallest_batch = 1

    @property
    @abc.abstractmethod
    def needs(self) -> tuple[Pass, ...]:
        """The passes it reads, none for a score of the network's shapes alone."""

    @abc.abstractmethod
    def reduce(self, evidence: Evidence) -> dict[str, jax.Array]:
        """Evidence -> an array for each site; pure and traceable.

        What is left to sum is summed on the host in float64: channels stay apart here.
        """

    def value(self, reduced: Mapping[str, np.ndarray], network: TracedNetwork) -> ScoreValue:
        """The arrays of `reduce`, fetched -> the score, in float64. By default each site's sum, and the sum of those."""
        sites = {path: float(array.astype(np.float64).sum()) for path, array in reduced.items()}
        return ScoreValue(sum(sites.values()), sites)

    def check(self, network: TracedNetwork) -> None:
        """Refuses networks and batches that the score is not defined for.

        Raises:
            ScoreError: what is missing, and what to do.
        """
        if any(p.needs_images for p in self.needs) and network.batch < self.smallest_batch:
            raise ScoreError(
                f"{self} compares the images of a minibatch and got {network.batch}; "
                f"give at least {self.smallest_batch}"
            )
        for needed in self.needs:
            needed.check(network)
