"""Work in processes of its own, forked so that nothing need be imported again, to be killed and limited."""

import os
import sys
import warnings

import torch


def start(work, output=None):
    """Process id of a fork that calls `work`; what it prints goes to the file `output`, if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads, of which none hold locks
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(torch.get_num_threads())  # its pool, before threads of the fork race for it
        if output is not None:
            sys.stdout = sys.stderr = output.open("w", encoding="utf-8")
        work()
        code = 0
    except SystemExit as exc:
        code = exc.code or 0
    finally:
        if output is not None:
            sys.stdout.flush()
        os._exit(code)


def wait(pid):
    """Exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def child(work, output=None):
    """Exit code of `work` in a process of its own."""
    return wait(start(work, output))


def together(count, work):
    """Exit codes of processes that call `work(number)` at the same time."""
    return [wait(pid) for pid in [start(lambda n=n: work(n)) for n in range(count)]]
