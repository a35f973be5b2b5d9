"""The copies that `crossent bench rows` holds the kernels against: whole, and within bounds."""

import numpy as np
import pytest

from crossent import _native


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000, 2**18 - 1, 2**18 + 1, 3 * 2**18 + 77])
@pytest.mark.parametrize("shift", [0, 1, 16, 63])
def test_copies_are_whole_and_stay_within_their_bounds(streaming, n, shift):
    source = np.random.default_rng(n).integers(0, 256, n + 200, dtype=np.uint8)
    out = np.zeros_like(source)
    _native.copy_bytes(out[shift : shift + n], source[7 : 7 + n], streaming)
    np.testing.assert_array_equal(out[shift : shift + n], source[7 : 7 + n])
    assert not out[:shift].any()
    assert not out[shift + n :].any()


def test_copies_refuse_what_would_touch_other_memory():
    memory = np.zeros(100, np.uint8)
    with pytest.raises(ValueError, match="as many bytes"):
        _native.copy_bytes(memory[:10], memory[10:30], True)
    with pytest.raises(ValueError, match="two places apart"):
        _native.copy_bytes(memory[:10], memory[5:15], True)
    memory.flags.writeable = False
    with pytest.raises(TypeError):
        _native.copy_bytes(memory[:10], memory[10:20], True)
