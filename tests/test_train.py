"""Training end to end on a small data set: what it writes, when it stops, and that it goes on exactly."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade_rcnn.checkpoint import LAST, STATE, load_checkpoint, load_training
from cascade_rcnn.config import Config
from cascade_rcnn.errors import CheckpointError, DataError, UserError
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.recipes import load_config
from cascade_rcnn.structures import ImageBatch, Targets
from cascade_rcnn.train import explain, train
from cascade_rcnn.training import weight_gradient
from small_training import run_alone, run_ranks, small_config, small_data


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _log(run: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def _differences(a: Path, b: Path) -> list[str]:
    """Names of everything in two saved states that is not bit for bit the same."""
    (first, about_first), (second, about_second) = load_training(a), load_training(b)
    assert first.keys() == second.keys() and len(first) > 100
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    return differ + [key for key in about_first if about_first[key] != about_second[key]]


def test_a_run_leaves_everything_that_is_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(model={"masks": "last"}, evaluate_every=1, ema=0.9)
    run = tmp_path / "run"
    best = train(config, out=run)
    assert best == run / "best.safetensors"
    checkpoint = load_checkpoint(run)
    assert checkpoint.config == config and len(checkpoint.class_names) == 5
    assert checkpoint.metadata["metrics"].keys() >= {"bbox/AP", "segm/AP"}
    assert load_checkpoint(run / LAST).metadata == {"step": 12, "epoch": 2}
    assert json.loads((run / "config.json").read_text())["train"]["epochs"] == 2
    log = _log(run)
    assert [record["step"] for record in log] == [2, 4, 6, 8, 10, 12]
    assert log[-1]["epoch"] == 2 and log[-1]["lr"] == pytest.approx(0.001)
    for key in ("loss", "rpn_cls", "s2.mask", "grad_norm", "images_per_second", "data_share", "memory_gb", "eta_s"):
        assert all(record[key] >= 0 for record in log), key
    assert [record["step"] for record in _log(run, "metrics.jsonl")] == [6, 12]
    pictures = sorted(path.name for path in (run / "images").iterdir())
    assert pictures == [f"train_batch{b}_{i}.jpg" for b in (1, 2) for i in (1, 2)] + [
        f"validation_{i}.jpg" for i in (1, 2, 3, 4)
    ]
    said = capsys.readouterr().out
    assert "learning rate 0.01 is for 2 images per step; this run has 2, so it stays" in said
    assert "12 images to learn from, 4 to evaluate on; classes: circle" in said
    assert not list(run.rglob("*.tmp"))


def test_a_run_says_and_saves_what_it_chose_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(small_config(epochs=1), automatic=("model.anchor_scales", "data.flip"))
    measured, *lines = explain(config)
    assert re.fullmatch(r"measured: \d\d objects in 12 images of 'train'", measured)
    train(config, out=tmp_path)
    said = capsys.readouterr().out
    assert len(lines) == 7 and all(line in said for line in lines)
    assert "data.short_side 64: as given" in lines
    saved = load_checkpoint(tmp_path).config
    assert saved.automatic is None and max(saved.model.anchor_scales) < 8, "objects are half of 64 pixels at most"
    other = tuple(2 * scale for scale in saved.model.anchor_scales)
    changed = dataclasses.replace(saved, model=dataclasses.replace(saved.model, anchor_scales=other))
    (tmp_path / "config.json").write_text(json.dumps(changed.to_dict()))
    train(config, out=tmp_path, resume=True)
    assert load_config(tmp_path).model.anchor_scales == other, "a resumed run keeps the network that it began with"


def test_an_explanation_says_on_what_it_rests(tmp_path: Path) -> None:
    without = small_config()
    (nothing,) = explain(without)
    assert nothing.startswith("nothing is chosen: --automatic none, or a recipe other than finetune, ")
    shutil.copytree(small_data(), tmp_path / "data")
    for image in (tmp_path / "data" / "train").glob("*.jpg"):
        image.unlink()
    data = dataclasses.replace(without.data, root=str(tmp_path / "data"))
    _, missing, *_ = explain(dataclasses.replace(without, data=data, automatic=("data.flip",)))
    assert re.match(r"missing: 12 of 12 images that were looked for \(.*\.jpg first\): chosen from the ann", missing)
    wide = dataclasses.replace(
        without, automatic=("data.flip",), model=dataclasses.replace(without.model, fpn_channels=256)
    )
    if not torch.cuda.is_available():
        assert explain(wide)[-1].startswith("no GPU: this network takes hours to days on a CPU; finetune_small")


def test_convolutions_of_large_maps_learn_by_matrix_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with AVX2 alone; the training is the same but for rounding."""
    monkeypatch.setattr(weight_gradient, "_LEAST_PIXELS", 1)
    called = []
    own = weight_gradient.weight_gradient
    monkeypatch.setattr(weight_gradient, "weight_gradient", lambda *maps: (called.append(1), own(*maps))[1])
    losses = {}
    for units in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=units: found)
        before = len(called)
        train(small_config(epochs=1), out=tmp_path / units)
        assert (len(called) > before) == (units == "AVX2")
        losses[units] = [record["loss"] for record in _log(tmp_path / units)]
    assert losses["AVX2"] == pytest.approx(losses["AVX512"], rel=1e-4)


