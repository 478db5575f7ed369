"""QBA-LoRA's residual form: PiSSA adapters in full precision on a base that holds W_res in 4 bits (NF4).

NF4 rounds relative to the largest weight of a block. W_res = W − s·B₀A₀ lacks the principal part, so it is smaller and
nearer to a normal distribution than W, and loses less (PiSSA, arXiv 2404.02948, section 4: QPiSSA).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from . import four_bit
from .adapters import ADAPTER, FROZEN, RESIDUAL_BASE, ResidualVariant, base_weight, form_of, pretrained_weight
from .checkpoints import WEIGHTS
from .four_bit import is_4bit, nf4
from .pissa import get_pissa_model
from .sources import not_loaded
from .targets import as_named

FOLDER = "pissa"  # of the initial adapter, in the folder of the base

_CARD = """---
base_model: {base}
library_name: peft
---
# {name}: half a model
The weights in this folder are **W_res in 4 bits (NF4)**, the residual of [{base}]({base}) without its principal part.
Alone they compute nonsense. The principal part is the LoRA in `{folder}/` (r = {r}, alpha = {alpha}), which is also the
start of training.

```python
import balora
model = balora.load_quantized("{name}")  # base and adapter; balora.attach(model, config) trains it with BA-LoRA
```
or `balora train --model {name} --data …`. Without balora, the same start:
`peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "{name}/{folder}", is_trainable=True)`.

{summary}
"""


def nf4_config(dtype: torch.dtype, double_quant: bool = False) -> BitsAndBytesConfig:
    """transformers' configuration of NF4 weights that compute in this type."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
    )


@dataclass(frozen=True)
class QuantizationError:
    """What NF4 takes from one layer, plain and beside PiSSA adapters. All norms are relative to that of W."""

    name: str
    shape: tuple[int, int]  # of W, [out, in]
    rank: int
    plain: float  # ‖W − nf4(W)‖_F
    residual: float  # ‖W − (nf4(W_res) + s·B₀A₀)‖_F
    plain_nuclear: float  # the same in the nuclear norm, Σσ
    residual_nuclear: float


def quantization_error(
    name: str, weight: Tensor, residual: Tensor, rank: int, double_quant: bool = False
) -> QuantizationError:
    """The errors of one layer.

    Since W − (nf4(W_res) + s·B₀A₀) = W_res − nf4(W_res), the adapters need not be known.

    Args:
        name: of the layer.
        weight, residual: W and W_res [out, in], of a floating-point type, where they are to be computed.
        rank: of the adapters.
        double_quant: quantize the scales of the blocks too.
    """
    found = []
    for w in (weight, residual):
        lost = w.float() - nf4(w, double_quant).float()
        found.append((lost.norm().item(), torch.linalg.svdvals(lost).sum().item()))
    whole, whole_nuclear = weight.float().norm().item(), torch.linalg.svdvals(weight.float()).sum().item()
    (plain, plain_nuclear), (rest, rest_nuclear) = found
    relative = (0.0,) * 4  # of a zero matrix nothing is lost
    if whole > 0:
        relative = (plain / whole, rest / whole, plain_nuclear / whole_nuclear, rest_nuclear / whole_nuclear)
    return QuantizationError(name, (weight.shape[0], weight.shape[1]), rank, *relative)


def summary(errors: Iterable[QuantizationError]) -> str:
    """One line: how much less NF4 takes from the weights beside PiSSA adapters than alone."""
    errors = list(errors)
    text = []
    for norm, pairs in (
        ("nuclear", [(e.residual_nuclear, e.plain_nuclear) for e in errors]),
        ("Frobenius", [(e.residual, e.plain) for e in errors]),
    ):
        less = [1 - rest / plain for rest, plain in pairs if plain > 0]
        text.append(f"{min(less):.1%} to {max(less):.1%} in the {norm} norm" if less else f"none ({norm})")
    return f"NF4: error below plain NF4's by {', '.join(text)} ({len(errors)} layers measured)"


