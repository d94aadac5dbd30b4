# SPDX-License-Identifier: Apache-2.0
"""Fuzz the decoders: `scripts/fuzz`, or `python tests/fuzz/fuzz.py --seconds 60 [TARGET ..]`.

With atheris each target is guided by the branches that it takes; without it, seeds are changed at
random. What breaks a decoder is written to `build/fuzz/TARGET/`, printed with the command that
feeds it again, and belongs into `tests/fuzz/found/TARGET/` with its mending, for ever tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
FOUND = ROOT / "tests" / "fuzz" / "found"
WORK = ROOT / "build" / "fuzz"
MOST_BYTES = 8192
SLOW_S, MOST_MIB = 10, 1024
"""One input may take that long and that much before it counts as broken: with instruments on."""


def main() -> int:
    """Fuzz each target in a process of its own; return 1 when one broke."""
    asked = _parse()
    if asked.one:
        return _one(asked.one, asked.seconds, asked.seed)
    if asked.again:
        return _again(asked.targets[0], asked.again)
    from fuzz_targets import TARGETS

    names = asked.targets or [target.name for target in TARGETS]
    with ThreadPoolExecutor(asked.jobs) as pool:
        ended = list(pool.map(lambda name: _child(name, asked), names))
    return 1 if any(ended) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, unless named")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="of the changes (default 1)")
    parser.add_argument("--again", metavar="FILE", help="feed TARGET one file")
    parser.add_argument("--one", metavar="TARGET", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(name: str, asked: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--one", name]
    limits = ["--seconds", str(asked.seconds), "--seed", str(asked.seed)]
    began = time.monotonic()
    ended = subprocess.run([*command, *limits], capture_output=True, text=True, check=False)
    said = (ended.stdout + ended.stderr).splitlines()
    done = next((line for line in reversed(said) if line.startswith(("Done ", "done "))), "")
    verdict = "broken" if ended.returncode else "holds"
    print(f"{name}: {verdict}, {done or 'no count'}, {time.monotonic() - began:.0f} s", flush=True)
    if ended.returncode:
        print("\n".join([*ended.stdout.splitlines()[-30:], *said[-8:]]), flush=True)
        where = WORK / name
        print(
            f"again: python tests/fuzz/fuzz.py {name} --again FILE, of {where}/crash-*", flush=True
        )
    return ended.returncode


def _one(name: str, seconds: int, seed: int) -> int:
    if importlib.util.find_spec("atheris") is None:
        return _unguided(name, seconds, seed)
    return _guided(name, seconds, seed)


def _guided(name: str, seconds: int, seed: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["edge_sdk", "coordinator"]):
        import fuzz_targets

        fuzz_targets.warm(name)
    target = _target(name)
    corpus = _corpus(name)
    options = {
        "max_total_time": seconds,
        "max_len": MOST_BYTES,
        "timeout": SLOW_S,
        "rss_limit_mb": MOST_MIB,
        "seed": seed,
        "artifact_prefix": f"{WORK / name}/",
        "print_final_stats": 1,
    }
    arguments = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup(
        [sys.argv[0], *arguments, str(corpus)], lambda data: fuzz_targets.run(target, data)
    )
    atheris.Fuzz()
    return 0


def _unguided(name: str, seconds: int, seed: int) -> int:
    import fuzz_targets
    from fuzz_mutations import mutations

    target, count = _target(name), 0
    seeds = [path.read_bytes() for path in sorted(_corpus(name).iterdir())]
    until_s = time.monotonic() + seconds
    for count, data in enumerate(itertools.chain(seeds, mutations(seeds, seed))):
        if time.monotonic() >= until_s:
            break
        try:
            fuzz_targets.run(target, data)
        except BaseException:
            (WORK / name / f"crash-{seed}-{count}").write_bytes(data)
            raise
    print(f"done {count} runs, unguided")
    return 0


def _corpus(name: str) -> Path:
    """Return the folder of what a target starts from: its seeds, and all that ever broke it."""
    folder = WORK / name / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted((FOUND / name).glob("*"))
    seeds = [*_target(name).seeds(), *(path.read_bytes() for path in found)]
    for i, data in enumerate(seeds):
        (folder / f"seed-{i}").write_bytes(data)
    return folder


def _again(name: str, file: str) -> int:
    import fuzz_targets

    fuzz_targets.run(_target(name), Path(file).read_bytes())
    print("holds")
    return 0


def _target(name: str):  # noqa: ANN202  # fuzz_targets.Target, which is imported late
    import fuzz_targets

    return next(target for target in fuzz_targets.TARGETS if target.name == name)


if __name__ == "__main__":
    sys.exit(main())
