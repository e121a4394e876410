"""Latency tables: what parts of networks take on a device, each measured once, in a SQLite file that survives being killed.

Every time is kept with that of a reference which was measured in the same rounds. Whatever slows a machine down for a while slows
both, so that their ratio is what is worth keeping; times are read back at the speed that the machine had in the median.
"""

import dataclasses
import json
import os
import pathlib
import sqlite3
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from nnopt.backends.setup import Setup, difference
from nnopt.errors import MeasurementError

_APPLICATION = 0x6E6E6C74  # "nnlt": tells these files from others
_VERSION = 1
_TABLES = (
    "CREATE TABLE setups (id INTEGER PRIMARY KEY, backend TEXT NOT NULL, fingerprint TEXT NOT NULL, "
    "setup TEXT NOT NULL, UNIQUE (backend, fingerprint))",
    "CREATE TABLE parts (setup INTEGER NOT NULL, workload TEXT NOT NULL, label TEXT NOT NULL, ms REAL NOT NULL, "
    "reference_ms REAL NOT NULL, PRIMARY KEY (setup, workload))",
    "CREATE TABLE networks (setup INTEGER NOT NULL, workload TEXT NOT NULL, role TEXT NOT NULL, parts TEXT NOT NULL, "
    "ms REAL NOT NULL, reference_ms REAL NOT NULL, PRIMARY KEY (setup, role, workload))",
)
Role = Literal["fit", "check"]


@dataclasses.dataclass(frozen=True)
class TimedPart:
    """A part of networks and what it takes.

    Attributes:
        workload: what it is and what it is called with.
        label: for people.
        ms: of a call, as it was measured, without what calling itself takes.
        reference_ms: of the reference in the same rounds.
    """

    workload: str
    label: str
    ms: float
    reference_ms: float


@dataclasses.dataclass(frozen=True)
class TimedNetwork:
    """A whole network and what it takes.

    Attributes:
        workload: what it is and what it is called with.
        parts: workloads of its parts, each as often as it is run.
        ms: of a call, as it was measured.
        reference_ms: of the reference for networks in the same rounds, which is not that of parts.
    """

    workload: str
    parts: tuple[str, ...]
    ms: float
    reference_ms: float


