"""OpenVINO moves the stack that signals are handled on, and frees it with the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs pip install 'cascade-rcnn[onnx]'")
pytest.importorskip("openvino", reason="needs pip install 'cascade-rcnn[openvino]'")

import locations
from cascade_rcnn.export.network import write_openvino
from cascade_rcnn.runtime import signal_stack
from cascade_rcnn.runtime.network import RuntimeNetwork
from handmade_network import handmade_network


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    made = handmade_network(folder / "model.onnx")
    write_openvino(made, folder / "model.xml", RuntimeNetwork(made).info)
    return folder / "model.xml"


_DROPPED = """
import signal, sys, threading
from pathlib import Path
from cascade_rcnn.runtime.network import RuntimeNetwork
signal.signal(signal.SIGUSR1, lambda *_: print("signal", flush=True))
networks = [RuntimeNetwork(Path(sys.argv[1])) for _ in range(2)]
if sys.argv[2] == "thread":
    thread = threading.Thread(target=networks.clear)
    thread.start()
    thread.join()
else:
    del networks[0]  # the first to come is the first to go
    del networks[0]
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("where", ["thread", "here"])
def test_a_signal_after_the_network_went(network: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _DROPPED, str(network), where],
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(locations.REPOSITORY)},
    )
    assert (done.returncode, done.stdout) == (0, "signal\n"), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="it is moved on Linux alone")
def test_openvino_moves_it_and_we_move_it_back(network: Path) -> None:
    import openvino

    before = bytes(signal_stack.current())  # type: ignore[arg-type]
    with signal_stack.signal_stack_kept():
        compiled = openvino.Core().compile_model(str(network), "CPU")
        assert bytes(signal_stack.current()) != before  # type: ignore[arg-type]  # or the module has become needless
    assert bytes(signal_stack.current()) == before  # type: ignore[arg-type]
    del compiled
    assert bytes(signal_stack.current()) == before  # type: ignore[arg-type]
