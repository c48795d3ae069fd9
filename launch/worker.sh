#!/usr/bin/env bash
# Runs llm_jepa_jax.main on one machine of many, the same command on each; processes find each other by themselves.
#   bash launch/worker.sh run ARGUMENTS…     in the foreground. SIGTERM goes on to the run, which saves and stops.
#                                            Exit code 0: the run has ended; 143: told to stop, start it again; 2: wrong input;
#                                            75: other processes are missing or gone, start all again.
#   bash launch/worker.sh start ARGUMENTS…   the same, detached from the terminal; RUN_KEY in the environment names it
#   bash launch/worker.sh state [KEY]        of the detached run; one of another name counts as none, or `other` if it runs
#   bash launch/worker.sh log | stop
#   bash launch/worker.sh install EXTRAS     makes .venv, with a Python of its own where the machine's is too old
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/setup.sh
source launch/setup.sh
records=runs/launch

run() {
    local python=python code=0
    told='' child=''
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
    trap 'told=1; if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM INT
    "$python" -m llm_jepa_jax.main "$@" <&0 &
    child=$!
    if [ -n "$told" ]; then kill -TERM "$child" 2>/dev/null || true; fi
    await "$child" || code=$?
    # A stopped run exits with 0 as a finished one does; who started it must be able to tell them apart.
    if [ -n "$told" ] && [ "$code" = 0 ]; then code=143; fi
    return "$code"
}

boot() {
    cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown
}

# The detached run's process id, if it is alive: an id of before a reboot may be another process by now.
alive() {
    local id booted
    if [ -f "$records/exit" ]; then return 1; fi
    read -r id booted <"$records/process" 2>/dev/null || return 1
    [ "$booted" = "$(boot)" ] && kill -0 "$id" 2>/dev/null || return 1
    echo "$id"
}

detached() {
    local code=0
    run "$@" || code=$?
    echo "$code" >"$records/exit.new"
    mv "$records/exit.new" "$records/exit"
}

start() {
    local id
    if id=$(alive); then fail "a run is going on here already (process $id); stop it first: bash launch/worker.sh stop"; fi
    mkdir -p "$records"
    rm -f "$records/exit"
    echo "${RUN_KEY:-}" >"$records/key"
    echo "$(date -u +%FT%TZ) start: $(quoted "$@")" >>"$records/log"
    setsid nohup bash launch/worker.sh detached "$@" >>"$records/log" 2>&1 </dev/null &
    echo "$! $(boot)" >"$records/process"
    echo "started process $! on $(hostname); log: $PWD/$records/log"
}

state() {
    local code now=none
    if [ -f "$records/exit" ]; then
        code=$(cat "$records/exit")
        case $code in
        0) now=finished ;;
        2) now=refused ;;
        143) now=stopped ;;
        *) now=failed ;;
        esac
    elif alive >/dev/null; then
        now=running
    elif [ -f "$records/process" ]; then
        now=killed
    fi
    if [ $# -gt 0 ] && [ "$now" != none ] && [ "$1" != "$(cat "$records/key" 2>/dev/null)" ]; then
        if [ "$now" = running ]; then now=other; else now=none; fi
    fi
    echo "run-state $now $(hostname)"
}

stop() {
    local id
    SECONDS=0
    id=$(alive) || { echo "no run is going on on $(hostname)"; return; }
    kill -TERM "$id"
    while kill -0 "$id" 2>/dev/null; do
        if [ "$SECONDS" -ge "${STOP_SECONDS:-300}" ]; then
            echo "process $id has not stopped within $SECONDS s: killed" >&2
            kill -KILL -- "-$id"
            return
        fi
        sleep 0.2
    done
    echo "stopped process $id on $(hostname)"
}

install() {
    # Images of TPU VMs carry Ubuntu 22.04, whose Python is 3.10.
    if [ ! -x .venv/bin/python ] && ! find_python >/dev/null; then
        PATH="$HOME/.local/bin:$PATH"
        if ! command -v uv >/dev/null; then
            curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh
        fi
        uv python install 3.12
    fi
    set_up "$1"
}

command=${1:-}
shift || true
case $command in
run | start | detached | state | stop | install) "$command" "$@" ;;
log) exec tail -n "${LINES_BEFORE:-100}" -F "$records/log" ;;
*) fail "launch/worker.sh $command: no such command; one of run, start, state, log, stop, install" ;;
esac
