"""Short training runs, for one or several processes: ``torchrun … tests/two_processes.py OUT BATCH HOW …``.

Each HOW is a run that goes to OUT/HOW: its tokens are averaged over the processes ("average"), or not ("alone").
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

import balora
from balora import BALoraConfig
from balora.trainer import BALoraTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.conftest import tiny_llama
from tests.test_trainer import examples


def main(out: Path, batch: int, average: bool) -> None:
    torch.set_num_threads(1)
    model = balora.get_pissa_model(tiny_llama(), r=4)
    if int(os.environ["RANK"]) > 0:  # as if another device had decomposed the weights: DDP makes them alike
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "lora_" in name:
                tensor.data.add_(0.01 * torch.randn_like(tensor))
    constant = dict(consistency_schedule="constant", focus_schedule="constant")
    config = BALoraConfig(lambda_consistency=0.5, lambda_diversity=0.3, lambda_svd=0.0, **constant)
    balora.attach(model, config)
    arguments = TrainingArguments(
        str(out),
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        average_tokens_across_devices=average,
        report_to="none",
    )
    trainer = BALoraTrainer(model, arguments, train_dataset=examples(32))
    trainer.train()
    assert not getattr(trainer.model_wrapped, "broadcast_buffers", False)  # DDP's, before every forward
    if trainer.is_world_process_zero():
        (out / "log.json").write_text(json.dumps(trainer.state.log_history))
        save_file({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, out / "adapters")


if __name__ == "__main__":
    for how in sys.argv[3:]:
        folder = Path(sys.argv[1]) / how
        folder.mkdir(parents=True, exist_ok=True)
        main(folder, int(sys.argv[2]), how == "average")
    if torch.distributed.is_initialized():  # threads that are still there at the end of a process abort it
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
