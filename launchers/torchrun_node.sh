#!/usr/bin/env bash
# Starts one node of a multi-node run with torchrun; run it once on every node. See usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: [VARIABLE=value ...] torchrun_node.sh SCRIPT [ARGS]      (or: -m MODULE [ARGS])

Run it on every node, with the same script, arguments and NNODES. Two ways for the nodes to meet:

  static   every node is told its number        c10d   the nodes agree among themselves; restarts work
    MASTER_ADDR  host of node 0 (required)        RDZV_ENDPOINT  host[:port] of any one node (required)
    NODE_RANK    0 to NNODES - 1 (required)       RDZV_ID        name of this run, equal on all nodes
    MASTER_PORT  default 29500                                   (default commcomp)

For both:
  NNODES          number of nodes (required); with c10d also MIN:MAX
  NPROC_PER_NODE  processes on this node; default: one for each GPU that nvidia-smi lists, else 1
  MAX_RESTARTS    restarts of all processes after a failure, default 0
  IFNAME          network interface to use (sets GLOO_, TP_ and NCCL_SOCKET_IFNAME)
  LOCAL_ADDR      this node's address, where its host name does not lead the others to it
  TORCHRUN        the torchrun command; default: the one in .venv of this repository, else in PATH

Examples, on nodes a and b:
  a$ NNODES=2 NODE_RANK=0 MASTER_ADDR=a launchers/torchrun_node.sh train.py --lr 0.1
  b$ NNODES=2 NODE_RANK=1 MASTER_ADDR=a launchers/torchrun_node.sh train.py --lr 0.1
or on both:
   $ NNODES=2 RDZV_ENDPOINT=a:29400 launchers/torchrun_node.sh train.py --lr 0.1
TEXT
}

fail() {
    printf 'torchrun_node.sh: %s\nRun it with --help for the variables.\n' "$1" >&2
    exit 2
}

# whole_number NAME MIN MAX: the variable called NAME must hold a whole number in that range.
whole_number() {
    local value=${!1}
    if ! [[ $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2 || 10#$value > $3)); then
        fail "$1='$value' is not a whole number from $2 to $3"
    fi
}

gpus() {
    local count=0
    if command -v nvidia-smi >/dev/null; then
        count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
    fi
    echo "$count"
}

case ${1:-} in
    -h | --help) usage && exit 0 ;;
    '') usage >&2 && exit 2 ;;
    -m) [[ -n ${2:-} ]] || fail "-m was given without a module name" ;;
    *) [[ -f $1 ]] || fail "there is no script '$1' (seen from $PWD)" ;;
esac

[[ -n ${NNODES:-} ]] || fail "NNODES is not set: give the number of nodes, such as NNODES=2"
if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=$(gpus)
    ((NPROC_PER_NODE > 0)) || NPROC_PER_NODE=1
fi
MAX_RESTARTS=${MAX_RESTARTS:-0}
whole_number NPROC_PER_NODE 1 1024
whole_number MAX_RESTARTS 0 1000000

arguments=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    [[ -z ${NODE_RANK:-} ]] ||
        fail "RDZV_ENDPOINT and NODE_RANK are both set: unset NODE_RANK for c10d, or RDZV_ENDPOINT for static"
    [[ $NNODES =~ ^[0-9]+(:[0-9]+)?$ ]] || fail "NNODES='$NNODES' is neither a number nor MIN:MAX"
    arguments+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-commcomp}")
elif [[ -n ${MASTER_ADDR:-} ]]; then
    [[ -n ${NODE_RANK:-} ]] || fail "NODE_RANK is not set: give this node's number, 0 on the node $MASTER_ADDR"
    MASTER_PORT=${MASTER_PORT:-29500}
    whole_number NNODES 1 100000
    whole_number NODE_RANK 0 "$((NNODES - 1))"
    whole_number MASTER_PORT 1 65535
    arguments+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
    fail "neither MASTER_ADDR (static) nor RDZV_ENDPOINT (c10d) is set"
fi
[[ -z ${LOCAL_ADDR:-} ]] || arguments+=(--local-addr "$LOCAL_ADDR")
if [[ -n ${IFNAME:-} ]]; then
    export GLOO_SOCKET_IFNAME=$IFNAME TP_SOCKET_IFNAME=$IFNAME NCCL_SOCKET_IFNAME=$IFNAME
fi

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${TORCHRUN:-} ]]; then
    TORCHRUN=$here/../.venv/bin/torchrun
    [[ -x $TORCHRUN ]] || TORCHRUN=torchrun
fi
command -v "$TORCHRUN" >/dev/null ||
    fail "no torchrun was found: activate the environment with torch in it, or set TORCHRUN to its path"
exec "$TORCHRUN" "${arguments[@]}" "$@"
