#!/usr/bin/env bash
# Started by srun once for each rank: sets the variables that torchrun would set, then runs `megatron-spo ARGUMENTS`.
# This is a separate script because SLURM_PROCID etc. describe a rank only within the step: the shells of sbatch and
# salloc have these variables, too, and a command started there must not wait for other ranks.
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*} # "8(x4)" becomes "8"
: "${MASTER_ADDR:?must be the address of the node of rank 0}" "${MASTER_PORT:?must be a free port on the node of rank 0}"
exec "${SPO_PYTHON:-python3}" -m megatron_spo "$@"
