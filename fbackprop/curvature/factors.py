"""Kronecker-factored operators: multiplied, inverted, and turned to their eigenvectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fbackprop.curvature import cholesky
from fbackprop.curvature.base import Curvature, check_not_negative, conjugate_gradients
from fbackprop.curvature.space import Space
from fbackprop.kronecker import (
    BiasBlock,
    Block,
    EigenBlock,
    KroneckerBlock,
    diagonal_block,
    diagonal_of,
    matrices_of,
)
from fbackprop.waiting import once_known

_ALTERNATIONS = 20  # of a least-squares fit that converges geometrically


class _Blocks(Curvature):
    """An operator made of blocks: for every leaf a tuple of them, whose matrices add up."""

    blocks: Any

    @property
    def space(self):
        """Every leaf has a block, which knows the leaf's shape."""

        def like(blocks):
            return np.broadcast_to(np.zeros((), blocks[0].dtype), blocks[0].place.leaf)

        return Space.of(self._map(like))

    def _map(self, function: Callable, *trees):
        """A function of every leaf's blocks, and of the leaves of trees like the parameters."""
        return jax.tree.map(function, self.blocks, *trees, is_leaf=_is_blocks)

    def _each(self, function: Callable):
        """A function of every block; what stands for a bias is left as it is."""

        def of_leaf(blocks):
            return tuple(b if isinstance(b, BiasBlock) else function(b) for b in blocks)

        return self._map(of_leaf)

    @property
    def _structure(self):
        return jax.tree.structure(self.blocks, is_leaf=_is_blocks)

    def other_part(self, other: _Blocks) -> str | None:
        """The first leaf of which another operator's blocks are for other parts, or None."""

        def structures(blocks):
            paths, _ = jax.tree_util.tree_flatten_with_path(blocks, is_leaf=_is_blocks)
            return [(jax.tree_util.keystr(path), jax.tree.structure(x)) for path, x in paths]

        pairs = zip(structures(self.blocks), structures(other.blocks), strict=True)
        return next((name for (name, mine), (_, its) in pairs if mine != its), None)

    @property
    def _all(self) -> list[tuple[int, Any]]:
        """The blocks, each with the number of its leaf."""
        leaves = jax.tree.leaves(self.blocks, is_leaf=_is_blocks)
        each = [(k, block) for k, blocks in enumerate(leaves) for block in blocks]
        return [(k, block) for k, block in each if not isinstance(block, BiasBlock)]

    def _restored(self, parts: Sequence):
        """Elements (g, i, o) for every block, as a tree."""
        found: list = [None] * self._structure.num_leaves
        for (k, block), part in zip(self._all, parts, strict=True):
            for leaf, x in block.restore(k, part):
                found[leaf] = x if found[leaf] is None else found[leaf] + x
        return self._structure.unflatten(found)

    def _arranged(self, tree) -> list:
        """The elements (g, i, o) that each block is for."""
        leaves = self.space.check(tree)
        return [block.arrange(k, leaves) for k, block in self._all]

    def matvec(self, tree: Any) -> Any:
        pairs = zip(self._all, self._arranged(tree), strict=True)
        found = self._restored([block.times(x) for (_, block), x in pairs])
        return jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), found, tree)

    def diagonal(self) -> Any:
        return self._restored([block.diagonal() for _, block in self._all])

    def _traces(self) -> list[jax.Array]:
        """Those of the blocks, scalars."""
        raise NotImplementedError

    def trace(self, key: jax.Array | None = None, samples: int = 100) -> jax.Array:
        if key is not None:
            return super().trace(key, samples)
        return sum(self._traces(), jnp.zeros((), self.space.dtype))

    def dense(self) -> jax.Array:
        sizes = self.space.sizes
        starts, total = np.cumsum([0, *sizes]), sum(sizes)
        found = jnp.zeros((total, total), self.space.dtype)
        for k, block in self._all:
            at = block.indices_among(starts, k)
            at = at.reshape(len(at), math.prod(at.shape[1:]))
            found = found.at[at[:, :, None], at[:, None, :]].add(block.dense())
        return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerFactors(_Blocks):
    r"""The block-diagonal operator of Kronecker factors, $\sum_k A_k \otimes B_k$ for every leaf.

    What `Kronecker` returns, as an operator. `jax.tree.map` averages factors, as KFAC does.

    Attributes:
      blocks: a pytree like the parameters of tuples of `KroneckerBlock`.
    """

    blocks: Any

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """(A + damping I)⁻¹ v, exactly: by eigenvectors, or by conjugate gradients.

        The latter where uses of a weight of different kinds have blocks that overlap. Eigenvalues
        below n · ε of the largest count as zero: undamped, what is along them has the solution 0.
        """

        apart = self._map(_are_apart)
        split = self._map(lambda blocks, is_apart: blocks if is_apart else _zero(blocks), apart)
        solved = KroneckerFactors(split)._eigen().solve(tree, damping)

        def of_leaf(blocks, is_apart, leaf, found):
            if is_apart:
                return found
            alone = KroneckerFactors(blocks)
            solution = conjugate_gradients(alone, leaf, damping, 10 * jnp.finfo(leaf.dtype).eps)
            return solution.astype(leaf.dtype)

        return self._map(of_leaf, apart, tree, solved)

    def merged(self) -> KroneckerFactors:
        """The same with blocks that overlap replaced by the one Kronecker product nearest to them.

        Nearest in Frobenius norm, of the combinations of their factors (Van Loan and Pitsianis
        1993). Blocks that overlap in part are replaced by the diagonal of their sum.
        """
        return KroneckerFactors(self._map(_merged))

    def inverse(self, damping) -> KroneckerFactors:
        r"""The operator whose `matvec` solves, with the damping divided among the factors.

        $$(A + \pi \sqrt\lambda I)^{-1} \otimes (B + \tfrac1\pi \sqrt\lambda I)^{-1},
          \quad \pi^2 = \frac{\operatorname{tr} A / i}{\operatorname{tr} B / o}$$

        (Martens and Grosse 2015, section 6.3). A vector's block is inverted exactly, and of what no
        prediction depends on the inverse is 1/λ. The damping of each factor is raised to
        max(n · ε, ε^¾) times its largest diagonal element.
        """
        check_not_negative(damping)
        merged = self.merged()
        factors = iter(merged._factors())

        # One after the other: LAPACK uses all of a CPU's cores for each, and two calls at once take
        # longer than one after the other.
        def of_block(block):
            nonlocal damping
            found = _inverse(block, next(factors), next(factors), damping)
            damping = once_known(damping, found.b)
            return found

        inverted = KroneckerFactors(merged._each(of_block))
        return KroneckerFactors(inverted._map(lambda blocks: _with_rest(blocks, damping)))

    def _traces(self):
        traces = iter([f.size * f.mean for f in self._factors()])
        return [jnp.vdot(a, b) for a, b in zip(traces, traces, strict=True)]

    def _factors(self) -> list[_Factor]:
        """The factors of all blocks, two for each."""
        return _factors_of([x for _, block in self._all for x in (block.a, block.b)])

    def eigen(self) -> EigenFactors:
        """The eigendecomposition of the operator, `merged`."""
        return self.merged()._eigen()

    def _eigen(self) -> EigenFactors:
        return EigenFactors(self._each(_eigen))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EigenFactors(_Blocks):
    """Kronecker factors turned to their eigenvectors, with any values along these.

    With the products of the factors' eigenvalues it is the operator of the factors; with the second
    moments of the gradients along the eigenvectors, `EigenvalueCorrection`, it is EKFAC's (George
    et al. 2018).

    Attributes:
      blocks: a pytree like the parameters of tuples of `EigenBlock`, whose places are disjoint.
    """

    blocks: Any

    def solve(self, tree: Any, damping: ArrayLike = 0.0) -> Any:
        """(A + damping I)⁻¹ v, exactly; 0 along undamped values that are not greater than zero."""
        check_not_negative(damping)

        def divide(values, x):
            return _divided(x, values + jnp.asarray(damping, values.dtype))

        parts = self._arranged(tree)
        pairs = list(zip(self._all, parts, strict=True))
        solved = self._restored(
            [block.turn_back(divide(block.values, block.turn(x))) for (_, block), x in pairs]
        )

        def with_rest(blocks, leaf, found, covered):
            if sum(math.prod(block.place.shape) for block in blocks) < leaf.size:
                found += divide(jnp.zeros(()), leaf - covered)  # the rest has no curvature
            return found.astype(leaf.dtype)

        return self._map(with_rest, tree, solved, self._restored(parts))

    def with_values(self, values) -> EigenFactors:
        """The same vectors with other values, a tree of tuples of arrays (g, i, o)."""

        def of_leaf(blocks, values):
            return tuple(
                block
                if isinstance(block, BiasBlock)
                else dataclasses.replace(block, values=v.astype(block.dtype))
                for block, v in zip(blocks, values, strict=True)
            )

        return EigenFactors(self._map(of_leaf, values))

    def _traces(self):
        return [jnp.sum(values) for values in jax.tree.leaves(self.values)]

    @property
    def values(self):
        """A tree of tuples of the blocks' values."""
        return self._map(lambda blocks: tuple(getattr(b, "values", None) for b in blocks))


