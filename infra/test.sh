#!/usr/bin/env bash
# Installs if need be, then runs the tests of the first tier, or with --slow those of the second. Further arguments go
# to pytest: bash infra/test.sh tests/test_config.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash infra/install.sh
tier="not slow"
if [[ ${1:-} == --slow ]]; then
    tier="slow"
    shift
fi
exec .venv/bin/python -m pytest -m "$tier" "$@"
