"""Each rule of the TVM backend against JAX itself, on small random arrays and on the edges of what numbers can be."""

import dataclasses
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

pytest.importorskip("tvm_ffi")

from nnopt.backends.tvm import TvmBackend
from nnopt.backends.tvm.emit import load_rules
from nnopt.backends.tvm.scalars import NAMES, expressions
from nnopt.errors import UnsupportedPrimitiveError

TVM = TvmBackend(threads=1)
RANDOM = np.random.default_rng(0)
EDGES = np.array(
    [
        0, -0.0, 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, 1e-3, -1e-3, 1e-7, -1e-7, 1e-30, -1e-30, 3, -3, 9, -9, 20, -20, 88, -80, -200,
        200, 1e10, -1e10, 1e38, -1e38, np.inf, -np.inf, np.nan,
    ],
    np.float32,
)  # fmt: skip


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def integers(low, high, *shape):
    return jnp.asarray(RANDOM.integers(low, high, shape), jnp.int32)


def agrees(function, *inputs, rtol=1e-5, atol=2e-6, backend=TVM):
    """Compiles and compares all outputs: structure, shapes, types, numbers, NaN at the same places."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got, want = backend.compile(function, inputs).outputs(), function(*inputs)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for i, (g, w) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), i
        np.testing.assert_allclose(g, w, rtol=rtol, atol=atol, err_msg=f"output {i}")


# --- element-wise ---

FUNCTIONS = {
    "exp": jnp.exp, "exp2": jnp.exp2, "log": jnp.log, "log1p": jnp.log1p, "expm1": jnp.expm1, "tanh": jnp.tanh,
    "logistic": lax.logistic, "sqrt": jnp.sqrt, "rsqrt": lax.rsqrt, "square": lax.square, "erf": lax.erf, "erfc": lax.erfc,
    "sin": jnp.sin, "cos": jnp.cos, "tan": jnp.tan, "asin": jnp.arcsin, "acos": jnp.arccos, "atan": jnp.arctan, "sinh": jnp.sinh,
    "cosh": jnp.cosh, "asinh": jnp.arcsinh, "acosh": jnp.arccosh, "atanh": jnp.arctanh, "cbrt": jnp.cbrt, "floor": jnp.floor,
    "ceil": jnp.ceil, "round": jnp.round, "round_away": lax.round, "sign": jnp.sign, "abs": jnp.abs, "neg": lambda x: -x,
    "cube": lambda x: x**3, "inverse_square": lambda x: x**-2, "is_finite": jnp.isfinite, "is_nan": jnp.isnan,
}  # fmt: skip


@pytest.fixture(scope="module")
def of_one_number():
    """Numbers, and what each function makes of them: by TVM in float32, by JAX in float64."""
    x = np.concatenate(
        [EDGES, RANDOM.normal(0, 3, 1000), RANDOM.uniform(-1e-2, 1e-2, 300), RANDOM.uniform(-80, 80, 301)]
    ).astype(np.float32)  # fmt: skip
    compiled = TVM.compile(lambda x: {n: f(x) for n, f in FUNCTIONS.items()}, (jnp.asarray(x),))
    got = jax.tree.map(np.asarray, compiled.outputs())
    with jax.enable_x64(True):
        want = {n: np.asarray(f(jnp.asarray(x, jnp.float64))) for n, f in FUNCTIONS.items()}
    return x, got, want


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number_are_exact(of_one_number, name):
    x, got, want = (v[name] if isinstance(v, dict) else v for v in of_one_number)
    if got.dtype == bool:
        np.testing.assert_array_equal(got, want)
        return
    with np.errstate(over="ignore"):
        single = want.astype(np.float32)
    # What is smaller is flushed to zero by some and not by others; cancellation near a zero is relative to 1.
    usual = np.isfinite(single) & (np.abs(want) > 1.2e-38)
    error = np.abs(got[usual] - want[usual]) / np.abs(want[usual])
    assert error.max() < 6e-7, (x[usual][error.argmax()], error.max())
    rare = ~np.isfinite(single)
    np.testing.assert_array_equal(got[rare], single[rare])
    np.testing.assert_allclose(got[~usual & ~rare], 0, atol=1.2e-38)


def test_every_elementwise_rule_has_an_expression():
    assert set(NAMES) == set(expressions())
    assert set(NAMES) <= set(load_rules())


BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "max": jnp.maximum,
    "min": jnp.minimum, "rem": lax.rem, "mod": operator.mod, "floor_divide": operator.floordiv, "pow": lambda x, y: jnp.abs(x) ** y,
    "atan2": jnp.arctan2,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "logaddexp": jnp.logaddexp, "where": lambda x, y: jnp.where(x > y, x, y), "clip": lambda x, y: jnp.clip(x, -jnp.abs(y), 2.0),
    "clamp": lambda x, y: lax.clamp(-1.0, x, 1.0), "max_constant": lambda x, y: (jnp.maximum(x, 0), jnp.maximum(0.0, x)),
    "min_constant": lambda x, y: (jnp.minimum(x, 1.5), jnp.minimum(1.5, x)),
}  # fmt: skip


def test_functions_of_two_numbers():
    pairs = np.array(list(itertools.product(EDGES[np.abs(EDGES) != 1e38], repeat=2)), np.float32)
    usual = RANDOM.normal(0, 2, (200, 2)).astype(np.float32)
    # At the edges: what is NaN, where signs and infinities go. Powers and remainders of huge numbers are the C library's matter.
    special = {
        k: f
        for k, f in BINARY.items()
        if k not in ("pow", "rem", "mod", "floor_divide", "logaddexp")
    }
    agrees(lambda x, y: {k: f(x, y) for k, f in special.items()}, *jnp.asarray(pairs).T)
    agrees(lambda x, y: {k: f(x, y) for k, f in BINARY.items()}, *jnp.asarray(usual).T)


def test_integers():
    a, b = integers(-50, 50, 3, 8), integers(1, 9, 3, 8)
    agrees(
        lambda a, b: (
            a + b, a * b, a - b, a // b, a % b, lax.div(a, b), lax.rem(a, b), jnp.maximum(a, b), jnp.minimum(a, b), -a, abs(a),
            jnp.sign(a), a & b, a | b, a ^ b, ~a, a**3, a > b, a == b, a != b, lax.clamp(0, a, 7), a.astype(jnp.float32),
            a.astype(bool), a.sum(1), a.max(0), a.min(), a @ b.T,
        ),
        a, b,
    )  # fmt: skip


def mixed(x):
    """The bits of a hash, which come from products and sums that overflow."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) + jnp.uint32(0xFFFFFFFF)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35) - jnp.uint32(0x80000000)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int8", "uint8"])
