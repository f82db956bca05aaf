"""Augmentation: from uint8 images to the float32 images that a network is trained on, on the device of the images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Augment", "normalised"]


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std in float32, channels last in memory; mean and std have shape (channels,)."""
    x = images.float().sub_(mean[:, None, None]).div_(std[:, None, None])
    return x.contiguous(memory_format=torch.channels_last)


class Augment(nn.Module):
    """Random crop after zero padding, mirror image of every second one, normalisation. In eval mode only the last.

    Args:
        padding: pixels that an image may be shifted by, in each direction.
        mirror: whether images may be mirrored left to right.
        mean, std: float32 (channels,), of the raw values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, padding: int, mirror: bool, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.padding, self.mirror = padding, mirror
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def draw(self, n: int, generator: torch.Generator | None = None, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The random numbers for ``n`` images, drawn by ``generator``, which must be of ``device``; None: torch's own.

        Returns:
            shifts int64 (2, n), down and to the right, in [0, 2 * padding]; flips bool (n,).
        """
        shifts = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator, device=device)
        if not self.mirror:
            return shifts, torch.zeros(n, dtype=torch.bool, device=device)
        return shifts, torch.rand(n, generator=generator, device=device) < 0.5

    def forward(
        self, images: Tensor, shifts: Tensor | None = None, flips: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images uint8 (n, channels, h, w) to float32 of that shape, channels last in memory. Never waits for the device.

        Args:
            shifts, flips: as from `draw`, on the device of the images; None: drawn there.
            generator: of that device, to draw with.
        """
        if self.training and (self.padding or self.mirror):
            if shifts is None or flips is None:
                shifts, flips = self.draw(len(images), generator, images.device)
            images = self._moved(images, shifts, flips)
        return normalised(images, self.mean, self.std)

    def _moved(self, images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        """One gather for the whole batch."""
        n, _, height, width = images.shape
        device = images.device
        rows = shifts[0][:, None] + torch.arange(height, device=device)
        columns = shifts[1][:, None] + torch.arange(width, device=device)
        columns = torch.where(flips[:, None], columns.flip(1), columns)
        padded = nn.functional.pad(images, (self.padding,) * 4)
        batch = torch.arange(n, device=device)[:, None, None]
        # An index in front, a slice, two indices: the indexed dimensions come first, so channels are last and go back to their place.
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
