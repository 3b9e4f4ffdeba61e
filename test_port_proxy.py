"""Tests of port_proxy.py, in the order of its sections; on real sockets and raw bytes where behaviour is on the wire.

Every wait has a bound (`WAIT`), nothing sleeps to pass, and each test leaves its loop without tasks and connections.
"""

import argparse
import ast
import asyncio
import base64
import calendar
import collections
import contextlib
import ctypes
import errno
import gc
import gzip
import hashlib
import html
import io
import itertools
import json
import logging
import multiprocessing
import os
import platform
import random
import re
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from email.utils import parsedate
from http.cookies import SimpleCookie
from pathlib import Path
from unittest.mock import MagicMock, Mock
from urllib.parse import parse_qsl, quote, urlencode

try:
    import pytest
except ImportError:  # `python3 test_port_proxy.py bench` needs none
    if __name__ != "__main__":
        raise
    pytest = MagicMock()

import port_proxy
from port_proxy import (
    CHUNKED,
    Config,
    Framing,
    PortProxy,
    ProxyError,
    checked_config,
    find_app,
    find_route,
    parse_response,
    request_for_upstream,
)

HERE = Path(__file__).resolve().parent
PROGRAM = str(HERE / "port_proxy.py")
WAIT = 30.0
DEFAULT = Config()
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="this system has no /proc/net/tcp")
LIMIT_FLAGS = {flag: metavar for flag, metavar, _ in port_proxy.OPTIONS["limits and timeouts"]}
LIMITS = [name for name in Config._fields if name.startswith("max_") or name.endswith("_timeout")]


# ------ Tools: raw connections, upstreams that record what reached them, proxies in a loop of their own --------------


class Wire(contextlib.AbstractContextManager):
    """One end of a raw connection; every read has a bound."""

    def __init__(self, sock):
        sock.settimeout(WAIT)
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.buffer = b""

    @classmethod
    def to(cls, port, host="127.0.0.1", context=None):
        sock = socket.create_connection((host, port), WAIT)
        return cls(context.wrap_socket(sock, server_hostname="localhost") if context else sock)

    @classmethod
    def to_unix(cls, path):
        wire = cls(socket.socket(socket.AF_UNIX))
        wire.sock.connect(path)
        return wire

    def __exit__(self, *_):
        self.close()

    def send(self, *pieces):
        for piece in pieces:
            self.sock.sendall(piece)

    def offer(self, *pieces):
        """Send the pieces; the peer may close meanwhile, or take no more in time."""
        with contextlib.suppress(OSError):
            self.send(*pieces)

    def more(self):
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def until(self, mark):
        """All up to and including `mark`; what came instead, where the peer ends first."""
        while mark not in self.buffer:
            if not self.more():
                return self.exactly(len(self.buffer))
        return self.exactly(self.buffer.index(mark) + len(mark))

    def exactly(self, count):
        while len(self.buffer) < count and self.more():
            pass
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def rest(self):
        """All up to the peer's end; ConnectionResetError if that is no clean one."""
        while self.more():
            pass
        return self.exactly(len(self.buffer))

    def ends(self):
        """Whether nothing comes but the peer's end, or a reset."""
        with contextlib.suppress(ConnectionResetError):
            return self.rest() == b""
        return self.buffer == b""

    def ask(self, *pieces, **how):
        self.send(*pieces)
        return self.message(**how)

    def message(self, no_body=False, until_close=False):
        """One message: (start line, [(name, value)], body); AssertionError if its framing is broken."""
        head = self.until(b"\r\n\r\n")
        assert head.endswith(b"\r\n\r\n"), "no whole head but %r" % head
        lines = head[:-4].decode("latin-1").split("\r\n")
        fields = [tuple(line.split(": ", 1)) for line in lines[1:]]
        by_name = {name.lower(): value for name, value in fields}
        body, size = b"", None
        if by_name.get("transfer-encoding") == "chunked" and not no_body:
            while size != 0:
                size = int(self.until(b"\r\n")[:-2], 16)
                body += self.exactly(size)
                assert self.exactly(2) == b"\r\n"
        elif "content-length" in by_name and not no_body:
            body = self.exactly(int(by_name["content-length"]))
            assert len(body) == int(by_name["content-length"]), "the body is cut short"
        elif until_close:
            body = self.rest()
        return lines[0], fields, body

    def reset(self, app=None):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def end(self):
        with contextlib.suppress(OSError):  # the peer has ended it all before
            self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        self.sock.close()


def fields_of(message):
    return {name.lower(): value for name, value in message[1]}


def status_of(message):
    return int(message[0].split(" ")[1])


class Upstream:
    """A server; `serve(wire, upstream)` serves each connection in a thread, and adds requests to `messages`."""

    def __init__(self, serve, host="127.0.0.1", port=0):
        self.serve = serve
        self.messages, self.wires, self.failures = [], [], []
        self.connections, self.is_closing = 0, False
        self.told, self.happened, self.let_go = (threading.Event() for _ in range(3))
        self.listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        if port and ":" in host:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the port is taken for IPv4
        self.listener.bind((host, port))
        self.listener.listen(64)
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                wire = Wire(self.listener.accept()[0])
                wire.sock.settimeout(4 * WAIT)  # the test itself gives up before
                self.connections += 1
                self.wires.append(wire)
                self.threads.append(threading.Thread(target=self._serve, args=(wire,), daemon=True))
                self.threads[-1].start()

    def _serve(self, wire):
        try:
            self.serve(wire, self)
        except ConnectionError:
            pass  # the proxy may reset a connection to which the app still sends, once the client has left
        except Exception as error:
            if not (self.is_closing and isinstance(error, OSError)):
                self.failures.append(error)
        finally:
            wire.close()

    def close(self):
        self.is_closing = True
        self.let_go.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for wire in self.wires:
            with contextlib.suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(WAIT)


def answering(*answers):
    """Serve all requests of a connection with the given bytes, the last of them again and again."""

    def serve(wire, upstream):
        while wire.buffer or wire.more():
            upstream.messages.append(wire.message())
            wire.send(answers[min(len(upstream.messages), len(answers)) - 1])

    return serve


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Background:
    """An event loop in a thread, in which several proxies live; it records what the loop complains about."""

    def __init__(self):
        self.complaints = []
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT)

    def close(self):
        """Stop, and return the tasks that were left."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT)
        self.loop.close()
        all_tasks = getattr(asyncio, "all_tasks", None) or asyncio.Task.all_tasks  # 3.6
        return [task for task in all_tasks(self.loop) if not task.done()]


class ProxyAt:
    """A proxy at a port of this machine, in any process; `context` is set if its clients speak TLS."""

    context = None

    def __init__(self, port):
        self.port = port

    def wire(self):
        return Wire.to(self.port, context=self.context)

    def ask(self, raw, **how):
        """The answer to one raw request, on a connection of its own."""
        with self.wire() as wire:
            return wire.ask(raw, **how)

    def get(self, target, *lines, **how):
        return self.ask(request("GET", target, *lines), **how)

    @contextlib.contextmanager
    def sent(self, *pieces):
        """A connection on which these bytes have been sent."""
        with self.wire() as wire:
            wire.send(*pieces)
            yield wire


class Running(ProxyAt):
    """A proxy that accepts connections, in an event loop of this process."""

    def __init__(self, background, port=0, allow_hostnames=("*",), **options):
        self.background = background
        self.proxy = background.do(PortProxy(Config(port=port, allow_hostnames=allow_hostnames, **options)).start())
        super().__init__(self.proxy.port)

    def open_connections(self):
        """How many connections of clients the proxy has not closed yet."""
        return count_connections(local_port=self.port)

    @contextlib.contextmanager
    def tunnel(self, app, *pieces):
        """A connection on which the app has accepted a WebSocket handshake; the pieces are right behind that."""
        with self.sent(to(app, *HANDSHAKE), *pieces) as wire:
            assert status_of(wire.message(no_body=True)) == 101
            yield wire

    @contextlib.contextmanager
    def held(self):
        """Hold the proxy's loop meanwhile: all that happens outside is then seen at once."""
        arrived, go = threading.Event(), threading.Event()
        self.background.loop.call_soon_threadsafe(lambda: (arrived.set(), go.wait(WAIT)))
        assert arrived.wait(WAIT)
        try:
            yield
        finally:
            go.set()

    def close(self):
        self.background.do(self.proxy.close())


def own_sockets(local_port=None, remote_port=None):
    """The TCP sockets of this process with this port, one at a time (Linux); the kernel's table takes long to read."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, IndexError):
            if not os.readlink("/proc/self/fd/" + name).startswith("socket:"):  # `fromfd` would leave a copy open
                continue
            with socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as sock:  # a copy: the socket stays
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
                    continue  # the proxy's look at the owner of a port connects a UDP socket
                if (sock.getpeername()[1] if remote_port else sock.getsockname()[1]) == (remote_port or local_port):
                    yield sock


def count_connections(**port):
    """How many connections are open at their own end."""
    states = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] for sock in own_sockets(**port)]
    return sum(state in (1, 8) for state in states)  # ESTABLISHED, CLOSE_WAIT


def has_unread(port):
    """Whether a socket at this port has bytes that were not read, or connections that were not accepted."""
    return any(select.select([sock], [], [], 0)[0] for sock in own_sockets(local_port=port))


def unsent(port):
    """How many bytes on the way to this port are not acknowledged."""
    import fcntl  # which Windows has not

    counts = [fcntl.ioctl(sock, 0x5411, bytes(4)) for sock in own_sockets(remote_port=port)]  # SIOCOUTQ
    return sum(int.from_bytes(count, sys.byteorder) for count in counts)


def narrow(port, size=4096):
    """Make the kernel take little at a time on connections to this port, as a slow link would."""
    for sock in own_sockets(remote_port=port):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


@contextlib.contextmanager
def spawn(command, **popen):
    with subprocess.Popen(command, **popen) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process, stream=None):
    """The next line of a process's output, or of this stream of it; it is killed if none comes in time."""
    give_up = threading.Timer(WAIT, process.kill)
    give_up.start()
    try:
        return (stream or process.stdout).readline().decode()
    finally:
        give_up.cancel()


def request(method, target, *lines, body=b""):
    head = ("%s %s HTTP/1.1" % (method, target), "Host: here:8888") + lines + ("", "")
    return "\r\n".join(head).encode("latin-1") + body


def free_port():
    """A port that is not in use; from 32768 on, Linux may soon give it to an outgoing connection."""
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", random.randrange(10000, 32768)))
            return sock.getsockname()[1]


def eventually(condition, seconds=WAIT):
    """Wait until `condition()` is true, at most so long."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "this did not come about"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def background():
    background = Background()
    yield background
    assert not background.close()


@pytest.fixture
def start(background):
    """Start proxies; when the test is over they must end without a connection, a task or a complaint left."""
    started = []

    def start(**options):
        started.append(Running(background, **options))
        return started[-1]

    yield start
    for running in started:
        running.close()
        if sys.platform == "linux" and running.port:
            eventually(lambda running=running: not running.open_connections())
    complaints, background.complaints[:] = list(background.complaints), []
    assert not complaints


@pytest.fixture
def proxy(start):
    return start()


@pytest.fixture
def app(upstream):
    return upstream(answering(OK))


@pytest.fixture
def upstream():
    """Start upstreams; what their threads raised fails the test."""
    started = []

    def begin(serve, **how):
        started.append(Upstream(serve, **how))
        return started[-1]

    yield begin
    for one in started:
        one.close()
    assert [failure for one in started for failure in one.failures] == []


def case_id(case):
    return re.sub(r"[^ -~]", ".", repr(case))[:60]


def status_of_error(call, *arguments):
    with pytest.raises(ProxyError) as caught:
        call(*arguments)
    assert caught.value.detail.endswith(".")
    return caught.value.status


HANDSHAKE = (
    "Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: b\r\n\r\n"
)
VISIT = ("Accept: text/html", "Sec-Fetch-Mode: navigate")  # a browser opens a page


def to(app, *lines, method="GET", path="/", body=b"", version="1.1", form="/proxy/%d"):
    """A request to an app by its port; `form` says how the port is written."""
    raw = request(method, form % app.port + path, *lines, body=body)
    return raw if version == "1.1" else raw.replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1)


def ok(body, *lines):
    head = ("HTTP/1.1 200 OK",) + lines + ("Content-Length: %d" % len(body), "", "")
    return "\r\n".join(head).encode() + body


def script(*steps):
    """Serve one connection step by step: send the bytes, call the functions with (wire, app)."""

    def serve(wire, app):
        for step in steps:
            wire.send(step) if isinstance(step, bytes) else step(wire, app)

    return serve


def read_head(wire, app):
    wire.until(b"\r\n\r\n")


def read_message(wire, app):
    app.messages.append(wire.message())


def read_to_the_end(wire, app):
    """Add all that comes up to the end or a reset to the app's messages."""
    with contextlib.suppress(OSError):
        while wire.more():
            pass
    app.messages.append(wire.buffer)


def tell(wire, app):
    app.told.set()


def end(wire, app):
    wire.end()


def wait(wire, app):
    app.happened.wait(WAIT)


def hold(wire, app):
    app.let_go.wait(4 * WAIT)


def once(answer):
    return script(read_message, answer)


def serve_sockets(wire, app, answer=OK):
    """Open WebSockets, and answer all other requests."""
    while wire.buffer or wire.more():
        read_message(wire, app)
        opens = "sec-websocket-key" in fields_of(app.messages[-1])
        wire.send(SWITCHING if opens else answer)
        if opens:
            wire.rest()
            return


def in_turn(*scripts):
    """Serve each connection with a script of its own, further ones with the last."""
    return lambda wire, app: scripts[min(app.connections, len(scripts)) - 1](wire, app)


@contextlib.contextmanager
def in_thread(call, *arguments):
    """Run a call in a thread meanwhile; it must end soon after the block."""
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    yield thread
    thread.join(WAIT)
    assert not thread.is_alive()


@contextlib.contextmanager
def app_alone_at(host, upstream, reached):
    """An app at this address; at loopback addresses that do not reach it nobody else has its port meanwhile."""
    while True:
        try:
            app = upstream(answering(OK), host=host)
        except OSError:
            pytest.skip("this machine has no address %s" % host)
        with contextlib.ExitStack() as claims:
            try:
                for other in {"127.0.0.1", "::1"}.difference(reached):
                    claim = claims.enter_context(socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET))
                    claim.bind((other, app.port))  # it never listens, so connections are refused
            except OSError as error:
                if error.errno == errno.EADDRINUSE:  # by a proxy, say, that had the same port at the other address
                    continue
            yield app
            return


@contextlib.contextmanager
def taken_port(address="127.0.0.1", listens=False):
    """A port of this address that is taken meanwhile; connections to it are refused, unless it listens."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            pytest.skip("this machine has no address " + address)
        if listens:
            sock.listen(1)
        yield sock.getsockname()[1]


# ------ The file as a whole ------------------------------------------------------------------------------------------


class TestFile:
    README = (HERE / "README.md").read_text(encoding="utf-8")
    SOURCE = Path(PROGRAM).read_text(encoding="utf-8")

    def test_sections_use_only_names_from_above(self):
        """No module-level name is used, not even inside a function, in a section above the one that defines it."""
        lines, defined = ["", *self.SOURCE.split("\n")], {}
        section = list(itertools.accumulate(line.startswith("# ----") for line in lines))  # counts both borders
        assert section[-1] >= 24
        for number, line in enumerate(lines):
            for names in re.findall(r"^(?:async def |def |class |)(\w+(?:, \w+)*)(?:[(:]| = )", line):
                defined.update(dict.fromkeys(names.split(", "), section[number]))
        for node in ast.walk(ast.parse(self.SOURCE)):
            if isinstance(node, ast.Name) and node.id in defined:
                assert defined[node.id] <= section[node.lineno], "line %d uses %s" % (node.lineno, node.id)

    def test_docstring_lists_the_sections(self):
        titles = re.findall(r"^# -{20,}\n# ([A-Za-z ]+?)(?:[:,].*)?\n# -{20,}$", self.SOURCE, re.M)
        listed = re.search(r"names above it: ([a-z, \n]+)\.", port_proxy.__doc__).group(1)
        assert [title.lower() for title in titles] == [name.strip() for name in listed.replace("\n", " ").split(",")]

    def test_import_has_no_side_effect(self):
        """It needs the standard library alone, starts no thread and configures no logging."""
        code = (
            "import sys, threading, logging; sys.path.insert(0, %r); before = set(sys.modules); import port_proxy\n"
            "new = [m for m in set(sys.modules) - before - {'port_proxy'}"
            " if 'site-packages' in (getattr(sys.modules[m], '__file__', '') or '')]\n"
            "assert not new, new; assert threading.active_count() == 1\n"
            "assert not logging.getLogger('port_proxy').handlers\n"
        ) % str(HERE)
        command = [sys.executable, "-I", "-S", "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=WAIT)
        assert (done.returncode, done.stdout) == (0, b"")

    def test_public_names_are_documented(self):
        assert set(port_proxy.__all__) == {"Config", "PortProxy", "ProxyError", "main"}
        assert all(getattr(port_proxy, name).__doc__ for name in port_proxy.__all__)

    def test_readme_names_every_option_of_the_help(self):
        flags = port_proxy.METAVARS.keys() - LIMIT_FLAGS.keys()
        missing = [flag for flag in flags if not re.search(r"(?<![\w-])%s(?![\w-])" % flag, self.README)]
        assert missing == []

    def test_readme_names_every_field_that_differs_from_its_option(self):
        embedding = self.README[self.README.index("## Embedding") :]
        for field, flag in port_proxy.FLAGS.items():
            if flag != "--" + field.replace("_", "-") and field != "hub":
                assert field + "`" in embedding or field + "=" in embedding

    def test_readme_code_for_embedding_runs(self):
        code = re.search(r"## Embedding.*?```python\n(.*?)```", self.README, re.DOTALL).group(1)
        if sys.version_info < (3, 7):
            code = re.sub(r"asyncio\.run\(serve\(\)\)  # Python 3\.6: ", "", code)
        command = [sys.executable, "-c", code.replace("sleep(3600)", "sleep(0)")]
        done = subprocess.run(command, cwd=str(HERE), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT)
        assert re.fullmatch(rb"http://localhost:(\d+)/proxy/ \1\r?\n", done.stdout)
        assert (done.returncode, done.stderr) == (0, b"")


# ------ Configuration ------------------------------------------------------------------------------------------------


class TestConfig:
    @pytest.mark.parametrize("field, given, normal", [
        ("base", "/user/ana/proxy/", "/user/ana/proxy"), ("base", "/", ""), ("base", "", ""),
        ("base", "/user/al%40ice", "/user/al%40ice"), ("base", "/a/...", "/a/..."), ("upstream_tls", ["A:1"], ("a:1",)),
        ("host_allowlist", ["[FE80::1]", "a"], ("fe80::1", "a")), ("host_allowlist", bool, bool), ("token", "", ""),
        ("allow_hostnames", ["A", "*.b"], ("a", "*.b")), ("domains", {"A.b"}, ("a.b",)), ("head_timeout", 3, 3),
        ("domains", ["a-1.b", "1.a"], ("a-1.b", "1.a")), ("allow_origins", ["*", "https://A:443"], ("*", "https://a")),
        ("trusted_proxies", ["unix"], ("unix",)), ("certfile", Path("a"), Path("a")), ("token", "any", "any"),
    ], ids=case_id)  # fmt: skip
    def test_value_gets_its_normal_form(self, field, given, normal):
        assert getattr(PortProxy(Config(**{field: given})).config, field) == normal

    @pytest.mark.parametrize("field, value", [(field, value) for field, values in (
        ("base", "proxy /a//b // /a/../b /a/%2E /.%2e/a /a?b /a#b /\xe4 /a;b /a\\b http://a/".split()),
        ("base", ["/a b", "/a\r\nX: y"]), ("keyfile", ["a"]), ("client_ca", ["a"]),
        ("token", ["x" * 15, "a b" * 9, "\xe4" * 16]),
    ) for value in values] + [(field, [value]) for field, values in (
        ("host_allowlist", "a:80 user@host a[bc]d [::1 ::1] [] http://a \xe4".split() + ["", "a b", "a\n"]),
        ("allow_hostnames", ["a b"]), ("trusted_proxies", ["a"]),
        ("domains", "127.0.0.1 a.1 . a. .a a..b -a a-.b a_b *.a a:80 [::1] a/ \xe4".split() + ["", "a b"]),
        ("allow_origins", "null a http:// http://a/ http://a:b http://% http://[a] http://u@a ftp://a".split()),
        ("upstream_tls", "x 0 a:b localhost:70000 1/ absolute/1 1?x".split() + [""]),
    ) for value in values], ids=case_id)  # fmt: skip
    def test_bad_value_is_refused_with_the_name_of_the_option(self, field, value):
        with pytest.raises(ValueError, match=port_proxy.FLAGS[field].lstrip("-")):
            PortProxy(Config(**{field: value}))

    @pytest.mark.parametrize("kind, field, value", [(kind, field, value) for kind, field, values in (
        ("a number from 0 to 65535", "port", ["80", 80.0, None, -1, 65536, True]),
        ("a number above 0", "head_timeout", ["3", 0, float("nan"), True]),
        ("a whole number above 0", "max_fields", ["3", 0, 1.5, True]),
        ("a string", "bind", [None]), ("a string", "base", [b"/a"]), ("a string", "token", [5]),
        ("a path", "certfile", [5]), ("a Hub", "hub", [{}]), ("an asynchronous callable", "authorize", ["me"]),
        ("yes or no, or True or False", "whole_origin", ["no"]), ("True or False", "preserve_host", [1]),
        ("True or False", "any_owner", [None]), ("a sequence of strings", "upstream_tls", [(8443,)]),
        ("a sequence of strings", "domains", [None]), ("a sequence of strings", "allow_origins", ["*"]),
        ("a sequence of strings", "host_allowlist", ["a", [b"a"]]), ("a sequence of strings", "trusted_proxies", [1]),
    ) for value in values], ids=case_id)  # fmt: skip
    def test_value_of_another_type_is_refused(self, kind, field, value):
        """Otherwise whole_origin="no" would mean yes. The value may be a secret."""
        with pytest.raises(ValueError) as caught:
            PortProxy(Config(**{field: value}))
        assert str(caught.value) == "%s must be %s" % (port_proxy.FLAGS[field], kind)


# ------ Routes -------------------------------------------------------------------------------------------------------


def route_of(upstream, upstream_tls=()):
    return find_route(Config(upstream_tls=upstream_tls), "/proxy/%s/" % upstream)[0]


class TestRoutes:
    @pytest.mark.parametrize("base, target, host, port, path", [("/proxy", *case) for case in (
        ("/proxy/8080/a/b?q", "localhost", 8080, "/a/b"), ("/proxy/8080", "localhost", 8080, ""),
        ("/proxy/8080?q=/x", "localhost", 8080, ""), ("/proxy/absolute/8080", "localhost", 8080, ""),
        ("/proxy/65535/%2F//..%2f/%20?", "localhost", 65535, "/%2F//..%2f/%20"),
        ("/proxy/8080/%zz/%;a=b,c|d\"<>{}^`\\'[]?e=f?g", "localhost", 8080, "/%zz/%;a=b,c|d\"<>{}^`\\'[]"),
        ("/proxy/DB1.example.org:81/a", "db1.example.org", 81, "/a"), ("/proxy/[::1]:81/a", "::1", 81, "/a"),
        ("/proxy/absolute/h_1-x:81/a", "h_1-x", 81, "/a"), ("/proxy/absolute/[FE80::1]:81/", "fe80::1", 81, "/"),
    )] + [
        ("", "/8080/a", "localhost", 8080, "/a"), ("", "/absolute/8080/a", "localhost", 8080, "/a"),
        ("/user/al%40ice.x%2By", "/%75ser/al%40ice.x%2by/8080/a", "localhost", 8080, "/a"),
    ], ids=case_id)
    def test_route_is_found_in_the_raw_target(self, base, target, host, port, path):
        before, mark, query = target.partition("?")
        prefix = before[: len(before) - len(path)]
        route, found_path, found_query = find_route(Config(base=base), target)
        assert (route.host, route.port, route.prefix) == (host, port, prefix)
        assert route.absolute is ("/absolute/" in prefix)
        assert (found_path, found_query) == (path, mark + query)

    @pytest.mark.parametrize("status, target", [(404, target) for target in """
        / /8080/ /proxyx/8080/ /Proxy/8080/ //proxy/8080/ /proxy//8080/ /a/../proxy/8080/ /proxy/./8080/ /proxy%2F8080/
        /proxy/%38080/ /proxy/8080%2F /proxy/+80/ /proxy/08080/ /proxy/0/ /proxy/65536/ /proxy/8080;a/ /proxy/8080:/
        /proxy/:8080/ /proxy/a/ /proxy/a:80:81/ /proxy/u@a:80/ /proxy/a%2eb:80/ /proxy/localhost%3A80/ /proxy/.a:80/
        /proxy/-a:80/ /proxy/::1:80/ /proxy/[::1]/ /proxy/[]:80/ /proxy/[::1%25eth0]:80/ /proxy/[v1.a]:80/
        /proxy/absolute/ /proxy/absolute/absolute/8080/ /proxy/ABSOLUTE/8080/ /proxy/a*:80/
    """.split()] + [(400, "/proxy/[1.2.3.4]:80/"), (400, "/proxy/[:::]:80/")])
    def test_target_without_a_valid_port_or_host_is_refused(self, status, target):
        assert status_of_error(find_route, DEFAULT, target) == status

    @pytest.mark.parametrize("form", ["/proxy/8080", "/proxy/absolute/8080"])
    def test_dot_segments_that_leave_the_app_are_refused(self, form):
        for path in "/.. /../ /../9090/ /a/../.. /./.. /%2e%2e/ /%2E./ /.%2e /a/%2e%2e/%2E%2E/b /a/../../8080/".split():
            assert status_of_error(find_route, DEFAULT, form + path) == 400, path
        for path in "/. /%2e/a /a/.. /a/%2e%2E/ /a/b/../../c /a//../.. /... /..a /a?/../.. /..%2f".split():
            route, found, query = find_route(DEFAULT, form + path)
            assert (route.prefix, found + query) == (form, path)

    @pytest.mark.parametrize("upstream, authority, machine, scheme", [
        ("8080", "localhost:8080", "this machine", "http"), ("127.0.0.1:80", "127.0.0.1:80", "this machine", "http"),
        ("LocalHost:8443", "localhost:8443", "this machine", "https"), ("DB:8444", "db:8444", "db", "https"),
        ("[::1]:8443", "[::1]:8443", "this machine", "https"), ("127.0.0.2:80", "127.0.0.2:80", "127.0.0.2", "http"),
        ("8445", "localhost:8445", "this machine", "https"), ("8446", "localhost:8446", "this machine", "http"),
        ("db:8443", "db:8443", "db", "http"), ("[FE80::1]:8447", "[fe80::1]:8447", "fe80::1", "https"),
    ])
    def test_route_names_its_upstream_and_how_it_speaks(self, upstream, authority, machine, scheme):
        route = route_of(upstream, ("8443", "db:8444", "localhost:8445", "127.0.0.1:8446", "[fe80::1]:8447"))
        assert (route.authority, route.scheme) == (authority, scheme)
        assert route.place == "port %d of %s" % (route.port, machine)
        assert route.is_local is (machine == "this machine")

    @pytest.mark.parametrize("base, path, below", [
        ("/proxy", "/proxy", ""), ("/proxy", "/proxy/", "/"), ("", "/", "/"), ("/al@ice", "/al%40ice", ""),
        ("/proxy", "/%70roxy/%61", "/%61"), ("/al%40ice", "/al@ice/x", "/x"), ("/proxy", "*", None),
        ("/proxy", "/proxyx", None), ("/proxy", "/prox", None), ("/a/b", "/a%2Fb/c", None), ("/a/b", "/a", None),
    ])
    def test_path_below_the_base_is_found_without_decoding_the_rest(self, base, path, below):
        assert port_proxy.path_below(base, path) == below
        assert port_proxy.is_base(base, path + "?a") is (below in ("", "/"))
        if below in ("", "/"):
            assert find_route(Config(base=base), path + "?a") == (None, below, "?a")

    @pytest.mark.parametrize("pattern, inside, outside", [
        ("EXACT", "exact localhost 127.0.0.1 ::1", "exact. xexact exact.a 127.1 0 0.0.0.0 127.0.0.2 localhost. ::"),
        ("*.Example.org", "a.example.org a.b.example.org", "example.org a.example.org. a.example.orgx .example.org"),
        ("node*", "node node7", "node.evil.example node7.evil anode"), ("n?de", "node", "n.de nde"),
        ("db-*.a.*", "db-1.a.org db-.a.b", "db-1.x.a.org db-1.a.b.c"), ("*", "a a.b 10.1.2.3 fe80::1 a.", ""),
        ("10.1.*", "10.1.2.3", "10.2.2.3 10.1.evil.a 10.1.2.3.evil.a 10.1. 10.1.2.3.4 10.1.2.333 10.1.2.03"),
        ("1*", "1.2.3.4 127.9.9.9", "1 1.evil 1x"), ("*.1.2.3", "9.1.2.3", "a.1.2.3 9.9.1.2.3"),
        ("[2001:DB8::7]", "2001:db8::7", "2001:db8::8 0:0:0:0:0:0:0:1"), ("fe80::?", "fe80::1", "fe80::12 fe80:::"),
        ("fe80:*", "fe80:1", "fe80::1 fe80:1:2"), ("fe*", "fe80", "fe80::1"),
    ])
    def test_host_is_allowed_if_the_pattern_matches(self, pattern, inside, outside):
        """A wildcard matches no dot, so that a page elsewhere cannot make a name that matches."""
        config, route = PortProxy(Config(host_allowlist=[pattern])).config, route_of("1")
        for host in inside.split():
            port_proxy.check_route(route._replace(host=host), config)
        for host in outside.split():
            assert status_of_error(port_proxy.check_route, route._replace(host=host), config) == 403, host

    @pytest.mark.parametrize("authority, port", [
        ("8080.localhost:8888", 8080), ("8080.LOCALHOST", 8080), ("1.localhost:1", 1), ("65535.localhost", 65535),
        ("8080.apps.example.org", 8080), ("8080.localhost:", 8080),
    ] + [(authority, 0) for authority in (
        "65536.localhost", "08080.localhost", "0.localhost", "+80.localhost", "8080.localhost.", "localhost:8888",
        "8080.localhost.evil.example", "a.8080.localhost", "8080.a.b", "8080", "127.0.0.1:8888", "[::1]:8888", "",
    )])
    def test_port_in_host_needs_a_domain_of_ours(self, authority, port):
        assert port_proxy.port_in_host(authority, ("localhost", "apps.example.org")) == port
        assert port_proxy.port_in_host(authority, ()) == 0

    def test_missing_slash_is_added_by_a_redirect(self, proxy, app):
        """But not to a POST, nor in the absolute forms."""
        for method, form, query in (
            ("GET", "/proxy/%d", "?<b>"), ("HEAD", "/proxy/%d", "?a=%2F&b"), ("GET", "/proxy/localhost:%d", "?\xe4"),
        ):
            answer = proxy.ask(to(app, method=method, form=form, path=query), no_body=method == "HEAD")
            assert result_of(answer) == (302, form % app.port + "/" + query)
            assert b"<b>" not in answer[2]
        assert status_of(proxy.ask(to(app, "Content-Length: 1", path=""))) == 302  # the body never comes
        assert app.connections == 0
        assert status_of(proxy.ask(to(app, "Content-Length: 0", method="POST", path="?a"))) == 200
        assert status_of(proxy.ask(to(app, path="?a", form="/proxy/absolute/%d"))) == 200
        lines = ["POST /?a HTTP/1.1", "GET /proxy/absolute/%d?a HTTP/1.1" % app.port]
        assert [message[0] for message in app.messages] == lines

    def test_host_outside_the_allowlist_is_refused(self, start, app):
        """Before anything is resolved or connected (CVE-2022-21697, CVE-2024-28179). A callable gets localhost too."""
        asked, hosts = [], ["127.0.0.2", "absolute/127.0.0.2", "nowhere.invalid", "2130706433", "[::ffff:127.0.0.1]"]
        for allowlist in ((), ("*.example.org",), asked.append):
            proxy = start(host_allowlist=allowlist)
            for host in hosts:
                for lines in ((), HANDSHAKE):
                    assert_says(proxy.get("/proxy/%s:%d/" % (host, app.port), *lines), 403, b"--host-allowlist")
        assert status_of(proxy.ask(to(app))) == 403
        assert asked[::2] == [host.replace("absolute/", "").strip("[]") for host in hosts] + ["localhost"]
        assert app.connections == 0
        assert status_of(start(host_allowlist=bool).ask(to(app))) == 200


# ------ Messages -----------------------------------------------------------------------------------------------------

BAD_REQUESTS = [(400, line + b"\r\nHost: a\r\n\r\n") for line in (
    b"GET /", b"GET / HTTP/1.1.1", b"GET / http/1.1", b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET / HTTP/1.1 ",
    b" GET / HTTP/1.1", b"GET\t/\tHTTP/1.1", b"GET / HTTP/1.\xb2", b"G(T / HTTP/1.1", b"\xc7ET / HTTP/1.1",
    b"GET /\x1f HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /#a HTTP/1.1", b"GET a HTTP/1.1", b"GET / HTTP/1.1\rX: y",
    b"GET * HTTP/1.1", b"GET ftp://a/ HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET http://u:p@a:1/ HTTP/1.1",
)] + [(400, b"GET / HTTP/1.1\r\n" + fields + b"\r\n\r\n") for fields in (
    b"", b"Host: a\r\nHost: a", b"Host:", b"Host: a b", b"Host : a", b"Host\t: a", b" Host: a",
    b"Host: a\r\n: x", b"Host: a\r\nX", b"Host: a\r\n X: y", b"Host: a\r\nX: y\r\n\tz", b"Host: a\r\nX: \x00",
    b"Host: a\r\nX: a\x0bb", b"Host: a\r\nX: a\rb", b"Host: a\r\nX: a\nb: c", b"Host: a\r\nX\xe4: b",
    b"Host: a\r\nX(: b", b"Host: a\r\nX: \x7f", b"Host: a\r\nOrigin: http://a\r\nOrigin: http://b",
)] + [(400, b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") for host in (
    *b":80 a:b a:123456 u@a ::1 [::1 [v1.a] a/ a? \xe4".split(), b"a" * 256, b"[" + 46 * b":" + b"]",
)] + [
    (400, b"GET / HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n"), (405, b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"),
    (414, request("GET", "/" + "a" * DEFAULT.max_target_bytes)),
    (431, request("GET", "/", *["X: y"] * DEFAULT.max_fields)),
    (505, request("GET", "/").replace(b"1.1", b"0.9")), (505, request("GET", "/").replace(b"1.1", b"1.2")),
]
BAD_RESPONSES = [head + b"\r\n\r\n" for head in (
    b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1  200 OK", b"HTTP/2 200 OK", b"<h1>", b"",
    b"HTTP/1.2 200 OK", b"http/1.1 200 OK", b"HTTP/1.1 2\xb20 OK", b"HTTP/1.1 200 O\x00K", b"HTTP/1.1 200 OK\nA: b\n\n",
    b"HTTP/1.1 200 OK\r\nA b : c", b"HTTP/1.1 200 OK\r\nA: b\r\n c", b"HTTP/1.1 200 OK\r\nA : b\r\n c: d",
    b"HTTP/1.1 200 OK\r\n : b", b"HTTP/1.1 200 OK\r\nA : b\x00",
)]
PARTIAL_HEADS = [(True, 400, head) for head in (
    b"GET / HTTP/1.1\r\nX: a\rb", b"GET / HTTP/1.1\r\nX: a\x00", b"GET / HTTP/1.1\r\nX: a\n", b"GET /\r\n", b"\x16",
    b"GET / HTTP/1.1\r\nX: a\x7f", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\n\rX", b"GET \xe4\xff  HTTP/1.1\r\n", b"\n",
)] + [(False, 400, head) for head in (
    b"I", b"<", b"HTTP1", b"h", b"\r", b"HTTP/1.1 200 OK\n", b"HTTP/1.1 200 OK\r\nX: a\x00",
)] + [
    (True, 505, b"PRI * HTTP/2.0\r\n"), (True, 414, b"G" * (DEFAULT.max_target_bytes + 1)),
    (True, 414, b"GET /" + b"a" * DEFAULT.max_target_bytes), (True, 431, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12000),
    (True, 431, b"GET / HTTP/1.1\r\nX: " + b"a" * DEFAULT.max_head_bytes),
    (False, 431, b"HTTP/1.1 200 OK\r\nX: " + b"a" * DEFAULT.max_head_bytes),
]
UPGRADE = ["Connection: Upgrade", "Upgrade: websocket"]
KEPT = "keep_alive is_replayable"  # flags of a request
PAGE = "is_navigation is_page_visit " + KEPT


def response_of(minor, lines, status=200, method="GET"):
    head = ["HTTP/1.%s %d" % (minor, status), *lines, "", ""]
    return parse_response("\r\n".join(head).encode("latin-1"), method, DEFAULT)


def parsed(raw, address="192.0.2.7", scheme="http", **options):
    return port_proxy.parse_request(raw, address, scheme, checked_config(Config(**options)))


class TestMessages:
    @pytest.mark.parametrize("head, method, target, authority", [
        (b"GET / HTTP/1.1\r\nHost: a", "GET", "/", "a"), (b"GET / HTTP/1.0", "GET", "/", ""),
        (b"get /%2F//a?b=%20|{}^`\"\\ HTTP/1.1\r\nhOsT:a:80", "get", "/%2F//a?b=%20|{}^`\"\\", "a:80"),
        (b"OPTIONS * HTTP/1.1\r\nHost: [::1]:8888", "OPTIONS", "*", "[::1]:8888"),
        (b"GET /\xc3\xa9?\xff\x80 HTTP/1.1\r\nHost: a", "GET", "/\xc3\xa9?\xff\x80", "a"),
        (b"GET http://b:1/x?y HTTP/1.1\r\nHost: a", "GET", "/x?y", "b:1"),
        (b"GET HTTPS://b HTTP/1.1\r\nHost: a", "GET", "/", "b"),
        (b"GET http://b?q=/ HTTP/1.1\r\nHost: a", "GET", "/?q=/", "b"),
        (b"OPTIONS http://b HTTP/1.1\r\nHost: a", "OPTIONS", "*", "b"),
        (b"M-A / HTTP/1.1\r\nHost: \t a \t\r\nX:\r\nx: b\xe4\xff \tc\r\n!#$%&'*+-.^_`|~1: y", "M-A", "/", "a"),
    ] + [(b"GET / HTTP/1.1\r\nHost: " + host.encode(), "GET", "/", host) for host in (
        "a:", "1.2.3.4", "[::1]", "a_b-c.~!$&'()*+,;=%20", 255 * "a",
    )], ids=case_id)
    def test_request_head_is_parsed(self, head, method, target, authority):
        one = parsed(head + b"\r\n\r\n")
        first, *fields = head.decode("latin-1").split("\r\n")
        assert (one.method, one.target, one.authority, one.minor) == (method, target, authority, first[-1])
        assert one.headers.lines == fields

    @pytest.mark.parametrize("raw, expected", [
        (b"HTTP/1.0 404 \r\nA: b\r\n\r\n", (404, "", ["A: b"])), (b"HTTP/1.1 599\r\n\r\n", (599, "", [])),
        (b"HTTP/1.1 200 Sch\xf6n \t ja\r\n\r\n", (200, "Sch\xf6n \t ja", [])),
        (b"HTTP/1.1 999 OK\r\nA : b\r\nC\t \t: d e : f\r\n\r\n", (999, "OK", ["A: b", "C: d e : f"])),
    ], ids=case_id)
    def test_response_head_is_parsed(self, raw, expected):
        one = parse_response(raw, "GET", DEFAULT)
        assert (one.status, one.reason, one.headers.lines) == expected

    @pytest.mark.parametrize("raw", BAD_RESPONSES, ids=case_id)
    def test_bad_response_head_is_refused(self, raw):
        assert status_of_error(parse_response, raw, "GET", DEFAULT) == 400

    @pytest.mark.parametrize("line, name, values, tokens", [
        ("A: 1, b\r\nB: 2\r\na:C ,,", "a", ["1, b", "C ,,"], {"1", "b", "c", ""}), ("C:", "c", [""], {""}),
        ("A:\t b \t", "a", ["b"], {"b"}), ("A: b", "d", [], set()), ("C: a,\tB-b", "c", ["a,\tB-b"], {"a", "b-b"}),
    ])
    def test_headers_give_all_values_the_last_value_and_tokens(self, line, name, values, tokens):
        headers = port_proxy.Headers(line + "\r\n\r\n", DEFAULT)
        assert (headers.get_all(name), headers.get(name)) == (values, values[-1] if values else "")
        assert headers.tokens(name) == tokens

    @pytest.mark.parametrize("minor, lines, framing", [
        ("1", [], None), ("1", ["Transfer-Encoding: Chunked"], CHUNKED),
    ] + [
        (minor, lines, Framing("length", length)) for minor, lines, length in (
            ("1", ["Content-Length: 0"], 0), ("0", ["Content-Length: 17"], 17), ("1", ["Content-Length: 5, 5"], 5),
            ("1", ["content-length: 5", "Content-Length: 5"], 5), ("1", ["Content-Length: 007"], 7),
            ("1", ["Content-Length: " + "9" * 18], 10**18 - 1),
        )
    ], ids=case_id)
    def test_message_without_a_declared_body_has_none_or_one_until_close(self, minor, lines, framing):
        for method in "POST PUT PATCH DELETE OPTIONS GET HEAD PROPFIND TRACE FROB get".split():
            assert asked_for("/", *lines, method=method, minor=minor).framing == (framing or port_proxy.NO_BODY)
        for status, method in ((200, "GET"), (200, "POST"), (404, "GET")):
            assert response_of(minor, lines, status, method).framing == (framing or port_proxy.UNTIL_CLOSE)
        for status, method in [(200, "HEAD"), (404, "HEAD")] + [(code, "GET") for code in (100, 101, 103, 204, 304)]:
            assert response_of(minor, lines, status, method).framing == port_proxy.NO_BODY

    @pytest.mark.parametrize("status, minor, lines", [(400, "1", ["Content-Length: " + value]) for value in (
        "", "+5", "-1", "5 5", "0x5", "5_0", "5.0", "\xb2", "1" * 19, "5, 6", "5,", ",5", "5;", "5, 05", "\xa05",
    )] + [
        (400, "1", ["Content-Length: 5", "Content-Length: 6"]), (400, "0", ["Transfer-Encoding: chunked"]),
        (400, "1", ["Transfer-Encoding: chunked", "Content-Length: 0"]), (400, "1", ["Transfer-Encoding: chunked"] * 2),
    ] + [(501, "1", ["Transfer-Encoding: " + coding]) for coding in (
        "gzip, chunked", "chunked, chunked", "identity", "", "xchunked", "chunked;q=1", "\xa0chunked",
    )], ids=case_id)
    def test_doubtful_framing_is_refused(self, status, minor, lines):
        raw = request("POST", "/", *lines).replace(b"HTTP/1.1", b"HTTP/1." + minor.encode())
        assert status_of_error(parsed, raw) == status
        for code, method in ((200, "GET"), (200, "HEAD"), (204, "GET"), (304, "GET")):
            assert status_of_error(response_of, minor, lines, code, method) in (status, 400)

    @pytest.mark.parametrize("is_request, status, head", PARTIAL_HEADS, ids=case_id)
    def test_partial_head_is_refused_at_the_byte_that_makes_it_wrong(self, is_request, status, head):
        """Whether the last byte comes with all others or alone; the bytes before it are checked by then."""
        for end in range(1, len(head) if len(head) < 100 else 0):
            port_proxy.check_partial_head(head[:end], end - 1, is_request, DEFAULT)
        for checked in (0, len(head) - 1):
            assert status_of_error(port_proxy.check_partial_head, head, checked, is_request, DEFAULT) == status

    def test_long_garbage_is_refused_in_linear_time(self):
        """Patterns with two ways to match the same text would take minutes for these."""
        begun = time.process_time()
        for filler in (b" ", b"\t", b"a", b"a:", b",", b";", b"/", b"\r\nA: b", b"."):
            long = filler * (60000 // len(filler))
            for before, behind in (
                (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\x00"), (b"GET ", b"\x00 HTTP/1.1"), (b"", b"\x00"),
            ):
                assert status_of_error(parsed, before + long + behind + b"\r\n\r\n") in (400, 431)
        assert time.process_time() - begun < 20

    @pytest.mark.parametrize("methods, minor, lines, flags", [
        ("GET HEAD OPTIONS PUT DELETE PROPFIND", "1", [], KEPT), ("POST PATCH FROB get", "1", [], "keep_alive"),
        ("PUT", "1", ["Content-Length: 3"], "keep_alive"), ("GET", "0", ["Connection: keep-alive"], "is_replayable"),
        ("POST", "1", UPGRADE, "keep_alive"), ("GET", "0", UPGRADE, "is_replayable"),
        ("POST", "1", VISIT, "is_navigation keep_alive"), ("GET HEAD", "1", ["Accept: text/html"], PAGE),
    ] + [("GET", "1", *case) for case in (
        (["Transfer-Encoding: chunked"], "keep_alive"), (["Connection: closed"], KEPT), (VISIT, PAGE),
        (["Connection: a, CLOSE"], "is_replayable"), (["Connection: a", "Connection: close"], "is_replayable"),
        (["connection: a, UPGRADE", "upgrade: WebSocket"], "is_websocket " + KEPT), (UPGRADE, "is_websocket " + KEPT),
        (["Connection: a"] + UPGRADE, "is_websocket " + KEPT), (UPGRADE[1:], KEPT), (UPGRADE[:1], KEPT),
        (["Connection: Upgrade", "Upgrade: h2c, websocket"], KEPT), (UPGRADE + UPGRADE[1:], KEPT),
        (["Accept: a/b, TEXT/HTML;q=0.9"], PAGE), (["Accept: a/b", "Accept: text/html"], PAGE),
        (["Accept: text/html", "Sec-Fetch-Mode: cors"], KEPT), (["Accept: */*", "Sec-Fetch-Mode: navigate"], KEPT),
        (["Accept: text/html"] + UPGRADE, "is_websocket is_navigation " + KEPT),
    )], ids=case_id)
    def test_head_tells_what_kind_of_request_it_is(self, methods, minor, lines, flags):
        for method in methods.split():
            one = asked_for("/proxy/8080/", *lines, method=method, minor=minor)
            for name in ("is_websocket", "is_navigation", "is_page_visit", "keep_alive", "is_replayable"):
                assert getattr(one, name) is (name in flags.split()), name
        assert response_of(minor, lines).is_reusable is ("keep_alive" in flags)

    @pytest.mark.parametrize("own, origin, authority", [(True, *case) for case in (
        ("http://here:8888", "here:8888"), ("https://here:8888", "here:8888"), ("HTTP://HERE:8888", "here:8888"),
        ("http://here:8888", "HERE:8888"), ("http://here", "here:80"), ("http://here:80", "here"),
        ("https://here", "here:443"), ("https://here", "here"), ("http://[::1]:1", "[::1]:1"),
    )] + [(False, *case) for case in (
        ("http://here:443", "here"), ("https://here:80", "here"), ("http://here:8889", "here:8888"), ("", ""),
        ("http://localhost", "80.localhost"), ("null", "here"), ("http://", ""), ("http://here:8888/", "here:8888"),
        ("ws://here", "here"), ("http://here.a", "here"), ("http://u@here", "here"), ("http://here, http://a", "here"),
    )])
    def test_own_origin_has_the_authority_that_the_client_uses(self, own, origin, authority):
        assert asked_for("/", "Origin: " + origin, host=authority, minor="01"[bool(authority)]).is_own_origin is own

    @pytest.mark.parametrize("fields, values", [
        (["a=1; b=2; a=3"], ["1", "3"]), (["b=2", "a=1;a=2"], ["1", "2"]), (["xa=1; A=2; a"], []), ([], []),
        ([" a=x=y \t; a="], ["x=y", ""]),
    ])
    def test_cookie_has_all_values_that_the_client_sent(self, fields, values):
        headers = asked_for("/", *["Cookie: " + field for field in fields]).headers
        assert port_proxy.cookie_values(headers, "a") == values

    def test_bad_head_gets_one_response_and_the_end(self, proxy, app):
        """At the byte that makes it wrong, without a deadline; bytes behind it are no request."""
        heads = [(status, head) for is_request, status, head in PARTIAL_HEADS if is_request]
        for status, raw in BAD_REQUESTS + heads + [(400, to(app, "Content-Length: 1", *HANDSHAKE))]:
            with proxy.sent(raw) as wire:
                answer = wire.message()
                assert (status_of(answer), fields_of(answer)["connection"]) == (status, "close"), raw[:80]
                wire.offer(to(app))
                wire.end()
                assert wire.ends()
        assert app.connections == 0

    def test_request_byte_by_byte_arrives_whole(self, proxy, app):
        """Leading empty lines are skipped (RFC 9112 section 2.2)."""
        raw = to(app, "Content-Length: 3", method="POST", path="/a", body=b"abc")
        for pieces in ([b"\r\n" + raw], single_bytes(raw), single_bytes(b"\r\n\r\n\r\n" + raw)):
            with proxy.wire() as wire:
                assert wire.ask(*pieces)[2] == b"ok"
            assert (app.messages[-1][0], app.messages[-1][2]) == ("POST /a HTTP/1.1", b"abc")

    def test_head_that_ends_early_is_refused(self, proxy):
        with proxy.sent(request("OPTIONS", "*"), b"GET / HTTP/1.1\r\nHo") as wire:
            assert status_of(wire.message(no_body=True)) == 204
            wire.end()
            assert status_of(wire.message()) == 400
            assert wire.rest() == b""


# ------ Bodies -------------------------------------------------------------------------------------------------------


def chunk(data):
    """A chunk that holds `data`, or the last chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def decode(framing, pieces, is_response=False):
    """The body that the pieces make and the bytes behind it; None if it is not whole; ProxyError if it is refused."""
    decoder = port_proxy.BodyDecoder(framing, DEFAULT, is_response)
    data, behind = b"", b""
    for piece in pieces:
        data += decoder.feed(piece)
        behind += decoder.rest
    return (data, behind) if decoder.finished else None


def single_bytes(raw):
    return [raw[at : at + 1] for at in range(len(raw))]


def random_bytes(size):
    """As many bytes, always the same."""
    return random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, "big")[:size]


class TestBodies:
    @pytest.mark.parametrize("framing, raw, data", [(CHUNKED, raw, data) for raw, data in (
        (b"0\r\n\r\n", b""), (b"1\r\na\r\n0002\r\nbc\r\n000\r\n\r\n", b"abc"), (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
        (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"), (b"3\r\nabc\r\n0\r\nX: y\r\nZ:\r\n\r\n", b"abc"),
        (b'3;a;b=c;d="e;\\"f" ; g = h\r\nabc\r\n0;x\r\n\r\n', b"abc"), (b"02\r\nab\r\n1;x\r\nc\r\n0\r\n\r\n", b"abc"),
        (b"000000000000003\r\na\r\n\r\n0\r\n\r\n", b"a\r\n"), (b"2\r\nab\r\n00;x\r\nX: y\r\nZ: w\r\n\r\n", b"ab"),
    )] + [(Framing("length", len(raw)), raw, raw) for raw in (b"", b"abc", b"\r\n\r\n")], ids=case_id)
    def test_body_is_whole_at_its_last_byte_and_not_before(self, framing, raw, data):
        for behind in (b"", b"GET /"):
            for pieces in ([raw + behind], single_bytes(raw + behind)):
                assert decode(framing, pieces) == (data, behind)
        for end in range(len(raw)):
            for pieces in ([raw[:end]], single_bytes(raw[:end])):
                assert decode(framing, pieces) is None

    def test_flood_of_chunks_is_decoded_in_turns(self):
        """One turn is short, so that other requests have theirs; the rest is fed again."""
        decoder, count = port_proxy.BodyDecoder(CHUNKED, DEFAULT), 0
        decoder.rest = chunk(b"x") * 30000 + b"0\r\n\r\nrest"
        while not decoder.finished:
            decoded = decoder.feed(decoder.rest)
            count += len(decoded)
            assert len(decoded) <= 300
        assert (decoder.rest, count) == (b"rest", 30000)

    @pytest.mark.parametrize("raw, data, data_of_response", [(raw, None, None) for raw in (
        b"\r\n", b" \r\n", b"g\r\n", b"-1\r\na", b"+1\r\na", b"0x1\r\na", b" 1\r\na", b"1_0\r\n", b"3 4\r\nabc\r\n0",
        b"\xb2\r\n", b"1000000000000000\r\n", b"1\na\r\n", b"1\ra\r\n", b"1;\r\na", b"1;a=\r\nb", b"1;a=\"\r\nb", b"zz",
        b"1;a\x00\r\nb", b"1;a\rb\r\n", b"1\r\nab\r\n", b"1\r\na\n0\r\n\r\n", b"1\r\na\r0", b"1\r\na0\r\n\r\n",
        b"0\r\nX\r\n\r\n", b"0\r\n X: y\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\nX: \x00\r\n\r\n", b"0\r\nX: y\n\r\n",
        b"0\n\n", b"1;" + b"a" * 5000, b"0\r\nX: " + b"y" * 20000, b"12345678901234567", b"4\r\nabc\r\n0\r\n\r\n",
    )] + [
        # Space behind a size is accepted in responses alone.
        (b"1 \r\na\r\n0\r\n\r\n", None, b"a"), (b"5   \r\nhello\r\n0 \t \r\n\r\n", None, b"hello"),
        (b"3;a=b  \r\nabc\r\n0\r\n\r\n", None, b"abc"),
    ] + [(raw % (b"a" * (limit + more)), data, data) for more, data in ((-2, b""), (-1, None)) for limit, raw in (
        (DEFAULT.max_chunk_line_bytes, b"0;%s\r\n\r\n"), (DEFAULT.max_trailer_bytes - 2, b"0\r\nX:%s\r\n\r\n"),
        (DEFAULT.max_trailer_bytes - 14, b"0\r\nX: y\r\nX: z\r\nX:%s\r\n\r\n"),
    )] + [
        (b"%x\r\n%s%s0\r\n\r\n" % (size, (b"\n\r" * size)[: size - cut], end), *[data and (b"\n\r" * size)[:size]] * 2)
        for size in (1, 15, 16, 17, 254, 255, 256, 4093, 4094, 4095, 4096, 65535, 65536) for cut, end, data in (
            (0, b"\r\n", True), (0, b"\r\n\r\n", None), (0, b"\n\r\n", None), (1, b"\r\n", None), (0, b"x\r\n", None),
            (0, b"x\n", None),
        )
    ], ids=case_id)
    def test_chunked_body_is_decoded_or_refused(self, raw, data, data_of_response):
        for before in (b"", b"3\r\nabc\r\n"):
            for pieces in ([before + raw], [before, raw], [before + raw[:-500]] + single_bytes(raw[-500:])):
                for is_response, expected in ((False, data), (True, data_of_response)):
                    if expected is None:
                        assert status_of_error(decode, CHUNKED, pieces, is_response) == 400, pieces
                    else:
                        assert decode(CHUNKED, pieces, is_response) == (before[3:6] + expected, b"")

    def test_part_of_a_chunk_is_not_held_back(self):
        decoder = port_proxy.BodyDecoder(CHUNKED, DEFAULT)
        pieces = (b"5", b"\r\n", b"ab", b"cde\r", b"\n1\r\nf", b"\r\n0", b"\r\n\r", b"\nGET")
        given = [decoder.feed(piece) for piece in pieces]
        assert given == [b"", b"", b"ab", b"cde", b"f", b"", b"", b""]
        assert (decoder.finished, decoder.rest) == (True, b"GET")


# ------ Connections --------------------------------------------------------------------------------------------------


def slow_wire(proxy, size=4096, raw=b""):
    """A connection on which the kernel holds little for either end; `raw` is sent before the connection can idle."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    sock.settimeout(WAIT)
    sock.connect(("127.0.0.1", proxy.port))
    wire = Wire(sock)
    wire.ask(request("GET", "/nothing"))
    with proxy.held():
        narrow(sock.getsockname()[1], size)
        wire.send(raw)
    return wire


def outlast_keep_alive(proxy):
    """Wait until connections that began to idle after this call have been closed; earlier ones are then overdue."""
    for _ in range(2):
        with proxy.wire() as wire:
            assert wire.rest() == b""


BLOCK = bytes(range(256)) * 4096


def send_blocks(wire, size, progress, chunked=False):
    """Send `size` bytes, and note in `progress` how many the kernel has taken."""
    for _ in range(size >> 20):
        wire.send(chunk(BLOCK) if chunked else BLOCK)
        progress.append(len(BLOCK))
    if chunked:
        wire.send(b"0\r\n\r\n")


def take_blocks(wire, size):
    """Receive `size` bytes or more without keeping them."""
    left, wire.buffer = size - len(wire.buffer), b""
    while left > 0:
        got = len(wire.sock.recv(min(left, 1 << 20)))
        assert got
        left -= got


def rss_kib(pid):
    try:
        status = Path("/proc/%d/status" % pid).read_text()
    except OSError:
        pytest.skip("this system has no /proc to read a process's memory from")
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1))


def steady(measure):
    """Wait until `measure()` is above zero and has stopped growing for half a second."""
    values = collections.deque([0] * 50, 50)  # `eventually` takes a hundred in a second
    eventually(lambda: values.append(measure()) or 0 < values[0] == values[-1])


class TestConnections:
    def test_bytes_behind_the_last_request_do_not_reset_its_response(self, proxy, upstream):
        """So many that the kernel holds some of them when the last of the response is on its way."""
        body = bytes(4 << 20)
        app = upstream(script(read_message, wait, ok(body)))
        with proxy.sent(to(app, version="1.0"), bytes(1 << 20)) as wire:
            app.happened.set()
            assert wire.rest().endswith(b"\r\n\r\n" + body)

    def test_pipelined_requests_are_answered_in_order(self, proxy, upstream):
        """None is lost, whether the app answers or the proxy itself, though the client has ended its side."""
        app = upstream(answering(*(ok(b"%d" % number) for number in range(50))))
        with proxy.wire() as wire:
            with proxy.held():  # the EOF arrives with the requests
                for number in range(50):
                    wire.send(to(app, "Content-Length: 3", method="POST", path="/%d" % number, body=b"abc"))
                    wire.send(request("GET", "/nothing"))
                wire.end()
            for number in range(50):
                assert wire.message()[2] == b"%d" % number
                assert status_of(wire.message()) == 404
            assert wire.rest() == b""
        assert [message[0] for message in app.messages] == ["POST /%d HTTP/1.1" % number for number in range(50)]

    def test_response_to_an_unread_body_arrives_before_the_close(self, proxy, app, monkeypatch):
        """The client still sends. Its body is dropped: it is not taken for requests, and does not count as waiting."""
        monkeypatch.setattr(port_proxy, "_PENDING_BYTES", 1 << 19)
        with proxy.wire() as wire:
            message = wire.ask(request("POST", "/nothing", "Content-Length: 5000000"))
            assert (status_of(message), fields_of(message)["connection"]) == (404, "close")
            wire.send(to(app) * (1 << 18))  # more than the kernel holds
            wire.end()
            assert wire.rest() == b""
        eventually(lambda: not proxy.open_connections())
        assert app.connections == 0

    def test_client_that_never_stops_sending_is_closed_after_the_linger_timeout(self, start, monkeypatch):
        """No read has to wait for data."""
        read = port_proxy.Connection.read

        async def read_at_once(client):
            await asyncio.sleep(0.01)
            return b"x" if client.state is port_proxy.CLOSING else await read(client)

        monkeypatch.setattr(port_proxy.Connection, "read", read_at_once)
        proxy = start(linger_timeout=0.1)
        with proxy.sent(request("POST", "/nothing", "Content-Length: 9")) as wire:
            assert status_of(wire.message()) == 404
            eventually(lambda: not proxy.proxy.deadlines.connections)

    def test_empty_lines_do_not_count_as_waiting_bytes(self, start, monkeypatch):
        """The one whose bytes wait for longest would have to go."""
        monkeypatch.setattr(port_proxy, "_PENDING_BYTES", 1 << 19)
        proxy = start(token=TOKEN)
        with proxy.sent(request("GET", "/nothing")[:-1]) as wire, proxy.wire() as other:
            eventually(lambda: not has_unread(proxy.port))
            other.send(b"\r\n" * (1 << 20), request("GET", "/nothing"))
            assert status_of(other.message()) == status_of(wire.ask(b"\n")) == 404

    @needs_proc
    @pytest.mark.parametrize("raw", [b"", b"GET /pro", request("GET", "/nothing")], ids=case_id)
    def test_reset_between_requests_is_not_logged(self, proxy, caplog, raw):
        with caplog.at_level(logging.INFO, "port_proxy"):
            wire = proxy.wire()
            wire.send(raw)
            if raw.endswith(b"\r\n\r\n"):
                wire.message()
            eventually(lambda: not has_unread(proxy.port))
            wire.reset()
            eventually(lambda: not proxy.open_connections())
            assert status_of(proxy.get("/nothing")) == 404  # by now the reset has been seen
        assert "error" not in caplog.text


class TestDeadlines:
    @pytest.mark.parametrize("size", [60000, 1 << 26])
    def test_request_that_the_app_does_not_read_gets_a_504(self, start, upstream, size):
        """The proxy holds the rest of the request, or reads no more of it."""
        app, proxy = upstream(script(read_head, tell, hold)), start(stall_timeout=1, response_timeout=0.3)
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with proxy.sent(to(app, "Content-Length: %d" % size, method="PUT")) as wire:
            assert app.told.wait(WAIT)
            narrow(app.port)
            with in_thread(wire.offer, bytes(size)):
                assert_says(wire.message(), 504, b"did not read the request for 1 seconds.")
                wire.end()

    @pytest.mark.parametrize("raw", [
        b"GET / HTTP/1.1\r\nX: ", request("POST", "/proxy/", "Content-Length: 6000"),
    ], ids=["head", "form"])
    def test_dripping_head_or_sign_in_form_gets_a_408(self, start, raw):
        with start(token="x" * 16, head_timeout=0.4).sent(raw) as wire:
            eventually(lambda: wire.send(b"a") or select.select([wire.sock], [], [], 0.05)[0])
            assert status_of(wire.message()) == 408

    def test_silence_between_requests_is_no_error(self, start, app):
        """Empty lines, and half of one, are no part of a request, behind a body or alone."""
        proxy = start(head_timeout=0.1, keep_alive_timeout=0.3)
        raw = to(app, "Content-Length: 1", method="POST", body=b"a")
        raws = [raw, raw + b"\r\n", b"", b"\r", b"\r\n", b"\r\n\r\n", b"\r\n\r"]
        with contextlib.ExitStack() as stack:
            with proxy.held():  # the bytes are there when the proxy accepts, however busy the machine is
                wires = [stack.enter_context(proxy.sent(one)) for one in raws]
            assert wires[0].message()[2] == wires[1].message()[2] == b"ok"
            for wire in wires:
                assert wire.rest() == b""

    def test_body_that_stops_coming_gets_a_408_and_is_not_sent_on(self, start, upstream):
        """The rest that comes later does not break the connection on which the 408 is sent, or become a request."""
        app = upstream(script(read_head, read_to_the_end))
        with start(stall_timeout=0.2).sent(to(app, "Content-Length: 3", method="POST", body=b"a")) as wire:
            head = wire.until(b"\r\n\r\n")
            assert (head[:13], b"\r\nConnection: close\r\n" in head) == (b"HTTP/1.1 408 ", True)
            wire.offer(b"bc" + to(app))
            wire.end()
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1" not in wire.rest()
        eventually(lambda: app.messages)
        assert (app.messages, app.connections) == ([b"a"], 1)

    def test_response_to_a_late_body_is_cut_with_a_reason_in_the_log(self, start, upstream, records):
        app = upstream(script(read_head, CHUNKED_HEAD + b"3\r\nabc\r\n", read_to_the_end))
        with start(stall_timeout=0.3).sent(to(app, "Content-Length: 3", method="POST", body=b"a")) as wire:
            assert wire.rest().endswith(b"\r\n\r\n3\r\nabc\r\n")
        eventually(records)
        assert (records()[0]["status"], "request body" in records()[0]["error"]) == (200, True)

    def test_head_of_a_late_response_has_its_own_time(self, start, upstream):
        """The client had read the response before it; it does not read now, and the body is not there yet."""
        fields = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 20000) for number in range(40))
        late = OK.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n")
        app = upstream(script(read_head, OK, read_head, late[:-2], wait, b"ok", hold))
        proxy = start(linger_timeout=0.1, max_head_bytes=1 << 20)
        with slow_wire(proxy) as wire:
            assert wire.ask(to(app))[2] == b"ok"
            for client in proxy.proxy.deadlines.connections:
                client.write_deadline = 0.0  # long ago
            wire.send(to(app))
            wire.until(b"\r\n")
            threading.Event().wait(0.3)  # a few checks of the deadlines
            app.happened.set()
            assert wire.until(b"\r\n\r\nok").count(b"x" * 20000) == 40

    def test_client_that_takes_nothing_does_not_hold_a_silent_app(self, start, upstream):
        """So little is left that the proxy would send more, and waits for it."""
        app = upstream(script(read_head, b"HTTP/1.1 200 OK\r\n\r\n" + bytes(50000), read_to_the_end))
        with slow_wire(start(stall_timeout=0.3), raw=to(app)):
            eventually(lambda: app.messages)

    def test_response_that_never_comes_is_a_504(self, start, upstream):
        """On a fresh connection to the app and on a reused one; an interim response is no response."""
        app = upstream(script(read_head, OK, read_head, b"HTTP/1.1 103 E\r\n\r\n", read_to_the_end))
        silent, proxy = upstream(script(read_to_the_end)), start(response_timeout=1)
        with proxy.wire() as wire, proxy.sent(to(silent)) as other:
            assert wire.ask(to(app))[2] == b"ok"
            assert status_of(wire.ask(to(app), no_body=True)) == 103
            for one, answer in ((app, wire.message()), (silent, other.message())):
                assert_says(answer, 504, b"came from port %d of this machine within 1 seconds." % one.port)

    def test_time_for_the_response_is_that_between_both_messages(self, start, upstream):
        head, tick = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", threading.Event()
        silent = upstream(script(read_head, head, lambda wire, app: app.happened.wait(1.2), b"ok"))
        app, proxy = upstream(answering(OK)), start(response_timeout=1)
        hasty = start(response_timeout=1, stall_timeout=0.1, keep_alive_timeout=1)
        with proxy.sent(to(app, "Content-Length: 6", method="POST")) as slow, hasty.sent(to(silent)) as wire:
            for _ in range(6):
                tick.wait(0.2)
                slow.send(b"a")
            assert slow.message()[2] == wire.message()[2] == b"ok"

    def test_slow_client_is_not_idle_while_it_takes_the_tail_of_a_response(self, start, upstream):
        """It gets all, though it takes longer than a connection may idle, and the proxy may have its own part done."""
        size, tails = 1 << 17, (20000, 50000)
        app, proxy = upstream(answering(ok(bytes(size)))), start(keep_alive_timeout=0.4)
        with slow_wire(proxy, raw=to(app)) as first, slow_wire(proxy, raw=to(app)) as second:
            for wire, tail in zip((first, second), tails):
                wire.until(b"\r\n\r\n")
                assert len(wire.exactly(size - tail)) == size - tail
            outlast_keep_alive(proxy)
            for wire, tail in zip((first, second), tails):
                assert len(wire.exactly(tail)) == tail
                assert wire.rest() == b""  # a clean end, as of any connection that has idled


@pytest.fixture(scope="class")
def process():
    """A proxy in a process of its own: (process, port)."""
    with program() as (process, _, port):
        yield process, port


@pytest.fixture
def measured(process):
    """A connection to the proxy of `process`, and a function that fails if the proxy's memory has grown."""
    before = rss_kib(process[0].pid)

    def check(mebibytes=8):
        assert rss_kib(process[0].pid) - before < mebibytes * 1024

    with Wire.to(process[1]) as wire:
        yield wire, check


def assert_stalls(progress):
    """The sender stops when the kernel's buffers are full."""
    steady(lambda: sum(progress))
    assert sum(progress) < 60 << 20


class SlowPeers:
    """A peer that does not read stops the other side, and memory stays where it was. Also shown inside Jupyter."""

    SIZE = 64 << 20
    to = staticmethod(to)

    @pytest.mark.parametrize("is_tunnel", [False, True])
    def test_slow_client_stops_the_app(self, upstream, measured, is_tunnel):
        (wire, check), sent = measured, []
        head = SWITCHING if is_tunnel else b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.SIZE
        app = upstream(script(read_head, head, lambda wire, app: send_blocks(wire, self.SIZE, sent)))
        wire.send(self.to(app, *HANDSHAKE if is_tunnel else ()))
        wire.until(b"\r\n\r\n")
        assert_stalls(sent)
        check()
        take_blocks(wire, self.SIZE)
        check()

    @pytest.mark.parametrize("kind", ["length", "chunked", "tunnel"])
    def test_slow_app_stops_the_client(self, upstream, measured, kind):
        (wire, check), sent = measured, []
        app = upstream(script(
            read_head, SWITCHING if kind == "tunnel" else b"", wait, lambda wire, app: take_blocks(wire, self.SIZE),
            ok(b"ok", "Connection: close"), read_to_the_end,
        ))
        lines = {"length": ("Content-Length: %d" % self.SIZE,), "chunked": ("Transfer-Encoding: chunked",)}
        wire.send(self.to(app, *lines.get(kind, HANDSHAKE), method="GET" if kind == "tunnel" else "PUT"))
        if kind == "tunnel":
            assert status_of(wire.message(no_body=True)) == 101
        with in_thread(send_blocks, wire, self.SIZE, sent, kind == "chunked"):
            assert_stalls(sent)
            check()
            app.happened.set()
        assert wire.message()[2] == b"ok"
        check()


class TestBackPressure(SlowPeers):
    def test_bytes_before_the_101_are_not_held_without_bound(self, upstream, measured):
        """Back-pressure holds from the tunnel's first moment, and for the bytes that came before it."""
        (wire, check), sent = measured, []

        def send():
            with contextlib.suppress(OSError):  # it is cut off in the end
                send_blocks(wire, self.SIZE, sent)

        app = upstream(script(read_head, wait, SWITCHING, hold))
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(to(app, *HANDSHAKE))
        eventually(lambda: app.connections == 1)
        with in_thread(send):
            assert_stalls(sent)
            app.happened.set()
            assert status_of(wire.message(no_body=True)) == 101
            assert_stalls(sent)
            check()
            app.let_go.set()  # the app closes with all of it unread

    def test_pipelined_requests_are_read_when_those_before_are_answered(self, proxy, upstream):
        """The client reads no responses, and is given no more."""
        app = upstream(answering(ok(bytes(2000))))
        with slow_wire(proxy) as wire:
            wire.sock.settimeout(0.3)
            wire.offer(*[to(app) * 1000] * 400)  # about 24 MB; the responses would be 800
            steady(lambda: len(app.messages))
            assert len(app.messages) * 2000 < 16 << 20  # the kernel's buffers hold a few MiB
            clients = [one for one in proxy.proxy.deadlines.connections if one.buffer]
            assert 0 < max(len(client.buffer) + client.unread for client in clients) < 1 << 20

    def test_half_closed_client_that_reads_late_gets_all(self, proxy, upstream):
        """The app is not late while the client takes nothing."""
        sent, begun = [], ok(bytes(10))[:-10] + b"abc"
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.SIZE
        app = upstream(script(read_head, head, lambda wire, app: send_blocks(wire, self.SIZE, sent)))
        silent = upstream(script(read_head, begun, hold))
        with proxy.sent(to(app)) as wire, proxy.sent(to(silent)) as clock:
            wire.until(b"\r\n\r\n")
            assert_stalls(sent)
            for one in (wire, clock):
                one.end()
            assert clock.rest()[-3:] == b"abc"  # the time for data has passed
            take_blocks(wire, self.SIZE)

    def test_idle_client_leaves_nothing_of_its_last_request_in_memory(self, process):
        asked, before = request("OPTIONS", "*"), 0
        large = asked[:-2] + b"A: %s\r\n\r\n" % bytes(60000).replace(b"\0", b"a")
        with contextlib.ExitStack() as stack:
            other, *wires = [stack.enter_context(Wire.to(process[1])) for _ in range(121)]
            for number, wire in enumerate(wires):
                before = rss_kib(process[0].pid) if number == 20 else before
                wire.send(large[:1])
                assert status_of(other.ask(asked)) == 204  # the proxy waits for the rest by now
                assert status_of(wire.ask(large[1:])) == 204
            assert rss_kib(process[0].pid) - before < 100 * 10

    def test_closed_transport_loses_no_data_and_gets_none(self, background):
        """Before Python 3.11, TLS that has ended cannot resume."""
        async def read():
            deadlines = port_proxy.Deadlines(DEFAULT)
            connection, transport = port_proxy.Connection(deadlines), Mock(asyncio.Transport)
            transport.is_closing.return_value, transport.resume_reading.side_effect = False, AttributeError
            connection.connection_made(transport)
            for _ in range(4):
                connection.data_received(bytes(250000))
            connection.eof_received()
            assert transport.pause_reading.called
            assert (len(await connection.read()), await connection.read()) == (1000000, b"")
            connection.connection_lost(None)
            transport.is_closing.return_value = True
            connection.write(b"a")
            assert not transport.write.called  # uvloop would raise an error
            await deadlines.close(0.1)

        background.do(read())

    def test_connections_that_are_over_leave_no_objects(self, proxy, app):
        def count_after_ten():
            for _ in range(10):
                assert proxy.ask(to(app, "Connection: close"))[2] == b"ok"
            eventually(lambda: not proxy.open_connections())
            gc.collect()
            return sum(type(one).__module__ in ("port_proxy", "asyncio.streams") for one in gc.get_objects())

        before = count_after_ten()
        eventually(lambda: count_after_ten() <= before)


# ------ Header rewriting ---------------------------------------------------------------------------------------------

TOKEN = "s3cret-token-of-ours"
US, HOME = "http://here:8888", "http://localhost:8080"
STRIPPED = "/proxy/8080"
ABSOLUTE = "/proxy/absolute/8080"
HOST = ("Host", "localhost:8080")
FORWARDED = [
    ("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", "http"), ("X-Forwarded-Host", "here:8888"),
    ("X-Forwarded-Port", "8888"), ("X-Forwarded-Prefix", STRIPPED), ("X-Forwarded-Context", STRIPPED),
    ("X-ProxyContextPath", STRIPPED),
]


def gate_with(is_private=True, allow_hostnames=("*",), **options):
    return port_proxy.TokenGate(checked_config(Config(allow_hostnames=allow_hostnames, **options)), is_private, 8888)


def asked_for(target, *lines, host="here:8888", method="GET", minor="1", gate=None):
    """The request with these fields; without a Host field if `host` is empty."""
    first = ["%s %s HTTP/1.%s" % (method, target, minor)] + (["Host: " + host] if host else [])
    raw = "\r\n".join(first + list(lines) + ["", ""]).encode("latin-1")
    return port_proxy.parse_request(raw, "192.0.2.7", "http", (gate or gate_with()).config)


def split_head(raw):
    first, *lines = raw.decode("latin-1")[:-4].split("\r\n")
    return first, [tuple(line.split(": ", 1)) for line in lines]


def sent_upstream(*lines, target=STRIPPED + "/a", host="here:8888", method="GET", minor="1", **options):
    """The fields of a request as the app gets them."""
    gate = gate_with(**options)
    asked = asked_for(target, *lines, host=host, method=method, minor=minor, gate=gate)
    return split_head(request_for_upstream(asked, gate))[1]


def sent_to_client(*fields, target=STRIPPED + "/a", method="GET", status=200, is_unprefixed=False, **options):
    """The fields of a response as the client gets them."""
    gate = gate_with(**options)
    asked = asked_for(target, method=method, gate=gate)._replace(is_unprefixed=is_unprefixed)
    head = "HTTP/1.1 %d \r\n%s\r\n" % (status, "".join("%s: %s\r\n" % field for field in fields))
    response = parse_response(head.encode("latin-1"), asked.method, gate.config)
    return split_head(port_proxy.serialise(port_proxy.response_lines(response, asked, gate), response.framing))[1]


class TestRewriting:
    def test_request_is_written_anew_in_http_1_1(self):
        asked = asked_for(STRIPPED + "/a", "A: b", "a:  c\xe4 ", "Cookie: x=y", method="FROB", minor="0")
        assert request_for_upstream(asked, gate_with()) == (
            b"FROB /a HTTP/1.1\r\nHost: localhost:8080\r\nA: b\r\na:  c\xe4 \r\nCookie: x=y\r\n"
            + "".join("%s: %s\r\n" % field for field in FORWARDED).encode() + b"\r\n"
        )

    @pytest.mark.parametrize("how, lines, fields", [({}, [line], [HOST] + FORWARDED) for line in (
        "Connection: close", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: trailers", "Trailer: X",
        "Upgrade: websocket", "Proxy-Authorization: x", "Proxy-Authenticate: x",
        "Forwarded: for=1.2.3.4", "x-forwarded-for: 1.2.3.4", "X-FORWARDED-HOST: evil", "X-Forwarded-Prefix: /evil",
        "X-Forwarded-Context: /evil", "X-ProxyContextPath: /evil", "X-Forwarded-Port: 1", "X-Forwarded-Proto: https",
        "X_Forwarded_For: 1.2.3.4", "x_forwarded-prefix: /evil", "Content_Length: 5", "Transfer_Encoding: chunked",
    )] + [({}, lines, [HOST] + FORWARDED + [added]) for *lines, added in (
        ("Content-Length: 03", ("Content-Length", "3")), ("content-length:0", ("Content-Length", "0")),
        ("Content-Length: 3", "Content-Length: 3, 3", ("Content-Length", "3")),
        ("Transfer-Encoding: CHUNKED", "Trailer: X", ("Transfer-Encoding", "chunked")),
        ("Connection: content-length", "Content-Length: 3", ("Content-Length", "3")),
        ("Connection: transfer-encoding", "Transfer-Encoding: chunked", ("Transfer-Encoding", "chunked")),
    )] + [
        ({}, ["Connection: x-a, HOST, X-Forwarded-For, x-forwarded-prefix ,close", "X-A: b", "X-B: c"],
         [HOST, ("X-B", "c")] + FORWARDED),
        ({}, ["Expect: 100-continue"], [HOST, ("Expect", "100-continue")] + FORWARDED),
        ({"minor": "0"}, ["Expect: 100-continue"], [HOST] + FORWARDED),  # RFC 9110 section 10.1.1
        ({"target": ABSOLUTE + "/a"}, [], [HOST] + FORWARDED[:4]),
        ({"host": "", "minor": "0", "preserve_host": True}, [], [HOST] + FORWARDED[:2] + FORWARDED[4:]),
        ({"method": "MOVE", "preserve_host": True}, ["Destination: http://here:8888/proxy/8080/b"],
         [("Host", "here:8888"), ("Destination", "http://here:8888/b")] + FORWARDED),
    ], ids=case_id)
    def test_field_of_the_connection_or_of_the_proxy_is_not_passed_on(self, how, lines, fields):
        """Nor one that Connection names. The proxy writes its own, each of them once, if there is a source for it."""
        assert sent_upstream(*lines, **how) == fields

    @pytest.mark.parametrize("spell", [str, str.lower, str.upper, str.title])
    def test_websocket_handshake_is_spelt_as_in_rfc_6455(self, spell):
        """GTK Broadway compares names in that case, and servers in front of us change it."""
        names = "Origin Sec-WebSocket-Key Sec-WebSocket-Version Sec-WebSocket-Protocol Sec-WebSocket-Extensions".split()
        upgrade = [spell("Connection") + ": keep-alive, Upgrade", spell("Upgrade") + ": WebSocket", "x-other: a"]
        fields = sent_upstream(*(upgrade + [spell(name) + ": http://evil" for name in names]))
        ours = FORWARDED + [("Connection", "Upgrade"), ("Upgrade", "websocket")]
        assert fields == [HOST, ("x-other", "a")] + [(name, "http://evil") for name in names] + ours

    @pytest.mark.parametrize("lines, method, options, proto", [
        (["Origin: https://here:8888"], "GET", {}, "http"),
        (["Origin: https://here:8888"], "POST", {"upstream_tls": ["8080"]}, "https"),
        (["Referer: https://here:8888/proxy/8080/a"], "POST", {}, "http"),
        (["Destination: https://here:8888/proxy/8080/a"], "MOVE", {}, "http"),
    ] + [(lines, method, {}, None) for lines, method in (
        (["Referer: https://here:8888/proxy/8080/a"], "GET"), ([], "POST"), (["Referer: https://evil/"], "POST"),
        (["Origin: null", "Referer: https://here:8888/"], "POST"), (["Origin: https://localhost:8080"], "POST"),
    )] + [([line], "POST", {"preserve_host": True}, None) for line in (
        "Origin: https://here:8888", "Referer: https://here:8888/proxy/8080/x",
    )])
    def test_request_with_translated_origin_speaks_of_home_alone(self, lines, method, options, proto):
        """Apps compare Origin, or else Referer or Destination, with X-Forwarded-Proto and -Host."""
        public = ["X-Forwarded-Proto: https", "X-Forwarded-Ssl: on"]  # Rack looks at the second one first
        fields = sent_upstream(*public, *lines, method=method, trusted_proxies=["192.0.2.7"], **options)
        told = [dict(fields).get("X-Forwarded-" + name) for name in ("Proto", "Host", "Port", "Ssl")]
        assert told == ([proto, None, None, None] if proto else ["https", "here:8888", "8888", "on"])
        if proto and "Origin" in lines[0]:
            assert ("Origin", proto + "://localhost:8080") in fields
        kept = [line for line in lines if not proto and ("Origin" in line or options)]
        assert all(tuple(line.split(": ")) in fields for line in kept)

    @pytest.mark.parametrize("path, is_public", [
        ("/gradio_api/queue/join?a", True), ("/demo/gradio_api/call/f", True), ("/queue/join", True),
        ("/run/predict", True), ("/call/f", True), ("/a?/gradio_api/", False), ("/gradio_api", False),
        ("/a/queue/join", False), ("/running/a", False),
    ])
    def test_gradio_api_is_told_the_public_origin(self, path, is_public):
        """Gradio builds the URLs of its answers from it, and never compares it with Origin."""
        for prefix in (STRIPPED, ABSOLUTE):
            fields = sent_upstream("Origin: http://here:8888", target=prefix + path, method="POST")
            assert (("X-Forwarded-Host", "here:8888") in fields) is is_public
            assert ("Origin", "http://localhost:8080") in fields

    @pytest.mark.parametrize("prefix, url, referer, destination", [(STRIPPED, url, at, at) for url, at in (
        (US + "/proxy/8080/x?y", HOME + "/x?y"), (US + "/proxy/8080?q", HOME + "/?q"),
        (US + "/prox%79/8080/x%79", HOME + "/x%79"), ("HTTPS://HERE:8888/proxy/8080", HOME + "/"),
    )] + [
        (ABSOLUTE, US + "/proxy/absolute/8080/x", *[HOME + "/proxy/absolute/8080/x"] * 2),
        ("http://8080.localhost", "http://8080.localhost/b", HOME + "/b", HOME + "/b"),
        (STRIPPED, "/proxy/8080/b%20c", "/proxy/8080/b%20c", "/b%20c"), (STRIPPED, "/proxy/8080", "/proxy/8080", "/"),
    ] + [(prefix, url, HOME + "/", url) for prefix, url in (
        (STRIPPED, US + "/proxy/80801/secret"), (STRIPPED, US), (ABSOLUTE, US + "/x"),
    )] + [(prefix, same, same, same) for prefix, same in (
        (STRIPPED, "https://evil/proxy/8080/x"), (STRIPPED, "http://here:1/proxy/8080/x"), (STRIPPED, HOME + "/x"),
        (STRIPPED, "/proxy/80801/b"), (STRIPPED, "urn:a"), (ABSOLUTE, "/proxy/absolute/8080/b"),
        ("http://8080.localhost", "/b"), ("http://8080.localhost", "urn:a"), ("http://8080.localhost", US + "/b"),
    )])
    def test_url_of_the_app_becomes_that_at_home(self, prefix, url, referer, destination):
        """Of another app's only the origin is left in Referer, and Destination stays (RFC 4918 section 10.3)."""
        value = '<%s> (<urn:a> ["<%s>"])'
        lines = ("Referer: " + url, "Destination: " + url, "If: " + value % (url, url))
        fields = dict(sent_upstream(*lines, target=prefix + "/a", method="MOVE"))
        translated = [fields[name] for name in ("Referer", "Destination", "If")]
        assert translated == [referer, destination, value % (destination, url)]

    @pytest.mark.parametrize("location, stripped, absolute", [(location, STRIPPED + path, path) for location, path in (
        ("/x?y#z", "/x?y#z"), ("/proxy/80801", "/proxy/80801"), ("HTTP://LOCALHOST:8080", "/"),
        ("https://localhost:8080?x", "/?x"), ("http://[::1]:8080/x", "/x"), ("http://[::]:8080/x", "/x"),
        ("http://0.0.0.0:8080/x", "/x"), ("http://HERE:8888/x", "/x"),
    )] + [
        ("/%70roxy/808%30/%70", "/proxy/8080/%70", "/%70roxy/808%30/%70"),
        ("http://127.0.0.1:8080/proxy/8080/x", "/proxy/8080/x", "/proxy/8080/x"),
        ("http://localhost:8080//evil/x", "/proxy/8080//evil/x", "/.//evil/x"),
        ("http://localhost:8080/\\evil", "/proxy/8080/\\evil", "/./\\evil"),
        ("http://localhost:8080/\t/evil", "/proxy/8080/\t/evil", "/./\t/evil"),
    ] + [(same, same, same) for same in (
        "/proxy/8080/x", "/proxy/8080", "/proxy/8080?x", "/proxy/8080#x", "x", "../x", "?x", "", "//evil/x", "mailto:a",
        "https://evil/x", "http://localhost/x", "http://localhost:8081/x", "http://u@localhost:8080/x",
    )])
    def test_location_at_home_becomes_a_path_below_the_prefix(self, location, stripped, absolute):
        fields = (("Location", "%s"), ("content-location", "%s"), ("Refresh", "5; url=%s"), ("Link", "<%s>; rel=next"))
        for prefix, translated in ((STRIPPED, stripped), (ABSOLUTE, absolute)):
            seen = sent_to_client(*[(name, form % location) for name, form in fields], target=prefix + "/a")
            assert seen == [(name, form % translated) for name, form in fields]

    @pytest.mark.parametrize("target, name, value, rewritten", [("/proxy/8080/a", *case) for case in (
        ("Refresh", "5", "5"), ("Refresh", "0, /x", "0, /proxy/8080/x"),
        ("Refresh", '1.5 ; Url = "/x" y', '1.5 ; Url = "/proxy/8080/x" y'),
        ("Link", '</a>; rel="next", </b>;rel=last', '</proxy/8080/a>; rel="next", </proxy/8080/b>;rel=last'),
        ("link", '<http://localhost:8080/a?b>;title="</c> \\" </d>"', '</proxy/8080/a?b>;title="</c> \\" </d>"'),
        ("Link", '<a>, <//evil/a>, <https://evil/a>, <#a>, <', '<a>, <//evil/a>, <https://evil/a>, <#a>, <'),
        ("Link", '</a>;title="</b>', '</proxy/8080/a>;title="</b>'), ("Link", '</a>;t="\\', '</proxy/8080/a>;t="\\'),
    )] + [(target, "Location", location, translated) for target, location, translated in (
        ("/proxy/80/a", "http://localhost/x", "/proxy/80/x"), ("/proxy/443/a", "https://[::1]/x", "/proxy/443/x"),
        ("/proxy/443/a", "http://localhost/x", "http://localhost/x"),
        ("/proxy/8080/a", "http://%s:8080/x" % socket.gethostname(), "/proxy/8080/x"),
        ("/proxy/DB:81/a", "http://Db:81/x", "/proxy/DB:81/x"), ("/proxy/db:81/a", *["http://localhost:81/x"] * 2),
        ("/proxy/[FE80::1]:81/a", "http://[fe80::1]:81/x", "/proxy/[FE80::1]:81/x"),
        ("http://8080.localhost:8888/a", "http://localhost:8080/x", "/x"),
        ("http://here:443/proxy/80/", "https://here/x", "/proxy/80/x"),  # the proxy itself
    )] + [  # All apps would get the cookie of the proxy's own domain.
        ("http://8080.b.c/a", "Set-Cookie", "a=b; Domain=%s; Path=/x" % domain, "a=b; Path=/x")
        for domain in ("8080.b.c", "b.c")
    ])
    def test_url_in_a_response_is_translated(self, target, name, value, rewritten):
        """Inside of a value (RFC 8288 for Link; quoted strings in it are no targets), and by other names of the app."""
        assert sent_to_client((name, value), target=target, domains=["localhost", "b.c"]) == [(name, rewritten)]

    @pytest.mark.parametrize("cookie, stripped, absolute", [
        ("a=b; Path=/", "a=b; Path=/proxy/8080/", "a=b; Path=/proxy/absolute/8080"),
        ("a=b;path=/x;HttpOnly", "a=b;path=/proxy/8080/x;HttpOnly", "a=b;path=/x;HttpOnly"),
        ("a=b; Domain=.LocalHost", "a=b", "a=b"), ("a=b; domain=127.0.0.1; Secure", "a=b; Secure", "a=b; Secure"),
        ("a=b; Domain=here", "a=b", "a=b"),
        ("a=b; Path=/proxy/absolute/", "a=b; Path=/proxy/8080/proxy/absolute/", "a=b; Path=/proxy/absolute/8080"),
        ("a=b; Path=/%70roxy/8080/x", "a=b; Path=/proxy/8080/x", "a=b; Path=/%70roxy/8080/x"),
        ("a=b; Path=/proxy/absolute/808%30/x", "a=b; Path=/proxy/8080/proxy/absolute/808%30/x",
         "a=b; Path=/proxy/absolute/8080/x"),
    ] + [(same, same, same) for same in (
        "a=b; Path=/proxy/8080", "a=b; Path=", "a=b; Path", "a=b; Path=x", "a=b; Domain=example.org",
        "__Host-a=b; Path=/; Secure", "path=/x; SameSite=Lax", "a=\xe4\"; Expires=Wed, 09 Jun 2021 10:18:14 GMT",
        "port_proxy_8080=x", "port_proxy_8080 \t=x", "port_proxy_8080; a=b",  # the app is another proxy
    )] + [(ours, None, None) for ours in (
        "port_proxy_8888=x; Path=/", "port_proxy_8888_app=x", "port_proxy_1=x", "port_proxy_8888",
        "port_proxy_8888 =x", " =port_proxy_8888=x",
    )])
    def test_cookie_of_the_app_is_set_below_the_prefix(self, cookie, stripped, absolute):
        for target, expected in ((STRIPPED + "/a", stripped), (ABSOLUTE + "/a", absolute), (ABSOLUTE + "/", absolute)):
            values = [value for name, value in sent_to_client(("Set-Cookie", cookie), target=target)]
            assert values == ([] if expected is None else [expected])

    @pytest.mark.parametrize("target, arrives", [
        ("/proxy/absolute/8080/x?token=OURS", "/proxy/absolute/8080/x"), ("/proxy/8080?a", "/?a"),
        ("/proxy/8080/\xe4?token=OURS&\xf6", "/\xe4?\xf6"), ("/proxy/absolute/8080?a", "/proxy/absolute/8080?a"),
        ("/pro%78y/8080//%2F?", "//%2F?"),
    ] + [("/proxy/8080/b" + query, "/b" + kept) for query, kept in (
        ("?a&token=OURS&b=", "?a&b="), ("?token=OURS&a&token=mine", "?a&token=mine"), ("?a=%zz&&", "?a=%zz&&"),
        ("?%74oken=OURS", ""), ("?xtoken=OURS", "?xtoken=OURS"),
    )])
    def test_url_of_the_app_arrives_without_our_token(self, target, arrives):
        gate, target = gate_with(token=TOKEN), target.replace("OURS", TOKEN)
        asked = asked_for(target, "Referer: " + US + target, "Destination: " + US + target, gate=gate)
        line, fields = split_head(request_for_upstream(asked, gate))
        found = [line.split(" ")[1]] + [dict(fields)[name][len(HOME) :] for name in ("Referer", "Destination")]
        assert found == [arrives.replace("OURS", TOKEN)] * 3

    @pytest.mark.parametrize("name, sent, arrives", [
        ("Authorization", "Bearer its-own", "Bearer its-own"), ("Authorization", "Basic OURS", "Basic OURS"),
        ("Authorization", "token OURS", None), ("Authorization", "BEARER  OURS", None),
        ("Referer", US + "/proxy/8080/p?token=OURS#token=x", "http://localhost:8080/p#token=x"),
        ("Referer", "http://a/p?b&token=OURS#x?token=y", "http://a/p?b#x?token=y"),
    ] + [("Cookie", sent, arrives) for sent, arrives in (
        ("OWN=x; OWN=stale; a=b", "a=b"), ('a="x y";b ; OWN=x;c', 'a="x y";b ;c'), ("a;\tOWN=x", "a"),
        ("xOWN=x; \xe4=OWN=x; OWN=x", "xOWN=x; \xe4=OWN=x"), ("OWN_app=x;  a", "a"), ("port_proxy_1=x; a", "a"),
        (" =OWN=x", None), ("a ;;b=", "a ;;b="), ("port_proxy_8080=x", "port_proxy_8080=x"),
    )], ids=case_id)
    def test_own_credentials_are_removed_and_other_bytes_stay(self, name, sent, arrives):
        line = ("%s: %s" % (name, sent)).replace("OURS", TOKEN).replace("OWN", "port_proxy_8888")
        fields = dict(sent_upstream(line, token=TOKEN))
        assert fields.get(name) == (arrives and arrives.replace("OURS", TOKEN).replace("OWN", "port_proxy_8888"))

    @pytest.mark.parametrize("cookie, rewritten", [
        ("a=b", "a=b; Path=%s/"), ("a=b; Max-Age=1", "a=b; Max-Age=1; Path=%s/"),
        ("a=b; Path=", "a=b; Path=; Path=%s/"), ("a=b; Path=%s/", "a=b; Path=%s/"),
        ("a=b; Path=%s/x; Path", "a=b; Path=%s/x; Path; Path=%s/"),
    ])
    def test_cookie_whose_default_path_is_wider_is_set_below_the_prefix(self, cookie, rewritten):
        """If the prefix was left out, or its slash: the default is the folder of the URL."""
        for target, is_unprefixed in (("/a", True), ("", False)):
            for prefix in (STRIPPED, ABSOLUTE):
                field = ("Set-Cookie", cookie.replace("%s", prefix))
                fields = sent_to_client(field, target=prefix + target, is_unprefixed=is_unprefixed)
                assert fields[0] == ("Set-Cookie", rewritten.replace("%s", prefix))

    @pytest.mark.parametrize("allowed", ["/", "/a/", "./", "../../", US + "/", STRIPPED + "/../../", STRIPPED, ""])
    @pytest.mark.parametrize("prefix", [STRIPPED, ABSOLUTE])
    def test_service_worker_controls_no_more_than_its_app(self, prefix, allowed):
        """Without the field its scope could be the folder of all apps, or the whole origin."""
        fields, own = [("Service-Worker-Allowed", allowed)] * bool(allowed), ("Service-Worker-Allowed", prefix + "/")
        assert sent_to_client(*fields, target=prefix + "/a") == ([own] if fields else [])
        assert sent_to_client(*fields, target=prefix + "/a", is_unprefixed=True) == [own]
        assert own in sent_to_client(*fields, target=prefix)
        assert sent_to_client(*fields, target="http://8080.localhost/a") == fields

    def test_response_is_written_anew(self):
        fields = (
            ("A", "b"), ("Connection", "x-c, close"), ("X-C", "d"), ("Keep-Alive", "x"), ("Set-Cookie", "a"),
            ("Transfer-Encoding", "chunked"), ("Upgrade", "h2"), ("Trailer", "Y"), ("Proxy-Authenticate", "x"),
            ("Set-Cookie", "b"), ("X_Forwarded-For", "c"),
        )
        kept = [("A", "b"), ("Set-Cookie", "a"), ("Set-Cookie", "b"), ("X_Forwarded-For", "c")]
        kept.append(("Transfer-Encoding", "chunked"))
        assert sent_to_client(*fields) == kept

    @pytest.mark.parametrize("method, status, length", [
        ("HEAD", 200, "5"), ("GET", 304, "5"), ("HEAD", 304, "5"), ("GET", 200, "5"), ("GET", 204, None),
        ("HEAD", 204, None), ("GET", 103, None), ("GET", 101, None),
    ])
    def test_length_of_a_body_that_is_not_sent_is_kept(self, method, status, length):
        """HEAD and 304 keep their Content-Length, equal copies as one; 1xx and 204 may have none."""
        for lengths in (["5"], ["5", "5"], ["5 , 5"]):
            fields = sent_to_client(*[("Content-Length", one) for one in lengths], method=method, status=status)
            assert [value for name, value in fields if name == "Content-Length"] == ([length] if length else [])

    @pytest.mark.parametrize("client, domains, url", [
        (("http", "LocalHost:8888"), "localhost", "http://80.localhost:8888/"),
        (("http", "127.0.0.1:8888"), "localhost", "http://80.localhost:8888/"),
        (("http", "[::1]:8888"), "localhost b.c", "http://80.localhost:8888/"),
        (("https", "localhost"), "localhost", "https://80.localhost/"), (("http", "localhost:1"), "", ""),
        (("http", "a.example:1"), "localhost", ""),
        (("https", "b.c"), "localhost b.c", "https://80.b.c/"), (("http", ""), "localhost", ""),
        (("http", "a.example:8888"), "localhost b.c", "http://80.b.c:8888/"),
        (("http", "99.localhost:8888", 99), "localhost", "http://80.localhost:8888/"),
    ])
    def test_host_form_is_one_that_this_client_can_reach(self, client, domains, url):
        assert port_proxy.host_form(80, port_proxy.ClientInfo("192.0.2.1", *client), tuple(domains.split())) == url


# ------ Unprefixed requests ------------------------------------------------------------------------------------------

# The path of our own page that makes the request, or the fields; whether it is a page visit; the prefix of the
# redirect, None for a 404.  LAST(80) stands for the cookie after a visit of app 80, LAST for the name of that cookie;
# OTHERS(80) is made by another proxy, and MOVED(80) by this one for another app.
UNPREFIXED = [
    (["/proxy/absolute/80/a?b"], False, "/proxy/absolute/80"), (["/proxy/80"], True, "/proxy/80"),
    (["/proxy/db:80/#x"], False, "/proxy/db:80"), (["/"], False, None), (["/", "Cookie: LAST(90)"], False, "/proxy/90"),
    (["/proxy/80/", "Cookie: LAST(90)"], False, "/proxy/80"), (["Cookie: LAST(90)"], False, None),
    (["/worker.js", "Cookie: a=b; LAST(absolute/90)"], False, "/proxy/absolute/90"),
    (["/proxy/", "Cookie: LAST(90)"], False, None),  # from the proxy's own page
    (["/proxy?a", "Cookie: LAST(90)"], True, None),
    (["Referer: http://evil/proxy/80/", "Cookie: LAST(90)"], True, None),
    (["/proxy/80/", "Sec-Fetch-Site: cross-site"], True, None),
    (["/proxy/80/", "Sec-Fetch-Site: same-site"], False, None), (["/proxy/80/", "Origin: http://evil"], False, None),
    (["/proxy/80/", "Origin: null"], False, None), (["Origin: http://evil", "Cookie: LAST(90)"], False, None),
    (["/proxy/80/", "Origin: " + US, "Sec-Fetch-Site: same-origin"], False, "/proxy/80"),
    (["Sec-Fetch-Site: same-origin", "Origin: null", "Cookie: LAST(90)"], False, "/proxy/90"),
    (["Sec-Fetch-Site: none", "Cookie: LAST(90)"], False, None), (["Sec-Fetch-Site: same-origin"], False, None),
    (["Sec-Fetch-Site: none", "Cookie: LAST(90)"], True, "/proxy/90"), (["Cookie: LAST(90)"], True, "/proxy/90"),
    (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: same-origin", "Cookie: LAST(90)"], False, None),
    (["Origin: " + US, "Cookie: LAST([::1]:90)"], False, "/proxy/[::1]:90"),
] + [(["Origin: " + US, "Cookie: " + cookies], False, None) for cookies in (
    "LAST=80", "LAST=", "LAST=.", "LAST=80." + "x" * 43, "LAST=80.\xe4", "xLAST(80)", "LAST(80)x", "OTHERS(80)",
    "LAST(80); LAST(90)", "LAST(90); LAST=80", "LAST=80; LAST(90)", "MOVED(80)",
)]


def cookies_set(answer):
    return [value for name, value in answer[1] if name.lower() == "set-cookie"]


def result_of(answer):
    return status_of(answer), fields_of(answer).get("location")


def cookies_of_visit(gate, app, *cookies, lines=VISIT):
    """The Set-Cookie values that a browser gets with a page of an app that sets these cookies."""
    visit = asked_for("/proxy/%s/" % app, *lines, gate=gate)
    head = "HTTP/1.1 200 OK\r\n%s\r\n" % "".join("Set-Cookie: %s\r\n" % cookie for cookie in cookies)
    answer = parse_response(head.encode(), "GET", gate.config)
    sent = port_proxy.response_lines(answer, visit, gate)
    sent += port_proxy.cookies_for_unprefixed(visit, answer, sent, gate)
    return [line[len("Set-Cookie: ") :] for line in sent if line.startswith("Set-Cookie")]


def cookie_at_the_app(gate, target, *lines):
    """The value of the Cookie field that the app gets with a request."""
    asked = find_app(asked_for(target, *lines, gate=gate), gate)
    return dict(split_head(request_for_upstream(asked, gate))[1])["Cookie"]


class TestUnprefixedRequests:
    @pytest.mark.parametrize("lines, is_page_visit, prefix", UNPREFIXED, ids=case_id)
    def test_request_leads_to_the_app_it_comes_from(self, lines, is_page_visit, prefix):
        """By the Referer, or else the app opened last: a page of another port of this host cannot sign that cookie."""
        gate, other = gate_with(host_allowlist=["db"]), gate_with()

        def cookie(match):
            maker, app = other if match.group(1) == "OTHERS" else gate, match.group(2)
            value = cookies_of_visit(maker, app)[0].split(";")[0]
            return value.replace("/%s." % app, "/90.") if match.group(1) == "MOVED" else value

        made = r"(LAST|OTHERS|MOVED)\((.*?)\)"
        fields = ["Referer: " + US + line if line[0] == "/" else re.sub(made, cookie, line) for line in lines]
        fields = [field.replace("LAST", gate.app_cookie) for field in fields] + ["Accept: text/html"] * is_page_visit
        asked = asked_for("/a/%2F?b", *fields, gate=gate)
        if prefix:
            found = find_app(asked, gate)
            assert (found.route.prefix, found.path, found.query) == (prefix, "/a/%2F", "?b")
        else:
            assert status_of_error(find_app, asked, gate) == 404

    @pytest.mark.parametrize("base, target, page, status", [
        ("/proxy", target, "/proxy/80/", 404) for target in ("/proxy/x", "/proxy/99999/", "/proxy//", "/%70roxy/x")
    ] + [("/", "/absolute/x", "/80/", 404), ("/", "/static/a", "/", 404), ("/proxy", "/../8081/", "/proxy/80/", 400)])
    def test_path_of_the_proxy_or_out_of_the_app_is_refused(self, base, target, page, status):
        gate = gate_with(base=base)
        asked = asked_for(target, "Referer: " + US + page, "Sec-Fetch-Site: same-origin", gate=gate)
        assert status_of_error(find_app, asked, gate) == status

    @pytest.mark.parametrize("base, form, method, lines, body", [
        ("", "/%d", "GET", (), b""), ("", "/absolute/%d", "FROB", (), b""), ("/proxy", "/%d", "GET", (), b""),
        ("/proxy", "/%d", "POST", ("Content-Length: 6",), b"abcdef"),
        ("/proxy", "/absolute/%d", "PUT", ("Transfer-Encoding: chunked",), chunk(b"abc") + chunk(b"def") + chunk(b"")),
    ])
    def test_complete_request_is_redirected_without_the_token(self, start, app, base, form, method, lines, body):
        """By 307, which keeps method and body. Browsers read no response before, however long an upload takes."""
        proxy, prefix = start(base=base, token=TOKEN, linger_timeout=0.1), base + form % app.port
        lines += ("Referer: %s%s/x" % (US, prefix), "Origin: " + US)
        raw = request(method, "/static/a%%2F\xe4?token=%s&b=/c" % TOKEN, *lines, body=body)
        with proxy.sent(raw[:-1]) as wire:
            assert not select.select([wire.sock], [], [], 0.3 if body else 0)[0]
            wire.send(raw[-1:], request("OPTIONS", "*", "Authorization: token " + TOKEN))
            answer = wire.message()
            assert (result_of(answer), fields_of(answer)["cache-control"]) == (
                (307, prefix + "/static/a%2F\xe4?b=/c"), "no-store",
            )
            assert status_of(wire.message(no_body=True)) == 204
        assert app.connections == 0

    @pytest.mark.parametrize("method, lines, body, stall_timeout, status", [
        ("POST", ("Content-Length: 6", "Expect: 100-continue"), b"", WAIT, 307),
        ("POST", ("Transfer-Encoding: chunked",), b"x\r\n", WAIT, 400), ("GET", ("Content-Length: 6",), b"", WAIT, 307),
        ("POST", ("Content-Length: 6",), b"a", 0.2, 408),
    ], ids=["expects 100", "bad chunk", "not a form", "stops"])
    def test_upload_that_will_not_come_is_answered(self, start, method, lines, body, stall_timeout, status):
        raw = request(method, "/upload", "Referer: %s/proxy/80/" % US, "Origin: " + US, *lines, body=body)
        assert status_of(start(stall_timeout=stall_timeout, linger_timeout=0.1).ask(raw)) == status

    @pytest.mark.parametrize("options", [{}, {"whole_origin": True}], ids=case_id)
    def test_origin_that_is_shared_with_others_has_no_redirects(self, start, upstream, options):
        """And no cookies of the proxy for all its paths."""
        app, proxy = upstream(answering(ok(b"", "Set-Cookie: a=b"))), start(base="/a/b", **options)
        prefix = "/a/b/%d" % app.port
        assert result_of(proxy.get("/", *VISIT)) == ((302, "/a/b/") if options else (404, None))
        assert status_of(proxy.get("/static/a", "Referer: %s%s/" % (US, prefix))) == (307 if options else 404)
        assert len(cookies_set(proxy.get(prefix + "/", *VISIT))) == (3 if options else 1)

    def test_opened_app_is_remembered_in_a_cookie(self):
        """Set only when it changes, and only when a page is opened."""
        gate = gate_with()
        (cookie,) = cookies_of_visit(gate, 80)
        assert re.fullmatch(r"port_proxy_8888_app=/proxy/80\.[\w-]{43}; Path=/; HttpOnly; SameSite=Lax", cookie)
        known = ("Cookie: " + cookie.split(";")[0],) + VISIT
        for lines in (
            known, ("Sec-Fetch-Mode: cors", "Accept: */*"), ("Sec-Fetch-Dest: iframe",) + VISIT,
            ("Accept: text/html", "Sec-Fetch-Mode: no-cors"),
        ):
            assert cookies_of_visit(gate, 80, lines=lines) == []
        assert len(cookies_of_visit(gate, 90, lines=known)) == 1

    @pytest.mark.parametrize("target, lines, status", [
        ("/socket.io/?a", ("Origin: " + US,) + HANDSHAKE, 101),
        ("/sw.js", ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Dest: serviceworker"), 200),
    ], ids=["WebSocket", "service worker"])
    def test_request_that_follows_no_redirect_is_served_in_place(self, proxy, upstream, target, lines, status):
        """The app gets it as if it had come with the prefix, without the proxy's cookie."""
        app = upstream(serve_sockets)
        cookie = cookie_of(proxy.ask(to(app, *VISIT)))
        assert status_of(proxy.get(target, cookie, *lines, no_body=status == 101)) == status
        sent = fields_of(app.messages[-1])
        assert app.messages[-1][0] == "GET %s HTTP/1.1" % target
        assert (sent["x-forwarded-prefix"], "cookie" in sent) == ("/proxy/%d" % app.port, False)

    def test_apps_cookies_are_copied_for_all_paths(self):
        """If they would not be sent outside of the prefix. Each app gets its own copies, and in place alone."""
        cookies = (
            "a=1; Path=/; Secure; Max-Age=9", "b=2", "c=3; Path=/x; HttpOnly; Domain=localhost",
            "__Host-d=4; Path=/; Secure",
        )
        gate, pairs = gate_with(), []
        for app in (80, 90):
            values = cookies_of_visit(gate, app, *cookies)
            assert values[0] == "a=1; Path=/proxy/%d/; Secure; Max-Age=9" % app
            copies = [re.fullmatch(r"port_proxy_8888_app_\w+_([abc]=.*)", value).group(1) for value in values[4:-1]]
            assert copies == [
                "a=1; Path=/proxy/%d/; Secure; Max-Age=9; Path=/; HttpOnly" % app, "b=2; Path=/; HttpOnly",
                "c=3; Path=/proxy/%d/x; HttpOnly; Path=/; HttpOnly" % app,
            ]
            pairs += [value.split(";")[0] for value in values[4:]]
        assert not any(value.startswith("port_proxy_") for value in cookies_of_visit(gate, 80, *cookies, lines=()))
        line, page = "Cookie: own=x; " + "; ".join(reversed(pairs)), "Referer: %s/proxy/90/" % US
        assert cookie_at_the_app(gate, "/ws", line, page) == "own=x; c=3; b=2; a=1"
        assert cookie_at_the_app(gate, "/proxy/90/", line, page) == "own=x"
        for line in ("Cookie: b=new; " + "; ".join(pairs), "Cookie: %s; b=new" % "; ".join(pairs)):
            sent = cookie_at_the_app(gate, "/ws", line, page)
            assert sorted(sent.split("; ")) == ["a=1", "b=new", "c=3"]  # a script's cookie replaces the copy

    @pytest.mark.parametrize("smuggled", ["port_proxy_8888=session", "port_proxy_8888_app=80.x", "port_proxy_1=a"])
    def test_proxys_own_cookie_cannot_come_in_as_a_copy(self, smuggled):
        """A cookie that a browser was made to store under the name of a copy is checked like any other cookie."""
        gate = gate_with()
        copy = cookies_of_visit(gate, 80, "x=y")[1].split(";")[0]
        line = "Cookie: %s; %s" % (copy[: -len("x=y")] + smuggled, copy)
        assert cookie_at_the_app(gate, "/ws", line, "Referer: %s/proxy/80/" % US) == "x=y"

    @pytest.mark.parametrize("host, options, advice", [
        ("localhost:8888", {}, "http://8080.localhost:8888/"), ("localhost:8888", {"domains": ()}, None),
        ("8080.vm:1", {}, "For 8080.vm to be port 8080, start the proxy with --domain vm."),
        ("8080.A.example", {}, "--domain a.example."), ("8080.vm", {"domains": ()}, None),
    ] + [(host, {}, None) for host in ("8080.127.0.0.1", "99999999.vm", "70000.vm", "8080.a_b", "vm", "8080")])
    def test_not_found_page_advises_a_host_of_its_own(self, host, options, advice):
        gate = gate_with(**options)
        with pytest.raises(ProxyError) as caught:
            find_app(asked_for("/packages/a.whl", "Sec-Fetch-Mode: cors", host=host, gate=gate), gate)
        assert (caught.value.status, caught.value.detail.startswith("No port is named here.")) == (404, True)
        assert advice in caught.value.detail if advice else not re.search("--domain|http://8080", caught.value.detail)

    def test_root_is_redirected_to_the_ports_page_or_the_app_of_the_referer(self, proxy, upstream):
        cookie = cookie_of(proxy.ask(to(upstream(answering(OK)), *VISIT)))
        assert result_of(proxy.get("/", cookie, "Sec-Fetch-Site: none", *VISIT)) == (302, "/proxy/")
        assert result_of(proxy.get("/", "Referer: %s/proxy/80/x" % US, *VISIT)) == (307, "/proxy/80/")

    @pytest.mark.parametrize("port, upstream, stays", [
        (8888, form, True) for form in ("80", "absolute/80", "127.0.0.1:80", "[::1]:80", "localhost:80")
    ] + [
        (8888, form, False) for form in ("127.0.0.2:80", "absolute/db:80", "[fe80::1]:80", "81", "8", "8888")
    ] + [(8, "80", True), (80, "80", False), (800, "80", True)])
    def test_cookies_of_another_proxy_reach_its_port_alone(self, port, upstream, stays):
        """An allowed host with its port number gets no session of this machine."""
        gate = port_proxy.TokenGate(checked_config(Config()), True, port)
        cookies = "port_proxy_80=a; port_proxy_80_app=b; port_proxy_80_app_1_x=c"
        ours = "; port_proxy_%d=x; port_proxy_%d_app=y; port_proxy_%d_app_1_x=z; d=e" % (port, port, port)
        found = cookie_at_the_app(gate, "/proxy/%s/" % upstream, "Cookie: " + cookies + ours)
        assert found == (cookies + "; d=e" if stays else "d=e")


# ------ Access -------------------------------------------------------------------------------------------------------


def at(host, method, target, *lines, body=b""):
    return request(method, target, *lines, body=body).replace(b"Host: here:8888", b"Host: " + host.encode())


def cookie_of(message):
    """The Cookie field that a browser would send after this answer."""
    return "Cookie: " + fields_of(message)["set-cookie"].split(";")[0]


def answers_in_turn(proxy, raws, **how):
    """The answers to many requests, which are sent one behind the other on one connection."""
    answers = []
    with proxy.wire() as wire:
        for start in range(0, len(raws), 100):  # so many that neither side has to wait for the other to read
            wire.send(b"".join(raws[start : start + 100]))
            answers += [wire.message(**how) for _ in raws[start : start + 100]]
    return answers


def answers_at_once(proxy, raws):
    """The answers to many requests, each on a connection of its own."""
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(proxy.sent(raw)) for raw in raws]
        return [wire.message(no_body=raw.startswith(b"HEAD ")) for wire, raw in zip(wires, raws)]


async def admit_all(head, client, route):
    """An `authorize` that admits every request."""


class Hasty(asyncio.SelectorEventLoop):
    """An event loop whose timers fire at once; `waited` is the sum of their seconds."""

    waited = 0

    def call_later(self, delay, callback, *args, **options):
        self.waited += delay
        return super().call_later(0, callback, *args, **options)


def outcomes(gate, *raws):
    """For each request: the error with which the gate answers it, or None; and how many seconds it waits."""

    async def serve(raw):
        head, _, body = raw.partition(b"\r\n\r\n")
        asked = port_proxy.parse_request(head + b"\r\n\r\n", "127.0.0.1", "http", gate.config)
        form = loop.create_future()
        form.set_result(body)
        try:
            if asked.route is None or asked.client.app_port:
                await gate.respond(asked, lambda: form)
            await gate.authorize(find_app(asked, gate))
        except ProxyError as error:
            return error
        return None

    found = []
    with contextlib.closing(Hasty()) as loop:
        for raw in raws:
            loop.waited = 0
            found.append((loop.run_until_complete(serve(raw)), loop.waited))
    return found


def refusal(gate, raw):
    """The error with which a gate answers a request, as (status, detail); (200, "") if it admits the request."""
    ((error, _),) = outcomes(gate, raw)
    return (error.status, error.detail) if error else (200, "")


def redirect(gate, raw):
    """The answer of a gate to a request: (status, Location, Set-Cookie)."""
    ((error, _),) = outcomes(gate, raw)
    fields = dict(error.fields)
    return error.status, fields.get("Location"), fields.get("Set-Cookie")


def session_of(gate, host="here:8888"):
    """The Cookie field of a browser that has signed in at this host."""
    cookie = redirect(gate, at(host, "GET", gate.config.base + "/?token=" + TOKEN, *VISIT))[2]
    return "Cookie: " + cookie.split(";")[0]


class TestHostCheck:
    NAMES = {
        "allow_hostnames": ["mine.example.org", "*.example.net", "[2001:db8::7]"],
        "domains": ["apps.example.com"],
    }
    OPEN = {"is_private": False, "token": "", "allow_hostnames": ()}  # nobody can point an address elsewhere
    BEHIND = {"trusted_proxies": ["127.0.0.1"], "allow_hostnames": ["pub.a"]}  # a page cannot set Host

    @pytest.mark.parametrize("is_known, options, forwarded, hosts", [
        (True, NAMES, "", "localhost localhost:8888 LOCALHOST:1 a.localhost:8888 127.0.0.1:8888 127.9.9.9 [::1]:8888"),
        (True, NAMES, "", "mine.example.org a.b.example.net:80 [2001:db8::7]:1"),
        (True, NAMES, "", "80.localhost:8888 80.APPS.example.com:1 apps.example.com other.80.apps.example.com"),
        (False, NAMES, "", "80apps.example.com 80.example.com 80.localhost.evil.example 80.apps.example.com."),
        (False, NAMES, "", "evil.example evil.example:8888 localhost.evil.example xlocalhost localhost. 192.0.2.1"),
        (False, NAMES, "", "0.0.0.0 [::]:8888 [2001:db8::1] 127.0.0.1.evil.example mine.example.org."),
        (False, OPEN, "", "evil.a"), (True, OPEN, "", "192.0.2.1:8888 [2001:db8::1] " + socket.gethostname()),
        (False, BEHIND, "pub.a", "evil.a"), (False, BEHIND, "evil.a", "pub.a"), (True, BEHIND, "pub.a", "localhost"),
    ])
    def test_name_that_may_lead_elsewhere_is_refused(self, is_known, options, forwarded, hosts):
        """DNS rebinding: a page can point its own name here."""
        gate, lines = gate_with(**options), ["X-Forwarded-Host: " + forwarded] * bool(forwarded)
        for host in hosts.split():
            for raw in (
                at(host, "GET", "/proxy/80/", *lines), request("GET", "http://%s/proxy/80/" % host, *lines),
                at(host, "GET", "/proxy/80/", *lines, *HANDSHAKE),
            ):
                status, detail = refusal(gate, raw)
                assert (status, "--allow-hostname" in detail) == ((200, False) if is_known else (403, True)), host

    def test_request_without_a_host_is_served(self):
        assert refusal(gate_with(allow_hostnames=()), b"GET /proxy/ HTTP/1.0\r\n\r\n") == (200, "")

    @pytest.mark.parametrize("host, is_named", [("evil.example", True), ("--no-token", False)])
    def test_advice_names_no_host_that_looks_like_an_option(self, host, is_named):
        status, detail = refusal(gate_with(allow_hostnames=()), at(host, "GET", "/proxy/1/"))
        assert (status, "--allow-hostname %s if" % host in detail) == (403, is_named)


def sign_in_form(token, target, *lines, base="/proxy"):
    form = urlencode({"token": token, "next": target}).encode()
    return request("POST", base + "/", "Content-Length: %d" % len(form), *(lines + VISIT), body=form)


class TestToken:
    @pytest.fixture
    def proxy(self, start):
        return start(token=TOKEN, allow_hostnames=())

    def test_nothing_is_reached_without_the_token(self, proxy, app):
        """A browser gets a form, or a link to it at the host of an app, whose own pages could read the token."""
        rows = [
            (401, "GET"), (401, "GET", *VISIT), (401, "GET", *VISIT, "Authorization: token wrong"), (401, "PROPFIND"),
            (401, "HEAD", *VISIT), (401, "POST", "Content-Length: 0", *VISIT), (403, "GET", *HANDSHAKE),
            (403, "GET", *HANDSHAKE, "Authorization: Bearer wrong"),
            (401, "OPTIONS", "Origin: http://evil", "Access-Control-Request-Method: POST"),
        ] + [(401, "GET", "Cookie: port_proxy_%d=%s" % (proxy.port, value)) for value in ("x" * 43, "\xe4")]
        rows += [(401, "GET", "Authorization: " + value) for value in (
            "Basic " + base64.b64encode(TOKEN.encode()).decode(), "token wrong", TOKEN, "token wrong\xe4",
        )]
        own_host = "%d.localhost:8888" % app.port
        addresses = [("a", "/proxy/%d" % app.port), ("a", "/proxy/absolute/%d/?token=wrong" % app.port)]
        addresses += [(own_host, target) for target in ("/", "/proxy/", "/?ticket=guess")]
        raws = [at(host, method, target, *lines) for host, target in addresses for _, method, *lines in rows]
        raws.append(sign_in_form("wrong", "/proxy/8080/x"))
        at_app = sign_in_form(TOKEN, "/a").replace(b"here:8888", own_host.encode())
        answers = answers_at_once(proxy, raws + [at_app])
        assert [status_of(answer) for answer in answers] == [row[0] for row in rows] * 5 + [401, 401]
        assert b'value="/proxy/8080/x"' in answers[-2][2]
        links = ['href="http://localhost:8888/proxy/%s"' % query for query in ("", "?open=%d" % app.port)]
        for raw, answer in zip(raws, answers):
            assert "set-cookie" not in fields_of(answer)
            if not raw.startswith(b"HEAD"):
                body, is_visit, is_at_app = html.unescape(answer[2].decode()), b"text/html" in raw, b".localhost" in raw
                assert ("Invalid token." in body) is (b"wrong" in raw), raw
                assert ("<form" in body) is (is_visit and not is_at_app)
                assert [link in body for link in links] == [is_visit and is_at_app] * 2
                assert "wrong" not in body.replace(raw.split()[1].decode(), "")
        assert app.connections == 0

    @pytest.mark.parametrize("base, target, location", [("/proxy", target, "/proxy/") for target in (
        "//evil/proxy/", "/\\evil", "https://evil/", "/elsewhere", "/proxyx/", "/proxy/\r\nX: y", "javascript:a(1)", "",
    )] + [("", target, "/") for target in ("//evil", "/\\evil", "/a\\\\evil")] + [
        ("/ana%2Btest", target, "/ana%2Btest/80/a?b") for target in (
            "/ana+test/80/a?b", "/an%61+test/80/a?b", "/ana%2Btest/80/a?b",
        )
    ] + [("/proxy", same, same) for same in (
        "/proxy/80/a?b=%22&c", "/proxy/80/\xc3\xa9?n=\xe4", "/proxy/?open=80",
    )], ids=case_id)
    def test_sign_in_leads_below_the_path_of_the_cookie(self, base, target, location):
        """By the form of the page, or by the token in the address. Browsers compare the path undecoded."""
        gate = gate_with(token=TOKEN, base=base)
        if location != base + "/":
            assert redirect(gate, request("GET", target + "&token=" + TOKEN, *VISIT))[:2] == (302, location)
            asked = request("GET", target, *VISIT)
            ((error, _),) = outcomes(gate, asked)
            assert ("Content-Security-Policy", "frame-ancestors 'none'") in error.fields
            page = html.unescape(port_proxy.error_response(error, parsed(asked), gate.config).body.decode())
            target = re.search('action="%s/".* name="next" value="(.*?)"' % re.escape(base), page, re.S).group(1)
        assert redirect(gate, sign_in_form(TOKEN, target, base=base))[:2] == (303, location)

    def test_sign_in_page_of_an_unprefixed_request_leads_to_the_app(self):
        ((error, _),) = outcomes(gate_with(token=TOKEN), request("GET", "/x?y", "Referer: %s/proxy/80/" % US, *VISIT))
        assert (error.status, error.target) == (401, "/proxy/80/x?y")

    def test_sign_in_form_has_a_size_limit(self, proxy):
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 9000", body=b"a" * 9000))) == 413

    def test_sign_in_from_another_site_is_refused(self):
        assert refusal(gate_with(token=TOKEN), sign_in_form(TOKEN, "/proxy/", "Origin: http://evil"))[0] == 403

    @pytest.mark.parametrize("options, host, target, location, attributes", [({}, *case) for case in (
        ("a", "/proxy/80/a?x=%2F&token=OURS&token=its-own&y", "/proxy/80/a?x=%2F&token=its-own&y", "Path=/"),
        ("80.localhost", "/a?token=OURS&b", "/a?b", "Path=/"),
        ("80.localhost", "//evil.example/?token=OURS", "/", "Path=/"),
    )] + [
        ({"whole_origin": False}, "a", "/proxy/?token=OURS", "/proxy/", "Path=/proxy"),
        ({"base": "/user/ana/proxy"}, "a", "/user/ana/proxy/?token=OURS", "/user/ana/proxy/", "Path=/user/ana/proxy"),
        ({"base": "/ana"}, "80.localhost", "/an%61/80/?token=OURS", "/an%61/80/", "Path=/"),
        ({"trusted_proxies": ["127.0.0.1"]}, "a", "/proxy/?token=OURS", "/proxy/", "Path=/proxy; Secure"),
    ], ids=case_id)
    def test_page_visit_with_the_token_is_signed_in_and_redirected(self, options, host, target, location, attributes):
        """The cookie stays below the base if others share the origin; a token parameter of the app's own stays."""
        gate = gate_with(token=TOKEN, **options)
        session = "a=b"
        for _ in range(2):  # it may be signed in
            lines = ("X-Forwarded-Proto: https", "Cookie: " + session) + VISIT
            status, found, cookie = redirect(gate, at(host, "GET", target.replace("OURS", TOKEN), *lines))
            session, *rest = cookie.split("; ")
            assert (status, found) == (302, location)
            assert re.fullmatch(r"port_proxy_8888=[A-Za-z0-9_-]{43}", session)
            assert set(rest) == {"HttpOnly", "SameSite=Lax", *attributes.split("; ")}
        assert refusal(gate, at(host, "GET", location, "Cookie: " + session)) == (200, "")

    @pytest.mark.parametrize("query, field, waited", [
        (TOKEN, "", 0), (TOKEN, "Bearer apps-own", 0), ("wrong", "", 1), ("", "Bearer wrong", 1),
        ("wrong", "Bearer wrong", 1), (TOKEN + "&token=wrong", "", 0), ("wrong&token=" + TOKEN, "", 1),
        ("&".join("token=%d" % n for n in range(1200)) + "&token=" + TOKEN, "", 1),
    ] + [("apps-own", scheme + TOKEN, 0) for scheme in ("token ", "Token ", "Bearer ", "bearer  ")], ids=case_id)
    def test_wrong_token_is_answered_a_second_later(self, caplog, query, field, waited):
        """A right one is admitted at once, from any page. One token per place counts; the log has the address."""
        lines = ["Origin: http://evil"] + ["Authorization: " + field] * bool(field)
        for method, more in (("POST", []), ("GET", HANDSHAKE)):
            raw = request(method, "/proxy/80/?token=" + query, *lines, *more)
            ((error, delay),) = outcomes(gate_with(token=TOKEN), raw)
            assert (error is not None, delay) == (waited > 0, waited)
        assert [one.getMessage() for one in caplog.records] == ["invalid token from 127.0.0.1"] * 2 * waited

    def test_wrong_token_delays_nobody_else(self, proxy):
        """Its connection alone is delayed, and its next request with it."""
        begun = time.monotonic()
        wrong = request("GET", "/proxy/", "Authorization: token wrong")
        right = request("OPTIONS", "*", "Authorization: token " + TOKEN)
        with proxy.sent(wrong + right) as slow:
            assert [status_of(answer) for answer in answers_at_once(proxy, [wrong] * 30)] == [401] * 30
            assert status_of(proxy.ask(right, no_body=True)) == 204
            assert time.monotonic() - begun < 30
            assert [status_of(slow.message()), status_of(slow.message(no_body=True))] == [401, 204]
        assert time.monotonic() - begun >= 1

    def test_many_sign_ins_end_no_session(self):
        """A program may send the token with every request, as a page visit."""
        gate, other = gate_with(token=TOKEN), gate_with(token=TOKEN)
        cookie = session_of(gate)
        errors = outcomes(gate, *[request("GET", "/proxy/?token=" + TOKEN, *VISIT)] * 1000)
        assert {error.status for error, _ in errors} == {302}
        assert refusal(gate, request("GET", "/proxy/", cookie)) == (200, "")
        assert refusal(other, request("GET", "/proxy/", cookie))[0] == 401

    def test_client_that_reads_no_response_is_cut_off(self, start):
        proxy = start(token=TOKEN, head_timeout=0.3)
        with slow_wire(proxy) as wire:
            wire.sock.settimeout(0.3)
            wire.offer(*[request("GET", "/proxy/") * 100] * 100000)
            eventually(lambda: not proxy.open_connections())

    @pytest.mark.parametrize("options, is_open", [
        ({}, True), ({"token": ""}, True), ({"bind": "0.0.0.0", "token": ""}, True), ({"bind": "0.0.0.0"}, False),
        ({"bind": "0.0.0.0", "token": "any", "authorize": admit_all}, True),
    ], ids=case_id)
    def test_random_token_is_asked_for_if_other_machines_can_connect(self, start, options, is_open):
        one, other = start(**options), start(**options)
        assert status_of(one.ask(request("OPTIONS", "*"), no_body=True)) == (204 if is_open else 401)
        assert (one.proxy.token == other.proxy.token) is is_open
        assert len(one.proxy.token) >= (0 if is_open else 32)

    @pytest.mark.parametrize("token", ["", TOKEN])
    @pytest.mark.parametrize("allow", [False, True])
    def test_preflight_is_admitted_if_allowed(self, token, allow):
        """The request behind the preflight is refused, and OPTIONS alone is no preflight."""
        gate, origin = gate_with(token=token, allow_preflight=allow), "Origin: http://evil"
        lines = ("Access-Control-Request-Method: POST", "Sec-Fetch-Mode: cors", "Sec-Fetch-Site: cross-site")
        refused = 401 if token else 403
        assert refusal(gate, request("OPTIONS", "/proxy/80/", origin, *lines))[0] == (200 if allow else refused)
        assert refusal(gate, request("POST", "/proxy/80/", "Content-Length: 0", origin, *lines))[0] == refused
        assert refusal(gate, request("OPTIONS", "/proxy/80/", origin))[0] == refused

    def test_no_secret_is_in_the_log_or_a_response(self, proxy, app, caplog):
        with caplog.at_level(logging.DEBUG):
            cookie = cookie_of(proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN), *VISIT))
            targets = ("/proxy/%d/" % app.port, "/nothing", "/proxy/1/")
            answers = [proxy.get(target + "?token=" + TOKEN, cookie) for target in targets]
            answers.append(proxy.get("/proxy/1:1:1?token=" + TOKEN, "Authorization: token " + TOKEN))
        said = repr(answers) + caplog.text
        assert TOKEN not in said
        assert cookie.split("=", 1)[1] not in said


class TestHostForm:
    """http://8080.localhost:8888/ is port 8080, the path untouched, with an origin of its own."""

    @pytest.mark.parametrize("target", [
        "/a/%2F//..%2f/../../b?q=%20", "/proxy/", "/proxy/1/", "/proxy", "/absolute/80/", "/..", "/\xe4?\xf6",
        "/?ticket=x",
    ])
    def test_every_path_is_the_apps(self, target):
        own = "80.localhost:8888"
        lines = ("Origin: http://" + own, "Referer: http://%s/p?q" % own)
        for start, host in (("", own), ("http://" + own, "a")):
            gate = gate_with(allow_hostnames=())
            asked = asked_for(start + target, *lines, host=host, gate=gate)
            sent, fields = split_head(request_for_upstream(asked, gate))
            assert sent == "GET %s HTTP/1.1" % target
            assert fields == [
                ("Host", "localhost:80"), ("Origin", "http://localhost:80"), ("Referer", "http://localhost:80/p?q"),
                ("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", "http"),
            ]

    def test_forwarded_host_of_a_trusted_proxy_names_the_port(self):
        options = {"trusted_proxies": ["192.0.2.7"], "domains": ["a.b"], "upstream_tls": ["80"]}
        lines = ("X-Forwarded-Host: 80.a.b", "X-Forwarded-Proto: https", "Origin: https://80.a.b")
        assert ("Origin", "https://localhost:80") in sent_upstream(*lines, target="/x", host="inner", **options)

    def test_no_name_is_a_port_under_a_hub(self):
        hub = port_proxy.hub_in(hub_environment())
        assert PortProxy(Config(hub=hub, base=hub.prefix + "/proxy")).config.domains == ()


@pytest.fixture
def put_forward(monkeypatch):
    """Put the clock forward by some seconds. As the first fixture of a test, it ends after the proxies."""
    clock, steps = time.monotonic, []
    for module, name in ((time, "monotonic"), (port_proxy, "now")):
        monkeypatch.setattr(module, name, lambda: clock() + sum(steps))
    return steps.append


class TestSignInAtAHost:
    def test_ticket_signs_in_at_its_own_host(self, start, app, caplog):
        proxy, host, opening = start(token=TOKEN), "%d.localhost:8888" % app.port, "/proxy/?open=%d" % app.port
        with caplog.at_level(logging.DEBUG):
            led = proxy.ask(at("localhost:8888", "GET", opening, "Authorization: token " + TOKEN, *VISIT))
            assert (status_of(led), fields_of(led)["referrer-policy"]) == (303, "no-referrer")
            target = fields_of(led)["location"]
            ticket = re.fullmatch(r"http://%s/\?ticket=([A-Za-z0-9_-]{43})" % host, target).group(1)
            entered = proxy.get(target, *VISIT)
            assert result_of(entered) == (303, "/")
        assert ticket not in caplog.text
        assert "ticket=" not in caplog.text
        expected = r"port_proxy_%d=[A-Za-z0-9_-]{43}; Path=/; HttpOnly; SameSite=Lax" % proxy.port
        assert re.fullmatch(expected, *cookies_set(entered))
        assert status_of(proxy.ask(at(host, "GET", "/a?b", cookie_of(entered)))) == 200
        for elsewhere in ("localhost:8888", "1.localhost:8888", "%d.localhost.:8888" % app.port):
            assert status_of(proxy.ask(at(elsewhere, "GET", "/proxy/%d/" % app.port, cookie_of(entered)))) == 401
        assert [message[0] for message in app.messages] == ["GET /a?b HTTP/1.1"]
        assert "cookie" not in fields_of(app.messages[0])

    def test_ticket_is_valid_once_at_one_host_among_the_latest(self):
        gate = gate_with(token=TOKEN)
        asked = at("localhost", "GET", "/proxy/?open=80", session_of(gate, "localhost"), *VISIT)
        urls = [dict(error.fields)["Location"] for error, _ in outcomes(gate, *[asked] * 1001)]
        used = [urls[0], urls[1], urls[-1], urls[-1], urls[2].replace("80.", "81."), urls[2]]
        answers = outcomes(gate, *[request("GET", url, *VISIT) for url in used])
        assert [error.status for error, _ in answers] == [401, 303, 303, 401, 401, 401]

    def test_ticket_expires_after_half_a_minute(self, put_forward):
        gate = gate_with(token=TOKEN)
        asked = at("localhost", "GET", "/proxy/?open=80", "Authorization: token " + TOKEN)
        early, late = (redirect(gate, asked)[1] for _ in range(2))
        put_forward(29)
        assert redirect(gate, request("GET", early, *VISIT))[0] == 303
        put_forward(2)
        assert redirect(gate, request("GET", late, *VISIT)) == (401, None, None)

    @pytest.mark.parametrize("options, host, port, status, location", [
        ({}, "localhost:8888", 80, 303, "http://80.localhost:8888/"), ({}, "localhost", 99999, 404, None),
        ({}, "a.example", 1, 404, None), ({"domains": ["b.c"]}, "b.c:1", 80, 303, "http://80.b.c:1/"),
    ])
    def test_host_of_an_app_needs_no_ticket_without_a_token(self, options, host, port, status, location):
        gate, raw = gate_with(**options), at(host, "GET", "/proxy/?open=%d" % port)
        assert redirect(gate, raw)[:2] == (status, location)
        advice = "--domain NAME. All subdomains of NAME must resolve to this machine"
        assert (advice in refusal(gate, raw)[1]) is (status == 404)


# Method, Origin, Sec-Fetch-Site, Sec-Fetch-Mode, and whether a browser that sends credentials on its own may.
FROM_PAGES = [
    ("POST", "http://here:8888", "same-origin", "cors", True), ("POST", "https://here:8888", None, None, True),
    ("POST", None, None, None, True), ("POST", "http://evil", None, None, False), ("POST", "null", None, None, False),
    ("POST", "http://here", None, None, False), ("DELETE", "http://evil", "cross-site", "cors", False),
    ("POST", "http://evil", "cross-site", "navigate", False), ("GET", "http://evil", None, None, False),
    ("POST", "http://localhost:1", "same-site", "cors", False), ("GET", "", None, None, False),
    ("GET", "http://here:8888", None, None, True), ("GET", None, "cross-site", "no-cors", False),
    ("GET", None, "cross-site", "navigate", True), ("GET", None, "same-site", "no-cors", False),
    ("GET", None, "none", "navigate", True), ("GET", None, "same-origin", "no-cors", True),
    ("HEAD", None, "cross-site", "no-cors", False), ("OPTIONS", "http://evil", None, None, False),
    ("WS", "http://here:8888", "same-origin", "websocket", True), ("WS", None, None, None, True),
    ("WS", "http://evil", None, None, False), ("WS", "http://localhost:8888", "same-site", "websocket", False),
    ("POST", "null", "same-origin", None, True),  # a form of a page without referrers
    ("POST", "null", "cross-site", None, False), ("POST", "null", "none", None, False),
]


class TestOrigin:
    @pytest.mark.parametrize("kind", ["open", "cookie", "token", "authorize", "any origin", "this origin"])
    def test_request_of_another_site_is_refused(self, kind):
        """Unless it has the token, which a page of another site does not know, or such pages are allowed."""
        options = {
            "open": {}, "cookie": {"token": TOKEN}, "token": {"token": TOKEN}, "authorize": {"authorize": admit_all},
            "any origin": {"allow_origins": ["*"]}, "this origin": {"allow_origins": ["http://EVIL:80"]},
        }
        gate, credentials = gate_with(**options[kind]), ["Accept: text/html"]
        if kind == "cookie":
            credentials.append(session_of(gate))
        elif kind == "token":
            credentials.append("Authorization: token " + TOKEN)
        for method, origin, site, mode, is_admitted in FROM_PAGES:
            fields = [("Origin", origin), ("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode)]
            lines = credentials + ["%s: %s" % field for field in fields if field[1] is not None]
            if method == "WS":
                method, lines = "GET", lines + list(HANDSHAKE)
            is_allowed = kind in ("token", "any origin") or (kind == "this origin" and origin == "http://evil")
            status = 200 if is_admitted or is_allowed else 403
            assert refusal(gate, request(method, "/proxy/80/", *lines))[0] == status, (method, fields)

    @pytest.mark.parametrize("status, lines", [
        (403, ["Referer: http://evil/"]), (200, ["Referer: http://evil/", "Accept: text/html"]),
        (200, ["Referer: https://here:8888/x"]), (403, ["Referer: http://here/x"]),
        (403, ["Referer: http://here:8888.evil/"]), (403, ["Referer: /x"]), (200, ["Referer: http://a.b/x?y"]),
        (200, ["Referer: "]), (200, ["Referer: about:blank"]), (403, ["Referer: about:blank", "Referer: http://evil/"]),
        (403, ["Referer: http://here:8888/", "Referer: http://evil/"]), (403, ["Referer: http://evil/", *HANDSHAKE]),
        (200, ["Referer: http://evil/", "Sec-Fetch-Site: same-origin"]), (403, ["Referer: http://a.b:81/x"]),
        (200, ["Referer: http://a.b/x", "Sec-Fetch-Site: cross-site"]),
        (403, ["Referer: http://a.b/x", "Origin: http://evil"]),
    ] + [(status, ["Sec-Fetch-Site: " + site, "Sec-Fetch-Dest: " + dest, *VISIT]) for status, site, dest in (
        (200, "cross-site", "document"), (403, "cross-site", "iframe"), (403, "cross-site", "object"),
        (200, "same-origin", "iframe"), (403, "same-site", "iframe"), (200, "same-site", "document"),
    )], ids=case_id)
    def test_referer_or_frame_of_another_site_is_refused(self, status, lines):
        """The Referer counts without Sec-Fetch fields, over plain HTTP. In a frame, an app could read the others."""
        raw = request("GET", "/proxy/80/a.png", *lines)
        assert refusal(gate_with(allow_origins=["http://a.b"]), raw)[0] == status
        assert refusal(gate_with(allow_origins=["*"]), raw)[0] == 200

    @pytest.mark.parametrize("method, line, option", [
        ("GET", "Sec-Fetch-Dest: image", "*"), ("GET", "Origin: https://a.example", "https://a.example"),
        ("GET", "Referer: https://a.example/x", "https://a.example"), ("GET", "Referer: https://a.example$(id)/x", "*"),
        ("POST", "Origin: null", "*"), ("POST", "Origin: \xe4", "*"), ("POST", "Origin: http://{value}", "*"),
        ("POST", "Origin: HTTPS://Evil.example:443", "https://evil.example"), ("POST", "Origin: http://a<b", "*"),
        ("POST", "Origin: http://a;reboot;$(id)", "*"), ("POST", "Origin: http://*", "*"),
        ("POST", "Origin: http://[a:b]", "*"), ("POST", "Origin: http://[::1]:81", "http://[::1]:81"),
    ])
    def test_advice_for_a_refused_page_helps(self, method, line, option):
        """It names no origin that the option refuses, and nothing that a shell interprets."""
        raw = request(method, "/proxy/1/a", "Sec-Fetch-Site: cross-site", line)
        status, detail = refusal(gate_with(), raw)
        advice = "'*' to allow every page." if option == "*" else option + " to allow it."
        assert (status, detail.endswith(" Start the proxy with --allow-origin " + advice)) == (403, True)
        assert refusal(gate_with(allow_origins=[option]), raw)[0] == 200
        # nginx sends its own target as Host unless it is told not to; our own pages then look foreign.
        behind = refusal(gate_with(trusted_proxies=["127.0.0.1"]), raw)[1]
        assert ("must pass Host unchanged" in behind, behind.startswith(detail)) == (option != "*", True)

    @pytest.mark.parametrize("allowed, origin, status", [
        ("HTTPS://A.example:443", "https://a.example", 200), ("https://a.example", "https://A.example:443", 200),
        ("http://a:8080", "http://a", 403), ("http://[::1]:80", "http://[::1]", 200),
        ("https://a:80", "https://a:80", 200), ("https://a:80", "http://a", 403),
        ("https://*.a.example", "https://x.y.a.example", 200), ("https://*.a.example", "https://a.example", 403),
        ("https://*.a.example", "http://x.a.example", 403), ("http://10.*:8080", "http://10.evil:8080", 403),
        ("http://[fe80::*]", "http://[fe80::1]", 200), ("http://a", "http://*", 403),
    ])
    def test_allowed_origin_is_compared_in_its_normal_form(self, allowed, origin, status):
        raw = request("POST", "/proxy/80/", "Content-Length: 0", "Origin: " + origin)
        assert refusal(gate_with(allow_origins=[allowed]), raw)[0] == status


class TestAuthorize:
    def test_callable_is_called_once_per_request(self, start, app):
        """Also for an Upgrade, an unprefixed request, the proxy's own page, which has no route, and any host name."""
        calls = []

        async def authorize(head, client, route):
            calls.append((head.method, head.path, client.address, route and route.port))

        target = "/proxy/%d/" % app.port
        proxy = start(authorize=authorize, bind="0.0.0.0", allow_hostnames=())
        requests = ((target,), (target,) + HANDSHAKE, ("/x", "Referer: " + US + target), ("/proxy/",))
        assert [status_of(proxy.get(*one)) for one in requests] == [200, 200, 307, 200]
        seen = [(path, port) for method, path, address, port in calls if (method, address) == ("GET", "127.0.0.1")]
        assert seen == [("/", app.port), ("/", app.port), ("/x", app.port), ("/", None)]

    @pytest.mark.parametrize("outcome, status, location, text, logged", [
        (ProxyError(402, "Not you."), 402, None, "Not you.", ""), (KeyError("oops"), 500, None, "Internal", "KeyError"),
        (ProxyError(302, "", (("Retry-After", 5), ("Location", "/\xe4 b"))), 302, "/\xe4 b", "", ""),
        (False, 500, None, "Internal", "must return None"), ("secret", 500, None, "Internal", "must return None"),
    ], ids=case_id)
    def test_callable_admits_by_returning_none_alone(self, start, app, caplog, outcome, status, location, text, logged):
        """Nothing is connected then.  A callable that answers a question is a mistake, too."""

        async def authorize(head, client, route):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        proxy = start(authorize=authorize)
        for lines in ((), HANDSHAKE):
            answer = proxy.get("/proxy/%d/" % app.port, *lines)
            assert (result_of(answer), text in answer[2].decode()) == ((status, location), True)
            assert b"oops" not in answer[2]
        assert app.connections == 0
        assert logged in caplog.text if logged else not caplog.text
        assert "secret" not in caplog.text

    @pytest.mark.parametrize("name, value", [
        ("Location", "/a\r\nX: y"), ("Location", "/a\ny"), ("Location", "/\u0142"), ("X: y\r\nZ", "a"), ("", "a"),
        ("X", "\0"),
    ])
    def test_field_of_an_error_cannot_become_another(self, name, value):
        """A callable may put decoded input into a Location."""
        with pytest.raises(ValueError, match="header"):
            ProxyError(302, "", (("Retry-After", 5), (name, value)))


class TestTrustedProxies:
    @pytest.mark.parametrize("trusted, peer, lines, address, arrives", [  # arrives: For, Proto, Host, Port
        ("10.0.0.0/8", "127.0.0.1", "For:1.2.3.4 Proto:https Host:evil", "127.0.0.1", "127.0.0.1 http here:8888 8888"),
        ("10.0.0.0/8", "", "For:1.2.3.4", "", "None http here:8888 8888"),
        ("unix", "127.0.0.1", "For:1.2.3.4", "127.0.0.1", "127.0.0.1 http here:8888 8888"),
        ("unix", "", "For:1.2.3.4", "1.2.3.4", "1.2.3.4 http here:8888 8888"),
        ("::1", "::1", "For:1.2.3.4", "1.2.3.4", "1.2.3.4,::1 http here:8888 8888"),
        ("127.0.0.0/8", "127.0.0.1", "For:1.2.3.4 Proto:HTTPS Host:pub.a", "1.2.3.4",
         "1.2.3.4,127.0.0.1 https pub.a 443"),
        ("127.0.0.0/8", "127.0.0.1", "For:6.6.6.6,1.2.3.4 For:127.9.9.9", "1.2.3.4",
         "6.6.6.6,1.2.3.4,127.9.9.9,127.0.0.1 http here:8888 8888"),
        ("127.0.0.0/8", "127.0.0.1", "For:1.2.3.4,,127.9.9.9 For:", "1.2.3.4",
         "1.2.3.4,127.9.9.9,127.0.0.1 http here:8888 8888"),
    ] + [("127.0.0.1", "127.0.0.1", lines, "127.0.0.1", "127.0.0.1 " + arrives) for lines, arrives in (
        ("Host:a/b Proto:gopher Port:x For:", "http here:8888 8888"), ("Host:pub:81 Port:8443", "http pub:81 8443"),
        ("Proto:https,http Host:a:1,b:2 Port:443,80", "https a:1 443"), ("Host:[::1]", "http [::1] 80"),
        ("Proto:http,https Proto: Host:a Host:b", "http b 80"), ("Host:[::1]:99 Port:123456", "http [::1]:99 99"),
        ("Host:pub:", "http pub: 80"),
    )])
    def test_forwarded_fields_count_from_a_trusted_proxy_alone(self, trusted, peer, lines, address, arrives):
        """Of several addresses, the client's is the last one that is no trusted proxy itself."""
        raw = request("GET", "/proxy/80/", *("X-Forwarded-" + line for line in lines.split()))
        asked = parsed(raw, peer, trusted_proxies=[trusted])
        sent = dict(split_head(request_for_upstream(asked, gate_with()))[1])
        assert asked.client.address == address
        assert [sent.get("X-Forwarded-" + name, "None") for name in ("For", "Proto", "Host", "Port")] == [
            value.replace(",", ", ") for value in arrives.split()
        ]

    @pytest.mark.parametrize("bind, trusted, arrives", [
        ("127.0.0.1", ["127.0.0.1"], "1.2.3.4, 127.0.0.1"), ("127.0.0.1", [], "127.0.0.1"),
        ("::1", ["::1"], "1.2.3.4, ::1"), ("unix", ["unix"], "1.2.3.4"), ("unix", [], None),
    ])
    def test_trusted_proxy_is_recognised_by_its_socket(self, start, app, tmp_path, bind, trusted, arrives):
        path = str(tmp_path / "socket")
        try:
            proxy = start(bind="unix:" + path if bind == "unix" else bind, trusted_proxies=trusted)
        except (OSError, ValueError):
            pytest.skip("this system has no sockets of this kind")
        with Wire.to_unix(path) if bind == "unix" else Wire.to(proxy.port, bind) as wire:
            assert status_of(wire.ask(to(app, "X-Forwarded-For: 1.2.3.4"))) == 200
        assert fields_of(app.messages[0]).get("x-forwarded-for") == arrives


# ------ Ports --------------------------------------------------------------------------------------------------------

JSON = "Accept: application/json"


def assert_says(response, status, *texts):
    """The response has this status, and its body all these texts."""
    assert status_of(response) == status
    for text in texts:
        assert text in response[2]


def ports_in(response):
    """The ports in a JSON response at the base, by number."""
    assert (status_of(response), fields_of(response)["content-type"]) == (200, "application/json; charset=utf-8")
    return {row["port"]: row for row in json.loads(response[2].decode())["ports"]}


@needs_proc
class TestPorts:
    @pytest.mark.parametrize("host, reached", [
        ("127.0.0.1", ("localhost", "127.0.0.1")), ("127.0.0.2", ()), ("0.0.0.0", ("localhost", "127.0.0.1")),
        ("::1", ("localhost", "::1")), ("::", ("localhost", "127.0.0.1", "::1")),
        ("::ffff:127.0.0.1", ("localhost", "127.0.0.1")),
    ])  # fmt: skip
    def test_listener_is_listed_and_reached_by_its_address(self, proxy, upstream, host, reached):
        """localhost is tried at 127.0.0.1 and then at ::1; an address is that address alone."""
        with app_alone_at(host, upstream, reached) as app:
            row = ports_in(proxy.get("/proxy/", JSON))[app.port]
            address = host.replace("::ffff:", "")
            assert (row["addresses"], row["pid"]) == ([address], os.getpid())
            assert 0 <= row["seconds"] < 86400
            for name, prefix in (("localhost", ""), ("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")):
                response = proxy.get("/proxy/%s%d/" % (prefix, app.port))
                if b"No connection to" not in response[2]:  # else this machine has no IPv6
                    text = "The app on port %d listens on %s only, not on %s." % (app.port, address, name)
                    assert status_of(response) == (200 if name in reached else 502)
                    assert name in reached or text in response[2].decode()
                    assert (b"Start it with 127.0.0.1" in response[2]) is (not reached)
        hosts = ["[::1]" if name == "::1" else name for name in reached]
        assert [fields_of(message)["host"] for message in app.messages] == ["%s:%d" % (one, app.port) for one in hosts]


OTHER_USER = 1234567


@contextlib.contextmanager
def file_system_user(user):
    """Sockets belong to the file system user of the thread that makes them, which new threads inherit (setfsuid(2))."""
    libc = ctypes.CDLL(None)
    libc.setfsuid(user)
    try:
        yield
    finally:
        libc.setfsuid(0)


def own_address():
    """An address of this machine besides loopback ones; "" if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))  # that sends nothing
        return sock.getsockname()[0]
    return ""


@pytest.mark.skipif(
    not os.path.exists("/proc/net/tcp") or os.geteuid() != 0, reason="only root on Linux can listen as somebody else"
)
class TestPortOwner:
    @pytest.fixture(params=["netlink", "table"], autouse=True)
    def source(self, request, monkeypatch):
        """The owner of a single socket comes by netlink or, without it, from the table of all sockets."""
        if request.param == "table":
            monkeypatch.delattr(socket, "AF_NETLINK")
        return request.param

    def app_of(self, user, upstream, **how):
        with file_system_user(user):
            return upstream(answering(OK), **how)

    @pytest.mark.parametrize("host", list(filter(None, ["127.0.0.1", "0.0.0.0", "::1", "::", own_address()])))
    def test_port_of_another_ordinary_user_is_a_403(self, start, upstream, source, host):
        """jupyter-server-proxy issue 590: this holds whatever address the other user's program listens on."""
        name = {"0.0.0.0": "127.0.0.1", "::1": "[::1]", "::": "127.0.0.1"}.get(host, host)
        proxy, open_proxy = (start(any_owner=is_open, host_allowlist=[name]) for is_open in (False, True))
        requests = [("/proxy/%s:%%d/" % name, HANDSHAKE)]
        if host != own_address() and source == "netlink":  # a table takes long to read after many connections
            requests += [("/proxy/%d/", ()), ("/proxy/absolute/%d/", ())]
        allowed, other = (self.app_of(user, upstream, host=host).port for user in (33, OTHER_USER))
        for form, lines in requests:
            assert status_of(proxy.get(form % allowed)) == 200
            assert status_of(open_proxy.get(form % other)) == 200
            text = b"belongs to another user, number %d" % OTHER_USER
            assert_says(proxy.get(form % other, *lines), 403, text, b"--any-owner")

    def test_proxy_of_an_ordinary_user_reaches_ports_of_the_same_user(self, upstream, source):
        # What is imported later may lie where this user may not read.
        code = "import encodings.ascii, encodings.idna, encodings.latin_1, os, port_proxy, pwd, socket\n"
        code += "os.setuid(%d)\n%sport_proxy.main()" % (OTHER_USER, "del socket.AF_NETLINK\n" * (source == "table"))
        with program(command=(sys.executable, "-c", code)) as (_, _, port):
            for user, status in ((OTHER_USER, 200), (OTHER_USER + 1, 403), (33, 200), (0, 200)):
                assert status_of(ProxyAt(port).get("/proxy/%d/" % self.app_of(user, upstream).port)) == status

    @pytest.mark.parametrize("user, host, user_of_ipv6, statuses", [
        (OTHER_USER, "::1", 0, {"127.0.0.1:": 403, "": 403, "[::1]:": 200}),
        (0, "::", OTHER_USER, {"": 200, "[::1]:": 403}),  # for IPv4, the listener at the very address comes first
    ])
    def test_owner_is_found_by_address_and_port(self, proxy, upstream, user, host, user_of_ipv6, statuses):
        port = self.app_of(user, upstream).port
        self.app_of(user_of_ipv6, upstream, host=host, port=port)
        assert {name: status_of(proxy.get("/proxy/%s%d/" % (name, port))) for name in statuses} == statuses

    @pytest.mark.parametrize("user, is_early, accepted_by, then, error", [
        (0, True, OTHER_USER, "", None),  # as nginx, whose workers are another user's
        (0, True, 0, "closes", None),  # as `nc -l`, which stops listening
        (OTHER_USER, True, 0, "", ProxyError),
        # Another user listens for a moment only; the accepted socket is closed before its owner is looked up.
        (OTHER_USER, False, None, "closes", ProxyError), (OTHER_USER, False, None, "is followed", ProxyError),
        (0, True, None, "closes", ProxyError),  # the kernel names root for a socket that is closed
    ])
    def test_user_of_the_listening_socket_is_the_owner(self, user, is_early, accepted_by, then, error):
        with contextlib.ExitStack() as stack:
            with file_system_user(user):
                listener = stack.enter_context(socket.socket())
            follower, address = stack.enter_context(socket.socket()), ("127.0.0.1", 0)
            for sock in (listener, follower):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                address = sock.getsockname()
            if is_early:
                listener.listen(1)
            with pytest.raises(error) if error else contextlib.ExitStack():
                had_known_owner = port_proxy.has_known_owner(address)
                listener.listen(1)
                client = stack.enter_context(socket.create_connection(address, WAIT))
                with file_system_user(accepted_by or 0):
                    accepted = stack.enter_context(listener.accept()[0])
                if accepted_by is None:
                    accepted.close()
                if then:
                    listener.close()
                if then == "is followed":
                    follower.listen(1)
                port_proxy.check_owner(address, client.getsockname(), had_known_owner)

    def test_unknown_owner_is_refused(self, start, app, monkeypatch, source):
        """The system hides its table of sockets; nothing of the proxy itself is changed."""
        if source == "netlink":
            return
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", Mock(side_effect=FileNotFoundError))
            response, open_response = start().ask(to(app)), start(any_owner=True).ask(to(app))
        assert (status_of(response), status_of(open_response)) == (403, 200)
        assert b"could not be determined. Its pages could use your other apps as you. If you trust it, " in response[2]


# ------ Pages --------------------------------------------------------------------------------------------------------


def write_proc(folder, programs):
    """Make a folder that stands for /proc, from the arguments of programs by port, which is their process id, too."""
    rows = [
        ("127.0.0.1", 8090, 0, os.geteuid() + 1, 80810),  # of another user
        ("127.0.0.1", 8090, 80, os.geteuid(), 80810),  # connected
        ("127.0.0.1", 8090, 0, os.geteuid(), 1),  # without a process, as one of another container on the same network
        ("192.0.2.7", 8081, 0, os.geteuid(), 80810),
    ]
    for port, arguments in programs.items():
        process = folder / str(port)
        (process / "fd").mkdir(parents=True)
        if arguments is not None:
            (process / "cmdline").write_text("".join(argument + "\0" for argument in arguments))
        (process / "fd" / "3").symlink_to("socket:[%d]" % (10 * port))
        rows.append(("127.0.0.1", port, 0, os.geteuid(), 10 * port))
    (folder / "uptime").write_text("%.2f 0\n" % UPTIME)
    (folder / "net").mkdir()
    row = "0: %08X:%04X 00000000:%04X 0A 00000000:00000000 00:00000000 00000000 %5d        0 %d 1 0 100 0 0 10 0\n"
    table = [row % (struct.unpack("=I", socket.inet_aton(address)) + tuple(rest)) for address, *rest in rows]
    (folder / "net" / "tcp").write_text("sl local_address\n" + "".join(table))


def write_start(process, age):
    ticks = int((UPTIME - age) * os.sysconf("SC_CLK_TCK"))
    (process / "stat").write_text("1 (a) b) S %s%d 0 0\n" % ("0 " * 18, ticks))


UPTIME = 10000000.0
PROGRAMS = [
    (["/usr/bin/python3", "-m", "http.server", "--secret=x"], "http.server"),
    (["python3.11", "-u", "-B", "/srv/app.py", "--token", "x"], "app.py"),
    (["/usr/bin/node", "/a/b/vite.js"], "vite.js"), (["/opt/code-server", "--auth", "x"], "code-server"),
    (["python3", "-c", "print('secret')"], "python3"), (["node", "-e", "const PASSWORD='hunter2'"], "node"),
    (["perl", "-Mstrict", "-e", "my $k='sk-secret'"], "perl"), (["bash", "-lc", "secret=x serve"], "bash"),
    (["java", "-cp", "x.jar", "Main"], "java"), (["python3", "-m"], "python3"),
    (["python3", "my secret.py"], "python3"), (["python3"], "python3"),
    (["nginx: master process nginx -c /etc/secret.conf", "", ""], "nginx"),
    (["puma 6.4.0 (tcp://0.0.0.0:3000) [app]"], "puma"), (["postgres: worker db=//u:s3cret@h/n"], "postgres"),
    ([""], ""), ([], ""), (None, ""), (["\x1b[31m\x9bx\x7f"], "\x1b[31m\x9bx\x7f"),
]


@pytest.fixture(scope="class")
def listing(tmp_path_factory):
    """A /proc that is made by hand: (the port of an app, the folder, a function for the rows that a proxy lists)."""
    folder = tmp_path_factory.mktemp("proc")
    app = Upstream(answering(ok(b"<title>&lt;i&gt;t&lt;/i&gt;</title>", "Content-Type: text/html")))
    with contextlib.ExitStack() as stack:
        stack.callback(app.close)
        own_mounts = ["unshare", "-m" if not hasattr(os, "geteuid") or os.geteuid() == 0 else "-rm"]
        if not shutil.which("unshare") or subprocess.call(own_mounts + ["true"], stderr=subprocess.DEVNULL):
            pytest.skip("this system gives no namespaces")
        command = own_mounts + ["sh", "-c", 'mount --bind "$0" /proc && exec "$@"', str(folder), *MODULE]
        proxy = ProxyAt(stack.enter_context(program(command=command))[2])
        programs = {number: words for number, (words, _) in enumerate(PROGRAMS, 9000)}
        programs.update({port: ["app"] for port in (app.port, 8081, 70, proxy.port)})  # 70 is the system's
        spaced = folder / "of an app" / "serve"
        programs[8081] = [str(spaced), "x"]
        spaced.parent.mkdir()
        spaced.touch()
        write_proc(folder, programs)
        write_start(folder / str(app.port), age=7300)
        proxy.get("/proxy/%d/" % app.port, *VISIT)
        yield app.port, folder, lambda: ports_in(proxy.ask(at("localhost:8888", "GET", "/proxy/", JSON)))
    assert not app.failures


def listed(lines, *rows, target="/proxy/"):
    """The response at the base to a request with these lines that lists these ports."""
    return port_proxy.ports_response("/proxy", rows, asked_for(target, *lines)).body.decode()


def row_of(program="app", addresses=("127.0.0.1",), age=0, title="", host_url=""):
    """A row of port 8080; `age` is in seconds."""
    listener = port_proxy.Listener(8080, addresses, 0, 7, program, time.time() - age)
    return port_proxy.port_row("/proxy", listener, title, host_url)


class TestPages:
    def test_error_is_a_page_for_a_navigation_and_repeats_nothing_of_the_request(self, proxy):
        forms = "/proxy/<port>/, /proxy/<host>:<port>/, /proxy/absolute/<port>/ and /proxy/absolute/<host>:<port>/."
        for target, status, says in (
            ("/EVIL", 404, forms), ("/proxy/EVIL", 404, forms), ("/proxy/EVIL:80/", 404, forms),
            ("/proxy/1/../EVIL", 400, ""),
        ):
            for method, lines, kind in (
                ("GET", VISIT, "html"), ("POST", VISIT, "html"), ("GET", (), "plain"), ("PUT", VISIT[:1], "plain"),
            ):
                response = proxy.ask(request(method, target.replace("EVIL", "<script>alert(1)</script>"), *lines))
                text = '<a href="/proxy/">All ports</a>' if kind == "html" else says
                assert_says(response, status, text.encode())
                assert fields_of(response)["content-type"] == "text/%s; charset=utf-8" % kind, (method, lines)
                assert b"<script" not in response[2], target

    def test_path_without_the_prefix_is_told_the_right_one(self, proxy):
        for path, targets in (
            ("/proxy/5000/", "/5000/ /5000 /5000/a?b /proxy/localhost/5000 /proxy/http://localhost:5000/x"),
            ("/proxy/5000/", "/localhost:5000/ /port/5000/"),
            ("/proxy/absolute/5000/", "/absproxy/5000/ /absolute/5000/"), ("/proxy/db:80/", "/db:80/x"),
            ("", "/api/5000 /proxy/a /99999/ /050/ /5000x/"),
        ):
            for target in targets.split():
                page, text = proxy.get(target, *VISIT), proxy.get(target)
                assert (status_of(page), status_of(text)) == (404, 404)
                found = [re.findall("Did you mean (.*?)[?]", answer[2].decode()) for answer in (page, text)]
                assert found == ([['<a href="{0}">{0}</a>'.format(path)], [path]] if path else [[], []]), target

    def test_error_page_runs_and_loads_nothing(self):
        """CVE-2024-35225: what a page says is text, whatever it says."""
        error = ProxyError(502, "<script>alert(1)</script>&. Start it with --any-owner.")
        page = port_proxy.error_response(error, asked_for("/proxy/80/", *VISIT))
        fields = dict(page.fields)
        assert b"&lt;script&gt;alert(1)&lt;/script&gt;&amp;." in page.body
        assert b'<code class="option">--any-owner</code>' in page.body
        assert b"<script" not in page.body
        assert fields["X-Content-Type-Options"] == "nosniff"
        nonce = re.search('<style nonce="([^"]{22})">', page.body.decode()).group(1)
        for directive in ("default-src 'none'", "script-src 'nonce-%s'" % nonce, "style-src 'nonce-%s'" % nonce):
            assert directive in fields["Content-Security-Policy"]

    def test_response_at_the_base_names_the_forms_of_an_address(self, proxy):
        for lines, kind in (((), "text/plain"), (VISIT, "text/html")):
            for target in ("/proxy", "/proxy/"):
                response = proxy.get(target, *lines)
                assert (status_of(response), fields_of(response)["content-type"]) == (200, kind + "; charset=utf-8")
                assert fields_of(response)["cache-control"] == "no-store"
                for form in (b"/proxy/8080/", b"/proxy/absolute/8080/", b"/proxy/db1.example.org:8080/"):
                    assert form in response[2]
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 0"))) == 405

    def test_list_for_the_script_of_the_ports_page_runs_and_loads_nothing(self, proxy):
        policy = fields_of(proxy.get("/proxy/?list"))["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'self'" in policy

    def test_page_says_if_no_port_is_listed(self):
        empty = '<p id="none"%s>No port to show. On Linux, the ports of your programs appear here.'
        assert empty % "" in listed(VISIT)
        assert empty % " hidden" in listed(VISIT, row_of())
        assert 'name="port"' in listed(VISIT)

    @pytest.mark.parametrize("age, text", [
        (0, "just started"), (-1000, "just started"), (80, "1 minute"), (3550, "59 minutes"), (3610, "1 hour"),
        (7300, "2 hours"), (90000, "1 day"), (180000, "2 days"),
    ])
    def test_port_is_listed_with_its_program_title_and_age(self, age, text):
        """As data, text or a page, which escapes the names. The age is negative if the clock was set back."""
        url = "http://8080.localhost:8888/"
        row = row_of("<b>app\x1b[31m\x9b", ("192.0.2.7", "::2"), age, "<i>t</i>", url)
        found = json.loads(listed([JSON], row))["ports"][0]
        assert age <= found.pop("seconds") < age + WAIT
        assert found == {
            "port": 8080, "addresses": ["192.0.2.7", "::2"], "program": "<b>app\x1b[31m\x9b", "pid": 7,
            "title": "<i>t</i>",
            "links": {"host": url, "stripped": "/proxy/8080/", "absolute": "/proxy/absolute/8080/"},
        }
        about = " \u00b7 ".join([r"<b>app\x1b[31m\x9b", text, "listens on 192.0.2.7, ::2 only, not on localhost"])
        assert re.search("(?m)^/proxy/8080/ +%s$" % re.escape(about), listed([], row))
        for page in (listed(VISIT, row), listed(["Accept: */*"], row, target="/proxy/?list")):
            assert page.count("<li id=") == 1
            for part in (
                '<a class="port" href="%s">8080</a>&lt;i&gt;t&lt;/i&gt;' % url, html.escape(about),
                'href="/proxy/8080/"', 'href="/proxy/absolute/8080/"',
            ):
                assert part in page
            assert not re.search("<[bi]>|[\0-\x09\x0b-\x1f\x7f-\x9f]", page)
        assert "listens on" not in listed([], row_of(addresses=("127.0.0.2", "::1")))

    def test_own_ports_are_listed(self, listing):
        """But none of the system, of other users or containers, nor the proxy's. Arguments may hold secrets."""
        port, _, rows_now = listing
        rows, programs = rows_now(), range(9000, 9000 + len(PROGRAMS))
        assert list(rows) == sorted([port, 8081, *programs])
        assert [rows[number]["program"] for number in programs] == [name for _, name in PROGRAMS]
        assert 7300 <= rows[port]["seconds"] < 7300 + 2 * WAIT
        assert (rows[port]["title"], rows[port]["pid"]) == ("<i>t</i>", port)
        assert rows[port]["links"]["host"] == "http://%d.localhost:8888/" % port
        assert rows[8081]["addresses"] == ["192.0.2.7", "127.0.0.1"]
        assert (rows[8081]["program"], rows[8081]["seconds"], rows[8081]["title"]) == ("serve", None, None)

    @pytest.mark.parametrize("upstream, addresses, advice", [
        ("127.0.0.1:80", ["127.0.0.2", "::1"], "listens on 127.0.0.2 and ::1 only, not on 127.0.0.1."),
        ("80", ["2001:db8::7"], " with --host-allowlist 2001:db8::7 and open [2001:db8::7]:80 instead of 80."),
        ("db:80", ["127.0.0.1"], "Is the app running, and is this its port?"),  # db may be another machine
    ])
    def test_address_that_an_app_listens_on_is_named_as_it_is_opened(self, upstream, addresses, advice):
        assert port_proxy.not_listening(route_of(upstream), addresses).detail.endswith(advice)

    def test_title_is_forgotten_once_another_program_has_started(self, listing):
        port, folder, rows_now = listing
        write_start(folder / str(port), age=-60)
        eventually(lambda: rows_now()[port]["title"] is None)

    @needs_proc
    def test_link_to_a_ports_own_host_leads_through_the_sign_in(self, start, app):
        raw = at("localhost:8888", "GET", "/proxy/", JSON, "Authorization: token " + TOKEN)
        link = ports_in(start(token=TOKEN).ask(raw))[app.port]["links"]["host"]
        assert link == "/proxy/?open=%d" % app.port

    def test_port_typed_into_the_page_is_opened(self, proxy):
        for port, location in (
            ("8080", "/proxy/8080/"), ("db:80", "/proxy/db:80/"), ("absolute/80", "/proxy/absolute/80/"),
            ("80/x?y", "/proxy/80/"), ("80%0D%0Aa:b", None), ("+http://localhost:5000/x", "/proxy/5000/"),
            ("a", None), ("//evil", None), ("99999", None), ("80/x%0D%0Aa:b", None),
        ):
            response = proxy.get("/proxy/?port=" + port, *VISIT)
            assert result_of(response) == ((303, location) if location else (404, None)), port

    def test_page_visit_gets_a_page_that_waits_if_nothing_listens(self, proxy):
        with taken_port() as port:
            page = proxy.get("/proxy/%d/" % port, *VISIT)
            for method, lines in (("GET", ()), ("POST", VISIT + ("Content-Length: 0",)), ("GET", VISIT + HANDSHAKE)):
                other = proxy.ask(request(method, "/proxy/%d/" % port, *lines))
                assert (status_of(other), fields_of(other)["retry-after"], b"<script" in other[2]) == (502, "2", False)
        fields = fields_of(page)
        assert (status_of(page), fields["port-proxy"], fields["retry-after"]) == (502, "waiting", "2")
        assert fields["cache-control"] == "no-store"
        assert b"Nothing listens on port %d of this machine" % port in page[2]
        assert b"<code>python3 port_proxy.py --check %d</code>" % port in page[2]
        nonce = re.search('<script nonce="([^"]{22})">', page[2].decode()).group(1)
        assert "script-src 'nonce-%s'" % nonce in fields["content-security-policy"]

    @pytest.mark.parametrize("says, lines, text", [
        (b"\x15\x03\x01\x00\x02\x02\x46", (), "speaks TLS. Start the proxy with --upstream-tls PORT"),
        (b"\x15\x03\x01\x00\x02\x02\x46", VISIT, "speaks TLS. Start the proxy with --upstream-tls PORT"),
        (b"", VISIT, "speaks TLS. Start the proxy with --upstream-tls PORT"),
        (b"", (), "without a response. If it speaks TLS, start the proxy with --upstream-tls PORT."),
        (None, VISIT, "closed the connection without a response. Its log may say why."),
    ], ids=case_id)
    def test_app_that_speaks_tls_is_recognized(self, proxy, upstream, says, lines, text):
        """By what it sends; if it only closes, the proxy tries TLS itself, but only for a page visit."""

        def serve(wire, app):
            is_hello = wire.more() and wire.buffer[:1] == b"\x16" and says is not None
            wire.send(b"\x16\x03\x03\x00\x7a\x02" if is_hello else says or b"")

        port = upstream(serve).port
        response = proxy.get("/proxy/%d/" % port, *lines)
        page = re.sub("<[^>]*>", "", response[2].decode())
        assert (status_of(response), text.replace("PORT", str(port)) in page) == (502, True)
        assert ("--upstream-tls" in page) is (says is not None)


class TestTitles:
    HTML = "Content-Type: text/html\r\n"
    TITLES = [  # fields, body, title
        (HTML, b"<html><TITLE class=a> My\n app &amp; more </TITLE>", "My app & more"),
        ("Content-Type: text/html; charset=utf-8\r\n", "<title>\u00e4</title>".encode(), "\u00e4"),
        (HTML + "Content-Encoding: gzip\r\n", gzip.compress(b"<title>a</title>" + bytes(range(256)) * 2000), "a"),
        (HTML + "Content-Encoding: gzip\r\n", gzip.compress(b"<title>d</title>" + random_bytes(5000))[:2000], "d"),
        (HTML + "Content-Encoding: gzip\r\n", b"no gzip", ""), (HTML, b"<title>never closed", ""),
        ("Content-Type: text/plain\r\n", b"<title>a</title>", ""),
        (HTML, b"<title>" + b"x" * 300 + b"</title>", "x" * 100),
        # A pattern with two ways to match would take minutes for some of these.
        (HTML, b"<title>&#" + 5000 * b"9" + b";</title>", ""), (HTML, b"<title" * 10000, ""),
        (HTML, b"<title>" + b"a" * 60000, ""), (HTML, b"<titles>x</titles>", ""),
        (HTML, b"<title>\x1b[31mred\xe2\x80\xae</title>", r"\x1b[31mred\u202e"),
    ]

    @pytest.mark.parametrize("fields, body, title", TITLES, ids=range(len(TITLES)))
    def test_title_is_read_from_the_page(self, fields, body, title):
        response = parse_response(("HTTP/1.1 200 OK\r\n%s\r\n" % fields).encode(), "GET", DEFAULT)
        began = time.process_time()
        assert port_proxy.title_in(response.headers, body) == title
        assert time.process_time() - began < 2

    @needs_proc
    @pytest.mark.parametrize("field, before, behind", [
        (b"Content-Length: 3024\r\n", b"", b""), (b"", b"", b""),
        (b"Transfer-Encoding: chunked\r\n", b"bd0\r\n", b"\r\n0\r\n\r\n"),
    ], ids=["length", "until close", "chunked"])
    def test_title_of_a_visited_page_is_listed(self, proxy, upstream, field, before, behind):
        """It may come at once or in parts; its head is passed on before the body comes."""

        def title():
            return ports_in(proxy.get("/proxy/", JSON))[app.port]["title"]

        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n%s\r\n" % field
        whole, part = (b"<title>%s &amp; B</title>" % name + 3000 * b" " for name in (b"A", b"C"))
        in_parts = script(read_message, head, wait, before, part, behind)
        app = upstream(in_turn(once(head + before + whole + behind), once(OK), in_parts))
        assert status_of(proxy.get("/proxy/%d/" % app.port, *VISIT, until_close=True)) == 200
        assert title() == "A & B"
        proxy.get("/proxy/%d/" % app.port, *VISIT)  # a page without a title
        assert title() == "A & B"
        with proxy.sent(to(app, *VISIT)) as wire:
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
            app.happened.set()
            eventually(lambda: title() == "C & B")


# ------ Upstreams ----------------------------------------------------------------------------------------------------


class TestUpstream:
    @pytest.mark.parametrize("serve, method, lines, body, counts", [
        (answering(OK, answer), "GET", (), b"", (1, 1, 2, 3)) for answer in (
            ok(b"ok", "Connection: close"), OK.replace(b"HTTP/1.1", b"HTTP/1.0"), OK + b"!", OK + ok(b"evil"),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n",
        )
    ] + [
        # After an early response the upstream would take the next request for the rest of the body.
        (script(read_head, OK, read_head, OK), "POST", ("Content-Length: 1000",), b"", (1, 2)),
        # It may be about to close the connection of the response before, and a POST cannot be sent again.
        (script(read_message, OK, hold), "POST", ("Content-Length: 1",), b"a", (1, 2, 3)),
    ], ids=["close", "HTTP 1.0", "a byte", "a second response", "behind the last chunk", "half a request", "no word"])
    def test_connection_with_an_unclear_end_is_not_reused(self, proxy, upstream, serve, method, lines, body, counts):
        """Whether it was fresh or had been reused; bytes behind the response reach no client."""
        app = upstream(serve)
        for count in counts:
            with proxy.sent(to(app, *lines, method=method, body=body)) as wire:
                assert (wire.message()[2], app.connections) == (b"ok", count)
                wire.end()
                assert wire.rest() == b""

    @pytest.mark.parametrize("raw", [ok(b"evil"), b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"x", b""], ids=case_id)
    @pytest.mark.parametrize("is_seen", [True, False])
    def test_pooled_connection_with_bytes_or_eof_is_not_used(self, start, upstream, raw, is_seen):
        """The proxy closes it, or has not read them yet as the request comes; a POST could not be sent again."""

        async def authorize(head, client, route):
            if head.method == "POST":  # meanwhile, the proxy's loop stands still
                app.happened.set()
                assert app.told.wait(WAIT)

        proxy = start(idle_upstream_timeout=10 * WAIT, authorize=authorize)
        steps = (read_message, OK, read_message, OK, wait, raw or end, tell, read_to_the_end)
        app = upstream(in_turn(script(*steps), once(OK)))
        with proxy.sent(to(app), to(app)) as wire:
            assert (wire.message()[2], wire.message()[2]) == (b"ok", b"ok")
            assert count_connections(remote_port=app.port) == 1
            if is_seen:
                app.happened.set()
                eventually(lambda: not count_connections(remote_port=app.port))
            assert wire.ask(to(app, "Content-Length: 1", method="POST", body=b"a"))[2] == b"ok"
        assert app.connections == 2

    @pytest.mark.parametrize("method, body, begun, status", [
        ("GET", b"", b"", b"200"), ("DELETE", b"", b"", b"200"), ("GET", b"", b"HTTP/1.1 200 O", b"502"),
        ("GET", b"", OK[:-1], b"200"), ("POST", b"", b"", b"502"), ("PUT", b"a", b"", b"502"),
    ])
    def test_request_on_a_stale_connection_is_sent_again_if_safe(self, proxy, upstream, method, body, begun, status):
        """The upstream may have acted on the others, or has begun to answer them."""
        steps = (read_message, OK, read_message, OK, read_message, begun)  # the third response is not complete
        app = upstream(in_turn(script(*steps), answering(OK)))
        # All are sent at once: a POST takes only a connection that was used within the last second.
        first = to(app, path="/first")
        lines = ["Connection: close"] + ["Content-Length: 1"] * len(body)
        second = to(app, *lines, method=method, path="/second", body=body)
        with proxy.sent(first + first + second) as wire:
            assert (wire.message()[2], wire.message()[2]) == (b"ok", b"ok")
            # On a busy machine it may be later, and the POST has a connection of its own.
            assert wire.rest()[9:12] == (status if app.connections == 1 else b"200")
        targets = [message[0].split(" ")[1] for message in app.messages]
        assert targets == ["/first"] * 2 + ["/second"] * (2 if status == b"200" and not begun else 1)

    def test_post_takes_a_connection_that_was_used_before_within_the_last_second(self, proxy, upstream):
        def takes_it():  # a busy machine may need several tries
            app = upstream(answering(OK))
            with proxy.sent(to(app) * 2, to(app, "Content-Length: 1", method="POST", body=b"a")) as wire:
                assert [wire.message()[2] for _ in range(3)] == [b"ok"] * 3
            return app.connections == 1

        eventually(takes_it)

    def test_request_that_comes_back_to_the_proxy_is_refused(self, proxy, app):
        """Some program forwards a port to the proxy; those on Node join fields of the same name."""
        assert status_of(proxy.ask(to(app))) == 200
        line = "Port-Proxy-Mark: of-another-proxy, " + fields_of(app.messages[0])["port-proxy-mark"]
        assert_says(proxy.ask(to(app, line)), 508, b"port %d of this machine leads back to this proxy" % app.port)
        assert len(app.messages) == 1

    def test_only_a_get_takes_a_connection_that_has_idled_for_a_second(self, start, upstream):
        proxy = start(idle_upstream_timeout=10 * WAIT, keep_alive_timeout=1.2)
        apps = [upstream(answering(OK)) for _ in range(2)]
        with proxy.wire() as wire:
            for app in apps:
                assert wire.ask(to(app))[2] == b"ok"
            assert wire.rest() == b""  # The proxy closes it after 1.2 seconds: so old are the idle connections now.

        def count_after_post():
            assert status_of(proxy.ask(to(apps[1], "Content-Length: 1", method="POST", body=b"a"))) == 200
            return apps[1].connections

        assert status_of(proxy.ask(to(apps[0]))) == 200
        assert (apps[0].connections, count_after_post()) == (1, 2)
        eventually(lambda: count_after_post() == count_after_post())  # the app keeps connections open: POSTs share one

    def test_idle_connections_are_bounded_in_number(self, start, upstream):
        proxy = start(max_idle_upstreams=2, idle_upstream_timeout=10 * WAIT)
        apps = [upstream(answering(OK)) for _ in range(4)]
        for app in apps:
            assert proxy.ask(to(app))[2] == b"ok"
        eventually(lambda: sum(count_connections(remote_port=app.port) for app in apps) == 2)

    def test_idle_connection_is_closed_after_its_timeout(self, start, app):
        proxy = start(idle_upstream_timeout=0.2)
        for count in (1, 2):
            assert proxy.ask(to(app))[2] == b"ok"
            assert app.connections == count
            eventually(lambda: not count_connections(remote_port=app.port))

    def test_connection_with_unsent_bytes_is_not_reused(self, proxy, upstream):
        """After an early response to an upload the next request must not wait behind the bytes that are queued."""
        app, size = upstream(in_turn(script(read_head, wait, OK, hold), script(read_head, OK))), 115000
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with proxy.sent(to(app, "Content-Length: %d" % size, method="POST")) as wire:
            eventually(lambda: app.connections == 1)
            narrow(app.port)
            wire.send(bytes(size))
            # The proxy has read the whole request, and the kernel takes no more of it towards the app.
            eventually(lambda: not unsent(proxy.port) and not has_unread(proxy.port))
            eventually(lambda: unsent(app.port))
            app.happened.set()
            assert wire.message()[2] == b"ok"
        assert proxy.ask(to(app))[2] == b"ok"
        assert app.connections == 2

    def test_host_that_cannot_be_found_is_a_502(self, start):
        proxy = start(host_allowlist=["*"])
        for host in ("a..b", "a" * 64, "nowhere.invalid"):
            assert_says(proxy.get("/proxy/%s:80/" % host), 502, b"The host %s could not be found" % host.encode())

    def test_connection_that_is_not_accepted_in_time_is_a_504(self, background, start, monkeypatch):
        monkeypatch.setattr(background.loop, "create_connection", lambda *how, **options: asyncio.sleep(WAIT))
        answer = start(connect_timeout=0.3, any_owner=True).get("/proxy/127.0.0.1:1/")
        assert_says(answer, 504, b"was not accepted within 0.3 seconds")

    def test_upstream_that_resets_at_once_is_a_502(self, proxy, upstream):
        """It may be gone before the proxy asks for its address; one of the rounds is likely to show that."""
        app = upstream(Wire.reset)
        for _ in range(20):
            with proxy.held(), proxy.wire() as wire:
                wire.send(to(app))
            assert status_of(proxy.ask(to(app))) == 502

    @pytest.mark.parametrize("bind, address, forms", [
        ("127.0.0.1", "127.0.0.1", ["/proxy/%d/", "/proxy/absolute/%d/", "/proxy/127.0.0.1:%d/proxy/"]),
        ("0.0.0.0", "127.0.0.1", ["/proxy/%d/", "/proxy/absolute/%d/", "/proxy/127.0.0.1:%d/", "/proxy/127.0.0.2:%d/"]),
        ("::1", "::1", ["/proxy/[::1]:%d/"]), ("::", "::1", ["/proxy/[::1]:%d/"]),
        ("127.0.0.1", "::ffff:127.0.0.1", ["/proxy/absolute/[::ffff:127.0.0.1]:%d/"]),
    ])
    def test_request_to_the_proxys_own_port_is_a_508(self, start, bind, address, forms):
        try:
            proxy = start(bind=bind, token="", host_allowlist=["*"])
            wire = Wire.to(proxy.port, address)
        except OSError:
            pytest.skip("this machine has no IPv6")
        with wire:
            for form in forms:
                assert status_of(wire.ask(request("GET", form % proxy.port))) == 508, form

    @pytest.mark.parametrize("host, name", [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")])
    def test_app_with_the_proxys_port_number_at_another_address_is_reached(self, start, upstream, host, name):
        proxy = start(bind="127.0.0.1", host_allowlist=["127.0.0.2"])
        app = upstream(answering(OK), host=host, port=proxy.port)
        assert proxy.ask(to(app, form="/proxy/" + name + ":%d"))[2] == b"ok"

    def test_connection_to_itself_counts_as_nothing_listening(self, background, proxy, monkeypatch):
        """The kernel may give a socket the very port that it is to connect to."""
        port, connect = free_port(), background.loop.create_connection

        def connect_to_itself(*how, **options):
            return connect(*how, local_addr=("127.0.0.1", port), **options)

        monkeypatch.setattr(background.loop, "create_connection", connect_to_itself)
        assert_says(proxy.get("/proxy/%d/" % port), 502, b"Nothing listens on port %d" % port)


# ------ JupyterHub ---------------------------------------------------------------------------------------------------

PREFIX = "/jh/user/al@ice.x%2By"
BASE = PREFIX + "/proxy/"
OWNER = {"kind": "user", "name": "al@ice.x+y", "scopes": ["access:servers!server=al@ice.x+y/", "read:users:name!user"]}
STRANGER = {"kind": "user", "name": "mallory", "scopes": ["access:servers!user=mallory"]}
ADMIN = {"kind": "user", "name": "boss", "scopes": ["access:servers", "admin:users"]}
AS_OWNER, AS_ADMIN = "Authorization: token owner-token", "Authorization: token admin-token"
AS_STRANGER = "Authorization: token stranger-token"


class HubBehindWire:
    """A Hub's API, which answers about "slow..." tokens when its server has been let go.

    users: models by token; codes: (token, challenge) by code; asked: the requests; broken: invalid bodies by path.
    """

    def __init__(self):
        self.users = {"owner-token": OWNER, "stranger-token": STRANGER, "admin-token": ADMIN, "server-token": OWNER}
        self.codes, self.asked, self.broken = {}, [], {}

    def __call__(self, wire, app):
        while wire.buffer or wire.more():
            message = wire.message()
            self.asked.append(message)
            if "token slow" in fields_of(message).get("authorization", ""):
                app.let_go.wait(WAIT)
            status, answer = self.answer(message)
            body = self.broken.get(message[0].split(" ")[1]) or json.dumps(answer).encode()
            wire.send(ok(body, "X-JupyterHub-Version: 6.1.0").replace(b"200", b"%d" % status, 1))

    def answer(self, message):
        method, path, _ = message[0].split(" ")
        if (method, path) == ("GET", "/hub/api/user"):
            user = self.users.get(fields_of(message)["authorization"][len("token ") :])
            return (200, user) if user else (403, {"message": "no"})
        if (method, path) == ("POST", "/hub/api/oauth2/token"):
            form = dict(parse_qsl(message[2].decode()))
            token, challenge = self.codes.pop(form.get("code"), ("", ""))
            digest = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest())
            sent = [form["client_id"], form["client_secret"], form["redirect_uri"], digest.decode().rstrip("=")]
            right = ["jupyterhub-user-al%40ice.x%2By", "server-token", PREFIX + "/oauth_callback", challenge]
            return (200, {"access_token": token}) if sent == right else (400, {"error": "no"})
        return (200, {"version": "6.1.0"})

    def questions(self, path):
        return [message for message in self.asked if message[0].split(" ")[1] == path]

    def reports(self, path):
        """The moments of activity that were reported there."""
        return [json.loads(message[2].decode())["last_activity"] for message in self.questions(path)]


def new_cookies(answer):
    """The Set-Cookie fields of an answer that do not delete a cookie."""
    return [value for name, value in answer[1] if name == "Set-Cookie" and "Max-Age=0" not in value]


def place_of(answer):
    assert status_of(answer) == 302
    return fields_of(answer)["location"]


class TestHub:
    @pytest.fixture
    def hub(self, upstream):
        """Its `app` may serve something else than a Hub, too."""
        hub = HubBehindWire()
        hub.app = upstream(hub)
        return hub

    @pytest.fixture
    def begin(self, start, hub):
        """Start proxies under this Hub, with these changes to what it describes."""

        def begin(**of_hub):
            api_url = "http://127.0.0.1:%d/hub/api" % hub.app.port
            described = port_proxy.hub_in(hub_environment(API_URL=api_url, ACTIVITY_URL="", DEFAULT_URL=""))
            return start(
                base=BASE[:-1], hub=described._replace(**of_hub), token="", allow_hostnames=(),
                trusted_proxies=["127.0.0.1"], shutdown_timeout=0.3,
            )

        return begin

    @pytest.fixture
    def proxy(self, begin):
        return begin()

    @pytest.fixture
    def target(self, app):
        """The app's front page."""
        return "%s%d/" % (BASE, app.port)

    def sent_to_hub(self, proxy, target=BASE):
        """Visit a page without being signed in: (the parameters for the Hub, the login's cookie)."""
        answer = proxy.get(target, *VISIT)
        place, _, query = place_of(answer).partition("?")
        assert place == "/jh/hub/api/oauth2/authorize"
        return dict(parse_qsl(query)), cookie_of(answer)

    def come_back(self, proxy, hub, asked, *lines, token="owner-token"):
        hub.codes["code"] = (token, asked["code_challenge"])
        return proxy.get("%s/oauth_callback?code=code&state=%s" % (PREFIX, asked["state"]), *(VISIT + lines))

    def sign_in(self, proxy, hub):
        """The Cookie field of a browser that has signed in; the last cookie in it is the proxy's."""
        asked, cookie = self.sent_to_hub(proxy)
        answer = self.come_back(proxy, hub, asked, cookie + "; jupyterhub-session-id=a")
        assert place_of(answer) == BASE
        return "Cookie: jupyterhub-session-id=a; " + new_cookies(answer)[0].split(";")[0]

    @pytest.fixture
    def cookie(self, proxy, hub):
        return self.sign_in(proxy, hub)

    def check(self, proxy, target, *rows):
        """Each row: the lines of a request for `target`, and the status."""
        for *lines, status in rows:
            assert status_of(proxy.get(target, *lines)) == status, lines

    def test_readiness_is_answered_without_a_sign_in(self, proxy, hub):
        """The Hub itself polls it, also before it responds; its version is looked up once."""
        for serve, version in ((script(b""), ""), (hub, "6.1.0")):
            hub.app.serve = serve
            for target in (PREFIX + "/api", PREFIX + "/api/", "/jh/user/al%40ice.x+y/api"):
                response = proxy.get(target)
                assert (status_of(response), fields_of(response)["x-jupyterhub-version"]) == (200, version)
        assert len(hub.asked) == 1

    def test_sign_in_leads_by_the_hub_to_the_page(self, proxy, hub, app, target):
        target += "a?b=%2F&c"
        asked, cookie = self.sent_to_hub(proxy, target)
        assert (asked["client_id"], asked["response_type"]) == ("jupyterhub-user-al%40ice.x%2By", "code")
        assert (asked["redirect_uri"], asked["code_challenge_method"]) == (PREFIX + "/oauth_callback", "S256")
        assert (len(asked["state"]) >= 22, asked["state"] in cookie) == (True, False)
        answer = proxy.ask(request("HEAD", target, *VISIT), no_body=True)
        assert "; HttpOnly; SameSite=Lax; Max-Age=600" in fields_of(answer)["set-cookie"]
        answer = self.come_back(proxy, hub, asked, cookie + "; jupyterhub-session-id=x")
        assert (place_of(answer), "owner-token" in repr(answer), app.connections) == (target, False, 0)
        (session,) = new_cookies(answer)
        assert set(session.split("; ")[1:]) == {"Path=%s/" % PREFIX, "HttpOnly", "SameSite=Lax"}
        deleted = next(value for name, value in answer[1] if name == "Set-Cookie" and "Max-Age=0" in value)
        assert cookie.startswith("Cookie: %s=" % deleted.split("=")[0])
        pairs = session.split(";")[0], "jupyterhub-session-id=x", "__Host-jupyterhub-user=y"
        self.check(proxy, target, ("Cookie: a=b; %s; %s; %s; c=d" % pairs, 200))
        assert fields_of(app.messages[-1])["cookie"] == "a=b; c=d"
        assert_says(self.come_back(proxy, hub, asked), 403, b"This sign-in was used or has expired")

    @pytest.mark.parametrize("query, shown, says", [
        ("state={state}&code=code", shown, "began in another browser") for shown in (
            "", "{name}=wrong", "{name}=", "other={value}", "{name}=\xe9.{value}", "{name}={deadline}",
            "{name}=.{rest}", "{name}={other}", "{name}={value}x", "{name}=9{value}", "{name}={value}; {name}={value}",
        )
    ] + [(query, "{name}={value}", says) for query, says in (
        ("state={state}&error=access_denied", "did not sign you in"), ("state={state}", "did not sign you in"),
        ("state={state}&code=wrong", "did not sign you in"), ("state=x&code=code", "was used or has expired"),
        ("code=code", "was used or has expired"), ("state=%0a&code=code", "was used or has expired"),
    )])
    def test_login_that_fails_is_a_403_with_the_reason(self, proxy, hub, query, shown, says):
        """The state of a sign-in lives in the browser's cookie, whose signature only the proxy can make."""
        (asked, cookie), (_, others) = self.sent_to_hub(proxy), self.sent_to_hub(proxy)
        parts = re.match(r"Cookie: (?P<name>\w+)=(?P<value>(?P<deadline>\d+)\.(?P<rest>.*))", cookie).groupdict()
        shown = shown.format(other=others.split("=", 1)[1], **parts)
        hub.codes["code"] = ("owner-token", asked["code_challenge"])
        query = query.format(state=asked["state"])
        answer = proxy.get("%s/oauth_callback?%s" % (PREFIX, query), "Cookie: " + shown, *VISIT)
        assert_says(answer, 403, says.encode(), PREFIX.encode() + b"/ again")
        assert hub.questions("/hub/api/oauth2/token") == [] or "not sign" in says
        assert place_of(self.come_back(proxy, hub, asked, cookie)) == BASE

    def test_hub_is_asked_again_after_45_seconds(self, put_forward, proxy, hub, target):
        for count in (1, 1, 2, 2):
            self.check(proxy, target, (AS_OWNER, 200))
            assert len(hub.asked) == count
            put_forward(30)

    def test_login_expires_after_ten_minutes(self, put_forward, proxy, hub):
        early, late = self.sent_to_hub(proxy), self.sent_to_hub(proxy)
        put_forward(540)
        assert place_of(self.come_back(proxy, hub, *early)) == BASE
        put_forward(120)
        assert status_of(self.come_back(proxy, hub, *late)) == 403

    @pytest.mark.parametrize("target, leads_to", [
        (BASE + "80", BASE + "80"), ("/jh/user/al%40ice.x+y/proxy/80/?a", BASE + "80/?a"),
        ("/j%68/user/al@ice.x+y", PREFIX + "/"), (BASE + "80/" + "a" * 5000, PREFIX + "/"),
        (BASE + "80/" + "%22" * 1000, PREFIX + "/"), (BASE + "80/\\x", PREFIX + "/"),
    ], ids=case_id)
    def test_login_leads_below_the_path_of_the_cookie(self, proxy, hub, target, leads_to):
        """In the spelling of the prefix that the cookie has. One of more than 4096 characters would not come back."""
        asked, cookie = self.sent_to_hub(proxy, target)
        assert len(cookie) < 4096
        assert place_of(self.come_back(proxy, hub, asked, cookie)) == leads_to

    def test_login_outlasts_a_thousand_others(self, proxy, hub):
        """Anybody can begin one, and must not be able to end those of others."""
        login, other = self.sent_to_hub(proxy), request("HEAD", BASE, "Accept: text/html")
        assert {status_of(answer) for answer in answers_in_turn(proxy, [other] * 1001, no_body=True)} == {302}
        assert place_of(self.come_back(proxy, hub, *login)) == BASE

    def test_login_of_a_user_without_access_is_a_403(self, proxy, begin, hub, app, target):
        asked, cookie = self.sent_to_hub(proxy, target)
        answer = self.come_back(proxy, hub, asked, cookie, token="stranger-token")
        assert (status_of(answer), "set-cookie" in fields_of(answer), app.connections) == (403, False, 0)
        assert b"signed in as mallory, but have no access to this server of al@ice.x+y. Sign in" in answer[2]
        service = begin(user="")  # it belongs to nobody
        assert b"have no access to this server. Sign in" in service.get(BASE, AS_STRANGER)[2]

    def test_path_outside_of_the_prefix_is_a_404(self, proxy):
        for target in ("//evil.example/proxy/80/", "/jh/user/mallory/proxy/80/", "/", PREFIX + "2/"):
            self.check(proxy, target, VISIT + (404,))

    @pytest.mark.parametrize("home", ["", BASE + "8080", BASE + "8080/?a"])
    def test_prefix_redirects_home_after_the_sign_in(self, begin, home):
        proxy = begin(home=home)
        for target in (PREFIX, PREFIX + "/", "/jh/user/al%40ice.x+y/"):
            assert place_of(proxy.get(target, AS_OWNER)) == home or BASE
        self.check(proxy, PREFIX + "/", (403,))

    @pytest.mark.parametrize("token, status", [
        ("owner-token", 200), ("admin-token", 200), ("server-token", 200), ("stranger-token", 403), ("unknown", 403),
    ])  # fmt: skip
    def test_token_of_the_hub_admits_users_with_access(self, proxy, target, hub, token, status):
        self.check(proxy, target, *(("Authorization: %s %s" % (kind, token), status) for kind in ("token", "Bearer")))
        self.check(proxy, target + "?a&token=%s&b" % token, (status,))
        assert len(hub.asked) == 1

    def test_token_in_the_address_signs_a_browser_in(self, proxy, app, target, cookie):
        """It does not replace a session, nor does a page of another site sign anybody in."""
        answer = proxy.get(target + "a?b&token=owner-token&c", *VISIT)
        assert place_of(answer) == target + "a?b&c"
        self.check(proxy, target, (cookie_of(answer), 200))
        for root in (PREFIX, PREFIX + "/", "/jh/user/al%40ice.x+y/"):
            assert place_of(proxy.get(root + "?token=owner-token", *VISIT)) == PREFIX + "/"
        for site in ("cross-site", "same-site"):
            foreign = proxy.get(target + "?token=admin-token", "Sec-Fetch-Site: " + site, *VISIT)
            assert place_of(foreign).startswith("/jh/hub/api/oauth2/authorize?")
        answer = proxy.get(BASE + "?token=admin-token", cookie, *VISIT)
        assert (place_of(answer), "set-cookie" in fields_of(answer)) == (BASE, False)
        self.check(proxy, target + "a?b&token=apps-own&c", (cookie, *VISIT, 200))
        assert app.messages[-1][0] == "GET /a?b&token=apps-own&c HTTP/1.1"

    @pytest.mark.parametrize("other", ["", "jupyterhub-session-id=b; "], ids=["sign-out", "another user"])
    @pytest.mark.parametrize("has_own_token", [False, True])
    def test_session_ends_with_that_of_the_hub(self, proxy, hub, target, cookie, has_own_token, other):
        """Though an answer about its token is still valid, and the Hub may still know it."""
        if has_own_token:
            answer = proxy.get(target + "?token=owner-token", "Cookie: jupyterhub-session-id=a", *VISIT)
            cookie = "Cookie: jupyterhub-session-id=a; " + new_cookies(answer)[0].split(";")[0]
        self.check(proxy, target, *[(cookie, 200)] * 3)
        assert len(hub.questions("/hub/api/user")) == 1
        after = cookie.replace("jupyterhub-session-id=a; ", other)
        self.check(proxy, target, (after, *VISIT, 302), (after, 403), (cookie, 403))  # it is gone for good

    def test_ended_session_closes_its_connections_within_a_minute(self, put_forward, proxy, cookie, hub, upstream):
        """Tunnels and event streams, but not those of others, nor a connection that serves another user by now."""
        sent = (SWITCHING, b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        app = upstream(in_turn(*(script(read_head, data, hold) for data in sent * 2)))
        with contextlib.ExitStack() as opened:
            *wires, other = [opened.enter_context(proxy.wire()) for _ in range(5)]
            for wire, (credential, lines) in zip(wires, itertools.product((cookie, AS_ADMIN), (HANDSHAKE, ()))):
                wire.send(request("GET", "%s%d/" % (BASE, app.port), credential, *lines))
                head = wire.until(b"\r\n\r\n" if lines else b"data: 1\n\n\r\n")
                assert head.split(b" ")[1] == (b"101" if lines else b"200")
            for line in (cookie, AS_ADMIN):
                assert status_of(other.ask(request("GET", BASE, line))) == 200
            del hub.users["owner-token"]
            put_forward(60)
            assert all(wire.ends() for wire in wires[:2])
            self.check(proxy, BASE, (cookie, 403), (AS_ADMIN, 200))
            assert select.select([wire.sock for wire in wires[2:] + [other]], [], [], 0)[0] == []

    def test_requests_on_one_connection_are_authenticated_one_by_one(self, proxy, target, cookie):
        """The Hub's front proxy sends the requests of several users on one connection."""
        rows = ((cookie, 200), (403,), (AS_STRANGER, 403), (cookie, 200), VISIT + (302,), (cookie, 200))
        rows += (VISIT + HANDSHAKE + (403,),)
        with proxy.sent(*(request("GET", target, *lines) for *lines, _ in rows)) as wire:
            assert [status_of(wire.message()) for _ in rows] == [row[-1] for row in rows]

    def test_session_admits_a_request_of_the_own_site(self, proxy, target, cookie):
        """Another cookie of a wider path may have its name. A request of another site needs a token."""
        of_hub, own = cookie.split("; ")
        stale, foreign = own.split("=")[0] + "=old", "Origin: http://evil.example"
        own_site = ("Origin: https://hub.example", "X-Forwarded-Host: hub.example")
        self.check(
            proxy, target, ("; ".join([of_hub, own, stale]), 200), ("; ".join([of_hub, stale, own]), 200),
            (cookie, *own_site, 200), (cookie, foreign, 403), (foreign, AS_OWNER, 200),
        )  # fmt: skip

    @pytest.mark.parametrize("value, arrives", [
        ("Bearer apps-own", "Bearer apps-own"), ("Basic YTpi", "Basic YTpi"), ("token owner-token", None),
        ("token admin-token", None), ("token server-token", None),
    ])  # fmt: skip
    @pytest.mark.parametrize("is_signed_in", [True, False])
    def test_credentials_for_the_app_alone_reach_it(self, proxy, app, target, cookie, is_signed_in, value, arrives):
        """A token of the Hub never does, also if another one or a session admitted the request."""
        referer = "Referer: http://here:8888%s?token=stranger-token&x" % target
        lines = [referer, "Authorization: " + value] + [cookie] * is_signed_in
        self.check(proxy, target + "?token=owner-token&token=apps-own&token=admin-token", (*lines, 200))
        assert app.messages[-1][0] == "GET /?token=apps-own HTTP/1.1"
        fields = fields_of(app.messages[-1])
        assert (fields.get("authorization"), "cookie" in fields) == (arrives, False)
        assert fields["referer"] == "http://localhost:%d/?x" % app.port

    def test_app_cannot_set_cookies_of_the_hub_and_the_proxy(self, proxy, upstream, cookie):
        ours = cookie.split("; ")[-1].split("=")[0]
        names = ("jupyterhub-session-id", "__Host-jupyterhub-user", ours, "own")
        app = upstream(answering(ok(b"", *("Set-Cookie: %s=x; Path=/" % name for name in names))))
        answer = proxy.get("%s%d/" % (BASE, app.port), AS_OWNER)
        assert [value.split("=")[0] for value in new_cookies(answer)] == ["own"]

    @pytest.mark.parametrize("of_hub, scheme, path, attributes", [
        ({}, "https", PREFIX + "/", {"SameSite=Lax", "Secure"}), ({}, "http", PREFIX + "/", {"SameSite=Lax"}),
        ({"cookie_options": (("Secure", ""),)}, "http", PREFIX + "/", {"SameSite=Lax", "Secure"}),
        ({"host_cookies": True}, "http", "/", {"SameSite=Lax", "Secure"}),
        ({"cookie_options": (("SameSite", "None"), ("Partitioned", ""))}, "http", PREFIX + "/",
         {"SameSite=None", "Partitioned"}),
    ])
    def test_session_cookie_has_the_attributes_of_its_hub(self, begin, target, of_hub, scheme, path, attributes):
        proxy = begin(**of_hub)
        answer = proxy.get(BASE + "?token=owner-token", "X-Forwarded-Proto: " + scheme, *VISIT)
        pair, *found = fields_of(answer)["set-cookie"].split("; ")
        assert (pair.startswith("__Host-"), set(found)) == (path == "/", attributes | {"Path=" + path, "HttpOnly"})
        self.check(proxy, target, ("Cookie: " + pair, 200))

    @pytest.mark.parametrize("answer", [ok(body) for body in (b"{", b"{}", b'{"name": "bo"}', b"[]")] + [
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", b"", b"SSH-2.0-x\r\n\r\n",
    ])
    def test_hub_that_does_not_answer_is_a_503(self, proxy, hub, answer):
        """Nobody is sent to a sign-in that cannot succeed, and the next request makes the proxy ask anew."""
        hub.app.serve = once(answer)
        for count in (1, 2):
            answer = proxy.get(BASE, "Authorization: token some", *VISIT)
            assert (status_of(answer), "retry-after" in fields_of(answer), len(hub.app.messages)) == (503, True, count)

    def test_answer_of_the_hub_is_limited_in_time(self, proxy, hub, caplog, monkeypatch):
        """The Hub never pauses, so no read has to wait for data."""
        monkeypatch.setattr(port_proxy, "_HUB_TIMEOUT", 1.0)
        hub.app.serve = script(CHUNKED_HEAD, lambda wire, app: wire.offer(*[b"1\r\nx\r\n" * 10000] * 100000))
        self.check(proxy, BASE, (AS_OWNER, 503))
        assert caplog.text.endswith("TimedOut\n")

    def test_requests_with_the_same_token_wait_for_one_answer(self, proxy, hub, target):
        """A client that leaves takes the answer from nobody."""
        hub.users["slow"] = OWNER
        wires = [proxy.wire() for _ in range(5)]
        for wire in wires:
            wire.send(request("GET", target, "Authorization: token slow"))
        eventually(lambda: hub.asked and not has_unread(proxy.port))
        self.check(proxy, "/elsewhere", (404,))  # it came later, so all others have been read
        wires.pop().reset()
        hub.app.let_go.set()
        for wire in wires:
            assert status_of(wire.message()) == 200
            wire.close()
        assert len(hub.asked) == 1

    def test_stop_during_a_request_to_the_hub_leaves_nothing(self, proxy, hub):
        hub.app.serve = script(tell, read_to_the_end)
        with proxy.sent(request("GET", BASE, AS_OWNER)) as wire:
            assert hub.app.told.wait(WAIT)
            proxy.close()
            assert b"200" not in wire.rest()

    def test_oldest_of_too_many_sessions_ends(self, proxy, target):
        raw = request("GET", BASE + "?token=owner-token", *VISIT)
        cookies = list(map(cookie_of, answers_in_turn(proxy, [raw] * 1050)))
        for at, status in ((0, 403), (49, 403), (50, 200), (1049, 200)):
            self.check(proxy, target, (cookies[at], status))

    def test_request_with_too_many_tokens_is_refused(self, proxy, hub):
        for different, status in ((9, 400), (8, 403)):
            self.check(proxy, BASE + "?" + "&".join("token=%d" % (n % different) for n in range(500)), (status,))
        assert len(hub.asked) == 8

    def test_token_cannot_become_a_request_to_the_hub(self, proxy, hub, app, target):
        """The Hub is not asked about a token that it cannot have given, and the app gets it."""
        for token in ("x%0d%0aX-A:%20b", "%E2%82%AC", "a%20b", "%00", ""):
            self.check(proxy, target + "?token=" + token, (403,), (AS_OWNER, 200))
            assert app.messages[-1][0] == "GET /?token=%s HTTP/1.1" % token
        assert [message[0] for message in hub.asked] == ["GET /hub/api/user HTTP/1.1"]

    def test_unknown_tokens_do_not_displace_known_ones(self, proxy, hub, cookie, target):
        """A thousand are remembered apart. The Hub is asked about 64 at once, and meanwhile about sign-ins."""
        self.check(proxy, target, (AS_OWNER, 200))
        unknown = [request("GET", target, "Authorization: token unknown%d" % number) for number in range(1001)]
        assert {status_of(answer) for answer in answers_in_turn(proxy, unknown)} == {403}
        slow = [raw.replace(b"unknown", b"slow") for raw in unknown[:65]]
        with contextlib.ExitStack() as opened:
            for raw in slow[:64]:
                opened.enter_context(proxy.sent(raw))
            eventually(lambda: repr(hub.asked).count("slow") == 64)
            answer = proxy.ask(slow[64])
            assert_says(answer, 503, b"too many requests to the Hub")
            assert "retry-after" in fields_of(answer)
            asked = len(hub.asked)
            self.check(proxy, target, (cookie, 200), (AS_OWNER, 200))
            assert len(hub.asked) == asked
            assert place_of(self.come_back(proxy, hub, *self.sent_to_hub(proxy), token="admin-token")) == BASE
            hub.app.let_go.set()

    def test_long_x_forwarded_for_is_refused(self, proxy):
        for count, status in ((300, 404), (400, 400)):
            self.check(proxy, "/", ("X-Forwarded-For: " + ",".join(["::"] * count), status))

    def reporting(self, begin, hub, path):
        """A proxy that reports activity there, twenty times a second."""
        return begin(activity_url="http://127.0.0.1:%d%s" % (hub.app.port, path), activity_interval=0.05)

    def test_request_is_reported_as_activity_again_if_the_hub_fails(self, begin, hub, target):
        path = "/hub/api/users/al%40ice.x%2By/activity"
        proxy, before = self.reporting(begin, hub, path), int(time.time())
        hub.broken[path] = b"{"
        self.check(proxy, target, (AS_OWNER, 200))
        eventually(lambda: len(hub.reports(path)) > 2)
        report, moment = hub.questions(path)[0], hub.reports(path)[0]
        assert json.loads(report[2].decode()) == {"servers": {"": {"last_activity": moment}}, "last_activity": moment}
        assert before <= calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ")) <= time.time()
        assert fields_of(report)["authorization"] == "token server-token"
        assert set(hub.reports(path)) == {moment}

    @pytest.mark.parametrize("lines, answer, has_sent", [
        (HANDSHAKE, SWITCHING, False), (("Content-Length: 1000000",), b"", False),
        ((), b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", True),
    ], ids=["WebSocket", "upload", "download"])
    def test_bytes_of_a_long_exchange_are_reported_as_activity(self, begin, hub, upstream, lines, answer, has_sent):
        path, app = "/hub/api/activity", upstream(script(read_head, answer, tell, hold))
        raw = request("GET", "%s%d/" % (BASE, app.port), AS_OWNER, *lines)
        with self.reporting(begin, hub, path).sent(raw) as wire:
            assert app.told.wait(WAIT)

            def is_reported():
                (app.wires[0] if has_sent else wire).send(b"a")
                return len(set(hub.reports(path))) > 1

            eventually(is_reported)

    def test_readiness_and_refusals_are_no_activity(self, begin, hub, target):
        """A later proxy has reported, so the interval of this one is over."""
        idle = self.reporting(begin, hub, "/hub/api/idle")
        self.check(idle, PREFIX + "/api", (200,))
        self.check(idle, BASE, (403,))
        self.check(self.reporting(begin, hub, "/hub/api/busy"), target, (AS_OWNER, 200))
        eventually(lambda: hub.reports("/hub/api/busy"))
        assert hub.reports("/hub/api/idle") == []


# ------ Exchange -----------------------------------------------------------------------------------------------------

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE_HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def send_until_closed(wire, app=None):
    """Send until the peer has closed the connection."""
    with contextlib.suppress(OSError):
        while True:
            wire.sock.sendall(bytes(1 << 16))


@pytest.fixture
def records(caplog):
    """What the access log says of each request, in order: dictionaries."""
    with caplog.at_level(logging.INFO, "port_proxy"):
        yield lambda: [record.request for record in caplog.records if hasattr(record, "request")]


class TestResponses:
    @pytest.mark.parametrize("answer, version, framing, body", [
        (ok(b"abc"), "1.1", ("content-length", "3"), b"abc"), (ok(b"abc"), "1.0", ("content-length", "3"), b"abc"),
        (ok(b""), "1.1", ("content-length", "0"), b""),
        (CHUNKED_HEAD + b"1;x\r\na\r\n2\r\nbc\r\n0\r\nX: y\r\n\r\n", "1.1", ("transfer-encoding", "chunked"), b"abc"),
        (b"HTTP/1.1 299 Sch\xf6n\r\nTransfer-Encoding\t: chunked\r\n\r\n3 \t\r\nabc\r\n0  \r\n\r\n", "1.1",
         ("transfer-encoding", "chunked"), b"abc"),  # some devices send spaces that the grammar does not allow
        (CHUNKED_HEAD + b"3\r\nabc\r\n0\r\n\r\n", "1.0", None, b"abc"),
        (UNTIL_CLOSE_HEAD + b"abc", "1.1", ("transfer-encoding", "chunked"), b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", "1.1", ("transfer-encoding", "chunked"), b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", "1.0", None, b"abc"),
        (b"HTTP/1.0 200 OK\r\n\r\n", "1.1", ("transfer-encoding", "chunked"), b""),
    ], ids=case_id)
    def test_framing_suits_the_version_of_the_client(self, proxy, upstream, answer, version, framing, body):
        message = proxy.ask(to(upstream(once(answer)), version=version), until_close=True)
        assert (message[0][9:], message[2]) == (answer[9:].decode("latin-1").split("\r\n")[0], body)
        fields = fields_of(message)
        declared = [(name, fields[name]) for name in ("content-length", "transfer-encoding") if name in fields]
        assert declared == ([framing] if framing else [])
        assert fields.get("connection") == ("close" if version == "1.0" else None)

    @pytest.mark.parametrize("method, answer, length", [
        ("HEAD", b"200 OK\r\nContent-Length: 12345", "12345"), ("HEAD", b"200 OK\r\nTransfer-Encoding: chunked", None),
        ("HEAD", b"200 OK", None), ("GET", b"304 Not Modified\r\nContent-Length: 7\r\nETag: a", "7"),
        ("GET", b"304 Not Modified", None), ("DELETE", b"204 No Content\r\nContent-Length: 0", None),
    ])
    def test_response_without_a_body_ends_with_its_head(self, proxy, upstream, method, answer, length):
        """Both connections serve the next request too."""
        app = upstream(answering(b"HTTP/1.1 " + answer + b"\r\n\r\n"))
        with proxy.wire() as wire:
            for _ in range(2):
                fields = fields_of(wire.ask(to(app, method=method), no_body=True))
                assert (fields.get("content-length"), "transfer-encoding" in fields) == (length, False)
        assert app.connections == 1

    @pytest.mark.parametrize("text, answer", [(b"is not valid HTTP", answer) for answer in (
        BAD_RESPONSES[0], b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", CHUNKED_HEAD + b"xyz", b"220 smtp\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n", SWITCHING,
    )] + [(b"in the middle of its response", answer) for answer in (
        b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
    )] + [(b"closed the connection without a response", b"")], ids=case_id)
    @pytest.mark.parametrize("is_reused", [False, True])
    def test_invalid_response_is_502(self, proxy, upstream, text, answer, is_reused):
        """At once: if it may still go on, the app waits, or sends it first of all; the client is served again."""
        last = read_to_the_end if b"not valid" in text else b""
        steps = [read_head, OK, read_head, answer, last] if is_reused else [answer, read_head, last]
        app = upstream(in_turn(script(*steps), script(read_head, answer, last)))
        with proxy.wire() as wire:
            if is_reused:
                assert wire.ask(to(app))[2] == b"ok"
            wire.send(to(app))
            for _ in range(answer.count(b" 100 ")):
                assert status_of(wire.message(no_body=True)) == 100
            assert_says(wire.message(), 502, text, b"port %d of this machine" % app.port)
            assert app.connections == 1 + (is_reused and not answer)  # a GET is sent again on a stale connection alone
            assert status_of(wire.ask(request("GET", "/nothing"))) == 404

    @pytest.mark.parametrize("how", [end, Wire.reset], ids=["end", "reset"])
    def test_truncated_response_does_not_end_cleanly(self, proxy, upstream, how):
        """A body until close is whole at EOF; a reset truncates it."""
        answers = [ok(bytes(10))[:-10] + b"abc", CHUNKED_HEAD + b"9\r\nabc", CHUNKED_HEAD + b"3\r\nabc\r\n"]
        answers += [CHUNKED_HEAD + b"3\r\nabc\r\n0\r\n"] + [UNTIL_CLOSE_HEAD + b"abc"] * (how is not end)
        for answer, version in itertools.product(answers, ("1.1", "1.0")):
            app = upstream(script(read_head, answer, wait, how))
            with proxy.sent(to(app, version=version)) as wire:
                head, got = wire.until(b"\r\n\r\n"), wire.until(b"abc")
                app.happened.set()
                with contextlib.suppress(ConnectionResetError):  # as visible as can be
                    got += wire.rest()
                    is_whole = b"chunked" in head and got.endswith(b"\r\n0\r\n\r\n")
                    assert not is_whole and (b"chunked" in head or b"Content-Length: 10" in head), answer

    @pytest.mark.parametrize("cause", ["stall", "stop"])
    def test_body_until_close_is_reset_if_the_proxy_gives_up(self, start, upstream, cause):
        """A client of HTTP/1.0 takes EOF for the end of the body, so it must not see one before that end."""
        more = send_until_closed if cause == "stall" else hold
        app = upstream(script(read_head, b"HTTP/1.0 200 OK\r\n\r\nabc", more))
        proxy = start(stall_timeout=0.3 if cause == "stall" else 60, shutdown_timeout=0.1)
        with proxy.sent(to(app, version="1.0")) as wire:
            wire.until(b"abc")
            if cause == "stop":
                proxy.close()
            eventually(lambda: not proxy.open_connections())
            with pytest.raises(ConnectionResetError):
                wire.rest()

    def test_interim_responses_are_passed_on(self, proxy, upstream):
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\nContent-Length: 9\r\n\r\n"
        app = upstream(answering(interim + b"HTTP/1.1 102 Processing\r\n\r\n" * 100 + OK))
        with proxy.sent(to(app)) as wire:
            assert wire.message(no_body=True)[:2] == ("HTTP/1.1 103 Early Hints", [("Link", "<a>")])
            assert [status_of(wire.message(no_body=True)) for _ in range(100)] == [102] * 100
            assert wire.message()[2] == b"ok"
        message = proxy.ask(to(app, version="1.0"))
        assert (status_of(message), message[2]) == (200, b"ok")

    def test_busy_download_delays_no_other_request_and_no_deadline(self, start, upstream):
        """A client takes as fast as it can a response that has no end."""

        def take(wire):
            with contextlib.suppress(OSError):
                while wire.sock.recv(1 << 18):
                    taken.set()

        busy, taken = upstream(script(read_head, UNTIL_CLOSE_HEAD, send_until_closed)), threading.Event()
        proxy, app = start(head_timeout=0.3), upstream(answering(OK))
        with proxy.sent(to(busy, version="1.0")) as wire, in_thread(take, wire):
            assert taken.wait(WAIT)
            for _ in range(20):
                assert proxy.ask(to(app))[2] == b"ok"
            with proxy.sent(b"GET / HT") as late:
                assert status_of(late.message()) == 408
            wire.sock.shutdown(socket.SHUT_RDWR)


class TestRequests:
    @pytest.mark.parametrize("lines, piece, head, frame", [
        ((), b"", CHUNKED_HEAD, chunk), ((), b"", UNTIL_CLOSE_HEAD, bytes),
        (("Content-Length: 30",), b"abc", b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n", bytes),
        (("Transfer-Encoding: chunked",), chunk(b"abc"), CHUNKED_HEAD, chunk),
    ], ids=["chunked events", "events until close", "length", "chunked"])
    def test_bodies_stream_both_ways_at_once(self, proxy, upstream, lines, piece, head, frame):
        """The app answers each piece as it comes, or sends events; the next is sent after that."""

        def shout(wire, app):
            wire.until(b"abc" if piece else b"")
            app.happened.wait(WAIT)
            app.happened.clear()
            wire.send(frame(b"ABC"))

        app = upstream(script(read_head, head, *[shout] * 10))
        with proxy.sent(to(app, *lines, method="POST" if piece else "GET")) as wire:
            wire.until(b"\r\n\r\n")
            for _ in range(10):
                wire.send(piece)
                app.happened.set()
                assert wire.until(b"ABC").endswith(b"ABC")

    @pytest.mark.parametrize("chunked", [False, True])
    def test_bodies_arrive_whole_both_ways(self, proxy, upstream, chunked):
        def echo(wire, app):
            while wire.buffer or wire.more():
                wire.send(ok(wire.message()[2]))

        app = upstream(echo)
        with proxy.wire() as wire:
            for size in (0, 1, 70000, 3000000) * 2:
                body = random_bytes(size)
                lines, pieces = ("Content-Length: %d" % size,), [body]
                if chunked:
                    lines = ("Transfer-Encoding: chunked",)
                    pieces = [chunk(body[at : at + 40000]) for at in range(0, size, 40000)] + [chunk(b"")]
                assert wire.ask(to(app, *lines, method="POST"), *pieces)[2] == body

    @pytest.mark.parametrize("status, steps", [
        (100, (b"HTTP/1.1 100 Continue\r\n\r\n", lambda wire, app: wire.exactly(3), OK, hold)),
        (417, (b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n", read_to_the_end)),
    ], ids=["accepted", "refused"])
    def test_expect_continue_is_end_to_end(self, proxy, upstream, status, steps):
        """After a refusal the proxy cannot tell whether the body still comes, so it closes the connection."""
        app = upstream(script(lambda wire, app: app.messages.append(wire.until(b"\r\n\r\n")), *steps))
        with proxy.wire() as wire:
            answer = wire.ask(to(app, "Content-Length: 3", "Expect: 100-continue", method="POST"), no_body=True)
            assert status_of(answer) == status
            assert b"\r\nExpect: 100-continue\r\n" in app.messages[0]
            if status == 100:
                assert wire.ask(b"abc")[2] == b"ok"
            else:
                wire.end()
                assert (fields_of(answer)["connection"], wire.rest()) == ("close", b"")

    @pytest.mark.parametrize("last", [b"", hold], ids=["closes", "holds"])
    def test_early_response_reaches_the_client(self, proxy, upstream, last):
        """The app refuses in the middle of an upload, and may close at once: a write may then fail before the read."""
        answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"
        app = upstream(script(read_head, lambda wire, app: wire.exactly(100000), answer, last))
        for _ in range(5):
            raw = to(app, "Content-Length: 1000000000", method="PUT")
            with proxy.sent(raw) as wire, in_thread(send_until_closed, wire):
                message = wire.message()
                assert (status_of(message), message[2]) == (413, b"big")
                wire.end()

    def test_timeout_of_a_half_closed_client_is_two_seconds_for_its_response_alone(self, start, upstream):
        """It begins anew with all data of the app. The next response on the connection to the app has none."""
        begun = ok(bytes(10))[:-10] + b"abc"
        silent = upstream(script(read_head, begun, wait, b"d", read_to_the_end))
        app = upstream(script(read_head, OK, read_head, begun, wait, bytes(7), read_to_the_end))
        proxy = start(idle_upstream_timeout=10 * WAIT, linger_timeout=0.2)  # so deadlines are checked often
        with proxy.wire() as wire, proxy.sent(to(silent)) as half_closed:
            half_closed.until(b"abc")
            half_closed.end()
            with proxy.held():  # the proxy sees the end together with the request
                wire.send(to(app))
                wire.end()
            assert wire.message()[2] == b"ok"
            with proxy.sent(to(app)) as after:
                assert after.until(b"abc").startswith(b"HTTP/1.1 200")
                silent.happened.set()
                assert half_closed.rest() == b"d"
                app.happened.set()
                assert (after.exactly(7), app.connections) == (bytes(7), 1)

    @needs_proc
    @pytest.mark.parametrize("is_tls", [False, True])
    def test_client_that_leaves_closes_its_upstream(self, start, secure, upstream, records, is_tls):
        """At any moment. Without TLS it may only have ended its side, so it is answered two seconds later."""

        def close_tls(wire):
            with contextlib.suppress(OSError):  # the proxy may close before it has answered the close_notify
                wire.sock = wire.sock.unwrap()
            wire.close()

        proxy = (secure if is_tls else start)()
        apps, ended, begun = [], [], ok(bytes(10))[:-10] + b"abc"
        upload = ("Content-Length: 9",), b""
        answers = (((), b""), ((), begun), ((), UNTIL_CLOSE_HEAD + b"abc"), (HANDSHAKE, SWITCHING), upload)
        leaves = (Wire.close, Wire.reset, close_tls) if is_tls else (Wire.close, Wire.reset, Wire.end, None)
        before = len(os.listdir("/proc/self/fd"))
        with contextlib.ExitStack() as stack:
            for is_reused, (lines, answer), leave in itertools.product((False, True), answers, leaves):
                count = 2 * is_reused  # an upload takes no connection that was used once, or idles for a second
                last = (read_head, answer, tell, read_to_the_end, lambda wire, app: app.happened.set())
                apps.append(upstream(in_turn(script(*(read_head, OK) * count + last), script(*last))))
                wire = stack.enter_context(proxy.wire())
                assert [wire.ask(to(apps[-1]))[2] for _ in range(count)] == [b"ok"] * count
                with contextlib.ExitStack() if leave else proxy.held():
                    wire.send(to(apps[-1], *lines))
                    if not leave:
                        wire.end()
                assert apps[-1].told.wait(WAIT)
                wire.until(answer[-3:])
                if leave:
                    leave(wire)
                if leave in (Wire.end, None):
                    ended.append((wire, not lines and not answer))
            for app in apps:
                assert app.happened.wait(WAIT)
            for wire, is_silent in ended:
                with contextlib.suppress(ConnectionResetError):
                    got = wire.rest()
                    assert b" 504 " in got if is_silent else not got.endswith(b"0\r\n\r\n")
        eventually(lambda: len(records()) == len(apps) * 2)
        outcomes = {(record["status"], "error" in record) for record in records()}
        assert outcomes - {(504, True)} == {(200, False), (101, False), ("gone", False)}
        assert ((504, True) in outcomes) is not is_tls
        assert not proxy.proxy.tunnels
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + len(apps))  # their listeners

    def test_client_that_resets_before_its_request_was_sent_on_is_forgotten(self, proxy, upstream):
        app = upstream(read_to_the_end)
        for _ in range(10):
            wire = proxy.wire()
            with proxy.held():
                wire.send(to(app))
                wire.reset()
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))

    @pytest.mark.parametrize("lines, answer, is_unix", [
        (("Content-Length: 1000000000",), b"", False), ((), b"", False), (HANDSHAKE, SWITCHING, False),
        (("Content-Length: 1000000000",), b"", True),
    ], ids=["upload", "pipelined", "tunnel", "upload over a Unix socket"])
    def test_client_that_leaves_unread_is_forgotten(self, start, upstream, tmp_path, lines, answer, is_unix):
        """Over TCP, only a reset tells."""
        app, path = upstream(script(read_head, answer, tell, hold)), str(tmp_path / "proxy")
        proxy = start(bind="unix:" + path if is_unix else "127.0.0.1")
        wire = Wire.to_unix(path) if is_unix else proxy.wire()
        wire.send(to(app, *lines))
        assert app.told.wait(WAIT)
        wire.sock.settimeout(0.1)
        with pytest.raises(socket.timeout):
            while True:
                wire.sock.send(bytes(65536))
        wire.close() if is_unix else wire.reset()
        eventually(lambda: not count_connections(remote_port=app.port))


class TestTunnel:
    def test_handshake_is_end_to_end(self, proxy, upstream):
        """Also at the prefix without a slash: a WebSocket cannot follow a redirect."""
        app = upstream(once(SWITCHING))
        names = ("upgrade", "connection", "sec-websocket-protocol", "sec-websocket-version")
        for path, target in (("/ws?a", "/ws?a"), ("", "/")):
            message = proxy.ask(to(app, "Sec-WebSocket-Protocol: a, b", *HANDSHAKE, path=path), no_body=True)
            received = app.messages[-1]
            assert [message[0], received[0]] == ["HTTP/1.1 101 Switching Protocols", "GET %s HTTP/1.1" % target]
            assert [fields_of(message)[name] for name in names[:3]] == ["websocket", "Upgrade", "b"]
            assert [fields_of(received)[name] for name in names] == ["websocket", "Upgrade", "a, b", "13"]

    @pytest.mark.parametrize("answer, status", [(ok(b"no"), 200), (ok(b"no").replace(b"200 OK", b"403 No"), 403)] + [
        (b"HTTP/1.1 101 S\r\n" + fields + b"\r\n", 502)
        for fields in (b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Upgrade: websocket\r\n")
    ], ids=case_id)
    def test_handshake_that_the_app_does_not_accept_opens_no_tunnel(self, proxy, upstream, answer, status):
        with proxy.wire() as wire:
            message = wire.ask(to(upstream(once(answer)), *HANDSHAKE))
            assert (status_of(message), message[2] == b"no") == (status, status != 502)
            assert status_of(wire.ask(request("GET", "/nothing"))) == 404

    @pytest.mark.parametrize("first", ["client", "app"])
    @pytest.mark.parametrize("size, is_late", [(10, False), (4 << 20, False), (1000000, True)])
    def test_half_close_passes_on_behind_all_bytes(self, start, upstream, first, size, is_late):
        """Either side may end first and still receive the rest of the other, however late it reads."""
        proxy, data = start(keep_alive_timeout=0.5), random_bytes(size)

        def end_first(wire, _):
            wire.send(data)
            wire.end()
            if is_late:
                outlast_keep_alive(proxy)
            assert wire.rest() == data[::-1]

        def end_last(wire, _):
            assert wire.rest() == data
            wire.send(data[::-1])
            wire.end()

        steps = (end_first, end_last) if first == "client" else (end_last, end_first)
        app = upstream(script(read_head, SWITCHING, steps[1], tell))
        with proxy.tunnel(app) as wire:
            if is_late:
                narrow(wire.sock.getsockname()[1] if first == "client" else app.port, 1 << 16)
            steps[0](wire, app)
            assert app.told.wait(WAIT)

    @pytest.mark.parametrize("first", ["client", "app"])
    @pytest.mark.parametrize("lost", ["client", "app"])
    def test_reset_in_the_moment_of_the_101_ends_the_tunnel(self, start, upstream, first, lost):
        """The proxy may see the client's bytes or the app's 101 first, and the reset before it comes to the 101."""

        def client(wire):
            wire.reset() if lost == "client" else wire.send(b"abc")

        proxy, lose = start(max_tunnels=1), Wire.reset if lost == "app" else b""
        interim = b"HTTP/1.1 102 \r\n\r\n" * 9
        app = upstream(script(read_message, wait, interim + SWITCHING, lose, tell, read_to_the_end))
        with proxy.sent(to(app, *HANDSHAKE)) as wire:
            eventually(lambda: app.messages)
            with proxy.held():
                if first == "client":
                    client(wire)
                app.happened.set()
                assert app.told.wait(WAIT)
                if first == "app":
                    client(wire)
            if lost == "app":
                read_to_the_end(wire, app)
            eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))
        with proxy.tunnel(upstream(once(SWITCHING))):
            pass

    def test_tunnel_outlives_all_deadlines_of_requests(self, start, upstream):
        """It may be silent for long, and its bytes may wait long for a client that does not read."""
        proxy = start(head_timeout=0.4, keep_alive_timeout=0.4, stall_timeout=0.4, response_timeout=0.4)
        with contextlib.ExitStack() as stack:
            wires = []
            for size in (3, 1 << 20):
                app = upstream(script(read_head, SWITCHING, bytes(size), lambda wire, app: wire.send(wire.exactly(4))))
                wires.append(stack.enter_context(slow_wire(proxy)))
                assert status_of(wires[-1].ask(to(app, *HANDSHAKE), no_body=True)) == 101
            outlast_keep_alive(proxy)
            for wire, size in zip(wires, (3, 1 << 20)):
                assert len(wire.exactly(size)) == size
                wire.send(b"ping")
                assert wire.exactly(4) == b"ping"

    def test_half_closed_tunnel_that_stands_still_is_ended(self, start, upstream):
        proxy = start(stall_timeout=0.2)
        with proxy.tunnel(upstream(script(read_head, SWITCHING, hold))) as wire:
            wire.end()
            assert wire.ends()
        eventually(lambda: not proxy.open_connections())


# ------ Server -------------------------------------------------------------------------------------------------------


class TestLimits:
    def test_connection_too_many_ends_an_idle_one_or_gets_a_503(self, start, upstream):
        app, proxy = upstream(script(read_head, hold, OK)), start(max_connections=3)
        with proxy.sent(to(app)) as busy, proxy.wire() as first, proxy.wire() as second:
            eventually(lambda: app.connections == 1)
            for wire in (first, second):
                wire.ask(request("GET", "/nothing"))
            earlier = proxy.get("/nothing")
            assert status_of(earlier) == 404
            assert first.ends()
            with proxy.sent(to(app)) as third:
                second.send(to(app))
                eventually(lambda: app.connections == 3)
                with proxy.wire() as wire:
                    answer = wire.message()
                    assert (status_of(answer), "retry-after" in fields_of(answer)) == (503, True)
                    assert parsedate(fields_of(answer)["date"]) >= parsedate(fields_of(earlier)["date"])
                app.let_go.set()
                assert busy.message()[2] == second.message()[2] == third.message()[2] == b"ok"

    @pytest.mark.parametrize("has_tls, is_late, raw", [
        (False, False, b"GET /proxy/ HT"), (False, False, b""),
        (False, False, request("POST", "/proxy/", "Content-Length: 5000")), (True, False, b"\x16\x03"),
        (True, True, b"GET /"),
    ], ids=["half a head", "nothing", "half a form", "half a handshake", "half a head over TLS"])
    def test_connections_that_are_not_admitted_make_room_first(self, start, secure, app, has_tls, is_late, raw):
        """Also if many come at once. Over TLS, a connection counts before and after its handshake."""
        proxy = (secure if has_tls else start)(max_connections=10, token=TOKEN)
        visit = to(app, "Authorization: Bearer " + TOKEN)
        with contextlib.ExitStack() as stack, proxy.wire() as friend:
            assert friend.ask(visit)[2] == b"ok"
            with contextlib.ExitStack() if is_late else proxy.held():
                for _ in range(40):
                    stack.enter_context(proxy.wire() if is_late else Wire.to(proxy.port)).send(raw)
            with proxy.wire() as one, proxy.wire() as other:
                for wire in (one, other, friend):
                    assert wire.ask(visit)[2] == b"ok"
                eventually(lambda: proxy.open_connections() == 10)

    @pytest.mark.parametrize("raw", [
        b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"a" * 250000, request("GET", "/proxy/?token=wrong") * 6000,
    ], ids=["a partial head", "requests behind one that waits for its response to a wrong token"])
    def test_bytes_of_clients_that_are_not_admitted_are_bounded(self, start, raw, monkeypatch):
        """Each could send 256 KiB, and less on a busy machine. The oldest make room for others, which are served."""
        monkeypatch.setattr(port_proxy, "_PENDING_BYTES", 1 << 24)
        proxy, token = start(token=TOKEN, max_head_bytes=1 << 20), "Authorization: token " + TOKEN

        def is_served():
            with contextlib.suppress(ConnectionError), proxy.sent(request("GET", "/proxy/", token)) as wire:
                return wire.until(b"\r\n").startswith(b"HTTP/1.1 200 ")
            return False

        with contextlib.ExitStack() as stack:
            poll = select.poll()
            with proxy.held():  # it then reads all at once of what each has sent
                for _ in range(350):
                    wire = stack.enter_context(proxy.wire())
                    wire.sock.setblocking(False)
                    poll.register(wire.sock, getattr(select, "POLLRDHUP", 0))
                    with contextlib.suppress(OSError):
                        wire.sock.send(raw)
            eventually(lambda: len(poll.poll(0)) > 50)
            eventually(is_served)

    def test_tunnel_too_many_gets_a_503(self, start, upstream):
        """Requests still have room, and a tunnel that ends makes room for another."""
        app, proxy = upstream(serve_sockets), start(max_tunnels=2)

        def status():
            return status_of(proxy.ask(to(app, *HANDSHAKE), no_body=True))

        with proxy.tunnel(app) as one, proxy.tunnel(app):
            assert status() == 503
            assert status_of(proxy.ask(to(app))) == 200
            one.close()
            eventually(lambda: status() == 101)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A folder with a certificate for localhost and its key, in several files; rsa.pem is another key."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("openssl is not installed, to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    for command in (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem",
        "pkey -in key.pem -aes256 -passout pass:abcd -out locked.pem",
        "genrsa -out rsa.pem 2048",
    ):
        arguments = [openssl] + command.split()
        subprocess.run(arguments, cwd=str(folder), check=True, stderr=subprocess.DEVNULL, timeout=WAIT)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    (folder / "junk").write_text("hello\n")
    return folder


@pytest.fixture
def secure(start, certificate):
    """Start proxies whose clients speak TLS."""

    def secure(certfile="both.pem", **options):
        proxy = start(certfile=str(certificate / certfile), **options)
        proxy.context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        return proxy

    return secure


@pytest.fixture
def tls_app(upstream, certificate):
    """An app that answers every request with OK, over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(str(certificate / "both.pem"))

    def serve(wire, app):
        with contextlib.suppress(OSError):  # the certificate was refused, or the end came without a close_notify
            wire.sock = context.wrap_socket(wire.sock, server_side=True)
            answering(OK)(wire, app)

    return upstream(serve)


class TestTls:
    def test_clients_are_served_over_tls(self, secure, app, certificate):
        """A response may come before the whole body has been sent; plain HTTP gets a 400 that says so."""
        proxy = secure("cert.pem", keyfile=str(certificate / "key.pem"))
        assert proxy.proxy.url.startswith("https://")
        raw = to(app, "Content-Length: 200000", method="POST", body=bytes(200000))
        with proxy.wire() as wire:
            assert wire.sock.version() in ("TLSv1.2", "TLSv1.3")
            assert [wire.ask(raw)[2], wire.ask(to(app, "Origin: https://here:8888"))[2]] == [b"ok", b"ok"]
            early = request("POST", "/nothing", "Content-Length: 300000", body=bytes(100000))
            assert status_of(wire.ask(early)) == 404
        assert fields_of(app.messages[0])["x-forwarded-proto"] == "https"
        assert fields_of(app.messages[1])["origin"] == "http://localhost:%d" % app.port
        with Wire.to(proxy.port) as wire:
            assert_says(wire.ask(request("GET", "/proxy/")), 400, b"This port speaks HTTPS.")
            wire.end()
            assert wire.rest() == b""

    @pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"], ids=["nothing", "a part"])
    def test_slow_handshake_times_out(self, secure, sent):
        with Wire.to(secure(head_timeout=0.3).port) as wire:
            wire.send(sent)
            assert wire.ends()

    def test_handshake_that_has_not_begun_yet_makes_room_once(self, background, start, certificate):
        """Clients of two listeners come at once, and then others."""
        config = Config(certfile=str(certificate / "both.pem"), max_connections=1, head_timeout=4 * WAIT)
        listeners, proxy = [socket.socket() for _ in range(2)], PortProxy(config)
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in listeners]
        background.do(proxy.start(listeners))
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: background.do(proxy.close()))
            with start().held():
                wires = [stack.enter_context(Wire.to(port)) for port in ports]
            wires += [stack.enter_context(Wire.to(ports[0])) for _ in range(5)]
            for wire in wires[:-1]:
                assert wire.ends()
            assert not select.select([wires[-1].sock], [], [], 0)[0]

    def test_client_that_does_not_close_is_closed_in_time(self, secure, monkeypatch):
        """asyncio's own timeout for it is 30 seconds, and before 3.11 there is none."""
        monkeypatch.setattr(port_proxy, "_CLOSE_SECONDS", 0.3)
        proxy = secure(keep_alive_timeout=0.3)
        with proxy.wire() as wire:
            assert status_of(wire.ask(request("GET", "/nothing"))) == 404
            eventually(lambda: not proxy.open_connections(), WAIT / 2)

    def test_tunnel_is_cut_though_its_client_does_not_close(self, background, secure, upstream):
        """asyncio's own timeout for it is 30 seconds."""
        app, proxy = upstream(script(read_head, SWITCHING, read_to_the_end, tell)), secure(shutdown_timeout=WAIT)
        with proxy.tunnel(app), in_thread(proxy.close):
            assert app.told.wait(WAIT)
            background.loop.call_soon_threadsafe(proxy.proxy.cut)
            eventually(lambda: not proxy.open_connections(), WAIT / 2)

    def test_versions_before_tls_1_2_are_refused(self, certificate):
        """Not on the wire: some builds of OpenSSL refuse them in any case."""
        context = port_proxy.server_context(Config(certfile=str(certificate / "both.pem")))
        old = ssl.OP_NO_SSLv3 | ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        assert context.options & old == old or context.minimum_version == ssl.TLSVersion.TLSv1_2

    @pytest.mark.parametrize("options, message", [
        ("--certfile junk", "junk cannot be used: "), ("--certfile cert.pem", "cert.pem cannot be used: "),
        ("--certfile cert.pem --keyfile rsa.pem", "cert.pem and rsa.pem cannot be used: "),
        ("--certfile both.pem --client-ca junk", "junk cannot be used: "),
        ("--certfile .", ". cannot be used: Is a directory."), ("--certfile gone", "cannot read gone: No such file"),
        ("--certfile cert.pem --keyfile gone", "cannot read gone: "),
        ("--certfile both.pem --client-ca gone", "cannot read gone: "),
    ])
    def test_unusable_file_is_named(self, certificate, monkeypatch, capsys, options, message):
        monkeypatch.chdir(str(certificate))
        status, output, errors = run_main(capsys, "--port", "0", *options.split())
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith("port_proxy: " + message)
        assert ("--keyfile" in errors) is ("cannot be used" in message)

    def test_unusable_file_may_be_a_path(self, certificate):
        files = Config(certfile=certificate / "cert.pem", keyfile=certificate / "rsa.pem")
        with pytest.raises(ValueError, match="cert.pem and .*rsa.pem cannot be used: "):
            port_proxy.server_context(files)

    def test_pass_phrase_without_a_terminal_is_an_error(self, certificate):
        command = [sys.executable, PROGRAM, "--port", "0", "--certfile", "cert.pem", "--keyfile", "locked.pem"]
        how = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        done = subprocess.run(command, cwd=str(certificate), start_new_session=True, timeout=WAIT, **how)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.endswith(b"\nport_proxy: the pass phrase of the key in locked.pem was not given\n")

    @pytest.mark.skipif(not shutil.which("bash"), reason="this system has no bash")
    def test_files_may_be_pipes(self, certificate):
        """A shell makes pipes of programs that unlock a key; they can be read once."""
        line = 'exec "$0" "$@" --certfile <(cat cert.pem) --keyfile <(cat key.pem)'
        with program(command=["bash", "-c", line, sys.executable, PROGRAM], cwd=str(certificate)) as (_, banner, _):
            assert " open https://localhost:" in banner

    def test_tunnel_works_over_tls(self, secure, upstream):
        data = random_bytes(1 << 21)
        echo = (lambda wire, app: wire.send(wire.exactly(len(data))), read_to_the_end, tell)
        app = upstream(script(read_head, SWITCHING + b"hello", *echo))
        with secure().tunnel(app) as wire:
            wire.send(data)  # the app reads it all before it sends; one TLS socket is not for two threads
            assert wire.exactly(5 + len(data)) == b"hello" + data
        assert app.told.wait(WAIT)

    def test_client_that_resets_a_body_until_close_is_no_error(self, secure, upstream):
        """asyncio forgets the socket of a lost TLS connection, whether reading or writing has failed."""
        app, proxy = upstream(script(read_head, UNTIL_CLOSE_HEAD + b"abc", send_until_closed)), secure()
        for _ in range(10):
            wire = proxy.wire()
            wire.send(to(app, version="1.0"))
            wire.until(b"abc")
            wire.reset()
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))
        gc.collect()  # then the event loop reports the failure of a task

    def test_upstream_with_an_unknown_certificate_is_not_used(self, start, tls_app):
        assert_says(start(upstream_tls=[str(tls_app.port)]).ask(to(tls_app)), 502, b"--insecure-upstream")

    @pytest.mark.parametrize("place, options", [
        ("localhost:%d", {"insecure_upstream": True}), ("%d", {}), ("127.0.0.1:%d", {}),
    ])
    def test_upstream_is_reached_over_tls(self, start, tls_app, certificate, monkeypatch, place, options):
        """Its certificate is not verified, or known. The translated Origin has its scheme."""
        if not options:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        place %= tls_app.port
        proxy = start(upstream_tls=[place], **options)
        assert status_of(proxy.get("/proxy/%s/" % place, "Origin: http://here:8888")) == 200
        assert fields_of(tls_app.messages[0])["origin"] in ("https://" + place, "https://localhost:" + place)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
class TestUnixSockets:
    def test_socket_is_private_and_removed(self, start, app, tmp_path):
        path = tmp_path / "proxy"
        proxy = start(bind="unix:%s" % path, allow_hostnames=())
        assert path.stat().st_mode & 0o777 == 0o600
        with Wire.to_unix(str(path)) as wire:
            assert wire.ask(at("localhost", "GET", "/proxy/%d/" % app.port))[2] == b"ok"
        assert "x-forwarded-for" not in fields_of(app.messages[0])
        assert proxy.proxy.token == ""
        proxy.close()
        assert not path.exists()

    def test_only_a_stale_socket_is_replaced(self, background, start, tmp_path):
        path = tmp_path / "proxy"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        start(bind="unix:%s" % path)
        (tmp_path / "file").write_text("precious")
        (tmp_path / "link").symlink_to(path)
        for name in ("proxy", "file", "link"):  # a socket in use, a file, a link to the socket
            with pytest.raises(OSError):
                background.do(PortProxy(Config(bind="unix:%s" % (tmp_path / name))).start())
        assert (tmp_path / "file").read_text() == "precious"
        Wire.to_unix(str(path)).close()

    def test_socket_that_others_may_use_requires_a_token(self, background, tmp_path):
        """A socket that was handed over is not removed."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / "open"))
        os.chmod(str(tmp_path / "open"), 0o666)
        proxy = PortProxy(Config())
        background.do(proxy.start([sock]))
        assert proxy.token
        background.do(proxy.close())
        assert (tmp_path / "open").exists()


class TestLog:
    def test_failure_is_logged_and_a_redirect_is_none(self, start, upstream, records):
        begun, proxy = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", start(shutdown_timeout=0.1)
        scripts = (read_head, begun), (read_head, begun, hold), (read_head, tell, hold)
        cut, held, mute = (upstream(script(*steps)) for steps in scripts)
        assert status_of(proxy.ask(to(cut, path=""))) == 302
        with proxy.sent(to(cut)) as wire:
            assert wire.rest().endswith(b"abc")
        eventually(lambda: len(records()) == 2)
        with proxy.sent(to(held)) as wire, proxy.sent(to(mute)):
            wire.until(b"abc")
            assert mute.told.wait(WAIT)
            proxy.close()
        logged = [(record["status"], record.get("error", "")) for record in records()]
        assert logged[0] == (302, "")
        assert (logged[1][0], "in the middle of its response" in logged[1][1]) == (200, True)
        assert {(status, "told to stop" in error) for status, error in logged[2:]} == {(200, True), ("gone", True)}

    def test_tunnel_is_one_line_when_it_ends(self, proxy, upstream, caplog, records):
        app = upstream(script(read_head, SWITCHING + b"abc", read_to_the_end))
        with proxy.sent(to(app, *HANDSHAKE, path="/ws")) as wire:
            wire.until(b"abc")
            assert caplog.records == []
            wire.send(b"12345")
            wire.end()
            wire.rest()
            eventually(records)
        pattern = r"127\.0\.0\.1 GET /proxy/{0}/ws -> localhost:{0} 101, 3 bytes sent, 5 received, [0-9.]+ s"
        assert re.fullmatch(pattern.format(app.port), caplog.records[0].getMessage())


class TestClose:
    def test_close_lets_requests_finish_and_ends_idle_connections(self, start, upstream):
        app = upstream(script(read_message, OK, read_message, tell, wait, OK))
        tunnel_app = upstream(script(read_head, SWITCHING, read_to_the_end, tell))
        proxy = start(shutdown_timeout=WAIT)
        with contextlib.ExitStack() as stack:
            idle, partial, busy = (stack.enter_context(proxy.wire()) for _ in range(3))
            assert idle.ask(to(app))[2] == b"ok"
            partial.send(b"GET / HT")
            tunnel = stack.enter_context(proxy.tunnel(tunnel_app))
            busy.send(to(app))
            assert app.told.wait(WAIT)
            with in_thread(proxy.close):
                for wire in (idle, tunnel, partial):
                    assert wire.rest() == b""
                    wire.close()
                assert tunnel_app.told.wait(WAIT)
                with pytest.raises(OSError):
                    proxy.wire()
                app.happened.set()
                message = busy.message()
                assert (message[2], fields_of(message)["connection"]) == (b"ok", "close")
                busy.close()

    def test_connection_does_not_idle_after_its_last_request(self, start, upstream):
        """Though the head of the response, which has gone out, announced no close."""
        app = upstream(script(read_head, OK[:-1], hold, OK[-1:], read_to_the_end))
        proxy = start(shutdown_timeout=4 * WAIT, keep_alive_timeout=4 * WAIT)
        with proxy.wire() as idle, proxy.sent(to(app)) as wire:
            idle.ask(request("GET", "/nothing"))
            assert "close" not in wire.until(b"\r\n\r\n").decode()
            with in_thread(proxy.close):
                assert idle.rest() == b""  # by now the proxy is closing
                app.let_go.set()
                assert wire.rest() == OK[-2:]

    def test_request_behind_the_last_one_is_not_served(self, background, start, app, caplog, monkeypatch):
        proxy, closing = start(), []

        def close(record):  # in the loop, between two requests
            closing.append(background.loop.create_task(proxy.proxy.close()))

        with caplog.at_level(logging.INFO, "port_proxy"), monkeypatch.context() as patch, proxy.wire() as wire:
            patch.setattr(caplog.handler, "emit", close)
            wire.send(to(app, "Content-Length: 0", method="POST") * 2)
            assert wire.rest() == OK
        background.do(asyncio.wait(closing))
        app.close()
        assert closing and len(app.messages) == 1

    def test_close_works_twice_at_once_and_without_start(self, background):
        proxy = PortProxy(Config(port=0))

        async def close_often():
            await proxy.close()
            for _ in range(2):
                await proxy.start()
                await asyncio.gather(proxy.close(), proxy.close())
                await proxy.close()

        background.do(close_often())
        assert proxy.port == 0


# ------ Fuzzing: any bytes from either side, cut anywhere ------------------------------------------------------------

# The reference raises ValueError if a message is invalid, and EOFError if it may be valid, but its end is missing.
NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = rb"(" + NAME + rb") ([!-\"$-~\x80-\xff]+) HTTP/1\.([01])"
STATUS_LINE = rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?"
GAP = rb"[ \t]*"  # white space that is accepted before a colon and behind a chunk size, in responses alone


def reference_head(raw, start_line, gap=b""):
    """(groups of the start line, values by lower-case name, the bytes behind the head)."""
    head, end, rest = raw.partition(b"\r\n\r\n")
    if not end:
        raise EOFError
    first, *lines = head.split(b"\r\n")
    start = re.match(start_line + rb"\Z", first)
    fields = [re.match(rb"(" + NAME + rb")" + gap + rb":[ \t]*([\t -~\x80-\xff]*?)[ \t]*\Z", line) for line in lines]
    if not start or not all(fields):
        raise ValueError
    named = collections.defaultdict(list)
    for field in fields:
        named[field.group(1).lower()].append(field.group(2))
    return start.groups(), named, rest


def reference_body(raw, named, version, gap=b""):
    """(the body, what is behind it) as the fields frame it; (None, raw) if they do not."""
    lengths = {one.strip() for value in named[b"content-length"] for one in value.split(b",")}
    codings = [coding.lower() for coding in named[b"transfer-encoding"]]
    if codings and (lengths or version == b"0" or codings != [b"chunked"]):
        raise ValueError
    if len(lengths) > 1 or not all(re.match(rb"[0-9]{1,18}\Z", length) for length in lengths):
        raise ValueError
    if codings:
        return reference_chunks(raw, gap)
    if not lengths:
        return None, raw
    size = int(min(lengths))
    if len(raw) < size:
        raise EOFError
    return raw[:size], raw[size:]


def reference_chunks(raw, gap):
    body, size = b"", 1
    while size:
        match = re.match(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n]*)?" + gap + rb"\r\n", raw)
        if not match:
            raise ValueError if b"\r\n" in raw else EOFError
        raw, size = raw[match.end() :], int(match.group(1), 16)
        if size and raw[size : size + 2] != b"\r\n":
            raise ValueError if len(raw) > size + 1 else EOFError
        body, raw = body + raw[:size], raw[size + 2 * bool(size) :]
    trailers = re.match(rb"(?:" + NAME + rb":[\t -~\x80-\xff]*\r\n)*\r\n", raw)
    if not trailers:
        raise ValueError if b"\r\n\r\n" in b"\r\n" + raw else EOFError
    return body, raw[trailers.end() :]


def reference_request(raw):
    """(method, target, the body or None if it is not whole, the error in it or what is behind it) of a valid head."""
    (method, target, version), named, raw = reference_head(raw, REQUEST_LINE)
    if len(named[b"host"]) not in ((1,) if version == b"1" else (0, 1)):
        raise ValueError
    try:
        body, rest = reference_body(raw, named, version)
    except (EOFError, ValueError) as error:
        return method, target, None, type(error)
    return method, target, body or b"", rest


def reference_requests(raw):
    """([(method, target, body)] in a stream, the error at its end or None); a body that is not whole is None."""
    found = []
    while True:
        raw = re.sub(rb"\A(\r\n)+", b"", raw)  # empty lines before a request
        if not raw:
            return found, None
        try:
            *request, raw = reference_request(raw)
        except (EOFError, ValueError) as error:
            return found, type(error)
        found.append(tuple(request))
        if not isinstance(raw, bytes):
            return found, raw


def reference_message(raw, method, has_ended, gap):
    """(status, fields, body, what is behind it) of the first final response in a byte stream."""
    status = b"100"
    while status < b"200" and status != b"101":
        (version, status), named, raw = reference_head(raw, STATUS_LINE, gap)
    if status in (b"101", b"204", b"304") or method == b"HEAD":
        return int(status), named, b"", raw
    body, rest = reference_body(raw, named, version, gap)
    if body is None and not has_ended:
        raise EOFError
    return (int(status), named, raw, b"") if body is None else (int(status), named, body, rest)


def reference_response(raw, method, is_upgrade, has_ended):
    """(status, body) of the final response in a byte stream, or EOFError or ValueError."""
    try:
        status, _, body, _ = reference_message(raw, method, has_ended, GAP)
    except (EOFError, ValueError) as error:
        return type(error)
    return (status, body) if status != 101 or is_upgrade else ValueError


def received_responses(client, has_ended):
    """([(status, fields, body)] of the responses that a client got, whether it can get no more); None breaks off."""
    raw, methods, found, is_over = client.received, iter(client.requests), [], False
    while raw and not is_over:
        method = next(methods, (b"",))[0]
        try:
            status, named, body, raw = reference_message(raw, method, has_ended, b"")
        except EOFError:
            return found + [None], has_ended
        found.append((status, named, body))
        is_over = status == 101 or b"close" in named[b"connection"]
        if method == b"HEAD" and status >= 400 and is_over and b"%d" % len(raw) in named[b"content-length"]:
            raw = b""  # the method of a head that is refused is unknown
        assert not is_over or not raw or status == 101, "something behind the last response"
    return found, is_over


class Fuzzing:
    """Clients of a proxy, and an app, which send invalid messages, all in one event loop.

    Every outcome is checked.  No request becomes two, and none is made of another's body.  The app sees the requests
    that `reference_requests` finds in the bytes of a client.  Each client gets the response that `reference_response`
    finds in the bytes of the app, or an error, or a response that visibly breaks off.
    """

    MUTATIONS = [
        b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"0", b"1", b"5", b"a", b";", b"\x00", b"\xff", b"chunked",
        b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b",", b"-", b"+", b"",
    ]  # fmt: skip
    UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket"
    FIELDS = [b"Connection: close", b"Expect: 100-continue", b"Connection: content-length, transfer-encoding"]
    FIELDS += [UPGRADE] * 3 + [b""] * 24
    NASTY_FIELDS = [
        b"Content-Length: 3", b"Content-Length: 0", b"Content-Length: 3, 4", b"Content-Length: +3",
        b"Content-Length: 03", b"content-length:3", b"Content-Length : 3", b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding : chunked",
        b"transfer-encoding:\tCHUNKED", b"Transfer-Encoding:\x0bchunked", b" Transfer-Encoding: chunked",
        b"X: y\nTransfer-Encoding: chunked", b"X: y\rContent-Length: 3", b"Host: b", b"X: \x00",
    ]  # fmt: skip
    BATCH = 100  # clients at once, which share the connections to the app

    def __init__(self, proxy_port):
        self.proxy_port = proxy_port
        self.errors = []  # of the app
        self.allowed = collections.Counter()  # requests; that of a client that got an error may come after its batch
        self.counts = collections.Counter()

    def mutated(self, chance, lines, body):
        """A message that may be damaged, and whether it is not."""
        lines = [line for line in lines if line]
        plain = b"\r\n".join(lines) + b"\r\n\r\n" + body
        if chance.random() < 0.13:
            lines.insert(chance.randrange(1, len(lines) + 1), chance.choice(self.NASTY_FIELDS))
        mutant = bytearray(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        probability = chance.choice([0, 0, 0.4])
        while chance.random() < probability:
            at, cut = chance.randrange(len(mutant) + 1), chance.choice([0, 0, 1, 2, 7])
            mutant[at : at + cut] = chance.choice(self.MUTATIONS)
        ports = re.findall(rb"/proxy/([0-9]+)(?![^/? ])", bytes(mutant))
        # Requests to other programs of this machine are not sent.
        raw = bytes(mutant) if all(int(port) in (0, self.app_port) for port in ports) else plain
        return raw, raw == plain

    def request(self, chance, name, number):
        """A request with bytes in it that would be another one if its body were misread, and whether it is valid."""
        target = b"/proxy/%d/%s" % (self.app_port, name)
        smuggled = b"GET %s-smuggled HTTP/1.1\r\nHost: a\r\n\r\n" % target
        body = chance.choice([b"", b"abc", smuggled, b"0\r\n\r\n" + smuggled])
        framing = chance.choice([b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked", b""])
        if framing.endswith(b"chunked"):
            cut = chance.randrange(len(body) + 1)
            body = b"".join(chunk(part) for part in (body[:cut], body[cut:]) if part)
            body += chance.choice([b"0\r\n\r\n", b"0;x=y\r\n\r\n", b"0\r\nX: y\r\n\r\n"])
        method = chance.choice([b"GET", b"POST", b"POST", b"PUT", b"HEAD", b"DELETE"])
        target = chance.choice([b"%s-%d" % (target, number)] * 19 + [b"/nothing"])
        line = b"%s %s HTTP/1.%d" % (method, target, chance.random() < 0.93)
        lines = [line, b"Host: a", framing, chance.choice(self.FIELDS)]
        return self.mutated(chance, lines, body if framing else b"")

    def response(self, chance, tag):
        """What the app answers to the target with this tag, and whether it is valid."""
        body, version = b"<%s>" % tag, chance.random() < 0.9
        status = chance.choice([b"200 OK", b"200 OK", b"404 No", b"204 None", b"304 Same", b"101 Switching"])
        lines = [b"HTTP/1.%d %s" % (version, status), b"X-App: 1", chance.choice([b""] * 9 + [b"Connection: close"])]
        lines.append(self.UPGRADE if status.startswith(b"101") else b"")
        length, chunked = b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked"
        lines.append(chance.choice([length, chunked] * 4 + [b""]))
        body = chunk(body) + chunk(b"") if lines[-1] == chunked else body
        raw, is_plain = self.mutated(chance, lines, body)
        raw = chance.choice([b""] * 9 + [b"HTTP/1.1 100 Continue\r\n\r\n"]) + raw
        more = b"HTTP/1.1 200 OK\r\nX-App: 1\r\nContent-Length: %d\r\n\r\n<evil-%s>" % (len(tag) + 7, tag)
        return raw + chance.choice([b"", b"", b"", more]), is_plain and (version or lines[-1] != chunked)

    async def send(self, writer, chance, raw, may_cut=lambda part: True):
        """Write these bytes in any pieces, with cuts only behind parts for which `may_cut` is true."""
        count = chance.choice([0, 0, 0, 1, 2, 3, 5, 60])
        cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(count))
        cuts = [cut for cut in cuts if may_cut(raw[:cut])]
        for start, end in zip([0] + cuts, cuts + [len(raw)]):
            if start != end and not writer.transport.is_closing():
                writer.write(raw[start:end])
                for _ in range(chance.choice([0, 0, 0, 1, 2, 10])):
                    await asyncio.sleep(0)

    async def talk(self, name):
        """Be a client. A plain one sends nothing invalid, a patient one ends its side when it has its responses, and a
        client that leaves resets its connection, maybe in the middle of a request."""
        chance = random.Random("%d %s" % (self.seed, name.decode()))
        requests = [self.request(chance, name, number) for number in range(chance.randrange(1, 4))]
        leaves = chance.random() < 0.05
        client = argparse.Namespace(name=name, received=b"", is_reset=leaves)
        client.raw, client.is_plain = b"".join(raw for raw, _ in requests), all(plain for _, plain in requests)
        client.is_patient = not leaves and chance.random() < 0.6
        client.requests, client.end = reference_requests(client.raw)
        client.whole = sum(body is not None for _, _, body in client.requests)
        client.expected = client.whole + (client.end is ValueError)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy_port)
        await self.send(writer, chance, client.raw[: chance.randrange(len(client.raw)) if leaves else None])
        if leaves:
            writer.transport.abort()
        elif not client.is_patient:
            self.end(writer)
        data = b"-"
        while data:
            with contextlib.suppress(AssertionError, ValueError):  # which is found again in the end
                responses, is_over = received_responses(client, False)
                if is_over or len(responses) - (None in responses) >= client.expected:
                    self.end(writer)
            try:
                data = await reader.read(65536)
            except ConnectionError:
                data, client.is_reset = b"", True
            client.received += data
        writer.close()
        return client

    def end(self, writer):
        with contextlib.suppress(OSError):  # the proxy has reset it
            if not writer.transport.is_closing():
                writer.write_eof()

    async def more(self, reader, raw):
        """The bytes of a request and what comes behind them; EOFError if nothing does."""
        data = await reader.read(65536)
        assert data or not raw or self.head.match(raw), "the app got %r" % raw
        if not data:
            raise EOFError
        return raw + data

    async def serve(self, reader, writer):
        """Be one connection to the app, which sends a response to each request, a valid one or not."""
        self.connections.add(writer)
        raw, end = b"", False
        try:
            with contextlib.suppress(ConnectionError, EOFError):
                while not end:
                    while not self.head.match(raw):
                        raw = await self.more(reader, raw)
                    method, target, body, rest = reference_request(raw)
                    self.begun.append((method, target))
                    chance = random.Random("%d %s" % (self.seed, target.decode("latin-1")))
                    is_early = chance.random() < 0.3
                    if is_early:
                        end = await self.answer(writer, chance, method, target, raw)
                    while body is None:
                        assert rest is EOFError, "the app got %r" % raw
                        raw = await self.more(reader, raw)
                        _, _, body, rest = reference_request(raw)
                    if not is_early:
                        end = await self.answer(writer, chance, method, target, raw)
                    self.seen.append((method, target, body, end))
                    raw = rest
                while await reader.read(65536):  # of a tunnel, or after the end
                    pass
        except Exception as error:
            self.errors.append(error)
        finally:
            self.connections.remove(writer)
            writer.close()

    async def answer(self, writer, chance, method, target, request):
        """Send a response, and maybe end the connection with it; return whether it can carry no more requests."""
        raw, is_plain = self.response(chance, target[1:])
        is_upgrade = b"\r\nUpgrade: websocket\r\n" in self.head.match(request).group()

        def is_short(part):
            return reference_response(part, method, is_upgrade, False) is EOFError

        ends = chance.random() < 0.4 or is_short(raw)
        response = reference_response(raw, method, is_upgrade, ends)
        self.responses[method, target].append((response, is_plain and not ends and isinstance(response, tuple)))
        # Bytes behind a response come with it: the proxy could not tell later ones from the next response.
        await self.send(writer, chance, raw, is_short)
        if ends and chance.random() < 0.5:
            self.end(writer)
        elif ends:
            chance.choice([writer.close, writer.transport.abort])()
        return ends or response == (101, b"")

    def check(self, clients):
        """Raise AssertionError if an outcome is wrong."""
        assert not self.errors, self.errors
        names = {client.name for client in clients}
        for client in clients:
            prefix = rb"\A/proxy/0*%d(?=/)" % self.app_port  # which the app does not see
            client.requests = [(method, re.sub(prefix, b"", target), body) for method, target, body in client.requests]
            self.allowed.update(client.requests)
            try:
                seen = names & set(re.findall(rb"[g-z]{12}", client.received))
                assert seen <= {client.name}, "an answer to %r" % seen
                self.check_responses(client)
            except (AssertionError, ValueError) as error:
                text = "%r\nseed: %d\nclient: %r\ngot: %r\nresponses: %r"
                responses = [self.responses[request[:2]] for request in client.requests]
                raise AssertionError(text % (error, self.seed, client.raw, client.received, responses)) from error
        # The app got the requests that were sent or their beginnings, and each of them once.
        heads = {request[:2] for request in self.allowed}
        assert heads.issuperset(self.begun), "the app got %r" % (set(self.begun) - heads)
        self.counts["requests"] += len(self.seen)
        for method, target, body, end in self.seen:
            request = method, target, body
            # A request without a response on a connection that the app ends may be sent again if that is safe.
            is_repeatable = end and method != b"POST" and not body
            self.allowed[request] -= not is_repeatable
            assert self.allowed[request] >= 0, "the app got %r" % (request,)

    def check_responses(self, client):
        """Each request got its own response, in order; invalid bytes got a refusal, and then the end."""
        responses, is_over = received_responses(client, not client.is_reset)
        for number, response in enumerate(responses):
            possible = self.responses[client.requests[number][:2]] if number < len(client.requests) else []
            must_arrive = client.is_plain and number < client.whole and len(possible) == 1 and possible[0][1]
            if response is None:
                assert not must_arrive or not client.is_patient, "a good response was cut off"
                return
            status, fields, body = response
            self.counts["refusals" if status >= 400 else "answers"] += 1
            if number >= len(client.requests):
                assert status >= 400 and number == client.whole, "a response without a request"
                assert is_over, "a refusal of bytes behind which others may follow"
            elif (status, body) not in [one for one, _ in possible]:
                assert b"x-app" not in fields, "the app sent %r, not %d %r" % (possible, status, body)
                assert status >= 300, "nobody sent this: %d %r" % (status, body)
                is_late = b"The client has closed its side." in body  # of a machine that was busy for two seconds
                assert not must_arrive or is_late, "a good response became %d" % status
        if client.is_patient and not is_over and not client.is_reset and client.end is not EOFError:
            assert len(responses) == client.expected, "%d responses" % len(responses)

    async def batch(self, seed):
        self.seed, chance = seed, random.Random(seed)
        self.connections, self.seen, self.begun = set(), [], []
        self.responses = collections.defaultdict(list)  # by method and target: what was sent, whether it must arrive
        names = [bytes(chance.choice(b"ghijklmnopqrstuvwxyz") for _ in range(12)) for _ in range(self.BATCH)]
        done, hanging = await asyncio.wait([asyncio.ensure_future(self.talk(name)) for name in names], timeout=WAIT)
        for task in hanging:
            task.cancel()
        assert not hanging and not self.errors, "it hangs, with the seed %d: %r" % (seed, self.errors)
        limit = time.monotonic() + WAIT
        while self.connections:  # which the proxy keeps for further requests
            assert time.monotonic() < limit, "a connection to the app stays open"
            for writer in self.connections:
                with contextlib.suppress(OSError):  # not `write_eof`: a task may still write a response
                    writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.001)
        self.check([task.result() for task in done])

    async def run(self, seed, count):
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.app_port = server.sockets[0].getsockname()[1]
        line = rb"[!-~]+ /[!-~\x80-\xff]* HTTP/1\.1\r\nHost: localhost:%d\r\n" % self.app_port
        self.head = re.compile(line + rb"(?:[^\r]+\r\n)*\r\n")
        with contextlib.closing(server):
            for number in range(0, count, self.BATCH):
                await self.batch(seed + number)


def test_fuzz(start, background, caplog):
    """PORT_PROXY_FUZZ and PORT_PROXY_FUZZ_SEED ask for more clients, and for others."""
    seed = int(os.environ.get("PORT_PROXY_FUZZ_SEED", "20261123"))
    count = int(os.environ.get("PORT_PROXY_FUZZ", "2000"))
    fuzzing = Fuzzing(start(any_owner=True).port)
    asyncio.run_coroutine_threadsafe(fuzzing.run(seed, count), background.loop).result()
    sys.stdout.write("%s\n" % fuzzing.counts)
    assert caplog.records == []
    for kind, share in (("requests", 0.5), ("answers", 0.5), ("refusals", 0.1)):
        assert fuzzing.counts[kind] > share * count, kind


# ------ Check --------------------------------------------------------------------------------------------------------


def html_response(body, status="200 OK", *lines):
    """The bytes of a response with an HTML page."""
    return ok(body, "Content-Type: text/html", *lines).replace(b"200 OK", status.encode(), 1)


def site(pages, is_fussy=False):
    """An app with these pages by path ("*": any other): HTML, where it redirects to, or the bytes of a response.

    PORT stands for its port, PUBLIC for the host that a browser sees. A fussy app refuses other hosts and origins, and
    proxies on this machine.
    """

    def respond(message, app):
        own, fields = "localhost:%d" % app.port, fields_of(message)
        path = re.split("[ ?]", message[0])[1].replace(str(app.port), "PORT")
        is_own = fields["host"] == own and fields.get("origin", "http://" + own) == "http://" + own
        if is_fussy and (not is_own or fields.get("x-forwarded-for") == "127.0.0.1"):
            return html_response(b"", "403 Forbidden")
        page = pages.get(path, pages.get("*"))
        if page is None or ("upgrade" in fields and page is not SWITCHING):
            return html_response(b"", "404 Not Found")
        if isinstance(page, bytes):
            return page
        page = page.replace("PORT", str(app.port)).replace("PUBLIC", fields.get("x-forwarded-host", fields["host"]))
        return html_response(b"", "302 Found", page) if page.startswith("Location: ") else html_response(page.encode())

    return script(read_message, lambda wire, app: wire.send(respond(app.messages[-1], app)))


LOOPS, TO_TLS = "5 times in a row", "redirects to https at its own address"
PREFIX_IN = "/proxy/absolute/PORT/"
BELOW_ITS_BASE = {
    PREFIX_IN: "<title>A</title><script id=_dash-config></script><a href='%sx'>" % PREFIX_IN,
    PREFIX_IN + "ws": SWITCHING,
}
NO_LINKS_LOST = {
    "use": ["http://localhost:8888" + PREFIX_IN], "status": 200, "title": "A", "app": "Dash", "flag": "",
    "rooted": [], "refuses_host": False,
}  # fmt: skip


class TestCheck:
    @pytest.fixture
    def check(self, background):
        def check(upstream, **options):
            return background.do(port_proxy.check_port(str(upstream), checked_config(Config(**options))))

        return check

    def assert_found(self, report, problem="", **expected):
        """PORT stands for the app's port.  `problem` is a part of the only problem; "" if there must be none."""
        found = {name: repr(getattr(report, name)).replace(str(report.port), "PORT") for name in expected}
        assert found == {name: repr(value) for name, value in expected.items()}
        assert [problem in text for text in report.problems] == [True] * bool(problem)

    def test_healthy_app_is_reported(self, check, upstream):
        page = "<title>My app</title><a href=there><img src='//elsewhere/a'><a href=https://a/b>"
        app = upstream(site({"/ws": SWITCHING, "*": page}))
        report = check(app.port)
        self.assert_found(
            report, ok=True, speaks="http", status=200, title="My app", redirect="", rooted=[],
            refuses_host=False, refuses_origin=False, socket="/ws", app="", flag="",
            use=["http://PORT.localhost:8888/", "http://localhost:8888/proxy/PORT/"],
        )  # fmt: skip
        if os.path.exists("/proc/net/tcp"):
            assert (report.addresses, bool(report.program)) == (("127.0.0.1",), True)
        for message in app.messages:  # an app could refuse a second Host or Connection
            names = [name.lower() for name, _ in message[1]]
            assert len(names) == len(set(names))
        assert {fields_of(message)["connection"] for message in app.messages} == {"close", "Upgrade"}

    @pytest.mark.parametrize("page", [
        "<script src='//[x'></script><title>ok</title>", "<title>&#" + "9" * 5000 + ";</title>",
        "<script" * 40000, "<a href=/" + "a" * 300000, "bokeh" * 60000,
        "<title>\x1b]0;x\x07</title><a href='/\x1b[31m'>",
    ], ids="script number scripts link name escapes".split())  # fmt: skip
    def test_hostile_page_neither_breaks_nor_delays_the_check(self, check, upstream, page):
        report = check(upstream(site({"*": page})).port)
        assert report.ok
        assert port_proxy.report_text(report).replace("\n", "").isprintable()

    def test_needs_of_an_app_are_reported(self, check, upstream):
        """The address of its own port is no problem: the libraries of a known app have defaults in them."""
        page = (
            "<script id=_dash-config></script><script src=\"/_dash/a.js?v=1\"></script><link href='/b.css'>"
            "<form action=/c><a href=/b.css><script src=shiny.js></script>ws://localhost:PORT/ws"
        )
        app = upstream(site({"/ws": SWITCHING, "/": "Location: /lab?x=secret", "*": page}, is_fussy=True))
        report, flag = check(app.port), 'url_base_pathname="/proxy/absolute/PORT/"'
        links = ["/_dash/a.js", "/b.css", "/c"]
        self.assert_found(
            report, "Add 127.0.0.1 to the trusted proxies", redirect="/lab", rooted=links, status=200, app="Dash",
            flag=flag, refuses_host=True, refuses_origin=True,
        )  # fmt: skip
        text = port_proxy.report_text(report).replace(str(app.port), "PORT")
        parts = (
            "port PORT of this machine\n", "  redirect       /lab\n", (17 * " ").join("%s\n" % link for link in links),
            "  refuses host   yes\n  refuses origin yes\n  websocket      /ws\n",
            "/proxy/PORT/\n  or             start it with %s and use /proxy/absolute/PORT/" % flag,
        )  # fmt: skip
        assert [part for part in parts if part not in text] == []

    @pytest.mark.parametrize("place, text, is_found", [("/", text, True) for text in (
        "new WebSocket('ws://localhost:PORT/ws')", "ws://[::1]:PORT/", "http://127.0.0.1:PORT",
        "?protocol=ws%3A&hostname=0.0.0.0&port=PORT&pathname=%2Fws",
    )] + [("/", text, False) for text in (
        "http://localhost:PORT0/", "http://localhost:1/ PORT", "http://elsewhere:PORT/", "http://PUBLIC/",
    )] + [("/a/main.js", "ws://[::]:PORT/ws", True), ("/a/main.js", "http://PUBLIC/", False)])
    def test_address_of_the_app_in_a_page_or_its_script_is_a_problem(self, check, upstream, place, text, is_found):
        """Only a browser on this machine can follow."""
        scripts = "<script src=//cdn.example/b.js></script><script defer src='a/main.js?v=1'></script>"
        app = upstream(site({"/": scripts + text * (place == "/"), "/a/main.js": text * (place != "/"), "*": ""}))
        problem = "%s contains an address with port %d" % (place, app.port) if is_found else ""
        self.assert_found(check(app.port), problem, ok=True)

    @pytest.mark.parametrize("pages, whole_origin, found, problem", [
        (dict({"/%s" % (at or ""): "Location: /%d" % (at + 1) for at in range(5)}, **{"/5": "<title>A</title>"}), True,
         {"redirect": "/5", "title": "A"}, ""),
        ({"/": "Location: /x", "/x": b""}, True, {"ok": False, "redirect": "/x"}, "No valid HTTP came from port PORT"),
        ({"*": b"HTTP/1.1 103 Early\r\nLink: <a>\r\n\r\n" + html_response(b"<title>A</title>")}, True,
         {"status": 200, "title": "A"}, ""),
        ({"*": html_response(b"", "401 No", "WWW-Authenticate: Digest realm=a")}, True,
         {"status": 401, "refuses_host": False}, "Use the app's own host"),
        (BELOW_ITS_BASE, False, NO_LINKS_LOST, ""),
        (dict(BELOW_ITS_BASE, **{"/": "Location: " + PREFIX_IN}), False, NO_LINKS_LOST, ""),
        (dict(BELOW_ITS_BASE, **{"/": BELOW_ITS_BASE[PREFIX_IN]}), False, NO_LINKS_LOST, ""),
        ({"*": "<img src=/a>"}, False, {"ok": True, "rooted": ["/a"]}, "--whole-origin yes"),
    ] + [({"*": "Location: " + location}, True, {"ok": True, "status": 302, "redirect": path}, problem)
         for location, path, problem in (
        ("x y?secret", "/x%20y", LOOPS), ("http://127.0.0.1:PORT#a", "/", LOOPS),
        ("http://localhost:8888/x", "/x", LOOPS),
        ("https://LOCALHOST:PORT", "https://localhost:PORT/", TO_TLS),
        ("http://localhost:1", "http://localhost:1/", ""), ("https://localhost:PORT0/", "https://localhost:PORT0/", ""),
        ("https://user:secret@sso.example/a#secret", "https://sso.example/a", ""),
        ("//user:secret@sso.example?secret", "http://sso.example/", ""), ("//[x", "", ""),
    )], ids=case_id)
    def test_site_is_reported(self, check, upstream, pages, whole_origin, found, problem):
        port = upstream(site(pages)).port
        report = check(port, whole_origin=whole_origin)
        self.assert_found(report, problem.replace("PORT", str(port)), **found)

    def test_upstream_that_cannot_be_used_is_a_problem(self, check, upstream, tls_app):
        ssh = upstream(lambda wire, app: (wire.send(b"SSH-2.0-x\r\n"), wire.more())).port
        plain, tls = upstream(lambda wire, app: (wire.more(), wire.send(OK))).port, tls_app.port
        with taken_port() as unused:
            for target, options, speaks, problem in (
                (unused, {}, "", "Nothing listens"), (ssh, {}, "", "No valid HTTP came from port %d" % ssh),
                (tls, {}, "https", "--upstream-tls %d" % tls),
                (tls, {"upstream_tls": (str(tls),)}, "", "Start the proxy with --insecure-upstream to"),
                (plain, {"upstream_tls": (str(plain),)}, "", "Does it speak TLS? See --upstream-tls."),
                ("nowhere.invalid:80", {"host_allowlist": ["nowhere.invalid"]}, "", "The host nowhere.invalid could"),
            ):
                report = check(target, **options)
                self.assert_found(report, problem, ok=False, speaks=speaks, use=[])
                assert problem in port_proxy.report_text(report)

    @pytest.mark.parametrize("path", ["/_stcore/stream", "/api/events/subscribe", "/_next/webpack-hmr", "/"])
    def test_websocket_of_a_known_app_is_found(self, check, upstream, path):
        self.assert_found(check(upstream(site({path: SWITCHING, "*": ""})).port), socket=path, refuses_origin=False)

    def test_app_that_speaks_tls_is_examined(self, check, tls_app):
        report = check(tls_app.port, upstream_tls=(str(tls_app.port),), insecure_upstream=True)
        self.assert_found(report, ok=True, speaks="https", status=200)

    def test_own_port_is_a_problem_at_its_own_address_alone(self, check, app):
        """The number alone does not tell: another program may have it at another address."""
        for bind in ("127.0.0.1", "0.0.0.0", "", "LOCALHOST", "127.1"):
            report = check(app.port, port=app.port, bind=bind)
            assert (report.ok, report.use, app.messages) == (False, [], [])
            assert re.match("Port %d is the proxy's own: .* set the proxy's port" % app.port, report.problems[0])
        for bind in ("unix:/a", "127.0.0.5", "nowhere.invalid", "a..b"):
            assert check(app.port, port=app.port, bind=bind).ok

    @needs_proc
    def test_app_at_another_address_is_examined_there(self, check, upstream):
        port = upstream(site({"/ws": SWITCHING, "*": "http://127.0.0.2:0/"}), host="127.0.0.2").port
        self.assert_found(check(port), "listens on 127.0.0.2 only", ok=False, addresses=("127.0.0.2",))
        self.assert_found(check("127.0.0.2:%d" % port), "--host-allowlist 127.0.0.2", ok=False, use=[])
        report = check("127.0.0.2:%d" % port, host_allowlist=("127.0.0.2",))
        address = "http://localhost:8888/proxy/127.0.0.2:PORT/"
        self.assert_found(report, ok=True, use=[address], addresses=("127.0.0.2",), socket="/ws")

    def test_command_prints_the_report(self, upstream, capsys):
        app = upstream(site({"*": "<title>\u017c\U0001f600</title>"}))
        ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
        with contextlib.redirect_stdout(ascii_only):
            assert port_proxy.main(["--check", str(app.port)]) == 0
        text = ascii_only.buffer.getvalue().decode()
        assert text.startswith("port %d of this machine\n" % app.port)
        assert "\\u017c\\U0001f600" in text
        for port, use in (
            ("8888", ["http://%d.localhost:8888/", "http://localhost:8888/x/%d/"]),
            ("0", ["/x/%d/"]),  # the proxy's port is not known yet
        ):
            options = ("--json", "--base", "/x", "--port", port)
            status, output, _ = run_main(capsys, "--check", "localhost:%d" % app.port, *options)
            assert (status, json.loads(output)["use"]) == (0, [address % app.port for address in use])
        status, output, _ = run_main(capsys, "--check", str(free_port()), "--json")
        assert (status, json.loads(output)["ok"]) == (1, False)


# ------ Command line -------------------------------------------------------------------------------------------------


ENVIRONMENT = dict(os.environ, SSH_CONNECTION="", PYTHONPATH=str(HERE))
MODULE = (sys.executable, "-m", "port_proxy")
DEVELOPMENT = MODULE if sys.version_info < (3, 7) else (sys.executable, "-X", "dev") + MODULE[1:]
SLOW_STEP = r"(?m)^.* Executing <.*> took [0-9.]+ seconds\n"  # asyncio logs it on a busy machine, with -X dev


@contextlib.contextmanager
def program(*options, command=DEVELOPMENT, place=("--port", "0"), tolerated="", **popen):
    """Start the program: (process, first line, port). It must end well, and write no other lines on stderr."""
    popen = dict({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}, **popen)
    with spawn(list(command) + ["--allow-hostname", "here"] + list(place + options), **popen) as process:
        banner = line_of(process, process.stdout or process.stderr)
        port = re.search(r":(\d+)/", banner)
        yield process, banner, int(port.group(1)) if port else 0
        process.terminate()
        errors = process.communicate(timeout=WAIT)[1].decode()
        assert re.sub(tolerated, "", re.sub(SLOW_STEP, "", errors)) == ""
        assert process.returncode == 0


def run_main(capsys, *options):
    """Run a command line that fails or only prints, in this process: (exit status, stdout, stderr)."""
    try:
        status = port_proxy.main(list(options))
    except SystemExit as error:
        status = error.code
    output, errors = capsys.readouterr()
    assert "Traceback" not in errors
    return status, output, errors


def banner_of(*options):
    """What the program prints when it starts: (stdout, stderr).  It runs in this process until its first line."""

    class Output(io.StringIO):
        encoding = None

        def flush(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.redirect_stdout(Output()) as output, contextlib.redirect_stderr(Output()) as errors:
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.getsignal(number))
            assert port_proxy.main(["--port", "0"] + list(options)) == 0
    return output.getvalue(), errors.getvalue()


def hub_environment(port=1, **changes):
    """What a Hub sets for a server that is to listen on this port, with these changes."""
    names = {
        "SERVICE_URL": "http://127.0.0.1:%d/jh/user/al@ice.x%%2By/" % port,
        "SERVICE_PREFIX": "/jh/user/al@ice.x%2By/",
        "API_URL": "http://127.0.0.1:1/jh/hub/api",
        "API_TOKEN": "server-token",
        "CLIENT_ID": "jupyterhub-user-al%40ice.x%2By",
        "OAUTH_CALLBACK_URL": "/jh/user/al@ice.x%2By/oauth_callback",
        "OAUTH_ACCESS_SCOPES": '["access:servers!server=al@ice.x+y/", "access:servers!user=al@ice.x+y"]',
        "BASE_URL": "/jh/",
        "USER": "al@ice.x+y",
    }
    return {"JUPYTERHUB_" + name: value for name, value in dict(names, **changes).items()}


class TestCommandLine:
    def test_hangup_ends_no_program_that_ignores_it(self, app):
        """`nohup` makes it do so."""
        how = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
        with program("--base", "/user/ana", **how) as (process, _, port), Wire.to(port) as wire:
            process.send_signal(signal.SIGHUP)
            assert wire.ask(to(app, form="/user/ana/%d"))[2] == b"ok"

    def test_interrupted_check_does_not_report_success(self, upstream):
        app = upstream(script(read_head, tell, hold))
        with spawn(MODULE + ("--check", str(app.port)), stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
            assert app.told.wait(WAIT)
            process.send_signal(signal.SIGINT)
            assert (process.wait(WAIT), process.stdout.read()) == (130, b"")

    @pytest.mark.parametrize("stdout", ["a pipe", "a broken pipe", "closed"])
    def test_second_signal_ends_a_running_request(self, upstream, stdout):
        """After the first one, the program says what it waits for. If stdout fails, stderr gets all lines."""
        app, (reader, writer) = upstream(script(read_message, tell, hold)), os.pipe()
        os.close(reader)
        how = {"stdout": subprocess.PIPE if stdout == "a pipe" else writer}
        if stdout == "closed":
            how["preexec_fn"] = lambda: os.close(1)
        how["command"] = MODULE  # in asyncio's debug mode, slow steps are told on stderr, too
        with program("--token", "--shutdown-timeout", "1000", **how) as (process, banner, port), Wire.to(port) as wire:
            os.close(writer)
            output = process.stdout or process.stderr
            token = re.search(r"open http://localhost:\d+/proxy/\?token=(\S+)\n", banner).group(1)
            assert line_of(process, output).startswith("It reaches every port")
            wire.send(to(app, "Authorization: token " + token))
            assert app.told.wait(WAIT)
            process.send_signal(signal.SIGHUP)
            waiting = "waiting up to 1000 seconds for running requests (1), Ctrl-C ends them now\n"
            assert waiting in line_of(process, output)
            process.send_signal(signal.SIGINT)
            assert wire.ends()
            assert process.wait(WAIT) == 0

    SSH = {"SSH_CONNECTION": "198.51.100.7 40000 192.0.2.7 22"}
    TOKEN_REQUIRED = r".*/proxy/\n.*\nIt requires the token that you set\."

    @pytest.mark.parametrize("environment, options, lines", [
        ({}, "--domain d --no-token",
         r".*: open (http://localhost:\d+/proxy/)\nIt reaches .* \1<port>/ or http://<port>\.localhost:\d+/"),
        ({"SSH_CONNECTION": "x"}, "--token", r".*: open http://localhost:\d+/proxy/\?token=\S{32,}\n.*"),
        ({}, "--token --quiet", r".*\?token=\S+\n.*"), ({}, "--bind 0.0.0.0 --quiet", r".*\?token=\S+\n.*"),
        # A given token is not printed: the output may end in a log.
        ({"PORT_PROXY_TOKEN": TOKEN}, "", TOKEN_REQUIRED), ({}, "--token-file token", TOKEN_REQUIRED),
        (SSH, "",
         r".*: on your own machine, run  ssh -N -L (\d+):localhost:\1 ana@192\.0\.2\.7\n"
         r"and open http://localhost:\1/proxy/\nIt reaches .*"),
        (SSH, "--bind 0.0.0.0",
         r".*ssh -N -L (\d+):localhost:\1 ana@192\.0\.2\.7\nand open http://localhost:\1/proxy/\?token=\S+\n.*"),
        pytest.param(
            SSH, "--bind 127.0.0.2",
            r".*ssh -N -L (\d+):127\.0\.0\.2:\1 ana@192\.0\.2\.7\nand open http://localhost:\1/proxy/\n.*",
            marks=needs_proc,  # other systems have no such address
        ),
        ({"SSH_CONNECTION": "2001:db8::1 40000 2001:db8::7 2222"}, "--bind 127.0.0.1",
         r".*ssh -N -L (\d+):localhost:\1 -p 2222 ana@2001:db8::7\n.*\n.*"),
        (hub_environment(), "", r".*: open http://localhost:\d+/proxy/\n.*"),  # with a port of its own, as here
        ({}, "--bind unix:proxy", r".* ssh -N -L 8888:/.+/proxy \S+\nand open http://localhost:8888/proxy/\n.*"),
    ])  # fmt: skip
    def test_banner_says_how_to_reach_the_proxy(self, monkeypatch, tmp_path, environment, options, lines):
        monkeypatch.chdir(str(tmp_path))
        (tmp_path / "token").write_text(TOKEN + "\n")
        for name, value in dict({"SSH_CONNECTION": "", "LOGNAME": "ana"}, **environment).items():
            monkeypatch.setenv(name, value)
        output, errors = banner_of(*options.split())
        assert re.fullmatch(lines + "\n", output)
        assert (TOKEN in output, errors, "PORT_PROXY_TOKEN" in os.environ) == (False, "", False)

    @pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
    @pytest.mark.parametrize("kind, status", [
        ("tcp", 200), ("unix", 200), pytest.param("abstract", 401, marks=needs_proc),
    ])  # fmt: skip
    def test_banner_names_an_inherited_socket(self, tmp_path, kind, status):
        """As systemd passes it: descriptor 3, and LISTEN_PID names this process."""
        path, is_unix = str(tmp_path / "socket") if kind == "unix" else "\0" + str(tmp_path), kind != "tcp"
        with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as listener:
            listener.bind(path if is_unix else ("127.0.0.1", 0))
            place = "-L 8888:%s " % path if is_unix else "http://localhost:%d/proxy/\n" % listener.getsockname()[1]
            if kind == "unix":
                os.chmod(path, 0o600)
            elif kind == "abstract":
                place = ": connect to unix:@%s and open http://localhost/proxy/?token=" % tmp_path
            command = ["sh", "-c", 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"', sys.executable, PROGRAM]
            how = {"preexec_fn": lambda: os.dup2(listener.fileno(), 3), "pass_fds": [3]}
            with program(command=command, **how) as (_, banner, port):
                assert place in banner
                with Wire.to_unix(path) if is_unix else Wire.to(port) as wire:
                    assert status_of(wire.ask(at("localhost", "GET", "/proxy/"))) == status

    @pytest.mark.skipif(os.name != "posix", reason="systemd passes sockets on Linux")
    def test_inherited_file_that_is_not_a_socket_is_reported(self):
        command = ["sh", "-c", 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@" 3</dev/null', sys.executable, PROGRAM]
        with spawn(command, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
            errors = process.communicate(timeout=WAIT)[1]
        assert (process.returncode, errors.startswith(b"port_proxy: cannot listen on ")) == (2, True)

    @pytest.mark.parametrize("options, message", [
        ("--port x", "port_proxy: --port must be a number from 0 to"), ("--head-timeout x", "must be a number above 0"),
        ("--host-allowlist a+b", "--host-allowlist: a host is a name, an address or a pattern"),
        ("--bind 192.0.2.1", "; choose another --bind or --port"),
        ("--bind nowhere.invalid", "cannot listen on port 8888 of nowhere.invalid: "),
        ("--bind a..b", "cannot listen on port 8888 of a..b: "),
        ("--bind unix:/nowhere/at/all", "cannot listen on unix:/nowhere/at/all"),
        ("--token-file " + sys.executable, "the token must consist of visible ASCII"),
        ("--token-file /nowhere", "cannot read /nowhere: No such file"),
        ("--token-file /dev/null", "there is no token in /dev/null"),
        ("--verbose --quiet", "not allowed with"), ("--whole-origin maybe", "--whole-origin must be yes or no"),
        ("--json", "type --check PORT --json"), ("--port", "argument --port: expected one argument"),
        ("--head-timeout x --head-timeout=1 --check=", "an upstream is PORT or HOST:PORT, not ''"),  # the last counts
        ("--upstream-tls=1,x --upstream-tls 2", "an upstream is PORT or HOST:PORT, not 'x'"),  # all values count
        ("--frob", "there is no option --frob; see --help"), ("--prot 1", "no option --prot; did you mean --port?"),
        ("8080", "a value needs its option, such as --port N, --check N or --token-file FILE."),
        ("--token abc", "a value needs its option"), ("--token=-abc", "a value needs its option"),
        ("--token -abc", "a value needs its option"), ("--tokn=abc", "no option --tokn; did you mean --token?"),
    ])  # fmt: skip
    def test_mistake_is_reported_in_the_last_line(self, capsys, options, message):
        status, output, errors = run_main(capsys, *options.split())
        assert (status, output) == (2, "")
        assert message in errors.strip().split("\n")[-1]
        assert "abc" not in errors

    @needs_proc
    def test_port_in_use_names_its_program_and_a_command_that_works(self, capsys):
        for bind, place, quoted in (("127.0.0.1",) * 3, ("", "this machine", "''")):
            with taken_port(listens=True) as port:
                status, output, errors = run_main(capsys, "--port=%d" % port, "--base", "/(b)", "--bind", bind)
            assert (status, output) == (2, "")
            pattern = r"port_proxy: port %d of %s is in use by .+ \(process %d\)\. .*:\n"
            pattern += r"  python3 port_proxy\.py --base '/\(b\)' --bind %s --port 0\n"
            assert re.fullmatch(pattern % (port, place, os.getpid(), quoted), errors)

    @pytest.mark.parametrize("path, command", [
        ("/opt/bin/port-proxy", "port-proxy"), ("/srv/port_proxy.py", "python3 port_proxy.py"),
    ])  # fmt: skip
    def test_help_fits_on_two_screens_without_limits(self, capsys, monkeypatch, path, command):
        monkeypatch.setattr(sys, "argv", [path])
        status, output, _ = run_main(capsys, "--help")
        assert (status, output.startswith("usage: %s [options]\n" % command)) == (0, True)
        assert "\n  %s --check 8080 " % command in output
        assert "\n  ssh -N -L 8888:" in output
        flags = {*port_proxy.METAVARS, "--version", "--help", "--help-all"}.difference(LIMIT_FLAGS)
        assert set(re.findall("--[a-z-]+", output)) == flags
        lines = output.rstrip("\n").split("\n")
        assert len(lines) <= 48
        assert max(map(len, lines)) <= 100

    def test_whole_help_has_every_limit_with_its_default(self, capsys):
        status, output, _ = run_main(capsys, "--help-all")
        assert status == 0
        assert len(LIMITS) == len(LIMIT_FLAGS)
        for field in LIMITS:
            flag = port_proxy.FLAGS[field]
            row = r"%s %s\s+[a-zA-Z0-9 ]+ \(default: ([0-9.]+)\)\n" % (flag, LIMIT_FLAGS[flag])
            assert float(re.search(row, output).group(1)) == getattr(DEFAULT, field)

    def test_version_is_printed(self, capsys):
        assert run_main(capsys, "--version")[:2] == (0, "port_proxy %s\n" % port_proxy.__version__)

    def test_public_address_without_a_token_is_warned_of(self):
        output, errors = banner_of("--no-token", "--bind", "0.0.0.0", "--quiet")
        assert (output, "no token is required" in errors) == ("", True)

    def test_mistake_without_stderr_still_sets_the_exit_status(self):
        pytest.importorskip("resource")  # and so no Windows
        command = [sys.executable, PROGRAM, "--bind", "192.0.2.1"]
        done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2), timeout=WAIT)
        assert (done.returncode, done.stdout) == (2, b"")

    @pytest.mark.parametrize("options", [("--verbose",), ("--log-json",), ("--verbose", "--log-json")])
    def test_log_has_a_line_per_request_and_per_message(self, app, options):
        """Control characters are escaped: behind a trusted proxy, the client chooses its address."""
        client, options = "\x9b31m\x85a", options + ("--trusted-proxy", "127.0.0.1")
        with program(*options, command=MODULE) as (process, _, port), Wire.to(port) as wire:
            assert wire.ask(to(app, "X-Forwarded-For: " + client, path="/a?secret"))[2] == b"ok"
            line = line_of(process, process.stderr)
            assert status_of(wire.ask(b"GARBAGE\r\n\r\n")) == 400  # no request: a message without its parts
            message = line_of(process, process.stderr)
        assert line[:-1].isprintable()
        assert "127.0.0.1 -> 400: " in message
        target, upstream_name = "/proxy/%d/a?..." % app.port, "localhost:%d" % app.port
        if "--log-json" not in options:
            expected = r"\\x9b31m\\x85a GET %s -> %s 200, 2 bytes sent, 0 received, [0-9.]+ s\n"
            assert re.search(expected % (re.escape(target), upstream_name), line)
            return
        record, message = json.loads(line), json.loads(message)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
        assert 0 <= record.pop("seconds") < WAIT
        assert record == {
            "level": "info", "client": client, "method": "GET", "target": target, "app": upstream_name, "status": 200,
            "bytes": 2, "bytes_received": 0,
        }  # fmt: skip
        assert (sorted(message), message["level"]) == (["level", "message", "time"], "info")

    def test_stop_with_everything_under_way_is_quiet(self, upstream):
        """With requests, uploads, tunnels and half heads the exit status is 0, and nothing is logged."""
        app = upstream(in_turn(*[script(read_head, hold), script(read_head, SWITCHING, hold)] * 5))
        with contextlib.ExitStack() as stack, program("--shutdown-timeout", "0.2") as (_, _, port):
            for number in range(12):
                lines = HANDSHAKE if number % 2 else ("Content-Length: 10",)
                data = to(app, *lines, body=b"abc")
                stack.enter_context(Wire.to(port)).send(data[: 20 if number % 5 == 0 else None])
            eventually(lambda: app.connections == 9)

    def test_limit_of_descriptors_is_never_lowered(self, capsys, monkeypatch):
        """Here a high one, without a hard limit, as on macOS."""
        resource = pytest.importorskip("resource")
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (100000, resource.RLIM_INFINITY))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: pytest.fail("limits of %r" % (limits,)))
        assert run_main(capsys, "--check", str(free_port()))[0] == 1

    def test_running_out_of_descriptors_only_delays(self, app):
        resource = pytest.importorskip("resource")
        how = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))}
        with program(tolerated=".* out of system resource: .*\n", **how) as (_, _, port):
            for wire in [Wire.to(port) for _ in range(80)]:
                wire.close()
            assert ProxyAt(port).get("/proxy/%d/" % app.port)[2] == b"ok"


class TestUnderAHub:
    @pytest.mark.parametrize("changes, field, value", [  # an empty text: as if it were not set
        ({"HOST": ""}, "authorize_url", "/jh/hub/api/oauth2/authorize"), ({"HOST": ""}, "cookie_options", ()),
        ({"HOST": "https://hub.example"}, "authorize_url", "https://hub.example/jh/hub/api/oauth2/authorize"),
        ({"OAUTH_CALLBACK_URL": ""}, "callback_url", PREFIX + "/oauth_callback"), ({"HOST": ""}, "prefix", PREFIX),
        ({"OAUTH_ACCESS_SCOPES": '["a", "b"]'}, "access_scopes", {"a", "b"}),
        ({"OAUTH_ACCESS_SCOPES": "", "OAUTH_SCOPES": '["a"]'}, "access_scopes", {"a"}),  # before JupyterHub 3
        ({"PUBLIC_URL": "https://hub.example/jh/user/a/"}, "cookie_options", (("Secure", ""),)),
        ({"COOKIE_HOST_PREFIX_ENABLED": ""}, "host_cookies", False), ({"SERVER_NAME": "x"}, "server_name", "x"),
        ({"COOKIE_HOST_PREFIX_ENABLED": "1"}, "host_cookies", True), ({"DEFAULT_URL": ""}, "home", ""),
        ({"ACTIVITY_INTERVAL": ""}, "activity_interval", 300), ({"ACTIVITY_INTERVAL": "60"}, "activity_interval", 60),
        ({"DEFAULT_URL": "//?x#y"}, "home", ""), ({"DEFAULT_URL": "proxy/1/?a=b"}, "home", PREFIX + "/proxy/1/?a=b"),
        ({"DEFAULT_URL": "//evil.example/a b\u00e9%2F#/x"}, "home", PREFIX + "/evil.example/a%20b%C3%A9%2F#/x"),
        ({"COOKIE_OPTIONS": '{"SameSite": "None", "Secure": true, "expires_days": null}'}, "cookie_options",
         (("SameSite", "None"), ("Secure", ""))),
        ({"COOKIE_OPTIONS": '{"expires_days": 0.5, "path": "/evil", "secure": false}'}, "cookie_options",
         (("Max-Age", "43200"),)),
    ], ids=case_id)  # fmt: skip
    def test_variable_sets_its_field(self, changes, field, value):
        assert getattr(port_proxy.hub_in(hub_environment(**changes)), field) == value

    @pytest.mark.parametrize("changes, options, message", [
        ({}, "--no-token", "remove --no-token"), ({}, "--token", "remove --token"), ({}, "--certfile x", "--certfile"),
        ({}, "--shutdown-timeout x", "--shutdown-timeout must be a number above 0"),
        ({"SERVICE_URL": "unix:/a"}, "", "JUPYTERHUB_SERVICE_URL is not valid: unix:/a"),
        ({"COOKIE_OPTIONS": "["}, "", "JUPYTERHUB_COOKIE_OPTIONS"), ({"API_URL": "unix://a"}, "", "JUPYTERHUB_API_URL"),
        ({"OAUTH_ACCESS_SCOPES": "7"}, "", "JUPYTERHUB_OAUTH_ACCESS_SCOPES"),
        ({"ACTIVITY_INTERVAL": "x"}, "", "JUPYTERHUB_ACTIVITY_INTERVAL"),
        ({"ACTIVITY_URL": "x"}, "", "JUPYTERHUB_ACTIVITY_URL"), ({"API_URL": "http://a:x/"}, "", "JUPYTERHUB_API_URL"),
        ({"COOKIE_OPTIONS": '{"domain": "a; Path=/"}'}, "", "JUPYTERHUB_COOKIE_OPTIONS"),
    ] + [
        ({name: ""}, "", "JUPYTERHUB_%s is not set" % name)
        for name in ("OAUTH_ACCESS_SCOPES", "SERVICE_PREFIX", "API_URL", "API_TOKEN", "CLIENT_ID")
    ], ids=case_id)  # fmt: skip
    def test_mistake_is_reported_without_the_secret(self, monkeypatch, capsys, changes, options, message):
        monkeypatch.setattr(os, "environ", dict(os.environ, **hub_environment(**changes)))
        status, output, errors = run_main(capsys, *options.split())
        assert (status, output) == (2, "")
        assert message in errors.strip().split("\n")[-1]
        assert "server-token" not in errors

    @pytest.mark.parametrize("url, place, address", [
        ("http://:%d/", "port %d of 0.0.0.0 is in use", "127.0.0.2"),
        ("http://127.0.0.1:%d/", "port %d of 127.0.0.1 is in use", "127.0.0.1"),
        ("http://[::1]:%d/", "port %d of ::1 is in use", "::1"), ("https://192.0.2.1/", "port 443 of 192.0.2.1", ""),
    ])  # fmt: skip
    def test_program_listens_at_the_address_of_the_service(self, monkeypatch, capsys, url, place, address):
        """A URL without a host means every address. A terminal has the same environment, and needs another port."""
        with taken_port(address or "127.0.0.1", listens=True) as port:
            environment = hub_environment(SERVICE_URL=url.replace("%d", str(port)))
            monkeypatch.setattr(os, "environ", dict(os.environ, **environment))
            status, _, errors = run_main(capsys)
        assert (status, place.replace("%d", str(port)) in errors, "--port" in errors) == (2, True, True)

    def test_program_serves_pages_and_stops_at_once(self, upstream):
        """The Hub, and the user who clicked, wait for a server that stops; it does not wait for requests."""
        hub = upstream(HubBehindWire())
        app = upstream(script(read_head, tell, hold))
        port, target = free_port(), "%s/ports/%d/" % (PREFIX, app.port)
        env = dict(ENVIRONMENT, **hub_environment(port, API_URL="http://127.0.0.1:%d/hub/api" % hub.port))
        with program("--base", "/ports", "--shutdown-timeout", "600", place=(), env=env) as (_, banner, _):
            assert PREFIX + "/ports/<port>/, for al@ice.x+y" in banner
            assert place_of(ProxyAt(port).get(target, *VISIT)).startswith("/jh/hub/api/oauth2/authorize?")
            assert status_of(ProxyAt(port).get(target)) == 403
            wire = Wire.to(port)
            wire.send(request("GET", target, AS_OWNER))
            assert app.told.wait(WAIT)
        wire.close()  # only now: the request is under way while the program stops


# ------ Chromium: what a person sees and clicks ----------------------------------------------------------------------


class Page:
    """A page in Chromium, used as a person does, with cookies of its own or those of `beside` (DevTools protocol)."""

    def __init__(self, browser, beside=None):
        self.browser, self.count, self.session, self.complaints = browser, 0, {}, []
        self.context = beside.context if beside else self.do("Target.createBrowserContext")["browserContextId"]
        target = self.do("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.do(domain + ".enable")
        # Timers of pages run ten times as fast.
        faster = "{ const real = setTimeout; window.setTimeout = (call, ms) => real(call, ms / 10) }"
        self.do("Page.addScriptToEvaluateOnNewDocument", source=faster)

    def do(self, method, **parameters):
        self.count += 1
        order = dict(self.session, id=self.count, method=method, params=parameters)
        self.browser.send(json.dumps(order).encode() + b"\0")
        while True:
            told = json.loads(self.browser.until(b"\0")[:-1].decode())
            if told.get("id") == self.count:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            entry = told.get("params", {}).get("entry", {})
            is_error = entry.get("level") == "error" and entry.get("source") != "network"
            if is_error or told.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(told["params"])

    def tell(self, expression):
        """The value of an expression, in which $ and $$ find elements."""
        how = {"returnByValue": True, "awaitPromise": True, "includeCommandLineAPI": True}
        return self.do("Runtime.evaluate", expression=expression, **how)["result"].get("value")

    def until(self, expression, limit=WAIT):
        """Wait for what a person would see; while another page is loading, all questions fail."""
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(AssertionError):
                value = self.tell("try { %s } catch (error) { false }" % expression)
                if value:
                    return value
            seen = "location.href + ' ' + document.documentElement.innerText"
            assert time.monotonic() < end, "never %s, but %s" % (expression, self.tell(seen))
            time.sleep(0.05)

    def open(self, url):
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def shows(self, text, selector="#app"):
        """Wait until an element, by default the content of `serve_page`, has this text."""
        self.until("$(%s).innerText === %s" % (json.dumps(selector), json.dumps(text)))

    def click(self, selector):
        find = "$(%s)" % json.dumps(selector)
        self.until("!!" + find)
        self.tell(find + ".scrollIntoView({block: 'center'})")
        box = self.tell(find + ".getBoundingClientRect().toJSON()")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key):
        code, text = {"Enter": (13, "\r"), "Tab": (9, "")}[key]
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)
            text = ""

    def type(self, text):
        self.do("Input.insertText", text=text)

    def close(self):
        self.session = {}
        self.do("Target.disposeBrowserContext", browserContextId=self.context)


def serve_page(text):
    """An app whose every path is one page, with this text as its title and content."""
    return answering(html_response(b"<!DOCTYPE html><title>%s</title><p id=app>%s" % (text, text)))


# Every way that a page has to ask for things: below the root, which leaves the prefix, or below its own folder.
APP_PAGE = b"""<!DOCTYPE html><title>NAME</title><link rel=stylesheet href=ROOTstyle.css>
<body><form method=post action=ROOTform><button>send</button></form><script>
const report = {path: location.pathname, cookie: document.cookie}
async function look() {
  report.style = getComputedStyle(document.body).color
  report.fetch = await (await fetch('ROOTdata?x=%2F')).text()
  report.quiet = await (await fetch('ROOTdata?quiet', {referrerPolicy: 'no-referrer'})).text()
  report.upload = await (await fetch('ROOTupload', {method: 'PUT', body: new Uint8Array(300000)})).text()
  report.events = await new Promise(done => { const got = [], source = new EventSource('ROOTevents')
    source.onmessage = event => { got.push(event.data); if (got.length == 3) { source.close(); done(got) } } })
  report.module = (await import('ROOTmodule.js')).name
  report.worker = await new Promise(done => { new Worker('ROOTworker.js').onmessage = event => done(event.data) })
  report.frame = await new Promise(done => { const frame = document.createElement('iframe'); frame.src = 'ROOTframe'
    frame.onload = () => done(frame.contentDocument.body.innerText); document.body.append(frame) })
  const register = how => navigator.serviceWorker.register('ROOTservice.js', how)
    .then(() => 'NAME', error => error.name)
  report.services = [await register({scope: './'}), await register({scope: '/'})]
  const socket = new WebSocket(new URL('ROOTsocket', location).href.replace('http', 'ws'))
  report.socket = await new Promise(done => { socket.onopen = () => socket.send('NAME')
    socket.onmessage = event => done(event.data); socket.onclose = () => done('closed') })
  document.body.dataset.report = JSON.stringify(report)
}
look()
</script>"""


def app_report(name, path):
    """What `APP_PAGE` must report."""
    return {
        "path": path, "cookie": "", "style": "rgb(1, 2, 3)", "fetch": name, "quiet": name, "upload": "300000",
        "events": ["1", "2", "3"], "module": name, "worker": name, "frame": name, "services": [name, "SecurityError"],
        "socket": name,
    }


def serve_app_page(name, root):
    """An app with `APP_PAGE` and all that it asks for."""
    contents = {
        "/": ("html", APP_PAGE), "/style.css": ("css", b"body { color: rgb(1, 2, 3) }"),
        "/events": ("event-stream", b"data: 1\n\ndata: 2\n\ndata: 3\n\n"),
        "/module.js": ("javascript", b"export const name = 'NAME'"), "/service.js": ("javascript", b"// NAME"),
        "/worker.js": ("javascript", b"fetch('ROOTdata').then(answer => answer.text()).then(postMessage)"),
        "/upload": ("plain", b"SIZE"), "/form": ("html", b"<p id=app>form of NAME: SIZE"),
    }  # fmt: skip
    cookie = "Set-Cookie: session=%s; Path=/; HttpOnly" % name.decode()

    def serve(wire, app):
        with contextlib.suppress(OSError, IndexError, ValueError):  # a browser leaves as it likes
            while wire.buffer or wire.more():
                read_message(wire, app)
                line, _, sent = app.messages[-1]
                path, fields = line.split(" ")[1], fields_of(app.messages[-1])
                if "upgrade" in fields:
                    key = fields["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
                    accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
                    wire.send(SWITCHING.partition(b"Sec-")[0] + b"Sec-WebSocket-Accept: %s\r\n\r\n" % accept)
                    (_, length), mask = wire.exactly(2), wire.exactly(4)
                    text = [octet ^ mask[at % 4] for at, octet in enumerate(wire.exactly(length & 127))]
                    wire.send(bytes([0x81, len(text)] + text))
                    wire.rest()
                    return
                kind, body = contents.get(path, ("plain", b"NAME"))
                for mark, value in ((b"NAME", name), (b"ROOT", root), (b"SIZE", b"%d" % len(sent))):
                    body = body.replace(mark, value)
                wire.send(ok(body, "Content-Type: text/" + kind, cookie))

    return serve


@pytest.fixture(scope="class")
def browser():
    """A connection to headless Chromium, which has a profile of its own."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium is installed")
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as profile, Wire(ours) as wire, theirs:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--ignore-certificate-errors", "--user-data-dir=" + profile, "--remote-debugging-pipe", "about:blank",
        ]
        how = {"env": dict(os.environ, TMPDIR=profile), "start_new_session": True, "stderr": subprocess.DEVNULL}
        how.update(pass_fds=[3, 4], preexec_fn=lambda: [os.dup2(theirs.fileno(), number) for number in (3, 4)])
        with spawn(command, stdout=subprocess.DEVNULL, **how) as process:
            yield wire
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def page(browser):
    page = Page(browser)
    yield page
    page.close()
    assert page.complaints == []


class TestInChromium:
    @needs_proc
    def test_ports_page_leads_to_the_apps(self, page, start, upstream):
        """From the banner's address to an app's own host, signed in all the way; then what comes and goes."""
        apps = [upstream(serve_page(b"app %d" % number)) for number in range(8)]
        proxy = start(token=TOKEN, allow_hostnames=())
        home = "http://localhost:%d/proxy/" % proxy.port
        page.open(home + "?token=" + TOKEN)
        page.until("location.href === %s" % json.dumps(home))
        for app in apps:
            assert page.tell("$('#p%d .port').innerText" % app.port) == str(app.port)
        for number, selector, address in (
            (0, "#p%d .port", "http://%d.localhost:" + "%d/" % proxy.port),
            (1, "#p%d a[href*=absolute]", home + "absolute/%d/"),
        ):  # fmt: skip
            page.click(selector % apps[number].port)
            page.shows("app %d" % number)
            assert page.tell("location.href") == address % apps[number].port
            page.open(home)
        page.until("$('#p%d').innerText.includes('app 0')" % apps[0].port)  # its title, by now
        page.click("#filter")
        clear = "$('#filter').value = ''; $('#filter').dispatchEvent(new Event('input'))"
        page.type("app 0")
        page.until("$$('.ports li').filter(one => !one.hidden).length === 1")
        page.tell(clear)
        page.type("base path")  # which every line has, in the name of a link
        page.until("!$('#none').hidden && $('#none').innerText.startsWith('No port to show.')")
        page.tell(clear)
        assert page.tell("$('#none').hidden")
        new = upstream(serve_page(b"new"))
        page.until("!!$('#p%d')" % new.port)
        assert re.match("(New|Gone): port [0-9]+", page.tell("$('[role=status]').innerText"))
        new.close()
        page.until("$('#p%d').className === 'gone'" % new.port)
        page.until("!$('#p%d')" % new.port)
        page.click("input[name=port]")
        page.type("localhost:%d" % apps[2].port)
        page.press("Enter")
        page.shows("app 2")
        assert page.tell("location.pathname") == "/proxy/%d/" % apps[2].port
        seen = repr([app.messages for app in apps])
        assert [text for text in (TOKEN, "ticket", "port_proxy_") if text in seen] == []

    @needs_proc
    def test_ports_page_tells_that_the_proxy_is_away(self, page, proxy):
        page.open("http://localhost:%d/proxy/" % proxy.port)
        text = "This list is out of date. Is the proxy running? Reload the page."
        for result in ("Promise.reject('away')", "Promise.resolve(new Response('', {status: 502}))"):
            for answer, notice in ((result, text), ("Promise.resolve(new Response(document.body.outerHTML))", "")):
                page.tell("fetch = () => " + answer)
                page.shows(notice, "[role=status]")

    @needs_proc
    def test_ports_page_works_by_keyboard_and_without_script(self, page, proxy, upstream):
        app = upstream(serve_page(b"the app"))
        page.do("Emulation.setScriptExecutionDisabled", value=True)
        page.open("http://localhost:%d/proxy/" % proxy.port)
        page.tell("$('#p%d .port').focus()" % app.port)
        page.press("Tab")
        assert page.tell("document.activeElement.getAttribute('aria-label')") == "port %d, Open" % app.port
        page.press("Tab")
        page.press("Enter")
        page.shows("the app")
        assert page.tell("location.pathname") == "/proxy/%d/" % app.port

    @pytest.mark.parametrize("form, script", [
        ("http://localhost:{proxy}/proxy/{app}/a?b", True), ("http://{app}.localhost:{proxy}/a?b", True),
        ("http://localhost:{proxy}/proxy/{app}/a?b", False),
    ])  # fmt: skip
    def test_waiting_page_helps_and_opens_the_app_once_it_is_up(self, page, proxy, upstream, form, script):
        port = free_port()
        page.do("Emulation.setScriptExecutionDisabled", value=not script)
        page.open(form.format(app=port, proxy=proxy.port))
        assert page.tell("$('h1').innerText") == "Waiting for port %d" % port
        assert "--check %d" % port in page.tell("$('li code').innerText")
        upstream(serve_page(b"here"), port=port)
        page.shows("here")

    @pytest.mark.parametrize("host", [False, True])
    def test_sign_in_page_leads_to_the_app(self, page, start, upstream, host):
        """Also if the app redirects to another site."""
        elsewhere = upstream(serve_page(b"signed in"))
        location = "http://127.0.0.1:%d/" % elsewhere.port
        redirect = answering(html_response(b"", "302 Found", "Location: " + location))
        app, proxy = elsewhere if host else upstream(redirect), start(token=TOKEN)
        form = "http://{app}.localhost:{proxy}/a?b" if host else "http://localhost:{proxy}/proxy/{app}/a?b"
        url = form.format(app=app.port, proxy=proxy.port)
        page.open(url)
        if host:  # where the app's own pages could read what is typed, none is asked for
            page.until("document.body.innerText.includes('Sign in there')")
            assert not page.tell("$('form')")
            page.click("main a")
            page.until("location.hostname === 'localhost'")
        page.until("document.activeElement.name === 'token'")
        page.type("wrong")
        page.click("button")
        page.until("document.body.innerText.includes('Invalid token') && document.activeElement.name === 'token'")
        page.type(TOKEN)
        page.press("Enter")
        page.shows("signed in")
        assert page.tell("location.href") == (url[: -len("a?b")] if host else location)
        asked = [message[0] for message in app.messages if "favicon" not in message[0]]
        assert asked == ["GET / HTTP/1.1" if host else "GET /a?b HTTP/1.1"]

    @pytest.mark.parametrize("root, token", [(b"/", None), (b"/", TOKEN), (b"./", TOKEN)])
    def test_two_apps_keep_apart_in_every_way_that_a_page_asks(self, page, browser, start, upstream, root, token):
        """Each gets what is its own, with its own cookies.  A token is in the first address, and nowhere after that."""
        proxy = start(token=token, allow_hostnames=())
        apps = [upstream(serve_app_page(name, root)) for name in (b"one", b"two")]
        ready = "document.body.dataset.report"
        for app, name in zip(apps, ("one", "two")):
            page.open("http://localhost:%d/proxy/%d%s" % (proxy.port, app.port, "?token=" + token if token else ""))
            assert json.loads(page.until(ready)) == app_report(name, "/proxy/%d/" % app.port)
        other = Page(browser, page)
        other.open("http://localhost:%d/proxy/%d/" % (proxy.port, apps[0].port))  # opened last
        assert '"socket":"one"' in other.until(ready)
        page.tell("fetch('/late')")
        page.tell("history.pushState({}, '', '/deep/link')")
        eventually(lambda: any("/late" in message[0] for message in apps[1].messages))
        page.open("http://localhost:%d/proxy/%d/" % (proxy.port, apps[1].port))
        page.until(ready)  # leaving before would cut its upload short
        page.click("button")
        page.shows("form of two: 0")
        assert page.tell("location.pathname") == "/proxy/%d/form" % apps[1].port
        for app, name in zip(apps, ("one", "two")):
            asked = [fields_of(message) for message in app.messages]
            assert {fields.get("cookie") for fields in asked[1:]} == {"session=" + name}
            assert {fields.get("origin") for fields in asked} == {None, "http://localhost:%d" % app.port}
            assert {"GET /socket HTTP/1.1", "GET /service.js HTTP/1.1"} < {message[0] for message in app.messages}
            assert TOKEN not in repr(app.messages)

    @needs_proc
    def test_pages_fit_their_window(self, page, start, upstream):
        """Nothing must be scrolled sideways, down to a phone; dark where the person likes it dark."""
        proxy, closed = start(), start(token=TOKEN)
        home, title = "http://localhost:%d/proxy/" % proxy.port, "a-word-that-goes-on-and-on" * 3
        app = upstream(serve_page(title.encode()))
        page.open("%s%d/" % (home, app.port))  # its title is then known
        page.open(home)
        assert title in page.tell("$('#p%d').innerText" % app.port)
        for url in (
            home, home + "%d/" % free_port(), home + "elsewhere.example.org:8080/", home + "no-port",
            "http://localhost:%d/proxy/" % closed.port,
        ):  # fmt: skip
            page.open(url)
            page.tell("$$('details').forEach(one => { one.open = true })")
            assert page.tell("$('h1').innerText")
            assert page.tell("document.documentElement.lang") == "en"
            for width, scheme in itertools.product((1000, 360), ("light", "dark")):
                size = {"width": width, "height": 700, "mobile": width < 500, "deviceScaleFactor": 1}
                page.do("Emulation.setDeviceMetricsOverride", **size)
                page.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                fits = page.tell("[innerWidth, document.scrollingElement.scrollWidth <= innerWidth]")
                assert fits == [width, True], url
                colour = "getComputedStyle(document.body).%s.match(/[0-9]+/g).map(Number)"
                ink, ground = (sum(page.tell(colour % what)) for what in ("color", "backgroundColor"))
                assert ink - ground > 300 if scheme == "dark" else ground - ink > 300


# ------ Real JupyterHub and Jupyter servers; PORT_PROXY_TEST_JUPYTER names the folder that their commands are in -----


def jupyter_command(name):
    folder = os.environ.get("PORT_PROXY_TEST_JUPYTER")
    path = shutil.which(name, path=folder or None)
    if not path:
        (pytest.fail if folder else pytest.skip)("PORT_PROXY_TEST_JUPYTER names no folder with %s" % name)
    return path


@contextlib.contextmanager
def serving(command, folder, port, target, context=None, **environment):
    """A real server, in a process group and a home folder of its own; it has answered at `target`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "PYTHON", "JPY"))}
    path = os.path.dirname(command[0]) + os.pathsep + os.environ["PATH"]
    kept.update(environment, HOME=str(folder), PATH=path, JUPYTER_PLATFORM_DIRS="1")

    def answers():  # the server itself; its front server may be up before it
        with contextlib.suppress(OSError):
            return Visitor(port, context).status("GET", target) == 200

    def output():
        return (folder / "log").read_text(errors="replace")

    how = {"cwd": str(folder), "env": kept, "stderr": subprocess.STDOUT, "start_new_session": True}
    with (folder / "log").open("wb") as log, spawn(command, stdout=log, **how) as process:
        try:
            eventually(lambda: answers() or process.poll() is not None, 4 * WAIT)
            assert process.poll() is None
            yield argparse.Namespace(port=port, context=context, process=process, output=output)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(WAIT)
            print(output())  # which is shown if this fails
    assert 'port_proxy.py", line' not in output()  # a traceback through our code


class Visitor:
    """A browser without a window, which keeps cookies and follows redirects. trail: its requests and their statuses."""

    def __init__(self, port, context=None):
        self.port, self.context = port, context
        self.cookies, self.trail = {}, []

    @property
    def origin(self):
        return "%s://127.0.0.1:%d" % ("https" if self.context else "http", self.port)

    def wire(self):
        return Wire.to(self.port, context=self.context)

    def head(self, method, target, *lines):
        path = target.partition("?")[0] + "/"
        sent = [cookie for cookie in self.cookies.items() if path.startswith(cookie[0][1].rstrip("/") + "/")]
        sent.sort(key=lambda cookie: -len(cookie[0][1]))
        if sent:
            lines = ("Cookie: " + "; ".join("%s=%s" % (name, value) for (name, _), value in sent),) + lines
        return at("127.0.0.1:%d" % self.port, method, target, *lines)

    def ask(self, method, target, *lines, body=b"", **how):
        """One request, and its answer, whose cookies are kept."""
        if body:
            lines += ("Content-Length: %d" % len(body),)
        with self.wire() as wire:
            wire.send(self.head(method, target, *lines), body)
            answer = wire.message(**how)
        self.trail.append((method, target, status_of(answer)))
        for value in cookies_set(answer):
            (name, _, content), *attributes = [part.strip().partition("=") for part in value.split(";")]
            about = {key.lower(): attribute for key, _, attribute in attributes}
            self.cookies.pop((name, about.get("path", "/")), None)
            if content.strip('"') and about.get("max-age") != "0":
                self.cookies[name, about.get("path", "/")] = content
        return answer

    def status(self, method, target, *lines, **how):
        return status_of(self.ask(method, target, *lines, **how))

    def visit(self, target):
        """Go to a page, wherever it leads; a page of the Hub that waits for a server is looked at again."""
        limit = time.monotonic() + 4 * WAIT
        while True:
            answer = self.ask("GET", target, *VISIT)
            location = fields_of(answer).get("location")
            if location:
                target = re.sub("https?://[^/]*", "", location)
            elif "/hub/spawn-pending/" not in target:
                return answer
            else:
                time.sleep(0.3)  # less would keep the Hub busy with this alone
            assert time.monotonic() < limit, self.trail

    def sign_in_at_hub(self, name, base="/jh/"):
        self.ask("GET", base + "hub/login", *VISIT)
        form = {"username": name, "password": "any", "_xsrf": self.cookies["_xsrf", base + "hub/"]}
        kind = "Content-Type: application/x-www-form-urlencoded"
        assert self.status("POST", base + "hub/login", kind, body=urlencode(form).encode()) == 302
        return self

    @contextlib.contextmanager
    def websocket(self, target):
        """A raw connection behind the 101 of a WebSocket, as a page of this origin opens it."""
        with self.wire() as wire:
            wire.send(self.head("GET", target, "Origin: " + self.origin, *HANDSHAKE))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
            yield wire


def first_line(answer):
    """The request line that `serve_anything` received."""
    return answer[2].split(b"\n")[0].decode()


def serve_anything(wire, app):
    """An app that echoes request lines and WebSockets, measures bodies, and sends much or an event."""
    with contextlib.suppress(OSError, ValueError, AssertionError):  # clients leave at any moment
        while wire.buffer or wire.more():
            read_message(wire, app)
            line, _, body = app.messages[-1]
            path = line.split(" ")[1].partition("?")[0]
            if path.endswith("/ws"):
                wire.send(SWITCHING)
                while wire.buffer or wire.more():
                    wire.send(wire.buffer)
                    wire.buffer = b""
            elif path.endswith("/events"):
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
                hold(wire, app)
            elif path.endswith("/much"):
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (48 << 20))  # more than the kernel holds
                send_blocks(wire, 48 << 20, [])
            else:
                answer = ok(b"%s\n%d" % (line.encode(), len(body)), "Set-Cookie: app=1; Path=/")
                wire.send(answer.partition(b"HEAD ")[0] if line.startswith("HEAD ") else answer)


HUB_CONFIG = """
c.JupyterHub.bind_url = "http://127.0.0.1:{port}/jh/"
c.JupyterHub.hub_port = {hub_port}
c.ConfigurableHTTPProxy.api_url = "{scheme}://127.0.0.1:{api_port}"
c.JupyterHub.db_url = "sqlite://"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {{"boss"}}
scopes = ["admin:users", "admin:servers", "tokens", "read:users:activity"]
c.JupyterHub.load_roles = [{{"name": "test", "scopes": scopes, "services": ["test"]}}]
c.JupyterHub.services = [{{"name": "test", "api_token": "test-token"}}]
c.JupyterHub.allow_named_servers = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {home!r} + "/{{username}}"
c.Spawner.cmd = {command!r}
def use_jupyter(spawner):
    if spawner.user.name == {jo!r}:
        spawner.cmd = {jupyter_command!r}
c.Spawner.pre_spawn_hook = use_jupyter
c.Spawner.start_timeout = c.Spawner.http_timeout = 120
c.Spawner.environment = {{"JUPYTERHUB_ACTIVITY_INTERVAL": "1", "PYTHONPATH": {here!r}}}
c.Spawner.default_url = "{default_url}"
c.JupyterHub.internal_ssl = {internal_ssl}
c.JupyterHub.internal_certs_location = {home!r} + "/certificates"
"""
ANA, JO = "al@ice.x+y", "jo@ice.x+y"


@pytest.fixture(scope="module")
def anything():
    with contextlib.closing(Upstream(serve_anything)) as app:
        yield app


@pytest.fixture(scope="module")
def hub(request, anything, tmp_path_factory):
    """A Hub whose servers are this program; those of JO are its usual ones, with the module among their extensions."""
    command = jupyter_command("jupyterhub")
    jupyter_command("configurable-http-proxy")
    folder = tmp_path_factory.mktemp("hub")
    port, internal = free_port(), request.param == "internal TLS"
    singleuser = [jupyter_command("jupyterhub-singleuser"), "--allow-root"]
    singleuser.append("--ServerApp.jpserver_extensions={'port_proxy': True}")
    text = HUB_CONFIG.format(
        port=port, hub_port=free_port(), api_port=free_port(), home=str(folder / "home"), here=str(HERE),
        command=[sys.executable, PROGRAM], jo=JO, jupyter_command=singleuser,
        default_url="/proxy/%d%s" % (anything.port, "/" if internal else ""), internal_ssl=internal,
        scheme="https" if internal else "http",
    )  # fmt: skip
    (folder / "config.py").write_text(text)
    with serving([command, "-f", "config.py"], folder, port, "/jh/hub/api/") as hub:
        yield hub


@pytest.mark.parametrize(
    "hub, owner", [("plain", ANA), ("plain", JO), ("internal TLS", ANA)], indirect=["hub"], scope="module"
)
class TestJupyterHub:
    @pytest.fixture
    def name(self, owner):
        """The owner's name as it is written in addresses."""
        return owner.replace("+", "%2B")

    @pytest.fixture
    def target(self, anything, name):
        return "/jh/user/%s/proxy/%d/" % (name, anything.port)

    def api(self, hub, method, path, **body):
        data = json.dumps(body).encode() if body else b""
        lines = ("Authorization: token test-token", "Content-Type: application/json")
        answer = Visitor(hub.port).ask(method, "/jh/hub/api" + path, *lines, body=data)
        assert status_of(answer) < 300, answer
        return json.loads(answer[2].decode()) if answer[2] else None

    @pytest.fixture
    def user(self, hub, owner, anything, target):
        """A browser that has been through the Hub's sign-in and is at the app."""
        visitor = Visitor(hub.port).sign_in_at_hub(owner)
        answer = visitor.visit("/jh/hub/user-redirect/proxy/%d" % anything.port)
        assert (status_of(answer), first_line(answer)) == (200, "GET / HTTP/1.1"), (visitor.trail, hub.output())
        assert visitor.trail[-1][1] == target
        return visitor

    def test_sign_in_leads_to_the_app(self, hub, owner, anything, user, target):
        assert first_line(user.visit(target + "a%2Fb//c?d=%20")) == "GET /a%2Fb//c?d=%20 HTTP/1.1"
        assert ("app", target) in user.cookies
        assert fields_of(anything.messages[-1])["cookie"] == "app=1"
        visitor = Visitor(hub.port).sign_in_at_hub(owner)
        assert first_line(visitor.visit("/jh/")) == "GET / HTTP/1.1"  # the default URL
        assert visitor.trail[-1][1] == target  # with the slash that relative links need

    def test_access_needs_a_sign_in_by_the_owner_or_an_admin(self, hub, anything, user, target):
        assert b'name="password"' in Visitor(hub.port).visit(target)[2]
        for method, lines in (("POST", VISIT), ("GET", ()), ("GET", HANDSHAKE)):
            assert Visitor(hub.port).status(method, target, *lines) == 403
        count = len(anything.messages)
        answer = Visitor(hub.port).sign_in_at_hub("mallory").visit(target)
        assert (status_of(answer), len(anything.messages)) == (403, count)
        assert status_of(Visitor(hub.port).sign_in_at_hub("boss").visit(target)) == 200

    def test_tokens_of_the_hub_are_accepted_and_cut(self, hub, owner, name, anything, user, target):
        """Also if the request came in by another, or by cookie; unknown ones are the app's."""
        about = {"note": "test", "scopes": ["access:servers!user=" + owner]}
        tokens = [self.api(hub, "POST", "/users/%s/tokens" % name, **about)["token"] for _ in range(3)]
        by_token, by_bearer = ("Authorization: %s %s" % (kind, tokens[0]) for kind in ("token", "Bearer"))
        referer = "Referer: http://127.0.0.1:%d%slab?token=%s&a" % (hub.port, target, tokens[2])
        stranger, several = Visitor(hub.port), "?token=%s&token=apps-own" % tokens[1]
        for visitor, query, lines, arrives in (
            (stranger, "", (by_token,), "/"), (stranger, "", (by_bearer,), "/"),
            (stranger, several, (by_token, referer), "/?token=apps-own"),
            (user, several, (referer,), "/?token=apps-own"),
        ):  # fmt: skip
            assert visitor.status("GET", target + query, *lines) == 200
            fields = fields_of(anything.messages[-1])
            assert anything.messages[-1][0] == "GET %s HTTP/1.1" % arrives
            assert (fields.get("referer", "/lab?a")[-6:], "authorization" in fields) == ("/lab?a", False)
            assert not any(token in repr(anything.messages[-1]) for token in tokens)
        assert user.status("GET", target, "Authorization: Bearer apps-own") == 200
        assert fields_of(anything.messages[-1])["authorization"] == "Bearer apps-own"
        assert stranger.status("GET", target, "Authorization: token apps-own") == 403
        if owner == JO:
            assert stranger.status("GET", target + several) == 403  # JupyterHub takes no tokens in addresses any more
        else:
            browser = Visitor(hub.port)
            assert status_of(browser.visit(target + "?token=" + tokens[0])) == 200
            assert browser.trail[-1][1] == target

    def test_activity_of_a_websocket_is_reported(self, hub, name, anything, user, target):
        def last():
            return self.api(hub, "GET", "/users/" + name)["servers"][""]["last_activity"]

        assert user.status("GET", target + "ws", "Origin: http://evil.example", *HANDSHAKE) == 403
        with user.websocket(target + "ws") as wire:
            before = last()

            def is_later():
                wire.send(b"a")
                wire.exactly(1)
                return last() > before

            eventually(is_later)
        assert fields_of(anything.messages[-1])["origin"] == "http://localhost:%d" % anything.port

    def test_signing_out_ends_access(self, hub, user, target):
        ours = {name for name, _ in user.cookies if name.startswith(("port_proxy_", "jupyterhub-user-"))}
        assert ours
        user.visit("/jh/hub/logout")
        assert ours <= {name for name, _ in user.cookies}  # they are still sent, to no avail
        assert user.status("GET", target) == 403
        assert b'name="password"' in user.visit(target)[2]

    def test_server_has_its_own_prefix_and_stops_with_a_websocket_open(self, hub, owner, name, anything, user):
        """The Hub waits ten seconds before it answers that a server is slow to stop (202)."""
        home, server, server_name = "/jh/user/" + name, "/users/%s/server" % name, ""
        if owner != JO:  # a second server of Jupyter would take long to start
            home, server, server_name = home + "/gpu-2", server + "s/gpu-2", "gpu-2"
            self.api(hub, "POST", server)
            user.visit("/jh/hub/spawn-pending/%s/gpu-2" % name)  # until it has started
        target = "%s/proxy/%d/" % (home, anything.port)
        assert first_line(user.visit(home)) == "GET / HTTP/1.1"
        assert fields_of(anything.messages[-1])["x-forwarded-prefix"] == target[:-1]
        with user.websocket(target + "ws") as wire, user.wire() as events:
            events.send(user.head("GET", target + "events"))
            assert b"data: 1" in events.until(b"data: 1\n\n")
            stop = ("DELETE", "/jh/hub/api" + server, "Authorization: token test-token")
            assert user.status(*stop, no_body=True) == 204 or owner == JO  # Jupyter itself may take as long
            assert wire.ends()
        eventually(lambda: server_name not in self.api(hub, "GET", "/users/" + name)["servers"])
        assert not re.search("Traceback|SIGKILL", hub.output())


@pytest.fixture(scope="module", params=["plain", "TLS"])
def jupyter(request, tmp_path_factory):
    """A Jupyter server with the module as an extension, whose options are strings of the command line, or in a file."""
    folder, port, context, config = tmp_path_factory.mktemp("jupyter"), free_port(), None, ""
    command = [jupyter_command("jupyter"), "server", "--allow-root", "--no-browser", "--config=config.py"]
    command += ["--port=%d" % port, "--ServerApp.port_retries=0", "--ServerApp.base_url=/nb/"]
    command += ["--ServerApp.jpserver_extensions={'port_proxy': True}", "--IdentityProvider.token=" + TOKEN]
    if request.param == "plain":
        command += ["--PortProxy." + option for option in (
            "preserve_host=true", "whole_origin=False", "linger_timeout=1.5", "max_fields=20",
            "host_allowlist=a.invalid", "host_allowlist=b.invalid",  # makes a list
        )]  # fmt: skip
    else:  # traitlets gives values that are not known yet; what is only read keeps its default
        config = "".join("c.PortProxy.%s\n" % name for name in ("any_owner", "head_timeout", "token"))
        config += "c.PortProxy.host_allowlist.append('a.invalid')\nc.PortProxy.domains.append('b.invalid')\n"
        config += "c.PortProxy.upstream_tls = '1, 2'\n"
        config += "c.ServerApp.allow_origin = 'https://a.example'\n"
        certificate = request.getfixturevalue("certificate")
        command += ["--certfile=%s" % (certificate / "cert.pem"), "--keyfile=%s" % (certificate / "key.pem")]
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    (folder / "config.py").write_text(config)
    with serving(command, folder, port, "/nb/api", context, PYTHONPATH=str(HERE)) as jupyter:
        yield jupyter
        output = jupyter.output()
    assert "port_proxy: every port of this machine is at /nb/proxy/<port>/" in output
    assert "GET /nb/proxy/" not in re.sub(r"(?m)^\[W.*|.* 302 GET .*", "", output)  # successes are not logged
    assert TOKEN not in output.replace("token=" + TOKEN, "")  # Jupyter itself prints the address to open


FOREIGN = "Origin: https://a.example"
BY_TOKEN = "Authorization: token " + TOKEN


class TestJupyterExtension:
    """Without Jupyter, which is played by what it hands to the module."""

    def test_no_advice_begins_with_an_option(self):
        """Its first letter becomes a capital: C.PortProxy is no option of Jupyter."""
        assert not re.findall(r'"\{(?!start)[a-z_]+\} [^"]*"', Path(port_proxy.__file__).read_text())

    @pytest.mark.parametrize("name, value, says", [
        ("host_allowlist", 7, "--host-allowlist must be a sequence"), ("frob", "1", "frob"),
        ("host_allowlist", "a, b/c", "--host-allowlist: "), ("head_timeout", -1, "--head-timeout must be"),
        ("head_timeout", "x", "--head-timeout"), ("max_fields", "7.5", "--max-fields"),
        ("any_owner", "maybe", "--any-owner"),
    ])  # fmt: skip
    def test_mistake_in_the_configuration_is_logged_with_its_option(self, caplog, name, value, says):
        log = logging.getLogger("jupyter")
        server = argparse.Namespace(base_url="/nb/", config={"PortProxy": {name: value}}, log=log)
        port_proxy._load_jupyter_server_extension(server)  # as Jupyter calls it
        (record,) = caplog.records
        message = record.getMessage()
        assert message.startswith("port_proxy: /nb/proxy/ is not served, because c.PortProxy is not valid: ")
        assert says in message

    def gate(self, hub_auth=None, disable_check_xsrf=False, **attributes):
        """The gate for a browser that is signed in; attributes: of the handler that stands for Jupyter's."""
        provider = argparse.Namespace(hub_auth=hub_auth, get_cookie_name=lambda handler: "username-a")
        settings = {"identity_provider": provider, "disable_check_xsrf": disable_check_xsrf}
        usual = {"token": "", "token_authenticated": False, "allow_origin": ""}
        handler = argparse.Namespace(settings=settings, check_origin=lambda: True, **dict(usual, **attributes))
        return port_proxy.JupyterGate(DEFAULT, handler)

    def hub_auth(self, **answers):
        """The Hub's client inside Jupyter, with what the Hub answers about each token."""

        async def user_for_token(token, **_):
            if isinstance(answers.get(token), BaseException):
                raise answers[token]
            return answers.get(token)

        return argparse.Namespace(user_for_token=user_for_token, get_session_id=lambda handler: "")

    @pytest.mark.parametrize("failure, error", [
        (OSError, ProxyError), (asyncio.CancelledError, asyncio.CancelledError),
    ])  # fmt: skip
    def test_token_is_refused_while_the_hub_does_not_answer(self, failure, error):
        """It could be a token of the Hub. Before Python 3.8, CancelledError is an Exception; it is raised again."""
        gate = self.gate(self.hub_auth(unknown=failure()))
        with contextlib.closing(asyncio.new_event_loop()) as loop, pytest.raises(error) as caught:
            loop.run_until_complete(gate.authorize(parsed(request("GET", "/proxy/1/?token=unknown"))))
        assert getattr(caught.value, "status", 503) == 503

    def test_token_of_the_hub_leaves_the_address_of_a_page(self, background):
        """The app's script could read it there."""
        gate, target = self.gate(self.hub_auth(known={"name": "ana"})), "/proxy/1/?a&token=known&token=apps-own"
        gate.handler._new_cookie = SimpleCookie("jupyterhub-user-ana=x")
        with pytest.raises(ProxyError) as caught:
            background.do(gate.authorize(parsed(request("GET", target, *VISIT))))
        assert caught.value.status == 302
        assert caught.value.fields == (
            ("Location", "/proxy/1/?a&token=apps-own"), ("Set-Cookie", "jupyterhub-user-ana=x"),
        )  # fmt: skip
        background.do(gate.authorize(parsed(request("GET", target))))  # of a script

    @pytest.mark.parametrize("sessions, is_closed", [
        ([True, OSError(), True, False], True), (["next request"], False), (["closed"], False),
    ], ids=case_id)
    def test_connection_of_an_ended_hub_session_is_closed(self, sessions, is_closed):
        """Jupyter is asked with a new handler each time.  While the Hub does not answer, the connection stays."""
        gate, answers, connection = self.gate(self.hub_auth()), list(sessions), Mock()
        connection.served, connections = (gate, parsed(request("GET", "/proxy/1/"))), [connection]
        connection.abort.side_effect = connections.clear
        gate.handler = Mock(application=None, request=None)

        async def get_user(handler):
            assert handler is not gate.handler
            answer = answers.pop(0)
            if answer == "next request":
                connection.served = None
            elif answer == "closed":
                connections.clear()
            elif isinstance(answer, OSError):
                raise answer
            return True if answer is True else None

        gate.provider.get_user = get_user
        with contextlib.closing(Hasty()) as loop:
            watch = loop.create_task(port_proxy.close_ended_sessions(Mock(connections=connections)))
            for _ in range(100):
                loop.run_until_complete(asyncio.sleep(1))
            loop.run_until_complete(port_proxy.cancel([watch]))
        assert (answers, connection.abort.call_count) == ([], is_closed)

    @pytest.mark.parametrize("attributes, may_post", [
        ({"allow_origin": "*"}, False), ({"allow_origin": "*", "disable_check_xsrf": True}, True),
        ({"allow_origin": ""}, False), ({"allow_origin": "https://a.example"}, True),  # "": allow_origin_pat applies
    ])  # fmt: skip
    def test_origin_that_jupyter_allows_is_allowed(self, background, attributes, may_post):
        """If that is any origin, Jupyter's own handlers require an XSRF token for changes; the proxy refuses them."""
        gate = self.gate(**attributes)
        for method, lines, is_admitted in (
            ("GET", (), True), ("POST", (), may_post), ("PUT", (), may_post), ("GET", HANDSHAKE, True),
            ("OPTIONS", (), False),
            ("POST", ("Sec-Fetch-Site: same-origin",), True), ("POST", ("Sec-Fetch-Site: cross-site",), may_post),
        ):  # fmt: skip
            decision = gate.authorize(parsed(request(method, "/proxy/1/", FOREIGN, *lines)))
            if is_admitted:
                background.do(decision)
            else:
                assert status_of_error(background.do, decision) == 403
        by_token = self.gate(**dict(attributes, token_authenticated=True, get_token=None))
        background.do(by_token.authorize(parsed(request("POST", "/proxy/1/", FOREIGN))))


class TestJupyter:
    @pytest.fixture
    def target(self, anything):
        return "/nb/proxy/%d" % anything.port

    @pytest.fixture
    def visitor(self, jupyter, target):
        """A browser that is signed in."""
        visitor = Visitor(jupyter.port, jupyter.context)
        assert status_of(visitor.visit(target + "/?token=" + TOKEN)) == 200
        assert visitor.trail[0][2] == 302
        assert TOKEN not in visitor.trail[-1][1]
        return visitor

    @pytest.fixture
    def wire(self, visitor):
        with visitor.wire() as wire:
            yield wire

    def test_access_needs_a_sign_in_or_the_token(self, anything, target, visitor):
        stranger, count = Visitor(visitor.port, visitor.context), len(anything.messages)
        answer = stranger.ask("GET", target + "/?x", *VISIT)
        location = "/nb/login?next=" + quote(target + "/?x", "")
        assert (status_of(answer), fields_of(answer)["location"]) == (302, location)
        assert fields_of(answer)["connection"] == "close"  # a front server must not send the next request there
        for method, *lines in (
            ("GET",), ("POST",) + VISIT, ("GET",) + HANDSHAKE, ("PROPFIND",), ("M-SEARCH",), ("OPTIONS",),
            ("GET", "Authorization: token wrong"),
        ):  # fmt: skip
            assert stranger.status(method, target + "/", *lines) == 403
        assert len(anything.messages) == count
        assert stranger.status("GET", target + "/", BY_TOKEN) == 200
        assert stranger.status("GET", "/nb/proxy", *VISIT) == 200  # that request has set the cookie, too
        assert visitor.status("GET", target + "/") == 200

    def test_own_pages_are_served(self, jupyter, anything, target, visitor):
        """Apps have no hosts of their own, and nothing outside the prefix is ours."""
        data = json.loads(visitor.ask("GET", "/nb/proxy/", JSON)[2].decode())
        links = {one["port"]: one["links"] for one in data["ports"]}
        if links:
            absolute = "/nb/proxy/absolute/%d/" % anything.port
            assert links[anything.port] == {"stripped": target + "/", "absolute": absolute}
        assert jupyter.port not in links
        assert_says(visitor.ask("GET", "/nb/proxy/%d/" % free_port(), *VISIT), 502, b"Waiting for port")
        assert "port_proxy_" not in repr(cookies_set(visitor.ask("GET", target + "/", *VISIT)))
        for place, status in (
            ("", 200), ("nope/", 404), ("a.example.com:80/", 403), ("a.invalid:80/", 502), ("1/../../x", 400),
            ("1", 302), ("%d/" % jupyter.port, 508), ("absolute/localhost:%d/" % jupyter.port, 508),  # endless loops
        ):  # fmt: skip
            assert visitor.status("GET", "/nb/proxy/" + place) == status

    @pytest.mark.parametrize("jupyter", ["plain"], indirect=True)
    def test_options_on_the_command_line_are_obeyed(self, anything, target, visitor):
        assert fields_of(anything.messages[-1])["host"] == "127.0.0.1:%d" % visitor.port
        assert visitor.status("GET", target + "/", *["X: y"] * 20) == 431
        for host, status in (("a.invalid", 502), ("b.invalid", 502), ("c.invalid", 403)):  # none of them exists
            assert visitor.status("GET", "/nb/proxy/%s:80/" % host) == status

    def test_requests_arrive_as_sent(self, anything, target, visitor):
        path, lines = "/a%2Fb//c;d?e=%20&token=apps-own", ("X-A: 1", "X-A: 2", "Authorization: Bearer apps-own")
        handlers_own = ("PREPARE", "REQUEST", "TOKEN", "_NEW_COOKIE", "CURRENT_USER", "XSRF_TOKEN")  # attributes
        for method in ("GET", "POST", "PROPFIND", "M-SEARCH", "OPTIONS", "get", "X1") + handlers_own:
            assert first_line(visitor.ask(method, target + path, *lines)) == "%s %s HTTP/1.1" % (method, path)
            assert [value for name, value in anything.messages[-1][1] if name == "X-A"] == ["1", "2"]
            assert fields_of(anything.messages[-1])["authorization"] == "Bearer apps-own"
            assert first_line(visitor.ask(method, target + "/?token=" + TOKEN)) == "%s / HTTP/1.1" % method
        absolute = "/nb/proxy/absolute/%d/a" % anything.port
        assert first_line(visitor.ask("GET", absolute)) == "GET %s HTTP/1.1" % absolute
        assert visitor.status("HEAD", target + "/", no_body=True) == 200

    def test_credentials_do_not_reach_the_app(self, jupyter, anything, target, visitor):
        own = "username-localhost-%d" % anything.port  # if the app is a Jupyter server itself
        for name, path in (
            ("_xsrf", target + "/"), (own, target + "/"), ("username-localhost-1", "/"), ("jupyterhub-user-a", "/"),
            ("port_proxy_8888", "/"),
        ):  # fmt: skip
            visitor.cookies[name, path] = "x"
        referer = "Referer: http://127.0.0.1:%d%s/?token=%s" % (jupyter.port, target, TOKEN)
        for query, *lines in (
            ("token=%s", BY_TOKEN), ("token=%s", "Authorization: bearer " + TOKEN),
            ("token=%s", referer), ("token=%s", "Authorization: ToKeN\t " + TOKEN),
            # Jupyter reads these loosely, too.
            ("token=%s%%20",), ("token=+%s",), ("token=%%00%s",), ("token=%s%%0a",),
        ):  # fmt: skip
            visitor.cookies.pop(("app", target + "/"))
            assert visitor.status("GET", target + "/?a&%s&b" % (query % TOKEN), *lines) == 200
            line, fields, _ = anything.messages[-1]
            assert line == "GET /?a&b HTTP/1.1"
            assert set(dict(fields)["Cookie"].split("; ")) == {"_xsrf=x", own + "=x"}
            assert not re.search(TOKEN + "|username-127", repr(fields))

    def test_xsrf_cookies_of_jupyter_and_of_an_app_stay_apart(self, upstream, visitor):
        """As of Streamlit and other Tornado apps, in the form that keeps the prefix."""
        app = upstream(answering(ok(b"", "Set-Cookie: _xsrf=apps; Path=/")))
        target = "/nb/proxy/absolute/%d/" % app.port
        for _ in range(2):
            assert visitor.status("GET", target, *VISIT) == 200
        assert fields_of(app.messages[-1])["cookie"] == "_xsrf=apps"
        token = "X-XSRFToken: " + visitor.cookies["_xsrf", "/nb/"]
        answer = visitor.ask("POST", "/nb/api/contents", token, body=b'{"type": "file"}')
        assert status_of(answer) == 201, answer

    def test_app_cannot_set_cookies_of_jupyter(self, upstream, visitor):
        (name,) = [name for name, _ in visitor.cookies if name.startswith("username-127-0-0-1-")]
        cookies = (name + "=evil; Path=/", "jupyterhub-session-id=evil", "a=b")
        app = upstream(answering(ok(b"", *["Set-Cookie: " + cookie for cookie in cookies])))
        assert cookies_set(visitor.ask("GET", "/nb/proxy/%d/" % app.port)) == ["a=b"]

    def test_other_sites_are_refused(self, target, visitor):
        advice = "Set c.PortProxy.allow_origins = ['https://xn--e1afmkfd.example'] to allow it.\n"
        for method, line, status, says in (
            ("POST", "Origin: https://xn--e1afmkfd.example", 403, advice),
            ("POST", FOREIGN, 200 if visitor.context else 403, ""),  # as Jupyter itself is configured
            ("POST", "Origin: null", 403, "A program can send this request with a Jupyter token.\n"),
            ("GET", "Sec-Fetch-Site: cross-site", 403, ""),
        ):
            answer = visitor.ask(method, target + "/", line)
            assert (status_of(answer), answer[2].decode().endswith(says)) == (status, True), answer

    def test_connection_is_shared_with_jupyter(self, target, visitor, wire):
        """It goes to the proxy and back to Tornado, request by request, with bodies of both framings."""
        chunked = visitor.head("POST", target + "/c", "Transfer-Encoding: chunked")
        chunked += chunk(b"abc") + chunk(BLOCK) + chunk(b"")
        length = visitor.head("POST", target + "/b", "Content-Length: 100000") + bytes(100000)
        requests = [
            (visitor.head("GET", target + "/a"), b"GET /a "), (visitor.head("GET", "/nb/api/status"), b'{"connections'),
            (visitor.head("GET", "/nb/api"), b'{"version'), (length, b"POST /b HTTP/1.1\n100000"),
            (chunked, b"POST /c HTTP/1.1\n1048579"),
        ]  # fmt: skip
        for raw, begins in requests * 3:
            assert wire.ask(raw)[2].startswith(begins)
        wire.send(*[raw for raw, _ in requests[:3]])  # pipelined
        for _, begins in requests[:3]:
            assert wire.message()[2].startswith(begins)

    def test_request_behind_a_response_on_its_way_is_served_if_it_can_be_given_back(self, upstream, visitor, wire):
        """Behind a body it cannot: the response before it has Connection: close, and comes whole."""
        app = upstream(answering(ok(bytes(4 << 20))))
        target, behind = "/nb/proxy/%d/" % app.port, visitor.head("GET", "/nb/api")
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        for _ in range(3):
            assert len(wire.ask(visitor.head("GET", target) + behind)[2]) == 4 << 20
            assert b"version" in wire.message()[2]
        chunked = visitor.head("POST", target, "Transfer-Encoding: chunked") + chunk(b"abc") + chunk(b"")
        answer = wire.ask(chunked + behind)
        assert (len(answer[2]), fields_of(answer)["connection"]) == (4 << 20, "close")

    @pytest.mark.parametrize("body", [b"", b"abc"], ids=["no body", "a body"])
    def test_client_that_leaves_is_noticed(self, upstream, visitor, wire, body):
        app = upstream(script(read_message, tell, read_to_the_end, lambda wire, app: app.let_go.set()))
        wire.send(visitor.head("POST", "/nb/proxy/%d/" % app.port, "Content-Length: %d" % len(body)) + body)
        assert app.told.wait(WAIT)
        wire.close()
        assert app.let_go.wait(WAIT)

    @needs_proc
    def test_clients_that_leave_at_any_moment_leave_no_descriptor_open(self, jupyter, target, visitor):
        heads = [visitor.head(*parts) + body for *parts, body in (
            ("GET", target + "/much", b""), ("GET", target + "/ws") + HANDSHAKE + (b"",), ("GET", target + "/", b""),
            ("POST", target + "/", "Content-Length: 3", b"abcGET /"),
            ("PUT", target + "/", "Content-Length: 1000", b"abc"),  # this and the next are not answered
            ("PUT", target + "/", "Transfer-Encoding: chunked", b"5\r\nab"),
        )]  # fmt: skip
        descriptors = "/proc/%d/fd" % jupyter.process.pid
        before = len(os.listdir(descriptors))
        for at, waits, resets in itertools.product(range(6), (True, False), (True, False)):
            with visitor.wire() as wire:
                wire.send(heads[at])
                assert at > 3 or not waits or wire.more()
                if resets and not visitor.context:
                    wire.reset()
        eventually(lambda: len(os.listdir(descriptors)) <= before + 2)  # idle upstreams close by themselves
        assert visitor.status("GET", target + "/") == 200

    def test_bytes_pass_at_once(self, upstream, target, visitor, wire):
        """Interim responses and events; a response that is cut short is seen to be."""
        begun = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"
        app = upstream(script(read_head, b"HTTP/1.1 100 Continue\r\n\r\n", lambda wire, _: wire.exactly(3), begun))
        wire.send(visitor.head("PUT", "/nb/proxy/%d/" % app.port, "Content-Length: 3", "Expect: 100-continue"))
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        wire.send(b"abc")
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionError, ssl.SSLError):  # a way to see it, too; a timeout is none
            assert wire.exactly(10) == b"abc"
        with visitor.wire() as wire:
            wire.send(visitor.head("GET", target + "/events"))
            assert wire.until(b"data: 1\n\n").endswith(b"data: 1\n\n")  # the response has not ended

    def test_malformed_request_is_refused(self, anything, target, visitor):
        """By Tornado, or by our stricter grammar; nothing of it reaches an app."""
        count = len(anything.messages)
        for line in (b"X: a\x01b", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked\r\nContent-Length: 3"):
            with visitor.wire() as wire:
                wire.send(visitor.head("POST", target + "/")[:-2] + line + b"\r\n\r\nabc")
                assert re.match(b"HTTP/1.1 (400|501)", wire.until(b"\r\n\r\n"))
        assert len(anything.messages) == count

    def test_jupyter_works_beside_the_proxy(self, visitor):
        assert visitor.status("POST", "/nb/api/contents", body=b"{}") == 403
        events = "/nb/api/events/subscribe"
        assert visitor.status("GET", events, "Origin: http://evil.example", *HANDSHAKE) == 403
        with visitor.websocket(events):
            pass

    @pytest.mark.parametrize("jupyter", ["TLS"], indirect=True)
    def test_page_in_lab_uses_every_feature(self, jupyter, upstream, browser):
        """In a frame whose address is made of Lab's base URL, as extensions make it."""
        app, page = upstream(serve_app_page(b"one", b"./")), Page(browser)
        page.open("https://localhost:%d/nb/lab?token=%s" % (jupyter.port, TOKEN))
        base = page.until("JSON.parse($('#jupyter-config-data').textContent).baseUrl")
        frame = "document.createElement('iframe')"
        page.tell("$('body').append(window.appFrame = %s); appFrame.src = '%sproxy/%d/'" % (frame, base, app.port))
        report = page.until("appFrame.contentDocument.body.dataset.report", limit=2 * WAIT)
        page.close()
        reported = dict(json.loads(report), cookie="")  # Jupyter's own XSRF cookie
        assert reported == app_report("one", "/nb/proxy/%d/" % app.port)
        assert TOKEN not in repr(app.messages)


class TestJupyterBackPressure(SlowPeers):
    @pytest.fixture
    def measured(self, jupyter):
        before = rss_kib(jupyter.process.pid)

        def check():
            assert rss_kib(jupyter.process.pid) - before < 16 << 10

        with Wire.to(jupyter.port, context=jupyter.context) as wire:
            yield wire, check

    def to(self, app, *lines, **how):
        return to(app, BY_TOKEN, *lines, form="/nb/proxy/%d", **how).replace(b"here:8888", b"localhost", 1)


# ------ Benchmark: `python3 test_port_proxy.py bench`, side by side on this machine; it needs Linux, and no pytest ---


class TestBenchmark:
    @pytest.mark.parametrize("path, bound", [("/200", 16), (None, 32)], ids=["kept-alive", "WebSocket"])
    def test_idle_connection_takes_little_memory(self, upstream, tmp_path, path, bound):
        """Less than the bound in KiB: a buffer of 64 KiB that is kept for each would be far above it."""
        with contextlib.closing(BenchProxy("port_proxy", upstream(serve_sockets).port, str(tmp_path))) as proxy:
            assert proxy.idle_kib(path, 150) < bound

    @needs_proc
    def test_benchmark_runs_without_pytest(self):
        """The environment has no PATH, so nginx takes no part."""
        run = "import runpy, sys; sys.modules['pytest'] = None; runpy.run_path(%r, None, '__main__')"
        command = [sys.executable, "-c", run % str(HERE / "test_port_proxy.py"), "bench"]
        command += ["--seconds=0.05", "--repeats=1"]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": dict(os.environ, PATH=""), "cwd": str(HERE)}
        done = subprocess.run(command, timeout=4 * WAIT, **how)
        assert (done.returncode, done.stderr) == (0, b"")
        row = r"\| as a browser, no head twice, 64 connections: requests/s \| [0-9.]+ \([0-9.-]+\) \|"
        assert re.search(row, done.stdout.decode())


BROWSER_REQUEST = """\
GET {prefix}/browse/{number}/item-{mixed:08x}.json?page={number}&t={mixed:x} HTTP/1.1
Host: localhost:{port}
Connection: keep-alive
sec-ch-ua-platform: "Linux"
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36
sec-ch-ua: "Chromium";v="140", "Not=A?Brand";v="24", "Google Chrome";v="140"
sec-ch-ua-mobile: ?0
Accept: */*
Sec-Fetch-Site: same-origin
Sec-Fetch-Mode: cors
Sec-Fetch-Dest: empty
Referer: http://localhost:{port}{prefix}/view/{number}
Accept-Encoding: gzip, deflate, br, zstd
Accept-Language: en-GB,en;q=0.9,de;q=0.8
Cookie: theme=dark; _xsrf=2|1a2b3c4d|0123456789abcdef0123456789abcdef|1700000000; session=eyJhbGciOiJIUz.{mixed:08x}
If-None-Match: "{mixed:08x}-{number}"

"""
BROWSER_RESPONSE = """\
HTTP/1.1 200 OK
Server: uvicorn
Date: Mon, 01 Jan 2024 12:34:56 GMT
Content-Type: application/json; charset=utf-8
Content-Length: {length}
ETag: "{mixed:08x}-{number}-new"
Last-Modified: Sun, 31 Dec 2023 23:59:59 GMT
Cache-Control: private, no-cache
Vary: Accept-Encoding, Cookie
X-Content-Type-Options: nosniff
X-Frame-Options: SAMEORIGIN
X-Request-Id: {mixed:08x}{number}
Set-Cookie: session=eyJhbGciOiJIUzI1NiJ9.{mixed:08x}; Path=/; HttpOnly; SameSite=Lax

{body:>{length}}"""
BROWSED_END = b'"tags": []}'
MESSAGE = bytes([0x82, 0x80 | 26]) + bytes(4 + 26)  # a WebSocket frame of 32 bytes


def browsing(template, **values):
    """The requests of a browser, or the responses of its app, one by one: no two are alike."""
    for number in itertools.count(1):
        mixed = number * 2654435761 & 0xFFFFFFFF  # no two numbers are mixed to the same
        values.update(body=BROWSED_END.decode(), length=80 + number % 37 * 9)
        yield template.replace("\n", "\r\n").format(number=number, mixed=mixed, **values).encode()


def bench_upstream(listener):
    """The app behind the proxies: it answers a browser, sends as many bytes as the path says, echoes WebSockets."""
    browsed = browsing(BROWSER_RESPONSE)

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path, _ = head.split(b" ", 2)
                if b"\r\nupgrade: websocket" in head.lower():
                    writer.write(SWITCHING)
                    while not reader.at_eof():
                        writer.write(await reader.read(len(BLOCK)))
                elif method == b"PUT":
                    missing = int(re.search(rb"(?i)content-length: ([0-9]+)", head).group(1))
                    while missing:
                        missing -= len(await reader.read(min(missing, len(BLOCK)))) or missing
                    writer.write(OK)
                elif b"/browse/" in path:
                    writer.write(next(browsed))
                else:
                    size = int(path.rpartition(b"/")[2])
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % size
                    writer.write(head + BLOCK[:size])
                    for at in range(len(BLOCK), size, len(BLOCK)):
                        await writer.drain()
                        writer.write(BLOCK[: size - at])
        writer.close()

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(asyncio.start_server(serve, sock=listener, backlog=1024, limit=len(BLOCK)))
    loop.run_forever()


NGINX = """worker_processes 1; daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/log;
events {{ worker_connections 4096; }}
http {{
access_log off; keepalive_requests 1000000000; client_max_body_size 0; client_body_temp_path {scratch}/b;
proxy_temp_path {scratch}/p; fastcgi_temp_path {scratch}/f; uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;
map $http_upgrade $connection_out {{ default upgrade; '' ''; }}
upstream app {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
server {{ listen 127.0.0.1:{port} backlog=1024;
location /proxy/{upstream}/ {{
proxy_pass http://app/; proxy_http_version 1.1; proxy_set_header Host $host; proxy_set_header Upgrade $http_upgrade;
proxy_set_header Connection $connection_out; proxy_buffering off; proxy_request_buffering off;
proxy_buffer_size 64k; proxy_buffers 8 64k; }} }} }}
"""


class BenchProxy:
    """A proxy in a process of its own, and what is measured with it: counts of what it did in how many seconds."""

    def __init__(self, name, upstream, scratch):
        self.name, self.process, self.prefix, self.port = name, None, "/proxy/%d" % upstream, free_port()
        config = Path(scratch) / "nginx.conf"
        config.write_text(NGINX.format(scratch=scratch, port=self.port, upstream=upstream))
        self.command = {
            "port_proxy": [sys.executable, PROGRAM, "--quiet", "--port", str(self.port)],
            "nginx": ["nginx", "-c", str(config), "-p", scratch],
        }[name]
        self.start()

    def start(self):
        """Start it anew, and return how many milliseconds later it answered."""
        self.close()
        begun = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pin(self.process.pid, -1)
        while True:
            with contextlib.suppress(OSError):
                self.wire("/2").close()
                return (time.perf_counter() - begun) * 1000
            assert self.process.poll() is None, "%s does not run" % self.name
            assert time.perf_counter() - begun < WAIT, "%s does not answer" % self.name
            time.sleep(0.001)

    def close(self):
        if self.process:
            self.process.terminate()
            self.process.wait(WAIT)

    def cpu(self):
        """Seconds of processor time that it has taken."""
        fields = Path("/proc/%d/stat" % self.process.pid).read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def request(self, method, path, *lines):
        return request(method, self.prefix + path, *lines).replace(b"here:8888", b"localhost:%d" % self.port)

    def wire(self, path):
        """A connection that has had one response from this path, or a WebSocket if `path` is None."""
        wire = Wire.to(self.port)
        wire.send(self.request("GET", path) if path else self.request("GET", "/", *HANDSHAKE))
        wire.message(no_body=not path)
        return wire

    def idle_kib(self, path, count):
        """KiB that each of `count` idle connections takes of a proxy that has just started."""
        self.start()
        self.wire(path).close()
        with contextlib.ExitStack() as stack:
            before = rss_kib(self.process.pid)
            for _ in range(count):
                stack.enter_context(self.wire(path))
            return (rss_kib(self.process.pid) - before) / count

    def load(self, seconds, connections, messages, end, path="/2"):
        """Send the next of `messages` on each connection as soon as its last answer is whole, which ends with `end`."""
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            for _ in range(connections):
                wire = stack.enter_context(self.wire(path))
                selector.register(wire.sock, selectors.EVENT_READ, wire)
                wire.sock.send(next(messages))
            limit, answers = time.perf_counter() + seconds, connections  # each has had one
            while time.perf_counter() < limit:
                ready = selector.select(WAIT)
                assert ready, "no answer, or another one than expected"
                for wire in [key.data for key, _ in ready]:
                    assert wire.more(), "a connection was closed"
                    if wire.buffer.endswith(end):
                        wire.buffer = b""
                        answers += 1
                        wire.sock.send(next(messages))
        return answers

    def browse(self, seconds):
        return self.load(seconds, 64, browsing(BROWSER_REQUEST, prefix=self.prefix, port=self.port), BROWSED_END)

    def get(self, seconds, connections):
        return self.load(seconds, connections, itertools.repeat(self.request("GET", "/200")), BLOCK[:200])

    def echo(self, seconds):
        return self.load(seconds, 64, itertools.repeat(MESSAGE), MESSAGE, None)

    def connect(self, seconds):
        """Requests on a connection each, one after the other."""
        raw, limit, answers = self.request("GET", "/200", "Connection: close"), time.perf_counter() + seconds, 0
        while time.perf_counter() < limit:
            with Wire.to(self.port) as wire:
                assert len(wire.ask(raw)[2]) == 200
            answers += 1
        return answers

    def download(self, size):
        with Wire.to(self.port) as wire:
            wire.send(self.request("GET", "/%d" % size))
            wire.until(b"\r\n\r\n")
            take_blocks(wire, size)
        return size / 1e6

    def upload(self, size):
        with Wire.to(self.port) as wire:
            wire.send(self.request("PUT", "/", "Content-Length: %d" % size))
            send_blocks(wire, size, [])
            assert wire.message()[2] == b"ok"
        return size / 1e6


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(pid, core):
    """Keep a process on one of the first two processors (0: the load, -1: the measured process), if there are two."""
    if len(CORES) > 1:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(pid, {CORES[:2][core]})


def bench_round(proxies, seconds):
    """Measure all proxies one right after the other; yield (row, name of the proxy, value)."""
    size, clients, websockets = (480 << 20, 1000, 500) if seconds >= 1 else (20 << 20, 50, 50)
    for row, measure, *options in (  # on fresh proxies
        ("start to the first answer: ms", BenchProxy.start),
        ("idle: MiB", lambda proxy: rss_kib(proxy.process.pid) / 1024),
        ("idle kept-alive client: KiB", BenchProxy.idle_kib, "/200", clients),
        ("idle WebSocket: KiB", BenchProxy.idle_kib, None, websockets),
    ):
        for proxy in proxies:
            yield row, proxy.name, measure(proxy, *options)
    for work, rate, cost, measure, *options in (
        ("as a browser, no head twice, 64 connections", "requests/s", "CPU us each", BenchProxy.browse, seconds),
        ("200 B, the same again and again, 64 connections", "requests/s", "CPU us each", BenchProxy.get, seconds, 64),
        ("200 B, 1 connection", "requests/s", "CPU us each", BenchProxy.get, seconds, 1),
        ("200 B, a new connection each", "requests/s", "CPU us each", BenchProxy.connect, seconds),
        ("download", "MB/s", "CPU ms per GB", BenchProxy.download, size),
        ("upload", "MB/s", "CPU ms per GB", BenchProxy.upload, size),
        ("WebSocket, 32 B, 64 connections", "echoes/s", "CPU us each", BenchProxy.echo, seconds),
    ):
        for proxy in proxies:
            before, begun = proxy.cpu(), time.perf_counter()
            count = measure(proxy, *options)
            yield work + ": " + rate, proxy.name, count / (time.perf_counter() - begun)
            yield work + ": " + cost, proxy.name, (proxy.cpu() - before) / max(count, 1) * 1e6


def bench(names, seconds, repeats):
    """Measure again and again, and print a table in Markdown: medians with the least and the most."""
    results = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as listener:
        os.chmod(scratch, 0o755)
        listener.bind(("127.0.0.1", 0))
        pin(0, 0)
        make_process = multiprocessing.get_context("fork").Process
        make_process(target=bench_upstream, args=(listener,), daemon=True).start()
        for _ in range(repeats):
            with contextlib.ExitStack() as stack:
                each = (BenchProxy(name, listener.getsockname()[1], scratch) for name in names)
                proxies = [stack.enter_context(contextlib.closing(proxy)) for proxy in each]
                for row, name, value in bench_round(proxies, seconds):
                    results[row, name].append(value)
    headings = names + ["port_proxy : " + peer for peer in names[1:]]
    print("| work |", " | ".join(headings), "|")
    print("|---" * (1 + len(headings)) + "|")
    for row in dict.fromkeys(row for row, _ in results):
        columns = [results[row, name] for name in names]
        columns += [[ours / theirs for ours, theirs in zip(columns[0], column) if theirs] for column in columns[1:]]
        print("|", row, "|", " | ".join(map(bench_cell, columns)), "|")


def bench_cell(values):
    """The median, the least and the most, with about three digits each."""
    values = ["%.*f" % ((value < 100) + (value < 10), value) for value in sorted(values)]
    return "%s (%s-%s)" % (values[len(values) // 2], values[0], values[-1]) if values else ""


def bench_main():
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Tests are run by pytest; this compares port_proxy with nginx.")
    parser.add_argument("command", choices=["bench"])
    parser.add_argument("--seconds", type=float, default=2, help="length of one measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is measured (default: %(default)s)")
    options = parser.parse_args()
    if not os.path.exists("/proc/self/stat"):
        parser.error("this system has no /proc to read memory and processor time from")
    parts = (sys.version.split()[0], platform.platform(), len(CORES) or os.cpu_count())
    print("CPython %s, %s, %d processors" % parts, flush=True)
    bench(["port_proxy"] + ["nginx"] * bool(shutil.which("nginx")), options.seconds, options.repeats)


if __name__ == "__main__":
    bench_main()
