"""A recorded backward pass as a table of plain text, one line for each step."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from fbackprop.program import has_value, is_inexact, type_of

if TYPE_CHECKING:
    from fbackprop.record import Step

HEADER = ("step", "primitive", "result", "cotangent", "line")
SMALL = 4  # elements of an array that is shown as it is
NOTHING = "-"


def listing(steps: Sequence[Step]) -> str:
    """The table: for each step its results and the cotangents that arrived at them.

    Small arrays are shown as they are; of others the result's type, and the cotangent's Euclidean
    norm (that of all iterations together within a loop). Where nothing arrived stands a dash.
    Within `jit` all there is to show is types.
    """
    rows = [HEADER, *_rows(steps)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEADER))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _rows(steps: Sequence[Step], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, ...]]:
    for number, step in enumerate(steps, start=1):
        times = f" x{step.loop.length}" if step.loop else ""
        kept = all(x is not None for x in step.results)
        yield (
            f"{prefix}{number}",
            "  " * depth + step.label + times,
            ", ".join(map(_value, step.results)) if kept else "",
            ", ".join(map(_cotangent, step.arriving)) if kept else "",
            _line(step.source),
        )
        yield from _rows(step.steps, f"{prefix}{number}.", depth + 1)


def _value(x) -> str:
    return _elements(np.asarray(x)) if _shown(x) else _type(x)


def _cotangent(x) -> str:
    if x is None:
        return NOTHING
    if not has_value(x) or _shown(x):
        return _value(x)
    return f"norm {np.linalg.norm(np.asarray(x).astype(np.promote_types(_wide(x), float))):.4g}"


def _shown(x) -> bool:
    special = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return has_value(x) and x.size <= SMALL and not special


def _elements(x: np.ndarray) -> str:
    if x.ndim:
        return f"[{' '.join(map(_elements, x))}]"
    return f"{x.astype(_wide(x)):.4g}" if is_inexact(type_of(x)) else str(x)


def _wide(x) -> np.dtype:
    """A dtype at least as wide that NumPy can compute with and print."""
    return np.promote_types(x.dtype, np.float32)


def _type(x) -> str:
    return type_of(x).str_short(short_dtypes=True)


def _line(source: str) -> str:
    """Without the folders of the file."""
    place, *rest = source.split(" ", 1)
    return " ".join([os.path.basename(place), *rest])
