"""Every notebook: as it must be committed, and headless from top to bottom with small parameters."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

import kfac_viz as kv
from kfac_viz import parameters
from kfac_viz.studies import NOTEBOOKS

FOLDER = Path(__file__).parents[2] / "notebooks"
NETWORK = dict(widths=[5, 4], n=40)
SMALL = {  # everything else as published
    "00_playground": NETWORK | dict(per_layer=2),
    "01_fisher": NETWORK | dict(repeats=1),
    "02_kfac": NETWORK | dict(repeats=1),
    "03_kronecker_products": dict(n=50, steps=2, repeats=1),
    "04_damping": NETWORK | dict(repeats=1, steps=2),
    "05_two_levels": dict(local=8, subdomains=[2, 4], shown=3, clusters=[2, 5], n=60, repeats=1),
    "07_coarse_space": NETWORK | dict(per_layer=2),
    "06_one_step": NETWORK | dict(per_layer=2),
    "08_coarse_space_sizes": NETWORK | dict(sizes=[0, 1, 2], repeats=1),
    "09_layer_overlap": dict(widths=[4, 4], n=40, steps=2, repeats=1),
    "10_depth": dict(layers=[2, 3], width=6, n=60, steps=2, repeats=1, networks=["planted"], measured=""),
    "11_solving": {},
    "12_training": {},
    "13_published": {},
    "14_speed": {},
    "15_pde": dict(widths=[6, 5], points=20, steps=4, at_step=3, per_layer=2),
    "16_which_method": {},
}


def read(stem):
    return nbformat.read(FOLDER / f"{stem}.ipynb", as_version=nbformat.NO_CONVERT)


def published(stem):
    """Names of the figures that a notebook saves: its own, and those that add a word to it."""
    figures = sorted(path.stem for path in (FOLDER.parent / "figures").glob(f"{stem}*.json"))
    return [name for name in figures if f"{name}_".startswith(f"{stem}_")]


def test_every_notebook_is_on_the_shelf():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


def test_below_the_panel_of_the_class_nothing_needs_a_kernel():
    nb = nbformat.read(FOLDER / "class" / "playground.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(nb)
    assert [cell.cell_type for cell in nb.cells] == ["markdown", "code", "markdown"]
    assert nb.cells[1].outputs == [] and nb.cells[1].execution_count is None
    names: dict = {}
    *lines, panel = ast.parse(nb.cells[1].source).body
    exec(compile(ast.Module(lines, []), "class", "exec"), names)
    assert eval(compile(ast.Expression(panel.value), "class", "eval"), names).error == ""
    assert "../" not in "".join(cell.source for cell in nb.cells)  # Voila shows nothing from other folders


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_committed_notebook_is_clean(stem):
    nb = read(stem)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5)
    assert set(nb.metadata) <= {"kernelspec", "language_info"} and nb.metadata.kernelspec.name == "python3"
    assert 10 <= len(nb.cells) <= 16  # one question, one sitting
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ") and "?" in nb.cells[0].source
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == len(ids)
    for cell in nb.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.execution_count is None and cell.outputs == []
            tree = ast.parse(cell.source)
            assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(tree))


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_parameters_are_those_of_the_experiment(stem):
    tagged = [cell.source for cell in read(stem).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    given = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(tagged[0]).body}
    assert given.pop("out_dir") == ""  # who reads a notebook, or is served it, writes nothing
    defaults = {name: p.default for name, p in inspect.signature(NOTEBOOKS[stem].run).parameters.items()}
    assert list(given) == list(defaults)
    assert parameters.check(NOTEBOOKS[stem].run, given) == parameters.check(NOTEBOOKS[stem].run, defaults)


@pytest.fixture(scope="module")
def kernel():
    """A kernel of this environment, not the user's of the same name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
        manager, client = start_new_kernel(startup_timeout=120, kernel_name="python3")
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def execute(kernel, tmp_path):
    """Executes a notebook in a folder. All take one kernel, whose imports cost most; none finds another's names."""
    import papermill

    def execute(stem, folder=FOLDER, **values):
        client = kernel.blocking_client()  # closed before papermill connects: two would have one identity
        client.start_channels()
        client.execute_interactive(f"%reset -f\n%cd -q {folder}", timeout=60)
        client.stop_channels()
        return papermill.execute_notebook(
            FOLDER / f"{stem}.ipynb", tmp_path / "executed.ipynb", SMALL[stem] | values, kernel_name="python3",
            progress_bar=False, store_widget_state=False, execution_timeout=300, km=kernel,
        )  # fmt: skip

    return execute


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_runs_from_top_to_bottom(stem, tmp_path, execute):
    executed = execute(stem, out_dir=str(tmp_path / "out"))
    records = sorted((tmp_path / "out").glob("*.json"))
    assert [record.stem for record in records] == published(stem), "the playground writes its page alone"
    assert all(path.stat().st_size > 100 for path in (tmp_path / "out").iterdir())
    for record in records:
        assert record.name.startswith(stem)
        written = json.loads(record.read_text(encoding="utf-8"))
        assert written["alt"] and written["versions"]["torch"]
        for name, value in written["parameters"].items():
            if name in SMALL[stem]:
                assert value == SMALL[stem][name], name
        for suffix in ("png", "svg", "csv"):
            assert record.with_suffix(f".{suffix}").stat().st_size > 100
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert "put your answer in place of None" in said
    assert not any(output.get("name") == "stderr" for output in outputs), "a warning that a reader would meet"
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) == len(records)  # the figure stands in the notebook, too, and no panel where nobody looks


