"""Names written into a trace: which equations of a jaxpr belong to which site.

`jax.ad_checkpoint.checkpoint_name` is an identity with a name. One is written on what enters and one on what leaves each site.
Tracing writes equations down in the order of execution, so whatever lies between the two belongs to the site.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from nnopt.core.modules import is_method
from nnopt.core.patch import Patched
from nnopt.core.paths import path_text
from nnopt.typing import Path

_ENTER, _LEAVE = "nnopt enter ", "nnopt leave "


def mark_sites(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """The interceptor (for `nn.intercept_methods`) that writes the names, of every site but the network itself."""
    module, method = context.module, context.method_name
    if module.scope is None or not module.scope.path or isinstance(module, Patched):
        return next_fun(*args, **kwargs)
    if method == "setup" or not is_method(module, method):
        return next_fun(*args, **kwargs)
    text = path_text(module.scope.path)
    # A module may be given its array by keyword.
    args, kwargs = _with_name((args, kwargs), f"{_ENTER}{text}")
    return _with_name(next_fun(*args, **kwargs), f"{_LEAVE}{text}")


def _with_name(tree: Any, name: str) -> Any:
    """Writes a name on the first array of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            leaves[i] = checkpoint_name(leaf, name)
            break
    return jax.tree.unflatten(structure, leaves)


class OpenSites:
    """Follows the marks of a jaxpr in order: which sites are running."""

    def __init__(self) -> None:
        self._open: list[Path] = [()]

    @property
    def innermost(self) -> Path:
        """The innermost site that is running, `()` for the network itself."""
        return self._open[-1]

    def see(self, equation: Any) -> tuple[Path, bool] | None:
        """Takes note of an equation if it is a mark.

        Returns:
            The site, and whether it is left (and not entered); None if the equation is no mark.
        """
        if equation.primitive.name != "name":
            return None
        name = equation.params["name"]
        if not name.startswith((_ENTER, _LEAVE)):
            return None
        path = tuple(name.split(" ", 2)[2].split("/"))
        if name.startswith(_ENTER):
            self._open.append(path)
            return path, False
        if path in self._open:
            while self._open.pop() != path:
                pass
        return path, True
