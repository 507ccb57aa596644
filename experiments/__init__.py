"""Scripts a researcher runs: ``python -m experiments.NAME --help`` says what each one does.

Every gradient in them comes from :mod:`fbackprop`.
"""

import sys
from importlib.util import find_spec

_missing = [name for name in ("matplotlib", "rich", "sklearn", "tyro") if find_spec(name) is None]
if _missing:
    _said = f"the experiments need {', '.join(_missing)}: pip install -e '.[experiments]'"
    if sys.argv[:1] == ["-m"]:  # one of them is run
        raise SystemExit(f"error: {_said}")
    raise ImportError(_said)