def test_papermill_as_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    typed = ["-p", "widths", "[5, 4]", "-p", "n", "40.0", "-p", "repeats", "1", "-r", "steps", "2",
             "-y", "{damping: 1e-3}", "-p", "out_dir", str(tmp_path / "out")]  # fmt: skip
    files = [str(FOLDER / "04_damping.ipynb"), str(tmp_path / "executed.ipynb")]
    command = [sys.executable, "-m", "papermill", *files, *typed, "--cwd", str(FOLDER), "-k", "python3"]
    subprocess.run(command, check=True, capture_output=True)
    written = json.loads((tmp_path / "out" / "04_damping.json").read_text())["parameters"]
    assert {"widths": [5, 4], "n": 40, "repeats": 1, "steps": 2, "damping": 1e-3}.items() <= written.items()


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_notebook_that_uses_its_parameters_itself_takes_them_first(stem):
    """A study checks what it is given; elsewhere a text that papermill handed over would be used as it is."""
    trees = [ast.parse(cell.source) for cell in read(stem).cells if cell.cell_type == "code"]
    known, used = set(inspect.signature(NOTEBOOKS[stem].run).parameters), set()
    for tree in trees:
        given = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and _is_checked(tree, node)}
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in given]
        used |= {name.id for name in names} & known - {name.id for name in names if isinstance(name.ctx, ast.Store)}
    takes = f"kv.studies.take(kv.studies.{NOTEBOOKS[stem].__name__.rpartition('.')[2]}.run, globals())"
    first = next(cell.source for cell in read(stem).cells if "import kfac_viz as kv" in cell.source)
    assert not used or takes in first, used


def _is_checked(tree, keyword):
    """Whether the call that has this keyword checks what it is given: a study, a panel, or a dict for these."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and keyword in node.keywords]
    return any(re.match(r"(kv\.studies\.\w+\.run|kv\.panel|dict$)", ast.unparse(call.func)) for call in calls)


def test_a_folder_that_papermill_took_for_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = kv.studies.fisher.run(widths=(4,), n=40, repeats=1)
    figure = kv.studies.fisher.Plot.draw(result)
    for name in (2024, 0, False, 1.5):
        with pytest.raises(TypeError, match=f"name of a folder; got {name} of type .* -r out_dir {name} for papermill"):
            kv.save(figure, result, "01_fisher", name)
        with pytest.raises(TypeError, match="name of a folder"):
            kv.pages.save_page(kv.studies.coarse_space.run, "00_playground", name)
    assert not list(tmp_path.iterdir())
    assert not kv.save(figure, result, "01_fisher", None).paths


def test_a_notebook_that_is_run_by_hand_writes_nothing(tmp_path, execute):
    here = tmp_path / "checkout" / "notebooks"
    here.mkdir(parents=True)
    executed = execute("00_playground", folder=here)
    assert list((tmp_path / "checkout").rglob("*")) == [here]
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" for output in outputs)  # the kernel would not repeat it elsewhere
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1  # the panel's


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_the_notation_is_linked_from_the_first_cell(stem):
    assert "(notation.md)" in read(stem).cells[0].source


@pytest.mark.parametrize("stem", [stem for stem in NOTEBOOKS if stem != "00_playground"])
def test_the_published_figure_stands_in_the_first_cell_and_others_below(stem):
    words = [cell.source for cell in read(stem).cells]
    for name, text in zip(published(stem), [words[0], "\n".join(words[1:])], strict=False):
        record = json.loads((FOLDER.parent / "figures" / f"{name}.json").read_text(encoding="utf-8"))
        assert f"\n![{record['headline']}](../figures/{name}.png)\n" in text
        assert (FOLDER.parent / "figures" / f"{name}.png").exists()


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_solution_begins_with_the_answer(stem):
    """So that a reader without a kernel can check it; a text stands in quotes of code, and an array is not printed."""
    code = "\n".join(cell.source for cell in read(stem).cells if cell.cell_type == "code")
    asked = re.findall(r'exercises\.check\("(\w+)", answer_(\w)\)', code)
    (solutions,) = (cell.source for cell in read(stem).cells if cell.source.startswith("<details>"))
    assert asked
    for label, letter in asked:
        if label != "01b":
            number, word = re.search(rf"\*\*{letter}\.\*\* (?:(−?[\d.]*\d)|`([\w-]+)`)[.,:;]", solutions).groups()
            answer = word or float(number.replace("−", "-"))
            assert kv.exercises.check(label, answer) == f"Exercise {label}: right.", answer


def test_the_playground_shows_no_file():
    """Voila refuses a picture outside of the notebook's folder; there the panel itself is on top."""
    assert "../figures" not in read("00_playground").cells[0].source


def test_the_notation_names_what_there_is():
    """Every name of the package in the table exists, and every letter stands in one row of its table."""
    text = (FOLDER / "notation.md").read_text(encoding="utf-8")
    names = re.findall(r"`kv\.([\w.]+)", text)
    assert len(names) > 12
    for name in names:
        found = kv
        for part in name.rstrip(".…").split("."):
            found = getattr(found, part)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| symbol")]
    words = [row.split("|")[1].strip() for row in rows]
    assert len(words) == len(set(words)) > 30
    assert all(len(row.split(" | ")) >= 3 for row in rows)
