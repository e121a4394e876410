"""The mechanism: sites, selectors, one primitive that stands modules in for others, rewrites, and their records."""

from nnopt.core.carry import CarryReport, carry
from nnopt.core.channels import ChannelGroup, ChannelGroups, channel_groups
from nnopt.core.dataflow import Dataflow, Equation, ResidualAdd, ResidualBlocks
from nnopt.core.example import Example
from nnopt.core.fingerprint import fingerprint
from nnopt.core.patch import Patch, Patched
from nnopt.core.record import from_record, load_record, save_record, to_record
from nnopt.core.rewrite import Keeps, Rewrite, Step, base_of, history, replay, rewrite
from nnopt.core.select import All, At, Exactly, Glob, Leaves, Of, Selector, Under, select
from nnopt.core.show import diff, show
from nnopt.core.sites import Call, Site, Sites, sites

__all__ = [
    "All",
    "At",
    "Call",
    "CarryReport",
    "ChannelGroup",
    "ChannelGroups",
    "Dataflow",
    "Equation",
    "Exactly",
    "Example",
    "Glob",
    "Keeps",
    "Leaves",
    "Of",
    "Patch",
    "Patched",
    "ResidualAdd",
    "ResidualBlocks",
    "Rewrite",
    "Selector",
    "Site",
    "Sites",
    "Step",
    "Under",
    "base_of",
    "carry",
    "channel_groups",
    "diff",
    "fingerprint",
    "from_record",
    "history",
    "load_record",
    "replay",
    "rewrite",
    "save_record",
    "select",
    "show",
    "sites",
    "to_record",
]
