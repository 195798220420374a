"""``python -m kfac_viz``: list the notebooks, and regenerate their figures from parameters.

A notebook ``notebooks/NAME.ipynb`` has one cell tagged ``parameters`` that assigns literals, ``out_dir`` among them,
and writes files whose names begin with NAME into ``out_dir``, a scratch folder. In ``figures/`` they are compared with
what is published (:mod:`.command.compare`), and put in place where that is missing; elsewhere they are put in place.
"""

import argparse
import ast
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import parameters
from ..checkout import ROOT, check_checkout
from ..show.files import put, refuse_folders, sha256
from ..show.save import LIBRARIES
from .compare import DIFFERS, NEW, SAME, WITHIN, Finding, compare
from .executor import run_notebooks
from .perturb import perturb
from .progress import Progress
from .publish import Output, lay_beside, only_run_in, scratch_in, write_gallery, write_index

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
    cells: int


@dataclass(frozen=True, eq=False)
class Job(Output):
    """One notebook with one choice of values."""

    notebook: Notebook
    values: dict[str, Any]

    def is_published(self, out: Path) -> bool:
        """Whether its place in ``out`` is that of a published figure, so that there is something to compare with."""
        return self.folder == "." and out == ROOT / "figures"


def inputs(notebook: Notebook, values: dict[str, Any]) -> dict[str, Any]:
    """What its files depend on. A parameter that names a file, such as measured timings, counts with it."""
    here = notebook.path.parent
    data = [value for value in values.values() if isinstance(value, str) and (here / value).is_file()]
    depends = {
        "notebook": notebook.code,
        "parameters": values,
        "data": {name: sha256((here / name).read_bytes()) for name in data},
        "kfac_viz": source_hash(),
        "measured tables": tables_hash(ROOT / "figures" / "benchmarks"),
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


def tables_hash(folder: Path) -> str:
    """Hash of the tables that ``make bench`` has written, and of the options of their runs."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".csv", ".json"))
    return sha256(b"\0".join(file.read_bytes() for file in files))


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
    return Notebook(
        path,
        run,
        headings[0] if headings else "",
        parameters.check(run, defaults),
        sha256("\0".join(code).encode()),
        len(cells),
    )


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
            raise ValueError(
                "The folder is chosen with --out."
                if name == "out_dir"
                else f"{name} is given twice; for a grid write {name}=first,second."
            )
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
            raise ValueError(
                f"{name} is a list, like {name}={parameters.to_text(parameter.default)}; "
                f"for a grid of lists write {name}={each}."
            )


# ---- the commands ----------------------------------------------------------------------------------------


def make(jobs: list[Job], out: Path, workers: int) -> Iterator[tuple[Job, str]]:
    """Run the jobs, and yield each that has ended with what went wrong, empty where it made its files."""
    scratch = [scratch_in(out) for _ in jobs]
    orders = []
    for job, folder in zip(jobs, scratch, strict=True):
        (out / job.copy).parent.mkdir(exist_ok=True)
        orders.append({
            "input_path": str(job.notebook.path),
            "output_path": str(out / job.copy),
            "parameters": job.inputs["parameters"] | {"out_dir": str(folder)},
            "resources": {"metadata": {"path": str(job.notebook.path.parent)}},  # where the kernel runs
            "start_timeout": START_SECONDS,
            "execution_timeout": CELL_SECONDS,
        })  # fmt: skip
    try:
        with Progress([job.name for job in jobs], [job.notebook.cells for job in jobs]) as progress:
            for index, event in run_notebooks(orders, workers):
                job, error = jobs[index], event.get("error")
                if "error" not in event:
                    progress.start(index, event["cell"])
                    continue
                try:
                    if error is None:
                        job.keep(scratch[index], out)
                except (ValueError, OSError) as mistake:
                    error = mistake
                progress.end(index, "done" if error is None else "failed")
                where = f"cell {event['cell']}: " if event.get("cell") else ""
                yield job, "" if error is None else f"{where}{error}\n    executed copy: {out / job.copy}"
    finally:
        for folder in scratch:
            shutil.rmtree(folder, ignore_errors=True)


def figures(arguments: argparse.Namespace) -> int:
    """Make what is missing or changed, compare it with what is published, and say what was found.

    Returns:
        0 if all went well, 1 if a notebook failed, or with ``--check`` if a figure is not the same.
    """
    if strays := [word for word in arguments.p if "=" not in word[1:]]:  # may look like a part of a notebook's name
        raise ValueError(f"-p needs KEY=VALUE; got {strays[0]!r}. Names of notebooks stand before -p.")
    words = arguments.names + arguments.p
    jobs = plan([w for w in words if "=" not in w], [w for w in words if "=" in w])
    if not str(arguments.out).strip():
        raise ValueError("--out needs the name of a folder; got an empty one.")
    if arguments.perturb:
        if words != arguments.names or Path(arguments.out) != ROOT / "figures":
            raise ValueError("--perturb compares with what is published, and takes neither -p nor --out.")
        return perturb(select(words), arguments.jobs)
    out = Path(os.path.realpath(arguments.out))  # unlike resolve, no error on a loop of links
    if (arguments.publish or arguments.check) and not any(job.is_published(out) for job in jobs):
        raise ValueError("--publish and --check are about the published figures, which neither a grid nor --out makes.")
    for job in jobs:
        refuse_folders([*(out / job.folder).glob(f"{job.stem}*"), *(out / name for name in (job.copy, "index.html"))])
    with only_run_in(out):
        reasons = {job: "asked for" if arguments.force else job.why(out) for job in jobs}
        todo = [job for job in jobs if reasons[job]]
        for job in todo:
            print(f"{job.name}: {reasons[job]}", flush=True)
        failures, found = {}, {}
        there = _machines(out / f"{job.stem}.json" for job in jobs)
        up_to_date = ((job, "") for job in jobs if job not in todo)
        for job, error in itertools.chain(up_to_date, make(todo, out, arguments.jobs)):
            try:
                if error:
                    raise ValueError(error)
                found[job] = settle(job, out, arguments.publish)
            except ValueError as mistake:
                failures[job] = f"{job.name} failed: {mistake}"
            except OSError as mistake:
                failures[job] = f"{job.name} failed: {mistake}; what is published is as it was"
        if any(job.folder != "." for job in jobs):
            write_index(out)
        if out == ROOT / "figures":
            write_gallery(out)
        made = sum(job not in failures for job in todo)
        kept = sum(job not in failures for job in jobs) - made
        print(f"{made} made, {kept} up to date, {len(failures)} failed: {out}", flush=True)
        print(*failures.values(), sep="\n", end="\n" * bool(failures), file=sys.stderr)
        compared = {job: finding for job, finding in found.items() if finding}
        missed = report(compared, out, there, arguments.publish) if compared else 0
    return bool(failures) or bool(missed and arguments.check)


def settle(job: Job, out: Path, publish: bool) -> Finding | None:
    """Put the files of a job where they belong; what was found where it is compared with published figures.

    Only what is missing is then put in place, and with ``publish`` what differs.

    Raises:
        OSError: it could not be put in place, and what was there is as it was.
    """
    made, there = job.files(out), out / job.folder
    if job.is_published(out):
        finding = compare(made, there)
        if finding.verdict == NEW or (publish and finding.verdict == DIFFERS):
            put(made, there)
        return finding
    if not all((there / name).is_file() and (there / name).read_bytes() == data for name, data in made.items()):
        put(made, there)
    return None


def report(found: dict[Job, Finding], out: Path, there: list[str], published: bool) -> int:
    """Print what was found of each figure, and where the figures lie that differ.

    Args:
        there: on which machines the published figures were made.
        published: whether what differs was put in place.

    Returns:
        How many are not the same.
    """
    for machine in _machines(out / job.made / f"{job.stem}.json" for job in found):
        print(f"made here on   {machine}")
    for machine in there:
        print(f"published from {machine}")
    width = max(len(job.name) for job in found)
    for job, finding in sorted(found.items(), key=lambda pair: pair[0].name):
        print(f"{job.name:{width}}  {finding.verdict}{f': {finding.words}' if finding.words else ''}")
    differ = [job for job, finding in found.items() if finding.verdict == DIFFERS]
    same = sum(finding.verdict in (SAME, WITHIN) for finding in found.values())
    if published and any(job.values != job.notebook.defaults for job in differ):
        print("These are not the published parameters; the command without -p, with --publish, brings those back.")
    placed = len(differ) * published + sum(finding.verdict == NEW for finding in found.values())
    print(f"{same} of {len(found)} reproduced{f'; {placed} put in place' if placed else ''}")
    beside = lay_beside([] if published else differ, out)
    if differ and not published:
        print(f"What differs lies beside what is published; --publish puts it in place:\n{beside}")
    return len(found) - same


def _machines(records: Iterable[Path]) -> list[str]:
    """The processors, each with its BLAS, that these records name; some have no record, or an old one."""
    found = set()
    for record in records:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            found.add("; ".join(json.loads(record.read_text(encoding="utf-8"))["made_on"].values()))
    return sorted(found)


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
    """The command line; returns the exit status: 0 all well, 1 a notebook failed or a check did, 2 bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m kfac_viz", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="notebooks with their questions, parameters, defaults and ranges")
    make_them = commands.add_parser("figures", help="make the figures again, and compare them with the published")
    make_them.add_argument("names", nargs="*", metavar="NAME", help="a notebook, its number or a part; default: all")
    make_them.add_argument(
        "-p",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE[,VALUE...]",
        help="a parameter; several values make a grid; a list is written [12,12]",
    )
    make_them.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="how many notebooks at a time (default: %(default)s)",
    )
    make_them.add_argument("--out", default=ROOT / "figures", metavar="DIR", help="default: figures/")
    make_them.add_argument("--force", action="store_true", help="also what is up to date")
    make_them.add_argument("--publish", action="store_true", help="put in place what differs from what is published")
    make_them.add_argument(
        "--perturb",
        action="store_true",
        help="run again with other rounding, and say which published words and numbers stay",
    )
    make_them.add_argument("--check", action="store_true", help="end with status 1 where a figure is not the same")
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
        print("\nInterrupted; what was finished is kept, and not made again.", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for the notebooks that run; their kernels end with this process
