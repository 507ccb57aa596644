"""Learning without weight transport: the error goes back by other weights than the signal came.

A product of data and a weight (`dot_general`, a convolution) sends its error signal back through
the weight. Here something else stands in the weight's place; the gradient of the weight itself is
what it would be for the error signal that arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from fbackprop.credit.products import meets_weight
from fbackprop.program import value_of
from fbackprop.rewrite import Broadcast, Severed, Twinned


def feedback_alignment(feedback) -> dict:
    """Feedback alignment: fixed random weights B carry the error back, ``δₗ = (B δₗ₊₁) ⊙ φ'``.

    Lillicrap, Cownden, Tweed and Akerman 2016, "Random synaptic feedback weights support error
    backpropagation for deep learning", equation 2. The forward weights turn towards B in training.

    Args:
      feedback: a pytree like the parameters, of the same shapes and dtypes, drawn like an
        initialisation of them. Only what meets data in products and convolutions is used.

    Returns:
      Rules for `grad`, `sweep` and the others; the feedback may be traced.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> def loss(w, x):
      ...     return jnp.sum(w["out"] @ (w["in"] @ x))
      >>> w = {"in": jnp.ones((2, 2)), "out": jnp.ones((1, 2))}
      >>> b = {"in": jnp.zeros((2, 2)), "out": jnp.array([[3.0, 4.0]])}
      >>> rules = fb.credit.feedback_alignment(b)
      >>> fb.grad(loss, rules=rules)(w, jnp.array([1.0, 0.0]))["in"]
      Array([[3., 0.],
             [4., 0.]], dtype=float32)
    """

    def rule(ct, xs, twins, weights, default):
        return _back_through(lambda weight, twin: twin, ct, xs, twins, weights, default)

    return {meets_weight: Twinned(rule, feedback)}


def sign_symmetric(magnitudes) -> dict:
    """Sign-symmetric feedback: the error goes back through ``sign(W) ⊙ |M|`` with M fixed.

    Liao, Leibo and Poggio 2016, "How important is weight symmetry in backpropagation?", "fixed
    random-magnitude sign-concordant feedbacks" (section 3).

    Args:
      magnitudes: a pytree like the parameters; only magnitudes count.
    """

    def rule(ct, xs, twins, weights, default):
        def backward(weight, twin):
            return jnp.sign(weight) * jnp.abs(twin)

        return _back_through(backward, ct, xs, twins, weights, default)

    return {meets_weight: Twinned(rule, magnitudes)}


def sign_concordant() -> dict:
    """Uniform sign-concordant feedback: the error goes back through ``sign(W)``.

    Liao, Leibo and Poggio 2016 (section 3). Signals grow with the fan-out: follow it by a
    normalisation (their batch manhattan) or scale the learning rate.
    """

    def rule(ct, xs, weights, default):
        return _back_through(
            lambda weight, _: jnp.sign(weight), ct, xs, (None,) * len(xs), weights, default
        )

    return {meets_weight: rule}


def _back_through(backward: Callable, ct, xs, twins, weights, default):
    """Send a cotangent back through other weights; that of the weight is left to the default."""
    pairs = zip(xs, twins, weights, strict=True)
    at = [backward(x, twin) if is_weight else x for x, twin, is_weight in pairs]
    found = zip(default(ct, at), weights, strict=True)
    return tuple(... if is_weight else leaving for leaving, is_weight in found)


def kolen_pollack(params, feedback, updates, decay: float = 0.0):
    """Apply the same updates to forward and feedback weights, and decay both, so that they meet.

    With ``W ← (1−λ)W + u`` and ``B ← (1−λ)B + u`` the difference shrinks by 1−λ in each step
    (Kolen and Pollack 1994; Akrout et al. 2019, "Deep learning without weight transport",
    equations 16 and 17). Use it with `feedback_alignment`.

    Args:
      params, feedback: pytrees of the same structure.
      updates: what an optimizer would add to the parameters.
      decay: λ per step; it may be traced.

    Returns:
      ``(params, feedback)``, updated.
    """
    known = value_of(decay)
    if known is not None and not 0 <= known < 1:
        raise ValueError(f"decay={decay}: give a fraction per step, from 0 to below 1")

    def step(x, u):
        return (1 - decay) * x + u

    return jax.tree.map(step, params, updates), jax.tree.map(step, feedback, updates)


def direct_feedback_alignment(
    feedback: Mapping[Any, jax.Array | Sequence[jax.Array]], output: Any
) -> dict:
    """Direct feedback alignment: each layer receives the output's error e itself, as ``B e``.

    Nøkland 2016, "Direct feedback alignment provides learning in deep neural networks", equation 7.
    What is between a layer and the output passes no error signal on.

    Args:
      feedback: from the key of a layer's result (the name that `checkpoint_name` gave it, or that
        of a function, such as ``"relu"``, or a predicate) to its array B, of shape (*features, C);
        a list of them, in order of execution, if the key matches several times.
      output: the key of the output of shape (..., C) whose cotangent is e.

    Returns:
      Rules. All results must be in the same function as the output, outside loops and branches. Of
      a function of one example, map its gradient (or `sweep` it): a `vmap` within the function
      may put the axis of the examples last, where that of the features is looked for.

    Raises:
      ValueError: in use, if shapes do not fit, or if no output follows a layer.
    """
    severed = {
        key: Severed(list(b) if isinstance(b, list | tuple) else b) for key, b in feedback.items()
    }
    return {**severed, output: Broadcast()}


def target_propagation(inverse: Callable, name: Any) -> dict:
    """Difference target propagation through a layer by an (approximate) inverse of it.

    With h the layer's result and t = h − δ its target, the target of its input x is
    ``x − g(h) + g(t)``, so the error signal ``x − target`` is ``g(h) − g(h − δ)`` (Lee, Zhang,
    Fischer and Bengio 2015, "Difference target propagation", equation 15). The layer's parameters
    get the gradient of ``½‖h − t‖²``, which is their default. Begin with a small step from the loss
    at the output, ``δ = η ∂E/∂h``, by a loss scaled so.

    Args:
      inverse: g, from the layer's result to its first operand; a pytree, such as a
        `jax.tree_util.Partial` of arrays, if it has parameters.
      name: the key of the layer: the name of a jit-ted function with its input first.
    """

    def rule(inverse, ct, xs, out):
        back = jnp.subtract(inverse(out), inverse(out - ct))
        return (back, *(...,) * (len(xs) - 1))

    return {name: Partial(rule, inverse)}
