# shellcheck shell=bash
# Functions that the job scripts share, which source this file within `sbatch`. README.md lists the variables.
set -euo pipefail

: "${home:?must be set by the script that sources this file, to the folder of the repository}"
KNOWN=" SPO_AT_ONCE SPO_ATTEMPTS SPO_CACHE SPO_CONFIG SPO_CONTAINER SPO_DEVICE SPO_EXPORT SPO_GENERATE SPO_HOME SPO_INTERFACE
 SPO_LAYOUT SPO_MIN_FREE_GB SPO_MIN_LINK_GB_S SPO_MOUNTS SPO_OUT SPO_OVERRIDES SPO_PROMPTS SPO_PYTHON
 SPO_REFERENCE_LAYOUT SPO_REFERENCE_NODES SPO_REHEARSE SPO_STEPS SPO_STUDY SPO_STUDY_PART SPO_WEBHOOK "

ALL_STEPS="reference train export evaluate"
job_log=/dev/null at_start=''
say() {
    echo "$(date '+%F %T') job ${SLURM_JOB_ID:-none}.${SLURM_RESTART_COUNT:-0}: $*" | tee -a "$job_log" >&2
}

die() { # CODE MESSAGE
    say "error: $2"
    notify "failed with code $1: $2"
    exit "$1"
}

