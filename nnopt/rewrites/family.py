"""Members of a family of networks by their size: the largest one within a budget of parameters."""

import math
from collections.abc import Callable

from nnopt.core import Sites
from nnopt.core.channels import channel_groups_traced
from nnopt.core.sites import count_leaves
from nnopt.errors import BudgetError, RewriteError
from nnopt.rewrites.resize import Resize
from nnopt.rewrites.skeleton import Widths, resize_groups

_STEPS = 14
"""Halvings of the range of factors."""


def parameters_resized(sites: Sites, rule: Resize) -> int:
    """Trainable values of a network after a `Resize`, without tracing it."""
    sizes: dict[tuple[str, ...], dict[int, int]] = {}
    for extent in rule.extents:
        sizes.setdefault(extent.leaf, {})[extent.axis] = extent.size
    total = count_leaves(sites.variables.get("params", {}))
    for site in sites:
        for name, spec in site.variables.get("params", {}).items():
            changed = sizes.get(("params", *site.path, *name.split("/")))
            if changed:
                shape = [changed.get(axis, n) for axis, n in enumerate(spec.shape)]
                total += math.prod(shape) - math.prod(spec.shape)
    return total


def largest_within(
    sites: Sites,
    family: Callable[[float], Widths],
    budget: float,
    *,
    high: float = 1.0,
) -> Widths:
    """The rule of a family with the largest factor whose network has at most `budget` parameters.

    Args:
        sites: of the network.
        family: factor -> rule, such as `ScaleWidth`; the number of parameters grows with the factor.
        budget: parameters.
        high: the largest factor to look at.

    Raises:
        BudgetError: no factor leads to so small a network.
    """
    groups = channel_groups_traced(sites)
    smallest: float = math.inf
    refusal: RewriteError | None = None

    def count(factor: float) -> float | None:
        """Parameters of a member; None for a factor that leaves nothing of the network."""
        nonlocal smallest, refusal
        try:
            written = resize_groups(groups, family(factor).sizes(groups))
        except RewriteError as error:
            refusal = error
            return None
        found = parameters_resized(sites, written)
        smallest = min(smallest, found)
        return found

    whole = count(high)
    if whole is not None and whole <= budget:
        return family(high)
    low, best = 0.0, None
    for _ in range(_STEPS):
        factor = (low + high) / 2
        found = count(factor)
        if found is None or found <= budget:
            low = factor
            best = factor if found is not None else best
        else:
            high = factor
    if best is None and smallest == math.inf and refusal is not None:
        raise refusal
    if best is None:
        raise BudgetError(
            f"no member of this family has {budget:,.0f} parameters or fewer; the smallest found has {smallest:,.0f}"
        )
    return family(best)
