#!/bin/sh
# The tests of native code, and some fuzzing, under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tools/sanitize.sh [pytest arguments]        make sanitize ARGS="-k softmax"
#
# The build and its environment lie under build/asan. FUZZ_CASES (default 20000) sets how much is
# fuzzed, CMAKE_BUILD_PARALLEL_LEVEL the compilers.
set -eu
cd "$(dirname "$0")/.."
root=$PWD at=$PWD/build/asan

sh tools/checking_build.sh asan -DCROSSENT_SANITIZE=address,undefined

# The interpreter is not instrumented, so the runtimes must come first; libstdc++ with them, so that
# they find the exceptions they intercept.
compiler=${CXX:-c++}
LD_PRELOAD=
for library in libasan.so libubsan.so libstdc++.so; do
  LD_PRELOAD="$LD_PRELOAD $("$compiler" -print-file-name=$library)"
done
export LD_PRELOAD
# Leaks are not looked for: an interpreter frees little of what it holds when it ends.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1

"$at/venv/bin/python" - <<'PYTHON'
import crossent._native
assert "build/asan" in crossent._native.__file__, crossent._native.__file__
PYTHON
cd "$root"
# Whatever calls the extension, but for a fit or a report; test_huge wants the memory for itself.
tests=
for name in agreement check determinism faults_extra head head_bfloat16 head_inputs head_products head_sparse head_thin head_thin_hvp hvp_few_classes laws numpy options rows runtime special_values; do
  tests="$tests tests/test_$name.py"
done
"$at/venv/bin/python" -m pytest -q -p no:cacheprovider $tests "$@"
"$at/venv/bin/python" tools/fuzz --cases "${FUZZ_CASES:-20000}" --jobs 1
