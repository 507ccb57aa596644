"""The iterates of Hessian-free optimization."""

from types import SimpleNamespace

import jax.numpy as jnp

from fbackprop.optim.hessian_free import _best_iterate


def test_hessian_free_goes_back_from_an_iterate_of_no_loss():
    iterates = jnp.arange(4.0)
    search = SimpleNamespace(kept=jnp.array(4), iterates=iterates)
    losses = jnp.array([5.0, 2.0, 3.0, jnp.nan])
    _, place = _best_iterate(search, lambda at: losses[at.astype(int)])
    assert place == 1
