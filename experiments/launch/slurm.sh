#!/usr/bin/env bash
# A reproduction on the GPUs of one or several nodes under Slurm, one process for each GPU.
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 experiments/launch/slurm.sh [SET] [PROFILE]
#
# From the checkout, after `make setup` and `.venv/bin/pip install -e '.[cuda12]'`. WORKDIR must be a folder that all nodes
# see. A job that is preempted, or ends at its time limit, is queued again and goes on.
#SBATCH --job-name=rbf_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=rbf_jax-%j.log
set -euo pipefail

SET=${1:-mnist} PROFILE=${2:-gpu}
WORKDIR=${WORKDIR:-$HOME/.cache/rbf_jax/runs}

command=(
    .venv/bin/python -m experiments.reproduce
    "--config=experiments/configs/$SET.py:$PROFILE"
    "--workdir=$WORKDIR/$SET-$PROFILE"
    --distributed
)
if [[ -n ${DATA_DIR:-} ]]; then
    command+=("--data_dir=$DATA_DIR")
fi

# SIGTERM makes every process write a checkpoint and end with 143.
code=0
srun --kill-on-bad-exit=0 "${command[@]}" || code=$?
if ((code == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
