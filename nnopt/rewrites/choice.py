"""Block choices: what BlockSwap may put at a residual block (https://arxiv.org/abs/1906.04113, table 1 and appendix A).

With `in` and `out` channels, and `m = out // b` channels inside a bottleneck:

| paper    | genotype files                | operators | one operator                                                            |
|----------|-------------------------------|-----------|-------------------------------------------------------------------------|
| S        | Conv                          | two       | 3x3 `in -> out`                                                         |
| G(g)     | DConvA{g}                     | two       | 3x3 `in -> in` in g groups, norm, relu, 1x1 `in -> out`                 |
| G(N/x)   | DConvG{x}; DConv for x = 1    | two       | the same in `in // x` groups of x channels                              |
| B(b)     | ConvB{b}                      | one       | 1x1 `in -> m`, norm, relu, 3x3 `m -> m`, norm, relu, 1x1 `m -> out`     |
| BG(b,g)  | A{g}B{b}                      | one       | the same with the 3x3 in g groups                                       |
| BG(b,M/x)| G{x}B{b}; DConvB{b} for x = 1 | one       | the same in `m // x` groups of x channels                               |

In a block of two operators the second maps `out -> out`, so there `in` is `out`.
"""

import dataclasses
import re

import flax.linen as nn

from nnopt.errors import ChoiceError
from nnopt.layers import BottleneckOperator, DenseOperator, GroupedOperator


@dataclasses.dataclass(frozen=True)
class Groups:
    """How many groups a convolution has: a number, or channels divided by a group size.

    Attributes:
        count: number of groups; None if `size` says it.
        size: channels in a group; None if `count` says it.
    """

    count: int | None = None
    size: int | None = None

    def of(self, channels: int, what: str) -> int:
        """Number of groups of a convolution over this many channels.

        Raises:
            ChoiceError: the channels do not divide into such groups.
        """
        if self.count is not None:
            groups, fits = self.count, channels % self.count == 0
        else:
            assert self.size is not None
            groups, fits = channels // self.size, channels % self.size == 0
        if not fits or groups < 1:
            wanted = f"{self.count} groups" if self.count is not None else f"groups of {self.size}"
            raise ChoiceError(
                f"{what} needs {wanted}, which {channels} channels do not divide into; take another choice here"
            )
        return groups


@dataclasses.dataclass(frozen=True)
class Choice:
    """One kind of block.

    Attributes:
        bottleneck: divisor of the channels inside; None for blocks without a bottleneck.
        groups: groups of the 3x3 convolution; None for the standard block S.

    Example:
        >>> choice("BG(2,M/8)") == choice("G8B2")
        True
        >>> choice("DConvA4").name, choice("DConvA4").genotype_name
        ('G(4)', 'DConvA4')
    """

    bottleneck: int | None = None
    groups: Groups | None = None

    @property
    def name(self) -> str:
        """The paper's name, such as `BG(2,M/8)`."""
        if self.groups is None:
            return "S" if self.bottleneck is None else f"B({self.bottleneck})"
        letter = "N" if self.bottleneck is None else "M"
        g = self.groups
        inside = (
            str(g.count) if g.count is not None else letter if g.size == 1 else f"{letter}/{g.size}"
        )
        return f"G({inside})" if self.bottleneck is None else f"BG({self.bottleneck},{inside})"

    @property
    def genotype_name(self) -> str:
        """The name in genotype files, such as `G8B2`."""
        b, g = self.bottleneck, self.groups
        if g is None:
            return "Conv" if b is None else f"ConvB{b}"
        if g.size == 1:
            return "DConv" if b is None else f"DConvB{b}"
        kind = f"A{g.count}" if g.count is not None else f"G{g.size}"
        return f"DConv{kind}" if b is None else f"{kind}B{b}"

    @property
    def operators(self) -> int:
        """Operators in a block: two, or one with a bottleneck."""
        return 2 if self.bottleneck is None else 1

    def operator(self, inputs: int, features: int, stride: int = 1) -> nn.Module:
        """The operator as an unbound module.

        Args:
            inputs: channels that come in.
            features: channels that go out.
            stride: of its 3x3 convolution.

        Raises:
            ChoiceError: the channels do not divide as the choice needs.
        """
        if self.bottleneck is None:
            if self.groups is None:
                return DenseOperator(features, stride, parent=None)
            return GroupedOperator(features, self.groups.of(inputs, self.name), stride, parent=None)
        inner = features // self.bottleneck
        if inner < 1:
            raise ChoiceError(
                f"{self.name} needs at least {self.bottleneck} channels, the block has {features}; take another choice here"
            )
        groups = self.groups.of(inner, self.name) if self.groups is not None else 1
        return BottleneckOperator(features, inner, groups, stride, parent=None)

    def __str__(self) -> str:
        """The paper's name."""
        return self.name


def choice(name: str) -> Choice:
    """The choice with a name, of the paper or of genotype files; `N` and `M` both stand for the grouped channels.

    Raises:
        ChoiceError: no choice has this name.
    """
    text = name.replace(" ", "")
    for pattern, make in _NAMES:
        match = re.fullmatch(pattern, text)
        if match and all(int(v) > 0 for v in match.groups() if v):
            return make({k: int(v) for k, v in match.groupdict().items() if v})
    raise ChoiceError(
        f"unknown block choice {name!r}; expected a name like S, G(4), G(N/8), B(2), BG(2,4), BG(2,M/8) or DConvA4, A4B2"
    )


def _grouped(found: dict[str, int]) -> Choice:
    """`g` groups, or groups of `x`, or of one channel."""
    groups = Groups(count=found["g"]) if "g" in found else Groups(size=found.get("x", 1))
    return Choice(found.get("b"), groups)


_NAMES = (
    (r"S|Conv", lambda found: Choice()),
    (r"B\((?P<b>\d+)\)", lambda found: Choice(found["b"])),
    (r"ConvB(?P<b>\d+)", lambda found: Choice(found["b"])),
    (r"G\((?:(?P<g>\d+)|N(?:/(?P<x>\d+))?)\)", _grouped),
    (r"BG\((?P<b>\d+),(?:(?P<g>\d+)|[MN](?:/(?P<x>\d+))?)\)", _grouped),
    (r"DConv(?:A(?P<g>\d+)|G(?P<x>\d+))?", _grouped),
    (r"DConvB(?P<b>\d+)", _grouped),
    (r"(?:A(?P<g>\d+)|G(?P<x>\d+))B(?P<b>\d+)", _grouped),
)

S = Choice()
"""The standard block."""

_G = ("G(2)", "G(4)", "G(8)", "G(16)", "G(N/16)", "G(N/8)", "G(N/4)", "G(N/2)", "G(N)")
_BG2 = tuple(f"BG(2,{g})" for g in ("2", "4", "8", "16", "M/16", "M/8", "M/4", "M/2"))

PAPER_CHOICES: tuple[Choice, ...] = tuple(
    choice(n) for n in ("S", *_G, "B(2)", "B(4)", *_BG2, "BG(2,M)")
)
"""The 21 choices that the paper lists."""

CODE_CHOICES: tuple[Choice, ...] = tuple(
    choice(n) for n in ("S", *_G, "B(2)", "B(4)", *_BG2, "BG(4,M/8)", "BG(4,M/4)", "BG(4,M/2)")
)
"""The 23 choices that the released code offers, from which the published genotypes were drawn."""
