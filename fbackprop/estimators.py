r"""Estimates of a symmetric matrix that is known only by its products with vectors.

A Hessian or a Gauss–Newton matrix of P parameters is too large to form, but its product with a
vector costs no more than a few gradients. A few dozen such products tell its trace, its diagonal,
its largest eigenvalues, the density of its spectrum and its determinant.

``operator`` is a linear map A from trees to trees, symmetric in the inner product of the flattened
trees (this is not checked): a function, or an object with a method ``matvec``. ``like`` is a tree
of arrays or ``ShapeDtypeStruct``s of the same form; only shapes and dtypes are read of it. The same
``key`` gives the same estimate.

Products are taken one after another (``lax.scan``, ``lax.map``), never under ``vmap``: the memory
in use is that of one product, and of the vectors that each docstring counts. Everything works under
``jit`` and under ``vmap`` over keys; without ``jit`` a call compiles its loop anew. Calculations
are in the dtype to which the leaves promote, in float32 at least.

All raise ValueError if a count is out of range, the tree is empty or the operator returns another
form of tree, and TypeError if the operator is none, leaves are not real floating point, or a count
is not a Python integer.

Index legend: P numbers in a tree, m iterations, s samples.
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from fbackprop.curvature.space import Space

# In full precision on every device: accelerators' default would lose the basis's orthogonality.
_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Estimate(NamedTuple):
    """A mean of independent samples.

    Attributes:
        value: the mean, an array or a tree.
        standard_error: its standard deviation as estimated from the samples' spread, of the same
            form. Infinite for a single sample, which has no spread. It shrinks with the square
            root of the number of samples and is itself rough when these are few.
    """

    value: Any
    standard_error: Any


class Eigenpairs(NamedTuple):
    """Eigenvalues, the largest first, and what belongs to them.

    Attributes:
        values: λ, (count,).
        vectors: v, orthonormal, a tree like ``like`` with a leading axis of ``count``.
        residuals: estimates of ‖A v − λ v‖, (count,). An eigenvalue of A is at most that far from
            λ, up to the rounding error of the products.
    """

    values: jax.Array
    vectors: Any
    residuals: jax.Array


class SpectralDensity(NamedTuple):
    """Point masses that stand for the distribution of A's eigenvalues.

    Attributes:
        nodes: where they are, (s, m), one row for each sample.
        weights: how large, (s, m). A row sums to 1/s and all sum to 1.
    """

    nodes: jax.Array
    weights: jax.Array

    def smooth(self, grid: ArrayLike, sigma: ArrayLike) -> jax.Array:
        r"""The density at points of a grid, each mass blurred to a Gaussian of width sigma.

        $$\phi_\sigma(t) = \sum_i w_i \, \mathcal N(t; \theta_i, \sigma^2)$$

        Args:
            grid: t, any shape.
            sigma: the Gaussian's standard deviation, positive, a scalar.

        Returns:
            The density, of the grid's shape; over the whole line it integrates to 1.

        References:
            Ghorbani, Krishnan and Xiao (2019), section 2.
        """
        grid = jnp.asarray(grid)
        scaled = (grid.reshape(-1, 1) - self.nodes.reshape(1, -1)) / sigma
        bells = jnp.exp(-0.5 * scaled**2) / (sigma * jnp.sqrt(2 * jnp.pi))
        return _dot(bells, self.weights.reshape(-1)).reshape(grid.shape)

    def mean(self, function: Callable[[jax.Array], jax.Array]) -> Estimate:
        """The mean of a function over the spectrum, tr f(A) / P.

        Args:
            function: of an array of eigenvalues, elementwise.

        Returns:
            An `Estimate`, a scalar. The standard error is that of the samples; of the quadrature's
            error, which goes down with the number of iterations, it knows nothing.
        """

        def quadrature(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            nodes, weights = row
            # `where`, because 0 · −inf is NaN and a node of no weight must not count.
            return jnp.sum(jnp.where(weights == 0, 0.0, weights * function(nodes)))

        whole = self.weights * self.weights.shape[0]
        return _average(quadrature, (self.nodes, whole), jnp.zeros((), whole.dtype))


def trace(
    operator: Any, like: Any, key: jax.Array, samples: int = 30, *, method: str = "hutch++"
) -> Estimate:
    r"""The trace of A.

    $$\operatorname{tr} A = \mathbb E \, z^T A z, \qquad z_i = \pm 1$$

    is Hutchinson's estimator. Hutch++ spends a third of the products on a random sketch of A's
    range, with orthonormal basis Q, and a third on the trace within it, which is exact. Only the
    rest is sampled,

    $$\operatorname{tr} A = \operatorname{tr} Q^T A Q
      + \mathbb E \, z^T (I - Q Q^T) A (I - Q Q^T) z,$$

    and that is little when a few eigenvalues dominate, as they do in curvature. Both are unbiased.

    Args:
        operator, like, key: A, its space and a random key, as the module says.
        samples: how many products to take in all.
        method: "hutch++", which holds samples/3 vectors, or "hutchinson", which holds one.

    Returns:
        An `Estimate`, a scalar.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = jnp.array([1.0, 2.0, 4.0])
        >>> trace(lambda v: scale * v, scale, jax.random.key(0), method="hutchinson").value.item()
        7.0

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines" (1990); Meyer, Musco, Musco and Woodruff, "Hutch++: optimal stochastic
        trace estimation" (2021), algorithm 1.
    """
    space = _space("trace", operator, like)
    if method not in ("hutch++", "hutchinson"):
        raise ValueError(f'trace: method is {method!r}; choose "hutch++" or "hutchinson"')
    _check_count("trace", "samples", samples)
    if method == "hutchinson":
        return _residual_trace(space, key, samples, None)
    if samples < 3:
        raise ValueError(
            f"trace: samples is {samples}; Hutch++ takes at least 3 products, Hutchinson's 1"
        )
    sketching, sampling = jax.random.split(key)
    rank = min(samples // 3, space.size)
    probes = space.signs(sketching, rank)
    basis = jnp.linalg.qr(lax.map(space.product, probes).T)[0].T  # Qᵀ, (rank, P)
    within = jnp.sum(lax.map(lambda q: _dot(q, space.product(q)), basis))
    outside = _residual_trace(space, sampling, samples - 2 * (samples // 3), basis)
    return outside._replace(value=within + outside.value)


def diagonal(operator: Any, like: Any, key: jax.Array, samples: int = 30) -> Estimate:
    r"""The diagonal of A.

    $$\operatorname{diag} A = \mathbb E \, z \odot A z, \qquad z_i = \pm 1$$

    The variance of one sample of element i is $\sum_{j \ne i} A_{ij}^2$: a matrix that is diagonal
    has its diagonal exactly, one with large elements elsewhere takes many samples.

    Args:
        operator, like, key: A, its space and a random key, as the module says.
        samples: how many products to take. Two vectors are held, however many.

    Returns:
        An `Estimate` of trees like ``like``.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(4.0)}
        >>> found = diagonal(lambda v: jax.tree.map(jnp.multiply, scale, v), scale,
        ...                  jax.random.key(0), samples=2)
        >>> print(found.value["w"], found.standard_error["w"])
        [1. 2.] [0. 0.]

    References:
        Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007); with signs
        as probes its denominator is the number of samples.
    """
    space = _space("diagonal", operator, like)
    _check_count("diagonal", "samples", samples)

    def sample(key: jax.Array) -> jax.Array:
        (z,) = space.signs(key, 1)
        return z * space.product(z)

    found = _average(sample, jax.random.split(key, samples), jnp.zeros(space.size, space.dtype))
    return Estimate(*map(space.tree, found))


def top_eigenpairs(
    operator: Any, like: Any, key: jax.Array, count: int, *, iterations: int | None = None
) -> Eigenpairs:
    r"""The largest eigenvalues of A with their eigenvectors, by Lanczos's method.

    After m steps from a random vector, V: (P, m) spans a Krylov space and T = VᵀAV: (m, m) is
    tridiagonal. An eigenpair (λ, s) of T gives the approximate eigenpair (λ, V s) of A, with

    $$\lVert A V s - \lambda V s \rVert = \beta_m \lvert s_m \rvert,$$

    which needs no further product. Eigenvalues far from the rest are found first.

    Args:
        operator, like, key: A, its space and a random key, as the module says.
        count: how many eigenvalues, counted from the largest (the most negative ones of A are the
            largest of −A). Copies of a multiple eigenvalue are found once the space of the others
            is exhausted.
        iterations: m, how many products to take and vectors to hold, by default
            max(3 count, 50). More than P of either are never needed nor taken.

    Returns:
        `Eigenpairs`, the largest first. They are converged where ``residuals`` are small compared
        with the largest eigenvalue; elsewhere take more iterations.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = jnp.array([1.0, 4.0, 2.0])
        >>> found = top_eigenpairs(lambda v: scale * v, scale, jax.random.key(0), 2)
        >>> print(found.values.round(3), abs(found.vectors[0]).round(3))
        [4. 2.] [0. 1. 0.]

    References:
        Lanczos, "An iteration method for the solution of the eigenvalue problem" (1950); Saad,
        "Numerical methods for large eigenvalue problems" (2011), chapter 6.
    """
    space = _space("top_eigenpairs", operator, like)
    _check_count("top_eigenpairs", "count", count)
    if count > space.size:
        raise ValueError(
            f"top_eigenpairs: count is {count}, but the space has dimension {space.size}; "
            "ask for at most that many"
        )
    iterations = max(3 * count, 50) if iterations is None else iterations
    _check_count("top_eigenpairs", "iterations", iterations)
    if iterations < count:
        raise ValueError(
            f"top_eigenpairs: {iterations} iterations cannot give {count} eigenvalues; "
            "take several times as many as eigenvalues"
        )
    starting, going_on = jax.random.split(key)
    # Gaussian: a vector of signs can miss an eigenvector altogether, and often does in small cases.
    start = jax.random.normal(starting, (space.size,), space.dtype)
    krylov = _lanczos(space, start, going_on, iterations)
    values, vectors = krylov.eigh()
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    return Eigenpairs(
        values=values,
        vectors=jax.vmap(space.tree)(_dot(vectors.T, krylov.basis)),
        residuals=krylov.beta[-1] * jnp.abs(vectors[-1]),
    )


def spectral_density(
    operator: Any, like: Any, key: jax.Array, *, iterations: int = 30, samples: int = 10
) -> SpectralDensity:
    r"""The distribution of A's eigenvalues, by stochastic Lanczos quadrature.

    For a random vector of signs z, m steps of Lanczos's method from z give a tridiagonal matrix
    whose eigenvalues θ and eigenvectors y are the Gauss quadrature

    $$\frac{z^T f(A) z}{z^T z} \approx \sum_{k=1}^m y_{1k}^2 f(\theta_k),$$

    exact for polynomials f up to degree 2m − 1 and for every f when m = P. Over z, the left side
    has the mean tr f(A) / P.

    Args:
        operator, like, key: A, its space and a random key, as the module says.
        iterations: m, the products for one sample, and the vectors held. More than P are never
            needed nor taken, so that the result has min(m, P) nodes for each sample.
        samples: s, how many random vectors.

    Returns:
        A `SpectralDensity`: nodes and weights, to smooth on a grid or to take means over.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = jnp.array([1.0, 1.0, 1.0, 5.0])
        >>> found = spectral_density(lambda v: scale * v, scale, jax.random.key(0), iterations=2)
        >>> print(found.nodes[0].round(3), found.mean(jnp.sqrt).value.round(3))
        [1. 5.] 1.309

    References:
        Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"
        (2017); Ghorbani, Krishnan and Xiao, "An investigation into neural net optimization via
        Hessian eigenvalue density" (2019).
    """
    space = _space("spectral_density", operator, like)
    return _quadrature("spectral_density", space, key, iterations, samples)


def log_determinant(
    operator: Any,
    like: Any,
    key: jax.Array,
    *,
    damping: ArrayLike,
    iterations: int = 30,
    samples: int = 10,
) -> Estimate:
    r"""The logarithm of the determinant of A + δI, by stochastic Lanczos quadrature.

    $$\log \det (A + \delta I) = \operatorname{tr} \log (A + \delta I)$$

    Args:
        operator, like, key: A, its space and a random key, as the module says.
        damping: δ, a scalar, such that A + δI is positive definite. The smaller it is, the more
            iterations are needed: about the square root of the condition number of A + δI.
        iterations: m, the products for one sample, and the vectors held; at most P are taken.
        samples: s, how many random vectors.

    Returns:
        An `Estimate`, a scalar; NaN where A + δI has turned out not to be positive definite. The
        standard error does not include the quadrature's error: see `SpectralDensity.mean`. Beside
        a largest eigenvalue λ, those below ε λ are rounding errors: damp them, or take float64.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> scale = jnp.array([1.0, 3.0, 7.0])
        >>> found = log_determinant(lambda v: scale * v, scale, jax.random.key(0), damping=1.0)
        >>> round(jnp.exp(found.value).item(), 3)  # 2 · 4 · 8
        64.0

    References:
        Ubaru, Chen and Saad (2017), as for `spectral_density`.
    """
    space = _space("log_determinant", operator, like)
    density = _quadrature("log_determinant", space, key, iterations, samples)
    mean = density.mean(lambda nodes: jnp.log(nodes + jnp.asarray(damping, space.dtype)))
    return Estimate(space.size * mean.value, space.size * mean.standard_error)


# --- samples --------------------------------------------------------------------------------------


def _average(function: Callable[[Any], jax.Array], inputs: Any, zero: jax.Array) -> Estimate:
    """The mean of a function over the leading axis of its inputs; nothing is kept of each.

    Welford, "Note on a method for calculating corrected sums of squares and products" (1962). Kept
    is the root of the sum of squares: their squares may be out of range.
    """

    def step(state: tuple, element: tuple) -> tuple:
        (mean, spread), (count, given) = state, element
        value = function(given)
        deviation = value - mean
        mean = mean + deviation / count
        # The corrected square is the deviation's times (count − 1) / count.
        return (mean, jnp.hypot(spread, deviation * jnp.sqrt((count - 1) / count))), None

    samples = jax.tree.leaves(inputs)[0].shape[0]
    counts = jnp.arange(1, samples + 1, dtype=zero.dtype)
    (mean, spread), _ = lax.scan(step, (zero, zero), (counts, inputs))
    if samples == 1:
        return Estimate(mean, jnp.full_like(zero, jnp.inf))
    return Estimate(mean, spread / (samples * (samples - 1)) ** 0.5)


def _residual_trace(space: "_Operator", key: jax.Array, samples: int, basis: Any) -> Estimate:
    """tr A on the orthogonal complement of the rows of a basis, or on the whole space."""

    def sample(key: jax.Array) -> jax.Array:
        (z,) = space.signs(key, 1)
        if basis is not None:
            z = z - _dot(_dot(basis, z), basis)
        return _dot(z, space.product(z))

    return _average(sample, jax.random.split(key, samples), jnp.zeros((), space.dtype))


# --- Lanczos --------------------------------------------------------------------------------------


class _Krylov(NamedTuple):
    """An orthonormal basis in which A is tridiagonal, up to a remainder beyond the last vector."""

    basis: jax.Array  # rows, (m, P)
    alpha: jax.Array  # the diagonal, (m,)
    beta: jax.Array  # beside it, and as the last element the remainder's norm, (m,)

    def eigh(self) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues (m,), ascending, and eigenvectors (m, m), columns, of the matrix."""
        beside = self.beta[:-1]
        dense = jnp.diag(self.alpha) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
        return jnp.linalg.eigh(dense)


