"""Fourier transforms.

The complex transform is a symmetric matrix, hence its own transpose. The real transforms leave out
the half of the spectrum that symmetry gives back: a coefficient that stands for two counts twice.
"""

from __future__ import annotations

import math

import numpy as np
from jax import lax

from fbackprop.table import joint


def _multiplicity(length: int) -> np.ndarray:
    """How many coefficients of a real signal's whole spectrum each kept one stands for."""
    counts = np.full(length // 2 + 1, 2.0)
    counts[0] = 1
    if length % 2 == 0:
        counts[-1] = 1
    return counts


def _along(counts: np.ndarray, spectrum):
    """Numbers for the last axis of a spectrum, like it."""
    return lax.broadcast_in_dim(counts.astype(spectrum.dtype), spectrum.shape, (spectrum.ndim - 1,))


@joint("fft")
def _fft(ct, eqn):
    kind, lengths = eqn.params["fft_type"], eqn.params["fft_lengths"]
    if kind.name in ("FFT", "IFFT") or not lengths:
        return lax.fft(ct, kind, lengths)
    counts = _multiplicity(lengths[-1])
    size = math.prod(lengths)
    if kind.name == "RFFT":
        counts = _along(counts, ct)
        inverse = lax.fft(lax.div(lax.conj(ct), counts), lax.FftType.IRFFT, lengths)
        return lax.mul(inverse, lax.full_like(inverse, size))
    spectrum = lax.conj(lax.fft(ct, lax.FftType.RFFT, lengths))
    return lax.mul(spectrum, _along(counts / size, spectrum))
