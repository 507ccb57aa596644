"""Every row of the table against `jax.vjp`: values, special values, dtypes, differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close, assert_same_vjp, on_cpu
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import fbackprop as fb
from fbackprop.program import bodies, program_of
from fbackprop.table import TABLE, LocalRule

SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e-30, 3e30, np.inf, -np.inf, np.nan])
X = np.array([[0.3, -1.2, 0.7], [2.1, 0.4, -0.6]])
Y = np.array([[1.1, 0.2, -0.9], [0.8, -1.7, 0.35]])
P = np.abs(X) + 0.1  # positive
U = X / 3  # in the open unit interval around zero
KEY = jax.random.key(0)

UNARY = {
    "neg": (jnp.negative, X),
    "sign": (jnp.sign, X),
    "floor": (jnp.floor, X),
    "ceil": (jnp.ceil, X),
    "round": (jnp.round, X),
    "is_finite": (lambda x: x * jnp.isfinite(x), X),
    "abs": (jnp.abs, X),
    "exp": (jnp.exp, X),
    "exp2": (jnp.exp2, X),
    "expm1": (jnp.expm1, X),
    "log": (jnp.log, P),
    "log2": (jnp.log2, P),
    "log1p": (jnp.log1p, P),
    "sqrt": (jnp.sqrt, P),
    "rsqrt": (lax.rsqrt, P),
    "cbrt": (jnp.cbrt, P),
    "square": (jnp.square, X),
    "sin": (jnp.sin, X),
    "cos": (jnp.cos, X),
    "tan": (jnp.tan, X),
    "asin": (jnp.arcsin, U),
    "acos": (jnp.arccos, U),
    "atan": (jnp.arctan, X),
    "sinh": (jnp.sinh, X),
    "cosh": (jnp.cosh, X),
    "tanh": (jnp.tanh, X),
    "tanh's derivative": (lambda x: jax.jvp(jnp.tanh, (x,), (jnp.ones_like(x),))[1], X),
    "asinh": (jnp.arcsinh, X),
    "acosh": (jnp.arccosh, P + 1),
    "atanh": (jnp.arctanh, U),
    "logistic": (jax.nn.sigmoid, X),
    "erf": (lax.erf, X),
    "erfc": (lax.erfc, X),
    "erf_inv": (lax.erf_inv, U),
    "lgamma": (lax.lgamma, P),
    "digamma": (lax.digamma, P),
    "bessel_i0e": (lax.bessel_i0e, X),
    "bessel_i1e": (lax.bessel_i1e, X),
    "stop_gradient": (lambda x: x * lax.stop_gradient(x), X),
    "copy": (lambda x: lax.optimization_barrier(jnp.copy(x)), X),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), X),
    "device_put": (lambda x: jax.device_put(x, jax.devices()[0]) * 2, X),
    "name": (lambda x: checkpoint_name(x, "x") * 2, X),
    **{f"integer_pow {n}": (lambda x, n=n: lax.integer_pow(x, n), P) for n in (-3, -1, 0, 1, 2, 5)},
}

BINARY = {
    "add": (jnp.add, X, Y),
    "sub": (jnp.subtract, X, Y),
    "mul": (jnp.multiply, X, Y),
    "div": (jnp.divide, X, Y),
    "rem": (lax.rem, X, Y),
    "pow": (jnp.power, P, Y),
    "atan2": (jnp.arctan2, X, Y),
    "max": (jnp.maximum, X, Y),
    "min": (jnp.minimum, X, Y),
    "select_n": (lambda x, y: jnp.where(x > y, x, 2 * y), X, Y),
    "add_any": (lambda x, y: jax.jvp(lambda x: x * x, (x,), (y,))[1], X, Y),
}


def conv(lhs, rhs, spec, **options):
    options = {"window_strides": (1,) * (len(lhs) - 2), "padding": "VALID"} | options
    a = np.sin(np.arange(np.prod(lhs), dtype=np.float64)).reshape(lhs)
    b = np.cos(np.arange(np.prod(rhs), dtype=np.float64)).reshape(rhs)
    return (
        lambda x, k: lax.conv_general_dilated(x, k, dimension_numbers=spec, **options),
        a,
        b,
    )


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CONVOLUTIONS = {
    "plain": conv((2, 5, 6, 3), (3, 2, 3, 4), NHWC),
    "same, strided": conv((2, 5, 6, 3), (3, 3, 3, 4), NHWC, window_strides=(2, 3), padding="SAME"),
    "padded": conv((2, 3, 5, 6), (4, 3, 3, 2), NCHW, padding=[(2, 1), (0, 3)]),
    "negative padding": conv((2, 3, 6, 7), (4, 3, 2, 2), NCHW, padding=[(-1, 1), (1, -2)]),
    "kernel dilated": conv((2, 6, 7, 3), (2, 3, 3, 4), NHWC, rhs_dilation=(3, 2)),
    "image dilated": conv(
        (2, 4, 3, 3), (3, 3, 3, 4), NHWC, lhs_dilation=(2, 3), padding=[(1, 1), (2, 0)]
    ),
    "all at once": conv(
        (2, 5, 4, 3), (2, 3, 3, 4), NHWC, lhs_dilation=(2, 1), rhs_dilation=(1, 2),
        window_strides=(2, 1), padding=[(1, 2), (3, 0)],
    ),
    "groups": conv((2, 5, 5, 4), (3, 3, 2, 6), NHWC, feature_group_count=2),
    "depthwise": conv((2, 5, 5, 3), (3, 3, 1, 6), NHWC, feature_group_count=3),
    "batch groups": conv((4, 5, 5, 3), (3, 3, 3, 6), NHWC, batch_group_count=2),
    "one dimension": conv((2, 7, 3), (3, 3, 2), ("NWC", "WIO", "NWC"), window_strides=(2,)),
    "three dimensions": conv((1, 2, 3, 4, 3), (2, 2, 1, 2, 3), ("NCDHW", "DHWIO", "NCDHW")),
    "mixed layout": conv((5, 2, 6, 3), (4, 3, 2, 3), ("HNWC", "OIHW", "WCNH")),
}  # fmt: skip


def dot(lhs, rhs, contract, batch=((), ()), **options):
    a = np.sin(np.arange(np.prod(lhs), dtype=np.float64)).reshape(lhs)
    b = np.cos(np.arange(np.prod(rhs), dtype=np.float64)).reshape(rhs)
    return (lambda x, y: lax.dot_general(x, y, (contract, batch), **options), a, b)


PRODUCTS = {
    "matrix": dot((2, 3), (3, 4), ((1,), (0,))),
    "both transposed": dot((3, 2), (4, 3), ((0,), (1,))),
    "vectors": dot((3,), (3,), ((0,), (0,))),
    "outer": dot((2,), (3, 2), ((), ())),
    "batched": dot((5, 2, 3), (5, 3, 4), ((2,), (1,)), ((0,), (0,))),
    "batch in the middle": dot((2, 5, 3), (3, 4, 5), ((2,), (0,)), ((1,), (2,))),
    "two contracted, crossed": dot((2, 3, 4), (4, 5, 3), ((1, 2), (2, 0))),
    "two batches, crossed": dot((2, 3, 4), (3, 4, 2), ((2,), (1,)), ((0, 1), (2, 0))),
    "wider result": dot((2, 3), (3, 4), ((1,), (0,)), preferred_element_type=np.float64),
}

LAYOUTS = {
    "reshape": lambda x: jnp.reshape(x, (3, 2)),
    "reshape, other order": lambda x: lax.reshape(x, (6,), (1, 0)),
    "ravel in column order": lambda x: jnp.ravel(x, order="F"),
    "squeeze": lambda x: jnp.squeeze(x[:, :1] * x[:, 1:2], 1),
    "expand_dims": lambda x: x[:, None] * x[None],
    "broadcast": lambda x: jnp.broadcast_to(x[:, :1], (4, 2, 3)),
    "tile": lambda x: jnp.tile(x, (2, 3)),
    "transpose": jnp.transpose,
    "rev": lambda x: lax.rev(x, (0, 1)),
    "slice": lambda x: lax.slice(x, (0, 1), (2, 3)),
    "slice, strided": lambda x: lax.slice(jnp.tile(x, (3, 3)), (1, 0), (6, 8), (2, 3)),
    "slice, empty": lambda x: x[:, 3:],
    "pad": lambda x: lax.pad(x, x[0, 0], ((1, 2, 0), (0, 1, 1))),
    "pad, negative": lambda x: lax.pad(x, x[0, 0], ((-1, 1, 0), (2, -1, 2))),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x, x[:1]], 0),
    "split": lambda x: lax.split(x, (1, 2), 1)[1] * 3,
    "stack": lambda x: jnp.stack([x, x * x], 1),
    "unstack": lambda x: [a * i for i, a in enumerate(jnp.unstack(x, axis=1))],
    "select among three": lambda x: lax.select_n(
        jnp.arange(6, dtype=np.int32).reshape(2, 3) % 3, x, 2 * x, x * x
    ),
    "select by a scalar": lambda x: lax.select_n(x[0, 0] > 0, x, 2 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "clamp to arrays": lambda x: lax.clamp(x - 1, x * x, x + 0.1),
}

REDUCTIONS = {
    "sum": lambda x: jnp.sum(x, 1),
    "max": lambda x: jnp.max(x, 0),
    "max of ties": lambda x: jnp.max(jnp.round(x), (0, 1)),
    "min": lambda x: jnp.min(x, (0, 1)),
    "prod": lambda x: jnp.prod(x, 1),
    "prod with one zero": lambda x: jnp.prod(x.at[0, 1].set(0.0) * x, 1),
    "prod with two zeros": lambda x: jnp.prod(x * jnp.array([[0, 0, 1]], x.dtype), (0, 1)),
    "argmax": lambda x: x * lax.argmax(x, 1, np.int32)[:, None],
    "logsumexp": lambda x: jax.nn.logsumexp(x, 1),
    "cumsum": lambda x: lax.cumsum(x, 1),
    "cumsum, reverse": lambda x: lax.cumsum(x, 0, reverse=True),
    "cumprod": lambda x: lax.cumprod(x, 1),
    "cumprod with zeros": lambda x: lax.cumprod(jnp.round(x), 1, reverse=True),
    "cummax": lambda x: lax.cummax(jnp.round(x), 1),
    "cummin": lambda x: lax.cummin(x, 0),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 1),
    "sort": lambda x: lax.sort(x, dimension=1),
    "sort, several operands": lambda x: lax.sort((jnp.round(x), x * x, x), dimension=1, num_keys=2),
    "sort with integers": lambda x: lax.sort((x, jnp.arange(6).reshape(2, 3)), dimension=0),
    "median": lambda x: jnp.median(x, 1),
    "top_k": lambda x: lax.top_k(x, 2),
    "top_k, another axis": lambda x: lax.top_k(x, 1, axis=0)[0],
    "approx_max_k": lambda x: lax.approx_max_k(x, 2, reduction_dimension=0),
    "reduce by a function": lambda x: lax.reduce(
        x, np.array(-np.inf, x.dtype), jnp.logaddexp, (1,)
    ),
    "reduce several by a function": lambda x: lax.reduce(
        (x, x * x),
        (np.array(0, x.dtype), np.array(1, x.dtype)),
        lambda a, b: (a[0] + b[0], a[1] * b[1]),
        (0, 1),
    ),
}

INDEX = np.array([1, 0, 1], np.int32)
INDEXING = {
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (1, 5), (1, 2)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(x, x[:1, :2] * 3, (1, -1)),
    "dynamic_slice before the start": lambda x: lax.dynamic_slice(x, (-9, -1), (1, 2)),
    "dynamic_update_slice before the start": (
        lambda x: lax.dynamic_update_slice(x, x[1:, :2] * 3, (-9, -1))
    ),
    "gather": lambda x: x[INDEX],
    "gather, two axes": lambda x: x[INDEX, jnp.array([2, 2, 0])],
    "gather, clipped": lambda x: x.at[jnp.array([5, -7]), 1].get(mode="clip"),
    "gather, filled": lambda x: x.at[jnp.array([5, 1])].get(mode="fill", fill_value=2.0),
    "take_along_axis": lambda x: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
    "set": lambda x: x.at[0].set(2 * x[1]),
    "set, twice the same": lambda x: x.at[INDEX, 0].set(x[0] * jnp.arange(1, 4, dtype=x.dtype)),
    "set, unique": lambda x: x.at[jnp.array([1, 0])].set(x * x, unique_indices=True),
    "add": lambda x: x.at[INDEX].add(x[0] * x[1]),
    "subtract": lambda x: x.at[INDEX, 1].subtract(x[0] * x[1]),
    "add, dropped": lambda x: x.at[jnp.array([1, 9]), 0].add(x[0, :2], mode="drop"),
    "multiply": lambda x: x.at[jnp.array([1, 0]), 0].multiply(x[:, 1], unique_indices=True),
    "max": lambda x: x.at[INDEX, 0].max(x[0]),
    "min": lambda x: x.at[INDEX, 0].min(x[0] * x[1]),
    "max of ties": lambda x: jnp.round(x).at[INDEX, 0].max(jnp.round(x[1])),
    "segment_sum": lambda x: jax.ops.segment_sum(x, jnp.array([1, 1]), 3),
    "vmapped gather": lambda x: jax.vmap(lambda row, i: row[i])(x, jnp.array([2, 0])),
    "vmapped scatter": lambda x: jax.vmap(lambda r, i: r.at[i].set(r[0] * r[2]))(
        x, jnp.array([2, 0])
    ),
}

IMAGE = np.sin(np.arange(40.0)).reshape(1, 5, 8, 1)


def pool(x, init, op, window, strides, padding, base=(1, 1), dilation=(1, 1)):
    return lax.reduce_window(
        x, init, op, (1, *window, 1), (1, *strides, 1), padding,
        base_dilation=(1, *base, 1), window_dilation=(1, *dilation, 1),
    )  # fmt: skip


WINDOWS = {
    "max": lambda x: pool(x, -jnp.inf, lax.max, (2, 2), (2, 2), "SAME"),
    "max, overlapping": lambda x: pool(x, -jnp.inf, lax.max, (3, 2), (1, 1), "VALID"),
    "max of ties": lambda x: pool(jnp.round(x), -jnp.inf, lax.max, (2, 3), (2, 1), "SAME"),
    "max, dilated": lambda x: pool(x, -jnp.inf, lax.max, (2, 2), (1, 2), "SAME", (2, 1)),
    "min": lambda x: pool(x, jnp.inf, lax.min, (2, 2), (2, 2), "SAME"),
    "sum": lambda x: pool(x, 0.0, lax.add, (2, 3), (2, 1), "SAME"),
    "sum, dilated": lambda x: pool(x, 0.0, lax.add, (2, 2), (1, 2), "VALID", (1, 2), (2, 1)),
}

MATRICES = np.sin(np.arange(18.0)).reshape(2, 3, 3) + 2 * np.eye(3)
RIGHT = np.cos(np.arange(12.0)).reshape(2, 3, 2)


def solve(**options):
    """Solve with a triangle of the matrices; what stands outside it must not matter."""
    rights = RIGHT if options["left_side"] else RIGHT.swapaxes(1, 2)
    return (lambda a, b: lax.linalg.triangular_solve(a, b, **options), MATRICES, rights)


LINALG = {
    "solve, lower": solve(left_side=True, lower=True),
    "solve, upper": solve(left_side=True, lower=False),
    "solve, transposed": solve(left_side=True, lower=True, transpose_a=True),
    "solve from the right": solve(left_side=False, lower=False),
    "solve from the right, transposed": solve(left_side=False, lower=True, transpose_a=True),
    "solve, unit diagonal": solve(left_side=True, lower=True, unit_diagonal=True),
}

SQUARE = MATRICES
SPREAD = SQUARE + np.diag([0, 3, 7])  # eigenvalues well apart
TALL = np.sin(np.arange(24.0) ** 1.5).reshape(2, 4, 3)
WIDE = TALL.swapaxes(1, 2)


def spd(a):
    """A positive definite matrix out of any."""
    return jnp.einsum("bij,bkj->bik", a, a.conj()) + jnp.eye(3, dtype=a.dtype)[None]


def hermitian(a):
    return (a + a.swapaxes(1, 2).conj()) / 2


def solve_by_iteration(a, b):
    """A user's own solver, with its own transpose."""

    def solve(matvec, b):
        return lax.fori_loop(0, 40, lambda _, x: x + b - matvec(x), b)

    return lax.custom_linear_solve(lambda x: a @ x, b, solve, transpose_solve=solve)


