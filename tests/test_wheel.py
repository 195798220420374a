"""The package as ``pip install .`` puts it elsewhere: it trains and explores, and names what needs the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRIED = """
import torch, kfac_viz as kv
from pathlib import Path
assert Path(kv.__file__).parents[1] == Path.cwd() / "installed", kv.__file__
problem = kv.problems.digits((4,), 40, side=4)
opt = kv.TwoLevelKFAC(problem.model, likelihood="categorical", per_layer=2)
before = float(problem.loss())
for _ in range(10):
    opt.zero_grad()
    problem.loss().backward()
    opt.observe(problem.inputs)
    opt.step()
assert float(problem.loss()) < before
panel = kv.explore(problem.model, problem.inputs, problem.targets, likelihood="categorical")
assert panel.error == "" and panel.save_page("mine.html")
try:
    kv.studies.training.run()
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder in which the wheel is unpacked, as pip does it."""
    place = tmp_path_factory.mktemp("elsewhere")
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "kfac_viz", "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    for name in listed:  # a copy, since setuptools writes beside what it reads
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(place), "."]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "installed")
    return place


def test_it_trains_explores_and_names_what_is_missing(installed):
    env = os.environ | {"PYTHONPATH": str(installed / "installed")}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", TRIED], cwd=installed, env=env, capture_output=True,
                         text=True, timeout=300)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Measured tables are in the source checkout only" in ran.stdout and "pip install -e ." in ran.stdout


def test_it_has_every_file_of_the_package_and_its_types(installed):
    tracked = subprocess.run(["git", "ls-files", "kfac_viz"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = [name for name in tracked.stdout.split() if not (installed / "installed" / name).exists()]
    assert missing == []