def _is_blocks(x) -> bool:
    return isinstance(x, tuple) and len(x) > 0 and isinstance(x[0], Block | BiasBlock)


# --- one block ------------------------------------------------------------------------------------


class _Factor(NamedTuple):
    """A factor, or its diagonal, and what its inverse depends on besides.

    Attributes:
      x: (g, f, f) or (g, f).
      mean, largest: of the diagonal, (g,).
    """

    x: jax.Array
    mean: jax.Array
    largest: jax.Array

    @property
    def size(self) -> int:
        """f."""
        return self.x.shape[1]

    def scaled(self, scale) -> _Factor:
        """Times numbers (g,) that are not negative."""
        x = self.x * scale.reshape(-1, *(1,) * (self.x.ndim - 1))
        return _Factor(x, self.mean * scale, self.largest * scale)

    def inverse(self, damping) -> jax.Array:
        """That of the factor plus dampings (g,), raised to the floor."""
        if self.x.ndim == 3:
            least = cholesky.floor(self.size, self.largest)
            return cholesky.inverse(self.x, jnp.maximum(damping, least))
        least = jnp.finfo(self.x.dtype).eps * self.largest
        return _divided(1, self.x + jnp.maximum(damping, least)[:, None])


def _factors_of(matrices: Sequence) -> list[_Factor]:
    """Factors (g, f, f), or their diagonals (g, f); the diagonals of all are looked at as one.

    Compiling takes as long for the sum of a short vector as for that of a long one.
    """
    diagonals = [diagonal_of(x) for x in matrices]
    counts = [len(x) for x in diagonals]
    lengths = np.repeat([x.shape[1] for x in diagonals], counts)
    rows = np.repeat(np.arange(sum(counts)), lengths)
    line = jnp.concatenate([x.reshape(-1) for x in diagonals])
    sums = jax.ops.segment_sum(line, rows, sum(counts), indices_are_sorted=True)
    largest = jax.ops.segment_max(line, rows, sum(counts), indices_are_sorted=True)
    ends = np.cumsum(counts)[:-1]
    sizes = np.maximum(lengths, 1).astype(line.dtype)  # an empty leaf has factors without elements
    found = (jnp.split(x, ends) for x in (sums / sizes, largest))
    return [
        _Factor(x, *(numbers.astype(x.dtype) for numbers in both))
        for x, *both in zip(matrices, *found, strict=True)
    ]


