"""Units: a module as a network calls it, traced once, initialised as the network would initialise it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng
from jax.extend import core as jex

from nnopt.core import Example
from nnopt.core.example import rngs
from nnopt.core.flatten import Flat, FlatEquation, Value, flatten, run_equations
from nnopt.core.marks import mark_sites
from nnopt.layers.batch_norm import lean_batch_norm
from nnopt.scores.programs import Program, ProgramCache, equations_key
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
        skeleton: whether it is a whole network, its units cut out of it.
    """

    flat: Flat
    variables: tuple[Value, ...]
    key: Value
    arrays: tuple[Value, ...]
    tree: Any
    skeleton: bool = False

    def used(self) -> tuple[int, ...]:
        """Positions of the variables that the call depends on."""
        read = self._read()
        return tuple(i for i, v in enumerate(self.variables) if v in read)

    @property
    def random(self) -> bool:
        """Whether the call depends on the PRNG key, and so on where the module stands."""
        return self.key in self._read()

    def _read(self) -> set[Value]:
        return {a for e in self.flat.equations for a in e.inputs if isinstance(a, Value)}


def trace_unit(
    module: nn.Module,
    call: Example,
    variables: Any,
    path: Path = (),
    *,
    extra: Sequence[jax.ShapeDtypeStruct] = (),
    finish: Callable[..., Any] | None = None,
) -> Unit:
    """Traces a module called in this way, with batch norms of a lean derivative.

    Args:
        module: any unbound linen module.
        call: its arguments.
        variables: shapes and dtypes of its variables.
        path: where the network has it; decides what it draws from the PRNG key.
        extra: further inputs of `finish`.
        finish: `(outputs, *extra) -> what to return`, for a skeleton; the outputs by default.
    """
    tree: list[Any] = []

    def run(
        variables: Any, key: jax.Array, extra: tuple[jax.Array, ...], *args: Any, **kwargs: Any
    ) -> list[Any]:
        outputs, _ = module.apply(
            variables,
            *args,
            **kwargs,
            rngs={"dropout": cast(Any, LazyRng.create(key, *path))},
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
    inputs = arrays + rest[count + 1 :]
    return Unit(flat, rest[:count], rest[count], inputs, tree[-1], skeleton=finish is not None)


class Initialiser:
    """Initialises a module as a network would that has it at a path.

    Attributes:
        variables: shapes and dtypes of all its variables.
        anywhere: whether it serves every path. If not, only the one it was made for: the module derives keys in ways of its own.
    """

    def __init__(self, module: nn.Module, call: Example, path: Path) -> None:
        """Traces `init`; what the variables do not depend on (the call itself) is dropped.

        Args:
            module: any unbound linen module.
            call: its arguments.
            path: where the network has it, `()` for the network itself.
        """
        trees: list[Any] = []

        def init(key: jax.Array, *args: Any, **kwargs: Any) -> list[Any]:
            leaves, tree = jax.tree.flatten(module.init(_rngs(key, path), *args, **kwargs))
            trees.append(tree)
            return leaves

        closed, own = call.jaxpr(init, jax.random.key(0))
        flat = flatten(closed)
        self._key = flat.inputs[own]
        leaves = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.out_avals]
        self.variables = jax.tree.unflatten(trees[-1], leaves)
        self._whole = flat.keeping(flat.outputs)
        self._scopes = {
            tuple(str(k.key) for k in where[1 : 1 + depth])
            for where, _ in jax.tree_util.tree_leaves_with_path(self.variables)
            for depth in range(len(where))
        }
        self._path = path
        self.keep(range(len(leaves)))

    def keep(self, wanted: Sequence[int]) -> None:
        """Restricts it to the leaves at these positions."""
        self._flat = self._whole.keeping(self._whole.outputs[i] for i in wanted)
        random: set[Value] = set()
        early: list[FlatEquation] = []
        late: list[FlatEquation] = []
        for equation in self._flat.equations:
            drawn = equation.primitive.name == "random_bits"
            if drawn or any(a in random for a in equation.inputs if isinstance(a, Value)):
                random.update(equation.outputs)
                late.append(equation)
            else:
                early.append(equation)
        # Which key a weight gets depends on its path, and its scale on its shape. Both are derived outside of the programs, which
        # are the same for many weights then.
        self._draws = [_Draw(equations, self._flat.outputs) for equations in _components(late)]
        self._suffixes = self._find_suffixes(early)
        self._early = [e for e in early if e.outputs[0] not in self._suffixes]
        derived = [e for e in self._early if any(map(_is_key, e.outputs))]
        self.anywhere = not derived

    def _find_suffixes(
        self, equations: Sequence[FlatEquation]
    ) -> dict[Value, tuple[str | int, ...]]:
        """What Flax folded into the key for each derived one: the path of a module below this one, and a count."""
        folds = [
            e
            for e in equations
            if e.primitive.name == "random_fold_in"
            and e.inputs[0] is self._key
            and isinstance(e.inputs[1], jex.Literal)
        ]
        if not folds:
            return {}
        suffixes: Iterator[tuple[str | int, ...]] = (
            (*scope, count) for scope in self._scopes for count in range(_DRAWS)
        )
        by_hash = {_folded(self._path + suffix): suffix for suffix in suffixes}
        known = {e.outputs[0]: by_hash.get(_number(e)) for e in folds}
        return {value: suffix for value, suffix in known.items() if suffix is not None}

    def plan(self, cache: ProgramCache) -> None:
        """Asks for the programs that it needs."""
        for draw in self._draws:
            draw.program(cache)

    def __call__(self, key: jax.Array, cache: ProgramCache, path: Path) -> list[Any]:
        """The wanted leaves of the variables for a PRNG key and a path, each a NumPy or a JAX array."""
        known: dict[Value, Any] = {self._key: key, **dict(self._flat.constants)}
        for value, suffix in self._suffixes.items():
            known[value] = LazyRng.create(key, *path, *suffix).as_jax_rng()
        run_equations(self._early, known)
        for draw in self._draws:
            draw.run(known, cache)
        return [
            np.asarray(a.val) if isinstance(a, jex.Literal) else known[a]
            for a in self._flat.outputs
        ]


