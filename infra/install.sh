#!/usr/bin/env bash
# Makes .venv with this checkout, everything it needs and its tests' tools; does nothing if it is up to date.
# PYTHON names another interpreter than the python3 on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || {
    echo "install: expected Python 3.11 to 3.14 as '$python', found none that runs; set PYTHON=/path/to/python3.11" >&2
    exit 1
}
case $version in
    3.11.* | 3.12.* | 3.13.* | 3.14.*) ;;
    *)
        echo "install: expected Python 3.11 to 3.14 as '$python', found $version; set PYTHON=/path/to/python3.11" >&2
        exit 1
        ;;
esac

# What an installation depends on: of pyproject.toml not the settings of tools; the place of the checkout, because a
# virtual environment holds absolute paths.
project=$("$python" -c 'import tomllib
content = tomllib.load(open("pyproject.toml", "rb"))
print(content["project"], content["build-system"], content["tool"]["setuptools"])')
stamp=$(echo "$PWD $version $project" | cat - requirements.lock infra/install.sh | cksum)
if [[ -f .venv/installed && $(<.venv/installed) == "$stamp" ]]; then
    exit 0
fi

step() { echo "install: $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

step "new .venv with Python $version"
rm -rf .venv
"$python" -m venv .venv || {
    echo "install: '$python -m venv' failed; on Debian and Ubuntu it comes with the package python3-venv" >&2
    exit 1
}

# Not in the lock: its build depends on the machine (the default one on Linux brings CUDA, which GPU nodes need; others
# are for CPUs only), and so does its hash. First, so that the lock has the last word on what both need.
step "torch"
pip install --quiet --no-compile --only-binary :all: "$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)"

step "the packages in requirements.lock"
pip install --quiet --no-compile --only-binary :all: --no-deps --require-hashes -r requirements.lock

step "this checkout"
pip install --quiet --no-deps --no-build-isolation --editable .
pip check

# pip would do this with one core, for 98 of the 160 s of processor time that an installation then takes. Some packages
# carry files of other Python versions, which do not compile.
step "byte code"
.venv/bin/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true

echo "$stamp" >.venv/installed
step "done"
