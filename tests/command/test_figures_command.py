"""``python -m kfac_viz``, driven over tiny notebooks that do not import torch."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import kfac_viz.command.main as cli
from kfac_viz import checkout
from kfac_viz.command import publish
from kfac_viz.parameters import Range, Seed

TWICE = """
import json, os, time
from pathlib import Path
folder = Path(out_dir)
(folder / "01_twice.csv").write_text(f"x,twice\\n{x},{2 * x}\\n")
if data:
    Path(data).write_text(str(os.getpid()))
time.sleep(pause)
if x > 5:
    raise RuntimeError("too much")
(folder / "01_twice.png").write_bytes(b"picture of %g" % (2 * x))
(folder / "01_twice.json").write_text(json.dumps({"x": x, "words": words, "values": ["twice"]}))
"""


def run_twice(
    *,
    x: Annotated[float, Range(0, 10)] = 1.0,
    pause: float = 0.0,
    words: tuple[str, ...] = (),
    data: str = "",
    seed: Seed = 0,
) -> None:
    """Twice.

    Args:
        x: what is doubled.
    """


def run_plain(*, seed: Seed = 0) -> None: ...


def write_notebook(path: Path, parameters: str, *code: str, heading: str = "# What is twice x?") -> None:
    cells = [
        new_markdown_cell(f"{heading}\nSome words."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, code),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A checkout with one notebook; returns its root."""
    root = tmp_path / "a checkout"
    parameters = "x = 1.0  # doubled\npause = 0.0\nwords: tuple = ('a', 'b')\ndata = ''\nseed = 0\nout_dir = None"
    root.mkdir()
    write_notebook(root / "notebooks" / "01_twice.ipynb", parameters, TWICE)
    monkeypatch.setattr(cli, "ROOT", root)
    monkeypatch.setattr(cli, "notebooks", lambda: {"01_twice": run_twice})
    return root


@pytest.fixture
def no_kernel(monkeypatch):
    """Whatever happens, happens before a kernel starts."""

    def refuse(orders, workers):
        assert not orders, "a kernel would have been started"
        return iter(())

    monkeypatch.setattr(cli, "run_notebooks", refuse)


def visible(folder: Path) -> set[str]:
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file.as_posix() for file in files if file.parts[0] != ".made"}


def keep(job, out: Path, text: str) -> None:
    """As if the notebook had written this text into each of its files."""
    scratch = publish.scratch_in(out)
    for name in FILES:
        (scratch / name).write_text(text)
    job.keep(scratch, out)


FILES = {"01_twice.csv", "01_twice.json", "01_twice.png"}
HIDDEN = {"lock", "01_twice", "01_twice.ipynb"}


def test_makes_what_is_missing_or_changed_and_nothing_else(shelf, monkeypatch, capsys):
    out = shelf / "figures"
    assert cli.main(["figures", "--jobs", "1"]) == 0
    assert "01_twice: started\n01_twice: done\n1 made, 0 up to date, 0 failed" in capsys.readouterr().out
    assert visible(out) == FILES
    assert {file.name for file in (out / ".made").iterdir()} == HIDDEN
    record = json.loads((out / "01_twice.json").read_text())
    assert record["x"] == 1.0 and record["words"] == ["a", "b"]
    first = {name: (out / name).read_bytes() for name in FILES}

    def why(*given):
        (job,) = cli.plan([], list(given))
        return job.why(out)

    assert why() == why("x=1") == ""
    assert why("x=2", "words=[c]") == "parameters changed"
    assert why("seed=1") == "parameters changed"
    notebook = shelf / "notebooks" / "01_twice.ipynb"
    saved = notebook.read_text()
    notebook.write_text(saved.replace("Some words", "Other words"))
    assert why() == ""  # prose makes no new figure
    notebook.write_text(saved.replace("too much", "far too much"))
    assert why() == "notebook changed"
    notebook.write_text(saved)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "source_hash", lambda: "another source")
        assert why() == "kfac_viz changed"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "version", lambda name: "1.0")
        assert why() == "versions changed"
    measured = out / "benchmarks" / "measured.csv"
    measured.parent.mkdir()
    measured.write_text("seconds\n1\n")
    assert why() == "measured tables changed"
    measured.unlink()
    made = out / ".made" / "01_twice"
    (made / "01_twice.csv").write_text("altered")
    assert why() == "01_twice.csv changed"
    (made / "01_twice.png").unlink()
    assert why() == "01_twice.csv, 01_twice.png changed"
    (made / publish.STAMP).write_text('{"half')
    assert why() == "not made here before"

    assert cli.main(["figures"]) == 0  # a fresh clone without pictures gets the same bytes
    assert {name: (out / name).read_bytes() for name in FILES} == first
    with monkeypatch.context() as patch:
        patch.setattr(cli, "run_notebooks", lambda orders, workers: iter([len(orders)][:0]))
        assert cli.main(["figures"]) == 0
        assert "0 made, 1 up to date" in capsys.readouterr().out
        cli.main(["figures", "--force"])
        assert "asked for" in capsys.readouterr().out


