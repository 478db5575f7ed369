"""What ``balora train`` trains on, by what kind of model: its rows, the model itself, its batches and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

from . import classification, data, metrics, quantized, seq2seq
from .classification import listed
from .pretrained import head_modules
from .sharding import first_process, partitioned
from .sources import not_loaded
from .tokenized import Tokenized

CUT = 512  # tokens, where the user names no max_length


@dataclass
class Task:
    """The data of a run, tokenized, and what else depends on the kind of model."""

    train: Tokenized
    evaluation: Tokenized | None
    load: Callable[[], tuple[Any, list[str]]]  # the model, and the modules that are to be trained in full
    collator: Callable[[Any], Any]  # of the model
    about: dict[str, str] = field(default_factory=dict)  # of both sets, in words
    compute_metrics: metrics.Metrics | None = None
    predictions: Callable[[Any, Any], Any] | None = None  # what of the logits is kept for the metrics
    classes: list[str] | None = None  # of a classifier, in the order of its outputs; of a regression none


def find(run: Any, kind: str, tokenizer: Any) -> Task:
    """The task of a run: ``kind`` is nlg or nlu, the model says the rest."""
    causal = kind == "nlg" and not AutoConfig.from_pretrained(run.model).is_encoder_decoder
    if (run.quantize is not None or quantized.is_prepared(run.model)) and not causal:
        found = "the task nlu" if kind == "nlu" else "an encoder-decoder"
        raise ValueError(
            f"model, quantize: expected full precision for what is no causal language model, found {found}"
        )
    if causal:
        return language_model(run, tokenizer)
    return classifier(run, tokenizer) if kind == "nlu" else encoder_decoder(run, tokenizer)


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model, with a token to pad with.

    Raises:
        ValueError: there is none, or none of its tokens will do.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: expected a model and its tokenizer at {model}; {not_loaded(model, error)}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"model: expected a tokenizer with a padding or end-of-text token, found neither in {model}")
    return tokenizer


def language_model(run: Any, tokenizer: Any) -> Task:
    """A causal language model on instruction data."""
    quantized.check_here(run.model, run.quantize)
    length = _max_length(run, tokenizer)
    rows = data.read(run.data, run.data_split)
    eval_rows = data.read(run.eval_data, run.eval_split, usual="test") if run.eval_data else None
    train = data.tokenize(rows, tokenizer, length, rows.name)
    _summarize("train: ", train)
    evaluation = None
    if eval_rows:
        evaluation = data.tokenize(eval_rows, tokenizer, length, eval_rows.name)
        _summarize("eval:  ", evaluation)

    def load() -> tuple[Any, list[str]]:
        options = quantized.load_options(run.model, run.quantize, run.dtype)
        model, _ = _from_pretrained(AutoModelForCausalLM, run, "a causal language model", **options)
        return model, []

    return Task(train, evaluation, load, lambda model: DataCollatorForSeq2Seq(tokenizer))


def encoder_decoder(run: Any, tokenizer: Any) -> Task:
    """An encoder-decoder on instruction data, or on texts with labels, which it is to write."""
    length = _max_length(run, tokenizer)
    rows = seq2seq.read(run.data, run.data_split)
    train = seq2seq.tokenize(rows.pairs, tokenizer, length, str(run.data))
    _summarize("train: ", train)
    evaluation = None
    if run.eval_data:
        eval_rows = seq2seq.read(run.eval_data, run.eval_split, usual="test", training=rows)
        evaluation = seq2seq.tokenize(eval_rows.pairs, tokenizer, length, str(run.eval_data))
        _summarize("eval:  ", evaluation)

    def load() -> tuple[Any, list[str]]:
        model, _ = _from_pretrained(AutoModelForSeq2SeqLM, run, "an encoder-decoder")
        return model, []

    task = Task(train, evaluation, load, lambda model: DataCollatorForSeq2Seq(tokenizer, model=model))
    if rows.labelled is not None:
        task.compute_metrics = metrics.of_texts
        task.predictions = lambda logits, labels: _first(logits).argmax(-1)
    return task


def classifier(run: Any, tokenizer: Any) -> Task:
    """A sequence classifier, or a regression, on texts with labels."""
    config = AutoConfig.from_pretrained(run.model)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"model: expected an architecture that transformers has a sequence classifier of, found "
            f"{config.model_type} at {run.model}"
        )
    length = _max_length(run, tokenizer)
    rows, fresh = _in_order_of(config, classification.read(run.data, run.data_split), run)
    train = classification.tokenize(rows, tokenizer, length, str(run.data))
    about = {"Training data": rows.summary()}
    say(f"train: {rows.summary()}")
    _summarize("train: ", train)
    evaluation = None
    if run.eval_data:
        eval_rows = classification.read(run.eval_data, run.eval_split, usual="test", training=rows)
        evaluation = classification.tokenize(eval_rows, tokenizer, length, str(run.eval_data))
        about["Evaluation data"] = eval_rows.summary()
        say(f"eval:  {eval_rows.summary()}")
        _summarize("eval:  ", evaluation)
    return Task(
        train,
        evaluation,
        lambda: _load_classifier(run, tokenizer, rows.names, fresh),
        lambda model: DataCollatorWithPadding(tokenizer),
        about,
        metrics.of_numbers if rows.names is None else metrics.of_classes(rows.names, rows.counts()),
        lambda logits, labels: _first(logits),
        rows.names or [],
    )


def _load_classifier(run: Any, tokenizer: Any, names: list[str] | None, other_classes: bool) -> tuple[Any, list[str]]:
    """The model with a head of these classes, None: of one number; and what of it has to be trained in full: the head,
    and what else the checkpoint lacks. With other_classes a head of the same size is made anew.
    """
    fields: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if names is not None:
        fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        fields["problem_type"] = "single_label_classification"
    model, info = _from_pretrained(
        AutoModelForSequenceClassification, run, "a sequence classifier", ignore_mismatched_sizes=True, **fields
    )
    head = head_modules(model)
    mismatched = sorted((name, list(there), list(here)) for name, there, here in info["mismatched_keys"])
    for name, there, here in mismatched:
        if name.partition(".")[0] not in head:
            raise ValueError(f"model: expected {name} of the shape {here} at {run.model}, found {there}")
        if not run.ignore_mismatched_sizes:
            raise ValueError(
                f"model: expected a head for {'a regression' if names is None else f'{len(names)} classes'} at "
                f"{run.model}, found another ({name} is {there} instead of {here}); add --ignore_mismatched_sizes true "
                "to begin with a fresh one"
            )
    lacking = sorted(name for name in info["missing_keys"] if name.partition(".")[0] not in head)
    blocks = [name for name in lacking if any(step.isdecimal() for step in name.split("."))]
    if blocks:
        raise ValueError(
            f"model: expected the weights of {type(model).__name__} at {run.model}, found none of {blocks[0]}"
            + (f" and {len(blocks) - 1} others" if blocks[1:] else "")
        )
    fresh = list(dict.fromkeys(name.rpartition(".")[0] for name in lacking))
    if other_classes:
        _initialize(model, head)
    if fresh or mismatched or info["missing_keys"] or other_classes:
        say(f"model: the checkpoint has no {', '.join([*fresh, *head])}; fresh ones are trained in full")
    if model.config.pad_token_id is None:  # decoders look for the last token that is none
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, [*fresh, *head]


def _initialize(model: Any, head: list[str]) -> None:
    """Give the head the weights of a fresh one."""
    for module in (module for name in head for module in model.get_submodule(name).modules()):
        for parameter in module.parameters(recurse=False):
            if partitioned(parameter):
                raise ValueError(
                    "ignore_mismatched_sizes: expected false with ZeRO-3 and a head of other classes, found true"
                )
            parameter._is_hf_initialized = False  # transformers leaves what it has loaded
        model._init_weights(module)


def _in_order_of(config: Any, rows: classification.Labelled, run: Any) -> tuple[classification.Labelled, bool]:
    """The rows with their classes in the order of the checkpoint's head, and whether that head is of as many others.

    Upper and lower case are the same, unless they tell classes apart. A head whose classes have no names is taken as it
    is; one of another size is found as it is loaded.

    Raises:
        ValueError: the head is of as many other classes, and nobody asked for a fresh one.
    """
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    known = [config.id2label[i] for i in sorted(config.id2label)] if is_classifier else []
    names = rows.names
    if names is None or len(known) != len(names):
        return rows, False
    if sorted(known) == sorted(names):
        return rows.ordered(known), False
    folded = {name.casefold(): name for name in names}
    if sorted(folded) == sorted(name.casefold() for name in known):
        return rows.ordered([folded[name.casefold()] for name in known]), False
    if known == [f"LABEL_{i}" for i in range(len(known))]:
        say(f"model: its head has no names for its {len(known)} classes; taken, in this order, as {listed(names)}")
        return rows, False
    if not run.ignore_mismatched_sizes:
        raise ValueError(
            f"label: expected the classes of the head at {run.model}, {listed(known)}; found {listed(names)}; name "
            "them so, or add --ignore_mismatched_sizes true to begin with a fresh head"
        )
    return rows, True


def _from_pretrained(auto: Any, run: Any, expected: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        return auto.from_pretrained(run.model, dtype=run.dtype, output_loading_info=True, **options)
    except Exception as error:  # the readers of weights raise types of their own
        raise ValueError(f"model: expected {expected} at {run.model}; {error}") from error


def say(text: str) -> None:
    """Print it, once of several processes."""
    if first_process():
        print(text, flush=True)


def _max_length(run: Any, tokenizer: Any) -> int:
    return run.max_length if run.max_length is not None else min(CUT, tokenizer.model_max_length)


def _first(logits: Any) -> Any:
    """The logits, before whatever else a model gives."""
    return logits[0] if isinstance(logits, tuple) else logits


def _summarize(what: str, rows: Tokenized) -> None:
    say(what + rows.summary())
    for warning in rows.warnings():
        say(f"{what}warning: {warning}")
