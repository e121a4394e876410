"""Where Fisher potential looks: the last convolution of each residual block, before the addition."""

from nnopt.core import Dataflow, Selector, select
from nnopt.core.paths import path_text
from nnopt.core.sites import Sites
from nnopt.errors import SelectionError
from nnopt.typing import Path


def block_probes(found: Sites, where: Selector | str | None = None) -> dict[Path, Path]:
    """The probe of each block: the last convolution on its longer way to the residual addition.

    Args:
        found: all sites of the network.
        where: which modules are the blocks; by default every residual block.

    Returns:
        Path of each block -> path of its probe.

    Raises:
        SelectionError: there is no residual block, a selected module adds nothing to a shortcut, or its probe lies inside `nn.scan`
            or `nn.vmap`, where one site stands for many layers.
    """
    branches = {add.path: add.branch for add in Dataflow(found.net, found.example).residual_adds}
    blocks = found.where(lambda s: bool(s.path) and s.path in branches)
    if where is not None:
        blocks = select(found, where)
    elif not len(blocks):
        raise SelectionError(
            f"{type(found.net).__name__} has no module that adds a branch of convolutions to a shortcut, so Fisher potential has "
            "no probe in it; choose a score that needs no residual blocks, such as layer Fisher or NASWOT"
        )
    probes = {}
    for block in blocks:
        probe = branches.get(block.path)
        if probe is None:
            raise SelectionError(
                f"{path_text(block.path)!r} adds no branch of convolutions to a shortcut, so Fisher potential has no probe there; "
                "select residual blocks"
            )
        stacked = {"scan", "vmap"} & set(found[probe].lifted)
        if stacked:
            raise SelectionError(
                f"{path_text(probe)!r} stands for several layers stacked by nn.{stacked.pop()}, which Fisher potential cannot "
                "tell apart; write the layers out"
            )
        probes[block.path] = probe
    return probes
