# SPDX-License-Identifier: Apache-2.0
"""`fedge`: finds its subcommands through the entry-point group ``fedge.commands``.

A subcommand is a function that takes the rest of the command line and returns an exit code. It is
imported only when called, so a device pays for the device's commands alone. Exit codes: 0 done,
1 failed, 2 wrong usage, 3 wrong configuration, 4 broker out of reach, 5 bad bundle or model,
6 a part is not installed, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version

from edge_sdk.errors import BundleError, CompileError, ConfigError, FedgeError, TransportError

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (ConfigError, 3),
    (TransportError, 4),
    (BundleError, 5),
    (CompileError, 5),
    (FedgeError, 1),
    (ModuleNotFoundError, 6),
    (KeyboardInterrupt, 130),
)
ABOUT = {
    "demo": "ten devices learn together on this machine, in a few minutes",
    "build": "compile an ONNX model into a bundle that trains on stock onnxruntime",
    "inspect": "show what a bundle holds and costs",
    "device": "run fedge on a board: run, status, doctor, wipe",
    "selftest": "does this board compute what it should? load, predict, learn, encode, sign",
    "coordinator": "run the coordinator: run, check, fleet, rounds, models",
    "bench": "measure step, codec and aggregate on this machine, next to the rivals",
}
HINTS = {
    "onnxruntime": "onnx",
    "onnx": "compiler",
    "sklearn": "demo",
    "matplotlib": "demo",
    "aiohttp": "coordinator",
    "amqtt": "broker",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; every failure that has a known cause ends in one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {e.name: e for e in entry_points(group="fedge.commands")}
    if not args or args[0] in {"-h", "--help"}:
        print(_usage(commands))
        return 0 if args else 2
    if args[0] == "--version":
        print(f"fedge {version('fedge')}")
        return 0
    if args[0] not in commands:
        return _fail(2, f"no command {args[0]!r}; try one of {', '.join(sorted(commands))}")
    return run(commands[args[0]], args[1:])


def run(command: EntryPoint, args: list[str]) -> int:
    """Call `command`, turning known errors into one line and a numbered exit code."""
    try:
        return int(command.load()(args))
    except tuple(kind for kind, _ in EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
        return _fail(code, _line(error))


def _line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        extra = f"fedge[{HINTS[name]}]" if name in HINTS else "fedge"
        return f"{error.name} is not installed; pip install '{extra}'"
    return " ".join(str(error).split())


def _fail(code: int, message: str) -> int:
    print(f"fedge: {message}", file=sys.stderr)
    return code


def _usage(commands: dict[str, EntryPoint]) -> str:
    names = [name for name in ABOUT if name in commands]
    names += sorted(commands.keys() - ABOUT.keys())
    rows = [f"  {name:<12} {ABOUT.get(name, '')}".rstrip() for name in names]
    example = "example: fedge demo --devices 10 --rounds 15"
    return "\n".join(["usage: fedge COMMAND [--help] ...", "", *rows, "", example])
