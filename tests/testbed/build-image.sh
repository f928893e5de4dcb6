#!/bin/bash
# Builds a Dockerfile of the project into an archive that `cluster.py --image` takes,
# without a registry: what `FROM python:3.13-slim` names is made here from Debian's packages.
#
#   build-image.sh [--torch] NAME:TAG OUT CONTEXT [option of `buildah build` ...]
#
# OUT: a Docker archive, NAME.tar, or else an OCI layout, a folder that several images may share.
#
# With --torch the build argument BASE names a second base that already holds Debian's CPU build of
# torch and torchvision: a Dockerfile that begins `ARG BASE` / `FROM ${BASE}` and installs into a virtual
# environment with --system-site-packages then needs no CUDA, on a GPU cluster's base it keeps that one's.
#
# Needs root. Layers and base images are kept in ~/.cache/testbed.
set -euo pipefail

base=docker.io/library/python:3.13-slim extra=
if [[ $1 == --torch ]]; then
  base=testbed.local/python-torch:3.13 extra=,python3-torch,python3-torchvision
  shift
fi
name=$1 out=$2 context=$3
shift 3

SUITE=trixie # the Debian release of python:3.13-slim; its own Python is 3.13 too
PACKAGES=(buildah ca-certificates mmdebstrap)

log() { echo "build-image: $*" >&2; }

missing=()
for package in "${PACKAGES[@]}"; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null | grep -q '^installed' || missing+=("$package")
done
if ((${#missing[@]})); then
  log "installing ${missing[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi

export STORAGE_DRIVER=overlay BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$store/storage" --runroot "$store/run" "$@"; }

make_base() {
  local archive container tar=$store/base.tar
  # Debian's archive and the certificates, both as this machine has them
  archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/*$')
  mmdebstrap --quiet --mode=root --variant=minbase --format=tar \
    --include=ca-certificates,python3,python3-pip,python3-venv,python-is-python3$extra \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --customize-hook='rm "$1"/usr/lib/python3.*/EXTERNALLY-MANAGED' \
    --customize-hook='cp /etc/ssl/certs/ca-certificates.crt "$1"/etc/ssl/certs/' \
    --customize-hook='printf "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n" > "$1"/etc/pip.conf' \
    "$SUITE" "$tar" "deb $archive $SUITE main" >&2
  container=$(buildah from scratch)
  buildah add -q "$container" "$tar" / > /dev/null
  buildah config --cmd python3 --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit -q --rm "$container" "$base" > /dev/null
  rm "$tar"
}

# Before each RUN buildah copies itself into sealed memory. The kernel refuses the seal with EBUSY while
# something else, such as its own compaction on a busy machine, holds one of the pages: gone a moment later,
# but the build has failed. Finished layers are kept, so another attempt goes on where this one stopped.
ATTEMPTS=4
build() {
  local name=$1 attempt said=$work/build.log
  shift
  for ((attempt = 1; ; attempt++)); do
    if buildah build --pull-never --network host --layers --build-arg "BASE=$base" -t "$name" "$@" 2>&1 | tee "$said" >&2; then
      return
    fi
    if ((attempt == ATTEMPTS)) || ! grep -q 'sealing memfd copy: Device or resource busy' "$said"; then
      return 1
    fi
    log "the kernel would not seal buildah's copy of itself: attempt $((attempt + 1)) of $ATTEMPTS"
    sleep "$attempt"
  done
}
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# A store of its own for each way to make a base.
store=${XDG_CACHE_HOME:-$HOME/.cache}/testbed/buildah-$( (echo "$SUITE"; declare -f make_base) | sha256sum | cut -c1-16)
mkdir -p "$store"
if [[ -z $(buildah images -q "$base" 2> /dev/null) ]]; then
  log "base image $base"
  make_base
fi
log "$name"
build "$name" "$@" "$context"
if [[ $out == *.tar ]]; then
  rm -f "$out"
  buildah push -q "$name" "docker-archive:$out:$name" >&2
else
  buildah push -q --compression-format zstd --compression-level 1 "$name" "oci:$out:$name" >&2
fi
