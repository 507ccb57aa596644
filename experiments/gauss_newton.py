"""The Gauss-Newton update: curvature without ever forming a matrix.

With outputs z = f(θ), loss L(θ) = mean ℓ(z) and gradient g, one step solves

    (G + λI) d = −g,    G = JᵀHJ,    J = ∂z/∂θ,    H = ∂²L/∂z²,

by conjugate gradients. A product Gv is three sweeps: Jv forward through the model, H(Jv) forward
through the gradient of the loss with respect to the outputs, and Jᵀ backward through the model.
The damping λ follows the reduction ratio: what the loss fell by, over what the quadratic model
promised. A step that does not lower the loss is not taken.

Sources: J. Martens, "Deep learning via Hessian-free optimization", ICML 2010, sections 3 and 4;
D. Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import fbackprop as fb
from experiments.tasks import Params, Task

Product = Callable[[Params], Params]

SHRINK, GROW, REJECTED = 1 / 3, 2.0, 4.0  # what λ is multiplied by
GOOD, POOR = 0.75, 0.25  # reduction ratios above and below which λ moves


class Solution(NamedTuple):
    """What conjugate gradients found: the direction, what is left over and the products spent."""

    direction: Params
    residual: Params
    products: jax.Array


class Step(NamedTuple):
    """The outcome of one Gauss-Newton step; ``loss`` is the one it started from."""

    params: Params
    damping: jax.Array
    loss: jax.Array
    products: jax.Array
    accepted: jax.Array


def product(task: Task, params: Params, inputs: jax.Array, targets: jax.Array) -> Product:
    """The map v ↦ Gv of the mean loss over a batch, at ``params``."""

    def predict(params: Params) -> jax.Array:
        return task.predict(params, inputs)

    def loss(outputs: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(task.loss)(outputs, targets))

    outputs, pullback = fb.vjp(predict, params)

    def multiply(vector: Params) -> Params:
        _, forward = jax.jvp(predict, (params,), (vector,))
        _, curved = jax.jvp(fb.grad(loss), (outputs,), (forward,))
        return pullback(curved)[0]

    return multiply


def conjugate_gradients(
    multiply: Product, target: Params, iterations: int, tolerance: float
) -> Solution:
    """Solve Ax = target for a positive definite A, from x = 0.

    Args:
        multiply: the map v ↦ Av.
        target: the right-hand side.
        iterations: how many products with A to spend at most.
        tolerance: stop where the residual's norm has fallen to this part of the target's.
    """
    start = dot(target, target)

    def unfinished(state):
        _, _, _, square, spent = state
        return (spent < iterations) & (square > tolerance**2 * start)

    def improve(state):
        solution, residual, search, square, spent = state
        image = multiply(search)
        length = square / dot(search, image)
        solution = add(solution, length, search)
        residual = add(residual, -length, image)
        fresh = dot(residual, residual)
        return solution, residual, add(residual, fresh / square, search), fresh, spent + 1

    zero = jax.tree.map(jnp.zeros_like, target)
    state = (zero, target, target, start, jnp.int32(0))
    solution, residual, _, _, spent = jax.lax.while_loop(unfinished, improve, state)
    return Solution(solution, residual, spent)


def step(
    task: Task,
    params: Params,
    damping: jax.Array,
    inputs: jax.Array,
    targets: jax.Array,
    *,
    iterations: int,
    tolerance: float = 1e-2,
) -> Step:
    """One damped Gauss-Newton step on a batch.

    Args:
        task: the model and its loss.
        params: where to start.
        damping: λ, a scalar.
        inputs: shape (N, ...).
        targets: shape (N, ...).
        iterations: products with G to spend at most.
        tolerance: of the conjugate gradients, relative to the gradient's norm.
    """
    loss, gradient = fb.value_and_grad(task.mean_loss)(params, inputs, targets)
    curvature = product(task, params, inputs, targets)
    descent = jax.tree.map(jnp.negative, gradient)

    def damped(vector: Params) -> Params:
        return add(curvature(vector), damping, vector)

    direction, residual, products = conjugate_gradients(damped, descent, iterations, tolerance)
    trial = add(params, 1.0, direction)
    # Gd = −g − r − λd costs no further product, so the model's promise −gᵀd − ½dᵀGd is free.
    promised = 0.5 * (
        dot(descent, direction) + dot(residual, direction) + damping * dot(direction, direction)
    )
    fallen = loss - task.mean_loss(trial, inputs, targets)
    accepted = fallen > 0  # false for NaN too
    ratio = jnp.where(accepted, fallen / promised, -1.0)
    factor = jnp.where(ratio > GOOD, SHRINK, jnp.where(ratio < POOR, GROW, 1.0))
    factor = jnp.where(accepted, factor, REJECTED).astype(damping.dtype)
    taken = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), trial, params)
    return Step(taken, damping * factor, loss, products, accepted)


def dot(left: Params, right: Params) -> jax.Array:
    """The inner product of two pytrees."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, left, right)), start=jnp.zeros(()))


def add(left: Params, factor: jax.Array | float, right: Params) -> Params:
    """``left + factor · right``, leaf by leaf, in the dtype of ``left``."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(factor, x.dtype) * y, left, right)
