"""Two hosts of four virtual devices each; what takes longer is in `hosts.py`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from hosts import assert_near, finish, start

from jaxformers.data import Windows
from jaxformers.sharding import collect, host_rows, join_batch, make_mesh, shard_batch
from jaxformers.training.agreement import Agreement


def test_two_hosts_with_rows_of_their_own(tmp_path):
    """They have the losses of one host that has the whole batch."""
    one, two = start(1, tmp_path, "rows"), start(2, tmp_path, "rows", "different")
    (alone,), _ = finish(one)
    (first, second), _ = finish(two)
    assert first == second
    assert_near(first["rows"], alone["rows"])
    assert "must be the same on all hosts" in first["different"]


def test_what_has_no_cluster():
    """In a process of its own, since JAX must not have used its devices before."""
    script = "from jaxformers.sharding import join_hosts; join_hosts()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ValueError: the hosts cannot be joined: " in found.stderr
    assert "Start the script with srun" in found.stderr


def test_one_host_has_all_rows():
    for sizes in ((2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1)):
        assert host_rows(make_mesh(*sizes)) == (0, 1)


def test_rows_are_joined():
    mesh = make_mesh(data=2)
    rows = Windows(np.arange(50), length=4, batch_size=6)[0]
    joined, whole = join_batch(rows, mesh), shard_batch(rows, mesh)
    for name in rows:
        assert joined[name].sharding == whole[name].sharding
        np.testing.assert_array_equal(joined[name], rows[name])


def test_what_is_collected():
    mesh = make_mesh(data=2)
    tree = {"x": shard_batch(np.ones((4, 6)), mesh), "name": "a", "y": jnp.zeros(3)}
    found = collect(tree)
    assert type(found["x"]) is type(found["y"]) is np.ndarray
    assert found["name"] == "a"


def test_an_agreement_is_a_step_late():
    agreement = Agreement()
    assert [agreement.next(number) for number in (0, 15, 2, 0, 0)] == [0, 0, 15, 2, 0]


def test_a_signal_counts_from_the_next_agreement_on(monkeypatch):
    """On several hosts it is not acted upon before all know of it."""
    import os
    import signal

    from jaxformers.training.interrupt import Interrupt

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jaxformers.training.interrupt.Agreement", lambda: Late())

    class Late:
        before = 0

        def next(self, number):
            self.before, found = number, self.before
            return found

    with Interrupt(lambda: None) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.fetch(lambda: 5) == 5
        asked = []
        for _ in range(3):
            interrupt.agree()
            asked.append(interrupt.asked)
    assert asked == [None, signal.SIGTERM, signal.SIGTERM]
