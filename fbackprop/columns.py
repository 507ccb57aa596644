"""Columns: what is sent back from an example's prediction.

The backward sweep carries any number of vectors from the prediction z to the parameters. One of
them, the loss's gradient, gives the gradient. The columns of a root S of the loss's Hessian at z,
``S Sᵀ = ∂²ℓ/∂z²``, give the Gauss-Newton matrix ``Jᵀ S Sᵀ J``, exactly; a few random combinations
of them, or the loss's gradients for labels drawn from the model, give it in the mean (Schraudolph
2002; Dangel, Kunstner and Hennig 2020).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from fbackprop import losses
from fbackprop.program import (
    Equation,
    Program,
    Var,
    inlined,
    is_inexact,
    program_of,
    trace_tree,
    type_of,
)
from fbackprop.reverse import grad
from fbackprop.rules.derived import tangent_program


class Example(NamedTuple):
    """What columns are made from: one example's loss, prediction, target and a random key."""

    loss: Callable
    prediction: Any
    target: Any
    key: jax.Array | None

    def of_moving(self) -> Example:
        """The same with what has no derivative (masks, counts) made a part of the loss.

        The prediction is then the list of its other leaves, if it had any such.
        """
        leaves, structure = jax.tree.flatten(self.prediction)
        moves = [is_inexact(type_of(leaf)) for leaf in leaves]
        if all(moves):
            return self

        def loss(moving, target):
            moving = iter(moving)
            full = [next(moving) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
            return self.loss(jax.tree.unflatten(structure, full), target)

        moving = [leaf for m, leaf in zip(moves, leaves, strict=True) if m]
        return self._replace(loss=loss, prediction=moving)

    def flat(self):
        """The elements of the prediction that have derivatives, and what takes them to its leaves.

        Raises:
          TypeError: if they are complex. Curvature is of real ones.
        """
        flat, unravel = ravel_pytree(self.of_moving().prediction)
        if jnp.iscomplexobj(flat):
            raise TypeError(
                "the prediction is complex, and curvature is of real predictions: return its real "
                "and imaginary parts, and let the loss put them together"
            )
        return flat, unravel

    def slope(self, target) -> list:
        """The loss's gradient for a target: its leaves."""
        moving = self.of_moving()
        return jax.tree.leaves(grad(moving.loss)(moving.prediction, target))


def is_count(x) -> bool:
    """Whether this is a whole number from one up."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x > 0)


def _check_samples(samples) -> None:
    if not is_count(samples):
        raise ValueError(f"samples={samples}: draw a whole number of samples, at least one")


@dataclasses.dataclass(frozen=True)
class LossGradient:
    """One column, the gradient of the example's loss: the sites are those of its gradient."""

    needs_key: ClassVar[bool] = False

    def __call__(self, example: Example):
        """The columns, a pytree like the prediction with an axis of columns in front; their signs.

        These are an array (C,), or None where all are positive. Of a prediction's leaves those have
        columns that have derivatives.
        """
        return [x[None] for x in example.slope(example.target)], None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """One column for each element of the prediction, a unit vector: rows of the Jacobian."""

    needs_key: ClassVar[bool] = False

    def __call__(self, example: Example):
        flat, unravel = example.flat()
        return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype)), None


@dataclasses.dataclass(frozen=True)
class HessianRoot:
    """Columns of a root of the loss's Hessian H at the prediction.

    ``H = Σ signs[c] · column c · column cᵀ``; all signs are 1 for a convex loss.

    Attributes:
      samples: None for a whole root; else how many random combinations of its columns, of which
        the expectation of the sum is H (for a convex loss; negative curvature is left out).
    """

    samples: int | None = None

    def __post_init__(self):
        if self.samples is not None:
            _check_samples(self.samples)

    @property
    def needs_key(self) -> bool:
        return self.samples is not None

    def __call__(self, example: Example):
        root = _root_of(example)
        if self.samples is None:
            return root.columns(), root.signs()
        draws = jax.random.rademacher(example.key, (self.samples, *root.shape), root.dtype)
        return jax.vmap(root.combine)(draws / self.samples**0.5), None


