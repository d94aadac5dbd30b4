# SPDX-License-Identifier: Apache-2.0
"""Proves the packages, and prints what came out as JSON: ``packaging/test`` is this with its tools.

The wheel and the packages are built twice; the arm64 package is tried on the cores of a Pi 3 and a
Pi 4 under emulation; the amd64 one is installed, upgraded, removed and purged in a Debian 13 from a
signed repository, where it also takes part in a round; units, policy and sizes are held to limits.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pack import deb, repository, roots, source, wheel

CORES = ("cortex-a53", "cortex-a72")
MAX_DEB_MB = 30.0
EXPOSURE = {"fedge-device": 2.2, "fedge-coordinator": 1.5}
ARM_PACKAGES = ("python3", "libstdc++6")
NATIVE_PACKAGES = (
    "systemd", "mosquitto", "python3", "libstdc++6", "python3-numpy", "python3-paho-mqtt",
    "python3-cryptography",
)  # fmt: skip
SELFTEST = ("/usr/bin/python3", "/opt/fedge/device/bin/fedge", "selftest", "--json")
PROBE = "/tmp/state.py"  # noqa: S108 - in a file system of our own
STATE = "/var/lib/private/fedge"
NOTES = ("boot", "status.json", "usage.json", "why")
NEXT = "99.0"


class ClaimError(Exception):
    """A claim about the packages does not hold."""


def expect(holds: object, claim: str) -> None:
    """Raise ClaimError unless the claim holds."""
    if not holds:
        raise ClaimError(claim)


class Proof:
    """The steps, in order, and what they found."""

    def __init__(self, folder: Path, *, is_tree: bool) -> None:
        self._folder = folder
        self.found: dict[str, Any] = {"sizes": {}, "seconds": {}}
        self._sources = [source.export(folder / name, is_tree=is_tree) for name in ("a", "b/c")]
        self._debs: dict[str, Path] = {}
        self._wheel: Path

    def step(self, name: str, act: Callable[[], None]) -> None:
        """Take one step and its time."""
        began = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        act()
        self.found["seconds"][name] = round(time.monotonic() - began, 1)

    # --- building -----------------------------------------------------------------------------
    def wheels(self) -> None:
        """Build wheel and sdist twice, in two places, as two users' files would be."""
        (self._folder / "b" / "c" / "README.md").touch()  # a checkout's dates say nothing
        made = [wheel.build(s, self._folder / f"dist{n}") for n, s in enumerate(self._sources)]
        for first, second in zip(*made, strict=True):
            _same(first, second)
            self.found["sizes"][first.name] = first.stat().st_size
        self._wheel = made[0].wheel

    def packages(self) -> None:
        """Build each package twice; the one that a later version will upgrade to, once."""
        arm = deb.Target(deb.DEVICE, "arm64", "trixie")
        amd = deb.Target(deb.DEVICE, "amd64", "trixie")
        hub = deb.Target(deb.COORDINATOR, "all", "trixie")
        jobs = [(t, n, "") for t in (arm, amd, hub) for n in (0, 1)]
        jobs += [(t, 0, NEXT) for t in (amd, hub)]
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda job: self._package(*job), jobs))
        for first, second in zip(made[0:6:2], made[1:6:2], strict=True):
            _same(first, second)
            self.found["sizes"][first.name] = first.stat().st_size
        expect(
            made[0].stat().st_size <= MAX_DEB_MB * 1e6, f"{made[0].name} is over {MAX_DEB_MB} MB"
        )
        names = ("arm64", "amd64", "all")
        self._debs = dict(zip(names, made[0:6:2], strict=True))
        self._debs |= {"amd64 next": made[6], "all next": made[7]}

    def _package(self, target: deb.Target, which: int, version: str) -> Path:
        out = self._folder / f"debs{which}{version}"
        squeeze = ("xz", 2) if target.arch == "arm64" else deb.SOON
        s = self._sources[which]
        return deb.build(target, s, self._wheel, out, version=version, squeeze=squeeze)

    def policy(self) -> None:
        """Let lintian look at each package; a warning is a failure."""
        for name in ("arm64", "amd64", "all"):
            words = ["lintian", "--allow-root", "--fail-on=error,warning", str(self._debs[name])]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            expect(done.returncode == 0, f"lintian of {name}:\n{done.stdout}{done.stderr}")

    # --- arm64, under emulation ---------------------------------------------------------------
    def board(self) -> None:
        """Unpack the arm64 package into a Debian 13 and let it try itself on each core."""
        with roots.extracted("arm64", "trixie", ARM_PACKAGES) as root:
            subprocess.run(["dpkg-deb", "-x", self._debs["arm64"], root.folder], check=True)
            root.run("/usr/bin/python3", "-I", "-m", "compileall", "-q", "/opt/fedge/device/lib")
            self.found["selftest"] = {}
            for core in CORES:
                began = time.monotonic()
                done = root.run(*SELFTEST, env={"QEMU_CPU": core}, is_checked=False)
                expect(done.returncode == 0, f"selftest on {core}: {done.stdout}{done.stderr}")
                checks = {
                    c["check"]: round(c["seconds"], 2) for c in _last_json(done.stdout)["checks"]
                }
                checks["in all"] = round(time.monotonic() - began, 1)
                self.found["selftest"][core] = checks
            _no_telemetry(root)

    # --- amd64, for real ----------------------------------------------------------------------
    def life(self) -> None:
        """Install from a signed repository, use, upgrade with state, remove, purge."""
        with roots.configured("amd64", "trixie", NATIVE_PACKAGES) as root:
            self._offer(root, "amd64", "all")
            root.run("apt-get", "install", "-qq", "fedge-device", "fedge-coordinator")
            _installed_well(root)
            self._units(root)
            self._round(root)
            self._upgrade(root)
            _remove_and_purge(root)

    def _offer(self, root: roots.Root, *names: str) -> None:
        """Put packages into a repository inside `root`, the only one that it knows."""
        home = self._folder / "gpg"
        if not home.exists():
            home.mkdir(mode=0o700)
            words = [
                "gpg",
                "--batch",
                "--passphrase",
                "",
                "--quick-gen-key",
                "throwaway",
                "ed25519",
            ]
            env = {**os.environ, "GNUPGHOME": str(home)}
            subprocess.run(words, env=env, check=True, capture_output=True)
        place = root.folder / "srv" / "apt"
        repository.add(place, [self._debs[name] for name in names], "throwaway", home)
        sources = root.folder / "etc" / "apt"
        for file in (sources / "sources.list", *(sources / "sources.list.d").glob("*")):
            file.unlink(missing_ok=True)
        keyring = root.folder / "usr/share/keyrings/fedge.gpg"
        keyring.write_bytes((place / "fedge-archive-keyring.gpg").read_bytes())
        line = "deb [signed-by=/usr/share/keyrings/fedge.gpg] file:/srv/apt trixie main\n"
        (sources / "sources.list").write_text(line)
        _apt_update(root)

    def _units(self, root: roots.Root) -> None:
        """Let systemd check both units, and count what a break-in would be left with."""
        self.found["exposure"] = {}
        for name, limit in EXPOSURE.items():
            unit = f"{name}.service"
            done = root.run("systemd-analyze", "verify", "--man=no", unit, is_checked=False)
            said = [line for line in (done.stdout + done.stderr).splitlines() if name in line]
            expect(done.returncode == 0 and not said, f"systemd-analyze verify {unit}: {said}")
            told = root.run("systemd-analyze", "security", "--offline=true", unit, is_checked=False)
            exposed = re.search(r"exposure level for .*: ([\d.]+)", told.stdout)
            expect(
                exposed and float(exposed[1]) <= limit,
                f"{unit}: over {limit}: {told.stdout[-300:]}",
            )
            self.found["exposure"][name] = float(exposed[1]) if exposed else None
            text = (root.folder / "usr/lib/systemd/system" / unit).read_text()
            for line in ("Type=notify", "DynamicUser=yes", "LoadCredential=broker-password:"):
                expect(f"\n{line}" in text, f"{unit} has lost {line}")
            expect("ORT_DISABLE_TELEMETRY=1" in text, f"{unit} lets onnxruntime phone home")

    def _round(self, root: roots.Root) -> None:
        """Let the packaged device train for the packaged coordinator, both as nobody."""
        folder = root.folder / "srv" / "round"
        (folder / "inbox").mkdir(parents=True)
        lib = "/opt/fedge/device/lib/edge_sdk/selftest.fedge"
        (folder / "selftest.fedge").write_bytes((root.folder / lib[1:]).read_bytes())
        rows = "import sys; sys.path.insert(0, '/opt/fedge/device/lib')\n"
        rows += "import numpy; from edge_sdk import selftest; x, y = selftest.rows()\n"
        rows += "numpy.savez('/srv/round/inbox/rows.npz', x=x, y=y)\n"
        root.run("/usr/bin/python3", "-", text=rows)
        port = _free_port()
        pace = "{ cohort = 1, quorum = 1, deadline_s = 60, count = 2 }"
        (folder / "coordinator.toml").write_text(
            f'broker = "embedded:{port}"\nstore = "store"\n[task.proof]\n'
            'bundle = "selftest.fedge"\n'
            f'pace = ["rounds", {pace}]\nbudget = {{ epochs = 2, batch = 16 }}\n'
        )
        (folder / "device.toml").write_text(
            f'broker = "mqtt://127.0.0.1:{port}"\ntask = "proof"\nstate = "state"\n'
            'min_examples = 32\n[source]\nfolder = "inbox"\npoll_s = 0.2\n'
        )
        root.run("chown", "-R", "65534:65534", "/srv/round")
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        fedge = [*nobody, "/usr/bin/fedge"]
        device = [*fedge, "device", "run", "--config", "/srv/round/device.toml"]
        hub = [
            *fedge,
            "coordinator",
            "run",
            "--exit-when-done",
            "--config",
            "/srv/round/coordinator.toml",
        ]
        env = roots.environment({"HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"})
        log = (folder / "log").open("w")
        with log, subprocess.Popen(root.command(*device), env=env, stdout=log, stderr=log) as board:
            try:
                hosted = subprocess.Popen(root.command(*hub), env=env, stdout=log, stderr=log)
                ended = _waited(hosted, 150)
                status = folder / "state" / "status.json"
                ends = time.monotonic() + 20
                while _version(status) != 2 and time.monotonic() < ends:
                    time.sleep(0.2)
            finally:
                board.terminate()
        said = (folder / "log").read_text()[-3000:]
        expect(ended == 0, f"the coordinator did not end its rounds: {ended}\n{said}")
        expect(_version(status) == 2, f"the device did not come to version 2:\n{said}")
        counted = json.loads(status.read_text())["receipts"].get("counted")
        expect(counted == 2, f"expected two counted updates, got {counted}:\n{said}")

    def _upgrade(self, root: roots.Root) -> None:
        """Go to the next version under a running service, and an operator's own settings.

        No systemd runs here, which would now start the service again: this does it in its place.
        """
        (root.folder / PROBE[1:]).write_bytes(
            (self._sources[0].folder / "packaging/deb/state.py").read_bytes()
        )
        before = _last_json(root.run("/usr/bin/python3", "-I", PROBE, "make", STATE).stdout)
        expect(before["examples"] == 32 and before["outbox"] == 1, f"no state to keep: {before}")
        kept = _tree_hashes(root.folder / STATE[1:])
        config = root.folder / "etc/fedge/device.toml"
        config.write_text(config.read_text() + "# the operator was here\n")
        self._offer(root, "amd64 next", "all next")
        with _service(root) as running:
            root.run("apt-get", "upgrade", "-qq")
            expect(running.poll() is None, "the service ended under the upgrade")
        listed = root.run("dpkg-query", "-W", "-f", "${Package} ${Version}\n", "fedge-*").stdout
        expect(listed.count(f"{NEXT}+deb13") == 2, f"not upgraded: {listed}")
        expect("operator was here" in config.read_text(), "the operator's settings were replaced")
        with _service(root):
            pass
        expect(_tree_hashes(root.folder / STATE[1:]) == kept, "the upgrade touched the state")
        after = _last_json(root.run("/usr/bin/python3", "-I", PROBE, "show", STATE).stdout)
        expect(after == before, f"the state is read otherwise: {before} became {after}")
        self.found["kept by the upgrade"] = {k: v for k, v in after.items() if k != "answers"}


