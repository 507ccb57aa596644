"""Matrix factorisations: cholesky, lu, qr, eigh, eig, svd.

For a factorisation A = f(F, G, …) the differential of the factors is linear in dA; the rules are
its adjoints. They are written in the gradients of the literature, for which ⟨X, dX⟩ is the real
part of tr(Xᴴ dX). JAX's cotangent is the conjugate of that gradient, so the rules conjugate what
arrives and what leaves; for real matrices both are the same.

Sources: Murray 2016 (arXiv:1602.07527) for cholesky; de Hoog et al. 2011 for lu; Walter and Lehmann
2010 and Roberts and Roberts 2020 (arXiv:2009.10071) for qr, arXiv:2409.13374 for its full matrices;
Giles 2008 (NA-08-01) for the spectral ones; Wan and Zhang 2019 (arXiv:1909.02659) for complex svd.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import linalg

from fbackprop.program import CHOLESKY_READS_ONE_TRIANGLE, zeros
from fbackprop.rules.matrices import (
    adjoint,
    columns,
    conj,
    diagonal,
    diagonal_matrix,
    eye_like,
    imaginary,
    is_complex,
    matmul,
    rows,
    scale_columns,
    scale_rows,
    solve,
    triangle,
)
from fbackprop.table import Rule, joint, register

_triangular = functools.partial(linalg.triangular_solve, left_side=True)


def _gradients(arriving, avals) -> list:
    """Gradients of the results, from their cotangents; zeros for those that did not arrive."""
    return [zeros(a) if ct is None else conj(ct) for ct, a in zip(arriving, avals, strict=True)]


def _plus(total, term):
    return term if total is None else lax.add(total, term)


# --- cholesky -------------------------------------------------------------------------------------


def _halve_diagonal(x):
    """Φ: the lower triangle with half the diagonal."""
    lower = triangle(x, lower=True)
    return lax.sub(lower, lax.mul(lax.full_like(x, 0.5), lax.mul(x, eye_like(x))))


@joint("cholesky")
def _cholesky(ct, out):
    """Ā = L⁻ᴴ Φ(Lᴴ L̄) L⁻¹."""
    factor = triangle(out, lower=True)  # above the diagonal the primitive leaves what it found
    inner = _halve_diagonal(matmul(adjoint(factor), conj(ct)))
    options = {"transpose_a": True, "conjugate_a": True, "lower": True}
    gradient = _triangular(factor, inner, **options)
    gradient = linalg.triangular_solve(factor, gradient, left_side=False, lower=True)
    if CHOLESKY_READS_ONE_TRIANGLE:  # what the upper triangle gets belongs to the lower one
        gradient = _halve_diagonal(lax.add(gradient, adjoint(gradient)))
    return conj(gradient)


# --- lu -------------------------------------------------------------------------------------------


@joint("lu")
def _lu(arriving, outs):
    """From dL = L tril(X, -1) and dU = triu(X) U, where X = L⁻¹ P dA U⁻¹."""
    packed, _, permutation = outs
    gradient = conj(arriving[0])
    m, n = packed.shape[-2:]
    k = min(m, n)
    # Completed by an identity to square matrices, the factors of any shape follow one formula.
    lower = _complete(triangle(columns(packed, 0, k), lower=True, offset=1), m, k)
    upper = _complete(triangle(rows(packed, 0, k), lower=False), n, k)
    lower = lax.add(lower, _leading_eye(lower, k))
    inner = lax.add(
        triangle(matmul(adjoint(lower), gradient), lower=True, offset=1),
        triangle(matmul(gradient, adjoint(upper)), lower=False),
    )
    back = {"transpose_a": True, "conjugate_a": True}
    inner = _triangular(lower, inner, lower=True, unit_diagonal=True, **back)
    inner = linalg.triangular_solve(upper, inner, left_side=False, lower=False, **back)
    return conj(_permute_back(inner, permutation[..., None], axis=-2))


def _complete(factor, size: int, k: int):
    """Pad to a square matrix, with ones on the diagonal from place k on."""
    pads = [(0, 0, 0)] * (factor.ndim - 2)
    pads += [(0, size - n, 0) for n in factor.shape[-2:]]
    square = lax.pad(factor, lax.full_like(factor, 0, shape=()), pads)
    eye = eye_like(square)
    return lax.add(square, lax.sub(eye, _leading_eye(square, k)))


def _leading_eye(x, k: int):
    """The identity's first k diagonal places."""
    inside = lax.lt(lax.broadcasted_iota(np.int32, x.shape, x.ndim - 1), np.int32(k))
    return lax.select(inside, eye_like(x), lax.full_like(x, 0))


