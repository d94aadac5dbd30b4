# SPDX-License-Identifier: Apache-2.0
"""The coordinator daemon and the workstation tools."""
