"""`gc` over folders of random content: it never deletes a quantized checkpoint, nor anybody's own
file; and what is in use is respected."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from flux_fp4.cli.program import main
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.statistics_names import statistics_name
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantize_tiny import quantize
from tiny_flux import random_flux, save_flux

KEY = "0123456789abcdef" * 2
STATISTICS = f".statistics/{'0' * 16}-{'1' * 16}"
MODELS = ("a", "baked", "sm120", KEY, "blocks", "samples", "recipes", "self_test.json", "last_used")
"""Names of checkpoints: some are those that the pack gives to other things."""

OWN_FILES = (
    "{m}/{m}.safetensors",
    "{m}/sm120/{m}.safetensors",
    "{m}/baked/" + KEY + "/mine.safetensors",
    "{m}/baked/" + KEY + "/" + KEY + ".safetensors",
    "{m}/baked/" + KEY + "/sm120/{m}.safetensors",
    "{m}/notes.txt",
    "{m}/sm120/notes.txt",
    "{m}/mine.plan",
    "{m}/sm120/mine.plan",
    "recipes/mine.yaml",
    "samples/mine.samples.safetensors",
    STATISTICS + "/{m}.safetensors",
    STATISTICS + "/{m}/{m}.safetensors",
    "{m}.safetensors",
)
"""What must survive every call, whatever lies beside it."""

PACK_FILES = (
    "{m}/.{m}.partial",
    "{m}/.{m}.journal",
    "{m}/double_blocks.0.onnx",
    "{m}/.double_blocks.0-" + "0" * 32 + ".tmp",
    "{m}/sm120/manifest.json",
    "{m}/sm120/build.json",
    "{m}/sm120/variants.json",
    "{m}/sm120/last_used",
    "{m}/sm120/double_blocks.0-0123456789ab.plan",
    "{m}/sm120/.double_blocks.0-0123456789ab.plan.12.tmp",
    "{m}/sm120/runtime-01234567.cache",
    "{m}/baked/" + KEY + "/blocks.safetensors",
    "{m}/baked/" + KEY + "/single_blocks.3.onnx",
    "{m}/baked/" + KEY + "/sm120/baked.json",
    "{m}/baked/" + KEY + "/sm120/single_blocks.3-0123456789ab.plan",
    STATISTICS + "/double_blocks.0.safetensors",
    STATISTICS + "/velocity_sqnr_db.txt",
)

files = st.lists(
    st.tuples(
        st.sampled_from(OWN_FILES + PACK_FILES),
        # mostly the same model: what lies in one folder is what may be taken for another
        st.sampled_from((None, None, None, None, *MODELS)),
        st.sampled_from([b"", b"{}", b"[", b"\xff" * 30]),
    ),
    max_size=25,
)


def collect(models: Path, *options: str) -> str:
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main(["gc", "--models", str(models), *options])
    assert code == 0, errors.getvalue()
    return output.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), folder / "source.safetensors")
    return quantize(source, folder / "tiny" / "tiny.safetensors").path


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=files, is_real=st.booleans(), old=st.booleans(), model=st.sampled_from(MODELS))
def test_checkpoints_and_files_of_others_survive(
    checkpoint: Path,
    content: list[tuple[str, str | None, bytes]],
    is_real: bool,
    old: bool,
    model: str,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        kept = {
            models / model / f"{model}.safetensors": checkpoint.read_bytes() if is_real else b"x"
        }
        for pattern, owner, data in content:
            path = models / pattern.format(m=owner or model)
            if path in kept or any(path in other.parents for other in kept):
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError:
                continue  # a file where this one wants a folder, or the other way round
            if pattern in OWN_FILES:
                kept[path] = data
        (models / model).mkdir(exist_ok=True)
        for path, data in kept.items():
            if path.parent.is_dir():
                path.write_bytes(data)
        if old:
            for path in models.rglob("*"):
                os.utime(path, (1000, 1000))
        before = sorted(models.rglob("*"))
        collect(models, "--quota", "0", "--days", "0")
        assert [p for p in before if not p.exists()] == []
        collect(models, "--quota", "0", "--days", "0", "--delete")
        for path, data in kept.items():
            assert path.read_bytes() == data


def test_statistics_of_a_checkpoint_stay(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "tiny.safetensors"
    path.parent.mkdir()
    path.write_bytes(checkpoint.read_bytes())
    metadata = QuantizedCheckpoint.read(path).metadata
    used = statistics_name(metadata.source_digest, metadata.calibration_digest)
    for name in (used, STATISTICS.partition("/")[2]):
        file = tmp_path / ".statistics" / name / "double_blocks.0.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
        os.utime(file, (1000, 1000))
    unreadable = tmp_path / "other" / "other.safetensors"
    unreadable.parent.mkdir()
    unreadable.write_bytes(b"x")
    collect(tmp_path, "--delete")
    assert len(list((tmp_path / ".statistics").iterdir())) == 2
    unreadable.unlink()
    partial = tmp_path / "other" / ".other.partial"
    partial.write_bytes(b"x")
    collect(tmp_path, "--delete")
    assert len(list((tmp_path / ".statistics").iterdir())) == 2
    partial.unlink()
    collect(tmp_path, "--delete")
    assert [p.name for p in (tmp_path / ".statistics").iterdir()] == [used]


def test_unfinished_quantizations_are_only_reported(tmp_path: Path) -> None:
    partial = tmp_path / "tiny" / ".tiny.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"x")
    assert "Nothing" in collect(tmp_path)
    os.utime(partial, (time.time() - 90_000, time.time() - 90_000))
    assert "(only reported)" in collect(tmp_path)
    collect(tmp_path, "--delete", "--quota", "0")
    assert partial.is_file()


def test_young_temporary_files_may_be_in_use(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "tiny.safetensors"
    path.parent.mkdir()
    path.write_bytes(checkpoint.read_bytes())
    temporary = path.with_name(f".double_blocks.0-{'0' * 32}.tmp")
    temporary.write_bytes(b"x")
    collect(tmp_path, "--delete")
    assert temporary.is_file()
    os.utime(temporary, (1000, 1000))
    collect(tmp_path, "--delete")
    assert not temporary.exists()
