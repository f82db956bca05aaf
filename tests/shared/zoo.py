"""Networks as people have them, small and from configuration: each with an input, and what a loss takes of its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bip_fast.experiments.models.names import build


class Entry(NamedTuple):
    model: Callable[[], nn.Module]
    example: Callable[[], Tensor]


def images(size: int = 16) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))


def words() -> Tensor:
    return torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(5))


def vgg16_bn(width: int = 8) -> nn.Module:
    layers, inputs = [], 3
    for outputs in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8):
        if outputs:
            layers += [nn.Conv2d(inputs, width * outputs, 3, padding=1), nn.BatchNorm2d(width * outputs), nn.ReLU(inplace=True)]
            inputs = width * outputs
        else:
            layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Sequential(*head))


class InvertedResidual(nn.Module):
    """Of MobileNet-V2: expand, filter each channel, project; added to the input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.joins = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.joins else self.body(x)


def mobilenet() -> nn.Module:
    blocks = [InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 16, 2, 4), InvertedResidual(16, 16, 1, 4)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), *blocks,
        nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width: int = 16, depth: int = 2, patch: int = 4, size: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """Tied embedding and output layer."""

    def __init__(self, words: int = 40, width: int = 16, depth: int = 2, length: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device)))))


ZOO = {
    "resnet18": Entry(lambda: build("resnet18", 3, 10, width=8), images),
    "resnet20": Entry(lambda: build("resnet20", 3, 10, width=8), images),
    "mobilenet": Entry(mobilenet, images),
    "vgg16_bn": Entry(vgg16_bn, lambda: images(32)),
    "vit": Entry(ViT, images),
    "gpt": Entry(GPT, words),
}
