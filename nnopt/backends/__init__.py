"""Places that compile, run and time networks."""

from nnopt.backends.measure import Latency, Speedup, dispatch_ms, measure, speedup
from nnopt.backends.xla import Compiled, compile_network, describe_device

__all__ = [
    "Compiled",
    "Latency",
    "Speedup",
    "compile_network",
    "describe_device",
    "dispatch_ms",
    "measure",
    "speedup",
]