def test_a_grid_makes_a_folder_each_and_a_failure_stops_nothing(shelf, tmp_path, capsys):
    out = tmp_path / "grid"
    assert cli.main(["figures", "01", "-p", "x=7,1,0.5", "words=[c]", "--jobs", "2", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "2 made, 0 up to date, 1 failed" in said.out
    assert "x=7.0/01_twice failed: cell 3: RuntimeError: too much" in said.err
    copy = out / ".made" / "x=7.0" / "01_twice.ipynb"
    assert str(copy) in said.err and "too much" in copy.read_text()
    assert visible(out) == {"index.html"} | {f"x={x}/{name}" for x in (0.5, 1.0) for name in FILES}
    page = (out / "index.html").read_text()
    assert page.count("<img ") == 2 and 'src="x=0.5/01_twice.png" alt="01_twice, x=0.5"' in page
    assert page.index("<th scope=col>x=0.5") < page.index("<th scope=col>x=1.0")  # the grid, parameter by parameter
    assert 'href="x=0.5/01_twice.csv">CSV' in page and 'href="x=1.0/01_twice.json">JSON' in page
    assert json.loads((out / "x=0.5/01_twice.json").read_text())["words"] == ["c"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "y=1"], "01_twice: There is no parameter y; there are x, pause, words, data, seed."),
        (["-p", "sed=1"], "did you mean seed?"),
        (["-p", "x=high"], "01_twice: x must be a number from 0 to 10; got high."),
        (["-p", "x=1,11"], "x must be a number from 0 to 10; got 11."),
        (["-p", "x=nan"], "got nan"),
        (["-p", "words=a,b"], "words is a list, like words=[]; for a grid of lists write words=[a],[b]."),
        (["-p", "x=[1"], "x: '[1' cannot be read"),
        (["-p", "x="], "x: '' cannot be read"),
        (["-p", "x=1", "-p", "x=2"], "for a grid write x=first,second"),
        (["-p", "out_dir=here"], "--out"),
        (["01", "-p", "twice"], "-p needs KEY=VALUE; got 'twice'."),
        (["-p", "=1"], "-p needs KEY=VALUE; got '=1'."),
        ([""], "An empty name "),
        (["-p", "x=1", "01"], "got '01'. Names of notebooks stand before -p."),
        (["02_thrice"], "02_thrice is none of 01_twice."),
        (["2"], "2 is none of 01_twice."),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--publish", "--out", "elsewhere"], "--publish and --check are about the published figures"),
        (["--check", "-p", "x=1,2"], "which neither a grid nor --out makes"),
    ],
)
def test_mistakes_are_told_before_a_kernel_starts(shelf, no_kernel, arguments, words, capsys):
    assert cli.main(["figures", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (shelf / "figures").exists()


def test_an_output_folder_that_cannot_be(shelf, no_kernel, capsys):
    file = shelf / "README.md"
    file.write_text("mine")
    assert cli.main(["figures", "--out", str(file)]) == 2
    said = capsys.readouterr().err
    assert str(file) in said and "Files are written into the folder of --out." in said
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("x = 1.0\nseed = 0\nout_dir = None", "Its parameters cell has no words; it has x, seed."),
        ("x = 11.0\nout_dir = None", "x must be a number from 0 to 10; got 11.0."),
        ("z = 1.0\nout_dir = None", "There is no parameter z"),
        ("x = 1.0", "lacks out_dir"),
        ("x = 0.5 + 0.5\nout_dir = None", "may only assign literals"),
        ("import os", "may only assign literals"),
        ("x, seed = 1, 2", "may only assign literals"),
    ],
)
def test_a_parameters_cell_that_does_not_fit(shelf, no_kernel, cell, words, capsys):
    write_notebook(shelf / "notebooks" / "01_twice.ipynb", cell, TWICE)
    assert cli.main(["figures", "-p", "words=[a]"]) == 2
    assert words in capsys.readouterr().err


