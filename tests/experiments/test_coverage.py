"""The page on coverage, written and printed."""

from experiments import coverage


def test_writes_what_it_prints(tmp_path, capsys):
    assert coverage.main([]) == 0
    printed = capsys.readouterr().out
    assert coverage.main(["--write", "--to", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == printed
    assert "| `sin` | hand-written |" in printed


def test_a_place_that_is_not_there_is_one_line(tmp_path, capsys):
    assert coverage.main(["--write", "--to", str(tmp_path / "nowhere" / "page.md")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert coverage.main(["--to", str(tmp_path / "page.md")]) == 2
    assert "give --write" in capsys.readouterr().err
