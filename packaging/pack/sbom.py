# SPDX-License-Identifier: Apache-2.0
"""Bills of material (CycloneDX 1.6, JSON), made from the locked sets: the same from the same."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pack.locks import Locked

SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "pkg:pypi/fedge")
IN_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
ONE = r"[A-Za-z0-9.+-]+"
EXPRESSION = re.compile(rf"{ONE}( (AND|OR|WITH) {ONE})*")


def bill(name: str, version: str, carried: Iterable[Locked], epoch: int, kind: str = "pypi") -> str:
    """Return the bill of what `name` is shipped or locked with."""
    root = f"pkg:{kind}/{name}@{version}"
    components = [_component(line) for line in sorted(carried)]
    refs = [component["bom-ref"] for component in components]
    body = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application", "bom-ref": root, "name": name, "version": version,
                "purl": root, "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": components,
        "dependencies": [{"ref": root, "dependsOn": refs}, *({"ref": ref} for ref in refs)],
    }  # fmt: skip
    body["serialNumber"] = f"urn:uuid:{uuid.uuid5(SPACE, json.dumps(body, sort_keys=True))}"
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def _component(line: Locked) -> dict[str, Any]:
    purl = f"pkg:pypi/{line.name}@{line.version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": line.name,
        "version": line.version,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": line.sha256}],
        "licenses": [_licence(IN_SPDX.get(line.licence, line.licence))],
    }


def _licence(stated: str) -> dict[str, Any]:
    if EXPRESSION.fullmatch(stated):
        return {"expression": stated}
    return {"license": {"name": stated}}
