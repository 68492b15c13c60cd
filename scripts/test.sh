#!/usr/bin/env bash
# Runs every test. Works from a fresh clone on a machine without a GPU: there, Mesa's lavapipe is the Vulkan driver.
#
#   scripts/test.sh                  all tests on the adapters found, then without any driver
#   scripts/test.sh --swiftshader    installs SwiftShader (chromium) if it is missing: a second software driver, and the
#                                    browser that pages are opened in
#   scripts/test.sh --candle         also builds and runs examples/candle_block: some minutes, for candle
#
# WGMOE_REQUIRE_ADAPTER=0 scripts/test.sh goes on where there is no adapter. Without it, that is a failure:
# tests that silently skip every kernel would pass.
#
# Exit code: 0 if everything passed, 1 if something failed, 2 for unknown options.
set -u
cd "$(dirname "$0")/.." || exit 1

install_swiftshader=no
with_candle=no
for option in "$@"; do
    case "$option" in
        --swiftshader) install_swiftshader=yes ;;
        --candle) with_candle=yes ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "test.sh: unknown option $option; there are: --swiftshader, --candle" >&2; exit 2 ;;
    esac
done

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
# The Vulkan loader and Mesa complain on standard error without it.
if [ -z "${XDG_RUNTIME_DIR:-}" ]; then
    mkdir -m 700 "$work/runtime"
    export XDG_RUNTIME_DIR="$work/runtime"
fi

export WGMOE_REQUIRE_ADAPTER="${WGMOE_REQUIRE_ADAPTER:-1}"
[ "$WGMOE_REQUIRE_ADAPTER" = 1 ] || unset WGMOE_REQUIRE_ADAPTER

# --- steps and their summary

num_passed=0
failed=()
started=$SECONDS

# step NAME COMMAND...: runs the command; a failure is noted and does not stop the others. No step may take longer
# than half an hour, and none reads from the terminal.
step() {
    local name=$1 begun=$SECONDS limit=()
    shift
    printf '\n=== %s\n' "$name"
    if command -v timeout >/dev/null && [ "$(type -t "$1")" = file ]; then limit=(timeout 1800); fi
    # An empty array is "unbound" to the bash that macOS has.
    if ${limit[@]+"${limit[@]}"} "$@" </dev/null; then
        num_passed=$((num_passed + 1))
        printf '=== %s: passed in %d s\n' "$name" $((SECONDS - begun))
    else
        failed+=("$name")
        printf '=== %s: FAILED after %d s\n' "$name" $((SECONDS - begun))
        return 1
    fi
}

