#!/usr/bin/env bash
# Runs the tests in the environment that it makes: bash launchers/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

cd "$REPOSITORY"
setup_environment
ensure_iproute2
exec "$PYTHON" -m pytest "$@"
