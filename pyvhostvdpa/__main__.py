# SPDX-License-Identifier: MIT
"""``python3 -m pyvhostvdpa`` is ``vhost-vdpa``."""

import sys

from .cli import main

sys.exit(main())
