"""Rooms, and imports that run downwards through them; what computes never draws, and importing is cheap."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import kfac_viz as kv

ROOT = Path(kv.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
# Each may import those before it.
METHOD = (
    "checks", "decompositions", "names", "one_hot", "stacks", "partition", "columns", "sample_space", "operator",
    "kronecker", "products", "fisher", "kronecker_fisher", "preconditioner", "kfac", "coarse", "two_level", "krylov",
)  # fmt: skip
SCORES = ("likelihood", "layers", "functions", "uses", "record", "witness", "capture", "loss",
          "hessian")  # fmt: skip
TRAIN = ("distributed", "search", "options", "layout", "plain", "shards", "statistics", "curvature", "template",
         "state", "update", "step", "trial", "optimizer")  # fmt: skip
CORE = tuple(f"{room}.{name}" for room, names in (("method", METHOD), ("scores", SCORES), ("train", TRAIN))
             for name in names)  # fmt: skip
ORDER = ("method", "scores", "train", "problems", "show", "studies", "pages", "command")
ROOMS = (
    {  # what each may know, besides the packages of others: itself and the rooms before it
        name: {*ORDER[: i + 1], *(("parameters", "checkout") if i >= ORDER.index("show") else ())}
        for i, name in enumerate(ORDER)
    }
    | {"parameters": set(), "checkout": set(), "one_page": set(), "data_parallel": set()}
)
WIDGETS = {"ipywidgets", "IPython", "anywidget"}
DRAWING = {"matplotlib", "seaborn", "PIL", "contourpy"}
HEAVY = {"sklearn", "pandas", "papermill", "scipy", "nbformat"} | WIDGETS | DRAWING
LIVE = ("show.live", "show.panel")  # loaded with the first panel: they subclass and call what is heavy throughout


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def core_file(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


def room(name: str) -> str:
    return name.split(".")[0]


@cache
def imports(path: Path) -> list[tuple[str, str]]:
    """(where, what): where is "top", "later" (in a function) or "typing"; inner names have a leading dot."""
    package = module_name(path).split(".")[: -1 if path.name != "__init__.py" else None]
    package = [part for part in package if part != "__init__"]
    found = []

    def visit(node, where):
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and where == "top":
                inner = "later"
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "typing"
            if isinstance(child, ast.Import):
                found.extend((where, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    base = "." + ".".join([*package[: len(package) - child.level + 1], *filter(None, [base])])
                found.extend(
                    (where, f"{base}.{alias.name}" if base != "." else f".{alias.name}") for alias in child.names
                )
            visit(child, inner)

    visit(ast.parse(path.read_text(encoding="utf-8")), "top")
    return [
        (where, "." + what.removeprefix("kfac_viz.") if what.startswith("kfac_viz.") else what) for where, what in found
    ]


def inner_modules(path: Path, *wheres: str) -> set[str]:
    """Modules of the package that a file imports."""
    known = {module_name(p).removesuffix(".__init__").removesuffix("__init__") for p in FILES}
    result = set()
    for where, what in imports(path):
        if where in wheres and what.startswith("."):
            name = what[1:]
            while name and name not in known:
                name = name.rpartition(".")[0]
            result.add(name)
    return result - {""}


def outside(path: Path, names: set[str], *wheres: str) -> set[str]:
    return {
        what for where, what in imports(path) if where in wheres and any(f"{what}.".startswith(f"{n}.") for n in names)
    }


def test_the_reader_of_imports_sees_them():
    """Negative control: what this file looks for is found where it is known to be."""
    assert ("top", ".method.operator.Damped") in imports(ROOT / "method/krylov.py")
    assert ("later", "scipy.sparse.linalg.LinearOperator") in imports(ROOT / "method/operator.py")
    assert ("typing", "scipy.sparse.linalg.LinearOperator") in imports(ROOT / "method/operator.py")
    operator = ROOT / "method/operator.py"
    assert outside(operator, {"scipy"}, "later") and not outside(operator, {"scipy"}, "top")
    assert "method.operator" in inner_modules(ROOT / "method/krylov.py", "top")
    with_typing = inner_modules(ROOT / "show/parts.py", "typing")
    assert "method.partition" in with_typing and "method.partition" not in inner_modules(ROOT / "show/parts.py", "top")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_each_room_knows_only_those_before_it(path):
    known = ROOMS.get(room(module_name(path)))
    if known is not None:
        assert {room(name) for name in inner_modules(path, "top", "later", "typing")} <= known


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_what_computes_draws_nothing_and_only_the_panel_knows_widgets(path):
    everywhere = ("top", "later", "typing")
    if room(module_name(path)) not in ("show", "studies", "pages"):
        assert not outside(path, DRAWING, *everywhere)
    if module_name(path) != "show.panel":
        assert not outside(path, WIDGETS, *everywhere)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not outside(path, HEAVY, "top") or module_name(path) in LIVE


def reached(path: Path, start: str) -> dict[str, ast.AST]:
    """The functions and classes of a file that ``start`` mentions, and those mention, and so on."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found, left = {}, [start]
    while left:
        name = left.pop()
        if name in defined and name not in found:
            found[name] = defined[name]
            left += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    return found


