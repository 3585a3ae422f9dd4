"""python -m commcomp.checkpoint.command_line"""

from __future__ import annotations

import sys

from commcomp.checkpoint.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
