"""How the sweep handles every parameter of a model, and what that costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fbackprop.batch import sites_of
from fbackprop.gradients import Gradients
from fbackprop.groups import cost_of_forming
from fbackprop.kronecker import is_vector
from fbackprop.model import check_params
from fbackprop.program import is_inexact, shaped
from fbackprop.sites import Site


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """How one parameter is handled.

    Attributes:
      name: its path.
      shape: its shape.
      uses: where it meets data, one line each: how, at how many places T, and on which line.
      formed: whether every example's gradient has to be formed for all but sums of gradients.
      held: numbers that one example holds for it during a sweep, activations and error signals.
      norm: multiplications for the norm of one example's gradient.
      gradient: multiplications for one example's gradient.
    """

    name: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]
    formed: bool
    held: int
    norm: int
    gradient: int


@dataclasses.dataclass(frozen=True)
class SitesReport:
    """What `explain_sites` found; its string is the table."""

    leaves: tuple[LeafReport, ...]

    def __repr__(self) -> str:
        formed = sum(leaf.formed for leaf in self.leaves)
        return f"<SitesReport of {len(self.leaves)} leaves, gradients of {formed} formed>"

    def __str__(self) -> str:
        head = ("leaf", "shape", "held", "norm/gradient", "how")
        rows = [row for leaf in self.leaves for row in _rows(leaf)]
        widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])
        return "\n".join(lines)


def _rows(leaf: LeafReport) -> list[tuple[str, ...]]:
    ratio = f"{leaf.norm / leaf.gradient:.2g}" if leaf.gradient else ""
    how = ("gradients formed: " if leaf.formed else "") + (leaf.uses[0] if leaf.uses else "")
    first = (leaf.name, str(leaf.shape), f"{leaf.held:,}" if leaf.held else "", ratio, how)
    return [first, *(("", "", "", "", use) for use in leaf.uses[1:])]


def explain_sites(model: Callable, params, x, *further) -> SitesReport:
    """Print for every parameter of a model how `fbackprop.sweep` handles it, and what it costs.

    A parameter that meets data in products, convolutions or lookups is handled by pairs of
    activations and error signals. Where it has no such structure (biases, scales) each example's
    gradient is formed, which is small; where a matrix meets data in another way, is computed from
    other parameters, or has uses that overlap, too, which may not be small ("gradients formed").

    The table gives the numbers held per example ("held": activations and error signals), the cost
    of one example's norm relative to that of its gradient, in multiplications ("norm/gradient"),
    and each use with its number of places T and its line.

    Args:
      model: ``model(params, x, *further)`` for one example, as for `fbackprop.sweep`; a model that
        takes a key is given one.
      params: the parameters, a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      x, *further: the inputs of ONE example, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      What was printed, as data.

    Examples:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> def model(p, x):
      ...     return p["w"] @ x + p["b"]
      >>> params = {"w": jnp.ones((4, 300)), "b": jnp.ones(4)}
      >>> report = fb.explain_sites(model, params, jnp.ones(300))  # doctest: +ELLIPSIS
      leaf   shape     held  norm/gradient  how
      ['b']  (4,)      4     0.42           add at ...
      ['w']  (4, 300)  304   0.084          product at 1 place, dot_general at ...
      >>> report
      <SitesReport of 2 leaves, gradients of 0 formed>
    """
    check_params(params)
    reports: list[LeafReport] = []

    def look(params, inputs):
        gradients = sites_of(model, params, inputs)
        for leaf, (path, p) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
            reports.append(_report(gradients, leaf, jax.tree_util.keystr(path), p))

    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *shaped(x).shape), shaped(x).dtype), (x, *further)
    )
    jax.eval_shape(look, params, one)
    report = SitesReport(tuple(reports))
    print(report)
    return report


def _report(gradients: Gradients, leaf: int, name: str, param) -> LeafReport:
    used = [(w, s) for w, s in gradients.sites if leaf in gradients.source.origins[w].leaves]
    uses: list[str] = []
    for weight, site in used:
        uses += _uses(gradients, weight, site)
    groups = gradients.groups[leaf]
    if not is_inexact(shaped(param)):
        uses = ["no gradient: not floating point"]
    elif not used:
        uses = ["unused: its gradient is zero"]
    sites = [site for _, site in used]
    gradient = sum(map(cost_of_forming, sites))
    norm = gradient
    if groups is not None:
        norm = sum(group.cost_of_norm for group in groups)
    shape = jnp.shape(param)
    # Of a vector it is as small as the error signals.
    formed = any(site.use is None for site in sites) and not is_vector(shape)
    return LeafReport(
        name, shape, tuple(_times(*each) for each in Counter(uses).items()),
        bool(used) and (groups is None or formed), sum(map(_held, sites)), int(norm), int(gradient),
    )  # fmt: skip


def _times(line: str, count: int) -> str:
    return line if count == 1 else f"{line}, {count} times"


def _uses(gradients: Gradients, weight: int, site: Site) -> list[str]:
    if site.use is None:
        return gradients.source.loose[weight]
    kind = {"gather": "lookup", "dynamic_slice": "lookup", "conv_general_dilated": "convolution"}
    eqn = site.use.eqn
    places = "1 place" if site.places == 1 else f"{site.places} places"
    what = kind.get(eqn.primitive.name, "product")
    return [f"{what} at {places}, {eqn.primitive} at {site.use.source}"]


def _held(site: Site) -> int:
    activations = site.met.size if site.use is not None else 0
    return activations + site.b.size
