#!/usr/bin/env bash
# Writes requirements.lock from pyproject.toml, with the pins that stand there kept; `bash infra/lock.sh --upgrade` takes
# the newest. Needs uv. One version of each package for all supported Pythons, so that tests of one speak for the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv pip compile pyproject.toml --extra test --universal --fork-strategy fewest --only-binary :all: --generate-hashes \
    --no-emit-package torch --annotation-style line --custom-compile-command "bash infra/lock.sh" \
    --quiet --output-file requirements.lock "$@"
