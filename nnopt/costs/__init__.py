"""What a network costs, counted from its structure alone."""

from nnopt.costs.counts import macs, macs_by_site, parameters

__all__ = ["macs", "macs_by_site", "parameters"]
