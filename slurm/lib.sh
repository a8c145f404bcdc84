# shellcheck shell=bash
# What the job scripts share: sourced by them within `sbatch`. README.md lists the variables.
set -euo pipefail

: "${home:?is set by the script that sources this: the folder of the repository}"
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

# Sets `words` to the words of a text; quotes and backslashes as in a shell, nothing is expanded or run.
split() {
    local text
    text=$(xargs -rn1 printf '%s\n' <<<"$1" 2>&1) || die 2 "cannot be split into words: $1 ($text)"
    words=()
    [[ -z $text ]] || mapfile -t words <<<"$text"
}

check_variables() { # and set the defaults
    local name
    for name in $(compgen -e SPO_); do
        [[ $KNOWN =~ [[:space:]]${name}[[:space:]] ]] || die 2 "$name is no variable of these scripts; slurm/README.md lists them"
    done
    [[ -n ${SPO_CONFIG:-} ]] || die 2 "SPO_CONFIG is not set: it names the configuration (YAML) of the training"
    [[ -n ${SPO_OUT:-} ]] || die 2 "SPO_OUT is not set: it names a folder, shared by all nodes, for everything that is written"
    [[ -r $SPO_CONFIG ]] || die 2 "SPO_CONFIG=$SPO_CONFIG cannot be read (in $PWD on $(hostname))"
    : "${SPO_STEPS:=$ALL_STEPS}" "${SPO_EXPORT:=latest}" "${SPO_DEVICE:=gpu}" "${SPO_ATTEMPTS:=3}"
    for name in $SPO_STEPS; do
        [[ " $ALL_STEPS " == *" $name "* ]] || die 2 "SPO_STEPS: there is no step $name"
    done
    [[ $SPO_EXPORT == latest || $SPO_EXPORT == best ]] || die 2 "SPO_EXPORT is latest or best, not $SPO_EXPORT"
    [[ $SPO_DEVICE == gpu || $SPO_DEVICE == cpu ]] || die 2 "SPO_DEVICE is gpu or cpu, not $SPO_DEVICE"
    for name in SPO_ATTEMPTS SPO_MIN_FREE_GB SPO_REFERENCE_NODES; do
        [[ ${!name:-1} =~ ^[0-9]+$ ]] || die 2 "$name must be a whole number, not ${!name}"
    done
}

# Checks variables, takes hold of SPO_OUT, checks the nodes; MIN_FREE_GB is the script's own default.
begin() { # MIN_FREE_GB
    [[ -n ${SLURM_JOB_ID:-} ]] || die 2 "this is a job script: sbatch slurm/${0##*/}"
    [[ -n ${SLURM_NTASKS_PER_NODE:-} ]] || die 2 "submit with --ntasks-per-node: one task for each GPU of a node"
    check_variables
    mkdir -p "$SPO_OUT/logs" "$SPO_OUT/done" || die 2 "SPO_OUT=$SPO_OUT cannot be made or written"
    SPO_OUT=$(cd "$SPO_OUT" && pwd)
    job_log=$SPO_OUT/logs/job.log
    own_the_folder
    say_how_to_start
    say "starts on $SLURM_JOB_NODELIST; logs in $SPO_OUT/logs"
    check_nodes "${SPO_MIN_FREE_GB:-$1}"
}

own_the_folder() { # two jobs in one folder would write over each other
    local owner=
    [[ ! -r $SPO_OUT/logs/owner ]] || owner=$(<"$SPO_OUT/logs/owner")
    if [[ -n $owner && $owner != "$SLURM_JOB_ID" && -n $(squeue -h -j "$owner" 2>/dev/null) ]]; then
        die 2 "job $owner works in SPO_OUT=$SPO_OUT: wait for it, cancel it, or name another folder"
    fi
    echo "$SLURM_JOB_ID" >"$SPO_OUT/logs/owner"
}

