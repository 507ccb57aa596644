"""Scripts a researcher runs: ``python -m experiments.NAME --help`` says what each one does.

Every gradient in them comes from :mod:`fbackprop`.
"""
