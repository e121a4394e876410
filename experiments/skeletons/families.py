"""The families of networks that are compared: a base network made smaller in every way there is."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.skeletons.pictures import SCALED
from nnopt.core import Example, ResidualBlocks, channel_groups, rewrite, sites
from nnopt.errors import PruneError
from nnopt.rewrites import (
    Bottleneck,
    Rewrite,
    ScaleDepth,
    ScaleProfile,
    ScaleWidth,
    at_random,
    by_group,
    channel_gradients,
    fisher,
    inner_groups,
    magnitude,
    prune,
    weakest,
)
from nnopt.training import cross_entropy
from nnopt.typing import Variables

SCHEMES = (
    "depth", "width", "bottleneck", "bottleneck x 8", "Fisher", "L1", "random", "Fisher profile",
)  # fmt: skip
PRUNED = tuple(s for s in SCHEMES if s not in SCALED)


@dataclasses.dataclass(frozen=True)
class Member:
    """A network of a family.

    Attributes:
        scheme: how it became smaller.
        detail: by how much, for tables.
        net: the network.
    """

    scheme: str
    detail: str
    net: nn.Module


def check_counts(**options: int | Sequence[int]) -> None:
    """Refuses numbers below one, and empty lists of them.

    Args:
        **options: values of options of the command line, by their names.

    Raises:
        PruneError: what was given, for which option.
    """
    for name, values in options.items():
        numbers = [values] if isinstance(values, int) else list(values)
        if not numbers or min(numbers) < 1:
            given = " ".join(map(str, numbers)) or "empty"
            raise PruneError(f"--{name} is {given}; give whole numbers from 1")


def blocks_in_a_stage(net: nn.Module, image: tuple[int, ...]) -> int:
    """Residual blocks in the longest stage, those that return the same shape.

    Args:
        net: the network.
        image: shape of an image, `(height, width, channels)`.

    Raises:
        SelectionError: it has no residual blocks.
    """
    example = Example(jax.ShapeDtypeStruct((1, *image), jnp.float32))
    shapes = (site.outputs.shape for site in ResidualBlocks()(sites(net, example)))
    return max(Counter(shapes).values())


def members(
    base: nn.Module,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    *,
    points: int = 6,
    stem: str = "stem",
) -> Iterator[Member]:
    """The base network and its smaller relatives.

    What Fisher information, L1 norms and chance leave has the shapes of pruned networks. Shapes decide how fast a network runs, and
    those are found here in one shot at the given weights.

    Args:
        base: a network of residual blocks.
        variables: its variables.
        images: `[batch, height, width, 3]`, of the minibatch for Fisher information.
        labels: `[batch]`.
        points: members of each family.
        stem: the module that scaling the width leaves alone.

    Raises:
        SelectionError: the base network has no residual blocks, or no such stem.
    """
    blocks = blocks_in_a_stage(base, images.shape[1:])
    example = Example(jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32))

    def scaled(scheme: str, detail: str, rule: Rewrite) -> Member:
        return Member(scheme, detail, rewrite(base, rule, example=example))

    yield Member("base", "", base)
    fractions = [(i + 1) / (points + 1) for i in range(points)]
    for left in range(blocks - 1, 0, -1):
        yield scaled("depth", f"{left} of {blocks} blocks", ScaleDepth(left / blocks))
    for f in fractions:
        width = (1 - f) ** 0.5
        yield scaled("width", f"x {width:.2f}", ScaleWidth(width, 4, stem))
        yield scaled("bottleneck", f"x {1 - f:.2f}", Bottleneck(1 - f))
        yield scaled("bottleneck x 8", f"x {1 - f:.2f}", Bottleneck(1 - f, multiple=8))
    groups = channel_groups(base, Example(images, train=True))
    names = inner_groups(groups)
    gradients = channel_gradients(groups, [images], labels, variables, cross_entropy)
    scores = {
        "Fisher": by_group(groups, fisher(gradients), dict.fromkeys(names)),
        "L1": {n: magnitude(groups, variables)[n] for n in names},
        "random": {n: at_random(groups, jax.random.key(1))[n] for n in names},
    }
    total = sum(groups[n].size for n in names)
    for scheme, found in scores.items():
        for f in fractions:
            removed = weakest(groups, found, count=round(f * total))
            yield scaled(
                scheme, f"{sum(map(len, removed.values()))} channels", prune(groups, removed)
            )
    half = weakest(groups, scores["Fisher"], count=total // 2)
    profile = tuple(groups[n].size - len(half.get(n, ())) for n in names)
    widest = np.array([groups[n].size for n in names]) / np.array(profile)
    for f in fractions:
        factor = 2 * (1 - f)
        if min(profile) * factor >= 1 and factor <= 1.2 * widest.max():
            yield scaled("Fisher profile", f"x {factor:.2f}", ScaleProfile(profile, factor))
