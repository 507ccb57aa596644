"""What happens to an error signal on its way: passed, smoothed, clipped, made coarse or noisy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from fbackprop.credit.products import is_product
from fbackprop.program import value_of
from fbackprop.record import unit_of
from fbackprop.sites import wide


def straight_through(*keys: Any, within: float | None = None) -> dict:
    """The straight-through estimator: back through a step as if it were the identity.

    Bengio, Léonard and Courville 2013, "Estimating or propagating gradients through stochastic
    neurons for conditional computation", section 4.

    Args:
      *keys: what to pass through; by default the primitives ``round`` and ``sign``, where they
        occur.
      within: pass only where the operand is at most this in magnitude (Hubara et al. 2016,
        "Binarized neural networks", equation 4, with 1).

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> rules = fb.credit.straight_through("round")
      >>> float(fb.grad(lambda x: jnp.round(x) ** 2, rules=rules)(2.6))
      6.0
    """

    def passed(ct):
        return ct

    def saturated(ct, x):
        return jnp.where(jnp.abs(x) <= within, ct, jnp.zeros_like(ct))

    rule = passed if within is None else saturated
    return dict.fromkeys(keys or (_is_step,), rule)


def _is_step(eqn) -> bool:
    return eqn.primitive.name in ("round", "sign")


SURROGATES: dict[str, Callable] = {
    "fast_sigmoid": lambda u: 1 / (1 + jnp.abs(u)) ** 2,
    "sigmoid": lambda u: jax.nn.sigmoid(u) * (1 - jax.nn.sigmoid(u)),
    "triangle": lambda u: jnp.maximum(0, 1 - jnp.abs(u)),
    "gaussian": lambda u: jnp.exp(-(u**2) / 2) / jnp.sqrt(2 * jnp.pi).astype(u.dtype),
}


def surrogate(name: Any, kind: str = "fast_sigmoid", slope: float = 10.0) -> dict:
    """A surrogate gradient for spikes: the derivative of a smooth function of the potential.

    For a spike ``H(v)``, v the membrane potential above its threshold, the derivative is taken to
    be ``h(slope · v)`` with h one of

    - "fast_sigmoid": ``1/(1+|u|)²`` (Zenke and Ganguli 2018, "SuperSpike"),
    - "sigmoid": ``σ(u)(1−σ(u))``, "triangle": ``max(0, 1−|u|)`` (Bellec et al. 2018), "gaussian":
      the standard normal density

    (Neftci, Mostafa and Zenke 2019, "Surrogate gradient learning in spiking neural networks").

    Args:
      name: the key of the spike: the name of a jit-ted function of the potential.
      kind: which.
      slope: how steep, 1/units of potential.
    """
    if kind not in SURROGATES:
        raise ValueError(f"kind={kind!r}: choose from {', '.join(SURROGATES)}")
    derivative = SURROGATES[kind]

    def rule(ct, x):
        return ct * derivative(slope * x)

    return {name: rule}


def _check_named(who: str, names: tuple) -> None:
    if not names:
        raise ValueError(f"{who}() changes nothing: give the names of checkpoint_name's values")


def clipped(*names: Any, max_norm: float) -> dict:
    """Clip the error signal of named values to a norm, inside the pass.

    The norm is that of the whole array: of a batch in a function of a batch, of an example in a
    function of one that is mapped, such as the model of a `sweep`.

    Args:
      *names: keys, such as the names that `checkpoint_name` gave.
      max_norm: the largest norm that passes unchanged; it may be traced.
    """
    _check_named("clipped", names)
    known = value_of(max_norm)
    if jnp.ndim(max_norm) or known is not None and not known > 0:
        raise ValueError(f"max_norm={max_norm}: give a positive norm, one number")

    def rule(max_norm, ct):
        signal = wide(ct)
        unit = unit_of(jnp.max(jnp.abs(signal), initial=0))
        norm, most = jnp.linalg.norm((signal / unit).ravel()), max_norm.astype(unit.dtype)
        short = (signal / unit) * (most / jnp.where(norm > 0, norm, 1))
        return jnp.where(norm > most / unit, short.astype(ct.dtype), ct)

    return dict.fromkeys(names, Partial(rule, jnp.asarray(max_norm)))


def noisy(*names: Any, key: jax.Array, stddev) -> dict:
    """Add Gaussian noise to the error signal of named values, inside the pass.

    Args:
      *names: keys.
      key: a `jax.random.key`; see `quantised` for what it is folded with.
      stddev: of the noise; a number or an array.
    """
    _check_named("noisy", names)

    def rule(key, stddev, ct):
        return ct + stddev.astype(ct.dtype) * jax.random.normal(
            _salted(key, ct), ct.shape, ct.dtype
        )

    return dict.fromkeys(names, Partial(rule, key, jnp.asarray(stddev)))


def quantised(*names: Any, key: jax.Array, bits: int = 8) -> dict:
    """Round the error signal to a few bits, stochastically, so that it is right in the mean.

    With s the largest magnitude in the array, the signal becomes ``s/m · ⌊m δ/s + u⌋`` with
    m = 2^(bits−1) − 1 and u uniform in [0, 1) (Gupta et al. 2015, "Deep learning with limited
    numerical precision", section 3.2; Banner et al. 2018, "Scalable methods for 8-bit training").

    Args:
      *names: keys; by default every product and convolution, whose arriving signal is rounded.
      key: a `jax.random.key`. It is folded with the bits of the signal: equations, loops'
        iterations and mapped examples round independently where their signals differ, and alike
        where these are equal.
      bits: at least 2. Of a dtype with fewer digits the result is rounded once more, to nearest.
    """
    if not 2 <= bits <= 24:
        raise ValueError(f"bits={bits}: give from 2 to 24")
    levels = 2 ** (bits - 1) - 1

    def rounded(key, ct):
        signal = wide(ct)
        scale = jnp.max(jnp.abs(signal)) / levels
        u = jax.random.uniform(_salted(key, ct), signal.shape, signal.dtype)
        steps = signal / jnp.where(scale > 0, scale, 1)
        whole = jnp.floor(steps)
        return (scale * (whole + (u < steps - whole))).astype(ct.dtype)

    def rule(key, ct, default):
        return default(rounded(key, ct))

    return dict.fromkeys(names or (is_product,), Partial(rule, key))


def _salted(key, ct):
    """A key of its own for each signal."""
    word = lax.bitcast_convert_type(ct.astype(jnp.float32), jnp.uint32).ravel()
    place = jnp.arange(1, word.size + 1, dtype=jnp.uint32)
    return jax.random.fold_in(key, jnp.sum(word * place, dtype=jnp.uint32))
