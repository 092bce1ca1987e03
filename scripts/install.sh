# shellcheck shell=bash
# Sourced by the other scripts: `install_project EXTRAS` makes .venv/ in the project's root and installs
# the project with those extras, in the versions that were verified together.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
CONSTRAINTS="$ROOT/scripts/constraints.txt"
TORCH="torch==2.13.0"
MINDFORMERS="mindformers==1.9.0 datasets==4.8.5"

fail() {
    echo "error: $*" >&2
    exit 2
}

is_python_311() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1
}

make_venv() {
    local candidate
    for candidate in python3.11 python3 python; do
        is_python_311 "$candidate" || continue
        echo "Making $VENV"
        "$candidate" -m venv --clear "$VENV" >/dev/null ||
            fail "$candidate cannot make a virtual environment: install its venv module (python3.11-venv)"
        return
    done
    fail "Python 3.11 not found: install it so that python3.11 or python3 runs it"
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$CONSTRAINTS" "$@"
}

# What an installation depends on; it is repeated when this changes.
stamp() {
    echo "$ROOT $1"
    cat "$ROOT/pyproject.toml" "$CONSTRAINTS"
}

install_project() {
    local packages extras="$1" done_file="$VENV/.installed-${1//,/-}"
    if stamp "$extras" | cmp -s - "$done_file" && is_python_311 "$VENV/bin/python"; then
        return
    fi
    if ! is_python_311 "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        make_venv
    fi
    echo "Installing into $VENV; this takes a few minutes the first time"
    rm -f "$VENV"/.installed-*
    # By itself and first, so that nothing else chooses another build of it.
    pip_install "$TORCH"
    (cd "$ROOT" && pip_install -e ".[$extras]")
    if [[ ",$extras," == *,language-mindspore,* ]]; then
        # They ask for other versions of pyarrow and fsspec; the extra has what they import.
        read -ra packages <<<"$MINDFORMERS"
        pip_install --no-deps "${packages[@]}"
    fi
    stamp "$extras" >"$done_file"
}

# Threads beyond the CPUs that this process may use only slow each other down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}"
