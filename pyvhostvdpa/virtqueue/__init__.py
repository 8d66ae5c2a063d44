# SPDX-License-Identifier: MIT
"""Virtqueues: layout, the guest's side, and the shadow in between.

Python places rings and decides; every access to one is in C (``cdefs/``).
"""
