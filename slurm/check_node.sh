#!/usr/bin/env bash
# Started by srun, once on each node, before the first step: is this machine fit for the job? Each thing that is wrong
# is one line with the node's name; exit code 2 then.
#   check_node.sh FOLDER GPUS FREE_GB [FILE ...]
#     FOLDER   the shared folder, in which logs/owner holds the number of this job
#     GPUS     how many there must be; 0 asks for none
#     FREE_GB  space that FOLDER must have
#     FILE     must be readable
set -uo pipefail

folder=$1 gpus=$2 free_gb=$3
shift 3
code=0
wrong() {
    echo "error: node $SLURMD_NODENAME: $*"
    code=2
}
last_words() { # the last line, without where in this script it came from
    tail -n1 | sed 's/.*: line [0-9]*: //'
}
space() { # in GB, of the disk that holds this path
    df -Pk "$1" | awk 'NR == 2 {print int($4 / 1048576)}'
}

if [[ $(cat "$folder/logs/owner" 2>&1) != "$SLURM_JOB_ID" ]]; then
    wrong "does not see the SPO_OUT of the first node ($folder); it must be a folder that all nodes share"
elif ! touch "$folder/logs/.$SLURMD_NODENAME" || ! rm "$folder/logs/.$SLURMD_NODENAME"; then
    wrong "cannot write in $folder"
elif (($(space "$folder") < free_gb)); then
    wrong "$(space "$folder") GB are free in $folder, SPO_MIN_FREE_GB asks for $free_gb: make room or lower it"
fi
for file in "$@"; do
    [[ -r $file ]] || wrong "cannot read $file"
done
(($(space "${TMPDIR:-/tmp}") >= 1)) || wrong "less than 1 GB is free in ${TMPDIR:-/tmp}"
if ((gpus > 0)); then
    if ! listed=$(nvidia-smi --list-gpus 2>&1); then
        wrong "no GPU answers ($(last_words <<<"$listed")); SPO_DEVICE=cpu runs without"
    elif (($(grep -c '^GPU' <<<"$listed") < gpus)); then
        wrong "$(grep -c '^GPU' <<<"$listed") GPUs answer, not $gpus; sbatch --exclude=$SLURMD_NODENAME does without it"
    fi
fi
if ! said=$("${SPO_PYTHON:-python3}" -m megatron_spo --version 2>&1); then
    wrong "${SPO_PYTHON:-python3} -m megatron_spo does not start: $(last_words <<<"$said")"
fi
exit $code
