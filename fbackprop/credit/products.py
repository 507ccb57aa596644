"""Where a layer of a network is, in a program: products with weights."""

from fbackprop.program import Equation
from fbackprop.rewrite import Seen


def is_product(eqn: Equation) -> bool:
    """Whether an equation is a product of matrices or a convolution."""
    return eqn.primitive.name in ("dot_general", "conv_general_dilated")


def meets_weight(eqn: Seen) -> bool:
    """Whether data meets a weight here: a product of a value and of a function of parameters."""
    return is_product(eqn) and sum(eqn.weights) == 1
