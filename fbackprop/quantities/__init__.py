"""Quantities of a batch: each a contraction of the sites of one sweep."""

from fbackprop.quantities.base import Quantity as Quantity
from fbackprop.quantities.first_order import ClippedGradient as ClippedGradient
from fbackprop.quantities.first_order import ErrorSignals as ErrorSignals
from fbackprop.quantities.first_order import ExampleDots as ExampleDots
from fbackprop.quantities.first_order import ExampleGradients as ExampleGradients
from fbackprop.quantities.first_order import ExampleNorms as ExampleNorms
from fbackprop.quantities.first_order import Gradient as Gradient
from fbackprop.quantities.first_order import GradientNoiseScale as GradientNoiseScale
from fbackprop.quantities.first_order import SecondMoment as SecondMoment
from fbackprop.quantities.first_order import Variance as Variance
from fbackprop.quantities.kronecker import EigenvalueCorrection as EigenvalueCorrection
from fbackprop.quantities.kronecker import Kronecker as Kronecker
from fbackprop.quantities.second_order import FisherDiagonal as FisherDiagonal
from fbackprop.quantities.second_order import GGNBlock as GGNBlock
from fbackprop.quantities.second_order import GGNDiagonal as GGNDiagonal
from fbackprop.quantities.second_order import Gram as Gram
from fbackprop.quantities.second_order import HessianDiagonal as HessianDiagonal
from fbackprop.quantities.second_order import JacobianNorms as JacobianNorms
