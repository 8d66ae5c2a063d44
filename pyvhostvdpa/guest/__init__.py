# SPDX-License-Identifier: MIT
"""The guest: its state as data, and the synthetic guest with its NIC, driver, traffic and memory writer."""
