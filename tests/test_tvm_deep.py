"""Tuning by MetaSchedule: with a few trials, of tiny kernels."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tvm_ffi")
pytest.importorskip("psutil")
pytest.importorskip("cloudpickle")

from nnopt.backends import XlaBackend
from nnopt.backends.tvm import TvmBackend, deep
from nnopt.errors import BackendError

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((1, 6, 6, 8)), jnp.float32)
KERNEL = jnp.asarray(RANDOM.standard_normal((3, 3, 8, 16)), jnp.float32)
DENSE = jnp.asarray(RANDOM.standard_normal((16, 10)), jnp.float32)


def function(x):
    """A convolution that is worth a trial, and a product and a mean that are not."""
    y = jax.lax.conv_general_dilated(
        x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(y).mean((1, 2)) @ DENSE


def deeply(folder, trials):
    return TvmBackend(
        threads=1, scheduled="metaschedule", trials=trials, database=str(folder)
    ).compile(function, (X,))


def records(folder):
    (path,) = folder.glob("*/database_tuning_record.json")
    return path.read_text().splitlines()


def agree(made):
    want = XlaBackend().compile(function, (X,)).outputs()
    np.testing.assert_allclose(made.outputs(), want, rtol=1e-4, atol=1e-4)


def counted(text):
    return tuple(map(int, re.findall(r"metaschedule, (\d+) trials \((\d+) of (\d+)", text)[0]))


def test_a_database_is_filled_once(tmp_path, monkeypatch, capfd):
    if not deep._installed("xgboost"):
        pytest.skip("needs xgboost")
    monkeypatch.setattr(deep, "_seconds", lambda module, target: 1.0)  # templates are slow
    first = deeply(tmp_path, 4)
    agree(first)
    trials, tuned, kernels = counted(first.schedule)
    assert 1 <= trials <= 4
    assert tuned == 1
    assert kernels > 1
    assert first.schedule.endswith("kernels), others by templates")
    written = records(tmp_path)
    assert len(written) == trials + 1  # and the template
    assert any("EnterPostproc" in trace for trace in first.traces.values())

    monkeypatch.setattr(deep, "_tune", lambda *_: pytest.fail("tuned again"))
    again = deeply(tmp_path, 64)
    agree(again)
    assert records(tmp_path) == written
    assert again.schedule == first.schedule
    assert again.traces == first.traces
    assert capfd.readouterr() == ("", "")
    (log,) = tmp_path.glob("*/search.log")
    assert "Total trials" in log.read_text()
    loggers = [n for n in logging.root.manager.loggerDict if n.startswith("tvm.s_tir.meta")]
    assert not any(logging.getLogger(name).handlers for name in loggers)


def test_a_template_that_is_faster_is_kept_and_chance_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(deep, "_seconds", lambda module, target: 1e-12)
    monkeypatch.setattr(deep, "_installed", lambda name: name != "xgboost")
    made = deeply(tmp_path, 1)
    agree(made)
    assert counted(made.schedule)[:2] == (1, 0)
    assert made.schedule.endswith("; by chance, for xgboost is not installed")
    template = TvmBackend(threads=1).compile(function, (X,))
    assert made.traces == template.traces


def test_without_trials_there_are_templates(tmp_path):
    made = deeply(tmp_path, 0)
    agree(made)
    assert counted(made.schedule)[:2] == (0, 0)


def test_intrinsics_are_real_again(tmp_path):
    import sys

    deeply(tmp_path, 0)
    stub = sys.modules.get("tvm.s_tir.tensor_intrin")
    assert stub is None or stub.__path__


@pytest.mark.parametrize("missing", ["psutil", "cloudpickle"])
def test_missing_packages(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(deep, "_installed", lambda name: name != missing)
    with pytest.raises(BackendError, match=rf"needs {missing}, .* pip install 'nnopt\[tvm\]'"):
        deeply(tmp_path, 1)


def test_damaged_database(tmp_path):
    deeply(tmp_path, 0)
    (part,) = tmp_path.iterdir()
    for name in ("database_workload.json", "database_tuning_record.json"):
        (part / name).write_text("[1, \n")
    with pytest.raises(BackendError, match=r"database in .* is damaged; delete that folder"):
        deeply(tmp_path, 1)


def test_database_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"no database can be in .*Not a directory"):
        deeply(tmp_path / "file", 1)


def test_trials_below_zero():
    with pytest.raises(BackendError, match="-1 trials; give 0 or more"):
        TvmBackend(scheduled="metaschedule", trials=-1)