def test_notebooks_that_cannot_be_read(shelf, no_kernel, capsys):
    path = shelf / "notebooks" / "01_twice.ipynb"
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    assert cli.main(["figures"]) == 2
    assert "exactly one cell tagged parameters; it has 0" in capsys.readouterr().err
    path.write_text("not JSON")
    assert cli.main(["figures"]) == 2
    assert "cannot be read as a notebook" in capsys.readouterr().err
    path.unlink()
    assert cli.main(["figures"]) == 2
    assert f"The notebook {path} is missing; a fresh checkout has it." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["list"], ["figures"], ["figures", "05", "-p", "damping=1"]])
def test_a_copy_without_its_checkout_says_where_the_notebooks_are(tmp_path, no_kernel, monkeypatch, arguments, capsys):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("The notebooks are in the source checkout only, and this copy of kfac_viz, in ")
    assert said.err.endswith("install from there with: pip install -e .\n") and said.out == ""
    assert not list(tmp_path.iterdir())


def test_tables_that_only_a_checkout_has(tmp_path, monkeypatch):
    from kfac_viz.studies import depth
    from kfac_viz.studies.common import measured

    monkeypatch.setattr(measured, "MEASURED", tmp_path)
    monkeypatch.setattr(depth, "NOTEBOOKS", tmp_path)
    with pytest.raises(ValueError, match="no timings in figures/benchmarks/none.csv; measure them with make bench"):
        measured.measured_rows("none.csv")
    monkeypatch.setattr(checkout.check_checkout, "__defaults__", (tmp_path,))
    for table in (lambda: measured.measured_rows("none.csv"), depth.run):
        with pytest.raises(ValueError, match="Measured tables are in the source checkout only"):
            table()


