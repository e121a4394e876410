"""Paths as text, and what to suggest when one is misspelt."""

import difflib
from collections.abc import Iterable
from typing import Any

from nnopt.typing import Path

ROOT_TEXT = "."


def path_text(path: Path) -> str:
    """`("stage1", "conv")` -> `"stage1/conv"`; the root is `"."`."""
    return "/".join(path) if path else ROOT_TEXT


def as_path(text: str | Path) -> Path:
    """`"stage1/conv"` -> `("stage1", "conv")`; `"."` and `""` are the root."""
    if isinstance(text, tuple):
        return text
    return tuple(part for part in text.split("/") if part and part != ROOT_TEXT)


def suggestion(path: Path, known: Iterable[Path]) -> str:
    """A half sentence naming the known paths that look most like `path`."""
    texts = [path_text(p) for p in known]
    close = difflib.get_close_matches(path_text(path), texts, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "`nnopt.core.show(net, example)` lists the paths"


def subtree(tree: Any, path: Path) -> Any:
    """What `tree` (nested dictionaries) holds below `path`; an empty dictionary where there is nothing."""
    for name in path:
        if not hasattr(tree, "keys") or name not in tree:
            return {}
        tree = tree[name]
    return tree
