"""The memory that a training may plan with: the machine's, or a container's smaller one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_rcnn.training.machine_memory import machine_memory


def _control_group(root: Path, line: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    for place, limit in limits.items():
        file = root / "sys/fs/cgroup" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit)
    return root


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_a_machine_without_limits_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = machine_memory(tmp_path)
    assert memory is not None and 0.5 < memory < 10_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine_memory(tmp_path) == pytest.approx(memory / 2)


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("0::/\n", {"memory.max": "400000000\n"}),
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": "400000000\n"}),
        (
            "3:cpu:/a\n5:memory:/docker/1f\n",
            {
                "memory/docker/1f/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.limit_in_bytes": "400000000",
            },
        ),
    ],
)
def test_the_least_limit_of_the_control_groups_counts(tmp_path: Path, line: str, limits: dict[str, str]) -> None:
    assert machine_memory(_control_group(tmp_path, line, limits)) == pytest.approx(0.4)


@pytest.mark.parametrize("line", ["", "nonsense", "0::/\n"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, line: str) -> None:
    assert machine_memory(_control_group(tmp_path, line, {"memory.max": "max\n"})) == machine_memory(tmp_path / "none")


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_rcnn.training.machine_memory._physical", lambda: None)
    assert machine_memory(tmp_path) is None
