# SPDX-License-Identifier: Apache-2.0
"""Debian packages with their libraries inside, the same bytes from the same commit."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import NamedTuple

from pack import sbom, vendor
from pack.locks import Lock, all_locks
from pack.source import Source

SMALL, SOON = ("xz", 6), ("gzip", 1)
"""How to compress: for whoever downloads it, for whoever waits for it."""
MAINTAINER = "The fedge authors <fedge@localhost>"
HOMEPAGE = "https://pypi.org/project/fedge/"
SUITES = {"bookworm": ("3.11", "deb12"), "trixie": ("3.13", "deb13")}
"""Debian's releases: their Python, and how their packages' versions end."""
PYTHON_PACKAGES = ("python3-numpy", "python3-paho-mqtt", "python3-cryptography")


class Recipe(NamedTuple):
    """What tells one package from another."""

    name: str
    home: str
    state: str
    priority: int
    summary: str
    about: str
    fields: dict[str, str]


DEVICE = Recipe(
    "fedge-device", "device", "fedge", 60,
    "federated learning on a small board: predicts, learns, takes part",
    "A service that answers with a quantized model, learns from this board's own\n"
    "examples and sends small, signed updates over MQTT to a coordinator.\n"
    "Examples never leave the board. Comes with the libraries that it needs.",
    {},
)  # fmt: skip
COORDINATOR = Recipe(
    "fedge-coordinator", "coordinator", "fedge-coordinator", 50,
    "federated learning over MQTT: folds boards' updates into models",
    "A service that invites devices to rounds, folds what they learned into the\n"
    "next version of a model and publishes it. Nothing that it has confirmed is\n"
    "ever lost.",
    {"Recommends": "mosquitto"},
)  # fmt: skip


class Target(NamedTuple):
    """One package to build."""

    recipe: Recipe
    arch: str
    suite: str

    @property
    def python(self) -> str:
        """The Python that it runs on."""
        return SUITES[self.suite][0]

    def file(self, version: str) -> str:
        """Return the name of the package's file."""
        return f"{self.recipe.name}_{self.version(version)}_{self.arch}.deb"

    def version(self, version: str) -> str:
        """Return the package's version: a newer Debian's is the newer one."""
        return f"{version}+{SUITES[self.suite][1]}"

    @property
    def lock(self) -> Lock | None:
        """What it carries; None where Debian has it all."""
        wanted = f"{self.recipe.home}-{self.arch}-py{self.python.replace('.', '')}"
        return next((lock for lock in all_locks() if lock.name == wanted), None)

    @property
    def depends(self) -> list[str]:
        """What Debian brings."""
        major, minor = self.python.split(".")
        if self.arch == "all":
            paho = [f"{name} (>= 2)" if "paho" in name else name for name in PYTHON_PACKAGES]
            return ["python3 (>= 3.11)", *paho]
        if self.lock is None:
            return ["python3 (>= 3.11)", *PYTHON_PACKAGES, "python3-onnxruntime"]
        python = [f"python3 (>= {self.python})", f"python3 (<< {major}.{int(minor) + 1})"]
        glibc = "2.34" if self.arch == "armhf" else "2.28"  # what their wheels were linked with
        vendored = [f"libc6 (>= {glibc})", "libstdc++6 (>= 8)"]
        return [*python, *vendored, *(PYTHON_PACKAGES if self.arch == "armhf" else ())]


def targets() -> list[Target]:
    """Return every package that is built. The coordinator needs paho-mqtt 2: Debian 13."""
    devices = [Target(DEVICE, a, s) for s in SUITES for a in ("arm64", "amd64", "armhf")]
    return [*devices, Target(COORDINATOR, "all", "trixie")]


def build(
    target: Target,
    source: Source,
    wheel: Path,
    out: Path,
    *,
    version: str = "",
    squeeze: tuple[str, int] = SMALL,
) -> Path:
    """Build one package from `wheel`; return its file."""
    version = version or source.version
    out.mkdir(parents=True, exist_ok=True)
    made = out / target.file(version)
    with tempfile.TemporaryDirectory(prefix="fedge-deb-") as name:
        work = Path(name)
        tree = _tree(target, source, wheel, work)
        _documents(target, source, tree, version)
        _control(target, source, tree, version)
        _dated(tree, source.epoch)
        # One thread: with more, the compressor cuts its blocks by how many there are.
        words = [
            "dpkg-deb",
            "--root-owner-group",
            "--threads-max=1",
            f"-Z{squeeze[0]}",
            f"-z{squeeze[1]}",
        ]
        stamp = {**os.environ, "SOURCE_DATE_EPOCH": str(source.epoch), "LC_ALL": "C.UTF-8"}
        subprocess.run(
            [*words, "--build", tree, made], env=stamp, check=True, stdout=subprocess.DEVNULL
        )
    return made


