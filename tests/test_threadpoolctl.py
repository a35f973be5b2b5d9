"""threadpoolctl sees the pool, sets its limit and puts it back."""

import doctest
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import crossent
from crossent import _native, runtime

threadpoolctl = pytest.importorskip("threadpoolctl", minversion="3.5")

LOGITS = np.random.default_rng(8).normal(size=(600, 300)).astype(np.float32)
TARGET = np.arange(600) % 300


@pytest.fixture(autouse=True)
def four_threads():
    before = crossent.get_num_threads()
    runtime.register_threadpoolctl()
    crossent.set_num_threads(4)
    yield
    crossent.set_num_threads(before)


def pools(user_api="crossent"):
    return [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == user_api]


def test_what_it_says_of_the_pool():
    runtime.register_threadpoolctl()  # a second time changes nothing
    (pool,) = pools()
    assert pool["filepath"] == _native.__file__
    del pool["filepath"]
    assert pool == {
        "user_api": "crossent",
        "internal_api": "crossent",
        "num_threads": 4,
        "prefix": "_native.",
        "version": crossent.__version__,
        "threading_layer": "pthreads",
        "architecture": _native.isa(),
    }


@pytest.mark.parametrize("user_api", [None, "crossent"])
def test_a_limit_holds_and_is_lifted(user_api):
    with threadpoolctl.threadpool_limits(2, user_api=user_api):
        assert crossent.get_num_threads() == 2
        assert pools()[0]["num_threads"] == 2
        with threadpoolctl.threadpool_limits({"crossent": 1}):
            assert crossent.get_num_threads() == 1
        assert crossent.get_num_threads() == 2
    assert crossent.get_num_threads() == 4


def test_a_limit_is_lifted_after_an_error():
    with pytest.raises(IndexError), threadpoolctl.threadpool_limits(1):
        crossent.cross_entropy(LOGITS, TARGET + 300)
    assert crossent.get_num_threads() == 4


def test_limits_are_to_each_their_own():
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        assert crossent.get_num_threads() == 4
    others = [pool["num_threads"] for pool in pools("blas")]
    with threadpoolctl.threadpool_limits(1, user_api="crossent"):
        assert [pool["num_threads"] for pool in pools("blas")] == others
    with threadpoolctl.threadpool_limits(None):
        assert crossent.get_num_threads() == 4


def test_limits_set_by_many_threads_while_others_compute():
    wanted = crossent.cross_entropy_value_and_grad(LOGITS, TARGET)
    controller = threadpoolctl.ThreadpoolController().select(user_api="crossent")
    start, right = threading.Barrier(4), []

    def work(k):
        start.wait(60)
        for i in range(20):
            if k < 2:
                with controller.limit(limits=1 + (i + k) % 3):
                    right.append(1 <= crossent.get_num_threads() <= 4)
            else:
                loss, grad = crossent.cross_entropy_value_and_grad(LOGITS, TARGET)
                right.append(loss == wanted.loss and np.array_equal(grad, wanted.grad))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 80
    assert all(right)


SEEN = "[p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'crossent']"


@pytest.mark.parametrize(
    ("imports", "seen"),
    [
        ("import threadpoolctl, crossent", [3]),
        ("import crossent, threadpoolctl", []),
        ("import crossent, threadpoolctl; crossent.runtime.register_threadpoolctl()", [3]),
        ("import crossent.sklearn, threadpoolctl", [3]),
    ],
)
def test_who_comes_first(imports, seen):
    if "sklearn" in imports:
        pytest.importorskip("sklearn")
    code = f"{imports}\ncrossent.set_num_threads(3)\nprint({SEEN})"
    assert said(code) == str(seen)


def test_another_library_s_native_module_is_none_of_ours(tmp_path):
    foreign = tmp_path / "_native.foreign.so"
    shutil.copy(np.random._common.__file__, foreign)
    code = f"""
        import ctypes, threadpoolctl, crossent
        library = ctypes.CDLL({str(foreign)!r})
        crossent.set_num_threads(3)
        print({SEEN})
    """
    assert said(textwrap.dedent(code)) == "[3]"


def test_an_old_threadpoolctl_is_left_alone(tmp_path):
    (tmp_path / "threadpoolctl.py").write_text("__version__ = '3.1.0'")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import threadpoolctl, crossent
        try:
            crossent.runtime.register_threadpoolctl()
        except ImportError as error:
            print(error)
    """
    assert said(textwrap.dedent(code)) == (
        "crossent needs threadpoolctl 3.5 or newer, got 3.1.0; pip install --upgrade threadpoolctl"
    )


def said(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_example_of_the_docs():
    text = (Path(__file__).parent.parent / "docs" / "threads.md").read_text("utf-8")
    (block,) = re.findall(r"```pycon\n(.*?)```", text, re.S)
    example = doctest.DocTestParser().get_doctest(block, {}, "threads.md", None, 0)
    assert len(example.examples) == 7
    assert doctest.DocTestRunner().run(example).failed == 0
