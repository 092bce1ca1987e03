#!/usr/bin/env bash
# Trains with PyTorch on all GPUs of this machine, or of several, with torchrun.
#
#   bash scripts/run_gpu.sh [--nproc N] [--device cuda|cpu] [--out FOLDER] CONFIG [KEY=VALUE ...]
#
#   CONFIG       a YAML file, as in configs/
#   KEY=VALUE    replaces a setting: train.steps=100
#   --nproc N    processes on this machine; one per visible GPU
#   --device     cpu is for a dry run and needs --nproc
#   --out        the run's folder, runs/NAME; the run in it goes on if there is one
#
# On several machines, run it on each of them with the same arguments and in the environment
#   NNODES       how many there are
#   NODE_RANK    which one this is: 0, 1, ...
#   MASTER_ADDR, MASTER_PORT    where the first one listens; the port is 29500 if not given
# and an --out that they share. The batch is that of CONFIG and is divided among all processes.
#
# PYTHON is the interpreter, .venv/bin/python if not given. Every process has a log
# FOLDER/logs/START/worker_RANK.log. When one fails, the others are stopped, and the exit status is
# that of the one that failed, whose rank is named.
#
# Ctrl-C or SIGTERM lets the processes finish a step and write a checkpoint, for 30 s at most, with
# status 130 or 143; the same command goes on. A second one ends them at once.
set -euo pipefail
SELF="${BASH_SOURCE[0]}"
source "$(dirname "$SELF")/launch.sh"

# What a cluster may have set for msrun is not of this run.
unset MS_WORKER_NUM LOCAL_WORKER
DEVICE=cuda NPROC="" LOG_DIR=""
while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case "$1" in
    -h | --help) print_help && exit ;;
    --device) need_value "$@" && DEVICE="$2" && shift 2 ;;
    --nproc) need_value "$@" && NPROC="$2" && shift 2 ;;
    --out) need_value "$@" && OUT="$2" && shift 2 ;;
    *) take_argument "$1" && shift ;;
    esac
done

NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}"
[[ $DEVICE == cuda || $DEVICE == cpu ]] || fail "--device $DEVICE: give cuda or cpu"
[[ -z $NPROC ]] || need_count --nproc "$NPROC"
[[ $DEVICE == cuda || -n $NPROC ]] || fail "--device cpu needs --nproc"
need_count NNODES "$NNODES"
MACHINES="$NNODES"
if ((NNODES > 1)); then
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR, the first machine"
    if [[ ! $NODE_RANK =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
        fail "NODE_RANK=$NODE_RANK: give this machine's number, 0 to $((NNODES - 1))"
    fi
    need_port MASTER_PORT "${MASTER_PORT:-29500}"
fi

find_python torch,language,language-torch
check_run torch "$DEVICE" "${NPROC:-1}"
open_logs

RENDEZVOUS=(--standalone)
if ((NNODES > 1)); then
    RENDEZVOUS=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
# shellcheck disable=SC2016  # torchrun sets RANK for every process
start "$LOG_DIR/torchrun_$NODE_RANK.log" "$PYTHON" -m torch.distributed.run \
    "${RENDEZVOUS[@]}" --nproc-per-node "${NPROC:-gpu}" --no-python \
    bash -c 'exec "$@" >"$LOG_DIR/worker_$RANK.log" 2>&1' worker "$PYTHON" "${TRAIN[@]}"
follow && exit

# torchrun's table of failures: the one that a signal ended came before those that lost it.
read -r rank status < <(awk '
    $1 == "rank" { rank = $3 }
    $1 == "exitcode" && $3 < 0 && $3 != -15 && killed == "" { killed = rank " " $3 }
    $1 == "exitcode" { cause = rank " " $3 }
    END { print killed != "" ? killed : cause }' "$LAUNCHER_LOG") || true
[[ -n ${status:-} ]] || give_up 1 "torchrun failed: $(last_words "$LAUNCHER_LOG") ($LAUNCHER_LOG)"
report "$rank" "$status"
