"""Other ways to assign credit: backward rules to be passed as ``rules=``, and what to do with them.

Each function returns a mapping; mappings combine by ``{**a, **b}``, the first key that matches an
equation giving its rule.
"""

from fbackprop.credit.attribution import deconvnet as deconvnet
from fbackprop.credit.attribution import guided_backprop as guided_backprop
from fbackprop.credit.attribution import integrated_gradients as integrated_gradients
from fbackprop.credit.attribution import smooth_gradient as smooth_gradient
from fbackprop.credit.feedback import direct_feedback_alignment as direct_feedback_alignment
from fbackprop.credit.feedback import feedback_alignment as feedback_alignment
from fbackprop.credit.feedback import kolen_pollack as kolen_pollack
from fbackprop.credit.feedback import sign_concordant as sign_concordant
from fbackprop.credit.feedback import sign_symmetric as sign_symmetric
from fbackprop.credit.feedback import target_propagation as target_propagation
from fbackprop.credit.relevance import alpha_beta as alpha_beta
from fbackprop.credit.relevance import epsilon as epsilon
from fbackprop.credit.relevance import gamma as gamma
from fbackprop.credit.relevance import relevance as relevance
from fbackprop.credit.signals import clipped as clipped
from fbackprop.credit.signals import noisy as noisy
from fbackprop.credit.signals import quantised as quantised
from fbackprop.credit.signals import straight_through as straight_through
from fbackprop.credit.signals import surrogate as surrogate
