"""Text that ships with Python: the Zen of Python and the licence, cut into windows of characters.

The text depends on the interpreter, not on the day: every Python has the Zen and a copyright
notice; the licence is added where the standard library or the folder above it holds its file.
"""

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path

import numpy as np

from experiments.datasets import TEST_FRACTION, Dataset

LENGTH = 32  # characters that a window predicts
STRIDE = 16  # windows overlap by half, so that most characters are predicted in two contexts


def text() -> str:
    """The whole text."""
    return "\n\n".join([zen(), sys.copyright, *licence()])


def zen() -> str:
    """The Zen of Python, which the module ``this`` holds in code and prints when imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def licence() -> list[str]:
    """The licence of this Python, if its file is there: at most one text."""
    library = Path(os.__file__).parent
    names = [folder / name for folder in (library.parent, library) for name in _LICENCE_FILES]
    return [file.read_text(encoding="utf-8") for file in names if file.is_file()][:1]


_LICENCE_FILES = ("LICENSE.txt", "LICENSE")  # where the builtin `license` looks, too


def characters() -> Dataset:
    """Windows of the text, inputs (N, 32) and targets (N, 32): each character's successor.

    The last fifth of the text is the test part; no window reaches across. The classes are the
    characters of the whole text in order.
    """
    whole = text()
    alphabet, codes = np.unique(list(whole), return_inverse=True)
    border = round(len(codes) * (1 - TEST_FRACTION))
    train, test = _windows(codes[:border], STRIDE), _windows(codes[border:], LENGTH)
    classes = tuple(str(character) for character in alphabet)
    return Dataset("text", classes, train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])


def _windows(codes: np.ndarray, stride: int) -> np.ndarray:
    """Shape (N, 33): a window and one character more."""
    return np.lib.stride_tricks.sliding_window_view(codes, LENGTH + 1)[::stride].astype(np.int32)
