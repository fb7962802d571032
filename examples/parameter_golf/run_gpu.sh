#!/usr/bin/env bash
# Train baseline and looped at the same time, one GPU each (one after the other where there is only one, or none).
#
#   run_gpu.sh DATA OUT SECONDS [SEED] [train.py options, such as --compile]
#
# DATA: folder of data.py, shards plain or .xz. OUT: gets baseline-SEED.pt/.json and looped-SEED.pt/.json, and logs.
# MODELS names other factories: MODELS="mini mini_looped" run_gpu.sh DATA OUT 60
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$1 out=$2 seconds=$3 seed=${4:-0}
shift $(($# > 3 ? 4 : 3))
mkdir -p "$out"
for f in "$data"/*.bin.xz; do
	[ -e "$f" ] && [ ! -e "${f%.xz}" ] && xz -dk "$f" &
done
wait
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
n=0 jobs=()
for name in ${MODELS:-baseline looped}; do
	CUDA_VISIBLE_DEVICES=$((gpus ? n % gpus : 0)) "${PYTHON:-python3}" "$here/train.py" --factory "$name" --data "$data" \
		--seconds "$seconds" --seed "$seed" -o "$out/$name-$seed.pt" "$@" >"$out/$name-$seed.log" 2>&1 &
	jobs+=($!)
	n=$((n + 1))
	[ $((n % (gpus > 1 ? gpus : 1))) -eq 0 ] && { for j in "${jobs[@]}"; do wait "$j" || failed=1; done; jobs=(); }
done
for j in "${jobs[@]}"; do wait "$j" || failed=1; done
tail -qn 1 "$out"/*-"$seed".log
exit "${failed:-0}"
