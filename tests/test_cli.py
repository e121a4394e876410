import csv
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from nnopt.cli import search as search_module
from nnopt.cli.main import main
from nnopt.cli.show import ShowCommand
from nnopt.core import load_record
from nnopt.rewrites import load_genotype


def said(capsys, *args, code=2):
    """What a command that is refused says: one line on stderr, none elsewhere."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, args)])
    out, err = capsys.readouterr()
    assert (out, caught.value.code) == ("", code)
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def printed(capsys, *args):
    main([*map(str, args)])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def process(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "nnopt.cli.main", *map(str, args)],
        capture_output=True, text=True, **options,
    )  # fmt: skip


# --- help ---


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("search", "score", "rewrite", "show", "exit code 2")),
        (("search",), ("--budget", "(required)", "--samples", "default: 1000", "--out", "Example")),
        (("rewrite",), ("--where", "--choice", "--genotype", "G(N/8)", "Example")),
        (("show",), ("NETWORK", "--against", "--depth", "Example")),
    ],
)
def test_help(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*args, "--help"])
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert [w for w in words if w not in out] == []


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["prune"],
        ["show"],
        ["search"],
        ["search", "--budget", "40K", "--samples", "many"],
        ["search", "--budget", "40K", "--choices", "all"],
        ["search", "--budget", "40K", "--epoch", "3"],
    ],
)
def test_bad_usage(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    assert err


def test_help_answers_at_once():
    """Without JAX, whose import takes a second."""
    code = (
        "import sys\nfrom nnopt.cli.main import main\ntry:\n    main(['search', '--help'])\n"
        "except SystemExit:\n    assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- show ---


def test_show(capsys):
    out = printed(capsys, "show", "wrn-10-1", "--depth", 1)
    assert "stage3_block0" in out
    assert "77,850 parameters" in out
    assert "conv1" not in out
    assert "12,501,632 multiply-accumulates for one image of 32 x 32" in out


def test_show_against(capsys):
    out = printed(capsys, "show", "wrn-10-1", "--against", "wrn-16-1", "--size", 8)
    assert "- stage1_block1" in out
    assert "parameters: 175,066 -> 77,850" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["wrn-40"], "no network is named 'wrn-40'; known names: wrn-40-2, "),
        (["wrn-11-1"], "its depth must be 6n + 4 (10, 16, 22, ...), not 11"),
        (["wrn-10-0"], "its width leaves no channels"),
        ([""], "no network is named ''"),
        (["nowhere/net.json"], "cannot read network record nowhere/net.json"),
        (["/"], "cannot read network record /"),
        (["wrn-10-1", "--against", "wrn"], "no network is named 'wrn'"),
        (["wrn-10-1", "--size", "0"], "there are no images of 0 pixels; give --size 1 or more"),
        (["wrn-10-1", "--size", "-3"], "there are no images of -3 pixels"),
        (["wrn-10-1", "--depth", "-1"], "a tree has no -1 levels; give --depth 0 or more"),
    ],
)
def test_show_refuses(args, words, capsys):
    assert words in said(capsys, "show", *args)


# --- records ---


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "slim.json"
    main(f"rewrite --network wrn-10-1 --where stage3* --choice G(4) --size 8 --out {path}".split())
    return path


@pytest.fixture
def edited(record, tmp_path):
    """Writes the record with something changed."""

    def edit(change):
        value = json.loads(record.read_text())
        change(value)
        (tmp_path / "edited.json").write_text(json.dumps(value))
        return tmp_path / "edited.json"

    return edit


def test_show_a_record(record, capsys):
    out = printed(capsys, "show", record, "--against", "wrn-10-1", "--size", 8)
    assert "~ stage3_block0" in out
    assert "PreActivationBlock" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": ', "is not valid JSON (line 1"),
        ("", "is not valid JSON (line 1"),
        ("[]", 'expected a JSON object with "format": "nnopt network"'),
        ('{"format": "nnopt network", "version": 99}', "version 99"),
        ('{"format": "nnopt network", "version": 1}', "must have exactly the keys"),
    ],
)
def test_broken_records(text, words, tmp_path, capsys):
    (tmp_path / "net.json").write_text(text)
    assert words in said(capsys, "show", tmp_path / "net.json")


def test_binary_records(tmp_path, capsys):
    (tmp_path / "net.json").write_bytes(b"\xff\x00\xff")
    assert "cannot read network record" in said(capsys, "show", tmp_path / "net.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(fingerprint="0" * 64), "has fingerprint"),
        (lambda v: v.update(steps=3), "the steps of a network record must be a list"),
        (lambda v: v.update(base=[1, 2]), "edited.json: "),
    ],
)
def test_records_edited_by_hand(change, words, edited, capsys):
    assert words in said(capsys, "show", edited(change))


def test_records_of_unknown_classes(record, tmp_path, capsys):
    text = record.read_text()
    assert "WideResNet" in text
    for old, new in (("WideResNet", "NarrowResNet"), ("nnopt.networks", "nnopt.notworks")):
        (tmp_path / "net.json").write_text(text.replace(old, new))
        assert new in said(capsys, "show", tmp_path / "net.json")


# --- rewrite ---


def test_rewrite(record, capsys):
    out = printed(
        capsys, "rewrite", "--network", "wrn-10-1", "--where", "stage3*", "--choice", "G(4)", "--size", 8,
    )  # fmt: skip
    assert "~ stage3_block0" in out
    assert "stage2_block0" not in out
    assert "Record" not in out
    assert type(load_record(record)).__name__ == "Patched"


def genotype(path, names):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["", "index", "convs", "fisher"], [0, 0, names, 0.5]])
    return path


def test_rewrite_to_a_genotype(tmp_path, capsys):
    path = genotype(tmp_path / "g.csv", "['Conv', 'DConvA4', 'ConvB2']")
    out = printed(
        capsys, "rewrite", "--network", "wrn-10-1", "--genotype", path, "--size", 8, "--out", tmp_path / "n.json",
    )  # fmt: skip
    assert out.count("~ stage") == 3
    assert f"Record: {tmp_path / 'n.json'}" in out
    assert len(load_genotype(path).choices) == 3


REWRITE = ("rewrite", "--network", "wrn-10-1", "--size", "8")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give either --choice (and --where), or --genotype alone"),
        (["--choice", "S", "--genotype", "g.csv"], "or --genotype alone"),
        (["--genotype", "g.csv", "--where", "stage1*"], "or --genotype alone"),
        (["--where", "stage1*"], "give either --choice"),
        (["--choice", "G4"], "unknown block choice 'G4'; expected a name like S, G(4)"),
        (["--choice", "G(0)"], "unknown block choice 'G(0)'"),
        (["--choice", "G(3)"], "at 'stage1_block0': G(3) needs 3 groups, which 16 channels do not"),
        (["--choice", "B(99)"], "B(99) needs at least 99 channels, the block has 16"),
        (["--choice", "S", "--where", "stage9*"], "no module matches 'stage9*' in WideResNet"),
        (["--choice", "S", "--where", "stage1_blok0"], "did you mean 'stage1_block0'"),
        (["--choice", "S", "--where", "head"], "is no block from [batch, h, w, in]"),
        (
            ["--choice", "S", "--where", "stem"],
            "cannot tell how Conv learns whether it is training",
        ),
        (["--choice", "S", "--where", "."], "is no block from"),
        (["--genotype", "nowhere.csv"], "cannot read genotype file nowhere.csv"),
        (["--genotype", "."], "cannot read genotype file"),
        (["--choice", "S", "--out", "nowhere/net.json"], "cannot write nowhere/net.json: No such"),
        (["--choice", "S", "--out", "/"], "cannot write /: it names no file"),
        (["--choice", "S", "--size", "0"], "give --size 1 or more"),
    ],
)
def test_rewrite_refuses(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*REWRITE, *args])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    assert words in err
    assert not out or "--out" in args  # then the difference has been printed


def test_networks_without_blocks(capsys):
    args = ("rewrite", "--network", "vgg-16", "--choice", "S")
    assert "VGG has no module that adds a branch" in said(capsys, *args)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("['Conv', 'DConvA4']", "holds 2 choices, but WideResNet has 3 residual blocks"),
        ("['Conv', 'DConvA4', 'Cnov']", "unknown block choice 'Cnov'"),
        ("['Conv', 'DConvA4'", "must hold a list of block choices"),
        ("[1, 2, 3]", "not a list of names"),
        ("", "must hold a list of block choices"),
    ],
)
def test_genotypes_refused(names, words, tmp_path, capsys):
    path = genotype(tmp_path / "g.csv", names)
    assert words in said(capsys, *REWRITE, "--genotype", path)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "convs\n"])
def test_files_that_are_no_genotypes(text, tmp_path, capsys):
    (tmp_path / "g.csv").write_text(text)
    assert "is no genotype file" in said(capsys, *REWRITE, "--genotype", tmp_path / "g.csv")


def test_networks_that_do_not_run_at_a_size(tmp_path, capsys):
    """A U-Net whose way up does not meet its way down."""
    from foreign_networks import UNet

    from nnopt.core import save_record

    save_record(UNet(), tmp_path / "net.json")
    assert "ConvTranspose" in printed(capsys, "show", tmp_path / "net.json", "--size", 8)
    err = said(capsys, "show", tmp_path / "net.json", "--size", 5)
    assert "the network does not run on images of 5 x 5 pixels" in err
    assert "give another --size" in err


# --- search ---

SEARCH = ("search", "--network", "wrn-10-1")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--budget", "40Q"], "'40Q' is no budget; give a positive whole number"),
        (["--budget", "0"], "'0' is no budget"),
        (["--budget", "0.5"], "'0.5' is no budget"),
        (["--budget", ""], "'' is no budget"),
        (["--budget", "1K"], "no candidate has between 976 and 1,024 parameters"),
        (["--budget", "99M"], "take a budget in between, or a wider tolerance"),
        (["--network", "wrn-12-1"], "its depth must be 6n + 4"),
        (["--network", "alexnet"], "no network is named 'alexnet'; known names: "),
        (["--network", "densenet-bc-10-12"], "has no module that adds a branch of convolutions"),
        (["--data", "mnist"], "no data set is called 'mnist'; the known ones are digits, cifar10"),
        (["--data", "cifar10"], "cifar10 needs a folder: give --data-dir or set NNOPT_DATA"),
        (["--data", "cifar10", "--download"], "--download needs a folder"),
        (["--data", "mnist", "--download", "--data-dir", "."], "mnist"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--data", "cifar100", "--data-dir", "."], "holds neither train nor"),
        (["--samples", "-3"], "needs at least 1 sample"),
        (["--samples", "0"], "needs at least 1 sample"),
        (["--seed", "-1"], "the seed is -1; give a whole number"),
        (["--epochs", "0"], "epochs=0; give an integer from 1"),
        (["--score-batch", "1"], "a scoring batch of 2"),
        (["--score-batch", "5000"], "a minibatch of 5,000 images was asked for"),
        (["--tolerance", "2"], "between 0 and 1, got 2.0"),
        (["--tolerance", "nan"], "between 0 and 1, got nan"),
        (["--workers", "-1"], "needs at least 1 worker, got -1"),
        (["--workers", "0"], "needs at least 1 worker, got 0"),
    ],
)
def test_search_refuses(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("NNOPT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    budget = () if "--budget" in args else ("--budget", "40K")
    args = (*SEARCH, *budget, *args)
    if args.count("--network") == 2:
        args = ("search", *args[3:])
    # The bars of the search are drawn on stdout, also when it has nothing to show.
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out.strip() == ""
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    assert words in err
    assert os.listdir(tmp_path) == []  # nothing is left behind


@pytest.mark.parametrize("damage", ["cut off", "nothing", "no pickle", "code", "other"])
def test_broken_cifar(damage, tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    whole = pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 20}, 2)
    content = {
        "cut off": whole[:-900],
        "nothing": b"",
        "no pickle": b"<html>404</html>",
        "code": b"cos\nsystem\n(S'exit 3'\ntR.",
        "other": whole,
    }[damage]
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main([*SEARCH, "--budget", "40K", "--data", "cifar10", "--data-dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (caught.value.code, out.strip()) == (2, "")
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    assert "data_batch_1" in err
    assert "holds 20 images instead of 10,000" in err if damage == "other" else "damaged" in err


@pytest.fixture
def no_problem(monkeypatch):
    """Folders are looked at after the data and the network, which other tests are about."""
    from nnopt.search import run

    monkeypatch.setattr(run, "Problem", lambda spec, data_dir: None)
    monkeypatch.setattr(run, "score_all", lambda *a, **k: 1 / 0)


def search_said(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([*SEARCH, "--budget", "40K", *map(str, args)])
    out, err = capsys.readouterr()
    assert (caught.value.code, out.strip()) == (2, "")
    assert err.startswith("nnopt: ")
    assert err.count("\n") == 1
    return err


def test_result_folders_refused(no_problem, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null/below"):
        assert f"cannot write to the result folder {out}" in search_said(capsys, "--out", out)
    assert "is not empty and holds no search" in search_said(capsys, "--out", tmp_path)
    with pytest.raises(ZeroDivisionError):  # which would be a bug, and keeps its traceback
        main([*SEARCH, "--budget", "40K", "--out", str(tmp_path / "mine")])
    capsys.readouterr()
    other = search_said(capsys, "--out", tmp_path / "mine", "--seed", 3, "--epochs", 2)
    assert "belongs to another search (it differs in recipe, seed)" in other
    (tmp_path / "mine" / "scores.sqlite").write_text("no scores " * 99)
    assert "cannot keep scores in" in search_said(capsys, "--out", tmp_path / "mine")


def test_search(tmp_path, capsys, monkeypatch):
    """The command hands on what it is told, and shows what came of it."""
    from test_reports import a_result

    from nnopt.search import run

    asked = {}

    def pretended(spec, folder, *, data_dir, watcher, workers):
        asked.update(spec=spec, folder=folder, data_dir=data_dir, workers=workers)
        folder.mkdir()
        watcher.phase("scoring candidates", 30, 30)
        watcher.phase("training the winner", 2, 1)
        watcher.advance("test accuracy 11.0%")
        return a_result(folder)

    monkeypatch.setattr(run, "run", pretended)
    folder = tmp_path / "out"
    args = f"--budget 41K --samples 30 --epochs 2 --seed 7 --workers 3 --choices paper --data-dir d --out {folder}"
    main([*SEARCH, *args.split()])
    out, err = capsys.readouterr()
    assert err == ""
    assert "training the winner: 2/2" in out  # a line, where there is no terminal for a bar
    assert "test accuracy 11.0%" in out
    assert "best of 40 candidates" in out
    assert f"Report: {folder / 'report.html'}" in out
    assert (folder / "report.html").is_file()
    spec = asked["spec"]
    assert (spec.budget, spec.samples, spec.seed, spec.choices) == (41_000, 30, 7, "paper")
    assert (spec.network, spec.data, spec.recipe.epochs) == ("wrn-10-1", "digits", 2)
    assert (asked["folder"], asked["data_dir"], asked["workers"]) == (folder, "d", 3)


def test_the_clock_of_a_phase_that_was_complete_stands_still():
    from rich.console import Console

    now = [100.0]
    console = Console(file=open(os.devnull, "w"), get_time=lambda: now[0])  # noqa: SIM115
    bars = search_module._Bars(console)
    bars._progress.get_time = lambda: now[0]
    bars.phase("scoring candidates", 30, 30)
    bars.phase("training the winner", 8, 3)
    now[0] += 50.0
    done, running = bars._progress.tasks
    assert (done.finished_time, done.completed) == (0.0, 30)
    assert (running.finished_time, running.elapsed) == (None, 50.0)
    console.file.close()


# --- the end of a process ---


def test_interrupted(capsys, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShowCommand, "run", interrupt)
    assert "interrupted; the same command takes up" in said(capsys, "show", "wrn-10-1", code=130)


def test_bugs_keep_their_traceback(monkeypatch):
    def buggy(self):
        raise ZeroDivisionError

    monkeypatch.setattr(ShowCommand, "run", buggy)
    with pytest.raises(ZeroDivisionError):
        main(["show", "wrn-10-1"])


def test_as_a_process():
    done = process("show", "wrn-10-1", "--size", 8, "--depth", 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert "77,850 parameters" in done.stdout
    done = process("rewrite", "--network", "wrn-10-1", "--choice", "G(3)")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nnopt: at 'stage1_block0': G(3) needs 3 groups")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough():
    """`nnopt show ... | true`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "nnopt.cli.main", "show", "wrn-10-1", "--size", "8"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
