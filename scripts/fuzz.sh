#!/usr/bin/env bash
# Fuzzes every reader of files, and the plan, for a fixed time each. Needs a nightly toolchain and a C++ compiler.
#
#   scripts/fuzz.sh [SECONDS]            each target for 60 seconds, or as many as given
#   scripts/fuzz.sh SECONDS TARGET...    only these
#   scripts/fuzz.sh --replay FILE TARGET runs one file, for example what broke a target
#
# Starts from fuzz/corpus/TARGET, which is part of the repository, and from what earlier runs found, which is kept in
# fuzz/found/TARGET and is not. What breaks a target goes to fuzz/broken/. WGMOE_FUZZ_JOBS=N runs N targets at a time.
#
# Exit code: 0 if nothing broke, 1 if something did, 2 without a toolchain or for unknown options.
set -u
cd "$(dirname "$0")/.." || exit 1

case "${1:-}" in -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
replay=
if [ "${1:-}" = --replay ]; then
    replay=${2:-}
    [ -f "$replay" ] && [ $# = 3 ] || { echo "fuzz.sh: --replay takes a file and a target" >&2; exit 2; }
    shift 2
    set -- 1 "$1"
fi
seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "fuzz.sh: $seconds is no number of seconds" >&2; exit 2; }
[ $# -gt 0 ] && shift

if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "fuzz.sh: no nightly toolchain, which instruments the code; rustup toolchain install nightly --profile minimal" >&2
    exit 2
fi

mapfile -t all < <(sed -n 's/.*Target { name: "\([a-z]*\)".*/\1/p' fuzz/src/lib.rs)
targets=("$@")
[ $# -gt 0 ] || targets=("${all[@]}")
for target in "${targets[@]}"; do
    [[ " ${all[*]} " == *" $target "* ]] || { echo "fuzz.sh: no target $target; there are ${all[*]}" >&2; exit 2; }
done

host=$(rustc +nightly -vV | sed -n 's/^host: //p')
# What libFuzzer needs of the compiler. Overflow and debug assertions are on, by the package's profile. The readers have
# no unsafe code of their own, so that an address sanitizer would cost half of the speed and find nothing.
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
echo "Building the targets."
# A target given by name keeps these flags away from build scripts.
RUSTFLAGS=$(echo $flags) cargo +nightly build --quiet --release --manifest-path fuzz/Cargo.toml --features libfuzzer \
    --target "$host" --bin fuzz || exit 1
program=$PWD/fuzz/target/$host/release/fuzz
mkdir -p fuzz/broken
# Readers take files, which are in memory where there is such a folder.
work=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d) || exit 1
export TMPDIR=$work
trap 'rm -rf "$work"' EXIT

if [ -n "$replay" ]; then
    WGMOE_FUZZ_TARGET=${targets[0]} "$program" "$replay"
    exit
fi

# run TARGET: an input of more than 64 KiB or 10 s, or more than 1 GiB, is a failure too.
run() {
    local more=()
    # Files of the repository that are what the target reads.
    case $1 in family) more=(src/model/families) ;; results) more=(tests/results) ;; esac
    mkdir -p "fuzz/found/$1" "fuzz/corpus/$1"
    WGMOE_FUZZ_TARGET=$1 "$program" "fuzz/found/$1" "fuzz/corpus/$1" ${more[@]+"${more[@]}"} \
        -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=256 -print_final_stats=1 \
        -artifact_prefix="fuzz/broken/$1-" >"$work/$1.log" 2>&1
    echo $? >"$work/$1.exit"
}

running=0
for target in "${targets[@]}"; do
    run "$target" &
    running=$((running + 1))
    if [ "$running" -ge "${WGMOE_FUZZ_JOBS:-1}" ]; then
        wait -n
        running=$((running - 1))
    fi
done
wait

printf '\n%-12s %12s %10s %8s %8s  %s\n' target executions per_second MiB inputs result
broken=0
total=0
for target in "${targets[@]}"; do
    log=$work/$target.log
    stat() { sed -n "s/^stat::$1: *//p" "$log" | tail -n 1; }
    executions=$(stat number_of_executed_units)
    result="nothing broke"
    if [ "$(cat "$work/$target.exit")" != 0 ]; then
        broken=1
        result="BROKEN: $(grep -m 1 -E 'panicked at|ERROR: libFuzzer|SUMMARY' "$log")"
        grep -A 12 -m 1 -E 'panicked at|ERROR' "$log" >&2
        tail -n 3 "$log" >&2
    fi
    total=$((total + ${executions:-0}))
    printf '%-12s %12s %10s %8s %8s  %s\n' "$target" "${executions:-?}" "$(stat average_exec_per_sec)" \
        "$(stat peak_rss_mb)" "$(find "fuzz/found/$target" "fuzz/corpus/$target" -type f | wc -l)" "$result"
done
printf '%-12s %12s\n' all "$total"
exit $broken