@functools.cache
def _folded(suffix: tuple[str | int, ...]) -> int:
    """The number that Flax folds into a key for a path and a count."""
    derived = jax.make_jaxpr(lambda key: LazyRng.create(key, *suffix).as_jax_rng())
    return _number(flatten(derived(jax.random.key(0))).equations[0])


def _number(fold_in: FlatEquation) -> int:
    """What an equation folds into a key."""
    literal = fold_in.inputs[1]
    assert isinstance(literal, jex.Literal)
    return int(literal.val)


_DRAWS = 8
"""Most weights of one module, not counting those of modules below it, whose keys are recognised."""


class _Draw:
    """Equations that draw random numbers and compute with them.

    The bits that JAX draws at a position do not depend on how many it draws. So where all that follows is computed number by
    number, as the usual initialisers do, one program of a large size serves every smaller shape. Compiling a draw takes longer
    than most programs of a network take.
    """

    def __init__(self, equations: Sequence[FlatEquation], asked: Sequence[Any]) -> None:
        wanted = {v for v in asked if isinstance(v, Value)}
        made = [v for e in equations for v in e.outputs]
        read = dict.fromkeys(a for e in equations for a in e.inputs if isinstance(a, Value))
        self._inputs = tuple(v for v in read if v not in set(made))
        self._outputs = tuple(v for v in made if v in wanted)
        shape = self._outputs[0].aval.shape
        self._shape = shape if all(_is_pointwise(e, shape) for e in equations) else None
        if self._shape is not None:
            size = _SMALLEST_DRAW
            while size < math.prod(shape):
                size *= 4
            equations, values = _in_line(equations, shape, size)
            self._read = tuple(values.get(v, v) for v in self._inputs)
            self._written = tuple(values[v] for v in self._outputs)
        else:
            self._read, self._written = self._inputs, self._outputs
        self._equations = tuple(equations)
        self._key = "draw", equations_key(self._equations, self._read, self._written)

    def program(self, cache: ProgramCache) -> Program:
        """The program that draws and computes."""
        return cache.get(self._key, self._compute, [v.aval for v in self._read])

    def run(self, known: dict[Value, Any], cache: ProgramCache) -> None:
        """Computes its outputs from what is known."""
        arrays = [known[v] for v in self._inputs]
        if self._shape is not None:
            arrays = [
                a if _is_key(v) else a.reshape(1) for v, a in zip(self._inputs, arrays, strict=True)
            ]
        found = self.program(cache).run(*arrays)
        if self._shape is not None:
            count = math.prod(self._shape)
            found = [np.asarray(f)[:count].reshape(self._shape) for f in found]
        known.update(zip(self._outputs, found, strict=True))

    def _compute(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        env = dict(zip(self._read, arrays, strict=True))
        run_equations(self._equations, env)
        return tuple(env[v] for v in self._written)


_SMALLEST_DRAW = 4096
_POINTWISE = frozenset(
    (
        "add", "sub", "mul", "div", "max", "min", "neg", "sign", "sqrt", "rsqrt", "exp", "log", "log1p", "erf", "erf_inv",
        "tanh", "pow", "integer_pow", "convert_element_type", "bitcast_convert_type", "shift_right_logical", "or", "and",
        "xor", "select_n", "lt", "le", "gt", "ge", "eq", "ne", "copy", "stop_gradient",
    )
)  # fmt: skip


def _is_pointwise(equation: FlatEquation, shape: tuple[int, ...]) -> bool:
    """Whether an equation computes arrays of a shape number by number, from such arrays and single numbers."""
    if equation.primitive.name == "random_bits":
        (key,) = equation.inputs
        partitionable = bool(jax.config.values["jax_threefry_partitionable"])
        return partitionable and "key<fry>[]" in key.aval.str_short()
    values: list[Any] = [*equation.inputs, *equation.outputs]
    return equation.primitive.name in _POINTWISE and all(
        math.prod(v.aval.shape) == 1 or v.aval.shape == shape for v in values
    )


def _in_line(
    equations: Sequence[FlatEquation], shape: tuple[int, ...], size: int
) -> tuple[list[FlatEquation], dict[Value, Value]]:
    """Pointwise equations with `[size]` in the place of a shape, and which value became which."""
    values: dict[Value, Value] = {}

    def flat(atom: Any) -> Any:
        if not isinstance(atom, Value) or _is_key(atom):
            return atom
        if atom not in values:
            long = atom.aval.shape == shape
            values[atom] = Value(atom.aval.update(shape=(size,) if long else (1,)))
        return values[atom]

    found = []
    for e in equations:
        params = {**e.params, "shape": (size,)} if e.primitive.name == "random_bits" else e.params
        inputs, outputs = (tuple(map(flat, atoms)) for atoms in (e.inputs, e.outputs))
        found.append(FlatEquation(e.primitive, params, inputs, outputs, e.path))
    return found, values


def _is_key(value: Value) -> bool:
    return bool(jnp.issubdtype(value.aval.dtype, jax.dtypes.prng_key))


def _rngs(key: jax.Array, path: Path) -> dict[str, Any]:
    """The streams of `core.example.rngs` as a module at a path sees them: Flax folds in the path when it makes a key."""
    roots = rngs(key)
    return {name: LazyRng.create(root, *path) for name, root in roots.items()}


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
