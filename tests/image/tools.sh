#!/bin/sh
# What builds and runs the image without an engine: from Debian, as root, where it is missing.
set -eu
missing=
need() { command -v "$1" >/dev/null || missing="$missing $2"; }
need buildah buildah
need podman podman
need runc runc
need catatonit catatonit
need debootstrap debootstrap
need nsenter util-linux
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
