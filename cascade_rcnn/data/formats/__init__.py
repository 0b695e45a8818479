"""Readers and writers of data sets, one file per format; ``open.py`` recognises which one a folder holds."""

from cascade_rcnn.data.formats.open import open_split, splits

__all__ = ["open_split", "splits"]
