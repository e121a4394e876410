"""Places that compile, run and time networks."""

from nnopt.backends.compiled import BACKENDS, Backend, Compiled, backend, compile_network
from nnopt.backends.measure import Latency, Speedup, dispatch_ms, measure, speedup
from nnopt.backends.xla import XlaBackend, describe_device

__all__ = [
    "BACKENDS",
    "Backend",
    "Compiled",
    "Latency",
    "Speedup",
    "XlaBackend",
    "backend",
    "compile_network",
    "describe_device",
    "dispatch_ms",
    "measure",
    "speedup",
]
