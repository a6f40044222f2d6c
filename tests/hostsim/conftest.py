"""Lets the tests here import simulator.py, which is no test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
