"""The Gauss-Newton family as optax transformations."""

from fbackprop.optim.diagonal import diagonal_gauss_newton as diagonal_gauss_newton
from fbackprop.optim.exact import gauss_newton as gauss_newton
from fbackprop.optim.exact import natural_gradient as natural_gradient
from fbackprop.optim.factored import ekfac as ekfac
from fbackprop.optim.factored import kfac as kfac
from fbackprop.optim.hessian_free import hessian_free as hessian_free
from fbackprop.optim.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from fbackprop.optim.precondition import precondition_by_curvature as precondition_by_curvature
from fbackprop.optim.precondition import with_curvature as with_curvature
from fbackprop.optim.step import Step as Step
from fbackprop.optim.step import step as step
