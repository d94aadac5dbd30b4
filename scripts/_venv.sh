# SPDX-License-Identifier: Apache-2.0
# Sourced by scripts/demo, scripts/test and scripts/check: makes the virtual environment `.venv` in the
# checkout and installs what the caller names. An environment that already holds it is used as it is.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${FEDGE_VENV:-$root/.venv}

say() { printf '%s\n' "$*" >&2; }

# The newest thing that can be wrong on a fresh machine is its Python: say so before anything else.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    printf '%s\n' "$candidate"
    return
  done
  say "fedge: expected Python 3.11 or newer with the venv module, found none; install python3-venv"
  exit 1
}

# need_packages NAME PIP-ARGUMENTS...: install once per environment and pyproject.toml.
need_packages() {
  local name=$1 python stamp wanted
  shift
  python=$(find_python)
  wanted=$("$python" -c 'import hashlib, sys
print(sys.version, sys.argv[1:], hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())' "$@")
  stamp=$venv/installed-$name
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
  if [ ! -x "$venv/bin/python" ]; then
    say "making the virtual environment ${venv#"$root"/}"
    "$python" -m venv "$venv"
  fi
  say "installing $name (once; a few minutes on a slow line)"
  # Dependency groups need pip 25.1; older distributions bring an older one.
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
  "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"
  read_from_disk
  printf '%s\n' "$wanted" >"$stamp"
}

# Libraries that pip has just written stand in the page cache in large pieces, and the kernel maps more of those into
# a process than of libraries read from disk, as after a boot. Let go of them, so that memory measured here is a board's.
read_from_disk() {
  sync
  "$venv/bin/python" -I -S - "$venv" <<'PYTHON'
import os, pathlib, sys
for library in pathlib.Path(sys.argv[1]).rglob("*.so*"):
    with library.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
PYTHON
}

# need_debian COMMAND PACKAGE: install a Debian package where its command is missing and apt may be used.
need_debian() {
  command -v "$1" >/dev/null 2>&1 && return
  local sudo=
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  if ! command -v apt-get >/dev/null 2>&1 || ! $sudo true 2>/dev/null; then
    say "fedge: $1 is missing and apt may not be used here; the tests that need it will skip"
    return
  fi
  say "installing $2"
  $sudo apt-get update -qq >/dev/null 2>&1 || true
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$2" >/dev/null 2>&1 ||
    say "fedge: $2 could not be installed; the tests that need $1 will skip"
}

# need_tflite: tflite-runtime 2.14, whose last wheels are for Python 3.11 and numpy below 2, in an environment of its own.
# Names its Python in FEDGE_TFLITE_PYTHON; where it cannot be had, the tests that need it skip.
need_tflite() {
  [ -z "${FEDGE_TFLITE_PYTHON:-}" ] || return 0
  local made=$root/build/rivals/tflite
  if [ ! -f "$made/installed" ] && command -v python3.11 >/dev/null 2>&1; then
    say "installing tflite-runtime"
    python3.11 -m venv "$made" &&
      "$made/bin/python" -m pip install --quiet --disable-pip-version-check 'tflite-runtime==2.14.0' 'numpy<2' &&
      touch "$made/installed" || say "fedge: tflite-runtime could not be installed; the tests that need it will skip"
  fi
  [ ! -f "$made/installed" ] || export FEDGE_TFLITE_PYTHON=$made/bin/python
}