def test_integers_that_overflow_or_divide_by_zero(dtype):
    low, high = (int(v) for v in (jnp.iinfo(dtype).min, jnp.iinfo(dtype).max))
    edges = sorted(
        {low, low + 1, high, high // 2 + 1, high - 1, 0, 1, 3, max(low, -1), max(low, -7)}
    )
    a, b = np.array(list(itertools.product(edges, repeat=2))).T.astype(dtype)
    constants = [np.asarray(c, dtype) for c in (low, high, 0)]

    def function(a, b):
        of_two = [
            a + b,
            a - b,
            a * b,
            lax.div(a, b),
            lax.rem(a, b),
            a // b,
            a % b,
            -a,
            abs(a),
            a**3,
            lax.square(a),
            a + 1 > a,
        ]
        pairs = (operator.add, operator.sub, operator.mul, lax.div, lax.rem)
        with_one = [f(*pair) for f in pairs for c in constants for pair in ((a, c), (c, a))]
        return of_two, with_one, mixed(a) if a.dtype == "uint32" else (a + b) - b

    agrees(function, jnp.asarray(a), jnp.asarray(b))


def test_sums_are_rounded_where_they_stand():
    """TVM's own simplification would take `(x + y) - y` for `x`, and what is multiplied by zero for zero."""
    x = jnp.concatenate([normal(20) * 4, jnp.asarray([np.nan, np.inf, -np.inf, 0, -0.0])])
    agrees(
        lambda x, y: (
            (x + 12582912.0) - 12582912.0, (x + 1e8) - 1e8, (x + y) - y, y - (y + x), 1 - (1 + x), (x - 1e8) + 1e8, x - x, x * 0,
            0 * (x + y), x / 0, 0 / x, jnp.maximum(x, 1e8) - 1e8,
        ),
        x, normal(25) * 1e8,
    )  # fmt: skip


def test_shifts():
    a, by = integers(-(2**31), 2**31 - 1, 3, 8), integers(-2, 40, 3, 8)
    shifts = (lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical)
    agrees(lambda a, by: [f(a, by) for f in shifts], a, by)
    agrees(
        lambda a, by: [f(a, by) for f in shifts], a.view(jnp.uint32), jnp.abs(by).view(jnp.uint32)
    )


def test_booleans_and_bytes():
    a, b = normal(3, 8) > 0, normal(3, 8) > 0
    agrees(
        lambda a, b: (
            a & b, a | b, a ^ b, ~a, a == b, a != b, a.astype(jnp.float32), a.astype(jnp.int32), jnp.where(a, 1.0, 2.0), a.any(1),
            a.all(0), a.sum(), jnp.concatenate([a, b]), jnp.maximum(a, b), jnp.minimum(a, b), a < b, a <= b, a > b, a >= b,
            a.max(1), a.min(0), a.max(), a.argmax(1), b.argmin(0), a @ b.T, (a & ~a) @ jnp.ones((8, 2), bool),
            lax.clamp(a, b, True), nn.max_pool(a[None, ..., None], (2, 2)),
            lax.reduce_window(a, False, lax.max, (2, 1), (1, 1), "SAME"),
        ),
        a, b,
    )  # fmt: skip
    byte = jnp.arange(250, 256, dtype=jnp.uint8)
    agrees(
        lambda x: (
            x + jnp.uint8(3),
            x * x,
            x.astype(jnp.float32),
            x.astype(jnp.int32) - 255,
            jnp.sign(x),
        ),
        byte,
    )


def test_casts_cut_off_and_stay_in_range():
    x = jnp.asarray([2.7, -2.7, 1e20, -1e20, np.nan, np.inf, -np.inf, 255.5, -0.3])
    types = (jnp.int32, jnp.uint8, jnp.int8, jnp.uint32, bool)
    agrees(lambda x: [x.astype(t) for t in types], x)


def test_select_among_several():
    agrees(lambda w, x: lax.select_n(w, x, x + 1, x * 2), integers(0, 3, 4, 5), normal(4, 5))


def test_constants_stay_small_and_operands_broadcast():
    def function(x, s):
        row = jnp.arange(4.0) * 2 + 1
        grid = jnp.broadcast_to(row[:, None], (4, 6)).T
        return x * row + s, x[:, :1] + grid, jnp.full((2, 3), 7.0), jnp.broadcast_to(s, (2, 2))

    agrees(function, normal(6, 4), jnp.float32(2.5))


def test_outputs_of_all_kinds():
    x = normal(2, 3)
    agrees(lambda x: x, x)
    agrees(lambda x: {"same": x, "twice": (x + 1, x + 1), "constant": jnp.ones((2, 3)), "number": x.sum()}, x)  # fmt: skip
    agrees(lambda x: x * 2, jnp.float32(1.5))


def test_plain_loops_are_right_too():
    agrees(
        lambda x: (nn.softmax(x), x @ x.T, x.argmax(-1)),
        normal(5, 7),
        backend=TvmBackend(threads=1, scheduled="none"),
    )


ACTIVATIONS = (
    "relu", "relu6", "sigmoid", "softplus", "sparse_plus", "sparse_sigmoid", "soft_sign", "silu", "log_sigmoid", "leaky_relu",
    "hard_sigmoid", "hard_silu", "hard_tanh", "elu", "celu", "selu", "gelu", "squareplus", "mish", "identity", "standardize",
    "softmax", "log_softmax", "glu", "logsumexp",
)  # fmt: skip


def test_activations():
    def all_of_them(x):
        made = {name: getattr(jax.nn, name)(x) for name in ACTIVATIONS}
        return made | {
            "gelu_exact": jax.nn.gelu(x, approximate=False),
            "one_hot": jax.nn.one_hot(x.argmax(-1), 8),
            "masked": jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf), where=x > 0),
        }

    agrees(all_of_them, jnp.concatenate([normal(3, 8) * 4, jnp.asarray([[90.0, -90, 0, 30, -30, 1e-5, -1e-5, 5]])]))  # fmt: skip


