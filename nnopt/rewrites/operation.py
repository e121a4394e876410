"""Operations of a network as loop nests, transformed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from nnopt.core import Rewrite, Selector, Site, Sites, select
from nnopt.core.modules import configuration
from nnopt.core.paths import path_text
from nnopt.errors import NestError, RewriteError
from nnopt.layers import Conv
from nnopt.nests import Operator, Program
from nnopt.nests.module import ProgramConv, ProgramDense, carried, nest_of, spatial_rank
from nnopt.typing import Edits, Path

_KINDS: dict[type[nn.Module], Any] = {
    nn.Conv: ProgramConv,
    Conv: ProgramConv,
    nn.Dense: ProgramDense,
}


@dataclasses.dataclass(frozen=True)
class MutateConv(Rewrite):
    """`conv -> Program(...)(conv)`: the operator that a program makes of a convolution or dense layer, at each selected site.

    Before -> after of `MutateConv("stage2/*", Program((Group("co", "ci", 4),)))`: `Conv(64) -> ProgramConv(64, program=...)`, which
    computes what `Conv(64, feature_group_count=4)` would. Weights are carried as far as the operator has them: slices and diagonal
    blocks of the kernel.

    Attributes:
        where: which sites; a site that is neither `nn.Conv` nor `nn.Dense` is an error.
        program: what is made of each.
    """

    where: Selector | str
    program: Program

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            RewriteError: a selected module is no convolution or dense layer, or the program is not possible for its shape.
        """
        edits = {}
        for site in select(sites, self.where):
            operator_at(site, self.program)
            fields = {
                k: v for k, v in configuration(site.module).items() if k != "conv_general_dilated"
            }
            edits[site.path] = _KINDS[type(site.module)](
                **fields, program=self.program, parent=None
            )
        return edits

    def written_out(self, sites: Sites) -> Rewrite:
        """See `Rewrite`."""
        return _Carried({s.path: operator_at(s, self.program) for s in select(sites, self.where)})


@dataclasses.dataclass(frozen=True)
class _Carried(Rewrite):
    """The operators that a program made, by path."""

    operators: Mapping[Path, Operator]

    def __call__(self, sites: Sites) -> Edits:
        """Never called: `MutateConv` is."""
        raise NotImplementedError

    def carry(
        self, path: Path, old: Mapping[str, jax.Array], new: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Mapping[str, jax.Array]:
        """The kernel's slices and blocks that the operator has, and the bias."""
        operator = self.operators[path]
        params = {name.removeprefix("params/"): value for name, value in old.items()}

        def found(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return carried(operator, params)

        for _ in range(params["kernel"].ndim - len(operator.kernel)):  # layers stacked by `nn.scan`
            found = jax.vmap(found)
        return {f"params/{name}": value for name, value in found(params).items()}


def operator_at(site: Site, program: Program = Program()) -> Operator:  # noqa: B008 - it is frozen
    """What a program makes of the convolution or dense layer at a site.

    Raises:
        RewriteError: the site is something else, or the program is not possible there.
    """
    where = f"{type(site.module).__name__} at {path_text(site.path)!r}"
    if type(site.module) not in _KINDS:
        raise RewriteError(
            f"{where} is no nn.Conv or nn.Dense, so it has no loop nest; select those alone"
        )
    shapes = {call.args[0].shape for call in site.calls}
    images = {shape[len(shape) - spatial_rank(site.module) - 1 :] for shape in shapes}
    try:
        made = [program(nest_of(site.module, image)) for image in sorted(images)]
    except NestError as error:
        raise RewriteError(f"{where}: {error}") from None
    if len({m.nests for m in made}) > 1 and program.steps:
        raise RewriteError(
            f"{where} is shared by images of shapes {sorted(images)}; a program is for one shape"
        )
    return made[0]
