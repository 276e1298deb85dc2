"""Lets the oracle's own tests import it without libraries or package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
