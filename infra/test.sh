#!/usr/bin/env bash
# Installs if need be, then runs the tests; arguments go to pytest: bash infra/test.sh tests/test_config.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash infra/install.sh
exec .venv/bin/python -m pytest "$@"
