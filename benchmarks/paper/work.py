"""Doing the jobs: train, look at the trained network, write both down; in one process or in several at once.

``WORK/trained/JOB`` is the product's run folder, ``WORK/raw/JOB.npz`` the detections and ``WORK/raw/JOB.json`` the
statistics, written last: a job whose json is there is done, and one that was interrupted goes on where it was saved.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing as mp
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from jobs import Job, all_jobs, evaluated, job_config, train_split

EVERYTHING = ("cascade", "single5", "single6", "single7", "stages4")  # rows that some table looks into


@dataclass(frozen=True)
class Place:
    """Where and with what the jobs are done."""

    work: Path
    weights: Path
    device: str = "cpu"
    loaders: int = 0  # processes that read images, for each training
    scorers: int = 0  # processes that score what is done, beside the trainings of a team
    keep: bool = True  # the optimizer's state of finished trainings (half the disk space)


def do_job(job: Job, settings: dict[str, Any], place: Place) -> dict[str, Any]:
    """Train a job's network and look at it; returns what is written to its json."""
    import torch
    from explore import look_at_split, look_at_training, save_ways
    from product import LAST, coco_truth, load_network, open_split, train_network

    root = place.work / "data" / job.data
    images = len(open_split(root, train_split(job, settings)))
    config = job_config(job, settings, work=place.work, weights=place.weights, images=images, loaders=place.loaders)
    run = place.work / "trained" / job.name
    started = time.perf_counter()
    train_network(config, run, device=place.device, integral=job.integral)
    trained = time.perf_counter()
    model, config, names = load_network(run / LAST, device=place.device, integral=job.integral)
    split = open_split(root, config.data.val)
    other = None
    if job.needs and job.row.startswith("single"):
        other = load_network(place.work / "trained" / job.needs[0] / LAST, device=place.device)[0]
    whole = evaluated(config, settings["data"][job.data])
    look = look_at_split(model, whole, names, split, everything=job.row in EVERYTHING, other=other, device=place.device)
    raw = place.work / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    save_ways(look.ways, raw / f"{job.name}.npz", {record.image_id: row for row, record in enumerate(split.records)})
    if config.model.masks != "none":
        results = [one for found in look.ways["final"] for one in found.to_coco()]
        with gzip.open(raw / f"{job.name}.masks.json.gz", "wt") as file:
            json.dump(
                [{key: one[key] for key in ("image_id", "category_id", "score", "segmentation")} for one in results],
                file,
            )
    facts: dict[str, Any] = {
        "job": job.name,
        "row": job.row,
        "seed": job.seed,
        "steps": settings["steps"],
        "images": images,
        "images_per_step": config.train.batch_size,
        "evaluated_images": len(split),
        "objects": len(coco_truth(split)["annotations"]),
        "data": job.data,
        "val": config.data.val,
        "network": f"{config.model.backbone}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        "regressions": {name: one.summary() for name, one in look.regressions.items()},
    }
    if job.row in EVERYTHING:
        facts["training"] = look_at_training(model, config, open_split(root, config.data.train), device=place.device)
    facts |= _times(run, trained - started, time.perf_counter() - trained, torch.device(place.device))
    _write_json(raw / f"{job.name}.json", facts)
    if not place.keep:
        (run / "state" / "training.safetensors").unlink(missing_ok=True)
    return facts


def _times(run: Path, train_seconds: float, look_seconds: float, device: Any) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {
        "train_seconds": round(train_seconds, 2),
        "look_seconds": round(look_seconds, 2),
        "device": name,
        "images_per_second": speed_of(run),
        "torch": torch.__version__,
    }


