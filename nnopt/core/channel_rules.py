"""How each JAX primitive ties the axes of its operands together: one rule for each.

`core.channel_ties` says what rules work on and what they find. Rules stand with their like: `core.channel_elementwise`,
`core.channel_shapes`, `core.channel_products`; importing this module registers all of them.

An operation that runs over labelled axes in a way that is not known keeps them whole (joins them with 0) and is reported.
"""

from nnopt.core import channel_elementwise, channel_products, channel_shapes
from nnopt.core.channel_ties import (
    RULES,
    Axes,
    Labels,
    Note,
    Ties,
    consumed,
    flatten_any,
    of_literal,
    rule,
    run,
)

__all__ = [
    "RULES",
    "Axes",
    "Labels",
    "Note",
    "Ties",
    "channel_elementwise",
    "channel_products",
    "channel_shapes",
    "consumed",
    "flatten_any",
    "of_literal",
    "rule",
    "run",
]
