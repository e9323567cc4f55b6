"""pyproject.toml installs the package nanogsm with all its files and what it needs.

.ci/run installs it into a fresh environment and calls tests/installed.py from another folder.
"""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pins() -> dict[str, tuple[int, ...]]:
    lines = (ROOT / "requirements.txt").read_text().split()
    pairs = [line.split("==") for line in lines]
    return {name: tuple(map(int, version.split("."))) for name, version in pairs}


def test_the_dependencies_are_those_of_requirements_txt_in_ranges_that_hold_the_pins():
    pinned = {name: version for name, version in pins().items() if name != "pytest"}
    given = {}
    for line in PROJECT["project"]["dependencies"]:
        name, low, high = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", line).groups()
        given[name] = [tuple(map(int, end.split("."))) for end in (low, high)]
    assert given.keys() == pinned.keys()
    for name, (low, high) in given.items():
        assert low <= pinned[name] < high, name


def test_every_file_of_the_package_is_installed():
    """Python files by their packages, all others by a pattern."""
    command = ["git", "ls-files", "nanogsm"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git's list of files")
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, found in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in found
    ]
    for name in listed.stdout.split():
        if name.endswith(".py"):
            assert (ROOT / name).with_name("__init__.py").exists(), name
        else:  # fnmatch's * also matches a /, which setuptools' does not
            fits = [p for p in patterns if p.count("/") == name.count("/") and fnmatch(name, p)]
            assert fits, f"{name}: name it in pyproject.toml under package-data"


def test_nothing_else_is_installed():
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["include"] == ["nanogsm*"]
    assert not list(ROOT.glob("nanogsm?*/__init__.py"))
