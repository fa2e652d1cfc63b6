#!/bin/sh
# The programs that tests/deploy runs and .venv-deploy has not, where they are missing.
set -eu
cd "$(dirname "$0")"
command -v kubectl >/dev/null || { echo 'kubectl (1.27 or later) is needed, and Debian has none' >&2; exit 1; }
sh ../packages.sh promtool=prometheus nginx=nginx-light docker-compose=docker-compose npm=npm
cd crds
[ node_modules/.ready -nt package-lock.json ] || { npm ci --silent --no-audit --no-fund && touch node_modules/.ready; }
