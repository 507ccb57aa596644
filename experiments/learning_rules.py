"""The learning rules that are compared with backpropagation, one row each.

All of them train one unchanged network, whose activations are named ``HIDDEN`` and whose outputs
are named ``OUTPUT``; they differ in the backward rules that its gradient is taken with.

Index legend: L layers, B examples in a batch, n units of a hidden layer, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import lecun_normal

import fbackprop as fb
from fbackprop import networks
from fbackprop.networks import Network

RuleName = Literal[
    "backprop",
    "feedback-alignment",
    "direct-feedback",
    "sign-symmetric",
    "sign-concordant",
    "kolen-pollack",
    "quantised",
    "last-layer",
]
Params: TypeAlias = Any  # of `networks.mlp`: a kernel (I, O) and a bias (O,) for each layer
Feedback: TypeAlias = Any  # a pytree of arrays, () for rules that have none
Draw: TypeAlias = Callable[[Callable[[jax.Array], Params], jax.Array], Feedback]

HIDDEN, OUTPUT = "hidden", "output"


def network(widths: Sequence[int], activation: Callable[[jax.Array], jax.Array]) -> Network:
    """A multilayer perceptron with names at its activations and its outputs."""
    plain = networks.mlp(widths, lambda z: checkpoint_name(activation(z), HIDDEN))
    return Network(plain.init, lambda params, x: checkpoint_name(plain.apply(params, x), OUTPUT))


class LearningRule(NamedTuple):
    """One row.

    Attributes:
      label: in figures and tables.
      colour: in figures.
      rules: from the feedback and a step's key to the backward rules; both may be traced.
      draw: from the network's ``init`` and a key to the feedback.
      backward: from the parameters and the feedback to what the errors go back through, a pytree
        like the parameters; None where nothing stands in the weights' place.
      dashes: the style of the line in figures.
      update: from parameters, feedback, what the optimizer adds to the parameters, and a decay per
        step, to the next parameters and feedback.
    """

    label: str
    colour: str
    rules: Callable[[Feedback, jax.Array], dict]
    draw: Draw = lambda init, key: ()
    backward: Callable[[Params, Feedback], Params] | None = None
    dashes: str = "-"
    update: Callable[[Params, Feedback, Params, float], tuple[Params, Feedback]] = (
        lambda params, feedback, updates, decay: (optax.apply_updates(params, updates), feedback)
    )


def _like_weights(init: Callable[[jax.Array], Params], key: jax.Array) -> Params:
    """Drawn like an initialisation of the network."""
    return init(key)


def _from_output(init: Callable[[jax.Array], Params], key: jax.Array) -> list[jax.Array]:
    """For each hidden layer (n, C), drawn like the weights of outputs that follow it at once."""
    kernels = [layer["kernel"] for layer in jax.eval_shape(init, key)]
    shapes = [(kernel.shape[1], kernels[-1].shape[1]) for kernel in kernels[:-1]]
    keys = jax.random.split(key, len(shapes))
    return [lecun_normal()(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def _direct(feedback: list[jax.Array], key: jax.Array) -> dict:
    return fb.credit.direct_feedback_alignment({HIDDEN: feedback}, output=OUTPUT)


def _normalised_signs(feedback: Feedback, key: jax.Array) -> dict:
    """Signs are √n times the weights that a layer of n inputs starts with: divide by √n."""

    def divided(ct: jax.Array) -> jax.Array:
        return ct / ct.shape[-1] ** 0.5

    return fb.credit.sign_concordant() | {HIDDEN: divided}


def _signs(params: Params, feedback: Feedback) -> Params:
    return jax.tree.map(jnp.sign, params)


def _signs_and_magnitudes(params: Params, feedback: Params) -> Params:
    return jax.tree.map(lambda w, m: jnp.sign(w) * jnp.abs(m), params, feedback)


def _aligned(feedback: Feedback, key: jax.Array) -> dict:
    return fb.credit.feedback_alignment(feedback)


# Okabe and Ito's colours, which are told apart with any colour vision.
RULES: dict[RuleName, LearningRule] = {
    "backprop": LearningRule("backpropagation", "#000000", lambda feedback, key: {}),
    "feedback-alignment": LearningRule(
        "feedback alignment",
        "#D55E00",
        _aligned,
        draw=_like_weights,
        backward=lambda params, feedback: feedback,
    ),
    "direct-feedback": LearningRule(
        "direct feedback alignment", "#CC79A7", _direct, draw=_from_output
    ),
    "sign-symmetric": LearningRule(
        "sign-symmetric",
        "#009E73",
        lambda feedback, key: fb.credit.sign_symmetric(feedback),
        draw=_like_weights,
        backward=_signs_and_magnitudes,
    ),
    "sign-concordant": LearningRule(
        "uniform sign-concordant", "#56B4E9", _normalised_signs, backward=_signs
    ),
    "kolen-pollack": LearningRule(
        "Kolen–Pollack",
        "#0072B2",
        _aligned,
        draw=_like_weights,
        backward=lambda params, feedback: feedback,
        update=fb.credit.kolen_pollack,
    ),
    "quantised": LearningRule(
        "8-bit error signals",
        "#E69F00",
        lambda feedback, key: fb.credit.quantised(key=key, bits=8),
        dashes="--",  # it hides backpropagation
    ),
    "last-layer": LearningRule("last layer only", "#999999", lambda feedback, key: {HIDDEN: None}),
}