def _inverse(block: KroneckerBlock, a: _Factor, b: _Factor, damping) -> KroneckerBlock:
    """That of a block of these factors, the damping divided among them."""
    damping = jnp.broadcast_to(jnp.asarray(damping, b.x.dtype), len(b.x))
    if a.size == 1:  # a number, and the damping is all the other's
        b = b.scaled(a.mean)
        one = jnp.ones((len(b.x), 1), b.x.dtype)
        return dataclasses.replace(block, a=one, b=b.inverse(damping))
    if b.size == 1:
        a = a.scaled(b.mean)
        return dataclasses.replace(block, a=a.inverse(damping), b=jnp.ones_like(b.x))
    both = (a.mean > 0) & (b.mean > 0)
    pi = jnp.sqrt(jnp.where(both, a.mean, 1) / jnp.where(both, b.mean, 1))
    root = jnp.sqrt(damping)
    inverse_a = a.inverse(pi * root)
    inverse_b = b.inverse(once_known(root / pi, inverse_a))
    return dataclasses.replace(block, a=inverse_a, b=inverse_b)


def _with_rest(blocks: tuple, damping) -> tuple:
    """Inverted blocks, and one of 1/λ for what they leave out of their leaf; 0 for λ = 0."""
    place = blocks[0].place
    if sum(math.prod(block.place.shape) for block in blocks) >= place.size:
        return blocks
    rest = np.ones(place.size, bool)
    for block in blocks:
        rest[block.place.indices()] = False
    inverse = _divided(1, jnp.asarray(damping, blocks[0].dtype))
    whole = np.empty(place.leaf, np.int8)
    values = jnp.where(rest.reshape(place.leaf), inverse, jnp.zeros_like(inverse))
    return (*blocks, diagonal_block(values, whole, whole))


