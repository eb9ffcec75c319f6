"""What is read, predicted and written for one input of tools/predict.py: image or volume, class or label map."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2

import mdeq
from tools import images, pictures, volumes
from tools.batches import MIN_SIZE, memory_for
from tools.build import find_device, image_spec
from tools.checkpoint import make_folder, write_atomically
from tools.config import BadInput
from tools.inference import Inference, SlidingWindow, whole
from tools.pictures import Colour, contact_sheet, framed, indexed, overlaid
from tools.predictions import Result, solve_record
from tools.pretrained import Trained
from tools.volumes import Preprocessing, Volume

MOST_LABELS = 256
"""Classes that fit into the 8 bits of a label map."""


@dataclass(frozen=True)
class Settings:
    """What the command line says, see tools/predict.py."""

    out: Path
    topk: int = 5
    batch_size: int = 1
    size: tuple[int, int] | None = None
    patch: tuple[int, ...] | None = None
    whole: bool = False
    overlap: float = 0.5
    orientation: str | None = None
    solver_steps: int | None = None
    device: torch.device = torch.device("cpu")


def settings_of(arguments: argparse.Namespace, **more: Any) -> Settings:
    """Return settings of the arguments that predict.py and visualize.py share, and more."""
    size, patch = arguments.size, arguments.patch
    return Settings(
        out=arguments.out,
        size=None if size is None else (size[0], size[-1]),
        patch=None if patch is None else tuple(patch),
        whole=arguments.whole,
        orientation=arguments.orientation,
        device=find_device(arguments.device, "--device"),
        **more,
    )


@dataclass(frozen=True)
class Sample:
    """An input: number in the order given, file, name of its outputs, what the model sees `(C, *S)`, what was read."""

    number: int
    path: Path
    name: str
    x: Tensor
    origin: Image.Image | Volume | None  # of a classifier's image nothing is needed any more


class Predictor:
    """Predicts inputs; `read` and `finish` are those of the kind of model."""

    def __init__(self, trained: Trained, settings: Settings) -> None:
        model = trained.model
        self.model, self.names, self.settings = model.to(settings.device), trained.label_names, settings
        self.solver = model.deq.solver
        if settings.solver_steps is not None:
            self.solver = dataclasses.replace(self.solver, max_steps=settings.solver_steps)
        self.dense, self.is_3d = isinstance(model, mdeq.MDEQSegmenter), model.spatial_dims == 3
        if self.is_3d and settings.size is not None:
            raise BadInput("--size is for images; a volume keeps its size (segmenters: --patch for windows)")
        if not self.is_3d and settings.orientation is not None:
            raise BadInput("--orientation is for volumes, the model takes images")
        if self.dense and model.num_classes > MOST_LABELS:
            raise BadInput(f"a label map holds at most {MOST_LABELS} classes, the model has {model.num_classes}")
        self.colours: tuple[Colour, ...] = ()
        if self.dense:
            self.colours = pictures.label_colours(self.names, trained.config.get("label_colors"))
        self.preprocessing = Preprocessing.of_record(trained.config.get("preprocessing") or {})
        if settings.orientation is not None:
            self.preprocessing = dataclasses.replace(self.preprocessing, orientation=settings.orientation)
        self.inference = self._inference()
        self.suffixes = (".nii", ".nii.gz") if self.is_3d else images.SUFFIXES
        # Windows of one input fill a batch; whole inputs of one size share one.
        self.batch_size = settings.batch_size if self.inference is whole and not self.is_3d else 1
        self._transform: Callable[[Image.Image], Tensor] = self._image_transform()

    def _inference(self) -> Inference:
        settings = self.settings
        if settings.patch is not None and not self.dense:
            raise BadInput("--patch is for segmentation; a classifier sees the whole input")
        size = settings.patch
        if size is None and self.dense and self.is_3d and not settings.whole:
            size = self.preprocessing.patch_size or None
        if size is None:
            return whole
        dims = self.model.spatial_dims
        size = size * dims if len(size) == 1 else size
        if len(size) != dims or min(size) < MIN_SIZE:
            raise BadInput(
                f"--patch must be one or {dims} numbers of at least {MIN_SIZE}, got {' '.join(map(str, size))}"
            )
        return SlidingWindow(size, settings.overlap, settings.batch_size, progress=sys.stderr.isatty())

    def _image_transform(self) -> Callable[[Image.Image], Tensor]:
        spec = image_spec(self.model, None)
        if self.dense:
            resize = [v2.Resize(list(self.settings.size), antialias=True)] if self.settings.size else []
            to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
            return v2.Compose([*to_float, *resize, v2.Normalize(spec.mean, spec.std)])
        size = (spec.size[0], *self.settings.size) if self.settings.size else spec.size
        transform: Any = create_transform(
            size, interpolation=spec.interpolation, mean=spec.mean, std=spec.std, crop_pct=spec.crop_pct
        )
        return transform

    def read(self, number: int, path: Path, name: str) -> Sample:
        """Return an input as the model sees it.

        Raises:
            BadInput: if it cannot be read, or is no input for the model.
        """
        if self.is_3d:
            with memory_for(str(path), "the spacing it is resampled to", "larger"):
                volume, x = self._volume(path)
            return Sample(number, path, name, x, volume)
        if path.name.lower().endswith((".nii", ".nii.gz")):
            raise BadInput(f"{path} is a volume, the model takes images")
        image = images.read_picture(path, self.model.in_chans)
        if self.dense and min(image.size) < MIN_SIZE:
            raise BadInput(f"{path} is {image.width}x{image.height}; every side must be at least {MIN_SIZE} pixels")
        with memory_for(str(path), "--size"):
            x = self._transform(image)
        return Sample(number, path, name, x, image if self.dense else None)

    def _volume(self, path: Path) -> tuple[Volume, Tensor]:
        if not path.name.lower().endswith(self.suffixes):
            raise BadInput(f"{path} is not a NIfTI file (.nii, .nii.gz), the model takes volumes")
        volume = volumes.load_volume(path, self.model.in_chans)
        if self.preprocessing.orientation == "RAS" and not volume.has_affine:
            raise BadInput(
                f"{path} has no affine, so its orientation is unknown; --orientation none uses its axes as they are"
            )
        if float(volume.voxels.min()) == float(volume.voxels.max()):
            raise BadInput(
                f"{path} has the same value everywhere ({float(volume.voxels.min()):g}); there is nothing to predict"
            )
        x, _ = volumes.prepare(volume, self.preprocessing)
        return volume, x

    @property
    def least(self) -> tuple[int, ...]:
        """The size up to which a volume is padded: that of the training patches, where it is recorded."""
        return tuple(max(MIN_SIZE, n) for n in self.preprocessing.patch_size or (MIN_SIZE,) * 3)

    def window(self, x: Tensor) -> Tensor:
        """Return inputs `(B, C, *S)` whole or, where they would be predicted by windows, the one in the middle."""
        x = volumes.padded(x, self.least) if self.is_3d else x
        if isinstance(self.inference, SlidingWindow):
            x = volumes.unpadded(x, [min(n, s) for n, s in zip(x.shape[2:], self.inference.size)])
        return x.to(self.settings.device)

    @torch.inference_mode()
    def predict(self, samples: Sequence[Sample]) -> list[Result]:
        """Return the results of inputs of one size, after writing their files.

        Raises:
            BadInput: if memory runs out.
        """
        options = "--batch-size or --patch" if self.dense else "--batch-size or --size"
        with memory_for(str(samples[0].path), "--batch-size" if self.is_3d and not self.dense else options):
            x = torch.stack([sample.x for sample in samples])
            shape = x.shape[2:]
            if self.is_3d:
                x = volumes.padded(x, self.least)
            logits, solves = self.inference(self.model, x.to(self.settings.device), solver=self.solver)
            if self.dense and self.is_3d:
                logits = volumes.unpadded(logits, shape)
            logits = logits.cpu()
        results = []
        for k, sample in enumerate(samples):
            solve = solve_record(solves, k if len(samples) > 1 else None)
            result = Result(sample.number, sample.path, solve=solve)
            if not bool(torch.isfinite(logits[k]).all()):
                results.append(dataclasses.replace(result, error=f"{sample.path}: the model's output is not finite"))
                continue
            finish = self._classes if not self.dense else self._volume_labels if self.is_3d else self._image_labels
            try:
                with memory_for(
                    f"{sample.path}, with scores of {logits.shape[1]} classes on its own grid,", "the file"
                ):
                    results.append(finish(sample, logits[k], result))
            except BadInput as error:
                results.append(dataclasses.replace(result, error=str(error)))
        return results

    def _classes(self, sample: Sample, logits: Tensor, result: Result) -> Result:
        probabilities, classes = logits.double().softmax(dim=0).topk(min(self.settings.topk, len(logits)))
        found = list(zip(classes.tolist(), probabilities.tolist()))
        return dataclasses.replace(result, classes=found)

    def _shares(self, labels: np.ndarray) -> list[tuple[int, float]]:
        """Return the classes that occur and their shares, the largest first."""
        counts = np.bincount(labels.ravel(), minlength=len(self.names)) / labels.size
        return [(int(k), float(counts[k])) for k in np.argsort(-counts, kind="stable") if counts[k] > 0]

    @property
    def clear(self) -> int | None:
        """The class that overlays leave out."""
        return 0 if self.names[0].lower() == "background" else None

    def _image_labels(self, sample: Sample, logits: Tensor, result: Result) -> Result:
        image = cast(Image.Image, sample.origin)
        size = (image.height, image.width)
        if tuple(logits.shape[1:]) != size:
            logits = F.interpolate(logits.unsqueeze(0), size=size, mode="bilinear").squeeze(0)
        labels = logits.argmax(dim=0).byte().numpy()
        raw = indexed(labels, self.colours)
        seen = overlaid(image, labels, self.colours, self.clear)
        shares = self._shares(labels)
        result = dataclasses.replace(result, classes=shares)
        files = {
            "labels": (f"{sample.name}_labels.png", raw),
            "map": (f"{sample.name}_map.png", self._framed(raw.convert("RGB"), shares, result)),
            "overlay": (f"{sample.name}_overlay.png", self._framed(seen, shares, result, smooth=True)),
        }
        return self._written(result, {kind: (name, _png(picture)) for kind, (name, picture) in files.items()})

    def _volume_labels(self, sample: Sample, logits: Tensor, result: Result) -> Result:
        volume, how = cast(Volume, sample.origin), self.preprocessing
        labels = volumes.restore(logits, volume, how)
        shares = self._shares(labels.numpy())
        result = dataclasses.replace(result, classes=shares)
        grey = volumes.oriented(volume.voxels[:1], volume, how.orientation)[0].numpy()
        turned = volumes.oriented(labels.unsqueeze(0), volume, how.orientation)[0].numpy()
        # The spacing of the file's grid in the order of the prepared axes.
        spacing = volumes.prepared_spacing(volume, dataclasses.replace(how, spacing=None))
        sheet = contact_sheet(grey, turned, spacing, self.colours, self.clear)
        axes = "axial slices, right to the right, front up" if how.orientation == "RAS" else "slices of the last axis"
        files = {
            "labels": (f"{sample.name}_labels.nii.gz", lambda path: volumes.save_labels(path, labels, volume)),
            "sheet": (
                f"{sample.name}_sheet.png",
                _png(self._framed(sheet, shares, result, f"  ({axes})", smooth=True)),
            ),
        }
        return self._written(result, files)

    def _framed(
        self,
        picture: Image.Image,
        shares: list[tuple[int, float]],
        result: Result,
        about: str = "",
        *,
        smooth: bool = False,
    ) -> Image.Image:
        legend = [(self.colours[k], f"{self.names[k]}  {100 * share:.1f} %") for k, share in shares]
        solve = result.solve
        note = f"{solve['status']}, residual {solve['residual']:.1e}, {solve['evaluations']} evaluations"
        return framed(picture, result.path.name + about, legend, note=note, warning=result.warning, smooth=smooth)

    def _written(self, result: Result, files: dict[str, tuple[str, Callable[[Path], Any]]]) -> Result:
        """Write files into the output folder, each whole or not at all."""
        make_folder(self.settings.out)
        for name, write in files.values():
            write_atomically(self.settings.out / name, write)
        return dataclasses.replace(result, outputs={kind: name for kind, (name, _) in files.items()})


def _png(image: Image.Image) -> Callable[[Path], None]:
    return lambda path: image.save(path, "PNG")
