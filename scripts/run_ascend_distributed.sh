#!/usr/bin/env bash
# Trains with MindSpore on the NPUs of this machine, or of several, with msrun.
#
#   bash scripts/run_ascend_distributed.sh [options] CONFIG [KEY=VALUE ...]
#
#   CONFIG       a YAML file, as in configs/
#   KEY=VALUE    replaces a setting: train.steps=100
#   --device     ascend, or cpu for a dry run
#   --out        the run's folder, runs/NAME; the run in it goes on if there is one
#
# and as for MindFormers' msrun_launcher.sh, or in the environment by the names in brackets:
#   --worker_num [WORKER_NUM]              processes on all machines; 8
#   --local_worker_num [LOCAL_WORKER]      processes on this machine; all of them
#   --master_addr [MASTER_ADDR]            the first machine; 127.0.0.1
#   --master_port [MASTER_PORT]            where msrun's scheduler listens on it; 8118
#   --node_rank [NODE_RANK]                which machine this is: 0, 1, ...; 0
#   --log_dir [LOG_DIR]                    of every process; FOLDER/logs/START
#   --join [JOIN]                          True waits for the end, False only starts; True
#   --cluster_time_out [CLUSTER_TIME_OUT]  seconds to wait for all processes; 120, 600 for several machines
#
# On several machines, run it on each of them with the same arguments but --node_rank, and with an
# --out that they share. The batch is that of CONFIG and is divided among all processes.
#
# PYTHON is the interpreter, .venv/bin/python if not given. Every process has a log worker_RANK.log.
# When one fails, the others are stopped, and the exit status is that of the one that failed, whose
# rank is named.
#
# Ctrl-C or SIGTERM lets the processes finish a step and write a checkpoint, for 30 s at most, with
# status 130 or 143; the same command goes on. A second one ends them at once.
set -euo pipefail
SELF="${BASH_SOURCE[0]}"
source "$(dirname "$SELF")/launch.sh"

# What a cluster may have set for torchrun is not of this run.
unset WORLD_SIZE LOCAL_WORLD_SIZE
DEVICE=ascend
while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case "$1" in
    -h | --help) print_help && exit ;;
    --device) need_value "$@" && DEVICE="$2" && shift 2 ;;
    --out) need_value "$@" && OUT="$2" && shift 2 ;;
    --worker_num) need_value "$@" && WORKER_NUM="$2" && shift 2 ;;
    --local_worker_num | --local_worker) need_value "$@" && LOCAL_WORKER="$2" && shift 2 ;;
    --master_addr) need_value "$@" && MASTER_ADDR="$2" && shift 2 ;;
    --master_port) need_value "$@" && MASTER_PORT="$2" && shift 2 ;;
    --node_rank) need_value "$@" && NODE_RANK="$2" && shift 2 ;;
    --log_dir) need_value "$@" && LOG_DIR="$2" && shift 2 ;;
    --join) need_value "$@" && JOIN="$2" && shift 2 ;;
    --cluster_time_out) need_value "$@" && CLUSTER_TIME_OUT="$2" && shift 2 ;;
    *) take_argument "$1" && shift ;;
    esac
done

WORKER_NUM="${WORKER_NUM:-8}"
export LOCAL_WORKER="${LOCAL_WORKER:-$WORKER_NUM}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-8118}"
NODE_RANK="${NODE_RANK:-0}" JOIN="${JOIN:-True}"
[[ $DEVICE == ascend || $DEVICE == cpu ]] || fail "--device $DEVICE: give ascend or cpu"
[[ $JOIN == True || $JOIN == False ]] || fail "--join $JOIN: give True or False"
need_count --worker_num "$WORKER_NUM"
need_count --local_worker_num "$LOCAL_WORKER"
need_port --master_port "$MASTER_PORT"
((WORKER_NUM % LOCAL_WORKER == 0)) ||
    fail "--worker_num $WORKER_NUM: give a multiple of --local_worker_num $LOCAL_WORKER"
MACHINES=$((WORKER_NUM / LOCAL_WORKER))
if [[ ! $NODE_RANK =~ ^[0-9]+$ ]] || ((NODE_RANK >= MACHINES)); then
    fail "--node_rank $NODE_RANK: give this machine's number, 0 to $((MACHINES - 1))"
fi
((MACHINES == 1)) || [[ $MASTER_ADDR != 127.0.0.1 ]] ||
    fail "$WORKER_NUM processes, $LOCAL_WORKER of them here: give --master_addr, the first machine"
CLUSTER_TIME_OUT="${CLUSTER_TIME_OUT:-$((MACHINES == 1 ? 120 : 600))}"
need_count --cluster_time_out "$CLUSTER_TIME_OUT"

