# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the repository with the package and the extras named by the caller.
# A second call with the same pyproject.toml and extras changes nothing.

set_up() {
    local extras=$1 repository python stamp wanted
    repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$repository" || exit 1
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python3.13 python3.12 python3.11; do
            if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
            python=
        done
        if [ -z "$python" ]; then
            echo "error: no Python 3.11 or newer found as python3; install one and start again" >&2
            exit 2
        fi
        echo "setting up .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            echo "error: $python cannot make a virtual environment; install its venv module (on Debian: python3-venv)" >&2
            exit 2
        fi
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
