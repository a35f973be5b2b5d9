#!/bin/sh
# What must be on the machine before `make` can fill .venv. Prints the Python to use (the PYTHON
# variable, or the first recent one found); one line on stderr for each thing missing, then exit 1.
set -u

status=0
missing() { # what is wrong; Debian's packages; Fedora's packages
    printf 'crossent: %s. On Debian or Ubuntu: apt install %s; on Fedora: dnf install %s\n' "$@" >&2
    status=1
}

# Python 3.11 or newer
if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- python3 python3.14 python3.13 python3.12 python3.11
fi
python=
for candidate in "$@"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        python=$(command -v "$candidate")
        break
    fi
done

if [ -z "$python" ]; then
    if found=$("$1" --version 2>&1); then
        missing "Python 3.11 or newer is needed, but $1 is $found" \
            'python3.11 python3.11-venv python3.11-dev' 'python3.12 python3.12-devel'
    else
        missing "Python 3.11 or newer is needed, but there is no $1" \
            'python3 python3-venv python3-dev' 'python3 python3-devel'
    fi
else
    package=$(basename "$python")
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        missing "$python has no venv module" "$package-venv" "$package"
    fi
    if ! "$python" -c 'import os, sysconfig
os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' >/dev/null 2>&1; then
        missing "$python has no headers (Python.h)" "$package-dev" "$package-devel"
    fi
fi

# A compiler, asked for what it must do: compile and link C++17
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
cat >"$scratch/try.cpp" <<'CPP'
#include <optional>
int main() { std::optional<int> none; return none.value_or(0); }
CPP
if [ -n "${CXX:-}" ]; then
    set -- "$CXX"
else
    set -- c++ g++ clang++
fi
compiler=
for candidate in "$@"; do
    # Unquoted: CXX may carry arguments, as in "ccache g++".
    if $candidate -std=c++17 "$scratch/try.cpp" -o "$scratch/try" >/dev/null 2>&1; then
        compiler=$candidate
        break
    fi
done
if [ -z "$compiler" ]; then
    missing "no C++17 compiler (${CXX:-c++, g++ or clang++})" g++ gcc-c++
fi

[ "$status" -eq 0 ] && printf '%s\n' "$python"
exit "$status"