find_python mindspore,language,language-mindspore
check_run mindspore "$DEVICE" "$LOCAL_WORKER"
# On the first machine, whose scheduler would listen there; msrun does not say what it lacks.
if ((NODE_RANK == 0)) && (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; then
    fail "port $MASTER_PORT of $MASTER_ADDR is in use, perhaps by another run: give another --master_port"
fi
open_logs

# msrun starts what is called python. Its errors say which process failed.
PATH="$(dirname "$PYTHON"):$PATH"
export GLOG_v="${GLOG_v:-3}"
if [[ $DEVICE == cpu ]]; then
    # How long the scheduler waits for a process that has fallen silent.
    export MS_NODE_TIMEOUT="${MS_NODE_TIMEOUT:-15}"
fi

declare -A RANK_OF=()
SCHEDULER="" ORPHANED=0 ORPHANS_ENDED=0

# Notes which process has which rank, and ends what msrun leaves running: the scheduler, which waits for
# killed workers, and workers whose scheduler is gone.
watch_cluster() {
    local pid role
    for pid in $(pgrep -P "$LAUNCHER"); do
        role="$(variable "$pid" MS_ROLE)"
        if [[ $role == MS_SCHED ]]; then
            SCHEDULER="$pid"
        elif [[ $role == MS_WORKER ]]; then
            RANK_OF[$pid]="$(variable "$pid" RANK_ID)"
        fi
    done
    [[ -n $SCHEDULER ]] || return 0
    if failure_of_worker >/dev/null; then
        kill -KILL "$SCHEDULER" 2>/dev/null || true
    elif ! alive "$SCHEDULER"; then
        # After a good end the workers follow within seconds.
        ORPHANED=$((ORPHANED + 1))
        if ((ORPHANED == 10)) || grep -q Traceback "$LOG_DIR/scheduler.log"; then
            ORPHANS_ENDED=1
            kill_workers
        fi
    fi
}

# alive PID: msrun does not look after its scheduler, which stays on as a zombie.
alive() {
    local state
    state="$(ps -o stat= -p "$1")" && [[ $state != Z* ]]
}

# variable PID NAME: from a process's environment.
variable() {
    tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | sed -n "s/^$2=//p" || true
}

# PID and status of the first worker that msrun has seen fail.
failure_of_worker() {
    sed -nE 's/.*Worker process ([0-9]+) exit with exception. Error code: (-?[0-9]+).*/\1 \2/p' \
        "$LAUNCHER_LOG" | grep -m 1 .
}

# Workers have sessions of their own, which a signal to msrun does not reach.
ask_to_stop() {
    if ((${#RANK_OF[@]})); then
        kill -TERM "${!RANK_OF[@]}" 2>/dev/null || true
    else
        end_launcher
    fi
}

end_launcher() {
    kill_workers
    kill -TERM "$LAUNCHER" 2>/dev/null || true
}

run_cluster() {
    local pid status silent words
    start "$LOG_DIR/msrun_$NODE_RANK.log" msrun \
        --worker_num "$WORKER_NUM" --local_worker_num "$LOCAL_WORKER" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --node_rank "$NODE_RANK" \
        --log_dir "$LOG_DIR" --join True --cluster_time_out "$CLUSTER_TIME_OUT" \
        --tail_worker_log "$WORKER_NUM" python "${TRAIN[@]}"
    follow watch_cluster && return
    silent="$(sed -nE 's/.*worker ([0-9]+) is the first one timed out.*/\1/p' \
        "$LOG_DIR/scheduler.log" 2>/dev/null | head -n 1)"
    read -r pid status < <(failure_of_worker) || true
    if [[ -n $silent ]]; then
        give_up 1 "rank $silent fell silent ($LOG_DIR/worker_$silent.log)"
    elif ((ORPHANS_ENDED)) || [[ -z ${status:-} && $ORPHANED -gt 0 ]]; then
        # A worker that was killed takes the scheduler with it, which may be seen first.
        words="$(last_words "$LOG_DIR/scheduler.log")"
        give_up 1 "msrun's scheduler ended${words:+: $words} ($LOG_DIR/scheduler.log)"
    elif [[ -n ${status:-} && -n ${RANK_OF[$pid]:-} ]]; then
        report "${RANK_OF[$pid]}" "$status"
    fi
    give_up 1 "msrun failed: $(last_words "$LAUNCHER_LOG") ($LAUNCHER_LOG)"
}

if [[ $JOIN == True ]]; then
    run_cluster
else
    (
        trap '' HUP
        run_cluster
    ) </dev/null >"$LOG_DIR/run.log" 2>&1 &
    disown
    echo "Started; logs: $LOG_DIR"
fi
