"""Ray Data: images of any number on many machines, each looked at once, the results as Parquet.

    from cascade_rcnn.ray import Predictor, read_images

    found = read_images("s3://bucket/photos").map_batches(
        Predictor, fn_constructor_args=["runs/street"], batch_size=16, concurrency=8, num_gpus=1
    )
    found.write_parquet("s3://bucket/found")

Ray gives each actor its images, starts a dead actor again and repeats the batch it was working on. ``Predictor`` itself
needs no Ray: it is a callable from batches of files to a table. Needs ``pip install 'cascade-rcnn[ray]'``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.files import list_files
from cascade_rcnn.data.images import IMAGE_SUFFIXES, ImageBytes, to_array
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import load
from cascade_rcnn.inference.predictions_file import ResultsFile
from cascade_rcnn.messages import printable
from cascade_rcnn.runtime.settings import checked_number

_CONTENT = ("bytes", "image")  # columns of read_binary_files and of ray.data.read_images


def _package(name: str) -> Any:
    """The module ``name`` of the extra. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing: pip install 'cascade-rcnn[ray]'") from error


def read_images(paths: str | Sequence[str], **options: Any) -> Any:
    """A ``ray.data.Dataset`` of the image files at ``paths`` (files, folders, buckets): columns ``bytes`` and ``path``.

    The files are decoded by the actors. ``ray.data.read_images`` decodes them before: it stops at the first damaged
    file and ignores the orientation tags of cameras. ``options`` are those of ``ray.data.read_binary_files``.

    Raises:
        UserError: the extra is not installed.
    """
    endings = [suffix.removeprefix(".") for suffix in sorted(IMAGE_SUFFIXES)]
    options = {"include_paths": True, "file_extensions": endings, **options}
    return _package("ray.data").read_binary_files(paths, **options)


class Predictor:
    """A detector as ``map_batches`` calls it: a batch of images in, a table with one row per image out.

    Columns of the table: ``file_name``; ``height``, ``width`` of the upright image; ``detections``, a list of
    ``{label, category, category_id, bbox [x, y, w, h], score, segmentation}`` as in ``predictions.json``;
    ``error``, the reason why a file could not be read (null where it could; there are no detections then). Further
    columns of the batch are kept.
    """

    def __init__(self, checkpoint: str | Path, *, score: float = 0.0, **options: Any) -> None:
        """``score``: leave out detections below it; ``options`` are those of :func:`cascade_rcnn.load`.

        Raises:
            UserError: as :func:`cascade_rcnn.load`; a score that is none; the extra is not installed.
        """
        checked_number("score", score, low=0, high=1)
        _package("pyarrow")
        self.detector = load(checkpoint, **options)
        self.score = score

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Any:
        """A ``pyarrow.Table`` for a batch with a column ``bytes`` (files) or ``image`` (uint8 arrays).

        Raises:
            UserError: neither column is there.
        """
        content = next((batch[name] for name in _CONTENT if name in batch), None)
        if content is None:
            raise UserError(f"columns {', '.join(batch)}: one must be 'bytes' (files) or 'image' (uint8 arrays)")
        names = [str(path) for path in batch["path"]] if "path" in batch else [""] * len(content)
        read = [self._read(one, name) for one, name in zip(content, names)]
        readable = [pixels for pixels in read if not isinstance(pixels, str)]
        found = iter(self.detector.predict(readable, batch_size=max(1, len(readable))))
        rows = [
            {"file_name": name, "error": pixels, "detections": []}
            if isinstance(pixels, str)
            else {"file_name": name, **self._row(next(found))}
            for name, pixels in zip(names, read)
        ]
        table = _package("pyarrow").Table.from_pylist(rows, schema=_schema())
        for name, values in batch.items():
            if name not in (*_CONTENT, "path", *table.column_names):
                table = table.append_column(name, [values.tolist()])
        return table

    def _read(self, content: bytes | NDArray[np.uint8], name: str) -> NDArray[np.uint8] | str:
        """Pixels [H, W, 3], or why there are none."""
        data = self.detector.config.data
        if isinstance(content, bytes):
            image: Any = ImageBytes(content, name or "image")
        else:
            array = np.asarray(content)
            image = array[..., :3] if array.ndim == 3 and array.shape[-1] == 4 else array  # without alpha
        try:
            return to_array(image, max_pixels=data.max_pixels, range=data.range)
        except UserError as error:
            return str(error)

    def _row(self, detections: Detections) -> dict[str, Any]:
        kept = detections[detections.scores >= self.score]
        entries = zip(kept.labels.tolist(), kept.names, kept.to_coco())
        height, width = kept.size
        return {
            "height": height,
            "width": width,
            "detections": [{"label": label, "category": name, **result} for label, name, result in entries],
        }


def _schema() -> Any:
    """The columns of a table of predictions; the same whatever was found."""
    arrow = _package("pyarrow")
    mask = arrow.struct([("size", arrow.list_(arrow.int64())), ("counts", arrow.string())])
    detection = arrow.struct(
        [
            ("label", arrow.int64()),
            ("category", arrow.string()),
            ("category_id", arrow.int64()),
            ("bbox", arrow.list_(arrow.float64())),
            ("score", arrow.float64()),
            ("segmentation", mask),
        ]
    )
    return arrow.schema(
        [
            ("file_name", arrow.string()),
            ("height", arrow.int64()),
            ("width", arrow.int64()),
            ("error", arrow.string()),
            ("detections", arrow.list_(detection)),
        ]
    )


def write_predictions(folder: str | Path, out: str | Path) -> tuple[int, int]:
    """Turn the Parquet files of a folder into one ``predictions.json``; returns the numbers of images and of errors.

    Raises:
        DataError: no Parquet files there, or files without the columns of ``Predictor``.
    """
    folder = Path(folder)
    files = list_files(folder, {".parquet"})
    if not files:
        raise DataError(f"{printable(folder)}: no .parquet files; give the folder of write_parquet")
    images = errors = 0
    with ResultsFile(Path(out)) as results:
        for row in _rows(files):
            images += 1
            errors += row["error"] is not None
            results.add({"file_name": row["file_name"], **_entry(one)} for one in row["detections"] or [])
    return images, errors


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    parquet = _package("pyarrow.parquet")
    needed = ["file_name", "error", "detections"]
    for path in files:
        content = parquet.ParquetFile(path)
        missing = [name for name in needed if name not in content.schema_arrow.names]
        if missing:
            raise DataError(f"{printable(path)}: no column {missing[0]!r}; give files that Predictor has made")
        for batch in content.iter_batches(batch_size=256, columns=needed):
            yield from batch.to_pylist()


def _entry(detection: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in detection.items() if value is not None}
