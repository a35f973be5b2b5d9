"""Threads, processes, signals, and what the environment says."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import crossent
from crossent import _native, runtime

RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=(600, 300)).astype(np.float32)
TARGET = RNG.integers(0, 300, 600)


@pytest.fixture(autouse=True)
def runtime_restored():
    threads, isa = crossent.get_num_threads(), _native.isa()
    yield
    crossent.set_num_threads(threads)
    _native.set_isa(isa)


def bits():
    loss, grad = crossent.cross_entropy_value_and_grad(LOGITS, TARGET)
    return loss.tobytes() + grad.tobytes()


VARIABLES = ("CROSSENT_NUM_THREADS", "OMP_NUM_THREADS", "CROSSENT_ISA", "CROSSENT_WORKSPACE_MB")


def environ(**given):
    """This process's environment with none of our variables but those given."""
    return {k: v for k, v in os.environ.items() if k not in VARIABLES} | given


def python(code, **environment):
    """Run a program (or a file of one) with this interpreter; return what it said, and warned."""
    program = [str(code)] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
    done = subprocess.run(
        [sys.executable, *program],
        env=environ(**environment),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


# Threads ------------------------------------------------------------------------------------------


def test_the_number_of_threads_is_what_was_set():
    for n in (1, 3, np.int64(2), np.uint8(5), 2**15):
        crossent.set_num_threads(n)
        assert crossent.get_num_threads() == n
        assert type(crossent.get_num_threads()) is int


@pytest.mark.parametrize(
    ("n", "error", "got"),
    [
        (0, ValueError, "0 (int)"),
        (-1, ValueError, "-1 (int)"),
        (2**15 + 1, ValueError, "32769 (int)"),
        (np.int64(0), ValueError, "np.int64(0) (int64)"),
        (10**30, ValueError, f"{10**30} (int)"),
        (True, TypeError, "True (bool)"),
        (2.0, TypeError, "2.0 (float)"),
        ("2", TypeError, "'2' (str)"),
        (None, TypeError, "None (NoneType)"),
    ],
)
def test_a_wrong_number_of_threads(n, error, got):
    before = crossent.get_num_threads()
    with pytest.raises(error) as caught:
        crossent.set_num_threads(n)
    assert type(caught.value) is error
    assert str(caught.value) == (
        f"set_num_threads: the number of threads must be an integer from 1 to 32768, got {got}"
    )
    assert crossent.get_num_threads() == before


def test_many_python_threads_at_once():
    wanted = bits()
    small, row = crossent.softmax(LOGITS[:3]).tobytes(), crossent.softmax(LOGITS[0]).tobytes()
    start = threading.Barrier(8)

    def work(k):
        start.wait(60)
        found = []
        for i in range(30):
            if k == 0:
                crossent.set_num_threads(1 + i % 4)
            found.append(bits() == wanted)
            found.append(crossent.softmax(LOGITS[:3]).tobytes() == small)
            found.append(crossent.softmax(LOGITS[0]).tobytes() == row)
        return all(found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_errors_in_one_thread_leave_the_others_alone():
    wanted = bits()

    def work(k):
        for _ in range(20):
            if k % 2:
                with pytest.raises(IndexError):
                    crossent.cross_entropy(LOGITS, TARGET + 300)
            elif bits() != wanted:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# Processes ----------------------------------------------------------------------------------------


def in_child(child):
    """Fork; return what `child` returns (bytes) in the child."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork beside threads; that this one works is the test.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            signal.alarm(60)  # a child that hangs ends, and its parent's test fails
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(child())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return said


def test_fork_after_use_then_use_in_the_child():
    crossent.set_num_threads(4)
    wanted = bits()
    assert in_child(bits) == wanted
    assert in_child(lambda: in_child(bits)) == wanted

    def with_threads():
        crossent.set_num_threads(3)
        return bits()

    assert in_child(with_threads) == wanted
    assert bits() == wanted
    assert crossent.get_num_threads() == 4


def test_fork_while_other_threads_compute():
    crossent.set_num_threads(2)
    wanted = bits()
    stop = threading.Event()

    def work():
        while not stop.is_set():
            bits()

    others = [threading.Thread(target=work) for _ in range(2)]
    for thread in others:
        thread.start()
    try:
        for _ in range(5):
            assert in_child(bits) == wanted
    finally:
        stop.set()
        for thread in others:
            thread.join()


def test_a_forked_child_uses_one_thread():
    code = """
        import os, crossent
        crossent.set_num_threads(4)
        if (pid := os.fork()) == 0:
            print(crossent.get_num_threads(), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    """
    assert python(code)[0] == "1"
    assert python(code, CROSSENT_NUM_THREADS="3")[0] == "3"
    assert python(code, OMP_NUM_THREADS="3")[0] == "1"


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("early", [True, False], ids=["imported by main", "imported by the worker"])
@pytest.mark.parametrize(("environment", "threads"), [({}, 1), ({"CROSSENT_NUM_THREADS": "2"}, 2)])
def test_a_worker_process_uses_one_thread(method, early, environment, threads, tmp_path):
    program = tmp_path / "program.py"  # a worker that is spawned reads it again
    program.write_text(
        textwrap.dedent(f"""
            import multiprocessing
            {"import crossent" if early else ""}

            def work(queue):
                import crossent
                queue.put(crossent.get_num_threads())

            if __name__ == "__main__":
                {"crossent.set_num_threads(4)" if early else ""}
                context = multiprocessing.get_context({method!r})
                queue = context.Queue()
                worker = context.Process(target=work, args=(queue,))
                worker.start()
                print(queue.get(timeout=100))
                worker.join()
        """)
    )
    assert python(program, **environment)[0] == str(threads)


# Signals ------------------------------------------------------------------------------------------

# A call of some minutes, in rows far shorter than the second in which Ctrl-C is to be answered.
LONG_CALL = """
    import signal, numpy as np, crossent
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    crossent.set_num_threads({threads})
    row = np.linspace(-20, 20, 100_000)
    rows = np.broadcast_to(row, (2_000_000, 100_000))
    wide = np.broadcast_to(np.zeros(2_000_000, np.float16), (200_000, 2_000_000))
    features = np.broadcast_to(row[:4000], (20_000_000, 4000))
    classes = np.zeros((64, 4000))
    slabs = np.broadcast_to(1.0, (10**10, 4))
    slab, thin = np.broadcast_to(1.0, (4_000_000, 60_000)), np.ones((60_000, 4))
    small = crossent.softmax(row).tobytes()
    print("ready", flush=True)
    try:
        {call}
    except KeyboardInterrupt:
        print("answered", flush=True)
    assert crossent.softmax(row).tobytes() == small
    print("alive", flush=True)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "call",
    [
        "crossent.cross_entropy(rows, np.broadcast_to(7, len(rows)), label_smoothing=0.1)",
        "crossent.cross_entropy_stats(rows)",
        # Rows in parts, a row in less time than lies between two questions whether to stop.
        "crossent.cross_entropy(wide, np.broadcast_to(7, len(wide)))",
        # One pass over the features; a product of many short slabs, and one of a long slab.
        "crossent.linear_cross_entropy(features, classes, np.broadcast_to(7, len(features)))",
        "crossent._native.matmul(slabs.T, slabs, np.empty((4, 4)), False, None)",
        "crossent._native.matmul(slab, thin, np.empty((len(slab), 4)), False, None)",
    ],
)
def test_ctrl_c_is_answered_in_a_long_call(threads, call):
    code = textwrap.dedent(LONG_CALL.format(threads=threads, call=call))
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environ(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(1.5)  # into the kernel: the plan of so many rows takes part of a second
            process.send_signal(signal.SIGINT)
            # The answer takes about 50 ms; a call that ran on would take minutes.
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert said == "answered\nalive\n"
    assert process.returncode == 0


# The environment ----------------------------------------------------------------------------------

SAY_THREADS = "import crossent; print(crossent.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"CROSSENT_NUM_THREADS": "3"}, 3),
        ({"CROSSENT_NUM_THREADS": " +3 "}, 3),
        ({"CROSSENT_NUM_THREADS": "2147483647"}, 2**31 - 1),
        ({"CROSSENT_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "5,2"}, 5),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"CROSSENT_NUM_THREADS": ""}, None),
        ({}, None),
    ],
)
def test_the_number_of_threads_of_the_environment(environment, threads):
    said, warned = python(SAY_THREADS, **environment)
    assert int(said) == (threads or _native.available_cpus())
    assert not warned


@pytest.mark.parametrize("value", ["0", "-2", "two", "2.5", "3x", "1_0", "٣", "2147483648"])
def test_a_malformed_number_of_threads_is_passed_over_with_a_warning(value):
    said, warned = python(SAY_THREADS, CROSSENT_NUM_THREADS=value, OMP_NUM_THREADS="5")
    assert int(said) == 5
    assert (
        f"UserWarning: crossent: CROSSENT_NUM_THREADS={value!r} is passed over: "
        "expected an integer from 1 to 2147483647"
    ) in warned


@pytest.mark.parametrize("name", _native.available_isas())
def test_the_instruction_set_of_the_environment(name):
    said, warned = python("from crossent import _native; print(_native.isa())", CROSSENT_ISA=name)
    assert (said, warned) == (name, "")


def test_an_unknown_instruction_set_is_passed_over_with_a_warning():
    code = "import crossent; from crossent import _native; print(_native.isa())"
    said, warned = python(code, CROSSENT_ISA="sse9")
    assert said == _native.available_isas()[0]
    choices = ", ".join(_native.available_isas())
    expected = f"CROSSENT_ISA='sse9' is passed over: expected one of {choices}"
    assert f"UserWarning: crossent: {expected}" in warned


# The head's workspace -----------------------------------------------------------------------------

SAY_WORKSPACE = "import crossent; print(crossent.runtime.workspace_bytes('test', None))"


@pytest.mark.parametrize(
    ("environment", "n"),
    [({}, 128), ({"CROSSENT_WORKSPACE_MB": "64"}, 64), ({"CROSSENT_WORKSPACE_MB": " 1.5 "}, 1.5)],
)
def test_the_workspace_of_the_environment(environment, n):
    assert python(SAY_WORKSPACE, **environment) == (str(int(n * 2**20)), "")


@pytest.mark.parametrize("value", ["lots", "0", "-3", "nan", "inf", "1e30"])
def test_a_malformed_workspace_is_passed_over_with_a_warning(value):
    said, warned = python(SAY_WORKSPACE, CROSSENT_WORKSPACE_MB=value)
    assert int(said) == 128 * 2**20
    assert (
        f"UserWarning: crossent: CROSSENT_WORKSPACE_MB={value!r} is passed over: "
        "expected a number of megabytes above 0"
    ) in warned


def test_the_workspace_of_a_call():
    assert crossent.runtime.workspace_bytes("f", 2.5) == 5 * 2**19
    for bad in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^f: workspace_mb must be above 0 and finite, got "):
            crossent.runtime.workspace_bytes("f", bad)
    with pytest.raises(TypeError, match=r"^f: workspace_mb must be a real number above 0, got "):
        crossent.runtime.workspace_bytes("f", "64")


def test_set_isa_refuses_what_is_not_there():
    before = _native.isa()
    assert not _native.set_isa("sse9")
    assert _native.isa() == before
    assert runtime.read_environment() is None


def test_importing_brings_numpy_and_nothing_heavier():
    code = """
        import sys, numpy
        before = {name.partition(".")[0] for name in sys.modules}
        import crossent
        after = {name.partition(".")[0] for name in sys.modules}
        third = after - before - set(sys.stdlib_module_names)
        print(sorted(name for name in third if not name.startswith("_")))
    """
    assert python(code)[0] == "['crossent']"


def in_a_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("options", ["weight=np.ones(40)", "sample_weight=np.ones(4000)"])
def test_a_target_that_another_thread_changes_ends_no_process(options):
    """It may give an error or any numbers, but touches no foreign memory."""
    done = in_a_process(f"""
import threading, time
import numpy as np
import crossent

good, bad = np.zeros(4000, np.int64), np.full(4000, 2**40)
target, logits, stop = good.copy(), np.zeros((4000, 40), np.float32), False

def change():
    while not stop:
        target[:] = bad
        target[:] = good

thread = threading.Thread(target=change)
thread.start()
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        crossent.cross_entropy_value_and_grad(logits, target, {options})
    except (IndexError, ValueError):
        pass
stop = True
thread.join()
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
def test_a_signal_handler_may_call_in_the_middle_of_a_row():
    """A long row under a softcap asks for signals while its numbers are in scratch."""
    done = in_a_process("""
import signal
import numpy as np
import crossent

crossent.set_num_threads(1)
logits = np.zeros((1, 2**22 + 8), np.float16)
logits[0, ::3] = 1
small, target, calls = np.ones((64, 3000)), np.zeros(64, int), 0

def handler(*_):
    global calls
    calls += 1
    crossent.cross_entropy_value_and_grad(small, target, softcap=3.0)

def long_call():
    return crossent.cross_entropy_value_and_grad(logits, [5], softcap=30.0)

wanted = long_call()
signal.signal(signal.SIGALRM, handler)
for k in range(6):
    signal.setitimer(signal.ITIMER_REAL, 0.01 * (k + 1))
    found = long_call()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert found.loss == wanted.loss and np.array_equal(found.grad, wanted.grad)
assert calls > 0
""")
    assert done.returncode == 0, done.stderr
