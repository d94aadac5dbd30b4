# SPDX-License-Identifier: Apache-2.0
import hashlib
import threading
from pathlib import Path

import pytest

from edge_sdk import signing
from edge_sdk.errors import StoreError
from edge_sdk.signing import DeviceKey


def test_a_signature_holds_for_its_key_and_its_message_only() -> None:
    key, other = DeviceKey.from_seed(bytes(32)), DeviceKey.from_seed(b"\1" * 32)
    signature = key.sign(b"hello")
    assert signing.verify(key.public, b"hello", signature)
    assert not signing.verify(other.public, b"hello", signature)
    assert not signing.verify(key.public, b"hell0", signature)
    assert not signing.verify(key.public, b"hello", signature[:-1])
    assert not signing.verify(b"short", b"hello", signature)


def test_the_first_vector_of_rfc_8032_holds() -> None:
    seed = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    key = DeviceKey.from_seed(bytes.fromhex(seed))
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.public.hex() == public
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a")


def test_an_id_is_cut_from_the_hash_of_the_key() -> None:
    key = DeviceKey.from_seed(bytes(32))
    assert key.id == "d" + hashlib.sha256(key.public).hexdigest()[:15]
    assert key.id in repr(key)


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "device.key"
    key = DeviceKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert DeviceKey.load_or_create(path).public == key.public
    assert [file.name for file in path.parent.iterdir()] == [
        "device.key"
    ]  # nothing half-written stays behind


def test_two_starts_at_once_agree_on_one_key(tmp_path: Path) -> None:
    made: list[bytes] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        made.append(DeviceKey.load_or_create(tmp_path / "key").public)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    DeviceKey.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(StoreError, match="mode is 640: chmod 600"):
        DeviceKey.load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_damaged_key_is_named_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StoreError, match="is not a PEM private key"):
        DeviceKey.load_or_create(path)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep the key at"):
        DeviceKey.load_or_create(tmp_path / "file" / "key")