def quantize(
    model: str | Path,
    output_dir: str | Path,
    r: int = 128,
    lora_alpha: float | None = None,
    target_modules: list[str] | str | None = None,
    *,
    double_quant: bool = False,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    **pissa: Any,
) -> list[QuantizationError]:
    """Split a full-precision causal language model into W_res in 4 bits and the adapters that make it whole.

    The weights are decomposed in full precision (``get_pissa_model``, residual form); then W_res, and the linear layers
    without adapters as they are, all but the head, are quantized to NF4 in blocks of 64. ``output_dir`` gets the 4-bit
    model as transformers loads it (safetensors, ``quantization_config``), the tokenizer, a model card, and in
    ``pissa/`` the initial adapter. ``balora train --model OUTPUT_DIR`` and ``load_quantized`` take both; alone the
    weights are no model, and ``attach`` and ``get_pissa_model`` refuse them.

    Takes host memory for two copies of the model, and disk space for one more while it runs.

    Args:
        model: a folder or name of a causal language model in full precision.
        output_dir: a new or empty folder; nothing is left there after an error.
        r, lora_alpha, target_modules: as in ``get_pissa_model``; without lora_alpha it is r.
        double_quant: quantize the scales of the blocks too (0.37 bits less a weight).
        dtype: of W, W_res before it is quantized, A₀, B₀ and later the computation: auto (the checkpoint's), float32,
            bfloat16 or float16.
        device: where the weights are decomposed, as in ``get_pissa_model``.
        **pissa: further options of ``get_pissa_model``, such as exclude_modules.

    Returns:
        The quantization errors of the first layer of each kind (q_proj, down_proj, …).

    Raises:
        ValueError, TypeError, OSError: an argument does not fit.
        ImportError: bitsandbytes is missing.
    """
    four_bit.require()
    out = Path(output_dir)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"output_dir: expected a new or empty folder, found {out} with something in it")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, found {dtype!r}")
    try:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except Exception as error:  # the readers of weights raise types of their own
        raise ValueError(
            f"model: expected a causal language model at {model}; {not_loaded(str(model), error)}"
        ) from error
    if getattr(base, "is_quantized", False) or any(is_4bit(m) for m in base.modules()):
        raise ValueError(f"model: expected full precision, found quantized weights at {model}")
    if not torch.accelerator.is_available():
        try:
            four_bit.check_widths(base)
        except ValueError as error:
            warnings.warn(f"the result can be trained on a GPU, but not on this machine: {error}", stacklevel=2)
    lora_alpha = r if lora_alpha is None else lora_alpha
    wrapped = get_pissa_model(base, r, lora_alpha, as_named(target_modules), "residual", device=device, **pissa)
    errors = _first_of_each_kind(wrapped, double_quant, device)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        full, done = Path(work) / "full", Path(work) / "done"
        wrapped.save_pretrained(done / FOLDER)
        base = wrapped.unload()
        setattr(base.config, RESIDUAL_BASE, {"adapter": FOLDER, "base_model": str(model)})
        base.save_pretrained(full)
        kept_type = base.dtype
        del wrapped, base
        quantized = AutoModelForCausalLM.from_pretrained(
            full, dtype=kept_type, quantization_config=nf4_config(kept_type, double_quant), device_map={"": "cpu"}
        )
        quantized.save_pretrained(done)
        with contextlib.suppress(OSError, ValueError):  # a model without one: `balora train` will ask for it
            AutoTokenizer.from_pretrained(model).save_pretrained(done)
        card = _CARD.format(
            base=model, name=out.name, folder=FOLDER, r=r, alpha=f"{lora_alpha:g}", summary=summary(errors)
        )
        (done / "README.md").write_text(card, encoding="utf-8")
        done.replace(out)
    return errors


def _first_of_each_kind(
    wrapped: peft.PeftModel, double_quant: bool, device: torch.device | str | None
) -> list[QuantizationError]:
    kinds: dict[str, tuple[str, LoraLayer]] = {}
    for name, layer in wrapped.named_modules():
        if form_of(layer):
            kinds.setdefault(name.rpartition(".")[2], (name, layer))
    place = device or ("cuda" if torch.cuda.is_available() else None)
    found = []
    for name, layer in tqdm(kinds.values(), desc="NF4: measuring the error", disable=None, leave=False):
        residual = base_weight(layer)
        weight = pretrained_weight(layer).to(residual.dtype)
        found.append(quantization_error(name, weight.to(place), residual.to(place), layer.r[ADAPTER], double_quant))
    return found


