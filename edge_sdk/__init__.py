# SPDX-License-Identifier: Apache-2.0
"""fedge on the device."""
