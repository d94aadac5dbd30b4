# SPDX-License-Identifier: Apache-2.0
"""`python -m edge_sdk` is `fedge`, for interpreters whose scripts are not on the path."""

from __future__ import annotations

import sys

from edge_sdk.cli import main

if __name__ == "__main__":
    sys.exit(main())