@contextlib.contextmanager
def _service(root: roots.Root) -> Iterator[subprocess.Popen[bytes]]:
    """Run the installed device on the state to be kept, with no broker; stop it as systemd does."""
    (root.folder / "srv/kept.toml").write_text(
        f'broker = "mqtt://127.0.0.1:9"\ntask = "kept"\nstate = "{STATE}"\n'
    )
    words = ["/usr/bin/fedge", "device", "run", "--config", "/srv/kept.toml"]
    log, boot = root.folder / "srv/kept.log", root.folder / STATE[1:] / "boot"
    started, env = boot.read_bytes(), roots.environment({"PYTHONDONTWRITEBYTECODE": "1"})
    with (
        log.open("w") as out,
        subprocess.Popen(root.command(*words), env=env, stdout=out, stderr=out) as running,
    ):
        ends = time.monotonic() + 30
        while (boot.read_bytes() == started or "device id=" not in log.read_text()) and (
            time.monotonic() < ends
        ):
            time.sleep(0.1)
        try:
            expect(running.poll() is None, f"the service does not run:\n{log.read_text()}")
            expect("device id=" in log.read_text(), f"it does not start:\n{log.read_text()}")
            yield running
        finally:
            running.terminate()
            ended = _waited(running, 30)
        expect(ended == 0, f"the service ended with {ended}:\n{log.read_text()}")


