"""Devices over TVM's RPC: servers and a tracker on the loopback interface, and what is said when they cannot be reached."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip("tvm_ffi")
pytest.importorskip("tornado")

from nnopt.backends import XlaBackend, measure
from nnopt.backends.compiled import compile_network
from nnopt.backends.tvm import Remote, TvmBackend
from nnopt.backends.tvm.remote import Device
from nnopt.errors import BackendError

HERE = "127.0.0.1"
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).standard_normal((6, 4)), jnp.float32)


def function(x):
    return {"product": jax.nn.relu(x @ W), "sum": x.sum(1)}


def free_port():
    with socket.socket() as chosen:
        chosen.bind((HERE, 0))
        return chosen.getsockname()[1]


@contextlib.contextmanager
def served(program, *more):
    """A server of TVM's in a process group of its own, all of which is killed."""
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", f"tvm.exec.{program}", "--host", HERE, "--port", f"{port}", "--port-end", f"{port + 1}",
            "--silent", *more,
        ],
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection((HERE, port), 1).close()
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"{program} did not start")
        yield port
    finally:
        # Workers of TVM leave the group for one of their own; they are children all the same.
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(pid):
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def device():
    with served("rpc_server") as port:
        yield port


@pytest.fixture(scope="module")
def tracker():
    with served("rpc_tracker") as port:
        yield port


@pytest.fixture(autouse=True)
def ended():
    """A device has one session at a time: it ends when nothing that was compiled for it is left."""
    yield
    gc.collect()


def compiled(remote, **options):
    return TvmBackend(threads=1, remote=remote, **options).compile(function, (X,))


def test_outputs_are_those_of_this_machine(device):
    there = compiled(Remote(HERE, device))
    here = XlaBackend().compile(function, (X,))
    for x in (X, X * 2 - 1):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            there.outputs(x),
            here.outputs(x),
        )
    assert there.device["remote"] == f"{HERE}:{device}"
    assert there.device["target"]
    assert there.device["threads"] == 1


def test_networks_share_a_session_and_are_timed_there(device):
    net = nn.Conv(8, (3, 3))
    x = jnp.ones((1, 6, 6, 4))
    variables = net.init(jax.random.key(0), x)
    template, plain = (
        compile_network(
            net,
            variables,
            x,
            backend=TvmBackend(threads=1, scheduled=how, remote=Remote(HERE, device)),
        )
        for how in ("template", "none")
    )
    called = []

    def clock():  # of this process: no part of a time that is taken elsewhere
        called.append(None)
        return 1e-3 * len(called)

    times = measure({"template": template, "plain": plain}, repeats=3, clock=clock, overhead_ms=0)
    assert all(0 < t.median_ms < 50 for t in times.values())
    setup = times["plain"].setup
    assert setup.device["remote"] == f"{HERE}:{device}"
    assert "cores" not in setup.device
    assert setup.load_average is None
    cold = measure(
        {"plain": plain}, repeats=2, cold=True, evict=lambda: pytest.fail("emptied here")
    )
    assert cold["plain"].inner_calls == 1
    assert cold["plain"].setup.cold


def test_device_of_a_tracker(tracker):
    remote = Remote(HERE, tracker, key="board", target={"kind": "llvm"})
    with pytest.raises(BackendError, match="no device of the key 'board'; it has none at all"):
        compiled(remote)
    with served("rpc_server", f"--tracker={HERE}:{tracker}", "--key=board"):
        wait_for_key(tracker)
        there = compiled(remote)
        np.testing.assert_allclose(there.outputs()["sum"], X.sum(1), rtol=1e-5)
        assert there.device["remote"] == f"{HERE}:{tracker} (board)"
        with pytest.raises(BackendError, match="no device of the key 'baord'; it has board"):
            compiled(Remote(HERE, tracker, key="baord"))
    with pytest.raises(BackendError, match="ended the session"):
        there()
    with pytest.raises(BackendError, match="refuses a session; if it is a tracker"):
        compiled(Remote(HERE, tracker))


def wait_for_key(port):
    from tvm import rpc

    with contextlib.closing(rpc.connect_tracker(HERE, port)) as tracker:
        until = time.monotonic() + 10
        while not tracker.summary()["server_info"]:
            assert time.monotonic() < until
            time.sleep(0.05)


def for_seconds(call, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        call()
        time.sleep(0.2)


def test_session_that_is_over(device):
    remote = Remote(HERE, device, session_timeout=3)
    first = TvmBackend(threads=1, remote=remote).compile(lambda x: x + 1, (X,))
    with pytest.raises(BackendError, match="ended the session, which it keeps for 3 s at most"):
        for_seconds(first, 20)
    with pytest.raises(BackendError, match="ended the session"):
        first.timer(1, False)
    assert compiled(Remote(HERE, device)).outputs()["sum"].shape == (2,)


class Session:
    """What is asked of a dead one fails with whatever is left in its connection."""

    def __init__(self, dead):
        self.dead = dead

    def get_function(self, name):
        return self

    def __call__(self):
        if self.dead:
            raise TypeError("Cannot convert from type `void*` to `int`")
        return 2


def test_errors_of_the_session_and_of_the_code_are_told_apart():
    error = TypeError("Cannot convert from type `void*` to `int`")
    dead, live = (Device(Remote(HERE, 9090), Session(dead)) for dead in (True, False))
    assert "ended the session" in str(dead.lost(error))
    assert "failed: Cannot convert" in str(live.lost(error))
    assert "ended the session" in str(live.lost(RuntimeError("RPCError: channel is closed")))


def test_device_lacks_what_the_target_needs(device):
    with pytest.raises(BackendError, match=r"has no cuda device$"):
        compiled(Remote(HERE, device, target={"kind": "cuda", "arch": "sm_90"}))


@pytest.mark.parametrize("key", [None, "board"])
def test_nobody_there(key):
    began = time.monotonic()
    with pytest.raises(BackendError, match="does not answer: Connection refused; start a"):
        compiled(Remote(HERE, free_port(), key=key))
    assert time.monotonic() - began < 5
    with pytest.raises(BackendError, match="does not answer: "):
        compiled(Remote("nobody.invalid", 9090))


def test_silent_host():
    with socket.socket() as listening:
        listening.bind((HERE, 0))
        listening.listen(5)
        port = listening.getsockname()[1]
        with pytest.raises(BackendError, match=r"began no session in 0\.3 s"):
            compiled(Remote(HERE, port, wait=0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 0}, "0 is no port"),
        ({"port": 70000}, "70000 is no port"),
        ({"port": 9090, "session_timeout": 0}, "give more than 0 s"),
        ({"port": 9090, "target": "{"}, "no JSON object"),
        ({"port": 9090, "target": {"kind": "vulkan"}}, "there are llvm, cuda"),
    ],
)
def test_wrong_remotes(options, message):
    with pytest.raises(BackendError, match=message):
        Remote(HERE, **options)


@pytest.mark.parametrize("scheduled", ["search", "metaschedule"])
def test_searches_are_for_this_machine(scheduled):
    with pytest.raises(BackendError, match="measures on this machine, not on far:9090"):
        TvmBackend(scheduled=scheduled, remote=Remote("far", 9090))
