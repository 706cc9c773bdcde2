"""Icon and banner are as the registry takes them."""

from __future__ import annotations

import pytest
from brand import BANNER, BANNER_SIZE, ICON, ICON_SIZE
from PIL import Image


@pytest.mark.parametrize(("file", "size"), [(ICON, ICON_SIZE), (BANNER, BANNER_SIZE)])
def test_files_have_the_sizes_of_the_registry(file: object, size: tuple[int, int]) -> None:
    with Image.open(str(file)) as image:
        assert (image.format, image.size) == ("PNG", size)


def test_shapes_are_the_registrys() -> None:
    assert ICON_SIZE[0] == ICON_SIZE[1] <= 400
    assert 9 * BANNER_SIZE[0] == 21 * BANNER_SIZE[1]
