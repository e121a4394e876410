import base64
import dataclasses
import html.parser
import io
import json
import math
import pathlib
import re
import struct
import zlib

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nnopt.errors import ResultFolderError
from nnopt.reports.blockswap import (
    block_table,
    render,
    score_picture,
    summary_table,
    winner_picture,
    write_report,
)
from nnopt.rewrites import CODE_CHOICES
from nnopt.search.blockswap import BlockSwap
from nnopt.search.run import SearchResult
from nnopt.search.store import ScoredCandidate

PROCESSOR = "Imaginary(R) Processor [X] @ 2.60GHz"


def latency(median, below=False):
    return {
        "median_ms": median, "low_ms": median, "high_ms": median, "samples_ms": [median],
        "inner_calls": 1, "below_overhead": below,
    }  # fmt: skip


def a_result(folder, positions=18, candidates=40, *, scores=None, notes="360 held-out digits"):
    """A finished search that never was."""
    rng = np.random.default_rng(0)
    paths = [f"stage{1 + i // 6}_block{i % 6}" for i in range(positions)]
    drawn = rng.integers(len(CODE_CHOICES), size=(candidates, positions))
    names = [tuple(CODE_CHOICES[i].name for i in row) for row in drawn]
    parameters = rng.integers(390_001, 410_000, candidates).tolist()
    if scores is None:
        scores = np.exp(rng.normal(-6, 1.5, candidates)).tolist()
    rows = [
        ScoredCandidate(i, names[i], parameters[i], scores[i], (scores[i] / 2,) * 2, 0.5)
        for i in range(candidates)
    ]
    top = int(np.nanargmax(scores))
    epochs = [
        {"epoch": e, "loss": 2.3 / e, "train_accuracy": 0.1 * e, "test_accuracy": 0.09 * e, "seconds": 12.25}
        for e in (1, 2, 3)
    ]  # fmt: skip
    device = {"device": {"device_kind": PROCESSOR, "platform": "cpu", "cores": 2}}
    summary = {
        "format": "nnopt blockswap result",
        "version": 1,
        "search": BlockSwap("wrn-40-2", "digits", 400_000).to_json(),
        "space": {
            "positions": paths,
            "candidates": 23.0**positions,
            "within_budget": 1.6e23,
            "fraction_within_budget": 0.0487,
        },
        "base": {"parameters": 2_243_546, "macs": 327_600_000, "fingerprint": "0" * 64},
        "winner": {
            "index": top,
            "blocks": list(names[top]),
            "block_scores": np.linspace(1, 2, positions).tolist(),
            "block_parameters": rng.integers(1000, 80_000, positions).tolist(),
            "score": scores[top],
            "parameters": parameters[top],
            "macs": 81_234_567,
            "fingerprint": "1" * 64,
        },
        "scoring": {"candidates": candidates, "distinct": candidates, "seconds_each": 2.5},
        "training": {"history": epochs, "test_accuracy": 0.27, "measured_on": notes},
        "latency": {
            "1": {"base": latency(1.234, True), "winner": latency(2.468), "speedup": {"median": 0.5}} | device,
            "32": {"base": latency(40.5), "winner": latency(20.25), "speedup": {"median": 2.0}} | device,
        },
        "environment": {
            "finished": "2026-01-01T00:00:00+00:00", "python": "3.11.7", "packages": {"nnopt": "0.1", "jax": "0.10.2"},
            "machine": "x86_64", "system": "Linux", "device": "cpu", "cores": 2,
        },
    }  # fmt: skip
    return SearchResult(pathlib.Path(folder), json.loads(json.dumps(summary)), rows)


@pytest.fixture
def result(tmp_path):
    return a_result(tmp_path)


