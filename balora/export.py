"""The LoRA that comes out: the trained adapters as a plain PEFT LoRA."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor

from .adapters import ADAPTER, RESIDUAL_BASE, factors, form_of
from .sharding import first_process, full, reshard, sharded, whole


def export_lora(peft_model: peft.PeftModel, directory: str | Path, onto: str = "pretrained") -> None:
    """Write the trained adapters as a plain PEFT LoRA that loads without balora, onto the unchanged base model.

    s·(BA − B₀A₀) has rank 2r at most. It is refactored in float64 into balanced factors B'A' of rank 2r (alpha = 2r),
    so that the two parts do not have to cancel again in whatever type the LoRA is loaded in. A model with ordinary LoRA
    adapters is saved as it is. ``modules_to_save`` go with it, in full.

    With several processes every one calls this, and the first one writes. (Where an engine has sharded the adapters,
    FSDP2 or ZeRO-3, they are gathered here, which takes all of them.)

    Files: ``adapter_config.json`` and ``adapter_model.safetensors``. The exported model equals the trained one within
    the rounding of its type; in the residual form, that of W_res comes on top.

    A model of ``load_quantized`` can be exported in two ways. Onto "pretrained", the full-precision model that it was
    made of: then nothing of the trained model is missing but the error of the 4-bit weights, which its training saw.
    Onto "residual", its own 4-bit weights: A and B as they are, of rank r, the trained model up to peft's rounding.

    Raises:
        ValueError: another adapter is active, a factor is not finite, or onto="residual" has no such base.
    """
    if onto not in ("pretrained", "residual"):
        raise ValueError(f"onto: expected 'pretrained' or 'residual', found {onto!r}")
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(f"peft_model: expected a peft.PeftModel, found {type(peft_model).__name__}")
    directory = Path(directory)
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
            left, right = factors(layer, ADAPTER)
        if not (left.isfinite().all() and right.isfinite().all()):
            raise ValueError(f"peft_model: expected finite adapters, found NaN or an infinity at {name}")
        a, b = full(layer.lora_A[ADAPTER].weight), full(layer.lora_B[ADAPTER].weight)
        dtype = a.dtype
        if onto == "pretrained":
            a, b = _balanced(left, right)
        tensors[f"{name}.lora_A.weight"] = a.to(dtype).cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = b.to(dtype).cpu().contiguous()
    for name, m in peft_model.named_modules():
        if isinstance(m, ModulesToSaveWrapper):
            saved = m.modules_to_save[ADAPTER]
            with whole(saved.parameters()):
                for key, tensor in saved.state_dict().items():
                    tensors[f"{name}.{key}"] = full(tensor).cpu().clone()
    if not first_process():
        return
    fields = peft_model.peft_config[ADAPTER].to_dict()
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
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
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
