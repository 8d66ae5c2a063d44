# SPDX-License-Identifier: MIT
"""The kernel's numbers, what an errno means, and the errors that can be raised. Imports no other room."""