FACTORISATIONS = {
    "cholesky": (lambda a: lax.linalg.cholesky(spd(a)), SQUARE),
    "cholesky, one triangle": (
        lambda a: lax.linalg.cholesky(spd(a), symmetrize_input=False),
        SQUARE,
    ),
    "lu": (lambda a: lax.linalg.lu(a)[0], SQUARE),
    "lu, tall": (lambda a: lax.linalg.lu(a)[0], TALL),
    "lu, wide": (lambda a: lax.linalg.lu(a)[0], WIDE),
    "qr": (lambda a: lax.linalg.qr(a), SQUARE),
    "qr, tall": (lambda a: lax.linalg.qr(a, full_matrices=False), TALL),
    "qr, tall, full": (lambda a: lax.linalg.qr(a, full_matrices=True), TALL),
    "qr, wide": (lambda a: lax.linalg.qr(a, full_matrices=False), WIDE),
    "qr, pivoting": (
        lambda a: lax.linalg.qr(a[0], pivoting=True, full_matrices=False)[:2],
        TALL * [1, 3, 2],
    ),
    "eigh": (lambda a: lax.linalg.eigh(hermitian(a)), SQUARE),
    "eigh, values alone": (lambda a: jnp.linalg.eigvalsh(hermitian(a)), SQUARE),
    "eig, values alone": (lambda a: jnp.linalg.eigvals(a), SPREAD),
    "eig": (lambda a: lax.linalg.eig(a, enable_eigvec_derivs=True), SPREAD),
    "eig, right": (
        lambda a: lax.linalg.eig(a, compute_left_eigenvectors=False, enable_eigvec_derivs=True),
        SPREAD,
    ),
    "svd": (lambda a: lax.linalg.svd(a), SQUARE),
    "svd, tall": (lambda a: lax.linalg.svd(a, full_matrices=False), TALL),
    "svd, wide": (lambda a: lax.linalg.svd(a, full_matrices=False), WIDE),
    "svd, values alone": (lambda a: lax.linalg.svd(a, compute_uv=False), TALL),
    "svd, one factor": (lambda a: lax.linalg.svd(a, full_matrices=False)[1], TALL),
    "determinant": (jnp.linalg.slogdet, SQUARE),
}

