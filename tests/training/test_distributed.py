"""Several processes: what they say to each other, and that they train and evaluate as one process does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import locations
from cascade_rcnn import distributed
from cascade_rcnn.checkpoint import load_training
from cascade_rcnn.config import Config
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.evaluation.evaluate_model import detect_split, evaluate_results
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.matching import normalizer
from cascade_rcnn.train import train
from cascade_rcnn.training.interrupts import Watchdog
from cascade_rcnn.training.run import Run
from small_training import free_port, rank_environment, run_alone, run_ranks, small_config, small_data


def test_alone_everything_is_itself() -> None:
    with distributed.start("cpu") as world:
        assert (world.rank, world.size, world.is_main, world.device) == (0, 1, True, torch.device("cpu"))
    assert distributed.rank() == 0 and distributed.world_size() == 1
    assert distributed.gather("a") == ["a"]
    assert distributed.broadcast("a") == "a"
    assert distributed.mean_over_ranks(torch.tensor([3.0])).tolist() == [3.0]
    vote = distributed.Vote(torch.device("cpu"))
    assert [vote.cast(False), vote.cast(True)] == [False, True]
    distributed.barrier()
    model = nn.Linear(1, 1)
    assert distributed.wrap(model, world) is model


def _talk() -> dict[str, Any]:
    with distributed.start("cpu") as world:
        me = world.rank
        at_once, later = distributed.Vote(torch.device("cpu")), distributed.Vote(torch.device("cuda"))
        answers = {
            "size": (distributed.rank(), distributed.world_size(), world.is_main),
            "gather": distributed.gather("x" * me),
            "broadcast": distributed.broadcast(f"from {me}"),
            "mean": distributed.mean_over_ranks(torch.tensor([me, 10.0 * me])).tolist(),
            "at once": [at_once.cast(me == 1 and step == 2) for step in range(4)],
            "later": [later.cast(me == 1 and step == 2) for step in range(4)],
        }
        distributed.barrier()
        try:
            distributed.with_synchronised_norm(nn.BatchNorm2d(2), world)
        except ConfigError as error:
            answers["sync"] = str(error)
        return answers


def test_two_processes_talk() -> None:
    first, second = run_ranks(2, _talk)
    assert first["size"] == (0, 2, True) and second["size"] == (1, 2, False)
    assert first["gather"] == ["", "x"] and second["gather"] == []
    assert first["broadcast"] == second["broadcast"] == "from 0"
    assert first["mean"] == second["mean"] == [0.5, 5.0]
    assert first["at once"] == second["at once"] == [False, False, True, False]
    assert first["later"] == second["later"] == [False, False, False, True]
    assert "needs GPUs" in first["sync"]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(UserError, match=r"process 8 .* finds only 4 GPUs: start at most 4"), distributed.start():
        pass


@pytest.mark.parametrize("name", ["auto", "cuda", None])
def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.choose_device(name) == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.choose_device(name) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert distributed.choose_device(name, share_gpus=True) == torch.device("cuda", 1)
    assert distributed.choose_device("cpu") == torch.device("cpu")


def _without_objects(folder: Path, *, every: int) -> Path:
    """The small data set, with every second, third, ... training image stripped of its objects."""
    shutil.copytree(small_data(), folder)
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    empty = {image["id"] for image in content["images"][::every]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] not in empty]
    path.write_text(json.dumps(content))
    return folder


def _everything_sampled(data: Path, **train_settings: Any) -> Config:
    """Samples so many that all are taken: which ones chance would choose differs between processes."""
    return small_config(
        model={"masks": "every", "rpn_samples": 8192, "roi_samples": 8192},
        data={"root": str(data)},
        warmup_steps=0,
        lr=0.005,
        **train_settings,
    )


def test_two_processes_give_the_gradients_and_weights_of_one(tmp_path: Path) -> None:
    """Every third image is empty, so that often one process has no object at all; no parameter is left out."""
    data = _without_objects(tmp_path / "data", every=3)
    run_alone(_train, _everything_sampled(data, batch_size=2, max_steps=4), tmp_path / "one")
    run_ranks(2, _train, _everything_sampled(data, batch_size=1, max_steps=4), tmp_path / "two")
    (first, about_first), (second, about_second) = load_training(tmp_path / "one"), load_training(tmp_path / "two")
    assert about_first["progress"] == about_second["progress"]
    assert sum(bool(value.any()) for name, value in first.items() if name.endswith("/momentum_buffer")) > 60
    learnt = [name for name, _ in build_model(_everything_sampled(data).model, 5).named_parameters()]
    for name in learnt:
        gradients = f"optimizer.{name}/momentum_buffer"
        torch.testing.assert_close(second[gradients], first[gradients], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(second[f"model.{name}"], first[f"model.{name}"], rtol=1e-3, atol=1e-6)


_BACKWARD = """
import sys, warnings
import torch
from torch import nn
from cascade_rcnn import distributed

