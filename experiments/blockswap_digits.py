"""BlockSwap on the embedded data: 300 candidates of WRN-16-2 at 200,000 parameters, the best one trained.

    .venv/bin/python experiments/blockswap_digits.py

Duration: about 15 minutes on 2 cores (no accelerator); a killed run resumes.
Result: `results/blockswap_digits/report.html`; the picture of score against parameters is copied to
`experiments/blockswap_digits.png`, which the README shows.
"""

import pathlib
import shutil

from nnopt.cli.search import SearchCommand

HERE = pathlib.Path(__file__).parent


def main() -> None:
    out = HERE.parent / "results" / "blockswap_digits"
    SearchCommand(network="wrn-16-2", data="digits", budget="200K", samples=300, out=out).run()
    shutil.copy(out / "score.png", HERE / "blockswap_digits.png")


if __name__ == "__main__":
    main()
