"""Spaces of candidates: which rewrites may stand at which position of a network, and what each costs."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import flax.linen as nn

from nnopt.core import Example, ResidualBlocks, Selector, Site, Sites, fingerprint, select, sites
from nnopt.core.paths import path_text, subtree
from nnopt.core.sites import count_leaves
from nnopt.costs.counts import parameters
from nnopt.errors import ChoiceError, SelectionError
from nnopt.rewrites.block import Genotype, block_for, block_shape
from nnopt.rewrites.choice import CODE_CHOICES, Choice
from nnopt.typing import Path


@dataclasses.dataclass(frozen=True)
class BlockSpace:
    """All networks that have one of several blocks at each position.

    A candidate is a tuple of indices, one for each position: `indices[i]` picks from `choices[i]`. Choices of different
    names that mean the same block somewhere (such as G(2) and G(N/16) at 32 channels) are different candidates.

    Attributes:
        paths: where the positions are, in call order.
        choices: what may stand at each of them.
        costs: parameters of the block that each choice makes there.
        fixed: parameters of the network outside of these blocks.
        where: the selector that picks the positions.
    """

    paths: tuple[Path, ...]
    choices: tuple[tuple[Choice, ...], ...]
    costs: tuple[tuple[int, ...], ...]
    fixed: int
    where: Selector | str = dataclasses.field(default_factory=ResidualBlocks)

    @property
    def size(self) -> int:
        """Number of candidates."""
        return math.prod(map(len, self.choices))

    @property
    def smallest(self) -> int:
        """Parameters of the smallest candidate."""
        return self.fixed + sum(map(min, self.costs))

    @property
    def largest(self) -> int:
        """Parameters of the largest candidate."""
        return self.fixed + sum(map(max, self.costs))

    def total(self, indices: Sequence[int]) -> int:
        """Parameters of the whole network that a candidate is."""
        return self.fixed + sum(c[i] for c, i in zip(self.costs, indices, strict=True))

    def genotype(self, indices: Sequence[int]) -> Genotype:
        """The rule that makes a candidate of the network."""
        picked = tuple(c[i] for c, i in zip(self.choices, indices, strict=True))
        return Genotype(picked, self.where)

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The paper's names of a candidate's choices."""
        return tuple(c[i].name for c, i in zip(self.choices, indices, strict=True))


def block_space(
    net: nn.Module,
    example: object,
    choices: Iterable[Choice] = CODE_CHOICES,
    where: Selector | str | None = None,
) -> BlockSpace:
    """The space of block choices for a network; nothing is computed but shapes.

    Args:
        net: any linen module, rewritten before or not.
        example: an array of the network's input shape, or an `Example`.
        choices: what may stand at a position; one that is impossible at some position is left out there.
        where: which modules are the positions; residual blocks by default.

    Raises:
        SelectionError: `where` selects nothing.
        ChoiceError: a position cannot be any of the choices.

    Example:
        >>> import jax.numpy as jnp
        >>> from nnopt.networks import WideResNet
        >>> from nnopt.rewrites import choice
        >>> small = block_space(
        ...     WideResNet(10, 1.0), jnp.zeros((1, 32, 32, 3)), [choice("S"), choice("G(4)")]
        ... )
        >>> small.size, small.costs[0], small.total((0, 0, 0))
        (8, (4672, 1792), 77850)
    """
    where = ResidualBlocks() if where is None else where
    choices = tuple(choices)
    traced = sites(net, example)
    positions = select(traced, where)
    if not len(positions):
        raise SelectionError(
            f"{where} selects nothing in {type(net).__name__}; select the blocks that may be replaced"
        )
    known: dict[tuple[str, int], int] = {}
    possible = [_choices_at(site, traced, choices, known) for site in positions]
    params = traced.variables.get("params", {})
    below = sum(count_leaves(subtree(params, path)) for path in positions.paths)
    return BlockSpace(
        paths=positions.paths,
        choices=tuple(tuple(c for c, _ in here) for here in possible),
        costs=tuple(tuple(cost for _, cost in here) for here in possible),
        fixed=count_leaves(params) - below,
        where=where,
    )


def _choices_at(
    site: Site, traced: Sites, choices: tuple[Choice, ...], known: dict[tuple[str, int], int]
) -> list[tuple[Choice, int]]:
    """What may stand at a site, each with its parameters; `known` holds the counts of blocks seen before."""
    inputs, _, _ = block_shape(site)
    example = Example(*site.calls[0].args, **site.calls[0].kwargs)
    copies = _copies(site, traced, example)
    possible = []
    refused = "there are no choices"
    for choice in choices:
        try:
            block = block_for(site, traced, choice)
        except ChoiceError as e:
            refused = str(e)
            continue
        # Equal blocks recur at most positions, and tracing one takes a hundred times as long as its fingerprint.
        key = (fingerprint(block), inputs)
        if key not in known:
            known[key] = parameters(block, example)
        possible.append((choice, known[key] * copies))
    if not possible:
        raise ChoiceError(
            f"none of the {len(choices)} choices is possible at {path_text(site.path)!r}: {refused}"
        )
    return possible


def _copies(site: Site, traced: Sites, example: Example) -> int:
    """How many times `nn.scan` or `nn.vmap` stacks the parameters of a site."""
    if not {"scan", "vmap"} & set(site.lifted):
        return 1
    once = parameters(site.module, example)
    return count_leaves(subtree(traced.variables["params"], site.path)) // once if once else 1
