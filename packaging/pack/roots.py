# SPDX-License-Identifier: Apache-2.0
"""Debian file systems to try packages in, and the emulator for another machine's programs.

A file system is kept under ``build/packaging/roots`` by what it holds, where the machine lasts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pack.source import REPOSITORY

KEPT = REPOSITORY / "build" / "packaging" / "roots"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ARM64_ELF = (
    rb":fedge-arm64:M::\x7f\x45\x4c\x46\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    rb":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    rb":/usr/bin/qemu-aarch64-static:F"
)
MERGED = ("bin", "lib", "lib64", "sbin")


class Root(NamedTuple):
    """A file system of Debian's in a folder."""

    folder: Path
    has_proc: bool
    """Whether programs in it see /proc and /dev. An emulated one must not: it would read of the
    host's processor, and onnxruntime falls over that."""

    def run(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        text: str | None = None,
        is_checked: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root; nothing of our own environment goes along."""
        command = self.command(*words)
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment(env), check=False
        )
        if is_checked and done.returncode:
            said = (done.stdout + done.stderr).strip()[-3000:]
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}\n{said}")
        return done

    def command(self, *words: str | Path) -> list[str]:
        """Return how to run `words` in it. Mounts are made in a name space that ends with them."""
        if not self.has_proc:
            return ["chroot", str(self.folder), *map(str, words)]
        mounts = (
            'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
        )
        inside = ["sh", "-c", mounts, str(self.folder), *map(str, words)]
        return ["unshare", "--mount", "--propagation=private", *inside]


def environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """Return what a program in a root is given: nothing of our own environment."""
    plain = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}
    return plain | {"DEBIAN_FRONTEND": "noninteractive"} | dict(env or {})


@contextlib.contextmanager
def extracted(arch: str, suite: str, packages: Sequence[str]) -> Iterator[Root]:
    """Give a file system whose packages are unpacked, not configured: no foreign program ran."""
    emulate(arch)
    with _made(arch, suite, "extract", packages) as folder:
        for name in MERGED:
            if not (folder / name).exists() and (folder / "usr" / name).exists():
                (folder / name).symlink_to(f"usr/{name}")
        yield Root(folder, has_proc=False)


@contextlib.contextmanager
def configured(arch: str, suite: str, packages: Sequence[str]) -> Iterator[Root]:
    """Give a file system as after an installation, for this machine's own architecture."""
    with _made(arch, suite, "minbase", packages) as folder:
        yield Root(folder, has_proc=True)


@contextlib.contextmanager
def _made(arch: str, suite: str, variant: str, packages: Sequence[str]) -> Iterator[Path]:
    what = f"{suite} {arch} {variant} {' '.join(sorted(packages))}"
    kept = KEPT / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.tar"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        half = kept.with_suffix(".half.tar")
        words = ["mmdebstrap", "--quiet", "--mode=root", f"--architectures={arch}"]
        words += [f"--variant={variant}", f"--include={','.join(packages)}"]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run([*words, suite, half, mirror()], check=True, env=env)
        half.rename(kept)
    with tempfile.TemporaryDirectory(prefix="fedge-root-") as made:
        folder = Path(made) / "root"
        folder.mkdir()
        subprocess.run(["tar", "-xpf", kept, "-C", folder, "--numeric-owner"], check=True)
        yield folder


def mirror() -> str:
    """Return the mirror that this machine's own packages come from."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for place in filter(Path.is_file, places):
        found = re.search(r"^(?:URIs:|deb(?: \[.*\])?) (\S+)", place.read_text(), re.MULTILINE)
        if found and found[1].rstrip("/").endswith("/debian"):
            return found[1]
    return "http://deb.debian.org/debian"


def emulate(arch: str) -> None:
    """Let the kernel hand the programs of `arch` to the emulator, their children included."""
    if arch != "arm64" or os.uname().machine == "aarch64":
        return
    if not shutil.which("qemu-aarch64-static"):
        raise RuntimeError(
            "expected qemu-aarch64-static, it is not there; install qemu-user-static"
        )
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "none", BINFMT], check=True)
    if not any("aarch64" in e.name or "arm64" in e.name for e in BINFMT.iterdir()):
        (BINFMT / "register").write_bytes(ARM64_ELF)
