# Sourced by demo.sh and test.sh: makes the virtual environment and leaves its interpreter in $PYTHON.
#
#   COMMCOMP_VENV    folder of the environment (default: .venv in this repository)
#   COMMCOMP_PYTHON  interpreter to make it with (default: a python3 on the path, 3.10 or later)
#
# It compiles commcomp's C++ part if there is a C++ compiler and Python's headers; without, torch's operations serve. A
# second call with the same pyproject.toml, constraints and C++ sources installs nothing.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
COMMCOMP_VENV="${COMMCOMP_VENV:-$REPOSITORY/.venv}"
PYTHON="$COMMCOMP_VENV/bin/python"
CPU_WHEELS=https://download.pytorch.org/whl/cpu

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${COMMCOMP_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later with the venv module${COMMCOMP_PYTHON:+ ($COMMCOMP_PYTHON is none)}; install one" \
        "(Debian and Ubuntu: apt-get install python3 python3-venv) or name one in COMMCOMP_PYTHON"
}

install_torch() {
    # On Linux PyPI's torch brings gigabytes of CUDA libraries; without a GPU take the CPU build where it can be had.
    local index=()
    if [[ "$(uname -s)" == Linux ]] && ! nvidia-smi >/dev/null 2>&1; then
        if "$PYTHON" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' \
            "$CPU_WHEELS/torch/" 2>/dev/null; then
            index=(--extra-index-url "$CPU_WHEELS")
        fi
    fi
    "$PYTHON" -m pip install "${PIP_OPTIONS[@]}" ${index[@]+"${index[@]}"} torch
}

say_if_nothing_compiles() {
    local found=yes
    command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || found=
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || found=
    [[ -n "$found" ]] ||
        echo "No C++ compiler or no Python.h: commcomp's C++ part is left out and torch's slower operations serve" \
            "(Debian and Ubuntu: apt-get install g++ python3-dev)"
}

setup_environment() {
    local stamp_file="$COMMCOMP_VENV/commcomp-stamp" stamp maker
    if [[ ! -x "$PYTHON" ]]; then
        maker="$(find_python)" || exit 1
        echo "Making the environment $COMMCOMP_VENV"
        "$maker" -m venv "$COMMCOMP_VENV" || fail "could not make $COMMCOMP_VENV"
    fi
    stamp="$REPOSITORY $(cd "$REPOSITORY" && cat pyproject.toml CMakeLists.txt launchers/constraints.txt \
        commcomp/native/*.* commcomp/native/*/*.* | cksum)"
    if [[ -f "$stamp_file" && "$(cat "$stamp_file")" == "$stamp" ]]; then
        return
    fi
    say_if_nothing_compiles
    echo "Installing commcomp and what it needs (a minute or two) ..."
    PIP_OPTIONS=(-qq --disable-pip-version-check -c "$REPOSITORY/launchers/constraints.txt")
    install_torch || fail "torch could not be installed; see above"
    if "$PYTHON" -m pip install --help | grep -q -- --build-constraint; then  # pip 25.3 and later
        PIP_OPTIONS+=(--build-constraint "$REPOSITORY/launchers/constraints.txt")
    fi
    "$PYTHON" -m pip install "${PIP_OPTIONS[@]}" -e "${REPOSITORY}[test]" || fail "the installation failed; see above"
    echo "$stamp" >"$stamp_file"
}

# The shaped cluster needs ip and tc; as root, get them unless COMMCOMP_NO_APT is set. Never fails.
ensure_iproute2() {
    if [[ -z "${COMMCOMP_NO_APT:-}" && "$(uname -s)" == Linux && "$(id -u)" == 0 ]] && ! { command -v ip && command -v tc; } >/dev/null 2>&1; then
        if command -v apt-get >/dev/null 2>&1; then
            echo "Installing iproute2 (ip and tc) for the shaped cluster; COMMCOMP_NO_APT=1 prevents it"
            { apt-get install -y iproute2 || { apt-get update && apt-get install -y iproute2; }; } >/dev/null 2>&1 || true
        fi
    fi
}
