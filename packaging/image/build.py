# SPDX-License-Identifier: Apache-2.0
"""Builds the card image `fedge-VERSION-arm64.img.xz` for Raspberry Pi 3, 4 and Zero 2 W.

    sudo packaging/image/build --out dist [--deb fedge-device_..._arm64.deb] [--cache DIR] [--twice]

Debian trixie by mmdebstrap, the fedge-device package, genimage; nothing is mounted. Needs root, a
Debian (bookworm or newer) and the package indexes; what is missing is installed. The same commit,
the same deb and the same Debian packages give the same root file system, byte for byte: its sha256
and the list of packages are written beside the image. ``--twice`` shows it: package, bare Debian
and root file system are made two times, neither from a cache, and have to come out the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SUITE, MIRROR = "trixie", "http://deb.debian.org/debian"
DISK = "fed9e000"
"""The signature in the partition table: PARTUUID=fed9e000-02 is the system, on every machine."""
BOOT_MIB, SYSTEM_MIB, DATA_MIB = 256, 512, 128
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "genimage": "genimage",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "mke2fs": "e2fsprogs",
    "mksquashfs": "squashfs-tools",
    "xz": "xz-utils",
}
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ARM64_ELF = (
    rb":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    rb":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    rb":/usr/bin/qemu-aarch64-static:F"
)
FIRMWARE = ("bootcode.bin", "start.elf", "fixup.dat", "start4.elf", "fixup4.dat")
BOARDS = (
    "bcm2837-rpi-3-*.dtb",
    "bcm2837-rpi-zero-2-w.dtb",
    "bcm2837-rpi-cm3-*.dtb",
    "bcm2711-*.dtb",
)
GONE = (
    "dev/*", "boot/*", "vmlinuz*", "initrd.img*", "usr/lib/raspi-firmware", "usr/lib/linux-image-*",
    "etc/ssh/ssh_host_*", "etc/machine-id", "var/lib/dbus/machine-id", "etc/resolv.conf.*",
    "var/cache/*", "var/lib/apt/*", "var/log/*", "var/lib/dpkg/*-old", "var/lib/systemd/*",
    "usr/share/python3/debpython/__pycache__", "usr/lib/python3*/test", "usr/lib/python3*/idlelib",
    "usr/lib/python3*/lib2to3", "usr/lib/python3*/pydoc_data", "usr/lib/python3*/ensurepip",
    "usr/share/initramfs-tools", "etc/initramfs-tools", "usr/lib/firmware/raspberrypi",
    "var/lib/systemd/catalog", "tmp/*", "run/*", "etc/.pwd.lock", "etc/*-", "etc/hostname.*",
)  # fmt: skip
"""What the running system never reads, and what differs from build to build."""
UNITS_OFF = (
    "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "wpa_supplicant.service",
    "systemd-pstore.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount",
    # A device predicts and learns without a network: it does not wait for one.
    "systemd-networkd-wait-online.service",
)  # fmt: skip
GENERATORS_OFF = ("gpt-auto", "hibernate-resume", "rc-local", "ssh", "sysv", "tpm2")
"""Of systemd, for what these boards do not have; each would cost its start at every boot."""
UNITS_ON = {
    "multi-user.target.wants": (
        "fedge-provision.service", "fedge-grow.service", "fedge-device.service", "ssh.service",
        "systemd-networkd.service",
    ),
    "sys-subsystem-net-devices-wlan0.device.wants": ("fedge-wifi.service",),
    "timers.target.wants": ("fstrim.timer",),
}  # fmt: skip


def main() -> int:
    """Build, then print what came out as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "dist", help="where the image goes"
    )
    parser.add_argument("--deb", type=Path, help="the device's package; built when not given")
    parser.add_argument("--cache", type=Path, help="keep the bare Debian there; used if it fits")
    parser.add_argument("--mirror", default=MIRROR, help="of Debian")
    parser.add_argument(
        "--twice", action="store_true", help="make the system a second time, and compare"
    )
    parser.add_argument("--no-xz", action="store_true", help="leave the image as it is")
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("expected to be root, for file owners and chroot; say sudo")
    began = time.monotonic()
    _tools()
    _emulation()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedge-image-") as made:
        work, again = Path(made) / "once", Path(made) / "again"
        deb = args.deb or _deb(work)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(_anew, again, args.mirror, args.deb) if args.twice else None
            base = _base(args.cache or work, args.mirror, is_new=args.twice)
            system = _system(work, base, deb)
            if other is not None:
                expect_same(system, other.result())
        record = _image(work, system, deb, args.out.resolve(), xz=not args.no_xz)
    record |= {"built_twice": args.twice, "seconds": round(time.monotonic() - began)}
    (args.out / f"{name()}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 0


def version() -> str:
    """Return the version that the image is named after."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def name() -> str:
    """Return what the image and its records are called."""
    return f"fedge-{version()}-arm64"


@cache
def epoch() -> int:
    """Return the time that every file of the image bears: that of the commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return int(given or _run("git", "-C", REPOSITORY, "log", "-1", "--format=%ct"))


def _run(*command: str | Path, **options: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]  # options of run
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        sys.exit(f"{' '.join(words[:3])} .. ended with {done.returncode}:\n{tail}")
    return str(done.stdout)


def _clean() -> dict[str, str]:
    """An environment that leaves no trace: no proxies of Python's, no switched-off byte code."""
    kept = {name: value for name, value in os.environ.items() if name.endswith("_proxy")}
    stamp = {"SOURCE_DATE_EPOCH": str(epoch()), "PYTHONHASHSEED": "0"}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**kept, **stamp, "PATH": path, "HOME": "/root", "LC_ALL": "C.UTF-8"}


