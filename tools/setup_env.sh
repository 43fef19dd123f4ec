#!/bin/sh
# Makes .venv and installs purelm with the extras in $2 ("fast,report", ...) and the packages of the dependency group in
# $1 ("run", "dev"); both are in pyproject.toml. Safe to run again.
# VENV and CONSTRAINTS name another folder and another file of versions.
#
# The one thing pip gets wrong on its own: on a machine without a GPU, the default torch wheel brings several
# gigabytes of CUDA. So torch is installed first, pinned, and from the CPU index where there is no GPU.
set -eu
group=$1
extras=$2
venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || { echo "setup: needs Python 3.11, 3.12 or 3.13 on the PATH (or PYTHON=/path/to/python)" >&2; exit 2; }

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || {
    echo "setup: '$python -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 2
  }
fi
pip="$PWD/$venv/bin/python -m pip --disable-pip-version-check --quiet"

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  index=""
  if ! { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }; then
    cpu=https://download.pytorch.org/whl/cpu
    if "$venv/bin/python" -c "import urllib.request as u; u.urlopen('$cpu/torch/', timeout=10)" 2>/dev/null; then
      index="--extra-index-url $cpu"
    else
      echo "setup: no GPU here and $cpu is out of reach: torch comes from pip's own configuration" >&2
    fi
  fi
  echo "setup: installing torch into $venv"
  # shellcheck disable=SC2086
  $pip install -c "$constraints" $index torch
fi
echo "setup: installing purelm[$extras] and the group '$group' into $venv"
$pip install -c "$constraints" "pip>=25.1" "setuptools>=77" # the first pip that knows --group
# No build isolation: an isolated build would fetch its own copy of the build tools on every setup.
$pip install -c "$constraints" --no-build-isolation -e ".[$extras]" --group "$group"
