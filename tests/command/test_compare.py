"""A published number that is moved by twice its tolerance is told, in every figure; what lies within it is not."""

import csv
import io
import json
import re
import zlib
from pathlib import Path

import pytest
import torch

import kfac_viz as kv
from kfac_viz.command.compare import DATA, DIFFERS, NEW, SAME, WITHIN, compare
from kfac_viz.command.prose import data, is_there, numbers, unit_of, verdict
from kfac_viz.show.files import sha256
from kfac_viz.show.tolerance import Tolerance
from kfac_viz.studies import NOTEBOOKS

FIGURES = Path(__file__).parents[2] / "figures"
RECORDED = [stem for stem in NOTEBOOKS if stem != "00_playground"]
PAGES = ("00_playground", "15_pde")
REDRAWN = ("11_solving", "12_training", "13_published", "14_speed", "16_which_method")  # from measured tables


def published(stem: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in FIGURES.glob(f"{stem}.*")}


def record_of(stem: str) -> dict:
    return json.loads((FIGURES / f"{stem}.json").read_text(encoding="utf-8"))


def table_of(stem: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((FIGURES / f"{stem}.csv").read_text(encoding="utf-8"))))


def tolerance_of(record: dict, row: dict[str, str]) -> Tolerance:
    stated = record["tolerances"].get(row.get("quantity"))
    return Tolerance(**stated) if stated else Tolerance()


