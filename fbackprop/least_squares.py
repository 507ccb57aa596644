r"""Nonlinear least squares by the Levenberg–Marquardt method, for small dense problems.

The cost of P parameters x with M residuals r(x) is ½‖r‖². It is minimised by a sequence of linear
problems: with J: (M, P) the Jacobian at the current point and D a diagonal scale, a step p solves

    minimise ‖J p + r‖² subject to ‖D p‖ ≤ Δ,  that is,  (JᵀJ + λ D²) p = −Jᵀ r

for the damping λ ≥ 0 at which the step fills its trust region, or λ = 0 where the Gauss–Newton step
fits inside. The radius Δ then follows how well the linear model had predicted the reduction.

This is the method of Moré (1978), which MINPACK's ``lmder`` made the standard; section numbers in
the comments are that paper's. JᵀJ is never formed, because it squares the condition number of J and
hard fits need every digit: one QR factorisation of J is made at each accepted point, and for each
step the singular values of its triangle, with which a trial damping costs next to nothing. They
tell null directions, too, along which no step goes.

Index legend: M residuals, P parameters.

References:
    Moré, "The Levenberg–Marquardt algorithm: implementation and theory", in Numerical Analysis,
    Lecture Notes in Mathematics 630 (1978), 105–116.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from fbackprop.columns import is_count
from fbackprop.program import is_real_number, value_of
from fbackprop.reverse import vjp


class LeastSquaresResult(NamedTuple):
    """What `least_squares` found.

    Attributes:
        params: the best parameters, in the form and dtypes of the initial ones.
        residual: what ``residual`` returns there.
        cost: ½‖residual‖², a scalar.
        steps: how many trial steps were taken, accepted or not, an integer scalar. The residual is
            evaluated once for each of them and once at the start.
        converged: whether a convergence test was met, a boolean scalar. False when the steps ran
            out, when no step helps however short, and when the start itself is not finite.
    """

    params: Any
    residual: Any
    cost: jax.Array
    steps: jax.Array
    converged: jax.Array


def least_squares(
    residual: Callable[..., Any],
    params: Any,
    *args: Any,
    max_steps: int = 1000,
    rtol: ArrayLike | None = None,
    atol: ArrayLike = 0.0,
) -> LeastSquaresResult:
    r"""Minimises half the sum of squared residuals, by Levenberg–Marquardt.

    $$\min_x \; \tfrac12 \lVert r(x) \rVert^2$$

    The fit is converged when the linear model promises no further reduction and is not belied,

    $$\text{predicted} \le \tfrac12 \mathit{rtol}^2 \lVert r \rVert^2 + \mathit{atol}
      \quad\text{and}\quad
      \lvert\text{actual}\rvert \le \tfrac12 \mathit{rtol} \lVert r \rVert^2 + \mathit{atol},$$

    or when the undamped step is negligible, ‖D p‖ ≤ rtol ‖D x‖. Both are local: on a plateau they
    are met too. A trial point whose residuals or Jacobian are not finite is a rejected step, so a
    model may be undefined in places.

    Works under ``jit`` and ``vmap``; a batch of fits runs until its slowest is done, and a finished
    one stays as it is. Under ``jit`` the whole fit is compiled once, without it at every call. The
    result is not differentiable: differentiate the condition that it meets, Jᵀ r = 0.

    Args:
        residual: ``residual(params, *args)``, any pytree of real arrays, M numbers in all. M may be
            smaller than P, and the Jacobian may be singular: the result is then one of the many
            minimisers, near the start.
        params: where to start, any pytree of floating-point arrays, P numbers in all. The start
            also sets the size of the first trust region, ‖D x‖, so parameters of plausible
            magnitude make a better start than zeros.
        *args: handed to ``residual`` unchanged, not fitted.
        max_steps: the most trial steps to take.
        rtol: relative tolerance, by default the square root of the precision (1.5e-8 in float64),
            the coarser one of params' and residuals'.
        atol: absolute tolerance, in the units of the cost.

    Returns:
        A `LeastSquaresResult`. Internally all is done in float64 when parameters or residuals are,
        and in float32 otherwise.

    Raises:
        ValueError: parameters or residuals are empty or not real floating point, ``max_steps`` is
            no whole number from 1 up, or a tolerance is below zero.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(5.0)
        >>> y = 3.0 * jnp.exp(-0.5 * x)
        >>> def residual(params, x, y):
        ...     return params["height"] * jnp.exp(-params["rate"] * x) - y
        >>> fit = least_squares(residual, {"height": 1.0, "rate": 1.0}, x, y)
        >>> {name: round(value.item(), 3) for name, value in fit.params.items()}
        {'height': 3.0, 'rate': 0.5}
        >>> fit.converged.item()
        True

    References:
        Moré (1978), algorithm 7.1, with the scaling of eq. 6.3. Two departures: the first trust
        region is no larger than ‖D x‖, where MINPACK takes 100‖D x‖ and overshoots onto plateaus;
        and the tests above, which the rounding error of a nearly perfect fit cannot hold up.
    """
    _check_settings(max_steps, rtol, atol)
    _check_real("params", params)
    start, unravel = ravel_pytree(params)
    initial = residual(params, *args)
    _check_real("the residuals", initial)
    flat, unravel_residual = ravel_pytree(initial)

    dtype = jnp.result_type(start.dtype, flat.dtype, jnp.float32)
    eps = jnp.finfo(dtype).eps
    if rtol is None:
        rtol = max(float(jnp.finfo(x.dtype).eps) for x in (start, flat)) ** 0.5

    # In units in which the first residuals are about one, or their squares might underflow. A power
    # of two rounds nothing.
    unit = _power_of_two(jnp.max(jnp.abs(flat.astype(dtype))))
    atol = atol / unit / unit

    def residuals(point: jax.Array) -> jax.Array:
        tree = residual(unravel(point.astype(start.dtype)), *args)
        return ravel_pytree(tree)[0].astype(dtype) / unit

    def evaluate(point: jax.Array) -> tuple[jax.Array, Callable[[], _Model]]:
        """The residuals at a point, and the linear model there for whoever wants to pay for it."""
        r, pullback = vjp(residuals, point)

        def model() -> _Model:
            (jacobian,) = jax.vmap(pullback)(jnp.eye(r.size, dtype=dtype))
            return _factorise(jacobian, r)

        return r, model

    def unfinished(fit: _Fit) -> jax.Array:
        return ~(fit.converged | fit.stalled) & (fit.steps < max_steps)

    def advance(fit: _Fit) -> _Fit:
        triangle = fit.model.triangle / fit.scale[None, :]  # of J D⁻¹; steps below are D p
        step, length, damping = _trust_region_step(
            triangle, fit.model.projected, fit.radius, fit.damping
        )
        # The first radius is a guess, and a first step that stays within it a better one.
        radius = jnp.where(fit.steps == 0, jnp.minimum(fit.radius, length), fit.radius)
        point = fit.point + step / fit.scale
        r, model = evaluate(point)
        cost = _cost(r)

        # Predicted reduction in the form without cancellation, sec. 4 (a sum of squares).
        curved = 0.5 * jnp.sum((triangle @ step) ** 2)
        predicted = curved + damping * length**2
        actual = fit.cost - cost
        hopeless = ~(cost < 100 * fit.cost)  # true of NaN as well
        ratio = jnp.where(hopeless, -1.0, actual / predicted)

        accepted = ratio >= 1e-4
        next_model = lax.cond(accepted, model, lambda: fit.model)
        accepted &= _is_finite(next_model)

        # Sec. 4: on a poor step shrink the radius by the minimiser, kept within [0.1, 0.5], of the
        # parabola through the cost at both ends and its slope at the start.
        slope = -(2 * curved + damping * length**2)
        parabola = 0.5 * slope / (slope + actual)
        shrink = jnp.where(actual >= 0, 0.5, jnp.clip(parabola, 0.1, 0.5))
        shrink = jnp.where(hopeless, 0.1, shrink)
        poor = ~(ratio > 0.25) | ~accepted
        good = ~poor & ((ratio >= 0.75) | (damping == 0))
        next_radius = jnp.where(poor, shrink * jnp.minimum(radius, 10 * length), radius)
        next_radius = jnp.where(good, 2 * length, next_radius)
        # The damping that solves the next step scales roughly inversely with its radius.
        next_damping = jnp.where(poor, damping / shrink, jnp.where(good, 0.5 * damping, damping))

        size = jnp.linalg.norm(fit.scale * point)
        optimal = (predicted <= rtol**2 * fit.cost + atol) & (
            jnp.abs(actual) <= rtol * fit.cost + atol
        )
        negligible = (damping == 0) & (length <= rtol * size) & ~hopeless

        verdict = fit._replace(
            radius=next_radius,
            damping=next_damping,
            steps=fit.steps + 1,
            converged=optimal | negligible,
            stalled=next_radius <= eps * size,
        )
        moved = verdict._replace(
            point=point,
            residual=r,
            cost=cost,
            model=next_model,
            # Eq. 6.3: scales only grow, or a parameter that has lost its influence for a moment
            # would be free to run away.
            scale=jnp.maximum(fit.scale, _column_norms(next_model.triangle)),
        )
        return jax.tree.map(functools.partial(jnp.where, accepted), moved, verdict)

    point = start.astype(dtype)
    r, model = evaluate(point)
    linear = model()
    norms = _column_norms(linear.triangle)
    scale = jnp.where(norms > 0, norms, 1.0)
    size = jnp.linalg.norm(scale * point)
    fit = _Fit(
        point=point,
        residual=r,
        cost=_cost(r),
        model=linear,
        scale=scale,
        # ‖D x‖ and ‖r‖ have the same units, and no Gauss–Newton step changes the residuals by more
        # than ‖r‖: the next best guess of a step's size when the start is zero.
        radius=jnp.where(size > 0, size, jnp.linalg.norm(r)),
        damping=jnp.zeros((), dtype),
        steps=jnp.zeros((), jnp.int32),
        converged=jnp.zeros((), bool),
        stalled=~(jnp.isfinite(_cost(r)) & _is_finite(linear)),
    )
    fit = lax.while_loop(unfinished, advance, fit)
    return LeastSquaresResult(
        params=unravel(fit.point.astype(start.dtype)),
        residual=unravel_residual((fit.residual * unit).astype(flat.dtype)),
        cost=fit.cost * unit * unit,
        steps=fit.steps,
        converged=fit.converged,
    )


class _Model(NamedTuple):
    """The residuals to first order, r + J p, in an orthonormal basis Q of J's columns."""

    triangle: jax.Array  # R of J = Q R, (P, P)
    projected: jax.Array  # Qᵀ r, (P,)