def _lanczos(space: "_Operator", start: jax.Array, key: jax.Array, iterations: int) -> _Krylov:
    """As many steps as asked for, but no more than there are dimensions.

    Where the Krylov space is exhausted (β ≈ 0) a random vector orthogonal to it goes on, with a
    zero in the matrix: what is found later is exact as well, and of no weight in a quadrature.
    """
    steps = min(iterations, space.size)
    eps = jnp.finfo(space.dtype).eps

    def step(state: tuple, numbered: tuple) -> tuple:
        (basis, q), (k, key) = state, numbered
        basis = basis.at[k].set(q)
        image = space.product(q)
        remainder = _orthogonal(basis, image)
        beta = _norm(remainder)
        exhausted = beta <= 10 * eps * _norm(image)  # and not ‖A‖: small eigenvalues count, too

        def fresh() -> jax.Array:
            return _orthogonal(basis, jax.random.normal(key, q.shape, q.dtype))

        following = _unit(lax.cond(exhausted, fresh, lambda: remainder))
        outcome = _dot(q, image), jnp.where(exhausted, 0.0, beta)
        return (basis, following), outcome

    empty = jnp.zeros((steps, space.size), space.dtype)
    numbered = jnp.arange(steps), jax.random.split(key, steps)
    (basis, _), (alpha, beta) = lax.scan(step, (empty, _unit(start)), numbered)
    return _Krylov(basis, alpha, beta)


