#!/bin/sh
# sh packages.sh COMMAND|FILE=PACKAGE...: Debian's packages of the commands and files that are missing here, installed as root.
set -eu
there() {
    case $1 in
        */*) [ -e "$1" ] ;; # a file, which need not be one to run
        *) command -v "$1" >/dev/null ;;
    esac
}
missing=
for pair in "$@"; do
    there "${pair%%=*}" || missing="$missing ${pair#*=}"
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
