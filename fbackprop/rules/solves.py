"""Solving linear systems: triangular, tridiagonal, and by a user's own solver."""

from __future__ import annotations

from jax import lax
from jax.lax import linalg

from fbackprop.passes import pull
from fbackprop.program import program_of, zeros
from fbackprop.rules.matrices import conj, matmul, transposed, triangle
from fbackprop.table import Rule, joint, register, row

# --- triangular_solve ----------------------------------------------------------------------------
#
# x solves op(a) x = b, or x op(a) = b, where op may transpose and conjugate a triangular matrix.


def _right_side(ct, x, eqn):
    """The cotangent of b solves the transposed system."""
    options = {**eqn.params, "transpose_a": not eqn.params["transpose_a"]}
    return linalg.triangular_solve(x, ct, **options)


def _matrix(ct, x, out, eqn):
    """From op(a) dx = -d op(a) x: the product of the transposed system's solution with x."""
    p = eqn.params
    ct = _right_side(ct, x, eqn)
    ct = matmul(ct, transposed(out)) if p["left_side"] else matmul(transposed(out), ct)
    if p["transpose_a"]:
        ct = transposed(ct)
    if p["conjugate_a"]:
        ct = conj(ct)
    return lax.neg(triangle(ct, p["lower"], offset=int(p["unit_diagonal"])))


row("triangular_solve", _matrix, _right_side)

# --- tridiagonal_solve ----------------------------------------------------------------------------


def _shift(x, by: int, axis: int):
    """Move elements along an axis by one place; zeros come in."""
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (by, -by, 0)
    return lax.pad(x, lax.full_like(x, 0, shape=()), pads)


@joint("tridiagonal_solve")
def _tridiagonal_solve(ct, xs, out, eqn):
    """b̄ solves the transposed system; each diagonal gets the products that it entered in."""
    below, main, above, _ = xs
    diagonals = _shift(above, 1, axis=-1), main, _shift(below, -1, axis=-1)
    ct = eqn.primitive.bind(*diagonals, ct, **eqn.params)
    moved = _shift(out, 1, axis=-2), out, _shift(out, -1, axis=-2)
    products = [lax.mul(ct, x) for x in moved]
    return (*(lax.neg(lax.reduce_sum(p, (p.ndim - 1,))) for p in products), ct)


# --- custom_linear_solve --------------------------------------------------------------------------


class CustomLinearSolve(Rule):
    """`custom_linear_solve`: A x = b for a matrix given by its product with a vector.

    The cotangent of b solves the transposed system, by the user's `transpose_solve`; that of A,
    wherever its product depends on an input, is the sweep of the product A x against -b̄.
    """

    def active_outputs(self, rules, eqn, active):
        n = len(eqn.params["jaxprs"].matvec.out_avals)
        of_matrix, of_right_side = self._groups(eqn, active)
        moving = any(of_matrix) or any(of_right_side)
        return tuple(moving and i < n for i in range(len(eqn.outputs)))

    @staticmethod
    def _groups(eqn, values):
        """What the matrix's product depends on, and the right-hand side."""
        lengths = eqn.params["const_lengths"]
        return values[: lengths.matvec], values[sum(lengths) :]

    def forward(self, rules, eqn, active, values):
        outs = eqn.bind(*values)
        of_matrix, of_right_side = self._groups(eqn, active)
        constants = values[: len(values) - len(of_right_side)]
        solution = outs[: len(of_right_side)] if any(of_matrix) else []
        return outs, (constants, solution)

    def pullback(self, rules, eqn, active, kept, cts):
        constants, solution = kept
        lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
        if jaxprs.transpose_solve is None:
            raise TypeError(
                "transpose_solve required for backwards mode automatic differentiation of "
                f"custom_linear_solve (called at {eqn.source})"
            )
        of_matrix, of_right_side = self._groups(eqn, active)
        right = [
            zeros(aval) if ct is None else ct
            for ct, aval in zip(cts, eqn.out_avals[: len(of_right_side)], strict=False)
        ]
        right = eqn.primitive.bind(
            *_exchanged(constants, lengths),
            *right,
            const_lengths=lengths.transpose(),
            jaxprs=jaxprs.transpose(),
        )[: len(of_right_side)]
        found = [None] * len(constants)
        if any(of_matrix):
            product = program_of(jaxprs.matvec)
            moving = (*of_matrix, *(False,) * len(solution))
            operands = [*constants[: lengths.matvec], *solution]
            swept = pull(rules, product, moving, operands, [lax.neg(ct) for ct in right])
            found[: lengths.matvec] = swept[: lengths.matvec]
        return [*found, *right]


def _exchanged(constants, lengths) -> list:
    """The constants of the four functions in the order that the transposed system has them."""
    remaining = iter(constants)
    matvec, vecmat, solve, transpose_solve = ([next(remaining) for _ in range(n)] for n in lengths)
    return [*vecmat, *matvec, *transpose_solve, *solve]


register("custom_linear_solve", CustomLinearSolve())
