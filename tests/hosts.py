"""Several hosts on this machine: what takes longer than a test may, run by `.ci/slow`.

`python tests/hosts.py` runs all of it; `python tests/hosts.py NAME ...` these parts.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 60  # seconds within which a run must end after one of its hosts is lost


def start(count, directory, *names, **variables):
    """Starts `host_program.py` on so many hosts."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    program = [sys.executable, "-W", "error", str(HERE / "host_program.py")]
    return [
        subprocess.Popen(
            [*program, str(i), str(count), str(port), str(directory), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, **variables},
        )
        for i in range(count)
    ]


def finish(processes, statuses=(0, 0)):
    """The results of the checks on each host, and what the hosts wrote to standard error."""
    texts = end(processes)
    for process, status, (_, error) in zip(processes, statuses, texts, strict=False):
        assert process.returncode == status, (process.returncode, error[-3000:])
    lines = [(x for x in out.splitlines() if x.startswith('["')) for out, _ in texts]
    return [dict(map(json.loads, x)) for x in lines], [error for _, error in texts]


def end(processes):
    """What the hosts wrote, after their end."""
    try:
        return [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_near(found, expected, tolerance=1e-5):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert_near(x, y, tolerance)
    else:
        assert abs(found - expected) < tolerance, (found, expected)


def wait_for(directory, step, processes):
    """Waits until the run has a checkpoint of this step."""
    while not (Path(directory) / "run" / str(step)).exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)


def check_same():
    """Two hosts have the losses, tokens and files of one."""
    names = "losses", "rows", "generation"
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        (alone,), _ = finish(start(1, one, *names, MESH="fsdp tensor"))
        (first, second), _ = finish(start(2, two, *names, "files", MESH="fsdp tensor"))
    assert first == second
    assert_near(first["losses"], alone["losses"])
    assert_near(first["rows"], alone["rows"])
    assert first["generation"] == alone["generation"]
    assert first["files"][:2] == [True, True] and "collect(model)" in first["files"][2]


def check_lost():
    """A host that is killed ends the run on the others, which goes on on another mesh."""
    with tempfile.TemporaryDirectory() as directory:
        processes = start(2, directory, "train", MESH="fsdp", STEPS="1000")
        wait_for(directory, 4, processes)
        processes[1].kill()
        begin = time.monotonic()
        (_, error), _ = end(processes)
        seconds = time.monotonic() - begin
        print(f"ended {seconds:.0f} s after the other, with status {processes[0].returncode}")
        assert processes[0].returncode != 0 and seconds < LIMIT, (seconds, error[-2000:])
        assert "another task died" in error
        done = newest(directory)
        results, _ = finish(start(2, directory, "train", MESH="tensor", STEPS=str(done + 2)))
        for result in results:
            assert result["train"]["step"] == done + 2
            assert len(result["train"]["losses"]) == 2
        # The same steps without a loss of hosts, on one host and a third mesh.
        (whole,), _ = finish(
            start(1, f"{directory}/whole", "train", MESH="all", STEPS=str(done + 2))
        )
        assert_near(results[0]["train"]["losses"], whole["train"]["losses"][-2:], 1e-4)


def newest(directory):
    return max(int(x.name) for x in (Path(directory) / "run").iterdir() if x.name.isdigit())


def check_signal():
    """SIGTERM at one host saves and ends the run on both."""
    for at in (0, 1):
        with tempfile.TemporaryDirectory() as directory:
            processes = start(2, directory, "train", MESH="all", STEPS="100000")
            wait_for(directory, 4, processes)
            processes[at].send_signal(signal.SIGTERM)
            _, errors = finish(processes, (143, 143))
            assert newest(directory) > 4
            assert "SIGTERM" in errors[0] and "SIGTERM: stopped" not in errors[1]


def check_error():
    """An error on one host ends both."""
    with tempfile.TemporaryDirectory() as directory:
        processes = start(2, directory, "broken")
        begin = time.monotonic()
        outcomes = end(processes)
        print(f"both ended {time.monotonic() - begin:.0f} s after the start")
        assert all(process.returncode for process in processes)
        assert "this loader is broken" in outcomes[1][1]


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in dict(globals()).items()
    if name.startswith("check_")
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        begin = time.monotonic()
        CHECKS[name]()
        print(f"{name}: ok, {time.monotonic() - begin:.0f} s", flush=True)
