"""``cascade-rcnn analyze``: equal to ``evaluate``, a page of its own, thresholds that ``predict`` keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_rcnn.analysis.measure import Wanted
from cascade_rcnn.analyze import run_analyze, run_analyze_results
from cascade_rcnn.checkpoint import load_checkpoint, save_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.evaluate import run_evaluate
from cascade_rcnn.evaluation.coco import evaluate_coco
from cascade_rcnn.inference.detector import load
from cascade_rcnn.inference.run_model import AS_SAVED
from cascade_rcnn.models.build import build_model
from html_pages import check_page
from random_results import random_results
from small_training import small_config, small_data

pytest.importorskip("matplotlib")
NAMES = ("circle", "square", "triangle", "star", "cross")
FEW = Wanted(resamples=20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows nothing and says much."""
    torch.manual_seed(0)
    config = small_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, score_threshold=0.0))
    model = build_model(config.model, len(NAMES))
    path = tmp_path_factory.mktemp("analyze") / "model.safetensors"
    save_checkpoint(path, model.state_dict(), config=config, class_names=NAMES, extra={"step": 7})
    return path


def test_a_checkpoint_as_evaluate_measures_it(checkpoint: Path, tmp_path: Path) -> None:
    metrics = run_evaluate(checkpoint, data=small_data(), device="cpu")
    report = run_analyze([checkpoint], data=small_data(), out=tmp_path, device="cpu", inference=AS_SAVED, wanted=FEW)
    final = report["outputs"]["mean of stages"]
    assert list(report["outputs"]) == ["stage 1", "stage 2", "stage 3", "mean of stages"]
    assert final["AP"] == pytest.approx(metrics["bbox/AP"], abs=1e-9)
    for iou, value in zip(report["iou_thresholds"], final["AP_by_iou"]):
        assert value == pytest.approx(metrics[f"bbox/AP@{iou:.2f}"], abs=1e-9)
    assert json.loads((tmp_path / "report.json").read_text())["outputs"] == report["outputs"]
    text = check_page(tmp_path / "report.html")
    assert text.count("data:image/jpeg;base64,") > 3


def test_the_first_stage_alone_is_what_one_stage_gives(checkpoint: Path, tmp_path: Path) -> None:
    report = run_analyze([checkpoint], data=small_data(), out=tmp_path, device="cpu", inference=AS_SAVED, wanted=FEW)
    one = dataclasses.replace(AS_SAVED, stages=1)
    metrics = run_evaluate(checkpoint, data=small_data(), device="cpu", inference=one)
    assert report["outputs"]["stage 1"]["AP"] == pytest.approx(metrics["bbox/AP"], abs=1e-9)


def test_a_checkpoint_does_not_differ_from_itself(checkpoint: Path, tmp_path: Path) -> None:
    report = run_analyze(
        [checkpoint, checkpoint], data=small_data(), out=tmp_path, device="cpu", inference=AS_SAVED, wanted=FEW
    )
    assert report["compare"]["all"]["difference"] == 0
    assert report["compare"]["all"]["interval"] == pytest.approx((0, 0))
    assert "Compared with the second" in check_page(tmp_path / "report.html")


def test_thresholds_are_written_and_kept(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "own.safetensors"
    before = checkpoint.read_bytes()
    run_analyze(
        [checkpoint], data=small_data(), out=tmp_path, device="cpu", inference=AS_SAVED, wanted=FEW,
        set_thresholds=str(target),
    )  # fmt: skip
    assert checkpoint.read_bytes() == before
    written = load_checkpoint(target).metadata
    assert written["step"] == 7 and set(written["thresholds"]) <= set(NAMES)
    limits = dict.fromkeys(NAMES, 0.21) | {"square": 0.0}
    _with_thresholds(target, limits)
    picture = next((small_data() / "val").glob("*.*g"))
    detector, free = load(target, device="cpu"), load(target, device="cpu", score_threshold=0.0)
    kept, everything = detector.predict(picture), free.predict(picture)
    assert len(kept) < len(everything)
    assert all(score >= limits[name] for name, score in zip(kept.names, kept.scores.tolist()))
    assert kept.names.count("square") == everything.names.count("square")
    run_analyze([target], data=small_data(), out=tmp_path, device="cpu", inference=AS_SAVED, wanted=FEW,
                set_thresholds="")  # fmt: skip
    assert load_checkpoint(target).metadata["thresholds"] != limits


def _with_thresholds(path: Path, thresholds: Any) -> None:
    saved = load_checkpoint(path)
    save_checkpoint(
        path, saved.state, config=saved.config, class_names=saved.class_names, extra={"thresholds": thresholds}
    )


def test_damaged_thresholds_are_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bad.safetensors"
    saved = load_checkpoint(checkpoint)
    save_checkpoint(target, saved.state, config=saved.config, class_names=NAMES, extra={"thresholds": {"star": 7}})
    picture = str(next((small_data() / "val").glob("*.*g")))
    assert main(["predict", str(target), picture, "--out", str(tmp_path / "o"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "thresholds" in error and "analyze" in error


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    truth, results = random_results(2, images=20)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "results.json", tmp_path / "truth.json"


def test_results_of_any_detector(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = run_analyze_results(*files, out=tmp_path / "out", wanted=FEW)
    expected = evaluate_coco(files[1], files[0], iou_type="bbox")
    assert report["outputs"]["results"]["AP"] == pytest.approx(expected["bbox/AP"], abs=1e-12)
    assert any("--images" in note for note in report["notes"])
    check_page(tmp_path / "out" / "report.html")


def test_names_in_the_data_cannot_write_the_page(files: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(files[1].read_text())
    content["categories"][0]["name"] = "<img src=http://x>$\\frac$"
    content["categories"][1]["name"] = "_\u7ec6\u80de"
    files[1].write_text(json.dumps(content))
    run_analyze_results(*files, out=tmp_path / "out", wanted=FEW)
    check_page(tmp_path / "out" / "report.html")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one or two CHECKPOINTs and --data DIR, or --results FILE"),
        (["runs/x"], "give one or two CHECKPOINTs"),
        (["--results", "RESULTS"], "give one or two CHECKPOINTs"),
        (["--results", "RESULTS", "--truth", "TRUTH", "--set-thresholds"], "needs a CHECKPOINT"),
        (["--results", "RESULTS", "--truth", "TRUTH", "--images", "EMPTY"], "has none of the pictures"),
        (["--results", "NONE", "--truth", "TRUTH"], "holds no detections"),
        (["--results", "RESULTS", "--truth", "RESULTS"], "not a COCO ground truth"),
    ],
)
def test_mistakes_are_one_line(
    files: tuple[Path, Path], tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.json").write_text("[]")
    places = {"RESULTS": files[0], "TRUTH": files[1], "NONE": tmp_path / "none.json", "EMPTY": tmp_path / "empty"}
    out = tmp_path / "out"
    assert main(["analyze", *(str(places.get(word, word)) for word in words), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
