#!/usr/bin/env bash
# What takes too long for every change: 12,000 generated cases, 1,000 runs of every variant, integers bit by bit and
# 100,000 rows of logits through router and permute, 100,000 passes in a row, and the tests of whole layers with all limits,
# with nothing that is optional, and on SwiftShader; on the device that WGMOE_ADAPTER names, or the best there is.
#
#   scripts/nightly.sh               with another seed for the cases each day, which it prints
#   scripts/nightly.sh --seed 7      with this one
#   scripts/nightly.sh --cases 1500 --runs 100 --rows 10000 --passes 2000
#                                    less of everything
#   scripts/nightly.sh --results DIR keeps the results as JSON there
#
# Exit code: 0 if everything was right, 1 if something was wrong, 2 for options that cannot be used.
set -u
cd "$(dirname "$0")/.." || exit 1

seed=$(date +%Y%m%d) cases=12000 runs=1000 rows=100000 passes=100000 results=
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --seed | --cases | --runs | --rows | --passes)
            case "${2:-}" in
                '' | *[!0-9]*) echo "nightly.sh: $1 needs a number" >&2; exit 2 ;;
            esac
            printf -v "${1#--}" '%s' "$2" ;;
        --results)
            [ -n "${2:-}" ] || { echo "nightly.sh: $1 needs a folder" >&2; exit 2; }
            results=$2 ;;
        *) echo "nightly.sh: unknown option $1; there are: --seed, --cases, --runs, --rows, --passes, --results" >&2; exit 2 ;;
    esac
    shift 2
done

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
results=${results:-$work}
mkdir -p "$results" || exit 1
if [ -z "${XDG_RUNTIME_DIR:-}" ]; then
    mkdir -m 700 "$work/runtime"
    export XDG_RUNTIME_DIR="$work/runtime"
fi

cargo build --release || exit 1
wgmoe=$PWD/${CARGO_TARGET_DIR:-target}/release/wgmoe
case "${CARGO_TARGET_DIR:-}" in /*) wgmoe=$CARGO_TARGET_DIR/release/wgmoe ;; esac

summary=() failed=0
# part NAME COMMAND...: one part, a line of the summary.
part() {
    local name=$1 begun=$SECONDS verdict=passed
    shift
    printf '\n=== %s: %s\n' "$name" "$*"
    "$@" </dev/null || { verdict=FAILED; failed=$((failed + 1)); }
    summary+=("$(printf '%-12s %-6s %6d s   %s' "$name" "$verdict" $((SECONDS - begun)) "$*")")
}

# check NAME OPTION...: the part that is `wgmoe check OPTION...`.
check() {
    local name=$1
    shift
    part "$name" "$wgmoe" check "$@" --json "$results/$name.json"
}

check cases --cases "$cases" --seed "$seed"
check determinism --determinism --runs "$runs"
check exact --exact
check rows --rows "$rows"

# glibc keeps what it once needed; with this, it gives memory back, and what is measured is what is in use.
part soak env MALLOC_MMAP_THRESHOLD_=65536 "$wgmoe" soak --forwards "$passes" --json "$results/soak.json"
layers=(cargo test --release --no-fail-fast --test golden --test layer)
part all-limits env WGMOE_LIMITS=adapter "${layers[@]}"
part withheld env WGMOE_WITHHOLD=subgroups,timestamps,int64 "${layers[@]}"
icd=$(ls /usr/lib/chromium/vk_swiftshader_icd.json /usr/lib/chromium-browser/vk_swiftshader_icd.json 2>/dev/null | head -n 1)
if [ -n "$icd" ]; then
    part swiftshader env -u WGMOE_ADAPTER WGMOE_EXPECT_ADAPTER=SwiftShader "VK_DRIVER_FILES=$icd" "VK_ICD_FILENAMES=$icd" \
        "${layers[@]}"
else
    summary+=("swiftshader  NOT RUN: no chromium here, which brings it")
fi

printf '\n'
printf '%s\n' "${summary[@]}"
if [ "$failed" = 0 ]; then
    echo "nightly.sh: PASSED, $SECONDS s"
else
    echo "nightly.sh: FAILED: $failed parts, $SECONDS s"
    exit 1
fi
