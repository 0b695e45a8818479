"""benchmarks/paper: the parts that its numbers rest on, and all of it in miniature."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import locations
from small_training import small_config, small_data

SCRIPTS = locations.REPOSITORY / "benchmarks" / "paper"
RUN = SCRIPTS / "run.py"


@pytest.fixture(autouse=True)
def _scripts_are_importable() -> Iterator[None]:
    """Their short names (``work``, ``run``) stay out of the other tests."""
    before, known = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
    yield
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def random_split(seed: int, images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A ground truth of two classes, and detections of which some are right."""
    rng = np.random.default_rng(seed)
    objects: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(rng.integers(1, 6)):
            x, y, w, h = (float(one) for one in (*rng.uniform(0, 150, 2), *rng.uniform(20, 60, 2)))
            category = int(rng.integers(1, 3))
            own = {"image_id": image, "category_id": category}
            objects.append({**own, "id": len(objects) + 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
            for _ in range(rng.integers(0, 3)):
                box = [x + rng.normal(0, 3), y + rng.normal(0, 3), w * rng.uniform(0.8, 1.2), h]
                found.append({**own, "bbox": box, "score": float(rng.uniform(0.3, 1))})
        found.append({"image_id": image, "category_id": 1, "bbox": [0, 0, 30, 30], "score": float(rng.uniform(0, 0.9))})
    truth = {
        "images": [{"id": k, "width": 300, "height": 300} for k in range(1, images + 1)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": objects,
    }
    return truth, found


def matched(truth: dict[str, Any], found: list[dict[str, Any]]) -> Any:
    import scores

    result = scores.Matched(len(truth["images"]), 100)
    for category in (1, 2):
        per_image = []
        for image in truth["images"]:
            mine = [one for one in found if (one["image_id"], one["category_id"]) == (image["id"], category)]
            own = [
                one for one in truth["annotations"] if (one["image_id"], one["category_id"]) == (image["id"], category)
            ]
            boxes, objects = (np.array([one["bbox"] for one in part]).reshape(-1, 4) for part in (mine, own))
            boxes[:, 2:] += boxes[:, :2]
            objects[:, 2:] += objects[:, :2]
            per_image.append((np.array([one["score"] for one in mine]), scores.overlaps(boxes, objects)))
        result.add_class(per_image)
    return result


@pytest.mark.parametrize("seed", range(3))
def test_the_ap_behind_the_intervals_is_the_products(seed: int) -> None:
    from scores import IOUS, evaluate_coco

    truth, found = random_split(seed, images=6)
    metrics = evaluate_coco(truth, found, iou_type="bbox")
    again = matched(truth, found).average_precision(np.ones(6, dtype=np.int64))
    assert again == pytest.approx([metrics[f"bbox/AP@{iou:.2f}"] for iou in IOUS], abs=1e-9)
    assert 0.05 < again[0] < 0.95, "a case that can tell something"


def test_an_image_drawn_twice_counts_as_two_images() -> None:
    from scores import IOUS, evaluate_coco

    truth, found = random_split(7, images=4)
    times = np.array([2, 0, 1, 1])
    images, objects, results = [], [], []
    for image, count in zip(truth["images"], times):
        for copy in range(count):
            name = image["id"] * 10 + copy
            images.append({**image, "id": name})
            objects += [
                {**one, "image_id": name, "id": 100 * name + k}
                for k, one in enumerate(truth["annotations"])
                if one["image_id"] == image["id"]
            ]
            results += [{**one, "image_id": name} for one in found if one["image_id"] == image["id"]]
    metrics = evaluate_coco({**truth, "images": images, "annotations": objects}, results, iou_type="bbox")
    again = matched(truth, found).average_precision(times)
    assert again == pytest.approx([metrics[f"bbox/AP@{iou:.2f}"] for iou in IOUS], abs=1e-9)


def test_the_samples_are_the_same_for_every_network() -> None:
    from scores import samples

    drawn = samples(9, 5)
    assert (drawn == samples(9, 5)).all() and (drawn.sum(axis=1) == 9).all() and len(np.unique(drawn, axis=0)) > 1


def small_network(stages: tuple[float, ...], **more: Any) -> tuple[Any, Any]:
    from product import build, open_split

    config = small_config(model={"stage_ious": stages, "score_threshold": 0.0})
    torch.manual_seed(0)
    model = build(config.model, len(open_split(small_data(), "val").class_names), **more).eval()
    with torch.no_grad():
        for head in model.cascade.box_heads:
            head.classifier.weight.normal_(std=0.3)
            head.deltas.weight.normal_(std=0.05)
    return model, config


def test_the_ensemble_of_all_stages_is_what_the_product_detects() -> None:
    from explore import look_at_split
    from product import open_split

    model, config = small_network((0.5, 0.6, 0.7))
    split = open_split(small_data(), "val")
    names = split.class_names
    ours = look_at_split(model, config, names, split, everything=True, device="cpu").ways
    theirs = look_at_split(model, config, names, split, everything=False, device="cpu").ways["final"]
    assert len(theirs) == len(split) and sum(map(len, theirs)) > 10
    for one, other in zip(ours["final"], theirs):
        assert torch.allclose(one.boxes, other.boxes, atol=1e-3) and torch.allclose(one.scores, other.scores, atol=1e-5)
    assert [len(one) for one in ours["head2_on_boxes2"]] == [len(one) for one in ours["stage2"]]
    assert torch.equal(ours["head2_on_boxes2"][0].boxes, ours["stage2"][0].boxes)
    assert not torch.equal(ours["head1_on_boxes2"][0].scores, ours["stage2"][0].scores)


def test_one_head_in_rounds_and_with_the_truth_added() -> None:
    from explore import look_at_split
    from product import open_split

    model, config = small_network((0.5,))
    cascade, _ = small_network((0.5, 0.6, 0.7))
    split = open_split(small_data(), "val")
    look = look_at_split(model, config, split.class_names, split, everything=True, other=cascade, device="cpu")
    assert {"round1", "round3", "rounds3_mean", "truth_added", "cascade_boxes2", "cascade_boxes3"} <= set(look.ways)
    product = look_at_split(model, config, split.class_names, split, everything=False, device="cpu").ways["final"]
    assert torch.allclose(look.ways["round1"][0].boxes, product[0].boxes, atol=1e-3)
    assert not torch.equal(look.ways["round2"][0].boxes, look.ways["round1"][0].boxes)
    assert sum(look.regressions["round1"].count) > 0


def test_boxes_and_scores_of_the_rounds_apart() -> None:
    from explore import look_at_split
    from iterative import look
    from product import open_split

    model, config = small_network((0.5,))
    split = open_split(small_data(), "val")
    ways, drift = look(model, config, split.class_names, split)
    rounds = look_at_split(model, config, split.class_names, split, everything=True, device="cpu").ways
    assert len(ways) == 12
    for number in (1, 2, 3):
        same = [one for found in rounds[f"round{number}"] for one in found.to_coco()]
        assert [one["bbox"] for one in ways[f"boxes {number}, scores {number}"]] == [one["bbox"] for one in same]
    assert ways["boxes 3, scores 4"] != ways["boxes 3, scores 3"] != ways["boxes 2, scores 3"]
    assert drift.counts.sum(dim=(0, 2)).unique().numel() == 1, "the same proposals in each round"
    assert drift.counts.sum() > 0 and all(
        sum(shares) == pytest.approx(100) for shares in drift.summary()["alone"] if sum(shares)
    )


def test_drift_through_the_stages_of_a_cascade() -> None:
    from iterative import drift_of_stages, look
    from product import open_split

    model, config = small_network((0.5, 0.6, 0.7))
    split = open_split(small_data(), "val")
    ours = drift_of_stages(model, config, split).counts
    for parts in (model.cascade.box_heads, model.cascade.stages):
        parts[1] = parts[2] = parts[0]
    one_head = drift_of_stages(model, config, split).counts
    rounds = look(model, config, split.class_names, split)[1].counts
    assert torch.equal(one_head, rounds) and not torch.equal(ours, one_head)


def test_how_far_a_stage_moves_its_boxes() -> None:
    from product import Targets, encode_boxes
    from stage_moves import Moves

    from cascade_rcnn.models.boxes import decode_boxes, pairwise_iou

    objects = torch.tensor([[[10.0, 10, 50, 60], [100, 20, 160, 90], [0, 0, 0, 0]]])
    truth = Targets(
        objects, torch.ones(1, 3, dtype=torch.long), torch.tensor([[True, True, False]]), torch.zeros(1, 3) > 0
    )
    before = torch.tensor([[[16.0, 6, 58, 58], [96, 25, 150, 96], [300, 300, 340, 340], [0, 0, 400, 400]]])
    valid = torch.tensor([[True, True, True, False]])
    deltas = encode_boxes(before[:, :2], objects[:, :2], torch.ones(4))
    for share in (0.0, 0.5, 1.0):
        moved = torch.cat([decode_boxes(share * deltas, before[:, :2], torch.ones(4)), before[:, 2:]], dim=1)
        stage = Moves()
        stage.add(before, moved, valid, truth, followed=torch.tensor([[True, False, True, False]]))
        found = stage.summary()
        assert found["way"] == pytest.approx(share, abs=1e-4)
        assert found["iou"] == pytest.approx(pairwise_iou(moved[0, :1], objects[0, :1]).item() / 2, abs=1e-6)


def test_an_integral_loss_of_one_iou_is_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from product import DetectionDataset, open_split, train_loader

    plain, config = small_network((0.5,))
    integral, _ = small_network((0.5,), integral=(0.5,))
    stricter, _ = small_network((0.5,), integral=(0.5, 0.9))
    loader = train_loader(DetectionDataset(open_split(small_data(), "train"), config.data, training=True), batch_size=4)
    images, targets = next(iter(loader))
    losses = []
    for model in (plain, integral, stricter):
        own = model.cascade.box_heads[0]
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if "classifier" not in k}, strict=False)
        rows = plain.cascade.box_heads[0].classifier.weight
        own.classifier.weight.data.copy_(rows.repeat(len(own.classifier.weight) // len(rows), 1))
        torch.manual_seed(1)
        losses.append({key: value.item() for key, value in model.train().loss(images, targets).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2]["s0.box"] == pytest.approx(losses[0]["s0.box"]) and losses[2]["s0.cls"] != losses[0]["s0.cls"]
    loader.close()


def test_a_training_builds_the_network_of_the_experiment(tmp_path: Path) -> None:
    from product import LAST, build, load_network, train_network

    config = small_config(model={"stage_ious": (0.5,)}, max_steps=1, evaluate_every=0)
    train_network(config, tmp_path / "run", device="cpu", integral=(0.5, 0.6))
    model, _, names = load_network(tmp_path / "run" / LAST, device="cpu", integral=(0.5, 0.6))
    assert len(model.cascade.box_heads[0].classifier.weight) == 2 * (len(names) + 1)
    assert model.cascade.stages[0].details.box_beta == build(config.model, 1).cascade.stages[0].details.box_beta == 1
    assert not list((tmp_path / "run").glob("images/train_batch*")), "pictures of batches take time"


def test_hypotheses_leave_the_truth_out_and_see_each_stage() -> None:
    from explore import look_at_training
    from product import open_split

    model, config = small_network((0.5, 0.6, 0.7))
    found = look_at_training(model, config, open_split(small_data(), "train"), device="cpu", images=4)
    assert set(found["share"]) == {"proposals", "stage1", "stage2", "stage3"}
    assert all("sample" not in vars(stage) for stage in model.cascade.stages), "the network is left as it was"
    assert found["share"]["stage1"]["0.9"] < 0.2, "ground truth has an IoU of 1"


def test_jobs_come_after_what_they_need_and_only_the_rules_differ() -> None:
    from jobs import all_jobs, job_config, read_settings

    settings = read_settings()
    jobs = all_jobs(settings)
    seen: set[str] = set()
    for name, job in jobs.items():
        assert set(job.needs) <= seen | ({f"cascade-s{job.seed}"} & set(jobs)), name
        seen.add(name)
    paths = {"work": Path("w"), "weights": Path("x"), "images": 532, "loaders": 0}
    one, three = (job_config(jobs[f"{row}-s1"], settings, **paths) for row in ("single5", "cascade"))
    assert one.model == replace(three.model, stage_ious=(0.5,)) and one.train == three.train
    alone = job_config(jobs["iou-s1"], settings, **paths)
    assert alone.model == replace(three.model, stage_stds=((0.1, 0.1, 0.2, 0.2),) * 3)
    small = job_config(jobs["small25_single_bccd-s2"], settings, **{**paths, "images": 25})
    assert small.train.max_steps == one.train.max_steps and small.data.train == "train25_2"
    assert small.train.init.endswith("bccd_single-s0/last.safetensors")


def test_trainings_see_crops_and_evaluation_whole_pictures() -> None:
    from jobs import all_jobs, evaluated, job_config, read_settings

    sizes = {}
    for larger in (False, True):
        settings = read_settings(larger=larger)
        paths = {"work": Path("w"), "weights": Path("x"), "images": 532, "loaders": 0}
        config = job_config(all_jobs(settings)["cascade-s0"], settings, **paths)
        whole = evaluated(config, settings["data"]["nuclei"]).data
        sizes[larger] = (config.data.short_side, config.data.long_side, config.train.batch_size)
        assert (whole.short_side, whole.long_side, whole.large_scale_jitter) == ((384,), 512, None)
        assert (config.data.large_scale_jitter is None) is larger
    assert sizes == {False: ((192,), 192, 8), True: ((384,), 512, 16)}


def test_a_folder_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    import run
    from jobs import read_settings, settings_of

    settings = read_settings()
    run._keep_settings(settings, tmp_path)
    run._keep_settings(settings | {"seeds": [7]}, tmp_path)  # more seeds go on there
    with pytest.raises(SystemExit, match=r"settings\.json: begun with other settings \(data, network, training\)"):
        run._keep_settings(read_settings(larger=True), tmp_path)
    assert settings_of(tmp_path / "larger") == read_settings(larger=True) != settings_of(tmp_path) == settings


def test_the_larger_run_stands_beside_the_numbers(tmp_path: Path) -> None:
    import report

    (tmp_path / "scores").mkdir()
    for row, ap in (("one", 0.4), ("two", 0.5)):
        each = {"final/ap": np.full(10, ap), "final/samples": np.full((3, 10), ap)}
        np.savez(tmp_path / "scores" / f"{row}-s0.npz", **each)
    entries = [("one stage", "one", "final", "34.9"), ("two stages", "two", "final", "")]
    table = tmp_path / "table.json"
    rows = [
        {"row": "one", "way": "final", "AP": {"value": 52.44}, "gain": None},
        {"row": "two", "way": "final", "AP": {"value": 54.0}, "gain": {"value": 1.56}},
    ]
    table.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    results = report.Results(tmp_path, [0])
    text = report.ap_table(results.beside(table), entries)[0].splitlines()
    assert text[0] == "|  | AP | gain over one stage | larger run | paper | seeds |"
    assert text[2] == "| one stage | 40.0 [40.0, 40.0] | – | 52.4 | 34.9 | 40.0 |"
    assert text[3] == "| two stages | 50.0 [50.0, 50.0] | +10.0 [+10.0, +10.0] | 54.0 (+1.6) |  | 50.0 |"
    alone = report.ap_table(results.beside(tmp_path / "not there.json"), entries)[0]
    assert "larger run" not in alone and alone.splitlines()[3].endswith("| +10.0 [+10.0, +10.0] |  | 50.0 |")


def test_some_rows_alone_and_what_they_need() -> None:
    from jobs import all_jobs, read_settings
    from run import TABLES, _wanted

    jobs = all_jobs(read_settings() | {"seeds": [4]})
    assert _wanted(list(TABLES), jobs, None) == list(jobs)
    assert _wanted(["each_alone"], jobs, None) == ["cascade-s4", "none-s4", "iou-s4", "statistics-s4"]
    assert _wanted(["each_alone", "single"], jobs, ["none", "single6"]) == ["cascade-s4", "single6-s4", "none-s4"]
    with pytest.raises(SystemExit, match="--rows single9: these tables have cascade, single5, single6, single7"):
        _wanted(["single"], jobs, ["single5", "single9"])


def test_trainings_that_several_tables_share_cost_once(tmp_path: Path) -> None:
    from report import Results, write_costs

    (tmp_path / "raw").mkdir()
    facts = {"look_seconds": 30.0, "device": "cpu", "steps": 4, "evaluated_images": 8}
    for name, seconds in (("a-s0", 90.0), ("a-s1", 150.0), ("b-s0", 270.0)):
        (tmp_path / "raw" / f"{name}.json").write_text(json.dumps(facts | {"train_seconds": seconds}), "utf-8")
    results = Results(tmp_path, [0, 1])
    for table, jobs in (("stages", ["a-s0", "a-s1"]), ("depth", ["a-s0", "a-s1", "b-s0", "b-s1"])):
        (tmp_path / f"{table}.json").write_text(json.dumps({"cost": results.cost(jobs)}), "utf-8")
    text = write_costs(["stages", "depth"], ["a-s0", "a-s1", "b-s0", "b-s1"], results, tmp_path)
    assert text.splitlines()[4:] == [
        "| `stages.py` | 2 | 5 |",
        "| `depth.py` | 3 | 10 |",
        "| `run.py`, each once | 3 | 10 |",
    ]
    assert json.loads((tmp_path / "costs.json").read_text("utf-8"))["markdown"] in text


def test_ranges_over_the_seeds() -> None:
    from regressors import gain, shown
    from report import with_range

    assert with_range(0.1264, (0.125, 0.1271, 0.126), ".3f") == "0.126 (0.125 to 0.127)"
    assert with_range(0.1264, (0.1264,), ".3f") == "0.126"
    assert shown(None, [0.1]) == "–" and shown(0.02, [0.01, None, 0.03]) == "+0.020 (+0.010 to +0.030)"
    curve = {"count": [50.0, 40.0, 3.0], "before": [0.52, 0.58, 0.63], "after": [0.6, 0.7, 0.9]}
    assert gain(curve, 0.55, 30) == pytest.approx(0.1) and gain(curve, 0.65, 30) is None


@pytest.mark.parametrize("words", [["--steps", "0"], ["--steps", "300", "--minutes", "9"], ["--steps", "9", "--quick"]])
def test_a_number_of_steps_that_would_not_be_taken_is_refused(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, RUN, "--work", tmp_path, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "--steps" in done.stderr and not list(tmp_path.iterdir())


def test_the_page_shows_the_numbers_of_the_results() -> None:
    page = (locations.REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8").splitlines()
    results = SCRIPTS / "results"
    tables = [*sorted(results.glob("*.json")), results / "steps300" / "stage_moves.json"]
    shown = 0
    for path in tables:
        found = json.loads(path.read_text(encoding="utf-8"))
        lines = found.get("markdown", "").splitlines() if isinstance(found, dict) else []
        shown += len(lines)
        assert not [line for line in lines if line not in page], path
    assert shown > 80


def test_weights_of_efficientnet_lite_for_our_pixels() -> None:
    import timm
    from lite0 import MEAN, STD, TRAINED_MEAN, TRAINED_STD, as_timm, for_our_pixels

    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = {f"other.{number}": value for number, value in enumerate(network.state_dict().values())}
    named = as_timm("tf_efficientnet_lite0", state)
    assert list(named) == list(network.state_dict())
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    ours.load_state_dict(for_our_pixels(named))
    grey = torch.rand(1, 3, 64, 64) * 255
    mean, std = (torch.tensor(one)[:, None, None] for one in (MEAN, STD))
    with torch.no_grad():
        theirs = network.bn1(network.conv_stem((grey - TRAINED_MEAN) / TRAINED_STD))
        found = ours.bn1(ours.conv_stem((grey - mean) / std))
    assert torch.allclose(found[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-4)


def start(work: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(RUN), "--quick", "--work", str(work), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(locations.REPOSITORY)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def test_a_worker_ends_when_its_run_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run_and_die.py"
    script.write_text(
        "import multiprocessing as mp, os, sys, time\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "def serve(ready):\n"
        "    import work\n"
        "    work._end_with_parent()\n"
        "    ready.put(os.getpid())\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    context = mp.get_context('spawn')\n"
        "    ready = context.Queue()\n"
        "    context.Process(target=serve, args=(ready,)).start()\n"
        "    open(sys.argv[1], 'w').write(str(ready.get(timeout=120)))\n"
        "    os.kill(os.getpid(), 9)\n",
        encoding="utf-8",
    )
    told = tmp_path / "worker.txt"  # a pipe would stay open as long as the worker
    subprocess.run([sys.executable, str(script), str(told)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    worker, end = int(told.read_text()), time.monotonic() + 30
    while alive(worker) and time.monotonic() < end:
        time.sleep(0.1)
    there = alive(worker)
    if there:
        os.kill(worker, signal.SIGKILL)
    assert not there


def alive(process: int) -> bool:
    """Whether it runs (a process whose parent has not looked after it yet does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_rows_in_miniature(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    begun = time.monotonic()
    process = start(tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert time.monotonic() - begun < 600
    import run

    results = tmp_path / "quick" / "results"
    for name in run.TABLES:
        table = json.loads((results / f"{name}.json").read_text())
        assert table["rows"] and table["markdown"].count("\n") > 1 and table["cost"]["jobs"] > 0, name
        assert (tmp_path / "quick" / "pictures" / f"{name}.png").stat().st_size > 5000
    again = start(tmp_path, "--tables", "stages")
    output, _ = again.communicate()
    assert again.returncode == 0 and "2 of 2 jobs are done" in output, output[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "--only-train", "--tables", "heads", "each_alone")
    state = tmp_path / "quick" / "trained" / "none-s0" / "state" / "training.safetensors"
    end = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path.name: path.stat().st_mtime for path in (tmp_path / "quick" / "raw").glob("*.json")}
    assert "cascade-s0.json" in done and "none-s0.json" not in done
    process = start(tmp_path, "--only-train", "--tables", "heads", "each_alone")
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert f"{len(done)} of 4 jobs are done" in output
    raw = tmp_path / "quick" / "raw"
    assert all((raw / name).stat().st_mtime == when for name, when in done.items())
    assert (raw / "none-s0.json").is_file()
