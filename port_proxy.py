#!/usr/bin/env python3
"""port_proxy: every port of a machine, reachable through one HTTP port.

Run ``python3 port_proxy.py`` and open ``http://localhost:8888/proxy/8080/``: it shows what listens on port 8080 of
this machine.  The standard library is all it needs, from CPython 3.6 on.

    <base>/<port>/path?q                    /path?q at localhost:<port>, the prefix stripped
    <base>/absolute/<port>/path?q           the full <base>/absolute/<port>/path?q at localhost:<port>
    <base>/<host>:<port>/path?q             as the first, on a host of the allowlist
    <base>/absolute/<host>:<port>/path?q    as the second, on a host of the allowlist
    http://<port>.localhost:8888/path?q     /path?q at localhost:<port>, which has this origin for itself

The story of one request.  A client's bytes become a `RequestHead` (heads) or a refusal (errors); how its body is framed
is settled once, strictly (framing).  The target names a `Route` (routes), or leaves open which app it means and is sent
there (strays); it must be allowed (access).  The head for the upstream is written anew from what was understood
(rewriting) and sent on a connection to it, fresh or pooled (upstream).  The body follows while the answer is already
awaited; the answer's head is parsed as strictly, written anew and relayed piece by piece (exchange).  After a 101 the
two connections are spliced (exchange).  The server (server) accepts, repeats this for every request of a connection,
and is the one place that turns errors into answers (pages).  What needs no waiting takes a short cut through the same
steps: `Exchange.begin` and `finish`.

Sections, each using only names above it: errors, configuration, heads, streams, framing, routes, rewriting, access,
strays, ports, upstream, probe, pages, jupyterhub, exchange, server, jupyter, check, command line.

Embedding:

    from port_proxy import Config, PortProxy
    proxy = await PortProxy(Config(port=0)).start()
    print(proxy.port)
    await proxy.close()
"""

import argparse
import asyncio
import base64
import contextlib
import errno
import fnmatch
import functools
import hashlib
import hmac
import html
import ipaddress
import json
import logging
import os
import re
import secrets
import select
import selectors
import signal
import socket
import ssl
import stat
import struct
import sys
import time
import zlib
from http import HTTPStatus
from typing import (
    Any,
    Awaitable,
    Callable,
    Coroutine,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Pattern,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
)
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlencode, urljoin, urlsplit

__version__ = "0.1.0"
__all__ = ["Config", "PortProxy", "ProxyError", "main"]

logger = logging.getLogger("port_proxy")

Fields = Tuple[Tuple[str, str], ...]  # (name, value) pairs, latin-1; order, case and duplicates as on the wire
FOREVER = float("inf")
_T = TypeVar("_T")


# ---------------------------------------------------------------------------------------------------------------------
# Errors: raised where they are found, turned into an answer in one place (`PortProxy`)
# ---------------------------------------------------------------------------------------------------------------------


class ProxyError(Exception):
    """A request that this proxy answers itself because it refuses it or cannot serve it.

    status: the HTTP status code of the answer; detail: one or more sentences for the person who reads it (plain text,
    escaped where it is shown); fields: further (name, value) pairs of the answer's head.  Raises ValueError for fields
    that cannot stand in a head, such as a Location with a line break in it.
    """

    def __init__(self, status: int, detail: str, fields: Fields = ()) -> None:
        super().__init__(status, detail)
        for name, value in fields:
            if not _OWN_FIELD.fullmatch("%s:%s" % (name, value)):
                raise ValueError("the field %s has what cannot stand in a message's head" % ascii(name))
        self.status = status
        self.detail = detail
        self.fields = fields


_OWN_FIELD = re.compile("[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")  # RFC 9110 section 5.5


class ClientGone(Exception):
    """The client left, or takes nothing any more: there is nobody to answer."""


class Truncated(Exception):
    """A connection ended in the middle of a message."""


class Stalled(Exception):
    """A peer let a deadline pass."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every limit and timeout, once, with its reason
# ---------------------------------------------------------------------------------------------------------------------


class Hub(NamedTuple):
    """The JupyterHub that started this server, as it says in the server's environment (`hub_in`)."""

    prefix: str  # the path of this server, such as /user/ana, below which the proxy's base lies
    user: str  # whose server it is
    api_url: str
    api_token: str  # the server's own, which is also the secret of its OAuth client
    client_id: str
    authorize_url: str  # where browsers sign in
    callback_url: str  # where they come back to, sent as the Hub gave it
    access_scopes: FrozenSet[str]  # one of them, or access:servers, lets in
    server_name: str = ""  # that of a named server
    home: str = ""  # where the prefix itself leads; the proxy's base by default
    activity_url: str = ""
    activity_interval: float = 300.0  # seconds
    is_secure: bool = False  # known to be served over HTTPS, whatever reaches us
    host_cookies: bool = False  # cookies get the __Host- prefix, and with it the path /
    cookie_options: Tuple[Tuple[str, str], ...] = ()  # further attributes of cookies; "" for one without a value


class Config(NamedTuple):
    """What one proxy does; immutable, checked by `PortProxy`, which raises ValueError for what makes no sense.

    Sizes are in bytes, times in seconds.  There is no cap on a body and no total timeout on a request that moves.
    """

    base: str = "/proxy"  # the path all forms live under; "/" for none
    bind: str = "127.0.0.1"  # address or name to listen on
    port: int = 8888  # 0 takes any free one
    # Hosts besides this machine's loopback names: exact names and addresses, globs ("*.example.org"); or a callable
    # that is given the host as written, lower-cased and without brackets, and decides alone.
    host_allowlist: Union[Sequence[str], Callable[[str], bool]] = ()
    preserve_host: bool = False  # pass the client's Host to the upstream instead of the target's
    domains: Sequence[str] = ("localhost",)  # where the host is <port>.<domain>, it names the port; not under a Hub
    # Whether every path of our origin is ours, so that what leaves an app's prefix (/static/app.js) can be led back to
    # it, and our cookies may be sent to all paths.  None: where base is the default or the root, and no proxy in front.
    whole_origin: Optional[bool] = None

    # Who may come in.  token: None asks for none where only this machine's users can connect, and makes a random one
    # elsewhere; "any" makes one everywhere; "" never asks for one.
    token: Optional[str] = None
    allow_hostnames: Sequence[str] = ()  # further names that a proxy without a token answers to: exact, globs, "*"
    allow_origins: Sequence[str] = ()  # further origins whose pages may use it: "https://a.example.org", "*"
    allow_preflight: bool = False  # let CORS preflights, which carry no credentials, reach the apps
    # Instead of all that: `await authorize(head, visit, route)`, asked once per request and Upgrade before anything is
    # connected; it admits by returning, refuses by raising ProxyError(status, detail), and redirects by raising
    # ProxyError(302, "", (("Location", url),)).  `route` is None for the proxy's own page.
    authorize: Optional[Callable[..., Awaitable[None]]] = None
    hub: Optional[Hub] = None  # instead of all that too: sign-in by the JupyterHub that started this server
    trusted_proxies: Sequence[str] = ()  # addresses or networks whose X-Forwarded fields are believed, or "unix"
    certfile: Optional[str] = None  # PEM, serves HTTPS; with the key in it, or in keyfile
    keyfile: Optional[str] = None
    client_ca: Optional[str] = None  # PEM: only clients with a certificate that one of these signed may connect
    upstream_tls: Sequence[str] = ()  # "PORT" or "HOST:PORT" of upstreams that speak TLS
    insecure_upstream: bool = False  # do not verify the certificates of those on this machine
    any_owner: bool = False  # also reach ports of this machine on which another ordinary user listens

    max_connections: int = 8192  # of clients; an idle one makes room for a new one
    max_tunnels: int = 6144  # WebSockets, so that requests have room beside them
    max_head_bytes: int = 65536  # cookies of a whole hub fit; Node allows 16 KiB, nginx 32 KiB
    max_target_bytes: int = 16384  # OAuth and notebook URLs fit; nginx and Apache allow 8 KiB
    max_fields: int = 200  # Apache allows 100
    max_chunk_line_bytes: int = 4096  # 16 digits and any sensible extension
    max_trailer_bytes: int = 16384  # trailers are read only to be dropped
    max_interim_responses: int = 32  # 1xx heads before the final one; a server sends one or two

    head_timeout: float = 30.0  # from a head's first byte to its last, however slowly they drip
    keep_alive_timeout: float = 120.0  # a client's connection between requests; browsers close sooner
    connect_timeout: float = 10.0  # all addresses of a host together
    response_timeout: float = 3600.0  # from the request's last byte to the response's head; models think for long
    stall_timeout: float = 3600.0  # a client that neither sends its body on nor takes the response's
    linger_timeout: float = 5.0  # reading on behind an early answer, so that the client gets to see it
    shutdown_timeout: float = 5.0  # for requests that run when the proxy is told to stop

    max_idle_upstreams: int = 1024  # pooled connections to all upstreams together; as many as were used at once
    idle_upstream_timeout: float = 4.0  # below the 5 s of Node and uvicorn, which close without warning


# ---------------------------------------------------------------------------------------------------------------------
# Heads: the grammar of RFC 9112 sections 2 to 5, full-match, and what a head is once it has been understood
# ---------------------------------------------------------------------------------------------------------------------

# Heads are decoded as latin-1, which maps every byte to one character and back.  Character classes are spelt out: \d,
# \s and \w also match what is not ASCII.  No pattern has two ways to match the same text, so none can be made slow.
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
_VERSION = r"HTTP/([0-9])\.([0-9])"
# Visible ASCII: browsers send "|", "{", "^" and others raw, which RFC 3986 would not have.  A "#" never gets this far.
_REQUEST_LINE = re.compile(r"(%s) ([!\"$-~]+) %s" % (TOKEN, _VERSION))
_STATUS_LINE = re.compile(r"%s ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?" % _VERSION)
_FIELD = re.compile(r"(%s):([\t -~\x80-\xff]*)\r\n" % TOKEN)
_FIELD_SECTION = re.compile(r"(?:%s:[\t -~\x80-\xff]*\r\n)*\r\n" % TOKEN)
_ABSOLUTE_FORM = re.compile(r"(?:http|https)://([^/?]*)(/[^?]*)?(\?.*)?", re.IGNORECASE)
# RFC 3986 section 3.2.2 without user information; an IPvFuture literal has never been seen.
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_RESPONSE_BEGINS = b"HTTP/"
# What can never be right, wherever a head breaks off: control bytes, and CR or LF apart from each other.
_ILLEGAL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")


class RequestHead(NamedTuple):
    """A request as it was understood (RFC 9112 section 3).

    target: origin form, or "*"; raw.  authority: host and port as the client wrote them, from the absolute form or
    else from Host, "" on an HTTP/1.0 request without one.  version: "1.0" or "1.1".
    """

    method: str
    target: str
    authority: str
    version: str
    fields: Fields


class ResponseHead(NamedTuple):
    """A response as it was understood (RFC 9112 section 4); version: "1.0" or "1.1"."""

    status: int
    reason: str
    version: str
    fields: Fields


class Response(NamedTuple):
    """An answer of our own, whole."""

    status: int
    fields: Fields
    body: bytes


class ReceivedFields(Tuple[Tuple[str, str], ...]):
    """The fields of a head that was received, which are looked up again and again.

    by_name: all values by lower-cased name, in order.
    """

    by_name: Dict[str, List[str]]

    @classmethod
    def of(cls, section: str) -> "ReceivedFields":
        """The fields in a valid field section."""
        fields = cls([(name, value.strip(" \t")) for name, value in _FIELD.findall(section)])
        fields.by_name = {}
        for name, value in fields:
            fields.by_name.setdefault(name.lower(), []).append(value)
        return fields


def field_values(fields: Fields, name: str) -> List[str]:
    """All values of the field called `name` (lower case), in order."""
    if type(fields) is ReceivedFields:
        return list(fields.by_name.get(name, ()))  # theirs to change: heads are remembered
    return [value for key, value in fields if key.lower() == name]


_NO_TOKENS: FrozenSet[str] = frozenset()


def field_tokens(fields: Fields, name: str) -> FrozenSet[str]:
    """The members of the list-valued field called `name`, lower-cased."""
    values = field_values(fields, name)
    if not values:
        return _NO_TOKENS
    return frozenset([member.strip(" \t").lower() for value in values for member in value.split(",")])


def is_authority(text: str) -> bool:
    """Whether `text` is a valid host with or without a port, and without user information."""
    return bool(_AUTHORITY.fullmatch(text))


def parse_request(head: bytes, config: Config) -> RequestHead:
    """Parse a request's head, from its first byte to the empty line; ProxyError 4xx or 505 if it does not match."""
    line, rest = _split_head(head)
    method, target, version = _parse_request_line(line)
    if len(target) > config.max_target_bytes:
        raise ProxyError(414, "The request target is longer than %d bytes." % config.max_target_bytes)
    fields = _parse_fields(rest, config)
    hosts = field_values(fields, "host")
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise ProxyError(400, "A request must have exactly one Host field; this one has %d." % len(hosts))
    authority = hosts[0] if hosts else ""
    if hosts and not is_authority(authority):
        raise ProxyError(400, "The Host field does not hold a valid host and port.")
    if method == "CONNECT":
        raise ProxyError(405, "CONNECT is refused: this is no forward proxy.", (("Allow", "GET, HEAD, POST, OPTIONS"),))
    if not target.startswith("/") and not (target == "*" and method == "OPTIONS"):
        authority, target = _parse_absolute_form(method, target)
    return RequestHead(method, target, authority, version, fields)


def parse_response(head: bytes, config: Config) -> ResponseHead:
    """Parse a response's head, from its first byte to the empty line; ProxyError 400 if it does not match."""
    line, rest = _split_head(head)
    match = _STATUS_LINE.fullmatch(line)
    if not match or match.group(1) != "1" or match.group(2) not in "01":
        raise ProxyError(400, "The status line is not one of HTTP/1.0 or HTTP/1.1.")
    version = "1." + match.group(2)
    return ResponseHead(int(match.group(3)), match.group(4) or "", version, _parse_fields(rest, config))


def serialise_request(head: RequestHead) -> bytes:
    """The bytes of a request's head."""
    return _serialise("%s %s HTTP/%s" % (head.method, head.target, head.version), head.fields)


def serialise_response(head: ResponseHead) -> bytes:
    """The bytes of a response's head; its version is ours, whatever the record says (RFC 9110 section 2.5)."""
    return _serialise("HTTP/1.1 %d %s" % (head.status, head.reason), head.fields)


def check_partial_head(head: bytes, start: int, is_request: bool, config: Config) -> None:
    """Refuse the beginning of a head as soon as it is too long or cannot become a valid one (ProxyError).

    start: up to where it was checked before, or a little less.
    """
    if _ILLEGAL.search(head, start):
        raise ProxyError(400, "The message head has a control byte, or a CR or LF that is no part of a CRLF.")
    end = head.find(b"\r\n")
    if is_request:
        if end >= max(0, start - 1):  # it has just come
            _parse_request_line(head[:end].decode("latin-1"))
        elif end < 0 and len(head) > config.max_target_bytes:
            raise ProxyError(414, "The request line is longer than %d bytes." % config.max_target_bytes)
    elif not head.startswith(_RESPONSE_BEGINS[: len(head)]):
        raise ProxyError(400, "It does not begin with HTTP/.")
    if len(head) > config.max_head_bytes:
        raise ProxyError(431, "The message head is longer than %d bytes." % config.max_head_bytes)


def _split_head(head: bytes) -> Tuple[str, str]:
    line, _, rest = head.decode("latin-1").partition("\r\n")
    return line, rest


