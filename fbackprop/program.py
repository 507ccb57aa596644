"""Programs: what tracing a function gives, and the one place that touches JAX's internals.

JAX's intermediate language drifts from release to release. Everything that reads it stands here:
how a function is traced, how an equation is run again, which operands of a `scan` are its carry,
where a user's `custom_vjp` keeps its two halves. The rest of the library sees only `Program` and
`Equation`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import ad_util, api_util, core, dtypes, linear_util, literals, source_info_util
from jax._src.custom_derivatives import SymbolicZero
from jax._src.interpreters import ad, batching, mlir, partial_eval
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.state import discharge
from jax._src.state.types import AbstractRef
from jax.extend.core import Literal, Primitive, Var

type_of = jax.typeof
float0 = jax.dtypes.float0
# Whether `cholesky` takes its matrix to be given by the lower triangle, or every element for a
# variable of its own, when it is differentiated.
CHOLESKY_READS_ONE_TRIANGLE = jax.__version_info__ >= (0, 11, 2)
UNKNOWN_LINE = "an unknown line"


class Equation:
    """One application of a primitive: ``outputs = primitive[params](inputs)``.

    Attributes:
      primitive: the JAX primitive applied.
      params: its static parameters.
      inputs: variables (hashable, opaque) or `Literal`s, one per operand.
      outputs: variables, one per result.
      in_avals, out_avals: abstract values (`.shape`, `.dtype`) of operands and results.
      memo: facts derived from the equation, computed once (see `memoized`).
      rule: the backward rule that this equation has of its own, if any.
    """

    __slots__ = (
        "primitive", "params", "inputs", "outputs", "in_avals", "out_avals", "memo",
        "jaxpr_equation",
    )  # fmt: skip

    rule: Any = None

    def __init__(self, eqn):
        self.primitive: Primitive = eqn.primitive
        self.params: dict[str, Any] = eqn.params
        self.inputs = tuple(eqn.invars)
        self.outputs = tuple(eqn.outvars)
        self.in_avals = tuple(v.aval for v in eqn.invars)
        self.out_avals = tuple(v.aval for v in eqn.outvars)
        self.memo: dict = {}
        self.jaxpr_equation = eqn

    def __repr__(self) -> str:
        return f"<{self.label} at {self.source}>"

    def unchanged(self) -> Equation:
        """The equation without a rule of its own."""
        return self

    @property
    def arity(self) -> int:
        """How many operands a backward rule sees."""
        return len(self.inputs)

    @property
    def name(self) -> str:
        """What the user called it: a value, a jit-ted or custom function, a loop's body; or ''.

        A value has the name that `jax.ad_checkpoint.checkpoint_name` gave it.
        """
        name = self.params.get("name")
        if isinstance(name, str):
            return name
        body = self.params.get("call_jaxpr") or self.params.get("jaxpr")
        info = getattr(getattr(body, "jaxpr", body), "debug_info", None)
        return getattr(info, "func_name", None) or ""

    @property
    def label(self) -> str:
        """The primitive, and what the user called it if anything: ``jit:relu``."""
        return f"{self.primitive}:{self.name}" if self.name else str(self.primitive)

    @property
    def scope(self) -> str:
        """The `jax.named_scope`s around it within its function, ``outer/inner``."""
        return str(self.jaxpr_equation.source_info.name_stack)

    @property
    def effects(self):
        return self.jaxpr_equation.effects

    @property
    def source(self) -> str:
        """The line of the user's code that called the primitive, ``file:line (function)``."""
        return source_info_util.summarize(self.jaxpr_equation.source_info) or UNKNOWN_LINE

    def source_within(self, caller: str) -> str:
        """The same, or the line of the call around it where this one is not known.

        Library functions are traced once for all their callers, without any caller's line.
        """
        return caller if self.source == UNKNOWN_LINE else self.source

    @property
    def has_effects(self) -> bool:
        return bool(self.effects)

    @contextlib.contextmanager
    def context(self):
        """A context that gives new operations this equation's line, scope, mesh and device kind."""
        info = self.jaxpr_equation.source_info
        stack = source_info_util.current_name_stack() + info.name_stack
        with (
            source_info_util.user_context(info.traceback, name_stack=stack),
            self.jaxpr_equation.ctx.manager,
        ):
            yield

    def bind(self, *values, **changed) -> list:
        """Run the equation on `values`, some parameters changed; always a list of results."""
        params = self.primitive.get_bind_params({**self.params, **changed})
        with self.context():
            out = self.primitive.bind(*values, **params)
        return list(out) if self.primitive.multiple_results else [out]

    def stage(self, *values) -> list:
        """The same within a trace that shall hold the equation as it is."""
        return self.bind(*values)


class Program:
    """A straight line of equations from `inputs` to `outputs`: a function, traced.

    Attributes:
      inputs: the variables that take the arguments.
      constants: pairs (variable, value) that the trace closed over.
      equations: in order of execution.
      outputs: variables or `Literal`s.
      memo: facts derived from the program, computed once (see `memoized`).
    """

    __slots__ = ("inputs", "constants", "equations", "outputs", "memo", "_last_use", "__weakref__")

    def __init__(self, inputs, constants, equations, outputs):
        self.inputs = tuple(inputs)
        self.constants = tuple(constants)
        self.equations = tuple(equations)
        self.outputs = tuple(outputs)
        self.memo: dict = {}
        self._last_use: list[list[Var]] | None = None

    @property
    def in_avals(self):
        return tuple(v.aval for v in self.inputs)

    @property
    def out_avals(self):
        return tuple(v.aval for v in self.outputs)

    def dying(self) -> list[list[Var]]:
        """For each equation the variables that no later equation and no output reads."""
        if self._last_use is None:
            seen = {v for v in self.outputs if isinstance(v, Var)}
            self._last_use = []
            for eqn in reversed(self.equations):
                fresh = {v for v in (*eqn.inputs, *eqn.outputs) if isinstance(v, Var)} - seen
                seen |= fresh
                self._last_use.append(list(fresh))
            self._last_use.reverse()
        return self._last_use


