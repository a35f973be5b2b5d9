#!/bin/sh
# The native part built for aarch64 and its drivers run: natively there, elsewhere by a cross
# compiler and QEMU. Without those it says so and succeeds. `make aarch64`; no Python is involved.
set -eu
cd "$(dirname "$0")/.."
at=build/aarch64
set -- # CMake's options
run=
if [ "$(uname -m)" != aarch64 ]; then
  compiler=${AARCH64_CXX:-aarch64-linux-gnu-g++}
  for run in qemu-aarch64-static qemu-aarch64; do
    ! command -v "$run" >/dev/null || break
  done
  for tool in "$compiler" "$run"; do
    if ! command -v "$tool" >/dev/null; then
      echo "crossent: skipped, nothing was checked: there is no $tool."
      echo "  On Debian or Ubuntu: apt install g++-aarch64-linux-gnu qemu-user-static"
      echo "  On Fedora: dnf install gcc-c++-aarch64-linux-gnu qemu-user-static"
      exit 0
    fi
  done
  # Static, so that no aarch64 libraries need be found to run them.
  set -- -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_EXE_LINKER_FLAGS=-static
fi

mkdir -p build
{
  cmake -S native/tests -B "$at" -DCMAKE_BUILD_TYPE=Release "$@" && cmake --build "$at"
} >"$at.log" 2>&1 || { cat "$at.log"; exit 1; }
for driver in accuracy kernel head; do
  ${run:+"$run"} "$at/${driver}_driver"
done
${run:+"$run"} "$at/parallel_driver" "$run $at/parallel_driver" # how it starts itself
