"""How far the notebooks are: one bar in a terminal, lines elsewhere."""

import io
import sys

from kfac_viz.command.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work() -> None:
    with Progress(["01_one", "02_two"], [3, 4]) as progress:
        progress.start(0, 1)
        progress.start(1, 1)
        progress.start(1, 3)
        progress.end(0, "failed")
        progress.end(1, "done")


def test_lines_where_nobody_watches(capsys):
    work()
    said = capsys.readouterr()
    assert said.out == "01_one: started\n02_two: started\n01_one: failed\n02_two: done\n" and said.err == ""


def test_one_bar_over_all_cells_in_a_terminal(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    work()
    bars = err.getvalue().split("\r")
    assert "01_one: failed" in out.getvalue() and "started" not in out.getvalue()
    assert any("7/7" in bar for bar in bars) and any("/7 [00:" in bar for bar in bars)
