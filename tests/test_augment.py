"""Augmentation: each sample is drawn separately, and what must not change is preserved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ImageEnhance import Brightness, Color, Contrast, Sharpness

from effv2.config.schema import AugmentConfig
from effv2.data.batches import (
    augment,
    mix_samples,
    one_hot,
    random_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
)
from effv2.data.rand_augment import CHANGES, _warped, rand_augment


def gradient_images(count: int = 16, size: int = 8) -> torch.Tensor:
    """Return equal images whose pixels all differ, so that every shift is visible."""
    image = torch.arange(3 * size * size, dtype=torch.uint8).view(1, size, size, 3)
    return image.expand(count, -1, -1, -1).contiguous().permute(0, 3, 1, 2)


def distinct(images: torch.Tensor) -> int:
    return len({image.numpy().tobytes() for image in images})


@pytest.mark.parametrize(
    "options",
    [
        {"crop": 2},
        {"resized_crop": 0.3},
        {"flip": True},
        {"trivial_augment": True},
        {"rand_augment": 10},
        {"erasing": 0.7},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_sample_is_drawn_separately_and_repeatably(options: dict[str, object]) -> None:
    config = AugmentConfig.model_validate(options)
    images = gradient_images()
    torch.manual_seed(0)
    first = augment(images, config)
    torch.manual_seed(0)
    assert torch.equal(first, augment(images, config))
    assert distinct(first) > 1
    assert first.shape == images.shape and first.dtype == torch.uint8
    assert torch.equal(images, gradient_images())  # the cache is unchanged


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_crop_shows_a_window_of_the_reflected_image(padding: int, seed: int) -> None:
    image = gradient_images(1)
    padded = torch.nn.functional.pad(image.float(), (padding,) * 4, mode="reflect").to(torch.uint8)
    torch.manual_seed(seed)
    cropped = random_crop(image, padding)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
    assert any(torch.equal(cropped[0], window) for window in windows)


def test_flip_mirrors_some_images() -> None:
    images = gradient_images(64)
    flipped = random_flip(images)
    mirrored = [torch.equal(after, before.flip(2)) for before, after in zip(images, flipped, strict=True)]
    same = [torch.equal(after, before) for before, after in zip(images, flipped, strict=True)]
    assert any(mirrored) and any(same) and sum(mirrored) + sum(same) == 64


def test_resized_crop_shows_a_part_in_its_place() -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(256, 3, 64, 64)  # the values grow from left to right
    torch.manual_seed(0)
    shown = random_resized_crop(ramp, 0.25).float()
    left, right = shown[:, :, 32, 0].mean(1), shown[:, :, 32, -1].mean(1)
    width = (right - left) / 252  # as a share of the image
    assert 0.4 < width.min() < 0.5 and 0.95 < width.max() <= 1.01
    assert left.min() < 10 and left.max() > 90
    assert torch.equal(random_resized_crop(ramp, 1.0)[0, 0, 0].float().diff() >= 0, torch.ones(63, dtype=torch.bool))


def test_rand_augment_changes_images_as_pillow_does_and_leaves_them_in_their_places() -> None:
    torch.manual_seed(0)
    plain = torch.arange(0, 250, 2, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    assert torch.equal(rand_augment(plain, 1e-6), plain)
    noise = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = Image.fromarray(noise.permute(1, 2, 0).numpy())
    for place, change in enumerate((Brightness, Color, Contrast, Sharpness)):
        for strength in (0.5, -0.5, 1.0):
            ours = CHANGES[place](noise[None], torch.tensor([strength]))[0].permute(1, 2, 0).numpy()
            theirs = np.asarray(change(image).enhance(1 + 0.9 * strength))
            inside = np.s_[1:-1, 1:-1]  # Pillow doesn't smooth the border
            assert np.abs(ours[inside].astype(int) - theirs[inside].astype(int)).max() <= 2
    turned = _warped(noise[None], torch.tensor([1.0]), torch.tensor([4]))[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(image.rotate(30, Image.Resampling.BILINEAR, fillcolor=(128,) * 3))
    assert np.median(np.abs(turned.astype(int) - theirs.astype(int))) <= 1


def test_erasing_removes_a_share_within_its_bounds() -> None:
    images = torch.full((256, 3, 32, 32), 9, dtype=torch.uint8)
    erased = (random_erasing(images, 1.0) == 0).float().mean((1, 2, 3))
    assert erased.min() > 0.005 and erased.max() < 0.4


@settings(max_examples=30)
@given(st.sampled_from([(0.4, 0.0), (0.0, 1.0), (0.3, 0.3)]), st.integers(0, 1000))
def test_mixing_keeps_pixels_and_targets_in_step(alphas: tuple[float, float], seed: int) -> None:
    """Each class has images of one value, so the mean of a mixed image gives its mixed target."""
    torch.manual_seed(seed)
    labels = torch.arange(16) % 2
    inputs = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    mixed, targets = mix_samples(inputs, one_hot(labels, 2, 0.0), AugmentConfig(mixup=alphas[0], cutmix=alphas[1]))
    assert torch.allclose(targets.sum(1), torch.ones(16), atol=1e-6)
    assert torch.allclose(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-5)


def test_smoothed_targets_are_torchs() -> None:
    logits, labels = torch.randn(5, 7), torch.arange(5)
    loss = torch.nn.functional.cross_entropy
    assert torch.allclose(loss(logits, one_hot(labels, 7, 0.1)), loss(logits, labels, label_smoothing=0.1))


def test_cutmix_shares_have_the_bits_that_finished_runs_had() -> None:
    torch.manual_seed(0)
    count, side = 32, 28  # 784 is no power of two, so 1 - inside and outside differ in their last bits
    inputs = torch.arange(count).float()[:, None, None, None].expand(-1, 3, side, side)
    mixed, targets = mix_samples(inputs, torch.eye(count), AugmentConfig(cutmix=1.0))
    inside = (mixed[:, 0] != inputs[:, 0]).flatten(1).float()
    expected, cut = 1 - inside.mean(1), inside.any(1)
    assert cut.sum() > 20 and torch.equal(targets.diagonal()[cut], expected[cut])
