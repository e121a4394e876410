"""Compiled programs kept between processes and runs, in JAX's persistent compilation cache."""

import os
import pathlib

import jax


def cache_folder() -> pathlib.Path | None:
    """Where compiled programs are kept: `NNOPT_CACHE`, or the user's cache folder; None where `NNOPT_CACHE=off`."""
    named = os.environ.get("NNOPT_CACHE")
    if named:
        return None if named == "off" else pathlib.Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "nnopt" / "xla"


def keep_compiled_programs() -> None:
    """Turns the persistent cache on for this process, in `cache_folder()`, unless it is on already.

    Small programs are kept too: scoring consists of them. Into a folder that cannot be written, nothing
    is.
    """
    folder = cache_folder()
    if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
