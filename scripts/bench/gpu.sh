#!/usr/bin/env bash
# What is measured on a GPU, JSON into the folder given (default: .): steps of three bases, interleaved with PEFT's, and
# of a packed base of 8B.
#     bash scripts/bench/gpu.sh [FOLDER]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-.}
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"

step() { name=$1; shift; echo "== $name: step.py $*"; python3 "$here/step.py" --device cuda --json "$out/$name.json" "$@"; }

few="floor peft_lora lora dora dora_pruned peft_adalora adalora"
bf16="--precision bf16 --weights bfloat16"
# A decoder of 1B as it is tuned: all linear layers, gradient checkpointing, 8,192 and 32,768 tokens a step; compiled.
llama="--model llama-1b --length 2048 $bf16 --checkpointing --dropout 0"
step gpu-llama-1b $llama --batch 4 --rounds 11 --variants $few --memory
step gpu-llama-1b-large $llama --batch 16 --rounds 9 --variants $few
step gpu-llama-1b-compiled $llama --batch 16 --compile --rounds 7 --variants floor peft_lora dora
# An encoder, where the host is the limit; then compiled.
roberta="--model roberta-base --batch 32 --length 128 $bf16 --dropout 0.1"
step gpu-roberta-base $roberta --rounds 25 --variants $few --memory
step gpu-roberta-base-compiled $roberta --compile --rounds 25 --variants floor peft_lora dora
# A decoder of 8B whose base is packed (pip install 'dora-cli[bitsandbytes]').
for kind in bnb_nf4 bnb_int8; do
    echo "== gpu-llama-8b-$kind: quantised.py --kind $kind"
    python3 "$here/quantised.py" --device cuda --kind $kind $bf16 --checkpointing --json "$out/gpu-llama-8b-$kind.json"
done
