"""Errors about the ONNX files of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import EXPORT_NODE, EngineError, shortened


class BlockContractError(EngineError):
    """An ONNX file that is not a block this runtime can trust."""

    def __init__(self, path: Path, problem: str) -> None:
        # it quotes the file, which may hold names of megabytes
        self.path, self.problem = path, shortened(problem)
        super().__init__(
            f"'{path.name}' is not a usable block ONNX: {self.problem}. "
            f"Export it again with {EXPORT_NODE}."
        )


class BlocksMissingError(EngineError):
    """A folder that does not hold all blocks of one model."""

    def __init__(self, folder: Path, missing: Sequence[str]) -> None:
        self.folder, self.missing = folder, tuple(missing)
        super().__init__(
            f"Folder '{folder.name}' lacks {len(self.missing)} block ONNX files (first: "
            f"'{self.missing[0]}.onnx'). Export the checkpoint again with {EXPORT_NODE}."
        )


class BlocksMixedError(EngineError):
    """Block files of one folder that come from different exports."""

    def __init__(self, folder: Path, problem: str) -> None:
        self.folder, self.problem = folder, problem
        super().__init__(
            f"The block ONNX files in '{folder.name}' do not belong together: {problem}. "
            f"Export the checkpoint again with {EXPORT_NODE}."
        )
