#!/usr/bin/env bash
# SPO of Llama-3-70B on 32 H100s: reference pass, training, export to Hugging Face, answers to held-out prompts.
#   SPO_CONFIG=my.yaml SPO_OUT=/shared/spo-70b SPO_PROMPTS=held-out.jsonl sbatch slurm/spo_70b.sh
# from the root of the repository. Resumes by itself after time limit, preemption and lost nodes; see slurm/README.md.
#SBATCH --job-name=spo-70b
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
begin 3000 "$@" # GB for two checkpoints with optimizer state, one of them being written, and the export
run_steps
