from __future__ import annotations

import logging
from pathlib import Path

import pytest
from flux_fp4.trt_runtime.errors.storage import DiskFullError
from flux_fp4.trt_runtime.runtime_cache import RuntimeCache


class NativeCache:
    """Accepts only what it wrote."""

    def __init__(self) -> None:
        self.offered: list[bytes] = []

    def deserialize(self, blob: bytes) -> bool:
        self.offered.append(blob)
        return blob == b"kernels\n\x00"

    def serialize(self) -> bytes:
        return b"kernels\n\x00"


class Config:
    def __init__(self) -> None:
        self.native = NativeCache()
        self.used: object = None

    def create_runtime_cache(self) -> NativeCache:
        return self.native

    def set_runtime_cache(self, cache: NativeCache) -> bool:
        self.used = cache
        return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cache file as the owner "rtx 1.7 on A" left it."""
    path = tmp_path / "runtime.cache"
    cache = RuntimeCache(path, "rtx 1.7 on A")
    cache.attach(Config())
    cache.save()
    return path


def offered(path: Path, owner: str = "rtx 1.7 on A") -> list[bytes]:
    config = Config()
    RuntimeCache(path, owner).attach(config)
    assert config.used is config.native
    return config.native.offered


def test_kernels_come_back(path: Path) -> None:
    assert offered(path) == [b"kernels\n\x00"]


def test_first_start_has_no_file(tmp_path: Path) -> None:
    assert offered(tmp_path / "none.cache") == []


def test_second_context_gets_the_same_cache_without_reading(path: Path) -> None:
    cache, first, second = RuntimeCache(path, "rtx 1.7 on A"), Config(), Config()
    cache.attach(first)
    path.unlink()
    cache.attach(second)
    assert second.used is first.native


def test_other_owner_is_refused_politely(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert offered(path, "rtx 1.8 on A") == []
    assert "belongs to rtx 1.7 on A" in caplog.text
    assert path.is_file()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="truncated"),
        pytest.param(lambda data: data[:-1] + b"\x01", id="flipped"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"x" + data, id="other magic"),
        pytest.param(lambda data: data.split(b"\n")[0] + b"\n", id="no header"),
        pytest.param(lambda data: data.split(b"\n")[0] + b"\n[]\nkernels\n", id="list header"),
        pytest.param(lambda data: data.split(b"\n")[0] + b"\n" + b"[" * 9999, id="deep header"),
    ],
)
def test_damaged_file_never_reaches_the_library(
    path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert offered(path) == []
    assert "not used" in caplog.text


def test_cache_that_the_library_refuses_is_not_an_error(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeCache, "deserialize", lambda self, blob: False)
    config = Config()
    with caplog.at_level(logging.INFO):
        RuntimeCache(path, "rtx 1.7 on A").attach(config)
    assert config.used is config.native
    assert "another driver or GPU" in caplog.text


@pytest.mark.parametrize("error", [PermissionError("no"), DiskFullError(Path("a/b"), 1, 0)])
def test_failure_to_store_is_only_a_warning(
    path: Path,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise error

    cache = RuntimeCache(path, "o")
    cache.attach(Config())
    monkeypatch.setattr("flux_fp4.trt_runtime.runtime_cache.write_atomic", fail)
    cache.save()
    assert "not stored" in caplog.text