@dataclasses.dataclass(frozen=True)
class Labels:
    """The loss's gradients for labels drawn from the model's own predictive distribution.

    Attributes:
      samples: how many labels for each example; the columns are scaled by its root.
      draw: ``draw(key, prediction)`` returns a label; None where the loss is of `fb.losses`.
    """

    samples: int
    draw: Callable | None = None
    needs_key: ClassVar[bool] = True

    def __post_init__(self):
        _check_samples(self.samples)

    def __call__(self, example: Example):
        z, target = example.prediction, example.target
        own = [draw for loss, draw in _LABELS.items() if loss is example.loss]
        if self.draw is None and not own:
            name = getattr(example.loss, "__name__", repr(example.loss))
            raise ValueError(
                f"labels cannot be drawn for the loss '{name}': give label=, a function of a key "
                "and a prediction, or use a loss of fb.losses"
            )

        def column(key):
            if self.draw is not None:
                return example.slope(self.draw(key, z))
            return example.slope(own[0](key, z, jnp.asarray(target)))

        found = jax.vmap(column)(jax.random.split(example.key, self.samples))
        return jax.tree.map(lambda x: x / self.samples**0.5, found), None


def labels(samples: int, label: Callable | str | None) -> Labels:
    """Labels drawn by a function; or by the loss itself, for "model" and None."""
    if not (label is None or label == "model" or callable(label)):
        raise ValueError(f'label={label!r}: give "model", or a function that draws a label')
    if not callable(label):
        return Labels(samples)
    return Labels(samples, hashable(label))


def hashable(function: Callable) -> Callable:
    """The function; one that cannot be hashed, a module that holds arrays, by its identity."""
    try:
        hash(function)
    except TypeError:
        return _Itself(function)
    return function


@dataclasses.dataclass(frozen=True, eq=False)
class _Itself:
    """A function that is the same as no other: it cannot be hashed by what it holds."""

    function: Callable

    def __call__(self, *args):
        return self.function(*args)

    def __eq__(self, other):
        return isinstance(other, _Itself) and self.function is other.function

    def __hash__(self):
        return id(self.function)


# --- roots ----------------------------------------------------------------------------------------
#
# A root has its columns and their signs; `combine` sums its columns with coefficients, an array of
# `shape`, leaving out those of negative sign, as does `product`, the map v ↦ H v of flat vectors.


class _Diagonal:
    """A Hessian without mixed derivatives, from its diagonal: a vector like the prediction."""

    def __init__(self, diagonal, unravel):
        self.diagonal, self.unravel = diagonal, unravel
        self.shape, self.dtype = diagonal.shape, diagonal.dtype

    def columns(self):
        return jax.vmap(self.unravel)(jnp.diag(_square_root(jnp.abs(self.diagonal))))

    def signs(self):
        return jnp.where(self.diagonal < 0, -1.0, 1.0)

    def product(self):
        return Partial(jnp.multiply, jnp.maximum(self.diagonal, 0))

    def combine(self, coefficients):
        return self.unravel(_square_root(jnp.maximum(self.diagonal, 0)) * coefficients)