SOLVES = {
    "solve": (jnp.linalg.solve, SQUARE, RIGHT),
    "tridiagonal": (
        lambda a, b: lax.linalg.tridiagonal_solve(a[:, 0], 3 + a[:, 1], a[:, 2], b),
        SQUARE,
        RIGHT,
    ),
    "own solver": (
        lambda a, b: solve_by_iteration(jnp.eye(3, dtype=a.dtype) + a[0] / 8, b[0, :, 0]),
        SQUARE,
        RIGHT,
    ),
}

FOURIER = {
    "real": lambda x: jnp.fft.rfft(x),
    "real, odd, cut": lambda x: jnp.fft.rfft2(x, (2, 3)),
    "real, even, padded": lambda x: jnp.fft.rfft(x, 4),
    "real and back": lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * (1 + 2j), 3),
    "complex and back": lambda x: jnp.real(jnp.fft.ifft2(jnp.fft.fft2(x) ** 2)),
}

SPECIALS = {
    "igamma": (lax.igamma, P, P[::-1] + 1),
    "igammac": (lax.igammac, P, P[::-1] + 1),
    "polygamma": (lambda x: lax.polygamma(jnp.full_like(x, 2), x), P),
    "betainc": (lambda x: lax.betainc(jnp.full_like(x, 1.5), jnp.full_like(x, 2.0), x), P / 4),
    "gamma sample": (lambda a: jax.random.gamma(KEY, a), P),
    "log of a gamma sample": (lambda a: jax.random.loggamma(KEY, a), P),
}

