"""BlockSwap: draw candidates inside a parameter budget, score each by Fisher potential, keep the best.

Turner, Crowley, O'Boyle, Storkey, Gray (https://arxiv.org/abs/1906.04113), algorithm 1. What is decided here and was left open or
done otherwise in the released code: candidates are drawn uniformly from those inside the budget, without rejection. All are scored
on the *same* few augmented minibatches, each with weights of its own that are the same for the same unit at the
same position. Two small minibatches rank better than one large one: the weights disagree more than the images do.
"""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.core import Example, sites
from nnopt.core.example import rngs
from nnopt.core.rewrite import rewrite_traced
from nnopt.data import Dataset, load, minibatch
from nnopt.errors import BudgetError, ChoiceError, SearchError, SelectionError, UnknownNetworkError
from nnopt.networks import named
from nnopt.rewrites import CODE_CHOICES, PAPER_CHOICES, Choice
from nnopt.rewrites.block import block_for
from nnopt.scores.fisher_engine import FisherEngine
from nnopt.scores.pace import Pace
from nnopt.search.latency_limit import LatencyLimit, LimitedSampler
from nnopt.search.parts import space_parts
from nnopt.search.sampler import BudgetSampler
from nnopt.search.space import BlockSpace, block_space
from nnopt.search.store import ScoredCandidate
from nnopt.search.workers import OnProgress, map_in_processes
from nnopt.training import QUICK, Recipe
from nnopt.typing import Path

_STREAMS = ("weights", "minibatch", "augmentation", "training", "shuffling")


