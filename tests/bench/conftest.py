"""Makes the modules of bench/ importable, as its scripts see them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
