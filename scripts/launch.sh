# shellcheck shell=bash
# Sourced by run_gpu.sh and run_ascend_distributed.sh: what starting many processes has in common.
#
# They set SELF (their path), MACHINES (how many) and NODE_RANK (which one), and call in this order: find_python, check_run,
# open_logs, start, follow, and after a failure report or give_up.

# Set below or by options, whatever the environment has by these names.
CONFIG="" SETTINGS=() OUT="" STOPPED=""

# Threads of many processes on one machine slow each other down; `uni-mdm train` shares out the CPUs.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

# The comment at the head of a script is its help.
print_help() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$SELF"
}

# need_value OPTION [VALUE]: an option that has one.
need_value() {
    [[ $# -ge 2 ]] || fail "$1 needs a value (see --help)"
}

# take_argument WORD: CONFIG first, then KEY=VALUE; sets CONFIG and SETTINGS.
take_argument() {
    if [[ $1 == -* ]]; then
        fail "no option $1 (see --help)"
    elif [[ -z $CONFIG ]]; then
        CONFIG="$1"
    elif [[ $1 == *=* ]]; then
        SETTINGS+=("$1")
    else
        fail "'$1' is no KEY=VALUE (see --help)"
    fi
}

# need_count NAME VALUE: a positive number.
need_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: give a positive number"
}

# need_port NAME VALUE: a number that a port can have.
need_port() {
    need_count "$1" "$2"
    (($2 < 65536)) || fail "$1 $2: give one below 65536"
}

# find_python EXTRAS: sets PYTHON, the project's own unless the user says otherwise, once there is a CONFIG.
find_python() {
    local program
    [[ -n $CONFIG ]] || fail "CONFIG is missing (see --help)"
    for program in pgrep pkill ps flock; do
        command -v "$program" >/dev/null || fail "$program is not found: install procps and util-linux"
    done
    PYTHON="${PYTHON:-$VENV/bin/python}"
    is_python_311 "$PYTHON" || fail "no Python 3.11 at $PYTHON: set PYTHON, or install it with" \
        "bash -c 'source $ROOT/scripts/install.sh && install_project $1'"
    PYTHON="$(command -v "$PYTHON")"
}

# check_run BACKEND DEVICE PROCESSES: sets OUT and TRAIN, the arguments of Python, or ends with a line
# for everything that is missing.
check_run() {
    OUT="$("$PYTHON" -m common.launch --backend "$1" --device "$2" --processes "$3" \
        ${OUT:+--out "$OUT"} -- "$CONFIG" "${SETTINGS[@]}")" || exit $?
    TRAIN=(-m common train --backend "$1" --device "$2" --out "$OUT")
    local setting
    for setting in "${SETTINGS[@]}"; do
        TRAIN+=(--set "$setting")
    done
    TRAIN+=(-- "$CONFIG")
}

# Sets LOG_DIR, a new folder for every start, unless the user says otherwise. A second start in OUT is
# refused before it could stop the first one with its failure.
open_logs() {
    local lock="$OUT/logs/.machine_$NODE_RANK.lock"
    LOG_DIR="${LOG_DIR:-$OUT/logs/$(date +%Y%m%d-%H%M%S)}"
    mkdir -p "$OUT/logs" || fail "cannot write $OUT/logs: give another --out"
    # Held as long as this script or its launcher lives. File systems without locks keep nobody out.
    exec 9>"$lock" || fail "cannot write $lock: give another --out"
    flock --nonblock --conflict-exit-code 75 9 2>/dev/null || (($? != 75)) ||
        fail "$OUT: another process trains there; give another --out"
    mkdir -p "$LOG_DIR" || fail "cannot write $LOG_DIR: give another folder"
    export LOG_DIR
}

# start LOG COMMAND...: runs the launcher as LAUNCHER, which ends when this script is told to. It has a
# process group of its own: a terminal's Ctrl-C reaches this script alone, which passes it on once.
start() {
    LAUNCHER_LOG="$1"
    shift
    # The last failure on any machine of this start; those of earlier starts are older than the stamp.
    FAILURE="$LOG_DIR/failure"
    ((MACHINES == 1)) || FAILURE="$OUT/logs/failure"
    STAMP="$LAUNCHER_LOG.started"
    : >"$STAMP"
    trap 'rm -f "$STAMP"' EXIT
    set -m
    "$@" >"$LAUNCHER_LOG" 2>&1 &
    set +m
    LAUNCHER=$!
    trap 'stop 143' TERM
    trap 'stop 130' INT
    # Whoever only starts has it ignored.
    [[ -n $(trap -p HUP) ]] || trap 'stop 129' HUP
}

# What torchrun gives its processes, too.
SECONDS_TO_STOP=30

# stop STATUS: asks the processes to write a checkpoint and end, and at the second time ends them.
stop() {
    if [[ -z $STOPPED ]]; then
        STOPPED="$1" DEADLINE=$((SECONDS + SECONDS_TO_STOP))
        ask_to_stop
    else
        kill_workers
        end_launcher
    fi
}

# torchrun passes it on.
ask_to_stop() {
    end_launcher
}

kill_workers() {
    pkill -KILL -P "$LAUNCHER" || true
}

end_launcher() {
    kill -TERM "$LAUNCHER" 2>/dev/null || true
}

# follow [CHECK]: shows the first process's log while the launcher runs, calls CHECK every second, ends
# it when another machine fails, and returns its status.
follow() {
    local status=0 ended=""
    echo "Logs: $LOG_DIR"
    tail -n +1 -F --pid="$LAUNCHER" "$LOG_DIR/worker_0.log" 2>/dev/null &
    while kill -0 "$LAUNCHER" 2>/dev/null; do
        "${1:-true}"
        if [[ -z $ended ]] && failed_somewhere; then
            ended=yes
            end_launcher
        fi
        if [[ -n $STOPPED ]] && ((SECONDS > DEADLINE)); then
            stop "$STOPPED"
        fi
        sleep 1
    done
    wait "$LAUNCHER" || status=$?
    wait
    [[ -z $STOPPED ]] || exit "$STOPPED"
    return "$status"
}

# Whether this script, here or on another machine, has said that a process failed.
failed_somewhere() {
    [[ $FAILURE -nt $STAMP ]]
}

# report RANK STATUS: says how a process ended, and exits with its status; signals are negative.
report() {
    local log="$LOG_DIR/worker_$1.log" status="$2" line words
    words="$(last_words "$log")"
    if ((status < 0)); then
        line="rank $1 was killed by signal $((-status)) ($(kill -l "$((-status))"))"
        status=$((128 - status))
        echo "$line ($log)" >"$FAILURE"
    else
        line="rank $1 ended with status $status${words:+: $words}"
        # It may have lost one on another machine, where the script is about to say so.
        ((MACHINES == 1)) || sleep 4
    fi
    give_up "$status" "$line ($log)"
}

# give_up STATUS LINE: unless another machine has said more.
give_up() {
    failed_somewhere || echo "$2" >"$FAILURE"
    echo "error: $(cat "$FAILURE")" >&2
    exit "$1"
}

# The last error that a log names, or its last line.
last_words() {
    { grep -E '^[A-Za-z_.]*(Error|error)\b' "$1" || tail -n 1 "$1"; } 2>/dev/null | tail -n 1
}
