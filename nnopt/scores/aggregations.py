"""How the channels' Fisher potentials make the network's."""

import abc
import dataclasses
from collections.abc import Mapping

import numpy as np

from nnopt.errors import ScoreError


class Aggregation(abc.ABC):
    """What a block adds to Fisher potential: a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, block: str, potentials: np.ndarray) -> float:
        """What a block adds to the total.

        Args:
            block: its path text.
            potentials: of each channel of its probe, float64 `[channels]`.
        """


@dataclasses.dataclass(frozen=True)
class Sum(Aggregation):
    """The sum over channels and blocks, as published. Blocks near the input carry most of it."""

    def __call__(self, block: str, potentials: np.ndarray) -> float:
        """See `Aggregation`."""
        return float(potentials.sum())


AS_PUBLISHED = Sum()


@dataclasses.dataclass(frozen=True)
class LogSum(Aggregation):
    """The sum over blocks of the logarithm of each block's potential: every block counts alike.

    Ranks by the product of the potentials, so a change by the same factor weighs the same in every block. A block of potential
    zero makes it minus infinity.
    """

    def __call__(self, block: str, potentials: np.ndarray) -> float:
        """See `Aggregation`."""
        total = potentials.sum()
        return float(np.log(total)) if total > 0 else float(total) * 0 - np.inf


@dataclasses.dataclass(frozen=True)
class ChannelMean(Aggregation):
    """The sum over blocks of the mean over channels: a block does not gain by having a wider probe."""

    def __call__(self, block: str, potentials: np.ndarray) -> float:
        """See `Aggregation`."""
        return float(potentials.mean())


@dataclasses.dataclass(frozen=True)
class RelativeTo(Aggregation):
    """The sum over blocks of each block's potential in units of the same block of a reference: usually the network that is changed.

    Blocks near the input carry most of the plain sum. Here a block that keeps its potential counts one wherever it stands, and one
    that loses half of it costs as much at the end as at the start. The reference has to be scored on the same batch size.

    Attributes:
        reference: path text of each block, and its potential in the reference.
    """

    reference: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        """Checks the units.

        Raises:
            ScoreError: a potential is no positive number.
        """
        for block, potential in self.reference:
            if not 0 < potential < np.inf:
                raise ScoreError(
                    f"the block {block!r} of the reference has the potential {potential}, which is no unit; "
                    "give a reference in which every block has a positive one"
                )

    @classmethod
    def of(cls, potentials: Mapping[str, float]) -> "RelativeTo":
        """From the blocks of a reference: `FisherScore.blocks`, or `ScoreValue.sites` of `Fisher()`."""
        return cls(tuple(potentials.items()))

    def __call__(self, block: str, potentials: np.ndarray) -> float:
        """See `Aggregation`.

        Raises:
            ScoreError: the reference has no such block.
        """
        for name, unit in self.reference:
            if name == block:
                return float(potentials.sum() / unit)
        raise ScoreError(
            f"the reference has no block {block!r}; it has {', '.join(name for name, _ in self.reference) or 'none'}: "
            "give one with the blocks of this network"
        )
