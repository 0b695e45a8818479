"""Exported networks that are damaged, renamed, of other programs or other versions, and calls from several threads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs pip install 'cascade-rcnn[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'cascade-rcnn[onnx]'")

from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.export.network import write_openvino
from cascade_rcnn.inference.detector import load as load_with_torch
from cascade_rcnn.runtime.detector import load
from cascade_rcnn.runtime.network import METADATA, RuntimeNetwork, exported_file
from cascade_rcnn.runtime.seal import SEAL, UNSEALED, seal
from handmade_network import handmade_network

Load = Callable[..., Any]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return handmade_network(tmp_path / "model.onnx")


@pytest.fixture
def openvino(network: Path, tmp_path: Path) -> Path:
    """The folder of an IR of the same."""
    pytest.importorskip("openvino")
    folder = tmp_path / "openvino"
    folder.mkdir()
    write_openvino(network, folder / "model.xml", RuntimeNetwork(network).info)
    return folder


def _say(path: Path, text: str) -> None:
    """Let the network's file say ``text`` of itself."""
    import onnx

    content = onnx.load(path)
    onnx.helper.set_model_props(content, {METADATA: text})
    onnx.save(content, path)


def _settings(path: Path) -> dict[str, Any]:
    import onnx

    fields: dict[str, Any] = json.loads(onnx.load(path).metadata_props[0].value)
    return fields


def test_a_newer_version_is_called_so(network: Path) -> None:
    fields = _settings(network)
    _say(network, json.dumps({**fields, "version": 2}))
    with pytest.raises(CheckpointError, match=r"model\.onnx: exported by a newer version \(2\); update cascade-rcnn"):
        load(network)
    fields["config"]["model"]["nms"] = "matrix"
    _say(network, json.dumps(fields))
    with pytest.raises(CheckpointError, match=r'model\.onnx: model\.nms is "matrix".*export the checkpoint again'):
        load(network)


@pytest.mark.parametrize(
    "changes",
    [None, 3, "text", {"batch": "two"}, {"thresholds": {"cat": "high"}}, {"thresholds": [0.5]}, {"size": "a"}],
)
def test_settings_that_are_none_are_refused(network: Path, changes: Any) -> None:
    _say(network, json.dumps({**_settings(network), **changes} if isinstance(changes, dict) else changes))
    with pytest.raises(CheckpointError, match="was not written by 'cascade-rcnn export'"):
        load(network)


def test_a_network_that_another_program_changed_is_refused(network: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "net", *ports)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match="was not written by"):
        load(tmp_path / "a.onnx")
    _say(tmp_path / "a.onnx", json.dumps(_settings(network)))
    with pytest.raises(CheckpointError, match=r"has the inputs x and the outputs y, .*another program changed it"):
        load(tmp_path / "a.onnx")


def test_files_are_renamed_and_moved(network: Path, tmp_path: Path) -> None:
    for folder, name in (("a", "street.onnx"), ("b.onnx", "model.onnx"), ("c d", "straße.ONNX")):
        (tmp_path / folder).mkdir()
        shutil.copy(network, tmp_path / folder / name)
        assert exported_file(tmp_path / folder) == tmp_path / folder / name
        assert load(tmp_path / folder).class_names == load_with_torch(tmp_path / folder).class_names
    (tmp_path / "a" / "other.onnx").touch()
    for either in (load, load_with_torch):
        with pytest.raises(UserError, match=r"a: holds several networks \(other\.onnx, street\.onnx\)"):
            either(tmp_path / "a")
    (tmp_path / "a" / "other.onnx").rename(tmp_path / "a" / "best.safetensors")
    assert exported_file(tmp_path / "a") is None  # a run's folder
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "image.xml").write_text("<annotation/>")
    assert exported_file(tmp_path / "labels") is None


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_a_name_that_is_no_unicode(network: Path, tmp_path: Path) -> None:
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.onnx"))
    try:
        shutil.copy(network, named)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert load(named).class_names == load(network).class_names


def test_weights_of_another_export_are_refused(openvino: Path) -> None:
    weights, whole = openvino / "model.bin", (openvino / "model.bin").read_bytes()
    load(openvino)
    middle = len(whole) // 2  # among the masks
    weights.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])  # as long as the right one
    with pytest.raises(CheckpointError, match=r"model\.bin beside it is damaged or of another export; copy both files"):
        load(openvino)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read with model\.bin .*\(Incorrect weights.*copy both files"):
        load(openvino)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"its weights model\.bin are not beside it"):
        load(openvino)
    (openvino / "model.xml").write_text("<annotation></annotation>")
    with pytest.raises(CheckpointError, match=r"model\.xml: is no network of OpenVINO"):
        load(openvino)


def seal_as_export(path: Path) -> None:
    import onnx

    content = onnx.load(path)
    onnx.helper.set_model_props(content, {METADATA: content.metadata_props[0].value, SEAL: UNSEALED})
    onnx.save(content, path)
    seal(path)