def _tools() -> None:
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if missing:
        _run("apt-get", "update", "-q")
        _run("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing)


def _emulation() -> None:
    """Let the kernel hand arm64 programs to the emulator, in a chroot too."""
    if os.uname().machine == "aarch64":
        return
    if not (BINFMT / "register").exists():
        _run("mount", "-t", "binfmt_misc", "none", BINFMT)
    if not (BINFMT / "qemu-aarch64").exists():
        (BINFMT / "register").write_bytes(ARM64_ELF)


def _deb(work: Path) -> Path:
    builder = REPOSITORY / "packaging" / "deb" / "build"
    _run(builder, "--out", work / "deb", f"fedge-device:arm64:{SUITE}")
    return next((work / "deb").glob("fedge-device_*_arm64.deb"))


def _packages() -> list[str]:
    lines = (HERE / "packages").read_text().splitlines()
    return " ".join(line for line in lines if not line.startswith("#")).split()


def _base(folder: Path, mirror: str, *, is_new: bool) -> Path:
    """Return the bare Debian, made once for a list of packages and a set of early files."""
    files = [HERE / "packages", HERE / "exclude", *sorted((HERE / "setup").rglob("*"))]
    parts = [file.read_bytes() for file in files if file.is_file()]
    name = hashlib.sha256(b"\0".join([DISK.encode(), *parts])).hexdigest()[:16]
    base = folder / f"base-{name}"
    if not is_new and (base / "etc/os-release").exists():
        return base
    folder.mkdir(parents=True, exist_ok=True)
    early = folder / "early"
    shutil.rmtree(early, ignore_errors=True)
    _lay(HERE / "setup", early)
    making = folder / f"making-{name}"
    shutil.rmtree(making, ignore_errors=True)
    options = {"Acquire::Check-Valid-Until": "false", "Acquire::Languages": "none"}
    _run(
        "mmdebstrap", "--mode=root", "--architectures=arm64", "--variant=essential",
        "--components=main,non-free-firmware", f"--include={','.join(_packages())}",
        f'--setup-hook=cp -rT {early} "$1" && mkdir -p "$1/boot/firmware"',
        *(f'--aptopt={key} "{value}"' for key, value in options.items()),
        f"--dpkgopt={HERE / 'exclude'}", SUITE, making, mirror,
        env=_clean(),
    )  # fmt: skip
    shutil.rmtree(base, ignore_errors=True)
    making.rename(base)
    return base


def _lay(source: Path, target: Path) -> None:
    """Copy a tree of settings, with the signature of the disk filled in."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if "__pycache__" in path.parts:
            continue
        to.write_bytes(path.read_bytes().replace(b"@DISK@", DISK.encode()))
        to.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


class System(NamedTuple):
    """The root file system: the folder, what it was made of, and what a card holds of it."""

    root: Path
    packages: str
    squashed: Path


def _anew(work: Path, mirror: str, deb: Path | None) -> System:
    """Make a system of which nothing was there before."""
    return _system(work, _base(work, mirror, is_new=True), deb or _deb(work))


def expect_same(first: System, second: System) -> None:
    """End with what differs, should two systems not be the same."""
    if first.packages != second.packages:
        sides = (set(system.packages.splitlines()) for system in (first, second))
        differ = " ".join(sorted(set.symmetric_difference(*sides)))
        sys.exit(f"expected one list of packages, the mirror moved on between: {differ}")
    if _sha256(first.squashed) != _sha256(second.squashed):
        ones, others = (listing(system.root) for system in (first, second))
        differ = "\n".join(n for n in sorted({*ones, *others}) if ones.get(n) != others.get(n))
        sys.exit(f"expected the same root file system of two builds, these differ:\n{differ}")


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Return what there is to know of each file but its place in the archive."""
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        content = str(path.readlink()) if path.is_symlink() else _sha256(path) if is_file else ""
        had = path.lstat()
        about = (had.st_mode, had.st_uid, had.st_gid, had.st_nlink, had.st_mtime_ns, content)
        found[str(path.relative_to(root))] = about
    return found


def _system(work: Path, base: Path, deb: Path) -> System:
    root, files = work / "root", work / "files"
    files.mkdir(parents=True)
    _run("cp", "-a", base, root)
    shutil.copy(deb, root / deb.name)
    _run("chroot", root, "dpkg", "-i", f"/{deb.name}", env=_clean())
    (root / deb.name).unlink()
    shown = "${Package} ${Version} ${Architecture}\n"
    packages = _run("dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", f"-f={shown}")
    _boot(work, root, files / "boot.vfat")
    _settle(root)
    _stamp(root)
    _squash(root, files / "system.squashfs")
    return System(root, packages, files / "system.squashfs")


def _image(work: Path, system: System, deb: Path, out: Path, *, xz: bool) -> dict[str, object]:
    files, packages = work / "files", system.packages
    _data(work, files / "data.ext4")
    made = _assemble(work, files, out / f"{name()}.img")
    (out / f"{name()}.packages").write_text(packages)
    record: dict[str, object] = {
        "version": version(),
        "epoch": epoch(),
        "deb": {"file": deb.name, "bytes": deb.stat().st_size, "sha256": _sha256(deb)},
        "packages": len(packages.splitlines()),
        "packages_sha256": hashlib.sha256(packages.encode()).hexdigest(),
        "system": {"bytes": system.squashed.stat().st_size, "sha256": _sha256(system.squashed)},
        "img_bytes": made.stat().st_size,
        "img_sha256": _sha256(made),
    }
    if xz:
        _run("xz", "-6", "-T2", "--keep", "--force", made)
        packed = made.with_name(f"{made.name}.xz")
        record["xz_bytes"] = packed.stat().st_size
        record["xz_sha256"] = _sha256(packed)
    return record


def _settle(root: Path) -> None:
    """Make of an installed Debian the read-only system of a board."""
    for pattern in GONE:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    _lay(HERE / "overlay", root)
    (root / "etc/machine-id").touch()
    (root / "etc/fedge-release").write_text(f"{version()}\n")
    (root / "usr/lib/clock-epoch").touch()
    os.utime(root / "usr/lib/clock-epoch", (epoch(), epoch()))
    for folder in ("data", "boot/firmware", "var/lib/private", "var/lib/systemd", "var/tmp"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "var/lib/private").chmod(0o700)
    (root / "var/tmp").chmod(0o1777)
    _link(root / "var/lib/fedge", "private/fedge")
    _link(root / "etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    system = root / "etc/systemd/system"
    for unit in UNITS_OFF:
        for wanted in system.glob(f"*.wants/{unit}"):
            wanted.unlink()
        _link(system / unit, "/dev/null")
    generators = root / "etc/systemd/system-generators"
    generators.mkdir(exist_ok=True)
    for name in GENERATORS_OFF:
        _link(generators / f"systemd-{name}-generator", "/dev/null")
    for target, units in UNITS_ON.items():
        (system / target).mkdir(exist_ok=True)
        for unit in units:
            own = (system / unit).exists()
            home = "/etc/systemd/system" if own else "/usr/lib/systemd/system"
            _link(system / target / unit, f"{home}/{unit}")


def _stamp(root: Path) -> None:
    """Give everything the time of the commit but Python's sources, whose byte code names theirs."""
    for path in root.rglob("*"):
        if path.suffix != ".py" or path.lstat().st_mtime > epoch():
            os.utime(path, (epoch(), epoch()), follow_symlinks=False)
    shadow = root / "etc/shadow"
    lines = [line.split(":") for line in shadow.read_text().splitlines()]
    text = "".join(":".join([*f[:2], str(epoch() // 86400), *f[3:]]) + "\n" for f in lines)
    shadow.write_text(
        text
    )  # when passwords were last changed: the day that the bare Debian was made
    os.utime(shadow, (epoch(), epoch()))


def _link(path: Path, to: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def _squash(root: Path, to: Path) -> None:
    """Write the system: sorted, and no file later than the commit."""
    stamp = {"SOURCE_DATE_EPOCH": str(epoch())}
    _run(
        "mksquashfs", root, to, "-comp", "zstd", "-Xcompression-level", "15", "-b", "256K",
        "-noappend", "-no-progress", "-reproducible",
        env={**os.environ, **stamp},
    )  # fmt: skip
    if to.stat().st_size > SYSTEM_MIB * 2**20:
        sys.exit(f"expected a system of at most {SYSTEM_MIB} MiB, got {to.stat().st_size >> 20}")


def _boot(work: Path, root: Path, to: Path) -> None:
    """Write the partition that the board's firmware reads, and that people put settings into."""
    card = work / "card"
    _lay(HERE / "card", card)
    shutil.copy(max(root.glob("boot/vmlinuz-*")), card / "vmlinuz")
    shutil.copy(max(root.glob("boot/initrd.img-*")), card / "initrd.img")
    for name in FIRMWARE:
        shutil.copy(root / "usr/lib/raspi-firmware" / name, card)
    for pattern in BOARDS:
        for tree in root.glob(f"usr/lib/linux-image-*/broadcom/{pattern}"):
            shutil.copy(tree, card)
    _run("truncate", "-s", f"{BOOT_MIB}M", to)
    _run("mkfs.vfat", "-F", "32", "-n", "FEDGE", "-i", DISK, "--invariant", to)
    for file in sorted(card.iterdir()):
        os.utime(file, (epoch(), epoch()))
        _run("mcopy", "-m", "-i", to, file, "::/", env={**os.environ, "TZ": "UTC"})


def _data(work: Path, to: Path) -> None:
    """Write the small file system that the first boot grows to the card."""
    tree = work / "data"
    for name in ("etc", "ssh", "private", "systemd"):
        (tree / name).mkdir(parents=True)
        (tree / name).chmod(0o755 if name == "systemd" else 0o700)
    _run("truncate", "-s", f"{DATA_MIB}M", to)
    uuid = f"{DISK}-0000-4000-8000-000000000004"
    options = f"hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    _run(
        "mke2fs", "-q", "-t", "ext4", "-L", "fedge-data", "-U", uuid, "-E", options,
        "-J", "size=16", "-m", "1", "-d", tree, to,
        env={**os.environ, "E2FSPROGS_FAKE_TIME": str(epoch())},
    )  # fmt: skip


def _assemble(work: Path, files: Path, to: Path) -> Path:
    """Put the partitions together: 03 is the room for the next system, which an update fills."""
    config = work / "genimage.cfg"
    config.write_text(
        (HERE / "genimage.cfg")
        .read_text()
        .replace("@DISK@", DISK)
        .replace("@SYSTEM@", f"{SYSTEM_MIB}M")
    )
    (work / "empty").mkdir()
    _run(
        "genimage", "--config", config, "--inputpath", files, "--outputpath", work / "made",
        "--rootpath", work / "empty", "--tmppath", work / "tmp",
    )  # fmt: skip
    return Path(shutil.move(work / "made" / "sdcard.img", to))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
