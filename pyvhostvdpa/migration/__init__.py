# SPDX-License-Identifier: MIT
"""Live migration: a guest leaves one vDPA device for another and keeps its traffic."""