summary() {
    local took="$num_passed steps passed on ${devices:-no device}, $((SECONDS - started)) s"
    printf '\n'
    if [ ${#failed[@]} -eq 0 ]; then
        echo "test.sh: PASSED: $took"
        exit 0
    fi
    local list
    printf -v list '%s; ' "${failed[@]}"
    echo "test.sh: FAILED: ${#failed[@]} failed (${list%; }), $took"
    exit 1
}

# --- drivers

# apt_install PACKAGE...: on Debian and Ubuntu, as root or through a sudo that asks nothing.
apt_install() {
    command -v apt-get >/dev/null || return 1
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    local get=(${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get -qq)
    # Package lists may be too old, or not there at all.
    { "${get[@]}" install -y --no-install-recommends "$@" || {
        "${get[@]}" update && "${get[@]}" install -y --no-install-recommends "$@"
    }; } </dev/null >"$work/apt.log" 2>&1 || { tail -n 5 "$work/apt.log"; return 1; }
}

has_vulkan() {
    if [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ]; then return 0; fi # somebody has chosen
    ls /usr/share/vulkan/icd.d/*.json /usr/local/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json 2>/dev/null |
        grep -q . && { ldconfig -p 2>/dev/null || /sbin/ldconfig -p; } | grep -q 'libvulkan\.so\.1'
}

if [ "$(uname -s)" = Linux ] && ! has_vulkan; then
    echo "No Vulkan driver here; installing lavapipe (mesa-vulkan-drivers)."
    apt_install mesa-vulkan-drivers libvulkan1 ||
        echo "That did not work. Install a Vulkan driver, for example the package mesa-vulkan-drivers (Debian, Ubuntu," \
            "Fedora) or vulkan-swrast (Arch)."
fi

swiftshader_icd() {
    ls /usr/lib/chromium/vk_swiftshader_icd.json /usr/lib/chromium-browser/vk_swiftshader_icd.json 2>/dev/null | head -n 1
}

if [ "$install_swiftshader" = yes ] && [ -z "$(swiftshader_icd)" ]; then
    echo "Installing SwiftShader (chromium)."
    apt_install chromium || failed+=("installing chromium")
fi
# Chromium brings SwiftShader, and is the browser that tests open pages in. Where it was asked for, it has to be there.
if [ "$install_swiftshader" = yes ]; then export WGMOE_REQUIRE_BROWSER=1; fi

# --- on the adapters that there are

# Names of all adapters in one line.
adapter_names() {
    "$wgmoe" info --json - 2>/dev/null |
        sed -n '/"cpu_engine"/q; s/^ *"name": "\(.*\)",$/\1/p' | grep -vxE 'tiled|subgroup|vec' | paste -sd+ - | sed 's/+/ + /g'
}

step "build" cargo build --release || summary
wgmoe=$PWD/${CARGO_TARGET_DIR:-target}/release/wgmoe
case "${CARGO_TARGET_DIR:-}" in /*) wgmoe=$CARGO_TARGET_DIR/release/wgmoe ;; esac
step "devices" "$wgmoe" info
devices=$(adapter_names)
if [ -z "$devices" ]; then
    if [ -n "${WGMOE_REQUIRE_ADAPTER:-}" ]; then
        failed+=("no adapter; WGMOE_REQUIRE_ADAPTER=0 tests without one")
        summary
    fi
    devices="the CPU engine only"
fi

step "unit, integration and doc tests" cargo test --release --no-fail-fast

# Compiling some thousand kernels keeps one core busy for minutes: beside the steps that follow, which keep another.
timeout=$(command -v timeout)
${timeout:+"$timeout" 1800} "$wgmoe" check >"$work/check.txt" 2>&1 </dev/null &
checking=$!
trap 'kill "$checking" 2>/dev/null; rm -rf "$work"' EXIT
checked() {
    local code
    wait "$checking"
    code=$?
    cat "$work/check.txt"
    return $code
}

step "benches, each run once" cargo test --release --no-fail-fast --benches
if command -v python3 >/dev/null; then
    step "comparison with peers: self-test" python3 benches/peers/compare.py --self-test
else
    printf '\n=== comparison with peers: no python3, so its self-test is left out\n'
fi
step "example hello_moe" cargo run --release --quiet --example hello_moe
step "example bring_your_own_device" cargo run --release --quiet --example bring_your_own_device
for example in adaptive_mixture hierarchical_mixture switch_transformer gshard_turing mixture_of_denoisers; do
    step "example $example" cargo run --release --quiet --example "$example"
done
if [ "$with_candle" = yes ]; then
    # A package of its own, which shares what is built.
    step "example candle_block" cargo run --release --quiet --manifest-path examples/candle_block/Cargo.toml \
        --target-dir "${CARGO_TARGET_DIR:-target}"
else
    printf '\n=== example candle_block: left out; scripts/test.sh --candle builds it\n'
fi
step "wgmoe check: golden files" "$wgmoe" check tests/golden
step "wgmoe families" "$wgmoe" families

# --- on a second software driver: other subgroup size, no f16, other compiler

swiftshader=$(swiftshader_icd)
if [ -n "$swiftshader" ]; then
    devices="$devices + SwiftShader"
    on_swiftshader=(env -u WGMOE_ADAPTER WGMOE_EXPECT_ADAPTER=SwiftShader
        "VK_DRIVER_FILES=$swiftshader" "VK_ICD_FILENAMES=$swiftshader")
    suites=()
    for suite in golden layer; do
        [ -f "tests/$suite.rs" ] && suites+=(--test "$suite")
    done
    # What takes SwiftShader minutes, the first driver has run; scripts/nightly.sh runs it here, too.
    long=()
    for name in large_batches_repeat_the_small_one every_case_matches_the_reference_in_every_variant \
        a_tokens_bits_do_not_depend_on_its_batch tile_sizes_of_other_devices_match_the_reference; do
        long+=(--skip "$name")
    done
    step "SwiftShader: tests, without the long ones" "${on_swiftshader[@]}" cargo test --release --no-fail-fast \
        "${suites[@]}" -- "${long[@]}"
    step "SwiftShader: golden files" "${on_swiftshader[@]}" "$wgmoe" check tests/golden
else
    printf '\nNo SwiftShader (chromium) here, so it is left out, and pages were opened in a browser only if there is another; scripts/test.sh --swiftshader installs it.\n'
fi

step "wgmoe check: kernels" checked

# --- without any driver: the embedded CPU engine has to take over, and say so

without_driver=(env -u WGMOE_REQUIRE_ADAPTER -u WGMOE_EXPECT_ADAPTER -u WGMOE_ADAPTER -u VK_ADD_DRIVER_FILES
    VK_DRIVER_FILES=/nonexistent/driver.json VK_ICD_FILENAMES=/nonexistent/driver.json)

bench_without_driver() {
    "${without_driver[@]}" "$wgmoe" bench --hidden 256 --intermediate 128 --experts 8 --top-k 2 --tokens 1,16,64 --runs 5 |
        tee "$work/bench.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || return 1
    grep -q "embedded CPU engine" "$work/bench.txt" || { echo "bench does not name the embedded CPU engine"; return 1; }
}

if [ "$(uname -s)" = Linux ]; then
    devices="$devices + no driver"
    step "no driver: bench" bench_without_driver
    step "no driver: check, kernels" "${without_driver[@]}" "$wgmoe" check
    step "no driver: check, integers" "${without_driver[@]}" "$wgmoe" check --exact
    step "no driver: check, golden files" "${without_driver[@]}" "$wgmoe" check tests/golden
    step "no driver: hello_moe" "${without_driver[@]}" cargo run --release --quiet --example hello_moe
    step "no driver: bring_your_own_device" \
        "${without_driver[@]}" cargo run --release --quiet --example bring_your_own_device
fi

summary
