"""The service under load: throughput, latency, memory over many requests, overload, slow clients, SIGTERM, SIGKILL.

    cascade-rcnn demo --out runs/demo
    python3 benchmarks/serve_load.py runs/demo --requests 10000

starts ``cascade-rcnn serve`` on a free port of this machine and asks it with pictures of 96 x 96 pixels, client and
service on the same cores. Prints a table for docs/deploy_measured.md. Needs httpx. ``tiny`` as the checkpoint is a
network of random weights that takes little time, so that what is measured is the service.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serve_process import Service

from cascade_rcnn.data.synthetic_shapes import draw_scene


def pictures(count: int = 64) -> list[bytes]:
    """PNG files with the demo's shapes."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        content = io.BytesIO()
        Image.fromarray(draw_scene(rng, size=96, objects=(1, 4))[0]).save(content, "PNG")
        made.append(content.getvalue())
    return made


def tiny(path: Path) -> str:
    """A checkpoint of the smallest network, without masks."""
    import torch

    from cascade_rcnn.checkpoint import save_checkpoint
    from cascade_rcnn.config import Config, DataConfig, ModelConfig
    from cascade_rcnn.models.build import build_model

    torch.manual_seed(0)
    sizes = {"fpn_channels": 32, "head_channels": 64, "test_proposals": 50, "max_detections": 10}
    model = ModelConfig(backbone="test_resnet.r160_in1k", pretrained=False, norm="group", frozen_stages=-1, **sizes)
    config = Config(model=model, data=DataConfig(short_side=(64,), long_side=64, workers=0))
    weights = build_model(model, 3).state_dict()
    save_checkpoint(path, weights, config=config, class_names=("circle", "square", "triangle"))
    return str(path)


async def ask(client: httpx.AsyncClient, content: bytes, query: str = "") -> tuple[str, float]:
    """The status, or what went wrong, and seconds; statuses other than 200 carry Retry-After."""
    began = time.perf_counter()
    try:
        answer = await client.post(f"/predict{query}", content=content)
    except httpx.TransportError as error:
        return type(error).__name__, time.perf_counter() - began
    wait = answer.headers.get("retry-after", "")
    return f"{answer.status_code}{' Retry-After ' + wait if wait else ''}", time.perf_counter() - began


async def _together(
    service: Service, count: int, at_once: int, query: str = ""
) -> tuple[Counter[str], list[float], float]:
    """``count`` requests by ``at_once`` clients: answers, sorted seconds of those answered 200, seconds in all."""
    contents, answers, seconds = pictures(), Counter[str](), []
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(base_url=service.address, limits=limits, timeout=120) as client:
        numbers = iter(range(count))

        async def worker() -> None:
            for number in numbers:
                answer, took = await ask(client, contents[number % len(contents)], query)
                answers[answer] += 1
                if answer == "200":
                    seconds.append(took)

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(at_once)))
        return answers, sorted(seconds), time.perf_counter() - began


def measure(service: Service, name: str, count: int, at_once: int, query: str = "") -> None:
    """Print a row of the table."""
    answers, seconds, whole = asyncio.run(_together(service, count, at_once, query))
    p50, p95, p99 = (seconds[min(len(seconds) - 1, int(len(seconds) * part))] * 1e3 for part in (0.5, 0.95, 0.99))
    told = ", ".join(f"{number:,} x {answer}" for answer, number in answers.most_common(4))
    times = f"{len(seconds) / whole:.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f}"
    print(f"| {name} | {times} | {told} | {service.memory():.0f} |", flush=True)


async def _slow(service: Service, count: int) -> tuple[list[float], Counter[str]]:
    """Others ask while ``count`` clients send a byte of a head or of a body a second; what those get in the end."""
    whole = pictures(1)[0]
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n" % len(whole)
    ends = Counter[str]()

    async def dawdle(first: bytes, rest: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(first)
        answer = asyncio.ensure_future(reader.read(200))
        for at in range(60):
            await asyncio.sleep(1)
            if answer.done():
                break
            writer.write(rest[at : at + 1])
        ends[(await answer)[9:12].decode() or "closed"] += 1
        writer.close()

    slow = [
        dawdle(head, b"X: " + b"a" * 100) if number % 2 else dawdle(head + b"\r\n", whole) for number in range(count)
    ]
    gathered = asyncio.gather(*slow, return_exceptions=True)
    await asyncio.sleep(0.5)
    async with httpx.AsyncClient(base_url=service.address, timeout=60) as client:
        seconds = sorted([(await ask(client, whole))[1] for _ in range(100)])
    await gathered
    return seconds, ends


async def _stopped(service: Service, by: signal.Signals, at_once: int = 16) -> tuple[Counter[str], float]:
    """A signal while ``at_once`` requests are under way: their answers, and seconds until the process has ended."""
    contents = pictures(at_once)
    async with httpx.AsyncClient(
        base_url=service.address, timeout=60, limits=httpx.Limits(max_connections=100)
    ) as client:
        under_way = [asyncio.ensure_future(ask(client, content)) for content in contents]
        await asyncio.sleep(0.3)  # until they have been sent
        seconds = await asyncio.to_thread(service.end, by)
        return Counter([(await one)[0] for one in under_way]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny(Path(folder) / "tiny.safetensors") if args.checkpoint == "tiny" else args.checkpoint
        loaded(checkpoint, args.requests)
        disturbed(checkpoint)


def loaded(checkpoint: str, count: int) -> None:
    """Throughput, latency and memory."""
    some = max(20, count // 50)
    with Service(checkpoint) as service:
        print(f"memory when ready: {service.memory():.0f} MB")
        print("| | requests/s | p50 ms | p95 ms | p99 ms | answers | memory, MB |\n|---|---|---|---|---|---|---|")
        measure(service, "1 client", some, 1)
        measure(service, "16 clients", some, 16)
        quarter = max(1, count // 4)
        for begin in range(0, count, quarter):
            measure(service, f"8 clients, from request {begin:,} on", quarter, 8)
        print(f"memory: {service.memory():.0f} MB, at most {service.peak():.0f} MB", flush=True)
    with Service(checkpoint, "--max-queue", "8") as service:
        measure(service, "100 clients, --max-queue 8", max(200, some), 100)


def disturbed(checkpoint: str) -> None:
    """Slow clients, SIGTERM, SIGKILL."""
    with Service(checkpoint, "--timeout", "15") as service:
        seconds, ends = asyncio.run(_slow(service, 100))
        others = f"p50 {seconds[50] * 1e3:.0f} ms, p99 {seconds[-2] * 1e3:.0f} ms"
        print(f"100 slow clients: others {others}; theirs: {dict(ends)}", flush=True)
        answers, ended = asyncio.run(_stopped(service, signal.SIGTERM))
        print(f"SIGTERM: {dict(answers)}, ended after {ended:.1f} s with {service.process.returncode}", flush=True)
    with Service(checkpoint) as service:
        answers, ended = asyncio.run(_stopped(service, signal.SIGKILL))
        print(f"SIGKILL: {dict(answers)}; ready again {service.start():.1f} s after the new start, on the same port")
        print(f"then: {dict(asyncio.run(_together(service, 8, 2))[0])}")


if __name__ == "__main__":
    main()