def read(env: dict, atom):
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else env[atom]


def interpret(program: Program, values: Sequence, apply: Callable) -> list:
    """Run `program` on `values` with ``apply(eqn, operands)`` for the results of each equation."""
    env = dict(program.constants)
    env.update(zip(program.inputs, values, strict=True))
    for eqn, dead in zip(program.equations, program.dying(), strict=True):
        outs = apply(eqn, [read(env, v) for v in eqn.inputs])
        env.update(zip(eqn.outputs, outs, strict=True))
        for v in dead:
            env.pop(v, None)
    return [read(env, v) for v in program.outputs]


def evaluate(program: Program, values: Sequence) -> list:
    """Run `program` on `values`, one per input; returns one value per output."""
    return interpret(program, values, lambda eqn, operands: eqn.bind(*operands))


def bound(program: Program, values: Sequence) -> Program:
    """The same program with values for its first inputs."""
    names, rest = program.inputs[: len(values)], program.inputs[len(values) :]
    constants = (*program.constants, *zip(names, values, strict=True))
    return Program(rest, constants, program.equations, program.outputs)


def inlined(program: Program) -> Program:
    """The same program with the equations of its jit-ted calls in the place of the calls."""

    def apply(eqn, operands):
        if eqn.primitive.name == "jit" and eqn.rule is None:
            return interpret(program_of(eqn.params["jaxpr"]), operands, apply)
        return eqn.bind(*operands)

    return trace(lambda *values: interpret(program, values, apply), program.in_avals)


def memoized(function):
    """Cache ``function(owner, *key)`` on the program or equation that owns it, while it lives."""

    @functools.wraps(function)
    def cached(owner: Program | Equation, *key):
        slot = (function, *key)
        if slot not in owner.memo:
            owner.memo[slot] = function(owner, *key)
        return owner.memo[slot]

    return cached


# --- tracing ------------------------------------------------------------------------------------


def trace_jaxpr(function: Callable, avals: Sequence, name: str = "fbackprop"):
    """Trace a flat function (arrays in, list of arrays out); returns the closed jaxpr."""
    return _without_references(_traced(function, avals, name))


def _traced(function: Callable, avals: Sequence, name: str = "fbackprop"):
    """The same with the references that it makes."""
    info = api_util.debug_info(name, function, tuple(avals), {})
    wrapped = linear_util.wrap_init(function, debug_info=info)
    jaxpr, _, consts = partial_eval.trace_to_jaxpr_dynamic(wrapped, tuple(avals))
    return close(jaxpr, consts)


def close(jaxpr, consts=()):
    """A jaxpr with its constants attached, in either of JAX's two representations."""
    if hasattr(jaxpr, "with_consts"):  # JAX >= 0.12: a jaxpr carries its own constants
        return jaxpr.with_consts(list(consts)) if consts else jaxpr
    return core.ClosedJaxpr(jaxpr, list(consts))


def program_of(jaxpr) -> Program:
    """The `Program` of a jaxpr, open or closed; the same object for the same jaxpr."""
    program = _programs.get(jaxpr)
    if program is None:
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        inputs, constants = inner.invars, getattr(jaxpr, "consts", None)
        if constants is None:  # an open one, whose constants are given to it as other inputs are
            inputs, constants = [*inner.constvars, *inputs], ()
        constants = zip(inner.constvars if constants else (), constants, strict=True)
        program = Program(inputs, constants, map(_equation, inner.eqns), inner.outvars)
        _programs[jaxpr] = program
    return program


def _equation(eqn) -> Equation:
    return _KINDS.get(eqn.primitive, Equation)(eqn)


_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def trace(function: Callable, avals: Sequence, name: str = "fbackprop") -> Program:
    """Trace a flat function of arrays with the abstract values `avals`."""
    return program_of(trace_jaxpr(function, avals, name))


def trace_tree(function: Callable, *args) -> tuple[Program, Any]:
    """Trace a function of pytrees (of arrays or `jax.ShapeDtypeStruct`s).

    Returns the program on the leaves of the arguments, and the structure of its result.
    """
    leaves, structure = jax.tree.flatten(args)
    out_structure: Any = None

    def flat(*leaves):
        nonlocal out_structure
        out_leaves, out_structure = jax.tree.flatten(
            function(*jax.tree.unflatten(structure, leaves))
        )
        return [as_array(x) for x in out_leaves]

    name = getattr(function, "__name__", "fbackprop")
    return trace(flat, [shaped(x) for x in leaves], name), out_structure


