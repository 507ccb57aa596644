"""The cross-check: our gradients against `jax.grad` and against central differences.

This is the one place of the library where JAX's own reverse mode is called.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from fbackprop.columns import is_count
from fbackprop.passes import activity
from fbackprop.program import Program, bodies, inlined, is_inexact, trace_tree, type_of
from fbackprop.reverse import DEFAULT, vjp


def tolerances(dtype) -> tuple[float, float]:
    """Largest errors allowed for a dtype, relative to the largest gradient of the leaf.

    The first is against `jax.grad`, which rounds as often as we do but not in the same order; the
    second against differences in float64. Half precision is held to eight units in the last place.
    """
    resolution = float(jnp.finfo(dtype).eps)
    if resolution > 1e-4:
        return 8 * resolution, 64 * resolution
    return (1e-5, 1e-3) if resolution > 1e-10 else (1e-12, 1e-6)


@dataclasses.dataclass(frozen=True)
class GradientRow:
    """How one leaf of the arguments fared; errors are maxima over its elements.

    Attributes:
      path: where the leaf stands among the arguments, such as ``[0]['weight']``.
      shape, dtype: of the leaf.
      max_abs_error, max_rel_error: against `jax.grad`; the relative error is the absolute one over
        the largest magnitude of the leaf's gradient. Infinite where NaNs or infinities differ.
      fd_abs_error, fd_rel_error: likewise against central differences in float64; NaN where the
        function cannot be evaluated in float64, has another value there, as with random numbers of
        the default dtype, or computes in less, as after a cast to float32.
      ok: whether both are within tolerance.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    max_abs_error: float
    max_rel_error: float
    fd_abs_error: float
    fd_rel_error: float
    ok: bool


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """One row per differentiable leaf of the arguments; prints as a table."""

    rows: tuple[GradientRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every leaf is within tolerance."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        head = ("argument", "shape", "dtype", "|Δ| jax", "rel jax", "|Δ| diff", "rel diff", "")
        cells: list[tuple[str, ...]] = [head]
        for r in self.rows:
            errors = (r.max_abs_error, r.max_rel_error, r.fd_abs_error, r.fd_rel_error)
            numbers = ["-" if math.isnan(e) else f"{e:.1e}" for e in errors]
            cells.append((r.path, str(r.shape), r.dtype, *numbers, "ok" if r.ok else "DIFFERS"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)


def check_grads(f: Callable, *args, samples: int = 16, seed: int = 0) -> GradientReport:
    """Compare the gradient of `f` at `args` with `jax.grad` and with central differences.

    A scalar output is differentiated as it is; other outputs are contracted with random
    cotangents. Differences are taken in float64 along `samples` random coordinates of each leaf.
    Matrices are multiplied in the full precision of their dtype, on accelerators as well, save
    where `f` itself asks for less.

    Args:
      f: function of arrays or pytrees of them; its output is a pytree of arrays.
      *args: where to compare. Leaves that are not floating point are passed on, not compared.
      samples: how many coordinates of each leaf are compared with differences.
      seed: of the random cotangents and coordinates.

    Returns:
      A `GradientReport`, one row per leaf.

    Raises:
      ValueError: if no argument is floating point, or `samples` is no number of coordinates.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> fb.check_grads(lambda x: jnp.sum(jnp.tanh(x)), jnp.arange(3.0)).ok
      True
    """
    if not is_count(samples):
        raise ValueError(f"samples={samples!r}: give a whole number of coordinates, at least one")
    paths_and_leaves, structure = tree_flatten_with_path(args)
    leaves = [leaf for _, leaf in paths_and_leaves]
    moving = [i for i, x in enumerate(leaves) if is_inexact(type_of(x))]
    if not moving:
        raise ValueError("check_grads needs a floating-point argument to differentiate, got none")

    def contracted(vector):
        def loss(moved):
            full = list(leaves)
            for i, x in zip(moving, moved, strict=True):
                full[i] = x
            outs = jax.tree.leaves(f(*jax.tree.unflatten(structure, full)))
            outs = [out for out in outs if is_inexact(type_of(out))]
            parts = (
                jnp.sum(out * v.astype(jnp.asarray(out).dtype))
                for out, v in zip(outs, vector, strict=True)
            )
            return sum(part.real for part in parts)

        return loss

    rng = np.random.default_rng(seed)
    shapes = [
        out.shape
        for out in map(type_of, jax.tree.leaves(_results(f, args)))
        if jax.dtypes.issubdtype(out.dtype, np.inexact)
    ]
    vector = [rng.standard_normal(shape) if shape else np.ones(()) for shape in shapes]
    loss = contracted(vector)
    at = [jnp.asarray(leaves[i]) for i in moving]

    def ours_of(at):
        value, pullback = vjp(loss, at)
        return value, pullback(jnp.ones_like(value))[0]

    with jax.default_matmul_precision("highest"):  # accelerators' default is coarser than float32
        compiled, (ours_of, theirs_of) = _compiled(at, ours_of, jax.grad(loss))
        value, ours = ours_of(at)
        theirs = theirs_of(at)
    differences = _central_differences(loss, at, float(value), samples, rng, compiled)
    rows = []
    for i, x, a, b, diff in zip(moving, at, ours, theirs, differences, strict=True):
        name = str(x.dtype)
        error = _errors(np.asarray(a), np.asarray(b))
        where, slopes = diff
        fd_error = _errors(np.asarray(a).reshape(-1)[where], slopes, np.asarray(a))
        tight, loose = tolerances(x.dtype)
        ok = error[1] <= tight and not fd_error[1] > loose
        path = keystr(paths_and_leaves[i][0])
        rows.append(GradientRow(path, x.shape, name, *error, *fd_error, bool(ok)))
    return GradientReport(tuple(rows))


def assert_grads_match(f: Callable, *args, samples: int = 16, seed: int = 0) -> None:
    """Raise with the table of `check_grads` unless every leaf is within tolerance.

    Arguments are those of `check_grads`.

    Raises:
      AssertionError: if a gradient differs; the message is the table.
    """
    report = check_grads(f, *args, samples=samples, seed=seed)
    if not report.ok:
        raise AssertionError(f"gradients differ\n{report}")


def _errors(ours, theirs, whole=None) -> tuple[float, float]:
    """Largest absolute difference, and that over the largest finite magnitude."""
    wide = np.complex128 if np.iscomplexobj(ours) else np.float64
    ours, theirs = ours.astype(wide), np.asarray(theirs).astype(wide)
    if ours.size == 0:
        return 0.0, 0.0
    if np.isnan(theirs).all() and whole is not None:
        return math.nan, math.nan
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(ours - theirs))
    gap = np.where(np.isfinite(gap), gap, math.inf)
    size = np.abs(theirs if whole is None else whole.astype(wide))
    largest = max(np.max(size, where=np.isfinite(size), initial=0.0), np.finfo(np.float64).tiny)
    return float(gap.max()), float(gap.max() / largest)


# What looks at values runs as it is: asked for one, a tracer gives errors of many types. A function
# that is wrong says so again.


def _results(f: Callable, args):
    """What `f` returns, or its types."""
    try:
        return jax.eval_shape(f, *args)
    except Exception:
        return f(*args)


def _compiled(at, *functions: Callable) -> tuple[Callable, Sequence[Callable]]:
    """How to compile functions of this kind, and these compiled."""
    compiled = [jax.jit(function) for function in functions]
    try:
        for function in compiled:
            jax.eval_shape(function, at)  # traced once for this and for the call
    except Exception:
        return lambda function: function, functions
    return jax.jit, compiled


def _central_differences(loss, at, value, samples, rng, compiled):
    """For each leaf, some coordinates and the slopes of `loss` along them, in float64.

    They are NaN where the function is another one there, or computes in less.
    """
    chosen = [np.sort(rng.choice(x.size, size=min(samples, x.size), replace=False)) for x in at]
    unknown = [(w, np.full(w.shape, np.nan)) for w in chosen]
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64) for x in at]
        try:
            evaluate = compiled(loss)
            found = float(evaluate(wide))
            narrow = compiled is jax.jit and _computes_in_less(trace_tree(loss, wide)[0])
        except (TypeError, ValueError):  # the function insists on a narrower dtype
            return unknown
        # Random numbers, say, are others where their dtype is that of the arguments.
        loose = max(tolerances(x.dtype)[1] for x in at)
        if narrow or abs(found - value) > loose * max(abs(found), abs(value)):
            return unknown
        results = []
        for k, where in enumerate(chosen):
            slopes = [_slope(evaluate, wide, k, i) for i in where]
            results.append((where, np.array(slopes, dtype=wide[k].dtype)))
    return results


def _computes_in_less(program: Program) -> bool:
    """Whether anything with a derivative in the inputs is of less than double precision."""
    program = inlined(program)
    found = activity(program, DEFAULT, (True,) * len(program.inputs))
    moving = [eqn for eqn, mask in zip(program.equations, found.steps, strict=True) if mask]
    outs = (v for eqn in moving for v in eqn.outputs if v in found.variables)
    return any(jnp.finfo(v.aval.dtype).bits < 64 for v in outs) or any(
        _computes_in_less(body) for eqn in moving for body in bodies(eqn)
    )


def _slope(evaluate, at, k, i):
    """(f(x + h) - f(x - h)) / 2h along coordinate `i` of leaf `k`, JAX's sign for complex."""
    x = at[k]
    h = np.cbrt(np.finfo(np.float64).eps) * max(1.0, abs(x.flat[i]))

    def along(unit):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved.flat[i] += sign * h * unit
            values.append(float(evaluate([*at[:k], moved, *at[k + 1 :]])))
        return (values[0] - values[1]) / (2 * h)

    return along(1) - 1j * along(1j) if np.iscomplexobj(x) else along(1)
