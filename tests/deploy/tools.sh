#!/bin/sh
# The programs that tests/deploy runs and .venv-deploy has not, where they are missing.
set -eu
cd "$(dirname "$0")"
minor=$(kubectl version --client -o json 2>/dev/null | sed -n 's/.*"minor": "\([0-9]*\).*/\1/p')
[ "${minor:-0}" -ge 27 ] || { echo 'kubectl 1.27 or later is needed, and Debian has none' >&2; exit 1; }
sh ../packages.sh promtool=prometheus nginx=nginx-light docker-compose=docker-compose npm=npm
cd crds
[ node_modules/.ready -nt package-lock.json ] || { npm ci --silent --no-audit --no-fund && touch node_modules/.ready; }
