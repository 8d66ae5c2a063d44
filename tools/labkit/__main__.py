"""`python3 -m labkit`: the entry point that `tools/lab` calls."""

import sys

from labkit import output
from labkit.errors import EXIT_INTERRUPTED

try:
    from labkit.cli import main

    status = main(sys.argv[1:])
except KeyboardInterrupt:
    output.say("lab: interrupted")
    status = EXIT_INTERRUPTED
sys.exit(status)