# --- moving elements ---

X = normal(2, 5, 7, 3)
PLACES = integers(-9, 9, 4, 2)
INSIDE = integers(0, 5, 4, 2)
SHAPES = {
    "slice": lambda x: lax.slice(x, (0, 1, 1, 0), (2, 5, 7, 2), (1, 2, 3, 1)),
    "slice_backwards": lambda x: x[:, ::-2, 1:-1],
    "pad": lambda x: lax.pad(x, 1.5, ((0, 0, 0), (-1, 2, 0), (1, -2, 1), (0, 1, 2))),
    "pad_cuts": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-2, -1, 2), (-3, -2, 1), (0, 0, 0))),
    "pad_with_a_value": lambda x: lax.pad(x, x[0, 0, 0, 0], ((0, 0, 0), (1, 2, 0), (1, 2, 1), (0, 1, 2))),
    "pad_modes": lambda x: [jnp.pad(x[0, 0], 1, mode=m) for m in ("reflect", "wrap", "edge", "symmetric")],
    "rev": lambda x: lax.rev(x, (1, 3)),
    "roll": lambda x: jnp.roll(jnp.flip(x, 2), (2, 1), (1, 2)),
    "take": lambda x: [jnp.take(x, INSIDE, axis=1, mode=m) for m in ("clip", "fill", "wrap")],
    "take_outside": lambda x: [jnp.take(x, PLACES, axis=1, mode=m) for m in ("clip", "fill")],
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (0, 3, 0, 1), (2, 4, 7, 1)),
    "update_slice": lambda x: lax.dynamic_update_slice(x, x[:, :4, :, :1], (0, 3, 0, 1)),
    "set": lambda x: (x.at[:, 1:3].set(0.5), x.at[:, jnp.asarray([4, 0])].set(x[:, :2]), x.at[..., -1].add(2.0)),
    "concatenate": lambda x: jnp.concatenate([x, x[..., :1], jnp.ones((2, 5, 7, 2))], axis=-1),
    "split": lambda x: jnp.split(x, [1, 4], axis=2),
    "stack": lambda x: (jnp.stack([x, x + 1], 1), jnp.unstack(x, axis=3)),
    "transpose": lambda x: (x.transpose(3, 1, 0, 2), x.T, x.swapaxes(1, 2)),
    "reshape": lambda x: (x.reshape(10, -1), x.ravel(), x.reshape(2, 5, 7, 1, 3), x[:, None, :, :, None], x[:1].squeeze()),
    "broadcast": lambda x: jnp.broadcast_to(x[:, :1], (2, 5, 7, 3)).reshape(2, 35, 3) + x.reshape(2, 35, 3),
    "broadcast_then_transpose": lambda x: (
        jnp.broadcast_to(x[:, :1, :1], x.shape).transpose(0, 3, 1, 2) * x.transpose(0, 3, 1, 2)
    ),
    "broadcast_out": lambda x: (
        jnp.broadcast_to(x[:, 0, 0][:, None, None, :], (2, 4, 4, 3)), x[:, :, :1] * jnp.ones((1, 1, 9, 3)),
    ),
    "tile": lambda x: (jnp.tile(x, (2, 1, 1, 3)), jnp.repeat(x, 3, axis=1), jnp.tile(x[:, :1], (1, 5, 1, 1))),
    "triangle": lambda x: (jnp.triu(x[0, :, :5, 0]), jnp.tril(x[0, :, :5, 0], -1)),
    "shuffle": lambda x: x.reshape(2, 5, 7, 3, 1).swapaxes(3, 4).reshape(2, 5, 7, 3),
    "empty": lambda x: (x[:0], x[:0].sum(0)),
    "resize": lambda x: [jax.image.resize(x, (2, 10, 4, 3), m) for m in ("nearest", "linear")],
    "resize_cubic": lambda x: jax.image.resize(x[:1, :, :3], (1, 5, 5, 3), "cubic"),
    "named": lambda x: jax.ad_checkpoint.checkpoint_name(x + 1, "a name"),
    "calls": lambda x: (jax.jit(jnp.sin)(x), jax.checkpoint(jnp.cos)(x), lax.stop_gradient(x), lax.optimization_barrier(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_moving_elements(name):
    agrees(SHAPES[name], X)


def test_places_that_depend_on_the_input():
    agrees(
        lambda x, i, k: (
            jnp.take(x, i, axis=1, mode="clip"), jnp.take(x, i, axis=1, mode="fill"), x[:, k[:, 0], k[:, 1]],
            x.at[:, k[:, 0]].get(mode="promise_in_bounds"), jnp.take_along_axis(x[0, :, :, 0], k[None, :, 0], axis=1),
            lax.dynamic_slice_in_dim(x, i[0, 0], 2, 1), lax.dynamic_update_slice_in_dim(x, x[:, :2], i[1, 1], 1),
            jnp.take(k, i[:, 0], axis=0, mode="fill"),
        ),
        X, PLACES, INSIDE,
    )  # fmt: skip


def test_a_table_of_words():
    table = nn.Embed(11, 8)
    tokens = integers(0, 11, 2, 5)
    variables = table.init(jax.random.key(0), tokens)
    agrees(lambda t: table.apply(variables, t), tokens)


# --- reductions ---

NOT_A_NUMBER = X.at[0, 0, 0, 0].set(np.nan).at[0, 4, 2, 2].set(np.nan).at[1, 4, 2, 2].set(np.nan)
REDUCTIONS = {
    "sums": lambda x: (x.sum(1), x.sum((1, 2)), x.sum((0, 3)), x.mean((1, 2)), x.var(-1), x.std(0), x.prod(1), x.sum()),
    "extremes": lambda x: (x.max((1, 2)), x.min(3), x.max(), x.max(0), x.min((0, 1, 2))),
    "logical": lambda x: ((x > 0).any(1), (x > 0).all((1, 2)), (x > -9).all()),
    "places": lambda x: (x.argmax(-1), x.argmin(1), x.argmax(2), jnp.argmax(x.reshape(2, -1), 1), x.argmin()),
    "ties": lambda x: (jnp.round(x).argmax(-1), jnp.round(x).argmin(1), (x * 0).argmax(2)),
    "cumulative": lambda x: (
        jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True), jnp.cumprod(x, 3), lax.cummax(x, 1), lax.cummin(x, 1, reverse=True),
    ),
    "norms": lambda x: (jnp.linalg.norm(x, axis=-1), jax.nn.logsumexp(x, (1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name):
    agrees(REDUCTIONS[name], X, rtol=1e-4)


@pytest.mark.parametrize("array", [NOT_A_NUMBER, X.at[0, :, 2].set(-np.inf).at[1].set(np.inf)])
def test_reductions_of_what_is_no_number(array):
    agrees(lambda x: (REDUCTIONS["extremes"](x), REDUCTIONS["places"](x), lax.cummax(x, 1)), array)
    pool = {"window_shape": (3, 2), "strides": (2, 1), "padding": "SAME"}
    agrees(
        lambda x: (nn.max_pool(x, **pool), nn.relu(x), nn.relu6(x), -nn.max_pool(-x, **pool)), array
    )


def window(combine, start, size, strides, padding, base=None, dilation=None):
    return lambda x: lax.reduce_window(x, start, combine, size, strides, padding, base, dilation)


@pytest.mark.parametrize(
    "kind", [(lax.add, 0.0), (lax.max, -np.inf), (lax.min, np.inf), (lax.max, 0.0), (lax.mul, 1.0)]
)  # fmt: skip
def test_windows(kind):
    size = (1, 2, 2, 1)
    forms = (
        window(*kind, (1, 3, 2, 1), (1, 2, 1, 1), "SAME"),
        window(*kind, (1, 3, 2, 1), (1, 2, 3, 1), "VALID"),
        window(*kind, size, (1, 1, 2, 1), ((0, 0), (2, 1), (0, 3), (0, 0)), None, (1, 2, 3, 1)),
        window(
            *kind, size, (1, 1, 2, 1), ((0, 0), (2, 1), (0, 3), (0, 0)), (1, 2, 3, 1), (1, 2, 1, 1)
        ),
        window(*kind, size, (1, 1, 1, 1), ((0, 0), (-1, 1), (1, -2), (0, 0))),
        window(*kind, (2, 3, 2, 3), (1, 2, 1, 1), "SAME"),
    )
    agrees(lambda x: [f(x) for f in forms], X)


def test_pools_of_one_to_three_axes():
    for shape in ((2, 9, 3), (2, 6, 7, 3), (1, 4, 5, 6, 3)):
        size = (3, 2, 2)[: len(shape) - 2]
        for padding in ("SAME", [(1, 0)] * len(size)):
            settings = {"window_shape": size, "strides": size[::-1], "padding": padding}
            agrees(
                lambda x, s=settings: (nn.max_pool(x, **s), nn.avg_pool(x, **s), nn.avg_pool(x, **s, count_include_pad=False)),
                normal(*shape),
            )  # fmt: skip


# --- products ---

PRODUCTS = (
    ("bij,bjk->bik", (3, 4, 5), (3, 5, 6)), ("ij,jk->ik", (4, 5), (5, 6)), ("ij,kj->ki", (4, 5), (6, 5)),
    ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)), ("bijh,bkjh->bhik", (2, 3, 4, 5), (2, 6, 4, 5)), ("ij,ij->", (4, 5), (4, 5)),
    ("i,j->ij", (4,), (5,)), ("ijk,kji->j", (3, 4, 5), (5, 4, 3)), ("abc,cd->abd", (2, 3, 4), (4, 17)), ("ij,j->i", (33, 5), (5,)),
    ("abcd,bd->acb", (2, 3, 1, 5), (3, 5)),
)  # fmt: skip


@pytest.mark.parametrize(("equation", "left", "right"), PRODUCTS)
def test_products(equation, left, right):
    a, b = normal(*left), normal(*right)
    agrees(lambda x, y: (jnp.einsum(equation, x, y), jnp.einsum(equation, x, b), jnp.einsum(equation, a, y)), a, b)  # fmt: skip


def test_products_of_nothing():
    agrees(
        lambda x, y: (
            x[:, :0] @ y[:0], x[:0] @ y, x @ y[:, :0], x[:, :0] @ jnp.ones((0, 5)), x[:0] @ jnp.ones((3, 5)), x @ jnp.ones((3, 0)),
            jnp.ones((5, 0)) @ x[:, :0].T, jnp.einsum("ij,ij->", x[:0], x[:0]),
            jnp.einsum("bij,bjk->bik", x[:0, None], x[:0, :, None]),
        ),
        normal(4, 3), normal(3, 5),
    )  # fmt: skip


def test_products_that_widen():
    a, b = integers(-99, 99, 4, 5).astype(jnp.int8), integers(-99, 99, 5, 6).astype(jnp.int8)
    agrees(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.int32), a, b)


# --- convolutions ---


@dataclasses.dataclass(frozen=True)
class Conv:
    """One form of a convolution, channels second in all that is given here."""

    inputs: int
    outputs: int
    size: tuple
    window: tuple
    strides: tuple = (1, 1)
    padding: tuple | str = "SAME"
    base: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    batch: int = 1
    orders: tuple = ((0, 2, 3, 1), (2, 3, 1, 0), (0, 2, 3, 1))

    def arrays(self):
        x = normal(self.batch, self.inputs, *self.size)
        k = normal(self.outputs, self.inputs // self.groups, *self.window)
        return x.transpose(self.orders[0]), k.transpose(self.orders[1])

    def __call__(self, x, k):
        places = [tuple(int(i) for i in np.argsort(o)) for o in self.orders]
        return lax.conv_general_dilated(
            x, k, self.strides, self.padding, self.base, self.dilation, lax.ConvDimensionNumbers(*places), self.groups
        )  # fmt: skip


ONE, THREE = ((0, 2, 1), (2, 1, 0), (0, 2, 1)), ((0, 2, 3, 4, 1), (2, 3, 4, 1, 0), (0, 2, 3, 4, 1))
CONVOLUTIONS = {
    "dense": Conv(3, 16, (6, 7), (3, 3), batch=2),
    "odd": Conv(5, 33, (5, 6), (3, 2), (2, 1)),
    "one channel": Conv(1, 1, (5, 6), (3, 3)),
    "narrow": Conv(17, 3, (4, 4), (1, 1), batch=3),
    "stride": Conv(8, 8, (9, 9), (3, 3), (2, 3), "VALID"),
    "dilation": Conv(4, 8, (9, 8), (3, 2), dilation=(2, 3)),
    "asymmetric": Conv(4, 8, (5, 5), (3, 3), (2, 2), ((0, 1), (2, 0))),
    "cut": Conv(4, 8, (8, 8), (3, 3), (1, 2), ((-1, 2), (1, -3))),
    "groups": Conv(8, 16, (5, 5), (3, 3), groups=4, batch=2),
    "groups of 3": Conv(6, 9, (5, 5), (3, 3), groups=3),
    "groups of 17": Conv(6, 34, (5, 4), (3, 3), groups=2),
    "depthwise": Conv(16, 16, (6, 6), (3, 3), (2, 2), groups=16),
    "depthwise odd": Conv(5, 5, (6, 6), (3, 3), groups=5, batch=2),
    "depthwise 33": Conv(33, 33, (4, 4), (3, 3), groups=33),
    "multiplier": Conv(4, 12, (5, 5), (3, 3), groups=4),
    "transposed": Conv(4, 6, (4, 5), (3, 3), padding=((1, 2), (2, 2)), base=(2, 2)),
    "transposed groups": Conv(6, 6, (4, 5), (2, 3), padding=((1, 1), (2, 2)), base=(2, 3), groups=2),
    "one axis": Conv(5, 7, (9,), (3,), (2,), ((1, 0),), (1,), (2,), orders=ONE),
    "three axes": Conv(3, 5, (4, 3, 5), (2, 3, 1), (1, 2, 1), "SAME", (1, 1, 1), (1, 1, 2), orders=THREE),
    "channels first": Conv(4, 8, (5, 6), (3, 3), orders=((0, 1, 2, 3),) * 3),
    "any order": Conv(4, 6, (5, 6), (3, 2), orders=((3, 1, 0, 2), (1, 3, 2, 0), (2, 0, 3, 1)), batch=2),
    "no image": Conv(4, 6, (5, 6), (3, 3), batch=0),
    "no inputs": Conv(0, 6, (5, 6), (3, 3)),
    "no outputs": Conv(4, 0, (5, 6), (3, 3)),
    "smaller than its window": Conv(4, 6, (2, 6), (3, 3), padding="VALID"),
    "no axes": Conv(4, 6, (), (), (), (), (), (), groups=2, batch=3, orders=((0, 1), (1, 0), (0, 1))),
    "whole image": Conv(4, 6, (5, 6), (5, 6), padding="VALID"),
    "one pixel": Conv(20, 40, (1, 1), (3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    conv = CONVOLUTIONS[name]
    x, k = conv.arrays()
    agrees(lambda x: (conv(x, k), nn.relu(conv(x, k) * 2 + 1)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "odd",
        "groups of 3",
        "depthwise odd",
        "multiplier",
        "transposed",
        "any order",
        "no inputs",
        "no axes",
    ],
)
def test_kernels_that_are_no_constants(name):
    conv = CONVOLUTIONS[name]
    agrees(conv, *conv.arrays(), rtol=1e-4, atol=1e-4)


def test_what_follows_a_convolution_need_not_be_in_place():
    conv = Conv(4, 8, (6, 6), (3, 3))
    x, k = conv.arrays()
    agrees(
        lambda x: (
            conv(x, k).transpose(0, 2, 1, 3) * 2, jnp.flip(conv(x + 1, k), 1) + 1, conv(x + 2, k)[:, 1:, ::2] * 3,
            conv(x + 3, k).reshape(1, -1), conv(x + 4, k).sum((1, 2)), nn.max_pool(conv(x + 5, k), (2, 2)),
            conv(x + 6, k) + jnp.roll(conv(x + 6, k), 1, 1), jnp.pad(conv(x + 7, k), ((0, 0), (1, 1), (0, 0), (0, 0))),
        ),
        x, rtol=1e-4, atol=1e-4,
    )  # fmt: skip


# --- loops and branches ---


def test_loops():
    def running(x, reverse=False):
        def step(total, y):
            return total * 0.5 + y.sum(), (total, y * 2)

        return lax.scan(step, jnp.float32(0), x, reverse=reverse)

    agrees(
        lambda x: (
            running(x), running(x, True), lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0],
            lax.scan(lambda c, i: (c * 2, i), x, jnp.arange(3.0)), lax.fori_loop(0, 4, lambda i, c: c * 1.5 + i, x),
            lax.map(lambda y: y.sum() * y, x), lax.map(lambda y: y.sum() * y, x[:0]), running(x[:0]),
            lax.scan(lambda c, _: (c * 2, (c > 0, c.sum())), x, None, length=0),
        ),
        normal(4, 3),
    )  # fmt: skip


def test_branches_that_are_known():
    agrees(
        lambda x: (
            lax.cond(True, lambda y: y + 1, lambda y: y - 1, x),
            lax.switch(7, [lambda y: y + 1, lambda y: y - 1], x),
        ),
        normal(4, 3),
    )


# --- what is refused ---


class Sorting(nn.Module):
    """Does something in a module of its own that TVM has no rule for."""

    @nn.compact
    def __call__(self, x):
        return jnp.sort(nn.Dense(3, name="dense")(x), axis=-1)


class Outer(nn.Module):
    """Calls it."""

    @nn.compact
    def __call__(self, x):
        return Sorting(name="sorter")(nn.relu(x))


REFUSED = {
    "sort": jnp.sort, "fft": jnp.fft.rfft, "top_k": lambda x: lax.top_k(x, 2),
    "while": lambda x: lax.while_loop(lambda y: y.sum() < 9, jnp.exp, x),
    "cond": lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "scan": lambda x: lax.scan(lambda c, _: (c, None), x, None, length=999)[0],
    "reduce_and": lambda x: lax.reduce_and(x.astype(int), (0,)),
    "reduce_window": lambda x: lax.reduce_window(x, 0.0, lambda a, b: a + a, (2, 1), (1, 1), "VALID"),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16), "scatter-add": lambda x: x.at[jnp.asarray([1, 1])].add(1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_named_in_one_line(name, capfd):
    with pytest.raises(UnsupportedPrimitiveError) as refused:
        TVM.compile(REFUSED[name], (normal(4, 3),))
    message = str(refused.value)
    assert f"primitive {name} " in message
    assert message.count("\n") == 0
    assert capfd.readouterr().err == ""


def test_what_has_no_rule_is_named_with_its_place(capfd):
    net, x = Outer(), normal(4, 3)
    variables = net.init(jax.random.key(0), x)
    with pytest.raises(
        UnsupportedPrimitiveError, match=r"primitive sort .* in sorter; use the backend xla"
    ):
        TVM.compile(lambda x: net.apply(variables, x), (x,))
    assert capfd.readouterr().err == ""
