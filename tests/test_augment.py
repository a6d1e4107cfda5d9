"""Augmentation: what is done to an image is what the label says, and a label of zero means nothing."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alpenglow.distillation.augment import AUGMENT_DIM, SCALE, SHIFT, STRETCH, _turn, _warp, augment
from tests.tiny import random_denoiser

STILL = torch.zeros(2)
# The places in the label: flips, scale, turn, stretch, shift.
ACROSS, ALONG, GROWN, TURNED, STRETCHED, SHIFTED = [0], [1], [2], [3, 4], [5, 6], [7, 8]


def rough(height: int = 16, width: int = 16, *, channels: int = 2) -> Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(1))


def pixels(height: int, width: int) -> tuple[Tensor, Tensor]:
    """How far right of and below the centre each pixel is."""
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
    )
    return x, y


def blob(right: float, down: float, *, height: int = 128, width: int = 128) -> Tensor:
    """A bright spot; the images are so large that no mirror image of it gets near."""
    x, y = pixels(height, width)
    return torch.exp(-((x - right) ** 2 + (y - down) ** 2) / (2 * 1.5**2))[None]


def weigh(image: Tensor) -> tuple[Tensor, Tensor]:
    """Where the spot in the middle of the image is, (right, down), and its sum."""
    x, y = pixels(*image.shape[1:])
    inner = image[0] * ((x.abs() < 28) & (y.abs() < 28))
    top = inner.argmax()
    spot = image[0] * (((x - x.flatten()[top]).abs() < 10) & ((y - y.flatten()[top]).abs() < 10))
    return torch.stack([(spot * x).sum(), (spot * y).sum()]) / spot.sum(), spot.sum()


def near(image: Tensor, *places: Tensor) -> bool:
    """Whether the spot is at one of the places, to a fiftieth of a pixel."""
    return min((weigh(image)[0] - place).abs().max() for place in places).item() < 0.02


def only(places: list[int], image: Tensor, probability: float = 0.2) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten augmentations of `image` in which only those numbers of the label are not zero."""
    found = 0
    for seed in range(10_000):
        changed, label = augment(image, probability, torch.Generator().manual_seed(seed))
        if set(label.nonzero().flatten().tolist()) == set(places):
            yield changed, label
            if (found := found + 1) == 10:
                return
    raise AssertionError(f"found {found} augmentations with {places} alone")


def test_probability_zero_is_the_identity() -> None:
    image = rough()
    for seed in range(20):
        changed, label = augment(image, 0.0, torch.Generator().manual_seed(seed))
        assert torch.equal(changed, image)
        assert torch.equal(label, torch.zeros(AUGMENT_DIM))


@pytest.mark.parametrize(("places", "axes"), [(ACROSS, [2]), (ALONG, [1]), (ACROSS + ALONG, [1, 2])])
def test_flips_are_exact(places: list[int], axes: list[int]) -> None:
    image = rough()
    for changed, label in only(places, image):
        assert torch.equal(changed, image.flip(axes))
        assert torch.equal(label[places], torch.ones(len(places)))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 192)])
def test_a_shift_moves_by_what_the_label_says(height: int, width: int) -> None:
    """Right and down, in eighths of the image."""
    checked = 0
    for changed, label in only(SHIFTED, blob(3.0, -2.0, height=height, width=width)):
        place = torch.tensor([3.0, -2.0]) + SHIFT * label[SHIFTED] * torch.tensor([width, height])
        if place.abs().max() < 20:
            assert near(changed, place)
            checked += 1
    assert checked > 3


def test_a_turn_is_counterclockwise() -> None:
    """A spot on the right goes up (its y falls) by the sine in the label."""
    for changed, label in only(TURNED, blob(15.0, 0.0)):
        cosine, sine = label[3] + 1, label[4]
        assert (cosine**2 + sine**2).item() == pytest.approx(1.0, abs=1e-5)
        assert near(changed, 15 * torch.stack([cosine, -sine]))


def test_a_scale_moves_and_grows() -> None:
    image, place = blob(8.0, 4.0), torch.tensor([8.0, 4.0])
    for changed, label in only(GROWN, image):
        factor = torch.exp(SCALE * label[2])
        assert near(changed, factor * place)
        assert weigh(changed)[1] / image.sum() == pytest.approx(factor.item() ** 2, rel=5e-3)


def stretches(label: Tensor) -> list[Tensor]:
    """The two maps that a label may mean: it gives the axis up to its sense, the factor up to its inverse."""
    log_factor, axis = STRETCH * label[STRETCHED].norm(), torch.atan2(label[6], label[5])
    # Counterclockwise, and y points down.
    along, across = torch.stack([axis.cos(), -axis.sin()]), torch.stack([axis.sin(), axis.cos()])
    return [
        torch.exp(f) * torch.outer(along, along) + torch.exp(-f) * torch.outer(across, across)
        for f in (log_factor, -log_factor)
    ]


def test_a_stretch_is_along_its_axis_and_keeps_the_area() -> None:
    image, place = blob(8.0, 4.0), torch.tensor([8.0, 4.0])
    for changed, label in only(STRETCHED, image):
        assert near(changed, *(stretch @ place for stretch in stretches(label)))
        assert weigh(changed)[1] == pytest.approx(image.sum().item(), rel=5e-3)


def test_half_of_the_stretches_are_along_the_image() -> None:
    labels = torch.stack([augment(rough(4, 4), 1.0, torch.Generator().manual_seed(s))[1] for s in range(400)])
    share = (labels[:, 6] == 0).float().mean()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(400)


