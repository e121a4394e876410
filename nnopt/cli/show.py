"""`nnopt show`: a network as a tree."""

import dataclasses
from typing import Annotated

import tyro

from nnopt.cli.networks import example_for, load_network


@dataclasses.dataclass(frozen=True)
class ShowCommand:
    """Print a network as a tree with classes, shapes and parameters, or what changed between two.

    Example: nnopt show wrn-16-2 --depth 1
    """

    network: Annotated[str, tyro.conf.Positional]
    """Name of a network (wrn-40-2, resnet-18, ...) or path of a network record (network.json)."""
    against: str | None = None
    """Another network or record: print the difference from this one to NETWORK."""
    depth: int | None = None
    """Levels to show; all by default."""
    size: int = 32
    """Height and width of the images it is shown for."""

    def run(self) -> None:
        """Prints the tree or the difference."""
        from nnopt.core import diff, show
        from nnopt.costs import macs
        from nnopt.errors import SelectionError

        if self.depth is not None and self.depth < 0:
            raise SelectionError(f"a tree has no {self.depth} levels; give --depth 0 or more")
        net = load_network(self.network)
        example = example_for(net, self.size)
        if self.against is not None:
            old = load_network(self.against)
            print(diff(old, net, example_for(old, self.size)))
            return
        print(show(net, example, depth=self.depth))
        print(
            f"{macs(net, example):,} multiply-accumulates for one image of {self.size} x {self.size}"
        )