def _square_root(x):
    """√x, with the derivative 0 at 0, where nothing that is never negative rises or falls."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


class _Whole:
    """Any Hessian, from its eigenvectors."""

    def __init__(self, hessian, unravel):
        self.rows, self._signs = _signed_root((hessian + hessian.T) / 2)
        self.unravel = unravel
        self.shape, self.dtype = self._signs.shape, self._signs.dtype

    def columns(self):
        return jax.vmap(self.unravel)(self.rows)

    def signs(self):
        return self._signs

    @property
    def _positive(self):
        return jnp.where(self._signs[:, None] > 0, self.rows, 0)

    def product(self):
        return Partial(jnp.matmul, self._positive.T @ self._positive)

    def combine(self, coefficients):
        return self.unravel(coefficients @ self._positive)


@jax.custom_jvp
def _signed_root(hessian):
    """Rows R and signs σ with ``H = Rᵀ diag(σ) R``: eigenvectors times the roots of |λ|.

    Eigenvectors have no derivative where eigenvalues are equal, and roots none at zero; but what is
    made of all rows depends on the matrix alone. The tangent is one that gives the matrix, and its
    positive and negative parts, the tangents that they have.
    """
    return _decomposed(hessian)[:2]


def _decomposed(hessian):
    values, vectors = jnp.linalg.eigh(hessian)
    root = jnp.sqrt(jnp.abs(values))
    signs = jnp.where(values < 0, -1, 1).astype(values.dtype)
    return root[:, None] * vectors.T, signs, root, vectors


@_signed_root.defjvp
def _signed_root_jvp(primals, tangents):
    rows, signs, root, vectors = _decomposed(*primals)
    # With s = √|λ|, dRᵢⱼ = σᵢ dHᵢⱼ / (sᵢ + sⱼ) among eigenvectors of one sign, and else
    # σᵢ dHᵢⱼ sᵢ / (sᵢ² + sⱼ²): what solves dH = dRᵀσR + RᵀσdR.
    s, t = root[:, None], root[None]
    same = signs[:, None] == signs[None]
    over, under = jnp.where(same, 1, s), jnp.where(same, s + t, s**2 + t**2)
    factor = jnp.where(under > 0, over / jnp.where(under > 0, under, 1), 0) * signs[:, None]
    change = vectors.T @ tangents[0] @ vectors
    return (rows, signs), (factor * change @ vectors.T, jnp.zeros_like(signs))


class _Softmax:
    """Of the cross-entropy with a softmax: ``H = w (diag p − p pᵀ)`` at every position.

    `w` is the target's sum, 0 where it is masked. The root ``diag √p − p √pᵀ`` has √p in its
    kernel; a reflection that takes √p to an axis turns it into C − 1 columns and one of zeros.
    """

    def __init__(self, logits, target):
        self.like = logits
        logits = logits.reshape(-1, logits.shape[-1])
        self.p = jax.nn.softmax(logits)
        self.root = jnp.exp(jax.nn.log_softmax(logits) / 2)  # √p, with a derivative where p is 0
        self.shape, self.dtype = self.p.shape, self.p.dtype
        n_classes = logits.shape[-1]
        if jnp.issubdtype(target.dtype, jnp.integer):
            target = target.reshape(-1)
            weight = (target >= 0) & (target < n_classes)
        else:
            weight = jnp.sum(target.reshape(logits.shape), axis=-1)
        self.weight = weight.astype(logits.dtype)

    def columns(self):
        positions, n = self.shape
        root, last = self.root, self.root[:, -1:]
        eye = jnp.eye(n, dtype=root.dtype)
        turned = (last / (1 + last)) * (eye[-1:] - self.p)  # (positions, n)
        own = eye[None, :-1] - self.p[:, None] - turned[:, None]  # (positions, columns, n)
        own = own * root[:, :-1, None] * _square_root(self.weight)[:, None, None]
        if positions == 1:
            return own.reshape(n - 1, *self.like.shape)
        places = jnp.eye(positions, dtype=root.dtype)
        every = jnp.einsum("pq,pcn->pcqn", places, own)
        return every.reshape(positions * (n - 1), *self.like.shape)

    def signs(self):
        return None

    def product(self):
        return Partial(_softmax_product, self.p, self.weight)

    def combine(self, coefficients):
        root = self.root * coefficients
        found = root - self.p * jnp.sum(root, axis=-1, keepdims=True)
        return (found * _square_root(self.weight)[:, None]).reshape(self.like.shape)


def _root_of(example: Example, most: int | None = None):
    """Its loss's root; None if that takes the eigenvectors of more than `most` elements."""
    if example.loss is losses.softmax_cross_entropy:
        return _Softmax(jnp.asarray(example.prediction), jnp.asarray(example.target))
    flat, unravel = example.flat()
    example = example.of_moving()
    slope = grad(lambda z: example.loss(unravel(z), example.target))
    if _is_separable(example):
        diagonal = jax.jvp(slope, (flat,), (jnp.ones_like(flat),))[1]
        return _Diagonal(diagonal, unravel)
    if most is not None and flat.size > most:
        return None
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    hessian = jax.vmap(lambda v: jax.jvp(slope, (flat,), (v,))[1])(basis)
    return _Whole(hessian, unravel)


def hessian_map(example: Example) -> Partial:
    """The map v ↦ H v of the loss's Hessian at one example's prediction, on flattened predictions.

    The example is one `of_moving`. Negative curvature is left out, as of the sampled columns. Of a
    loss that mixes the elements of a prediction of more than `EIGENVALUES` of them it is not looked
    for: the loss must be convex.
    """
    root = _root_of(example, most=EIGENVALUES)
    if root is not None:
        return root.product()
    product = functools.partial(_slope_product, example.loss)
    return Partial(product, example.prediction, example.target)


EIGENVALUES = 128


def _softmax_product(p, weight, v):
    v = v.reshape(p.shape)
    own = p * (v - jnp.sum(p * v, axis=-1, keepdims=True))
    return (own * weight[:, None]).reshape(-1)


def _slope_product(loss, prediction, target, v):
    flat, unravel = ravel_pytree(prediction)
    slope = grad(lambda z: loss(unravel(z), target))
    return jax.jvp(slope, (flat,), (v,))[1]


