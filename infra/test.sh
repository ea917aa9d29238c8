#!/usr/bin/env bash
# Installs if need be, then runs the tests of the first tier, or with --slow those of the second. Further arguments go
# to pytest: bash infra/test.sh tests/test_config.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash infra/install.sh
# For the processes that tests start by the thousand, where the environment lets none of them keep its byte code.
.venv/bin/python -m compileall -q pipeline jobs tests
tier="not slow"
if [[ ${1:-} == --slow ]]; then
    tier="slow"
    shift
fi
exec .venv/bin/python -m pytest -m "$tier" "$@"
