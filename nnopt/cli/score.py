"""`nnopt score`: networks ranked by training-free scores, and how sure the ranking is."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from nnopt.cli.bars import Bars
from nnopt.search.budget import parse_budget

if TYPE_CHECKING:
    from nnopt.data import Augmentation
    from nnopt.scores import Score
    from nnopt.search.ranking import Setting

_WANT_IMAGES = ("naswot", "swap", "jacob-cov", "epe-nas")
_MANY_IMAGES = 64
_OF_A_SAMPLE = (
    "network", "budget", "samples", "tolerance", "choices", "workers", "fidelity", "reference_batch", "reference_seeds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScoreCommand:
    """Rank networks by training-free scores, and say how sure the ranking is.

    Give network records, which are ranked by any scores; or --network and --budget, for a sample of a block space ranked by Fisher
    potential. Every candidate is scored with several seeds, each of fresh weights and a fresh minibatch, the same for all. Several
    seeds of a small batch rank better than one of a large batch, and cost less: weights disagree more than images do.

    Example: nnopt score a.json b.json --data cifar10 --scores fisher snip synflow

    Example: nnopt score --network wrn-40-2 --budget 400K --samples 96 --data cifar10
    """

    records: Annotated[
        tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECORD ...")
    ] = ()
    """Network records to rank, two or more; none to rank a sample of a block space."""
    scores: tuple[str, ...] = ("fisher",)
    """For records: fisher, fisher-log-sum, fisher-channel-mean, layer-fisher, snip, grasp, plain, grad-norm, synflow, zico, zen,
    naswot, swap, jacob-cov, epe-nas, meco, ntk, l2-norm, parameters, macs."""
    data: str = "digits"
    """Data set: digits (embedded), cifar10 or cifar100."""
    data_dir: str | None = None
    """Folder of the data set's files; NNOPT_DATA by default."""
    batch: int = 4
    """Images in a minibatch; scores compare only at equal batch. Those that compare images with each other want more: give 64 for
    naswot, swap, jacob-cov, epe-nas."""
    seeds: int = 2
    """Draws of weights and minibatch to average over. With one, nothing is known about how sure the ranking is."""
    seed: int = 0
    """Seed of everything random."""
    network: str | None = None
    """Base network of the space, such as wrn-40-2, wrn-16-1, resnet-18; an unknown name lists them all."""
    budget: str | None = None
    """Parameters of the whole network: 250000, 400K or 1.6M."""
    samples: int = 96
    """Candidates to draw from the space; what is drawn again is not scored again."""
    tolerance: float = 0.025
    """How far a candidate may be from the budget, as a fraction of it."""
    choices: Literal["code", "paper"] = "code"
    """Block choices: the 23 of the released BlockSwap code, or the 21 of the paper."""
    workers: int | None = None
    """Processes that score side by side, which changes nothing but rounding; by default one for each core if that is worth it."""
    fidelity: bool = False
    """Also tell how well this batch and these seeds rank: hold the sample against an expensive reference."""
    reference_batch: int = 128
    """Images in a minibatch of the reference."""
    reference_seeds: int = 4
    """Seeds of the reference, all others than those of the ranking."""
    top: int = 20
    """Candidates to show."""
    out: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE.csv")] = None
    """Where to write everything as CSV, the best first. Of a sample, `nnopt rewrite --genotype FILE.csv` makes the best."""

    def run(self) -> None:
        """Scores, ranks, prints and writes."""
        # Imported here so that --help and bad flags answer at once.
        from nnopt.errors import ResultFolderError, ScoreError, SearchError
        from nnopt.reports.ranking import write_csv
        from nnopt.search.ranking import Setting

        if self.top < 1:
            raise ScoreError(f"the best {self.top} are none; give --top 1 or more")
        if not 0 <= self.seed < 2**32:
            raise SearchError(f"the seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        if self.out is not None and (self.out.is_dir() or not self.out.parent.is_dir()):
            problem = "it is a folder" if self.out.is_dir() else f"{self.out.parent} is no folder"
            raise ResultFolderError(f"cannot write {self.out}: {problem}; give another --out")
        setting = Setting.of(self.batch, self.seeds)
        console = Console()
        ranked = self._rank_records if self.records else self._rank_sample
        rows = ranked(console, setting)
        if self.out is not None:
            write_csv(self.out, rows)
            console.print(f"Everything: {self.out}", soft_wrap=True)

    def _rank_records(self, console: Console, setting: "Setting") -> list[dict[str, Any]]:
        from nnopt.core import load_record
        from nnopt.data import load
        from nnopt.errors import ScoreError
        from nnopt.reports.ranking import csv_rows, ranking_table
        from nnopt.scores.cache import keep_compiled_programs
        from nnopt.search.ranking import rank
        from nnopt.search.scoring import score_networks

        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        idle = [name for name in _OF_A_SAMPLE if getattr(self, name) != defaults[name]]
        if idle:
            option = "--" + idle[0].replace("_", "-")
            raise ScoreError(
                f"{option} is for a sample of a block space; leave it out, or the network records"
            )
        if not self.scores:
            raise ScoreError("there is nothing to rank by; give --scores, such as fisher")
        known = _scores()
        unknown = next((name for name in self.scores if name not in known), None)
        if unknown is not None:
            raise ScoreError(
                f"no score is called {unknown!r}; the known ones are {', '.join(known)}"
            )
        paths = list(dict.fromkeys(map(str, self.records)))
        if len(paths) < 2:
            raise ScoreError(
                "one network has nothing to be ranked against; give two or more different records"
            )
        nets = {path: load_record(path) for path in paths}
        dataset = load(self.data, self.data_dir)
        keep_compiled_programs()
        with Bars(console) as bars:
            found, parameters = score_networks(
                nets,
                [known[name][0] for name in self.scores],
                dataset,
                setting,
                seed=self.seed,
                augmentation=_augmentation(dataset.name),
                watcher=bars,
            )
        rows = []
        for name in dict.fromkeys(self.scores):
            score, geometric = known[name]
            ranking = rank(found[score].scores, geometric=geometric, seed=self.seed)
            title = f"{len(paths)} networks by {name}, {dataset.name}, {setting}"
            console.print(ranking_table(ranking, title, "network", paths, parameters, self.top))
            if name in _WANT_IMAGES and self.batch < _MANY_IMAGES:
                note = f"{name} compares images with each other: {self.batch} are few, give --batch {_MANY_IMAGES}"
                console.print(note, highlight=False)
            cells = [{"network": path} for path in paths]
            rows += csv_rows(name, ranking, found[score], parameters, cells)
        return rows

    def _rank_sample(self, console: Console, setting: "Setting") -> list[dict[str, Any]]:
        from nnopt.data import canonical_name
        from nnopt.errors import ScoreError
        from nnopt.reports.ranking import csv_rows, fidelity_table, ranking_table
        from nnopt.search.blockswap import BlockSwap
        from nnopt.search.ranking import check_comparison, compare, rank
        from nnopt.search.run import WORTH_PROCESSES
        from nnopt.search.scoring import SampleScoring, distinct
        from nnopt.search.workers import default_workers
        from nnopt.training import QUICK

        if self.network is None or self.budget is None:
            raise ScoreError(
                "there is nothing to rank; give network records, or --network and --budget for a sample of a space"
            )
        if self.scores != ("fisher",):
            raise ScoreError(
                "a sample of a space is ranked by Fisher potential alone, because only that runs in the engine that scores "
                "candidates without compiling each; leave --scores out, or give network records"
            )
        if self.samples < 2:
            raise ScoreError(f"{self.samples} samples make no ranking; give --samples 2 or more")
        data = canonical_name(self.data)
        spec = BlockSwap(
            network=self.network,
            data=data,
            budget=parse_budget(self.budget),
            tolerance=self.tolerance,
            samples=self.samples,
            seed=self.seed,
            choices=self.choices,
            recipe=dataclasses.replace(QUICK, augmentation=_augmentation(data)),
        )
        job = SampleScoring(spec, self.data_dir, setting, ())
        jobs = [job]
        if self.fidelity:
            reference = type(setting).of(
                self.reference_batch, self.reference_seeds, first=self.seeds
            )
            jobs.append(dataclasses.replace(job, setting=reference))
        # All of them first: what is refused is refused before the work.
        problem, *_ = [job.problem() for job in jobs]
        indices = distinct(problem)
        if len(indices) < 2:
            raise ScoreError(
                f"all {self.samples} candidates drawn are the same; give more --samples, or a wider --tolerance"
            )
        if self.fidelity:
            check_comparison(setting, jobs[1].setting, len(indices))
        workers = self.workers
        if workers is None:
            workers = default_workers() if len(indices) >= WORTH_PROCESSES else 1
        with Bars(console) as bars:
            found = [dataclasses.replace(j, indices=indices).run(bars, workers) for j in jobs]
        cheap = found[0]
        ranking = rank(cheap.scores, geometric=True, seed=self.seed)
        parameters = [problem.space.total(problem.draw(i)) for i in indices]
        title = f"{len(indices)} of {self.network} at {self.budget} by Fisher potential, {data}, {setting}"
        names = [str(i) for i in indices]
        console.print(ranking_table(ranking, title, "candidate", names, parameters, self.top))
        again = self.samples - len(indices)
        if again:
            console.print(f"{again} of {self.samples} were drawn before and are not listed again.")
        cells = []
        for i in indices:
            genotype = [choice.genotype_name for choice in problem.choices(i)]
            cells.append({"candidate": i, "convs": str(genotype)})
        rows = csv_rows("fisher", ranking, cheap, parameters, cells)
        if self.fidelity:
            console.print(fidelity_table(compare(*found, seed=self.seed), len(indices), workers))
            seeds = found[1].setting.seeds
            for row, by_seed in zip(rows, found[1].scores[ranking.order], strict=True):
                row |= {f"reference_{s}": v for s, v in zip(seeds, by_seed, strict=True)}
        return rows


def _augmentation(data: str) -> "Augmentation":
    """That of `nnopt search`, so that both score the same images."""
    from nnopt.training import BLOCKSWAP, QUICK

    return (QUICK if data == "digits" else BLOCKSWAP).augmentation


def _scores() -> "dict[str, tuple[Score, bool]]":
    """Name -> score, and whether it is positive and differs by factors, so that logarithms are averaged."""
    from nnopt import scores as s

    return {
        "fisher": (s.Fisher(), True),
        "fisher-log-sum": (s.Fisher(aggregation=s.LogSum()), False),
        "fisher-channel-mean": (s.Fisher(aggregation=s.ChannelMean()), True),
        "layer-fisher": (s.LayerFisher(), True),
        "snip": (s.Snip(), True),
        "grasp": (s.Grasp(), False),
        "plain": (s.Plain(), False),
        "grad-norm": (s.GradNorm(), True),
        "synflow": (s.SynFlow(log=True), False),  # the sum itself leaves the range of a float
        "zico": (s.Zico(), False),
        "zen": (s.Zen(), False),
        "naswot": (s.Naswot(), False),
        "swap": (s.Swap(), False),
        "jacob-cov": (s.JacobCov(), False),
        "epe-nas": (s.EpeNas(), False),
        "meco": (s.MeCo(), False),
        "ntk": (s.NtkCondition(), False),
        "l2-norm": (s.L2Norm(), True),
        "parameters": (s.Parameters(), False),
        "macs": (s.Macs(), False),
    }
