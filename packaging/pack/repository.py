# SPDX-License-Identifier: Apache-2.0
"""An apt repository of packages: one folder to serve, signed with the operator's key.

``python -m pack.repository FOLDER --key KEY DEB...`` adds the packages and signs anew; `KEY` is
what gpg knows the key by. Packages of different Debian releases live side by side, in suites.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pack.deb import SUITES

ARCHES = ("amd64", "arm64", "armhf")


def add(folder: Path, debs: Sequence[Path], key: str, gpg_home: Path | None = None) -> None:
    """Put `debs` into the repository at `folder` and sign it.

    Raises: ValueError for a package that names no release of Debian.
    """
    for deb in debs:
        pool = folder / "pool" / _suite_of(deb)
        pool.mkdir(parents=True, exist_ok=True)
        shutil.copy2(deb, pool / deb.name)
    for pool in sorted((folder / "pool").iterdir()):
        _index(folder, pool.name)
        _sign(folder / "dists" / pool.name, key, gpg_home)
    _gpg(gpg_home, "--export", "--output", folder / "fedge-archive-keyring.gpg", key)


def _suite_of(deb: Path) -> str:
    for suite, (_, ending) in SUITES.items():
        if re.search(rf"\+{ending}_\w+\.deb$", deb.name):
            return suite
    raise ValueError(
        f"expected {deb.name} to name its Debian, as in fedge-device_1.0+deb13_arm64.deb"
    )


def _index(folder: Path, suite: str) -> None:
    dists = folder / "dists" / suite
    for arch in ARCHES:
        index = dists / "main" / f"binary-{arch}"
        index.mkdir(parents=True, exist_ok=True)
        words = ["apt-ftparchive", f"--arch={arch}", "packages", f"pool/{suite}"]
        listed = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, check=True).stdout
        (index / "Packages").write_bytes(listed)
        subprocess.run(["gzip", "-9nkf", index / "Packages"], check=True)
    options = {"Origin": "fedge", "Label": "fedge", "Suite": suite, "Codename": suite}
    options |= {"Components": "main", "Architectures": " ".join(ARCHES)}
    words = ["apt-ftparchive"]
    words += [f"-oAPT::FTPArchive::Release::{name}={value}" for name, value in options.items()]
    for stale in ("Release", "Release.gpg", "InRelease"):
        (dists / stale).unlink(missing_ok=True)
    made = subprocess.run([*words, "release", dists], stdout=subprocess.PIPE, check=True).stdout
    (dists / "Release").write_bytes(made)


def _sign(dists: Path, key: str, gpg_home: Path | None) -> None:
    release = dists / "Release"
    common = ["--local-user", key, "--digest-algo=SHA512", "--output"]
    _gpg(gpg_home, *common, dists / "InRelease", "--clear-sign", release)
    _gpg(gpg_home, *common, dists / "Release.gpg", "--armor", "--detach-sign", release)


def _gpg(home: Path | None, *words: str | Path) -> None:
    env = {**os.environ, "GNUPGHOME": str(home)} if home else None
    subprocess.run(["gpg", "--batch", "--yes", *words], check=True, env=env, capture_output=True)


def main() -> int:
    """Add packages to a repository."""
    parser = argparse.ArgumentParser(prog="packaging/apt-repository", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("debs", nargs="+", type=Path, metavar="DEB")
    parser.add_argument("--key", required=True, help="your signing key, as gpg knows it")
    args = parser.parse_args()
    add(args.folder, args.debs, args.key)
    print(f"serve {args.folder}; devices need {args.folder / 'fedge-archive-keyring.gpg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
