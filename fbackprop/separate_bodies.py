"""Equations that hold programs in which parameters meet data, split as their bodies are.

A call runs in place, a branch not taken has met nothing, and the weights of a loop's iterations
come stacked. What an equation's bodies compute from parameters alone it lists as its own, by
number; the program around asks it for these, and for nothing that it does not use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from fbackprop.program import UNKNOWN_LINE, Equation, Var, program_of, scan_counts
from fbackprop.uses import Loop, Mask, Use, Weight, Weights, untaken

if TYPE_CHECKING:
    from fbackprop.separate import Separation


class Inner(Weights):
    """The separation of an equation's bodies.

    Attributes:
      data: which of its results depend on the example.
      weights: those of its bodies as the program around names them; their `depth` counts the loops
        that the equation is, too.
      uses: those with structure; their `weight` is an index into `weights`.
      changing: operands that are parameters to the program around and like data to the bodies.
    """

    changing: Sequence = ()

    def __init__(self, eqn: Equation):
        super().__init__()
        self.eqn = eqn
        self.data: Mask = (True,) * len(eqn.outputs)
        self.uses: list[Use] = []
        self._n_own = 0

    def _adopt(self, part: Separation, operands: Sequence, loop: Callable = lambda key: ()):
        """Take over a body's weights and uses.

        Args:
          part: the body.
          operands: what the equation gives for the inputs of the body.
          loop: the loop around the uses of a weight, if any.

        Returns:
          the place of each weight among `weights`; and by number those that the body computes.
        """
        given = dict(zip(part.program.inputs, operands, strict=True))
        places, own = [], {}
        for key, loose, depth in zip(part.weights, part.loose, part.depth, strict=True):
            named = given.get(key)
            if named is None:
                named = self.eqn, self._n_own
                own[self._n_own] = key
                self._n_own += 1
            depth += sum(around.stacked for around in loop(key))
            places.append(self.enlist(named, list(map(self._with_line, loose)), depth))
        for use in part.uses:
            use = use.within(places, lambda w: loop(part.weights[w]))
            self.uses.append(use._replace(source=self._with_line(use.source)))
        return places, own

    def _with_line(self, said: str) -> str:
        """The same, with the line of this equation for one that is not known within."""
        return said.replace(UNKNOWN_LINE, self.eqn.source)

    def sources(self, number: int) -> set[Var]:
        """The operands that a weight computed inside depends on."""
        raise NotImplementedError

    def prepare(self, operands: Sequence, wanted: set[int]) -> tuple[list, dict[int, Any]]:
        """Results that do not depend on data, and of the weights computed inside these, by number.

        Operands that neither depends on may be None.
        """
        raise NotImplementedError

    def meet(self, weights: Sequence[Weight], operands: Sequence, nudges: Sequence):
        """As of a `Separation`; `weights` are the values of its own."""
        raise NotImplementedError


class _Call(Inner):
    """A call: its body runs in place, and checkpointed if it was."""

    def __init__(self, eqn, separate, moving, given):
        super().__init__(eqn)
        (jaxpr,) = (eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
        self.part = separate(program_of(jaxpr), moving, given)
        self.places, self.own = self._adopt(self.part, eqn.inputs)

    def sources(self, number):
        return _sources(self.part, self.own, number, self.eqn.inputs)

    def prepare(self, operands, wanted):
        return [None] * len(self.data), _prepared(self.part, self.own, wanted, operands)

    def meet(self, weights, operands, nudges):
        def run(weights, nudges):
            return self.part.meet([weights[i] for i in self.places], operands, nudges)

        if self.eqn.primitive.name == "remat2":
            run = jax.checkpoint(run, **{k: self.eqn.params[k] for k in ("prevent_cse", "policy")})
        return run(weights, nudges)


class _Branches(Inner):
    """`cond` and `switch`: what a branch not taken would have met is `untaken`.

    Where the example says which is taken, all of them run: mapped over examples they would anyway,
    with a copy of every weight for each example.
    """

    def __init__(self, eqn, separate, moving, given):
        super().__init__(eqn)
        self.chosen_by_data = given[0]
        programs = [program_of(jaxpr) for jaxpr in eqn.params["branches"]]
        self.parts = [separate(p, moving[1:], given[1:]) for p in programs]
        self.adopted = [self._adopt(part, eqn.inputs[1:]) for part in self.parts]
        numbers = [b for b, part in enumerate(self.parts) for _ in part.uses]
        self.uses = [
            use._replace(branches=((eqn, b), *use.branches))
            for b, use in zip(numbers, self.uses, strict=True)
        ]

    def sources(self, number):
        pairs = zip(self.parts, self.adopted, strict=True)
        found = (_sources(part, own, number, self.eqn.inputs[1:]) for part, (_, own) in pairs)
        return set().union(*found)

    def prepare(self, operands, wanted):
        weights: dict[int, Any] = {}
        for part, (_, own) in zip(self.parts, self.adopted, strict=True):
            weights |= _prepared(part, own, wanted, operands[1:])
        return [None] * len(self.data), weights

    def meet(self, weights, operands, nudges):
        index, *operands = operands
        pieces = iter(nudges)
        runs = []
        for part, (places, _) in zip(self.parts, self.adopted, strict=True):
            mine = [weights[i] for i in places]
            taken = list(itertools.islice(pieces, len(part.uses)))
            runs.append(lambda part=part, mine=mine, taken=taken: part.meet(mine, operands, taken))
        if self.chosen_by_data:
            found, met = zip(*(run() for run in runs), strict=True)
            outs = [lax.select_n(index, *each) for each in zip(*found, strict=True)]
            seen = [
                lax.select(index == b, x, _untaken(x)) for b, part in enumerate(met) for x in part
            ]
            return outs, seen
        shapes = [jax.eval_shape(run)[1] for run in runs]

        def branch(b):
            def run():
                outs, met = runs[b]()
                seen = [met if i == b else jax.tree.map(_untaken, s) for i, s in enumerate(shapes)]
                return outs, [x for part in seen for x in part]

            return run

        return lax.switch(index, [branch(b) for b in range(len(runs))])


def _untaken(shape):
    return jnp.full(shape.shape, untaken(shape.dtype), shape.dtype)


class _Scan(Inner):
    """A loop: weights of its own in every iteration, or the same in all."""

    def __init__(self, eqn, separate, moving, given):
        super().__init__(eqn)
        body = program_of(eqn.params["jaxpr"])
        n_consts, n_carry = scan_counts(eqn.params)
        stop = n_consts + n_carry
        moving, given = list(moving), list(given)
        unchanged = [a is b for a, b in zip(body.inputs[n_consts:stop], body.outputs, strict=False)]
        changed = [n_consts + i for i, u in enumerate(unchanged) if moving[n_consts + i] and not u]
        for i in changed:
            moving[i], given[i] = False, True
        self.changing = [eqn.inputs[i] for i in changed]
        while True:
            self.part = part = separate(body, tuple(moving), tuple(given))
            grown = [
                n_consts + i
                for i, v in enumerate(body.outputs[:n_carry])
                if not given[n_consts + i] and (v in part.given or part.is_param(v))
                if not unchanged[i]
            ]
            if not grown:
                break
            for i in grown:
                given[i] = True
        self.given = given
        self.unchanged = [
            unchanged[i] and moving[n_consts + i] and not given[n_consts + i]
            for i in range(n_carry)
        ]
        self.data = (*(not u for u in self.unchanged), *self.data[n_carry:])
        inputs = body.inputs
        same = {v for v in inputs[:n_consts]}
        same |= {v for v, u in zip(inputs[n_consts:stop], self.unchanged, strict=True) if u}
        self.varying = {v for v in inputs if v not in same}
        self.counted = self.varying & set(inputs[n_consts:stop])
        self.places, self.own = self._adopt(part, eqn.inputs, self._loop)

    def _varies(self, key) -> bool:
        return not self.varying.isdisjoint(self.part.sources(key))

    def _is_counted(self, key) -> bool:
        return not self.counted.isdisjoint(self.part.sources(key))

    def _loop(self, key):
        return (Loop(self.eqn.params["length"], self._varies(key)),)

    def _groups(self, values):
        n_consts, n_carry = scan_counts(self.eqn.params)
        values = list(values)
        stop = n_consts + n_carry
        return values[:n_consts], values[n_consts:stop], values[stop:]

    def _options(self) -> dict:
        return {k: self.eqn.params[k] for k in ("length", "reverse")}

    def sources(self, number):
        if self._is_counted(self.own[number]):  # by all that turns with the loop
            return {v for v in self.eqn.inputs if isinstance(v, Var)}
        return _sources(self.part, self.own, number, self.eqn.inputs)

    def prepare(self, operands, wanted):
        consts, carry, xs = self._groups(operands)
        body = self.part.program
        kept = [c if u else None for c, u in zip(carry, self.unchanged, strict=True)]
        varying = {k: self.own[k] for k in wanted if self._varies(self.own[k])}
        operands = [*consts, *kept, *(None for _ in xs)]
        weights = _prepared(self.part, self.own, wanted - varying.keys(), operands)
        turning = [False] * len(kept)
        if any(map(self._is_counted, varying.values())):
            _, given, _ = self._groups(self.given)
            turning = [not g and not u for g, u in zip(given, self.unchanged, strict=True)]

        def prepared(state, xs, keys):
            state = iter(state)
            now = [next(state) if t else k for t, k in zip(turning, kept, strict=True)]
            return self.part.prepare([*consts, *now, *xs], keys)

        states: list = []
        if any(turning):  # a counter, mostly
            start = [c for c, t in zip(carry, turning, strict=True) if t]
            ends = [v for v, t in zip(body.outputs, turning, strict=False) if t]
            _, states = lax.scan(
                lambda now, xs: (prepared(now, xs, ends), now), start, xs, **self._options()
            )
        if varying:
            keys = list(varying.values())
            values = jax.vmap(lambda state, xs: prepared(state, xs, keys))(states, xs)
            weights.update(zip(varying, values, strict=True))
        outs = [c if u else None for c, u in zip(carry, self.unchanged, strict=True)]
        outs += [None] * (len(self.data) - len(outs))
        return outs, weights

    def meet(self, weights, operands, nudges):
        consts, carry, xs = self._groups(operands)
        moves = [self._varies(key) for key in self.part.weights]
        mine = [weights[i] for i in self.places]
        stacked = [w for w, m in zip(mine, moves, strict=True) if m]
        start = [None if u else c for c, u in zip(carry, self.unchanged, strict=True)]

        def step(carry, pieces):
            xs, stacked, nudges = pieces
            stacked = iter(stacked)
            now = [next(stacked) if m else w for w, m in zip(mine, moves, strict=True)]
            outs, met = self.part.meet(now, [*consts, *carry, *xs], nudges)
            n = len(carry)
            kept = [None if u else x for x, u in zip(outs, self.unchanged, strict=False)]
            return kept, (outs[n:], met)

        last, (ys, met) = lax.scan(
            step, start, (xs, stacked, list(nudges)),
            unroll=self.eqn.params["unroll"], **self._options(),
        )  # fmt: skip
        return [*last, *ys], met


def _sources(part: Separation, own: dict, number: int, operands: Sequence) -> set[Var]:
    """The operands that a weight depends on, one of a body's own."""
    found = part.sources(own[number]) if number in own else set()
    pairs = zip(operands, part.program.inputs, strict=True)
    return {v for v, inside in pairs if inside in found and isinstance(v, Var)}


