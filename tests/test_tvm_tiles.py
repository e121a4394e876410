"""Tiles of convolutions on TVM: the model's order, packing, the search and its file."""

import dataclasses
import math
import sqlite3
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnopt.backends.tvm import tune
from nnopt.backends.tvm.conv import ConvWorkload, Tile, pack
from nnopt.backends.tvm.tiles import tiles
from nnopt.backends.tvm.tune import CANDIDATES, TileCache, searched
from nnopt.errors import BackendError

ONE = (1, 1)
CONV = ConvWorkload(1, (8, 8), 16, 32, (3, 3), ONE, ONE, ONE, ONE, ONE)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    inputs=st.integers(1, 8),
    outputs=st.integers(1, 40),
    groups=st.integers(1, 4),
    machine=st.sampled_from([(4, 16), (8, 16), (16, 32)]),
)
def test_tiles_fit_registers_and_cover_the_result(size, inputs, outputs, groups, machine):
    work = dataclasses.replace(CONV, size=size, inputs=inputs * groups, outputs=outputs * groups, groups=groups)  # fmt: skip
    lanes, registers = machine
    found = tiles(work, lanes, registers)
    assert found
    assert len(set(found)) == len(found)
    for tile in found[:20]:
        assert tile.lanes <= lanes
        assert tile.accumulators <= registers - 4
        rounded, channels = tile.rounded(work)
        assert all(
            n <= r < n + p for n, r, p in zip(work.output, rounded, tile.pixels, strict=True)
        )
        assert channels % (tile.lanes * tile.vectors) == 0
        assert channels >= (outputs * groups if work.depthwise else outputs)


def test_common_convolutions_get_eight_pixels_of_two_vectors():
    """What runs at the peak of a core that does two products and two loads a cycle."""
    for size, channels in ((32, 64), (16, 128), (8, 256)):
        work = dataclasses.replace(CONV, size=(size, size), inputs=channels, outputs=channels)
        best = tiles(work, 16, 32)[0]
        assert (best.lanes, best.vectors, math.prod(best.pixels)) == (16, 2, 8)


@pytest.mark.parametrize(
    ("groups", "outputs", "across"), [(1, 5, 1), (2, 12, 1), (16, 16, 4), (8, 16, 2), (4, 4, 4)]
)
def test_packed_kernels_hold_every_weight_once(groups, outputs, across):
    work = dataclasses.replace(CONV, outputs=outputs, groups=groups)
    kernel = 1.0 + np.arange(9 * 16 // groups * outputs).reshape(3, 3, 16 // groups, outputs)
    tile = Tile(4, 2, (2, 2), across)
    packed = pack(kernel, work, tile)
    assert packed.shape[1:] == (3, 3, 16 // groups, 4)
    assert sorted(packed[packed != 0]) == sorted(kernel.ravel())
    _, channels = tile.rounded(work)
    each = outputs // tile.apart(work)
    for c in range(outputs):
        place = c // each * channels + c % each
        np.testing.assert_array_equal(packed[place // 4, ..., place % 4], kernel[..., c])


class FakeKernel:
    """Takes as many milliseconds as its tile has vectors, and the machine's mood."""

    built: ClassVar[list[Tile]] = []
    mood: ClassVar[float] = 1.0

    def __init__(self, tile):
        self.tile = tile
        self.built.append(tile)

    def milliseconds(self):
        FakeKernel.mood *= 1.3
        return self.tile.vectors * FakeKernel.mood


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(FakeKernel, "built", [])
    monkeypatch.setattr(tune, "build_conv", lambda work, tile, *_: FakeKernel(tile))
    return FakeKernel


def test_a_search_takes_the_fastest_and_is_not_repeated(tmp_path, kernels):
    cache = TileCache(tmp_path / "deep" / "tiles.sqlite")
    told = []
    best = searched(CONV, cache, "cpu", 1, 16, 32, told.append)
    tried = tiles(CONV, 16, 32)[:CANDIDATES]
    assert best.vectors == min(tile.vectors for tile in tried) < tried[0].vectors
    assert len(told) == CANDIDATES - 1
    assert sorted(map(str, kernels.built)) == sorted(map(str, tried))
    kernels.built.clear()
    cache.close()
    again = TileCache(tmp_path / "deep" / "tiles.sqlite")
    assert searched(CONV, again, "cpu", 1, 16, 32) == best
    assert not kernels.built
    searched(CONV, again, "cpu", 2, 16, 32)  # of other threads nothing is known
    assert kernels.built


def test_a_killed_search_loses_nothing(tmp_path, kernels):
    cache = TileCache(tmp_path / "tiles.sqlite")

    def killed(text):
        if len(kernels.built) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(CONV, cache, "cpu", 1, 16, 32, killed)
    cache.close()
    kernels.built.clear()
    told = []
    searched(CONV, TileCache(tmp_path / "tiles.sqlite"), "cpu", 1, 16, 32, told.append)
    assert len(told) == CANDIDATES - 1 - 5


def test_a_broken_cache_is_one_line(tmp_path):
    path = tmp_path / "tiles.sqlite"
    path.write_text("no database at all, but long enough to look like something" * 20)
    with pytest.raises(BackendError, match=r"cannot use the tile cache .*tiles\.sqlite") as error:
        TileCache(path)
    assert "\n" not in str(error.value)
    other = tmp_path / "other.sqlite"
    rows = sqlite3.connect(other)
    rows.execute("CREATE TABLE tiles (a)")
    rows.close()
    with pytest.raises(BackendError, match="no such column"):
        TileCache(other)
