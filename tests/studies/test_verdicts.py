"""Every number of a verdict stands in the data beside its figure, and a verdict is short."""

import json
import re

import pytest
from verdicts import ROOT, data, is_there, numbers, verdict

from kfac_viz.studies import NOTEBOOKS

SHORT = tuple(stem for stem in NOTEBOOKS if stem != "00_playground")  # whose verdict has no numbers


RATIOS = ("14_speed",)  # whose verdict divides timings by each other


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if stem not in RATIOS])
def test_every_number_of_a_verdict_is_in_its_data(stem):
    said = numbers(verdict(stem))
    files = [file for suffix in ("csv", "json") for file in (ROOT / "figures").glob(f"{stem}*.{suffix}")]
    if said:
        assert files, f"figures/{stem}*.csv are missing: make figures"
    values = data(files)
    assert [number for number in said if not is_there(number, values)] == []


@pytest.mark.parametrize("stem", SHORT)
def test_a_verdict_is_short(stem):
    assert 0 < len(verdict(stem).split()) <= 120
    assert 0 < len(numbers(verdict(stem))) <= 6


def findings() -> list[tuple[str, list[str]]]:
    """What README's table of findings says, and the files that it names for it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| <img[^|]*> \| \[[^|]*\?\]\([^|]*\) \| ([^|]*) \| (\[`[^|]*) \|$", text, flags=re.MULTILINE)
    return [(finding, re.findall(r"\[`([\w/]+\.csv)`\]\(figures/\1\)", files)) for finding, files in rows]


@pytest.mark.parametrize(("finding", "files"), findings())
def test_every_number_of_a_finding_is_in_the_file_that_is_named(finding, files):
    values = data(ROOT / "figures" / name for name in files)
    assert files and numbers(finding)
    assert [number for number in numbers(finding) if not is_there(number, values)] == []


def test_every_number_of_the_two_questions_is_in_the_data_of_the_notebooks_that_they_name():
    cells = json.loads((ROOT / "notebooks" / "08_coarse_space_sizes.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = (s for s in ("".join(cell["source"]) for cell in cells) if s.startswith("## Two questions"))
    named = [*re.findall(r"\]\((\w+)\.ipynb\)", text), "08_coarse_space_sizes"]
    values = data(ROOT / "figures" / f"{stem}.csv" for stem in named)
    said = numbers(re.sub(r"\[[^]]*\]\([^)]*\)", "", text))
    assert len(said) >= 12 and [number for number in said if not is_there(number, values)] == []


def test_every_number_of_the_hessian_is_in_its_data():
    cells = json.loads((ROOT / "notebooks" / "01_fisher.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = (s for s in ("".join(cell["source"]) for cell in cells) if s.startswith("## Is the Fisher the Hessian?"))
    values = data([ROOT / "figures" / "01_fisher_hessian.csv"])
    said = numbers(re.sub(r"\$\$.*?\$\$|!\[[^]]*\]\([^)]*\)", "", text, flags=re.DOTALL))
    assert len(said) >= 12 and [number for number in said if not is_there(number, values)] == []


def test_what_a_seat_costs_is_in_the_file_that_is_named():
    said = re.search(r"A seat takes .*?\(`benchmarks/classroom\.csv`\)", readme(), flags=re.DOTALL)[0]
    values = data([ROOT / "figures" / "benchmarks" / "classroom.csv"])
    found = numbers(said.replace("`benchmarks/classroom.csv`", ""))
    assert len(found) == 4 and all(is_there(number, values) for number in found)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_a_finding_for_each_notebook_and_is_short():
    assert len(findings()) == len(NOTEBOOKS) - 1  # the playground asks nothing
    for stem in NOTEBOOKS:
        assert f"(notebooks/{stem}.ipynb)" in readme() and f'<img src="figures/{stem}.' in readme()
    prose = re.sub(r"```.*?```|<img[^>]*>|!\[[^]]*\]\([^)]*\)|\]\([^)]*\)", " ", readme(), flags=re.DOTALL)
    assert len(re.findall(r"\w[\w'’.,·−-]*", re.sub(r"`[^`]*`", " x ", prose))) <= 1000


def test_the_ten_lines_print_what_stands_under_them(capsys):
    code, printed = re.search(r"```python\n(.*?)```\s*```text\n(.*?)```", readme(), flags=re.DOTALL).groups()
    assert len(code.splitlines()) == 10
    exec(code, {})
    found, told = (re.findall(r"\d+\.?\d*(?:e-\d+)?|[A-Za-z]+", text) for text in (capsys.readouterr().out, printed))
    assert len(found) == len(told)
    for one, other in zip(found, told, strict=True):
        assert one == other or abs(float(one) - float(other)) <= 0.2 * float(other)


def test_the_gallery_has_every_figure_with_its_headline():
    text = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
    for record in (ROOT / "figures").glob("*.json"):
        told = json.loads(record.read_text(encoding="utf-8"))
        assert f"\n## {told['headline']}\n\n{told['where']}.\n" in text and f"]({record.stem}.png)" in text
        assert all(f"({record.stem}.{kind})" in text for kind in ("svg", "csv", "json"))


def test_what_is_no_number_of_a_verdict_is_left_out():
    """Negative control."""
    assert numbers("In 2020 `x = 3` gave −0.54, $\tfrac12$ and 12 % of 05_coarse; 3 layers.") == ["−0.54", "12 %", "3"]
    assert not is_there("0.55", {0.5431}) and not is_there("−0.54", {0.5431}) and is_there("−0.54", {-0.5431})
    assert is_there("15 %", {0.1501}) and is_there("1.6·10⁻⁸", {1.61e-8}) and not is_there("1.6·10⁻⁷", {1.61e-8})