# Posts one line to SPO_WEBHOOK, if it is set and the job has started: {"text": ...}, which Slack, Mattermost and others read.
notify() { # TEXT
    local text="${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID:-}: $1"
    [[ -n ${SPO_WEBHOOK:-} && $job_log != /dev/null ]] || return 0
    text=${text//\\/\\\\} text=${text//\"/\\\"} text=${text//[[:cntrl:]]/ }
    curl -fsS -m 20 -H 'Content-Type: application/json' -d "{\"text\": \"$text\"}" "$SPO_WEBHOOK" >/dev/null ||
        say "SPO_WEBHOOK could not be reached"
}

# Sets `words` to the words of a text; quotes and backslashes work as in a shell, but nothing is expanded or run.
split() {
    local text
    text=$(xargs -rn1 printf '%s\n' <<<"$1" 2>&1) || die 2 "cannot be split into words: $1 ($text); check its quotes"
    words=()
    [[ -z $text ]] || mapfile -t words <<<"$text"
}

check_variables() { # and set the defaults
    local name
    for name in $(compgen -e SPO_); do
        [[ $KNOWN =~ [[:space:]]${name}[[:space:]] ]] || die 2 "$name is not a variable of these scripts; see slurm/README.md for their names"
    done
    [[ -n ${SPO_CONFIG:-} ]] || die 2 "SPO_CONFIG is not set; set it to the configuration file (YAML) of the training"
    [[ -n ${SPO_OUT:-} ]] || die 2 "SPO_OUT is not set; set it to a folder, shared by all nodes, for all output"
    [[ -r $SPO_CONFIG ]] || die 2 "SPO_CONFIG=$SPO_CONFIG cannot be read (in $PWD on $(hostname))"
    : "${SPO_STEPS:=$ALL_STEPS}" "${SPO_EXPORT:=latest}" "${SPO_DEVICE:=gpu}" "${SPO_ATTEMPTS:=3}"
    for name in $SPO_STEPS; do
        [[ " $ALL_STEPS " == *" $name "* ]] || die 2 "SPO_STEPS: unknown step $name; use some of: $ALL_STEPS"
    done
    [[ $SPO_EXPORT == latest || $SPO_EXPORT == best ]] || die 2 "SPO_EXPORT must be latest or best, not $SPO_EXPORT"
    [[ $SPO_DEVICE == gpu || $SPO_DEVICE == cpu ]] || die 2 "SPO_DEVICE must be gpu or cpu, not $SPO_DEVICE"
    [[ ${SPO_REHEARSE:=0} == [01] ]] || die 2 "SPO_REHEARSE must be 1 or 0, not $SPO_REHEARSE"
    [[ ${SPO_MIN_LINK_GB_S:-1} =~ ^[0-9]+([.][0-9]+)?$ ]] || die 2 "SPO_MIN_LINK_GB_S must be a number, not $SPO_MIN_LINK_GB_S"
    for name in SPO_ATTEMPTS SPO_MIN_FREE_GB SPO_REFERENCE_NODES; do
        [[ ${!name:-1} =~ ^[0-9]+$ ]] || die 2 "$name must be a whole number, not ${!name}"
    done
}

# Checks the variables, claims SPO_OUT and checks the nodes; MIN_FREE_GB is the default of SPO_MIN_FREE_GB.
begin() { # MIN_FREE_GB [ARGUMENTS OF THE SCRIPT ...]
    if [[ ${2:-} == --check ]]; then
        check_only "$1" "${@:3}"
        exit 0
    fi
    [[ -n ${SLURM_JOB_ID:-} ]] || die 2 "this is a job script; submit it with: sbatch slurm/${0##*/}, or check it with: bash slurm/${0##*/} --check"
    [[ -n ${SLURM_NTASKS_PER_NODE:-} ]] || die 2 "the number of tasks per node is not set; submit with --ntasks-per-node, one task for each GPU of a node"
    check_variables
    mkdir -p "$SPO_OUT/logs" "$SPO_OUT/done" || die 2 "SPO_OUT=$SPO_OUT cannot be created or written to"
    SPO_OUT=$(cd "$SPO_OUT" && pwd)
    job_log=$SPO_OUT/logs/job.log
    own_the_folder
    at_start=$(progress)
    set_start_options
    say "starts on $SLURM_JOB_NODELIST; logs in $SPO_OUT/logs"
    check_nodes "${SPO_MIN_FREE_GB:-$1}"
    check_links
}

# Checks what can be checked on a login node, and submits nothing: variables, SLURM's options, free space, and with
# `train --check` configuration, layout, model, data and memory. Number of nodes and tasks: as in the script's header.
check_only() { # MIN_FREE_GB [--nodes=N] [--ntasks-per-node=N] [further options of sbatch ...]
    local free_gb=${SPO_MIN_FREE_GB:-$1} place option nodes tasks words
    shift
    nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$0") tasks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$0")
    for option in "$@"; do
        case $option in
            --nodes=*) nodes=${option#*=} ;;
            --ntasks-per-node=*) tasks=${option#*=} ;;
        esac
    done
    [[ $nodes =~ ^[1-9][0-9]*$ && $tasks =~ ^[1-9][0-9]*$ ]] || die 2 "--nodes and --ntasks-per-node must be whole numbers"
    check_variables
    [[ -z ${SPO_PROMPTS:-} || -r $SPO_PROMPTS ]] || die 2 "cannot read SPO_PROMPTS=$SPO_PROMPTS"
    [[ -z ${SPO_CONTAINER:-} || $SPO_CONTAINER != /* || -r $SPO_CONTAINER ]] || die 2 "cannot read SPO_CONTAINER=$SPO_CONTAINER"
    echo "ok     variables      SPO_CONFIG=$SPO_CONFIG SPO_OUT=$SPO_OUT"
    if ! command -v sbatch >/dev/null; then
        echo "note   SLURM          sbatch is not installed on this machine"
    elif words=$(sbatch --test-only "$@" "$0" 2>&1); then
        echo "ok     SLURM          ${words##*sbatch: }"
    else
        die 2 "SLURM would not accept the job: ${words##*error: }"
    fi
    place=$SPO_OUT
    until [[ -e $place ]]; do place=$(dirname "$place"); done
    [[ -w $place ]] || die 2 "SPO_OUT=$SPO_OUT: $place cannot be written to"
    place=$(df -Pk "$place" | awk 'NR == 2 {print int($4 / 1048576)}')
    ((place >= free_gb)) || die 2 "$place GB are free for SPO_OUT=$SPO_OUT, but SPO_MIN_FREE_GB requires $free_gb; free some space or lower it"
    echo "ok     free space     $place GB for SPO_OUT, $free_gb required"
    choose_python
    if [[ -n ${SPO_CONTAINER:-} ]] && ! "$SPO_PYTHON" -c "import megatron_spo" 2>/dev/null; then
        echo "note   configuration  not checked, because megatron_spo is only installed in the container"
        return
    fi
    set_common
    split "${SPO_LAYOUT:-}"
    "$SPO_PYTHON" -m megatron_spo train "$SPO_CONFIG" "${words[@]}" "${common[@]}" --check --gpus "$((nodes * tasks))"
}

own_the_folder() { # two jobs in one folder would write over each other
    local owner=
    [[ ! -r $SPO_OUT/logs/owner ]] || owner=$(<"$SPO_OUT/logs/owner")
    if [[ -n $owner && $owner != "$SLURM_JOB_ID" && -n $(squeue -h -j "$owner" 2>/dev/null) ]]; then
        die 2 "SPO_OUT=$SPO_OUT is in use by job $owner; wait for it, cancel it, or set another folder"
    fi
    echo "$SLURM_JOB_ID" >"$SPO_OUT/logs/owner"
}

# Sets `srun_options` and the environment, with which every process of the job is started.
set_start_options() {
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') # an address, because names may not resolve
    # Below Linux's ephemeral ports (from 32768); a different one after each requeue, as the old one may still be in use.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 12000))
    choose_python
    export MASTER_ADDR MASTER_PORT
    set_nccl
    export SLURM_WAIT=${SLURM_WAIT:-60} # seconds that srun waits for other ranks after the first has ended: a node may be lost
    srun_options=(
        --relative=0 --distribution=block # rank 0 on the first node, consecutive ranks on one node: tensor parallel over NVLink
        --cpu-bind=none                   # otherwise each task gets one core, but its loader and saver need more
        --kill-on-bad-exit=0              # the ranks report a lost rank and write status.json, and then end by themselves
        --label
    )
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun no longer inherits it (22.05)
    container=()
    if [[ ${SPO_CONTAINER:-} == *.sif ]]; then
        container=(apptainer exec --bind "$home,$PWD,$SPO_OUT${SPO_MOUNTS:+,$SPO_MOUNTS}" --pwd "$PWD")
        [[ $SPO_DEVICE == cpu ]] || container+=(--nv)
        container+=("$SPO_CONTAINER")
    elif [[ -n ${SPO_CONTAINER:-} ]]; then
        [[ $(srun --help) == *--container-image* ]] || die 2 "SPO_CONTAINER is set, but this cluster's srun has no --container-image; it requires pyxis"
        srun_options+=(
            --container-image="$SPO_CONTAINER" --container-workdir="$PWD" --no-container-mount-home
            --container-mounts="$home:$home,$PWD:$PWD,$SPO_OUT:$SPO_OUT${SPO_MOUNTS:+,$SPO_MOUNTS}"
        )
    fi
}

choose_python() {
    if [[ -z ${SPO_PYTHON:-} ]]; then
        SPO_PYTHON=python3
        [[ -n ${SPO_CONTAINER:-} || ! -x $home/.venv/bin/python ]] || SPO_PYTHON=$home/.venv/bin/python
    fi
    [[ ! -d $home/megatron_spo ]] || PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} # the repository; else the package is installed
    PYTHONUNBUFFERED=1
    export PYTHONPATH PYTHONUNBUFFERED SPO_PYTHON
}

set_nccl() { # keeps values that are already set
    [[ -z ${SPO_INTERFACE:-} ]] || export NCCL_SOCKET_IFNAME=$SPO_INTERFACE GLOO_SOCKET_IFNAME=$SPO_INTERFACE
    # With WARN, an error names the peer and the call; INFO would write megabytes for 32 ranks.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # 4 us x 2^22 = 17 s for each of 7 tries of an InfiniBand message, so that a short link failure does not end the job.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # Rows differ in length from step to step; fixed segments would fragment the memory that long ones need.
    # PYTORCH_ALLOC_CONF is its name since torch 2.9, PYTORCH_CUDA_ALLOC_CONF the one before.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-$PYTORCH_CUDA_ALLOC_CONF}
}

# The batch script receives the warning before the time limit (#SBATCH --signal=B:USR1), so that it also takes effect
# between two steps, and forwards it to the running step: once, because a second signal would end it without saving.
warned='' child='' interrupted='' forwarded=''
warn() {
    warned=1 interrupted=1
    forward
}
forward() {
    if [[ -n $warned && -n $child && -z $forwarded ]]; then
        forwarded=1
        kill -USR1 "$child" 2>/dev/null || true # srun forwards it to every rank
    fi
}
trap warn USR1

launch() { # NODES TASKS_PER_NODE LOG COMMAND ...: returns the exit code of the step, the highest of its tasks'
    local nodes=$1 tasks=$2 log=$3 code
    shift 3
    forwarded=''
    srun "${srun_options[@]}" --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" "${container[@]}" "$@" >>"$log" 2>&1 &
    child=$!
    forward
    await
    return "$code"
}

await() { # waits for `child` and sets `code` to its exit code
    local now
    code=127
    while true; do
        interrupted=''
        wait "$child" && now=0 || now=$?
        ((now == 127)) || code=$now # 127: it had already been waited for when the signal arrived
        [[ -n $interrupted ]] || break
    done
    child=''
}

check_nodes() { # FREE_GB
    local log=$SPO_OUT/logs/nodes.log gpus=0 files=("$SPO_CONFIG")
    [[ $SPO_DEVICE == cpu ]] || gpus=$SLURM_NTASKS_PER_NODE
    [[ -z ${SPO_PROMPTS:-} ]] || files+=("$SPO_PROMPTS")
    : >"$log"
    if ! launch "$SLURM_JOB_NUM_NODES" 1 "$log" bash "$home/slurm/check_node.sh" "$SPO_OUT" "$gpus" "$1" "${files[@]}"; then
        [[ -z $warned ]] || again "the time limit is near"
        die 2 "the node check failed, no step was started:"$'\n'"$(sed -n 's/^ *[0-9]*: error: /  /p' "$log" | grep . || tail -n5 "$log")"
    fi
}

# Measures the bandwidth between the nodes, because one bad cable or a wrong interface slows down the whole job.
check_links() {
    local log=$SPO_OUT/logs/links.log least=${SPO_MIN_LINK_GB_S:-1}
    [[ $SPO_DEVICE == gpu || -n ${SPO_MIN_LINK_GB_S:-} ]] || return 0
    [[ $SLURM_JOB_NUM_NODES -gt 1 && ! $least =~ ^0+([.]0+)?$ ]] || return 0
    : >"$log"
    if ! launch "$SLURM_JOB_NUM_NODES" 1 "$log" bash "$home/slurm/launch.sh" doctor --links --at-least "$least"; then
        [[ -z $warned ]] || again "the time limit is near"
        die 2 "the check of the links between the nodes failed, no step was started: $(sed -n 's/^ *[0-9]*: error: //p' "$log" | head -n1 | grep . || tail -n1 "$log") (SPO_MIN_LINK_GB_S=0 skips it)"
    fi
    say "$(sed -n 's/^ *[0-9]*: links: /links: /p' "$log" | head -n1)"
}

status() { # KEY: its value in the run's status.json, which has one key on each line
    [[ ! -r $SPO_OUT/run/status.json ]] || sed -n "s/^ \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$SPO_OUT/run/status.json"
}

# Translates a step's exit code to one of `megatron-spo`. The code of a step is the highest of its ranks', so a killed rank
# (128 + its signal) hides the codes of the others; status.json has them, if it was written by this attempt.
meaning() { # NAME CODE STATUS_BEFORE
    local state=
    if [[ $1 == train && $2 != [02345] && $2 != 75 ]]; then
        state=$(status state)
        if [[ $state == running || $state == "done" ]]; then
            echo 4 # no rank was left to write it, or a node was lost after the last step
            return
        elif [[ -n $state && $(cat "$SPO_OUT/run/status.json") != "$3" ]]; then
            status code
            return
        fi
    fi
    if (($2 == 138)) && [[ -n $warned ]]; then
        echo 75 # killed by the warning: a command that has nothing to save does not handle it
    else
        echo $(($2 > 128 ? 4 : $2))
    fi
}

progress() { # a checksum that changes when a step, a checkpoint or a part of the cache was finished
    {
        cat "$SPO_OUT"/done/* || true
        status checkpoint
        find "${SPO_CACHE:-$SPO_OUT/reference}" -type f || true
        find "$SPO_OUT"/rounds -path '*/stages/*.json' -o -path '*/reference/*' -o -path '*/checkpoints/*' -prune || true
    } 2>/dev/null | cksum
}

# Requeues the job, unless it made no progress in several attempts or somebody else has ended it.
again() { # WHY
    local file=$SPO_OUT/logs/attempts job='' count=0 tried='' state
    [[ ! -r $file ]] || read -r job count <"$file"
    [[ $job == "$SLURM_JOB_ID" ]] || count=0
    if [[ $(progress) == "$at_start" ]]; then
        count=$((count + 1)) tried=" (attempt $count of $SPO_ATTEMPTS without progress)"
    else
        count=0
    fi
    echo "$SLURM_JOB_ID $count" >"$file"
    ((count <= SPO_ATTEMPTS)) || die 4 "$1; no progress in $SPO_ATTEMPTS attempts in a row (SPO_ATTEMPTS); see $SPO_OUT/logs"
    state=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [[ $state == RUNNING ]] || die 75 "$1; not requeued, because the job is $state"
    say "$1; requeueing the job$tried"
    scontrol requeue "$SLURM_JOB_ID" || die 75 "the job could not be requeued; submit the same script again to resume"
    sleep 600 & wait || true # until SLURM ends this shell
    exit 75
}

step() { # NAME NODES TASKS_PER_NODE ARGUMENTS ...: runs `megatron-spo ARGUMENTS`, unless it was already done
    local name=$1 nodes=$2 tasks=$3 code=0 key marker log begin before reason
    shift 3
    marker=$SPO_OUT/done/$name log=$SPO_OUT/logs/$name.log
    key=$({ cat "$SPO_CONFIG" && printf '%s\n' "$@"; } | sha256sum)
    if [[ -r $marker && $(<"$marker") == "$key" ]]; then
        say "$name: already done"
        return
    fi
    [[ -z $warned ]] || again "the time limit is near"
    say "$name: $nodes x $tasks processes: megatron-spo $*"
    echo "== $(date '+%F %T') job $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}: megatron-spo $*" >>"$log"
    begin=$(stat -c %s "$log") before=$(cat "$SPO_OUT/run/status.json" 2>/dev/null || true)
    launch "$nodes" "$tasks" "$log" bash "$home/slurm/launch.sh" "$@" || code=$?
    code=$(meaning "$name" "$code" "$before")
    reason=$(tail -c "+$((begin + 1))" "$log" | sed -n 's/^ *[0-9]*: error: //p' | head -n1)
    case $code in
        0) ;;
        75) again "$name stopped and can be resumed" ;;
        4) again "$name lost a process${reason:+: $reason}" ;;
        2) rm -f "$SPO_OUT/done/reference" ;;& # so that the next submission makes a stale cache again
        *) die "$code" "$name ended with code $code: ${reason:-$(tail -n1 "$log")} (see $log)" ;;
    esac
    echo "$key" >"$marker.new" && mv "$marker.new" "$marker"
    say "$name: done"
}

# Runs `megatron-spo rounds` on the first node; it starts its commands as steps of the job, and records which are done.
run_rounds() {
    local words options start shared one log=$SPO_OUT/logs/rounds.log code=0 begin reason
    split "${SPO_LAYOUT:-} ${SPO_OVERRIDES:-}"
    for start in "${srun_options[@]}"; do # without labels, as `rounds` reads the error messages of its commands
        [[ $start == --label || $start == --relative=0 ]] || options+=("$start")
    done
    shared=(srun "${options[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_NTASKS" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" "${container[@]}")
    one=(srun "${options[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --exclusive "${container[@]}")
    [[ -z $warned ]] || again "the time limit is near"
    say "rounds: megatron-spo rounds $SPO_CONFIG --out $SPO_OUT/rounds ${words[*]}"
    touch "$log"
    begin=$(stat -c %s "$log") forwarded=''
    "$SPO_PYTHON" -m megatron_spo rounds "$SPO_CONFIG" --out "$SPO_OUT/rounds" --at-once "$SLURM_JOB_NUM_NODES" \
        --launch "${shared[*]@Q} bash ${home@Q}/slurm/launch.sh" --launch-one "${one[*]@Q} bash ${home@Q}/slurm/launch.sh" \
        "${words[@]}" >>"$log" 2>&1 &
    child=$!
    forward
    await
    reason=$(tail -c "+$((begin + 1))" "$log" | sed -n 's/^error: //p' | head -n1)
    case $code in
        0) say "all rounds are done; table and report are in $SPO_OUT/rounds" ;;
        75) again "rounds stopped and can be resumed" ;;
        4) again "rounds lost a process${reason:+: $reason}" ;;
        *) die "$code" "rounds ended with code $code: ${reason:-$(tail -n1 "$log")} (see $log)" ;;
    esac
}

set_common() { # sets `common` to the overrides of all steps
    local words
    split "${SPO_OVERRIDES:-}"
    common=("output=$SPO_OUT/run")
    [[ " $SPO_STEPS " != *" reference "* ]] || : "${SPO_CACHE:=$SPO_OUT/reference}"
    [[ -z ${SPO_CACHE:-} ]] || common+=("reference.cache=$SPO_CACHE")
    common+=("${words[@]}")
}

# Runs the rehearsal, if it is wanted, and the steps of SPO_STEPS (reference, train, export, evaluate), unless done.
run_steps() {
    local common nodes=$SLURM_JOB_NUM_NODES tasks=$SLURM_NTASKS_PER_NODE model name words
    set_common
    if [[ $SPO_REHEARSE == 1 ]]; then
        split "${SPO_LAYOUT:-}"
        step rehearse 1 1 rehearse --gpus $((nodes * tasks)) "$SPO_CONFIG" "${words[@]}" "${common[@]}"
        say "rehearse: memory, communication and waits of a step are in $SPO_OUT/logs/rehearse.log"
    fi
    for name in $SPO_STEPS; do
        case $name in
            reference)
                split "${SPO_REFERENCE_LAYOUT:-${SPO_LAYOUT:-}}"
                step reference "${SPO_REFERENCE_NODES:-$nodes}" "$tasks" reference "$SPO_CONFIG" "${words[@]}" "${common[@]}"
                ;;
            train)
                split "${SPO_LAYOUT:-}"
                step train "$nodes" "$tasks" train "$SPO_CONFIG" "${words[@]}" "${common[@]}"
                ;;
            export)
                model=$(exported)
                if [[ -e $model ]]; then # it has this name only when it is complete
                    say "export: already done"
                else
                    step export 1 1 convert "$SPO_OUT/run/checkpoints/${model##*/}" "$model" --to hf
                fi
                say "export: the model is in $model"
                ;;
            evaluate) evaluate ;;
        esac
    done
    say "all steps are done"
    notify "all steps are done; results in $SPO_OUT"
}

exported() { # prints the folder of the exported model of the chosen checkpoint
    local marker=$SPO_OUT/run/checkpoints/$SPO_EXPORT
    [[ -r $marker ]] || die 2 "export: $marker does not exist; SPO_EXPORT=best requires checkpoint.best in the configuration"
    echo "$SPO_OUT/hf/$(<"$marker")"
}

evaluate() {
    local words model
    if [[ -z ${SPO_PROMPTS:-} ]]; then
        say "evaluate: skipped, because SPO_PROMPTS is not set"
        return
    fi
    model=$(exported)
    split "${SPO_GENERATE:-}"
    step evaluate 1 1 generate "$model" --prompts "$SPO_PROMPTS" --out "$SPO_OUT/answers-${model##*/}.jsonl" "${words[@]}"
    say "evaluate: the answers are in $SPO_OUT/answers-${model##*/}.jsonl"
}
