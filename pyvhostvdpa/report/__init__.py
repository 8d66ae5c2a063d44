# SPDX-License-Identifier: MIT
"""Files for people and for other tools, made of traces and results."""
