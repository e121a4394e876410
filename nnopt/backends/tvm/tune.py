"""A small measured search of tiles, with a file of what was measured.

The model of `nnopt.backends.tvm.conv.tiles` puts a dozen tiles in order. Each is timed in turns with the first of them, and the
ratio is written down at once: a search that is killed takes up where it stopped, and a convolution that was searched once is
searched no more.
"""

import dataclasses
import json
import os
import pathlib
import sqlite3
import statistics
from collections.abc import Callable
from typing import Any

from nnopt.backends.tvm.conv import ConvWorkload, Tile
from nnopt.backends.tvm.kernels import build_conv
from nnopt.backends.tvm.tiles import tiles
from nnopt.errors import BackendError

CANDIDATES = 12
_ROUNDS = 7
_CLEARLY = 0.97
"""A tile that takes more than this part of the first one's time is no better: so little changes from run to run."""


def default_cache() -> pathlib.Path:
    """Where tiles are kept unless a file is named: `NNOPT_TILES`, or a file in the user's cache folder."""
    named = os.environ.get("NNOPT_TILES")
    if named:
        return pathlib.Path(named)
    folder = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(folder) / "nnopt" / "tiles.sqlite"


class TileCache:
    """How long tiles of convolutions take on targets, relative to the tile that the model prefers."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file, or makes it.

        Raises:
            BackendError: it cannot be read or written, or is no file of tiles.
        """
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(self.path, isolation_level=None, timeout=30)
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS tiles (workload TEXT, target TEXT, first TEXT, tile TEXT, ratio REAL NOT NULL, "
                "ms REAL NOT NULL, PRIMARY KEY (workload, target, first, tile))"
            )
            self._rows.execute("SELECT workload, target, first, tile, ratio, ms FROM tiles LIMIT 1")
        except (OSError, sqlite3.Error) as error:
            raise BackendError(
                f"tvm: cannot use the tile cache {self.path}: {error}; delete it, or name another with NNOPT_TILES"
            ) from None

    def ratios(self, work: ConvWorkload, target: str, first: Tile) -> dict[Tile, float]:
        """What was measured: tile -> time over that of the first."""
        found = self._rows.execute(
            "SELECT tile, ratio FROM tiles WHERE workload = ? AND target = ? AND first = ?",
            (_text(work), target, _text(first)),
        )
        made = {}
        for text, ratio in found:
            values = json.loads(text)
            made[Tile(**values | {"pixels": tuple(values["pixels"])})] = float(ratio)
        return made

    def add(
        self, work: ConvWorkload, target: str, first: Tile, tile: Tile, ratio: float, ms: float
    ) -> None:
        """Writes down one measurement."""
        self._rows.execute(
            "INSERT OR REPLACE INTO tiles VALUES (?, ?, ?, ?, ?, ?)",
            (_text(work), target, _text(first), _text(tile), ratio, ms),
        )

    def close(self) -> None:
        """Closes the file."""
        self._rows.close()


def _text(value: ConvWorkload | Tile) -> str:
    return json.dumps(dataclasses.asdict(value))


def searched(
    work: ConvWorkload,
    cache: TileCache,
    target: Any,
    threads: int,
    lanes: int,
    registers: int,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Tile:
    """The fastest of a dozen tiles of a convolution: read, or measured.

    Args:
        work: the convolution.
        cache: of what was measured.
        target: of TVM.
        threads: to spread it over.
        lanes: elements in a vector register.
        registers: number of them.
        on_progress: is told of each tile that is measured.
    """
    candidates = tiles(work, lanes, registers)[:CANDIDATES]
    first, *others = candidates
    where = f"{target} {threads} threads"
    known = cache.ratios(work, where, first)
    missing = [tile for tile in others if tile not in known]
    if missing:
        base = build_conv(work, first, target, threads, lanes)
        for tile in missing:
            kernel = build_conv(work, tile, target, threads, lanes)
            pairs = [(base.milliseconds(), kernel.milliseconds()) for _ in range(_ROUNDS)]
            known[tile] = statistics.median(b / a for a, b in pairs)
            cache.add(work, where, first, tile, known[tile], min(b for _, b in pairs))
            on_progress(f"{tile}: {1 / known[tile]:.2f}x")
    best = min(others, key=lambda tile: known[tile], default=first)
    return best if known.get(best, 1.0) < _CLEARLY else first
