"""Where reward workers run, how long they live, and what threads, signals and crashes do to them."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlalign.rewards import RewardGuard, score
from rlalign.types import Rollouts

ROOT = Path(__file__).parents[2]
graders = sys.modules["reward_graders"]  # see conftest.py


def run(function, completions, examples=None, **options):
    with RewardGuard(function, **options) as guard:
        return guard(completions, examples or [{}] * len(completions))


def workers_of(pid):
    """Process ids of the children of `pid`, zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            if int(rest.split()[1]) == pid:
                found.append(int(name.split()[0]))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds=5.0):
    """Whether the condition holds before the time is over."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# Where a function runs


def test_a_worker_sees_a_temporary_folder_and_a_scrubbed_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "123")
    file = tmp_path / "seen"
    here = {"cwd": os.getcwd(), "pid": os.getpid(), "session": os.getsid(0)}
    rewards = run(graders.surroundings, [str(file)], [here])
    assert rewards.reward.tolist() == [1.0], rewards.reason
    folder, pid = file.read_text().split()
    assert not Path(folder).exists()
    assert not Path("note.txt").exists()
    assert not alive(int(pid))


MOVES = ["os.chdir('/')", "os.mkdir('a'); os.chdir('a'); os.rmdir('../a')", "import shutil; shutil.rmtree(os.getcwd())"]


@pytest.mark.parametrize("move", MOVES)
def test_every_item_starts_in_the_folder_of_its_worker(move):
    move, here = f"{move}; value = 1", "value = float(os.path.samefile('.', os.environ['HOME']))"
    rewards = run(graders.python, [move, here, f"{move}; os._exit(3)", here], workers=1)
    assert rewards.reason == ("", "", "its worker exited with status 3", "")
    assert rewards.reward[[1, 3]].tolist() == [1.0, 1.0]


def test_a_module_that_goes_elsewhere_leaves_what_is_there_alone(tmp_path, monkeypatch):
    elsewhere = tmp_path / "data"
    elsewhere.mkdir()
    extra = f"if 'RLALIGN_REWARD_WORKER' in os.environ: os.chdir({str(elsewhere)!r})"
    reward, _, loads = module(tmp_path, monkeypatch, "moved", extra=extra)
    with RewardGuard(reward, workers=1) as guard:
        (elsewhere / "note.txt").write_text("written by somebody else")
        rewards = guard(["os._exit(3)", "assert os.path.samefile('.', os.environ['HOME'])"], [{}] * 2)
        assert rewards.reason == ("its worker exited with status 3", "")
        assert loads() == 1
    assert (elsewhere / "note.txt").exists()


def test_a_variable_can_be_handed_on():
    code = "value = float(os.environ['MODEL'])"
    assert run(graders.python, [code], environment={"MODEL": "3"}).reward.tolist() == [3.0]


def test_a_worker_loads_nothing_but_the_function():
    assert run(graders.modules, [""]).reward.tolist() == [0.0]


def test_the_order_of_a_set_is_the_same_in_all_workers():
    code = "import zlib; value = zlib.crc32(repr({str(n) for n in range(50)}).encode()); time.sleep(0.01)"
    assert len(set(run(graders.python, [code] * 8, workers=2).reward.tolist())) == 1


# How a function is loaded


def test_a_module_that_fails_in_a_worker_is_refused_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "needs_trainer.py").write_text(
        "import os\nassert 'NEEDED' in os.environ, 'no NEEDED'\ndef reward(completion, example):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NEEDED", "1")
    import needs_trainer  # pyright: ignore[reportMissingImports]

    before = workers_of(os.getpid())
    message = (
        r"the reward needs_trainer\.reward \(.*needs_trainer\.py\): AssertionError: no NEEDED; its module .* `if __name"
    )
    with pytest.raises(ValueError, match=message):
        RewardGuard(needs_trainer.reward)
    assert workers_of(os.getpid()) == before
    assert run(needs_trainer.reward, [""], environment={"NEEDED": "1"}).reward.tolist() == [1.0]


def test_a_module_that_hangs_while_loading_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "slow_reward.py"
    file.write_text("def reward(completion, example):\n    return 1.0\n")
    import slow_reward  # pyright: ignore[reportMissingImports]

    file.write_text("while True: pass")
    with pytest.raises(ValueError, match=r"could not load the reward slow_reward\.reward .*: took longer than 0\.3 s"):
        RewardGuard(slow_reward.reward, start_limit=0.3)


def test_a_script_may_define_its_reward(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        def reward(completion, example):
            return len(completion) + ("jax" in sys.modules)
        if __name__ == "__main__":
            sys.path.insert(0, {str(ROOT)!r})
            from rlalign.rewards import RewardGuard
            with RewardGuard(reward, workers=1) as guard:
                print(guard(["abc"], [{{}}]).reward.tolist())
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "[3.0]\n", done.stderr


# How long workers live


def test_workers_are_reused_and_share_the_work():
    with RewardGuard(graders.python, workers=2) as guard:
        assert wait_until(lambda: len(guard([""], [{}]).reason) and all(worker.ready for worker in guard._workers))
        code = "time.sleep(0.02); value = os.getpid()"
        first = set(guard([code] * 10, [{}] * 10).reward.tolist())
        assert len(first) == 2
        assert set(guard([code] * 10, [{}] * 10).reward.tolist()) == first


def test_nothing_is_left_after_many_calls_and_a_close(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(workers_of(os.getpid()))
    descriptors = len(os.listdir("/proc/self/fd"))
    with RewardGuard(graders.python, workers=2, time_limit=0.5) as guard:
        for call in range(1000):
            code = {100: "os._exit(1)", 200: "time.sleep(60)", 300: "1 / 0"}.get(call, f"value = {call}")
            rewards = guard([code], [{}])
            assert rewards.valid.tolist() == [call not in (100, 200, 300)]
        assert len(set(workers_of(os.getpid())) - before) == 2
        assert len(os.listdir(tmp_path)) == 2
    assert set(workers_of(os.getpid())) == before
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    guard.close()
    with pytest.raises(RuntimeError, match="this RewardGuard is closed: call it inside its `with` block"):
        guard(["value = 1"], [{}])


def test_scoring_by_a_plain_function_leaves_no_worker():
    before = set(workers_of(os.getpid()))
    ids, one = np.ones((3, 2), np.int32), np.zeros(3, np.int32)
    rewards = score(graders.length, [[1]], Rollouts(ids, ids > 0, ids, ids, one, one), workers=1)
    assert rewards.reward.tolist() == [2.0, 2.0, 2.0]
    assert set(workers_of(os.getpid())) <= before


def test_a_guard_that_is_forgotten_takes_its_workers_along():
    guard = RewardGuard(graders.length, workers=1)
    pid = guard._workers[0]._process.pid
    del guard
    assert wait_until(lambda: not alive(pid))


def test_a_worker_that_died_between_calls_is_replaced_without_blame():
    with RewardGuard(graders.pid, workers=1) as guard:
        pid = int(guard([""], [{}]).reward[0])
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid))
        rewards = guard([""] * 3, [{}] * 3)
        assert rewards.valid.all(), rewards.reason
        assert pid not in rewards.reward


THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"


def module(folder, monkeypatch, name, *, extra=""):
    """A reward that executes its completion, and how often its module was loaded, itself included."""
    loads = folder / "loads"
    file = folder / f"{name}.py"
    count = f"with open({str(loads)!r}, 'a') as log:\n    log.write('.')\n"
    file.write_text(
        f"import os, time\n{count}{extra}\ndef reward(completion, _):\n    exec(completion)\n    return 1\n"
    )
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name).reward, file, lambda: len(loads.read_text()) - 1


ENDS = ["time.sleep(60)", "os._exit(3)", "os.kill(os.getpid(), 9)", "raise MemoryError", "os.killpg(os.getpgrp(), 9)"]


def test_a_worker_that_is_lost_is_forked_anew_and_nothing_is_loaded_again(tmp_path, monkeypatch):
    reward, _, loads = module(tmp_path, monkeypatch, "loaded_once")
    with RewardGuard(reward, workers=1, time_limit=0.5) as guard:
        rewards = guard([text for end in ENDS for text in (end, "pass")], [{}] * 10)
        assert rewards.valid.tolist() == [False, True] * 5
        assert loads() == 1
    assert rewards.reason[::2] == (
        "took longer than 0.5 s",
        "its worker exited with status 3",
        "its worker was killed by SIGKILL",
        "raised MemoryError (loaded_once.py:6)",
        "its worker was killed by SIGKILL",
    )


@pytest.mark.parametrize("again", ["forked", "loaded"])
def test_a_worker_that_ends_after_its_channel_is_said_to_have_ended_so(again, tmp_path, monkeypatch):
    reward, _, _ = module(tmp_path, monkeypatch, f"ending_{again}", extra=THREAD if again == "loaded" else "")
    close = "os.closerange(3, 256)"
    ends = [
        f"{close}; time.sleep(0.01); os._exit(7)",
        f"{close}; time.sleep(0.01); os.abort()",
        f"{close}; time.sleep(60)",
    ]
    with RewardGuard(reward, workers=1, time_limit=30.0) as guard:
        rewards = guard(ends, [{}] * 3)
    exited, aborted, killed = rewards.reason
    assert (exited, aborted) == ("its worker exited with status 7", "its worker was killed by SIGABRT")
    assert killed == "its worker was killed by SIGKILL"


def test_a_module_may_say_what_happens_when_its_children_end(tmp_path, monkeypatch):
    """The process that forks must hear of its own; the forks do as the module says."""
    ignored = "import signal\n    signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    own = f"if 'RLALIGN_REWARD_WORKER' in os.environ:\n    {ignored}"
    reward, _, loads = module(tmp_path, monkeypatch, "ignoring", extra=own)
    same = "import signal; assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN"
    with RewardGuard(reward, workers=1) as guard:
        rewards = guard(["os._exit(3)"] * 4 + [same] * 3, [{}] * 7)
        assert loads() == 1
    assert rewards.reason == ("its worker exited with status 3",) * 4 + ("",) * 3


def test_many_forks_that_fail_cost_the_items_to_blame_alone(tmp_path, monkeypatch):
    """Each time the process that forks is gone too."""
    reward, _, loads = module(tmp_path, monkeypatch, "failing")
    with RewardGuard(reward, workers=1) as guard:
        rewards = guard(["os.kill(os.getppid(), 9); os._exit(3)"] * 4 + ["pass"] * 3, [{}] * 7)
        assert loads() == 5
    assert rewards.valid.tolist() == [False] * 4 + [True] * 3
    assert all(reason.startswith("its worker was lost, and no fork of it came back") for reason in rewards.reason[:4])


def test_a_module_that_leaves_threads_is_loaded_again(tmp_path, monkeypatch):
    """A fork has no threads, and may wait for one for ever."""
    reward, _, loads = module(tmp_path, monkeypatch, "threaded", extra=THREAD)
    with RewardGuard(reward, workers=1) as guard:
        assert guard(["pass", "os._exit(3)", "pass"], [{}] * 3).valid.tolist() == [True, False, True]
        assert loads() == 2


def test_a_fork_finds_none_of_what_the_one_before_left_in_its_folder(tmp_path, monkeypatch):
    reward, _, loads = module(
        tmp_path, monkeypatch, "untidy", extra="if 'RLALIGN_REWARD_WORKER' in os.environ: os.mkdir('kept')"
    )
    leave = "os.makedirs('a/b'); open('a/b/c', 'w').close(); os.symlink('a', 'd'); open('e', 'w').close(); os._exit(3)"
    with RewardGuard(reward, workers=1) as guard:
        rewards = guard([leave, "assert os.listdir() == ['kept']"], [{}] * 2)
        assert rewards.reason == ("its worker exited with status 3", "")
        assert loads() == 1


@pytest.mark.parametrize("moment", ["idle", "needed"])
def test_without_the_process_that_forks_a_worker_is_loaded_again(moment, tmp_path, monkeypatch):
    reward, _, loads = module(tmp_path, monkeypatch, f"orphaned_{moment}")
    with RewardGuard(reward, workers=1, time_limit=1.0) as guard:
        assert guard(["pass"], [{}]).valid.all()
        keeper = guard._workers[0]._process
        if moment == "idle":
            keeper.kill()
            keeper.wait()
            items = ["os._exit(3)", "pass"]
        else:
            items = [f"os.kill({keeper.pid}, 9); os._exit(3)", "pass"]
        assert guard(items, [{}] * 2).valid.tolist() == [False, True]
        assert loads() == 2


def test_a_function_that_can_no_longer_be_loaded_makes_items_invalid(tmp_path, monkeypatch):
    reward, file, _ = module(tmp_path, monkeypatch, "fragile_reward", extra=THREAD)
    with RewardGuard(reward, workers=1) as guard:
        file.write_text("raise OSError('gone')")
        rewards = guard(["os._exit(1)", "b", "c"], [{}] * 3)
    assert rewards.reason[0] == "its worker exited with status 1"
    assert rewards.reason[1:] == ("no reward worker could be started: OSError: gone",) * 2


def test_workers_die_with_a_trainer_that_is_killed(tmp_path):
    code = "import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # C code, which no thread or exception can stop
    script = tmp_path / "train.py"
    file = tmp_path / "pid"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        def reward(completion, example):
            import os, time
            open({str(file)!r}, "w").write(str(os.getpid()))
            exec(completion)
        if __name__ == "__main__":
            from rlalign.rewards import RewardGuard
            RewardGuard(reward, workers=1, time_limit=600)([{code!r}], [{{}}])
        """)
    )
    trainer = subprocess.Popen([sys.executable, script], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert wait_until(lambda: file.exists() and file.read_text(), 60.0)
    pid = int(file.read_text())
    assert alive(pid)
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not alive(pid))


