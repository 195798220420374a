"""What is installed: the files that name packages agree, and `make` sets up the build of PyTorch that is asked for."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {
    "pytorch": "torch",
    "matplotlib-base": "matplotlib",
    "seaborn-base": "seaborn",
    "playwright-python": "playwright",
}
TOP_LEVEL = {
    ".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile",
    "README.md", "constraints-oldest.txt", "constraints.txt", "environment.yml", "figures", "kfac_viz", "notebooks",
    "pyproject.toml", "tests",
}  # fmt: skip


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def wanted() -> dict[str, str]:
    """Every package that pyproject.toml names, extras included, with its range."""
    lines = project()["dependencies"] + sum(project()["optional-dependencies"].values(), [])
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_environment_yml_repeats_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *packages, pip = conda["dependencies"]
    found = {}
    for line in packages + pip["pip"]:
        if line in ("pip", "-e ."):
            continue
        requirement = Requirement(line)
        name = CONDA_NAMES.get(requirement.name, requirement.name)
        found[canonicalize_name(name)] = str(requirement.specifier)
    assert found.pop("python") == project()["requires-python"]
    assert found == wanted()
    assert conda["name"] == project()["name"]


def test_constraints_satisfy_every_range():
    for name, specifier in wanted().items():
        assert name in pins(), f"{name} is not pinned in constraints.txt; run: make constraints"
        requirement = Requirement(f"{name}{specifier}")
        assert requirement.specifier.contains(pins()[name]), f"{name}=={pins()[name]} is not {specifier}"


def test_constraints_are_plain_versions():
    """No local version such as +cpu, which the package index does not have, and not the project itself."""
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values())
    assert canonicalize_name(project()["name"]) not in pins()


def test_the_least_versions_are_those_that_are_declared():
    """`make oldest` tries what constraints-oldest.txt pins: the lower end of every range, and nothing else."""
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() == wanted().keys()
    for name, specifier in wanted().items():
        operator, version = re.fullmatch(r"(>=)([0-9.]+)", specifier).groups()
        assert operator == ">=" and Version(oldest[name]) == Version(version), name


def test_top_level_holds_only_what_belongs_there():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in git.stdout.splitlines()} <= TOP_LEVEL


# ---- the build of PyTorch ------------------------------------------------------------------------------

PYTHON = """#!{python}
import sys
from pathlib import Path

here, args = Path("{folder}"), sys.argv[1:]
torch, calls = here / "torch", here / "calls"
if args[:2] == ["-m", "venv"]:
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/python").symlink_to(__file__)
elif args[:3] == ["-m", "pip", "install"]:
    with calls.open("a") as file:
        print(*args[3:], file=file)
    wanted = [arg for arg in args if arg.startswith("torch==")]
    if wanted and here.joinpath("unreachable").exists() and wanted[0].endswith("+cpu"):
        sys.exit("No matching distribution found for " + wanted[0])
    if wanted or not torch.exists():
        build = "cpu" if not wanted or wanted[0].endswith("+cpu") else "cuda"
        torch.write_text(here.joinpath("only").read_text() if here.joinpath("only").exists() else build)
elif args == ["-V"]:
    print("Python 3.12.1")
elif args[:1] == ["-c"] and "import torch" in args[1]:
    print(torch.read_text(), "{version}")
