"""pyproject.toml, constraints.txt and environment.yml say the same; the top level stays small."""

import re
import subprocess
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
