"""`nnopt rewrite`: replace blocks of a network and write it down."""

import dataclasses
import pathlib

from nnopt.cli.networks import example_for, load_network


@dataclasses.dataclass(frozen=True)
class RewriteCommand:
    """Replace residual blocks of a network by cheaper ones, print what changed, and write a network record.

    Example: nnopt rewrite --network wrn-16-2 --where "stage3*" --choice "G(4)" --out slim.json
    """

    network: str
    """Name of a network or path of a network record."""
    where: str | None = None
    """Which blocks: a path, or a pattern such as "stage3*". Every residual block by default."""
    choice: str | None = None
    """What to put there: S, G(4), G(N/8), B(2), BG(2,4), ..."""
    genotype: pathlib.Path | None = None
    """In place of --where and --choice: a genotype file with one choice for each residual block."""
    out: pathlib.Path | None = None
    """Where to write the record; nowhere by default."""
    size: int = 32
    """Height and width of the images it is rewritten for."""

    def run(self) -> None:
        """Rewrites, prints the difference, writes the record."""
        from nnopt.core import ResidualBlocks, diff, rewrite, save_record
        from nnopt.errors import ChoiceError, ResultFolderError
        from nnopt.rewrites import ReplaceBlock, choice, load_genotype

        if (self.choice is None) == (self.genotype is None) or (self.genotype and self.where):
            raise ChoiceError("give either --choice (and --where), or --genotype alone")
        net = load_network(self.network)
        example = example_for(net, self.size)
        rule = (
            load_genotype(self.genotype)
            if self.genotype is not None
            else ReplaceBlock(self.where or ResidualBlocks(), choice(str(self.choice)))
        )
        made = rewrite(net, rule, example=example)
        print(diff(net, made, example))
        if self.out is not None:
            try:
                save_record(made, self.out)
            except (OSError, ValueError) as e:  # ValueError: a path without a name, such as "/"
                reason = getattr(e, "strerror", None) or "it names no file"
                raise ResultFolderError(
                    f"cannot write {self.out}: {reason}; give another path with --out"
                ) from e
            print(f"Record: {self.out}")
