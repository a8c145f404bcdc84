#!/usr/bin/env bash
# Started by srun, once for each rank: says who this process is in the words that torchrun uses, then becomes
# `megatron-spo ARGUMENTS`. A script of its own, because only within the step are SLURM_PROCID and its kin those of a
# rank: the shells of sbatch and salloc have them too, and a command started there must not wait for other ranks.
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*} # "8(x4)": the same on every node
: "${MASTER_ADDR:?must name the node of rank 0}" "${MASTER_PORT:?must be a free port there}"
exec "${SPO_PYTHON:-python3}" -m megatron_spo "$@"