def _prepared(part: Separation, own: dict, wanted: set[int], operands: Sequence) -> dict[int, Any]:
    """Those of a body's own weights that are wanted, by number."""
    mine = {k: key for k, key in own.items() if k in wanted}
    return dict(zip(mine, part.prepare(operands, list(mine.values())), strict=True))


_KINDS = {
    "python_call": _Call,
    "jit": _Call,
    "closed_call": _Call,
    "eval_jaxpr": _Call,
    "remat2": _Call,
    "cond": _Branches,
    "scan": _Scan,
}


def inner_of(
    eqn: Equation, separate: Callable, moving: frozenset[Var], given: set[Var]
) -> Inner | None:
    """The separation of an equation that holds programs in which parameters meet data.

    Args:
      eqn: the equation.
      separate: splits a program of its, from the masks of its inputs that are parameters and data.
      moving: the variables that move with parameters.
      given: those that depend on the example.
    """
    mine = tuple(isinstance(v, Var) and v in moving and v not in given for v in eqn.inputs)
    theirs = tuple(isinstance(v, Var) and v in given for v in eqn.inputs)
    if not any(mine) or not any(theirs) or eqn.rule is not None:
        return None
    kind = _KINDS.get(eqn.primitive.name)
    return kind(eqn, separate, mine, theirs) if kind else None
