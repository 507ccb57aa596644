"""The documentation's page on coverage: how the sweep goes back through every primitive.

python -m experiments.coverage           # print it
python -m experiments.coverage --write   # to docs/coverage.md
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jax
import tyro

import fbackprop as fb

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"


def page() -> str:
    """The page, in Markdown, for the JAX at hand."""
    rows = fb.coverage()
    counts = Counter(row.kind for row in rows)
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    table = "".join(f"| `{row.primitive}` | {row.kind} | {_place(row)} |\n" for row in rows)
    return f"""# Coverage

Every primitive of JAX {jax.__version__}, and how the sweep goes back through it: {summary}.
`fb.coverage()` gives the same table for the JAX at hand, with rules of your own; this page is what
`python -m experiments.coverage` prints.

- **hand-written**: a rule of this library.
- **zero**: there is no derivative to pass on (integers, comparisons, random bits, effects).
- **derived**: the transpose of the primitive's forward-mode rule; `strict=True` refuses it.
- **not differentiable**: differentiating it is an error, as under `jax.grad`.

| primitive | backward rule | where, or why not |
|---|---|---|
{table}"""


def _place(row: fb.PrimitiveCoverage) -> str:
    place = f"`{row.where}`" if row.where else ""
    return "; ".join(filter(None, [place, row.note]))


def main(write: bool = False) -> None:
    """Print the page on coverage, or write it to the documentation.

    Args:
      write: replace docs/coverage.md.
    """
    if write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


if __name__ == "__main__":
    tyro.cli(main)
