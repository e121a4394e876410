"""Scores on disk: one row of an SQLite file for each candidate, written as soon as it is known."""

import dataclasses
import json
import math
import os
import sqlite3
from collections.abc import Iterator

from nnopt.errors import ResultFolderError


@dataclasses.dataclass(frozen=True)
class ScoredCandidate:
    """One scored candidate of a search.

    Attributes:
        index: its number in the search, from 0; with the seed it determines the candidate.
        names: the choice at each position, by the paper's names.
        parameters: of the whole network.
        score: higher is better.
        blocks: the share of each block in the score.
        seconds: wall time of building, compiling and scoring it.
    """

    index: int
    names: tuple[str, ...]
    parameters: int
    score: float
    blocks: tuple[float, ...]
    seconds: float


class ScoreStore:
    """The scored candidates of one search, in a file that survives being killed at any moment.

    A row is committed as soon as it is added, so a killed search loses at most the candidates in flight.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, or makes it.

        Raises:
            ResultFolderError: it cannot be written, or is no file of scores.
        """
        self._path = path
        connection = None
        try:
            connection = sqlite3.connect(path)
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS scores (candidate INTEGER PRIMARY KEY, names TEXT NOT NULL, "
                    "parameters INTEGER NOT NULL, score REAL, blocks TEXT NOT NULL, seconds REAL NOT NULL)"
                )
        except sqlite3.Error as e:
            if connection is not None:
                connection.close()
            raise ResultFolderError(
                f"cannot keep scores in {path}: {e}; give a folder that can be written, or remove the file"
            ) from e
        self._connection = connection

    def add(self, row: ScoredCandidate) -> None:
        """Writes one row; writing a candidate again replaces it."""
        values = (
            row.index,
            json.dumps(row.names),
            row.parameters,
            row.score,
            json.dumps(row.blocks),
            row.seconds,
        )
        try:
            with self._connection:
                self._connection.execute(
                    "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?)", values
                )
        except sqlite3.Error as e:
            raise ResultFolderError(
                f"cannot write a score to {self._path}: {e}; make room or give another folder"
            ) from e

    def __iter__(self) -> Iterator[ScoredCandidate]:
        """All rows, by candidate number.

        Raises:
            ResultFolderError: the file is damaged.
        """
        query = "SELECT candidate, names, parameters, score, blocks, seconds FROM scores ORDER BY 1"
        try:
            for index, names, parameters, score, blocks, seconds in self._connection.execute(query):
                yield ScoredCandidate(
                    index,
                    tuple(json.loads(names)),
                    parameters,
                    math.nan if score is None else score,  # SQLite knows no NaN
                    tuple(json.loads(blocks)),
                    seconds,
                )
        except (sqlite3.Error, ValueError, TypeError) as e:
            raise ResultFolderError(
                f"the scores in {self._path} are damaged: {e}; remove the file to score all candidates again"
            ) from e

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()
