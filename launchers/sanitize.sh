#!/usr/bin/env bash
# Runs tests under GCC's address and undefined-behaviour sanitizers: bash launchers/sanitize.sh [pytest arguments]
#
# Any finding ends the process with a report and an exit status that is not 0. Without paths among the arguments the
# tests of the checkpoint codec and of its files run. commcomp is built for this alone, in build/sanitize; torch, pytest
# and all else come from the normal environment. Needs g++ (or CXX=another GCC) with its libasan.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

cd "$REPOSITORY"
export CXX="${CXX:-g++}"
command -v "$CXX" >/dev/null || fail "no $CXX; install it (Debian and Ubuntu: apt-get install g++) or name a GCC in CXX"
LIBASAN="$("$CXX" -print-file-name=libasan.so)"
[[ "$LIBASAN" == /* ]] || fail "$CXX has no libasan.so; take a GCC that has (Debian and Ubuntu: apt-get install g++)"
setup_environment

SANITIZED="$REPOSITORY/build/sanitize"
TESTS="tests/checkpoint/codec tests/checkpoint/fuzz tests/checkpoint/test_decoder.py tests/checkpoint/test_container.py"
packages_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

if ! cmp -s "$COMMCOMP_VENV/commcomp-stamp" "$SANITIZED/commcomp-stamp"; then
    echo "Building commcomp with sanitizers ..."
    "$PYTHON" -m venv "$SANITIZED"
    # A folder named so is searched, but its own .pth files are not read: that of the normal commcomp is among them.
    packages_of "$PYTHON" >"$(packages_of "$SANITIZED/bin/python")/others.pth"
    "$SANITIZED/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --force-reinstall \
        -C cmake.build-type=RelWithDebInfo -C cmake.define.COMMCOMP_SANITIZE=address,undefined,float-cast-overflow \
        -e "$REPOSITORY" || fail "the build failed; see above"
    cp "$COMMCOMP_VENV/commcomp-stamp" "$SANITIZED/commcomp-stamp"
fi

# No leaks: Python leaves objects behind at its end by design. Tests ask for too much memory, which gives null, and
# weigh what is held: little of what was freed is kept. Python's memory comes from malloc, which is watched. libstdc++
# is loaded early for ASan to find what throws exceptions.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export PYTHONMALLOC=malloc COMMCOMP_MUTATIONS="${COMMCOMP_MUTATIONS:-2000}"
export LD_PRELOAD="$LIBASAN $("$CXX" -print-file-name=libstdc++.so.6)"
"$SANITIZED/bin/python" -c 'import sys; from commcomp import _checkpoint
sys.exit(not _checkpoint.__file__.startswith(sys.prefix))' || fail "the tests would not run the build in $SANITIZED"
# Only sys is captured: a report is written below it, and would be lost with the process.
exec "$SANITIZED/bin/python" -m pytest -p no:faulthandler --capture=sys -o testpaths="$TESTS" "$@"
