# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts here: an environment with the locked build back end, and `pack` on the path.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/_venv.sh"
# An image or package made while this is set has nothing compiled, and every start pays for it.
unset PYTHONDONTWRITEBYTECODE
export ORT_DISABLE_TELEMETRY=1
# Debian puts some tools where only root looks.
export PATH=$PATH:/usr/sbin:/sbin

tools=$root/build/packaging/tools
need_tools() {
  local stamp=$tools/installed lock=$root/packaging/locks/tools.txt
  if ! cmp -s "$stamp" "$lock"; then
    say "installing the build back end"
    rm -rf "$tools"
    "$(find_python)" -m venv "$tools"
    "$tools/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r "$lock"
    cp "$lock" "$stamp"
  fi
}
# need_exactly COMMAND PACKAGE: as need_debian, but nothing goes on without it.
need_exactly() {
  need_debian "$1" "$2"
  command -v "$1" >/dev/null 2>&1 || { say "fedge: $1 is needed here; install $2"; exit 1; }
}
pack() { PYTHONPATH=$root/packaging "$tools/bin/python" "$@"; }
