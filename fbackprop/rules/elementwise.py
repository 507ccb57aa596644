"""Elementwise primitives: arithmetic, exponentials, trigonometry, comparisons, choices.

At kinks and ties the derivative is the one JAX gives. Complex operands follow JAX's convention:
the pullback of a holomorphic function multiplies by its derivative, without conjugation.
"""

from __future__ import annotations

import numpy as np
from jax import lax

from fbackprop.program import primitive, type_of
from fbackprop.table import LocalRule, fit, joint, register, row, zero

# --- arithmetic -----------------------------------------------------------------------------------


def constant(x, value):
    """`value` in the dtype of `x`."""
    return lax.full_like(x, value, shape=())


def scale(ct, factor):
    return lax.mul(ct, lax.full_like(ct, factor, shape=ct.shape))


def stretch(x, shape):
    """`x`, a scalar or with axes of size one, broadcast to `shape`."""
    if x.shape == tuple(shape):
        return x
    return lax.broadcast_in_dim(x, shape, range(len(shape)) if x.ndim else ())


def product(a, b, aval):
    """A product of the type `aval`, whose factors may be of different precisions."""
    if a.dtype != b.dtype:
        wide = np.promote_types(a.dtype, b.dtype)
        a, b = lax.convert_element_type(a, wide), lax.convert_element_type(b, wide)
    out = lax.mul(a, b)
    return out if out.dtype == aval.dtype else lax.convert_element_type(out, aval.dtype)


row("neg", lambda ct: lax.neg(ct))
row("add", lambda ct: ct, lambda ct: ct)
row("add_any", lambda ct: ct, lambda ct: ct)
row("sub", lambda ct: ct, lambda ct: lax.neg(ct))
row(
    "mul",
    lambda ct, y, eqn: product(ct, y, eqn.in_avals[0]),
    lambda ct, x, eqn: product(x, ct, eqn.in_avals[1]),
)


def _denominator(ct, y, out, eqn):
    # By the quotient, which is in the dtype's range where 1/y² need not be.
    if eqn.in_avals[1].shape == ct.shape:
        return lax.neg(lax.mul(lax.div(ct, y), out))
    # A denominator is often smaller than its numerator (a softmax's sum): sum first, then scale.
    return lax.neg(lax.div(fit(lax.mul(ct, out), eqn.in_avals[1], eqn), y))


row("div", lambda ct, y: lax.div(ct, y), _denominator)
row(
    "rem",
    lambda ct: ct,
    lambda ct, x, y: lax.mul(
        lax.neg(ct), lax.mul(lax.sign(lax.div(x, y)), lax.floor(lax.abs(lax.div(x, y))))
    ),
)
row("square", lambda ct, x: lax.mul(ct, scale(x, 2)))
row("one_minus_square", lambda ct, x: lax.mul(ct, scale(x, -2)))


@joint("integer_pow")
def _integer_pow(ct, x, eqn):
    n = eqn.params["y"]
    if n == 0:
        return lax.full_like(ct, 0)
    power = x if n == 2 else lax.integer_pow(x, n - 1)
    return ct if n == 1 else lax.mul(ct, scale(power, n))


def _pow_x(ct, x, y):
    if not np.issubdtype(y.dtype, np.integer):
        return lax.mul(ct, lax.mul(y, lax.pow(x, lax.sub(y, constant(y, 1)))))
    y = lax.convert_element_type(y, x.dtype)
    shape = np.broadcast_shapes(x.shape, y.shape)
    x, y = stretch(x, shape), stretch(y, shape)
    slope = lax.mul(_nonzero(y), lax.pow(x, lax.sub(y, lax.full_like(y, 1))))
    return lax.mul(ct, lax.select(lax.eq(y, lax.full_like(y, 0)), lax.full_like(y, 0), slope))


def _nonzero(x):
    """x with zeros replaced by ones."""
    return lax.select(lax.eq(x, lax.full_like(x, 0)), lax.full_like(x, 1), x)


row("pow", _pow_x, lambda ct, x, out: lax.mul(ct, lax.mul(lax.log(_nonzero(x)), out)))

# --- exponentials and roots -----------------------------------------------------------------------