torch.set_num_threads(2)  # one thread multiplies matrices instead of convolving
with distributed.start("cpu") as world, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    network = nn.Sequential(nn.Conv2d(4, 256, 1), nn.Conv2d(256, 8, 3), nn.Conv2d(8, 2, 1))
    wrapped = distributed.wrap(network, world)
    wrapped(torch.rand(2, 4, 26, 25).contiguous(memory_format=torch.channels_last)).sum().backward()
print([str(warning.message)[:40] for warning in caught])
"""


def test_gradients_lie_as_the_buckets_that_add_them_up() -> None:
    """Otherwise PyTorch warns. Fresh processes: forked ones cannot use several threads."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _BACKWARD],
            env={**os.environ, **rank_environment(rank, 2, port)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["[]", "[]"]
    finally:
        for rank in ranks:
            rank.kill()


def _divisor() -> float:
    with distributed.start("cpu") as world:
        return normalizer(torch.tensor(1.0 if world.is_main else 0.0)).item()


def test_one_object_among_all_processes_counts_as_in_one_process() -> None:
    assert run_alone(_divisor) == 1.0
    assert run_ranks(2, _divisor) == [0.5, 0.5]  # gradients are then halved by the mean over two processes


def _train(config: Config, out: Path, resume: bool = False) -> str:
    return str(train(config, out=out, resume=resume))


def test_all_ranks_without_objects(tmp_path: Path) -> None:
    data = _without_objects(tmp_path / "data", every=1)
    run_ranks(2, _train, small_config(data={"root": str(data)}, epochs=1), tmp_path / "run")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    assert all(last[name] == 0 for name in ("rpn_box", "s0.box", "s1.box", "s2.box"))


def test_a_last_batch_that_does_not_fill_all_ranks(tmp_path: Path) -> None:
    """Twelve images for two ranks with batches of five: the second step is filled up, both ranks take it."""
    run_ranks(2, _train, small_config(batch_size=5, epochs=2), tmp_path)
    assert load_training(tmp_path)[1]["progress"]["step"] == 4


def _detect(config: Config) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    with distributed.start("cpu"):
        torch.manual_seed(0)
        model = build_model(config.model, 5)
        split = open_split(config.data.root, "val")
        results, split = detect_split(model, config, split, progress=False)
        return results, evaluate_results(results, config, split) if distributed.rank() == 0 else {}


def test_sharded_evaluation_merges_exactly() -> None:
    """Four images on three ranks: every image once, the same detections, the same metrics."""
    config = small_config(model={"score_threshold": 0.0, "masks": "last"})
    results, metrics = run_alone(_detect, config)
    parts = run_ranks(3, _detect, config)
    assert [len(part) > 0 for part, _ in parts] == [True, False, False]
    key = lambda one: (one["image_id"], -one["score"], one["bbox"])  # noqa: E731
    assert len(results) == 40 and sorted(parts[0][0], key=key) == sorted(results, key=key)
    assert parts[0][1] == metrics


def _die_once(config: Config, out: Path) -> str:
    """A rank that is killed in step 4 of the group's first life; torchrun starts the group again."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        true_advance = Run.advance

        def advance(run: Run, passes: int) -> None:
            if run.progress.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            true_advance(run, passes)

        Run.advance = advance  # type: ignore[method-assign]
    torch.set_num_threads(1)
    return str(train(config, out=out))


def _launch(config: Config, out: Path) -> dict[int, str]:
    """What torchrun does, without starting Python anew."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        run_id="restart",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
    results: dict[int, str] = elastic_launch(settings, _die_once)(config, out)
    return results


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(tmp_path: Path) -> None:
    config = small_config(batch_size=1, save_every=1)
    results = run_alone(_launch, config, tmp_path / "killed")
    assert results == {rank: str(tmp_path / "killed" / "last.safetensors") for rank in (0, 1)}
    run_ranks(2, _train, config, tmp_path / "whole")
    killed, whole = load_training(tmp_path / "killed")[0], load_training(tmp_path / "whole")[0]
    assert not [name for name, value in whole.items() if not torch.equal(value, killed[name])]
    log = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert log == [2, 4, 6, 8, 10, 12]


def test_a_stalled_step_is_reported_with_rank_step_and_images(capfd: pytest.CaptureFixture[str]) -> None:
    with Watchdog(0.002, rank=3) as watchdog:
        watchdog.now("step 7, images a.jpg, b.jpg")
        time.sleep(0.4)
    said = capfd.readouterr().err
    assert said.count("stalled: rank") == 1
    assert "rank 3 for 0.0 minutes in step 7, images a.jpg, b.jpg; at test_a_stalled_step" in said
    with Watchdog(0.002) as watchdog:
        watchdog.now("step 8")
        watchdog.pause()
        time.sleep(0.3)
    with Watchdog(0.0) as watchdog:
        watchdog.now("step 9")
    assert "stalled" not in capfd.readouterr().err


def _launched(tmp_path: Path, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script with a python3 that only prints what it is given."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo /data/coco; else echo "$OMP_NUM_THREADS:" "$@"; fi\n')
    fake.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        ["bash", str(TOOLS / script), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "PATH": f"{fake.parent}:{os.environ['PATH']}", **environment},
    )


TOOLS = locations.REPOSITORY / "tools"


def test_dist_train_on_one_machine(tmp_path: Path) -> None:
    done = _launched(tmp_path, "dist_train.sh", "my config.py", "8", "--out", "runs/a b", "--train.epochs", "3")
    assert done.returncode == 0, done.stderr
    threads, _, command = done.stdout.strip().partition(": ")
    assert int(threads) >= 1
    assert command == (
        f"-m torch.distributed.run --nproc-per-node 8 --max-restarts 0 --standalone {TOOLS}/train.py "
        "my config.py --out runs/a b --train.epochs 3"
    )


def test_dist_train_on_several_machines(tmp_path: Path) -> None:
    done = _launched(
        tmp_path,
        "dist_train.sh",
        "c.py",
        "8",
        NNODES="4",
        NODE_RANK="2",
        MASTER_ADDR="node0",
        PORT="1234",
        MAX_RESTARTS="3",
        OMP_NUM_THREADS="5",
    )
    assert done.stdout.startswith(
        "5: -m torch.distributed.run --nproc-per-node 8 --max-restarts 3 --nnodes 4 --node-rank 2 --master-addr node0 "
        f"--master-port 1234 {TOOLS}/train.py c.py"
    )
    done = _launched(tmp_path, "dist_train.sh", "c.py", "8", NNODES="2:4", MASTER_ADDR="node0")
    assert "--nnodes 2:4 --rdzv-backend c10d --rdzv-id cascade-rcnn --rdzv-endpoint node0:29500" in done.stdout
    done = _launched(tmp_path, "dist_train.sh", "c.py", "8", NNODES="2", NODE_RANK="0")
    assert done.returncode != 0 and "name the first machine" in done.stderr


def test_dist_test_finds_the_data_of_the_recipe(tmp_path: Path) -> None:
    done = _launched(tmp_path, "dist_test.sh", "c.py", "best.safetensors", "2", "--out", "m.json")
    assert done.stdout.strip().endswith("tools/test.py best.safetensors --data /data/coco --out m.json")
    done = _launched(tmp_path, "dist_test.sh", "c.py", "best.safetensors", "2", "--data", "mine")
    assert done.stdout.strip().endswith("tools/test.py best.safetensors --data mine")


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh"])
def test_a_script_without_arguments_says_its_usage(tmp_path: Path, script: str) -> None:
    done = _launched(tmp_path, script)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stdout == ""
