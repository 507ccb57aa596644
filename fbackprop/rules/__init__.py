"""The rules, grouped by kind; importing this package fills the table."""

from fbackprop.rules import (  # noqa: F401
    calls,
    collectives,
    derived,
    elementwise,
    factorizations,
    fourier,
    indexing,
    layout,
    loops,
    products,
    reductions,
    solves,
    special,
    windows,
)
