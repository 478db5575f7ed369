"""The examples run from the command line's arguments and leave a LoRA that peft loads."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import SHARED, tiny_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("hf_trainer", "trl_sft", "accelerate_loop", "plain_torch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny):
    """The small real Llama where it is at hand."""
    real = SHARED / "models" / "stories15M"
    return real if real.is_dir() else tiny


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """16 short rows, of GSM8K where it is at hand: whole micro-batches, or Accelerate would fill up the last."""
    rows = [dict(question=f"What is {i} + {i}?", answer=f"{'It is ' * (i % 3)}{2 * i}.") for i in range(16)]
    real = SHARED / "data" / "gsm8k" / "train.jsonl"
    if real.is_file():
        with real.open() as lines:
            rows = [row for row in map(json.loads, lines) if len(row["question"] + row["answer"]) < 220][:16]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example in this process, as its command line would."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(example, *arguments):
        monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("example", SHORT)
def test_an_example_leaves_a_lora(run, example, model, problems, tmp_path):
    if example == "trl_sft":
        pytest.importorskip("trl")
    run(example, model, problems, tmp_path / "out", 2, *([2] if example == "accelerate_loop" else []))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = base(tokens).logits
        moved = peft.PeftModel.from_pretrained(base, tmp_path / "out")(tokens).logits - before
    assert 1e-4 < moved.abs().max() / before.abs().max() < 0.5


@pytest.mark.parametrize("example", SHORT)
def test_without_its_arguments_an_example_says_how_it_is_called(run, example, tmp_path):
    if example == "trl_sft":
        pytest.importorskip("trl")
    for arguments in ([], ["model", "rows.jsonl", tmp_path]):
        with pytest.raises(SystemExit, match=f"examples/{example}.py MODEL DATA.jsonl OUT STEPS"):
            run(example, *arguments)


SGD = """
import functools, runpy, sys, accelerate, torch, balora
class Plain(torch.optim.SGD):
    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=0.1)
torch.optim.AdamW = Plain
class InOrder(torch.utils.data.DataLoader):  # several processes shuffle in another way than one
    def __init__(self, rows, batch_size, shuffle, collate_fn):
        super().__init__(rows, batch_size, collate_fn=collate_fn)
torch.utils.data.DataLoader = InOrder
constant = dict(consistency_schedule="constant", focus_schedule="constant")
balora.BALoraConfig = functools.partial(balora.BALoraConfig, lambda_diversity=0.5, lambda_svd=0.5, **constant)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_are_one_with_twice_the_micro_batches(tiny, problems, tmp_path):
    """The SVD terms of the micro-batches too; plain gradient descent shows every factor of the loss."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    running = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable]
    for out, accumulation, launch in (("1", 2, []), ("2", 1, torchrun)):
        values = EXAMPLES / "accelerate_loop.py", tiny, problems, tmp_path / out, 2, accumulation
        command = [sys.executable, *launch, "-c", SGD, *map(str, values)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "12")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


def test_they_are_short_and_in_the_table():
    table = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"[{path.name}]({path.name})" in table
        whole = path.stem in ("demo", "nlu_data")
        assert whole or (path.stem in SHORT and len(path.read_text().splitlines()) <= 40)
