#!/usr/bin/env bash
# Sets up what is missing, then checks format, lint and types, and runs the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up test
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q -n 2 --dist worksteal "$@"
