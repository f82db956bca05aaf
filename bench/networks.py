"""Networks whose training iterations are timed: batches on the device, and the precision they are trained in.

ResNet-20 and ResNet-18 in CIFAR form are those of `bip_fast.experiments`. ResNet-50 comes from torchvision or timm. The transformer has
the sizes of GPT-2 small: 12 layers, width 768, 12 heads, 85 million weights in Linear layers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bip_fast.experiments.models.names import build


class Block(nn.Module):
    """Attention and two Linear layers, each behind a norm: (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Decoder: tokens (batch, tokens) to logits (batch * tokens, words). The embedding is also the last layer, and is not pruned."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12, words: int = 50257, tokens: int = 1024) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.places.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.words.weight).flatten(0, 1)


class Network(NamedTuple):
    """How to make it and its batch; ``autocast`` on a GPU, None for fp32 (convolutions in TF32, as torch does it)."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.device], tuple[Tensor, Tensor]]
    batch_size: dict[str, int]
    autocast: torch.dtype | None = None


def resnet50() -> nn.Module:
    if importlib.util.find_spec("torchvision"):
        import torchvision

        return torchvision.models.resnet50()
    import timm

    return timm.create_model("resnet50")


def images(size: int, classes: int, count: dict[str, int]) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    def batch(device: torch.device) -> tuple[Tensor, Tensor]:
        n = count[device.type]
        x = torch.randn(n, 3, size, size, device=device).to(memory_format=torch.channels_last)
        return x, torch.randint(classes, (n,), device=device)

    return batch


def words(tokens: int, count: dict[str, int]) -> Callable[[torch.device], tuple[Tensor, Tensor]]:
    def batch(device: torch.device) -> tuple[Tensor, Tensor]:
        text = torch.randint(50257, (count[device.type], tokens + 1), device=device)
        return text[:, :-1].contiguous(), text[:, 1:].flatten()

    return batch


CIFAR, IMAGENET, TEXT = {"cpu": 32, "cuda": 128}, {"cpu": 4, "cuda": 128}, {"cpu": 1, "cuda": 8}
NETWORKS = {
    "resnet20": Network(lambda: build("resnet20", 3, 10), images(32, 10, CIFAR), CIFAR),
    "resnet18": Network(lambda: build("resnet18", 3, 10), images(32, 10, CIFAR), CIFAR),
    "resnet50": Network(resnet50, images(224, 1000, IMAGENET), IMAGENET, torch.bfloat16),
    "gpt2-small": Network(Transformer, words(1024, TEXT), TEXT, torch.bfloat16),
}
DEFAULT_NETWORKS = {"cpu": ("resnet20",), "cuda": tuple(NETWORKS)}


def missing(name: str) -> str | None:
    """What a network needs and is not installed, or None."""
    if name == "resnet50" and not any(importlib.util.find_spec(package) for package in ("torchvision", "timm")):
        return "resnet50 needs torchvision or timm"
    return None