STUDIES = [path for path in FILES if f"def run_{path.stem}(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", STUDIES, ids=module_name)
def test_run_and_all_that_it_calls_touch_no_axes(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    shown = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "show" in (node.module or "").split(".")
        for alias in node.names
        if not alias.name.isupper()  # labels and colours
    }

    def uses(node: ast.AST) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & shown

    assert uses(tree)  # the plot does
    for name, node in reached(path, f"run_{path.stem}").items():
        inside = list(ast.walk(node))
        assert not uses(node), name
        imported = {alias.name.split(".")[0] for n in inside if isinstance(n, ast.Import) for alias in n.names}
        imported |= {(n.module or "").split(".")[0] for n in inside if isinstance(n, ast.ImportFrom)}
        assert not imported & (DRAWING | WIDGETS | {"show"}), name


def test_a_run_loads_nothing_that_draws():
    code = """
import sys, kfac_viz as kv
kv.studies.coarse_space.run(widths=(4,), n=30, per_layer=1).table()
print(*sorted({name.split('.')[0] for name in sys.modules}), *(n for n in sys.modules if n == 'matplotlib.pyplot'))
"""
    assert not set(run(code).split()) & (DRAWING | WIDGETS | {"matplotlib.pyplot"})


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_opens_with_one_sentence_that_says_what_it_is(path):
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    assert first.endswith(".") and not first[0].islower()


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_downwards(name):
    below = {"method", "train", *CORE[: CORE.index(name)]}
    assert inner_modules(core_file(name), "top", "later") <= below


def test_no_cycles():
    files = [path for path in FILES if path.name != "__init__.py"]
    graph = {module_name(path): inner_modules(path, "top", "later", "typing") for path in files}
    done: set[str] = set()
    while graph.keys() - done:
        free = {name for name in graph.keys() - done if not (graph[name] & graph.keys()) - done}
        assert free, f"these import each other: {sorted(graph.keys() - done)}"
        done |= free


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_loads_nothing_heavy_and_changes_nothing():
    code = """
import sys, warnings, torch
before = torch.get_num_threads(), torch.get_default_dtype(), len(warnings.filters), torch.random.get_rng_state().sum()
import kfac_viz
kfac_viz.problems, kfac_viz.coarse.spectral
after = torch.get_num_threads(), torch.get_default_dtype(), len(warnings.filters), torch.random.get_rng_state().sum()
assert before == after, (before, after)
print(*sorted({name.split('.')[0] for name in sys.modules}))
"""
    loaded = set(run(code).split())
    assert not loaded & ({name.split(".")[0] for name in HEAVY} | DRAWING)
    assert {"torch", "kfac_viz"} <= loaded


def test_every_public_name_is_there():
    assert run("import kfac_viz as kv; [getattr(kv, name) for name in kv.__all__]; print('all')") == "all\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kv.nothing  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_assertion_guards_a_user(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("name", CORE)
def test_what_is_public_has_a_docstring_and_type_hints(name):
    tree = ast.parse(core_file(name).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        functions += [f for f in node.body if isinstance(f, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
    for function in functions:
        arguments = [a for a in function.args.args + function.args.kwonlyargs if a.arg not in ("self", "cls")]
        assert all(a.annotation is not None for a in arguments) and function.returns is not None, function.name
