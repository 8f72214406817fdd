#!/usr/bin/env bash
# One training on the nodes of a Slurm job, with a rank for each GPU. Submit it from the checkout:
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=40 launch/slurm.sh --ds_config launch/ds_config_v100.json \
#       --config launch/configs/audioset2m.toml --set data.manifest=/shared/packed
#
# Arguments are those of launch/train.py. A run that is in run.out already is resumed. Five minutes before the time
# limit, and when it is preempted, the run saves and stops; at the time limit the job puts itself into the queue again.
#
# FASTSSKD_VENV   the environment, on a disk that all nodes see; default .venv in the checkout
#
#SBATCH --job-name=fastsskd
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}

cd "${SLURM_SUBMIT_DIR:-.}" # Slurm runs a copy of this file, which lies elsewhere
[ -f launch/train.py ] || fail "$PWD: no launch/train.py here; submit from the checkout"
[ -n "${SLURM_JOB_NODELIST:-}" ] || fail "not in a Slurm job; use sbatch, or deepspeed launch/train.py without Slurm"
FASTSSKD_VENV="${FASTSSKD_VENV:-$PWD/.venv}"
[ -x "$FASTSSKD_VENV/bin/torchrun" ] ||
    fail "no environment in $FASTSSKD_VENV; make it on a node with a network: source launch/environment.sh"
export PATH="$FASTSSKD_VENV/bin:$PATH"

# Also finds mistakes in the arguments, before any node starts.
settings="$(python launch/train.py "$@" --print-config)"
out="$(sed -n '/^\[run\]/,/^$/s/^out = "\([^"]*\)".*/\1/p' <<<"$settings")"
resume=()
if [ -f "$out/config.toml" ]; then resume=(--resume); fi
before="$(cksum "$out/result.json" 2>/dev/null || true)"

read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol names no node of this job"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
ranks="${SLURM_GPUS_ON_NODE:-1}"
export MASTER_ADDR MASTER_PORT ranks

trap : TERM # the ranks are told too: this shell waits until they have saved
step=(srun --ntasks-per-node=1 --kill-on-bad-exit=1)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi # srun does not inherit it
# shellcheck disable=SC2016  # each node has its own SLURM_NODEID
"${step[@]}" bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$ranks" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" launch/train.py "$@"' train "$@" \
    ${resume[@]+"${resume[@]}"} && code=0 || code=$?

# The launchers' exit codes do not tell success; the result does, if it is this try's.
status="none"
after="$(cksum "$out/result.json" 2>/dev/null || true)"
if [ -n "$after" ] && [ "$after" != "$before" ]; then
    status="$(sed -n 's/^ *"status": "\([a-z]*\)".*/\1/p' "$out/result.json")"
fi
echo "run $out: $status (exit code $code)"
if [ "$status" = stopped ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID" # at the time limit; of a preempted job Slurm does it, of a cancelled one nobody
fi
[ "$status" = complete ]
