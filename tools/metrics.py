"""What is counted over the samples of a split: solves, and the scores of each task."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mdeq import SolveStats, SolveStatus
from tools.batches import Process
from tools.config import optional

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def gather(columns: Tensor, process: Process) -> Tensor:
    """Return the columns `(K, n)` of all processes side by side."""
    if process.world_size == 1:
        return columns
    parts: list[Any] = [None] * process.world_size
    dist.all_gather_object(parts, columns)
    return torch.cat(parts, dim=1)


class SolveLog:
    """Gathers the per-sample statistics of many solves."""

    def __init__(self) -> None:
        self.residual: list[Tensor] = []
        self.status: list[Tensor] = []
        self.evaluations: list[Tensor] = []
        self.iterates: list[Tensor] = []  # of (B, K)

    def add(self, stats: SolveStats | None, iterates: Sequence[int] = ()) -> None:
        """Count a solve, by the residual of what it returned, and of iterates of some numbers of steps."""
        if stats is not None:
            self.residual.append(stats.residual.detach().double())
            if iterates:
                places = torch.tensor(iterates).clamp(max=len(stats.trace) - 1)
                self.iterates.append(stats.trace.detach().double()[places.to(stats.trace.device)].T)
            self.status.append(stats.status)
            self.evaluations.append(stats.evaluations)

    def summary(self, process: Process = Process(), prefix: str = "") -> dict[str, float]:
        """Return mean evaluations, mean and quantiles of the residual, and shares of the statuses, of all processes."""
        columns = torch.zeros(3, 0, dtype=torch.float64)
        if self.residual:
            parts = (self.residual, self.status, self.evaluations)
            columns = torch.stack([torch.cat(x).double().cpu() for x in parts])
        # A process without samples takes part too, or the others would wait for it.
        residual, status, evaluations = gather(columns, process)
        if len(residual) == 0:
            return {}
        finite = residual.nan_to_num(nan=math.inf)
        result = {"evaluations": float(evaluations.mean()), "residual_mean": float(finite.mean())}
        ordered = finite.sort().values
        for q in QUANTILES:
            result[f"residual_q{q:g}"] = float(ordered[min(int(q * len(ordered)), len(ordered) - 1)])
        for code in SolveStatus:
            result[code.name.lower()] = float((status == code).double().mean())
        return {prefix + key: value for key, value in result.items()}

    def means_of_iterates(self, process: Process, count: int) -> list[float]:
        """Return the mean residual of the `count` iterates that were asked for, of all processes."""
        rows = torch.cat([x.cpu() for x in self.iterates]).T if self.iterates else torch.zeros(count, 0)
        return gather(rows.double(), process).nan_to_num(nan=math.inf).mean(dim=1).tolist()


class MeanLoss:
    """The mean loss over samples; the scores of a task add to it."""

    def __init__(self) -> None:
        self.loss = torch.zeros(2, dtype=torch.float64)  # samples, sum of losses

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: mean loss, logits `(B, K, *S)`, labels `(B, *S)`."""
        count = self.weight(labels)
        self.loss += self.loss.new_tensor([count, float(loss.detach()) * count])

    def weight(self, labels: Tensor) -> int:
        """Return over how many a batch's loss is the mean."""
        return len(labels)

    def summary(self, process: Process) -> dict[str, float]:
        """Return the scores of all processes."""
        samples, loss = gather(self.loss.unsqueeze(1), process).sum(dim=1).tolist()
        return {"loss": loss / (samples or math.nan)}  # of nothing there is no mean


class Tally(MeanLoss):
    """Loss, top-1 and top-5 accuracy (per cent) of a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.hits = torch.zeros(3, dtype=torch.float64)  # samples, top-1, top-5

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: mean loss, logits `(B, K)`, labels `(B,)`, or soft labels `(B, K)` by their largest entry."""
        super().add(loss, logits, labels)
        labels = labels.argmax(1) if labels.ndim > 1 else labels
        order = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        counts = torch.stack((order[:, 0].sum(), order.any(dim=1).sum())).double()
        self.hits += torch.cat((counts.new_tensor([len(labels)]), counts)).cpu()

    def summary(self, process: Process) -> dict[str, float]:
        samples, top1, top5 = gather(self.hits.unsqueeze(1), process).sum(dim=1).tolist()
        samples = samples or math.nan
        return {**super().summary(process), "top1": 100 * top1 / samples, "top5": 100 * top5 / samples}


