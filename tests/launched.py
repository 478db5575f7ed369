"""Commands of balora in one process of several: ``… tests/launched.py '[["train", "--model", …], …]'``.

Accelerate takes FSDP for several GPUs only and trains with DDP, without a word, on CPUs. Here CPUs pass for GPUs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[1]))
from balora import cli


def fsdp_on_cpus():
    begin = AcceleratorState.__init__

    def with_gpus(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = with_gpus


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpus()
    for command in json.loads(sys.argv[1]):
        if status := cli.main(command):
            sys.exit(status)
