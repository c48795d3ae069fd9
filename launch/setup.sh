# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the repository with the package and the extras named by the caller.
# A second call with the same pyproject.toml and extras changes nothing. By itself: bash launch/setup.sh [EXTRAS]

# The name of a Python that is new enough and can make virtual environments.
find_python() {
    local python
    for python in python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    return 1
}

set_up() {
    local extras=$1 repository python stamp wanted
    repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$repository" || exit 1
    if [ ! -x .venv/bin/python ]; then
        if ! python=$(find_python); then
            echo "error: no Python 3.11 or newer with its venv module found as python3 (on Debian: python3-venv); install one and start again" >&2
            exit 2
        fi
        echo "setting up .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    stamp=.venv/installed-${extras:-core}
    wanted=$(cat pyproject.toml launch/setup.sh | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing llm_jepa_jax${extras:+[$extras]}"
        .venv/bin/python -m pip install --quiet --upgrade pip
        # setuptools warns at every editable install of a repository laid out like this one.
        PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --editable ".${extras:+[$extras]}"
        echo "$wanted" >"$stamp"
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    set_up "${1:-}"
fi
