"""`python -m bip_fast`: the command `bip-fast`."""

import sys

from .commands.cli import main

sys.exit(main())
