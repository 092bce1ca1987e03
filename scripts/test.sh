#!/usr/bin/env bash
# Installs what the tests need and runs every check. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install_project torch,mindspore,language,language-torch,language-mindspore,materials-project,test
cd "$ROOT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
exec "$VENV/bin/python" -m pytest "$@"
