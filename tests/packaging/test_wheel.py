# SPDX-License-Identifier: Apache-2.0
"""What a user gets from the wheel alone, in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coordinator.compiler import build, momentum
from coordinator.recipes import recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
HEAVY = "onnx onnxruntime aiohttp amqtt torch tensorflow sklearn coordinator sqlite3 asyncio"


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    done = run(*pip, str(ROOT), cwd=folder)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("fedge-*.whl"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with the wheel and what it requires, no extras."""
    folder = tmp_path_factory.mktemp("bare")
    assert run(sys.executable, "-m", "venv", str(folder / "venv"), cwd=folder).returncode == 0
    binaries = folder / "venv" / "bin"
    install = [str(binaries / "python"), "-m", "pip", "install", "--quiet", str(wheel)]
    done = run(*install, cwd=folder)
    assert done.returncode == 0, done.stderr
    return binaries


def test_the_wheel_holds_both_packages_the_licence_and_the_demos_recipe(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"edge_sdk", "coordinator", next(t for t in tops if t.endswith(".dist-info"))}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "coordinator/models/digits/build.py" in names
    assert {"edge_sdk/py.typed", "coordinator/py.typed"} <= set(names)


def test_importing_the_sdk_loads_no_engine_no_onnx_and_no_coordinator(bare: Path) -> None:
    code = f"import sys, edge_sdk; print(sorted(set({HEAVY.split()!r}) & set(sys.modules)))"
    done = run(str(bare / "python"), "-c", code, cwd=bare)
    assert done.stdout.strip() == "[]", done.stderr


def test_everything_the_sdk_exports_loads_without_extras(bare: Path) -> None:
    code = "import edge_sdk; print([getattr(edge_sdk, n) is not None for n in edge_sdk.__all__])"
    done = run(str(bare / "python"), "-W", "error", "-c", code, cwd=bare)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "extra"), [("demo", "compiler"), ("build x.onnx -o y --loss mse", "compiler")]
)
def test_a_command_that_needs_an_extra_says_which(bare: Path, command: str, extra: str) -> None:
    done = run(str(bare / "fedge"), *command.split(), cwd=bare)
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"fedge[{extra}]" in done.stderr or "fedge[demo]" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version_work_without_extras(bare: Path) -> None:
    for words in (["--help"], ["--version"], ["device", "--help"], ["coordinator", "--help"]):
        done = run(str(bare / "fedge"), *words, cwd=bare)
        assert done.returncode == 0, done.stderr


TRAINS = """
import sys, numpy as np
from edge_sdk import Bundle, Trainer, codec
from edge_sdk.engine import choose
from edge_sdk.model import open_model
bundle = Bundle.load(sys.argv[1])
bundle.check()
rng = np.random.default_rng(0)
x = rng.random((16, *bundle.manifest["input"]["shape"][1:]), np.float32)
y = rng.integers(0, 10, 16)
trainer = Trainer(bundle)
losses = [trainer.step(x, y) for _ in range(20)]
chain = codec.preset("default")
blob, _ = chain.encode(trainer.delta(), chain.init(bundle.shapes))
model = open_model(bundle, bundle.member("params.bin"), 0)
heavy = {"onnxruntime", "onnx", "flatbuffers", "tensorflow", "coordinator"} & set(sys.modules)
learns, shape = losses[-1] < losses[0] / 2, model.predict(x).shape
print(choose(bundle.manifest).engine, learns, shape, len(blob) > 0, sorted(heavy))
"""


