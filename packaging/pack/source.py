# SPDX-License-Identifier: Apache-2.0
"""What is packed: the tree of one commit and its date, never what lies about beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
LEFT_OUT = (".git", ".venv*", "build", "dist", "__pycache__", ".*_cache", ".hypothesis")


class Source(NamedTuple):
    """A tree to pack, and the moment that every file made from it is dated with."""

    folder: Path
    epoch: int
    version: str
    commit: str
    """What it is a tree of; "tree" for one that no commit names."""


def export(into: Path, *, is_tree: bool = False) -> Source:
    """Write the tree of HEAD to `into`, or the working tree as it is where `is_tree`.

    Outside a checkout (in an unpacked sdist) the tree itself is taken.
    """
    into.mkdir(parents=True)
    has_git = (REPOSITORY / ".git").exists()
    if is_tree or not has_git:
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(REPOSITORY, into, ignore=ignored, dirs_exist_ok=True, symlinks=True)
        commit = "tree"
    else:
        commit = _git("rev-parse", "HEAD")
        archive = subprocess.run(
            ["git", "-C", REPOSITORY, "archive", commit], stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", into], input=archive.stdout, check=True)
    for path in [into, *into.rglob("*")]:
        if not path.is_symlink():  # whatever the umask of a checkout was
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return Source(into, _epoch(into, has_git=has_git), _version(into), commit)


def _epoch(folder: Path, *, has_git: bool) -> int:
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    if has_git:
        return int(_git("log", "-1", "--format=%ct"))
    return int((folder / "pyproject.toml").stat().st_mtime)


def _version(folder: Path) -> str:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", REPOSITORY, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