@dataclasses.dataclass(frozen=True)
class BlockSwap:
    """All that determines a BlockSwap search.

    Attributes:
        network: name of the base network, see `nnopt.networks.named`.
        data: name of the data set, see `nnopt.data.load`.
        budget: parameters of the whole network.
        tolerance: how far a candidate may be from the budget, as a fraction of it.
        samples: candidates to score.
        seed: of everything random.
        choices: `code`, the 23 block choices of the released code, or `paper`, the 21 of the paper.
        score_batch: images in a minibatch that scores.
        score_seeds: minibatches, each with other weights; a candidate's score is the geometric mean over them.
        validation: test on training images that are held out, see `nnopt.data.load`.
        recipe: how the winner is trained.
        latency: candidates that a latency table predicts to be slower are left out; None for no such limit.
    """

    network: str
    data: str
    budget: int
    tolerance: float = 0.025
    samples: int = 1000
    seed: int = 0
    choices: Literal["code", "paper"] = "code"
    score_batch: int = 4
    score_seeds: int = 2
    validation: bool = False
    recipe: Recipe = QUICK
    latency: LatencyLimit | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without data.

        Raises:
            SearchError: too few samples or scoring seeds, a scoring batch of one, or a seed out of range.
            BudgetError: the tolerance is no fraction.
            ChoiceError: there are no such block choices.
        """
        if self.samples < 1 or self.score_batch < 2:
            raise SearchError(
                f"a search needs at least 1 sample and a scoring batch of 2, got {self.samples} and {self.score_batch}"
            )
        if self.score_seeds < 1:
            raise SearchError(f"scoring needs at least 1 seed, got {self.score_seeds}")
        if not 0 < self.tolerance < 1:
            raise BudgetError(
                f"the tolerance is a fraction of the budget between 0 and 1, got {self.tolerance}; the paper takes 0.025"
            )
        if not 0 <= self.seed < 2**32:
            raise SearchError(f"the seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        if self.choices not in ("code", "paper"):
            raise ChoiceError(
                f"the block choices are called 'code' or 'paper', not {self.choices!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["recipe"] = self.recipe.to_json()
        if (
            self.latency is None
        ):  # as it was before there were limits, so that older folders still fit
            del fields["latency"]
        else:
            fields["latency"] = self.latency.to_json()
        return fields

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BlockSwap":
        """The search that `to_json` described."""
        latency = values.get("latency")
        made = {"recipe": Recipe.from_json(values["recipe"])}
        return cls(**{**values, **made, "latency": latency and LatencyLimit(**latency)})


class Problem:
    """A search made ready: data loaded, space counted, sampler built.

    Attributes:
        spec: what it was made from.
        data_dir: where its data set lies, if it is not embedded.
        dataset: images and labels.
        base: the network whose blocks are replaced.
        example: one image, as the network takes it.
        space: which choices may stand where, and what each costs.
        sampler: draws candidates inside the budget.
        limited: draws those of them that are fast enough, if there is a limit on latency.
        batches: images `[score_batch, height, width, channels]`, classes `[score_batch]` and key of the weights of each minibatch
            that scores.
    """

    limited: LimitedSampler | None = None

    def __init__(self, spec: BlockSwap, data_dir: str | None = None) -> None:
        """Loads and counts.

        Raises:
            UnknownNetworkError: no network has this name.
            DataError: the data set is not there or broken.
            SelectionError: the network has no residual blocks.
            BudgetError: no candidate lies within the budget, or none of a thousand is fast enough.
            MeasurementError: the latency table is not there, or was built for another network or image size.
        """
        self.spec = spec
        self.data_dir = data_dir
        self.dataset: Dataset = load(spec.data, data_dir, validation=spec.validation)
        self.base = network_named(spec.network, len(self.dataset.classes))
        self.example = Example(jax.ShapeDtypeStruct((1, *self.dataset.image_shape), jnp.float32))
        choices = CODE_CHOICES if spec.choices == "code" else PAPER_CHOICES
        self._sites = sites(self.base, self.example)
        try:
            self.space: BlockSpace = block_space(self.base, self.example, choices)
        except SelectionError as e:
            raise SelectionError(
                f"{spec.network} has no module that adds a branch of convolutions to a shortcut, and those are what is replaced "
                "and scored here; give a residual network such as wrn-40-2, or rank records of networks like it by scores that "
                "need no residual blocks (`nnopt score a.json b.json --scores naswot layer-fisher`)"
            ) from e
        self.sampler = BudgetSampler(self.space, spec.budget, spec.tolerance)
        if spec.latency is not None:
            draws = functools.partial(self.sampler.draws, spec.seed)
            parts = space_parts(self.space, self._sites)
            self.limited = LimitedSampler(spec.latency, parts, draws)
        augmentation = spec.recipe.augmentation
        if not self.dataset.flip_ok:
            augmentation = dataclasses.replace(augmentation, flip=False)
        self.batches = []
        for seed in range(spec.score_seeds):
            images, labels = minibatch(self.dataset, spec.score_batch, self.key("minibatch", seed))
            images = augmentation(self.key("augmentation", seed), images)
            key = self.key("weights", seed)
            self.batches.append((images, labels.astype(jnp.int32), key))

    def key(self, stream: str, seed: int = 0) -> jax.Array:
        """The PRNG key of one of the streams `weights`, `minibatch`, `augmentation`, `training`, `shuffling`."""
        key = jax.random.fold_in(jax.random.key(self.spec.seed), _STREAMS.index(stream))
        return key if seed == 0 else jax.random.fold_in(key, seed)

    def draw(self, index: int) -> tuple[int, ...]:
        """Candidate number `index`: for each position, which of its choices. A pure function of seed and index."""
        if self.limited is not None:
            return self.limited.draw(index)
        return self.sampler.draw(self.spec.seed, index)

    def choices(self, index: int) -> tuple[Choice, ...]:
        """The choice at each position of candidate number `index`."""
        return tuple(c[i] for c, i in zip(self.space.choices, self.draw(index), strict=True))

    def build(self, index: int) -> nn.Module:
        """Candidate number `index` as a network."""
        rule = self.space.genotype(self.draw(index))
        return rewrite_traced(self._sites, rule)

    def init(self, net: nn.Module) -> Any:
        """Fresh variables; the same unit at the same position has the same weights in every candidate."""
        return net.lazy_init(rngs(self.key("weights")), *self.example.args)

    @functools.cached_property
    def modules(self) -> list[list[nn.Module]]:
        """The module of each choice at each position."""
        return [
            [block_for(self._sites[path], self._sites, choice) for choice in choices]
            for path, choices in zip(self.space.paths, self.space.choices, strict=True)
        ]

    @functools.cached_property
    def scorer(self) -> FisherEngine:
        """What scores candidates of this search."""
        example = Example(jax.ShapeDtypeStruct(self.batches[0][0].shape, jnp.float32), train=True)
        devices = jax.local_devices() if jax.default_backend() != "cpu" else [None]
        return FisherEngine(self.base, example, where=self.space.where, devices=devices)

    def edits(self, index: int) -> dict[Path, nn.Module]:
        """The modules that stand at each position in candidate number `index`."""
        picked = zip(self.space.paths, self.modules, self.draw(index), strict=True)
        return {path: modules[i] for path, modules, i in picked}

    def score(self, index: int) -> ScoredCandidate:
        """Scores candidate number `index`."""
        return next(self.score_each([index]))

    def score_each(self, indices: Iterable[int]) -> Iterator[ScoredCandidate]:
        """Scores candidates in order; on an accelerator, the next are under way meanwhile."""
        start = time.perf_counter()
        known, indices = itertools.tee(indices)
        pace = Pace.on(jax.default_backend())
        results = self.scorer.stream(
            map(self.edits, indices), self.batches, lanes=pace.lanes, ahead=pace.ahead
        )
        for index, scores in zip(known, results, strict=True):
            drawn = self.draw(index)
            blocks = [geometric_mean([s.blocks[b] for s in scores]) for b in scores[0].blocks]
            yield ScoredCandidate(
                index,
                self.space.names(drawn),
                self.space.total(drawn),
                geometric_mean([s.total for s in scores]),
                tuple(blocks),
                time.perf_counter() - start,
            )
            start = time.perf_counter()


def geometric_mean(values: Sequence[float]) -> float:
    """`exp(mean(log(values)))`; zero if one is zero, NaN if one is negative or NaN, or if one is zero and one infinite."""
    if len(values) == 1:
        return values[0]
    if any(math.isnan(v) or v < 0 for v in values) or (0.0 in values and math.inf in values):
        return math.nan
    return math.exp(statistics.fmean(map(math.log, values))) if all(values) else 0.0


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The job of workers: score candidates of a search.

    Attributes:
        spec: the search.
        data_dir: see `Problem`.
        indices: the candidates that are going to be asked for, so that what they need is compiled first.
    """

    spec: BlockSwap
    data_dir: str | None
    indices: tuple[int, ...]

    def start(
        self, worker: int, workers: int, on_progress: OnProgress
    ) -> Callable[[int], ScoredCandidate]:
        """See `workers.Job`."""
        problem = Problem(self.spec, self.data_dir)
        problem.scorer.prepare(map(problem.edits, self.indices), worker, workers, on_progress)
        return problem.score


