# shellcheck shell=bash
# Sourced by the scripts beside it: errors, and commands that are shown before they run.

fail() {
    echo "error: $1" >&2
    exit 2
}

# The arguments as one line that bash reads back as those very arguments.
quoted() {
    local line
    printf -v line ' %q' "$@"
    printf '%s' "${line# }"
}

# Runs a command after showing it (unless silent=1); with dry_run=1 the line on standard output is all.
perform() {
    if [ "${dry_run:-}" = 1 ]; then
        quoted "$@"
        echo
    else
        if [ "${silent:-}" != 1 ]; then echo "+ $(quoted "$@")" >&2; fi
        "$@"
    fi
}

# The exit code of a process of this shell. A trapped signal ends `wait` early, and with a code of its own.
await() {
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1"
}

# The value of --workdir among the arguments of llm_jepa_jax.main, however it is spelled; nothing where it is missing.
workdir_of() {
    local argument found='' next=
    for argument in "$@"; do
        if [ -n "$next" ]; then
            found=$argument next=
        else
            case $argument in
            --workdir=* | -workdir=*) found=${argument#*=} ;;
            --workdir | -workdir) next=1 ;;
            esac
        fi
    done
    printf '%s' "$found"
}

# Refuses a run whose directory would go with its machine.
need_lasting_workdir() {
    local workdir
    workdir=$(workdir_of "$@")
    case $workdir in
    /* | gs://?*) ;;
    *) fail "--workdir=$workdir: a run goes on from its directory after a preemption, so it must outlive the machines and be one for all of them; after \`--\`, pass gs://BUCKET/DIR or an absolute path on a mounted file system" ;;
    esac
}
