# SPDX-License-Identifier: Apache-2.0
"""A device's state folder: who it is, whom it trusts, the last good model, the residual.

Every file is replaced whole or not at all. Whatever state they are in, the device starts: what is
damaged is set aside under the name ``*.damaged``, logged, and what can be had again is had again.

    identity.key      Ed25519, 0600            coordinator.key   whom we trust, hex
    bundles/*.fedge   by digest                weights/*.bin     flat float32, by sha256
    model.json        what predictions use     residual.bin      the codec's state
    outbox/           updates without receipt  samples/          examples: never leave the board
    train/            the training child's     boot, lock, status.json
    round.json        the round under way      setbacks.json     what memory allows
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_sdk import files
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, StoreError
from edge_sdk.files import SYSTEM, Disk
from edge_sdk.quota import DAMAGED, Quota
from edge_sdk.setbacks import Setbacks
from edge_sdk.signing import DeviceKey
from edge_sdk.slots import Slots
from edge_sdk.types import Spec
from edge_sdk.underway import UnderWay

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_SMALL_BYTES = 2**16
_LIVED = {"boot", "coordinator.key", "model.json"}
"""What a device has once it was one."""


@dataclass(frozen=True, slots=True)
class Residual:
    """A codec's state as bytes, and what it is only good for: that codec, on that bundle.

    `order` grows with each update that the device encodes: the greater one is the newer one.
    `own` is what the `correction` of that name remembers, flat little-endian float32.
    """

    spec: Spec
    bundle: str
    order: int
    state: bytes
    correction: str = ""
    own: bytes = b""

    def to_bytes(self) -> bytes:
        """Return one self-checking record."""
        fields = {"spec": self.spec, "bundle": self.bundle, "order": self.order}
        if self.own:
            fields |= {"correction": self.correction, "own": len(self.own)}
        body = json.dumps(fields).encode() + b"\n" + self.state + self.own
        return zlib.crc32(body).to_bytes(4, "little") + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Residual:
        """Read a record back.

        Raises: ValueError when it does not add up.
        """
        if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            raise ValueError("its checksum does not hold")
        head, _, rest = data[4:].partition(b"\n")
        fields = json.loads(head)
        cut = len(rest) - fields.get("own", 0)
        known = fields["spec"], fields["bundle"], fields["order"]
        return cls(*known, rest[:cut], fields.get("correction", ""), rest[cut:])

    def is_for(self, spec: Spec, bundle: str) -> bool:
        """Say whether it is of this codec on this bundle."""
        return (self.spec, self.bundle) == (json.loads(json.dumps(spec)), bundle)


class Store:
    """The folder of one device, held by one process at a time.

    Raises: StoreError when the folder cannot be used, or another process holds it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], disk: Disk = SYSTEM, max_bytes: int | None = None
    ) -> None:
        self.folder, self.disk = Path(folder).expanduser(), disk
        self.samples = self.folder / "samples"
        self.outbox = self.folder / "outbox"
        self.train = self.folder / "train"
        self._bundles = self.folder / "bundles"
        self._weights = self.folder / "weights"
        self._make_folders()
        self._let_go = self._take_lock()
        self.quota = Quota(self.folder, max_bytes, is_real=disk is SYSTEM)

    def close(self) -> None:
        """Let another process have the folder."""
        self._let_go()

    def identity(self) -> DeviceKey:
        """Return this device's key, made the first time; a lost one makes it a new device."""
        path = self.folder / "identity.key"
        here = self.disk.names(self.folder)
        for name in here:
            if name.startswith(".identity.key."):  # of a process that was killed as it made one
                files.remove(self.folder / name, self.disk)
        if path.exists() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
        is_new = "identity.key" not in here
        try:
            key = DeviceKey.load_or_create(path)
        except StoreError as error:
            self._set_aside(path, error)
            is_new, key = True, DeviceKey.load_or_create(path)
        if is_new and not _LIVED.isdisjoint(here):
            log.warning(
                "identity lost, a new device begins: %s; restore identity.key to be the old one",
                key.id,
            )
        return key

    def count_boot(self, beyond: int = 0) -> int:
        """Return a number that grows with each start, while the disk takes it; over `beyond`."""
        path = self.folder / "boot"
        boot = max(self._read(path, lambda data: max(0, int(data))) or 0, beyond) + 1
        try:
            self._write(path, str(boot).encode())
        except StoreError as error:  # a full disk must not keep the model from answering
            log.warning("start not counted reason=%s", error)
        return boot

    def trusted(self) -> bytes | None:
        """Return the public key of the coordinator that this device trusts, if any yet."""
        return self._read(self.folder / "coordinator.key", _key)

    def trust(self, key: bytes) -> None:
        """Trust this coordinator, and no other, from now on."""
        self._write(self.folder / "coordinator.key", key.hex().encode() + b"\n")

    def bundle_path(self, digest: str) -> Path:
        """Return where a bundle is, or would be."""
        return self._bundles / f"{digest}.fedge"

    def bundle(self, digest: str) -> Bundle | None:
        """Return a bundle that is here and whole, else None."""
        path = self.bundle_path(digest)
        bundle = self._read(path, Bundle.from_bytes, limit=None)
        if bundle is not None and bundle.digest != digest:
            self._set_aside(path, ValueError("it is another bundle"))
            return None
        return bundle

    def any_bundle(self) -> Bundle | None:
        """Return the newest whole bundle here: what to go on with if ``model.json`` is lost."""
        here = self._named(self._bundles, ".fedge")
        found = sorted(here, key=self.disk.modified_s, reverse=True)
        return next(filter(None, (self.bundle(path.stem) for path in found)), None)

    def put_bundle(self, bundle: Bundle) -> None:
        """Keep a bundle; writes nothing if it is here."""
        if self.bundle(bundle.digest) is None:
            self.quota.make_room(len(bundle.data))
            self._write(self.bundle_path(bundle.digest), bundle.data)

    def weights_path(self, digest: str) -> Path:
        """Return where weights are, or would be."""
        return self._weights / f"{digest}.bin"

    def weights(self, digest: str) -> bytes | None:
        """Return weights (flat little-endian float32) that are here and whole, else None."""

        def check(data: bytes) -> bytes:
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its sha256 is not its name")
            return data

        return self._read(self.weights_path(digest), check, limit=None)

    def put_weights(self, data: bytes) -> str:
        """Keep weights; return their sha256 in hex. Writes nothing if they are here."""
        digest = hashlib.sha256(data).hexdigest()
        if self.weights(digest) is None:
            self.quota.make_room(len(data))
            self._write(self.weights_path(digest), data)
        return digest

    def slots(self) -> Slots:
        """Return which models are here and how far they are trusted."""
        return self._read(self.folder / "model.json", Slots.from_bytes) or Slots()

    def set_slots(self, slots: Slots) -> None:
        """Remember that: the switch from one model to another is this write."""
        self._write(self.folder / "model.json", slots.to_bytes())

    def residual(self) -> Residual | None:
        """Return what the codec carries to the next update, if anything yet."""
        return self._read(self.folder / "residual.bin", Residual.from_bytes, limit=None)

    def set_residual(self, residual: Residual) -> None:
        """Keep what the codec carries to the next update."""
        self._write(self.folder / "residual.bin", residual.to_bytes())

    def write_status(self, status: dict[str, Any]) -> None:
        """Write ``status.json``: what a running device says of itself to whoever looks."""
        self._write_json("status.json", status)

    def forget_models(self, keep: Iterable[str]) -> None:
        """Delete bundles and weights but those whose hex digest is in `keep`."""
        kept = set(keep)
        for folder, suffix in ((self._bundles, ".fedge"), (self._weights, ".bin")):
            for name in self.disk.names(folder):
                if name.endswith(suffix) and name.removesuffix(suffix) not in kept:
                    files.remove(folder / name, self.disk)

    def under_way(self) -> UnderWay | None:
        """Return the round that was taken up and not yet answered, if there is one."""
        return self._read(self.folder / "round.json", UnderWay.from_bytes)

    def set_under_way(self, taken: UnderWay) -> None:
        """Remember a round that is taken up."""
        self._write(self.folder / "round.json", taken.to_bytes())

    def forget_under_way(self) -> None:
        """Let go of it."""
        files.remove(self.folder / "round.json", self.disk)

    def setbacks(self) -> Setbacks | None:
        """Return what is known of the memory that trainings find here."""
        return self._read(self.folder / "setbacks.json", _setbacks)

    def set_setbacks(self, known: Setbacks) -> None:
        """Remember that."""
        self._write_json("setbacks.json", asdict(known))

    def clear_training(self, keep: str = "") -> None:
        """Delete what the training child left, but the file of the name `keep`."""
        for path in self._named(self.train, ""):
            if path.name != keep:
                files.remove(path, self.disk)

    def _make_folders(self) -> None:
        for folder in (self.folder, self.samples, self.outbox, self.train, self._bundles):
            self._make_folder(folder)
        self._make_folder(self._weights)
        for folder in (self.folder, self._bundles, self._weights):
            with contextlib.suppress(StoreError):  # left to a start at which the disk lets us
                files.sweep(folder, disk=self.disk)

    def _make_folder(self, folder: Path) -> None:
        try:
            self.disk.make_folder(folder)
        except FileExistsError:  # a file where the folder should be
            self._set_aside(folder, ValueError("expected a folder"))
            self.disk.make_folder(folder)
        except OSError as error:
            why = error.strerror or str(error)
            raise StoreError(
                f"cannot make folder {folder}: {why}; set another state folder"
            ) from error

    def _take_lock(self) -> Callable[[], None]:
        try:
            return self.disk.lock(self.folder / "lock")
        except BlockingIOError as error:
            raise StoreError(
                f"another process uses {self.folder}; stop it, or set another state folder"
            ) from error
        except OSError as error:
            raise StoreError(
                f"cannot write in {self.folder}: {error.strerror}; correct its owner or the disk"
            ) from error

    def _read(
        self, path: Path, parse: Callable[[bytes], T], limit: int | None = MAX_SMALL_BYTES
    ) -> T | None:
        try:
            return parse(self.disk.read(path, -1 if limit is None else limit))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BundleError) as error:
            self._set_aside(path, error)
            return None

    def _set_aside(self, path: Path, error: Exception) -> None:
        log.warning("state damaged, set aside file=%s reason=%s", path.name, error)
        with contextlib.suppress(OSError):  # the next write to this name will say what is wrong
            self.disk.rename(path, path.with_name(path.name + DAMAGED))

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        data = json.dumps(value, sort_keys=True).encode() + b"\n"
        self._write(self.folder / name, data)

    def _write(self, path: Path, data: bytes) -> None:
        files.write(path, data, mode=0o600, disk=self.disk)

    def _named(self, folder: Path, suffix: str) -> list[Path]:
        return [folder / name for name in self.disk.names(folder) if name.endswith(suffix)]


def is_in_use(folder: Path) -> bool:
    """Say whether a process holds the state folder now."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def default_state(task: str) -> Path:
    """Return the state folder of a task for which none is given."""
    return Path("~/.local/state/fedge").expanduser() / task


def _key(data: bytes) -> bytes:
    key = bytes.fromhex(data.decode("ascii"))
    if len(key) != 32:
        raise ValueError(f"expected a key of 32 bytes, got {len(key)}")
    return key


def _setbacks(data: bytes) -> Setbacks:
    found = Setbacks(**json.loads(data))
    counts = (found.in_a_row, found.good, found.patience, found.batch or 1)
    if not isinstance(found.bundle, str) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("expected counts")
    return found
