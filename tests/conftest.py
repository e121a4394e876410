"""Settings and fixtures for all tests."""

import os
import pathlib

import jax
import pytest

os.environ.setdefault("NNOPT_CACHE", "off")  # what is compiled in a test is compiled
# Programs of tests run once, on little: LLVM's optimisations would take a tenth to a third of the time.
# `XLA_FLAGS= scripts/test` has them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data that NNOPT_DATA names; tests that need it skip without it."""
    folder = os.environ.get("NNOPT_DATA")
    if not folder:
        pytest.skip("needs the real data: set NNOPT_DATA to the folder that holds it")
    return pathlib.Path(folder)
