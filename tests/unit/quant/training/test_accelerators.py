"""What accelerate is asked to do: configurations that are shipped, and those that are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_multi_gpu_env
from flux_fp4.quant.errors.training import LaunchError, ProcessLostError, TrainingPackageError
from flux_fp4.quant.training.accelerators import check_launch, open_accelerator, peers_named
from flux_fp4.quant.training.student import StudentBlock
from pack_import import ROOT

CONFIGS = ROOT / "quant" / "training" / "configs"
PROCESSES = {"1gpu": (1, 1), "2gpu": (2, 1), "8gpu": (8, 1), "multinode": (16, 2)}
OFFLOADED = ("1gpu", "2gpu")


def test_every_configuration_is_known_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == PROCESSES.keys()


@pytest.mark.parametrize("name", PROCESSES)
def test_launcher_makes_of_a_configuration_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines) == PROCESSES[name]
    command = ["--config_file", str(path), "-m", "flux_fp4", "qad"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_multi_gpu_env(arguments)
    expected = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "no",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": StudentBlock.__name__,
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": str(name in OFFLOADED).lower(),
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    assert {key: environment.get(key) for key in expected} == expected


def accelerator(**changes: Any) -> Any:
    """What `check_launch` looks at, as two GPUs with FSDP 2 have it."""
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False)
    described = {
        "num_processes": 2,
        "mixed_precision": "no",
        "device": SimpleNamespace(type="cuda"),
        "state": SimpleNamespace(fsdp_plugin=plugin),
    }
    return SimpleNamespace(**{**described, **changes})


@pytest.fixture
def two_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def plugin(**values: Any) -> Any:
    described = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    return SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**described, **values}))


REFUSED = {
    "processes that train alone": ({"num_processes": 1}, "2 processes were launched"),
    "codes in bf16": ({"mixed_precision": "bf16"}, "mixed precision bf16"),
    "sharding on CPUs": ({"state": SimpleNamespace()}, "on GPUs only"),
    "the first FSDP": ({"state": plugin(fsdp_version=1)}, "FSDP 1"),
    "loading by rank 0": ({"state": plugin(cpu_ram_efficient_loading=True)}, "loading true"),
}


@pytest.mark.usefixtures("two_sharded")
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_launches_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    check_launch(accelerator())
    with pytest.raises(LaunchError, match=message):
        check_launch(accelerator(**changes))


@pytest.mark.parametrize(
    ("missing", "tracker"), [("accelerate", None), ("wandb", "wandb")], ids=str
)
def test_missing_packages_are_named_with_their_command(
    missing: str, tracker: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(TrainingPackageError, match=f"-m pip install '{missing}"):
        open_accelerator("cpu", 1, tracker, tmp_path)


def test_tracker_gets_what_is_logged(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    opened = open_accelerator("cpu", 1, "tensorboard", tmp_path)
    opened.init_trackers("flux_fp4_qad", config={"steps": 3})
    opened.log({"loss": 0.5}, step=1)
    opened.end_training()
    written = [path for path in tmp_path.rglob("events.out.tfevents.*") if path.stat().st_size]
    assert written
    assert any(b"loss" in path.read_bytes() for path in written)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed"), ProcessLostError),
        (RuntimeError("CUDA out of memory"), RuntimeError),
    ],
    ids=str,
)
def test_lost_processes_are_named(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as raised, peers_named(accelerator(process_index=1)):
        raise error
    assert type(raised.value) is expected
