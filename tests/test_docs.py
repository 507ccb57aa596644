"""The documentation is true: every example runs, every public name is in the reference."""

import doctest
import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import fbackprop as fb

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [m.name for m in pkgutil.walk_packages(fb.__path__, "fbackprop.")]


LONG = (
    "third-party.md", "quantities.md", "optimizers.md", "estimators.md", "networks.md",
    "fbackprop.networks", "fbackprop.estimators",
)  # fmt: skip


def brief_first(items, name):
    """The long ones marked: they run once."""
    return [pytest.param(x, marks=pytest.mark.slow) if name(x) in LONG else x for x in items]


@pytest.mark.parametrize("page", brief_first(PAGES, lambda p: p.name), ids=lambda p: p.name)
def test_examples_of_the_page_run(page):
    assert doctest.testfile(str(page), module_relative=False).failed == 0


@pytest.mark.parametrize("name", brief_first(["fbackprop", *MODULES], str))
def test_examples_of_the_module_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("package", [fb, fb.credit, fb.optim], ids=lambda p: p.__name__)
def test_every_public_name_is_in_the_reference(package):
    """A function that its module is named after is listed by way of the module."""
    listed = re.findall(r"^::: (.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name, value in vars(package).items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            path = f"{package.__name__}.{name}"
            shadowed = path in sys.modules
            assert (f"{path}.{name}" if shadowed else path) in listed


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
