"""Layer-wise relevance propagation, on any network: an answer's value, dealt out to its inputs.

Relevance R goes back in proportion to contributions. This is done in cotangents: with ``R = x ⊙ c``
for a value x with cotangent c, whatever is linear already deals relevance out in proportion
(``z = Σ wᵢxᵢ`` gives ``xᵢ c wᵢ``: the part wᵢxᵢ of z c), sums of a skip connection and
reshapings, poolings and lookups among them. What is left to change is little:

- an elementwise function y = φ(x) hands its relevance on, so c becomes ``c y/x``;
- an added constant (a bias) leaves its share to the other operand, so that nothing is lost (where
  that is too near zero to carry it, to the layer, in proportion to magnitudes);
- normalisers (a standard deviation, a softmax's attention) count as constants, and a product of two
  values deals to each a half;
- and the rules for layers differ in how products with weights divide what arrives.

Bach et al. 2015, "On pixel-wise explanations for non-linear classifier decisions by layer-wise
relevance propagation"; the composition follows Montavon et al. 2019, "Layer-wise relevance
propagation: an overview"; normalisers and attention are treated as by Ali et al. 2022, "XAI for
transformers: better explanations through conservative propagation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fbackprop.credit.products import is_product
from fbackprop.program import Equation, Program, bodies
from fbackprop.reverse import grad
from fbackprop.rewrite import Anywhere, Seen

ACTIVATIONS = frozenset(
    """
    abs acos acosh asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma erf erf_inv erfc exp
    exp2 expm1 floor integer_pow lgamma log log1p logistic max min one_minus_square polynomial pow
    rem round sign sin sinh square tan tanh
    """.split()
)
CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call"))
CALLS = CUSTOM | {"jit", "closed_call"}
FITTED = frozenset(("broadcast_in_dim", "convert_element_type"))  # operands to each other
# What else may stand in a function whose every element depends on one of its operand.
ELEMENTWISE = CALLS | ACTIVATIONS | FITTED | frozenset(
    """
    add and copy div eq ge gt is_finite le lt mul ne neg not or rsqrt select_n sqrt stop_gradient
    sub xor
    """.split()
)  # fmt: skip
NORMALISERS = Anywhere(("rsqrt", "sqrt", "softmax", "_softmax"))
TINY = 1e-9
LARGEST = 2.0  # how much an element's cotangent may grow where a constant was added


def epsilon(epsilon: float = 1e-9) -> dict:
    """LRP-ε: relevance in proportion to contributions, ``Rᵢ = Σⱼ xᵢwᵢⱼ/(zⱼ + ε sign zⱼ) Rⱼ``.

    Bach et al. 2015, equation 58. ε absorbs some: relevance is conserved up to about ε/|z|.

    Args:
      epsilon: ε, in units of the pre-activations.

    Returns:
      Rules, to be passed to `relevance`.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon}: give a number that is not negative")

    def rule(ct, xs, out, default, eqn, active):
        return default(ct * _ratio(out, out, epsilon))

    return _rules(rule)