def _in_pieces(config: Config, out: Path, stops: tuple[int, ...]) -> None:
    """Each piece ends after so many steps of the run, and the next goes on from what was saved."""
    for last_step in (*stops, 0):
        train(
            dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=last_step)),
            out=out,
            resume=True,
        )


@pytest.mark.parametrize(
    ("stops", "workers", "changes"),
    [
        ((4, 6, 9), 0, {"evaluate_every": 1}),
        ((1, 3), 1, {"ema": 0.9, "optimizer": "adamw", "schedule": "cosine", "accumulate": 4, "clip_grad_norm": 1.0}),
    ],
    ids=["sgd, evaluated", "adamw, averaged, accumulated, clipped, loader processes"],
)
def test_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, stops: tuple[int, ...], workers: int, changes: dict[str, Any]
) -> None:
    config = small_config(data={"workers": workers}, **changes)
    run_alone(_train_to, config, tmp_path / "whole")
    run_alone(_in_pieces, config, tmp_path / "pieces", stops)
    differ = _differences(tmp_path / "whole", tmp_path / "pieces")
    # a piece is also evaluated where it ends, so the best result may be another one; nothing that is trained differs
    assert differ == (["progress"] if "evaluate_every" in changes else [])
    first, second = load_checkpoint(tmp_path / "whole" / LAST), load_checkpoint(tmp_path / "pieces" / LAST)
    assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())


def _train_to(config: Config, out: Path) -> str:
    return str(train(config, out=out))


def test_losses_logged_twice_after_a_crash_stay_once(tmp_path: Path) -> None:
    run_alone(_train_to, small_config(max_steps=4), tmp_path)
    lines = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(lines + lines.replace('"step": 4', '"step": 6') + '{"step": 8, "los')
    run_alone(_in_pieces, small_config(), tmp_path, ())
    assert [record["step"] for record in _log(tmp_path)] == [2, 4, 2, 6, 8, 10, 12]


