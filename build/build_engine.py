"""Door to `minitron build`: python build/build_engine.py --arch hopper."""

import sys

from minitron_build.cli import main

sys.exit(main(["build", *sys.argv[1:]]))
