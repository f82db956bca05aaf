"""The augmentation of images: every crop and mirror image comes up, seeded, and nothing else happens to them."""

import torch
from torch.nn.functional import pad

from bip_fast.experiments.data.augment import Augment


def raw(padding, mirror, channels=2):
    """Moves images and leaves their values alone."""
    return Augment(padding, mirror, torch.zeros(channels), torch.ones(channels))


def test_augment_crops_and_mirrors_each_image_on_its_own():
    images = torch.arange(200 * 2 * 5 * 7).remainder(251).to(torch.uint8).view(200, 2, 5, 7)
    found = raw(2, True)(images, generator=torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    seen = set()
    for image, result in zip(images, found, strict=True):
        wide = pad(image, (2, 2, 2, 2))
        crops = {
            (top, left, mirror): wide[:, top : top + 5, left : left + 7].flip(2) if mirror else wide[:, top : top + 5, left : left + 7]
            for top in range(5)
            for left in range(5)
            for mirror in (False, True)
        }
        matches = [key for key, crop in crops.items() if torch.equal(crop.float(), result)]
        assert matches
        seen.update(matches)
    assert len(seen) > 40  # of 50: all rows, columns and both orientations come up


def test_augment_is_seeded_and_can_be_given_its_numbers():
    images = torch.randint(0, 256, (50, 2, 6, 6), dtype=torch.uint8)
    augment = raw(1, True)
    first = augment(images, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, augment(images, *augment.draw(50, torch.Generator().manual_seed(5))))
    assert not torch.equal(first, augment(images, generator=torch.Generator().manual_seed(6)))
    torch.manual_seed(5)
    assert torch.equal(first, augment(images))


def test_augment_by_nothing_and_in_eval_mode_only_normalises():
    images = torch.randint(0, 256, (9, 2, 6, 6), dtype=torch.uint8)
    mean, std = torch.tensor([3.0, 100.0]), torch.tensor([2.0, 7.0])
    expected = (images - mean[:, None, None]) / std[:, None, None]
    for augment in (Augment(0, False, mean, std), Augment(4, True, mean, std).eval()):
        assert torch.equal(augment(images), expected)
