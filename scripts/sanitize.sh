#!/usr/bin/env bash
# Runs the tests of what has unsafe code, the CPU engine, under AddressSanitizer, and those of its shared slices under
# Miri where that is installed. Needs a nightly toolchain and builds all dependencies once more.
#
#   scripts/sanitize.sh
#
# Exit code: 0 if nothing was found, 1 if something was, 2 without a nightly toolchain.
set -u
cd "$(dirname "$0")/.." || exit 1
case "${1:-}" in
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    "") ;;
    *) echo "sanitize.sh: unknown option $1" >&2; exit 2 ;;
esac

if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "sanitize.sh: no nightly toolchain, which the sanitizer needs; rustup toolchain install nightly --profile minimal" >&2
    exit 2
fi
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
result=0

# Leaks are those of the allocator's pools and of rayon's threads, which live as long as the process.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=0}
# A target given by name keeps the sanitizer away from build scripts and macros, which are loaded into the compiler.
asan=(env RUSTFLAGS=-Zsanitizer=address cargo +nightly test --target "$host" --target-dir target/sanitize
    --no-default-features --config profile.dev.opt-level=1)
"${asan[@]}" --lib cpu:: || result=1
"${asan[@]}" --test cpu_engine || result=1

if cargo +nightly miri --version >/dev/null 2>&1; then
    # Without SIMD, threads of other crates and files: what is left is the slice that threads share.
    cargo +nightly miri test --target-dir target/miri --no-default-features --lib cpu::shared || result=1
    miri="Miri passed what it can run"
else
    miri="Miri is not installed (rustup +nightly component add miri), so it did not run"
fi
if [ $result = 0 ]; then echo "sanitize.sh: PASSED: AddressSanitizer found nothing; $miri"; else echo "sanitize.sh: FAILED"; fi
exit $result