def test_a_hang_takes_its_subprocesses_along(tmp_path):
    file = tmp_path / "pid"
    rewards = run(graders.grandchild, [str(file)], time_limit=1.0)
    assert rewards.reason == ("took longer than 1.0 s",)
    assert wait_until(lambda: not alive(int(file.read_text())))


LEAVES = {  # the group and the session, and tells in a file that it has
    "program": "import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True).pid; {tell}(str(p))",
    "fork": "os.fork() or [os.setsid(), {tell}(str(os.getpid())), time.sleep(60)]",
}


@pytest.mark.parametrize("again", ["forked", "loaded"])
@pytest.mark.parametrize("how", LEAVES)
def test_a_process_that_left_its_group_ends_with_its_worker(how, again, tmp_path, monkeypatch):
    extra = THREAD if again == "loaded" else ""
    reward, _, _ = module(tmp_path, monkeypatch, f"left_by_{how}_{again}", extra=extra)
    files = tmp_path / "first", tmp_path / "second"
    first, second = (LEAVES[how].format(tell=f"__import__('pathlib').Path({str(file)!r}).write_text") for file in files)
    with RewardGuard(reward, workers=1, time_limit=1.0) as guard:
        rewards = guard([f"{first}; time.sleep(60)", "pass"], [{}] * 2)
        assert rewards.reason == ("took longer than 1.0 s", "")
        assert wait_until(lambda: not alive(int(files[0].read_text())))
        assert guard([second], [{}]).valid.all()
        assert wait_until(lambda: files[1].exists() and files[1].read_text())
        assert alive(int(files[1].read_text()))
    assert wait_until(lambda: not alive(int(files[1].read_text())))