def test_a_damaged_byte_is_found_wherever_it_lies(network: Path) -> None:
    seal_as_export(network)
    whole = network.read_bytes()
    assert load(network).class_names
    weight = whole.index(np.float32(1e-4).tobytes())  # of the constant "small": still a network, and a wrong one
    for place in (weight, whole.index(SEAL.encode()) + len(SEAL) + 3):  # and the checksum itself
        network.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for either in (load, load_with_torch):
            with pytest.raises(
                CheckpointError, match=r"model\.onnx: is damaged, or was changed after its export; copy"
            ):
                either(network)


def test_what_a_program_changed_on_purpose_is_used_without_the_checksum(network: Path) -> None:
    import onnx

    seal_as_export(network)
    content = onnx.load(network)
    content.doc_string = "changed"
    onnx.save(content, network)
    with pytest.raises(CheckpointError, match=f"remove {SEAL} from its metadata"):
        load(network)
    onnx.helper.set_model_props(content, {METADATA: content.metadata_props[0].value})
    onnx.save(content, network)
    assert load(network).class_names


def test_a_damaged_structure_of_openvino_is_found(openvino: Path) -> None:
    xml, whole = openvino / "model.xml", (openvino / "model.xml").read_text()
    assert whole.count(f"<{SEAL} ") >= 1
    xml.write_text(whole.replace('"scores"', '"scorez"'))
    with pytest.raises(CheckpointError, match=r"model\.xml: is damaged, or was changed after its export"):
        load(openvino)


def test_damaged_weights_of_torch_are_found(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(64, 64), (torch.zeros(64),))
    torch.export.save(program, tmp_path / "model.pt2")
    content = bytearray((tmp_path / "model.pt2").read_bytes())
    content[content.index(program.state_dict["weight"].detach().numpy().tobytes())] ^= 1
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pt2: is no whole file of torch\.export"):
        load_with_torch(tmp_path)


def test_what_is_no_network_is_told_with_what_to_give(network: Path, tmp_path: Path) -> None:
    (tmp_path / "net.xml").touch()
    (tmp_path / "net.bin").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "report.json").write_text("{}")
    for name, said in (
        ("net.bin", r"net\.bin: holds the weights of net\.xml; give that file"),
        ("empty", r"empty: no exported network in this folder \(model\.onnx, or model\.xml with model\.bin\)"),
        ("report.json", r"report\.json: is no exported network \(model\.onnx, model\.xml\); checkpoints need PyTorch"),
        ("nothing.xml", r"nothing\.xml: no such file; export a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / name)
    for either in (load, load_with_torch):
        with pytest.raises(UserError, match="path 3: give the path of a checkpoint or an export, or a name"):
            either(3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        load(network, bogus=1)
    with pytest.raises(UserError, match="compile True: exported networks run on the CPU as they were written; drop it"):
        load(network, compile=True)


def test_half_a_file_of_torch_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match="was not written by 'cascade-rcnn export'"):
        load_with_torch(tmp_path)
    whole = (tmp_path / "model.pt2").read_bytes()
    for part in (b"", whole[: len(whole) // 2]):
        (tmp_path / "model.pt2").write_bytes(part)
        with pytest.raises(CheckpointError, match=r"model\.pt2: is no whole file of torch\.export"):
            load_with_torch(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("loader", [load, load_with_torch])
def test_openvino_is_called_from_several_threads(openvino: Path, loader: Load) -> None:
    """Each call gives what belongs to its own picture."""
    detector = loader(openvino)
    pictures = [np.full((96 + 32 * (number % 3), 160, 3), 30 * number, np.uint8) for number in range(8)]
    alone = [np.asarray(detector.predict(picture).scores) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(detector.predict, pictures)
            assert all(np.array_equal(one.scores, other) for one, other in zip(found, alone, strict=True))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"score_threshold": 2}, "score_threshold 2: give a number from 0 to 1; for 2 per cent write 0.02"),
    ({"score_threshold": "high"}, "score_threshold 'high'"),
    ({"max_detections": 0}, "max_detections 0: give a whole number of at least 1"),
    ({"max_pixels": 0}, "max_pixels 0"),
    ({"stop_after_stage": 2}, "was exported with 3; export the checkpoint again with --model.stop-after-stage 2"),
]


@pytest.mark.parametrize("loader", [load, load_with_torch])
def test_numbers_are_checked_alike(network: Path, loader: Load) -> None:
    for settings, words in WRONG:
        with pytest.raises(UserError, match=words):
            loader(network, **settings)
    detector = loader(network, stop_after_stage=3)  # all that it has
    picture = np.zeros((96, 96, 3), np.uint8)
    for settings in ({"score_threshold": 2}, {"batch_size": 1.5}, {"max_pixels": 0}):
        with pytest.raises(UserError, match="give a"):
            detector.predict(picture, **settings)


def test_an_exported_network_goes_to_the_cpu_where_it_is(network: Path) -> None:
    detector = load_with_torch(network)
    assert detector.to("cpu") is detector and detector.to("auto") is detector
