#!/bin/sh
# The programs that tests/deploy runs and .venv-deploy has not: from Debian, as root, where they are missing.
set -eu
missing=
need() { command -v "$1" >/dev/null || missing="$missing $2"; }
need promtool prometheus
need nginx nginx-light
need docker-compose docker-compose
need npm npm
command -v kubectl >/dev/null || { echo 'kubectl (1.27 or later) is needed, and Debian has none' >&2; exit 1; }
if [ -n "$missing" ]; then
    # Debian starts what it installs, which nobody asked for here.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    apt-get update -qq
    # shellcheck disable=SC2086 - a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing
fi
cd "$(dirname "$0")/crds"
[ node_modules/.ready -nt package-lock.json ] || { npm ci --silent --no-audit --no-fund && touch node_modules/.ready; }
