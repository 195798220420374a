"""``python -m kfac_viz``: list the notebooks, and regenerate their figures from parameters.

A notebook ``notebooks/NAME.ipynb`` has one cell tagged ``parameters`` that assigns literals, ``out_dir`` among them,
and writes files whose names begin with NAME into ``out_dir``. How they reach the output folder: :mod:`.show.publish`.
"""

import argparse
import ast
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import parameters
from ..checkout import ROOT, check_checkout
from ..show.files import refuse_folders, sha256
from ..show.save import LIBRARIES
from .executor import run_notebooks
from .publish import Output, only_run_in, publish, write_gallery, write_index

RENAMED = {  # for one release: what a notebook was called in 0.1
    "03_damping": "04_damping",
    "04_where_it_comes_from": "05_two_levels",
    "05_coarse_space": "07_coarse_space",
    "05_one_step": "06_one_step",
    "05_coarse_space_sizes": "08_coarse_space_sizes",
    "06_claims": "09_layer_overlap",
    "06_depth": "10_depth",
    "07_training": "12_training",
    "08_published": "13_published",
    "09_speed": "14_speed",
    "10_pde": "15_pde",
    "11_which_method": "16_which_method",
}
START_SECONDS, CELL_SECONDS = 60, 1800


# ---- notebooks and what their figures are made from ------------------------------------------------------


@dataclass(frozen=True)
class Notebook:
    """What the command line knows of a notebook without running it."""

    path: Path
    run: Callable
    question: str
    defaults: dict[str, Any]  # of its parameters cell, without out_dir
    code: str  # hash of its code cells: prose may change without a new figure


@dataclass(frozen=True)
class Job(Output):
    """One notebook with one choice of values."""

    notebook: Notebook
    values: dict[str, Any]


def inputs(notebook: Notebook, values: dict[str, Any]) -> dict[str, Any]:
    """What its files depend on. A parameter that names a file, such as measured timings, counts with it."""
    here = notebook.path.parent
    data = [value for value in values.values() if isinstance(value, str) and (here / value).is_file()]
    depends = {
        "notebook": notebook.code,
        "parameters": values,
        "data": {name: sha256((here / name).read_bytes()) for name in data},
        "kfac_viz": source_hash(),
        "versions": {name: version(name).split("+")[0] for name in LIBRARIES},
    }
    return json.loads(json.dumps(depends))


@cache
def source_hash(here: Path = Path(__file__).parents[1]) -> str:
    """Hash of the package's source, the same whatever the line endings."""
    files = [file for file in here.rglob("*") if file.suffix in (".py", ".html", ".css", ".js")]
    files.sort(key=lambda file: file.relative_to(here).as_posix())
    parts = (file.relative_to(here).as_posix().encode() + b"\n" + file.read_bytes() for file in files)
    return sha256(b"\0".join(part.replace(b"\r\n", b"\n") for part in parts))


def load(path: Path, run: Callable) -> Notebook:
    """Read a notebook and check its own parameters against the signature of ``run``."""
    if not path.is_file():
        raise ValueError(f"The notebook {path} is missing; a fresh checkout has it.")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = ["".join(cell["source"]) for cell in cells]
        code = [source for cell, source in zip(cells, text, strict=True) if cell["cell_type"] == "code"]
        tagged = [s for c, s in zip(cells, text, strict=True) if "parameters" in c["metadata"].get("tags", ())]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a notebook: {error!r}") from None
    if len(tagged) != 1:
        raise ValueError(f"{path.name} must have exactly one cell tagged parameters; it has {len(tagged)}.")
    defaults = {}
    try:
        for line in ast.parse(tagged[0]).body:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            defaults[target.id] = ast.literal_eval(line.value)
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"The parameters cell of {path.name} may only assign literals to names.") from None
    if "out_dir" not in defaults:
        raise ValueError(f"The parameters cell of {path.name} lacks out_dir.")
    del defaults["out_dir"]
    headings = re.findall(r"^#+ *(.+)", "\n".join(text), re.MULTILINE)
    return Notebook(path, run, headings[0] if headings else "", parameters.check(run, defaults),
                    sha256("\0".join(code).encode()))


@cache
def notebooks() -> dict[str, Callable]:
    """The ``run`` of every notebook, by its name."""
    from ..studies import NOTEBOOKS

    return {name: study.run for name, study in NOTEBOOKS.items()}


