#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one slice or several, from any machine with gcloud. See docs/pods.md.
set -euo pipefail
usage() {
    cat <<'TEXT'
bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- arguments of llm_jepa_jax.main]

train     all of the following, until the run has ended: asks for the TPUs, waits, copies, installs, starts the run on every
          worker, watches it, starts it again when it was stopped, and asks for new TPUs when they were preempted
create    asks for the TPUs (a queued resource)       copy     sends the package, configs and launch/ to every worker
install   makes .venv on every worker                 start    starts the run, detached, on every worker
status    what resource and run are doing             tail     shows worker 0's log as it grows
stop      SIGTERM to the run: it saves and ends       delete   gives the TPUs back

--topology=KIND:SHAPE   v5p:4x4x4, as --mode=plan takes it; kinds and defaults: launch/tpu_types.tsv    (train, create)
--slices=N              slices of that topology (1)
--accelerator-type=T    instead of --topology, as gcloud names it (then with --runtime-version)
--runtime-version=V     software of the VMs
--spot                  preemptible, cheaper
--create-flag=FLAG      a further flag of `gcloud compute tpus queued-resources create`; may be repeated
--project=PROJECT       instead of gcloud's default
--with=FILE             a file to send along, such as data; it lies where the run starts; may be repeated
--env=NAME=VALUE        a variable of the run's environment; may be repeated
--extras=EXTRAS         of pyproject.toml, to install (tpu)
--max-restarts=N        train: give up after so many failures (20); stops and preemptions do not count
--poll=SECONDS          train: between two looks (60)
--delete-after          train: give the TPUs back when the run has ended
--dry-run               show the commands, run none

Every value arrives as it is typed, whatever characters it holds. --workdir must be an absolute path on a file
system that all workers mount and that outlives them.
TEXT
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$repository/launch/common.sh"
types=$repository/launch/tpu_types.tsv
patience=30 # looks in a row that may fail before `train` gives up

name='' zone='' project='' topology='' slices=1 accelerator_type='' runtime_version='' spot='' extras=tpu
max_restarts=20 poll=60 delete_after='' dry_run=''
create_flags=() with=() environment=() arguments=()

whole_number() {
    case $2 in '' | *[!0-9]*) fail "--$1=$2: a whole number is wanted" ;; esac
}

read_options() {
    while [ $# -gt 0 ]; do
        case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --accelerator-type=*) accelerator_type=${1#*=} ;;
        --runtime-version=*) runtime_version=${1#*=} ;;
        --spot) spot=1 ;;
        --create-flag=*) create_flags+=("${1#*=}") ;;
        --with=*) with+=("${1#*=}") ;;
        --env=*) environment+=("${1#*=}") ;;
        --extras=*) extras=${1#*=} ;;
        --max-restarts=*) max_restarts=${1#*=} ;;
        --poll=*) poll=${1#*=} ;;
        --delete-after) delete_after=1 ;;
        --dry-run) dry_run=1 ;;
        --help | -h) usage && exit ;;
        --) shift && arguments=("$@") && break ;;
        *) fail "$1: no such option; see bash launch/tpu_vm.sh --help (arguments of the run come after \`--\`)" ;;
        esac
        shift
    done
}

check_options() {
    local item
    if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,57}[a-z0-9])?$ ]]; then
        fail "--name=$name: lower-case letters, digits and hyphens are wanted, a letter first, 59 at most"
    fi
    [ -n "$zone" ] || fail "--zone is missing, such as --zone=us-east5-a"
    whole_number slices "$slices"
    whole_number max-restarts "$max_restarts"
    whole_number poll "$poll"
    [ "$slices" -ge 1 ] || fail "--slices=$slices: one at least"
    for item in ${environment[@]+"${environment[@]}"}; do
        [[ $item =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$item: NAME=VALUE is wanted"
    done
    for item in ${with[@]+"${with[@]}"}; do
        [ -e "$item" ] || fail "--with=$item: no such file"
    done
    if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
        fail "gcloud was not found; install the Google Cloud CLI, or look with --dry-run"
    fi
    case $command in train | start) need_lasting_workdir ${arguments[@]+"${arguments[@]}"} ;; esac
    case $command in train | create) resolve_type ;; esac
    place=("--zone=$zone")
    if [ -n "$project" ]; then place+=("--project=$project"); fi
}

