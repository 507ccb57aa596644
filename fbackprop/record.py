"""The record of a backward pass: every equation with its values and the cotangents that met it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fbackprop.listing import listing
from fbackprop.nonfinite import NonFinite, first_nonfinite
from fbackprop.passes import backward, forward
from fbackprop.program import (
    UNKNOWN_LINE,
    Equation,
    as_array,
    is_inexact,
    program_of,
    type_of,
)
from fbackprop.reverse import (
    DEFAULT,
    STRICT,
    active_inputs,
    flat_cotangent,
    instantiate,
    trace_and_run,
)
from fbackprop.taps import Plan, Reading, Tapped, is_named, plan


class Loop(NamedTuple):
    """How a scan runs: how often, and whether from the last slice to the first."""

    length: int
    reverse: bool


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("operands", "results", "arriving", "leaving", "steps"),
    meta_fields=("primitive", "name", "source", "shapes", "loop"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One equation of a recorded program. A pytree; what is not an array is static.

    Within loops all arrays have one leading axis for each loop, of its iterations in the order of
    its slices.

    Attributes:
      operands, results: tuples of values.
      arriving: for each result the cotangent that arrived, None where none can or did.
      leaving: for each operand the cotangent that this equation sent to it, None likewise.
      steps: what ran within: a call's or an iteration's steps, or for a branching one step for
        each branch, holding its own. Of branches not taken all arrays are zero.
      primitive: the name of the JAX primitive, or ``branch``.
      name: what the user called it (a jit-ted or custom function, a loop's body, a value named by
        `checkpoint_name`, the number of a branch), or an empty string.
      source: the line of the user's code that called it, ``file:line (function)``.
      shapes: the shapes of the results, without axes of loops.
      loop: for a scan, its length and direction.
    """

    operands: tuple
    results: tuple
    arriving: tuple
    leaving: tuple
    steps: tuple[Step, ...]
    primitive: str
    name: str
    source: str
    shapes: tuple[tuple[int, ...], ...]
    loop: Loop | None = None

    @property
    def label(self) -> str:
        """The primitive, and what the user called it if anything: ``jit:relu``."""
        return f"{self.primitive}:{self.name}" if self.name else self.primitive

    def __repr__(self) -> str:
        return f"<{self.label} at {self.source}>"

    def __str__(self) -> str:
        return listing([self])


