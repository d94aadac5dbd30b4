# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_bundles import NAMES, initial, mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import archive, inspect_cli
from edge_sdk import bundle as bundles
from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import BundleError
from edge_sdk.signing import DeviceKey


@cache
def sample() -> Bundle:
    return mlp(quantized=True)


def parts(bundle: Bundle) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = json.loads(bundle.member("manifest.json"))
    names = manifest.pop("members")
    return manifest, {name: bundle.member(name) for name in names}


def repacked(path: str, value: Any) -> None:
    """Pack the sample with one manifest field, `a.0.b`, set to `value` (or deleted)."""
    manifest, members = parts(sample())
    at: Any = manifest
    *way, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    for key in way:
        at = at[key]
    if value is DELETED:
        del at[last]
    else:
        at[last] = value
    pack(manifest, members)


DELETED = object()


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert mlp(seed=3).data == mlp(seed=3).data
    assert mlp(seed=3).digest != mlp(seed=4).digest


def test_members_in_any_order_give_the_same_bytes() -> None:
    manifest, members = parts(sample())
    backwards = dict(reversed(manifest.items()))
    assert pack(backwards, dict(reversed(members.items()))).data == sample().data


def test_the_archive_is_a_plain_zip_that_any_tool_reads() -> None:
    with zipfile.ZipFile(io.BytesIO(sample().data)) as file:
        assert file.testzip() is None
        assert file.namelist() == sorted(file.namelist())
        assert all(i.compress_type == zipfile.ZIP_STORED for i in file.infolist())
        assert {i.date_time for i in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert file.read("params.bin") == sample().member("params.bin")


def test_the_digest_is_that_of_the_manifest_which_covers_every_member() -> None:
    raw = sample().member("manifest.json")
    assert sample().digest == hashlib.sha256(raw).hexdigest()
    table = json.loads(raw)["members"]
    for name, said in table.items():
        member = sample().member(name)
        assert said == {"sha256": hashlib.sha256(member).hexdigest(), "size": len(member)}


def test_save_and_load_give_the_same_bundle(tmp_path: Path) -> None:
    sample().save(tmp_path / "x.fedge")
    again = Bundle.load(tmp_path / "x.fedge")
    assert (again.data, again.digest, again.manifest) == (
        sample().data,
        sample().digest,
        sample().manifest,
    )


def test_params_are_the_initial_values_in_the_manifests_order() -> None:
    params = mlp().params()
    assert list(params) == list(NAMES) == list(mlp().shapes)
    for name, value in initial((6, 5, 3), 0).items():
        np.testing.assert_array_equal(params[name], value)
        assert params[name].flags.writeable


def test_a_missing_member_or_graph_is_named() -> None:
    with pytest.raises(BundleError, match=r"'onnx/train.onnx'.*got 'x'"):
        sample().member("x")
    with pytest.raises(BundleError, match="expected a train graph in 'tflite', this bundle has"):
        sample().graph("tflite", "train")


def test_a_truncated_bundle_is_refused_at_every_length() -> None:
    data = sample().data
    for end in [*range(0, len(data), 7), len(data) - 1]:
        with pytest.raises(BundleError):
            Bundle.from_bytes(data[:end])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_is_refused(draw: st.DataObject) -> None:
    data = bytearray(sample().data)
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BundleError) as caught:
        Bundle.from_bytes(bytes(data))
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 5000), st.booleans())
def test_any_bytes_are_a_bundle_error_and_never_a_crash(
    noise: bytes, at: int, is_spliced: bool
) -> None:
    data = sample().data
    given_bytes = data[:at] + noise + data[at:] if is_spliced else noise
    if given_bytes != data:
        with pytest.raises(BundleError):
            Bundle.from_bytes(given_bytes)


def test_what_zip_tools_rewrite_is_refused() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("manifest.json", *parts(sample())[1]):
            file.writestr(name, sample().member(name))
    with pytest.raises(BundleError, match="plainly stored"):
        Bundle.from_bytes(out.getvalue())


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../b", "a//b", "A", "", "a b", "a\\b", ".x", "x" * 101]
)
def test_odd_member_names_are_refused_both_ways(name: str) -> None:
    with pytest.raises(BundleError, match="member name"):
        archive.write({name: b""})
    if 0 < len(name) <= archive.MAX_NAME_BYTES:
        forged_name = archive.write({"z" * len(name): b"1"}).replace(
            b"z" * len(name), name.encode()
        )
        with pytest.raises(BundleError, match="member name"):
            archive.read(forged_name)


def test_too_many_members_and_too_many_bytes_are_refused() -> None:
    with pytest.raises(BundleError, match="at most"):
        archive.write({f"m{i}": b"" for i in range(archive.MAX_MEMBERS + 1)})
    with pytest.raises(BundleError, match="at most"):
        archive.read(bytes(archive.MAX_BYTES + 1))


