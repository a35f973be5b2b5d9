#!/bin/sh
# The tests of the kernels with x86-64-v4 (and its bf16 set) emulated on AVX2, so that code for
# vectors of 64 bytes is tested on a machine without AVX-512. The build lies under build/v4.
#
#   tools/emulate_v4.sh [pytest arguments]        make emulate ARGS="-k softmax"
set -eu
cd "$(dirname "$0")/.."
sh tools/checking_build.sh v4 -DCROSSENT_EMULATE_V4=ON
python=$PWD/build/v4/venv/bin/python
"$python" - <<'PYTHON'
from crossent import _native
assert "build/v4" in _native.__file__, _native.__file__
assert "x86-64-v4-bf16" in _native.available_isas(), "the emulation itself needs AVX2"
PYTHON
tests=
for name in agreement check determinism faults_extra head head_bfloat16 head_inputs head_products head_sparse head_thin head_thin_hvp hvp_few_classes laws numpy options rows runtime special_values; do
  tests="$tests tests/test_$name.py"
done
"$python" -m pytest -q -p no:cacheprovider $tests "$@"
