"""The table of coverage, and its page in the documentation."""

import re
import subprocess
import sys
from pathlib import Path

import jax
from jax.extend.core import Primitive, primitives

import fbackprop as fb
from experiments.coverage import PAGE
from fbackprop.table import TABLE

ROOT = Path(__file__).parents[1]
KINDS = {"hand-written", "derived", "zero", "not differentiable"}


def test_lists_every_primitive_that_jax_exposes():
    exposed = {p.name for p in vars(primitives).values() if isinstance(p, Primitive)}
    rows = {row.primitive: row for row in fb.coverage()}
    assert exposed <= rows.keys()
    assert {row.kind for row in rows.values()} == KINDS
    # Nothing is left to derivation, or without a derivative, unless the table says why.
    unexplained = [
        r for r in rows.values() if r.kind not in ("hand-written", "zero") and not r.note
    ]
    assert not unexplained


def test_a_rule_of_ones_own_is_listed():
    mine = Primitive("a_primitive_of_mine")
    fb.defrule(mine)(lambda ct: ct)
    try:
        (row,) = [row for row in fb.coverage() if row.primitive == "a_primitive_of_mine"]
        assert row.kind == "hand-written" and row.where == __name__
    finally:
        TABLE.pop(mine)


def test_prints_as_a_table():
    lines = str(fb.coverage()).splitlines()
    assert re.match(r"sin +hand-written +fbackprop.rules.elementwise", lines[_index(lines, "sin ")])


def _index(lines, start):
    return next(i for i, line in enumerate(lines) if line.startswith(start))


def test_the_page_is_true():
    """To the letter on the JAX that it was made with; row by row for what other JAX shares."""
    text = PAGE.read_text()
    (version,) = re.findall(r"primitive of JAX ([0-9.]+[0-9])", text)
    if version == jax.__version__:  # in a process of its own: other tests add primitives
        command = [sys.executable, "-m", "experiments.coverage"]
        made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert made.stdout == text
    listed = dict(re.findall(r"^\| `(\w[\w-]*)` \| ([\w -]+) \|", text, re.MULTILINE))
    for row in fb.coverage():
        assert listed.get(row.primitive, row.kind) == row.kind, row
