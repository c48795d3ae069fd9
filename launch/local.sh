#!/usr/bin/env bash
# Sets up what is missing, then trains: bash launch/local.sh [--config.a.b=value …]
# Arguments go to `python -m llm_jepa_jax.main`; without --config it takes configs/tiny.py.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up ""
exec .venv/bin/python -m llm_jepa_jax.main "$@"
