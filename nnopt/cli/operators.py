"""`nnopt operators`: operators that may stand where a convolution stands, sampled, explained and measured."""

import dataclasses
import itertools
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from nnopt.cli import programs
from nnopt.cli.bars import Bars
from nnopt.errors import NestError, ResultFolderError, SearchError

if TYPE_CHECKING:
    from nnopt.backends import Latency
    from nnopt.nests import Operator, Program
    from nnopt.reports.operators import Facts

_MOST_REPEATED = 200  # draws in a row of what was drawn before, after which there is no more


@dataclasses.dataclass(frozen=True)
class SampleCommand:
    """Draw operators at random, from what transformations of the convolution make possible.

    No two compute the same. Weights and MACs (multiply-accumulates) are relative to the convolution's. FLOP/byte is the data reuse,
    as arithmetic intensity with a cache that holds everything. The last column is the number of convolutions it is run as.

    Example: nnopt operators sample --size 32 32 --inputs 64 --outputs 64

    Example: nnopt operators sample --size 32 32 --inputs 64 --outputs 64 --max-macs 0.25 --min-intensity 20 --out found.json
    """

    conv: programs.ConvOptions
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
        from nnopt.reports.operators import facts, sample_table

        conv = self.conv.operator()
        whole = facts(conv, "the convolution")
        filters: dict[str, Callable[[Facts], bool]] = {}
        if (weights := self.max_weights) is not None:
            filters["--max-weights"] = lambda costs: costs.weights <= weights * whole.weights
        if (macs := self.max_macs) is not None:
            filters["--max-macs"] = lambda costs: costs.macs <= macs * whole.macs
        if (intensity := self.min_intensity) is not None:
            filters["--min-intensity"] = lambda costs: costs.intensity >= intensity
        console = Console()
        with Bars(console) as bars:
            found, rejected = _draw(
                conv, self.count, self.seed, self.moves, bars, filters, self.draws
            )
        told = _told(found, rejected)
        if len(found) < self.count:
            told += f" These are fewer than {self.count}: there are no more, or too few pass."
        if self.out is not None:
            # Before the table, so that a reader who has seen enough of it does not lose the file.
            programs.write(self.out, [programs.entry(self.conv, p, costs) for p, costs in found])
        console.print(sample_table(str(self.conv), whole, found, told))
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

    conv: programs.ConvOptions
    program: Annotated[str | None, tyro.conf.arg(metavar="JSON|FILE")] = None
    """Steps as JSON text, or the path of a file with them, or of one that sample wrote."""
    number: int | None = None
    """Which operator of a file that sample wrote, from 1."""
    named: str | None = None
    """In place of --program: grouped:GROUPS, depthwise, pointwise, dilated, spatial:STEP, sequence1:GROUPS,GROUPS,...,
    sequence2:OUTPUTS,GROUPS, sequence3:SLABS, sequence4:WINDOW,WINDOW,... (the sequences are Turner et al.'s)."""

    def run(self) -> None:
        """Prints."""
        if (self.program is None) == (self.named is None):
            raise NestError("give either --program or --named")
        if self.number is not None and self.program is None:
            raise NestError("--number is for a file of --program; leave it out")
        from nnopt.reports.operators import (
            ABOUT_REUSE,
            facts,
            print_code,
            reuse_tables,
            steps_table,
            totals_table,
        )

        conv = self.conv.operator()
        facts(conv, "the convolution")
        given = self.program
        program = (
            programs.named_program(str(self.named), conv) if given is None else self._program(given)
        )
        made = program(conv)
        tables = [totals_table(conv, made), *reuse_tables(made)]
        if program.steps:
            tables.insert(0, steps_table(program, conv))
        shapes = _parameter_shapes(self.conv, program)
        console = Console()
        print_code(console, str(self.conv), conv)
        print_code(console, str(program), made)
        for table in tables:
            console.print(table)
        console.print(ABOUT_REUSE, highlight=False)
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
            return Program.from_json(programs.parsed(text, "--program"))
        path = text.removeprefix("@")
        found = programs.read(path, self.conv, f", or steps such as {programs.EXAMPLE}")
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

    conv: programs.ConvOptions
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
        from nnopt.reports.operators import MOST_ELEMENTS, facts, latency_table, ran_on

        conv = self.conv.operator()
        whole = facts(conv, "the convolution")
        if self.batch * max(map(math.prod, (conv.input, conv.output))) > MOST_ELEMENTS:
            raise SearchError(f"a batch of {self.batch} is too large; give a smaller --batch")
        console = Console()
        with Bars(console) as bars:
            chosen = self._programs(conv, bars)
            costs = {name: facts(program(conv)) for name, program in chosen.items()}
            times, device = self._times(chosen, bars)
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        rows = {name: (program, costs[name], times[name]) for name, program in chosen.items()}
        title = f"{self.conv}, {images} a call"
        console.print(latency_table(title, whole, rows, times[""], named=bool(self.named)))
        console.print(ran_on(device), highlight=False)

    def _programs(self, conv: "Operator", bars: Bars) -> "dict[str, Program]":
        if self.programs is not None and self.named:
            raise SearchError("give either --programs or --named")
        if self.programs is not None:
            found = programs.read(self.programs, self.conv)
        elif self.named:
            return {name: programs.named_program(name, conv) for name in self.named}
        else:
            found = [program for program, _ in _draw(conv, self.count, self.seed, 3, bars)[0]]
        return {str(number): program for number, program in enumerate(found, 1)}

    def _times(
        self, chosen: "dict[str, Program]", bars: Bars
    ) -> "tuple[dict[str, Latency], dict[str, Any]]":
        import jax
        import jax.numpy as jnp

        from nnopt.backends import compile_network, measure

        image = jax.ShapeDtypeStruct((self.batch, *self.conv.size, self.conv.inputs), jnp.float32)
        modules = {"": self.conv.module()} | {n: self.conv.module(p) for n, p in chosen.items()}
        bars.phase("compiling", len(modules))
        compiled = {}
        for name, module in modules.items():
            variables = module.lazy_init(jax.random.key(0), image)
            compiled[name] = compile_network(module, variables, image)
            bars.advance()
        bars.phase("measuring", self.repeats)
        times = measure(compiled, repeats=self.repeats, on_progress=lambda *_: bars.advance())
        return times, compiled[""].device


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