def select(names: list[str]) -> list[str]:
    """The notebooks that are meant: by name, number, or a part that only one of them has; all for no name.

    A name that a notebook had in the last release is understood too, and the new one is printed.
    """
    chosen = []
    for name in names:
        asked = Path(name).name.removesuffix(".ipynb")
        if asked in RENAMED:
            print(f"{asked} is called {RENAMED[asked]} now.", flush=True)
            name = asked = RENAMED[asked]
        if asked.isdigit():
            found = [stem for stem in notebooks() if stem.split("_")[0] == asked.zfill(2)]
        else:
            found = [stem for stem in notebooks() if asked in (stem, stem.partition("_")[2])]
            found = found or [stem for stem in notebooks() if asked and asked in stem]
        if len(found) != 1:
            which = f"may be any of {', '.join(found)}" if found else f"is none of {', '.join(notebooks())}"
            raise ValueError(f"{name or 'An empty name'} {which}.")
        if asked != found[0]:
            print(f"{name}: {found[0]}", flush=True)
        chosen += found
    return list(dict.fromkeys(chosen)) or list(notebooks())


def plan(names: list[str], given: list[str]) -> list[Job]:
    """All jobs, with everything checked before a kernel starts; ValueError with a line for each mistake."""
    grid: dict[str, list] = {}
    for item in given:
        name, _, text = item.partition("=")
        if name in grid or name == "out_dir":
            raise ValueError("The folder is chosen with --out." if name == "out_dir" else
                             f"{name} is given twice; for a grid write {name}=first,second.")
        try:
            grid[name] = parameters.parse(text)
        except ValueError as mistake:
            raise ValueError(f"{name}: {mistake}") from None
    jobs, mistakes = {}, []
    for stem in select(names):
        try:
            notebook = load(ROOT / "notebooks" / f"{stem}.ipynb", notebooks()[stem])
            _refuse_bare_lists(notebook.run, grid)
            for point in itertools.product(*grid.values()):
                checked = parameters.check(notebook.run, dict(zip(grid, point, strict=True)))
                for name in checked.keys() - notebook.defaults.keys():
                    raise ValueError(f"Its parameters cell has no {name}; it has {', '.join(notebook.defaults)}.")
                varied = [f"{name}={parameters.to_text(checked[name])}" for name in grid if len(grid[name]) > 1]
                folder = re.sub(r"[^\w.,=+-]", "", ",".join(varied)) or "."
                values = notebook.defaults | checked
                if (stem, folder) in jobs and jobs[stem, folder].values != values:
                    raise ValueError(f"Two points of the grid would share the folder {folder}; make one at a time.")
                jobs[stem, folder] = Job(stem, folder, inputs(notebook, values), notebook, values)
        except (TypeError, ValueError) as mistake:
            mistakes.append(f"{stem}: {mistake}")
    if mistakes:
        raise ValueError("\n".join(dict.fromkeys(mistakes)))
    return list(jobs.values())


def _refuse_bare_lists(run: Callable, grid: dict[str, list]) -> None:
    """ValueError for ``widths=12,14``: one list without its brackets, or a grid of lists without theirs."""
    for name, parameter in parameters.read(run).items():
        values = grid.get(name, ())
        if parameter.many and len(values) > 1 and not all(isinstance(value, list) for value in values):
            each = ",".join(parameters.to_text(value if isinstance(value, list) else [value]) for value in values)
            raise ValueError(f"{name} is a list, like {name}={parameters.to_text(parameter.default)}; "
                             f"for a grid of lists write {name}={each}.")


# ---- the commands ----------------------------------------------------------------------------------------


