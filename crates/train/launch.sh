#!/bin/sh
# moe-lab with the torch engine: gives moe-lab-torch, which lies beside this file, the libraries of the installed torch, and says what to do where
# there is none or another release. PYTHON names the Python whose torch is meant; without it the one of this folder, then python3.
needs=2.11.0
here=$(dirname "$(readlink -f "$0")")
python=${PYTHON:-$here/python}
command -v "$python" >/dev/null 2>&1 || python=python3
torch=$("$python" -c 'from importlib.util import find_spec as f; s = f("torch"); print(s.submodule_search_locations[0] if s else "")' 2>/dev/null)
remedy="$python -m pip install torch==$needs, or use a moe-lab without the torch engine"
if [ ! -f "$torch/lib/libtorch_cpu.so" ]; then
  echo "error: this build of moe-lab needs torch $needs, which $python does not have; $remedy" >&2
  exit 2
fi
found=$(sed -n "s/^__version__ = ['\"]\([^'\"]*\)['\"].*/\1/p" "$torch/version.py")
if [ "${found%%+*}" != "$needs" ]; then
  echo "error: this build of moe-lab needs torch $needs but found ${found:-none} in $torch; $remedy" >&2
  exit 2
fi
LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$here/moe-lab-torch" "$@"
