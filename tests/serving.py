"""A server in this process, an engine that follows a script, and requests without a library."""

import contextlib
import http.client
import json
import threading

from jaxformers.serving.app import App
from jaxformers.serving.job import Closed, QueueFull, Token
from jaxformers.serving.server import Server, bind

JSON = {"Content-Type": "application/json"}


class ScriptedEngine:
    """An engine whose tokens are those of a script, and which waits at a gate before each of them.

    The tokens of a job are `script(job)`, an iterable in which an exception is one of the engine.
    """

    def __init__(self, script, vocab_size, context=96, most=8):
        self.script, self.vocab_size, self.context, self.most = script, vocab_size, context, most
        self.gate, self.jobs, self.ended = threading.Event(), [], []
        self.gate.set()
        self._change, self._running, self._is_closed = threading.Condition(), [], False
        self._thread = threading.Thread(target=self._run)

    def start(self):
        self._thread.start()

    def submit(self, jobs):
        with self._change:
            if self._is_closed:
                raise Closed("closed")
            if len(self._running) + len(jobs) > self.most:
                raise QueueFull("full")
            self.jobs += jobs
            self._running += [(job, iter(self.script(job))) for job in jobs]
            self._change.notify_all()

    def counts(self):
        return {"rows": self.most, "busy": len(self._running), "waiting": 0}

    def close(self, at_once=False):
        with self._change:
            self._is_closed = True
            for job, _ in self._running if at_once else []:
                job.cancel()
            self._change.notify_all()
        self._thread.join()

    def wait_until_free(self):
        """Returns when no job runs, which a test waits for."""
        with self._change:
            assert self._change.wait_for(lambda: not self._running, timeout=60)

    def wait_until_busy(self):
        with self._change:
            assert self._change.wait_for(lambda: self._running, timeout=60)

    def _run(self):
        while True:
            with self._change:
                self._change.notify_all()
                while not self._running and not self._is_closed:
                    self._change.wait()
                if not self._running:
                    return
                running = list(self._running)
            for job, tokens in running:
                while not self.gate.wait(timeout=0.01) and not job.is_cancelled:
                    pass
                self._step(job, tokens)

    def _step(self, job, tokens):
        error, goes_on = None, False
        if not job.is_cancelled:
            try:
                token = next(tokens)
                goes_on = job.receive(
                    Token(token, -0.5, [(token, -0.5), (1, -1.5)][: job.sampling.top])
                )
            except StopIteration:
                pass
            except Exception as failure:
                error = failure
        job.new = getattr(job, "new", 0) + 1
        if not goes_on or job.new >= job.max_new_tokens:
            with self._change:
                self._running = [x for x in self._running if x[0] is not job]
                self.ended.append(job)
            job.end(error)


class Log(list):
    """The lines of a log, for which a test can wait."""

    def __init__(self):
        super().__init__()
        self._change = threading.Condition()

    def append(self, line):
        with self._change:
            super().append(line)
            self._change.notify_all()

    def wait_for(self, beginning):
        """Returns the last line when it begins so."""
        with self._change:
            assert self._change.wait_for(lambda: self and self[-1].startswith(beginning), 60), self
            return self[-1]


class Running:
    """A server on a port of this machine."""

    def __init__(self, app, server, port):
        self.app, self.server, self.port = app, server, port

    def request(self, method, path, body=None, headers=None):
        """Returns the status, the headers and the content of an answer."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    @contextlib.contextmanager
    def answer(self, path, **fields):
        """Yields the answer to a request with these fields, which is not read yet."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, json.dumps(fields), JSON)
            yield connection.getresponse()

    def post(self, path, **fields):
        """Returns the status of a request with these fields, and what it holds as JSON."""
        with self.answer(path, **fields) as answer:
            return answer.status, json.loads(answer.read())

    def events(self, path, **fields):
        """Returns the events of a stream."""
        with self.answer(path, stream=True, **fields) as answer:
            content = answer.read().decode()
            assert answer.status == 200, content
        lines = content.split("\n\n")
        assert lines.pop() == "" and all(x.startswith("data: ") for x in lines)
        return [x.removeprefix("data: ") for x in lines]


@contextlib.contextmanager
def serving(generator=None, embedder=None, key=None, log=None):
    """Yields a `Running` server, which has ended after the block."""
    lines = Log() if log is None else log
    app = App(generator, embedder, key, lines.append)
    is_ready = threading.Event()
    sock = bind("127.0.0.1", 0)
    server = Server(app, is_ready.set)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        assert is_ready.wait(60)
        yield Running(app, server, sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()
        app.close()
        if app.engine is not None:
            app.engine.close(at_once=True)
