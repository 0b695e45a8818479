"""The user's own augmentations: boxes, masks and labels stay together, seeds decide, mistakes are one line."""

from __future__ import annotations

import dataclasses
import pickle
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.augment import Augmentation, AugmentError
from cascade_rcnn.data.dataset import DetectionDataset, SampleKey
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.item import Item
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.errors import ConfigError, DataError

MIRROR = """
import random
import numpy as np

def transform(image, bboxes, rows, masks=()):
    width = image.shape[1]
    keep = bboxes[:, 2] > 12  # by a rule of its own
    bboxes = bboxes[keep].copy()
    bboxes[:, [0, 2]] = width - bboxes[:, [2, 0]]
    image = image[:, ::-1].copy()
    image[0, 0] = random.randrange(200), np.random.randint(200), 7
    return {"image": image, "bboxes": bboxes, "rows": rows[keep], "masks": [mask[:, ::-1] for mask in masks]}
"""


def item() -> Item:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    boxes = [(2, 2, 10, 12), (20, 5, 40, 25), (30, 20, 60, 40)]
    masks = []
    for value, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = 100 + value
    for x1, y1, x2, y2 in boxes:
        masks.append((np.ones((y2 - y1, x2 - x1), np.uint8), y1, x1))
    return Item(
        image, (40, 60), 1, "one.png", np.array(boxes, np.float32), np.array([4, 5, 6]), np.array([False, False, True]),
        [masks[0], masks[1], None],
    )  # fmt: skip


