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
    """The step at which something that is not finite appeared, though all that came in was finite.

    Attributes:
      kind: ``NaN`` or ``infinity``.
      backward: whether it is a cotangent that left the step, or a result that it computed.
      index: of which operand the cotangent is, or which result it is.
      step: the step.
      iterations: of the loops around it, the outermost first.
      forward: for a cotangent, where the forward pass had already met something like it, if so.
    """

    kind: str
    backward: bool
    index: int
    step: Step = dataclasses.field(repr=False)
    iterations: tuple[Iteration, ...] = ()
    forward: NonFinite | None = None

    def __str__(self) -> str:
        label = f"'{self.step.label}'"
        what = (
            f"the cotangent leaving {label} to operand {self.index}"
            if self.backward
            else f"result {self.index} of {label}"
        )
        loops = (f", iteration {i.number} of the scan at {i.source}" for i in self.iterations[::-1])
        line = f"{self.kind} in {what}, called at {self.step.source}{''.join(loops)}"
        return f"{line}; before that, going forward, {self.forward}" if self.forward else line


def first_nonfinite(value, steps: Sequence[Step]) -> NonFinite | None:
    """The first finding of a backward pass, or else that of a forward pass to a bad value."""
    if not all(map(has_value, jax.tree.leaves((value, steps)))):
        raise TypeError(
            "first_nonfinite looks at values, and within jit or another transformation there are "
            "none: return the record from there and ask it outside"
        )
    found = [_judge(step, 0) for step in steps]
    forward = next(_created(found, backward=False), None)
    backward = next(_created(found, backward=True), None)
    if backward is not None:
        return dataclasses.replace(backward, forward=forward)
    return forward if any(_badness(x, 0).any() for x in jax.tree.leaves(value)) else None


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


def _created(
    found: Sequence[_Judged],
    backward: bool,
    at: tuple[int, ...] = (),
    iterations: tuple[Iteration, ...] = (),
) -> Iterator[NonFinite]:
    """What is not finite and came of what was, in the order of the pass; innermost steps first."""
    for judged in reversed(found) if backward else found:
        if not judged.bad:
            continue
        step, loop = judged.step, judged.step.loop
        if loop is None:
            yield from _created(judged.inner, backward, at, iterations)
        elif judged.inner:
            order = range(loop.length)
            for i in order[::-1] if loop.reverse != backward else order:
                inside = (*iterations, Iteration(i, step.source))
                yield from _created(judged.inner, backward, (*at, i), inside)
        came, went = (
            (judged.arriving, judged.leaving) if backward else (judged.operands, judged.results)
        )
        if any(b is not None and b[at] for b in came):
            continue
        for index, b in enumerate(went):
            if b is not None and b[at]:
                yield NonFinite(KINDS[b[at]], backward, index, step, iterations)
