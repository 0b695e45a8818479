"""What can be wrong with a data set: the kinds, how severe each is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a data set, where it stands, and how it was met; ``KINDS`` lists what there is."""

    kind: str
    where: str  # file, and line or index
    message: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table below; ``refuses``: training does not start while one such problem stands."""

    severity: Severity
    title: str
    advice: str
    refuses: bool = False


_FIX = "fix it in the file, or drop such objects with `cascade-rcnn check DATA --fix OUT`"


KINDS: dict[str, Kind] = {
    # Met by the readers
    "bad-annotation": Kind("error", "annotation that cannot be understood", _FIX, refuses=True),
    "bad-number": Kind("error", "coordinate that is not a finite number", _FIX, refuses=True),
    "unsafe-path": Kind(
        "error",
        "image name that leaves the data set's folder",
        "use names below the folder you name as data",
        refuses=True,
    ),
    "duplicate-image-id": Kind(
        "error",
        "image id used twice",
        "give each image its own id; which objects belong to which image cannot be known",
        refuses=True,
    ),
    "duplicate-category": Kind(
        "error", "category id or name used twice", "merge them in the annotation file", refuses=True
    ),
    "unknown-category": Kind(
        "error",
        "object of a category that is not listed",
        "list the category, or drop the objects with `--fix OUT`",
        refuses=True,
    ),
    "bad-mask": Kind("error", "mask that does not decode to the image's size", _FIX, refuses=True),
    "bad-flag": Kind(
        "error", "flag that is neither yes nor no", "write 0 or 1 (iscrowd, ignore, difficult)", refuses=True
    ),
    "corner-fractions": Kind(
        "error",
        "YOLO boxes stored as corners (x1 y1 x2 y2) where centre and size (cx cy w h) are wanted",
        "`--fix OUT` rewrites them",
        refuses=True,
    ),
    "centre-as-xywh": Kind(
        "error",
        "boxes stored as centre and size where x, y of the upper left corner are wanted",
        "`--fix OUT` rewrites them",
        refuses=True,
    ),
    "topleft-as-centre": Kind(
        "error",
        "YOLO boxes stored from their corner (x y w h) where their centre (cx cy w h) is wanted",
        "`--fix OUT` rewrites them",
        refuses=True,
    ),
    "xywh-as-corners": Kind(
        "error",
        "VOC boxes stored as x, y, width, height where xmin, ymin, xmax, ymax are wanted",
        "`--fix OUT` rewrites them",
        refuses=True,
    ),
    "pose-labels": Kind(
        "error",
        "label files that look like pose labels, without kpt_shape in the data file",
        "add kpt_shape: [NUMBER OF POINTS, 2 or 3] to data.yaml: the boxes are then read, the points left out",
        refuses=True,
    ),
    "other-format": Kind(
        "error", "annotation of a kind that is not supported", "export the task as 'CVAT for images 1.1'", refuses=True
    ),
    "orphan-label": Kind(
        "error",
        "label file without its image",
        "complete the images: these objects are left out; or delete the label files",
    ),
    "unlabelled-image": Kind(
        "warning",
        "image without a label file",
        "label it, or take it out of the folder",
    ),
    "unlisted-image": Kind("note", "image that no list of a split names", "left out; fine if it is meant"),
    "image-name": Kind(
        "note", "image names that are not those on the disk", "the only file that can be meant is used; nothing to do"
    ),
    "image-elsewhere": Kind(
        "warning",
        "image found under another ending or in another folder",
        "the only file that can be meant is used; look at some with `--draw 12`",
    ),
    "box-from-mask": Kind("note", "object without a box", "its box is taken from its mask"),
    "other-shape": Kind(
        "warning",
        "shape that holds no area (point, line, ...) or is not read",
        "it is left out; draw boxes or polygons",
    ),
    "rotated-box": Kind(
        "note",
        "rotated boxes",
        "an upright box around each is learned, its corners are the mask; rotated boxes are not predicted",
    ),
    "keypoints": Kind("note", "pose labels", "boxes are read, keypoints are left out"),
    "merged-category": Kind("warning", "categories of the same name", "they are read as one class"),
    "similar-classes": Kind(
        "warning", "class names that differ only in spelling", "if they mean the same, rename them in the annotations"
    ),
    "other-path": Kind("note", "folder that the data file names, but is not here", "the folders beside it are read"),
    "unknown-image": Kind("warning", "object of an image that is not listed", "it is left out; list the image"),
    "empty-box": Kind("warning", "box without area", "it is left out of training; `--fix OUT` drops it for good"),
    "outside-box": Kind(
        "warning",
        "box wholly outside its image",
        "it is left out of training; compare the image's size with the one it was labelled at",
    ),
    "short-polygon": Kind("warning", "polygon with fewer than three points", "it is left out; `--fix OUT` drops it"),
    "missing-annotation": Kind(
        "warning",
        "listed image without an annotation file",
        "it is left out; complete the download, or take it off the list",
    ),
    "made-split": Kind("note", "split made by this program", "add the list of the official split to compare results"),
    # Found by check
    "xyxy-as-xywh": Kind(
        "error",
        "boxes stored as corners (x1, y1, x2, y2) where x, y, width, height are wanted",
        "`--fix OUT` rewrites them",
        refuses=True,
    ),
    "relative-boxes": Kind(
        "error",
        "boxes stored as fractions of the image where pixels are wanted",
        "`--fix OUT` rewrites them",
        refuses=True,
    ),
    "all-crowd": Kind(
        "error",
        "every object marked as crowd",
        "crowds are never learned: set iscrowd to 0, or `--fix OUT`",
        refuses=True,
    ),
    "no-learnable-objects": Kind(
        "error", "split without any object to learn", "look for a wrong split or folder", refuses=True
    ),
    "unreadable-split": Kind("error", "split that cannot be read", "fix the file that is named", refuses=True),
    "no-images": Kind(
        "error",
        "split without image files",
        "put the images where they are looked for, or link them there",
        refuses=True,
    ),
    "missing-image": Kind(
        "error", "image file that is not there", "complete the download, or drop it with `--fix OUT`"
    ),
    "unreadable-image": Kind("error", "file that is not an image", "replace it, or drop it with `--fix OUT`"),
    "truncated-image": Kind(
        "error", "image file that ends too early", "download it again, or drop it with `--fix OUT`"
    ),
    "huge-image": Kind(
        "error", "image with more pixels than data.max_pixels", "cut it into tiles, or raise data.max_pixels"
    ),
    "size-mismatch": Kind(
        "error",
        "image whose size differs from the annotation's",
        "the boxes belong to another version of the image; `--fix OUT` scales them where the shape is the same and "
        "leaves the image out where it is not",
    ),
    "undecided-orientation": Kind(
        "error",
        "image with an orientation tag, labelled nobody knows how",
        "say --orientation upright if it was labelled as viewers show it, else stored (in training "
        "--data.orientation upright)",
        refuses=True,
    ),
    "rotated-image": Kind(
        "warning",
        "image with an orientation tag whose labels count the pixels as stored",
        "training and evaluation see it as stored, predict sees every picture upright; `--fix OUT` writes it upright "
        "with its labels turned along",
    ),
    "turned-image": Kind(
        "note", "image turned upright by its orientation tag, as it was labelled", "nothing: predict does the same"
    ),
    "unknown-range": Kind(
        "error",
        "pictures of more than 8 bits with levels of no known range",
        "say which levels become black and white: data.range 'LOW HIGH' (check, evaluate, predict: --range 'LOW HIGH')",
    ),
    "dark-levels": Kind(
        "warning",
        "picture that is all but black in the range that its data set is read by",
        "other depths in one data set? save all alike, or let each picture stretch itself: data.range percentile",
    ),
    "clipped-levels": Kind(
        "warning",
        "picture of which more than a hundredth lies outside the range that its data set is read by",
        "set data.range to levels that hold it",
    ),
    "narrow-levels": Kind(
        "warning",
        "nearly all pixels in a small part of the range",
        "if the rest are glints, set data.range to the levels of nearly all pixels, or to percentile",
    ),
    "not-a-number": Kind(
        "warning",
        "picture with pixels that are not a number",
        "they are read as black; if they mean no data, that is fine, else export the picture again",
    ),
    "deep-pictures": Kind(
        "note",
        "pictures of more than 8 bits",
        "the range is kept in the checkpoint, so that predict reads alike; data.range sets another one",
    ),
    "beyond-image": Kind("warning", "box that leaves its image", "it is clipped in training; `--fix OUT` clips it"),
    "duplicate-box": Kind("warning", "same box and class twice in an image", "`--fix OUT` keeps one"),
    "mask-off-box": Kind(
        "warning", "mask that does not fit its box", "`--fix OUT` takes the box from the mask, where most fit"
    ),
    "misread-masks": Kind("error", "polygons in another coding than boxes", "`--fix OUT` rewrites them", refuses=True),
    "unlike-masks": Kind(
        "error",
        "masks and boxes that belong to different objects or sizes",
        "find out which are right (--draw 12 shows both); `--fix OUT` leaves both as they are",
    ),
    "missing-mask": Kind(
        "warning", "object without a mask in a data set with masks", "its box is learned, its mask is not"
    ),
    "same-image-in-splits": Kind(
        "error", "same image in two splits", "results on the second are worth nothing: take it out of one"
    ),
    "same-image-twice": Kind("note", "same image twice in a split", "harmless but for the weight it gets"),
    "image-listed-twice": Kind(
        "error",
        "image listed twice in a split, with other objects each time",
        "the objects of one entry are background in the other: put all objects of an image into one entry",
    ),
    "more-pages": Kind(
        "note", "picture of several pages or frames", "the first is read; save the others as pictures of their own"
    ),
    "different-classes": Kind(
        "error",
        "splits with different lists of classes",
        "rename or drop them in the annotations, or label them in the training split too",
        refuses=True,
    ),
    "absent-split": Kind(
        "note", "split that the data file names and that is not there", "nothing, if it was never exported"
    ),
    "other-classes": Kind(
        "note", "splits that list their classes differently", "classes are matched by name; nothing to do"
    ),
    "class-without-objects": Kind(
        "warning", "class without objects in the training split", "it cannot be learned; is it a misspelled duplicate?"
    ),
    "stray-class": Kind(
        "warning",
        "class with a handful of objects",
        "a typing error or a slip of the mouse? rename, drop or label more",
    ),
    "class-imbalance": Kind(
        "note", "classes of very different frequency", "rare classes are learned late; look at AP per class"
    ),
    "image-without-objects": Kind(
        "note", "image without objects", "used as background (data.keep_empty); fine if it is meant"
    ),
    "no-anchor": Kind(
        "warning",
        "more than a quarter of the objects meet no anchor with IoU 0.5",
        "change what is named; such objects train on their best anchor only",
    ),
    "some-without-anchor": Kind(
        "note",
        "objects that no anchor meets with IoU 0.5",
        "such objects train on their best anchor only; common up to a quarter",
    ),
    "tiny-object": Kind(
        "warning",
        "object below 4 pixels at the network's input",
        "enlarge the input (data.short_side, data.long_side) or cut the images into tiles",
    ),
    "too-many-objects": Kind(
        "warning", "image with more objects than detections are kept", "raise model.max_detections"
    ),
}


# Kinds that tell how something was read; nothing is left out for them
READ_ANYWAY = frozenset(
    [
        "made-split",
        "image-name",
        "image-elsewhere",
        "box-from-mask",
        "rotated-box",
        "keypoints",
        "corner-fractions",
        "topleft-as-centre",
        "xywh-as-corners",
        "relative-boxes",
        "absent-split",
        "merged-category",
        "similar-classes",
        "other-path",
        "unlisted-image",
        "unlabelled-image",
        "other-classes",
    ]
)

# Of these, kinds whose copy by `--fix` differs from what the file says
REWRITTEN = frozenset(
    {
        "corner-fractions",
        "topleft-as-centre",
        "xywh-as-corners",
        "relative-boxes",
        "box-from-mask",
        "image-name",
        "image-elsewhere",
    }
)


def advice(kind: str) -> str:
    """What to do about a kind of problem, as one reads it outside ``check``."""
    return KINDS[kind].advice.replace("`--fix OUT`", "`cascade-rcnn check DATA --fix OUT`")


class Problems:
    """Collects problems; when strict, the first that refuses the training is raised instead."""

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self.items: list[Problem] = []

    def add(self, kind: str, where: str, message: str) -> None:
        """Notes a problem of ``KINDS``. Raises ``DataError`` with file, value and way out if it refuses."""
        where, message = printable(where), printable(message)  # a damaged file may put anything into them
        if self.strict and KINDS[kind].refuses:
            raise DataError(f"{where}: {message}; {advice(kind)}")
        self.items.append(Problem(kind, where, message))
