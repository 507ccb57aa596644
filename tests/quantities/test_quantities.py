"""Every quantity of every model in the zoo against its definition, in float64."""

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import zoo
from naive import assert_close, compiled

import fbackprop as fb

QUANTITIES = {
    "gradient": fb.Gradient(),
    "each": fb.ExampleGradients(),
    "norms": fb.ExampleNorms(),
    "leaf_norms": fb.ExampleNorms(per_leaf=True),
    "clipped": fb.ClippedGradient(0.5),
    "leaf_clipped": fb.ClippedGradient(0.2, per_leaf=True),
    "second_moment": fb.SecondMoment(),
    "variance": fb.Variance(),
    "noise": fb.GradientNoiseScale(),
    "dots": fb.ExampleDots(),
    "diagonal": fb.GGNDiagonal(),
    "diagonals": fb.GGNDiagonal(per_example=True),
    "blocks": fb.GGNBlock(),
    "gram": fb.Gram(),
    "weighted_gram": fb.Gram(weighted=True),
    "jacobian_norms": fb.JacobianNorms(),
}


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


class Solved:
    """A case, everything computed of it by one sweep, and the definitions."""

    def __init__(self, name: str):
        self.case = zoo.CASES[name](jax.random.key(0))
        sweep = fb.sweep(self.case.model, self.case.loss, **QUANTITIES)
        self.found = jax.device_get(compiled(sweep)(self.case.params, self.case.batch))
        naively = naive.definitions(self.case)
        self.losses, self.gradients, self.jacobians, self.hessians = naively


def flat(tree):
    """Leaves (N, C, *leaf) side by side, (N, C, P)."""
    return np.concatenate([x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(tree)], -1)


def norms_of(tree):
    return jax.tree.map(lambda g: np.sum(g.reshape(len(g), -1) ** 2, axis=-1), tree)


def total(tree):
    return sum(jax.tree.leaves(tree))


def check_loss(solved):
    assert_close(solved.found["loss"], np.mean(solved.losses))


def check_gradient_and_examples_gradients(solved):
    assert_close(solved.found["each"], solved.gradients)
    assert_close(solved.found["gradient"], naive.mean(solved.gradients))


def check_norms(solved):
    norms = norms_of(solved.gradients)
    assert_close(solved.found["norms"], total(norms))
    assert_close(solved.found["leaf_norms"], norms)


def check_clipped(solved):
    norms = norms_of(solved.gradients)

    def clipped(g, squared, max_norm):
        scale = np.minimum(1, max_norm / np.maximum(np.sqrt(squared), 1e-300))
        return np.einsum("n...,n->...", g, scale) / zoo.N

    expected = jax.tree.map(lambda g: clipped(g, total(norms), 0.5), solved.gradients)
    assert_close(solved.found["clipped"], naive.floats(expected, solved.case.params))
    expected = jax.tree.map(lambda g, n: clipped(g, n, 0.2), solved.gradients, norms)
    assert_close(solved.found["leaf_clipped"], naive.floats(expected, solved.case.params))


def check_moments(solved):
    second = naive.mean(jax.tree.map(lambda g: g**2, solved.gradients))
    assert_close(solved.found["second_moment"], second)
    variance = jax.tree.map(lambda g: np.var(g, axis=0), solved.gradients)
    assert_close(solved.found["variance"], variance)
    squared = total(jax.tree.map(lambda g: np.sum(np.mean(g, axis=0) ** 2), solved.gradients))
    noise = total(jax.tree.map(np.sum, variance)) / squared
    np.testing.assert_allclose(solved.found["noise"], noise, rtol=1e-8)


def check_dots(solved):
    g = np.concatenate([x.reshape(zoo.N, -1) for x in jax.tree.leaves(solved.gradients)], axis=-1)
    assert_close(solved.found["dots"], g @ g.T)


def check_gram_and_jacobian_norms(solved):
    j = flat(solved.jacobians)
    assert_close(solved.found["gram"], np.einsum("ncp,mdp->ncmd", j, j))
    assert_close(solved.found["jacobian_norms"], np.sum(j**2, axis=-1))


def check_curvature(solved):
    h = solved.hessians

    def block(j):
        rows = j.reshape(*j.shape[:2], -1)
        return rows.mT @ h @ rows

    blocks = jax.tree.map(block, solved.jacobians)
    assert_close(solved.found["blocks"], naive.mean(blocks))
    diagonals = jax.tree.map(
        lambda b, p: np.diagonal(b, axis1=1, axis2=2).reshape(-1, *jnp.shape(p)),
        blocks,
        solved.case.params,
    )
    assert_close(solved.found["diagonals"], naive.floats(diagonals, solved.case.params))
    assert_close(solved.found["diagonal"], naive.mean(naive.floats(diagonals, solved.case.params)))


def check_eigenvalues_of_the_weighted_gram(solved):
    j, (n, c) = flat(solved.jacobians), solved.hessians.shape[:2]
    values, vectors = np.linalg.eigh(solved.hessians)
    root = vectors * np.sqrt(np.maximum(values, 0))[:, None]
    if np.min(values) < -1e-12:  # a loss that is concave somewhere: its Hessian has no real root
        return
    rows = (root.mT @ j).reshape(n * c, -1) / n**0.5
    expected = np.linalg.svd(rows, compute_uv=False) ** 2
    gram = solved.found["weighted_gram"]
    found = np.linalg.eigvalsh(gram.reshape(gram.shape[0] * gram.shape[1], -1))[::-1]
    k = min(len(found), len(expected))
    assert_close(found[:k], expected[:k])
    assert_close(found[k:], 0 * found[k:])


CHECKS = (
    check_loss,
    check_gradient_and_examples_gradients,
    check_norms,
    check_clipped,
    check_moments,
    check_dots,
    check_gram_and_jacobian_norms,
    check_curvature,
    check_eigenvalues_of_the_weighted_gram,
)


HEAVY = (
    "transformer", "resnet", "shapes", "remat_transformer", "bodies_of_parameters",
    "scanned_transformer", "lstm", "control_flow", "parameters_in_the_carry",
)  # fmt: skip
EACH = [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in zoo.CASES]


@pytest.mark.parametrize("name", EACH)
def test_quantities(name):
    """All of a model's, from one sweep."""
    solved = Solved(name)
    for check in CHECKS:
        check(solved)