# How every process of the job is started: sets `srun_options` and the environment.
say_how_to_start() {
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') # also where names do not resolve
    # Below the ports that Linux gives out by itself (32768 up); another one after each requeue, as the old may linger.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 12000))
    if [[ -z ${SPO_PYTHON:-} ]]; then
        SPO_PYTHON=python3
        [[ -n ${SPO_CONTAINER:-} || ! -x $home/.venv/bin/python ]] || SPO_PYTHON=$home/.venv/bin/python
    fi
    PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
    PYTHONUNBUFFERED=1
    export MASTER_ADDR MASTER_PORT PYTHONPATH PYTHONUNBUFFERED SPO_PYTHON
    set_nccl
    export SLURM_WAIT=${SLURM_WAIT:-60} # seconds after the first rank's end in which srun waits for one whose node has vanished
    srun_options=(
        --relative=0 --distribution=block # rank 0 on the first node, the ranks of a node side by side: tensor parallel over NVLink
        --cpu-bind=none                   # one task would get one core; its loader and saver need more
        --kill-on-bad-exit=0              # the ranks tell each other who is lost and write status.json, then they all end
        --label
    )
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun no longer inherits it (22.05)
    if [[ -n ${SPO_CONTAINER:-} ]]; then
        [[ $(srun --help) == *--container-image* ]] || die 2 "SPO_CONTAINER is set, but this cluster's srun has no --container-image (pyxis)"
        srun_options+=(
            --container-image="$SPO_CONTAINER" --container-workdir="$PWD" --no-container-mount-home
            --container-mounts="$home:$home,$PWD:$PWD,$SPO_OUT:$SPO_OUT${SPO_MOUNTS:+,$SPO_MOUNTS}"
        )
    fi
}

set_nccl() { # a value that is set already stays
    [[ -z ${SPO_INTERFACE:-} ]] || export NCCL_SOCKET_IFNAME=$SPO_INTERFACE GLOO_SOCKET_IFNAME=$SPO_INTERFACE
    # An error then names the peer and the call; INFO would be megabytes from 32 ranks.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # 4 us x 2^22 = 17 s for each of 7 tries of an InfiniBand message: a link that comes back does not end the job.
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
    # Rows differ in length from step to step; fixed segments would splinter the memory that long ones need.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
}

# The warning before the time limit (#SBATCH --signal=B:USR1) comes here, so that it counts between two steps as well,
# and goes on to the step that runs: once, for a second signal would end it without saving.
warned='' child='' interrupted='' forwarded=''
warn() {
    warned=1 interrupted=1
    forward
}
forward() {
    if [[ -n $warned && -n $child && -z $forwarded ]]; then
        forwarded=1
        kill -USR1 "$child" 2>/dev/null || true # srun hands it to every rank
    fi
}
trap warn USR1

launch() { # NODES TASKS_PER_NODE LOG COMMAND ...: exit code of the step, the highest of its tasks'
    local nodes=$1 tasks=$2 log=$3 code=127 now
    shift 3
    forwarded=''
    srun "${srun_options[@]}" --nodes="$nodes" --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks" "$@" >>"$log" 2>&1 &
    child=$!
    forward
    while true; do
        interrupted=''
        wait "$child" && now=0 || now=$?
        ((now == 127)) || code=$now # 127: it had been waited for when the signal came
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
        die 2 "the nodes are not fit, nothing was started:"$'\n'"$(sed -n 's/^ *[0-9]*: error: /  /p' "$log" | grep . || tail -n5 "$log")"
    fi
}

status() { # KEY of the run's status.json, which has one on each line
    [[ ! -r $SPO_OUT/run/status.json ]] || sed -n "s/^ \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$SPO_OUT/run/status.json"
}

