"""Other machines to run and time on, through TVM's RPC: a device's own server, or whichever device of a kind a tracker has free.

The code is made here, for the device's target, and sent there. Times are taken by TVM's timer on the device: neither the network
nor this process is part of them.
"""

import contextlib
import dataclasses
import gc
import itertools
import pathlib
import socket
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from nnopt.backends.tvm.load import tvm
from nnopt.backends.tvm.machines import silent
from nnopt.backends.tvm.targets import cpu_of, is_gpu, target_text
from nnopt.errors import BackendError

T = TypeVar("T")
_REACH_SECONDS = 4.0
"""Within which a host has to accept a connection, and a tracker to answer."""
_THREADS = "runtime.NumThreads"
_FLUSHED_BYTES = 64 << 20
"""Written before a call with cold caches: more than the caches of a core hold."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """A device to run on.

    Attributes:
        host: name or address of the device, whose server is that of `python -m tvm.exec.rpc_server`; or of a tracker.
        port: of it.
        key: kind of device that a tracker is asked for; None if `host` is the device itself.
        target: what code is made for, as TVM describes it; by default the CPU that the device says it has, or this machine's if
            it does not say.
        session_timeout: seconds after which the device ends a session, and with it whatever was compiled for it.
        wait: seconds to wait for a device that is in use.
    """

    host: str
    port: int
    key: str | None = None
    target: Mapping[str, Any] | str | None = None
    session_timeout: float = 1800.0
    wait: float = 30.0

    def __post_init__(self) -> None:
        """Checks the values."""
        if not 0 < self.port < 1 << 16:
            raise BackendError(f"remote: {self.port} is no port; give 1 to 65535")
        if self.session_timeout <= 0 or self.wait <= 0:
            raise BackendError(
                f"remote: a session of {self.session_timeout} s, waited for {self.wait} s; give more than 0 s for both"
            )
        if self.target is not None:
            object.__setattr__(self, "target", target_text(self.target))

    @property
    def address(self) -> str:
        """For people, such as `board:9090` or `tracker:9190 (pi)`."""
        return f"{self.host}:{self.port}" + (f" ({self.key})" if self.key is not None else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Device:
    """A device in session: a connection that lasts as long as this, or something compiled for it, is held.

    Attributes:
        remote: how it was reached.
        session: of TVM.
    """

    remote: Remote
    session: Any

    @property
    def threads(self) -> int:
        """That its parallel loops are spread over; 1 if it does not say."""
        return int(self._asked(_THREADS) or 1)

    @property
    def cpu(self) -> str | None:
        """As LLVM calls it; None if it does not say: only a whole TVM does, not a runtime alone."""
        name = self._asked("target.llvm_get_system_cpu")
        return None if name is None else str(name)

    @property
    def own(self) -> str | None:
        """Target of the device's CPU, as JSON text; None if it does not say."""
        if self.cpu is None:
            return None
        from tvm.target import codegen

        triple = str(self._asked("target.llvm_get_system_triple") or "")
        other = triple.partition("-")[0] != str(codegen.llvm_get_system_triple()).partition("-")[0]
        # This machine's triple is as good where only vendors' names differ, and it has a linker.
        return target_text(
            {"kind": "llvm", "mcpu": self.cpu} | ({"mtriple": triple} if triple and other else {})
        )

    def describe(self, target: Any) -> dict[str, Any]:
        """What a latency there depends on, as JSON values."""
        return {
            "platform": "cpu" if not is_gpu(target) else str(target.kind.name),
            "device_kind": cpu_of(target),
            "remote": self.remote.address,
        }

    @property
    def alive(self) -> bool:
        """Whether the session still answers, be it that it has no such function."""
        try:
            return int(self.session.get_function(_THREADS)()) > 0
        except AttributeError:
            return True
        except Exception:  # of a kind that depends on TVM's version and on the server
            return False

    def _asked(self, name: str) -> Any:
        try:
            return self.session.get_function(name)()
        except Exception as error:  # as above
            if self._ended(error):
                raise self.lost(error) from error
            return None

    def lost(self, error: Exception) -> BackendError:
        """One line for an error of the device."""
        if self._ended(error):
            return BackendError(
                f"remote: {self.remote.address} ended the session, which it keeps for {self.remote.session_timeout:g} s at most, "
                "or its process died; compile again, with a longer session_timeout if need be"
            )
        line = next((x.strip() for x in reversed(str(error).splitlines()) if x.strip()), "")
        return BackendError(f"remote: {self.remote.address} failed: {line:.300}")

    def _ended(self, error: Exception) -> bool:
        """By the error's words, or if they don't tell: a call to a session that is over can fail with what an earlier one left."""
        words = ("sessiontimeout", "rpccode", "connection", "shutdown", "socket", "channel", "broken pipe", "recv")  # fmt: skip
        return any(word in str(error).lower() for word in words) or not self.alive


_DEVICES: "weakref.WeakValueDictionary[str, Device]" = weakref.WeakValueDictionary()
"""In session, by address: a device has one at a time, so what is compiled for it shares one."""
_NUMBERS = itertools.count()


def device_of(remote: Remote) -> Device:
    """The device, in session.

    Raises:
        BackendError: it cannot be reached, is in use for too long, or there is none of this key.
    """
    tvm()
    known = _DEVICES.get(remote.address)
    if known is not None:
        if known.alive:
            return known
        _DEVICES.pop(remote.address, None)  # it timed out or died, and a new one is as good
    gc.collect()  # TVM's virtual machines are parts of cycles: a session that nobody needs may not have ended yet
    _reach(remote)
    session = _tracked(remote) if remote.key is not None else _direct(remote)
    device = Device(remote, session)
    _DEVICES[remote.address] = device
    return device


