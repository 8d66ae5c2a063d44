# lab: --devices vdpa_sim_net:2 --devices vdpa_hwsim:0
"""Devices that fetch the guest's own descriptors while shadowed: 200 switches in each way, and 200 migrations."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))
os.environ.setdefault("PYVHOSTVDPA_SOAK_SWITCHES", "200")
os.environ.setdefault("PYVHOSTVDPA_SOAK_MIGRATIONS", "200")

from conftest import devices, loaded, make, make_sim, pinned  # noqa: F401
from test_used_relay import *  # noqa: F403
