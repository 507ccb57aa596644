"""What the transformations of the family have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from fbackprop.curvature.space import Space
from fbackprop.objective import Objective
from fbackprop.program import is_real_number, value_of

ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[jax.Array], Any]


def objective_of(objective: Any, updates, who: str) -> Objective:
    """The objective as a function of the parameters that the updates are for.

    Raises:
      TypeError: if there is none.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{who} measures curvature: pass objective=fb.Objective(model, loss, params, batch) to "
            "update, or make the step with fb.optim.step"
        )
    return objective.of_trained(updates)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pending:
    """What stands in a state for arrays whose shapes a batch will tell; it has no leaves.

    Attributes:
      make: ``make(objective, key)``, the arrays.
      params: the structure of the parameters that the state is for.
    """

    make: Callable
    params: Any

    def zeros(self, objective: Objective):
        """Arrays like those to come; nothing but shapes is computed of the objective."""
        like = self.params.unflatten([0] * self.params.num_leaves)
        shapes = jax.eval_shape(self.make, objective.of_trained(like), jax.random.key(0))
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(objective))
        zeros = jnp.zeros if traced else np.zeros  # to compile dozens of zeros takes half a second
        return jax.device_put(jax.tree.map(lambda s: zeros(s.shape, s.dtype), shapes))


def complete(state, objective: Objective):
    """The state with zeros for what is pending, so that its structure stays as it is."""

    def of_node(node):
        return node.zeros(objective) if isinstance(node, Pending) else node

    return jax.tree.map(of_node, state, is_leaf=lambda node: isinstance(node, Pending))


def at_step(value: ScalarOrSchedule, count) -> Any:
    """A number, or a schedule's number at this step."""
    return value(count) if callable(value) else value


def check_positive(who: str, **settings) -> None:
    """Refuse settings that are not positive numbers; schedules and traced values pass."""
    for name, value in settings.items():
        number = _number(who, name, value)
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{who}: {name}={value} must be a finite number greater than zero")


def check_count(who: str, **settings) -> None:
    """Refuse settings that are not whole numbers from one up; traced values pass."""
    for name, value in settings.items():
        number = _number(who, name, value)
        if number is not None and not (number >= 1 and number.is_integer()):
            raise ValueError(f"{who}: {name}={value} must be a whole number, at least one")


def check_rate(who: str, learning_rate) -> None:
    """Refuse a learning rate that is not finite; None, schedules and traced values pass."""
    number = None if learning_rate is None else _number(who, "learning_rate", learning_rate)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{who}: learning_rate={learning_rate} must be a finite number")


def check_fraction(who: str, **settings) -> None:
    """Refuse settings that are not numbers from zero to below one; traced values pass."""
    for name, value in settings.items():
        number = _number(who, name, value)
        if number is not None and not 0 <= number < 1:
            raise ValueError(f"{who}: {name}={value} must be at least zero and below one")


def check_damping(who: str, damping) -> None:
    number = _number(who, "damping", damping)
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"{who}: damping={damping} must be a finite number, and not negative")


def check_start(who: str, damping) -> None:
    """Refuse a schedule for a damping that adapts itself."""
    if callable(damping):
        raise TypeError(f"{who}: its damping adapts itself: give the number that it starts with")
    check_positive(who, damping=damping)


def _number(who: str, name: str, value) -> float | None:
    """The value of a setting; None for a schedule, and for what is traced."""
    if callable(value):
        return None
    if not is_real_number(value):
        raise TypeError(f"{who}: {name}={value!r} must be a number")
    known = value_of(value)
    return None if known is None else float(known)


def check_updates(who: str, updates, params) -> None:
    """Refuse an update without parameters, or with others."""
    if params is None:
        raise ValueError(f"{who} needs the parameters: pass params to update")
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise ValueError(
            f"{who}: the updates have structure {jax.tree.structure(updates)}, the parameters "
            f"{jax.tree.structure(params)}: pass gradients of these parameters"
        )


def check_state(who: str, state, kind: type) -> None:
    """Refuse the state of another optimizer."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{who}: the state is a {type(state).__name__}, but must be a {kind.__name__}: pass "
            "that of the optimizer's init(params), or of its last update"
        )


def is_finite(*trees) -> jax.Array:
    """Whether all numbers of the trees are finite, and their sum too."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    sums = (jnp.sum(x, dtype=jnp.promote_types(x.dtype, jnp.float32)) for x in leaves)
    return jnp.isfinite(sum(sums, jnp.zeros(())))


# A branch, and no selection: XLA would compute the condition again for every leaf.


def where(condition, new, old):
    """One tree or the other."""
    return lax.cond(condition, lambda: new, lambda: old)


def zero_unless(condition, tree):
    """The tree, or zeros."""
    return lax.cond(condition, lambda: tree, lambda: jax.tree.map(jnp.zeros_like, tree))


def scalar_like(value, tree) -> jax.Array:
    """A number in the precision of a tree's sums, at least single."""
    return jnp.asarray(value, Space.of(tree).dtype)


def with_learning_rate(who: str, transformation, learning_rate: ScalarOrSchedule):
    """Followed by a step down the preconditioned gradient, of this length or schedule."""
    if learning_rate is None:
        raise TypeError(f"{who}: learning_rate=None must be a number or a schedule")
    check_rate(who, learning_rate)
    return optax.chain(transformation, optax.scale_by_learning_rate(learning_rate))