if hasattr(lax, "polynomial"):  # JAX >= 0.12
    SPECIALS["polynomial"] = (lambda x: lax.polynomial(x, [1.0, x * x, 2.0, x[0, 0]]), X)

RAGGED = (
    lambda x, w: lax.ragged_dot(x, w, np.array([1, 0, 3], np.int32)),
    np.sin(np.arange(12.0)).reshape(4, 3),
    np.cos(np.arange(18.0)).reshape(3, 3, 2),
)

CASES = {}
for _name, (_f, *_args) in {**UNARY, **BINARY}.items():
    CASES[f"elementwise: {_name}"] = (_f, *_args)
for _kind, _table in {"conv": CONVOLUTIONS, "dot": PRODUCTS, "linalg": LINALG}.items():
    CASES |= {f"{_kind}: {name}": case for name, case in _table.items()}
for _kind, _table in {"layout": LAYOUTS, "reduction": REDUCTIONS, "indexing": INDEXING}.items():
    CASES |= {f"{_kind}: {name}": (f, X) for name, f in _table.items()}
CASES |= {f"window: {name}": (f, IMAGE) for name, f in WINDOWS.items()}
for _kind, _table in {"factors": FACTORISATIONS, "solve": SOLVES, "special": SPECIALS}.items():
    CASES |= {f"{_kind}: {name}": case for name, case in _table.items()}
