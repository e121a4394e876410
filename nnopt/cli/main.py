"""The `nnopt` command."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from nnopt.cli.check import CheckCommand
from nnopt.cli.measure import MeasureCommand
from nnopt.cli.operators import OperatorsCommand
from nnopt.cli.prune import PruneCommand
from nnopt.cli.rewrite import RewriteCommand
from nnopt.cli.score import ScoreCommand
from nnopt.cli.search import SearchCommand
from nnopt.cli.show import ShowCommand
from nnopt.cli.table import TableCommand
from nnopt.errors import NnoptError

Command = (
    Annotated[SearchCommand, tyro.conf.subcommand("search")]
    | Annotated[ScoreCommand, tyro.conf.subcommand("score")]
    | Annotated[PruneCommand, tyro.conf.subcommand("prune")]
    | Annotated[RewriteCommand, tyro.conf.subcommand("rewrite")]
    | Annotated[ShowCommand, tyro.conf.subcommand("show")]
    | Annotated[MeasureCommand, tyro.conf.subcommand("measure")]
    | Annotated[CheckCommand, tyro.conf.subcommand("check")]
    | Annotated[TableCommand, tyro.conf.subcommand("table")]
    | Annotated[OperatorsCommand, tyro.conf.subcommand("operators")]
)

_DESCRIPTION = """Make neural networks efficient: rewrite Flax networks, score the results without training, measure them.

Start with `nnopt search --help`. Bad input is answered with one line and exit code 2."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: arguments; those of the process by default.
    """
    command = tyro.cli(
        Command,
        prog="nnopt",
        description=_DESCRIPTION,
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        command.run()
        sys.stdout.flush()
    except NnoptError as error:
        print(f"nnopt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print(
            "nnopt: interrupted; the same command takes up where this one stopped", file=sys.stderr
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
