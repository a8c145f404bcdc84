#!/usr/bin/env bash
# Checks what needs a GPU: one command, at most MINUTES on one GPU, no network.
#   [PYTHON=python3] tools/bench/gpu_check.sh [--dry] [--out FOLDER] [--wheels FOLDER] [--minutes N]
#     --out      folder for results.txt and the logs [runs/gpu_check]
#     --wheels   folder with wheels to install into OUT/site first. If it contains install.sh, this is run in the
#                background as `install.sh OUT/site`: it may compile Transformer Engine while the other parts run
#     --minutes  time limit of everything together [8]
#     --dry      run everything without a GPU, up to the first call that needs one, with small sizes on the CPU
# Each result is a line in results.txt as soon as it is known, separated by tabs: name; ok, FAILED, skipped or, in a dry
# run, reached (a call that needs a GPU); what was measured.
# Exit code: 0 if every line is ok; 1 if some are not; 2 without an NVIDIA GPU.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

dry='' out=runs/gpu_check wheels='' minutes=8
while (($#)); do
    case $1 in
        --dry) dry=1 ;;
        --out | --wheels | --minutes)
            (($# > 1)) || { echo "error: $1 needs a value" >&2 && exit 2; }
            declare "${1#--}=$2"
            shift
            ;;
        *) echo "error: unknown option $1; see the head of $0" >&2 && exit 2 ;;
    esac
    shift
done
[[ $minutes =~ ^[0-9]+$ ]] || { echo "error: --minutes must be a whole number, not $minutes" >&2 && exit 2; }
[[ -z $wheels || -d $wheels ]] || { echo "error: --wheels $wheels is not a folder" >&2 && exit 2; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH="$PWD:$out/site${PYTHONPATH:+:$PYTHONPATH}" SPO_GPU_RESULTS=$out/results.txt SPO_GPU_DRY=$dry
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$out/tokenised
: >"$SPO_GPU_RESULTS"
end=$((SECONDS + 60 * minutes))

record() { # NAME RESULT MEASURED
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" | tee -a "$SPO_GPU_RESULTS"
}
not_ok() { # prints the number of results that are not ok
    grep -Ec $'\t(FAILED|skipped)\t' "$SPO_GPU_RESULTS"
}
part() { # NAME COMMAND ...: runs a part within the time that is left; its log is OUT/NAME.log
    local name=$1 left=$((end - SECONDS)) begin=$SECONDS code=0 before
    shift
    before=$(not_ok)
    if ((left < 5)); then
        record "$name" skipped "the time limit of $minutes minutes is reached"
        return
    fi
    timeout --kill-after=5 "$left" "$@" >"$out/$name.log" 2>&1 || code=$?
    if ((code == 124 || code == 137)); then
        record "$name" FAILED "was stopped at the time limit of $minutes minutes"
    elif ((code != 0 && $(not_ok) == before)); then # otherwise the part has recorded what failed
        record "$name" FAILED "exit code $code: $(grep -v '^ *$' "$out/$name.log" | tail -n1)"
    fi
    echo "($name: $((SECONDS - begin)) s)"
}
gpu_tests() { # NAME MARK
    part "$1" "$python" -m pytest -q -p no:cacheprovider -m "$2" tests/gpu
}
gpu_parts() { # NAME PART ...
    part "$1" "$python" tools/bench/gpu_check.py "${@:2}" --work "$out"
}

compiling=''
if [[ -n $wheels && -e $wheels/install.sh ]]; then
    setsid bash "$wheels/install.sh" "$out/site" >"$out/install.log" 2>&1 &
    compiling=$!
elif [[ -n $wheels ]]; then
    "$python" -m pip install -q --no-index --no-deps --upgrade --target "$out/site" "$wheels"/*.whl >"$out/install.log" 2>&1 ||
        record install FAILED "$(tail -n1 "$out/install.log")"
fi

"$python" -m megatron_spo doctor >"$out/doctor.log" 2>&1
if [[ -z $dry ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    record GPU FAILED "this PyTorch finds no NVIDIA GPU, so nothing was checked; --dry tests the check itself"
    cat "$out/doctor.log" >&2
    exit 2
fi

gpu_parts benchmark --layers torch
gpu_parts quickstart --quickstart
gpu_tests tests "gpu and not engine"
if [[ -n $compiling ]]; then
    while kill -0 "$compiling" 2>/dev/null && ((end - SECONDS > 60)); do sleep 1; done
    if kill -0 "$compiling" 2>/dev/null; then
        kill -- "-$compiling"
        record install FAILED "was stopped, because the time limit of $minutes minutes is near"
    elif ! wait "$compiling"; then
        record install FAILED "$(tail -n1 "$out/install.log")"
    fi
fi
gpu_parts benchmark-engine --layers transformer_engine
gpu_tests tests-engine "gpu and engine"

echo "$(wc -l <"$SPO_GPU_RESULTS") results, $(not_ok) of them not ok; see $SPO_GPU_RESULTS and the logs next to it"
(($(wc -l <"$SPO_GPU_RESULTS") > 0 && $(not_ok) == 0))
