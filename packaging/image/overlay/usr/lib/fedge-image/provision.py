# SPDX-License-Identifier: Apache-2.0
"""Takes settings from the card's boot partition: checked, moved to the data partition, wiped there.

What is on the boot partition replaces what is on the data partition, file by file, and both are
checked together as they would stand afterwards. If anything is wrong nothing is taken, the old
settings stay in force, and `fedge-says.txt` on the boot partition tells what to correct. Cut off
anywhere, it begins again at the next boot: a file is wiped only after its copy is on disk.
"""

from __future__ import annotations

import argparse
import os
import re
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

SAYS = "fedge-says.txt"
STATE = Path("/var/lib/fedge")
WIPE = ".wipe"
MAX_BYTES = 256 * 1024
MAX_INBOX_BYTES = 256 * 2**20
SSH_KEY = re.compile(r"^(ssh-(ed25519|rsa)|ecdsa-sha2-\S+|sk-\S+@openssh\.com) [A-Za-z0-9+/=]{40,}")


class Wrong(Exception):  # noqa: N818 - it is said to a technician, who reads no names of classes
    """What is wrong with a file of the card, and what to do."""


def main() -> int:
    """Take what is there; return 0 also when it was wrong, because the board boots on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boot", type=Path, default=Path("/boot/firmware"))
    parser.add_argument("--data", type=Path, default=Path("/data"))
    args = parser.parse_args()
    boot, data = args.boot, args.data
    try:
        with _Writable(boot):
            try:
                says = take(boot, data, data / "private" / "fedge")
            except (Wrong, OSError) as error:
                says = f"PROBLEM: {error}\nCorrect it and start the board again."
                _blink()
            say(boot, says)
    except OSError as error:  # a boot partition that cannot be written must not keep the board down
        says = f"PROBLEM: the boot partition cannot be written: {error}"
    print(f"fedge: {says}")
    return 0


def take(boot: Path, data: Path, state: Path) -> str:
    """Check what the card has with what the board has, move it, wipe it; return what to say.

    Raises: Wrong, and nothing was changed.
    """
    etc = data / "etc"
    for left in sorted(boot.rglob(f"*{WIPE}")):  # power failed while it was wiped
        wipe(left)
    new = {name: _read(boot / name) for name in CHECKS if (boot / name).is_file()}
    rows = sorted(path for path in (boot / "inbox").glob("*") if path.suffix in {".npz", ".csv"})
    old = {name: _read(etc / name) for name in CHECKS if (etc / name).is_file()}
    files = check({**old, **new})
    if "fedge.toml" not in files:
        raise Wrong(
            "there is no fedge.toml: copy fedge.toml.example to fedge.toml on this partition and "
            "fill it in. Until then the board waits"
        )
    for row in rows:
        if row.stat().st_size > MAX_INBOX_BYTES:
            raise Wrong(f"inbox/{row.name}: expected at most {MAX_INBOX_BYTES >> 20} MiB; split it")
    for name, content in files.items():
        _write(etc / name, content)
    for row in rows:
        _deliver(row, state)
    for name in new:
        _retire(boot / name)
    for row in rows:
        _retire(row)
    taken = ", ".join([*new, *(f"inbox/{row.name}" for row in rows)]) or "nothing new"
    return f"OK: {taken}; moved to the data partition and wiped here."


def check(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files as they are kept, `fedge.toml` completed by what this image decides.

    Raises: Wrong naming the file and what to do.
    """
    kept = dict(files)
    for name, content in files.items():
        try:
            CHECKS[name](content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Wrong(f"{name}: expected text (UTF-8), {error.reason}") from error
        except Wrong as error:
            raise Wrong(f"{name}: {error}") from error
    if "fedge.toml" in files:
        given = {name for name, content in files.items() if content}
        kept["fedge.toml"] = settle(files["fedge.toml"].decode("utf-8"), given).encode()
        for name in ("broker-password", "ca.pem"):
            kept.setdefault(name, b"")  # the service is handed all three, used or not
    return kept


def settle(text: str, given: set[str]) -> str:
    """Add what the image decides and the file leaves open; then the device's own check.

    Raises: Wrong with what the device says about its configuration.
    """
    table = tomllib.loads(text)
    first = ""
    if "state" not in table:
        first += f'state = "{STATE}"\n'
    if "ca_file" not in table and "ca.pem" in given:
        first += 'ca_file = "ca.pem"\n'
    if "password_file" not in table and "broker-password" in given:
        first += 'password_file = "broker-password"\n'
    last = "" if "source" in table else f'\n[source]\nfolder = "{STATE}/inbox"\n'
    settled = first + text + last
    _judge(settled, given)
    return settled


def _judge(text: str, given: set[str]) -> None:
    sys.path.insert(0, os.environ.get("FEDGE_LIBRARY", "/opt/fedge/device/lib"))
    from edge_sdk import device_config
    from edge_sdk.errors import ConfigError

    here = Path("/settings")  # relative paths start there: what is not absolute shows
    try:
        config = device_config.parse(tomllib.loads(text), here)
    except ConfigError as error:
        raise Wrong(f"fedge.toml: {error}") from error
    if not re.match(r"mqtts?://[^/]+$", config.broker):
        raise Wrong(f"fedge.toml: broker: expected mqtts://HOST[:PORT], got {config.broker!r}")
    for key, path in (("ca_file", config.ca_file), ("password_file", config.password_file)):
        if path is not None and path.is_relative_to(here) and path.name not in given:
            raise Wrong(f"fedge.toml: {key} names {path.name}, which is not on the card: add it")
    source = config.source
    places = {
        "state": config.state,
        "model_file": config.model_file,
        "source.folder": source and source.folder,
    }
    for key, path in places.items():
        if path is not None and not path.is_relative_to(STATE):
            raise Wrong(f"fedge.toml: {key}: expected a path in {STATE}, the rest is read-only")


def _toml(text: str) -> None:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Wrong(f"not TOML: {error}") from error


def _password(text: str) -> None:
    if text and (not text.splitlines()[0].strip() or len(text.splitlines()) > 1):
        raise Wrong("expected one line with the broker's password")


def _authority(text: str) -> None:
    if not text:
        return
    try:
        ssl.create_default_context(cadata=text)
    except ssl.SSLError as error:
        raise Wrong(f"expected certificates in PEM form: {error.reason}") from error
    if "PRIVATE KEY" in text:
        raise Wrong("it holds a private key: a board needs the certificate alone")


def _wifi(text: str) -> None:
    if not re.search(r"^\s*country=[A-Z]{2}\s*$", text, re.MULTILINE):
        raise Wrong("expected a line country=XX with the two letters of the country")
    if "network={" not in text or text.count("{") != text.count("}"):
        raise Wrong('expected network={ ssid="..." psk="..." }')


def _keys(text: str) -> None:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines or not all(SSH_KEY.match(line) for line in lines):
        raise Wrong("expected a public key a line, as in id_ed25519.pub")


CHECKS: dict[str, Callable[[str], None]] = {
    "fedge.toml": _toml,
    "broker-password": _password,
    "ca.pem": _authority,
    "wpa_supplicant.conf": _wifi,
    "authorized_keys": _keys,
}


def say(boot: Path, text: str) -> None:
    """Leave a message for whoever puts the card into a computer; unchanged, it is not written."""
    path, content = boot / SAYS, f"{text}\n".encode()
    if not path.is_file() or path.read_bytes() != content:
        _write(path, content)


def wipe(path: Path) -> None:
    """Overwrite and remove. Flash may keep the old cells: who must be sure takes a new card."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    _sync(path.parent)


def _retire(path: Path) -> None:
    gone = path.with_name(path.name + WIPE)
    path.replace(gone)  # cut off from here on, the next boot only wipes
    _sync(path.parent)
    wipe(gone)


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise Wrong(f"{path.name}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}")
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")


def _deliver(row: Path, state: Path) -> None:
    """Put examples into the device's inbox, once, also when power failed after the copy."""
    content = row.read_bytes()
    inbox = state / "inbox"
    for made in (state, inbox):
        made.mkdir(mode=0o700, exist_ok=True)
    there = [inbox / row.name, inbox / "consumed" / row.name, inbox / "refused" / row.name]
    if not any(path.is_file() and path.read_bytes() == content for path in there):
        _write(inbox / row.name, content)
    owner = state.stat()  # root's at the first boot: then the service takes it all over
    for path in (inbox, inbox / row.name):
        if path.exists():
            os.chown(path, owner.st_uid, owner.st_gid)


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writable:
    """The boot partition, writable for as long as it must be."""

    def __init__(self, boot: Path) -> None:
        self._mount = boot if boot.is_mount() else None

    def __enter__(self) -> None:
        self._remount("rw")

    def __exit__(self, *_: object) -> None:
        self._remount("ro")

    def _remount(self, how: str) -> None:
        if self._mount is not None:
            done = subprocess.run(
                ["mount", "-o", f"remount,{how}", self._mount], capture_output=True, check=False
            )
            if done.returncode:
                raise OSError(done.stderr.decode(errors="replace").strip())


def _blink() -> None:
    """Let the board's own light blink fast, where there is one."""
    for light in Path("/sys/class/leds").glob("*"):
        if re.search(r"act|led0", light.name, re.IGNORECASE):
            try:
                (light / "trigger").write_text("timer")
                (light / "delay_on").write_text("100")
                (light / "delay_off").write_text("100")
            except OSError:
                continue


if __name__ == "__main__":
    sys.exit(main())
