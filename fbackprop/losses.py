"""Losses on one example, each a scalar.

Every loss takes the prediction for ONE example and its target and sums over whatever positions the
example has; nothing is averaged. A batch is ``vmap`` of the loss, and whether its losses are then
summed or averaged is the caller's to say. What the sums are over matters here more than elsewhere:
curvature and per-example quantities inherit the loss's normalisation.

Integer and boolean targets take the prediction's dtype; the result has the dtype to which
prediction and target promote.

Index legend: C classes.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def squared_error(prediction: ArrayLike, target: ArrayLike) -> jax.Array:
    r"""Half the sum of squared differences.

    $$\ell(o, t) = \tfrac12 \sum_i (t_i - o_i)^2$$

    With the half, the error signal at the prediction is exactly o − t and the loss's Hessian there
    is the identity.

    Args:
        prediction: o, any shape.
        target: t, of the same shape.

    Returns:
        The loss, a scalar, summed over all elements.

    Raises:
        ValueError: prediction and target differ in shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])).item()
        2.5

    References:
        Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors"
        (1986), eq. 3.
    """
    prediction, target = _aligned("squared_error", prediction, target)
    return 0.5 * jnp.sum((target - prediction) ** 2)


def softmax_cross_entropy(logits: ArrayLike, target: ArrayLike) -> jax.Array:
    r"""Cross-entropy of a target with the softmax of the logits.

    $$\ell(z, t) = \sum_{\text{positions}} \Bigl( \log \sum_c e^{z_c} \sum_c t_c
      - \sum_c t_c z_c \Bigr)$$

    A class label is the distribution that puts all its weight on one class. At the logits the error
    signal of a position is softmax(z) − t, for a target that sums to 1.

    Args:
        logits: z, of shape (..., C). Leading axes are positions (time steps, pixels).
        target: integer labels in [0, C), of shape (...,), so a scalar for logits of shape (C,); or
            distributions t over the classes, floating point, of the logits' shape. A distribution
            is not normalised here. A label out of range (say −1) selects no class: its position
            costs nothing and has no gradient, which masks it.

    Returns:
        The loss in nats, a scalar, summed over positions.

    Raises:
        ValueError: the logits have no class axis, or the target's shape or dtype fits neither form.

    Examples:
        >>> import jax.numpy as jnp
        >>> logits = jnp.array([0.0, jnp.log(3.0)])
        >>> round(softmax_cross_entropy(logits, 1).item(), 4)  # -log(3/4)
        0.2877
        >>> round(softmax_cross_entropy(logits, jnp.array([0.5, 0.5])).item(), 4)
        0.837

    References:
        Bishop, "Pattern Recognition and Machine Learning" (2006), eq. 4.108.
    """
    logits, target = jnp.asarray(logits), jnp.asarray(target)
    if jnp.issubdtype(logits.dtype, jnp.integer):
        logits = logits.astype(jnp.float32)
    _check_real("softmax_cross_entropy", "prediction", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"softmax_cross_entropy: logits of shape {logits.shape} have no classes; "
            "give them a last axis of one logit per class"
        )
    if jnp.issubdtype(target.dtype, jnp.integer) and target.shape == logits.shape[:-1]:
        narrow = target.dtype.itemsize < 4  # and may hold fewer numbers than there are classes
        labels = target.astype(jnp.int32) if narrow else target
        target = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    elif not jnp.issubdtype(target.dtype, jnp.floating) or target.shape != logits.shape:
        raise ValueError(
            f"softmax_cross_entropy: target of shape {target.shape} and dtype {target.dtype} does "
            f"not fit logits of shape {logits.shape}; give integer labels of shape "
            f"{logits.shape[:-1]} or floating-point distributions of shape {logits.shape}"
        )
    # What has no weight must cost nothing: neither a position of any logits, nor a class of −inf.
    masked = jnp.all(target == 0, -1, keepdims=True)
    log_probabilities = jax.nn.log_softmax(jnp.where(masked, 0, logits))
    return jnp.sum(jnp.where(target == 0, 0.0, -target * log_probabilities))


def sigmoid_binary_cross_entropy(logits: ArrayLike, targets: ArrayLike) -> jax.Array:
    r"""Cross-entropy of independent binary targets with the sigmoid of the logits.

    $$\ell(z, t) = \sum_i \log(1 + e^{z_i}) - t_i z_i$$

    The error signal at the logits is sigmoid(z) − t.

    Args:
        logits: z, any shape.
        targets: t in [0, 1], of the same shape: booleans, integers 0 and 1, or probabilities.

    Returns:
        The loss in nats, a scalar, summed over all elements.

    Raises:
        ValueError: logits and targets differ in shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> loss = sigmoid_binary_cross_entropy(jnp.array([0.0, 1e4]), jnp.array([1, 1]))
        >>> round(loss.item(), 4)
        0.6931

    References:
        Bishop, "Pattern Recognition and Machine Learning" (2006), eq. 4.90.
    """
    logits, targets = _aligned("sigmoid_binary_cross_entropy", logits, targets)
    # −t log σ(z) − (1 − t) log σ(−z): both terms are nonnegative, so a confident and correct logit
    # costs its tiny share instead of the rounding error of a difference of two large numbers.
    positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    # 0 · −∞ is not a number, and what has no part in the loss must cost nothing.
    ones = jnp.where(targets == 0, 0, targets * positive)
    zeros = jnp.where(targets == 1, 0, (1 - targets) * negative)
    return -jnp.sum(ones + zeros)


def _aligned(loss: str, prediction: ArrayLike, target: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one shape, a target of integers or booleans in the prediction's dtype."""
    prediction, target = jnp.asarray(prediction), jnp.asarray(target)
    if prediction.shape != target.shape:
        # Without this, (N,) against (N, 1) would broadcast to N² silent differences.
        raise ValueError(
            f"{loss}: prediction of shape {prediction.shape} and target of shape {target.shape} "
            "differ; give both the same shape"
        )
    _check_real(loss, "prediction", prediction)
    if not jnp.issubdtype(target.dtype, jnp.inexact):
        target = target.astype(prediction.dtype)
    _check_real(loss, "target", target)
    return prediction, target


def _check_real(loss: str, name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{loss}: the {name} is of dtype {x.dtype}; give real floating point")
