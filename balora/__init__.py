"""BA-LoRA fine-tuning: output regularizers that never build the [tokens, vocabulary] tensors, on PiSSA adapters.

``import balora`` needs torch only. ``balora.functional`` holds the losses; what touches a model (``get_pissa_model``,
``attach``, ``teacher``, ...) needs transformers and peft, imported where they are used.
"""

from . import functional
from .config import BALoraConfig
from .functional import BALoraOutput, LinearHead

__version__ = "0.1.0"

__all__ = [
    "BALoraConfig",
    "BALoraOutput",
    "LinearHead",
    "functional",
]
