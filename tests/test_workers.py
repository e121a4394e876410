import dataclasses
import os
import signal
import time

import pytest

from nnopt.errors import SearchError, SelectionError
from nnopt.search.blockswap import BlockSwap, Problem, score_all
from nnopt.search.workers import cores, default_workers, map_in_processes


@dataclasses.dataclass(frozen=True)
class Square:
    """A job without JAX programs."""

    fault: str = ""

    def start(self, worker, workers, on_progress):
        on_progress(1, 2)
        if self.fault == "start":
            raise SelectionError("nothing is selected")
        on_progress(2, 2)
        return self.result

    def result(self, number):
        if number == 5 and self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5 and self.fault == "raise":
            raise SearchError("five is right out")
        return number**2, os.getpid(), tuple(cores())


def test_results_come_in_order_from_pinned_processes():
    told = []
    numbers = list(range(3, 40))
    found = list(map_in_processes(Square(), numbers, 2, lambda *progress: told.append(progress)))
    assert [square for square, _, _ in found] == [n**2 for n in numbers]
    assert os.getpid() not in {pid for _, pid, _ in found}
    places = {pid: place for _, pid, place in found}
    assert all(len(place) == 1 and place[0] in cores() for place in places.values())
    assert len(set(places.values())) == min(len(places), len(cores()))
    assert told == sorted(told)
    assert not any(_alive(pid) for pid in places)


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("start", SelectionError, "nothing is selected"),
        ("raise", SearchError, "five is right out"),
        ("die", SearchError, "a worker process died"),
    ],
)
def test_what_goes_wrong_in_a_worker(fault, error, said):
    with pytest.raises(error, match=said):
        list(map_in_processes(Square(fault), range(12), 2))


def test_leaving_early_ends_the_processes():
    results = map_in_processes(Square(), range(1000), 2)
    _, pid, _ = next(results)
    results.close()
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_one_worker_for_each_core_by_default():
    assert default_workers() == len(cores())


def test_processes_score_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("NNOPT_CACHE", str(tmp_path))  # shared by both
    spec = BlockSwap("wrn-10-1", "digits", 40_000, 0.1, samples=6, seed=5, score_batch=2)
    problem = Problem(spec)
    alone = score_all(problem, (), lambda row: None)
    told = []
    rows = score_all(
        problem, (), lambda row: None, workers=2, on_prepared=lambda *t: told.append(t)
    )
    assert told[-1][1] > 50
    assert any(tmp_path.iterdir())
    for a, b in zip(alone, rows, strict=True):
        assert (a.index, a.names, a.parameters) == (b.index, b.names, b.parameters)
        assert b.score == pytest.approx(a.score, rel=1e-3)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