def rows_of(text):
    """The cells of a rendered table, row by row."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


# --- tables ---


def test_summary_table(result):
    text = render(summary_table(result), width=78)
    assert all(len(line) <= 80 for line in text.splitlines())
    cells = {row[0]: row[1:] for row in rows_of(text)}
    winner = result.summary["winner"]
    ratio = f"{2_243_546 / winner['parameters']:.2f}x fewer"
    assert cells["parameters"] == ["2,243,546", f"{winner['parameters']:,}", ratio]
    assert cells["multiply-accumulates"] == ["327,600,000", "81,234,567", "4.03x fewer"]
    assert cells["latency, batch 1"] == ["1.23 ms*", "2.47 ms", "2.00x slower"]
    assert cells["latency, batch 32"] == ["40.5 ms", "20.2 ms", "2.00x faster"]
    assert cells["Fisher potential"] == ["", f"{winner['score']:.4g}", ""]
    assert cells["test accuracy"] == ["", "27.00%", ""]
    words = " ".join(text.split())
    assert "best of 40 candidates at 400,000 parameters" in words
    assert PROCESSOR in words  # brackets are no markup
    assert "360 held-out digits" in words
    assert "* a call takes less than 20 times what calling takes" in words


def test_no_footnote_without_its_mark(result):
    result.summary["latency"]["1"]["base"]["below_overhead"] = False
    assert "*" not in render(summary_table(result), width=78)


def test_scores_that_are_not_finite_are_counted(result):
    assert "not finite" not in render(summary_table(result), width=78)
    scores = [math.nan, math.inf, *(r.score for r in result.rows[2:])]
    rows = [dataclasses.replace(r, score=s) for r, s in zip(result.rows, scores, strict=True)]
    unfit = dataclasses.replace(result, rows=rows)
    said = "2 of 40 candidates have a score that is not finite: they rank nothing."
    assert said in " ".join(render(summary_table(unfit), width=78).split())
    assert write_report(unfit).read_text().count(said) == 2  # below the table, below the picture


def test_block_table(result):
    text = render(block_table(result), width=78)
    assert all(len(line) <= 80 for line in text.splitlines())
    rows, winner = rows_of(text), result.summary["winner"]
    assert [row[0] for row in rows] == result.summary["space"]["positions"]
    assert [row[1] for row in rows] == winner["blocks"]
    assert [row[2] for row in rows] == [f"{p:,}" for p in winner["block_parameters"]]
    shares = [float(row[3].removesuffix("%")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares[0] == pytest.approx(100 / 27, abs=0.06)


# --- pictures ---


def png(data):
    """Width and height of a PNG file, and its bytes uncompressed; every chunk is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    assert (chunks[0][0], chunks[-1][0]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", chunks[0][1][:8])
    return width, height, zlib.decompress(b"".join(b for kind, b in chunks if kind == b"IDAT"))


def drawn(figure):
    """Each text of a figure that is drawn, and where, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = []
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [t.label1 for t in ticks if low <= t.get_loc() <= high]
    shown = [t for t in texts if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in shown]


@pytest.mark.parametrize("picture", [score_picture, winner_picture])
@pytest.mark.parametrize("positions", [3, 18])
def test_texts_neither_overlap_nor_are_cut_off(picture, positions, tmp_path):
    figure = picture(a_result(tmp_path, positions))
    found, whole = drawn(figure), figure.bbox
    assert len(found) > 8
    for text, box in found:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, text
    for i, (text, box) in enumerate(found):
        for other, its in found[i + 1 :]:
            apart = box.x1 <= its.x0 or its.x1 <= box.x0 or box.y1 <= its.y0 or its.y1 <= box.y0
            assert apart, (text, other)


@pytest.mark.parametrize(
    ("scores", "scale", "dots"),
    [
        ([1e-6, 1e-2, 3.0], "log", 3),
        ([1.0, 1.5, 2.0], "linear", 3),
        ([0.0, 1.5, 2000.0], "linear", 3),
        ([1e-6, math.nan, 3.0], "log", 2),
        ([1e-6, math.inf, 3.0], "log", 2),
        ([math.nan, 0.0, math.nan], "linear", 1),
    ],
)
def test_scores_of_every_kind(scores, scale, dots, tmp_path):
    finite = [s if math.isfinite(s) else -1.0 for s in scores]
    result = a_result(tmp_path, candidates=3, scores=finite)
    rows = [dataclasses.replace(r, score=s) for r, s in zip(result.rows, scores, strict=True)]
    figure = score_picture(dataclasses.replace(result, rows=rows))
    figure.savefig(io.BytesIO(), format="png")
    (axes,) = figure.axes
    assert axes.get_yscale() == scale
    everyone, winner = (c.get_offsets() for c in axes.collections)
    assert len(everyone) == dots
    assert winner[0, 1] == max(s for s in scores if math.isfinite(s))
    missing = len(scores) - dots
    said = f"{dots} candidates" + (f", {missing} more not finite" if missing else "")
    assert said in [t.get_text() for t in axes.get_legend().get_texts()]


def test_bars(result):
    figure = winner_picture(result)
    shares, sizes = ([bar.get_width() for bar in axes.patches] for axes in figure.axes)
    winner = result.summary["winner"]
    np.testing.assert_allclose(shares, np.linspace(1, 2, 18) / 27 * 100)
    np.testing.assert_allclose(sizes, np.asarray(winner["block_parameters"]) / 1e3)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels[0] == f"stage1_block0  {winner['blocks'][0]}"


# --- the whole report ---


class Page(html.parser.HTMLParser):
    """What an HTML page holds; every tag that must be closed is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report(result):
    path = write_report(result)
    folder = result.folder
    names = {"report.html", "score.png", "table.txt", "winner.png"}
    assert {p.name for p in folder.iterdir()} == names
    assert path == folder / "report.html"
    for name in ("score.png", "winner.png"):
        width, height, pixels = png((folder / name).read_bytes())
        assert 800 <= width <= 2000
        assert 300 <= height <= 2000
        assert len(pixels) > width * height
        assert len(set(pixels)) > 10
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert "http" not in re.sub('base64,[^"]*', "", text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.attributes}
    images = [a for tag, a in page.attributes if tag == "img"]
    for image, name in zip(images, ("score.png", "winner.png"), strict=True):
        head, _, content = image["src"].partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content) == (folder / name).read_bytes()
        assert image["alt"]
    words = " ".join(page.text.split())
    for figure in (
        "BlockSwap on wrn-40-2, digits: best of 40 candidates at 400,000 parameters", "2,243,546", "4.03x fewer",
        "1.60e+23", "4.87%", "2 minibatches of 4 images, each with weights of its own", "27.00%", "0.7667", "12.2", "seed = 0",
        "learning_rate = 0.05", "jax 0.10.2", PROCESSOR, "360 held-out digits", "stage3_block5",
    ):  # fmt: skip
        assert figure in words, figure
    table = (folder / "table.txt").read_text()
    assert max(map(len, table.splitlines())) <= 80
    assert "2,243,546" in table
    assert "stage3_block5" in table


