"""What depends on parameters alone, apart from the places where parameters meet data.

A model of one example is split in two. The first part computes, from the parameters alone, the
*weights*: the values with which the second part, which sees the example, begins. In most models
a weight is a parameter as it stands, or transposed, sliced, or cut from a stack; it may as well be
the product of a low-rank adapter or a normalised direction. Bodies of loops, branches and calls
are split alike, so that the weights of all iterations come stacked out of the first part.

In the second part every *use* of a weight by a product, a convolution or a lookup is tapped: run
on an example it also returns what the weight met there (the activation), and takes a nudge of the
result, whose cotangent is the error signal there. Any other use nudges the weight itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fbackprop.biases import Bias, Sums
from fbackprop.passes import activity
from fbackprop.program import (
    TAP,
    UNKNOWN_LINE,
    Equation,
    Program,
    Var,
    memoized,
    program_of,
    read,
    scan_counts,
)
from fbackprop.table import Rules
from fbackprop.uses import LOOKUPS, STRUCTURED, Loop, Use, signed, untaken

Mask = tuple[bool, ...]


class Weight(NamedTuple):
    """A weight in the second part: as it is, and nudged for uses without structure."""

    plain: Any
    nudged: Any


def _grows(eqn: Equation) -> bool:
    """Whether an equation makes more of its first operand, so that the operand is the weight.

    Broadcasts and lookups do.
    """
    grown = eqn.out_avals[0].size > eqn.in_avals[0].size
    return eqn.primitive.name == "gather" or (eqn.primitive.name == "broadcast_in_dim" and grown)


# --- the split ------------------------------------------------------------------------------------


@memoized
def separate(program: Program, rules: Rules, moving: Mask, data: Mask) -> Separation:
    """The `Separation` of a program whose inputs are parameters (`moving`) and `data`."""
    return Separation(program, rules, moving, data)


class _Weights:
    """Weights, each listed once.

    Attributes:
      weights: what names each of them.
      loose: for each its uses without structure, described; it is nudged itself if there are any.
      depth: for each how many loops it comes stacked for.
    """

    def __init__(self):
        self.weights: list = []
        self.loose: list[list[str]] = []
        self.depth: list[int] = []

    def enlist(self, key, loose: list[str], depth: int = 0) -> int:
        """List a weight, with further uses if it is there already; returns its place."""
        if key not in self.weights:
            self.weights.append(key)
            self.loose.append([])
            self.depth.append(depth)
        i = self.weights.index(key)
        self.loose[i] += loose
        self.depth[i] = min(self.depth[i], depth)
        return i


class Separation(_Weights):
    """A program split into what computes weights and what meets data.

    Args:
      program: of one example.
      rules: the rules in force.
      moving: the inputs that are parameters, or depend on them and not on data.
      data: the inputs that depend on the example.

    Attributes:
      weights: for each weight the variable that it is, or (equation, k) for the k-th weight that
        the first part of an equation's body computes.
      uses: the uses with structure, in the order in which `meet` returns what they met.
    """

    def __init__(self, program: Program, rules: Rules, moving: Mask, data: Mask):
        super().__init__()
        self.program, self.rules = program, rules
        flow = activity(program, rules, moving)
        given = {v for v, d in zip(program.inputs, data, strict=True) if d}
        self._inner: dict[Equation, _Inner] = {}
        for eqn in program.equations:
            mine = [isinstance(v, Var) and v in given for v in eqn.inputs]
            inner = _inner_of(eqn, rules, flow.variables, given)
            if inner is not None:
                self._inner[eqn] = inner
                given.update(v for v, d in zip(eqn.outputs, inner.data, strict=True) if d)
            elif any(mine) or eqn.has_effects:
                given.update(eqn.outputs)
        self.given = given
        self._params = flow.variables - given  # move with parameters, the same for each example
        # Computed beside those and so in the first part too, but without a derivative.
        self._fixed = {
            v
            for eqn in program.equations
            if eqn not in self._inner and any(map(self.is_param, eqn.outputs))
            for v in eqn.outputs
            if v not in self._params
        }

        self._sources: dict[Any, set[Var]] = {}
        self.uses: list[Use] = []
        late = self._late()
        self._rest = [eqn for eqn in program.equations if self._is_rest(eqn) or eqn in late]
        for eqn in self._rest:
            self._note(eqn)
        for v in program.outputs:
            if self.is_param(v) or self._is_fixed(v):
                self.enlist(v, ["returned by the model"] if self.is_param(v) else [])
        self.uses = self._with_biases()

    @property
    def n_taps(self) -> int:
        """How many nudges there are: one for each use, and one for each weight with loose uses."""
        return len(self.uses) + sum(map(bool, self.loose))

    def is_param(self, v) -> bool:
        return isinstance(v, Var) and v in self._params

    def _is_fixed(self, v) -> bool:
        return isinstance(v, Var) and v in self._fixed

    def _is_rest(self, eqn: Equation) -> bool:
        return not any(map(self.is_param, eqn.outputs)) or eqn in self._inner

    def _late(self) -> set[Equation]:
        """Broadcasts and lookups of weights that only data meets: they are left to the rest."""
        late: set[Equation] = set()
        users: dict[Var, list[Equation]] = {}
        for eqn in self.program.equations:
            for v in eqn.inputs:
                if isinstance(v, Var):
                    users.setdefault(v, []).append(eqn)
        returned = set(v for v in self.program.outputs if isinstance(v, Var))
        for eqn in reversed(self.program.equations):
            if self._is_rest(eqn) or not _grows(eqn):
                continue
            (out,) = eqn.outputs
            readers = users.get(out, [])
            met = all((self._is_rest(e) and e not in self._inner) or e in late for e in readers)
            if met and out not in returned:
                late.add(eqn)
        # What they make is met by data, not computed from parameters alone.
        self._params = self._params - {v for eqn in late for v in eqn.outputs}
        return late

    def _note(self, eqn: Equation) -> None:
        """Note which weights an equation uses, and how."""
        for v in filter(self._is_fixed, eqn.inputs):
            self.enlist(v, [])
        inner = self._inner.get(eqn)
        if inner is not None:
            places = list(map(self.enlist, inner.weights, inner.loose, inner.depth))
            self.uses += [use.within(places) for use in inner.uses]
            for v in inner.changing:
                self.enlist(v, [f"changed from step to step of a loop at {eqn.source}"])
            return
        found = [i for i, v in enumerate(eqn.inputs) if self.is_param(v)]
        operand = self._structured(eqn, found)
        for i in found:
            # What has no derivative (a comparison, a stopped gradient) needs no nudge.
            is_loose = operand is None and self._moves(eqn)
            described = [f"{eqn.primitive} at {eqn.source}"] if is_loose else []
            weight = self.enlist(eqn.inputs[i], described)
            if i == operand:
                self.uses.append(Use(eqn, i, weight, source=eqn.source))

    def _with_biases(self) -> list[Use]:
        sums = Sums(self.program, self.is_param)

        def with_bias(use: Use) -> Use:
            added = None if use.loops or use.eqn not in mine else sums.added_to(use.eqn)
            if added is None:
                return use
            return use._replace(bias=Bias(self.weights.index(added.var), added))

        mine = set(self._rest)
        return [with_bias(use) for use in self.uses]

    def _moves(self, eqn: Equation) -> bool:
        mask = tuple(map(self.is_param, eqn.inputs))
        return any(self.rules.of(eqn).active_outputs(self.rules, eqn, mask))

    def _structured(self, eqn: Equation, found: list[int]) -> int | None:
        fits = STRUCTURED.get(eqn.primitive.name)
        if fits is None or len(found) != 1 or not fits(eqn, found[0]):
            return None
        # A rule of one's own may have its own idea of the weight's gradient.
        return found[0] if eqn.rule is None or eqn.rule.leaves(eqn, found[0]) else None

    # --- first part

    def prepare(self, values: Sequence, keys: Sequence | None = None) -> list:
        """The weights (or the values of `keys`), from those of the program's inputs that it needs.

        Args:
          values: the program's inputs, None for data and for what `keys` do not depend on.
          keys: weights, or variables that do not depend on data.
        """
        keys = self.weights if keys is None else keys
        env: dict = dict(self.program.constants)
        env.update(zip(self.program.inputs, values, strict=True))
        for eqn, wanted in self._way_to(keys)[0]:
            operands = [env.get(v) if isinstance(v, Var) else v.val for v in eqn.inputs]
            if eqn in self._inner:
                outs, weights = self._inner[eqn].prepare(operands, wanted)
                env.update(((eqn, k), w) for k, w in weights.items())
            else:
                outs = eqn.bind(*operands)
            env.update(zip(eqn.outputs, outs, strict=True))
        return [read(env, key) for key in keys]

    def _way_to(self, keys: Sequence) -> tuple[list[tuple[Equation, set[int]]], set[Var]]:
        """How these are computed from parameters.

        Returns:
          the equations in order, each with the numbers of the weights among `keys` that it computes
          inside; and the variables needed.
        """
        needed: set[Var] = {key for key in keys if isinstance(key, Var)}
        inside: dict[Equation, set[int]] = {}
        for eqn, number in (key for key in keys if isinstance(key, tuple)):
            inside.setdefault(eqn, set()).add(number)
        steps = []
        for eqn in reversed(self.program.equations):
            wanted, read = inside.get(eqn, set()), set[Var]()
            if any(v in needed for v in eqn.outputs):
                read = {v for v in eqn.inputs if isinstance(v, Var)}
            elif wanted:  # of a call's operands, only some may matter to a weight
                read = read.union(*map(self._inner[eqn].sources, wanted))
            else:
                continue
            steps.append((eqn, wanted))
            needed |= read - self.given
        return steps[::-1], needed

    def sources(self, key) -> set[Var]:
        """The variables that a weight depends on, the program's inputs among them."""
        if key not in self._sources:
            self._sources[key] = self._way_to([key])[1]
        return self._sources[key]

    # --- second part

    def meet(self, weights: Sequence[Weight], values: Sequence, nudges: Sequence):
        """Run the second part.

        Args:
          weights: as `prepare` returned them, nudged or not.
          values: the program's inputs, None for those that are parameters.
          nudges: one per use.

        Returns:
          the program's outputs, and for each use what the weight met there.
        """
        env: dict = dict(self.program.constants)
        env.update(zip(self.program.inputs, values, strict=True))
        mine = dict(zip(self.weights, weights, strict=True))
        env.update({v: w.nudged for v, w in mine.items() if isinstance(v, Var)})
        remaining = iter(nudges)
        seen: list = []
        at = {use.eqn: use for use in self.uses if not use.loops}
        for eqn in self._rest:
            if eqn in self._inner:
                inner = self._inner[eqn]
                operands = [env.get(v) if self.is_param(v) else read(env, v) for v in eqn.inputs]
                pieces = list(itertools.islice(remaining, len(inner.uses)))
                outs, met = inner.meet([mine[key] for key in inner.weights], operands, pieces)
                seen += met
            elif eqn in at:
                use = at[eqn]
                operands = [read(env, v) for v in eqn.inputs]
                operands[use.operand] = mine[eqn.inputs[use.operand]].plain
                (out,) = eqn.bind(*operands)
                outs = [TAP.bind(out, next(remaining))]
                met = operands[1 - use.operand]
                seen.append(signed(met) if eqn.primitive.name in LOOKUPS else met)
            else:
                outs = eqn.bind(*(read(env, v) for v in eqn.inputs))
            pairs = zip(eqn.outputs, outs, strict=True)
            env.update((v, x) for v, x in pairs if not self.is_param(v))
        return [read(env, v) for v in self.program.outputs], seen


