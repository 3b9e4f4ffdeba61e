"""Tests of port_proxy.py, in the order of its sections; on real sockets and raw bytes where behaviour is on the wire.

Every wait has a bound (`WAIT`), nothing sleeps to pass, and each test leaves its loop without tasks and connections.
"""

import argparse
import ast
import asyncio
import base64
import calendar
import contextlib
import errno
import gzip
import hashlib
import html
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
    NO_BODY,
    UNTIL_CLOSE,
    ChunkedDecoder,
    ClientInfo,
    Config,
    Framing,
    Headers,
    Hub,
    LengthDecoder,
    PortProxy,
    ProxyError,
    TokenGate,
    Truncated,
    UntilCloseDecoder,
    authority_of,
    body_decoder,
    check_partial_head,
    checked_config,
    client_info,
    cookie_name,
    cookie_values,
    find_route,
    host_form,
    host_of,
    is_allowed,
    is_authority,
    is_below,
    is_domain,
    is_home,
    is_own_origin,
    normal_allowlist,
    normal_base,
    normal_domain,
    parse_request,
    parse_response,
    path_below,
    port_in_host,
    request_for_upstream,
    request_framing,
    response_framing,
    response_lines,
    route_to_port,
    serialise,
)  # fmt: skip

HERE = Path(__file__).resolve().parent
PROGRAM = str(HERE / "port_proxy.py")
WAIT = 30.0
DEFAULT = Config()
LIMITS = [name for name in Config._fields if name.startswith("max_") or name.endswith("_timeout")]


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
        options.setdefault("allow_hostnames", ("*",))
        self.proxy = background.do(PortProxy(Config(**options)).start())
        self.port = self.proxy.port

    def open_connections(self):
        """How many connections of clients the proxy has not closed yet."""
        return count_connections(local_port=self.port)

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


def count_connections(local_port=None, remote_port=None):
    """How many TCP connections of this machine are open at their own end, as the kernel's table has them (Linux)."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="ascii") as file:
            for row in file.read().splitlines()[1:]:
                _, local, remote, state = row.split()[:4]
                is_open = state in ("01", "08")  # ESTABLISHED, CLOSE_WAIT
                ports = [int(end.rpartition(":")[2], 16) for end in (local, remote)]
                count += is_open and local_port in (None, ports[0]) and remote_port in (None, ports[1])
    return count


def narrow(port):
    """Make the kernel take little at a time on this process's connections to `port`, as a slow link would."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, IndexError):
            with socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as sock:  # a copy: the connection stays
                if sock.getpeername()[1] == port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


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


def running_loop():
    background = Background()
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
        if sys.platform == "linux" and running.port:
            eventually(lambda running=running: not running.open_connections())
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
    @pytest.fixture
    def readme(self):
        return (HERE / "README.md").read_text(encoding="utf-8")

    @pytest.fixture
    def options(self, capsys):
        """All options of the command line, as its full help lists them."""
        with pytest.raises(SystemExit):
            port_proxy.main(["--help-all"])
        options = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.M)
        assert len(options) > 10
        return options

    def test_sections_use_only_names_from_above(self):
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

    def test_import_needs_the_standard_library_alone(self):
        """It also starts no thread, and configures no logging."""
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

    def test_readme_names_every_option(self, readme, options):
        assert [option for option in options if "`%s" % option not in readme] == []

    @pytest.mark.parametrize("name", LIMITS)
    def test_readme_gives_the_default_of_every_limit(self, readme, name):
        row = re.search(r"^\| `--%s` \|.*\| ([0-9.]+) \|$" % name.replace("_", "-"), readme, re.M)
        assert row, "no row for " + name
        assert float(row.group(1)) == getattr(DEFAULT, name)

    def test_readme_names_every_field_that_differs_from_its_option(self, readme, options):
        embedding = readme[readme.index("## Embedding") :]
        fields_named_alike = {option[2:].replace("-", "_") for option in options}
        for name in set(Config._fields) - fields_named_alike - {"hub"}:
            assert name + "`" in embedding or name + "=" in embedding

    def test_readme_code_for_embedding_runs(self, readme):
        code = re.search(r"## Embedding.*?```python\n(.*?)```", readme, re.DOTALL).group(1)
        if sys.version_info < (3, 7):
            code = re.sub(r"asyncio\.run\(serve\(\)\)  # Python 3\.6: ", "", code)
        command = [sys.executable, "-c", code.replace("sleep(3600)", "sleep(0)")]
        done = subprocess.run(command, cwd=str(HERE), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT)
        assert re.fullmatch(rb"http://127\.0\.0\.1:(\d+)/proxy/ \1\r?\n", done.stdout)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_help_lists_every_limit(self, options):
        assert [name for name in LIMITS if "--" + name.replace("_", "-") not in options] == []


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


class TestConfig:
    @pytest.mark.parametrize(
        "given, normal",
        [
            ("/proxy", "/proxy"), ("/proxy/", "/proxy"), ("/", ""), ("", ""), ("/user/ana/proxy", "/user/ana/proxy"),
            ("/user/al%40ice", "/user/al%40ice"),
        ],
    )  # fmt: skip
    def test_base_loses_its_last_slash(self, given, normal):
        assert PortProxy(Config(base=given)).config.base == normal

    @pytest.mark.parametrize(
        "options",
        [
            {"base": "proxy"}, {"base": "/a//b"}, {"base": "//"}, {"base": "/a/../b"}, {"base": "/a/%2E"},
            {"base": "/a b"}, {"base": "/a?b"}, {"base": "/a\r\nX: y"}, {"base": "/ä"}, {"base": "/a;b"}, {"port": -1},
            {"port": 65536}, {"head_timeout": 0}, {"head_timeout": float("nan")}, {"max_fields": -1},
            {"host_allowlist": "a.example.org"}, {"host_allowlist": ["a b"]}, {"host_allowlist": [""]},
            {"host_allowlist": ["a:80"]}, {"host_allowlist": ["user@host"]}, {"host_allowlist": ["a[bc]d"]},
            {"host_allowlist": ["[::1"]}, {"host_allowlist": ["::1]"]}, {"allow_hostnames": "*.example.org"},
            {"allow_origins": "*"}, {"trusted_proxies": "unix"}, {"trusted_proxies": ["a"]}, {"upstream_tls": "8443"},
            {"keyfile": "a"}, {"token": "a b"}, {"token": "\xe4"}, {"domains": ["127.0.0.1"]},
        ],
        ids=case_id,
    )  # fmt: skip
    def test_value_without_sense_is_refused(self, options):
        with pytest.raises(ValueError):
            PortProxy(Config(**options))

    @pytest.mark.parametrize(
        "field, value, says",
        [
            ("port", "80", "a whole number, not str"), ("port", True, "a whole number, not bool"),
            ("port", 80.0, "a whole number, not float"), ("port", None, "a whole number, not NoneType"),
            ("head_timeout", "3", "a number, not str"), ("head_timeout", True, "a number, not bool"),
            ("bind", None, "a string, not NoneType"), ("base", b"/a", "a string, not bytes"),
            ("whole_origin", "no", "True or False, not str"), ("preserve_host", 1, "True or False, not int"),
            ("any_owner", None, "True or False, not NoneType"), ("token", 5, "a string, not int"),
            ("certfile", 5, "a path, not int"), ("authorize", "me", "an asynchronous callable, not str"),
            ("hub", {}, "a Hub, not dict"), ("upstream_tls", (8443,), "a sequence of strings, not tuple"),
            ("domains", None, "a sequence of strings, not NoneType"),
            ("allow_origins", "*", "a sequence of strings, not str"),
            ("host_allowlist", [b"a"], "a sequence of strings, not list"),
            ("trusted_proxies", 1, "a sequence of strings, not int"),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_value_of_another_type_is_refused(self, field, value, says):
        """Otherwise the mistake of a program would go unnoticed: whole_origin="no" would mean yes."""
        with pytest.raises(ValueError) as caught:
            PortProxy(Config(**{field: value}))
        assert str(caught.value) == "%s must be %s" % (field, says)

    @pytest.mark.parametrize(
        "options",
        [
            {"head_timeout": 3}, {"host_allowlist": ["a"]}, {"domains": {"b"}}, {"authorize": print},
            {"whole_origin": True}, {"certfile": Path("a")}, {"token": "x"},
        ],
        ids=case_id,
    )  # fmt: skip
    def test_value_of_a_related_type_is_accepted(self, options):
        PortProxy(Config(**options))

    def test_host_allowlist_gets_its_normal_form(self):
        assert PortProxy(Config(host_allowlist=["[FE80::1]", "a"])).config.host_allowlist == ("fe80::1", "a")


# ---------------------------------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------------------------------

ROUTES = [  # base, target, (host, port, prefix, absolute), path, query, the target that the app gets
    ("/proxy", "/proxy/8080/a/b?q", ("localhost", 8080, "/proxy/8080", False), "/a/b", "?q", "/a/b?q"),
    ("/proxy", "/proxy/8080", ("localhost", 8080, "/proxy/8080", False), "", "", "/"),
    ("/proxy", "/proxy/8080?q=/x", ("localhost", 8080, "/proxy/8080", False), "", "?q=/x", "/?q=/x"),
    ("/proxy", "/proxy/1/", ("localhost", 1, "/proxy/1", False), "/", "", "/"),
    (
        "/proxy", "/proxy/65535/%2F//..%2f/%20?",
        ("localhost", 65535, "/proxy/65535", False), "/%2F//..%2f/%20", "?", "/%2F//..%2f/%20?",
    ),
    (
        "/proxy", "/proxy/8080//a/./b/../c",
        ("localhost", 8080, "/proxy/8080", False), "//a/./b/../c", "", "//a/./b/../c",
    ),
    (
        "/proxy", "/proxy/absolute/8080/a?q",
        ("localhost", 8080, "/proxy/absolute/8080", True), "/a", "?q", "/proxy/absolute/8080/a?q",
    ),
    (
        "/proxy", "/proxy/absolute/8080",
        ("localhost", 8080, "/proxy/absolute/8080", True), "", "", "/proxy/absolute/8080",
    ),
    (
        "/proxy", "/proxy/DB1.example.org:81/a",
        ("db1.example.org", 81, "/proxy/DB1.example.org:81", False), "/a", "", "/a",
    ),
    (
        "/proxy", "/proxy/absolute/h_1-x:81/a",
        ("h_1-x", 81, "/proxy/absolute/h_1-x:81", True), "/a", "", "/proxy/absolute/h_1-x:81/a",
    ),
    ("/proxy", "/proxy/[::1]:81/a", ("::1", 81, "/proxy/[::1]:81", False), "/a", "", "/a"),
    (
        "/proxy", "/proxy/absolute/[FE80::1]:81/",
        ("fe80::1", 81, "/proxy/absolute/[FE80::1]:81", True), "/", "", "/proxy/absolute/[FE80::1]:81/",
    ),
    ("", "/8080/a", ("localhost", 8080, "/8080", False), "/a", "", "/a"),
    ("", "/absolute/8080/a", ("localhost", 8080, "/absolute/8080", True), "/a", "", "/absolute/8080/a"),
    ("/user/ana/proxy", "/user/ana/proxy/8080/a", ("localhost", 8080, "/user/ana/proxy/8080", False), "/a", "", "/a"),
    (
        "/user/al%40ice.x%2By", "/user/al@ice.x+y/8080/a",
        ("localhost", 8080, "/user/al@ice.x+y/8080", False), "/a", "", "/a",
    ),
    (
        "/user/al%40ice.x%2By", "/%75ser/al%40ice.x%2by/8080/a",
        ("localhost", 8080, "/%75ser/al%40ice.x%2by/8080", False), "/a", "", "/a",
    ),
]  # fmt: skip
NO_ROUTES = [
    "/", "/8080/", "/proxyx/8080/", "/proxy8080/", "/Proxy/8080/", "//proxy/8080/", "/proxy//8080/", "/./proxy/8080/",
    "/a/../proxy/8080/", "/proxy/./8080/", "/proxy%2F8080/", "/proxy/%38080/", "/proxy/8080%2F", "/proxy/+80/",
    "/proxy/-80/", "/proxy/08080/", "/proxy/0/", "/proxy/65536/", "/proxy/99999/", "/proxy/8_0/", "/proxy/8080;a/",
    "/proxy/8080:/", "/proxy/:8080/", "/proxy/a:/", "/proxy/a/", "/proxy/a:b/", "/proxy/a:80:81/", "/proxy/u@a:80/",
    "/proxy/u:p@a:80/", "/proxy/localhost%3A80/", "/proxy/a%2eb:80/", "/proxy/a%00:80/", "/proxy/.a:80/",
    "/proxy/-a:80/", "/proxy/::1:80/", "/proxy/[::1]/", "/proxy/[::1]:0/", "/proxy/[]:80/", "/proxy/[::1]80/",
    "/proxy/[::1%25eth0]:80/", "/proxy/[v1.a]:80/", "/proxy/absolute", "/proxy/absolute/", "/proxy/absolute/a/",
    "/proxy/absolute//8080/", "/proxy/absolute/absolute/8080/", "/proxy/absolutely/8080/", "/proxy/ABSOLUTE/8080/",
    "/proxy/a*:80/",
]  # fmt: skip
LEAVING = [
    "/..", "/../", "/../9090/", "/a/../..", "/./..", "/%2e%2e/", "/%2E./", "/.%2e", "/a/%2e%2e/%2E%2E/b",
    "/a/../../8080/",
]  # fmt: skip
STAYING = ["/.", "/%2e/a", "/a/..", "/a/%2e%2E/", "/a/b/../../c", "/a//../..", "/...", "/..a", "/a?/../..", "/..%2f"]


class TestRoutes:
    @pytest.mark.parametrize("base, target, route, path, query, _", ROUTES, ids=case_id)
    def test_route_is_found_in_the_raw_target(self, base, target, route, path, query, _):
        found, found_path, found_query = find_route(base, target)
        assert (found.host, found.port, found.prefix, found.absolute) == route
        assert (found_path, found_query) == (path, query)

    @pytest.mark.parametrize(
        "base, target, path, query",
        [
            ("/proxy", "/proxy", "", ""), ("/proxy", "/proxy/", "/", ""), ("/proxy", "/proxy/?a", "/", "?a"),
            ("/proxy", "/%70roxy?a", "", "?a"), ("", "/", "/", ""), ("", "/?8080", "/", "?8080"),
        ],
    )  # fmt: skip
    def test_base_itself_has_no_route(self, base, target, path, query):
        assert find_route(base, target) == (None, path, query)

    @pytest.mark.parametrize("target", NO_ROUTES)
    def test_target_without_a_port_is_refused(self, target):
        assert status_of_error(find_route, "/proxy", target) == 404

    @pytest.mark.parametrize("form", ["/proxy/8080", "/proxy/absolute/8080"])
    @pytest.mark.parametrize("path", LEAVING)
    def test_dot_segments_that_leave_the_app_are_refused(self, path, form):
        assert status_of_error(find_route, "/proxy", form + path) == 400

    @pytest.mark.parametrize("form", ["/proxy/8080", "/proxy/absolute/8080"])
    @pytest.mark.parametrize("path", STAYING)
    def test_dot_segments_that_stay_in_the_app_are_kept(self, path, form):
        route, found, query = find_route("/proxy", form + path)
        assert (route.prefix, found + query) == (form, path)

    @pytest.mark.parametrize("upstream", ["[1.2.3.4]:80", "[:::]:80"])
    def test_brackets_without_an_ipv6_address_are_refused(self, upstream):
        assert status_of_error(find_route, "/proxy", "/proxy/%s/" % upstream) == 400

    @pytest.mark.parametrize(
        "upstream, authority, place, is_local",
        [
            ("8080", "localhost:8080", "port 8080 of this machine", True),
            ("LocalHost:80", "localhost:80", "port 80 of this machine", True),
            ("127.0.0.1:80", "127.0.0.1:80", "port 80 of this machine", True),
            ("[::1]:80", "[::1]:80", "port 80 of this machine", True),
            ("127.0.0.2:80", "127.0.0.2:80", "port 80 of 127.0.0.2", False),
            ("DB.example.org:80", "db.example.org:80", "port 80 of db.example.org", False),
            ("[FE80::1]:80", "[fe80::1]:80", "port 80 of fe80::1", False),
        ],
    )  # fmt: skip
    def test_route_names_its_upstream(self, upstream, authority, place, is_local):
        route = find_route("/proxy", "/proxy/%s/" % upstream)[0]
        assert (route.authority, route.place, route.is_local) == (authority, place, is_local)

    @pytest.mark.parametrize(
        "upstream_tls, upstream, scheme",
        [
            ("8443", "8443", "https"), ("8443", "absolute/8443", "https"), ("8443", "localhost:8443", "https"),
            ("8443", "[::1]:8443", "https"), ("8443", "8444", "http"), ("8443", "db:8443", "http"),
            ("db:8443", "DB:8443", "https"), ("db:8443", "8443", "http"), ("localhost:8443", "8443", "https"),
            ("127.0.0.1:8443", "127.0.0.1:8443", "https"), ("127.0.0.1:8443", "8443", "http"),
            ("[fe80::1]:8443", "[FE80::1]:8443", "https"),
        ],
    )  # fmt: skip
    def test_scheme_is_https_where_the_upstream_speaks_tls(self, upstream_tls, upstream, scheme):
        assert find_route("/proxy", "/proxy/%s/" % upstream, (upstream_tls,))[0].scheme == scheme

    @pytest.mark.parametrize(
        "upstream, homes",
        [
            (
                "8080",
                {"localhost:8080", "127.0.0.1:8080", "[::1]:8080", "0.0.0.0:8080", "[::]:8080", "this-machine:8080"},
            ),
            ("DB:8080", {"db:8080"}), ("db:80", {"db:80"}), ("[FE80::1]:80", {"[fe80::1]:80"}),
        ],
    )  # fmt: skip
    def test_homes_are_all_names_that_the_app_may_have(self, upstream, homes):
        name = socket.gethostname().lower()
        homes = {home.replace("this-machine", name) for home in homes}
        assert find_route("/proxy", "/proxy/%s/" % upstream)[0].homes == homes

    @pytest.mark.parametrize(
        "target, prefix", [("/proxy/8080/a", "/proxy/8080"), ("/proxy/absolute/8080/a", None)]
    )
    def test_stripped_prefix_alone_is_told_to_the_app(self, target, prefix):
        names = ("X-Forwarded-Prefix", "X-Forwarded-Context", "X-ProxyContextPath") if prefix else ()
        assert find_route("/proxy", target)[0].prefix_lines == tuple("%s: %s" % (name, prefix) for name in names)

    @pytest.mark.parametrize("upstream_tls, scheme", [((), "http"), (("8080",), "https")])
    def test_route_to_a_port_has_no_prefix(self, upstream_tls, scheme):
        route = route_to_port(8080, upstream_tls)
        assert (route.host, route.port, route.authority, route.scheme) == ("localhost", 8080, "localhost:8080", scheme)
        assert (route.prefix, route.absolute, route.prefix_lines) == ("", False, ())

    @pytest.mark.parametrize(
        "base, path, below",
        [
            ("/proxy", "/proxy", ""), ("/proxy", "/proxy/", "/"), ("/proxy", "/proxy//a", "//a"),
            ("/proxy", "/%70roxy/%61", "/%61"), ("/proxy", "/proxyx", None), ("/proxy", "/prox", None),
            ("/proxy", "/Proxy/", None), ("/proxy", "//proxy/", None), ("/proxy", "/./proxy/", None),
            ("/proxy", "*", None), ("", "/", "/"), ("", "/a", "/a"), ("/a/b", "/a/b/c", "/c"),
            ("/a/b", "/a%2Fb/c", None), ("/a/b", "/a/c/d", None), ("/a/b", "/a", None),
            ("/al%40ice", "/al@ice/x", "/x"),
            ("/al@ice", "/al%40ice", ""),
        ],
    )  # fmt: skip
    def test_path_below_the_base_is_found_without_decoding_the_rest(self, base, path, below):
        assert path_below(base, path) == below
        assert is_below(base, path + "?a") is (below is not None)
        assert is_home(base, path + "?a") is (below in ("", "/"))

    @pytest.mark.parametrize(
        "given, normal",
        [
            ("/proxy", "/proxy"), ("/proxy/", "/proxy"), ("/", ""), ("", ""), ("/user/ana/proxy/", "/user/ana/proxy"),
            ("/user/al%40ice", "/user/al%40ice"), ("/a/...", "/a/..."),
        ],
    )  # fmt: skip
    def test_normal_base_has_no_last_slash(self, given, normal):
        assert normal_base(given) == normal

    @pytest.mark.parametrize(
        "base",
        [
            "proxy", "/a//b", "//", "/a/../b", "/a/%2E", "/.%2e/a", "/a b", "/a?b", "/a#b", "/a\r\nX: y", "/\xe4",
            "/a;b", "/a\\b", "http://a/",
        ],
    )  # fmt: skip
    def test_base_that_is_no_plain_path_is_refused(self, base):
        with pytest.raises(ValueError):
            normal_base(base)

    @pytest.mark.parametrize(
        "host, allowed",
        [
            ("localhost", True), ("127.0.0.1", True), ("::1", True), ("db1.example.org", True),
            ("a.b.example.org", True), ("exact", True), ("2001:db8::7", True), ("10.1.2.3", True),
            ("example.org", False), ("example.org.", False), ("db1.example.org.", False), ("exact.", False),
            ("xexact", False), ("127.1", False), ("0", False), ("0.0.0.0", False), ("127.0.0.2", False),
            ("localhost.", False), ("::", False), ("db1.example.orgx", False), ("0:0:0:0:0:0:0:1", False),
            ("10.2.2.3", False),
        ],
    )  # fmt: skip
    def test_host_is_allowed_if_a_pattern_matches(self, host, allowed):
        assert is_allowed(host, normal_allowlist(("*.Example.org", "EXACT", "[2001:DB8::7]", "10.1.*"))) is allowed

    @pytest.mark.parametrize("host, allowed", [("a", True), ("localhost", False)])
    def test_callable_decides_alone_which_host_is_allowed(self, host, allowed):
        assert is_allowed(host, lambda host: host == "a") is allowed

    def test_normal_allowlist_has_no_brackets_and_no_upper_case(self):
        given = ["EXACT", "*.Example.org", "[2001:DB8::7]", "fe80::?", "[fe80:*]", "10.1.*", "*"]
        normal = ("exact", "*.example.org", "2001:db8::7", "fe80::?", "fe80:*", "10.1.*", "*")
        assert normal_allowlist(given) == normal

    @pytest.mark.parametrize(
        "pattern", ["", "a b", "a:80", "user@host", "a[bc]d", "[::1", "::1]", "http://a", "a/", "\xe4", "[]", "a\n"]
    )
    def test_pattern_that_can_match_no_host_is_refused(self, pattern):
        with pytest.raises(ValueError):
            normal_allowlist([pattern])

    @pytest.mark.parametrize(
        "name, valid",
        [
            ("localhost", True), ("apps.example.org", True), ("a-1.b2", True), ("1.a", True), ("127.0.0.1", False),
            ("a.1", False), ("", False), (".", False), ("a.", False), (".a", False), ("a..b", False), ("-a", False),
            ("a-.b", False), ("a_b", False), ("*.a", False), ("a:80", False), ("[::1]", False), ("\xe4", False),
        ],
    )  # fmt: skip
    def test_domain_is_a_name_and_no_address(self, name, valid):
        assert is_domain(name) is valid
        if valid:
            assert normal_domain(name.upper()) == name
        else:
            with pytest.raises(ValueError):
                normal_domain(name)

    @pytest.mark.parametrize(
        "authority, port",
        [
            ("8080.localhost:8888", 8080), ("8080.LOCALHOST", 8080), ("1.localhost:1", 1), ("65535.localhost", 65535),
            ("8080.apps.example.org", 8080), ("8080.localhost:", 8080), ("65536.localhost", 0), ("08080.localhost", 0),
            ("0.localhost", 0), ("+80.localhost", 0), ("8080.localhost.", 0), ("8080.localhost.evil.example", 0),
            ("a.8080.localhost", 0), ("8080.a.localhost", 0), ("localhost:8888", 0), ("8080", 0),
            ("8080.example.org", 0), ("8080..localhost", 0), ("127.0.0.1:8888", 0), ("[::1]:8888", 0), ("", 0),
            ("app--8080.localhost", 0), ("8080.0.0.1", 0),
        ],
    )  # fmt: skip
    def test_port_in_host_needs_a_domain_of_ours(self, authority, port):
        assert port_in_host(authority, ("localhost", "apps.example.org")) == port
        assert port_in_host(authority, ()) == 0

    @pytest.mark.parametrize(
        "authority, host",
        [
            ("A.example:80", "a.example"), ("a", "a"), ("a:", "a"), ("[::1]:80", "[::1]"), ("[FE80::1]", "[fe80::1]"),
            ("", ""),
        ],
    )  # fmt: skip
    def test_host_of_an_authority_has_no_port(self, authority, host):
        assert host_of(authority) == host

    @pytest.mark.parametrize("host, authority", [("a", "a:80"), ("::1", "[::1]:80"), ("127.0.0.1", "127.0.0.1:80")])
    def test_authority_of_an_ipv6_address_has_brackets(self, host, authority):
        assert authority_of(host, 80) == authority


class TestRoutesOnTheWire:
    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
    @pytest.mark.parametrize(
        "path",
        [
            "/", "/nothing", "/proxy/x", "/proxy/localhost:%2e/", "/proxy/+PORT/", "/proxy/0PORT/",
            "/proxy/u@localhost:PORT/",
        ],
    )  # fmt: skip
    def test_target_without_a_route_connects_nothing(self, proxy, upstream, method, path):
        app = upstream(answering(OK))
        answer = proxy.ask(request(method, path.replace("PORT", str(app.port))), no_body=method == "HEAD")
        assert status_of(answer) == 404
        if method == "GET":
            for form in ("/proxy/<port>/", "/proxy/absolute/<port>/", "/proxy/<host>:<port>/"):
                assert form.encode() in answer[2]
            assert b"/proxy/absolute/<host>:<port>/" in answer[2]
        assert app.connections == 0

    def test_dot_segments_that_leave_the_app_connect_nothing(self, proxy, upstream):
        app = upstream(answering(OK))
        assert status_of(proxy.get("/proxy/%d/../%d/" % (app.port, app.port))) == 400
        assert app.connections == 0

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize(
        "target, location",
        [
            ("/proxy/%d", "/proxy/%d/"), ("/proxy/%d?a=%%2F&b", "/proxy/%d/?a=%%2F&b"),
            ("/proxy/localhost:%d", "/proxy/localhost:%d/"),
        ],
    )  # fmt: skip
    def test_missing_slash_is_added_by_a_redirect(self, proxy, upstream, method, target, location):
        app = upstream(answering(OK))
        answer = proxy.ask(request(method, target % app.port), no_body=method == "HEAD")
        assert (status_of(answer), fields_of(answer)["location"]) == (302, location % app.port)
        assert app.connections == 0

    @pytest.mark.parametrize(
        "method, lines, target, sent",
        [
            ("POST", ("Content-Length: 0",), "/proxy/PORT?a", "POST /?a HTTP/1.1"),
            ("GET", (), "/proxy/absolute/PORT?a", "GET /proxy/absolute/PORT?a HTTP/1.1"),
        ],
    )
    def test_missing_slash_stays_in_a_post_and_an_absolute_form(self, proxy, upstream, method, lines, target, sent):
        app = upstream(answering(OK))
        target, sent = (text.replace("PORT", str(app.port)) for text in (target, sent))
        assert status_of(proxy.ask(request(method, target, *lines))) == 200
        assert app.messages[0][0] == sent

    @pytest.mark.parametrize("base", ["/", "/user/ana/proxy"])
    def test_other_base_has_the_same_forms(self, start, upstream, base):
        app = upstream(answering(OK))
        proxy = start(base=base)
        prefix = base.rstrip("/")
        assert status_of(proxy.get(base)) == 200
        assert status_of(proxy.get("%s/%d/a" % (prefix, app.port))) == 200
        assert status_of(proxy.get("%s/absolute/%d/a" % (prefix, app.port))) == 200
        lines = ["GET /a HTTP/1.1", "GET %s/absolute/%d/a HTTP/1.1" % (prefix, app.port)]
        assert [message[0] for message in app.messages] == lines

    def test_localhost_is_ipv6_loopback_too(self, proxy, upstream):
        """localhost is tried at 127.0.0.1 and then at ::1; an address in brackets is that address alone."""
        with app_alone_at("::1", upstream) as app:
            assert status_of(proxy.get("/proxy/%d/a" % app.port)) == 200
            assert status_of(proxy.get("/proxy/[::1]:%d/b" % app.port)) == 200
            assert status_of(proxy.get("/proxy/absolute/[::1]:%d/c" % app.port)) == 200
            assert status_of(proxy.get("/proxy/127.0.0.1:%d/d" % app.port)) == 502
        hosts = ["localhost:%d" % app.port] + ["[::1]:%d" % app.port] * 2
        assert [fields_of(message)["host"] for message in app.messages] == hosts

    @pytest.mark.parametrize("is_upgrade", [False, True])
    @pytest.mark.parametrize(
        "host", ["127.0.0.2", "absolute/127.0.0.2", "Nowhere.invalid", "2130706433", "[::ffff:127.0.0.1]"]
    )
    @pytest.mark.parametrize(
        "allowlist", [(), ("*.example.org",), lambda host: False], ids=["none", "names", "callable"]
    )
    def test_host_outside_the_allowlist_is_refused(self, start, upstream, is_upgrade, host, allowlist):
        """Before anything is resolved or connected, Upgrades too (CVE-2022-21697, CVE-2024-28179)."""
        app = upstream(answering(OK))
        lines = HANDSHAKE if is_upgrade else ()
        answer = start(host_allowlist=allowlist).get("/proxy/%s:%d/" % (host, app.port), *lines)
        assert status_of(answer) == 403
        assert b"--host-allowlist" in answer[2]
        assert app.connections == 0

    def test_allowlist_callable_is_given_the_plain_host(self, start):
        asked = []
        proxy = start(host_allowlist=lambda host: asked.append(host))
        for host in ("127.0.0.2", "absolute/127.0.0.2", "Nowhere.invalid", "2130706433", "[::ffff:127.0.0.1]"):
            proxy.get("/proxy/%s:80/" % host)
        assert asked == ["127.0.0.2", "127.0.0.2", "nowhere.invalid", "2130706433", "::ffff:127.0.0.1"]

    def test_host_inside_the_allowlist_is_reached(self, start, upstream):
        app = upstream(answering(OK), host="127.0.0.2")
        proxy = start(host_allowlist=["127.0.0.*"])
        assert status_of(proxy.get("/proxy/127.0.0.2:%d/a" % app.port)) == 200
        assert fields_of(app.messages[0])["host"] == "127.0.0.2:%d" % app.port


LOOPBACK_SERVED = {"127.0.0.1": ["127.0.0.1"], "0.0.0.0": ["127.0.0.1"], "::1": ["::1"], "::": ["127.0.0.1", "::1"]}


@contextlib.contextmanager
def app_alone_at(host, upstream):
    """An app at this address; at loopback addresses that do not lead to it nobody else has its port meanwhile."""
    while True:
        try:
            app = upstream(answering(OK), host=host)
        except OSError:
            pytest.skip("this machine has no address %s" % host)
        with contextlib.ExitStack() as claims:
            try:
                for other in {"127.0.0.1", "::1"} - set(LOOPBACK_SERVED.get(plain(host), ())):
                    claim = claims.enter_context(socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET))
                    claim.bind((other, app.port))  # it never listens, so connections are refused
            except OSError as error:
                if error.errno == errno.EADDRINUSE:  # by a proxy, say, that had the same port at the other address
                    continue
            yield app
            return


def plain(address):
    """An IPv4 address that is written as an IPv6 one, as itself."""
    return address.replace("::ffff:", "")


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------

GOOD_REQUESTS = [  # the head, then method, target, authority, minor version and fields
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", "/", "a", "1", (("Host", "a"),))),
    (b"GET / HTTP/1.0\r\n\r\n", ("GET", "/", "", "0", ())),
    (
        b"get /%2F//a?b=%20|{}^`\"\\ HTTP/1.1\r\nhOsT:a:80\r\n\r\n",
        ("get", "/%2F//a?b=%20|{}^`\"\\", "a:80", "1", (("hOsT", "a:80"),)),
    ),
    (
        b"OPTIONS * HTTP/1.1\r\nHost: [::1]:8888\r\n\r\n",
        ("OPTIONS", "*", "[::1]:8888", "1", (("Host", "[::1]:8888"),)),
    ),
    (b"GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", "/x?y", "b:1", "1", (("Host", "a"),))),
    (b"GET HTTPS://b HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", "/", "b", "1", (("Host", "a"),))),
    (b"GET http://b?q=/ HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", "/?q=/", "b", "1", (("Host", "a"),))),
    (b"OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n", ("OPTIONS", "*", "b", "1", (("Host", "a"),))),
    (
        b"M-SEARCH / HTTP/1.1\r\nHost: \t a \t\r\nX:\r\nx: b\xe4\xff \tc\r\n!#$%&'*+-.^_`|~1: y\r\n\r\n",
        (
            "M-SEARCH", "/", "a", "1",
            (("Host", "a"), ("X", ""), ("x", "b\xe4\xff \tc"), ("!#$%&'*+-.^_`|~1", "y")),
        ),
    ),
]  # fmt: skip
BAD_LINES = [  # first lines and fields of requests that have Host
    (400, b"GET /\r\n"), (505, b"GET / HTTP/0.9\r\n"), (505, b"GET / HTTP/2.0\r\n"), (505, b"GET / HTTP/1.2\r\n"),
    (400, b"GET / HTTP/1.1.1\r\n"), (400, b"GET / http/1.1\r\n"), (400, b"GET  / HTTP/1.1\r\n"),
    (400, b"GET /  HTTP/1.1\r\n"), (400, b"GET / HTTP/1.1 \r\n"), (400, b" GET / HTTP/1.1\r\n"),
    (400, b"GET\t/\tHTTP/1.1\r\n"), (400, b"GET / HTTP/1.\xb2\r\n"), (400, b"G(T / HTTP/1.1\r\n"),
    (400, b"\xc7ET / HTTP/1.1\r\n"), (400, b"GET /\xe4 HTTP/1.1\r\n"), (400, b"GET /#a HTTP/1.1\r\n"),
    (400, b"GET /\x7f HTTP/1.1\r\n"), (400, b"GET a HTTP/1.1\r\n"), (400, b"GET * HTTP/1.1\r\n"),
    (400, b"GET ftp://a/ HTTP/1.1\r\n"), (400, b"GET http:///x HTTP/1.1\r\n"), (400, b"GET http://u@a/ HTTP/1.1\r\n"),
    (400, b"GET http://u:p@a:1/ HTTP/1.1\r\n"), (400, b"\r\nGET / HTTP/1.1\r\n"), (400, b"GET / HTTP/1.1\r"),
    (405, b"CONNECT a:80 HTTP/1.1\r\n"), (414, b"GET /" + b"a" * DEFAULT.max_target_bytes + b" HTTP/1.1\r\n"),
]  # fmt: skip
BAD_FIELDS = [  # fields behind the request line
    (400, b"Host: a\r\nOrigin: http://a\r\nOrigin: http://b\r\n"),
    (400, b""), (400, b"Host: a\r\nHost: a\r\n"), (400, b"Host:\r\n"), (400, b"Host: a b\r\n"), (400, b"Host: u@a\r\n"),
    (400, b"Host: a/b\r\n"), (400, b"Host: a:b\r\n"), (400, b"Host: ::1\r\n"), (400, b"Host: \xe4\r\n"),
    (400, b"Host: a<script>\r\n"), (400, b"Host : a\r\n"), (400, b"Host\t: a\r\n"), (400, b" Host: a\r\n"),
    (400, b"Host: a\r\n: x\r\n"), (400, b"Host: a\r\nX\r\n"), (400, b"Host: a\r\n X: y\r\n"),
    (400, b"Host: a\r\nX: y\r\n\tz\r\n"), (400, b"Host: a\r\nX: \x00\r\n"), (400, b"Host: a\r\nX: a\x0bb\r\n"),
    (400, b"Host: a\r\nX: a\rb\r\n"), (400, b"Host: a\r\nX: a\nb: c\r\n"), (400, b"Host: a\r\nX\xe4: b\r\n"),
    (400, b"Host: a\r\nX(: b\r\n"), (400, b"Host: a\r\nX: \x7f\r\n"), (400, b"Host: a\r\nX: y\n"),
    (431, b"Host: a\r\n" + b"X: y\r\n" * DEFAULT.max_fields),
]  # fmt: skip
BAD_REQUESTS = (
    [(status, line + b"Host: a\r\n\r\n") for status, line in BAD_LINES]
    + [(status, b"GET / HTTP/1.1\r\n" + fields + b"\r\n") for status, fields in BAD_FIELDS]
    + [
        (505, b"PRI * HTTP/2.0\r\n\r\n"), (400, b"GET /\r\n\r\n"),
        (400, b"GET / HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n"),
        (405, b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n"),
    ]
)  # fmt: skip
GOOD_RESPONSES = [
    (b"HTTP/1.1 200 OK\r\n\r\n", (200, "OK", ())), (b"HTTP/1.0 404 \r\nA: b\r\n\r\n", (404, "", (("A", "b"),))),
    (b"HTTP/1.1 599\r\n\r\n", (599, "", ())), (b"HTTP/1.1 999 \r\n\r\n", (999, "", ())),
    (b"HTTP/1.1 200 Sch\xf6n \t ja\r\n\r\n", (200, "Sch\xf6n \t ja", ())),
]  # fmt: skip
BAD_RESPONSES = [
    b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 099 OK\r\n\r\n", b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/2 200 OK\r\n\r\n", b"HTTP/2.0 200 OK\r\n\r\n", b"HTTP/1.2 200 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n",
    b"http/1.1 200 OK\r\n\r\n", b"HTTP/1.1 +20 OK\r\n\r\n", b"HTTP/1.1 2\xb20 OK\r\n\r\n",
    b"HTTP/1.1 200 O\x00K\r\n\r\n", b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
    b"<h1>\r\n\r\n", b"\r\n\r\n", b"HTTP/1.1 200 OK\nA: b\n\n\r\n\r\n",
]  # fmt: skip
FRAMINGS = [  # minor version, fields, framing; None if none is declared
    ("1", [], None), ("1", [("Content-Length", "0")], Framing("length", 0)),
    ("0", [("Content-Length", "17")], Framing("length", 17)), ("1", [("Content-Length", "5, 5")], Framing("length", 5)),
    ("1", [("content-length", "5"), ("Content-Length", "5")], Framing("length", 5)),
    ("1", [("Content-Length", "007")], Framing("length", 7)),
    ("1", [("Content-Length", "9" * 18)], Framing("length", 10**18 - 1)),
    ("1", [("Transfer-Encoding", "Chunked")], CHUNKED),
]  # fmt: skip
NO_LENGTHS = [
    "", "+5", "-1", "5 5", "0x5", "5_0", "5.0", "٥", "\xb2", "1" * 19, "5, 6", "5,", ",5", "5;", "5, 05", "\xa05",
]  # fmt: skip
BAD_FRAMINGS = [(400, "1.1", [("Content-Length", value)]) for value in NO_LENGTHS] + [
    (400, "1.1", [("Content-Length", "5"), ("Content-Length", "6")]),
    (400, "1.1", [("Content-Length", "5"), ("Transfer-Encoding", "chunked")]),
    (400, "1.1", [("Transfer-Encoding", "chunked"), ("Content-Length", "0")]),
    (400, "1.0", [("Transfer-Encoding", "chunked")]),
    (400, "1.1", [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")]),
    (501, "1.1", [("Transfer-Encoding", "gzip, chunked")]), (501, "1.1", [("Transfer-Encoding", "chunked, chunked")]),
    (501, "1.1", [("Transfer-Encoding", "identity")]), (501, "1.1", [("Transfer-Encoding", "")]),
    (501, "1.1", [("Transfer-Encoding", "xchunked")]), (501, "1.1", [("Transfer-Encoding", "chunked;q=1")]),
    (501, "1.1", [("Transfer-Encoding", "\x0bchunked")]),
]  # fmt: skip
PARTIAL_HEADS = [  # is_request, the beginning of a head, the status
    (True, b"GET / HTTP/1.1\n", 400), (True, b"GET /\r\n", 400), (True, b"\x16", 400),
    (True, b"GET / HTTP/1.1\r\nX: a\rb", 400), (True, b"GET / HTTP/1.1\r\nX: a\x00", 400), (True, b"\n", 400),
    (True, b"GET / HTTP/1.1\r\nX: a\n", 400), (True, b"GET / HTTP/1.1\r\nX: a\x7f", 400), (True, b"\r\n", 400),
    (True, b"PRI * HTTP/2.0\r\n", 505), (True, b"GET / HTTP/1.1\r\n\rX", 400), (True, b"GET /\xe4 HTTP/1.1\r\n", 400),
    (False, b"I", 400), (False, b"<", 400), (False, b"HTTP1", 400), (False, b"h", 400), (False, b"\r", 400),
    (False, b"HTTP/1.1 200 OK\n", 400), (False, b"HTTP/1.1 200 OK\r\nX: a\x00", 400),
]  # fmt: skip
LONG_HEADS = [
    (True, b"GET /" + b"a" * DEFAULT.max_target_bytes, 414), (True, b"G" * (DEFAULT.max_target_bytes + 1), 414),
    (True, b"GET / HTTP/1.1\r\nX: " + b"a" * DEFAULT.max_head_bytes, 431),
    (True, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12000, 431),
    (False, b"HTTP/1.1 200 OK\r\nX: " + b"a" * DEFAULT.max_head_bytes, 431),
]
NOTHING = Headers([], [])


def headers_of(fields):
    """Headers of (name, value) pairs, even of those that no valid head can have."""
    return Headers([name.lower() for name, _ in fields], ["%s: %s" % field for field in fields])


def parsed(raw, address="192.0.2.7", scheme="http", **options):
    """The request in a head that came from this address."""
    return parse_request(raw, address, scheme, checked_config(Config(**options)))


class TestMessages:
    @pytest.mark.parametrize("raw, request_in_it", GOOD_REQUESTS, ids=case_id)
    def test_request_head_is_parsed(self, raw, request_in_it):
        one = parsed(raw)
        assert (one.method, one.target, one.authority, one.minor, one.fields) == request_in_it

    @pytest.mark.parametrize("status, raw", BAD_REQUESTS, ids=case_id)
    def test_bad_request_head_is_refused(self, status, raw):
        assert status_of_error(parsed, raw) == status

    @pytest.mark.parametrize("raw, response_in_it", GOOD_RESPONSES, ids=case_id)
    def test_response_head_is_parsed(self, raw, response_in_it):
        one = parse_response(raw, "GET", DEFAULT)
        assert (one.status, one.reason, one.headers.pairs()) == response_in_it

    @pytest.mark.parametrize("raw", BAD_RESPONSES, ids=case_id)
    def test_bad_response_head_is_refused(self, raw):
        assert status_of_error(parse_response, raw, "GET", DEFAULT) == 400

    @pytest.mark.parametrize("raw", [raw for raw, _ in GOOD_REQUESTS], ids=case_id)
    def test_serialised_request_is_parsed_as_the_same(self, raw):
        one = parsed(raw)
        first = "%s %s HTTP/1.%s" % (one.method, one.target, one.minor)
        again = parsed(serialise([first] + one.headers.lines, one.framing))
        assert (again.method, again.target, again.minor) == (one.method, one.target, one.minor)
        assert (again.fields, again.framing) == (one.fields, one.framing)

    @pytest.mark.parametrize(
        "lines, names",
        [
            (("A: 1, b", "B: 2", "a:C ,,"), {"a": (["1, b", "C ,,"], "C ,,", {"1", "b", "c", ""})}),
            (("A:\t b \t", "C:"), {"a": (["b"], "b", {"b"}), "c": ([""], "", {""}), "d": ([], "", set())}),
            (("A: Close", "B: keep-alive", "C: a,\tUPGRADE"), {
                "a": (["Close"], "Close", {"close"}), "b": (["keep-alive"], "keep-alive", {"keep-alive"}),
                "c": (["a,\tUPGRADE"], "a,\tUPGRADE", {"a", "upgrade"}),
            }),
        ],
    )  # fmt: skip
    def test_headers_give_all_values_the_last_value_and_tokens(self, lines, names):
        headers = Headers.parse("".join(line + "\r\n" for line in lines) + "\r\n", DEFAULT)
        for name, (values, last, tokens) in names.items():
            assert (headers.get_all(name), headers.get(name), headers.tokens(name)) == (values, last, tokens)

    @pytest.mark.parametrize("method", ["GET", "DELETE", "POST", "FROB"])
    @pytest.mark.parametrize("minor, fields, framing", FRAMINGS, ids=case_id)
    def test_request_without_a_declared_body_has_none(self, minor, fields, framing, method):
        assert request_framing(headers_of(fields), minor) == (framing or NO_BODY)
        lines = ["%s / HTTP/1.%s" % (method, minor), "Host: a"] + ["%s: %s" % field for field in fields]
        assert parsed(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")).framing == (framing or NO_BODY)

    @pytest.mark.parametrize(
        "status, method, has_body",
        [
            (200, "GET", True), (200, "POST", True), (404, "GET", True), (200, "HEAD", False), (404, "HEAD", False),
            (100, "GET", False), (101, "GET", False), (103, "GET", False), (204, "GET", False), (304, "GET", False),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("minor, fields, framing", FRAMINGS, ids=case_id)
    def test_response_without_a_declared_end_ends_with_the_connection(
        self, minor, fields, framing, status, method, has_body
    ):
        expected = (framing or UNTIL_CLOSE) if has_body else NO_BODY
        assert response_framing(headers_of(fields), minor, status, method) == expected

    @pytest.mark.parametrize("status, version, fields", BAD_FRAMINGS, ids=case_id)
    def test_doubtful_framing_is_refused(self, status, version, fields):
        headers, minor = headers_of(fields), version[-1]
        assert status_of_error(request_framing, headers, minor) == status
        for code, method in ((200, "GET"), (200, "HEAD"), (204, "GET"), (304, "GET")):
            assert status_of_error(response_framing, headers, minor, code, method) == status

    @pytest.mark.parametrize("is_request, head, status", PARTIAL_HEADS, ids=case_id)
    def test_partial_head_is_refused_at_the_byte_that_makes_it_wrong(self, is_request, head, status):
        """Whether the last byte comes with all others or alone; the bytes before it are checked by then."""
        for end in range(1, len(head)):
            check_partial_head(head[:end], max(0, end - 2), is_request, DEFAULT)
        for start in (0, max(0, len(head) - 2)):
            assert status_of_error(check_partial_head, head, start, is_request, DEFAULT) == status

    @pytest.mark.parametrize("is_request, head, status", LONG_HEADS, ids=case_id)
    def test_partial_head_that_is_too_long_is_refused(self, is_request, head, status):
        assert status_of_error(check_partial_head, head, 0, is_request, DEFAULT) == status

    @pytest.mark.parametrize(
        "is_request, head",
        [(True, raw) for raw, _ in GOOD_REQUESTS] + [(False, raw) for raw, _ in GOOD_RESPONSES],
        ids=case_id,
    )
    def test_beginning_of_a_valid_head_is_accepted(self, is_request, head):
        for end in range(len(head)):
            for start in (0, max(0, end - 2)):
                check_partial_head(head[:end], start, is_request, DEFAULT)

    def test_long_garbage_is_refused_in_linear_time(self):
        """Patterns with two ways to match the same text would take minutes for these."""
        begun = time.process_time()
        for filler in (b" ", b"\t", b"a", b"a:", b",", b";", b"/", b"\r\nA: b", b"."):
            long = filler * (60000 // len(filler))
            for raw in (
                b"GET / HTTP/1.1\r\nHost: a\r\nX: " + long + b"\x00\r\n\r\n",
                b"GET " + long + b"\x00 HTTP/1.1\r\n\r\n",
                long + b"\x00\r\n\r\n",
            ):
                assert status_of_error(parsed, raw) in (400, 431)
        assert time.process_time() - begun < 20

    def test_garbage_gives_a_head_or_a_refusal(self):
        chance = random.Random(20261123)
        alphabet = b"\r\n\t :/?%.0159aHT\x00\x7f\xe4\xff"
        for _ in range(10000):
            raw = bytearray(chance.choice(GOOD_REQUESTS)[0])
            for _ in range(chance.randrange(1, 5)):
                at = chance.randrange(len(raw) + 1)
                raw[at : at + chance.randrange(3)] = bytes(chance.choice(alphabet) for _ in range(chance.randrange(3)))
            raw = bytes(raw) + b"\r\n\r\n"
            raw = raw[: raw.index(b"\r\n\r\n") + 4]
            for parse in (
                lambda raw: parse_request(raw, "", "http", DEFAULT), lambda raw: parse_response(raw, "GET", DEFAULT),
            ):  # fmt: skip
                try:
                    headers = parse(raw).headers
                except ProxyError as error:
                    assert 400 <= error.status <= 505
                else:
                    assert not re.search("[\x00\r\n]", "".join(headers.lines))
                    assert len(headers.keys) == len(headers.lines) == raw.count(b"\r\n") - 2

    @pytest.mark.parametrize(
        "host, target, port, prefix, path, query",
        [
            ("here", "/proxy/8080/a?b", 8080, "/proxy/8080", "/a", "?b"), ("here", "/proxy/?b", None, None, "/", "?b"),
            ("8080.localhost:1", "/proxy/9090/a?b?c", 8080, "", "/proxy/9090/a", "?b?c"),
            ("8080.localhost", "/a", 8080, "", "/a", ""), ("here", "http://8080.localhost/a", 8080, "", "/a", ""),
            ("8080.localhost", "http://here/proxy/9090/", 9090, "/proxy/9090", "/", ""),
        ],
    )  # fmt: skip
    def test_host_that_names_a_port_counts_before_the_path(self, host, target, port, prefix, path, query):
        one = parsed(("GET %s HTTP/1.1\r\nHost: %s\r\n\r\n" % (target, host)).encode())
        assert one.route_error is None
        assert (one.route and (one.route.port, one.route.prefix)) == (port and (port, prefix))
        assert (one.path, one.query) == (path, query)

    @pytest.mark.parametrize(
        "target, status", [("/", 404), ("/static/a.js", 404), ("/proxy/x", 404), ("/proxy/8080/..", 400)]
    )
    def test_request_without_a_route_keeps_the_error_for_later(self, target, status):
        """The gate has its say first."""
        one = parsed(request("GET", target))
        assert (one.route, one.route_error.status) == (None, status)

    def test_options_of_the_server_has_neither_route_nor_error(self):
        one = parsed(request("OPTIONS", "*"))
        assert (one.route, one.route_error, one.path, one.query) == (None, None, "", "")

    @pytest.mark.parametrize(
        "method, version, lines, is_handshake",
        [
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: websocket"], True),
            ("GET", "1.1", ["connection: a, UPGRADE", "upgrade: WebSocket"], True),
            ("GET", "1.1", ["Connection: a", "Connection: upgrade", "Upgrade: websocket"], True),
            ("POST", "1.1", ["Connection: Upgrade", "Upgrade: websocket"], False),
            ("GET", "1.0", ["Connection: Upgrade", "Upgrade: websocket"], False),
            ("GET", "1.1", ["Upgrade: websocket"], False), ("GET", "1.1", ["Connection: Upgrade"], False),
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: h2c"], False),
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: h2c, websocket"], False),
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: websocket", "Upgrade: h2c"], False),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_websocket_handshake_is_a_get_with_one_upgrade(self, method, version, lines, is_handshake):
        raw = request(method, "/proxy/8080/", *lines).replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1)
        assert parsed(raw).is_websocket is is_handshake

    @pytest.mark.parametrize(
        "method, lines, is_navigation, is_page_visit",
        [
            ("GET", ["Accept: text/html"], True, True), ("HEAD", ["Accept: text/html"], True, True),
            ("GET", ["Accept: application/xhtml+xml, TEXT/HTML;q=0.9"], True, True),
            ("GET", ["Accept: image/png", "Accept: text/html"], True, True),
            ("GET", ["Accept: text/html", "Sec-Fetch-Mode: navigate"], True, True),
            ("POST", ["Accept: text/html", "Sec-Fetch-Mode: navigate"], True, False),
            ("GET", ["Accept: text/html", "Sec-Fetch-Mode: cors"], False, False),
            ("GET", ["Accept: */*", "Sec-Fetch-Mode: navigate"], False, False), ("GET", [], False, False),
            ("GET", ["Accept: text/html", "Connection: Upgrade", "Upgrade: websocket"], True, False),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_page_visit_is_a_navigation_that_reads(self, method, lines, is_navigation, is_page_visit):
        one = parsed(request(method, "/proxy/8080/", *lines))
        assert (one.is_navigation, one.is_page_visit) == (is_navigation, is_page_visit)

    @pytest.mark.parametrize(
        "minor, lines, persists",
        [
            ("1", [], True), ("1", ["Connection: keep-alive"], True), ("1", ["Connection: close"], False),
            ("1", ["Connection: a, CLOSE"], False), ("1", ["Connection: a", "Connection: close"], False),
            ("1", ["Connection: closed"], True), ("0", [], False), ("0", ["Connection: keep-alive"], False),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_connection_persists_in_http_1_1_unless_it_is_closed(self, minor, lines, persists):
        fields = "".join(line + "\r\n" for line in lines)
        assert parsed(("GET / HTTP/1.%s\r\nHost: a\r\n%s\r\n" % (minor, fields)).encode()).keep_alive is persists
        response = parse_response(("HTTP/1.%s 200 OK\r\n%s\r\n" % (minor, fields)).encode(), "GET", DEFAULT)
        assert response.is_reusable is persists

    @pytest.mark.parametrize(
        "method, lines, replayable",
        [
            ("GET", [], True), ("HEAD", [], True), ("OPTIONS", [], True), ("PUT", [], True), ("DELETE", [], True),
            ("PROPFIND", [], True), ("POST", [], False), ("PATCH", [], False), ("FROB", [], False), ("get", [], False),
            ("PUT", ["Content-Length: 3"], False), ("GET", ["Transfer-Encoding: chunked"], False),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_idempotent_request_without_a_body_alone_may_be_sent_again(self, method, lines, replayable):
        assert parsed(request(method, "/proxy/8080/", *lines)).is_replayable is replayable

    @pytest.mark.parametrize(
        "trusted, address, lines, client, hops",
        [
            ("", "127.0.0.1", (), ("127.0.0.1", "http", "here:8888"), "127.0.0.1"),
            ("", "", ("For: 1.2.3.4",), ("", "http", "here:8888"), None),
            (
                "10.0.0.0/8", "127.0.0.1", ("For: 1.2.3.4", "Proto: https", "Host: evil"),
                ("127.0.0.1", "http", "here:8888"), "127.0.0.1",
            ),
            ("unix", "127.0.0.1", ("For: 1.2.3.4",), ("127.0.0.1", "http", "here:8888"), "127.0.0.1"),
            ("unix", "", ("For: 1.2.3.4",), ("1.2.3.4", "http", "here:8888"), "1.2.3.4"),
            ("unix", "", (), ("", "http", "here:8888"), None),
            ("::1", "::1", ("For: 1.2.3.4",), ("1.2.3.4", "http", "here:8888"), "1.2.3.4, ::1"),
            ("127.0.0.0/8", "127.0.0.1", (), ("127.0.0.1", "http", "here:8888"), "127.0.0.1"),
            (
                "127.0.0.0/8", "127.0.0.1", ("For: 1.2.3.4", "Proto: HTTPS", "Host: pub.example"),
                ("1.2.3.4", "https", "pub.example"), "1.2.3.4, 127.0.0.1",
            ),
            (
                "127.0.0.0/8", "127.0.0.1", ("For: 6.6.6.6, 1.2.3.4", "For: 127.9.9.9"),
                ("1.2.3.4", "http", "here:8888"), "6.6.6.6, 1.2.3.4, 127.9.9.9, 127.0.0.1",
            ),
            (
                "127.0.0.1", "127.0.0.1", ("Host: a b", "Proto: gopher", "For: "),
                ("127.0.0.1", "http", "here:8888"), "127.0.0.1",
            ),
            (
                "127.0.0.1", "127.0.0.1", ("Proto: https, http", "Host: a:1, b:2"),
                ("127.0.0.1", "https", "a:1"), "127.0.0.1",
            ),
            (
                "127.0.0.1", "127.0.0.1", ("Proto: http,https", "Proto: ", "Host: a", "Host: b"),
                ("127.0.0.1", "http", "b"), "127.0.0.1",
            ),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_client_is_the_last_address_that_no_trusted_proxy_has(self, trusted, address, lines, client, hops):
        """X-Forwarded fields of others are not believed."""
        lines = ["X-Forwarded-" + line for line in lines]
        one = parsed(request("GET", "/", *lines), address, trusted_proxies=[trusted] if trusted else []).client
        assert (one.address, one.scheme, one.authority, one.app_port) == client + (0,)
        told = [line for line in one.lines if line.startswith("X-Forwarded-For: ")]
        assert told == (["X-Forwarded-For: " + hops] if hops else [])

    @pytest.mark.parametrize(
        "scheme, authority, forwarded, port",
        [
            ("http", "here", None, "80"), ("https", "here", None, "443"), ("http", "here:", None, "80"),
            ("http", "[::1]", None, "80"), ("http", "[::1]:99", None, "99"), ("http", "", None, None),
            ("http", "here:81", "8443", "8443"), ("http", "here:81", "x", "81"), ("http", "here:81", "443,80", "443"),
            ("http", "here:81", "123456", "81"), ("http", "", "8443", None),
        ],
    )  # fmt: skip
    def test_port_that_the_app_is_told_is_that_of_the_origin(self, scheme, authority, forwarded, port):
        headers = headers_of([("X-Forwarded-Port", forwarded)]) if forwarded else NOTHING
        config = Config(trusted_proxies=("192.0.2.7",))
        one = client_info(headers, "192.0.2.7", scheme, authority, config)
        home = ("X-Forwarded-For: 192.0.2.7", "X-Forwarded-Proto: " + scheme)
        public = ("X-Forwarded-Host: " + authority, "X-Forwarded-Port: %s" % port) if authority else ()
        assert (one.home_lines, one.lines) == (home, home + public)

    def test_forwarded_host_may_name_the_port_of_an_app(self):
        raw = request("GET", "/a", "X-Forwarded-Host: 8080.localhost")
        assert parsed(raw, trusted_proxies=["192.0.2.7"]).client.app_port == 8080
        assert parsed(raw).client.app_port == 0

    @pytest.mark.parametrize(
        "origin, authority, own",
        [
            ("http://here:8888", "here:8888", True), ("https://here:8888", "here:8888", True),
            ("HTTP://HERE:8888", "here:8888", True), ("http://here:8888", "HERE:8888", True),
            ("http://here", "here:80", True), ("http://here:80", "here", True), ("https://here", "here:443", True),
            ("https://here", "here", True), ("http://[::1]:1", "[::1]:1", True), ("http://here:443", "here", False),
            ("https://here:80", "here", False), ("http://here:8889", "here:8888", False),
            ("http://evil", "here", False), ("null", "here", False), ("", "", False), ("http://", "", False),
            ("http://here:8888/", "here:8888", False), ("ws://here", "here", False),
            ("http://here:8888.evil", "here:8888", False), ("http://here:8888, http://here:8888", "here:8888", False),
            ("http://u@here:8888", "here:8888", False), ("http://here:8888?a", "here:8888", False),
        ],
    )  # fmt: skip
    def test_own_origin_has_the_authority_that_the_client_uses(self, origin, authority, own):
        assert is_own_origin(origin, authority) is own
        if authority:
            raw = "GET / HTTP/1.1\r\nHost: %s\r\nOrigin: %s\r\n\r\n" % (authority, origin)
            assert parsed(raw.encode()).is_own_origin is own

    @pytest.mark.parametrize(
        "text, valid",
        [
            ("a", True), ("a:80", True), ("a:", True), ("1.2.3.4", True), ("[::1]", True), ("[::1]:80", True),
            ("a_b-c.~!$&'()*+,;=%20", True), ("", False), (":80", False), ("a:b", False), ("a:123456", False),
            ("u@a", False), ("a b", False), ("::1", False), ("[::1", False), ("[v1.a]", False), ("a/", False),
            ("a?", False), ("a\n", False), ("\xe4", False),
        ],
    )  # fmt: skip
    def test_authority_is_a_host_with_or_without_a_port(self, text, valid):
        assert is_authority(text) is valid

    @pytest.mark.parametrize(
        "cookie, name",
        [
            ("a=b", "a"), (" a\t=b; Path=/", "a"), ("a=b=c", "a"), ("a", "a"), ("a;b=c", "a"), ("=a", "a"),
            ("\t= =a=b", "a"), ("", ""), ("=", ""),
        ],
    )  # fmt: skip
    def test_cookie_name_is_found_however_loosely_it_is_read(self, cookie, name):
        assert cookie_name(cookie) == name

    @pytest.mark.parametrize(
        "fields, values",
        [
            (["a=1; b=2; a=3"], ["1", "3"]), (["b=2", "a=1;a=2"], ["1", "2"]), (["xa=1; A=2; a"], []), ([], []),
            ([" a=x=y \t; a="], ["x=y", ""]),
        ],
    )  # fmt: skip
    def test_cookie_has_all_values_that_the_client_sent(self, fields, values):
        assert cookie_values(headers_of([("Cookie", one) for one in fields]), "a") == values


class TestHeadsOnTheWire:
    @pytest.mark.parametrize(
        "status, raw", [case for case in BAD_REQUESTS if not case[1].startswith(b"\r\n")], ids=case_id
    )
    def test_bad_head_gets_one_answer_and_the_end(self, proxy, status, raw):
        """What follows a bad head is never parsed."""
        with proxy.wire() as wire:
            wire.send(raw)
            answer = wire.message()
            assert status_of(answer) == status
            assert fields_of(answer)["connection"] == "close"
            with contextlib.suppress(OSError):
                wire.send(request("GET", "/proxy/"))
            assert wire.rest() == b""

    @pytest.mark.parametrize(
        "raw, status",
        [
            (b"GET / HTTP/1.1\nHost: a\n\n", 400), (b"GET /\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00", 400),
            (b"GET / HTTP/1.1\r\nX: a\rb", 400), (b"GET / HTTP/1.1\r\nX: a\x00", 400), (b"PRI * HTTP/2.0\r\n", 505),
            (b"\r\n\r\n\r\n", 400), (b"\n", 400), (b"GET /" + b"a" * 20000, 414),
            (b"GET / HTTP/1.1\r\nX: " + b"a" * 70000, 431), (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12000, 431),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_unfinished_head_is_refused_as_soon_as_it_is_wrong(self, proxy, raw, status):
        """The head is never finished, and no deadline is waited for."""
        with proxy.wire() as wire:
            wire.send(raw)
            assert status_of(wire.message()) == status
            wire.end()
            assert wire.rest() == b""

    @pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n"])
    def test_leading_empty_lines_are_skipped(self, proxy, empty):
        assert status_of(proxy.ask(empty + request("GET", "/proxy/"))) == 200

    def test_request_byte_by_byte_arrives_whole(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            for octet in b"\r\n" + request("POST", "/proxy/%d/a" % app.port, "Content-Length: 3", body=b"abc"):
                wire.send(bytes([octet]))
            assert wire.message()[2] == b"ok"
        assert app.messages[0][0] == "POST /a HTTP/1.1"
        assert app.messages[0][2] == b"abc"

    def test_head_that_ends_early_is_refused(self, proxy):
        with proxy.wire() as wire:
            wire.send(b"GET / HTTP/1.1\r\nHo")
            wire.end()
            assert status_of(wire.message()) == 400
            assert wire.rest() == b""

    def test_options_asterisk_is_answered(self, proxy):
        assert status_of(proxy.ask(request("OPTIONS", "*"), no_body=True)) == 204


# ---------------------------------------------------------------------------------------------------------------------
# Bodies
# ---------------------------------------------------------------------------------------------------------------------

CHUNKED_BODIES = [
    (b"0\r\n\r\n", b""), (b"3\r\nabc\r\n0\r\n\r\n", b"abc"), (b"1\r\na\r\n0002\r\nbc\r\n000\r\n\r\n", b"abc"),
    (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"), (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
    (b'3;a;b=c;d="e;\\"f" ; g = h\r\nabc\r\n0;x\r\n\r\n', b"abc"), (b"3\r\nabc\r\n0\r\nX: y\r\nZ:\r\n\r\n", b"abc"),
    (b"000000000000003\r\na\r\n\r\n0\r\n\r\n", b"a\r\n"), (b"03\r\nabc\r\n3;x\r\ndef\r\n0\r\n\r\n", b"abcdef"),
    (b"2\r\nab\r\n2\r\ncd\r\n00;x\r\nX: y\r\nZ: w\r\n\r\n", b"abcd"),
]  # fmt: skip
BAD_CHUNKED_BODIES = [
    b"\r\n", b"g\r\n", b"-1\r\na", b"+1\r\na", b"0x1\r\na", b" 1\r\na", b"\t1\r\na", b"1 \r\na\r\n", b"1_0\r\n",
    b"\xb2\r\n", b"00000000000000001\r\na", b"1\na\r\n", b"1\ra\r\n", b"1;\r\na", b"1;a=\r\nb", b"1;a=\"\r\nb",
    b"1;a\x00\r\nb", b"1;a\rb\r\n", b"1\r\nab\r\n", b"1\r\na\n0\r\n\r\n", b"1\r\na\r0", b"1\r\na0\r\n\r\n",
    b"0\r\nX\r\n\r\n", b"0\r\n X: y\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\nX: \x00\r\n\r\n", b"0\r\nX: y\n\r\n",
    b"0\n\n", b"1;" + b"a" * 5000, b"1;" + b"a" * 5000 + b"\r\na\r\n", b"0\r\n" + b"X: y\r\n" * 5000,
    b"0\r\nX: " + b"y" * 20000, b"zz", b"12345678901234567", b"1000000000000000\r\n", b"ffffffffffffffff\r\n",
    b"8000000000000001\r\na\r\n",
]  # fmt: skip


def chunk(data):
    """A chunk that holds `data`, or the last chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def decode(framing, pieces):
    """The body that the pieces make and the bytes behind it; None if it is not whole; ProxyError if it is refused."""
    decoder = body_decoder(framing, DEFAULT)
    data, behind = b"", b""
    for piece in pieces:
        if decoder.finished:
            behind += piece
        else:
            data += b"".join(decoder.feed(piece))
            behind = decoder.rest
    return (data, behind) if decoder.finished else None


def single_bytes(raw):
    return [raw[at : at + 1] for at in range(len(raw))]


def feedings(raw):
    """The same bytes whole and byte by byte, and with another message right behind them."""
    behind = b"GET /"
    return [([raw], b""), (single_bytes(raw), b""), ([raw + behind], behind), (single_bytes(raw + behind), behind)]


class TestBodies:
    @pytest.mark.parametrize(
        "framing, kind",
        [
            (NO_BODY, LengthDecoder), (Framing("length", 3), LengthDecoder), (UNTIL_CLOSE, UntilCloseDecoder),
            (CHUNKED, ChunkedDecoder),
        ],
    )  # fmt: skip
    def test_decoder_is_that_of_the_framing(self, framing, kind):
        decoder = body_decoder(framing, DEFAULT)
        assert (type(decoder), decoder.finished, decoder.rest) == (kind, framing is NO_BODY, b"")

    @pytest.mark.parametrize("raw, data", CHUNKED_BODIES, ids=case_id)
    def test_chunked_body_ends_with_its_last_chunk(self, raw, data):
        for pieces, behind in feedings(raw):
            assert decode(CHUNKED, pieces) == (data, behind)

    @pytest.mark.parametrize("raw", [raw for raw, _ in CHUNKED_BODIES], ids=case_id)
    def test_chunked_body_that_breaks_off_is_not_whole(self, raw):
        for end in range(len(raw)):
            for pieces in ([raw[:end]], single_bytes(raw[:end])):
                assert decode(CHUNKED, pieces) is None

    @pytest.mark.parametrize("raw", BAD_CHUNKED_BODIES, ids=case_id)
    def test_bad_chunk_is_refused(self, raw):
        for before in (b"", b"3\r\nabc\r\n"):
            for pieces in ([before + raw], [before, raw], single_bytes(before + raw)):
                assert status_of_error(decode, CHUNKED, pieces) == 400

    @pytest.mark.parametrize(
        "line, is_right",
        [
            (b"3", True), (b"03", True), (b"3;x", True), (b"+3", False), (b" 3", False), (b"3 ", False),
            (b"0x3", False), (b"0_3", False), (b"-3", False), (b"\xb3", False), (b"3\n", False), (b"\t3", False),
            (b"", False), (b"4", False), (b"2", False),
        ],
    )  # fmt: skip
    def test_chunk_that_comes_alone_is_checked_as_closely(self, line, is_right):
        """The events of an app come so."""
        pieces = [line + b"\r\nabc\r\n", b"0\r\n\r\n"]
        if is_right:
            assert decode(CHUNKED, pieces) == (b"abc", b"")
        else:
            assert status_of_error(decode, CHUNKED, pieces) == 400

    @pytest.mark.parametrize("size", [1, 15, 16, 17, 254, 255, 256, 4093, 4094, 4095, 4096, 65535, 65536])
    def test_chunk_of_any_size_must_end_with_its_data(self, size):
        end = b"0\r\n\r\n"
        data = (b"\n\r" * size)[:size]
        whole = b"%x\r\n" % size + data
        assert decode(CHUNKED, [whole + b"\r\n", end]) == (data, b"")
        for wrong in (whole + b"\r\n\r\n", whole + b"\n\r\n", whole[:-1] + b"\r\n", whole + b"x\r\n", whole + b"x\n"):
            assert status_of_error(decode, CHUNKED, [wrong, end, end]) == 400

    @pytest.mark.parametrize("limit, raw", [
        (DEFAULT.max_chunk_line_bytes, b"0;%s\r\n\r\n"), (DEFAULT.max_trailer_bytes - 2, b"0\r\nX:%s\r\n\r\n"),
    ])  # fmt: skip
    def test_line_of_a_chunked_body_may_be_as_long_as_the_limit(self, limit, raw):
        for length, is_right in ((limit - 2, True), (limit - 1, False)):
            whole = raw % (b"a" * length)
            for pieces in ([whole], single_bytes(whole), [whole[:-4], whole[-4:-3], whole[-3:]]):
                if is_right:
                    assert decode(CHUNKED, pieces) == (b"", b"")
                else:
                    assert status_of_error(decode, CHUNKED, pieces) == 400

    def test_trailers_together_are_limited(self):
        line = b"X: yz\r\n" * 10
        count = DEFAULT.max_trailer_bytes // len(line)
        assert decode(CHUNKED, [b"0\r\n", line * count, b"\r\n"]) == (b"", b"")
        assert status_of_error(decode, CHUNKED, [b"0\r\n", line * count, line, b"\r\n"]) == 400

    def test_part_of_a_chunk_is_not_held_back(self):
        decoder = ChunkedDecoder(DEFAULT)
        pieces = (b"5", b"\r\n", b"ab", b"cde\r", b"\n1\r\nf", b"\r\n0", b"\r\n\r", b"\nGET")
        given = [b"".join(decoder.feed(piece)) for piece in pieces]
        assert given == [b"", b"", b"ab", b"cde", b"f", b"", b"", b""]
        assert (decoder.finished, decoder.rest) == (True, b"GET")

    @pytest.mark.parametrize("raw", [b"", b"abc", b"\r\n\r\n"])
    def test_body_of_known_length_ends_there(self, raw):
        for pieces, behind in feedings(raw):
            assert decode(Framing("length", len(raw)), pieces) == (raw, behind)

    def test_body_of_known_length_that_breaks_off_is_not_whole(self):
        for pieces in ([b"abc"], single_bytes(b"abc")):
            assert decode(Framing("length", 4), pieces) is None

    def test_message_without_a_body_has_all_bytes_behind_it(self):
        assert decode(NO_BODY, [b"abc"]) == (b"", b"abc")

    def test_body_until_close_is_all_that_comes(self):
        for pieces, behind in feedings(b"abc\r\n0\r\n\r\n"):
            decoder = UntilCloseDecoder()
            assert b"".join(b"".join(decoder.feed(piece)) for piece in pieces) == b"abc\r\n0\r\n\r\n" + behind
            assert not decoder.finished
            decoder.end()
            assert (decoder.finished, decoder.rest) == (True, b"")

    @pytest.mark.parametrize(
        "framing, raw",
        [
            (Framing("length", 8), b"a hello"), (Framing("length", 8), b""), (CHUNKED, b""), (CHUNKED, b"7"),
            (CHUNKED, b"7\r\na hel"), (CHUNKED, b"7\r\na hello\r\n"), (CHUNKED, b"7\r\na hello\r\n0\r\n"),
            (CHUNKED, b"7\r\na hello\r\n0\r\nX: y\r\n"),
        ],
    )  # fmt: skip
    def test_end_of_the_connection_before_that_of_the_body_is_an_error(self, framing, raw):
        decoder = body_decoder(framing, DEFAULT)
        for piece in single_bytes(raw):
            decoder.feed(piece)
        with pytest.raises(Truncated):
            decoder.end()
        assert not decoder.finished

    def test_chunked_body_may_come_in_pieces_of_any_size(self):
        chance = random.Random(9)
        for _ in range(300):
            sizes = [chance.randrange(1, 40) for _ in range(chance.randrange(5))]
            chunks = [bytes(chance.randrange(256) for _ in range(size)) for size in sizes]
            raw = b"".join(map(chunk, chunks)) + chunk(b"")
            cuts = sorted(chance.randrange(len(raw) + 1) for _ in range(4))
            split = [raw[a:b] for a, b in zip([0] + cuts, cuts + [len(raw)]) if a < b]
            assert decode(CHUNKED, split) == (b"".join(chunks), b"")

    def test_garbage_gives_a_body_or_a_refusal(self):
        chance = random.Random(20261124)
        alphabet = b"\r\n0123aF;=\" x\x00\xff"
        for _ in range(10000):
            raw = bytearray(chance.choice(CHUNKED_BODIES)[0])
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(raw) + 1)
                raw[at : at + chance.randrange(2)] = bytes(chance.choice(alphabet) for _ in range(chance.randrange(3)))
            outcomes = []
            for pieces in ([bytes(raw)], single_bytes(bytes(raw))):
                try:
                    outcomes.append(decode(CHUNKED, pieces))
                except ProxyError as error:
                    outcomes.append(error.status)
            if None not in outcomes:  # a line that is not whole may be refused early or late
                assert outcomes[0] == outcomes[1], bytes(raw)


class TestFramingOnTheWire:
    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "GET", "PROPFIND", "FROB"])
    @pytest.mark.parametrize(
        "sent, raw, declared, arrives",
        [
            (("content-LENGTH: 03", "Content-Length:03"), b"abc", [("Content-Length", "3")], b"abc"),
            (
                ("Transfer-Encoding: CHUNKED", "Trailer: X"), b"3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n",
                [("Transfer-Encoding", "chunked")], b"abc",
            ),
            (("Content-Length: 0",), b"", [("Content-Length", "0")], b""), ((), b"", [], b""),
        ],
        ids=["length", "chunked", "empty", "none"],
    )  # fmt: skip
    def test_request_is_framed_anew_for_the_upstream(self, proxy, upstream, method, sent, raw, declared, arrives):
        """A second request on the same connection shows that the first one's body ended where it should."""
        app = upstream(answering(OK))
        target = "/proxy/%d/" % app.port
        with proxy.wire() as wire:
            wire.send(request(method, target, *sent, body=raw), request("GET", target + "next"))
            assert [wire.message()[2], wire.message()[2]] == [b"ok", b"ok"]
        framing = ("content-length", "transfer-encoding", "trailer")
        assert [field for field in app.messages[0][1] if field[0].lower() in framing] == declared
        assert [message[2] for message in app.messages] == [arrives, b""]
        assert app.messages[1][0] == "GET /next HTTP/1.1"

    # The wire has no character beyond latin-1, and a control byte is refused with the head, before it is a coding.
    @pytest.mark.parametrize(
        "status, version, fields",
        [
            (400 if "\x0b" in fields[0][1] else status, version, fields)
            for status, version, fields in BAD_FRAMINGS
            if "٥" not in fields[0][1]
        ],
        ids=case_id,
    )
    def test_bad_framing_is_refused_and_nothing_is_smuggled(self, proxy, upstream, status, version, fields):
        app = upstream(answering(OK))
        lines = "".join("%s: %s\r\n" % field for field in fields)
        smuggled = b"GET /proxy/%d/smuggled HTTP/1.1\r\nHost: a\r\n\r\n" % app.port
        with proxy.wire() as wire:
            head = "POST /proxy/%d/ HTTP/%s\r\nHost: a\r\n%s\r\n" % (app.port, version, lines)
            wire.send(head.encode("latin-1") + b"0\r\n\r\n" + smuggled)
            assert status_of(wire.message()) == status
            wire.end()
            assert wire.rest() == b""
        assert app.connections == 0

    @pytest.mark.parametrize("before", [b"", b"3\r\nabc\r\n"], ids=["at once", "behind a good chunk"])
    @pytest.mark.parametrize("raw", BAD_CHUNKED_BODIES, ids=case_id)
    def test_bad_chunk_is_refused_and_the_upstream_sees_no_end(self, proxy, upstream, raw, before):
        seen = []
        app = upstream(lambda wire, app: seen.append(wire.rest()))
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Transfer-Encoding: chunked"), before, raw)
            assert status_of(wire.message()) == 400
            wire.end()
            assert wire.rest() == b""
        eventually(lambda: len(seen) == app.connections)
        assert all(not got.endswith(b"\r\n0\r\n\r\n") for got in seen)


# ---------------------------------------------------------------------------------------------------------------------
# Header rewriting
# ---------------------------------------------------------------------------------------------------------------------

STRIPPED = "/proxy/8080"
ABSOLUTE = "/proxy/absolute/8080"
FORWARDED = [
    ("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", "http"), ("X-Forwarded-Host", "here:8888"),
    ("X-Forwarded-Port", "8888"), ("X-Forwarded-Prefix", STRIPPED), ("X-Forwarded-Context", STRIPPED),
    ("X-ProxyContextPath", STRIPPED),
]  # fmt: skip


def gate_with(**options):
    return TokenGate(checked_config(Config(**options)), True, 8888)


def asked_for(target, *lines, host="here:8888", method="GET", minor="1", gate=None):
    """The request with these fields; without a Host field if `host` is empty."""
    first = ["%s %s HTTP/1.%s" % (method, target, minor)] + (["Host: " + host] if host else [])
    raw = "\r\n".join(first + list(lines) + ["", ""]).encode("latin-1")
    return parse_request(raw, "192.0.2.7", "http", (gate or gate_with()).config)


def split_head(raw):
    """The first line and the fields of a head."""
    first, *lines = raw.decode("latin-1")[:-4].split("\r\n")
    return first, [tuple(line.split(": ", 1)) for line in lines]


def sent_upstream(*lines, target=STRIPPED + "/a", **options):
    """The fields of a request as the app gets them."""
    how = {name: options.pop(name) for name in ("host", "method", "minor") if name in options}
    gate = gate_with(**options)
    return split_head(request_for_upstream(asked_for(target, *lines, gate=gate, **how), gate))[1]


def sent_to_client(*fields, target=STRIPPED + "/a", status=200, is_unprefixed=False, **options):
    """The fields of a response as the client gets them."""
    how = {name: options.pop(name) for name in ("host", "method") if name in options}
    gate = gate_with(**options)
    asked = asked_for(target, gate=gate, **how)._replace(is_unprefixed=is_unprefixed)
    head = "HTTP/1.1 %d \r\n%s\r\n" % (status, "".join("%s: %s\r\n" % field for field in fields))
    response = parse_response(head.encode("latin-1"), asked.method, gate.config)
    return split_head(serialise(response_lines(response, asked, gate), response.framing))[1]


class TestRewriting:
    @pytest.mark.parametrize("base, target, route, path, query, sent", ROUTES, ids=case_id)
    def test_target_is_that_at_home(self, base, target, route, path, query, sent):
        gate = gate_with(base=base)
        first = split_head(request_for_upstream(asked_for(target, gate=gate), gate))[0]
        assert first == "GET %s HTTP/1.1" % sent

    @pytest.mark.parametrize("minor", ["0", "1"])
    def test_request_is_written_anew_in_http_1_1(self, minor):
        asked = asked_for(STRIPPED + "/a", "A: b", "a:  c\xe4 ", "Cookie: x=y", method="FROB", minor=minor)
        assert request_for_upstream(asked, gate_with()) == (
            b"FROB /a HTTP/1.1\r\nHost: localhost:8080\r\nA: b\r\na:  c\xe4 \r\nCookie: x=y\r\n"
            + "".join("%s: %s\r\n" % field for field in FORWARDED).encode()
            + b"\r\n"
        )

    def test_absolute_form_has_no_prefix_fields(self):
        assert sent_upstream(target=ABSOLUTE + "/a") == [("Host", "localhost:8080")] + FORWARDED[:4]

    def test_request_without_a_host_has_no_forwarded_host(self):
        fields = sent_upstream(host="", minor="0")
        assert fields == [("Host", "localhost:8080")] + FORWARDED[:2] + FORWARDED[4:]

    @pytest.mark.parametrize(
        "line",
        [
            "Connection: close", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: trailers", "Trailer: X",
            "Upgrade: h2c", "Upgrade: websocket", "Proxy-Authorization: x", "Proxy-Authenticate: x",
            "Forwarded: for=1.2.3.4", "x-forwarded-for: 1.2.3.4", "X-FORWARDED-HOST: evil", "X-Forwarded-Prefix: /evil",
            "X-Forwarded-Context: /evil", "X-ProxyContextPath: /evil", "X-Forwarded-Port: 1",
            "X-Forwarded-Proto: https", "X_Forwarded_For: 1.2.3.4", "x-forwarded_host: evil",
            "X_Forwarded-Prefix: /evil", "Content_Length: 5",
        ],
    )  # fmt: skip
    def test_field_between_neighbours_or_of_ours_is_not_passed_on(self, line):
        assert sent_upstream(line) == [("Host", "localhost:8080")] + FORWARDED

    @pytest.mark.parametrize(
        "lines, field",
        [
            (("Content-Length: 03",), ("Content-Length", "3")), (("content-length:0",), ("Content-Length", "0")),
            (("Content-Length: 3", "Content-Length: 3, 3"), ("Content-Length", "3")),
            (("Transfer-Encoding: CHUNKED", "Trailer: X"), ("Transfer-Encoding", "chunked")),
            (("Connection: content-length", "Content-Length: 3"), ("Content-Length", "3")),
            (("Connection: transfer-encoding", "Transfer-Encoding: chunked"), ("Transfer-Encoding", "chunked")),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_body_is_announced_anew(self, lines, field):
        assert sent_upstream(*lines) == [("Host", "localhost:8080")] + FORWARDED + [field]

    def test_field_that_connection_names_is_not_passed_on(self):
        """Except those that are written by the proxy, which are all there, once."""
        named = "Connection: x-a, HOST, X-Forwarded-For, x-forwarded-prefix ,content-length, close"
        fields = sent_upstream(named, "X-A: b", "X-B: c", "Content-Length: 5")
        assert fields == [("Host", "localhost:8080"), ("X-B", "c")] + FORWARDED + [("Content-Length", "5")]

    def test_websocket_handshake_is_passed_on(self):
        fields = sent_upstream("Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: k")
        assert fields[:2] == [("Host", "localhost:8080"), ("Sec-WebSocket-Key", "k")]
        assert fields[2:] == FORWARDED + [("Connection", "Upgrade"), ("Upgrade", "websocket")]

    @pytest.mark.parametrize("minor, is_kept", [("1", True), ("0", False)])
    def test_expect_of_http_1_0_is_dropped(self, minor, is_kept):
        assert (("Expect", "100-continue") in sent_upstream("Expect: 100-continue", minor=minor)) is is_kept

    @pytest.mark.parametrize(
        "line, sent",
        [
            ("Cookie: a=b; port_proxy_8888=x; c=d", "a=b; c=d"), ("Cookie: port_proxy_8888=x; a=b", "a=b"),
            ("Cookie: port_proxy_8888=x", None), ("Cookie: port_proxy_8888_app=x;  a", "a"),
            ("Cookie: port_proxy_1=x; a", "a"), ("Cookie:  =port_proxy_8888=x", None), ("Cookie: a ;;b=", "a ;;b="),
            ("Cookie: xport_proxy_8888=x", "xport_proxy_8888=x"), ("Cookie: port_proxy_8080=x", "port_proxy_8080=x"),
            ("Authorization: token s3cret-token", None), ("Authorization: BEARER  s3cret-token", None),
            ("Authorization: Bearer other", "Bearer other"),
            ("Authorization: Basic s3cret-token", "Basic s3cret-token"),
        ],
    )  # fmt: skip
    def test_credential_of_ours_does_not_reach_the_app(self, line, sent):
        assert dict(sent_upstream(line, token="s3cret-token")).get(line.partition(":")[0]) == sent

    @pytest.mark.parametrize(
        "query, sent",
        [
            ("?token=s3cret-token", ""), ("?a&token=s3cret-token&b=", "?a&b="), ("?%74oken=s3cret%2Dtoken", ""),
            ("?token=other", "?token=other"), ("?a=%zz&&", "?a=%zz&&"), ("?", "?"),
            ("?xtoken=s3cret-token", "?xtoken=s3cret-token"),
        ],
    )  # fmt: skip
    def test_token_of_ours_is_cut_out_of_query_and_referer(self, query, sent):
        gate = gate_with(token="s3cret-token")
        asked = asked_for(STRIPPED + "/a" + query, "Referer: http://here:8888%s/b%s" % (STRIPPED, query), gate=gate)
        first, fields = split_head(request_for_upstream(asked, gate))
        assert first == "GET /a%s HTTP/1.1" % sent
        assert dict(fields)["Referer"] == "http://localhost:8080/b" + sent

    @pytest.mark.parametrize("target, home", [
        (STRIPPED + "/a", "http://localhost:8080"), (ABSOLUTE + "/a", "http://localhost:8080"),
        ("/proxy/db:80/a", "http://db:80"), ("/proxy/8443/a", "https://localhost:8443"),
    ])  # fmt: skip
    def test_own_origin_becomes_that_at_home(self, target, home):
        """X-Forwarded-Host and -Port go, since apps compare them with Origin."""
        lines = ("Origin: http://here:8888", "Referer: http://here:8888" + target)
        fields = dict(sent_upstream(*lines, target=target, upstream_tls=["8443"]))
        assert (fields["Origin"], fields["Host"]) == (home, home.partition("//")[2])
        assert fields["Referer"].startswith(home + "/")
        assert not {"X-Forwarded-Host", "X-Forwarded-Port"} & set(fields)

    @pytest.mark.parametrize("origin", ["http://evil", "null", "http://here:1", "https://localhost:8080"])
    def test_foreign_origin_stays(self, origin):
        fields = dict(sent_upstream("Origin: " + origin))
        assert (fields["Origin"], fields["X-Forwarded-Host"]) == (origin, "here:8888")

    def test_preserved_host_keeps_origin_and_referer(self):
        origin, referer = "http://here:8888", "http://here:8888/proxy/8080/x"
        fields = dict(sent_upstream("Origin: " + origin, "Referer: " + referer, preserve_host=True))
        assert (fields["Host"], fields["X-Forwarded-Host"]) == ("here:8888", "here:8888")
        assert (fields["Origin"], fields["Referer"]) == (origin, referer)

    def test_host_that_is_not_there_cannot_be_preserved(self):
        assert dict(sent_upstream(host="", minor="0", preserve_host=True))["Host"] == "localhost:8080"

    @pytest.mark.parametrize(
        "prefix, referer, translated",
        [
            (STRIPPED, "http://here:8888/proxy/8080/x?y", "http://localhost:8080/x?y"),
            (STRIPPED, "http://here:8888/proxy/8080", "http://localhost:8080/"),
            (STRIPPED, "http://here:8888/proxy/8080?q", "http://localhost:8080/?q"),
            (STRIPPED, "http://here:8888/proxy/80801/secret", "http://localhost:8080/"),
            (STRIPPED, "http://here:8888/", "http://localhost:8080/"),
            (STRIPPED, "http://here:8888", "http://localhost:8080/"),
            (STRIPPED, "HTTPS://HERE:8888/proxy/8080/x", "http://localhost:8080/x"),
            (ABSOLUTE, "http://here:8888/proxy/absolute/8080/x", "http://localhost:8080/proxy/absolute/8080/x"),
            (ABSOLUTE, "http://here:8888/x", "http://localhost:8080/"),
            (STRIPPED, "https://evil/proxy/8080/x", "https://evil/proxy/8080/x"),
            (STRIPPED, "about:blank", "about:blank"), (STRIPPED, "http://here:1/x", "http://here:1/x"),
        ],
    )  # fmt: skip
    def test_referer_of_the_app_becomes_that_at_home(self, prefix, referer, translated):
        assert dict(sent_upstream("Referer: " + referer, target=prefix + "/a"))["Referer"] == translated

    @pytest.mark.parametrize(
        "location, stripped, absolute",
        [
            ("/x?y#z", "/proxy/8080/x?y#z", "/x?y#z"), ("/", "/proxy/8080/", "/"),
            ("/proxy/8080/x", "/proxy/8080/x", "/proxy/8080/x"), ("/proxy/8080", "/proxy/8080", "/proxy/8080"),
            ("/proxy/8080?x", "/proxy/8080?x", "/proxy/8080?x"), ("/proxy/8080#x", "/proxy/8080#x", "/proxy/8080#x"),
            ("/proxy/80801", "/proxy/8080/proxy/80801", "/proxy/80801"), ("x", "x", "x"), ("../x", "../x", "../x"),
            ("?x", "?x", "?x"), ("", "", ""), ("//evil/x", "//evil/x", "//evil/x"),
            ("https://evil/x", "https://evil/x", "https://evil/x"), ("mailto:a", "mailto:a", "mailto:a"),
            ("http://localhost:8080/x", "/proxy/8080/x", "/x"), ("HTTP://LOCALHOST:8080", "/proxy/8080/", "/"),
            ("https://localhost:8080?x", "/proxy/8080/?x", "/?x"), ("http://[::1]:8080/x", "/proxy/8080/x", "/x"),
            ("http://0.0.0.0:8080/x", "/proxy/8080/x", "/x"), ("http://[::]:8080/x", "/proxy/8080/x", "/x"),
            ("http://127.0.0.1:8080/proxy/8080/x", "/proxy/8080/x", "/proxy/8080/x"),
            ("http://localhost/x", "http://localhost/x", "http://localhost/x"),
            ("http://localhost:8081/x", "http://localhost:8081/x", "http://localhost:8081/x"),
            ("http://here:8888/x", "/proxy/8080/x", "/x"), ("http://HERE:8888/x", "/proxy/8080/x", "/x"),
            ("http://localhost:8080//evil/x", "/proxy/8080//evil/x", "/.//evil/x"),
            ("http://localhost:8080/\\evil", "/proxy/8080/\\evil", "/./\\evil"),
            ("http://localhost:8080/\t/evil", "/proxy/8080/\t/evil", "/./\t/evil"),
            ("http://u@localhost:8080/x", "http://u@localhost:8080/x", "http://u@localhost:8080/x"),
        ],
    )  # fmt: skip
    def test_location_at_home_becomes_a_path_below_the_prefix(self, location, stripped, absolute):
        for prefix, translated in ((STRIPPED, stripped), (ABSOLUTE, absolute)):
            for name, before in (("Location", ""), ("content-location", ""), ("Refresh", "5; url=")):
                fields = sent_to_client((name, before + location), target=prefix + "/a")
                assert fields == [(name, before + translated)]

    @pytest.mark.parametrize(
        "refresh, rewritten",
        [
            ("5", "5"), ("0;URL='/x'", "0;URL='/proxy/8080/x'"), ("0, /x", "0, /proxy/8080/x"), ("0;url=x", "0;url=x"),
            ('1.5 ; Url = "/x" y', '1.5 ; Url = "/proxy/8080/x" y'), ("soon", "soon"),
        ],
    )  # fmt: skip
    def test_url_in_refresh_is_translated(self, refresh, rewritten):
        assert sent_to_client(("Refresh", refresh)) == [("Refresh", rewritten)]

    @pytest.mark.parametrize(
        "target, location, translated",
        [
            ("/proxy/80/a", "http://localhost/x", "/proxy/80/x"), ("/proxy/443/a", "https://[::1]/x", "/proxy/443/x"),
            ("/proxy/443/a", "http://localhost/x", "http://localhost/x"),
            ("/proxy/80/a", "https://localhost/x", "https://localhost/x"),
            ("/proxy/8080/a", "http://%s:8080/x" % socket.gethostname(), "/proxy/8080/x"),
            ("/proxy/DB:80/a", "http://db/x", "/proxy/DB:80/x"), ("/proxy/DB:81/a", "http://Db:81/x", "/proxy/DB:81/x"),
            ("/proxy/db:81/a", "http://localhost:81/x", "http://localhost:81/x"),
        ],
    )  # fmt: skip
    def test_location_by_another_name_of_the_upstream_is_translated(self, target, location, translated):
        assert sent_to_client(("Location", location), target=target) == [("Location", translated)]

    def test_location_at_the_host_of_a_port_becomes_a_path(self):
        fields = sent_to_client(("Location", "http://localhost:8080/x"), target="/a", host="8080.localhost:8888")
        assert fields == [("Location", "/x")]

    @pytest.mark.parametrize(
        "cookie, rewritten",
        [
            ("a=b", "a=b"), ("a=b; Path=/", "a=b; Path=/proxy/8080/"),
            ("a=b;path=/x;HttpOnly", "a=b;path=/proxy/8080/x;HttpOnly"),
            ("a=b; Path=/proxy/8080", "a=b; Path=/proxy/8080"), ("a=b; Path=/proxy/8080/x", "a=b; Path=/proxy/8080/x"),
            ("a=b; Path=", "a=b; Path="), ("a=b; Path", "a=b; Path"), ("a=b; Path=x", "a=b; Path=x"),
            ("a=b; Domain=localhost; Path=/", "a=b; Path=/proxy/8080/"), ("a=b; Domain=.LocalHost", "a=b"),
            ("a=b; domain=127.0.0.1; Secure", "a=b; Secure"), ("a=b; Domain=here", "a=b"),
            ("a=b; Domain=example.org", "a=b; Domain=example.org"),
            ("__Host-a=b; Path=/; Secure", "__Host-a=b; Path=/; Secure"),
            ("__Secure-a=b; Path=/", "__Secure-a=b; Path=/proxy/8080/"),
            ("path=/x; SameSite=Lax", "path=/x; SameSite=Lax"),
            ("a=\xe4\"; Expires=Wed, 09 Jun 2021 10:18:14 GMT", "a=\xe4\"; Expires=Wed, 09 Jun 2021 10:18:14 GMT"),
        ],
    )  # fmt: skip
    def test_cookie_of_the_app_is_set_below_the_prefix(self, cookie, rewritten):
        assert sent_to_client(("Set-Cookie", cookie)) == [("Set-Cookie", rewritten)]
        assert sent_to_client(("Set-Cookie", cookie), target=ABSOLUTE + "/a") == [("Set-Cookie", cookie)]

    @pytest.mark.parametrize("prefix", [STRIPPED, ABSOLUTE])
    @pytest.mark.parametrize("name", ["port_proxy_8888", "port_proxy_8888_app", "port_proxy_1", "=port_proxy_8888"])
    def test_cookie_of_ours_cannot_be_set_by_an_app(self, name, prefix):
        fields = sent_to_client(("Set-Cookie", name + "=x; Path=/"), ("Set-Cookie", "a=b"), target=prefix + "/a")
        assert fields == [("Set-Cookie", "a=b")]

    @pytest.mark.parametrize("domain", ["8080.apps.example.org", "apps.example.org"])
    def test_domain_of_the_host_of_a_port_is_dropped(self, domain):
        """That of the proxy itself too, since all apps would get the cookie."""
        fields = sent_to_client(
            ("Set-Cookie", "a=b; Domain=%s; Path=/x" % domain),
            target="/a", host="8080.apps.example.org", domains=["apps.example.org"],
        )  # fmt: skip
        assert fields == [("Set-Cookie", "a=b; Path=/x")]

    @pytest.mark.parametrize(
        "cookie, rewritten",
        [
            ("a=b", "a=b; Path=/proxy/8080/"), ("a=b; Path=/", "a=b; Path=/proxy/8080/"),
            ("a=b; Max-Age=1", "a=b; Max-Age=1; Path=/proxy/8080/"),
        ],
    )  # fmt: skip
    def test_cookie_of_an_unprefixed_request_is_set_below_the_prefix(self, cookie, rewritten):
        assert sent_to_client(("Set-Cookie", cookie), is_unprefixed=True)[0] == ("Set-Cookie", rewritten)

    @pytest.mark.parametrize(
        "allowed", ["/", "/a/", "./", "../../", "http://here:8888/", STRIPPED + "/../../", STRIPPED]
    )
    @pytest.mark.parametrize("is_unprefixed", [False, True])
    @pytest.mark.parametrize("prefix", [STRIPPED, ABSOLUTE])
    def test_service_worker_controls_no_more_than_its_app(self, prefix, is_unprefixed, allowed):
        field = ("Service-Worker-Allowed", allowed)
        own = [("Service-Worker-Allowed", prefix + "/")]
        assert sent_to_client(field, target=prefix + "/a", is_unprefixed=is_unprefixed) == own

    @pytest.mark.parametrize("target, is_unprefixed", [(ABSOLUTE, False), (STRIPPED + "/a", True)])
    def test_service_worker_outside_of_the_folder_of_its_app_is_limited_to_that(self, target, is_unprefixed):
        """Its scope would be the folder of all apps, or the whole origin."""
        prefix = ABSOLUTE if target == ABSOLUTE else STRIPPED
        own = [("Service-Worker-Allowed", prefix + "/")]
        assert sent_to_client(target=target, is_unprefixed=is_unprefixed) == own

    def test_service_worker_at_the_host_of_a_port_controls_what_it_says(self):
        field = ("Service-Worker-Allowed", "/a/")
        assert sent_to_client(field, target="/a", host="8080.localhost") == [field]

    def test_response_is_written_anew(self):
        fields = (
            ("A", "b"), ("Connection", "x-c, close"), ("X-C", "d"), ("Keep-Alive", "x"),
            ("Transfer-Encoding", "chunked"), ("Upgrade", "h2"), ("Trailer", "Y"), ("Proxy-Authenticate", "x"),
            ("Set-Cookie", "a"), ("Set-Cookie", "b"),
        )  # fmt: skip
        assert sent_to_client(*fields) == [
            ("A", "b"), ("Set-Cookie", "a"), ("Set-Cookie", "b"), ("Transfer-Encoding", "chunked"),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "method, status, length",
        [
            ("HEAD", 200, "5"), ("GET", 304, "5"), ("HEAD", 304, "5"), ("GET", 200, "5"), ("GET", 204, None),
            ("HEAD", 204, None), ("GET", 103, None), ("GET", 101, None),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("lengths", [["5"], ["5", "5"], ["5 , 5"]])
    def test_length_of_a_body_that_is_not_sent_is_kept(self, method, status, length, lengths):
        """HEAD and 304 keep their Content-Length, equal copies as one; 1xx and 204 may have none."""
        fields = sent_to_client(*[("Content-Length", one) for one in lengths], method=method, status=status)
        told = [value for name, value in fields if name == "Content-Length"]
        assert told == ([length] if length else [])

    def test_switched_protocol_is_announced(self):
        fields = sent_to_client(("Upgrade", "websocket"), ("Connection", "Upgrade"), ("X", "y"), status=101)
        assert fields == [("X", "y"), ("Connection", "Upgrade"), ("Upgrade", "websocket")]

    @pytest.mark.parametrize(
        "client, domains, url",
        [
            (("http", "localhost:8888"), ("localhost",), "http://80.localhost:8888/"),
            (("http", "LocalHost:8888"), ("localhost",), "http://80.localhost:8888/"),
            (("http", "127.0.0.1:8888"), ("localhost",), "http://80.localhost:8888/"),
            (("http", "[::1]:8888"), ("localhost", "b.c"), "http://80.localhost:8888/"),
            (("https", "localhost"), ("localhost",), "https://80.localhost/"), (("http", "localhost:1"), (), ""),
            (("http", "127.0.0.1:1"), (), ""), (("http", "a.example:1"), ("localhost",), ""),
            (("https", "b.c"), ("localhost", "b.c"), "https://80.b.c/"), (("http", ""), ("localhost",), ""),
            (("http", "a.example:8888"), ("localhost", "b.c"), "http://80.b.c:8888/"),
            (("http", "99.localhost:8888", 99), ("localhost",), "http://80.localhost:8888/"),
        ],
    )  # fmt: skip
    def test_host_form_is_one_that_this_client_can_reach(self, client, domains, url):
        assert host_form(80, ClientInfo("192.0.2.1", *client), domains) == url


class TestRewritingOnTheWire:
    @pytest.mark.parametrize(
        "path",
        [
            "/%2F//..%2f/%20", "//a//b", "/a/./b/../c?x=/../&y=%00", "/a;b=c,d?e=f?g", "/%zz/%",
            "/a|b\"<>{}^`\\?'[]",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("is_absolute", [False, True])
    def test_path_and_query_arrive_as_sent(self, proxy, upstream, path, is_absolute):
        app = upstream(answering(OK))
        prefix = "/proxy/absolute/%d" % app.port if is_absolute else "/proxy/%d" % app.port
        assert status_of(proxy.get(prefix + path)) == 200
        assert app.messages[0][0] == "GET %s HTTP/1.1" % ((prefix if is_absolute else "") + path)

    def test_request_head_is_written_anew(self, proxy, upstream):
        app = upstream(answering(OK))
        proxy.get(
            "/proxy/%d/a" % app.port, "X-A: b\xe4", "x-a: c", "Connection: close, x-b", "X-B: d", "Upgrade: h2c",
            "HTTP2-Settings: e", "X-Forwarded-For: 1.2.3.4",
        )  # fmt: skip
        assert app.messages[0][1] == [
            ("Host", "localhost:%d" % app.port), ("X-A", "b\xe4"), ("x-a", "c"), ("HTTP2-Settings", "e"),
            ("X-Forwarded-For", "127.0.0.1"), ("X-Forwarded-Proto", "http"), ("X-Forwarded-Host", "here:8888"),
            ("X-Forwarded-Port", "8888"), ("X-Forwarded-Prefix", "/proxy/%d" % app.port),
            ("X-Forwarded-Context", "/proxy/%d" % app.port), ("X-ProxyContextPath", "/proxy/%d" % app.port),
        ]  # fmt: skip

    def test_absolute_form_of_the_target_overrides_host(self, proxy, upstream):
        app = upstream(answering(OK))
        assert status_of(proxy.get("http://there:99/proxy/%d/a" % app.port, "Origin: http://there:99")) == 200
        assert fields_of(app.messages[0])["origin"] == "http://localhost:%d" % app.port

    def test_preserved_host_arrives(self, start, upstream):
        app = upstream(answering(OK))
        assert status_of(start(preserve_host=True).get("/proxy/%d/a" % app.port)) == 200
        assert fields_of(app.messages[0])["host"] == "here:8888"


# ---------------------------------------------------------------------------------------------------------------------
# Access
# ---------------------------------------------------------------------------------------------------------------------

HANDSHAKE = (
    "Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)  # fmt: skip


class TestAccess:
    @pytest.mark.parametrize(
        "method, version, lines, opens",
        [
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: websocket"], True),
            ("GET", "1.1", ["connection: a, UPGRADE", "upgrade: WebSocket"], True),
            ("GET", "1.1", ["Connection: a", "Connection: upgrade", "Upgrade: websocket"], True),
            ("POST", "1.1", ["Connection: Upgrade", "Upgrade: websocket"], False),
            ("GET", "1.0", ["Connection: Upgrade", "Upgrade: websocket"], False),
            ("GET", "1.1", ["Upgrade: websocket"], False), ("GET", "1.1", ["Connection: Upgrade"], False),
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: h2c"], False),
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: h2c, websocket"], False),
            ("GET", "1.1", ["Connection: Upgrade", "Upgrade: websocket", "Upgrade: h2c"], False),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_websocket_handshake_alone_is_passed_on_as_an_upgrade(
        self, proxy, upstream, method, version, lines, opens
    ):
        """All else is an ordinary request, which the app gets without Upgrade and the client may have answered."""
        app = upstream(answering(OK))
        raw = request(method, "/proxy/%d/" % app.port, *lines).replace(b"HTTP/1.1", b"HTTP/" + version.encode(), 1)
        assert status_of(proxy.ask(raw)) == 200
        sent = fields_of(app.messages[0])
        assert (sent.get("upgrade"), sent.get("connection")) == (("websocket", "Upgrade") if opens else (None, None))

    @pytest.mark.parametrize(
        "origins, status",
        [
            (["http://evil"], 403), (["null"], 403), (["http://here:8889"], 403), ([""], 403),
            (["http://here:8888, http://evil"], 403), (["http://here:8888", "http://here:8888"], 400),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_upgrade_of_another_origin_is_refused(self, proxy, upstream, origins, status):
        app = upstream(answering(OK))
        lines = tuple("Origin: " + origin for origin in origins)
        assert status_of(proxy.get("/proxy/%d/" % app.port, *(lines + HANDSHAKE))) == status
        assert app.connections == 0

    def test_upgrade_with_a_body_is_refused(self, proxy, upstream):
        app = upstream(answering(OK))
        raw = request("GET", "/proxy/%d/" % app.port, "Content-Length: 1", *HANDSHAKE, body=b"a")
        assert status_of(proxy.ask(raw)) == 400
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
            ("localhost", True), ("localhost:8888", True), ("LOCALHOST:1", True), ("a.localhost:8888", True),
            ("127.0.0.1:8888", True), ("127.9.9.9", True), ("[::1]:8888", True), ("mine.example.org", True),
            ("a.b.example.net:80", True), ("evil.example", False), ("evil.example:8888", False),
            ("localhost.evil.example", False), ("xlocalhost", False), ("localhost.", False), ("192.0.2.1", False),
            ("0.0.0.0", False), ("[::]:8888", False), ("[2001:db8::1]", False), ("127.0.0.1.evil.example", False),
            ("mine.example.org.", False),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("way", ["app", "own page", "Upgrade", "absolute form"])
    def test_name_that_may_lead_elsewhere_is_refused(self, start, upstream, host, known, way):
        """DNS rebinding: a page whose own name was made to point here gets nothing, in any form."""
        app = upstream(answering(OK))
        proxy = start(allow_hostnames=["mine.example.org", "*.example.net"])
        target = "/proxy/" if way == "own page" else "/proxy/%d/" % app.port
        if way == "absolute form":
            target = "http://%s%s" % (host, target)
        named = "localhost" if way == "absolute form" else host
        answer = proxy.ask(at(named, "GET", target, *(HANDSHAKE if way == "Upgrade" else ())))
        assert status_of(answer) == (200 if known else 403)
        assert known or b"--allow-hostname" in answer[2]
        assert app.connections == (1 if known and way != "own page" else 0)

    @pytest.mark.parametrize(
        "host, status",
        [
            ("192.0.2.1:8888", 200), ("[2001:db8::1]", 200), (socket.gethostname(), 200), ("evil.example", 403),
        ],
    )  # fmt: skip
    def test_address_is_accepted_where_not_only_this_machine_can_connect(self, start, host, status):
        """It is no name, which could be made to point elsewhere."""
        proxy = start(bind="0.0.0.0", token="", allow_hostnames=())
        assert status_of(proxy.ask(at(host, "GET", "/proxy/"))) == status

    @pytest.mark.parametrize(
        "host, forwarded, status",
        [
            ("evil.example", "localhost", 403), ("localhost", "evil.example", 403), ("localhost", "pub.example", 200),
            ("pub.example", "pub.example", 200),
        ],
    )  # fmt: skip
    def test_host_is_checked_behind_a_trusted_proxy_too(self, start, host, forwarded, status):
        """A rebound page may set X-Forwarded-Host as it likes; its Host it may not."""
        proxy = start(trusted_proxies=["127.0.0.1"], allow_hostnames=["pub.example"])
        assert status_of(proxy.ask(at(host, "GET", "/proxy/", "X-Forwarded-Host: " + forwarded))) == status

    def test_request_without_a_host_is_served(self, start):
        assert status_of(start(allow_hostnames=()).ask(b"GET /proxy/ HTTP/1.0\r\n\r\n")) == 200


def answers_in_turn(proxy, raws, **how):
    """The answers to many requests, which are sent one behind the other on one connection."""
    answers = []
    with proxy.wire() as wire:
        for start in range(0, len(raws), 100):  # so many that neither side has to wait for the other to read
            wire.send(b"".join(raws[start : start + 100]))
            answers += [wire.message(**how) for _ in raws[start : start + 100]]
    return answers


class TestToken:
    @pytest.fixture
    def app(self, upstream):
        return upstream(answering(OK))

    @pytest.fixture
    def proxy(self, start):
        return start(token=TOKEN, allow_hostnames=())

    @pytest.fixture
    def many(self, start):
        """A proxy with many clients: each is at the address that it says itself."""
        return start(token=TOKEN, trusted_proxies=["127.0.0.1"])

    def submit(self, proxy, form, *lines, base="/proxy"):
        """The answer to what the sign-in page sends."""
        lines += ("Content-Type: application/x-www-form-urlencoded", "Content-Length: %d" % len(form))
        return proxy.ask(request("POST", base + "/", *(lines + SAFE_LINES), body=form.encode()))

    @pytest.mark.parametrize(
        "method, lines, status",
        [
            ("GET", SAFE_LINES, 401), ("GET", ("Accept: text/html",), 401), ("HEAD", SAFE_LINES, 401), ("GET", (), 401),
            ("POST", ("Content-Length: 0",), 401), ("PROPFIND", (), 401), ("GET", HANDSHAKE, 403),
            ("GET", ("Cookie: a=b",), 401), ("GET", ("Authorization: Basic czNjcmV0LXRva2Vu",), 401),
            ("GET", ("Authorization: token wrong",), 401), ("GET", ("Authorization: s3cret-token",), 401),
            ("OPTIONS", ("Origin: http://evil", "Access-Control-Request-Method: POST"), 401),
            ("GET", ("Authorization: token \xe4",), 401),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_nothing_is_reached_without_the_token(self, proxy, app, method, lines, status):
        for target in ("/proxy/%d/", "/proxy/absolute/%d/?token=wrong", "/proxy/%d", "/proxy/"):
            if method == "POST" and target == "/proxy/":
                continue  # that is where the sign-in page sends the token
            target = target % app.port if "%" in target else target
            answer = proxy.ask(request(method, target, *lines), no_body=method == "HEAD")
            assert status_of(answer) == status
            assert "set-cookie" not in fields_of(answer)
            assert (b"<form" in answer[2]) == (method == "GET" and "Accept: text/html" in lines)
        assert app.connections == 0

    @pytest.mark.parametrize(
        "shown, told",
        [((), False), (("Authorization: token wrong",), True), (("Authorization: Digest a",), False)],
        ids=["none", "wrong", "no token"],
    )
    @pytest.mark.parametrize("lines", [(), SAFE_LINES, HANDSHAKE], ids=["program", "page", "WebSocket"])
    def test_wrong_token_is_called_wrong(self, proxy, app, shown, told, lines):
        """But it is not shown, and a page does not have an empty paragraph where no token came."""
        said = b"Invalid token."
        for query, is_told in (("", told), ("?token=wrong", True)):
            answer = proxy.get("/proxy/%d/%s" % (app.port, query), *lines + shown)
            body = html.unescape(answer[2].decode()).encode()
            assert (said in body) == is_told
            assert b"<p></p>" not in body
            assert b"wrong" not in body.replace(query.encode() or b"-", b"")

    def test_page_visit_with_the_token_is_signed_in_and_redirected(self, proxy, app):
        """It ends at the address without the token; a token parameter of the app's own stays."""
        target = "/proxy/%d/a?x=%%2F&token=%s&token=its-own&y" % (app.port, TOKEN)
        answer = proxy.get(target, *SAFE_LINES)
        assert status_of(answer) == 302
        assert fields_of(answer)["location"] == "/proxy/%d/a?x=%%2F&token=its-own&y" % app.port
        cookie = fields_of(answer)["set-cookie"]
        assert re.fullmatch(r"port_proxy_%d=[A-Za-z0-9_-]{43}; Path=/; HttpOnly; SameSite=Lax" % proxy.port, cookie)
        assert TOKEN not in cookie
        assert app.connections == 0

    def test_cookie_signs_in(self, proxy, app):
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        assert status_of(proxy.get("/proxy/%d/b" % app.port, cookie)) == 200
        assert [message[0] for message in app.messages] == ["GET /b HTTP/1.1"]

    def test_signed_in_browser_gets_no_second_cookie(self, proxy):
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        again = proxy.get("/proxy/?token=" + TOKEN, cookie, *SAFE_LINES)
        assert (status_of(again), fields_of(again)["location"]) == (302, "/proxy/")
        assert "set-cookie" not in fields_of(again)

    @pytest.mark.parametrize("scheme", ["token", "Token", "Bearer", "bearer"])
    def test_authorization_field_authenticates_a_program(self, proxy, app, scheme):
        """Whatever its Origin, since a page of another site does not know the token."""
        lines = ("Content-Length: 0", "Authorization: %s %s" % (scheme, TOKEN), "Origin: http://evil")
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, *lines))) == 200
        assert "authorization" not in fields_of(app.messages[0])

    @pytest.mark.parametrize(
        "query, lines, sent",
        [
            ("", ("Authorization: token " + TOKEN,), "GET /ws HTTP/1.1"),
            ("?token=%s&a" % TOKEN, (), "GET /ws?a HTTP/1.1"),
        ],
    )
    def test_token_opens_a_websocket(self, proxy, upstream, query, lines, sent):
        app = upstream(serve_sockets)
        answer = proxy.get("/proxy/%d/ws%s" % (app.port, query), *(HANDSHAKE + lines), no_body=True)
        assert status_of(answer) == 101
        assert app.messages[0][0] == sent
        assert "authorization" not in fields_of(app.messages[0])

    def test_sign_in_page_leads_on_to_the_target(self, proxy, app):
        target = "/proxy/%d/a?b=%%22&c" % app.port
        page = proxy.get(target, *SAFE_LINES)
        assert b'action="/proxy/"' in page[2]
        assert b'value="/proxy/%d/a?b=%%22&amp;c"' % app.port in page[2]
        answer = self.submit(proxy, "token=%s&next=%%2Fproxy%%2F%d%%2Fa%%3Fb%%3D%%2522%%26c" % (TOKEN, app.port))
        assert (status_of(answer), fields_of(answer)["location"]) == (303, target)
        assert status_of(proxy.get(target, cookie_of(answer))) == 200

    def test_sign_in_page_comes_again_after_a_wrong_token(self, proxy):
        wrong = self.submit(proxy, "token=wrong&next=/proxy/8080/x")
        assert status_of(wrong) == 401
        assert b"That is not the token" in wrong[2]
        assert b'value="/proxy/8080/x"' in wrong[2]

    @pytest.mark.parametrize(
        "base, place",
        [("/proxy", place) for place in ("//evil/proxy/", "/\\evil", "https://evil/", "/elsewhere", "/proxyx/")]
        + [("/proxy", "/proxy/\r\nX: y"), ("/proxy", "javascript:alert(1)"), ("/proxy", "")]
        + [("", "//evil"), ("", "/\\evil"), ("", "/a\\\\evil")],
        ids=case_id,
    )
    def test_sign_in_leads_nowhere_else(self, start, base, place):
        proxy = start(token=TOKEN, base=base)
        form = "token=%s&next=%s" % (TOKEN, "".join("%%%02X" % ord(octet) for octet in place))
        answer = self.submit(proxy, form, base=base)
        assert (status_of(answer), fields_of(answer)["location"]) == (303, base + "/")

    def test_sign_in_form_has_a_size_limit(self, proxy):
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 9000", body=b"a" * 9000))) == 413

    def test_sign_in_from_another_site_uses_up_no_tries(self, proxy):
        statuses = [status_of(self.submit(proxy, "token=guessed%d" % n, "Origin: http://evil")) for n in range(15)]
        assert statuses == [403] * 15
        assert status_of(self.submit(proxy, "token=" + TOKEN)) == 303

    @pytest.mark.parametrize(
        "sent, arrives",
        [
            ("a=b; OURS; c=d", "a=b; c=d"), ("OURS; a=b", "a=b"), ("a=b; OURS", "a=b"), ("OURS", None),
            ('a="x y";b ; OURS;c', 'a="x y";b ;c'), ("xOURS; a=OURS; OURS", "xOURS; a=OURS"),
            ("OURS; NAME=stale; a=b", "a=b"), ("NAME=stale; OURS", None),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_own_cookie_is_cut_out_and_others_stay(self, proxy, app, sent, arrives):
        """Byte for byte."""
        ours = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))[len("Cookie: ") :]
        sent, arrives = (
            text and text.replace("OURS", ours).replace("NAME", ours.split("=")[0]) for text in (sent, arrives)
        )
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Cookie: " + sent)) == 200
        assert fields_of(app.messages[0]).get("cookie") == arrives

    @pytest.mark.parametrize(
        "target, sent",
        [
            ("/proxy/PORT/x?token=%s&a&token=mine" % TOKEN, "GET /x?a&token=mine HTTP/1.1"),
            ("/proxy/absolute/PORT/x?token=" + TOKEN, "GET /proxy/absolute/PORT/x HTTP/1.1"),
            ("http://here:8888/proxy/PORT/?token=" + TOKEN, "GET / HTTP/1.1"),
        ],
    )
    @pytest.mark.parametrize("is_signed_in", [False, True])
    def test_own_token_is_cut_out_of_the_target(self, start, app, target, sent, is_signed_in):
        proxy = start(token=TOKEN)
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        lines = ("Authorization: Bearer its-own",) + ((cookie,) if is_signed_in else ())
        assert status_of(proxy.get(target.replace("PORT", str(app.port)), *lines)) == 200
        assert app.messages[0][0] == sent.replace("PORT", str(app.port))
        assert fields_of(app.messages[0])["authorization"] == "Bearer its-own"
        assert TOKEN not in repr(app.messages)

    @pytest.mark.parametrize(
        "referer, arrives",
        [
            ("http://here:8888/proxy/PORT/p?token=TOKEN&q=%2F", "http://localhost:PORT/p?q=%2F"),
            ("http://here:8888/proxy/PORT/p?token=TOKEN", "http://localhost:PORT/p"),
            ("http://here:8888/proxy/PORT/p?token=TOKEN#token=x", "http://localhost:PORT/p#token=x"),
            ("http://a/p?token=TOKEN#x", "http://a/p#x"),
            ("http://a/p?b&token=TOKEN#x?token=y", "http://a/p?b#x?token=y"),
            ("http://a/p?token=y#token=z", "http://a/p?token=y#token=z"),
        ],
    )  # fmt: skip
    def test_own_token_is_cut_out_of_the_referer(self, proxy, app, referer, arrives):
        referer, arrives = (
            text.replace("PORT", str(app.port)).replace("TOKEN", TOKEN) for text in (referer, arrives)
        )
        lines = ("Authorization: token " + TOKEN, "Referer: " + referer)
        assert status_of(proxy.get("/proxy/%d/" % app.port, *lines)) == 200
        assert fields_of(app.messages[0])["referer"] == arrives

    @pytest.mark.parametrize("spelling", [" NAME=evil; Path=/", "NAME =evil", " =NAME=evil", "NAME"])
    def test_app_cannot_set_the_proxys_cookie(self, proxy, upstream, spelling):
        name = fields_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))["set-cookie"].split("=")[0]
        head = "HTTP/1.1 200 OK\r\nSet-Cookie:%s\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"
        app = upstream(answering((head % spelling.replace("NAME", name)).encode()))
        answer = proxy.get("/proxy/%d/" % app.port, "Authorization: token " + TOKEN)
        assert [value for name, value in answer[1] if name == "Set-Cookie"] == ["a=b"]

    @pytest.mark.parametrize(
        "options", [{"whole_origin": False}, {"base": "/user/ana/proxy"}, {"trusted_proxies": ["192.0.2.1"]}]
    )
    def test_cookie_stays_below_the_base_where_others_share_the_origin(self, start, options):
        proxy = start(token=TOKEN, **options)
        base = options.get("base", "/proxy")
        answer = proxy.get("%s/?token=%s" % (base, TOKEN), *SAFE_LINES)
        assert "; Path=%s; HttpOnly" % base in fields_of(answer)["set-cookie"]

    def test_too_many_wrong_tokens_lock_out_the_right_one(self, many):
        """For a moment. Eleven requests in less than that can take a slow machine several attempts."""
        addresses = iter("192.0.2.%d" % n for n in range(1, 256))

        def is_locked_out():
            line = "X-Forwarded-For: " + next(addresses)
            tokens = ["wrong%d" % n for n in range(10)] + [TOKEN]
            raws = [request("GET", "/proxy/", "Authorization: token " + token, line) for token in tokens]
            *wrong, right = map(status_of, answers_in_turn(many, raws))
            assert wrong == [401] * 10
            return right == 429

        eventually(is_locked_out)

    def test_client_that_is_locked_out_is_let_in_a_moment_later(self, proxy, app):
        """Those who are signed in, and other places of the token, do not notice."""
        target = "/proxy/%d/" % app.port
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        numbers = iter(range(10**6))
        eventually(lambda: status_of(proxy.get(target, "Authorization: token wrong%d" % next(numbers))) == 429)
        assert status_of(proxy.get(target, cookie)) == 200
        assert status_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES)) == 302
        eventually(lambda: status_of(proxy.get(target, "Authorization: token " + TOKEN)) == 200)

    def test_same_wrong_token_counts_once(self, proxy, app):
        """An app's own, which a page sends again and again that was open when the proxy was restarted."""
        for _ in range(30):
            assert status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token apps-own")) == 401
        assert status_of(proxy.get("/proxy/%d/" % app.port, "Authorization: token " + TOKEN)) == 200

    def test_wrong_tokens_in_requests_of_other_sites_do_not_count(self, proxy, app):
        for number in range(30):
            lines = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors")
            assert status_of(proxy.get("/proxy/?token=%d" % number, *lines)) == 401
        assert status_of(proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN))) == 200

    def test_oldest_of_too_many_sessions_ends(self, proxy):
        sign_in = request("GET", "/proxy/?token=" + TOKEN, *SAFE_LINES)
        first, second, *_, last = map(cookie_of, answers_in_turn(proxy, [sign_in] * 1001))
        assert [status_of(proxy.get("/proxy/", cookie)) for cookie in (first, second, last)] == [401, 200, 200]

    def test_oldest_of_too_many_clients_has_its_tries_back(self, many):
        """The memory of wrong tokens is bounded."""

        def wrong(address, number):
            return request("GET", "/proxy/", "X-Forwarded-For: " + address, "Authorization: token wrong%d" % number)

        first = [wrong("192.0.2.1", number) for number in range(10)]
        others = [wrong("198.51.%d.%d" % divmod(number, 256), number) for number in range(1000)]
        again = [wrong("192.0.2.1", number) for number in range(10, 20)]
        statuses = list(map(status_of, answers_in_turn(many, first + others + again)))
        assert statuses == [401] * 1020

    def test_dripping_form_has_one_deadline(self, start):
        proxy = start(token=TOKEN, head_timeout=0.4)
        stop = threading.Event()
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/", "Content-Length: 8000"))

            def drip():
                with contextlib.suppress(OSError):
                    while not stop.wait(0.05):
                        wire.sock.send(b"a")

            thread = threading.Thread(target=drip)
            thread.start()
            try:
                assert status_of(wire.message()) == 408
            finally:
                stop.set()
                thread.join(WAIT)

    def test_client_that_reads_no_answer_is_cut_off(self, start):
        proxy = start(token=TOKEN, head_timeout=0.3)
        with proxy.wire() as wire:
            wire.sock.settimeout(0.3)
            with contextlib.suppress(OSError):
                while True:
                    wire.sock.send(request("GET", "/proxy/") * 100)
            eventually(lambda: not proxy.open_connections())

    def test_banner_quotes_reserved_characters_of_the_token(self):
        """The address in it works, whatever the token."""
        quoted = "a%26b%23c%2541%2Bd%3Be"
        environment = dict(os.environ, PORT_PROXY_TOKEN="a&b#c%41+d;e")
        with shell_proxy(env=environment, says=b"/proxy/?token=%s\n" % quoted.encode()) as (_, port):
            with Wire.to(port) as wire:
                wire.send(request("GET", "/proxy/?token=" + quoted, *SAFE_LINES))
                assert status_of(wire.message()) == 302

    @pytest.mark.parametrize("options", [{}, {"token": ""}, {"bind": "0.0.0.0", "token": ""}], ids=case_id)
    def test_no_token_is_asked_for(self, start, options):
        proxy = start(**options)
        assert proxy.proxy.token == ""
        assert status_of(proxy.get("/proxy/")) == 200

    def test_random_token_is_asked_for_where_others_can_connect(self, start):
        proxies = [start(bind="0.0.0.0") for _ in range(2)]
        tokens = {proxy.proxy.token for proxy in proxies}
        assert len(tokens) == 2
        assert min(map(len, tokens)) >= 32
        assert [status_of(proxy.get("/proxy/")) for proxy in proxies] == [401, 401]

    @pytest.mark.parametrize("token", ["", TOKEN])
    @pytest.mark.parametrize("allow", [False, True])
    def test_preflight_reaches_the_app_where_it_may(self, start, app, token, allow):
        """It alone: the request that it asks about is refused, and OPTIONS without such a question is no preflight."""
        target = "/proxy/%d/" % app.port
        origin = "Origin: http://evil"
        question = (
            origin, "Access-Control-Request-Method: POST", "Sec-Fetch-Mode: cors", "Sec-Fetch-Site: cross-site",
        )  # fmt: skip
        proxy = start(token=token, allow_preflight=allow)
        refused = 401 if token else 403
        assert status_of(proxy.ask(request("OPTIONS", target, *question))) == (200 if allow else refused)
        assert status_of(proxy.ask(request("POST", target, "Content-Length: 0", *question))) == refused
        assert status_of(proxy.ask(request("OPTIONS", target, origin))) == (401 if token else 200)

    def test_no_secret_is_in_the_log_or_an_answer(self, proxy, app, caplog):
        with caplog.at_level(logging.DEBUG):
            cookie = cookie_of(proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN), *SAFE_LINES))
            answers = [
                proxy.get("/proxy/%d/?token=%s" % (app.port, TOKEN), cookie),
                proxy.get("/nothing?token=" + TOKEN, cookie), proxy.get("/proxy/1/?token=" + TOKEN, cookie),
                proxy.get("/proxy/1/?token=wrong", *SAFE_LINES),
                proxy.get("/proxy/1:1:1?token=" + TOKEN, "Authorization: token " + TOKEN),
            ]  # fmt: skip
        said = repr(answers) + caplog.text
        assert TOKEN not in said
        assert cookie.split("=", 1)[1] not in said


def at(host, method, target, *lines, body=b""):
    return request(method, target, *lines, body=body).replace(b"Host: here:8888", b"Host: " + host.encode())


class TestHostForm:
    """http://8080.localhost:8888/ is port 8080, the path untouched, with an origin of its own."""

    @pytest.mark.parametrize(
        "target",
        [
            "/a/%2F//..%2f/../../b?q=%20", "/proxy/", "/proxy/1/", "/proxy", "/absolute/80/", "/..",
            "/.well-known/port-proxy?ticket=x",
        ],
    )  # fmt: skip
    def test_every_path_is_the_apps(self, start, upstream, target):
        app = upstream(answering(OK))
        host = "%d.localhost:8888" % app.port
        proxy = start(allow_hostnames=())
        answer = proxy.ask(at(host, "GET", target, "Origin: http://" + host, "Referer: http://%s/p?q" % host))
        assert answer[2] == b"ok"
        assert app.messages[0][0] == "GET %s HTTP/1.1" % target
        fields = fields_of(app.messages[0])
        home = "localhost:%d" % app.port
        assert (fields["host"], fields["origin"], fields["referer"]) == (home, "http://" + home, "http://%s/p?q" % home)
        assert not {name for name in fields if "prefix" in name or "context" in name}

    def test_app_gets_posts_at_the_path_of_the_base(self, start, upstream):
        app = upstream(answering(OK))
        host = "%d.localhost:8888" % app.port
        assert start(allow_hostnames=()).ask(at(host, "POST", "/proxy/", "Content-Length: 0"))[2] == b"ok"

    def test_cookie_keeps_its_path(self, start, upstream):
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n\r\n"))
        answer = start(allow_hostnames=()).ask(at("%d.localhost:8888" % app.port, "GET", "/"))
        assert fields_of(answer)["set-cookie"] == "a=b; Path=/"

    @pytest.mark.parametrize("field", ["PORT.localhost:8888", "localhost"])
    def test_absolute_form_of_the_target_names_the_port(self, start, upstream, field):
        """Whatever the Host field says."""
        app = upstream(answering(OK))
        target = "http://%d.localhost:8888/x" % app.port
        answer = start(allow_hostnames=()).ask(at(field.replace("PORT", str(app.port)), "GET", target))
        assert answer[2] == b"ok"
        assert app.messages[0][0] == "GET /x HTTP/1.1"

    def test_websocket_of_the_apps_own_page_opens(self, start, upstream):
        app = upstream(serve_sockets)
        host = "%d.localhost:8888" % app.port
        raw = at(host, "GET", "/ws?a", "Origin: http://" + host, *HANDSHAKE)
        assert status_of(start(allow_hostnames=()).ask(raw, no_body=True)) == 101
        assert app.messages[0][0] == "GET /ws?a HTTP/1.1"

    @pytest.mark.parametrize("origin", ["http://localhost:8888", "http://1.localhost:8888", "null"])
    def test_websocket_of_another_origin_is_refused(self, start, upstream, origin):
        app = upstream(serve_sockets)
        raw = at("%d.localhost:8888" % app.port, "GET", "/ws", "Origin: " + origin, *HANDSHAKE)
        assert status_of(start(allow_hostnames=()).ask(raw)) == 403
        assert app.connections == 0

    @pytest.mark.parametrize(
        "domains, host, arrives",
        [
            (None, "PORT.localhost", "/proxy/PORT/x"),
            (["apps.example.org"], "PORT.apps.example.org", "/proxy/PORT/x"),
            (["Apps.Example.org"], "PORT.APPS.example.org:1", "/proxy/PORT/x"), ([], "PORT.localhost", "/x"),
            (["apps.example.org"], "other.PORT.apps.example.org", "/x"),
            (["apps.example.org"], "apps.example.org", "/x"),
            (None, "PORT.apps.example.org", None), (["apps.example.org"], "PORT.evil.example", None),
            (None, "PORT.localhost.evil.example", None), (None, "PORT.localhost.", None),
            (["apps.example.org"], "PORT.apps.example.org.evil.example", None),
            (["apps.example.org"], "PORTapps.example.org", None),
        ],
    )  # fmt: skip
    def test_name_below_a_domain_is_a_port(self, start, upstream, domains, host, arrives):
        """Other names of the proxy are not, and unknown names are refused."""
        app = upstream(answering(OK))
        proxy = start(allow_hostnames=(), **({} if domains is None else {"domains": domains}))
        raw = at(host.replace("PORT", str(app.port)), "GET", "/proxy/%d/x" % app.port)
        assert status_of(proxy.ask(raw)) == (200 if arrives else 403)
        targets = [message[0].split(" ")[1] for message in app.messages]
        assert targets == ([arrives.replace("PORT", str(app.port))] if arrives else [])

    @pytest.mark.parametrize(
        "method, lines, status",
        [
            ("GET", ("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors"), 403),
            ("GET", ("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors"), 403),
            ("GET", ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors"), 403),
            ("GET", ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"), 200),
            ("GET", ("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: navigate"), 200),
            ("POST", ("Origin: http://1.apps.example.org", "Content-Length: 0"), 403),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_page_of_another_app_is_refused(self, start, upstream, method, lines, status):
        """Also where the browser calls it the same site; but a person may follow its links."""
        app = upstream(answering(OK))
        proxy = start(allow_hostnames=(), domains=["apps.example.org"])
        raw = at("%d.apps.example.org" % app.port, method, "/", "Accept: text/html", *lines)
        assert status_of(proxy.ask(raw)) == status

    def test_forwarded_host_of_a_trusted_proxy_names_the_port(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start(trusted_proxies=["127.0.0.1"], domains=["apps.example.org"], allow_hostnames=["inner"])
        host = "%d.apps.example.org" % app.port
        lines = ("X-Forwarded-Host: " + host, "X-Forwarded-Proto: https", "Origin: https://" + host)
        assert status_of(proxy.ask(at("inner", "POST", "/x", "Content-Length: 0", *lines))) == 200
        assert fields_of(app.messages[0])["origin"] == "http://localhost:%d" % app.port

    def test_port_of_the_proxy_itself_is_a_loop(self, start):
        proxy = start()
        assert status_of(proxy.ask(at("%d.localhost" % proxy.port, "GET", "/"))) == 508

    @pytest.mark.parametrize("domain", ["", "a b", "*.example.org", "http://a", "a:80", "-a", "a..b", "a/", "a."])
    def test_bad_domain_is_refused(self, domain):
        with pytest.raises(ValueError, match="a domain is a name"):
            PortProxy(Config(domains=[domain]))

    @pytest.mark.parametrize(
        "host, options, advice",
        [
            ("8080.vm:1", {}, "For 8080.vm to be port 8080, start the proxy with --domain vm."),
            ("8080.A.example", {}, "--domain a.example."), ("8080.127.0.0.1", {}, None), ("99999999.vm", {}, None),
            ("70000.vm", {}, None), ("8080.a_b", {}, None), ("vm", {}, None), ("8080", {}, None),
            ("8080.vm", {"domains": ()}, None),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_name_that_could_be_a_port_is_explained(self, start, host, options, advice):
        said = start(**options).ask(at(host, "GET", "/x", "Sec-Fetch-Mode: cors"))[2].decode()
        assert said.startswith("404 Not Found\nNo port is named here.")
        assert advice in said if advice else "--domain" not in said

    def test_no_name_is_a_port_under_a_hub(self, start, upstream):
        """The host of an app gets the same answer as any other."""
        app = upstream(answering(OK))
        hub = port_proxy.hub_in(HUB_ENVIRONMENT)
        proxy = start(hub=hub, base=hub.prefix + "/proxy", domains=["apps.example.org"])
        host = "%d.apps.example.org" % app.port
        assert proxy.ask(at(host, "GET", "/")) == proxy.ask(at("hub.example.org", "GET", "/"))
        assert app.connections == 0


ENTRANCE = "/.well-known/port-proxy"  # the proxy's own path at the host of an app
CLOCK = """\
import os, signal, sys, time
ahead, clock = [0], time.monotonic
time.monotonic = lambda: clock() + ahead[0]
signal.signal(signal.SIGUSR1, lambda *_: (ahead.append(ahead.pop() + 60), os.write(1, b"a minute later\\n")))
sys.path.insert(0, sys.argv[1])
import port_proxy
sys.exit(port_proxy.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def proxy_with_a_clock(*options, **environment):
    """A proxy in a process of its own: (its port, a function that puts its clock forward by a minute)."""
    command = [sys.executable, "-c", CLOCK, str(HERE), "--port", "0"] + list(options)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ, **environment))

    def put_forward():
        process.send_signal(signal.SIGUSR1)
        while process.stdout.readline() != b"a minute later\n":  # the lines of the banner come before
            assert process.poll() is None

    try:
        yield int(re.search(rb"http://[^/]*:(\d+)/", process.stdout.readline()).group(1)), put_forward
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class TestSignInAtAHost:
    @pytest.fixture
    def app(self, upstream):
        return upstream(answering(OK))

    @pytest.fixture
    def proxy(self, start):
        return start(token=TOKEN)

    @pytest.fixture
    def host(self, app):
        return "%d.localhost:8888" % app.port

    def sign_in(self, proxy):
        """The Cookie field of a browser that has signed in at the proxy's own host."""
        return cookie_of(proxy.ask(at("localhost:8888", "GET", "/proxy/?token=" + TOKEN, *SAFE_LINES)))

    def ticket(self, proxy, app, cookie):
        """The target to which the proxy leads a signed-in browser, at the host of an app."""
        led = proxy.ask(at("localhost:8888", "GET", "/proxy/?open=%d" % app.port, cookie, *SAFE_LINES))
        assert (status_of(led), fields_of(led)["referrer-policy"]) == (303, "no-referrer")
        location = re.escape("http://%d.localhost:8888" % app.port) + "(%s.*)" % re.escape(ENTRANCE)
        return re.fullmatch(location, fields_of(led)["location"]).group(1)

    @pytest.mark.parametrize("target", ["/", "/proxy/", ENTRANCE, ENTRANCE + "?ticket=guess"])
    @pytest.mark.parametrize(
        "method, lines",
        [
            ("GET", ()), ("GET", SAFE_LINES), ("POST", ("Content-Length: 0",)), ("GET", HANDSHAKE),
            ("GET", ("Cookie: port_proxy_NUMBER=x",)),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_nothing_is_reached_without_signing_in(self, proxy, app, host, target, method, lines):
        lines = [line.replace("NUMBER", str(proxy.port)) for line in lines]
        is_entrance = target.startswith(ENTRANCE)
        expected = 403 if "Upgrade: WebSocket" in lines and not is_entrance else 401
        assert status_of(proxy.ask(at(host, method, target, *lines))) == expected
        assert app.connections == 0

    def test_page_leads_to_the_proxys_own_host(self, proxy, app, host):
        """No token is asked for here: the app's own pages could read what is typed."""
        page = proxy.ask(at(host, "GET", "/a?b", *SAFE_LINES))
        assert status_of(page) == 401
        assert b"<form" not in page[2]
        assert b'href="http://localhost:8888/proxy/?open=%d"' % app.port in page[2]

    def test_form_is_not_taken_at_the_host_of_an_app(self, proxy, host):
        form = b"token=%s&next=/a?b" % TOKEN.encode()
        lines = ("Content-Length: %d" % len(form), "Origin: http://" + host)
        answer = proxy.ask(at(host, "POST", ENTRANCE, *lines, body=form))
        assert (status_of(answer), "set-cookie" in fields_of(answer)) == (401, False)

    def test_form_of_the_proxys_host_leads_on_to_the_app(self, proxy, app):
        target = "/proxy/?open=%d" % app.port
        page = proxy.ask(at("localhost:8888", "GET", target, *SAFE_LINES))
        assert b'value="%s"' % target.encode() in page[2]
        assert "frame-ancestors 'none'" in fields_of(page)["content-security-policy"]
        form = b"token=%s&next=%s" % (TOKEN.encode(), target.encode())
        answer = proxy.ask(at("localhost:8888", "POST", "/proxy/", "Content-Length: %d" % len(form), body=form))
        assert (status_of(answer), fields_of(answer)["location"]) == (303, target)
        self.ticket(proxy, app, cookie_of(answer))

    def test_ticket_signs_in(self, proxy, app, host):
        target = self.ticket(proxy, app, self.sign_in(proxy))
        assert re.fullmatch(re.escape(ENTRANCE) + r"\?ticket=[A-Za-z0-9_-]{43}", target)
        entered = proxy.ask(at(host, "GET", target, *SAFE_LINES))
        assert (status_of(entered), fields_of(entered)["location"]) == (303, "/")
        cookie = r"port_proxy_%d=[A-Za-z0-9_-]{43}; Path=/; HttpOnly; SameSite=Lax" % proxy.port
        assert re.fullmatch(cookie, fields_of(entered)["set-cookie"])
        assert status_of(proxy.ask(at(host, "GET", "/a?b", cookie_of(entered)))) == 200
        assert [message[0] for message in app.messages] == ["GET /a?b HTTP/1.1"]
        assert "cookie" not in fields_of(app.messages[0])

    @pytest.mark.parametrize("elsewhere", ["localhost:8888", "1.localhost:8888", "PORT.localhost.:8888"])
    def test_cookie_is_good_at_its_own_host_alone(self, proxy, app, host, elsewhere):
        entered = proxy.ask(at(host, "GET", self.ticket(proxy, app, self.sign_in(proxy)), *SAFE_LINES))
        elsewhere = elsewhere.replace("PORT", str(app.port))
        assert status_of(proxy.ask(at(elsewhere, "GET", "/proxy/%d/" % app.port, cookie_of(entered)))) == 401
        assert app.connections == 0

    def test_second_ticket_sets_no_second_cookie(self, proxy, app, host):
        cookie = self.sign_in(proxy)
        entered = proxy.ask(at(host, "GET", self.ticket(proxy, app, cookie), *SAFE_LINES))
        again = proxy.ask(at(host, "GET", self.ticket(proxy, app, cookie), cookie_of(entered), *SAFE_LINES))
        assert (status_of(again), "set-cookie" in fields_of(again)) == (303, False)

    def test_ticket_is_good_once(self, proxy, app, host):
        target = self.ticket(proxy, app, self.sign_in(proxy))
        statuses = [status_of(proxy.ask(at(host, "GET", target, *SAFE_LINES))) for _ in range(2)]
        assert statuses == [303, 401]

    def test_ticket_is_good_at_its_own_host_alone(self, proxy, app, host):
        """Once shown elsewhere, it is not good even there."""
        target = self.ticket(proxy, app, self.sign_in(proxy))
        assert status_of(proxy.ask(at("1.localhost:8888", "GET", target, *SAFE_LINES))) == 401
        assert status_of(proxy.ask(at(host, "GET", target, *SAFE_LINES))) == 401

    def test_ticket_is_not_in_the_log(self, proxy, app, host, caplog):
        with caplog.at_level(logging.DEBUG):
            target = self.ticket(proxy, app, self.sign_in(proxy))
            assert status_of(proxy.ask(at(host, "GET", target, *SAFE_LINES))) == 303
        assert target.partition("=")[2] not in caplog.text
        assert "ticket=" not in caplog.text

    @pytest.mark.parametrize("lines", [(), SAFE_LINES, HANDSHAKE], ids=["program", "page", "WebSocket"])
    def test_ticket_is_given_to_nobody_else(self, proxy, app, lines):
        answer = proxy.ask(at("localhost:8888", "GET", "/proxy/?open=%d" % app.port, *lines))
        assert status_of(answer) == (403 if lines == HANDSHAKE else 401)
        assert "location" not in fields_of(answer)

    def test_oldest_of_too_many_tickets_is_no_longer_good(self, proxy, app, host):
        raw = at("localhost:8888", "GET", "/proxy/?open=%d" % app.port, self.sign_in(proxy), *SAFE_LINES)
        places = [fields_of(led)["location"].partition(host)[2] for led in answers_in_turn(proxy, [raw] * 1001)]
        statuses = [status_of(proxy.ask(at(host, "GET", place, *SAFE_LINES))) for place in (*places[:2], places[-1])]
        assert statuses == [401, 303, 303]

    @pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no signal to put the clock forward")
    def test_ticket_runs_out(self, app, host):
        with proxy_with_a_clock("--token", PORT_PROXY_TOKEN=TOKEN) as (port, put_forward):

            def ask(host, target, *lines):
                with Wire.to(port) as wire:
                    wire.send(at(host, "GET", target, *(lines + SAFE_LINES)))
                    return wire.message()

            cookie = cookie_of(ask("localhost:8888", "/proxy/?token=" + TOKEN))
            led = [ask("localhost:8888", "/proxy/?open=%d" % app.port, cookie) for _ in range(2)]
            early, late = (fields_of(answer)["location"].partition(host)[2] for answer in led)
            assert status_of(ask(host, early)) == 303
            put_forward()
            answer = ask(host, late)
            assert (status_of(answer), "set-cookie" in fields_of(answer)) == (401, False)
            assert b"has expired" in answer[2]

    def test_token_in_the_address_signs_in(self, proxy, app, host):
        answer = proxy.ask(at(host, "GET", "/a?token=%s&b" % TOKEN, *SAFE_LINES))
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/a?b")
        assert "; Path=/;" in fields_of(answer)["set-cookie"]
        assert app.connections == 0

    def test_token_in_the_address_leads_to_no_other_host(self, proxy, host):
        answer = proxy.ask(at(host, "GET", "//evil.example/?token=" + TOKEN, *SAFE_LINES))
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/.//evil.example/")

    def test_host_of_an_app_is_opened_without_a_ticket_where_no_token_is_asked_for(self, start, app, host):
        led = start().ask(at("localhost:8888", "GET", "/proxy/?open=%d" % app.port))
        assert (status_of(led), fields_of(led)["location"]) == (303, "http://%s/" % host)

    def test_host_of_an_app_is_not_opened_where_there_is_none(self, start):
        proxy = start(allow_hostnames=["a.example"])
        nowhere = proxy.ask(at("a.example", "GET", "/proxy/?open=1"))
        assert (status_of(nowhere), b"--domain" in nowhere[2]) == (404, True)
        assert status_of(proxy.ask(at("localhost", "GET", "/proxy/?open=99999"))) == 404


ORIGINS = [  # method, Origin, Sec-Fetch-Site, Sec-Fetch-Mode, whether a browser that sends credentials on its own may
    ("POST", "http://here:8888", "same-origin", "cors", True), ("POST", "https://here:8888", None, None, True),
    ("POST", None, None, None, True), ("POST", "http://evil", None, None, False), ("POST", "null", None, None, False),
    ("POST", "http://here", None, None, False), ("DELETE", "http://evil", "cross-site", "cors", False),
    ("FROB", "http://evil", None, None, False), ("POST", "http://evil", "cross-site", "navigate", False),
    ("POST", "http://localhost:1", "same-site", "cors", False), ("GET", "http://evil", None, None, True),
    ("GET", "http://evil", "cross-site", "cors", False), ("GET", None, "cross-site", "no-cors", False),
    ("HEAD", None, "cross-site", "no-cors", False), ("GET", None, "cross-site", "navigate", True),
    ("GET", None, "same-site", "no-cors", True), ("GET", None, "none", "navigate", True),
    ("GET", None, "same-origin", "no-cors", True), ("OPTIONS", "http://evil", None, None, True),
    ("WS", "http://here:8888", "same-origin", "websocket", True), ("WS", None, None, None, True),
    ("WS", "http://evil", "cross-site", "websocket", False), ("WS", "http://evil", None, None, False),
    ("WS", "null", None, None, False), ("WS", "http://localhost:8888", "same-site", "websocket", False),
]  # fmt: skip


class TestOrigin:
    @pytest.mark.parametrize("gate", ["open", "cookie", "token", "any origin", "this origin"])
    @pytest.mark.parametrize("method, origin, site, mode, admitted", ORIGINS, ids=case_id)
    def test_request_of_another_site_is_refused(self, start, upstream, gate, method, origin, site, mode, admitted):
        """Unless it shows the token itself, which a page of another site does not know, or such pages are let in."""
        app = upstream(answering(OK))
        options = {
            "open": {}, "cookie": {"token": TOKEN}, "token": {"token": TOKEN}, "any origin": {"allow_origins": ["*"]},
            "this origin": {"allow_origins": ["http://EVIL:80"]},
        }  # fmt: skip
        proxy = start(**options[gate])
        fields = [("Origin", origin), ("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode)]
        lines = ["Accept: text/html"] + ["%s: %s" % field for field in fields if field[1]]
        if gate == "cookie":
            lines.append(cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES)))
        elif gate == "token":
            lines.append("Authorization: token " + TOKEN)
        if method == "WS":
            method, lines = "GET", lines + list(HANDSHAKE)
        answer = proxy.ask(request(method, "/proxy/%d/" % app.port, *lines), no_body=method == "HEAD")
        admitted = admitted or gate in ("token", "any origin") or (gate == "this origin" and origin == "http://evil")
        assert (status_of(answer), app.connections) == ((200, 1) if admitted else (403, 0))

    @pytest.mark.parametrize(
        "site, dest, admitted",
        [
            ("cross-site", "document", True), ("cross-site", "iframe", False), ("cross-site", "object", False),
            ("same-origin", "iframe", True), ("same-site", "iframe", False), ("same-site", "document", True),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("options", [{"domains": ["here"]}, {"allow_origins": ["*"]}], ids=case_id)
    def test_page_in_a_frame_of_another_site_is_refused(self, start, upstream, site, dest, admitted, options):
        """There the person sees nothing of it, and the app in it could read the others."""
        app = upstream(answering(OK))
        lines = ("Accept: text/html", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Site: " + site, "Sec-Fetch-Dest: " + dest)
        answer = start(**options).get("/proxy/%d/" % app.port, *lines)
        assert status_of(answer) == (200 if admitted or "allow_origins" in options else 403)

    @pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
    @pytest.mark.parametrize("origin, status", [("http://9.localhost:8888", 403), ("http://PORT.localhost:8888", 200)])
    def test_other_origin_is_refused_at_the_host_of_an_app(self, start, upstream, method, origin, status):
        """For every method: over plain HTTP browsers send no Sec-Fetch-Site, but they send an Origin."""
        app = upstream(answering(OK))
        lines = ["Origin: " + origin.replace("PORT", str(app.port))] + ["Content-Length: 0"] * (method == "POST")
        raw = at("%d.localhost:8888" % app.port, method, "/", *lines)
        assert status_of(start().ask(raw, no_body=method == "HEAD")) == status

    @pytest.mark.parametrize("site, status", [("same-origin", 200), ("cross-site", 403), ("none", 403)])
    def test_form_of_a_page_without_referrers_is_accepted(self, proxy, upstream, site, status):
        """Its Origin is null, and Sec-Fetch-Site tells it from a form of another site."""
        app = upstream(answering(OK))
        lines = ("Origin: null", "Sec-Fetch-Site: " + site, "Content-Length: 0")
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, *lines))) == status

    def test_refusal_is_logged_with_its_reason(self, proxy, caplog):
        with caplog.at_level(logging.INFO, "port_proxy"):
            proxy.ask(request("POST", "/proxy/1/", "Origin: http://evil"))
            eventually(lambda: "http://evil, may not use this address (here:8888)" in caplog.text)

    @pytest.mark.parametrize(
        "lines, advice",
        [
            (("Sec-Fetch-Dest: image",), "--allow-origin '*' if any page may."),
            (("Sec-Fetch-Dest: empty", "Origin: https://a.example"), "--allow-origin https://a.example if"),
        ],
    )
    def test_advice_for_a_get_can_be_taken(self, start, lines, advice):
        """Where no origin came, only any can be let in. Port 1 is tried then, where nothing listens."""
        raw = request("GET", "/proxy/1/a", "Sec-Fetch-Site: cross-site", *lines)
        said = start().ask(raw)[2].decode()
        assert "Start the proxy with " + advice in said
        (option,) = shlex.split(re.search("--allow-origin ([^ ]+) if", said).group(1))
        assert status_of(start(allow_origins=[option]).ask(raw)) == 502

    @pytest.mark.parametrize(
        "origin, advice",
        [
            ("http://evil", "Start the proxy with --allow-origin http://evil if it may."),
            ("HTTPS://Evil.example:443", "--allow-origin https://evil.example if"),
            ("null", "--allow-origin '*' if any"), ("http://a<b", "--allow-origin '*' if any"),
            ("\xe4", "--allow-origin '*' if any"), ("http://a;reboot;$(id)", "--allow-origin '*' if any"),
        ],
    )  # fmt: skip
    def test_advice_for_a_post_can_be_taken(self, start, origin, advice):
        """It names no origin that the option would refuse, and nothing that a shell would make something else of."""
        raw = request("POST", "/proxy/1/", "Origin: " + origin)
        answer = start().ask(raw)
        assert status_of(answer) == 403
        assert advice in answer[2].decode()
        (option,) = shlex.split(re.search("--allow-origin ([^ ]+) if", answer[2].decode()).group(1))
        assert status_of(start(allow_origins=[option]).ask(raw)) == 502

    def test_advice_names_no_host_that_looks_like_an_option(self, start):
        answer = start(allow_hostnames=()).ask(at("--no-token", "GET", "/proxy/1/"))
        assert (status_of(answer), b"--allow-hostname" in answer[2]) == (403, False)

    @pytest.mark.parametrize("options, told", [({"trusted_proxies": ["127.0.0.1"]}, True), ({}, False)], ids=case_id)
    def test_advice_for_a_server_in_front_is_to_pass_the_host_on(self, start, options, told):
        """nginx sends its own target as Host unless it is told not to; our own pages then look foreign."""
        said = start(**options).ask(request("POST", "/proxy/1/", "Origin: https://public.example"))[2]
        assert (b"must pass Host on" in said) == told

    @pytest.mark.parametrize(
        "allowed, origin, status",
        [
            ("HTTPS://A.example:443", "https://a.example", 200), ("https://a.example", "https://A.example:443", 200),
            ("http://a:8080", "http://a:8080", 200), ("http://a:8080", "http://a", 403),
            ("http://[::1]:80", "http://[::1]", 200), ("https://a:80", "https://a:80", 200),
            ("https://a:80", "https://a", 403), ("https://a:80", "http://a", 403),
        ],
    )  # fmt: skip
    def test_allowed_origin_is_compared_in_its_normal_form(self, start, upstream, allowed, origin, status):
        app = upstream(answering(OK))
        raw = request("POST", "/proxy/%d/" % app.port, "Content-Length: 0", "Origin: " + origin)
        assert status_of(start(allow_origins=[allowed]).ask(raw)) == status

    @pytest.mark.parametrize(
        "origin", ["null", "a", "http://", "http://a/", "http://u@a", "ftp://a", "http://a b", "http://a?b"]
    )
    def test_bad_allowed_origin_is_refused(self, origin):
        with pytest.raises(ValueError):
            PortProxy(Config(allow_origins=[origin]))


class TestAuthorize:
    def test_callable_is_asked_once_per_request(self, start, upstream):
        """Also for an Upgrade, and for the proxy's own page, which has no route; by whatever name it is called."""
        asked = []

        async def authorize(head, visit, route):
            asked.append((head.method, head.target, visit.address, route and route.port))

        app = upstream(answering(OK))
        target = "/proxy/%d/" % app.port
        proxy = start(authorize=authorize, bind="0.0.0.0", allow_hostnames=())
        assert [status_of(proxy.get(*one)) for one in ((target,), (target,) + HANDSHAKE, ("/proxy/",))] == [200] * 3
        expected = [("GET", target, "127.0.0.1", app.port)] * 2 + [("GET", "/proxy/", "127.0.0.1", None)]
        assert asked == expected

    @pytest.mark.parametrize("lines", [(), HANDSHAKE], ids=["request", "Upgrade"])
    @pytest.mark.parametrize(
        "error, status, location",
        [
            (lambda: ProxyError(402, "Not you."), 402, None), (lambda: KeyError("oops"), 500, None),
            (lambda: ProxyError(302, "", (("Location", "/login"),)), 302, "/login"),
        ],
        ids=["refuse", "mistake", "redirect"],
    )  # fmt: skip
    def test_error_of_the_callable_is_the_answer(self, start, upstream, lines, error, status, location):
        """Nothing is connected then, and a mistake in it admits nobody."""

        async def authorize(head, visit, route):
            raise error()

        app = upstream(answering(OK))
        answer = start(authorize=authorize).get("/proxy/%d/" % app.port, *lines)
        assert (status_of(answer), fields_of(answer).get("location")) == (status, location)
        assert b"oops" not in answer[2]
        assert app.connections == 0

    def test_origin_is_checked_as_well(self, start, upstream):
        async def authorize(head, visit, route):
            pass

        app = upstream(answering(OK))
        raw = request("POST", "/proxy/%d/" % app.port, "Origin: http://evil")
        assert status_of(start(authorize=authorize).ask(raw)) == 403
        assert app.connections == 0

    def test_token_is_not_asked_for(self, start):
        async def authorize(head, visit, route):
            pass

        proxy = start(authorize=authorize, token="any", bind="0.0.0.0")
        assert proxy.proxy.token == ""
        assert status_of(proxy.get("/proxy/")) == 200

    @pytest.mark.parametrize(
        "field",
        [
            ("Location", "/a\r\nX: y"), ("Location", "/a\ny"), ("Location", "/\u0142"), ("X: y\r\nZ", "a"), ("", "a"),
            ("X", "\0"),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_field_of_an_error_cannot_become_another(self, start, field):
        """A callable may put into a Location, decoded, what a visitor wrote."""

        async def authorize(head, visit, route):
            raise ProxyError(302, "", (("Retry-After", 5), field))

        answer = start(authorize=authorize).get("/proxy/80/")
        assert status_of(answer) == 500
        assert not {"location", "x", "z"} & set(fields_of(answer))

    def test_fields_of_an_error_are_sent(self, start):
        async def authorize(head, visit, route):
            raise ProxyError(302, "", (("Retry-After", 5), ("Location", "/\xe4 b")))

        answer = start(authorize=authorize).get("/proxy/80/")
        assert status_of(answer) == 302
        assert (fields_of(answer)["location"], fields_of(answer)["retry-after"]) == ("/\xe4 b", "5")


class UnixWire(Wire):
    """One end of a raw connection to a Unix socket."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT)
        self.sock.connect(path)
        self.buffer = b""


class TestTrustedProxies:
    @pytest.fixture
    def client_and_fields(self, start, upstream):
        """What a request comes to: (the client's address, the X-Forwarded fields that the app gets)."""

        def client_and_fields(connect, lines, **options):
            seen = []

            async def authorize(head, visit, route):
                seen.append(visit.address)

            app = upstream(answering(OK))
            proxy = start(authorize=authorize, **options)
            with connect(proxy) as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port, *lines))
                assert status_of(wire.message()) == 200
            (client,), fields = seen, fields_of(app.messages[0])
            return client, tuple(fields.get("x-forwarded-" + name) for name in ("for", "proto", "host", "port"))

        return client_and_fields

    @pytest.mark.parametrize(
        "trusted, lines, client, fields",
        [
            ("10.0.0.0/8", (), "127.0.0.1", ("127.0.0.1", "http", "here:8888", "8888")),
            (
                "10.0.0.0/8", ("For: 1.2.3.4", "Proto: https", "Host: evil"),
                "127.0.0.1", ("127.0.0.1", "http", "here:8888", "8888"),
            ),
            ("unix", ("For: 1.2.3.4",), "127.0.0.1", ("127.0.0.1", "http", "here:8888", "8888")),
            ("127.0.0.0/8", (), "127.0.0.1", ("127.0.0.1", "http", "here:8888", "8888")),
            (
                "127.0.0.0/8", ("For: 1.2.3.4", "Proto: HTTPS", "Host: pub.example"),
                "1.2.3.4", ("1.2.3.4, 127.0.0.1", "https", "pub.example", "443"),
            ),
            (
                "127.0.0.0/8", ("For: 6.6.6.6, 1.2.3.4", "For: 127.9.9.9"),
                "1.2.3.4", ("6.6.6.6, 1.2.3.4, 127.9.9.9, 127.0.0.1", "http", "here:8888", "8888"),
            ),
            (
                "127.0.0.0/8", ("Host: a b", "Proto: gopher", "Port: x"),
                "127.0.0.1", ("127.0.0.1", "http", "here:8888", "8888"),
            ),
            ("127.0.0.1", ("Host: pub:81", "Port: 8443"), "127.0.0.1", ("127.0.0.1", "http", "pub:81", "8443")),
            (
                "127.0.0.1", ("Proto: https, http", "Port: 443,80"),
                "127.0.0.1", ("127.0.0.1", "https", "here:8888", "443"),
            ),
            (
                "127.0.0.1", ("Proto: http,https", "Proto: "),
                "127.0.0.1", ("127.0.0.1", "http", "here:8888", "8888"),
            ),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_forwarded_fields_of_a_trusted_proxy_alone_are_believed(
        self, client_and_fields, trusted, lines, client, fields
    ):
        """Of several addresses the client is at the last one that is no trusted proxy itself."""
        lines = tuple("X-Forwarded-" + line for line in lines)
        assert client_and_fields(Running.wire, lines, trusted_proxies=[trusted]) == (client, fields)

    def test_trusted_proxy_with_an_ipv6_address_is_believed(self, client_and_fields):
        def connect(proxy):
            return Wire(socket.create_connection(("::1", proxy.port), WAIT))

        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
        fields = ("1.2.3.4, ::1", "http", "here:8888", "8888")
        options = {"bind": "::1", "trusted_proxies": ["::1"]}
        assert client_and_fields(connect, ("X-Forwarded-For: 1.2.3.4",), **options) == ("1.2.3.4", fields)

    @pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
    @pytest.mark.parametrize("trusted, client", [(["unix"], "1.2.3.4"), ([], "")])
    def test_trusted_proxy_at_a_unix_socket_is_believed(self, client_and_fields, tmp_path, trusted, client):
        path = str(tmp_path / "socket")
        options = {"bind": "unix:" + path, "trusted_proxies": trusted}
        fields = (client or None, "http", "here:8888", "8888")
        lines = ("X-Forwarded-For: 1.2.3.4",)
        assert client_and_fields(lambda proxy: UnixWire(path), lines, **options) == (client, fields)

    def test_cookie_is_secure_where_the_trusted_proxy_serves_https(self, start):
        proxy = start(trusted_proxies=["127.0.0.1"], token=TOKEN)
        answer = proxy.get("/proxy/?token=" + TOKEN, "X-Forwarded-Proto: https", *SAFE_LINES)
        assert fields_of(answer)["set-cookie"].endswith("; Secure")

    @pytest.mark.parametrize(
        "origin, status", [("https://pub.example", 200), ("http://here:8888", 403), ("https://evil", 403)]
    )
    def test_origin_is_that_of_the_forwarded_host(self, start, upstream, origin, status):
        app = upstream(answering(OK))
        proxy = start(trusted_proxies=["127.0.0.1"], token=TOKEN)
        forwarded = ("X-Forwarded-Proto: https", "X-Forwarded-Host: pub.example")
        cookie = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *(forwarded + SAFE_LINES)))
        lines = (cookie, "Content-Length: 0", "Origin: " + origin) + forwarded
        assert status_of(proxy.ask(request("POST", "/proxy/%d/" % app.port, *lines))) == status
        sent = [fields_of(message)["origin"] for message in app.messages]
        assert sent == (["http://localhost:%d" % app.port] if status == 200 else [])


# ---------------------------------------------------------------------------------------------------------------------
# Unprefixed requests
# ---------------------------------------------------------------------------------------------------------------------

US = "http://here:8888"
# The fields of a request, whether it is a page visit, and the prefix that it is redirected to; None for a 404.  LAST
# stands for the name of the cookie that says which app was opened last.
UNPREFIXED = [
    (["Referer: " + US + "/proxy/80/a/b?c"], False, "/proxy/80"),
    (["Referer: " + US + "/proxy/absolute/80/a"], False, "/proxy/absolute/80"),
    (["Referer: " + US + "/proxy/80"], True, "/proxy/80"),
    (["Referer: " + US + "/proxy/db:80/#x"], False, "/proxy/db:80"),
    (["Referer: " + US + "/proxy/80/", "Cookie: LAST=90"], False, "/proxy/80"), (["Referer: " + US + "/"], False, None),
    (["Referer: " + US + "/", "Cookie: LAST=90"], False, "/proxy/90"),
    (["Referer: " + US + "/worker.js", "Cookie: a=b; LAST=absolute/90"], False, "/proxy/absolute/90"),
    (["Referer: " + US + "/proxy/", "Cookie: LAST=90"], False, None),  # from the proxy's own page
    (["Referer: " + US + "/proxy?a", "Cookie: LAST=90"], True, None),
    (["Referer: http://evil/proxy/80/", "Cookie: LAST=90"], False, None),
    (["Referer: http://evil/", "Cookie: LAST=90"], True, None),
    (["Referer: " + US + "/proxy/80/", "Sec-Fetch-Site: cross-site"], True, None),
    (["Referer: " + US + "/proxy/80/", "Sec-Fetch-Site: same-site"], False, None),
    (["Referer: " + US + "/proxy/80/", "Origin: http://evil"], False, None),
    (["Referer: " + US + "/proxy/80/", "Origin: null"], False, None),
    (["Referer: " + US + "/proxy/80/", "Origin: " + US, "Sec-Fetch-Site: same-origin"], False, "/proxy/80"),
    (["Sec-Fetch-Site: same-origin", "Cookie: LAST=90"], False, "/proxy/90"),
    (["Sec-Fetch-Site: same-origin", "Origin: null", "Cookie: LAST=90"], False, "/proxy/90"),
    (["Sec-Fetch-Site: none", "Cookie: LAST=90"], False, None),
    (["Sec-Fetch-Site: none", "Cookie: LAST=90"], True, "/proxy/90"),
    (["Cookie: LAST=90"], True, "/proxy/90"), (["Cookie: LAST=90"], False, None),
    (["Origin: " + US, "Cookie: LAST=90"], False, "/proxy/90"), (["Sec-Fetch-Site: same-origin"], False, None),
    ([], True, None), ([], False, None),
    (["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: same-origin", "Cookie: LAST=90"], False, None),
    (["Origin: " + US, "Cookie: LAST=evil; LAST=[::1]:90; LAST=80"], False, "/proxy/[::1]:90"),
    (["Origin: " + US, "Cookie: LAST=80/a"], False, None), (["Origin: " + US, "Cookie: LAST=80/.."], False, None),
    (["Origin: " + US, "Cookie: LAST=80?a"], False, None), (["Origin: " + US, "Cookie: LAST=/80"], False, None),
    (["Origin: " + US, "Cookie: LAST=; xLAST=80"], False, None),
    (["Origin: " + US, "Cookie: LAST=//evil:80"], False, None),
    (["Origin: " + US, "Cookie: LAST=080"], False, None),
]  # fmt: skip
SERVICE_WORKER = ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Dest: serviceworker")


def cookies_set(answer):
    """The values of Set-Cookie in an answer."""
    return [value for name, value in answer[1] if name.lower() == "set-cookie"]


class TestUnprefixedRequests:
    """Requests without a prefix, as links of an app make them that begin with a slash."""

    @pytest.fixture
    def cookie_name(self, upstream):
        """The name of the cookie that says which app a browser opened last."""

        def cookie_name(proxy):
            app = upstream(answering(OK))
            answer = proxy.get("/proxy/%d/" % app.port, *SAFE_LINES)
            name, value = cookie_of(answer)[len("Cookie: ") :].split("=")
            assert value == str(app.port)
            return name

        return cookie_name

    @pytest.mark.parametrize("lines, is_page_visit, prefix", UNPREFIXED, ids=case_id)
    def test_request_is_redirected_to_the_app_it_comes_from(
        self, start, cookie_name, lines, is_page_visit, prefix
    ):
        """Found by the page that asks, or else by what was opened last, for requests of this origin alone."""
        proxy = start(host_allowlist=["db"])
        name = cookie_name(proxy)
        lines = [line.replace("LAST", name) for line in lines] + ["Accept: text/html"] * is_page_visit
        answer = proxy.get("/a/%2F?b", *lines)
        expected = (307, prefix + "/a/%2F?b") if prefix else (404, None)
        assert (status_of(answer), fields_of(answer).get("location")) == expected

    def test_dot_segments_that_leave_the_app_are_refused(self, proxy):
        assert status_of(proxy.get("/../8081/", "Referer: %s/proxy/80/" % US)) == 400

    @pytest.mark.parametrize("base", ["/proxy", "/"])
    @pytest.mark.parametrize("form", ["%s/%d", "%s/absolute/%d"])
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "FROB"])
    def test_redirect_keeps_method_and_body(self, start, upstream, base, form, method):
        """By its status, a 307; nothing reaches the app yet."""
        app = upstream(answering(OK))
        prefix = form % (base.rstrip("/"), app.port)
        lines = ("Content-Length: 2", "Origin: " + US) if method == "POST" else ()
        body = b"ab" if method == "POST" else b""
        target = "/static/a%2F?b=/c"
        answer = start(base=base).ask(request(method, target, "Referer: %s%s/x" % (US, prefix), *lines, body=body))
        assert (status_of(answer), fields_of(answer)["location"]) == (307, prefix + target)
        assert fields_of(answer)["cache-control"] == "no-store"
        assert app.connections == 0

    def test_page_of_the_root_is_no_app(self, start):
        assert status_of(start(base="/").get("/static/a", "Referer: %s/" % US)) == 404

    @pytest.mark.parametrize(
        "framing, pieces",
        [
            ("Content-Length: 6", (b"abc", b"def")),
            ("Transfer-Encoding: chunked", (b"3\r\nabc\r\n", b"3\r\ndef\r\n0\r\n\r\n")),
        ],
        ids=["length", "chunked"],
    )
    def test_upload_is_redirected_once_it_is_complete(self, start, framing, pieces):
        """Browsers do not look at an answer before that, however long it takes."""
        proxy = start(linger_timeout=0.1)
        with proxy.wire() as wire:
            wire.send(request("POST", "/upload", framing, "Referer: %s/proxy/80/" % US, "Origin: " + US), pieces[0])
            wire.sock.settimeout(0.5)
            with pytest.raises(socket.timeout):
                wire.more()
            wire.sock.settimeout(WAIT)
            wire.send(pieces[1], request("GET", "/proxy/?port=80"))
            assert [status_of(wire.message()), status_of(wire.message())] == [307, 303]

    @pytest.mark.parametrize(
        "lines, body, status",
        [
            (("Content-Length: 6", "Expect: 100-continue"), b"", 307),
            (("Transfer-Encoding: chunked",), b"x\r\n", 400),
        ],
        ids=["expects 100", "bad chunk"],
    )
    def test_upload_that_will_not_come_is_answered_at_once(self, proxy, lines, body, status):
        lines += ("Referer: %s/proxy/80/" % US, "Origin: " + US)
        assert status_of(proxy.ask(request("POST", "/upload", *lines, body=body))) == status

    @pytest.mark.parametrize(
        "base, target",
        [("/proxy", "/proxy/" + path) for path in ("x", "99999/", "/", "absolute/", "08/")]
        + [("/proxy", "/%70roxy/x"), ("/", "/absolute/x")],
    )
    def test_path_of_the_proxy_itself_is_not_redirected(self, start, base, target):
        lines = ("Referer: %s%s/80/" % (US, base.rstrip("/")), "Sec-Fetch-Site: same-origin")
        assert status_of(start(base=base).get(target, *lines)) == 404

    @pytest.mark.parametrize(
        "options, is_ours",
        [
            ({"whole_origin": False}, False), ({"base": "/a/b"}, False), ({"trusted_proxies": ["192.0.2.1"]}, False),
            ({"base": "/a/b", "whole_origin": True}, True),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_origin_that_is_shared_with_others_has_no_redirects(self, start, upstream, options, is_ours):
        """And no cookies of the proxy for all its paths."""
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"))
        proxy = start(**options)
        prefix = "%s/%d" % (options.get("base", "/proxy"), app.port)
        assert status_of(proxy.get("/static/a", "Referer: %s%s/" % (US, prefix))) == (307 if is_ours else 404)
        assert (cookies_set(proxy.get(prefix + "/", *SAFE_LINES)) == ["a=b"]) is not is_ours

    def test_opened_app_is_remembered_in_a_cookie(self, proxy, upstream):
        """Set only when it changes."""
        cookie = None
        for _ in range(2):
            app = upstream(answering(OK))
            answer = proxy.get("/proxy/%d/" % app.port, *SAFE_LINES, *filter(None, [cookie]))
            expected = "port_proxy_%d_app=%d; Path=/; HttpOnly; SameSite=Lax" % (proxy.port, app.port)
            assert cookies_set(answer) == [expected]
            cookie = cookie_of(answer)
            assert cookies_set(proxy.get("/proxy/%d/" % app.port, *SAFE_LINES, cookie)) == []

    @pytest.mark.parametrize(
        "lines",
        [
            ("Sec-Fetch-Mode: cors", "Accept: */*"), ("Sec-Fetch-Dest: iframe",) + SAFE_LINES,
            ("Accept: text/html", "Sec-Fetch-Mode: no-cors"),
        ],
    )  # fmt: skip
    def test_request_that_opens_no_page_is_not_remembered(self, proxy, upstream, lines):
        app = upstream(answering(OK))
        assert cookies_set(proxy.get("/proxy/%d/" % app.port, *lines)) == []

    @pytest.mark.parametrize(
        "lines, number", [(("Sec-Fetch-Site: same-origin",), 1), (("Referer: %s/proxy/PORT/" % US,), 0)]
    )
    def test_page_that_asks_counts_more_than_the_app_opened_last(self, proxy, upstream, lines, number):
        apps = [upstream(answering(OK)) for _ in range(2)]
        cookie = cookie_of(proxy.get("/proxy/%d/" % apps[1].port, *SAFE_LINES))
        lines = [line.replace("PORT", str(apps[0].port)) for line in lines]
        assert fields_of(proxy.get("/x", cookie, *lines))["location"] == "/proxy/%d/x" % apps[number].port

    @pytest.mark.parametrize(
        "target, lines, status",
        [("/socket.io/?a", ("Origin: " + US,) + HANDSHAKE, 101), ("/sw.js", SERVICE_WORKER, 200)],
        ids=["WebSocket", "service worker"],
    )
    def test_request_that_follows_no_redirect_is_served_in_place(self, proxy, upstream, target, lines, status):
        """The app gets it as if it had come with the prefix, without the proxy's cookie."""
        app = upstream(serve_sockets)
        cookie = cookie_of(proxy.get("/proxy/%d/" % app.port, *SAFE_LINES))
        assert status_of(proxy.get(target, cookie, *lines, no_body=status == 101)) == status
        assert app.messages[-1][0] == "GET %s HTTP/1.1" % target
        sent = fields_of(app.messages[-1])
        assert sent["x-forwarded-prefix"] == "/proxy/%d" % app.port
        assert "cookie" not in sent

    def test_websocket_of_another_origin_reaches_no_app(self, proxy, upstream):
        app = upstream(serve_sockets)
        cookie = cookie_of(proxy.get("/proxy/%d/" % app.port, *SAFE_LINES))
        assert status_of(proxy.get("/socket.io/", cookie, "Origin: http://evil", *HANDSHAKE)) == 404
        assert len(app.messages) == 1

    @pytest.fixture
    def opened(self, proxy, upstream):
        """Open an app that sets cookies: (the app, all Set-Cookie values, those that the proxy added)."""

        def opened(*cookies):
            head = "HTTP/1.1 200 OK\r\n%sContent-Length: 0\r\n\r\n"
            answer = (head % "".join("Set-Cookie: %s\r\n" % one for one in cookies)).encode()
            app = upstream(lambda wire, app: serve_sockets(wire, app, answer))
            values = cookies_set(proxy.get("/proxy/%d/" % app.port, *SAFE_LINES))
            names = {one.split("=")[0] for one in cookies}
            return app, values, [value for value in values if value.split("=")[0] not in names]

        return opened

    APPS_COOKIES = (
        "a=1; Path=/; Secure; Max-Age=9", "b=2", "c=3; Path=/x; HttpOnly; Domain=localhost",
        "__Host-d=4; Path=/; Secure", "=5",
    )  # fmt: skip

    def test_apps_cookies_are_copied_for_all_paths(self, opened):
        """Those that would not be sent outside of the prefix; the app's own stay beside them."""
        app, values, ours = opened(*self.APPS_COOKIES)
        assert "a=1; Path=/proxy/%d/; Secure; Max-Age=9" % app.port in values
        names = [value.split("=")[0] for value in ours]
        assert len(set(names)) == 4
        assert [name.rpartition("_")[2] for name in names] == ["a", "b", "c", "app"]
        assert [value.partition("=")[2] for value in ours] == [
            "1; Secure; Max-Age=9; Path=/; HttpOnly", "2; Path=/; HttpOnly", "3; Path=/; HttpOnly",
            "%d; Path=/; HttpOnly; SameSite=Lax" % app.port,
        ]  # fmt: skip

    def test_apps_cookies_are_not_copied_for_programs(self, proxy, opened):
        app, _, ours = opened(*self.APPS_COOKIES)
        names = {value.split("=")[0] for value in cookies_set(proxy.get("/proxy/%d/" % app.port))}
        assert not names & {value.split("=")[0] for value in ours}

    def test_copied_cookies_reach_their_app_in_place_alone(self, proxy, opened):
        """Each app gets its own, and a cookie that the browser sends by itself counts more than its copy."""
        cookies = [value.split(";")[0] for _ in range(2) for value in opened(*self.APPS_COOKIES)[2]]
        app, _, ours = opened(*self.APPS_COOKIES)
        cookies = [one for one in cookies if "_app=" not in one] + [value.split(";")[0] for value in ours]
        line = "Cookie: b=newer; " + "; ".join(sorted(cookies))
        assert status_of(proxy.get("/ws", line, "Origin: " + US, *HANDSHAKE, no_body=True)) == 101
        assert fields_of(app.messages[-1])["cookie"] == "b=newer; a=1; c=3"
        assert status_of(proxy.get("/proxy/%d/" % app.port, line)) == 200
        assert fields_of(app.messages[-1])["cookie"] == "b=newer"

    @pytest.mark.parametrize("is_session", [False, True])
    def test_proxys_own_cookie_cannot_come_in_as_a_copy(self, start, upstream, is_session):
        """What a browser was made to store under the name of a copy is checked like any other cookie."""
        proxy = start(token=TOKEN)
        session = cookie_of(proxy.get("/proxy/?token=" + TOKEN, *SAFE_LINES))
        answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: x=y\r\nContent-Length: 0\r\n\r\n"
        app = upstream(lambda wire, app: serve_sockets(wire, app, answer))
        copy, opened = cookies_set(proxy.get("/proxy/%d/" % app.port, session, *SAFE_LINES))[1:]
        copy, opened = copy.split(";")[0], opened.split(";")[0]
        assert copy.endswith("x=y")
        smuggled = copy[: -len("x=y")] + (session[len("Cookie: ") :] if is_session else opened)
        line = "; ".join([session, opened, smuggled, copy])
        assert status_of(proxy.get("/ws", line, "Origin: " + US, *HANDSHAKE, no_body=True)) == 101
        assert fields_of(app.messages[-1])["cookie"] == "x=y"

    @pytest.mark.parametrize(
        "sent, arrives",
        [
            ("a=b", "a=b; Path=PREFIX/"), ("a=b; Path=/", "a=b; Path=PREFIX/"),
            ("a=b; Max-Age=1", "a=b; Max-Age=1; Path=PREFIX/"),
        ],
    )  # fmt: skip
    def test_cookie_that_is_set_in_place_gets_the_prefix_as_its_path(self, proxy, upstream, sent, arrives):
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nSet-Cookie: %s\r\nContent-Length: 0\r\n\r\n" % sent.encode()))
        prefix = "/proxy/%d" % app.port
        answer = proxy.get("/sw.js", "Referer: %s%s/" % (US, prefix), *SERVICE_WORKER)
        assert cookies_set(answer) == [arrives.replace("PREFIX", prefix)]

    @pytest.fixture
    def allowing(self, upstream):
        """Start an app that sends this Service-Worker-Allowed, or none."""

        def allowing(value):
            def serve(wire, app):
                field = "Service-Worker-Allowed: %s\r\n" % value.replace("PORT", str(app.port)) if value else ""
                answering(("HTTP/1.1 200 OK\r\n%sContent-Length: 0\r\n\r\n" % field).encode())(wire, app)

            return upstream(serve)

        return allowing

    @pytest.mark.parametrize(
        "value", ["/", "/a/", "./", "../../", "http://here:8888/", "/proxy/PORT/../../", "/proxy/PORT"]
    )
    @pytest.mark.parametrize("form", ["/proxy/%d", "/proxy/absolute/%d"])
    @pytest.mark.parametrize("is_in_place", [False, True])
    def test_service_worker_controls_no_more_than_its_app(self, proxy, allowing, value, form, is_in_place):
        """Otherwise its scope could be the whole origin, with our pages and other apps in it."""
        app = allowing(value)
        prefix = form % app.port
        target = "/sw.js" if is_in_place else prefix + "/sw.js"
        answer = proxy.get(target, "Referer: %s%s/" % (US, prefix), *SERVICE_WORKER)
        assert [field[1] for field in answer[1] if field[0] == "Service-Worker-Allowed"] == [prefix + "/"]

    @pytest.mark.parametrize(
        "target, prefix, allowed",
        [
            ("/sw.js", "/proxy/PORT", "/proxy/PORT/"), ("/proxy/absolute/PORT", "", "/proxy/absolute/PORT/"),
            ("/proxy/PORT/sw.js", "", None),
        ],
    )  # fmt: skip
    def test_service_worker_outside_of_the_folder_of_its_app_is_limited_to_that(
        self, proxy, allowing, target, prefix, allowed
    ):
        """Where the app says nothing, the folder of the script is the limit, and that may be one of all apps."""
        app = allowing(None)
        target, prefix, allowed = (text and text.replace("PORT", str(app.port)) for text in (target, prefix, allowed))
        answer = proxy.get(target, "Referer: %s%s/" % (US, prefix), *SERVICE_WORKER)
        assert status_of(answer) == 200
        assert fields_of(answer).get("service-worker-allowed") == allowed

    @pytest.mark.parametrize("value", ["/", "/a/", "http://here:8888/"])
    def test_service_worker_at_the_host_of_an_app_controls_what_it_says(self, proxy, upstream, value):
        head = b"HTTP/1.1 200 OK\r\nService-Worker-Allowed: %s\r\nContent-Length: 0\r\n\r\n"
        app = upstream(answering(head % value.encode()))
        answer = proxy.ask(at("%d.localhost:8888" % app.port, "GET", "/sw.js"))
        assert fields_of(answer)["service-worker-allowed"] == value

    @pytest.mark.parametrize(
        "lines, status", [((), 401), (SAFE_LINES, 401), (("Origin: " + US,) + HANDSHAKE, 403)], ids=case_id
    )
    def test_token_is_needed_without_a_prefix_too(self, start, upstream, lines, status):
        app = upstream(answering(OK))
        answer = start(token=TOKEN).get("/x?y", "Referer: %s/proxy/%d/" % (US, app.port), *lines)
        assert status_of(answer) == status
        if lines == SAFE_LINES:  # the sign-in page leads on to the app
            assert b'value="/proxy/%d/x?y"' % app.port in answer[2]
        assert app.connections == 0

    def test_redirect_has_no_token_in_it(self, start):
        answer = start(token=TOKEN).get("/x?token=%s&y" % TOKEN, "Referer: %s/proxy/80/" % US)
        assert (status_of(answer), fields_of(answer)["location"]) == (307, "/proxy/80/x?y")

    def test_authorize_is_asked_with_the_route_of_the_app(self, start):
        asked = []

        async def authorize(head, visit, route):
            asked.append((route.port, head.path))
            raise ProxyError(403, "No.")

        assert status_of(start(authorize=authorize).get("/x", "Referer: %s/proxy/80/" % US)) == 403
        assert asked == [(80, "/x")]

    def test_not_found_page_advises_a_host_of_its_own(self, start):
        answer = start().ask(at("localhost:8888", "GET", "/packages/a.whl"))
        assert (status_of(answer), b"http://8080.localhost:8888/" in answer[2]) == (404, True)
        assert b"host of its own" not in start(domains=()).get("/packages/a.whl")[2]

    @pytest.mark.parametrize("lines", [(), ("Cookie: LAST=80", "Sec-Fetch-Site: none")], ids=case_id)
    def test_root_is_redirected_to_the_ports_page(self, proxy, cookie_name, lines):
        name = cookie_name(proxy)
        answer = proxy.get("/", *[line.replace("LAST", name) for line in lines], *SAFE_LINES)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, "/proxy/")

    def test_root_is_redirected_to_the_app_whose_page_asks(self, proxy):
        answer = proxy.get("/", "Referer: %s/proxy/80/x" % US, *SAFE_LINES)
        assert (status_of(answer), fields_of(answer)["location"]) == (307, "/proxy/80/")

    def test_root_is_not_found_where_the_origin_is_shared(self, start):
        assert status_of(start(whole_origin=False).get("/", *SAFE_LINES)) == 404

    def test_another_proxy_can_be_the_app(self, start, upstream):
        """A browser signs in at it, and its pages are reached with its cookie."""
        app = upstream(answering(OK))
        inner, outer = start(token=TOKEN), start()
        answer = outer.get("/proxy/%d/proxy/?token=%s" % (inner.port, TOKEN), *SAFE_LINES)
        (session,) = (value for value in cookies_set(answer) if value.startswith("port_proxy_%d=" % inner.port))
        target = "/proxy/%d/proxy/%d/" % (inner.port, app.port)
        assert status_of(outer.get(target, "Cookie: " + session.split(";")[0])) == 200
        assert status_of(outer.get(target)) == 401

    def test_another_proxys_cookies_are_told_from_our_own(self, start, upstream):
        """Also where one port's number begins as the other's: an app gets those of its own port alone."""
        for _ in range(50):
            app = upstream(answering(OK))
            try:
                proxy = start(port=app.port // 10)
                break
            except OSError:  # another program has that port
                continue
        ends = ("", "_app", "_app_x_a")
        names, others = ({"port_proxy_%d%s" % (port, end) for end in ends} for port in (app.port, proxy.port))
        line = "Cookie: " + "; ".join(name + "=1" for name in sorted(names | others | {"port_proxy_9_app"}))
        assert status_of(proxy.get("/proxy/%d/" % app.port, line)) == 200
        assert {pair.split("=")[0] for pair in fields_of(app.messages[0])["cookie"].split("; ")} == names


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
    def rows(self, proxy):
        """What the page at the base tells programs of each port, by port."""
        answer = proxy.get("/proxy/", "Accept: application/json")
        assert (status_of(answer), fields_of(answer)["content-type"]) == (200, "application/json; charset=utf-8")
        return {row["port"]: row for row in json.loads(answer[2].decode())["ports"]}

    @pytest.mark.parametrize(
        "host, told, is_local",
        [
            ("127.0.0.1", "127.0.0.1", True), ("0.0.0.0", "0.0.0.0", True), ("127.0.0.2", "127.0.0.2", False),
            ("::1", "::1", True), ("::", "::", True), ("::ffff:127.0.0.1", "127.0.0.1", True),
        ],
    )  # fmt: skip
    def test_program_that_listens_is_listed_with_its_address(self, start, upstream, host, told, is_local):
        with app_alone_at(host, upstream) as app:
            proxy = start()
            row = self.rows(proxy)[app.port]
            (line,) = (one for one in proxy.get("/proxy/")[2].decode().split("\n") if "/%d/ " % app.port in one)
        assert (row["addresses"], row["pid"]) == ([told], os.getpid())
        assert 0 <= row["seconds"] < 86400
        assert ("listens at %s alone, not at localhost" % told in line) is not is_local

    def test_socket_is_listed_only_while_it_listens(self, start):
        """A proxy looks at most once a second."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            proxy = start()
            assert port not in self.rows(proxy)
            sock.listen(1)
            eventually(lambda: port in self.rows(proxy))
        eventually(lambda: port not in self.rows(proxy))

    @pytest.mark.parametrize("name, address", [("", "localhost"), ("127.0.0.1:", "127.0.0.1"), ("[::1]:", "::1")])
    @pytest.mark.parametrize(
        "host, told, reached",
        [
            ("127.0.0.1", "127.0.0.1", ("localhost", "127.0.0.1")), ("127.0.0.2", "127.0.0.2", ()),
            ("0.0.0.0", "0.0.0.0", ("localhost", "127.0.0.1")), ("::1", "::1", ("localhost", "::1")),
            ("::", "::", ("localhost", "127.0.0.1", "::1")),
            ("::ffff:127.0.0.1", "127.0.0.1", ("localhost", "127.0.0.1")),
        ],
    )  # fmt: skip
    def test_program_at_another_loopback_address_is_told(self, proxy, upstream, name, address, host, told, reached):
        with app_alone_at(host, upstream) as app:
            answer = proxy.get("/proxy/%s%d/" % (name, app.port))
        if b"No connection to" in answer[2]:
            pytest.skip("this machine has no IPv6 loopback")
        assert status_of(answer) == (200 if address in reached else 502)
        assert address in reached or "listens at %s alone, not at %s." % (told, address) in answer[2].decode()

    def test_program_at_localhost_is_not_told_for_another_host(self, start, upstream):
        """The other one may be another machine."""
        with app_alone_at("127.0.0.1", upstream) as app:
            answer = start(host_allowlist=["127.0.0.2"]).get("/proxy/127.0.0.2:%d/" % app.port)
        assert (status_of(answer), b"alone" in answer[2]) == (502, False)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can listen as another user")
    def test_port_of_another_user_is_not_listed(self, start, upstream):
        app = upstream(answering(OK))
        with as_user(OTHER_USER, "127.0.0.1") as port:
            rows = self.rows(start())
        assert (app.port in rows, port in rows) == (True, False)

    def test_port_of_a_system_service_is_not_listed(self, start, upstream):
        app = upstream(answering(OK))
        with socket.socket() as sock:
            for port in range(1023, 600, -1):
                try:
                    sock.bind(("127.0.0.1", port))
                    break
                except PermissionError:
                    pytest.skip("this user may not listen on the ports of the system")
                except OSError:  # another program has that port
                    continue
            sock.listen(1)
            rows = self.rows(start())
        assert (app.port in rows, port in rows) == (True, False)

    def test_port_without_a_process_is_not_listed(self, start, upstream):
        """As one of another container on the same network; here its socket is on the way between two processes."""
        app = upstream(answering(OK))
        near, far = socket.socketpair()
        with near, far:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                sock.listen(1)
                port = sock.getsockname()[1]
                near.sendmsg([b"a"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", sock.fileno()))])
            socket.create_connection(("127.0.0.1", port), WAIT).close()  # so it still listens
            rows = self.rows(start())
        assert (app.port in rows, port in rows) == (True, False)

    def test_no_port_is_listed_where_the_system_tells_none(self, start, upstream, monkeypatch):
        app = upstream(answering(OK))
        self.hide(monkeypatch, "/proc/net/")
        proxy = start()
        assert self.rows(proxy) == {}
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200

    def test_process_that_ends_meanwhile_is_listed_without_its_name(self, start, upstream, monkeypatch):
        """It was there when the sockets were looked up, and no longer when the processes were."""
        app = upstream(answering(OK))
        self.hide(monkeypatch, "/proc/%d/" % os.getpid())
        row = self.rows(start())[app.port]
        assert (row["program"], row["seconds"]) == ("", None)

    def hide(self, monkeypatch, folder):
        """Let no file in this folder be opened, as where there is none; nothing of the proxy itself is changed."""

        def open_others(name, *more, _open=open, **how):
            if str(name).startswith(folder):
                raise FileNotFoundError(errno.ENOENT, "hidden by the test", name)
            return _open(name, *more, **how)

        monkeypatch.setattr("builtins.open", open_others)

    @pytest.mark.parametrize(
        "arguments, name",
        [
            (["/usr/bin/python3", "-m", "http.server", "--secret=x"], "http.server"),
            (["python3.11", "-u", "-X", "dev", "/srv/app.py", "--token", "x"], "app.py"),
            (["/usr/bin/node", "/a/b/vite.js"], "vite.js"), (["/opt/code-server", "--auth", "x"], "code-server"),
            (["python3", "-c", "print('secret')"], "python3"), (["node", "-e", "const PASSWORD='hunter2'"], "node"),
            (["perl", "-Mstrict", "-e", "my $k='sk-secret'"], "perl"), (["bash", "-lc", "secret=x serve"], "bash"),
            (["java", "-cp", "x.jar", "Main"], "java"), (["python3", "-m"], "python3"),
            (["python3", "my secret.py"], "python3"), (["python3"], "python3"),
            (["nginx: master process /usr/sbin/nginx"], "nginx"),
            (["nginx: master process nginx -c /etc/secret.conf", "", ""], "nginx"),
            (["nginx: master process nginx -p /a/ -c b"], "nginx"), (["puma 6.4.0 (tcp://0.0.0.0:3000) [app]"], "puma"),
            (["postgres: worker db=//u:s3cret@h/n"], "postgres"), (["/opt/my app/bin/serve", "--secret"], "serve"),
            ([""], ""),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_program_is_named_without_its_arguments(self, start, tmp_path, arguments, name):
        """They may hold secrets."""
        with listening_process(arguments, tmp_path) as (process, port):
            row = self.rows(start())[port]
        assert (row["pid"], row["program"]) == (process.pid, name)
        assert 0 <= row["seconds"] < 3600


@contextlib.contextmanager
def listening_process(arguments, folder):
    """A process that has these arguments and listens: (process, port).

    Its loader waits for a library that is a FIFO, so that nothing looks at the arguments.
    """
    fifo = str(folder / "library")
    os.mkfifo(fifo)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1)
        port = sock.getsockname()[1]
        how = {"executable": sys.executable, "env": {"LD_PRELOAD": fifo}, "pass_fds": [sock.fileno()]}
        process = subprocess.Popen(arguments, **how)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------------------------------------
# Upstream
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def closed_port():
    """A port on which nothing listens meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def queued(local_port=None, remote_port=None):
    """How many bytes the kernel holds for connections: (to send or not acknowledged, not read yet)."""
    to_send = not_read = 0
    with open("/proc/net/tcp", encoding="ascii") as file:
        for row in file.read().splitlines()[1:]:
            _, local, remote, state, queues = row.split()[:5]
            ports = [int(end.rpartition(":")[2], 16) for end in (local, remote)]
            if state != "0A" and local_port in (None, ports[0]) and remote_port in (None, ports[1]):
                to_send += int(queues.split(":")[0], 16)
                not_read += int(queues.split(":")[1], 16)
    return to_send, not_read


ELSEWHERE = """\
import asyncio, socket, sys
sys.path.insert(0, sys.argv[1])
from port_proxy import Config, Hub, PortProxy
%s
async def run(loop):
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=int(sys.argv[3]))
    await PortProxy(eval(sys.argv[2])).start([listener])
    await loop.create_future()
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(run(loop))
"""


@contextlib.contextmanager
def proxy_elsewhere(before="", after="", command=(), **options):
    """A proxy in a process that `command` starts and that code has changed: (process, port).

    The code runs before or after the modules are imported. The listener is made here, so that the proxy can be reached
    wherever it is.
    """
    options.setdefault("allow_hostnames", ("*",))
    arguments = [sys.executable, "-c", before + ELSEWHERE % after, str(HERE), repr(Config(**options))]
    with tempfile.TemporaryFile() as errors:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            port, number = listener.getsockname()[1], listener.fileno()
            process = subprocess.Popen(
                list(command) + arguments + [str(number)], pass_fds=[number], stdout=subprocess.PIPE, stderr=errors
            )
        try:
            yield process, port
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        assert errors.read() == b""


def ask_port(port, target, *lines):
    """The response of the proxy at a port to one GET."""
    with Wire.to(port) as wire:
        wire.send(request("GET", target, *lines))
        return wire.message()


def unshared(kind):
    """The command that gives a program a network ("-n") or mounts ("-m") of its own."""
    command = ["unshare", kind if not hasattr(os, "geteuid") or os.geteuid() == 0 else "-r" + kind[1:]]
    if not shutil.which("unshare") or subprocess.call(command + ["true"], stderr=subprocess.DEVNULL):
        pytest.skip("this system gives no namespaces")
    return command


ONLY_PORT_40000 = """\
import fcntl, socket, struct
with socket.socket() as sock:
    fcntl.ioctl(sock, 0x8914, struct.pack("16sh22x", b"lo", 0x49))  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING, IFF_LOOPBACK
with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
    file.write("40000 40000")
"""


class TestUpstream:
    def test_connection_is_reused_for_the_next_request(self, proxy, upstream):
        app = upstream(answering(OK))
        for _ in range(3):
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        assert app.connections == 1

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
            b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok!",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n\r\n",
        ],
        ids=["Connection close", "HTTP 1.0", "a byte too many", "a second response", "bytes behind the last chunk"],
    )
    def test_connection_with_an_unclear_end_is_not_reused(self, proxy, upstream, answer):
        app = upstream(answering(answer))
        for count in range(1, 4):
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
            assert app.connections == count

    @pytest.mark.parametrize("raw", [b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", b"x", None])
    def test_idle_connection_with_unasked_bytes_or_eof_is_closed(self, start, upstream, raw):
        """They are no answer to the next request."""
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
        assert count_connections(remote_port=app.port) == 1
        app.happened.set()
        eventually(lambda: not count_connections(remote_port=app.port))
        assert proxy.get("/proxy/%d/b" % app.port)[2] == b"ok"
        assert app.connections == 2

    @pytest.mark.parametrize(
        "method, lines, body, is_safe",
        [
            ("GET", (), b"", True),
            ("DELETE", (), b"", True),
            ("POST", ("Content-Length: 1",), b"a", False),
            ("PUT", ("Content-Length: 1",), b"a", False),
            ("POST", (), b"", False),
        ],
    )
    def test_request_that_dies_on_a_stale_connection_is_sent_again_if_safe(
        self, proxy, upstream, method, lines, body, is_safe
    ):
        """The upstream may have acted on the other requests, so they are never sent twice."""

        def serve(wire, app):
            app.messages.append(wire.message())
            wire.send(OK)
            if app.connections == 1:  # Take the second request, and close without a response.
                app.messages.append(wire.message())
                return
            while wire.more():
                app.messages.append(wire.message())
                wire.send(OK)

        app = upstream(serve)
        with proxy.wire() as wire:
            # Both are sent at once: a POST takes only a connection that was used within the last second.
            first = request("GET", "/proxy/%d/first" % app.port)
            wire.send(first + request(method, "/proxy/%d/second" % app.port, *lines, body=body))
            assert wire.message()[2] == b"ok"
            assert status_of(wire.message()) == (200 if is_safe else 502)
        targets = [message[0].split(" ")[1] for message in app.messages]
        assert targets == ["/first"] + ["/second"] * (2 if is_safe else 1)

    def test_request_that_dies_on_a_fresh_connection_is_not_sent_again(self, proxy, upstream):
        def serve(wire, app):
            app.messages.append(wire.message())

        app = upstream(serve)
        answer = proxy.get("/proxy/%d/" % app.port)
        assert status_of(answer) == 502
        assert b"closed the connection without a response" in answer[2]
        assert len(app.messages) == 1

    def test_post_takes_no_connection_that_has_idled_for_a_second(self, start, upstream):
        proxy = start(idle_upstream_timeout=10 * WAIT, keep_alive_timeout=1.2)
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""  # The proxy closes it after 1.2 seconds: so old is the idle connection now.
        assert count_connections(remote_port=app.port) == 1
        answer = proxy.ask(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1", body=b"a"))
        assert (status_of(answer), app.connections) == (200, 2)

    def test_get_takes_a_connection_that_has_idled_for_a_second(self, start, upstream):
        proxy = start(idle_upstream_timeout=10 * WAIT, keep_alive_timeout=1.2)
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
        assert app.connections == 1

    def test_idle_connections_are_bounded_in_number(self, start, upstream):
        proxy = start(max_idle_upstreams=2, idle_upstream_timeout=10 * WAIT)
        apps = [upstream(answering(OK)) for _ in range(4)]
        for app in apps:
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        eventually(lambda: sum(count_connections(remote_port=app.port) for app in apps) == 2)

    def test_idle_connection_is_closed_after_its_timeout(self, start, upstream):
        proxy = start(idle_upstream_timeout=0.2)
        app = upstream(answering(OK))
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        eventually(lambda: not count_connections(remote_port=app.port))
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        assert app.connections == 2

    def test_connection_with_half_a_request_on_it_is_not_reused(self, proxy, upstream):
        """After an early answer the upstream would take the next request for the rest of the body."""

        def serve(wire, app):
            while wire.until(b"\r\n\r\n"):
                wire.send(OK)

        app = upstream(serve)
        for count in range(1, 4):
            with proxy.wire() as wire:
                wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1000"))
                assert wire.message()[2] == b"ok"
            assert app.connections == count

    def test_connection_with_unsent_bytes_is_not_reused(self, proxy, upstream):
        """After an early answer to an upload the next request must not wait behind the bytes that are queued."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            if app.connections == 1:
                app.happened.wait(WAIT)
            wire.send(OK)
            app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        size = 115000
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: %d" % size))
            eventually(lambda: app.connections == 1)
            narrow(app.port)
            wire.send(bytes(size))
            # The proxy has read the whole request, and the kernel takes no more of it towards the app.
            eventually(lambda: queued(remote_port=proxy.port)[0] + queued(local_port=proxy.port)[1] == 0)
            eventually(lambda: queued(remote_port=app.port)[0] > 0)
            app.happened.set()
            message = wire.message()
            assert (message[2], fields_of(message).get("connection")) == (b"ok", "close")
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        assert app.connections == 2

    @pytest.mark.parametrize("begun", [b"HTTP/1.1 200 O", OK[:-1]])
    def test_request_whose_answer_has_begun_is_not_sent_again(self, proxy, upstream, begun):
        def serve(wire, app):
            for answer in (OK, begun):
                app.messages.append(wire.message())
                wire.send(answer)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/a" % app.port))
            assert wire.message()[2] == b"ok"
            wire.send(request("GET", "/proxy/%d/b" % app.port, "Connection: close"))
            wire.rest()
        assert (app.connections, len(app.messages)) == (1, 2)

    @pytest.mark.parametrize("ends", [True, False])
    @pytest.mark.parametrize(
        "greeting",
        [b"SSH-2.0-x\r\n", b"220 smtp\r\n", b"-ERR\r\n", b"HTTP\r\n", b"\r\nHTTP/1.1 200 OK\r\n\r\n"],
        ids=case_id,
    )
    def test_upstream_that_speaks_no_http_is_refused_at_once(self, proxy, upstream, greeting, ends):
        """Whether it closes the connection after its greeting, as Redis does, or waits, as mail servers do."""

        def serve(wire, app):
            wire.send(greeting)
            wire.until(b"\r\n\r\n")
            ends or app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        answer = proxy.get("/proxy/%d/" % app.port)
        assert status_of(answer) == 502
        assert b"The response of port %d of this machine is not valid HTTP." % app.port in answer[2]

    def test_answer_that_ends_in_its_head_is_a_502(self, proxy, upstream):
        app = upstream(once(b"H"))
        answer = proxy.get("/proxy/%d/" % app.port)
        assert (status_of(answer), b"in the middle of its response" in answer[2]) == (502, True)

    def test_page_about_an_upstream_that_closes_points_to_its_log(self, proxy, upstream):
        app = upstream(lambda wire, app: wire.more())
        answer = proxy.get("/proxy/%d/" % app.port, "Accept: text/html", "Sec-Fetch-Mode: navigate")
        assert b"closed the connection without a response. Its log may say why." in answer[2]

    @pytest.mark.parametrize("host", ["a..b", "a" * 64, "nowhere.invalid"])
    def test_host_that_cannot_be_found_is_a_502(self, start, host):
        answer = start(host_allowlist=["*"]).get("/proxy/%s:80/" % host)
        assert status_of(answer) == 502
        assert b"The host %s could not be found" % host.encode() in answer[2]

    def test_port_where_nothing_listens_is_a_502_and_keeps_the_connection(self, proxy):
        with closed_port() as port, proxy.wire() as wire:
            for _ in range(2):
                wire.send(request("GET", "/proxy/%d/" % port))
                answer = wire.message()
                assert status_of(answer) == 502
                assert b"Nothing listens on port %d of this machine" % port in answer[2]

    def test_connection_that_is_not_answered_in_time_is_a_504(self, start):
        """A listener whose backlog is full lets the kernel drop what else arrives."""
        with contextlib.ExitStack() as opened:
            full = opened.enter_context(socket.socket())
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(8):
                filler = opened.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            answer = start(connect_timeout=0.3).get("/proxy/127.0.0.1:%d/" % full.getsockname()[1])
        assert status_of(answer) == 504
        assert b"was not accepted within 0.3 seconds" in answer[2]

    def test_upstream_that_resets_at_once_is_a_502(self, proxy, upstream):
        """It may be gone before its address can be asked for; that this happens in one of the rounds is likely."""
        app = upstream(Wire.reset_at_once)
        for _ in range(30):
            with proxy.held(), proxy.wire() as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port))
            assert status_of(proxy.get("/proxy/%d/" % app.port)) == 502

    @pytest.mark.parametrize(
        "bind, target",
        [
            ("127.0.0.1", "/proxy/%d/"),
            ("127.0.0.1", "/proxy/absolute/%d/"),
            ("127.0.0.1", "/proxy/127.0.0.1:%d/proxy/"),
            ("0.0.0.0", "/proxy/%d/"),
            ("0.0.0.0", "/proxy/absolute/%d/"),
            ("0.0.0.0", "/proxy/127.0.0.1:%d/proxy/"),
            ("0.0.0.0", "/proxy/127.0.0.2:%d/"),
        ],
    )
    def test_request_to_the_proxys_own_port_is_a_508(self, start, bind, target):
        proxy = start(bind=bind, token="", host_allowlist=["127.0.0.2"])
        assert status_of(proxy.get(target % proxy.port)) == 508

    @pytest.mark.parametrize("bind", ["::1", "::"])
    def test_request_to_the_proxys_own_port_over_ipv6_is_a_508(self, start, bind):
        try:
            proxy = start(bind=bind, token="")
        except OSError:
            pytest.skip("this machine has no IPv6")
        with Wire(socket.create_connection(("::1", proxy.port), WAIT)) as wire:
            wire.send(request("GET", "/proxy/[::1]:%d/" % proxy.port))
            assert status_of(wire.message()) == 508

    def test_request_to_the_proxys_own_port_by_an_ipv6_spelling_is_a_508(self, start):
        proxy = start(host_allowlist=["*"])
        try:
            socket.create_connection(("::ffff:127.0.0.1", proxy.port), WAIT).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        assert status_of(proxy.get("/proxy/absolute/[::ffff:127.0.0.1]:%d/" % proxy.port)) == 508

    @pytest.mark.parametrize("host, name", [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")])
    def test_app_with_the_proxys_port_number_at_another_address_is_reached(self, start, upstream, host, name):
        app = upstream(answering(OK), host=host)
        proxy = start(bind="127.0.0.1", port=app.port, host_allowlist=["127.0.0.2"])
        assert proxy.get("/proxy/%s:%d/" % (name, app.port))[2] == b"ok"

    def test_connection_to_itself_counts_as_nothing_listening(self):
        """TCP lets a socket connect to itself, where the kernel gives it the very port that it is to connect to.

        In a network of its own, which has no other port to give, that always happens.
        """
        with proxy_elsewhere(before=ONLY_PORT_40000, command=unshared("-n")) as (_, port):
            answer = ask_port(port, "/proxy/40000/")
        assert (status_of(answer), b"Nothing listens on port 40000" in answer[2]) == (502, True)


OTHER_USER = 1234567
LISTEN_AS = """\
import os, socket, sys
os.setuid(int(sys.argv[1]))
while True:  # A proxy that is started later could have the same port at 127.0.0.1.
    listener, claim = socket.socket(socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET), socket.socket()
    if sys.argv[3] != "0" and listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # Somebody else has the port for IPv4.
    listener.bind((sys.argv[2], int(sys.argv[3]))); listener.listen(5)
    if sys.argv[2] != "::1": break
    try: claim.bind(("127.0.0.1", listener.getsockname()[1])); break
    except OSError: pass
print(listener.getsockname()[1], flush=True)
while True:
    wire = listener.accept()[0]
    if wire.recv(65536): wire.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\nok")
    wire.close()
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/net/tcp") or os.geteuid() != 0, reason="only root on Linux can listen as somebody else"
)
class TestPortOwner:
    @pytest.fixture(params=["the kernel", "the table"])
    def asked(self, request, monkeypatch):
        """The system is asked about a single socket, or, where it does not tell, for the table of all of them."""
        if request.param == "the table":
            monkeypatch.delattr(socket, "AF_NETLINK")

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
    @pytest.mark.parametrize("user, is_reached", [(OTHER_USER, False), (0, True), (33, True)])
    @pytest.mark.usefixtures("asked")
    def test_port_of_another_ordinary_user_is_a_403(self, start, host, user, is_reached):
        """jupyter-server-proxy issue 590: this holds whatever address the other user's program listens on."""
        proxy = start()
        with as_user(user, host) as port:
            name = "[::1]" if host == "::1" else "127.0.0.1"
            for form in ("/proxy/%d/" % port, "/proxy/absolute/%d/" % port, "/proxy/%s:%d/" % (name, port)):
                for lines in ((), HANDSHAKE):
                    answer = proxy.get(form, *lines)
                    assert status_of(answer) == (200 if is_reached else 403)
                    assert is_reached or b"--any-owner" in answer[2]
                    assert is_reached or b"belongs to another user, number %d" % OTHER_USER in answer[2]

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
    @pytest.mark.usefixtures("asked")
    def test_port_of_another_user_is_reached_with_any_owner(self, start, host):
        proxy = start(any_owner=True)
        with as_user(OTHER_USER, host) as port:
            for form in ("/proxy/%d/", "/proxy/absolute/%d/"):
                assert status_of(proxy.get(form % port)) == 200

    @pytest.mark.parametrize("user, status", [(OTHER_USER, 200), (OTHER_USER + 1, 403), (33, 200), (0, 200)])
    @pytest.mark.parametrize("before", ["", "import socket; del socket.AF_NETLINK\n"], ids=["the kernel", "the table"])
    def test_proxy_of_an_ordinary_user_reaches_ports_of_the_same_user(self, before, user, status):
        # What is imported later may lie where this user may not read.
        after = "import encodings.ascii, encodings.idna, encodings.latin_1, os, pwd; os.setuid(%d)" % OTHER_USER
        with as_user(user, "127.0.0.1") as app, proxy_elsewhere(before=before, after=after) as (_, port):
            assert status_of(ask_port(port, "/proxy/%d/" % app)) == status

    @pytest.mark.usefixtures("asked")
    def test_owner_of_a_port_number_is_told_apart_by_address(self, start, upstream):
        """Two users may listen on the same number, one at each loopback address."""
        app = upstream(answering(OK), host="::1")
        with as_user(OTHER_USER, "127.0.0.1", app.port):
            proxy = start()
            assert status_of(proxy.get("/proxy/127.0.0.1:%d/" % app.port)) == 403
            assert status_of(proxy.get("/proxy/%d/" % app.port)) == 403
            assert status_of(proxy.get("/proxy/[::1]:%d/" % app.port)) == 200

    @pytest.mark.usefixtures("asked")
    def test_owner_is_the_listener_for_the_very_address_before_one_for_all(self, start, upstream):
        """A listener for all addresses of IPv6 serves IPv4 only where nothing else does."""
        app = upstream(answering(OK))
        with as_user(OTHER_USER, "::", app.port):
            proxy = start()
            assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
            assert status_of(proxy.get("/proxy/[::1]:%d/" % app.port)) == 403

    def test_port_is_reached_where_the_system_does_not_tell_owners(self, tmp_path):
        before = "import socket; del socket.AF_NETLINK\n"
        with as_user(OTHER_USER, "127.0.0.1") as app:
            with proxy_elsewhere(before=before, command=with_proc(tmp_path)) as (_, port):
                assert status_of(ask_port(port, "/proxy/%d/" % app)) == 200


@contextlib.contextmanager
def as_user(user, host, port=0):
    """A server that another user runs; its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN_AS, str(user), host, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def with_proc(folder):
    """The command that shows a program this folder in place of /proc."""
    return unshared("-m") + ["sh", "-c", 'mount --bind "$0" /proc && exec "$@"', str(folder)]


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------

NAVIGATION = ("Accept: text/html,application/xhtml+xml,*/*;q=0.8", "Sec-Fetch-Mode: navigate")


def without_tags(page):
    return re.sub(b"<[^>]*>", b"", page)


def digest_of(pattern, page):
    """The digest, as a Content-Security-Policy spells it, of the part of a page that matches."""
    part = re.search(pattern, page, re.S).group(1)
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(part).digest()).decode()


class Proc:
    """What a system tells of its ports in /proc: made by hand, so that it is known and holds still."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = {"tcp": [], "tcp6": []}
        (folder / "net").mkdir()
        self.write()

    def write(self):
        uptime = 10000000.0
        (self.folder / "uptime").write_text("%.2f %.2f\n" % (uptime, uptime))
        (self.folder / "stat").write_text("btime %d\n" % (time.time() - uptime))
        for name, rows in self.rows.items():
            (self.folder / "net" / name).write_text("  sl  local_address\n" + "".join(rows))

    def add(self, port, *addresses, pid=None, words=("app",), age=None):
        """A program of ours that listens at these addresses on a port."""
        pid = pid or 100 + len(self.rows["tcp"] + self.rows["tcp6"])
        process = self.folder / str(pid)
        (process / "fd").mkdir(parents=True)
        (process / "cmdline").write_text("".join(word + "\0" for word in words))
        for number, address in enumerate(addresses or ("127.0.0.1",)):
            name = "tcp6" if ":" in address else "tcp"
            packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            words_of_address = struct.unpack("=%dI" % (len(packed) // 4), packed)
            here = "".join("%08X" % word for word in words_of_address)
            inode = 1000 * pid + number
            self.rows[name].append(
                "%4d: %s:%04X %s:0000 0A 00000000:00000000 00:00000000 00000000 %5d        0 %d 1 0 100 0 0 10 0\n"
                % (number, here, port, "0" * len(here), os.geteuid(), inode)
            )
            (process / "fd" / str(3 + number)).symlink_to("socket:[%d]" % inode)
        self.write()
        if age is not None:
            self.start(pid, age)

    def start(self, pid, age):
        """Say that a process was started `age` seconds ago."""
        ticks = int((10000000.0 - age) * os.sysconf("SC_CLK_TCK"))
        self.write()
        (self.folder / str(pid) / "stat").write_text("%d (a) b) S %s%d 0 0\n" % (pid, "0 " * 18, ticks))

    def shown(self, **options):
        """A proxy that is told this, as `proxy_elsewhere`."""
        return proxy_elsewhere(command=with_proc(self.folder), **options)


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


def ports_told(raw):
    """The answer at the base as data, by port."""
    return {one["port"]: one for one in json.loads(raw[2].decode())["ports"]}


JSON = "Accept: application/json"


class TestPages:
    @pytest.mark.parametrize(
        "method, lines, is_html",
        [
            ("GET", ("Accept: text/html, */*",), True),
            ("GET", ("Accept: text/html", "Sec-Fetch-Mode: navigate"), True),
            ("GET", ("Accept: text/html", "Sec-Fetch-Mode: cors"), False),
            ("GET", ("Accept: */*",), False),
            ("GET", (), False),
            ("PUT", ("Accept: text/html",), False),
            ("POST", ("Accept: text/html", "Sec-Fetch-Mode: navigate"), True),
        ],
    )
    def test_error_is_html_for_a_navigation_alone(self, proxy, method, lines, is_html):
        answer = proxy.ask(request(method, "/nothing", *lines))
        kind = "text/html" if is_html else "text/plain"
        assert (status_of(answer), fields_of(answer)["content-type"]) == (404, kind + "; charset=utf-8")

    def test_error_page_runs_and_loads_nothing(self, start):
        """CVE-2024-35225: what a page says is text, whatever it says."""

        async def refuse(head, visit, route):
            raise ProxyError(502, "<script>alert(1)</script>&. Start it with --any-owner.")

        page = start(authorize=refuse).get("/proxy/80/", *NAVIGATION)
        fields = fields_of(page)
        assert status_of(page) == 502
        assert b"<script" not in page[2]
        assert b"&lt;script&gt;alert(1)&lt;/script&gt;&amp;." in page[2]
        assert b'<code class="option">--any-owner</code>' in page[2]
        assert fields["content-type"] == "text/html; charset=utf-8"
        assert fields["x-content-type-options"] == "nosniff"
        policy = fields["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'none'" in policy
        assert "style-src " + digest_of(b"<style>(.*)</style>", page[2]) in policy

    @pytest.mark.parametrize("lines", [(), NAVIGATION], ids=["text", "page"])
    @pytest.mark.parametrize("target", ["/EVIL", "/proxy/EVIL", "/proxy/1/../EVIL", "/proxy/1?EVIL", "/proxy/EVIL:80/"])
    def test_answer_reflects_nothing_of_the_request(self, proxy, target, lines):
        assert b"<script" not in proxy.get(target.replace("EVIL", "<script>alert(1)</script>"), *lines)[2]

    @pytest.mark.parametrize("lines, kind", [((), "text/plain"), (NAVIGATION, "text/html")])
    @pytest.mark.parametrize("target", ["/proxy", "/proxy/"])
    def test_answer_at_the_base_names_the_forms_of_an_address(self, proxy, target, lines, kind):
        answer = proxy.get(target, *lines)
        assert (status_of(answer), fields_of(answer)["content-type"]) == (200, kind + "; charset=utf-8")
        for form in (b"/proxy/8080/", b"/proxy/absolute/8080/", b"/proxy/db1.example.org:8080/"):
            assert form in answer[2]

    def test_post_to_the_base_is_a_405(self, proxy):
        assert status_of(proxy.ask(request("POST", "/proxy/", "Content-Length: 0"))) == 405

    def test_page_says_that_no_port_is_in_use(self, proc):
        with proc.shown() as (_, port):
            page = ask_port(port, "/proxy/", *NAVIGATION)[2]
            assert b"No program of yours listens on a port." in page
            assert b'name="port"' in page
            assert ports_told(ask_port(port, "/proxy/", JSON)) == {}

    def test_page_says_that_the_system_does_not_tell_ports(self, tmp_path):
        with proxy_elsewhere(command=with_proc(tmp_path)) as (_, port):
            page = ask_port(port, "/proxy/", *NAVIGATION)[2]
            assert b"This system does not tell which ports are in use." in page
            assert b'name="port"' in page

    def test_ports_are_told_as_data(self, proc, upstream):
        """Each with its program, the title of its page, its age and the ways to it."""
        app = upstream(answering(titled("&lt;i&gt;t&lt;/i&gt;")))
        proc.add(app.port, "127.0.0.1", pid=7, words=("<b>app", "--secret"), age=7300)
        proc.add(70, pid=8)  # The system's own ports are left out.
        proc.add(8081, "192.0.2.7", "::1", pid=9)
        with proc.shown(host_allowlist=("db",)) as (_, port):
            proc.add(port, pid=10)  # So is the proxy's.
            ask_port(port, "/proxy/%d/" % app.port, *NAVIGATION)
            with Wire.to(port) as wire:
                wire.send(at("localhost:8888", "GET", "/proxy/", JSON), at("a.example", "GET", "/proxy/", JSON))
                told, elsewhere = ports_told(wire.message()), ports_told(wire.message())
        assert sorted(told) == sorted([8081, app.port])
        first, second = told[app.port], told[8081]
        below = {"stripped": "/proxy/%d/" % app.port, "absolute": "/proxy/absolute/%d/" % app.port}
        assert 7300 <= first["seconds"] < 7300 + 2 * WAIT
        assert first == {
            "port": app.port,
            "addresses": ["127.0.0.1"],
            "program": "<b>app",
            "pid": 7,
            "seconds": first["seconds"],
            "title": "<i>t</i>",
            "links": dict(below, host="http://%d.localhost:8888/" % app.port),
        }
        assert (second["addresses"], second["seconds"], second["title"]) == (["192.0.2.7", "::1"], None, None)
        assert elsewhere[app.port]["links"] == below

    def test_ports_are_shown_as_a_page(self, proc, upstream):
        """What an app says of itself is text there."""
        app = upstream(answering(titled("&lt;i&gt;t&lt;/i&gt;")))
        proc.add(app.port, words=("<b>app",), age=7300)
        proc.add(8081, "192.0.2.7")
        with proc.shown() as (_, port):
            ask_port(port, "/proxy/%d/" % app.port, *NAVIGATION)
            with Wire.to(port) as wire:
                wire.send(at("localhost:8888", "GET", "/proxy/", *NAVIGATION))
                page = wire.message()[2].decode()
                wire.send(at("localhost:8888", "GET", "/proxy/?list", "Accept: */*"))
                items = wire.message()[2].decode()
        for part in (
            '<a class="port" href="http://{0}.localhost:8888/">{0}</a>&lt;i&gt;t&lt;/i&gt;'.format(app.port),
            "&lt;b&gt;app \u00b7 2 hours",
            'href="/proxy/%d/"' % app.port,
            'href="/proxy/absolute/%d/"' % app.port,
            "listens at 192.0.2.7 alone, not at localhost",
        ):
            assert part in page
        assert "<b>" not in page
        assert "<i>" not in page
        assert page.count("<li id=") == 2
        assert items.strip() in page
        assert items.count("<li id=") == 2

    def test_link_to_a_ports_own_host_leads_through_the_sign_in(self, proc):
        proc.add(8080)
        with proc.shown(token=TOKEN) as (_, port), Wire.to(port) as wire:
            wire.send(at("localhost:8888", "GET", "/proxy/", JSON, "Authorization: token " + TOKEN))
            assert ports_told(wire.message())[8080]["links"]["host"] == "/proxy/?open=8080"

    def test_ports_are_shown_as_text_with_their_age(self, proc):
        ages = {
            8000: (0, "just started"),
            8001: (-1000, "just started"),  # The clock was set back.
            8002: (80, "1 minute"),
            8003: (3550, "59 minutes"),
            8004: (3610, "1 hour"),
            8005: (7300, "2 hours"),
            8006: (90000, "1 day"),
            8007: (180000, "2 days"),
        }
        for port, (age, _) in ages.items():
            proc.add(port, words=("app%d" % port,), age=age)
        with proc.shown() as (_, port):
            text = ask_port(port, "/proxy/")[2].decode()
        for port, (_, said) in ages.items():
            assert re.search("(?m)^/proxy/{0}/ +app{0} \u00b7 {1}$".format(port, said), text)

    @pytest.mark.parametrize(
        "port, location",
        [
            ("8080", "/proxy/8080/"),
            ("+8080+", "/proxy/8080/"),
            ("db:80", "/proxy/db:80/"),
            ("absolute/80", "/proxy/absolute/80/"),
            ("80/x?y", "/proxy/80/"),
            ("80/x%0D%0Aa:b", None),
            ("80%0D%0Aa:b", None),
            ("a", None),
            ("//evil", None),
            ("99999", None),
        ],
    )
    def test_port_that_is_typed_into_the_page_is_opened(self, proxy, port, location):
        answer = proxy.get("/proxy/?port=" + port, *NAVIGATION)
        expected = (303, location) if location else (404, None)
        assert (status_of(answer), fields_of(answer).get("location")) == expected

    @needs_proc
    @pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
    @pytest.mark.parametrize(
        "fields, body, title",
        [
            ("Content-Type: text/html", b"<html><TITLE class=a> My\n app &amp; more </TITLE>", "My app & more"),
            ("Content-Type: text/html; charset=utf-8", "<title>\u00e4</title>".encode(), "\u00e4"),
            (
                "Content-Type: text/html\r\nContent-Encoding: gzip",
                gzip.compress(b"<title>packed</title>" + bytes(range(256)) * 2000),
                "packed",
            ),
            ("Content-Type: text/html\r\nContent-Encoding: gzip", b"no gzip", None),
            ("Content-Type: text/html\r\nContent-Encoding: br", b"<title>a</title>", None),
            ("Content-Type: text/plain", b"<title>a</title>", None),
            ("Content-Type: text/html", b"<title>never closed", None),
            ("Content-Type: text/html", b"<title>" + b"x" * 300 + b"</title>", "x" * 100),
            ("Content-Type: text/html", b"", None),
        ],
        ids=case_id,
    )
    def test_title_of_a_page_that_was_visited_is_told(self, proxy, upstream, fields, body, title, in_pieces):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            head = ("HTTP/1.1 200 OK\r\n%s\r\nContent-Length: %d\r\n\r\n" % (fields, len(body))).encode()
            if in_pieces:  # The body follows when the client has the head.
                wire.send(head)
                app.let_go.wait(WAIT)
                wire.send(body)
            else:
                wire.send(head + body)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *NAVIGATION))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
            app.let_go.set()
            assert wire.exactly(len(body)) == body
            wire.send(request("GET", "/proxy/", JSON))
            assert ports_told(wire.message())[app.port]["title"] == title

    def test_title_is_forgotten_when_another_program_has_started_since(self, proc, upstream):
        app = upstream(answering(titled("first")))
        proc.add(app.port, pid=7, age=60)

        def title():
            return ports_told(ask_port(port, "/proxy/", JSON))[app.port]["title"]

        with proc.shown() as (_, port):
            ask_port(port, "/proxy/%d/" % app.port, *NAVIGATION)
            assert title() == "first"
            proc.start(7, age=-60)
            eventually(lambda: title() is None)

    def test_page_visit_where_nothing_listens_gets_a_page_that_waits(self, proxy):
        with closed_port() as port:
            page = proxy.get("/proxy/%d/" % port, *NAVIGATION)
        fields = fields_of(page)
        assert (status_of(page), fields["port-proxy"], fields["retry-after"]) == (502, "waiting", "2")
        assert fields["cache-control"] == "no-store"
        assert b"Nothing listens on port %d of this machine" % port in page[2]
        assert b"--check %d" % port in page[2]
        assert "script-src " + digest_of(b"<script>(.*)</script>", page[2]) in fields["content-security-policy"]

    @pytest.mark.parametrize(
        "method, lines",
        [
            ("GET", ()),
            ("POST", NAVIGATION + ("Content-Length: 0",)),
            ("GET", HANDSHAKE),
            ("GET", ("Accept: text/html", "Sec-Fetch-Mode: cors")),
        ],
    )
    def test_other_request_where_nothing_listens_gets_no_page_that_waits(self, proxy, method, lines):
        with closed_port() as port:
            answer = proxy.ask(request(method, "/proxy/%d/" % port, *lines))
        assert (status_of(answer), fields_of(answer)["retry-after"], b"<script" in answer[2]) == (502, "2", False)

    @needs_proc
    @pytest.mark.parametrize("lines", [(), NAVIGATION], ids=["text", "page"])
    def test_app_that_listens_on_another_address_alone_is_told(self, proxy, upstream, lines):
        app = upstream(answering(OK), host="127.0.0.2")
        said = without_tags(proxy.get("/proxy/%d/" % app.port, *lines)[2])
        assert b"listens at 127.0.0.2 alone, not at localhost" in said
        assert b"--host-allowlist 127.0.0.2" in said

    @pytest.mark.parametrize(
        "addresses, asked, says",
        [
            (
                ["127.0.0.1"],
                "[::1]:%d",
                "The app on port {0} listens at 127.0.0.1 alone, not at ::1. Open {0} in place of [::1]:{0}.",
            ),
            (
                ["127.0.0.2", "::1"],
                "127.0.0.1:%d",
                "The app on port {0} listens at 127.0.0.2 and ::1 alone, not at 127.0.0.1."
                " Open {0} in place of 127.0.0.1:{0}.",
            ),
            (
                ["2001:db8::7"],
                "%d",
                " with --host-allowlist 2001:db8::7, and open [2001:db8::7]:{0} in place of {0}.",
            ),
        ],
    )
    def test_address_that_an_app_listens_on_is_told_as_it_is_opened(self, proc, addresses, asked, says):
        with closed_port() as app:
            proc.add(app, *addresses)
            with proc.shown() as (_, port):
                answer = ask_port(port, "/proxy/%s/" % (asked % app))
        if b"No connection to" in answer[2]:
            pytest.skip("this machine has no IPv6 loopback")
        assert says.format(app) in answer[2].decode()

    @pytest.mark.parametrize(
        "is_curt, lines, is_told",
        [(False, (), True), (False, NAVIGATION, True), (True, NAVIGATION, True), (True, (), False)],
    )
    def test_app_that_speaks_tls_is_told(self, proxy, upstream, is_curt, lines, is_told):
        """It is known by what it sends; where it only closes, the proxy tries TLS itself, for a page visit alone."""
        alert, hello = b"\x15\x03\x01\x00\x02\x02\x46", b"\x16\x03\x03\x00\x7a\x02"

        def serve(wire, app):
            first = wire.more() and wire.buffer[:1]
            wire.send(hello if first == b"\x16" else b"" if is_curt else alert)

        app = upstream(serve)
        answer = proxy.get("/proxy/%d/" % app.port, *lines)
        said = without_tags(answer[2])
        assert status_of(answer) == 502
        assert (b"speaks TLS. Start the proxy with --upstream-tls %d" % app.port in said) is is_told
        perhaps = b"without a response. If it speaks TLS, start the proxy with --upstream-tls %d." % app.port
        assert (perhaps in said) is not is_told

    def test_app_that_only_closes_is_not_said_to_speak_tls(self, proxy, upstream):
        app = upstream(lambda wire, app: wire.more())
        assert b"--upstream-tls" not in proxy.get("/proxy/%d/" % app.port, *NAVIGATION)[2]

    def test_answer_to_head_has_no_body(self, proxy):
        with proxy.wire() as wire:
            wire.send(request("HEAD", "/proxy/"), request("HEAD", "/nothing"), request("GET", "/proxy/"))
            assert status_of(wire.message(no_body=True)) == 200
            assert status_of(wire.message(no_body=True)) == 404
            assert wire.message()[2]


def titled(title):
    """A page with a title, as a response."""
    body = b"<title>%s</title>" % title.encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


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
            head = b"HTTP/1.1 %d Because\r\nX-JupyterHub-Version: 6.1.0\r\nContent-Length: %d\r\n\r\n"
            wire.send(head % (status, len(body)), body)

    def answer(self, message):
        method, path, _ = message[0].split(" ")
        if (method, path) == ("GET", "/hub/api/user"):
            user = self.users.get(fields_of(message)["authorization"][len("token ") :])
            return (200, user) if user else (403, {"message": "no"})
        if (method, path) == ("POST", "/hub/api/oauth2/token"):
            form = dict(parse_qsl(message[2].decode()))
            token, challenge = self.codes.pop(form["code"], ("", ""))
            digest = hashlib.sha256(form["code_verifier"].encode()).digest()
            is_buyer = base64.urlsafe_b64encode(digest).decode().rstrip("=") == challenge
            is_client = (form["client_id"], form["client_secret"]) == ("jupyterhub-user-al%40ice", "server-token")
            return (200, {"access_token": token}) if is_buyer and is_client else (400, {"error": "invalid_grant"})
        return (200, {"version": "6.1.0"})

    def questions(self, path):
        return [message for message in self.asked if message[0].split(" ")[1] == path]

    def reports(self, path):
        """The moments of activity that were reported there."""
        return [json.loads(message[2].decode())["last_activity"] for message in self.questions(path)]


OWNER = {"kind": "user", "name": "al@ice.x+y", "scopes": ["access:servers!server=al@ice.x+y/", "read:users:name!user"]}
STRANGER = {"kind": "user", "name": "mallory", "scopes": ["access:servers!user=mallory"]}
ADMIN = {"kind": "user", "name": "boss", "scopes": ["access:servers", "admin:users"]}

CLOCK_THAT_JUMPS = """\
import signal, time
shift, monotonic, wall = 0.0, time.monotonic, time.time
def jump(*_):
    global shift
    shift += %d
    print(flush=True)
time.monotonic, time.time = (lambda: monotonic() + shift), (lambda: wall() + shift)
signal.signal(signal.SIGUSR1, jump)
"""


class LaterProxy:
    """A proxy in a process of its own, whose clock can be set forward."""

    def __init__(self, process, port):
        self.process, self.port = process, port

    def get(self, target, *lines):
        return ask_port(self.port, target, *lines)

    def jump(self):
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout.readline() == b"\n"


def new_cookies(answer):
    """The Set-Cookie fields of an answer that do not delete a cookie."""
    return [value for name, value in answer[1] if name == "Set-Cookie" and "Max-Age=0" not in value]


class TestHub:
    @pytest.fixture
    def hub(self, upstream):
        hub = HubBehindWire()
        hub.port = upstream(hub).port
        hub.users = {
            "owner-token": OWNER,
            "stranger-token": STRANGER,
            "admin-token": ADMIN,
            "server-token": OWNER,
        }
        return hub

    @pytest.fixture
    def options(self, hub):
        """What a proxy under this Hub is told."""

        def options(**of_hub):
            told = Hub(
                prefix=PREFIX,
                user="al@ice.x+y",
                api_url="http://127.0.0.1:%d/hub/api" % hub.port,
                api_token="server-token",
                client_id="jupyterhub-user-al%40ice",
                authorize_url="/jh/hub/api/oauth2/authorize",
                callback_url=PREFIX + "/oauth_callback",
                access_scopes=frozenset(["access:servers!server=al@ice.x+y/", "access:servers!user=al@ice.x+y"]),
            )
            return {
                "base": PREFIX + "/proxy",
                "hub": told._replace(**of_hub),
                "token": "",
                "trusted_proxies": ["127.0.0.1"],
                "allow_hostnames": (),
                "shutdown_timeout": 0.3,
            }

        return options

    @pytest.fixture
    def begin(self, start, options):
        return lambda **of_hub: start(**options(**of_hub))

    @pytest.fixture
    def proxy(self, begin):
        return begin()

    @pytest.fixture
    def later(self, options):
        """Start a proxy whose clock jumps forward by so many seconds."""
        with contextlib.ExitStack() as opened:

            def begin(seconds):
                running = proxy_elsewhere(before=CLOCK_THAT_JUMPS % seconds, **options())
                return LaterProxy(*opened.enter_context(running))

            yield begin

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
        """The Cookie field of a browser that has signed in; the last cookie in it is the proxy's."""
        asked, cookie = self.sent_to_hub(proxy, target)
        lines = "%s; jupyterhub-session-id=%s" % (cookie, session)
        answer = self.come_back(proxy, hub, asked, lines, token=token)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, target)
        return "Cookie: jupyterhub-session-id=%s; %s" % (session, new_cookies(answer)[0].split(";")[0])

    def name_of_cookie(self, proxy, hub):
        """What the proxy calls the cookie of those who are signed in."""
        return self.sign_in(proxy, hub).split("; ")[-1].split("=")[0]

    def test_readiness_is_told_to_anyone_with_the_hubs_version(self, proxy, hub):
        """The Hub itself asks, which is not signed in; the version is looked up once."""
        for target in (PREFIX + "/api", PREFIX + "/api/", "/jh/user/al%40ice.x+y/api"):
            answer = proxy.get(target)
            assert (status_of(answer), fields_of(answer)["x-jupyterhub-version"]) == (200, "6.1.0")
        assert len(hub.asked) == 1

    def test_readiness_is_told_while_the_hub_fails(self, begin, upstream):
        """It is not asked again at once."""
        broken = upstream(once(b"HTTP/1.1 500 No\r\n\r\n"))
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % broken.port)
        for _ in range(5):
            answer = proxy.get(PREFIX + "/api")
            assert (status_of(answer), "x-jupyterhub-version" in fields_of(answer)) == (200, False)
        assert broken.connections == 1

    def test_page_visit_is_sent_to_the_hub_to_sign_in(self, proxy, hub, app):
        asked, cookie = self.sent_to_hub(proxy, "%s/proxy/%d/" % (PREFIX, app.port))
        assert (asked["client_id"], asked["response_type"]) == ("jupyterhub-user-al%40ice", "code")
        assert asked["redirect_uri"] == PREFIX + "/oauth_callback"
        assert (asked["code_challenge_method"], len(asked["state"]) >= 22) == ("S256", True)
        assert asked["state"] not in cookie

    def test_sign_in_leads_to_the_page_with_a_session_cookie(self, proxy, hub, app):
        target = "%s/proxy/%d/a?b=%%2F&c" % (PREFIX, app.port)
        asked, cookie = self.sent_to_hub(proxy, target)
        answer = self.come_back(proxy, hub, asked, cookie)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, target)
        form = dict(parse_qsl(hub.questions("/hub/api/oauth2/token")[0][2].decode()))
        assert form["redirect_uri"] == PREFIX + "/oauth_callback"
        (session,) = new_cookies(answer)
        attributes = {part.strip() for part in session.split(";")[1:]}
        assert attributes == {"Path=%s/" % PREFIX, "HttpOnly", "SameSite=Lax"}
        assert "owner-token" not in repr(answer)
        deleted = next(value for name, value in answer[1] if name == "Set-Cookie" and "Max-Age=0" in value)
        assert deleted.split("=")[0] == cookie[len("Cookie: ") :].split("=")[0]
        others = "jupyterhub-session-id=x; __Host-jupyterhub-user=y"
        line = "Cookie: a=b; %s; %s; c=d" % (session.split(";")[0], others)
        assert status_of(proxy.get(target, line)) == 200
        assert fields_of(app.messages[-1])["cookie"] == "a=b; c=d"

    def test_login_counts_once(self, proxy, hub):
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        assert status_of(self.come_back(proxy, hub, asked, cookie)) == 302
        again = self.come_back(proxy, hub, asked, cookie)
        assert (status_of(again), b"This sign-in is over" in again[2]) == (403, True)

    @pytest.mark.parametrize("shown", ["", "Cookie: %s=wrong", "Cookie: %s=", "Cookie: other=%s", "Cookie: %s=\xe9"])
    def test_login_of_another_browser_is_refused(self, proxy, hub, shown):
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        lines = (shown.replace("%s", cookie[len("Cookie: ") :].split("=")[0]),) if shown else ()
        answer = self.come_back(proxy, hub, asked, *lines)
        assert (status_of(answer), b"another browser" in answer[2]) == (403, True)
        assert hub.questions("/hub/api/oauth2/token") == []

    @pytest.mark.parametrize("seconds, status", [(540, 302), (601, 403)])
    def test_login_is_over_after_ten_minutes(self, later, hub, seconds, status):
        proxy = later(seconds)
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        proxy.jump()
        assert status_of(self.come_back(proxy, hub, asked, cookie)) == status

    def test_cookie_of_a_login_is_kept_for_ten_minutes(self, proxy):
        assert "; Max-Age=600" in fields_of(proxy.get(PREFIX + "/proxy/", *PAGE))["set-cookie"]

    @pytest.mark.parametrize(
        "query, says",
        [
            ("state=%s&error=access_denied", b"did not sign you in: access_denied."),
            ("state=%s&error=<b>", b"no reason given"),
            ("state=%s", b"no reason given"),
            ("state=%s&code=wrong", b"did not take this sign-in for valid"),
            ("state=x&code=a", b"is over"),
            ("code=a", b"is over"),
            ("", b"is over"),
        ],
    )
    def test_login_that_fails_is_a_403_with_the_reason(self, proxy, query, says):
        asked, cookie = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        target = "%s/oauth_callback?%s" % (PREFIX, query.replace("%s", asked["state"]))
        answer = proxy.get(target, cookie, *PAGE)
        assert status_of(answer) == 403
        assert says in answer[2]
        assert PREFIX.encode() + b"/ again" in answer[2]

    @pytest.mark.parametrize(
        "target, leads_to",
        [
            (PREFIX + "/proxy/80", PREFIX + "/proxy/80"),
            ("/jh/user/al%40ice.x+y/proxy/80/?a", PREFIX + "/proxy/80/?a"),
            ("/j%68/user/al@ice.x+y", PREFIX + "/"),
            (PREFIX + "/proxy/80/" + "a" * 5000, PREFIX + "/"),
            (PREFIX + "/proxy/80/\\x", PREFIX + "/"),
            (PREFIX + "/", PREFIX + "/"),
        ],
        ids=case_id,
    )
    def test_login_leads_below_the_path_of_the_cookie(self, proxy, hub, target, leads_to):
        """A browser that is led to another spelling of the prefix would have to sign in for ever."""
        asked, cookie = self.sent_to_hub(proxy, target)
        assert fields_of(self.come_back(proxy, hub, asked, cookie))["location"] == leads_to

    @pytest.mark.parametrize(
        "target",
        ["//evil.example/proxy/80/", "/jh/user/mallory/proxy/80/", "/proxy/80/", "/", "/jh/user/al@ice.x%2By2/"],
    )
    def test_path_outside_of_the_prefix_is_a_404(self, proxy, target):
        assert status_of(proxy.get(target, *PAGE)) == 404

    @pytest.mark.parametrize(
        "method, lines",
        [
            ("POST", PAGE),
            ("PUT", ()),
            ("GET", ()),
            ("GET", ("Accept: text/html", "Sec-Fetch-Mode: cors")),
            ("GET", PAGE + HANDSHAKE),
            ("OPTIONS", PAGE),
            ("PROPFIND", PAGE),
        ],
    )
    def test_request_that_is_no_page_visit_is_a_403(self, proxy, app, method, lines):
        assert status_of(proxy.ask(request(method, "%s/proxy/%d/" % (PREFIX, app.port), *lines))) == 403
        assert app.connections == 0

    def test_head_of_a_page_is_sent_to_the_hub(self, proxy, app):
        raw = request("HEAD", "%s/proxy/%d/" % (PREFIX, app.port), *PAGE)
        assert status_of(proxy.ask(raw, no_body=True)) == 302
        assert app.connections == 0

    @pytest.mark.parametrize(
        "token, status",
        [("owner-token", 200), ("admin-token", 200), ("server-token", 200), ("stranger-token", 403), ("unknown", 403)],
    )
    def test_token_of_the_hub_lets_in_whom_the_hub_gave_access(self, proxy, app, hub, token, status):
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        for query, lines in (
            ("", ("Authorization: token " + token,)),
            ("", ("Authorization: Bearer " + token,)),
            ("?a&token=%s&b" % token, ()),
        ):
            assert status_of(proxy.get(target + query, *lines)) == status
        reached = ["GET / HTTP/1.1", "GET / HTTP/1.1", "GET /?a&b HTTP/1.1"] if status == 200 else []
        assert [message[0] for message in app.messages] == reached
        assert token not in repr(app.messages)
        assert len(hub.asked) == 1  # What the Hub said is believed for a minute.

    @pytest.mark.parametrize("seconds, questions", [(20, 1), (61, 2)])
    def test_what_the_hub_says_is_believed_for_a_minute(self, later, hub, seconds, questions):
        proxy = later(seconds)
        line = "Authorization: token owner-token"
        assert status_of(proxy.get(PREFIX + "/proxy/", line)) == 200
        proxy.jump()
        assert status_of(proxy.get(PREFIX + "/proxy/", line)) == 200
        assert len(hub.asked) == questions

    def test_login_of_a_user_without_access_is_a_403(self, proxy, hub, app):
        asked, cookie = self.sent_to_hub(proxy, "%s/proxy/%d/" % (PREFIX, app.port))
        answer = self.come_back(proxy, hub, asked, cookie, token="stranger-token")
        assert status_of(answer) == 403
        assert b"signed in as mallory" in answer[2]
        assert b"that of al@ice.x+y" in answer[2]
        assert "set-cookie" not in fields_of(answer)
        assert app.connections == 0

    def test_access_that_is_taken_away_is_lost_when_the_hub_is_asked_again(self, proxy, hub):
        """A new Hub session makes the proxy ask at once."""
        cookie = self.sign_in(proxy, hub)
        hub.users["owner-token"] = dict(OWNER, scopes=[])
        assert status_of(proxy.get(PREFIX + "/proxy/", cookie, *PAGE)) == 200
        answer = proxy.get(PREFIX + "/proxy/", cookie.replace("-id=a", "-id=b"), *PAGE)
        assert (status_of(answer), b"no access to this server" in answer[2]) == (403, True)

    def test_token_in_the_address_signs_a_browser_in(self, proxy, app):
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        answer = proxy.get(target + "a?b&token=owner-token&c", *PAGE)
        assert (status_of(answer), fields_of(answer)["location"]) == (302, target + "a?b&c")
        assert status_of(proxy.get(target, cookie_of(answer))) == 200

    def test_token_of_an_app_in_the_address_reaches_the_app(self, proxy, hub, app):
        target = "%s/proxy/%d/a?b&token=apps-own&c" % (PREFIX, app.port)
        assert status_of(proxy.get(target, self.sign_in(proxy, hub), *PAGE)) == 200
        assert app.messages[-1][0] == "GET /a?b&token=apps-own&c HTTP/1.1"

    def test_token_in_the_address_does_not_replace_who_is_signed_in(self, proxy, hub):
        answer = proxy.get(PREFIX + "/proxy/?token=admin-token", self.sign_in(proxy, hub), *PAGE)
        assert (status_of(answer), "set-cookie" in fields_of(answer)) == (302, False)

    def test_token_in_a_link_of_another_site_does_not_sign_in(self, proxy):
        answer = proxy.get(PREFIX + "/proxy/?token=admin-token", "Sec-Fetch-Site: cross-site", *PAGE)
        assert fields_of(answer)["location"].startswith("/jh/hub/api/oauth2/authorize?")

    def test_session_of_a_token_is_over_with_that_of_the_hub(self, proxy, hub, app):
        """Though the Hub still knows the token."""
        hub_cookie = "Cookie: jupyterhub-session-id=a"
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        cookie = cookie_of(proxy.get(target + "?token=owner-token", hub_cookie, *PAGE))[len("Cookie: ") :]
        assert status_of(proxy.get(target, hub_cookie + "; " + cookie)) == 200
        assert status_of(proxy.get(target, "Cookie: " + cookie)) == 403
        assert status_of(proxy.get(target, hub_cookie + "; " + cookie)) == 403

    def test_token_of_the_hub_never_reaches_the_app(self, proxy, hub, app):
        """Also where another one let the request in."""
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        proxy.get(
            target + "?token=owner-token&token=apps-own&token=admin-token",
            "Authorization: token server-token",
            "Referer: http://here:8888%s?token=stranger-token&x" % target,
        )
        assert app.messages[-1][0] == "GET /?token=apps-own HTTP/1.1"
        assert "authorization" not in fields_of(app.messages[-1])
        assert fields_of(app.messages[-1])["referer"] == "http://localhost:%d/?x" % app.port

    @pytest.mark.parametrize(
        "value, arrives",
        [
            ("Bearer apps-own", "Bearer apps-own"),
            ("Basic YTpi", "Basic YTpi"),
            ("token owner-token", None),
            ("token admin-token", None),
            ("token server-token", None),
        ],
    )
    def test_authorization_for_the_app_alone_reaches_it(self, proxy, hub, app, value, arrives):
        line = "Authorization: " + value
        assert status_of(proxy.get("%s/proxy/%d/" % (PREFIX, app.port), self.sign_in(proxy, hub), line)) == 200
        assert fields_of(app.messages[-1]).get("authorization") == arrives
        assert "cookie" not in fields_of(app.messages[-1])

    def test_token_in_a_referer_does_not_reach_the_app(self, proxy, hub, app):
        target = "%s/proxy/%d/" % (PREFIX, app.port)
        referer = "Referer: http://here:8888%s?token=owner-token&a" % target
        assert status_of(proxy.get(target, self.sign_in(proxy, hub), referer)) == 200
        assert fields_of(app.messages[-1])["referer"] == "http://localhost:%d/?a" % app.port

    def test_app_cannot_set_cookies_of_the_hub_and_the_proxy(self, proxy, hub, upstream):
        names = ("jupyterhub-session-id", "__Host-jupyterhub-user", self.name_of_cookie(proxy, hub), "own")
        fields = b"".join(b"Set-Cookie: %s=x; Path=/\r\n" % name.encode() for name in names)
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + fields + b"\r\n"))
        answer = proxy.get("%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token")
        assert [value.split("=")[0] for value in new_cookies(answer)] == ["own"]

    def test_session_is_over_when_its_browser_signed_out_of_the_hub(self, proxy, hub, app):
        """The Hub then forgets the token, and takes its own cookie back, which alone makes the proxy ask anew."""
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
        assert status_of(proxy.get(target, cookie)) == 403  # The session is gone for good.

    def test_requests_on_one_connection_are_authenticated_one_by_one(self, proxy, hub, app):
        """The Hub's front proxy sends the requests of several users on one connection."""
        cookie, target = self.sign_in(proxy, hub), "%s/proxy/%d/" % (PREFIX, app.port)
        with proxy.wire() as wire:
            for lines, status in (
                ((cookie,), 200),
                ((), 403),
                (("Authorization: token stranger-token",), 403),
                ((cookie,), 200),
                (PAGE, 302),
                ((cookie,), 200),
                (HANDSHAKE, 403),
            ):
                wire.send(request("GET", target, *lines))
                assert status_of(wire.message()) == status
            wire.send(request("GET", target, cookie) + request("GET", target) + request("GET", target, cookie))
            assert [status_of(wire.message()) for _ in range(3)] == [200, 403, 200]

    @pytest.mark.parametrize("form", ["{hub}; {name}={value}; {name}=old", "{hub}; {name}=old; {name}={value}"])
    def test_session_cookie_counts_beside_others_of_its_name(self, proxy, hub, form):
        """A cookie of a wider path may stand beside it."""
        of_hub, own = self.sign_in(proxy, hub).split("; ")
        name, value = own.split("=", 1)
        line = form.format(hub=of_hub, name=name, value=value)
        assert status_of(proxy.get(PREFIX + "/proxy/", line)) == 200

    @pytest.mark.parametrize(
        "method, lines, status",
        [
            ("POST", ("Origin: http://evil.example",), 403),
            ("POST", ("Origin: null",), 403),
            ("GET", ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"), 403),
            ("GET", ("Origin: http://evil.example",) + HANDSHAKE, 403),
            ("POST", ("Origin: http://here:8888",), 200),
            ("POST", ("Origin: https://hub.example", "X-Forwarded-Host: hub.example"), 200),
            ("GET", ("Sec-Fetch-Site: cross-site",) + PAGE, 200),
        ],
    )
    def test_cookie_lets_no_request_of_another_site_in(self, proxy, hub, app, method, lines, status):
        cookie = self.sign_in(proxy, hub)
        raw = request(method, "%s/proxy/%d/" % (PREFIX, app.port), cookie, *lines)
        assert status_of(proxy.ask(raw)) == status

    def test_token_lets_a_request_of_another_site_in(self, proxy, hub, app):
        lines = ("Authorization: token owner-token", "Origin: http://evil.example")
        raw = request("POST", "%s/proxy/%d/" % (PREFIX, app.port), *lines)
        assert status_of(proxy.ask(raw)) == 200

    @pytest.mark.parametrize(
        "options_of_hub, forwarded, has, lacks",
        [
            ({}, "https,http", ["Secure", "SameSite=Lax"], []),
            ({}, "http", [], ["Secure"]),
            ({}, "http, https", [], ["Secure"]),
            ({"is_secure": True}, "http", ["Secure"], []),
            ({"host_cookies": True}, "http", ["Secure", "Path=/"], []),
            (
                {"cookie_options": (("SameSite", "None"), ("Partitioned", ""))},
                "https",
                ["SameSite=None", "Partitioned", "Secure"],
                ["SameSite=Lax"],
            ),
        ],
    )
    def test_session_cookie_has_the_attributes_of_its_hub(self, begin, hub, options_of_hub, forwarded, has, lacks):
        proxy = begin(**options_of_hub)
        answer = proxy.get(PREFIX + "/proxy/?token=owner-token", "X-Forwarded-Proto: " + forwarded, *PAGE)
        attributes = [part.strip() for part in fields_of(answer)["set-cookie"].split(";")]
        assert set(has) <= set(attributes)
        assert not set(lacks) & set(attributes)
        assert attributes[0].startswith("__Host-") is bool(options_of_hub.get("host_cookies"))
        assert status_of(proxy.get(PREFIX + "/proxy/", "Cookie: " + attributes[0])) == 200

    @pytest.mark.parametrize(
        "fault",
        [
            b"",
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"name": "bo"}',
            b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        ],
        ids=["silent", "not HTTP", "not JSON", "no name", "no scopes", "500", "list"],
    )
    def test_hub_that_cannot_be_asked_is_a_503(self, begin, upstream, fault):
        """Nobody is sent to a sign-in that cannot succeed, and the next request makes the proxy ask anew."""
        broken = upstream(once(fault))
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % broken.port)
        for count in (1, 2):
            answer = proxy.get(PREFIX + "/proxy/", "Authorization: token some", *PAGE)
            assert (status_of(answer), "retry-after" in fields_of(answer)) == (503, True)
            assert len(broken.messages) == count

    def test_requests_with_the_same_question_wait_for_one_answer(self, begin, upstream):
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
        eventually(lambda: slow.messages and queued(local_port=proxy.port)[1] == 0)
        assert status_of(proxy.get("/elsewhere")) == 404  # It came later, and so all others have been seen.
        wires.pop().reset()  # A client that leaves takes the answer from nobody.
        go.set()
        for wire in wires:
            assert status_of(wire.message()) == 200
            wire.close()
        assert len(slow.messages) == 1

    def test_stop_while_the_hub_is_asked_leaves_nothing(self, begin, upstream):
        """The fixtures see to it that no task, connection or complaint is left."""
        silent = upstream(lambda wire, app: (app.happened.set(), wire.rest()))
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % silent.port)
        with proxy.wire() as wire:
            wire.send(request("GET", PREFIX + "/proxy/", "Authorization: token owner-token"))
            assert silent.happened.wait(WAIT)
            proxy.close()
            assert b"200" not in wire.rest()

    def test_sessions_are_bounded_and_the_oldest_goes(self, proxy, hub):
        """A thousand are remembered."""
        raw, cookies = request("GET", PREFIX + "/proxy/?token=owner-token", *PAGE), []
        with proxy.wire() as wire:
            for _ in range(21):
                wire.send(raw * 50)
                cookies += [cookie_of(wire.message()) for _ in range(50)]
        for at, status in ((0, 403), (49, 403), (50, 200), (1049, 200)):
            assert status_of(proxy.get(PREFIX + "/proxy/", cookies[at])) == status

    def test_login_is_remembered_beside_a_thousand_others(self, proxy, hub):
        """Anybody can begin one, and must not be able to end those of others so easily."""
        login = self.sent_to_hub(proxy, PREFIX + "/proxy/")
        raw = request("HEAD", PREFIX + "/proxy/", "Accept: text/html")
        with proxy.wire() as wire:
            for _ in range(22):
                wire.send(raw * 50)
                answers = [wire.message(no_body=True) for _ in range(50)]
                assert {status_of(answer) for answer in answers} == {302}
        assert status_of(self.come_back(proxy, hub, *login)) == 302

    def test_request_with_many_tokens_makes_few_questions(self, proxy, hub):
        """More than eight different ones are refused, and the same one is asked about once."""

        def asks(different):
            tokens = "&".join("token=%d" % (number % different) for number in range(500))
            return status_of(proxy.get(PREFIX + "/proxy/?" + tokens))

        assert asks(different=9) == 400
        assert hub.asked == []
        assert asks(different=8) == 403
        assert len(hub.asked) == 8

    @pytest.mark.parametrize(
        "token",
        [
            "x%0d%0aX-A:%20b",
            "a%0d%0a%0d%0aDELETE%20/hub/api/users/a%20HTTP/1.1%0d%0aHost:%20h%0d%0a%0d%0a",
            "%E2%82%AC",
            "a%20b",
            "%00",
            "",
        ],
    )
    def test_token_cannot_become_a_request_to_the_hub(self, proxy, hub, app, token):
        """What no token of the Hub can be is the app's own: the Hub is not asked, and the app gets it."""
        target = "%s/proxy/%d/?token=%s" % (PREFIX, app.port, token)
        assert status_of(proxy.get(target)) == 403
        assert hub.asked == []
        assert status_of(proxy.get(target, "Authorization: token owner-token")) == 200
        assert app.messages[-1][0] == "GET /?token=%s HTTP/1.1" % token
        assert [message[0] for message in hub.asked] == ["GET /hub/api/user HTTP/1.1"]

    def test_questions_to_the_hub_are_bounded(self, begin, upstream):
        """It is asked 64 at once; who comes then is refused at once, and leaving clients leave nothing behind."""
        silent = upstream(lambda wire, app: wire.rest())
        proxy = begin(api_url="http://127.0.0.1:%d/hub/api" % silent.port)
        with contextlib.ExitStack() as opened:
            wires = {}
            for number in range(80):
                wire = opened.enter_context(proxy.wire())
                wires[wire.sock] = wire
                wire.send(request("GET", PREFIX + "/proxy/", "Authorization: token %d" % number))
            eventually(lambda: len(select.select(list(wires), [], [], 0)[0]) >= 16)
            refused = select.select(list(wires), [], [], 0)[0]
            assert [status_of(wires[sock].message()) for sock in refused] == [503] * 16
            eventually(lambda: silent.connections >= 64)
            assert silent.connections == 64

    @pytest.mark.parametrize(
        "home, leads_to",
        [
            ("", PREFIX + "/proxy/"),
            (PREFIX + "/proxy/8080", PREFIX + "/proxy/8080"),
            (PREFIX + "/proxy/8080/?a", PREFIX + "/proxy/8080/?a"),
        ],
    )
    def test_prefix_leads_home_who_is_signed_in(self, begin, hub, home, leads_to):
        proxy = begin(home=home)
        cookie = self.sign_in(proxy, hub)
        for target in (PREFIX, PREFIX + "/", "/jh/user/al%40ice.x+y/"):
            answer = proxy.get(target, cookie, *PAGE)
            assert (status_of(answer), fields_of(answer)["location"]) == (302, leads_to)
        assert status_of(proxy.get(PREFIX + "/")) == 403

    def reporting(self, begin, hub, path):
        """A proxy that reports activity there, twenty times a second."""
        return begin(activity_url="http://127.0.0.1:%d%s" % (hub.port, path), activity_interval=0.05)

    def test_request_is_reported_as_activity(self, begin, hub, app):
        path = "/hub/api/users/al%40ice.x%2By/activity"
        proxy = self.reporting(begin, hub, path)
        before = int(time.time())
        assert status_of(proxy.get("%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token")) == 200
        eventually(lambda: hub.reports(path))
        report = hub.questions(path)[0]
        moment = hub.reports(path)[0]
        assert json.loads(report[2].decode()) == {"servers": {"": {"last_activity": moment}}, "last_activity": moment}
        told = calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))
        assert before <= told <= time.time()
        assert fields_of(report)["authorization"] == "token server-token"

    @pytest.mark.parametrize("kind", ["websocket", "upload", "download"])
    def test_bytes_of_a_long_exchange_are_reported_as_activity(self, begin, hub, upstream, kind):
        """There is a second report, though there is no second request."""

        def serve(wire, app):
            app.messages.append(wire.until(b"\r\n\r\n"))
            if kind == "websocket":
                wire.send(SWITCHING)
                while wire.more():
                    wire.send(wire.exactly(len(wire.buffer)))
            elif kind == "download":
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not app.let_go.wait(0.01):
                    wire.send(b"a")
            else:
                wire.rest()

        app = upstream(serve)
        proxy = self.reporting(begin, hub, "/hub/api/activity")
        lines = {"websocket": HANDSHAKE, "upload": ("Content-Length: 1000000",)}.get(kind, ())
        with proxy.wire() as wire:
            wire.send(request("GET", "%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token", *lines))
            if kind == "websocket":
                assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")
            eventually(lambda: hub.reports("/hub/api/activity"))
            first = hub.reports("/hub/api/activity")[0]

            def is_reported_again():
                if kind != "download":
                    wire.send(b"a")
                if kind == "websocket":
                    assert wire.exactly(1) == b"a"
                return hub.reports("/hub/api/activity")[-1] > first

            eventually(is_reported_again)
            app.let_go.set()

    def test_readiness_and_refusals_are_no_activity(self, begin, hub, app):
        """What a proxy that began later has reported shows that the interval is over."""
        idle = self.reporting(begin, hub, "/hub/api/idle")
        assert status_of(idle.get(PREFIX + "/api")) == 200
        assert status_of(idle.get(PREFIX + "/proxy/")) == 403
        busy = self.reporting(begin, hub, "/hub/api/busy")
        assert status_of(busy.get("%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token")) == 200
        eventually(lambda: hub.reports("/hub/api/busy"))
        assert hub.reports("/hub/api/idle") == []

    def test_report_of_activity_that_fails_is_made_again(self, begin, hub, app):
        proxy = self.reporting(begin, hub, "/hub/api/activity")
        hub.broken["/hub/api/activity"] = b"{"
        assert status_of(proxy.get("%s/proxy/%d/" % (PREFIX, app.port), "Authorization: token owner-token")) == 200
        eventually(lambda: len(hub.reports("/hub/api/activity")) > 2)
        failed = hub.reports("/hub/api/activity")
        del hub.broken["/hub/api/activity"]
        eventually(lambda: len(hub.reports("/hub/api/activity")) > len(failed))
        assert hub.reports("/hub/api/activity")[-1] == failed[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Exchange
# ---------------------------------------------------------------------------------------------------------------------


def once(answer):
    """Serve one request with `answer` and close."""

    def serve(wire, app):
        app.messages.append(wire.message())
        wire.send(answer)

    return serve


def slow_wire(proxy):
    """A connection on which the kernel holds little for either end; the proxy's end has been accepted."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(WAIT)
    sock.connect(("127.0.0.1", proxy.port))
    wire = Wire(sock)
    wire.send(request("GET", "/proxy/"))
    wire.message()
    narrow(sock.getsockname()[1])
    return wire


def outlast_keep_alive(proxy):
    """Wait until connections that began to idle after this call have been closed: whatever idled before is overdue."""
    for _ in range(2):
        with proxy.wire() as wire:
            assert wire.rest() == b""


@contextlib.contextmanager
def busy_download(proxy, upstream):
    """A client takes as fast as it can what an app sends without an end."""

    def serve(wire, app):
        wire.message()
        wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            while not app.let_go.is_set():
                wire.send(bytes(1 << 18))

    app, taken, stop = upstream(serve), threading.Event(), threading.Event()
    with proxy.wire() as wire:
        wire.send(request("GET", "/proxy/%d/" % app.port))

        def take():
            while not stop.is_set() and wire.sock.recv(1 << 18):
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        try:
            assert taken.wait(WAIT)
            yield
        finally:
            stop.set()
            app.let_go.set()
            thread.join(WAIT)
            assert not thread.is_alive()


class TestResponses:
    @pytest.mark.parametrize(
        "answer, version, framing, body",
        [
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "1.1", ("content-length", "3"), b"abc"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "1.0", ("content-length", "3"), b"abc"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "1.1", ("content-length", "0"), b""),
            (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\na\r\n2\r\nbc\r\n0\r\nX: y\r\n\r\n",
                "1.1",
                ("transfer-encoding", "chunked"),
                b"abc",
            ),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "1.0", None, b"abc"),
            (b"HTTP/1.1 200 OK\r\n\r\nabc", "1.1", ("transfer-encoding", "chunked"), b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\nabc", "1.1", ("transfer-encoding", "chunked"), b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\nabc", "1.0", None, b"abc"),
            (b"HTTP/1.0 200 OK\r\n\r\n", "1.1", ("transfer-encoding", "chunked"), b""),
        ],
        ids=case_id,
    )
    def test_framing_suits_the_version_of_the_client(self, proxy, upstream, answer, version, framing, body):
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
            ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n", "12345"),
            ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", None),
            ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", None),
            ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nETag: a\r\n\r\n", "7"),
            ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", None),
            ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", None),
            ("DELETE", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
        ],
        ids=case_id,
    )
    def test_response_without_a_body_ends_with_its_head(self, proxy, upstream, method, answer, length):
        """Both connections serve the next request too."""
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
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
            b"\x15\x03\x01\x00\x02\x02\x0a",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000,
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz",
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
            b"HTTP/1.1 200 OK\r\nContent-Le",
            b"",
        ],
        ids=case_id,
    )
    def test_invalid_response_is_502(self, proxy, upstream, answer):
        """The client's own connection serves the next request all the same."""
        app = upstream(once(answer))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            message = wire.message(no_body=True)
            while status_of(message) == 100:
                message = wire.message(no_body=True)
            assert status_of(message) == 502
            assert b"port %d of this machine" % app.port in wire.exactly(int(fields_of(message)["content-length"]))
            wire.send(request("GET", "/proxy/"))
            assert status_of(wire.message()) == 200

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
        ],
        ids=case_id,
    )
    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    @pytest.mark.parametrize("how", ["end", "reset"])
    def test_truncated_response_does_not_end_cleanly(self, proxy, upstream, answer, version, how):
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

    def test_reset_does_not_end_a_body_until_close_cleanly(self, proxy, upstream):
        """EOF delimits such a body; a reset is a failure."""

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
    def test_body_until_close_is_reset_when_the_proxy_gives_up(self, start, upstream, why):
        """A client of HTTP/1.0 takes EOF for the end of the body, so it must not see one before that end."""

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
                eventually(lambda: not proxy.open_connections())
            with pytest.raises(ConnectionResetError):
                wire.rest()

    def test_unsent_tail_of_a_body_until_close_is_reset_when_the_proxy_stops(self, start, upstream):
        """The upstream has ended its response, and some of it has not reached the client of HTTP/1.0 yet."""
        size = 1 << 17
        app = upstream(once(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(size)))
        proxy = start(shutdown_timeout=0.1)
        with slow_wire(proxy) as wire:
            wire.send(b"GET /proxy/%d/ HTTP/1.0\r\nHost: here\r\n\r\n" % app.port)
            head = wire.until(b"\r\n\r\n")
            got = len(wire.buffer)
            while count_connections(remote_port=app.port) and got < size:  # until the proxy has read the response
                got += len(wire.sock.recv(4096))
            proxy.close()
            wire.buffer = b""
            try:
                assert head.startswith(b"HTTP/1.1 200")
                assert got + len(wire.rest()) == size
            except ConnectionResetError:
                pass  # the client can tell that something is missing

    @pytest.mark.parametrize("tail", [20000, 50000])
    def test_slow_client_is_not_idle_while_it_takes_the_tail_of_a_response(self, start, upstream, tail):
        """It gets all, though it takes longer than a connection may idle.

        Of the smaller tail little enough is left that the proxy has its own part done.
        """
        size = 1 << 17
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)))
        proxy = start(keep_alive_timeout=0.5)
        with slow_wire(proxy) as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"\r\n\r\n")
            assert len(wire.exactly(size - tail)) == size - tail
            outlast_keep_alive(proxy)
            assert len(wire.exactly(tail)) == tail
            assert wire.rest() == b""  # a clean end, as of any connection that has idled

    def test_interim_responses_are_passed_on(self, proxy, upstream):
        interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 9\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        app = upstream(answering(interim + OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message(no_body=True)[:2] == ("HTTP/1.1 103 Early Hints", [("Link", "</a>")])
            assert status_of(wire.message(no_body=True)) == 102
            assert wire.message()[2] == b"ok"

    def test_interim_responses_are_kept_from_a_client_of_http_1_0(self, proxy, upstream):
        app = upstream(answering(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK))
        message = proxy.ask(b"GET /proxy/%d/ HTTP/1.0\r\n\r\n" % app.port)
        assert (status_of(message), message[2]) == (200, b"ok")

    def test_101_to_a_plain_request_is_502(self, proxy, upstream):
        app = upstream(once(SWITCHING))
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 502

    def test_interim_responses_are_bounded(self, proxy, upstream):
        app = upstream(once(b"HTTP/1.1 103 E\r\n\r\n" * 40 + OK))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            message = wire.message(no_body=True)
            while status_of(message) == 103:
                message = wire.message(no_body=True)
            assert status_of(message) == 502

    def test_unknown_status_and_reason_pass(self, proxy, upstream):
        app = upstream(answering(b"HTTP/1.1 299 Sch\xf6n\r\nContent-Length: 0\r\n\r\n"))
        assert proxy.get("/proxy/%d/" % app.port)[0] == "HTTP/1.1 299 Sch\xf6n"

    @pytest.mark.parametrize(
        "fields, event, end",
        [
            (b"Transfer-Encoding: chunked\r\n", b"9\r\ndata: %d\n\n\r\n", b"0\r\n\r\n"),
            (b"Content-Length: 27\r\n", b"data: %d\n\n", b""),
            (b"", b"data: %d\n\n", b""),
        ],
        ids=case_id,
    )
    def test_events_arrive_one_by_one(self, proxy, upstream, fields, event, end):
        """Whatever the request's Accept says, and however the app frames them."""

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
            for number in range(3):
                app.happened.wait(WAIT)  # until the one before has arrived
                app.happened.clear()
                wire.send(event % number)
            wire.send(end)

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, "Accept: */*"))
            assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 OK")
            for number in range(3):
                app.happened.set()
                assert wire.until(b"data: %d\n\n" % number).endswith(b"data: %d\n\n" % number)

    def test_event_is_not_held_back_by_half_of_the_next(self, proxy, upstream):
        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\nt")
            app.happened.wait(WAIT)
            wire.send(b"wo\r\n0\r\n\r\n")

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"\r\n\r\n")
            got = wire.until(b"one") + wire.until(b"t")
            assert got.endswith(b"t")
            app.happened.set()
            got += wire.until(b"0\r\n\r\n")
        assert b"".join(got.split(b"\r\n")[1::2]) == b"onetwo"  # whatever the sizes of the chunks

    def test_busy_download_delays_no_other_request(self, proxy, upstream):
        app = upstream(answering(OK))
        with busy_download(proxy, upstream):
            for _ in range(20):
                assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"

    def test_busy_download_delays_no_deadline(self, start, upstream):
        proxy = start(head_timeout=0.3)
        with busy_download(proxy, upstream), proxy.wire() as wire:
            wire.send(b"GET / HT")
            assert status_of(wire.message()) == 408


class TestRequests:
    def test_body_streams_to_the_app(self, proxy, upstream):
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

    def test_bodies_stream_both_ways_at_once(self, proxy, upstream):
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

    def test_refused_expectation_closes_the_connection(self, proxy, upstream):
        """Nobody can tell whether the body still comes."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
            wire.rest()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", "Expect: 100-continue"))
            message = wire.message()
            assert (status_of(message), fields_of(message)["connection"]) == (417, "close")
            wire.end()
            assert wire.rest() == b""

    @pytest.mark.parametrize("close", [False, True])
    def test_early_response_reaches_the_client(self, proxy, upstream, close):
        """The app refuses in the middle of an upload, and may close at once, which resets the connection."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.exactly(100000)
            wire.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
            if not close:
                app.let_go.wait(4 * WAIT)

        def send_until_closed(wire):
            with contextlib.suppress(OSError):
                for _ in range(10000):
                    wire.sock.send(bytes(65536))

        app = upstream(serve)
        for _ in range(5):
            with proxy.wire() as wire:
                target = "/proxy/%d/" % app.port
                wire.send(request("PUT", target, "Content-Length: 1000000000", body=bytes(100000)))
                sender = threading.Thread(target=send_until_closed, args=(wire,))
                sender.start()
                message = wire.message()
                assert (status_of(message), message[2]) == (413, b"big")
                wire.end()
                sender.join(WAIT)
                assert not sender.is_alive()

    def test_response_is_read_after_the_request_could_not_be_written(self, proxy, upstream):
        """It comes late, long after writing to the app has begun to fail."""

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

    @pytest.mark.parametrize(
        "framing, body",
        [("Content-Length: 10", b"abc"), ("Transfer-Encoding: chunked", b"3\r\nabc\r\n")],
    )
    def test_body_that_breaks_off_is_not_completed(self, proxy, upstream, framing, body):
        seen = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            seen.append(wire.exactly(len(body)))
            app.happened.set()
            seen.append(wire.rest())

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, framing, body=body))
            assert app.happened.wait(WAIT)
        eventually(lambda: seen == [body, b""])

    def test_body_that_comes_after_its_deadline_is_not_sent_on(self, start, upstream):
        """Nor does it break the connection on which the 408 is being sent, or become a request."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while wire.more():
                    pass
            app.messages.append(wire.buffer)

        app = upstream(serve)
        proxy = start(stall_timeout=0.2)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", body=b"a"))
            assert wire.until(b"\r\n").startswith(b"HTTP/1.1 408 ")
            with contextlib.suppress(OSError):  # where the proxy has closed before the client sends
                wire.send(b"bc" + request("GET", "/proxy/%d/" % app.port))
                wire.end()
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1" not in wire.rest()
        eventually(lambda: app.messages)
        assert (app.messages, app.connections) == ([b"a"], 1)

    @pytest.mark.parametrize(
        "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"HTTP/1.1 200 OK\r\n\r\nabc"], ids=case_id
    )
    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset, Wire.end])
    def test_client_that_leaves_closes_its_upstream(self, proxy, upstream, answer, leave):
        """While the app is silent, and in the middle of its response."""

        def serve(wire, app):
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

    def test_client_that_had_ended_its_side_is_answered(self, proxy, upstream):
        """`printf 'GET ...' | nc -N`: the request and EOF are there before the upstream is connected."""
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.end()
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""

    @pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n"])
    def test_client_that_had_ended_its_side_waits_no_longer_than_an_idle_one(self, start, upstream, begun):
        """It may be gone altogether, which nothing tells until something is sent."""
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(begun), wire.rest()))
        proxy = start(keep_alive_timeout=0.3)
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.end()
            with contextlib.suppress(ConnectionResetError):
                answer = wire.rest()
                assert b" 504 " in answer if not begun else not answer.endswith(b"0\r\n\r\n")
        eventually(lambda: not proxy.open_connections())

    @pytest.mark.parametrize("behind", [b"GET /proxy/%d/smuggled HTTP/1.1\r\nHost: here\r\n\r\n", b"GET /part"])
    @pytest.mark.parametrize("end", [True, False])
    def test_bytes_behind_a_bad_chunk_are_no_request(self, proxy, upstream, behind, end):
        """Not even where an early response has come in the same moment."""
        answered = threading.Event()

        def serve(wire, app):
            with contextlib.suppress(ConnectionResetError):  # where the proxy does not read the response any more
                while wire.buffer or wire.more():
                    app.messages.append(wire.until(b"\r\n\r\n"))
                    wire.until(b"hello\r\n")
                    app.happened.wait(WAIT)
                    wire.send(OK)
                    answered.set()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n")
            eventually(lambda: app.messages)
            with proxy.held():
                wire.send(b"3\r\nabcX" + (behind % app.port if b"%" in behind else behind))
                if end:
                    wire.end()
                app.happened.set()
                assert answered.wait(WAIT)
            with contextlib.suppress(ConnectionResetError):
                answer = wire.message()
                assert status_of(answer) in (200, 400)
                assert fields_of(answer)["connection"] == "close"
                wire.end()
                assert wire.rest() == b""
        eventually(lambda: not proxy.open_connections())
        assert len(app.messages) == 1

    def test_early_response_closes_a_connection_on_which_a_body_is_under_way(self, proxy, upstream):
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

    @pytest.mark.parametrize("raw", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", b""], ids=case_id)
    def test_pooled_connection_that_stirs_as_a_request_comes_is_not_used(self, proxy, upstream, raw):
        """Bytes, or EOF, that only the kernel has yet: a POST could not be sent again."""
        stirred = threading.Event()

        def serve(wire, app):
            is_first = app.connections == 1
            app.messages.append(wire.message())
            wire.send(OK)
            if is_first:
                app.happened.wait(WAIT)
                wire.send(raw)
                if not raw:
                    wire.end()
                stirred.set()
            with contextlib.suppress(ConnectionResetError):
                wire.rest()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
            with proxy.held():  # the request is there first, so the proxy hears of it first
                wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1", body=b"a"))
                app.happened.set()
                assert stirred.wait(WAIT)
            assert wire.message()[2] == b"ok"
        assert app.connections == 2

    def test_client_that_resets_before_its_request_was_sent_on_is_forgotten(self, proxy, upstream):
        app = upstream(lambda wire, app: wire.rest())
        for _ in range(10):
            wire = proxy.wire()
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.reset()
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))

    @pytest.mark.parametrize("kind", ["upload", "pipelined", "tunnel"])
    def test_client_that_resets_while_it_is_not_read_is_forgotten(self, proxy, upstream, kind):
        if sys.version_info < (3, 7):
            pytest.skip("transports of 3.6 do not tell whether they read")

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING if kind == "tunnel" else b"")
            app.let_go.wait(4 * WAIT)

        app = upstream(serve)
        lines = {"upload": ("Content-Length: 1000000000",), "pipelined": (), "tunnel": HANDSHAKE}[kind]
        wire = proxy.wire()
        wire.send(request("GET", "/proxy/%d/" % app.port, *lines))
        eventually(lambda: app.connections == 1)
        wire.sock.settimeout(0.3)
        with pytest.raises(socket.timeout):
            while True:
                wire.sock.send(bytes(65536))
        wire.reset()
        eventually(lambda: not proxy.open_connections())

    @pytest.mark.parametrize("method", ["PROPFIND", "MKCOL", "REPORT", "TRACE", "M-SEARCH", "get", "X!"])
    def test_any_method_passes(self, proxy, upstream, method):
        app = upstream(answering(OK))
        assert status_of(proxy.ask(request(method, "/proxy/%d/" % app.port))) == 200
        assert app.messages[0][0] == "%s / HTTP/1.1" % method

    def test_compressed_and_partial_content_pass_as_they_are(self, proxy, upstream):
        head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-2/9\r\nContent-Encoding: gzip\r\n"
        app = upstream(answering(head + b"Content-Length: 3\r\n\r\n\x1f\x8b\x08"))
        lines = ("Range: bytes=0-2", "Accept-Encoding: gzip", "If-None-Match: x")
        message = proxy.get("/proxy/%d/" % app.port, *lines)
        assert (status_of(message), message[2]) == (206, b"\x1f\x8b\x08")
        sent = fields_of(app.messages[0])
        assert (sent["range"], sent["accept-encoding"], sent["if-none-match"]) == ("bytes=0-2", "gzip", "x")

    def test_address_of_an_ipv6_client_is_passed_on(self, start, upstream):
        app = upstream(answering(OK))
        try:
            proxy = start(bind="::1")
        except OSError as error:
            pytest.skip("this machine has no IPv6: %s" % error)
        with Wire(socket.create_connection(("::1", proxy.port), WAIT)) as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
        assert fields_of(app.messages[0])["x-forwarded-for"] == "::1"


class TestBackPressure:
    """A peer that does not read stops the other side, and memory stays where it was."""

    SIZE = 200 << 20

    def _grows_little(self, process, before):
        assert rss_kib(process.pid) - before < 8 * 1024

    def test_slow_client_stops_a_download(self, upstream):
        sent = []

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.SIZE)
            send_blocks(wire, self.SIZE, sent)

        app = upstream(serve)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"\r\n\r\n")
            steady(lambda: sum(sent))  # the kernel's buffers are full: everybody waits for us
            assert sum(sent) < 60 << 20
            self._grows_little(process, before)
            take_blocks(wire, self.SIZE)
            self._grows_little(process, before)

    @pytest.mark.parametrize("chunked", [False, True])
    def test_slow_app_stops_an_upload(self, upstream, chunked):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            app.happened.wait(WAIT)
            take_blocks(wire, self.SIZE)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            with contextlib.suppress(OSError):
                wire.rest()

        app = upstream(serve)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            framing = "Transfer-Encoding: chunked" if chunked else "Content-Length: %d" % self.SIZE
            wire.send(request("PUT", "/proxy/%d/" % app.port, framing))
            progress = []
            sender = threading.Thread(target=send_blocks, args=(wire, self.SIZE, progress, chunked))
            sender.start()
            steady(lambda: sum(progress))
            assert sum(progress) < 60 << 20
            self._grows_little(process, before)
            app.happened.set()
            assert wire.message()[2] == b"ok"
            sender.join(WAIT)
            assert not sender.is_alive()
            self._grows_little(process, before)

    def test_pipelined_requests_wait_for_a_slow_app(self, upstream):
        """They come to it whole and in order once it goes on."""
        count, progress = 100, []

        def serve(wire, app):
            while wire.buffer or wire.more():
                app.messages.append(wire.message()[0])
                app.happened.wait(WAIT)
                line = app.messages[-1].encode()
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(line), line))

        def send(wire):
            for number in range(count):
                target = "/proxy/%d/%d" % (app.port, number)
                wire.send(request("PUT", target, "Content-Length: %d" % (1 << 20), body=bytes(1 << 20)))
                progress.append(1)

        app = upstream(serve)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            sender = threading.Thread(target=send, args=(wire,))
            sender.start()
            steady(lambda: len(progress))
            assert len(progress) < 60
            self._grows_little(process, before)
            app.happened.set()
            for number in range(count):
                assert wire.message()[2] == b"PUT /%d HTTP/1.1" % number
            sender.join(WAIT)
            assert not sender.is_alive()
            self._grows_little(process, before)

    def test_connections_that_are_over_leave_no_memory(self, upstream):
        """What a thousand of them would leave, if each left only a few of its objects, is more than the bound."""
        app = upstream(answering(OK))

        def ask(port, times):
            for _ in range(times):
                with Wire.to(port) as wire:
                    wire.send(request("GET", "/proxy/%d/" % app.port, "Connection: close"))
                    assert wire.message()[2] == b"ok"

        with shell_proxy() as (process, port):
            ask(port, 300)
            before = rss_kib(process.pid)
            ask(port, 1000)
            assert rss_kib(process.pid) - before < 2 * 1024


def send_blocks(wire, size, progress, chunked=False):
    """Send `size` bytes, and note in `progress` how many the kernel has taken."""
    block = bytes(1 << 20)
    for _ in range(size >> 20):
        wire.send(chunk(block) if chunked else block)
        progress.append(len(block))
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


SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: b\r\n\r\n"
)


class TestTunnel:
    def test_handshake_is_end_to_end(self, proxy, upstream):
        app = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(SWITCHING), wire.rest()))
        lines = ("Origin: http://here:8888", "Sec-WebSocket-Protocol: a, b", "Sec-WebSocket-Extensions: c")
        message = proxy.get("/proxy/%d/ws?a" % app.port, *(lines + HANDSHAKE), no_body=True)
        assert message[0] == "HTTP/1.1 101 Switching Protocols"
        fields = fields_of(message)
        told = (fields["upgrade"], fields["connection"], fields["sec-websocket-protocol"])
        assert told == ("websocket", "Upgrade", "b")
        sent = fields_of(app.messages[0])
        assert app.messages[0][0] == "GET /ws?a HTTP/1.1"
        assert (sent["origin"], sent["host"]) == ("http://localhost:%d" % app.port, "localhost:%d" % app.port)
        told = (sent["connection"], sent["upgrade"], sent["sec-websocket-protocol"])
        assert told == ("Upgrade", "websocket", "a, b")
        assert sent["x-forwarded-prefix"] == "/proxy/%d" % app.port

    def test_handshake_at_the_prefix_without_a_slash_is_no_redirect(self, proxy, upstream):
        """A WebSocket cannot follow the redirect to the missing slash."""
        app = upstream(lambda wire, app: (app.messages.append(wire.message()), wire.send(SWITCHING), wire.rest()))
        assert status_of(proxy.get("/proxy/%d" % app.port, *HANDSHAKE, no_body=True)) == 101
        assert app.messages[0][0] == "GET / HTTP/1.1"

    def test_bytes_behind_the_handshake_arrive(self, proxy, upstream):
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

    def test_large_messages_arrive_whole_both_ways(self, proxy, upstream):
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

    @pytest.mark.parametrize("status", [b"403 Forbidden", b"426 Upgrade Required", b"200 OK"])
    def test_refusal_of_the_app_is_passed_on(self, proxy, upstream, status):
        """There is no tunnel: what the client sends next is its next request."""
        app = upstream(answering(b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\nno" % status))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            message = wire.message()
            assert (status_of(message), message[2]) == (int(status[:3]), b"no")
            wire.send(request("GET", "/proxy/"))
            assert b"/proxy/8080/" in wire.message()[2]

    @pytest.mark.parametrize(
        "fields", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Upgrade: websocket\r\n"], ids=case_id
    )
    def test_101_to_something_else_is_502(self, proxy, upstream, fields):
        app = upstream(once(b"HTTP/1.1 101 S\r\n" + fields + b"\r\n"))
        assert status_of(proxy.get("/proxy/%d/" % app.port, *HANDSHAKE)) == 502

    @pytest.mark.parametrize("first", ["client", "app"])
    @pytest.mark.parametrize("size", [10, 4 << 20])
    def test_half_close_passes_on_behind_all_bytes(self, proxy, upstream, first, size):
        """Either side may end first and still hear the other out."""

        def end_first(wire):
            wire.send(bytes(size))
            wire.end()
            assert wire.rest() == b"understood"

        def end_last(wire):
            assert wire.rest() == bytes(size)
            wire.send(b"understood")
            wire.end()

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            (end_last if first == "client" else end_first)(wire)
            app.happened.set()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            (end_first if first == "client" else end_last)(wire)
            assert app.happened.wait(WAIT)

    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_client_that_leaves_is_seen_by_the_app(self, proxy, upstream, leave):
        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            with contextlib.suppress(ConnectionResetError):
                wire.rest()
            app.happened.set()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            leave(wire)
            assert app.happened.wait(WAIT)

    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_app_that_leaves_is_seen_by_the_client(self, proxy, upstream, leave):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING), wire.exactly(3), leave(wire)))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE) + b"bye")
            assert status_of(wire.message(no_body=True)) == 101
            with contextlib.suppress(ConnectionResetError):
                assert wire.rest() == b""

    @pytest.mark.parametrize("reader", ["client", "app"])
    def test_side_that_does_not_read_stops_the_other(self, upstream, reader):
        """The memory of the proxy stays where it was."""
        size, progress, taken = 100 << 20, [], threading.Event()

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            if reader == "client":
                send_blocks(wire, size, progress)
            else:
                app.happened.wait(WAIT)
                take_blocks(wire, size)
                taken.set()

        app = upstream(serve)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            sender = threading.Thread(target=send_blocks, args=(wire, 0 if reader == "client" else size, progress))
            sender.start()
            steady(lambda: sum(progress))
            assert app.connections == 1
            assert sum(progress) < 60 << 20
            assert rss_kib(process.pid) - before < 8 * 1024
            if reader == "client":
                take_blocks(wire, size)
            else:
                app.happened.set()
                assert taken.wait(WAIT)
            sender.join(WAIT)
            assert not sender.is_alive()

    def test_bytes_before_the_101_are_not_held_without_bound(self, upstream):
        """Back-pressure holds from the tunnel's first moment, and for what came before it."""
        progress = []

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            app.happened.wait(WAIT)
            wire.send(SWITCHING)
            app.let_go.wait(4 * WAIT)

        def send(wire):
            with contextlib.suppress(OSError):  # it is cut off in the end
                send_blocks(wire, 100 << 20, progress)

        app = upstream(serve)
        app.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with shell_proxy() as (process, port), Wire.to(port) as wire:
            before = rss_kib(process.pid)
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            eventually(lambda: app.connections == 1)
            sender = threading.Thread(target=send, args=(wire,))
            sender.start()
            steady(lambda: sum(progress))
            assert sum(progress) < 60 << 20
            app.happened.set()
            assert status_of(wire.message(no_body=True)) == 101
            steady(lambda: sum(progress))
            assert sum(progress) < 60 << 20
            assert rss_kib(process.pid) - before < 8 * 1024
            app.let_go.set()  # the app closes with all of it unread
            sender.join(WAIT)
            assert not sender.is_alive()

    def test_app_that_resets_behind_its_101_leaves_nothing(self, proxy, upstream):
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
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))

    @pytest.mark.parametrize("first", ["client", "app"])
    @pytest.mark.parametrize("lost", ["client", "app"])
    def test_reset_in_the_moment_of_the_101_ends_both_sides(self, proxy, upstream, first, lost):
        """Whichever of the two the proxy hears of first."""
        asked, switched, ended = threading.Event(), threading.Event(), threading.Event()

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            asked.set()
            app.happened.wait(WAIT)
            wire.send(SWITCHING)
            if lost == "app":
                wire.reset()
            switched.set()
            with contextlib.suppress(OSError):
                wire.rest()
            ended.set()

        app = upstream(serve)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert asked.wait(WAIT)
            with proxy.held():
                if first == "client":
                    wire.reset() if lost == "client" else wire.send(b"abc")
                app.happened.set()
                assert switched.wait(WAIT)
                if first == "app":
                    wire.reset() if lost == "client" else wire.send(b"abc")
            assert ended.wait(WAIT)
            if lost == "app":
                with contextlib.suppress(ConnectionResetError):
                    wire.rest()
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))

    @pytest.mark.parametrize("size", [3, 1 << 20])
    def test_tunnel_outlives_all_deadlines_of_requests(self, start, upstream, size):
        """It may be silent for long, and its bytes may wait long for a client that does not read."""

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING)
            wire.send(bytes(size))
            wire.send(wire.exactly(4))

        app = upstream(serve)
        proxy = start(head_timeout=0.5, keep_alive_timeout=0.5, stall_timeout=0.5, response_timeout=0.5)
        with slow_wire(proxy) as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            outlast_keep_alive(proxy)
            assert len(wire.exactly(size)) == size
            wire.send(b"ping")
            assert wire.exactly(4) == b"ping"

    def test_half_closed_tunnel_that_stands_still_is_ended(self, start, upstream):
        app = upstream(
            lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING), app.let_go.wait(4 * WAIT))
        )
        proxy = start(stall_timeout=0.2)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            wire.end()
            with contextlib.suppress(ConnectionResetError):
                assert wire.rest() == b""
        eventually(lambda: not proxy.open_connections())


# ---------------------------------------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------------------------------------


class TestConnections:
    def test_connection_serves_request_after_request(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            for _ in range(5):
                wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", body=b"abc"))
                assert wire.message()[2] == b"ok"

    @pytest.mark.parametrize(
        "version, lines",
        [
            ("1.0", ""), ("1.0", "Connection: keep-alive\r\n"), ("1.1", "Connection: Close\r\n"),
            ("1.1", "Connection: a\r\nConnection: b, close\r\n"),
        ],
    )  # fmt: skip
    def test_connection_closes_when_the_client_wants_that(self, proxy, upstream, version, lines):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            wire.send(("GET /proxy/%d/ HTTP/%s\r\nHost: a\r\n%s\r\n" % (app.port, version, lines)).encode())
            message = wire.message()
            assert (message[2], fields_of(message)["connection"]) == (b"ok", "close")
            assert wire.rest() == b""

    def test_pipelined_requests_are_answered_in_order(self, proxy, upstream):
        """Nothing is lost, whether the app answers or the proxy itself."""

        def serve(wire, app):
            while wire.buffer or wire.more():
                line = wire.message()[0].encode()
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(line), line))

        app = upstream(serve)
        with proxy.wire() as wire:
            batch = b"".join(
                request("POST", "/proxy/%d/%d" % (app.port, n), "Content-Length: 3", body=b"abc")
                + request("GET", "/proxy/")
                for n in range(50)
            )
            sender = threading.Thread(target=wire.send, args=(batch,))
            sender.start()
            for number in range(50):
                assert wire.message()[2] == b"POST /%d HTTP/1.1" % number
                assert b"/proxy/8080/" in wire.message()[2]
            sender.join(WAIT)

    def test_pipelined_requests_before_an_eof_are_answered(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port) * 3)
                wire.end()
            assert [wire.message()[2] for _ in range(3)] == [b"ok"] * 3
            assert wire.rest() == b""

    def test_response_to_an_unread_body_arrives_before_the_close(self, proxy):
        """The client gets to see the response although it is still sending."""
        with proxy.wire() as wire:
            wire.send(request("POST", "/nothing", "Content-Length: 5000000"))
            message = wire.message()
            assert (status_of(message), fields_of(message)["connection"]) == (404, "close")
            with contextlib.suppress(OSError):
                wire.send(request("GET", "/proxy/") * 1000)
                wire.end()
                assert wire.rest() == b""

    def test_unread_body_is_not_taken_for_a_request(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            wire.send(request("POST", "/nothing", "Content-Length: 1000") + request("GET", "/proxy/%d/" % app.port))
            wire.end()
            assert status_of(wire.message()) == 404
            assert wire.rest() == b""
        eventually(lambda: not proxy.open_connections())
        assert app.connections == 0

    def test_errors_keep_the_connection_where_they_can(self, proxy):
        with proxy.wire() as wire:
            for _ in range(3):
                wire.send(request("GET", "/nothing"), request("POST", "/nothing", "Content-Length: 0"))
                for _ in range(2):
                    message = wire.message()
                    assert (status_of(message), fields_of(message).get("connection")) == (404, None)
            wire.send(request("POST", "/nothing", "Content-Length: 3", body=b"abc"))
            assert fields_of(wire.message())["connection"] == "close"

    def test_several_proxies_run_in_one_loop(self, start, upstream):
        apps = [upstream(answering(OK)) for _ in range(2)]
        proxies = [start(), start(base="/")]
        assert proxies[0].get("/proxy/%d/" % apps[0].port)[2] == proxies[1].get("/%d/" % apps[1].port)[2] == b"ok"

    @pytest.mark.parametrize("option", ["host_allowlist", "authorize"])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_internal_error_is_a_500_without_a_traceback(self, start, upstream, caplog, option, is_first):
        """The first request and one that finds a pooled connection take the same way out; the log tells what it was."""
        broken = [is_first]

        def allow(*_):
            if broken[0]:
                raise RuntimeError("secret")
            return True

        async def authorize(*_):
            allow()

        app = upstream(answering(OK))
        proxy = start(**{option: authorize if option == "authorize" else allow})
        if not is_first:
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
        broken[0] = True
        with caplog.at_level(logging.INFO, "port_proxy"):
            answer = proxy.get("/proxy/%d/" % app.port)
        assert status_of(answer) == 500
        assert b"secret" not in answer[2]
        assert b"Traceback" not in answer[2]
        assert any("internal error" in record.getMessage() for record in caplog.records)
        eventually(lambda: not proxy.open_connections())

    @needs_proc
    @pytest.mark.parametrize("raw", [b"", b"GET /pro", request("GET", "/proxy/")], ids=case_id)
    def test_reset_between_requests_is_not_logged(self, proxy, caplog, raw):
        """Browsers reset connections every day."""
        with caplog.at_level(logging.INFO, "port_proxy"):
            wire = proxy.wire()
            wire.send(raw)
            if raw.endswith(b"\r\n\r\n"):
                wire.message()
            eventually(lambda: not unread(local_port=proxy.port))
            wire.reset()
            eventually(lambda: not proxy.open_connections())
            assert status_of(proxy.get("/proxy/")) == 200  # by now the reset has been seen
        assert "error" not in caplog.text

    def test_empty_line_behind_a_body_is_no_half_request(self, start, upstream):
        app = upstream(answering(OK))
        proxy = start(head_timeout=0.2, keep_alive_timeout=0.8)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 1", body=b"a") + b"\r\n")
            assert wire.message()[2] == b"ok"
            assert wire.rest() == b""  # the end of an idle connection, without a 408


def unread(local_port=None, remote_port=None):
    """How much of what reached those ports' connections is unread, connections to be accepted included (Linux)."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="ascii") as file:
            for row in file.read().splitlines()[1:]:
                _, local, remote, _, queues = row.split()[:5]
                ports = [int(end.rpartition(":")[2], 16) for end in (local, remote)]
                if local_port in (None, ports[0]) and remote_port in (None, ports[1]):
                    count += int(queues.rpartition(":")[2], 16)
    return count


class TestReusedConnections:
    """Requests that go to the app on a connection which has served another request before."""

    def _begin(self, upstream, wire, serve):
        """Send two requests; the app gets the second on the connection of the first, and `serve` answers it."""

        def both(there, app):
            app.messages.append(there.message())
            there.send(OK)
            if there.more():
                app.messages.append(there.message())
                serve(there, app)

        app = upstream(both)
        wire.send(request("GET", "/proxy/%d/first" % app.port))
        assert wire.message()[2] == b"ok"
        wire.send(request("GET", "/proxy/%d/second" % app.port))
        eventually(lambda: len(app.messages) == 2)
        assert app.connections == 1
        return app

    def test_own_page_in_between_keeps_the_connection(self, proxy, upstream):
        app = upstream(answering(OK))
        with proxy.wire() as wire:
            for _ in range(3):
                wire.send(request("GET", "/proxy/%d/" % app.port))
                assert wire.message()[2] == b"ok"
                wire.send(request("GET", "/proxy/"))
                assert status_of(wire.message()) == 200
        assert app.connections == 1

    @needs_proc
    @pytest.mark.parametrize(
        "answer, rest",
        [
            (OK[:9], OK[9:]), (OK[:-1], OK[-1:]), (OK[:-2], OK[-2:]), (b"HTTP/1.1 103 Early Hints\r\n\r\n", OK),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", b"0\r\n\r\n"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: " + 4000 * b"x" + b"\r\n\r\nok", b""),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_answer_in_pieces_arrives_whole(self, proxy, upstream, answer, rest):
        def serve(there, app):
            there.send(answer)
            eventually(lambda: not unread(remote_port=app.port))
            there.send(rest)
            there.more()

        with proxy.wire() as wire:
            self._begin(upstream, wire, serve)
            message = wire.message(no_body=b"103" in answer)
            if b"103" in answer:
                assert status_of(message) == 103
                message = wire.message()
            assert (status_of(message), message[2]) == (200, b"ok")

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
            b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
            OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        ],
        ids=["close", "old version", "more than the answer"],
    )
    def test_answer_that_ends_the_connection_is_its_last(self, proxy, upstream, answer):
        """The next request takes a new connection, and what came behind the answer reaches no client."""
        with proxy.wire() as wire:
            app = self._begin(upstream, wire, lambda there, app: (there.send(answer), there.rest()))
            assert wire.message()[2] == b"ok"
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"ok"
            wire.end()
            assert wire.rest() == b""
        assert app.connections == 2

    def test_answer_that_is_no_http_is_a_502(self, proxy, upstream):
        wrong = b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"
        with proxy.wire() as wire:
            self._begin(upstream, wire, lambda there, app: there.send(wrong))
            message = wire.message()
            assert status_of(message) == 502
            assert b"not valid HTTP" in message[2]

    def test_app_that_closes_instead_of_answering_is_asked_again(self, proxy, upstream):
        with proxy.wire() as wire:
            app = self._begin(upstream, wire, lambda there, app: app.let_go.wait(WAIT))
            app.let_go.set()
            assert wire.message()[2] == b"ok"
        assert app.connections == 2
        assert [message[0].split(" ")[1] for message in app.messages] == ["/first", "/second", "/second"]

    def test_app_that_does_not_answer_is_a_504(self, start, upstream):
        with start(response_timeout=1.0).wire() as wire:
            self._begin(upstream, wire, lambda there, app: there.rest())
            assert status_of(wire.message()) == 504

    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_client_that_leaves_ends_the_apps_work(self, proxy, upstream, leave):
        ended = threading.Event()

        def serve(there, app):
            with contextlib.suppress(OSError):
                there.rest()
            ended.set()

        with proxy.wire() as wire:
            self._begin(upstream, wire, serve)
            leave(wire)
            assert ended.wait(WAIT)
        eventually(lambda: not proxy.open_connections())

    def test_gate_is_asked_once_per_request(self, start, upstream):
        """Also about a request that it refuses, and for which a connection would be at hand."""
        asked = []

        async def authorize(head, visit, route):
            asked.append(head.target)
            if "refuse" in head.target:
                raise ProxyError(402, "Not you.")

        app = upstream(answering(OK))
        proxy = start(authorize=authorize)
        paths = ["admit", "refuse", "admit", "refuse"]
        with proxy.wire() as wire:
            for path, status in zip(paths, (200, 402, 200, 402)):
                wire.send(request("GET", "/proxy/%d/%s" % (app.port, path), "Accept: text/html"))
                assert status_of(wire.message()) == status
        assert asked == ["/proxy/%d/%s" % (app.port, path) for path in paths]
        assert app.connections == 1

    def test_requests_that_come_meanwhile_are_answered_in_order(self, proxy, upstream):
        answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number for number in range(8)]
        app = upstream(answering(*answers))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert wire.message()[2] == b"0"
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.send(request("GET", "/proxy/%d/" % app.port) * 6)
            assert b"".join(wire.message()[2] for _ in range(7)) == b"1234567"

    def test_client_that_reads_no_answers_is_given_no_more(self, proxy, upstream):
        """Pipelining many requests and reading nothing does not fill the proxy's memory."""
        body = bytes(60000)
        app = upstream(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body))
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", proxy.port))
            wire = Wire(sock)
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert len(wire.message()[2]) == len(body)
            sock.settimeout(0.5)
            with contextlib.suppress(OSError):
                for _ in range(2000):
                    sock.sendall(request("GET", "/proxy/%d/" % app.port))
            steady(lambda: len(app.messages))
            assert len(app.messages) * len(body) < 16 << 20  # the kernel's buffers hold a few MiB of 114


class TestSimilarRequests:
    """What a request or a response comes to depends on itself alone, however much like another one it is."""

    GATES = {
        "open": ({}, []),
        "with a token": ({"token": "secret"}, []),
        "of a program": ({"authorize": None}, []),
        "of the whole origin": ({"whole_origin": True, "domains": ("localhost",)}, []),
        "at the root": ({"base": "/"}, []),
        "below a strange base": ({"base": "/user/a%40b.c+d/proxy"}, []),
        "behind a front": (
            {"trusted_proxies": ("127.0.0.0/8",), "preserve_host": True},
            ["X-Forwarded-Proto: https", "X-Forwarded-For: 9.9.9.9", "X-Forwarded-Host: a.b"],
        ),
        "to other hosts": ({"host_allowlist": ("127.0.0.2",)}, []),
        "with short targets": ({"max_target_bytes": 40}, []),
    }
    HEADS = [
        ("GET", (), b""), ("HEAD", (), b""), ("get", (), b""), ("CONNECT", (), b""),
        ("OPTIONS", ("Origin: http://here:8888", "Access-Control-Request-Method: PUT"), b""),
        ("POST", ("Content-Length: 3",), b"abc"), ("PUT", ("Transfer-Encoding: chunked",), chunk(b"abc") + chunk(b"")),
        ("PUT", ("Content-Length: 3", "Content-Length: 4"), b"abc"), ("GET", HANDSHAKE, b""),
        ("GET", ("Connection: close, X", "X: y"), b""), ("GET", ("Accept: text/html", "Sec-Fetch-Dest: document"), b""),
        ("GET", ("Referer: http://here:8888/proxy/8080/a?b", "Cookie: a=b"), b""),
        ("GET", ("Authorization: token secret",), b""),
        ("GET", ("Referer: http://here:8888/proxy/9090/x", "Sec-Fetch-Site: same-origin"), b""),
        ("GET", ("X: \xe4",), b""), ("GET", ("Authorization: token secret", "Accept: text/html"), b""),
    ]  # fmt: skip
    APPS = [
        "{0}", "{0}", "absolute/{0}", "localhost:{0}", "127.0.0.1:{0}", "127.0.0.2:{0}", "0", "99999", "x", "absolute",
        "%31{0}",
    ]  # fmt: skip
    PLACES = [
        "", "/", "/a", "//a", "/a/../b", "/..", "/%2e%2e", "/.", "/a.b/%2f", "?a", "/?", "/?a=b?c/../..",
        "/a?token=secret", "/?%74oken=secret&b", "/a b", "/a#b", "/\xe4", "/?\xe4", '/"|{}^`\\~!', "/" + 40 * "a",
    ]  # fmt: skip

    @staticmethod
    def _outcome(proxy, raw):
        """What is answered, without what is another each time: the date, the proxy's port, the random session."""
        start_line, fields, body = proxy.ask(raw, no_body=raw.startswith(b"HEAD"))
        fields = [(name, re.sub("(?<==)[^;=]{20,}", "RANDOM", value)) for name, value in fields if name != "Date"]
        return (start_line, repr(fields).replace(str(proxy.port), "PORT"), body.replace(b"%d" % proxy.port, b"PORT"))

    @pytest.mark.parametrize("kind", sorted(GATES))
    def test_outcome_does_not_depend_on_what_came_before(self, start, upstream, kind):
        """Two proxies get the same requests, one of them in the opposite order and all of them twice."""
        options, lines = self.GATES[kind]

        async def authorize(head, visit, route):
            pass

        if "authorize" in options:
            options = dict(options, authorize=authorize)

        def serve(wire, app):
            """Tell in the body what arrived, in a head which the proxy has to rewrite."""
            while wire.buffer or wire.more():
                line, fields, body = wire.message()
                told = ("%s %r %r" % (line, fields, body)).encode()
                wire.send(
                    b"HTTP/1.1 200 OK\r\nLocation: /x\r\nSet-Cookie: a=b; Path=/\r\nService-Worker-Allowed: /\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(told) + (b"" if line.startswith("HEAD") else told)
                )

        app = upstream(serve)
        base = options.get("base", "/proxy").rstrip("/")
        chance = random.Random(kind)
        raws = []
        for method, more, body in self.HEADS:
            for place in chance.sample(self.PLACES, 4):
                target = "%s/%s%s" % (base, chance.choice(self.APPS).format(app.port), place)
                raws.append(request(method, target, *more + tuple(lines), body=body))
        one, other = start(**options), start(**options)
        told = {raw: self._outcome(one, raw) for raw in raws}
        for raw in reversed(raws):
            assert [self._outcome(other, raw) for _ in range(2)] == [told[raw]] * 2, raw
        assert len({status for status, _, _ in told.values()}) >= 3

    def test_answers_of_two_apps_are_rewritten_for_each(self, proxy, upstream):
        """The same bytes from both; the prefix in the Location is that of the app which was asked."""
        answer = b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"
        apps = [upstream(answering(answer)) for _ in range(2)]
        for app in (apps[0], apps[1], apps[0]):
            assert fields_of(proxy.get("/proxy/%d/a" % app.port))["location"] == "/proxy/%d/x" % app.port

    def test_gate_sees_every_head(self, start, upstream):
        seen = []

        async def authorize(head, visit, route):
            seen.append([head.target] + [value for name, value in head.fields if name == "X-Key"])

        app = upstream(answering(OK))
        proxy = start(authorize=authorize)
        for path in "aabc":
            assert status_of(proxy.get("/proxy/%d/%s" % (app.port, path), "X-Key: open sesame")) == 200
        assert seen == [["/proxy/%d/%s" % (app.port, path), "open sesame"] for path in "aabc"]

    def test_gate_that_changes_its_mind_is_obeyed(self, start, upstream):
        admitted = [True]

        async def authorize(head, visit, route):
            if not admitted[0]:
                raise ProxyError(401, "Not any more.")

        app = upstream(answering(OK))
        proxy = start(authorize=authorize)
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
        admitted[0] = False
        assert status_of(proxy.get("/proxy/%d/" % app.port)) == 401

    def test_allowlist_that_changes_its_mind_is_obeyed(self, start, upstream):
        """About this machine too, also where a connection is at hand."""
        allowed = [True]
        app = upstream(answering(OK))
        proxy = start(host_allowlist=lambda host: allowed[0])
        assert [status_of(proxy.get("/proxy/%d/%s" % (app.port, path))) for path in "aab"] == [200] * 3
        allowed[0] = False
        assert [status_of(proxy.get("/proxy/%d/%s" % (app.port, path))) for path in "abc"] == [403] * 3

    def test_refused_request_is_refused_again(self, proxy):
        for _ in range(3):
            assert status_of(proxy.get("/proxy/nope/")) == 404
            assert status_of(proxy.ask(b"GET / HTTP/1.1\r\n\r\n")) == 400

    def test_same_request_from_another_address_is_told_apart(self, proxy, upstream):
        app = upstream(answering(OK))
        for client in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
            with Wire(socket.create_connection(("127.0.0.1", proxy.port), WAIT, (client, 0))) as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.message()
            assert fields_of(app.messages[-1])["x-forwarded-for"] == client

    def test_same_answer_to_head_has_no_body(self, proxy, upstream):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        app = upstream(answering(*[head + b"ok", head] * 3))
        for _ in range(3):
            assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"
            message = proxy.ask(request("HEAD", "/proxy/%d/" % app.port), no_body=True)
            assert (fields_of(message)["content-length"], message[2]) == ("2", b"")

    def test_same_answer_sets_the_cookie_only_for_a_page_visit(self, proxy, upstream):
        """Who opens a page gets the cookie that says which app it was; who asks for data, or has it, does not."""
        app = upstream(answering(OK))
        page, data = ("Accept: text/html",), ("Accept: */*",)
        known = page + (cookie_of(proxy.get("/proxy/%d/" % app.port, *page)),)
        told = [
            "set-cookie" in fields_of(proxy.get("/proxy/%d/" % app.port, *lines))
            for lines in (page, data, known, page, data, known, data, page, known)
        ]
        assert told == [True, False, False, True, False, False, False, True, False]


def title_told(proxy, app):
    """The title of the app on the page of all ports; "" if it has none there, None if the app is not there."""
    data = json.loads(proxy.get("/proxy/", "Accept: application/json")[2].decode())
    return {one["port"]: one["title"] or "" for one in data["ports"]}.get(app.port)


def page_of(body, coding="length"):
    """A page as an app may send it; `coding`: how its body is framed and packed."""
    sent = gzip.compress(body) if "gzip" in coding else body
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
    if "gzip" in coding:
        head += b"Content-Encoding: gzip\r\n"
    if "chunked" in coding:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(sent) + chunk(b"")
    return head + (b"" if coding == "until close" else b"Content-Length: %d\r\n" % len(sent)) + b"\r\n" + sent


@needs_proc
class TestTitles:
    @pytest.mark.parametrize(
        "body, title",
        [
            (b"<title>&#" + 5000 * b"9" + b";</title>", ""), (b"<title" * 10000, ""),
            (b"<title>" + b"a" * 60000, ""), (b"<title>\x1b[31mred\xe2\x80\xae</title>", "[31mred"),
            (b"<titles>x</titles>", ""), (b"<title lang='en'>ok</title>", "ok"), (b"<TITLE>\n a  b </TITLE >", "a b"),
        ],
        ids="number openings long escapes other attribute spaces".split(),
    )  # fmt: skip
    def test_title_that_means_harm_does_none(self, proxy, upstream, body, title):
        """It is cleaned, and it takes no time: a pattern with two ways to match would take minutes for some."""
        app = upstream(answering(page_of(body)))
        began = time.process_time()
        assert proxy.get("/proxy/%d/" % app.port, "Accept: text/html")[2] == body
        eventually(lambda: str(title_told(proxy, app)).strip() == title)
        assert time.process_time() - began < 2

    @pytest.mark.parametrize("coding", ["length", "chunked", "gzip", "gzip chunked", "until close"])
    def test_title_is_noted_however_the_page_comes(self, proxy, upstream, coding):
        """On a new connection, and on one from the pool; the last visit counts."""
        bodies = [b"<html><title>%s &amp; B</title></html>" % name + 3000 * b" " for name in (b"A", b"C")]
        pages = [page_of(body, coding) for body in bodies]

        def close_after_one(wire, app):
            app.messages.append(wire.message())
            wire.send(pages[len(app.messages) - 1])

        app = upstream(close_after_one if coding == "until close" else answering(*pages))
        for title in ("A & B", "C & B"):
            assert status_of(proxy.get("/proxy/%d/" % app.port, "Accept: text/html", until_close=True)) == 200
            eventually(lambda title=title: title_told(proxy, app) == title)

    def test_page_whose_chunks_come_in_parts_is_passed_on_at_once(self, proxy, upstream):
        """The size first, and then the bytes, as some servers write them: the page comes whole, and has its title."""
        body = b"<title>A</title>\r\n<p>"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n"
        parts = [head, b"%x\r\n" % len(body), body, b"\r\n", b"0\r\n\r\n"]

        def serve(wire, app):
            wire.message(no_body=True)
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
        eventually(lambda: title_told(proxy, app) == "A")


class TestDeadlines:
    def test_dripping_head_gets_a_408(self, start):
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

    def test_body_that_stops_coming_gets_a_408(self, start, upstream):
        app = upstream(lambda wire, app: wire.rest())
        proxy = start(stall_timeout=0.2)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 3", body=b"a"))
            message = wire.message()
            assert (status_of(message), fields_of(message)["connection"]) == (408, "close")

    def test_answer_that_nobody_takes_is_cut(self, start, upstream):
        """The client can tell: what it finds in its buffers when it wakes up has no proper end."""

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
            eventually(lambda: not proxy.open_connections())
            with contextlib.suppress(ConnectionResetError):
                while wire.more():
                    wire.buffer = wire.buffer[-5:]
            assert wire.buffer != b"0\r\n\r\n"

    def test_answer_that_never_comes_is_a_504(self, start, upstream):
        app = upstream(lambda wire, app: wire.rest())
        answer = start(response_timeout=0.2).get("/proxy/%d/" % app.port)
        assert status_of(answer) == 504
        assert b"No response came from port %d of this machine within 0.2 seconds." % app.port in answer[2]

    def test_time_for_the_answer_begins_with_the_end_of_the_request(self, start, upstream):
        def serve(wire, app):
            wire.message()
            wire.send(OK)

        app = upstream(serve)
        proxy = start(response_timeout=1.5)
        with proxy.wire() as wire:
            wire.send(request("POST", "/proxy/%d/" % app.port, "Content-Length: 10"))
            tick = threading.Event()
            for _ in range(10):
                tick.wait(0.2)
                wire.send(b"a")
            assert wire.message()[2] == b"ok"

    def test_answer_that_has_begun_may_be_silent_for_long(self, start, upstream):
        """Events may be far apart."""

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            threading.Event().wait(1.5)
            wire.send(b"ok")

        app = upstream(serve)
        proxy = start(response_timeout=1.0, stall_timeout=0.1, keep_alive_timeout=0.1)
        assert proxy.get("/proxy/%d/" % app.port)[2] == b"ok"


class TestLimits:
    def test_idle_connection_makes_room(self, start, upstream):
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

    def test_connection_too_many_gets_a_503(self, start, upstream):
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

    def test_tunnel_too_many_gets_a_503(self, start, upstream):
        """Requests still have room, and a tunnel that ends makes room for another."""

        def serve(wire, app):
            while wire.buffer or wire.more():
                if "upgrade" in fields_of(wire.message()):
                    wire.send(SWITCHING)
                    wire.rest()
                else:
                    wire.send(OK)

        app = upstream(serve)
        proxy = start(max_tunnels=2)

        def status():
            with proxy.wire() as wire:
                wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
                return status_of(wire.message(no_body=True))

        with proxy.wire() as one, proxy.wire() as two:
            for wire in (one, two):
                wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
                assert status_of(wire.message(no_body=True)) == 101
            assert status() == 503
            assert status_of(proxy.get("/proxy/%d/" % app.port)) == 200
            one.close()
            eventually(lambda: status() == 101)

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
        assert during < max(10 * before, 0.2)  # seconds; it is milliseconds, on a machine that may be busy

    @needs_proc
    def test_clients_that_leave_leave_nothing_behind(self, start, upstream):
        """Whatever they were doing: no descriptor, no connection on either side, no place among the tunnels."""

        def echo(wire):
            wire.send(SWITCHING)
            while True:
                data = wire.sock.recv(65536)
                if not data:
                    raise ConnectionResetError
                wire.send(data)

        def serve(wire, app):
            with contextlib.suppress(OSError, AssertionError, ValueError):
                while wire.buffer or wire.more():
                    if "upgrade" in fields_of(wire.message()):
                        echo(wire)
                    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                    for _ in range(20):
                        wire.send(chunk(bytes(5000)))
                    wire.send(b"0\r\n\r\n")

        app = upstream(serve)
        proxy = start(idle_upstream_timeout=0.2, max_tunnels=20)
        descriptors = Path("/proc/self/fd")
        before = len(list(descriptors.iterdir()))
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
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))
        eventually(lambda: len(list(descriptors.iterdir())) <= before)
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                wire = stack.enter_context(proxy.wire())
                wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
                assert status_of(wire.message(no_body=True)) == 101


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


@pytest.fixture(scope="session")
def odd_files(certificate):
    """Beside the certificate: no PEM at all, keys of other certificates, and its own key under a pass phrase."""
    (certificate / "junk").write_text("hello\n")
    for command in (
        "genrsa -out rsa.pem 2048",
        "ecparam -name prime256v1 -genkey -noout -out ec.pem",
        "pkey -in key.pem -aes256 -passout pass:abcd -out locked.pem",
    ):
        arguments = [shutil.which("openssl")] + command.split()
        subprocess.run(arguments, cwd=str(certificate), check=True, stderr=subprocess.DEVNULL, timeout=WAIT)
    return certificate


def tls_wire(proxy, certificate):
    """A raw connection inside TLS."""
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    sock = socket.create_connection(("127.0.0.1", proxy.port), WAIT)
    return Wire(context.wrap_socket(sock, server_hostname="localhost"))


def client_hello(version):
    """The first record of a TLS client that knows no later version than this one (RFC 5246 section 7.4.1.2)."""
    ciphers = struct.pack(">8H", 0xC02B, 0xC02F, 0xC009, 0xC00A, 0xC013, 0xC014, 0x002F, 0x0035)
    groups = struct.pack(">HHHH", 10, 4, 2, 23)
    formats = struct.pack(">HHBB", 11, 2, 1, 0)
    algorithms = struct.pack(">HHH4H", 13, 10, 8, 0x0403, 0x0401, 0x0503, 0x0203)
    extensions = groups + formats + algorithms
    body = struct.pack(">H32sBH", version, bytes(range(32)), 0, len(ciphers)) + ciphers + b"\x01\x00"
    body += struct.pack(">H", len(extensions)) + extensions
    message = b"\x01" + struct.pack(">I", len(body))[1:] + body
    return struct.pack(">BHH", 22, 0x0301, len(message)) + message


class TestTls:
    def test_clients_are_served_over_tls(self, start, upstream, certificate):
        app = upstream(answering(OK))
        proxy = start(certfile=str(certificate / "cert.pem"), keyfile=str(certificate / "key.pem"))
        assert proxy.proxy.url.startswith("https://")
        lines = ("Origin: https://here:8888", "Content-Length: 200000")
        with tls_wire(proxy, certificate) as wire:
            assert wire.sock.version() in ("TLSv1.2", "TLSv1.3")
            for _ in range(2):
                wire.send(request("POST", "/proxy/%d/" % app.port, *lines, body=bytes(200000)))
                assert wire.message()[2] == b"ok"
        assert fields_of(app.messages[0])["x-forwarded-proto"] == "https"

    def test_plain_http_is_not_served_where_tls_is_spoken(self, start, certificate):
        proxy = start(certfile=str(certificate / "both.pem"))
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/"))
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1 200" not in wire.rest()

    @pytest.mark.parametrize("sent", [b"", client_hello(0x0303)[:9]], ids=["nothing", "a part"])
    def test_handshake_that_never_ends_is_dropped(self, start, certificate, sent):
        proxy = start(certfile=str(certificate / "both.pem"), head_timeout=0.3)
        with proxy.wire() as wire, contextlib.suppress(ConnectionResetError):
            wire.send(sent)
            assert wire.rest() == b""

    @pytest.mark.parametrize(
        "options, says",
        [
            ({"certfile": "junk"}, "junk does not hold a certificate (PEM) that can be used: .*"),
            ({"certfile": "junk", "keyfile": "key.pem"}, "junk does not hold a certificate .*"),
            (
                {"certfile": "cert.pem"},
                "cert.pem does not hold the key (PEM) of the certificate in cert.pem;"
                " if that is in a file of its own, name it with --keyfile",
            ),
            (
                {"certfile": "cert.pem", "keyfile": "junk"},
                "junk does not hold the key (PEM) of the certificate in cert.pem",
            ),
            (
                {"certfile": "cert.pem", "keyfile": "rsa.pem"},
                "rsa.pem does not hold the key (PEM) of the certificate in cert.pem",
            ),
            (
                {"certfile": "cert.pem", "keyfile": "ec.pem"},
                "ec.pem does not hold the key (PEM) of the certificate in cert.pem",
            ),
            (
                {"certfile": "cert.pem", "keyfile": "locked.pem"},
                "the pass phrase of the key in locked.pem was not given",
            ),
            ({"certfile": "both.pem", "client_ca": "junk"}, "junk does not hold a certificate .*"),
            ({"certfile": "both.pem", "client_ca": "key.pem"}, "key.pem does not hold a certificate .*"),
            ({"certfile": "gone"}, "cannot read gone: No such file or directory"),
            ({"certfile": "."}, "cannot read .: Is a directory"),
            ({"certfile": "cert.pem", "keyfile": "gone"}, "cannot read gone: .*"),
            ({"certfile": "both.pem", "client_ca": "gone"}, "cannot read gone: .*"),
        ],
        ids=case_id,
    )  # fmt: skip
    def test_unusable_file_is_named(self, odd_files, options, says):
        """The message is about the file that is wrong, and nobody is asked who does not sit at a terminal."""
        arguments = [one for name, value in options.items() for one in ("--" + name.replace("_", "-"), value)]
        done = subprocess.run(
            [sys.executable, PROGRAM, "--port", "0"] + arguments,
            cwd=str(odd_files),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=WAIT,
        )
        assert (done.returncode, done.stdout) == (2, b"")
        pattern = "port_proxy: " + re.escape(says).replace(r"\.\*", ".*")
        assert re.fullmatch(pattern, done.stderr.decode().rstrip("\n").split("\n")[-1])
        assert b"Traceback" not in done.stderr

    @pytest.mark.parametrize(
        "names, fits",
        [(("cert.pem", "key.pem"), True), (("cert.pem", "cert.pem"), False), (("key.pem", "key.pem"), False)],
        ids=["both", "no key", "no certificate"],
    )
    def test_files_may_be_pipes(self, background, certificate, names, fits):
        """As a shell makes them of programs that unlock a key: what they hold can be read once."""
        if not os.path.exists("/dev/fd"):
            pytest.skip("this system has no /dev/fd")
        pipes = [os.pipe() for _ in range(2)]
        for (_, writer), name in zip(pipes, names):
            with os.fdopen(writer, "wb") as file:
                file.write((certificate / name).read_bytes())
        certfile, keyfile = ("/dev/fd/%d" % reader for reader, _ in pipes)

        async def start_and_close():
            proxy = PortProxy(Config(port=0, certfile=certfile, keyfile=keyfile))
            try:
                await proxy.start()
            finally:
                await proxy.close()

        try:
            with contextlib.ExitStack() as stack:
                if not fits:
                    says = "the certificate in %s cannot be used with the key in %s: " % (certfile, keyfile)
                    stack.enter_context(pytest.raises(ValueError, match=says))
                background.do(start_and_close())
        finally:
            for reader, _ in pipes:
                os.close(reader)

    @pytest.mark.parametrize("version, is_served", [(0x0300, False), (0x0301, False), (0x0302, False), (0x0303, True)])
    def test_versions_before_tls_1_2_are_refused(self, start, certificate, version, is_served):
        """A handshake record of the server follows only to a client that knows at least TLS 1.2."""
        proxy = start(certfile=str(certificate / "both.pem"))
        with proxy.wire() as wire:
            wire.send(client_hello(version))
            first = b""
            with contextlib.suppress(ConnectionResetError):
                first = wire.exactly(1)
            assert (first == b"\x16") is is_served

    def test_tunnel_works_over_tls(self, start, upstream, certificate):
        proxy = start(certfile=str(certificate / "both.pem"))
        data = bytes(range(256)) * 8192

        def serve(wire, app):
            wire.until(b"\r\n\r\n")
            wire.send(SWITCHING + b"hello")
            wire.send(wire.exactly(len(data)))
            wire.rest()
            app.happened.set()

        app = upstream(serve)
        with tls_wire(proxy, certificate) as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port, *HANDSHAKE))
            assert status_of(wire.message(no_body=True)) == 101
            wire.send(data)  # the app takes it all before it sends; one TLS socket is not for two threads
            assert wire.exactly(5 + len(data)) == b"hello" + data
        assert app.happened.wait(WAIT)

    def test_early_answer_arrives_over_tls(self, start, certificate):
        proxy = start(certfile=str(certificate / "both.pem"))
        with tls_wire(proxy, certificate) as wire:
            wire.send(request("POST", "/nothing", "Content-Length: 300000", body=bytes(100000)))
            assert status_of(wire.message()) == 404

    @pytest.fixture
    def tls_app(self, upstream, certificate):
        """An app that speaks TLS, with the certificate that nobody knows."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(str(certificate / "both.pem"))

        def serve(wire, app):
            with contextlib.suppress(OSError):  # a certificate that was not accepted, or an end without a farewell
                wire.sock = context.wrap_socket(wire.sock, server_side=True)
                answering(OK)(wire, app)

        return upstream(serve)

    def test_upstream_with_an_unknown_certificate_is_a_502(self, start, tls_app):
        answer = start(upstream_tls=[str(tls_app.port)]).get("/proxy/%d/" % tls_app.port)
        assert (status_of(answer), b"--insecure-upstream" in answer[2]) == (502, True)

    def test_upstream_is_not_verified_if_that_is_switched_off(self, start, tls_app):
        """Its Origin says https, as the app is at home there."""
        proxy = start(upstream_tls=["localhost:%d" % tls_app.port], insecure_upstream=True)
        assert proxy.get("/proxy/%d/" % tls_app.port, "Origin: http://here:8888")[2] == b"ok"
        assert fields_of(tls_app.messages[-1])["origin"] == "https://localhost:%d" % tls_app.port

    def test_upstream_with_a_known_certificate_is_served(self, start, tls_app, certificate, monkeypatch):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        proxy = start(upstream_tls=[str(tls_app.port)])
        assert proxy.get("/proxy/%d/" % tls_app.port)[2] == b"ok"
        assert proxy.get("/proxy/127.0.0.1:%d/" % tls_app.port)[2] == b"ok"

    def test_upstream_that_speaks_no_tls_is_a_502(self, start, upstream):
        plain = upstream(lambda wire, app: (wire.more(), wire.send(OK)))
        answer = start(upstream_tls=[str(plain.port)], insecure_upstream=True).get("/proxy/%d/" % plain.port)
        assert (status_of(answer), b"Does it speak TLS?" in answer[2]) == (502, True)

    @pytest.mark.parametrize("upstream_tls", [["x"], ["0"], ["a:b"], [""], ["localhost:70000"]])
    def test_option_that_names_no_upstream_is_refused(self, upstream_tls):
        with pytest.raises(ValueError):
            PortProxy(Config(upstream_tls=upstream_tls))

    @pytest.mark.parametrize(
        "sent",
        [
            b"GET /proxy/", b"no HTTP\r\n\r\n", request("POST", "/proxy/%d/", "Content-Length: 9", body=b"abc"),
            request("GET", "/proxy/%d/"),
        ],
        ids=case_id,
    )  # fmt: skip
    @pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
    def test_client_that_leaves_ends_both_connections(self, start, upstream, certificate, sent, leave):
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), app.happened.set(), app.let_go.wait(WAIT)))
        proxy = start(certfile=str(certificate / "both.pem"))
        wire = tls_wire(proxy, certificate)
        wire.send(sent % app.port if b"%" in sent else sent)
        if b"%" in sent:
            assert app.happened.wait(WAIT)
        leave(wire)
        eventually(lambda: not proxy.open_connections() and not count_connections(remote_port=app.port))


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

    def test_socket_is_private_and_removed(self, start, upstream, folder):
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

    def test_stale_socket_is_replaced_and_nothing_else(self, background, start, folder):
        path = folder / "proxy"
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        start(bind="unix:%s" % path)
        (folder / "file").write_text("precious")
        (folder / "link").symlink_to(path)
        for name in ("proxy", "file", "link"):  # in use; not a socket; a link to one
            with pytest.raises(OSError):
                background.do(PortProxy(Config(bind="unix:%s" % (folder / name))).start())
        assert (folder / "file").read_text() == "precious"
        self.connect(path).close()

    def test_socket_that_others_may_use_asks_for_a_token(self, background, folder):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(folder / "open"))
        os.chmod(str(folder / "open"), 0o666)
        proxy = PortProxy(Config())
        background.do(proxy.start([sock]))
        token = proxy.token
        background.do(proxy.close())
        assert token
        assert (folder / "open").exists()  # it was given to us, and is not ours to remove

    def test_command_line_tells_how_to_reach_the_socket(self, folder):
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

    def test_command_line_refuses_a_path_that_cannot_be(self):
        status, _, errors = run_program("--bind", "unix:/nowhere/at/all")
        assert (status, "cannot listen on unix:/nowhere/at/all" in errors) == (2, True)

    def test_socket_activation_is_served(self):
        """As systemd does it: the socket is number 3, and LISTEN_PID says for whom."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(5)

            def hand_over():
                os.dup2(listener.fileno(), 3)
                os.set_inheritable(3, True)

            command = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@"'
            process = subprocess.Popen(
                ["sh", "-c", command, sys.executable, PROGRAM, "--port", "1"],
                stdout=subprocess.PIPE,
                preexec_fn=hand_over,
                close_fds=False,
            )
            assert b":%d/proxy/" % listener.getsockname()[1] in process.stdout.readline()
            with Wire.to(listener.getsockname()[1]) as wire:
                wire.send(request("GET", "/proxy/").replace(b"here", b"localhost"))
                assert status_of(wire.message()) == 200
            process.terminate()
            assert process.wait(WAIT) == 0
            process.stdout.close()


class TestLog:
    def test_request_is_one_line_without_the_query(self, proxy, upstream, caplog):
        app = upstream(answering(OK))
        with caplog.at_level(logging.INFO, "port_proxy"):
            proxy.get("/proxy/%d/a?token=secret" % app.port, "Authorization: token secret", "Cookie: secret")
            proxy.get("/nothing?secret")

            def lines():
                return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]

            eventually(lambda: len(lines()) == 2)
        pattern = r"127\.0\.0\.1 GET /proxy/{0}/a\?\.\.\. -> localhost:{0} 200, 2 bytes, [0-9.]+ s".format(app.port)
        assert re.fullmatch(pattern, lines()[0])
        assert not any("secret" in record.getMessage() for record in caplog.records)

    def test_failure_is_told_and_a_sign_in_is_none(self, start, upstream, caplog):
        """An answer that was cut short does not look like one that was not."""

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
            requests = [record.request for record in caplog.records if hasattr(record, "request")]
            return [(one["status"], one.get("error")) for one in requests]

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
        broken = "The app on port %d of this machine closed the connection in the middle of its response." % app.port
        assert told()[:3] == [(302, None), (200, broken), (200, None)]
        stopped = "The proxy was told to stop."
        assert set(told()[3:]) == {(200, stopped), ("gone", stopped)}

    def test_app_that_falls_silent_in_its_answer_is_told(self, start, upstream, caplog):
        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
            wire.rest()

        app = upstream(serve)
        proxy = start(keep_alive_timeout=2)
        with caplog.at_level(logging.INFO, "port_proxy"), proxy.wire() as wire:
            with proxy.held():
                wire.send(request("GET", "/proxy/%d/" % app.port))
                wire.end()  # it may as well be gone
            assert wire.rest().endswith(b"abc")
            eventually(lambda: caplog.records)
        silent = "The app on port %d of this machine stopped in the middle of its response." % app.port
        assert caplog.records[0].request["error"] == silent

    def test_app_that_falls_silent_before_its_answer_is_a_504(self, start, upstream):
        """An interim response is no answer."""

        def serve(wire, app):
            wire.message()
            wire.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            wire.rest()

        app = upstream(serve)
        with start(response_timeout=1.0).wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert status_of(wire.message(no_body=True)) == 103
            answer = wire.message()
        said = b"No response came from port %d of this machine within 1 second" % app.port
        assert (status_of(answer), said in answer[2]) == (504, True)

    def test_tunnel_is_one_line_when_it_ends(self, proxy, upstream, caplog):
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
        pattern = r"127\.0\.0\.1 GET /proxy/{0}/ws -> localhost:{0} 101, 3 bytes and back 5, [0-9.]+ s"
        assert re.fullmatch(pattern.format(app.port), line)
        assert caplog.records[0].request["bytes_received"] == 5


class TestClose:
    def test_close_lets_requests_finish_and_ends_what_idles(self, start, upstream):
        """On a fresh connection to the app and on one that is used again."""

        def serve(wire, app):
            while wire.buffer or wire.more():
                app.messages.append(wire.message())
                if "slow" in app.messages[-1][0]:
                    app.happened.wait(WAIT)
                wire.send(OK)

        app = upstream(serve)
        tunnel_app = upstream(
            lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(SWITCHING), wire.rest(), app.happened.set())
        )
        proxy = start(shutdown_timeout=WAIT)
        with contextlib.ExitStack() as stack:
            idle, tunnel, partial, one, two = (stack.enter_context(proxy.wire()) for _ in range(5))
            idle.send(request("GET", "/proxy/%d/fast" % app.port))
            assert idle.message()[2] == b"ok"
            partial.send(b"GET / HT")
            tunnel.send(request("GET", "/proxy/%d/" % tunnel_app.port, *HANDSHAKE))
            assert status_of(tunnel.message(no_body=True)) == 101
            for count, busy in ((2, one), (3, two)):
                busy.send(request("GET", "/proxy/%d/slow" % app.port))
                eventually(lambda count=count: len(app.messages) == count)
            assert app.connections == 2
            closing = threading.Thread(target=proxy.close)
            closing.start()
            assert idle.rest() == b""
            assert tunnel.rest() == b""
            assert partial.rest() == b""
            assert tunnel_app.happened.wait(WAIT)
            with pytest.raises(OSError):
                proxy.wire()
            app.happened.set()
            for busy in (one, two):
                message = busy.message()
                assert (message[2], fields_of(message)["connection"]) == (b"ok", "close")
            closing.join(WAIT)
            assert not closing.is_alive()

    def test_connection_does_not_idle_after_its_last_request(self, start, upstream):
        """Though the head of the answer, which has gone out, said nothing of an end."""

        def serve(wire, app):
            wire.message()
            wire.send(OK[:-1])
            app.let_go.wait(WAIT)
            wire.send(OK[-1:])
            wire.rest()

        app = upstream(serve)
        proxy = start(shutdown_timeout=4 * WAIT, keep_alive_timeout=4 * WAIT)
        with proxy.wire() as idle, proxy.wire() as wire:
            idle.send(request("GET", "/proxy/"))
            idle.message()
            wire.send(request("GET", "/proxy/%d/" % app.port))
            assert "close" not in wire.until(b"\r\n\r\n").decode()
            closing = threading.Thread(target=proxy.close)
            closing.start()
            assert idle.rest() == b""  # by now the proxy is closing
            app.let_go.set()
            assert wire.rest() == OK[-2:]
            closing.join(WAIT)
            assert not closing.is_alive()

    def test_request_that_does_not_finish_in_time_is_cut(self, start, upstream):
        app = upstream(lambda wire, app: (wire.message(), wire.send(b"HTTP/1.1 200 OK\r\n\r\nabc"), wire.rest()))
        proxy = start(shutdown_timeout=0.1)
        with proxy.wire() as wire:
            wire.send(request("GET", "/proxy/%d/" % app.port))
            wire.until(b"abc")
            proxy.close()
            with contextlib.suppress(ConnectionResetError):
                assert not wire.rest().endswith(b"0\r\n\r\n")

    def test_close_works_twice_and_without_start(self, background):
        proxy = PortProxy(Config(port=0))
        background.do(proxy.close())
        background.do(proxy.start())
        background.do(proxy.close())
        background.do(proxy.close())
        assert proxy.port == 0

    def test_close_by_two_at_once_ends(self, background):
        proxy = PortProxy(Config(port=0))

        async def both():
            await proxy.start()
            await asyncio.gather(proxy.close(), proxy.close())

        background.do(both())
        assert proxy.port == 0

    def test_port_in_use_is_an_oserror(self, background, proxy):
        with pytest.raises(OSError):
            background.do(PortProxy(Config(port=proxy.port)).start())


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing: whatever either side sends, cut wherever it may be
# ---------------------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """The message is not valid, and nothing behind this point has a meaning."""


class Short(Exception):
    """The message may be valid, but its end is missing."""


NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"


def reference_head(raw, start_line):
    """(match of the start line, values by lower-cased name, what is behind the head); written for plainness."""
    head, end, rest = raw.partition(b"\r\n\r\n")
    if not end:
        raise Short
    lines = head.split(b"\r\n")
    start = re.match(start_line + rb"\Z", lines[0])
    fields = [re.match(rb"(" + NAME + rb"):[ \t]*([\t -~\x80-\xff]*?)[ \t]*\Z", line) for line in lines[1:]]
    if not start or not all(fields):
        raise Wrong
    named = {}
    for field in fields:
        named.setdefault(field.group(1).lower(), []).append(field.group(2))
    return start, named, rest


def reference_body(raw, named, version):
    """(the body, what is behind it) as the fields frame it; (None, raw) where they do not."""
    lengths = {one.strip() for value in named.get(b"content-length", []) for one in value.split(b",")}
    codings = named.get(b"transfer-encoding")
    if codings:
        if lengths or version == b"0" or [coding.lower() for coding in codings] != [b"chunked"]:
            raise Wrong
        body = b""
        while True:
            line, end, rest = raw.partition(b"\r\n")
            if not end:
                raise Short
            match = re.match(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n]*)?\Z", line)
            if not match:
                raise Wrong
            raw, size = rest, int(match.group(1), 16)
            if not size:
                break
            if len(raw) < size + 2:
                raise Short
            if raw[size : size + 2] != b"\r\n":
                raise Wrong
            body, raw = body + raw[:size], raw[size + 2 :]
        trailers = re.match(rb"(?:" + NAME + rb":[\t -~\x80-\xff]*\r\n)*\r\n", raw)
        if not trailers:
            raise Wrong if b"\r\n\r\n" in b"\r\n" + raw else Short
        return body, raw[trailers.end() :]
    if lengths:
        if len(lengths) > 1 or not re.match(rb"[0-9]{1,18}\Z", min(lengths)):
            raise Wrong
        size = int(min(lengths))
        if len(raw) < size:
            raise Short
        return raw[:size], raw[size:]
    return None, raw


def reference_request(raw):
    """(method, target, the body or None if it is not whole, Short or Wrong or what is behind it) of a valid head."""
    start, named, raw = reference_head(raw, rb"(" + NAME + rb") ([!-\"$-~]+) HTTP/1\.([01])")
    method, target, version = start.groups()
    if len(named.get(b"host", [])) not in ((1,) if version == b"1" else (0, 1)):
        raise Wrong
    try:
        body, rest = reference_body(raw, named, version)
    except (Short, Wrong) as error:
        return method, target, None, type(error)
    return method, target, body or b"", rest


def reference_requests(raw):
    """What a byte stream says: ([(method, target, body)], begun, end).

    begun: method and target of a request whose head is valid and whose body is not whole, or None.  end: None if the
    stream ends with a message, else Short or Wrong.
    """
    found = []
    while True:
        for _ in range(2):
            if raw.startswith(b"\r\n"):
                raw = raw[2:]
        if not raw:
            return found, None, None
        try:
            method, target, body, raw = reference_request(raw)
        except (Short, Wrong) as error:
            return found, None, type(error)
        if body is None:
            return found, (method, target), raw
        found.append((method, target, body))


def reference_response(raw, method, is_upgrade, has_ended):
    """(status, body) of the final response in a byte stream, or Short or Wrong."""
    try:
        while True:
            start, named, raw = reference_head(raw, rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
            status = int(start.group(2))
            if status >= 200 or status == 101:
                break
        if status == 101:
            return (101, b"") if is_upgrade else Wrong
        if method == b"HEAD" or status in (204, 304):
            return status, b""
        body, _ = reference_body(raw, named, start.group(1))
    except (Short, Wrong) as error:
        return type(error)
    if body is None:
        return (status, raw) if has_ended else Short
    return status, body


class FuzzedClient(asyncio.Protocol):
    """A client of the proxy that sends `raw`.

    is_plain: nothing is wrong in what it sends.  is_patient: it ends its side only when there is nothing more to come.
    leaves: it goes away without waiting for answers.
    """

    def __init__(self, fuzzing, name):
        self.fuzzing, self.name = fuzzing, name
        self.is_plain = True
        self.is_patient = fuzzing.chance.random() < 0.6
        self.leaves = not self.is_patient and fuzzing.chance.random() < 0.1
        self.is_local = hasattr(socket, "AF_UNIX") and fuzzing.chance.random() < 0.7
        self.raw = b"".join(fuzzing.request(self, number) for number in range(fuzzing.chance.randrange(1, 4)))
        pieces = fuzzing.pieces(fuzzing.chance, self.raw)
        self.pieces = [(piece, fuzzing.chance.choice([0, 0, 0, 1, 2, 10])) for piece in pieces]
        self.pauses = fuzzing.chance.choice([0, 10])
        self.received = b""
        self.has_sent = self.is_reset = False
        self.ended = fuzzing.loop.create_future()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.fuzzing.progress += 1
        self.received += data

    def connection_lost(self, error):
        self.fuzzing.progress += 1
        self.is_reset = error is not None
        self.ended.set_result(None)

    async def talk(self):
        loop, fuzzing = self.fuzzing.loop, self.fuzzing
        if self.is_local:
            await loop.create_unix_connection(lambda: self, fuzzing.socket_path)
        else:
            await loop.create_connection(lambda: self, "127.0.0.1", fuzzing.proxy_port)
        for piece, pauses in self.pieces:
            if not self.transport.is_closing():
                self.transport.write(piece)
                fuzzing.progress += 1
            for _ in range(pauses):
                await asyncio.sleep(0)
        for _ in range(self.pauses):
            await asyncio.sleep(0)
        self.has_sent = True
        if not self.is_patient:
            self.end()
        await self.ended

    def end(self):
        if self.leaves:
            self.transport.abort()
        elif not self.transport.is_closing():
            with contextlib.suppress(OSError):  # the proxy has reset it
                self.transport.write_eof()


class FuzzedApp(asyncio.Protocol):
    """One connection of the proxy to the app, which answers each request that it sees, rightly or wrongly."""

    def __init__(self, fuzzing):
        self.fuzzing = fuzzing
        self.received = self.sent = b""
        self.at = 0  # where in `received` the next request begins, or the one that is not whole yet
        self.is_answered = False  # whether that one has its answer already
        self.has_ended = self.was_reset = False
        self.is_lost = False
        fuzzing.apps.append(self)

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        self.is_lost = True
        self.fuzzing.progress += 1

    def data_received(self, data):
        self.fuzzing.progress += 1
        self.received += data
        while True:
            raw = self.received[self.at :]
            head = self.fuzzing.head.match(raw)
            if not head:
                return
            whole = reference_request(raw)
            chance = random.Random("%d %s" % (self.fuzzing.seed, head.group(2).decode("latin-1")))
            if not self.is_answered and (chance.random() < 0.3 or whole[2] is not None):
                self.is_answered = True
                self._answer(head, chance)
            if whole[2] is None:
                return
            self.at, self.is_answered = len(self.received) - len(whole[3]), False

    def _answer(self, head, chance):
        is_upgrade = b"\r\nUpgrade: websocket\r\n" in head.group(0)
        raw, is_plain = self.fuzzing.response(chance, head.group(2))
        script = self, is_upgrade, len(self.sent), is_plain
        self.fuzzing.scripts.setdefault((head.group(1), b"/" + head.group(2)), []).append(script)
        end = chance.choice([None, None, None, "eof", "close", "close", "reset"]) if chance.random() < 0.6 else None
        self._send(self.fuzzing.pieces(chance, raw), end)

    def _send(self, pieces, end):
        if self.transport.is_closing() or self.has_ended:
            return
        if pieces:
            self.sent += pieces[0]
            self.transport.write(pieces[0])
            self.fuzzing.progress += 1
            self.fuzzing.loop.call_soon(self._send, pieces[1:], end)
        elif end:
            self.end(end)

    def end(self, how):
        if not self.transport.is_closing() and not self.has_ended:
            self.has_ended = True
            self.was_reset = how == "reset"
            with contextlib.suppress(OSError):  # the proxy has reset it
                if how == "eof":
                    self.transport.write_eof()
                    return
                if how == "reset":
                    linger = struct.pack("ii", 1, 0)
                    self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.transport.close()


class Fuzzing:
    """A proxy in an event loop, with clients and an app in the same loop that say what they should not.

    Everything that came of it is checked: no request becomes two, none is made of another's body, the app sees what
    `reference_requests` reads in what a client sent, and each client gets what `reference_response` reads in what the
    app sent to it, or an error, or an answer that visibly breaks off.
    """

    MUTATIONS = [
        b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"0", b"1", b"5", b"a", b";", b"\x00", b"\xff", b"chunked",
        b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b",", b"-", b"+",
    ]  # fmt: skip
    NASTY_FIELDS = [
        b"Content-Length: 3", b"Content-Length: 0", b"Content-Length: 3, 4", b"Content-Length: +3",
        b"Content-Length: 03", b"content-length:3", b"Content-Length : 3", b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding : chunked",
        b"transfer-encoding:\tCHUNKED", b"Transfer-Encoding:\x0bchunked", b" Transfer-Encoding: chunked",
        b"X: y\nTransfer-Encoding: chunked", b"X: y\rContent-Length: 3", b"Host: b", b"X: \x00",
    ]  # fmt: skip
    BATCH = 100  # clients at once, which share the connections to the app

    def __init__(self, seed):
        self.first_seed = seed
        self.errors = []
        self.progress = 0
        names = ("clients", "requests", "retries", "answers", "refusals", "broken answers", "resets")
        self.counts = dict.fromkeys(names, 0)

    # What is sent

    def mutated(self, chance, raw, probability):
        mutant = bytearray(raw)
        while chance.random() < probability and mutant:
            at = chance.randrange(len(mutant) + 1)
            cut = chance.choice([0, 0, 1, 2, 7])
            mutant[at : at + cut] = chance.choice(self.MUTATIONS + [b""])
        ports = re.findall(rb"/proxy/([0-9]+)(?![^/? ])", bytes(mutant))
        # Other programs of this machine have no part in this.
        return bytes(mutant) if all(int(port) in (0, self.app_port) for port in ports) else raw

    @staticmethod
    def pieces(chance, raw):
        how = chance.random()
        if how < 0.4 or not raw:
            return [raw] if raw else []
        if how < 0.45:
            return [raw[at : at + 1] for at in range(len(raw))]
        cuts = sorted(chance.randrange(len(raw)) for _ in range(chance.randrange(1, 6)))
        return [raw[a:b] for a, b in zip([0] + cuts, cuts + [len(raw)]) if a != b]

    def request(self, client, number):
        """A request with bytes in it that would be another one if its body were misread."""
        chance = self.chance
        prefix = b"/proxy/%d/" % self.app_port
        smuggled = b"GET %s%s-smuggled HTTP/1.1\r\nHost: a\r\n\r\n" % (prefix, client.name)
        body = chance.choice([b"", b"abc", smuggled, b"0\r\n\r\n" + smuggled])
        method = chance.choice([b"GET", b"POST", b"POST", b"PUT", b"HEAD", b"DELETE"])
        target = b"%s%s-%d" % (prefix, client.name, number) if chance.random() < 0.95 else b"/nothing"
        lines = [b"%s %s HTTP/1.%d" % (method, target, chance.random() < 0.93), b"Host: a"]
        framing = chance.random()
        if framing < 0.4:
            lines.append(b"Content-Length: %d" % len(body))
        elif framing < 0.7:
            lines.append(b"Transfer-Encoding: chunked")
            cut = chance.randrange(len(body) + 1)
            parts = [(one, chance.choice([b"", b";x=y"])) for one in (body[:cut], body[cut:]) if one]
            body = b"".join(b"%x%s\r\n%s\r\n" % (len(one), more, one) for one, more in parts)
            body += b"0\r\n" + chance.choice([b"", b"X: y\r\n"]) + b"\r\n"
        else:
            body = b""
        if chance.random() < 0.1:
            lines += [b"Connection: Upgrade", b"Upgrade: websocket"]
        elif chance.random() < 0.1:
            more = [b"Connection: close", b"Expect: 100-continue", b"Connection: content-length, transfer-encoding"]
            lines.append(chance.choice(more))
        if chance.random() < 0.15:
            client.is_plain = False
            lines.insert(chance.randrange(1, len(lines) + 1), chance.choice(self.NASTY_FIELDS))
        plain = b"\r\n".join(lines) + b"\r\n\r\n" + body
        raw = self.mutated(chance, plain, chance.choice([0, 0, 0.4]))
        client.is_plain = client.is_plain and raw == plain
        return raw

    def response(self, chance, tag):
        """(what the app answers to the target with this tag, whether nothing is wrong in it)."""
        body = b"<%s>" % tag
        more = b"HTTP/1.1 200 OK\r\nX-App: 1\r\nContent-Length: %d\r\n\r\n<evil-%s>" % (len(tag) + 7, tag)
        status = chance.choice([b"200 OK", b"200 OK", b"404 No", b"204 None", b"304 Same", b"101 Switching"])
        version = chance.random() < 0.9
        head = b"HTTP/1.%d %s\r\nX-App: 1\r\n" % (version, status)
        if chance.random() < 0.1:
            head = b"HTTP/1.1 100 Continue\r\n\r\n" + head
        if chance.random() < 0.1:
            head += b"Connection: close\r\n"
        is_plain = chance.random() >= 0.1
        if not is_plain:
            head += chance.choice(self.NASTY_FIELDS) + b"\r\n"
        if status.startswith(b"101"):
            head += b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        framing = chance.random()
        if framing < 0.45:
            raw = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        elif framing < 0.9:
            raw = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            is_plain = is_plain and version == 1
        else:
            raw = head + b"\r\n" + body
        mutant = self.mutated(chance, raw, chance.choice([0, 0, 0.4]))
        return mutant + chance.choice([b"", b"", b"", more]), is_plain and mutant == raw

    # What comes of it

    def check(self, clients):
        """Raise AssertionError if something came of it that must not."""
        assert not self.errors, self.errors
        names = {client.name for client in clients}
        allowed, heads = {}, set()
        for client in clients:
            found, begun, _ = read = reference_requests(client.raw)
            for method, target, body in found:
                key = method, self.path(target), body
                allowed[key] = allowed.get(key, 0) + 1
            heads.update((one[0], self.path(one[1])) for one in found + [begun or (b"", b"")])
            self.counts["clients"] += 1
            self.counts["resets"] += client.is_reset
            try:
                seen = names & set(re.findall(rb"[g-z]{12}", client.received))
                assert seen <= {client.name}, "an answer to %r" % seen
                if not client.leaves:
                    self.check_answers(client, *read)
            except AssertionError as error:
                apps = {one[0] for request in read[0] + [read[1]] if request for one in self.scripts_for(request)}
                apps = [(app.received, app.sent, app.has_ended, app.was_reset) for app in apps]
                text = "%s\nseed: %d\nclient: %r\ngot: %r\napp: %r"
                raise AssertionError(text % (error, self.seed, client.raw, client.received, apps)) from error
        self.check_app(allowed, heads)

    def check_app(self, allowed, heads):
        """The app saw the requests that were sent, each of them once, and beginnings of such."""
        seen = {}
        for app in self.apps:
            upgrade = re.search(rb"\r\nUpgrade: websocket\r\n(?:[^\r]+\r\n)*\r\n", app.received)
            raw = app.received[: upgrade.end()] if upgrade else app.received  # raw bytes may follow
            found, begun, end = reference_requests(raw)
            assert end is not Wrong, "the app got %r" % raw
            assert not begun or begun in heads, "the app got %r" % raw
            for number, key in enumerate(found):
                assert key in allowed, "the app got %r" % (key,)
                self.counts["requests"] += 1
                seen[key] = seen.get(key, 0) + 1
                # What gets no answer on a connection that the app ends may be sent again, where that is safe.
                if app.has_ended and number == len(found) - 1 and key[0] != b"POST" and not key[2]:
                    seen[key] -= 1
                    self.counts["retries"] += 1
        for key, count in seen.items():
            assert count <= allowed[key], "the app got %d times %r" % (count, key)

    def path(self, target):
        """What the app is to get of a request target."""
        return re.sub(rb"\A/proxy/0*%d(?=/)" % self.app_port, b"", target)

    def check_answers(self, client, requests, begun, end):
        """Each request got its own answer, in order; what is no request got a refusal, and then the end."""
        asked = requests + [begun] if begun else requests
        rest = client.received
        number, is_last = 0, False
        while rest:
            assert not is_last, "something behind the last answer"
            method = asked[number][0] if number < len(asked) else b""
            answer = self.read_answer(rest, method, client.is_reset)
            if answer is None:
                self.counts["broken answers"] += 1
                is_last = True
                outcomes = self.outcomes(asked[number]) if number < len(requests) else None
                is_good = client.is_plain and client.is_patient and outcomes and outcomes[1]
                assert not is_good, "a good answer was cut off"
                break
            status, fields, body, rest = answer
            if 100 <= status < 200 and status != 101:
                continue
            self.counts["refusals" if status >= 400 else "answers"] += 1
            is_last = b"close" in fields.get(b"connection", b"")
            if number < len(asked):
                self.check_answer(client, asked[number], number < len(requests), status, fields, body)
            else:
                assert status >= 400, "an answer to what is no request"
                assert number == len(requests), "answers to what is no request"
                assert is_last, "a refusal of bytes behind which others may follow"
            if status == 101:
                return
            length = int(fields.get(b"content-length", b"0"))
            if method == b"HEAD" and status >= 400 and is_last and len(rest) == length:
                rest = b""  # a head that is refused is not known to be one of HEAD
            is_last = is_last or number >= len(requests)
            number += 1
        if client.is_patient and not is_last and not client.is_reset and end is not Short:
            assert number == len(requests) + (end is Wrong), "%d answers to %d requests" % (number, len(requests))

    def check_answer(self, client, asked, is_whole, status, fields, body):
        """It is what the app said, or an error; if the app said it well, it is no error."""
        possible, is_certain = self.outcomes(asked)
        if (status, body) in possible:
            return
        if client.is_local and not {b"content-length", b"transfer-encoding"} & set(fields):
            return  # it may have broken off: a Unix socket does not tell a reset from an end
        assert b"x-app" not in fields, "the app said %r, not %d %r" % (possible, status, body)
        assert status >= 300, "nobody said this: %d %r" % (status, body)
        assert not (is_certain and is_whole and client.is_plain), "a good answer became %d" % status

    def scripts_for(self, asked):
        return self.scripts.get((asked[0], self.path(asked[1])), [])

    def outcomes(self, asked):
        """(what answers a request may have got, whether the only one was plain and whole)."""
        possible, are_plain = [], []
        for app, is_upgrade, at, is_plain in self.scripts_for(asked):
            has_ended = app.has_ended and not app.was_reset
            possible.append(reference_response(app.sent[at:], asked[0], is_upgrade, has_ended))
            are_plain.append(is_plain and not app.has_ended)
        is_certain = len(possible) == 1 and are_plain[0] and isinstance(possible[0], tuple)
        return possible, is_certain

    @staticmethod
    def read_answer(raw, method, is_reset):
        """(status, fields, body, what is behind it); None if it breaks off."""
        head, end, rest = raw.partition(b"\r\n\r\n")
        if not end:
            return None
        fields = rb"((?:\r\n[!-9;-~]+: ?[\t -~\x80-\xff]*)*)"
        match = re.match(rb"HTTP/1\.1 ([1-9][0-9][0-9]) [\t -~\x80-\xff]*" + fields + rb"\Z", head)
        assert match, "the client got the head %r" % head
        pairs = [line.split(b":", 1) for line in match.group(2).split(b"\r\n")[1:]]
        fields = {name.lower(): value.strip() for name, value in pairs}
        status, body = int(match.group(1)), b""
        if status < 200 or status in (204, 304) or method == b"HEAD":
            return status, fields, b"", rest
        if fields.get(b"transfer-encoding") == b"chunked":
            while True:
                line = re.match(rb"([0-9a-f]+)\r\n", rest)
                assert line or re.match(rb"[0-9a-f]*\r?\Z", rest), "the client got the chunk %r" % rest
                size = int(line.group(1), 16) if line else 0
                if not line or len(rest) < line.end() + size + 2:
                    return None
                data, rest = rest[line.end() : line.end() + size], rest[line.end() + size :]
                assert rest.startswith(b"\r\n"), "the client got the chunk %r" % rest
                body, rest = body + data, rest[2:]
                if not size:
                    return status, fields, body, rest
        if b"content-length" in fields:
            size = int(fields[b"content-length"])
            return (status, fields, rest[:size], rest[size:]) if len(rest) >= size else None
        return None if is_reset else (status, fields, rest, b"")

    # How it runs

    async def batch(self, seed):
        self.seed, self.chance = seed, random.Random(seed)
        self.apps = []
        self.scripts = {}  # by method and path: the app's connection, whether it is an upgrade, where it is answered
        clients = [
            FuzzedClient(self, bytes(bytearray(self.chance.choice(b"ghijklmnopqrstuvwxyz") for _ in range(12))))
            for _ in range(self.BATCH)
        ]
        talks = [asyncio.ensure_future(client.talk()) for client in clients]
        try:
            await self.settle(clients, talks)
        finally:
            for talk in talks:
                talk.cancel()
            await asyncio.gather(*talks, return_exceptions=True)
        self.check(clients)

    async def settle(self, clients, talks):
        """Wait for all clients, and for the proxy to leave the app; those that everybody waits for end their side."""
        limit = time.monotonic() + WAIT
        pending = talks
        while pending or not all(app.is_lost for app in self.apps):
            assert time.monotonic() < limit, "a hang; it began with the seed %d" % self.seed
            before = self.progress
            if pending:
                done, pending = await asyncio.wait(pending, timeout=0.01)
                for talk in done:
                    talk.result()
            else:
                await asyncio.sleep(0.001)
            if self.progress != before:
                continue
            waiting = [app for app in self.apps if not app.has_ended and not app.is_lost]
            for app in waiting:
                app.end("eof")
            for client in clients:
                if client.has_sent and not waiting:
                    client.end()

    async def run(self, count):
        self.loop = asyncio.get_event_loop()
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))
        watcher = logging.Handler(logging.ERROR)
        watcher.emit = lambda record: self.errors.append(record.getMessage())
        logging.getLogger("port_proxy").addHandler(watcher)
        server = await self.loop.create_server(lambda: FuzzedApp(self), "127.0.0.1", 0)
        self.app_port = server.sockets[0].getsockname()[1]
        self.head = re.compile(
            rb"([!-~]+) /([!-~]*) HTTP/1\.1\r\nHost: localhost:%d\r\n(?:[^\r]+\r\n)*\r\n" % self.app_port
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket())]
            sockets[0].bind(("127.0.0.1", 0))
            self.proxy_port = sockets[0].getsockname()[1]
            if hasattr(socket, "AF_UNIX"):
                self.socket_path = os.path.join(folder, "proxy")
                sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                sockets[1].bind(self.socket_path)
            proxy = await PortProxy(Config(allow_hostnames=("*",), token="", any_owner=True)).start(sockets)
            try:
                for number in range((count + self.BATCH - 1) // self.BATCH):
                    await self.batch(self.first_seed + number)
            finally:
                logging.getLogger("port_proxy").removeHandler(watcher)
                await proxy.close()
                server.close()
                await server.wait_closed()
        return self.counts


def fuzz(count, seed):
    """Fuzz with that many clients; the counts of what came of it."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(Fuzzing(seed).run(count))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_fuzz():
    """PORT_PROXY_FUZZ and PORT_PROXY_FUZZ_SEED ask for more clients, and for others."""
    count = int(os.environ.get("PORT_PROXY_FUZZ", "2000"))
    counts = fuzz(count, int(os.environ.get("PORT_PROXY_FUZZ_SEED", "20261123")))
    sys.stdout.write("%s\n" % counts)
    assert counts["requests"] > counts["clients"] / 2
    assert counts["answers"] > counts["clients"] / 2
    assert counts["refusals"] > counts["clients"] / 10


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
        options.setdefault("whole_origin", True)  # as it is for the default base
        return background.do(port_proxy.check_port(examined, Config(**options)))

    def test_healthy_app_is_reported(self, background, upstream):
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
    def test_hostile_page_neither_breaks_nor_delays_the_check(self, upstream, monkeypatch, page):
        """Nor does it write control characters to the terminal."""
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page) + page
        app = upstream(lambda wire, app: (wire.until(b"\r\n\r\n"), wire.send(answer)))
        monkeypatch.setenv("PYTHONIOENCODING", "ascii")
        status, output, errors = run_program("--check", str(app.port))
        assert (status, errors) == (0, "")
        assert output.replace("\n", "").isprintable()

    @pytest.mark.parametrize("redirect", [b"/lab?x=secret", b"http://localhost:PORT/lab"])
    def test_report_names_what_an_app_needs(self, background, upstream, redirect):
        page = b"<script id=_dash-config></script><script src=\"/_dash/a.js?v=1\"></script><link href='/b.css'><form action=/c><a href=/b.css>"
        app = upstream(serve_examined(page, fussy=True, redirect=redirect))
        report = self.check(background, app.port)
        assert (report.redirect, report.rooted, report.refuses_host, report.refuses_origin) == ("/lab", ["/_dash/a.js", "/b.css", "/c"], True, True)
        assert (report.app, report.flag) == ("Dash", 'url_base_pathname="/proxy/absolute/%d/"' % app.port)
        status, text, errors = run_program("--check", str(app.port))
        assert (status, errors) == (0, "")
        for part in (
            "redirects  /lab", "/_dash/a.js, /b.css, /c", "refuses names that are not its own",
            "opens at /ws; refuses pages", 'url_base_pathname="/proxy/absolute/%d/"' % app.port,
        ):  # fmt: skip
            assert part in text

    @pytest.mark.parametrize(
        "text, past",
        [
            ("new WebSocket('ws://localhost:PORT/ws')", True), ("?protocol=ws%3A&hostname=0.0.0.0&port=PORT&pathname=%2Fws", True), ("http://127.0.0.1:PORT", True), ("ws://[::1]:PORT/", True),
            ("http://localhost:PORT0/", False), ("http://localhost:1/ PORT", False), ("location.host", False), ("http://elsewhere:PORT/", False),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("place", ["/", "/a/main.js"])
    def test_page_that_names_its_own_port_is_a_problem(self, background, upstream, text, past, place):
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

    def test_links_from_the_root_are_a_problem_without_the_whole_origin(self, background, upstream):
        app = upstream(serve_examined(b"<img src=/a>"))
        report = self.check(background, app.port, whole_origin=False)
        assert (report.ok, "--whole-origin yes" in report.problems[0]) == (True, True)
        assert self.check(background, app.port).problems == ()

    def test_page_that_fails_behind_its_redirect_is_a_problem(self, background, upstream):
        def serve(wire, app):
            if wire.message()[0] == "GET / HTTP/1.1":
                wire.send(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")

        app = upstream(serve)
        report = self.check(background, app.port)
        assert (report.ok, report.redirect, len(report.problems)) == (True, "/x", 1)

    @pytest.mark.parametrize("location, redirect, says", [
        ("/x?secret", "/x", "5 times in a row"), ("/", "/", "5 times in a row"),
        ("https://elsewhere.example/", "https://elsewhere.example/", None),
        ("http://localhost:PORT/", "/", "5 times in a row"), ("http://127.0.0.1:PORT#a", "/", "5 times in a row"),
        ("https://localhost:PORT/a?secret", "https://localhost:PORT/a", "It redirects to https at its own address"), ("https://LOCALHOST:PORT", "https://LOCALHOST:PORT", "It redirects to https at its own address"),
        ("http://localhost:1/x?secret", "http://localhost:1/x", None), ("//elsewhere.example/x", "//elsewhere.example/x", None), ("https://localhost:PORT0/", "https://localhost:PORT0/", None),
        ("https://user:secret@sso.example/a#secret", "https://sso.example/a", None), ("//user:secret@sso.example?secret", "//sso.example", None),
    ])  # fmt: skip
    def test_redirects_that_lead_to_no_page_are_reported(self, background, upstream, location, redirect, says):
        app = upstream(lambda wire, app: (wire.message(), wire.send(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % location.replace("PORT", str(app.port)).encode())))
        report = self.check(background, app.port)
        assert (report.ok, report.status, len(report.problems)) == (True, 302, 1 if says else 0)
        assert report.redirect == redirect.replace("PORT", str(app.port))
        assert not says or says in report.problems[0]

    def test_five_redirects_are_followed_to_the_page(self, background, upstream):
        def serve(wire, app):
            target = wire.message()[0].split(" ")[1]
            there = {"/": "/1", "/1": "/2", "/2": "/3", "/3": "/4", "/4": "/5"}.get(target, "")
            wire.send(b"HTTP/1.1 %s\r\nContent-Type: text/html\r\nContent-Length: 16\r\n\r\n<title>A</title>" % (("302 Found\r\nLocation: " + there) if there else "200 OK").encode())

        report = self.check(background, upstream(serve).port)
        assert (report.redirect, report.title, report.problems) == ("/5", "A", ())

    def test_no_field_is_sent_twice(self, background, upstream):
        """An app could refuse a second Host or Connection."""
        app = upstream(serve_examined(b""))
        self.check(background, app.port)
        for message in app.messages:
            names = [name.lower() for name, _ in message[1]]
            assert len(names) == len(set(names))
        assert {fields_of(message)["connection"] for message in app.messages} == {"close", "Upgrade"}

    def test_port_without_http_is_a_problem(self, background, upstream):
        speaking = upstream(lambda wire, app: (wire.send(b"SSH-2.0-x\r\n"), wire.more()))
        tls = upstream(lambda wire, app: wire.send(b"\x15\x03\x01\x00\x02\x02\x46" if wire.more() else b""))
        port = free_port()
        for number, speaks, says in ((port, "", "Nothing listens"), (speaking.port, "other", "does not answer HTTP"), (tls.port, "https", "--upstream-tls %d" % tls.port)):
            report = self.check(background, number)
            assert (report.ok, report.speaks, report.use) == (False, speaks, ())
            assert says in report.problems[0]
            status, text, errors = run_program("--check", str(number))
            assert (status, says in text, errors) == (1, True, "")

    def test_trouble_with_tls_is_a_problem(self, background, upstream, certificate):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(str(certificate / "both.pem"))

        def serve(wire, app):
            with contextlib.suppress(OSError):
                wire.sock = context.wrap_socket(wire.sock, server_side=True)
                answering(OK)(wire, app)

        secret, plain = upstream(serve), upstream(lambda wire, app: (wire.more(), wire.send(OK)))
        for port, says in ((secret.port, "--insecure-upstream accepts any"), (plain.port, "Does it speak TLS? See --upstream-tls.")):
            report = self.check(background, port, upstream_tls=(str(port),))
            assert (report.ok, report.speaks, report.use) == (False, "", ())
            assert says in report.problems[0]
        report = self.check(background, secret.port, upstream_tls=(str(secret.port),), insecure_upstream=True)
        assert (report.ok, report.speaks, report.status) == (True, "https", 200)

    def test_own_port_is_a_problem_at_its_own_address_alone(self, background, upstream):
        """The number alone does not tell: another program may have it at another address."""

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

    def test_proxy_at_any_free_port_is_named_by_the_path_alone(self, background, upstream):
        app = upstream(serve_examined(b""))
        report = self.check(background, app.port, port=0)
        assert (report.ok, report.use) == (True, ["/proxy/%d/" % app.port])

    @needs_proc
    def test_app_at_another_address_is_a_problem(self, background, upstream):
        app = upstream(answering(OK), host="127.0.0.2")
        report = self.check(background, app.port)
        assert (report.ok, report.addresses) == (False, ("127.0.0.2",))
        assert "listens at 127.0.0.2 alone" in report.problems[0]

    def test_command_prints_the_report(self, upstream):
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


def has_address(address):
    """Whether a program on this machine can listen at a loopback address; most systems have 127.0.0.1 alone."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


class TestCommandLine:
    def test_program_serves_until_a_signal(self, upstream):
        app = upstream(answering(OK))
        for number in (signal.SIGTERM, signal.SIGINT):
            with shell_proxy("--base", "/user/ana") as (process, port):
                with Wire.to(port) as wire:
                    wire.send(request("GET", "/user/ana/%d/" % app.port))
                    assert wire.message()[2] == b"ok"
                    process.send_signal(number)
                    assert wire.rest() == b""

    def test_banner_names_the_addresses(self):
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
            ("198.51.100.7 40000 192.0.2.7 22", (), r"(\d+):localhost:\1 ana@192\.0\.2\.7"),
            ("198.51.100.7 40000 192.0.2.7 22", ("--bind", "127.0.0.2"), r"(\d+):localhost:\1 ana@192\.0\.2\.7"),
            ("198.51.100.7 40000 192.0.2.7 22", ("--bind", "0.0.0.0"), r"(\d+):localhost:\1 ana@192\.0\.2\.7"),
            ("2001:db8::1 40000 2001:db8::7 2222", ("--token",), r"(\d+):localhost:\1 -p 2222 ana@2001:db8::7"),
            ("", (), None), ("x", (), None),
        ],
    )  # fmt: skip
    def test_banner_names_the_ssh_command(self, connection, options, line):
        if "127.0.0.2" in options and not has_address("127.0.0.2"):
            pytest.skip("this machine has no 127.0.0.2")
        environment = dict(os.environ, SSH_CONNECTION=connection, LOGNAME="ana")
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--port", "0"] + list(options), stdout=subprocess.PIPE, env=environment
        )
        begin = process.stdout.readline()
        process.terminate()
        process.wait(WAIT)
        with process.stdout:
            lines = (begin + process.stdout.read()).decode().rstrip("\n").split("\n")
        expected = "On your own machine, first:  ssh -N -L " + line if line else "It reaches every port .*"
        assert re.fullmatch(expected, lines[-1])

    @pytest.mark.parametrize(
        "options, says",
        [
            (("--base", "proxy"), "the base must be a path"), (("--port", "65536"), "a number from 0 to 65535"), (("--port", "x"), "invalid int value"),
            (("--host-allowlist", "a b"), "an allowed host is"), (("--head-timeout", "0"), "head_timeout must be greater than 0"), (("--bind", "192.0.2.1"), "no address of this machine"),
            (("--bind", "nowhere.invalid"), "no address of this machine"), (("--bind", "a..b"), "a..b is no address of this machine"),
            (("--trusted-proxy", "foo"), "a trusted proxy is an address, a network or unix, not 'foo'"), (("--token-file", sys.executable), "the token must consist of visible ASCII"), (("--verbose", "--quiet"), "not allowed with"), (("--frob",), "unrecognized arguments"),
        ],
    )  # fmt: skip
    def test_mistake_is_told_in_the_last_line(self, options, says):
        status, output, errors = run_program(*options)
        assert (status, output) == (2, "")
        assert says in errors.strip().split("\n")[-1]
        assert "Traceback" not in errors

    def test_port_in_use_is_told(self):
        with shell_proxy() as (_, port):
            status, output, errors = run_program("--port", str(port))
            assert (status, output) == (2, "")
            assert re.fullmatch(r"port_proxy: port %d of 127\.0\.0\.1 is in use by another program; .*--port.*\n" % port, errors)

    def test_help_and_version_are_printed(self):
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

    @pytest.mark.parametrize("options", [("--token",), ("--bind", "0.0.0.0")])
    def test_new_token_is_printed_despite_quiet(self, options):
        process = subprocess.Popen(
            [sys.executable, "-u", PROGRAM, "--port", "0", "--quiet"] + list(options), stdout=subprocess.PIPE
        )
        assert b"?token=" in process.stdout.readline()
        process.terminate()
        process.communicate(timeout=WAIT)

    def test_quiet_prints_nothing(self):
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-u", PROGRAM, "--port", str(port), "--quiet"], stdout=subprocess.PIPE
        )

        def answers():
            assert process.poll() is None
            with contextlib.suppress(ConnectionError), Wire.to(port) as wire:
                wire.send(b"GET /proxy/ HTTP/1.1\r\nHost: localhost:%d\r\n\r\n" % port)
                return status_of(wire.message()) == 200

        try:
            eventually(answers)
        finally:
            process.terminate()
            output, _ = process.communicate(timeout=WAIT)
        assert (process.returncode, output) == (0, b"")

    @pytest.mark.parametrize("place", ["closed", "a full disk", "a pipe that was left"])
    def test_banner_that_cannot_be_printed_is_told_on_stderr(self, place):
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

    def test_mistake_without_stderr_still_sets_the_exit_status(self):
        pytest.importorskip("resource")  # and so no Windows
        done = subprocess.run([sys.executable, PROGRAM, "--bind", "192.0.2.1"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2), timeout=WAIT)
        assert (done.returncode, done.stdout) == (2, b"")

    def test_no_token_at_a_public_address_is_warned_of(self):
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

    def test_json_log_has_a_line_per_request_and_per_message(self, upstream):
        app = upstream(answering(OK))
        process = subprocess.Popen([sys.executable, PROGRAM, "--port", "0", "--log-json", "--allow-hostname", "*"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        port = int(re.search(r":(\d+)/", process.stdout.readline().decode()).group(1))
        with Wire.to(port) as wire:
            wire.send(request("GET", "/proxy/%d/a?secret" % app.port))
            assert wire.message()[2] == b"ok"
            told = json.loads(process.stderr.readline().decode())
            wire.send(b"GARBAGE\r\n\r\n")  # a message that is about no request
            assert status_of(wire.message()) == 400
            message = json.loads(process.stderr.readline().decode())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
        assert 0 <= told.pop("seconds") < WAIT
        assert told == {
            "level": "info", "client": "127.0.0.1", "method": "GET", "target": "/proxy/%d/a?..." % app.port, "app": "localhost:%d" % app.port, "status": 200, "bytes": 2,
        }  # fmt: skip
        process.terminate()
        _, errors = process.communicate(timeout=WAIT)
        assert (process.returncode, errors) == (0, b"")
        assert sorted(message) == ["level", "message", "time"]
        assert (message["level"], "127.0.0.1 -> 400: " in message["message"]) == ("info", True)

    def test_stop_with_everything_under_way_is_quiet(self, upstream):
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

    def test_running_out_of_descriptors_only_delays(self, upstream):
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
    def test_environment_describes_the_hub(self):
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
    def test_environment_changes_one_field(self, change, field, value):
        assert getattr(port_proxy.hub_in(dict(HUB_ENVIRONMENT, **change)), field) == value

    @pytest.mark.parametrize("host, address", [("", "127.0.0.2"), ("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")])
    def test_program_listens_at_the_address_of_the_service(self, host, address):
        """A URL without a host stands for every address."""
        if not has_address(address):
            pytest.skip("this machine has no " + address)
        with self.running(url="http://%s:%%d/jh/user/al@ice.x%%%%2By/" % host) as (port, _):
            with Wire(socket.create_connection((address, port), WAIT)) as wire:
                wire.send(request("GET", "/jh/user/al@ice.x%2By/proxy/80/"))
                assert status_of(wire.message()) == 403

    def test_service_without_a_port_is_at_the_usual_one(self):
        environment = dict(os.environ, **dict(HUB_ENVIRONMENT, JUPYTERHUB_SERVICE_URL="https://127.0.0.1/"))
        with socket.socket() as sock:
            with contextlib.suppress(OSError):  # it is taken, or needs further rights: the program is refused as well
                sock.bind(("127.0.0.1", 443))
                sock.listen(1)
            done = subprocess.run(
                [sys.executable, PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, env=environment
            )
        assert (done.returncode, b"port 443 of 127.0.0.1" in done.stderr) == (2, True)

    def test_stop_does_not_wait_for_requests(self, upstream):
        """The Hub, and its user's click, wait for a server that stops."""
        model = {"kind": "user", "name": "al@ice.x+y", "scopes": ["access:servers"]}
        body = json.dumps(model).encode()
        head = b"HTTP/1.1 200 OK\r\nX-JupyterHub-Version: 6.1.0\r\nContent-Length: %d\r\n\r\n"
        hub = upstream(answering(head % len(body) + body))
        app = upstream(lambda wire, app: (wire.message(), app.happened.set(), wire.rest()))
        api = "http://127.0.0.1:%d/jh/hub/api" % hub.port
        with self.running("--shutdown-timeout", "600", api=api) as (port, _):
            wire = Wire.to(port)
            wire.send(request("GET", "/jh/user/al@ice.x%%2By/proxy/%d/" % app.port, "Authorization: token any"))
            assert app.happened.wait(WAIT)
        wire.close()  # only now, so that the request is under way when the program stops

    @pytest.mark.parametrize("name", ["JUPYTERHUB_OAUTH_ACCESS_SCOPES", "JUPYTERHUB_SERVICE_PREFIX", "JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_CLIENT_ID"])
    def test_missing_variable_is_named(self, name):
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
    def test_mistake_is_told_without_the_secret(self, change, options, says):
        environment = dict(os.environ, **dict(HUB_ENVIRONMENT, **dict({"JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:1/"}, **change)))
        done = subprocess.run([sys.executable, PROGRAM] + list(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, universal_newlines=True, env=environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr.strip().split("\n")[-1]
        assert "Traceback" not in done.stderr
        assert "server-token" not in done.stderr

    @contextlib.contextmanager
    def running(self, *options, url=HUB_ENVIRONMENT["JUPYTERHUB_SERVICE_URL"], api="", lines=1):
        """The program as a Hub starts it: (port, the lines that it prints). It must end at SIGINT, silently."""
        port = free_port()
        environment = dict(os.environ, **HUB_ENVIRONMENT)
        environment["JUPYTERHUB_SERVICE_URL"] = url % port
        environment.update({"JUPYTERHUB_API_URL": api, "JUPYTERHUB_ACTIVITY_URL": ""} if api else {})
        process = subprocess.Popen(
            [sys.executable, PROGRAM] + list(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        try:
            yield port, "".join(process.stdout.readline().decode() for _ in range(lines))
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=WAIT) == (b"", b"")
            assert process.returncode == 0
        finally:
            process.kill()
            process.wait()

    def test_program_sends_pages_to_the_hub(self):
        with self.running("--base", "/ports") as (port, banner), Wire.to(port) as wire:
            assert "/jh/user/al@ice.x%2By/ports/<port>/, for al@ice.x+y" in banner
            wire.send(request("GET", "/jh/user/al@ice.x%2By/ports/80/", *PAGE))
            assert fields_of(wire.message())["location"].startswith("/jh/hub/api/oauth2/authorize?")
            wire.send(request("GET", "/jh/user/al@ice.x%2By/ports/80/"))
            assert status_of(wire.message()) == 403

    def test_program_in_a_terminal_of_a_hubs_server_asks_for_a_port(self):
        """The environment is the same there, and the server has the port that it names."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            environment = dict(os.environ, **HUB_ENVIRONMENT)
            environment["JUPYTERHUB_SERVICE_URL"] %= sock.getsockname()[1]
            done = subprocess.run(
                [sys.executable, PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT, env=environment
            )
        assert (done.returncode, b"--port 0" in done.stderr) == (2, True)

    def test_program_with_a_port_of_its_own_is_not_the_hubs(self):
        with self.running("--port", "0", lines=2) as (_, banner):
            assert re.search(r"open http://127\.0\.0\.1:\d+/proxy/", banner)


# ---------------------------------------------------------------------------------------------------------------------
# Real programs
# ---------------------------------------------------------------------------------------------------------------------


class TestRealPrograms:
    def test_http_server_is_read_by_curl(self, tmp_path):
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

    def test_websockets_library_talks_to_itself(self, proxy):
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
    def test_browser_uses_every_feature_of_a_page(self, start, upstream, token):
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


LONG_NAMED_PROGRAM = """\
import http.server
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print(server.server_port)
server.serve_forever()
"""


@pytest.fixture(scope="class")
def long_name(tmp_path_factory):
    """A program with as long a name and title as one may have: its port, program and title."""
    folder = tmp_path_factory.mktemp("long")
    program = "a-program-with-a-very-long-name-that-goes-on-and-on-and-on.py"
    title = "Sales by region and quarter, " * 2 + "and what became of them"
    (folder / program).write_text(LONG_NAMED_PROGRAM)
    (folder / "index.html").write_text("<!DOCTYPE html><title>%s</title><p>hello" % title)
    command = [sys.executable, "-u", program]
    process = subprocess.Popen(command, cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield int(process.stdout.readline()), program, title
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class TestInChromium:
    """What a person sees and clicks, in real Chromium."""

    @pytest.fixture
    def page(self, profile):
        page = Page(profile)
        yield page
        page.close()
        assert page.complaints == []

    @needs_proc
    def test_ports_page_leads_to_the_apps(self, page, upstream):
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
    def test_ports_page_tells_that_the_proxy_is_away(self, page, proxy):
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
    def test_ports_page_works_by_keyboard_and_without_script(self, page, upstream):
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
    def test_waiting_page_opens_the_app_once_it_is_up(self, page, proxy, upstream, form, script):
        """Also where scripts are off."""
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
    def test_sign_in_page_leads_to_the_app(self, page, start, upstream, host):
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

    def test_sign_in_page_follows_an_app_that_redirects_elsewhere(self, page, start, upstream):
        elsewhere = upstream(serve_page(b"a login of its own"))
        app = upstream(answering(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\nContent-Length: 0\r\n\r\n" % elsewhere.port))
        proxy = start(token=TOKEN)
        page.open("http://localhost:%d/proxy/%d/" % (proxy.port, app.port))
        page.until("document.activeElement.name === 'token'")
        page.type(TOKEN)
        page.click("button")
        page.until("document.querySelector('#app').innerText === 'a login of its own'")

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_two_apps_with_links_from_the_root_keep_apart(self, page, profile, start, upstream, token):
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

    @needs_proc
    @pytest.mark.parametrize("width, scheme", [(1000, "light"), (1000, "dark"), (360, "light"), (360, "dark")])
    def test_pages_fit_their_window(self, page, start, long_name, width, scheme):
        """Nothing is cut off or must be scrolled sideways, down to a phone; dark where the person likes it dark."""
        open_proxy, proxy = start(), start(token=TOKEN)
        port, program, title = long_name
        page.open("http://localhost:%d/proxy/%d/" % (open_proxy.port, port))  # so that its title is known
        page.open("http://localhost:%d/proxy/" % open_proxy.port)
        line = page.tell("document.querySelector('#p%d').innerText" % port)
        assert program in line
        assert title in line
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
        """Go to a page, wherever it leads; a page of the Hub that waits for a server is looked at again.

        A server takes seconds to start, and many times as long on a busy machine.
        """
        limit = time.monotonic() + 4 * WAIT
        while True:
            answer = self.ask("GET", target, *PAGE)
            location = fields_of(answer).get("location")
            if location:
                target = re.sub("https?://[^/]*", "", location)
            elif "/hub/spawn-pending/" not in target:
                return answer
            else:
                time.sleep(0.3)  # less would keep the Hub busy with this alone
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
c.Spawner.start_timeout = c.Spawner.http_timeout = 120
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


def relay_to(port):
    """Serve connections by handing every byte on to `port`, and back; or hang up, where the relay refuses."""

    def pour(source, sink):
        with contextlib.suppress(OSError):
            while source.more():
                data, source.buffer = source.buffer, b""
                sink.send(data)
        sink.end()

    def serve(wire, relay):
        if relay.refuses:
            return
        try:
            other = Wire.to(port)
        except OSError:  # the Hub is not up yet, or not any more
            return
        with other:
            other.sock.settimeout(4 * WAIT)
            back = threading.Thread(target=pour, args=(other, wire))
            back.start()
            pour(wire, other)
            back.join()

    return serve


@pytest.fixture(scope="module", params=["plain", "internal TLS", "inside jupyterhub-singleuser"])
def hub(request, real_app, tmp_path_factory):
    """A Hub whose servers are this program; or its usual ones, with the module among their extensions."""
    command = jupyter_command("jupyterhub")
    jupyter_command("configurable-http-proxy")
    folder = tmp_path_factory.mktemp("hub")
    port, hub_port, internal = free_port(), free_port(), request.param == "internal TLS"
    relay = Upstream(relay_to(hub_port))
    relay.refuses = False
    spawned = [sys.executable, PROGRAM]
    if request.param == "inside jupyterhub-singleuser":
        spawned = [jupyter_command("jupyterhub-singleuser"), "--allow-root", "--ServerApp.jpserver_extensions={'port_proxy': True}"]
    text = HUB_CONFIG.format(
        port=port, hub_port=hub_port, api_port=free_port(), home=str(folder / "home"), command=spawned, here=str(HERE),
        default_url="/proxy/%d%s" % (real_app.port, "/" if internal else ""), internal_ssl=internal, scheme="https" if internal else "http",
    )  # fmt: skip
    is_jupyter = len(spawned) > 2
    if is_jupyter:
        for name, number in (("bind", hub_port), ("connect", relay.port)):
            text += "c.JupyterHub.hub_%s_url = 'http://127.0.0.1:%d'\n" % (name, number)
    (folder / "config.py").write_text(text)
    try:
        server = Server([command, "-f", str(folder / "config.py")], folder, port, "/jh/hub/api/")
        server.is_jupyter, server.relay = is_jupyter, relay
        yield server
        server.close()
    finally:
        relay.close()
    assert not relay.failures


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

    def test_every_token_of_the_hubs_is_cut(self, hub, app, ana):
        """Also where the request came in by another, or by cookie; those that the Hub does not know are the app's."""
        target = "%s/proxy/%d/" % (ANA_PATH, app.port)
        about = {"note": "test", "scopes": ["access:servers!user=" + ANA]}
        tokens = [self.api(hub, "POST", "/users/al@ice.x%2By/tokens", **about)["token"] for _ in range(3)]
        referer = "Referer: http://127.0.0.1:%d%slab?token=%s&a" % (hub.port, target, tokens[2])
        for visitor, lines in ((Visitor(hub.port), ("Authorization: token " + tokens[0],)), (ana, ())):
            answer = visitor.ask("GET", "%s?token=%s&token=apps-own" % (target, tokens[1]), referer, *lines)
            assert (status_of(answer), app.messages[-1][0]) == (200, "GET /?token=apps-own HTTP/1.1")
            fields = fields_of(app.messages[-1])
            assert fields["referer"].endswith("/lab?a")
            assert "authorization" not in fields
            assert not any(token in repr(app.messages[-1]) for token in tokens)

    def test_too_many_tokens_are_refused(self, hub, app, ana):
        """Each of them would be a question to the Hub."""
        count = len(app.messages)
        query = "&".join("token=%d" % number for number in range(20))
        answer = ana.ask("GET", "%s/proxy/%d/?%s" % (ANA_PATH, app.port, query))
        assert (status_of(answer), len(app.messages)) == (400, count)

    def test_token_that_the_hub_cannot_be_asked_about_is_refused(self, hub, app, ana):
        """It could be a token of the Hub's, which the app must not see."""
        if not hub.is_jupyter:
            pytest.skip("TestHub tests this program alone, with a Hub that fails at once")
        count = len(app.messages)
        hub.relay.refuses = True
        for wire in list(hub.relay.wires):  # those that are kept alive
            with contextlib.suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)
        try:
            answer = ana.ask("GET", "%s/proxy/%d/?token=unknown" % (ANA_PATH, app.port))
        finally:
            hub.relay.refuses = False
        assert (status_of(answer), b"does not answer" in answer[2]) == (503, True), answer
        assert len(app.messages) == count

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
        visitor.visit("/jh/hub/spawn-pending/al@ice.x%2By/gpu-2")  # until it has started
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


FOREIGN = "Origin: https://a.example"
BY_TOKEN = "Authorization: token " + TOKEN
# The first lines of the configuration, and the statuses of requests from a page of a foreign origin.
ORIGINS = [
    ("c.ServerApp.allow_origin = '*'", [("POST", 403), ("PUT", 403), ("GET", 200)]),
    ("c.ServerApp.allow_origin = '*'\nc.ServerApp.disable_check_xsrf = True", [("POST", 200)]),
    ("c.ServerApp.allow_origin_pat = '.*'", [("POST", 403), ("GET", 200)]),
    ("c.ServerApp.allow_origin_pat = 'https?://.*'", [("POST", 403), ("GET", 200)]),
    ("c.ServerApp.allow_origin = 'https://a.example'", [("POST", 200), ("GET", 200)]),
    ("c.ServerApp.allow_origin_pat = r'https://.*\\.example'", [("POST", 200), ("GET", 200)]),
]


class TestJupyterConfiguration:
    @pytest.fixture
    def begin(self, tmp_path):
        """Start a Jupyter server of this configuration; it must not stumble over anything."""
        started = []

        def begin(config, *options):
            started.append(start_jupyter(tmp_path, config, *options))
            return started[-1]

        yield begin
        for server in started:
            server.close()
            assert "Traceback" not in server.said

    @pytest.mark.parametrize("config, asked", ORIGINS, ids=[case_id(case[0]) for case in ORIGINS])
    def test_origin_that_jupyter_allows_may_do_what_jupyter_lets_it(self, begin, real_app, config, asked):
        """Where Jupyter allows any, its own handlers still ask for the XSRF token: a request to change something is
        refused then, unless it comes from the server's own page, or with a token."""
        visitor, target = Visitor(begin(config).port), "/nb/proxy/%d/" % real_app.port
        assert status_of(visitor.visit(target + "?token=" + TOKEN)) == 200
        for method, status in asked:
            assert status_of(visitor.ask(method, target, FOREIGN)) == status
        is_open = dict(asked)["POST"] == 200
        for lines, status in (
            ((FOREIGN, BY_TOKEN), 200), ((FOREIGN, "Sec-Fetch-Site: same-origin"), 200),
            ((FOREIGN, "Sec-Fetch-Site: cross-site"), 200 if is_open else 403),
            (("Origin: http://127.0.0.1:%d" % visitor.port,), 200),
        ):  # fmt: skip
            assert status_of(visitor.ask("POST", target, *lines)) == status
        assert status_of(visitor.ask("GET", target + "ws", FOREIGN, *HANDSHAKE, no_body=True)) == 101
        if not is_open:  # to allow one more would not help
            told = visitor.ask("POST", target, "Origin: null")[2].decode()
            says = "which is 127.0.0.1:%d. A program may send it with a token of Jupyter's.\n" % visitor.port
            assert told.endswith(says)

    @pytest.mark.parametrize("line, says", [
        ("host_allowlist = 'a'", "host_allowlist must be a sequence"), ("frob = 1", "frob"),
        ("head_timeout = -1", "head_timeout must be"),
    ])  # fmt: skip
    def test_mistake_in_the_file_is_told(self, begin, line, says):
        self.check_mistake(begin("c.PortProxy." + line), says)

    @pytest.mark.parametrize("option, says", [
        ("frob=1", "frob"), ("head_timeout=x", "head_timeout"), ("max_fields=7.5", "max_fields"),
        ("any_owner=yes", "any_owner"),
    ])  # fmt: skip
    def test_mistake_on_the_command_line_is_told(self, begin, option, says):
        self.check_mistake(begin("", "--PortProxy." + option), says)

    def check_mistake(self, server, says):
        """Jupyter runs without the proxy, and names the field."""
        assert status_of(Visitor(server.port).ask("GET", "/nb/proxy/80", BY_TOKEN)) == 404
        told = "port_proxy: /nb/proxy/ is not served, for c.PortProxy cannot be used: (.*)"
        (complaint,) = re.findall(told, server.said)
        assert says in complaint

    def test_options_on_the_command_line_have_the_types_of_their_fields(self, begin, upstream, real_app):
        """All are strings there: Jupyter knows no types of ours."""
        silent = upstream(lambda wire, app: (wire.message(), wire.rest()))
        options = (
            "preserve_host=true", "whole_origin=False", "response_timeout=0.5", "max_fields=20",
            "host_allowlist=a.invalid, b.invalid",
        )  # fmt: skip
        visitor = Visitor(begin("", *["--PortProxy." + option for option in options]).port)
        target = "/nb/proxy/%d/" % real_app.port
        assert status_of(visitor.ask("GET", target, BY_TOKEN)) == 200
        assert fields_of(real_app.messages[-1])["host"] == "127.0.0.1:%d" % visitor.port
        assert status_of(visitor.ask("GET", "/nb/proxy/%d/" % silent.port, BY_TOKEN)) == 504
        assert status_of(visitor.ask("GET", target, BY_TOKEN, *["X: y"] * 20)) == 431
        for host, status in (("a.invalid", 502), ("b.invalid", 502), ("c.invalid", 403)):
            assert status_of(visitor.ask("GET", "/nb/proxy/%s:80/" % host, BY_TOKEN)) == status

    def test_option_that_is_repeated_makes_a_list(self, begin):
        options = ["--PortProxy.host_allowlist=" + name for name in ("a.invalid", "b.invalid")]
        visitor = Visitor(begin("", *options).port)
        for host, status in (("a.invalid", 502), ("b.invalid", 502), ("c.invalid", 403)):
            assert status_of(visitor.ask("GET", "/nb/proxy/%s:80/" % host, BY_TOKEN)) == status

    def test_configuration_file_may_append_and_only_look(self, begin, real_app):
        """Traitlets hands out a value that is not known yet; a field that was only read keeps its default."""
        looked = "".join("c.PortProxy.%s\n" % name for name in ("any_owner", "head_timeout", "token"))
        config = looked + "c.PortProxy.host_allowlist.append('a.invalid')\nc.PortProxy.domains.append('b.invalid')\n"
        visitor = Visitor(begin(config).port)
        assert status_of(visitor.ask("GET", "/nb/proxy/%d/" % real_app.port, BY_TOKEN)) == 200
        for host, status in (("a.invalid", 502), ("c.invalid", 403)):
            assert status_of(visitor.ask("GET", "/nb/proxy/%s:80/" % host, BY_TOKEN)) == status


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

    def test_refusal_advises_with_options_of_jupyters(self, target, visitor):
        here = "which is 127.0.0.1:%d" % visitor.port
        for origin, says in (
            (
                "https://xn--e1afmkfd.example",
                here + ". Set c.ServerApp.allow_origin https://xn--e1afmkfd.example if it may.",
            ),
            ("null", here + ". A program may send it with a token of Jupyter's."),
        ):  # fmt: skip
            answer = visitor.ask("POST", target + "/", "Origin: " + origin)
            assert (status_of(answer), answer[2].decode().rstrip().endswith(says)) == (403, True), answer
        answer = visitor.ask("GET", "/nb/proxy/xn--a.b:80/")
        assert answer[2].decode().rstrip().endswith("Set c.PortProxy.host_allowlist xn--a.b to allow it.")

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

    def test_slow_websocket_loses_nothing_when_its_client_leaves(self, jupyter, upstream, visitor):
        """An app that takes nothing stops the client; the end of the connection comes behind all that was sent."""
        sent, received = [], []

        def serve(wire, app):
            wire.message()
            wire.send(SWITCHING)
            app.happened.wait(WAIT)
            count, data = len(wire.buffer), True
            while data:
                data = wire.sock.recv(1 << 20)
                count += len(data)
            received.append(count)
            app.let_go.set()

        app = upstream(serve)
        before = rss_kib(jupyter.process.pid)
        wire = visitor.wire()
        wire.send(visitor.head("GET", "/nb/proxy/%d/" % app.port, *HANDSHAKE))
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101")

        def send():
            for _ in range(MUCH >> 20):
                wire.send(MEBIBYTE)
                sent.append(1)
            wire.close()

        thread = threading.Thread(target=send)
        thread.start()
        steady(lambda: sum(sent))
        assert sum(sent) < 60
        assert rss_kib(jupyter.process.pid) - before < 16 << 10
        app.happened.set()
        thread.join(WAIT)
        assert app.let_go.wait(WAIT)
        assert received == [MUCH]

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
    @pytest.mark.parametrize("kind, bound", [("kept-alive", 16), ("WebSocket", 32)])
    def test_idle_connection_takes_little_memory(self, upstream, tmp_path, kind, bound):
        """Less than the bound in KiB: a buffer of 64 KiB that is kept for each would be far above it."""

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

    def test_measured_process_has_a_processor_of_its_own(self):
        """Also when whoever starts it keeps to the other one already."""
        if len(CORES) < 2:
            pytest.skip("this machine has one processor, or does not say")
        run = "import os, test_port_proxy as tests; tests.pin(0, 0); tests.pin(0, -1); print(sorted(os.sched_getaffinity(0)))"
        done = subprocess.run([sys.executable, "-c", run], stdout=subprocess.PIPE, timeout=WAIT, cwd=str(HERE), check=True)
        assert done.stdout.decode().strip() == str(CORES[1:2])

    def test_benchmark_runs_without_pytest(self):
        if not hasattr(os, "fork"):
            pytest.skip("the benchmark's upstream waits for its standard input, as Windows cannot")
        run = "import runpy, sys; sys.modules['pytest'] = None; sys.argv[:] = ['', 'bench', '--seconds', '0.05', '--repeats', '1']; runpy.run_path(%r, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", run % str(HERE / "test_port_proxy.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=4 * WAIT, cwd=str(HERE))
        assert (done.returncode, done.stderr) == (0, b"")
        browser = b"as a browser, no head twice, 64 connections: "
        lines = [line for line in done.stdout.split(b"\n") if line.startswith(b"| ")]
        assert lines[1].startswith(b"| " + browser + b"requests/s | ")
        if os.path.exists("/proc/self/stat"):
            assert re.match(re.escape(b"| " + browser) + rb"CPU us each \|  \| [0-9.]+ ", lines[2])
        for row in (browser + b"requests/s", b"200 B, 64 connections: requests/s", b"download: MB/s", b"upload: MB/s", b"WebSocket, 32 B, 64 connections: echoes/s"):
            assert re.search(re.escape(b"| " + row) + rb" \| [0-9.]+ \([0-9.]+-[0-9.]+\) \| [0-9.]+ ", done.stdout)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark: `python3 test_port_proxy.py bench`, side by side on this machine; it needs no pytest
# ---------------------------------------------------------------------------------------------------------------------


BROWSER_REQUEST = """\
GET %(prefix)s/browse/%(number)d/item-%(mixed)08x.json?page=%(number)d&t=%(mixed)x HTTP/1.1
Host: localhost:%(port)d
Connection: keep-alive
sec-ch-ua-platform: "Linux"
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36
sec-ch-ua: "Chromium";v="140", "Not=A?Brand";v="24", "Google Chrome";v="140"
sec-ch-ua-mobile: ?0
Accept: */*
Sec-Fetch-Site: same-origin
Sec-Fetch-Mode: cors
Sec-Fetch-Dest: empty
Referer: http://localhost:%(port)d%(prefix)s/view/%(number)d
Accept-Encoding: gzip, deflate, br, zstd
Accept-Language: en-GB,en;q=0.9,de;q=0.8
Cookie: theme=dark; _xsrf=2|1a2b3c4d|0123456789abcdef0123456789abcdef|1700000000; session=eyJhbGciOiJIUz.%(mixed)08x
If-None-Match: "%(mixed)08x-%(number)d"

""".replace("\n", "\r\n")
BROWSER_RESPONSE = """\
HTTP/1.1 200 OK
Server: uvicorn
Date: Mon, 01 Jan 2024 %(hour)02d:%(minute)02d:%(second)02d GMT
Content-Type: application/json; charset=utf-8
Content-Length: %(length)d
ETag: "%(mixed)08x-%(number)d-new"
Last-Modified: Sun, 31 Dec 2023 23:59:59 GMT
Cache-Control: private, no-cache
Vary: Accept-Encoding, Cookie
X-Content-Type-Options: nosniff
X-Frame-Options: SAMEORIGIN
X-Request-Id: %(mixed)08x%(number)d
Set-Cookie: session=eyJhbGciOiJIUzI1NiJ9.%(mixed)08x; Path=/; HttpOnly; SameSite=Lax

""".replace("\n", "\r\n")


def bench_numbers(number):
    """What tells one request of a browser, or its response, from every other one."""
    return {"number": number, "mixed": number * 2654435761 & 0xFFFFFFFF}  # no two numbers are mixed to the same


class BenchUpstream(asyncio.Protocol):
    """What lies behind the proxies: answers GETs with as many bytes as their path says, those of a browser with a head
    and a body that never repeat, swallows PUTs, echoes WebSockets."""

    BLOCK = bytes(1 << 20)
    browsed = 0

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
        elif b"/browse/" in head.partition(b"\r\n")[0]:
            self.transport.write(self.next_browsed())
        else:
            size = int(head.split(b" ", 2)[1].rpartition(b"/")[2])
            first = min(size, 65536)
            self.missing = size - first
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % size + self.BLOCK[:first])
            self.pour()

    @classmethod
    def next_browsed(cls):
        cls.browsed += 1
        numbers = bench_numbers(cls.browsed)
        tags = '"a tag", ' * (cls.browsed % 37)
        body = '{"id": %(number)d, "name": "item %(mixed)08x", "tags": [' % numbers + tags + '""]}'
        minutes, second = divmod(cls.browsed, 60)
        numbers.update(length=len(body), second=second, minute=minutes % 60, hour=minutes // 60 % 24)
        return (BROWSER_RESPONSE % numbers + body).encode()

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


def bench_browser(system, connections, seconds):
    """GETs as a browser sends them on kept-alive connections, no two alike: (answers, seconds). A proxy that remembers
    heads gains nothing here."""
    number = 0

    def ask(wire):
        nonlocal number
        number += 1
        wire.sock.send((BROWSER_REQUEST % dict(bench_numbers(number), prefix=system.prefix, port=system.port)).encode())

    wires = {}
    for _ in range(connections):
        wire = Wire.to(system.port)
        wires[wire.sock] = wire
    begun, answers = time.perf_counter(), 0
    with selectors.DefaultSelector() as selector:
        for wire in wires.values():
            selector.register(wire.sock, selectors.EVENT_READ)
            ask(wire)
        while time.perf_counter() - begun < seconds:
            for key, _ in selector.select(1):
                wire = wires[key.fileobj]
                assert wire.more(), "%s hung up" % system.name
                head, mark, body = wire.buffer.partition(b"\r\n\r\n")
                if mark and len(body) == int(re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", head).group(1)):
                    assert head.startswith(b"HTTP/1.1 200 "), head
                    wire.buffer = b""
                    answers += 1
                    ask(wire)
    taken = time.perf_counter() - begun
    for wire in wires.values():
        wire.close()
    return answers, taken


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
        (
            "as a browser, no head twice, 64 connections: requests/s", "CPU us each", 1e6,
            lambda system: bench_browser(system, 64, seconds),
        ),
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
    # The rows that most resemble what a person does come first; what idles is measured before, on a fresh proxy.
    first = work[0][0]
    results = {first: {}, first.split(":")[0] + ": " + work[0][1]: {}}

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
        if not measured:  # the system does not tell
            continue
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
    parser = argparse.ArgumentParser(description="Tests are run by pytest; this measures, and fuzzes for longer.")
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    command = commands.add_parser("bench", help="compare port_proxy with what else is installed: nginx, haproxy")
    command.add_argument("--seconds", type=float, default=2, help="length of one measurement (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, help="how often each is measured (default: %(default)s)")
    commands.add_parser("bench-upstream")
    command = commands.add_parser("fuzz", help="send what is wrong through a proxy, from both sides")
    command.add_argument("count", type=int, nargs="?", default=100000, help="how many clients (default: %(default)s)")
    command.add_argument("--seed", type=int, default=1, help="where the random choices begin (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "bench-upstream":
        bench_upstream()
        return
    if options.command == "fuzz":
        begun = time.monotonic()
        print(fuzz(options.count, options.seed))
        print("%.0f clients a second" % (options.count / (time.monotonic() - begun)))
        return
    names = ["direct", "port_proxy"] + [name for name in ("nginx", "haproxy") if shutil.which(name)]
    cores = len(CORES) or os.cpu_count()
    load = "wrk" if shutil.which("wrk") else "its own load, which is what limits the fastest"
    print("CPython %s, %s, %d processors, %s" % (sys.version.split()[0], platform.platform(), cores, load), flush=True)
    bench(names, options.seconds, options.repeats)


if __name__ == "__main__":
    bench_main()
