"""TVM as a second, measured backend: any JAX function through Relax, with schedules of our own."""

from nnopt.backends.tvm.backend import TvmBackend

__all__ = ["TvmBackend"]
