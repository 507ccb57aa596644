"""Whether a model is piecewise linear in each of its parameters, seen from its equations."""

from __future__ import annotations

from fbackprop.passes import activity
from fbackprop.program import (
    UNKNOWN_LINE,
    Equation,
    Program,
    Var,
    cotangent_aval,
    is_inexact,
    program_of,
    scan_counts,
    trace,
)
from fbackprop.reverse import DEFAULT

_BODIES = frozenset("jit remat2 closed_call eval_jaxpr".split())

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
    if not every or not any(map(is_inexact, eqn.out_avals)):
        return [Leaves()] * len(eqn.outputs)
    if name in _BODIES:
        (body,) = (eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
        return _dependence(program_of(body), ins, source)
    if name == "cond":
        branches = [_dependence(program_of(b), ins[1:], source) for b in eqn.params["branches"]]
        return [Leaves().union(*outs) for outs in zip(*branches, strict=True)]
    if name == "scan":
        return _through_scan(eqn, ins, source)
    return _through_operation(eqn, ins, source)


def _through_operation(eqn: Equation, ins: list[Leaves], source: str) -> list[Leaves]:
    """Linear in a parameter is what has derivatives that do not change with it."""
    with_mask: dict[tuple[bool, ...], set] = {}  # the parameters that reach the same operands
    for leaf in Leaves().union(*ins):
        with_mask.setdefault(tuple(leaf in leaves for leaves in ins), set()).add(leaf)
    outs: list[Leaves] = [Leaves()] * len(eqn.outputs)
    for mask, leaves in with_mask.items():
        moves = DEFAULT.of(eqn).active_outputs(DEFAULT, eqn, mask)
        if any(moves) and _varies(eqn, mask):
            raise ValueError(
                "the model is not piecewise linear in its parameters: "
                f"'{eqn.primitive.name}' at {source} is curved in one, and the diagonal of the "
                "Hessian has terms there that one sweep does not give; use fb.GGNDiagonal, which "
                "leaves them out"
            )
        outs = [out | leaves if m else out for out, m in zip(outs, moves, strict=True)]
    return outs


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


def _varies(eqn: Equation, moving: tuple[bool, ...]) -> bool:
    """Whether the cotangents that its rule gives to the operands that move depend on these.

    Steps do not: they have no derivative.
    """
    n, rule = len(eqn.inputs), DEFAULT.of(eqn)

    def run(*values):
        remaining = iter(values[n:])
        cts = [next(remaining) if is_inexact(aval) else None for aval in eqn.out_avals]
        _, kept = rule.forward(DEFAULT, eqn, moving, values[:n])
        found = rule.pullback(DEFAULT, eqn, moving, kept, cts)
        return [ct for ct, moves in zip(found, moving, strict=True) if moves and ct is not None]

    cts = [cotangent_aval(aval) for aval in eqn.out_avals if is_inexact(aval)]
    rest = (False,) * len(cts)
    return any(activity(trace(run, [*eqn.in_avals, *cts]), DEFAULT, (*moving, *rest)).outputs)
