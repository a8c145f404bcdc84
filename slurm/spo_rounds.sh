#!/usr/bin/env bash
# Rounds of sampling, pairs, training and evaluation (`megatron-spo rounds`, docs/on_policy.md) on 4 nodes of 8 H100s.
#   SPO_CONFIG=rounds.yaml SPO_OUT=/shared/rounds sbatch slurm/spo_rounds.sh
# from the root of the repository. Each part of the prompts is sampled on one node, with vLLM on all of its GPUs, as many
# parts at a time as there are nodes; training and reference pass then use all nodes. Resumes by itself, as spo_70b.sh.
#SBATCH --job-name=spo-rounds
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

home=${SPO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/lib.sh
source "$home/slurm/lib.sh" || { echo "error: submit from the root of the repository, or set SPO_HOME to it" >&2 && exit 2; }

: "${SPO_LAYOUT=parallel.tensor=4 parallel.pipeline=8 parallel.virtual_pipeline=5 parallel.sequence=true}" # on 32 GPUs one replica
begin 3000
run_rounds
