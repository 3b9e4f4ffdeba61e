"""Tests of port_proxy.py, in the order of its sections; on real sockets and raw bytes where behaviour is on the wire.

Every wait has a bound (`WAIT`), nothing sleeps to pass, and each test leaves its loop without tasks and connections.
"""

import ast
import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import port_proxy
from port_proxy import (
    CHUNKED,
    LENGTH,
    NO_BODY,
    UNTIL_CLOSE,
    Body,
    Config,
    Framing,
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
    framed,
    is_allowed,
    is_own_origin,
    is_websocket,
    normal_allowlist,
    normal_base,
    parse_request,
    parse_response,
    request_for_upstream,
    request_framing,
    response_for_client,
    response_framing,
    serialise_request,
    serialise_response,
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

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def end(self):
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
            self.wires.append(wire)
            thread = threading.Thread(target=self._serve, args=(wire,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _serve(self, wire):
        try:
            self.serve(wire, self)
        except Exception as error:
            self.failures.append(error)
        finally:
            wire.close()

    def close(self):
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

    def __init__(self):
        self.complaints = []
        self.loop = asyncio.new_event_loop()
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

    def close(self):
        self.background.do(self.proxy.close())


def request(method, target, *lines, body=b""):
    return "\r\n".join(("%s %s HTTP/1.1" % (method, target), "Host: here:8888") + lines + ("", "")).encode("latin-1") + body


def eventually(condition):
    """Wait until `condition()` is true, at most WAIT seconds."""
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit, "this did not come about"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def background():
    background = Background()
    yield background
    tasks = background.do(_other_tasks())
    background.close()
    assert not tasks


async def _other_tasks():
    all_tasks = getattr(asyncio, "all_tasks", None) or asyncio.Task.all_tasks
    current = getattr(asyncio, "current_task", None) or asyncio.Task.current_task
    return [task for task in all_tasks() if task is not current()]


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
        ],
        ids=case_id,
    )  # fmt: skip
    def test_refused(self, options):
        with pytest.raises(ValueError):
            PortProxy(Config(**options))

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
    b"1;" + b"a" * 5000, b"1;" + b"a" * 5000 + b"\r\na\r\n", b"0\r\n" + b"X: y\r\n" * 5000, b"0\r\nX: " + b"y" * 20000, b"zz", b"12345678901234567",
]  # fmt: skip


class Pieces:
    """As much of a stream as `Body.at_hand` needs: bytes that have come."""

    def __init__(self):
        self.buffer = bytearray()