"""


class Checkout:
    """A folder with the Makefile, and a stub in place of Python and pip that notes what it is to install."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        self.system("Linux")
        self.stub("python", PYTHON.format(python=sys.executable, folder=folder, version=pins()["torch"]))

    def stub(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def system(self, name: str) -> None:
        self.stub("uname", f"#!/bin/sh\necho {name}\n")

    def make(self, *words: str) -> tuple[int, str, list[str]]:
        """Status, what was said, and the lines of what pip was to install."""
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        paths = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHON": str(self.folder / "bin" / "python")}
        around = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of a make that runs these tests
        outside = {name: value for name, value in os.environ.items() if name not in around}
        done = subprocess.run(["make", ".venv/ready", *words], cwd=self.folder, capture_output=True, text=True,
                              env=outside | paths)  # fmt: skip
        said = " ".join((done.stdout + done.stderr).split())
        return done.returncode, said, calls.read_text().splitlines() if calls.exists() else []

    @property
    def stamp(self) -> list[str]:
        path = self.folder / ".venv" / "ready"
        return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def is_cpu(call: str) -> bool:
    """With torchvision, of which pip would keep the other build if it were not told to install it again."""
    index = "--no-deps --force-reinstall --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu"
    return call.endswith(f"{index} torch=={pins()['torch']}+cpu torchvision")


def is_cuda(call: str) -> bool:
    """The package index's own build and no other: == would be content with a CPU build that is there."""
    versions = f"torch==={pins()['torch']} torchvision==={pins()['torchvision']}"
    return call.endswith(f"--no-deps {versions}")


def test_a_new_environment_gets_the_cpu_build_and_says_how_much_that_is(checkout):
    status, said, (torch, rest) = checkout.make()
    assert status == 0 and is_cpu(torch) and rest.endswith("-e .[test,class,browser,site,published,bench]")
    assert re.search(r"0\.3 GB of packages beside PyTorch, and PyTorch's CPU build, 0\.2 GB \(TORCH=cuda.* 2\.8", said)
    assert checkout.stamp == [str(checkout.folder), "cpu"]
    assert checkout.make() == (0, "make: '.venv/ready' is up to date.", [])


def test_the_readme_repeats_sizes_and_minutes():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    sizes = {name: float(size) for name, size in re.findall(r"^(\w+)_SIZE +:= ([\d.]+) GB$", makefile, re.M)}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = r"downloads ([\d.]+) GB.* ([\d.]+) GB;.* at (\d+) Mbit/s, ([\d.]+) minutes in place of ([\d.]+)\."
    cpu, cuda, rate, *minutes = map(float, re.search(sentence, readme).groups())
    totals = [sizes["OTHER"] + sizes["CPU"], sizes["OTHER"] + sizes["CUDA"]]
    assert [cpu, cuda] == pytest.approx(totals)
    assert minutes == pytest.approx([total * 8000 / rate / 60 for total in totals[::-1]], abs=0.06)


def test_the_build_is_changed_by_one_word_and_then_stays(checkout):
    checkout.make()
    status, said, (torch, _) = checkout.make("TORCH=cuda")
    assert status == 0 and is_cuda(torch) and "CUDA build with its libraries, 2.8 GB" in said
    assert checkout.stamp == [str(checkout.folder), "cuda"]
    assert checkout.make() == checkout.make("TORCH=cuda") == (0, "make: '.venv/ready' is up to date.", [])
    (checkout.folder / ".venv" / "ready").unlink()  # as after a change of the versions, or of the folder
    status, said, calls = checkout.make()
    assert status == 0 and len(calls) == 1 and "nothing of PyTorch" in said and "the cuda build, is there" in said
    status, _, (torch, _) = checkout.make("TORCH=cpu")
    assert status == 0 and is_cpu(torch) and checkout.stamp[1] == "cpu"


def test_a_stamp_without_a_build_is_renewed(checkout):
    checkout.make()
    (checkout.folder / ".venv" / "ready").write_text(f"{checkout.folder}\n")
    status, _, calls = checkout.make()
    assert status == 0 and len(calls) == 1 and checkout.stamp[1] == "cpu"


def test_another_version_is_replaced_by_the_same_build(checkout):
    checkout.make("TORCH=cuda")
    stub = checkout.folder / "bin" / "python"
    stub.write_text(stub.read_text().replace(pins()["torch"], "2.9.0"))
    (checkout.folder / ".venv" / "ready").unlink()
    assert is_cuda(checkout.make()[2][0])


def test_where_the_index_of_cpu_builds_does_not_answer(checkout):
    (checkout.folder / "unreachable").touch()
    status, said, calls = checkout.make("TORCH=cpu")
    assert status != 0 and len(calls) == 1 and not checkout.stamp
    assert "CPU build could not be installed from https://download.pytorch.org/whl/cpu (see above)" in said
    status, said, calls = checkout.make()
    assert status == 0 and len(calls) == 2 and checkout.stamp[1] == "cpu"  # the build that the package index had
    assert "index's build is taken instead: where that is the CUDA build, 2.8 GB" in said


def test_a_build_that_does_not_come_is_not_taken_for_it(checkout):
    (checkout.folder / "only").write_text("cpu")
    status, said, _ = checkout.make("TORCH=cuda")
    assert status != 0 and "There is no cuda build of PyTorch for this system here: .venv has the cpu build" in said
    assert not checkout.stamp


def test_elsewhere_than_on_linux_the_package_index_has_one_build(checkout):
    checkout.system("Darwin")
    status, said, calls = checkout.make("TORCH=cpu")
    assert status == 0 and len(calls) == 1 and "and PyTorch, at most 0.2 GB" in said


@pytest.mark.parametrize("value", ["gpu", "CPU", "cpu cuda"])
def test_another_word_is_refused_and_changes_nothing(checkout, value):
    status, said, calls = checkout.make(f"TORCH={value}")
    assert status != 0 and f"TORCH is cpu or cuda; got {value}" in said
    assert not calls and not (checkout.folder / ".venv").exists()
