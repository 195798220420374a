"""Other rounding: what is told of a figure that moved, and of one that stays."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kfac_viz.checkout import ROOT
from kfac_viz.command import perturb as module
from kfac_viz.command.main import main
from kfac_viz.command.perturb import REDRAWN, moved, perturb
from kfac_viz.problems.rounding import VARIABLE
from kfac_viz.studies import NOTEBOOKS

FIGURES, STEM = ROOT / "figures", "09_layer_overlap"


def copy(folder: Path, stem: str = STEM) -> Path:
    for suffix in ("csv", "json"):
        shutil.copy(FIGURES / f"{stem}.{suffix}", folder)
    return folder


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if stem not in ("00_playground", *REDRAWN)])
def test_the_published_figure_stays_as_it_is(stem, tmp_path):
    assert moved(stem, copy(tmp_path, stem)) == []


def change(folder: Path, factor: float) -> None:
    """Multiply the overlap of layers after training, which the verdict rounds to 5.4, in every row that has it."""
    file = folder / f"{STEM}.csv"
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    changed = [row for row in rows if f"{float(row['median']):.1f}" == "5.4"]
    assert changed
    for row in rows:
        for name in ("median", "low", "high"):
            if f"{float(row[name]):.1f}" == "5.4":
                row[name] = f"{factor * float(row[name]):.4g}"
    with file.open("w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_number_in_prose_that_moves_is_told_with_its_row(tmp_path):
    change(copy(tmp_path), 1.1)
    (found,) = moved(STEM, tmp_path)
    assert re.fullmatch(r"5\.4 in its prose: row .*: 5\.9\d* for 5\.[34]\d*", found)


def test_a_number_that_stays_the_same_to_the_digits_shown_is_not_told(tmp_path):
    change(copy(tmp_path), 1 + 1e-6)
    assert moved(STEM, tmp_path) == []


def test_a_headline_that_moves_is_told(tmp_path):
    record = copy(tmp_path) / f"{STEM}.json"
    said = json.loads(record.read_text())
    record.write_text(json.dumps(said | {"headline": "Another one"}))
    assert moved(STEM, tmp_path) == [f"headline: Another one for {said['headline']}"]


def test_every_study_that_computes_is_run_with_each_rounding(tmp_path, monkeypatch, capsys):
    seen = []

    def run(command, env):
        out = Path(command[command.index("--out") + 1])
        seen.append((command[4 : command.index("--out")], env.get(VARIABLE), env.get("MKL_CBWR")))
        for stem in seen[-1][0]:
            copy(out, stem)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert perturb([STEM, *REDRAWN, "05_two_levels"], 1) == 0
    assert [stems for stems, *_ in seen] == [[STEM, "05_two_levels"]] * 2
    assert [rest for _, *rest in seen] == [[None, "COMPATIBLE"], ["1", None]]
    assert capsys.readouterr().out.count("headline and numbers stay") == 4


def test_a_notebook_that_fails_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(module.subprocess, "run", lambda command, env: subprocess.CompletedProcess(command, 1))
    assert perturb([STEM], 1) == 1 and "no record" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["-p", "damping=0.1"], ["--out", "elsewhere"]])
def test_it_compares_with_what_is_published(words, capsys):
    assert main(["figures", STEM, "--perturb", *words]) == 2
    assert "--perturb" in capsys.readouterr().err
