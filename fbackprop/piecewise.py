"""Whether a model is piecewise linear in each of its parameters, seen from its equations."""

from __future__ import annotations

import jax.numpy as jnp

from fbackprop.passes import activity
from fbackprop.program import (
    UNKNOWN_LINE,
    Equation,
    Program,
    Var,
    cotangent_aval,
    custom_vjp_halves,
    is_inexact,
    program_of,
    scan_counts,
    trace,
)
from fbackprop.reverse import DEFAULT
from fbackprop.rules.derived import tangent_program

_LINEAR = frozenset(
    """add add_any sub neg copy copy_p convert_element_type reduce_precision real imag reshape
    transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice dynamic_update_slice
    concatenate pad rev split gather scatter-add scatter_add scatter reduce_sum cumsum select_n
    max min clamp reduce_max reduce_min reduce_window_sum reduce_window_max
    select_and_gather_add sort name optimization_barrier fft top_k psum""".split()
)
_BILINEAR = frozenset("mul dot_general conv_general_dilated".split())
_BODIES = frozenset("jit remat2 closed_call eval_jaxpr".split())
_FLAT = frozenset("sign round floor ceil stop_gradient".split())

Leaves = frozenset  # the parameters that a value depends on


def refuse_curvature(program: Program, n_params: int) -> None:
    """Raise ValueError if the outputs are curved in one of the first inputs of a program."""
    inputs = [Leaves([i]) if i < n_params else Leaves() for i in range(len(program.inputs))]
    _dependence(program, inputs, UNKNOWN_LINE)


def _dependence(program: Program, inputs, caller: str) -> list[Leaves]:
    """The parameters on which each output depends, piecewise linearly."""
    known: dict[Var, Leaves] = {}
    for v, leaves in zip(program.inputs, inputs, strict=True):
        known[v] = leaves if is_inexact(v.aval) else Leaves()

    def of(v) -> Leaves:
        return known.get(v, Leaves()) if isinstance(v, Var) else Leaves()

    for eqn in program.equations:
        found = _through(eqn, [of(v) for v in eqn.inputs], caller)
        for v, leaves in zip(eqn.outputs, found, strict=True):
            known[v] = leaves if is_inexact(v.aval) else Leaves()
    return [of(v) for v in program.outputs]


def _through(eqn: Equation, ins: list[Leaves], caller: str) -> list[Leaves]:
    name, every = eqn.primitive.name, Leaves().union(*ins)
    source = eqn.source_within(caller)
    result = [every] * len(eqn.outputs)
    if not every or not any(map(is_inexact, eqn.out_avals)) or _is_flat(eqn):
        return [Leaves()] * len(eqn.outputs)
    if name in _BODIES:
        (body,) = (eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
        return _dependence(program_of(body), ins, source)
    if name == "cond":
        branches = [_dependence(program_of(b), ins[1:], source) for b in eqn.params["branches"]]
        return [Leaves().union(*outs) for outs in zip(*branches, strict=True)]
    if name == "scan":
        return _through_scan(eqn, ins, source)
    if name in _CUSTOM and not _CUSTOM[name](eqn):
        return result
    meets_itself = sum(map(len, ins)) > len(every)
    if name in _LINEAR or (name in _BILINEAR and not meets_itself):
        return result
    if name == "abs" and _is_real(eqn):
        return result
    if name == "div" and not ins[1]:
        return result
    if name == "integer_pow" and eqn.params["y"] == 1:
        return result
    raise ValueError(
        f"the model is not piecewise linear in its parameters: '{name}' at {source} is curved "
        "in one, and the diagonal of the Hessian has terms there that one sweep does not give; use "
        "fb.GGNDiagonal, which leaves them out"
    )


def _is_flat(eqn: Equation) -> bool:
    return eqn.primitive.name in _FLAT and _is_real(eqn)


def _is_real(eqn: Equation) -> bool:
    """Moduli and signs of complex numbers are curved."""
    return not any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in eqn.in_avals)


def _through_scan(eqn: Equation, ins: list[Leaves], source: str) -> list[Leaves]:
    body = program_of(eqn.params["jaxpr"])
    n_consts, n_carry = scan_counts(eqn.params)
    stop = n_consts + n_carry
    carry = ins[n_consts:stop]
    while True:
        outs = _dependence(body, [*ins[:n_consts], *carry, *ins[stop:]], source)
        grown = [a | b for a, b in zip(carry, outs, strict=False)]
        if grown == carry:
            return [*carry, *outs[n_carry:]]
        carry = grown


# --- functions with rules of their own, which count for what these say of them --------------------


def _tangents_vary(eqn: Equation) -> bool:
    """Whether the tangents of a `custom_jvp` function depend on where it is taken."""
    program, carries = tangent_program(eqn, tuple(map(is_inexact, eqn.in_avals)))
    return any(_active(program, len(eqn.inputs))[len(carries) :])


def _cotangents_vary(eqn: Equation) -> bool:
    """The same of the cotangents of a `custom_vjp` function."""
    n, moving = len(eqn.inputs), tuple(map(is_inexact, eqn.in_avals))
    fwd, bwd = custom_vjp_halves(eqn, moving)

    def run(*values):
        remaining = iter(values[n:])
        cts = [next(remaining) if is_inexact(aval) else None for aval in eqn.out_avals]
        found = bwd(fwd(*values[:n])[1], cts, eqn.out_avals)
        return [ct for ct, moves in zip(found, moving, strict=True) if moves and ct is not None]

    cts = [cotangent_aval(aval) for aval in eqn.out_avals if is_inexact(aval)]
    return any(_active(trace(run, [*eqn.in_avals, *cts]), n))


def _active(program: Program, n: int) -> tuple[bool, ...]:
    """Which outputs have a derivative in the first n inputs; steps of these have none."""
    return activity(program, DEFAULT, tuple(i < n for i in range(len(program.inputs)))).outputs


_CUSTOM = {"custom_jvp_call": _tangents_vary, "custom_vjp_call": _cotangents_vary}