def gamma(gamma: float = 0.25) -> dict:
    """LRP-γ: positive contributions count more, ``wᵢⱼ + γ wᵢⱼ⁺`` stands for wᵢⱼ.

    Montavon et al. 2019, section 10.2.2; for inputs of any sign, a contribution xᵢwᵢⱼ that is
    positive (for a positive zⱼ; negative for a negative one) is taken 1 + γ times.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma}: give a number that is not negative")

    def rule(ct, xs, out, default, eqn, active):
        parts = _Parts(xs, eqn, active, default)
        helps = jnp.where(out >= 0, parts.positive, parts.negative)
        share = ct * _ratio(out, out + gamma * helps)
        none = jnp.zeros_like(share)
        up, down = jnp.where(out >= 0, share, none), jnp.where(out >= 0, none, share)
        found = zip(default(share), parts.back(up, down), strict=True)
        return tuple(None if b is None else a + gamma * b for a, b in found)

    return _rules(rule)


def alpha_beta(alpha: float = 2.0, beta: float = 1.0) -> dict:
    """LRP-αβ: positive and negative contributions apart, ``R = α R⁺ − β R⁻`` with α − β = 1.

    ``Rᵢ = Σⱼ (α (xᵢwᵢⱼ)⁺/zⱼ⁺ − β (xᵢwᵢⱼ)⁻/zⱼ⁻) Rⱼ`` (Bach et al. 2015, equation 60). Where all
    contributions are of one sign they get all.
    """
    if beta < 0 or abs(alpha - beta - 1) > 1e-6:
        raise ValueError(f"alpha={alpha} and beta={beta}: alpha − beta must be 1, and beta ≥ 0")

    def rule(ct, xs, out, default, eqn, active):
        parts = _Parts(xs, eqn, active, default)
        some, others = parts.positive > 0, parts.negative < 0
        # Of one sign alone, contributions get all.
        a, b = jnp.where(others, alpha, 1), jnp.where(some, beta, -1)
        relevance, none = (ct * out).astype(ct.dtype), jnp.zeros_like(ct)
        up = jnp.where(some, a * _ratio(relevance, parts.positive), none)
        down = jnp.where(others, -b * _ratio(relevance, parts.negative), none)
        return parts.back(up.astype(ct.dtype), down.astype(ct.dtype))

    return _rules(rule)


def relevance(f: Callable, x, rules: Mapping | None = None):
    """The relevance of each element of an input for an output, ``x ⊙ ∂f/∂x`` by the rules given.

    It sums to f(x), as far as the function starts from its input (a sigmoid, which is not zero at
    zero, does not) and the rules conserve.

    Args:
      f: function of `x` to a real scalar: the logit of the class to be explained, say. Of one
        example: map over a batch with `vmap`.
      x: an array or a pytree of arrays.
      rules: `epsilon`, `gamma` or `alpha_beta`, or of your own; by default `epsilon`.

    Returns:
      A pytree like `x`.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> w = jnp.array([[2.0, -1.0]])
      >>> fb.credit.relevance(lambda x: (w @ x)[0] + 3.0, jnp.array([1.0, 1.0])).tolist()
      [8.0, -4.0]
    """
    gradient = grad(f, rules=epsilon() if rules is None else rules)(x)
    return jax.tree.map(jnp.multiply, x, gradient)


# --- products with weights ------------------------------------------------------------------------


class _Parts:
    """The positive and the negative contributions to the results of a product.

    Attributes:
      positive, negative: their sums, of the shape of the result.
    """

    def __init__(self, xs, eqn, active, default):
        self.xs, self.default = xs, default
        self.i = active.index(True)
        x, w = xs[self.i], xs[1 - self.i]
        self.weights = jnp.maximum(w, 0), jnp.minimum(w, 0)
        signs, weights = (jnp.maximum(x, 0), jnp.minimum(x, 0)), self.weights

        def product(x, w):
            (out,) = eqn.bind(*self._operands(x, w))
            return out

        self.positive = product(signs[0], weights[0]) + product(signs[1], weights[1])
        self.negative = product(signs[0], weights[1]) + product(signs[1], weights[0])

    def _operands(self, x, w) -> tuple:
        return (x, w) if self.i == 0 else (w, x)

    def back(self, up, down) -> tuple:
        """Cotangents c: x c sums up positive parts times `up` and negative ones times `down`."""
        x = self.xs[self.i]

        def through(ct, w):
            return self.default(ct, self._operands(x, w))[self.i]

        plus, minus = self.weights
        found = jnp.where(
            x >= 0,
            through(up, plus) + through(down, minus),
            through(up, minus) + through(down, plus),
        )
        return self._operands(found, None)


def _ratio(part, whole, epsilon: float = 0.0):
    """part/(whole + ε sign whole), zero where that divides by zero."""
    whole = whole + epsilon * jnp.where(whole < 0, -1, 1).astype(whole.dtype)
    safe = jnp.where(whole == 0, jnp.ones_like(whole), whole)
    return jnp.where(whole == 0, jnp.zeros_like(whole), part / safe)


# --- what every set of rules shares ---------------------------------------------------------------


def _rules(with_weights: Callable) -> dict:
    """A set of rules from that of a product with something that does not depend on the input."""

    def product(ct, xs, out, default, eqn, active):
        if all(active):
            return _halves(ct, default, active)
        return with_weights(ct, xs, out, default, eqn, active)

    return {
        NORMALISERS: None,
        is_product: product,
        _is({"add", "sub", "add_any"}): _sum,
        _is({"mul"}): _halves,
        _is({"div"}): _quotient,
        _is_activation: _activation,
    }


def _is(primitives) -> Callable[[Seen], bool]:
    return lambda eqn: eqn.primitive.name in primitives


def _is_activation(eqn: Seen) -> bool:
    """Whether every element of the result depends on one of each operand of its shape."""
    if eqn.primitive.name in ACTIVATIONS:
        return True
    if eqn.primitive.name not in CALLS or len(eqn.outputs) != 1:
        return False
    # Into others of several operands the rules follow, which know what depends on the input.
    if eqn.arity != 1 and not _is_custom(eqn):
        return False
    return all(map(_is_elementwise, bodies(eqn)))


def _is_custom(eqn: Equation) -> bool:
    """Whether it has a derivative of its own, or is a call of nothing but such a function."""
    if eqn.primitive.name in CUSTOM:
        return True
    within = [inner for body in bodies(eqn) for inner in body.equations]
    within = [inner for inner in within if inner.primitive.name not in FITTED]
    return len(within) == 1 and _is_custom(within[0])


def _is_elementwise(program: Program) -> bool:
    names = (eqn.primitive.name in ELEMENTWISE for eqn in program.equations)
    return all(names) and all(
        _is_elementwise(body) for eqn in program.equations for body in bodies(eqn)
    )


def _activation(ct, xs, out, default, active):
    """All relevance to the one operand that depends on the input: R_x = R_y, so c_x = c_y y/x.

    An operand near zero can carry no relevance: what it cannot, with y/x limited, is dealt to all
    elements in proportion to their magnitude. Otherwise large relevances would have to cancel.
    """
    if sum(active) != 1 or xs[active.index(True)].shape != out.shape:
        return ...
    x = xs[active.index(True)]
    by_default = default(ct)
    by_default = by_default if len(active) == 1 else by_default[active.index(True)]
    if by_default is None:  # of a step
        by_default = jnp.zeros_like(x)
    is_zero = jnp.abs(x) < TINY
    ratio = jnp.clip(out / jnp.where(is_zero, jnp.ones_like(x), x), -LARGEST, LARGEST)
    found = jnp.where(is_zero, by_default, ct * ratio)
    left = jnp.sum(ct * out - found * x)
    found = found + jnp.sign(x) * _ratio(left, jnp.sum(jnp.abs(x)))
    return tuple(found if a else None for a in active)


def _sum(ct, xs, out, default, active):
    """An added constant leaves its share to the other operand."""
    return ... if all(active) else _activation(ct, xs, out, default, active)


def _halves(ct, default, active):
    """A product of two values deals a half to each, one with a constant all."""
    if not all(active):
        return ...
    return tuple(0.5 * g for g in default(ct))


def _quotient(ct, xs, out, default, active):
    """A quotient hands its relevance to the numerator, and if that is constant to the other."""
    if active == (False, True):
        return _activation(ct, xs, out, default, active)
    return (..., None)