class _Fit(NamedTuple):
    """State of the iteration."""

    point: jax.Array  # x, (P,)
    residual: jax.Array  # r(x), (M,)
    cost: jax.Array  # ½‖r‖², ()
    model: _Model
    scale: jax.Array  # diagonal of D, (P,)
    radius: jax.Array  # Δ, ()
    damping: jax.Array  # λ, a guess of the next step's, ()
    steps: jax.Array  # trial steps so far, ()
    converged: jax.Array  # ()
    stalled: jax.Array  # no way on from here, ()


def _factorise(jacobian: jax.Array, residual: jax.Array) -> _Model:
    """QR of the Jacobian (M, P), with rows of zeros below it where M < P."""
    rows, columns = jacobian.shape
    padded = jnp.pad(jacobian, ((0, max(0, columns - rows)), (0, 0)))
    orthonormal, triangle = jnp.linalg.qr(padded)
    return _Model(triangle, orthonormal[:rows].T @ residual)


class _Search(NamedTuple):
    """State of the search for the damping."""

    step: jax.Array  # D p for the damping last tried, along right singular vectors, (P,)
    length: jax.Array  # ‖D p‖, ()
    damping: jax.Array  # which that was, ()
    candidate: jax.Array  # which to try next, ()
    lower: jax.Array  # bounds of the damping sought, ()
    upper: jax.Array
    trials: jax.Array  # ()
    done: jax.Array  # ()


