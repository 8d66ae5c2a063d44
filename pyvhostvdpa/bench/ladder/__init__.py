# SPDX-License-Identifier: MIT
"""The ladder: every row of the QEMU series' table, run and measured side by side."""
