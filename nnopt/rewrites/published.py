"""The students that BlockSwap published (https://github.com/jack-willturner/blockswap-without-teachers), read from NumPy archives.

An archive holds one array for each entry of the PyTorch state dictionary, under the same name, and the genotype's names in
`__convs__`. The networks are not what their genotypes say: see `as_trained`.
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from nnopt.core import Example, rewrite
from nnopt.core.example import rngs
from nnopt.errors import CheckpointError, ChoiceError, GenotypeError, RewriteError
from nnopt.rewrites.block import Genotype
from nnopt.rewrites.choice import Choice, choice
from nnopt.typing import Path

_GENOTYPE = "__convs__"
_STAGES = 3
_IMAGE = (1, 32, 32, 3)

_OUTSIDE = {"stem": "conv1", "norm": "bn1", "head": "fc"}
_IN_BLOCK = {
    "norm1": "bn1",
    "norm2": "bn2",
    "shortcut": "convShortcut",
    "op1": "conv1",
    "op2": "conv2",
}
_IN_OPERATOR = {
    "conv": "conv",
    "spatial": "convdw",
    "norm": "bn",
    "pointwise": "conv1x1",
}
_IN_BOTTLENECK = {
    "reduce": "conv1x1_down",
    "norm1": "bn1",
    "spatial": "conv",
    "norm2": "bn2",
    "expand": "conv1x1_up",
}
_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def as_trained(choices: Sequence[Choice], blocks_per_stage: Sequence[int]) -> tuple[int, ...]:
    """How many operators each block has in BlockSwap's released networks.

    Their code takes the wrapper of a stage's first block (two operators for S and G, one for B and BG) for all of its blocks, so
    that a bottleneck may appear twice in a block and a grouped convolution once. `Genotype(choices, operators=...)`
    repeats that; the paper's tables count parameters without it.

    Args:
        choices: one for each block, in call order.
        blocks_per_stage: number of blocks in each stage.

    Returns:
        One or two for each block.

    Raises:
        GenotypeError: the stages do not hold as many blocks as there are choices.

    Example:
        >>> as_trained([choice(n) for n in ("S", "B(2)", "B(4)", "G(2)")], (2, 2))
        (2, 2, 1, 1)
    """
    if sum(blocks_per_stage) != len(choices) or min(blocks_per_stage, default=1) < 1:
        raise GenotypeError(
            f"stages of {', '.join(map(str, blocks_per_stage))} blocks do not hold the genotype's {len(choices)} choices; "
            "give the stages of the network that it was made for"
        )
    operators: list[int] = []
    for blocks in blocks_per_stage:
        operators += [choices[len(operators)].operators] * blocks
    return tuple(operators)


def load_published(
    path: str | os.PathLike[str], net: nn.Module
) -> tuple[nn.Module, dict[str, Any]]:
    """A published student: the rewritten network as it was trained, and its trained variables.

    Its inputs are images less the mean and over the deviation of `nnopt.data.CIFAR10_BLOCKSWAP`.

    Args:
        path: archive of arrays named as in PyTorch, convolution kernels `[out, in // groups, height, width]`.
        net: the skeleton, `nnopt.networks.WideResNet(40, 2.0)` for those that BlockSwap published.

    Returns:
        The network and its variables: each array of the archive once, kernels `[height, width, in // groups, out]`.

    Raises:
        CheckpointError: the file is missing or no archive of arrays, its genotype does not fit the skeleton, or an array is
            missing, superfluous or of another shape than the network's.

    Example:
        `net, variables = load_published("bs400k_1.npz", WideResNet(40, 2.0))`, then `net.apply(variables, images)`.
    """
    arrays = _read(path)
    choices = _choices(path, arrays.pop(_GENOTYPE, None))
    try:
        operators = as_trained(choices, (len(choices) // _STAGES,) * _STAGES)
        student = rewrite(net, Genotype(choices, operators=operators), example=jnp.zeros(_IMAGE))
    except (GenotypeError, ChoiceError, RewriteError) as e:
        raise CheckpointError(f"{path}: the genotype does not fit {type(net).__name__}: {e}") from e
    specs = flatten_dict(
        Example(jnp.zeros(_IMAGE)).abstractly(
            lambda key, x: student.init(rngs(key), x), jax.random.key(0)
        )
    )
    names = {key: _torch_name(key, choices) for key in specs}
    _check_names(path, type(net).__name__, set(names.values()), set(arrays))
    variables = {
        key: _converted(path, names[key], arrays[names[key]], key, specs[key]) for key in specs
    }
    return student, unflatten_dict(variables)


def _read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of an archive; pickled objects are refused."""
    try:
        with pathlib.Path(path).open("rb") as file:
            # Looked at first because NumPy takes whatever is no archive for a pickle, and says so.
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no .npz archive")
            file.seek(0)
            archive: Mapping[str, np.ndarray] = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive}
    except OSError as e:
        raise CheckpointError(
            f"cannot read {path} ({e.strerror or e}); check the path and its permissions"
        ) from e
    except Exception as e:  # a damaged archive can raise anything
        reason = " ".join(str(e).split()) or type(e).__name__
        raise CheckpointError(
            f"{path} is damaged or holds no plain arrays: {reason}; fetch it again"
        ) from e
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise CheckpointError(f"{path} holds {strange[0]!r}, which is no array; fetch it again")
    return arrays


