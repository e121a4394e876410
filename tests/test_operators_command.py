"""`nnopt operators`: operators sampled, explained and measured for one convolution."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnopt.cli import operators, programs
from nnopt.cli.main import main
from nnopt.errors import SearchError
from nnopt.nests import Program, canonical, convolution
from nnopt.nests.canonical import weights
from nnopt.nests.roofline import arithmetic_intensity
from nnopt.nests.sample import distinct

SMALL = ("--size", "8", "8", "--inputs", "8", "--outputs", "8")
CONV = convolution((8, 8), 8, 8, (3, 3))
GROUP = '[{"step": "Group", "output": "co", "input": "ci", "groups": 4}]'


def printed(capsys, monkeypatch, *args, columns=120):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["operators", *map(str, args)])
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= columns or "for co" in out  # loop code is not cut
    return out


def said(capsys, *args):
    """What a command that is refused says: one line on stderr, none elsewhere but of progress."""
    with pytest.raises(SystemExit) as caught:
        main(["operators", *map(str, args)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert [line for line in out.splitlines() if not line.startswith("drawing")] == []
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    return err


def rows(out):
    """Cells of the rows of all tables, lines of a row joined."""
    found = []
    for line in out.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if found and len(cells) == len(found[-1]) and not any(cells[2:]):
                found[-1] = [f"{a} {b}".strip() for a, b in zip(found[-1], cells, strict=True)]
            else:
                found.append(cells)
    return found


def row(out, first):
    (found,) = [cells for cells in rows(out) if cells[0] == first]
    return found[1:]


# --- sample ---


def test_a_sample_of_distinct_operators(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    out = printed(capsys, monkeypatch, "sample", *SMALL, "--count", 12, "--seed", 3, "--out", path)
    entries = json.loads(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]
    programs = [Program.from_json(entry["program"]) for entry in entries]
    # What the library draws for this seed.
    drawn = distinct(CONV, 12, np.random.default_rng(3))
    assert programs == [d.program for d in drawn]
    whole = canonical(CONV)
    assert len({canonical(p(CONV)) for p in programs} | {whole}) == 13
    for number, (entry, d) in enumerate(zip(entries, drawn, strict=True), 1):
        assert convolution(**entry["conv"]) == CONV
        assert entry["weights"] == weights(d.canon)
        assert entry["macs"] == d.operator.domain_size
        assert entry["flop_per_byte"] == arithmetic_intensity(d.operator)
        program, *cells = row(out, str(number))
        assert program.split() == [
            re.sub(r",part=(.)\)", r")@\1", str(s).replace("'", "").replace(", ", ","))
            for s in d.program.steps
        ]
        assert float(cells[0]) == pytest.approx(entry["weights"] / weights(whole), rel=0.01)
        assert float(cells[1]) == pytest.approx(entry["macs"] / CONV.domain_size, rel=0.01)
        assert float(cells[2]) == pytest.approx(entry["flop_per_byte"], rel=0.01)
        assert int(cells[3]) == entry["convolutions"]
    assert "1 is 576 weights or 36,864 MACs" in out


def test_filters_hold_and_are_counted(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    filters = ("--max-weights", 0.5, "--max-macs", 0.25, "--min-intensity", 3)
    out = printed(capsys, monkeypatch, "sample", *SMALL, "--count", 5, *filters, "--out", path)
    entries = json.loads(path.read_text())
    assert len(entries) == 5
    for entry in entries:
        assert entry["weights"] <= 0.5 * 576
        assert entry["macs"] <= 0.25 * 36_864
        assert entry["flop_per_byte"] >= 3
    caption = " ".join(out[out.index("1 is 576") :].split())
    told = re.search(
        r"(\d+) draws, rejected (\d+) drawn before, (\d+) in too many pieces to run fast, "
        r"(\d+) by --max-weights, (\d+) by --max-macs, (\d+) by --min-intensity\.",
        caption,
    )
    draws, *rejected = map(int, told.groups())
    assert draws == 5 + sum(rejected)
    # By drawing as many again: every draw that is new is weighed, the first filter that it fails counts.
    many = distinct(CONV, draws, np.random.default_rng(0), patience=draws)
    new = draws - rejected[0] - rejected[1]
    heavy = [d for d in many[:new] if weights(d.canon) > 0.5 * 576]
    assert rejected[2] == len(heavy) > 0
    assert "fewer than" not in out


def test_a_small_space_is_exhausted(capsys, monkeypatch):
    tiny = ("--size", "2", "--inputs", "1", "--outputs", "2", "--window", "1")
    out = printed(capsys, monkeypatch, "sample", *tiny, "--count", 100, "--moves", 1)
    assert "These are fewer than 100: there are no more, or too few pass." in " ".join(out.split())
    assert 0 < len(rows(out)) - 1 < 100
    # Where filters let nothing pass, draws come to an end.
    error = said(capsys, "sample", *SMALL, "--max-macs", 1e-9, "--draws", 30)
    assert "nothing was found: 30 draws, rejected" in error


def test_sampling_is_determined_by_the_seed(tmp_path, capsys, monkeypatch):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / name
        printed(capsys, monkeypatch, "sample", *SMALL, "--count", 3, "--seed", seed, "--out", path)
        texts.append(path.read_text())
    assert texts[0] == texts[1] != texts[2]


# --- explain ---


def test_explain_a_grouped_convolution(capsys, monkeypatch):
    size = ("--size", "32", "32", "--inputs", "64", "--outputs", "64")
    out = printed(capsys, monkeypatch, "explain", *size, "--program", GROUP)
    conv = convolution((32, 32), 64, 64, (3, 3))
    made = Program.from_json(GROUP)(conv)
    assert str(conv) in out
    assert str(made) in out
    step = row(out, "Group('co', 'ci', 4)")
    assert step == ["another", "9,437,184", "1/4", "9,216", "1"]
    assert row(out, "weights") == ["36,864", "9,216", "1/4"]
    assert row(out, "MACs of one image") == ["37,748,736", "9,437,184", "1/4"]
    assert row(out, "FLOP/byte, all cached") == ["112", "33.6", "0.299"]
    assert row(out, "convolutions it is run as") == ["1", "1", ""]
    # Of one group and its row: nine products for each output, 1024 for each weight.
    assert row(out, "one iteration")[1:4] == ["1", "1", "9"]
    (whole,) = [cells for cells in rows(out) if cells[0] == "g in 4"]
    # Everything: x and y of 65,536 elements each, k of 9,216.
    assert whole[1] == "548 KiB"
    assert whole[3:] == ["1,024", "144", "33.6"]
    assert "kernel [3, 3, 16, 4, 16]" in out


@pytest.mark.parametrize(
    ("name", "count", "macs"),
    [
        ("grouped:2", 288, 18_432),
        ("depthwise", 72, 4_608),
        ("pointwise", 64, 4_096),
        ("dilated", 256, 16_384),
        ("spatial:2", 576, 9_216),
        ("sequence1:1,2", 432, 27_648),
        ("sequence2:4,2", 9 * (8 * 4 + 4 * 4 // 2), 36_864 * 40 // 64),
        ("sequence3:2", 1_152, 36_864),
        ("sequence4:1,3", 4 * 4 * (1 + 9), 4 * 4 * (1 + 9) * 64),
    ],
)
def test_named_operators_and_their_modules(capsys, monkeypatch, name, count, macs):
    out = printed(capsys, monkeypatch, "explain", *SMALL, "--named", name, columns=80)
    assert row(out, "weights")[1] == f"{count:,}"
    assert row(out, "MACs of one image")[1] == f"{macs:,}"
    shapes = re.findall(r"^  kernel\S* \[([\d, ]+)\]$", out, re.M)
    assert sum(math.prod(map(int, s.split(","))) for s in shapes) == count


def test_explain_from_files(tmp_path, capsys, monkeypatch):
    steps, sampled = tmp_path / "steps.json", tmp_path / "sampled.json"
    steps.write_text(GROUP)
    printed(capsys, monkeypatch, "sample", *SMALL, "--count", 2, "--out", sampled)
    whole = printed(capsys, monkeypatch, "explain", *SMALL, "--program", GROUP)
    for given in (steps, f"@{steps}"):
        assert printed(capsys, monkeypatch, "explain", *SMALL, "--program", given) == whole
    out = printed(capsys, monkeypatch, "explain", *SMALL, "--program", sampled, "--number", 2)
    entry = json.loads(sampled.read_text())[1]
    assert f"\n{Program.from_json(entry['program'])}\n" in out
    assert row(out, "weights")[1] == f"{entry['weights']:,}"


@pytest.mark.parametrize(
    "options",
    [
        ("--size", "9", "--inputs", "4", "--outputs", "6"),
        ("--size", "4", "4", "4", "--inputs", "2", "--outputs", "4", "--padding", "VALID"),
        ("--size", "8", "6", "--inputs", "4", "--outputs", "8", "--window", "3", "1", "--groups", "2"),
        ("--size", "9", "9", "--inputs", "4", "--outputs", "4", "--strides", "2", "--dilation", "2"),
    ],
)  # fmt: skip
def test_any_convolution(capsys, monkeypatch, options):
    out = printed(capsys, monkeypatch, "explain", *options, "--program", "[]", columns=80)
    weights_, macs = row(out, "weights"), row(out, "MACs of one image")
    assert weights_[0] == weights_[1]
    assert macs[0] == macs[1]
    assert len(rows(printed(capsys, monkeypatch, "sample", *options, "--count", 3))) == 4


def test_modules_are_those_of_the_shape():
    """The module that is measured computes what the nest describes."""
    conv = programs.ConvOptions((9, 8), 4, 8, (3, 1), (2, 1), "VALID", (2, 1), 2)
    x = jnp.zeros((2, 9, 8, 4))
    base, empty = conv.module(), conv.module(Program())
    variables = base.init(jax.random.key(0), x)
    assert base.apply(variables, x).shape[1:] == conv.operator().output
    assert variables["params"]["kernel"].shape == conv.operator().kernel
    shape = jax.eval_shape(lambda: empty.init_with_output(jax.random.key(0), x)[0]).shape
    assert shape[1:] == conv.operator().output


# --- measure ---


def test_measure_what_was_sampled(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    printed(capsys, monkeypatch, "sample", *SMALL, "--count", 2, "--out", path)
    entries = json.loads(path.read_text())
    out = printed(
        capsys, monkeypatch, "measure", *SMALL, "--programs", path, "--repeats", 3, columns=80
    )
    base, *table = rows(out)
    assert base[1] == "the convolution"
    assert base[4:6] == ["1.00x", "1"]
    assert sorted(cells[0] for cells in table) == ["1", "2"]
    times = [float(cells[2].lstrip("~")) for cells in table]
    assert times == sorted(times)
    assert min(times) > 0
    for number, _, _, spread, faster, macs, promise in table:
        entry = entries[int(number) - 1]
        assert float(macs) == pytest.approx(entry["macs"] / 36_864, rel=0.01)
        of_promise = float(faster.rstrip("x")) * float(macs)
        assert float(promise.rstrip("%")) / 100 == pytest.approx(of_promise, rel=0.02, abs=0.02)
        assert spread.endswith("%")
    words = " ".join(out.split())
    assert "of 2 are slower than their MACs promise" in words
    assert f"JAX {jax.__version__}" in words
    assert "compiling: 3/3" in out
    assert "measuring: 3/3" in out


def test_measure_by_name(capsys, monkeypatch):
    """Machines of known speed: twice as fast with half of the work, and no faster with less."""
    from nnopt.backends import Latency

    ms = {"": 4.0, "grouped:2": 2.0, "depthwise": 4.0}
    times = {n: Latency(t, t, t * 1.5, (t,) * 3, 1, n == "depthwise") for n, t in ms.items()}
    device = {"platform": "cpu", "device_kind": "abacus", "cores": 2, "jax": "1", "load_average": 3}
    monkeypatch.setattr(operators.MeasureCommand, "_times", lambda *_: (times, device))
    out = printed(
        capsys, monkeypatch, "measure", *SMALL, "--named", "depthwise", "grouped:2", columns=80
    )
    assert rows(out) == [
        ["", "the convolution", "4", "50%", "1.00x", "1", ""],
        ["", "grouped:2", "2", "50%", "2.00x", "0.5", "100%"],
        ["", "depthwise", "~4", "50%", "1.00x", "0.125", "12%"],
    ]
    words = " ".join(out.split())
    assert "1 of 2 are slower than their MACs promise. ~ is less than 20 times" in words
    assert "abacus (cpu), 2 cores, JAX 1; load average 3.0: the machine was busy" in words


def test_what_is_measured(capsys, monkeypatch):
    timed = []

    def times(self, programs, bars):
        timed.append(programs)
        raise SearchError("enough")

    monkeypatch.setattr(operators.MeasureCommand, "_times", times)
    said(capsys, "measure", *SMALL, "--named", "grouped:2", "sequence1:1,2")
    said(capsys, "measure", *SMALL, "--count", 3, "--seed", 4)
    named, drawn = timed
    assert list(named) == ["grouped:2", "sequence1:1,2"]
    assert str(named["grouped:2"]) == "Group('co', 'ci', 2)"
    found = distinct(CONV, 3, np.random.default_rng(4))
    assert drawn == {str(i): d.program for i, d in enumerate(found, 1)}


# --- what is refused ---

_EXPLAIN, _MEASURE, _SAMPLE = ("explain", *SMALL), ("measure", *SMALL), ("sample", *SMALL)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sample", "--size", "8", "--inputs", "4", "--outputs", "4", "--window", "3", "3"), "window (3, 3)"),
        (("sample", "--size", "--inputs", "4", "--outputs", "4"), "an image of 0 dimensions"),
        (("sample", *SMALL, "--groups", "3"), "3 groups do not divide"),
        (("sample", *SMALL, "--inputs", "0"), "at least 1"),
        (("sample", *SMALL, "--window", "20", "--padding", "VALID"), "larger than the image"),
        (("sample", *SMALL, "--size", "999999", "999999"), "the convolution is too large"),
        ((*_SAMPLE, "--count", "0"), "--count is 0"),
        ((*_SAMPLE, "--moves", "0"), "--moves is 0"),
        ((*_SAMPLE, "--draws", "0"), "--draws is 0"),
        ((*_SAMPLE, "--seed", "-1"), "the seed is -1"),
        ((*_SAMPLE, "--max-macs", "nan"), "--max-macs is nan; give a number above 0"),
        ((*_SAMPLE, "--max-weights", "0"), "--max-weights is 0"),
        ((*_SAMPLE, "--min-intensity", "-2"), "--min-intensity is -2"),
        (("sample", "--size", "1", "--inputs", "1", "--outputs", "1", "--window", "1"), "no transformation is possible"),
        (_EXPLAIN, "give either --program or --named"),
        ((*_EXPLAIN, "--program", GROUP, "--named", "depthwise"), "give either --program or --named"),
        ((*_EXPLAIN, "--program", ""), "cannot read"),
        ((*_EXPLAIN, "--program", "[{]"), "--program is no JSON"),
        ((*_EXPLAIN, "--program", "[" * 100_000), "--program is no JSON"),
        ((*_EXPLAIN, "--program", "{}"), "a program is a list of steps"),
        ((*_EXPLAIN, "--program", '[{"step": "Grup"}]'), "step 1: there is no 'Grup'"),
        ((*_EXPLAIN, "--program", GROUP.replace("4", "3")), "group count 3 does not divide the 8 of co"),
        ((*_EXPLAIN, "--program", GROUP.replace("4", '"4"')), "groups of Group is '4'"),
        ((*_EXPLAIN, "--program", '[{"step": "Widen", "loop": "kh", "size": 9000001}]'), "too large"),
        ((*_EXPLAIN, "--program", '[{"step": "Dilate", "loop": "kh", "by": 1' + 30 * "0" + "}]"), "too large"),
        ((*_EXPLAIN, "--program", GROUP, "--number", "1"), "--number is for a file"),
        ((*_EXPLAIN, "--named", "depthwise", "--number", "1"), "--number is for a file"),
        ((*_EXPLAIN, "--program", "nowhere.json"), "cannot read 'nowhere.json': No such file"),
        ((*_EXPLAIN, "--program", "@no\nwhere"), "No such file"),
        ((*_EXPLAIN, "--named", "group:4"), "no operator is called 'group:4'"),
        ((*_EXPLAIN, "--named", "grouped"), "grouped takes one number"),
        ((*_EXPLAIN, "--named", "depthwise:2"), "depthwise takes no numbers"),
        ((*_EXPLAIN, "--named", "sequence2:4"), "sequence2 takes 2 numbers"),
        ((*_EXPLAIN, "--named", "sequence1"), "sequence1 takes one number or more"),
        ((*_EXPLAIN, "--named", "grouped:a"), "whole numbers follow the colon"),
        ((*_EXPLAIN, "--named", "sequence1:1,1,1"), "3 parts do not divide the 8"),
        ((*_EXPLAIN, "--named", "sequence4:1,2"), "extents are odd"),
        (("explain", *SMALL, "--outputs", "4", "--named", "sequence4:1,3"), "as many output as input channels"),
        ((*_MEASURE, "--batch", "0"), "--batch is 0"),
        ((*_MEASURE, "--batch", "99999999"), "a batch of 99999999 is too large"),
        ((*_MEASURE, "--repeats", "0"), "--repeats is 0"),
        ((*_MEASURE, "--count", "-3"), "--count is -3"),
        ((*_MEASURE, "--programs", "nowhere.json"), "cannot read"),
        ((*_MEASURE, "--programs", "a.json", "--named", "depthwise"), "give either --programs or --named"),
        ((*_MEASURE, "--named", "grouped:3"), "does not divide"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, args, message):
    assert message in said(capsys, *args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("\xff", "is no text file"),
        ("[]", "holds no programs"),
        ('{"program": []}', "holds no programs"),
        ("[1]", "step 1 is 1"),
        ('[{"program": 3}]', "operator 1 of"),
        ('[{"program": [{"step": "Group"}]}]', "step 1: Group needs 'output'"),
        ('[{"program": []}, {"program": [7]}]', "operator 2 of"),
        ('[{"program": [], "conv": {"size": [4, "a\\nb"]}}]', "another convolution, --size 4 a b"),
        ('[{"program": [], "conv": 1}]', "another convolution, 1"),
        ('[{"program": [{"step": "Group", "output": "co", "input": "ci", "groups": 3}]}]', "does not divide"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [(*_EXPLAIN, "--program"), (*_MEASURE, "--programs")])
def test_bad_files_are_one_line(tmp_path, capsys, command, text, message):
    path = tmp_path / "programs.json"
    path.write_bytes(text.encode("latin-1"))
    more = ("--number", "1") if "2 of" in message and command[0] == "explain" else ()
    assert message in said(capsys, *command, path, *more)


def test_numbers_in_a_file(tmp_path, capsys):
    path = tmp_path / "programs.json"
    path.write_text('[{"program": []}, {"program": []}]')
    error = said(capsys, *_EXPLAIN, "--program", path)
    assert "has 2 operators; give --number 1 to 2" in error
    for number in (0, 3):
        error = said(capsys, *_EXPLAIN, "--program", path, "--number", number)
        assert f"there is no operator {number} in" in error


def test_nothing_is_written_where_it_cannot_be(tmp_path, capsys, monkeypatch):
    (tmp_path / "folder").mkdir()
    for name, why in (("folder", "it is a folder"), ("none/found.json", "is no folder")):
        assert why in said(capsys, *_SAMPLE, "--out", tmp_path / name)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnopt.core.files.write_whole", full)
    error = said(capsys, *_SAMPLE, "--out", tmp_path / "found.json")
    assert "No space left on device; give another path with --out" in error
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("sample", "explain", "measure")),
        (("sample",), ("--size", "(required)", "--min-intensity", "--out", "Example")),
        (("explain",), ("--program", "--named", "sequence2:OUTPUTS,GROUPS", "Example")),
        (("measure",), ("--programs", "--batch", "--repeats", "Example")),
    ],
)
def test_help(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["operators", *args, "--help"])
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert [w for w in words if w not in out] == []