def _tree(target: Target, source: Source, wheel: Path, work: Path) -> Path:
    recipe, tree = target.recipe, work / "tree"
    home = tree / "opt" / "fedge" / recipe.home
    fetched = []
    if target.lock is not None:
        (work / "wheels").mkdir()
        fetched = vendor.fetch(target.lock, work / "wheels")
    vendor.unpack([*fetched, wheel], home / "lib")
    if recipe is DEVICE:
        vendor.only_commands_of(home / "lib", ["coordinator"])
    else:
        vendor.only_commands_of(home / "lib", ["coordinator/demo", "coordinator/bench"])
    ours = source.folder / "packaging"
    for path in home.rglob("*"):  # whatever mode a wheel gave its files
        path.chmod(0o755 if path.is_dir() else 0o644)
    _copy(ours / "deb" / "fedge", home / "bin" / "fedge", 0o755)
    unit = f"{recipe.name}.service"
    _copy(ours / "systemd" / unit, tree / "usr/lib/systemd/system" / unit)
    _copy(
        ours / "deb" / recipe.name / f"{recipe.home}.toml", tree / f"etc/fedge/{recipe.home}.toml"
    )
    return tree


def _documents(target: Target, source: Source, tree: Path, version: str) -> None:
    """Write what policy asks for: licence, changes, manual, and the bill of materials."""
    recipe, ours = target.recipe, source.folder / "packaging" / "deb" / target.recipe.name
    doc = tree / "usr/share/doc" / recipe.name
    for name in ("copyright", "README.Debian"):
        _copy(ours / name, doc / name)
    _copy(ours / "lintian-overrides", tree / "usr/share/lintian/overrides" / recipe.name)
    manual = f"{recipe.name}.8"
    _squeezed(tree / "usr/share/man/man8" / f"{manual}.gz", (ours / manual).read_text())
    dated = format_datetime(datetime.fromtimestamp(source.epoch, UTC))
    change = f"{recipe.name} ({target.version(version)}) {target.suite}; urgency=medium\n\n"
    change += f"  * fedge {source.version}: see CHANGELOG.md beside this file.\n\n"
    _squeezed(doc / "changelog.gz", f"{change} -- {MAINTAINER}  {dated}\n")
    _squeezed(doc / "CHANGELOG.md.gz", (source.folder / "CHANGELOG.md").read_text())
    carried = vendor.carried(target.lock) if target.lock else []
    bill = sbom.bill(recipe.name, target.version(version), carried, source.epoch, "deb")
    _write(doc / "sbom.cdx.json", bill)


def _squeezed(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    file.chmod(0o644)


def _control(target: Target, source: Source, tree: Path, version: str) -> None:
    """Write what dpkg reads: fields, scripts, checksums, which files are the operator's."""
    recipe, control = target.recipe, tree / "DEBIAN"
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    names = [str(path.relative_to(tree)) for path in files]
    control.mkdir()
    for name in ("postinst", "prerm", "postrm"):
        text = (source.folder / "packaging" / "deb" / name).read_text()
        for word, value in recipe._asdict().items():
            text = text.replace(f"@{word.upper()}@", str(value))
        _write(control / name, text, 0o755)
    kept = [f"/{name}\n" for name in names if name.startswith("etc/")]
    _write(control / "conffiles", "".join(kept))
    sums = [hashlib.md5(f.read_bytes(), usedforsecurity=False).hexdigest() for f in files]
    lines = [f"{s}  {n}\n" for s, n in zip(sums, names, strict=True) if not n.startswith("etc/")]
    _write(control / "md5sums", "".join(lines))
    about = "".join(f" {line}\n" for line in recipe.about.splitlines())
    fields = {
        "Package": recipe.name,
        "Version": target.version(version),
        "Section": "net",
        "Priority": "optional",
        "Architecture": target.arch,
        "Maintainer": MAINTAINER,
        "Installed-Size": sum(-(-f.stat().st_size // 1024) for f in files),
        "Depends": ", ".join(target.depends),
        **recipe.fields,
        "Homepage": HOMEPAGE,
        "Description": f"{recipe.summary}\n{about.rstrip()}",
    }
    _write(control / "control", "".join(f"{key}: {value}\n" for key, value in fields.items()))


def _dated(tree: Path, epoch: int) -> None:
    for path in [tree, *tree.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _write(file: Path, text: str, mode: int = 0o644) -> None:
    file.write_text(text)
    file.chmod(mode)


def _copy(file: Path, to: Path, mode: int = 0o644) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)
    to.chmod(mode)
