from __future__ import annotations

import sys
from pathlib import Path

# the model guest of the unit tests
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
# what copies memory and takes the time
sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))

# needs a device, and is asked for by its path: see the page on benchmarks
collect_ignore = ["device"]
