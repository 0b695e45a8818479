"""Predictions by Ray Data: rows as in predictions.json, damaged files as rows, nothing lost or doubled."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow", reason="needs pip install 'cascade-rcnn[ray]'")

from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.detector import load
from cascade_rcnn.ray import Predictor, write_predictions
from tiny import TINY, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "tiny.safetensors"
    config = Config(model=TINY, data=DataConfig(short_side=(96,), long_side=160, workers=0))
    save_checkpoint(path, tiny_model().state_dict(), config=config, class_names=("cat", "dog", "eel"))
    return path


def _picture(seed: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def _png(pixels: np.ndarray, **options: object) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", **options)
    return content.getvalue()


def _column(values: list[object]) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column


def test_rows_are_those_of_predictions_json(checkpoint: Path) -> None:
    options = {"device": "cpu", "score_threshold": 0.0, "max_detections": 7}
    files = [_png(_picture(1)), b"no picture", _png(_picture(2, (64, 33)))]
    batch = {"bytes": _column(files), "path": _column(["a.png", "b.png", "c.png"]), "patient": np.array([3, 4, 5])}
    table = Predictor(checkpoint, **options)(batch)
    rows = table.to_pylist()
    assert [row["file_name"] for row in rows] == ["a.png", "b.png", "c.png"]
    assert [row["patient"] for row in rows] == [3, 4, 5]
    assert rows[1]["detections"] == [] and rows[1]["error"].startswith("b.png: cannot be read as an image")
    assert "object at" not in rows[1]["error"]
    together = load(checkpoint, **options).predict([files[0], files[2]], batch_size=2)
    for row, expected in zip((rows[0], rows[2]), together):
        assert row["error"] is None and (row["height"], row["width"]) == expected.size
        entries = [{key: value for key, value in one.items() if value is not None} for one in row["detections"]]
        labels = zip(expected.labels.tolist(), expected.names)
        wanted = [{"label": a, "category": b, **one} for (a, b), one in zip(labels, expected.to_coco())]
        assert len(entries) == 7 and entries == wanted


def test_cameras_orientation_is_followed(checkpoint: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    row = Predictor(checkpoint)({"bytes": _column([_png(_picture(1), exif=exif)])}).to_pylist()[0]
    assert (row["height"], row["width"]) == (56, 40)


def test_arrays_of_rays_own_reader_with_alpha(checkpoint: Path) -> None:
    predictor = Predictor(checkpoint, score_threshold=0.0, max_detections=3)
    plain = _picture(1)
    alpha = np.dstack([plain, np.full(plain.shape[:2], 9, np.uint8)])
    first, second = predictor({"image": _column([plain, alpha])}).to_pylist()
    assert len(first["detections"]) == 3 and first["detections"] == second["detections"]


def test_score_leaves_detections_out(checkpoint: Path) -> None:
    batch = {"bytes": _column([_png(_picture(1))])}
    scores = [one["score"] for one in Predictor(checkpoint, score_threshold=0.0)(batch).to_pylist()[0]["detections"]]
    limit = sorted(scores)[len(scores) // 2]
    kept = Predictor(checkpoint, score=limit, score_threshold=0.0)(batch).to_pylist()[0]["detections"]
    assert 0 < len(kept) == sum(score >= limit for score in scores) < len(scores)


def test_other_columns_are_refused_with_their_names(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="columns picture: one must be 'bytes'"):
        Predictor(checkpoint)({"picture": _column([b""])})
    with pytest.raises(UserError, match="score"):
        Predictor(checkpoint, score=30)


def test_parquet_becomes_predictions_json(checkpoint: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    batch = {"bytes": _column([_png(_picture(1)), b"damaged"]), "path": _column(["val/a.png", "val/b.png"])}
    table = Predictor(checkpoint, score_threshold=0.0, max_detections=5)(batch)
    pyarrow.parquet.write_table(table, tmp_path / "part.parquet")
    assert write_predictions(tmp_path, tmp_path / "predictions.json") == (2, 1)
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert len(results) == 5 and all("segmentation" not in one or one["segmentation"] for one in results)
    assert {one["file_name"] for one in results} == {"val/a.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.parquet files"):
        write_predictions(tmp_path / "empty", tmp_path / "x.json")
    (tmp_path / "other").mkdir()
    pyarrow.parquet.write_table(table.drop(["error"]), tmp_path / "other" / "part.parquet")
    with pytest.raises(DataError, match="no column 'error'"):
        write_predictions(tmp_path / "other", tmp_path / "x.json")


_KILLED = """
import os, signal, sys
from pathlib import Path
import ray
from cascade_rcnn.ray import Predictor, read_images, write_predictions

checkpoint, photos, out = sys.argv[1:]

class DiesOnce(Predictor):
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 5:
            try:
                Path(out, "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return super().__call__(batch)

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
ray.data.DataContext.get_current().enable_progress_bars = False
found = read_images(photos).map_batches(
    DiesOnce, fn_constructor_args=[checkpoint], fn_constructor_kwargs={"device": "cpu"}, batch_size=32, concurrency=2
)
found.write_parquet(out)
Path(out, "counts").write_text(repr(write_predictions(out, out + "/predictions.json")))
"""


@pytest.mark.slow
def test_a_killed_actor_and_damaged_files_lose_and_double_nothing(checkpoint: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    pytest.importorskip("ray")
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    out.mkdir()
    for number in range(2000):
        content = _png(_picture(number, (24, 24))) if number % 100 else b"\x89PNG\r\n damaged"
        (photos / f"{number:04}.png").write_bytes(content)
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint), str(photos), str(out)],
        capture_output=True, text=True, timeout=570, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "killed").exists(), "no actor was killed"
    assert (out / "counts").read_text() == "(2000, 20)"
    tables = [pyarrow.parquet.read_table(path, columns=["file_name"]) for path in out.glob("*.parquet")]
    names = sorted(Path(name).name for table in tables for name in table["file_name"].to_pylist())
    assert names == [f"{number:04}.png" for number in range(2000)]
