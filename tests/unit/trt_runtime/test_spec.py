from __future__ import annotations

import pytest
from flux_fp4.trt_runtime.errors.build import BuildSpecError
from flux_fp4.trt_runtime.errors.run import ShapeProfileError
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile

PROFILE = ShapeProfile(
    max_batch=3,
    min_img_tokens=10,
    opt_img_tokens=20,
    max_img_tokens=40,
    min_txt_tokens=1,
    opt_txt_tokens=2,
    max_txt_tokens=4,
)


@pytest.mark.parametrize(
    ("axis", "bounds"),
    [("B", (1, 1, 3)), ("N", (10, 20, 40)), ("T", (1, 2, 4)), ("S", (11, 22, 44))],
)
def test_bounds_of_each_axis(axis: str, bounds: tuple[int, int, int]) -> None:
    assert PROFILE.bounds(axis) == bounds


@pytest.mark.parametrize("tokens", [10, 40])
def test_range_accepts_its_ends(tokens: int) -> None:
    PROFILE.range("N").check(tokens)


@pytest.mark.parametrize(
    ("tokens", "remedy"),
    [
        (9, "Make the picture larger."),
        (
            41,
            "Make the picture smaller, or build again with a larger 'max megapixels' in 'Build "
            "TensorRT Engine'.",
        ),
    ],
)
def test_range_refuses_and_says_what_to_do(tokens: int, remedy: str) -> None:
    with pytest.raises(ShapeProfileError) as caught:
        PROFILE.range("N").check(tokens)
    error = caught.value
    assert (error.tokens, error.minimum, error.maximum) == (tokens, 10, 40)
    assert str(error).endswith(remedy)


def test_text_of_too_few_and_too_many_text_tokens() -> None:
    text = ShapeProfile(min_txt_tokens=16, opt_txt_tokens=16, max_txt_tokens=256).range("T")
    with pytest.raises(ShapeProfileError, match=r"needs 4 text tokens\..* Use a longer prompt\."):
        text.check(4)
    with pytest.raises(ShapeProfileError, match=r"Use a shorter prompt.* 'max text tokens' in"):
        text.check(512)


def test_sizes_never_look_equal_to_a_limit_they_exceed() -> None:
    with pytest.raises(ShapeProfileError) as caught:
        ShapeProfile().range("N").check(4097)
    assert "4097 image tokens (1.01 megapixels" in str(caught.value)
    assert "64 to 4096 (1.00 megapixels)" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"max_batch": 0}, {"min_img_tokens": 0}, {"opt_img_tokens": 5000}, {"max_txt_tokens": 1}],
    ids=str,
)
def test_profile_without_any_shape_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(BuildSpecError):
        ShapeProfile(**changes)


@pytest.mark.parametrize(
    ("backend", "targets", "name"),
    [
        ("tensorrt_rtx", ("sm120",), "sm120"),
        ("tensorrt_rtx", ("sm121", "sm120", "sm120"), "sm120+sm121"),
        ("tensorrt", ("sm100",), "tensorrt-sm100"),
    ],
)
def test_folder_name_of_a_spec(backend: str, targets: tuple[str, ...], name: str) -> None:
    assert BuildSpec(backend, targets).folder_name == name


@pytest.mark.parametrize(
    ("backend", "targets"),
    [
        ("reference", ("sm120",)),
        ("tensorrt_rtx", ()),
        ("tensorrt_rtx", ("sm90",)),
        ("tensorrt_rtx", ("../x",)),
        ("tensorrt", ("sm120/..",)),
    ],
)
def test_unknown_backend_or_target_is_refused(backend: str, targets: tuple[str, ...]) -> None:
    with pytest.raises(BuildSpecError):
        BuildSpec(backend, targets)
