"""Weights of one model as a start for another: 2D for 3D, a classifier's for a segmenter, other input channels."""

from collections.abc import Mapping
from dataclasses import dataclass

from timm.models import adapt_input_conv
from torch import Tensor

from .backbone import Backbone

_STEM = "stem.conv1.weight"


@dataclass(frozen=True)
class Transfer:
    """What `transfer` did, as names of tensors.

    Attributes:
        taken: those of the model that now hold the weights given.
        kept: those of the model that are unchanged.
        unused: those given that the model has no place for.
    """

    taken: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]


def inflate(weights: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Return the weights of a 2D model as those of a 3D one with the same settings.

    Every kernel lies in the middle of the depth, zeros before and behind it, so that each slice of a volume goes its
    own way through the convolutions. On a volume that is constant along depth the 3D model gives what the 2D one gives
    on a slice, borders included: f and its fixed point, and the logits. (Away from it, solvers take other steps: the
    norm of a state counts voxels.)

    Args:
        weights: 2D weights under this package's names; what has no 3D counterpart passes through.
        model: the 3D model.
    """
    own = model.state_dict()
    return {
        name: _centred(value, own[name].shape[2]) if name in own and (value.ndim, own[name].ndim) == (4, 5) else value
        for name, value in weights.items()
    }


def _centred(kernel: Tensor, depth: int) -> Tensor:
    """Return a kernel `(out, in, H, W)` in the middle slice of one of zeros `(out, in, depth, H, W)`."""
    inflated = kernel.new_zeros((*kernel.shape[:2], depth, *kernel.shape[2:]))
    inflated[:, :, depth // 2] = kernel
    return inflated


def adapt_input(weights: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Return weights whose stem takes the model's number of input channels, by timm's rule, in 2D and 3D."""
    kernel, num_channels = weights.get(_STEM), model.stem.conv1.weight.shape[1]
    if kernel is None or kernel.ndim != model.spatial_dims + 2 or kernel.shape[1] == num_channels:
        return dict(weights)
    # timm's function wants images: (out, in, *S) -> (out, in, S_0, rest)
    flat = adapt_input_conv(num_channels, kernel.flatten(3), base_chans=kernel.shape[1])
    return {**weights, _STEM: flat.unflatten(3, kernel.shape[3:])}


def transfer(weights: Mapping[str, Tensor], model: Backbone) -> Transfer:
    """Load into a model what fits of another's weights, and return what was taken and what was not.

    The other may be a classifier where the model is a segmenter or the reverse, 2D where it is 3D, or of other input
    channels or classes. Stem and equilibrium have to fit; the head and the classifier may stay as they are.

    Args:
        weights: the other model's state dict, under this package's names.
        model: the model.

    Raises:
        ValueError: if the equilibrium does not fit; the model is then unchanged.
    """
    own = model.state_dict()
    weights = adapt_input(inflate(weights, model), model)
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    kept = tuple(name for name in own if name not in fitting)
    unused = tuple(name for name in weights if name not in fitting)
    misfit = [
        name
        for name in (*kept, *unused)
        if name.startswith(("stem.", "inject.", "equilibrium.")) and not name.endswith("num_batches_tracked")
    ]  # which old files lack
    if misfit:
        raise ValueError(f"{len(set(misfit))} tensors of the stem or the equilibrium do not fit, such as {misfit[0]}")
    model.load_state_dict(fitting, strict=False)
    return Transfer(tuple(fitting), kept, unused)
