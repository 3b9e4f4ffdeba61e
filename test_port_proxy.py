"""Tests of port_proxy.py, in the order of its sections; on real sockets and raw bytes where behaviour is on the wire.

Every wait has a bound (`WAIT`), nothing sleeps to pass, and each test leaves its loop without tasks and connections.
"""

import argparse
import ast
import asyncio
import base64
import contextlib
import errno
import functools
import gc
import gzip
import hashlib
import html
import io
import json
import logging
import os
import platform
import random
import re
import select
import selectors
import shlex
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
import types
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

try:
    import pytest
except ImportError:  # `python3 test_port_proxy.py bench` needs none
    if __name__ != "__main__":
        raise
    from unittest.mock import MagicMock

    pytest = MagicMock()

import port_proxy
from port_proxy import (
    CHUNKED,
    LENGTH,
    NO_BODY,
    UNTIL_CLOSE,
    Body,
    Config,
    Framing,
    Hub,
    PortProxy,
    ProxyError,
    RequestHead,
    Route,
    Visit,
    checked_config,
    error_response,
    field_tokens,
    field_values,
    find_route,
    host_form,
    is_allowed,
    is_own_origin,
    is_websocket,
    normal_allowlist,
    normal_base,
    parse_request,
    parse_response,
    port_in_host,
    request_for_upstream,
    request_framing,
    response_for_client,
    response_framing,
    serialise_request,
    serialise_response,
    visit_of,
    wants_html,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
PROGRAM = str(HERE / "port_proxy.py")
WAIT = 30.0
DEFAULT = Config()


# ---------------------------------------------------------------------------------------------------------------------
# Tools: raw connections, upstreams that record what reached them, proxies in a loop of their own
# ---------------------------------------------------------------------------------------------------------------------


class Wire:
    """One end of a raw connection; every read has a bound."""

    def __init__(self, sock):
        sock.settimeout(WAIT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.buffer = b""

    @classmethod
    def to(cls, port):
        return cls(socket.create_connection(("127.0.0.1", port), WAIT))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, *pieces):
        for piece in pieces:
            self.sock.sendall(piece)

    def more(self):
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def until(self, mark):
        """All up to and including `mark`; what came instead, where the peer ends first."""
        while mark not in self.buffer:
            if not self.more():
                data, self.buffer = self.buffer, b""
                return data
        at = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:at], self.buffer[at:]
        return data

    def exactly(self, count):
        while len(self.buffer) < count and self.more():
            pass
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def rest(self):
        """All up to the peer's end; ConnectionResetError if that is no clean one."""
        while self.more():
            pass
        data, self.buffer = self.buffer, b""
        return data

    def message(self, no_body=False, until_close=False):
        """One message: (start line, [(name, value)], body); AssertionError if its framing is broken."""
        head = self.until(b"\r\n\r\n")
        assert head.endswith(b"\r\n\r\n"), "no whole head but %r" % head
        lines = head[:-4].decode("latin-1").split("\r\n")
        fields = [tuple(line.split(": ", 1)) for line in lines[1:]]
        by_name = {name.lower(): value for name, value in fields}
        if no_body:
            body = b""
        elif by_name.get("transfer-encoding") == "chunked":
            body = b""
            while True:
                size = int(self.until(b"\r\n")[:-2], 16)
                body += self.exactly(size)
                assert self.exactly(2) == b"\r\n"
                if not size:
                    break
        elif "content-length" in by_name:
            body = self.exactly(int(by_name["content-length"]))
            assert len(body) == int(by_name["content-length"]), "the body is cut short"
        else:
            body = self.rest() if until_close else b""
        return lines[0], fields, body

    def reset_at_once(self, _):
        self.reset()

    def reset(self):
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
    """A server whose connections are served by `serve(wire, upstream)`, each in a thread of its own.

    messages: the requests that `answering` read; connections: how many were accepted; failures: what `serve` raised.
    """

    def __init__(self, serve, host="127.0.0.1"):
        self.serve = serve
        self.messages = []
        self.connections = 0
        self.failures = []
        self.happened = threading.Event()
        self.let_go = threading.Event()
        self.wires = []
        self.is_closing = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.socket(family)
        self.listener.bind((host, 0))
        self.listener.listen(64)
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            wire = Wire(sock)
            sock.settimeout(4 * WAIT)  # the test itself gives up before
            self.wires.append(wire)
            thread = threading.Thread(target=self._serve, args=(wire,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _serve(self, wire):
        try:
            self.serve(wire, self)
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
    """An event loop in a thread, in which several proxies live; it notes what the loop complains about."""

    def __init__(self, new_loop=port_proxy.new_loop):
        self.complaints = []
        self.loop = new_loop()
        self.loop.set_exception_handler(lambda loop, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT)


class Running:
    """A proxy that accepts connections."""

    def __init__(self, background, **options):
        self.background = background
        options.setdefault("port", 0)
        options.setdefault("allow_hostnames", ("*",))
        self.proxy = background.do(PortProxy(Config(**options)).start())
        self.port = self.proxy.port
        self.streams = self.proxy._around.watch.streams
        self.upstreams = self.proxy._around.upstreams

    def wire(self):
        return Wire.to(self.port)

    def ask(self, raw, **how):
        """The answer to one raw request, on a connection of its own."""
        with self.wire() as wire:
            wire.send(raw)
            return wire.message(**how)

    def get(self, target, *lines, **how):
        return self.ask(request("GET", target, *lines), **how)

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


def narrow(proxy, port):
    """Make the kernel take little at a time on the proxy's connections to `port`, as a slow link would."""
    for stream in list(proxy.streams):
        if stream.transport.get_extra_info("peername")[1] == port:
            stream.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def request(method, target, *lines, body=b""):
    return "\r\n".join(("%s %s HTTP/1.1" % (method, target), "Host: here:8888") + lines + ("", "")).encode("latin-1") + body


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def eventually(condition):
    """Wait until `condition()` is true, at most WAIT seconds."""
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit, "this did not come about"
        time.sleep(0.01)


def running_loop(new_loop=port_proxy.new_loop):
    background = Background(new_loop)
    yield background
    tasks = background.do(_other_tasks())
    background.close()
    assert not tasks


@pytest.fixture(scope="session")
def background():
    yield from running_loop()


async def _other_tasks():
    all_tasks = getattr(asyncio, "all_tasks", None) or asyncio.Task.all_tasks
    current = getattr(asyncio, "current_task", None) or asyncio.Task.current_task
    return [task for task in all_tasks() if task is not current() and not task.done()]


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
        assert not running.streams
    complaints, background.complaints[:] = list(background.complaints), []
    assert not complaints


@pytest.fixture
def proxy(start):
    return start()


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
    for one in started:
        assert not one.failures


def case_id(case):
    return re.sub(r"[^ -~]", ".", repr(case))[:60]


def status_of_error(call, *arguments):
    with pytest.raises(ProxyError) as caught:
        call(*arguments)
    assert caught.value.detail.endswith(".")
    return caught.value.status


# ---------------------------------------------------------------------------------------------------------------------
# The file as a whole
# ---------------------------------------------------------------------------------------------------------------------


class TestFile:
    def test_sections_go_bottom_up(self):
        """No module-level name is used, not even inside a function, in a section above the one that defines it."""
        source = Path(PROGRAM).read_text(encoding="utf-8")
        borders = [n for n, line in enumerate(source.split("\n"), 1) if line.startswith("# ----")][::2]
        assert len(borders) >= 12

        def section(line):
            return sum(border <= line for border in borders)

        defined = {}
        tree = ast.parse(source)
        for node in tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]
            for name in names + [getattr(node, "name", None)]:
                if name:
                    defined[name] = section(node.lineno)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in defined:
                assert defined[node.id] <= section(node.lineno), "line %d uses %s" % (node.lineno, node.id)

    def test_docstring_lists_the_sections(self):
        source = Path(PROGRAM).read_text(encoding="utf-8")
        titles = re.findall(r"^# -{20,}\n# ([A-Za-z ]+?)(?:[:,].*)?\n# -{20,}$", source, re.M)
        listed = re.search(r"names above it: ([a-z, \n]+)\.", port_proxy.__doc__).group(1)
        assert [title.lower() for title in titles] == [name.strip() for name in listed.replace("\n", " ").split(",")]

    def test_import_is_the_standard_library_and_does_nothing(self):
        code = (
            "import sys, threading, logging; sys.path.insert(0, %r); before = set(sys.modules); import port_proxy\n"
            "new = [m for m in set(sys.modules) - before - {'port_proxy'} if 'site-packages' in (getattr(sys.modules[m], '__file__', '') or '')]\n"
            "assert not new, new; assert threading.active_count() == 1; assert not logging.getLogger('port_proxy').handlers\n"
        ) % str(HERE)
        done = subprocess.run([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=WAIT)
        assert (done.returncode, done.stdout) == (0, b"")

    def test_readme_tells_the_options_and_their_defaults(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        for name, _, _ in port_proxy._LIMITS:
            row = re.search(r"^\| `--%s` \|.*\| ([0-9.]+) \|$" % name.replace("_", "-"), readme, re.M)
            assert row, "no row for " + name
            assert float(row.group(1)) == getattr(DEFAULT, name)
        options = re.findall(r"^  (--[a-z-]+)", port_proxy._parser().format_help(), re.M)
        assert len(options) > 10
        assert [option for option in options if "`%s" % option not in readme] == []

    def test_all(self):
        assert set(port_proxy.__all__) == {"Config", "PortProxy", "ProxyError", "main"}
        assert all(getattr(port_proxy, name).__doc__ for name in port_proxy.__all__)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


    def test_what_the_readme_says_to_embed_runs(self):
        code = re.search(r"## Embedding.*?```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
        if sys.version_info < (3, 7):
            code = re.sub(r"asyncio\.run\(serve\(\)\)  # Python 3\.6: ", "", code)
        done = subprocess.run([sys.executable, "-c", code.replace("sleep(3600)", "sleep(0)")], cwd=str(HERE), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT)
        assert re.fullmatch(rb"http://127\.0\.0\.1:(\d+)/proxy/ \1\r?\n", done.stdout)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_the_readme_names_every_field_that_is_not_called_as_its_option(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        embedding = readme[readme.index("## Embedding") :]
        options = {action.dest for action in port_proxy._parser()._actions}
        for name in set(Config._fields) - options - {"hub"}:
            assert name + "`" in embedding or name + "=" in embedding


class TestConfig:
    @pytest.mark.parametrize(
        "given, normal",
        [("/proxy", "/proxy"), ("/proxy/", "/proxy"), ("/", ""), ("", ""), ("/user/ana/proxy", "/user/ana/proxy"), ("/user/al%40ice", "/user/al%40ice")],
    )
    def test_base(self, given, normal):
        assert checked_config(Config(base=given)).base == normal
        assert normal_base(given) == normal

    @pytest.mark.parametrize(
        "options",
        [
            {"base": "proxy"}, {"base": "/a//b"}, {"base": "//"}, {"base": "/a/../b"}, {"base": "/a/%2E"}, {"base": "/a b"}, {"base": "/a?b"},
            {"base": "/a\r\nX: y"}, {"base": "/ä"}, {"port": -1}, {"port": 65536}, {"head_timeout": 0}, {"max_fields": -1},
            {"head_timeout": float("nan")}, {"host_allowlist": "a.example.org"}, {"host_allowlist": ["a b"]}, {"host_allowlist": [""]},
            {"host_allowlist": ["a:80"]}, {"host_allowlist": ["user@host"]}, {"host_allowlist": ["a[bc]d"]},
            {"allow_hostnames": "*.example.org"}, {"allow_origins": "*"}, {"trusted_proxies": "unix"}, {"upstream_tls": "8443"}, {"trusted_proxies": ["a"]}, {"base": "/a;b"},
            {"keyfile": "a"}, {"token": "a b"}, {"token": "\xe4"}, {"host_allowlist": ["[::1"]}, {"host_allowlist": ["::1]"]}, {"domains": ["127.0.0.1"]},
        ],
        ids=case_id,
    )  # fmt: skip
    def test_refused(self, options):
        with pytest.raises(ValueError):
            PortProxy(Config(**options))

    @pytest.mark.parametrize(
        "field, value, says",
        [
            ("port", "80", "a whole number, not str"), ("port", True, "a whole number, not bool"), ("port", 80.0, "a whole number, not float"), ("port", None, "a whole number, not NoneType"),
            ("head_timeout", "3", "a number, not str"), ("head_timeout", True, "a number, not bool"), ("bind", None, "a string, not NoneType"), ("base", b"/a", "a string, not bytes"),
            ("whole_origin", "no", "True or False, not str"), ("preserve_host", 1, "True or False, not int"), ("any_owner", None, "True or False, not NoneType"),
            ("token", 5, "a string, not int"), ("certfile", 5, "a path, not int"), ("authorize", "me", "an asynchronous callable, not str"), ("hub", {}, "a Hub, not dict"),
            ("upstream_tls", (8443,), "a sequence of strings, not tuple"), ("domains", None, "a sequence of strings, not NoneType"), ("allow_origins", "*", "a sequence of strings, not str"),
            ("host_allowlist", [b"a"], "a sequence of strings, not list"), ("trusted_proxies", 1, "a sequence of strings, not int"),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_kinds_of_values(self, field, value, says):
        """A mistake of a program is told as one, in place of going unnoticed: whole_origin="no" would mean yes."""
        with pytest.raises(ValueError) as caught:
            PortProxy(Config(**{field: value}))
        assert str(caught.value) == "%s must be %s" % (field, says)

    def test_kinds_that_will_do(self):
        PortProxy(Config(head_timeout=3, host_allowlist=["a"], domains={"b"}, authorize=print, whole_origin=True, certfile=Path("a"), token="x"))
        assert checked_config(Config(host_allowlist=["[FE80::1]", "a"])).host_allowlist == ("fe80::1", "a")

    def test_every_limit_is_an_option(self):
        named = {name for name, _, _ in port_proxy._LIMITS}
        assert named == {name for name in Config._fields if name.startswith("max_") or name.endswith("_timeout")}


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------

GOOD_REQUESTS = [
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", RequestHead("GET", "/", "a", "1.1", (("Host", "a"),))),
    (b"GET / HTTP/1.0\r\n\r\n", RequestHead("GET", "/", "", "1.0", ())),
    (b"get /%2F//a?b=%20|{}^`\"\\ HTTP/1.1\r\nhOsT:a:80\r\n\r\n", RequestHead("get", "/%2F//a?b=%20|{}^`\"\\", "a:80", "1.1", (("hOsT", "a:80"),))),
    (b"OPTIONS * HTTP/1.1\r\nHost: [::1]:8888\r\n\r\n", RequestHead("OPTIONS", "*", "[::1]:8888", "1.1", (("Host", "[::1]:8888"),))),
    (b"GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n", RequestHead("GET", "/x?y", "b:1", "1.1", (("Host", "a"),))),
    (b"GET HTTPS://b HTTP/1.1\r\nHost: a\r\n\r\n", RequestHead("GET", "/", "b", "1.1", (("Host", "a"),))),
    (b"GET http://b?q=/ HTTP/1.1\r\nHost: a\r\n\r\n", RequestHead("GET", "/?q=/", "b", "1.1", (("Host", "a"),))),
    (b"OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n", RequestHead("OPTIONS", "*", "b", "1.1", (("Host", "a"),))),
    (
        b"M-SEARCH / HTTP/1.1\r\nHost: \t a \t\r\nX:\r\nx: b\xe4\xff \tc\r\n!#$%&'*+-.^_`|~1: y\r\n\r\n",
        RequestHead("M-SEARCH", "/", "a", "1.1", (("Host", "a"), ("X", ""), ("x", "b\xe4\xff \tc"), ("!#$%&'*+-.^_`|~1", "y"))),
    ),
]
BAD_REQUESTS = [
    (400, b"GET /\r\n\r\n"), (505, b"GET / HTTP/0.9\r\nHost: a\r\n\r\n"), (505, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\n"), (505, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"), (400, b"GET / HTTP/1.1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET / http/1.1\r\nHost: a\r\n\r\n"), (400, b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET /  HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n"), (400, b" GET / HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1.\xb2\r\nHost: a\r\n\r\n"), (400, b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"\xc7ET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /\xe4 HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET a HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n"), (400, b"GET http://u:p@a:1/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (405, b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"), (400, b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"), (400, b"GET / HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: ::1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: \xe4\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a<script>\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost\t: a\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\n: x\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\n X: y\r\n\r\n"), (400, b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\tz\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x0bb\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\nb: c\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\nX\xe4: b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX(: b\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n"), (400, b"GET / HTTP/1.1\rHost: a\r\n\r\n"),
    (414, b"GET /" + b"a" * DEFAULT.max_target_bytes + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * DEFAULT.max_fields + b"\r\n"),
]  # fmt: skip
GOOD_RESPONSES = [
    (b"HTTP/1.1 200 OK\r\n\r\n", (200, "OK", "1.1", ())),
    (b"HTTP/1.0 404 \r\nA: b\r\n\r\n", (404, "", "1.0", (("A", "b"),))),
    (b"HTTP/1.1 599\r\n\r\n", (599, "", "1.1", ())),
    (b"HTTP/1.1 200 Sch\xf6n \t ja\r\n\r\n", (200, "Sch\xf6n \t ja", "1.1", ())),
]
BAD_RESPONSES = [
    b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 099 OK\r\n\r\n", b"HTTP/1.1  200 OK\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/2.0 200 OK\r\n\r\n", b"HTTP/1.2 200 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n", b"http/1.1 200 OK\r\n\r\n", b"HTTP/1.1 +20 OK\r\n\r\n",
    b"HTTP/1.1 2\xb20 OK\r\n\r\n", b"HTTP/1.1 200 O\x00K\r\n\r\n", b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    b"<h1>\r\n\r\n", b"\r\n\r\n", b"HTTP/1.1 200 OK\nA: b\n\n\r\n\r\n",
]  # fmt: skip


class TestHeads:
    @pytest.mark.parametrize("raw, head", GOOD_REQUESTS, ids=case_id)
    def test_request(self, raw, head):
        assert parse_request(raw, DEFAULT) == head

    @pytest.mark.parametrize("status, raw", BAD_REQUESTS, ids=case_id)
    def test_request_refused(self, status, raw):
        assert status_of_error(parse_request, raw, DEFAULT) == status

    @pytest.mark.parametrize("raw, head", GOOD_RESPONSES, ids=case_id)
    def test_response(self, raw, head):
        assert parse_response(raw, DEFAULT) == head

    @pytest.mark.parametrize("raw", BAD_RESPONSES, ids=case_id)
    def test_response_refused(self, raw):
        assert status_of_error(parse_response, raw, DEFAULT) == 400

    def test_serialise_is_the_inverse_of_parse(self):
        for _, head in GOOD_REQUESTS:
            again = parse_request(serialise_request(head), DEFAULT)
            assert again == head._replace(authority=again.authority)  # that of the absolute form is not sent on
        for _, (status, reason, version, fields) in GOOD_RESPONSES:
            head = port_proxy.ResponseHead(status, reason, version, fields)
            assert parse_response(serialise_response(head), DEFAULT) == head._replace(version="1.1")

    def test_field_lookup(self):
        fields = (("A", "1, b"), ("B", "2"), ("a", "C ,,"))
        assert field_values(fields, "a") == ["1, b", "C ,,"]
        assert field_tokens(fields, "a") == {"1", "b", "c", ""}

    def test_long_garbage_is_refused_in_linear_time(self):
        """Patterns with two ways to match the same text would take minutes for these."""
        for filler in (b" ", b"\t", b"a", b"a:", b",", b";", b"/", b"\r\nA: b", b"."):
            long = filler * (60000 // len(filler))
            for raw in (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + long + b"\x00\r\n\r\n", b"GET " + long + b"\x00 HTTP/1.1\r\n\r\n", long + b"\x00\r\n\r\n"):
                begun = time.process_time()
                assert status_of_error(parse_request, raw, DEFAULT) in (400, 431)
                assert time.process_time() - begun < 2

    def test_garbage_gives_a_head_or_a_refusal(self):
        chance = random.Random(20261123)
        alphabet = b"\r\n\t :/?%.0159aHT\x00\x7f\xe4\xff"
        for _ in range(20000):
            raw = bytearray(chance.choice(GOOD_REQUESTS)[0])
            for _ in range(chance.randrange(1, 5)):
                at = chance.randrange(len(raw) + 1)
                raw[at : at + chance.randrange(3)] = bytes(chance.choice(alphabet) for _ in range(chance.randrange(3)))
            raw = bytes(raw) + b"\r\n\r\n"
            raw = raw[: raw.index(b"\r\n\r\n") + 4]
            for parse in (parse_request, parse_response):
                try:
                    head = parse(raw, DEFAULT)
                except ProxyError as error:
                    assert 400 <= error.status <= 505
                else:
                    text = "".join(name + value for name, value in head.fields)
                    assert not re.search("[\x00\r\n]", text)


class TestHeadsOnTheWire:
    @pytest.mark.parametrize("status, raw", BAD_REQUESTS, ids=case_id)
    def test_refused_and_closed(self, proxy, status, raw):
        """One answer, then the end: what follows a bad head is never parsed."""
        with proxy.wire() as wire:
            wire.send(raw.replace(b"\r\n", b"", 1) if raw.startswith(b"\r\n") else raw)
            answer = wire.message()
            if not raw.startswith(b"\r\n"):
                assert status_of(answer) == status
                assert fields_of(answer)["connection"] == "close"
                with contextlib.suppress(OSError):
                    wire.send(request("GET", "/proxy/"))
                assert wire.rest() == b""

    @pytest.mark.parametrize(
        "raw, status",
        [
            (b"GET / HTTP/1.1\nHost: a\n\n", 400), (b"GET /\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00", 400), (b"GET / HTTP/1.1\r\nX: a\rb", 400),
            (b"GET / HTTP/1.1\r\nX: a\x00", 400), (b"PRI * HTTP/2.0\r\n", 505), (b"\r\n\r\n\r\n", 400), (b"\n", 400),
            (b"GET /" + b"a" * 20000, 414), (b"GET / HTTP/1.1\r\nX: " + b"a" * 70000, 431), (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12000, 431),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_refused_as_soon_as_it_is_wrong(self, proxy, raw, status):
        """The head is never finished, and no deadline is waited for."""
        with proxy.wire() as wire:
            wire.send(raw)
            assert status_of(wire.message()) == status
            wire.end()
            assert wire.rest() == b""

    def test_one_or_two_leading_empty_lines(self, proxy):
        for empty in (b"\r\n", b"\r\n\r\n"):
            assert status_of(proxy.ask(empty + request("GET", "/proxy/"))) == 200

    def test_byte_by_byte(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            for octet in b"\r\n" + request("POST", "/proxy/%d/a" % app.port, "Content-Length: 3", body=b"abc"):
                wire.send(bytes([octet]))
            assert wire.message()[2] == b"ok"
        assert app.messages[0][0] == "POST /a HTTP/1.1"
        assert app.messages[0][2] == b"abc"

    def test_head_that_ends_early(self, proxy):
        with proxy.wire() as wire:
            wire.send(b"GET / HTTP/1.1\r\nHo")
            wire.end()
            assert status_of(wire.message()) == 400
            assert wire.rest() == b""

    def test_options_asterisk(self, proxy):
        assert status_of(proxy.ask(request("OPTIONS", "*"), no_body=True)) == 204


# ---------------------------------------------------------------------------------------------------------------------
# Framing
# ---------------------------------------------------------------------------------------------------------------------

FRAMINGS = [
    ("1.1", [], NO_BODY), ("1.1", [("Content-Length", "0")], Framing(LENGTH, 0)), ("1.0", [("Content-Length", "17")], Framing(LENGTH, 17)),
    ("1.1", [("content-length", "5"), ("Content-Length", "5")], Framing(LENGTH, 5)), ("1.1", [("Content-Length", "5, 5")], Framing(LENGTH, 5)),
    ("1.1", [("Content-Length", "9" * 18)], Framing(LENGTH, 10**18 - 1)), ("1.1", [("Transfer-Encoding", "Chunked")], Framing(CHUNKED)),
]  # fmt: skip
BAD_FRAMINGS = [
    (400, "1.1", [("Content-Length", value)])
    for value in ("", "+5", "-1", "5 5", "0x5", "5_0", "5.0", "٥", "\xb2", "1" * 19, "5, 6", "5,", ",5", "5;", "5, 05", "\xa05")
] + [
    (400, "1.1", [("Content-Length", "5"), ("Content-Length", "6")]), (400, "1.1", [("Content-Length", "5"), ("Transfer-Encoding", "chunked")]),
    (400, "1.1", [("Transfer-Encoding", "chunked"), ("Content-Length", "0")]), (400, "1.0", [("Transfer-Encoding", "chunked")]),
    (400, "1.1", [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")]), (501, "1.1", [("Transfer-Encoding", "gzip, chunked")]),
    (501, "1.1", [("Transfer-Encoding", "chunked, chunked")]), (501, "1.1", [("Transfer-Encoding", "identity")]), (501, "1.1", [("Transfer-Encoding", "")]),
    (501, "1.1", [("Transfer-Encoding", "xchunked")]), (501, "1.1", [("Transfer-Encoding", "chunked;q=1")]), (501, "1.1", [("Transfer-Encoding", "\x0bchunked")]),
]  # fmt: skip
CHUNKED_BODIES = [
    (b"0\r\n\r\n", b""), (b"3\r\nabc\r\n0\r\n\r\n", b"abc"), (b"1\r\na\r\n0002\r\nbc\r\n000\r\n\r\n", b"abc"), (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    (b'3;a;b=c;d="e;\\"f" ; g = h\r\nabc\r\n0;x\r\n\r\n', b"abc"), (b"3\r\nabc\r\n0\r\nX: y\r\nZ:\r\n\r\n", b"abc"),
    (b"0000000000000003\r\na\r\n\r\n0\r\n\r\n", b"a\r\n"), (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
]  # fmt: skip
BAD_CHUNKED_BODIES = [
    b"\r\n", b"g\r\n", b"-1\r\na", b"+1\r\na", b"0x1\r\na", b" 1\r\na", b"1 \r\na\r\n", b"1_0\r\n", b"\xb2\r\n", b"00000000000000001\r\na",
    b"1\na\r\n", b"1\ra\r\n", b"1;\r\na", b"1;a=\r\nb", b"1;a=\"\r\nb", b"1;a\x00\r\nb", b"1;a\rb\r\n", b"1\r\nab\r\n", b"1\r\na\n0\r\n\r\n", b"1\r\na\r0",
    b"1\r\na0\r\n\r\n", b"0\r\nX\r\n\r\n", b"0\r\n X: y\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\nX: \x00\r\n\r\n", b"0\r\nX: y\n\r\n", b"0\n\n",
    b"1;" + b"a" * 5000, b"1;" + b"a" * 5000 + b"\r\na\r\n", b"0\r\n" + b"X: y\r\n" * 5000, b"0\r\nX: " + b"y" * 20000, b"zz", b"12345678901234567", b"1000000000000000\r\n", b"ffffffffffffffff\r\n", b"8000000000000001\r\na\r\n",
]  # fmt: skip


def chunk(data):
    """A chunk that holds `data`, or the last chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def decode(framing, pieces, in_chunks=False):
    """The body that the pieces make and what is left behind it; ProxyError as `Body` raises it; None if it is not whole."""
    stream = port_proxy.Stream(None)
    body = Body(stream, framing, DEFAULT, in_chunks)
    data = b""
    for piece in pieces:
        stream.data_received(piece)
        data += body.at_hand()
    return (data, stream.buffer) if body.finished else None


def feedings(raw):
    """The same bytes whole, byte by byte, and with another message right behind them."""
    yield [raw], b""
    yield [raw[at : at + 1] for at in range(len(raw))], b""
    yield [raw + b"GET /"], b"GET /"


class TestFraming:
    @pytest.mark.parametrize("version, fields, framing", FRAMINGS, ids=case_id)
    def test_declared(self, version, fields, framing):
        assert request_framing(RequestHead("DELETE", "/", "a", version, tuple(fields))) == framing
        response = port_proxy.ResponseHead(200, "", version, tuple(fields))
        assert response_framing("GET", response) == (framing if framing != NO_BODY else Framing(UNTIL_CLOSE))
        assert response_framing("HEAD", response) == NO_BODY
        for status in (100, 103, 204, 304):
            assert response_framing("GET", response._replace(status=status)) == NO_BODY

    @pytest.mark.parametrize("status, version, fields", BAD_FRAMINGS, ids=case_id)
    def test_refused(self, status, version, fields):
        assert status_of_error(request_framing, RequestHead("GET", "/", "a", version, tuple(fields))) == status
        assert status_of_error(response_framing, "GET", port_proxy.ResponseHead(200, "", version, tuple(fields))) == status

    @pytest.mark.parametrize("raw, data", CHUNKED_BODIES, ids=case_id)
    def test_chunked(self, raw, data):
        for pieces, behind in feedings(raw):
            assert decode(Framing(CHUNKED), pieces) == (data, behind)
        assert decode(Framing(CHUNKED), [raw[:-1]]) is None

    @pytest.mark.parametrize("raw", BAD_CHUNKED_BODIES, ids=case_id)
    def test_chunked_refused(self, raw):
        for pieces in ([raw], [raw[at : at + 1] for at in range(len(raw))]):
            assert status_of_error(decode, Framing(CHUNKED), pieces) == 400

    def test_length(self):
        for pieces, behind in feedings(b"abc"):
            assert decode(Framing(LENGTH, 3), pieces) == (b"abc", behind)
        assert decode(Framing(LENGTH, 4), [b"abc"]) is None
        assert decode(Framing(LENGTH, 0), [b"abc"]) == (b"", b"abc")
        assert decode(NO_BODY, [b"abc"]) == (b"", b"abc")

    def test_chunked_as_it_is_sent_on(self):
        """The same body in the same chunks, and nothing but what was understood; as soon as it has come."""
        for raw, data in CHUNKED_BODIES:
            for pieces, behind in feedings(raw):
                anew, left = decode(Framing(CHUNKED), pieces, in_chunks=True)
                assert left == behind
                assert decode(Framing(CHUNKED), [anew]) == (data, b"")
                assert re.fullmatch(rb"(?:(?:[1-9a-f][0-9a-f]*)\r\n(?s:.)*\r\n)?0\r\n\r\n", anew)
                assert not {b";", b"X", b"Z"} & {anew[at : at + 1] for at in range(len(anew))}

    @pytest.mark.parametrize("raw, sent", [
        (b"3;a=b\r\nabc\r\n01\r\nd\r\n0\r\nX: y\r\n\r\n", b"3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"), (b"A\r\n0123456789\r\n00;x\r\n\r\n", b"a\r\n0123456789\r\n0\r\n\r\n"),
        (b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n", b"2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n"), (b"0\r\nX: y\r\nZ: w\r\n\r\n", b"0\r\n\r\n"),
    ])  # fmt: skip
    def test_chunks_in_canonical_form(self, raw, sent):
        for pieces, behind in feedings(raw):
            assert decode(Framing(CHUNKED), pieces, in_chunks=True) == (sent, behind)

    @pytest.mark.parametrize("line, sent", [
        (b"3", b"3"), (b"03", b"3"), (b"3;x", b"3"), (b"+3", None), (b" 3", None), (b"3 ", None), (b"0x3", None), (b"0_3", None), (b"-3", None), (b"\xb3", None), (b"3\n", None), (b"\t3", None), (b"", None), (b"4", None), (b"2", None),
    ])  # fmt: skip
    @pytest.mark.parametrize("in_chunks", [True, False])
    def test_a_chunk_that_comes_alone(self, line, sent, in_chunks):
        """As an app's events do; that is no reason to look at it less closely."""
        pieces = [line + b"\r\nabc\r\n", b"0\r\n\r\n"]
        if sent is None:
            assert status_of_error(decode, Framing(CHUNKED), pieces, in_chunks) == 400
        else:
            assert decode(Framing(CHUNKED), pieces, in_chunks) == (sent + b"\r\nabc\r\n0\r\n\r\n" if in_chunks else b"abc", b"")

    @pytest.mark.parametrize("size", [1, 15, 16, 17, 254, 255, 256, 4093, 4094, 4095, 4096, 65535, 65536])
    @pytest.mark.parametrize("in_chunks", [True, False])
    def test_a_chunk_of_any_size_that_comes_alone(self, size, in_chunks):
        end = b"0\r\n\r\n"
        data = (b"\n\r" * size)[:size]
        whole = b"%x\r\n" % size + data
        assert decode(Framing(CHUNKED), [whole + b"\r\n", end], in_chunks) == (whole + b"\r\n" + end if in_chunks else data, b"")
        for wrong in (whole + b"\r\n\r\n", whole + b"\n\r\n", whole[:-1] + b"\r\n", whole + b"x\r\n", whole + b"x\n"):
            assert status_of_error(decode, Framing(CHUNKED), [wrong, end, end], in_chunks) == 400

    @pytest.mark.parametrize("end", ["refusal", "failure", "body", "malformed"])
    def test_pieces_are_passed_on_as_they_come(self, background, end):
        """At once, and not to whom has had enough; with every one there is as much time again."""

        hours = iter(range(100))

        class Stream(port_proxy.Stream):
            pull = None
            now = staticmethod(lambda: 3600.0 * next(hours))

        async def talk():
            stream = Stream(types.SimpleNamespace(loop=asyncio.get_event_loop()))
            body = Body(stream, Framing(CHUNKED), DEFAULT)
            got, deadlines = [], []

            def use(data):
                got.append(data)
                if end == "failure":
                    raise ProxyError(400, "No.")
                return len(got) < 2

            waiting = asyncio.ensure_future(body.pass_on(use, 1800.0))
            await asyncio.sleep(0)
            for piece in (b"1\r", b"\na\r\n", {"body": b"0\r\n\r\n", "malformed": b"+1\r\n"}.get(end, b"1\r\nb\r\n")):
                if not waiting.done() and not (end == "failure" and got):
                    deadlines.append(stream.read_deadline)
                stream.data_received(piece)
            at_once = list(got)
            outcome = await asyncio.gather(waiting, return_exceptions=True)
            stream.data_received(b"1\r\nc\r\n")
            await asyncio.sleep(0)
            return at_once == got, got, [getattr(one, "status", None) for one in outcome], deadlines == sorted(set(deadlines)), stream.read_deadline

        got, status, is_renewed = {
            "refusal": ([b"a", b"b"], None, True), "failure": ([b"a"], 400, True), "body": ([b"a"], None, True), "malformed": ([b"a"], 400, True),
        }[end]  # fmt: skip
        assert background.do(talk()) == (True, got, [status], is_renewed, port_proxy.FOREVER)

    @pytest.mark.parametrize("framing, last", [
        (Framing(LENGTH, 7), b"hello"), (Framing(CHUNKED), b"5\r\nhello\r\n0\r\n\r\n"), (Framing(CHUNKED), b"5\r\nhello\r\n"),
        (Framing(UNTIL_CLOSE), b"hello"), (Framing(LENGTH, 8), b"hello"),
    ])  # fmt: skip
    @pytest.mark.parametrize("failure", [None, ConnectionResetError()])
    def test_the_last_piece_and_the_end_come_at_once(self, background, framing, last, failure):
        """As they do over TLS: whoever waits in a task of asyncio's has the piece first, then learns what the end means."""

        async def talk():
            stream = port_proxy.Stream(types.SimpleNamespace(loop=asyncio.get_event_loop()))
            stream.pull = None
            stream.data_received(b"2\r\na \r\n" if framing.kind == CHUNKED else b"a ")
            body, got = Body(stream, framing, DEFAULT), []

            async def read():
                try:
                    while not body.finished:
                        got.append(await body.read())
                except Exception as error:
                    got.append(type(error))

            waiting = asyncio.ensure_future(read())
            await asyncio.sleep(0)
            stream.data_received(last)
            stream.end(failure)
            await waiting
            return got

        is_whole = framing in (Framing(LENGTH, 7), Framing(UNTIL_CLOSE)) or last.endswith(b"0\r\n\r\n")
        end = [type(failure or port_proxy.Truncated())]
        if framing.kind == UNTIL_CLOSE:
            end = [b""] if failure is None else end
            is_whole = False
        assert background.do(talk()) == [b"a ", b"hello"] + ([] if is_whole else end)

    def test_a_part_of_a_chunk_is_not_held_back(self):
        stream = port_proxy.Stream(None)
        body = Body(stream, Framing(CHUNKED), DEFAULT, in_chunks=True)
        given = []
        for piece in (b"5", b"\r\n", b"ab", b"cde\r", b"\n0", b"\r\n\r", b"\nGET"):
            stream.data_received(piece)
            given.append(body.at_hand())
        assert given == [b"", b"5\r\n", b"ab", b"cde", b"\r\n", b"0\r\n", b"\r\n"]
        assert (body.count, body.finished, stream.buffer) == (5, True, b"GET")

    def test_chunked_pieces_of_any_size(self):
        chance = random.Random(9)
        for _ in range(300):
            pieces = [bytes(chance.randrange(256) for _ in range(chance.randrange(1, 40))) for _ in range(chance.randrange(5))]
            raw = b"".join(map(chunk, pieces)) + chunk(b"")
            cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(4))
            split = [raw[a:b] for a, b in zip([0] + cuts, cuts + [len(raw)])]
            assert decode(Framing(CHUNKED), split) == (b"".join(pieces), b"")
            assert decode(Framing(CHUNKED), [decode(Framing(CHUNKED), split, in_chunks=True)[0]]) == (b"".join(pieces), b"")

    def test_garbage_gives_a_body_or_a_refusal(self):
        chance = random.Random(20261124)
        for _ in range(20000):
            raw = bytearray(chance.choice(CHUNKED_BODIES)[0])
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(raw) + 1)
                raw[at : at + chance.randrange(2)] = bytes(chance.choice(b"\r\n0123aF;=\" x\x00\xff") for _ in range(chance.randrange(3)))
            outcomes = []
            for pieces in ([bytes(raw)], [bytes(raw[at : at + 1]) for at in range(len(raw))]):
                try:
                    outcomes.append(decode(Framing(CHUNKED), pieces))
                except ProxyError as error:
                    outcomes.append(error.status)
            if None not in outcomes:  # a line that is not whole may be refused early or late
                assert outcomes[0] == outcomes[1], bytes(raw)


class TestFramingOnTheWire:
    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "GET", "PROPFIND", "FROB"])
    def test_framing_upstream_is_ours(self, proxy, upstream, method):
        app = upstream(answering(OK))
        target = "/proxy/%d/" % app.port
        with proxy.wire() as wire:
            wire.send(request(method, target, "content-LENGTH: 03", "Content-Length:03", body=b"abc"))
            assert wire.message()[2] == b"ok"
            wire.send(request(method, target, "Transfer-Encoding: CHUNKED", "Trailer: X", body=b"3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n"))
            assert wire.message()[2] == b"ok"
            wire.send(request(method, target, "Content-Length: 0"))
            assert wire.message()[2] == b"ok"
            wire.send(request(method, target))
            assert wire.message()[2] == b"ok"
        declared = [[(n, v) for n, v in message[1] if n.lower() in ("content-length", "transfer-encoding", "trailer")] for message in app.messages]
        assert declared == [[("Content-Length", "3")], [("Transfer-Encoding", "chunked")], [("Content-Length", "0")], []]
        assert [message[2] for message in app.messages] == [b"abc", b"abc", b"", b""]

    @pytest.mark.parametrize("status, version, fields", [case for case in BAD_FRAMINGS if "٥" not in case[2][0][1]], ids=case_id)
    def test_refused_and_closed(self, proxy, upstream, status, version, fields):
        app = upstream(answering(OK))
        lines = "".join("%s: %s\r\n" % field for field in fields)
        smuggled = b"GET /proxy/%d/smuggled HTTP/1.1\r\nHost: a\r\n\r\n" % app.port
        with proxy.wire() as wire:
            head = "POST /proxy/%d/ HTTP/%s\r\nHost: a\r\n%s\r\n" % (app.port, version, lines)
            wire.send(head.encode("latin-1") + b"0\r\n\r\n" + smuggled)
            assert status_of(wire.message()) in (status, 400)
            wire.end()
            assert wire.rest() == b""
        assert app.connections == 0

    @pytest.mark.parametrize("raw", BAD_CHUNKED_BODIES, ids=case_id)
    def test_bad_chunks_are_refused(self, proxy, upstream, raw):
        """Whether the chunk is wrong at once or behind good ones: 400, and the upstream never sees a whole body."""
        for before in (b"", b"3\r\nabc\r\n"):
            seen = []

            def serve(wire, app, seen=seen):
                seen.append(wire.rest())

            app = upstream(serve)
            with proxy.wire() as wire:
                head = request("POST", "/proxy/%d/" % app.port, "Transfer-Encoding: chunked")
                wire.send(head, before, raw)
                assert status_of(wire.message()) == 400
                wire.end()
                assert wire.rest() == b""
            eventually(lambda app=app, seen=seen: len(seen) == app.connections)
            assert all(not got.endswith(b"\r\n0\r\n\r\n") for got in seen)


# ---------------------------------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------------------------------

ROUTES = [
    ("/proxy", "/proxy/8080/a/b?q", ("localhost", 8080, "/proxy/8080", False, "/a/b", "?q"), "/a/b?q"),
    ("/proxy", "/proxy/8080", ("localhost", 8080, "/proxy/8080", False, "", ""), "/"),
    ("/proxy", "/proxy/8080?q=/x", ("localhost", 8080, "/proxy/8080", False, "", "?q=/x"), "/?q=/x"),
    ("/proxy", "/proxy/1/", ("localhost", 1, "/proxy/1", False, "/", ""), "/"),
    ("/proxy", "/proxy/65535/%2F//..%2f/%20?", ("localhost", 65535, "/proxy/65535", False, "/%2F//..%2f/%20", "?"), "/%2F//..%2f/%20?"),
    ("/proxy", "/proxy/8080//a/./b/../c", ("localhost", 8080, "/proxy/8080", False, "//a/./b/../c", ""), "//a/./b/../c"),
    ("/proxy", "/proxy/absolute/8080/a?q", ("localhost", 8080, "/proxy/absolute/8080", True, "/a", "?q"), "/proxy/absolute/8080/a?q"),
    ("/proxy", "/proxy/absolute/8080", ("localhost", 8080, "/proxy/absolute/8080", True, "", ""), "/proxy/absolute/8080"),
    ("/proxy", "/proxy/DB1.example.org:81/a", ("db1.example.org", 81, "/proxy/DB1.example.org:81", False, "/a", ""), "/a"),
    ("/proxy", "/proxy/absolute/h_1-x:81/a", ("h_1-x", 81, "/proxy/absolute/h_1-x:81", True, "/a", ""), "/proxy/absolute/h_1-x:81/a"),
    ("/proxy", "/proxy/[::1]:81/a", ("::1", 81, "/proxy/[::1]:81", False, "/a", ""), "/a"),
    ("/proxy", "/proxy/absolute/[FE80::1]:81/", ("fe80::1", 81, "/proxy/absolute/[FE80::1]:81", True, "/", ""), "/proxy/absolute/[FE80::1]:81/"),
    ("", "/8080/a", ("localhost", 8080, "/8080", False, "/a", ""), "/a"),
    ("", "/absolute/8080/a", ("localhost", 8080, "/absolute/8080", True, "/a", ""), "/absolute/8080/a"),
    ("/user/ana/proxy", "/user/ana/proxy/8080/a", ("localhost", 8080, "/user/ana/proxy/8080", False, "/a", ""), "/a"),
    ("/user/al%40ice.x%2By", "/user/al@ice.x+y/8080/a", ("localhost", 8080, "/user/al@ice.x+y/8080", False, "/a", ""), "/a"),
    ("/user/al%40ice.x%2By", "/%75ser/al%40ice.x%2by/8080/a", ("localhost", 8080, "/%75ser/al%40ice.x%2by/8080", False, "/a", ""), "/a"),
]  # fmt: skip
NO_ROUTES = [
    "/", "/8080/", "/proxyx/8080/", "/proxy8080/", "/Proxy/8080/", "//proxy/8080/", "/proxy//8080/", "/./proxy/8080/", "/a/../proxy/8080/", "/proxy/./8080/",
    "/proxy%2F8080/", "/proxy/%38080/", "/proxy/8080%2F", "/proxy/+80/", "/proxy/-80/", "/proxy/08080/", "/proxy/0/", "/proxy/65536/", "/proxy/99999/",
    "/proxy/8_0/", "/proxy/8080;a/", "/proxy/8080:/", "/proxy/:8080/", "/proxy/a:/", "/proxy/a/", "/proxy/a:b/", "/proxy/a:80:81/", "/proxy/u@a:80/",
    "/proxy/u:p@a:80/", "/proxy/localhost%3A80/", "/proxy/a%2eb:80/", "/proxy/a%00:80/", "/proxy/.a:80/", "/proxy/-a:80/", "/proxy/::1:80/",
    "/proxy/[::1]/", "/proxy/[::1]:0/", "/proxy/[]:80/", "/proxy/[::1]80/", "/proxy/[::1%25eth0]:80/", "/proxy/[v1.a]:80/", "/proxy/absolute", "/proxy/absolute/",
    "/proxy/absolute/a/", "/proxy/absolute//8080/", "/proxy/absolute/absolute/8080/", "/proxy/absolutely/8080/", "/proxy/ABSOLUTE/8080/", "/proxy/a*:80/",
]  # fmt: skip
LEAVING = ["/..", "/../", "/../9090/", "/a/../..", "/./..", "/%2e%2e/", "/%2E./", "/.%2e", "/a/%2e%2e/%2E%2E/b", "/a/../../8080/"]


class TestRoutes:
    @pytest.mark.parametrize("base, target, route, upstream_target", ROUTES, ids=case_id)
    def test_route(self, base, target, route, upstream_target):
        found = find_route(base, target)
        assert found == Route(*route)
        assert found.target == upstream_target

    @pytest.mark.parametrize("base, target", [("/proxy", "/proxy"), ("/proxy", "/proxy/"), ("/proxy", "/proxy/?a"), ("", "/"), ("", "/?8080")])
    def test_base_itself(self, base, target):
        assert find_route(base, target) is None

    @pytest.mark.parametrize("target", NO_ROUTES)
    def test_no_route(self, target):
        assert status_of_error(find_route, "/proxy", target) == 404

    @pytest.mark.parametrize("path", LEAVING)
    def test_dot_segments_that_leave(self, path):
        for form in ("/proxy/8080", "/proxy/absolute/8080"):
            assert status_of_error(find_route, "/proxy", form + path) == 400

    def test_brackets_without_an_address(self):
        assert status_of_error(find_route, "/proxy", "/proxy/[1.2.3.4]:80/") == 400
        assert status_of_error(find_route, "/proxy", "/proxy/[:::]:80/") == 400

    @pytest.mark.parametrize(
        "host, allowed",
        [
            ("localhost", True), ("127.0.0.1", True), ("::1", True), ("db1.example.org", True), ("a.b.example.org", True), ("exact", True), ("2001:db8::7", True),
            ("10.1.2.3", True), ("example.org", False), ("example.org.", False), ("db1.example.org.", False), ("exact.", False), ("xexact", False),
            ("127.1", False), ("0", False), ("0.0.0.0", False), ("127.0.0.2", False), ("localhost.", False), ("::", False), ("db1.example.orgx", False),
            ("0:0:0:0:0:0:0:1", False), ("10.2.2.3", False),
        ],
    )  # fmt: skip
    def test_allowlist(self, host, allowed):
        assert is_allowed(host, normal_allowlist(("*.Example.org", "EXACT", "[2001:DB8::7]", "10.1.*"))) is allowed

    def test_allowlist_callable(self):
        assert is_allowed("a", lambda host: host == "a")
        assert not is_allowed("localhost", lambda host: host == "a")


    @pytest.mark.parametrize(
        "authority, port",
        [
            ("8080.localhost:8888", 8080), ("8080.LOCALHOST", 8080), ("1.localhost:1", 1), ("65535.localhost", 65535), ("8080.apps.example.org", 8080), ("65536.localhost", 0),
            ("08080.localhost", 0), ("0.localhost", 0), ("+80.localhost", 0), ("8080.localhost.", 0), ("8080.localhost.evil.example", 0), ("a.8080.localhost", 0), ("8080.a.localhost", 0),
            ("localhost:8888", 0), ("8080", 0), ("8080.example.org", 0), ("8080..localhost", 0), ("127.0.0.1:8888", 0), ("[::1]:8888", 0), ("", 0), ("app--8080.localhost", 0), ("8080.0.0.1", 0),
        ],
    )  # fmt: skip
    def test_port_in_host(self, authority, port):
        assert port_in_host(authority, ("localhost", "apps.example.org")) == port
        assert port_in_host(authority, ()) == 0


class TestRoutesOnTheWire:
    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
    def test_no_route_connects_nothing(self, proxy, upstream, method):
        app = upstream(answering(OK))
        for path in ("/", "/nothing", "/proxy/x", "/proxy/localhost:%2e/", "/proxy/+%d/" % app.port, "/proxy/0%d/" % app.port, "/proxy/u@localhost:%d/" % app.port):
            answer = proxy.ask(request(method, path), no_body=method == "HEAD")
            assert status_of(answer) == 404
            if method == "GET":
                for form in (b"/proxy/<port>/", b"/proxy/absolute/<port>/", b"/proxy/<host>:<port>/", b"/proxy/absolute/<host>:<port>/"):
                    assert form in answer[2]
        assert status_of(proxy.get("/proxy/%d/../%d/" % (app.port, app.port))) == 400
        assert app.connections == 0

    def test_missing_slash(self, proxy, upstream):
        app = upstream(answering(OK))
        for target, location in (("/proxy/%d", "/proxy/%d/"), ("/proxy/%d?a=%%2F&b", "/proxy/%d/?a=%%2F&b"), ("/proxy/localhost:%d", "/proxy/localhost:%d/")):
            for method in ("GET", "HEAD"):
                answer = proxy.ask(request(method, target % app.port), no_body=method == "HEAD")
                assert (status_of(answer), fields_of(answer)["location"]) == (302, location % app.port)
        assert app.connections == 0
        assert status_of(proxy.ask(request("POST", "/proxy/%d?a" % app.port, "Content-Length: 0"))) == 200
        assert status_of(proxy.get("/proxy/absolute/%d?a" % app.port)) == 200
        assert [message[0] for message in app.messages] == ["POST /?a HTTP/1.1", "GET /proxy/absolute/%d?a HTTP/1.1" % app.port]

    @pytest.mark.parametrize("base", ["/", "/user/ana/proxy"])
    def test_other_bases(self, start, upstream, base):
        app = upstream(answering(OK))
        proxy = start(base=base)
        prefix = base.rstrip("/")
        assert status_of(proxy.get(base)) == 200
        assert status_of(proxy.get("%s/%d/a" % (prefix, app.port))) == 200
        assert status_of(proxy.get("%s/absolute/%d/a" % (prefix, app.port))) == 200
        assert [message[0] for message in app.messages] == ["GET /a HTTP/1.1", "GET %s/absolute/%d/a HTTP/1.1" % (prefix, app.port)]

    def test_ipv6(self, proxy, upstream):
        """localhost is tried at 127.0.0.1 and then at ::1; an address in brackets is that address alone."""
        claim, is_alone = socket.socket(), False
        with claim:
            while not is_alone:  # somebody else, like the proxy itself, may have the same port at 127.0.0.1
                try:
                    app = upstream(answering(OK), host="::1")
                except OSError:
                    pytest.skip("this machine has no IPv6 loopback")
                with contextlib.suppress(OSError):
                    claim.bind(("127.0.0.1", app.port))
                    is_alone = True
            assert status_of(proxy.get("/proxy/%d/a" % app.port)) == 200
            assert status_of(proxy.get("/proxy/[::1]:%d/b" % app.port)) == 200
            assert status_of(proxy.get("/proxy/absolute/[::1]:%d/c" % app.port)) == 200
            assert status_of(proxy.get("/proxy/127.0.0.1:%d/d" % app.port)) == 502
        assert [fields_of(message)["host"] for message in app.messages] == ["localhost:%d" % app.port] + ["[::1]:%d" % app.port] * 2

    @pytest.mark.parametrize("upgrade", [False, True])
    def test_host_outside_the_allowlist(self, start, upstream, upgrade):
        """Refused before anything is resolved or connected, Upgrades too (CVE-2022-21697, CVE-2024-28179)."""
        app = upstream(answering(OK))
        asked = []

        def allow(host):
            asked.append(host)
            return False

        lines = HANDSHAKE if upgrade else ()
        for proxy in (start(), start(host_allowlist=["*.example.org"]), start(host_allowlist=allow)):
            for form in ("/proxy/127.0.0.2:%d/", "/proxy/absolute/127.0.0.2:%d/", "/proxy/Nowhere.invalid:%d", "/proxy/2130706433:%d/", "/proxy/[::ffff:127.0.0.1]:%d/"):
                answer = proxy.get(form % app.port, *lines)
                assert status_of(answer) == 403
                assert b"--host-allowlist" in answer[2]
        assert app.connections == 0
        assert asked == ["127.0.0.2", "127.0.0.2", "nowhere.invalid", "2130706433", "::ffff:127.0.0.1"]

    def test_host_inside_the_allowlist(self, start, upstream):
        app = upstream(answering(OK), host="127.0.0.2")
        proxy = start(host_allowlist=["127.0.0.*"])
        assert status_of(proxy.get("/proxy/127.0.0.2:%d/a" % app.port)) == 200
        assert fields_of(app.messages[0])["host"] == "127.0.0.2:%d" % app.port


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting
# ---------------------------------------------------------------------------------------------------------------------

STRIPPED = Route("localhost", 8080, "/proxy/8080", False, "/a", "")
ABSOLUTE = Route("localhost", 8080, "/proxy/absolute/8080", True, "/a", "")
VISIT = Visit("192.0.2.7", "http", "here:8888", "8888", "192.0.2.7")


def sent_upstream(*fields, route=STRIPPED, visit=VISIT, framing=NO_BODY, preserve_host=False, is_upgrade=False, version="1.1"):
    head = RequestHead("GET", "/proxy/8080/a", visit.authority, version, (("Host", visit.authority),) + fields)
    return request_for_upstream(head, route, framing, visit, preserve_host, is_upgrade)


def sent_to_client(*fields, route=STRIPPED, visit=VISIT, framing=NO_BODY, status=200):
    return response_for_client(port_proxy.ResponseHead(status, "", "1.1", fields), route, framing, visit).fields


class TestRewriting:
    def test_request_as_the_app_sees_it(self):
        head = sent_upstream(("A", "b"), ("a", "c"), ("Cookie", "x=y"))
        assert head == RequestHead(
            "GET", "/a", "localhost:8080", "1.1",
            (
                ("Host", "localhost:8080"), ("A", "b"), ("a", "c"), ("Cookie", "x=y"),
                ("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", "http"), ("X-Forwarded-Host", "here:8888"), ("X-Forwarded-Port", "8888"),
                ("X-Forwarded-Prefix", "/proxy/8080"), ("X-Forwarded-Context", "/proxy/8080"), ("X-ProxyContextPath", "/proxy/8080"),
            ),
        )  # fmt: skip

    def test_absolute_form_has_no_prefix_fields(self):
        head = sent_upstream(route=ABSOLUTE)
        assert head.target == "/proxy/absolute/8080/a"
        assert not {"X-Forwarded-Prefix", "X-Forwarded-Context", "X-ProxyContextPath"} & {name for name, _ in head.fields}

    @pytest.mark.parametrize("authority, port", [("here", "80"), ("here:", "80"), ("[::1]", "80"), ("[::1]:99", "99"), ("", None)])
    def test_forwarded_port(self, authority, port):
        visit = visit_of(RequestHead("GET", "/", authority, "1.1", ()), "192.0.2.7", "http", ())
        fields = dict(sent_upstream(visit=visit).fields)
        assert fields.get("X-Forwarded-Port") == port
        assert fields.get("X-Forwarded-Host") == (authority or None)

    @pytest.mark.parametrize(
        "field",
        [
            ("Connection", "close"), ("Keep-Alive", "timeout=5"), ("Proxy-Connection", "keep-alive"), ("TE", "trailers"), ("Trailer", "X"),
            ("Transfer-Encoding", "chunked"), ("Upgrade", "h2c"), ("Upgrade", "websocket"), ("Proxy-Authorization", "x"), ("Content-Length", "5"),
            ("Forwarded", "for=1.2.3.4"), ("x-forwarded-for", "1.2.3.4"), ("X-FORWARDED-HOST", "evil"), ("X-Forwarded-Prefix", "/evil"), ("X-Forwarded-Context", "/evil"),
            ("X-ProxyContextPath", "/evil"), ("X-Forwarded-Port", "1"), ("X-Forwarded-Proto", "https"),
            ("X_Forwarded_For", "1.2.3.4"), ("x-forwarded_host", "evil"), ("X_Forwarded-Prefix", "/evil"), ("Content_Length", "5"),
        ],
    )  # fmt: skip
    def test_fields_that_do_not_pass(self, field):
        assert field not in sent_upstream(field).fields
        assert sent_upstream(field).fields == sent_upstream().fields

    def test_connection_names_fields(self):
        named = ("Connection", "x-a, HOST, X-Forwarded-For, x-forwarded-prefix ,content-length, close")
        fields = sent_upstream(named, ("X-A", "b"), ("X-B", "c"), framing=Framing(LENGTH, 5)).fields
        names = [name for name, _ in fields]
        assert "X-A" not in names
        for name in ("Host", "X-B", "X-Forwarded-For", "X-Forwarded-Prefix", "Content-Length"):
            assert names.count(name) == 1

    def test_upgrade(self):
        fields = sent_upstream(("Connection", "keep-alive, Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "k"), is_upgrade=True).fields
        assert fields[-2:] == (("Connection", "Upgrade"), ("Upgrade", "websocket"))
        assert ("Sec-WebSocket-Key", "k") in fields
        assert ("X-Forwarded-Prefix", "/proxy/8080") in fields

    def test_expect_of_http_1_0_is_dropped(self):
        assert ("Expect", "100-continue") in sent_upstream(("Expect", "100-continue")).fields
        assert ("Expect", "100-continue") not in sent_upstream(("Expect", "100-continue"), version="1.0").fields

    @pytest.mark.parametrize(
        "origin, authority, own",
        [
            ("http://here:8888", "here:8888", True), ("https://here:8888", "here:8888", True), ("HTTP://HERE:8888", "here:8888", True), ("http://here", "here:80", True),
            ("http://here:80", "here", True), ("https://here", "here:443", True), ("https://here", "here", True), ("http://[::1]:1", "[::1]:1", True),
            ("http://here:443", "here", False), ("https://here:80", "here", False), ("http://here:8889", "here:8888", False), ("http://evil", "here", False),
            ("null", "here", False), ("", "", False), ("http://", "", False), ("http://here:8888/", "here:8888", False), ("ws://here", "here", False),
            ("http://here:8888.evil", "here:8888", False), ("http://here:8888, http://here:8888", "here:8888", False), ("http://u@here:8888", "here:8888", False),
        ],
    )  # fmt: skip
    def test_own_origin(self, origin, authority, own):
        assert is_own_origin(origin, authority) is own

    def test_origin(self):
        fields = dict(sent_upstream(("Origin", "http://here:8888")).fields)
        assert fields["Origin"] == "http://localhost:8080"
        assert "X-Forwarded-Host" not in fields
        assert "X-Forwarded-Port" not in fields
        for foreign in ("http://evil", "null", "http://here:1"):
            fields = dict(sent_upstream(("Origin", foreign)).fields)
            assert fields["Origin"] == foreign
            assert fields["X-Forwarded-Host"] == "here:8888"

    def test_preserve_host(self):
        fields = dict(sent_upstream(("Origin", "http://here:8888"), ("Referer", "http://here:8888/proxy/8080/x"), preserve_host=True).fields)
        assert (fields["Host"], fields["Origin"], fields["X-Forwarded-Host"]) == ("here:8888", "http://here:8888", "here:8888")
        assert fields["Referer"] == "http://here:8888/proxy/8080/x"

    @pytest.mark.parametrize(
        "route, referer, translated",
        [
            (STRIPPED, "http://here:8888/proxy/8080/x?y", "http://localhost:8080/x?y"), (STRIPPED, "http://here:8888/proxy/8080", "http://localhost:8080/"),
            (STRIPPED, "http://here:8888/proxy/8080?q", "http://localhost:8080/?q"), (STRIPPED, "http://here:8888/proxy/80801/secret", "http://localhost:8080/"),
            (STRIPPED, "http://here:8888/", "http://localhost:8080/"), (STRIPPED, "http://here:8888", "http://localhost:8080/"),
            (ABSOLUTE, "http://here:8888/proxy/absolute/8080/x", "http://localhost:8080/proxy/absolute/8080/x"), (ABSOLUTE, "http://here:8888/x", "http://localhost:8080/"),
            (STRIPPED, "https://evil/proxy/8080/x", "https://evil/proxy/8080/x"), (STRIPPED, "about:blank", "about:blank"), (STRIPPED, "http://here:1/x", "http://here:1/x"),
        ],
    )  # fmt: skip
    def test_referer(self, route, referer, translated):
        assert dict(sent_upstream(("Referer", referer), route=route).fields)["Referer"] == translated

    @pytest.mark.parametrize(
        "location, stripped, absolute",
        [
            ("/x?y#z", "/proxy/8080/x?y#z", "/x?y#z"), ("/", "/proxy/8080/", "/"), ("/proxy/8080/x", "/proxy/8080/x", "/proxy/8080/x"), ("/proxy/8080", "/proxy/8080", "/proxy/8080"),
            ("/proxy/8080?x", "/proxy/8080?x", "/proxy/8080?x"), ("/proxy/80801", "/proxy/8080/proxy/80801", "/proxy/80801"), ("x", "x", "x"), ("../x", "../x", "../x"), ("?x", "?x", "?x"),
            ("", "", ""), ("//evil/x", "//evil/x", "//evil/x"), ("https://evil/x", "https://evil/x", "https://evil/x"), ("mailto:a", "mailto:a", "mailto:a"),
            ("http://localhost:8080/x", "/proxy/8080/x", "/x"), ("HTTP://LOCALHOST:8080", "/proxy/8080/", "/"), ("https://localhost:8080?x", "/proxy/8080/?x", "/?x"),
            ("http://127.0.0.1:8080/proxy/8080/x", "/proxy/8080/x", "/proxy/8080/x"), ("http://[::1]:8080/x", "/proxy/8080/x", "/x"), ("http://localhost/x", "http://localhost/x", "http://localhost/x"),
            ("http://localhost:8081/x", "http://localhost:8081/x", "http://localhost:8081/x"), ("http://here:8888/x", "/proxy/8080/x", "/x"),
            ("http://localhost:8080//evil/x", "/proxy/8080//evil/x", "/.//evil/x"), ("http://localhost:8080/\\evil", "/proxy/8080/\\evil", "/./\\evil"),
            ("http://localhost:8080/\t/evil", "/proxy/8080/\t/evil", "/./\t/evil"), ("http://u@localhost:8080/x", "http://u@localhost:8080/x", "http://u@localhost:8080/x"),
        ],
    )  # fmt: skip
    def test_location(self, location, stripped, absolute):
        for name in ("Location", "content-location"):
            assert sent_to_client((name, location)) == ((name, stripped),)
            assert sent_to_client((name, location), route=ABSOLUTE) == ((name, absolute),)
        assert sent_to_client(("Refresh", "5; url=" + location)) == (("Refresh", "5; url=" + stripped),)

    @pytest.mark.parametrize(
        "refresh, rewritten",
        [("5", "5"), ("0;URL='/x'", "0;URL='/proxy/8080/x'"), ("0, /x", "0, /proxy/8080/x"), ('1.5 ; Url = "/x" y', '1.5 ; Url = "/proxy/8080/x" y'), ("0;url=x", "0;url=x"), ("soon", "soon")],
    )
    def test_refresh(self, refresh, rewritten):
        assert sent_to_client(("Refresh", refresh)) == (("Refresh", rewritten),)

    def test_location_on_port_80(self):
        assert sent_to_client(("Location", "http://localhost/x"), route=STRIPPED._replace(port=80, prefix="/proxy/80")) == (("Location", "/proxy/80/x"),)

    @pytest.mark.parametrize(
        "cookie, rewritten",
        [
            ("a=b", "a=b"), ("a=b; Path=/", "a=b; Path=/proxy/8080/"), ("a=b;path=/x;HttpOnly", "a=b;path=/proxy/8080/x;HttpOnly"), ("a=b; Path=/proxy/8080", "a=b; Path=/proxy/8080"),
            ("a=b; Path=/proxy/8080/x", "a=b; Path=/proxy/8080/x"), ("a=b; Path=", "a=b; Path="), ("a=b; Path", "a=b; Path"), ("a=b; Path=x", "a=b; Path=x"),
            ("a=b; Domain=localhost; Path=/", "a=b; Path=/proxy/8080/"), ("a=b; Domain=.LocalHost", "a=b"), ("a=b; domain=127.0.0.1; Secure", "a=b; Secure"),
            ("a=b; Domain=example.org", "a=b; Domain=example.org"), ("__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure"), ("__Secure-a=b; Path=/", "__Secure-a=b; Path=/proxy/8080/"),
            ("path=/x; SameSite=Lax", "path=/x; SameSite=Lax"), ("a=\xe4\"; Expires=Wed, 09 Jun 2021 10:18:14 GMT", "a=\xe4\"; Expires=Wed, 09 Jun 2021 10:18:14 GMT"),
        ],
    )  # fmt: skip
    def test_set_cookie(self, cookie, rewritten):
        assert sent_to_client(("Set-Cookie", cookie)) == (("Set-Cookie", rewritten),)
        assert sent_to_client(("Set-Cookie", cookie), route=ABSOLUTE) == (("Set-Cookie", cookie),)

    def test_response_fields(self):
        fields = (("A", "b"), ("Connection", "x-c, close"), ("X-C", "d"), ("Keep-Alive", "x"), ("Transfer-Encoding", "chunked"), ("Upgrade", "h2"), ("Trailer", "Y"), ("Set-Cookie", "a"), ("Set-Cookie", "b"))
        assert sent_to_client(*fields, framing=Framing(CHUNKED)) == (("A", "b"), ("Set-Cookie", "a"), ("Set-Cookie", "b"), ("Transfer-Encoding", "chunked"))

    @pytest.mark.parametrize("status, kept", [(200, True), (304, True), (204, False), (103, False)])
    def test_length_of_a_body_that_is_not_sent(self, status, kept):
        """HEAD and 304 keep their Content-Length, equal copies as one; 1xx and 204 may have none."""
        assert sent_to_client(("Content-Length", "5"), ("Content-Length", "5"), status=status) == ((("Content-Length", "5"),) if kept else ())


    @pytest.mark.parametrize(
        "visit, domains, url",
        [
            (("http", "localhost:8888"), ("localhost",), "http://80.localhost:8888/"), (("http", "LocalHost:8888"), ("localhost",), "http://80.localhost:8888/"),
            (("http", "127.0.0.1:8888"), ("localhost",), "http://80.localhost:8888/"), (("http", "[::1]:8888"), ("localhost", "b.c"), "http://80.localhost:8888/"),
            (("https", "localhost"), ("localhost",), "https://80.localhost/"), (("http", "localhost:1"), (), ""), (("http", "127.0.0.1:1"), (), ""), (("http", "a.example:1"), ("localhost",), ""),
            (("https", "b.c"), ("localhost", "b.c"), "https://80.b.c/"), (("http", "a.example:8888"), ("localhost", "b.c"), "http://80.b.c:8888/"), (("http", ""), ("localhost",), ""),
            (("http", "99.localhost:8888", "8888", "", 99), ("localhost",), "http://80.localhost:8888/"),
        ],
    )  # fmt: skip
    def test_the_host_of_a_port(self, visit, domains, url):
        assert host_form(80, Visit("192.0.2.1", *visit), domains) == url

    def test_a_domain_of_a_home_without_a_port_is_dropped(self):
        route = STRIPPED._replace(prefix="")
        visit = VISIT._replace(authority="8080.apps.example.org", app_port=8080)
        assert sent_to_client(("Set-Cookie", "a=b; Domain=8080.apps.example.org; Path=/x"), route=route, visit=visit) == (("Set-Cookie", "a=b; Path=/x"),)
        assert sent_to_client(("Set-Cookie", "a=b; Domain=apps.example.org; Path=/x"), route=route, visit=visit) == (("Set-Cookie", "a=b; Path=/x"),)  # which is ours


class TestRewritingOnTheWire:
    def test_raw_path_and_query_arrive_as_sent(self, proxy, upstream):
        app = upstream(answering(OK))
        for path in ("/%2F//..%2f/%20", "//a//b", "/a/./b/../c?x=/../&y=%00", "/a;b=c,d?e=f?g", "/%zz/%", "/a|b\"<>{}^`\\?'[]"):
            assert status_of(proxy.get("/proxy/%d%s" % (app.port, path))) == 200
            assert app.messages[-1][0] == "GET %s HTTP/1.1" % path
            assert status_of(proxy.get("/proxy/absolute/%d%s" % (app.port, path))) == 200
            assert app.messages[-1][0] == "GET /proxy/absolute/%d%s HTTP/1.1" % (app.port, path)

    def test_head_of_the_request(self, proxy, upstream):
        app = upstream(answering(OK))
        proxy.get("/proxy/%d/a" % app.port, "X-A: b\xe4", "x-a: c", "Connection: close, x-b", "X-B: d", "Upgrade: h2c", "HTTP2-Settings: e", "X-Forwarded-For: 1.2.3.4")
        assert app.messages[0][1] == [
            ("Host", "localhost:%d" % app.port), ("X-A", "b\xe4"), ("x-a", "c"), ("HTTP2-Settings", "e"), ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Proto", "http"),
            ("X-Forwarded-Host", "here:8888"), ("X-Forwarded-Port", "8888"),
        ] + [(name, "/proxy/%d" % app.port) for name in ("X-Forwarded-Prefix", "X-Forwarded-Context", "X-ProxyContextPath")]  # fmt: skip

    def test_absolute_form_of_the_target_overrides_host(self, proxy, upstream):
        app = upstream(answering(OK))
        assert status_of(proxy.get("http://there:99/proxy/%d/a" % app.port, "Origin: http://there:99")) == 200
        assert fields_of(app.messages[0])["origin"] == "http://localhost:%d" % app.port

    def test_preserve_host(self, start, upstream):
        app = upstream(answering(OK))
        assert status_of(start(preserve_host=True).get("/proxy/%d/a" % app.port)) == 200
        assert fields_of(app.messages[0])["host"] == "here:8888"


# ---------------------------------------------------------------------------------------------------------------------
# Access
# ---------------------------------------------------------------------------------------------------------------------

HANDSHAKE = ("Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")


class TestAccess:
    @pytest.mark.parametrize(
        "method, version, fields, opens",
        [
            ("GET", "1.1", [("Connection", "Upgrade"), ("Upgrade", "websocket")], True), ("GET", "1.1", [("connection", "a, UPGRADE"), ("upgrade", "WebSocket")], True),
            ("GET", "1.1", [("Connection", "a"), ("Connection", "upgrade"), ("Upgrade", "websocket")], True), ("POST", "1.1", [("Connection", "Upgrade"), ("Upgrade", "websocket")], False),
            ("GET", "1.0", [("Connection", "Upgrade"), ("Upgrade", "websocket")], False), ("GET", "1.1", [("Upgrade", "websocket")], False),
            ("GET", "1.1", [("Connection", "Upgrade")], False), ("GET", "1.1", [("Connection", "Upgrade"), ("Upgrade", "h2c")], False),
            ("GET", "1.1", [("Connection", "Upgrade"), ("Upgrade", "h2c, websocket")], False), ("GET", "1.1", [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Upgrade", "h2c")], False),
        ],
    )  # fmt: skip
    def test_what_opens_a_websocket(self, method, version, fields, opens):
        assert is_websocket(RequestHead(method, "/", "a", version, tuple(fields))) is opens

    @pytest.mark.parametrize("origin", ["http://evil", "null", "http://here:8889", "http://here:8888, http://evil", ""])
    def test_foreign_upgrade_is_refused(self, proxy, upstream, origin):
        app = upstream(answering(OK))
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Origin: " + origin, *HANDSHAKE)) == 403
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Origin: http://here:8888", "Origin: http://here:8888", *HANDSHAKE)) == 400
        assert app.connections == 0

    def test_upgrade_with_a_body_is_refused(self, proxy, upstream):
        app = upstream(answering(OK))
        assert status_of(proxy.ask(request("GET", "/proxy/%d/" % app.port, "Content-Length: 1", *HANDSHAKE, body=b"a"))) == 400
        assert app.connections == 0


TOKEN = "s3cret-token"
SAFE_LINES = ("Accept: text/html", "Sec-Fetch-Mode: navigate")


def cookie_of(message):
    """The Cookie field that a browser would send after this answer."""
    return "Cookie: " + fields_of(message)["set-cookie"].split(";")[0]


class TestHostCheck:
    @pytest.mark.parametrize(
        "host, known",
        [
            ("localhost", True), ("localhost:8888", True), ("LOCALHOST:1", True), ("a.localhost:8888", True), ("127.0.0.1:8888", True), ("127.9.9.9", True), ("[::1]:8888", True),
            ("mine.example.org", True), ("a.b.example.net:80", True), ("evil.example", False), ("evil.example:8888", False), ("localhost.evil.example", False), ("xlocalhost", False),
            ("localhost.", False), ("192.0.2.1", False), ("0.0.0.0", False), ("[::]:8888", False), ("[2001:db8::1]", False), ("127.0.0.1.evil.example", False), ("mine.example.org.", False),
        ],
    )  # fmt: skip
    def test_dns_rebinding(self, start, upstream, host, known):
        """A page whose own name was made to point here gets nothing, for HTTP, Upgrades and the absolute form alike."""
        app = upstream(answering(OK))
        proxy = start(allow_hostnames=["mine.example.org", "*.example.net"])
        head = "GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n"
        for target, lines in (("/proxy/%d/", ""), ("/proxy/", ""), ("/proxy/%d/", "\r\n".join(HANDSHAKE) + "\r\n"), ("http://" + host + "/proxy/%d/", "X: y\r\n")):
            target = target % app.port if "%d" in target else target
            answer = proxy.ask((head % (target, host if target[0] == "/" else "localhost", lines)).encode())
            assert status_of(answer) == (200 if known else 403)
            assert known or b"--allow-hostname" in answer[2]
        assert app.connections == (0 if not known else app.connections)

    def test_an_address_is_no_name(self, start):
        """Where not only this machine can connect, any address will do: none can be made to point elsewhere."""
        proxy = start(bind="0.0.0.0", token="", allow_hostnames=())
        for host, status in (("192.0.2.1:8888", 200), ("[2001:db8::1]", 200), (socket.gethostname(), 200), ("evil.example", 403)):
            assert status_of(proxy.ask(b"GET /proxy/ HTTP/1.1\r\nHost: %s\r\n\r\n" % host.encode())) == status

    def test_behind_a_trusted_proxy_too(self, start):
        """A rebound page may set X-Forwarded-Host as it likes; its Host it may not."""
        proxy = start(trusted_proxies=["127.0.0.1"], allow_hostnames=["pub.example"])
        for host, forwarded, status in (
            ("evil.example", "localhost", 403), ("localhost", "evil.example", 403), ("localhost", "pub.example", 200), ("pub.example", "pub.example", 200),
        ):  # fmt: skip
            head = "GET /proxy/ HTTP/1.1\r\nHost: %s\r\nX-Forwarded-Host: %s\r\n\r\n" % (host, forwarded)
            assert status_of(proxy.ask(head.encode())) == status

    def test_without_a_host(self, start):
        assert status_of(start(allow_hostnames=()).ask(b"GET /proxy/ HTTP/1.0\r\n\r\n")) == 200


class TestToken:
    @pytest.fixture
    def app(self, upstream):
        return upstream(answering(OK))

    @pytest.fixture
    def proxy(self, start):
        return start(token=TOKEN, allow_hostnames=())

    @pytest.mark.parametrize(
        "method, lines, status",
        [
            ("GET", SAFE_LINES, 401), ("GET", ("Accept: text/html",), 401), ("HEAD", SAFE_LINES, 401), ("GET", (), 401), ("POST", ("Content-Length: 0",), 401), ("PROPFIND", (), 401),
            ("GET", HANDSHAKE, 403), ("GET", ("Cookie: a=b",), 401), ("GET", ("Authorization: Basic czNjcmV0LXRva2Vu",), 401), ("GET", ("Authorization: token wrong",), 401),
            ("GET", ("Authorization: s3cret-token",), 401), ("OPTIONS", ("Origin: http://evil", "Access-Control-Request-Method: POST"), 401), ("GET", ("Authorization: token \xe4",), 401),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_without_a_token_nothing_is_reached(self, proxy, app, method, lines, status):
        for target in ("/proxy/%d/", "/proxy/absolute/%d/?token=wrong", "/proxy/%d", "/proxy/"):
            if method == "POST" and target == "/proxy/":
                continue  # the sign-in page's own
            target = target % app.port if "%" in target else target
            answer = proxy.ask(request(method, target, *lines), no_body=method == "HEAD")
            assert status_of(answer) == status
            assert "set-cookie" not in fields_of(answer)
            assert (b"<form" in answer[2]) == (method == "GET" and "Accept: text/html" in lines)
        assert app.connections == 0

    @pytest.mark.parametrize("shown, told", [((), False), (("Authorization: token wrong",), True), (("Authorization: Digest a",), False)])
    @pytest.mark.parametrize("lines", [(), SAFE_LINES, HANDSHAKE], ids=["program", "page", "WebSocket"])
    def test_a_wrong_token_is_called_one(self, proxy, app, shown, told, lines):
        said = b"What came as a token is not the proxy's."
        for query, is_told in (("", told), ("?token=wrong", True)):
            body = html.unescape(proxy.get("/proxy/%d/%s" % (app.port, query), *lines + shown)[2].decode()).encode()
            assert (said in body, b"<p></p>" in body, b"wrong" in body.replace(query.encode() or b"-", b"")) == (is_told, False, False)

    def test_from_the_address_to_a_cookie(self, proxy, app):
        """A page visit with the token ends at the clean address, signed in; the app sees neither."""
        target = "/proxy/%d/a?x=%%2F&token=%s&token=its-own&y" % (app.port, TOKEN)
        answer = proxy.get(target, *SAFE_LINES)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/proxy/%d/a?x=%%2F&token=its-own&y" % app.port)
        cookie = fields_of(answer)["set-cookie"]
        assert re.fullmatch(r"port_proxy_%d=[A-Za-z0-9_-]{43}; Path=/; HttpOnly; SameSite=Lax" % proxy.port, cookie)
        assert TOKEN not in cookie
        assert status_of(proxy.get("/proxy/%d/b" % app.port, cookie_of(answer))) == 200
        assert [message[0] for message in app.messages] == ["GET /b HTTP/1.1"]
        again = proxy.get("/proxy/?token=" + TOKEN, cookie_of(answer), *SAFE_LINES)
        assert (status_of(again), fields_of(again)["location"], fields_of(again).get("set-cookie")) == (302, "/proxy/", None)

    @pytest.mark.parametrize("scheme", ["token", "Token", "Bearer", "bearer"])
    def test_authorization(self, proxy, app, scheme):
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, "Content-Length: 0", "Authorization: %s %s" % (scheme, TOKEN), "Origin: http://evil"))) == 200
        assert "authorization" not in fields_of(app.messages[0])

    def test_websocket(self, proxy, upstream):
        app = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(SWITCHING), wire.rest()))
        for lines in (("Authorization: token " + TOKEN,), ()):
            query = "" if lines else "?token=%s&a" % TOKEN
            assert status_of(proxy.get("/proxy/%d/ws%s" % (app.port, query), *(HANDSHAKE + lines), no_body=True)) == 101
        assert [message[0] for message in app.messages] == ["GET /ws HTTP/1.1", "GET /ws?a HTTP/1.1"]
        assert not any("authorization" in fields_of(message) for message in app.messages)

    def test_sign_in_page(self, proxy, app):
        target = "/proxy/%d/a?b=%%22&c" % app.port
        page = proxy.get(target, *SAFE_LINES)
        assert b'action="/proxy/"' in page[2]
        assert b'value="/proxy/%d/a?b=%%22&amp;c"' % app.port in page[2]

        def submit(form):
            return proxy.ask(request("POST", "/proxy/", "Content-Type: application/x-www-form-urlencoded", "Content-Length: %d" % len(form), *SAFE_LINES, body=form.encode()))

        answer = submit("token=%s&next=%%2Fproxy%%2F%d%%2Fa%%3Fb%%3D%%2522%%26c" % (TOKEN, app.port))
        assert (status_of(answer), fields_of(answer)["location"]) == (303, target)
        assert status_of(proxy.get(target, cookie_of(answer))) == 200
        wrong = submit("token=wrong&next=/proxy/%d/x" % app.port)
        assert (status_of(wrong), b"That is not the token" in wrong[2], b'value="/proxy/%d/x"' % app.port in wrong[2]) == (401, True, True)
        for place in ("//evil/proxy/", "/\\evil", "https://evil/", "/elsewhere", "/proxyx/", "/proxy/\r\nX: y", "javascript:alert(1)", ""):
            answer = submit("token=%s&next=%s" % (TOKEN, "".join("%%%02X" % ord(octet) for octet in place)))
            assert (status_of(answer), fields_of(answer)["location"]) == (303, "/proxy/")
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 9000", body=b"a" * 9000))) == 413
        foreign = request("POST", "/proxy/", "Origin: http://evil", "Content-Length: 13", body=b"token=guessed")
        assert [status_of(proxy.ask(foreign)) for _ in range(15)] == [403] * 15  # and uses up nobody's tries
        assert status_of(submit("token=" + TOKEN)) == 303

    def test_sign_in_at_the_root(self, start):
        proxy = start(token=TOKEN, base="/")
        for place in ("%2F%2Fevil", "%2F%5Cevil", "%2Fa%5C%5Cevil"):
            form = ("token=%s&next=%s" % (TOKEN, place)).encode()
            assert fields_of(proxy.ask(request("POST", "/", "Content-Length: %d" % len(form), body=form)))["location"] == "/"

    def test_credentials_are_cut_out_and_the_apps_own_stay(self, proxy, app):
        """Byte for byte, in every form of the address and on every kind of request."""
        chance = random.Random(1)
        ours = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))[len("Cookie: ") :]
        name = ours.split("=")[0]
        for sent, arrives in (
            ("a=b; %s; c=d", "a=b; c=d"), ("%s; a=b", "a=b"), ("a=b; %s", "a=b"), ("%s", None), ('a="x y";b ; %s;c', 'a="x y";b ;c'), ("x%s; a=%s; %s", "x%s; a=%s"),
            ("%s; " + name + "=stale; a=b", "a=b"), (name + "=stale; %s", None),
        ):  # fmt: skip
            lines = ("Cookie: " + sent.replace("%s", ours), "Authorization: Bearer its-own", "Referer: http://here:8888/proxy/%d/p?token=%s&q=%%2F%s" % (app.port, TOKEN, chance.choice(["", "#token=x"])))
            for target, line in (("/proxy/%d/x?token=%s&a&token=mine", "GET /x?a&token=mine HTTP/1.1"), ("/proxy/absolute/%d/x?token=%s", "GET /proxy/absolute/%d/x HTTP/1.1" % app.port)):
                assert status_of(proxy.get(target % (app.port, TOKEN), *lines)) == 200
                message = app.messages[-1]
                assert message[0] == line
                fields = fields_of(message)
                assert fields.get("cookie") == (arrives.replace("%s", ours) if arrives else None)
                assert fields["authorization"] == "Bearer its-own"
                assert TOKEN not in repr(message)
            assert status_of(proxy.get("http://here:8888/proxy/%d/?token=%s" % (app.port, TOKEN), *lines)) == 200
            assert TOKEN not in repr(app.messages[-1])

    def test_a_token_in_front_of_a_fragment(self, proxy):
        gate = proxy.proxy._around.gate
        for url, clean in (("/a?token=%s#x", "/a#x"), ("/a?b&token=%s#x?token=y", "/a?b#x?token=y"), ("/a?token=y#token=z", "/a?token=y#token=z")):
            assert gate._without_token(url.replace("%s", TOKEN)) == clean

    def test_an_app_cannot_set_our_cookie(self, proxy, upstream):
        spellings = b"".join(b"Set-Cookie:%s\r\n" % spelling.replace(b"N", b"%d" % proxy.port) for spelling in (b" port_proxy_N=evil; Path=/", b"port_proxy_N =evil", b" =port_proxy_N=evil", b"port_proxy_N"))
        app = upstream(answering(b"HTTP/1.1 200 OK\r\n" + spellings + b"Set-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"))
        answer = proxy.get("/proxy/%d/" % app.port, "Authorization: token " + TOKEN)
        assert [value for name, value in answer[1] if name == "Set-Cookie"] == ["a=b"]

    @pytest.mark.parametrize("options", [{"whole_origin": False}, {"base": "/user/ana/proxy"}, {"trusted_proxies": ["192.0.2.1"]}])
    def test_the_cookie_stays_below_the_base_where_others_share_the_origin(self, start, options):
        proxy = start(token=TOKEN, **options)
        base = options.get("base", "/proxy")
        answer = proxy.get("%s/?token=%s" % (base, TOKEN), *SAFE_LINES)
        assert "; Path=%s; HttpOnly" % base in fields_of(answer)["set-cookie"]

    def test_wrong_tokens_are_slowed_down(self, proxy, app):
        """Then even the right one is not looked at for a moment; who is signed in notices nothing."""
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        statuses = [status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token wrong%d" % number)) for number in range(15)]
        assert statuses[:5] == [401] * 5
        assert statuses[-1] == 429
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token " + TOKEN)) in (429, 200)
        assert status_of(proxy.get("/proxy/%d/" % app.port, cookie)) == 200
        assert status_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES)) == 302  # counted apart
        eventually(lambda: status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token " + TOKEN)) == 200)

    def test_nobody_is_locked_out_by_an_apps_own_token(self, proxy, app):
        """Sent again and again, by a page that was open when the proxy was restarted; or by a page of another site."""
        for _ in range(30):
            assert status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token apps-own")) == 401
        for number in range(30):
            assert status_of(proxy.get("/proxy/?token=%d" % number, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors")) == 401
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token " + TOKEN)) == 200
        assert status_of(proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN))) == 200

    def test_locked_out_means_locked_out(self, proxy):
        gate = proxy.proxy._around.gate
        visit = Visit("192.0.2.1", "http", "a")
        gate._wrong[visit.address, "fields"] = (0.0, time.monotonic(), frozenset())
        assert status_of_error(gate._try, "fields", [TOKEN], visit) == 429

    def test_sessions_are_bounded(self, proxy):
        gate = proxy.proxy._around.gate
        visit = Visit("192.0.2.1", "https", "a")
        first = gate._new_cookie(visit)
        assert first[1].endswith("; Secure")
        for number in range(2000):
            gate._new_cookie(visit)
            gate._try("fields", ["wrong"], visit._replace(address="192.0.2.%d" % number))
        assert len(gate._sessions) <= 1000
        assert len(gate._wrong) <= 1000

    def test_a_form_that_drips_has_one_deadline(self, start):
        proxy = start(token=TOKEN, head_timeout=0.4)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/", "Content-Length: 8000"))
            stop = threading.Event()

            def drip():
                with contextlib.suppress(OSError):
                    while not stop.wait(0.05):
                        wire.sock.send(b"a")

            thread = threading.Thread(target=drip)
            thread.start()
            assert status_of(wire.message()) == 408
            stop.set()
            thread.join(WAIT)

    def test_who_takes_no_answer_of_ours_is_cut_off(self, start):
        proxy = start(token=TOKEN, head_timeout=0.3)
        with proxy.wire() as wire:
            wire.sock.settimeout(0.3)
            with contextlib.suppress(OSError):
                while True:
                    wire.sock.send(request("GET", "/proxy/") * 100)
            eventually(lambda: not proxy.streams)

    def test_reserved_characters(self, upstream):
        """The address in the banner works, whatever the token."""
        quoted = "a%26b%23c%2541%2Bd%3Be"
        with shell_proxy(env=dict(os.environ, PORT_PROXY_TOKEN="a&b#c%41+d;e"), says=b"/proxy/?token=%s\n" % quoted.encode()) as (_, port):
            with Wire.to(port) as wire:
                wire.send(request("GET", "/proxy/?token=" + quoted, *SAFE_LINES))
                assert status_of(wire.message()) == 302

    def test_when_a_token_is_asked_for(self, start):
        assert start().proxy.token == ""
        assert start(token="").proxy.token == ""
        assert start(bind="0.0.0.0", token="").proxy.token == ""
        tokens = {start(bind="0.0.0.0").proxy.token for _ in range(2)}
        assert len(tokens) == 2
        assert min(map(len, tokens)) >= 32
        assert status_of(start(bind="0.0.0.0").get("/proxy/")) == 401

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_preflight(self, start, app, token):
        question = ("Origin: http://evil", "Access-Control-Request-Method: POST", "Sec-Fetch-Mode: cors", "Sec-Fetch-Site: cross-site")
        for allow, status in ((False, 401 if token else 403), (True, 200)):
            proxy = start(token=token, allow_preflight=allow)
            assert status_of(proxy.ask(request("OPTIONS", "/proxy/%d/" % app.port, *question))) == status
            assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, "Content-Length: 0", *question))) == (401 if token else 403)
            assert status_of(proxy.ask(request("OPTIONS", "/proxy/%d/" % app.port, *question[:1]))) == (401 if token else 200)

    def test_no_secret_in_the_log_or_an_answer(self, proxy, app, caplog):
        with caplog.at_level(logging.DEBUG):
            cookie = cookie_of(proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN), *SAFE_LINES))
            answers = [
                proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN), cookie), proxy.get("/nothing?token=" + TOKEN, cookie), proxy.get("/proxy/1/?token=" + TOKEN, cookie),
                proxy.get("/proxy/1/?token=wrong", *SAFE_LINES), proxy.get("/proxy/1:1:1?token=" + TOKEN, "Authorization: token " + TOKEN),
            ]  # fmt: skip
        said = repr(answers) + caplog.text
        assert TOKEN not in said
        assert cookie.split("=", 1)[1] not in said


def at(host, method, target, *lines, body=b""):
    return request(method, target, *lines, body=body).replace(b"Host: here:8888", b"Host: " + host.encode())


class TestHostForm:
    """http://8080.localhost:8888/ is port 8080, the path untouched, with an origin of its own."""

    def test_an_app_is_at_home(self, start, upstream):
        app = upstream(answering(OK, b"HTTP/1.1 302 Found\r\nLocation: http://localhost:1/x\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n\r\n"))
        proxy = start(allow_hostnames=())
        host = "%d.localhost:8888" % app.port
        for target in ("/a/%2F//..%2f/../../b?q=%20", "/proxy/", "/proxy/1/", "/proxy", "/absolute/80/", "/..", "/.well-known/port-proxy?ticket=x"):
            answer = proxy.ask(at(host, "GET", target, "Origin: http://" + host, "Referer: http://%s/p?q" % host))
            assert app.messages[-1][0] == "GET %s HTTP/1.1" % target
            fields = fields_of(app.messages[-1])
            assert (fields["host"], fields["origin"], fields["referer"]) == ("localhost:%d" % app.port, "http://localhost:%d" % app.port, "http://localhost:%d/p?q" % app.port)
            assert not {name for name in fields if "prefix" in name or "context" in name}
        assert fields_of(answer)["set-cookie"] == "a=b; Path=/"
        assert status_of(proxy.ask(at(host, "GET", "http://%s/x" % host))) == 302
        assert status_of(proxy.ask(at("localhost", "GET", "http://%s/x" % host))) == 302  # the target's authority counts
        assert status_of(proxy.ask(at(host, "POST", "/proxy/", "Content-Length: 0"))) == 302

    def test_websocket(self, start, upstream):
        app = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(SWITCHING), wire.rest()))
        proxy = start(allow_hostnames=())
        host = "%d.localhost:8888" % app.port
        assert status_of(proxy.ask(at(host, "GET", "/ws?a", "Origin: http://" + host, *HANDSHAKE), no_body=True)) == 101
        for foreign in ("http://localhost:8888", "http://%d.localhost:8888" % (app.port - 1), "null"):
            assert status_of(proxy.ask(at(host, "GET", "/ws", "Origin: " + foreign, *HANDSHAKE))) == 403
        assert [message[0] for message in app.messages] == ["GET /ws?a HTTP/1.1"]

    @pytest.mark.parametrize(
        "options, host, arrives",
        [
            ({}, "%d.localhost", "/proxy/%d/x"), ({"domains": ["apps.example.org"]}, "%d.apps.example.org", "/proxy/%d/x"), ({"domains": ["Apps.Example.org"]}, "%d.APPS.example.org:1", "/proxy/%d/x"),
            ({"domains": []}, "%d.localhost", "/x"), ({"domains": ["apps.example.org"]}, "other.%d.apps.example.org", "/x"), ({"domains": ["apps.example.org"]}, "apps.example.org", "/x"),
            ({}, "%d.apps.example.org", None), ({"domains": ["apps.example.org"]}, "%d.evil.example", None), ({}, "%d.localhost.evil.example", None),
            ({"domains": ["apps.example.org"]}, "%d.apps.example.org.evil.example", None), ({"domains": ["apps.example.org"]}, "%dapps.example.org", None), ({}, "%d.localhost.", None),
        ],
    )  # fmt: skip
    def test_names(self, start, upstream, options, host, arrives):
        app = upstream(answering(OK))
        proxy = start(allow_hostnames=(), **options)
        host = host % app.port if "%" in host else host
        assert status_of(proxy.ask(at(host, "GET", "/proxy/%d/x" % app.port))) == (200 if arrives else 403)
        assert [message[0].split(" ")[1] for message in app.messages] == ([arrives % app.port if "%" in arrives else arrives] if arrives else [])

    def test_a_neighbour_is_a_stranger(self, start, upstream):
        """What a page of another app's host asks for is refused, also where the browser calls it the same site."""
        app = upstream(answering(OK))
        proxy = start(allow_hostnames=(), domains=["apps.example.org"])
        host = "%d.apps.example.org" % app.port
        for site, mode, status in (("same-site", "no-cors", 403), ("same-site", "cors", 403), ("cross-site", "cors", 403), ("same-origin", "cors", 200), ("same-site", "navigate", 200)):
            assert status_of(proxy.ask(at(host, "GET", "/", "Sec-Fetch-Site: " + site, "Sec-Fetch-Mode: " + mode, "Accept: text/html"))) == status
        assert status_of(proxy.ask(at(host, "POST", "/", "Origin: http://1.apps.example.org", "Content-Length: 0"))) == 403

    def test_the_name_that_a_trusted_proxy_passes_on_counts(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start(trusted_proxies=["127.0.0.1"], domains=["apps.example.org"], allow_hostnames=["inner"])
        forwarded = ("X-Forwarded-Host: %d.apps.example.org" % app.port, "X-Forwarded-Proto: https", "Origin: https://%d.apps.example.org" % app.port)
        assert status_of(proxy.ask(at("inner", "POST", "/x", "Content-Length: 0", *forwarded))) == 200
        assert fields_of(app.messages[0])["origin"] == "http://localhost:%d" % app.port

    def test_the_proxy_itself_is_no_app(self, start):
        proxy = start()
        assert status_of(proxy.ask(at("%d.localhost" % proxy.port, "GET", "/"))) == 508

    @pytest.mark.parametrize("domain", ["", "a b", "*.example.org", "http://a", "a:80", "-a", "a..b", "a/", "a."])
    def test_what_is_no_domain(self, domain):
        with pytest.raises(ValueError, match="a domain is a name"):
            checked_config(Config(domains=[domain]))

    @pytest.mark.parametrize("host, options, advice", [
        ("8080.vm:1", {}, "For 8080.vm to be port 8080, start the proxy with --domain vm."), ("8080.A.example", {}, "--domain a.example."), ("8080.127.0.0.1", {}, None),
        ("99999999.vm", {}, None), ("70000.vm", {}, None), ("8080.a_b", {}, None), ("vm", {}, None), ("8080", {}, None), ("8080.vm", {"domains": ()}, None),
    ])  # fmt: skip
    def test_a_name_that_could_be_a_port_is_told_of(self, start, host, options, advice):
        said = start(**options).ask(at(host, "GET", "/x", "Sec-Fetch-Mode: cors"))[2].decode()
        assert said.startswith("404 Not Found\nNo port is named here.")
        assert advice in said if advice else "--domain" not in said

    def test_not_under_a_hub(self):
        arguments = port_proxy._parser().parse_args(["--domain", "apps.example.org"])
        environment = dict(HUB_ENVIRONMENT, JUPYTERHUB_SERVICE_URL="http://127.0.0.1:1/")
        assert checked_config(port_proxy._config_under_hub(Config(domains=["a.b"]), arguments, environment)).domains == ()


class TestSignInAtAHost:
    @pytest.fixture
    def app(self, upstream):
        return upstream(answering(OK))

    def test_nothing_is_reached_without(self, start, app):
        proxy = start(token=TOKEN)
        host = "%d.localhost:8888" % app.port
        for method, lines, status in (("GET", (), 401), ("GET", SAFE_LINES, 401), ("POST", ("Content-Length: 0",), 401), ("GET", HANDSHAKE, 403), ("GET", ("Cookie: port_proxy_%d=x" % proxy.port,), 401)):
            for target in ("/", "/proxy/", port_proxy.ENTRANCE, port_proxy.ENTRANCE + "?ticket=guess"):
                if target != port_proxy.ENTRANCE or method != "POST":
                    assert status_of(proxy.ask(at(host, method, target, *lines))) in (status, 401)
        assert app.connections == 0

    def test_no_token_is_asked_for(self, start, app):
        """The app's own pages could read what is typed there: the page leads to the proxy's address, and back."""
        proxy = start(token=TOKEN)
        host = "%d.localhost:8888" % app.port
        page = proxy.ask(at(host, "GET", "/a?b", *SAFE_LINES))
        assert status_of(page) == 401
        assert b"<form" not in page[2]
        assert b'href="http://localhost:8888/proxy/?open=%d"' % app.port in page[2]
        form = b"token=%s&next=/a?b" % TOKEN.encode()
        answer = proxy.ask(at(host, "POST", port_proxy.ENTRANCE, "Content-Length: %d" % len(form), "Origin: http://" + host, body=form))
        assert (status_of(answer), "set-cookie" in fields_of(answer)) == (401, False)

    def test_the_way_round(self, start, app):
        """From the app's host to the form of the proxy's, and back with a ticket."""
        proxy = start(token=TOKEN)
        host = "%d.localhost:8888" % app.port
        target = "/proxy/?open=%d" % app.port
        page = proxy.ask(at("localhost:8888", "GET", target, *SAFE_LINES))
        assert b'value="%s"' % target.encode() in page[2]
        assert "frame-ancestors 'none'" in fields_of(page)["content-security-policy"]
        form = b"token=%s&next=%s" % (TOKEN.encode(), target.encode())
        signed_in = proxy.ask(at("localhost:8888", "POST", "/proxy/", "Content-Length: %d" % len(form), body=form))
        assert (status_of(signed_in), fields_of(signed_in)["location"]) == (303, target)
        led = proxy.ask(at("localhost:8888", "GET", target, cookie_of(signed_in), *SAFE_LINES))
        entered = proxy.ask(at(host, "GET", fields_of(led)["location"].partition(host)[2], *SAFE_LINES))
        assert re.fullmatch(r"port_proxy_%d=[A-Za-z0-9_-]{43}; Path=/; HttpOnly; SameSite=Lax" % proxy.port, fields_of(entered)["set-cookie"])
        assert status_of(proxy.ask(at(host, "GET", "/a?b", cookie_of(entered)))) == 200
        assert "cookie" not in fields_of(app.messages[-1])
        for elsewhere in ("localhost:8888", "1.localhost:8888", "%d.localhost.:8888" % app.port):  # a cookie per host
            assert status_of(proxy.ask(at(elsewhere, "GET", "/proxy/%d/" % app.port, cookie_of(entered)))) in (401, 403)
        led = proxy.ask(at("localhost:8888", "GET", target, cookie_of(signed_in), *SAFE_LINES))
        again = proxy.ask(at(host, "GET", fields_of(led)["location"].partition(host)[2], cookie_of(entered), *SAFE_LINES))
        assert (status_of(again), "set-cookie" in fields_of(again)) == (303, False)  # it has one

    def test_no_redirect_elsewhere(self, start, app):
        proxy = start(token=TOKEN)
        answer = proxy.ask(at("%d.localhost:8888" % app.port, "GET", "//evil.example/?token=" + TOKEN, *SAFE_LINES))
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/.//evil.example/")

    def test_by_the_address(self, start, app):
        proxy = start(token=TOKEN)
        host = "%d.localhost:8888" % app.port
        answer = proxy.ask(at(host, "GET", "/a?token=%s&b" % TOKEN, *SAFE_LINES))
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/a?b")
        assert "; Path=/;" in fields_of(answer)["set-cookie"]
        assert app.connections == 0

    def test_who_is_signed_in_is_led_there(self, start, app, caplog):
        """With a ticket that is good once, for this host alone; the address to which it leads holds nothing of it."""
        caplog.set_level(logging.DEBUG)
        proxy = start(token=TOKEN)
        cookie = cookie_of(proxy.ask(at("127.0.0.1:8888", "GET", "/proxy/?token=" + TOKEN, *SAFE_LINES)))
        host = "%d.localhost:8888" % app.port

        def ticket():
            led = proxy.ask(at("127.0.0.1:8888", "GET", "/proxy/?open=%d" % app.port, cookie, *SAFE_LINES))
            assert (status_of(led), fields_of(led)["referrer-policy"]) == (303, "no-referrer")
            return re.fullmatch(r"http://%s(/\.well-known/port-proxy\?ticket=[A-Za-z0-9_-]{43})" % re.escape(host), fields_of(led)["location"]).group(1)

        target = ticket()
        entered = proxy.ask(at(host, "GET", target, *SAFE_LINES))
        assert (status_of(entered), fields_of(entered)["location"]) == (303, "/")
        assert status_of(proxy.ask(at(host, "GET", "/", cookie_of(entered)))) == 200
        assert status_of(proxy.ask(at(host, "GET", target, *SAFE_LINES))) == 401
        target = ticket()
        assert status_of(proxy.ask(at("1.localhost:8888", "GET", target, *SAFE_LINES))) == 401
        assert status_of(proxy.ask(at(host, "GET", target, *SAFE_LINES))) == 401
        assert [message[0] for message in app.messages] == ["GET / HTTP/1.1"]
        assert "ticket=" not in caplog.text
        for lines in ((), SAFE_LINES, HANDSHAKE):
            assert status_of(proxy.ask(at("127.0.0.1:8888", "GET", "/proxy/?open=%d" % app.port, *lines))) in (401, 403)

    def test_a_ticket_runs_out_and_there_are_not_too_many(self, start, app):
        proxy = start(token=TOKEN)
        gate = proxy.proxy._around.gate
        visit = Visit("192.0.2.1", "http", "%d.localhost:8888" % app.port, app_port=app.port)
        for _ in range(1500):
            ticket = gate._lead_to_host(app.port, visit).fields[0][1].rpartition("=")[2]
        assert len(gate._tickets) == 1000
        gate._tickets[ticket] = app.port, time.monotonic() - 1
        assert gate._enter(ticket, RequestHead("GET", "/", "a", "1.1", ()), visit).status == 401

    def test_without_a_token_the_way_is_plain(self, start, app):
        proxy = start(allow_hostnames=["a.example"])
        led = proxy.ask(at("localhost:8888", "GET", "/proxy/?open=%d" % app.port))
        assert (status_of(led), fields_of(led)["location"]) == (303, "http://%d.localhost:8888/" % app.port)
        nowhere = proxy.ask(at("a.example", "GET", "/proxy/?open=1"))
        assert (status_of(nowhere), b"--domain" in nowhere[2]) == (404, True)
        assert status_of(proxy.ask(at("localhost", "GET", "/proxy/?open=99999"))) == 404


ORIGINS = [  # method, Origin, Sec-Fetch-Site, Sec-Fetch-Mode, whether it may come in where a browser does so on its own
    ("POST", "http://here:8888", "same-origin", "cors", True), ("POST", "https://here:8888", None, None, True), ("POST", None, None, None, True), ("POST", "http://evil", None, None, False),
    ("POST", "null", None, None, False), ("POST", "http://here", None, None, False), ("DELETE", "http://evil", "cross-site", "cors", False), ("FROB", "http://evil", None, None, False),
    ("POST", "http://evil", "cross-site", "navigate", False), ("POST", "http://localhost:1", "same-site", "cors", False), ("GET", "http://evil", None, None, True),
    ("GET", "http://evil", "cross-site", "cors", False), ("GET", None, "cross-site", "no-cors", False), ("HEAD", None, "cross-site", "no-cors", False), ("GET", None, "cross-site", "navigate", True),
    ("GET", None, "same-site", "no-cors", True), ("GET", None, "none", "navigate", True), ("GET", None, "same-origin", "no-cors", True), ("OPTIONS", "http://evil", None, None, True),
    ("WS", "http://here:8888", "same-origin", "websocket", True), ("WS", None, None, None, True), ("WS", "http://evil", "cross-site", "websocket", False), ("WS", "http://evil", None, None, False),
    ("WS", "null", None, None, False), ("WS", "http://localhost:8888", "same-site", "websocket", False),
]  # fmt: skip


class TestOrigin:
    @pytest.mark.parametrize("method, origin, site, mode, admitted", ORIGINS, ids=case_id)
    def test_pages_of_other_sites(self, start, upstream, method, origin, site, mode, admitted):
        app = upstream(answering(OK))
        lines = ["Accept: text/html"] + ["%s: %s" % field for field in (("Origin", origin), ("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode)) if field[1]]
        raw = request("GET" if method == "WS" else method, "/proxy/%d/" % app.port, *lines, *(HANDSHAKE if method == "WS" else ()))

        def outcome(proxy, *more):
            return status_of(proxy.ask(raw[:-2] + b"".join(line.encode() + b"\r\n" for line in more) + b"\r\n", no_body=method == "HEAD"))

        expected = 200 if admitted else 403
        assert outcome(start()) == expected
        signed = start(token=TOKEN)
        assert outcome(signed, cookie_of(signed.get("/proxy/?token=" + TOKEN, *SAFE_LINES))) == expected
        assert outcome(signed, "Authorization: token " + TOKEN) == 200  # a program that shows the token means it
        assert outcome(start(allow_origins=["*"])) == 200
        assert outcome(start(allow_origins=["http://EVIL:80"])) == (200 if origin == "http://evil" else expected)
        assert app.connections == 0 or not app.failures

    @pytest.mark.parametrize("site, dest, admitted", [("cross-site", "document", True), ("cross-site", "iframe", False), ("cross-site", "object", False), ("same-origin", "iframe", True), ("same-site", "iframe", False), ("same-site", "document", True)])
    def test_a_page_visit_in_a_frame_of_another_site(self, start, upstream, site, dest, admitted):
        """There the person sees nothing of it, and the app in it could read the others."""
        app = upstream(answering(OK))
        raw = request("GET", "/proxy/%d/" % app.port, "Accept: text/html", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Site: " + site, "Sec-Fetch-Dest: " + dest)
        proxy = start(domains=["here"])
        assert status_of(proxy.ask(raw)) == (200 if admitted else 403)
        assert status_of(start(allow_origins=["*"]).ask(raw)) == 200

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
    def test_at_the_host_of_an_app_other_origins_are_refused(self, start, upstream, method):
        """Over plain HTTP browsers do not say that a neighbour asks, but they say which."""
        app = upstream(answering(OK))
        host = "%d.localhost:8888" % app.port
        proxy = start()
        for origin, status in (("http://9.localhost:8888", 403), ("http://" + host, 200)):
            raw = at(host, method, "/", "Origin: " + origin, *(("Content-Length: 0",) if method == "POST" else ()))
            assert status_of(proxy.ask(raw, no_body=method == "HEAD")) == status

    def test_the_log_says_why(self, proxy, caplog):
        with caplog.at_level(logging.INFO, "port_proxy"):
            answer = proxy.ask(request("POST", "/proxy/1/", "Origin: http://evil"))
            eventually(lambda: "http://evil, may not do this here, which is here:8888" in caplog.text)
        assert b"Start the proxy with --allow-origin http://evil if it should be." in answer[2]

    def test_without_an_origin_only_any_can_be_let_in(self, start):
        image = request("GET", "/proxy/1/a.png", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: image")
        assert b"Start the proxy with --allow-origin '*' if any page may." in start().ask(image)[2]
        assert status_of(start(allow_origins=["*"]).ask(image)) == 502
        fetched = request("GET", "/proxy/1/a", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Dest: empty", "Origin: https://a.example")
        assert b"--allow-origin https://a.example if" in start().ask(fetched)[2]
        assert status_of(start(allow_origins=["https://a.example"]).ask(fetched)) == 502

    def test_a_name_that_looks_like_an_option_is_no_advice(self, start):
        answer = start(allow_hostnames=()).ask(request("GET", "/proxy/1/").replace(b"here:8888", b"--no-token"))
        assert (status_of(answer), b"--allow-hostname" in answer[2]) == (403, False)

    def test_a_server_in_front_that_keeps_the_name_to_itself(self, start):
        """nginx sends its own target as Host unless it is told; our own pages then look foreign."""
        raw = request("POST", "/proxy/1/", "Origin: https://public.example")
        assert b"has to pass Host on" in start(trusted_proxies=["127.0.0.1"]).ask(raw)[2]
        assert b"has to pass Host on" not in start().ask(raw)[2]

    @pytest.mark.parametrize("origin, advice", [("HTTPS://Evil.example:443", "--allow-origin https://evil.example if"), ("null", "--allow-origin '*' if any"), ("http://a<b", "--allow-origin '*' if any"), ("\xe4", "--allow-origin '*' if any"), ("http://a;reboot;$(id)", "--allow-origin '*' if any")])
    def test_the_advice_can_be_taken(self, start, origin, advice):
        """It names no origin that the option would refuse, and nothing that a shell would make something else of."""
        raw = request("POST", "/proxy/1/", "Origin: " + origin)
        answer = start().ask(raw)
        assert status_of(answer) == 403
        assert advice in answer[2].decode()
        (option,) = shlex.split(re.search("--allow-origin ([^ ]+) if", answer[2].decode()).group(1))
        assert status_of(start(allow_origins=[option]).ask(raw)) == 502

    @pytest.mark.parametrize("origin, normal", [("HTTPS://A.example:443", "https://a.example"), ("http://a:8080", "http://a:8080"), ("http://[::1]:80", "http://[::1]"), ("https://a:80", "https://a:80")])
    def test_normal_origin(self, origin, normal):
        assert port_proxy.normal_origin(origin) == normal

    @pytest.mark.parametrize("origin", ["null", "a", "http://", "http://a/", "http://u@a", "ftp://a", "http://a b", "http://a?b"])
    def test_no_origin(self, origin):
        with pytest.raises(ValueError):
            checked_config(Config(allow_origins=[origin]))


class TestAuthorize:
    def test_the_embedders_own_gate(self, start, upstream):
        """Asked once per request and Upgrade, before anything is connected; admits, refuses, redirects."""
        asked = []

        async def authorize(head, visit, route):
            asked.append((head.method, head.target, visit.address, route and route.port))
            if "refuse" in head.target:
                raise ProxyError(402, "Not you.")
            if "redirect" in head.target:
                raise ProxyError(302, "", (("Location", "/login"),))

        app = upstream(answering(OK))
        proxy = start(authorize=authorize, bind="0.0.0.0", allow_hostnames=())
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
        assert app.connections == 1
        assert status_of(proxy.get("/proxy/%d/refuse" % app.port)) == 402
        assert status_of(proxy.get("/proxy/%d/refuse" % app.port, *HANDSHAKE)) == 402
        answer = proxy.get("/proxy/redirect:%d/" % app.port)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/login")
        assert status_of(proxy.get("/proxy/")) == 200
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, "Origin: http://evil"))) == 403
        assert app.connections == 1
        assert asked[0] == ("GET", "/proxy/%d/" % app.port, "127.0.0.1", app.port)
        assert len(asked) == 6

    def test_its_mistakes_admit_nobody(self, start, upstream):
        async def authorize(head, visit, route):
            raise KeyError("oops")

        app = upstream(answering(OK))
        assert status_of(start(authorize=authorize).get("/proxy/%d/" % app.port)) == 500
        assert start(authorize=authorize, token="any", bind="0.0.0.0").proxy.token == ""
        assert app.connections == 0

    @pytest.mark.parametrize("field", [("Location", "/a\r\nX: y"), ("Location", "/a\ny"), ("Location", "/\u0142"), ("X: y\r\nZ", "a"), ("", "a"), ("X", "\0")], ids=case_id)
    def test_its_fields_stay_what_they_are(self, start, field):
        """What a visitor wrote and a gate puts into a Location, decoded, cannot become another field."""

        async def authorize(head, visit, route):
            raise ProxyError(302, "", (("Retry-After", 5), field))

        answer = start(authorize=authorize).get("/proxy/80/")
        assert status_of(answer) == 500
        assert not {"location", "x", "z"} & set(fields_of(answer))
        field = "Location", "/\xe4 b"
        answer = start(authorize=authorize).get("/proxy/80/")
        assert (status_of(answer), fields_of(answer)["location"], fields_of(answer)["retry-after"]) == (302, "/\xe4 b", "5")


class TestTrustedProxies:
    @pytest.mark.parametrize(
        "address, fields, visit",
        [
            ("192.0.2.9", (), ("192.0.2.9", "http", "here:8888", "8888", "192.0.2.9")),
            ("192.0.2.9", (("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "evil")), ("192.0.2.9", "http", "here:8888", "8888", "192.0.2.9")),
            ("10.0.0.1", (), ("10.0.0.1", "http", "here:8888", "8888", "10.0.0.1")),
            ("10.0.0.1", (("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "HTTPS"), ("X-Forwarded-Host", "pub.example")), ("1.2.3.4", "https", "pub.example", "443", "1.2.3.4, 10.0.0.1")),
            ("10.0.0.1", (("X-Forwarded-For", "6.6.6.6, 1.2.3.4"), ("X-Forwarded-For", "10.9.9.9")), ("1.2.3.4", "http", "here:8888", "8888", "6.6.6.6, 1.2.3.4, 10.9.9.9, 10.0.0.1")),
            ("10.0.0.1", (("X-Forwarded-Host", "a b"), ("X-Forwarded-Proto", "gopher"), ("X-Forwarded-Port", "x")), ("10.0.0.1", "http", "here:8888", "8888", "10.0.0.1")),
            ("::1", (("X-Forwarded-Host", "pub:81"), ("X-Forwarded-Port", "8443")), ("::1", "http", "pub:81", "8443", "::1")),
            ("", (("X-Forwarded-For", "1.2.3.4"),), ("1.2.3.4", "http", "here:8888", "8888", "1.2.3.4")),
            ("::1", (("X-Forwarded-Proto", "https, http"), ("X-Forwarded-Port", "443,80")), ("::1", "https", "here:8888", "443", "::1")),
            ("::1", (("X-Forwarded-Proto", "http,https"), ("X-Forwarded-Proto", "")), ("::1", "http", "here:8888", "8888", "::1")),
        ],
    )  # fmt: skip
    def test_visit(self, address, fields, visit):
        head = RequestHead("GET", "/", "here:8888", "1.1", fields)
        assert port_proxy.visit_of(head, address, "http", ("10.0.0.0/8", "::1", "unix")) == Visit(*visit)

    def test_on_the_wire(self, start, upstream):
        app = upstream(answering(OK))
        lines = ("X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Forwarded-Host: pub.example")
        proxy = start(trusted_proxies=["127.0.0.1"], token=TOKEN)
        answer = proxy.get("/proxy/?token=" + TOKEN, *(lines + SAFE_LINES))
        assert fields_of(answer)["set-cookie"].endswith("; Secure")
        assert status_of(proxy.get("/proxy/%d/" % app.port, cookie_of(answer), *lines)) == 200
        sent = fields_of(app.messages[-1])
        assert (sent["x-forwarded-for"], sent["x-forwarded-proto"], sent["x-forwarded-host"], sent["x-forwarded-port"]) == ("1.2.3.4, 127.0.0.1", "https", "pub.example", "443")
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, cookie_of(answer), "Origin: https://pub.example", *lines))) == 200
        assert fields_of(app.messages[-1])["origin"] == "http://localhost:%d" % app.port
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, cookie_of(answer), "Origin: http://here:8888", *lines))) == 403


# ---------------------------------------------------------------------------------------------------------------------
# Strays
# ---------------------------------------------------------------------------------------------------------------------

US = "http://here:8888"
STRAYS = [  # fields, whether a navigation, the prefix that is meant
    ([("Referer", US + "/proxy/80/a/b?c")], False, "/proxy/80"), ([("Referer", US + "/proxy/absolute/80/a")], False, "/proxy/absolute/80"), ([("Referer", US + "/proxy/80")], True, "/proxy/80"),
    ([("Referer", US + "/proxy/db:80/#x")], False, "/proxy/db:80"), ([("Referer", US + "/proxy/80/"), ("Cookie", "last=90")], False, "/proxy/80"), ([("Referer", US + "/")], False, None),
    ([("Referer", US + "/"), ("Cookie", "last=90")], False, "/proxy/90"), ([("Referer", US + "/worker.js"), ("Cookie", "a=b; last=absolute/90")], False, "/proxy/absolute/90"),
    ([("Referer", US + "/proxy/"), ("Cookie", "last=90")], False, None), ([("Referer", US + "/proxy?a"), ("Cookie", "last=90")], True, None),  # from our own page
    ([("Referer", "http://evil/proxy/80/"), ("Cookie", "last=90")], False, None), ([("Referer", "http://evil/"), ("Cookie", "last=90")], True, None),
    ([("Referer", US + "/proxy/80/"), ("Sec-Fetch-Site", "cross-site")], True, None), ([("Referer", US + "/proxy/80/"), ("Sec-Fetch-Site", "same-site")], False, None),
    ([("Referer", US + "/proxy/80/"), ("Origin", "http://evil")], False, None), ([("Referer", US + "/proxy/80/"), ("Origin", "null")], False, None),
    ([("Referer", US + "/proxy/80/"), ("Origin", US), ("Sec-Fetch-Site", "same-origin")], False, "/proxy/80"), ([("Sec-Fetch-Site", "same-origin"), ("Cookie", "last=90")], False, "/proxy/90"),
    ([("Sec-Fetch-Site", "same-origin"), ("Origin", "null"), ("Cookie", "last=90")], False, "/proxy/90"), ([("Sec-Fetch-Site", "none"), ("Cookie", "last=90")], False, None),
    ([("Sec-Fetch-Site", "none"), ("Cookie", "last=90")], True, "/proxy/90"), ([("Cookie", "last=90")], True, "/proxy/90"), ([("Cookie", "last=90")], False, None),
    ([("Origin", US), ("Cookie", "last=90")], False, "/proxy/90"), ([("Sec-Fetch-Site", "same-origin")], False, None), ([], True, None), ([], False, None),
    ([("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "same-origin"), ("Cookie", "last=90")], False, None),
    ([("Origin", US), ("Cookie", "last=evil; last=[::1]:90; last=80")], False, "/proxy/[::1]:90"), ([("Origin", US), ("Cookie", "last=80/a")], False, None), ([("Origin", US), ("Cookie", "last=80/..")], False, None),
    ([("Origin", US), ("Cookie", "last=80?a")], False, None), ([("Origin", US), ("Cookie", "last=/80")], False, None), ([("Origin", US), ("Cookie", "last=; xlast=80")], False, None),
    ([("Origin", US), ("Cookie", "last=//evil:80")], False, None), ([("Origin", US), ("Cookie", "last=080")], False, None),
]  # fmt: skip


class TestStrays:
    """Requests that left the prefix, as links that begin with a slash do."""

    @pytest.mark.parametrize("fields, navigation, prefix", STRAYS, ids=case_id)
    def test_which_app_is_meant(self, fields, navigation, prefix):
        head = RequestHead("GET", "/a/%2F?b", "here:8888", "1.1", tuple(fields) + ((("Accept", "text/html"),) if navigation else ()))
        route = port_proxy.find_stray(head, Visit("192.0.2.1", "http", "here:8888"), "/proxy", "last")
        assert (route and (route.prefix, route.path, route.query, route.strayed)) == (prefix and (prefix, "/a/%2F", "?b", True))

    def test_dot_segments_that_leave(self):
        head = RequestHead("GET", "/../8081/", "here:8888", "1.1", (("Referer", US + "/proxy/80/"),))
        assert status_of_error(port_proxy.find_stray, head, Visit("", "http", "here:8888"), "/proxy", "last") == 400

    def test_at_the_root(self):
        for referer, prefix in ((US + "/80/a", "/80"), (US + "/absolute/80/", "/absolute/80"), (US + "/", None)):
            head = RequestHead("GET", "/static/a", "here:8888", "1.1", (("Referer", referer),))
            route = port_proxy.find_stray(head, Visit("", "http", "here:8888"), "", "last")
            assert (route and route.prefix) == prefix

    @pytest.mark.parametrize("base", ["/proxy", "/"])
    def test_led_back(self, start, upstream, base):
        """A 307, which keeps method and body; only its target reaches the app."""
        app = upstream(answering(OK))
        proxy = start(base=base)
        for form in ("%s/%d", "%s/absolute/%d"):
            prefix = form % (base.rstrip("/"), app.port)
            for method, lines in (("GET", ()), ("POST", ("Content-Length: 2", "Origin: " + US)), ("DELETE", ()), ("FROB", ())):
                answer = proxy.ask(request(method, "/static/a%2F?b=/c", "Referer: %s%s/x" % (US, prefix), *lines, body=b"ab" if lines else b""))
                assert (status_of(answer), fields_of(answer)["location"], fields_of(answer)["cache-control"]) == (307, prefix + "/static/a%2F?b=/c", "no-store")
        assert app.connections == 0

    def test_an_upload_is_led_back_once_it_has_come(self, start):
        """However long that takes; who asks whether to send it is told at once not to."""
        proxy = start(linger_timeout=0.1)
        lines = ("Referer: %s/proxy/80/" % US, "Origin: " + US)
        for framing, pieces in (("Content-Length: 6", (b"abc", b"def")), ("Transfer-Encoding: chunked", (b"3\r\nabc\r\n", b"3\r\ndef\r\n0\r\n\r\n"))):
            with proxy.wire() as wire:
                wire.send(request("POST", "/upload", framing, *lines), pieces[0])
                wire.sock.settimeout(0.5)
                with pytest.raises(socket.timeout):
                    wire.more()
                wire.sock.settimeout(WAIT)
                wire.send(pieces[1], request("GET", "/proxy/?port=80"))
                assert [status_of(wire.message()), status_of(wire.message())] == [307, 303]
        assert status_of(proxy.ask(request("POST", "/upload", "Content-Length: 6", "Expect: 100-continue", *lines))) == 307
        assert status_of(proxy.ask(request("POST", "/upload", "Transfer-Encoding: chunked", *lines, body=b"x\r\n"))) == 400

    def test_never_what_is_ours(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start()
        for target in ("/proxy/x", "/proxy/99999/", "/proxy//", "/%70roxy/x", "/proxy/absolute/", "/proxy/08/"):
            assert status_of(proxy.get(target, "Referer: %s/proxy/%d/" % (US, app.port), "Sec-Fetch-Site: same-origin")) == 404
        assert status_of(start(base="/").get("/absolute/x", "Referer: %s/%d/" % (US, app.port))) == 404

    @pytest.mark.parametrize("options", [{"whole_origin": False}, {"base": "/a/b"}, {"trusted_proxies": ["192.0.2.1"]}])
    def test_not_where_others_share_the_origin(self, start, upstream, options):
        app = upstream(answering(OK, b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"))
        proxy = start(**options)
        prefix = "%s/%d" % (options.get("base", "/proxy"), app.port)
        assert status_of(proxy.get("/static/a", "Referer: %s%s/" % (US, prefix))) == 404
        for _ in range(2):
            answer = proxy.get(prefix + "/", *SAFE_LINES)
        assert [value for name, value in answer[1] if name == "Set-Cookie"] == ["a=b"]
        assert status_of(start(base="/a/b", whole_origin=True).get("/static/a", "Referer: %s/a/b/%d/" % (US, app.port))) == 307

    def test_the_app_that_was_opened_last(self, start, upstream):
        """Two apps are open: a cookie says which one came last, for whatever has no Referer."""
        apps = [upstream(lambda wire, app: serve_sockets(wire, app)) for _ in range(2)]
        proxy = start()
        name = "port_proxy_%d_app" % proxy.port
        cookie = ""
        for app in apps:
            answer = proxy.get("/proxy/%d/" % app.port, *SAFE_LINES, *((cookie,) if cookie else ()))
            assert fields_of(answer)["set-cookie"] == "%s=%d; Path=/; HttpOnly; SameSite=Lax" % (name, app.port)
            cookie = cookie_of(answer)
            assert "set-cookie" not in fields_of(proxy.get("/proxy/%d/" % app.port, *SAFE_LINES, cookie))
        for lines in (("Sec-Fetch-Mode: cors", "Accept: */*"), ("Sec-Fetch-Dest: iframe",) + SAFE_LINES, ("Accept: text/html", "Sec-Fetch-Mode: no-cors")):
            assert "set-cookie" not in fields_of(proxy.get("/proxy/%d/" % apps[0].port, cookie, *lines))  # nothing was opened
        assert fields_of(proxy.get("/x", cookie, "Sec-Fetch-Site: same-origin"))["location"] == "/proxy/%d/x" % apps[1].port
        assert fields_of(proxy.get("/x", cookie, "Referer: %s/proxy/%d/" % (US, apps[0].port)))["location"] == "/proxy/%d/x" % apps[0].port
        assert status_of(proxy.get("/socket.io/?a", cookie, "Origin: " + US, *HANDSHAKE, no_body=True)) == 101
        assert apps[1].messages[-1][0] == "GET /socket.io/?a HTTP/1.1"
        assert fields_of(apps[1].messages[-1])["x-forwarded-prefix"] == "/proxy/%d" % apps[1].port
        assert status_of(proxy.get("/socket.io/", cookie, "Origin: http://evil", *HANDSHAKE)) == 404
        assert status_of(proxy.get("/sw.js", cookie, "Sec-Fetch-Site: same-origin", "Sec-Fetch-Dest: serviceworker")) == 200
        assert apps[1].messages[-1][0] == "GET /sw.js HTTP/1.1"
        assert name not in repr(apps[0].messages + apps[1].messages)

    def test_an_apps_own_cookies_reach_it_where_it_is_served_in_place(self, start, upstream):
        """Those with a Path below the prefix, of which we keep copies for all paths; each app gets its own alone."""
        cookies = ("a=1; Path=/; Secure; Max-Age=9", "b=2", "c=3; Path=/x; HttpOnly; Domain=localhost", "__Host-d=4; Path=/; Secure", "=5")
        head = "HTTP/1.1 200 OK\r\n%sContent-Length: 0\r\n\r\n" % "".join("Set-Cookie: %s\r\n" % one for one in cookies)
        app = upstream(lambda wire, app: serve_sockets(wire, app, head.encode()))
        other = upstream(lambda wire, app: serve_sockets(wire, app, head.encode()))
        proxy = start()
        jar = {}
        for one in (other, app):
            answer = proxy.get("/proxy/%d/" % one.port, *SAFE_LINES)
            jar.update(value.split(";")[0].split("=", 1) for name, value in answer[1] if name == "Set-Cookie" and value.startswith("port_proxy_"))
        ours = [value for name, value in answer[1] if name == "Set-Cookie" and value.startswith("port_proxy_")]
        start_of_name = "port_proxy_%d_app_%s_" % (proxy.port, hashlib.sha256(b"%d" % app.port).hexdigest()[:8])
        assert ours == [
            start_of_name + "a=1; Secure; Max-Age=9; Path=/; HttpOnly", start_of_name + "b=2; Path=/; HttpOnly", start_of_name + "c=3; Path=/; HttpOnly",
            "port_proxy_%d_app=%d; Path=/; HttpOnly; SameSite=Lax" % (proxy.port, app.port),
        ]  # fmt: skip
        assert "a=1; Path=/proxy/%d/; Secure; Max-Age=9" % app.port in [value for _, value in answer[1]]
        line = "Cookie: b=newer; " + "; ".join("%s=%s" % pair for pair in sorted(jar.items()))
        assert status_of(proxy.get("/ws", line, "Origin: " + US, *HANDSHAKE, no_body=True)) == 101
        assert fields_of(app.messages[-1])["cookie"] == "b=newer; a=1; c=3"
        assert status_of(proxy.get("/proxy/%d/" % app.port, line)) == 200
        assert fields_of(app.messages[-1])["cookie"] == "b=newer"
        assert [value for name, value in proxy.get("/proxy/%d/" % app.port)[1] if value.startswith("port_proxy_")] == []  # to no program

    def test_nothing_of_ours_can_be_smuggled_in_as_a_copy(self, start, upstream):
        app = upstream(lambda wire, app: serve_sockets(wire, app))
        proxy = start(token=TOKEN)
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        session = cookie[len("Cookie: ") :]
        start_of_name = "port_proxy_%d_app_%s_" % (proxy.port, hashlib.sha256(b"%d" % app.port).hexdigest()[:8])
        line = "%s; port_proxy_%d_app=%d; %s%s; %sx=y" % (cookie, proxy.port, app.port, start_of_name, session, start_of_name)
        assert status_of(proxy.get("/ws", line, "Origin: " + US, *HANDSHAKE, no_body=True)) == 101
        assert fields_of(app.messages[-1])["cookie"] == "x=y"

    def test_cookies_without_a_path_that_are_set_in_place(self):
        route = STRIPPED._replace(strayed=True)
        for value, translated in (("a=b", "a=b; Path=%s/"), ("a=b; Path=/", "a=b; Path=%s/"), ("a=b; Max-Age=1", "a=b; Max-Age=1; Path=%s/")):
            assert sent_to_client(("Set-Cookie", value), route=route)[0] == ("Set-Cookie", translated % STRIPPED.prefix)

    def test_a_service_worker_rules_no_more_than_its_app(self):
        """Served in place its scope could be the whole origin, our pages and other apps in it."""
        own = ("Service-Worker-Allowed", STRIPPED.prefix + "/")
        for value in ("/", "/a/", "./", "../../", "http://here:8888/", STRIPPED.prefix + "/../../", STRIPPED.prefix):
            for route in (STRIPPED, STRIPPED._replace(strayed=True), STRIPPED._replace(absolute=True), STRIPPED._replace(absolute=True, strayed=True)):
                assert sent_to_client(("Service-Worker-Allowed", value), route=route) == (own,)
            assert sent_to_client(("Service-Worker-Allowed", value), route=STRIPPED._replace(prefix="")) == (("Service-Worker-Allowed", value),)
        assert sent_to_client(route=STRIPPED._replace(absolute=True, path="")) == (own,)  # its folder is that of all
        assert sent_to_client(route=STRIPPED._replace(strayed=True)) == (own,)

    def test_behind_the_same_gate(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start(token=TOKEN)
        lines = ("Referer: %s/proxy/%d/" % (US, app.port), "Cookie: port_proxy_%d_app=%d" % (proxy.port, app.port))
        assert status_of(proxy.get("/x", *lines)) == 401
        assert status_of(proxy.get("/x", "Origin: " + US, *(HANDSHAKE + lines))) == 403
        page = proxy.get("/x?y", *(SAFE_LINES + lines))
        assert (status_of(page), b'value="/proxy/%d/x?y"' % app.port in page[2]) == (401, True)
        answer = proxy.get("/x?token=%s&y" % TOKEN, *lines)
        assert (status_of(answer), fields_of(answer)["location"]) == (307, "/proxy/%d/x?y" % app.port)
        asked = []

        async def authorize(head, visit, route):
            asked.append(route)
            raise ProxyError(403, "No.")

        assert status_of(start(authorize=authorize).get("/x", *lines)) == 403
        assert (asked[0].port, asked[0].path, asked[0].strayed) == (app.port, "/x", True)
        assert app.connections == 0

    def test_what_helps_where_nothing_tells(self, start):
        answer = start().ask(at("localhost:8888", "GET", "/packages/a.whl"))
        assert (status_of(answer), b"http://8080.localhost:8888/" in answer[2]) == (404, True)
        assert b"host of its own" not in start(domains=()).get("/packages/a.whl")[2]

    def test_the_bare_origin_is_our_page(self, start):
        proxy = start()
        for lines in (SAFE_LINES, SAFE_LINES + ("Cookie: port_proxy_%d_app=80" % proxy.port, "Sec-Fetch-Site: none")):
            answer = proxy.get("/", *lines)
            assert (status_of(answer), fields_of(answer)["location"]) == (302, "/proxy/")
        assert fields_of(proxy.get("/", "Referer: %s/proxy/80/x" % US, *SAFE_LINES))["location"] == "/proxy/80/"
        assert status_of(start(whole_origin=False).get("/", *SAFE_LINES)) == 404

    def test_a_form_of_a_page_that_sends_no_referrer(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start()
        for site, status in (("same-origin", 200), ("cross-site", 403), ("none", 403)):
            assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, "Origin: null", "Sec-Fetch-Site: " + site, "Content-Length: 0"))) == status

    def test_another_proxy_as_the_app(self, start, upstream):
        """It keeps its cookies, and we ours, also where one port's number begins as the other's."""
        inner = start(token=TOKEN)
        gate = start().proxy._around.gate
        gate.cookie_name, gate.app_cookie = "port_proxy_80", "port_proxy_80_app"
        route = STRIPPED._replace(port=inner.port)
        for name, ours in (("port_proxy_80", True), ("port_proxy_80_app", True), ("port_proxy_80_app_x_a", True), ("port_proxy_%d" % inner.port, False), ("port_proxy_%d_app" % inner.port, False), ("port_proxy_9_app", True)):
            assert gate.owns_cookie(name, route) is ours
        assert not gate.owns_cookie("port_proxy_8080", STRIPPED._replace(port=8080))


def serve_sockets(wire, app, answer=OK):
    """Open WebSockets, and answer all else."""
    while wire.buffer or wire.more():
        app.messages.append(wire.message())
        opens = "sec-websocket-key" in fields_of(app.messages[-1])
        wire.send(SWITCHING if opens else answer)
        if opens:
            wire.rest()
            return


# ---------------------------------------------------------------------------------------------------------------------
# Ports
# ---------------------------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="this system has no /proc/net/tcp")


@needs_proc
class TestPorts:
    def mine(self):
        return {one.port: one for one in port_proxy.listeners() if one.pid == os.getpid()}

    @pytest.mark.parametrize(
        "family, address, told, is_local",
        [
            (socket.AF_INET, "127.0.0.1", "127.0.0.1", True), (socket.AF_INET, "0.0.0.0", "0.0.0.0", True), (socket.AF_INET, "127.0.0.2", "127.0.0.2", False), (socket.AF_INET6, "::1", "::1", True),
            (socket.AF_INET6, "::", "::", True), (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1", True),
        ],
    )  # fmt: skip
    def test_what_listens(self, family, address, told, is_local):
        with socket.socket(family) as sock:
            try:
                sock.bind((address, 0))
            except OSError:
                pytest.skip("this machine has no %s" % address)
            port = sock.getsockname()[1]
            assert port not in self.mine()
            sock.listen(1)
            found = self.mine()[port]
            assert (found.addresses, found.is_local) == ((told,), is_local)
            assert 0 <= time.time() - found.started < 86400
            for host, reached in (("localhost", is_local), ("127.0.0.1", is_local and told != "::1"), ("::1", told in ("::1", "::")), ("db1.example.org", True)):
                assert port_proxy.listens_elsewhere(host, port) == (() if reached else (told,))
        assert port not in self.mine()
        assert port_proxy.listens_elsewhere("localhost", port) == ()

    def test_of_others_and_of_the_system_nothing_is_shown(self, monkeypatch):
        row = "   0: 0100007F:%04X 00000000:0000 0A 00000000:00000000 00:00000000 00000000 %5d        0 %d 1 0 100 0 0 10 0\n"
        me = os.geteuid()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            inode = os.stat("/proc/self/fd/%d" % sock.fileno()).st_ino
            table = "".join(row % values for values in ((8080, me, inode), (8081, me + 1, inode), (631, me, inode), (8082, me, 1)))
            monkeypatch.setattr("builtins.open", lambda name, *more, _open=open, **how: io.StringIO(table if name == "/proc/net/tcp" else "") if name.startswith("/proc/net/") else _open(name, *more, **how))
            assert [one.port for one in port_proxy.listeners()] == [8080]

    def test_where_there_is_no_proc(self, monkeypatch):
        monkeypatch.setattr(port_proxy, "_TABLES", ("/nowhere",))
        monkeypatch.setattr(port_proxy.tcp_sockets, "__defaults__", (("/nowhere",), None))
        assert port_proxy.listeners() == []

    @pytest.mark.parametrize(
        "arguments, name",
        [
            (["/usr/bin/python3", "-m", "http.server", "--secret=x"], "http.server"), (["python3.11", "-u", "-X", "dev", "/srv/app.py", "--token", "x"], "app.py"), (["/usr/bin/node", "/a/b/vite.js"], "vite.js"),
            (["/opt/code-server", "--auth", "x"], "code-server"), (["python3", "-c", "print('secret')"], "python3"), (["node", "-e", "const PASSWORD='hunter2'"], "node"),
            (["perl", "-Mstrict", "-e", "my $k='sk-secret'"], "perl"), (["bash", "-lc", "secret=x serve"], "bash"), (["java", "-cp", "x.jar", "Main"], "java"), (["python3", "-m"], "python3"), (["python3", "my secret.py"], "python3"), (["python3"], "python3"), (["nginx: master process /usr/sbin/nginx"], "nginx"), ([], ""),
            (["nginx: master process nginx -c /etc/secret.conf", "", ""], "nginx"), (["nginx: master process nginx -p /a/ -c b"], "nginx"), (["puma 6.4.0 (tcp://0.0.0.0:3000) [app]"], "puma"),
            (["postgres: worker db=//u:s3cret@h/n"], "postgres"), (["/opt/my app/bin/serve", "--secret"], "serve"), ([""], ""),
        ],
    )  # fmt: skip
    def test_the_name_of_a_program(self, monkeypatch, arguments, name):
        text = "".join(word + "\0" for word in arguments)
        monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(text))
        assert port_proxy._program(1) == name

    def test_processes_that_are_gone(self):
        assert (port_proxy._program(2 ** 30), port_proxy._started(2 ** 30), port_proxy._holders({"1"})) == ("", 0.0, {})


# ---------------------------------------------------------------------------------------------------------------------
# Upstream
# ---------------------------------------------------------------------------------------------------------------------


class TestUpstream:
    def test_connections_are_reused(self, proxy, upstream):
        app = upstream(answering(OK))
        for _ in range(3):
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        assert app.connections == 1

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",  # says so
            b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",  # cannot
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok!",  # sent more than it said
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n",
        ],
        ids=case_id,
    )
    def test_connections_that_are_not_reused(self, proxy, upstream, answer):
        app = upstream(answering(answer))
        for count in range(1, 4):
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
            assert app.connections == count

    @pytest.mark.parametrize("raw", [b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", b"x", None])
    def test_an_idle_connection_that_stirs_is_dropped(self, start, upstream, raw):
        """Bytes or the end, come while it idles, are no answer to the next request."""
        proxy = start(idle_upstream_timeout=10 * WAIT)

        def serve(wire, app):
            app.messages.append(wire.message())
            wire.send(OK)
            app.happened.wait(WAIT)
            with contextlib.suppress(OSError):
                if raw:
                    wire.send(raw)
                else:
                    wire.end()
                wire.rest()

        app = upstream(serve)
        assert proxy.get("/proxy/%d/a" % app.port)[2] == b"ok"
        eventually(lambda: proxy.upstreams._idle_count == 1)
        app.happened.set()
        eventually(lambda: proxy.upstreams._idle_count == 0)
        assert proxy.get("/proxy/%d/b" % app.port)[2] == b"ok"
        assert app.connections == 2

    @pytest.mark.parametrize("method, lines, body", [("GET", (), b""), ("DELETE", (), b""), ("POST", ("Content-Length: 1",), b"a"), ("PUT", ("Content-Length: 1",), b"a"), ("POST", (), b"")])
    def test_a_request_that_dies_on_a_stale_connection(self, proxy, upstream, method, lines, body):
        """Sent again where that is safe; never where the upstream may have acted on it."""

        def serve(wire, app):
            app.messages.append(wire.message())
            wire.send(OK)
            if app.connections == 1:
                app.messages.append(wire.message())  # takes the second request and closes without a word
                return
            while wire.more():
                app.messages.append(wire.message())
                wire.send(OK)

        app = upstream(serve)
        assert proxy.get("/proxy/%d/first" % app.port)[2] == b"ok"
        answer = proxy.ask(request(method, "/proxy/%d/second" % app.port, *lines, body=body))
        safe = method in ("GET", "DELETE")
        assert status_of(answer) == (200 if safe else 502)
        assert [message[0].split(" ")[1] for message in app.messages] == ["/first"] + ["/second"] * (2 if safe else 1)

    def test_a_fresh_connection_that_dies_is_not_tried_again(self, proxy, upstream):
        def serve(wire, app):
            app.messages.append(wire.message())

        app = upstream(serve)
        answer = proxy.get("/proxy/%d/" % app.port)
        assert status_of(answer) == 502
        assert b"closed the connection without an answer" in answer[2]
        assert len(app.messages) == 1

    def test_posts_take_only_what_was_just_used(self, proxy, upstream):
        app = upstream(answering(OK))
        proxy.get("/proxy/%d/" % app.port)
        eventually(lambda: proxy.upstreams._idle_count == 1)
        for idle in proxy.upstreams._idle.values():
            idle[:] = [(stream, since - 1.5) for stream, since in idle]
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1", body=b"a"))) == 200
        assert app.connections == 2

    def test_idle_connections_are_bounded_in_number_and_time(self, start, upstream):
        proxy = start(max_idle_upstreams=2, idle_upstream_timeout=0.2)
        apps = [upstream(answering(OK)) for _ in range(4)]
        for app in apps:
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
            assert proxy.upstreams._idle_count <= 2
        eventually(lambda: proxy.upstreams._idle_count == 0 and not proxy.upstreams._idle)

    def test_a_connection_with_half_a_request_on_it_is_not_kept(self, proxy, upstream):
        """An early answer: what came next on it would be taken for the rest of the body."""

        def serve(wire, app):
            while wire.until(b"\r\n\r\n"):
                wire.send(OK)

        app = upstream(serve)
        for count in range(1, 4):
            with proxy.wire() as wire:
                wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1000"))
                assert wire.message()[2] == b"ok"
            assert app.connections == count

    @pytest.mark.parametrize("begun", [b"HTTP/1.1 200 O", OK[:-1]])
    def test_an_answer_that_has_begun_is_not_asked_for_again(self, proxy, upstream, begun):
        def serve(wire, app):
            for answer in (OK, begun):
                app.messages.append(wire.message())
                wire.send(answer)

        app = upstream(serve)
        assert proxy.get("/proxy/%d/a" % app.port)[2] == b"ok"
        eventually(lambda: proxy.upstreams._idle_count == 1)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/b" % app.port, "Connection: close"))
            wire.rest()
        assert len(app.messages) == 2

    def test_a_connection_to_itself_is_refused(self, proxy, upstream, monkeypatch):
        app = upstream(answering(OK))
        monkeypatch.setattr(port_proxy, "_ends_of", lambda stream: (("127.0.0.1", app.port),) * 2)
        answer = proxy.get("/proxy/%d/" % app.port)
        assert (status_of(answer), b"Nothing listens" in answer[2]) == (502, True)

    @pytest.mark.parametrize("greeting", [b"SSH-2.0-x\r\n", b"220 smtp\r\n", b"-ERR\r\n", b"H", b"HTTP\r\n", b"\r\nHTTP/1.1 200 OK\r\n\r\n"], ids=case_id)
    @pytest.mark.parametrize("ends", [True, False])
    def test_what_is_not_http_is_told_at_once(self, proxy, upstream, greeting, ends):
        """Whether it closes behind its greeting, as Redis does, or waits for more, as mail servers do."""
        app = upstream(lambda wire, app: (wire.send(greeting), wire.until(b"\r\n\r\n"), ends or app.let_go.wait(WAIT)))
        if greeting == b"H" and not ends:
            pytest.skip("it may still become an answer")
        answer = proxy.get("/proxy/%d/" % app.port)
        said = b"in the middle of its answer" if greeting == b"H" else b"What port %d of this machine sent is not valid HTTP." % app.port
        assert (status_of(answer), said in answer[2]) == (502, True)
        app.let_go.set()

    def test_what_an_app_that_closes_may_say_is_in_its_log(self, proxy, upstream):
        app = upstream(lambda wire, app: wire.until(b"\r\n\r\n"))
        answer = proxy.get("/proxy/%d/" % app.port, "Accept: text/html", "Sec-Fetch-Mode: navigate")
        assert b"closed the connection without an answer. Its log may say why." in answer[2]

    @pytest.mark.parametrize("host", ["a..b", "a" * 64])
    def test_a_name_that_cannot_be_looked_up(self, start, host):
        assert status_of(start(host_allowlist=["*"]).get("/proxy/%s:80/" % host)) == 502

    def test_nothing_listens(self, proxy):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            answer = proxy.get("/proxy/%d/" % port)
            assert status_of(answer) == 502
            assert b"Nothing listens on port %d of this machine" % port in answer[2]
            assert fields_of(answer).get("connection") is None

    def test_host_not_found(self, start):
        answer = start(host_allowlist=["*.invalid"]).get("/proxy/nowhere.invalid:80/")
        assert status_of(answer) == 502
        assert b"nowhere.invalid could not be found" in answer[2]

    def test_connection_timed_out(self, start):
        """A listener whose backlog is full lets the kernel drop what else arrives."""
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            fillers = []
            for _ in range(8):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
                fillers.append(filler)
            answer = start(connect_timeout=0.3).get("/proxy/127.0.0.1:%d/" % full.getsockname()[1])
            for filler in fillers:
                filler.close()
        assert status_of(answer) == 504
        assert b"was not answered within 0.3 seconds" in answer[2]

    def test_an_app_that_resets_at_once(self, proxy, upstream):
        """Gone before its address can be asked for: a 502 like any other."""
        app = upstream(Wire.reset_at_once)
        for _ in range(30):
            with proxy.held(), proxy.wire() as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port))
            with proxy.wire() as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port))
                assert status_of(wire.message()) == 502

    def test_what_a_connection_gone_is(self):
        class Gone:
            transport = type("", (), {"get_extra_info": staticmethod(lambda name: None)})
            abort = staticmethod(lambda: None)

        with pytest.raises(ConnectionResetError):
            port_proxy._ends_of(Gone)

    @pytest.mark.parametrize("here, there, listening, reached", [
        (("127.0.0.1", 5), ("127.0.0.1", 80), ("127.0.0.1", 80), True), (("127.0.0.1", 5), ("127.0.0.1", 81), ("127.0.0.1", 80), False),
        (("10.0.0.1", 5), ("10.0.0.1", 80), ("0.0.0.0", 80), True), (("10.0.0.1", 5), ("10.0.0.2", 80), ("0.0.0.0", 80), False), (("::1", 5), ("::1", 80), ("::", 80), True),
        (("127.0.0.1", 5), ("127.0.0.2", 80), ("0.0.0.0", 80), True), (("::1", 5), ("::1", 80), ("127.0.0.1", 80), False),
    ])  # fmt: skip
    def test_reaches(self, here, there, listening, reached):
        assert port_proxy._reaches(here, there, listening) is reached

    def test_the_proxy_does_not_call_itself_by_another_spelling(self, start):
        proxy = start(host_allowlist=["*"])
        try:
            Wire(socket.create_connection(("::ffff:127.0.0.1", proxy.port), WAIT)).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        assert status_of(proxy.get("/proxy/absolute/[::ffff:127.0.0.1]:%d/" % proxy.port)) == 508

    def test_a_connection_with_unsent_bytes_is_not_kept(self, start, upstream):
        """An early answer to an upload whose last bytes are still queued: the next request must not wait behind them."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            if app.connections == 1:
                app.happened.wait(WAIT)
            wire.send(OK)
            app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        proxy = start()
        size = 115000
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: %d" % size))
            eventually(lambda: app.connections == 1 and len(proxy.streams) == 2)
            narrow(proxy, app.port)
            wire.send(bytes(size))
            eventually(lambda: any(stream.transport.get_write_buffer_size() for stream in list(proxy.streams)))
            app.happened.set()
            message = wire.message()
            assert (message[2], fields_of(message).get("connection")) == (b"ok", "close")
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        assert app.connections == 2

    @pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0"])
    def test_the_proxy_does_not_call_itself(self, start, bind):
        proxy = start(bind=bind, token="")
        for form in ("/proxy/%d/", "/proxy/absolute/%d/", "/proxy/127.0.0.1:%d/proxy/"):
            assert status_of(proxy.get(form % proxy.port)) == 508


OTHER_USER = 1234567
LISTEN_AS = """\
import os, socket, sys
os.setuid(int(sys.argv[1]))
while True:  # a proxy that is started later could have the same port at 127.0.0.1
    listener, claim = socket.socket(socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET), socket.socket()
    listener.bind((sys.argv[2], 0)); listener.listen(5)
    if sys.argv[2] != "::1": break
    try: claim.bind(("127.0.0.1", listener.getsockname()[1])); break
    except OSError: pass
print(listener.getsockname()[1], flush=True)
while True:
    wire = listener.accept()[0]
    if wire.recv(65536): wire.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
    wire.close()
"""


class TestPortOwner:
    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
    @pytest.mark.parametrize("user, reached", [(OTHER_USER, False), (0, True), (33, True)])
    @pytest.mark.parametrize("asked", ["the kernel", "the table"])
    def test_listeners_of_others(self, start, host, user, reached, asked, monkeypatch):
        """jupyter-server-proxy issue 590: another user's port is refused, whatever address it listens on."""
        if not Path("/proc/net/tcp").exists() or os.geteuid() != 0:
            pytest.skip("only root on Linux can listen as somebody else")
        if asked == "the table":
            monkeypatch.setattr(port_proxy, "_told_owner", lambda here, there: None)
        elif self._is_told():
            monkeypatch.setattr(port_proxy, "_owner", lambda here, there: OTHER_USER + 1)
        with as_user(user, host) as port:
            name = "[::1]" if host == "::1" else "127.0.0.1"
            for form in ("/proxy/%d/" % port, "/proxy/absolute/%d/" % port, "/proxy/%s:%d/" % (name, port)):
                answer = start().get(form)
                assert status_of(answer) == (200 if reached else 403)
                assert reached or (b"--any-owner" in answer[2] and b"number %d" % OTHER_USER in answer[2])
                assert status_of(start().get(form, *HANDSHAKE)) == (200 if reached else 403)
                assert status_of(start(any_owner=True).get(form)) == 200

    def _is_told(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            return port_proxy._told_user(("0.0.0.0", 0), listener.getsockname()) is not None

    def test_the_kernel_tells_of_sockets_that_are_there(self, upstream):
        if not self._is_told():
            pytest.skip("this system's kernel does not tell")
        app = upstream(lambda wire, app: wire.rest())
        there = ("127.0.0.1", app.port)
        with socket.create_connection(there) as sock:
            eventually(lambda: app.connections)
            assert port_proxy._told_user(sock.getsockname(), there) == os.geteuid()
            assert port_proxy._told_owner(sock.getsockname(), there) == os.geteuid()
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            assert port_proxy._told_owner(("127.0.0.1", 1), closed.getsockname()) is None

    def test_which_row_of_the_table_counts(self, monkeypatch):
        """The accepted socket before listeners; the very address before all; IPv6 for all serves IPv4 only where nothing else does."""

        def table(owners):
            lines = dict.fromkeys(("/proc/net/tcp", "/proc/net/tcp6"), "  sl  local_address\n")
            for at, (name, address, peer, state, owner) in enumerate(owners):
                lines["/proc/net/" + name] += "%4d: %s:0050 %s %s 00000000:00000000 00:00000000 00000000 %5d        0 1 1 0\n" % (at, address, peer, state, owner)
            return lambda name, **_: io.StringIO(lines[name])

        any4, own4, any6, own6 = "0" * 8, port_proxy._hexadecimal("127.0.0.1"), "0" * 32, port_proxy._hexadecimal("::1")
        none, here = "00000000:0000", port_proxy._hexadecimal("127.0.0.1") + ":0005"
        for owners, address, owner in (
            ([("tcp", any4, none, "0A", 1)], "127.0.0.1", 1), ([("tcp", any4, none, "0A", 1), ("tcp", own4, none, "0A", 2)], "127.0.0.1", 2), ([("tcp6", any6, none, "0A", 3)], "127.0.0.1", 3),
            ([("tcp6", any6, none, "0A", 3), ("tcp", any4, none, "0A", 1)], "127.0.0.1", 1), ([("tcp", any4, none, "0A", 1), ("tcp6", any6, none, "0A", 3)], "::1", 3),
            ([("tcp6", any6, none, "0A", 3), ("tcp6", own6, none, "0A", 4)], "::1", 4), ([("tcp", any4, none, "0A", 1)], "::1", None), ([], "127.0.0.1", None),
            ([("tcp", own4, none, "0A", 2), ("tcp", own4, here, "01", 5)], "127.0.0.1", 5), ([("tcp", own4, none, "0A", 2), ("tcp", own4, here, "01", 0)], "127.0.0.1", 2),
        ):  # fmt: skip
            monkeypatch.setattr(port_proxy, "open", table(owners), raising=False)
            assert port_proxy._owner((address, 5), (address, 80)) == owner

    def test_own_ports_and_the_table(self, upstream):
        if not Path("/proc/net/tcp").exists():
            pytest.skip("this system has no /proc/net/tcp")
        for host in ("127.0.0.1", "0.0.0.0", "::1", "::"):
            app = upstream(lambda wire, app: wire.rest(), host=host)
            with socket.create_connection(("::1" if host == "::1" else "127.0.0.1", app.port)) as sock:
                assert port_proxy._owner(sock.getsockname()[:2], sock.getpeername()[:2]) == os.geteuid()

    def test_where_the_table_is_not_to_be_had(self, start, upstream, monkeypatch):
        monkeypatch.setattr(port_proxy, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError()), raising=False)
        app = upstream(answering(OK))
        assert status_of(start().get("/proxy/%d/" % app.port)) == 200

    def test_looking_is_bounded(self, monkeypatch):
        """What a look said is believed for a while; it is not looked up for every connection."""
        looks = []
        monkeypatch.setattr(port_proxy, "_told_owner", lambda here, there: (looks.append(there), threading.Event().wait(0.05), OTHER_USER)[2])
        owners = port_proxy.Owners()
        assert [owners.stranger(("127.0.0.1", n), ("127.0.0.1", 80)) for n in range(20)] == [OTHER_USER] * 20
        assert len(looks) == 1


@contextlib.contextmanager
def as_user(user, host):
    """A server that another user runs; its port."""
    process = subprocess.Popen([sys.executable, "-c", LISTEN_AS, str(user), host], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------

NAVIGATION = ("Accept: text/html,application/xhtml+xml,*/*;q=0.8", "Sec-Fetch-Mode: navigate")


def without_tags(page):
    return re.sub(b"<[^>]*>", b"", page)


@pytest.fixture
def no_ports(monkeypatch):
    monkeypatch.setattr(port_proxy, "listeners", list)


class TestPages:
    @pytest.mark.parametrize(
        "method, fields, html",
        [
            ("GET", [("Accept", "text/html, */*")], True), ("GET", [("Accept", "text/html"), ("Sec-Fetch-Mode", "navigate")], True),
            ("GET", [("Accept", "text/html"), ("Sec-Fetch-Mode", "cors")], False), ("GET", [("Accept", "*/*")], False), ("GET", [], False), ("PUT", [("Accept", "text/html")], False),
        ],
    )  # fmt: skip
    def test_who_gets_html(self, method, fields, html):
        assert wants_html(RequestHead(method, "/", "a", "1.1", tuple(fields))) is html

    def test_error_page_is_inert(self):
        """CVE-2024-35225: what a page says is text, whatever it says."""
        response = error_response(ProxyError(502, "<script>alert(1)</script>&."), True)
        assert b"<script" not in response.body
        assert b"&lt;script&gt;" in response.body
        assert b'<code class="option">--any-owner</code>' in error_response(ProxyError(403, "Start it with --any-owner."), True).body
        fields = dict(response.fields)
        assert fields["Content-Type"] == "text/html; charset=utf-8"
        assert fields["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in fields["Content-Security-Policy"]
        digest = base64.b64encode(hashlib.sha256(re.search(b"<style>(.*)</style>", response.body, re.S).group(1)).digest())
        assert "'sha256-%s'" % digest.decode() in fields["Content-Security-Policy"]

    def test_nothing_of_the_request_is_reflected(self, proxy):
        evil = "<script>alert(1)</script>"
        for target in ("/" + evil, "/proxy/" + evil, "/proxy/1/../" + evil, "/proxy/1?" + evil, "/proxy/%s:80/" % evil):
            for lines in ((), NAVIGATION):
                assert b"<script" not in proxy.get(target, *lines)[2]

    def test_page_without_ports(self, proxy, no_ports):
        for target in ("/proxy", "/proxy/"):
            page = proxy.get(target, *NAVIGATION)
            assert (status_of(page), fields_of(page)["content-type"]) == (200, "text/html; charset=utf-8")
            assert (b"No program of yours listens" in page[2]) is port_proxy.ports_are_told()
            text = proxy.get(target)
            assert fields_of(text)["content-type"] == "text/plain; charset=utf-8"
            for form in (b"/proxy/8080/", b"/proxy/absolute/8080/", b"/proxy/db1.example.org:8080/"):
                assert form in page[2]
                assert form in text[2]
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 0"))) == 405

    def test_where_the_system_tells_nothing(self, proxy, no_ports, monkeypatch):
        monkeypatch.setattr(port_proxy, "_TABLES", ("/nowhere",))
        page = proxy.get("/proxy/", *NAVIGATION)[2]
        assert b"does not tell which ports are in use" in page
        assert b'name="port"' in page

    def test_ports(self, start, monkeypatch):
        """Each with its program, title, age and ways, as a page, as text and as data; what an app says is inert."""
        now = time.time()
        proxy = start(host_allowlist=["db"])
        shown = [
            port_proxy.Listener(8080, ("127.0.0.1",), "1", 7, "<b>app</b>", now - 7300), port_proxy.Listener(8081, ("192.0.2.7",), "2", 8, "other", 0.0),
            port_proxy.Listener(proxy.port, ("127.0.0.1",), "3", 9, "self", now),
        ]  # fmt: skip
        monkeypatch.setattr(port_proxy, "listeners", lambda: shown)
        proxy.proxy._around.titles._seen.update({8080: ("<i>t</i>", now), 8081: ("x" * 100, now)})
        data = json.loads(proxy.ask(at("localhost:8888", "GET", "/proxy/", "Accept: application/json"))[2].decode())
        first, second = data["ports"]
        assert first == {
            "port": 8080, "addresses": ["127.0.0.1"], "program": "<b>app</b>", "pid": 7, "seconds": first["seconds"], "title": "<i>t</i>",
            "links": {"host": "http://8080.localhost:8888/", "stripped": "/proxy/8080/", "absolute": "/proxy/absolute/8080/"},
        }  # fmt: skip
        assert 7300 <= first["seconds"] < 7400
        assert (second["port"], second["seconds"]) == (8081, None)
        page = proxy.ask(at("localhost:8888", "GET", "/proxy/", *NAVIGATION))[2].decode()
        for part in ('<a class="port" href="http://8080.localhost:8888/">8080</a>&lt;i&gt;t&lt;/i&gt;', "&lt;b&gt;app&lt;/b&gt; \u00b7 2 hours", 'href="/proxy/absolute/8080/"', "listens at 192.0.2.7 alone"):
            assert part in page
        assert "<b>" not in page
        assert "<i>" not in page
        assert page.count("<li id=") == 2
        fragment = proxy.ask(at("localhost:8888", "GET", "/proxy/?list", "Accept: */*"))[2].decode()
        assert fragment.strip() in page
        assert "/proxy/8080/ " in proxy.get("/proxy/")[2].decode()
        assert json.loads(proxy.ask(at("a.example", "GET", "/proxy/", "Accept: application/json"))[2].decode())["ports"][0]["links"] == {"stripped": "/proxy/8080/", "absolute": "/proxy/absolute/8080/"}
        signed = start(token=TOKEN)
        data = json.loads(signed.ask(at("localhost:8888", "GET", "/proxy/", "Accept: application/json", "Authorization: token " + TOKEN))[2].decode())
        assert data["ports"][0]["links"]["host"] == "/proxy/?open=8080"

    @pytest.mark.parametrize("seconds, text", [(0, "just started"), (61, "1 minute"), (3599, "59 minutes"), (7300, "2 hours"), (90000, "1 day"), (-5, "just started")])
    def test_for_how_long(self, seconds, text):
        assert port_proxy._for_how_long(seconds) == text

    @pytest.mark.parametrize(
        "port, location",
        [("8080", "/proxy/8080/"), ("+8080+", "/proxy/8080/"), ("db:80", "/proxy/db:80/"), ("absolute/80", "/proxy/absolute/80/"), ("80/x?y", "/proxy/80/"), ("80/x%0D%0Aa:b", None), ("80%0D%0Aa:b", None), ("a", None), ("//evil", None), ("99999", None)],
    )  # fmt: skip
    def test_a_port_is_typed(self, proxy, port, location):
        answer = proxy.get("/proxy/?port=" + port, *NAVIGATION)
        assert (status_of(answer), fields_of(answer).get("location")) == ((303, location) if location else (404, None))

    @pytest.mark.parametrize(
        "fields, body, title",
        [
            ("Content-Type: text/html", b"<html><TITLE class=a> My\n app &amp; more </TITLE>", "My app & more"), ("Content-Type: text/html; charset=utf-8", "<title>\u00e4</title>".encode(), "\u00e4"),
            ("Content-Type: text/html\r\nContent-Encoding: gzip", gzip.compress(b"<title>packed</title>" + bytes(range(256)) * 2000), "packed"),
            ("Content-Type: text/html\r\nContent-Encoding: gzip", b"no gzip", None), ("Content-Type: text/html\r\nContent-Encoding: br", b"<title>a</title>", None), ("Content-Type: text/plain", b"<title>a</title>", None),
            ("Content-Type: text/html", b"<title>never closed", None), ("Content-Type: text/html", b"<title>" + b"x" * 300 + b"</title>", "x" * 100), ("Content-Type: text/html", b"", None),
        ],
    )  # fmt: skip
    def test_titles_of_what_goes_by(self, proxy, upstream, monkeypatch, fields, body, title):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(("HTTP/1.1 200 OK\r\n%s\r\nContent-Length: %d\r\n\r\n" % (fields, len(body))).encode())
            if app.connections % 2:  # the head alone, and all else once it has been passed on
                app.let_go.wait(WAIT)
            wire.send(body)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *NAVIGATION))
            head = wire.until(b"\r\n\r\n")
            app.let_go.set()
            assert wire.exactly(len(body)) == body
        assert head.startswith(b"HTTP/1.1 200")
        listener = port_proxy.Listener(app.port, ("127.0.0.1",), "1", 7, "app", time.time() - 60)
        titles = proxy.proxy._around.titles
        assert titles.of([listener]) == ({app.port: title} if title else {})
        assert titles.of([listener._replace(started=time.time() + 60)]) == {}  # another program since

    def test_the_waiting_page(self, proxy):
        """For a person's navigation; all others are told at once."""
        port = free_port()
        page = proxy.get("/proxy/%d/" % port, *NAVIGATION)
        fields = fields_of(page)
        assert (status_of(page), fields["port-proxy"], fields["retry-after"], fields["cache-control"]) == (502, "waiting", "2", "no-store")
        assert b"Nothing listens on port %d of this machine" % port in page[2]
        assert b"--check %d" % port in page[2]
        script = re.search(b"<script>(.*)</script>", page[2], re.S).group(1)
        assert "script-src 'sha256-%s'" % base64.b64encode(hashlib.sha256(script).digest()).decode() in fields["content-security-policy"]
        for method, lines in (("GET", ()), ("POST", NAVIGATION + ("Content-Length: 0",)), ("GET", HANDSHAKE), ("GET", ("Accept: text/html", "Sec-Fetch-Mode: cors"))):
            answer = proxy.ask(request(method, "/proxy/%d/" % port, *lines))
            assert (status_of(answer), fields_of(answer)["retry-after"], b"<script" in answer[2]) == (502, "2", False)

    @needs_proc
    def test_who_listens_on_another_address_alone_is_told(self, proxy, upstream):
        app = upstream(answering(OK), host="127.0.0.2")
        for lines in ((), NAVIGATION):
            said = without_tags(proxy.get("/proxy/%d/" % app.port, *lines)[2])
            assert b"listens at 127.0.0.2 alone, not at localhost" in said
            assert b"--host-allowlist 127.0.0.2" in said

    @needs_proc
    def test_who_listens_at_the_other_loopback_address_is_told(self, proxy, upstream):
        app = upstream(answering(OK))
        answer = proxy.get("/proxy/[::1]:%d/" % app.port)
        if b"No connection to" in answer[2]:
            pytest.skip("this machine has no IPv6 loopback")
        said = answer[2].decode()
        assert "The app on port {0} listens at 127.0.0.1 alone, not at ::1. Open {0} in place of [::1]:{0}.".format(app.port) in said

    def test_an_ipv6_address_is_named_as_it_is_asked_for(self):
        both = port_proxy.NotListening(STRIPPED._replace(host="127.0.0.1"), ("127.0.0.2", "::1")).detail
        assert both == "The app on port 8080 listens at 127.0.0.2 and ::1 alone, not at 127.0.0.1. Open 8080 in place of 127.0.0.1:8080."
        said = port_proxy.NotListening(STRIPPED, ("2001:db8::7",)).detail
        assert said.endswith("with --host-allowlist 2001:db8::7, and open [2001:db8::7]:8080 in place of 8080.")

    def test_looking_for_it_never_costs_more_than_a_twentieth_of_the_time(self, proxy, monkeypatch):
        looked, clock = [], [0.0]

        def look(host, port):
            looked.append(port)
            clock[0] += 0.05
            return ("192.0.2.7",)

        monkeypatch.setattr(port_proxy, "listens_elsewhere", look)
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        owners = port_proxy.Owners()
        assert [owners.elsewhere("localhost", port) for port in (80, 80, 81, 80)] == [("192.0.2.7",)] * 4
        assert looked == [80, 81]
        clock[0] = 1.2
        owners.elsewhere("localhost", 80)
        assert looked == [80, 81, 80]
        for port in range(2000):
            owners._elsewhere["localhost", port] = (), 0.0
        owners.elsewhere("localhost", 3000)
        assert len(owners._elsewhere) == 1

    def test_who_speaks_tls_is_told(self, proxy, upstream):
        """By what it sends, or, where it only closes, by a handshake of our own that a person's visit is worth."""
        alert, hello = b"\x15\x03\x01\x00\x02\x02\x46", b"\x16\x03\x03\x00\x7a\x02"

        def serve(wire, app):
            first = wire.more() and wire.buffer[:1]
            wire.send(b"" if first != b"\x16" and app.is_curt else hello if first == b"\x16" else alert)

        app = upstream(serve)
        for app.is_curt, lines, told in ((False, (), True), (False, NAVIGATION, True), (True, NAVIGATION, True), (True, (), False)):
            answer = proxy.get("/proxy/%d/" % app.port, *lines)
            assert (status_of(answer), b"speaks TLS. Start the proxy with --upstream-tls %d" % app.port in without_tags(answer[2])) == (502, told)
        assert b"without an answer. If it speaks TLS, start the proxy with --upstream-tls %d." % app.port in answer[2]
        other = upstream(lambda wire, app: wire.more())
        assert b"--upstream-tls" not in proxy.get("/proxy/%d/" % other.port, *NAVIGATION)[2]

    def test_head_has_no_body(self, proxy):
        with proxy.wire() as wire:
            wire.send(request("HEAD", "/proxy/"), request("HEAD", "/nothing"), request("GET", "/proxy/"))
            assert status_of(wire.message(no_body=True)) == 200
            assert status_of(wire.message(no_body=True)) == 404
            assert wire.message()[2]


# ---------------------------------------------------------------------------------------------------------------------
# JupyterHub
# ---------------------------------------------------------------------------------------------------------------------

PREFIX = "/jh/user/al@ice.x%2By"
PAGE = ("Accept: text/html", "Sec-Fetch-Mode: navigate")


class HubBehindWire:
    """A Hub's API as far as a server uses it, on a real socket: what it was asked, and what it answers.

    users: models by token; codes: tokens by code, each with the challenge that the code was bought with; asked: request
    lines with the fields and body; broken: what it answers instead of all that, by path.
    """

    def __init__(self):
        self.users, self.codes, self.asked, self.broken = {}, {}, [], {}

    def __call__(self, wire, app):
        while wire.buffer or wire.more():
            message = wire.message()
            self.asked.append(message)
            status, answer = self.answer(message)
            body = self.broken.get(message[0].split(" ")[1]) or json.dumps(answer).encode()
            wire.send(b"HTTP/1.1 %d Because\r\nX-JupyterHub-Version: 6.1.0\r\nContent-Length: %d\r\n\r\n" % (status, len(body)), body)

    def answer(self, message):
        method, path, _ = message[0].split(" ")
        if (method, path) == ("GET", "/hub/api/user"):
            user = self.users.get(fields_of(message)["authorization"][len("token ") :])
            return (200, user) if user else (403, {"message": "no"})
        if (method, path) == ("POST", "/hub/api/oauth2/token"):
            form = dict(parse_qsl(message[2].decode()))
            token, challenge = self.codes.pop(form["code"], ("", ""))
            made = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).decode().rstrip("=")
            good = token and made == challenge and (form["client_id"], form["client_secret"]) == ("jupyterhub-user-al%40ice", "server-token")
            return (200, {"access_token": token}) if good else (400, {"error": "invalid_grant"})
        return (200, {"version": "6.1.0"})

    def questions(self, path):
        return [message for message in self.asked if message[0].split(" ")[1] == path]


OWNER = {"kind": "user", "name": "al@ice.x+y", "scopes": ["access:servers!server=al@ice.x+y/", "read:users:name!user"]}
STRANGER = {"kind": "user", "name": "mallory", "scopes": ["access:servers!user=mallory"]}
ADMIN = {"kind": "user", "name": "boss", "scopes": ["access:servers", "admin:users"]}


def number_of_refusal(wire):
    """Whether a 503 comes, at once."""
    wire.sock.settimeout(0.5)
    try:
        return status_of(wire.message()) == 503
    except socket.timeout:
        return False


class TestHub:
    @pytest.fixture
    def hub(self, upstream):
        hub = HubBehindWire()
        hub.port = upstream(hub).port
        hub.users = {"owner-token": OWNER, "stranger-token": STRANGER, "admin-token": ADMIN, "server-token": OWNER}
        return hub

    @pytest.fixture
    def begin(self, start, hub):
        def begin(**options):
            told = Hub(
                prefix=PREFIX, user="al@ice.x+y", api_url="http://127.0.0.1:%d/hub/api" % hub.port, api_token="server-token", client_id="jupyterhub-user-al%40ice",
                authorize_url="/jh/hub/api/oauth2/authorize", callback_url=PREFIX + "/oauth_callback",
                access_scopes=frozenset(["access:servers!server=al@ice.x+y/", "access:servers!user=al@ice.x+y"]),
            )._replace(**options)  # fmt: skip
            return start(base=PREFIX + "/proxy", hub=told, token="", trusted_proxies=["127.0.0.1"], allow_hostnames=(), shutdown_timeout=0.3)

        return begin

    @pytest.fixture
    def proxy(self, begin):
        return begin()

    @pytest.fixture
    def app(self, upstream):
        return upstream(answering(OK))

    def sent_to_hub(self, proxy, target, *lines):
        """Visit a page without being signed in: (the parameters for the Hub, the login's cookie)."""
        answer = proxy.get(target, *(PAGE + lines))
        assert status_of(answer) == 302
        place, _, query = fields_of(answer)["location"].partition("?")
        assert place == "/jh/hub/api/oauth2/authorize"
        return dict(parse_qsl(query)), cookie_of(answer)

    def come_back(self, proxy, hub, asked, *lines, token="owner-token"):
        hub.codes["code"] = (token, asked["code_challenge"])
        return proxy.get("%s/oauth_callback?code=code&state=%s" % (PREFIX, asked["state"]), *(PAGE + lines))

    def sign_in(self, proxy, hub, target=PREFIX + "/proxy/", token="owner-token", session="a"):
        """The Cookie field of a browser that has signed in."""
        asked, cookie = self.sent_to_hub(proxy, target)
        answer = self.come_back(proxy, hub, asked, "%s; jupyterhub-session-id=%s" % (cookie, session), token=token)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, target)
        cookies = [value.split(";")[0] for name, value in answer[1] if name == "Set-Cookie" and "Max-Age=0" not in value]
        return "Cookie: jupyterhub-session-id=%s; %s" % (session, cookies[0])

    def test_readiness(self, proxy, hub):
        """Asked by the Hub itself, which is not signed in; the version is looked up once."""
        for target in (PREFIX + "/api", PREFIX + "/api/", "/jh/user/al%40ice.x+y/api"):
            answer = proxy.get(target)
            assert (status_of(answer), fields_of(answer)["x-jupyterhub-version"]) == (200, "6.1.0")
        assert len(hub.asked) == 1

    def test_readiness_without_a_hub(self, begin, upstream):
        broken = upstream(once(b"HTTP/1.1 500 No\r\n\r\n"))
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % broken.port)
        for _ in range(5):
            answer = proxy.get(PREFIX + "/api")
            assert (status_of(answer), "x-jupyterhub-version" in fields_of(answer)) == (200, False)
        assert broken.connections == 1  # it is not asked again at once

    def test_sign_in(self, proxy, hub, app):
        target = "%s/proxy/%d/a?b=%%2F&c" % (PREFIX, app.port)
        asked, cookie = self.sent_to_hub(proxy, target)
        assert (asked["client_id"], asked["redirect_uri"], asked["response_type"]) == ("jupyterhub-user-al%40ice", PREFIX + "/oauth_callback", "code")
        assert (asked["code_challenge_method"], len(asked["state"]) >= 22) == ("S256", True)
        assert asked["state"] not in cookie
        answer = self.come_back(proxy, hub, asked, cookie)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, target)
        assert dict(parse_qsl(hub.questions("/hub/api/oauth2/token")[0][2].decode()))["redirect_uri"] == PREFIX + "/oauth_callback"
        set_cookies = [value for name, value in answer[1] if name == "Set-Cookie"]
        session = next(value for value in set_cookies if "Max-Age" not in value)
        assert {part.strip() for part in session.split(";")[1:]} == {"Path=%s/" % PREFIX, "HttpOnly", "SameSite=Lax"}
        assert "owner-token" not in repr(answer)
        over = next(value for value in set_cookies if "Max-Age=0" in value)
        assert over.split("=")[0] == cookie[len("Cookie: ") :].split("=")[0]
        assert status_of(proxy.get(target, "Cookie: a=b; %s; jupyterhub-session-id=x; __Host-jupyterhub-user=y; c=d" % session.split(";")[0])) == 200
        assert fields_of(app.messages[-1])["cookie"] == "a=b; c=d"
        again = self.come_back(proxy, hub, asked, cookie)  # a state counts once
        assert (status_of(again), b"This sign-in is over" in again[2]) == (403, True)

    @pytest.mark.parametrize("shown", ["", "Cookie: %s=wrong", "Cookie: %s=", "Cookie: other=%s", "Cookie: %s=\xe9"])
    def test_a_login_belongs_to_its_browser(self, proxy, hub, shown):
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        lines = (shown.replace("%s", cookie[len("Cookie: ") :].split("=")[0]),) if shown else ()
        answer = self.come_back(proxy, hub, asked, *lines)
        assert (status_of(answer), b"another browser" in answer[2], hub.questions("/hub/api/oauth2/token")) == (403, True, [])

    def test_a_login_is_over_after_ten_minutes(self, proxy, hub, background):
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        logins = proxy.proxy._around.gate._logins
        login = logins[asked["state"]]
        assert 590 < login.until - background.loop.time() <= 600
        logins[asked["state"]] = login._replace(until=background.loop.time() - 1)
        assert status_of(self.come_back(proxy, hub, asked, cookie)) == 403

    @pytest.mark.parametrize(
        "query, says",
        [
            ("state=%s&error=access_denied", b"did not sign you in: access_denied."), ("state=%s&error=<b>", b"no reason given"), ("state=%s", b"no reason given"),
            ("state=%s&code=wrong", b"did not take this sign-in for valid"), ("state=x&code=a", b"is over"), ("code=a", b"is over"), ("", b"is over"),
        ],
    )  # fmt: skip
    def test_a_login_that_fails(self, proxy, query, says):
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        answer = proxy.get("%s/oauth_callback?%s" % (PREFIX, query.replace("%s", asked["state"])), cookie, *PAGE)
        assert (status_of(answer), says in answer[2], PREFIX.encode() + b"/ again" in answer[2]) == (403, True, True)

    @pytest.mark.parametrize(
        "target, leads_to",
        [
            (PREFIX + "/proxy/80", PREFIX + "/proxy/80"), ("/jh/user/al%40ice.x+y/proxy/80/?a", PREFIX + "/proxy/80/?a"), ("/j%68/user/al@ice.x+y", PREFIX + "/"),
            (PREFIX + "/proxy/80/" + "a" * 5000, PREFIX + "/"), (PREFIX + "/proxy/80/\\x", PREFIX + "/"), (PREFIX + "/", PREFIX + "/"),
        ],
    )  # fmt: skip
    def test_where_a_login_leads(self, proxy, hub, target, leads_to):
        """The prefix is spelt as in the cookie's Path: a browser that is led elsewhere would have to sign in for ever."""
        asked, cookie = self.sent_to_hub(proxy, target)
        assert fields_of(self.come_back(proxy, hub, asked, cookie))["location"] == leads_to

    @pytest.mark.parametrize("target", ["//evil.example/proxy/80/", "/jh/user/mallory/proxy/80/", "/proxy/80/", "/", "/jh/user/al@ice.x%2By2/"])
    def test_what_is_not_ours(self, proxy, target):
        assert status_of(proxy.get(target, *PAGE)) == 404

    def test_only_page_visits_are_sent_to_the_hub(self, proxy, app):
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        for method, lines in (("POST", PAGE), ("PUT", ()), ("GET", ()), ("GET", ("Accept: text/html", "Sec-Fetch-Mode: cors")), ("GET", PAGE + HANDSHAKE), ("OPTIONS", PAGE), ("PROPFIND", PAGE)):
            assert status_of(proxy.ask(request(method, target, *lines))) == 403
        assert status_of(proxy.ask(request("HEAD", target, *PAGE), no_body=True)) == 302
        assert app.connections == 0

    @pytest.mark.parametrize("token, status", [("owner-token", 200), ("admin-token", 200), ("server-token", 200), ("stranger-token", 403), ("unknown", 403)])
    def test_tokens(self, proxy, app, hub, token, status):
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        for query, lines in (("", ("Authorization: token " + token,)), ("", ("Authorization: Bearer " + token,)), ("?a&token=%s&b" % token, ())):
            assert status_of(proxy.get(target + query, *lines)) == status
        assert len(hub.asked) == 1  # the Hub's word is believed for a minute
        assert [message[0] for message in app.messages] == ["GET / HTTP/1.1", "GET / HTTP/1.1", "GET /?a&b HTTP/1.1"][: 3 if status == 200 else 0]
        assert token not in repr(app.messages)

    def test_a_strangers_account_does_not_get_in(self, proxy, hub, app):
        asked, cookie = self.sent_to_hub(proxy, "%s/proxy/%d/" % (PREFIX, app.port))
        answer = self.come_back(proxy, hub, asked, cookie, token="stranger-token")
        assert (status_of(answer), b"signed in as mallory" in answer[2], b"that of al@ice.x+y" in answer[2]) == (403, True, True)
        assert "set-cookie" not in fields_of(answer)
        assert app.connections == 0

    def test_access_that_is_taken_away(self, proxy, hub):
        """When the Hub is asked again, which a new Hub session makes it be at once."""
        cookie = self.sign_in(proxy, hub)
        hub.users["owner-token"] = dict(OWNER, scopes=[])
        assert status_of(proxy.get(PREFIX + "/proxy/", cookie, *PAGE)) == 200
        answer = proxy.get(PREFIX + "/proxy/", cookie.replace("-id=a", "-id=b"), *PAGE)
        assert (status_of(answer), b"no access to this server" in answer[2]) == (403, True)

    def test_a_token_in_the_address_signs_a_browser_in(self, proxy, app):
        target = "%s/proxy/%d/a?b&token=TOKEN&c" % (PREFIX, app.port)
        answer = proxy.get(target.replace("TOKEN", "owner-token"), *PAGE)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "%s/proxy/%d/a?b&c" % (PREFIX, app.port))
        assert status_of(proxy.get("%s/proxy/%d/" % (PREFIX, app.port), cookie_of(answer))) == 200
        signed_in = cookie_of(answer)
        assert status_of(proxy.get(target.replace("TOKEN", "apps-own"), signed_in, *PAGE)) == 200
        assert app.messages[-1][0] == "GET /a?b&token=apps-own&c HTTP/1.1"
        again = proxy.get(target.replace("TOKEN", "admin-token"), signed_in, *PAGE)  # who is signed in stays that
        assert (status_of(again), "set-cookie" in fields_of(again)) == (302, False)
        foreign = proxy.get(target.replace("TOKEN", "admin-token"), "Sec-Fetch-Site: cross-site", *PAGE)
        assert fields_of(foreign)["location"].startswith("/jh/hub/api/oauth2/authorize?")

    def test_signing_out_with_a_token_that_lives_on(self, proxy, hub, app):
        """A session that began with a token is over when that of the Hub is, though the Hub knows the token still."""
        hub_cookie = "Cookie: jupyterhub-session-id=a"
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        cookie = cookie_of(proxy.get(target + "?token=owner-token", hub_cookie, *PAGE))[len("Cookie: ") :]
        assert status_of(proxy.get(target, hub_cookie + "; " + cookie)) == 200
        assert status_of(proxy.get(target, "Cookie: " + cookie)) == 403
        assert status_of(proxy.get(target, hub_cookie + "; " + cookie)) == 403

    def test_all_tokens_of_the_hub_are_cut(self, proxy, hub, app):
        """Also those that did not let the request in."""
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        proxy.get(target + "?token=owner-token&token=apps-own&token=admin-token", "Authorization: token server-token", "Referer: http://here:8888%s?token=stranger-token&x" % target)
        assert app.messages[-1][0] == "GET /?token=apps-own HTTP/1.1"
        assert "authorization" not in fields_of(app.messages[-1])
        assert fields_of(app.messages[-1])["referer"] == "http://localhost:%d/?x" % app.port

    def test_credentials_do_not_reach_the_app(self, proxy, hub, app):
        cookie = self.sign_in(proxy, hub)
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        for line, arrives in (
            ("Authorization: Bearer apps-own", "Bearer apps-own"), ("Authorization: Basic YTpi", "Basic YTpi"), ("Authorization: token owner-token", None),
            ("Authorization: token admin-token", None), ("Authorization: token server-token", None),
        ):  # fmt: skip
            assert status_of(proxy.get(target, cookie, line)) == 200
            assert fields_of(app.messages[-1]).get("authorization") == arrives
        proxy.get(target, cookie, "Referer: http://here:8888%s?token=owner-token&a" % target)
        assert fields_of(app.messages[-1])["referer"] == "http://localhost:%d/?a" % app.port
        assert not any("cookie" in fields_of(message) for message in app.messages)

    def test_an_app_cannot_set_the_hubs_cookies(self, proxy, hub, upstream):
        names = ("jupyterhub-session-id", "__Host-jupyterhub-user", proxy.proxy._around.gate.cookie_name, "own")
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + b"".join(b"Set-Cookie: %s=x; Path=/\r\n" % name.encode() for name in names) + b"\r\n"))
        answer = proxy.get("%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token")
        assert [value.split("=")[0] for name, value in answer[1] if name == "Set-Cookie"] == ["own"]

    def test_signing_out_of_the_hub(self, proxy, hub, app):
        """The Hub then forgets the token, and takes its session cookie back: that alone makes us ask anew."""
        cookie = self.sign_in(proxy, hub)
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        for _ in range(5):
            assert status_of(proxy.get(target, cookie)) == 200
        assert len(hub.questions("/hub/api/user")) == 1
        del hub.users["owner-token"]
        assert status_of(proxy.get(target, cookie)) == 200
        out = cookie.replace("jupyterhub-session-id=a; ", "")
        assert status_of(proxy.get(target, out)) == 403
        assert status_of(proxy.get(target, out, *PAGE)) == 302
        assert status_of(proxy.get(target, cookie)) == 403  # and the session is gone for good

    def test_a_connection_is_nobodys(self, proxy, hub, app):
        """The Hub's front proxy sends the requests of several users on one connection: each is let in, or not, alone."""
        cookie, target = self.sign_in(proxy, hub), "%s/proxy/%d/" % (PREFIX, app.port)
        with proxy.wire() as wire:
            for lines, status in (((cookie,), 200), ((), 403), (("Authorization: token stranger-token",), 403), ((cookie,), 200), (PAGE, 302), ((cookie,), 200), (HANDSHAKE, 403)):
                wire.send(request("GET", target, *lines))
                assert status_of(wire.message()) == status
            wire.send(request("GET", target, cookie) + request("GET", target) + request("GET", target, cookie))
            assert [status_of(wire.message()) for _ in range(3)] == [200, 403, 200]

    def test_several_copies_of_the_cookie(self, proxy, hub):
        """A cookie of a wider path may stand beside ours: any that is valid lets in."""
        cookie = self.sign_in(proxy, hub)
        name = proxy.proxy._around.gate.cookie_name
        for line in (cookie + "; %s=old" % name, cookie.replace(name, "%s=old; %s" % (name, name))):
            assert status_of(proxy.get(PREFIX + "/proxy/", line)) == 200

    def test_other_sites(self, proxy, hub, app):
        cookie, target = self.sign_in(proxy, hub), "%s/proxy/%d/" % (PREFIX, app.port)
        for method, lines, status in (
            ("POST", ("Origin: http://evil.example",), 403), ("POST", ("Origin: null",), 403), ("GET", ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"), 403),
            ("GET", ("Origin: http://evil.example",) + HANDSHAKE, 403), ("POST", ("Origin: http://here:8888",), 200), ("POST", ("Origin: https://hub.example", "X-Forwarded-Host: hub.example"), 200),
            ("GET", ("Sec-Fetch-Site: cross-site",) + PAGE, 200),
        ):  # fmt: skip
            assert status_of(proxy.ask(request(method, target, cookie, *lines))) == status
        assert status_of(proxy.ask(request("POST", target, "Authorization: token owner-token", "Origin: http://evil.example"))) == 200

    @pytest.mark.parametrize(
        "options, forwarded, has, lacks",
        [
            ({}, "https,http", ["Secure", "SameSite=Lax"], []), ({}, "http", [], ["Secure"]), ({}, "http, https", [], ["Secure"]), ({"is_secure": True}, "http", ["Secure"], []),
            ({"host_cookies": True}, "http", ["Secure", "Path=/"], []), ({"cookie_options": (("SameSite", "None"), ("Partitioned", ""))}, "https", ["SameSite=None", "Partitioned", "Secure"], ["SameSite=Lax"]),
        ],
    )  # fmt: skip
    def test_attributes_of_cookies(self, begin, hub, options, forwarded, has, lacks):
        proxy = begin(**options)
        answer = proxy.get(PREFIX + "/proxy/?token=owner-token", "X-Forwarded-Proto: " + forwarded, *PAGE)
        attributes = [part.strip() for part in fields_of(answer)["set-cookie"].split(";")]
        assert set(has) <= set(attributes)
        assert not set(lacks) & set(attributes)
        assert attributes[0].startswith("__Host-") is bool(options.get("host_cookies"))
        assert status_of(proxy.get(PREFIX + "/proxy/", "Cookie: " + attributes[0])) == 200

    @pytest.mark.parametrize("fault", ["silent", "not HTTP", "not JSON", "no name", "no scopes", "500", "list"])
    def test_a_hub_that_cannot_be_asked(self, begin, upstream, fault):
        """Nobody gets in, and nobody is sent to a sign-in that cannot succeed; what is asked later is asked anew."""
        answers = {
            "silent": b"", "not HTTP": b"SSH-2.0-x\r\n\r\n", "not JSON": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{", "no name": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            "no scopes": b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"name": "bo"}', "500": b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "list": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        }  # fmt: skip
        broken = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(answers[fault])))
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % broken.port)
        for count in (1, 2):
            answer = proxy.get(PREFIX + "/proxy/", "Authorization: token some", *PAGE)
            assert (status_of(answer), "retry-after" in fields_of(answer)) == (503, True)
            assert len(broken.messages) == count

    def test_the_same_question_is_asked_once(self, begin, upstream):
        """Many requests of one page wait for one answer."""
        go = threading.Event()
        body = json.dumps(OWNER).encode()

        def serve(wire, app):
            app.messages.append(wire.message())
            go.wait(WAIT)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)

        slow = upstream(serve)
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % slow.port)
        wires = [proxy.wire() for _ in range(5)]
        for wire in wires:
            wire.send(request("GET", PREFIX + "/proxy/", "Authorization: token owner-token"))
        eventually(lambda: slow.messages and len([one for one in proxy.proxy._clients.values() if one]) == 5)
        wires.pop().reset()  # whoever leaves takes the answer from nobody
        go.set()
        for wire in wires:
            assert status_of(wire.message()) == 200
            wire.close()
        assert len(slow.messages) == 1

    def test_a_stop_while_the_hub_is_asked(self, begin, upstream):
        """The fixtures see to it that no task, connection or complaint is left."""
        silent = upstream(lambda wire, app: (app.happened.set(), wire.rest()))
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % silent.port)
        with proxy.wire() as wire:
            wire.send(request("GET", PREFIX + "/proxy/", "Authorization: token owner-token"))
            assert silent.happened.wait(WAIT)
            proxy.background.do(proxy.proxy.close())
            assert b"200" not in wire.rest()

    def test_tables_are_bounded(self, proxy, hub):
        gate = proxy.proxy._around.gate
        visit = Visit("", "http", "a")
        for number in range(1500):
            gate._new_session("token", visit)
            gate._begin_login(PREFIX + "/", visit)
            port_proxy._remember(gate._ours, str(number), None)
        assert [len(table) for table in (gate._sessions, gate._logins, gate._ours)] == [1000, 1500, 1000]
        for _ in range(10000):
            port_proxy._remember(gate._logins, object(), None, port_proxy._MAX_LOGINS)
        assert len(gate._logins) == 10000

    def test_many_tokens_in_one_request(self, proxy, hub):
        """One request makes few questions, however many tokens are in it."""
        assert status_of(proxy.get(PREFIX + "/proxy/?" + "&".join("token=%d" % number for number in range(500)))) == 400
        assert hub.asked == []
        assert status_of(proxy.get(PREFIX + "/proxy/?" + "&".join("token=%d" % (number % 8) for number in range(500)))) == 403
        assert len(hub.asked) == 8

    @pytest.mark.parametrize("token", ["x%0d%0aX-A:%20b", "a%0d%0a%0d%0aDELETE%20/hub/api/users/a%20HTTP/1.1%0d%0aHost:%20h%0d%0a%0d%0a", "%E2%82%AC", "a%20b", "%00", ""])
    def test_a_token_cannot_become_a_request_to_the_hub(self, proxy, hub, app, token):
        """What no token of the Hub can be is the app's own, and nobody's business but its."""
        target = "%s/proxy/%d/?token=%s" % (PREFIX, app.port, token)
        assert status_of(proxy.get(target)) == 403
        assert hub.asked == []
        assert status_of(proxy.get(target, "Authorization: token owner-token")) == 200
        assert app.messages[-1][0] == "GET /?token=%s HTTP/1.1" % token
        assert [message[0] for message in hub.asked] == ["GET /hub/api/user HTTP/1.1"]

    def test_questions_are_bounded(self, begin, upstream):
        """However many ask, and leave: the Hub is not asked more at once, and nothing of it is left."""
        silent = upstream(lambda wire, app: wire.rest())
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % silent.port)
        wires = [proxy.wire() for _ in range(80)]
        for number, wire in enumerate(wires):
            wire.send(request("GET", PREFIX + "/proxy/", "Authorization: token %d" % number))
        api = proxy.proxy._around.gate.api
        refused = [wire for wire in wires if number_of_refusal(wire)]
        assert len(refused) >= 16
        assert len(api.under_way) <= 64
        for wire in wires:
            wire.close()

    @pytest.mark.parametrize("home, leads_to", [("", PREFIX + "/proxy/"), (PREFIX + "/proxy/8080", PREFIX + "/proxy/8080"), (PREFIX + "/proxy/8080/?a", PREFIX + "/proxy/8080/?a")])
    def test_home(self, begin, hub, home, leads_to):
        proxy = begin(home=home)
        cookie = self.sign_in(proxy, hub)
        for target in (PREFIX, PREFIX + "/", "/jh/user/al%40ice.x+y/"):
            answer = proxy.get(target, cookie, *PAGE)
            assert (status_of(answer), fields_of(answer)["location"]) == (302, leads_to)
        assert status_of(proxy.get(PREFIX + "/")) == 403

    @pytest.mark.parametrize("kind", ["request", "websocket", "upload", "download"])
    def test_activity_is_reported(self, begin, hub, upstream, kind):
        """Once an interval, if there was any since; bytes count, not only requests."""

        def serve(wire, app):
            app.messages.append(wire.until(b"\r\n\r\n"))
            if kind == "websocket":
                wire.send(SWITCHING)
                while wire.more():
                    wire.send(wire.buffer)
            elif kind == "download":
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not app.let_go.wait(0.01):
                    wire.send(b"a")
            elif kind == "upload":
                wire.rest()
            else:
                wire.send(OK)

        app = upstream(serve)
        proxy = begin(activity_url="http://127.0.0.1:%d/hub/api/users/al%%40ice.x%%2By/activity" % hub.port, activity_interval=0.05)
        gate = proxy.proxy._around.gate
        assert status_of(proxy.get(PREFIX + "/api")) == 200
        assert status_of(proxy.get(PREFIX + "/proxy/")) == 403
        assert gate._last_activity == ""  # neither of these is use

        def reports():
            return hub.questions("/hub/api/users/al%40ice.x%2By/activity")

        with proxy.wire() as wire:
            lines = {"websocket": HANDSHAKE, "upload": ("Content-Length: 100000",)}.get(kind, ())
            wire.send(request("GET", "%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token", *lines))
            eventually(reports)
            told = json.loads(reports()[0][2].decode())
            assert told == {"servers": {"": {"last_activity": told["last_activity"]}}, "last_activity": told["last_activity"]}
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["last_activity"])
            assert fields_of(reports()[0])["authorization"] == "token server-token"
            if kind != "request":
                gate._last_activity = "long ago"
                if kind == "websocket":
                    wire.until(b"\r\n\r\n")
                    wire.send(b"a")
                elif kind == "upload":
                    wire.send(b"a")
                eventually(lambda: gate._last_activity != "long ago")
            app.let_go.set()

    def test_a_report_that_fails_is_made_again(self, begin, hub, upstream):
        app = upstream(answering(OK))
        proxy = begin(activity_url="http://127.0.0.1:%d/hub/api/activity" % hub.port, activity_interval=0.05)
        hub.broken["/hub/api/activity"] = b"{"
        assert status_of(proxy.get("%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token")) == 200
        eventually(lambda: len(hub.questions("/hub/api/activity")) > 2)
        del hub.broken["/hub/api/activity"]
        gate = proxy.proxy._around.gate
        eventually(lambda: hub.questions("/hub/api/activity")[-1][2].decode().count(gate._last_activity) == 2)


# ---------------------------------------------------------------------------------------------------------------------
# Exchange
# ---------------------------------------------------------------------------------------------------------------------


def once(answer):
    """Serve one request with `answer` and close."""

    def serve(wire, app):
        app.messages.append(wire.message())
        wire.send(answer)

    return serve


class TestResponses:
    @pytest.mark.parametrize(
        "answer, version, framing, body",
        [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "1.1", ("content-length", "3"), b"abc"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "1.0", ("content-length", "3"), b"abc"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "1.1", ("content-length", "0"), b""),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\na\r\n2\r\nbc\r\n0\r\nX: y\r\n\r\n", "1.1", ("transfer-encoding", "chunked"), b"abc"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "1.0", None, b"abc"),
            (b"HTTP/1.1 200 OK\r\n\r\nabc", "1.1", ("transfer-encoding", "chunked"), b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\nabc", "1.1", ("transfer-encoding", "chunked"), b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\nabc", "1.0", None, b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\n", "1.1", ("transfer-encoding", "chunked"), b""),
        ],
        ids=case_id,
    )
    def test_framing_of_the_answer(self, proxy, upstream, answer, version, framing, body):
        app = upstream(once(answer))
        head = "GET /proxy/%d/ HTTP/%s\r\nHost: a\r\n\r\n" % (app.port, version)
        message = proxy.ask(head.encode(), until_close=True)
        assert (message[0], message[2]) == ("HTTP/1.1 200 OK", body)
        fields = fields_of(message)
        declared = [(name, fields[name]) for name in ("content-length", "transfer-encoding") if name in fields]
        assert declared == ([framing] if framing else [])
        assert fields.get("connection") == ("close" if version == "1.0" else None)

    @pytest.mark.parametrize(
        "method, answer, length",
        [
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n", "12345"), ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", None), ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nETag: a\r\n\r\n", "7"),
            ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", None), ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", None), ("DELETE", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_answers_without_a_body(self, proxy, upstream, method, answer, length):
        app = upstream(answering(answer))
        with proxy.wire() as wire:
            for _ in range(2):
                wire.send(request(method, "/proxy/%d/" % app.port))
                message = wire.message(no_body=True)
                assert fields_of(message).get("content-length") == length
                assert "transfer-encoding" not in fields_of(message)
        assert app.connections == 1

    @pytest.mark.parametrize(
        "answer",
        BAD_RESPONSES
        + [
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", b"\x15\x03\x01\x00\x02\x02\x0a",
            b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz",
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
            b"HTTP/1.1 200 OK\r\nContent-Le", b"",
        ],
        ids=case_id,
    )  # fmt: skip
    def test_bad_answers_are_502(self, proxy, upstream, answer):
        app = upstream(once(answer))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            message = wire.message(no_body=True)
            while status_of(message) == 100:
                message = wire.message(no_body=True)
            assert status_of(message) == 502
            assert b"port %d of this machine" % app.port in wire.exactly(int(fields_of(message)["content-length"]))
            wire.send(request("GET", "/proxy/"))  # the client's own connection is none the worse
            assert status_of(wire.message()) == 200

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
        ],
        ids=case_id,
    )  # fmt: skip
    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    @pytest.mark.parametrize("how", ["end", "reset"])
    def test_an_answer_that_was_cut_short_never_ends_cleanly(self, proxy, upstream, answer, version, how):
        def serve(wire, app):
            wire.message()
            wire.send(answer)
            app.happened.wait(WAIT)
            if how == "reset":
                wire.reset()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(b"GET /proxy/%d/ HTTP/%s\r\nHost: a\r\n\r\n" % (app.port, version.encode()))
            head = wire.until(b"\r\n\r\n")
            got = wire.until(b"abc")
            app.happened.set()
            try:
                got += wire.rest()
            except ConnectionResetError:
                return  # as visible as can be
            assert b"Content-Length: 10" in head or (b"chunked" in head and not got.endswith(b"\r\n0\r\n\r\n"))

    def test_a_reset_is_no_end_of_a_body_that_the_end_delimits(self, proxy, upstream):
        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
            app.happened.wait(WAIT)
            wire.reset()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert b"chunked" in wire.until(b"\r\n\r\n")
            got = wire.until(b"abc\r\n")
            app.happened.set()
            assert not (got + wire.rest()).endswith(b"0\r\n\r\n")

    @pytest.mark.parametrize("why", ["stall", "stop"])
    def test_a_body_that_the_end_delimits_is_never_ended_cleanly_by_us(self, start, upstream, why):
        """HTTP/1.0: whatever makes the proxy give up, the client must not take it for the end."""

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.0 200 OK\r\n\r\nabc")
            with contextlib.suppress(OSError):
                for _ in range(50):
                    wire.send(bytes(1 << 20) if why == "stall" else b"x")
                app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        proxy = start(stall_timeout=0.3 if why == "stall" else 60, shutdown_timeout=0.1)
        with proxy.wire() as wire:
            wire.send(b"GET /proxy/%d/ HTTP/1.0\r\nHost: here\r\n\r\n" % app.port)
            wire.until(b"abc")
            if why == "stop":
                proxy.close()
            else:
                eventually(lambda: not proxy.streams)
            with pytest.raises(ConnectionResetError):
                wire.rest()

    def test_nor_is_the_tail_of_one_that_had_come_whole(self, start, upstream):
        """All has been relayed, some of it is still queued for an HTTP/1.0 client, and the proxy is told to stop."""
        size = 1 << 17
        app = upstream(once(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(size)))
        proxy = start(shutdown_timeout=0.1)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", proxy.port))
            wire = Wire(sock)
            eventually(lambda: len(proxy.streams) == 1)
            client = next(iter(proxy.streams))
            client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            wire.send(b"GET /proxy/%d/ HTTP/1.0\r\nHost: here\r\n\r\n" % app.port)
            head = wire.until(b"\r\n\r\n")
            eventually(lambda: client.transport.get_write_buffer_size())
            got = len(wire.buffer)
            while client in proxy.proxy._clients and got < size:  # take a little, until the rest is only queued
                got += len(sock.recv(4096))
            proxy.close()
            wire.buffer = b""
            try:
                assert head.startswith(b"HTTP/1.1 200") and got + len(wire.rest()) == size
            except ConnectionResetError:
                pass

    def test_interim_answers_are_passed_on(self, proxy, upstream):
        app = upstream(answering(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 9\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message(no_body=True)[:2] == ("HTTP/1.1 103 Early Hints", [("Link", "</a>")])
            assert status_of(wire.message(no_body=True)) == 102
            assert wire.message()[2] == b"ok"
            wire.send(b"GET /proxy/%d/ HTTP/1.0\r\n\r\n" % app.port)
            assert status_of(wire.message()) == 200

    def test_a_101_that_nobody_asked_for_is_502(self, proxy, upstream):
        app = upstream(once(SWITCHING))
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 502

    def test_interim_answers_are_bounded(self, proxy, upstream):
        app = upstream(once(b"HTTP/1.1 103 E\r\n\r\n" * 40 + OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            message = wire.message(no_body=True)
            while status_of(message) == 103:
                message = wire.message(no_body=True)
            assert status_of(message) == 502

    def test_unknown_status_and_reason(self, proxy, upstream):
        app = upstream(answering(b"HTTP/1.1 299 Sch\xf6n\r\nContent-Length: 0\r\n\r\n"))
        assert proxy.get("/proxy/%d/" % app.port)[0] == "HTTP/1.1 299 Sch\xf6n"

    def test_events_arrive_one_by_one(self, proxy, upstream):
        """Whatever the request's Accept says, and however the upstream frames them."""
        for head, event in (
            (b"Transfer-Encoding: chunked\r\n", b"9\r\ndata: %d\n\n\r\n"),
            (b"Content-Length: 27\r\n", b"data: %d\n\n"),
            (b"", b"data: %d\n\n"),
        ):

            def serve(wire, app, head=head, event=event):
                wire.message()
                wire.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
                for number in range(3):
                    app.happened.wait(WAIT)  # until the one before has arrived
                    app.happened.clear()
                    wire.send(event % number)
                if b"chunked" in head:
                    wire.send(b"0\r\n\r\n")

            app = upstream(serve)
            with proxy.wire() as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port, "Accept: */*"))
                assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
                for number in range(3):
                    app.happened.set()
                    assert wire.until(b"data: %d\n\n" % number).endswith(b"data: %d\n\n" % number)

    def test_an_event_is_not_held_back_by_half_of_the_next(self, proxy, upstream):
        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\nt")
            app.happened.wait(WAIT)
            wire.send(b"wo\r\n0\r\n\r\n")

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.until(b"3\r\nt").endswith(b"3\r\none\r\n3\r\nt")
            app.happened.set()
            assert wire.until(b"0\r\n\r\n") == b"wo\r\n0\r\n\r\n"


class TestRequests:
    def test_bodies_stream_up(self, proxy, upstream):
        """Each piece reaches the app before the next is sent."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            for piece in (b"one", b"two"):
                wire.until(piece)
                app.happened.set()
            wire.until(b"0\r\n\r\n")
            wire.send(OK)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Transfer-Encoding: chunked"))
            for piece in (b"3\r\none\r\n", b"3\r\ntwo\r\n"):
                wire.send(piece)
                assert app.happened.wait(WAIT)
                app.happened.clear()
            wire.send(b"0\r\n\r\n")
            assert wire.message()[2] == b"ok"

    def test_both_ways_at_once(self, proxy, upstream):
        """An app that answers each piece as it comes."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n")
            for _ in range(10):
                wire.send(wire.exactly(3).upper())

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 30"))
            wire.until(b"\r\n\r\n")
            for _ in range(10):
                wire.send(b"abc")
                assert wire.exactly(3) == b"ABC"

    @pytest.mark.parametrize("size", [0, 1, 70000, 3000000])
    @pytest.mark.parametrize("chunked", [False, True])
    def test_bodies_arrive_whole_both_ways(self, proxy, upstream, size, chunked):
        def serve(wire, app):
            while wire.buffer or wire.more():
                message = wire.message()
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(message[2]), message[2])

        app = upstream(serve)
        body = random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, "big")[:size]
        with proxy.wire() as wire:
            for _ in range(2):
                target = "/proxy/%d/" % app.port
                if chunked:
                    wire.send(request("POST", target, "Transfer-Encoding: chunked"))
                    for at in range(0, size, 40000):
                        wire.send(chunk(body[at : at + 40000]))
                    wire.send(b"0\r\n\r\n")
                else:
                    wire.send(request("POST", target, "Content-Length: %d" % size, body=body))
                assert wire.message()[2] == body

    def test_expect_continue_is_end_to_end(self, proxy, upstream):
        def serve(wire, app):
            assert b"\r\nExpect: 100-continue\r\n" in wire.until(b"\r\n\r\n")
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert wire.exactly(3) == b"abc"
            wire.send(OK)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", "Expect: 100-continue"))
            assert wire.message(no_body=True)[0] == "HTTP/1.1 100 Continue"
            wire.send(b"abc")
            assert wire.message()[2] == b"ok"

    def test_expect_refused(self, proxy, upstream):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n"), wire.rest()))
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", "Expect: 100-continue"))
            message = wire.message()
            assert (status_of(message), fields_of(message)["connection"]) == (417, "close")
            wire.end()
            assert wire.rest() == b""

    @pytest.mark.parametrize("close", [False, True])
    def test_an_early_answer_is_heard(self, proxy, upstream, close):
        """The app refuses in the middle of an upload, and may close at once, which resets the connection."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.exactly(100000)
            wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
            if not close:
                app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        for _ in range(5):
            with proxy.wire() as wire:
                wire.send(request("PUT", "/proxy/%d/" % app.port, "Content-Length: 1000000000", body=bytes(100000)))
                sender = threading.Thread(target=self._send_until_closed, args=(wire,))
                sender.start()
                message = wire.message()
                assert (status_of(message), message[2]) == (413, b"big")
                wire.end()
                sender.join(WAIT)

    @staticmethod
    def _send_until_closed(wire):
        with contextlib.suppress(OSError):
            for _ in range(10000):
                wire.sock.send(bytes(65536))

    def test_an_app_that_takes_no_more_is_still_heard(self, proxy, upstream):
        """Its answer comes late, long after writing to it has begun to fail."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.sock.shutdown(socket.SHUT_RD)
            app.happened.wait(WAIT)
            wire.send(OK)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 6", body=b"abc"))
            app.happened.set()
            assert wire.message()[2] == b"ok"

    def test_a_body_that_breaks_off_is_not_completed(self, proxy, upstream):
        seen = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            seen.append(wire.rest())

        app = upstream(serve)
        for framing, body in (("Content-Length: 10", b"abc"), ("Transfer-Encoding: chunked", b"3\r\nabc\r\n")):
            with proxy.wire() as wire:
                wire.send(request("POST", "/proxy/%d/" % app.port, framing, body=body))
                eventually(lambda: app.connections == len(seen) + 1)
            eventually(lambda: app.connections == len(seen))
        assert seen == [b"abc", b"3\r\nabc\r\n"]

    def test_a_client_that_leaves_closes_its_upstream(self, proxy, upstream):
        """While its answer is awaited, and in the middle of it; by an end or a reset."""
        for answer in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"HTTP/1.1 200 OK\r\n\r\nabc"):
            for leave in (Wire.close, Wire.reset, Wire.end):

                def serve(wire, app, answer=answer):
                    wire.message()
                    wire.send(answer)
                    app.happened.set()
                    with contextlib.suppress(ConnectionResetError):
                        wire.rest()
                    app.let_go.set()

                app = upstream(serve)
                with proxy.wire() as wire:
                    wire.send(request("GET", "/proxy/%d/" % app.port))
                    assert app.happened.wait(WAIT)
                    if answer:
                        wire.until(b"abc")
                    leave(wire)
                    assert app.let_go.wait(4 * WAIT)

    def test_a_client_that_had_ended_its_side_is_answered(self, proxy, upstream):
        """`printf 'GET ...' | nc -N`: the request and its end are there before the upstream is connected."""
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.end()
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""

    @pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n"])
    def test_and_is_not_waited_for_as_long(self, start, upstream, begun):
        """For it may be gone altogether, which nothing tells until something is sent."""
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(begun), wire.rest()))
        proxy = start(keep_alive_timeout=0.3)
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.end()
            with contextlib.suppress(ConnectionResetError):
                answer = wire.rest()
                assert b" 504 " in answer if not begun else not answer.endswith(b"0\r\n\r\n")
        eventually(lambda: not proxy.streams)

    @pytest.mark.parametrize("behind", [b"GET /proxy/%d/smuggled HTTP/1.1\r\nHost: here\r\n\r\n", b"GET /part"])
    @pytest.mark.parametrize("end", [True, False])
    def test_what_follows_a_bad_chunk_is_no_request(self, proxy, upstream, behind, end):
        """Not even where an early answer has come in the same moment."""

        def serve(wire, app):
            with contextlib.suppress(ConnectionResetError):  # where its answer is not read any more
                while wire.buffer or wire.more():
                    app.messages.append(wire.until(b"\r\n\r\n"))
                    wire.until(b"hello\r\n")
                    app.happened.wait(WAIT)
                    wire.send(OK)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n")
            eventually(lambda: app.messages)
            with proxy.held():
                wire.send(b"3\r\nabcX" + (behind % app.port if b"%" in behind else behind))
                if end:
                    wire.end()
                app.happened.set()
                app.threads[-1].join(0.2)  # gives the answer time to be there too; without it the test only proves less
            with contextlib.suppress(ConnectionResetError):
                answer = wire.message()
                assert status_of(answer) in (200, 400)
                assert fields_of(answer)["connection"] == "close"
                wire.end()
                assert wire.rest() == b""
        eventually(lambda: not proxy.proxy._clients)
        assert len(app.messages) == 1

    def test_an_early_answer_after_which_nothing_can_be_sent_says_close(self, proxy, upstream):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.exactly(1000)
            app.happened.set()
            app.let_go.wait(4 * WAIT)
            wire.send(OK)

        for _ in range(5):
            app = upstream(serve)
            with proxy.wire() as wire:
                wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 100000000") + bytes(1000))
                assert app.happened.wait(WAIT)
                with proxy.held():
                    app.let_go.set()
                    app.threads[1].join(WAIT)
                    wire.send(bytes(100000))
                answer = wire.message()
                assert (status_of(answer), fields_of(answer)["connection"]) == (200, "close")

    def test_a_client_that_reset_before_its_request_was_sent_on_is_gone(self, proxy, upstream):
        app = upstream(lambda wire, app: wire.rest())
        for _ in range(10):
            wire = proxy.wire()
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.reset()
        eventually(lambda: not proxy.streams)

    @pytest.mark.parametrize("kind", ["upload", "pipelined", "tunnel"])
    def test_a_client_that_resets_while_it_is_not_read_is_gone(self, proxy, upstream, kind):
        if sys.version_info < (3, 7):
            pytest.skip("transports of 3.6 do not tell whether they read")
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING if kind == "tunnel" else b""), app.let_go.wait(4 * WAIT)))
        lines = {"upload": ("Content-Length: 1000000000",), "pipelined": (), "tunnel": HANDSHAKE}[kind]
        wire = proxy.wire()
        wire.send(request("GET", "/proxy/%d/" % app.port, *lines))
        eventually(lambda: app.connections == 1)
        wire.sock.settimeout(0.3)
        with pytest.raises(socket.timeout):
            while True:
                wire.sock.send(bytes(65536))
        wire.reset()
        eventually(lambda: not proxy.streams)

    @pytest.mark.parametrize("method", ["PROPFIND", "MKCOL", "REPORT", "TRACE", "M-SEARCH", "get", "X!"])
    def test_any_method_passes(self, proxy, upstream, method):
        app = upstream(answering(OK))
        assert status_of(proxy.ask(request(method, "/proxy/%d/" % app.port))) == 200
        assert app.messages[0][0] == "%s / HTTP/1.1" % method

    def test_compressed_and_partial_content_pass_as_they_are(self, proxy, upstream):
        app = upstream(answering(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-2/9\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"))
        message = proxy.get("/proxy/%d/" % app.port, "Range: bytes=0-2", "Accept-Encoding: gzip", "If-None-Match: x")
        assert (status_of(message), message[2]) == (206, b"\x1f\x8b\x08")
        sent = fields_of(app.messages[0])
        assert (sent["range"], sent["accept-encoding"], sent["if-none-match"]) == ("bytes=0-2", "gzip", "x")


class TestBackPressure:
    """A peer that does not read stops the other side, and memory stays where it was."""

    SIZE = 200 << 20

    def _grows_little(self, process, before):
        assert rss_kib(process.pid) - before < 8 * 1024

    def test_download_to_a_slow_client(self, upstream):
        sent = []

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.SIZE)
            block = bytes(1 << 20)
            for _ in range(self.SIZE >> 20):
                wire.send(block)
                sent.append(len(block))

        app = upstream(serve)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"\r\n\r\n")
            steady(lambda: sum(sent))  # the kernel's buffers are full: everybody waits for us
            assert sum(sent) < 60 << 20
            self._grows_little(process, before)
            left = self.SIZE - len(wire.buffer)
            while left:
                got = len(wire.sock.recv(min(left, 1 << 20)))
                assert got
                left -= got
            self._grows_little(process, before)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_upload_to_a_slow_app(self, upstream, chunked):
        received = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            app.happened.wait(WAIT)
            got = len(wire.buffer)
            while got < self.SIZE:
                data = wire.sock.recv(1 << 20)
                assert data
                got += len(data)
            received.append(got)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            with contextlib.suppress(OSError):
                wire.rest()

        app = upstream(serve)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: %d" % self.SIZE
            wire.send(request("PUT", "/proxy/%d/" % app.port, framing))
            progress = []
            sender = threading.Thread(target=self._send, args=(wire, chunked, progress))
            sender.start()
            steady(lambda: sum(progress))
            assert sum(progress) < 60 << 20
            self._grows_little(process, before)
            app.happened.set()
            assert wire.message()[2] == b"ok"
            sender.join(WAIT)
            self._grows_little(process, before)

    def _send(self, wire, chunked, progress):
        block = bytes(1 << 20)
        for _ in range(self.SIZE >> 20):
            wire.send(chunk(block) if chunked else block)
            progress.append(len(block))
        if chunked:
            wire.send(b"0\r\n\r\n")


def rss_kib(pid):
    """Resident memory of a process, in KiB."""
    try:
        status = Path("/proc/%d/status" % pid).read_text()
    except OSError:
        pytest.skip("this system has no /proc to read a process's memory from")
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1))


def steady(measure):
    """Wait until `measure()` is above zero and has stopped growing for half a second."""
    limit = time.monotonic() + WAIT
    last, since = 0, time.monotonic()
    while not (last and time.monotonic() - since > 0.5):
        assert time.monotonic() < limit
        if measure() != last:
            last, since = measure(), time.monotonic()
        time.sleep(0.01)


SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: b\r\n\r\n"


class TestStreams:
    def test_what_comes_after_a_deadline_comes_too_late(self, background):
        """It is dropped; it does not break the connection on which the refusal is being sent."""

        async def feed():
            watch = port_proxy.Watch(background.loop, 60)
            stream = connected(port_proxy.Stream(watch), Loopless(background.loop, 1))
            stream.data_received(b"a")
            stream.end(port_proxy.Stalled())
            stream.data_received(b"b")
            stream.eof_received()
            seen = [await stream.take(10), stream.buffer]
            try:
                await stream.take(10)
            except port_proxy.Stalled:
                seen.append("stalled")
            await watch.close(0)
            return seen

        assert background.do(feed()) == [b"a", b"", "stalled"]

    def test_what_is_fresh(self, background, start):
        """Neither bytes that only the kernel has yet, nor its end, nor bytes to be sent."""
        watch = start().proxy._around.watch
        disturbances = (
            lambda stream, there: None,
            lambda stream, there: there.send(b"x"),
            lambda stream, there: there.close(),
            lambda stream, there: stream.write(bytes(1 << 24)),
        )

        async def look():
            seen = []
            for disturb in disturbances:
                here, there = socket.socketpair()
                here.setblocking(False)
                _, stream = await background.loop.create_connection(lambda: port_proxy.Stream(watch), sock=here)
                disturb(stream, there)
                seen.append(stream.is_fresh())  # the loop has had no turn since
                stream.abort()
                there.close()
            return seen

        assert background.do(look()) == [True, False, False, False]

    @pytest.mark.parametrize("family, address", [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0)), (socket.AF_UNIX, "socket")])
    @pytest.mark.parametrize("is_private_way", [True, False])
    def test_accepting(self, tmp_path, monkeypatch, family, address, is_private_way):
        """What comes of it is what `accept` gives, also where there is no other way."""

        class Plain:
            def __init__(self, sock):
                self.family, self.accept = sock.family, sock.accept

        monkeypatch.chdir(tmp_path)
        with socket.socket(family) as listening, socket.socket(family) as there:
            try:
                listening.bind(address)
            except OSError as error:
                pytest.skip("no such address here: %s" % error)
            listening.listen(1)
            accept = port_proxy.accepting(listening if is_private_way else Plain(listening))
            there.connect(listening.getsockname())
            here, peername = accept()
            with here:
                there.send(b"x")
                assert (type(here), here.family, here.type, here.recv(1)) == (socket.socket, family, socket.SOCK_STREAM, b"x")
                assert peername == there.getsockname()
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                accept()

    def test_a_closed_connection_is_gone_at_once(self, proxy, upstream):
        """It leaves no circle of objects, which only a search through all of memory would find."""
        app = upstream(answering(*[OK] * 6))
        proxy.get("/proxy/%d/" % app.port)
        eventually(lambda: len(proxy.streams) == 1)
        gc.disable()
        try:
            gc.collect()
            for _ in range(5):
                assert proxy.get("/proxy/%d/" % app.port, "Connection: close")[2] == b"ok"
            eventually(lambda: not [one for one in gc.get_objects() if type(one) is port_proxy.SocketTransport and one.is_closing()])
        finally:
            gc.enable()

    def test_a_lost_connection_over_tls_has_nothing_queued(self, background):
        """3.6 fails when it is asked, which must not end the timer of all connections."""

        class Lost:
            def get_write_buffer_size(self):
                return None.get_write_buffer_size()

        stream = port_proxy.Stream.__new__(port_proxy.Stream)
        stream.transport = Lost()
        assert stream.queued() == 0

    def test_a_tunnel_outlives_the_deadline_of_its_handshake(self, background):
        """Bytes that happen to be queued an hour after the 101 are no reason to end a WebSocket."""

        stream = None

        class Heir(asyncio.Protocol):
            def connection_lost(self, exc):
                stream.watch.forget(stream)

        async def passing():
            nonlocal stream
            watch = port_proxy.Watch(background.loop, 60)
            transport = Loopless(background.loop, 1)
            stream = connected(port_proxy.Stream(watch), transport)
            await stream.flush(3600)
            stream.hand_over(Heir())
            transport.queued = 5
            stream.expire(stream.now() + 4000)
            outcome = transport.aborted
            await watch.close(0)
            return outcome

        assert background.do(passing()) is False

    def test_an_answer_still_on_its_way_is_not_idleness(self, background):
        """A client that pauses on the tail of a download has the time of a body for it, not that between requests."""

        async def passing():
            watch = port_proxy.Watch(background.loop, 60)
            transport = Loopless(background.loop, 1)
            stream, seen = connected(port_proxy.Stream(watch), transport), []
            stream.read_deadline, stream.write_deadline = 10.0, 20.0
            for now, queued in ((15.0, 5), (19.0, 5), (25.0, 0), (26.0, 5)):
                transport.queued = queued
                stream.expire(now)
                seen.append((type(stream.failure).__name__, transport.aborted))
            await watch.close(0)
            return seen

        assert background.do(passing()) == [("NoneType", False), ("NoneType", False), ("Stalled", False), ("Stalled", True)]


    def test_a_peer_that_is_too_fast_is_stopped_until_its_bytes_are_used(self, background):
        """Also where nobody waits for more: a connection that idles must hear what comes next."""

        async def feed():
            watch = port_proxy.Watch(background.loop, 60)
            transport = Loopless(background.loop, 1)
            stream = connected(port_proxy.Stream(watch), transport)
            seen = []
            for _ in range(3):
                transport.feed(bytes(30000))
                seen.append(transport.reading)
            for limit in (10000, 50000):
                await stream.take(limit)
                seen.append(transport.reading)
            stream.abort()
            await watch.close(1)
            return seen

        assert background.do(feed()) == [True, True, False, False, True]

    def test_a_transport_keeps_asyncios_contract(self, background):
        """What is queued arrives in order, its pace is told, an end is told once, and what is written last still goes out."""

        class Told(asyncio.Protocol):
            def __init__(self):
                self.calls, self.data = [], b""

            def connection_made(self, transport):
                self.calls.append("made")

            def data_received(self, data):
                self.data += data

            def eof_received(self):
                self.calls.append("ended")
                return True

            def pause_writing(self):
                self.calls.append("pause")

            def resume_writing(self):
                self.calls.append("resume")

            def connection_lost(self, exc):
                self.calls.append("lost")

        async def turns(condition):
            for _ in range(100000):
                if condition():
                    break
                await asyncio.sleep(0)

        async def talk():
            here, there = socket.socketpair()
            told = Told()
            transport = port_proxy.SocketTransport(background.loop, here, told, "")
            there.setblocking(False)
            got, data = [], bytes(range(256)) * 8000
            for at in range(0, len(data), 100000):
                transport.write(data[at : at + 100000])
            assert told.calls == ["made", "pause"]

            def read():
                with contextlib.suppress(BlockingIOError):
                    got.append(there.recv(1 << 20))
                return sum(map(len, got)) == len(data)

            await turns(read)
            await turns(lambda: "resume" in told.calls)
            there.send(b"bye")
            there.shutdown(socket.SHUT_WR)
            await turns(lambda: "ended" in told.calls)
            for _ in range(20):
                transport.resume_reading()
                await asyncio.sleep(0)
            transport.write(b"last words")
            transport.close()
            await turns(lambda: "lost" in told.calls)
            last = there.recv(100), there.recv(100)
            there.close()
            return told.calls, told.data, b"".join(got) == data, last, here.fileno()

        assert background.do(talk()) == (["made", "pause", "resume", "ended", "lost"], b"bye", True, (b"last words", b""), -1)

    def test_the_end_of_writing_comes_behind_what_is_queued(self, background):
        async def talk():
            here, there = socket.socketpair()
            transport = port_proxy.SocketTransport(background.loop, here, asyncio.Protocol(), "")
            transport.write(bytes(1 << 22))
            transport.write_eof()
            got, end = 0, None
            there.setblocking(False)
            while end is None:
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError):
                    data = there.recv(1 << 20)
                    got += len(data)
                    end = end if data else got
            transport.abort()
            await asyncio.sleep(0)
            there.close()
            return got, end

        assert background.do(talk()) == (1 << 22, 1 << 22)


    def test_a_failure_of_one_connection_does_not_stop_the_clock(self, background, caplog):
        async def passing():
            watch = port_proxy.Watch(background.loop, 0.01)
            broken, other = (connected(port_proxy.Stream(watch), Loopless(background.loop, 1)) for _ in range(2))
            ended = background.loop.create_future()

            def explode():
                raise RuntimeError("a mistake of ours")

            broken.read_deadline, broken.on_end = 0.0, explode
            await asyncio.sleep(0.05)
            other.read_deadline, other.on_end = 0.0, lambda: ended.set_result(type(other.failure))
            outcome = await asyncio.wait_for(ended, WAIT)
            await watch.close(0)
            return outcome

        assert background.do(passing()) is port_proxy.Stalled
        assert any("internal error" in record.getMessage() for record in caplog.records)

    def test_what_a_transport_over_tls_refuses_to_tell(self, background):
        """Between the connection's loss and our being told of it, asyncio's fails, or has nothing to say."""

        class Lost:
            def fail(self):
                raise RuntimeError("SSL transport has not been initialized yet")

            def is_closing(self):
                return False

            is_reading = pause_reading = fail

            def resume_reading(self):
                return None.resume_reading()

        stream = port_proxy.Stream(None)
        stream.transport = Lost()
        stream.pause_reading()
        stream.resume_reading()
        assert not stream._is_unwatched()

    def test_who_is_told_of_a_loss(self, background):
        """A transport that learnt of it before a tunnel was made may tell the stream."""

        async def passing():
            watch = port_proxy.Watch(background.loop, 60)
            client, upstream = (connected(port_proxy.Stream(watch), Loopless(background.loop, 1)) for _ in range(2))
            tunnels = set()
            port_proxy.Tunnel(client, upstream, 60, tunnels)
            client.connection_lost(ConnectionResetError())
            for _ in range(3):
                await asyncio.sleep(0)
            left = set(watch.streams)
            await watch.close(0)
            return tunnels, left

        assert background.do(passing()) == (set(), set())


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="Linux alone has epoll")
class TestPromptLoop:
    """asyncio's loop with readers that are called at once."""

    @pytest.fixture
    def loop(self):
        loop = port_proxy.PromptLoop()
        yield loop
        loop.close()

    @pytest.fixture
    def pair(self):
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            yield here, there

    def test_a_reader_is_called_while_there_is_something_to_read(self, loop, pair):
        here, there = pair
        got = []

        def read(size):
            got.append(here.recv(size))
            if got[-1] == b"d":
                assert loop.remove_reader(here)
                loop.stop()

        loop.add_reader(here, read, 1)
        there.send(b"abcde")
        loop.run_forever()
        assert (got, loop.remove_reader(here), here.recv(10)) == ([b"a", b"b", b"c", b"d"], False, b"e")

    def test_the_end_and_a_failure_are_something_to_read(self, loop):
        for how in (Wire.close, Wire.reset):
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            there = Wire.to(listener.getsockname()[1])
            here = listener.accept()[0]
            listener.close()
            loop.add_reader(here.fileno(), loop.stop)
            how(there)
            loop.run_forever()
            assert loop.remove_reader(here.fileno())
            here.close()

    def test_reading_and_writing_go_together(self, loop, pair):
        """Whoever is added or removed last."""
        here, there = pair
        told = []
        there.send(b"x")
        for reads, writes in ((True, True), (False, True), (True, False), (True, True), (False, False)):
            loop.add_reader(here, told.append, "read")
            loop.add_writer(here, told.append, "write")
            assert reads or loop.remove_reader(here)
            assert writes or loop.remove_writer(here)
            del told[:]
            for _ in range(3):
                loop.run_until_complete(asyncio.sleep(0))
            assert set(told) == {name for name, is_wanted in (("read", reads), ("write", writes)) if is_wanted}

    def test_what_the_kernel_does_not_watch_is_not_taken_for_watched(self, loop, pair):
        """For lack of memory, say; what is asked for later finds no trace of it."""

        class Refusing:
            def register(self, *_):
                raise OSError(errno.ENOSPC, "no space")

        here, _ = pair
        selector, transport = loop._prompt, port_proxy.SocketTransport.__new__(port_proxy.SocketTransport)
        transport._loop, transport._number = loop, here.fileno()
        transport._is_reading = transport._has_ended = transport._is_closing = False
        kernel, selector._epoll = selector._epoll, Refusing()
        for refused in (transport.resume_reading, lambda: loop.add_reader(here, print), lambda: loop.add_writer(here, print)):
            with pytest.raises(OSError):
                refused()
        selector._epoll = kernel
        assert (transport.is_reading(), loop.remove_reader(here), loop.remove_writer(here)) == (False, False, False)

    @pytest.mark.parametrize("is_taken_out", [True, False])
    def test_what_readers_change_holds_for_what_the_kernel_had_told(self, is_taken_out):
        """One of three that are ready at once takes the others out of asyncio's care, or changes what they stand for."""
        pairs = [socket.socketpair() for _ in range(3)]
        selector = port_proxy.PromptSelector(print)

        def read():
            for here in (pairs[0][0], pairs[2][0]):
                if is_taken_out:
                    selector.unregister(here)
                else:
                    selector.modify(here, selectors.EVENT_READ, "new")

        for here in (pairs[0][0], pairs[2][0]):
            selector.register(here, selectors.EVENT_READ, "old")
        selector.watch(pairs[1][0].fileno(), read)
        for _, there in pairs:
            there.send(b"x")
        assert [key.data for key, _ in selector.select(WAIT)] == ([] if is_taken_out else ["new", "new"])
        selector.close()
        for sock in sum(pairs, ()):
            sock.close()

    def test_only_what_ends_the_program_gets_through(self, loop, pair):
        here, there = pair
        there.send(b"x")
        complaints, errors = [], [asyncio.CancelledError(), GeneratorExit(), KeyboardInterrupt()]
        loop.set_exception_handler(lambda _, context: complaints.append(type(context["exception"])))

        def explode(_=None):
            raise errors.pop(0)

        loop.add_reader(here, explode)
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        loop.remove_reader(here)
        errors[:] = [asyncio.CancelledError(), GeneratorExit(), SystemExit()]
        for _ in range(3):
            loop.call_promptly(explode, None)
        with pytest.raises(SystemExit):
            loop.run_forever()
        assert complaints == [asyncio.CancelledError, GeneratorExit] * 2

    def test_a_reader_that_raises_is_told_of(self, loop, pair):
        """The others are called all the same, and so is this one again."""
        complaints, calls = [], []
        loop.set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        here, there = pair
        there.send(b"x")

        def explode():
            calls.append(1)
            if len(calls) == 3:
                here.recv(1)
                loop.stop()
            raise RuntimeError("explodes")

        loop.add_reader(here, explode)
        loop.run_forever()
        assert list(map(str, complaints)) == ["explodes"] * 3

    def test_prompt_calls_are_made_when_the_readers_have_had_their_turn(self, loop, pair):
        """In their order, those that they make in turn too; and one that raises is told of."""
        here, there = pair
        told = []
        loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))

        def explode(text):
            raise RuntimeError(text)

        def read():
            here.recv(1)
            loop.call_promptly(told.append, "first")
            loop.call_promptly(explode, "explodes")
            loop.call_promptly(lambda text: (told.append(text), loop.call_promptly(lambda _: (told.append("last"), loop.stop()), None)), "second")
            told.append("read")

        loop.add_reader(here, read)
        there.send(b"x")
        loop.run_forever()
        assert told == ["read", "first", "explodes", "second", "last"]

    def test_prompt_calls_from_anywhere_else_are_made_too(self, loop):
        loop.call_promptly(lambda _: loop.stop(), None)
        loop.run_forever()
        loop.call_soon(loop.call_promptly, lambda _: loop.stop(), None)
        loop.run_forever()
        loop.call_promptly(lambda _: loop.call_soon(loop.stop), None)
        loop.run_forever()

    @pytest.mark.parametrize("begin", [
        lambda loop, done: loop.call_soon(done), lambda loop, done: loop.call_later(0, done), lambda loop, done: loop.call_at(loop.time() + 0.01, done),
        lambda loop, done: loop.call_soon_threadsafe(done), lambda loop, done: loop.run_in_executor(None, done),
        lambda loop, done: asyncio.ensure_future(asyncio.sleep(0), loop=loop).add_done_callback(lambda _: done()),
    ])  # fmt: skip
    def test_what_a_reader_begins_is_not_kept_waiting(self, loop, pair, begin):
        """Though the reader has always something to read, and no timer is due."""
        here, there = pair
        there.send(b"x")
        calls = []
        timer = loop.call_later(WAIT, loop.stop)

        def read():
            calls.append(1)
            if len(calls) == 5:
                begin(loop, lambda: loop.call_soon_threadsafe(loop.stop))

        loop.add_reader(here, read)
        begun = time.monotonic()
        loop.run_forever()
        timer.cancel()
        assert time.monotonic() - begun < WAIT / 2

    def test_timers_are_on_time_beside_a_busy_reader(self, loop, pair):
        here, there = pair
        there.send(b"x")
        loop.add_reader(here, int)
        begun = time.monotonic()
        loop.call_later(0.05, loop.stop)
        loop.run_forever()
        assert 0.05 <= time.monotonic() - begun < WAIT / 2

    def test_a_socket_that_a_reader_closes_is_not_read(self, loop):
        """Though the kernel told of both at the same time."""
        pairs = [socket.socketpair() for _ in range(2)]
        calls = []

        def read(this, other):
            calls.append(this)
            for one in (this, other):
                loop.remove_reader(one)
                one.close()
            loop.stop()

        for (here, there), (other, _) in zip(pairs, reversed(pairs)):
            there.send(b"x")
            loop.add_reader(here, read, here, other)
        loop.run_forever()
        for _, there in pairs:
            there.close()
        assert len(calls) == 1


class TestPromptTask:
    """A task in all but the moment in which it goes on."""

    @pytest.fixture
    def log(self):
        return []

    async def _work(self, log, *awaited):
        try:
            for one in awaited:
                log.append(await one)
            log.append("done")
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    def test_goes_on_at_once(self, background, log):
        async def passing():
            signal = port_proxy.Signal(loop=background.loop)
            task = port_proxy.PromptTask(self._work(log, signal), background.loop)
            log.append("begun")
            signal.give()
            log.append("given")
            await task

        background.do(passing())
        assert log == ["begun", None, "done", "given", "cleaned up"]

    def test_goes_on_behind_what_asyncio_has(self, background, log):
        async def passing():
            future = background.loop.create_future()
            task = port_proxy.PromptTask(self._work(log, asyncio.sleep(0, 1), future, asyncio.ensure_future(asyncio.sleep(0, 3))), background.loop)
            background.loop.call_soon(future.set_result, 2)
            await asyncio.wait([task])
            return task.result()

        assert background.do(passing()) is None
        assert log == [1, 2, 3, "done", "cleaned up"]

    @pytest.mark.parametrize("awaits", ["a signal", "a future", "a future that is done", "nothing"])
    def test_is_cancelled_where_it_waits(self, background, log, awaits):
        async def passing():
            awaited = port_proxy.Signal(loop=background.loop) if awaits == "a signal" else background.loop.create_future()
            if awaits == "nothing":
                awaited = asyncio.sleep(0)
            never = background.loop.create_future()
            task = port_proxy.PromptTask(self._work(log, awaited, never), background.loop)
            if awaits == "a future that is done":
                awaited.set_result(None)
            assert task.cancel()
            await asyncio.wait([task], timeout=WAIT)
            return task.cancelled(), task.cancel()

        assert background.do(passing()) == (True, False)
        assert log == ["cancelled", "cleaned up"]

    def test_is_cancelled_while_it_runs(self, background, log):
        """By something that it has caused; it ends where it waits next."""

        async def passing():
            signals = [port_proxy.Signal(loop=background.loop) for _ in range(2)]
            tasks = []

            async def work():
                await signals[0]
                tasks[0].cancel()
                log.append("goes on")
                await self._work(log, signals[1])

            tasks.append(port_proxy.PromptTask(work(), background.loop))
            signals[0].give()
            await asyncio.wait(tasks, timeout=WAIT)
            return tasks[0].cancelled()

        assert background.do(passing()) is True
        assert log == ["goes on", "cancelled", "cleaned up"]

    def test_a_limit_loses_no_cancellation(self, background, log):
        """Though what it limits ends in the same moment."""

        async def passing():
            future = background.loop.create_future()
            task = asyncio.ensure_future(self._work(log, port_proxy.limited(future, WAIT)))
            for _ in range(5):
                await asyncio.sleep(0)
            future.set_result(1)
            task.cancel()
            await asyncio.wait([task])
            return task.cancelled()

        assert background.do(passing()) is True

    def test_a_limit_that_passes(self, background):
        async def passing():
            never = background.loop.create_future()
            try:
                await port_proxy.limited(never, 0.01)
            except asyncio.TimeoutError:
                await asyncio.sleep(0)
                return never.cancelled()

        assert background.do(passing()) is True

    def test_what_it_raises_is_its_exception(self, background, log):
        async def passing():
            future = background.loop.create_future()
            task = port_proxy.PromptTask(self._work(log, future), background.loop)
            future.set_exception(OSError("gone"))
            await asyncio.wait([task])
            return type(task.exception())

        assert background.do(passing()) is OSError
        assert log == ["cleaned up"]

    def test_a_limit_can_be_set_within(self, background, log):
        """asyncio.wait_for, and what else asks for the current task, needs one made for it."""

        async def passing():
            await asyncio.wait([port_proxy.PromptTask(self._work(log, port_proxy.limited(asyncio.sleep(0, 1), WAIT)), background.loop)])

        background.do(passing())
        assert log == [1, "done", "cleaned up"]


class TestTunnel:
    def test_handshake_is_end_to_end(self, proxy, upstream):
        app = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(SWITCHING), wire.rest()))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/ws?a" % app.port, "Origin: http://here:8888", "Sec-WebSocket-Protocol: a, b", "Sec-WebSocket-Extensions: c", *HANDSHAKE))
            message = wire.message(no_body=True)
        assert message[0] == "HTTP/1.1 101 Switching Protocols"
        fields = fields_of(message)
        assert (fields["upgrade"], fields["connection"], fields["sec-websocket-protocol"]) == ("websocket", "Upgrade", "b")
        sent = fields_of(app.messages[0])
        assert app.messages[0][0] == "GET /ws?a HTTP/1.1"
        assert (sent["origin"], sent["host"]) == ("http://localhost:%d" % app.port, "localhost:%d" % app.port)
        assert (sent["connection"], sent["upgrade"], sent["sec-websocket-protocol"]) == ("Upgrade", "websocket", "a, b")
        assert sent["x-forwarded-prefix"] == "/proxy/%d" % app.port

    def test_the_prefix_alone_is_a_websocket_too(self, proxy, upstream):
        """A WebSocket cannot follow the redirect to the missing slash."""
        app = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(SWITCHING), wire.rest()))
        assert status_of(proxy.get("/proxy/%d" % app.port, *HANDSHAKE, no_body=True)) == 101
        assert app.messages[0][0] == "GET / HTTP/1.1"

    def test_bytes_behind_the_handshake_are_not_lost(self, proxy, upstream):
        got = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING + b"from upstream")
            got.append(wire.exactly(len(b"from client")))

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE) + b"from client")
            assert status_of(wire.message(no_body=True)) == 101
            assert wire.rest() == b"from upstream"
        assert got == [b"from client"]

    def test_large_messages_both_ways(self, proxy, upstream):
        data = random.Random(1).getrandbits(8 << 22).to_bytes(1 << 22, "big")

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            wire.send(wire.exactly(len(data)))
            wire.rest()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            wire.send(data)
            assert wire.exactly(len(data)) == data

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"])
    def test_refused_by_the_app(self, proxy, upstream, answer):
        """Its own answer comes back, and no tunnel: what the client sends next is its next request."""
        app = upstream(answering(answer))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            message = wire.message()
            assert (status_of(message), message[2]) == (int(answer[9:12]), b"no")
            wire.send(request("GET", "/proxy/"))
            assert b"/proxy/8080/" in wire.message()[2]

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 101 S\r\n\r\n", b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\n\r\n"])
    def test_a_101_to_something_else_is_502(self, proxy, upstream, answer):
        app = upstream(once(answer))
        assert status_of(proxy.get("/proxy/%d/" % app.port, *HANDSHAKE)) == 502

    def test_half_closes_pass_on(self, proxy, upstream):
        """Each side may end first and still hear the other out."""
        for client_first in (True, False):

            def serve(wire, app, client_first=client_first):
                wire.until(b"\r\n\r\n")
                wire.send(SWITCHING)
                if client_first:
                    assert wire.rest() == b"last words"
                    wire.send(b"understood")
                else:
                    wire.send(b"last words")
                    wire.end()
                    assert wire.rest() == b"understood"
                app.happened.set()

            app = upstream(serve)
            with proxy.wire() as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
                assert status_of(wire.message(no_body=True)) == 101
                if client_first:
                    wire.send(b"last words")
                    wire.end()
                    assert wire.rest() == b"understood"
                else:
                    assert wire.rest() == b"last words"
                    wire.send(b"understood")
                    wire.end()
                assert app.happened.wait(WAIT)

    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_the_end_of_one_side_is_seen_by_the_other(self, proxy, upstream, leave):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            if app.connections == 1:
                with contextlib.suppress(ConnectionResetError):
                    wire.rest()
                app.happened.set()
            else:
                wire.exactly(3)
                leave(wire)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            leave(wire)
            assert app.happened.wait(WAIT)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE) + b"bye")
            assert status_of(wire.message(no_body=True)) == 101
            with contextlib.suppress(ConnectionResetError):
                wire.rest()

    def test_a_side_that_does_not_read_stops_the_other(self, proxy, upstream):
        sent = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            for _ in range(100):
                wire.send(bytes(1 << 20))
                sent.append(1)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            wire.until(b"\r\n\r\n")
            steady(lambda: len(sent))
            assert len(sent) < 60
            left = (100 << 20) - len(wire.buffer)
            while left:
                left -= len(wire.sock.recv(min(left, 1 << 20)))

    def test_early_bytes_are_not_held_without_bound(self, start, upstream):
        """Back-pressure holds from the tunnel's first moment, also for what came before its 101."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            app.happened.wait(WAIT)
            wire.send(SWITCHING)
            app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        proxy = start()
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            eventually(lambda: app.connections == 1 and len(proxy.streams) == 2)
            narrow(proxy, app.port)
            wire.send(bytes(190000))
            app.happened.set()
            assert status_of(wire.message(no_body=True)) == 101
            wire.sock.settimeout(0.3)
            sent = 0
            with pytest.raises(socket.timeout):
                while sent < 100 << 20:
                    sent += wire.sock.send(bytes(1 << 20))
            assert max(stream.transport.get_write_buffer_size() for stream in list(proxy.streams)) < 1 << 20

    def test_an_app_that_resets_behind_its_101(self, proxy, upstream):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            wire.reset()

        app = upstream(serve)
        for _ in range(20):
            with proxy.wire() as wire:
                with proxy.held():
                    wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
                with contextlib.suppress(OSError):
                    wire.rest()
        eventually(lambda: not proxy.streams and not proxy.proxy._clients)

    def test_a_tunnel_whose_upstream_was_lost_before_it_began(self, background, start):
        """Its end, which the stream's protocol was told of, is not waited for again."""
        proxy = start()

        async def splice():
            watch = proxy.proxy._around.watch
            streams = []
            for _ in range(2):
                here, there = socket.socketpair()
                there.close()
                here.setblocking(False)
                _, stream = await background.loop.create_connection(lambda: port_proxy.Stream(watch), sock=here)
                streams.append(stream)
            streams[1].abort()
            while streams[1] in watch.streams:
                await asyncio.sleep(0)
            port_proxy.Tunnel(streams[0], streams[1], 60, set())

        background.do(splice())
        eventually(lambda: not proxy.streams)

    def test_a_half_closed_tunnel_that_stands_still_is_ended(self, start, upstream):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING), app.let_go.wait(4 * WAIT)))
        proxy = start(stall_timeout=0.2)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            wire.end()
            with contextlib.suppress(ConnectionResetError):
                assert wire.rest() == b""
        eventually(lambda: not proxy.streams)


# ---------------------------------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------------------------------


class TestConnections:
    def test_keep_alive(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            for _ in range(5):
                wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", body=b"abc"))
                assert wire.message()[2] == b"ok"

    @pytest.mark.parametrize("version, lines", [("1.0", ""), ("1.0", "Connection: keep-alive\r\n"), ("1.1", "Connection: Close\r\n"), ("1.1", "Connection: a\r\nConnection: b, close\r\n")])
    def test_close(self, proxy, upstream, version, lines):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            wire.send(("GET /proxy/%d/ HTTP/%s\r\nHost: a\r\n%s\r\n" % (app.port, version, lines)).encode())
            message = wire.message()
            assert (message[2], fields_of(message)["connection"]) == (b"ok", "close")
            assert wire.rest() == b""

    def test_pipelining(self, proxy, upstream):
        """Answers come in order, nothing is lost, whoever answers."""

        def serve(wire, app):
            while wire.buffer or wire.more():
                line = wire.message()[0].encode()
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(line), line))

        app = upstream(serve)
        with proxy.wire() as wire:
            batch = b"".join(
                request("POST", "/proxy/%d/%d" % (app.port, n), "Content-Length: 3", body=b"abc") + request("GET", "/proxy/") for n in range(50)
            )
            sender = threading.Thread(target=wire.send, args=(batch,))
            sender.start()
            for number in range(50):
                assert wire.message()[2] == b"POST /%d HTTP/1.1" % number
                assert b"/proxy/8080/" in wire.message()[2]
            sender.join(WAIT)

    def test_pipelining_and_then_an_end(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port) * 3)
                wire.end()
            assert [wire.message()[2] for _ in range(3)] == [b"ok"] * 3
            assert wire.rest() == b""

    def test_an_answer_of_ours_to_a_body_nobody_reads(self, proxy):
        """The client gets to see it, and then the end; the body is not taken for a request."""
        with proxy.wire() as wire:
            wire.send(request("POST", "/nothing", "Content-Length: 5000000"))
            message = wire.message()
            assert (status_of(message), fields_of(message)["connection"]) == (404, "close")
            with contextlib.suppress(OSError):
                wire.send(request("GET", "/proxy/") * 1000)
                wire.end()
                assert wire.rest() == b""

    def test_errors_keep_the_connection_where_they_can(self, proxy):
        with proxy.wire() as wire:
            for _ in range(3):
                wire.send(request("GET", "/nothing"), request("POST", "/nothing", "Content-Length: 0"))
                for _ in range(2):
                    message = wire.message()
                    assert (status_of(message), fields_of(message).get("connection")) == (404, None)
            wire.send(request("POST", "/nothing", "Content-Length: 3", body=b"abc"))
            assert fields_of(wire.message())["connection"] == "close"

    def test_an_unread_body_ends_the_connection_whatever_keep_alive_says(self, proxy, upstream, monkeypatch):
        app = upstream(answering(OK))
        real = port_proxy.Exchange.answer

        async def answer(exchange, response):
            await real(exchange, response)
            exchange.keep_alive = True

        monkeypatch.setattr(port_proxy.Exchange, "answer", answer)
        with proxy.wire() as wire:
            wire.send(request("POST", "/nothing", "Content-Length: 1000") + request("GET", "/proxy/%d/" % app.port))
            wire.end()
            assert status_of(wire.message()) == 404
            assert wire.rest() == b""
        eventually(lambda: not proxy.proxy._clients)
        assert app.connections == 0

    def test_several_proxies_in_one_loop(self, start, upstream):
        apps = [upstream(answering(OK)) for _ in range(2)]
        proxies = [start(), start(base="/")]
        assert proxies[0].get("/proxy/%d/" % apps[0].port)[2] == proxies[1].get("/%d/" % apps[1].port)[2] == b"ok"

    def test_mistakes_of_ours_are_a_500_without_a_traceback(self, start, caplog):
        def explode(host):
            raise RuntimeError("secret")

        proxy = start(host_allowlist=explode)
        with caplog.at_level(logging.INFO, "port_proxy"):
            answer = proxy.get("/proxy/1/")
        assert status_of(answer) == 500
        assert b"secret" not in answer[2]
        assert b"Traceback" not in answer[2]
        assert any("internal error" in record.getMessage() for record in caplog.records)


    def test_resets_between_requests_are_no_news(self, proxy, caplog):
        """Browsers do it every day."""
        with caplog.at_level(logging.INFO, "port_proxy"):
            for raw in (b"", b"GET /pro", request("GET", "/proxy/")):
                wire = proxy.wire()
                wire.send(raw)
                if raw.endswith(b"\r\n\r\n"):
                    wire.message()
                eventually(lambda: proxy.proxy._clients)
                wire.reset()
                eventually(lambda: not proxy.streams)
        assert "error" not in caplog.text

    def test_an_empty_line_behind_a_body_is_no_half_request(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start(head_timeout=0.2, keep_alive_timeout=0.8)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1", body=b"a") + b"\r\n")
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""  # the end of an idle connection, without a 408


class TestPlainRequests:
    """Those that are served without a task, as long as nothing comes between."""

    def _is_prompt(self, proxy):
        return any(exchange and exchange.upstream for exchange in list(proxy.proxy._clients.values())) and not proxy.proxy._tasks

    def _begin(self, proxy, upstream, wire, serve):
        """A request that is served promptly, up to where its upstream `serve`s it; the upstream."""
        seen = threading.Event()

        def both(there, app):
            there.message()
            there.send(OK)
            if there.more():
                there.message()
                seen.wait(WAIT)
                serve(there, app)

        app = upstream(both)
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        eventually(lambda: proxy.upstreams._idle_count == 1)
        wire.send(request("GET", "/proxy/%d/" % app.port))
        eventually(lambda: self._is_prompt(proxy))
        seen.set()
        return app

    def test_a_plain_request_takes_no_task(self, proxy, upstream):
        with proxy.wire() as wire:
            app = self._begin(proxy, upstream, wire, lambda there, app: (app.let_go.wait(WAIT), there.send(OK), there.more()))
            app.let_go.set()
            assert wire.message()[2] == b"ok"
            eventually(lambda: not self._is_prompt(proxy))
            wire.send(request("GET", "/proxy/"))
            assert status_of(wire.message()) == 200
        assert app.connections == 1

    @pytest.mark.parametrize("answer, rest", [
        (OK[:9], OK[9:]), (OK[:-1], OK[-1:]), (OK[:-2], OK[-2:]), (b"HTTP/1.1 103 Early Hints\r\n\r\n", OK), (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", b"0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: " + 4000 * b"x" + b"\r\n\r\nok", b""),
    ])  # fmt: skip
    def test_an_answer_in_pieces_is_left_to_a_task(self, proxy, upstream, answer, rest):
        def serve(there, app):
            there.send(answer)
            app.let_go.wait(WAIT)
            there.send(rest)
            there.more()

        with proxy.wire() as wire:
            app = self._begin(proxy, upstream, wire, serve)
            eventually(lambda: not self._is_prompt(proxy))
            app.let_go.set()
            message = wire.message(no_body=b"103" in answer)
            if b"103" in answer:
                assert status_of(message) == 103
                message = wire.message()
            assert (status_of(message), message[2]) == (200, b"ok")

    @pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"])
    def test_an_upstream_that_takes_no_other_is_not_asked_again(self, proxy, upstream, answer):
        with proxy.wire() as wire:
            app = self._begin(proxy, upstream, wire, lambda there, app: (there.send(answer), there.rest()))
            assert wire.message()[2] == b"ok"
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
        assert app.connections == 2

    def test_more_than_the_answer_is_nobodys(self, proxy, upstream):
        """What comes behind it ends the upstream's connection, and reaches no client."""
        with proxy.wire() as wire:
            app = self._begin(proxy, upstream, wire, lambda there, app: (there.send(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"), there.rest()))
            assert wire.message()[2] == b"ok"
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
        assert app.connections == 2

    def test_an_answer_that_is_no_http(self, proxy, upstream):
        with proxy.wire() as wire:
            self._begin(proxy, upstream, wire, lambda there, app: there.send(b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"))
            message = wire.message()
            assert status_of(message) == 502
            assert b"not valid HTTP" in message[2]

    def test_an_upstream_that_leaves_instead_of_answering_is_asked_anew(self, proxy, upstream):
        with proxy.wire() as wire:
            app = self._begin(proxy, upstream, wire, lambda there, app: app.let_go.wait(WAIT))
            app.let_go.set()
            assert wire.message()[2] == b"ok"
        assert app.connections == 2

    def test_an_upstream_that_does_not_answer(self, start, upstream):
        proxy = start(response_timeout=0.3)
        with proxy.wire() as wire:
            self._begin(proxy, upstream, wire, lambda there, app: there.rest())
            assert status_of(wire.message()) == 504

    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_a_client_that_leaves_ends_it(self, proxy, upstream, leave):
        ended = threading.Event()

        def serve(there, app):
            with contextlib.suppress(OSError):
                there.rest()
            ended.set()

        with proxy.wire() as wire:
            self._begin(proxy, upstream, wire, serve)
            leave(wire)
            assert ended.wait(WAIT)
        eventually(lambda: not proxy.proxy._clients and not proxy.proxy._tasks)

    def test_it_is_waited_for_when_the_proxy_stops(self, proxy, upstream):
        with proxy.wire() as wire:
            app = self._begin(proxy, upstream, wire, lambda there, app: (app.let_go.wait(WAIT), there.send(OK), there.rest()))
            closing = asyncio.run_coroutine_threadsafe(proxy.proxy.close(), proxy.background.loop)
            eventually(lambda: proxy.proxy._tasks)
            app.let_go.set()
            message = wire.message()
            assert (message[2], fields_of(message)["connection"]) == (b"ok", "close")
            closing.result(WAIT)

    def test_a_refusal_is_asked_for_once(self, start, upstream):
        """A page visit with the token makes one session, not two."""
        app = upstream(answering(OK, OK))
        proxy = start(token="secret")
        assert proxy.get("/proxy/%d/" % app.port, "Authorization: token secret")[2] == b"ok"
        eventually(lambda: proxy.upstreams._idle_count == 1)
        message = proxy.get("/proxy/%d/?token=secret" % app.port, "Accept: text/html")
        assert (status_of(message), len(proxy.proxy._around.gate._sessions)) == (302, 1)
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 401

    def test_requests_that_come_while_one_is_served(self, proxy, upstream):
        """What they get comes in their order."""
        app = upstream(answering(*[b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number for number in range(8)]))
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"0"
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.send(request("GET", "/proxy/%d/" % app.port) * 6)
            assert b"".join(wire.message()[2] for _ in range(7)) == b"1234567"

    def test_a_client_that_takes_no_answers_is_given_no_more(self, start, upstream):
        """Though each of its requests would be served promptly."""
        body = bytes(60000)
        app = upstream(answering(*[b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body] * 2000))
        proxy = start()
        proxy.get("/proxy/%d/" % app.port)
        with proxy.wire() as wire:
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):
                wire.sock.settimeout(0.5)
                for _ in range(2000):
                    wire.sock.sendall(request("GET", "/proxy/%d/" % app.port))
            steady(lambda: len(app.messages))
            assert max(stream.transport.get_write_buffer_size() for stream in list(proxy.streams)) < 1 << 20

    @pytest.mark.parametrize("mistaken", ["understand", "translate"])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_mistakes_of_ours(self, proxy, upstream, monkeypatch, mistaken, is_first):
        """Whether the request takes a task or none: as long as no answer has begun, it is a 500."""

        def explode(*_):
            raise RuntimeError("secret")

        app = upstream(answering(OK, OK))
        if not is_first:
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        monkeypatch.setattr(proxy.proxy, "_around", proxy.proxy._around._replace(**{mistaken: explode}))
        proxy.background.do(self._listen_anew(proxy))
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 500
        eventually(lambda: not proxy.proxy._clients and not proxy.proxy._tasks)

    async def _listen_anew(self, proxy):
        for server in proxy.proxy._servers:
            server.close()
        proxy.proxy._servers[:] = [await proxy.proxy._listen(sock, None, proxy.proxy._around) for sock in proxy.proxy._sockets]


class InAsynciosLoop:
    """The same tests in the loop of a program that embeds the proxy."""

    @pytest.fixture
    def background(self):
        yield from running_loop(asyncio.new_event_loop)


class TestBackPressureInAsynciosLoop(InAsynciosLoop, TestBackPressure):
    pass


class TestStreamsInAsynciosLoop(InAsynciosLoop, TestStreams):
    pass


class TestTunnelInAsynciosLoop(InAsynciosLoop, TestTunnel):
    pass


class TestPlainRequestsInAsynciosLoop(InAsynciosLoop, TestPlainRequests):
    pass


class TestRemembering:
    """What short heads came to is remembered; that must not show but in time."""

    @pytest.mark.parametrize("is_plain", [True, False])
    def test_what_is_remembered(self, monkeypatch, is_plain):
        calls = []
        for name in ("understand", "translate"):
            monkeypatch.setattr(port_proxy, name, lambda gate, raw, *others: calls.append((raw, others)) or len(calls))
        gate = port_proxy.Gate(port_proxy.Config())
        gate.is_plain = is_plain
        understand, translate = port_proxy.readers_of_heads(gate)
        asked = port_proxy.Asked(**dict.fromkeys(port_proxy.Asked._fields))
        short = [asked._replace(is_short=True) for _ in range(2)]
        for remember, who_or_what_differs in ((lambda raw, who: understand(raw, who, "http"), "ab"), (lambda raw, who: translate(raw, who, "route", True), short)):
            one, two = who_or_what_differs
            del calls[:]
            same = [remember(b"a", one), remember(b"a", one), remember(b"a", two), remember(b"b", one), remember(b"a", one)]
            is_remembered = is_plain or who_or_what_differs is not short
            assert same == ([1, 1, 2, 3, 1] if is_remembered else [1, 2, 3, 4, 5])
            before = len(calls)
            assert [remember(bytes(3000), one), remember(bytes(3000), one)] == [before + 1, before + 2]
            for number in range(1000):
                remember(b"%d" % number, one)
            assert remember(b"a", one) == before + 1003
        # Which no other request comes to, even of the same bytes.
        assert translate(b"a", asked, "route", True) != translate(b"a", asked, "route", True)

    GATES = {
        "open": (Config(), []),
        "with a token": (Config(token="secret"), []),
        "of a program": (Config(authorize=lambda head, visit, route: None), []),
        "of the whole origin": (Config(whole_origin=True, domains=("localhost",)), []),
        "at the root": (Config(base="/"), []),
        "below a strange base": (Config(base="/user/a%40b.c+d/proxy"), []),
        "behind a front": (Config(trusted_proxies=("127.0.0.0/8",), preserve_host=True), ["X-Forwarded-Proto: https", "X-Forwarded-For: 9.9.9.9", "X-Forwarded-Host: a.b"]),
        "to TLS and other hosts": (Config(upstream_tls=("8080",), host_allowlist=("*",)), []),
        "with short targets": (Config(max_target_bytes=40), []),
    }  # fmt: skip
    HEADS = [
        ("GET", ()), ("HEAD", ()), ("get", ()), ("CONNECT", ()), ("OPTIONS", ("Origin: http://here:8888", "Access-Control-Request-Method: PUT")), ("POST", ("Content-Length: 3",)),
        ("PUT", ("Transfer-Encoding: chunked",)), ("PUT", ("Content-Length: 3", "Content-Length: 4")), ("GET", HANDSHAKE), ("GET", ("Connection: close, X", "X: y")),
        ("GET", ("Accept: text/html", "Sec-Fetch-Dest: document")), ("GET", ("Referer: http://here:8888/proxy/8080/a?b", "Cookie: a=b; port_proxy_8888=x; port_proxy_8888_app=9090")),
        ("GET", ("Authorization: token secret",)), ("GET", ("Referer: http://here:8888/proxy/9090/x", "Sec-Fetch-Site: same-origin")), ("GET", ("X: \xe4",)),
    ]  # fmt: skip
    APPS = ["8080", "absolute/8080", "localhost:8080", "[::1]:8080", "absolute/a.b:1", "0", "99999", "x", "absolute", "%38080", ""]
    PLACES = ["", "/", "/a", "//a", "/a/../b", "/..", "/%2e%2e", "/.", "/a.b/%2f", "?a", "/?", "/?a=b?c/../..", "/a?token=secret", "/?%74oken=secret&b", "/a?token=other", "/a b", "/a#b", "/\xe4", "/?\xe4", '/"|{}^`\\~!', "/" + 40 * "a"]

    @pytest.mark.parametrize("kind", sorted(GATES))
    def test_what_is_like_what_came_before(self, kind):
        """Of requests that differ in their targets alone the second is understood by the first; it comes to what it would
        have come to by itself."""
        config, lines = self.GATES[kind]
        config = port_proxy.checked_config(config._replace(port=0))
        gate = port_proxy.TokenGate(config, True, 8888)
        understand, translate = port_proxy.readers_of_heads(gate)
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nLocation: /x\r\nSet-Cookie: a=b; Path=/\r\nService-Worker-Allowed: /\r\nConnection: close\r\n\r\n"
        alike = set()

        def outcome(call, *arguments):
            try:
                return call(*arguments)
            except ProxyError as error:
                return error.status, error.detail, error.fields

        for method, more in self.HEADS:
            for app in self.APPS:
                for place in self.PLACES:
                    raw = request(method, "%s/%s%s" % (config.base, app, place), *more + tuple(lines))
                    scheme = "https" if len(place) % 2 else "http"
                    asked = outcome(understand, raw, "127.0.0.1", scheme)
                    expected = outcome(port_proxy.understand, gate, raw, "127.0.0.1", scheme)
                    if not isinstance(asked, port_proxy.Asked):
                        assert asked == expected
                        continue
                    assert asked._replace(like=None) == expected
                    alike |= {app} if asked.like else set()
                    for keep_alive in (True, False) if asked.route else ():
                        told = outcome(translate, answer, asked, asked.route, keep_alive)
                        assert told == outcome(port_proxy.translate, gate, answer, asked, asked.route, keep_alive)
        assert alike == {"8080", "absolute/8080", "localhost:8080", "[::1]:8080", "absolute/a.b:1"}

    def test_an_answer_is_translated_for_the_route_that_was_taken(self):
        """Which is not always that of the head: where that has none, one is looked for again."""
        gate = port_proxy.TokenGate(port_proxy.checked_config(Config(port=0)), True, 8888)
        understand, translate = port_proxy.readers_of_heads(gate)
        _, asked = (understand(request("GET", "/proxy/8080/" + path), "127.0.0.1", "http") for path in "ba")
        other = asked.route._replace(prefix="/proxy/9090", port=9090)
        raw = b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"
        told = [translate(raw, asked, route, True).for_client for route in (asked.route, other, asked.route)]
        assert [b"Location: %s\r\n" % place in one for place, one in zip((b"/proxy/8080/x", b"/proxy/9090/x", b"/proxy/8080/x"), told)] == [True] * 3

    def test_what_is_not_like_anything_is_understood_once(self, monkeypatch):
        calls = []
        gate = port_proxy.TokenGate(port_proxy.checked_config(Config(port=0)), True, 8888)
        monkeypatch.setattr(port_proxy, "understand", lambda *arguments, understand=port_proxy.understand: calls.append(arguments) or understand(*arguments))
        understand, _ = port_proxy.readers_of_heads(gate)
        for number in range(1000):
            understand(request("GET", "/proxy/8080/a", "X-Request-Id: %d" % number), "127.0.0.1", "http")
            assert status_of_error(understand, request("GET", "/proxy/8080/a", "Host: %d" % number), "127.0.0.1", "http") == 400
            assert understand(request("GET", "/proxy/nope/a?%d" % number), "127.0.0.1", "http").route is None
            understand(request("GET", "/proxy/8080/?%d" % number, "X-Request-Id: %d" % number), "127.0.0.1", "http")
        assert len(calls) == 3000

    def test_what_a_program_makes_of_a_head_is_of_that_head_alone(self, start, upstream):
        seen = []

        async def authorize(head, visit, route):
            seen.append(port_proxy.field_values(head.fields, "x-key").pop())

        app = upstream(answering(*[OK] * 4))
        proxy = start(authorize=authorize)
        for path in "aabc":
            assert status_of(proxy.get("/proxy/%d/%s" % (app.port, path), "X-Key: open sesame")) == 200
        assert seen == ["open sesame"] * 4

    def test_an_allowlist_that_is_a_function_is_asked_every_time(self, start, upstream):
        """About this machine too, also where a connection is at hand."""
        allowed = [True]
        app = upstream(answering(*[OK] * 4))
        proxy = start(host_allowlist=lambda host: allowed[0])
        assert [status_of(proxy.get("/proxy/%d/%s" % (app.port, path))) for path in "aab"] == [200] * 3
        allowed[0] = False
        assert [status_of(proxy.get("/proxy/%d/%s" % (app.port, path))) for path in "abc"] == [403] * 3

    def test_a_refusal_is_a_refusal_again(self, proxy):
        for _ in range(3):
            assert status_of(proxy.get("/proxy/nope/")) == 404
            assert status_of(proxy.ask(b"GET / HTTP/1.1\r\n\r\n")) == 400

    def test_the_same_head_from_another_place(self, start, upstream):
        """What it came to for one client is not what it comes to for another."""
        app = upstream(answering(OK, OK, OK, OK))
        proxy = start()
        for client in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
            with Wire(socket.create_connection(("127.0.0.1", proxy.port), WAIT, (client, 0))) as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.message()
            assert fields_of(app.messages[-1])["x-forwarded-for"] == client

    def test_the_same_answer_to_another_request(self, proxy, upstream):
        """To HEAD it has no body, and to HTTP/1.0 it ends with the connection."""
        app = upstream(answering(*[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"] * 3))
        for _ in range(3):
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
            message = proxy.ask(request("HEAD", "/proxy/%d/" % app.port), no_body=True)
            assert (fields_of(message)["content-length"], message[2]) == ("2", b"")

    def test_the_same_answer_to_another_visitor(self, proxy, upstream):
        """Who opens a page gets the cookie that says which app it was; who asks for data, or has it already, does not."""
        app = upstream(answering(*[OK] * 9))
        page, data = ("Accept: text/html",), ("Accept: */*",)
        name = proxy.proxy._around.gate.app_cookie
        known = page + ("Cookie: %s=%d" % (name, app.port),)
        told = ["set-cookie" in fields_of(proxy.get("/proxy/%d/" % app.port, *lines)) for lines in (page, data, known, page, data, known, data, page, known)]
        assert told == [True, False, False, True, False, False, False, True, False]

    def test_the_ports_are_looked_up_once_for_all(self, background, monkeypatch):
        looks = []
        monkeypatch.setattr(port_proxy, "listeners", lambda: looks.append(1) or [len(looks)])

        async def look():
            lookout = port_proxy.Lookout()
            found = [await one for one in [asyncio.ensure_future(lookout.listeners(background.loop)) for _ in range(3)]]
            lookout._since -= 2
            return found + [await lookout.listeners(background.loop)]

        assert background.do(look()) == [[1], [1], [1], [2]]

    @pytest.mark.parametrize("body, title", [
        (b"<title>&#" + 5000 * b"9" + b";</title>", ""), (b"<title" * 10000, ""), (b"<title>" + b"a" * 60000, ""), (b"<title>\x1b[31mred\xe2\x80\xae</title>", "[31mred"), (b"<titles>x</titles>", ""),
        (b"<title lang='en'>ok</title>", "ok"), (b"<TITLE>\n a  b </TITLE >", "a b"),
    ], ids="number openings long escapes other attribute spaces".split())  # fmt: skip
    def test_titles_that_mean_harm(self, body, title):
        head = port_proxy.ResponseHead(200, "OK", "1.1", (("Content-Type", "text/html"),))
        began = time.process_time()
        assert port_proxy.title_in(head, body).strip() == title
        assert time.process_time() - began < 0.5

    @pytest.mark.parametrize("coding", ["length", "chunked", "gzip", "gzip chunked", "until close"])
    def test_titles_of_pages_however_they_come(self, proxy, upstream, coding):
        """On a new connection, and on one from the pool, for which there is a short cut."""
        body = b"<html><head><title>A &amp; B</title></head>" + 3000 * b" "
        sent = gzip.compress(body) if "gzip" in coding else body
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n" + (b"Content-Encoding: gzip\r\n" if "gzip" in coding else b"")
        if "chunked" in coding:
            answer = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(sent) + chunk(b"")
        else:
            answer = head + (b"" if coding == "until close" else b"Content-Length: %d\r\n" % len(sent)) + b"\r\n" + sent
        app = upstream(lambda wire, app: (wire.message(), wire.send(answer)) if coding == "until close" else answering(answer, answer)(wire, app))
        for _ in range(2):
            proxy.proxy._around.titles._seen.clear()
            assert status_of(proxy.get("/proxy/%d/" % app.port, "Accept: text/html")) == 200
            eventually(lambda: proxy.proxy._around.titles._seen)
            assert proxy.proxy._around.titles._seen[app.port][0] == "A & B"

    def test_a_page_whose_chunks_come_in_parts(self, proxy, upstream):
        """The size first, and then the bytes, as some servers write them: the page comes whole, and has its title."""
        body = b"<title>A</title>\r\n<p>"
        parts = [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % len(body), body, b"\r\n", b"0\r\n\r\n"]

        def serve(wire, app):
            wire.message()
            for part in parts:
                wire.send(part)
                app.happened.wait(WAIT)
                app.happened.clear()
            wire.rest()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, "Accept: text/html"))
            seen = b""
            for part in parts:
                seen += wire.until(part[-4:])
                app.happened.set()
            assert seen.endswith(b"\r\n\r\n" + b"".join(parts[1:]))
        assert proxy.proxy._around.titles._seen[app.port][0] == "A"

    def test_a_session_that_is_not_known_any_more(self, start, upstream):
        """The gate is asked every time, whatever is remembered of the request."""
        app = upstream(answering(OK, OK))
        proxy = start(token="secret")
        lines = ("Authorization: token secret",)
        assert status_of(proxy.get("/proxy/%d/" % app.port, *lines)) == 200
        proxy.proxy._around.gate.token = "another"
        assert status_of(proxy.get("/proxy/%d/" % app.port, *lines)) == 401


class TestDeadlines:
    def test_a_head_that_drips(self, start):
        """The whole head has a deadline, however regularly its bytes come."""
        proxy = start(head_timeout=0.3)
        with proxy.wire() as wire:
            stop = threading.Event()

            def drip():
                with contextlib.suppress(OSError):
                    for octet in b"GET / HTTP/1.1\r\nX: " + b"a" * 5000:
                        wire.sock.send(bytes([octet]))
                        if stop.wait(0.02):
                            return

            thread = threading.Thread(target=drip)
            thread.start()
            assert status_of(wire.message()) == 408
            stop.set()
            thread.join(WAIT)

    def test_silence_between_requests_is_no_error(self, start):
        proxy = start(keep_alive_timeout=0.2)
        with proxy.wire() as wire:
            assert wire.rest() == b""
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/"))
            assert status_of(wire.message()) == 200
            assert wire.rest() == b""

    def test_a_body_that_stops_coming(self, start, upstream):
        app = upstream(lambda wire, app: wire.rest())
        proxy = start(stall_timeout=0.2)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", body=b"a"))
            message = wire.message()
            assert (status_of(message), fields_of(message)["connection"]) == (408, "close")

    def test_an_answer_that_nobody_takes(self, start, upstream):
        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    wire.send(bytes(1 << 20))

        app = upstream(serve)
        proxy = start(stall_timeout=0.3)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            eventually(lambda: app.connections == 1)
            eventually(lambda: not proxy.streams)
            with pytest.raises((ConnectionResetError, AssertionError)):
                while wire.sock.recv(1 << 20):
                    pass
                raise AssertionError("cut short")

    def test_an_answer_that_never_comes(self, start, upstream):
        app = upstream(lambda wire, app: wire.rest())
        answer = start(response_timeout=0.2).get("/proxy/%d/" % app.port)
        assert status_of(answer) == 504
        assert b"No answer came from port %d of this machine within 0.2 seconds." % app.port in answer[2]

    def test_an_upload_that_moves_is_no_late_answer(self, start, upstream):
        """The time for the answer counts from the request's last byte."""

        def serve(wire, app):
            wire.message()
            wire.send(OK)

        app = upstream(serve)
        proxy = start(response_timeout=0.4)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 10"))
            tick = threading.Event()
            for _ in range(10):
                tick.wait(0.1)
                wire.send(b"a")
            assert wire.message()[2] == b"ok"

    def test_events_may_be_silent_for_long(self, start, upstream):
        """No deadline runs for an answer that has begun."""

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            threading.Event().wait(0.8)
            wire.send(b"ok")

        app = upstream(serve)
        assert start(response_timeout=0.1, stall_timeout=0.1, keep_alive_timeout=0.1).get("/proxy/%d/" % app.port)[2] == b"ok"


class TestLimits:
    def test_an_idle_connection_makes_room(self, start, upstream):
        app = upstream(lambda wire, app: (wire.message(), app.let_go.wait(4 * WAIT), wire.send(OK)))
        proxy = start(max_connections=3)
        with proxy.wire() as busy, proxy.wire() as first, proxy.wire() as second:
            busy.send(request("GET", "/proxy/%d/" % app.port))
            eventually(lambda: app.connections == 1)
            for wire in (first, second):
                wire.send(request("GET", "/proxy/"))
                wire.message()
            assert status_of(proxy.get("/proxy/")) == 200
            with contextlib.suppress(ConnectionResetError):
                assert first.rest() == b""
            app.let_go.set()
            assert busy.message()[2] == b"ok"

    def test_full(self, start, upstream):
        app = upstream(lambda wire, app: (wire.message(), app.let_go.wait(4 * WAIT), wire.send(OK)))
        proxy = start(max_connections=2)
        with proxy.wire() as one, proxy.wire() as two:
            for wire in (one, two):
                wire.send(request("GET", "/proxy/%d/" % app.port))
            eventually(lambda: app.connections == 2)
            with proxy.wire() as third:
                answer = third.message()
                assert (status_of(answer), "retry-after" in fields_of(answer)) == (503, True)
            app.let_go.set()
            assert one.message()[2] == two.message()[2] == b"ok"

    def test_tunnels(self, start, upstream):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING if app.connections < 3 else OK), wire.rest()))
        proxy = start(max_tunnels=2)
        with proxy.wire() as one, proxy.wire() as two:
            for wire in (one, two):
                wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
                assert status_of(wire.message(no_body=True)) == 101
            assert status_of(proxy.get("/proxy/%d/" % app.port, *HANDSHAKE)) == 503
            assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
            one.close()
            eventually(lambda: len(proxy.proxy._around.tunnels) == 1)

    def test_slow_clients_do_not_slow_others_down(self, start, upstream):
        """300 heads that drip, beside requests that take as long as they did without them."""
        app = upstream(answering(OK))
        proxy = start()

        def median():
            times = []
            for _ in range(60):
                begun = time.perf_counter()
                assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
                times.append(time.perf_counter() - begun)
            return sorted(times)[30]

        before = median()
        slow = [proxy.wire() for _ in range(300)]
        stop = threading.Event()

        def drip():
            for octet in b"GET /proxy/ HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100000:
                for wire in slow:
                    wire.sock.send(bytes([octet]))
                if stop.wait(0.1):
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            during = median()
        finally:
            stop.set()
            thread.join(WAIT)
            for wire in slow:
                wire.close()
        assert during < max(10 * before, 0.05)  # seconds; it is milliseconds, on a machine that may be busy

    def test_soak(self, start, upstream):
        """Clients that leave at random moments leave nothing behind: no descriptor, connection, task or pool entry."""

        def serve(wire, app):
            while wire.buffer or wire.more():
                message = wire.message()
                if "upgrade" in fields_of(message):
                    wire.send(SWITCHING)
                    with contextlib.suppress(OSError):
                        while True:
                            wire.send(wire.sock.recv(65536) or exec_end())
                wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for _ in range(20):
                    wire.send(chunk(bytes(5000)))
                wire.send(b"0\r\n\r\n")

        def exec_end():
            raise ConnectionResetError

        def quiet(wire, app):
            with contextlib.suppress(OSError, AssertionError, ValueError):
                serve(wire, app)

        app = upstream(quiet)
        proxy = start(idle_upstream_timeout=0.2)
        descriptors = Path("/proc/self/fd")
        before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
        chance = random.Random(7)
        for _ in range(400):
            wire = proxy.wire()
            lines = chance.choice([(), HANDSHAKE, ("Content-Length: 100000",), ("Transfer-Encoding: chunked",)])
            body = chance.choice([b"", bytes(50000), b"5\r\nabcde\r\n" * 1000])
            raw = request(chance.choice(["GET", "POST"]), "/proxy/%d/" % app.port, *lines) + body
            with contextlib.suppress(OSError):
                wire.send(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.5 else raw)
                wire.sock.settimeout(chance.random() / 20)  # leaves in the middle of whatever it is
                wire.exactly(chance.randrange(30000))
            chance.choice([wire.close, wire.reset])()
        eventually(lambda: not proxy.proxy._clients and not proxy.proxy._tasks)
        eventually(lambda: not proxy.streams and not proxy.upstreams._idle and not proxy.upstreams._idle_count)
        assert not proxy.proxy._around.tunnels
        if before:
            eventually(lambda: len(list(descriptors.iterdir())) <= before)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost with its key in one file."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("openssl is not installed, to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    command = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run([openssl] + command.split(), cwd=str(folder), check=True, stderr=subprocess.DEVNULL, timeout=WAIT)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return folder


class TestTls:
    def test_to_clients(self, start, upstream, certificate):
        app = upstream(answering(OK))
        proxy = start(certfile=str(certificate / "cert.pem"), keyfile=str(certificate / "key.pem"))
        assert proxy.proxy.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        with Wire(context.wrap_socket(socket.create_connection(("127.0.0.1", proxy.port), WAIT), server_hostname="localhost")) as wire:
            assert wire.sock.version() in ("TLSv1.2", "TLSv1.3")
            for _ in range(2):
                wire.send(request("POST", "/proxy/%d/" % app.port, "Origin: https://here:8888", "Content-Length: 200000", body=bytes(200000)))
                assert wire.message()[2] == b"ok"
        assert fields_of(app.messages[0])["x-forwarded-proto"] == "https"
        with proxy.wire() as wire:  # plain HTTP where TLS is spoken
            wire.send(request("GET", "/proxy/"))
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1 200" not in wire.rest()

    def test_a_handshake_that_never_ends(self, start, certificate):
        """Silent connections are dropped before they are anybody's."""
        proxy = start(certfile=str(certificate / "both.pem"), head_timeout=0.3)
        with proxy.wire() as wire, contextlib.suppress(ConnectionResetError):
            assert wire.rest() == b""

    @pytest.mark.parametrize(
        "options, says",
        [
            ({"certfile": "junk"}, "junk does not hold a certificate (PEM) that can be used: .*"), ({"certfile": "junk", "keyfile": "key.pem"}, "junk does not hold a certificate .*"),
            ({"certfile": "cert.pem"}, "cert.pem does not hold the key (PEM) of the certificate in cert.pem; if that is in a file of its own, name it with --keyfile"),
            ({"certfile": "cert.pem", "keyfile": "junk"}, "junk does not hold the key (PEM) of the certificate in cert.pem"),
            ({"certfile": "cert.pem", "keyfile": "rsa.pem"}, "rsa.pem does not hold the key (PEM) of the certificate in cert.pem"),
            ({"certfile": "cert.pem", "keyfile": "ec.pem"}, "ec.pem does not hold the key (PEM) of the certificate in cert.pem"),
            ({"certfile": "cert.pem", "keyfile": "locked.pem"}, "the pass phrase of the key in locked.pem was not given"),
            ({"certfile": "both.pem", "client_ca": "junk"}, "junk does not hold a certificate .*"), ({"certfile": "both.pem", "client_ca": "key.pem"}, "key.pem does not hold a certificate .*"),
            ({"certfile": "gone"}, "cannot read gone: No such file or directory"), ({"certfile": "."}, "cannot read .: Is a directory"),
            ({"certfile": "cert.pem", "keyfile": "gone"}, "cannot read gone: .*"), ({"certfile": "both.pem", "client_ca": "gone"}, "cannot read gone: .*"),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_files_that_will_not_do(self, certificate, options, says):
        """What is wrong is told of the file that it is wrong with, and nobody is asked who does not sit at a terminal."""
        (certificate / "junk").write_text("hello\n")
        for command in ("genrsa -out rsa.pem 2048", "ecparam -name prime256v1 -genkey -noout -out ec.pem", "pkey -in key.pem -aes256 -passout pass:abcd -out locked.pem"):
            subprocess.run([shutil.which("openssl")] + command.split(), cwd=str(certificate), check=True, stderr=subprocess.DEVNULL, timeout=WAIT)
        arguments = [one for name, value in options.items() for one in ("--" + name.replace("_", "-"), value)]
        done = subprocess.run(
            [sys.executable, PROGRAM, "--port", "0"] + arguments, cwd=str(certificate), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, timeout=WAIT,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, b"")
        assert re.fullmatch("port_proxy: " + re.escape(says).replace(r"\.\*", ".*"), done.stderr.decode().rstrip("\n").split("\n")[-1])
        assert b"Traceback" not in done.stderr

    @pytest.mark.parametrize("names, fits", [(("cert.pem", "key.pem"), True), (("cert.pem", "cert.pem"), False), (("key.pem", "key.pem"), False)])
    def test_files_that_are_pipes(self, certificate, names, fits):
        """As a shell makes them of programs that unlock a key: what they hold can be read once."""
        if not os.path.exists("/dev/fd"):
            pytest.skip("this system has no /dev/fd")
        pipes = [os.pipe() for _ in range(2)]
        for (_, writer), name in zip(pipes, names):
            with os.fdopen(writer, "wb") as file:
                file.write((certificate / name).read_bytes())
        certfile, keyfile = ("/dev/fd/%d" % reader for reader, _ in pipes)
        try:
            with contextlib.ExitStack() as stack:
                if not fits:
                    stack.enter_context(pytest.raises(ValueError, match="the certificate in %s cannot be used with the key in %s: " % (certfile, keyfile)))
                assert port_proxy.server_context(Config(certfile=certfile, keyfile=keyfile))
        finally:
            for reader, _ in pipes:
                os.close(reader)

    def test_old_versions_are_refused(self, certificate):
        context = port_proxy.server_context(Config(certfile=str(certificate / "both.pem")))
        if sys.version_info >= (3, 7):
            assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        else:
            assert context.options & ssl.OP_NO_TLSv1 and context.options & ssl.OP_NO_TLSv1_1

    def test_tunnel_and_early_answer(self, start, upstream, certificate):
        proxy = start(certfile=str(certificate / "both.pem"))
        data = bytes(range(256)) * 8192

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING + b"hello")
            wire.send(wire.exactly(len(data)))
            wire.rest()
            app.happened.set()

        app = upstream(serve)
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))

        def connect():
            return Wire(context.wrap_socket(socket.create_connection(("127.0.0.1", proxy.port), WAIT), server_hostname="localhost"))

        with connect() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            wire.send(data)  # the app takes it all before it sends; one TLS socket is not for two threads
            assert wire.exactly(5 + len(data)) == b"hello" + data
        assert app.happened.wait(WAIT)
        with connect() as wire:
            wire.send(request("POST", "/nothing", "Content-Length: 300000", body=bytes(100000)))
            assert status_of(wire.message()) == 404

    def test_to_upstreams(self, start, upstream, certificate, monkeypatch):
        """Verified, unless that is switched off for this machine; Origin says https, as the app is at home there."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(str(certificate / "both.pem"))

        def serve(wire, app):
            with contextlib.suppress(OSError):  # a certificate that was not accepted, or an end without a farewell
                wire.sock = context.wrap_socket(wire.sock, server_side=True)
                answering(OK)(wire, app)

        app = upstream(serve)
        proxy = start(upstream_tls=[str(app.port)])
        answer = proxy.get("/proxy/%d/" % app.port)
        assert (status_of(answer), b"--insecure-upstream" in answer[2]) == (502, True)
        trusting = start(upstream_tls=["localhost:%d" % app.port], insecure_upstream=True)
        assert trusting.get("/proxy/%d/" % app.port, "Origin: http://here:8888")[2] == b"ok"
        assert fields_of(app.messages[-1])["origin"] == "https://localhost:%d" % app.port
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        proxy = start(upstream_tls=[str(app.port)])
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        assert proxy.get("/proxy/127.0.0.1:%d/" % app.port)[2] == b"ok"
        plain = upstream(lambda wire, app: (wire.more(), wire.send(OK)))
        answer = start(upstream_tls=[str(plain.port)], insecure_upstream=True).get("/proxy/%d/" % plain.port)
        assert (status_of(answer), b"Does it speak TLS?" in answer[2]) == (502, True)

    @pytest.mark.parametrize("upstream_tls", [["x"], ["0"], ["a:b"], [""], ["localhost:70000"]])
    def test_what_is_no_upstream(self, upstream_tls):
        with pytest.raises(ValueError):
            checked_config(Config(upstream_tls=upstream_tls))


    @pytest.mark.parametrize("sent", [b"GET /proxy/", b"no HTTP\r\n\r\n", request("POST", "/proxy/%d/", "Content-Length: 9", body=b"abc"), request("GET", "/proxy/%d/")])
    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_clients_that_leave_are_forgotten(self, start, upstream, certificate, sent, leave):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), app.happened.set(), app.let_go.wait(WAIT)))
        proxy = start(certfile=str(certificate / "both.pem"))
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        wire = Wire(context.wrap_socket(socket.create_connection(("127.0.0.1", proxy.port), WAIT), server_hostname="localhost"))
        wire.send(sent % app.port if b"%" in sent else sent)
        if b"%" in sent:
            assert app.happened.wait(WAIT)
        leave(wire)
        eventually(lambda: not proxy.proxy._clients and not proxy.proxy._tasks)


class TestUnixSockets:
    @pytest.fixture
    def folder(self):
        if not hasattr(socket, "AF_UNIX"):
            pytest.skip("this system has no Unix sockets")
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    @staticmethod
    def connect(path):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.settimeout(WAIT)
        wire = Wire.__new__(Wire)
        wire.sock, wire.buffer = sock, b""
        return wire

    def test_served_and_removed(self, start, upstream, folder):
        app = upstream(answering(OK))
        path = folder / "proxy"
        proxy = start(bind="unix:%s" % path, allow_hostnames=())
        assert path.stat().st_mode & 0o777 == 0o600
        with self.connect(path) as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port).replace(b"here", b"localhost"))
            assert wire.message()[2] == b"ok"
        assert "x-forwarded-for" not in fields_of(app.messages[0])
        assert proxy.proxy.token == ""
        proxy.close()
        assert not path.exists()

    def test_a_stale_one_is_replaced_and_nothing_else(self, background, start, folder):
        path = folder / "proxy"
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        start(bind="unix:%s" % path)
        for make in (lambda: None, lambda: (folder / "file").write_text("precious"), lambda: (folder / "link").symlink_to(path)):
            make()
        for name in ("proxy", "file", "link"):  # in use; not a socket; a link to one
            with pytest.raises(OSError):
                background.do(PortProxy(Config(bind="unix:%s" % (folder / name))).start())
        assert (folder / "file").read_text() == "precious"
        self.connect(path).close()

    def test_one_that_others_may_use_asks_for_a_token(self, background, folder):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(folder / "open"))
        os.chmod(str(folder / "open"), 0o666)
        proxy = PortProxy(Config())
        background.do(proxy.start([sock]))
        token = proxy.token
        background.do(proxy.close())
        assert token
        assert (folder / "open").exists()  # it was given to us, and is not ours to remove

    def test_command_line(self, folder):
        path = folder / "proxy"
        process = subprocess.Popen([sys.executable, PROGRAM, "--bind", "unix:%s" % path], stdout=subprocess.PIPE)
        lines = process.stdout.readline() + process.stdout.readline()
        assert b"ssh -N -L 8888:%s " % str(path).encode() in lines
        assert b"http://localhost:8888/proxy/" in lines
        self.connect(path).close()
        process.terminate()
        assert process.wait(WAIT) == 0
        process.stdout.close()
        assert not path.exists()
        status, _, errors = run_program("--bind", "unix:/nowhere/at/all")
        assert (status, "cannot listen on unix:/nowhere/at/all" in errors) == (2, True)

    def test_socket_activation(self):
        """As systemd does it: the socket is number 3, and LISTEN_PID says for whom."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(5)

            def hand_over():
                os.dup2(listener.fileno(), 3)
                os.set_inheritable(3, True)

            command = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"'
            process = subprocess.Popen(
                ["sh", "-c", command, sys.executable, PROGRAM, "--port", "1"], stdout=subprocess.PIPE, preexec_fn=hand_over, close_fds=False
            )
            assert b":%d/proxy/" % listener.getsockname()[1] in process.stdout.readline()
            with Wire.to(listener.getsockname()[1]) as wire:
                wire.send(request("GET", "/proxy/").replace(b"here", b"localhost"))
                assert status_of(wire.message()) == 200
            process.terminate()
            assert process.wait(WAIT) == 0
            process.stdout.close()


class TestLog:
    def test_one_line_per_request_without_the_query(self, proxy, upstream, caplog):
        app = upstream(answering(OK))
        with caplog.at_level(logging.INFO, "port_proxy"):
            proxy.get("/proxy/%d/a?token=secret" % app.port, "Authorization: token secret", "Cookie: secret")
            proxy.get("/nothing?secret")

            def lines():
                return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]

            eventually(lambda: len(lines()) == 2)
        assert re.fullmatch(r"127\.0\.0\.1 GET /proxy/{0}/a\?\.\.\. -> localhost:{0} 200, 2 bytes, [0-9.]+ s".format(app.port), lines()[0])
        assert not any("secret" in record.getMessage() for record in caplog.records)

    def test_what_went_wrong_is_told(self, start, upstream, caplog):
        """An answer that was cut short does not look like one that was not, and a sign-in is no error."""

        def serve(wire, app):
            target = wire.message()[0].split(" ")[1]
            app.messages.append(target)
            wire.send(b"" if target == "/mute" else b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
            assert target == "/cut" or app.let_go.wait(WAIT)

        app, proxy = upstream(serve), start(token=TOKEN, shutdown_timeout=0.1)

        def ask(wire, path):
            wire.send(request("GET", "/proxy/%d%s" % (app.port, path), "Authorization: token " + TOKEN))
            return wire

        def told():
            return [(record.request["status"], record.request.get("error")) for record in caplog.records if hasattr(record, "request")]

        with caplog.at_level(logging.INFO, "port_proxy"), proxy.wire() as held, proxy.wire() as mute:
            assert status_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES)) == 302
            with proxy.wire() as wire:
                assert ask(wire, "/cut").rest().endswith(b"abc")
            with proxy.wire() as wire:  # a client that has enough, as of a stream of events, is no trouble
                ask(wire, "/held").until(b"abc")
            eventually(lambda: len(told()) == 3)
            ask(held, "/held").until(b"abc")
            ask(mute, "/mute")
            eventually(lambda: "/mute" in app.messages)
            proxy.close()
            app.let_go.set()
        broken = "The app on port %d of this machine closed the connection in the middle of its answer." % app.port
        assert told()[:3] == [(302, None), (200, broken), (200, None)]
        assert set(told()[3:]) == {(200, "The proxy was told to stop."), ("gone", "The proxy was told to stop.")}

    def test_an_app_that_falls_silent_in_its_answer(self, start, upstream, caplog):
        app = upstream(lambda wire, app: (wire.message(), wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"), wire.rest()))
        proxy = start(keep_alive_timeout=2)
        with caplog.at_level(logging.INFO, "port_proxy"), proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.end()  # it may as well be gone
            assert wire.rest().endswith(b"abc")
            eventually(lambda: caplog.records)
        assert caplog.records[0].request["error"] == "The app on port %d of this machine fell silent in the middle of its answer." % app.port

    def test_an_app_that_falls_silent_before_its_answer(self, start, upstream):
        """What it said in between is no answer."""
        app = upstream(lambda wire, app: (wire.message(), wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n"), wire.rest()))
        with start(response_timeout=0.2).wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert status_of(wire.message(no_body=True)) == 103
            answer = wire.message()
        assert (status_of(answer), b"No answer came from port %d of this machine within 0.2 seconds." % app.port in answer[2]) == (504, True)

    def test_one_line_for_a_tunnel_when_it_ends(self, proxy, upstream, caplog):
        app = upstream(lambda wire, app: (wire.message(), wire.send(SWITCHING + b"abc"), wire.rest()))
        with caplog.at_level(logging.INFO, "port_proxy"), proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/ws" % app.port, *HANDSHAKE))
            wire.until(b"abc")
            assert caplog.records == []
            wire.send(b"12345")
            wire.end()
            wire.rest()
            eventually(lambda: caplog.records)
        line = caplog.records[0].getMessage()
        assert re.fullmatch(r"127\.0\.0\.1 GET /proxy/{0}/ws -> localhost:{0} 101, 3 bytes and back 5, [0-9.]+ s".format(app.port), line)
        assert caplog.records[0].request["bytes_received"] == 5


class TestClose:
    def test_what_runs_may_finish_and_what_idles_is_closed(self, start, upstream):
        def serve(wire, app):
            while wire.buffer or wire.more():
                app.messages.append(wire.message())
                if "slow" in app.messages[-1][0]:
                    app.happened.wait(WAIT)
                wire.send(OK)

        app = upstream(serve)
        tunnel_app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING), wire.rest(), app.happened.set()))
        proxy = start()
        with proxy.wire() as idle, proxy.wire() as busy, proxy.wire() as tunnel, proxy.wire() as partial:
            idle.send(request("GET", "/proxy/%d/fast" % app.port))
            assert idle.message()[2] == b"ok"
            partial.send(b"GET / HT")
            tunnel.send(request("GET", "/proxy/%d/" % tunnel_app.port, *HANDSHAKE))
            assert status_of(tunnel.message(no_body=True)) == 101
            busy.send(request("GET", "/proxy/%d/slow" % app.port))
            eventually(lambda: len(app.messages) == 2)
            closing = threading.Thread(target=proxy.close)
            closing.start()
            assert idle.rest() == b""
            assert tunnel.rest() == b""
            assert partial.rest() == b""
            assert tunnel_app.happened.wait(WAIT)
            with pytest.raises(OSError):
                proxy.wire()
            app.happened.set()
            message = busy.message()
            assert (message[2], fields_of(message)["connection"]) == (b"ok", "close")
            closing.join(WAIT)
            assert not closing.is_alive()

    def test_what_finishes_then_does_not_idle(self, start, upstream, monkeypatch):
        """Though its head, which has gone out, said nothing of an end."""
        app = upstream(lambda wire, app: (wire.message(), wire.send(OK[:-1]), app.let_go.wait(WAIT), wire.send(OK[-1:]), wire.rest()))
        proxy, idled = start(), []
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"\r\n\r\n")
            monkeypatch.setattr(proxy.proxy, "_let_idle", lambda *_: idled.append(1))
            closing = asyncio.run_coroutine_threadsafe(proxy.proxy.close(), proxy.background.loop)
            eventually(lambda: proxy.proxy._around is None)
            app.let_go.set()
            assert wire.rest() == OK[-2:]
            closing.result(WAIT)
        assert not idled

    def test_what_does_not_finish_in_time_is_cut(self, start, upstream):
        app = upstream(lambda wire, app: (wire.message(), wire.send(b"HTTP/1.1 200 OK\r\n\r\nabc"), wire.rest()))
        proxy = start(shutdown_timeout=0.1)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"abc")
            proxy.close()
            with contextlib.suppress(ConnectionResetError):
                assert not wire.rest().endswith(b"0\r\n\r\n")

    def test_close_twice_and_without_start(self, background):
        proxy = PortProxy(Config(port=0))
        background.do(proxy.close())
        background.do(proxy.start())
        background.do(proxy.close())
        background.do(proxy.close())
        assert proxy.port == 0

    def test_close_by_two_at_once(self, background):
        proxy = PortProxy(Config(port=0))

        async def both():
            await proxy.start()
            await asyncio.gather(proxy.close(), proxy.close())

        background.do(both())

    def test_a_port_in_use(self, background, proxy):
        with pytest.raises(OSError):
            background.do(PortProxy(Config(port=proxy.port)).start())


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing: whatever either side sends, cut wherever it may be
# ---------------------------------------------------------------------------------------------------------------------


def connected(stream, transport):
    """The stream, standing on the transport."""
    transport.set_protocol(stream)
    stream.connection_made(transport)
    return stream


class Loopless(asyncio.Transport):
    """A transport without a socket: what is written goes to `sent`, and to `on_write`."""

    def __init__(self, loop, number, on_write=lambda: None):
        super().__init__({"peername": ("127.0.0.1", number), "sockname": ("127.0.0.1", 2)})
        self.loop, self.on_write = loop, on_write
        self.sent = bytearray()
        self.ended = self.closing = self.aborted = False
        self.reading = True
        self.queued = 0

    def write(self, data):
        assert not self.ended
        assert not self.closing
        self.sent += data
        self.on_write()

    def write_eof(self):
        self.ended = True

    def can_write_eof(self):
        return True

    def get_write_buffer_size(self):
        return self.queued

    def is_closing(self):
        return self.closing

    def close(self):
        if not self.closing:
            self.closing = True
            self.loop.call_soon(self.protocol.connection_lost, None)

    def abort(self):
        self.aborted = True
        self.close()

    def set_protocol(self, protocol):
        self.protocol = protocol

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def is_reading(self):
        return self.reading

    def feed(self, data):
        if not self.closing:
            if data:
                self.protocol.data_received(data)
            elif not self.protocol.eof_received():
                self.close()


def reference_requests(raw):
    """The requests in a byte stream, up to the first that is not valid: [(method, target, body)]; written for plainness."""
    found = []
    while True:
        for _ in range(2):
            if raw.startswith(b"\r\n"):
                raw = raw[2:]
        head, end, raw = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        start = re.match(rb"^([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-\"$-~]+) HTTP/1\.([01])\Z", lines[0])
        fields = [re.match(rb"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*\Z", line) for line in lines[1:]]
        if not end or not start or not all(fields):
            return found
        named = {}
        for field in fields:
            named.setdefault(field.group(1).lower(), []).append(field.group(2))
        lengths = {one.strip() for value in named.get(b"content-length", []) for one in value.split(b",")}
        codings = named.get(b"transfer-encoding")
        if codings:
            if lengths or start.group(3) == b"0" or [coding.lower() for coding in codings] != [b"chunked"]:
                return found
            body = b""
            while True:
                chunk = re.match(rb"^([0-9A-Fa-f]{1,16})((?:[ \t]*;[^\r\n]*)?)\r\n", raw)
                if not chunk:
                    return found
                raw, size = raw[chunk.end() :], int(chunk.group(1), 16)
                if not size:
                    break
                if raw[size : size + 2] != b"\r\n":
                    return found
                body, raw = body + raw[:size], raw[size + 2 :]
            trailers = re.match(rb"^(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n", raw)
            if not trailers:
                return found
            raw = raw[trailers.end() :]
        elif lengths:
            if len(lengths) > 1 or not re.match(rb"^[0-9]{1,18}\Z", min(lengths)) or len(raw) < int(min(lengths)):
                return found
            body, raw = raw[: int(min(lengths))], raw[int(min(lengths)) :]
        else:
            body = b""
        found.append((start.group(1), start.group(2), body))


class Fuzzing:
    """One proxy in one loop, all of whose connections are `Loopless`."""

    MUTATIONS = [b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"0", b"1", b"5", b"a", b";", b"\x00", b"\xff", b"chunked", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b",", b"-", b"+"]

    NASTY_FIELDS = [
        b"Content-Length: 3", b"Content-Length: 0", b"Content-Length: 3, 4", b"Content-Length: +3", b"Content-Length: 03", b"content-length:3", b"Content-Length : 3",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding : chunked", b"transfer-encoding:\tCHUNKED",
        b"Transfer-Encoding:\x0bchunked", b" Transfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked", b"X: y\rContent-Length: 3", b"Host: b", b"X: \x00",
    ]  # fmt: skip

    def __init__(self, seed):
        self.chance = random.Random(seed)
        self.internal = []
        self.upstreams = []
        self.counts = {"cases": 0, "requests upstream": 0, "answers": 0, "refusals": 0}

    def mutated(self, raw, probability):
        raw = bytearray(raw)
        while self.chance.random() < probability and raw:
            at = self.chance.randrange(len(raw) + 1)
            cut = self.chance.choice([0, 0, 1, 2, 7])
            raw[at : at + cut] = self.chance.choice(self.MUTATIONS + [b""])
        return bytes(raw)

    def pieces(self, raw):
        how = self.chance.random()
        if how < 0.3 or not raw:
            return [raw] if raw else []
        if how < 0.4:
            return [raw[at : at + 1] for at in range(len(raw))]
        cuts = sorted(self.chance.randrange(len(raw)) for _ in range(self.chance.randrange(1, 6)))
        return [raw[a:b] for a, b in zip([0] + cuts, cuts + [len(raw)]) if a != b]

    def requests(self, tag):
        """What a client sends: some requests, each with bytes in it that would be one if its body were misread."""
        raw = b""
        for number in range(self.chance.randrange(1, 4)):
            smuggled = b"GET /proxy/1/%s-smuggled HTTP/1.1\r\nHost: a\r\n\r\n" % tag
            body = self.chance.choice([b"", b"abc", smuggled, b"0\r\n\r\n" + smuggled])
            method = self.chance.choice([b"GET", b"POST", b"POST", b"PUT", b"HEAD", b"DELETE"])
            target = b"/proxy/1/%s-%d" % (tag, number) if self.chance.random() < 0.95 else b"/nothing"
            lines = [b"%s %s HTTP/1.%d" % (method, target, self.chance.random() < 0.93), b"Host: a"]
            framing = self.chance.random()
            if framing < 0.4:
                lines.append(b"Content-Length: %d" % len(body))
            elif framing < 0.7:
                lines.append(b"Transfer-Encoding: chunked")
                cut = self.chance.randrange(len(body) + 1)
                body = b"".join(b"%x%s\r\n%s\r\n" % (len(one), self.chance.choice([b"", b";x=y"]), one) for one in (body[:cut], body[cut:]) if one)
                body += b"0\r\n" + self.chance.choice([b"", b"X: y\r\n"]) + b"\r\n"
            else:
                body = b""
            if self.chance.random() < 0.1:
                lines += [b"Connection: Upgrade", b"Upgrade: websocket"]
            elif self.chance.random() < 0.1:
                lines.append(self.chance.choice([b"Connection: close", b"Expect: 100-continue", b"Connection: content-length, transfer-encoding"]))
            if self.chance.random() < 0.15:
                lines.insert(self.chance.randrange(1, len(lines) + 1), self.chance.choice(self.NASTY_FIELDS))
            raw += self.mutated(b"\r\n".join(lines) + b"\r\n\r\n" + body, self.chance.choice([0, 0, 0.4]))
        return raw

    def response(self, tag):
        body = b"<%s>" % tag
        evil = self.chance.choice([b"", b"", b"", b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n<evil-%s>" % (len(tag) + 7, tag)])
        status = self.chance.choice([b"200 OK", b"200 OK", b"404 No", b"204 None", b"304 Same", b"101 Switching"])
        head = b"HTTP/1.%d %s\r\n" % (self.chance.random() < 0.9, status)
        if self.chance.random() < 0.1:
            head = b"HTTP/1.1 100 Continue\r\n\r\n" + head
        if self.chance.random() < 0.1:
            head += b"Connection: close\r\n"
        if self.chance.random() < 0.1:
            head += self.chance.choice(self.NASTY_FIELDS) + b"\r\n"
        if status.startswith(b"101"):
            head += b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        framing = self.chance.random()
        if framing < 0.45:
            raw = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        elif framing < 0.9:
            raw = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            raw = head + b"\r\n" + body
        return self.mutated(raw, self.chance.choice([0, 0, 0.4])) + evil

    async def connect(self, route):
        """Stands for `Upstreams.connect`: an upstream that answers each head it sees, rightly or wrongly."""
        answered = []

        def on_write():
            heads = [m.group(1) for m in re.finditer(rb"(?:^|\r\n\r\n|\n)[!-~]+ /([!-~]*) HTTP/1\.1\r\nHost: localhost:1\r\n", bytes(transport.sent))]
            for tag in heads[len(answered) :]:
                answered.append(tag)
                for piece in self.pieces(self.response(tag)):
                    self.loop.call_soon(transport.feed, piece)
                if self.chance.random() < 0.3:
                    self.loop.call_soon(self.chance.choice([lambda: transport.feed(b""), transport.close]))

        for idle in self.around.upstreams._idle.values():  # let each client meet the connections of the other
            self.chance.shuffle(idle)
        transport = Loopless(self.loop, 1, on_write)
        stream = connected(port_proxy.Stream(self.around.watch), transport)
        self.upstreams.append(transport)
        return stream

    async def case(self):
        """Two clients at once, whose upstream connections are shared; everything that came of it is checked."""
        clients = []
        self.upstreams.clear()
        for name in (b"anna", b"bert"):
            raw = self.requests(b"%s-%d" % (name, self.counts["cases"]))
            transport = Loopless(self.loop, 50000)
            connected(port_proxy.Stream(self.around.watch, functools.partial(self.proxy._accepted, self.around)), transport)
            clients.append((name, raw, transport, self.pieces(raw)))
        todo = [(transport, piece) for _, _, transport, pieces in clients for piece in pieces]
        if self.chance.random() < 0.5:  # one piece of each in turn
            todo = [(c[2], c[3][at]) for at in range(max(len(c[3]) for c in clients)) for c in clients if at < len(c[3])]
        for transport, piece in todo:
            transport.feed(piece)
            for _ in range(self.chance.choice([0, 0, 1, 2, 25])):
                await asyncio.sleep(0)
        for _ in range(self.chance.choice([0, 20])):
            await asyncio.sleep(0)
        for _, _, transport, _ in clients:
            transport.feed(b"")
        for _ in range(300):
            if not self.is_busy():
                break
            await asyncio.sleep(0)
            for transport in self.upstreams:  # an upstream whose client is content to wait leaves at last
                if _ > 60 and not transport.closing:
                    transport.close()
        self.check(clients)
        self.around.upstreams.close()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not self.around.watch.streams
        assert not self.around.upstreams._idle_count

    def is_busy(self):
        return self.proxy._tasks or self.proxy._tunnels or any(self.proxy._clients.values())

    def check(self, clients):
        self.counts["cases"] += 1
        assert not self.is_busy(), "a hang"
        assert not self.internal, self.internal
        allowed = {}
        for name, raw, transport, _ in clients:
            other = b"bert" if name == b"anna" else b"anna"
            assert other not in transport.sent
            self.check_answers(bytes(transport.sent), transport.closing)
            for method, target, body in reference_requests(raw):
                allowed.setdefault((method, target[len("/proxy/1") :].partition(b"#")[0] or b"/", body), []).append(name)
        for transport in self.upstreams:
            sent = bytes(transport.sent)
            if b"Upgrade: websocket\r\n" in sent:
                continue  # raw bytes may follow
            for request in reference_requests(sent):
                self.counts["requests upstream"] += 1
                assert any(request[0] == one[0] and request[2] == one[2] and one[1].endswith(request[1]) for one in allowed), (request, allowed)

    def check_answers(self, sent, closed):
        """Well-formed answers one after the other; only the last may be cut off, and only by the connection's end."""
        while sent:
            head = re.match(rb"HTTP/1\.1 ([1-9][0-9][0-9]) [\t -~\x80-\xff]*\r\n((?:[!-9;-~]+: ?[\t -~\x80-\xff]*\r\n)*)\r\n", sent)
            if not head:
                assert closed, sent
                return
            status, fields, sent = int(head.group(1)), head.group(2).lower(), sent[head.end() :]
            self.counts["refusals" if status >= 400 else "answers"] += 1
            if status == 101:
                return
            length = re.search(rb"(?:^|\n)content-length: ([0-9]+)\r\n", fields)
            if status < 200 or status in (204, 304) or sent.startswith(b"HTTP/1.1 ") or not sent:  # HEAD among them
                continue
            if re.search(rb"(?:^|\n)transfer-encoding: chunked\r\n", fields):
                size = 1
                while size:
                    line = re.match(rb"([0-9a-f]+)\r\n", sent)
                    size = int(line.group(1), 16) if line else 0
                    behind = line.end() + size if line else 0
                    if not line or len(sent) < behind + 2:
                        assert closed, sent
                        return
                    assert sent[behind : behind + 2] == b"\r\n"
                    sent = sent[behind + 2 :]
            elif length:
                assert len(sent) >= int(length.group(1)) or closed
                sent = sent[int(length.group(1)) :]
            else:
                assert closed
                return

    async def run(self, count):
        self.loop = asyncio.get_event_loop()
        self.loop.set_exception_handler(lambda loop, context: self.internal.append(context))
        self.proxy = PortProxy(Config(port=0, allow_hostnames=("*",)))
        await self.proxy.start()
        self.around = self.proxy._around
        self.around.upstreams.connect = self.connect
        watcher = logging.Handler(logging.ERROR)
        watcher.emit = lambda record: self.internal.append(record.getMessage())
        port_proxy.logger.addHandler(watcher)
        try:
            for _ in range(count):
                before = self.chance.getstate()
                try:
                    await self.case()
                except BaseException:
                    self.chance.setstate(before)
                    raise
        finally:
            port_proxy.logger.removeHandler(watcher)
            await self.proxy.close()
        return self.counts


def test_fuzz():
    """PORT_PROXY_FUZZ and PORT_PROXY_FUZZ_SEED ask for more cases, and for others."""
    fuzzing = Fuzzing(int(os.environ.get("PORT_PROXY_FUZZ_SEED", "20261123")))
    loop = asyncio.new_event_loop()
    try:
        counts = loop.run_until_complete(fuzzing.run(int(os.environ.get("PORT_PROXY_FUZZ", "3000"))))
    finally:
        loop.close()
    sys.stdout.write("%s\n" % counts)
    assert counts["requests upstream"] > counts["cases"] / 2
    assert counts["answers"] > counts["cases"] / 2
    assert counts["refusals"] > counts["cases"] / 10


# ---------------------------------------------------------------------------------------------------------------------
# Jupyter
# ---------------------------------------------------------------------------------------------------------------------


class TornadoStream:
    """A Tornado stream as far as the bridge uses it, which sends and receives when the test says so."""

    error = None

    def __init__(self, loop):
        self.loop = loop
        self.socket, self.other = socket.socketpair()
        self.writes, self.reads, self.is_closed, self.on_close = [], [], False, None

    def set_close_callback(self, callback):
        self.on_close = callback

    def write(self, data):
        self.writes.append(self.loop.create_future())
        return self.writes[-1]

    def read_bytes(self, limit, partial):
        assert partial
        self.reads.append((limit, self.loop.create_future()))
        return self.reads[-1][1]

    def close(self):
        self.is_closed = True
        self.socket.close()
        self.other.close()


class Handler:
    """A Jupyter server's handler of a request that it has let in, as far as the gate asks it."""

    token_authenticated = False
    token = "servers-own"
    cookie_name = "username-here"
    allow_origin, allow_origin_pat = "", None

    def __init__(self, hub_knows=None, **settings):
        self.settings = settings
        if hub_knows is not None:
            self.hub_auth = self
            self.hub_knows = hub_knows

    def check_origin(self):
        return bool(self.allow_origin or self.allow_origin_pat)

    def get_session_id(self, handler):
        return "a"

    async def user_for_token(self, token, session_id, sync):
        if self.hub_knows == "broken":
            raise OSError("no answer")
        return {"name": "ana"} if token in self.hub_knows else None


class TestJupyterGate:
    @pytest.mark.parametrize(
        "allow_origin, pattern, method, lines, settings, admitted",
        [
            ("", None, "POST", (), {}, False), ("*", None, "POST", (), {}, False), ("", ".*", "POST", (), {}, False), ("", re.compile("https?://.*"), "POST", (), {}, False),
            ("*", None, "GET", (), {}, True), ("*", None, "POST", (("Sec-Fetch-Site", "same-origin"),), {}, True), ("*", None, "POST", (("Sec-Fetch-Site", "cross-site"),), {}, False),
            ("*", None, "POST", (), {"disable_check_xsrf": True}, True), ("https://a.example", None, "POST", (), {}, True), ("", r"https://.*\.example", "POST", (), {}, True),
        ],
    )  # fmt: skip
    def test_origins_that_jupyter_allows(self, background, allow_origin, pattern, method, lines, settings, admitted):
        handler = Handler(**settings)
        handler.allow_origin, handler.allow_origin_pat = allow_origin, pattern
        head = RequestHead(method, "/", "here:8888", "1.1", (("Origin", "https://a.example"),) + lines)
        gate = port_proxy.JupyterGate(DEFAULT, handler)
        if admitted:
            background.do(gate.admit(head, VISIT, None))
        else:
            assert status_of_error(background.do, gate.admit(head, VISIT, None)) == 403

    @pytest.mark.parametrize(
        "origin, allow_origin, says",
        [
            ("https://xn--e1afmkfd.example", "", ", https://xn--e1afmkfd.example, may not do this here, which is here:8888. Set c.ServerApp.allow_origin https://xn--e1afmkfd.example if it should be."),
            ("null", "", "which is here:8888. A program may send it with a token of Jupyter's."), ("null", "*", "which is here:8888. A program may send it with a token of Jupyter's."),
        ],
    )  # fmt: skip
    def test_its_advice_is_jupyters(self, background, origin, allow_origin, says):
        handler = Handler()
        handler.allow_origin, handler.allow_origin_pat = allow_origin, None
        gate = port_proxy.JupyterGate(DEFAULT, handler)
        with pytest.raises(ProxyError) as caught:
            background.do(gate.admit(RequestHead("POST", "/", "here:8888", "1.1", (("Origin", origin),)), VISIT, None))
        assert gate.explain(caught.value).detail.endswith(says)
        other = ProxyError(403, "It is not on the allowlist. Start the proxy with --host-allowlist xn--a.b if it may be reached.")
        assert gate.explain(other).detail == "It is not on the allowlist. Set c.PortProxy.host_allowlist xn--a.b if it may be reached."

    @pytest.mark.parametrize(
        "field, line, value",
        [
            ("any_owner", "True", True), ("preserve_host", "false", False), ("whole_origin", "no", "no"), ("any_owner", "yes", "yes"), ("head_timeout", "3", 3.0), ("max_fields", "7", 7),
            ("head_timeout", "x", "x"), ("max_fields", "7.5", "7.5"), ("host_allowlist", "a, b", ("a", "b")), ("base", "/x", "/x"), ("frob", "1", "1"), ("host_allowlist", ["a", "b"], ["a", "b"]),
        ],
    )  # fmt: skip
    def test_what_the_command_line_of_jupyter_says(self, field, line, value):
        """There all is text until a configurable class has said what it is to be (traitlets' DeferredConfigString)."""
        deferred = type("Deferred", (type(line),), {"get_value": None})(line)
        found = port_proxy._from_jupyter(field, deferred)
        assert (found, type(found)) == (value, type(value))
        assert port_proxy._from_jupyter(field, value) is value

    def test_what_the_configuration_of_jupyter_appends(self):
        lazy = type("Lazy", (), {"get_value": lambda self, initial: initial + ["a"]})()
        assert port_proxy._from_jupyter("host_allowlist", lazy) == ["a"]
        assert port_proxy._from_jupyter("domains", lazy) == ["localhost", "a"]
        for name in ("any_owner", "head_timeout", "token", "base"):  # looked at, and no more
            assert port_proxy._from_jupyter(name, lazy) == getattr(DEFAULT, name)

    def test_tokens_of_a_hub_around_it(self, background):
        """All are cut, also where the request came in by another, or by cookie; what the Hub does not know is the app's."""
        gate = port_proxy.JupyterGate(DEFAULT, Handler(hub_knows=["one", "two", "three"]))
        fields = (("Authorization", "token one"), ("Referer", "http://here:8888/lab?token=three&a"))
        head = RequestHead("GET", "/?token=two&token=apps-own", "here:8888", "1.1", fields)
        background.do(gate.admit(head, VISIT, None))
        cut = gate.for_upstream(head, None)
        assert (cut.target, cut.fields) == ("/?token=apps-own", (("Referer", "http://here:8888/lab?a"),))
        many = head._replace(target="/?" + "&".join("token=%d" % number for number in range(20)))
        assert status_of_error(background.do, gate.admit(many, VISIT, None)) == 400
        gate = port_proxy.JupyterGate(DEFAULT, Handler(hub_knows="broken"))
        assert status_of_error(background.do, gate.admit(head, VISIT, None)) == 503


class TestTornadoTransport:
    """The bridge alone; with a real Jupyter server it is tested further below."""

    @pytest.fixture
    def bridge(self, background):
        """A transport that is made in the loop, and a way to call it there and see what followed."""

        async def make():
            watch = port_proxy.Watch(background.loop, 10.0)
            return watch, port_proxy.TornadoTransport(TornadoStream(background.loop), watch)

        watch, transport = background.do(make())

        async def call(function):
            result = function()
            await asyncio.sleep(0)  # what it has scheduled comes first
            await asyncio.sleep(0)
            return result

        yield transport, lambda function: background.do(call(function))
        transport.tornado.close()
        background.do(watch.close(0.1))

    def test_reads_only_what_is_asked_for(self, bridge):
        transport, call = bridge
        assert transport.tornado.reads == []
        call(lambda: transport.pull(10))
        call(lambda: transport.pull(10))  # still under way
        assert [limit for limit, _ in transport.tornado.reads] == [10]
        call(lambda: transport.tornado.reads[0][1].set_result(b"abc"))
        assert transport.stream.buffer == b"abc"
        assert len(transport.tornado.reads) == 1

    def test_what_was_handed_back_is_not_touched(self, bridge):
        """Though part of the answer is still on its way."""
        transport, call = bridge
        call(lambda: transport.write(b"answer"))
        assert transport.get_write_buffer_size() == 6
        assert call(transport.release) is transport.tornado
        assert transport.tornado.on_close is None
        call(lambda: transport.tornado.writes[0].set_result(None))
        assert not transport.tornado.is_closed
        assert transport.stream not in transport.stream.watch.streams

    def test_what_cannot_be_handed_back_is_closed_behind_its_answer(self, bridge):
        transport, call = bridge
        call(lambda: transport.write(b"answer"))
        transport.stream.buffer += b"GET / HTTP/1.1"
        assert call(transport.release) is None
        assert not transport.tornado.is_closed
        call(lambda: transport.tornado.writes[0].set_result(None))
        assert transport.tornado.is_closed

    def test_back_pressure(self, bridge):
        transport, call = bridge
        call(lambda: [transport.write(bytes(40000)) for _ in range(2)])
        flush = asyncio.run_coroutine_threadsafe(transport.stream.flush(WAIT), transport.stream.watch.loop)
        call(lambda: transport.tornado.writes[0].set_result(None))
        call(lambda: None)
        assert not flush.done()
        call(lambda: transport.tornado.writes[1].set_result(None))
        assert flush.result(WAIT) is None

    @pytest.mark.parametrize("is_tunnel", [False, True])
    def test_a_client_that_has_left(self, bridge, is_tunnel):
        """It is noticed while nothing is read of it; that of a tunnel is met where it stands, behind all that came."""
        if sys.platform != "linux":
            pytest.skip("only Linux tells of an end that has not been read up to")
        transport, call = bridge
        if is_tunnel:
            call(lambda: transport.set_protocol(asyncio.Protocol()))
            call(transport.pause_reading)
        call(lambda: transport.stream.expire(0.0))
        assert not transport.tornado.is_closed
        transport.tornado.other.send(b"last words")
        transport.tornado.other.shutdown(socket.SHUT_WR)
        call(lambda: transport.stream.expire(0.0))
        assert transport.tornado.is_closed is not is_tunnel

    def test_a_tunnel_reads_on_unless_it_is_stopped(self, bridge):
        transport, call = bridge
        received = []

        class End(asyncio.Protocol):
            def data_received(self, data):
                received.append(data)

        call(lambda: transport.set_protocol(End()))
        call(transport.resume_reading)
        call(lambda: transport.tornado.reads[0][1].set_result(b"a"))
        call(transport.pause_reading)
        call(lambda: transport.tornado.reads[1][1].set_result(b"b"))
        assert (received, len(transport.tornado.reads)) == ([b"a", b"b"], 2)
        call(transport.resume_reading)
        assert len(transport.tornado.reads) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Check
# ---------------------------------------------------------------------------------------------------------------------


def serve_examined(page, fussy=False, redirect=b""):
    """An app with one page and a WebSocket at /ws; a fussy one refuses names that are not its own."""

    def serve(wire, app):
        message = wire.message()
        app.messages.append(message)
        fields = fields_of(message)
        own = fields["host"] == "localhost:%d" % app.port and fields.get("origin", "http://localhost:%d" % app.port) == "http://localhost:%d" % app.port
        target = message[0].split(" ")[1]
        if fussy and not own:
            wire.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        elif "upgrade" in fields:
            wire.send(SWITCHING if target == "/ws" else b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif redirect and target == "/":
            wire.send(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % redirect.replace(b"PORT", b"%d" % app.port))
        else:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page), page)

    return serve


class TestCheck:
    def check(self, background, examined, **options):
        return background.do(port_proxy.check_port(examined, checked_config(Config(**options))))

    def test_an_app_in_good_health(self, background, upstream):
        app = upstream(serve_examined(b"<title>My app</title><a href=there><img src='//elsewhere/a'><a href=https://a/b>"))
        report = self.check(background, app.port)
        assert (report.ok, report.speaks, report.status, report.title, report.redirect, report.problems) == (True, "http", 200, "My app", "", ())
        assert (report.rooted, report.refuses_host, report.refuses_origin, report.socket, report.app, report.flag) == ([], False, False, "/ws", "", "")
        assert report.use == ["http://%d.localhost:8888/" % app.port, "http://localhost:8888/proxy/%d/" % app.port]
        if os.path.exists("/proc/net/tcp"):
            assert report.addresses == ("127.0.0.1",)
            assert report.program

    @pytest.mark.parametrize("page", [
        b"<script src='//[x'></script><title>ok</title>", b"<title>&#" + b"9" * 5000 + b";</title>", b"<script" * 40000, b"<a href=/" + b"a" * 300000, b"bokeh" * 60000,
        b"<title>\x1b]0;x\x07</title><a href='/\x1b[31m'>", "<title>\u017c\U0001f600</title>".encode(),
    ], ids="script number scripts link name escapes letters".split())  # fmt: skip
    def test_pages_that_mean_harm(self, upstream, monkeypatch, page):
        """They neither break it nor hold it up, nor do they write to the terminal."""
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page) + page
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(answer)))
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        status, output, errors = run_program("--check", str(app.port))
        assert (status, errors) == (0, "")
        assert output.replace("\n", "").isprintable()

    @pytest.mark.parametrize("redirect", [b"/lab?x=secret", b"http://localhost:PORT/lab"])
    def test_what_it_finds(self, background, upstream, redirect):
        page = b"<script id=_dash-config></script><script src=\"/_dash/a.js?v=1\"></script><link href='/b.css'><form action=/c><a href=/b.css>"
        app = upstream(serve_examined(page, fussy=True, redirect=redirect))
        report = self.check(background, app.port)
        assert (report.redirect, report.rooted, report.refuses_host, report.refuses_origin) == ("/lab", ["/_dash/a.js", "/b.css", "/c"], True, True)
        assert (report.app, report.flag) == ("Dash", 'url_base_pathname="/proxy/absolute/%d/"' % app.port)
        text = port_proxy.report_text(report)
        for part in ("redirects  /lab", "/_dash/a.js, /b.css, /c", "refuses names that are not its own", "opens at /ws; refuses pages", 'url_base_pathname="/proxy/absolute/%d/"' % app.port):
            assert part in text

    @pytest.mark.parametrize(
        "text, past",
        [
            ("new WebSocket('ws://localhost:PORT/ws')", True), ("?protocol=ws%3A&hostname=0.0.0.0&port=PORT&pathname=%2Fws", True), ("http://127.0.0.1:PORT", True), ("ws://[::1]:PORT/", True),
            ("http://localhost:PORT0/", False), ("http://localhost:1/ PORT", False), ("location.host", False), ("http://elsewhere:PORT/", False),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("place", ["/", "/a/main.js"])
    def test_what_goes_past_the_proxy(self, background, upstream, text, past, place):
        """A page or script that names the app's own address: only a browser on this machine can follow."""

        def serve(wire, app):
            target = wire.message()[0].split(" ")[1]
            body = {"/": "<script src=//cdn.example/b.js></script><script defer src='a/main.js?v=1'></script>"}.get(target.partition("?")[0], "")
            body += text.replace("PORT", str(app.port)) if target.partition("?")[0] == place else ""
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body.encode()))

        app = upstream(serve)
        report = self.check(background, app.port)
        assert [problem.startswith("%s names port %d itself" % (place, app.port)) for problem in report.problems] == [True] * past
        assert report.ok

    def test_links_that_nothing_leads_back(self, background, upstream):
        app = upstream(serve_examined(b"<img src=/a>"))
        report = self.check(background, app.port, whole_origin=False)
        assert (report.ok, "--whole-origin yes" in report.problems[0]) == (True, True)
        assert self.check(background, app.port).problems == ()

    def test_a_page_that_fails_behind_its_redirect(self, background, upstream):
        def serve(wire, app):
            if wire.message()[0] == "GET / HTTP/1.1":
                wire.send(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")

        app = upstream(serve)
        report = self.check(background, app.port)
        assert (report.ok, report.redirect, len(report.problems)) == (True, "/x", 1)

    @pytest.mark.parametrize("location, redirect, says", [
        ("/x?secret", "/x", "5 times in a row"), ("http://localhost:PORT/", "/", "5 times in a row"), ("http://127.0.0.1:PORT#a", "/", "5 times in a row"),
        ("https://localhost:PORT/a?secret", "https://localhost:PORT/a", "It redirects to https at its own address"), ("https://LOCALHOST:PORT", "https://LOCALHOST:PORT", "It redirects to https at its own address"),
        ("http://localhost:1/x?secret", "http://localhost:1/x", None), ("//elsewhere.example/x", "//elsewhere.example/x", None), ("https://localhost:PORT0/", "https://localhost:PORT0/", None),
        ("https://user:secret@sso.example/a#secret", "https://sso.example/a", None), ("//user:secret@sso.example?secret", "//sso.example", None),
    ])  # fmt: skip
    def test_redirects_that_lead_nowhere(self, background, upstream, location, redirect, says):
        app = upstream(lambda wire, app: (wire.message(), wire.send(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % location.replace("PORT", str(app.port)).encode())))
        report = self.check(background, app.port)
        assert (report.ok, report.redirect, len(report.problems)) == (True, redirect.replace("PORT", str(app.port)), 1 if says else 0)
        assert not says or says in report.problems[0]

    def test_the_page_behind_as_many_redirects_as_are_followed(self, background, upstream):
        def serve(wire, app):
            target = wire.message()[0].split(" ")[1]
            there = {"/": "/1", "/1": "/2", "/2": "/3", "/3": "/4", "/4": "/5"}.get(target, "")
            wire.send(b"HTTP/1.1 %s\r\nContent-Type: text/html\r\nContent-Length: 16\r\n\r\n<title>A</title>" % (("302 Found\r\nLocation: " + there) if there else "200 OK").encode())

        report = self.check(background, upstream(serve).port)
        assert (report.redirect, report.title, report.problems) == ("/5", "A", ())

    def test_an_app_that_says_nothing(self, background, upstream, monkeypatch):
        monkeypatch.setattr(port_proxy, "_PAGE_SECONDS", 0.2)
        app = upstream(lambda wire, app: wire.rest())
        report = self.check(background, app.port)
        assert (report.ok, report.problems) == (False, ("No answer came from port %d of this machine within 0.2 seconds." % app.port,))

    def test_what_is_asked(self, background, upstream):
        """Nothing twice: neither Host nor Connection, which an app could refuse."""
        app = upstream(serve_examined(b""))
        self.check(background, app.port)
        for message in app.messages:
            names = [name.lower() for name, _ in message[1]]
            assert len(names) == len(set(names))
        assert {fields_of(message)["connection"] for message in app.messages} == {"close", "Upgrade"}

    @pytest.mark.parametrize("location", [b"https://elsewhere.example/", b"//elsewhere.example/", b"/"])
    def test_a_redirect_that_leads_nowhere(self, background, upstream, location):
        app = upstream(serve_examined(b"", redirect=location))
        report = self.check(background, app.port)
        assert (report.ok, report.status) == (True, 302)

    def test_what_is_in_the_way(self, background, upstream, certificate):
        speaking = upstream(lambda wire, app: (wire.send(b"SSH-2.0-x\r\n"), wire.more()))
        tls = upstream(lambda wire, app: wire.send(b"\x15\x03\x01\x00\x02\x02\x46" if wire.more() else b""))
        port = free_port()
        for number, speaks, says in ((port, "", "Nothing listens"), (speaking.port, "other", "does not answer HTTP"), (tls.port, "https", "--upstream-tls %d" % tls.port)):
            report = self.check(background, number)
            assert (report.ok, report.speaks, report.use) == (False, speaks, ())
            assert says in report.problems[0]
            assert says in port_proxy.report_text(report)

    def test_what_is_in_the_way_of_tls(self, background, upstream, certificate):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(str(certificate / "both.pem"))

        def serve(wire, app):
            with contextlib.suppress(OSError):
                wire.sock = context.wrap_socket(wire.sock, server_side=True)
                answering(OK)(wire, app)

        secret, plain = upstream(serve), upstream(lambda wire, app: (wire.more(), wire.send(OK)))
        for port, says in ((secret.port, "--insecure-upstream accepts any"), (plain.port, "Does it speak TLS? See --upstream-tls.")):
            report = self.check(background, port, upstream_tls=[str(port)])
            assert (report.ok, report.speaks, report.use) == (False, "", ())
            assert says in report.problems[0]
        report = self.check(background, secret.port, upstream_tls=[str(secret.port)], insecure_upstream=True)
        assert (report.ok, report.speaks, report.status) == (True, "https", 200)

    def test_the_proxys_own_port(self, background, upstream):
        """Told by the address, as a request would find it, and not by the number alone."""

        def serve(wire, app):
            with contextlib.suppress(OSError):  # it is hung up on
                if wire.more():
                    app.happened.set()
                    wire.send(OK)

        app = upstream(serve)
        for bind in ("127.0.0.1", "0.0.0.0", "", "LOCALHOST", "127.1"):
            report = self.check(background, app.port, port=app.port, bind=bind)
            assert (report.ok, report.use, app.happened.is_set()) == (False, (), False)
            assert re.match("Port %d is the proxy's own, .* say with --port" % app.port, report.problems[0])
        for bind in ("unix:/a", "127.0.0.5", "nowhere.invalid", "a..b"):
            assert self.check(background, app.port, port=app.port, bind=bind).ok

    def test_no_address_is_made_up_where_the_proxy_takes_any_port(self, background, upstream):
        app = upstream(serve_examined(b""))
        report = self.check(background, app.port, port=0)
        assert (report.ok, report.use) == (True, ["/proxy/%d/" % app.port])

    @needs_proc
    def test_an_app_on_another_address(self, background, upstream):
        app = upstream(answering(OK), host="127.0.0.2")
        report = self.check(background, app.port)
        assert (report.ok, report.addresses) == (False, ("127.0.0.2",))
        assert "listens at 127.0.0.2 alone" in report.problems[0]

    def test_the_command(self, upstream):
        app = upstream(serve_examined(b"<title>My app</title>"))
        status, output, errors = run_program("--check", str(app.port))
        assert (status, errors, output.split("\n")[0]) == (0, "", "port %d of this machine" % app.port)
        status, output, errors = run_program("--check", str(app.port), "--json", "--base", "/x")
        assert (status, errors) == (0, "")
        assert json.loads(output)["use"][1] == "http://localhost:8888/x/%d/" % app.port
        status, output, errors = run_program("--check", str(free_port()), "--json")
        assert (status, json.loads(output)["ok"], errors) == (1, False, "")
        status, output, errors = run_program("--check", "x")
        assert (status, output, "a port is a number from 1 to 65535" in errors) == (2, "", True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shell_proxy(*options, says=b"", **popen):
    """Start the program as a user would: (process, port). It must end at SIGTERM with status 0, silently."""
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-X", "dev"] if sys.version_info >= (3, 7) else [sys.executable]
    process = subprocess.Popen(command + [PROGRAM, "--port", "0", "--allow-hostname", "here"] + list(options), stdout=subprocess.PIPE, stderr=errors, **popen)
    try:
        banner = process.stdout.readline().decode()
        assert says.decode() in banner
        yield process, int(re.search(r"http://[^/]*:(\d+)/", banner).group(1))
        process.terminate()
        assert process.wait(WAIT) == 0
        errors.seek(0)
        noise = re.sub(r"(?m)^.* Executing <.*> took [0-9.]+ seconds\n", "", errors.read().decode())  # a busy machine
        assert "Traceback" not in noise
        assert "destroyed" not in noise
        assert "--verbose" in options or noise == ""
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        errors.close()


def run_program(*options):
    done = subprocess.run([sys.executable, PROGRAM] + list(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


class TestCommandLine:
    def test_it_runs_and_stops(self, upstream):
        app = upstream(answering(OK))
        for number in (signal.SIGTERM, signal.SIGINT):
            with shell_proxy("--base", "/user/ana") as (process, port):
                with Wire.to(port) as wire:
                    wire.send(request("GET", "/user/ana/%d/" % app.port))
                    assert wire.message()[2] == b"ok"
                    process.send_signal(number)
                    assert wire.rest() == b""

    def test_banner(self):
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--host-allowlist", "a.example.org, *.b", "--host-allowlist", "c"], stdout=subprocess.PIPE)
        lines = process.stdout.readline().decode() + process.stdout.readline().decode()
        process.terminate()
        assert process.wait(WAIT) == 0
        process.stdout.close()
        assert re.fullmatch(
            r"port_proxy [0-9.]+: open (http://127\.0\.0\.1:[0-9]+/proxy/)\n"
            r"It reaches every port of this machine as \1<port>/ or http://<port>\.localhost:[0-9]+/, and on a\.example\.org, \*\.b, c\.\n",
            lines,
        )

    @pytest.mark.parametrize(
        "connection, options, line",
        [
            ("198.51.100.7 40000 192.0.2.7 22", {}, r"On your own machine, first:  ssh -N -L (\d+):localhost:\1 ana@192\.0\.2\.7"), ("", {}, None), ("x", {}, None),
            ("2001:db8::1 40000 2001:db8::7 2222", {"token": ""}, r"On your own machine, first:  ssh -N -L (\d+):localhost:\1 -p 2222 ana@2001:db8::7"),
            ("198.51.100.7 40000 192.0.2.7 22", {"bind": "127.0.0.2"}, r"On your own machine, first:  ssh -N -L (\d+):localhost:\1 ana@192\.0\.2\.7"),
            ("198.51.100.7 40000 192.0.2.7 22", {"bind": "0.0.0.0"}, r"On your own machine, first:  ssh -N -L (\d+):localhost:\1 ana@192\.0\.2\.7"),
        ],
    )  # fmt: skip
    def test_the_way_over_ssh(self, start, monkeypatch, connection, options, line):
        monkeypatch.setenv("SSH_CONNECTION", connection)
        monkeypatch.setenv("LOGNAME", "ana")
        last = port_proxy._banner(start(**options).proxy).split("\n")[-1]
        assert re.fullmatch(line or "It reaches every port .*", last)

    @pytest.mark.parametrize(
        "options, says",
        [
            (("--base", "proxy"), "the base must be a path"), (("--port", "65536"), "a number from 0 to 65535"), (("--port", "x"), "invalid int value"),
            (("--host-allowlist", "a b"), "an allowed host is"), (("--head-timeout", "0"), "head_timeout must be greater than 0"), (("--bind", "192.0.2.1"), "no address of this machine"),
            (("--bind", "nowhere.invalid"), "no address of this machine"), (("--bind", "a..b"), "a..b is no address of this machine"),
            (("--trusted-proxy", "foo"), "a trusted proxy is an address, a network or unix, not 'foo'"), (("--token-file", sys.executable), "the token must consist of visible ASCII"), (("--verbose", "--quiet"), "not allowed with"), (("--frob",), "unrecognized arguments"),
        ],
    )  # fmt: skip
    def test_mistakes(self, options, says):
        status, output, errors = run_program(*options)
        assert (status, output) == (2, "")
        assert says in errors.strip().split("\n")[-1]
        assert "Traceback" not in errors

    def test_port_in_use(self):
        with shell_proxy() as (_, port):
            status, output, errors = run_program("--port", str(port))
            assert (status, output) == (2, "")
            assert re.fullmatch(r"port_proxy: port %d of 127\.0\.0\.1 is in use by another program; .*--port.*\n" % port, errors)

    def test_help_and_version(self):
        status, output, _ = run_program("--help")
        assert status == 0
        for name in ("--base", "--bind", "--port", "--host-allowlist", "--preserve-host", "--verbose", "--quiet", "--version", "--help-all", "ssh -N -L", "--check 8080"):
            assert name in output
        assert "--head-timeout" not in output
        lines = output.rstrip("\n").split("\n")
        assert len(lines) <= 48  # two screens
        assert max(map(len, lines)) <= 100
        status, whole, _ = run_program("--help-all")
        assert (status, "--head-timeout" in whole, whole.startswith(output[:200])) == (0, True, True)
        assert run_program("--version")[:2] == (0, "port_proxy %s\n" % port_proxy.__version__)

    @pytest.mark.parametrize("options, tells", [(("--quiet",), False), (("--quiet", "--token"), True), (("--quiet", "--bind", "0.0.0.0"), True)])
    def test_a_token_is_never_kept_from_its_owner(self, options, tells):
        process = subprocess.Popen([sys.executable, "-u", PROGRAM, "--port", "0"] + list(options), stdout=subprocess.PIPE)
        if tells:
            assert b"?token=" in process.stdout.readline()
        else:
            connected = threading.Event()
            connected.wait(1)  # nothing tells when it is ready: that is what is asked for
        process.terminate()
        output, _ = process.communicate(timeout=WAIT)
        assert tells or output == b""

    @pytest.mark.parametrize("place", ["closed", "a full disk", "a pipe that was left"])
    def test_what_cannot_be_printed_is_told_on_stderr(self, place):
        """The proxy serves all the same, and its owner learns the token."""
        if place == "closed":
            pytest.importorskip("resource")  # and so no Windows
            how = {"preexec_fn": lambda: os.close(1)}
        elif place == "a full disk":
            if not os.path.exists("/dev/full"):
                pytest.skip("this system has no /dev/full")
            how = {"stdout": os.open("/dev/full", os.O_WRONLY)}
        else:
            reader, writer = os.pipe()
            os.close(reader)
            how = {"stdout": writer}
        environment = {name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"}
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--token"], stderr=subprocess.PIPE, env=environment, **how)
        if "stdout" in how:
            os.close(how["stdout"])
        give_up = threading.Timer(WAIT, process.kill)
        give_up.start()
        port, token = re.search(r"open http://127\.0\.0\.1:(\d+)/proxy/\?token=(\S+)\n", process.stderr.readline().decode()).groups()
        assert process.stderr.readline().startswith(b"It reaches every port")
        with Wire.to(int(port)) as wire:
            wire.send(request("GET", "/proxy/", "Authorization: token " + token))
            assert status_of(wire.message()) == 200
        process.terminate()
        assert process.communicate(timeout=WAIT)[1] == b""
        give_up.cancel()
        assert process.returncode == 0

    def test_a_complaint_that_nobody_can_hear(self):
        pytest.importorskip("resource")  # and so no Windows
        done = subprocess.run([sys.executable, PROGRAM, "--bind", "192.0.2.1"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2), timeout=WAIT)
        assert (done.returncode, done.stdout) == (2, b"")

    def test_a_warning_where_everybody_may_come_in(self):
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--no-token", "--bind", "0.0.0.0", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert b"anybody who can reach 0.0.0.0" in process.stderr.readline()
        process.terminate()
        assert process.communicate(timeout=WAIT) == (b"", b"")
        assert process.returncode == 0

    def test_verbose_logs_a_line_per_request(self, upstream):
        app = upstream(answering(OK))
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--verbose", "--allow-hostname", "*"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        port = int(re.search(r":(\d+)/", process.stdout.readline().decode()).group(1))
        with Wire.to(port) as wire:
            wire.send(request("GET", "/proxy/%d/a" % app.port))
            assert wire.message()[2] == b"ok"
        assert "GET /proxy/%d/a -> localhost:%d 200" % (app.port, app.port) in process.stderr.readline().decode()
        process.terminate()
        _, errors = process.communicate(timeout=WAIT)
        assert (process.returncode, errors) == (0, b"")

    def test_log_lines_for_machines(self, upstream):
        app = upstream(answering(OK))
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--log-json", "--allow-hostname", "*"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        port = int(re.search(r":(\d+)/", process.stdout.readline().decode()).group(1))
        with Wire.to(port) as wire:
            wire.send(request("GET", "/proxy/%d/a?secret" % app.port))
            assert wire.message()[2] == b"ok"
        told = json.loads(process.stderr.readline().decode())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
        assert 0 <= told.pop("seconds") < WAIT
        assert told == {
            "level": "info", "client": "127.0.0.1", "method": "GET", "target": "/proxy/%d/a?..." % app.port, "app": "localhost:%d" % app.port, "status": 200, "bytes": 2,
        }  # fmt: skip
        process.terminate()
        _, errors = process.communicate(timeout=WAIT)
        assert (process.returncode, errors) == (0, b"")
        record = logging.LogRecord("port_proxy", logging.WARNING, "", 0, "%s says", ("a",), None)
        assert json.loads(port_proxy._JsonLines().format(record))["message"] == "a says"

    def test_a_stop_with_everything_under_way_is_quiet(self, upstream):
        """Requests, uploads, tunnels and half heads: the exit status is 0 and nothing is said about any of them."""
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING if app.connections % 2 else b""), app.let_go.wait(4 * WAIT)))
        with shell_proxy("--shutdown-timeout", "0.2") as (_, port):
            wires = [Wire.to(port) for _ in range(12)]
            for number, wire in enumerate(wires):
                lines = HANDSHAKE if number % 2 else ("Content-Length: 10",)
                wire.send((request("GET", "/proxy/%d/" % app.port, *lines) + b"abc")[: 20 if number % 5 == 0 else None])
            eventually(lambda: app.connections == 9)
        for wire in wires:
            wire.close()

    def test_running_out_of_descriptors_slows_it_down_only(self, upstream):
        resource = pytest.importorskip("resource")
        app = upstream(answering(OK))

        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

        with shell_proxy("--verbose", preexec_fn=limit) as (_, port):
            wires = [Wire.to(port) for _ in range(80)]
            for wire in wires:
                wire.close()
            with Wire.to(port) as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port))
                assert wire.message()[2] == b"ok"


HUB_ENVIRONMENT = {
    "JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:%d/jh/user/al@ice.x%%2By/", "JUPYTERHUB_SERVICE_PREFIX": "/jh/user/al@ice.x%2By/", "JUPYTERHUB_API_URL": "http://127.0.0.1:1/jh/hub/api",
    "JUPYTERHUB_API_TOKEN": "server-token", "JUPYTERHUB_CLIENT_ID": "jupyterhub-user-al%40ice.x%2By", "JUPYTERHUB_OAUTH_CALLBACK_URL": "/jh/user/al@ice.x%2By/oauth_callback",
    "JUPYTERHUB_OAUTH_ACCESS_SCOPES": '["access:servers!server=al@ice.x+y/", "access:servers!user=al@ice.x+y"]', "JUPYTERHUB_BASE_URL": "/jh/", "JUPYTERHUB_HOST": "", "JUPYTERHUB_USER": "al@ice.x+y",
    "JUPYTERHUB_SERVER_NAME": "", "JUPYTERHUB_DEFAULT_URL": "/proxy/8080", "JUPYTERHUB_ACTIVITY_URL": "http://127.0.0.1:1/jh/hub/api/users/al@ice.x%2By/activity",
}  # fmt: skip


class TestUnderAHub:
    def test_environment(self):
        hub = port_proxy.hub_in(HUB_ENVIRONMENT)
        assert (hub.prefix, hub.user, hub.server_name, hub.home) == ("/jh/user/al@ice.x%2By", "al@ice.x+y", "", "/jh/user/al@ice.x%2By/proxy/8080")
        assert (hub.authorize_url, hub.callback_url) == ("/jh/hub/api/oauth2/authorize", "/jh/user/al@ice.x%2By/oauth_callback")
        assert hub.access_scopes == {"access:servers!server=al@ice.x+y/", "access:servers!user=al@ice.x+y"}
        assert (hub.activity_interval, hub.host_cookies, hub.is_secure, hub.cookie_options) == (300.0, False, False, ())

    @pytest.mark.parametrize(
        "change, field, value",
        [
            ({"JUPYTERHUB_HOST": "https://hub.example"}, "authorize_url", "https://hub.example/jh/hub/api/oauth2/authorize"), ({"JUPYTERHUB_PUBLIC_URL": "https://hub.example/jh/user/a/"}, "is_secure", True),
            ({"JUPYTERHUB_OAUTH_ACCESS_SCOPES": "", "JUPYTERHUB_OAUTH_SCOPES": '["a"]'}, "access_scopes", {"a"}),
            ({"JUPYTERHUB_COOKIE_HOST_PREFIX_ENABLED": "1"}, "host_cookies", True), ({"JUPYTERHUB_ACTIVITY_INTERVAL": "60"}, "activity_interval", 60.0), ({"JUPYTERHUB_DEFAULT_URL": ""}, "home", ""),
            ({"JUPYTERHUB_SERVER_NAME": "gpu"}, "server_name", "gpu"), ({"JUPYTERHUB_DEFAULT_URL": "proxy/1/?a=b"}, "home", "/jh/user/al@ice.x%2By/proxy/1/?a=b"),
            ({"JUPYTERHUB_DEFAULT_URL": "/"}, "home", ""), ({"JUPYTERHUB_DEFAULT_URL": "//?x#y"}, "home", ""),
            ({"JUPYTERHUB_DEFAULT_URL": "//evil.example/a b\u00e9%2F#/x"}, "home", "/jh/user/al@ice.x%2By/evil.example/a%20b%C3%A9%2F#/x"),
            ({"JUPYTERHUB_COOKIE_OPTIONS": '{"SameSite": "None", "Secure": true}'}, "cookie_options", (("SameSite", "None"), ("Secure", ""))),
            ({"JUPYTERHUB_COOKIE_OPTIONS": '{"expires_days": 0.5, "path": "/evil", "secure": false}'}, "cookie_options", (("Max-Age", "43200"),)),
        ],
    )  # fmt: skip
    def test_variations(self, change, field, value):
        assert getattr(port_proxy.hub_in(dict(HUB_ENVIRONMENT, **change)), field) == value

    @pytest.mark.parametrize("url, address", [("http://:1/", ("0.0.0.0", 1)), ("http://[::1]:2/", ("::1", 2)), ("https://0.0.0.0/", ("0.0.0.0", 443))])
    def test_where_it_listens(self, url, address):
        arguments = port_proxy._parser().parse_args([])
        config = port_proxy._config_under_hub(DEFAULT, arguments, dict(HUB_ENVIRONMENT, JUPYTERHUB_SERVICE_URL=url))
        assert (config.bind, config.port) == address
        assert (config.base, config.token, config.shutdown_timeout) == ("/jh/user/al@ice.x%2By/proxy", "", 0.3)

    @pytest.mark.parametrize("name", ["JUPYTERHUB_OAUTH_ACCESS_SCOPES", "JUPYTERHUB_SERVICE_PREFIX", "JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_CLIENT_ID"])
    def test_what_is_missing_is_named(self, name):
        with pytest.raises(ValueError, match=name):
            port_proxy.hub_in(dict(HUB_ENVIRONMENT, **{name: ""}))

    @pytest.mark.parametrize(
        "change, options, says",
        [
            ({"JUPYTERHUB_API_TOKEN": ""}, (), "JUPYTERHUB_API_TOKEN is not set"), ({}, ("--no-token",), "no --no-token"), ({}, ("--token",), "no --token"), ({}, ("--certfile", "x"), "no --certfile"),
            ({"JUPYTERHUB_SERVICE_URL": "unix:/a"}, (), "JUPYTERHUB_SERVICE_URL holds what no Hub sets: unix:/a"),
            ({"JUPYTERHUB_COOKIE_OPTIONS": '{"domain": "a; Path=/"}'}, (), "JUPYTERHUB_COOKIE_OPTIONS"), ({"JUPYTERHUB_COOKIE_OPTIONS": "["}, (), "JUPYTERHUB_COOKIE_OPTIONS"),
            ({"JUPYTERHUB_OAUTH_ACCESS_SCOPES": "7"}, (), "JUPYTERHUB_OAUTH_ACCESS_SCOPES"), ({"JUPYTERHUB_ACTIVITY_INTERVAL": "x"}, (), "JUPYTERHUB_ACTIVITY_INTERVAL"),
            ({"JUPYTERHUB_ACTIVITY_INTERVAL": "0"}, (), "JUPYTERHUB_ACTIVITY_INTERVAL"), ({"JUPYTERHUB_API_URL": "http+unix://a"}, (), "JUPYTERHUB_API_URL"),
        ],
    )  # fmt: skip
    def test_mistakes(self, change, options, says):
        environment = dict(os.environ, **dict(HUB_ENVIRONMENT, **dict({"JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:1/"}, **change)))
        done = subprocess.run([sys.executable, PROGRAM] + list(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, universal_newlines=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr.strip().split("\n")[-1]
        assert "Traceback" not in done.stderr
        assert "server-token" not in done.stderr

    def begin(self, *options):
        port = free_port()
        environment = dict(os.environ, **HUB_ENVIRONMENT)
        environment["JUPYTERHUB_SERVICE_URL"] %= port
        return port, subprocess.Popen([sys.executable, PROGRAM] + list(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)

    def test_it_runs_and_stops(self):
        port, process = self.begin("--base", "/ports")
        try:
            assert b"/jh/user/al@ice.x%2By/ports/<port>/, for al@ice.x+y" in process.stdout.readline()
            with Wire.to(port) as wire:
                wire.send(request("GET", "/jh/user/al@ice.x%2By/ports/80/", *PAGE))
                assert fields_of(wire.message())["location"].startswith("/jh/hub/api/oauth2/authorize?")
                wire.send(request("GET", "/jh/user/al@ice.x%2By/ports/80/"))
                assert status_of(wire.message()) == 403
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=WAIT) == (b"", b"")
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()

    def test_in_a_terminal_of_a_hubs_server(self):
        """Its environment is the same: who starts a proxy there is told, or says where it shall listen."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            environment = dict(os.environ, **HUB_ENVIRONMENT)
            environment["JUPYTERHUB_SERVICE_URL"] %= sock.getsockname()[1]
            done = subprocess.run([sys.executable, PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, env=environment)
            assert (done.returncode, b"--port 0" in done.stderr) == (2, True)
        _, process = self.begin("--port", "0")
        try:
            banner = process.stdout.readline().decode()
            assert re.search(r"open http://127\.0\.0\.1:\d+/proxy/", banner)
        finally:
            process.terminate()
            assert process.communicate(timeout=WAIT)[1] == b""


# ---------------------------------------------------------------------------------------------------------------------
# Real programs
# ---------------------------------------------------------------------------------------------------------------------


class TestRealPrograms:
    def test_http_server_and_curl(self, tmp_path):
        curl = shutil.which("curl")
        if not curl:
            pytest.skip("curl is not installed")
        data = os.urandom(3 << 20)
        (tmp_path / "data").write_bytes(data)
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"], cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            app_port = int(re.search(rb"port (\d+)", server.stdout.readline()).group(1))
            with shell_proxy() as (_, port):
                url = "http://localhost:%d/proxy/%d" % (port, app_port)
                got = subprocess.run([curl, "-sSfL", url + "/data"], stdout=subprocess.PIPE, timeout=WAIT)
                assert (got.returncode, got.stdout) == (0, data)
                listing = subprocess.run([curl, "-sSfL", url], stdout=subprocess.PIPE, timeout=WAIT)
                assert b'href="data"' in listing.stdout
        finally:
            server.kill()
            server.wait()
            server.stdout.close()

    def test_websockets_library(self, proxy):
        """A real client and a real server, subprotocol and compression negotiated between the two."""
        pytest.importorskip("websockets.asyncio.server", reason="the websockets library is not installed")
        from websockets.asyncio.client import connect
        from websockets.asyncio.server import serve

        async def talk():
            async def echo(connection):
                async for message in connection:
                    await connection.send(message)

            async with serve(echo, "127.0.0.1", 0, subprotocols=["b"], max_size=None) as server:
                app_port = server.sockets[0].getsockname()[1]
                url = "ws://127.0.0.1:%d/proxy/%d/" % (proxy.port, app_port)
                async with connect(url, subprotocols=["a", "b"], max_size=None) as client:
                    assert client.subprotocol == "b"
                    assert [extension.name for extension in client.protocol.extensions] == ["permessage-deflate"]
                    for message in ("hello", b"\x00\xff", "x" * (5 << 20), ""):
                        await client.send(message)
                        assert await client.recv() == message
                    await (await client.ping())

        asyncio.run(asyncio.wait_for(talk(), WAIT))

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_browser(self, start, upstream, token):
        """A page with relative assets, fetch, an upload, server-sent events and a WebSocket, in headless Chromium; where
        a token is asked for, it is in the first address, and nowhere after that."""
        proxy = start(allow_hostnames=(), token=token)
        app = upstream(serve_browser_app)
        with chromium("http://localhost:%d/proxy/%d%s" % (proxy.port, app.port, "?token=" + token if token else "")):
            assert app.happened.wait(60), "the browser did not report: it asked for %r" % [m[0] for m in app.messages]
        check_browser_report(app, "/proxy/%d/" % app.port)
        origins = {fields_of(message).get("origin") for message in app.messages}
        assert origins == {None, "http://localhost:%d" % app.port}
        assert TOKEN not in repr(app.messages)
        assert "cookie" not in {name for message in app.messages for name in fields_of(message)}


@contextlib.contextmanager
def chromium(url, *options):
    """Headless Chromium at `url`, with a profile of its own, whose folder this is; killed in the end."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium is installed")
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", "--user-data-dir=" + profile, "--remote-debugging-port=0",
            ] + list(options) + [url],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=dict(os.environ, TMPDIR=profile),
        )  # fmt: skip
        try:
            yield profile
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def check_browser_report(app, path):
    report = json.loads(next(message[2] for message in app.messages if message[0].startswith("POST /report ")).decode())
    assert report == {"fetch": "fetched", "upload": 300000, "events": ["1", "2", "3"], "socket": "echo", "style": "rgb(1, 2, 3)", "path": path}


BROWSER_PAGE = b"""<!DOCTYPE html><link rel=stylesheet href=style.css><body><script type=module>
const report = {path: location.pathname, style: getComputedStyle(document.body).color}
report.fetch = await (await fetch('data/file?x=%2F')).text()
report.upload = (await (await fetch('upload', {method: 'PUT', body: new Uint8Array(300000)})).json())
report.events = await new Promise(done => { const got = [], source = new EventSource('events')
  source.onmessage = event => { got.push(event.data); if (got.length == 3) { source.close(); done(got) } } })
report.socket = await new Promise(done => { const socket = new WebSocket(new URL('ws', location).href.replace('http', 'ws'))
  socket.onopen = () => socket.send('echo'); socket.onmessage = event => done(event.data); socket.onclose = () => done('closed') })
await fetch('report', {method: 'POST', body: JSON.stringify(report)})
</script>"""


def serve_browser_app(wire, app):
    while wire.buffer or wire.more():
        message = wire.message()
        app.messages.append(message)
        path = message[0].split(" ")[1]
        if path == "/ws":
            key = fields_of(message)["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest())
            wire.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n" % accept)
            head = wire.exactly(6)
            data = bytes(octet ^ head[2 + at % 4] for at, octet in enumerate(wire.exactly(head[1] & 127)))
            wire.send(bytes([0x81, len(data)]) + data)
            wire.rest()
            return
        if path == "/events":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\ndata: 2\n\n", b"data: 3\n\n")
            with contextlib.suppress(OSError):
                wire.rest()
            return
        kind, body = {
            "/": (b"text/html", BROWSER_PAGE), "/style.css": (b"text/css", b"body { color: rgb(1, 2, 3) }"), "/data/file?x=%2F": (b"text/plain", b"fetched"),
            "/upload": (b"application/json", b"%d" % len(message[2])),
        }.get(path, (b"text/plain", b""))  # fmt: skip
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(body)), body)
        if path == "/report":
            app.happened.set()


class Navigated(AssertionError):
    """The page that was asked gave way to the next one before it had answered."""


class Page:
    """A page in Chromium, used as a person does, by way of the DevTools protocol; with cookies of its own, or those of
    `beside`.

    complaints: errors that it logged, other than statuses of answers.
    """

    def __init__(self, profile, beside=None):
        told = Path(profile) / "DevToolsActivePort"
        eventually(lambda: told.exists() and told.read_text().count("\n") == 1)
        port, path = told.read_text().split("\n")
        self.wire = Wire.to(int(port))
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        self.wire.send("\r\n".join(("GET %s HTTP/1.1" % path, "Host: localhost", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key, "", "")).encode())
        assert b" 101 " in self.wire.until(b"\r\n\r\n")
        self.count, self.session, self.complaints = 0, {}, []
        self.context = beside.context if beside else self.do("Target.createBrowserContext")["browserContextId"]
        target = self.do("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.do(domain + ".enable")

    def do(self, method, **parameters):
        self.count += 1
        send_frame(self.wire, json.dumps(dict(self.session, id=self.count, method=method, params=parameters)))
        while True:
            told = json.loads((receive_frame(self.wire) or b"{}").decode())
            if told.get("id") == self.count:
                if "error" in told:
                    gone = re.search("navigated|context (was destroyed|with specified id)", told["error"]["message"])
                    raise (Navigated if gone else AssertionError)(method, told["error"])
                return told["result"]
            entry = told.get("params", {}).get("entry", {})
            if told.get("method") == "Runtime.exceptionThrown" or (entry.get("level") == "error" and entry.get("source") != "network"):
                self.complaints.append(told["params"])

    def tell(self, expression):
        result = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def until(self, expression):
        """Wait for what a person would see; while another page is loading, nothing can be asked of it."""
        limit = time.monotonic() + WAIT
        while True:
            with contextlib.suppress(Navigated):
                if self.tell("try { %s } catch (error) { false }" % expression):
                    return
            assert time.monotonic() < limit, "never %s, but %s" % (expression, self.tell("location.href + ' ' + document.documentElement.innerText"))
            time.sleep(0.05)

    def open(self, url):
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def text(self):
        return self.tell("document.body.innerText")

    def click(self, selector):
        self.until("!!document.querySelector(%s)" % json.dumps(selector))
        at = self.tell("(() => { const one = document.querySelector(%s); one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()" % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9}[key]
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **({"text": text} if text and kind == "keyDown" else {}))

    def type(self, text):
        self.do("Input.insertText", text=text)

    def look(self, width=1000, height=700, scheme="light", shot=""):
        """Change the window; where PORT_PROXY_TEST_SHOTS names a folder, leave a picture there."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        if shot and os.environ.get("PORT_PROXY_TEST_SHOTS"):
            picture = base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"])
            (Path(os.environ["PORT_PROXY_TEST_SHOTS"]) / (shot + ".png")).write_bytes(picture)

    def close(self):
        self.session = {}
        self.do("Target.disposeBrowserContext", browserContextId=self.context)
        self.wire.close()


def serve_page(text):
    """An app whose every path is one page, with this text as its title and content."""
    body = b"<!DOCTYPE html><title>%s</title><p id=app>%s" % (text, text)
    return answering(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


# What leaves the prefix in every way that a page has; it knows nothing of any prefix.
ROOTED_PAGE = b"""<!DOCTYPE html><title>NAME</title><link rel=stylesheet href=/style.css><body><form method=post action=/form><button>send</button></form><script>
const report = {cookie: document.cookie}
async function look() {
  report.style = getComputedStyle(document.body).color
  report.fetch = await (await fetch('/data?x=%2F')).text()
  report.quiet = await (await fetch('/data?quiet', {referrerPolicy: 'no-referrer'})).text()
  report.upload = await (await fetch('/upload', {method: 'PUT', body: new Uint8Array(300000)})).text()
  report.module = (await import('/module.js')).name
  report.worker = await new Promise(done => { new Worker('/worker.js').onmessage = event => done(event.data) })
  report.frame = await new Promise(done => { const frame = document.createElement('iframe'); frame.src = '/frame'
    frame.onload = () => done(frame.contentDocument.body.innerText); document.body.append(frame) })
  const register = how => navigator.serviceWorker.register('/service.js', how).then(() => 'NAME', error => error.name)
  report.services = [await register({scope: './'}), await register({scope: '/'})]
  report.socket = await new Promise(done => { const socket = new WebSocket('ws://' + location.host + '/socket')
    socket.onopen = () => socket.send('NAME'); socket.onmessage = event => done(event.data); socket.onclose = () => done('closed') })
  document.body.dataset.report = JSON.stringify(report)
}
look()
</script>"""


def serve_rooted(name):
    """An app whose links all begin with a slash."""

    def serve(wire, app):
        with contextlib.suppress(OSError, IndexError):  # a browser leaves as it likes
            answer(wire, app)

    def answer(wire, app):
        while wire.buffer or wire.more():
            message = wire.message()
            app.messages.append(message)
            fields = fields_of(message)
            path = message[0].split(" ")[1]
            if "upgrade" in fields:
                accept = base64.b64encode(hashlib.sha1((fields["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
                wire.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n" % accept)
                head = wire.exactly(6)
                data = wire.exactly(head[1] & 127)
                wire.send(bytes([0x81, len(data)]) + bytes(octet ^ head[2 + at % 4] for at, octet in enumerate(data)))
                wire.rest()
                return
            script = {"/module.js": b"export const name = 'NAME'", "/worker.js": b"fetch('/data').then(answer => answer.text()).then(text => postMessage(text))", "/service.js": b"// NAME"}
            kind, body = {"/": (b"text/html", ROOTED_PAGE), "/form": (b"text/html", b"<p id=app>form of NAME: %d" % len(message[2])), "/style.css": (b"text/css", b"body { color: rgb(1, 2, 3) }")}.get(path, (b"text/plain", b"NAME"))
            if path in script:
                kind, body = b"text/javascript", script[path]
            body = (b"%d" % len(message[2]) if path == "/upload" else body).replace(b"NAME", name)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nSet-Cookie: session=%s; Path=/; HttpOnly\r\nContent-Length: %d\r\n\r\n%s" % (kind, name, len(body), body))

    return serve


@pytest.fixture(scope="class")
def profile():
    with chromium("about:blank") as profile:
        yield profile


class TestInChromium:
    """What a person sees and clicks, in real Chromium."""

    @pytest.fixture
    def page(self, profile):
        page = Page(profile)
        yield page
        page.close()
        assert page.complaints == []

    @needs_proc
    def test_ports_page(self, page, upstream):
        """From the address that the banner names to an app's own host, signed in all the way; then what comes and goes."""
        apps = [upstream(serve_page(b"app %d" % number)) for number in range(8)]
        environment = dict(os.environ, PORT_PROXY_TOKEN=TOKEN)
        with shell_proxy(env=environment) as (_, port):
            page.open("http://127.0.0.1:%d/proxy/?token=%s" % (port, TOKEN))
            home = "http://127.0.0.1:%d/proxy/" % port
            page.until("location.href === %s" % json.dumps(home))
            for app in apps:
                assert page.tell("document.querySelector('#p%d .port').innerText" % app.port) == str(app.port)
            page.click("#p%d .port" % apps[0].port)
            page.until("document.querySelector('#app').innerText === 'app 0'")
            assert page.tell("location.href") == "http://%d.localhost:%d/" % (apps[0].port, port)
            page.open(home)
            page.click("#p%d a[href*=absolute]" % apps[1].port)
            page.until("document.querySelector('#app').innerText === 'app 1'")
            assert page.tell("location.pathname") == "/proxy/absolute/%d/" % apps[1].port
            page.open(home)
            page.until("document.querySelector('#p%d').innerText.includes('app 0')" % apps[0].port)  # its title, by now
            page.click("#filter")
            page.type("app 0")
            page.until("[...document.querySelectorAll('.ports li')].filter(one => !one.hidden).length === 1")
            page.tell("document.querySelector('#filter').value = ''; document.querySelector('#filter').dispatchEvent(new Event('input'))")
            page.type("own host")  # which every line has, as what a link is called
            page.until("document.querySelector('#none').innerText === 'There is no port here with that in its line.'")
            page.tell("document.querySelector('#filter').value = ''; document.querySelector('#filter').dispatchEvent(new Event('input'))")
            assert page.tell("document.querySelector('#none').hidden")
            new = upstream(serve_page(b"new"))
            page.until("!!document.querySelector('#p%d')" % new.port)
            assert re.match("(New|Gone): port [0-9]+", page.tell("document.querySelector('[role=status]').innerText"))
            new.close()
            page.until("document.querySelector('#p%d').className === 'gone'" % new.port)
            page.until("!document.querySelector('#p%d')" % new.port)
            page.click("input[name=port]")
            page.type(str(apps[2].port))
            page.press("Enter", "\r")
            page.until("document.querySelector('#app').innerText === 'app 2'")
            assert page.tell("location.pathname") == "/proxy/%d/" % apps[2].port
        seen = repr([app.messages for app in apps])
        assert TOKEN not in seen
        assert "ticket" not in seen
        assert "port_proxy_" not in seen

    @needs_proc
    def test_ports_page_while_the_proxy_is_away(self, page, proxy):
        page.open("http://localhost:%d/proxy/" % proxy.port)
        page.tell("{ const real = fetch; window.away = true; window.fetch = (...what) => away ? Promise.reject('away') : real(...what) }; 1")
        page.until("document.querySelector('[role=status]').innerText === 'The proxy does not answer.'")
        page.tell("away = false")
        page.until("document.querySelector('[role=status]').innerText !== 'The proxy does not answer.'")
        page.tell("{ const real = fetch; window.away = true; window.fetch = (...what) => away ? Promise.resolve(new Response('', {status: 502})) : real(...what) }; 1")
        page.until("document.querySelector('[role=status]').innerText === 'Load this page anew to see what is new.'")
        page.tell("away = false")
        page.until("document.querySelector('[role=status]').innerText !== 'Load this page anew to see what is new.'")

    @needs_proc
    def test_ports_page_by_keyboard_and_without_script(self, page, upstream):
        app = upstream(serve_page(b"the app"))
        with shell_proxy() as (_, port):
            page.do("Emulation.setScriptExecutionDisabled", value=True)
            page.open("http://localhost:%d/proxy/" % port)
            page.tell("document.querySelector('#p%d .port').focus()" % app.port)
            page.press("Tab")
            assert page.tell("document.activeElement.getAttribute('aria-label')") == "port %d, own host" % app.port
            page.press("Tab")
            page.press("Enter", "\r")
            page.until("document.querySelector('#app').innerText === 'the app'")
            assert page.tell("location.pathname") == "/proxy/%d/" % app.port

    @pytest.mark.parametrize("form", ["http://localhost:%d/proxy/%d/a?b", "http://%(app)d.localhost:%(port)d/a?b"])
    @pytest.mark.parametrize("script", [True, False])
    def test_waiting_page(self, page, proxy, upstream, form, script):
        """It opens the app as soon as that is up, also where scripts are off."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))  # taken, and nobody listens
            port = sock.getsockname()[1]
            page.do("Emulation.setScriptExecutionDisabled", value=not script)
            page.open(form % {"app": port, "port": proxy.port} if "(" in form else form % (proxy.port, port))
            assert "Waiting for port %d" % port in page.text()
            assert page.tell("document.querySelector('#help').hidden") is script
            sock.listen(5)
            body = b"<p id=app>here"
            answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        wire = Wire(sock.accept()[0])
                        head = wire.until(b"\r\n\r\n")
                        wire.send(answer + (b"" if head.startswith(b"HEAD") else body))
                        wire.close()

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                page.until("document.querySelector('#app').innerText === 'here'")
            finally:
                sock.shutdown(socket.SHUT_RDWR)
                thread.join(WAIT)

    @pytest.mark.parametrize("host", [False, True])
    def test_sign_in_page(self, page, start, upstream, host):
        app = upstream(serve_page(b"signed in"))
        proxy = start(token=TOKEN)
        url = "http://%d.localhost:%d/a?b" % (app.port, proxy.port) if host else "http://localhost:%d/proxy/%d/a?b" % (proxy.port, app.port)
        page.open(url)
        if host:  # where the app's own pages could read what is typed, none is asked for
            page.until("document.body.innerText.includes('Sign in there')")
            assert not page.tell("document.querySelector('form')")
            page.click("main a")
            page.until("location.hostname === 'localhost'")
        page.until("document.activeElement.name === 'token'")
        page.type("wrong")
        page.click("button")
        page.until("document.body.innerText.includes('not the token') && document.activeElement.name === 'token'")
        page.type(TOKEN)
        page.press("Enter", "\r")
        page.until("document.querySelector('#app').innerText === 'signed in'")
        assert page.tell("location.href") == (url[: -len("a?b")] if host else url)
        assert [message[0] for message in app.messages if "favicon" not in message[0]] == ["GET / HTTP/1.1" if host else "GET /a?b HTTP/1.1"]

    def test_signing_in_to_an_app_that_leads_to_a_login_elsewhere(self, page, start, upstream):
        elsewhere = upstream(serve_page(b"a login of its own"))
        app = upstream(answering(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % elsewhere.port))
        proxy = start(token=TOKEN)
        page.open("http://localhost:%d/proxy/%d/" % (proxy.port, app.port))
        page.until("document.activeElement.name === 'token'")
        page.type(TOKEN)
        page.click("button")
        page.until("document.querySelector('#app').innerText === 'a login of its own'")

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_two_apps_whose_links_begin_with_a_slash(self, page, profile, start, upstream, token):
        """Each gets what is its own, with its own cookies, in every way that a page asks for things."""
        proxy = start(token=token, allow_hostnames=())
        apps = [upstream(serve_rooted(name)) for name in (b"one", b"two")]
        for app, name in zip(apps, ("one", "two")):
            page.open("http://localhost:%d/proxy/%d/%s" % (proxy.port, app.port, "?token=" + token if token else ""))
            page.until("!!document.body.dataset.report")
            report = json.loads(page.tell("document.body.dataset.report"))
            assert report == {
                "cookie": "", "style": "rgb(1, 2, 3)", "fetch": name, "quiet": name, "upload": "300000", "module": name, "worker": name, "frame": name, "services": [name, "SecurityError"], "socket": name,
            }  # fmt: skip
        other = Page(profile, page)
        other.open("http://localhost:%d/proxy/%d/" % (proxy.port, apps[0].port))  # opened last
        other.until("!!document.body.dataset.report")
        assert '"socket":"one"' in other.tell("document.body.dataset.report")
        other.wire.close()
        page.tell("fetch('/late')")
        page.tell("history.pushState({}, '', '/deep/link')")
        eventually(lambda: any("/late" in message[0] for message in apps[1].messages))
        page.open("http://localhost:%d/proxy/%d/" % (proxy.port, apps[1].port))
        page.until("!!document.body.dataset.report")  # leaving before would cut its upload short
        page.click("button")
        page.until("document.querySelector('#app').innerText === 'form of two: 0'")
        assert page.tell("location.pathname") == "/proxy/%d/form" % apps[1].port
        for app, name in zip(apps, ("one", "two")):
            sent = {fields_of(message).get("cookie") for message in app.messages[1:]}
            assert sent == {"session=" + name}
            assert {"GET /socket HTTP/1.1", "GET /service.js HTTP/1.1"} < {message[0] for message in app.messages}

    @pytest.mark.parametrize("width, scheme", [(1000, "light"), (1000, "dark"), (360, "light"), (360, "dark")])
    def test_how_pages_look(self, page, start, upstream, monkeypatch, width, scheme):
        """Nothing is cut off or must be scrolled sideways, down to a phone; dark where the person likes it dark."""
        now = time.time()
        programs = ((8501, "streamlit", 7300), (8888, "jupyter-lab", 90000), (26950, "http.server", 5), (40000, "a-program-with-a-very-long-name-that-goes-on-and-on-and-on.py", 61))
        shown = [port_proxy.Listener(port, ("127.0.0.1",), str(port), 7, name, now - age) for port, name, age in programs]
        monkeypatch.setattr(port_proxy, "listeners", lambda: shown)
        open_proxy, proxy = start(), start(token=TOKEN)
        open_proxy.proxy._around.titles._seen[8501] = "Sales by region", now
        for name, url in (
            ("ports", "http://localhost:%d/proxy/" % open_proxy.port), ("waiting", "http://localhost:%d/proxy/%d/" % (open_proxy.port, free_port())), ("sign-in", "http://localhost:%d/proxy/" % proxy.port),
            ("refusal", "http://localhost:%d/proxy/elsewhere.example.org:8080/" % open_proxy.port), ("error", "http://localhost:%d/proxy/no-port" % open_proxy.port),
        ):  # fmt: skip
            page.look(width, 700, scheme)
            page.open(url)
            page.tell("document.querySelectorAll('details').forEach(one => { one.open = true })")
            page.look(width, 700, scheme, "%s-%s-%d" % (name, scheme, width))
            assert page.tell("document.scrollingElement.scrollWidth <= innerWidth"), name
            assert page.tell("document.querySelector('h1').innerText") and page.tell("document.documentElement.lang") == "en"
            ink, ground = (page.tell("getComputedStyle(document.body).%s.match(/[0-9]+/g).map(Number).reduce((sum, one) => sum + one)" % what) for what in ("color", "backgroundColor"))
            assert ink - ground > 300 if scheme == "dark" else ground - ink > 300


# ---------------------------------------------------------------------------------------------------------------------
# Real JupyterHub and Jupyter servers; PORT_PROXY_TEST_JUPYTER names the folder that their commands are in
# ---------------------------------------------------------------------------------------------------------------------


def jupyter_command(name):
    folder = os.environ.get("PORT_PROXY_TEST_JUPYTER")
    path = shutil.which(name, path=folder or None)
    if folder and not path:
        pytest.fail("%s is not in the folder that PORT_PROXY_TEST_JUPYTER names" % name)
    if not path:
        pytest.skip("%s is not installed: PORT_PROXY_TEST_JUPYTER says in which folder it is" % name)
    return path


class Server:
    """A real server in a process group of its own, with a home folder of its own; it has answered at `target`.

    said: what it has printed so far.
    """

    def __init__(self, command, folder, port, target, context=None, **environment):
        folder.mkdir(exist_ok=True)
        bin_folder = os.path.dirname(command[0])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "PYTHON", "JPY"))}
        kept.update(HOME=str(folder), PATH=bin_folder + os.pathsep + os.environ["PATH"], JUPYTER_PLATFORM_DIRS="1", **environment)
        self.log = folder / "log"
        self.port = port
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=str(folder), env=kept, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self.wait_for(target, context)
        except BaseException:
            self.close()
            raise

    def wait_for(self, target, context):
        limit = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < limit, self.said
            with contextlib.suppress(OSError):
                if status_of(Visitor(self.port, context).ask("GET", target)) == 200:  # a front server may be up before that
                    return
            time.sleep(0.05)

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(WAIT)


class Visitor:
    """A browser without a window: it keeps cookies by path, sends those of longer paths first, follows redirects.

    trail: what it asked for, with the statuses.
    """

    def __init__(self, port, context=None):
        self.port, self.context = port, context
        self.cookies, self.trail = {}, []

    def wire(self):
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT)
        return Wire(self.context.wrap_socket(sock, server_hostname="localhost") if self.context else sock)

    def head(self, method, target, *lines):
        path = target.partition("?")[0]
        fit = [(at, name, value) for (name, at), value in self.cookies.items() if (path + "/").startswith(at.rstrip("/") + "/")]
        shown = "; ".join("%s=%s" % (name, value) for at, name, value in sorted(fit, key=lambda cookie: -len(cookie[0])))
        host = "Host: 127.0.0.1:%d" % self.port
        return "\r\n".join(("%s %s HTTP/1.1" % (method, target), host) + (("Cookie: " + shown,) if shown else ()) + lines + ("", "")).encode()

    def ask(self, method, target, *lines, body=b"", **how):
        """One request, and its answer, whose cookies are kept."""
        if body:
            lines += ("Content-Length: %d" % len(body),)
        with self.wire() as wire:
            wire.send(self.head(method, target, *lines), body)
            answer = wire.message(**how)
        self.trail.append((method, target, status_of(answer)))
        for value in (value for name, value in answer[1] if name.lower() == "set-cookie"):
            (name, _, content), *attributes = [part.strip().partition("=") for part in value.split(";")]
            about = {key.lower(): attribute for key, _, attribute in attributes}
            self.cookies.pop((name, about.get("path", "/")), None)
            if content.strip('"') and about.get("max-age") != "0":
                self.cookies[name, about.get("path", "/")] = content
        return answer

    def visit(self, target):
        """Go to a page, wherever it leads; a page of the Hub that waits for a server is looked at again."""
        limit = time.monotonic() + WAIT
        while True:
            answer = self.ask("GET", target, *PAGE)
            location = fields_of(answer).get("location")
            if location:
                target = re.sub("https?://[^/]*", "", location)
            elif "/hub/spawn-pending/" not in target:
                return answer
            else:
                time.sleep(0.05)
            assert time.monotonic() < limit, self.trail

    def sign_in_at_hub(self, name, base="/jh/"):
        self.ask("GET", base + "hub/login", *PAGE)
        xsrf = next(value for (cookie, at), value in self.cookies.items() if (cookie, at) == ("_xsrf", base + "hub/"))
        form = urlencode({"username": name, "password": "any", "_xsrf": xsrf}).encode()
        assert status_of(self.ask("POST", base + "hub/login", "Content-Type: application/x-www-form-urlencoded", body=form)) == 302
        return self


def send_frame(wire, text):
    """A masked text frame (RFC 6455 section 5.2), with a mask of zeros."""
    data = text.encode()
    length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
    wire.send(b"\x81" + length + bytes(4) + data)


def receive_frame(wire):
    first, length = wire.exactly(2)
    if length == 126:
        length = struct.unpack(">H", wire.exactly(2))[0]
    elif length == 127:
        length = struct.unpack(">Q", wire.exactly(8))[0]
    return wire.exactly(length) if first & 15 in (1, 2) else None


def serve_anything(wire, app):
    """An app that tells what it was asked; counts an upload, sends much, events one by one, echoes over a WebSocket."""
    while wire.buffer or wire.more():
        head = wire.until(b"\r\n\r\n")
        line, *fields = head[:-4].decode("latin-1").split("\r\n")
        by_name = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        path = line.split(" ")[1].partition("?")[0]
        app.messages.append((line, [tuple(field.split(": ", 1)) for field in fields], b""))
        if by_name.get("expect") == "100-continue":
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if path.endswith("/ws"):
            accept = base64.b64encode(hashlib.sha1((by_name["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
            wire.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n" % accept)
            with contextlib.suppress(OSError):
                while True:
                    wire.send(wire.buffer)
                    wire.buffer = b""
                    if not wire.more():
                        return
        count, digest = 0, hashlib.sha256()
        if by_name.get("transfer-encoding") == "chunked":
            size = -1
            while size:
                size = int(wire.until(b"\r\n")[:-2], 16)
                digest.update(wire.exactly(size))
                wire.exactly(2)
                count += size
        while count < int(by_name.get("content-length", 0)):
            piece = wire.buffer or (wire.more() and wire.buffer)
            take = piece[: int(by_name["content-length"]) - count]
            wire.buffer = piece[len(take) :]
            digest.update(take)
            count += len(take)
        if path.endswith("/events"):
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
            app.let_go.wait(WAIT)
            wire.send(b"data: 2\n\n")
            return
        if path.endswith("/much"):
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MUCH)
            for _ in range(MUCH >> 20):
                wire.send(MEBIBYTE)
            continue
        said = b"%s\n%d %s" % (line.encode(), count, digest.hexdigest().encode())
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nSet-Cookie: app=1; Path=/\r\n\r\n" % len(said), b"" if line.startswith("HEAD ") else said)


MEBIBYTE = bytes(range(256)) * 4096
MUCH = 200 << 20


def download(wire):
    """Read a 200 MiB answer of `serve_anything`; its SHA-256, so far as it came."""
    head = wire.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    digest, count = hashlib.sha256(wire.buffer), len(wire.buffer)
    wire.buffer = b""
    while count < MUCH and wire.more():
        digest.update(wire.buffer)
        count += len(wire.buffer)
        wire.buffer = b""
    return digest.hexdigest()


def upload(wire, visitor, target, *lines, chunked=False):
    """Send 200 MiB; what the app says of it."""
    how = "Transfer-Encoding: chunked" if chunked else "Content-Length: %d" % MUCH
    wire.send(visitor.head("PUT", target, how, *lines))
    for _ in range(MUCH >> 20):
        wire.send(b"100000\r\n%s\r\n" % MEBIBYTE if chunked else MEBIBYTE)
    wire.send(b"0\r\n\r\n" if chunked else b"")
    return wire.message()


def much_hash():
    digest = hashlib.sha256()
    for _ in range(MUCH >> 20):
        digest.update(MEBIBYTE)
    return digest.hexdigest()


HUB_CONFIG = """
import os, sys
c.JupyterHub.bind_url = "http://127.0.0.1:{port}/jh/"
c.JupyterHub.hub_port = {hub_port}
c.ConfigurableHTTPProxy.api_url = "{scheme}://127.0.0.1:{api_port}"
c.JupyterHub.db_url = "sqlite://"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.Authenticator.admin_users = {{"boss"}}
c.JupyterHub.admin_access = True
c.JupyterHub.load_roles = [
    {{"name": "test", "scopes": ["admin:users", "admin:servers", "tokens", "read:users:activity"], "services": ["test"]}},
]
c.JupyterHub.services = [{{"name": "test", "api_token": "test-token"}}]
c.JupyterHub.allow_named_servers = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {home!r} + "/{{username}}"
c.Spawner.cmd = {command!r}
c.Spawner.environment = {{"JUPYTERHUB_ACTIVITY_INTERVAL": "1", "PYTHONPATH": {here!r}}}
c.Spawner.default_url = "{default_url}"
c.JupyterHub.internal_ssl = {internal_ssl}
c.JupyterHub.internal_certs_location = {home!r} + "/certificates"
"""
ANA, ANA_PATH = "al@ice.x+y", "/jh/user/al@ice.x%2By"


@pytest.fixture(scope="module")
def real_app():
    app = Upstream(serve_anything)
    yield app
    app.close()
    assert not app.failures


@pytest.fixture(scope="module", params=["plain", "internal TLS", "inside jupyterhub-singleuser"])
def hub(request, real_app, tmp_path_factory):
    """A Hub whose servers are this program; or its usual ones, with the module among their extensions."""
    command = jupyter_command("jupyterhub")
    jupyter_command("configurable-http-proxy")
    folder = tmp_path_factory.mktemp("hub")
    port, internal = free_port(), request.param == "internal TLS"
    spawned = [sys.executable, PROGRAM]
    if request.param == "inside jupyterhub-singleuser":
        spawned = [jupyter_command("jupyterhub-singleuser"), "--allow-root", "--ServerApp.jpserver_extensions={'port_proxy': True}"]
    text = HUB_CONFIG.format(
        port=port, hub_port=free_port(), api_port=free_port(), home=str(folder / "home"), command=spawned, here=str(HERE),
        default_url="/proxy/%d%s" % (real_app.port, "/" if internal else ""), internal_ssl=internal, scheme="https" if internal else "http",
    )  # fmt: skip
    (folder / "config.py").write_text(text)
    server = Server([command, "-f", str(folder / "config.py")], folder, port, "/jh/hub/api/")
    server.is_jupyter = len(spawned) > 2
    yield server
    server.close()


class TestJupyterHub:
    @pytest.fixture
    def app(self, real_app):
        return real_app

    def api(self, hub, method, path, **body):
        data = json.dumps(body).encode() if body else b""
        answer = Visitor(hub.port).ask(method, "/jh/hub/api" + path, "Authorization: token test-token", "Content-Type: application/json", body=data, no_body=method == "DELETE")
        assert status_of(answer) < 300, answer
        return json.loads(answer[2].decode()) if answer[2] else None

    @pytest.fixture
    def ana(self, hub, app):
        """A browser that has been through the Hub's sign-in and is at the app."""
        visitor = Visitor(hub.port).sign_in_at_hub(ANA)
        answer = visitor.visit("/jh/hub/user-redirect/proxy/%d" % app.port)
        assert (status_of(answer), answer[2].split(b"\n")[0]) == (200, b"GET / HTTP/1.1"), (visitor.trail, hub.said)
        assert visitor.trail[-1][1] == "%s/proxy/%d/" % (ANA_PATH, app.port)
        return visitor

    def is_sent_to_sign_in(self, visitor, target):
        return b'name="password"' in visitor.visit(target)[2]

    def test_from_sign_in_to_the_app(self, hub, app, ana):
        target = "%s/proxy/%d/a%%2Fb//c?d=%%20" % (ANA_PATH, app.port)
        assert ana.visit(target)[2].split(b"\n")[0] == b"GET /a%2Fb//c?d=%20 HTTP/1.1"
        assert ("app", "%s/proxy/%d/" % (ANA_PATH, app.port)) in ana.cookies
        assert fields_of(app.messages[-1])["cookie"] == "app=1"
        assert ana.ask("PROPFIND", target)[2].split(b"\n")[0] == b"PROPFIND /a%2Fb//c?d=%20 HTTP/1.1"

    def test_the_default_url(self, hub, app, ana):
        """Where a person lands who just opens the Hub: with the slash that relative links need, whoever left it out."""
        visitor = Visitor(hub.port).sign_in_at_hub(ANA)
        assert visitor.visit("/jh/")[2].split(b"\n")[0] == b"GET / HTTP/1.1"
        assert visitor.trail[-1][1] == "%s/proxy/%d/" % (ANA_PATH, app.port)

    def test_spelt_otherwise(self, hub, app, ana):
        answer = ana.visit("/jh/user/al%%40ice.x%%2By/proxy/%d/" % app.port)
        if hub.is_jupyter:  # which knows its own spelling alone
            assert status_of(answer) == 404
        else:
            assert answer[2].split(b"\n")[0] == b"GET / HTTP/1.1"

    def test_who_gets_in(self, hub, app, ana):
        target = "%s/proxy/%d/" % (ANA_PATH, app.port)
        assert self.is_sent_to_sign_in(Visitor(hub.port), target)
        for method, lines in (("POST", PAGE), ("GET", ()), ("GET", HANDSHAKE)):
            assert status_of(Visitor(hub.port).ask(method, target, *lines)) == 403
        count = len(app.messages)
        answer = Visitor(hub.port).sign_in_at_hub("mallory").visit(target)
        assert (status_of(answer), len(app.messages)) == (403, count)
        assert status_of(Visitor(hub.port).sign_in_at_hub("boss").visit(target)) == 200

    def test_api_tokens(self, hub, app, ana):
        target = "%s/proxy/%d/" % (ANA_PATH, app.port)
        token = self.api(hub, "POST", "/users/%s/tokens" % "al@ice.x%2By", note="test", scopes=["access:servers!user=" + ANA])["token"]
        for query, lines in (("", ("Authorization: token " + token,)), ("", ("Authorization: Bearer " + token,)), ("?a&token=" + token, ())):
            refused = query and hub.is_jupyter  # which does not take tokens in addresses any more
            assert status_of(Visitor(hub.port).ask("GET", target + query, *lines)) == (403 if refused else 200)
            assert token not in repr(app.messages[-1])
        answer = Visitor(hub.port).ask("GET", target + "?token=apps-own&a", "Authorization: token " + token)
        assert (status_of(answer), app.messages[-1][0], token in repr(app.messages[-1])) == (200, "GET /?token=apps-own&a HTTP/1.1", False)
        assert status_of(Visitor(hub.port).ask("GET", target, "Authorization: token apps-own")) == 403
        assert status_of(ana.ask("GET", target + "?token=apps-own", "Authorization: Bearer apps-own")) == 200
        assert app.messages[-1][0] == "GET /?token=apps-own HTTP/1.1"
        assert fields_of(app.messages[-1])["authorization"] == "Bearer apps-own"
        browser = Visitor(hub.port)
        if not hub.is_jupyter:
            assert status_of(browser.visit(target + "?token=" + token)) == 200
            assert browser.trail[-1][1] == target

    def test_bodies_and_streams(self, hub, app, ana):
        target = "%s/proxy/%d" % (ANA_PATH, app.port)
        with ana.wire() as wire:
            answer = upload(wire, ana, target + "/put")
            assert answer[2].split(b"\n")[1].decode() == "%d %s" % (MUCH, much_hash())
        with ana.wire() as wire:
            wire.send(ana.head("GET", target + "/much"))
            assert download(wire) == much_hash()
        with ana.wire() as wire:
            wire.send(ana.head("GET", target + "/events"))
            assert wire.until(b"data: 1\n\n").endswith(b"data: 1\n\n")  # the second is not sent before that

    def test_websocket(self, hub, app, ana):
        target = "%s/proxy/%d/ws" % (ANA_PATH, app.port)
        origin = "Origin: http://127.0.0.1:%d" % hub.port
        assert status_of(ana.ask("GET", target, "Origin: http://evil.example", *HANDSHAKE)) == 403
        with ana.wire() as wire:
            wire.send(ana.head("GET", target, origin, *HANDSHAKE))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
            wire.send(b"hello")
            assert wire.exactly(5) == b"hello"
        assert fields_of(app.messages[-1])["origin"] == "http://localhost:%d" % app.port

    def test_activity(self, hub, app, ana):
        def last():
            return self.api(hub, "GET", "/users/al@ice.x%2By")["servers"][""]["last_activity"]

        with ana.wire() as wire:
            wire.send(ana.head("GET", "%s/proxy/%d/ws" % (ANA_PATH, app.port), *HANDSHAKE))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
            before = last()

            def is_later():
                wire.send(b"a")
                wire.exactly(1)
                return last() > before

            eventually(is_later)

    def test_named_server(self, hub, app):
        visitor = Visitor(hub.port).sign_in_at_hub(ANA)
        self.api(hub, "POST", "/users/al@ice.x%2By/servers/gpu-2")
        target = ANA_PATH + "/gpu-2"
        assert visitor.visit("%s/proxy/%d/" % (target, app.port))[2].split(b"\n")[0] == b"GET / HTTP/1.1"
        assert visitor.visit(target)[2].split(b"\n")[0] == b"GET / HTTP/1.1"
        assert fields_of(app.messages[-1])["x-forwarded-prefix"] == "%s/proxy/%d" % (target, app.port)

    def test_signing_out(self, hub, app, ana):
        target = "%s/proxy/%d/" % (ANA_PATH, app.port)
        ours = {name for name, _ in ana.cookies if name.startswith(("port_proxy_", "jupyterhub-user-"))}
        assert ours
        ana.visit("/jh/hub/logout")
        assert ours <= {name for name, _ in ana.cookies}  # they are still shown, to no avail
        assert status_of(ana.ask("GET", target)) == 403
        assert self.is_sent_to_sign_in(ana, target)

    def test_a_stop_with_a_websocket_open(self, hub, app):
        """The Hub waits ten seconds before it answers that a server is slow to stop (202)."""
        visitor = Visitor(hub.port).sign_in_at_hub("stopper")
        target = "/jh/user/stopper/proxy/%d/" % app.port
        assert status_of(visitor.visit("/jh/hub/user-redirect/proxy/%d" % app.port)) == 200
        with visitor.wire() as wire, visitor.wire() as events:
            wire.send(visitor.head("GET", target + "ws", *HANDSHAKE))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
            events.send(visitor.head("GET", target + "events"))
            assert b"data: 1" in events.until(b"data: 1\n\n")
            answer = visitor.ask("DELETE", "/jh/hub/api/users/stopper/server", "Authorization: token test-token", no_body=True)
            assert status_of(answer) == 204
            assert wire.rest() == b""
        assert self.api(hub, "GET", "/users/stopper")["servers"] == {}
        assert "Traceback" not in hub.said
        assert "SIGKILL" not in hub.said


LAB_EXTENSION = """
window._JUPYTERLAB = window._JUPYTERLAB || {};
let shared;
window._JUPYTERLAB["port-proxy-test"] = {
  init: scope => { shared = scope["@jupyterlab/coreutils"]; },
  get: async () => {
    const { PageConfig } = (await Object.values(shared)[0].get())();
    const activate = () => {
      const frame = document.createElement("iframe");
      frame.src = PageConfig.getBaseUrl() + "proxy/" + PORT + "/";
      document.body.append(frame);
    };
    return () => ({ __esModule: true, default: { id: "port-proxy-test:plugin", autoStart: true, activate } });
  },
};
"""


def start_jupyter(folder, config, *options, context=None):
    """A Jupyter server that has the module among its extensions; `context` is what a client of it needs."""
    command = [jupyter_command("jupyter"), "server", "--allow-root", "--no-browser", "--ServerApp.port_retries=0", "--ServerApp.base_url=/nb/", "--config=config.py"]
    port = free_port()
    (folder / "config.py").write_text(config)
    command += ["--port=%d" % port, "--ServerApp.jpserver_extensions={'port_proxy': True}", "--IdentityProvider.token=" + TOKEN]
    server = Server(command + list(options), folder, port, "/nb/api", context, PYTHONPATH=str(HERE))
    server.context = context
    return server


@pytest.fixture(scope="module", params=["plain", "TLS"])
def jupyter(request, tmp_path_factory):
    folder, options, context = tmp_path_factory.mktemp("jupyter"), [], None
    config = "c.PortProxy.host_allowlist = ['*.example.org']\nc.LabApp.extra_labextensions_path = [%r]\n" % str(folder / "extensions")
    if request.param == "TLS":
        certificate = request.getfixturevalue("certificate")
        options = ["--certfile=%s" % (certificate / "cert.pem"), "--keyfile=%s" % (certificate / "key.pem")]
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    server = start_jupyter(folder, config, *options, context=context)
    yield server
    said = server.said
    server.close()
    assert "port_proxy: every port of this machine is at /nb/proxy/<port>/" in said
    assert "Traceback" not in said
    assert "GET /nb/proxy/" not in re.sub(r"(?m)^\[W.*|.* 302 GET .*", "", said)  # those that succeed are not worth a line
    assert TOKEN not in said.replace("token=" + TOKEN, "")  # Jupyter itself prints the address to open


class TestJupyterConfiguration:
    def test_any_origin(self, real_app, tmp_path):
        """Where Jupyter allows any, its own handlers still ask for the XSRF token: what changes something is refused."""
        server = start_jupyter(tmp_path, "c.ServerApp.allow_origin = '*'")
        try:
            visitor, target = Visitor(server.port), "/nb/proxy/%d/" % real_app.port
            assert status_of(visitor.visit(target + "?token=" + TOKEN)) == 200
            foreign = "Origin: https://evil.example"
            for method, lines, status in (("POST", (), 403), ("PUT", (), 403), ("GET", (), 200), ("POST", ("Authorization: token " + TOKEN,), 200)):
                assert status_of(visitor.ask(method, target, foreign, *lines)) == status
            assert status_of(visitor.ask("GET", target + "ws", foreign, *HANDSHAKE, no_body=True)) == 101  # as with its own
            assert status_of(visitor.ask("POST", target, "Origin: http://127.0.0.1:%d" % server.port)) == 200
        finally:
            server.close()

    @pytest.mark.parametrize("line, says", [("host_allowlist = 'a'", "host_allowlist must be a sequence"), ("frob = 1", "frob"), ("head_timeout = -1", "head_timeout must be")])
    def test_mistakes(self, tmp_path, line, says):
        server = start_jupyter(tmp_path, "c.PortProxy." + line)
        try:
            assert status_of(Visitor(server.port).ask("GET", "/nb/proxy/80", "Authorization: token " + TOKEN)) == 404
            (complaint,) = re.findall(r"port_proxy: /nb/proxy/ is not served, for c.PortProxy cannot be used: (.*)", server.said)
            assert says in complaint
            assert "Traceback" not in server.said
        finally:
            server.close()


class TestJupyter:
    @pytest.fixture
    def app(self, real_app):
        return real_app

    @pytest.fixture
    def target(self, app):
        return "/nb/proxy/%d" % app.port

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

    def test_who_gets_in(self, jupyter, app, target, visitor):
        count = len(app.messages)
        stranger = Visitor(jupyter.port, jupyter.context)
        answer = stranger.ask("GET", target + "/?x", *PAGE)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/nb/login?next=" + quote(target + "/?x", ""))
        assert fields_of(answer)["connection"] == "close"  # a front server must not send the next request there
        for method, lines in (("GET", ()), ("POST", PAGE), ("GET", HANDSHAKE), ("PROPFIND", ()), ("M-SEARCH", ()), ("OPTIONS", ()), ("GET", ("Authorization: token wrong",))):
            assert status_of(stranger.ask(method, target + "/", *lines)) == 403
        assert len(app.messages) == count
        assert status_of(stranger.ask("GET", target + "/", "Authorization: token " + TOKEN)) == 200
        assert status_of(stranger.ask("GET", "/nb/proxy", *PAGE)) == 200  # that request has set the cookie, too
        assert status_of(visitor.ask("GET", target + "/")) == 200

    def test_our_own_pages(self, jupyter, app, target, visitor):
        """The ports are Jupyter's user's; there are no hosts of the apps' own, nor is anything outside the prefix ours."""
        data = json.loads(visitor.ask("GET", "/nb/proxy/", "Accept: application/json")[2].decode())
        links = {one["port"]: one["links"] for one in data["ports"]}
        if links:
            assert links[app.port] == {"stripped": target + "/", "absolute": "/nb/proxy/absolute/%d/" % app.port}
        assert jupyter.port not in links
        assert b"Ports of this machine" in visitor.ask("GET", "/nb/proxy/", *PAGE)[2]
        waiting = visitor.ask("GET", "/nb/proxy/%d/" % free_port(), *PAGE)
        assert (status_of(waiting), b"Waiting for port" in waiting[2]) == (502, True)
        answer = visitor.ask("GET", target + "/", *PAGE)
        assert not any(value.startswith("port_proxy_") for name, value in answer[1] if name == "Set-Cookie")

    def test_requests_arrive_as_sent(self, app, target, visitor):
        for method in ("GET", "POST", "PROPFIND", "M-SEARCH", "PREPARE", "OPTIONS"):
            answer = visitor.ask(method, target + "/a%2Fb//c;d?e=%20&token=apps-own", "X-A: 1", "X-A: 2", "Authorization: Bearer apps-own")
            assert answer[2].split(b"\n")[0].decode() == method + " /a%2Fb//c;d?e=%20&token=apps-own HTTP/1.1"
            assert [value for name, value in app.messages[-1][1] if name == "X-A"] == ["1", "2"]
            assert fields_of(app.messages[-1])["authorization"] == "Bearer apps-own"
        assert visitor.ask("GET", "/nb/proxy/absolute/%d/a" % app.port)[2].split(b"\n")[0].decode() == "GET /nb/proxy/absolute/%d/a HTTP/1.1" % app.port
        assert status_of(visitor.ask("HEAD", target + "/", no_body=True)) == 200
        answer = visitor.ask("GET", target + "?q")
        assert (status_of(answer), fields_of(answer)["location"]) == (302, target + "/?q")

    @pytest.mark.parametrize("place, status", [("/nb/proxy/", 200), ("/nb/proxy/nope/", 404), ("/nb/proxy/a.example.com:80/", 403), ("/nb/proxy/1/../../x", 400), ("/nb/proxy/1", 302)])
    def test_other_places(self, visitor, place, status):
        assert status_of(visitor.ask("GET", place)) == status

    def test_its_own_port(self, jupyter, visitor):
        """In the absolute form the request would come round for ever."""
        for form in ("/nb/proxy/absolute/%d/", "/nb/proxy/%d/", "/nb/proxy/absolute/[::1]:%d/", "/nb/proxy/localhost:%d/"):
            assert status_of(visitor.ask("GET", form % jupyter.port)) in (508, 502)
        assert status_of(visitor.ask("GET", "/nb/proxy/absolute/%d/" % jupyter.port)) == 508

    def test_credentials_do_not_reach_the_app(self, jupyter, app, target, visitor):
        own = "username-localhost-%d" % app.port  # if the app is a Jupyter server itself
        visitor.cookies.update({("_xsrf", target + "/"): "apps-own", (own, target + "/"): "x", ("username-localhost-1", "/"): "y", ("jupyterhub-user-a", "/"): "z", ("port_proxy_8888", "/"): "w"})
        visitor.cookies.pop(("app", target + "/"), None)
        for lines in ((), ("Authorization: token " + TOKEN,), ("Authorization: bearer " + TOKEN,), ("Referer: http://127.0.0.1:%d%s/?token=%s" % (jupyter.port, target, TOKEN),)):
            assert status_of(visitor.ask("GET", target + "/?a&token=%s&b" % TOKEN, *lines)) == 200
            visitor.cookies.pop(("app", target + "/"))
            line, fields, _ = app.messages[-1]
            assert line == "GET /?a&b HTTP/1.1"
            assert fields_of(app.messages[-1])["cookie"].split("; ") in (["_xsrf=apps-own", own + "=x"], [own + "=x", "_xsrf=apps-own"])
            assert TOKEN not in repr(fields)
            assert "username-127" not in repr(fields)

    @pytest.mark.parametrize("query", ["token=%s%%20", "token=+%s", "token=%%00%s", "token=%s%%0a&a"])
    def test_what_jupyter_reads_loosely_is_cut_as_loosely(self, jupyter, app, target, query):
        assert status_of(Visitor(jupyter.port, jupyter.context).ask("GET", target + "/?" + query % TOKEN)) == 200
        assert TOKEN not in repr(app.messages[-1])
        assert status_of(Visitor(jupyter.port, jupyter.context).ask("GET", target + "/", "Authorization: ToKeN\t " + TOKEN)) == 200
        assert TOKEN not in repr(app.messages[-1])

    @pytest.mark.parametrize("method", ["_NEW_COOKIE", "CURRENT_USER", "XSRF_TOKEN", "get", "X1"])
    def test_a_method_is_no_attribute(self, visitor, target, method):
        """It is refused; names that a method may have are answered, whatever else is called so."""
        assert status_of(visitor.ask(method, target + "/?token=" + TOKEN)) == 405
        for name in ("REQUEST", "SETTINGS", "APPLICATION", "FINISH", "UI", "LOG", "TOKEN"):
            assert visitor.ask(name, target + "/")[2].split(b" ")[0].decode() == name

    def test_an_app_cannot_set_jupyters_cookies(self, jupyter, upstream, visitor):
        (name,) = [name for name, _ in visitor.cookies if name.startswith("username-127-0-0-1-")]
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nSet-Cookie: %s=evil; Path=/\r\nSet-Cookie: jupyterhub-session-id=evil\r\nSet-Cookie: a=b\r\n\r\n" % name.encode()))
        answer = visitor.ask("GET", "/nb/proxy/%d/" % app.port)
        assert [value for name, value in answer[1] if name == "Set-Cookie"] == ["a=b"]

    def test_other_sites(self, target, visitor):
        for method, lines, status in (
            ("POST", ("Origin: http://evil.example",), 403), ("POST", ("Origin: null",), 403), ("GET", ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"), 403),
            ("GET", ("Origin: http://evil.example",) + HANDSHAKE, 403), ("POST", ("Origin: https://evil.example", "Authorization: token " + TOKEN), 200), ("POST", (), 200),
            ("GET", ("Sec-Fetch-Site: cross-site",) + PAGE, 200),
        ):  # fmt: skip
            assert status_of(visitor.ask(method, target + "/", *lines)) == status
        scheme = "https" if visitor.context else "http"
        assert status_of(visitor.ask("POST", target + "/", "Origin: %s://127.0.0.1:%d" % (scheme, visitor.port))) == 200

    def test_keep_alive_is_shared_with_jupyter(self, target, visitor, wire):
        """The connection goes to the proxy and back to Tornado, request by request, with bodies of both framings."""
        for _ in range(3):
            wire.send(visitor.head("GET", target + "/a"))
            assert wire.message()[2].startswith(b"GET /a ")
            wire.send(visitor.head("GET", "/nb/api/status"))
            assert b"last_activity" in wire.message()[2]
            wire.send(visitor.head("POST", target + "/b", "Content-Length: 100000") + bytes(100000))
            assert wire.message()[2].split(b"\n")[1].startswith(b"100000 ")
            wire.send(visitor.head("POST", target + "/c", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n")
            assert wire.message()[2].split(b"\n")[1].startswith(b"3 ")
            wire.send(visitor.head("GET", "/nb/api"))
            assert b"version" in wire.message()[2]

    def test_pipelined_requests(self, target, visitor, wire):
        """What was sent ahead is neither lost nor mistaken for the body before it."""
        put = visitor.head("PUT", target + "/b", "Content-Length: 3") + b"abc"
        wire.send(visitor.head("GET", target + "/a") + visitor.head("GET", "/nb/api") + put + visitor.head("GET", target + "/c"))
        for begins in (b"GET /a ", b'{"version": ', b"PUT /b HTTP/1.1\n3 ", b"GET /c "):
            assert wire.message()[2].startswith(begins)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_large_upload(self, target, visitor, wire, chunked):
        answer = upload(wire, visitor, target + "/put", chunked=chunked)
        assert answer[2].split(b"\n")[1].decode() == "%d %s" % (MUCH, much_hash())
        wire.send(visitor.head("GET", "/nb/api"))
        assert b"version" in wire.message()[2]

    def test_a_large_download(self, target, visitor, wire):
        wire.send(visitor.head("GET", target + "/much"))
        assert download(wire) == much_hash()
        wire.send(visitor.head("GET", "/nb/api"))
        assert b"version" in wire.message()[2]

    def test_a_slow_client(self, jupyter, upstream, visitor, wire):
        """A peer that does not take or give stops the other side; nothing piles up in between."""
        sent = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MUCH)
            for _ in range(MUCH >> 20):
                wire.send(MEBIBYTE)
                sent.append(1)

        app = upstream(serve)
        before = rss_kib(jupyter.process.pid)
        wire.send(visitor.head("GET", "/nb/proxy/%d/" % app.port))
        steady(lambda: sum(sent))
        assert sum(sent) < 60
        assert rss_kib(jupyter.process.pid) - before < 16 << 10
        assert download(wire) == much_hash()

    def test_a_slow_app(self, jupyter, upstream, visitor, wire):
        sent = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            app.happened.wait(WAIT)
            count = len(wire.buffer)
            while count < MUCH:
                count += len(wire.sock.recv(1 << 20))
            wire.send(OK)

        def send():
            for _ in range(MUCH >> 20):
                wire.send(MEBIBYTE)
                sent.append(1)

        app = upstream(serve)
        before = rss_kib(jupyter.process.pid)
        wire.send(visitor.head("PUT", "/nb/proxy/%d/" % app.port, "Content-Length: %d" % MUCH))
        thread = threading.Thread(target=send)
        thread.start()
        steady(lambda: sum(sent))
        assert sum(sent) < 60
        assert rss_kib(jupyter.process.pid) - before < 16 << 10
        app.happened.set()
        thread.join(WAIT)
        assert wire.message()[2] == b"ok"

    def test_a_connection_that_was_handed_back_stays_open(self, upstream, visitor, wire):
        """Though part of the answer is still on its way to a client that takes its time."""
        body = bytes(4 << 20)
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)))
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        for _ in range(3):
            wire.send(visitor.head("GET", "/nb/proxy/%d/" % app.port) + visitor.head("GET", "/nb/api"))
            assert wire.message()[2] == body
            assert b"version" in wire.message()[2]

    def test_a_request_behind_a_chunked_body(self, upstream, visitor, wire):
        """It cannot be given back to Jupyter: the answer before it says so, and comes whole."""
        body = bytes(4 << 20)
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)))
        wire.send(visitor.head("POST", "/nb/proxy/%d/" % app.port, "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n" + visitor.head("GET", "/nb/api"))
        answer = wire.message()
        assert (len(answer[2]), fields_of(answer)["connection"]) == (len(body), "close")

    @pytest.mark.parametrize("behind", [b"", b"\r\n"])
    def test_whoever_leaves_with_bytes_behind_the_request(self, upstream, visitor, wire, behind):
        app = upstream(lambda wire, app: (wire.message(), app.happened.set(), wire.rest(), app.let_go.set()))
        wire.send(visitor.head("POST", "/nb/proxy/%d/" % app.port, "Content-Length: 3") + b"abc" + behind)
        assert app.happened.wait(WAIT)
        wire.close()
        if sys.platform == "linux":
            assert app.let_go.wait(WAIT)

    def test_clients_that_leave(self, jupyter, upstream, visitor):
        """At any moment: afterwards no descriptor is left open, and all is served as before."""
        descriptors = Path("/proc/%d/fd" % jupyter.process.pid)
        if not descriptors.exists():
            pytest.skip("this system has no /proc to count a process's descriptors in")

        def serve(wire, app):
            with contextlib.suppress(OSError, ValueError, TypeError):  # the requests break off
                serve_anything(wire, app)

        target = "/nb/proxy/%d" % upstream(serve).port
        heads = [
            visitor.head("GET", target + "/much"), visitor.head("GET", target + "/ws", *HANDSHAKE), visitor.head("GET", target + "/"), visitor.head("POST", target + "/", "Content-Length: 3") + b"abcGET /",
            visitor.head("PUT", target + "/", "Content-Length: 1000") + b"abc", visitor.head("PUT", target + "/", "Transfer-Encoding: chunked") + b"5\r\nab",
        ]  # fmt: skip
        before = len(list(descriptors.iterdir()))
        chance = random.Random(7)
        for number in range(60):
            with visitor.wire() as wire:
                wire.send(heads[number % len(heads)])
                if number % len(heads) < 4 and chance.random() < 0.5:
                    assert wire.more()  # the last two are not answered before they are whole
                if chance.random() < 0.5 and not visitor.context:
                    wire.reset()
        eventually(lambda: len(list(descriptors.iterdir())) <= before + 2)  # what idles in the pool goes by itself
        assert status_of(visitor.ask("GET", target + "/")) == 200

    def test_expect_continue(self, target, visitor, wire):
        wire.send(visitor.head("PUT", target + "/", "Content-Length: 3", "Expect: 100-continue"))
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        wire.send(b"abc")
        assert wire.message()[2].split(b"\n")[1].startswith(b"3 ")

    def test_events(self, target, visitor, wire):
        wire.send(visitor.head("GET", target + "/events"))
        assert wire.until(b"data: 1\n\n").endswith(b"data: 1\n\n")  # the second is not sent before that

    def test_websocket(self, target, visitor, wire):
        wire.send(visitor.head("GET", target + "/ws", *HANDSHAKE))
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
        for size in (1, 1000) + (30000,) * 100:  # over TLS one thread may not send while another receives
            wire.send(bytes(size))
            assert wire.exactly(size) == bytes(size)

    def test_whoever_leaves_is_noticed(self, upstream, visitor, wire):
        app = upstream(lambda wire, app: (app.messages.append(wire.until(b"\r\n\r\n")), app.happened.set(), wire.rest(), app.let_go.set()))
        wire.send(visitor.head("GET", "/nb/proxy/%d/" % app.port))
        assert app.happened.wait(WAIT)
        wire.close()
        assert app.let_go.wait(WAIT)

    def test_an_answer_cut_short_is_seen_to_be(self, upstream, visitor, wire):
        app = upstream(once(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"))
        wire.send(visitor.head("GET", "/nb/proxy/%d/" % app.port))
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        with contextlib.suppress(OSError):  # that is a way to see it, too, over TLS
            assert wire.exactly(10) == b"abc"

    @pytest.mark.parametrize("line", [b"X: a\x01b", b"Content-Length: +3", b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"Content-Length: 3\r\nContent-Length: 4", b"Transfer-Encoding: gzip, chunked"])
    def test_what_is_not_http_is_refused(self, app, target, visitor, wire, line):
        """By Tornado or by us, whose grammar is the stricter one; nothing of it reaches an app."""
        count = len(app.messages)
        wire.send(visitor.head("POST", target + "/")[:-2] + line + b"\r\n\r\nabc")
        assert re.match(b"HTTP/1.1 (400|501)", wire.until(b"\r\n\r\n"))
        assert len(app.messages) == count

    def test_activity(self, app, target, visitor, wire):
        """A server in use is not culled, by requests or by the bytes of a WebSocket."""

        def last():
            return json.loads(visitor.ask("GET", "/nb/api/status", "Authorization: token " + TOKEN)[2].decode())["last_activity"]

        wire.send(visitor.head("GET", target + "/ws", *HANDSHAKE))
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")

        def is_later(than):
            wire.send(b"a")
            wire.exactly(1)
            return last() > than

        for _ in range(2):
            before = last()
            eventually(lambda: is_later(before))  # noqa: B023

    def test_jupyter_beside_it(self, visitor):
        """Its kernels run, its own XSRF and origin checks hold."""
        assert status_of(visitor.ask("POST", "/nb/api/kernels", body=b"{}")) == 403
        token = "Authorization: token " + TOKEN
        kernel = json.loads(visitor.ask("POST", "/nb/api/kernels", token, body=b"{}")[2].decode())["id"]
        assert status_of(visitor.ask("GET", "/nb/api/kernels/%s/channels" % kernel, "Origin: http://evil.example", *HANDSHAKE)) == 403
        with visitor.wire() as wire:
            wire.send(visitor.head("GET", "/nb/api/kernels/%s/channels" % kernel, *HANDSHAKE))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
            header = {"msg_id": "a", "msg_type": "execute_request", "username": "", "session": "b", "version": "5.3"}
            content = {"code": "print(6 * 7)", "silent": False}
            send_frame(wire, json.dumps({"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}))
            while True:
                message = json.loads((receive_frame(wire) or b"{}").decode("latin-1"))
                if message.get("msg_type") == "stream":
                    break
            assert message["content"]["text"] == "42\n"
        assert status_of(visitor.ask("DELETE", "/nb/api/kernels/" + kernel, token, no_body=True)) == 204

    def test_a_page_in_lab(self, jupyter, upstream, tmp_path):
        """A Lab extension opens PageConfig.getBaseUrl() + "proxy/" + port: assets, fetch, upload, events, WebSocket."""
        app = upstream(serve_browser_app)
        extension = jupyter.log.parent / "extensions" / "port-proxy-test"
        (extension / "static").mkdir(parents=True, exist_ok=True)
        (extension / "static" / "remoteEntry.js").write_text(LAB_EXTENSION.replace("PORT", str(app.port)))
        about = {"name": "port-proxy-test", "version": "1.0.0", "jupyterlab": {"extension": True, "_build": {"load": "static/remoteEntry.js", "extension": "./extension"}}}
        (extension / "package.json").write_text(json.dumps(about))
        scheme = "https" if jupyter.context else "http"
        with chromium("%s://localhost:%d/nb/lab?token=%s" % (scheme, jupyter.port, TOKEN), "--ignore-certificate-errors"):
            assert app.happened.wait(60), "the browser did not report: it asked for %r; %s" % ([m[0] for m in app.messages], jupyter.said)
        check_browser_report(app, "/nb/proxy/%d/" % app.port)
        assert TOKEN not in repr(app.messages)


class TestBenchmark:
    @pytest.mark.parametrize("kind, bound", [("kept-alive", 4), ("WebSocket", 6)])
    def test_what_idles_takes_little(self, upstream, tmp_path, kind, bound):
        """A third of the bound, in KiB, is what it is; twice the bound is what a task and asyncio's streams for each take."""

        def serve(wire, app):
            with contextlib.suppress(AssertionError, OSError):
                while "upgrade" not in fields_of(wire.message(no_body=True)):
                    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                wire.send(SWITCHING)
                wire.rest()

        system = BenchSystem("port_proxy", upstream(serve).port, str(tmp_path))
        try:
            assert bench_idle(system, 250, bench_kept_alive if kind == "kept-alive" else lambda system: bench_open(system, 1)) < bound
        finally:
            system.close()

    def test_what_is_measured_has_a_processor_of_its_own(self):
        """Also when whoever starts it keeps to the other one already."""
        if len(CORES) < 2:
            pytest.skip("this machine has one processor, or does not say")
        run = "import os, test_port_proxy as tests; tests.pin(0, 0); tests.pin(0, -1); print(sorted(os.sched_getaffinity(0)))"
        done = subprocess.run([sys.executable, "-c", run], stdout=subprocess.PIPE, timeout=WAIT, cwd=str(HERE), check=True)
        assert done.stdout.decode().strip() == str(CORES[1:2])

    def test_it_runs_where_there_is_no_pytest(self):
        if not hasattr(os, "fork"):
            pytest.skip("the benchmark's upstream waits for its standard input, as Windows cannot")
        run = "import runpy, sys; sys.modules['pytest'] = None; sys.argv[:] = ['', 'bench', '--seconds', '0.05', '--repeats', '1']; runpy.run_path(%r, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", run % str(HERE / "test_port_proxy.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=4 * WAIT, cwd=str(HERE))
        assert (done.returncode, done.stderr) == (0, b"")
        for row in (b"200 B, 64 connections: requests/s", b"download: MB/s", b"upload: MB/s", b"WebSocket, 32 B, 64 connections: echoes/s"):
            assert re.search(re.escape(b"| " + row) + rb" \| [0-9.]+ \([0-9.]+-[0-9.]+\) \| [0-9.]+ ", done.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: `python3 test_port_proxy.py bench`, side by side on this machine; it needs no pytest
# ---------------------------------------------------------------------------------------------------------------------


class BenchUpstream(asyncio.Protocol):
    """What lies behind the proxies: answers GETs with as many bytes as their path says, swallows PUTs, echoes WebSockets."""

    BLOCK = bytes(1 << 20)

    def __init__(self):
        self.serve = self.next_request
        self.head = b""
        self.missing = 0  # of a body that comes, or of one that goes
        self.may_write = True

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.serve(data)

    def next_request(self, data):
        self.head += data
        if b"\r\n\r\n" not in self.head:
            return
        head, _, rest = self.head.partition(b"\r\n\r\n")
        self.head = b""
        if b"\r\nupgrade: websocket" in head.lower():
            self.transport.write(SWITCHING)
            self.serve = self.transport.write
        elif head.startswith(b"PUT"):
            self.missing = int(re.search(rb"content-length: ([0-9]+)", head.lower()).group(1))
            self.serve = self.swallow
            self.swallow(rest)
        else:
            size = int(head.split(b" ", 2)[1].rpartition(b"/")[2])
            first = min(size, 65536)
            self.missing = size - first
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % size + self.BLOCK[:first])
            self.pour()

    def swallow(self, data):
        self.missing -= len(data)
        if self.missing <= 0:
            self.serve = self.next_request
            self.transport.write(OK)

    def pour(self):
        while self.missing and self.may_write:
            count = min(self.missing, len(self.BLOCK))
            self.missing -= count
            self.transport.write(self.BLOCK[:count])

    def pause_writing(self):
        self.may_write = False

    def resume_writing(self):
        self.may_write = True
        self.pour()


def bench_upstream():
    """Serve until the standard input ends; the port is printed first."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = loop.run_until_complete(loop.create_server(BenchUpstream, "127.0.0.1", 0, backlog=1024))
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(0, loop.stop)
    loop.run_forever()


NGINX = """worker_processes 1; daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/log;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000; client_max_body_size 0; client_body_temp_path {scratch}/b; proxy_temp_path {scratch}/p;
fastcgi_temp_path {scratch}/f; uwsgi_temp_path {scratch}/u; scgi_temp_path {scratch}/s;
map $http_upgrade $connection_out {{ default upgrade; '' ''; }}
upstream app {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
server {{ listen 127.0.0.1:{port} backlog=1024;
location /proxy/{upstream}/ {{ proxy_pass http://app/; proxy_http_version 1.1; proxy_set_header Host $host; proxy_set_header Upgrade $http_upgrade;
proxy_set_header Connection $connection_out; proxy_buffering off; proxy_request_buffering off; proxy_buffer_size 64k; proxy_buffers 8 64k; }} }} }}
"""
HAPROXY = """global
 maxconn 8000
 nbthread 1
defaults
 mode http
 timeout connect 5s
 timeout client 600s
 timeout server 600s
 timeout tunnel 600s
 option http-no-delay
 http-reuse always
frontend front
 bind 127.0.0.1:{port}
 http-request replace-path /proxy/[0-9]+/(.*) /\\1
 default_backend app
backend app
 server app 127.0.0.1:{upstream}
"""


class BenchSystem:
    """One way to the upstream: directly, or through a proxy in a process of its own."""

    def __init__(self, name, upstream, scratch):
        self.name = name
        self.process, self.prefix, self.port = None, "", upstream
        self.started_in = None
        if name == "direct":
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        folder = Path(scratch) / name
        folder.mkdir(exist_ok=True)
        config = {"nginx": NGINX, "haproxy": HAPROXY}.get(name)
        if config:
            (folder / "config").write_text(config.format(scratch=folder, port=self.port, upstream=upstream))
        self.command = {
            "port_proxy": [sys.executable, PROGRAM, "--quiet", "--port", str(self.port)],
            "nginx": ["nginx", "-c", str(folder / "config"), "-p", str(folder)],
            "haproxy": ["haproxy", "-db", "-f", str(folder / "config")],
        }[name]
        self.prefix = "/proxy/%d" % upstream
        self.start()

    def start(self):
        begun = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pin(self.process.pid, -1)
        while not self.answers():
            assert self.process.poll() is None, "%s does not run" % self.name
            assert time.perf_counter() - begun < WAIT, "%s does not answer" % self.name
            time.sleep(0.001)
        self.started_in = (time.perf_counter() - begun) * 1000

    def answers(self):
        with contextlib.suppress(OSError), Wire.to(self.port) as wire:
            wire.send(self.request("GET", "/2"))
            return len(wire.message()[2]) == 2
        return False

    def request(self, method, path, *lines):
        host = "Host: localhost:%d" % self.port
        return "\r\n".join(("%s %s%s HTTP/1.1" % (method, self.prefix, path), host) + lines + ("", "")).encode()

    def cpu(self):
        """Seconds of processor time that the proxy has taken; None where the system does not tell, or there is none."""
        try:
            fields = Path("/proc/%d/stat" % self.process.pid).read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError):
            return None

    def close(self):
        if self.process:
            self.process.terminate()
            self.process.wait(WAIT)


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(pid, core):
    """Keep a process on one of the first two processors (0: the load, -1: what is measured), where there are two."""
    if len(CORES) > 1:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(pid, {CORES[:2][core]})


def bench_requests(system, connections, seconds, size=200):
    """GETs for `size` bytes on kept-alive connections: (answers, seconds); by wrk where it is installed."""
    ask = system.request("GET", "/%d" % size)
    if shutil.which("wrk") and seconds >= 1:
        url = "http://localhost:%d%s/%d" % (system.port, system.prefix, size)
        told = subprocess.run(["wrk", "-t1", "-c%d" % connections, "-d%ds" % seconds, url], stdout=subprocess.PIPE, check=True).stdout.decode()
        assert "Non-2xx" not in told, told
        return int(re.search(r"(\d+) requests in", told).group(1)), int(seconds)
    with Wire.to(system.port) as wire:
        wire.send(ask)
        answer = len(wire.until(b"\r\n\r\n")) + size
    return bench_rounds([Wire.to(system.port) for _ in range(connections)], ask, answer, seconds)


def bench_new_connections(system, seconds, size=200):
    """GETs for `size` bytes, each on a connection of its own, one after the other."""
    ask = system.request("GET", "/%d" % size, "Connection: close")
    begun, answers = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        with Wire.to(system.port) as wire:
            wire.send(ask)
            assert len(wire.message()[2]) == size
        answers += 1
    return answers, time.perf_counter() - begun


def bench_websockets(system, connections, seconds):
    """Messages of 32 bytes there and back."""
    wires = bench_open(system, connections)
    message = bytes([0x82, 0x80 | 26]) + bytes(4 + 26)
    return bench_rounds(wires, message, len(message), seconds)


def bench_open(system, connections):
    """WebSockets, opened one after the other."""
    wires = [Wire.to(system.port) for _ in range(connections)]
    for wire in wires:
        wire.send(system.request("GET", "/", *HANDSHAKE))
        assert b" 101 " in wire.until(b"\r\n\r\n")
    return wires


def bench_rounds(wires, ask, answer, seconds):
    """Send `ask` on all connections, and again on each when `answer` bytes have come: (answers, seconds)."""
    missing = {wire.sock: answer for wire in wires}
    begun, answers = time.perf_counter(), 0
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            selector.register(wire.sock, selectors.EVENT_READ)
            wire.sock.send(ask)
        while time.perf_counter() - begun < seconds:
            for key, _ in selector.select(1):
                missing[key.fileobj] -= len(key.fileobj.recv(65536))
                if not missing[key.fileobj]:
                    answers += 1
                    missing[key.fileobj] = answer
                    key.fileobj.send(ask)
    taken = time.perf_counter() - begun
    for wire in wires:
        wire.close()
    return answers, taken


def bench_download(system, megabytes):
    """One body of so many MB: (MB, seconds)."""
    with Wire.to(system.port) as wire:
        begun = time.perf_counter()
        wire.send(system.request("GET", "/%d" % (megabytes * 1000000)))
        wire.until(b"\r\n\r\n")
        left, block = megabytes * 1000000 - len(wire.buffer), bytearray(1 << 20)
        while left:
            count = wire.sock.recv_into(block)
            assert count
            left -= count
        return megabytes, time.perf_counter() - begun


def bench_upload(system, megabytes):
    """One body of so many MB: (MB, seconds)."""
    with Wire.to(system.port) as wire:
        begun = time.perf_counter()
        wire.send(system.request("PUT", "/", "Content-Length: %d" % (megabytes * 1000000)))
        for _ in range(megabytes):
            wire.sock.sendall(BenchUpstream.BLOCK[:1000000])
        assert wire.message()[2] == b"ok"
        return megabytes, time.perf_counter() - begun


def bench_idle(system, count, open_one):
    """KiB that a proxy takes for each of `count` connections that idle; it is started anew, since one that has had others
    takes theirs."""
    system.close()
    system.start()
    open_one(system)[0].close()
    before = rss_kib(system.process.pid)
    wires = [open_one(system)[0] for _ in range(count)]
    grown = rss_kib(system.process.pid) - before
    for wire in wires:
        wire.close()
    return grown / count


def bench_kept_alive(system):
    wire = Wire.to(system.port)
    wire.send(system.request("GET", "/200"))
    wire.message()
    return [wire]


def bench(names, seconds, repeats):
    """Measure all systems one right after the other, again and again, and print medians with their spread."""
    megabytes, clients, websockets = (500, 1000, 500) if seconds >= 1 else (20, 100, 50)
    work = [
        ("200 B, 64 connections: requests/s", "CPU us each", 1e6, lambda system: bench_requests(system, 64, seconds)),
        ("200 B, 1 connection: requests/s", "CPU us each", 1e6, lambda system: bench_requests(system, 1, seconds)),
        ("200 B, a new connection each: requests/s", "CPU us each", 1e6, lambda system: bench_new_connections(system, seconds)),
        ("download: MB/s", "CPU ms per GB", 1e6, lambda system: bench_download(system, megabytes)),
        ("upload: MB/s", "CPU ms per GB", 1e6, lambda system: bench_upload(system, megabytes)),
        ("WebSocket, 32 B, 64 connections: echoes/s", "CPU us each", 1e6, lambda system: bench_websockets(system, 64, seconds)),
    ]
    idle = [
        ("start to the first answer: ms", lambda system: system.started_in),
        ("idle: MiB", lambda system: rss_kib(system.process.pid) / 1024),
        ("idle kept-alive client: KiB", lambda system: bench_idle(system, clients, bench_kept_alive)),
        ("idle WebSocket: KiB", lambda system: bench_idle(system, websockets, lambda system: bench_open(system, 1))),
    ]
    results = {}

    def note(row, name, value):
        results.setdefault(row, {}).setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as scratch, subprocess.Popen([sys.executable, str(HERE / "test_port_proxy.py"), "bench-upstream"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        os.chmod(scratch, 0o755)
        upstream = int(server.stdout.readline())
        pin(server.pid, 0)
        pin(0, 0)
        for _ in range(repeats):
            systems = [BenchSystem(name, upstream, scratch) for name in names]
            try:
                for row, measure in idle if Path("/proc/self/status").exists() else idle[:1]:
                    for system in systems[1:]:
                        note(row, system.name, measure(system))
                for row, cost, unit, measure in work:
                    for system in systems:
                        before = system.cpu()
                        count, taken = measure(system)
                        note(row, system.name, count / taken)
                        if before is not None and count:
                            note(row.split(":")[0] + ": " + cost, system.name, (system.cpu() - before) / count * unit)
            finally:
                for system in systems:
                    system.close()
        server.stdin.close()
    bench_report(results, names)


def bench_report(results, names):
    """A table in Markdown: medians with the least and the most, and how port_proxy compares with the others."""
    peers = [name for name in names if name not in ("direct", "port_proxy")] or ["direct"]
    print("| work |", " | ".join(names), "|", " | ".join("port_proxy : " + peer for peer in peers), "|")
    print("|---" * (1 + len(names) + len(peers)) + "|")
    for row, measured in results.items():
        cells = [bench_cell(measured[name]) if name in measured else "" for name in names]
        for peer in peers:
            pairs = zip(measured["port_proxy"], measured.get(peer, []))
            cells.append(bench_cell([ours / theirs for ours, theirs in pairs if theirs]))
        print("|", row, "|", " | ".join(cells), "|")


def bench_cell(values):
    def short(value):
        return "%.0f" % value if value >= 100 else "%.1f" % value if value >= 10 else "%.2f" % value

    return "%s (%s-%s)" % tuple(map(short, (sorted(values)[len(values) // 2], min(values), max(values)))) if values else ""


def bench_main(arguments=None):
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Tests are run by pytest; this measures.")
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    command = commands.add_parser("bench", help="compare port_proxy with what else is installed: nginx, haproxy")
    command.add_argument("--seconds", type=float, default=2, help="length of one measurement (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, help="how often each is measured (default: %(default)s)")
    commands.add_parser("bench-upstream")
    options = parser.parse_args(arguments)
    if options.command == "bench-upstream":
        bench_upstream()
        return
    names = ["direct", "port_proxy"] + [name for name in ("nginx", "haproxy") if shutil.which(name)]
    cores = len(CORES) or os.cpu_count()
    load = "wrk" if shutil.which("wrk") else "its own load, which is what limits the fastest"
    print("CPython %s, %s, %d processors, %s" % (sys.version.split()[0], platform.platform(), cores, load), flush=True)
    bench(names, options.seconds, options.repeats)


if __name__ == "__main__":
    bench_main()
