"""A second, readable reverse mode for JAX: backpropagation that can be checked, read and changed.

Examples:
  >>> import jax.numpy as jnp
  >>> import fbackprop as fb
  >>> float(fb.grad(jnp.sin)(0.0))
  1.0
"""

from fbackprop import credit as credit
from fbackprop import estimators as estimators
from fbackprop import losses as losses
from fbackprop import networks as networks
from fbackprop import optim as optim
from fbackprop.batch import sweep as sweep
from fbackprop.catalogue import Coverage as Coverage
from fbackprop.catalogue import PrimitiveCoverage as PrimitiveCoverage
from fbackprop.catalogue import coverage as coverage
from fbackprop.check import GradientReport as GradientReport
from fbackprop.check import GradientRow as GradientRow
from fbackprop.check import assert_grads_match as assert_grads_match
from fbackprop.check import check_grads as check_grads
from fbackprop.columns import Example as Example
from fbackprop.columns import HessianRoot as HessianRoot
from fbackprop.columns import Labels as Labels
from fbackprop.columns import LossGradient as LossGradient
from fbackprop.columns import Outputs as Outputs
from fbackprop.curvature import BlockDiagonal as BlockDiagonal
from fbackprop.curvature import Curvature as Curvature
from fbackprop.curvature import Dense as Dense
from fbackprop.curvature import Diagonal as Diagonal
from fbackprop.curvature import DualGaussNewton as DualGaussNewton
from fbackprop.curvature import EigenFactors as EigenFactors
from fbackprop.curvature import GaussNewton as GaussNewton
from fbackprop.curvature import GGNRows as GGNRows
from fbackprop.curvature import Hessian as Hessian
from fbackprop.curvature import KroneckerFactors as KroneckerFactors
from fbackprop.curvature import Space as Space
from fbackprop.explain import LeafReport as LeafReport
from fbackprop.explain import SitesReport as SitesReport
from fbackprop.explain import explain_sites as explain_sites
from fbackprop.gradients import Gradients as Gradients
from fbackprop.kronecker import BiasBlock as BiasBlock
from fbackprop.kronecker import EigenBlock as EigenBlock
from fbackprop.kronecker import KroneckerBlock as KroneckerBlock
from fbackprop.least_squares import LeastSquaresResult as LeastSquaresResult
from fbackprop.least_squares import least_squares as least_squares
from fbackprop.nonfinite import NonFinite as NonFinite
from fbackprop.objective import Objective as Objective
from fbackprop.quantities import ClippedGradient as ClippedGradient
from fbackprop.quantities import EigenvalueCorrection as EigenvalueCorrection
from fbackprop.quantities import ErrorSignals as ErrorSignals
from fbackprop.quantities import ExampleDots as ExampleDots
from fbackprop.quantities import ExampleGradients as ExampleGradients
from fbackprop.quantities import ExampleNorms as ExampleNorms
from fbackprop.quantities import FisherDiagonal as FisherDiagonal
from fbackprop.quantities import GGNBlock as GGNBlock
from fbackprop.quantities import GGNDiagonal as GGNDiagonal
from fbackprop.quantities import Gradient as Gradient
from fbackprop.quantities import GradientNoiseScale as GradientNoiseScale
from fbackprop.quantities import Gram as Gram
from fbackprop.quantities import HessianDiagonal as HessianDiagonal
from fbackprop.quantities import JacobianNorms as JacobianNorms
from fbackprop.quantities import Kronecker as Kronecker
from fbackprop.quantities import Quantity as Quantity
from fbackprop.quantities import SecondMoment as SecondMoment
from fbackprop.quantities import Variance as Variance
from fbackprop.record import Record as Record
from fbackprop.record import Statistics as Statistics
from fbackprop.record import Step as Step
from fbackprop.record import error_signals as error_signals
from fbackprop.record import record as record
from fbackprop.reverse import grad as grad
from fbackprop.reverse import value_and_grad as value_and_grad
from fbackprop.reverse import vjp as vjp
from fbackprop.rewrite import Anywhere as Anywhere
from fbackprop.rewrite import Broadcast as Broadcast
from fbackprop.rewrite import Seen as Seen
from fbackprop.rewrite import Severed as Severed
from fbackprop.rewrite import Twinned as Twinned
from fbackprop.table import MissingRule as MissingRule
from fbackprop.table import defrule as defrule

__version__ = "0.1.0"
