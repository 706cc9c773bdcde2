"""An engine that a process has open is not deleted by another one, nor by itself."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux_fp4.trt_runtime.cleanup import evict, find_unneeded
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.engine import PlanTruncatedError
from flux_fp4.trt_runtime.errors.storage import EngineInUseError
from flux_fp4.trt_runtime.in_use import InUseMark, is_in_use
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.removal import remove_bake, remove_engine
from flux_fp4.trt_runtime.selection import BakedBlocks, Selection
from pack_import import ROOT

OTHER_DIGEST = "0" * 64

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from pack_import import register_pack
register_pack()
from pathlib import Path
from flux_fp4.trt_runtime.in_use import InUseMark
mark = InUseMark(Path(sys.argv[2]))
print("marked", flush=True)
sys.stdin.read()
"""


def test_an_open_engine_is_in_use_until_it_is_forgotten(engine_copy: Path) -> None:
    assert not is_in_use(engine_copy)
    engine = Engine.open(engine_copy, "reference")
    assert is_in_use(engine_copy)
    engine.load(torch.device("cpu"))
    engine.unload()
    assert is_in_use(engine_copy)
    second = Engine.open(engine_copy, "reference")
    del engine
    gc.collect()
    assert is_in_use(engine_copy)
    del second
    gc.collect()
    assert not is_in_use(engine_copy)


def test_an_engine_that_is_refused_is_not_in_use(engine_copy: Path) -> None:
    (engine_copy / load_manifest(engine_copy).blocks[0].file).write_bytes(b"")
    with pytest.raises(PlanTruncatedError):
        Engine.open(engine_copy, "reference")
    assert not is_in_use(engine_copy)


def test_what_is_in_use_stays(engine_copy: Path) -> None:
    root = engine_copy.parent
    (stale,) = find_unneeded(root, OTHER_DIGEST, None, 0)
    before = sorted(path.name for path in engine_copy.glob("*.plan"))
    mark = InUseMark(engine_copy)
    assert list(find_unneeded(root, OTHER_DIGEST, None, 0)) == []
    assert evict([root], [], 0) == []
    assert stale.remove is not None
    with pytest.raises(EngineInUseError, match="running ComfyUI"):
        stale.remove()
    assert sorted(path.name for path in engine_copy.glob("*.plan")) == before
    mark.release()
    assert stale.remove() > 0
    assert not engine_copy.exists()


def test_a_mark_of_another_process_ends_with_it(engine_copy: Path) -> None:
    tools = str(ROOT / "tests" / "tools")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tools, str(engine_copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "marked\n"
        assert is_in_use(engine_copy)
        with pytest.raises(EngineInUseError):
            remove_engine(engine_copy)
        holder.kill()
    assert not is_in_use(engine_copy)
    assert remove_engine(engine_copy) > 0


def test_looking_makes_no_file(engine_copy: Path) -> None:
    before = sorted(engine_copy.iterdir())
    assert not is_in_use(engine_copy)
    assert sorted(engine_copy.iterdir()) == before


def test_a_folder_that_cannot_be_marked_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "in_use-0.lock").mkdir()
    InUseMark(tmp_path).release()


def test_a_bake_is_in_use_while_it_runs(engine_copy: Path, tmp_path: Path) -> None:
    bake = tmp_path / "bake"
    shutil.copytree(engine_copy.parent, bake, ignore=shutil.ignore_patterns("sm*"))
    engine = Engine.open(engine_copy, "reference")
    engine.use(Selection(baked=BakedBlocks(bake, ("double_blocks.0",))))
    with pytest.raises(EngineInUseError):
        remove_bake(bake)
    engine.use(Selection())
    assert not is_in_use(bake)
    remove_bake(bake)
    assert not list(bake.glob("*.onnx"))
