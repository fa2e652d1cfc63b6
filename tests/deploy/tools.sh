#!/bin/sh
# The programs that tests/deploy runs and .venv-deploy has not: from Debian, as root, where they are missing.
set -eu
missing=
need() { command -v "$1" >/dev/null || missing="$missing $2"; }
need promtool prometheus
need amtool prometheus-alertmanager
need nginx nginx-light
need docker-compose docker-compose
need npm npm
command -v kubectl >/dev/null || { echo 'kubectl (1.27 or later) is needed, and Debian has none' >&2; exit 1; }
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086 - a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing
fi
cd "$(dirname "$0")/crds"
[ -d node_modules ] && [ node_modules -nt package-lock.json ] || npm ci --silent --no-audit --no-fund
