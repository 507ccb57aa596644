"""The looks that all figures share: matplotlib's settings."""

from typing import Any

LOOKS: dict[Any, Any] = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
# Of panels with curves.
LINES: dict[Any, Any] = {
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "lines.linewidth": 1.2,
}