def test_a_size_that_lies_takes_no_memory() -> None:
    head = bytearray(archive.write({"params.bin": b"1234"}))
    head[18:26] = b"\xff\xff\xff\x7f" * 2
    with pytest.raises(BundleError, match="truncated"):
        archive.read(bytes(head))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", "fedge-bundle/1", "format: expected 'fedge-bundle/2'"),
        ("name", "", "name: "),
        ("name", DELETED, "name: expected a value, got None"),
        ("surprise", 1, "surprise: expected no such field"),
        ("loss", "hinge", "loss: expected one of cross_entropy"),
        ("lr", -1.0, "lr: "),
        ("lr", True, "lr: "),
        ("proximal", 0, "proximal: expected true or false"),
        ("input.dtype", "object", "input.dtype: "),
        ("input.shape", [None, -6], r"input.shape\[1\]: "),
        ("input.shape", [2] * 17, "input.shape: expected a list of at most 16"),
        ("input.scale", 0, "input.scale: expected a scale above 0"),
        ("target.dtype", "int8", "target.dtype: "),
        ("params", [], "params: expected at least one"),
        ("params.1.name", "w1", "params: expected at least one, each name once"),
        ("params.0.shape", [1 << 25, 1 << 25], "params: expected 212 bytes"),
        ("slots", [{"name": "s", "param": 4, "shape": []}], r"slots\[0\].param: "),
        ("slots", [{"name": "s", "param": 0, "shape": [1 << 25, 4]}], "slots: expected at most"),
        ("graphs.onnx.train", "none.onnx", "graphs.onnx.train: "),
        ("graphs", {}, "graphs: expected onnx, and the same formats"),
        ("source", "keras", "source: expected one of onnx, tflite"),
        ("source", "tflite", "graphs: expected tflite"),
        ("graphs.onnx.train", DELETED, "graphs: expected a training graph"),
        ("graphs.onnx.evaluate", DELETED, "graphs.onnx: expected train and evaluate"),
        ("patches.onnx.0.order", [0, 0], r"patches.onnx\[0\].order: expected each axis"),
        ("patches.onnx.0.kind", "float64", r"patches.onnx\[0\].kind: "),
        ("patches.onnx.0.param", 9, r"patches.onnx\[0\].param: "),
        ("patches.onnx.0.axis", 5, r"patches.onnx\[0\].axis: "),
        ("patches.onnx.0.scales", 3, r"patches.onnx\[0\].scales: "),
        ("patches.onnx.0.zero_point", 200, r"patches.onnx\[0\].zero_point: "),
        ("patches.onnx.0.zero_point", [0, 0], r"patches.onnx\[0\].zero_point: "),
        ("patches.onnx.0.offset", 1 << 30, "patches.onnx: expected bytes within"),
        ("patches.onnx.3.offset", 0, None),
        ("patches.onnx.1.weight", 3, r"patches.onnx\[1\].weight: "),
        ("patches.onnx.1.weight_scale", [1.0], r"patches.onnx\[1\].weight: "),
        ("patches.onnx.1.scales", 2, r"patches.onnx\[1\]."),
        ("cost.operators", {"Conv": "three"}, "cost.operators.Conv: "),
        ("optimizer", "sgd", "optimizer: "),
        ("patches.onnx.1.scales", 1, r"patches.onnx\[1\].weight: "),
        ("patches.onnx.1.param", None, r"patches.onnx\[1\].shape: expected a shape"),
        ("input", [], "input: expected an object"),
        ("cost", 3, "cost: expected an object"),
        ("train", float("nan"), "finite JSON"),
    ],
    ids=str,
)
def test_a_manifest_out_of_place_is_one_line_that_names_the_field(
    path: str, value: Any, said: str | None
) -> None:
    if said is None:
        repacked(path, value)
        return
    with pytest.raises(BundleError, match=said) as caught:
        repacked(path, value)
    assert "\n" not in str(caught.value)


def test_patches_that_write_the_same_bytes_are_refused() -> None:
    manifest, members = parts(sample())
    manifest["patches"]["onnx"][3]["offset"] = manifest["patches"]["onnx"][0]["offset"] + 4
    with pytest.raises(BundleError, match="no other patch"):
        pack(manifest, members)


def forged(change: dict[str, Any]) -> bytes:
    """Write an archive whose manifest is changed after the members table was made."""
    manifest = json.loads(sample().member("manifest.json")) | change
    raw = bundles.schema.encode(manifest)
    return archive.write({**parts(sample())[1], "manifest.json": raw})


def test_a_member_with_a_wrong_digest_is_named() -> None:
    table = json.loads(sample().member("manifest.json"))["members"]
    table["onnx/train.onnx"] = {**table["onnx/train.onnx"], "sha256": "0" * 64}
    with pytest.raises(BundleError, match=r"member onnx/train.onnx: its sha256"):
        Bundle.from_bytes(forged({"members": table}))


