"""A loss to lower, at a point: what a second-order step needs to know of its problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fbackprop.batch import sweep
from fbackprop.examples import Examples, examples_of, size_of
from fbackprop.model import call_model, check_params, needs_key, takes_key
from fbackprop.quantities import Gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
    r"""The mean loss of a batch, $\sum_n w_n \ell(f(\theta, x_n), y_n) / \sum_n w_n$, at a point θ.

    A pytree: model, loss and chunk are static.

    Attributes:
      model: ``model(params, x)``, as of `fbackprop.sweep`.
      loss: ``loss(prediction, y)`` of one example.
      params: θ.
      batch: a pair (inputs, targets), leading axes N.
      further: further inputs of the model, leading axes N.
      weights: of the examples, (N,); None for equal ones. One of weight zero must be finite, too.
      key: for a model that takes one, and for quantities that sample.
      chunk: how many examples a sweep goes through at a time; None for all.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> batch = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 4.0])
      >>> problem = fb.Objective(jnp.dot, fb.losses.squared_error, jnp.array([1.0]), batch)
      >>> value, gradient = problem.value_and_gradient()
      >>> float(value), gradient.tolist()
      (1.0, [-2.0])
    """

    model: Callable = dataclasses.field(metadata={"static": True})
    loss: Callable = dataclasses.field(metadata={"static": True})
    params: Any
    batch: Any
    further: tuple = ()
    weights: Any = None
    key: Any = None
    chunk: int | None = dataclasses.field(default=None, metadata={"static": True})

    def examples(self) -> Examples:
        """The batch, checked."""
        self._check_key()
        return examples_of(self.batch, self.further, self.weights, self.key, self._has_key)

    def predict(self, params, examples: Examples):
        """The predictions of a batch, leading axes N."""

        def one(inputs):
            return call_model(self.model, params, inputs, self._has_key)

        return jax.vmap(one)(examples.inputs)

    def value(self, params=None) -> jax.Array:
        """The loss at other parameters, or at these; a scalar. The model draws the same numbers."""
        examples = self.examples()
        predictions = self.predict(self.params if params is None else params, examples)
        losses = jax.vmap(self.loss)(predictions, examples.target)
        return jnp.sum(losses * examples.shares.astype(losses.dtype))

    def value_and_gradient(self) -> tuple[jax.Array, Any]:
        """The loss, a scalar, and its gradient, a pytree like the parameters."""
        found = self.sweep(gradient=Gradient())
        return found["loss"], found["gradient"]

    def sweep(self, key=None, **quantities) -> dict:
        """The loss and any quantities, as of `fbackprop.sweep`.

        Args:
          key: for quantities that sample, where the objective has none of its own.
          **quantities: what to compute.
        """
        self._check_key()
        model = self.model
        if self.key is None and takes_key(model):  # the key is not for the model

            def model(params, *inputs):
                return self.model(params, *inputs)

        swept = sweep(model, self.loss, chunk=self.chunk, **quantities)
        key = key if self.key is None else self.key
        return swept(self.params, self.batch, *self.further, weights=self.weights, key=key)

    def at(self, params) -> Objective:
        """The same elsewhere."""
        return dataclasses.replace(self, params=params)

    @property
    def n_examples(self) -> int:
        """N."""
        return size_of(self.batch, self.further, self.weights)

    @property
    def n_effective(self):
        """(Σw)² / Σw², of how many equal examples a mean varies as much as this one; N of such."""
        if self.weights is None:
            return self.n_examples
        return 1 / jnp.sum(self.examples().shares ** 2)

    def of_trained(self, updates) -> Objective:
        """The same as a function of the parameters that have a leaf in `updates` alone.

        `optax.masked` and `optax.partition` leave nodes without leaves in the place of the others;
        these are held fixed.
        """
        if not jax.tree.leaves(updates):
            raise ValueError("there are no parameters to update: the tree of updates has no leaves")
        leaves, structure = jax.tree.flatten(self.params)
        if jax.tree.structure(updates) == structure:
            return self
        try:
            pieces = structure.flatten_up_to(updates)
        except ValueError as error:
            raise ValueError(
                f"the updates do not fit the objective's parameters ({error}): pass gradients with "
                "respect to the parameters that the objective was made with"
            ) from None
        trained = [jax.tree.structure(piece).num_leaves == 1 for piece in pieces]
        model = self.model

        def of_trained(params, *inputs, **options):
            moving = iter(jax.tree.leaves(params))
            full = [next(moving) if t else p for t, p in zip(trained, leaves, strict=True)]
            return model(jax.tree.unflatten(structure, full), *inputs, **options)

        if takes_key(model):

            def chosen(params, *inputs, key=None):
                return of_trained(params, *inputs, key=key)
        else:
            chosen = of_trained
        moving = [p for t, p in zip(trained, leaves, strict=True) if t]
        params = jax.tree.unflatten(jax.tree.structure(updates), moving)
        return dataclasses.replace(self, model=chosen, params=params)

    @property
    def _has_key(self) -> bool:
        return self.key is not None and takes_key(self.model)

    def _check_key(self) -> None:
        if self.key is None and needs_key(self.model):
            raise ValueError("the model takes a key: pass key=, a jax.random.key")

    def check(self) -> None:
        """Refuse parameters and batches that no sweep takes; nothing is computed.

        Raises:
          ValueError, TypeError: as of `fbackprop.sweep`.
        """
        check_params(self.params)
        self._check_key()
        _ = self.n_examples
