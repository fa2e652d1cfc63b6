#!/usr/bin/env bash
# What is to be shown on an NVIDIA GPU, in one go: parity, the service end to end, decode speed. Usage: bench/gpu.sh DIR
set -u
out=$1
mkdir -p "$out"
python3 -c 'import torch, triton, transformers, platform; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, transformers.__version__, platform.python_version())' | tee "$out/versions.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$out/versions.txt"
timeout 120 python3 -m pytest -m gpu -W default -q -s --durations=5 tests/model tests/checkpoint 2>&1 | tr '\r' '\n' |
    grep -v "Loading weights\|Writing model\|^$" | tee "$out/parity.txt"
timeout 100 python3 -m bench.end_to_end --out "$out/end-to-end-demo.json" 2>&1 | grep -v '^[ {}]'
timeout 60 python3 -m bench.end_to_end --streams 1 --out "$out/end-to-end-demo-fp32.json" -- --dtype float32 2>&1 | grep -v '^[ {}]'
timeout 100 python3 -m bench.end_to_end --random-345m --out "$out/end-to-end-345m.json" 2>&1 | grep -v '^[ {}]'
timeout 60 python3 -m bench.decode --steps 1@256,8@512,64@192,256@192 --out "$out/decode.json" 2>&1 | tail -6
