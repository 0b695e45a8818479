"""What can be said of the container's recipe without an engine to build it."""

from __future__ import annotations

import re

import yaml

from locations import REPOSITORY

DEPLOY = REPOSITORY / "deploy"


def test_the_dockerfile_copies_what_exists_and_runs_as_nobody_special() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.split() for line in lines if re.match(r"[A-Z]+ ", line)]
    copied = [name for step in steps if step[0] == "COPY" for name in step[1:-1]]
    assert {"pyproject.toml", "cascade_rcnn", "configs"} <= set(copied)
    assert all((REPOSITORY / name).exists() for name in copied)
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    assert not set(copied) & {name.strip("/") for name in ignored}
    names = [step[0] for step in steps]
    assert ["USER", "service"] in steps and names.index("USER") < names.index("ENTRYPOINT")
    assert "HEALTHCHECK" in names and re.fullmatch(r"python:3\.\d+-slim-\w+", steps[names.index("FROM")][1])
    assert all(
        "==" in line for line in lines if "pip install" in line and " torch" in line and not line.startswith("#")
    )


def test_the_compose_file_names_the_dockerfile_and_listens_on_loopback() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["cascade-rcnn"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > 30  # the time that requests under way have
