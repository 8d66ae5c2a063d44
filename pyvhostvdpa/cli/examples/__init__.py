# SPDX-License-Identifier: MIT
"""Scripts of one task each: ``python3 -m pyvhostvdpa.cli.examples.probe /dev/vhost-vdpa-0``."""