def _parse_request_line(line: str) -> Tuple[str, str, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise ProxyError(
            400, "The request line is not 'METHOD TARGET HTTP/1.1' with single spaces and a target in ASCII."
        )
    method, target, major, minor = match.groups()
    if major != "1" or minor not in "01":
        raise ProxyError(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    return method, target, "1." + minor


def _parse_absolute_form(method: str, target: str) -> Tuple[str, str]:
    """Authority and origin form of a target in absolute form; its authority overrides Host (RFC 9112 section 3.2.2)."""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if not match or not is_authority(match.group(1)):
        raise ProxyError(400, "The request target is neither a path nor an http URL.")
    authority, path, query = match.groups()
    if method == "OPTIONS" and not path and not query:
        return authority, "*"  # RFC 9112 section 3.2.4
    return authority, (path or "/") + (query or "")


def _parse_fields(section: str, config: Config) -> Fields:
    """The field lines up to and including the empty line (RFC 9112 section 5)."""
    if not _FIELD_SECTION.fullmatch(section):
        raise ProxyError(400, _what_is_wrong_with(section))
    fields = ReceivedFields.of(section)
    if len(fields) > config.max_fields:
        raise ProxyError(431, "The message head has more than %d fields." % config.max_fields)
    return fields


def _what_is_wrong_with(section: str) -> str:
    for line in section.split("\r\n"):
        if line and not _FIELD.fullmatch(line + "\r\n"):
            if line[0] in " \t":
                return "A field line is folded, or begins with white space (RFC 9112 section 5.2)."
            if re.match(TOKEN + "[ \t]+:", line):
                return "A field line has white space before its colon (RFC 9112 section 5.1)."
            break
    return "A field line is not 'name: value' with a token as its name and no control bytes (RFC 9112 section 5)."


def _serialise(start_line: str, fields: Fields) -> bytes:
    lines = [start_line]
    lines.extend(["%s: %s" % field for field in fields])
    lines.append("\r\n")
    return "\r\n".join(lines).encode("latin-1")


# ---------------------------------------------------------------------------------------------------------------------
# Streams: one peer's connection, what waits for its bytes, and the one timer that looks after all of them
# ---------------------------------------------------------------------------------------------------------------------

_RECEIVE_BYTES = 65536
_HOT_RECEIVE_BYTES = 1 << 19  # where a receive was filled: for a large body it is the number of receives that counts
_MOST_QUEUED_BYTES = 65536  # that a peer has not taken yet, or that nobody has used: then the other side is stopped
_BACKLOG = 1024  # connections that nobody has accepted yet
_MOST_AT_ONCE = 256  # sockets that the kernel tells of at a time
_UNIX = getattr(socket, "AF_UNIX", None)


def plain_address(text: str) -> str:
    """An address without its zone, and IPv4 where it is that mapped to IPv6."""
    if ":" not in text:
        return text
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


class SocketTransport(asyncio.Transport):
    """A connected socket, without encryption, under asyncio's contract for transports.

    asyncio's own has a quarter of the receive size and several times the memory, and differs from version to version.
    """

    __slots__ = (
        "_has_ended",
        "_is_closing",
        "_is_lost",
        "_is_reading",
        "_is_writing_ended",
        "_is_writing_paused",
        "_loop",
        "_number",
        "_peername",
        "_protocol",
        "_queue",
        "_receive_bytes",
        "_sock",
        "_unsent",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: asyncio.BaseProtocol, peername: Any
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._peername = peername
        self._number = sock.fileno()  # selectors make a text of every socket that they do not know, but not of a number
        self._unsent: Optional[memoryview] = None  # of what was written: what the kernel has not taken yet,
        self._queue: Optional[bytearray] = None  # and what was written behind that
        self._receive_bytes = _RECEIVE_BYTES
        self._is_reading = self._has_ended = self._is_closing = self._is_lost = False
        self._is_writing_paused = self._is_writing_ended = False
        sock.setblocking(False)
        if isinstance(peername, tuple):  # that of a Unix socket is a path
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.set_protocol(protocol)
        protocol.connection_made(self)
        self.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """The "socket", its "peername", and while it is open its "sockname"."""
        if name == "socket":
            return self._sock
        if name == "peername":
            return self._peername
        try:
            return self._sock.getsockname() if name == "sockname" else default
        except OSError:
            return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol: asyncio.Protocol = protocol  # type: ignore[assignment]

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._is_closing

    def is_reading(self) -> bool:
        return self._is_reading

    def pause_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._number)

    def resume_reading(self) -> None:
        if not self._is_reading and not self._has_ended and not self._is_closing:
            self._loop.add_reader(self._number, self._receive)
            self._is_reading = True

    def _receive(self) -> None:
        try:
            data = self._sock.recv(self._receive_bytes)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if not data:
            self.pause_reading()
            self._has_ended = True
            if not self._protocol.eof_received():
                self.close()
            return
        if len(data) < _RECEIVE_BYTES:
            self._receive_bytes = _RECEIVE_BYTES
        elif len(data) == self._receive_bytes:
            self._receive_bytes = _HOT_RECEIVE_BYTES
        self._protocol.data_received(data)

    def get_write_buffer_size(self) -> int:
        if self._unsent is None:
            return 0
        return len(self._unsent) + (len(self._queue) if self._queue else 0)

    def write(self, data: Any) -> None:
        """Send `data`, which must not change later, or queue what the kernel does not take."""
        if self._is_closing or not data:
            return
        if self._unsent is not None:
            self._queue = self._queue or bytearray()
            self._queue += data
        else:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._lose(error)
                return
            if sent == len(data):
                return
            self._unsent = memoryview(data)[sent:]
            self._loop.add_writer(self._number, self._send)
        if not self._is_writing_paused and self.get_write_buffer_size() > _MOST_QUEUED_BYTES:
            self._is_writing_paused = True
            self._protocol.pause_writing()

    def _send(self) -> None:
        """Send of what is queued as much as the kernel takes."""
        assert self._unsent is not None
        try:
            sent = self._sock.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._unsent, self._queue = memoryview(self._queue) if self._queue else None, None
        if self._unsent is None:
            self._loop.remove_writer(self._number)
            if self._is_writing_ended:
                self._end_writing()
            if self._is_closing:
                self._lose(None)
        if self._is_writing_paused and self.get_write_buffer_size() <= _MOST_QUEUED_BYTES // 4:
            self._is_writing_paused = False
            self._protocol.resume_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._is_writing_ended and not self._is_closing:
            self._is_writing_ended = True
            if self._unsent is None:
                self._end_writing()

    def _end_writing(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:  # reset by the peer
            self._lose(error)

    def close(self) -> None:
        if not self._is_closing:
            self.pause_reading()
            self._is_closing = True
            if self._unsent is None:
                self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    def _lose(self, error: Optional[OSError]) -> None:
        if self._is_lost:
            return
        self.pause_reading()
        self._is_closing = self._is_lost = True
        if self._unsent is not None:
            self._loop.remove_writer(self._number)
            self._unsent = self._queue = None
        getattr(self._loop, "call_promptly", self._loop.call_soon)(self._lost, error)

    def _lost(self, error: Optional[OSError]) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()
            del self._protocol  # which knows its transport: no circle is left to be collected


_CAN_READ = getattr(select, "EPOLLIN", 0)
_CAN_WRITE = getattr(select, "EPOLLOUT", 0)


class PromptSelector(selectors.BaseSelector):
    """Linux's epoll for asyncio's loop, which calls the `readers` itself, each at once when its socket can be read.

    readers: by the socket's number; `watch` adds one.  calls: to be made, with an argument each, before the kernel is
    asked again.  is_due: set when there is something new for the loop to do, which `select` otherwise keeps away from
    as long as only readers are to be called.  failed: told what one raised.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self.readers: Dict[int, Callable[[], object]] = {}
        self.calls: List[Tuple[Callable[[Any], object], Any]] = []
        self.is_due = False
        self._failed = failed
        self._epoll = select.epoll()
        self._keys: Dict[int, selectors.SelectorKey] = {}  # of what asyncio itself looks after
        self._masks: Dict[int, int] = {}  # what the kernel watches, by the socket's number

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys[number] = selectors.SelectorKey(fileobj, number, events, data)
        try:
            self._update(number)
        except OSError:
            del self._keys[number]
            raise
        return key

    modify = register

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = self._keys.pop(number)
        self._update(number)
        return key

    def watch(self, number: int, reader: Callable[[], object]) -> None:
        """Call `reader` whenever the socket can be read, until `ignore`."""
        self.readers[number] = reader
        try:
            self._update(number)
        except OSError:  # the kernel watches no more of them
            del self.readers[number]
            raise

    def ignore(self, number: int) -> bool:
        """Undo `watch`; whether there was something to undo."""
        if self.readers.pop(number, None) is None:
            return False
        self._update(number)
        return True

    def _update(self, number: int) -> None:
        events = self._keys[number].events if number in self._keys else 0
        is_read = number in self.readers or events & selectors.EVENT_READ
        mask = (_CAN_READ if is_read else 0) | (_CAN_WRITE if events & selectors.EVENT_WRITE else 0)
        if not mask:
            del self._masks[number]
            try:
                self._epoll.unregister(number)
            except OSError:  # closed already
                pass
            return
        if number in self._masks:
            self._epoll.modify(number, mask)
        else:
            self._epoll.register(number, mask)
        self._masks[number] = mask

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        """Call readers until something else is to be done, for at most `timeout` s; what asyncio itself looks after."""
        told: List[Tuple[int, int]] = []
        until = None if timeout is None else time.monotonic() + timeout
        reader_of = self.readers.get
        self.is_due = False
        while True:
            while self.calls:
                call, argument = self.calls.pop(0)
                try:
                    call(argument)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self._failed(error)
            found = self._epoll.poll(0 if self.is_due else timeout, _MOST_AT_ONCE)
            for number, mask in found:
                reader = reader_of(number)
                if reader is not None and mask != _CAN_WRITE:
                    try:
                        reader()
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self._failed(error)
                    if mask == _CAN_READ:
                        continue
                events = 0 if mask == _CAN_READ else selectors.EVENT_WRITE
                told.append((number, events | (0 if mask == _CAN_WRITE else selectors.EVENT_READ)))
            if told or self.is_due or not found:
                return self._ready(told)
            if until is not None:
                timeout = until - time.monotonic()
                if timeout <= 0:
                    return []

    def _ready(self, told: List[Tuple[int, int]]) -> List[Tuple[selectors.SelectorKey, int]]:
        """What asyncio itself looks after, of what the kernel has told; readers may have changed that since."""
        pairs = [(self._keys[number], events) for number, events in told if number in self._keys]
        return [(key, events & key.events) for key, events in pairs if events & key.events]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def close(self) -> None:
        self._keys.clear()
        self.readers.clear()
        self._epoll.close()


class PromptLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, with readers that are called at once, instead of by a round of the loop and a handle for each.

    A tenth of what a small request costs.  For whoever starts a loop for nothing but this proxy: `new_loop`.
    """

    def __init__(self) -> None:
        self._prompt = PromptSelector(self._reader_failed)
        super().__init__(self._prompt)

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        number = fd if isinstance(fd, int) else fd.fileno()
        self._prompt.watch(number, functools.partial(callback, *args) if args else callback)

    def remove_reader(self, fd: Any) -> bool:
        return self._prompt.ignore(fd if isinstance(fd, int) else fd.fileno())

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        super().add_writer(fd if isinstance(fd, int) else fd.fileno(), callback, *args)

    def remove_writer(self, fd: Any) -> bool:
        return super().remove_writer(fd if isinstance(fd, int) else fd.fileno())

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        self._prompt.is_due = True
        return super().call_soon(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        self._prompt.is_due = True
        return super().call_at(*args, **kwargs)

    def call_promptly(self, callback: Callable[[Any], object], argument: Any) -> None:
        """As `call_soon`, but without a handle and a round of the loop."""
        self._prompt.calls.append((callback, argument))

    def stop(self) -> None:
        self._prompt.is_due = True
        super().stop()

    def _reader_failed(self, error: BaseException) -> None:
        self.call_exception_handler({"message": "what came of a connection could not be taken", "exception": error})


def new_loop() -> asyncio.AbstractEventLoop:
    """The best loop that the system has for the proxy."""
    return PromptLoop() if hasattr(select, "epoll") else asyncio.new_event_loop()


def can_watch_sockets(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a loop tells when a socket is ready, as `SocketTransport` needs it; that of Windows does not."""
    return isinstance(loop, asyncio.SelectorEventLoop)


def accepting(sock: socket.socket) -> Callable[[], Tuple[socket.socket, Any]]:
    """`sock.accept`, without the enumerations in which it looks up family and type for every connection."""
    accept, family = getattr(sock, "_accept", None), int(sock.family)
    if accept is None:
        return sock.accept

    def accept_plainly() -> Tuple[socket.socket, Any]:
        number, peername = accept()
        return socket.socket(family, socket.SOCK_STREAM, 0, number), peername

    return accept_plainly


class Acceptor:
    """Accepts the connections of a bound socket, each with a protocol of its own."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._accept_one = accepting(sock)
        self._protocol = protocol
        self._timer: Optional[asyncio.TimerHandle] = None
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self._go_on()

    def _go_on(self) -> None:
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_BACKLOG):
            try:
                sock, peername = self._accept_one()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors or no memory; they may come back
                self._loop.remove_reader(self._sock)
                self._timer = self._loop.call_later(1.0, self._go_on)
                self._loop.call_exception_handler({"message": "no connection can be accepted", "exception": error})
                return
            try:
                SocketTransport(self._loop, sock, self._protocol(), peername)
            except OSError:  # gone already
                sock.close()

    def close(self) -> None:
        """Accept no more."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._sock)


class Signal(asyncio.Future):  # type: ignore[type-arg]
    """What one peer's bytes, its end, or its readiness to take more are awaited by.

    on_given: called at once when it is given; asyncio calls back only in its next round.
    """

    on_given: Optional[Callable[[], None]] = None

    def give(self, failure: Optional[Exception] = None) -> None:
        """Let whoever awaits this go on, or see `failure` raised."""
        if not self.done():
            if failure is None:
                self.set_result(None)
            else:
                self.set_exception(failure)
            if self.on_given:
                self.on_given()


class PromptTask(asyncio.Future):  # type: ignore[type-arg]
    """Runs a coroutine as asyncio.Task does, but at once: from its beginning, and on when a `Signal` is given.

    This spares a request two rounds of the loop, and every event and every piece of a body one.  To asyncio it is no
    task: what asks for the current one, as `asyncio.wait_for` does, needs one made for it (`limited`).
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._coroutine = coroutine
        self._call_soon = loop.call_soon
        self._awaited: Optional["asyncio.Future[Any]"] = None
        self._is_to_end = False
        self._go_on()

    def _go_on(self, _: object = None) -> None:
        self._awaited = None
        try:
            if self._is_to_end:
                self._is_to_end = False
                awaited = self._coroutine.throw(asyncio.CancelledError())
            else:
                awaited = self._coroutine.send(None)
        except StopIteration:
            self.set_result(None)
        except asyncio.CancelledError:
            super().cancel()
        except Exception as error:
            self.set_exception(error)
        else:
            self._awaited = awaited
            if type(awaited) is Signal:
                awaited.on_given = self._go_on
            elif awaited is None:  # asyncio.sleep(0)
                self._call_soon(self._go_on)
            else:
                awaited.add_done_callback(self._go_on)
        if self._is_to_end and self._awaited is not None:  # cancelled while it ran
            self._is_to_end = False
            self.cancel()

    def cancel(self, *args: Any, **kwargs: Any) -> bool:
        """End the coroutine where it waits, as asyncio.Task does."""
        if self.done():
            return False
        if self._awaited is None or not self._awaited.cancel():
            self._is_to_end = True  # it is about to go on
        elif type(self._awaited) is Signal:
            self._go_on()
        return True


async def limited(awaitable: Awaitable[_T], seconds: float) -> _T:
    """What `asyncio.wait_for` does, also in a `PromptTask`, and without losing a cancellation, as that may before 3.12.

    Raises asyncio.TimeoutError.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        if not (await asyncio.wait([task], timeout=seconds))[0]:
            raise asyncio.TimeoutError()
        return task.result()
    finally:
        task.cancel()


class Stream(asyncio.Protocol):
    """One peer's connection: its bytes, its transport, its deadlines.

    accepted: called with the stream once it stands.
    buffer: bytes that have come and were not used yet.  ended: nothing more comes; failure: why, where that was no
    clean end.  on_data and on_end are called, without arguments, when bytes or the end come while nobody awaits them.
    address: the peer's, "" where it has none.  scheme: "https" over TLS.  was_heard: whether any byte came since that
    was last set False.  end_is_delimiter: only the connection's end tells the peer where what it is being sent ends,
    so that an abort must look like one.

    One coroutine reads and one writes at a time.  All deadlines are absolute, and kept by `Watch`: for the next byte,
    for what is queued to be taken, and for the connection as a whole.
    """

    __slots__ = (
        "_accepted",
        "_arrival",
        "_heir",
        "_is_stopped",
        "_is_writing_paused",
        "_room",
        "_sock",
        "_use",
        "address",
        "buffer",
        "end_deadline",
        "end_is_delimiter",
        "ended",
        "failure",
        "on_data",
        "on_end",
        "pull",
        "read_deadline",
        "scheme",
        "transport",
        "was_heard",
        "watch",
        "write_deadline",
    )
    transport: asyncio.Transport

    def __init__(self, watch: "Watch", accepted: Optional[Callable[["Stream"], None]] = None) -> None:
        self.watch = watch
        self.buffer = b""
        self.ended = False
        self.failure: Optional[BaseException] = None
        self.on_data: Optional[Callable[[], None]] = None
        self.on_end: Optional[Callable[[], None]] = None
        self.read_deadline = FOREVER
        self.write_deadline = FOREVER
        self.end_deadline = FOREVER
        self.end_is_delimiter = False
        self.was_heard = False
        self._accepted = accepted
        self._heir: Optional[asyncio.Protocol] = None
        self._arrival: Optional[Signal] = None  # of bytes or the end, where somebody waits for them
        self._use: Optional[Callable[[], bool]] = None  # what they are for, where that is known beforehand
        self._room: Optional[Signal] = None  # for more to be written, likewise
        self._is_stopped = False
        self._is_writing_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # Where the transport reads only what it is asked for: asks for at most so many bytes.
        self.pull: Optional[Callable[[int], None]] = getattr(transport, "pull", None)
        self._sock = transport.get_extra_info("socket")
        peer = transport.get_extra_info("peername")
        self.address = plain_address(peer[0]) if isinstance(peer, tuple) else ""
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self.watch.streams.add(self)
        if self._accepted:
            self._accepted(self)

    def data_received(self, data: bytes) -> None:
        if self.ended:  # a deadline has passed; what comes now comes too late
            return
        self.was_heard = True
        self.buffer = self.buffer + data if self.buffer else data
        failure = None
        if self._use is not None:
            try:
                if self._use():
                    return
            except Exception as error:  # whoever waits here knows what to make of it
                failure = error
            self._use = None
        if self._arrival is not None:
            self._arrival.give(failure)
        elif self.on_data:
            self.on_data()
        if len(self.buffer) > _MOST_QUEUED_BYTES and self._arrival is None:
            self._stop()

    def eof_received(self) -> bool:
        self.end()
        return self.transport.can_write_eof()

    def end(self, failure: Optional[BaseException] = None) -> None:
        """Note that nothing more comes, and why if that is no clean end; what has come can still be used."""
        if self.failure is None:
            self.failure = failure
        if not self.ended:
            self.ended = True
            if self._arrival is not None:
                self._arrival.give()
            if self.on_end:
                self.on_end()

    def connection_lost(self, exc: Optional[BaseException]) -> None:
        if self._heir is not None:  # some transports tell of it whom they knew when they learnt of it
            self._heir.connection_lost(exc)  # type: ignore[arg-type]
            return
        self.watch.forget(self)
        if isinstance(exc, OSError):
            self._save_unread()
        self.end(exc)
        self.resume_writing()

    def _save_unread(self) -> None:
        """Read what the kernel still holds: an upstream that answers early and closes may have reset the connection
        before its answer was read, and transports stop reading when a write fails."""
        sock = self._sock
        if sock is None or self.scheme == "https":
            return
        try:
            with socket.fromfd(sock.fileno(), sock.family, sock.type) as copy:
                copy.setblocking(False)
                for data in iter(lambda: copy.recv(_RECEIVE_BYTES), b""):
                    self.data_received(data)
        except OSError:  # nothing more
            pass

    def pause_writing(self) -> None:
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self._room is not None:
            self._room.give()

    now = staticmethod(time.monotonic)  # the clock by which deadlines are told, in seconds

    async def more(
        self, deadline: float = FOREVER, limit: int = _RECEIVE_BYTES, use: Optional[Callable[[], bool]] = None
    ) -> bool:
        """Wait until `buffer` has grown; False at the peer's clean end; raises its failure (OSError, Stalled).

        limit: how many bytes are asked for where the transport reads only what it is asked for.  use: called when bytes
        have come, whoever waits going on only when it returns False, or raises; not called at such a transport.
        """
        length = len(self.buffer)
        if not self.ended:
            self.read_deadline = deadline
            if self.pull:
                self.pull(limit)
            self._let_go_on()
            self._arrival = Signal(loop=self.watch.loop)
            use = self._use = None if self.pull else use
            try:
                await self._arrival
                if use is not self._use:  # it has had what it wants, whatever has come behind that meanwhile
                    return True
            finally:
                self._arrival = self._use = None
                self.read_deadline = FOREVER
        if len(self.buffer) > length or not self.ended:
            return True
        if self.failure is not None:
            raise self.failure
        return False

    async def take(self, limit: int, deadline: float = FOREVER) -> bytes:
        """At most `limit` bytes, from the buffer or as they come; b"" at the clean end; raises as `more` does."""
        if not self.buffer:
            await self.more(deadline, min(limit, _RECEIVE_BYTES))
        return self.cut(limit)

    def cut(self, count: int) -> bytes:
        """At most the first `count` bytes of the buffer, which are used now."""
        data = self.buffer[:count]
        self.drop(count)
        return data

    def cut_all(self) -> bytes:
        """As `cut`, of whatever is there."""
        data, self.buffer = self.buffer, b""
        if self._is_stopped:
            self._let_go_on()
        return data

    def drop(self, count: int) -> None:
        """As `cut`, where the bytes are of no further use."""
        self.buffer = self.buffer[count:]
        if self._is_stopped and len(self.buffer) <= _MOST_QUEUED_BYTES:
            self._let_go_on()

    def _stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            self.pause_reading()

    def _let_go_on(self) -> None:
        if self._is_stopped:
            self._is_stopped = False
            self.resume_reading()

    def write(self, data: bytes) -> None:
        """Send bytes, or queue them behind those that the peer has not taken yet; then `flush`."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def send(self, data: bytes, timeout: float) -> bool:
        """`write`, with `timeout` s for the peer to take it; whether it is ready for more, or else `flush` is due."""
        if self.transport.is_closing():
            return False
        self.transport.write(data)
        self.write_deadline = self.now() + timeout
        return not self._is_writing_paused

    async def flush(self, timeout: float, source: Optional["Stream"] = None) -> None:
        """Wait until the peer has taken enough of what was written; OSError if it is gone or lets `timeout` s pass.

        What is still queued then has as much time again, counted from here.  source: where it comes from, which is
        stopped meanwhile.
        """
        self.write_deadline = self.now() + timeout
        if self._is_writing_paused:
            if source is not None:
                source._stop()
            self._room = Signal(loop=self.watch.loop)
            try:
                await self._room
            finally:
                self._room = None
                if source is not None:
                    source._let_go_on()
        if self.transport.is_closing():
            raise ConnectionResetError(errno.ECONNRESET, "the connection is closed")

    def queued(self) -> int:
        """How many bytes wait for the peer to take them."""
        try:
            return self.transport.get_write_buffer_size()
        except AttributeError:  # before 3.11, over TLS, between the connection's loss and our being told
            return 0

    def is_quiet(self) -> bool:
        """Whether everything that came was used, and more may come."""
        return not (self.buffer or self.ended or self.transport.is_closing())

    def is_fresh(self) -> bool:
        """Whether nothing is under way: no byte that was not used, not even in the kernel, none to be sent, no end."""
        return self.is_quiet() and not self.queued() and not _poll(self._sock, _READABLE)

    def expire(self, now: float) -> None:
        """Act on the deadlines that have passed, and on a reset of a connection that is not read; called by `Watch`."""
        queued = self.queued()
        if now > self.read_deadline and not queued:  # who has not taken our answer yet is not idle
            self.read_deadline = FOREVER
            self.end(Stalled())
        if now > self.end_deadline or (now > self.write_deadline and queued):
            self.end_deadline = self.write_deadline = FOREVER
            self.end(Stalled())
            self.abort()
        elif self._is_unwatched() and _poll(self._sock, _HANG_UP if self.pull else 0):
            self.abort()

    def _is_unwatched(self) -> bool:
        """Whether the loop does not look at the connection, which is open both ways."""
        is_reading = getattr(self.transport, "is_reading", None)  # not in 3.6
        try:
            return is_reading is not None and not self.ended and not self.transport.is_closing() and not is_reading()
        except RuntimeError:  # before 3.11, over TLS, between the connection's loss and our being told
            return False

    def end_writing(self) -> None:
        """Send what is queued, then tell the peer that no more will come, as far as the transport can."""
        if self.transport.is_closing():
            return
        if not self.transport.can_write_eof():
            self.close()
            return
        try:
            self.transport.write_eof()
        except OSError:  # 3.6, where the peer has reset the connection
            self.abort()

    def close(self) -> None:
        """Send what is queued, for as long as the last `flush` allowed or else a minute, and close."""
        if not self.transport.is_closing():
            allowed = self.queued() and self.write_deadline < FOREVER
            self.end_deadline = self.write_deadline if allowed else self.now() + 60
            self.transport.close()

    def abort(self) -> None:
        """Close at once; whoever reads or writes here sees a failure, never a clean end.

        So does the peer where only the connection's end delimits what it is being sent.
        """
        if not self.ended:
            self.end(ConnectionAbortedError(errno.ECONNABORTED, "the proxy gave the connection up"))
        sock = self._sock
        if self.end_is_delimiter and sock is not None and sock.family != _UNIX and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def pause_reading(self) -> None:
        """Stop receiving; the kernel then stops the peer."""
        try:
            self.transport.pause_reading()
        except (RuntimeError, AttributeError):  # before 3.7 these two refuse to do nothing; and as in `queued`
            pass

    def resume_reading(self) -> None:
        """Receive again."""
        try:
            self.transport.resume_reading()
        except (RuntimeError, AttributeError):
            pass

    def hand_over(self, protocol: asyncio.Protocol) -> bytes:
        """Let `protocol` have all that comes from now on; the bytes that had come before are returned."""
        self.transport.set_protocol(protocol)
        self._heir = protocol
        self.write_deadline = FOREVER  # that of a message; what comes now has none
        earlier = self.cut_all()
        self.resume_reading()
        return earlier


_READABLE = getattr(select, "POLLIN", 0)
_CAN_POLL = hasattr(select, "poll")  # not on Windows
_HANG_UP = getattr(select, "POLLRDHUP", 0)  # the peer has ended its side; Linux alone tells


def _poll(sock: Any, events: int) -> bool:
    """Whether the kernel has something to tell of a connection: a failure or hang-up, or one of `events`."""
    number = -1 if sock is None or not _CAN_POLL else sock.fileno()
    if number < 0:
        return False
    poll = select.poll()
    poll.register(number, events)
    return bool(poll.poll(0))


class Watch:
    """All open connections, and one coarse timer for all of their deadlines instead of one for every read."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.loop = loop
        self.interval = interval
        self.streams: Set[Stream] = set()
        self.is_stopping = False  # whether the proxy has been told to stop, and new requests are not served
        self.stirred = False  # whether an app was used, or a byte of one went by, since the last look
        self.on_activity: Optional[Callable[[], None]] = None  # called when it was, at most once an interval
        self._empty: Optional["asyncio.Future[None]"] = None
        self._timer = loop.call_later(interval, self._tick)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(self.interval, self._tick)
        now = time.monotonic()
        for stream in list(self.streams):
            try:
                stream.expire(now)
            except Exception as error:  # of one connection, which must not keep the others from their deadlines
                logger.error("internal error: %r", error)
        if self.stirred and self.on_activity:
            self.on_activity()
        self.stirred = False

    def forget(self, stream: Stream) -> None:
        """Take out a connection that is no more."""
        self.streams.discard(stream)
        if not self.streams and self._empty and not self._empty.done():
            self._empty.set_result(None)

    async def close(self, timeout: float) -> None:
        """Give connections that are being closed `timeout` s to send what is queued, abort the rest, stop the timer."""
        for patience in (timeout, 1.0):
            if self.streams:
                self._empty = self.loop.create_future()
                await asyncio.wait([self._empty], timeout=patience)
            for stream in list(self.streams):
                stream.abort()
        self._timer.cancel()


async def read_head(stream: Stream, is_request: bool, deadline: float, config: Config) -> bytes:
    """Read one message head, up to and including its empty line; what follows stays in the stream's buffer.

    Raises ProxyError as soon as it cannot be a valid head, Truncated if the peer ends first, Stalled at the deadline,
    OSError if the connection fails.
    """
    searched = 0
    while True:
        buffer = stream.buffer
        if buffer:
            end = buffer.find(b"\r\n\r\n", max(0, searched - 3))
            if 0 <= end <= config.max_head_bytes - 4:
                return stream.cut(end + 4)
            check_partial_head(buffer, max(0, searched - 1), is_request, config)
            searched = len(buffer)
        if not await stream.more(deadline):
            raise Truncated()


async def skip_empty_lines(stream: Stream, deadline: float) -> bool:
    """Wait for the first byte of a request; False if the peer ends before it.  Raises as `Stream.more` does.

    Some clients send a CRLF behind a body; one or two are tolerated (RFC 9112 section 2.2).
    """
    for _ in range(2):
        while len(stream.buffer) < 2:
            if stream.buffer and stream.buffer != b"\r":
                return True
            if not await stream.more(deadline):
                return False
        if not stream.buffer.startswith(b"\r\n"):
            return True
        stream.drop(2)
    return bool(stream.buffer) or await stream.more(deadline)


# ---------------------------------------------------------------------------------------------------------------------
# Framing: where a message body ends (RFC 9112 sections 6 and 7), reading it and writing it anew
# ---------------------------------------------------------------------------------------------------------------------

_LENGTH_LIST = re.compile(r"[0-9]{1,18}(?:[ \t]*,[ \t]*[0-9]{1,18})*")
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_CHUNK_LINE = re.compile(
    r"([0-9A-Fa-f]{1,16})(?:[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?)*" % (TOKEN, TOKEN, _QUOTED)
)
_CANONICAL_SIZE = re.compile(rb"([0-9a-f]{1,15})\r\n")
_CHUNK_LINE_START = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t]*;[^\r\n]*|[ \t]*)\r?)?")


class Framing(NamedTuple):
    """How a body is delimited; `kind` is one of the four words below, `length` counts for the first alone."""

    kind: str
    length: int = 0


LENGTH, CHUNKED, UNTIL_CLOSE = "length", "chunked", "until close"
NO_BODY = Framing("none")


def request_framing(head: RequestHead) -> Framing:
    """How the body of a request ends (RFC 9112 section 6.3); ProxyError 400 or 501 on any doubt."""
    return _declared_framing(head.fields, head.version) or NO_BODY


def response_framing(method: str, head: ResponseHead) -> Framing:
    """How the body of a response to `method` ends (RFC 9112 section 6.3); ProxyError 400 or 501 on any doubt."""
    declared = _declared_framing(head.fields, head.version)
    if method == "HEAD" or head.status < 200 or head.status in (204, 304):
        return NO_BODY
    return declared or Framing(UNTIL_CLOSE)


def _declared_framing(fields: Fields, version: str) -> Optional[Framing]:
    codings = field_values(fields, "transfer-encoding")
    lengths = field_values(fields, "content-length")
    if codings:
        if lengths:
            raise ProxyError(400, "The message has both Transfer-Encoding and Content-Length.")
        if version == "1.0":
            raise ProxyError(400, "An HTTP/1.0 message cannot have Transfer-Encoding.")
        if len(codings) > 1:
            raise ProxyError(400, "The message has more than one Transfer-Encoding field.")
        if codings[0].lower() != "chunked":
            raise ProxyError(501, "The only transfer coding known here is 'chunked'.")
        return Framing(CHUNKED)
    if not lengths:
        return None
    if not all(_LENGTH_LIST.fullmatch(value) for value in lengths):
        raise ProxyError(400, "Content-Length is not a number of at most 18 digits.")
    numbers = {number.strip(" \t") for number in ",".join(lengths).split(",")}
    if len(numbers) > 1:
        raise ProxyError(400, "The message has several different values of Content-Length.")
    return Framing(LENGTH, int(numbers.pop()))


def framing_fields(framing: Framing) -> Fields:
    """The fields that announce a body framed so."""
    if framing.kind == LENGTH:
        return (("Content-Length", str(framing.length)),)
    if framing.kind == CHUNKED:
        return (("Transfer-Encoding", "chunked"),)
    return ()


def bare(data: bytes, in_chunks: bool) -> bytes:
    """The beginning of a body, from the first piece with bytes of it that a `Body` gave: at most the first chunk, whose
    size may have come before."""
    size = _CANONICAL_SIZE.match(data) if in_chunks else None
    return data[size.end() : size.end() + int(size.group(1), 16)] if size else data


class Body:
    """The body of one message, read off a stream piece by piece, as the pieces come.

    in_chunks: whether the pieces are given in the chunked coding, the last chunk included, rather than bare; set before
    the first is read.  Chunks are given as they came, without extensions and trailers, their sizes in canonical form.
    count: bytes of the body itself so far.  finished: the body has been read to its end, and the stream stands right
    behind it.
    """

    count = 0
    _part = "size"  # of a chunked body, what comes next: size, data, data end, trailers
    _trailer_bytes = 0

    def __init__(self, stream: Stream, framing: Framing, config: Config, in_chunks: bool = False) -> None:
        self.stream = stream
        self.framing = framing
        self.config = config
        self.in_chunks = in_chunks
        self.finished = framing == NO_BODY or (framing.kind == LENGTH and framing.length == 0)
        self._remaining = framing.length  # of the body, or of the chunk that is being read

    async def read(self, timeout: float = FOREVER) -> bytes:
        """The next piece, at least a byte of it, or b"" where the body has ended.

        Raises ProxyError 400 if it is malformed, Truncated if it breaks off, Stalled if nothing comes for `timeout` s,
        OSError if the connection fails.
        """
        piece = b""

        def keep(data: bytes) -> bool:
            nonlocal piece
            piece = data
            return False

        await self.pass_on(keep, timeout)
        return piece

    async def pass_on(self, use: Callable[[bytes], bool], timeout: float = FOREVER) -> None:
        """Call `use` with the pieces as they come, until it returns False or the body has ended.  Raises as `read`."""
        is_wanted = True

        def use_what_came() -> bool:
            nonlocal is_wanted
            data = self.at_hand() if is_wanted else b""
            is_wanted = is_wanted and (not data or use(data))
            if not is_wanted or self.finished:
                return False
            if timeout != FOREVER:
                self.stream.read_deadline = self.stream.now() + timeout
            return True

        while use_what_came():
            limit = min(self._remaining, _RECEIVE_BYTES) if self.framing.kind == LENGTH else _RECEIVE_BYTES
            if not await self.stream.more(self.stream.now() + timeout, limit, use_what_came):
                if self.framing.kind != UNTIL_CLOSE:
                    raise Truncated()
                self.finished = True
                if self.in_chunks:
                    use(b"0\r\n\r\n")

    def at_hand(self) -> bytes:
        """As `read`, but only what is in the stream's buffer already: b"" also if that is nothing."""
        buffer = self.stream.buffer
        if self.finished or not buffer:
            return b""
        if self.framing.kind == CHUNKED:
            if self.in_chunks and self._part == "size" and self._is_one_chunk(buffer):
                return self.stream.cut_all()
            return self._take_chunks(buffer)
        if self.framing.kind == LENGTH:
            data = self.stream.cut(self._remaining)
            self._remaining -= len(data)
            self.finished = self._remaining == 0
        else:
            data = self.stream.cut_all()
        self.count += len(data)
        return b"%x\r\n%s\r\n" % (len(data), data) if self.in_chunks else data

    def _take_chunks(self, buffer: bytes) -> bytes:
        """Take all whole parts of chunks, and the data of the last, from the buffer (RFC 9112 section 7.1)."""
        given: List[Union[bytes, memoryview]] = []
        view, at, start = memoryview(buffer), 0, 0  # buffer[start:at] can be given as it came
        while at < len(buffer) and not self.finished:
            if self._part == "data":
                count = min(self._remaining, len(buffer) - at)
                if not self.in_chunks:
                    given.append(view[at : at + count])
                at += count
                self.count += count
                self._remaining -= count
                if not self._remaining:
                    self._part = "data end"
            elif self._part == "data end":
                end = buffer[at : at + 2]
                if not b"\r\n".startswith(end):
                    raise ProxyError(400, "A chunk is not followed by CRLF.")
                if len(end) < 2:
                    break
                at += 2
                self._part = "size"
            else:
                line = self._find_line(buffer, at)
                if line is None:
                    break
                behind = at + len(line) + 2
                canonical = self._chunk_begins(line) if self._part == "size" else self._trailer_comes(line)
                if self.in_chunks and buffer[at:behind] != canonical:
                    given += (view[start:at], canonical)
                    start = behind
                at = behind
        if self.in_chunks and not given:
            return self.stream.cut(at)
        if self.in_chunks:
            given.append(view[start:at])
        self.stream.drop(at)
        return b"".join(given)

    def _is_one_chunk(self, buffer: bytes) -> bool:
        """Whether it is exactly one, in canonical form, as an app's events come; it is counted then.

        The size that its length tells of is compared, not read.  Where that is not sure, it may be one all the same.
        """
        size = len(buffer) - 4 - ((len(buffer) - 5).bit_length() + 3) // 4
        line = b"%x\r\n" % size
        if size < 1 or len(line) + size + 2 != len(buffer) or not buffer.startswith(line) or buffer[-2:] != b"\r\n":
            return False
        self.count += size
        return True

    def _find_line(self, buffer: bytes, at: int) -> Optional[str]:
        """The line that begins there, without its CRLF; None if it has not come whole."""
        is_size = self._part == "size"
        limit = self.config.max_chunk_line_bytes if is_size else self.config.max_trailer_bytes
        end = buffer.find(b"\n", at, at + limit + 2)
        if end < 0:
            if len(buffer) - at > limit + 1:
                raise ProxyError(400, "A chunk's first line or trailer is longer than %d bytes." % limit)
            if is_size and not _CHUNK_LINE_START.fullmatch(buffer, at):
                raise ProxyError(400, "A chunk does not begin with its size in hexadecimal digits.")
            return None
        if end == at or buffer[end - 1 : end] != b"\r":
            raise ProxyError(400, "A line of a chunked body ends without CR.")
        return buffer[at : end - 1].decode("latin-1")

    def _chunk_begins(self, line: str) -> bytes:
        """The line as it is sent on."""
        match = _CHUNK_LINE.fullmatch(line)
        if not match:
            raise ProxyError(400, "A chunk does not begin with its size in hexadecimal digits.")
        self._remaining = int(match.group(1), 16)
        if self._remaining >= 1 << 60:  # parsers differ in what they make of it; nobody has so much to send
            raise ProxyError(400, "A chunk is longer than any can be.")
        self._part = "data" if self._remaining else "trailers"
        return b"%x\r\n" % self._remaining

    def _trailer_comes(self, line: str) -> bytes:
        """The line as it is sent on: nothing, but for the empty one at the end."""
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > self.config.max_trailer_bytes:
            raise ProxyError(400, "The trailers are longer than %d bytes." % self.config.max_trailer_bytes)
        if line and not _FIELD.fullmatch(line + "\r\n"):
            raise ProxyError(400, "A trailer is not a valid field line.")
        self.finished = not line
        return b"" if line else b"\r\n"


# ---------------------------------------------------------------------------------------------------------------------
# Routes: what a request target names, and whether its host may be reached
# ---------------------------------------------------------------------------------------------------------------------

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_BASE = re.compile(r"(?:/[A-Za-z0-9\-._~!$&'()*+,=:@%]+)*")  # a ";" would end the Path of a cookie
_ROUTE = re.compile(r"(/absolute)?/([^/]*)(/.*)?")
_TARGET = re.compile(r"(?:(?:([A-Za-z0-9_][A-Za-z0-9_.\-]{0,252})|\[([0-9A-Fa-f:.]{2,45})\]):)?([1-9][0-9]{0,4})")
_NAME_PATTERN = re.compile(r"[a-z0-9_.*?\-]+")  # of the allowlist; the next is for IPv6
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9\-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9\-]*[a-z0-9])?)*")
_ADDRESS_PATTERN = re.compile(r"[0-9a-f.*?]*:[0-9a-f.*?]*[:*?][0-9a-f:.*?]*")
_PORT_NAME = re.compile(r"[1-9][0-9]{0,4}")
_UP = re.compile(r"(?:\.|%2e){2}", re.IGNORECASE)
_HERE = re.compile(r"(?:\.|%2e)", re.IGNORECASE)


class Route(NamedTuple):
    """Where a request goes.

    host: as written, lower-cased, without brackets; "localhost" where none was written.  prefix: what the client wrote
    in front of the app's own path, "" where its host names the port.  absolute: the upstream is sent the prefix too.
    path: what follows the prefix, raw, "" where the slash behind the port is missing.  query: raw, with its "?", or "".
    scheme: what the upstream speaks.  strayed: the client left the prefix out.
    """

    host: str
    port: int
    prefix: str
    absolute: bool
    path: str
    query: str
    scheme: str = "http"
    strayed: bool = False

    @property
    def authority(self) -> str:
        """host:port, for a Host field."""
        return "%s:%d" % ("[%s]" % self.host if ":" in self.host else self.host, self.port)

    @property
    def target(self) -> str:
        """The request target for the upstream."""
        return (self.prefix + self.path if self.absolute else self.path or "/") + self.query

    @property
    def place(self) -> str:
        """The target as a person says it."""
        machine = "this machine" if self.host in LOOPBACK_NAMES else self.host
        return "port %d of %s" % (self.port, machine)


def normal_base(base: str) -> str:
    """`base` without its last slash, "" for the root; ValueError if it is no path that could be one."""
    path = base[:-1] if base.endswith("/") else base
    if not _BASE.fullmatch(path) or any(_UP.fullmatch(s) or _HERE.fullmatch(s) for s in path.split("/")):
        raise ValueError("the base must be a path such as /proxy or /user/ana/proxy, not %r" % base)
    return path


def find_route(base: str, target: str) -> Optional[Route]:
    """The route that `target` (origin form) names under `base` (normal); None for the base itself.

    Raises ProxyError 404 if it names none, 400 if its dot segments lead out of the prefix.
    """
    path, mark, query = target.partition("?")
    rest = path_below(base, path)
    if rest in ("", "/"):
        return None
    match = _ROUTE.fullmatch(rest) if rest else None
    named = _TARGET.fullmatch(match.group(2)) if match else None
    if not match or not named:
        raise ProxyError(404, "No port is named here. " + forms(base))
    name, literal, port = named.groups()
    if int(port) > 65535:
        raise ProxyError(404, "There is no port %s; the last one is 65535." % port)
    if literal and not _is_ipv6(literal):
        raise ProxyError(400, "What stands in brackets is not an IPv6 address.")
    rest_of_path = match.group(3) or ""
    if _leaves(rest_of_path):
        raise ProxyError(400, "The dot segments of this path lead out of the app it names.")
    prefix = path[: len(path) - len(rest_of_path)]
    host = (name or literal or "localhost").lower()
    return Route(host, int(port), prefix, bool(match.group(1)), rest_of_path, mark + query)


def host_of(authority: str) -> str:
    """The host in an authority, lower-cased and without its port."""
    return re.sub(r":[0-9]*\Z", "", authority).lower()


def port_in_host(authority: str, domains: Sequence[str]) -> int:
    """The port that a host such as 8080.localhost names, 0 if it names none."""
    if not authority[:1].isdigit():
        return 0
    port, _, domain = host_of(authority).partition(".")
    return int(port) if domain in domains and _PORT_NAME.fullmatch(port) and int(port) <= 65535 else 0


def route_of_host(port: int, target: str) -> Route:
    """The route to a port that the host names: the target (origin form) is the app's own, to the last byte."""
    path, mark, query = target.partition("?")
    return Route("localhost", port, "", False, path, mark + query)


def speaks_tls(route: Route, upstream_tls: Sequence[str]) -> bool:
    """Whether the upstream of `route` is among "PORT" (of this machine) and "HOST:PORT"."""
    return route.authority in upstream_tls or (route.host in LOOPBACK_NAMES and str(route.port) in upstream_tls)


def forms(base: str) -> str:
    """The forms that a path can have, in one sentence."""
    return (
        "The forms are {0}/<port>/, {0}/<host>:<port>/, {0}/absolute/<port>/ and {0}/absolute/<host>:<port>/.".format(
            base
        )
    )


def is_allowed(host: str, allowlist: Union[Sequence[str], Callable[[str], bool]]) -> bool:
    """Whether `host`, as written and lower-cased, may be reached; nothing is resolved for that."""
    if callable(allowlist):
        return bool(allowlist(host))
    return host in LOOPBACK_NAMES or any(fnmatch.fnmatchcase(host, pattern) for pattern in allowlist)


def normal_allowlist(patterns: Iterable[str]) -> Tuple[str, ...]:
    """The allowlist's patterns, lower-cased and without brackets; ValueError for one that could never match a host."""
    normal = []
    for given in patterns:
        pattern = (given[1:-1] if given[:1] + given[-1:] == "[]" else given).lower()
        if not _NAME_PATTERN.fullmatch(pattern) and not _ADDRESS_PATTERN.fullmatch(pattern):
            raise ValueError("an allowed host is a name, an address or a glob such as *.example.org, not %r" % given)
        normal.append(pattern)
    return tuple(normal)


def is_domain(name: str) -> bool:
    """Whether a name, in lower case, can be a domain; not if it ends so that browsers take it for an address."""
    return bool(_DOMAIN.fullmatch(name)) and not name.rpartition(".")[2].isdigit()


def normal_domain(domain: str) -> str:
    """A domain, lower-cased; ValueError if it is none."""
    if not is_domain(domain.lower()):
        raise ValueError("a domain is a name such as apps.example.org, not %r" % domain)
    return domain.lower()


def is_home(base: str, target: str) -> bool:
    """Whether a target is the base itself, with or without its slash."""
    return path_below(base, target.partition("?")[0]) in ("", "/")


def is_below(base: str, target: str) -> bool:
    """Whether a target is the base, or something below it."""
    return path_below(base, target.partition("?")[0]) is not None


def path_below(base: str, path: str) -> Optional[str]:
    """What follows `base` in `path`, None if it does not begin so; compared as percent-decoded segments."""
    if path.startswith(base) and path[len(base) : len(base) + 1] in ("", "/"):
        return path[len(base) :]
    segments = path.split("/")
    count = base.count("/") + 1
    if [unquote_to_bytes(s) for s in segments[:count]] != [unquote_to_bytes(s) for s in base.split("/")]:
        return None
    return path[len("/".join(segments[:count])) :]


def _leaves(path: str) -> bool:
    """Whether dot segments lead above `path`'s beginning, as a browser or a server in front of us would resolve it."""
    if "/." not in path and "/%" not in path:
        return False
    depth = 0
    for segment in path.split("/")[1:]:
        if _UP.fullmatch(segment):
            depth -= 1
        elif not _HERE.fullmatch(segment):
            depth += 1
        if depth < 0:
            return True
    return False


def _is_ipv6(literal: str) -> bool:
    try:
        ipaddress.IPv6Address(literal)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Rewriting: what an app sees is what it would see at home, and what it says of home is made to fit here
# ---------------------------------------------------------------------------------------------------------------------

# RFC 9110 section 7.6.1, with Trailer (trailers are dropped) and the two fields of proxy authentication (section 11.7).
_HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding"
    " upgrade".split()
)
_FORWARDED_PREFIX = ("X-Forwarded-Prefix", "X-Forwarded-Context", "X-ProxyContextPath")
# Written by us, so that neither a client nor its Connection field can (RFC 9110 section 7.6.1 lets it name any field).
_WRITTEN_BY_US = frozenset(
    "host content-length forwarded x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port".split()
) | frozenset(name.lower() for name in _FORWARDED_PREFIX)
_HTTP_URL = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE)
_REFRESH = re.compile(r"([0-9.]*[ \t]*[;,][ \t]*(?:url[ \t]*=[ \t]*)?['\"]?)([^'\"]*)(.*)", re.IGNORECASE)
_OTHER_HOST = re.compile(r"/\t*[/\\]")  # begins what names another host, to a browser, where it has none of its own
_PORT = re.compile(r":([0-9]+)\Z")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Visit(NamedTuple):
    """How the client sees us: its address, "" if it has none; the scheme, authority (host:port) and port of the origin
    that it talks to, "" where it did not say; the X-Forwarded-For that an upstream is to get; and the port of the app
    whose host that is, 0 where it is our own."""

    address: str
    scheme: str
    authority: str
    port: str = ""
    forwarded_for: str = ""
    app_port: int = 0


