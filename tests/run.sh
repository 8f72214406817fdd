#!/usr/bin/env bash
# All tests that need no GPU, in the project's environment:  bash tests/run.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
cd "$FASTSSKD_HOME"
exec python -m pytest "$@"
