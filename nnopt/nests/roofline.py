"""What a cache makes of a loop nest: bytes moved, arithmetic intensity, and the time on a machine by the roofline model.

Loops are run in the order in which a nest has them; nests one after another, the second finding nothing of the first in the cache.
Source: Williams, Waterman and Patterson, Roofline: An Insightful Visual Performance Model (CACM 2009).
"""

import dataclasses
import math
from collections import Counter, defaultdict

from nnopt.errors import NestError
from nnopt.nests.nest import Nest, Operator
from nnopt.nests.reuse import ARRAYS, NestReuse, data_reuse, distinct

COMPUTE = "compute"
"""The bound of what no memory bounds."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """One array through a cache, in elements.

    Attributes:
        accesses: reads within its bounds; for the output, additions.
        fetched: moved into the cache.
        written: moved out of it.
    """

    accesses: int
    fetched: int
    written: int

    @property
    def reuse(self) -> float:
        """Accesses to an element each time that it is in the cache; 1 for an array that is never read."""
        return self.accesses / max(self.fetched, self.written) if self.accesses else 1.0

    def plus(self, other: "Flow") -> "Flow":
        """One after another."""
        return Flow(
            self.accesses + other.accesses,
            self.fetched + other.fetched,
            self.written + other.written,
        )


@dataclasses.dataclass(frozen=True)
class CacheUse:
    """A nest, or the nests of an operator, with a cache between them and the memory.

    Attributes:
        levels: for each nest, the outermost level that the cache holds.
        macs: multiply-accumulates, those with padding counted.
        element_bytes: bytes of an element.
        compulsory: elements touched at all, each once: what an endless cache moves.
        x: input.
        k: kernel.
        y: output. A block is written as often as it is left, and fetched whenever it is come to again.
    """

    levels: tuple[int, ...]
    macs: int
    element_bytes: int
    compulsory: int
    x: Flow
    k: Flow
    y: Flow

    @property
    def bytes_moved(self) -> int:
        """Between cache and memory, in both directions."""
        return self.element_bytes * sum(f.fetched + f.written for f in (self.x, self.k, self.y))

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOP per byte: `2 * macs / bytes_moved`."""
        return 2 * self.macs / self.bytes_moved

    @property
    def compulsory_intensity(self) -> float:
        """The most that any order of the loops and any cache can reach, FLOP per byte."""
        return 2 * self.macs / (self.element_bytes * self.compulsory)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A memory, and the cache between it and the cores.

    Attributes:
        name: as a bound is called.
        bandwidth: bytes per second.
        cache_bytes: size of the cache.
    """

    name: str
    bandwidth: float
    cache_bytes: int

    def __post_init__(self) -> None:
        """Checks the values."""
        _positive(f"bandwidth of {self.name}", self.bandwidth)
        _positive(f"cache_bytes of {self.name}", self.cache_bytes)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What bounds a computation on a machine. It computes and moves data at the same time.

    Attributes:
        name: for people.
        peak_flops: floating-point operations per second, two for a multiply-accumulate.
        memories: the farthest first, so that caches get smaller: `DRAM` with the last cache, then that cache with the next one.
    """

    name: str
    peak_flops: float
    memories: tuple[Memory, ...]

    def __post_init__(self) -> None:
        """Checks the values."""
        _positive(f"peak_flops of {self.name}", self.peak_flops)
        names = [m.name for m in self.memories]
        if not names or len({*names, COMPUTE}) <= len(names):
            raise NestError(
                f"memories of {self.name} are {', '.join(names) or 'none'}; give one or more, of different names, none {COMPUTE!r}"
            )
        sizes = [m.cache_bytes for m in self.memories]
        if sizes != sorted(set(sizes), reverse=True):
            raise NestError(
                f"caches of {self.name} have {', '.join(map(str, sizes))} bytes; begin with the largest"
            )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of an operator on a machine if each of its caches, taken alone, is filled as `under_cache` says.

    Whatever else costs time is left out, so it is too short; traffic is an upper bound, so it is too long where windows overlap.

    Attributes:
        flops: floating-point operations, two for a multiply-accumulate.
        seconds: for one image.
        bound: `compute` or the name of a memory: what most of the time is spent waiting for.
        intensities: FLOP per byte from each memory, the farthest first.
    """

    flops: int
    seconds: float
    bound: str
    intensities: tuple[float, ...]

    @property
    def attainable_flops(self) -> float:
        """FLOP per second; for one nest `min(peak_flops, bandwidth * intensity)`, over all memories."""
        return self.flops / self.seconds


def under_cache(operator: Operator | Nest, cache_bytes: int, element_bytes: int = 4) -> CacheUse:
    """What moves between a cache and the memory behind it.

    The cache holds, for each nest, the outermost level whose footprints of the three arrays fit in it together; it is fully
    associative and filled by a program that knows what comes (an upper bound of the traffic all the same: see `ArrayReuse`).

    Args:
        operator: or one nest.
        cache_bytes: size of the cache.
        element_bytes: of an element of each array.

    Raises:
        NestError: the cache does not hold one iteration, or a size is not positive.

    Example:
        >>> from nnopt.nests import convolution
        >>> use = under_cache(convolution((32, 32), 64, 64, (3, 3)), 2**15)
        >>> use.levels  # one input and one output channel
        (2,)
        >>> use.x.reuse, use.k.reuse, use.y.reuse
        (8.62890625, 1024.0, 576.0)
        >>> round(use.intensity, 2), round(use.compulsory_intensity, 2)
        (4.39, 112.39)
    """
    nests = (operator,) if isinstance(operator, Nest) else operator.nests
    parts = [_held(data_reuse(nest), cache_bytes, element_bytes) for nest in nests]
    if len(parts) == 1:
        return parts[0]
    assert isinstance(operator, Operator)
    return _together(parts, sum(distinct(operator, array) for array in ARRAYS))


def arithmetic_intensity(
    operator: Operator | Nest, cache_bytes: int | None = None, element_bytes: int = 4
) -> float:
    """FLOP per byte moved, to compare what may stand at one site of a network: more is better.

    It costs a millisecond and no device, so it can reject before anything is scored: such as all with less than the operator has
    that they would replace. It tells nothing of the work itself; multiply-accumulates do.

    Args:
        operator: or one nest.
        cache_bytes: size of the cache, as for `under_cache`; by default everything fits, and the order of loops does not matter.
        element_bytes: of an element of each array.

    Raises:
        NestError: as for `under_cache`.

    Example:
        >>> from nnopt.nests import Depthwise, convolution
        >>> full = convolution((32, 32), 64, 64, (3, 3))
        >>> [round(arithmetic_intensity(o), 2) for o in (full, Depthwise("co", "ci")(full))]
        [112.39, 2.24]
    """
    if cache_bytes is not None:
        return under_cache(operator, cache_bytes, element_bytes).intensity
    _positive("element_bytes", element_bytes)
    if isinstance(operator, Operator):
        touched = sum(distinct(operator, array) for array in ARRAYS)
    else:
        touched = data_reuse(operator).footprint(0)
    return 2 * operator.domain_size / (element_bytes * touched)


def roofline(operator: Operator | Nest, machine: Machine, element_bytes: int = 4) -> Roofline:
    """The time of an operator on a machine by the roofline model.

    Each nest takes `max(flops / peak_flops, bytes / bandwidth of each memory)`, and nests are run one after another.

    Args:
        operator: or one nest.
        machine: its peak and bandwidths.
        element_bytes: of an element of each array.

    Raises:
        NestError: as for `under_cache`.

    Example:
        >>> from nnopt.nests import convolution
        >>> machine = Machine("example", 1e11, (Memory("DRAM", 1e10, 2**20), Memory("L2", 4e10, 2**15)))
        >>> found = roofline(convolution((32, 32), 64, 64, (1, 1)), machine)
        >>> found.bound, round(found.seconds * 1e6), found.intensities
        ('L2', 426, (15.51..., 0.49...))
    """
    nests = (operator,) if isinstance(operator, Nest) else operator.nests
    flops = 0
    seconds: defaultdict[str, float] = defaultdict(float)  # by what bounds them
    moved: Counter[str] = Counter()
    for nest in nests:
        reuse = data_reuse(nest)
        times = {COMPUTE: 2 * reuse.macs / machine.peak_flops}
        for memory in machine.memories:
            use = _held(reuse, memory.cache_bytes, element_bytes)
            times[memory.name] = use.bytes_moved / memory.bandwidth
            moved[memory.name] += use.bytes_moved
        bound = max(times, key=times.__getitem__)
        flops += 2 * reuse.macs
        seconds[bound] += times[bound]
    return Roofline(
        flops,
        sum(seconds.values()),
        max(seconds, key=seconds.__getitem__),
        tuple(flops / moved[m.name] for m in machine.memories),
    )


def _held(reuse: NestReuse, cache_bytes: int, element_bytes: int) -> CacheUse:
    _positive("cache_bytes", cache_bytes)
    _positive("element_bytes", element_bytes)
    for level in range(len(reuse.loops) + 1):
        if reuse.footprint(level) * element_bytes <= cache_bytes:
            break
    else:
        raise NestError(
            f"{cache_bytes} bytes of cache do not hold one iteration: {reuse.footprint(level)} elements of {element_bytes} bytes"
        )
    x, k = (Flow(a.accesses, a.stationary[level], 0) for a in (reuse.x, reuse.k))
    left, first = reuse.y.stationary[level], reuse.y.footprints[0]
    y = Flow(reuse.y.accesses, left - first, left)
    return CacheUse((level,), reuse.macs, element_bytes, reuse.footprint(0), x, k, y)


def _together(parts: list[CacheUse], compulsory: int) -> CacheUse:
    total = parts[0]
    for part in parts[1:]:
        total = dataclasses.replace(
            total,
            levels=total.levels + part.levels,
            macs=total.macs + part.macs,
            x=total.x.plus(part.x),
            k=total.k.plus(part.k),
            y=total.y.plus(part.y),
        )
    return dataclasses.replace(total, compulsory=compulsory)


def _positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise NestError(f"{what} is {value}; it is a number above 0")
