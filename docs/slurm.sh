#!/bin/bash
# One training job on several nodes of a Slurm cluster; docs/multinode.md explains it.
#
#   source .venv/bin/activate          # sbatch hands the environment on
#   sbatch docs/slurm.sh lpa_3b.yaml runs/lpa_3b [--training.max_steps 1000 ...]
#
#SBATCH --job-name=lpa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

if [ $# -lt 2 ]; then
    echo "usage: sbatch docs/slurm.sh CONFIG RUN_DIR [options of train.py]" >&2
    exit 2
fi
config=$1 run_dir=$2
shift 2

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

started=$(mktemp)
trap 'rm -f "$started"' EXIT

# A task is a rank. `exec` makes it the process that Slurm signals.
# shellcheck disable=SC2016  # the variables are those of the task
srun --kill-on-bad-exit=1 --wait=180 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py "$@"
' rank --config "$config" --training.run_dir "$run_dir" "$@"
code=$?

# Stopped by a signal, a checkpoint is saved: the ranks leave with code 75. srun may report the
# signal with which it ended the last of them, so the file that this start wrote is asked. Anything
# else would only fail once more.
if [ $code -ne 0 ] && [ $code -ne 2 ] && [ "$run_dir/status.json" -nt "$started" ] &&
    grep -q '"state": "preempted"' "$run_dir/status.json"; then
    echo "preempted: $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
