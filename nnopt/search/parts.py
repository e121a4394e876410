"""Networks as the parts that a latency table knows: whole blocks where a space has positions, single layers elsewhere.

A compiler fuses what is within a block: normalisation, activation and addition vanish in the convolutions around them, and tensors
between them may never leave a cache. So a block is one part, compiled and timed whole. What lies outside of blocks (stem, head) is
its layers; what those leave out is the same in all candidates of a space, and a fit finds it.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from nnopt.backends import Backend, Compiled, stand_in_variables
from nnopt.backends.compiled import as_function
from nnopt.core import Example, ResidualBlocks, Selector, Site, Sites, fingerprint, select, sites
from nnopt.core.paths import path_text
from nnopt.costs import macs_by_site
from nnopt.errors import SelectionError
from nnopt.rewrites.block import block_for
from nnopt.search.space import BlockSpace

COPIES = 3
"""Copies of a block in a chain."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that is timed alone.

    Attributes:
        workload: what it is and what it is called with; equal for what takes equally long.
        label: for people.
        module: it.
        example: what it is called with.
    """

    workload: str
    label: str
    module: nn.Module
    example: Example

    @classmethod
    def of(cls, module: nn.Module, site: Site, label: str) -> "Part":
        """A module as it is called at a site."""
        module = module.clone(parent=None, name=None)
        example = Example(*site.calls[0].args, **site.calls[0].kwargs)
        return cls(f"{fingerprint(module)[:16]} {example}", label, module, example)


@dataclasses.dataclass(frozen=True)
class SpaceParts:
    """The parts of all candidates of a space.

    Attributes:
        choices: `choices[i][j]` is the part that choice `j` makes at position `i`.
        fixed: parts outside of the positions.
        own: the blocks that the network itself has there.
    """

    choices: tuple[tuple[Part, ...], ...]
    fixed: tuple[Part, ...]
    own: tuple[Part, ...] = ()

    @property
    def distinct(self) -> tuple[Part, ...]:
        """Each once, the fixed ones first."""
        flat = (*self.fixed, *self.own, *(part for here in self.choices for part in here))
        return tuple({part.workload: part for part in reversed(flat)}.values())[::-1]

    def of(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The workloads of a candidate."""
        picked = (c[i].workload for c, i in zip(self.choices, indices, strict=True))
        return (*(part.workload for part in self.fixed), *picked)


def space_parts(space: BlockSpace, traced: Sites) -> SpaceParts:
    """The parts of a space.

    Args:
        space: of the network.
        traced: its sites.
    """
    choices = tuple(
        tuple(
            Part.of(block_for(traced[path], traced, c), traced[path], _block_label(traced[path], c.name))
            for c in here
        )
        for path, here in zip(space.paths, space.choices, strict=True)
    )  # fmt: skip
    own = tuple(_own(traced[path]) for path in space.paths)
    return SpaceParts(choices, _layers(traced, space.paths), own)


def network_parts(
    net: nn.Module, example: Example, where: Selector | str | None = None
) -> tuple[Part, ...]:
    """The parts of one network: its residual blocks (or what `where` selects) whole, and its other layers."""
    traced = sites(net, example)
    try:
        blocks = select(traced, where or ResidualBlocks())
    except SelectionError:
        if where is not None:
            raise
        return _layers(traced, ())
    return (*_layers(traced, blocks.paths), *map(_own, blocks))


def compile_part(part: Part, backend: Backend, copies: int = 1) -> Compiled:
    """Compiles a part, alone or as a chain of copies with weights of their own.

    In a chain, a block has the neighbours that it has in a network: its first operations are fused with another's last, and its
    weights have been pushed out of the nearest cache by those of others.

    Args:
        part: what.
        backend: with what.
        copies: in the chain; more than one only for what returns what it takes, see `chained`.
    """
    calls, inputs = [], None
    for seed in range(copies):
        variables = stand_in_variables(part.module, part.example, seed)
        call, inputs = as_function(part.module, variables, part.example)
        calls.append(call)
    assert inputs is not None

    def chain(x: jax.Array, *others: jax.Array) -> jax.Array:
        for call in calls:
            x = call(x, *others)
        return x

    return backend.compile(chain, inputs)


def chained(part: Part) -> bool:
    """Whether copies of a part can be called one after the other."""
    args = part.example.args
    if not args or not isinstance(args[0], jax.ShapeDtypeStruct):
        return False
    variables = jax.eval_shape(lambda: part.example.init(part.module, jax.random.key(0)))
    call, example = part.module.apply, part.example
    made = example.abstractly(lambda v, *a, **k: call(v, *a, **k), variables)
    return isinstance(made, jax.ShapeDtypeStruct) and (made.shape, made.dtype) == (args[0].shape, args[0].dtype)  # fmt: skip


def computing(traced: Sites) -> dict[tuple[str, ...], int]:
    """Multiply-accumulates of each innermost site that does any; a module that multiplies around others that do is left out."""
    counts = macs_by_site(traced.net, traced.example)
    return {
        path: count
        for path, count in counts.items()
        if path
        and path in traced.paths
        and not any(path == other[: len(path)] != other for other in counts)
    }


def _layers(traced: Sites, blocks: Sequence[tuple[str, ...]]) -> tuple[Part, ...]:
    """The computing sites outside of blocks, each as often as it is called."""
    found = []
    for path in computing(traced):
        if not any(path[: len(block)] == block for block in blocks):
            site = traced[path]
            part = Part.of(site.module, site, f"{type(site.module).__name__} {path_text(path)}")
            found += [part] * len(site.calls)
    return tuple(found)


def _own(block: Site) -> Part:
    return Part.of(block.module, block, _block_label(block, type(block.module).__name__))


def _block_label(site: Site, name: str) -> str:
    before, after = ("x".join(map(str, x.shape)) for x in (site.inputs[0], site.outputs))
    return f"{name} {before} -> {after}"