class Statistics(NamedTuple):
    """A named value and its error signal in numbers, one for each time that the name was used.

    With n elements the norm is ``√Σx²`` and the root mean square ``√(Σx²/n)``.
    """

    value_norm: jax.Array
    value_rms: jax.Array
    value_zeros: jax.Array
    """The fraction of its elements that are zero."""
    signal_norm: jax.Array
    signal_rms: jax.Array
    signal_max: jax.Array
    """The largest magnitude in its error signal."""
    signal_zeros: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "gradients", "steps"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Record:
    """A backward pass, written down by `record`. A pytree; printed, it is a table.

    Attributes:
      value: what the function returned.
      gradients: a tuple, for each argument a pytree like it; dtype float0 for integers.
      steps: the equations in order of execution, each a `Step`.
    """

    value: Any
    gradients: tuple
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        return f"<Record of {len(self.steps)} steps>"

    def __str__(self) -> str:
        return listing(self.steps)

    @property
    def named_values(self) -> dict[str, jax.Array]:
        """The values named by `jax.ad_checkpoint.checkpoint_name`, shaped as in `signals`."""
        return {name: _stacked(name, uses, _value) for name, uses in self._named().items()}

    @property
    def signals(self) -> dict[str, jax.Array]:
        """The error signals of the named values: their cotangents, see `error_signals`.

        Raises:
          ValueError: if values of different shapes share a name.
        """
        return {name: _stacked(name, uses, _signal) for name, uses in self._named().items()}

    def statistics(self) -> dict[str, Statistics]:
        """Sizes of the named values and of their error signals, to see signals vanish or explode.

        Where a name is used several times, in a loop or by repetition, each time is told apart: the
        statistics have the leading axes of `signals`.

        Returns:
          For each name its `Statistics`, in at least single precision; random keys have none.

        Raises:
          ValueError: if values of different shapes share a name.

        Examples:
          >>> import jax.numpy as jnp, fbackprop as fb
          >>> from jax.ad_checkpoint import checkpoint_name
          >>> f = lambda x: jnp.sum(checkpoint_name(x, "x") ** 2)
          >>> statistics = fb.record(f)(jnp.array([3.0, 4.0])).statistics()
          >>> float(statistics["x"].value_norm), float(statistics["x"].signal_norm)
          (5.0, 10.0)
        """
        values, signals = self.named_values, self.signals
        found = {}
        for name, ((step, _), *_) in self._named().items():
            if jnp.issubdtype(values[name].dtype, jax.dtypes.extended):
                continue  # a random key has no size
            rank = len(step.shapes[0])
            value, signal = _sizes(values[name], rank), _sizes(signals[name], rank)
            found[name] = Statistics(value.norm, value.rms, value.zeros, *signal)
        return found

    def first_nonfinite(self) -> NonFinite | None:
        """Where the first NaN or infinity of the backward pass came from.

        Going backward, the first step from which a cotangent leaves that is not finite although
        all that arrived there are, or is NaN although they are not; in loops with the iteration.
        Or the first cotangent that arrives so and no step sent: one that was given, or a sum that
        overflows. If the forward pass had met something like it, made from better operands or
        given as an argument or a constant, the finding says that as well, and is only that if the
        backward pass made nothing but the value is not finite. In a record limited by `where`,
        only what was kept is looked at.

        Returns:
          A `NonFinite`, whose string says all of it in one line; None if all is finite.

        Raises:
          TypeError: within `jit` or another transformation, where there are no values to look at.
          ValueError: if the record has an axis of examples, from `vmap`: take one example of it.

        Examples:
          >>> import jax.numpy as jnp, fbackprop as fb
          >>> found = fb.record(lambda x: jnp.sqrt(x) * 0)(0.0).first_nonfinite()
          >>> found.kind, found.step.label
          ('NaN', 'sqrt')
        """
        return first_nonfinite(self.value, self.gradients, self.steps)

    def _named(self) -> dict[str, list[tuple[Step, int]]]:
        """For each name the steps that gave it, with the number of loops around them."""
        found: dict[str, list[tuple[Step, int]]] = {}
        for step, depth in _walk(self.steps):
            if step.primitive == "name" and step.results[0] is not None:
                found.setdefault(step.name, []).append((step, depth))
        return found


def record(
    f: Callable,
    *,
    cotangent=None,
    where: Callable[[Equation], bool] | None = None,
    strict: bool = False,
    rules: Mapping | None = None,
) -> Callable[..., Record]:
    """The record of a backward pass: every equation, its values, and the cotangents that met it.

    The sweep is that of `vjp`, and so are value and gradients. It looks into jit-ted and
    checkpointed functions, scans and branches; a `custom_jvp` or `custom_vjp` function, a
    `shard_map` and a primitive with a derived rule are one step.

    Args:
      f: function of arrays, or of pytrees of arrays, to a pytree of arrays.
      cotangent: what flows into the sweep, a pytree like the output of `f`; by default ones. For
        a function that returns the losses of N independent examples, (N,), each error signal is
        then that of its own example's loss.
      where: which equations to keep, a function of an `Equation` (its ``primitive``, ``params``,
        ``source``, and the types of its operands ``in_avals`` and results ``out_avals``); by
        default all. Calls, loops and branches are kept, without their own arrays, as far as they
        hold something kept.
      strict: refuse primitives without a hand-written rule instead of deriving one.
      rules: other backward rules for this sweep, as of `vjp`.

    Returns:
      A function of the same positional arguments, to a `Record`. It may be jit-ted, mapped and
      differentiated.

    Raises:
      TypeError: if `f` is not a function, or does not take or return arrays.
      ValueError: if the cotangent is not like the output.
      MissingRule: with `strict`, for a primitive without a rule.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> sweep = fb.record(lambda x, y: jnp.sin(x) * y)(0.0, 3.0)
      >>> [step.primitive for step in sweep.steps]
      ['sin', 'mul']
      >>> [float(ct) for ct in sweep.steps[1].leaving]
      [3.0, 0.0]
    """
    if not callable(f):
        raise TypeError(f"record takes a function, but its first argument is {f!r}")
    table = STRICT if strict else DEFAULT

    @functools.wraps(f, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())
    def recorded(*args) -> Record:
        leaves, structure = jax.tree.flatten(args)
        leaves = [as_array(x) for x in leaves]
        run = functools.partial(_forward, where)
        traced, tapped = trace_and_run(run, table, f, leaves, structure, overrides=rules)
        value, _ = traced.unflatten(tapped.outs)
        cts = _start(cotangent, value, traced)
        cts += [None] * (len(tapped.program.outputs) - len(cts))  # what is noted
        found = backward(table, tapped.program, tapped.active, tapped.tape, cts)
        n = len(traced.constants)
        of_args, of_taps = found[n : n + len(leaves)], found[n + len(leaves) :]
        avals = map(type_of, leaves)
        gradients = [instantiate(ct, aval) for ct, aval in zip(of_args, avals, strict=True)]
        met = jax.tree.unflatten(tapped.nudges, of_taps)
        steps = _steps(tapped.plan, tapped.notes, met)
        return Record(value, jax.tree.unflatten(structure, gradients), steps)

    return recorded


