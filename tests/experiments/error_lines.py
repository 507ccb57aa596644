"""What a script says of bad input."""


def one_error_line(capsys) -> str:
    """What was written to stderr, which must be one line of error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
