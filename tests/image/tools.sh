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
    apt-get update -qq
    # shellcheck disable=SC2086 - a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing
fi