def _reach(remote: Remote) -> None:
    """TVM itself would try for a minute."""
    try:
        socket.create_connection((remote.host, remote.port), _REACH_SECONDS).close()
    except TimeoutError as error:
        raise BackendError(
            f"remote: {remote.host}:{remote.port} does not answer in {_REACH_SECONDS:g} s; check the address, or wait until others "
            "are done with it"
        ) from error
    except OSError as error:
        what = "a tracker" if remote.key is not None else "a device"
        raise BackendError(
            f"remote: {remote.host}:{remote.port} does not answer: {error.strerror or error}; start {what} there, or check the "
            "address"
        ) from error


def _direct(remote: Remote) -> Any:
    from tvm import rpc

    try:
        return _within(
            remote.wait,
            lambda: rpc.connect(remote.host, remote.port, session_timeout=remote.session_timeout),
        )
    except TimeoutError:
        raise BackendError(
            f"remote: {remote.address} accepts connections, but began no session in {remote.wait:g} s; it is in use, or is no RPC "
            "server"
        ) from None
    except Exception as error:
        raise BackendError(
            f"remote: {remote.address} refuses a session; if it is a tracker, or a device with a key, give the tracker's address "
            "and the key"
        ) from error


def _tracked(remote: Remote) -> Any:
    from tvm import rpc

    try:
        tracker = _within(_REACH_SECONDS, lambda: rpc.connect_tracker(remote.host, remote.port))
    except Exception as error:  # closed, or silent
        raise BackendError(
            f"remote: {remote.host}:{remote.port} is no RPC tracker; leave out the key if it is the device itself"
        ) from error
    with contextlib.closing(tracker):
        servers = tracker.summary()["server_info"]
        keys = sorted({str(server["key"]).partition(":")[2] for server in servers})
        if remote.key not in keys:
            raise BackendError(
                f"remote: the tracker {remote.host}:{remote.port} has no device of the key {remote.key!r:.60}; it has "
                f"{', '.join(keys) or 'none at all'}"
            )
        try:
            return _within(
                remote.wait,
                lambda: tracker.request(
                    remote.key, session_timeout=remote.session_timeout, max_retry=1
                ),
            )
        except TimeoutError:
            raise BackendError(
                f"remote: no device of the key {remote.key!r} was free in {remote.wait:g} s; try again later, or wait longer"
            ) from None
        except Exception as error:
            raise BackendError(
                f"remote: the device of the key {remote.key!r} that {remote.host}:{remote.port} gave does not answer; restart it"
            ) from error


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What a function returns or raises, if it does so in time: TVM's sockets wait for ever."""
    made: list[T] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            made.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not made:
        raise TimeoutError
    return made[0]


@dataclasses.dataclass(frozen=True, eq=False)
class RemoteRun:
    """An executable on a device, with its inputs there.

    Attributes:
        device: where.
        machine: Relax's virtual machine there.
        place: TVM's handle of the CPU or GPU.
        inputs: on the device.
    """

    device: Device
    machine: Any
    place: Any
    inputs: tuple[Any, ...]

    def __call__(self, *arrays: Any) -> Any:
        """Runs once: sends the arrays, and returns when there are results, which stay there until they are asked for."""
        with self._one_line():
            self.machine.set_input("main", *(self._sent(a) for a in arrays))
            self.machine.invoke_stateful("main")
            return self.machine.get_outputs("main")

    def seconds(self, calls: int, cold: bool) -> float:
        """Time of a call on the inputs, taken on the device: the mean of so many, after one that does not count."""
        with self._one_line():
            self.machine.set_input("main", *self.inputs)
            timer = self.machine.module.time_evaluator(
                "invoke_stateful", self.place, number=calls, repeat=1, cache_flush_bytes=_FLUSHED_BYTES if cold else 0,
            )  # fmt: skip
            return float(timer("main").mean)

    def fetched(self, result: Any) -> list[np.ndarray]:
        """What a run returned, here."""
        with self._one_line():
            return [r.numpy() for r in (result if isinstance(result, Sequence) else [result])]

    def _sent(self, array: Any) -> Any:
        return tvm().runtime.tensor(np.array(array), self.place)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except BackendError:
            raise
        except Exception as error:
            raise self.device.lost(error) from error


def placed(executable: Any, device: Device, target: Any, inputs: Sequence[jax.Array]) -> RemoteRun:
    """Sends an executable and its inputs.

    Args:
        executable: of Relax's virtual machine.
        device: where it is to run.
        target: that it was built for.
        inputs: arrays that it is timed on.

    Raises:
        BackendError: the device cannot load it.
    """
    from tvm import relax

    # Objects are linked there: here may be no linker for the device's architecture.
    name = f"nnopt{next(_NUMBERS)}.tar"
    session = device.session
    kind = str(target.kind.name) if is_gpu(target) else "cpu"
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / name
            with silent():
                executable.export_library(str(path))
            session.upload(bytearray(path.read_bytes()), name)
        place = session.device(kind, 0)
        if not place.exist:
            raise BackendError(f"remote: {device.remote.address} has no {kind} device")
        places = [place, session.cpu(0)] if is_gpu(target) else [place]
        machine = relax.VirtualMachine(session.load_module(name), places)
        there = tuple(tvm().runtime.tensor(np.array(a), place) for a in inputs)
    except BackendError:
        raise
    except Exception as error:
        raise device.lost(error) from error
    return RemoteRun(device, machine, place, there)
