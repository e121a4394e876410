"""The benchmarks' tables: which networks were trained, how accurate they became, what was published of them.

Both are CSV files below the data folder (`--data-dir`, or `NNOPT_DATA`), samples of the published benchmarks:

    nasbench201/nb201_sample4000.csv               4,000 of 15,625 cells
    nasbench_macro/nasbench_macro_sample2000.csv   2,000 of 6,561 networks
"""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import TypeVar

from experiments.scores.nasbench201 import Cell
from experiments.scores.nasbench_macro import Layers
from nnopt.errors import DataError

NASBENCH201 = pathlib.Path("nasbench201/nb201_sample4000.csv")
NASBENCH_MACRO = pathlib.Path("nasbench_macro/nasbench_macro_sample2000.csv")

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class TrainedCell:
    """One row of NAS-Bench-201.

    Attributes:
        index: the benchmark's number of the cell.
        network: the cell.
        accuracy: on CIFAR-10's test set after 200 epochs, in percent.
        parameters_million: published parameters, in millions.
        flops_million: published FLOPs, in millions.
        synflow: published by FreeREA (Cavagnero et al., WACV 2023), CIFAR-10.
        naswot: published by FreeREA, batch 64, CIFAR-10; -inf where its matrix is singular.
    """

    index: int
    network: Cell
    accuracy: float
    parameters_million: float
    flops_million: float
    synflow: float
    naswot: float


@dataclasses.dataclass(frozen=True)
class TrainedLayers:
    """One row of NAS-Bench-Macro.

    Attributes:
        index: the choices read as a number of base 3.
        network: the choices.
        accuracy: on CIFAR-10's test set, mean of three trainings, in percent.
        parameters: published.
        flops: published.
    """

    index: int
    network: Layers
    accuracy: float
    parameters: int
    flops: int


def nasbench201(data_dir: str | os.PathLike[str] | None = None) -> list[TrainedCell]:
    """The rows of NAS-Bench-201.

    Args:
        data_dir: the folder that holds `nasbench201/`; the environment's `NNOPT_DATA` if absent.

    Returns:
        The rows, in the file's order.

    Raises:
        DataError: no folder given, no such file, or a line that is not what it should be.
    """

    def row(cells: dict[str, str]) -> TrainedCell:
        return TrainedCell(
            index=int(cells["index"]),
            network=Cell.parse(cells["arch_str"]),
            accuracy=_percent(cells["c10_test200"]),
            parameters_million=float(cells["params_M_c10"]),
            flops_million=float(cells["flops_M_c10"]),
            synflow=float(cells["synflow_c10"]),
            naswot=float(cells["naswot_c10"]),
        )

    return _rows(data_dir, NASBENCH201, row)


def nasbench_macro(data_dir: str | os.PathLike[str] | None = None) -> list[TrainedLayers]:
    """The rows of NAS-Bench-Macro.

    Args:
        data_dir: the folder that holds `nasbench_macro/`; the environment's `NNOPT_DATA` if absent.

    Returns:
        The rows, in the file's order.

    Raises:
        DataError: no folder given, no such file, or a line that is not what it should be.
    """

    def row(cells: dict[str, str]) -> TrainedLayers:
        return TrainedLayers(
            index=int(cells["arch"], 3),
            network=Layers.parse(cells["arch"]),
            accuracy=_percent(cells["mean_acc"]),
            parameters=int(cells["params"]),
            flops=int(cells["flops"]),
        )

    return _rows(data_dir, NASBENCH_MACRO, row)


def _rows(
    data_dir: str | os.PathLike[str] | None,
    file: pathlib.Path,
    row: Callable[[dict[str, str]], Row],
) -> list[Row]:
    folder = data_dir if data_dir is not None else os.environ.get("NNOPT_DATA")
    if not folder:
        raise DataError(f"{file.name} needs a folder: give --data-dir or set NNOPT_DATA")
    path = pathlib.Path(folder) / file
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            for cells in reader:
                try:
                    rows.append(row(cells))
                except KeyError as error:
                    raise DataError(f"{path}: no column {error}; restore the file") from None
                except (TypeError, ValueError) as error:
                    line = reader.line_num
                    raise DataError(f"{path}, line {line}: {error}; restore the file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; restore the file") from None
    if not rows:
        raise DataError(f"{path} holds no rows; restore the file")
    return rows


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise ValueError(f"an accuracy of {text} percent")
    return value
