"""What several test files share: the error budget, random problems, the real model where it is at hand."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from balora import BALoraConfig, LinearHead
from balora import functional as F

from .fast_interpreter import speed_up

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
    speed_up()
# Beside other workers one thread: two would wait for each other in turns.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

SHARED = Path(os.environ.get("BALORA_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_configure(config):
    """In a worker of pytest-xdist pytest-cov 7.1 begins twice: the first is never read, and never paused."""
    coverage = config.pluginmanager.getplugin("_cov")
    if coverage is not None and coverage.cov_controller is not None and hasattr(config, "workerinput"):
        coverage.cov_controller.cov.stop()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Neither a switch of the environment nor a process group outlives its test: others run in the same process."""
    before = dict(os.environ)
    yield
    kinds = "BALORA_", "TRITON_", "HF_", "WORLD_SIZE", "RANK", "LOCAL_RANK"
    changed = {n for n in {*before, *os.environ} if n.startswith(kinds) and before.get(n) != os.environ.get(n)}
    names = changed - {"TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"}  # torch.compile sets them for all that follows
    for name in names:
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})
    group = torch.distributed.is_initialized()
    if group:
        torch.distributed.destroy_process_group()
    assert not names
    assert not group


ALL_TERMS = BALoraConfig(lambda_consistency=0.7, lambda_diversity=0.3, lambda_svd=0.9, entropy_top_k=5, svd_rank=3)


def only(term: str, **changes) -> BALoraConfig:
    """The configuration in which that term alone joins the cross-entropy, with a weight of 1."""
    weights = {f"lambda_{name}": float(name == term) for name in ("consistency", "diversity", "svd")}
    return replace(ALL_TERMS, **{**weights, **changes})


def problem(n, d, vocab, *, dtype=torch.float64, distance=0.3, scale=1.0, seed=0, ignored=0):
    """(hidden, teacher_hidden, weight, labels): unit-variance logits times ``scale``, the teacher ``distance`` away."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden = draw(n, d)
    teacher = hidden + distance * draw(n, d)
    weight = draw(vocab, d) * (scale / d**0.5)
    labels = torch.randint(vocab, (n,), generator=g)
    labels[torch.randperm(n, generator=g)[:ignored]] = -100
    return hidden.to(dtype), teacher.to(dtype), weight.to(dtype), labels


def there(impl, *tensors):
    """Tensors where the implementation runs: the kernels on a CUDA device, where there is one, and what they are held
    against."""
    if impl not in ("triton", "reference") or not torch.cuda.is_available():
        return tensors
    return tuple(None if t is None else t.cuda() for t in tensors)


def here(found, like):
    """An output of the objective on the device of ``like``."""
    return type(found)(*(None if t is None else t.to(like.device) for t in found))


def run(hidden, teacher, weight, labels, config, impl, normalizer=None):
    """(output, gradient by hidden) of the objective."""
    leaf = hidden.clone().requires_grad_()
    h, teacher, weight, labels = there(impl, leaf, teacher, weight, labels)
    out = F.linear_objective(h, teacher, LinearHead(weight), labels, config, normalizer=normalizer, impl=impl)
    out.loss.backward()
    return here(out, hidden), leaf.grad


def assert_within_budget(found, plain, exact, dtype, what="", by="streaming"):
    """err(found) ≤ 2 · (err(plain torch in the same type) + eps(type) · max|exact|), NaN never passes.

    By the kernels on a device it is 16 eps of float32: ex2.approx is off by 2 units in the last place, and a KL near 0
    by eps/√KL.
    In float64 the reference is its own yardstick, so its error is not known: a fixed 1e-11 takes its place.
    """
    exact = exact.double()
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11 * exact.abs().max().item(), msg=what)
        return
    error = (found.double() - exact).abs().max().item()
    approximate = dtype == torch.float32 and by == "triton" and torch.cuda.is_available()
    eps = torch.finfo(dtype).eps * (16 if approximate else 1)
    allowed = 2 * ((plain.double() - exact).abs().max().item() + eps * exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_terms_within_budget(found, plain, exact, dtype, by="streaming", svd_type=None):
    """The loss and each of its terms, of inputs of that type.

    The difference logits of bfloat16 inputs are rounded to that type, and by the kernels those of float16 inputs; all
    else is float32 arithmetic, but for the Gram matrix of the SVD term where another svd_type is named.
    """
    rounds = (torch.bfloat16, torch.float16) if by == "triton" else (torch.bfloat16,)
    for name, a, b, c in zip(found._fields, found, plain, exact, strict=True):
        if c is None:
            assert a is None, name
        elif name == "n_valid":
            assert a == c
        else:
            rounded = dtype in rounds and name in ("loss", "consistency")
            arithmetic = torch.promote_types(dtype, torch.float32) if name != "svd" or svd_type is None else svd_type
            assert_within_budget(a, b, c, dtype if rounded else arithmetic, name, by)


@pytest.fixture(scope="session")
def stories15m() -> Path:
    """The folder of a small real Llama (V 32,000, tied head)."""
    path = SHARED / "models" / "stories15M"
    if not path.is_dir():
        pytest.skip(f"the real model is not at {path}; BALORA_SHARED names another folder that holds models/stories15M")
    return path


@pytest.fixture
def no_pictures(monkeypatch):
    """The pages of runs without their plots, which take half of a tiny run; tests/test_report.py looks at them."""
    from balora import elements

    monkeypatch.setattr(elements, "draw", lambda *_, **__: "<svg></svg>")


def tiny_llama(*, tied=False, dtype=torch.float32, seed=0, **changes):
    """A random Llama of 2 layers, d 32, V 97."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=97, max_position_embeddings=64, tie_word_embeddings=tied)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).to(dtype)


def batch(vocab=97, rows=3, length=12, seed=0):
    """Token ids with a padded tail and a masked prompt."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = -100
    mask[0, -3:] = 0
    labels[0, -3:] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def train_a_little(model, steps=4, lr=1e-2, device="cpu"):
    """A few AdamW steps on one batch."""
    inputs = {name: tensor.to(device) for name, tensor in batch().items()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(template=None):
    """A byte-level tokenizer without merges: a token a byte, one special end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = template
    return fast


def tiny_checkpoint(folder, template=None, **changes) -> Path:
    """A folder with a random Llama and its tokenizer, as ``--model`` takes it."""
    tokenizer = tiny_tokenizer(template)
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=256)
    tiny_llama(**{**shape, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