def visit_of(
    head: RequestHead, address: str, scheme: str, trusted_proxies: Sequence[str], domains: Sequence[str] = ()
) -> Visit:
    """The visit that a request makes: as its connection tells, or as its X-Forwarded fields do where these come from a
    trusted proxy; of a list of addresses, the last that is no trusted proxy itself."""
    authority, way, port = head.authority, [address] if address else [], ""
    if _is_trusted(address, trusted_proxies):
        said = {name: _outermost(head.fields, "x-forwarded-" + name) for name in ("proto", "host", "port")}
        before = [
            one.strip(" \t") for value in field_values(head.fields, "x-forwarded-for") for one in value.split(",")
        ]
        way = before + way
        while len(before) > 1 and _is_trusted(before[-1], trusted_proxies):
            before.pop()
        address = before[-1] if before else address
        if said["proto"].lower() in _DEFAULT_PORTS:
            scheme = said["proto"].lower()
        if is_authority(said["host"]):
            authority = said["host"]
        port = said["port"] if re.fullmatch("[0-9]{1,5}", said["port"]) else ""
    if authority and not port:
        match = _PORT.search(authority)
        port = match.group(1) if match else _DEFAULT_PORTS[scheme][1:]
    return Visit(address, scheme, authority, port, ", ".join(way), port_in_host(authority, domains))


def host_form(port: int, visit: Visit, domains: Sequence[str]) -> str:
    """The URL of the host that a port has for itself, as this client can reach it; "" if there is none."""
    host = host_of(visit.authority)
    domain = host.partition(".")[2] if visit.app_port else host
    if domain not in domains:
        named = "localhost" if host.startswith("127.") or host == "[::1]" else ""
        domain = named if named in domains else next((one for one in domains if one != "localhost"), "")
    if not domain or not host:
        return ""
    return "%s://%d.%s%s/" % (visit.scheme, port, domain, visit.authority[len(host) :])


def _outermost(fields: Fields, name: str) -> str:
    """What the proxy next to the browser said, where each on the way has added a member of its own; "" for nothing."""
    return "".join(field_values(fields, name)[-1:]).partition(",")[0].strip(" \t")


def _is_trusted(address: str, trusted_proxies: Sequence[str]) -> bool:
    if not trusted_proxies:
        return False
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return not address and "unix" in trusted_proxies
    return any(known in ipaddress.ip_network(proxy, False) for proxy in trusted_proxies if proxy != "unix")


def is_own_origin(origin: str, authority: str) -> bool:
    """Whether `origin` ("http://host:port") is that of the Host that the client sent.

    The scheme is not compared: a server in front of us may speak TLS where we do not.  Its default port is dropped.
    """
    match = _HTTP_URL.fullmatch(origin)
    if not match or match.group(3) or not authority:
        return False
    default = _DEFAULT_PORTS[match.group(1).lower()]
    return _without(default, match.group(2).lower()) == _without(default, authority.lower())


def request_for_upstream(
    head: RequestHead, route: Route, framing: Framing, visit: Visit, preserve_host: bool, is_upgrade: bool
) -> RequestHead:
    """The request as the upstream gets it: the framing and the forwarded fields our own, everything else as it came."""
    named = field_tokens(head.fields, "connection")
    authority = route.authority
    fields = [("Host", visit.authority if preserve_host and visit.authority else authority)]
    translated = False
    for name, value in head.fields:
        key = name.lower()
        if key in _HOP_BY_HOP or key in named or (key == "expect" and head.version == "1.0"):
            continue
        if key in _WRITTEN_BY_US or ("_" in key and key.replace("_", "-") in _WRITTEN_BY_US):
            continue  # CGI and WSGI cannot tell the two spellings apart
        if not preserve_host and key == "origin" and is_own_origin(value, visit.authority):
            value = "%s://%s" % (route.scheme, authority)
            translated = True
        elif not preserve_host and key == "referer":
            value = _translate_referer(value, route, visit)
        fields.append((name, value))
    fields.extend(_forwarded_fields(visit, translated))
    if route.prefix and not route.absolute:
        fields.extend((name, route.prefix) for name in _FORWARDED_PREFIX)
    fields.extend(framing_fields(framing))
    if is_upgrade:
        fields.extend(_UPGRADE_FIELDS)
    return RequestHead(head.method, route.target, authority, "1.1", tuple(fields))


_UPGRADE_FIELDS = (("Connection", "Upgrade"), ("Upgrade", "websocket"))


def _forwarded_fields(visit: Visit, translated: bool) -> List[Tuple[str, str]]:
    """Where Origin was translated, the public name is left out: an app must see that or the local one, never a mix."""
    fields = [("X-Forwarded-For", visit.forwarded_for)] if visit.forwarded_for else []
    fields.append(("X-Forwarded-Proto", visit.scheme))
    if visit.authority and not translated:
        fields.extend((("X-Forwarded-Host", visit.authority), ("X-Forwarded-Port", visit.port)))
    return fields


def _translate_referer(value: str, route: Route, visit: Visit) -> str:
    """A page of this app becomes that page at home; another page of our origin only that origin, as browsers do."""
    match = _HTTP_URL.fullmatch(value)
    if not match or not is_own_origin("%s://%s" % match.group(1, 2), visit.authority):
        return value
    path = match.group(3)
    if not _has_prefix(path, route.prefix):
        path = "/"
    elif not route.absolute:
        path = path[len(route.prefix) :]
    return "%s://%s%s" % (route.scheme, route.authority, path if path.startswith("/") else "/" + path)


def response_for_client(head: ResponseHead, route: Route, framing: Framing, visit: Visit) -> ResponseHead:
    """The response as the client gets it, framed by `framing`; what points at the app's home is made to point here."""
    named = field_tokens(head.fields, "connection") - {"content-length"}
    keep_length = framing == NO_BODY and head.status >= 200 and head.status != 204  # HEAD, 304: what a GET would get
    fields = []
    for name, value in head.fields:
        key = name.lower()
        if key in _HOP_BY_HOP or key in named:
            continue
        if key == "content-length":
            if not keep_length:
                continue
            value, keep_length = value.partition(",")[0].strip(" \t"), False
        elif key in ("location", "content-location"):
            value = _translate_location(value, route, _homes(route, visit))
        elif key == "service-worker-allowed" and route.prefix:
            continue
        elif key == "refresh":
            value = _translate_refresh(value, route, _homes(route, visit))
        elif key == "set-cookie" and not route.absolute:
            value = _translate_cookie(value, route, _homes(route, visit) | _parents(visit))
        fields.append((name, value))
    if route.prefix and (field_values(head.fields, "service-worker-allowed") or route.strayed or not route.path):
        # Whatever the app says, and wherever the script is: the other apps and our own pages are not ruled by it.
        fields.append(("Service-Worker-Allowed", route.prefix + "/"))
    fields.extend(framing_fields(framing))
    if head.status == 101:
        fields.extend(_UPGRADE_FIELDS)
    return head._replace(fields=tuple(fields))


def _homes(route: Route, visit: Visit) -> FrozenSet[str]:
    """The authorities under which the app may speak of itself, lower-cased: those it was told, and loopback's names."""
    hosts = LOOPBACK_NAMES if route.host in LOOPBACK_NAMES else (route.host,)
    homes = {route._replace(host=host).authority for host in hosts}
    if route.port == 80:
        homes |= {_without(":80", home) for home in homes}
    if visit.authority:
        homes.add(visit.authority.lower())
    return frozenset(homes)


def _parents(visit: Visit) -> FrozenSet[str]:
    """The authority above that of an app's own host, which is ours: a cookie of the app is not for it."""
    return frozenset([visit.authority.lower().partition(".")[2]]) if visit.app_port else frozenset()


def _translate_location(value: str, route: Route, homes: FrozenSet[str]) -> str:
    """A path gains the prefix; a URL of the app's home becomes a path here, which fits whatever scheme and name the
    client uses; relative, foreign and network-path references ("//host") stay."""
    match = _HTTP_URL.fullmatch(value)
    if match:
        if match.group(2).lower() not in homes:
            return value
        path = match.group(3) if match.group(3).startswith("/") else "/" + match.group(3)
        path = _with_prefix(path, route)
        return "/." + path if _OTHER_HOST.match(path) else path
    return value if value.startswith("//") else _with_prefix(value, route)


def _translate_refresh(value: str, route: Route, homes: FrozenSet[str]) -> str:
    match = _REFRESH.fullmatch(value)
    if not match:
        return value
    before, url, behind = match.groups()
    return before + _translate_location(url, route, homes) + behind


def _translate_cookie(value: str, route: Route, homes: FrozenSet[str]) -> str:
    """Path gains the prefix, a Domain that is the target goes; __Host- cookies stay, for which neither is allowed."""
    if value.lower().startswith("__host-"):
        return value
    parts = value.split(";")
    kept, with_path = parts[:1], False
    for part in parts[1:]:
        name, equals, attribute = part.partition("=")
        key, attribute = name.strip(" \t").lower(), attribute.strip(" \t")
        if key == "domain" and any(attribute.lower().lstrip(".") == host_of(home) for home in homes):
            continue
        if key == "path":
            with_path = True
            part = name + equals + _with_prefix(attribute, route)
        kept.append(part)
    if route.strayed and not with_path:  # what a browser makes of none is the folder that was asked for
        kept.append(" Path=%s/" % route.prefix)
    return ";".join(kept)


def _with_prefix(path: str, route: Route) -> str:
    if route.absolute or not path.startswith("/") or _has_prefix(path, route.prefix):
        return path
    return route.prefix + path


def _has_prefix(path: str, prefix: str) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/", "?", "#")


def _without(suffix: str, text: str) -> str:
    return text[: -len(suffix)] if text.endswith(suffix) else text


# ---------------------------------------------------------------------------------------------------------------------
# Access: asked once, before anything is connected, for every method and for Upgrades alike
# ---------------------------------------------------------------------------------------------------------------------

_SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))  # RFC 9110 section 9.2.1
_TOKEN_FIELD = re.compile(r"(?:token|bearer)[ \t]+(.+)", re.IGNORECASE)
_NO_REFERRER = ("Referrer-Policy", "no-referrer")
_CHALLENGE = (("WWW-Authenticate", "Bearer"),)  # browsers know no way to ask for one, and show the page
_LOCAL_TARGET = re.compile(r'/(?![/\\])[!"$-\[\]-~]*')  # no "//host", and no backslash, which browsers take for a slash
ANY_TOKEN = "any"  # as Config.token: one made at random
COOKIE_PREFIX = "port_proxy_"  # of our cookies' names; the port follows, for browsers do not tell ports apart
ENTRANCE = "/.well-known/port-proxy"  # of an app's host, where the path is otherwise the app's (RFC 8615)
_MAX_SESSIONS = 1000
_MAX_NAMES = 100
_MAX_TICKETS = 1000
_TICKET_SECONDS = 30.0  # from the ports page to an app's host
_MAX_SOURCES = 1000  # addresses whose wrong tokens are remembered
_TRIES = 10.0  # wrong tokens that an address has before it must wait, and that come back at one a second


_CREDENTIALS = ("cookie", "authorization", "referer")  # fields that can hold ours


class SignInNeeded(ProxyError):
    """A page visit without a valid token: answered with the sign-in page, which sends the token to the path `action`
    and leads on to `target`; or, where there is none, with a page that leads to `target` first."""

    def __init__(self, detail: str, target: str, action: str) -> None:
        super().__init__(401, detail, _CHALLENGE)
        self.target = target
        self.action = action


def is_websocket(head: RequestHead) -> bool:
    """Whether a request opens a WebSocket (RFC 6455 section 4.1); any other Upgrade is ignored, h2c above all."""
    return (
        head.method == "GET"
        and head.version == "1.1"
        and [value.lower() for value in field_values(head.fields, "upgrade")] == ["websocket"]
        and "upgrade" in field_tokens(head.fields, "connection")
    )


def is_navigation(head: RequestHead) -> bool:
    """Whether a browser goes to this address, rather than a page's script or a program asking for it."""
    mode = field_values(head.fields, "sec-fetch-mode")
    accepts = any("text/html" in value.lower() for value in field_values(head.fields, "accept"))
    return accepts and mode in ([], ["navigate"])


def is_page_visit(head: RequestHead) -> bool:
    """Whether a person wants to see a page."""
    return head.method in ("GET", "HEAD") and is_navigation(head) and not is_websocket(head)


def is_preflight(head: RequestHead) -> bool:
    """Whether this is the question that a browser asks before a cross-origin request; it never has credentials."""
    asks = field_values(head.fields, "access-control-request-method")
    return head.method == "OPTIONS" and bool(asks) and bool(field_values(head.fields, "origin"))


def _is_cross_site(head: RequestHead) -> bool:
    """Whether the browser says that a page of another site is behind this."""
    return "cross-site" in field_values(head.fields, "sec-fetch-site")


def _is_same_origin(head: RequestHead) -> bool:
    """Whether the browser says that a page of our own origin is behind this."""
    return "same-origin" in field_values(head.fields, "sec-fetch-site")


def check_route(route: Route, config: Config) -> None:
    """ProxyError 403 if this route may not be reached by anybody."""
    if not is_allowed(route.host, config.host_allowlist):
        advice = "Start the proxy with --host-allowlist %s to allow it." % route.host
        raise ProxyError(403, "The host %s is not on the allowlist. %s" % (route.host, advice))


