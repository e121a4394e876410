"""Selectors: which sites of a network a rewrite is about.

A selector is a frozen dataclass and a function `Sites -> Sites`. Selectors combine with `&`, `|` and `~`.
Plain text stands for `At` or, with a wildcard in it, `Glob`.

Example:
    >>> from nnopt.networks import WideResNet
    >>> import flax.linen as nn, jax.numpy as jnp
    >>> all_sites = sites(WideResNet(10, 1.0), jnp.zeros((1, 32, 32, 3)))
    >>> [s.path[-1] for s in (Of(nn.Conv) & Under("stage2_block0"))(all_sites)]
    ['conv1', 'conv2', 'shortcut']
    >>> len(select(all_sites, "stage*/conv1"))
    3
"""

import abc
import dataclasses
import fnmatch

import flax.linen as nn

from nnopt.core.paths import as_path, suggestion
from nnopt.core.sites import Sites, sites
from nnopt.errors import SelectionError

__all__ = [
    "All",
    "At",
    "Exactly",
    "Glob",
    "Leaves",
    "Of",
    "Selector",
    "Under",
    "as_selector",
    "select",
    "sites",
]


class Selector(abc.ABC):
    """Picks sites. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def __call__(self, sites: Sites) -> Sites:
        """The selected sites, in call order."""

    def __and__(self, other: "Selector | str") -> "Selector":
        return _And(self, as_selector(other))

    def __or__(self, other: "Selector | str") -> "Selector":
        return _Or(self, as_selector(other))

    def __invert__(self) -> "Selector":
        return _Not(self)


def as_selector(where: Selector | str) -> Selector:
    """`"a/b"` -> `At("a/b")`, `"stage*/conv?"` -> `Glob("stage*/conv?")`; a selector stays itself.

    Raises:
        SelectionError: neither text nor a selector.
    """
    if isinstance(where, Selector):
        return where
    if isinstance(where, str):
        return Glob(where) if any(c in where for c in "*?[") else At(where)
    raise SelectionError(
        f"{where!r} selects nothing; expected a path such as 'stage1/conv', a wildcard, or a selector"
    )


def select(sites: Sites, where: Selector | str) -> Sites:
    """The sites that `where` picks."""
    return as_selector(where)(sites)


@dataclasses.dataclass(frozen=True)
class All(Selector):
    """Every site, the network itself included."""

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`."""
        return sites


@dataclasses.dataclass(frozen=True)
class At(Selector):
    """The sites at these exact paths (one, or a tuple of them); a path that is not there is an error."""

    paths: str | tuple[str, ...]

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`.

        Raises:
            SelectionError: a path is not in the network.
        """
        paths = (self.paths,) if isinstance(self.paths, str) else self.paths
        wanted = {sites[p].path for p in paths}
        return sites.where(lambda s: s.path in wanted)


@dataclasses.dataclass(frozen=True)
class Glob(Selector):
    """Sites whose path matches, name by name: `stage*_block?/conv1`; `**` stands for any number of names.

    A pattern that matches nothing is an error.
    """

    pattern: str

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`.

        Raises:
            SelectionError: nothing matches.
        """
        parts = as_path(self.pattern)
        found = sites.where(lambda s: _matches(s.path, parts))
        if not len(found):
            raise SelectionError(
                f"no module matches {self.pattern!r} in {type(sites.net).__name__}: {suggestion(parts, sites.paths)}"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Of(Selector):
    """Sites whose module is an instance of a class (or of a subclass)."""

    cls: type[nn.Module]

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`."""
        return sites.where(lambda s: isinstance(s.module, self.cls))


@dataclasses.dataclass(frozen=True)
class Under(Selector):
    """The sites strictly below a path."""

    path: str

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`.

        Raises:
            SelectionError: the path is not in the network.
        """
        return sites.below(sites[self.path].path)


@dataclasses.dataclass(frozen=True)
class Leaves(Selector):
    """Sites that call no other site below them."""

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`."""
        inner = {s.path[:i] for s in sites for i in range(len(s.path))}
        return sites.where(lambda s: s.path not in inner)


@dataclasses.dataclass(frozen=True)
class Exactly(Selector):
    """What another selector picks, which must be `count` sites."""

    where: Selector | str
    count: int

    def __call__(self, sites: Sites) -> Sites:
        """See `Selector`.

        Raises:
            SelectionError: it picks more or fewer.
        """
        return select(sites, self.where).assert_count_is(self.count)


@dataclasses.dataclass(frozen=True)
class _And(Selector):
    left: Selector
    right: Selector

    def __call__(self, sites: Sites) -> Sites:
        right = self.right(sites)
        return self.left(sites).where(lambda s: s.path in right)


@dataclasses.dataclass(frozen=True)
class _Or(Selector):
    left: Selector
    right: Selector

    def __call__(self, sites: Sites) -> Sites:
        left, right = self.left(sites), self.right(sites)
        return sites.where(lambda s: s.path in left or s.path in right)


@dataclasses.dataclass(frozen=True)
class _Not(Selector):
    inner: Selector

    def __call__(self, sites: Sites) -> Sites:
        inner = self.inner(sites)
        return sites.where(lambda s: s.path not in inner)


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return (
        bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
    )
