"""Places that compile, run and time networks."""

from nnopt.backends.compiled import BACKENDS, Backend, Compiled, backend, compile_network
from nnopt.backends.measure import Latency, Speedup, dispatch_ms, measure, merged, speedup
from nnopt.backends.setup import Setup, pinned
from nnopt.backends.weights import stand_in_variables
from nnopt.backends.xla import XlaBackend, describe_device

__all__ = [
    "BACKENDS",
    "Backend",
    "Compiled",
    "Latency",
    "Setup",
    "Speedup",
    "XlaBackend",
    "backend",
    "compile_network",
    "describe_device",
    "dispatch_ms",
    "measure",
    "merged",
    "pinned",
    "speedup",
    "stand_in_variables",
]