def make(jobs: list[Job], out: Path, workers: int) -> list[str]:
    """Run the jobs; returns a paragraph for each that failed."""
    made = [Path(tempfile.mkdtemp(prefix="making-", dir=out / ".made")) for _ in jobs]
    copies = [out / job.copy for job in jobs]
    orders = []
    for job, folder, copy in zip(jobs, made, copies, strict=True):
        for needed in (folder / job.folder, copy.parent):
            needed.mkdir(exist_ok=True)
        orders.append({
            "input_path": str(job.notebook.path),
            "output_path": str(copy),
            "parameters": job.inputs["parameters"] | {"out_dir": str(folder / job.folder)},
            "resources": {"metadata": {"path": str(job.notebook.path.parent)}},  # where the kernel runs
            "start_timeout": START_SECONDS,
            "execution_timeout": CELL_SECONDS,
        })  # fmt: skip
    failures = []
    try:
        for index, event in run_notebooks(orders, workers):
            job = jobs[index]
            if "error" in event:
                error = event["error"]
                try:
                    if error is None:
                        publish(job, made[index], out)
                except (ValueError, TypeError, OSError) as mistake:
                    error = mistake
                print(f"{job.name}: {'done' if error is None else 'failed'}", flush=True)
                if error is not None:
                    where = f"cell {event['cell']}: " if event.get("cell") else ""
                    failures.append(f"{job.name} failed: {where}{error}\n    executed copy: {copies[index]}")
            elif event["cell"] == 1:
                print(f"{job.name}: started", flush=True)
    finally:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
    return failures


def figures(arguments: argparse.Namespace) -> int:
    """Make what is missing or changed; 0 if all went well, 1 if a notebook failed."""
    if strays := [word for word in arguments.p if "=" not in word[1:]]:  # may look like a part of a notebook's name
        raise ValueError(f"-p needs KEY=VALUE; got {strays[0]!r}. Names of notebooks stand before -p.")
    words = arguments.names + arguments.p
    jobs = plan([w for w in words if "=" not in w], [w for w in words if "=" in w])
    if not str(arguments.out).strip():
        raise ValueError("--out needs the name of a folder; got an empty one.")
    out = Path(os.path.realpath(arguments.out))  # unlike resolve, no error on a loop of links
    for job in jobs:
        hidden = (out / name for name in (job.stamp, job.copy, "index.html"))
        refuse_folders([*(out / job.folder).glob(f"{job.stem}*"), *hidden])
    with only_run_in(out):
        todo = []
        for job in jobs:
            if reason := "asked for" if arguments.force else job.why(out):
                todo.append(job)
                print(f"{job.name}: {reason}", flush=True)
        failures = make(todo, out, arguments.jobs)
        if any(job.folder != "." for job in jobs):
            write_index(out)
        if todo and out == ROOT / "figures":
            write_gallery(out)
    print(f"{len(todo) - len(failures)} made, {len(jobs) - len(todo)} up to date, {len(failures)} failed: {out}")
    print(*failures, sep="\n", end="\n" * bool(failures), file=sys.stderr)
    if out == ROOT / "figures" and any(j.folder == "." and j.values != j.notebook.defaults for j in jobs):
        print("These are not the published parameters; the command without -p brings those back.")
    return bool(failures)


def list_notebooks() -> int:
    for stem, run in notebooks().items():
        notebook = load(ROOT / "notebooks" / f"{stem}.ipynb", run)
        print(f"{stem}: {notebook.question}")
        for name, parameter in parameters.read(run).items():
            if name in notebook.defaults:
                value = parameters.to_text(notebook.defaults[name])
                print(f"    {name}={value}  ({parameter.allowed})  {parameter.help}".rstrip())
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 all well, 1 a notebook failed, 2 bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m kfac_viz", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="notebooks with their questions, parameters, defaults and ranges")
    make_them = commands.add_parser("figures", help="regenerate the figures that are missing or changed")
    make_them.add_argument("names", nargs="*", metavar="NAME", help="a notebook, its number or a part; default: all")
    make_them.add_argument("-p", nargs="+", action="extend", default=[], metavar="KEY=VALUE[,VALUE...]",
                           help="a parameter; several values make a grid; a list is written [12,12]")
    make_them.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
                           help="how many notebooks at a time (default: %(default)s)")
    make_them.add_argument("--out", default=ROOT / "figures", metavar="DIR", help="default: figures/")
    make_them.add_argument("--force", action="store_true", help="also what is up to date")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "figures" and arguments.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more; got {arguments.jobs}.")
        check_checkout("The notebooks", ROOT)
        status = list_notebooks() if arguments.command == "list" else figures(arguments)
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return status
    except BrokenPipeError:  # as `| head -1` leaves it: the status of a program that SIGPIPE ends, and no words
        os._exit(128 + 13)
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    except OSError as mistake:
        where = f"{mistake.filename}: " if mistake.filename else ""
        print(f"{where}{mistake.strerror}. Files are written into the folder of --out.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; what was finished is in place.", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for the notebooks that run; their kernels end with this process
