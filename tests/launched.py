"""Commands of balora in one process of several: ``… tests/launched.py '[["train", "--model", …], …]'``.

Accelerate takes FSDP for several GPUs only and trains with DDP, without a word, on CPUs. Here CPUs pass for GPUs.
With KILL_AT=step in the environment the second process dies after that step; with OTHER_FACTORS=1 the decompositions of
all commands but the first have other signs, as another machine's may.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
from balora import cli, principal
from balora import train as run


def fsdp_on_cpus():
    begin = AcceleratorState.__init__

    def with_gpus(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = with_gpus


class Death(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def die_at(step):
    train = run.train

    def until_then(trainer, checkpoint):
        trainer.add_callback(Death(step))
        return train(trainer, checkpoint)

    run.train = until_then


def other_signs():
    factors = principal.factors
    principal.factors = lambda *args, **kwargs: [(-b0, -a0) for b0, a0 in factors(*args, **kwargs)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpus()
    if "KILL_AT" in os.environ:
        die_at(int(os.environ["KILL_AT"]))
    for command in json.loads(sys.argv[1]):
        if status := cli.main(command):
            sys.exit(status)
        if "OTHER_FACTORS" in os.environ:
            other_signs()
    if torch.distributed.is_initialized():  # threads that are still there at the end of a process abort it
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
