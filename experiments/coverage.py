"""The documentation's page on coverage: how the sweep goes back through every primitive.

python -m experiments.coverage           # print it
python -m experiments.coverage --write   # to docs/coverage.md, or where --to says
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax

import fbackprop as fb
from experiments import command
from experiments.command import UsageError

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The documentation's page on coverage, for the JAX at hand."""

    write: bool = False
    """Write the page instead of printing it."""
    to: Path = PAGE
    """Where to write it, with --write."""


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


def script(settings: Settings) -> int:
    """Print or write the page."""
    if settings.to != PAGE and not settings.write:
        raise UsageError("--to says where to write the page: give --write, too")
    if settings.write:
        settings.to.write_text(page())
    else:
        print(page(), end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    return command.run(Settings, script, arguments)


if __name__ == "__main__":
    command.leave(main())
