"""kill -9 at random moments of the three stages: the next run ends as if nothing had happened.

The moments are drawn with a fixed seed from the duration of an undisturbed run. Plans differ in
some bytes from build to build, so engines are compared by what decides them: keys, sizes, counts.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from pathlib import Path

import pytest
from flux_fp4.tests.faults.conftest import results, temporaries
from flux_fp4.trt_runtime.digest import digest_of_file
from flux_fp4.trt_runtime.manifest import EngineManifest, load_manifest
from stage_runs import Stage, finished, log_of, run_build, run_export, run_quantize, started

pytestmark = pytest.mark.usefixtures("fork_server")


@pytest.fixture(scope="module")
def fork_server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Warm the server up, so that the first run is as fast as the others."""
    folder = tmp_path_factory.mktemp("warm") / "tiny"
    folder.mkdir()
    finished(started(run_quantize, source, folder), log_of(folder))


def duration(folder: Path) -> float:
    """Return how long the last run in a folder took."""
    return float(re.findall(r"^ran ([\d.]+)$", log_of(folder).read_text(), re.MULTILINE)[-1])


def killed_after(stage: Stage, source: Path, folder: Path, seconds: float) -> bool:
    """Run a stage and kill it; return whether it was still at work."""
    process = started(stage, source, folder)
    time.sleep(seconds)
    process.kill()
    process.join()
    return process.exitcode == -9


def moments(seed: int, count: int, seconds: float) -> list[float]:
    generator = random.Random(seed)
    # one in each of `count` equal parts, so that no part of the run is left out by chance
    return [(index + generator.random()) / count * seconds for index in range(count)]


def test_killed_quantization_goes_on_to_the_same_bytes(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    finished(started(run_quantize, source, whole), log_of(whole))
    kills = 0
    for index, moment in enumerate(moments(1, 20, duration(whole))):
        folder = tmp_path / str(index)
        folder.mkdir()
        kills += killed_after(run_quantize, source, folder, moment)
        finished(started(run_quantize, source, folder), log_of(folder))
        checkpoint = (folder / "tiny.safetensors").read_bytes()
        assert checkpoint == (undisturbed / "tiny.safetensors").read_bytes(), f"{moment:.3f} s"
        assert temporaries(folder) == [], f"{moment:.3f} s"
        shutil.rmtree(folder)
    assert kills >= 12


def test_killed_export_is_made_again_to_the_same_bytes(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    shutil.copy(undisturbed / "tiny.safetensors", folder)
    finished(started(run_export, source, folder), log_of(folder))
    expected = results(undisturbed)
    kills = 0
    for moment in moments(2, 15, duration(folder)):
        for path in folder.glob("*.onnx"):
            path.unlink()
        kills += killed_after(run_export, source, folder, moment)
        for name, content in results(folder).items():
            if name.endswith(".onnx"):
                assert content == expected[name], f"{name} is not whole: {moment:.3f} s"
        finished(started(run_export, source, folder), log_of(folder))
        assert results(folder) == expected, f"{moment:.3f} s"
    assert kills >= 9


def fixed_parts(manifest: EngineManifest) -> dict[str, object]:
    """Return what two builds of an engine have in common."""
    fields = manifest.model_dump(exclude={"blocks"})
    fields["blocks"] = [
        entry.model_dump(exclude={"digest", "build_seconds"}) for entry in manifest.blocks
    ]
    return fields


def test_killed_build_goes_on_to_the_same_engine(
    built_folder: Path, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(built_folder, folder, ignore=shutil.ignore_patterns("sm120"))
    engine = folder / "sm120"
    finished(started(run_build, source, folder), log_of(folder))
    expected = fixed_parts(load_manifest(engine))
    kills = 0
    for moment in moments(3, 15, duration(folder)):
        shutil.rmtree(engine)
        kills += killed_after(run_build, source, folder, moment)
        finished(started(run_build, source, folder), log_of(folder))
        manifest = load_manifest(engine)
        assert fixed_parts(manifest) == expected, f"{moment:.3f} s"
        files = {path.name for path in engine.iterdir()}
        assert files == {"manifest.json", "build.lock", *(e.file for e in manifest.blocks)}
        for entry in manifest.blocks:
            assert digest_of_file(engine / entry.file) == entry.digest
    assert kills >= 9


def test_two_processes_share_the_work_of_one_engine(
    built_folder: Path, source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(built_folder, folder, ignore=shutil.ignore_patterns("sm120"))
    both = [started(run_build, source, folder) for _ in range(2)]
    for process in both:
        finished(process, log_of(folder))
    log = log_of(folder).read_text()
    assert sorted(re.findall(r"2 plans, (\d) reused", log)) == ["0", "2"]
    load_manifest(folder / "sm120")


def test_two_processes_share_one_calibration_and_one_export(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    shutil.copy(undisturbed / "tiny.safetensors", folder)
    both = [started(run_export, source, folder) for _ in range(2)]
    for process in both:
        finished(process, log_of(folder))
    assert results(folder) == results(undisturbed)
