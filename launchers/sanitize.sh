#!/usr/bin/env bash
# Runs tests under GCC's address and undefined-behaviour sanitizers: bash launchers/sanitize.sh [pytest arguments]
#
# Any finding ends the process with a report and an exit status that is not 0. Without arguments the tests of the
# checkpoint codec and of its files. commcomp is built for this alone in build/sanitize; all else, torch and pytest, comes
# from the normal environment. Needs g++ (CXX) with its libasan.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

cd "$REPOSITORY"
CXX="${CXX:-g++}"
LIBASAN="$("$CXX" -print-file-name=libasan.so 2>/dev/null)" || fail "no $CXX; install g++ (apt-get install g++) or set CXX"
[[ "$LIBASAN" == /* ]] || fail "$CXX has no libasan.so: the sanitizers need GCC with its libasan (apt-get install g++)"
setup_environment

SANITIZED="$REPOSITORY/build/sanitize"
if [[ ! -x "$SANITIZED/bin/python" ]]; then
    "$PYTHON" -m venv "$SANITIZED"
fi
# A line with a folder adds that folder alone, not the normal commcomp that a .pth file in it stands for.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$SANITIZED/others"
mv "$SANITIZED/others" "$("$SANITIZED/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
if [[ ! -f "$SANITIZED/commcomp-stamp" ]] || ! cmp -s "$SANITIZED/commcomp-stamp" "$COMMCOMP_VENV/commcomp-stamp"; then
    echo "Building commcomp with sanitizers ..."
    CXX="$CXX" "$SANITIZED/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --force-reinstall \
        -C cmake.build-type=RelWithDebInfo -C cmake.define.COMMCOMP_SANITIZE=address,undefined,float-cast-overflow \
        -e "$REPOSITORY" || fail "the build failed; see above"
    cp "$COMMCOMP_VENV/commcomp-stamp" "$SANITIZED/commcomp-stamp"
fi

if [[ $# == 0 ]]; then
    set -- tests/checkpoint/codec tests/checkpoint/test_decoder.py tests/checkpoint/test_container.py \
        tests/checkpoint/fuzz
fi
# No leaks: Python leaves objects behind at its end by design. Null for too much memory, which tests ask for. Python's
# memory comes from malloc, which is watched; output below Python's is not captured, or a report would be lost.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export PYTHONMALLOC=malloc COMMCOMP_MUTATIONS="${COMMCOMP_MUTATIONS:-2000}"
# libstdc++ as well: Python itself does not have it, and exceptions are looked up in it at the start.
LD_PRELOAD="$LIBASAN $("$CXX" -print-file-name=libstdc++.so.6)" exec "$SANITIZED/bin/python" -m pytest -p no:faulthandler --capture=sys "$@"
