"""Point sampling and the colour augmentation of PointRend."""

import colorsys
import random

import numpy as np
import pytest
import torch

from detectron2.projects import point_rend
from detectron2.projects.point_rend import ColorAugSSDTransform
from detectron2.projects.point_rend.point_features import (
    generate_regular_grid_point_coords,
    get_uncertain_point_coords_with_randomness,
    point_sample,
)


def test_point_sample_is_exact_on_a_ramp():
    height, width = 6, 8
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    maps = torch.stack([x / width, y / height])[None].expand(2, -1, -1, -1)  # the value at a point is its coordinate
    inside = 0.5 / min(height, width)
    points = torch.rand(2, 9, 2) * (1 - 2 * inside) + inside
    torch.testing.assert_close(point_sample(maps, points), points.transpose(1, 2))
    grid = points[:, :8].view(2, 4, 2, 2)
    torch.testing.assert_close(point_sample(maps, grid), grid.permute(0, 3, 1, 2))


def test_point_sample_outside_is_zero_and_mode_is_passed_on():
    ones = torch.ones(1, 1, 4, 4)
    assert point_sample(ones, torch.tensor([[[-0.5, 0.5], [1.5, 0.5]]])).abs().max() == 0
    assert point_sample(ones, torch.tensor([[[0.0, 0.5]]])).item() == pytest.approx(0.5)  # half of the pixel is outside
    assert point_sample(ones, torch.tensor([[[0.01, 0.5]]]), mode="nearest").item() == 1


def test_regular_grid():
    grid = generate_regular_grid_point_coords(2, 3, "cpu")
    assert grid.shape == (2, 9, 2)
    torch.testing.assert_close(grid[1, 5], torch.tensor([5 / 6, 3 / 6]))
    torch.testing.assert_close(grid[0, 6], torch.tensor([1 / 6, 5 / 6]))


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_uncertain_points_are_the_most_uncertain_candidates(share):
    logits = torch.randn(3, 1, 7, 7)
    seen = {}

    def uncertainty(sampled):
        seen["values"] = -sampled.abs()
        return seen["values"]

    state = torch.get_rng_state()
    points = get_uncertain_point_coords_with_randomness(logits, uncertainty, 8, 3, share)
    # The candidates come first from the random stream, the uniform rest after them.
    torch.set_rng_state(state)
    candidates, count = torch.rand(3, 24, 2), int(share * 8)
    rest = torch.rand(3, 8 - count, 2)
    assert points.shape == (3, 8, 2)
    for b in range(3):
        best = sorted(range(24), key=lambda i: -seen["values"][b, 0, i].item())[:count]
        expected = {tuple(candidates[b, i].tolist()) for i in best}
        assert {tuple(point.tolist()) for point in points[b, :count]} == expected
    assert torch.equal(points[:, count:], rest)


def test_uncertain_points_of_no_masks_and_bad_ratios():
    def call(count, oversample, share):
        logits = torch.zeros(count, 1, 4, 4)
        return get_uncertain_point_coords_with_randomness(logits, lambda x: x, 6, oversample, share)

    assert call(0, 3, 0.75).shape == (0, 6, 2)
    with pytest.raises(AssertionError):
        call(1, 0.5, 0.75)
    with pytest.raises(AssertionError):
        call(1, 3, 1.5)


# ---------------------------------------------------------------------------------------------- colour


class ScriptedRandom:
    """Stands in for Python's ``random``: coins and values from a list, all calls recorded."""

    def __init__(self, coins, values=()):
        self.coins, self.values, self.calls = list(coins), list(values), []

    def randrange(self, stop):
        self.calls.append(("coin", stop))
        return self.coins.pop(0)

    def uniform(self, low, high):
        self.calls.append(("uniform", low, high))
        return self.values.pop(0)

    def randint(self, low, high):
        self.calls.append(("randint", low, high))
        return self.values.pop(0)


