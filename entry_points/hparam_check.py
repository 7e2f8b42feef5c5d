"""Entry point of MLproject: `hparam-check`."""

import sys
from pathlib import Path

# Import the package of this checkout, even if another clone is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effv2.cli.main import hparam_check

if __name__ == "__main__":
    hparam_check()
