"""One FLUX in every layout of names: the same tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import all_in_one_state, diffusers_state, save_sharded, with_prefix
from flux_fp4.quant.errors.sources import DamagedCheckpointError
from flux_fp4.quant.sources.source import FluxSource, open_source
from safetensors.torch import save_file
from tiny_flux import TINY_VARIANTS, random_flux

State = dict[str, torch.Tensor]


def single_file(state: State, folder: Path) -> Path:
    save_file(state, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


def norms_by_weight(state: State) -> State:
    return {name.replace("_norm.scale", "_norm.weight"): value for name, value in state.items()}


LAYOUTS: dict[str, tuple[str, Callable[[State, Path], Path]]] = {
    "bfl": ("bfl", single_file),
    "bfl-norm-weight": ("bfl", lambda state, at: single_file(norms_by_weight(state), at)),
    "bfl-sharded": ("bfl", lambda state, at: save_sharded(state, at)),
    "comfyui": (
        "comfyui",
        lambda state, at: single_file(with_prefix(state, "model.diffusion_model."), at),
    ),
    "comfyui-short": (
        "comfyui",
        lambda state, at: single_file(with_prefix(state, "diffusion_model."), at),
    ),
    "all-in-one": ("all-in-one", lambda state, at: single_file(all_in_one_state(state), at)),
    "diffusers": ("diffusers", lambda state, at: single_file(diffusers_state(state), at)),
    "diffusers-prefix": (
        "diffusers",
        lambda state, at: single_file(
            with_prefix(diffusers_state(state), "model.diffusion_model."), at
        ),
    ),
    "diffusers-sharded": (
        "diffusers-sharded",
        lambda state, at: save_sharded(diffusers_state(state), at),
    ),
    "diffusers-one-shard": (
        "diffusers-sharded",
        lambda state, at: save_sharded(diffusers_state(state), at, shards=1),
    ),
}


@pytest.fixture
def source(state: State, tmp_path: Path) -> FluxSource:
    """A sharded one: it needs everything that a single file needs and more."""
    return open_source(save_sharded(diffusers_state(state), tmp_path))


@pytest.fixture(scope="module", params=TINY_VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, State]:
    """Every model of the family, with bf16 weights."""
    model = random_flux(TINY_VARIANTS[request.param])
    return request.param, {name: value.bfloat16() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(
    variant: tuple[str, State], layout: str, tmp_path: Path
) -> None:
    name, state = variant
    expected, write = LAYOUTS[layout]
    path = write(state, tmp_path)
    source = open_source(path)
    assert (source.layout, source.name, source.config) == (expected, path.name, TINY_VARIANTS[name])
    assert dict(source.shapes) == {key: tuple(value.shape) for key, value in state.items()}
    loaded = source.tensors(state)
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype == source.dtype(key) == torch.bfloat16
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_stored_precision_is_kept(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    wide = {name: value.to(dtype) for name, value in diffusers_state(state).items()}
    source = open_source(single_file(wide, tmp_path))
    name = "double_blocks.0.img_attn.qkv.weight"
    assert source.dtype(name) == dtype
    assert torch.equal(source.tensors([name])[name], state[name].to(dtype))


def test_parts_of_different_precision_are_fused_without_rounding(
    state: State, tmp_path: Path
) -> None:
    mixed = diffusers_state(state)
    third = mixed["transformer_blocks.0.attn.to_k.weight"].float() / 3
    mixed["transformer_blocks.0.attn.to_k.weight"] = third
    source = open_source(single_file(mixed, tmp_path))
    name = "double_blocks.0.img_attn.qkv.weight"
    assert source.dtype(name) == torch.float32
    assert torch.equal(source.tensors([name])[name][256:512], third)


def test_submodule_returns_names_without_prefix(source: FluxSource, state: State) -> None:
    loaded = source.submodule("single_blocks.1")
    expected = {name for name in state if name.startswith("single_blocks.1.")}
    assert {f"single_blocks.1.{name}" for name in loaded} == expected
    assert torch.equal(loaded["linear2.weight"], state["single_blocks.1.linear2.weight"])


def test_unquantized_weights_are_not_packed(source: FluxSource) -> None:
    assert source.packed("double_blocks.0.img_attn.qkv") is None


def test_size_is_that_of_the_shards(source: FluxSource, tmp_path: Path) -> None:
    files = tmp_path.glob("*.safetensors")
    assert source.size_bytes == sum(file.stat().st_size for file in files)


def test_each_shard_is_opened_once_per_call(
    source: FluxSource, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flux_fp4.quant.sources import files

    opened = []
    real = files.safe_open

    def counted(path: Path, **options: str) -> object:
        opened.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(files, "safe_open", counted)
    source.tensors(state)
    assert len(opened) == len(set(opened)) == 3


def test_file_is_never_written(state: State, tmp_path: Path) -> None:
    path = single_file(state, tmp_path)
    before = path.read_bytes()
    for tensor in open_source(path).tensors(state).values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_file_that_changed_after_opening_is_refused(state: State, tmp_path: Path) -> None:
    source = open_source(single_file(state, tmp_path))
    single_file({**state, "img_in.bias": state["img_in.bias"].float()}, tmp_path)
    with pytest.raises(DamagedCheckpointError, match=r"changed since it was opened.*Queue"):
        source.tensors(["img_in.weight"])


def test_reading_ahead_reads_the_whole_block_and_stops_when_asked(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_fp4.quant.sources.files._READ_BYTES", 1000)
    source = open_source(single_file(state, tmp_path))
    block = {name: value for name, value in state.items() if name.startswith("single_blocks.0.")}
    asked: list[bool] = []

    def stopping() -> bool:
        asked.append(len(asked) >= limit)
        return asked[-1]

    limit = 10**9
    source.read_ahead("single_blocks.0", stopping)
    assert len(asked) == sum(-(-value.nbytes // 1000) for value in block.values())
    asked.clear()
    limit = 2
    source.read_ahead("single_blocks.0", stopping)
    assert asked == [False, False, True]


def test_reading_ahead_in_a_file_that_changed_is_refused(state: State, tmp_path: Path) -> None:
    source = open_source(single_file(state, tmp_path))
    single_file({**state, "img_in.bias": state["img_in.bias"].float()}, tmp_path)
    with pytest.raises(DamagedCheckpointError, match="changed since it was opened"):
        source.read_ahead("single_blocks.0", lambda: False)


def test_digest_is_that_of_the_content(state: State, tmp_path: Path) -> None:
    def digest(changed: State, folder: str) -> str:
        (tmp_path / folder).mkdir()
        return open_source(single_file(changed, tmp_path / folder)).digest()

    first = digest(state, "first")
    assert digest(state, "copy") == first
    merged = {name: (value * 1.01).to(value.dtype) for name, value in state.items()}
    assert digest(merged, "merged") != first
    one = state["single_blocks.1.linear2.bias"].clone()
    one[0] += 1
    assert digest({**state, "single_blocks.1.linear2.bias": one}, "one") != first


def test_digest_covers_every_shard(state: State, tmp_path: Path) -> None:
    digests = set()
    for name in (None, *list(state)[:6]):
        changed = {key: value + (key == name) for key, value in state.items()}
        digests.add(open_source(save_sharded(changed, tmp_path)).digest())
    assert len(digests) == 7