def script(monkeypatch, coins, values=()):
    from detectron2.projects.point_rend import color_augmentation

    scripted = ScriptedRandom(coins, values)
    monkeypatch.setattr(color_augmentation, "random", scripted)
    return scripted


@pytest.fixture
def image():
    return np.random.randint(0, 256, (6, 7, 3), dtype=np.uint8)


def test_all_coins_tails_changes_nothing(monkeypatch, image):
    scripted = script(monkeypatch, [0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ColorAugSSDTransform("BGR").apply_image(image), image)
    assert scripted.calls == [("coin", 2)] * 5


def test_order_of_the_draws(monkeypatch, image):
    coin = ("coin", 2)
    scripted = script(monkeypatch, [1, 1, 1, 1, 1], [3.0, 1.1, 0.9, 4])
    ColorAugSSDTransform("BGR").apply_image(image)
    contrast, saturation, hue = ("uniform", 0.5, 1.5), ("uniform", 0.5, 1.5), ("randint", -18, 18)
    assert scripted.calls == [coin, ("uniform", -32, 32), coin, coin, contrast, coin, saturation, coin, hue]
    scripted = script(monkeypatch, [0, 0, 1, 1, 1], [0.9, 4, 1.1])
    ColorAugSSDTransform("BGR").apply_image(image)
    assert scripted.calls == [coin, coin, coin, saturation, coin, hue, coin, contrast]


def test_brightness_and_contrast(monkeypatch, image):
    script(monkeypatch, [1, 1, 1, 0, 0], [-20.5, 1.5])
    out = ColorAugSSDTransform("BGR").apply_image(image)
    darker = np.floor(np.clip(image.astype(float) - 20.5, 0, 255))
    np.testing.assert_array_equal(out, np.floor(np.clip(darker * 1.5, 0, 255)))


def test_hue_turns_by_twice_the_draw(monkeypatch):
    blue_green_red = np.array([[[40, 200, 90], [250, 30, 20], [10, 60, 240]]], dtype=np.uint8)
    script(monkeypatch, [0, 0, 0, 1, 0], [17])
    out = ColorAugSSDTransform("BGR").apply_image(blue_green_red)
    for pixel, changed in zip(blue_green_red[0], out[0]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel[::-1] / 255.0))
        expected = np.array(colorsys.hsv_to_rgb((hue + 34 / 360) % 1, saturation, value))[::-1] * 255
        np.testing.assert_allclose(changed, expected, atol=5)  # 8-bit hue has steps of 2 degrees


def test_saturation_scales_the_distance_from_grey(monkeypatch):
    pixels = np.array([[[40, 200, 90], [250, 130, 120], [10, 60, 240]]], dtype=np.uint8)
    script(monkeypatch, [0, 0, 1, 0, 0], [0.5])
    out = ColorAugSSDTransform("BGR").apply_image(pixels)
    value = pixels.max(axis=2, keepdims=True).astype(float)
    np.testing.assert_allclose(out, value - 0.5 * (value - pixels), atol=3)


def test_rgb_and_bgr_agree_and_seeds_repeat(image):
    for seed in range(12):
        random.seed(seed)
        bgr = ColorAugSSDTransform("BGR").apply_image(image)
        random.seed(seed)
        rgb = ColorAugSSDTransform("RGB").apply_image(np.ascontiguousarray(image[..., ::-1]))
        np.testing.assert_array_equal(bgr, rgb[..., ::-1])
        assert rgb.dtype == np.uint8


def test_only_images_change(image):
    transform = ColorAugSSDTransform("RGB")
    points, labels = np.random.rand(4, 2), np.zeros((6, 7), dtype=np.uint8)
    assert transform.apply_coords(points) is points
    assert transform.apply_segmentation(labels) is labels
    with pytest.raises(AssertionError):
        ColorAugSSDTransform("L")


@pytest.mark.embedded_only
def test_pointrend_heads_need_upstream():
    with pytest.raises(NotImplementedError, match="PointRend.*install upstream"):
        point_rend.add_pointrend_config(None)
