#!/usr/bin/env bash
# Holds every dependency to deny.toml: known vulnerabilities, licences, two versions of one crate, where they come from.
# Installs cargo-deny from crates.io if it is missing, which takes minutes (8 on two busy cores), so that .ci/run leaves it out.
#
#   scripts/check-supply-chain.sh             all checks
#   scripts/check-supply-chain.sh --offline   without the database of vulnerabilities, and says so
#
# Exit code: 0 if all passed, 1 if something is wrong, 2 if a check could not be made (no cargo-deny, no database).
set -u
cd "$(dirname "$0")/.." || exit 1

offline=no
for option in "$@"; do
    case "$option" in
        --offline) offline=yes ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "check-supply-chain.sh: unknown option $option; there is: --offline" >&2; exit 2 ;;
    esac
done

if ! command -v cargo-deny >/dev/null; then
    echo "Installing cargo-deny."
    started=$SECONDS
    cargo install --quiet --locked cargo-deny || {
        echo "check-supply-chain.sh: NOT CHECKED: cargo-deny is missing and could not be installed" >&2
        exit 2
    }
    echo "It took $((SECONDS - started)) s."
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
fi

result=0
# Quiet about what is right.
cargo deny --locked --log-level error check licenses bans sources || result=1

advisories="vulnerabilities NOT CHECKED (--offline)"
if [ "$offline" = no ]; then
    # Fetching and checking apart: a database that cannot be reached is no vulnerability, and no pass.
    if cargo deny --locked --log-level error fetch db; then
        advisories="no known vulnerability"
        cargo deny --locked --log-level error check --disable-fetch advisories || {
            result=1
            advisories="VULNERABILITIES"
        }
    else
        echo "check-supply-chain.sh: the database of vulnerabilities could not be fetched (github.com)" >&2
        advisories="vulnerabilities NOT CHECKED, as the database could not be fetched"
        [ $result = 0 ] && result=2
    fi
fi
case $result in
    0) echo "check-supply-chain.sh: PASSED: licences, duplicates, sources; $advisories" ;;
    1) echo "check-supply-chain.sh: FAILED; $advisories" ;;
    2) echo "check-supply-chain.sh: INCOMPLETE: licences, duplicates and sources passed; $advisories" ;;
esac
exit $result