def _installed_well(root: roots.Root) -> None:
    for name in EXPOSURE:
        expect(not root.run("dpkg", "--verify", name).stdout, f"{name} is not as it was packed")
        state = root.run("systemctl", "is-enabled", f"{name}.service", is_checked=False).stdout
        expect(state.strip() == "enabled", f"{name} does not start at boot: {state}")
    bytecode = root.folder / "opt/fedge/device/lib/edge_sdk/__pycache__"
    expect(list(bytecode.glob("agent.*.pyc")), "nothing was compiled: every start would pay for it")
    done = root.run("fedge", "selftest", "--json", is_checked=False)
    expect(done.returncode == 0, f"selftest on amd64: {done.stdout}{done.stderr}")
    told = root.run(
        "fedge", "coordinator", "check", "--config", "/etc/fedge/coordinator.toml", is_checked=False
    )
    expect(told.returncode == 3, f"an unconfigured coordinator should say so: {told}")
    expect("Traceback" not in told.stderr, told.stderr)


def _remove_and_purge(root: roots.Root) -> None:
    root.run("mkdir", "-p", "/var/lib/private/fedge-coordinator")
    root.run("ln", "-s", "private/fedge", "/var/lib/fedge")
    root.run("apt-get", "remove", "-qq", *EXPOSURE)
    left = list((root.folder / "opt").rglob("*.py*"))
    expect(not left, f"removed, yet there is {left[:3]}")
    expect((root.folder / STATE[1:] / "identity.key").exists(), "removing deleted the identity")
    expect((root.folder / "etc/fedge/device.toml").exists(), "removing deleted the settings")
    expect(not os.path.lexists(root.folder / "usr/bin/fedge"), "removed, yet there is a fedge")
    root.run("apt-get", "purge", "-qq", *EXPOSURE)
    places = ["etc/fedge", "opt/fedge", "var/lib/fedge", "var/lib/fedge-coordinator"]
    places += ["var/lib/private/fedge", "var/lib/private/fedge-coordinator"]
    still = [place for place in places if os.path.lexists(root.folder / place)]
    expect(not still, f"purged, yet there is {still}")
    units = [str(p) for p in (root.folder / "etc/systemd").rglob("*fedge*")]
    expect(not units, f"purged, yet there is {units}")