def error_signals(
    f: Callable, *args, cotangent=None, strict: bool = False, rules: Mapping | None = None
) -> dict[str, jax.Array]:
    """The error signals δ = ∂E/∂v of the values v that are named in `f`.

    A value is named by ``jax.ad_checkpoint.checkpoint_name(v, "name")`` anywhere in `f`: in calls,
    checkpointed functions, loops and branches (not in a function with a rule of its own, a
    `while_loop` or a `shard_map`). It need not depend on the arguments.

    Args:
      f: function of arrays, or of pytrees of arrays, to a pytree of arrays.
      *args: where to evaluate.
      cotangent: what flows into the sweep, a pytree like the output of `f`; by default ones. For
        a function that returns the losses of N independent examples, (N,), each error signal is
        then that of its own example's loss.
      strict: refuse primitives without a hand-written rule instead of deriving one.
      rules: other backward rules for this sweep, as of `vjp`.

    Returns:
      For each name an array of the value's shape. Loops put an axis of their iterations in front;
      a name that occurs R times, as in an unrolled loop, has an axis of length R before those, in
      order of execution. A value from which nothing flows to the output, or in a branch not taken,
      has a signal of zeros. Where `f` itself maps over examples by `vmap`, their axis is where JAX
      has put it in the value: map over `error_signals`, or `record`, instead.

    Raises:
      TypeError: if `f` is not a function, or does not take or return arrays.
      ValueError: if values of different shapes, or in different loops, share a name, or if the
        cotangent is not like the output.
      MissingRule: with `strict`, for a primitive without a rule.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> def loss(w, x):
      ...     return jnp.sum(jnp.tanh(checkpoint_name(w @ x, "net")))
      >>> fb.error_signals(loss, jnp.zeros((2, 3)), jnp.ones(3))["net"]
      Array([1., 1.], dtype=float32)
    """
    return record(f, cotangent=cotangent, where=is_named, strict=strict, rules=rules)(*args).signals


# --- recording ------------------------------------------------------------------------------------


class _Forward(NamedTuple):
    """The forward half of a recorded sweep: what its backward half and the record need."""

    plan: Plan
    program: Any
    active: tuple[bool, ...]
    nudges: Any  # their tree
    outs: list
    notes: list[Reading]
    tape: list


def _forward(where, rules, traced, leaves) -> _Forward:
    active = active_inputs(traced, leaves)
    tapping = plan(traced.program, rules, active, where)
    jaxpr, notes_structure = tapping.traced
    nudges, structure = jax.tree.flatten(tapping.nudges())
    active += (True,) * len(nudges)
    program = program_of(jaxpr)
    outs, tape = forward(rules, program, active, [*traced.constants, *leaves, *nudges])
    n = len(traced.program.outputs)
    notes = jax.tree.unflatten(notes_structure, map(as_array, outs[n:]))
    return _Forward(tapping, program, active, structure, outs[:n], notes, tape)


def _start(cotangent, value, traced) -> list:
    """The cotangents of the output's leaves, None for integers."""
    leaves = jax.tree.leaves(value)
    if cotangent is not None:
        avals = traced.program.out_avals
        return flat_cotangent(cotangent, traced.out_structure, avals, "the cotangent")
    return [lax.full_like(as_array(x), 1) if is_inexact(type_of(x)) else None for x in leaves]


def _steps(tapping: Plan, notes: list[Reading], met: list[Reading], source="") -> tuple[Step, ...]:
    """The steps of a program from what was noted going forward and what was met going back."""
    triples = zip(tapping.tapped, notes, met, strict=True)
    return tuple(_step(*each, source or UNKNOWN_LINE) for each in triples)