def _at_least_one(command: Any, *names: str) -> None:
    for name in names:
        if getattr(command, name) < 1:
            raise SearchError(f"--{name} is {getattr(command, name)}; give 1 or more")


_AGAIN, _IN_PIECES = "drawn before", "in too many pieces to run fast"


def _draw(
    conv: "Operator",
    count: int,
    seed: int,
    moves: int,
    bars: Bars,
    filters: "dict[str, Callable[[Facts], bool]] | None" = None,
    most: int = 20_000,
) -> "tuple[list[tuple[Program, Facts]], Counter[str]]":
    """As `nnopt.nests.sample.distinct`, which does not say what it rejected.

    Returns:
        What was found, and how many draws were rejected by what.

    Raises:
        SearchError: nothing was found.
    """
    import numpy as np

    from nnopt.nests.sample import draws
    from nnopt.reports.operators import facts

    if count < 1:
        raise SearchError(f"--count is {count}; give 1 or more")
    if not 0 <= seed < 2**32:
        raise SearchError(f"the seed is {seed}; give a whole number from 0 to {2**32 - 1}")
    found: list[tuple[Program, Facts]] = []
    rejected: Counter[str] = Counter(dict.fromkeys((_AGAIN, _IN_PIECES, *(filters or ())), 0))
    repeated = 0
    bars.phase("drawing", count)
    for drawn in itertools.islice(draws(conv, np.random.default_rng(seed), moves), most):
        if drawn is None:
            rejected[_AGAIN] += 1
            repeated += 1
            if repeated == _MOST_REPEATED:
                break
            continue
        repeated = 0
        costs = facts(drawn.operator)
        why = next((n for n, passes in (filters or {}).items() if not passes(costs)), None)
        if costs.gathered:
            why = _IN_PIECES
        if why is not None:
            rejected[why] += 1
            continue
        found.append((drawn.program, costs))
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


def _parameter_shapes(conv: programs.ConvOptions, program: "Program") -> dict[str, tuple[int, ...]]:
    import jax
    import jax.numpy as jnp

    image = jax.ShapeDtypeStruct((1, *conv.size, conv.inputs), jnp.float32)
    made = jax.eval_shape(conv.module(program).init, jax.random.key(0), image)
    return {name: leaf.shape for name, leaf in made["params"].items()}