CASES |= {f"fourier: {name}": (f, X) for name, f in FOURIER.items()}
CASES["ragged dot"] = RAGGED
CASES["broadcast: scalars"] = (lambda x, y: jnp.maximum(x, 0.3) / y + 2 * x - 1, X, Y)
CASES["broadcast: axes of one"] = (lambda x, y: x[:, :1] * y / (2 + x[:1] ** 2), X, Y)
CASES["integer exponents"] = (lambda x: x ** jnp.array([[0, 1, 2], [3, -1, -2]]), P)
CASES["random bits"] = (lambda x: x * jax.random.normal(KEY, (2, 3)), X)


# Which of two writes to one place is the last is not defined, and left to chance elsewhere.
UNDEFINED = {"indexing: set, twice the same": on_cpu}


@pytest.mark.parametrize("name", [pytest.param(n, marks=UNDEFINED.get(n, ())) for n in CASES])
def test_in_float64(name):
    f, *args = CASES[name]
    with jax.enable_x64(True):
        assert_same_vjp(f, *args, scale=10, plainly=False)  # see `test_in_narrow_dtypes`


WIDE_ONLY = ("conv", "dot", "linalg", "factors", "solve", "fourier", "special", "ragged")
NARROW = [n for n in CASES if not n.startswith(WIDE_ONLY)] + ["conv: plain", "dot: batched"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NARROW)
def test_in_narrow_dtypes(name, dtype):
    f, *args = CASES[name]
    args = [jnp.asarray(x, dtype) for x in args]

    def ones_like(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return np.ones(x.shape, x.dtype)
        return np.zeros(x.shape, jax.dtypes.float0)

    def run(vjp, **options):
        value, pullback = vjp(f, *args, **options)
        return value, pullback(jax.tree.map(ones_like, value))

    value, cotangents = run(fb.vjp, strict=True)  # op by op, as users try things out
    expected, theirs = jax.jit(lambda: run(jax.vjp))()
    assert_close(value, expected)
    assert_close(cotangents, theirs, scale=5)


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_at_special_values(name):
    """The same NaNs and infinities at zeros, ones, ties, extremes and non-numbers."""
    f, *args = CASES[f"elementwise: {name}"]
    grid = np.meshgrid(*[SPECIAL] * len(args))
    args = [jnp.asarray(g.ravel(), jnp.float32) for g in grid]
    if name == "acosh":  # left of its domain some releases of JAX give its NaN a finite slope
        args = [jnp.where(args[0] < 1, 1.0, args[0])]
    if name == "div":  # JAX's 1/y² leaves the range before the result does
        x, y = args
        args = [x, jnp.where(jnp.isfinite(y), jnp.sign(y) * jnp.sqrt(jnp.abs(y)), y)]
    ones = jnp.ones_like(args[0])
    ours, theirs = (lib.vjp(f, *args)[1](ones) for lib in (fb, jax))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-30)  # overflows on the way differ