@pytest.mark.parametrize("remains", [STATE, Path(LAST), Path("log.jsonl")])
def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, remains: Path) -> None:
    (tmp_path / remains).parent.mkdir(exist_ok=True)
    (tmp_path / remains).write_text("mine")
    with pytest.raises(UserError, match=r"already holds a run; .*--resume.*--out"):
        train(small_config(), out=tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [remains.name]
    assert (tmp_path / remains).read_text() == "mine"


def test_resume_begins_a_run_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(small_config(max_steps=1), out=tmp_path / "new", resume=True) == tmp_path / "new" / LAST
    assert "starting a new run" in capsys.readouterr().out


def test_a_run_without_its_state_cannot_go_on(tmp_path: Path) -> None:
    (tmp_path / LAST).write_text("weights")
    with pytest.raises(UserError, match=r"state/training.safetensors is missing.*--out"):
        train(small_config(), out=tmp_path, resume=True)


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    train(small_config(max_steps=1), out=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"do not fit this configuration.*cascade-rcnn train .* --resume"):
        train(small_config(model={"head_channels": 48}), out=tmp_path / "run", resume=True)
    data = _with_other_classes(tmp_path / "data")
    with pytest.raises(UserError, match=r"other classes: circle, square.*the data have disc, square") as caught:
        train(small_config(data={"root": str(data)}), out=tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def _with_other_classes(folder: Path) -> Path:
    shutil.copytree(small_data(), folder)
    for path in (folder / "annotations").glob("*.json"):
        path.write_text(path.read_text().replace('"circle"', '"disc"'))
    return folder


def test_the_learning_rate_follows_the_real_number_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(lr=0.02, images_per_step=16, warmup_steps=0, max_steps=2), out=tmp_path / "a")
    assert "learning rate 0.02 is for 16 images per step; this run has 2, so 0.0025" in capsys.readouterr().out
    assert _log(tmp_path / "a")[0]["lr"] == pytest.approx(0.0025)
    train(small_config(lr=0.02, images_per_step=6, accumulate=0, warmup_steps=0, epochs=1), out=tmp_path / "b")
    assert "this run has 6 in 3 passes, so it stays" in capsys.readouterr().out
    assert _log(tmp_path / "b")[-1]["step"] == 2  # 12 images, 3 passes of 2 images in each step


def test_training_stops_when_it_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(
        "cascade_rcnn.training.run.evaluate_results", lambda *args, **keywords: {"bbox/AP": next(scores)}
    )
    best = train(small_config(epochs=5, evaluate_every=1, patience=2), out=tmp_path)
    assert load_checkpoint(best).metadata == {"step": 12, "epoch": 2, "metrics": {"bbox/AP": 0.5}}
    assert load_checkpoint(tmp_path / LAST).metadata["epoch"] == 4
    assert train(small_config(epochs=5, evaluate_every=1, patience=2), out=tmp_path, resume=True) == best
    assert next(scores) == 0.9  # not asked for again


def test_a_short_run_is_evaluated_at_its_end(tmp_path: Path) -> None:
    train(small_config(epochs=3, evaluate_every=2, max_steps=14), out=tmp_path)
    assert [record["step"] for record in _log(tmp_path, "metrics.jsonl")] == [12, 14]


def test_an_interrupted_evaluation_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: object, **keywords: object) -> dict[str, float]:
        raise OSError("pulled the plug")

    monkeypatch.setattr("cascade_rcnn.training.run.detect_split", breaks)
    with pytest.raises(OSError, match="plug"):
        train(small_config(evaluate_every=1), out=tmp_path)
    monkeypatch.undo()
    train(small_config(evaluate_every=1), out=tmp_path, resume=True)
    assert [record["step"] for record in _log(tmp_path, "metrics.jsonl")] == [6, 12]


def test_unreadable_images_are_replaced_and_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data(), data)
    broken = sorted((data / "train").glob("*.*"))[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    config = small_config(data={"root": str(data)})
    train(config, out=tmp_path / "run")
    said = capsys.readouterr().out
    for path in broken:
        assert said.count(f"another image in its place: {path}") == 1
    strict = dataclasses.replace(config, train=dataclasses.replace(config.train, max_bad_images=1))
    with pytest.raises(DataError, match=r"more than 1 images could not be used.*max_bad_images"):
        train(strict, out=tmp_path / "strict")


def _poison(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    """Make some of the losses not a number."""
    true_loss, calls = CascadeRCNN.loss, iter(range(1000))

    def loss(self: CascadeRCNN, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        losses = true_loss(self, images, targets)
        factor = float("nan") if next(calls) in bad_calls else 1.0
        return losses | {"s1.box": losses["s1.box"] * factor}

    monkeypatch.setattr(CascadeRCNN, "loss", loss)


def test_a_loss_that_is_not_finite_names_its_images_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _poison(monkeypatch, {3})
    train(small_config(max_steps=3, momentum=0.9), out=tmp_path)
    before, _ = load_training(tmp_path)
    train(small_config(max_steps=4, momentum=0.9), out=tmp_path, resume=True)
    after, _ = load_training(tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"not finite, skipped: step 3: s1.box nan; images \S+train\S+, \S+train\S+", said)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.startswith("rng"))
    train(small_config(max_steps=6), out=tmp_path, resume=True)
    assert all(value.isfinite().all() for value in load_training(tmp_path)[0].values() if value.is_floating_point())
    assert all(record["loss"] > 0 for record in _log(tmp_path) if record["step"] != 4)


def test_a_training_that_skips_every_step_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {0, 1})
    with pytest.raises(UserError, match=r"all 2 steps were skipped \(step 1: s1.box nan; .*nothing was learnt"):
        train(small_config(max_steps=2), out=tmp_path)


def test_losses_that_stay_not_finite_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, {1, 3, 4, 5, 6, 7})
    with pytest.raises(UserError, match=r"of 3 steps in a row .*step 5: s1.box nan; images .*clip_grad_norm") as caught:
        train(small_config(max_bad_losses=3, save_every=1), out=tmp_path)
    assert "\n" not in str(caught.value)
    assert load_training(tmp_path)[1]["progress"]["step"] == 5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_that_stay_not_finite_are_counted_over_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    _poison(monkeypatch, set(range(2, 100)))
    config = small_config(batch_size=6 // accumulate, accumulate=accumulate, epochs=9, max_bad_losses=4)  # 2 steps each
    with pytest.raises(UserError, match=r"of 4 steps in a row were not finite"):
        train(config, out=tmp_path)


def test_losses_that_stay_not_finite_are_counted_over_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {1, 2, 3, 5, 6, 7})
    train(small_config(max_steps=3, max_bad_losses=4), out=tmp_path)
    assert load_training(tmp_path)[1]["bad_losses"] == 2
    train(small_config(max_steps=7, max_bad_losses=4), out=tmp_path, resume=True)  # the third, then a good one
    with pytest.raises(UserError, match=r"of 3 steps in a row were not finite \(step 7"):
        train(small_config(max_steps=8, max_bad_losses=3), out=tmp_path, resume=True)


