"""`nnopt operators`: operators that may stand where a convolution stands, sampled, explained and measured."""

import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnopt.cli.bars import Bars
from nnopt.errors import NestError, ResultFolderError, SearchError

if TYPE_CHECKING:
    import flax.linen as nn

    from nnopt.backends import Latency
    from nnopt.nests import Nest, Operator, Program
    from nnopt.nests.sample import Drawn

# Larger arrays are not what one layer has, and counting in them would take very long.
_MOST_ELEMENTS = 2**28
_MOST_WEIGHTS = 2**27
_REPEATS_UNTIL_EXHAUSTED = 200  # as `nnopt.nests.sample.distinct`

_NAMED = "grouped:4, depthwise, pointwise, spatial:2, sequence1:1,2, sequence2:16,2, sequence3:2 or sequence4:1,3"
_ABOUT_REUSE = """Reuse is how often an element is used each time that it is moved into a cache that holds what the loops \
from one inwards touch, with 4 bytes an element: x the input, k the kernel, y the output. FLOP/byte is for all that moves."""
_JSON = """'[{"step": "Group", "output": "co", "input": "ci", "groups": 4}]'"""


@dataclasses.dataclass(frozen=True)
class ConvOptions:
    """The convolution. Of window, strides and dilation, one number stands for all axes."""

    size: tuple[int, ...]
    """Of the image, a number for each of 1 to 3 axes: 32 32."""
    inputs: int
    """Channels of the image."""
    outputs: int
    """Channels of the result."""
    window: tuple[int, ...] = (3,)
    """Of the kernel."""
    strides: tuple[int, ...] = (1,)
    """Of the window."""
    padding: Literal["SAME", "VALID"] = "SAME"
    """Zeros around the image, so that the result has its size, or none."""
    dilation: tuple[int, ...] = (1,)
    """Of the window."""
    groups: int = 1
    """Of channels."""

    def arguments(self) -> dict[str, Any]:
        """Those of `nnopt.nests.convolution`, as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("size", "window", "strides", "dilation"):
            given = values[name]
            spread = len(given) == 1 and name != "size"
            values[name] = list(given * len(self.size) if spread else given)
        return values

    def operator(self) -> "Operator":
        """The convolution as a nest.

        Raises:
            NestError: the sizes do not fit each other, or are too large.
        """
        from nnopt.nests import convolution

        made = convolution(**self.arguments())
        _check_extent(made, "the convolution")
        return made

    def module(self, program: "Program | None" = None) -> "nn.Conv":
        """The convolution as a linen module, or what a program makes of it; without a bias."""
        from nnopt.layers import Conv
        from nnopt.nests.module import ProgramConv

        given = {k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments().items()}
        fields: dict[str, Any] = {
            "features": self.outputs,
            "kernel_size": given["window"],
            "strides": given["strides"],
            "padding": self.padding,
            "kernel_dilation": given["dilation"],
            "feature_group_count": self.groups,
            "use_bias": False,
        }
        return Conv(**fields) if program is None else ProgramConv(**fields, program=program)

    def __str__(self) -> str:
        """As the title of a table."""
        given = self.arguments()
        size, window, strides, dilation = (
            " x ".join(map(str, given[name])) for name in ("size", "window", "strides", "dilation")
        )
        text = f"{window} convolution of {size} x {self.inputs} to {self.outputs} channels"
        if set(given["strides"]) != {1}:
            text += f", strides {strides}"
        if set(given["dilation"]) != {1}:
            text += f", dilation {dilation}"
        if self.padding != "SAME":
            text += f", {self.padding} padding"
        return text + (f", {self.groups} groups" if self.groups > 1 else "")


@dataclasses.dataclass(frozen=True)
class SampleCommand:
    """Draw operators at random, from what transformations of the convolution make possible.

    No two compute the same. Weights and MACs (multiply-accumulates) are relative to the convolution's. FLOP/byte is the data reuse,
    as arithmetic intensity with a cache that holds everything. The last column is the number of convolutions it is run as.

    Example: nnopt operators sample --size 32 32 --inputs 64 --outputs 64

    Example: nnopt operators sample --size 32 32 --inputs 64 --outputs 64 --max-macs 0.25 --min-intensity 20 --out found.json
    """

    conv: ConvOptions
    count: int = 20
    """Operators to find."""
    moves: int = 3
    """Most transformations in a row that change the function; some take several steps."""
    seed: int = 0
    """Seed of everything random."""
    max_weights: float | None = None
    """Most weights, as a fraction of the convolution's; no limit by default."""
    max_macs: float | None = None
    """Most multiply-accumulates, as a fraction of the convolution's; no limit by default."""
    min_intensity: float | None = None
    """Least data reuse, in FLOP per byte; no limit by default."""
    draws: int = 20_000
    """Most draws; where filters let few pass, fewer operators are found."""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Where to write the programs, for --program of explain and --programs of measure."""

    def run(self) -> None:
        """Draws, prints and writes."""
        for name in ("max_weights", "max_macs", "min_intensity"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SearchError(f"--{name.replace('_', '-')} is {value}; give a number above 0")
        _at_least_one(self, "moves", "draws")
        if self.out is not None and (self.out.is_dir() or not self.out.parent.is_dir()):
            problem = "it is a folder" if self.out.is_dir() else f"{self.out.parent} is no folder"
            raise ResultFolderError(f"cannot write {self.out}: {problem}; give another --out")
        conv = self.conv.operator()
        whole = _facts(conv)
        filters: dict[str, Callable[[_Facts], bool]] = {}
        if (weights := self.max_weights) is not None:
            filters["--max-weights"] = lambda facts: facts.weights <= weights * whole.weights
        if (macs := self.max_macs) is not None:
            filters["--max-macs"] = lambda facts: facts.macs <= macs * whole.macs
        if (intensity := self.min_intensity) is not None:
            filters["--min-intensity"] = lambda facts: facts.intensity >= intensity
        console = Console()
        with Bars(console) as bars:
            found, rejected = _draw(
                conv, self.count, self.seed, self.moves, bars, filters, self.draws
            )
        table = _table(str(self.conv))
        table.add_column("#", justify="right")
        table.add_column("program", overflow="fold")
        for name in ("weights", "MACs", "FLOP/byte", "run as"):
            table.add_column(name, justify="right")
        table.add_row("", "the convolution", *_cells(whole, whole), style="bold")
        for number, (drawn, facts) in enumerate(found, 1):
            table.add_row(str(number), _short(drawn.program), *_cells(facts, whole))
        caption = f"1 is {whole.weights:,} weights or {whole.macs:,} MACs. {_told(found, rejected)}"
        if len(found) < self.count:
            caption += f" These are fewer than {self.count}: there are no more, or too few pass."
        caption += _about_parts(drawn.program for drawn, _ in found)
        table.caption = Text(caption, style="table.caption")
        if self.out is not None:
            # Before the table, so that a reader who has seen enough of it does not lose the file.
            _write(self.out, [_entry(self.conv, d.program, facts) for d, facts in found])
        console.print(table)
        if self.out is not None:
            console.print(f"Programs: {self.out}", soft_wrap=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class ExplainCommand:
    """Show what a program makes of the convolution: loop code before and after, what each step does, data reuse, weights.

    Loops are co, ci (output and input channels), od, oh, ow (of the output), kd, kh, kw (of the window), and g around them where
    there are groups.

    Example: nnopt operators explain --size 32 32 --inputs 64 --outputs 64 --named grouped:4

    Example: nnopt operators explain --size 32 32 --inputs 64 --outputs 64 --program
    '[{"step": "Bottleneck", "loop": "ci", "by": 2}, {"step": "Dilate", "loop": "kh", "by": 2}]'

    Example: nnopt operators explain --size 32 32 --inputs 64 --outputs 64 --program found.json --number 3
    """

    conv: ConvOptions
    program: Annotated[str | None, tyro.conf.arg(metavar="JSON|FILE")] = None
    """Steps as JSON text, or the path of a file with them, or of one that sample wrote."""
    number: int | None = None
    """Which operator of a file that sample wrote, from 1."""
    named: str | None = None
    """In place of --program: grouped:GROUPS, depthwise, pointwise, spatial:STEP, sequence1:GROUPS,GROUPS,...,
    sequence2:OUTPUTS,GROUPS, sequence3:SLABS, sequence4:WINDOW,WINDOW,... (the sequences are Turner et al.'s)."""

    def run(self) -> None:
        """Prints."""
        if (self.program is None) == (self.named is None):
            raise NestError("give either --program or --named")
        if self.number is not None and self.program is None:
            raise NestError("--number is for a file of --program; leave it out")
        conv = self.conv.operator()
        given = self.program
        program = _named(str(self.named), conv) if given is None else self._program(given)
        made = _applied(program, conv)
        whole, facts = _facts(conv), _facts(made)
        steps = _steps_table(program, conv)
        levels = list(_level_tables(made))
        shapes = _parameter_shapes(self.conv, program)
        console = Console()
        _code(console, str(self.conv), conv)
        _code(console, str(program), made)
        if program.steps:
            console.print(steps)
        totals = _table("In all")
        totals.add_column("")
        for name in ("convolution", "operator", "ratio"):
            totals.add_column(name, justify="right")
        for name, a, b in (
            ("weights", whole.weights, facts.weights),
            ("MACs of one image", whole.macs, facts.macs),
        ):
            totals.add_row(name, f"{a:,}", f"{b:,}", _fraction(b, a))
        totals.add_row(
            "FLOP/byte, all cached",
            _number(whole.intensity), _number(facts.intensity), f"{facts.intensity / whole.intensity:.3g}",
        )  # fmt: skip
        totals.add_row("nests", str(len(conv.nests)), str(len(made.nests)), "")
        totals.add_row("convolutions it is run as", str(whole.pieces), _pieces(facts), "")
        console.print(totals)
        for table in levels:
            console.print(table)
        console.print(_ABOUT_REUSE, highlight=False)
        console.print(
            "\nParameters of ProgramConv, an axis for each loop that the weights depend on:"
        )
        for name, shape in shapes.items():
            console.print(f"  {name} {list(shape)}", highlight=False, markup=False, soft_wrap=True)

    def _program(self, given: str) -> "Program":
        from nnopt.nests import Program

        text = given.strip()
        if text[:1] in ("[", "{"):
            if self.number is not None:
                raise NestError("--number is for a file of --program; leave it out")
            return Program.from_json(_json(text, "--program"))
        path = text.removeprefix("@")
        found = _programs(path, self.conv, f", or steps such as {_JSON}")
        if self.number is None and len(found) > 1:
            raise NestError(f"{path} has {len(found)} operators; give --number 1 to {len(found)}")
        number = 1 if self.number is None else self.number
        if not 1 <= number <= len(found):
            raise NestError(f"there is no operator {number} in {path}; it has {len(found)}")
        return found[number - 1]


@dataclasses.dataclass(frozen=True)
class MeasureCommand:
    """Time operators against the convolution, on this machine's XLA backend, weights inside the executable.

    They take turns, so that whatever slows the machine down slows all of them. Shown are the median time of
    a call, the distance of its quartiles (spread), and the speed-up over the convolution. Fewer MACs promise to be faster: "of
    promise" is 100% where an operator is as fast as that.

    Example: nnopt operators measure --size 32 32 --inputs 64 --outputs 64 --programs found.json

    Example: nnopt operators measure --size 32 32 --inputs 64 --outputs 64 --named grouped:4 sequence1:2,4 --batch 8
    """

    conv: ConvOptions
    programs: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Operators to measure, as sample writes them."""
    named: tuple[str, ...] = ()
    """Operators to measure, by name: see explain."""
    count: int = 8
    """Operators to draw, where neither --programs nor --named are given."""
    seed: int = 0
    """Seed of what is drawn; sample draws the same."""
    batch: int = 1
    """Images in a call."""
    repeats: int = 20
    """Rounds; each takes a sample of every operator."""

    def run(self) -> None:
        """Compiles, measures and prints."""
        _at_least_one(self, "batch", "repeats")
        conv = self.conv.operator()
        if self.batch * max(map(math.prod, (conv.input, conv.output))) > _MOST_ELEMENTS:
            raise SearchError(f"a batch of {self.batch} is too large; give a smaller --batch")
        console = Console()
        with Bars(console) as bars:
            programs = self._programs(conv, bars)
            facts = {name: _facts(_applied(p, conv)) for name, p in programs.items()}
            times, device = self._times(programs, bars)
        console.print(self._table(_facts(conv), programs, facts, times))
        console.print(_ran_on(device), highlight=False)

    def _programs(self, conv: "Operator", bars: Bars) -> "dict[str, Program]":
        if self.programs is not None and self.named:
            raise SearchError("give either --programs or --named")
        if self.programs is not None:
            found = _programs(self.programs, self.conv)
        elif self.named:
            return {name: _named(name, conv) for name in self.named}
        else:
            found = [d.program for d, _ in _draw(conv, self.count, self.seed, 3, bars)[0]]
        return {str(number): program for number, program in enumerate(found, 1)}

    def _times(
        self, programs: "dict[str, Program]", bars: Bars
    ) -> "tuple[dict[str, Latency], dict[str, Any]]":
        import jax
        import jax.numpy as jnp

        from nnopt.backends import compile_network, measure

        image = jax.ShapeDtypeStruct((self.batch, *self.conv.size, self.conv.inputs), jnp.float32)
        modules = {"": self.conv.module()} | {n: self.conv.module(p) for n, p in programs.items()}
        bars.phase("compiling", len(modules))
        compiled = {}
        for name, module in modules.items():
            variables = module.lazy_init(jax.random.key(0), image)
            compiled[name] = compile_network(module, variables, image)
            bars.advance()
        bars.phase("measuring", self.repeats)
        times = measure(compiled, repeats=self.repeats, on_progress=lambda *_: bars.advance())
        return times, compiled[""].device

    def _table(
        self,
        whole: "_Facts",
        programs: "dict[str, Program]",
        facts: "dict[str, _Facts]",
        times: "dict[str, Latency]",
    ) -> Table:
        from nnopt.backends import speedup

        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        table = _table(f"{self.conv}, {images} a call")
        table.add_column("#", justify="right")
        table.add_column("program", overflow="fold")
        for name in ("ms", "spread", "speed-up", "MACs", "of promise"):
            table.add_column(name, justify="right")
        base = times[""]
        table.add_row("", "the convolution", *_time_cells(base), "1.00x", "1", "", style="bold")
        slower = 0
        for name in sorted(programs, key=lambda n: times[n].median_ms):
            faster = speedup(base, times[name])
            ratio = facts[name].macs / whole.macs
            # A quarter of the rounds may well be slower by chance alone.
            slower += faster.high * ratio < 1
            table.add_row(
                *(("", name) if self.named else (name, _short(programs[name]))), *_time_cells(times[name]),
                f"{faster.median:.2f}x", f"{ratio:.3g}", f"{faster.median * ratio:.0%}",
            )  # fmt: skip
        caption = f"1 is {whole.macs:,} MACs an image. "
        caption += f"{slower} of {len(programs)} are slower than their MACs promise."
        if any(t.below_overhead for t in times.values()):
            caption += " ~ is less than 20 times what calling alone takes, so that it says little; give a larger --batch."
        caption += _about_parts(() if self.named else programs.values())
        table.caption = Text(caption, style="table.caption")
        return table


@dataclasses.dataclass(frozen=True)
class OperatorsCommand:
    """Sample, explain and measure operators that may stand where one convolution stands.

    A convolution is a loop nest. Transformations of it, such as grouping, bottlenecks, splits, dilation and shared weights, make
    other operators of the same shape: fewer weights, less work, or more reuse of data. A program is a list of them.
    """

    command: Annotated[
        Annotated[SampleCommand, tyro.conf.subcommand("sample")]
        | Annotated[ExplainCommand, tyro.conf.subcommand("explain")]
        | Annotated[MeasureCommand, tyro.conf.subcommand("measure")],
        tyro.conf.OmitSubcommandPrefixes,
    ]

    def run(self) -> None:
        """Runs what was chosen."""
        self.command.run()


# --- what is known about an operator ---


class _Facts(NamedTuple):
    """What an operator costs.

    Attributes:
        weights: number of them.
        macs: multiply-accumulates for one image.
        intensity: FLOP per byte if everything fits into the cache.
        pieces: convolutions that it is run as.
        gathered: nests in so many pieces that they are index arrays and `einsum` instead.
    """

    weights: int
    macs: int
    intensity: float
    pieces: int
    gathered: int


def _facts(operator: "Operator") -> _Facts:
    from nnopt.nests import canonical
    from nnopt.nests.lower import MOST_PIECES, pieces
    from nnopt.nests.reuse import distinct
    from nnopt.nests.roofline import arithmetic_intensity

    counts = [pieces(form) for form in canonical(operator).forms]
    return _Facts(
        # As `canonical.weights`, which takes seconds where parts share weights.
        distinct(operator, "k"),
        operator.domain_size,
        arithmetic_intensity(operator),
        sum(counts),
        sum(n > MOST_PIECES for n in counts),
    )


def _applied(program: "Program", conv: "Operator") -> "Operator":
    made = program(conv)
    _check_extent(made, "what the program makes")
    return made


def _check_extent(operator: "Operator", what: str) -> None:
    """Checks that arrays are of a size that can be counted.

    Raises:
        NestError: they are not.
    """
    arrays = max(math.prod(operator.input), math.prod(operator.output))
    weights = sum(
        math.prod(loop.extent for loop in nest.loops if nest.uses("k", loop.name))
        for nest in operator.nests
    )
    far = max(abs(b) for n in operator.nests for d in (*n.x, *n.k) for b in d.at.bounds)
    if arrays > _MOST_ELEMENTS or weights > _MOST_WEIGHTS or far > _MOST_ELEMENTS:
        raise NestError(
            f"{what} is too large: at most {_MOST_ELEMENTS:,} elements of input or output and {_MOST_WEIGHTS:,} weights"
        )


def _at_least_one(command: Any, *names: str) -> None:
    for name in names:
        if getattr(command, name) < 1:
            raise SearchError(f"--{name} is {getattr(command, name)}; give 1 or more")


# --- drawing ---

_AGAIN, _IN_PIECES = "drawn before", "in too many pieces to run fast"


def _draw(
    conv: "Operator",
    count: int,
    seed: int,
    moves: int,
    bars: Bars,
    filters: dict[str, Callable[[_Facts], bool]] | None = None,
    most: int = 20_000,
) -> "tuple[list[tuple[Drawn, _Facts]], Counter[str]]":
    """As `nnopt.nests.sample.distinct`, which does not say what it rejected, nor ends where a filter rejects all.

    Returns:
        What was found, and how many draws were rejected by what.

    Raises:
        SearchError: nothing was found.
    """
    import numpy as np

    from nnopt.nests import canonical
    from nnopt.nests.sample import draw

    if count < 1:
        raise SearchError(f"--count is {count}; give 1 or more")
    if not 0 <= seed < 2**32:
        raise SearchError(f"the seed is {seed}; give a whole number from 0 to {2**32 - 1}")
    rng = np.random.default_rng(seed)
    seen = {canonical(conv)}
    found: list[tuple[Drawn, _Facts]] = []
    rejected: Counter[str] = Counter(dict.fromkeys((_AGAIN, _IN_PIECES, *(filters or ())), 0))
    again = 0
    bars.phase("drawing", count)
    for _ in range(most):
        drawn = draw(conv, rng, moves)
        if drawn.canon in seen:
            rejected[_AGAIN] += 1
            again += 1
            if again == _REPEATS_UNTIL_EXHAUSTED:
                break
            continue
        again = 0
        seen.add(drawn.canon)
        facts = _facts(drawn.operator)
        why = next((n for n, passes in (filters or {}).items() if not passes(facts)), None)
        if facts.gathered:
            why = _IN_PIECES
        if why is not None:
            rejected[why] += 1
            continue
        found.append((drawn, facts))
        bars.advance()
        if len(found) == count:
            break
    if not found:
        raise SearchError(f"nothing was found: {_told(found, rejected)} Loosen what rejects most")
    return found, rejected


def _told(found: Sequence[Any], rejected: "Counter[str]") -> str:
    parts = [f"{n:,} {why if why[:2] != '--' else f'by {why}'}" for why, n in rejected.items()]
    draws = len(found) + rejected.total()
    return f"{draws:,} draw{'s' if draws > 1 else ''}, rejected {', '.join(parts)}."


# --- programs from the command line and from files ---


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise NestError(f"{where} is no JSON: {why}; a program is such as {_JSON}") from None


def _programs(path: str | pathlib.Path, conv: ConvOptions, otherwise: str = "") -> "list[Program]":
    """Those of a file that `sample` wrote, or the only one of a file of steps.

    Raises:
        NestError: the file cannot be read, or holds something else, or operators of another convolution.
    """
    from nnopt.nests import Program

    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no text file"
        raise NestError(
            f"cannot read {str(path)!r:.100}: {why}; give a file that nnopt operators sample --out wrote{otherwise}"
        ) from None
    value = _json(text, str(path))
    if not isinstance(value, list) or not value:
        raise NestError(f"{path} holds no programs; it is a list that is not empty")
    if not all(isinstance(entry, dict) and "program" in entry for entry in value):
        return [_located(str(path), Program.from_json, value)]
    found = []
    for number, entry in enumerate(value, 1):
        where = f"operator {number} of {path}"
        if entry.get("conv", conv.arguments()) != conv.arguments():
            raise NestError(f"{where} is for another convolution, {_options(entry['conv'])}")
        if not isinstance(entry["program"], list):
            raise NestError(f"{where}: a program is a list of steps, not {entry['program']!r:.60}")
        found.append(_located(where, Program.from_json, entry["program"]))
    return found


def _located(where: str, make: Callable[[Any], Any], value: Any) -> Any:
    try:
        return make(value)
    except NestError as error:
        raise NestError(f"{where}: {error}") from None


def _options(arguments: Any) -> str:
    """As they are typed."""
    if not isinstance(arguments, dict):
        return f"{arguments!r:.60}"
    words: list[str] = []
    for name, value in arguments.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return f"{' '.join(' '.join(words).split()):.200}"


def _entry(conv: ConvOptions, program: "Program", facts: _Facts) -> dict[str, Any]:
    return {
        "conv": conv.arguments(),
        "program": program.to_json(),
        "weights": facts.weights,
        "macs": facts.macs,
        "flop_per_byte": facts.intensity,
        "convolutions": facts.pieces,
    }


def _write(path: pathlib.Path, entries: Iterable[dict[str, Any]]) -> None:
    from nnopt.core.files import write_whole

    lines = ",\n".join(map(json.dumps, entries))
    try:
        write_whole(path, f"[\n{lines}\n]\n")
    except (OSError, ValueError) as e:  # ValueError: a path without a name, such as "/"
        reason = getattr(e, "strerror", None) or "it names no file"
        raise ResultFolderError(
            f"cannot write {path}: {reason}; give another path with --out"
        ) from e


def _named(text: str, conv: "Operator") -> "Program":
    """A program of `nnopt.nests.named` from `name:number,number`.

    Raises:
        NestError: there is no such name, or the numbers are not what it takes.
    """
    from nnopt.nests import named

    co, ci = (conv.nests[0].loop(name).extent for name in ("co", "ci"))
    window, rank = conv.kernel[:-2], len(conv.kernel) - 2
    text = "".join(text.split())
    name, _, rest = text.partition(":")

    def same_channels(*sizes: int) -> "Program":
        if co != ci:
            raise NestError(f"it needs as many output as input channels, not {co} and {ci}")
        return named.sequence4(co, window, sizes)

    # What is made, how many numbers it takes; None for any, but one.
    known: dict[str, tuple[Callable[..., Program], int | None]] = {
        "grouped": (named.grouped, 1),
        "depthwise": (named.depthwise, 0),
        "pointwise": (lambda: named.pointwise(window), 0),
        "spatial": (lambda by: named.spatial_bottleneck(by, rank), 1),
        "sequence1": (lambda *groups: named.sequence1(co, groups), None),
        "sequence2": (lambda unrolled, groups: named.sequence2(ci, unrolled, groups), 2),
        "sequence3": (named.sequence3, 1),
        "sequence4": (same_channels, None),
    }
    if name not in known:
        raise NestError(f"no operator is called {text!r:.60}; give {_NAMED}")
    make, count = known[name]
    try:
        numbers = [int(n) for n in rest.split(",")] if rest else []
    except ValueError:
        raise NestError(f"{text!r:.60}: whole numbers follow the colon; give {_NAMED}") from None
    if len(numbers) != count if count is not None else not numbers:
        takes = {None: "one number or more", 0: "no numbers", 1: "one number"}
        raise NestError(f"{text!r:.60}: {name} takes {takes.get(count, f'{count} numbers')}; give {_NAMED}")  # fmt: skip
    return _located(text, lambda given: make(*given), numbers)


# --- tables ---


def _table(title: str) -> Table:
    made = Table(title=Text(title, style="table.title"), title_justify="left")
    made.caption_justify = "left"
    return made


def _short(program: "Program") -> str:
    """Steps in few letters, with spaces between them alone, where lines are broken."""
    steps = []
    for step in program.steps:
        text = str(dataclasses.replace(step, part=None)).replace("'", "").replace(", ", ",")
        steps.append(text if step.part is None else f"{text}@{step.part}")
    return " ".join(steps) or "unchanged"


def _about_parts(programs: Iterable["Program"]) -> str:
    several = any(step.part is not None for program in programs for step in program.steps)
    return " @1 changes part 1 of what was split." if several else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _fraction(part: int, whole: int) -> str:
    exact = str(Fraction(part, whole))
    return exact if len(exact) <= 7 else f"{part / whole:.3g}"


def _pieces(facts: _Facts) -> str:
    return f"{facts.pieces:,}" if not facts.gathered else "index arrays"


def _cells(facts: _Facts, whole: _Facts) -> list[str]:
    return [
        f"{facts.weights / whole.weights:.3g}", f"{facts.macs / whole.macs:.3g}", _number(facts.intensity), _pieces(facts),
    ]  # fmt: skip


def _time_cells(time: "Latency") -> list[str]:
    mark = "~" if time.below_overhead else ""
    return [f"{mark}{time.median_ms:.3g}", f"{(time.high_ms - time.low_ms) / time.median_ms:.0%}"]


def _code(console: Console, title: str, operator: "Operator") -> None:
    console.print(Text(title, style="bold"), soft_wrap=True)
    # Brackets are indices here, no markup.
    console.print(Text(str(operator)), soft_wrap=True)
    console.print()


def _steps_table(program: "Program", operator: "Operator") -> Table:
    table = _table("What each step does")
    table.add_column("step", overflow="fold")
    table.add_column("function")
    for name in ("MACs", "of before", "weights", "nests"):
        table.add_column(name, justify="right")
    for step in program.steps:
        before, operator = operator, step(operator)
        _check_extent(operator, f"what {step} makes")
        table.add_row(
            str(step), "same" if step.keeps_function else "another", f"{operator.domain_size:,}",
            _fraction(operator.domain_size, before.domain_size), f"{_facts(operator).weights:,}", str(len(operator.nests)),
        )  # fmt: skip
    return table


def _level_tables(operator: "Operator") -> Iterable[Table]:
    """A table of data reuse for each nest; one for all that are alike."""
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for number, nest in enumerate(operator.nests):
        alike.setdefault(tuple(_level_rows(nest)), []).append(number)
    for rows, numbers in alike.items():
        title = "Data reuse"
        if len(operator.nests) > 1:
            title += f", part{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"
        table = _table(title)
        table.add_column("held from loop", overflow="fold")
        for name in ("cache", "reuse of x", "of k", "of y", "FLOP/byte"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        yield table


def _level_rows(nest: "Nest") -> Iterable[tuple[str, ...]]:
    from nnopt.nests.reuse import data_reuse
    from nnopt.nests.roofline import arithmetic_intensity

    found = data_reuse(nest)
    for level in range(len(found.loops) + 1):
        inner = nest.loops[level:]
        what = f"{inner[0].name} in {inner[0].extent}" if inner else "one iteration"
        held = 4 * found.footprint(level)
        yield (
            what, _bytes(held), *(_number(a.reuse(level)) for a in (found.x, found.k, found.y)),
            _number(arithmetic_intensity(nest, held)),
        )  # fmt: skip


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{_number(count / size)} {unit}"
    return f"{count} B"


def _parameter_shapes(conv: ConvOptions, program: "Program") -> dict[str, tuple[int, ...]]:
    import jax
    import jax.numpy as jnp

    image = jax.ShapeDtypeStruct((1, *conv.size, conv.inputs), jnp.float32)
    made = jax.eval_shape(conv.module(program).init, jax.random.key(0), image)
    return {name: leaf.shape for name, leaf in made["params"].items()}


def _ran_on(device: dict[str, Any]) -> str:
    text = f"{device['device_kind']} ({device['platform']}), {device['cores']} cores, JAX {device['jax']}"
    load = device["load_average"]
    if load is not None and load > device["cores"]:
        text += f"; load average {load:.1f}: the machine was busy"
    return text
