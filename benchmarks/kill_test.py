"""Kill a training again and again, and see what is lost.

    python3 benchmarks/kill_test.py [--kills 30] [--terms 20] [--seed 0]

A small training (12 images, half a million parameters, CPU) that saves every second step is ended with SIGKILL at
random moments and resumed each time; then another with SIGTERM. After each end the newest state and checkpoint must
load, be at most one save behind the last logged step, and no process may be left. At the end both runs must be bit for
bit what an uninterrupted run gives. Exit code 1 if anything is not so.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]  # the checkout, and the small training of its tests

import torch  # noqa: E402

from cascade_rcnn.checkpoint import LAST, STATE, load_checkpoint, load_training  # noqa: E402
from cascade_rcnn.config import Config  # noqa: E402
from cascade_rcnn.train import train  # noqa: E402
from small_training import children_of, is_running, run_alone, small_config, start_process  # noqa: E402

SAVE_EVERY = 2


@dataclass
class End:
    """What was found after a process had ended."""

    code: int | None
    seconds: float  # from the signal to the end of the process
    logged: int
    saved: int
    weights: int  # step of last.safetensors
    left: int  # processes that still ran six seconds later (workers notice a dead parent within five)

    def problems(self, before: int, *, killed: bool) -> list[str]:
        wrong = []
        if self.saved < before:
            wrong.append(f"went back from step {before} to {self.saved}")
        if self.logged - self.saved > SAVE_EVERY:
            wrong.append(f"more than one save behind: logged {self.logged}, saved {self.saved}")
        if self.saved - self.weights > SAVE_EVERY:
            wrong.append(f"last.safetensors more than one save behind: {self.weights}")
        if self.left:
            wrong.append(f"{self.left} processes left")
        if not killed and (self.code != 143 or self.seconds > 10 or self.saved != self.logged):
            wrong.append(f"exit code {self.code} after {self.seconds:.1f} s, logged {self.logged}, saved {self.saved}")
        return wrong


def _train(config: Config, out: Path) -> None:
    train(config, out=out, resume=True)


def _log_to(path: Path) -> Callable[..., None]:
    def quiet(config: Config, out: Path) -> None:
        with path.open("a") as file:
            sys.stdout = file
            _train(config, out)

    return quiet


def _logged(out: Path) -> int:
    if not (out / "log.jsonl").exists():
        return 0
    lines = [line for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def end_once(config: Config, out: Path, number: signal.Signals, delay: float) -> End | None:
    """Run for ``delay`` seconds, send the signal, look at what is there; None when the run was done before."""
    process, connection = start_process(_log_to(out.with_suffix(".txt")), config, out)
    process.join(timeout=delay)
    if not process.is_alive():
        return None
    assert process.pid is not None
    children = children_of(process.pid)
    began = time.monotonic()
    process.kill() if number == signal.SIGKILL else process.terminate()
    process.join()
    seconds = time.monotonic() - began
    connection.close()
    while time.monotonic() - began < 6 and any(map(is_running, children)):
        time.sleep(0.05)
    saved = int(load_training(out)[1]["progress"]["step"]) if (out / STATE).exists() else 0
    weights = int(load_checkpoint(out / LAST).metadata["step"]) if (out / LAST).exists() else 0
    return End(process.exitcode, seconds, _logged(out), saved, weights, sum(map(is_running, children)))


def campaign(config: Config, out: Path, number: signal.Signals, times: int, moments: random.Random) -> list[str]:
    """End and resume a training ``times`` times; prints a row each, returns what was wrong."""
    print(f"\n{number.name} at {times} random moments\n{'':>3} after s   exit  took s  logged  saved  weights  left")
    wrong, ended, before = [], 0, 0
    while ended < times:
        delay = moments.uniform(0.3, 4.0)
        end = end_once(config, out, number, delay)
        if end is None:
            print("the training was over: once more from the start")
            shutil.rmtree(out)
            before = 0
            continue
        ended += 1
        print(
            f"{ended:>3} {delay:7.2f} {end.code!s:>6} {end.seconds:7.2f} {end.logged:7} {end.saved:6} "
            f"{end.weights:8} {end.left:5}",
            flush=True,
        )
        wrong += [f"{number.name} {ended}: {text}" for text in end.problems(before, killed=number == signal.SIGKILL)]
        before = end.saved
    run_alone(_log_to(out.with_suffix(".txt")), config, out, seconds=3600)
    return wrong


def differences(a: Path, b: Path) -> list[str]:
    """Names of the tensors of two finished runs that are not the same bits."""
    first, second = load_training(a)[0], load_training(b)[0]
    return [
        name
        for name in {*first, *second}
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=24, help="length of the training, six steps each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    torch.set_num_threads(1)
    config = small_config(
        epochs=args.epochs,
        milestones=(args.epochs // 2,),
        save_every=SAVE_EVERY,
        log_every=1,
        evaluate_every=4,
        ema=0.99,
        data={"workers": 1},
    )
    folder = Path(tempfile.mkdtemp(prefix="kill_test_"))
    wrong = []
    try:
        for name, number, times in (("killed", signal.SIGKILL, args.kills), ("told", signal.SIGTERM, args.terms)):
            wrong += campaign(config, folder / name, number, times, moments)
        run_alone(_log_to(folder / "whole.txt"), config, folder / "whole", seconds=3600)
        for name in ("killed", "told"):
            differ = differences(folder / name, folder / "whole")
            print(
                f"{name} and resumed against uninterrupted: "
                f"{'the same bits' if not differ else f'{len(differ)} tensors differ, e.g. {differ[0]}'}"
            )
            wrong += [f"{name}: {len(differ)} tensors differ"] if differ else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["", *wrong, f"{len(wrong)} problems"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
