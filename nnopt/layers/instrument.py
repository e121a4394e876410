"""Rules that instrument a network: recording an activation and gating one are edits like any other."""

import dataclasses

import flax.linen as nn

from nnopt.core import Keeps, Rewrite, Selector, Sites, select
from nnopt.layers.combinators import Gate, Tap, Then
from nnopt.typing import Edits


@dataclasses.dataclass(frozen=True)
class AddTap(Rewrite):
    """`m -> Then(m, Tap())`: what the selected sites return appears in the `taps` collection."""

    keeps = Keeps.FUNCTION

    where: Selector | str

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""
        return _followed_by(Tap(parent=None), select(sites, self.where))


@dataclasses.dataclass(frozen=True)
class AddGate(Rewrite):
    """`m -> Then(m, Gate())`: what the selected sites return is multiplied by a gate, if the `gates` collection holds one."""

    keeps = Keeps.FUNCTION

    where: Selector | str

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""
        return _followed_by(Gate(parent=None), select(sites, self.where))


def _followed_by(after: nn.Module, selected: Sites) -> Edits:
    return {s.path: Then(s.module, after, parent=None) for s in selected}