def test_a_size_at_odds_with_the_member_is_named() -> None:
    table = json.loads(sample().member("manifest.json"))["members"]
    table["params.bin"] = {**table["params.bin"], "size": 1}
    with pytest.raises(BundleError, match=r"members.params.bin.size: expected 212, got 1"):
        Bundle.from_bytes(forged({"members": table}))


def test_a_frozen_weights_scales_must_be_as_many_as_the_biases() -> None:
    manifest, members = parts(sample())
    del manifest["patches"]["onnx"][1]["weight"]
    manifest["patches"]["onnx"][1]["weight_scale"] = [1.0, 2.0]
    with pytest.raises(BundleError, match=r"weight_scale: expected 1 or 5 numbers, got 2"):
        pack(manifest, members)
    manifest["patches"]["onnx"][1] |= {"weight_scale": [1.0], "scales": 2}
    with pytest.raises(BundleError, match=r"scales: expected 1 or 5, got 2"):
        pack(manifest, members)


def test_a_manifest_beyond_all_measure_is_refused_unread() -> None:
    with pytest.raises(BundleError, match="at most"):
        Bundle.from_bytes(archive.write({"manifest.json": bytes((4 << 20) + 1)}))


def test_a_member_that_the_manifest_does_not_know_is_refused() -> None:
    raw = sample().member("manifest.json")
    data = archive.write({**parts(sample())[1], "manifest.json": raw, "extra.bin": b""})
    with pytest.raises(BundleError, match="members"):
        Bundle.from_bytes(data)


@pytest.mark.parametrize(
    "raw", [b"[]", b"{", b"{} ", b"[" * 100_000, b'{"format":1,"format":1}', b"\xff"], ids=repr
)
def test_a_manifest_that_is_not_canonical_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BundleError, match="manifest"):
        Bundle.from_bytes(archive.write({"manifest.json": raw}))


def test_a_bundle_without_a_manifest_is_refused() -> None:
    with pytest.raises(BundleError, match=r"manifest.json in the bundle, got none"):
        Bundle.from_bytes(archive.write({"params.bin": b""}))


def test_parameters_that_are_not_finite_are_refused() -> None:
    manifest, members = parts(sample())
    members["params.bin"] = np.full(53, np.nan, "<f4").tobytes()
    with pytest.raises(BundleError, match="NaN"):
        pack(manifest, members)


def test_a_signature_names_its_key_and_leaves_the_digest_alone() -> None:
    key = DeviceKey.from_seed(b"k" * 32)
    signed = sample().sign(key)
    assert signed.signed_by == key.public
    assert signed.digest == sample().digest
    assert sample().signed_by is None
    other = DeviceKey.from_seed(b"o" * 32)
    assert signed.sign(other).signed_by == other.public


def test_a_signature_of_something_else_is_refused() -> None:
    key = DeviceKey.from_seed(b"k" * 32)
    wrong = mlp().sign(key).member("signature")
    members = {name: sample().member(name) for name in ("manifest.json", *parts(sample())[1])}
    forged_bundle = Bundle.from_bytes(archive.write({**members, "signature": wrong}))
    with pytest.raises(BundleError, match="signature does not fit"):
        _ = forged_bundle.signed_by
    with pytest.raises(BundleError, match="96 bytes"):
        Bundle.from_bytes(archive.write({**members, "signature": wrong[1:]}))


def test_explain_prints_a_table_and_renders_as_html() -> None:
    said = sample().explain()
    text = str(said)
    assert "int8[?x6], scale 0.05" in text
    assert "Add 2, MatMul 2" in text
    assert "onnx; the model came as onnx" in text
    assert "sgd(lr=0.1)" in text
    assert repr(said) == text
    assert said._repr_html_().startswith("<table>")
    assert "<script>" not in renamed("<script>").explain()._repr_html_()


def renamed(name: str) -> Bundle:
    manifest, members = parts(sample())
    return pack({**manifest, "name": name}, members)


def test_inspect_prints_the_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.fedge"
    key = DeviceKey.from_seed(b"k" * 32)
    sample().sign(key).save(path)
    assert inspect_cli.main([str(path)]) == 0
    assert f"signed by  {key.public.hex()}" in capsys.readouterr().out
    assert inspect_cli.main([str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["digest"] == sample().digest
    assert record["manifest"]["name"] == "hand"


def test_a_damaged_file_says_which_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.fedge"
    path.write_bytes(sample().data[:-1])
    with pytest.raises(BundleError, match=r"bad.fedge: "):
        Bundle.load(path)


def test_crc_of_every_member_is_checked_before_its_digest() -> None:
    data = bytearray(sample().data)
    at = data.index(sample().member("params.bin"))
    data[at] ^= 1
    assert zlib.crc32(bytes(data))
    with pytest.raises(BundleError, match=r"params.bin is damaged"):
        Bundle.from_bytes(bytes(data))
