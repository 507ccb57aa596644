"""Curvature as linear operators on pytrees like the parameters, which multiply and solve."""

from fbackprop.curvature.base import Curvature as Curvature
from fbackprop.curvature.dense import BlockDiagonal as BlockDiagonal
from fbackprop.curvature.dense import Dense as Dense
from fbackprop.curvature.diagonal import Diagonal as Diagonal
from fbackprop.curvature.dual import DualGaussNewton as DualGaussNewton
from fbackprop.curvature.dual import GGNRows as GGNRows
from fbackprop.curvature.factors import EigenFactors as EigenFactors
from fbackprop.curvature.factors import KroneckerFactors as KroneckerFactors
from fbackprop.curvature.products import GaussNewton as GaussNewton
from fbackprop.curvature.products import Hessian as Hessian
from fbackprop.curvature.space import Space as Space
