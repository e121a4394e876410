"""A network as a tree one can read, and the difference of two."""

from typing import Any

import flax.linen as nn

from nnopt.core.encode import encode
from nnopt.core.example import spec_text
from nnopt.core.paths import subtree
from nnopt.core.sites import Site, Sites, count_leaves, sites
from nnopt.typing import Path


def show(net: nn.Module, example: Any, *, depth: int | None = None) -> str:
    """The network as a tree: name, class, what goes in and comes out, parameters (its own and everything below).

    Args:
        net: any linen module.
        example: an array of its input shape, or an `Example`.
        depth: how many levels to show; all by default.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> print(show(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.zeros((1, 3))))
        Sequential            float32[1,3] -> float32[1,2]  26 parameters
        ├── layers_0  Dense   float32[1,3] -> float32[1,4]  16 parameters
        └── layers_2  Dense   float32[1,4] -> float32[1,2]  10 parameters
    """
    found = sites(net, example)
    rows = [(*_head(s, rail), *_tail(found, s)) for s, rail in _tree(found, depth)]
    return _columns(rows)


def diff(old: nn.Module, new: nn.Module, example: Any) -> str:
    """What changed between two networks: `-` gone, `+` new, `~` other class, configuration or shapes.

    Modules inside one that is gone or new are not listed; the last line gives parameters before and after.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> a, b = nn.Sequential([nn.Dense(4), nn.Dense(2)]), nn.Sequential([nn.Dense(8), nn.Dense(2)])
        >>> print(diff(a, b, jnp.zeros((1, 3))))
        ~ layers_0  Dense  float32[1,3] -> float32[1,4]  16 parameters
                 -> Dense  float32[1,3] -> float32[1,8]  32 parameters
        ~ layers_1  Dense  float32[1,4] -> float32[1,2]  10 parameters
                 -> Dense  float32[1,8] -> float32[1,2]  18 parameters
        parameters: 26 -> 50
    """
    before, after = sites(old, example), sites(new, example)
    rows: list[tuple[str, ...]] = []
    hidden: set[Path] = set()
    for path in _merged(before.paths, after.paths):
        name = "/".join(path) or "."
        if any(path[:i] in hidden for i in range(len(path))):
            continue
        if path not in after or path not in before:
            hidden.add(path)
            here, sign = (before, "-") if path in before else (after, "+")
            rows.append((f"{sign} {name}", *_tail(here, here[path], with_class=True)))
            continue
        a, b = before[path], after[path]
        if _same(a, b):
            continue
        if type(a.module) is not type(b.module):
            hidden.add(path)
        rows.append((f"~ {name}", *_tail(before, a, with_class=True)))
        rows.append((f"{'->':>{len(name) + 2}}", *_tail(after, b, with_class=True)))
    text = _columns(rows)
    total = f"parameters: {_total(before):,} -> {_total(after):,}"
    return f"{text}\n{total}" if rows else f"no difference\n{total}"


def _same(a: Site, b: Site) -> bool:
    """Whether two sites look alike by themselves; what stands below them is compared on its own."""
    if not a.path or not (a.variables or b.variables):  # a container: its shapes follow its parts
        return type(a.module) is type(b.module)
    shapes = (a.inputs, a.outputs) == (b.inputs, b.outputs)
    return shapes and encode(a.module, strict=False) == encode(b.module, strict=False)


def _head(site: Site, rail: str) -> tuple[str, str]:
    cls = type(site.module).__name__
    return (f"{rail}{site.path[-1]}", cls) if site.path else (cls, "")


def _tail(found: Sites, site: Site, *, with_class: bool = False) -> tuple[str, ...]:
    below = count_leaves(subtree(found.variables.get("params", {}), site.path))
    inputs = ", ".join(spec_text(x) for x in site.inputs if hasattr(x, "shape"))
    notes = f"{below:,} parameters" if below else ""
    if len(site.calls) > 1 and not {"scan", "vmap"} & set(site.lifted):
        notes += f", called {len(site.calls)} times"
    if site.lifted:
        notes += f", under {' '.join(site.lifted)}"
    shapes = f"{inputs} -> {spec_text(site.outputs)}"
    return (*((type(site.module).__name__,) if with_class else ()), shapes, notes.lstrip(", "))


def _tree(found: Sites, depth: int | None) -> list[tuple[Site, str]]:
    """Sites in call order, each with the rail drawn before its name."""
    shown = [s for s in found if depth is None or len(s.path) <= depth]
    known = {s.path for s in shown}

    def parent(path: Path) -> Path | None:
        return next((path[:i] for i in range(len(path) - 1, -1, -1) if path[:i] in known), None)

    children: dict[Path | None, list[Site]] = {}
    for s in shown:
        children.setdefault(parent(s.path), []).append(s)
    rows: list[tuple[Site, str]] = []

    def walk(site: Site, rail: str, own: str) -> None:
        rows.append((site, own))
        below = children.get(site.path, [])
        for i, child in enumerate(below):
            last = i == len(below) - 1
            walk(child, rail + ("    " if last else "│   "), rail + ("└── " if last else "├── "))

    for root in children.get(None, []):
        walk(root, "", "")
    return rows


def _merged(a: tuple[Path, ...], b: tuple[Path, ...]) -> list[Path]:
    """Paths of both, new ones following the path they come after."""
    merged = list(a)
    for i, path in enumerate(b):
        if path not in merged:
            merged.insert(merged.index(b[i - 1]) + 1 if i else 0, path)
    return merged


def _total(found: Sites) -> int:
    return count_leaves(found.variables.get("params", {}))


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )
