"""The losses of a training: means for the log, and an end to a run whose losses stay non-finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_rcnn import distributed
from cascade_rcnn.errors import UserError

_REMEDY = (
    "look at these images with 'cascade-rcnn check', or lower train.lr, raise train.warmup_steps, set "
    "train.clip_grad_norm to 10, or train.precision to fp32"
)


@dataclass
class _Step:
    """One step: its row stays on the device until it is read."""

    number: int
    row: Tensor  # [losses + 3]: the losses, the gradients' norm, 1 if the step is bad, 1 if this rank's losses are
    paths: tuple[str, ...]


class LossWindow:
    """The losses of the steps since they were last read, kept on the device so that no step waits for them.

    A step is bad when its gradients (with fp16's loss scaling: its losses) are not finite; the optimizer has then
    skipped it. On a CPU this is seen at once, on a GPU when the window is read, up to ``log_every`` steps later. Bad
    steps in a row are counted over the whole run; the count is saved with it.
    """

    def __init__(self, *, max_bad: int, scaled: bool = False) -> None:
        self._max_bad, self._scaled = max_bad, scaled
        self._names: tuple[str, ...] = ()
        self._passes: list[tuple[Tensor, tuple[str, ...]]] = []  # of the current step
        self._steps: list[_Step] = []
        self._counted = 0  # of ``_steps``, the first ones: those that ``_bad_in_a_row`` knows
        self._bad_in_a_row = 0
        self._last_bad = ""
        self._good = self._bad = 0  # steps that were counted

    def add_pass(self, losses: Mapping[str, Tensor], paths: tuple[str, ...]) -> None:
        """Note the losses of one pass."""
        self._names = tuple(losses)
        self._passes.append((torch.stack([loss.detach().float() for loss in losses.values()]), paths))

    def end_step(self, step: int, norm: Tensor) -> list[str]:
        """Close the step of the passes so far; on a CPU returns what is to be said about it (see ``read``)."""
        values = torch.stack([values for values, _ in self._passes]).mean(dim=0)
        paths = tuple(path for _, names in self._passes for path in names)
        self._passes.clear()
        bad_here = ~torch.isfinite(values).all()
        bad = bad_here if self._scaled else ~torch.isfinite(norm)
        row = torch.cat([values, norm.detach().float().view(1), bad.float().view(1), bad_here.float().view(1)])
        self._steps.append(_Step(step, row, paths))
        nothing_to_wait_for = row.device.type == "cpu" and not self._scaled  # and every rank sees the same norm
        return self._count_bad_steps(row.view(1, -1)) if nothing_to_wait_for else []

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Means over the window's good steps and over the ranks, and messages about its bad steps.

        The host waits for the device here and in ``bad_in_a_row``. Every rank calls it at the same step.
        Raises UserError after ``max_bad`` bad steps in a row.
        """
        if not self._steps:
            return {}, []
        rows = torch.stack([step.row for step in self._steps])  # [steps, losses + 3]
        shared = rows[:, :-1].clone()
        shared[~torch.isfinite(shared)] = 0
        shared = distributed.mean_over_ranks(shared)  # "bad" becomes the share of ranks: above 0 where any is
        uncounted = torch.cat([rows[:, :-2], (shared[:, -1:] > 0).float(), rows[:, -1:]], dim=1)[self._counted :]
        messages = self._count_bad_steps(uncounted.cpu())
        good = shared[:, -1] == 0
        means = (shared[good] if bool(good.any()) else shared * math.nan).mean(dim=0).tolist()
        self._steps.clear()
        self._counted = 0
        values = dict(zip(self._names, means))
        return {"loss": sum(values.values()), **values, "grad_norm": means[-2]}, messages

    def bad_in_a_row(self) -> int:
        """How many of the last steps were bad, including those not read yet.

        Every rank calls it at the same step.
        """
        count = self._bad_in_a_row
        uncounted = self._steps[self._counted :]
        if uncounted:
            flags = distributed.mean_over_ranks(torch.stack([step.row[-2] for step in uncounted]))
            for bad in flags.tolist():
                count = count + 1 if bad else 0
        return count

    def restore(self, bad_in_a_row: int, *, steps: int = 0) -> None:
        """Continue counting from a saved ``bad_in_a_row``, after so many ``steps``."""
        self._bad_in_a_row = self._bad = bad_in_a_row
        self._good = steps - bad_in_a_row

    def refuse_if_all_were_skipped(self) -> None:
        """UserError where no step of the run has changed the weights: that is no training."""
        if self._bad and not self._good:
            steps = "the only step was" if self._bad == 1 else f"all {self._bad} steps were"
            raise UserError(f"{steps} skipped ({self._last_bad or 'not finite'}): nothing was learnt; {_REMEDY}")

    def _count_bad_steps(self, rows: Tensor) -> list[str]:
        """Count the steps that are not counted yet; ``rows`` [steps, losses + 3] are theirs, on the host."""
        messages = []
        for step, row in zip(self._steps[self._counted :], rows):
            *values, norm, bad, bad_here = row.tolist()
            self._counted += 1
            if not bad:
                self._bad_in_a_row = 0
                self._good += 1
                continue
            self._bad_in_a_row += 1
            self._bad += 1
            not_finite = [f"{name} {value:g}" for name, value in zip(self._names, values) if not math.isfinite(value)]
            names = ", ".join(not_finite) or f"gradient norm {norm:g}"
            if bad_here or distributed.world_size() == 1:
                self._last_bad = f"step {step.number}: {names}; images {', '.join(step.paths)}"
                messages.append(f"not finite, skipped: {self._last_bad}")
            if self._bad_in_a_row >= self._max_bad:
                raise UserError(
                    f"the losses of {self._bad_in_a_row} steps in a row were not finite ({self._last_bad or names}); "
                    f"{_REMEDY}; --resume goes on from the last save"
                )
        return messages
