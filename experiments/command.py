"""The way every script starts and ends: a typed command line, one-line errors, an exit status.

Exit status: 0 success, 1 the script's own failure, 2 a command line that makes no sense,
130 interrupted with Ctrl-C.
"""

import contextlib
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeVar

import tyro
from rich.console import Console

Settings = TypeVar("Settings")

INTERRUPTED = 130
_PLAIN_WIDTH = 120  # columns of a pipe or a file, which have no width of their own


class ExperimentError(Exception):
    """What is wrong and how to mend it, in one line fit for a terminal."""


class UsageError(ExperimentError):
    """Options that contradict each other or the data: exit status 2, like an unknown option."""


def run(
    settings_type: Callable[..., Settings],
    script: Callable[[Settings], int],
    arguments: Sequence[str] | None,
    word: str = "",
) -> int:
    """Parse the command line into ``settings_type``, call ``script`` on it, return the exit status.

    Args:
        settings_type: a dataclass; each field is an option, its docstring the help text.
        script: what to do with the settings; returns its exit status.
        arguments: the words after the script's name, ``None`` for those of this process.
        word: what stands between the script's name and these, of a script that does several things.

    Returns:
        the exit status; errors that a user can mend end in one line on stderr, not a traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a Greek letter more than they can write is no failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return script(_parse(settings_type, arguments, word))
    except SystemExit as leaving:  # --help
        return int(leaving.code or 0)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ExperimentError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        print(f"error: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interruption:
        print(": ".join(["interrupted", *map(str, interruption.args)]), file=sys.stderr)
        return INTERRUPTED


def leave(status: int) -> NoReturn:
    """End the process with this exit status."""
    if status == INTERRUPTED:
        # XLA may still be computing, and crashes if the interpreter is taken down around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def check_names(what: str, given: Sequence[str], choices: Iterable[str]) -> None:
    """Refuse names that are unknown.

    Raises:
        UsageError: there is such a name among those given.
    """
    choices = list(choices)
    unknown = [name for name in given if name not in choices]
    if unknown:
        raise UsageError(f"no {what} called '{unknown[0]}': choose from {', '.join(choices)}")


def check_seeds(seed: int, seeds: int, option: str = "--seed") -> None:
    """Refuse seeds of which one is no 32-bit integer from zero up."""
    if not 0 <= seed <= 2**31 - seeds:
        raise UsageError(f"{option} must be at least 0, and the last seed below 2³¹")


def prepare_folder(folder: pathlib.Path, files: Sequence[str] = ()) -> None:
    """Make a folder that can be written to, without these files of an earlier run.

    Raises:
        ExperimentError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            (folder / file).unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ExperimentError(f"cannot write to {folder} ({reason}); give another --out") from None


def terminal() -> Console:
    """A console as wide as the terminal, or of a fixed width where output goes to a file."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False)


def _parse(
    settings_type: Callable[..., Settings], arguments: Sequence[str] | None, word: str
) -> Settings:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(settings_type, args=arguments, prog=_program(sys.argv[0], word))
    except SystemExit as leaving:
        if leaving.code:
            raise UsageError(_first_paragraph(said.getvalue())) from None
        raise


def _program(path: str, word: str) -> str:
    """How an experiment is called, from where it lies."""
    file = pathlib.Path(path)
    ours = file.parent == pathlib.Path(__file__).parent
    name = f"python -m experiments.{file.stem}" if ours else file.name
    return f"{name} {word}".strip()


def _first_paragraph(box: str) -> str:
    """The words of the parser's framed message, without its title and its hints, on one line."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()]
    ruled = ["" if not line.strip("-") else line for line in lines]
    paragraphs = "\n".join(ruled[1:]).strip().split("\n\n")
    message = " ".join(paragraphs[0].split()).rstrip(".") or "the command line makes no sense"
    return f"{message} (--help lists the options)"
