"""A second, readable reverse mode for JAX: backpropagation that can be checked, read and changed.

>>> import jax.numpy as jnp
>>> import fbackprop as fb
>>> float(fb.grad(jnp.sin)(0.0))
1.0
"""

from fbackprop import losses as losses
from fbackprop import networks as networks
from fbackprop.catalogue import Coverage as Coverage
from fbackprop.catalogue import PrimitiveCoverage as PrimitiveCoverage
from fbackprop.catalogue import coverage as coverage
from fbackprop.check import GradientReport as GradientReport
from fbackprop.check import GradientRow as GradientRow
from fbackprop.check import assert_grads_match as assert_grads_match
from fbackprop.check import check_grads as check_grads
from fbackprop.least_squares import LeastSquaresResult as LeastSquaresResult
from fbackprop.least_squares import least_squares as least_squares
from fbackprop.reverse import grad as grad
from fbackprop.reverse import value_and_grad as value_and_grad
from fbackprop.reverse import vjp as vjp
from fbackprop.table import MissingRule as MissingRule
from fbackprop.table import defrule as defrule

__version__ = "0.1.0"
