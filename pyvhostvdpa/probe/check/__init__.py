# SPDX-License-Identifier: MIT
"""A conformance test for vDPA parents: rules, each tried on the device by itself, each with a verdict.

:mod:`.rule` defines rules, ``rules/`` has one file per group of them,
:mod:`.engine` runs them one by one in processes of their own, :mod:`.formats`
writes what came of it.
"""
