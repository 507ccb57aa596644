"""Special functions: the error functions, and the gamma, beta, zeta and Bessel families.

Formulas: Abramowitz and Stegun 1964, chapters 6, 7, 9 and 26; the derivatives of the incomplete
gamma function in its order and of a gamma sample are primitives of their own (Figurnov et al.
2018, "Implicit reparameterization gradients").
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.program import primitive
from fbackprop.rules.elementwise import scale
from fbackprop.table import joint, row

# --- error functions ------------------------------------------------------------------------------


def _bell(x):
    return lax.exp(lax.neg(lax.square(x)))


row("erf", lambda ct, x: lax.mul(scale(ct, 2 / np.sqrt(np.pi)), _bell(x)))
row("erfc", lambda ct, x: lax.mul(scale(ct, -2 / np.sqrt(np.pi)), _bell(x)))
row("erf_inv", lambda ct, out: lax.mul(scale(ct, np.sqrt(np.pi) / 2), lax.exp(lax.square(out))))

# --- gamma and zeta -------------------------------------------------------------------------------


def _no_derivative(function: str, arguments: str):
    """A pullback for arguments in which no derivative is known; an error, as under `jax.grad`."""

    def pullback(ct, eqn):
        raise ValueError(
            f"{function} gradient with respect to {arguments} is not supported (called at "
            f"{eqn.source}): stop_gradient that argument, or differentiate in x alone"
        )

    return pullback


row("lgamma", lambda ct, x: lax.mul(ct, lax.digamma(x)))
row("digamma", lambda ct, x: lax.mul(ct, lax.polygamma(lax.full_like(x, 1), x)))
row(
    "polygamma",
    _no_derivative("polygamma", "m"),
    lambda ct, x, y: lax.mul(ct, lax.polygamma(lax.add(x, lax.full_like(x, 1)), y)),
)


def _zeta_offset(ct, x, y):
    """∂ζ(x, q)/∂q = -x ζ(x + 1, q)."""
    return lax.neg(lax.mul(ct, lax.mul(x, lax.zeta(lax.add(x, lax.full_like(x, 1)), y))))


row("zeta", _no_derivative("zeta", "x"), _zeta_offset)


def _gamma_density(x, y):
    """The density of a gamma variable of shape x at y."""
    log_power = lax.mul(lax.sub(x, lax.full_like(x, 1)), lax.log(y))
    return lax.exp(lax.sub(lax.sub(log_power, y), lax.lgamma(x)))


row(
    "igamma",
    lambda ct, x, y: lax.mul(ct, lax.igamma_grad_a(x, y)),
    lambda ct, x, y: lax.mul(ct, _gamma_density(x, y)),
)
row(
    "igammac",
    lambda ct, x, y: lax.neg(lax.mul(ct, lax.igamma_grad_a(x, y))),
    lambda ct, x, y: lax.neg(lax.mul(ct, _gamma_density(x, y))),
)


def _gamma_sample(ct, y, out, eqn):
    """How a sample moves with its shape, at a fixed level of the distribution function."""
    if not eqn.params["log_space"]:
        return lax.mul(ct, lax.random_gamma_grad(y, out))
    sample = lax.max(lax.exp(out), lax.full_like(out, jnp.finfo(out.dtype).tiny))
    return lax.mul(ct, lax.div(lax.random_gamma_grad(y, sample), sample))


row("random_gamma", None, _gamma_sample)

# --- incomplete beta ------------------------------------------------------------------------------


def _beta_density(ct, xs):
    a, b, x = xs
    one = lax.full_like(a, 1)
    log_beta = lax.sub(lax.add(lax.lgamma(a), lax.lgamma(b)), lax.lgamma(lax.add(a, b)))
    left = lax.mul(lax.sub(b, one), lax.log1p(lax.neg(x)))
    right = lax.mul(lax.sub(a, one), lax.log(x))
    return lax.mul(ct, lax.exp(lax.sub(lax.add(left, right), log_beta)))


_no_shape = _no_derivative("betainc", "a and b")
row("regularized_incomplete_beta", _no_shape, _no_shape, _beta_density)

# --- modified Bessel functions, scaled by exp(-|x|) -----------------------------------------------

row(
    "bessel_i0e",
    lambda ct, x, out: lax.mul(ct, lax.sub(lax.bessel_i1e(x), lax.mul(lax.sign(x), out))),
)


@joint("bessel_i1e")
def _bessel_i1e(ct, x, out):
    """I₁' = I₀ - I₁/x; the quotient tends to 1/2 at the origin."""
    away = lax.gt(lax.abs(x), lax.full_like(x, jnp.finfo(x.dtype).eps))
    safe = lax.select(away, x, lax.full_like(x, 1))
    slope = lax.add(lax.sign(safe), lax.div(lax.full_like(x, 1), safe))
    slope = lax.sub(lax.bessel_i0e(safe), lax.mul(out, slope))
    return lax.mul(ct, lax.select(away, slope, lax.full_like(x, 0.5)))


# --- polynomials ----------------------------------------------------------------------------------


@joint("polynomial")
def _polynomial(ct, xs, eqn):
    """Σ cₖ xᵏ; its operands are x and the coefficients, lowest first."""
    x, *coefficients = xs
    powers = [ct]
    for _ in coefficients[1:]:
        powers.append(lax.mul(powers[-1], x))
    if len(coefficients) == 1:
        return lax.full_like(ct, 0), *powers
    slopes = [scale(c, k) for k, c in enumerate(coefficients) if k]
    slope = primitive("polynomial").bind(x, *slopes, **eqn.params)
    return lax.mul(ct, slope), *powers
