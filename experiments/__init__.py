"""Scripts a researcher runs: ``python -m experiments.NAME --help`` says what each one does.

Every gradient in them comes from :mod:`fbackprop`.
"""

from importlib.util import find_spec

_missing = [name for name in ("matplotlib", "rich", "sklearn", "tyro") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"the experiments need {', '.join(_missing)}: pip install 'fbackprop[experiments]'"
    )
