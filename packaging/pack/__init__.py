# SPDX-License-Identifier: Apache-2.0
"""Makes what is shipped: wheel, sdist, locks, bills of material, Debian packages, their repository.

Run by the scripts beside this folder, which bring the tools. Standard library only.
"""
