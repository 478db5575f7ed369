"""A loop with Accelerate: python examples/accelerate_loop.py MODEL DATA.jsonl OUT STEPS ACCUMULATION"""

import sys
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import balora
from balora import data

if len(sys.argv) < 6:
    sys.exit(__doc__)
name, file, out, (steps, accumulation) = *sys.argv[1:4], map(int, sys.argv[4:6])
set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = data.tokenize(data.read(file), tokenizer, max_length=256, source=file).examples
loader = torch.utils.data.DataLoader(rows, 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
model = balora.get_pissa_model(AutoModelForCausalLM.from_pretrained(name), r=16, lora_alpha=16)
balora.attach(model, balora.BALoraConfig()).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

plugin = GradientAccumulationPlugin(accumulation, sync_with_dataloader=False)  # a step may go on in the next epoch
accelerator = Accelerator(gradient_accumulation_plugin=plugin)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
batches = chain.from_iterable(repeat(loader))
for step in range(steps):
    balora.set_progress(model, step, steps)
    micro_batches = list(islice(batches, accumulation))
    tokens = accelerator.reduce(sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches))
    for batch in micro_batches:
        with accelerator.accumulate(model):  # backward divides by accumulation, data parallel by processes: undone here
            loss = model(**batch, num_items_in_batch=tokens).loss * accumulation * accelerator.num_processes
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
balora.export_lora(accelerator.unwrap_model(model), out)
