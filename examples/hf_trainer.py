"""Hugging Face's Trainer: [torchrun | python] examples/hf_trainer.py MODEL DATA.jsonl OUT STEPS"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import balora
from balora import data
from balora.trainer import BALoraTrainer

if len(sys.argv) < 5:
    sys.exit(__doc__)
name, file, out, steps = *sys.argv[1:4], int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = data.tokenize(data.read(file), tokenizer, max_length=256, source=file).examples
model = balora.get_pissa_model(AutoModelForCausalLM.from_pretrained(name), r=16, lora_alpha=16)
balora.attach(model, balora.BALoraConfig())

arguments = TrainingArguments(
    f"{out}/checkpoints",
    max_steps=steps,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-4,
    logging_steps=1,  # every term and λ
)
trainer = BALoraTrainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), rows)
trainer.train()
balora.export_lora(trainer.accelerator.unwrap_model(trainer.model), out)
