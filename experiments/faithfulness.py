"""Whether a map tells what a function does: pixel flipping, conservation, randomised parameters.

Index legend: P pixels, K + 1 points of a curve.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats


class Curves(NamedTuple):
    """The function's value as pixels go and as they come, each (K + 1,).

    Attributes:
      deletion: of the image, with the most relevant pixels replaced first.
      insertion: of the replacement, where the most relevant pixels of the image appear first.
    """

    deletion: Any
    insertion: Any


def falling(relevance: jax.Array, key: jax.Array) -> jax.Array:
    """The places of the pixels by falling relevance, (P,), those of equal relevance at random.

    Ties are common, as contributions of black pixels are zero: in the order in which pixels are
    stored, they would make a curve of their own.
    """
    flat = jnp.ravel(relevance)
    return jnp.lexsort((jax.random.uniform(key, flat.shape), -flat))


def flip(
    f: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    replacement: jax.Array,
    order: jax.Array,
    counts: np.ndarray,
) -> Curves:
    """The curves of pixel flipping.

    Samek, Binder, Montavon, Lapuschkin and Müller 2017, "Evaluating the visualization of what a
    deep neural network has learned", section III, with regions of one pixel; insertion after
    Petsiuk, Das and Saenko 2018, "RISE", section 4.3.

    Args:
      f: from an image to a real number.
      x: the image, of P entries.
      replacement: what takes the place of its pixels, like `x`.
      order: the places of the pixels, those to be flipped first in front, (P,).
      counts: how many pixels are flipped at each point, (K + 1,).
    """
    rank = jnp.argsort(order).reshape(x.shape)

    def point(count: jax.Array) -> Curves:
        flipped = rank < count
        return Curves(f(jnp.where(flipped, replacement, x)), f(jnp.where(flipped, x, replacement)))

    return jax.lax.map(point, jnp.asarray(counts))


def area(curve: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean height of curves (..., K + 1) over the fraction of pixels, by trapezoids, (...)."""
    return np.trapezoid(curve, counts / counts[-1], axis=-1)


def defect(pixels: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``|Σ map − total|/|total|`` for maps (N, ...) and what they should sum to, (N,)."""
    sums = pixels.reshape(len(pixels), -1).sum(1, dtype=np.float64)
    return np.abs(sums - total) / np.abs(total)


def rank_correlations(some: np.ndarray, others: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each map with another, (N,); NaN where a map is constant.

    Adebayo et al. 2018, "Sanity checks for saliency maps", section 3, compare those of a trained
    network with those of one with random parameters.

    Args:
      some, others: maps (N, ...).
      within: the pixels that count, like the maps.
    """
    return np.array(
        [_rank_correlation(a[w], b[w]) for a, b, w in zip(some, others, within, strict=True)]
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    if not a.size or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])