def _permute_back(x, permutation, axis: int):
    return jnp.take_along_axis(x, jnp.argsort(permutation, axis=axis), axis=axis)


# --- qr -------------------------------------------------------------------------------------------


@joint("qr")
def _qr(arriving, xs, outs, eqn):
    (x,), (q, r, *pivots) = xs, outs
    q_bar, r_bar = _gradients(arriving[:2], eqn.out_avals[:2])
    m, n = x.shape[-2:]
    if m < n:  # the further columns R₂ = Qᴴ A₂ are a product
        if pivots:
            x = jnp.take_along_axis(x, pivots[0][..., None, :], axis=-1)
        rest = columns(r_bar, m, n)
        q_bar = lax.add(q_bar, matmul(columns(x, m, n), adjoint(rest)))
        square = _thin_qr(q, columns(r, 0, m), q_bar, columns(r_bar, 0, m))
        gradient = lax.concatenate([square, matmul(q, rest)], x.ndim - 1)
    else:
        if q.shape[-1] > n:
            q_bar = _thin_from_full(q, q_bar, n)
            q, r, r_bar = columns(q, 0, n), rows(r, 0, n), rows(r_bar, 0, n)
        gradient = _thin_qr(q, r, q_bar, r_bar)
    if pivots:
        gradient = _permute_back(gradient, pivots[0][..., None, :], axis=-1)
    return conj(gradient)


def _thin_qr(q, r, q_bar, r_bar):
    """With W = Qᴴ dA R⁻¹ and its skew part Ω: dQ = Q (Ω - W) + dA R⁻¹, dR = (W - Ω) R."""
    turned = lax.sub(matmul(adjoint(q), q_bar), matmul(r_bar, adjoint(r)))
    skew = triangle(lax.sub(turned, adjoint(turned)), lower=True, offset=1)
    skew = lax.add(skew, imaginary(lax.mul(turned, eye_like(turned))))
    gradient = lax.add(q_bar, matmul(q, lax.sub(skew, turned)))
    return linalg.triangular_solve(
        r, gradient, left_side=False, lower=False, transpose_a=True, conjugate_a=True
    )


def _thin_from_full(q, q_bar, n: int):
    """Carry the gradient of Q's further columns, which complete the basis, to the first n.

    Householder reflections fix the completion: with Z = Q₂₁ (Q₁₁ - 1)⁻¹ it moves by
    dQ₂ = dQ₁ Zᴴ - (Q₁ + Q₂ Z) (dQ₂₁ - Z dQ₁₁)ᴴ.
    """
    m = q.shape[-2]
    first, further = columns(q, 0, n), columns(q, n, m)
    top, bottom = rows(first, 0, n), rows(first, n, m)
    z = adjoint(solve(adjoint(lax.sub(top, eye_like(top))), adjoint(bottom)))
    given = columns(q_bar, n, m)
    inner = lax.neg(matmul(adjoint(given), lax.add(first, matmul(further, z))))
    stacked = [lax.neg(matmul(adjoint(z), inner)), inner]
    moved = lax.add(matmul(given, z), lax.concatenate(stacked, q.ndim - 2))
    return lax.add(columns(q_bar, 0, n), moved)


# --- eigh -----------------------------------------------------------------------------------------


def _inverse_gaps(w):
    """1 / (wⱼ - wᵢ) off the diagonal, zero on it."""
    shape = (*w.shape, w.shape[-1])
    right = lax.broadcast_in_dim(w, shape, (*range(w.ndim - 1), w.ndim))
    left = lax.broadcast_in_dim(w, shape, tuple(range(w.ndim)))
    gaps = lax.sub(right, left)
    eye = eye_like(gaps)
    return lax.sub(lax.div(lax.full_like(gaps, 1), lax.add(gaps, eye)), eye)