# What a step's exit code means, in the words of `megatron-spo`. The code of a step is the highest of its ranks', so a
# killed rank (128 + its signal) hides what the others found: status.json says it, if it is of this attempt.
meaning() { # NAME CODE STATUS_BEFORE
    local state=
    if [[ $1 == train && $2 != [02345] && $2 != 75 ]]; then
        state=$(status state)
        if [[ $state == running || $state == "done" ]]; then
            echo 4 # nobody was left to write, or a node was lost after the last step
            return
        elif [[ -n $state && $(cat "$SPO_OUT/run/status.json") != "$3" ]]; then
            status code
            return
        fi
    fi
    if (($2 == 138)) && [[ -n $warned ]]; then
        echo 75 # a command that has nothing to save dies of the warning
    else
        echo $(($2 > 128 ? 4 : $2))
    fi
}

progress() { # changes whenever something was achieved
    { cat "$SPO_OUT"/done/* || true; status checkpoint; find "${SPO_CACHE:-$SPO_OUT/reference}" -type f || true; } 2>/dev/null | cksum
}

# Puts the job back into the queue; not for ever where that leads nowhere, and not if someone else has ended it.
again() { # WHY
    local file=$SPO_OUT/logs/attempts job='' count=0 before='' now state
    now=$(progress)
    [[ ! -r $file ]] || read -r job count before <"$file"
    [[ $job == "$SLURM_JOB_ID" && $before == "$now" ]] || count=0
    count=$((count + 1))
    echo "$SLURM_JOB_ID $count $now" >"$file"
    ((count <= SPO_ATTEMPTS)) || die 4 "$1; $SPO_ATTEMPTS attempts in a row (SPO_ATTEMPTS) have brought nothing new: see $SPO_OUT/logs"
    state=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [[ $state == RUNNING ]] || die 75 "$1; not requeued, for the job is $state"
    say "$1; back into the queue (attempt $count of $SPO_ATTEMPTS without progress)"
    scontrol requeue "$SLURM_JOB_ID" || die 75 "this cluster does not requeue: submit the same script again, it goes on from here"
    sleep 600 & wait || true # SLURM ends this shell
    exit 75
}

step() { # NAME NODES TASKS_PER_NODE ARGUMENTS ...: `megatron-spo ARGUMENTS`, unless the same was done before
    local name=$1 nodes=$2 tasks=$3 code=0 key marker log begin before reason
    shift 3
    marker=$SPO_OUT/done/$name log=$SPO_OUT/logs/$name.log
    key=$({ cat "$SPO_CONFIG" && printf '%s\n' "$@"; } | sha256sum)
    if [[ -r $marker && $(<"$marker") == "$key" ]]; then
        say "$name: done before"
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
        75) again "$name stopped and can go on" ;;
        4) again "$name lost a process${reason:+: $reason}" ;;
        2) rm -f "$SPO_OUT/done/reference" ;;& # a stale cache is made again by the next submission
        *) die "$code" "$name ended with code $code: ${reason:-$(tail -n1 "$log")} (see $log)" ;;
    esac
    echo "$key" >"$marker.new" && mv "$marker.new" "$marker"
    say "$name: done"
}

# reference -> train -> export -> evaluate: those of SPO_STEPS that are not done yet.
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
                if [[ -e $model ]]; then # it takes its name when it is complete
                    say "export: done before"
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

exported() { # where the model of the chosen checkpoint belongs
    local marker=$SPO_OUT/run/checkpoints/$SPO_EXPORT
    [[ -r $marker ]] || die 2 "export: there is no $marker (best needs checkpoint.best in the configuration)"
    echo "$SPO_OUT/hf/$(<"$marker")"
}

evaluate() {
    local words model
    if [[ -z ${SPO_PROMPTS:-} ]]; then
        say "evaluate: skipped, SPO_PROMPTS names no held-out prompts"
        return
    fi
    model=$(exported)
    split "${SPO_GENERATE:-}"
    step evaluate 1 1 generate "$model" --prompts "$SPO_PROMPTS" --out "$SPO_OUT/answers-${model##*/}.jsonl" "${words[@]}"
    say "evaluate: the answers are in $SPO_OUT/answers-${model##*/}.jsonl"
}
