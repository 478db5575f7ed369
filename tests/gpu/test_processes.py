"""The example configurations on two GPUs with NCCL."""

import os
import subprocess
import sys

import pytest
import torch

from ..test_processes import EXAMPLES, ROOT, accelerate, assert_same_run, train

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from ..conftest import tiny_checkpoint

    folder = tmp_path_factory.mktemp("inputs")
    tiny_checkpoint(folder / "model")
    rows = [f'{{"question": "What is {i} + {i}?", "answer": "{2 * i}."}}' for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    values = dict(model=folder / "model", data=folder / "rows.jsonl", r=4, max_steps=6, save_steps=3, lambda_svd=0.0)
    values |= dict(learning_rate=1e-2, gradient_accumulation_steps=2, disable_tqdm=True)
    command = train(values, folder / "run", per_device_train_batch_size=4)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    subprocess.run([sys.executable, "-m", "balora.cli", *command], env=environment, cwd=ROOT, check=True)
    return values, folder / "run"


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_gpus_train_what_one_does(inputs, tmp_path, name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    values, run = inputs
    command = accelerate(EXAMPLES / f"{name}.yaml", "-m", "balora.cli", *train(values, tmp_path / "run"))
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, timeout=500)
    assert_same_run(tmp_path / "run", run)