class Gate:
    """Who may come in: what all kinds of gate have in common.

    A gate is asked three things of a request: whether it is for the gate itself, as signing in is (`answer`); whether
    it may come in (`admit`); and what the app and the client are to see of each other (`for_upstream`, `for_client`),
    which is never a credential of ours.
    """

    token = ""  # what clients must show, where that is one and the same for all
    # Whether `check` is all of `admit`, and the rest depends on nothing but what it is given.  What heads come to is
    # remembered in any case: `token` and `app_cookie` stay as they are once the gate is there.
    is_plain = False
    app_cookie = ""  # the name of the cookie that says which app a browser opened last; "" where none is to

    def __init__(self, config: Config) -> None:
        self.config = config

    def answers(self, head: RequestHead, visit: Visit) -> bool:
        """Whether `answer` has more to say of a request than None."""
        return True

    def admits_anyone(self, head: RequestHead, visit: Visit, route: Route) -> bool:
        """Whether such a request may come in whoever sends it and whenever: then it need not be asked for again."""
        return False

    async def answer(
        self, head: RequestHead, visit: Visit, read_body: Callable[[], Awaitable[bytes]]
    ) -> Optional[Response]:
        """The answer, where the request is for the gate itself; None, or a ProxyError that answers it, otherwise."""
        return None

    async def admit(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> None:
        """Return if the request may come in; raise the ProxyError that answers it otherwise."""
        self.check(head, visit, route)

    def check(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> None:
        """What `admit` does, as far as nobody has to be asked."""
        raise NotImplementedError

    async def close(self) -> None:
        """End what the gate does on its own."""

    def owns_token(self, token: str) -> bool:
        """Whether a token that a request shows is ours, and none of the app's business."""
        return False

    def explain(self, error: ProxyError) -> ProxyError:
        """The error as the person who set this up knows its options."""
        return error

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        """Whether a cookie is ours, or that of another proxy like this one under the same host name: browsers do not
        tell ports apart.  One that itself is the app behind `route` has cookies of its own."""
        of_the_app = COOKIE_PREFIX + str(route.port if route else "")
        return name.startswith(COOKIE_PREFIX) and name != of_the_app and not name.startswith(of_the_app + "_app")

    def for_upstream(self, head: RequestHead, route: Optional[Route]) -> RequestHead:
        """The request without our cookies and tokens, cut out of it; every other byte as it was."""
        if "?" not in head.target and not any(field_values(head.fields, name) for name in _CREDENTIALS):
            return head
        fields = []
        for name, value in head.fields:
            key = name.lower()
            if key == "cookie":
                value = self._without_cookies(value, route)
                if not value:
                    continue
            elif key == "authorization" and any(map(self.owns_token, _tokens_in(value))):
                continue
            elif key == "referer":
                value = self._without_token(value)
            fields.append((name, value))
        return head._replace(target=self._without_token(head.target), fields=tuple(fields))

    def for_client(self, head: ResponseHead, route: Route) -> ResponseHead:
        """The response without an app's attempt to set a cookie of ours."""
        if not field_values(head.fields, "set-cookie"):
            return head
        fields = [
            (name, value)
            for name, value in head.fields
            if not (name.lower() == "set-cookie" and self.owns_cookie(_cookie_name(value), route))
        ]
        return head._replace(fields=tuple(fields))

    def check_origin(self, head: RequestHead, visit: Visit) -> None:
        """Refuse what a page of another site makes a browser do here: cross-site requests and WebSocket hijacking."""
        origins = field_values(head.fields, "origin")
        if len(origins) > 1:
            raise ProxyError(400, "A request has at most one Origin field.")
        if origins == ["null"] and _is_same_origin(head):  # a form of a page that has no referrer sent
            origins = []
        foreign = [origin for origin in origins if not is_own_origin(origin, visit.authority)]
        allowed = self.config.allow_origins
        if "*" in allowed or (foreign and _is_among(foreign[0], allowed)):
            return
        if foreign and (head.method not in _SAFE or is_websocket(head) or visit.app_port):
            raise _foreign(foreign[0], visit, bool(self.config.trusted_proxies))
        in_frame = any(one != "document" for one in field_values(head.fields, "sec-fetch-dest"))
        is_foreign = _is_cross_site(head) or self._is_of_neighbour(head, visit)
        if is_foreign and (in_frame or not is_page_visit(head)):
            if foreign:
                raise _foreign(foreign[0], visit, bool(self.config.trusted_proxies))
            detail = (
                "A page of another site may not use what is here, and the browser (Sec-Fetch-Site) says that one does."
            )
            raise ProxyError(403, detail + _ANY_PAGE)

    def _is_of_neighbour(self, head: RequestHead, visit: Visit) -> bool:
        """Whether the browser says that a page of another host of the same domain asks, which may be that of an app."""
        among_apps = visit.app_port or host_of(visit.authority) in self.config.domains
        return bool(among_apps) and "same-site" in field_values(head.fields, "sec-fetch-site")

    def _without_cookies(self, value: str, route: Optional[Route]) -> str:
        pairs = value.split(";")
        kept = [pair for pair in pairs if not self.owns_cookie(_cookie_name(pair), route)]
        if kept and kept[0] is not pairs[0]:
            kept[0] = kept[0].lstrip(" \t")
        return ";".join(kept)

    def _without_token(self, url: str) -> str:
        """`url` without those of its "token" parameters that hold ours."""
        before, hash_mark, fragment = url.partition("#")
        path, mark, query = before.partition("?")
        parameters = query.split("&")
        kept = [one for one in parameters if not any(map(self.owns_token, _query_tokens("?" + one)))]
        if len(kept) == len(parameters):
            return url
        return path + (mark + "&".join(kept) if kept else "") + hash_mark + fragment


class TokenGate(Gate):
    """The gate of a proxy that stands alone.

    With a token: whoever shows it, and the browsers that have shown it once, which get a cookie with a random session
    id.  Without: whoever can connect, as long as the Host is one that only this machine's own names lead to, so that a
    page of another site cannot come in by making its name point here.  Where a browser comes in on its own, by cookie
    or because all is open, pages of other sites cannot use it (`check_origin`).

    Every host has a cookie of its own, for browsers send none from one to the other: who is signed in at ours gets to
    an app's with a ticket, which is good once and there alone.
    """

    def __init__(self, config: Config, is_private: bool, port: int) -> None:
        super().__init__(config)
        self.is_plain = config.authorize is None
        self.is_private = is_private
        self.cookie_name = COOKIE_PREFIX + (str(port) if port else "unix")
        self.app_cookie = self.cookie_name + "_app" if config.whole_origin else ""
        token = config.token if config.authorize is None else ""
        if token is None:
            token = "" if is_private else ANY_TOKEN
        self.token = secrets.token_urlsafe(24) if token == ANY_TOKEN else token
        self._sessions: Dict[str, str] = {}  # the ids handed out, the oldest first, each with the host that it is for
        self._tickets: Dict[str, Tuple[int, float]] = {}  # each with the app's port, and the moment when it is too late
        # By address and place: the tries left, when that was so, and hashes of the last wrong tokens.
        self._wrong: Dict[Tuple[str, str], Tuple[float, float, FrozenSet[int]]] = {}
        self._known_names: Set[str] = set()  # by which requests may come, as far as some have

    def answers(self, head: RequestHead, visit: Visit) -> bool:
        path = head.target.partition("?")[0]
        return path == ENTRANCE if visit.app_port else is_home(self.config.base, path)

    async def answer(
        self, head: RequestHead, visit: Visit, read_body: Callable[[], Awaitable[bytes]]
    ) -> Optional[Response]:
        if not self.answers(head, visit):
            return None
        query = head.target.partition("?")[2]
        if self.token and head.method == "POST" and not visit.app_port:
            self.check_origin(head, visit)
            self._sign_in(await read_body(), visit)
        asked = dict(parse_qsl(query)) if head.method == "GET" else {}
        if self.token and visit.app_port:
            self.check_origin(head, visit)
            raise self._enter(asked.get("ticket", ""), head, visit)
        if not visit.app_port and _PORT_NAME.fullmatch(asked.get("open", "")):
            await self.admit(head, visit, None)
            raise self._lead_to_host(int(asked["open"]), visit)
        return None

    def admits_anyone(self, head: RequestHead, visit: Visit, route: Route) -> bool:
        if self.token or self.config.authorize is not None:
            return False
        try:
            self.check(head, visit, route)
        except ProxyError:
            return False
        # Others are on the allowlist; which may be a function, and then is asked every time.
        return route.host in LOOPBACK_NAMES and not callable(self.config.host_allowlist)

    async def admit(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> None:
        if self.config.authorize is not None:
            await asyncio.ensure_future(self.config.authorize(head, visit, route))
        self.check(head, visit, route)

    def check(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> None:
        preflight = self.config.allow_preflight and is_preflight(head)
        if self.config.authorize is not None:
            pass
        elif not self.token:
            for authority in {head.authority, visit.authority}:  # a page cannot choose the one, though it may the other
                self._check_host(authority)
        elif preflight or not self._check_credentials(head, visit, route):
            return  # a token in the request itself: whoever sent it meant it
        if not preflight:
            self.check_origin(head, visit)

    def owns_token(self, token: str) -> bool:
        return bool(self.token) and hmac.compare_digest(token.encode("utf-8"), self.token.encode("utf-8"))

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        ours = name == self.cookie_name or name.startswith(self.cookie_name + "_app")
        return ours or super().owns_cookie(name, route)

    def _sign_in(self, form: bytes, visit: Visit) -> None:
        """Take what the sign-in page sent; raises the redirect to where the person was going, or the page again."""
        sent = dict(parse_qsl(form.decode("latin-1")))
        target = sent.get("next", "")
        if not _LOCAL_TARGET.fullmatch(target) or not is_below(self.config.base, target):
            target = self.config.base + "/"
        if not self._try("form", [sent.get("token", "").strip()], visit):
            raise self._sign_in_needed("That is not the token.", target, visit)
        raise ProxyError(303, "Signed in.", (("Location", target), self._new_cookie(visit)))

    def _sign_in_needed(self, detail: str, target: str, visit: Visit) -> SignInNeeded:
        """At an app's host no token is asked for: the app's pages, which share it, could read what is typed there."""
        if not visit.app_port:
            return SignInNeeded(detail, target, self.config.base + "/")
        host = host_of(visit.authority)
        ours = "%s://%s%s" % (visit.scheme, host.partition(".")[2], visit.authority[len(host) :])
        return SignInNeeded(detail, "%s%s/?open=%d" % (ours, self.config.base, visit.app_port), "")

    def _lead_to_host(self, port: int, visit: Visit) -> ProxyError:
        """The redirect to the host that a port has for itself, with a ticket where one must be signed in there."""
        url = host_form(port, visit, self.config.domains)
        if not url or port > 65535:
            advice = " Start the proxy with --domain, and a name whose subdomains lead here."
            raise ProxyError(404, "By this name of the proxy no host of an app's own can be reached." + advice)
        if self.token:
            ticket = secrets.token_urlsafe(32)
            self._tickets[ticket] = port, time.monotonic() + _TICKET_SECONDS
            while len(self._tickets) > _MAX_TICKETS:
                del self._tickets[next(iter(self._tickets))]
            url += ENTRANCE[1:] + "?ticket=" + ticket
        return ProxyError(303, "It is over there.", (("Location", url), _NO_REFERRER))

    def _enter(self, ticket: str, head: RequestHead, visit: Visit) -> ProxyError:
        """The redirect into an app's host, for who comes with a ticket for it."""
        port, until = self._tickets.pop(ticket, (0, 0.0))
        if port != visit.app_port or time.monotonic() > until:
            detail = "This way in is over: it was used, or took too long." if ticket else ""
            return self._sign_in_needed(detail, "/", visit)
        cookie = () if self._is_signed_in(head, visit) else (self._new_cookie(visit),)
        return ProxyError(303, "Signed in.", (("Location", "/"), _NO_REFERRER) + cookie)

    def _is_signed_in(self, head: RequestHead, visit: Visit) -> bool:
        # Looked up by hash: how long that takes tells nothing about 256 random bits.
        host = host_of(visit.authority)
        return any(self._sessions.get(one) == host for one in _cookie_values(head.fields, self.cookie_name))

    def _check_host(self, authority: str) -> None:
        if authority in self._known_names:
            return
        host = host_of(authority)
        try:
            address = ipaddress.ip_address(host.strip("[]"))
            known = address.is_loopback or not self.is_private  # an address is no name that could be made to point here
        except ValueError:
            known = host in ("", "localhost") or host.endswith(".localhost")
            known = known or any(host == domain or host.endswith("." + domain) for domain in self.config.domains)
            known = known or (not self.is_private and host == socket.gethostname().lower())
        if not known and not any(fnmatch.fnmatchcase(host, name) for name in self.config.allow_hostnames):
            name = "The name %s, by which this request came, is not known to lead here." % host
            advice = " Start the proxy with --allow-hostname %s if it does." % host
            raise ProxyError(403, name + (advice if _PLAIN_HOST.fullmatch(host) else ""))
        if len(self._known_names) < _MAX_NAMES:
            self._known_names.add(authority)

    def _check_credentials(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> bool:
        """Whether it is the cookie, which a browser sends on its own, that lets the request in."""
        signed_in = self._is_signed_in(head, visit)
        shown, wrong = False, ""
        if not signed_in:
            in_fields = [token for value in field_values(head.fields, "authorization") for token in _tokens_in(value)]
            # What a page of another site makes a browser ask for must not use up its user's tries.
            in_query = [] if _is_cross_site(head) and not is_page_visit(head) else _query_tokens(head.target)
            shown = self._try("fields", in_fields, visit) or self._try("query", in_query, visit)
            wrong = "What came as a token is not the proxy's. " if in_fields or in_query else ""
        clean = self._without_token(head.target)
        if (signed_in or shown) and clean != head.target and is_page_visit(head):
            cookie = () if signed_in else (self._new_cookie(visit),)
            location = "/." + clean if _OTHER_HOST.match(clean) else clean
            raise ProxyError(302, "Signed in.", (("Location", location),) + cookie)
        if signed_in or shown:
            return signed_in
        if is_websocket(head):
            raise ProxyError(403, wrong + "A WebSocket needs a signed-in browser, or the proxy's token.")
        if is_page_visit(head):
            prefix = route.prefix if route and route.strayed else ""
            raise self._sign_in_needed(wrong.strip(), prefix + head.target, visit)
        raise ProxyError(401, wrong + "The proxy's token is needed, as 'Authorization: token TOKEN'.", _CHALLENGE)

    def _try(self, where: str, tokens: Sequence[str], visit: Visit) -> bool:
        """Whether one of `tokens` is right; ProxyError 429 for an address that has shown too many wrong ones.

        They are counted apart by where they stand, and the same wrong one once: an app's own token, sent again and
        again to a proxy that does not know the browser any more, keeps nobody from signing in.
        """
        now = time.monotonic()
        left, since, last = self._wrong.pop((visit.address, where), (_TRIES, now, frozenset()))
        left = min(_TRIES, left + now - since)
        seen = {hash(token) for token in tokens}
        is_new = not seen <= last
        if tokens and is_new and left < 1:
            self._wrong[visit.address, where] = left, now, last
            raise ProxyError(429, "Too many wrong tokens came from there. Try again shortly.", (("Retry-After", "5"),))
        right = any(map(self.owns_token, tokens))
        if tokens and is_new and not right:
            left, last = left - 1, frozenset(seen if len(last) >= _TRIES else seen | last)
        if left < _TRIES:
            self._wrong[visit.address, where] = left, now, last
            while len(self._wrong) > _MAX_SOURCES:
                del self._wrong[next(iter(self._wrong))]
        return right

    def _new_cookie(self, visit: Visit) -> Tuple[str, str]:
        session = secrets.token_urlsafe(32)
        self._sessions[session] = host_of(visit.authority)
        while len(self._sessions) > _MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        secure = "; Secure" if visit.scheme == "https" else ""
        path = "/" if visit.app_port or self.config.whole_origin else self.config.base or "/"
        return "Set-Cookie", "%s=%s; Path=%s; HttpOnly; SameSite=Lax%s" % (self.cookie_name, session, path, secure)


# What may be copied into a shell; nobody who means well is called otherwise.
_PLAIN_HOST = re.compile(r"[a-z0-9_][a-z0-9_.-]*|\[[0-9a-f:.]+\]")
_PLAIN_ORIGIN = re.compile("https?://(?:%s)(?::[0-9]{1,5})?" % _PLAIN_HOST.pattern)


def normal_origin(origin: str) -> str:
    """An origin in lower case and without its scheme's default port; ValueError if it is none."""
    match = _HTTP_URL.fullmatch(origin.lower())
    if not match or match.group(3) or not is_authority(match.group(2)):
        raise ValueError("an origin is a scheme, host and port such as https://a.example.org, not %r" % origin)
    return "%s://%s" % (match.group(1), _without(_DEFAULT_PORTS[match.group(1)], match.group(2)))


_ANY_PAGE = " Start the proxy with --allow-origin '*' if any page may."


def _foreign(origin: str, visit: Visit, has_server_in_front: bool) -> ProxyError:
    here = visit.authority or "a server without a name"
    if _PLAIN_ORIGIN.fullmatch(origin.lower()):
        detail = "A page of another site, {0}, may not do this here, which is {1}."
        detail += " Start the proxy with --allow-origin {0} if it should be."
        if has_server_in_front:
            detail += " If that is this site, the server in front of the proxy has to pass Host on as it came."
        return ProxyError(403, detail.format(normal_origin(origin), here))
    detail = "A page without a proper origin may not do this here, which is %s."  # null, as of a file or a sandbox
    return ProxyError(403, detail % here + _ANY_PAGE)


def _is_among(origin: str, allowed: Sequence[str]) -> bool:
    try:
        return normal_origin(origin) in allowed
    except ValueError:  # "null", and worse
        return False


def _cookie_name(cookie: str) -> str:
    """The name in a pair of Cookie or at the beginning of Set-Cookie, however loosely it may be read."""
    return cookie.split(";")[0].lstrip(" \t=").partition("=")[0].rstrip(" \t")


def _cookie_values(fields: Fields, name: str) -> List[str]:
    pairs = [pair.strip(" \t") for value in field_values(fields, "cookie") for pair in value.split(";")]
    return [pair[len(name) + 1 :] for pair in pairs if pair.startswith(name + "=")]


def _query_tokens(target: str) -> List[str]:
    parameters = [one.partition("=") for one in target.partition("?")[2].split("&")]
    return [unquote(value) for name, _, value in parameters if unquote(name) == "token"]


def _tokens_in(authorization: str) -> List[str]:
    match = _TOKEN_FIELD.fullmatch(authorization)
    return [match.group(1)] if match else []


# ---------------------------------------------------------------------------------------------------------------------
# Strays: requests that left the prefix, as links that begin with a slash do, and the app that they mean
# ---------------------------------------------------------------------------------------------------------------------


def find_stray(head: RequestHead, visit: Visit, base: str, cookie: str) -> Optional[Route]:
    """The route that a request without a prefix means, None where nothing tells: the app of the page that asks
    (Referer), or else the one that this browser opened last (`cookie`).  ProxyError 400 as `find_route`.

    Only for what pages of our own origin ask for, and for what a person types.
    """
    if not _comes_from_us(head, visit):
        return None
    for app in _app_of_referer(head, visit, base) or _cookie_values(head.fields, cookie):
        if _is_app(base, app):
            route = find_route(base, "%s/%s%s" % (base, app, head.target))
            return route and route._replace(strayed=True)
    return None


def not_found(error: ProxyError, head: RequestHead, visit: Visit, config: Config) -> ProxyError:
    """The answer to what no app is found for: our page, for who asks for the origin itself, or else what would help."""
    if head.target == "/" and config.whole_origin and is_page_visit(head):
        return ProxyError(302, "It is over there.", (("Location", config.base + "/"),))
    url, advice = host_form(8080, visit, config.domains), ""
    port, _, domain = host_of(visit.authority).partition(".")
    if config.domains and is_domain(domain) and port_in_host(visit.authority, (domain,)):
        advice = " For {0}.{1} to be port {0}, start the proxy with --domain {1}.".format(port, domain)
    elif url:
        advice = " Where links begin with a slash, call the app by a host of its own, such as %s." % url
    return ProxyError(error.status, error.detail + (advice if error.status == 404 else ""), error.fields)


def cannot_be_redirected(head: RequestHead) -> bool:
    """Whether what asks takes no redirect for an answer: WebSockets, and a service worker's script."""
    return is_websocket(head) or "serviceworker" in field_values(head.fields, "sec-fetch-dest")


def led_back(route: Route) -> Response:
    """The redirect of a stray to where it belongs, so that cookies and the next Referer come out right."""
    location = route.prefix + route.path + route.query
    return Response(307, (("Location", location), ("Cache-Control", "no-store"), ("Content-Length", "0")), b"")


def remember_app(
    response: ResponseHead, opened: bool, known: Sequence[str], route: Route, visit: Visit, cookie: str
) -> ResponseHead:
    """The response, with what lets this browser's strays find the app: a cookie that names it once it is opened, and
    copies of its own cookies that are sent to all paths.

    opened: whether a person opens a page of it; known: the values of that cookie which came with the request.
    """
    if not route.prefix or not (opened or field_values(response.fields, "set-cookie")):
        return response
    added = [("Set-Cookie", one) for one in _copies(response, route, cookie)] if known or opened else []
    if opened and response.status < 400 and list(known) != [_app_name(route)]:
        secure = "; Secure" if visit.scheme == "https" else ""
        value = "%s=%s; Path=/; HttpOnly; SameSite=Lax%s" % (cookie, _app_name(route), secure)
        added.append(("Set-Cookie", value))
    return response._replace(fields=response.fields + tuple(added))


def with_own_cookies(head: RequestHead, route: Route, cookie: str) -> RequestHead:
    """A stray that is served where it was asked for, with the app's cookies that its browser keeps for the prefix."""
    start = _copy_name(route, cookie)
    pairs = [pair.strip(" \t") for value in field_values(head.fields, "cookie") for pair in value.split(";")]
    names = frozenset(map(_cookie_name, pairs))
    restored = [pair[len(start) :] for pair in pairs if pair.startswith(start)]
    own = [pair for pair in restored if _cookie_name(pair) not in names]
    others = tuple(field for field in head.fields if field[0].lower() != "cookie")
    return head._replace(fields=others + (("Cookie", "; ".join(pairs + own)),)) if own else head


def _comes_from_us(head: RequestHead, visit: Visit) -> bool:
    """Whether the browser says that a page of our own origin asks, or that a person does in the address bar."""
    sites, origins, referers = (field_values(head.fields, name) for name in ("sec-fetch-site", "origin", "referer"))
    typed = is_page_visit(head) and head.target != "/"  # that is asked of us
    if any(not is_own_origin(origin, visit.authority) for origin in origins) and sites != ["same-origin"]:
        return False
    if sites:
        return sites == ["same-origin"] or (sites == ["none"] and typed)
    if referers:
        return all(_path_here(referer, visit) for referer in referers)
    return bool(origins) or typed


def _path_here(url: str, visit: Visit) -> str:
    """The path of a URL of our own origin; "" for any other."""
    match = _HTTP_URL.fullmatch(url)
    if not match or not is_own_origin("%s://%s" % match.group(1, 2), visit.authority):
        return ""
    return re.split("[?#]", match.group(3))[0] or "/"


def _app_of_referer(head: RequestHead, visit: Visit, base: str) -> List[str]:
    """The app that the page which asks belongs to, [] where it belongs to none, "" in it where it is our own page."""
    for referer in field_values(head.fields, "referer"):
        path = _path_here(referer, visit)
        if base and path and is_home(base, path):
            return [""]
        try:
            route = find_route(base, path) if path else None
        except ProxyError:
            continue
        if route is not None:
            return [_app_name(route)]
    return []


def _is_app(base: str, app: str) -> bool:
    """Whether a name that a browser sent is that of an app, and nothing else."""
    try:
        route = find_route(base, "%s/%s/" % (base, app))
    except ProxyError:
        return False
    return route is not None and _app_name(route) == app


def _app_name(route: Route) -> str:
    """An app as our cookie names it: what stands behind the base in its prefix."""
    parts = route.prefix.split("/")
    return "/".join(parts[-2:] if route.absolute else parts[-1:])


def _copy_name(route: Route, cookie: str) -> str:
    """How the names of the copies of an app's cookies begin."""
    return "%s_%s_" % (cookie, hashlib.sha256(_app_name(route).encode()).hexdigest()[:8])


def _copies(response: ResponseHead, route: Route, cookie: str) -> List[str]:
    """The cookies that a response sets for less than all paths, under names of ours for all of them."""
    copies = []
    for value in field_values(response.fields, "set-cookie"):
        attributes = value.split(";")[1:]
        keys = [part.partition("=")[0].strip(" \t").lower() for part in attributes]
        paths = [part.partition("=")[2].strip(" \t") for part, key in zip(attributes, keys) if key == "path"]
        pair = value.split(";")[0].strip(" \t")
        if pair.partition("=")[0] and paths[-1:] != ["/"]:
            kept = [part for part, key in zip(attributes, keys) if key not in ("path", "domain", "httponly")]
            copies.append(";".join([_copy_name(route, cookie) + pair] + kept + [" Path=/", " HttpOnly"]))
    return copies


# ---------------------------------------------------------------------------------------------------------------------
# Ports: who listens where on this machine, as Linux tells in /proc; elsewhere nobody is found
# ---------------------------------------------------------------------------------------------------------------------

_LISTEN = "0A"  # the state of a listening socket in /proc/net/tcp
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_FIRST_COMMON_PORT = 1024  # below are the system's own services
_INTERPRETER = re.compile(r"(?:python|pypy|node|ruby|perl|php|java|bash|sh|deno|bun|Rscript|R)[0-9.]*\Z")


_PLAIN_OPTIONS = "-u -E -I -s -S -O -OO -B -b -q -v -X -W".split()  # of Python; behind others there may be code
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,60}")


class TcpSocket(NamedTuple):
    """A row of the kernel's table; the address as that spells it, the peer with its port."""

    address: str
    port: int
    peer: str
    state: str
    user: int
    inode: str


class Listener(NamedTuple):
    """A program of this user's that listens on a port.

    addresses: where it does, as text; inode: names the socket for as long as it lives; started: when the program was,
    in seconds since the epoch, 0.0 where that is not told.
    """

    port: int
    addresses: Tuple[str, ...]
    inode: str
    pid: int = 0
    program: str = ""
    started: float = 0.0

    @property
    def is_local(self) -> bool:
        """Whether localhost leads to it."""
        return _leads_to("localhost", self.addresses)


def _leads_to(host: str, addresses: Iterable[str]) -> bool:
    """Whether one of LOOPBACK_NAMES leads to what listens at one of these addresses."""
    family = {"127.0.0.1": ("127.0.0.1", "0.0.0.0", "::"), "::1": ("::1", "::")}
    return any(one in family.get(host, ("127.0.0.1", "0.0.0.0", "::1", "::")) for one in addresses)


def tcp_sockets(tables: Sequence[str] = _TABLES, port: Optional[int] = None) -> List[TcpSocket]:
    """The sockets at a local port, or all that listen where none is given; IPv4 in front of IPv6."""
    wanted = "[0-9A-F]{4}" if port is None else "%04X" % port
    state = _LISTEN if port is None else ".."
    row = r"^ *[0-9]+: ([0-9A-F]+):(%s) ([0-9A-F]+:[0-9A-F]{4}) (%s) \S+ \S+ \S+ +([0-9]+) +[0-9]+ ([0-9]+) "
    found: List[TcpSocket] = []
    for name in tables:
        try:
            with open(name, encoding="ascii") as table:
                rows = re.findall(row % (wanted, state), table.read(), re.M)
        except (OSError, ValueError):
            continue
        found += [TcpSocket(a, int(p, 16), peer, s, int(user), inode) for a, p, peer, s, user, inode in rows]
    return found


def ports_are_told() -> bool:
    """Whether this system says who listens where."""
    return os.path.exists(_TABLES[0])


def listeners() -> List[Listener]:
    """What programs of this user listen on, by port; the system's own services are left out."""
    mine = getattr(os, "geteuid", int)()
    by_port: Dict[int, List[TcpSocket]] = {}
    for one in tcp_sockets():
        if one.user == mine and one.port >= _FIRST_COMMON_PORT:
            by_port.setdefault(one.port, []).append(one)
    holders = _holders({one.inode for sockets in by_port.values() for one in sockets})
    found = []
    for port, sockets in sorted(by_port.items()):
        pid = next((holders[one.inode] for one in sockets if one.inode in holders), 0)
        if not pid:  # of another container on the same network, say
            continue
        addresses = tuple(dict.fromkeys(_plain_text(one.address) for one in sockets))
        found.append(Listener(port, addresses, sockets[0].inode, pid, _program(pid), _started(pid)))
    return found


def listens_elsewhere(host: str, port: int) -> Tuple[str, ...]:
    """The addresses at which this port is listened on, by whomever, where `host`, if it is one of LOOPBACK_NAMES, leads
    to none of them."""
    if host not in LOOPBACK_NAMES:
        return ()
    addresses = tuple(_plain_text(one.address) for one in tcp_sockets(port=port) if one.state == _LISTEN)
    return () if _leads_to(host, addresses) else addresses


def _user_name(user: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(user).pw_name
    except (ImportError, KeyError):
        return "number %d" % user


def _plain_text(address: str) -> str:
    """An address, from what /proc/net/tcp makes of it: 32-bit words in the machine's byte order."""
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    return plain_address(str(ipaddress.ip_address(struct.pack("=%dI" % len(words), *words))))


def _holders(inodes: Set[str]) -> Dict[str, int]:
    """The first process that holds each of these sockets, as far as we may look."""
    found: Dict[str, int] = {}
    for pid in sorted(int(name) for name in _names("/proc") if name.isdigit()) if inodes else ():
        for descriptor in _names("/proc/%d/fd" % pid):
            try:
                target = os.readlink("/proc/%d/fd/%s" % (pid, descriptor))
            except OSError:  # it is gone
                continue
            if target.startswith("socket:[") and target[8:-1] in inodes:
                found.setdefault(target[8:-1], pid)
    return found


def _names(folder: str) -> List[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _program(pid: int) -> str:
    """What a person would call a process; its further arguments, which may hold secrets, are left out."""
    try:
        with open("/proc/%d/cmdline" % pid, encoding="utf-8", errors="replace") as file:
            words = file.read().split("\0")[:-1]
    except OSError:
        return ""
    rest = words[1:]
    # Some write all of their arguments, or what they do, into the first.
    name = os.path.basename("".join(words[:1]) if any(rest) else "".join(words[:1]).split(" ")[0])
    while rest and rest[0] in _PLAIN_OPTIONS:
        rest = rest[2:] if rest[0] in ("-X", "-W") else rest[1:]
    script = os.path.basename("".join(rest[1:2] if rest[:1] == ["-m"] else rest[:1]))
    if _INTERPRETER.match(name) and _PLAIN_NAME.fullmatch(script):
        return script
    return name.split(" ")[0].rstrip(":")


def _started(pid: int) -> float:
    try:
        with open("/proc/%d/stat" % pid, encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------------------
# Upstream: opening connections, and keeping idle ones for the next request
# ---------------------------------------------------------------------------------------------------------------------

Address = Tuple[str, int]

_FIRST_ORDINARY_USER = 1000  # below are root and the system's own services


class Owners:
    """Who listens on the ports of this machine, as Linux tells.

    Where its kernel does not answer questions about single sockets, there is the table of all of them, and a look at
    that takes as long as the machine has sockets, up to tenths of a second; what it said is believed for twenty times
    as long as it took, so that looking never costs more than a twentieth of the time.
    """

    def __init__(self) -> None:
        self._known: Dict[Tuple[str, int], Tuple[Optional[int], float]] = {}
        self._elsewhere: Dict[Address, Tuple[Tuple[str, ...], float]] = {}

    def stranger(self, here: Address, there: Address) -> Optional[int]:
        """The user id of another ordinary user who holds the far end of a connection from `here` to `there`; None if it
        is our own, root's or a system service's, or if the system does not tell."""
        begun = time.perf_counter()
        owner, until = self._known.get(there, (None, 0.0))
        if begun >= until:
            owner = _told_owner(here, there)
            if owner is None:
                owner = _owner(here, there)
            now = time.perf_counter()
            if len(self._known) > 1000:
                self._known.clear()
            self._known[there] = owner, now + 20 * (now - begun)
        mine = getattr(os, "geteuid", int)()
        return owner if owner is not None and owner >= _FIRST_ORDINARY_USER and owner != mine else None

    def elsewhere(self, host: str, port: int) -> Tuple[str, ...]:
        """As `listens_elsewhere`."""
        begun = time.perf_counter()
        addresses, until = self._elsewhere.get((host, port), ((), 0.0))
        if begun >= until:
            addresses = listens_elsewhere(host, port)
            now = time.perf_counter()
            if len(self._elsewhere) > 1000:
                self._elsewhere.clear()
            self._elsewhere[host, port] = addresses, now + 20 * (now - begun)
        return addresses


def _told_owner(here: Address, there: Address) -> Optional[int]:
    """As `_owner`, asked of the kernel; None where it does not tell."""
    accepted = _told_user(here, there)
    nowhere = ("::" if ":" in there[0] else "0.0.0.0", 0)
    return accepted or _told_user(nowhere, there)  # 0, root's, is also that of one that nobody has accepted yet


def _told_user(here: Address, there: Address) -> Optional[int]:
    """The user id of the socket at `there` that is connected to `here`, or that listens where this has no port; None
    if there is none, or if the kernel does not answer (sock_diag(7))."""
    family = socket.AF_INET6 if ":" in there[0] else socket.AF_INET
    packed = (ipaddress.ip_address(end[0]).packed for end in (there, here))
    ends = struct.pack("!HH16s16s", there[1], here[1], *packed) + b"\0" * 4 + b"\xff" * 8  # any interface and cookie
    question = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ends  # in any state
    header = struct.pack("=IHHII", 16 + len(question), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.setblocking(False)
            kernel.send(header + question)
            answer = kernel.recv(4096)
    except (AttributeError, OSError):
        return None
    if len(answer) < 84 or struct.unpack_from("=H", answer, 4)[0] != _SOCK_DIAG_BY_FAMILY:
        return None
    return int(struct.unpack_from("=I", answer, 80)[0])


_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1


def _owner(here: Address, there: Address) -> Optional[int]:
    """The user id of the socket that `here` is connected to, or of the one that listens for it, by the table."""
    is_mapped = "." in there[0]  # a socket of IPv6 may serve IPv4 too, and not the other way round
    exact = {_hexadecimal(there[0]), _hexadecimal("::ffff:" + there[0]) if is_mapped else ""}
    listening: List[Tuple[bool, int]] = []  # the ones for that very address precede those for all addresses
    for one in tcp_sockets(_TABLES if is_mapped else _TABLES[1:], there[1]):
        is_exact = one.address in exact
        if is_exact and one.peer.endswith(":%04X" % here[1]) and one.state != _LISTEN and one.user:
            return one.user  # accepted: this is the socket itself
        if one.state == _LISTEN and (is_exact or not one.address.strip("0")):
            listening.append((not is_exact, one.user))
    listening.sort(key=lambda found: found[0])  # stable: IPv4 stays in front of IPv6
    return listening[0][1] if listening else None


def _hexadecimal(address: str) -> str:
    """An address as /proc/net/tcp spells it: 32-bit words in the machine's byte order."""
    packed = ipaddress.ip_address(address).packed
    words = struct.unpack("=%dI" % (len(packed) // 4), packed)
    return "".join("%08X" % word for word in words)


class NotListening(ProxyError):
    """Nobody accepts connections where the route leads, yet: a page visit is answered with a page that waits."""

    def __init__(self, route: Route, elsewhere: Sequence[str]) -> None:
        detail = _why_nobody_listens(route, elsewhere)
        super().__init__(502, detail, (("Retry-After", "2"), ("Port-Proxy", "waiting")))
        self.route = route


def _why_nobody_listens(route: Route, elsewhere: Sequence[str]) -> str:
    if not elsewhere:
        return "Nothing listens on %s. Is the app running, and is this its port?" % route.place
    there = next((one for one in elsewhere if one in LOOPBACK_NAMES), elsewhere[0])
    text = "The app on port {0} listens at {5} alone, not at {2}. "
    if there in LOOPBACK_NAMES:
        text += "Open {0} in place of {3}."
    else:
        text += (
            "Start it with 127.0.0.1 as the address to listen on, or the proxy with --host-allowlist {1}, and open"
            " {4} in place of {0}."
        )
    place = route._replace(host=there).authority
    return text.format(route.port, there, route.host, route.authority, place, " and ".join(elsewhere))


class Upstreams:
    """The connections to upstreams.

    listening: our own addresses; a connection that would reach one of them is refused: it could go round for ever.
    """

    def __init__(self, config: Config, watch: Watch, listening: Sequence[Address]) -> None:
        self.config = config
        self.watch = watch
        self.listening = listening
        self.owners = Owners()
        self._contexts: Dict[bool, ssl.SSLContext] = {}
        self._idle: Dict[Address, List[Tuple[Stream, float]]] = {}
        self._idle_count = 0

    def take(self, route: Route, replayable: bool) -> Optional[Stream]:
        """An idle connection to the route's target that is fit for use, or None.

        An upstream may close one at the moment we use it.  Only a replayable request may be sent again then; for the
        others nothing older than a second is used, which no server is known to close.
        """
        address = route.host, route.port
        idle = self._idle.get(address)
        while idle and (replayable or time.monotonic() - idle[-1][1] < 1.0):
            stream = self._discard(address, idle, -1)
            if stream.is_fresh():  # also in the kernel, where the loop has not looked yet
                stream.was_heard = False
                stream.write_deadline = FOREVER
                return stream
            stream.abort()
        return None

    def has_idle(self, route: Route) -> bool:
        """Whether there is an idle connection to the route's target, fit for use or not."""
        return (route.host, route.port) in self._idle

    def give(self, route: Route, stream: Stream) -> None:
        """Keep a connection whose exchange ended cleanly and exactly; the least sign of life from it ends that."""
        # What as yet the kernel alone knows ends it in the loop's next round, or in `take` if that comes first.
        if not stream.is_quiet() or stream.queued() or self._idle_count >= self.config.max_idle_upstreams:
            stream.close()
            return
        address, now = (route.host, route.port), time.monotonic()
        idle = self._idle.get(address)
        if idle is None:
            idle = self._idle[address] = []
        idle.append((stream, now))
        self._idle_count += 1
        stream.read_deadline = now + self.config.idle_upstream_timeout
        stream.on_data = stream.on_end = functools.partial(self._drop, address, stream)

    def _drop(self, address: Address, stream: Stream) -> None:
        """Close an idle connection on which something came, or the end."""
        idle = self._idle[address]
        self._discard(address, idle, next(at for at in range(len(idle)) if idle[at][0] is stream))
        stream.abort()

    def close(self) -> None:
        """Close all idle connections."""
        for idle in list(self._idle.values()):
            for stream, _ in list(idle):
                stream.on_data = stream.on_end = None
                stream.abort()
        self._idle.clear()
        self._idle_count = 0

    def _discard(self, address: Address, idle: List[Tuple[Stream, float]], at: int) -> Stream:
        """Take one of the idle connections to an address out of the pool; it need not be closed for that."""
        stream, _ = idle.pop(at)
        stream.on_data = stream.on_end = None
        stream.read_deadline = FOREVER
        self._idle_count -= 1
        if not idle:
            del self._idle[address]
        return stream

    async def connect(self, route: Route) -> Stream:
        """A new connection to the route's target; ProxyError 502, 503, 504 or 508 if there is none to be had."""
        try:
            return await limited(self._connect_any(route), self.config.connect_timeout)
        except asyncio.TimeoutError:
            raise _no_answer_in_time(route, self.config)
        except (ssl.SSLError, ssl.CertificateError) as error:
            raise ProxyError(502, _tls_trouble(route, error))
        except (socket.gaierror, UnicodeError):  # that: no name that could be looked up
            raise ProxyError(
                502, "The host %s could not be found. Check its spelling, or this machine's name service." % route.host
            )
        except ConnectionRefusedError:
            raise NotListening(route, self.owners.elsewhere(route.host, route.port))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ProxyError(503, "The proxy has no file descriptor left to connect with. Try again shortly.")
            if error.errno == errno.ETIMEDOUT:
                raise _no_answer_in_time(route, self.config)
            reason = os.strerror(error.errno) if error.errno else "unknown reason"
            raise ProxyError(502, "No connection to %s: %s." % (route.place, reason))

    async def _connect_any(self, route: Route) -> Stream:
        """Try the addresses of the route's host one after the other; the most telling OSError if none answers."""
        failures = []
        for address in await self._addresses(route):
            try:
                return await self._connect_one(address, route)
            except ssl.SSLError:
                raise
            except OSError as error:
                failures.append(error)
        failures.sort(key=lambda error: not isinstance(error, ConnectionRefusedError))
        raise failures[0]

    async def _addresses(self, route: Route) -> List[Address]:
        if route.host == "localhost":
            return [("127.0.0.1", route.port), ("::1", route.port)]
        found = await self.watch.loop.getaddrinfo(route.host, route.port, type=socket.SOCK_STREAM)
        return [info[4][:2] for info in found]  # type: ignore[misc]

    async def _connect_one(self, address: Address, route: Route) -> Stream:
        loop = self.watch.loop
        tls: Dict[str, Any] = {}
        if route.scheme == "https":
            verified = not (self.config.insecure_upstream and route.host in LOOPBACK_NAMES)
            if verified not in self._contexts:  # making one takes longer than using it
                self._contexts[verified] = upstream_context(verified)
            tls = {"ssl": self._contexts[verified], "server_hostname": route.host}
        stream = Stream(self.watch)
        if tls or not can_watch_sockets(loop):
            await loop.create_connection(lambda: stream, *address, **tls)
        else:
            await self._connect_plainly(address, stream)
        here, there = _ends_of(stream)
        if here == there:  # TCP lets a socket connect to itself where nobody listens
            stream.abort()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
        if any(_reaches(here, there, own) for own in self.listening):
            stream.abort()
            raise ProxyError(508, "Port %d is the proxy's own: the request would go round for ever." % there[1])
        if not self.config.any_owner and ipaddress.ip_address(there[0]).is_loopback:
            owner = self.owners.stranger(here, there)
            if owner is not None:
                stream.abort()
                raise ProxyError(403, _whose_port(there[1], owner))
        return stream

    async def _connect_plainly(self, address: Address, stream: Stream) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self.watch.loop.sock_connect(sock, address)
            SocketTransport(self.watch.loop, sock, stream, sock.getpeername())
        except BaseException:
            sock.close()
            raise


def _whose_port(port: int, owner: int) -> str:
    text = (
        "Port %d of this machine belongs to another user, %s. What is opened here could act in your name at your other"
    )
    return (text + " apps. If you trust it, start the proxy with --any-owner.") % (port, _user_name(owner))


def upstream_context(verified: bool) -> ssl.SSLContext:
    """How TLS is spoken to upstreams, with their certificates verified or not."""
    context = ssl.create_default_context()
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _tls_trouble(route: Route, error: Exception) -> str:
    if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        advice = "" if route.host not in LOOPBACK_NAMES else " --insecure-upstream accepts any on this machine."
        return "The certificate of %s could not be verified.%s" % (route.place, advice)
    return "No TLS connection to %s could be made. Does it speak TLS? See --upstream-tls." % route.place


def _ends_of(stream: Stream) -> Tuple[Address, Address]:
    """Both addresses of a connection; ConnectionResetError if it is gone already."""
    ends = [stream.transport.get_extra_info(name) for name in ("sockname", "peername")]
    if not all(ends):
        stream.abort()
        raise ConnectionResetError(errno.ECONNRESET, "reset as soon as it was accepted")
    here, there = ((plain_address(end[0]), int(end[1])) for end in ends)
    return here, there


def _reaches(here: Address, there: Address, listening: Address) -> bool:
    """Whether a connection from `here` to `there` ends at the socket that listens at `listening`."""
    if there[1] != listening[1]:
        return False
    if listening[0] not in ("0.0.0.0", "::"):
        return bool(there[0] == listening[0])
    return bool(there[0] == here[0]) or ipaddress.ip_address(there[0]).is_loopback


def _no_answer_in_time(route: Route, config: Config) -> ProxyError:
    return ProxyError(
        504, "The connection to %s was not answered within %g seconds." % (route.place, config.connect_timeout)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Probe: what a port has to say when the proxy itself asks it
# ---------------------------------------------------------------------------------------------------------------------

_PROBE_SECONDS = 3.0
_PROBE_BYTES = 1 << 22


class Answer(NamedTuple):
    """What a port answered to a GET of ours: its head, and as much of its body as was wanted."""

    head: ResponseHead
    body: bytes


async def ask(upstreams: Upstreams, route: Route, fields: Fields = (), patience: float = _PROBE_SECONDS) -> Answer:
    """GET the route's target; ProxyError 502 or 504 as for any request, also if the answer is no valid HTTP, or has not
    come whole within `patience` s."""
    stream = await upstreams.connect(route)
    config = upstreams.config
    given = {name.lower() for name, _ in fields}
    usual = (("Host", route.authority), ("Accept", "text/html, */*;q=0.1"), ("User-Agent", "port_proxy"))
    own = tuple(field for field in usual + (("Connection", "close"),) if field[0].lower() not in given)
    deadline = stream.now() + patience
    try:
        stream.write(serialise_request(RequestHead("GET", route.target, "", "1.1", own + fields)))
        head = parse_response(await read_head(stream, False, deadline, config), config)
        body, data = Body(stream, response_framing("GET", head), config), b""
        while not body.finished and len(data) < _PROBE_BYTES and head.status != 101:
            data += await body.read(deadline - stream.now())
        return Answer(head, data)
    except Stalled:
        raise ProxyError(504, "No answer came from %s within %g seconds." % (route.place, patience))
    except (ProxyError, Truncated, OSError):
        raise ProxyError(502, "No valid HTTP came from %s." % route.place)
    finally:
        stream.abort()


async def speaks_tls_there(upstreams: Upstreams, route: Route) -> bool:
    """Whether a TLS handshake gets an answer that is TLS."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    hello, said = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(said, hello, server_hostname="localhost").do_handshake()
    try:
        stream = await upstreams.connect(route._replace(scheme="http"))
    except ProxyError:
        return False
    try:
        stream.write(hello.read())
        answer = await stream.take(5, stream.now() + _PROBE_SECONDS)
    except (Stalled, OSError):
        return False
    finally:
        stream.abort()
    return is_tls_record(answer)


def is_tls_record(data: Union[bytes, bytearray]) -> bool:
    """Whether bytes begin as a handshake or an alert of TLS does (RFC 8446 section 5.1)."""
    return bytes(data[:2]) in (b"\x15\x03", b"\x16\x03")


def tls_advice(route: Route) -> str:
    """What to do where an upstream speaks TLS, and nobody said so."""
    is_local = route.host in LOOPBACK_NAMES
    text = "The app on %s speaks TLS. Start the proxy with --upstream-tls %s" % (route.place, _tls_name(route))
    return text + (", and --insecure-upstream if its certificate is its own." if is_local else ".")


def _perhaps_tls(route: Route) -> str:
    if route.scheme == "https":
        return ""
    return " If it speaks TLS, start the proxy with --upstream-tls %s." % _tls_name(route)


def _tls_name(route: Route) -> str:
    return str(route.port) if route.host in LOOPBACK_NAMES else route.authority


# ---------------------------------------------------------------------------------------------------------------------
# Pages: what people see
# ---------------------------------------------------------------------------------------------------------------------

_STYLE = """\
:root{color-scheme:light dark;--ink:#1c2733;--soft:#5c6b7a;--line:#d9e0e7;--ground:#f6f8fa;--card:#fff;--link:#0b5cad}
@media(prefers-color-scheme:dark){
:root{--ink:#e3e8ee;--soft:#98a5b3;--line:#303a45;--ground:#13181e;--card:#1b222a;--link:#7db7f5}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);overflow-wrap:anywhere}
main{max-width:46rem;margin:0 auto;padding:2rem .6rem}
h1{font-size:1.4rem;line-height:1.3;margin:0 0 .5rem}p{margin:.5rem 0}a{color:var(--link)}
code{font-family:ui-monospace,monospace}.option{white-space:nowrap}.soft,summary{color:var(--soft)}summary{cursor:pointer}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
form{display:flex;flex-wrap:wrap;gap:.5rem;align-items:end;margin:1rem 0}label{flex:1 1 12rem;color:var(--soft)}
input,button{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--soft);border-radius:.4rem;
padding:.4rem .7rem}input{display:block;width:100%}
button{cursor:pointer;background:var(--link);border-color:var(--link);color:var(--card)}
.ports{list-style:none;padding:0;margin:1rem 0}
.ports li{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.7rem 1rem;margin:.5rem 0;
transition:opacity .6s}.ports .gone{opacity:.35}
.port{font-weight:600;font-size:1.15rem;margin-right:.6rem}
.ways a{display:inline-block;margin-right:1rem;font-size:.9rem}
td{padding:.2rem 1.2rem .2rem 0;vertical-align:top}
@media(prefers-reduced-motion:no-preference){.pulse::after{content:"";display:inline-block;width:.6em;height:.6em;
margin-left:.5em;border-radius:50%;background:var(--link);animation:pulse 2s infinite}}
@keyframes pulse{50%{opacity:.2}}
"""
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'sha256-%s'; script-src %s; connect-src 'self'; base-uri 'none';"
    " form-action %s; frame-ancestors %s"
)
_PAGE = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style>{head}</head>\n'
    "<body><main>{body}</main>{script}</body></html>\n"
)
# Fetches the list anew; what is new comes in at its place, what is gone fades, what has the keyboard's focus stays.
_PORTS_SCRIPT = """
const list = document.querySelector('.ports'), told = document.querySelector('[role=status]')
const filter = document.querySelector('#filter'), none = document.querySelector('#none')
const nothing = none.textContent, lost = 'The proxy does not answer.'
const stale = 'Load this page anew to see what is new.'
const said = one => [...one.childNodes].map(part => part.className === 'ways' ? '' : part.textContent).join(' ')
function sift() {
  const wanted = filter.value.trim().toLowerCase()
  for (const one of list.children) one.hidden = !said(one).toLowerCase().includes(wanted)
  filter.closest('label').hidden = list.children.length < 8 && !wanted
  none.hidden = [...list.children].some(one => !one.hidden)
  none.textContent = list.children.length ? 'There is no port here with that in its line.' : nothing
}
async function look() {
  try {
    const answer = document.hidden ? null : await fetch('?list', {cache: 'no-store', redirect: 'error'})
    if (answer && !answer.ok) told.textContent = stale
    else if (answer) {
      const body = new DOMParser().parseFromString(await answer.text(), 'text/html').body
      if ([lost, stale].includes(told.textContent)) told.textContent = ''
      merge(body)
    }
  } catch (error) { told.textContent = lost }
  setTimeout(look, 3000)
}
function merge(body) {
  const before = new Map([...list.children].map(one => [one.id, one]))
  let at = null
  for (const one of [...body.querySelectorAll('li')].reverse()) {
    const old = before.get(one.id)
    before.delete(one.id)
    if (old && (old.contains(document.activeElement) || old.innerHTML === one.innerHTML)) {
      old.className = ''
      at = old
      continue
    }
    if (!old) told.textContent = 'New: port ' + one.querySelector('.port').textContent
    old ? old.replaceWith(one) : list.insertBefore(one, at)
    at = one
  }
  for (const one of before.values()) {
    if (one.className !== 'gone') {
      told.textContent = 'Gone: port ' + one.querySelector('.port').textContent
      one.className = 'gone'
      setTimeout(() => { if (one.className === 'gone') { one.remove(); sift() } }, 6000)
    }
  }
  sift()
}
filter.addEventListener('input', sift)
sift()
setTimeout(look, 1500)
"""
# Asks for the head of this very page, ever more seldom, until somebody else than the proxy answers.
_WAITING_SCRIPT = """
let pause = 1000, since = Date.now()
async function look() {
  try {
    const how = {method: 'HEAD', cache: 'no-store', redirect: 'manual'}
    const answer = document.hidden ? null : await fetch(location.href, how)
    if (answer && answer.headers.get('Port-Proxy') !== 'waiting') return location.reload()
  } catch (error) {}
  if (Date.now() - since > 20000) document.querySelector('#help').hidden = false
  pause = Math.min(pause * 1.3, 8000)
  setTimeout(look, pause)
}
document.querySelector('#help').hidden = true
setTimeout(look, pause)
"""
_FORMS = (
    ("/8080/", "port 8080 of this machine; the app sees the path behind the port"),
    ("/absolute/8080/", "the same for an app that is told to live under this whole path"),
    ("/db1.example.org:8080/", "port 8080 of a host that --host-allowlist allows"),
    ("/absolute/db1.example.org:8080/", "the same for an app that is told to live under this whole path"),
)


def wants_html(head: Optional[RequestHead]) -> bool:
    """Whether a person looks at the answer: a browser's navigation, not a program and not a page's script."""
    return head is not None and head.method in ("GET", "HEAD", "POST") and is_navigation(head)


def error_response(error: ProxyError, as_html: bool) -> Response:
    """The answer that says what was wrong; no byte of the request is in it but a checked host or port."""
    phrase = reason_phrase(error.status)
    fields = error.fields + (("Cache-Control", "no-store"),)
    if not as_html:
        return _response(error.status, "text/plain", "%d %s\n%s\n" % (error.status, phrase, error.detail), fields)
    body = '<h1>%s</h1><p>%s</p><p class="soft">%d &middot; port_proxy</p>'
    return _page(error.status, phrase, body % (html.escape(phrase), _marked(error.detail), error.status), fields)


def _marked(detail: str) -> str:
    """What an error says, with the options in it as what they are."""
    return _OPTION.sub(r'<code class="option">\g<0></code>', html.escape(detail))


_OPTION = re.compile(r"(?<![^ ])--[a-z][a-z-]*")


class PortsView(NamedTuple):
    """What the page at the base shows; by port: the title of the page that it served last, as far as one is known, and
    how its own host is reached, "" where it has none."""

    base: str
    ports: Sequence[Listener]
    titles: Mapping[int, str]
    ways: Mapping[int, str]


class Lookout:
    """Who listens on this machine, looked up once a second at most, however many ask."""

    def __init__(self) -> None:
        self._found: Optional["asyncio.Future[List[Listener]]"] = None
        self._since = 0.0

    async def listeners(self, loop: asyncio.AbstractEventLoop) -> List[Listener]:
        """As `listeners`, without holding the loop up."""
        now = time.monotonic()
        if self._found is None or (self._found.done() and now - self._since > 1.0):
            self._since = now
            self._found = loop.run_in_executor(None, listeners)
        return await asyncio.shield(self._found)


class Titles:
    """The titles of pages that went by, by port of this machine: nothing is asked for them."""

    def __init__(self) -> None:
        self._seen: Dict[int, Tuple[str, float]] = {}  # with the time, in seconds since the epoch

    def note(self, route: Route, head: ResponseHead, data: bytes) -> None:
        """Remember the title in the beginning of a page, if there is one."""
        title = title_in(head, data) if route.host == "localhost" and head.status == 200 else ""
        if title:
            self._seen[route.port] = title, time.time()

    def of(self, ports: Sequence[Listener]) -> Dict[int, str]:
        """The titles of those that have not been started anew since."""
        found = ((one, self._seen.get(one.port, ("", 0.0))) for one in ports)
        return {one.port: title for one, (title, seen) in found if title and seen >= one.started}


def title_in(head: ResponseHead, data: bytes) -> str:
    """The title of an HTML page, of which `data` is the beginning; "" where none can be read in it."""
    kind = "".join(field_values(head.fields, "content-type")[:1]).lower()
    coding = "".join(field_values(head.fields, "content-encoding")).lower()
    if "html" not in kind or coding not in ("", "gzip", "deflate"):
        return ""
    if coding:
        try:
            data = zlib.decompressobj(47).decompress(data, _RECEIVE_BYTES)  # either of the two, told by its head
        except zlib.error:
            return ""
    match = _TITLE.search(data[:_RECEIVE_BYTES].decode("utf-8", "replace"))
    try:
        title = html.unescape(match.group(1)) if match else ""
    except ValueError:  # a character's number of thousands of digits
        return ""
    return "".join(one if one.isprintable() else " " for one in " ".join(title.split())[:100])


_TITLE = re.compile(r"<title(?:\s[^<>]{0,200})?>([^<]{0,1000})</title", re.IGNORECASE)


def wants_json(head: RequestHead) -> bool:
    """Whether a program asks for data."""
    return any("application/json" in value.lower() for value in field_values(head.fields, "accept"))


def ports_response(view: PortsView, head: RequestHead) -> Response:
    """The answer at the base: the ports that somebody may want to open, and the forms of an address."""
    fields = (("Cache-Control", "no-store"), ("Vary", "Accept"))
    if head.target.endswith("?list"):
        return _response(200, "text/html", _port_items(view), fields + (("Content-Security-Policy", _policy("")),))
    if wants_html(head):
        return _ports_page(view, fields)
    if wants_json(head):
        ports = [_port_data(view, one) for one in view.ports]
        return _response(200, "application/json", json.dumps({"ports": ports}, indent=1) + "\n", fields)
    lines = ["%-40s %s\n" % (view.base + form, meaning) for form, meaning in _FORMS]
    lines += ["\n%-40s %s" % ("%s/%d/" % (view.base, one.port), _summary(one)) for one in view.ports]
    text = "port_proxy: every port of this machine through this one\n\n" + "".join(lines) + "\n"
    return _response(200, "text/plain", text, fields)


def _ports_page(view: PortsView, fields: Fields) -> Response:
    row = "<tr><td><code>%s</code><td>%s"
    rows = "".join(row % (html.escape(view.base + form), html.escape(text)) for form, text in _FORMS)
    body = (
        '<h1>Ports of this machine</h1><p class="soft" role="status"></p>'
        '<label hidden>Filter <input id="filter" type="search" autocomplete="off"></label>'
        '<ul class="ports">{items}</ul>'
        '<p id="none"{hidden}>{nothing}</p>'
        '<form method="get" action="{base}/"><label>Another port <input name="port" inputmode="numeric" required'
        ' pattern=" *[1-9][0-9]{{0,4}} *" title="a number from 1 to 65535" placeholder="8080" autocomplete="off">'
        "</label><button>Open</button></form>"
        "<details><summary>Forms of an address</summary><table>{rows}</table></details>"
    )
    hidden = " hidden" if view.ports else ""
    nothing = "No program of yours listens on a port. Once one does, it appears here."
    if not ports_are_told():
        nothing = "This system does not tell which ports are in use."
    items, base = _port_items(view), html.escape(view.base)
    text = body.format(items=items, hidden=hidden, nothing=nothing, base=base, rows=rows)
    return _page(200, "Ports of this machine", text, fields, _PORTS_SCRIPT)


def _port_items(view: PortsView) -> str:
    item = (
        '<li id="p{port}"><a class="port" href="{best}">{port}</a>{title}<div class="soft">{about}</div>'
        '<div class="ways">{ways}</div></li>\n'
    )
    way = '<a href="%s" aria-label="port %d, %s">%s</a> '
    items = []
    for one in view.ports:
        links = _links(view, one)
        ways = "".join(way % (html.escape(url), one.port, _WAYS[name], _WAYS[name]) for name, url in links.items())
        best = html.escape(links.get("host") or links["stripped"])
        title, about = html.escape(view.titles.get(one.port, "")), html.escape(_summary(one))
        items.append(item.format(port=one.port, best=best, title=title, about=about, ways=ways))
    return "".join(items)


_WAYS = {"host": "own host", "stripped": "prefix stripped", "absolute": "prefix kept"}


def _links(view: PortsView, one: Listener) -> Dict[str, str]:
    """The addresses of a port here, by form; the best comes first."""
    host = view.ways.get(one.port, "")
    stripped, absolute = ("%s/%s%d/" % (view.base, form, one.port) for form in ("", "absolute/"))
    return dict({"host": host} if host else {}, stripped=stripped, absolute=absolute)


def _port_data(view: PortsView, one: Listener) -> Dict[str, Any]:
    """A port as programs get it."""
    seconds = int(time.time() - one.started) if one.started else None
    data = {"port": one.port, "addresses": one.addresses, "program": one.program, "pid": one.pid, "seconds": seconds}
    return dict(data, title=view.titles.get(one.port), links=_links(view, one))


def _summary(one: Listener) -> str:
    """A port in a line for a person: its program, how long that runs, and what keeps it from being reached."""
    parts = [one.program, _for_how_long(time.time() - one.started) if one.started else ""]
    if not one.is_local:
        parts.append("listens at %s alone, not at localhost" % ", ".join(one.addresses))
    return " \u00b7 ".join(filter(None, parts))


def _for_how_long(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= unit:
            count = int(seconds // unit)
            return "%d %s%s" % (count, name, "" if count == 1 else "s")
    return "just started"


def waiting_response(error: ProxyError, port: int) -> Response:
    """The page for a person whose app does not listen yet: it opens the app as soon as that answers."""
    body = (
        '<h1 class="pulse">Waiting for port {port}</h1><p>{detail}</p><p>This page opens the app by itself as soon as'
        ' it answers.</p><div id="help"><p>If nothing comes:</p><ul>'
        "<li>Does the log of the app show an error, or another port?</li>"
        "<li>Does it listen on 127.0.0.1 or 0.0.0.0, rather than on another address alone?</li>"
        "<li>On the machine, <code>python3 port_proxy.py --check {port}</code> looks at the port and says what it"
        " finds.</li>"
        '</ul></div><p class="soft">502 &middot; port_proxy</p>'
    )
    text = body.format(port=port, detail=_marked(error.detail))
    reload = '<noscript><meta http-equiv="refresh" content="5"></noscript>'
    fields = error.fields + (("Cache-Control", "no-store"),)
    return _page(error.status, "Waiting for port %d" % port, text, fields, _WAITING_SCRIPT, reload)


def sign_in_response(error: SignInNeeded) -> Response:
    """The page that asks for the token, and sends the person on to where they were going; or leads to that page."""
    asks = (
        "<h1>Sign in</h1>%s<p>This proxy wants to know that you are its owner. Its token is in the address that"
        ' it printed when it was started, behind <code>?token=</code>.</p><form method="post" action="%s">'
        '<input type="hidden" name="next" value="%s"><label>Token <input type="password" name="token" required'
        ' autofocus autocomplete="current-password"></label> <button>Sign in</button></form>'
    )
    leads = (
        "<h1>Sign in</h1>%s<p>This proxy wants to know that you are its owner. It asks for its token at an"
        " address of its own only, which no app can look into, and leads back to the app's front page.</p>"
        '<p><a href="%s">Sign in there</a></p>'
    )
    said = "<p>%s</p>" % html.escape(error.detail) if error.detail else ""
    places = (error.action, error.target) if error.action else (error.target,)
    body = (asks if error.action else leads) % ((said,) + tuple(map(html.escape, places)))
    fields = error.fields + (("Cache-Control", "no-store"),)
    # Browsers hold this against the whole way of redirects behind the form, and apps may lead to a login elsewhere.
    return _page(error.status, "Sign in", body, fields, forms="*", frames="'none'")


def redirect_response(location: str) -> Response:
    """A temporary redirect to a path of ours."""
    return _response(
        302,
        "text/plain",
        "Here, with a slash behind the port.\n",
        (("Location", location), ("Cache-Control", "no-store")),
    )


def reason_phrase(status: int) -> str:
    """The usual words for a status code."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _page(
    status: int,
    title: str,
    body: str,
    fields: Fields = (),
    script: str = "",
    head: str = "",
    forms: str = "'self'",
    frames: str = "'self'",
) -> Response:
    """forms, frames: where the page's forms may lead, and what may have it in a frame (Content-Security-Policy)."""
    element = "<script>%s</script>" % script if script else ""
    text = _PAGE.format(title=html.escape(title), style=_STYLE, head=head, body=body, script=element)
    return _response(status, "text/html", text, fields + (("Content-Security-Policy", _policy(script, forms, frames)),))


def _policy(script: str, forms: str = "'none'", frames: str = "'self'") -> str:
    style, code = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (_STYLE, script))
    return _POLICY % (style, "'sha256-%s'" % code if script else "'none'", forms, frames)


def _response(status: int, media_type: str, text: str, fields: Fields = ()) -> Response:
    body = text.encode()
    ours = (
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Content-Type", media_type + "; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Length", str(len(body))),
    )
    return Response(status, ours + fields, body)


# ---------------------------------------------------------------------------------------------------------------------
# JupyterHub: where a Hub started this server, it says who comes in, and wants to know whether the server is in use
# ---------------------------------------------------------------------------------------------------------------------

_BELIEVED = 60.0  # seconds that the Hub's word on a token is believed
_LOGIN_SECONDS = 600  # that a person may take to sign in
_MAX_REMEMBERED = 1000  # sessions and tokens, each
_MAX_LOGINS = 10000  # under way; anybody can begin one
_MAX_QUESTIONS = 64  # that the Hub is asked at once
_MAX_TOKENS = 8  # different ones in a request
_HUB_PATIENCE = 10.0  # seconds for an answer of the Hub
_HUB_SESSION = "jupyterhub-session-id"  # the Hub's own cookie, which it changes when somebody signs out
_HUB_COOKIES = "jupyterhub-"
_HUB_TOKEN = re.compile("[!-~]{1,1024}")  # anything else is an app's own, and must not get into the head of a request
_OAUTH_ERROR = re.compile(r"[a-z_]{1,40}")  # RFC 6749 section 4.1.2.1


_SHORTLY = (("Retry-After", "5"),)


class HubUser(NamedTuple):
    """Whom the Hub knows a token to stand for, and what the token may be used for."""

    name: str
    scopes: FrozenSet[str]


class HubLogin(NamedTuple):
    """A login under way: where the person was going, what the Hub's code is exchanged with (RFC 7636), what the browser
    must show that began it, and the moment from which on it is too late."""

    target: str
    verifier: str
    browser: str
    until: float


class HubApi:
    """What this server asks and tells the Hub; ProxyError 503 where the Hub cannot be asked."""

    def __init__(self, hub: Hub, config: Config, watch: Watch) -> None:
        self.hub = hub
        self.config = config
        self.watch = watch
        self.under_way: Set["asyncio.Task[Any]"] = set()  # questions that are not answered yet
        self._version = ""
        self._next_try = 0.0  # not before then is the version asked for again
        self._context: Optional[ssl.SSLContext] = None
        # By token and Hub session: so that a browser whose session is over is asked about anew, at once.
        self._asked: Dict[Tuple[str, str], Tuple["asyncio.Task[Optional[HubUser]]", float]] = {}

    async def user_of(self, token: str, session: str) -> Optional[HubUser]:
        """Whom a token stands for, None if the Hub does not know it; believed for a minute in that Hub session."""
        if not _HUB_TOKEN.fullmatch(token):
            return None
        now = time.monotonic()
        asked, since = self._asked.get((token, session), (None, 0.0))
        if asked is None or now - since > _BELIEVED or (asked.done() and (asked.cancelled() or asked.exception())):
            if len(self.under_way) >= _MAX_QUESTIONS:
                raise ProxyError(503, "There are too many questions to the Hub. Try again shortly.", _SHORTLY)
            asked = asyncio.ensure_future(self._ask_user(token))
            self.under_way.add(asked)
            asked.add_done_callback(self._answered)
            _remember(self._asked, (token, session), (asked, now))
        return await asyncio.shield(asked)

    def _answered(self, asked: "asyncio.Task[Optional[HubUser]]") -> None:
        self.under_way.discard(asked)
        if not asked.cancelled():
            asked.exception()  # whoever asked may have left, and then nobody else takes note of it

    async def token_for(self, code: str, verifier: str) -> str:
        """The token that a code from a login stands for (RFC 6749 section 4.1.3); ProxyError 403 if it is no good."""
        form = {
            "client_id": self.hub.client_id,
            "client_secret": self.hub.api_token,
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.hub.callback_url,
            "code_verifier": verifier,
        }
        kind = ("Content-Type", "application/x-www-form-urlencoded")
        status, _, answer = await self._call("POST", self.hub.api_url + "/oauth2/token", (kind,), urlencode(form))
        token = answer.get("access_token")
        if status != 200 or not isinstance(token, str):
            raise ProxyError(403, "The Hub did not take this sign-in for valid. Open %s/ again." % self.hub.prefix)
        return token

    async def version(self) -> str:
        """The Hub's version; ""  where it has just not been told."""
        now = time.monotonic()
        if not self._version and now >= self._next_try:
            self._next_try = now + 5
            _, fields, _ = await self._call("GET", self.hub.api_url + "/", ())
            self._version = "".join(field_values(fields, "x-jupyterhub-version")[:1])
        return self._version

    async def report_activity(self, moment: str) -> None:
        """Say that this server was last used at `moment` (ISO 8601, UTC)."""
        server = {self.hub.server_name: {"last_activity": moment}}
        fields = (self._authorization(self.hub.api_token), ("Content-Type", "application/json"))
        body = json.dumps({"servers": server, "last_activity": moment})
        status, _, _ = await self._call("POST", self.hub.activity_url, fields, body)
        if status >= 400:
            raise ProxyError(503, "The Hub refused a report of activity (%d)." % status)

    async def _ask_user(self, token: str) -> Optional[HubUser]:
        status, _, answer = await self._call("GET", self.hub.api_url + "/user", (self._authorization(token),))
        if status in (401, 403, 404):
            return None
        name, scopes = answer.get("name"), answer.get("scopes")
        if status != 200 or not isinstance(name, str) or not isinstance(scopes, list):
            raise ProxyError(503, "The Hub did not say who you are (%d)." % status, _SHORTLY)
        return HubUser(name, frozenset(map(str, scopes)))

    @staticmethod
    def _authorization(token: str) -> Tuple[str, str]:
        return "Authorization", "token " + token

    async def _call(self, method: str, url: str, fields: Fields, body: str = "") -> Tuple[int, Fields, Dict[str, Any]]:
        """One request: the answer's status, fields, and the members of the object that it is, if it is one."""
        try:
            head, data = await limited(self._exchange(method, url, fields, body.encode()), _HUB_PATIENCE)
            answer = json.loads(data.decode() or "{}") if head.status < 400 else {}
        except (ProxyError, Truncated, OSError, asyncio.TimeoutError, ValueError) as error:
            logger.warning("the Hub could not be asked at %s: %s", url, getattr(error, "strerror", None) or type(error))
            raise ProxyError(503, "The Hub, which says who may come in, does not answer. Try again shortly.", _SHORTLY)
        return head.status, head.fields, answer if isinstance(answer, dict) else {}

    async def _exchange(self, method: str, url: str, fields: Fields, body: bytes) -> Tuple[ResponseHead, bytes]:
        parts = urlsplit(url)
        port = parts.port or int(_DEFAULT_PORTS[parts.scheme][1:])
        tls: Dict[str, Any] = {"ssl": self._tls()} if parts.scheme == "https" else {}
        loop = self.watch.loop
        host = parts.hostname or ""
        stream = Stream(self.watch)
        await loop.create_connection(lambda: stream, host, port, **tls)
        try:
            own = (("Host", parts.netloc), ("Accept", "application/json"), ("Connection", "close"))
            framing = framing_fields(Framing(LENGTH, len(body))) if body else ()
            stream.write(serialise_request(RequestHead(method, parts.path, "", "1.1", own + fields + framing)) + body)
            head = parse_response(await read_head(stream, False, FOREVER, self.config), self.config)
            answer, data = Body(stream, response_framing(method, head), self.config), b""
            while not answer.finished and len(data) < 1 << 20:
                data += await answer.read()
        finally:
            stream.abort()
        return head, data

    def _tls(self) -> ssl.SSLContext:
        """How the Hub is spoken to: where it gave us a certificate, with that, and if its authority signed its own."""
        if self._context is None:
            self._context = ssl.create_default_context(cafile=self.config.client_ca)
            if self.config.certfile:
                self._context.load_cert_chain(self.config.certfile, self.config.keyfile)
        return self._context


class HubGate(Gate):
    """The gate of a server that a JupyterHub started: its owner comes in, and whom the Hub gave access.

    Programs show a token of the Hub.  Browsers are sent to the Hub to sign in (RFC 6749 section 4.1, RFC 7636) and get
    a cookie with a random session id; the token that the Hub gives for them stays in memory.
    """

    def __init__(self, config: Config, watch: Watch) -> None:
        super().__init__(config)
        assert config.hub is not None
        self.hub = config.hub
        self.api = HubApi(config.hub, config, watch)
        self.watch = watch
        self.callback_path = urlsplit(self.hub.callback_url).path
        host = "__Host-" if self.hub.host_cookies else ""
        self.cookie_name = host + COOKIE_PREFIX + hashlib.sha256(self.hub.prefix.encode()).hexdigest()[:16]
        # By session id: the token, and the Hub session that it goes with, None for any.
        self._sessions: Dict[str, Tuple[str, Optional[str]]] = {}
        self._logins: Dict[str, HubLogin] = {}  # by state
        self._ours: Dict[str, None] = {}  # tokens that the Hub knows
        self._last_activity = ""
        watch.on_activity = self._note_activity
        self._reporting = asyncio.ensure_future(self._report_activity()) if self.hub.activity_url else None

    async def answer(
        self, head: RequestHead, visit: Visit, read_body: Callable[[], Awaitable[bytes]]
    ) -> Optional[Response]:
        if head.method not in ("GET", "HEAD"):
            return None
        if is_home(self.hub.prefix + "/api", head.target):
            return await self._ready()
        if is_home(self.callback_path, head.target):
            await self._end_login(head, visit)
        if is_home(self.hub.prefix, head.target):
            await self.admit(head, visit, None)
            raise ProxyError(302, "It is over there.", (("Location", self.hub.home or self.config.base + "/"),))
        return None

    async def admit(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> None:
        hub_session = "".join(_cookie_values(head.fields, _HUB_SESSION)[:1])
        signed_in = await self._user_of_session(head, hub_session)
        shown = await self._user_of_token(head, hub_session)
        user = shown[1] if shown else signed_in
        if user is None:
            if is_websocket(head):
                raise ProxyError(403, "A WebSocket needs a browser that is signed in at the Hub, or a token of it.")
            if is_page_visit(head):
                raise self._begin_login(head.target, visit)
            raise ProxyError(
                403, "Sign in at the Hub, or send a token of it as 'Authorization: token TOKEN'.", _CHALLENGE
            )
        self._check_access(user)
        clean = self._without_token(head.target)
        if clean != head.target and is_page_visit(head):
            cookie = () if signed_in or not shown else (self._new_session(shown[0], visit, hub_session),)
            raise ProxyError(302, "Signed in.", (("Location", clean),) + cookie)
        if not shown:  # a browser comes in by cookie on its own; whoever sent a token meant it
            self.check_origin(head, visit)

    async def _user_of_session(self, head: RequestHead, hub_session: str) -> Optional[HubUser]:
        """Who is signed in here in this browser, and at the Hub still."""
        for session in _cookie_values(head.fields, self.cookie_name):
            token, bound = self._sessions.get(session, ("", ""))
            if token and bound in (None, hub_session):
                user = await self.api.user_of(token, hub_session)
                if user is not None:
                    return user
            self._sessions.pop(session, None)  # signed out
        return None

    async def _user_of_token(self, head: RequestHead, hub_session: str) -> Optional[Tuple[str, HubUser]]:
        """The first token of the Hub that is shown, and whose it is.  All are looked up: none may reach the app."""
        shown = [token for value in field_values(head.fields, "authorization") for token in _tokens_in(value)]
        if not _is_cross_site(head):  # a page of another site could sign a browser in as somebody else
            shown += _query_tokens(head.target)
        found = None
        for token in _all_tokens(head):
            user = await self.api.user_of(token, hub_session)
            if user is not None:
                _remember(self._ours, token, None)
                found = found or ((token, user) if token in shown else None)
        return found

    def owns_token(self, token: str) -> bool:
        return token in self._ours or token == self.hub.api_token

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        bare = name[len("__Host-") :] if name.startswith("__Host-") else name
        return bare.startswith(_HUB_COOKIES) or name == self.cookie_name or super().owns_cookie(bare, route)

    async def close(self) -> None:
        self.watch.on_activity = None
        tasks = self.api.under_way | ({self._reporting} if self._reporting else set())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _check_access(self, user: HubUser) -> None:
        if "access:servers" in user.scopes or user.scopes & self.hub.access_scopes:
            return
        logger.info("refused: %r has no access to the server of %r", user.name, self.hub.user)
        raise ProxyError(
            403,
            "You are signed in as %s, who has no access to this server: it is that of %s. Sign in at the Hub as"
            " somebody who has, or ask for access." % (user.name, self.hub.user),
        )

    def _begin_login(self, target: str, visit: Visit) -> ProxyError:
        """The redirect to the Hub, which comes back to `_end_login`."""
        state, verifier, browser = (secrets.token_urlsafe(32) for _ in range(3))
        path, mark, query_there = target.partition("?")
        # Spelt as the cookie's Path is, for browsers compare the two undecoded.
        target = self.hub.prefix + (path_below(self.hub.prefix, path) or "/") + mark + query_there
        if not _LOCAL_TARGET.fullmatch(target) or len(target) > 2048:
            target = self.hub.prefix + "/"
        until = time.monotonic() + _LOGIN_SECONDS
        _remember(self._logins, state, HubLogin(target, verifier, browser, until), _MAX_LOGINS)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        query = {
            "client_id": self.hub.client_id,
            "redirect_uri": self.hub.callback_url,
            "response_type": "code",
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        cookie = self._cookie(self._login_cookie(state), browser, self.callback_path, visit, _LOGIN_SECONDS)
        return ProxyError(
            302, "Sign in at the Hub.", (("Location", self.hub.authorize_url + "?" + urlencode(query)), cookie)
        )

    async def _end_login(self, head: RequestHead, visit: Visit) -> None:
        """Take what the Hub sent a browser back with; raises the redirect to where the person was going."""
        sent = dict(parse_qsl(head.target.partition("?")[2]))
        state = sent.get("state", "")
        login = self._logins.pop(state, None)
        name = self._login_cookie(state)
        again = " Open %s/ again." % self.hub.prefix
        if login is None or time.monotonic() > login.until:
            raise ProxyError(403, "This sign-in is over: it was used, or took longer than ten minutes." + again)
        shown = [value.encode("latin-1") for value in _cookie_values(head.fields, name)]
        if not any(hmac.compare_digest(value, login.browser.encode()) for value in shown):
            raise ProxyError(403, "This sign-in was begun in another browser, or cookies are blocked." + again)
        if "code" not in sent:
            error = sent.get("error", "")
            reason = error if _OAUTH_ERROR.fullmatch(error) else "no reason given"
            raise ProxyError(403, "The Hub did not sign you in: %s.%s" % (reason, again))
        token = await self.api.token_for(sent["code"], login.verifier)
        user = await self.api.user_of(token, "".join(_cookie_values(head.fields, _HUB_SESSION)[:1]))
        if user is None:
            raise ProxyError(403, "The Hub did not say who you are." + again)
        _remember(self._ours, token, None)
        self._check_access(user)
        done = self._cookie(name, "", self.callback_path, visit, 0)
        raise ProxyError(302, "Signed in.", (("Location", login.target), self._new_session(token, visit), done))

    async def _ready(self) -> Response:
        """What the Hub looks for to see whether this server is up, and of the same version as itself."""
        try:
            version = await self.api.version()
        except ProxyError:  # we are up all the same
            version = ""
        fields = (("Content-Type", "application/json"), ("Content-Length", "2"))
        return Response(200, fields + ((("X-JupyterHub-Version", version),) if version else ()), b"{}")

    def _new_session(self, token: str, visit: Visit, hub_session: Optional[str] = None) -> Tuple[str, str]:
        """The cookie of a new session.  The Hub forgets the token of a login when the person signs out there; one that
        was shown lives on, and so its session is over here when that of the Hub is."""
        session = secrets.token_urlsafe(32)
        _remember(self._sessions, session, (token, hub_session))
        return self._cookie(self.cookie_name, session, self.hub.prefix + "/", visit)

    def _login_cookie(self, state: str) -> str:
        """The name of the cookie of one login; logins in several tabs do not meet."""
        return "%s_%s" % (self.cookie_name, hashlib.sha256(state.encode()).hexdigest()[:16])

    def _cookie(self, name: str, value: str, path: str, visit: Visit, seconds: Optional[int] = None) -> Tuple[str, str]:
        attributes = {"Path": "/" if self.hub.host_cookies else path, "HttpOnly": "", "SameSite": "Lax"}
        attributes.update(self.hub.cookie_options)
        if seconds is not None:
            attributes["Max-Age"] = str(seconds)
        if self.hub.host_cookies or self.hub.is_secure or visit.scheme == "https":
            attributes["Secure"] = ""
        parts = [key + ("=" + attribute if attribute else "") for key, attribute in attributes.items()]
        return "Set-Cookie", "; ".join(["%s=%s" % (name, value)] + parts)

    def _note_activity(self) -> None:
        self._last_activity = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    async def _report_activity(self) -> None:
        """Tell the Hub, once an interval, if there was any: what idles is stopped by it."""
        reported = ""
        while True:
            await asyncio.sleep(self.hub.activity_interval)
            moment = self._last_activity
            if moment != reported:
                try:
                    await self.api.report_activity(moment)
                    reported = moment
                except ProxyError:  # it has been logged; the next interval brings the next try
                    pass


def _all_tokens(head: RequestHead) -> List[str]:
    """The different tokens in a request, wherever an app would find them; ProxyError 400 for far too many."""
    found = [token for value in field_values(head.fields, "authorization") for token in _tokens_in(value)]
    found += _query_tokens(head.target)
    for value in field_values(head.fields, "referer"):
        found += _query_tokens(value.partition("#")[0])
    tokens = list(dict.fromkeys(found))
    if len(tokens) > _MAX_TOKENS:
        raise ProxyError(400, "There are more than %d different tokens in this request." % _MAX_TOKENS)
    return tokens


def _remember(table: Dict[Any, Any], key: Any, value: Any, most: int = _MAX_REMEMBERED) -> None:
    """Put an entry in as the latest; beyond `most` the earliest goes."""
    table.pop(key, None)
    table[key] = value
    while len(table) > most:
        del table[next(iter(table))]


# ---------------------------------------------------------------------------------------------------------------------
# Exchange: one request's whole way, and the tunnel behind a 101
# ---------------------------------------------------------------------------------------------------------------------

_SHORT_BYTES = 2048  # of heads that are remembered, so that a task may ask anew what they come to
_REMEMBERED = 256
_IDEMPOTENT = frozenset("GET HEAD OPTIONS TRACE PUT DELETE PROPFIND REPORT SEARCH".split())  # RFC 9110 section 9.2.2


class Asked(NamedTuple):
    """What the head of a request comes to.

    route: None also where none is to be found.  keep_alive: the client can send another request behind this one.
    is_replayable: it may be sent again where a connection turned out to be stale.  is_upgrade: it opens a WebSocket.
    is_page: a person wants to see a page; opens: one of its own, not in a frame.
    apps: the names of those that the browser says it opened last.  is_plain: all that is left is to ask the gate, and
    its upstream; is_admitted: and not even the gate.  for_upstream: the bytes of the head that the upstream gets; b""
    where the gate has to be asked what may be in it.  is_short: it may be remembered, and what answers it.
    like: one that differs in path and query alone, so that what answers it comes to the same; None where none is known.
    """

    head: RequestHead
    framing: Framing
    visit: Visit
    route: Optional[Route]
    keep_alive: bool
    is_replayable: bool
    is_upgrade: bool
    is_page: bool
    opens: bool
    apps: Tuple[str, ...]
    is_plain: bool
    is_admitted: bool
    for_upstream: bytes
    is_short: bool
    like: Optional["Asked"] = None


# Answers are remembered by what they answer: by the record, not by all that is in it.
Asked.__hash__ = object.__hash__  # type: ignore[method-assign]


def place_of(gate: Gate, head: RequestHead, visit: Visit) -> Optional[Route]:
    """The route that a request means, by its target, its host, or as a stray; None for the proxy's own page.

    Raises ProxyError 404 if it means none, 400 as `find_route`.
    """
    if head.target == "*":
        return None
    route = route_of_host(visit.app_port, head.target) if visit.app_port else _place_below(gate, head, visit)
    return route._replace(scheme="https") if route and speaks_tls(route, gate.config.upstream_tls) else route


def _place_below(gate: Gate, head: RequestHead, visit: Visit) -> Optional[Route]:
    base, cookie = gate.config.base, gate.app_cookie
    try:
        return find_route(base, head.target)
    except ProxyError as error:
        is_ours = not cookie or error.status != 404 or is_below(base or "/absolute", head.target)
        stray = None if is_ours else find_stray(head, visit, base, cookie)
        if stray is None:
            raise not_found(error, head, visit, gate.config)
        return stray


def understand(gate: Gate, raw: bytes, address: str, scheme: str) -> Asked:
    """What the head `raw` of a request from `address` comes to; ProxyError 4xx, 501 or 505 if it does not parse."""
    config = gate.config
    head = parse_request(raw, config)
    framing = request_framing(head)
    visit = visit_of(head, address, scheme, config.trusted_proxies, config.domains)
    try:
        route = place_of(gate, head, visit)
    except ProxyError:  # the gate comes first
        route = None
    is_page, is_upgrade = is_page_visit(head), is_websocket(head)
    opens = is_page and field_values(head.fields, "sec-fetch-dest") in ([], ["document"])
    apps = _cookie_values(head.fields, gate.app_cookie) if gate.app_cookie else []
    keep_alive = head.version == "1.1" and "close" not in field_tokens(head.fields, "connection")
    for_upstream = bytes_for_upstream(gate, head, framing, visit, route) if route and gate.is_plain else b""
    is_app = bool(for_upstream and route and (route.path or route.absolute) and not route.strayed)
    is_plain = is_app and framing == NO_BODY and not is_upgrade and not gate.answers(head, visit)
    return Asked(
        head,
        framing,
        visit,
        route,
        keep_alive,
        head.method in _IDEMPOTENT and framing == NO_BODY,
        is_upgrade,
        is_page,
        opens,
        tuple(apps),
        is_plain,
        is_plain and route is not None and gate.admits_anyone(head, visit, route),
        for_upstream,
        len(raw) <= _SHORT_BYTES,
    )


def target_apart(base: str) -> Pattern[bytes]:
    """Takes the usual request's head apart: its beginning, which ends with the prefix of an app; that prefix; path;
    query; and what is behind."""
    return re.compile(
        rb"([A-Z]+ (%s(?:/absolute)?/[!\"$-.0->@-~]+))(/[!\"$->@-~]*)((?:\?[!\"$-~]*)?)( HTTP/1\.1\r\n.*)"
        % re.escape(base.encode("ascii")),
        re.DOTALL,
    )


def understand_alike(gate: Gate, like: Asked, path: str, query: str) -> Optional[Asked]:
    """What a head comes to that differs from that of `like` in nothing but this path and query for the same app.

    None where these have more to say than where in the app it goes, or something is to be refused.
    """
    assert like.route is not None
    route = like.route._replace(path=path, query=query)
    target = route.prefix + path + query
    if len(target) > gate.config.max_target_bytes or _leaves(path) or (gate.token and _query_tokens(target)):
        return None
    for_upstream = like.for_upstream
    if for_upstream:
        fields = for_upstream[for_upstream.index(b"\r\n") :]
        for_upstream = ("%s %s HTTP/1.1" % (like.head.method, route.target)).encode("ascii") + fields
    return like._replace(head=like.head._replace(target=target), route=route, for_upstream=for_upstream, like=like)


def query_of(target: str) -> str:
    """The query of a request target, with its "?"; "" for none."""
    return "".join(target.partition("?")[1:])


def bytes_for_upstream(gate: Gate, head: RequestHead, framing: Framing, visit: Visit, route: Route) -> bytes:
    """The head of a request as its upstream gets it, without what is ours."""
    clean = gate.for_upstream(with_own_cookies(head, route, gate.app_cookie) if route.strayed else head, route)
    if clean.target != head.target:
        route = route._replace(query=query_of(clean.target))
    is_upgrade = is_websocket(head)
    return serialise_request(request_for_upstream(clean, route, framing, visit, gate.config.preserve_host, is_upgrade))


class Answered(NamedTuple):
    """What the head of an upstream's answer comes to.

    came_as, sent_as: how its body is framed on its way here, and on to the client.  keep_alive: another answer may
    follow it there.  is_reusable: another request may follow on the upstream's connection, behind this answer's body.
    for_client: the bytes of the head that the client gets.
    """

    head: ResponseHead
    came_as: Framing
    sent_as: Framing
    keep_alive: bool
    is_reusable: bool
    for_client: bytes


def translate(gate: Gate, raw: bytes, asked: Asked, route: Route, keep_alive: bool) -> Answered:
    """What the head `raw` of an answer comes to; keep_alive: whether another answer may follow it to the client.

    Raises ProxyError 400 or 501 if it does not parse.
    """
    head = parse_response(raw, gate.config)
    came_as = sent_as = response_framing(asked.head.method, head)
    if came_as.kind == CHUNKED or came_as.kind == UNTIL_CLOSE:
        sent_as = Framing(CHUNKED if asked.head.version == "1.1" else UNTIL_CLOSE)
    keep_alive = keep_alive and sent_as.kind != UNTIL_CLOSE
    for_client = gate.for_client(response_for_client(head, route, sent_as, asked.visit), route)
    if gate.app_cookie and head.status >= 200:
        for_client = remember_app(for_client, asked.opens, asked.apps, route, asked.visit, gate.app_cookie)
    is_reusable = head.version == "1.1" and "close" not in field_tokens(head.fields, "connection")
    return Answered(head, came_as, sent_as, keep_alive, is_reusable, final_bytes(for_client, keep_alive))


def final_bytes(head: ResponseHead, keep_alive: bool) -> bytes:
    """The bytes of a response's head, with word that no other follows it where that is so."""
    if not keep_alive and head.status >= 200:
        head = head._replace(fields=head.fields + (("Connection", "close"),))
    return serialise_response(head)


class Surroundings(NamedTuple):
    """What all exchanges of one proxy share.

    understand, translate: the functions of these names, of the gate; they may remember.  tunnels: those that are open.
    """

    config: Config
    watch: Watch
    gate: Gate
    understand: Callable[[bytes, str, str], Asked]
    translate: Callable[[bytes, Asked, Route, bool], Answered]
    upstreams: Upstreams
    tunnels: "Set[Tunnel]"
    titles: Titles
    lookout: Lookout


def readers_of_heads(
    gate: Gate,
) -> Tuple[Callable[[bytes, str, str], Asked], Callable[[bytes, Asked, Route, bool], Answered]]:
    """`understand` and `translate` for this gate, with a memory where they depend on nothing else: peers send the same
    short heads again and again, and making something of one costs more than all else in a small request."""
    understand_here, translate_here = functools.partial(understand, gate), functools.partial(translate, gate)
    remember = functools.lru_cache(maxsize=_REMEMBERED)
    translated = remember(translate_here)
    apart_of = target_apart(gate.config.base).fullmatch
    likes: Dict[Tuple[bytes, bytes, str, str], Asked] = {}  # by all but path and query

    def understand_new(raw: bytes, address: str, scheme: str) -> Asked:
        apart = apart_of(raw)
        if apart is None:
            return understand_here(raw, address, scheme)
        beginning, prefix, path, query, behind = apart.groups()
        key = beginning, behind, address, scheme
        like = likes.get(key)
        alike = like and understand_alike(gate, like, path.decode("ascii"), query.decode("ascii"))
        asked = alike or understand_here(raw, address, scheme)
        if like is None and asked.route is not None and asked.route.prefix == prefix.decode("ascii"):
            _remember(likes, key, asked, _REMEMBERED)
        return asked

    understood = remember(understand_new)

    def understand_or_recall(raw: bytes, address: str, scheme: str) -> Asked:
        return (understood if len(raw) <= _SHORT_BYTES else understand_here)(raw, address, scheme)

    def translate_or_recall(raw: bytes, asked: Asked, route: Route, keep_alive: bool) -> Answered:
        if not asked.is_short or len(raw) > _SHORT_BYTES:
            return translate_here(raw, asked, route, keep_alive)
        like = asked.like
        if like is not None and like.route is not None and route is asked.route:
            return translated(raw, like, like.route, keep_alive)
        return translated(raw, asked, route, keep_alive)

    return understand_or_recall, translate_or_recall if gate.is_plain else translate_here


class Exchange:
    """One request of a client, from its head to the last byte of its answer.

    status: that of the final head once it has gone out; all that is left on a failure then is to cut the answer short.
    keep_alive: the client's connection stands right behind the request and its answer, and may carry the next.
    upstream: the connection on which `begin` has sent the request, while no task waits for its answer.  refusal: why
    `begin` did not let it in.  tunnel: what has both connections after a 101.  taken (the route), sent (bytes of the
    answer's body) and trouble (in words, "" for none) are for the log.
    """

    upstream: Optional[Stream] = None
    taken: Optional[Route] = None
    status = 0
    sent = 0
    trouble = ""
    refusal: Optional[Exception] = None
    tunnel: Optional["Tunnel"] = None
    _silence = FOREVER  # how long an upstream may be silent in the middle of its answer
    _sending: Optional[PromptTask] = None
    _client_failure: Optional[Exception] = None  # why the client is the cause that nothing comes of it

    def __init__(self, client: Stream, asked: Asked, around: Surroundings) -> None:
        self.client = client
        self.asked = asked
        self.around = around
        self.config = around.config
        self.body = Body(client, asked.framing, self.config)
        self.started = client.now()
        self.keep_alive = asked.keep_alive
        self._patience = self.config.stall_timeout  # for the client to take what it is sent

    async def run(self) -> None:
        """Serve the request; ProxyError if it is to be answered by us, ClientGone if there is nobody to answer."""
        gate, head, visit = self.around.gate, self.asked.head, self.asked.visit
        response = await gate.answer(head, visit, self._small_body)
        if response is not None:
            await self.answer(response)
            return
        route = self.asked.route or place_of(gate, head, visit)
        await gate.admit(head, visit, route)
        self.around.watch.stirred = True
        if route is not None:
            await self._serve(route)
        elif head.target == "*":
            await self.answer(Response(204, (("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),), b""))
        elif head.method in ("GET", "HEAD"):
            await self._show_ports()
        else:
            raise ProxyError(405, "This page can only be read.", (("Allow", "GET, HEAD"),))

    async def _show_ports(self) -> None:
        config, head, visit = self.config, self.asked.head, self.asked.visit
        port = dict(parse_qsl(head.target.partition("?")[2])).get("port")
        if port is not None:  # typed into the page
            route = find_route(config.base, "%s/%s/" % (config.base, port.strip()))
            location = route.prefix + "/" if route else config.base + "/"
            raise ProxyError(303, "It is over there.", (("Location", location),))
        own = {port for _, port in self.around.upstreams.listening}
        found = await self.around.lookout.listeners(self.around.watch.loop)
        ports = [one for one in found if one.port not in own]
        hosts = {one.port: host_form(one.port, visit, config.domains) for one in ports}
        if self.around.gate.token:  # which signs in there
            hosts = {number: "%s/?open=%d" % (config.base, number) if url else "" for number, url in hosts.items()}
        view = PortsView(config.base, ports, self.around.titles.of(ports), hosts)
        await self.answer(ports_response(view, head))

    def begin(self) -> bool:
        """Send a plain request on a pooled connection without waiting for anything, or note why it is refused.

        False, with nothing done, where that cannot be, which is left to `run`.
        """
        asked, route, upstreams = self.asked, self.asked.route, self.around.upstreams
        if not asked.is_plain or route is None:
            return False
        if not asked.is_admitted:
            if not upstreams.has_idle(route):
                return False
            try:
                self.around.gate.check(asked.head, asked.visit, route)
                check_route(route, self.config)
            except Exception as error:  # raised where errors become answers
                self.refusal = error
                return True
        upstream = self.upstream = upstreams.take(route, asked.is_replayable)
        if upstream is None:
            return False
        self.around.watch.stirred = True
        self.taken = route
        upstream.write(asked.for_upstream)
        return True

    def finish(self, upstream: Stream) -> bool:
        """Pass on the answer to a request that `begin` has sent, if it has come whole.

        False, with nothing done, where it has not: that is left to `go_on`.
        """
        route, data = self.asked.route, upstream.buffer
        end = data.find(b"\r\n\r\n") + 4
        if not 4 <= end <= _SHORT_BYTES or end > self.config.max_head_bytes or route is None:
            return False
        try:
            answered = self.around.translate(data[:end], self.asked, route, self._may_keep_alive())
            if answered.head.status < 200 or answered.came_as.kind not in (LENGTH, NO_BODY.kind):
                return False
            if len(data) != end + answered.came_as.length:
                return False
            if self.asked.is_page:
                self.around.titles.note(route, answered.head, data[end:])
        except Exception:  # `go_on` meets it again, where errors become answers
            return False
        self.keep_alive = answered.keep_alive
        self.sent = answered.came_as.length
        self.status = answered.head.status
        self.client.send(answered.for_client + data[end:], self._patience)
        upstream.drop(len(data))
        if answered.is_reusable:
            self.around.upstreams.give(route, upstream)
        else:
            upstream.abort()
        return True

    async def go_on(self) -> None:
        """As `run`, for a request that `begin` has sent, or refused."""
        if self.refusal is not None:
            raise self.refusal
        assert self.asked.route is not None
        upstream, self.upstream = self.upstream, None
        await self._forward(self.asked.route, upstream, self.asked.for_upstream, is_sent=True)

    async def answer_error(self, error: ProxyError) -> None:
        """Answer with what was wrong, as a page for a person and as plain text for everyone else."""
        told = self.around.gate.explain(error)
        self.trouble = told.detail if told.status >= 400 else ""
        if isinstance(error, SignInNeeded):
            await self.answer(sign_in_response(error))
        elif isinstance(error, NotListening) and self.asked.is_page:
            await self.answer(waiting_response(told, error.route.port))
        else:
            await self.answer(error_response(told, wants_html(self.asked.head)))

    async def answer(self, response: Response) -> None:
        """Send an answer of our own; a request body that was not read costs the connection."""
        self.keep_alive = self._may_keep_alive()
        head = ResponseHead(response.status, reason_phrase(response.status), "1.1", response.fields)
        body = b"" if self.asked.head.method == "HEAD" else response.body
        self._patience = self.config.head_timeout  # it is short, and may go to anybody
        self.status = head.status
        await self._to_client(final_bytes(head, self.keep_alive) + body)
        self.sent = len(body)

    def cut_short(self) -> None:
        """End an answer that cannot be finished, so that the client sees that it is incomplete."""
        if self.client.end_is_delimiter:
            self.client.abort()
        else:
            self.client.close()  # what was relayed still arrives; the length or the last chunk is missing

    async def _small_body(self) -> bytes:
        """The whole body of a request to ourselves."""
        data, until = b"", self.client.now() + self.config.head_timeout
        try:
            while not self.body.finished:
                data += await self.body.read(until - self.client.now())
                if len(data) > 8192:
                    raise ProxyError(413, "This is more than a sign-in page sends.")
        except Stalled:
            raise ProxyError(408, "The sign-in did not come whole within %g seconds." % self.config.head_timeout)
        return data

    async def _serve(self, route: Route) -> None:
        """Send the request to its upstream and relay the answer, on a pooled connection if there is one."""
        asked = self.asked
        self.taken = route
        check_route(route, self.config)
        if asked.is_upgrade and asked.framing != NO_BODY:
            raise ProxyError(400, "A WebSocket handshake has no body.")
        if asked.is_upgrade and len(self.around.tunnels) >= self.config.max_tunnels:
            raise ProxyError(503, "There are too many open WebSockets.", (("Retry-After", "10"),))
        if route.strayed and not cannot_be_redirected(asked.head):
            await self._lead_back(route)
            return
        if not route.path and not route.absolute and not asked.is_upgrade and asked.head.method in ("GET", "HEAD"):
            clean = self.around.gate.for_upstream(asked.head, route)
            await self.answer(redirect_response(route.prefix + "/" + query_of(clean.target)))
            return
        request = asked.for_upstream or bytes_for_upstream(
            self.around.gate, asked.head, asked.framing, asked.visit, route
        )
        self.body.in_chunks = asked.framing.kind == CHUNKED
        request += self.body.at_hand()
        await self._forward(route, self.around.upstreams.take(route, self.asked.is_replayable), request, is_sent=False)

    async def _lead_back(self, route: Route) -> None:
        """Redirect a stray, once its body has come: a browser reads no answer before it has sent the whole of one."""
        head = self.asked.head
        while not self.body.finished and not field_values(head.fields, "expect"):
            await self.body.read(self.config.stall_timeout)
        clean = self.around.gate.for_upstream(head, route)
        await self.answer(led_back(route._replace(query=query_of(clean.target))))

    async def _forward(self, route: Route, pooled: Optional[Stream], request: bytes, is_sent: bool) -> None:
        """Exchange the request for its answer, on a pooled connection if there is one, on which it may be already."""
        unsent = b"" if is_sent else request
        if pooled is None or not await self._exchange(route, pooled, unsent, self.asked.is_replayable):
            await self._exchange(route, await self.around.upstreams.connect(route), request, False)

    async def _exchange(self, route: Route, upstream: Stream, request: bytes, replayable: bool) -> bool:
        """One request and its answer on one connection, which is pooled or closed afterwards.

        False, with nothing done, where the connection turned out to be stale and the request may be sent on another.
        """
        reusable = False
        try:
            self._notice_leaving(upstream)
            upstream.write(request)
            if not self.body.finished:
                self._sending = PromptTask(self._send_rest(upstream), upstream.watch.loop)
            answered = await self._read_final_head(route, upstream)
            if answered.head.status == 101:
                await self._splice(upstream, answered)
            else:
                reusable = await self._relay(route, upstream, answered)
        except (ProxyError, Truncated, Stalled, OSError) as error:
            if replayable and not upstream.was_heard and not self._client_failure and not isinstance(error, Stalled):
                return False
            if not self._client_failure and await self._meets_tls(error, route, upstream):
                raise ProxyError(502, tls_advice(route))
            raise self._client_failure or self._in_words(error, route, upstream)
        finally:
            self.client.on_end = None
            if self._sending is not None:
                await self._stop_sending(self._sending)
            if reusable and self.body.finished:
                self.around.upstreams.give(route, upstream)
            elif self.tunnel is None:
                upstream.abort()
        return True

    def _in_words(self, error: Exception, route: Route, upstream: Stream) -> ProxyError:
        """What a failure of the upstream means for the client."""
        if isinstance(error, ProxyError):
            return ProxyError(502, "What %s sent is not valid HTTP. %s" % (route.place, error.detail))
        if isinstance(error, Stalled):
            if self.status:
                return ProxyError(504, "The app on %s fell silent in the middle of its answer." % route.place)
            patience = min(self.config.response_timeout, self._silence)
            return ProxyError(504, "No answer came from %s within %g seconds." % (route.place, patience))
        ended = "closed the connection" if isinstance(error, Truncated) else "broke the connection off"
        if upstream.was_heard:
            return ProxyError(502, "The app on %s %s in the middle of its answer." % (route.place, ended))
        # A page's visit was worth asking whether it speaks TLS.
        advice = " Its log may say why." if self.asked.is_page else _perhaps_tls(route)
        return ProxyError(502, "The app on %s %s without an answer.%s" % (route.place, ended, advice))

    async def _meets_tls(self, error: Exception, route: Route, upstream: Stream) -> bool:
        """Whether an upstream failed because it speaks TLS: it says so, or says nothing, and a person wants to know."""
        if route.scheme == "https" or isinstance(error, Stalled):
            return False
        if upstream.was_heard or not self.asked.is_page:
            return is_tls_record(upstream.buffer)
        return await speaks_tls_there(self.around.upstreams, route)

    def _notice_leaving(self, upstream: Stream) -> None:
        """Close the upstream's connection as soon as the client ends its own.

        A client that had ended its side before its request was sent on, as `nc` does, is given its answer all the same;
        but since it may as well be gone, an upstream that stays silent is not waited for as long.
        """
        if self.client.transport.is_closing():
            raise ClientGone()
        if self.client.ended:
            self._silence = self.config.keep_alive_timeout
        else:
            self.client.on_end = functools.partial(self.leave, upstream)

    def leave(self, upstream: Stream) -> None:
        """Note that the client has left, and break the request off."""
        self._client_failure = self._client_failure or ClientGone()
        upstream.abort()

    async def _send_rest(self, upstream: Stream) -> None:
        """Send the rest of the request's body on as it comes, while the answer is already awaited."""

        def pass_on(data: bytes) -> bool:
            upstream.watch.stirred = True
            return upstream.send(data, self.config.stall_timeout)

        try:
            while not self.body.finished:
                await self.body.pass_on(pass_on, self.config.stall_timeout)
                try:
                    await upstream.flush(self.config.stall_timeout, self.client)
                except OSError:
                    return  # it takes no more; what it has to say is still heard
            if not self.status:
                upstream.read_deadline = upstream.now() + self.config.response_timeout
        except (ProxyError, Truncated, Stalled, OSError) as error:
            if isinstance(error, Stalled):
                error = ProxyError(408, "The request's body stopped coming for %g seconds." % self.config.stall_timeout)
            self._client_failure = error if isinstance(error, ProxyError) else ClientGone()
            upstream.abort()

    async def _stop_sending(self, sending: PromptTask) -> None:
        if not sending.done():
            sending.cancel()
            await asyncio.wait([sending])
        if not sending.cancelled() and sending.exception():
            logger.error("internal error: %r", sending.exception())

    def _is_sending(self) -> bool:
        return self._sending is not None and not self._sending.done()

    async def _read_final_head(self, route: Route, upstream: Stream) -> Answered:
        """The upstream's final answer, or its 101; other interim answers are passed on as they come."""
        for _ in range(self.config.max_interim_responses + 1):
            patience = min(self.config.response_timeout, self._silence)
            deadline = FOREVER if self._is_sending() else upstream.now() + patience
            raw = await read_head(upstream, False, deadline, self.config)
            answered = self.around.translate(raw, self.asked, route, self._may_keep_alive())
            if answered.head.status == 101 or answered.head.status >= 200:
                return answered
            if self.asked.head.version == "1.1":  # RFC 9110 section 15.2
                await self._to_client(answered.for_client)
        raise ProxyError(502, "It sent more than %d interim responses." % self.config.max_interim_responses)

    def _may_keep_alive(self) -> bool:
        """Whether the client may send another request behind the answer that begins now."""
        if not self.body.finished or self._is_sending():  # an early answer; the rest of the body may never be read
            return False
        if self.client.pull and self.client.buffer:  # behind a chunked body, and out of its owner's reach
            return False
        return self.keep_alive and not self.around.watch.is_stopping

    async def _relay(self, route: Route, upstream: Stream, answered: Answered) -> bool:
        """Pass the answer on, piece by piece as it comes; whether the upstream's connection may be used again."""
        self.keep_alive = answered.keep_alive
        self.client.end_is_delimiter = answered.sent_as.kind == UNTIL_CLOSE
        body = Body(upstream, answered.came_as, self.config, answered.sent_as.kind == CHUNKED)

        def pass_on(data: bytes) -> bool:
            if self.asked.is_page and not self.sent:
                self.around.titles.note(route, answered.head, bare(data, body.in_chunks))
            upstream.watch.stirred = True
            self.sent = body.count
            return self.client.send(data, self._patience)

        data = body.at_hand()
        if self.asked.is_page and data:
            self.around.titles.note(route, answered.head, bare(data, body.in_chunks))
        self.status = answered.head.status
        self.sent = body.count
        await self._to_client(answered.for_client + data, upstream)
        while not body.finished:
            await body.pass_on(pass_on, self._silence)
            await self._to_client(b"", upstream)
        return answered.is_reusable

    async def _to_client(self, data: bytes, upstream: Optional[Stream] = None) -> None:
        self.client.write(data)
        try:
            await self.client.flush(self._patience, upstream)
        except OSError:
            raise ClientGone()

    async def _splice(self, upstream: Stream, answered: Answered) -> None:
        """Answer the client with the upstream's 101, then let a tunnel have both connections."""
        fields = answered.head.fields
        switched = "upgrade" in field_tokens(fields, "connection") and "websocket" in field_tokens(fields, "upgrade")
        if not self.asked.is_upgrade or not switched:
            raise ProxyError(502, "It switched protocols (101) to something that was not asked for.")
        self.client.on_end = None
        self.keep_alive = False
        await upstream.flush(self.config.stall_timeout)
        self.status = answered.head.status
        await self._to_client(answered.for_client)
        self.tunnel = Tunnel(self.client, upstream, self.config.stall_timeout, self.around.tunnels)


class Tunnel:
    """Two connections whose bytes go to each other, undecoded, until both sides have ended; making it takes them over.

    A side that ends while the other goes on is passed on as such; a failure of one is the end of both.  `tunnels` are
    those that are open, this one among them while it is.  on_end is called, without arguments, when it has ended.
    """

    __slots__ = ("client", "on_end", "open", "timeout", "tunnels", "upstream")

    def __init__(self, client: Stream, upstream: Stream, timeout: float, tunnels: "Set[Tunnel]") -> None:
        self.timeout = timeout
        self.client, self.upstream = TunnelEnd(client, self), TunnelEnd(upstream, self)
        self.client.leads_to(self.upstream)
        self.upstream.leads_to(self.client)
        self.open = 2
        self.on_end: Optional[Callable[[], None]] = None
        self.tunnels = tunnels
        tunnels.add(self)
        ends = (self.client, self.upstream)
        earlier = [end.stream.hand_over(end) for end in ends]
        for end, data in zip(ends, earlier):
            end.data_received(data)
        for end in ends:
            if end.stream not in end.stream.watch.streams:  # lost before it could be handed over
                end.connection_lost(end.stream.failure)
            elif end.stream.ended:
                end.eof_received()

    def close(self) -> None:
        """End both sides, sending what is queued."""
        for end in (self.client, self.upstream):
            end.stream.write_deadline = end.stream.now() + self.timeout
            end.stream.close()

    def abort(self) -> None:
        """End both sides at once."""
        for end in (self.client, self.upstream):
            end.stream.abort()

    def lost(self, end: "TunnelEnd", is_clean: bool) -> None:
        """Note that the connection of one side is no more: the other follows."""
        other = end.other.stream
        if is_clean:
            other.write_deadline = other.now() + self.timeout
            other.close()
        else:
            other.abort()
        self.open -= 1
        if not self.open:
            self.tunnels.discard(self)
            if self.on_end:
                self.on_end()


class TunnelEnd(asyncio.Protocol):
    """One side of a tunnel: what comes from it is written to the other, and its pace is the other's."""

    __slots__ = ("ended", "other", "received", "stream", "tunnel", "watch", "write")

    def __init__(self, stream: Stream, tunnel: Tunnel) -> None:
        self.stream = stream
        self.watch = stream.watch
        self.tunnel = tunnel
        self.received = 0
        self.ended = False

    def leads_to(self, other: "TunnelEnd") -> None:
        self.other = other
        self.write = other.stream.transport.write

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.watch.stirred = True
        self.write(data)
        if self.other.ended:
            self.stream.end_deadline = self.stream.now() + self.tunnel.timeout

    def pause_writing(self) -> None:
        self.other.stream.pause_reading()

    def resume_writing(self) -> None:
        self.other.stream.resume_reading()

    def eof_received(self) -> bool:
        self.ended = True
        if self.other.ended:
            self.tunnel.close()
        else:
            self.other.stream.end_writing()
            self.other.stream.end_deadline = self.stream.now() + self.tunnel.timeout
        return self.stream.transport.can_write_eof()

    def connection_lost(self, exc: Optional[BaseException]) -> None:
        self.watch.forget(self.stream)
        self.tunnel.lost(self, exc is None and self.stream.failure is None)


# ---------------------------------------------------------------------------------------------------------------------
# Server: accepting, the requests of a connection one after the other, errors into answers, the log, stopping
# ---------------------------------------------------------------------------------------------------------------------


class PortProxy:
    """The proxy itself: `await PortProxy(config).start()`, then `await proxy.close()`; several can live in one loop.

    Raises ValueError for a configuration that makes no sense; `start` raises it for certificates that will not do, and
    OSError where a file cannot be read or the address cannot be had.
    Logs to the logger "port_proxy" and configures none.
    """

    def __init__(self, config: Config = Config()) -> None:
        self.config = checked_config(config)
        self._servers: List[Union[asyncio.AbstractServer, Acceptor]] = []
        self._around: Optional[Surroundings] = None
        self._clients: Dict[Stream, Optional[Exchange]] = {}  # with the request that each one is at
        self._tasks: Dict[Stream, PromptTask] = {}  # of the clients that do not idle
        self._tunnels: Set[Tunnel] = set()
        self._sockets: List[socket.socket] = []
        self._were_given = False

    async def start(
        self, sockets: Optional[Sequence[socket.socket]] = None, ways_back: Sequence[Address] = ()
    ) -> "PortProxy":
        """Listen; connections are accepted from now on.

        sockets: bound stream sockets to use instead of what `bind` and `port` say, which are closed with the proxy; an
        empty sequence for a proxy that is only given requests by `serve_one`.  ways_back: further addresses, of servers
        that pass requests on to this one, at which no app is looked for.
        """
        loop = asyncio.get_event_loop()
        tls = server_context(self.config) if self.config.certfile else None
        self._were_given = sockets is not None
        self._sockets = _bind(self.config) if sockets is None else list(sockets)
        addresses = [sock.getsockname()[:2] for sock in self._sockets if sock.family != _UNIX]
        watch = Watch(loop, _watch_interval(self.config))
        gate = HubGate(self.config, watch) if self.config.hub else TokenGate(self.config, self.is_private, self.port)
        upstreams = Upstreams(self.config, watch, addresses + list(ways_back))
        around = self._around = Surroundings(
            self.config, watch, gate, *readers_of_heads(gate), upstreams, self._tunnels, Titles(), Lookout()
        )
        try:
            for sock in self._sockets:
                self._servers.append(await self._listen(sock, tls, around))
        except BaseException:
            await self.close()
            raise
        return self

    async def _listen(
        self, sock: socket.socket, tls: Optional[ssl.SSLContext], around: Surroundings
    ) -> Union[asyncio.AbstractServer, Acceptor]:
        protocol = functools.partial(Stream, around.watch, functools.partial(self._accepted, around))
        loop = around.watch.loop
        if not tls and can_watch_sockets(loop):
            return Acceptor(loop, sock, protocol)
        if tls and sys.version_info < (3, 7):
            context = tls
            return await loop.create_server(lambda: _timed_handshake(protocol(), context, self.config, loop), sock=sock)
        options: Dict[str, Any] = {"sock": sock, "ssl": tls, "backlog": _BACKLOG}
        if tls:
            options["ssl_handshake_timeout"] = self.config.head_timeout
        if sock.family != _UNIX:
            return await loop.create_server(protocol, **options)
        if sys.version_info >= (3, 13):
            options["cleanup_socket"] = False  # its file is not always ours
        return await loop.create_unix_server(protocol, **options)

    @property
    def port(self) -> int:
        """The TCP port that is listened on; 0 before `start` and where there is none."""
        return next((sock.getsockname()[1] for sock in self._sockets if sock.family != _UNIX), 0)

    @property
    def watch(self) -> Optional[Watch]:
        """What looks after the connections; None before `start`."""
        return self._around.watch if self._around else None

    @property
    def is_private(self) -> bool:
        """Whether only this machine's users can connect."""
        return all(map(_is_private, self._sockets))

    @property
    def token(self) -> str:
        """The token that clients must show; "" where none is asked for."""
        return self._around.gate.token if self._around else ""

    @property
    def url(self) -> str:
        """The address to open on this machine, without the token."""
        host = self.config.bind
        if host in ("", "0.0.0.0", "::"):
            host = socket.gethostname()
        elif host.startswith(_UNIX_PREFIX):
            host = "localhost"
        scheme = "https" if self.config.certfile else "http"
        port = ":%d" % self.port if self.port else ""
        return "%s://%s%s%s/" % (scheme, "[%s]" % host if ":" in host else host, port, self.config.base)

    async def close(self) -> None:
        """Stop accepting, close idle connections and tunnels, let running requests finish for `shutdown_timeout` s."""
        around, self._around = self._around, None
        if around is None:
            return
        if self.config.bind.startswith(_UNIX_PREFIX) and not self._were_given:
            _unlink(self.config.bind[len(_UNIX_PREFIX) :])
        for server in self._servers:
            server.close()
        for sock in self._sockets:
            sock.close()
        around.watch.is_stopping = True
        for client, exchange in list(self._clients.items()):
            if exchange is None:
                client.close()
            elif exchange.upstream is not None:
                self._go_on(exchange, exchange.upstream)  # which makes a task that can be waited for
        for tunnel in list(self._tunnels):
            tunnel.close()
        until = time.monotonic() + self.config.shutdown_timeout
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=self.config.shutdown_timeout)
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        around.upstreams.close()
        await around.gate.close()
        patience = until - time.monotonic() if self._tunnels else 0.0
        await around.watch.close(max(patience, min(1.0, self.config.shutdown_timeout)))
        self._servers.clear()
        self._sockets.clear()

    async def serve_one(self, client: Stream, raw: bytes, gate: Gate) -> bool:
        """Answer the request whose head is `raw`, on a connection that another server accepted and `gate` looks after;
        whether the connection stands right behind it and may carry another.  Otherwise it is closed."""
        assert self._around is not None
        keep = False
        try:
            # Without a memory, which would be for this one request alone, as the gate is.
            around = self._around._replace(
                gate=gate, understand=functools.partial(understand, gate), translate=functools.partial(translate, gate)
            )
            keep = await self._serve_request(client, around, raw)
            if not keep and client in self._clients:
                client.close()
        except (ClientGone, Truncated, Stalled, OSError):
            client.abort()
        except asyncio.CancelledError:
            client.abort()
            raise
        finally:
            self._clients.pop(client, None)
        return keep

    def cut(self) -> None:
        """Cut all running requests off; for whoever cannot wait for `close`, which then goes on at once."""
        for task in list(self._tasks.values()):
            task.cancel()
        for tunnel in list(self._tunnels):
            tunnel.abort()

    def _accepted(self, around: Surroundings, client: Stream) -> None:
        if len(self._clients) + len(self._tunnels) >= self.config.max_connections and not self._make_room():
            client.write(_FULL)
            client.close()
            return
        self._let_idle(client, around)

    def _let_idle(self, client: Stream, around: Surroundings) -> None:
        """Let a connection wait for its next request, without a task: what comes on it makes one."""
        self._clients[client] = None
        client.read_deadline = client.now() + self.config.keep_alive_timeout
        client.on_data = client.on_end = functools.partial(self._wake, client, around)

    def _wake(self, client: Stream, around: Surroundings) -> None:
        client.on_data = client.on_end = None
        client.read_deadline = FOREVER
        if client.ended:
            del self._clients[client]
            client.close()
        elif not self._serve_promptly(client, around):
            self._start_task(client, around)

    def _start_task(self, client: Stream, around: Surroundings, begun: Optional[Exchange] = None) -> None:
        task = PromptTask(self._serve(client, around, begun), around.watch.loop)
        if not task.done():
            self._tasks[client] = task

    def _serve_promptly(self, client: Stream, around: Surroundings) -> bool:
        """Serve a plain request without a task, as most are: its head has come whole and alone, a pooled connection
        takes it, and its answer comes whole.  What turns out otherwise, sooner or later, is left to a task; False, with
        nothing done, if that is so from the beginning."""
        raw = client.buffer
        end = raw.find(b"\r\n\r\n") + 4
        if not 4 <= end == len(raw) <= _SHORT_BYTES or end > self.config.max_head_bytes:
            return False
        if client.queued() or around.watch.is_stopping:
            return False
        try:
            exchange = Exchange(client, around.understand(raw, client.address, client.scheme), around)
        except Exception:  # the task meets it again, where errors become answers
            return False
        if not exchange.begin():
            return False
        client.drop(len(raw))
        self._clients[client] = exchange
        upstream = exchange.upstream
        if upstream is None:
            self._start_task(client, around, exchange)
            return True
        upstream.read_deadline = exchange.started + self.config.response_timeout
        upstream.on_data = upstream.on_end = client.on_end = functools.partial(self._go_on, exchange, upstream)
        return True

    def _go_on(self, exchange: Exchange, upstream: Stream) -> None:
        """Go on with a request that is served promptly when something comes from its upstream, or the client ends."""
        client, around = exchange.client, exchange.around
        upstream.on_data = upstream.on_end = client.on_end = None
        upstream.read_deadline = FOREVER
        if client.ended:
            exchange.leave(upstream)
        if upstream.ended or not exchange.finish(upstream):
            self._start_task(client, around, exchange)
            return
        self._note_end(client, exchange)
        if not exchange.keep_alive:
            del self._clients[client]
            client.close()
        elif client.buffer:
            self._clients[client] = None
            self._start_task(client, around)
        else:
            self._let_idle(client, around)

    def _make_room(self) -> bool:
        """Close the connection that has idled longest; whether there was one."""
        idle = [
            client
            for client, exchange in self._clients.items()
            if exchange is None and not client.transport.is_closing()
        ]
        if not idle:
            return False
        min(idle, key=lambda client: client.read_deadline).abort()
        return True

    async def _serve(self, client: Stream, around: Surroundings, begun: Optional[Exchange] = None) -> None:
        """The requests of one client's connection that come one right behind the other."""
        is_kept = False  # the connection, in our care
        try:
            while (begun or not around.watch.is_stopping) and await self._serve_request(client, around, exchange=begun):
                begun = None
                if client.is_quiet() and not around.watch.is_stopping:
                    self._let_idle(client, around)
                    is_kept = True
                    return
                await asyncio.sleep(0)  # a client that sends many at once leaves the others their turns
            if client in self._clients:
                client.close()
        except (ClientGone, Truncated, Stalled, OSError):
            client.abort()
        except BaseException:  # cancelled, above all
            client.abort()
            raise
        finally:
            self._tasks.pop(client, None)
            if not is_kept:
                self._clients.pop(client, None)

    async def _serve_request(
        self, client: Stream, around: Surroundings, raw: bytes = b"", exchange: Optional[Exchange] = None
    ) -> bool:
        """Answer the next request; whether another may follow.

        raw: its head, where that was read already.  exchange: where it has begun.
        """
        try:
            if exchange is None:
                raw = raw or await self._read_request(client)
                if not raw:
                    return False
                asked = around.understand(raw, client.address, client.scheme)
                exchange = self._clients[client] = Exchange(client, asked, around)
                await exchange.run()
            else:
                await exchange.go_on()
        except ProxyError as error:
            await self._answer_error(client, exchange, error)
        except (ClientGone, Truncated, Stalled, OSError):
            raise
        except asyncio.CancelledError:
            if exchange is not None and around.watch.is_stopping:
                exchange.trouble = "The proxy was told to stop."
            raise
        except Exception as error:  # a mistake of ours; the request is lost, the proxy goes on
            logger.error("internal error: %r", error)
            logger.debug("", exc_info=True)
            await self._answer_error(client, exchange, ProxyError(500, "The proxy made a mistake. Its log says more."))
        finally:
            self._clients[client] = None
            if exchange is not None:
                self._note_end(client, exchange)
        if exchange is None or not exchange.body.finished:
            await self._linger(client)
        return exchange is not None and exchange.keep_alive and exchange.body.finished

    async def _read_request(self, client: Stream) -> bytes:
        """The next request's head; b"" where the client ends, or stays silent for too long, between two requests."""
        try:
            is_there = client.buffer[:1] not in _MAY_BE_EMPTY_LINE
            if not is_there and not await skip_empty_lines(client, client.now() + self.config.keep_alive_timeout):
                return b""
        except Stalled:
            return b""
        try:
            return await read_head(client, True, client.now() + self.config.head_timeout, self.config)
        except Stalled:
            raise ProxyError(408, "The request's head did not come whole within %g seconds." % self.config.head_timeout)
        except Truncated:
            raise ProxyError(400, "The request broke off before the end of its head.")

    async def _answer_error(self, client: Stream, exchange: Optional[Exchange], error: ProxyError) -> None:
        """The one place where an error becomes an answer, or the end of an answer that has begun."""
        if exchange is None:
            logger.info("%s -> %d: %s", client.address or "-", error.status, error.detail)
            client.write(_plain_answer(error))
        elif exchange.status:
            exchange.trouble = error.detail
            exchange.keep_alive = False
            exchange.cut_short()
        else:
            await exchange.answer_error(error)

    async def _linger(self, client: Stream) -> None:
        """Read on, and drop, what a client still sends behind an answer that ends the connection: closing at once would
        reset it and could take the answer from it (RFC 9112 section 9.6)."""
        if client.transport.can_write_eof():  # over TLS there is only a whole close
            client.end_writing()
        deadline = client.now() + self.config.linger_timeout
        client.cut_all()
        try:
            while await client.more(deadline):
                client.cut_all()
        except Stalled:
            pass

    def _note_end(self, client: Stream, exchange: Exchange) -> None:
        """Log a request that has been served; one that became a tunnel when that ends, which has the connection now."""
        tunnel = exchange.tunnel
        if tunnel is not None:
            del self._clients[client]
        if not logger.isEnabledFor(logging.INFO):
            return  # and so nothing of the request is kept for as long as its tunnel lasts
        if tunnel is not None and tunnel.open:
            tunnel.on_end = functools.partial(self._log, client, exchange)
        else:
            self._log(client, exchange)

    def _log(self, client: Stream, exchange: Exchange) -> None:
        """One line per request, at its end, which is that of its tunnel; without the query, which may hold a secret."""
        head, tunnel = exchange.asked.head, exchange.tunnel
        path, mark, _ = head.target.partition("?")
        told: Dict[str, Any] = {
            "client": exchange.asked.visit.address or "-",
            "method": head.method,
            "target": path + ("?..." if mark else ""),
            "app": exchange.taken.authority if exchange.taken else "-",
            "status": exchange.status or "gone",
            "bytes": tunnel.upstream.received if tunnel else exchange.sent,
            "seconds": round(client.now() - exchange.started, 3),
        }
        line = "%(client)s %(method)s %(target)s -> %(app)s %(status)s, %(bytes)d bytes, %(seconds).3f s"
        if tunnel:
            told["bytes_received"] = tunnel.client.received
            line = line.replace(" bytes,", " bytes and back %(bytes_received)d,")
        if exchange.trouble:
            told["error"] = exchange.trouble
            line += ": %(error)s"
        logger.info(line, told, extra={"request": told})


_UNIX_PREFIX = "unix:"
_MAY_BE_EMPTY_LINE = (b"", b"\r")  # what the first byte then is


def _plain_answer(error: ProxyError) -> bytes:
    """The answer to what could not be understood as a request, after which the connection is closed."""
    response = error_response(error, False)
    head = ResponseHead(response.status, reason_phrase(response.status), "1.1", response.fields)
    return final_bytes(head, False) + response.body


_FULL = _plain_answer(ProxyError(503, "The proxy has as many connections as it may have.", (("Retry-After", "5"),)))


def _places(config: Config) -> List[Any]:
    """Where a configuration says to listen, as `socket.getaddrinfo` tells; none for a Unix socket."""
    if config.bind.startswith(_UNIX_PREFIX):
        return []
    return socket.getaddrinfo(config.bind or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _bind(config: Config) -> List[socket.socket]:
    """Sockets bound as the configuration says; OSError where that cannot be."""
    if config.bind.startswith(_UNIX_PREFIX):
        return [_bind_unix(config.bind[len(_UNIX_PREFIX) :])]
    found = _places(config)
    sockets: List[socket.socket] = []
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            address: Tuple[Any, ...] = place
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            if os.name == "posix":  # on Windows it would let others take the port over
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if not config.port and len(sockets) > 1:  # any free port, but the same one everywhere
                address = (address[0], sockets[0].getsockname()[1]) + address[2:]
            sock.bind(address)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind_unix(path: str) -> socket.socket:
    """A Unix socket that only its owner can connect to; one that a dead process of ours left behind is replaced."""
    if _UNIX is None:
        raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
    with socket.socket(_UNIX, socket.SOCK_STREAM) as probe:
        try:
            found = os.lstat(path)
            if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
                raise OSError(errno.EEXIST, "%s exists and is not a socket of yours" % path)
            probe.settimeout(1.0)
            probe.connect(path)
            raise OSError(errno.EADDRINUSE, "%s is in use by another program" % path)
        except ConnectionRefusedError:
            os.unlink(path)
        except FileNotFoundError:
            pass
    sock = socket.socket(_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before somebody listens
    except BaseException:
        sock.close()
        raise
    return sock


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _is_private(sock: socket.socket) -> bool:
    """Whether only this machine's users can connect; on a Unix socket, only its owner."""
    name = sock.getsockname()
    if sock.family != _UNIX:
        return ipaddress.ip_address(name[0].partition("%")[0]).is_loopback
    try:
        return not os.stat(name).st_mode & 0o077
    except (OSError, ValueError):
        return False


def _timed_handshake(
    protocol: asyncio.Protocol, context: ssl.SSLContext, config: Config, loop: asyncio.AbstractEventLoop
) -> Any:
    """TLS around a protocol, with a deadline for its handshake, which asyncio does not set before 3.7."""
    import asyncio.sslproto

    class TimedHandshake(asyncio.sslproto.SSLProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            loop.call_later(config.head_timeout, lambda: transport.abort() if self._in_handshake else None)

    return TimedHandshake(loop, protocol, context, None, server_side=True)  # type: ignore[arg-type]


def server_context(config: Config) -> ssl.SSLContext:
    """How TLS is spoken to clients, from TLS 1.2 on; OSError for files that cannot be read, ValueError in words for a
    person for those that will not do."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, config.certfile or "", config.keyfile)
    if config.client_ca:
        _load_authorities(context, config.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_certificate(context: ssl.SSLContext, certfile: str, keyfile: Optional[str]) -> None:
    """Load what can be read; OpenSSL asks for a pass phrase on the terminal where the key has one."""
    where = keyfile or certfile
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:
        if _is_pipe(certfile) or _is_pipe(where):  # and so read once and for all
            raise ValueError("the certificate in %s cannot be used with the key in %s: %s" % (certfile, where, error))
        _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certfile)
        open(where, "rb").close()
        reason = getattr(error, "reason", "BAD_PASSWORD_READ")
        if reason in ("BAD_PASSWORD_READ", "BAD_DECRYPT"):
            raise ValueError("the pass phrase of the key in %s was not given" % where)
        if reason not in (None, "KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise ValueError("the certificate in %s cannot be used with its key: %s" % (certfile, reason))
        advice = "" if keyfile else "; if that is in a file of its own, name it with --keyfile"
        raise ValueError("%s does not hold the key (PEM) of the certificate in %s%s" % (where, certfile, advice))


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        if not _is_pipe(path):
            open(path, "rb").close()  # its error has the name, which OpenSSL leaves out
        reason = getattr(error, "reason", None) or error
        raise ValueError("%s does not hold a certificate (PEM) that can be used: %s" % (path, reason))


def _is_pipe(path: str) -> bool:
    return stat.S_ISFIFO(os.stat(path).st_mode)


def checked_config(config: Config) -> Config:
    """`config` in normal form; ValueError, in words for a person, for what makes no sense."""
    _check_kinds(config)
    if not 0 <= config.port <= 65535:
        raise ValueError("the port must be a number from 0 to 65535, not %d" % config.port)
    for name, default in Config()._asdict().items():
        if type(default) in (int, float) and name != "port" and not getattr(config, name) > 0:
            raise ValueError("%s must be greater than 0, not %r" % (name, getattr(config, name)))
    if (config.keyfile or config.client_ca) and not config.certfile:
        raise ValueError("keyfile and client_ca are of no use without certfile")
    if config.token is not None and not re.fullmatch("[!-~]*", config.token):
        raise ValueError("the token must consist of visible ASCII characters without spaces")
    for proxy in config.trusted_proxies:
        try:
            if proxy != "unix":
                ipaddress.ip_network(proxy, False)
        except ValueError:
            raise ValueError("a trusted proxy is an address, a network or unix, not %r" % proxy)
    for upstream in config.upstream_tls:
        try:
            find_route("", "/%s/" % upstream)
        except ProxyError:
            raise ValueError("an upstream that speaks TLS is PORT or HOST:PORT, not %r" % upstream)
    base = normal_base(config.base)
    plain = base in ("", Config().base) and not config.trusted_proxies
    return config._replace(
        base=base,
        whole_origin=not config.hub and (plain if config.whole_origin is None else config.whole_origin),
        host_allowlist=config.host_allowlist
        if callable(config.host_allowlist)
        else normal_allowlist(config.host_allowlist),
        domains=() if config.hub else tuple(map(normal_domain, config.domains)),
        allow_hostnames=normal_allowlist(config.allow_hostnames),
        allow_origins=tuple(origin if origin == "*" else normal_origin(origin) for origin in config.allow_origins),
        trusted_proxies=tuple(config.trusted_proxies),
        upstream_tls=tuple(upstream.lower() for upstream in config.upstream_tls),
    )


def _check_kinds(config: Config) -> None:
    """Raise ValueError if a field holds another kind of thing than it is for; what it holds is not told."""
    for name, default in Config()._asdict().items():
        value = getattr(config, name)
        if (value is None and default is None) or (callable(value) and name in ("authorize", "host_allowlist")):
            continue
        kind = name if name in _KINDS else type(default).__name__
        types, words = _KINDS[kind]
        right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not right or (kind == "tuple" and not all(isinstance(one, str) for one in value)):
            raise ValueError("%s must be %s, not %s" % (name, words, type(value).__name__))


# By a field's name, or else by the type of its default; None stands for a file that is not given.
_KINDS: Dict[str, Tuple[Tuple[type, ...], str]] = {
    "authorize": ((), "an asynchronous callable"),
    "hub": ((Hub,), "a Hub"),
    "token": ((str,), "a string"),
    "bool": ((bool,), "True or False"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a string"),
    "tuple": ((tuple, list, set, frozenset), "a sequence of strings"),
    "NoneType": ((str, os.PathLike), "a path"),
}
_KINDS["whole_origin"] = _KINDS["bool"]


def _watch_interval(config: Config) -> float:
    """Fine enough for the shortest deadline, and never more often than twenty times a second."""
    shortest = min(float(getattr(config, name)) for name in Config._fields if name.endswith("_timeout"))
    return min(1.0, max(0.05, shortest / 4))


# ---------------------------------------------------------------------------------------------------------------------
# Jupyter: inside a running Jupyter server, which signs people in and lends the connection of each request
# ---------------------------------------------------------------------------------------------------------------------

_JUPYTER_COOKIES = "username-"  # of people who are signed in; the host and port that the browser sees follow
_XSRF = "_xsrf"
_PLAIN_METHOD = re.compile("[A-Z]+(?:-[A-Z]+)*")


class TornadoTransport(asyncio.Transport):
    """The connection that a Tornado stream is, over TCP or TLS, as a transport on which a `Stream` can stand.

    It reads only what is asked for by `pull`, so that nothing of the next request is taken from Tornado, until
    `set_protocol` makes a tunnel of it.  Raises OSError if the client has left.
    """

    def __init__(self, tornado: Any, watch: Watch) -> None:
        sock = tornado.socket
        if sock is None:
            raise ConnectionResetError(errno.ECONNRESET, "the client has left")
        super().__init__({"socket": sock, "peername": sock.getpeername(), "sslcontext": getattr(sock, "context", None)})
        self.tornado = tornado
        self._loop = watch.loop
        self.stream = Stream(watch)
        self._protocol: asyncio.Protocol = self.stream
        self._queued = 0
        self._is_reading = self._is_tunnel = self._is_paused = self._is_closing = self._is_lost = False
        self._writer_waits = False
        tornado.set_close_callback(self._closed)
        self.stream.connection_made(self)

    def pull(self, limit: int) -> None:
        """Ask for at most `limit` bytes, which `data_received` then gets."""
        if self._is_reading or self._is_closing or self._is_lost:
            return
        try:
            future = self.tornado.read_bytes(limit, partial=True)
        except OSError:  # StreamClosedError
            self._lose()
            return
        self._is_reading = True
        future.add_done_callback(self._received)

    def _received(self, future: "asyncio.Future[bytes]") -> None:
        self._is_reading = False
        if future.cancelled() or future.exception():
            self._lose()
            return
        self._protocol.data_received(future.result())
        if self._is_tunnel and not self._is_paused:
            self.pull(_RECEIVE_BYTES)

    def _closed(self) -> None:
        if not self._is_reading:  # otherwise what was read before comes first
            self._lose()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            self._loop.call_soon(self._protocol.connection_lost, self.tornado.error)

    def release(self) -> Any:
        """Give the Tornado stream back, if nothing has been taken from it that is not used; None, and the connection is
        closed, otherwise."""
        stream = self.stream
        if self._is_reading or self._is_closing or stream.buffer:
            stream.close()
            return None
        stream.watch.forget(stream)
        self._is_lost = self._is_closing = True
        self.tornado.set_close_callback(None)
        return self.tornado

    def write(self, data: Union[bytes, bytearray, memoryview]) -> None:
        if self._is_lost or not data:
            return
        try:
            future = self.tornado.write(bytes(data))
        except OSError:  # StreamClosedError: the callback comes
            return
        if not future.done():
            self._queued += len(data)
            future.add_done_callback(lambda _: self._sent(len(data)))
            if self._queued > _RECEIVE_BYTES and not self._writer_waits:
                self._writer_waits = True
                self._protocol.pause_writing()

    def _sent(self, count: int) -> None:
        self._queued -= count
        if self._writer_waits and self._queued <= _RECEIVE_BYTES // 4:
            self._writer_waits = False
            self._protocol.resume_writing()
        if self._is_closing and not self._is_lost and not self._queued:
            self.tornado.close()

    def get_write_buffer_size(self) -> int:
        return self._queued

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol
        self._is_tunnel = True
        self.stream.pull = None  # and its end is met where it stands, behind all that came before

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_reading(self) -> bool:
        return self._is_reading

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False
        if self._is_tunnel:
            self.pull(_RECEIVE_BYTES)

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return False  # Tornado closes both ways or none

    def close(self) -> None:
        self._is_closing = True
        if not self._queued:
            self.tornado.close()

    def abort(self) -> None:
        self._is_closing = True
        self.tornado.close()


class JupyterGate(Gate):
    """The gate of one request to a Jupyter server, which has let it in already, as `handler` knows.

    What is left is that pages of other sites cannot use the browser's cookie; and the cookies and tokens of Jupyter,
    and of a Hub around it, that are none of the app's business.
    """

    def __init__(self, config: Config, handler: Any) -> None:
        super().__init__(config)
        self.handler = handler
        provider = handler.settings.get("identity_provider") or handler  # before 2.0: the handler itself
        self.hub_auth: Any = getattr(provider, "hub_auth", None)
        self.by_token = bool(handler.token_authenticated)
        self.tokens = [token for token in (handler.token, self._shown_to(provider)) if token]
        get_name = getattr(provider, "get_cookie_name", lambda handler: handler.cookie_name)
        self.cookie_name = get_name(handler)

    def _shown_to(self, provider: Any) -> Optional[str]:
        """The token by which the request came in."""
        if not self.by_token:
            return None
        if self.hub_auth is None and hasattr(provider, "get_token"):
            return str(provider.get_token(self.handler))
        return None

    async def admit(self, head: RequestHead, visit: Visit, route: Optional[Route]) -> None:
        if self.hub_auth is not None:
            await self._look_up_tokens(head)
        if self.by_token:  # whoever sent it meant it
            return
        allowed = bool(field_values(head.fields, "origin")) and self.handler.check_origin()  # as Jupyter's options say
        if not allowed or (head.method not in _SAFE and self._allows_any_origin() and not _is_same_origin(head)):
            self.check_origin(head, visit)

    async def _look_up_tokens(self, head: RequestHead) -> None:
        """Find out which of the tokens that are shown are the Hub's, which answers from memory for most."""
        for token in filter(_HUB_TOKEN.fullmatch, _all_tokens(head)):
            try:
                session = self.hub_auth.get_session_id(self.handler)
                user = await self.hub_auth.user_for_token(token, session_id=session, sync=False)
            except TypeError:  # before JupyterHub 2.4, which cannot be asked without waiting for it
                return
            except Exception as error:  # of Tornado's kind, or of the connection to the Hub
                logger.warning("the Hub could not be asked: %s", type(error).__name__)
                raise ProxyError(503, "The Hub, which knows whose a token is, does not answer.", _SHORTLY)
            if user:
                self.tokens.append(token)

    def _allows_any_origin(self) -> bool:
        """Whether Jupyter's options let any origin in.  Its own handlers still ask for the XSRF token then, which no
        app's page has."""
        handler = self.handler
        if handler.settings.get("disable_check_xsrf"):
            return False
        pattern = handler.allow_origin_pat
        return handler.allow_origin == "*" or bool(pattern and re.match(pattern, "https://any.invalid"))

    def owns_token(self, token: str) -> bool:
        read = re.sub("[\x00-\x08\x0e-\x1f+]", " ", token).strip()  # as Jupyter reads it
        return any(hmac.compare_digest(one.encode(), own.encode()) for one in (token, read) for own in self.tokens)

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        bare = name[len("__Host-") :] if name.startswith("__Host-") else name
        if name == self.cookie_name or bare.startswith(_HUB_COOKIES) or super().owns_cookie(name, route):
            return True
        of_the_app = _JUPYTER_COOKIES + re.sub(
            "[^A-Za-z0-9]", "-", route.authority if route else ""
        )  # if it is a Jupyter
        return name.startswith(_JUPYTER_COOKIES) and name != of_the_app

    def explain(self, error: ProxyError) -> ProxyError:
        text, advice, rest = error.detail.partition(" Start the proxy with --allow-origin")
        if advice and (rest.startswith(" '*'") or self._allows_any_origin()):  # which would not help
            advice, rest = " A program may send it with a token of Jupyter's.", ""
        text = (text + advice + rest).replace(" --allow-origin", " c.ServerApp.allow_origin")
        text = _OPTION.sub(lambda option: "c.PortProxy." + option.group()[2:].replace("-", "_"), text)
        return ProxyError(error.status, re.sub("([Ss])tart the proxy with", r"\1et", text), error.fields)

    def for_client(self, head: ResponseHead, route: Route) -> ResponseHead:
        head = super().for_client(head, route)
        set_by_jupyter = getattr(self.handler, "_new_cookie", {}) if head.status == 101 or head.status >= 200 else {}
        cookies = tuple(("Set-Cookie", cookie.OutputString(None)) for cookie in set_by_jupyter.values())
        return head._replace(fields=head.fields + cookies)

    def _without_cookies(self, value: str, route: Optional[Route]) -> str:
        """Jupyter's XSRF cookie has the same name as that of any Tornado app, but the shortest path of all, and so
        comes last (RFC 6265 section 5.4).  A browser that is signed in has it."""
        pairs = value.split(";")
        names = [_cookie_name(pair) for pair in pairs]
        if _XSRF in names and any(self.owns_cookie(name, route) for name in names):
            del pairs[len(names) - 1 - names[::-1].index(_XSRF)]
        return super()._without_cookies(";".join(pairs), route)


def _from_jupyter(name: str, value: Any) -> Any:
    """A value of Jupyter's configuration for a field of Config: on its command line all are strings until somebody
    knows better, and what is appended (LazyConfigValue) has to be told what to."""
    if not hasattr(value, "get_value"):
        return value
    default = getattr(Config(), name, "")
    if isinstance(value, list):
        return [str(one) for one in value]
    if not isinstance(value, str):  # which is what merely looking at a field makes of it, too
        return value.get_value(list(default)) if isinstance(default, tuple) else default
    text = str(value)
    if isinstance(default, tuple):
        return tuple(one.strip() for one in text.split(","))
    if isinstance(default, bool) or name == "whole_origin":
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(default, (int, float)):
        with contextlib.suppress(ValueError):  # what is no number is told of with its field's name
            return type(default)(text)
    return text


def _jupyter_server_extension_points() -> List[Dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Serve `<base>/proxy/` of a Jupyter server, which calls this where the module is among its extensions.

    `c.PortProxy` in its configuration may hold what a `Config` has, host_allowlist above all.
    """
    import inspect
    from datetime import datetime, timezone

    from jupyter_server.base.handlers import JupyterHandler
    from tornado import web

    base = server.base_url.rstrip("/") + "/proxy"
    trusted = ("0.0.0.0/0", "::/0", "unix") if getattr(server, "trust_xheaders", False) else ()
    try:
        told = {name: _from_jupyter(name, value) for name, value in server.config.get("PortProxy", {}).items()}
        config = Config(base=base, trusted_proxies=trusted)._replace(**told)
        proxy = PortProxy(config._replace(domains=(), whole_origin=False))  # the origin is Jupyter's
    except (TypeError, ValueError) as error:
        server.log.error("port_proxy: %s/ is not served, for c.PortProxy cannot be used: %s", base, error)
        return
    settings = server.web_app.settings

    def note_activity() -> None:
        settings["api_last_activity"] = datetime.now(timezone.utc)

    class AnyMethod(Tuple[str, ...]):
        def __contains__(self, method: object) -> bool:
            return True

    @web.stream_request_body
    class PortProxyHandler(JupyterHandler):  # type: ignore[misc]
        SUPPORTED_METHODS = AnyMethod(JupyterHandler.SUPPORTED_METHODS)

        def set_default_headers(self) -> None:
            super().set_default_headers()
            # Of answers that are given before the body is read, after which Tornado closes without saying so.
            self.set_header("Connection", "close")

        def check_xsrf_cookie(self) -> None:
            """Left to the app, whose forms they are; what keeps other sites out is the gate's check of the origin."""

        def data_received(self, chunk: bytes) -> None:
            """Dropped: the body of a request that was refused."""

        def get_login_url(self) -> str:
            if not is_page_visit(_head_from_tornado(self.request)):
                raise web.HTTPError(403, "Sign in first.")
            return str(super().get_login_url())

        def __getattr__(self, name: str) -> Any:
            method = self.__dict__["request"].method if "request" in self.__dict__ else ""
            if name != method.lower() or not _PLAIN_METHOD.fullmatch(method):
                raise AttributeError(name)
            # Under the method's name Jupyter looks for an exemption from signing in.

        async def prepare(self) -> None:
            head = _head_from_tornado(self.request)
            if not _PLAIN_METHOD.fullmatch(head.method):  # Jupyter would take it for another attribute's name
                self.set_status(405)
                self.finish("405 Method Not Allowed\n")
                return
            result = super().prepare()
            if inspect.isawaitable(result):
                await result
            if not self._finished:
                web.authenticated(lambda handler: None)(self)  # not all versions do it in `prepare`
            if self._finished:  # redirected
                return
            authorizer = settings.get("authorizer")
            allowed = authorizer is None or authorizer.is_authorized(self, self.current_user, "execute", "proxy")
            if not (await allowed if inspect.isawaitable(allowed) else allowed):
                raise web.HTTPError(403)
            await self._serve(head)

        async def _serve(self, head: RequestHead) -> None:
            gate = JupyterGate(proxy.config, self)
            if is_page_visit(head):
                self.xsrf_token  # noqa: B018  its cookie is set by that
                clean = gate.for_upstream(head, None).target
                if clean != head.target:
                    self.redirect(clean)  # with the cookie that a token in the address has earned
                    return
            if proxy.watch is None:
                await proxy.start([], [] if getattr(server, "sock", "") else [("0.0.0.0", server.port)])
            watch = proxy.watch
            assert watch is not None
            watch.on_activity = note_activity
            tornado = self.detach()
            try:
                transport = TornadoTransport(tornado, watch)
            except OSError:  # the client has left meanwhile
                tornado.close()
                return
            address = transport.get_extra_info("peername")
            if await proxy.serve_one(transport.stream, serialise_request(head), gate):
                stream = transport.release()
                if stream is not None:
                    server.http_server.handle_stream(stream, address)

    router = server.web_app
    router.add_handlers(".*$", [(re.escape(base) + "(?:/.*)?", PortProxyHandler)])
    rules = router.default_router.rules
    rules.insert(0, rules.pop(-2))
    logger.parent = getattr(server.log, "logger", server.log)
    logger.setLevel(logging.INFO if server.log_level in (logging.DEBUG, "DEBUG") else logging.WARNING)  # as for its own
    extensions = getattr(getattr(server, "extension_manager", None), "extensions", {})
    if getattr(extensions.get("jupyter_server_proxy"), "enabled", False):
        server.log.warning(
            "port_proxy: jupyter_server_proxy is enabled too, and both serve %s/: port_proxy answers there. Its named"
            " servers are not touched.",
            base,
        )
    server.log.info("port_proxy: every port of this machine is at %s/<port>/", base)


def _head_from_tornado(request: Any) -> RequestHead:
    """What Tornado understood of a request; it is parsed again, more strictly, before it is used."""
    fields = tuple((str(name), str(value)) for name, value in request.headers.get_all())
    return RequestHead(request.method, request.uri, request.host, request.version[len("HTTP/") :], fields)


# ---------------------------------------------------------------------------------------------------------------------
# Check: one port, looked at as a doctor would
# ---------------------------------------------------------------------------------------------------------------------

_ROOTED = re.compile(rb"""\b(?:src|href|action)\s{0,9}=\s{0,9}["']?(/(?!/)[^\s"'<>?#]{0,2000})""", re.IGNORECASE)
_PAGE_SECONDS = 30.0  # some apps are compiled when they are first asked for
_STRANGER = "port-proxy-check.invalid"  # a name that leads nowhere (RFC 6761)


_SCRIPT = re.compile(rb"""<script\s[^<>]{0,500}?\bsrc\s{0,9}=\s{0,9}["']?([^\s"'<>]{1,2000})""", re.IGNORECASE)
_SCRIPTS = 4  # of a page are looked into
_OWN_ADDRESS = rb"(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1?\])(?::|[^\s\"'<>]{0,20}\bport=)%d\b"
_GOES_PAST = (
    "%s names port %d itself. What asks for that goes past the proxy, and only a browser on this machine gets there: if"
    " something is missing elsewhere, tell the app the address that it is called by, as webpack-dev-server is told by"
    " --client-web-socket-url auto://0.0.0.0:0/ws."
)
_OWN_PORT = (
    "Port %d is the proxy's own, and no app can be reached there. If an app has it, say with --port where the proxy"
    " listens, or is to."
)
_REDIRECTS = 5  # in a row
_ROUND = "It redirected %d times in a row and showed no page; to a browser, which keeps cookies, it may." % _REDIRECTS
_OWN_ORIGIN = r"(https?)://(?:localhost|127\.0\.0\.1|\[::1\]):%d(?=[/?]|\Z)"
_USER_INFORMATION = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*:)?//[^/]*@")
_TO_TLS = (
    "It redirects to https at its own address, which the proxy leads back to it, and so on for ever. Switch that off in"
    " the app; or serve HTTPS (--certfile), if the app goes by X-Forwarded-Proto."
)
_LEAVING = (
    "Links that begin with a slash leave the prefix, and nothing leads them back: use the app's own host, its flag for"
    " the path it lives under, or --whole-origin yes."
)


class KnownApp(NamedTuple):
    """An app that tells itself by its page; socket: where it opens WebSockets; flag: makes it live under a path."""

    name: str
    sign: str
    socket: str
    flag: str


# %s stands for /proxy/absolute/PORT, the path that it is to live under.
_KNOWN_APPS = (
    KnownApp("Streamlit", "<title>Streamlit</title>", "/_stcore/stream", "--server.baseUrlPath %s"),
    KnownApp("Voila", "/voila/", "", "--base_url=%s/"),
    KnownApp("Jupyter", "jupyter-config-data|<title>Jupyter", "/api/events/subscribe", "--ServerApp.base_url=%s/"),
    KnownApp("Dask", "<title>Dask", "", 'http_prefix="%s"'),
    KnownApp("Panel or Bokeh", r"bokeh[.a-z-]{0,40}\.js", "", "--prefix %s"),
    KnownApp("Gradio", "gradio_config", "", 'root_path="%s"'),
    KnownApp("Dash", "_dash-config", "", 'url_base_pathname="%s/"'),
    KnownApp("TensorBoard", "tf-tensorboard|<title>TensorBoard", "", "--path_prefix %s"),
    KnownApp("marimo", "<marimo-", "", "--base-url %s"),
    KnownApp("Next.js", "/_next/static/", "/_next/webpack-hmr", 'basePath: "%s"'),
    KnownApp("Vite", "/@vite/client", "/", "--base %s/"),
)


class Report(NamedTuple):
    """What a port was found to be.  ok: it can be reached through the proxy as that is configured.

    owner, program: who listens, "" where that is not told; speaks: "http", "https", "other" or ""; rooted: the first
    links of its page that begin with a slash; refuses_host, refuses_origin: names that are not its own, None where
    that was not seen; socket: where a WebSocket opened; use: the forms of an address, the best first; flag: what would
    make it fit for the absolute form; problems: what is in the way, and what to do about it.
    """

    port: int
    base: str
    ok: bool = False
    addresses: Sequence[str] = ()
    owner: str = ""
    program: str = ""
    speaks: str = ""
    status: int = 0
    title: str = ""
    redirect: str = ""
    rooted: Sequence[str] = ()
    refuses_host: Optional[bool] = None
    refuses_origin: Optional[bool] = None
    socket: str = ""
    app: str = ""
    use: Sequence[str] = ()
    flag: str = ""
    problems: Tuple[str, ...] = ()


async def check_port(port: int, config: Config) -> Report:
    """Look at a port of this machine; it is asked for its first page, and for a WebSocket."""
    watch = Watch(asyncio.get_event_loop(), _watch_interval(config))
    own: List[Address] = []
    with contextlib.suppress(OSError, UnicodeError):  # an address that the proxy could not listen on either
        own = [place[4][:2] for place in _places(config)]
    upstreams = Upstreams(config, watch, own)
    try:
        return await _checked(_listening_at(port, config.base), upstreams)
    finally:
        await watch.close(1.0)


def _listening_at(port: int, base: str) -> Report:
    """What the system tells of a port."""
    sockets = [one for one in tcp_sockets(port=port) if one.state == _LISTEN]
    addresses = tuple(dict.fromkeys(_plain_text(one.address) for one in sockets))
    program = next((one.program for one in listeners() if one.port == port), "")
    return Report(port, base, False, addresses, _user_name(sockets[0].user) if sockets else "", program)


async def _checked(report: Report, upstreams: Upstreams) -> Report:
    route = route_of_host(report.port, "/")
    if speaks_tls(route, upstreams.config.upstream_tls):
        route = route._replace(scheme="https")
    try:
        answer = await ask(upstreams, route, patience=_PAGE_SECONDS)
    except ProxyError as error:
        if error.status == 508:
            return report._replace(problems=(_OWN_PORT % report.port,))
        if error.status != 502 or isinstance(error, NotListening) or route.scheme == "https":
            return report._replace(problems=(error.detail,))
        if await speaks_tls_there(upstreams, route):
            return report._replace(speaks="https", problems=(tls_advice(route),))
        return report._replace(speaks="other", problems=("It does not answer HTTP.",))
    report = report._replace(ok=True, speaks=route.scheme, status=answer.head.status)
    report, answer = await _followed(report, route, answer, upstreams)
    page = answer.body.decode("latin-1")
    app = next((one for one in _KNOWN_APPS if re.search(one.sign, page)), None)
    rooted = [match.decode("latin-1") for match in dict.fromkeys(_ROOTED.findall(answer.body))]
    stranger = await _status(upstreams, route, (("Host", _STRANGER),))
    if rooted and not upstreams.config.whole_origin:
        report = report._replace(problems=report.problems + (_LEAVING,))
    past = await _what_goes_past(report, route, answer, upstreams)
    report = report._replace(
        problems=report.problems + ((_GOES_PAST % (past, report.port),) if past else ()),
        title=title_in(answer.head, answer.body),
        app=app.name if app else "",
        rooted=rooted[:5],
        refuses_host=stranger >= 400 > report.status,
        flag=app.flag % ("%s/absolute/%d" % (upstreams.config.base, report.port)) if app else "",
        use=_forms_of(report.port, upstreams.config),
    )
    return await _with_socket(report, route, app.socket if app else "", upstreams)


async def _followed(report: Report, route: Route, answer: Answer, upstreams: Upstreams) -> Tuple[Report, Answer]:
    """The page that redirects of a port to itself lead to."""
    own = re.compile(_OWN_ORIGIN % report.port, re.IGNORECASE)
    for left in range(_REDIRECTS, -1, -1):
        location = "".join(field_values(answer.head.fields, "location")[:1]).partition("#")[0]
        if not 300 <= answer.head.status < 400 or not location:
            break
        match = own.match(location)
        is_here = match and match.group(1).lower() == route.scheme
        path = (location[match.end() :] or "/") if match and is_here else location
        report = report._replace(redirect=_USER_INFORMATION.sub(r"\1//", path.partition("?")[0]))
        if not _LOCAL_TARGET.fullmatch(path):
            problems = (_TO_TLS,) if match and not is_here and route.scheme == "http" else ()
            return report._replace(problems=report.problems + problems), answer
        if not left:
            return report._replace(problems=report.problems + (_ROUND,)), answer
        try:
            there = route_of_host(route.port, path)._replace(scheme=route.scheme)
            answer = await ask(upstreams, there, patience=_PAGE_SECONDS)
        except ProxyError as error:
            return report._replace(problems=(error.detail,)), answer
    return report, answer


async def _what_goes_past(report: Report, route: Route, page: Answer, upstreams: Upstreams) -> str:
    """The path of the page, or of one of its scripts, that names the app's own address; "" if none does."""
    own = re.compile(_OWN_ADDRESS % report.port)
    here = report.redirect or "/"
    if own.search(page.body):
        return here
    for name in list(dict.fromkeys(_SCRIPT.findall(page.body)))[:_SCRIPTS]:
        try:
            path = str(urljoin(here, name.decode("latin-1")))
        except ValueError:  # no URL
            continue
        if not _LOCAL_TARGET.fullmatch(path):
            continue
        try:
            script = await ask(upstreams, route_of_host(route.port, path)._replace(scheme=route.scheme))
        except ProxyError:
            continue
        if own.search(script.body):
            return path.partition("?")[0]
    return ""


async def _with_socket(report: Report, route: Route, known: str, upstreams: Upstreams) -> Report:
    """The report, with whether a WebSocket opens, at the app's own place or at a usual one, and to a foreign page."""
    handshake = (("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="))
    fields = handshake + _UPGRADE_FIELDS
    for path in dict.fromkeys((known or "/ws", "/ws", "/socket.io/?EIO=4&transport=websocket", "/")):
        place = route_of_host(route.port, path)._replace(scheme=route.scheme)
        own = (("Origin", "%s://%s" % (route.scheme, route.authority)),)
        if await _status(upstreams, place, fields + own) == 101:
            foreign = await _status(upstreams, place, fields + (("Origin", "http://" + _STRANGER),))
            return report._replace(socket=path.partition("?")[0], refuses_origin=foreign != 101)
    return report


async def _status(upstreams: Upstreams, route: Route, fields: Fields) -> int:
    """The status of an answer; 0 where none came."""
    try:
        return (await ask(upstreams, route, fields)).head.status
    except ProxyError:
        return 0


def _forms_of(port: int, config: Config) -> List[str]:
    """The addresses of a port by which this machine's own browser reaches it; a path where the proxy takes any port."""
    if not config.port:
        return ["%s/%d/" % (config.base, port)]
    name = "localhost:%d" % config.port
    scheme = "https" if config.certfile else "http"
    host = host_form(port, Visit("127.0.0.1", scheme, name), config.domains)
    return ([host] if host else []) + ["%s://%s%s/%d/" % (scheme, name, config.base, port)]


def report_text(report: Report) -> str:
    """A report as a person reads it."""
    lines = ["port %d of this machine" % report.port]

    def say(name: str, text: str) -> None:
        if text:
            lines.append("  %-10s %s" % (name, text))

    who = " ".join(filter(None, (report.program and "by " + report.program, report.owner and "of " + report.owner)))
    say("listens", " ".join(filter(None, (", ".join(report.addresses), who))))
    say("speaks", report.speaks and "%s %s %s" % (report.speaks, report.status or "", report.title))
    say("app", report.app)
    say("redirects", report.redirect)
    some = ", ".join(report.rooted[:3])
    say("links", some and "begin with a slash, such as " + some)
    say("Host", "refuses names that are not its own; the proxy sends localhost" if report.refuses_host else "")
    foreign = "; refuses pages of other origins" if report.refuses_origin else ""
    opened = "opens at " + report.socket + foreign if report.socket else "none opened at the usual places"
    say("WebSocket", opened if report.ok else "")
    lines += ["  problem    " + problem for problem in report.problems]
    say("use", "  or  ".join(report.use))
    kept = "%s/absolute/%d/" % (report.base, report.port)
    say("", report.flag and "or start it with %s and use %s" % (report.flag, kept))
    shown = "\n".join(lines)  # of which apps have written a part, and which goes to a terminal
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in shown)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
Makes every port of this machine reachable through one HTTP port.

  python3 port_proxy.py                       then open http://localhost:8888/proxy/
  ssh -N -L 8888:localhost:8888 THIS_MACHINE  brings it over to where your browser is
  python3 port_proxy.py --check 8080          says what keeps port 8080 from working
"""
# Field of Config, unit, and what it bounds; each becomes an option.
_LIMITS = (
    ("max_head_bytes", "BYTES", "longest head of a request or response"),
    ("max_target_bytes", "BYTES", "longest request target"),
    ("max_fields", "COUNT", "most fields in a head"),
    ("max_chunk_line_bytes", "BYTES", "longest first line of a chunk"),
    ("max_trailer_bytes", "BYTES", "longest trailers"),
    ("max_interim_responses", "COUNT", "most 1xx responses before the final one"),
    ("max_connections", "COUNT", "most connections of clients"),
    ("max_tunnels", "COUNT", "most open WebSockets"),
    ("max_idle_upstreams", "COUNT", "most idle connections kept to apps"),
    ("head_timeout", "SECONDS", "time for a request's head to come whole"),
    ("keep_alive_timeout", "SECONDS", "time a client's connection may wait for its next request"),
    ("connect_timeout", "SECONDS", "time for a connection to an app"),
    ("response_timeout", "SECONDS", "time for an app to begin its answer"),
    ("stall_timeout", "SECONDS", "time a body that has begun may stand still because of the client"),
    ("linger_timeout", "SECONDS", "time to read on behind an early answer"),
    ("idle_upstream_timeout", "SECONDS", "time an idle connection to an app is kept"),
    ("shutdown_timeout", "SECONDS", "time for running requests to finish when the proxy is told to stop"),
)


_SEVERAL = " (repeatable)"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with one line for most options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _parser(show_limits: bool = True) -> argparse.ArgumentParser:
    """The options; without the limits where help is to be short."""
    default = Config()
    parser = argparse.ArgumentParser(
        prog="port_proxy.py",
        usage="%(prog)s [options]",
        description=_INTRODUCTION,
        formatter_class=_Formatter,
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--port", type=int, metavar="N", help="port to listen on, 0 for any free one (default: %d)" % default.port)
    add("--bind", metavar="ADDRESS", help="address to listen on, or unix:PATH (default: %s)" % default.bind)
    add("--base", default=default.base, metavar="PATH", help="path that all lives under (default: %(default)s)")
    add("--host-allowlist", action="append", default=[], metavar="HOST", help="reach this host too" + _SEVERAL)
    add("--domain", action="append", default=[], metavar="NAME", help="8080.NAME is port 8080, too" + _SEVERAL)
    add("--whole-origin", choices=("yes", "no"), help="lead links without the prefix back to their app (see README)")
    add("--preserve-host", action="store_true", help="pass the browser's Host on, not localhost:PORT")
    _add_access_options(parser)
    about = parser.add_argument_group("what it tells")
    about.add_argument("--check", type=_port_number, metavar="PORT", help="look at one port and say how to open it")
    about.add_argument("--json", action="store_true", help="with --check: as data")
    volume = about.add_mutually_exclusive_group()
    volume.add_argument("--verbose", action="store_true", help="log a line for every request")
    volume.add_argument("--log-json", action="store_true", help="the same as JSON")
    volume.add_argument("--quiet", action="store_true", help="print nothing but errors")
    about.add_argument("--version", action="version", version="port_proxy " + __version__, help="print it")
    about.add_argument("--help", "-h", action=_Help, show_limits=False, help="print this")
    about.add_argument("--help-all", action=_Help, show_limits=True, help="print this, with limits and timeouts")
    limits = parser.add_argument_group("limits and timeouts")
    for name, unit, meaning in _LIMITS:
        value = getattr(default, name)
        text = meaning + " (default: %(default)g)" if show_limits else argparse.SUPPRESS
        limits.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, metavar=unit, help=text)
    return parser


class _Help(argparse.Action):
    """Prints help, short or whole."""

    def __init__(self, option_strings: Sequence[str], dest: str, show_limits: bool, help: str) -> None:  # noqa: A002
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)
        self.show_limits = show_limits

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(_parser(self.show_limits).format_help(), end="")
        parser.exit()


def _port_number(text: str) -> int:
    if not _PORT_NAME.fullmatch(text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("a port is a number from 1 to 65535, not %r" % text)
    return int(text)


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    access = parser.add_argument_group("who may come in, and what may be reached")
    token = access.add_mutually_exclusive_group()
    token.add_argument("--token", action="store_true", help="ask for a token (PORT_PROXY_TOKEN, or made at random)")
    token.add_argument("--token-file", metavar="FILE", help="ask for the token in this file")
    token.add_argument("--no-token", action="store_true", help="never ask for a token")
    for option, metavar, meaning in (
        ("--allow-hostname", "NAME", "further name, or glob, by which it may be called"),
        ("--allow-origin", "ORIGIN", "origin whose pages may use what is here, or *"),
        ("--trusted-proxy", "ADDRESS", "server in front whose X-Forwarded fields are believed"),
        ("--upstream-tls", "[HOST:]PORT", "upstream that speaks TLS"),
    ):
        access.add_argument(option, action="append", default=[], metavar=metavar, help=meaning + _SEVERAL)
    for option, meaning in (
        ("--insecure-upstream", "accept any certificate of this machine's own ports"),
        ("--allow-preflight", "let CORS preflights reach the apps unasked"),
        ("--any-owner", "also reach ports of this machine's other users"),
    ):
        access.add_argument(option, action="store_true", help=meaning)
    access.add_argument("--certfile", metavar="FILE", help="serve HTTPS with this certificate (PEM)")
    access.add_argument("--keyfile", metavar="FILE", help="its key, if that is in a file of its own")
    access.add_argument("--client-ca", metavar="FILE", help="let in only clients with a certificate of these (PEM)")


def _config(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments and the environment make; ValueError or OSError for what they get wrong."""
    lists = {
        "host_allowlist": arguments.host_allowlist,
        "domains": list(Config().domains) + arguments.domain,
        "allow_hostnames": arguments.allow_hostname,
        "allow_origins": arguments.allow_origin,
        "trusted_proxies": arguments.trusted_proxy,
        "upstream_tls": arguments.upstream_tls,
    }
    options: Dict[str, Any] = {
        name: tuple(one.strip() for entry in entries for one in entry.split(",")) for name, entries in lists.items()
    }
    plain = [name for name in Config._fields if name not in options and name not in ("token", "authorize", "hub")]
    options.update((name, getattr(arguments, name)) for name in plain if getattr(arguments, name) is not None)
    if arguments.whole_origin:
        options["whole_origin"] = arguments.whole_origin == "yes"
    config = Config(token=_token(arguments), **options)
    # In a terminal inside a Hub's server the environment is the same; a proxy there is told where to listen.
    if arguments.port is None and arguments.bind is None and "JUPYTERHUB_SERVICE_URL" in os.environ:
        return _config_under_hub(config, arguments, os.environ)
    return config


def _config_under_hub(config: Config, arguments: argparse.Namespace, environment: Mapping[str, str]) -> Config:
    """`config` as a JupyterHub that starts this program wants it; ValueError for what does not go with that."""
    for option in ("token", "token_file", "no_token", "certfile", "keyfile", "client_ca"):
        if getattr(arguments, option):
            name = "--" + option.replace("_", "-")
            raise ValueError("JupyterHub started this (JUPYTERHUB_SERVICE_URL is set) and says that itself: no " + name)
    hub = hub_in(environment)
    url = urlsplit(environment["JUPYTERHUB_SERVICE_URL"])
    if url.scheme not in _DEFAULT_PORTS or not url.netloc:
        raise ValueError("JUPYTERHUB_SERVICE_URL holds what no Hub sets: %s" % environment["JUPYTERHUB_SERVICE_URL"])
    names = ("certfile", "keyfile", "client_ca")
    tls: Dict[str, Any] = {name: environment.get("JUPYTERHUB_SSL_" + name.upper()) for name in names}
    return config._replace(
        hub=hub,
        base=hub.prefix + normal_base(config.base),
        bind=url.hostname or "0.0.0.0",
        port=url.port or int(_DEFAULT_PORTS[url.scheme][1:]),
        token="",
        # Whatever comes by another way than the Hub's own proxy must sign in all the same.
        trusted_proxies=config.trusted_proxies or ("0.0.0.0/0", "::/0"),
        # A Hub that stops a server waits for it, and for its own user's click.
        shutdown_timeout=min(config.shutdown_timeout, 0.3),
        **(tls if url.scheme == "https" else {}),
    )


def hub_in(environment: Mapping[str, str]) -> Hub:
    """The Hub that started this server, as told by its environment; ValueError where that is not whole."""

    def told(name: str, default: Optional[str] = None, kind: Callable[[str], Any] = str) -> Any:
        text = environment.get("JUPYTERHUB_" + name) or default
        if text is None:
            raise ValueError("JupyterHub started this, but JUPYTERHUB_%s is not set" % name)
        try:
            return kind(text)
        except (ValueError, TypeError, AttributeError):
            raise ValueError("JUPYTERHUB_%s holds what no Hub sets: %s" % (name, text))

    prefix = told("SERVICE_PREFIX", kind=normal_base)
    return Hub(
        prefix=prefix,
        user=told("USER", ""),
        api_url=told("API_URL", kind=_http_url).rstrip("/"),
        api_token=told("API_TOKEN"),
        client_id=told("CLIENT_ID"),
        authorize_url=told("HOST", "") + told("BASE_URL", "/") + "hub/api/oauth2/authorize",
        callback_url=told("OAUTH_CALLBACK_URL", prefix + "/oauth_callback"),
        access_scopes=told("OAUTH_ACCESS_SCOPES", environment.get("JUPYTERHUB_OAUTH_SCOPES"), _scopes),
        server_name=told("SERVER_NAME", ""),
        home=told("DEFAULT_URL", "", lambda path: _home(prefix, path)),
        activity_url=told("ACTIVITY_URL", "", lambda url: url and _http_url(url)),
        activity_interval=told("ACTIVITY_INTERVAL", "300", _seconds),
        is_secure=told("PUBLIC_URL", "").startswith("https:"),
        host_cookies=told("COOKIE_HOST_PREFIX_ENABLED", "0").lower() in ("1", "true"),
        cookie_options=told("COOKIE_OPTIONS", "{}", _cookie_options),
    )


def _http_url(url: str) -> str:
    match = _HTTP_URL.fullmatch(url)
    if not match or not is_authority(match.group(2)):
        raise ValueError("an HTTP URL is expected, not %r" % url)
    return url


def _home(prefix: str, path: str) -> str:
    home = prefix + "/" + quote(path.lstrip("/"), safe="/?#[]@!$&'()*+,;=:%~")
    return "" if is_home(prefix, home.partition("#")[0]) else home  # it would lead to itself


def _seconds(text: str) -> float:
    if not float(text) > 0:
        raise ValueError("a number of seconds is expected, not %r" % text)
    return float(text)


def _scopes(text: str) -> FrozenSet[str]:
    return frozenset(map(str, json.loads(text)))


def _cookie_options(text: str) -> Tuple[Tuple[str, str], ...]:
    """The attributes of cookies that the Hub wants, given as the arguments of Tornado's set_cookie in JSON."""
    given = {name.lower(): value for name, value in json.loads(text).items() if value not in (None, False)}
    if "expires_days" in given:
        given.setdefault("max_age", int(float(given["expires_days"]) * 86400))
    names = {"samesite": "SameSite", "secure": "Secure", "domain": "Domain", "max_age": "Max-Age"}
    names["partitioned"] = "Partitioned"
    found = tuple((name, "" if given[key] is True else str(given[key])) for key, name in names.items() if key in given)
    if any(not re.fullmatch("[A-Za-z0-9.-]*", value) for _, value in found):
        raise ValueError("this cannot stand in a cookie")
    return found


def _token(arguments: argparse.Namespace) -> Optional[str]:
    """The token that is asked for, "" for none, None where that depends on who can connect."""
    given = os.environ.pop("PORT_PROXY_TOKEN", "")
    if arguments.no_token:
        return ""
    if arguments.token_file:
        with open(arguments.token_file, encoding="latin-1") as file:  # what else is in it is told later
            given = file.read().strip()
        if not given:
            raise ValueError("there is no token in %s" % arguments.token_file)
    return given or (ANY_TOKEN if arguments.token else None)


def _banner(proxy: PortProxy) -> str:
    config, url = proxy.config, proxy.url
    if config.hub:
        text = "port_proxy %s: reaches every port of this machine as %s/<port>/, for %s, who signs in at the Hub"
        return text % (__version__, config.base, config.hub.user or "whom the Hub lets in")
    question = "?token=" + quote(proxy.token, safe="") if proxy.token else ""
    others = (
        ""
        if callable(config.host_allowlist) or not config.host_allowlist
        else ", and on " + ", ".join(config.host_allowlist)
    )
    lines = ["port_proxy %s: open %s%s" % (__version__, url, question)]
    away = _ssh_destination(os.environ)
    is_unix = config.bind.startswith(_UNIX_PREFIX)
    if is_unix:
        path = os.path.abspath(config.bind[len(_UNIX_PREFIX) :])
        there = away or socket.gethostname()
        lines = ["port_proxy %s: bring it over with  ssh -N -L 8888:%s %s" % (__version__, path, there)]
        url = url.replace("localhost", "localhost:8888", 1)
        lines.append("and open %s%s" % (url, question))
    parts = urlsplit(url)
    host = host_form(8080, Visit("", parts.scheme, parts.netloc), config.domains).replace("8080", "<port>", 1)
    lines.append("It reaches every port of this machine as %s<port>/%s%s." % (url, host and " or " + host, others))
    if away and not is_unix:
        local = "localhost" if proxy.is_private or config.bind in ("", "0.0.0.0", "::") else config.bind
        lines.append("On your own machine, first:  ssh -N -L {0}:{1}:{0} {2}".format(proxy.port, local, away))
    return "\n".join(lines)


def _say(text: str) -> None:
    """Print, or tell it on stderr where nobody takes what is printed: closed, a pipe that was left, a full disk."""
    if sys.stdout is None:
        _complain(text)
        return
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        coding = sys.stdout.encoding or "ascii"
        _say(text.encode(coding, "backslashreplace").decode(coding))
    except OSError:
        _complain(text)


def _complain(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def _ssh_destination(environment: Mapping[str, str]) -> str:
    """What ssh is given to come here as this session did, "" where it did not come by that (ssh(1))."""
    words = environment.get("SSH_CONNECTION", "").split(" ")
    if len(words) != 4:
        return ""
    address, port = words[2:]
    user = environment.get("LOGNAME") or environment.get("USERNAME", "")
    return ("" if port == "22" else "-p %s " % port) + (user and user + "@") + address


def _inherited_sockets() -> List[socket.socket]:
    """The sockets that systemd hands over (sd_listen_fds(3)), if it does."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    sockets = []
    for number in range(3, 3 + int(count) if re.fullmatch("[0-9]{1,3}", count) else 3):
        sock = socket.socket(fileno=number)
        name = sock.getsockname()
        family = _UNIX if isinstance(name, (str, bytes)) else socket.AF_INET6 if len(name) == 4 else socket.AF_INET
        sockets.append(socket.socket(family or -1, socket.SOCK_STREAM, 0, fileno=sock.detach()))  # 3.6 does not look
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return sockets


async def _run(config: Config, quiet: bool) -> int:
    loop = asyncio.get_event_loop()
    stop = asyncio.Event()
    proxy = PortProxy(config)

    def interrupt() -> None:
        if stop.is_set():  # told a second time
            proxy.cut()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, interrupt)
        except NotImplementedError:  # the event loop of Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
    try:
        await proxy.start(_inherited_sockets() or None)
    except (OSError, ValueError) as error:
        _complain("port_proxy: " + _why_not_listening(error, config))
        return 2
    if not quiet or proxy.token != (config.token or ""):  # a token that nobody has seen would be of no use
        _say(_banner(proxy))
    if config.token == "" and not proxy.is_private and not config.hub:
        _complain("port_proxy: anybody who can reach %s can use every port of this machine (--no-token)" % config.bind)
    await stop.wait()
    await proxy.close()
    if hasattr(signal, "pthread_sigmask"):  # on the way out, being told again changes nothing
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    return 0


async def _check(port: int, config: Config, as_json: bool) -> int:
    report = await check_port(port, config)
    _say(json.dumps(report._asdict(), indent=1) if as_json else report_text(report))
    return 0 if report.ok else 1


def _log_to_stderr(arguments: argparse.Namespace) -> None:
    level = logging.WARNING
    if arguments.verbose or arguments.log_json:
        level = logging.INFO
    elif arguments.quiet:
        level = logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if arguments.log_json else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _JsonLines(logging.Formatter):
    """A log record as a line of JSON; that of a request with what it is made of."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + ".%03dZ" % record.msecs
        told = {"time": moment, "level": record.levelname.lower()}
        told.update(getattr(record, "request", None) or {"message": record.getMessage()})
        return json.dumps(told)


def _why_not_listening(error: Exception, config: Config) -> str:
    where = "port %d of %s" % (config.port, config.bind)
    if isinstance(error, UnicodeError):
        return _NO_ADDRESS % config.bind
    if not isinstance(error, OSError):
        return str(error)
    if error.filename and error.filename in (config.certfile, config.keyfile, config.client_ca):
        return "cannot read %s: %s" % (error.filename, error.strerror)
    if config.bind.startswith(_UNIX_PREFIX):
        return "cannot listen on %s: %s" % (config.bind, error.strerror or error)
    if error.errno == errno.EADDRINUSE and config.hub:
        return (
            "%s, which JUPYTERHUB_SERVICE_URL names, is in use: this shell seems to be one inside a server that"
            " JupyterHub started. For a proxy of your own there, choose a port: --port 0" % where
        )
    if error.errno == errno.EADDRINUSE:
        return "%s is in use by another program; choose another with --port, or --port 0 for any free one" % where
    if error.errno == errno.EACCES:
        return "%s may not be used without further rights; choose one above 1023 with --port" % where
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, None):  # None: asyncio from 3.13 on
        return _NO_ADDRESS % config.bind
    return "cannot listen on %s: %s" % (where, os.strerror(error.errno) if error.errno else error)


_NO_ADDRESS = "%s is no address of this machine; see --bind"


class _LoopComplaints:
    """What the event loop has to say, in one line and not too often: it goes on by itself."""

    def __init__(self) -> None:
        self.silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Dict[str, Any]) -> None:
        if loop.time() >= self.silent_until:
            self.silent_until = loop.time() + 10
            error = context.get("exception")
            logger.warning("%s%s", context.get("message"), ": %s" % error if error else "")


def _raise_descriptor_limit(config: Config) -> Config:
    """Allow as many descriptors as the system lets us have, and no more connections than these are enough for."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return config
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    most = max(8, (soft - 32) // 2)  # a client's connection goes with one to an upstream
    if soft == resource.RLIM_INFINITY or config.max_connections <= most:
        return config
    tunnels, idle = min(config.max_tunnels, most * 3 // 4), min(config.max_idle_upstreams, most // 4)
    return config._replace(max_connections=most, max_tunnels=tunnels, max_idle_upstreams=idle)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the proxy as the command line says; the exit status is 0 when it was told to stop, or a checked port can be
    reached; 1 when that cannot; 2 for a mistake of usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        config = checked_config(_config(arguments))
    except OSError as error:
        parser.error("cannot read %s: %s" % (error.filename, error.strerror))
    except ValueError as error:
        parser.error(str(error))
    _log_to_stderr(arguments)
    config = _raise_descriptor_limit(config)
    loop = new_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_LoopComplaints())
    try:
        if arguments.check:
            return loop.run_until_complete(_check(arguments.check, config, arguments.json))
        return loop.run_until_complete(_run(config, arguments.quiet))
    except KeyboardInterrupt:
        return 0
    finally:
        loop.close()


if __name__ == "__main__":
    sys.exit(main())
