"""The catalogue of primitives: which have a backward rule, of what kind, and why some have none."""

from __future__ import annotations

from typing import NamedTuple

from fbackprop.program import Primitive, all_primitives, has_forward_rule
from fbackprop.table import TABLE, LocalRule, Rule, ZeroRule

HAND_WRITTEN, DERIVED, ZERO, NONE = "hand-written", "derived", "zero", "not differentiable"

# Why a rule is derived, or does not exist, where JAX has a derivative or could be thought to.
_AUTHORS_RULE = "transposed by its author's rule"
_REFERENCE = "references of a function's own are threaded as values before the sweep"
_CALLBACK = "the function of a callback is unknown; JAX has no derivative either"
NOTES = {
    "accum_grad_in_ref": _REFERENCE,
    "addupdate": _REFERENCE,
    "buffer_callback": _CALLBACK,
    "call_hi_primitive": "by the backward rule of its author's class",
    "composite": "JAX asks for a custom_jvp around it",
    "custom_jvp_call": "by the user's own forward-mode rule, swept",
    "custom_vjp_call": "by the user's own backward rule",
    "custom_vmap_call": "JAX cannot transpose it either; put a custom_vjp around it",
    "empty_ref": _REFERENCE,
    "ffi_call": _CALLBACK,
    "free_ref": _REFERENCE,
    "freeze": _REFERENCE,
    "from_edtype": f"extended dtypes: {_AUTHORS_RULE}",
    "get": _REFERENCE,
    "igamma_grad_a": "JAX has no derivative of it: no second derivative of igamma in a",
    "io_callback": _CALLBACK,
    "new_ref": _REFERENCE,
    "pmax": "JAX has no derivative of it; stop_gradient its operand, or use all_gather and max",
    "pmin": "JAX has no derivative of it; stop_gradient its operand, or use all_gather and min",
    "pure_callback": _CALLBACK,
    "ragged_all_to_all": f"accelerators alone can run it: {_AUTHORS_RULE}",
    "run_state": "JAX cannot transpose it either; use jax.new_ref",
    "python_call": "a plain Python function that a rule of a sweep names",
    "recorded_jvp": "a custom rule that ran on values, while the function was watched",
    "recorded_vjp": "a custom rule that ran on values, while the function was watched",
    "swap": _REFERENCE,
    "tap": "a place to read a cotangent, in records and in sweeps of a batch",
    "to_edtype": f"extended dtypes: {_AUTHORS_RULE}",
    "while": "its number of iterations is not known; use scan, or fori_loop with static bounds",
}
NOT_DIFFERENTIABLE = frozenset(
    """
    buffer_callback composite custom_vmap_call ffi_call io_callback pure_callback run_state while
    """.split()
)


class PrimitiveCoverage(NamedTuple):
    """How one primitive goes backward.

    Attributes:
      primitive: its name.
      kind: ``"hand-written"``, ``"derived"`` (from its forward-mode rule), ``"zero"`` (it has no
        derivative to pass on) or ``"not differentiable"``.
      where: the module of the rule, empty without one.
      note: why, where it is not evident.
    """

    primitive: str
    kind: str
    where: str
    note: str


class Coverage(tuple[PrimitiveCoverage, ...]):
    """The rows of `coverage`, sorted by name; prints as a table."""

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in self) for i in range(3)]
        return "\n".join(
            "  ".join([*(v.ljust(w) for v, w in zip(row, widths, strict=False)), row.note]).rstrip()
            for row in (PrimitiveCoverage("primitive", "kind", "where", ""), *self)
        )


def coverage() -> Coverage:
    """How every primitive of this JAX goes backward, rules of the user's own included.

    Examples:
      >>> import fbackprop as fb
      >>> rows = {row.primitive: row for row in fb.coverage()}
      >>> rows["sin"].kind, rows["sin"].where
      ('hand-written', 'fbackprop.rules.elementwise')
      >>> rows["floor"].kind, rows["while"].kind
      ('zero', 'not differentiable')
    """
    primitives = {p.name: p for p in (*TABLE, *all_primitives())}
    return Coverage(_row(p) for _, p in sorted(primitives.items()))


def _row(primitive: Primitive) -> PrimitiveCoverage:
    rule, note = TABLE.get(primitive), NOTES.get(primitive.name, "")
    if isinstance(rule, ZeroRule):
        return PrimitiveCoverage(primitive.name, ZERO, "", note)
    if primitive.name in NOT_DIFFERENTIABLE:
        return PrimitiveCoverage(primitive.name, NONE, "", note)
    if rule is not None:
        return PrimitiveCoverage(primitive.name, HAND_WRITTEN, _module(rule), note)
    if note == _REFERENCE or has_forward_rule(primitive):
        return PrimitiveCoverage(primitive.name, DERIVED, "", note or "by its forward-mode rule")
    return PrimitiveCoverage(primitive.name, NONE, "", note or "JAX has no derivative of it")


def _module(rule: Rule) -> str:
    if isinstance(rule, LocalRule):
        return next(f.__module__ for f in rule.pullbacks if f is not None)
    return type(rule).__module__
