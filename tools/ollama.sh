#!/usr/bin/env bash
# Prints the path of an Ollama: the one on PATH, else one that is built here once and kept in the user's cache.
#
# 0.24.0 is the last version that plain Go builds whole, engine included; newer ones want CMake and llama.cpp's sources.
# What it is built from comes from wherever go, pip and apt are configured to get things. About 5 minutes on two cores,
# 57 MB. Exit: 0 with the path on stdout; 1 where the build failed, tried again included; 3 where it cannot be tried here.
set -euo pipefail

VERSION=0.24.0
MINIAUDIO=1.71
ATTEMPTS=3
PAUSE=20       # seconds between attempts
PATIENCE=3600  # seconds that one attempt may compile
DEBIAN="nlohmann-json3-dev libstb-dev"

say() { echo "ollama.sh: $*" >&2; }
cannot() { say "$*"; exit 3; }
runs() { [ -x "$1" ] && "$1" --version 2>&1 | grep -q "$VERSION"; }
has_headers() { "$CXX" -x c++ -E - <<<$'#include <nlohmann/json.hpp>\n#include <stb/stb_image.h>' >/dev/null 2>&1; }

# The module leaves out three headers of others, since they lie in a folder named `vendor`: two are Debian's, one pip's.
build() { # FOLDER FLAGS: leaves FOLDER/ollama
  # shellcheck disable=SC2086
  has_headers || { apt-get update -qq && apt-get install -y -qq $DEBIAN; } || return 1
  python3 -m pip download --quiet --no-deps --no-binary miniaudio --dest "$1" "miniaudio==$MINIAUDIO" || return 1
  tar -xzf "$1/miniaudio-$MINIAUDIO.tar.gz" -C "$1" --strip-components 1 || return 1
  CGO_ENABLED=1 CGO_CFLAGS="$2 '-I$1'" CGO_CXXFLAGS="$2 '-I$1'" CGO_CPPFLAGS="'-I$1'" GOBIN="$1" timeout "$PATIENCE" go install \
    -ldflags="-X github.com/ollama/ollama/version.Version=$VERSION" "github.com/ollama/ollama@v$VERSION" || return 1
  runs "$1/ollama"
}

if command -v ollama; then exit 0; fi
[ "$(uname -s)" = Linux ] || cannot "it is built on Linux only; get Ollama from https://ollama.com/download"
export CC="${CC:-cc}" CXX="${CXX:-c++}"
command -v "$CXX" >/dev/null || cannot "no C++ compiler ($CXX) is there. On Debian and Ubuntu: apt install g++"
flags="-O3 -march=native"
[ "$(uname -m)" != x86_64 ] || flags+=" -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"  # the module lacks AMX's file
# Machines that share a home: what the compiler makes of `native` tells their CPUs apart.
# shellcheck disable=SC2086
cpu=$("$CXX" $flags -x c++ -dM -E /dev/null | cksum | cut -d' ' -f1)
kept="${XDG_CACHE_HOME:-$HOME/.cache}/finetune/ollama/$VERSION-$cpu"
mkdir -p "${kept%/*}"
exec 9>"$kept.lock"
flock 9  # who comes second waits, and finds it built
if runs "$kept/ollama"; then
  echo "$kept/ollama"
  exit 0
fi
command -v go >/dev/null || cannot "no Go to build it with is there; 1.24 or newer will do: https://go.dev/dl"
go=$(go env GOVERSION)
printf '%s\n' go1.24 "$go" | sort -V -C || cannot "$go is too old to build it; 1.24 or newer will do"
if ! has_headers && { [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; }; then
  cannot "nlohmann/json.hpp or stb/stb_image.h is missing. On Debian and Ubuntu: apt install $DEBIAN"
fi

say "building Ollama $VERSION, once, into $kept"
partial="$kept.partial"
trap 'rm -rf "$partial"' EXIT
for attempt in $(seq "$ATTEMPTS"); do
  rm -rf "$partial"
  mkdir -p "$partial/whole"
  if build "$partial" "$flags" >"$partial/log" 2>&1; then
    rm -rf "$kept"
    mv "$partial/ollama" "$partial/whole/ollama"
    mv "$partial/whole" "$kept"  # whole or not at all
    echo "$kept/ollama"
    exit 0
  fi
  tail -n 20 "$partial/log" >&2
  say "attempt $attempt of $ATTEMPTS to build Ollama failed"
  [ "$attempt" = "$ATTEMPTS" ] || sleep "$PAUSE"
done
exit 1
