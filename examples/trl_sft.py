"""TRL's SFTTrainer: [torchrun | python] examples/trl_sft.py MODEL DATA.jsonl OUT STEPS"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import balora
from balora.trainer import BALoraMixin


class MySFTTrainer(BALoraMixin, SFTTrainer):  # SFTTrainer alone trains a loss of its own
    pass


if len(sys.argv) < 5:
    sys.exit(__doc__)
name, file, out, steps = *sys.argv[1:4], int(sys.argv[4])
rows = load_dataset("json", data_files=file, split="train")
rows = rows.map(lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]})
model = balora.get_pissa_model(AutoModelForCausalLM.from_pretrained(name), r=16, lora_alpha=16)
balora.attach(model, balora.BALoraConfig())

arguments = SFTConfig(
    f"{out}/checkpoints",
    max_steps=steps,
    max_length=256,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-4,
    logging_steps=1,  # every term and λ
    use_cpu=not torch.cuda.is_available(),  # SFTConfig's bf16 asks for it
)
trainer = MySFTTrainer(model, arguments, train_dataset=rows)
trainer.train()
balora.export_lora(trainer.accelerator.unwrap_model(trainer.model), out)
