# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# What dist_train.sh, dist_test.sh, slurm_train.sh and slurm_test.sh share; they source it.

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"

# need COUNT FOUND USAGE: ends the script with its usage where arguments are missing
need() {
    if [ "$2" -lt "$1" ]; then
        echo "usage: bash $0 $3" >&2
        exit 2
    fi
}

# distribute PROCESSES TOOL ARGUMENTS...: so many processes on this machine
distribute() {
    local processes=$1 tool=$2
    shift 2
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$processes" \
        "$TOOLS/$tool" "$@"
}

# submit PARTITION JOB_NAME TOOL ARGUMENTS...: GPUS processes, GPUS_PER_NODE on each machine
submit() {
    local partition=$1 job=$2 tool=$3
    shift 3
    local gpus=${GPUS:-8} per_node=${GPUS_PER_NODE:-8}
    local resources=(--ntasks="$gpus" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1)
    if [ "$per_node" -gt 0 ]; then
        per_node=$((gpus < per_node ? gpus : per_node))
        resources+=(--gres="gpu:$per_node" --ntasks-per-node="$per_node")
    fi
    # SRUN_ARGS is split into words on purpose
    # shellcheck disable=SC2086
    exec srun -p "$partition" --job-name="$job" "${resources[@]}" ${SRUN_ARGS:-} \
        python -u "$TOOLS/$tool" "$@"
}