@joint("eigh")
def _eigh(arriving, outs, eqn):
    """dw = diag(Re X), dV = V (F ∘ X), where X = Vᴴ dA V and F holds the inverse gaps."""
    subset = eqn.params["subset_by_index"]
    if subset is not None and subset != (0, eqn.in_avals[0].shape[-1]):
        raise NotImplementedError(
            "Derivatives not defined for partial eigen decomposition: eigh was called with "
            f"subset_by_index={subset} at {eqn.source}"
        )
    (v_bar, w_bar), (v, w) = arriving, outs
    inner = None
    if w_bar is not None:
        inner = diagonal_matrix(lax.convert_element_type(w_bar, v.dtype))
    if v_bar is not None:
        gaps = lax.convert_element_type(_inverse_gaps(w), v.dtype)
        turned = lax.mul(gaps, matmul(adjoint(v), conj(v_bar)))
        inner = _plus(inner, turned)
    return conj(matmul(matmul(v, inner), adjoint(v)))


# --- factorisations whose derivative needs factors that were not asked for ------------------------


class _Fuller(Rule):
    """Runs the primitive for all its factors, keeps them, and returns those asked for."""

    def __init__(self, gradient, check, **all_factors):
        self.gradient, self.check, self.all_factors = gradient, check, all_factors

    def forward(self, rules, eqn, active, values):
        self.check(eqn)
        factors = eqn.bind(*values, **self.all_factors)
        return factors[: len(eqn.outputs)], tuple(factors)

    def pullback(self, rules, eqn, active, kept, cts):
        gradients = [ct if ct is None else conj(ct) for ct in cts]
        return [conj(self.gradient(eqn, kept, gradients))]


# --- svd ------------------------------------------------------------------------------------------


def _svd_gradient(u, s, v, u_bar, s_bar, v_bar):
    """Gradient of A from those of U, s and V; None for those that did not arrive.

    With dS = Uᴴ dA V: ds = diag(Re dS), and U, V turn by F ∘ (dS S + S dSᴴ) and F ∘ (S dS + dSᴴ S).
    """
    wide = functools.partial(lax.convert_element_type, new_dtype=u.dtype)
    inner = None
    if u_bar is not None or v_bar is not None:
        gaps = wide(_inverse_gaps(lax.square(s)))
    if u_bar is not None:
        turned = matmul(adjoint(u), u_bar)
        inner = scale_columns(_hermitian_sum(lax.mul(gaps, turned)), wide(s))
        zero = lax.eq(s, lax.full_like(s, 0))
        inverse = lax.select(zero, lax.full_like(s, 0), lax.div(lax.full_like(s, 1), s))
        phase = lax.mul(imaginary(diagonal(turned)), wide(inverse))
        inner = lax.add(inner, diagonal_matrix(phase))
    if v_bar is not None:
        turned = matmul(adjoint(v), v_bar)
        inner = _plus(inner, scale_rows(wide(s), _hermitian_sum(lax.mul(gaps, turned))))
    if s_bar is not None:
        inner = _plus(inner, diagonal_matrix(wide(s_bar)))
    gradient = matmul(matmul(u, inner), adjoint(v))
    # Beyond the square: what leaves the span of U, or of V.
    if u_bar is not None and u.shape[-2] > u.shape[-1]:
        outer = _leave_span(u, u_bar, wide(s))
        gradient = lax.add(gradient, matmul(outer, adjoint(v)))
    if v_bar is not None and v.shape[-2] > v.shape[-1]:
        outer = _leave_span(v, v_bar, wide(s))
        gradient = lax.add(gradient, matmul(u, adjoint(outer)))
    return gradient


def _hermitian_sum(x):
    return lax.add(x, adjoint(x))


def _leave_span(u, u_bar, s):
    """(1 - U Uᴴ) Ū S⁻¹."""
    scaled = lax.div(u_bar, lax.broadcast_in_dim(s, u.shape, (*range(s.ndim - 1), u.ndim - 1)))
    return lax.sub(scaled, matmul(u, matmul(adjoint(u), scaled)))


