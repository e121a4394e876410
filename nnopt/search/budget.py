"""Budgets: how many parameters (or whatever a space counts) a candidate may have."""

import decimal
import math
import re
from fractions import Fraction

from nnopt.errors import BudgetError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_budget(text: str) -> int:
    """The number that a text like `400K`, `1.6M` or `250000` stands for.

    Raises:
        BudgetError: it is no positive whole number, written plainly or with K, M or G.

    Example:
        >>> parse_budget("400K"), parse_budget("1.6M"), parse_budget("250000")
        (400000, 1600000, 250000)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)", text.strip().upper())
    if match:
        value = decimal.Decimal(match[1]) * _UNITS[match[2]]
        if value > 0 and value == int(value):
            return int(value)
    raise BudgetError(
        f"{text!r} is no budget; give a positive whole number, such as 250000, 400K or 1.6M"
    )


def budget_range(budget: int, tolerance: float) -> tuple[int, int]:
    """The smallest and the largest whole number in the open interval `budget * (1 -+ tolerance)`.

    BlockSwap keeps candidates with `0.975 * budget < parameters < 1.025 * budget`
    (https://arxiv.org/abs/1906.04113). The bounds are worked out in decimal fractions, so that a total that lies exactly
    on one is out.

    Args:
        budget: centre of the interval.
        tolerance: half its width, relative to the budget.

    Returns:
        Both ends, inclusive; the first exceeds the second if no whole number lies between the bounds.

    Raises:
        BudgetError: the budget or the tolerance is not a positive number.

    Example:
        >>> budget_range(400_000, 0.025)
        (390001, 409999)
    """
    if budget <= 0:
        raise BudgetError(f"the budget is {budget:,}; give a positive number")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise BudgetError(
            f"the tolerance around the budget is {tolerance}; give a positive number, such as 0.025"
        )
    margin = budget * Fraction(repr(float(tolerance)))
    return math.floor(budget - margin) + 1, math.ceil(budget + margin) - 1