def _orthogonal(basis: jax.Array, x: jax.Array) -> jax.Array:
    """What is left of x beside the rows of a basis, by Gram–Schmidt; zero rows do not count.

    One pass leaves rounding errors of the size of what it takes away. Twice is enough: Parlett,
    "The symmetric eigenvalue problem" (1998), section 6.9.
    """
    for _ in range(2):
        x = x - _dot(_dot(basis, x), basis)
    return x


def _unit(x: jax.Array) -> jax.Array:
    """x / ‖x‖, and zero for zero: what follows the last dimension is only rounding error."""
    norm = _norm(x)
    return x / jnp.where(norm > 0, norm, 1.0)


def _norm(x: jax.Array) -> jax.Array:
    """‖x‖, also where its square is out of range, as that of 1e-25 is in float32."""
    largest = jnp.max(jnp.abs(x))
    return largest * jnp.linalg.norm(x / jnp.where(largest > 0, largest, 1.0))


def _quadrature(
    name: str, space: "_Operator", key: jax.Array, iterations: int, samples: int
) -> SpectralDensity:
    """Nodes and weights from Lanczos's method, one random vector after another."""
    _check_count(name, "iterations", iterations)
    _check_count(name, "samples", samples)

    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        starting, going_on = jax.random.split(key)
        (start,) = space.signs(starting, 1)
        nodes, vectors = _lanczos(space, start, going_on, iterations).eigh()
        return nodes, vectors[0] ** 2

    nodes, weights = lax.map(sample, jax.random.split(key, samples))
    return SpectralDensity(nodes, weights / samples)