def shaped(x):
    """The type of an array, or of what only has a shape and a dtype."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return core.ShapedArray(x.shape, x.dtype)
    return x if isinstance(x, core.AbstractValue) else type_of(x)


class TracedFunction(NamedTuple):
    """A user's function, traced.

    Attributes:
      program: constants and argument leaves, to output leaves and then auxiliary arrays.
      constants: the values that it closed over, to be passed first.
      out_structure: the tree of the (differentiated) output.
      unflatten: from the program's outputs to the function's output and auxiliary output.
      on_values: whether it was traced on the values of its arguments.
    """

    program: Program
    constants: list
    out_structure: Any
    unflatten: Callable
    on_values: bool


def trace_function(
    f: Callable, leaves: Sequence, structure, has_aux: bool, on_values: bool = False
) -> TracedFunction:
    """Trace `f`, called on the pytree of arguments with these leaves.

    With abstract arguments if that will do; with `on_values`, on the values there are.
    """
    out_structure: Any = None
    aux_structure: Any = None
    aux_leaves: list = []

    def flat(*leaves):
        nonlocal out_structure, aux_structure, aux_leaves
        out, aux = f(*jax.tree.unflatten(structure, leaves)), ()
        if has_aux:
            if not isinstance(out, tuple | list) or len(out) != 2:
                what = "an array" if isinstance(out, core.Tracer) else f"a {type(out).__name__}"
                raise TypeError(
                    "has_aux=True means that the function returns a pair (output, aux), but it "
                    f"returned {what}"
                )
            out, aux = out
        out_leaves, out_structure = jax.tree.flatten(out)
        aux_leaves, aux_structure = jax.tree.flatten(aux)
        for leaf in out_leaves:
            type_of(leaf)  # a plain error for what is no array
        return [*out_leaves, *(x for x in aux_leaves if isinstance(x, core.Tracer))]

    args = jax.tree.unflatten(structure, leaves)
    info = api_util.debug_info("vjp", f, args, {})
    wrapped = linear_util.wrap_init(flat, debug_info=info)
    traced = None if on_values else _trace_abstractly(wrapped, leaves)
    program, constants = traced or _watch(flat, leaves)
    # Auxiliary leaves that do not depend on the trace (numbers, strings) are passed by.
    aux_template = [None if isinstance(x, core.Tracer) else x for x in aux_leaves]
    traced_aux = [isinstance(x, core.Tracer) for x in aux_leaves]
    aux_leaves = []

    def unflatten(outs):
        n = out_structure.num_leaves
        arrays = iter(outs[n:])
        aux = [
            next(arrays) if is_traced else value
            for value, is_traced in zip(aux_template, traced_aux, strict=True)
        ]
        return (
            jax.tree.unflatten(out_structure, outs[:n]),
            jax.tree.unflatten(aux_structure, aux),
        )

    return TracedFunction(program, list(constants), out_structure, unflatten, traced is None)


def _trace_abstractly(wrapped, leaves: Sequence) -> tuple[Program, list] | None:
    """The program of a function of abstract arguments; None if it looks at their values."""
    try:
        avals = [type_of(x) for x in leaves]
        jaxpr, _, constants = partial_eval.trace_to_jaxpr_dynamic(wrapped, avals)
    except Exception:  # asked for a value, a tracer gives errors of many types
        return None
    opened = close(partial_eval.convert_constvars_jaxpr(jaxpr))
    return program_of(_without_references(opened)), constants


def _without_references(jaxpr):
    """A jaxpr that reads and writes no references of its own (`jax.new_ref`).

    Their contents are threaded through the equations as values.
    """
    if core.internal_mutable_array_effect not in jaxpr.effects:
        return jaxpr
    return discharge.discharge_state(jaxpr, should_discharge=False, lower=False)


# --- tracing functions that look at values -------------------------------------------------------
#
# Outside of `jit` a differentiated function may branch on its arguments' values, as under
# `jax.grad`. Such a function cannot be traced with abstract arguments. It is run once more with
# tracers that know their value and note what is applied to them.


def value_of(x):
    """An array of the elements of an array where they are known, as outside of `jit`; else None."""
    return core.to_concrete_value(x)


def has_value(x) -> bool:
    return value_of(x) is not None


class _Watched(core.Tracer):
    """A tracer with a value. Only differentiable values are watched, others are plain."""

    __slots__ = ("variable", "value")

    def __init__(self, trace, variable, value):
        super().__init__(trace, variable.aval)
        self.variable = variable
        self.value = value

    def to_concrete_value(self):
        return core.to_concrete_value(self.value)

    def full_lower(self):
        return self


class _Still(_Watched):
    """One without a derivative, as JAX sees it, where it is a plain array: NumPy may read it.

    It is noted all the same, since other rules may give it one.
    """

    __slots__ = ()

    def __array__(self, *args, **kwargs):
        return np.asarray(self.value).__array__(*args, **kwargs)

    def __float__(self):
        return float(self.value)

    def __complex__(self):
        return complex(self.value)

    def __format__(self, form):
        return format(self.value, form)

    def tolist(self):
        return self.value.tolist()


class _Reference(core.Tracer):
    """A reference that a watched function made, with what it holds: watched, or a plain value."""

    __slots__ = ("content",)

    def __init__(self, trace, aval, content):
        super().__init__(trace, aval)
        self.content = content


class _WatchingTrace(core.Trace):
    """Runs what it is given in the surrounding trace, and notes the equations."""

    def __init__(self, parent):
        super().__init__()
        self.parent = parent
        self.equations: list[Equation] = []
        self.constants: list[tuple[Var, Any]] = []

    def _is_mine(self, x) -> bool:
        return isinstance(x, _Watched) and x._trace is self

    def _values(self, args) -> list:
        return [x.value if self._is_mine(x) else x for x in args]

    def program(self, inputs, outputs) -> tuple[Program, list]:
        """What was noted, as a program of constants and then `inputs`; and the constants."""
        names, constants = [v for v, _ in self.constants], [x for _, x in self.constants]
        return Program((*names, *inputs), (), self.equations, outputs), constants

    def _apply(self, function, args):
        """Trace one application, run its equations, and note them under our variables."""
        values = self._values(args)
        here = source_info_util.current()
        with core.set_current_trace(self.parent):
            if not any(map(self._is_mine, args)):
                return function(*values)
            one = trace_jaxpr(lambda *xs: _as_list(function(*xs)), [type_of(v) for v in values])
            env = dict(zip(one.jaxpr.constvars, getattr(one, "consts", ()), strict=True))
            env.update(zip(one.jaxpr.invars, values, strict=True))
            names = dict(zip(one.jaxpr.invars, map(self._variable, args), strict=True))
            self.constants += zip(one.jaxpr.constvars, getattr(one, "consts", ()), strict=True)
            moves = [self._is_mine(x) and not isinstance(x, _Still) for x in args]
            moving = _moving(one.jaxpr, moves)
            for eqn in one.jaxpr.eqns:
                inputs = [names.get(v, v) if isinstance(v, Var) else v for v in eqn.invars]
                outs = Equation(eqn).bind(*(read(env, v) for v in eqn.invars))
                env.update(zip(eqn.outvars, outs, strict=True))
                self.equations.append(Equation(eqn.replace(invars=inputs, source_info=here)))
        return [
            (_Watched if v in moving else _Still)(self, names.get(v, v), env[v])
            if isinstance(v, Var) and is_inexact(v.aval)
            else read(env, v)
            for v in one.jaxpr.outvars
        ]

    def _variable(self, x) -> Var:
        if self._is_mine(x):
            return x.variable
        variable = core.Var(type_of(x))
        self.constants.append((variable, x))
        return variable

    def process_primitive(self, primitive, args, params, /):
        if primitive is core.ref_p:
            aval, _ = primitive.abstract_eval(type_of(args[0]), **params)
            return _Reference(self, aval, args[0])
        held = [isinstance(x, _Reference) and x._trace is self for x in args]
        if primitive is core.freeze_p and any(held):
            return args[0].content

        def function(*xs):
            return primitive.bind(*xs, **params)

        if any(held):
            outs = self._with_references(function, args, held)
        else:
            outs = self._apply(function, args)
            if not any(map(self._is_mine, args)):
                return outs
        return outs if primitive.multiple_results else outs[0]

    def _with_references(self, function, args, held: Sequence[bool]) -> list:
        """Apply what reads or writes references, some of the arguments, to what they hold."""
        one = _traced(lambda *xs: _as_list(function(*xs)), list(map(type_of, args)))
        pure = program_of(discharge.discharge_state(one, should_discharge=held, lower=False))
        contents = [x.content if h else x for x, h in zip(args, held, strict=True)]
        outs = self._apply(lambda *xs: evaluate(pure, xs), contents)
        references = [x for x, h in zip(args, held, strict=True) if h]
        n = len(outs) - len(references)
        for reference, content in zip(references, outs[n:], strict=True):
            reference.content = content
        return outs[:n]

    def stage_value(self, value):
        with core.set_current_trace(self.parent):
            return self.parent.stage_value(value)

    # Custom rules run at once: they may look at values, too.

    def process_custom_jvp_call(self, primitive, fun, jvp, args, /, **params):
        if any(map(self._is_mine, args)):
            name = fun.debug_info.func_name
            return self._record_jvp(jvp, args, name, params["symbolic_zeros"])
        return self._apply(lambda *xs: primitive.bind(*xs, subfuns=(fun, jvp), **params), args)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, **params):
        if any(map(self._is_mine, args)):
            name = fun.debug_info.func_name
            return self._record_vjp(fwd, bwd, args, name, **params)
        subfuns = (fun, fwd, bwd)
        return self._apply(lambda *xs: primitive.bind(*xs, subfuns=subfuns, **params), args)

    def process_shard_map(self, primitive, fun, args, /, **params):
        trees = []

        def run(*xs):
            trees.append(primitive.bind(*xs, subfuns=(fun,), **params))
            return list(trees[-1])

        outs = self._apply(run, args)
        return trees[-1].update(outs)

    def _record_jvp(self, jvp, args, name, symbolic_zeros):
        """Run a user's forward-mode rule on values; note the equations of its tangents."""
        values = self._values(args)
        inner = _WatchingTrace(self.parent)
        variables = [core.Var(tangent_aval(type_of(x))) for x in args if self._is_mine(x)]
        remaining = iter(variables)
        with core.set_current_trace(self.parent):
            tangents = [
                _Watched(inner, v := next(remaining), zeros(v.aval))
                if self._is_mine(x)
                else _no_tangent(type_of(x), symbolic_zeros)
                for x in args
            ]
        with core.set_current_trace(inner):
            results = jvp.call_wrapped(*values, *tangents)
        outs, tangents_out = results[: len(results) // 2], results[len(results) // 2 :]
        with core.set_current_trace(self.parent):
            outputs = [
                inner._variable(zeros(out) if isinstance(t, _ZEROS) else t)
                for out, t in zip(map(type_of, outs), tangents_out, strict=True)
                if is_inexact(out)
            ]
        program, constants = inner.program(variables, outputs)
        return self._record(RECORDED_JVP, args, outs, constants, name=name, tangents=program)

    def _record_vjp(self, fwd, bwd, args, name, out_trees, symbolic_zeros):
        """Run a user's forward half on values; its residuals wait for the backward half."""
        values = self._values(args)
        perturbed = tuple(map(self._is_mine, args))
        forward, backward = _vjp_halves(fwd, bwd, out_trees, symbolic_zeros, perturbed)
        with core.set_current_trace(self.parent):
            outs, residuals = forward(*values)
        return self._record(RECORDED_VJP, args, outs, residuals, name=name, backward=backward)

    def _record(self, primitive, args, outs, residuals, **params):
        mine = [x for x in args if self._is_mine(x)]
        inputs = [self._variable(x) for x in (*mine, *outs, *residuals)]
        outputs = [core.Var(type_of(x)) for x in outs]
        params |= {"n_args": len(mine), "n_outs": len(outs)}
        params["places"] = tuple(i for i, x in enumerate(args) if self._is_mine(x))
        eqn = core.new_jaxpr_eqn(
            inputs, outputs, primitive, params, core.no_effects, source_info_util.current()
        )
        self.equations.append(Recorded(eqn))
        return [
            _Watched(self, v, x) if is_inexact(v.aval) else x
            for v, x in zip(outputs, outs, strict=True)
        ]


_ZEROS = (SymbolicZero, ad_util.Zero)


def _no_tangent(aval, symbolic: bool):
    """What a user's forward-mode rule gets for an argument that does not move."""
    if symbolic:
        return SymbolicZero(tangent_aval(aval))
    return zeros(aval) if is_inexact(aval) else float0_zeros(aval.shape)


# A user's custom rule that ran on values. Operands: its differentiated arguments, its results,
# its residuals.
RECORDED_JVP, RECORDED_VJP = Primitive("recorded_jvp"), Primitive("recorded_vjp")
for _primitive in (RECORDED_JVP, RECORDED_VJP):
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(
        lambda *avals, n_args, n_outs, **_: list(avals[n_args : n_args + n_outs])
    )


class Recorded(Equation):
    """What a custom rule did, noted while it ran: the results stand, and are not computed again."""

    __slots__ = ()

    @property
    def arity(self) -> int:
        return self.params["n_args"]

    def bind(self, *values, **_) -> list:
        n = self.params["n_args"]
        return list(values[n : n + self.params["n_outs"]])

    def stage(self, *values) -> list:
        return super().bind(*values)


def _moving(jaxpr, inputs: Sequence[bool]) -> set[Var]:
    """The variables that have derivatives in these inputs, as JAX sees it."""
    moving = {v for v, moves in zip(jaxpr.invars, inputs, strict=True) if moves}
    for eqn in jaxpr.eqns:
        operands = [isinstance(v, Var) and v in moving for v in eqn.invars]
        if not any(operands) or _has_no_derivative(eqn.primitive):
            continue
        if eqn.primitive.name == "jit":
            body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
            within, outs = _moving(body, operands), zip(eqn.outvars, body.outvars, strict=True)
            moving.update(v for v, out in outs if isinstance(out, Var) and out in within)
        else:
            moving.update(eqn.outvars)
    return moving


def _has_no_derivative(primitive) -> bool:
    """Whether all its results are constants to JAX: those of `stop_gradient`, or of `floor`."""
    rule = ad.primitive_jvps.get(primitive)
    return primitive is ad_util.stop_gradient_p or getattr(rule, "func", None) is ad.zero_jvp


def _as_list(out) -> list:
    return list(out) if isinstance(out, list | tuple) else [out]


def _watch(flat: Callable, leaves: Sequence) -> tuple[Program, list]:
    """Run `flat` on values and return it as a program of constants and leaves."""
    with core.take_current_trace() as parent:
        trace = _WatchingTrace(parent)
        variables = [core.Var(type_of(x)) for x in leaves]
        watched = [
            _Watched(trace, v, x) if is_inexact(v.aval) else x
            for v, x in zip(variables, leaves, strict=True)
        ]
        with core.set_current_trace(trace):
            outs = flat(*watched)
        outputs = [trace._variable(x) for x in outs]
    return trace.program(variables, outputs)


# A user's line is none of these, through which a function of the user's, or of JAX's, is called.
for _file in ("program.py", "reverse.py", "model.py", "objective.py", "check.py"):
    source_info_util.register_exclusion(os.path.join(os.path.dirname(__file__), _file))


def prune(jaxpr, keep: Sequence[bool]):
    """The closed jaxpr computing only the outputs marked in `keep`; its inputs stay as they are.

    Dead code is removed inside calls and loops too. Returns the jaxpr and which inputs it reads.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    consts = tuple(getattr(jaxpr, "consts", ()))
    n = len(inner.constvars)
    opened = partial_eval.convert_constvars_jaxpr(inner) if n else inner
    pruned, _ = partial_eval.dce_jaxpr(opened, list(keep), [True] * len(opened.invars))
    used = _read_variables(pruned)
    if n and not hasattr(pruned, "with_consts"):  # JAX < 0.12
        pruned = partial_eval.convert_invars_to_constvars(pruned, n)
    return close(pruned, consts), used[n:]


def _read_variables(jaxpr) -> list[bool]:
    """Which inputs any equation or output reads."""
    seen = {v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var)}
    seen.update(v for v in jaxpr.outvars if isinstance(v, Var))
    return [v in seen for v in jaxpr.invars]


def with_outputs(jaxpr, outputs: Sequence):
    """The same jaxpr returning other variables of it."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return close(inner.replace(outvars=list(outputs)), tuple(getattr(jaxpr, "consts", ())))


# --- taps -----------------------------------------------------------------------------------------

# ``tap(x, nudge)`` is x. In a sweep the cotangent of the nudge is that of x: a place to read it.
TAP = Primitive("tap")
TAP.def_impl(lambda x, nudge: x)
TAP.def_abstract_eval(lambda x, nudge: x)
mlir.register_lowering(TAP, lambda ctx, x, nudge: [x])
batching.primitive_batchers[TAP] = lambda args, axes: (args[0], axes[0])
ad.primitive_jvps[TAP] = lambda primals, tangents: (primals[0], tangents[0])


# --- equations with a rule of their own ----------------------------------------------------------

CHANGED = Primitive("changed")
CHANGED.multiple_results = True


class Changed(Equation):
    """An equation that runs like another, and has a backward rule of its own.

    It looks like the `original`: the same primitive and parameters. Its operands are those of the
    original and then the arrays that its rule holds.
    """

    __slots__ = ("original", "rule")

    def __init__(self, eqn):
        super().__init__(eqn)
        self.original, self.rule = eqn.params["original"], eqn.params["rule"]
        self.primitive, self.params = self.original.primitive, self.original.params

    def unchanged(self) -> Equation:
        return self.original

    @property
    def arity(self) -> int:
        return self.original.arity

    def bind(self, *values, **_) -> list:
        with self.context():
            return CHANGED.bind(*values, original=self.original, rule=self.rule)


def bind_changed(original: Equation, rule, values: Sequence, arrays: Sequence) -> list:
    """Stage an equation whose backward rule is `rule`, which holds `arrays`."""
    with original.context():
        return CHANGED.bind(*values, *arrays, original=original, rule=rule)


def _run_original(*values, original, rule) -> list:
    return original.bind(*values[: len(original.inputs)])


# A call of a Python function, put together again from its equations.
CALLED = Primitive("python_call")
CALLED.multiple_results = True


def _run_called(*values, call_jaxpr, name) -> list:
    return evaluate(program_of(call_jaxpr), values)


def _as_it_runs(primitive: Primitive, run: Callable) -> None:
    """Compile, map and differentiate a primitive forward like the equations that it runs."""

    def batched(values, axes, **params):
        outs = jax.vmap(functools.partial(run, **params), in_axes=axes)(*values)
        return outs, (0,) * len(outs)

    def jvp(primals, tangents, **params):
        pairs = zip(primals, tangents, strict=True)
        tangents = [
            _no_tangent(type_of(x), False) if isinstance(t, _ZEROS) else t for x, t in pairs
        ]
        return jax.jvp(functools.partial(run, **params), tuple(primals), tuple(tangents))

    primitive.def_impl(run)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = jvp


_as_it_runs(CHANGED, _run_original)
_as_it_runs(CALLED, _run_called)
CHANGED.def_effectful_abstract_eval(
    lambda *_, original, rule: (list(original.out_avals), original.effects)
)
CALLED.def_effectful_abstract_eval(
    lambda *_, call_jaxpr, name: (list(call_jaxpr.out_avals), call_jaxpr.effects)
)


def regrouped(program: Program, names: Collection[str]) -> Program:
    """The same program with each call of a Python function of these names as one equation.

    JAX traces through plain functions: their name is left in the traceback of each equation that
    they made. Equations in a row that came from the same call (the same function, called from the
    same place) are put into one. Its operands are what they read, in the order in which they do.
    """
    groups: list[tuple[Any, list[Equation]]] = []
    for eqn in program.equations:
        call = _python_call(eqn, names)
        if groups and call is not None and groups[-1][0] == call:
            groups[-1][1].append(eqn)
        else:
            groups.append((call, [eqn]))
    if all(call is None for call, _ in groups):
        return program
    needed: list[set[Var]] = []  # after each group
    later = {v for v in program.outputs if isinstance(v, Var)}
    for _, equations in reversed(groups):
        needed.append(set(later))
        later |= {v for eqn in equations for v in eqn.inputs if isinstance(v, Var)}

    def run(*values):
        env = dict(program.constants)
        env.update(zip(program.inputs, values, strict=True))
        for (call, equations), wanted in zip(groups, reversed(needed), strict=True):
            if call is None:
                (eqn,) = equations
                outs = eqn.stage(*(read(env, v) for v in eqn.inputs))
                env.update(zip(eqn.outputs, outs, strict=True))
                continue
            made = [v for eqn in equations for v in eqn.outputs]
            reads = [v for eqn in equations for v in eqn.inputs if isinstance(v, Var)]
            inputs = list(dict.fromkeys(v for v in reads if v not in set(made)))
            outputs = [v for v in made if v in wanted]
            body = Program(inputs, (), equations, outputs)
            name = call[0]
            jaxpr = trace_jaxpr(lambda *xs, b=body: evaluate(b, xs), body.in_avals, name)
            with equations[0].context():
                outs = CALLED.bind(*(env[v] for v in inputs), call_jaxpr=jaxpr, name=name)
            env.update(zip(outputs, outs, strict=True))
        return [read(env, v) for v in program.outputs]

    return trace(run, program.in_avals)


def _python_call(eqn: Equation, names: Collection[str]):
    """Which call of a function of these names made an equation: the name and the way there."""
    traceback = eqn.jaxpr_equation.source_info.traceback
    if traceback is None:
        return None
    codes, positions = traceback.raw_frames()
    own = [i for i, code in enumerate(codes) if code.co_filename == __file__]
    stop = own[0] if own else len(codes)  # the callers of this library are not of the function
    for i in reversed(range(stop)):
        if codes[i].co_name in names:
            return codes[i].co_name, codes[i], tuple(codes[i + 1 :]), tuple(positions[i + 1 :])
    return None


_KINDS = {CHANGED: Changed, RECORDED_JVP: Recorded, RECORDED_VJP: Recorded}


# --- abstract values ------------------------------------------------------------------------------


def is_inexact(aval) -> bool:
    """Whether values of this type have derivatives (floating point or complex)."""
    return isinstance(aval, core.ShapedArray) and dtypes.issubdtype(aval.dtype, np.inexact)


def is_reference(x) -> bool:
    """Whether this is a `jax.ref.Ref`, which no program returns."""
    return isinstance(type_of(x), AbstractRef)


def is_real_number(x) -> bool:
    """Whether this is a scalar, an integer or a real number, traced or not."""
    try:
        aval = type_of(x)
    except TypeError:
        return False
    kinds = (np.integer, np.floating)
    return aval.shape == () and any(dtypes.issubdtype(aval.dtype, kind) for kind in kinds)


def tangent_aval(aval):
    return aval.to_tangent_aval()


def cotangent_aval(aval):
    """The abstract value that a cotangent of a value of type `aval` has."""
    make = getattr(aval, "to_ct_aval", None) or getattr(aval, "to_cotangent_aval", None)
    return make() if make else aval.to_tangent_aval()


def zeros(aval) -> jax.Array:
    """An array of zeros of this type, sharding and device-variance included."""
    return ad_util.zeros_like_aval(cotangent_aval(aval))


def barrier(values: Sequence[jax.Array]) -> list:
    """`lax.optimization_barrier` for those that vary over the same axes of a mesh, set by set.

    One for all makes them vary over all of these axes (before JAX 0.12).
    """
    sets: dict = {}
    for i, x in enumerate(values):
        sets.setdefault(type_of(x).mat.varying, []).append(i)
    found = list(values)
    for places in sets.values():
        behind = jax.lax.optimization_barrier([values[i] for i in places])
        for i, x in zip(places, behind, strict=True):
            found[i] = x
    return found


def blank(aval) -> jax.Array:
    """A value of this very type, to stand where nobody will read it."""
    if dtypes.issubdtype(aval.dtype, dtypes.extended):  # keys of random numbers
        return jax.lax.full(aval.shape, 0, aval.dtype)
    return ad_util.zeros_like_aval(aval)


def sharding_of(aval, axes: Sequence[int | None] | None = None):
    """How a cotangent of this type lies on an explicit mesh, for axes in the order given.

    None among them is one more, on every device. None without a mesh: then sharding is the
    compiler's affair.
    """
    sharding = cotangent_aval(aval).sharding
    mesh, spec = sharding.mesh, sharding.spec
    if mesh.empty:  # also of what is no array of JAX's, in a program on a mesh: a copy on each
        mesh, spec = jax.sharding.get_abstract_mesh(), (None,) * aval.ndim
        if jax.sharding.AxisType.Explicit not in mesh.axis_types:
            return None
    order, parts = range(aval.ndim) if axes is None else axes, _partitions(spec)
    kinds = {kind: getattr(spec, kind, None) for kind in ("unreduced", "reduced")}
    spec = jax.sharding.PartitionSpec(
        *(None if i is None else parts[i] for i in order),
        **{kind: names for kind, names in kinds.items() if names},
    )
    return jax.sharding.NamedSharding(mesh, spec)


def explicit_axes(x) -> list[str]:
    """The axes of an explicit mesh over which an array is spread."""
    sharding = getattr(type_of(x), "sharding", None)
    if sharding is None or jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return []
    parts = [part for part in _partitions(sharding.spec) if part is not None]
    names = [name for part in parts for name in (part if isinstance(part, tuple) else (part,))]
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    return [name for name in names if kinds[name] is jax.sharding.AxisType.Explicit]


def _partitions(spec) -> tuple:
    """For each axis the mesh's that it is spread over: a spec with sums to make is no tuple."""
    return getattr(spec, "partitions", spec)


def laid_as(ct, aval):
    """A cotangent; on an explicit mesh it is moved to where arrays of this type lie."""
    sharding = aval.sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    if not explicit or type_of(ct).sharding.spec == sharding.spec:
        return ct
    return jax.sharding.reshard(ct, sharding_of(aval))


def scalar(value, aval):
    """A number as an array of this type, weak if it is, that traces as a literal."""
    return literals.TypedNdArray(np.asarray(value, aval.dtype), aval)


def float0_zeros(shape) -> np.ndarray:
    """The cotangent of an integer or boolean array."""
    return np.zeros(shape, dtype=float0)


def as_array(x) -> jax.Array:
    """A number or NumPy array as a JAX array of the same type; weakly typed if it was.

    Raises:
      TypeError: for what is not an array.
    """
    type_of(x)  # a plain error for strings and other objects
    return x if isinstance(x, jax.Array) else jax.numpy.asarray(x)


def known_length(n) -> int:
    """A length; of a symbolic one, as `jax.export` has them, a thousand: to compare costs."""
    return n if isinstance(n, int) else 1000


# --- parameters of control-flow and custom-rule equations ---------------------------------------


@memoized
def bodies(eqn: Equation) -> tuple[Program, ...]:
    """The programs that an equation holds: of calls, loops, branches."""
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
    return tuple(program_of(leaf) for leaf in leaves if _is_jaxpr(leaf))


@memoized
def holds(program: Program, name: str) -> bool:
    """Whether an equation of this name is in a program, or in one that its equations hold."""
    return any(
        eqn.primitive.name == name or any(holds(body, name) for body in bodies(eqn))
        for eqn in program.equations
    )


def _is_jaxpr(x) -> bool:  # before JAX 0.12 there are open and closed ones
    return isinstance(x, (core.Jaxpr, getattr(core, "ClosedJaxpr", core.Jaxpr)))


def scan_counts(params: dict) -> tuple[int, int]:
    """How many of a scan's operands are loop constants and how many are carry."""
    if "ft_in" in params:  # JAX >= 0.12
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


def while_counts(params: dict) -> tuple[int, int]:
    """How many of a while loop's operands are constants of its condition and of its body."""
    return params["cond_nconsts"], params["body_nconsts"]


def call(eqn: Equation, jaxpr, name: str, values: Sequence, extends: bool = False) -> list:
    """Call `jaxpr` on `values` as one jit-ted call, like the jit equation `eqn` does its own.

    If it `extends` that, with the same operands and with further results, then what both have lies
    on the devices as the user said.
    """
    n_in, n_out = len(jaxpr.in_avals), len(jaxpr.out_avals)

    def of(operands: str, default, count: int) -> tuple:
        known = tuple(eqn.params[operands]) if extends else ()
        return known + (default,) * (count - len(known))

    params = dict(
        eqn.params,
        jaxpr=jaxpr,
        name=name,
        in_shardings=of("in_shardings", UNSPECIFIED, n_in),
        out_shardings=of("out_shardings", UNSPECIFIED, n_out),
        in_layouts=of("in_layouts", None, n_in),
        out_layouts=of("out_layouts", None, n_out),
        donated_invars=(False,) * n_in,
    )
    with eqn.context():
        return list(eqn.primitive.bind(*values, **params))


def custom_vjp_halves(eqn: Equation, perturbed: Sequence[bool]):
    """A user's `custom_vjp`: its forward and backward functions on flat arrays.

    Returns ``(fwd, bwd)``: ``fwd(*primals) -> (outputs, residuals)`` and
    ``bwd(residuals, cotangents, avals) -> cotangents of the primals`` with None for zero; a
    cotangent, of an output of the type in `avals`, may be given as None.
    """
    _, fwd, bwd = eqn.primitive.get_bind_params(eqn.params)["subfuns"]
    trees, symbolic_zeros = eqn.params["out_trees"], eqn.params["symbolic_zeros"]
    return _vjp_halves(fwd, bwd, trees, symbolic_zeros, perturbed)


def _vjp_halves(fwd, bwd, out_trees, symbolic_zeros, perturbed):
    def forward(*primals):
        flat = [leaf for pair in zip(primals, perturbed, strict=True) for leaf in pair]
        residuals_and_outputs = fwd.call_wrapped(*flat)
        _, residual_tree, forwarded = out_trees()
        n = residual_tree.num_leaves - sum(f is not None for f in forwarded)
        fresh = iter(residuals_and_outputs[:n])
        residuals = [next(fresh) if f is None else primals[f] for f in forwarded]
        return list(residuals_and_outputs[n:]), residuals

    def backward(residuals, cotangents, avals):
        def zero(aval):
            return SymbolicZero(cotangent_aval(aval)) if symbolic_zeros else zeros(aval)

        cotangents = [
            zero(aval) if ct is None else ct for ct, aval in zip(cotangents, avals, strict=True)
        ]
        result = bwd.call_wrapped(*residuals, *cotangents)
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], list):
            result, _ = result  # JAX >= 0.12 returns logs beside the cotangents
        return [None if isinstance(ct, _ZEROS) else ct for ct in result]

    return forward, backward