def _spoil(data: Path, how: str) -> Path:
    """Make the second validation image unusable."""
    path = sorted((data / "val").glob("*.*"))[1]
    if how == "missing":
        path.unlink()
    elif how == "no image":
        path.write_bytes(b"hello")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        with Image.open(path) as picture:
            picture.resize((80, 60)).save(path)
    return path


@pytest.mark.parametrize("how", ["missing", "no image", "truncated", "another size"])
def test_a_validation_image_that_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data(), data)
    path = _spoil(data, how)
    config = small_config(data={"root": str(data)}, evaluate_every=1, epochs=1, milestones=())
    train(config, out=tmp_path / "run")
    said = capsys.readouterr().out
    (line,) = re.findall(
        r"1 of the 4 images of split 'val' cannot be used and are left out of every evaluation: .*", said
    )
    assert path.name in line and "3 to evaluate on" in said and "evaluated after step 6" in said


def test_too_many_unusable_validation_images_are_refused_before_the_first_step(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data(), data)
    _spoil(data, "missing")
    strict = small_config(data={"root": str(data)}, evaluate_every=1, max_bad_images=0)
    with pytest.raises(
        DataError, match=r"1 of the 4 images of split 'val' cannot be used .*is not there.*check"
    ) as caught:
        train(strict, out=tmp_path / "strict")
    assert "\n" not in str(caught.value) and not (tmp_path / "strict").exists()
    for path in (data / "val").glob("*.*"):
        path.unlink()
    with pytest.raises(DataError, match=r"4 of the 4 images"):
        train(small_config(data={"root": str(data)}, evaluate_every=1), out=tmp_path / "none")
    train(small_config(data={"root": str(data)}, max_steps=1), out=tmp_path / "no evaluation")


def test_masks_cannot_be_learnt_from_boxes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data(), data)
    for path in (data / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        content["annotations"] = [
            {key: value for key, value in one.items() if key != "segmentation"} for one in content["annotations"]
        ]
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has no masks; .*--model.masks none"):
        train(small_config(model={"masks": "last"}, data={"root": str(data)}), out=tmp_path / "run")


def test_another_number_of_processes_goes_on_after_the_images_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_alone(_train_to, small_config(max_steps=8), tmp_path)  # an epoch and 4 of 12 images
    run_ranks(2, _resume, small_config(batch_size=1, epochs=3, images_per_step=4), tmp_path)
    said = capfd.readouterr().out
    assert "saved by 1 processes, resumed with 2" in said and "goes on at step 8, epoch 1.33" in said
    _, info = load_training(tmp_path)
    assert info["progress"]["step"] == 18 and info["world_size"] == 2
    run_alone(_resume, small_config(batch_size=3, epochs=4, images_per_step=2), tmp_path)
    assert load_training(tmp_path)[1]["progress"]["step"] == 16  # four epochs of four steps


def _resume(config: Config, out: Path) -> str:
    return str(train(config, out=out, resume=True))


def test_out_of_gpu_memory_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(CascadeRCNN, "loss", full)
    with pytest.raises(UserError, match=r"out of GPU memory.*train.batch_size \(now 2.*activation-checkpointing"):
        train(small_config(), out=tmp_path)