def _trust_region_step(
    triangle: jax.Array, projected: jax.Array, radius: jax.Array, guess: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""The step z = D p that minimises ‖R z + Qᵀr‖ subject to ‖z‖ ≤ Δ, to a tenth of Δ.

    Its damping is the root of the secular equation φ(λ) = ‖z(λ)‖ − Δ, found by Newton's iteration
    on a function that is nearly linear in λ, 1/‖z(λ)‖, safeguarded by bounds: Moré (1978), sec. 5
    (algorithm 5.5), but by singular values, of which those that are rounding errors count as zero:
    along null directions a step has no length. The first trial is the Gauss–Newton step, of many
    the shortest, and two or three are usual.

    Args:
        triangle: R D⁻¹, (P, P); may be singular.
        projected: Qᵀr, (P,).
        radius: Δ, ().
        guess: the damping to try first where the Gauss–Newton step is too long, ().

    Returns:
        The step (P,), its length () and its damping (), which is 0 for the Gauss–Newton step.
    """
    tiny = jnp.finfo(triangle.dtype).tiny
    noise = projected.size * jnp.finfo(triangle.dtype).eps
    left, values, right = jnp.linalg.svd(triangle)
    values = jnp.where(values > noise * values[0], values, 0)
    along = left.T @ projected

    def solve(damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """z(λ), ‖z(λ)‖ and Newton's derivative, −d‖z‖/dλ ÷ ‖z‖."""
        divisor = jnp.where(values > 0, values**2 + damping, 1)
        step = -values * along / divisor
        length = jnp.linalg.norm(step)
        unit = step / jnp.where(length > 0, length, 1)
        return step, length, jnp.sum(unit**2 / divisor)

    def searching(search: _Search) -> jax.Array:
        return ~search.done

    def newton(search: _Search) -> _Search:
        damping, first = search.candidate, search.trials == 0
        step, length, rate = solve(damping)
        excess = length - radius
        corrected = damping + excess / (radius * rate)
        # Newton's iterate from λ = 0 lies left of the root; later ones, scaled by ‖z‖/Δ, may not.
        beyond = jnp.where(first & jnp.isfinite(corrected), corrected, damping)
        lower = jnp.where(excess > 0, jnp.maximum(search.lower, beyond), search.lower)
        upper = jnp.where(excess < 0, jnp.minimum(search.upper, damping), search.upper)
        candidate = jnp.where(first, jnp.clip(guess, lower, upper), jnp.maximum(lower, corrected))
        usable = jnp.isfinite(candidate) & (candidate > 0)
        geometric = jnp.sqrt(lower) * jnp.sqrt(upper)
        fallback = jnp.maximum(jnp.maximum(1e-3 * upper, tiny), geometric)
        # Undamped, anything inside the region will do.
        fills = (excess <= 0.1 * radius) & (first | (excess >= -0.1 * radius))
        trials = search.trials + 1
        return _Search(
            step=step,
            length=length,
            damping=damping,
            candidate=jnp.where(usable, candidate, fallback),
            lower=lower,
            upper=upper,
            trials=trials,
            done=fills | (trials == 11),
        )

    zero = jnp.zeros_like(radius)
    search = _Search(
        step=jnp.zeros_like(projected),
        length=jnp.full_like(radius, jnp.inf),
        damping=zero,
        candidate=zero,
        lower=zero,
        upper=jnp.maximum(jnp.linalg.norm(values * along) / radius, tiny),
        trials=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
    )
    search = lax.while_loop(searching, newton, search)
    return right.T @ search.step, search.length, search.damping


def _cost(residual: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(residual**2)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The one next to a positive number; one for zero, and for what is not finite."""
    usual = jnp.isfinite(x) & (x > 0)
    _, exponent = jnp.frexp(jnp.where(usual, x, 1))
    return jnp.where(usual, jnp.ldexp(jnp.ones_like(x), exponent - 1), 1)


def _column_norms(matrix: jax.Array) -> jax.Array:
    """Euclidean norms of the columns, safe where their squares overflow or underflow."""
    largest = jnp.max(jnp.abs(matrix), axis=0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.linalg.norm(matrix / unit[None, :], axis=0)


def _is_finite(model: _Model) -> jax.Array:
    return jnp.all(jnp.isfinite(model.triangle)) & jnp.all(jnp.isfinite(model.projected))


def _check_settings(max_steps, rtol, atol) -> None:
    if not is_count(max_steps):
        raise ValueError(
            f"least_squares: max_steps is {max_steps}; give a whole number from one up"
        )
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is None:
            continue
        known = value_of(value)
        if not is_real_number(value) or (known is not None and not known >= 0):
            raise ValueError(f"least_squares: {name} is {value}; give a number not below zero")


def _check_real(what: str, tree: Any) -> None:
    """Refuses a pytree with nothing in it, or with anything but real floating-point numbers."""
    leaves = jax.tree.leaves(tree)
    if not sum(jnp.size(leaf) for leaf in leaves):
        raise ValueError(f"least_squares: {what} are empty; give at least one number")
    for leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"least_squares: {what} hold an array of dtype {dtype}; give real floating point"
            )