def written(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def with_table(files: dict[str, bytes], stem: str, rows: list[dict[str, str]]) -> dict[str, bytes]:
    """The figure as if it had been made with this table."""
    record = json.loads(files[f"{stem}.json"])
    table = written(rows)
    record["files"][f"{stem}.csv"] = sha256(table)
    return files | {f"{stem}.csv": table, f"{stem}.json": json.dumps(record).encode()}


def moved(record: dict, row: dict[str, str], names, times: float) -> dict[str, str]:
    """The row with these of its values so many tolerances away."""
    tolerance = tolerance_of(record, row)
    return row | {name: repr(tolerance.beyond(float(row[name]), times)) for name in names}


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_figure_is_the_same_as_itself(stem):
    assert compare(published(stem), FIGURES) == (SAME, "")


@pytest.mark.parametrize("stem", RECORDED)
def test_every_value_that_moves_by_twice_its_tolerance_differs(stem):
    """All of them at once, which are counted; then some one by one, which are told with their row."""
    record, rows, files = record_of(stem), table_of(stem), published(stem)
    names = [[name for name in record["values"] if row[name] not in ("", "inf") and (
        float(row[name]) or tolerance_of(record, row).absolute)] for row in rows]  # fmt: skip
    cells = [(i, name) for i, found in enumerate(names) for name in found]
    assert len(cells) > 0.7 * len(rows)
    far = [moved(record, row, found, 2) for row, found in zip(rows, names, strict=True)]
    finding = compare(with_table(files, stem, far), FIGURES)
    assert finding.verdict == DIFFERS and finding.words.endswith(f"; and {len(cells) - 1} more")
    for i, name in cells[:: len(cells) // 3]:
        place = ", ".join(value for key, value in rows[i].items() if key not in record["values"] and value)
        for times, expected in ((2, DIFFERS), (0.5, WITHIN)):
            other = [*rows[:i], moved(record, rows[i], [name], times), *rows[i + 1 :]]
            finding = compare(with_table(files, stem, other), FIGURES)
            assert finding.verdict == expected and finding.words.startswith(f"row {place}, {name}: ")
            assert f" for {rows[i][name]}" in finding.words


@pytest.mark.parametrize("stem", RECORDED)
def test_headline_and_verdict_are_true_at_both_ends_of_the_tolerances(stem):
    """Wherever such a number comes from a value of the table, both ends are within one unit of the last digit that is
    written: a headline that says 0.94 is of a value that may not move by more than 0.01."""
    record, chosen = record_of(stem), data([FIGURES / f"{stem}.json"])
    cells = [(float(row[name]), tolerance_of(record, row)) for row in table_of(stem) for name in record["values"]
             if row[name]]  # fmt: skip
    said = dict.fromkeys([*numbers(record["headline"]), *numbers(verdict(stem))])
    for number in (number for number in said if not is_there(number, chosen)):
        found = [(value, tolerance) for value, tolerance in cells if is_there(number, {value})]
        slack = [max(tolerance.absolute, tolerance.relative * abs(value)) for value, tolerance in found]
        assert not found or min(slack) <= unit_of(number) * 1.0001, number


@pytest.mark.parametrize("stem", [stem for stem in RECORDED if stem not in REDRAWN])
def test_each_quantity_that_is_computed_states_its_tolerance(stem):
    quantities = {row["quantity"] for row in table_of(stem)} - {"seconds"}
    stated = {name for name in quantities if name in record_of(stem)["tolerances"]}
    measured = re.compile("columns, |errors, |map, |peers, |step$|counted$")  # or counted from whole numbers
    assert {name for name in quantities - stated if not measured.match(name)} == set()
    assert record_of(stem)["tolerances"] == {q: t._asdict() for q, t in NOTEBOOKS[stem].Result.tolerances.items()}


@pytest.mark.parametrize("stem", PAGES)
def test_a_page_is_compared_by_its_data(stem):
    files = published(stem)
    page = files[f"{stem}.html"].decode()
    held = json.loads(DATA.search(page)[0])

    def changed(change) -> str:
        other = json.loads(json.dumps(held))
        change(other)
        text = json.dumps(other)
        return compare(files | {f"{stem}.html": DATA.sub(lambda _: text, page).encode()}, FIGURES)

    for name, stated in held["tolerances"].items():
        tolerance = Tolerance(**stated)
        for times, verdict_of in ((2, DIFFERS), (0.5, WITHIN)):
            place = []

            def move(other, name=name, tolerance=tolerance, times=times, place=place):
                holder, key = first_number(other, name)
                if holder is not None:
                    holder[key] = tolerance.beyond(holder[key], times)
                    place.append(key)

            finding = changed(move)
            assert not place or (finding.verdict == verdict_of and f"{stem}.html, " in finding.words)
    assert changed(lambda other: other.pop("tolerances")).verdict == DIFFERS
    assert compare(files | {f"{stem}.html": page.replace("<style>", "<style> ").encode()}, FIGURES).verdict == DIFFERS


def first_number(held, name, inside=False):
    """The first number below this name among the data of a page: where it is kept, and under which key."""
    pairs = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
    for key, value in pairs:
        if isinstance(value, float) and value and (inside or key == name):
            return held, key
        if key != "tolerances" and (found := first_number(value, name, inside or key == name))[0] is not None:
            return found
    return None, None


def test_another_picture_of_the_same_numbers_differs():
    """A drawing changes where its code does, or another matplotlib."""
    from PIL import Image, ImageDraw

    for stem, kind in (("05_two_levels", "png"), ("00_playground", "webp")):
        image, picture = Image.open(FIGURES / f"{stem}.{kind}").convert("RGB"), io.BytesIO()
        ImageDraw.Draw(image).text((400, 300), "a word", fill="black")
        image.save(picture, kind)
        finding = compare(published(stem) | {f"{stem}.{kind}": picture.getvalue()}, FIGURES)
        assert finding.verdict == DIFFERS and f"{stem}.{kind}" in finding.words
    files = published("05_two_levels")
    for old, new in ((b"<!-- block Jacobi -->", b"<!-- Jacobi -->"), (b"stroke: #0072b2", b"stroke: #0072b3")):
        assert old in files["05_two_levels.svg"]
        svg = files["05_two_levels.svg"].replace(old, new)
        finding = compare(files | {"05_two_levels.svg": svg}, FIGURES)
        assert finding.verdict == DIFFERS and "05_two_levels.svg" in finding.words


def test_words_parameters_and_tolerances_are_equal():
    stem = "05_two_levels"
    files, record = published(stem), record_of("05_two_levels")
    for name, value in (("headline", "Other words"), ("where", "elsewhere"), ("tolerances", {}),
                        ("parameters", record["parameters"] | {"seed": 1})):  # fmt: skip
        other = json.dumps(record | {name: value}).encode()
        finding = compare(files | {f"{stem}.json": other}, FIGURES)
        assert finding.verdict == DIFFERS and finding.words.startswith(name)
    other = record | {"made_on": {"processor": "another", "BLAS": "another"}, "versions": {"torch": "9"}}
    assert compare(files | {f"{stem}.json": json.dumps(other).encode()}, FIGURES).verdict == SAME


def copied(stem: str, folder: Path) -> dict[str, bytes]:
    files = published(stem)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


def test_published_files_that_were_changed_by_hand(tmp_path):
    files = copied("05_two_levels", tmp_path)
    table = tmp_path / "05_two_levels.csv"
    table.write_bytes(files[table.name].replace(b"poisson,none,2,32,", b"poisson,none,2,42,"))
    assert compare(files, tmp_path) == (DIFFERS, "row poisson, none, 2, median: 32 for 42")
    table.write_bytes(files[table.name].replace(b"poisson,none,2,32,", b"poisson,none,2,32.5,"))
    assert compare(files, tmp_path) == (DIFFERS, "05_two_levels.csv: made for one that its record is not of")


def test_what_is_missing_is_new(tmp_path):
    files = copied("05_two_levels", tmp_path)
    (tmp_path / "05_two_levels.png").unlink()
    assert compare(files, tmp_path) == (NEW, "05_two_levels.png was missing")


@pytest.mark.parametrize(("change", "words"), [
    (lambda text: text.replace("quantity,", "what,"), "columns: quantity, series, x, median, low, high for what"),
    (lambda text: "quantity,series,x,value\npoisson,none,2,32.0\n", "in a table of another version"),
    (lambda text: re.sub(r"poisson,none,2,.*\n", "", text), "row poisson, none, 2: a row for no such row"),
    (lambda text: text + "poisson,none,64,1,1,1\n", "row poisson, none, 64: no such row for a row"),
    (lambda text: text.replace("poisson,none,2,32,", "poisson,none,2,many,"), "32 for many"),
    (lambda text: text + "poisson,none,2,33,32,32\n", "row poisson, none, 2, again: no such row for a row"),
    (lambda text: "", "in a table of another version"),
])  # fmt: skip
def test_a_published_table_of_another_version(tmp_path, change, words):
    files = copied("05_two_levels", tmp_path)
    table = tmp_path / "05_two_levels.csv"
    table.write_text(change(files[table.name].decode()), encoding="utf-8")
    finding = compare(files, tmp_path)
    assert finding.verdict == DIFFERS and words in finding.words


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"files": 3}', b"\xff", b"[" * 10**5])
def test_a_published_record_that_cannot_be_read(tmp_path, text):
    files = copied("05_two_levels", tmp_path)
    (tmp_path / "05_two_levels.json").write_bytes(text)
    assert compare(files, tmp_path).verdict == DIFFERS


def test_a_published_picture_that_cannot_be_read(tmp_path):
    files = copied("05_two_levels", tmp_path)
    (tmp_path / "05_two_levels.png").write_bytes(zlib.compress(b"no picture"))
    assert "cannot be read" in compare(files, tmp_path).words


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("study", ["fisher", "kfac", "damping", "coarse_space_sizes"])
def test_a_gpu_gives_the_same_within_the_tolerances(study):
    module = getattr(kv.studies, study)
    size = dict(widths=(5, 4), n=40, repeats=1)
    one, other = (module.run(**size, device=device) for device in ("cpu", "cuda"))
    for a, b in zip(one.table().itertuples(), other.table().itertuples(), strict=True):
        assert (a.quantity, a.series, a.x) == (b.quantity, b.series, b.x)
        tolerance = one.tolerances[a.quantity]
        assert all(tolerance.used(getattr(a, name), getattr(b, name)) <= 1 for name in one.values), a
