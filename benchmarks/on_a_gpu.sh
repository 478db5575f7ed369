#!/usr/bin/env bash
# What needs a GPU, the most wanted first, within a time. Called again it goes on where the time was over.
#
#     benchmarks/on_a_gpu.sh OUT [SECONDS]
#
# Tables, pictures and the log of every step go to OUT/gpu.tgz, anew after each step: whatever ends the call costs the
# running step alone. The last one is stopped after SECONDS (540). What has to be installed: benchmarks/README.md.
# A method, model or implementation less: METHODS, COST_OPTIONS and the like, as for make. The extension is built for the
# first device, unless TORCH_CUDA_ARCH_LIST names others.
set -u
out=$(realpath -m "${1:?expected the folder for gpu.tgz}")
cd "$(dirname "$0")/.."
seconds=${2:-540}
least=${LEAST:-15}  # seconds that a step is begun with
work=runs/on-a-gpu
mkdir -p "$out" $work/logs $work/results $work/pictures
export RESULTS=$work/results PICTURES=$work/pictures
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}

archive() {
  tar czf "$out/.gpu.tgz" -C $work logs results pictures && mv "$out/.gpu.tgz" "$out/gpu.tgz"
}

# step NAME COMMAND…: unless it has ended in an earlier call, well or not.
step() {
  local name=$1 left=$((seconds - SECONDS)) status
  shift
  if [ -e $work/$name.done ]; then return; fi
  if [ $left -lt $least ]; then echo "== $name: no time left"; return; fi
  echo "== $name: $left s left"
  timeout --kill-after=5 $left "$@" > $work/logs/$name.log 2>&1
  status=$?
  tail -n 12 $work/logs/$name.log
  echo "== $name: status $status, $SECONDS s"
  # What a whole call is too short for would keep the others from their turn.
  if [ $status -ne 124 ] && [ $status -ne 137 ] || [ $left -gt $((seconds - least)) ]; then touch $work/$name.done; fi
  archive
}

step build make gpu-build
step smoke make gpu-cost COST=llama-3-8b CHECKPOINTING=off METHODS="pissa balora" COST_OPTIONS="--steps 2 --warm_up 1" \
  RESULTS=$work/smoke
step cost-llama-3-8b make gpu-cost COST=llama-3-8b CHECKPOINTING=off
step cost-llama-2-7b make gpu-cost COST=llama-2-7b CHECKPOINTING="off on"
step tests env PYTEST_ADDOPTS="-n 12 -v --tb=short" make -k gpu-tests
step bench make gpu-bench IMPL="triton cuda streaming torch batched naive liger-chunked-jsd liger-flce cut-cross-entropy svd-lowrank peft-pissa-niter-16"
step profiles make gpu-profiles
step cost-rest make gpu-cost COST="llama-3-8b gemma-2-2b" CHECKPOINTING=on METHODS="pissa published balora"
step sweep make gpu-sweep IMPL="triton naive"