DIFFERENTIABLE = [n for n in CASES if "ties" not in n]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_against_differences(name):
    f, *args = CASES[name]
    with jax.enable_x64(True):
        report = fb.check_grads(f, *[jnp.asarray(x, jnp.float64) for x in args], samples=4)
    discontinuous = (
        "stop_gradient",
        "reduce_precision",
        "rem",
        "random",
        "sample",  # drawn by rejection
        "round",
        "sort, several",
        "twice",
    )
    if not any(word in name for word in discontinuous):
        assert report.ok, f"\n{report}"


COMPLEX = {
    "arithmetic": lambda z: (z * z - 2 / z) ** 3,
    "exp and log": lambda z: jnp.log(z) * jnp.exp(1j * z),
    "roots and powers": lambda z: jnp.sqrt(z) + z**1.5,
    "trigonometric": lambda z: jnp.sin(z) * jnp.tanh(z) + jnp.cosh(z),
    "parts": lambda z: jnp.real(z) * jnp.imag(z) + jnp.abs(z) + jnp.angle(z),
    "conj": lambda z: jnp.conj(z) * z * 1j,
    "from parts": lambda z: lax.complex(jnp.real(z) ** 2, jnp.imag(z)),
    "matrix product": lambda z: z @ z.T.conj(),
    "where": lambda z: jnp.where(jnp.real(z) > 0, z, z.conj()),
    "cast": lambda z: jnp.real(z).astype(z.dtype) * z,
    "triangular solve": lambda z: lax.linalg.triangular_solve(
        z[:, :2] + 2, z, left_side=True, transpose_a=True, conjugate_a=True
    ),
    "prod and cumsum": lambda z: jnp.prod(z, 1) + jnp.cumsum(z, 1)[:, -1],
    "fourier": lambda z: jnp.fft.ifft(jnp.fft.fft(z) ** 2),
    "fourier to real": lambda z: jnp.fft.irfft2(z, (2, 5)),
    "fourier to real, even": lambda z: jnp.fft.irfft(z, 4),
}
for _name in ("cholesky", "cholesky, one triangle", "lu", "qr", "eigh", "eig", "svd, tall"):
    _f, _a = FACTORISATIONS[_name]
    COMPLEX[f"factors: {_name}"] = lambda z, f=_f, a=_a: f(
        jnp.asarray(a, z.dtype) + 1j * z[0, 0] * jnp.asarray(a[:, ::-1], z.dtype)
    )


