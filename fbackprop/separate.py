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
from collections.abc import Sequence
from typing import Any

from fbackprop.biases import Bias, Sums
from fbackprop.passes import activity
from fbackprop.program import TAP, Equation, Program, Var, memoized, read
from fbackprop.separate_bodies import Inner, inner_of
from fbackprop.table import Rules
from fbackprop.uses import LOOKUPS, STRUCTURED, Mask, Use, Weight, Weights, signed


@memoized
def separate(program: Program, rules: Rules, moving: Mask, data: Mask) -> Separation:
    """The `Separation` of a program whose inputs are parameters (`moving`) and `data`."""
    return Separation(program, rules, moving, data)


class Separation(Weights):
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
        self._inner: dict[Equation, Inner] = {}
        for eqn in program.equations:
            mine = [isinstance(v, Var) and v in given for v in eqn.inputs]
            inner = inner_of(eqn, self._separate, flow.variables, given)
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

    def _separate(self, program: Program, moving: Mask, data: Mask) -> Separation:
        return separate(program, self.rules, moving, data)

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


def _grows(eqn: Equation) -> bool:
    """Whether an equation makes more of its first operand, so that the operand is the weight.

    Broadcasts and lookups do.
    """
    grown = eqn.out_avals[0].size > eqn.in_avals[0].size
    return eqn.primitive.name == "gather" or (eqn.primitive.name == "broadcast_in_dim" and grown)
