"""Evaluate a checkpoint: python3 tools/test.py CHECKPOINT --data DIR [--out metrics.json]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cascade_rcnn.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
