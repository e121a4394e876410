"""One convolution and programs of it, as they come from the command line and from files."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from nnopt.errors import NestError, ResultFolderError

if TYPE_CHECKING:
    import flax.linen as nn

    from nnopt.nests import Operator, Program
    from nnopt.reports.operators import Facts

_NAMED = "grouped:4, depthwise, pointwise, dilated, spatial:2, sequence1:1,2, sequence2:16,2, sequence3:2 or sequence4:1,3"
EXAMPLE = """'[{"step": "Group", "output": "co", "input": "ci", "groups": 4}]'"""


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
            NestError: the sizes do not fit each other.
        """
        from nnopt.nests import convolution

        return convolution(**self.arguments())

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


def parsed(text: str, where: str) -> Any:
    """JSON that came from `where`.

    Raises:
        NestError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise NestError(f"{where} is no JSON: {why}; a program is such as {EXAMPLE}") from None


def read(path: str | pathlib.Path, conv: ConvOptions, otherwise: str = "") -> "list[Program]":
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
    value = parsed(text, str(path))
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


def entry(conv: ConvOptions, program: "Program", costs: "Facts") -> dict[str, Any]:
    """What a file says of one program."""
    return {
        "conv": conv.arguments(),
        "program": program.to_json(),
        "weights": costs.weights,
        "macs": costs.macs,
        "flop_per_byte": costs.intensity,
        "convolutions": costs.pieces,
    }


def write(path: pathlib.Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes what `read` reads, an entry a line.

    Raises:
        ResultFolderError: there is no writing to it.
    """
    from nnopt.core.files import write_whole

    lines = ",\n".join(map(json.dumps, entries))
    try:
        write_whole(path, f"[\n{lines}\n]\n")
    except (OSError, ValueError) as e:  # ValueError: a path without a name, such as "/"
        reason = getattr(e, "strerror", None) or "it names no file"
        raise ResultFolderError(
            f"cannot write {path}: {reason}; give another path with --out"
        ) from e


def named_program(text: str, conv: "Operator") -> "Program":
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
        "dilated": (lambda: named.dilated(rank), 0),
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
