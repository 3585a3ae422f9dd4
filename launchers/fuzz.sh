#!/usr/bin/env bash
# Fuzzes what reads snapshots, with libFuzzer and sanitizers: bash launchers/fuzz.sh [seconds a target, 60]
#
# Targets: the native coders of floats, symbols and lattices, and the reader of whole files (Python, by atheris). They
# start from the kept corpus (tests/checkpoint/fuzz/corpus) and true data; what they find further stays in build/fuzz.
# At a finding it stops with the report; the input lies in build/fuzz/crash-*: mend, and put it into the kept corpus.
# `bash launchers/fuzz.sh keep` adds to that corpus what reaches more code, and records what each input gives.
# Needs clang++ (or CXX=another clang++) with its libFuzzer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

cd "$REPOSITORY"
CXX="${CXX:-clang++}"
command -v "$CXX" >/dev/null || fail "no $CXX; install it (Debian and Ubuntu: apt-get install clang) or name one in CXX"
setup_environment

SECONDS_EACH="${1:-60}"
FUZZ=tests/checkpoint/fuzz
BUILD=build/fuzz
mkdir -p "$BUILD"

# fuzz TARGET LARGEST COMMAND...: runs a target, or keeps of its inputs what is not above so many bytes.
fuzz() {
    local target="$1" largest="$2" kept="$FUZZ/corpus/$1" found="$BUILD/found/$1" seeds="$BUILD/seeds/$1"
    shift 2
    mkdir -p "$kept" "$found"
    if [[ "$SECONDS_EACH" == keep ]]; then
        "$@" -merge=1 -use_counters=0 -max_len="$largest" "$kept" "$seeds" "$found"
    else
        "$@" -max_total_time="$SECONDS_EACH" -timeout=20 -use_value_profile=1 -print_final_stats=1 \
            -artifact_prefix="$BUILD/" "$found" "$kept" "$seeds"
    fi
}

# compile NAME ARGUMENTS...: an object of the library that the targets share.
OBJECTS=()
compile() {
    local object="$BUILD/objects/$1.o"
    shift
    "$CXX" "${FLAGS[@]}" -fsanitize=fuzzer-no-link -c "$@" -o "$object"
    OBJECTS+=("$object")
}

"$PYTHON" -m tests.checkpoint.fuzz.seeds "$BUILD/seeds"
mkdir -p "$BUILD/objects"
X86=
[[ "$(uname -m)" != x86_64 ]] || X86=yes
FLAGS=(-std=c++17 -O2 -g -fno-omit-frame-pointer -ffp-contract=off -D_GLIBCXX_ASSERTIONS -DCOMMCOMP_WATCH_BUFFERS
    -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all ${X86:+-DCOMMCOMP_X86})
for source in commcomp/native/checkpoint/*.cpp; do
    name="$(basename "$source" .cpp)"
    case "$name" in
        module) ;; # the Python binding
        *_kernels)
            compile "$name-plain" "$source" -DKERNELS=plain
            [[ -z "$X86" ]] || compile "$name-avx2" "$source" -DKERNELS=avx2 -mavx2
            ;;
        *) compile "$name" "$source" ;;
    esac
done
for target in floats symbols lattices; do
    "$CXX" "${FLAGS[@]}" -fsanitize=fuzzer -Icommcomp/native/checkpoint "$FUZZ/$target.cpp" "${OBJECTS[@]}" \
        -o "$BUILD/$target"
    fuzz "$target" 300 "$BUILD/$target"
done
if [[ -d "$BUILD/atheris" ]] || "$PYTHON" -m pip install -qq --target "$BUILD/atheris" atheris; then
    PYTHONPATH="$BUILD/atheris" fuzz files 4000 "$PYTHON" -m tests.checkpoint.fuzz.fuzz_files
else
    echo "atheris cannot be installed here: files are not fuzzed" >&2
fi
if [[ "$SECONDS_EACH" == keep ]]; then
    "$PYTHON" -m tests.checkpoint.fuzz.replay
fi