def _divided(x, total):
    """x / total; 0 where the total is not greater than zero."""
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0)


def _eigen(block: KroneckerBlock) -> EigenBlock:
    a, u_a = (block.a, None) if block.a.ndim == 2 else jax.vmap(cholesky.eigen)(block.a)
    b, u_b = jax.vmap(cholesky.eigen)(block.b)
    values = a[:, :, None] * b[:, None, :]
    return EigenBlock(u_a, u_b, values, block.layout, block.place, block.bias)


# --- blocks that overlap --------------------------------------------------------------------------


def _clusters(blocks: Sequence[KroneckerBlock]) -> list[list[KroneckerBlock]]:
    """The blocks in lists of such as share elements."""
    clusters: list[tuple[set, list]] = []
    if len(blocks) == 1:
        return [list(blocks)]
    for block in blocks:
        mine, members = set(block.place.indices().reshape(-1).tolist()), [block]
        apart = []
        for elements, others in clusters:
            if mine.isdisjoint(elements):
                apart.append((elements, others))
            else:
                mine, members = mine | elements, others + members
        clusters = [*apart, (mine, members)]
    return [members for _, members in clusters]


def _are_apart(blocks: Sequence[KroneckerBlock]) -> bool:
    return len(_clusters(blocks)) == len(blocks)


def _zero(blocks: Sequence[KroneckerBlock]) -> tuple[KroneckerBlock, ...]:
    """A block of zeros over a whole leaf."""
    whole = np.empty(blocks[0].place.leaf, np.int8)
    return (diagonal_block(jnp.zeros(whole.shape, blocks[0].dtype), whole, whole),)


def _merged(blocks: Sequence[KroneckerBlock]) -> tuple[KroneckerBlock, ...]:
    return tuple(_one(cluster) for cluster in _clusters(blocks))


def _one(blocks: list[KroneckerBlock]) -> KroneckerBlock:
    """One Kronecker product for a sum of such over the same elements."""
    if len(blocks) == 1:
        return blocks[0]
    first, places = blocks[0], blocks[0].indices()
    pairs = []
    for block in blocks:
        other, a, b = block.indices(), block.a, block.b
        if np.array_equal(other, places):
            pairs.append((a, b))
        elif other.shape == places.swapaxes(1, 2).shape and np.array_equal(
            other.swapaxes(1, 2), places
        ):
            pairs.append((b, matrices_of(a)))
        else:
            return _diagonal(blocks)
    if len({a.ndim for a, _ in pairs}) > 1:
        pairs = [(matrices_of(a), b) for a, b in pairs]
    a, b = (jnp.stack(factors) for factors in zip(*pairs, strict=True))  # (k, g, f, f)
    flat_a, flat_b = (x.reshape(*x.shape[:2], -1) for x in (a, b))
    gram_a, gram_b = (jnp.einsum("kgf,lgf->gkl", x, x) for x in (flat_a, flat_b))

    def fit(x, gram):
        """The other factor's best coefficients (g, k, 1), which are never negative."""
        y = gram @ x
        square = jnp.sum(x * y, axis=1, keepdims=True)
        return y / jnp.where(square > 0, square, 1)

    def alternate(_, x):
        return fit(fit(x, gram_a), gram_b)

    x = jax.lax.fori_loop(0, _ALTERNATIONS, alternate, jnp.ones((*gram_a.shape[:2], 1), a.dtype))
    y = fit(x, gram_a)
    found_a, found_b = (
        jnp.einsum("kgf,gkx->gf", flat, c).reshape(factor.shape[1:])
        for flat, c, factor in ((flat_a, x, a), (flat_b, y, b))
    )
    return dataclasses.replace(first, a=found_a, b=found_b)


def _diagonal(blocks: list[KroneckerBlock]) -> KroneckerBlock:
    """The diagonal of a sum of blocks, as a block over the whole leaf."""
    whole = np.empty(blocks[0].place.leaf, np.int8)
    return diagonal_block(KroneckerFactors(tuple(blocks)).diagonal(), whole, whole)
