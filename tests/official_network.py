"""The official networks once more, written as functions of official state dicts: what the models must agree with.

Independent of the package: it knows the official names and what they do, and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


class Official:
    """An official network in evaluation mode, unrolled from zero instead of solved; weights without prefixes."""

    def __init__(self, weights: Weights, *, stride: int, cell: str = "fullstage") -> None:
        self.w, self.stride, self.cell = weights, stride, cell
        self.branches = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith(f"{cell}.branches."))

    def kernel(self, name: str) -> Tensor:
        if f"{name}.weight" in self.w:
            return self.w[f"{name}.weight"]
        v, g = self.w[f"{name}.weight_v"], self.w[f"{name}.weight_g"]
        return v * (g / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self.kernel(name)
        return F.conv2d(x, kernel, self.w.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)

    def gn(self, x: Tensor, name: str, groups: int = 8) -> Tensor:
        return F.group_norm(x, groups, self.w.get(f"{name}.weight"), self.w.get(f"{name}.bias"))

    def bn(self, x: Tensor, name: str) -> Tensor:
        stats = self.w[f"{name}.running_mean"], self.w[f"{name}.running_var"]
        return F.batch_norm(x, *stats, self.w.get(f"{name}.weight"), self.w.get(f"{name}.bias"))

    def block(self, z: Tensor, u: Tensor, name: str) -> Tensor:
        a = F.relu(self.gn(self.conv(z, f"{name}.conv1"), f"{name}.gn1"))
        c = self.gn(self.conv(a, f"{name}.conv2") + u, f"{name}.gn2") + z
        return self.gn(F.relu(c), f"{name}.gn3")

    def link(self, x: Tensor, i: int, j: int) -> Tensor:
        name = f"{self.cell}.fuse_layers.{i}.{j}.net"
        if i == j:
            return x
        if i < j:
            x = self.gn(self.conv(x, f"{name}.conv"), f"{name}.gnorm")
            return F.interpolate(x, scale_factor=2 ** (j - i), mode="nearest")
        for step in range(i - j):
            x = self.gn(self.conv(x, f"{name}.{step}.conv", 2), f"{name}.{step}.gnorm")
            x = F.relu(x) if step < i - j - 1 else x
        return x

    def f(self, z: list[Tensor], u: list[Tensor]) -> list[Tensor]:
        all_ = range(self.branches)
        out = [self.block(z[i], u[i], f"{self.cell}.branches.{i}.blocks.0") for i in all_]
        fused = [sum(self.link(out[j], i, j) for j in all_) for i in all_]
        post = f"{self.cell}.post_fuse_layers"
        return [self.gn(self.conv(F.relu(fused[i]), f"{post}.{i}.conv"), f"{post}.{i}.gnorm", 4) for i in all_]

    def state(self, x: Tensor, steps: int) -> list[Tensor]:
        strides = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[self.stride]
        x = F.relu(self.bn(self.conv(x, "downsample.0", strides[0]), "downsample.1"))
        x = F.relu(self.bn(self.conv(x, "downsample.3", strides[1]), "downsample.4"))
        if "stage0.0.weight" in self.w:
            x = F.relu(self.bn(self.conv(x, "stage0.0"), "stage0.1"))
        u = [x]
        for i in range(1, self.branches):
            channels = len(self.w[f"{self.cell}.branches.{i}.blocks.0.gn3.weight"])
            u.append(x.new_zeros(len(x), channels, u[-1].shape[2] // 2, u[-1].shape[3] // 2))
        z = [torch.zeros_like(u_i) for u_i in u]
        for _ in range(steps):
            z = self.f(z, u)
        return z

    def bottleneck(self, x: Tensor, name: str) -> Tensor:
        y = F.relu(self.bn(self.conv(x, f"{name}.conv1"), f"{name}.bn1"))
        y = F.relu(self.bn(self.conv(y, f"{name}.conv2"), f"{name}.bn2"))
        y = self.bn(self.conv(y, f"{name}.conv3"), f"{name}.bn3")
        return F.relu(y + self.bn(self.conv(x, f"{name}.downsample.0"), f"{name}.downsample.1"))

    def classify(self, x: Tensor, steps: int) -> Tensor:
        z = self.state(x, steps)
        y = self.bottleneck(z[0], "incre_modules.0.0")
        for i in range(self.branches - 1):
            down = F.relu(self.bn(self.conv(y, f"downsamp_modules.{i}.0", 2), f"downsamp_modules.{i}.1"))
            y = self.bottleneck(z[i + 1], f"incre_modules.{i + 1}.0") + down
        y = F.relu(self.bn(self.conv(y, "final_layer.0"), "final_layer.1"))
        return F.linear(y.mean((2, 3)), self.w["classifier.weight"], self.w["classifier.bias"])

    def segment(self, x: Tensor, steps: int) -> Tensor:
        """Return scores at the resolution of branch 0."""
        z = self.state(x, steps)
        size = z[0].shape[2:]
        z = [F.interpolate(z_i, size=size, mode="bilinear", align_corners=True) for z_i in z]
        y = F.relu(self.bn(self.conv(torch.cat(z, 1), "last_layer.0"), "last_layer.1"))
        return self.conv(y, "last_layer.3")