@pytest.mark.parametrize("name", COMPLEX)
def test_complex(name):
    z = jnp.asarray(X + 1j * Y, jnp.complex64)
    assert_same_vjp(COMPLEX[name], z, scale=10, plainly=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NARROW if n != "dot: wider result"])
def test_second_order(name):
    """Rules are made of primitives with rules: the gradient of a gradient's norm."""
    f, *args = CASES[name]
    args = [jnp.asarray(x, jnp.float32) for x in args]

    def penalty(grad):
        def total(*args):
            leaves = jax.tree.leaves(f(*args))
            moving = (y for y in leaves if jnp.issubdtype(y.dtype, jnp.inexact))
            return sum(jnp.sum(y * y + y) for y in moving)  # of a root the first alone is linear

        return jax.jit(grad(lambda *args: jnp.sum(jnp.sin(grad(total)(*args)))))

    assert_close(penalty(fb.grad)(*args), penalty(jax.grad)(*args), scale=50)


def test_windows_of_any_reduction():
    """JAX has no reverse rule for these, but a forward one: vᵀ(J t) = (Jᵀ v)ᵀ t."""
    x = jnp.asarray(IMAGE[0, :, :, 0], jnp.float32)
    tangent = jnp.cos(x * 7)

    def product(x):
        return lax.reduce_window(x, np.float32(1), lax.mul, (2, 3), (2, 2), "SAME")

    def dilated_max(x):
        options = {"window_dilation": (2, 1)}
        return lax.reduce_window(x, -np.inf, lax.max, (2, 2), (1, 2), "SAME", **options)

    for f in (product, dilated_max):
        moved = jax.jvp(f, (x,), (tangent,))[1]
        _, pullback = fb.vjp(f, x, strict=True)
        ct = jnp.sin(moved + 1)
        np.testing.assert_allclose(
            jnp.vdot(ct, moved), jnp.vdot(pullback(ct)[0], tangent), rtol=1e-5
        )


