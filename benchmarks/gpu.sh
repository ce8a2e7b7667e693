#!/bin/sh
# The step benchmark on an NVIDIA GPU, in bfloat16, at a size that fills a card
# of 80 GB: a decoder of 1.5 billion random parameters, 8 x 1024 tokens, against
# PEFT on torch with flash attention and a fused AdamW. About 4 minutes; boft is
# left out, whose CUDA kernel PEFT compiles first (METHODS=... has it).
#
#   sh benchmarks/gpu.sh [folder for the results, by default .]
#
# What `python -m benchmarks.step --help` lists may be added by FLAGS.
set -e
out=${1:-.}
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
# Both libraries hold their models on the card at once.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.55}
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
exec ${PYTHON:-python3} -m benchmarks.step --model=decoder_1b5 --batch=8 \
    --tokens=1024 --dtype=bfloat16 --scan --pairs=10 --traffic=false \
    --methods=${METHODS:-lora,dora,oft,ia3,ssf,ln_tuning,prefix,prompt} \
    --out="$out/step_gpu.json" $FLAGS
