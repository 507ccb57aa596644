"""Where a backward pass first meets a NaN or an infinity."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from fbackprop.program import has_value, is_inexact, type_of

if TYPE_CHECKING:
    from fbackprop.record import Step

KINDS = ("", "infinity", "NaN")  # by badness


class Iteration(NamedTuple):
    """One iteration of a scan: which, counted from 0 along its slices, and the scan's line."""

    number: int
    source: str


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """Where something appeared that is not finite, or is NaN though all that came in was not.

    Attributes:
      kind: ``NaN`` or ``infinity``.
      backward: whether it is a cotangent, or a value of the forward pass.
      index: of which operand, result or leaf it is.
      step: the step that it left, or with `outside` the first that it reached; None for a leaf of
        the value or of the gradients that no step made.
      iterations: of the loops around it, the outermost first.
      outside: whether no step made it: it was given as an argument, a constant or a cotangent, or
        is the sum of the cotangents that several steps sent to one value.
      forward: for a cotangent, where the forward pass had already met something like it, if so.
    """

    kind: str
    backward: bool
    index: int
    step: Step | None = dataclasses.field(repr=False)
    iterations: tuple[Iteration, ...] = ()
    outside: bool = False
    forward: NonFinite | None = None

    def __str__(self) -> str:
        line = f"{self.kind} in {self._place()}"
        return f"{line}; before that, going forward, {self.forward}" if self.forward else line

    def _place(self) -> str:
        if self.step is None:
            if self.backward:
                said = "given so, a sum of others or of a step not kept"
                return f"leaf {self.index} of the gradients, {said}"
            return f"leaf {self.index} of the value, an argument or a constant"
        ends = {  # by backward and outside
            (True, False): ("the cotangent leaving", f" to operand {self.index}", ""),
            (True, True): (
                f"the cotangent arriving at result {self.index} of",
                "",
                ", given so, a sum of others or of a step not kept",
            ),
            (False, False): (f"result {self.index} of", "", ""),
            (False, True): (f"operand {self.index} of", "", ", an argument or a constant"),
        }
        before, after, said = ends[self.backward, self.outside]
        loops = (f", iteration {i.number} of the scan at {i.source}" for i in self.iterations[::-1])
        line = f"{before} '{self.step.label}'{after}, called at {self.step.source}{''.join(loops)}"
        return line + said


def first_nonfinite(value, gradients, steps: Sequence[Step]) -> NonFinite | None:
    """The first finding of a backward pass, or else that of a forward pass to a bad value."""
    if not all(map(has_value, jax.tree.leaves((value, gradients, steps)))):
        raise TypeError(
            "first_nonfinite looks at values, and within jit or another transformation there are "
            "none: return the record from there and ask it outside"
        )
    found = [_judge(step, 0) for step in steps]
    # Infinities that are given are meant, as those of masks: named only if there is nothing else.
    going_forward = _Pass(backward=False).findings(found)
    made = (f for f in going_forward if not (f.outside and f.kind == KINDS[1]))
    first = next(made, None) or next(_Pass(backward=False).findings(found), None)
    backward = next(_Pass(backward=True).findings(found), None) or _of_leaves(gradients, True)
    if backward is not None:
        return dataclasses.replace(backward, forward=first)
    of_value = _of_leaves(value, False)
    return of_value and (first or of_value)


def _of_leaves(tree, backward: bool) -> NonFinite | None:
    """The first leaf that is not finite."""
    for i, x in enumerate(jax.tree.leaves(tree)):
        if bad := int(_badness(x, 0)):
            return NonFinite(KINDS[bad], backward, i, None, outside=True)
    return None


class _Judged(NamedTuple):
    """A step, with how bad each of its arrays is in each iteration of the loops around it."""

    step: Step
    operands: list
    results: list
    arriving: list
    leaving: list
    inner: list[_Judged]
    bad: bool


def _judge(step: Step, depth: int) -> _Judged:
    for x, shape in zip(step.results, step.shapes, strict=False):
        if x is not None and x.ndim != depth + len(shape):
            raise ValueError(
                "first_nonfinite looks at one example, but this record has an axis of examples: "
                "take one of them, as in jax.tree.map(lambda x: x[0], record)"
            )

    def of(xs):
        return [None if x is None else _badness(x, depth) for x in xs]

    operands, results = of(step.operands), of(step.results)
    arriving, leaving = of(step.arriving), of(step.leaving)
    inner = [_judge(s, depth + (step.loop is not None)) for s in step.steps]
    arrays = (b for b in (*operands, *results, *arriving, *leaving) if b is not None)
    bad = any(b.any() for b in arrays) or any(s.bad for s in inner)
    return _Judged(step, operands, results, arriving, leaving, inner, bad)


def _badness(x, depth: int) -> np.ndarray:
    """0 for finite, 1 for infinities, 2 for NaN: the worst over all but the axes of loops."""
    if not is_inexact(type_of(x)):
        return np.zeros(x.shape[:depth], np.int8)
    x = np.asarray(x)
    bad = np.where(np.isnan(x), 2, np.where(np.isfinite(x), 0, 1))
    return bad.max(axis=tuple(range(depth, x.ndim)), initial=0)


@dataclasses.dataclass
class _Pass:
    """Steps in the order of a pass, and how bad what they have made so far is at the worst."""

    backward: bool
    made: int = 0

    def findings(
        self,
        found: Sequence[_Judged],
        at: tuple[int, ...] = (),
        iterations: tuple[Iteration, ...] = (),
    ) -> Iterator[NonFinite]:
        """What is worse than all that it came of; of steps within steps the innermost first."""
        for judged in reversed(found) if self.backward else found:
            if not judged.bad:
                continue
            came, went = self._worst(judged, at)
            for index, bad in enumerate(came):
                if bad > self.made:
                    yield self._finding(judged.step, index, bad, iterations, outside=True)
            yield from self._within(judged, at, iterations)
            for index, bad in enumerate(went):
                if bad > max(came, default=0):
                    yield self._finding(judged.step, index, bad, iterations, outside=False)
            self.made = max(self.made, *went, 0)

    def _within(self, judged: _Judged, at, iterations) -> Iterator[NonFinite]:
        step, loop = judged.step, judged.step.loop
        if loop is None:
            yield from self.findings(judged.inner, at, iterations)
        elif judged.inner:
            order = range(loop.length)
            for i in order[::-1] if loop.reverse != self.backward else order:
                inside = (*iterations, Iteration(i, step.source))
                yield from self.findings(judged.inner, (*at, i), inside)

    def _worst(self, judged: _Judged, at) -> tuple[list[int], list[int]]:
        """How bad what comes to a step is, and what leaves it, in one iteration."""
        values, cotangents = (judged.operands, judged.results), (judged.arriving, judged.leaving)
        came, went = cotangents if self.backward else values
        return [_at(b, at) for b in came], [_at(b, at) for b in went]

    def _finding(self, step: Step, index, bad, iterations, outside) -> NonFinite:
        return NonFinite(KINDS[bad], self.backward, index, step, iterations, outside)


def _at(badness, at) -> int:
    return 0 if badness is None else int(badness[at])