def is_prepared(folder: str | Path) -> bool:
    """Whether this folder is one that ``quantize`` wrote."""
    try:
        return RESIDUAL_BASE in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load_quantized(folder: str | Path, **from_pretrained: Any) -> peft.PeftModel:
    """The 4-bit base and its initial adapter that ``quantize`` wrote, ready for ``attach``: the same bits every time.

    The pre-trained model (``teacher``) is the frozen initial adapter on the base: W up to the quantization error.

    Args:
        folder: the output folder of ``quantize``.
        **from_pretrained: as in transformers, such as ``device_map``.

    Raises:
        ValueError: the folder is none of ``quantize``, or its adapter does not belong to its weights.
        ImportError: bitsandbytes is missing.
    """
    if not is_prepared(folder):
        raise ValueError(f"folder: expected what balora.quantize wrote, found {folder}")
    four_bit.require()
    model = AutoModelForCausalLM.from_pretrained(folder, **from_pretrained)
    return with_initial_adapter(model, folder)


def with_initial_adapter(model: nn.Module, folder: str | Path) -> peft.PeftModel:
    """The base of that folder, as transformers loaded it, with its adapter; it is changed in place."""
    adapter = Path(folder) / FOLDER
    config = initial_config(folder)
    config.init_lora_weights, config.inference_mode = False, False
    config.base_model_name_or_path = getattr(model, "name_or_path", None)  # this folder; peft warns of another
    tensors = load_file(adapter / WEIGHTS)
    four_bit.prepare(model)
    wrapped = peft.get_peft_model(model, config)
    for name, layer in wrapped.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight
        try:
            a0, b0 = (tensors[f"{name}.{kept}"].to(weight.device) for kept in FROZEN["residual"])
        except KeyError as error:
            raise ValueError(f"folder: expected the A₀ and B₀ of {name} in {adapter}, found no {error}") from error
        ResidualVariant.init(layer, ADAPTER, a0=a0, b0=b0)
    return wrapped


def initial_config(folder: str | Path) -> peft.LoraConfig:
    """The configuration of the adapter in a folder of ``quantize``.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / FOLDER
    if not all((path / name).is_file() for name in ("adapter_config.json", WEIGHTS)):
        raise ValueError(f"model: expected the adapter of {folder} in {path}, found none; W_res alone is no model")
    return peft.LoraConfig.from_pretrained(path)


def load_options(model: str, quantize: str | None, dtype: str) -> dict[str, Any]:
    """What ``from_pretrained`` gets for ``balora train --quantize``: nothing, or NF4 that computes in this type."""
    if quantize is None:
        return {}
    four_bit.require()
    stored = AutoConfig.from_pretrained(model).get_text_config().dtype or torch.float32
    return {"quantization_config": nf4_config(stored if dtype == "auto" else getattr(torch, dtype))}


def check_here(model: str, quantize: str | None) -> None:
    """Refuse a base that this machine computes wrongly in 4 bits, by its shapes, before the data are read.

    Raises:
        ValueError: there is no GPU, and bitsandbytes is wrong about rows of that width on the CPU.
    """
    if torch.accelerator.is_available() or not (quantize == "nf4" or is_prepared(model)):
        return
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    four_bit.check_widths(shapes)


def settled(run: Any, asked: dict[str, Any] | None) -> Any:
    """The arguments of ``balora train`` on a folder of ``quantize``, with its adapter's; of others, as they are.

    asked: the names of the arguments that the user gave; None: those that are not at their default.

    Raises:
        ValueError: an argument contradicts the folder.
        ImportError: the base is to be in 4 bits, and bitsandbytes is missing.
    """
    if run.quantize == "nf4" or is_prepared(run.model):
        four_bit.require()
    if not is_prepared(run.model):
        return run
    config = initial_config(run.model)
    made = {"adapter": "pissa", "form": "residual", "r": config.r, "lora_alpha": config.lora_alpha}
    made |= {"quantize": None, "lora_dropout": 0.0, "modules_to_save": None}
    made |= {name: _listed(getattr(config, name)) for name in ("target_modules", "exclude_modules")}
    for argument in fields(run):
        name, value = argument.name, getattr(run, argument.name)
        given = name in asked if asked is not None else value != argument.default
        if name in made and given and _listed(value) != _listed(made[name]):
            raise ValueError(
                f"{name}: expected {made[name]!r}, which {run.model} was quantized with, found {value!r}; leave it out"
            )
    return replace(run, **made)


def _listed(value: Any) -> Any:
    """Names of modules as the command line gives them: a pattern is a list of one."""
    if isinstance(value, (list, set, tuple)):
        return sorted(value)
    return [value] if isinstance(value, str) else value
