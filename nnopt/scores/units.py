"""Units: a module as a network calls it, traced once, initialised as the network would initialise it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax.extend import core as jex

from nnopt.core import Example
from nnopt.core.flatten import Flat, FlatEquation, Value, flatten, run_equations
from nnopt.core.marks import mark_sites
from nnopt.layers.batch_norm import lean_batch_norm
from nnopt.scores.programs import ProgramCache, equations_key
from nnopt.typing import Path


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """A module and one call of it, as a flat program.

    Attributes:
        flat: the call.
        variables: of its inputs, the leaves of the variables.
        key: of its inputs, the PRNG key for dropout.
        arrays: of its inputs, the arrays of the call and of `extra`.
        tree: structure of what the call returns.
    """

    flat: Flat
    variables: tuple[Value, ...]
    key: Value
    arrays: tuple[Value, ...]
    tree: Any

    def used(self) -> tuple[int, ...]:
        """Positions of the variables that the call depends on."""
        read = {a for e in self.flat.equations for a in e.inputs if isinstance(a, Value)}
        return tuple(i for i, v in enumerate(self.variables) if v in read)


def trace_unit(
    module: nn.Module,
    call: Example,
    path: Path = (),
    *,
    extra: Sequence[jax.ShapeDtypeStruct] = (),
    finish: Callable[..., Any] | None = None,
) -> Unit:
    """Traces a module called in this way, with batch norms of a lean derivative.

    Args:
        module: any unbound linen module.
        call: its arguments.
        path: where the network has it; decides what it draws from the PRNG key.
        extra: further inputs of `finish`.
        finish: `(outputs, *extra) -> what to return`; the outputs by default.
    """
    variables = call.abstractly(
        lambda key, *args, **kwargs: module.init(_rngs(key, ()), *args, **kwargs),
        jax.random.key(0),
    )
    tree: list[Any] = []

    def run(
        variables: Any, key: jax.Array, extra: tuple[jax.Array, ...], *args: Any, **kwargs: Any
    ) -> list[Any]:
        outputs, _ = module.apply(
            variables,
            *args,
            **kwargs,
            rngs={"dropout": LazyRng.create(key, *path)},
            mutable=[name for name in variables if name != "params"],
        )
        leaves, structure = jax.tree.flatten(outputs if finish is None else finish(outputs, *extra))
        tree.append(structure)
        return leaves

    # The interceptor that enters last runs first: marks stand outside of what replaces a batch norm.
    with nn.intercept_methods(lean_batch_norm), nn.intercept_methods(mark_sites):
        closed, own = call.jaxpr(run, variables, jax.random.key(0), tuple(extra))
    flat = flatten(closed)
    flat = flat.keeping(flat.outputs)
    count = len(jax.tree.leaves(variables))
    arrays, rest = flat.inputs[:own], flat.inputs[own:]
    return Unit(flat, rest[:count], rest[count], arrays + rest[count + 1 :], tree[-1])


class Initialiser:
    """Initialises a module as a network would that has it at a path, in small programs that modules share."""

    def __init__(
        self, module: nn.Module, call: Example, path: Path, wanted: Sequence[int] | None = None
    ) -> None:
        """Traces `init`; what the variables do not depend on (the call itself) is dropped.

        Args:
            module: any unbound linen module.
            call: its arguments.
            path: where the network has it, `()` for the network itself.
            wanted: positions of the leaves to initialise; all by default.
        """

        def init(key: jax.Array, *args: Any, **kwargs: Any) -> list[Any]:
            variables = module.init(_rngs(key, path), *args, **kwargs)
            leaves = jax.tree.leaves(variables)
            return leaves if wanted is None else [leaves[i] for i in wanted]

        closed, own = call.jaxpr(init, jax.random.key(0))
        flat = flatten(closed)
        self._flat = flat.keeping(flat.outputs)
        self._key = flat.inputs[own]

    def __call__(self, key: jax.Array, cache: ProgramCache) -> list[jax.Array]:
        """The wanted leaves of the variables for a PRNG key, on the cache's device."""
        key = jax.device_put(key, cache.device)
        known: dict[Value, Any] = {self._key: key, **dict(self._flat.constants)}
        # Which key a weight gets depends on its path, so keys are derived one by one, outside of the programs: these are the
        # same for every weight of a shape.
        run_equations([e for e in self._flat.equations if _makes_key(e)], known)
        for equations in _components([e for e in self._flat.equations if not _makes_key(e)]):
            own = {v for e in equations for v in e.outputs}
            read = {a: None for e in equations for a in e.inputs if isinstance(a, Value)}
            inputs = [v for v in read if v not in own]
            outputs = [v for e in equations for v in e.outputs if v in set(self._flat.outputs)]

            def run(
                *arrays: jax.Array,
                inputs: Sequence[Value] = inputs,
                outputs: Sequence[Value] = outputs,
                equations: Sequence[FlatEquation] = equations,
            ) -> tuple[jax.Array, ...]:
                env = dict(zip(inputs, arrays, strict=True))
                run_equations(equations, env)
                return tuple(env[v] for v in outputs)

            code = ("initialise", equations_key(equations, inputs, outputs))
            program = cache.get(code, run, [v.aval for v in inputs])
            known.update(zip(outputs, program.run(*[known[v] for v in inputs]), strict=True))
        return [
            jnp.asarray(a.val) if isinstance(a, jex.Literal) else known[a]
            for a in self._flat.outputs
        ]


def _rngs(key: jax.Array, path: Path) -> dict[str, Any]:
    """The streams of `core.example.rngs` as a module at a path sees them: Flax folds in the path when it makes a key."""
    roots = {"params": key, "dropout": jax.random.fold_in(key, 1)}
    return {name: LazyRng.create(root, *path) for name, root in roots.items()}


def _makes_key(equation: FlatEquation) -> bool:
    return any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in equation.outputs)


def _components(equations: Sequence[FlatEquation]) -> list[list[FlatEquation]]:
    """Equations split into groups that share no value made by one of them, each in order."""
    group: dict[Value, list[FlatEquation]] = {}
    groups: list[list[FlatEquation]] = []
    for equation in equations:
        joined = [group[a] for a in equation.inputs if isinstance(a, Value) and a in group]
        unique = list({id(g): g for g in joined}.values())
        merged = [e for g in unique for e in g] + [equation]
        groups = [g for g in groups if not any(g is u for u in unique)] + [merged]
        for e in merged:
            group.update(dict.fromkeys(e.outputs, merged))
    return groups
