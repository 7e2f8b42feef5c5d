"""Entry point of MLproject: `evaluate-pretrained`."""

import sys
from pathlib import Path

# This checkout's package, even where the environment was built from another clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effv2.cli.main import evaluate_pretrained

if __name__ == "__main__":
    evaluate_pretrained()
