"""Replacing residual blocks by cheaper ones, as in BlockSwap (https://arxiv.org/abs/1906.04113)."""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import flax.linen as nn

from nnopt.core import Call, ResidualBlocks, Rewrite, Selector, Site, Sites, select
from nnopt.core.modules import External, configuration
from nnopt.core.paths import path_text
from nnopt.errors import ChoiceError, GenotypeError
from nnopt.layers import PreActivationBlock, TrainingFlag
from nnopt.rewrites.choice import Choice
from nnopt.typing import Edits


@dataclasses.dataclass(frozen=True)
class ReplaceBlock(Rewrite):
    """Puts a block of another kind at residual blocks, whatever stood there.

    Before -> after, for a block from `[batch, h, w, in]` to `[batch, h/s, w/s, out]`:

        block(x)  ->  shortcut(x) + op2(relu(norm2(op1(relu(norm1(x))))))   two operators: S, G
        block(x)  ->  shortcut(x) + op1(relu(norm1(x)))                     one operator: B, BG

    `choice` says what the operators are. The new block tells training from inference as the old one did.

    Attributes:
        where: which blocks.
        choice: what to put there.
    """

    where: Selector | str
    choice: Choice

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            ChoiceError: a selected site is no block from images to images, or its channels do not divide.
        """
        return {s.path: block_for(s, sites, self.choice) for s in select(sites, self.where)}


@dataclasses.dataclass(frozen=True)
class Genotype(Rewrite):
    """One choice for each residual block of a network, in call order.

    Before -> after: block i -> the block that `ReplaceBlock` makes of `choices[i]`.

    Attributes:
        choices: as many as there are blocks; None leaves a block as it is.
        where: which modules are the blocks.
        operators: how many operators each block has, one or two; None: as many as its choice says.
    """

    choices: tuple[Choice | None, ...]
    where: Selector | str = dataclasses.field(default_factory=ResidualBlocks)
    operators: tuple[int, ...] | None = None

    def __call__(self, sites: Sites) -> Edits:
        """See `Rewrite`.

        Raises:
            GenotypeError: there are more or fewer choices than blocks, or `operators` does not fit them.
        """
        blocks = select(sites, self.where)
        if len(blocks) != len(self.choices):
            raise GenotypeError(
                f"the genotype holds {len(self.choices)} choices, but {type(sites.net).__name__} has "
                f"{len(blocks)} residual blocks; take a genotype of this network's depth"
            )
        operators = (None,) * len(blocks) if self.operators is None else self.operators
        if len(operators) != len(blocks) or not set(operators) <= {None, 1, 2}:
            raise GenotypeError(
                f"the genotype's operators are {operators}; give one or two for each of its {len(blocks)} blocks"
            )
        return {
            s.path: block_for(s, sites, c, n)
            for s, c, n in zip(blocks, self.choices, operators, strict=True)
            if c is not None
        }


def block_for(site: Site, sites: Sites, choice: Choice, operators: int | None = None) -> nn.Module:
    """The block of a kind that takes and returns what the module at `site` does.

    Args:
        site: what it stands in for.
        sites: all sites of the network.
        choice: its kind.
        operators: how many operators it has, one or two; by default as many as the choice says.

    Raises:
        ChoiceError: the site is no block from images to images, or its channels do not divide as the choice needs.
    """
    inputs, features, stride = block_shape(site)
    flag, source = training_flag(site, sites)
    try:
        op1 = choice.operator(inputs, features, stride)
        op2 = choice.operator(features, features) if (operators or choice.operators) == 2 else None
    except ChoiceError as e:
        raise ChoiceError(f"at {path_text(site.path)!r}: {e}") from e
    return PreActivationBlock(features, stride, op1, op2, flag, source, parent=None)


def block_shape(site: Site) -> tuple[int, int, int]:
    """Input channels, output channels and stride of a block.

    Raises:
        ChoiceError: it does not map `[batch, h, w, in]` to `[batch, h/s, w/s, out]`.
    """
    before: Any = site.inputs[0] if site.inputs else None
    after: Any = site.outputs
    if len(getattr(before, "shape", ())) == len(getattr(after, "shape", ())) == 4:
        _, *size, inputs = before.shape
        _, *new_size, features = after.shape
        stride = -(-size[0] // new_size[0])
        if [-(-s // stride) for s in size] == list(new_size):
            return inputs, features, stride
    raise ChoiceError(
        f"{site} is no block from [batch, h, w, in] to [batch, h/s, w/s, out]; select residual blocks"
    )


def training_flag(site: Site, sites: Sites) -> tuple[TrainingFlag, Any]:
    """How the module at `site` learns whether to use running statistics, found from how its batch norms were called.

    Looked for among the arguments of its call, then its boolean fields, then fields that hold a
    `partial(nn.BatchNorm, use_running_average=...)`.

    Returns:
        The flag, and what the new block must read it from if it is a field.

    Raises:
        ChoiceError: none of these is there.
    """
    call = site.calls[0]
    norms = sites.below(site.path).where(lambda s: isinstance(s.module, nn.BatchNorm))
    running = next((_running(s) for s in norms), None)
    fields = configuration(site.original)  # what a field of the new block is read from
    arguments = _boolean_arguments(site.original, call)
    if arguments:
        found = next((a for a in arguments if _speaks_of_training(a.name)), arguments[0])
        if running is None:  # no norm to tell: by its name
            running = found.value == (found.name in _INFERENCE_WORDS)
        running_when = found.value if running else not found.value
        default = running_when if found.default is None else found.default
        return TrainingFlag(running_when, found.name, found.position, default), None
    if running is not None:
        booleans = {
            k: v for k, v in fields.items() if isinstance(v, bool) and _speaks_of_training(k)
        }
        if booleans:
            field, value = next(iter(booleans.items()))
            return TrainingFlag(value if running else not value), External(field)
        for field, value in fields.items():
            if isinstance(value, functools.partial) and "use_running_average" in value.keywords:
                return TrainingFlag(running_when=True), External(field)
    raise ChoiceError(
        f"at {path_text(site.path)!r}: cannot tell how {type(site.module).__name__} learns whether it is training; "
        "give its call a boolean `train` argument"
    )


_TRAINING_WORDS = ("train", "training", "is_training")
_INFERENCE_WORDS = ("deterministic", "use_running_average", "eval", "inference")


def _speaks_of_training(name: str | None) -> bool:
    return name in _TRAINING_WORDS or name in _INFERENCE_WORDS


class _Boolean(NamedTuple):
    """A boolean argument: its name and position as far as it has them, its value in a call, its default if it has one."""

    name: str | None
    position: int | None
    value: bool
    default: bool | None


def _boolean_arguments(module: nn.Module, call: Call) -> list[_Boolean]:
    """The boolean arguments of a call, and those left out whose name speaks of training and whose default is boolean."""
    taken = list(inspect.signature(getattr(type(module), call.method)).parameters.values())[1:]
    found, named = [], set()
    for position, parameter in enumerate(taken):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        named.add(parameter.name)
        place = None if parameter.kind is parameter.KEYWORD_ONLY else position
        default = parameter.default if isinstance(parameter.default, bool) else None
        value = default if _speaks_of_training(parameter.name) else None
        if place is not None and place < len(call.args):
            value = call.args[place]
        value = call.kwargs.get(parameter.name, value)
        if isinstance(value, bool):
            found.append(_Boolean(parameter.name, place, value, default))
    known = {a.position for a in found}
    found += [  # what the signature takes as *args or **kwargs
        _Boolean(None, i, v, None)
        for i, v in enumerate(call.args)
        if isinstance(v, bool) and i not in known
    ]
    found += [
        _Boolean(k, None, v, None)
        for k, v in call.kwargs.items()
        if isinstance(v, bool) and k not in named
    ]
    return found


def _running(norm: Site) -> bool:
    by_call = norm.calls[0].kwargs.get("use_running_average")
    return bool(norm.module.use_running_average if by_call is None else by_call)