def class_vjp_forward(eqn: Equation, active: Sequence[bool], values: Sequence):
    """Forward half of a primitive that is a user's class (a "hijax" primitive) with a VJP rule.

    Returns the results and the residuals, a pytree whose leaves need not all be arrays.
    """
    primitive = eqn.params["_prim"]
    args = jax.tree.unflatten(primitive.in_tree, values)
    moving = jax.tree.unflatten(primitive.in_tree, list(active))
    out, residuals, *rest = primitive.vjp_fwd(moving, *args)
    structured = (rest[1],) if len(rest) > 1 and rest[1] is not None else ()
    return jax.tree.leaves(out), (residuals, *structured)


def class_vjp_backward(eqn: Equation, residuals: tuple, cts: Sequence) -> list:
    """Its backward half: cotangents of the operands, None for zero."""
    primitive = eqn.params["_prim"]
    cts = [
        ad_util.Zero(cotangent_aval(aval)) if ct is None else ct
        for ct, aval in zip(cts, eqn.out_avals, strict=True)
    ]
    out_ct = jax.tree.unflatten(primitive.out_tree, cts)
    sums = [ad.ValAccum(cotangent_aval(aval)) for aval in eqn.in_avals]
    primitive.vjp_bwd(*residuals, out_ct, *jax.tree.unflatten(primitive.in_tree, sums))
    found = [total.freeze() for total in sums]
    return [None if isinstance(ct, _ZEROS) else ct for ct in found]


