"""What every study's command line does around the study."""

import sys
from collections.abc import Sequence
from typing import Protocol

import tyro

from nnopt.errors import NnoptError


class Command(Protocol):
    """A dataclass of options with something to do."""

    def run(self) -> None:
        """Does it."""


def run(
    command: type[Command],
    name: str,
    about: str | None,
    args: Sequence[str] | None,
    interrupted: str = "nothing was written",
) -> None:
    """Reads options and runs a study. What a user can act on is one line and exit code 2, an interruption one line and 130.

    Args:
        command: dataclass of the options.
        name: of the study.
        about: its help, the docstring of its file.
        args: arguments; those of the process if None.
        interrupted: what an interruption leaves.
    """
    study = tyro.cli(command, prog=name, description=about, args=args)
    try:
        study.run()
    except NnoptError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
