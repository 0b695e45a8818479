"""The command ``serve``: a checkpoint as an HTTP service with a page."""

from __future__ import annotations

import os
from pathlib import Path

from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detector import load
from cascade_rcnn.inference.run_model import AS_SAVED, Inference
from cascade_rcnn.serve.settings import API_KEY, ServeSettings


def run_serve(
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    inference: Inference = AS_SAVED,
    settings: ServeSettings | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are being answered are finished first.

    Raises UserError: the packages of the extra are missing, or the port is taken.
    """
    try:
        import uvicorn

        from cascade_rcnn.serve.app import create_app
        from cascade_rcnn.serve.protocol import Protocol
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing: pip install 'cascade-rcnn[serve]'") from error
    detector = load(
        checkpoint,
        device=device,
        precision=inference.precision,
        compile=inference.compile,
        stop_after_stage=inference.stages,
        score_threshold=inference.score_threshold,
        max_detections=inference.max_detections,
    )
    print(detector.choices())
    settings = settings or ServeSettings(api_key=os.environ.get(API_KEY, ""))
    app = create_app(detector, settings)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/  (the page; POST /predict, GET /model /health /ready /metrics)", flush=True)
    if settings.label_studio:
        print(f"Label Studio: add the model http://{shown}:{port}/label-studio in the project's settings", flush=True)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_level="warning",
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit as error:  # uvicorn ends so when the port is taken
        raise UserError(f"{host} port {port} cannot be used; name another with --port") from error
    if not server.started:
        raise UserError(f"{host} port {port} cannot be used; name another with --port")
