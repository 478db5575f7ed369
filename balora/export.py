"""The LoRA that comes out: the trained adapters, of a model or of a checkpoint, as a plain PEFT LoRA."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import checkpoints
from .adapters import ADAPTER, FROZEN, RESIDUAL_BASE, checkpoint_form, factors, form_of, rounded_alike, side_by_side
from .sharding import first_process, full, reshard, sharded, whole


def export_lora(peft_model: peft.PeftModel, directory: str | Path, onto: str = "pretrained") -> None:
    """Write the trained adapters as a plain PEFT LoRA that loads without balora, onto the unchanged base model.

    s·(BA − B₀A₀) has rank 2r at most. It is refactored in float64 into balanced factors B'A' of rank 2r (alpha = 2r),
    so that the two parts do not have to cancel again in whatever type the LoRA is loaded in. A model with ordinary LoRA
    adapters is saved as it is. ``modules_to_save`` go with it, in full.

    Like ``save_pretrained`` it writes over an earlier LoRA in ``directory`` (``balora export`` wants an empty folder).
    With several processes every one calls this, and the first one writes. (Where an engine has sharded the adapters,
    FSDP2 or ZeRO-3, they are gathered here, which takes all of them.)

    Files: ``adapter_config.json`` and ``adapter_model.safetensors``. The exported model equals the trained one within
    the rounding of its type; in the residual form, that of W_res comes on top.

    A model of ``load_quantized`` can be exported in two ways. Onto "pretrained", the full-precision model that it was
    made of: then nothing of the trained model is missing but the error of the 4-bit weights, which its training saw.
    Onto "residual", its own 4-bit weights: A and B as they are, of rank r, the trained model up to peft's rounding.

    Raises:
        ValueError: another adapter is active, a factor is not finite, onto="residual" has no such base, or the
            directory is a file.
    """
    if onto not in ("pretrained", "residual"):
        raise ValueError(f"onto: expected 'pretrained' or 'residual', found {onto!r}")
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model: expected a peft.PeftModel, found {type(peft_model).__name__}")
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"directory: expected a folder, found the file {directory}")
    if not (sharded(peft_model) or first_process()):
        return
    reshard(peft_model)
    layers = {name: m for name, m in peft_model.named_modules() if form_of(m)}
    made_of = getattr(peft_model.get_base_model().config, RESIDUAL_BASE, None)
    if onto == "residual" and not (layers and made_of):
        raise ValueError("onto: 'residual' expects a model of balora.load_quantized; no other W_res is kept in a file")
    if not layers:
        with whole(p for p in peft_model.parameters() if p.requires_grad):
            state = {name: full(p) for name, p in peft_model.named_parameters() if p.requires_grad}
            if first_process():
                peft_model.save_pretrained(directory, **({"state_dict": state} if sharded(peft_model) else {}))
        return
    if peft_model.active_adapters != [ADAPTER]:
        raise ValueError(
            f"peft_model: expected {ADAPTER!r}, which balora made, to be the active adapter; "
            f"found {peft_model.active_adapters}"
        )
    tensors = {}
    for name, layer in layers.items():
        with whole([layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]):
            left, right = factors(layer)
        a, b = full(layer.lora_A[ADAPTER].weight), full(layer.lora_B[ADAPTER].weight)
        tensors.update(_plain("peft_model", name, a, b, left, right, onto))
    for name, m in peft_model.named_modules():
        if isinstance(m, ModulesToSaveWrapper):
            saved = m.modules_to_save[ADAPTER]
            with whole(saved.parameters()):
                for key, tensor in saved.state_dict().items():
                    tensors[f"{name}.{key}"] = full(tensor).cpu().clone()
    if not first_process():
        return
    _write(directory, tensors, peft_model.peft_config[ADAPTER], onto, made_of)


def export_run(run_dir: str | Path, directory: str | Path, onto: str | None = None) -> Path:
    """Write the LoRA that ``balora train`` would have written at the newest complete checkpoint of a run.

    For a run that was ended before it could. Reads the checkpoint alone, neither the base model nor the data; the
    tensors are those of ``export_lora``, bit for bit. Ordinary adapters (``--adapter lora``, ``dora``) are copied. A
    classifier's ``config.json``, with its classes, goes with them.

    Args:
        run_dir: the output folder of ``balora train``, or one checkpoint in it.
        directory: a new or empty folder.
        onto: as in ``export_lora``. None: "residual" for a base of ``balora quantize``, "pretrained" for others.

    Returns:
        The checkpoint that was exported.

    Raises:
        ValueError: an argument does not fit, or the checkpoint does not hold the adapters; nothing is written then.
    """
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"out_dir: expected a new or empty folder, found {directory} with something in it")
    checkpoint = _checkpoint(Path(run_dir))
    tensors = load_file(checkpoint / checkpoints.WEIGHTS)
    if not any(".lora_" in key for key in tensors):
        raise ValueError(f"run_dir: expected adapters in {checkpoint / checkpoints.WEIGHTS}, found none; {_SHARDS}")
    form, config = checkpoint_form(checkpoint), peft.PeftConfig.from_pretrained(checkpoint)
    base = checkpoint / "config.json"
    if form == "residual" and not base.is_file():
        raise ValueError(
            f"run_dir: expected config.json in {checkpoint}, which tells a base of balora.quantize from a whole model, "
            "found none; load the model and call balora.export_lora"
        )
    made_of = json.loads(base.read_text(encoding="utf-8")).get(RESIDUAL_BASE) if form == "residual" else None
    if onto == "residual" and not made_of:
        raise ValueError(f"onto: 'residual' expects a base of balora.quantize, found another in {checkpoint}")
    onto = onto or ("residual" if made_of else "pretrained")
    if form is None:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (checkpoints.WEIGHTS, "adapter_config.json"):
            shutil.copyfile(checkpoint / name, directory / name)
    else:
        try:
            plain = _plain_tensors(tensors, config, form, onto)
        except KeyError as error:
            raise ValueError(f"run_dir: expected {error} in {checkpoint / checkpoints.WEIGHTS}, found none") from error
        _write(directory, plain, config, onto, made_of)
    if config.task_type == "SEQ_CLS" and base.is_file():
        shutil.copyfile(base, directory / base.name)
    return checkpoint


def how_to_load(directory: str | Path) -> str:
    """In words, for what ``balora train`` or ``export_run`` has written."""
    how = "load it with peft.PeftModel.from_pretrained"
    if (Path(directory) / "config.json").is_file():
        how += " on AutoModelForSequenceClassification with the config.json that lies there"
    return how


_SHARDS = (
    "under ZeRO-3 and FSDP the checkpoints hold them with stage3_gather_16bit_weights_on_model_save: true, and with "
    "fsdp_state_dict_type: FULL_STATE_DICT; go on with the run under its launcher, it exports at its end"
)


def _checkpoint(run_dir: Path) -> Path:
    """The folder itself if it is a checkpoint, or the newest complete one in it."""
    if not run_dir.is_dir():
        found_there = "a file" if run_dir.exists() else "nothing"
        raise ValueError(f"run_dir: expected the folder of a run or of a checkpoint, found {found_there} at {run_dir}")
    if checkpoints.newest_first(run_dir):
        found = checkpoints.newest(run_dir, checkpoints.finished, lambda text: print(f"export: {text}", flush=True))
        if found is None:
            raise ValueError(f"run_dir: expected a complete checkpoint in {run_dir}, found none; {_SHARDS}")
        return found
    if checkpoints.finished(run_dir):
        return run_dir
    expected = "run_dir: expected the output folder of balora train, or a complete checkpoint,"
    if run_dir.name.startswith("checkpoint-"):
        raise ValueError(f"{expected} found {run_dir}, which is incomplete; {_SHARDS}")
    if (run_dir / checkpoints.WEIGHTS).is_file():
        raise ValueError(f"{expected} found adapters alone in {run_dir}; a LoRA that was exported loads as it is")
    raise ValueError(f"{expected} found neither in {run_dir}; before its first checkpoint a run has nothing to export")


def _plain_tensors(tensors: dict[str, Tensor], config: Any, form: str, onto: str) -> dict[str, Tensor]:
    """What ``export_lora`` would write for the model of these tensors, which peft has saved.

    Raises:
        KeyError: one is missing.
    """
    in_full = [f"{name}." for name in config.modules_to_save or []]
    # peft saves a head or an embedding that has adapters too, unchanged
    plain = {key: t for key, t in tensors.items() if ".lora_" not in key and any(name in key for name in in_full)}
    names_of_a0_and_b0 = FROZEN[form]
    for key in tensors:
        name, _, factor = key.rpartition(".")
        if factor != names_of_a0_and_b0[0]:
            continue
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        a0, b0 = (tensors[f"{name}.{frozen}"] for frozen in names_of_a0_and_b0)
        if names_of_a0_and_b0 == FROZEN["offset"]:
            a0, b0 = rounded_alike(a, b, a0, b0)
        in_base = name.removeprefix("base_model.model.")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, in_base), config.lora_alpha)
        s = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
        plain.update(_plain("run_dir", name, a, b, *side_by_side(a, b, a0, b0, s, s), onto))
    return plain


def _plain(argument: str, name: str, a: Tensor, b: Tensor, left: Tensor, right: Tensor, onto: str) -> dict[str, Tensor]:
    """A' and B' of one layer: A and B as they are, or balanced factors of left·right, the change of W."""
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError(f"{argument}: expected finite adapters, found NaN or an infinity at {name}")
    if not first_process():
        return {}
    dtype = a.dtype
    if onto == "pretrained":
        a, b = _balanced(left.cpu(), right.cpu())  # on the CPU, so that a checkpoint gives the same bits
    return {
        f"{name}.lora_A.weight": a.to(dtype).cpu().contiguous(),
        f"{name}.lora_B.weight": b.to(dtype).cpu().contiguous(),
    }


def _write(
    directory: Path, tensors: dict[str, Tensor], config: peft.PeftConfig, onto: str, made_of: dict[str, str] | None
) -> None:
    fields = config.to_dict()
    fields.update(init_lora_weights=True, inference_mode=True)
    if onto == "pretrained":
        ranks = {pattern: 2 * rank for pattern, rank in (fields["rank_pattern"] or {}).items()}
        fields.update(
            r=2 * fields["r"],
            lora_alpha=2 * fields["r"],  # alpha = r everywhere: the scaling is in the factors
            rank_pattern=ranks,
            alpha_pattern=ranks,
            use_rslora=False,
        )
        if made_of:
            fields["base_model_name_or_path"] = made_of["base_model"]
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / checkpoints.WEIGHTS, metadata={"format": "pt"})
    peft.LoraConfig(**fields).save_pretrained(directory)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """a [q, in], b [out, q] with b·a = left·right and equal singular values. left [out, q], right [q, in]."""
    q = left.shape[1]
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = s.sqrt()
    a, b = root[:, None] * (vh @ q_right.T), (q_left @ u) * root
    missing = q - len(s)  # a layer narrower than 2r
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
