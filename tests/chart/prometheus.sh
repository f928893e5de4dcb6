#!/bin/bash
# Puts Prometheus and promtool where the chart's tests look for them, out of Debian's package; nothing
# is installed.
set -euo pipefail
folder=${XDG_CACHE_HOME:-$HOME/.cache}/testbed/prometheus/bin
[[ -x $folder/prometheus && -x $folder/promtool ]] && exit
part=$(mktemp -d)
trap 'rm -r "$part"' EXIT
cd "$part"
apt-get download -qq prometheus 2> /dev/null
dpkg-deb -x ./*.deb unpacked
mkdir -p "$folder"
for program in promtool prometheus; do
  mv "unpacked/usr/bin/$program" "$folder/.$program" && mv "$folder/.$program" "$folder/$program"
done
