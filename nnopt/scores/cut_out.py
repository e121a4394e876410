"""Taking units out of a network, and putting modules in: the edits from which the engine makes its pieces."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from nnopt.core import Keeps, Rewrite, Sites
from nnopt.core.paths import path_text
from nnopt.errors import SelectionError
from nnopt.scores.steps import hole_p
from nnopt.typing import Edits, Path


class _Outputs:
    """Shapes and structure of what a unit returns; opaque to Flax, which would adopt a pytree."""

    def __init__(self, outputs: Any) -> None:
        leaves, self.tree = jax.tree.flatten(outputs)
        self.specs = tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    def encoded(self) -> str:
        """What it is, for fingerprints."""
        return repr((self.specs, self.tree))


class _Cut(nn.Module):
    """Stands where a unit was cut out."""

    index: int
    outputs: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arrays = [a for a in jax.tree.leaves((args, kwargs)) if isinstance(a, jax.Array)]
        found = hole_p.bind(*arrays, index=self.index, outputs=self.outputs.specs)
        return jax.tree.unflatten(self.outputs.tree, found)


@dataclasses.dataclass(frozen=True)
class CutOut(Rewrite):
    """`unit -> hole`, at each of these paths."""

    keeps = Keeps.OUTPUT_SPEC

    paths: tuple[Path, ...]

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""
        return {
            path: _Cut(i, _Outputs(sites[path].outputs), parent=None)
            for i, path in enumerate(self.paths)
        }


@dataclasses.dataclass(frozen=True)
class Stand(Rewrite):
    """`m -> module`, at each of these paths."""

    keeps = Keeps.OUTPUT_SPEC

    edits: tuple[tuple[Path, nn.Module], ...]

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`."""
        return dict(self.edits)


def units_of(chosen: Sites) -> tuple[Path, ...]:
    """Paths of the sites that are chosen to be cut out, in call order.

    Raises:
        SelectionError: there is none, or one that cannot be cut out.
    """
    if not len(chosen):
        raise SelectionError(
            "nothing is selected to be cut out; select the sites that differ between candidates"
        )
    for site in chosen:
        text = path_text(site.path)
        stacked = {"scan", "vmap"} & set(site.lifted)
        if stacked:
            raise SelectionError(
                f"{text!r} stands for several layers stacked by nn.{stacked.pop()}, so it cannot be cut out; write the layers out"
            )
        if len(site.calls) != 1 or site.calls[0].method != "__call__":
            raise SelectionError(
                f"{text!r} is called {len(site.calls)} times, so it cannot be cut out as one unit"
            )
        inner = [
            p for p in chosen.paths if len(p) > len(site.path) and p[: len(site.path)] == site.path
        ]
        if inner or not site.path:
            below = path_text(inner[0]) if inner else "the network itself"
            raise SelectionError(
                f"{text!r} and {below!r} lie inside one another; select one of them"
            )
    return chosen.paths