# --- losses that are sums over the elements of the prediction -------------------------------------

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter
    not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square
    stop_gradient sub tan tanh""".split()
)
_LINEAR = frozenset("reduce_sum neg convert_element_type reshape squeeze copy".split())


def _is_separable(example: Example) -> bool:
    """Whether the loss is a linear combination of functions of single elements of the prediction.

    Then its Hessian is diagonal. False also where that cannot be seen from its equations.
    """
    program, _ = trace_tree(example.loss, example.prediction, example.target)
    n = len(jax.tree.leaves(example.prediction))
    kinds: list = [f"element of {i}" for i in range(n)]
    kinds += [None] * (len(program.inputs) - n)
    return "mixed" not in _kinds(inlined(program), kinds)


def _kinds(program: Program, inputs: list, by_rule: bool = True) -> list:
    """How each output depends on the prediction, given how the inputs do.

    None (not at all), "element of i" (elementwise on the i-th of its arrays), "sum" (linear in
    such elements) or "mixed". A `custom_jvp` function's derivatives are what its rule says: look
    at that `by_rule`, but not again where a rule calls such a function itself.
    """
    kinds: dict[Var, str | None] = dict(zip(program.inputs, inputs, strict=True))

    def kind(v) -> str | None:
        return kinds.get(v) if isinstance(v, Var) else None

    for eqn in program.equations:
        ins = [kind(v) for v in eqn.inputs]
        if eqn.primitive.name == "custom_jvp_call":
            outs = _kinds(inlined(program_of(eqn.params["call_jaxpr"])), ins, by_rule=False)
            outs = _with_tangents(eqn, ins, outs) if by_rule else outs
        else:
            outs = [_kind_of(eqn, ins)] * len(eqn.outputs)
        kinds.update(zip(eqn.outputs, outs, strict=True))
    return [kind(v) for v in program.outputs]


def _with_tangents(eqn: Equation, ins: list, values: list) -> list:
    """Of a `custom_jvp` function: how its values depend, or its tangents if these mix more."""
    moving = tuple(
        k is not None and is_inexact(v.aval) for k, v in zip(ins, eqn.inputs, strict=True)
    )
    if not any(moving):
        return values
    program, carries = tangent_program(eqn, moving)
    of_tangents = [k for k, moves in zip(ins, moving, strict=True) if moves]
    found = iter(_kinds(inlined(program), [*ins, *of_tangents], by_rule=False)[len(values) :])
    tangents = [next(found) if carried else None for carried in carries]
    return [max(pair, key=_mixing) for pair in zip(values, tangents, strict=True)]


def _mixing(kind: str | None) -> int:
    return {None: 0, "sum": 2, "mixed": 3}.get(kind, 1)


def _kind_of(eqn: Equation, ins: list) -> str | None:
    name, found = eqn.primitive.name, {k for k in ins if k}
    if not found:
        return None
    if len(found) == 1 and "sum" not in found and "mixed" not in found and name in _ELEMENTWISE:
        pairs = zip(eqn.in_avals, ins, strict=True)
        if all(aval.shape == eqn.out_avals[0].shape for aval, k in pairs if k):
            return found.pop()
    if "mixed" in found:
        return "mixed"
    alone = len([k for k in ins if k]) == 1
    linear = (
        name in _LINEAR
        or (name in ("add", "sub") and eqn.out_avals[0].shape == ())
        or (name == "mul" and alone)
        or (name == "div" and alone and ins[0])
    )
    return "sum" if linear else "mixed"


# --- labels -------------------------------------------------------------------------------------


def _category(key, logits, target):
    """A class for each position; a masked position stays masked.

    A distribution of sum w counts for w labels, whose squared gradients are w times those of one.
    """
    label = jax.random.categorical(key, logits)
    if jnp.issubdtype(target.dtype, jnp.integer):
        return jnp.where((target >= 0) & (target < logits.shape[-1]), label, target)
    of_one = jax.nn.one_hot(label, logits.shape[-1], dtype=target.dtype)
    return of_one * jnp.sqrt(target.sum(-1, keepdims=True))


def _bernoulli(key, logits, target):
    return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)


def _normal(key, mean, target):
    return mean + jax.random.normal(key, mean.shape, mean.dtype)


_LABELS: dict[Callable, Callable] = {
    losses.softmax_cross_entropy: _category,
    losses.squared_error: _normal,
    losses.sigmoid_binary_cross_entropy: _bernoulli,
}
