"""A GPU: the same network outputs, the loop, exact resumption, whole runs. Skipped without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient

from effv2.architecture import VARIANTS, build_model
from effv2.cli.main import train
from effv2.execution.device import Execution, GraphedFunction
from effv2.training.loop import Training
from tests.conftest import TINY_TABLE, tiny_config
from tests.test_training import EVERYTHING, equal, numbers, saved_after, start

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")

ON_CUDA: dict[str, Any] = {**EVERYTHING, "execution": {"device": "cuda", "precision": "fp32"}}
# Enough steps to capture both batch shapes. The last batch of an epoch is smaller.
LONG: dict[str, Any] = {**ON_CUDA, "schedule": {"epochs": 8, "name": "cosine"}, "evaluation": {}}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_network_gives_the_outputs_of_the_cpu(bf16: bool) -> None:
    torch.manual_seed(0)
    plain = build_model(VARIANTS["default"], 10)
    inputs = torch.rand(16, 3, 32, 32)
    expected = plain.eval()(inputs)
    execution = Execution(torch.device("cuda"), bf16, channels_last=True)
    placed = execution.place(build_model(VARIANTS["default"], 10))
    placed.load_state_dict(plain.state_dict())
    network = execution.inference_copy(placed)
    with torch.inference_mode(), execution.autocast():
        outputs = network(inputs.to(execution.device)).float().cpu()
    error = (outputs - expected).norm() / expected.norm()
    assert error < (3e-2 if bf16 else 1e-4)


def test_training_follows_that_of_the_cpu() -> None:
    expected = numbers(list(start(tiny_config(**EVERYTHING))[2]))
    found = numbers(list(start(tiny_config(**ON_CUDA))[2]))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphed_steps_equal_eager_ones_and_evaluation_up_to_rounding(precision: str) -> None:
    config = tiny_config(**{**LONG, "execution": {"device": "cuda", "precision": precision}})
    dataset, state, training = start(config)
    graphed = numbers(list(training))
    assert isinstance(training._differentiate, GraphedFunction) and len(training._differentiate._graphs) == 2
    plain = Training(config, dataset, replace(training.execution, cuda_graphs=False))
    eager = numbers(list(plain))
    assert equal(plain.state.model.state_dict(), state.model.state_dict())
    for ours, theirs in zip(graphed, eager, strict=True):
        assert ours["train/loss"] == theirs["train/loss"]
        assert ours["test/loss"] == pytest.approx(theirs["test/loss"], rel=1e-5 if precision == "fp32" else 1e-2)


def test_state_saved_after_a_step_is_resumed_exactly() -> None:
    config = tiny_config(**LONG)
    _, whole, training = start(config)
    expected = numbers(list(training))
    _, second, training = start(config)
    second.load_state_dict(saved_after(config, whole.progress.step // 2 + 2))  # in the middle of an epoch
    list(training)
    assert numbers(second.progress.history) == expected
    assert equal(whole.model.state_dict(), second.model.state_dict())


def test_auto_is_the_gpu_and_its_run_is_logged_with_a_model(sqlite_store: str, tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(
        "name: tiny\nconfig:\n  data: {image_size: 8, per_class: 12}\n  schedule: {epochs: 2}\n"
        f"  model: {{variant: tiny, table: {TINY_TABLE}}}\n"
    )
    done = CliRunner().invoke(train, ["--study", str(study)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (run,) = MlflowClient().search_runs([e.experiment_id for e in MlflowClient().search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["execution.device"] == "cuda"
    assert run.data.tags["effv2.machine.accelerator"] == torch.cuda.get_device_name()
    assert run.outputs is not None and run.outputs.model_outputs