def _step(tapped: Tapped, note: Reading, met: Reading, source: str) -> Step:
    eqn = tapped.eqn
    source = eqn.source_within(source)
    triples = zip(tapped.bodies, note.bodies, met.bodies, strict=True)
    bodies = [_steps(*each, source) for each in triples]
    if eqn.primitive.name == "cond":
        steps = tuple(_branch(k, body, source) for k, body in enumerate(bodies))
    else:
        steps = bodies[0] if bodies else ()
    params = eqn.params
    loop = Loop(params["length"], params["reverse"]) if eqn.primitive.name == "scan" else None
    n = len(eqn.inputs) if eqn.rule is None else eqn.arity  # not the arrays that a rule holds
    return Step(
        operands=note.operands[:n],
        results=note.results,
        arriving=met.results,
        leaving=met.operands[:n],
        steps=steps,
        primitive=eqn.primitive.name,
        name=eqn.name,
        source=source,
        shapes=tuple(aval.shape for aval in eqn.out_avals),
        loop=loop,
    )


def _branch(k: int, steps: tuple[Step, ...], source: str) -> Step:
    return Step((), (), (), (), steps, "branch", str(k), source, ())


def named_signals(tapping: Plan, notes: Sequence, cotangents: Sequence) -> dict[str, jax.Array]:
    """The error signals of named values, from the leaves of what a program tapped there notes.

    Args:
      tapping: a plan made with `is_named`.
      notes: the further outputs of its program.
      cotangents: of the further inputs; None stands for zero.
    """
    structure = jax.tree.structure(jax.eval_shape(tapping.nudges))
    met = jax.tree.unflatten(structure, cotangents)
    steps = _steps(tapping, jax.tree.unflatten(tapping.traced[1], notes), met)
    return Record(None, (), steps).signals


# --- named values --------------------------------------------------------------------------------


def _walk(steps: Sequence[Step], depth: int = 0) -> Iterator[tuple[Step, int]]:
    """All steps in order of execution, those within others too, with the loops around each."""
    for step in steps:
        yield step, depth
        yield from _walk(step.steps, depth + (step.loop is not None))


def _value(step: Step) -> jax.Array:
    return step.results[0]


def _signal(step: Step) -> jax.Array:
    (ct,), (value,) = step.arriving, step.results
    return jnp.zeros(value.shape, value.dtype) if ct is None else ct


def _stacked(name: str, uses: list[tuple[Step, int]], read: Callable) -> jax.Array:
    """What is read at each use of a name, stacked if there are several."""
    arrays = [read(step) for step, _ in uses]
    if len(arrays) == 1:
        return arrays[0]
    step, depth = uses[0]
    shapes = list(dict.fromkeys(x.shape for x in arrays))
    if len(shapes) > 1 or len({(step.shapes[0], depth) for step, depth in uses}) > 1:
        within = {step.shapes[0] for step, _ in uses}
        said = "in and out of loops"
        if len(shapes) > 1 and len(within) > 1:
            said = f"of shapes {', '.join(map(str, shapes))}"
        elif len({depth for _, depth in uses}) == 1:
            said = "in loops of different lengths"
        raise ValueError(
            f"values {said} share the name '{name}': name them apart, so that each has its error "
            "signal"
        )
    # An axis of examples, from `vmap`, stays in front.
    return jnp.stack(arrays, axis=arrays[0].ndim - len(step.shapes[0]) - depth)


class _Sizes(NamedTuple):
    norm: jax.Array
    rms: jax.Array
    largest: jax.Array
    zeros: jax.Array


def unit_of(largest):
    """In which squares of numbers, of these largest magnitudes, stay within their dtype's range."""
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def _sizes(x: jax.Array, rank: int) -> _Sizes:
    """Over the last `rank` axes."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    x = jnp.abs(x.astype(jnp.float32) if narrow or not is_inexact(type_of(x)) else x)
    axes = tuple(range(x.ndim - rank, x.ndim))
    count = max(1, math.prod(x.shape[axis] for axis in axes))
    largest = jnp.max(x, axes, initial=0)
    unit = unit_of(largest)
    squares = jnp.sum((x / jnp.expand_dims(unit, axes)) ** 2, axes)
    return _Sizes(
        unit * jnp.sqrt(squares),
        unit * jnp.sqrt(squares / count),
        largest,
        jnp.sum(x == 0, axes) / count,
    )
