"""The pack runs no code that it did not bring: no eval, no pickle, no shell, no pip, no network.

Ruff's rules S know most of it; this looks for the rest, and at imports anywhere in a file.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "nodes", "quant", "trt_runtime")
SOURCES = [
    ROOT / "__init__.py",
    ROOT / "__main__.py",
    *(
        p
        for n in ("cli", "nodes", "quant", "trt_runtime")
        for p in sorted((ROOT / n).rglob("*.py"))
    ),
]

MODULES = {
    # code from bytes
    "cloudpickle", "code", "codeop", "dill", "joblib", "jsonpickle", "marshal", "pickle", "runpy",
    "shelve",
    # packages at run time
    "ensurepip", "pip", "uv",
    # network
    "aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "imaplib", "poplib", "requests",
    "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "urllib3", "websockets",
    "xmlrpc",
}  # fmt: skip
CALLS = {
    "__import__", "compile", "eval", "exec",
    "builtins.compile", "builtins.eval", "builtins.exec",
    "np.load", "numpy.load", "torch.load", "torch.hub.load", "torch.jit.load",
    "yaml.full_load", "yaml.load", "yaml.unsafe_load",
    "os.popen", "os.startfile", "os.system",
}  # fmt: skip
STARTERS = {
    "cli/native_probes.py",
    "quant/quality/image_reward.py",
    "trt_runtime/worker_process.py",
}
"""The only files that start a process: this Python, and for one metric a Python that the user named
in the environment, with the pack's own code."""


def faults(source: str, name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            top = module.partition(".")[0]
            if top in MODULES or (top == "subprocess" and name not in STARTERS):
                yield f"line {node.lineno}: imports {module}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS or called.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
                yield f"line {node.lineno}: calls {called}"
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code"):
                    yield f"line {node.lineno}: passes {keyword.arg}"
            if called.startswith("subprocess.") and "'pip'" in ast.unparse(node):
                yield f"line {node.lineno}: runs pip"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_forbidden_code(path: Path) -> None:
    assert not list(faults(path.read_text(), path.relative_to(ROOT).as_posix()))


FORBIDDEN = [
    "eval('1')",
    "exec('x = 1')",
    "compile('1', '', 'eval')",
    "import pickle",
    "def f():\n    from marshal import loads",
    "import shelve",
    "import torch\ntorch.load('x')",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import os\nos.system('x')",
    "import os\nos.execv('x', [])",
    "import subprocess",
    "import yaml\nyaml.load('x', yaml.Loader)",
    "import urllib.request",
    "import socket",
    "import requests",
    "from http.client import HTTPConnection",
    "import pip",
]


@pytest.mark.parametrize("source", FORBIDDEN)
def test_forbidden_code_is_seen(source: str) -> None:
    assert list(faults(source, "quant/recipe.py"))


def test_pip_is_seen_where_processes_may_be_started() -> None:
    source = "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip', 'install'])"
    assert list(faults(source, "cli/native_probes.py")) == ["line 2: runs pip"]


RULES = {
    "S102": "exec('x = 1')",
    "S301": "import pickle\n\npickle.loads(b'')",
    "S302": "import marshal\n\nmarshal.loads(b'')",
    "S306": "import tempfile\n\ntempfile.mktemp()",
    "S307": "eval('1')",
    "S310": "import urllib.request\n\nurllib.request.urlopen(str())",
    "S506": "import yaml\n\nyaml.load('x', yaml.Loader)",
    "S602": "import subprocess\n\nsubprocess.run(str(), shell=True)",
    "S603": "import subprocess\n\nsubprocess.run(list())",
    "S605": "import os\n\nos.system(str())",
}


@pytest.mark.parametrize("folder", PACKAGES)
def test_ruff_sees_it_in_every_layer(folder: str, tmp_path: Path) -> None:
    package = tmp_path / folder
    package.mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for rule, source in RULES.items():
        (package / f"{rule.lower()}.py").write_text(source + "\n")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    missed = [
        r for r in RULES if f"{r.lower()}.py" not in done.stdout or f" {r} " not in done.stdout
    ]
    assert not missed, done.stdout + done.stderr
