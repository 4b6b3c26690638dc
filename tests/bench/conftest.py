"""The bench is a program in a folder: its files import each other by their plain names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
