#!/usr/bin/env bash
# SPO of Llama-3-8B on one node of 8 H100s; otherwise the same as spo_70b.sh.
#   SPO_CONFIG=my.yaml SPO_OUT=/shared/spo-8b sbatch slurm/spo_8b_single_node.sh
#SBATCH --job-name=spo-8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

home=${SPO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/lib.sh
source "$home/slurm/lib.sh" || { echo "error: submit from the root of the repository, or set SPO_HOME to it" >&2 && exit 2; }

: "${SPO_LAYOUT=parallel.tensor=2 parallel.sequence=true}" # and data parallel 4
begin 400 "$@"
run_steps