# --- equations that hold programs ----------------------------------------------------------------


class _Inner(_Weights):
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


class _Call(_Inner):
    """A call: its body runs in place, and checkpointed if it was."""

    def __init__(self, eqn, rules, moving, given):
        super().__init__(eqn)
        (jaxpr,) = (eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
        self.part = separate(program_of(jaxpr), rules, moving, given)
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


class _Branches(_Inner):
    """`cond` and `switch`: what a branch not taken would have met is `untaken`.

    Where the example says which is taken, all of them run: mapped over examples they would anyway,
    with a copy of every weight for each example.
    """

    def __init__(self, eqn, rules, moving, given):
        super().__init__(eqn)
        self.chosen_by_data = given[0]
        programs = [program_of(jaxpr) for jaxpr in eqn.params["branches"]]
        self.parts = [separate(p, rules, moving[1:], given[1:]) for p in programs]
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


class _Scan(_Inner):
    """A loop: weights of its own in every iteration, or the same in all."""

    def __init__(self, eqn, rules, moving, given):
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
            self.part = part = separate(body, rules, tuple(moving), tuple(given))
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


def _inner_of(eqn: Equation, rules, moving: frozenset, given: set) -> _Inner | None:
    """The separation of an equation that holds programs in which parameters meet data."""
    mine = tuple(isinstance(v, Var) and v in moving and v not in given for v in eqn.inputs)
    theirs = tuple(isinstance(v, Var) and v in given for v in eqn.inputs)
    if not any(mine) or not any(theirs) or eqn.rule is not None:
        return None
    kind = _KINDS.get(eqn.primitive.name)
    return kind(eqn, rules, mine, theirs) if kind else None