class RankTally(Tally):
    """Also the AUC (of several classes: the mean, each against the rest) and the balanced accuracy (per cent)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rows = [torch.zeros(0, num_classes + 1, dtype=torch.float64)]

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        super().add(loss, logits, labels)
        # Log-odds of each class against the rest, which rank as probabilities do, but do not end at 1.
        logits = logits.detach().double()
        rest = [torch.cat((logits[:, :k], logits[:, k + 1 :]), dim=1).logsumexp(dim=1) for k in range(logits.shape[1])]
        self.rows.append(torch.cat((labels.double().unsqueeze(1), logits - torch.stack(rest, dim=1)), dim=1).cpu())

    def summary(self, process: Process) -> dict[str, float]:
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score  # a second to import

        rows = gather(torch.cat(self.rows).T, process).numpy()
        labels, scores = rows[0].astype(int), rows[1:].T
        result = {**super().summary(process), "auc": math.nan, "balanced_accuracy": math.nan}
        present = np.unique(labels)
        if len(present) and np.isfinite(scores).all():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of classes that are found although none of their samples is there
                result["balanced_accuracy"] = 100 * float(balanced_accuracy_score(labels, scores.argmax(axis=1)))
            if len(present) == scores.shape[1] > 1:
                result["auc"] = float(np.mean([roc_auc_score(labels == k, scores[:, k]) for k in present]))
        return result


class PixelTally(MeanLoss):
    """IoU per class, their mean, and the accuracy of pixels (per cent), over all pixels of a split, by torchmetrics.

    Args:
        class_names: of all classes.
        ignored: label of pixels that do not count.
        process: this process.
    """

    def __init__(self, class_names: Sequence[str], ignored: int, process: Process) -> None:
        super().__init__()
        metrics = optional("torchmetrics.classification", "seg")
        count, self.class_names, self.ignored = len(class_names), class_names, ignored
        options = dict(sync_on_compute=False, validate_args=False)  # labels are checked when they are read
        self.confusion = metrics.MulticlassConfusionMatrix(count, ignore_index=ignored, **options)
        self.confusion.to(process.device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        super().add(loss, logits, labels)
        self.confusion.update(logits.argmax(dim=1), labels)

    def weight(self, labels: Tensor) -> int:
        return int((labels != self.ignored).sum())

    def summary(self, process: Process) -> dict[str, float]:
        flat = gather(self.confusion.confmat.cpu().flatten().unsqueeze(1), process).sum(dim=1)
        confusion = flat.view(len(self.class_names), -1).double()
        hits, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
        iou = 100 * hits / torch.where(union > 0, union, math.nan)  # a class that is nowhere has none
        total = float(confusion.sum()) or math.nan
        result = {"miou": float(iou.nanmean()), "pixel_accuracy": 100 * float(hits.sum()) / total}
        result.update({f"iou_{name}": float(value) for name, value in zip(self.class_names, iou)})
        return {**super().summary(process), **result}


class DiceTally(MeanLoss):
    """Dice of each class but the background, per volume and then in the mean, and HD95 (mm) if asked for, by MONAI.

    Volumes where a class is neither seen nor found do not count for it, nor, in HD95, those where it is one of both:
    there is no distance to nothing, so `hd95_undefined` counts them.

    Args:
        class_names: of all classes, background first.
        ignored: label of voxels that do not count, such as those of padding.
        spacings: mm per voxel of the volumes in the order in which they are counted, for HD95; None leaves it out.
    """

    def __init__(
        self, class_names: Sequence[str], ignored: int, spacings: Sequence[Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self.metrics = optional("monai.metrics", "volumes")
        self.names, self.ignored, self.spacings, self.counted = tuple(class_names), ignored, spacings, 0
        self.rows = [torch.zeros(0, (len(self.names) - 1) * (1 if spacings is None else 2), dtype=torch.float64)]

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        super().add(loss, logits, labels)
        void, count = labels == self.ignored, len(self.names)
        found, true = (x.masked_fill(void, 0) for x in (logits.detach().argmax(dim=1), labels))
        pairs = torch.stack([torch.bincount(x.flatten(), minlength=count**2) for x in count * true + found])
        pairs = pairs.view(-1, count, count).double()  # voxels by label and by class found
        size = (pairs.sum(dim=1) + pairs.sum(dim=2))[:, 1:]
        seen = size > 0
        columns = [torch.where(seen, 2 * pairs.diagonal(dim1=1, dim2=2)[:, 1:] / size, math.nan)]
        if self.spacings is not None:
            spacing = [list(mm) for mm in self.spacings[self.counted : self.counted + len(labels)]]
            self.counted += len(labels)
            options = dict(include_background=False, percentile=95, spacing=spacing)
            found, true = (torch.nn.functional.one_hot(x, count).movedim(-1, 1) for x in (found, true))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # MONAI warns of what it does itself, and of empty masks
                distances = self.metrics.compute_hausdorff_distance(found, true, **options)
            columns.append(torch.where(seen, distances, math.nan))
        self.rows.append(torch.cat([c.double().cpu() for c in columns], dim=1))

    def summary(self, process: Process) -> dict[str, float]:
        rows = gather(torch.cat(self.rows).T, process)  # (classes, volumes)
        dice = rows[: len(self.names) - 1]
        per_class = dice.nanmean(dim=1)
        result = {"mean_dice": float(per_class.nanmean())}
        result.update({f"dice_{name}": float(d) for name, d in zip(self.names[1:], per_class)})
        if self.spacings is not None:
            distances = rows[len(self.names) - 1 :]
            defined = torch.where(distances.isfinite(), distances, math.nan).nanmean(dim=1)
            result.update({"hd95": float(defined.nanmean())})
            result.update({f"hd95_{name}": float(d) for name, d in zip(self.names[1:], defined)})
            result["hd95_undefined"] = float((~dice.isnan() & ~distances.isfinite()).sum())
        return {**super().summary(process), **result}
