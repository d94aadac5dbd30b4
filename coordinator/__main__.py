# SPDX-License-Identifier: Apache-2.0
"""`python -m coordinator` is `fedge coordinator`."""

from __future__ import annotations

import sys

from edge_sdk import cli

if __name__ == "__main__":
    sys.exit(cli.main(["coordinator", *sys.argv[1:]]))
