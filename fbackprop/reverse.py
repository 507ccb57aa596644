"""`vjp`, `grad` and `value_and_grad`: the backward sweep behind JAX's own signatures."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path

from fbackprop import rules as _  # noqa: F401  (fills the table)
from fbackprop.passes import backward, forward, reversible
from fbackprop.program import (
    Program,
    as_array,
    cotangent_aval,
    float0_zeros,
    has_value,
    is_inexact,
    trace_function,
    type_of,
    zeros,
)
from fbackprop.rewrite import Overrides
from fbackprop.table import Rules

DEFAULT, STRICT = Rules(), Rules(strict=True)


def vjp(
    fun: Callable,
    *primals,
    has_aux: bool = False,
    strict: bool = False,
    rules: Mapping | None = None,
):
    """Value of `fun` at `primals` and its pullback there.

    With ``y = fun(*primals)`` and Jacobian ``J``, the pullback maps a cotangent ``v`` of ``y`` to
    ``Jᵀ v``, one cotangent per primal: reverse-mode automatic differentiation by a hand-written
    sweep (Griewank and Walther 2008, section 3.2). It computes nothing of the forward pass again.

    Args:
      fun: function of arrays, or of pytrees of arrays, to a pytree of arrays.
      *primals: where to evaluate; arrays, scalars or pytrees of them.
      has_aux: whether `fun` returns a pair, of which only the first is differentiated.
      strict: refuse primitives without a hand-written rule instead of deriving one.
      rules: other backward rules for this sweep, a mapping from what they are for: the name of a
        primitive or of a called function, or a predicate on the equation; see the guide "Write
        your own backward rule".

    Returns:
      ``(value, pullback)``, or ``(value, pullback, aux)`` with `has_aux`. ``pullback(v)`` takes a
      pytree like `value`, of the same shapes and dtypes, and returns a tuple with one pytree per
      primal; the cotangents of integer inputs have dtype float0. It is itself a pytree: it passes
      through `jit`.

    Raises:
      TypeError: if `fun` does not take or return arrays, or, with `has_aux`, no pair.
      ValueError: if a name in `rules` matches nothing.
      MissingRule: with `strict`, for a primitive without a rule.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> value, pullback = fb.vjp(jnp.multiply, 3.0, 4.0)
      >>> [float(ct) for ct in pullback(1.0)]
      [4.0, 3.0]
    """
    if not callable(fun):
        raise TypeError(f"vjp differentiates functions, but its first argument is {fun!r}")
    leaves, structure = jax.tree.flatten(primals)
    leaves = [as_array(x) for x in leaves]
    table = STRICT if strict else DEFAULT
    traced, (active, outs, tape) = trace_and_run(
        _run, table, fun, leaves, structure, has_aux, rules
    )
    value, aux = traced.unflatten(outs)
    sweep = _Sweep(table, traced.program, active, traced.out_structure, structure)
    pullback = jax.tree_util.Partial(sweep, tape)
    return (value, pullback, aux) if has_aux else (value, pullback)


def trace_and_run(
    run: Callable,
    rules: Rules,
    fun: Callable,
    leaves,
    structure,
    has_aux: bool = False,
    overrides: Mapping | None = None,
):
    """Trace a function, and ``run(rules, traced, leaves)`` what was traced; returns both results.

    What has no derivative for abstract arguments may have one for their values: a loop whose
    length they determine, a custom rule that looks at them.
    """
    changes = None if overrides is None else Overrides(overrides)

    def trace(on_values=False):
        traced = trace_function(fun, leaves, structure, has_aux, on_values)
        if changes is None:
            return traced
        args = jax.tree.unflatten(structure, leaves)
        first = args[0] if args else ()
        program, arrays = changes.applied(traced.program, len(traced.constants), first)
        return traced._replace(program=program, constants=[*arrays, *traced.constants])

    traced = trace()
    final = traced.on_values or not any(map(has_value, leaves))
    if final or reversible(rules, traced.program, active_inputs(traced, leaves)):
        try:
            return traced, run(rules, traced, leaves)
        except Exception:
            if final:
                raise
    traced = trace(on_values=True)
    return traced, run(rules, traced, leaves)


def active_inputs(traced, leaves) -> tuple[bool, ...]:
    """Which inputs of a traced function's program are differentiated: arguments that can be."""
    constants = (False,) * len(traced.constants)
    return (*constants, *(is_inexact(type_of(x)) for x in leaves))


