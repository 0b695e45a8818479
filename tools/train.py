"""Train a recipe: python3 tools/train.py CONFIG [--data DIR] [--out RUN] [--resume] [--key.sub value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cascade_rcnn.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
