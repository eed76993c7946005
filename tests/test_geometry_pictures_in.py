"""Pictures of any kind become views of one size, and the originals' pixels are found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from polyadapt.core.errors import AdaptError
from polyadapt.geometry3d.pictures_in import part_of, read_pictures, view_of
from polyadapt.geometry3d.scenes.camouflage import camouflaged
from polyadapt.tests.scene_files import save_image

SIZE = (12, 16)


def _halves(width: int, height: int) -> Image.Image:
    """The left half red, the right half blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def test_an_image_of_the_right_size_keeps_its_bits(tmp_path: Path) -> None:
    scene = camouflaged(2)
    for name, image in zip(scene.names, scene.images, strict=True):
        save_image(image, tmp_path / f"{name}.png")
    found = read_pictures([tmp_path], (48, 64))
    assert torch.equal(found.images, scene.images)
    assert list(found.names) == [f"{name}.png" for name in scene.names]
    assert found.parts[0].focal_there(64.0) == 64
    assert found.parts[0].centre_there((48, 64)) == (32, 24)


def test_a_wide_and_a_tall_image_lose_their_ends(tmp_path: Path) -> None:
    _halves(64, 24).save(tmp_path / "a.png")
    _halves(32, 96).save(tmp_path / "b.png")
    found = read_pictures([tmp_path], SIZE)
    wide, tall = found.parts
    assert (wide.left, wide.top, wide.scale) == (16, 0, 0.5)
    assert (tall.left, tall.top, tall.scale) == (0, 36, 0.5)
    assert (tall.width, tall.height) == (32, 96)
    assert tall.centre_there(SIZE) == (16, 48)
    assert found.images[:, 0, :, 1].min() == 1  # red
    assert found.images[:, 2, :, -2].min() == 1  # blue


def test_an_image_on_its_side_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    stored = Image.new("RGB", (24, 32), "red")
    stored.paste("blue", (0, 16, 24, 32))  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees against the clock: red to the left
    stored.save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (32, 24)).save(tmp_path / "b.png")
    found = read_pictures([tmp_path], SIZE)
    assert (found.parts[0].width, found.parts[0].height) == (32, 24)
    assert found.images[0, 0, :, 1].min() == 1
    assert found.images[0, 2, :, -2].min() == 1


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (16, 12), 51).save(tmp_path / "a.png")
    Image.new("RGBA", (16, 12), (255, 0, 0, 51)).save(tmp_path / "b.png")
    Image.new("LA", (16, 12), (0, 0)).save(tmp_path / "c.png")
    _halves(16, 12).quantize(4).save(tmp_path / "d.png")
    found = read_pictures([tmp_path], SIZE).images
    torch.testing.assert_close(found[0], torch.full((3, 12, 16), 0.2))
    torch.testing.assert_close(found[1, :, 0, 0], torch.tensor([1, 0.8, 0.8]))  # on white
    assert found[2].min() == 1
    assert found[3, :, 0, 0].tolist() == [1, 0, 0]


def test_identical_images_are_read_once_and_named(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        Image.new("RGB", (16, 12), colour).save(tmp_path / f"{name}.png")
    found = read_pictures([tmp_path], SIZE)
    assert list(found.names) == ["a.png", "b.png"]
    assert found.copies == {"c.png": "a.png"}
    with pytest.raises(AdaptError, match=r"2 images are only 1 different ones \(c.png is a.png"):
        read_pictures([tmp_path / "a.png", tmp_path / "c.png"], SIZE)


def test_one_image_none_and_a_broken_one_are_refused_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    _halves(16, 12).save(good)
    with pytest.raises(AdaptError, match="1 image is given: at least 2"):
        read_pictures([good], SIZE)
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    with pytest.raises(AdaptError, match=r"cannot read the image .*broken\.png") as refusal:
        read_pictures([tmp_path], SIZE)
    assert "\n" not in str(refusal.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdaptError, match="empty holds no image"):
        read_pictures([tmp_path / "empty"], SIZE)
    with pytest.raises(AdaptError, match=r"cannot read the image .*absent"):
        read_pictures([tmp_path / "absent.png"], SIZE)


def test_files_of_one_name_in_two_folders_keep_their_paths(tmp_path: Path) -> None:
    for folder, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 12), colour).save(tmp_path / folder / "a.png")
    names = read_pictures([tmp_path], SIZE).names
    assert [Path(name).parent.name for name in names] == ["one", "two"]


def test_two_hundred_images_are_read(tmp_path: Path) -> None:
    for number in range(200):
        Image.new("RGB", (20, 15), (number, 0, 0)).save(tmp_path / f"{number:03}.bmp")
    found = read_pictures([tmp_path], SIZE)
    assert found.images.shape == (200, 3, 12, 16)
    torch.testing.assert_close(found.images[:, 0, 0, 0], torch.arange(200) / 255)


def test_a_known_principal_point_becomes_the_middle() -> None:
    part = part_of((640, 480), (48, 64), (320.0, 255.5))
    # 224.5 rows below and above it, so 449 of 480, and 598.67 of 640 columns.
    assert part.scale == pytest.approx(48 / 449)
    assert part.centre_there((48, 64)) == pytest.approx((320, 255.5))
    assert part.top == pytest.approx(31)
    view, same = view_of(Image.new("RGB", (640, 480)), (48, 64), (320.0, 255.5))
    assert same == part
    assert view.shape == (3, 48, 64)
    with pytest.raises(AdaptError, match="principal point 700, 10 is outside"):
        part_of((640, 480), (48, 64), (700, 10))
