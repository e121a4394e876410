"""Several candidates side by side: at each unit, those that have the same module there run as one program.

For devices that a single candidate at a small batch does not fill. Every program gets one more axis in front, the lanes; weights
are shared. At a unit, the lanes of candidates that have the same module are taken out, run together, and put back. Numbers of lanes
are rounded up to powers of two, so that few programs are compiled.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core.paths import path_text
from nnopt.scores.chain import Chain, Hole, HoleReverse
from nnopt.scores.engine import Candidate, Engine, Piece, code_of, run_instructions


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Lanes that have the same module at a unit.

    Attributes:
        piece: the unit.
        chain: what runs it, `width` lanes wide.
        env: its values.
        rows: which of all lanes they are.
        take: index of the lane that each of its own reads, `[width]`.
        put: index of the lane that each of its own writes, out of range for those that only fill up.
        activity: which of its values have cotangents: the arguments of `Chain.reverse`.
    """

    piece: Piece
    chain: Chain
    env: list[Any]
    rows: tuple[int, ...]
    take: np.ndarray
    put: np.ndarray
    activity: Any


class SideBySide:
    """Runs up to `width` candidates of an engine at once.

    Attributes:
        width: a power of two.
    """

    def __init__(self, engine: Engine[Any], width: int) -> None:
        """Wraps an engine.

        Args:
            engine: whose candidates they are.
            width: how many run at once at most; rounded up to a power of two.
        """
        self._engine = engine
        self.width = _power_of_two(width)

    def run(
        self, candidates: Sequence[Candidate], images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> list[tuple[str, tuple[int, ...], list[jax.Array]]]:
        """Runs candidates of one skeleton forward and back; on an accelerator, returns before that is done.

        Args:
            candidates: at most `width`, all of the same skeleton and the same pattern of activity.
            images: `[batch, height, width, channels]`, the same for all.
            labels: int32 `[batch]`.
            key: as in `Engine.run`.

        Returns:
            Triples of a probe's path, the numbers of the candidates that it was observed in, and what was observed there, with as
            many lanes in front (and maybe some more, which mean nothing).
        """
        engine, first = self._engine, candidates[0]
        lanes = [*candidates, *[candidates[-1]] * (self.width - len(candidates))]
        chain = first.skeleton.plan.lanes(self.width)
        reverse = chain.reverse(*first.activity)
        code = code_of(key)
        env = engine.weights(first.skeleton, key, code, self.width)
        for slot, array in zip(chain.inputs, (images, labels), strict=True):
            env[slot] = self._repeated(array)
        holes: dict[int, list[_Group]] = {}
        for part in chain.forward:
            if isinstance(part, Hole):
                holes[part.index] = self._groups(lanes, part.index, key, code)
                self._fill(holes[part.index], part, env)
            else:
                run_instructions((part,), env)
        seed = jnp.ones((self.width,), images.dtype)
        env[chain.cotangent_slot(0)] = jax.device_put(seed, engine.device)
        for step in reverse.parts:
            if isinstance(step, HoleReverse):
                self._reverse(holes[step.index], step, env)
            else:
                run_instructions((step,), env)
        found = []
        everyone = tuple(range(len(candidates)))
        for index in sorted(holes):
            for group in holes[index]:
                rows = tuple(row for row in group.rows if row < len(candidates))
                done = group.chain.reverse(*group.activity).observed if group.activity else ()
                for i, slots in sorted([*group.chain.observed, *done]):
                    label = path_text((*group.piece.path, *group.chain.probes[i].path))
                    found.append((label, rows, [group.env[slot] for slot in slots]))
        for i, slots in sorted([*chain.observed, *reverse.observed]):
            label = path_text(chain.probes[i].path)
            found.append((label, everyone, [env[slot] for slot in slots]))
        return found

    def begin(
        self, candidates: Sequence[Candidate], images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> Callable[[], list[Any]]:
        """Begins to run candidates of any skeletons; what is returned waits for their scores."""
        alike: dict[Any, list[int]] = {}
        for i, candidate in enumerate(candidates):
            alike.setdefault((id(candidate.skeleton), candidate.activity), []).append(i)
        started = [
            (rows, self.run([candidates[i] for i in rows], images, labels, key))
            for rows in alike.values()
        ]

        def wait() -> list[Any]:
            observed: list[dict[str, list[np.ndarray]]] = [{} for _ in candidates]
            for rows, found in started:
                for label, lanes, arrays in found:
                    here = jax.device_get(arrays)
                    for lane, row in enumerate(lanes):
                        observed[rows[row]][label] = [a[lane] for a in here]
            return [self._engine.result(o) for o in observed]

        return wait

    def _groups(
        self, lanes: Sequence[Candidate], index: int, key: jax.Array, code: bytes
    ) -> list[_Group]:
        rows: dict[tuple[int, Any], list[int]] = {}
        for row, candidate in enumerate(lanes):
            rows.setdefault((id(candidate.pieces[index]), candidate.keys[index]), []).append(row)
        groups = []
        for (_, activity), found in rows.items():
            piece = lanes[found[0]].pieces[index]
            width = _power_of_two(len(found))
            fill = width - len(found)
            take = np.array([*found, *[found[-1]] * fill], np.int32)
            put = np.array([*found, *[self.width] * fill], np.int32)
            chain = piece.plan.lanes(width)
            if activity is not None:
                chain.reverse(*activity)  # planned first: its values have places in `env` too
            env = self._engine.weights(piece, key, code, width)
            groups.append(_Group(piece, chain, env, tuple(found), take, put, activity))
        return groups

    def _fill(self, groups: list[_Group], hole: Hole, env: list[Any]) -> None:
        for group in groups:
            for to, slot in zip(group.chain.inputs, hole.inputs, strict=True):
                group.env[to] = self._take(env[slot], group)
            run_instructions(group.chain.forward, group.env)
            for slot, out in zip(hole.outputs, group.chain.outputs, strict=True):
                env[slot] = self._put(env[slot], group.env[out], group)

    def _reverse(self, groups: list[_Group], step: HoleReverse, env: list[Any]) -> None:
        for group in groups:
            for i, slot in enumerate(step.cotangents):
                if slot is not None:
                    group.env[group.chain.cotangent_slot(i)] = self._take(env[slot], group)
            reverse = group.chain.reverse(*group.activity)
            run_instructions(reverse.parts, group.env)
            for i, slot in enumerate(step.gradients):
                if slot is None:
                    continue
                found = reverse.inputs[i]
                gradient = (
                    jnp.zeros_like(group.env[group.chain.inputs[i]])
                    if found is None
                    else group.env[found]
                )
                env[slot] = self._put(env[slot], gradient, group)

    def _repeated(self, array: jax.Array) -> jax.Array:
        def run(x: jax.Array) -> tuple[jax.Array, ...]:
            return (jnp.broadcast_to(x[None], (self.width, *x.shape)),)

        (found,) = self._engine.cache.get(("repeat", self.width), run, [array]).run(array)
        return found

    def _take(self, array: jax.Array, group: _Group) -> jax.Array:
        if len(group.rows) == self.width:
            return array

        def run(x: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
            return (jnp.take(x, index, axis=0, mode="clip"),)

        program = self._engine.cache.get(("take",), run, [array, group.take])
        return program.run(array, group.take)[0]

    def _put(self, whole: jax.Array | None, part: jax.Array, group: _Group) -> jax.Array:
        if len(group.rows) == self.width:
            return part
        if whole is None:
            whole = jnp.zeros((self.width, *part.shape[1:]), part.dtype)

        def run(x: jax.Array, rows: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
            return (x.at[index].set(rows, mode="drop"),)

        program = self._engine.cache.get(("put",), run, [whole, part, group.put])
        return program.run(whole, part, group.put)[0]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