def _no_telemetry(root: roots.Root) -> None:
    library = next(
        (root.folder / "opt/fedge/device/lib/onnxruntime/capi").glob("*pybind11_state*.so")
    )
    words = (b"events.data.microsoft.com", b"DeveloperTools/.onnxruntime")
    found = [word for word in words if word in library.read_bytes()]
    expect(not found, f"this onnxruntime carries telemetry code: {found}; pin another")
    traces = list((root.folder / "root").glob(".cache/Microsoft*"))
    expect(not traces, f"telemetry was written: {traces}")


def _apt_update(root: roots.Root) -> None:
    done = root.run("apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any")
    expect("NO_PUBKEY" not in done.stderr and "W:" not in done.stderr, done.stderr)


def _same(first: Path, second: Path) -> None:
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (first, second)]
    expect(digests[0] == digests[1], f"two builds of {first.name} differ: {digests}")


def _tree_hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file but those in which a service that runs takes notes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {str(name): found for name, found in hashes.items() if name.parts[0] not in NOTES}


def _last_json(text: str) -> Any:
    return json.loads(text.strip().splitlines()[-1])


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return how a process ended; None when it had to be ended."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return None


def _version(status: Path) -> int | None:
    try:
        found: int | None = json.loads(status.read_bytes())["version"]
    except (OSError, ValueError):
        return None
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> int:
    """Take every step; the first claim that does not hold ends it, with exit code 1."""
    parser = argparse.ArgumentParser(prog="packaging/test", description=__doc__.splitlines()[0])
    parser.add_argument("--tree", action="store_true", help="the working tree, not the last commit")
    parser.add_argument("--json", type=Path, help="write the record there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedge-prove-") as folder:
        began = time.monotonic()
        proof = Proof(Path(folder), is_tree=args.tree)
        steps = (proof.wheels, proof.packages, proof.policy, proof.board, proof.life)
        try:
            for step in steps:
                proof.step(step.__name__, step)
        except (ClaimError, RuntimeError, subprocess.SubprocessError) as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
        proof.found["seconds"]["in all"] = round(time.monotonic() - began, 1)
    record = json.dumps(proof.found, indent=1)
    print(record)
    if args.json:
        args.json.write_text(record + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
