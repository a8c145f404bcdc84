#!/usr/bin/env bash
# Checks that a node can run the job. Started by srun once on each node, before the first step. Prints one line with the
# node's name for each problem, and then exits with code 2.
#   check_node.sh FOLDER GPUS FREE_GB [FILE ...]
#     FOLDER   the shared folder, in which logs/owner holds the id of this job
#     GPUS     number of GPUs that the node must have; 0 for none
#     FREE_GB  free space in GB that FOLDER must have
#     FILE     file that must be readable
set -uo pipefail

folder=$1 gpus=$2 free_gb=$3
shift 3
code=0
wrong() {
    echo "error: node $SLURMD_NODENAME: $*"
    code=2
}
last_words() { # the last line, without the position in this script
    tail -n1 | sed 's/.*: line [0-9]*: //'
}
space() { # free space in GB of the disk that holds a path
    df -Pk "$1" | awk 'NR == 2 {print int($4 / 1048576)}'
}

if [[ $(cat "$folder/logs/owner" 2>&1) != "$SLURM_JOB_ID" ]]; then
    wrong "does not see the SPO_OUT of the first node ($folder); use a folder that all nodes share"
elif ! touch "$folder/logs/.$SLURMD_NODENAME" || ! rm "$folder/logs/.$SLURMD_NODENAME"; then
    wrong "cannot write in $folder"
elif (($(space "$folder") < free_gb)); then
    wrong "$(space "$folder") GB are free in $folder, but SPO_MIN_FREE_GB requires $free_gb; free some space or lower it"
fi
for file in "$@"; do
    [[ -r $file ]] || wrong "cannot read $file"
done
(($(space "${TMPDIR:-/tmp}") >= 1)) || wrong "less than 1 GB is free in ${TMPDIR:-/tmp}; free some space or set TMPDIR"
if ((gpus > 0)); then
    if ! listed=$(nvidia-smi --list-gpus 2>&1); then
        wrong "no GPU found ($(last_words <<<"$listed")); set SPO_DEVICE=cpu to run without GPUs"
    elif (($(grep -c '^GPU' <<<"$listed") < gpus)); then
        wrong "$(grep -c '^GPU' <<<"$listed") GPUs found, but $gpus are required; avoid the node with sbatch --exclude=$SLURMD_NODENAME"
    fi
fi
if ! said=$("${SPO_PYTHON:-python3}" -m megatron_spo --version 2>&1); then
    wrong "${SPO_PYTHON:-python3} -m megatron_spo does not start: $(last_words <<<"$said")"
fi
exit $code
