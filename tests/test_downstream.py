"""The models as backbones: decoders of segmentation_models_pytorch, detectors of torchvision."""

from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import mdeq

DECODERS = [smp.Unet, smp.UnetPlusPlus, smp.MAnet, smp.Linknet, smp.FPN, smp.PSPNet, smp.UPerNet, smp.Segformer]
IMAGENET = ["test_mdeq", "mdeq_small", "mdeq_large", "mdeq_xlarge"]


def segmentation_model(decoder: Any, encoder: str = "tu-test_mdeq", **kwargs: Any) -> nn.Module:
    model = decoder(encoder, encoder_weights=None, classes=3, **kwargs)
    model.encoder.model.model.deq.solver = mdeq.Broyden(max_steps=3)
    model.encoder.model.model.deq.gradient = mdeq.ImplicitGradient(mdeq.Broyden(max_steps=3))
    return model


def without_gradient(model: nn.Module) -> list[str]:
    """Return the parameters that DistributedDataParallel would call unused."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", IMAGENET)
def test_maps_of_the_imagenet_family(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    maps = model(torch.empty(1, 3, 64, 96, device="meta"), solver=mdeq.Picard(max_steps=1))
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // r, 96 // r) for c, r in zip(model.feature_info.channels(), model.feature_info.reduction())
    ]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.__name__)
def test_decoders_train(decoder: Any) -> None:
    model = segmentation_model(decoder, in_channels=5).train()
    solves: list[mdeq.SolveStats] = []
    implicit = model.encoder.model.model.equilibrium
    implicit.register_forward_hook(lambda module, args, result: solves.append(result.stats))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(torch.randn(2, 5, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    nn.functional.cross_entropy(logits, torch.randint(3, (2, 64, 64))).backward()
    assert without_gradient(model) == []
    optimizer.step()
    moved = [name for name, p in model.encoder.named_parameters() if not torch.equal(p, before[f"encoder.{name}"])]
    assert "model.model.stem.conv1.weight" in moved
    assert any(name.startswith("model.model.equilibrium.cell.") for name in moved)
    assert len(solves) == 1
    assert solves[0].residual.shape == (2,)


@pytest.mark.parametrize("channels", [1, 3])
def test_shallower_encoder(channels: int) -> None:
    model = segmentation_model(smp.Unet, in_channels=channels, encoder_depth=4, decoder_channels=(32, 16, 8, 4)).train()
    logits = model(torch.randn(2, channels, 64, 64))
    assert logits.shape == (2, 3, 64, 64)
    logits.square().mean().backward()
    assert without_gradient(model) == []


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = segmentation_model(smp.FPN, in_channels=1).eval()
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    again.encoder.model.model.deq.solver = model.encoder.model.model.deq.solver
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("decoder", [smp.DeepLabV3, smp.DeepLabV3Plus, smp.PAN], ids=lambda decoder: decoder.__name__)
def test_dilation_is_refused(decoder: Any) -> None:
    with pytest.raises(ValueError, match="output_stride of test_mdeq must be 32"):
        segmentation_model(decoder)


def test_output_stride_of_the_coarsest_branch() -> None:
    timm.create_model("test_mdeq", features_only=True, output_stride=32)
    timm.create_model("mdeq_tiny_cifar", features_only=True, output_stride=2)
    with pytest.raises(ValueError, match="output_stride of mdeq_tiny_cifar must be 2"):
        timm.create_model("mdeq_tiny_cifar", features_only=True, output_stride=32)


@pytest.mark.slow
def test_official_backbone_in_a_decoder() -> None:
    model = segmentation_model(smp.UPerNet, "tu-mdeq_small").train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert without_gradient(model) == []


class PyramidBackbone(nn.Module):
    """Branches of strides 4 to 32, and 64, with the same number of channels."""

    def __init__(self, name: str, out_channels: int) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
        self.body.model.deq.solver = mdeq.Broyden(max_steps=3)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): m for i, m in enumerate(self.body(x))})


@pytest.mark.parametrize("detector", [FasterRCNN, RetinaNet], ids=lambda detector: detector.__name__)
def test_detectors_train(detector: Any) -> None:
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,), (128,), (256,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5)
    name = "rpn_anchor_generator" if detector is FasterRCNN else "anchor_generator"
    backbone = PyramidBackbone("test_mdeq", 16)
    model = detector(backbone, num_classes=3, min_size=64, max_size=96, **{name: anchors}).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
    targets = [dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1])) for _ in images]
    loss = sum(model(images, targets).values())
    assert torch.isfinite(loss)
    loss.backward()
    assert without_gradient(model) == []
    detections = model.eval()(images)
    assert [set(d) for d in detections] == [{"boxes", "labels", "scores"}] * 2
