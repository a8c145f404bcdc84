#!/usr/bin/env bash
# The steps of a configuration on any number of nodes. `megatron-spo slurm submit my.yaml --nodes 4` submits this script with
# the number of nodes and tasks; the layout is that of the configuration. Otherwise the same as spo_70b.sh.
#SBATCH --job-name=spo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

home=${SPO_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
# shellcheck source=slurm/lib.sh
source "$home/slurm/lib.sh" || { echo "error: use megatron-spo slurm submit, or set SPO_HOME to the root of the repository" >&2 && exit 2; }

begin 10 "$@"
run_steps