def test_zeta():
    """JAX has no derivative in the offset: against differences."""
    with jax.enable_x64(True):
        q = jnp.asarray(P + 1, jnp.float64)
        zeta = lambda q: lax.zeta(jnp.full_like(q, 2.5), q)  # noqa: E731
        ours = fb.grad(lambda q: jnp.sum(zeta(q)))(q)
        step = 1e-6
        np.testing.assert_allclose(ours, (zeta(q + step) - zeta(q - step)) / (2 * step), rtol=1e-7)


@pytest.mark.parametrize(
    "f, error",
    [
        (lambda x: lax.betainc(x, x, x), ValueError),
        (lambda x: lax.polygamma(x, x), ValueError),
        (lambda x: lax.linalg.eig(jnp.outer(x[0], x[0]) + jnp.eye(3))[0], NotImplementedError),
        (lambda x: lax.linalg.svd(x, full_matrices=True), NotImplementedError),
        pytest.param(
            lambda x: lax.linalg.schur(jnp.outer(x[0], x[0])), NotImplementedError, marks=on_cpu
        ),
        (lambda x: lax.igamma_grad_a(x, x), NotImplementedError),
    ],
)
def test_no_derivative(f, error):
    """An error of the type that `jax.vjp` raises, at the line of the call."""
    x = jnp.asarray(U + 0.5, jnp.float32)
    for vjp in (jax.vjp, fb.vjp):
        with pytest.raises(error) as caught:
            value, pullback = vjp(f, x)
            pullback(jax.tree.map(jnp.ones_like, value))
    assert "test_rows.py" in "".join([str(caught.value), *caught.value.__notes__])


def test_a_scatter_that_applies_a_function_is_refused():
    """By name it is one that sets its updates."""
    with pytest.raises(NotImplementedError, match=r"write x.at\[i\].set"):
        fb.grad(lambda x: jnp.sum(x.at[jnp.array([0])].apply(jnp.sin)))(jnp.ones(2))


def test_complex_sign():
    """Against differences: older releases of JAX take its derivative to be zero."""
    z = jnp.asarray(X + 1j * Y, jnp.complex64)
    (row,) = fb.check_grads(jnp.sign, z).rows
    assert row.fd_rel_error < 1e-5


def primitives_in(program) -> set:
    found = {eqn.primitive for eqn in program.equations}
    return found.union(*(primitives_in(b) for eqn in program.equations for b in bodies(eqn)))


# Rows that arise in derivatives of others, under `shard_map`, or in both passes of other tests.
ELSEWHERE = {
    "nextafter",
    "reduce_window",
    "select_and_scatter_add",
    "select_and_gather_add",
    "zeta",
    # in test_collectives.py
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "ppermute",
    "psum",
    "reshard",
    "psum_invariant",
    "pvary",
    "reduce_scatter",
    "sharding_constraint",
}
# Rows that the CPU cannot run, or that JAX makes only in settings that are still experimental.
UNTRIED = {
    "all_gather_reduced",
    "layout_constraint",
    "pbroadcast",
    "pbroadcast_dynamic",
    "preduced",
    "reduced_vary_cast",
    "reduced_vary_cast_p",
    "stage",
    "tie",
    "xla_metadata_value",
    "unreduced_psum",
    "unreduced_reduce_scatter",
    "vary_unreduced_cast",
    "vary_unreduced_cast_p",
}


def test_every_row_has_a_test():
    exercised = set()
    with jax.enable_x64(True):
        for f, *args in CASES.values():
            exercised |= primitives_in(program_of(jax.make_jaxpr(f)(*args)))
    z = jnp.asarray(X + 1j * Y, jnp.complex64)
    for f in COMPLEX.values():
        exercised |= primitives_in(program_of(jax.make_jaxpr(f)(z)))
    rows = {p for p, rule in TABLE.items() if isinstance(rule, LocalRule)}
    assert {p.name for p in rows - exercised} <= ELSEWHERE | UNTRIED