def test_twice_is_the_same(result):
    write_report(result)
    first = {p.name: p.read_bytes() for p in result.folder.iterdir()}
    write_report(result)
    assert {p.name: p.read_bytes() for p in result.folder.iterdir()} == first


def test_text_is_escaped(tmp_path):
    result = a_result(tmp_path, notes="<script>alert('x')</script> & [bold]more[/bold]")
    result.summary["search"]["network"] = "<b>net"
    result.summary["environment"]["python"] = "<i>3"
    result.summary["space"]["positions"][0] = "<u>[red]stage"
    page = Page(write_report(result).read_text())
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.attributes}
    for words in (
        "<script>alert('x')</script> & [bold]more[/bold]",
        "<b>net",
        "<i>3",
        "<u>[red]stage",
    ):
        assert words in page.text
    table = (tmp_path / "table.txt").read_text()
    assert "[bold]more[/bold]" in " ".join(table.split())
    assert "<u>[red]stage" in table


def test_small_spaces_are_counted_out(result):
    result.summary["space"] |= {"candidates": 12_167.0, "within_budget": 881.0}
    words = " ".join(Page(write_report(result).read_text()).text.split())
    assert "the 881 of 12,167 that lie within the budget" in words


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultFolderError, match="cannot write to the result folder"):
        write_report(a_result(tmp_path / "file"))
