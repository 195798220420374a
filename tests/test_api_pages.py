"""The API pages of the site: built from the docstrings without a warning, and no public name is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import kfac_viz as kv

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> set[str]:
    """The names of Python objects that the pages explain."""
    out = tmp_path_factory.mktemp("api")
    only = ["-D", "include_patterns=api*,how_a_*", "-D", "root_doc=api", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", *only, str(ROOT / "notebooks"), str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    inventory = InventoryFile.loads((out / "objects.inv").read_bytes(), uri="")
    return {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}


@pytest.mark.parametrize("module", [kv, kv.coarse, kv.problems, kv.pages], ids=lambda module: module.__name__)
def test_every_public_name_is_on_a_page(module, documented):
    where = {kv.coarse: "kfac_viz.coarse"}.get(module, module.__name__)
    names = module.SPACES if module is kv.coarse else module.__all__
    functions = [name for name in names if callable(getattr(module, name))]
    missing = [name for name in functions if not {f"{where}.{name}", f"kfac_viz.{name}"} & documented]
    assert functions and missing == []


def test_every_study_is_on_a_page(documented):
    assert {f"{study.__name__}.run" for study in kv.studies.NOTEBOOKS.values()} <= documented
