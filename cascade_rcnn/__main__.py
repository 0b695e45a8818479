"""``python -m cascade_rcnn`` is the command ``cascade-rcnn``, e.g. below torchrun."""

import sys

from cascade_rcnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