def test_kernels_import_the_copy_that_the_command_is_of(shelf, tmp_path, monkeypatch):
    """Not another one that was installed into their environment."""
    (tmp_path / "other" / "kfac_viz").mkdir(parents=True)
    (tmp_path / "other" / "kfac_viz" / "__init__.py").write_text("raise RuntimeError('another copy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    code = "import pathlib, kfac_viz.checkout as c\npathlib.Path(out_dir, '01_twice.txt').write_text(c.__file__)"
    write_notebook(shelf / "notebooks" / "01_twice.ipynb", "seed = 0\nout_dir = None", code)
    assert cli.main(["figures"]) == 0
    assert Path((shelf / "figures" / "01_twice.txt").read_text()) == Path(checkout.__file__)


def test_names_may_be_short(monkeypatch, capsys):
    stems = ["00_playground", "01_fisher", "07_coarse_space", "08_coarse_space_sizes", "10_depth"]
    monkeypatch.setattr(cli, "notebooks", lambda: dict.fromkeys(stems, run_plain))
    assert cli.select([]) == stems
    asked = ["7", "07", "coarse_space", "05_coarse_space", "notebooks/07_coarse_space.ipynb"]
    assert cli.select(asked) == ["07_coarse_space"]
    assert cli.select(["sizes"]) == ["08_coarse_space_sizes"]
    told = capsys.readouterr().out
    assert "7: 07_coarse_space\n" in told and "05_coarse_space is called 07_coarse_space now.\n" in told
    with pytest.raises(ValueError, match="may be any of 00_playground, 07_coarse_space"):
        cli.select(["p"])


def test_list_shows_questions_parameters_and_ranges(shelf, capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("01_twice: What is twice x?\n")
    assert "    x=1.0  (a number from 0 to 10)  what is doubled.\n" in shown
    assert "    words=[a,b]  (a list like [], each a text)\n" in shown


def test_measured_data_that_a_parameter_names_counts(shelf):
    path = shelf / "notebooks" / "01_twice.ipynb"
    path.write_text(path.read_text().replace("data = ''", "data = '../timings.csv'"))
    (shelf / "timings.csv").write_text("1")
    (job,) = cli.plan([], [])
    before = job.inputs
    (shelf / "timings.csv").write_text("2")
    after = cli.plan([], [])[0].inputs
    assert before.pop("data") != after.pop("data")
    assert before == after


def test_source_counts_but_not_its_line_endings(tmp_path):
    for name, text in {"unix": b"a = 1\nb = 2\n", "windows": b"a = 1\r\nb = 2\r\n", "other": b"a = 1\nb = 3\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_bytes(text)
    unix, windows, other = (cli.source_hash(tmp_path / name) for name in ("unix", "windows", "other"))
    assert unix == windows != other


def test_every_way_to_fail_is_told_and_the_others_finish(shelf, monkeypatch, capsys):
    ways = {
        "02_nothing": "pass",
        "03_strange": "import pathlib\npathlib.Path(out_dir, '01_twice.csv').write_text('mine now')",
        "04_kernel": "import os\nos._exit(1)",
        "05_too_long": "import time\ntime.sleep(60)",
    }
    for stem, code in ways.items():
        write_notebook(shelf / "notebooks" / f"{stem}.ipynb", "seed = 0\nout_dir = None", code)
    monkeypatch.setattr(cli, "notebooks", lambda: dict.fromkeys(ways, run_plain) | {"01_twice": run_twice})
    monkeypatch.setattr(cli, "CELL_SECONDS", 4)
    assert cli.main(["figures", "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "1 made, 0 up to date, 4 failed" in said.out
    assert "02_nothing failed: It must write files whose names begin with 02_nothing" in said.err
    assert "03_strange failed" in said.err and "it wrote 01_twice.csv." in said.err
    assert "04_kernel failed: cell 3: DeadKernelError" in said.err
    assert "05_too_long failed: cell 3: CellTimeoutError" in said.err
    assert visible(shelf / "figures") == FILES
    assert (shelf / "figures" / "01_twice.csv").read_text() == "x,twice\n1.0,2.0\n"


def test_a_kernel_that_fails_to_start_gets_a_second_try(shelf, tmp_path, monkeypatch):
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    failed_once = tmp_path / "failed once"
    script = f'[ -e "{failed_once}" ] || {{ touch "{failed_once}"; exit 1; }}; '
    script += f'exec "{sys.executable}" -m ipykernel -f "$0"'
    argv = ["sh", "-c", script, "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert cli.main(["figures"]) == 0
    assert failed_once.exists() and visible(shelf / "figures") == FILES


def start(shelf: Path, *arguments: str, command: str = "figures", **streams: int) -> subprocess.Popen:
    """The command as a process of its own."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport kfac_viz.command.main as cli, test_figures_command as here\n"
        f"cli.ROOT = Path({str(shelf)!r}); cli.notebooks = lambda: {{'01_twice': here.run_twice}}\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", program, command, *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **streams)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_leaves_nothing_half_written(shelf, how):
    out = shelf / "figures"
    process_id = shelf / "pid"
    run = start(shelf, "-p", "pause=300", f"data={process_id}")
    wait_for(lambda: process_id.exists() and process_id.read_text())
    assert list(out.glob(".made/making-*/01_twice.csv"))  # the first of three files is written
    run.send_signal(how)
    run.communicate(timeout=60)  # it does not wait for the notebook, which takes five minutes
    assert run.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how]
    assert visible(out) == set()
    assert cli.main(["figures"]) == 0
    assert visible(out) == FILES
    assert not list(out.glob(".made/making-*"))
    wait_for(lambda: not alive(int(process_id.read_text())))  # nothing is left that goes on computing


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process_id}/stat")  # a zombie that nobody waits for has ended, too
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_killed_while_files_are_moved_the_next_run_finishes(shelf, no_kernel, monkeypatch):
    out = shelf / "figures"
    (job,) = cli.plan([], [])
    with publish.only_run_in(out):
        keep(job, out, "{}")
        moved = []

        def replace(source, target):
            if moved:
                raise KeyboardInterrupt
            moved.append(target)
            os.rename(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", replace)
            cli.settle(job, out, publish=False)
    assert len(visible(out)) == 1
    assert cli.main(["figures"]) == 0  # without a kernel
    assert visible(out) == FILES and not job.why(out)


def test_two_runs_that_meet_do_the_work_once(shelf):
    runs = [start(shelf, "-p", "pause=3") for _ in range(2)]
    said = sorted(run.communicate(timeout=120)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("1 made, 0 up to date" in text for text in said) == 1
    assert sum("0 made, 1 up to date" in text and "waiting for it" in text for text in said) == 1
    assert visible(shelf / "figures") == FILES


def test_plain_papermill_does_the_same(shelf, tmp_path):
    out = tmp_path / "plain"
    out.mkdir()
    files = [shelf / "notebooks" / "01_twice.ipynb", tmp_path / "run.ipynb"]
    command = [sys.executable, "-m", "papermill", *files, "-p", "x", "3", "-p", "out_dir", out]
    subprocess.run(command, check=True, capture_output=True)
    assert (out / "01_twice.csv").read_text() == "x,twice\n3,6\n"


def test_a_kernel_that_never_starts_is_told(shelf, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_notebooks", lambda orders, workers: iter([(0, {"error": "RuntimeError: no kernel"})]))
    assert cli.main(["figures"]) == 1
    assert "01_twice failed: RuntimeError: no kernel" in capsys.readouterr().err


STAMPS = ["{}", "[]", "null", "3", '"x"', '{"inputs": []}', '{"inputs": {}, "files": [1]}', "[" * 10**5,
          '{"inputs": null, "files": {}}', '{"inputs": {}, "files": {"a": 1}}']  # fmt: skip


@pytest.mark.parametrize("stamp", STAMPS, ids=lambda text: text[:30])
def test_a_stamp_of_another_shape_means_not_made_before(shelf, stamp):
    (job,) = cli.plan([], [])
    file = shelf / "figures" / job.made / publish.STAMP
    file.parent.mkdir(parents=True)
    file.write_text(stamp)
    assert job.why(shelf / "figures")


@pytest.mark.parametrize(
    "text", ["[" * 3000 + "1" + "]" * 3000, "[" * 10**5, "9" * 5000, f"[{'9' * 5000}]", "-" * 10**5], ids=len
)
def test_texts_that_are_too_long_or_too_deep(shelf, no_kernel, text, capsys):
    assert cli.main(["figures", "-p", f"x={text}"]) == 2
    said = capsys.readouterr().err
    assert "x" in said and len(said) < 400 and not (shelf / "figures").exists()


@pytest.mark.parametrize("out", ["", " "])
def test_an_empty_name_of_a_folder(shelf, no_kernel, monkeypatch, out, capsys):
    monkeypatch.chdir(shelf)
    before = sorted(shelf.rglob("*"))
    assert cli.main(["figures", "--out", out]) == 2
    assert "--out needs the name of a folder" in capsys.readouterr().err and sorted(shelf.rglob("*")) == before


def test_a_loop_of_links(shelf, no_kernel, capsys):
    for here, there in (("a", "b"), ("b", "a")):
        (shelf / here).symlink_to(there)
    for out in ("a", "a/below"):
        assert cli.main(["figures", "--out", str(shelf / out)]) == 2
        assert "Files are written into the folder of --out." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["01_twice.png", "01_twice.json", ".made/lock", ".made/01_twice.ipynb"])
def test_an_output_replaced_by_a_folder_is_told_before_a_kernel_starts(shelf, no_kernel, name, capsys):
    (shelf / "figures" / name).mkdir(parents=True)
    assert cli.main(["figures"]) == 2
    said = capsys.readouterr().err
    assert str(shelf / "figures" / name) in said and ("is a folder" in said or "Is a directory" in said)


def test_a_reader_that_has_gone_hears_nothing(shelf):
    run = start(shelf, command="list", stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait(60) == 141


def test_two_points_of_a_grid_do_not_share_a_folder(shelf, no_kernel, capsys):
    assert cli.main(["figures", "-p", "words=[a/b],[ab]"]) == 2
    assert "would share the folder words=ab" in capsys.readouterr().err
    assert [job.folder for job in cli.plan([], ["x=1,1.0,2"])] == ["x=1.0", "x=2.0"]


def test_a_list_is_not_taken_for_a_grid(shelf, no_kernel, capsys):
    assert cli.main(["figures", "-p", "words=c,d"]) == 2
    assert "words is a list, like words=[]; for a grid of lists write words=[c],[d]." in capsys.readouterr().err
    assert cli.main(["figures", "-p", "words=[c,d],e"]) == 2
    assert "write words=[c,d],[e]." in capsys.readouterr().err
    for typed, expected in (("c", [["c"]]), ("[c,d]", [["c", "d"]]), ("[c],[d]", [["c"], ["d"]])):
        assert [list(job.values["words"]) for job in cli.plan([], [f"words={typed}"])] == expected


@pytest.mark.parametrize("step", range(6))
def test_a_record_stands_only_beside_its_own_files(shelf, monkeypatch, step):
    """Wherever a publication is stopped, nobody takes a mixed old and new set for a whole one."""
    out = shelf / "figures"
    (job,) = cli.plan([], [])

    def make(text):
        with publish.only_run_in(out):
            keep(job, out, json.dumps({"headline": text}))
            cli.settle(job, out, publish=True)

    def sets():
        return [json.loads((out / file).read_text())["headline"] for file in FILES if (out / file).exists()]

    make("old")
    changes = []

    def until(change):
        def changed(path, *arguments, **options):
            if str(path).endswith(".part") and change is unlink:  # a temporary file that is cleared away
                return change(path, *arguments, **options)
            if len(changes) == step:
                raise KeyboardInterrupt
            changes.append(change(path, *arguments, **options))

        return changed

    unlink = Path.unlink
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", until(os.replace))
        patch.setattr(Path, "unlink", until(unlink))
        make("new")
    assert len(changes) == min(step, 4)  # the record goes, three files come
    assert (out / "01_twice.json").exists() <= (len(sets()) == 3 and len(set(sets())) == 1)
    assert not job.why(out)
    with publish.only_run_in(out):  # the next run finishes it
        cli.settle(job, out, publish=True)
    assert sets() == ["new"] * 3 and not list(out.glob(".*part"))


def publish_as(shelf: Path, twice: str) -> Path:
    """Make the figure, and change the number in the published table."""
    assert cli.main(["figures"]) == 0
    table = shelf / "figures" / "01_twice.csv"
    table.write_text(f"x,twice\n1.0,{twice}\n")
    return table


def test_what_differs_lies_beside_and_is_published_when_asked(shelf, capsys):
    table, out = publish_as(shelf, "3.0"), shelf / "figures"
    capsys.readouterr()
    assert cli.main(["figures"]) == 0  # without a kernel: what was made is kept
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"0 made, 1 up to date, 0 failed: {out}"
    assert "01_twice  differs: row 1.0, twice: 2.0 for 3.0" in said and "0 of 1 reproduced" in said
    assert Path(said[-1]) == out / ".made" / "differs"
    assert {file.name for file in Path(said[-1]).iterdir()} == FILES
    assert table.read_text() == "x,twice\n1.0,3.0\n"
    assert cli.main(["figures", "--check"]) == 1
    capsys.readouterr()
    assert cli.main(["figures", "--publish"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 1 reproduced; 1 put in place"
    assert table.read_text() == "x,twice\n1.0,2.0\n" and not (out / ".made" / "differs").exists()
    assert cli.main(["figures", "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["01_twice  the same bytes", "1 of 1 reproduced"]


def test_what_is_the_same_within_its_tolerance_leaves_the_published_files_alone(shelf, capsys):
    table = publish_as(shelf, "2.001")
    assert cli.main(["figures", "--publish", "--check"]) == 0
    said = capsys.readouterr().out
    assert "the same within its tolerance: row 1.0, twice: 2.0 for 2.001, 50% of what is allowed" in said
    assert said.endswith("1 of 1 reproduced\n") and table.read_text() == "x,twice\n1.0,2.001\n"


def test_other_parameters_lie_beside_the_published_ones(shelf, capsys):
    table = publish_as(shelf, "2.0")
    assert cli.main(["figures", "-p", "x=3"]) == 0
    assert "differs: row 3.0: a row for no such row; and 1 more" in capsys.readouterr().out
    assert table.read_text() == "x,twice\n1.0,2.0\n"
    assert (shelf / "figures/.made/differs/01_twice.csv").read_text() == "x,twice\n3.0,6.0\n"
    assert cli.main(["figures", "-p", "x=3", "--publish"]) == 0
    assert "These are not the published parameters" in capsys.readouterr().out
    assert table.read_text() == "x,twice\n3.0,6.0\n"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_or_a_folder_that_cannot_be_written_changes_nothing(shelf, monkeypatch, error, capsys):
    publish_as(shelf, "3.0")
    out = shelf / "figures"
    before = {name: (out / name).read_bytes() for name in FILES}
    write, written = Path.write_bytes, []

    def refuse(path, data):
        if path.parent == out:
            written.append(path)
            if len(written) == 2:
                raise OSError(error, os.strerror(error), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert cli.main(["figures", "--publish"]) == 1
    said = capsys.readouterr().err
    assert f"01_twice failed: [Errno {error}] {os.strerror(error)}" in said and str(out) in said
    assert "what is published is as it was" in said
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert visible(out) == FILES


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"headline": 3}', "[" * 10**5])
def test_a_published_record_that_is_none_differs_and_stops_nothing(shelf, text, capsys):
    publish_as(shelf, "2.0")
    (shelf / "figures" / "01_twice.json").write_text(text)
    capsys.readouterr()
    assert cli.main(["figures"]) == 0
    said = capsys.readouterr()
    assert "01_twice  differs: " in said.out and said.err == ""


def test_a_notebook_that_fails_half_way_is_not_compared(shelf, monkeypatch, capsys):
    table = publish_as(shelf, "3.0")
    write_notebook(shelf / "notebooks" / "02_plain.ipynb", "seed = 0\nout_dir = None",
                   "import pathlib\npathlib.Path(out_dir, '02_plain.txt').write_text('x')")  # fmt: skip
    monkeypatch.setattr(cli, "notebooks", lambda: {"01_twice": run_twice, "02_plain": run_plain})
    assert cli.main(["figures", "01", "02", "-p", "seed=3"]) == 0
    capsys.readouterr()
    path = shelf / "notebooks" / "01_twice.ipynb"
    path.write_text(path.read_text().replace("x > 5", "x > 0"))
    assert cli.main(["figures", "-p", "seed=3"]) == 1
    said = capsys.readouterr().out
    assert "02_plain  the same bytes" in said and "01_twice  " not in said and "1 of 1 reproduced" in said
    assert table.read_text() == "x,twice\n1.0,3.0\n"
