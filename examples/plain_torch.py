"""A plain PyTorch loop: python examples/plain_torch.py MODEL DATA.jsonl OUT STEPS"""

import sys
from itertools import chain, islice, repeat

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import balora
from balora import data

if len(sys.argv) < 5:
    sys.exit(__doc__)
name, file, out, steps = *sys.argv[1:4], int(sys.argv[4])
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = data.tokenize(data.read(file), tokenizer, max_length=256, source=file).examples
loader = torch.utils.data.DataLoader(rows, 4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
model = balora.get_pissa_model(AutoModelForCausalLM.from_pretrained(name).to(device), r=16, lora_alpha=16)
balora.attach(model, balora.BALoraConfig()).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), steps)):
    balora.set_progress(model, step, steps)  # for the schedules of λ
    loss = model(**batch.to(device)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    terms = model.balora_last
    print(f"step {step}: loss {loss:.4f}, cross-entropy {terms.ce:.4f}, KL to the start {terms.consistency:.2e}")
balora.export_lora(model, out)
