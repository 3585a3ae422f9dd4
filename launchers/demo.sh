#!/usr/bin/env bash
# From a fresh clone to a measured comparison: trains a GPT on two local processes, plain and with compressed gradients,
# and lets a smaller one go on from a compressed checkpoint.
#
#   bash launchers/demo.sh            # about 5 minutes on 2 cores
#   RATE=1gbit STEPS=60 OUT=runs/fast bash launchers/demo.sh
#
# As root on Linux the two processes are nodes of their own with a link of RATE between them (launchers/shaped_cluster.py);
# elsewhere they talk over loopback, which is so fast that compression has little to win.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

RATE="${RATE:-100mbit}"
STEPS="${STEPS:-30}"
OUT="${OUT:-runs/demo-$(date +%Y%m%d-%H%M%S)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

cd "$REPOSITORY"
setup_environment
ensure_iproute2

if reason="$("$PYTHON" launchers/shaped_cluster.py --check 2>&1)"; then
    network="two nodes with a link of $RATE between them"
    launch() { "$PYTHON" launchers/shaped_cluster.py --nodes 2 --rate "$RATE" --logs "$OUT/$1/logs" -- "${@:2}"; }
else
    network="loopback, whose speed is not limited (for a slow link: $reason)"
    launch() { "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 "${@:2}"; }
fi

train() { # name, then settings
    launch "$1" examples/train_gpt.py model=gpt_10m steps="$STEPS" warmup_steps=10 log_every=5 eval_every=10 \
        eval_batches=4 output_dir="$OUT/$1" "${@:2}"
}

echo
echo "Network: $network"
echo "== $STEPS steps of plain DistributedDataParallel =="
train plain gradient=none
echo
echo "== $STEPS steps with gradients compressed by commcomp =="
train compressed gradient=low_rank
echo
"$PYTHON" -m commcomp.telemetry.report "$OUT/plain" "$OUT/compressed" --out "$OUT"
if "$PYTHON" -c 'import commcomp._checkpoint' 2>/dev/null; then # that part is there where a compiler was
    echo
    echo "== A smaller GPT, interrupted, goes on from a checkpoint compressed by commcomp =="
    "$PYTHON" examples/checkpoint_demo.py --modes standard --train 60 --further 20 --out "$OUT/checkpoint"
    echo
fi
echo "logs $OUT   (TensorBoard: $COMMCOMP_VENV/bin/tensorboard --logdir $OUT)"
