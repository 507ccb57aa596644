"""What a quantity is: columns to send back, and a contraction of the sites that they leave."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fbackprop.columns import LossGradient
from fbackprop.gradients import Gradients


class Quantity:
    """Something to compute of a batch in `fbackprop.sweep`; subclass it to define your own.

    Attributes:
      columns: what is sent back from each example's prediction: `LossGradient()`, `Outputs()`,
        `HessianRoot(samples)`, `Labels(samples)`, or a function of an `Example` that returns
        columns (a pytree like the prediction with an axis of columns in front) and their signs
        (None where all are positive): a method, or in the class a `staticmethod`. Quantities with
        equal columns share them.
      over: how the results of two pieces of a batch make one: "sum" (they are added), "examples"
        (they have a leading axis of examples and are put in a row), or "pairs" (they cannot be
        joined: `extract` sees the sites of the whole batch at once).
      other: a second batch (inputs, targets), for a quantity of pairs; its examples' gradients are
        ``gradients.second``.
      names: whether it reads `gradients.signals`, the error signals of named values.
      scales: whether the result is proportional to the loss, and so grows with it where the batch's
        loss is a sum.
    """

    names: ClassVar[bool] = False
    other: Any = None

    @property
    def columns(self) -> Any:
        return LossGradient()

    @property
    def over(self) -> str:
        return "sum"

    @property
    def scales(self) -> bool:
        return False

    def __post_init__(self):
        _ = self.columns  # wrong settings are refused where they are made

    @property
    def needs_key(self) -> bool:
        """Whether random numbers are needed."""
        return getattr(self.columns, "needs_key", False)

    def extract(self, gradients: Gradients) -> Any:
        """The result for some examples, a pytree of arrays.

        Means over examples are sums weighted with `gradients.shares`, which sum to one over the
        whole batch.
        """
        raise NotImplementedError(
            f"the quantity {type(self).__name__} has no method extract(self, gradients)"
        )

    def scaled(self, found: Any, scale) -> Any:
        """The same of a batch whose loss is `scale` times the mean."""
        if not self.scales:
            return found
        return jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), found)

    def finish(self, found: Any) -> Any:
        """The result of the batch, from what was extracted and joined."""
        return found
