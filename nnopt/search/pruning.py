"""A network made smaller by one of several schemes, from start to result folder, resumable at every moment.

folder/
  prune.json      what determines the job; a folder belongs to one job
  base/           checkpoint of the base network's training, if it is trained here
  pruning/        checkpoint of the pruning, renewed every half minute
  training/       checkpoint of the smaller network's training
  network.json    record of the smaller network
  checkpoint/     its trained weights
  result.json     what came out; written last
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnopt.core import (
    Example,
    Sites,
    channel_groups,
    fingerprint,
    save_record,
    sites,
)
from nnopt.core.files import write_whole
from nnopt.core.rewrite import rewrite_traced
from nnopt.costs import macs, parameters
from nnopt.data import Dataset
from nnopt.errors import (
    BudgetError,
    CheckpointError,
    NnoptError,
    PruneError,
    ResultFolderError,
    UnsupportedNetworkError,
)
from nnopt.rewrites import (
    Bottleneck,
    Rewrite,
    ScaleDepth,
    ScaleProfile,
    ScaleWidth,
    largest_within,
)
from nnopt.rewrites.skeleton import scaled_inner_groups
from nnopt.search.folders import claimed, read_versioned, writing_to
from nnopt.search.latency import Watcher, latency_against_base
from nnopt.training import (
    Pruner,
    PruneRecipe,
    PruneRow,
    Recipe,
    checkpoint_info,
    evaluate_test,
    load_checkpoint,
    mode_of,
    save_checkpoint,
    train_in,
)
from nnopt.typing import Variables

Scheme = Literal["tune", "scratch", "width", "depth", "bottleneck", "profile"]
PRUNING = ("tune", "scratch")
"""Schemes that remove channels, of a trained base network; all others scale it and train that alone."""
FORMAT = "nnopt prune result"
VERSION = 1
_SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclasses.dataclass(frozen=True)
class PruneJob:
    """What determines a smaller network.

    Attributes:
        scheme: `tune` prunes and tunes, as `nnopt.training.Pruner`; `scratch` trains the shape that this leaves from random
            weights; `width`, `depth` and `bottleneck` train a smaller member of the family; `profile` one whose inner widths are
            those of `profile` times a factor.
        budget: parameters of the smaller network.
        recipe: how networks are trained from scratch.
        pruning: how channels are removed, for schemes `tune` and `scratch` alone.
        seed: of everything random.
        keep: path of a module that `width` leaves as wide as it is, such as the stem of a wide residual network.
        profile: inner widths, for scheme `profile` alone.

    Raises:
        PruneError: a value that the scheme does not look at, or one that it needs and does not get.
    """

    scheme: Scheme
    budget: int
    recipe: Recipe
    pruning: PruneRecipe | None = None
    seed: int = 0
    keep: str | None = None
    profile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.pruning is not None) != (self.scheme in PRUNING):
            raise PruneError(
                f"scheme {self.scheme} "
                + (
                    "removes channels; say how, with pruning=PruneRecipe(...)"
                    if self.pruning is None
                    else f"removes no channels; leave pruning out, or take scheme {' or '.join(PRUNING)}"
                )
            )
        if self.keep is not None and self.scheme != "width":
            raise PruneError(
                f"only scheme width keeps a module as wide as it is; leave out --keep {self.keep}, or give --scheme width"
            )
        if self.profile and self.scheme != "profile":
            raise PruneError(
                f"scheme {self.scheme} takes no inner widths; leave out --profile, or give --scheme profile"
            )
        if not self.profile and self.scheme == "profile":
            raise PruneError(
                "scheme profile scales a list of inner widths; give it with --profile, such as the inner widths of a pruned network"
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        how = self.pruning
        return {
            **dataclasses.asdict(self),
            "recipe": self.recipe.to_json(),
            "pruning": how and {**dataclasses.asdict(how), "tuning": how.tuning.to_json()},
            "profile": list(self.profile),
        }

    def key(self, purpose: int) -> jax.Array:
        """The key of a purpose."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """A smaller network.

    Attributes:
        folder: where everything is.
        summary: the content of `result.json`.
    """

    folder: pathlib.Path
    summary: dict[str, Any]


def prune_network(
    job: PruneJob,
    base: nn.Module,
    dataset: Dataset,
    folder: pathlib.Path,
    watcher: Watcher,
    *,
    checkpoint: pathlib.Path | None = None,
) -> PruneResult:
    """Makes a smaller network, or takes up where a killed run stopped.

    Args:
        job: what to do.
        base: the network.
        dataset: what it is trained and tested on.
        folder: where results go.
        watcher: is told how it gets on.
        checkpoint: of the trained base network's variables, for schemes `tune` and `scratch` alone; it is trained here if None.

    Raises:
        PruneError: a checkpoint for a scheme that trains a smaller network from scratch.
        BudgetError: no network of this kind is so small.
        UnsupportedNetworkError: the network does not run on the images.
        ResultFolderError, CheckpointError: see `claim_folder` and `load_checkpoint`; or `result.json` is damaged.
    """
    if checkpoint is not None and job.pruning is None:
        raise PruneError(
            f"scheme {job.scheme} starts from random weights; leave out the checkpoint {checkpoint}, or take scheme "
            f"{' or '.join(PRUNING)}"
        )
    settings = {
        **job.to_json(),
        "network": fingerprint(base),
        "data": dataset.name,
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
    }
    with claimed(folder, "prune", settings) as place:
        summary = _read_result(place)
        if summary is None:
            summary = _made(job, settings, base, dataset, place, watcher, checkpoint)
            with writing_to(place):
                write_whole(place / "result.json", json.dumps(summary, indent=1) + "\n")
    return PruneResult(place, summary)


def _made(
    job: PruneJob,
    settings: dict[str, Any],
    base: nn.Module,
    dataset: Dataset,
    place: pathlib.Path,
    watcher: Watcher,
    checkpoint: pathlib.Path | None,
) -> dict[str, Any]:
    """Makes the network and writes it down; returns what `result.json` is to say.

    What can be checked is checked before anything is trained.
    """
    began = time.perf_counter()
    found = _traced(base, dataset)
    example = found.example
    whole = parameters(base, example)
    if job.budget >= whole:
        raise BudgetError(
            f"the budget is {job.budget:,} parameters, and the network has {whole:,}; give a smaller budget"
        )
    rows: list[PruneRow] = []
    variables: Variables | None = None
    base_variables: Variables = base.lazy_init(job.key(0), *example.args, **example.kwargs)
    if job.pruning is not None:
        pruner = _pruner(job, job.pruning, base, dataset)
        base_variables = _base(job, base, base_variables, dataset, place, watcher, checkpoint)
        small, variables, rows = _pruned(job, pruner, base, base_variables, place, watcher)
    else:
        small = rewrite_traced(found, _rule(job, found))
    if job.scheme != "tune":
        fresh = small.lazy_init(job.key(2), *example.args, **example.kwargs)
        variables, _ = train_in(
            place / "training", small, fresh, dataset, job.recipe, job.key(3),
            on_start=lambda done, total: watcher.phase("training", total, done),
            on_epoch=lambda row: watcher.advance(f"test accuracy {row.test_accuracy:.1%}"),
        )  # fmt: skip
    assert variables is not None
    with writing_to(place):
        save_record(small, place / "network.json")
    save_checkpoint(place / "checkpoint", small, variables)
    summary = {
        "format": FORMAT,
        "version": VERSION,
        "job": settings,
        "parameters": parameters(small, example),
        "base_parameters": whole,
        "macs": macs(small, example),
        "base_macs": macs(base, example),
        "test_accuracy": evaluate_test(small, variables, dataset),
        "split_note": dataset.split_note,
        "inner_widths": inner_widths(small, example),
        "rounds": [dataclasses.asdict(row) for row in rows],
        "latency": latency_against_base(
            {"base": (base, base_variables), "small": (small, variables)}, example, watcher
        ),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    if job.scheme == "tune":
        summary["base_test_accuracy"] = evaluate_test(base, base_variables, dataset)
    return summary


_NUMBER = (int, float)
_FIELDS: dict[str, Any] = {
    "parameters": int, "base_parameters": int, "macs": int, "base_macs": int, "test_accuracy": _NUMBER, "split_note": str,
    "inner_widths": list, "rounds": list, "latency": dict,
}  # fmt: skip
"""What whoever reads a result relies on."""


def _read_result(place: pathlib.Path) -> dict[str, Any] | None:
    """The content of `result.json`, or None where there is no such file.

    Raises:
        ResultFolderError: it is not what `prune_network` wrote.
    """
    path = place / "result.json"
    remedy = "remove it, and the same command writes it again"
    summary = read_versioned(path, FORMAT, VERSION, remedy)
    if summary is None:
        return None
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(summary.get(name), kind)]
    if "latency" not in wrong and not all(map(_is_latency, summary["latency"].values())):
        wrong.append("latency")
    if not isinstance(summary.get("base_test_accuracy", 0.0), _NUMBER):
        wrong.append("base_test_accuracy")
    if wrong:
        raise ResultFolderError(f"{path} is damaged: it has no valid {wrong[0]!r}; {remedy}")
    return summary


def _is_latency(row: Any) -> bool:
    """Whether this is a row of `latency_against_base`."""
    try:
        values = row["base"]["median_ms"], row["small"]["median_ms"], row["speedup"]["median"]
    except (KeyError, TypeError):
        return False
    return all(isinstance(v, _NUMBER) for v in values)


def _traced(base: nn.Module, dataset: Dataset) -> Sites:
    """The sites of the network, called on an image in evaluation mode.

    Raises:
        UnsupportedNetworkError: it does not run on the images of the data set.
    """
    image = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    example = Example(image, **mode_of(base, False))
    try:
        return sites(base, example)
    except NnoptError:
        raise
    except Exception as e:  # whatever a network's author, Flax or JAX raises
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UnsupportedNetworkError(
            f"{type(base).__name__} does not run on images of {' x '.join(map(str, dataset.image_shape))} when it is called "
            f"with {example} ({reason}); give another --network"
        ) from e


def inner_widths(net: nn.Module, example: Any) -> list[int]:
    """Widths inside of residual blocks, in the order of the network; what `ScaleProfile` takes."""
    groups = channel_groups(net, example)
    found = []
    for name in scaled_inner_groups(groups):
        maker = groups[name].makers[0]
        found.append(groups.leaves[maker.leaf][maker.axis])
    return found


def _rule(job: PruneJob, found: Sites) -> Rewrite:
    """The rewrite of a scheme that scales: its largest factor within the budget."""
    if job.scheme == "depth":
        steps = [ScaleDepth(i / 12) for i in range(11, 0, -1)]
        sizes = [parameters(rewrite_traced(found, rule), found.example) for rule in steps]
        for rule, size in zip(steps, sizes, strict=True):
            if size <= job.budget:
                return rule
        raise BudgetError(
            f"the shallowest network has {min(sizes):,} parameters, and the budget is {job.budget:,}; give a larger one"
        )
    if job.scheme == "width":
        return largest_within(found, lambda f: ScaleWidth(f, 1, job.keep), job.budget)
    if job.scheme == "bottleneck":
        return largest_within(found, Bottleneck, job.budget)
    # Up to where the first group has the width of the base; a profile of bad widths is refused by the rule, at any factor.
    inner = inner_widths(found.net, found.example)
    high = max((w / p for w, p in zip(inner, job.profile, strict=False) if p > 0), default=1.0)
    return largest_within(found, lambda f: ScaleProfile(job.profile, f), job.budget, high=high)


def _base(
    job: PruneJob,
    base: nn.Module,
    fresh: Variables,
    dataset: Dataset,
    place: pathlib.Path,
    watcher: Watcher,
    checkpoint: pathlib.Path | None,
) -> Variables:
    """The trained variables of the base network."""
    if checkpoint is not None:
        return dict(load_checkpoint(checkpoint, base, fresh))
    variables, _ = train_in(
        place / "base", base, fresh, dataset, job.recipe, job.key(1),
        on_start=lambda done, total: watcher.phase("training the base", total, done),
        on_epoch=lambda row: watcher.advance(f"test accuracy {row.test_accuracy:.1%}"),
    )  # fmt: skip
    return variables


def _pruner(job: PruneJob, recipe: PruneRecipe, base: nn.Module, dataset: Dataset) -> Pruner:
    """What prunes.

    Raises:
        BudgetError: it cannot reach the budget.
    """
    pruner = Pruner(base, dataset, recipe)
    if (least := pruner.smallest) > job.budget:
        raise BudgetError(
            f"without all channels that can go the network has {least:,} parameters, and the budget is {job.budget:,}; give a "
            "larger one, or let all channels go"
        )
    return pruner


def _pruned(
    job: PruneJob,
    pruner: Pruner,
    base: nn.Module,
    variables: Variables,
    place: pathlib.Path,
    watcher: Watcher,
) -> tuple[nn.Module, Variables, list[PruneRow]]:
    """The pruned network, its variables, and what each round came to."""
    state = pruner.start(variables, job.key(4))
    folder, rows = place / "pruning", []
    if folder.exists():
        try:
            state = load_checkpoint(folder, base, state)
            rows = [PruneRow(**{**r, "last": tuple(r["last"])}) for r in checkpoint_info(folder).extra["rows"]]  # fmt: skip
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"cannot go on from {folder}: {e}; remove that folder to prune again") from e  # fmt: skip
    whole, left = pruner.whole, pruner.parameters(state)

    def percent() -> int:
        return min(100, 100 * (whole - left) // (whole - job.budget))

    told = percent()
    watcher.phase("pruning, %", 100, told)
    saved = time.monotonic()
    while left > job.budget:
        state, row = pruner.round(state)
        rows.append(row)
        left = row.parameters
        note = f"{left:,} parameters, {row.train_accuracy:.1%} right in training"
        for _ in range(percent() - told):
            watcher.advance(note)
        told = percent()
        if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS or left <= job.budget:
            kept = {"rows": [dataclasses.asdict(r) for r in rows]}
            save_checkpoint(folder, base, state, extra=kept)
            saved = time.monotonic()
    small, made = pruner.finish(state)
    return small, made, rows
