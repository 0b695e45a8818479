"""Published weights by name: the list, and downloads from a server on loopback that breaks, lies and disappears."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cascade_rcnn
import locations
import zoo_fixtures
from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.evaluate import _print_published
from cascade_rcnn.recipes import config_names, load_config
from cascade_rcnn.training.init_weights import start_from
from cascade_rcnn.zoo import store
from cascade_rcnn.zoo.catalog import find, nearest, published
from cascade_rcnn.zoo.command import run_models
from listed_networks import listed_network
from loopback import NAME, Server, set_list

checkpoint, server, zoo = zoo_fixtures.checkpoint, zoo_fixtures.server, zoo_fixtures.zoo


def _kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())


def test_a_name_loads_what_convert_and_load_give(
    zoo: dict[str, Any], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = cascade_rcnn.load(NAME, device="cpu")
    run_convert(checkpoint, tmp_path / "by_hand.safetensors")
    by_hand = load_checkpoint(tmp_path / "by_hand.safetensors")
    kept = load_checkpoint(tmp_path / "cache" / "models" / f"{NAME}.safetensors")
    assert by_name.class_names == by_hand.class_names == ("cat", "dog", "eel")
    assert kept.config == by_hand.config
    assert all(torch.equal(kept.state[key], value) for key, value in by_hand.state.items())
    said = capsys.readouterr().err
    assert "licence: Apache-2.0" in said and "by mmdetection" in said
    assert _kept(tmp_path) == [f"{NAME}.safetensors", f"{NAME}.txt"]


def test_a_second_use_asks_nobody(zoo: dict[str, Any], server: Server) -> None:
    first = store.by_name(NAME)
    server.status = 500
    assert store.by_name("cascade-mask-rcnn_small_ms-1x_cats") == first and len(server.requests) == 1


def test_a_broken_connection_is_resumed(zoo: dict[str, Any], server: Server) -> None:
    server.cut = [100_000, 50_000]
    store.by_name(NAME)
    assert [wanted for _, wanted in server.requests] == ["", "bytes=100000-", "bytes=150000-"]


def test_what_an_earlier_process_fetched_is_continued(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.pth.part").write_bytes(server.content[:777])
    store.by_name(NAME)
    assert server.requests[0][1] == "bytes=777-"


def test_a_server_without_ranges_starts_again(zoo: dict[str, Any], server: Server) -> None:
    server.ranges, server.cut = False, [100_000]
    store.by_name(NAME)
    assert len(server.requests) == 2


def test_a_whole_part_file_is_not_fetched_again(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.pth.part").write_bytes(server.content)
    server.status = 416
    store.by_name(NAME)


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_wrong_digest_names_both_and_deletes_the_part_only(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, algorithm: str
) -> None:
    digest = hashlib.new(algorithm, server.content).hexdigest()
    set_list(monkeypatch, tmp_path / "wrong.json", zoo | {"hash": "0badc0de", "hash_of": algorithm})
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / "other.safetensors").write_bytes(b"stays")
    with pytest.raises(CheckpointError, match=rf"{digest[:8]}.*0badc0de"):
        store.by_name(NAME)
    assert _kept(tmp_path) == ["other.safetensors"]


def test_a_digest_of_the_whole_file_is_compared_too(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = zoo["hash"] + "0" * 56
    set_list(monkeypatch, tmp_path / "wrong.json", zoo | {"sha256": wrong})
    with pytest.raises(CheckpointError, match=wrong):
        store.by_name(NAME)


def test_offline_names_the_address_and_the_way_out(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    server.close()
    with pytest.raises(CheckpointError) as caught:
        cascade_rcnn.load(NAME)
    said = str(caught.value)
    assert zoo["url"] in said and "CASCADE_RCNN_MIRROR" in said and "\n" not in said
    server.__init__(server.content)  # type: ignore[misc]  # so that the fixture has something to close


def test_a_server_that_refuses_is_quoted(zoo: dict[str, Any], server: Server) -> None:
    server.status = 403
    with pytest.raises(CheckpointError, match="answers 403"):
        store.by_name(NAME)


@pytest.mark.parametrize("place", ["small.pth", f"{NAME}.pth", "v2.0/small.pth"])
def test_a_mirror_folder(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    set_list(monkeypatch, tmp_path / "list.json", zoo | {"url": "https://host.invalid/v2.0/small.pth"})
    path = tmp_path / "mirror" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(server.content)
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", str(tmp_path / "mirror"))
    assert load_checkpoint(store.by_name(NAME)).class_names == ("cat", "dog", "eel")
    assert server.requests == [] and path.exists()


def test_a_mirror_host(zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_list(monkeypatch, tmp_path / "list.json", zoo | {"url": "https://host.invalid/a/small.pth"})
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", server.address + "/mine/")
    store.by_name(NAME)
    assert server.requests[0][0] == "/mine/a/small.pth"


def test_a_mirror_without_the_file_says_where_it_looked(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"not at any of .*{NAME}.pth"):
        store.by_name(NAME)


def test_a_file_put_into_the_cache_by_hand_is_used_if_it_is_the_right_one(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="or put the file at") as error:
        cascade_rcnn.load(NAME)
    place = Path(str(error.value).split("put the file at ")[1].removesuffix(" yourself"))
    place.write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"is another file: its sha256 is .* delete it, and"):
        cascade_rcnn.load(NAME)
    assert place.read_bytes() == b"another"
    place.write_bytes(server.content)
    assert len(cascade_rcnn.load(NAME).class_names) == 3 and not server.requests


def test_a_mirror_that_cannot_be_read_is_named(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / f"{NAME}.pth").write_bytes(server.content)
    monkeypatch.setenv("CASCADE_RCNN_MIRROR", str(mirror))
    opened = Path.open

    def refuse(self: Path, mode: str = "r", **given: Any) -> Any:
        if self.parent == mirror:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, **given)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"{NAME}.pth cannot be read .*Permission denied"):
        cascade_rcnn.load(NAME)


def test_a_broken_network_is_not_taken_for_a_full_disk(
    zoo: dict[str, Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise OSError(113, "No route to host")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(CheckpointError, match=r"cannot fetch http.*No route to host.*offline\?"):
        cascade_rcnn.load(NAME)
    assert len(asked) > 1


def test_a_login_page_does_not_replace_what_came(
    zoo: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut = [1000] * 10
    with pytest.raises(CheckpointError):
        cascade_rcnn.load(NAME)
    (part,) = (tmp_path / "cache").rglob("*.part")
    before = part.read_bytes()
    server.ranges, server.page = False, True
    with pytest.raises(CheckpointError, match=r"answers with a web page.*log in with a browser.*CASCADE_RCNN_MIRROR"):
        cascade_rcnn.load(NAME)
    assert before and part.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_a_cache_that_cannot_be_written_is_one_line(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CASCADE_RCNN_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written .* CASCADE_RCNN_CACHE"):
        store.by_name(NAME)


_PROCESS = """
import sys
from pathlib import Path
from cascade_rcnn.zoo import catalog, store
catalog._LIST = Path(sys.argv[1])
print(store.by_name(sys.argv[2]))
"""


def test_of_two_processes_one_downloads(zoo: dict[str, Any], server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PROCESS, str(tmp_path / "published.json"), NAME]
    environment = os.environ | {"PYTHONPATH": str(locations.REPOSITORY), "CASCADE_RCNN_CACHE": str(tmp_path / "cache")}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert said[0] == said[1] != "" and len(server.requests) == 1
    assert _kept(tmp_path) == [f"{NAME}.safetensors", f"{NAME}.txt"]


def test_a_disk_that_is_full_for_the_converted_weights_is_one_way_out(
    zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cascade_rcnn.checkpoint.save_file", full)
    with pytest.raises(CheckpointError) as caught:
        store.by_name(NAME)
    said = str(caught.value)
    assert f"{NAME}.safetensors: cannot be written (No space left on device); the file that was fetched is kept" in said
    assert "CASCADE_RCNN_CACHE" in said and "resume" not in said and "unproven" not in said
    assert _kept(tmp_path) == [f"{NAME}.pth"]


def test_a_training_starts_from_a_name(zoo: dict[str, Any]) -> None:
    from cascade_rcnn.models.build import build_model

    config = load_checkpoint(store.by_name(NAME)).config.model
    assert "classes that it knows already: eel" in start_from(
        build_model(config, 2), Path(NAME), ["eel", "fox"], config
    )


def test_evaluation_prints_the_published_ap_beside(zoo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    _print_published(Path(NAME), {"bbox/AP": 0.4071, "segm/AP": 0.3})
    assert capsys.readouterr().out == "bbox AP: 40.7 here, 41.2 published by mmdetection (COCO)\n"


def test_a_file_that_was_fetched_and_converted_by_hand_has_its_published_ap(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo: dict[str, Any]
) -> None:
    file = tmp_path / f"other_20200316-{zoo['hash']}.pth"
    set_list(monkeypatch, tmp_path / "list.json", zoo | {"url": f"https://host.invalid/{file.name}"})
    file.write_bytes(server.content)
    run_convert(file, tmp_path / "mine.safetensors")
    entry = store.published_for(tmp_path / "mine.safetensors")
    assert entry is not None and entry.name == NAME


def test_a_checkpoint_of_ones_own_has_no_published_ap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _print_published(tmp_path / "own.safetensors", {"bbox/AP": 0.4})
    assert capsys.readouterr().out == ""


def test_a_file_of_that_name_wins(zoo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()
    assert store.resolve(NAME) == Path(NAME)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean cascade_rcnn_r50_fpn_1x_coco"):
        cascade_rcnn.load("cascade_rcnn_r50_fpn_1x_cocoo")


def test_a_network_without_counterpart_says_which_part() -> None:
    with pytest.raises(CheckpointError, match=r"not converted \(HRNet"):
        cascade_rcnn.load("cascade_rcnn_hrnetv2p_w18_20e_coco")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("cascade_mask_rcnn_r50_fpn_mstrain_3x_coco", "cascade_mask_rcnn_r50_fpn_ms_3x_coco"),
        ("cascade-mask-rcnn_r50_fpn_ms-3x_coco", "cascade_mask_rcnn_r50_fpn_ms_3x_coco"),
        ("Cascade-RCNN_r50-caffe_fpn_1x_coco", "cascade_rcnn_r50_caffe_fpn_1x_coco"),
        ("fasterrcnn_resnet50_fpn_v2", "torchvision_fasterrcnn_resnet50_fpn_v2"),
        ("model_final_e9d89b", "detectron2_cascade_mask_rcnn_r50_fpn_1x"),
        ("mask_rcnn_R_50_FPN_3x", "detectron2_mask_rcnn_r_50_fpn_3x"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "detectron2_mask_rcnn_r_50_fpn_1x"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_3x", "detectron2_cascade_mask_rcnn_r50_fpn_3x"),
        ("cascade_rcnn_r50_fpn_1x_coco_20200316-3dc56deb", "cascade_rcnn_r50_fpn_1x_coco"),
        ("cascade_mask_rcnn_convnext_t_fpn_3x_coco", "convnext_cascade_mask_rcnn_convnext_tiny_1k_3x"),
        ("cascade_mask_rcnn_convnext_b_in22k_fpn_3x_coco", "convnext_cascade_mask_rcnn_convnext_base_22k_3x"),
        ("cascade-mask-rcnn_swin-b_fpn_3x_coco", "swin_cascade_mask_rcnn_swin_base_patch4_window7"),
        (
            "cascade_mask_rcnn_r50_fpn_mstrain_3x_coco_20210628_164719-5bdc3824.pth",
            "cascade_mask_rcnn_r50_fpn_ms_3x_coco",
        ),
    ],
)
def test_spellings_of_published_names(spelling: str, name: str) -> None:
    entry = find(spelling)
    assert entry is not None and entry.name == name


def test_a_config_of_detectron2_is_a_name_and_other_paths_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.is_name("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    assert store.is_name(Path("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"))
    for path in (
        "cascade/rcnn_r50_fpn_1x_coco",
        "runs/mask_rcnn_R_50_FPN_3x",
        "a/COCO-Detection/faster_rcnn_R_50_FPN_3x",
    ):
        assert not store.is_name(path)


def test_the_list_is_whole_and_consistent() -> None:
    entries = published()
    names = [entry.name for entry in entries]
    assert len(entries) == 379 and len(set(names)) == 379
    assert all(find(name) is entry for name, entry in zip(names, entries))
    assert all(entry.url.startswith("http") and entry.license and entry.source for entry in entries)
    assert all(entry.hash in entry.file for entry in entries)
    assert all(entry.recipe in config_names() for entry in entries if entry.recipe)
    assert sum(bool(entry.recipe) and not entry.missing for entry in entries) == 44
    assert nearest("cascade") == [] or all(not find(name).missing for name in nearest("cascade"))  # type: ignore[union-attr]


def test_models_lists_and_filters(capsys: pytest.CaptureFixture[str]) -> None:
    run_models(["cascade_mask", "r50", "detectron2"])
    said = capsys.readouterr().out
    assert "detectron2_cascade_mask_rcnn_r50_fpn_3x" in said and "44.3" in said and "CC-BY-SA-3.0" in said
    assert "mmdetection" not in said and "2 checkpoints" in said


def test_weights_of_a_recipe_of_ours_are_found_by_the_recipes_name() -> None:
    for entry in published():
        if entry.recipe and not entry.missing:
            assert find(entry.recipe) is entry, entry.name
            said = load_config(entry.recipe).published or f"{entry.box_ap} box AP"
            assert f"{entry.box_ap} box AP" in said, entry.name


def _lines_of_models(words: list[str], columns: int | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import io

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return columns is not None

    screen = Screen()
    monkeypatch.setenv("COLUMNS", str(columns or 80))
    monkeypatch.setattr(sys, "stdout", screen)
    run_models(words)
    monkeypatch.undo()
    return screen.getvalue().splitlines()


def test_the_list_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["cascade", "r50", "1x", "coco"]
    narrow = _lines_of_models(words, 80, monkeypatch)
    assert max(map(len, narrow)) <= 80
    row = narrow.index("cascade_mask_rcnn_r50_fpn_1x_coco")
    assert narrow[row + 1] == "    41.2 box AP, 35.9 mask AP, 77.3 M, mmdetection, Apache-2.0"
    wide = _lines_of_models(words, 120, monkeypatch)
    assert max(map(len, wide)) <= 120
    assert "    no: recursive feature pyramid or switchable atrous convolutions (DetectoRS)" in wide
    piped = _lines_of_models(words, None, monkeypatch)
    assert len(piped) == 1 + int(piped[-3].split()[0]) + 3  # a line for each checkpoint, also for grep
    assert any(line.endswith("Apache-2.0    no: Cascade RPN") for line in piped)


def test_the_list_needs_no_torch() -> None:
    """It answers at once: torch takes seconds."""
    program = (
        "import sys; from cascade_rcnn.cli import main; main(['models', 'r50']); assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(locations.REPOSITORY)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.DEVNULL)


def test_models_tells_the_size(capsys: pytest.CaptureFixture[str]) -> None:
    run_models(["cascade_mask_rcnn_r50_fpn_ms_3x_coco"])
    assert "77.3 M" in capsys.readouterr().out
    run_models(["cascade_mask_rcnn_r50_fpn_ms_3x_coco"], as_json=True)
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["parameters"] == 77_324_606 and "cached_bytes" not in entry
    run_models(["hrnet"], as_json=True)  # does not load: not known, and not 0
    assert not any("parameters" in entry for entry in json.loads(capsys.readouterr().out))


def test_models_tells_the_size_of_a_file_that_is_here(zoo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    size = store.by_name(NAME).stat().st_size
    run_models()
    row = next(line for line in capsys.readouterr().out.splitlines() if NAME in line)
    assert f"{size / 1e6:.0f} MB" in row and row.rstrip().endswith("here")
    run_models(as_json=True)
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["cached"] and entry["cached_bytes"] == size


def test_the_recipe_of_an_entry_is_its_network() -> None:
    for entry in published():
        if entry.recipe and not entry.missing:
            recipe, listed = load_config(entry.recipe).model, listed_network(entry).model
            names = ("stage_ious", "masks", "class_agnostic_boxes", "box_head", "rpn_convs", "deformable")
            assert [getattr(recipe, name) for name in names] == [getattr(listed, name) for name in names], entry.name
            assert recipe.backbone.partition(".")[0] == listed.backbone.partition(".")[0], entry.name


def test_the_page_of_models_has_them_all() -> None:
    path = locations.REPOSITORY / "docs" / "hooks.py"
    hooks: dict[str, Any] = {"__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), hooks)
    page = (path.parent / "models.md").read_text(encoding="utf-8")
    shown = hooks["on_page_markdown"](page, page=None)
    rows = [line for line in shown.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows if row.count(" | ") == 6] == [entry.name for entry in published()]
    row = next(row for row in rows if "`cascade_rcnn_r50_fpn_1x_coco`" in row)
    assert row == "| `cascade_rcnn_r50_fpn_1x_coco` | 40.3 |  | 69.4 M | COCO | Apache-2.0 |  |"
    assert "CARAFE upsampling" in shown and hooks["on_page_markdown"]("# Other", page=None) == "# Other"


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    run_models(["hrnet"], as_json=True)
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 18 and not any(entry["loads"] for entry in entries)


def test_the_cache_is_shown_and_cleared(
    zoo: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.by_name(NAME)
    run_models(cache="show")
    said = capsys.readouterr().out
    assert NAME in said and "  1 checkpoint, " in said
    assert "interrupted" not in said  # the converter's report is none of what is left over
    run_models(cache="clear")
    assert _kept(tmp_path) == [] and "deleted" in capsys.readouterr().out
