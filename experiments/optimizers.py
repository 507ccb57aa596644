"""The optimizers that are compared, one row each.

Adding one is adding its name to `OptimizerName` and a row: what builds it, what of it is searched,
how it takes its data.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

from experiments.command import UsageError
from fbackprop import optim

OptimizerName = Literal[
    "sgd",
    "momentum",
    "adam",
    "adamw",
    "muon",
    "lbfgs",
    "kfac",
    "ekfac",
    "gauss-newton",
    "levenberg-marquardt",
    "hessian-free",
    "diagonal-gauss-newton",
    "natural-gradient",
]
HyperParameter = Literal["learning_rate", "damping"]

Setting: TypeAlias = dict[HyperParameter, Any]
"""A value for each hyper-parameter that is searched, a number or a traced scalar."""


class Optimizer(NamedTuple):
    """One row.

    Attributes:
        label: in figures and tables.
        build: takes the hyper-parameters of ``ranges`` by name; they may be traced.
        ranges: the hyper-parameters that are searched, with the ends of the grid.
        data: a step's batch: ``small``, or ``large`` where noise would spoil a line search or the
            judgement of a step, which is everything if the data are few.
        colour: in figures.
        first_order: whether it uses gradients alone, without a model of the curvature.
    """

    label: str
    build: Callable[..., optax.GradientTransformation]
    ranges: dict[HyperParameter, tuple[float, float]]
    data: Literal["small", "large"]
    colour: str
    first_order: bool = False


def _ours(name: str) -> Callable[..., optax.GradientTransformation]:
    """The optimizer of ``fbackprop.optim`` of that name, looked up when it is built."""

    def build(**setting: Any) -> optax.GradientTransformation:
        try:
            make = getattr(optim, name)
        except AttributeError:
            raise UsageError(f"this fbackprop has no optimizer {name}") from None
        return make(**setting)

    return build


def _momentum(learning_rate: Any) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


_PLAIN: dict[HyperParameter, tuple[float, float]] = {"learning_rate": (1e-3, 10.0)}
_SCALED: dict[HyperParameter, tuple[float, float]] = {"learning_rate": (1e-4, 1e-1)}
_WHOLE: dict[HyperParameter, tuple[float, float]] = {"learning_rate": (1e-1, 1.0)}
_SAMPLED: dict[HyperParameter, tuple[float, float]] = {**_WHOLE, "damping": (1e-3, 1e1)}
_DIAGONAL: dict[HyperParameter, tuple[float, float]] = {
    "learning_rate": (1e-3, 1e-1),
    "damping": (1e-4, 1.0),
}
_DAMPED: dict[HyperParameter, tuple[float, float]] = {"damping": (1e-4, 1e1)}

# Okabe and Ito's colours are told apart with any colour vision. There are eight of them: the
# figures draw first-order methods dashed, so that no two lines look alike.
OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "sgd": Optimizer("SGD", optax.sgd, _PLAIN, "small", "#E69F00", True),
    "momentum": Optimizer("momentum", _momentum, _PLAIN, "small", "#009E73", True),
    "adam": Optimizer("Adam", optax.adam, _SCALED, "small", "#0072B2", True),
    "adamw": Optimizer("AdamW", optax.adamw, _SCALED, "small", "#56B4E9", True),
    "muon": Optimizer("Muon", optax.contrib.muon, _SCALED, "small", "#CC79A7", True),
    # Its line search sets the length of its steps, so there is nothing to search.
    "lbfgs": Optimizer("L-BFGS", optax.lbfgs, {}, "large", "#999999"),
    # Without a learning rate these take their step's length from the quadratic model of the loss.
    "kfac": Optimizer("K-FAC", _ours("kfac"), _DAMPED, "small", "#0072B2"),
    "ekfac": Optimizer("EK-FAC", _ours("ekfac"), _DAMPED, "small", "#56B4E9"),
    # The loss sets its damping.
    "gauss-newton": Optimizer("Gauss–Newton", _ours("gauss_newton"), _WHOLE, "large", "#D55E00"),
    "levenberg-marquardt": Optimizer(
        "Levenberg–Marquardt", _ours("levenberg_marquardt"), _DAMPED, "large", "#E69F00"
    ),
    "hessian-free": Optimizer("Hessian-free", _ours("hessian_free"), _DAMPED, "large", "#009E73"),
    "diagonal-gauss-newton": Optimizer(
        "diagonal Gauss–Newton", _ours("diagonal_gauss_newton"), _DIAGONAL, "small", "#CC79A7"
    ),
    "natural-gradient": Optimizer(
        "natural gradient", _ours("natural_gradient"), _SAMPLED, "small", "#000000"
    ),
}
