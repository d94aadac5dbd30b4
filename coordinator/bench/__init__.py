# SPDX-License-Identifier: Apache-2.0
"""`fedge bench`: what a step, a codec and a fold cost on this machine, next to their rivals."""
