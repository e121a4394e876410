"""`nnopt check`: a backend that computes something else is caught, where it begins is named, and nothing of it is reported."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import nnopt.backends
from nnopt.backends import Compiled, XlaBackend, stand_in_variables
from nnopt.backends.agreement import Agreement, agreement, agrees, difference
from nnopt.cli.main import main
from nnopt.core import Example, save_record
from nnopt.errors import BackendError
from nnopt.networks import VGG
from nnopt.search.checking import check_networks, rank_agreements, time_checked

SMALL = VGG((1, 1), (4, 8))
EXAMPLE = Example(jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
VARIABLES = stand_in_variables(SMALL, EXAMPLE)


CHANGES = {
    "scale": lambda x: x * 1.001,
    "nan": lambda x: x.at[0].set(jnp.nan),
    "shape": lambda x: x[..., :1],
    "keep": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class Broken:
    """XLA, but what a function returns is changed: all of it, or only from a layer on."""

    change: str = "scale"
    name: str = "broken"

    def describe(self):
        return XlaBackend().describe()

    def compile(self, function, inputs):
        def wrong(*arrays):
            made = function(*arrays)
            change = CHANGES[self.change]
            if isinstance(made, dict):  # layers
                first = sorted(made)[0]
                return {k: v if k == first else change(v) for k, v in made.items()}
            return change(made)

        compiled: Compiled = XlaBackend().compile(wrong, inputs)
        return compiled


class Quiet:
    """A watcher that says nothing."""

    def phase(self, *_):
        pass

    def advance(self, *_):
        pass


def test_xla_agrees_with_64_bits():
    found = agreement(SMALL, VARIABLES, EXAMPLE, [XlaBackend()], layers=True)
    assert found.agrees
    assert found.first_wrong_layer is None
    assert 0 < found.worst.relative < 1e-5
    names = [d.place.split()[1] for d in found.layers]
    assert len(names) == 3
    assert names[-1] == "head"
    assert not jax.config.read("jax_enable_x64")
    found.check("a network")


@pytest.mark.parametrize("change", ["scale", "nan", "shape"])
def test_a_wrong_backend_is_caught(change):
    backends = [XlaBackend(), Broken(change)]
    assert not agrees(SMALL, VARIABLES, EXAMPLE, backends)
    found = agreement(SMALL, VARIABLES, EXAMPLE, backends, layers=True)
    assert found.worst.first == "broken"
    right = [d for d in found.outputs if (d.first, d.second) == ("xla", "float64")]
    assert all(d.within(1e-4) for d in right)
    assert found.first_wrong_layer is not None
    assert found.first_wrong_layer.place.startswith("2 ")
    with pytest.raises(
        BackendError, match=r"a network: broken and .* nnopt check --layers"
    ) as error:
        found.check("a network")
    assert "\n" not in str(error.value)


def test_a_tolerance_is_a_tolerance():
    backends = [XlaBackend(), Broken()]
    assert agrees(SMALL, VARIABLES, EXAMPLE, backends, tolerance=2e-3)
    assert not agrees(SMALL, VARIABLES, EXAMPLE, backends, tolerance=5e-4)


def test_differences():
    inf, nan = np.inf, np.nan
    assert difference("", "a", "b", [1.0, inf, nan, -inf], [1.0, inf, nan, -inf]).within(0)
    assert difference("", "a", "b", [1.0, 2.0], [1.0, 2.5]).relative == pytest.approx(0.2)
    assert not difference("", "a", "b", [nan], [1.0]).within(1e9)
    assert not difference("", "a", "b", [1.0], [inf]).within(1e9)
    assert not difference("", "a", "b", [1e-9], [0.0]).within(1e9)
    assert difference("", "a", "b", [0.0], [0.0]).within(0)
    assert difference("", "a", "b", [], []).within(0)


def test_shared_and_lifted_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(6, name="layer")
            return nn.remat(nn.Dense)(2, name="head")(layer(nn.relu(layer(x))))

    example = Example(jnp.zeros((2, 6)))
    found = agreement(
        Net(), stand_in_variables(Net(), example), example, [XlaBackend()], layers=True
    )
    assert [d.place for d in found.layers] == ["1 layer", "2 layer 2"]


def test_there_is_no_latency_of_what_disagrees():
    networks = {"small": (SMALL, EXAMPLE), "wide": (VGG((1, 1), (8, 8)), EXAMPLE)}
    backends = [XlaBackend(), Broken("keep")]
    checked = check_networks(networks, backends, Quiet(), tolerance=1e-4)
    assert all(found.agrees for found in checked.values())
    wrong = Agreement(1e-4, (difference("output", "a", "b", [1.0], [2.0]),))
    runs = time_checked(networks, checked | {"wide": wrong}, backends, Quiet(), repeats=2)
    assert {r.name for r in runs} == {"small"}
    assert (
        time_checked(networks, dict.fromkeys(networks, wrong), backends, Quiet(), repeats=2) == []
    )
    assert rank_agreements(runs) == {}
    both = time_checked(networks, checked, backends, Quiet(), repeats=2)
    ((pair, ranks),) = rank_agreements(both).items()
    assert pair == ("xla", "broken")
    assert ranks.candidates == 2


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "small.json"
    save_record(SMALL, path)
    return str(path)


def given_backends(monkeypatch, **made):
    monkeypatch.setattr(nnopt.backends, "BACKENDS", tuple(made))
    monkeypatch.setattr(nnopt.backends, "backend", lambda name: made[name])


def test_the_command_agrees(record, monkeypatch, capsys, tmp_path):
    given_backends(monkeypatch, xla=XlaBackend(), other=Broken("keep", "other"))
    out = str(tmp_path / "all.csv")
    main(["check", record, "--size", "8", "--layers", "--latency", "--repeats", "2", "--out", out])
    printed = capsys.readouterr().out
    assert "All agree: xla, other and float64." in printed
    assert "DISAGREE" not in printed
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert {r["kind"] for r in rows} == {"output", "layer"}
    assert all(r["agrees"] == "True" for r in rows)


def test_the_command_names_what_disagrees(record, monkeypatch, capsys):
    given_backends(monkeypatch, xla=XlaBackend(), broken=Broken())
    with pytest.raises(SystemExit) as ended:
        main(["check", record, "--size", "8", "--layers", "--latency", "--repeats", "2"])
    assert ended.value.code == 1
    printed = "".join(capsys.readouterr().out.split())
    assert "DISAGREE" in printed
    assert "disagrees,fromthelayer2" in printed
    assert "Latencies" not in printed


@pytest.mark.parametrize(
    "options",
    [
        "--tolerance 0",
        "--seed -1",
        "--top 0",
        "--out /no/such/a.csv",
        "--size 100000",
        "--batch 100000000000",
    ],
)
def test_bad_input_is_one_line(record, options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", record, "--backends", "xla", *options.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("nnopt: ")
    assert error.count("\n") == 1


def test_nothing_to_check(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check"])
    assert ended.value.code == 2
    assert "network" in capsys.readouterr().err