class LatencyTable:
    """A file of latencies, those of each backend and set-up apart. A row is committed as soon as it is added."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        """Opens a file.

        Args:
            path: of it.
            create: make it if it is not there.

        Raises:
            MeasurementError: it is not there, cannot be read or written, or is no latency table.
        """
        self.path = pathlib.Path(path)
        if not create and not self.path.exists():
            raise MeasurementError(
                f"there is no latency table {path}; make it with `nnopt table build --out {path}`"
            )
        connection = None
        try:
            connection = sqlite3.connect(self.path)
            self._open(connection, create)
        except sqlite3.Error as error:
            raise MeasurementError(
                f"{path} is no latency table, or it is damaged or cannot be written: {error}; give another file"
            ) from error
        except MeasurementError:
            connection.close()  # type: ignore[union-attr]
            raise
        self._connection = connection

    def _open(self, connection: sqlite3.Connection, create: bool) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if create and not tables and application in (0, _APPLICATION):
            with connection:  # all or nothing, so that a killed process leaves no half of it
                connection.execute("BEGIN")
                for statement in _TABLES:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        elif application != _APPLICATION:
            raise MeasurementError(f"{self.path} is no latency table; give another file")
        elif version != _VERSION:
            raise MeasurementError(
                f"{self.path} is a latency table of version {version}, this nnopt reads {_VERSION}; build another"
            )

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> "LatencyTable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def setups(self) -> "list[SetupTimes]":
        """The set-ups that it holds times of, in the order they were added.

        Raises:
            MeasurementError: the file is damaged.
        """
        found = self._read("SELECT id, backend, setup FROM setups ORDER BY id")
        try:
            return [
                SetupTimes(self, i, backend, Setup.from_json(json.loads(text)))
                for i, backend, text in found
            ]
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from error

    def of(self, backend: str, setup: Setup) -> "SetupTimes":
        """The times of a set-up, to be read and added to; none at first.

        Raises:
            MeasurementError: the file is damaged or cannot be written.
        """
        key = (backend, setup.fingerprint)
        text = json.dumps(setup.to_json(), sort_keys=True)
        self.write(
            "INSERT OR IGNORE INTO setups (backend, fingerprint, setup) VALUES (?, ?, ?)",
            (*key, text),
        )
        ((number,),) = self._read(
            "SELECT id FROM setups WHERE backend = ? AND fingerprint = ?", key
        )
        return SetupTimes(self, number, backend, setup)

    def only(self, backend: str | None = None) -> "SetupTimes":
        """The times of the one set-up that it holds.

        Args:
            backend: of this one, where there are several.

        Raises:
            MeasurementError: it holds none or several.
        """
        there = self.setups()
        found = [s for s in there if backend in (None, s.backend)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(dict.fromkeys(s.backend for s in there)) or "no backend"
        if not found:
            raise MeasurementError(
                f"{self.path} has no times of {backend or 'anything'}, but of {names}; build them with `nnopt table build`"
            )
        apart = difference(found[0].setup, found[1].setup) or "the backend"
        remedy = (
            "name the backend" if backend is None else "build a table of one set-up in another file"
        )
        raise MeasurementError(
            f"{self.path} has times of {len(found)} set-ups ({names}; {apart}); {remedy}"
        )

    def check_setup(self, backend: str, setup: Setup) -> "SetupTimes":
        """The times of a set-up, which must be there.

        Raises:
            MeasurementError: the file has none of it; the message says in what the set-ups differ.
        """
        mine = [s for s in self.setups() if s.backend == backend]
        for found in mine:
            if found.setup.fingerprint == setup.fingerprint:
                return found
        if not mine:
            raise MeasurementError(
                f"{self.path} has no times of the backend {backend}; build them with `nnopt table build`"
            )
        apart = difference(mine[-1].setup, setup)
        raise MeasurementError(
            f"{self.path} is of another set-up ({apart}); measure as it was built, or build another table"
        )

    def write(self, query: str, values: Sequence[Any]) -> None:
        """Runs and commits a statement.

        Raises:
            MeasurementError: the file cannot be written.
        """
        try:
            with self._connection:
                self._connection.execute(query, values)
        except sqlite3.Error as error:
            raise MeasurementError(
                f"cannot write to the latency table {self.path}: {error}; make room or give another file"
            ) from error

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> MeasurementError:
        return MeasurementError(
            f"the latency table {self.path} is damaged: {error}; remove it and build it again"
        )


@dataclasses.dataclass(frozen=True)
class SetupTimes:
    """The times of one backend and set-up in a file.

    Attributes:
        table: the file.
        number: of the set-up in it.
        backend: name of the backend.
        setup: it.
    """

    table: LatencyTable
    number: int
    backend: str
    setup: Setup

    def parts(self) -> dict[str, TimedPart]:
        """By workload, as they were measured."""
        query = "SELECT workload, label, ms, reference_ms FROM parts WHERE setup = ? ORDER BY rowid"
        rows = (TimedPart(*row) for row in self.table._read(query, (self.number,)))
        return {row.workload: self._checked(row) for row in rows}

    def networks(self, role: Role) -> dict[str, TimedNetwork]:
        """By workload, as they were measured."""
        query = "SELECT workload, parts, ms, reference_ms FROM networks WHERE setup = ? AND role = ? ORDER BY rowid"
        try:
            return {
                workload: self._checked(TimedNetwork(workload, tuple(json.loads(parts)), *times))
                for workload, parts, *times in self.table._read(query, (self.number, role))
            }
        except (ValueError, TypeError) as error:
            raise self.table._damaged(error) from error

    def add_part(self, row: TimedPart) -> None:
        """Writes the time of a part; writing it again replaces it."""
        values = (self.number, *dataclasses.astuple(row))
        self.table.write("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?)", values)

    def add_network(self, role: Role, row: TimedNetwork) -> None:
        """Writes the time of a network.

        Args:
            role: the fit is made with it, or it is checked with it.
            row: it.
        """
        values = (self.number, row.workload, role, json.dumps(row.parts), row.ms, row.reference_ms)
        self.table.write("INSERT OR REPLACE INTO networks VALUES (?, ?, ?, ?, ?, ?)", values)

    def reference_ms(self, of: Literal["parts", "networks"]) -> float:
        """What a reference takes in the median, which stands for the speed of the machine.

        For networks those of the fit count, so that a check does not change what is predicted.
        """
        rows: list[TimedPart] | list[TimedNetwork] = list(self.parts().values())
        if of == "networks":
            rows = list((self.networks("fit") or self.networks("check")).values())
        return statistics.median(row.reference_ms for row in rows) if rows else 1.0

    def _checked(self, row: Any) -> Any:
        if not all(isinstance(t, float) and t > 0 for t in (row.ms, row.reference_ms)):
            raise self.table._damaged(ValueError(f"{row.ms!r} ms of {row.workload!r:.60}"))
        return row
