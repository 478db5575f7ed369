"""What a fine-tuned model has learned and what it has lost: measures of a model that peft has loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .checks import IGNORE_INDEX
from .functional import consistency_loss

WINDOW = 256  # tokens of a window of running text, at most


@torch.no_grad()
def token_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Cross-entropy in nats, the mean over all tokens with a label (not of the batches' means).

    Args:
        model: a causal language model, or an encoder-decoder (its labels are not shifted), in evaluation mode.
        batches: each with ``input_ids`` and ``labels`` [B, S] (−100: not scored), perhaps ``attention_mask``.

    Raises:
        ValueError: no token has a label.
    """
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: tensor.to(_device(model)) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits  # [B, S, V]
        if not _is_encoder_decoder(model):
            labels, logits = labels[:, 1:], logits[:, :-1]
        valid = labels != IGNORE_INDEX
        logits = logits[valid].float()  # [N, V]
        total += cross_entropy(logits, labels[valid], reduction="sum").item()
        count += int(valid.sum())
    if not count:
        raise ValueError("batches: expected a token with a label, found none")
    return total / count


def windows(tokenizer: Any, text: str, count: int, length: int) -> list[list[int]]:
    """At most ``count`` windows of ``length`` tokens, evenly spaced over a text, each behind the first token (BOS) of
    a tokenizer that has one. A text that is too short gives fewer windows, or a single short one.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = length - len(begin)
    count = max(min(count, len(tokens) // room), 1)
    step = len(tokens) // count
    return [begin + tokens[i * step : i * step + room] for i in range(count)]


@torch.no_grad()
def drift(model: Any, rows: Iterable[Sequence[int]]) -> dict[str, float]:
    """How far a fine-tuned model is from the pre-trained one on running text, means over all tokens but each row's
    first.

    ``drift``: KL(pre-trained ‖ fine-tuned) in nats a token, at temperature 1. ``perplexity`` and
    ``perplexity_before``: exp of the cross-entropy, fine-tuned and pre-trained.

    Args:
        model: a peft model in evaluation mode whose base, adapters off, is the pre-trained model.
        rows: token ids, at least two each.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0  # KL, CE, CE of the pre-trained model
    for row in rows:
        ids = torch.tensor([row], device=_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # [N, V]
        with model.disable_adapter():
            before = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        kl = consistency_loss(logits, before, temperature=1.0)
        means = torch.stack([kl, cross_entropy(logits, ids[0, 1:]), cross_entropy(before, ids[0, 1:])])
        sums += len(logits) * means.double().cpu()
        count += len(logits)
    kl, after, first = (sums / count).tolist()
    return {"drift": kl, "perplexity": _exp(after), "perplexity_before": _exp(first)}


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, prompts: Iterable[Sequence[int]], new_tokens: int, batch_size: int
) -> list[list[int]]:
    """The tokens that greedy decoding writes after each prompt, up to the end-of-text token, which is left out."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    found = []
    for batch in _batches(prompts, batch_size):
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in batch], device=_device(model))
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=_device(model))
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
        )
        for row in written[:, 1 if _is_encoder_decoder(model) else longest :].tolist():
            ends = [i for i, token in enumerate(row) if token in (end, pad)]
            found.append(row[: ends[0]] if ends else row)
    return found


def prompts_of(model: nn.Module, examples: Iterable[Mapping[str, Any]], room: int) -> Iterator[list[int]]:
    """What stands before the first label of each example (of an encoder-decoder the source); of long ones the last
    ``room`` tokens.
    """
    for example in examples:
        labels = [IGNORE_INDEX] * len(example["input_ids"]) if _is_encoder_decoder(model) else list(example["labels"])
        first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        if first:
            yield list(example["input_ids"][:first])[-room:]


def distinct(rows: Iterable[Sequence[int]], n: int) -> float | None:
    """Distinct-n (Li et al. 2016): the different n-grams over all n-grams, of all rows together; None without any."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


@torch.no_grad()
def classified(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [M, C], features [M, d], labels [M]) of all rows, in float32 on the host.

    The features are the last hidden state of the token that the head reads: the first one ([CLS]); of a decoder, and of
    whatever else has a head named ``score``, the last one; of an encoder-decoder the decoder's last end-of-text token.

    Args:
        model: a sequence classifier in evaluation mode.
        batches: each with ``labels`` and what the model takes, ``attention_mask`` included.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    from_last = any(name.rpartition(".")[2] == "score" for name, _ in model.named_modules())
    for batch in batches:
        inputs = {name: tensor.to(_device(model)) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        out = model(**inputs, output_hidden_states=True)
        hidden = (out.get("hidden_states") or out.get("decoder_hidden_states"))[-1]  # [B, S, d]
        places = torch.zeros_like(labels, dtype=torch.long)
        if _is_encoder_decoder(model):
            places = _last(inputs["input_ids"] == model.config.eos_token_id)
        elif from_last:
            places = _last(inputs["attention_mask"])
        features = hidden[torch.arange(len(hidden), device=hidden.device), places]
        found.append((out.logits.float().cpu(), features.float().cpu(), labels.cpu()))
    logits, features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logits, features, labels


def class_loss(logits: Tensor, labels: Tensor) -> float:
    """Cross-entropy of class logits [M, C], nats a row; of C = 1 the mean squared error."""
    if logits.shape[1] == 1:
        return (logits[:, 0] - labels.float()).square().mean().item()
    return cross_entropy(logits, labels).item()


def silhouette(features: Tensor, labels: Tensor) -> float | None:
    """The mean silhouette coefficient of features [M, d] by class, with the cosine distance (Rousseeuw 1987), by
    scikit-learn. None where it is not defined: fewer than two classes, or none of more than one row. NaN of features
    that are not finite.
    """
    from sklearn.metrics import silhouette_score

    classes = len(labels.unique())
    if not 2 <= classes < len(labels):
        return None
    if not features.isfinite().all():
        return math.nan
    return float(silhouette_score(features.double().numpy(), labels.numpy(), metric="cosine"))


def tsne(features: Tensor) -> list[list[float]] | None:
    """A map of features [M, d] to the plane, [M, 2], by scikit-learn: t-SNE with the perplexity 30, 1000 iterations and
    the seed 42 of the 2025 paper, appendix B.3. The perplexity is M/4 for fewer than 120 rows; None for fewer than 8,
    and of features that are not finite.
    """
    from sklearn.manifold import TSNE

    if len(features) < 8 or not features.isfinite().all():
        return None
    embed = TSNE(perplexity=min(30.0, len(features) / 4), max_iter=1000, random_state=42)
    return [[round(float(v), 2) for v in row] for row in embed.fit_transform(features.numpy())]


def _is_encoder_decoder(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def _last(mask: Tensor) -> Tensor:
    """The last place of each row [B, S] where the mask is set, [B]."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _exp(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).exp().item()  # inf, where math.exp raises