def test_a_process_that_loading_started_stays_until_the_end(tmp_path, monkeypatch):
    file = tmp_path / "pid"
    start = LEAVES["program"].format(tell=f"open({str(file)!r}, 'w').write")
    extra = f"if 'RLALIGN_REWARD_WORKER' in os.environ: {start}"
    reward, _, loads = module(tmp_path, monkeypatch, "helped", extra=extra)
    with RewardGuard(reward, workers=1) as guard:
        assert guard(["os._exit(3)", "pass"], [{}] * 2).valid.tolist() == [False, True]
        assert loads() == 1
        assert alive(int(file.read_text()))
    assert wait_until(lambda: not alive(int(file.read_text())))


# Threads and interrupts


def test_scores_are_the_same_off_the_main_thread_and_from_many():
    texts = [str(number) for number in range(100)]
    results = {}
    with RewardGuard(graders.number, workers=2) as guard:
        expected = guard(texts, [{}] * 100).reward

        def call(name):
            results[name] = guard(texts, [{}] * 100).reward

        threads = [threading.Thread(target=call, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for result in results.values():
        np.testing.assert_array_equal(result, expected)


def test_a_guard_may_live_in_a_thread_and_its_function_use_signals():
    code = "signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(0); value = 1"
    results = []
    thread = threading.Thread(target=lambda: results.append(run(graders.python, [code]).reward.tolist()))
    thread.start()
    thread.join()
    assert results == [[1.0]]


@pytest.fixture
def interruptible():
    """A shell's background jobs ignore interrupts, and so would a test in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_worker_is_forked_anew_passes_and_the_guard_goes_on():
    with RewardGuard(graders.python, workers=1, time_limit=0.5) as guard:
        assert guard(["value = 1"], [{}]).valid.all()
        keeper = guard._workers[0]._process
        os.kill(keeper.pid, signal.SIGSTOP)  # it answers no request for a fork
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            guard(["time.sleep(60)"], [{}])
        assert keeper.poll() is not None
        assert guard(["value = 2"], [{}]).reward.tolist() == [2.0]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_passes_and_leaves_no_answer_behind():
    with RewardGuard(graders.python, workers=2, time_limit=30.0) as guard:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            guard(["time.sleep(1); value = 1"] * 9, [{}] * 9)
        assert time.monotonic() - start < 3.0  # the batch takes 4.5
        assert guard([f"value = {n}" for n in range(9)], [{}] * 9).reward.tolist() == list(range(9))