# --- trees as vectors -----------------------------------------------------------------------------


class _Operator(NamedTuple):
    """The operator on flattened trees."""

    space: Space
    product: Callable[[jax.Array], jax.Array]  # (P,) to (P,)

    @property
    def size(self) -> int:
        return self.space.size

    @property
    def dtype(self) -> Any:
        return self.space.dtype

    def tree(self, x: jax.Array) -> Any:
        return self.space.unravel(x)

    def signs(self, key: jax.Array, count: int) -> jax.Array:
        """Random vectors of ±1, (count, P)."""
        return jax.random.rademacher(key, (count, self.size), self.dtype)


def _space(name: str, operator: Any, like: Any) -> _Operator:
    matvec = getattr(operator, "matvec", operator)
    if not callable(matvec):
        raise TypeError(
            f"{name}: the operator is of type {type(operator).__name__}; "
            "give a function from trees to trees or an object with a method matvec"
        )
    like = jax.eval_shape(lambda tree: tree, like)
    _check_real(name, "like", like)
    space = Space.of(like)
    if space.size == 0:
        raise ValueError(f"{name}: like is empty; give a tree with at least one number")

    def product(x: jax.Array) -> jax.Array:
        image = jax.tree.map(jnp.asarray, matvec(space.unravel(x)))
        if _form(image) != _form(like):
            raise ValueError(
                f"{name}: the operator returns {_form(image)}; like is {_form(like)}, and the "
                "operator must return the same form of tree"
            )
        _check_real(name, "the operator's result", image)
        return space.ravel(image)

    return _Operator(space, product)


def _form(tree: Any) -> str:
    return f"{jax.tree.structure(tree)} of shapes {[leaf.shape for leaf in jax.tree.leaves(tree)]}"


def _check_real(name: str, what: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name}: {what}{jax.tree_util.keystr(path)} has dtype {leaf.dtype}; "
                "leave out or convert what is not real floating point"
            )


def _check_count(function: str, name: str, count: int) -> None:
    if not isinstance(count, numbers.Integral):
        raise TypeError(
            f"{function}: {name} is of type {type(count).__name__}; give a Python integer, which "
            "jit must not trace"
        )
    if count < 1:
        raise ValueError(f"{function}: {name} is {count}; take at least 1")
