#!/bin/bash
# Builds an image of Debian packages and what they depend on, on the base and in the store of build-image.sh.
#
#   debian-image.sh NAME:TAG OUT PACKAGE ... [-- ENTRYPOINT ...]
#
# The image names no user: a pod may run it as any.
set -euo pipefail

name=$1 out=$2
shift 2
packages=()
while (($#)) && [[ $1 != -- ]]; do
  packages+=("$1")
  shift
done

context=$(mktemp -d)
trap 'rm -r "$context"' EXIT
# policy-rc.d: a package must not start its service while it is installed.
cat > "$context/Dockerfile" << END
FROM python:3.13-slim
RUN printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d \\
 && apt-get update -qq \\
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ${packages[*]} \\
 && rm -rf /usr/sbin/policy-rc.d /var/lib/apt/lists/* /var/cache/apt/*
END
if (($# > 1)); then
  python3 -c 'import json, sys; print("ENTRYPOINT", json.dumps(sys.argv[1:]))' "${@:2}" >> "$context/Dockerfile"
fi
"$(dirname "$0")/build-image.sh" "$name" "$out" "$context"
