"""Rewrites that do not know what a block is: stand a module in, or change its fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from nnopt.core import Keeps, Rewrite, Selector, Sites, select
from nnopt.core.modules import configuration
from nnopt.core.paths import path_text
from nnopt.core.rewrite import copy_equal
from nnopt.errors import RewriteError
from nnopt.layers import Conv
from nnopt.typing import Edits, Path


@dataclasses.dataclass(frozen=True)
class Replace(Rewrite):
    """`m -> module`, at each selected site.

    Attributes:
        where: which sites.
        module: an unbound module that can be called as what stood there.
    """

    where: Selector | str
    module: nn.Module

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""
        return {s.path: self.module for s in select(sites, self.where)}


@dataclasses.dataclass(frozen=True)
class Configure(Rewrite):
    """`m -> m with other fields`, at each selected site: `Configure.of("stage*/conv1", features=32)`.

    Arrays of unchanged shape are carried.

    Attributes:
        where: which sites.
        fields: pairs of field name and new value.
    """

    where: Selector | str
    fields: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, where: Selector | str, **fields: Any) -> "Configure":
        """The rule that sets these fields."""
        return cls(where, tuple(fields.items()))

    @property
    def pins(self) -> frozenset[str]:
        """See `Rewrite`."""
        return frozenset(name for name, _ in self.fields)

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: a selected module has no such field.
        """
        edits = {}
        for site in select(sites, self.where):
            known = configuration(site.module)
            unknown = [name for name, _ in self.fields if name not in known]
            if unknown:
                raise RewriteError(
                    f"{type(site.module).__name__} at {path_text(site.path)!r} has no field "
                    f"{unknown[0]!r}; it has {', '.join(known)}"
                )
            edits[site.path] = site.module.clone(parent=None, **dict(self.fields))
        return edits

    def carry(
        self, path: Path, old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.Array]:
        """Copies arrays whose shape is unchanged."""
        return copy_equal(old, new)


@dataclasses.dataclass(frozen=True)
class LowerGroupedConvs(Rewrite):
    """`nn.Conv(groups > 1) -> nnopt.layers.Conv`: the same function, lowered to suit the platform.

    Before -> after on a CPU: `conv(x, k, groups=g)` -> `conv(x, block_diagonal(k, g))`, or a sum of shifted images for a
    depthwise one. A network that somebody else wrote becomes trainable on a CPU this way. Subclasses of `nn.Conv` are left
    alone, for they may mean something else.
    """

    keeps = Keeps.FUNCTION

    where: Selector | str

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""

        def grouped(module: nn.Module) -> bool:
            return type(module) is nn.Conv and module.feature_group_count > 1

        return {
            s.path: Conv(
                **{**configuration(s.module), "conv_general_dilated": Conv.conv_general_dilated},
                parent=None,
            )
            for s in select(sites, self.where)
            if grouped(s.module)
        }