def _run(rules, traced, leaves):
    active = active_inputs(traced, leaves)
    return active, *forward(rules, traced.program, active, [*traced.constants, *leaves])


class _Sweep(NamedTuple):
    """The static part of a pullback; with a tape it is one."""

    rules: Rules
    program: Program
    active: tuple[bool, ...]
    out_structure: Any
    in_structure: Any

    def __call__(self, tape, *cotangents):
        if len(cotangents) != 1:
            raise TypeError(
                "a pullback must be called with a single argument, a cotangent like the function's "
                f"output, but got {len(cotangents)}: pass several as the tuple that the output is"
            )
        (cotangent,) = cotangents
        n_out, n_in = self.out_structure.num_leaves, self.in_structure.num_leaves
        cts = flat_cotangent(cotangent, self.out_structure, self.program.out_avals[:n_out])
        cts += [None] * (len(self.program.outputs) - n_out)  # auxiliary outputs
        found = backward(self.rules, self.program, self.active, tape, cts)[-n_in:] if n_in else []
        avals = self.program.in_avals[-n_in:] if n_in else ()
        return jax.tree.unflatten(
            self.in_structure,
            [instantiate(ct, aval) for ct, aval in zip(found, avals, strict=True)],
        )


def flat_cotangent(
    cotangent, structure, avals: Sequence, what: str = "argument to vjp function"
) -> list:
    """The leaves of a cotangent of outputs of these types, None where it is of an integer output.

    Raises:
      ValueError: if `what` was passed has another structure, shape or dtype.
    """
    leaves, found = jax.tree.flatten(cotangent)
    if found != structure:
        raise ValueError(
            f"unexpected tree structure of {what}: got {found}, but expected to match "
            f"{structure}, that of the function's output"
        )
    expected = [cotangent_aval(v) for v in avals]
    for leaf, aval in zip(leaves, expected, strict=True):
        if not is_inexact(aval):
            continue  # nothing flows back from an integer output, whatever is passed
        got = type_of(leaf)
        if (got.shape, got.dtype) != (aval.shape, aval.dtype):
            raise ValueError(
                f"unexpected JAX type (e.g. shape/dtype) for {what}: got {got.str_short()}, but "
                f"expected {aval.str_short()} because the corresponding output of the function "
                "has that shape and tangent dtype"
            )
    pairs = zip(leaves, expected, strict=True)
    return [as_array(leaf) if is_inexact(aval) else None for leaf, aval in pairs]


def instantiate(ct, aval):
    """A cotangent of a value of this type, where None stands for zero."""
    if not is_inexact(aval):
        return float0_zeros(aval.shape)
    return zeros(aval) if ct is None else ct


def grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    strict: bool = False,
    rules: Mapping | None = None,
) -> Callable:
    """The gradient of a scalar-valued function, as a function of the same arguments.

    ``grad(fun)(x)`` is ``∂fun/∂x``, of the shape and dtype of `x`, by one backward sweep.

    Args:
      fun: function to a real scalar; its other arguments may be anything, keywords included.
      argnums: the positional argument or arguments to differentiate, each a pytree of arrays.
      has_aux: whether `fun` returns ``(value, aux)``; the gradient then comes as ``(grad, aux)``.
      holomorphic: whether `fun` is complex-differentiable; inputs and output must be complex.
      allow_int: whether integer inputs are allowed; their gradients have dtype float0.
      strict: refuse primitives without a hand-written rule instead of deriving one.
      rules: other backward rules for this sweep, as of `vjp`.

    Returns:
      A function returning the gradient, or a tuple of gradients if `argnums` is a sequence.

    Raises:
      TypeError: if the output is not a real scalar, an input is not floating point, or `argnums`
        names no argument.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> fb.grad(lambda x: jnp.sum(x**2))(jnp.array([1.0, 2.0]))
      Array([2., 4.], dtype=float32)
    """
    both = value_and_grad(fun, argnums, has_aux, holomorphic, allow_int, strict=strict, rules=rules)

    @functools.wraps(fun, assigned=_NAMES, updated=())
    def gradient(*args, **kwargs):
        value, g = both(*args, **kwargs)
        return (g, value[1]) if has_aux else g

    return gradient


