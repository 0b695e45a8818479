"""The paper, re-enacted on photographs: all trainings, all tables, all pictures.

    python3 benchmarks/paper/run.py --data nuclei=DIR --data bccd=DIR --weights DIR
    python3 benchmarks/paper/run.py --quick                  # all rows in miniature, on generated shapes
    python3 benchmarks/paper/run.py --larger --device cuda --processes 8 --loaders 1 --data ...   # for a GPU
    python3 benchmarks/paper/stages.py --data nuclei=DIR ... # one table, and only the trainings that it needs
    python3 benchmarks/paper/each_alone.py --steps 300 --rows none iou --data ...   # two rows of it, for longer

Started again, it goes on where it was: finished trainings stay, one that was killed goes on from its last save.
--processes 2 is faster on two cores than one training with two threads. --larger takes that section of config.yaml;
--steps N trains in WORK/stepsN, and its tables go to results/stepsN;
--minutes M measures the machine first and takes as many steps for every training as all of them can be given in that
time. Numbers go to benchmarks/paper/results, pictures to
docs/images/paper, trained networks and detections to runs/paper. docs/paper.md tells what was seen.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import report
from jobs import all_jobs, read_settings
from prepare import prepare
from scores import score_all
from work import Place, Team, do_all, say

TABLES = (
    "single",
    "rivals",
    "stages",
    "heads",
    "each_alone",
    "depth",
    "hypotheses",
    "regressors",
    "deltas",
    "masks",
    "backbones",
    "small_data",
)
HERE = Path(__file__).resolve().parent
# For --minutes: steps in a trial, the share of the time that it may take, what a job takes beside its steps, and the
# share of what is left that is planned (trainings end at different times, and the last leave processes idle).
STEPS_TRIED, SHARE_FOR_TRIAL, SECONDS_FOR_LOOKING, SHARE_FOR_TRAINING = 40, 0.25, 6.0, 0.85


def main(tables: list[str] | None = None) -> int:
    """All tables, or those named."""
    parser = report.arguments(__doc__ if tables is None else None)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=tables or list(TABLES))
    parser.add_argument("--minutes", type=float, help="choose the number of steps so that all is done in this time")
    parser.add_argument("--rows", nargs="+", help="only these rows of config.yaml, and what they need")
    parser.add_argument("--only-train", action="store_true", help="no scores and tables yet")
    parser.add_argument("--only-report", action="store_true", help="tables of what is there, no training")
    parser.add_argument("--keep-states", action="store_true", help="keep the optimizers' states of finished trainings")
    given = parser.parse_args()
    if given.steps and given.minutes:
        parser.error("--minutes chooses the number of steps: leave out --steps, or --minutes")
    given.kind = "quick" if given.quick else "larger" if given.larger else f"steps{given.steps}" if given.steps else ""
    started = time.monotonic()

    settings = read_settings(quick=given.quick, larger=given.larger)
    settings |= {key: value for key in ("seeds", "steps") if (value := getattr(given, key))}
    work = given.work / given.kind if given.kind else given.work
    work.mkdir(parents=True, exist_ok=True)
    weights = given.weights.resolve()
    place = Place(work.resolve(), weights, given.device, given.loaders, given.scorers, given.keep_states)
    names = _wanted(given.tables, all_jobs(settings), given.rows)
    sources = {name: Path(folder) for name, _, folder in (one.partition("=") for one in given.data)}
    left: list[str] = []
    if not given.only_report:
        _keep_settings(settings, work)
        say("preparing the data")
        prepare(settings, sources, place.work, processes=os.cpu_count() or 1)
        deadline = started + given.minutes * 60 if given.minutes else float("inf")
        left = _train(settings, place, names, processes=given.processes, deadline=deadline)
        say(f"trained: {len(names) - len(left)} of {len(names)} in {(time.monotonic() - started) / 60:.1f} minutes")
    if not given.only_train:
        _report(given, settings, place.work, names)
    if left:
        say(f"not done: {', '.join(left)}; start again to go on")
    return 1 if left else 0


def _keep_settings(settings: dict[str, Any], work: Path) -> None:
    """Refuse to go on in a folder whose trainings were begun with other settings: its numbers would be a mixture."""
    path, ours = work / "settings.json", {key: settings[key] for key in ("data", "network", "training")}
    if path.is_file() and (theirs := json.loads(path.read_text(encoding="utf-8"))) != ours:
        changed = ", ".join(key for key in ours if theirs.get(key) != ours[key])
        raise SystemExit(f"{path}: begun with other settings ({changed}) than config.yaml has; give another --work")
    path.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")


def _wanted(tables: list[str], jobs: dict[str, Any], rows: list[str] | None) -> list[str]:
    """The jobs that some tables need (of these, those of ``rows``), and those that these need."""
    wanted = {row for name in tables for row in _rows(name, jobs)}
    if rows and (unknown := set(rows) - wanted):
        raise SystemExit(f"--rows {' '.join(sorted(unknown))}: these tables have {', '.join(sorted(wanted))}")
    names = {name for name, job in jobs.items() if job.row in (rows or wanted)}
    names |= {need for name in names for need in jobs[name].needs}
    return [name for name in jobs if name in names]


def _rows(table: str, jobs: dict[str, Any]) -> list[str]:
    """The rows of a table; those of small data are in the settings, its sizes."""
    if table == "small_data":
        return list(dict.fromkeys(job.row for job in jobs.values() if job.row.startswith("small")))
    return list(importlib.import_module(table).ROWS)


def _train(settings: dict[str, Any], place: Place, names: list[str], *, processes: int, deadline: float) -> list[str]:
    """Choose the number of steps, unless the run that goes on has one, and do the jobs; returns those left undone."""
    team = Team(place, processes) if processes > 1 else None
    plan = place.work / "plan.json"
    with team or nullcontext():
        if plan.is_file():
            settings["steps"] = json.loads(plan.read_text(encoding="utf-8"))["steps"]
        elif team is not None and deadline < float("inf"):
            settings["steps"] = _affordable_steps(team, settings, len(names), processes, deadline)
        plan.write_text(json.dumps({"steps": settings["steps"]}), encoding="utf-8")
        say(f"{settings['steps']} steps for each of {len(names)} trainings")
        return do_all(names, settings, place, team=team, deadline=deadline)


def _affordable_steps(team: Team, settings: dict[str, Any], count: int, processes: int, deadline: float) -> int:
    """Steps for each of ``count`` trainings, measured with all processes at work on the largest network."""
    now = time.monotonic()
    first = next(iter(all_jobs(settings).values()))
    seconds = team.calibrate(first, settings | {"steps": STEPS_TRIED}, now + (deadline - now) * SHARE_FOR_TRIAL)
    if seconds is None:
        return int(settings["steps"])
    left = (deadline - time.monotonic() - count / processes * SECONDS_FOR_LOOKING) * SHARE_FOR_TRAINING
    return min(settings["most_steps"], max(50, int(left * processes / seconds / count) // 25 * 25))


def _report(given: Any, settings: dict[str, Any], work: Path, names: list[str]) -> None:
    import report

    say("scoring")
    score_all(work, names, settings["bootstrap"], processes=os.cpu_count() or 1)
    results = report.Results(work, settings["seeds"])
    out = work / "results" if given.quick else HERE / "results" / given.kind
    pictures = work / "pictures" if given.kind else report.ROOT / "docs" / "images" / "paper"
    out, pictures = given.results or out, given.pictures or pictures
    jobs = all_jobs(settings)
    texts, made = [], []
    for name in given.tables:
        rows = _rows(name, jobs)
        if sum(bool(results.facts(row)) for row in rows) < min(2, len(rows)):
            say(f"{name}: its trainings are not there yet")
            continue
        needed = _wanted([name], jobs, None)
        texts.append(report.write(name, importlib.import_module(name).table, needed, results, out, pictures))
        made.append(name)
        say(f"{name}: {out / f'{name}.json'}")
    if made == list(TABLES):
        texts.append(report.write_costs(made, list(jobs), results, out))
    text = "\n".join(texts)
    (work / "tables.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main())