row("exp", lambda ct, out: lax.mul(ct, out))
row("exp2", lambda ct, out: lax.mul(ct, scale(out, np.log(2))))
row("expm1", lambda ct, out: lax.mul(ct, lax.add(out, lax.full_like(out, 1))))
row("log", lambda ct, x: lax.div(ct, x))
row("log2", lambda ct, x: lax.div(ct, scale(x, np.log(2))))
row("log1p", lambda ct, x: lax.div(ct, lax.add(x, lax.full_like(x, 1))))
row("sqrt", lambda ct, out: lax.mul(ct, lax.div(lax.full_like(out, 0.5), out)))
row("rsqrt", lambda ct, x, out: lax.mul(ct, scale(lax.div(out, x), -0.5)))
row("cbrt", lambda ct, out: lax.mul(ct, scale(lax.integer_pow(out, -2), 1 / 3)))

# --- trigonometric and hyperbolic -----------------------------------------------------------------


def _one_minus_square(x):
    return lax.mul(lax.add(lax.full_like(x, 1), x), lax.sub(lax.full_like(x, 1), x))


def _one_plus_square(x):
    return lax.add(lax.full_like(x, 1), lax.square(x))


row("sin", lambda ct, x: lax.mul(ct, lax.cos(x)))
row("cos", lambda ct, x: lax.neg(lax.mul(ct, lax.sin(x))))
row("tan", lambda ct, out: lax.mul(ct, _one_plus_square(out)))
row("asin", lambda ct, x: lax.mul(ct, lax.rsqrt(_one_minus_square(x))))
row("acos", lambda ct, x: lax.mul(ct, lax.neg(lax.rsqrt(_one_minus_square(x)))))
row("atan", lambda ct, x: lax.div(ct, _one_plus_square(x)))
row(
    "atan2",
    lambda ct, x, y: lax.mul(ct, lax.div(y, lax.add(lax.square(x), lax.square(y)))),
    lambda ct, x, y: lax.mul(ct, lax.div(lax.neg(x), lax.add(lax.square(x), lax.square(y)))),
)
row("sinh", lambda ct, x: lax.mul(ct, lax.cosh(x)))
row("cosh", lambda ct, x: lax.mul(ct, lax.sinh(x)))
row("tanh", lambda ct, out: lax.mul(ct, _one_minus_square(out)))
row("asinh", lambda ct, x: lax.mul(ct, lax.rsqrt(_one_plus_square(x))))
row(
    "acosh",
    lambda ct, x: lax.mul(
        ct,
        lax.mul(
            lax.rsqrt(lax.sub(x, lax.full_like(x, 1))), lax.rsqrt(lax.add(x, lax.full_like(x, 1)))
        ),
    ),
)
row("atanh", lambda ct, x: lax.div(ct, _one_minus_square(x)))
row("logistic", lambda ct, out: lax.mul(ct, lax.mul(out, lax.sub(lax.full_like(out, 1), out))))

# --- kinks ----------------------------------------------------------------------------------------


@joint("abs")
def _abs(ct, x, out):
    if not np.issubdtype(x.dtype, np.complexfloating):
        return lax.select(lax.ge(x, lax.full_like(x, 0)), ct, lax.neg(ct))
    unit = lax.div(lax.conj(x), lax.convert_element_type(_nonzero(out), x.dtype))
    return lax.mul(lax.convert_element_type(ct, x.dtype), unit)


def _complex_sign(ct, x, out):
    """A complex number's direction turns with what of a change is at right angles to it."""
    turn = lax.div(lax.imag(lax.mul(ct, out)), _nonzero(lax.abs(x)))
    return lax.mul(lax.conj(out), lax.complex(lax.full_like(turn, 0), turn))


class _Sign(LocalRule):
    """The sign of a real number has no derivative to pass on."""

    def active_outputs(self, rules, eqn, active):
        is_complex = np.issubdtype(eqn.out_avals[0].dtype, np.complexfloating)
        return super().active_outputs(rules, eqn, active) if is_complex else (False,)


register("sign", _Sign([_complex_sign], joint=True))
row("nextafter", lambda ct: ct, None)


