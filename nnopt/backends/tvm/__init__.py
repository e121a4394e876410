"""TVM as a second, measured backend: any JAX function through Relax, with schedules of our own."""

from nnopt.backends.tvm.backend import TvmBackend
from nnopt.backends.tvm.remote import Remote

__all__ = ["Remote", "TvmBackend"]
