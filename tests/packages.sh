#!/bin/sh
# sh packages.sh COMMAND=PACKAGE...: Debian's packages of the commands that are missing here, installed as root.
set -eu
missing=
for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null || missing="$missing ${pair#*=}"
done
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
