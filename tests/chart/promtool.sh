#!/bin/bash
# Puts promtool where the chart's tests look for it, out of Debian's package; nothing is installed.
set -euo pipefail
folder=${XDG_CACHE_HOME:-$HOME/.cache}/testbed/prometheus/bin
[[ -x $folder/promtool ]] && exit
part=$(mktemp -d)
trap 'rm -r "$part"' EXIT
cd "$part"
apt-get download -qq prometheus 2> /dev/null
dpkg-deb -x ./*.deb unpacked
mkdir -p "$folder"
mv unpacked/usr/bin/promtool "$folder/.promtool" && mv "$folder/.promtool" "$folder/promtool"