# The shape that an accelerator type of so many chips stands for, smallest side first: the one nearest to a cube (or a
# square) whose sides are 1, 2 or multiples of 4.
compact_shape() {
    local chips=$1 a b c best='' longest=$(($1 + 1)) first=1
    if [ "$2" = 3 ]; then first=$chips; fi
    for ((a = 1; a <= first; a++)); do
        if ((chips % a || (a > 2 && a % 4))); then continue; fi
        for ((b = a; b * b <= chips / a; b++)); do
            c=$((chips / a / b))
            if ((chips % (a * b) || (b > 2 && b % 4) || (c > 2 && c % 4) || c > longest)); then continue; fi
            longest=$c best=${a}x${b}x$c
        done
    done
    if [ "$2" = 2 ]; then best=${best#1x}; fi
    echo "$best"
}

# Sets `slice_flags` (what a slice is) and `runtime_version` from --topology or --accelerator-type.
resolve_type() {
    local kind shape wanted gcloud request cores runtime dimensions chips=1 size sizes given
    slice_flags=()
    if [ -n "$accelerator_type" ]; then
        [ -z "$topology" ] || fail "--topology and --accelerator-type exclude each other"
        [ -n "$runtime_version" ] || fail "--accelerator-type=$accelerator_type: name its --runtime-version too"
        slice_flags=("--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version")
        return
    fi
    wanted=${topology%%:*} shape=${topology#*:}
    while IFS=$'\t' read -r kind gcloud request cores runtime _ dimensions; do
        if [ "$kind" = "$wanted" ]; then break; fi
    done < <(grep -v '^#' "$types")
    if [ "$kind" != "$wanted" ] || [ -z "$wanted" ]; then
        fail "--topology=$topology: no such kind of TPU; one of $(grep -v '^#' "$types" | cut -f1 | paste -s -d' ' -), such as v5p:4x4x4"
    fi
    [[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=$topology: a shape such as 4x4x4 is wanted after the colon"
    IFS=x read -r -a sizes <<<"$shape"
    [ "${#sizes[@]}" = "$dimensions" ] || fail "--topology=$topology: $kind has $dimensions dimensions"
    for size in "${sizes[@]}"; do chips=$((chips * size)); done
    if [ "$request" = topology ]; then
        slice_flags=("--type=$gcloud" "--topology=$shape")
    else
        given=$(compact_shape "$chips" "$dimensions")
        if [ "$given" != "$(printf '%s\n' "${sizes[@]}" | sort -n | paste -s -d x -)" ]; then
            fail "--topology=$topology: gcloud gives $chips chips of $kind as ${given:-no shape at all}"
        fi
        slice_flags=("--accelerator-type=$gcloud-$((chips * cores))")
    fi
    runtime_version=${runtime_version:-$runtime}
    slice_flags+=("--runtime-version=$runtime_version")
}

queued() {
    local verb=$1
    shift
    perform gcloud compute tpus queued-resources "$verb" "$name" "${place[@]}" "$@"
}

# One shell command, as a string, on every worker of every slice.
everywhere() {
    queued ssh --node=all --worker=all "--command=$1"
}

create() {
    local nodes=("--node-id=$name")
    if [ "$slices" -gt 1 ]; then nodes=("--node-count=$slices" "--node-prefix=$name"); fi
    queued create "${nodes[@]}" "${slice_flags[@]}" ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
    queued delete --force --quiet
}

copy() {
    local archive=$repository/runs/launch/$name.tar.gz file
    local files=(-C "$repository" pyproject.toml README.md LICENSE llm_jepa_jax configs launch)
    for file in ${with[@]+"${with[@]}"}; do
        files+=(-C "$(cd "$(dirname -- "$file")" && pwd)" "./$(basename -- "$file")")
    done
    perform mkdir -p "${archive%/*}"
    perform tar -czf "$archive" --exclude=__pycache__ "${files[@]}"
    queued_copy "$archive"
    # Files that are gone from the package must not stay behind.
    everywhere 'mkdir -p llm_jepa_jax && cd llm_jepa_jax && rm -rf llm_jepa_jax configs launch && tar -xzf ../llm_jepa_jax.tar.gz'
}

queued_copy() {
    perform gcloud compute tpus queued-resources scp "$1" "$name:llm_jepa_jax.tar.gz" "${place[@]}" --node=all --worker=all
}

install() {
    everywhere "cd llm_jepa_jax && bash launch/worker.sh install $(quoted "$extras")"
}

start() {
    local words=(bash launch/worker.sh start ${arguments[@]+"${arguments[@]}"})
    words=(env ${environment[@]+"${environment[@]}"} "RUN_KEY=$(run_key)" "${words[@]}")
    everywhere "cd llm_jepa_jax && $(quoted "${words[@]}")"
}

# Tells this run from another that the workers may have had before.
run_key() {
    quoted "$name" ${environment[@]+"${environment[@]}"} -- ${arguments[@]+"${arguments[@]}"} | cksum | cut -d' ' -f1
}

stop() {
    everywhere 'cd llm_jepa_jax && bash launch/worker.sh stop'
}

tail() {
    queued ssh --node=0 --worker=0 '--command=cd llm_jepa_jax && bash launch/worker.sh log'
}

status() {
    queued describe '--format=value(state.state)'
    run_states
}

# What every worker says of its run; with a key, of that run.
run_states() {
    everywhere "bash llm_jepa_jax/launch/worker.sh state ${1:-} 2>/dev/null || echo run-state none"
}

# All queued resources of the zone with their states: asking for one that does not exist would look like any other error.
resources() {
    perform gcloud compute tpus queued-resources list "${place[@]}" '--format=value(name,state.state)'
}

# The queued resource's state; ABSENT where there is none, UNKNOWN where gcloud could not tell.
resource_state() {
    local lines found state
    lines=$(silent=1 resources) || { echo UNKNOWN; return; }
    while IFS=$'\t' read -r found state; do
        if [ "${found##*/}" = "$name" ]; then
            echo "$state"
            return
        fi
    done <<<"$lines"
    echo ABSENT
}

# What the workers' runs are doing, as one word, what calls for action first, and how many answered. `partly`: running on
# some workers only. Input that is wrong is so on all of them: a refusal beside something else came from that.
run_state() {
    local lines state found=''
    lines=$(silent=1 run_states "$(run_key)") || lines=''
    for state in other none killed failed stopped refused finished; do
        if grep -q "^run-state $state" <<<"$lines"; then
            found=$state
            break
        fi
    done
    if [ "$found" != other ] && grep -q '^run-state running' <<<"$lines"; then
        case $found in '' | finished) found=running ;; *) found=partly ;; esac
    fi
    echo "${found:-unreachable} $(grep -c '^run-state' <<<"$lines" || true)"
}

note() {
    echo "$(date -u +%FT%TZ) $name: $1" >&2
}

plan() {
    local step
    for step in create copy install start; do "$step"; done
    echo "# then, every $poll s: the resource's state, and the run's on every worker"
    resources
    run_states "$(run_key)"
    echo "# SUSPENDED (preempted): delete, then all from the top; the run goes on from its --workdir"
    queued delete --force --quiet
    echo "# stopped, failed or killed on a worker: stop, then start; at most $max_restarts failures"
    stop
    start
    echo "# finished on every worker: ${delete_after:+delete, and }the end"
}

# Brings the run up on TPUs that are there.
bring_up() {
    if [ "$1" = none ]; then
        copy && install && start
    else
        stop && start
    fi || count_failure "the run could not be started on every worker"
}

count_failure() {
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$max_restarts" ]; then
        fail "$1, $restarts failures by now; see tail and status; the TPUs, if any, are still yours (delete)"
    fi
    note "$1; trying again"
}

# Looks at the run and does what is called for. Returns 1 when it has ended.
look_at_run() {
    local now answers
    read -r now answers < <(run_state)
    # gcloud is content with the slices that it can reach.
    if [ "$answers" -lt "$workers" ]; then now=unreachable; else workers=$answers; fi
    if [ "$now" != "$seen" ]; then note "run: $now"; fi
    seen=$now
    case $now in
    finished) return 1 ;;
    other) fail "another run is going on there: stop it first, or take other TPUs" ;;
    refused) fail "the run refused its input; tail says why; the TPUs are still yours (delete)" ;;
    unreachable | partly) lost=$((lost + 1)) ;;
    *) lost=0 ;;
    esac
    case $now in
    none | stopped) bring_up "$now" ;;
    failed | killed)
        count_failure "the run failed"
        bring_up "$now"
        ;;
    # The others stop by themselves when one is gone, or they are made to.
    partly)
        if [ "$lost" -ge 5 ]; then
            stop || true
            lost=0
        fi
        ;;
    esac
}

train() {
    local state before=''
    restarts=0 lost=0 seen='' workers=0
    if [ -n "$dry_run" ]; then
        plan
        return
    fi
    while true; do
        state=$(resource_state)
        if [ "$state" != "$before" ]; then note "resource: $state"; fi
        case $state in
        ABSENT) create ;;
        ACTIVE) look_at_run || break ;;
        SUSPENDED)
            workers=0
            delete
            ;;
        FAILED)
            count_failure "the request for TPUs failed"
            delete
            ;;
        UNKNOWN)
            if [ -z "$before" ]; then fail "gcloud cannot list the queued resources of --zone=$zone; see its words above"; fi
            lost=$((lost + 1))
            ;;
        esac
        before=$state
        if [ "$lost" -ge "$patience" ]; then fail "no clear answer for $lost looks in a row: see status"; fi
        sleep "$poll"
    done
    note "the run has ended"
    if [ -n "$delete_after" ]; then delete; fi
}

command=${1:-}
case $command in
train | create | copy | install | start | status | tail | stop | delete) shift ;;
--help | -h | '') usage && exit ;;
*) fail "launch/tpu_vm.sh $command: no such command; see bash launch/tpu_vm.sh --help" ;;
esac
read_options "$@"
check_options
"$command"
