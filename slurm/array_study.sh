#!/usr/bin/env bash
# A sweep as a job array: one full run on one node for each line of a file, and then a table of all runs.
#   SPO_CONFIG=my.yaml SPO_OUT=/shared/study SPO_STUDY=lines.txt bash slurm/array_study.sh [sbatch options]
# on the login node, from the repository's root. With --check as the first option, every line is checked and nothing is
# queued. A line holds overrides as `train` takes them, such as
#   loss.name=simpo spo.lambda=0.5
# Empty lines and lines that begin with # are ignored. Three jobs are submitted, each with the given options:
# 1. the reference pass, which all runs share (a run that changes the model or data must set its own reference.cache);
# 2. the array, whose task N writes SPO_OUT/N, SPO_AT_ONCE tasks at a time (default: all);
# 3. the table SPO_OUT/summary.txt.
#SBATCH --job-name=spo-study
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
source "$home/slurm/lib.sh" || { echo "error: run this script from the root of the repository, or set SPO_HOME to it" >&2 && exit 2; }

submit() {
    local reference array summary after=()
    [[ -z ${SLURM_JOB_ID:-} ]] || die 2 "this script submits jobs itself; run it with bash on the login node, not with sbatch"
    check_variables
    mkdir -p "$SPO_OUT"
    printf '%s\n' "${lines[@]}" >"$SPO_OUT/study.txt" # task N must find line N even if the original file changes
    export SPO_STUDY=$SPO_OUT/study.txt
    if wants_reference; then
        reference=$(SPO_STUDY_PART=reference sbatch --parsable "$@" "$0")
        after=(--dependency="afterok:$reference" --kill-on-invalid-dep=yes)
        echo "reference pass: job $reference"
    fi
    array=$(SPO_STUDY_PART=task sbatch --parsable "${after[@]}" --array="1-${#lines[@]}${SPO_AT_ONCE:+%$SPO_AT_ONCE}" "$@" "$0")
    summary=$(SPO_STUDY_PART=summary sbatch --parsable --dependency="afterany:$array" "$@" "$0")
    echo "${#lines[@]} runs: job array $array"
    echo "table: job $summary, $SPO_OUT/summary.txt"
}
check_lines() {
    local line given=${SPO_OVERRIDES:-}
    for line in "${lines[@]}"; do
        echo "== $line"
        SPO_OVERRIDES="$given $line"
        check_only 400 "$@"
    done
}
wants_reference() {
    [[ " ${SPO_STEPS:=$ALL_STEPS} " == *" reference "* ]]
}

[[ -r ${SPO_STUDY:-} ]] || die 2 "SPO_STUDY=${SPO_STUDY:-} must name a file with one line of overrides for each run"
mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$SPO_STUDY")
((${#lines[@]} > 0)) || die 2 "SPO_STUDY=$SPO_STUDY has no line of overrides; add one for each run"
: "${SPO_LAYOUT=parallel.tensor=2 parallel.sequence=true}"
study=${SPO_OUT:-}
case ${SPO_STUDY_PART:-submit} in
    submit) if [[ ${1:-} == --check ]]; then check_lines "${@:2}"; else submit "$@"; fi ;;
    reference)
        SPO_CACHE=$study/reference SPO_OUT=$study/shared SPO_STEPS=reference
        begin 10
        run_steps
        ;;
    task)
        line=${lines[SLURM_ARRAY_TASK_ID - 1]}
        SPO_OUT=$study/$SLURM_ARRAY_TASK_ID SPO_OVERRIDES="${SPO_OVERRIDES:-} $line"
        if wants_reference && [[ $line != *reference.cache=* ]]; then # the first job has filled the cache
            SPO_CACHE=$study/reference SPO_STEPS=${SPO_STEPS/reference/}
        fi
        begin 400
        run_steps
        ;;
    summary)
        SPO_OUT=$study/shared
        begin 1
        launch 1 1 "$SPO_OUT/logs/summary.log" "$SPO_PYTHON" "$home/slurm/summary.py" "$study" ||
            die $? "the table could not be made: $(tail -n1 "$SPO_OUT/logs/summary.log")"
        cat "$study/summary.txt"
        ;;
esac