def test_all_of_them_together() -> None:
    """Flipped, scaled, turned, stretched, then shifted: a spot goes where the label sends it."""
    checked = 0
    for seed in range(60):
        changed, label = augment(blob(6.0, 3.0), 1.0, torch.Generator().manual_seed(seed))
        cosine, sine = label[3] + 1, label[4]
        turn = torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])])
        flipped = torch.tensor([6.0, 3.0]) * (1 - 2 * label[ACROSS + ALONG])
        shift = SHIFT * 128 * label[SHIFTED]
        places = [s @ turn @ flipped * torch.exp(SCALE * label[2]) + shift for s in stretches(label)]
        if max(place.abs().max() for place in places) < 20:
            assert near(changed, *places)
            checked += 1
    assert checked > 20


def test_the_numbers_are_normal() -> None:
    """At probability 1: scale, stretch and shift of unit variance, the turn uniform, half of the flips."""
    count = 1000
    labels = torch.stack(
        [augment(rough(4, 4), 1.0, torch.Generator().manual_seed(s))[1] for s in range(count)]
    )
    for column in (GROWN[0], *SHIFTED):
        assert abs(labels[:, column].mean()) < 4 / math.sqrt(count)
        assert abs(labels[:, column].std() - 1) < 4 / math.sqrt(2 * count)
    # A square of a normal number has the variance 2.
    assert abs(labels[:, STRETCHED].square().sum(1).mean() - 1) < 4 * math.sqrt(2 / count)
    for column, mean in ((ACROSS[0], 0.5), (ALONG[0], 0.5), (TURNED[0], -1.0), (TURNED[1], 0.0)):
        assert abs(labels[:, column].mean() - mean) < 4 * math.sqrt(0.5 / count)


@pytest.mark.parametrize("pixels_right", [3, -2])
def test_a_whole_shift_moves_whole_pixels(pixels_right: int) -> None:
    """Away from the edges. The filter softens a rough image a little, wherever it goes, a smooth one not."""
    image = rough(16, 16)
    shift = torch.tensor([pixels_right / 16, 1 / 16])
    moved, kept = _warp(image, torch.eye(2), shift), _warp(image, torch.eye(2), STILL)
    expected = kept.roll((1, pixels_right), (1, 2))
    assert (moved - expected)[:, 6:-6, 6:-6].abs().max() < 1e-5
    smooth = torch.cos(pixels(32, 32)[0] * math.pi / 16).expand(1, -1, -1)
    moved = _warp(smooth, torch.eye(2), torch.tensor([pixels_right / 32, 0.0]))
    assert (moved - smooth.roll(pixels_right, 2))[..., 4:-4].abs().max() < 0.01


def test_a_right_angle_is_rot90() -> None:
    image = rough()
    kept = _warp(image, torch.eye(2), STILL)
    for quarter in (1, 2, 3):
        turned = _warp(image, _turn(-quarter * math.pi / 2), STILL)
        assert (turned - kept.rot90(quarter, (1, 2))).abs().max() < 1e-4


def test_twice_the_scale_is_four_times_the_area() -> None:
    x, y = pixels(64, 64)
    disc = (x**2 + y**2 < 12**2).float()[None]
    grown, shrunk = _warp(disc, torch.eye(2) / 2, STILL), _warp(disc, torch.eye(2) * 2, STILL)
    assert grown.sum() == pytest.approx(4 * disc.sum().item(), rel=0.01)
    # Around it are mirror images.
    assert shrunk[:, 16:48, 16:48].sum() == pytest.approx(disc.sum().item() / 4, rel=0.01)


def test_what_is_shrunk_aliases_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stripes of one pixel at two thirds of the size: too fine for the pixels, they should vanish."""
    stripes = torch.tensor([1.0, -1.0]).repeat(32).expand(1, 64, 64)
    finer = _warp(stripes, torch.eye(2) * 1.5, STILL)[:, 20:44, 20:44].std()
    monkeypatch.setattr("alpenglow.distillation.augment.OVERSAMPLING", 1)
    assert finer < 0.5 * _warp(stripes, torch.eye(2) * 1.5, STILL)[:, 20:44, 20:44].std()


def test_edges_are_mirrored() -> None:
    ramp = torch.arange(16.0).expand(1, 16, 16)
    moved = _warp(ramp, torch.eye(2), torch.tensor([4 / 16, 0.0]))
    assert moved[0, 8, :4] == pytest.approx(torch.tensor([3.0, 2.0, 1.0, 0.0]), abs=0.3)


def test_the_network_is_told() -> None:
    """A label matters, and zero is the same as none."""
    model = random_denoiser(augment_dim=AUGMENT_DIM)
    x, sigma = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    label = augment(rough(), 1.0, torch.Generator().manual_seed(0))[1].expand(3, -1)
    with torch.no_grad():
        plain = model(x, sigma)
        assert torch.equal(model(x, sigma, augmentation=torch.zeros(3, AUGMENT_DIM)), plain)
        told = model(x, sigma, augmentation=label)
    assert (told - plain).norm() > 1e-3 * plain.norm()


def test_a_network_without_augmentation_takes_the_label_of_nothing() -> None:
    """So that every batch has one."""
    model = random_denoiser()
    x, sigma = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    with torch.no_grad():
        assert torch.equal(model(x, sigma, augmentation=torch.zeros(3, AUGMENT_DIM)), model(x, sigma))