def has_transpose(primitive: Primitive) -> bool:
    """Whether the author of a linear primitive gave it a transpose."""
    return primitive in ad.primitive_transposes


def transpose(eqn: Equation, active: Sequence[bool], values: Sequence, cts: Sequence) -> list:
    """Transpose a linear primitive in its active operands, by its author's rule."""
    operands = [
        ad.UndefinedPrimal(tangent_aval(aval)) if a else v
        for v, a, aval in zip(values, active, eqn.in_avals, strict=True)
    ]
    cts = [
        ad_util.Zero(cotangent_aval(aval)) if ct is None else ct
        for ct, aval in zip(cts, eqn.out_avals, strict=True)
    ]
    rule = ad.primitive_transposes[eqn.primitive]
    found = rule(cts if eqn.primitive.multiple_results else cts[0], *operands, **eqn.params)
    return [None if ct is None or isinstance(ct, ad_util.Zero) else ct for ct in found]


# --- primitives ----------------------------------------------------------------------------------


def find_primitive(name: str) -> Primitive | None:
    """The JAX primitive called `name`, or None where this JAX does not have it."""
    return _primitives_by_name().get(name)


def primitive(name: str) -> Primitive:
    """The JAX primitive called `name`, for rules that apply it."""
    return _primitives_by_name()[name]