def test_with_litert_alone_a_device_checks_trains_encodes_and_predicts(
    wheel: Path, tmp_path: Path
) -> None:
    digits = recipe("digits").build(0)
    optimizer = momentum(0.9, lr=0.05)
    both = ("onnx", "tflite")
    bundle = build(digits, loss="cross_entropy", optimizer=optimizer, engines=both)
    bundle.save(tmp_path / "digits.fedge")
    (tmp_path / "device.toml").write_text(
        'broker = "mqtt://127.0.0.1:9"\ntask = "t"\nbundle = "digits.fedge"\nstate = "state"\n'
    )
    assert run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path).returncode == 0
    python = str(tmp_path / "venv" / "bin" / "python")
    extra = run(python, "-m", "pip", "install", "--quiet", f"{wheel}[litert]", cwd=tmp_path)
    assert extra.returncode == 0, extra.stderr
    done = run(python, "-c", TRAINS, str(tmp_path / "digits.fedge"), cwd=tmp_path)
    assert done.stdout.strip() == "litert True (16, 10) True []", done.stderr
    doctor = run(
        python, "-m", "edge_sdk", "device", "doctor", "--config", "device.toml", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    checks = {c["check"]: c for c in json.loads(doctor.stdout)}
    assert checks["engine"]["ok"]
    assert checks["engine"]["says"].startswith("litert 2.")
    assert "not ort: onnxruntime is not installed" in checks["engine"]["says"]


def others() -> list[str]:
    """Return the interpreters of this machine that the test environment itself is not."""
    found = []
    for minor in (11, 12, 13, 14):
        kept = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
        python = str(kept[-1]) if kept else shutil.which(f"python3.{minor}")
        if python and minor != sys.version_info.minor:
            found.append(python)
    return found


@pytest.mark.parametrize("python", others())
def test_with_onnx_alone_a_device_computes_what_it_should_on_each_python_here(
    wheel: Path, python: str, tmp_path: Path
) -> None:
    made = run(python, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    inside = str(tmp_path / "venv" / "bin" / "python")
    extra = run(inside, "-m", "pip", "install", "--quiet", f"{wheel}[onnx]", cwd=tmp_path)
    assert extra.returncode == 0, extra.stderr
    done = run(inside, "-m", "edge_sdk", "selftest", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [c["check"] for c in json.loads(done.stdout)["checks"]] == [
        "load", "predict", "train", "encode", "sign",
    ]  # fmt: skip


def test_the_locked_set_of_this_machine_installs_by_hash_and_runs_the_coordinator(
    wheel: Path, tmp_path: Path
) -> None:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    name = f"coordinator-{machine}-py3{sys.version_info.minor}"
    lock = ROOT / "packaging" / "locks" / f"{name}.txt"
    assert run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path).returncode == 0
    inside = str(tmp_path / "venv" / "bin" / "python")
    pip = [inside, "-m", "pip", "install", "--quiet"]
    locked = run(*pip, "--require-hashes", "-r", str(lock), cwd=tmp_path)
    assert locked.returncode == 0, locked.stderr
    assert run(*pip, "--no-deps", str(wheel), cwd=tmp_path).returncode == 0
    assert run(inside, "-m", "pip", "check", cwd=tmp_path).returncode == 0
    assert run(inside, "-m", "edge_sdk", "selftest", cwd=tmp_path).returncode == 0
    check = run(inside, "-m", "edge_sdk", "coordinator", "--help", cwd=tmp_path)
    assert check.returncode == 0, check.stderr
    code = "import coordinator, coordinator.daemon, coordinator.compiler"
    assert run(inside, "-W", "error", "-c", code, cwd=tmp_path).returncode == 0


VALID = """
import json, sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
check = JsonStrictValidator(SchemaVersion.V1_6).validate_str
print([check(bill) is None for bill in json.load(sys.stdin)])
"""


def test_every_bill_of_materials_is_valid_by_its_schema(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "packaging"))
    from pack import locks, sbom

    assert run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path).returncode == 0
    inside = str(tmp_path / "venv" / "bin" / "python")
    library = "cyclonedx-python-lib[json-validation]==11.12.0"
    got = run(inside, "-m", "pip", "install", "--quiet", library, cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    bills = [sbom.bill("x", "1", locks.read(k.name), 1_700_000_000) for k in locks.all_locks()]
    wrong = bills[0].replace('"SHA-256"', '"SHA-257"')
    done = subprocess.run(
        [inside, "-c", VALID], input=json.dumps([*bills, wrong]), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str([True] * len(bills) + [False]), done.stderr
