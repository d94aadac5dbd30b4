# SPDX-License-Identifier: Apache-2.0
"""What a check comes to: a finding, or the exception that becomes one."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

State = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What became of one check."""

    check: str
    state: State
    says: str
    do: str = ""
    """What a person does about it; nothing where all is well."""
    code: int = 0
    """The exit code of a failure."""

    @property
    def ok(self) -> bool:
        """Whether a device can work with it as it is."""
        return self.state != "fail"

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return {
            "check": self.check,
            "ok": self.ok,
            "state": self.state,
            "says": self.says,
            "do": self.do,
        }

    def __str__(self) -> str:
        word = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[self.state]
        is_new = self.do and self.do not in self.says
        return f"{word} {self.check:<13} {self.says}" + (f" -> {self.do}" if is_new else "")


class Amiss(Exception):  # noqa: N818 - says what is the case
    """A check found something that is not as it should be.

    Args: `says` what was found; `do` what a person does about it; `state`: `warn` where a device
    can work with it.
    """

    def __init__(self, says: str, do: str, state: State = "fail") -> None:
        super().__init__(says)
        self.says, self.do, self.state = says, do, state
