"""Genotype files: the block choices of a network, one line of a CSV table, as BlockSwap publishes them."""

import ast
import csv
import os
import pathlib

from nnopt.core.files import write_whole
from nnopt.errors import ChoiceError, GenotypeError
from nnopt.rewrites.block import Genotype
from nnopt.rewrites.choice import Choice, choice

_HEADER = ["", "index", "convs", "fisher"]


def load_genotype(path: str | os.PathLike[str]) -> Genotype:
    """Reads a genotype file: a CSV table with a column `convs` that holds a list of choice names.

    Raises:
        GenotypeError: the file is missing, has no such column, or names an unknown choice.
    """
    try:
        with pathlib.Path(path).open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise GenotypeError(f"cannot read genotype file {path}: {e}") from e
    if not rows or rows[0].get("convs") is None:
        raise GenotypeError(
            f"{path} is no genotype file: expected a CSV table with a column 'convs' and one row"
        )
    try:
        names = ast.literal_eval(rows[0]["convs"])
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError("not a list of names")
        return Genotype(tuple(choice(n) for n in names))
    except (ValueError, SyntaxError, ChoiceError) as e:
        raise GenotypeError(
            f"{path}: the column 'convs' must hold a list of block choices such as ['Conv', 'DConvA4']: {e}"
        ) from e


def save_genotype(
    choices: tuple[Choice, ...], path: str | os.PathLike[str], score: float = 0.0
) -> None:
    """Writes a genotype file, complete or not at all.

    Args:
        choices: one for each residual block, in call order.
        path: of the file.
        score: its Fisher potential.
    """
    names = ", ".join(f"'{c.genotype_name}'" for c in choices)
    write_whole(path, f'{",".join(_HEADER)}\n0,0,"[{names}]",{score!r}\n')
