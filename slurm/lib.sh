# shellcheck shell=bash
# Functions that the job scripts share, which source this file within `sbatch`. README.md lists the variables.
set -euo pipefail

: "${home:?must be set by the script that sources this file, to the folder of the repository}"
KNOWN=" SPO_AT_ONCE SPO_ATTEMPTS SPO_CACHE SPO_CONFIG SPO_CONTAINER SPO_DEVICE SPO_EXPORT SPO_GENERATE SPO_HOME SPO_INTERFACE
 SPO_LAYOUT SPO_MIN_FREE_GB SPO_MOUNTS SPO_OUT SPO_OVERRIDES SPO_PROMPTS SPO_PYTHON SPO_REFERENCE_LAYOUT
 SPO_REFERENCE_NODES SPO_STEPS SPO_STUDY SPO_STUDY_PART "

ALL_STEPS="reference train export evaluate"
job_log=/dev/null
say() {
    echo "$(date '+%F %T') job ${SLURM_JOB_ID:-none}.${SLURM_RESTART_COUNT:-0}: $*" | tee -a "$job_log" >&2
}

die() { # CODE MESSAGE
    say "error: $2"
    exit "$1"
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
    for name in SPO_ATTEMPTS SPO_MIN_FREE_GB SPO_REFERENCE_NODES; do
        [[ ${!name:-1} =~ ^[0-9]+$ ]] || die 2 "$name must be a whole number, not ${!name}"
    done
}

# Checks the variables, claims SPO_OUT and checks the nodes; MIN_FREE_GB is the default of SPO_MIN_FREE_GB.
begin() { # MIN_FREE_GB
    [[ -n ${SLURM_JOB_ID:-} ]] || die 2 "this is a job script; submit it with: sbatch slurm/${0##*/}"
    [[ -n ${SLURM_NTASKS_PER_NODE:-} ]] || die 2 "the number of tasks per node is not set; submit with --ntasks-per-node, one task for each GPU of a node"
    check_variables
    mkdir -p "$SPO_OUT/logs" "$SPO_OUT/done" || die 2 "SPO_OUT=$SPO_OUT cannot be created or written to"
    SPO_OUT=$(cd "$SPO_OUT" && pwd)
    job_log=$SPO_OUT/logs/job.log
    own_the_folder
    set_start_options
    say "starts on $SLURM_JOB_NODELIST; logs in $SPO_OUT/logs"
    check_nodes "${SPO_MIN_FREE_GB:-$1}"
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
    if [[ -z ${SPO_PYTHON:-} ]]; then
        SPO_PYTHON=python3
        [[ -n ${SPO_CONTAINER:-} || ! -x $home/.venv/bin/python ]] || SPO_PYTHON=$home/.venv/bin/python
    fi
    PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    PYTHONUNBUFFERED=1
    export MASTER_ADDR MASTER_PORT PYTHONPATH PYTHONUNBUFFERED SPO_PYTHON
    set_nccl
    export SLURM_WAIT=${SLURM_WAIT:-60} # seconds that srun waits for other ranks after the first has ended: a node may be lost
    srun_options=(
        --relative=0 --distribution=block # rank 0 on the first node, consecutive ranks on one node: tensor parallel over NVLink
        --cpu-bind=none                   # otherwise each task gets one core, but its loader and saver need more
        --kill-on-bad-exit=0              # the ranks report a lost rank and write status.json, and then end by themselves
        --label
    )
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun no longer inherits it (22.05)
    if [[ -n ${SPO_CONTAINER:-} ]]; then
        [[ $(srun --help) == *--container-image* ]] || die 2 "SPO_CONTAINER is set, but this cluster's srun has no --container-image; it requires pyxis"
        srun_options+=(
            --container-image="$SPO_CONTAINER" --container-workdir="$PWD" --no-container-mount-home
            --container-mounts="$home:$home,$PWD:$PWD,$SPO_OUT:$SPO_OUT${SPO_MOUNTS:+,$SPO_MOUNTS}"
        )
    fi
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
    local nodes=$1 tasks=$2 log=$3 code=127 now
    shift 3
    forwarded=''
    srun "${srun_options[@]}" --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" "$@" >>"$log" 2>&1 &
    child=$!
    forward
    while true; do
        interrupted=''
        wait "$child" && now=0 || now=$?
        ((now == 127)) || code=$now # 127: the step had already been waited for when the signal arrived
        [[ -n $interrupted ]] || break
    done
    child=''
    return "$code"
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
    { cat "$SPO_OUT"/done/* || true; status checkpoint; find "${SPO_CACHE:-$SPO_OUT/reference}" -type f || true; } 2>/dev/null | cksum
}

# Requeues the job, unless it made no progress in several attempts or somebody else has ended it.
again() { # WHY
    local file=$SPO_OUT/logs/attempts job='' count=0 before='' now state
    now=$(progress)
    [[ ! -r $file ]] || read -r job count before <"$file"
    [[ $job == "$SLURM_JOB_ID" && $before == "$now" ]] || count=0
    count=$((count + 1))
    echo "$SLURM_JOB_ID $count $now" >"$file"
    ((count <= SPO_ATTEMPTS)) || die 4 "$1; no progress in $SPO_ATTEMPTS attempts in a row (SPO_ATTEMPTS); see $SPO_OUT/logs"
    state=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [[ $state == RUNNING ]] || die 75 "$1; not requeued, because the job is $state"
    say "$1; requeueing the job (attempt $count of $SPO_ATTEMPTS without progress)"
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

# Runs the steps of SPO_STEPS (reference, train, export, evaluate) that are not done yet.
run_steps() {
    local common nodes=$SLURM_JOB_NUM_NODES tasks=$SLURM_NTASKS_PER_NODE model name words
    split "${SPO_OVERRIDES:-}"
    common=("output=$SPO_OUT/run" logging.progress=false)
    [[ " $SPO_STEPS " != *" reference "* ]] || : "${SPO_CACHE:=$SPO_OUT/reference}"
    [[ -z ${SPO_CACHE:-} ]] || common+=("reference.cache=$SPO_CACHE")
    common+=("${words[@]}")
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
