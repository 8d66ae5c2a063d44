"""`python3 -m labkit`: the entry point that `tools/lab` calls."""

import sys

from labkit.cli import main

sys.exit(main(sys.argv[1:]))
