#!/usr/bin/env bash
# From nothing but Python 3.11 to crystals. Arguments replace the request:
#   bash scripts/quickstart.sh GaAs --formation-energy -0.4 --out runs/gaas
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

install_project torch,language,language-torch
if [[ $# -eq 0 ]]; then
    cd "$ROOT"
    set -- SrTiO3 --band-gap 1.8 --top 5 --out runs/srtio3
fi
exec "$VENV/bin/uni-mdm" generate "$@"