def speed_of(run: Path) -> float:
    """Images per second of a training after its first lines: the median of what it logged."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    speeds = sorted(line["images_per_second"] for line in lines[len(lines) // 3 :])
    return float(speeds[len(speeds) // 2])


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def is_done(name: str, place: Place) -> bool:
    return (place.work / "raw" / f"{name}.json").is_file()


def do_all(
    names: list[str],
    settings: dict[str, Any],
    place: Place,
    *,
    team: Team | None = None,
    deadline: float = float("inf"),
) -> list[str]:
    """Do the jobs that are not done yet, until ``deadline`` (of ``time.monotonic``); returns those left undone.

    A ``team`` does several at once.
    """
    jobs = all_jobs(settings)
    left = [name for name in names if not is_done(name, place)]
    say(f"{len(names) - len(left)} of {len(names)} jobs are done")
    if team is not None:
        team.work(left, settings, jobs, deadline)
    else:
        for number, name in enumerate(left, start=1):
            if time.monotonic() < deadline:
                say(f"{number}/{len(left)} {name}")
                do_job(jobs[name], settings, place)
    return [name for name in names if not is_done(name, place)]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Team:
    """Worker processes that each do one job after the other; a job starts when those that it needs are done."""

    def __init__(self, place: Place, processes: int) -> None:
        self._place = place
        context = mp.get_context("spawn")
        self._answers: Any = context.Queue()
        self._busy: set[int] = set()  # with a calibration
        self._questions: list[Any] = [context.Queue() for _ in range(processes)]
        self._to_score: Any = context.Queue()
        self._scorers = [context.Process(target=_score, args=(place, self._to_score)) for _ in range(place.scorers)]
        self._processes = [
            context.Process(target=_serve, args=(number, place, question, self._answers))
            for number, question in enumerate(self._questions)
        ]

    def __enter__(self) -> Team:
        (self._place.work / "logs").mkdir(parents=True, exist_ok=True)
        for process in (*self._processes, *self._scorers):
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for question in self._questions:
            question.put(None)
        for _ in self._scorers:
            self._to_score.put(None)
        end = time.monotonic() + 5
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.terminate()  # a training saves what it has
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        for process in self._scorers:
            process.join(20)
            if process.is_alive():
                process.kill()  # what is left is scored when the tables are made

    def calibrate(self, job: Job, settings: dict[str, Any], deadline: float) -> float | None:
        """Seconds per step while every worker trains at once; None where none is through before the deadline."""
        for number, question in enumerate(self._questions):
            question.put((replace(job, row=f"calibration{number}"), settings))
            self._busy.add(number)
        answers = [self._answer(deadline) for _ in self._questions]
        for worker in {answer[0] for answer in answers if answer is not None}:
            self._busy.discard(worker)
        seconds = [answer[2] for answer in answers if answer is not None and answer[1]]
        for answer in answers:
            if answer is not None and not answer[1]:
                raise SystemExit(f"the trial failed: {answer[2]}; see {self._place.work / 'logs'}")
        say(f"seconds per step of {len(seconds)} workers: {sorted(round(one, 3) for one in seconds)}")
        return float(sum(seconds) / len(seconds)) if seconds else None

    def work(self, names: list[str], settings: dict[str, Any], jobs: dict[str, Job], deadline: float) -> None:
        """Hand out the jobs in their order until all are done or the deadline is over."""
        waiting, running, failed = list(names), {}, set()
        idle = [n for n, process in enumerate(self._processes) if process.is_alive() and n not in self._busy]
        done = {name for name in jobs if is_done(name, self._place)}
        while (waiting or running) and time.monotonic() < deadline:
            for name in list(waiting):
                ready = all(need in done for need in jobs[name].needs)
                if ready and idle:
                    waiting.remove(name)
                    running[worker := idle.pop(0)] = name
                    self._questions[worker].put((jobs[name], settings))
            if not running and not self._busy:
                break  # what is left waits for something that failed
            answer = self._answer(min(deadline, time.monotonic() + 2))
            if answer is None:
                self._busy = {one for one in self._busy if self._processes[one].is_alive()}
                for worker in [one for one in running if not self._processes[one].is_alive()]:
                    say(f"{running[worker]}: its process ended; see logs")
                    failed.add(running.pop(worker))
                continue
            worker, fine, what = answer
            self._busy.discard(worker)
            name = running.pop(worker, "calibration")  # a worker that was late with it
            idle.append(worker)
            if fine and name != "calibration":
                done.add(name)
                self._to_score.put((name, settings["bootstrap"]))
                say(f"{len(done)} done, {len(waiting)} waiting: {name} {what}")
            elif not fine:
                failed.add(name)
                say(f"{name} FAILED: {what}")

    def _answer(self, deadline: float) -> Any:
        with contextlib.suppress(queue.Empty):
            return self._answers.get(timeout=max(0.01, min(deadline - time.monotonic(), 3600)))
        return None


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: a second start must not find its jobs still running.

    A training that is under way saves what it has.
    """
    parent = mp.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _serve(number: int, place: Place, questions: Any, answers: Any) -> None:
    """A worker: answers (its number, whether it went well, what happened)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells us
    _end_with_parent()
    log = open(place.work / "logs" / f"worker{number}.txt", "a", buffering=1)  # noqa: SIM115, PTH123
    sys.stdout = sys.stderr = log
    import torch

    torch.set_num_threads(1 if place.device != "cpu" else max(1, (os.cpu_count() or 1) // 2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    while (question := questions.get()) is not None:
        job, own = question
        try:
            if job.row.startswith("calibration"):
                answers.put((number, True, _calibration(job, own, place)))
                continue
            facts = do_job(job, own, place)
            answers.put(
                (
                    number,
                    True,
                    f"{facts['train_seconds']:.1f} + {facts['look_seconds']:.1f} s, "
                    f"{facts['images_per_second']:.0f} images/s",
                )
            )
        except Exception as error:
            traceback.print_exc()
            answers.put((number, False, f"{type(error).__name__}: {str(error)[:300]}"))


def _score(place: Place, names: Any) -> None:
    """Scores what is done beside the trainings, politely."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    if hasattr(os, "nice"):
        os.nice(10)
    from scores import score_job

    while (one := names.get()) is not None:
        try:
            score_job(place.work, *one)
        except Exception as error:
            say(f"{one[0]} could not be scored: {type(error).__name__}: {error}")


def _calibration(job: Job, settings: dict[str, Any], place: Place) -> float:
    from product import open_split, train_network

    images = len(open_split(place.work / "data" / job.data, train_split(job, settings)))
    config = job_config(job, settings, work=place.work, weights=place.weights, images=images, loaders=place.loaders)
    run = place.work / "trained" / job.name
    train_network(config, run, device=place.device)
    speed = speed_of(run)
    shutil.rmtree(run)
    return float(config.train.batch_size / speed)