def decode(framing, pieces):
    """The body that the pieces make and what is left behind it; ProxyError as `Body` raises it; None if it is not whole."""
    stream = Pieces()
    body = Body(stream, framing, DEFAULT)
    data = b""
    for piece in pieces:
        stream.buffer += piece
        data += body.at_hand()
    return (data, bytes(stream.buffer)) if body.finished else None


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

    def test_framed_is_the_inverse(self):
        chance = random.Random(9)
        for _ in range(300):
            pieces = [bytes(chance.randrange(256) for _ in range(chance.randrange(40))) for _ in range(chance.randrange(5))]
            raw = b"".join(framed(piece, Framing(CHUNKED), False) for piece in pieces) + framed(b"", Framing(CHUNKED), True)
            cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(4))
            split = [raw[a:b] for a, b in zip([0] + cuts, cuts + [len(raw)])]
            assert decode(Framing(CHUNKED), split) == (b"".join(pieces), b"")
        assert framed(b"abc", Framing(LENGTH, 3), True) == b"abc"
        assert framed(b"abc", Framing(CHUNKED), True) == b"3\r\nabc\r\n0\r\n\r\n"

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
        try:
            app = upstream(answering(OK), host="::1")
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
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
VISIT = Visit("192.0.2.7", "http", "here:8888")


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
        fields = dict(sent_upstream(visit=VISIT._replace(authority=authority)).fields)
        assert fields.get("X-Forwarded-Port") == port
        assert fields.get("X-Forwarded-Host") == (authority or None)

    @pytest.mark.parametrize(
        "field",
        [
            ("Connection", "close"), ("Keep-Alive", "timeout=5"), ("Proxy-Connection", "keep-alive"), ("TE", "trailers"), ("Trailer", "X"),
            ("Transfer-Encoding", "chunked"), ("Upgrade", "h2c"), ("Upgrade", "websocket"), ("Proxy-Authorization", "x"), ("Content-Length", "5"),
            ("Forwarded", "for=1.2.3.4"), ("x-forwarded-for", "1.2.3.4"), ("X-FORWARDED-HOST", "evil"), ("X-Forwarded-Prefix", "/evil"), ("X-Forwarded-Context", "/evil"),
            ("X-ProxyContextPath", "/evil"), ("X-Forwarded-Port", "1"), ("X-Forwarded-Proto", "https"),
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
            ("http://localhost:8080//evil/x", "/proxy/8080//evil/x", "/.//evil/x"), ("http://u@localhost:8080/x", "http://u@localhost:8080/x", "http://u@localhost:8080/x"),
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
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Origin: http://here:8888", "Origin: http://here:8888", *HANDSHAKE)) == 403
        assert app.connections == 0

    def test_upgrade_with_a_body_is_refused(self, proxy, upstream):
        app = upstream(answering(OK))
        assert status_of(proxy.ask(request("GET", "/proxy/%d/" % app.port, "Content-Length: 1", *HANDSHAKE, body=b"a"))) == 400
        assert app.connections == 0


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
    def test_an_idle_connection_that_stirs_is_dropped(self, proxy, upstream, raw):
        """Bytes or the end, come while it idles, are no answer to the next request."""

        def serve(wire, app):
            app.messages.append(wire.message())
            wire.send(OK)
            app.happened.wait(WAIT)
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

    @pytest.mark.parametrize("bind", ["127.0.0.1", "0.0.0.0"])
    def test_the_proxy_does_not_call_itself(self, start, bind):
        proxy = start(bind=bind)
        for form in ("/proxy/%d/", "/proxy/absolute/%d/", "/proxy/127.0.0.1:%d/proxy/"):
            assert status_of(proxy.get(form % proxy.port)) == 508


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------

NAVIGATION = ("Accept: text/html,application/xhtml+xml,*/*;q=0.8", "Sec-Fetch-Mode: navigate")


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
        fields = dict(response.fields)
        assert fields["Content-Type"] == "text/html; charset=utf-8"
        assert fields["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in fields["Content-Security-Policy"]
        digest = base64.b64encode(hashlib.sha256(re.search(b"<style>(.*)</style>", response.body).group(1)).digest())
        assert "'sha256-%s'" % digest.decode() in fields["Content-Security-Policy"]

    def test_nothing_of_the_request_is_reflected(self, proxy):
        evil = "<script>alert(1)</script>"
        for target in ("/" + evil, "/proxy/" + evil, "/proxy/1/../" + evil, "/proxy/1?" + evil, "/proxy/%s:80/" % evil):
            for lines in ((), NAVIGATION):
                assert b"<script" not in proxy.get(target, *lines)[2]

    def test_forms_page(self, proxy):
        for target in ("/proxy", "/proxy/"):
            page = proxy.get(target, *NAVIGATION)
            assert (status_of(page), fields_of(page)["content-type"]) == (200, "text/html; charset=utf-8")
            text = proxy.get(target)
            assert fields_of(text)["content-type"] == "text/plain; charset=utf-8"
            for form in (b"/proxy/8080/", b"/proxy/absolute/8080/", b"/proxy/db1.example.org:8080/"):
                assert form in page[2]
                assert form in text[2]
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 0"))) == 405

    def test_head_has_no_body(self, proxy):
        with proxy.wire() as wire:
            wire.send(request("HEAD", "/proxy/"), request("HEAD", "/nothing"), request("GET", "/proxy/"))
            assert status_of(wire.message(no_body=True)) == 200
            assert status_of(wire.message(no_body=True)) == 404
            assert wire.message()[2]


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

    def test_interim_answers_are_passed_on(self, proxy, upstream):
        app = upstream(answering(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 9\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message(no_body=True)[:2] == ("HTTP/1.1 103 Early Hints", [("Link", "</a>")])
            assert status_of(wire.message(no_body=True)) == 102
            assert wire.message()[2] == b"ok"
            wire.send(b"GET /proxy/%d/ HTTP/1.0\r\n\r\n" % app.port)
            assert status_of(wire.message()) == 200

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
            wire.until(b"t\r\n")
            app.happened.set()
            assert wire.until(b"0\r\n\r\n").endswith(b"2\r\nwo\r\n0\r\n\r\n")


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
                        wire.send(framed(body[at : at + 40000], Framing(CHUNKED), False))
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
                app.let_go.wait(WAIT)

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
                    assert app.let_go.wait(WAIT)

    def test_a_client_that_had_ended_its_side_is_answered(self, proxy, upstream):
        """`printf 'GET ...' | nc -N`: the request and its end are there before the upstream is connected."""
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            proxy.background.loop.call_soon_threadsafe(time.sleep, 0.3)  # so that both arrive as one
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.end()
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""

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
            wire.send(framed(block, Framing(CHUNKED if chunked else LENGTH), False))
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

    def test_a_half_closed_tunnel_that_stands_still_is_ended(self, start, upstream):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING), app.let_go.wait(WAIT)))
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
            proxy.background.loop.call_soon_threadsafe(time.sleep, 0.3)
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

    def test_a_port_in_use(self, background, proxy):
        with pytest.raises(OSError):
            background.do(PortProxy(Config(port=proxy.port)).start())


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shell_proxy(*options, **popen):
    """Start the program as a user would: (process, port). It must end at SIGTERM with status 0, silently."""
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-X", "dev"] if sys.version_info >= (3, 7) else [sys.executable]
    process = subprocess.Popen(command + [PROGRAM, "--port", "0"] + list(options), stdout=subprocess.PIPE, stderr=errors, **popen)
    try:
        banner = process.stdout.readline().decode()
        yield process, int(re.search(r"http://[^/]*:(\d+)/", banner).group(1))
        process.terminate()
        assert process.wait(WAIT) == 0
        errors.seek(0)
        noise = errors.read().decode()
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
            r"It reaches every port of this machine as \1<port>/, and on a\.example\.org, \*\.b, c\.\n",
            lines,
        )

    @pytest.mark.parametrize(
        "options, says",
        [
            (("--base", "proxy"), "the base must be a path"), (("--port", "65536"), "a number from 0 to 65535"), (("--port", "x"), "invalid int value"),
            (("--host-allowlist", "a b"), "an allowed host is"), (("--head-timeout", "0"), "head_timeout must be greater than 0"), (("--bind", "192.0.2.1"), "no address of this machine"),
            (("--bind", "nowhere.invalid"), "no address of this machine"), (("--verbose", "--quiet"), "not allowed with"), (("--frob",), "unrecognized arguments"),
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
        for name in ("--base", "--bind", "--port", "--host-allowlist", "--preserve-host", "--verbose", "--quiet", "--version", "--head-timeout", "examples:"):
            assert name in output
        assert run_program("--version")[:2] == (0, "port_proxy %s\n" % port_proxy.__version__)

    def test_verbose_logs_a_line_per_request(self, upstream):
        app = upstream(answering(OK))
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--verbose"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        port = int(re.search(r":(\d+)/", process.stdout.readline().decode()).group(1))
        with Wire.to(port) as wire:
            wire.send(request("GET", "/proxy/%d/a" % app.port))
            assert wire.message()[2] == b"ok"
        assert "GET /proxy/%d/a -> localhost:%d 200" % (app.port, app.port) in process.stderr.readline().decode()
        process.terminate()
        _, errors = process.communicate(timeout=WAIT)
        assert (process.returncode, errors) == (0, b"")

    def test_a_stop_with_everything_under_way_is_quiet(self, upstream):
        """Requests, uploads, tunnels and half heads: the exit status is 0 and nothing is said about any of them."""
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING if app.connections % 2 else b""), app.let_go.wait(WAIT)))
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

    def test_browser(self, proxy, upstream):
        """A page with relative assets, fetch, a form upload, server-sent events and a WebSocket, in headless Chromium."""
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not browser:
            pytest.skip("no Chromium is installed")
        app = upstream(serve_browser_app)
        with tempfile.TemporaryDirectory() as profile:
            process = subprocess.Popen(
                [
                    browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                    "--disable-component-update", "--disable-sync", "--user-data-dir=" + profile, "--remote-debugging-port=0",
                    "http://localhost:%d/proxy/%d" % (proxy.port, app.port),
                ],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                assert app.happened.wait(60), "the browser did not report: it asked for %r" % [m[0] for m in app.messages]
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        report = json.loads(next(message[2] for message in app.messages if message[0].startswith("POST /report ")).decode())
        assert report == {"fetch": "fetched", "upload": 300000, "events": ["1", "2", "3"], "socket": "echo", "style": "rgb(1, 2, 3)", "path": "/proxy/%d/" % app.port}
        origins = {fields_of(message).get("origin") for message in app.messages}
        assert origins == {None, "http://localhost:%d" % app.port}


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
