#!/bin/sh
# A second build of the package, to be checked in some special way, with an environment of its own.
#
#   tools/checking_build.sh NAME [CMake options]        build/NAME/venv/bin/python then runs it
#
# Packages come from .venv, crossent from here. The environment is one of its own so that the Python
# processes a test starts use this build as well.
set -eu
cd "$(dirname "$0")/.."
venv=$PWD/.venv at=$PWD/build/$1
shift
PATH=$venv/bin:$PATH # where cmake is, if the system has none
python=$venv/bin/python

mkdir -p build
cmake -S . -B "$at/cmake" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" "$@" \
  >"$at.log" 2>&1 || { cat "$at.log"; exit 1; }
cmake --build "$at/cmake" >>"$at.log" 2>&1 || { cat "$at.log"; exit 1; }

# The .pth file names .venv's packages without running the .pth files there (crossent's editable
# hook).
[ -x "$at/venv/bin/python" ] || "$python" -m venv --without-pip "$at/venv"
rm -rf "$at/site"
mkdir -p "$at/site"
cp -R src/crossent "$at/site/"
cmake --install "$at/cmake" --prefix "$at/site" >>"$at.log"
site='import sysconfig; print(sysconfig.get_path("purelib"))'
{
  echo "$at/site"
  "$python" -c "$site"
} >"$("$at/venv/bin/python" -c "$site")/crossent.pth"