def _svd(eqn, factors, gradients):
    s, u, vh = factors
    s_bar, u_bar, vh_bar = (*gradients, None, None)[:3]
    v_bar = None if vh_bar is None else adjoint(vh_bar)
    return _svd_gradient(u, s, adjoint(vh), u_bar, s_bar, v_bar)


def _check_svd(eqn):
    p, (m, n) = eqn.params, eqn.in_avals[0].shape[-2:]
    if not p["compute_uv"]:
        return
    case = None
    if p["full_matrices"] and m != n:
        case = "full matrices: pass full_matrices=False"
    elif p["subset_by_index"] not in (None, (0, min(m, n))):
        case = "subset_by_index with compute_uv=True: compute all singular vectors, or none"
    if case is not None:
        raise NotImplementedError(
            f"Singular value decomposition JVP not implemented for {case} (called at {eqn.source})"
        )


register("svd", _Fuller(_svd, _check_svd, full_matrices=False, compute_uv=True))

# --- eig ------------------------------------------------------------------------------------------


def _eig(eqn, factors, gradients):
    """dw = diag(P), dV = V (F ∘ P) + V diag(c), where P = V⁻¹ dA V and c keeps V normalised."""
    left = eqn.params["compute_left_eigenvectors"]
    w, *vl, vr = factors
    w_bar, of_vectors = gradients[0], [*gradients[1:], None, None]
    vl_bar, vr_bar = of_vectors[:2] if left else (None, of_vectors[0])
    gradient = lax.full_like(vr, 0)
    if w_bar is not None or vr_bar is not None:
        gradient = lax.add(gradient, _eig_gradient(w, vr, w_bar, vr_bar))
    if vl_bar is not None:  # the left eigenvectors are the right ones of Aᴴ
        gradient = lax.add(gradient, adjoint(_eig_gradient(conj(w), vl[0], None, vl_bar)))
    return gradient if is_complex(eqn.in_avals[0]) else lax.real(gradient)


def _eig_gradient(w, v, w_bar, v_bar):
    inner = lax.full_like(v, 0) if w_bar is None else diagonal_matrix(w_bar)
    if v_bar is not None:
        moved = lax.add(v_bar, _normalisation_gradient(v, v_bar))
        turned = lax.mul(conj(_inverse_gaps(w)), matmul(adjoint(v), moved))
        inner = lax.add(inner, turned)
    return solve(adjoint(v), matmul(inner, adjoint(v)))


def _normalisation_gradient(v, v_bar):
    """An eigenvector has unit norm, and its component of largest magnitude is real.

    Moved by u it changes by u + c v, where c = -Re(vᴴ u) - i Im(uₖ) / vₖ and k is that component.
    """
    axis = v.ndim - 2
    along = lax.reduce_sum(lax.mul(conj(v), v_bar), (axis,))
    largest = lax.argmax(lax.abs(v), axis, np.int32)
    here = lax.eq(
        lax.broadcasted_iota(np.int32, v.shape, axis),
        lax.broadcast_in_dim(largest, v.shape, (*range(axis), axis + 1)),
    )
    peak = lax.reduce_sum(lax.select(here, lax.real(v), lax.full_like(lax.real(v), 0)), (axis,))
    length = lax.neg(scale_columns(v, lax.convert_element_type(lax.real(along), v.dtype)))
    turn = lax.neg(lax.div(lax.imag(along), peak))
    turn = lax.complex(lax.full_like(turn, 0), turn)
    turn = lax.broadcast_in_dim(turn, v.shape, (*range(axis), axis + 1))
    return lax.add(length, lax.select(here, turn, lax.full_like(turn, 0)))


def _check_eig(eqn):
    p = eqn.params
    vectors = p["compute_left_eigenvectors"] or p["compute_right_eigenvectors"]
    if vectors and not p["enable_eigvec_derivs"]:
        raise NotImplementedError(
            "Derivatives of non-symmetric eigenvectors are only valid for distinct eigenvalues and "
            f"vectors normalised as LAPACK does it (eig called at {eqn.source}): pass "
            "enable_eigvec_derivs=True to jax.lax.linalg.eig, or ask for eigenvalues alone"
        )


register("eig", _Fuller(_eig, _check_eig, compute_right_eigenvectors=True))