def written(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_a_function_of_ones_own_keeps_boxes_masks_and_labels_together(tmp_path: Path) -> None:
    mirror = Augmentation(written(tmp_path, MIRROR))
    made = mirror(item(), np.random.default_rng(3))
    assert made.labels.tolist() == [5, 6] and made.ignore.tolist() == [False, True]
    assert made.boxes.tolist() == [[20, 5, 40, 25], [0, 20, 30, 40]]
    assert made.masks is not None and made.masks[0] is not None and made.masks[1] is None
    pixels, top, left = made.masks[0]
    assert (top, left, pixels.shape) == (5, 20, (20, 20)) and pixels.all()
    state = random.getstate()
    again = pickle.loads(pickle.dumps(mirror))(item(), np.random.default_rng(3))  # as in a loader process
    assert torch.equal(made.image, again.image) and random.getstate() == state
    assert not torch.equal(made.image, mirror(item(), np.random.default_rng(4)).image)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no 'transform'"),
        ("transform = 3", "has no 'transform'"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def transform(:", "SyntaxError"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_training(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        Augmentation(written(tmp_path, text))
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such file"):
        Augmentation(str(tmp_path / "other.py"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("return {'image': image / 255, 'bboxes': bboxes, 'rows': rows}", "float64 .40, 60, 3. as image.*Normalize"),
        ("return None", "gives NoneType as image"),
        ("return {'image': image, 'bboxes': bboxes}", "gives back other bboxes, rows or masks"),
        ("return {'image': image, 'bboxes': bboxes[1:], 'rows': rows, 'masks': masks}", "2 bboxes and 3 rows"),
        ("return {'image': image, 'bboxes': bboxes, 'rows': rows + 1, 'masks': masks}", "must belong together"),
        ("return {'image': image, 'bboxes': bboxes, 'rows': rows, 'masks': masks[1:]}", "gives back other"),
        ("return {'image': image, 'bboxes': bboxes * float('nan'), 'rows': rows, 'masks': masks}", "not finite"),
        ("return {'image': image[:20, :30], 'bboxes': bboxes, 'rows': rows, 'masks': masks}", "masks of another size"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        (
            "return {'image': np.zeros((0, 0, 3), np.uint8), 'bboxes': [], 'rows': [], 'masks': []}",
            r"a picture without pixels, \[0, 0, 3\]",
        ),
        (
            "return {'image': image, 'bboxes': bboxes / 60, 'rows': rows, 'masks': masks}",
            "bboxes within 0 and 1 in a p",
        ),
        ("bboxes[:] = 0; return {'image': image, 'bboxes': bboxes, 'rows': rows, 'masks': masks}", "within 0 and 1 in"),
        (
            "return {'image': image, 'bboxes': bboxes + 60, 'rows': rows, 'masks': masks}",
            r"the box \[62.0, 62.0, 70.0, 72.0\], of which nothing is in its picture of 60 x 40",
        ),
        (
            "return {'image': image, 'bboxes': bboxes[:, [2, 3, 0, 1]], 'rows': rows, 'masks': masks}",
            "of which nothing",
        ),
        (
            "return {'image': image, 'bboxes': bboxes, 'rows': rows * 0, 'masks': masks}",
            "rows that come twice or are no",
        ),
        (
            "return {'image': image, 'bboxes': bboxes, 'rows': rows * 0.9, 'masks': masks}",
            "rows that come twice or are n",
        ),
    ],
)
def test_what_a_transform_does_wrong_is_said_with_file_and_image(tmp_path: Path, body: str, said: str) -> None:
    wrong = Augmentation(
        written(tmp_path, f"import numpy as np\ndef transform(image, bboxes, rows, masks=()):\n    {body}\n")
    )
    with pytest.raises(AugmentError, match=said) as error:
        wrong(item(), np.random.default_rng(0))
    assert "mine.py" in str(error.value) and "one.png" in str(error.value)


def test_a_missing_file_is_told_before_the_data_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade_rcnn import train

    monkeypatch.setattr(train, "check_before_training", lambda _: pytest.fail("looked at the data first"))
    config = Config(data=DataConfig(root=str(tmp_path), augment="mine.py"))
    with pytest.raises(ConfigError, match=r"data.augment 'mine.py': no such file"):
        train.run_train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_stops_at_a_wrong_transform_instead_of_trying_other_images(tmp_path: Path) -> None:
    root = generate_shapes(tmp_path / "data", train_images=3, val_images=1, size=64)
    config = DataConfig(root=str(root), short_side=(64,), long_side=96, augment=written(tmp_path, MIRROR))
    split = open_split(root, "train")
    first = DetectionDataset(split, config, training=True)[SampleKey(0, (1,))]
    assert first.image[2, 0, 0] == 7 and first.bad == []
    assert DetectionDataset(split, config, training=False)[0].image[2, 0, 0] != 7
    wrong = dataclasses.replace(
        config, augment=written(tmp_path, "def transform(**given):\n    raise ValueError('no')\n")
    )
    found = DetectionDataset(split, wrong, training=True).__getitems__([SampleKey(0, (1,))])
    assert isinstance(found, DataError) and "ValueError: no" in str(found) and "in a row" not in str(found)


def test_a_pipeline_of_albumentations(tmp_path: Path) -> None:
    pytest.importorskip("albumentations")
    lines = "import albumentations as A\ntransform = A.Compose([A.HorizontalFlip(p=1.0), A.Crop(0, 0, 45, 40)])\n"
    crop = Augmentation(written(tmp_path, lines))
    made = crop(item(), np.random.default_rng(0))
    assert tuple(made.image.shape) == (3, 40, 45)
    assert made.labels.tolist() == [5, 6]  # of the first object nothing is left
    np.testing.assert_allclose(made.boxes, [[20, 5, 40, 25], [0, 20, 30, 40]], atol=1e-4)
    for box, value in zip(made.boxes.round().astype(int).tolist(), (101, 102)):
        assert made.image[0, box[1], box[0]] == value
    turn = Augmentation(written(tmp_path, "import albumentations as A\ntransform = A.Rotate(limit=(30, 30), p=1.0)\n"))
    turned = turn(item(), np.random.default_rng(0))
    assert turned.masks is not None and turned.masks[0] is not None
    pixels, top, left = turned.masks[0]
    assert turned.boxes[0].tolist() == [left, top, left + pixels.shape[1], top + pixels.shape[0]]
    noise = Augmentation(
        written(tmp_path, "import albumentations as A\ntransform = A.Compose([A.GaussNoise(p=1.0)])\n")
    )
    one, same, other = (noise(item(), np.random.default_rng(seed)).image for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    empty = dataclasses.replace(
        item(), boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int64), ignore=np.zeros(0, bool), masks=[]
    )
    assert len(turn(empty, np.random.default_rng(0)).boxes) == 0


def test_a_missing_or_old_albumentations_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "import albumentations as A\ntransform = A.HorizontalFlip()\n"
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ConfigError, match=r"mine.py: .*pip install -U 'cascade-rcnn\[albumentations\]'"):
        Augmentation(written(tmp_path, lines))
    kinds = {name: type(name, (), {"__call__": print}) for name in ("BasicTransform", "BaseCompose", "Compose")}
    old = SimpleNamespace(__version__="1.4.3", HorizontalFlip=type("Flip", (kinds["BasicTransform"],), {}), **kinds)
    monkeypatch.setitem(sys.modules, "albumentations", old)
    with pytest.raises(ConfigError, match=r"mine.py: needs albumentations 2, and this is 1.4.3; pip install -U"):
        Augmentation(written(tmp_path, lines))


def test_what_a_pipeline_says_of_itself_counts(tmp_path: Path) -> None:
    pytest.importorskip("albumentations")
    half = "import albumentations as A\ntransform = A.Compose([A.HorizontalFlip(p=1.0)], p=0.5)\n"
    mirror = Augmentation(written(tmp_path, half))
    flipped = [not torch.equal(mirror(item(), np.random.default_rng(seed)).image, item().image) for seed in range(20)]
    assert 3 < sum(flipped) < 17
    large = "A.BboxParams(format='coco', min_area=300)"
    picky = f"import albumentations as A\ntransform = A.Compose([A.HorizontalFlip(p=1.0)], bbox_params={large})\n"
    assert Augmentation(written(tmp_path, picky))(item(), np.random.default_rng(0)).labels.tolist() == [5, 6]
    narrow = picky.replace("min_area=300", "max_accept_ratio=1.4")
    assert Augmentation(written(tmp_path, narrow))(item(), np.random.default_rng(0)).labels.tolist() == [4, 5]