@functools.cache
def _primitives_by_name() -> dict[str, Primitive]:
    """All primitives of this JAX; where two share a name, the one that it exposes to users."""
    modules = ["jax.extend.core.primitives", *(f"jax._src.{name}" for name in _MODULES)]
    found: dict[str, Primitive] = {}
    for module in map(_imported, modules):
        for value in vars(module).values() if module else ():
            if isinstance(value, Primitive):
                found.setdefault(value.name, value)
    return found


def _imported(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:  # other releases of JAX have other modules
        return None


_MODULES = """
    core ad_util lax.lax lax.slicing lax.special lax.linalg lax.windowed_reductions lax.control_flow
    lax.control_flow.loops lax.parallel lax.ann lax.eval_jaxpr ad_checkpoint pjit shard_map
    custom_derivatives custom_batching custom_partitioning callback debugging checkify compute_on
    xla_metadata hijax ffi random.prng prng state.primitives state.discharge
""".split()


def all_primitives() -> list[Primitive]:
    """The primitives of this JAX, and those that others gave a forward-mode rule."""
    named = _primitives_by_name()
    own = (p for p in ad.primitive_jvps if p.name not in named)
    return [*named.values(), *(p for p in own if p is not CHANGED)]  # that one has another's rule


def has_forward_rule(primitive: Primitive) -> bool:
    """Whether the author of a primitive gave it a derivative."""
    return primitive in ad.primitive_jvps or primitive in ad.primitive_linearizations