def value_and_grad(
    fun: Callable,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    *,
    strict: bool = False,
    rules: Mapping | None = None,
) -> Callable:
    """Like `grad`, returning ``(value, gradient)``, or ``((value, aux), gradient)``.

    Arguments and errors are those of `grad`; value and gradient share one forward pass.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> value, gradient = fb.value_and_grad(jnp.sin)(0.0)
      >>> float(value), float(gradient)
      (0.0, 1.0)
    """
    if not callable(fun):
        raise TypeError(f"grad differentiates functions, but its first argument is {fun!r}")
    several = not hasattr(argnums, "__index__") or np.ndim(argnums) > 0
    wanted: Any = argnums if several else (argnums,)
    try:
        chosen = [operator.index(i) for i in wanted]
    except TypeError:
        raise TypeError(f"argnums must be an int or a sequence of ints, got {argnums!r}") from None

    @functools.wraps(fun, assigned=_NAMES, updated=())
    def both(*args, **kwargs):
        if min(chosen, default=0) < -len(args):
            raise ValueError(
                f"argnums={argnums} counts from the last of {len(args)} positional arguments: it "
                f"must be at least {-len(args)}"
            )
        needed = max(chosen, default=0) + 1
        if needed > len(args):
            raise TypeError(
                f"differentiating with respect to argnums={argnums} requires at least {needed} "
                "positional arguments to be passed by the caller, but got only "
                f"{len(args)} positional arguments."
            )
        positions = [i % len(args) for i in chosen]
        if len(set(positions)) < len(positions):
            raise TypeError(f"argnums={argnums} names an argument twice: name each one once")

        def of_chosen(*values):
            full = list(args)
            for i, value in zip(positions, values, strict=True):
                full[i] = value
            return fun(*full, **kwargs)

        primals = tuple(args[i] for i in positions)
        for path, leaf in tree_flatten_with_path(primals)[0]:
            _check_input(leaf, f"{keystr(path)}", holomorphic, allow_int)
        of_chosen = functools.wraps(fun, assigned=_NAMES, updated=())(of_chosen)
        value, pullback, *aux = vjp(
            of_chosen, *primals, has_aux=has_aux, strict=strict, rules=rules
        )
        _check_output(value, holomorphic)
        gradients = pullback(lax.full_like(as_array(value), 1))
        return ((value, *aux) if has_aux else value), (gradients if several else gradients[0])

    return both


_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")


def _check_input(leaf, path: str, holomorphic: bool, allow_int: bool):
    aval = type_of(leaf)  # raises TypeError for what is no JAX type
    dtype = aval.dtype
    if holomorphic and not jax.dtypes.issubdtype(dtype, np.complexfloating):
        raise TypeError(
            "grad with holomorphic=True requires inputs with complex dtype, but got "
            f"{dtype.name} at argument {path}"
        )
    if not is_inexact(aval) and not allow_int:
        raise TypeError(
            "grad requires real- or complex-valued inputs (input dtype that is a sub-dtype of "
            f"np.inexact), but got {dtype.name} at argument {path}. Convert it to floating "
            "point, leave it out of argnums, or set allow_int=True."
        )


def _check_output(value, holomorphic: bool):
    message = "Gradient only defined for scalar-output functions. Output "
    try:
        aval = type_of(value)
    except TypeError as error:
        raise TypeError(f"{message}was {value}.") from error
    if aval.shape != ():
        raise TypeError(
            f"{message}had shape: {aval.shape}. Reduce it to a scalar, for example with "
            "jnp.sum or jnp.mean, or use fb.vjp for a function of many outputs."
        )
    dtype = aval.dtype
    if holomorphic:
        if not jax.dtypes.issubdtype(dtype, np.complexfloating):
            raise TypeError(
                "grad with holomorphic=True requires outputs with complex dtype, but got "
                f"{dtype.name}."
            )
    elif not jax.dtypes.issubdtype(dtype, np.floating):
        hint = (
            "For holomorphic differentiation, pass holomorphic=True; otherwise take a real part."
            if jax.dtypes.issubdtype(dtype, np.complexfloating)
            else "Convert the loss to floating point."
        )
        raise TypeError(
            "grad requires real-valued outputs (output dtype that is a sub-dtype of np.floating), "
            f"but got {dtype.name}. {hint}"
        )