def _choices(path: str | os.PathLike[str], names: np.ndarray | None) -> tuple[Choice, ...]:
    if names is None or names.dtype.kind != "U" or names.ndim != 1:
        raise CheckpointError(
            f"{path} has no list of block choices {_GENOTYPE!r}; it is no published BlockSwap student"
        )
    try:
        return tuple(choice(name) for name in names.tolist())
    except ChoiceError as e:
        raise CheckpointError(f"{path}: {_GENOTYPE}: {e}") from e


def _torch_name(key: Path, choices: Sequence[Choice]) -> str:
    """`(params, stage1_block2, op1, spatial, kernel)` -> `block1.0.layer.2.conv1.convdw.weight`."""
    _, module, *within, leaf = key
    block = re.fullmatch(r"stage(\d+)_block(\d+)", module)
    if block is None:
        return ".".join((_OUTSIDE[module], _LEAVES[leaf]))
    stage, number = int(block[1]), int(block[2])
    kind = choices[(stage - 1) * (len(choices) // _STAGES) + number]
    inside = _IN_OPERATOR if kind.bottleneck is None else _IN_BOTTLENECK
    tables = (_IN_BLOCK, inside)
    parts = [table[name] for table, name in zip(tables, within, strict=False)]
    return ".".join((f"block{stage}.0.layer.{number}", *parts, _LEAVES[leaf]))


def _check_names(
    path: str | os.PathLike[str], title: str, wanted: set[str], found: set[str]
) -> None:
    for what, names in (("lacks", wanted - found), ("has", found - wanted)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            needs = "needs" if what == "lacks" else "has no place for"
            raise CheckpointError(
                f"{path} {what} array {min(names)!r}{more}, which {title} with its genotype {needs}; "
                "take a student of this skeleton, complete and unchanged"
            )


def _converted(
    path: str | os.PathLike[str], name: str, array: np.ndarray, key: Path, spec: Any
) -> jax.Array:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim) if key[-1] == "kernel" else None
    turned = array if axes is None else array.transpose(axes)
    if turned.shape != spec.shape or array.dtype.kind != "f":
        raise CheckpointError(
            f"{path}: array {name!r} is {array.dtype}{list(array.shape)}, which is {list(turned.shape)} at "
            f"{'/'.join(key)!r}, where the network has {spec.dtype}{list(spec.shape)}"
        )
    return jnp.asarray(turned, spec.dtype)