def score_all(
    problem: Problem,
    known: Iterable[ScoredCandidate],
    on_scored: Callable[[ScoredCandidate], None],
    *,
    score: Callable[[int], ScoredCandidate] | None = None,
    workers: int = 1,
    on_prepared: Callable[[int, int], None] = lambda done, total: None,
) -> list[ScoredCandidate]:
    """Scores every candidate of a search that is not known yet.

    A candidate that was drawn before is not scored again: its row repeats the score of the first.

    Args:
        problem: the search.
        known: rows of an earlier, interrupted run.
        on_scored: called with each new row, in the order of candidates.
        score: how a candidate is scored; by Fisher potential by default.
        workers: processes that score by Fisher potential side by side; 1 for this process alone.
        on_prepared: told how many of how many programs have been compiled, before the first row is there.

    Returns:
        All rows, by candidate number.
    """
    rows = {row.index: row for row in known}
    by_names = {row.names: row for row in rows.values()}
    missing = [i for i in range(problem.spec.samples) if i not in rows]
    names = {i: problem.space.names(problem.draw(i)) for i in missing}
    first: dict[tuple[str, ...], int] = {}
    for i in missing:
        if names[i] not in by_names:
            first.setdefault(names[i], i)
    new = tuple(sorted(first.values()))
    scored: Iterator[ScoredCandidate]
    if score is not None or not new:
        scored = map(score or problem.score, new)
    elif workers == 1:
        problem.scorer.prepare(map(problem.edits, new), on_progress=on_prepared)
        scored = problem.score_each(new)
    else:
        job = Scoring(problem.spec, problem.data_dir, new)
        scored = map_in_processes(job, new, workers, on_prepared)
    for i in missing:
        if first.get(names[i]) == i:
            row = by_names[names[i]] = next(scored)
        else:
            row = dataclasses.replace(by_names[names[i]], index=i, seconds=0.0)
        rows[i] = row
        on_scored(row)
    return [rows[i] for i in range(problem.spec.samples)]


def best(rows: Iterable[ScoredCandidate]) -> ScoredCandidate:
    """The row of highest score; of equal ones the first. Scores that are not finite lose."""
    return max(rows, key=lambda r: (r.score if math.isfinite(r.score) else -math.inf, -r.index))


def not_finite(rows: Iterable[ScoredCandidate]) -> int:
    """How many rows have a score that is no finite number: they are kept, and rank nothing."""
    return sum(not math.isfinite(row.score) for row in rows)


def network_named(name: str, num_classes: int) -> nn.Module:
    """A reference network by name.

    Raises:
        UnknownNetworkError: there is none; the message lists the names.
    """
    try:
        return named(name, num_classes)
    except ValueError as e:
        raise UnknownNetworkError(str(e)) from e
