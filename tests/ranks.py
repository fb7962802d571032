"""Several ranks of one job as forks of this process, which `torchrun` would have started."""

import os
import socket
import sys

import forks


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count, work, directory):
    """Process ids of `count` ranks that call `work(rank)`; what rank r prints goes to the file `directory/r`."""
    port = free_port()

    def rank(number):
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({n: str(v) for n, v in told.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        work(number)

    return [forks.start(lambda n=n: rank(n), directory / str(n)) for n in range(count)]


def finished(pids, directory):
    """(exit code, printed) of every rank."""
    codes = [forks.wait(pid) for pid in pids]
    return [(code, (directory / str(n)).read_text("utf-8")) for n, code in enumerate(codes)]


def together(count, work, directory):
    """(exit code, printed) of `count` ranks that call `work(rank)`."""
    return finished(start(count, work, directory), directory)


def command(arguments):
    """A function of a rank that runs a command line, of which a callable argument is asked for the rank's own words."""
    from bytecap.cli import app

    def work(rank):
        words = arguments(rank) if callable(arguments) else arguments
        sys.argv = ["bytecap", *map(str, words)]
        app.main()

    return work