def _share(x, y, out):
    """1 where x is the result, 1/2 where both are, 0 elsewhere."""
    won = lax.select(lax.eq(x, out), lax.full_like(out, 1), lax.full_like(out, 0))
    return lax.div(won, lax.select(lax.eq(y, out), lax.full_like(out, 2), lax.full_like(out, 1)))


def _extremum(ct, x, y, out):
    return lax.mul(ct, _share(stretch(x, out.shape), stretch(y, out.shape), out))


for _name in ("max", "min"):
    row(
        _name,
        lambda ct, x, y, out: _extremum(ct, x, y, out),
        lambda ct, x, y, out: _extremum(ct, y, x, out),
    )


@joint("clamp")
def _clamp(ct, xs):
    nothing = lax.full_like(ct, 0)
    low, x, high = (stretch(v, ct.shape) for v in xs)
    ordered = lax.lt(low, high)
    return (
        lax.select(lax.bitwise_and(lax.gt(low, x), ordered), ct, nothing),
        lax.select(lax.bitwise_and(lax.gt(x, low), lax.lt(x, high)), ct, nothing),
        lax.select(lax.lt(high, x), ct, nothing),
    )


@joint("select_n")
def _select_n(ct, x, eqn):
    n = len(eqn.inputs) - 1
    nothing = lax.full_like(ct, 0)
    cases = [[ct if i == j else nothing for j in range(n)] for i in range(n)]
    return (None, *(lax.select_n(x, *case) for case in cases))


# --- types ----------------------------------------------------------------------------------------


@joint("convert_element_type")
def _convert_element_type(ct, eqn):
    wanted = eqn.in_avals[0]
    if np.issubdtype(ct.dtype, np.complexfloating) and not np.issubdtype(
        wanted.dtype, np.complexfloating
    ):
        ct = lax.real(ct)
    if (ct.dtype, type_of(ct).weak_type) == (wanted.dtype, wanted.weak_type):
        return ct
    options = {**eqn.params, "new_dtype": wanted.dtype, "weak_type": wanted.weak_type}
    return eqn.primitive.bind(ct, **options)


row("reduce_precision", lambda ct, eqn: lax.reduce_precision(ct, **eqn.params))
row("real", lambda ct: lax.complex(ct, lax.full_like(ct, 0)))
row("imag", lambda ct: lax.complex(lax.full_like(ct, 0), lax.neg(ct)))
row("complex", lambda ct: lax.real(ct), lambda ct: lax.imag(lax.neg(ct)))


@joint("conj")
def _conj(ct, eqn):
    if np.issubdtype(eqn.params["input_dtype"], np.complexfloating):
        return lax.conj(ct)
    return lax.real(ct)


row("copy", lambda ct: ct)
row("name", lambda ct: ct)
row("stage", lambda ct: ct)
row("tie", None, lambda ct: ct)
row("sharding_constraint", lambda ct, eqn: eqn.primitive.bind(ct, **eqn.params))
row("layout_constraint", lambda ct, eqn: eqn.primitive.bind(ct, **eqn.params))
row("xla_metadata_value", lambda ct, eqn: eqn.primitive.bind(ct, **eqn.params))


@joint("device_put")
def _device_put(cts, eqn):
    """Cotangents travel back to where their operands came from."""
    p = eqn.params
    return primitive("device_put").bind(
        *cts, devices=p["srcs"], srcs=p["devices"], copy_semantics=p["copy_semantics"]
    )


@joint("optimization_barrier")
def _optimization_barrier(cts):
    return lax.optimization_barrier(cts)


zero(
    *"""
    stop_gradient floor ceil round is_finite not and or xor eq ne ge gt le lt eq_to
    le_to lt_to shift_left shift_right_arithmetic shift_right_logical population_count clz mulhi
    iota argmax argmin bitcast_convert_type random_bits random_fold_in random_seed random_split
    threefry2x32 rng_bit_generator rng_uniform axis_index empty
    reduce_and reduce_or reduce_xor platform_index random_wrap random_unwrap zeros_like
    debug_callback debug_print check inspect_sharding dce_sink create_token after_all empty2
    """.split()
)
