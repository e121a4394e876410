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

from nnopt.core import Example, channel_groups, fingerprint, rewrite, save_record, sites
from nnopt.core.files import write_whole
from nnopt.costs import macs, parameters
from nnopt.data import Dataset
from nnopt.errors import BudgetError, CheckpointError, PruneError
from nnopt.rewrites import (
    Bottleneck,
    Rewrite,
    ScaleDepth,
    ScaleProfile,
    ScaleWidth,
    inner_groups,
    largest_within,
)
from nnopt.search.folders import claim_folder, read_json, writing_to
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
        pruning: how channels are removed.
        seed: of everything random.
        keep: path of a module that `width` leaves as wide as it is, such as the stem of a wide residual network.
        profile: inner widths.
    """

    scheme: Scheme
    budget: int
    recipe: Recipe
    pruning: PruneRecipe
    seed: int = 0
    keep: str | None = None
    profile: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        pruning = {**dataclasses.asdict(self.pruning), "tuning": self.pruning.tuning.to_json()}
        return {
            **dataclasses.asdict(self),
            "recipe": self.recipe.to_json(),
            "pruning": pruning,
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
        checkpoint: of the trained base network's variables; it is trained here if None.

    Raises:
        BudgetError: no network of this kind is so small.
        ResultFolderError, CheckpointError: see `claim_folder` and `load_checkpoint`.
    """
    settings = {
        **job.to_json(),
        "network": fingerprint(base),
        "data": dataset.name,
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
    }
    place = claim_folder(folder, "prune", settings)
    done = read_json(place / "result.json", "remove it, and the same command writes it again")
    if done is not None:
        return PruneResult(place, done)
    example = Example(jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32), **mode_of(base, False))  # fmt: skip
    whole = parameters(base, example)
    if job.budget >= whole:
        raise BudgetError(
            f"the budget is {job.budget:,} parameters, and the network has {whole:,}; give a smaller budget"
        )
    began = time.perf_counter()
    rows: list[PruneRow] = []
    base_variables: Variables | None = None
    if job.scheme in ("tune", "scratch"):
        base_variables = _base(job, base, dataset, example, place, watcher, checkpoint)
        small, variables, rows = _pruned(job, base, base_variables, dataset, place, watcher)
    else:
        small = rewrite(base, _rule(job, base, example), example=example)
        variables = None
    if job.scheme != "tune":
        fresh = small.lazy_init(job.key(2), *example.args, **example.kwargs)
        variables, _ = train_in(
            place / "training", small, fresh, dataset, job.recipe, job.key(3),
            on_start=lambda done, total: watcher.phase("training", total, done),
            on_epoch=lambda row: watcher.advance(f"test accuracy {row.test_accuracy:.1%}"),
        )  # fmt: skip
    assert variables is not None
    if base_variables is None:
        base_variables = base.lazy_init(job.key(0), *example.args, **example.kwargs)
    with writing_to(place):
        save_record(small, place / "network.json")
    save_checkpoint(place / "checkpoint", small, variables)
    summary = {
        "format": "nnopt prune result",
        "version": 1,
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
    with writing_to(place):
        write_whole(place / "result.json", json.dumps(summary, indent=1) + "\n")
    return PruneResult(place, summary)


def inner_widths(net: nn.Module, example: Any) -> list[int]:
    """Widths inside of residual blocks, in the order of the network; what `ScaleProfile` takes."""
    groups = channel_groups(net, example)
    found = []
    for name in inner_groups(groups):
        maker = groups[name].makers[0]
        found.append(groups.leaves[maker.leaf][maker.axis])
    return found


def _rule(job: PruneJob, base: nn.Module, example: Example) -> Rewrite:
    """The rewrite of a scheme that scales: its largest factor within the budget."""
    found = sites(base, example)
    if job.scheme == "depth":
        steps = [ScaleDepth(i / 12) for i in range(11, 0, -1)]
        sizes = [parameters(rewrite(base, rule, example=example), example) for rule in steps]
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
    if not job.profile:
        raise PruneError(
            "scheme profile scales a list of inner widths; give it with --profile, such as the inner widths of a pruned network"
        )
    inner = inner_widths(base, example)
    high = max((w / p for w, p in zip(inner, job.profile, strict=False) if p), default=1.0)
    return largest_within(found, lambda f: ScaleProfile(job.profile, f), job.budget, high=high)


def _base(
    job: PruneJob,
    base: nn.Module,
    dataset: Dataset,
    example: Example,
    place: pathlib.Path,
    watcher: Watcher,
    checkpoint: pathlib.Path | None,
) -> Variables:
    """The trained variables of the base network."""
    fresh = base.lazy_init(job.key(0), *example.args, **example.kwargs)
    if checkpoint is not None:
        return dict(load_checkpoint(checkpoint, base, fresh))
    variables, _ = train_in(
        place / "base", base, fresh, dataset, job.recipe, job.key(1),
        on_start=lambda done, total: watcher.phase("training the base", total, done),
        on_epoch=lambda row: watcher.advance(f"test accuracy {row.test_accuracy:.1%}"),
    )  # fmt: skip
    return variables


def _pruned(
    job: PruneJob,
    base: nn.Module,
    variables: Variables,
    dataset: Dataset,
    place: pathlib.Path,
    watcher: Watcher,
) -> tuple[nn.Module, Variables, list[PruneRow]]:
    """The pruned network, its variables, and what each round came to."""
    pruner = Pruner(base, dataset, job.pruning)
    state = pruner.start(variables, job.key(4))
    if (least := pruner.smallest) > job.budget:
        raise BudgetError(
            f"without all channels that can go the network has {least:,} parameters, and the budget is {job.budget:,}; give a "
            "larger one, or let all channels go"
        )
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
