#!/usr/bin/env bash
# Holds every kernel, variant and weight format against the compilers of other machines, without those machines.
#
#   scripts/check-portability.sh                       all legs
#   scripts/check-portability.sh --legs naga,tint      these only
#   scripts/check-portability.sh --install             fetches what the legs lack (apt, npm) first
#   scripts/check-portability.sh --limit 50            of each leg 50 kernels, evenly spread
#   scripts/check-portability.sh --json FILE           the results as JSON, too
#
#   naga    naga's validation, and barriers in uniform control flow (wgmoe lint)
#   tint    Tint, the WGSL compiler of Chromium's browsers (npm package webgpu)
#   spirv   spirv-val on naga's SPIR-V
#   msl     clang++ with a stand-in for Apple's header on naga's MSL: types only
#   dxc     Microsoft's DXC under Wine on naga's HLSL
#   fxc     Microsoft's FXC under Wine on naga's HLSL, without kernels that need what it lacks
#
# Kernels that a tool has accepted are not shown to it again (target/portability/accepted). Each leg is also given
# faulty kernels, which it has to refuse.
#
# Exit code: 0 if all was accepted, 1 if something was refused or a leg could not run, 2 for unknown options.
set -u
cd "$(dirname "$0")/.." || exit 1
case " $* " in *" --help "* | *" -h "*) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
command -v python3 >/dev/null || { echo "check-portability.sh: python3 is missing" >&2; exit 1; }
target=${CARGO_TARGET_DIR:-target}
if [ -z "${WGMOE:-}" ]; then
    cargo build --release --quiet --bin wgmoe || exit 1
    WGMOE=$target/release/wgmoe
fi
exec python3 scripts/portability/check.py --wgmoe "$WGMOE" --work "$target/portability" "$@"
