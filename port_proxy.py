#!/usr/bin/env python3
"""port_proxy: every port of a machine, reachable through one HTTP port.

Run ``python3 port_proxy.py`` and open ``http://localhost:8888/proxy/8080/``: it shows what listens on port 8080 of
this machine.  The standard library is all it needs, from CPython 3.6 on.

    <base>/<port>/path?q                    /path?q at localhost:<port>, the prefix stripped
    <base>/absolute/<port>/path?q           the full <base>/absolute/<port>/path?q at localhost:<port>
    <base>/<host>:<port>/path?q             as the first, on a host of the allowlist
    <base>/absolute/<host>:<port>/path?q    as the second, on a host of the allowlist

The story of one request.  A client's bytes become a `RequestHead` (heads) or a refusal (errors); how its body is framed
is settled once, strictly (framing).  The target names a `Route` (routes), which must be allowed (access).  The head for
the upstream is written anew from what was understood (rewriting) and sent on a connection to it, fresh or pooled
(upstream).  The body follows while the answer is already awaited; the answer's head is parsed as strictly, written anew
and relayed piece by piece (exchange).  After a 101 the two connections are spliced (exchange).  The server (server)
accepts, repeats this for every request of a connection, and is the one place that turns errors into answers (pages).

Sections, each using only names above it: errors, configuration, heads, streams, framing, routes, rewriting, access,
upstream, pages, exchange, server, command line.

Embedding:

    from port_proxy import Config, PortProxy
    proxy = await PortProxy(Config(port=0)).start()
    print(proxy.port)
    await proxy.close()
"""

import argparse
import asyncio
import base64
import errno
import fnmatch
import hashlib
import html
import ipaddress
import logging
import os
import re
import signal
import socket
import struct
import sys
import time
from http import HTTPStatus
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union
from urllib.parse import unquote_to_bytes

__version__ = "0.1.0"
__all__ = ["Config", "PortProxy", "ProxyError", "main"]

logger = logging.getLogger("port_proxy")

Fields = Tuple[Tuple[str, str], ...]  # (name, value) pairs, latin-1; order, case and duplicates as on the wire
FOREVER = float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# Errors: raised where they are found, turned into an answer in one place (`PortProxy`)
# ---------------------------------------------------------------------------------------------------------------------


class ProxyError(Exception):
    """A request that this proxy answers itself because it refuses it or cannot serve it.

    status: the HTTP status code of the answer; detail: one or more sentences for the person who reads it (plain text,
    escaped where it is shown); fields: further (name, value) pairs of the answer's head.
    """

    def __init__(self, status: int, detail: str, fields: Fields = ()) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.fields = fields


class ClientGone(Exception):
    """The client left, or takes nothing any more: there is nobody to answer."""


class Truncated(Exception):
    """A connection ended in the middle of a message."""


class Stalled(Exception):
    """A peer let a deadline pass."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every limit and timeout, once, with its reason
# ---------------------------------------------------------------------------------------------------------------------


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

    max_idle_upstreams: int = 128  # pooled connections to all upstreams together
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


def field_values(fields: Fields, name: str) -> List[str]:
    """All values of the field called `name` (lower case), in order."""
    return [value for key, value in fields if key.lower() == name]


def field_tokens(fields: Fields, name: str) -> FrozenSet[str]:
    """The members of the list-valued field called `name`, lower-cased."""
    return frozenset(member.strip(" \t").lower() for value in field_values(fields, name) for member in value.split(","))


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
    if hosts and not _AUTHORITY.fullmatch(authority):
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


def check_partial_head(head: bytearray, start: int, is_request: bool, config: Config) -> None:
    """Refuse the beginning of a head as soon as it is too long or cannot become a valid one (ProxyError).

    start: up to where it was checked before, or a little less.
    """
    if _ILLEGAL.search(head, start):
        raise ProxyError(400, "The message head has a control byte, or a CR or LF that is no part of a CRLF.")
    end = head.find(b"\r\n")
    if is_request:
        if end >= 0:
            _parse_request_line(head[:end].decode("latin-1"))
        elif len(head) > config.max_target_bytes:
            raise ProxyError(414, "The request line is longer than %d bytes." % config.max_target_bytes)
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
    if not match or not _AUTHORITY.fullmatch(match.group(1)):
        raise ProxyError(400, "The request target is neither a path nor an http URL.")
    authority, path, query = match.groups()
    if method == "OPTIONS" and not path and not query:
        return authority, "*"  # RFC 9112 section 3.2.4
    return authority, (path or "/") + (query or "")


def _parse_fields(section: str, config: Config) -> Fields:
    """The field lines up to and including the empty line (RFC 9112 section 5)."""
    if not _FIELD_SECTION.fullmatch(section):
        raise ProxyError(400, _what_is_wrong_with(section))
    pairs = _FIELD.findall(section)
    if len(pairs) > config.max_fields:
        raise ProxyError(431, "The message head has more than %d fields." % config.max_fields)
    return tuple((name, value.strip(" \t")) for name, value in pairs)


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
# Streams: one peer's connection, and the one timer that looks after all of them
# ---------------------------------------------------------------------------------------------------------------------

_RECEIVE_BYTES = 65536


class Reader(asyncio.StreamReader):
    """asyncio's reader, which also says what happens on the connection while nobody reads.

    unread: bytes that have come and wait; ended: the peer has sent its last byte; failure: why, where that was no clean
    end.  asyncio's own throws away the bytes in front of a failure; here they can still be read, then the end comes.
    on_data and on_end are called, without arguments, when bytes or the end arrive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=_RECEIVE_BYTES, loop=loop)
        self.unread = 0
        self.ended = False
        self.failure: Optional[BaseException] = None
        self.on_data: Optional[Callable[[], None]] = None
        self.on_end: Optional[Callable[[], None]] = None

    def feed_data(self, data: Iterable[Any]) -> None:
        assert isinstance(data, bytes)
        self.unread += len(data)
        super().feed_data(data)
        if self.on_data:
            self.on_data()

    def feed_eof(self) -> None:
        super().feed_eof()
        if not self.ended:
            self.ended = True
            if self.on_end:
                self.on_end()

    def set_exception(self, exc: BaseException) -> None:
        if self.failure is None:
            self.failure = exc
        self.feed_eof()

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        self.unread -= len(data)
        return data


class Stream:
    """One peer's connection: its reader with the bytes that were read and not used yet, its writer, its deadlines.

    buffer: bytes read and not used yet; was_heard: whether any came since that was last set False; address: the peer's,
    "-" where it has none.  One task reads and one writes at a time.  All deadlines are absolute, on the
    loop's clock, and kept by `Watch`.
    """

    def __init__(self, reader: Reader, writer: asyncio.StreamWriter, watch: "Watch") -> None:
        self.reader = reader
        self.writer = writer
        self.transport: asyncio.Transport = writer.transport  # type: ignore[assignment]
        self.watch = watch
        self.now = watch.loop.time
        self.buffer = bytearray()
        self.read_deadline = FOREVER
        self.write_deadline = FOREVER
        self.was_heard = False
        peer = self.transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else "-"
        watch.streams.add(self)

    async def more(self, deadline: float = FOREVER) -> bool:
        """Wait until `buffer` has grown; False at the peer's clean end; raises its failure (OSError, Stalled)."""
        data = await self._read(_RECEIVE_BYTES, deadline)
        self.buffer += data
        return bool(data)

    async def take(self, limit: int, deadline: float = FOREVER) -> bytes:
        """At most `limit` bytes, from the buffer or as they come; b"" at the clean end; raises as `more` does."""
        if self.buffer:
            data = bytes(self.buffer[:limit])
            del self.buffer[:limit]
            return data
        return await self._read(min(limit, _RECEIVE_BYTES), deadline)

    async def _read(self, limit: int, deadline: float) -> bytes:
        self.read_deadline = deadline
        try:
            data = await self.reader.read(limit)
        finally:
            self.read_deadline = FOREVER
        if data:
            self.was_heard = True
        elif self.reader.failure is not None:
            raise self.reader.failure
        return data

    def write(self, data: bytes) -> None:
        """Send bytes, or queue them behind those that the peer has not taken yet; then `flush`."""
        if not self.transport.is_closing():
            self.writer.write(data)

    async def flush(self, timeout: float) -> None:
        """Wait until the peer has taken enough of what was written; OSError if it is gone or lets `timeout` s pass."""
        self.write_deadline = self.now() + timeout
        await self.writer.drain()
        self.write_deadline = FOREVER
        if self.transport.is_closing():  # drain() is silent where the connection was closed on this side
            raise ConnectionResetError(errno.ECONNRESET, "the connection is closed")

    def is_fresh(self) -> bool:
        """Whether nothing has come that was not used, no byte and no end."""
        return not (self.buffer or self.reader.unread or self.reader.ended or self.transport.is_closing())

    def expire(self, now: float) -> None:
        """Act on the deadlines that have passed; called by `Watch`."""
        if now > self.read_deadline:
            self.read_deadline = FOREVER
            self.reader.set_exception(Stalled())
        if now > self.write_deadline:
            self.write_deadline = FOREVER
            self.reader.set_exception(Stalled())
            self.abort()

    def end_writing(self) -> None:
        """Send what is queued, then tell the peer that no more will come, as far as the transport can."""
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.close()

    def close(self, timeout: float = 60.0) -> None:
        """Send what is queued, for at most `timeout` s, and close."""
        if not self.transport.is_closing():
            self.write_deadline = self.now() + timeout
            self.transport.close()

    def abort(self) -> None:
        """Close at once; whoever reads or writes sees a failure, never a clean end."""
        if not self.reader.ended:
            self.reader.set_exception(ConnectionAbortedError(errno.ECONNABORTED, "the proxy gave the connection up"))
        self.transport.abort()

    def reset(self) -> None:
        """Close at once so that the peer sees a failure too: for a message that only its connection's end delimits."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and sock.family != getattr(socket, "AF_UNIX", None) and not self.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def pause_reading(self) -> None:
        """Stop receiving; the kernel then stops the peer."""
        try:
            self.transport.pause_reading()
        except RuntimeError:  # before 3.7 these two refuse to do nothing
            pass

    def resume_reading(self) -> None:
        """Receive again."""
        try:
            self.transport.resume_reading()
        except RuntimeError:
            pass

    async def hand_over(self, protocol: asyncio.Protocol) -> bytes:
        """Let `protocol` have all that comes from now on; the bytes that had come before are returned."""
        self.transport.set_protocol(protocol)
        while self.reader.unread:
            await self.more()
        earlier = bytes(self.buffer)
        self.buffer.clear()
        self.resume_reading()
        return earlier


class StreamProtocol(asyncio.StreamReaderProtocol):
    """asyncio's stream protocol, which makes a `Stream` and saves what came before a reset.

    accepted: called with the new stream where the peer connected to us; None where we connect to it.
    """

    def __init__(self, watch: "Watch", accepted: Optional[Callable[[Stream], None]] = None) -> None:
        self.reader = Reader(watch.loop)
        super().__init__(self.reader, loop=watch.loop)
        self.watch = watch
        self.accepted = accepted
        self.stream: Optional[Stream] = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        writer = asyncio.StreamWriter(transport, self, self.reader, self.watch.loop)
        self.stream = Stream(self.reader, writer, self.watch)
        if self.accepted:
            self.accepted(self.stream)

    def connection_lost(self, exc: Optional[BaseException]) -> None:
        assert self.stream is not None
        if isinstance(exc, OSError):
            self._save_unread(self.stream)
        self.watch.forget(self.stream)
        super().connection_lost(exc)  # type: ignore[arg-type]

    def _save_unread(self, stream: Stream) -> None:
        """Read what the kernel still holds: an upstream that answers early and closes may have reset the connection
        before its answer was read, and asyncio stops reading when a write fails."""
        sock = stream.transport.get_extra_info("socket")
        if sock is None or stream.transport.get_extra_info("sslcontext"):
            return
        try:
            with socket.fromfd(sock.fileno(), sock.family, sock.type) as copy:
                copy.setblocking(False)
                data = copy.recv(_RECEIVE_BYTES)
                while data:
                    self.reader.feed_data(data)
                    data = copy.recv(_RECEIVE_BYTES)
        except (OSError, RuntimeError):  # nothing more, or (3.6) the closing transport refuses to be paused
            pass


class Watch:
    """All open connections, and one coarse timer for all of their deadlines instead of one for every read."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.loop = loop
        self.interval = interval
        self.streams: Set[Stream] = set()
        self._empty: Optional["asyncio.Future[None]"] = None
        self._timer = loop.call_later(interval, self._tick)

    def _tick(self) -> None:
        now = self.loop.time()
        for stream in list(self.streams):
            stream.expire(now)
        self._timer = self.loop.call_later(self.interval, self._tick)

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
    buffer = stream.buffer
    if is_request:
        await _skip_empty_lines(stream, deadline)
    searched = 0
    while True:
        end = buffer.find(b"\r\n\r\n", max(0, searched - 3))
        if 0 <= end <= config.max_head_bytes - 4:
            head = bytes(buffer[: end + 4])
            del buffer[: end + 4]
            return head
        if searched < len(buffer):
            check_partial_head(buffer, max(0, searched - 1), is_request, config)
        searched = len(buffer)
        if not await stream.more(deadline):
            raise Truncated()


async def _skip_empty_lines(stream: Stream, deadline: float) -> None:
    """Some clients send a CRLF behind a body; one or two are tolerated (RFC 9112 section 2.2)."""
    for _ in range(2):
        while len(stream.buffer) < 2:
            if stream.buffer and stream.buffer != b"\r":
                return
            if not await stream.more(deadline):
                raise Truncated()
        if not stream.buffer.startswith(b"\r\n"):
            return
        del stream.buffer[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Framing: where a message body ends (RFC 9112 sections 6 and 7), reading it and writing it anew
# ---------------------------------------------------------------------------------------------------------------------

_LENGTH_LIST = re.compile(r"[0-9]{1,18}(?:[ \t]*,[ \t]*[0-9]{1,18})*")
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_CHUNK_LINE = re.compile(
    r"([0-9A-Fa-f]{1,16})(?:[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?)*" % (TOKEN, TOKEN, _QUOTED)
)
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
    numbers = {number.strip(" \t") for value in lengths for number in value.split(",")}
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


def framed(data: bytes, framing: Framing, is_last: bool) -> bytes:
    """A piece of a body, which may be empty, as it stands on the wire."""
    if framing.kind != CHUNKED:
        return data
    chunk = b"%x\r\n%s\r\n" % (len(data), data) if data else b""
    return chunk + b"0\r\n\r\n" if is_last else chunk


class Body:
    """The body of one message, read off a stream piece by piece, as the pieces come.

    finished: the body has been read to its end, and the stream stands right behind it.
    """

    def __init__(self, stream: Stream, framing: Framing, config: Config) -> None:
        self.stream = stream
        self.framing = framing
        self.config = config
        self.finished = framing == NO_BODY or (framing.kind == LENGTH and framing.length == 0)
        self._remaining = framing.length  # of the body, or of the chunk that is being read
        self._part = "size"  # of a chunked body, what comes next: size, data, data end, trailers
        self._trailer_bytes = 0

    async def read(self, timeout: float = FOREVER) -> bytes:
        """The next piece, at least a byte of it, or b"" where the body has ended.

        Raises ProxyError 400 if it is malformed, Truncated if it breaks off, Stalled if nothing comes for `timeout` s,
        OSError if the connection fails.
        """
        while not self.finished:
            data = self.at_hand()
            if data or self.finished:
                return data
            deadline = self.stream.now() + timeout
            if self.framing.kind == CHUNKED:
                if not await self.stream.more(deadline):
                    raise Truncated()
            else:
                limit = self._remaining if self.framing.kind == LENGTH else _RECEIVE_BYTES
                data = await self.stream.take(limit, deadline)
                if data:
                    return self._counted(data)
                if self.framing.kind == LENGTH:
                    raise Truncated()
                self.finished = True
        return b""

    def at_hand(self) -> bytes:
        """As `read`, but only what is in the stream's buffer already: b"" also if that is nothing."""
        buffer = self.stream.buffer
        if self.finished or not buffer:
            return b""
        if self.framing.kind == CHUNKED:
            return self._decode_chunks(buffer)
        return self._counted(_cut(buffer, self._remaining if self.framing.kind == LENGTH else len(buffer)))

    def _counted(self, data: bytes) -> bytes:
        if self.framing.kind == LENGTH:
            self._remaining -= len(data)
            self.finished = self._remaining == 0
        return data

    def _decode_chunks(self, buffer: bytearray) -> bytes:
        """Take all whole parts of chunks, and the data of the last, from the buffer (RFC 9112 section 7.1)."""
        pieces = []
        while buffer and not self.finished:
            if self._part == "data":
                pieces.append(_cut(buffer, self._remaining))
                self._remaining -= len(pieces[-1])
                if not self._remaining:
                    self._part = "data end"
            elif self._part == "data end":
                if not b"\r\n".startswith(bytes(buffer[:2])):
                    raise ProxyError(400, "A chunk is not followed by CRLF.")
                if len(buffer) < 2:
                    break
                del buffer[:2]
                self._part = "size"
            else:
                line = self._take_line(buffer)
                if line is None:
                    break
                if self._part == "size":
                    self._chunk_begins(line)
                else:
                    self._trailer_comes(line)
        return b"".join(pieces)

    def _take_line(self, buffer: bytearray) -> Optional[str]:
        """Cut one line off the buffer, without its CRLF; None if it has not come whole."""
        is_size = self._part == "size"
        limit = self.config.max_chunk_line_bytes if is_size else self.config.max_trailer_bytes
        end = buffer.find(b"\n", 0, limit + 2)
        if end < 0:
            if len(buffer) > limit + 1:
                raise ProxyError(400, "A chunk's first line or trailer is longer than %d bytes." % limit)
            if is_size and not _CHUNK_LINE_START.fullmatch(buffer):
                raise ProxyError(400, "A chunk does not begin with its size in hexadecimal digits.")
            return None
        line = _cut(buffer, end + 1)
        if not line.endswith(b"\r\n"):
            raise ProxyError(400, "A line of a chunked body ends without CR.")
        return line[:-2].decode("latin-1")

    def _chunk_begins(self, line: str) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if not match:
            raise ProxyError(400, "A chunk does not begin with its size in hexadecimal digits.")
        self._remaining = int(match.group(1), 16)
        self._part = "data" if self._remaining else "trailers"

    def _trailer_comes(self, line: str) -> None:
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > self.config.max_trailer_bytes:
            raise ProxyError(400, "The trailers are longer than %d bytes." % self.config.max_trailer_bytes)
        if line and not _FIELD.fullmatch(line + "\r\n"):
            raise ProxyError(400, "A trailer is not a valid field line.")
        self.finished = not line


def _cut(buffer: bytearray, count: int) -> bytes:
    data = bytes(buffer[:count])
    del buffer[:count]
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Routes: what a request target names, and whether its host may be reached
# ---------------------------------------------------------------------------------------------------------------------

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_BASE = re.compile(r"(?:/[A-Za-z0-9\-._~!$&'()*+,;=:@%]+)*")
_ROUTE = re.compile(r"(/absolute)?/([^/]*)(/.*)?")
_TARGET = re.compile(r"(?:(?:([A-Za-z0-9_][A-Za-z0-9_.\-]{0,252})|\[([0-9A-Fa-f:.]{2,45})\]):)?([1-9][0-9]{0,4})")
_NAME_PATTERN = re.compile(r"[a-z0-9_.*?\-]+")  # of the allowlist; the next is for IPv6
_ADDRESS_PATTERN = re.compile(r"[0-9a-f.*?]*:[0-9a-f.*?]*[:*?][0-9a-f:.*?]*")
_UP = re.compile(r"(?:\.|%2e){2}", re.IGNORECASE)
_HERE = re.compile(r"(?:\.|%2e)", re.IGNORECASE)


class Route(NamedTuple):
    """Where a request goes.

    host: as written, lower-cased, without brackets; "localhost" where none was written.  prefix: what the client wrote
    in front of the app's own path.  absolute: the upstream is sent the prefix too.  path: what follows the prefix, raw,
    "" where the slash behind the port is missing.  query: raw, with its "?", or "".
    """

    host: str
    port: int
    prefix: str
    absolute: bool
    path: str
    query: str

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
    rest = _below(base, path)
    if rest in ("", "/"):
        return None
    match = _ROUTE.fullmatch(rest) if rest else None
    named = _TARGET.fullmatch(match.group(2)) if match else None
    if not match or not named or int(named.group(3)) > 65535:
        raise ProxyError(404, "No port is named here. " + forms(base))
    name, literal, port = named.groups()
    if literal and not _is_ipv6(literal):
        raise ProxyError(400, "What stands in brackets is not an IPv6 address.")
    rest_of_path = match.group(3) or ""
    if _leaves(rest_of_path):
        raise ProxyError(400, "The dot segments of this path lead out of the app it names.")
    prefix = path[: len(path) - len(rest_of_path)]
    host = (name or literal or "localhost").lower()
    return Route(host, int(port), prefix, bool(match.group(1)), rest_of_path, mark + query)


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
        pattern = given.strip("[]").lower()
        if not _NAME_PATTERN.fullmatch(pattern) and not _ADDRESS_PATTERN.fullmatch(pattern):
            raise ValueError("an allowed host is a name, an address or a glob such as *.example.org, not %r" % given)
        normal.append(pattern)
    return tuple(normal)


def _below(base: str, path: str) -> Optional[str]:
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
_PORT = re.compile(r":([0-9]+)\Z")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Visit(NamedTuple):
    """How the client sees us: its address, and the scheme and authority (host:port) of the origin that it talks to."""

    address: str
    scheme: str
    authority: str


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
    fields = [("Host", visit.authority if preserve_host and visit.authority else route.authority)]
    translated = False
    for name, value in head.fields:
        key = name.lower()
        if key in _HOP_BY_HOP or key in _WRITTEN_BY_US or key in named or (key == "expect" and head.version == "1.0"):
            continue
        if not preserve_host and key == "origin" and is_own_origin(value, visit.authority):
            value = "http://" + route.authority
            translated = True
        elif not preserve_host and key == "referer":
            value = _translate_referer(value, route, visit)
        fields.append((name, value))
    fields.extend(_forwarded_fields(visit, translated))
    if not route.absolute:
        fields.extend((name, route.prefix) for name in _FORWARDED_PREFIX)
    fields.extend(framing_fields(framing))
    if is_upgrade:
        fields.extend(_UPGRADE_FIELDS)
    return RequestHead(head.method, route.target, route.authority, "1.1", tuple(fields))


_UPGRADE_FIELDS = (("Connection", "Upgrade"), ("Upgrade", "websocket"))


def _forwarded_fields(visit: Visit, translated: bool) -> List[Tuple[str, str]]:
    """Where Origin was translated, the public name is left out: an app must see that or the local one, never a mix."""
    fields = [("X-Forwarded-For", visit.address), ("X-Forwarded-Proto", visit.scheme)]
    if visit.authority and not translated:
        port = _PORT.search(visit.authority)
        fields.append(("X-Forwarded-Host", visit.authority))
        fields.append(("X-Forwarded-Port", port.group(1) if port else _DEFAULT_PORTS[visit.scheme][1:]))
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
    return "http://%s%s" % (route.authority, path if path.startswith("/") else "/" + path)


def response_for_client(head: ResponseHead, route: Route, framing: Framing, visit: Visit) -> ResponseHead:
    """The response as the client gets it, framed by `framing`; what points at the app's home is made to point here."""
    named = field_tokens(head.fields, "connection") - {"content-length"}
    homes = _homes(route, visit)
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
            value = _translate_location(value, route, homes)
        elif key == "refresh":
            value = _translate_refresh(value, route, homes)
        elif key == "set-cookie" and not route.absolute:
            value = _translate_cookie(value, route, homes)
        fields.append((name, value))
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


def _translate_location(value: str, route: Route, homes: FrozenSet[str]) -> str:
    """A path gains the prefix; a URL of the app's home becomes a path here, which fits whatever scheme and name the
    client uses; relative, foreign and network-path references ("//host") stay."""
    match = _HTTP_URL.fullmatch(value)
    if match:
        if match.group(2).lower() not in homes:
            return value
        path = match.group(3) if match.group(3).startswith("/") else "/" + match.group(3)
        path = _with_prefix(path, route)
        return "/." + path if path.startswith("//") else path  # or it would name another host once its own is gone
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
    kept = parts[:1]
    for part in parts[1:]:
        name, equals, attribute = part.partition("=")
        key, attribute = name.strip(" \t").lower(), attribute.strip(" \t")
        if key == "domain" and any(attribute.lower().lstrip(".") == home.rpartition(":")[0] for home in homes):
            continue
        if key == "path":
            part = name + equals + _with_prefix(attribute, route)
        kept.append(part)
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


def is_websocket(head: RequestHead) -> bool:
    """Whether a request opens a WebSocket (RFC 6455 section 4.1); any other Upgrade is ignored, h2c above all."""
    return (
        head.method == "GET"
        and head.version == "1.1"
        and "upgrade" in field_tokens(head.fields, "connection")
        and [value.lower() for value in field_values(head.fields, "upgrade")] == ["websocket"]
    )


def check_access(head: RequestHead, route: Route, framing: Framing, config: Config) -> None:
    """ProxyError 403 or 400 if this request may not reach this route."""
    if not is_allowed(route.host, config.host_allowlist):
        raise ProxyError(
            403,
            "The host %s is not on the allowlist. Start the proxy with --host-allowlist %s to allow it."
            % ((route.host,) * 2),
        )
    if is_websocket(head):
        if framing != NO_BODY:
            raise ProxyError(400, "A WebSocket handshake has no body.")
        origins = field_values(head.fields, "origin")
        if origins and not (len(origins) == 1 and is_own_origin(origins[0], head.authority)):
            raise ProxyError(
                403, "A page of another site may not open a WebSocket here: its Origin is not this server's."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Upstream: opening connections, and keeping idle ones for the next request
# ---------------------------------------------------------------------------------------------------------------------

Address = Tuple[str, int]


class Upstreams:
    """The connections to upstreams.

    listening: our own addresses; a connection that would reach one of them is refused: it could go round for ever.
    """

    def __init__(self, config: Config, watch: Watch, listening: Sequence[Address]) -> None:
        self.config = config
        self.watch = watch
        self.listening = listening
        self._idle: Dict[Address, List[Tuple[Stream, float]]] = {}
        self._idle_count = 0

    def take(self, route: Route, replayable: bool) -> Optional[Stream]:
        """An idle connection to the route's target that is fit for use, or None.

        An upstream may close one at the moment we use it.  Only a replayable request may be sent again then; for the
        others nothing older than a second is used, which no server is known to close.
        """
        idle = self._idle.get((route.host, route.port))
        if not idle or not (replayable or self.watch.loop.time() - idle[-1][1] < 1.0):
            return None
        stream = idle[-1][0]
        self._discard(route, stream)
        stream.was_heard = False
        return stream

    def give(self, route: Route, stream: Stream) -> None:
        """Keep a connection whose exchange ended cleanly and exactly; the least sign of life from it ends that."""
        if not stream.is_fresh() or self._idle_count >= self.config.max_idle_upstreams:
            stream.close()
            return
        now = self.watch.loop.time()
        self._idle.setdefault((route.host, route.port), []).append((stream, now))
        self._idle_count += 1
        stream.read_deadline = now + self.config.idle_upstream_timeout

        def drop() -> None:
            self._discard(route, stream)
            stream.abort()

        stream.reader.on_data = stream.reader.on_end = drop

    def close(self) -> None:
        """Close all idle connections."""
        for idle in list(self._idle.values()):
            for stream, _ in list(idle):
                stream.reader.on_data = stream.reader.on_end = None
                stream.abort()
        self._idle.clear()
        self._idle_count = 0

    def _discard(self, route: Route, stream: Stream) -> None:
        """Take a connection out of the pool; it need not be closed for that."""
        stream.reader.on_data = stream.reader.on_end = None
        stream.read_deadline = FOREVER
        key = (route.host, route.port)
        left = [entry for entry in self._idle.get(key, ()) if entry[0] is not stream]
        self._idle_count -= len(self._idle.get(key, ())) - len(left)
        if left:
            self._idle[key] = left
        else:
            self._idle.pop(key, None)

    async def connect(self, route: Route) -> Stream:
        """A new connection to the route's target; ProxyError 502, 503, 504 or 508 if there is none to be had."""
        try:
            return await asyncio.wait_for(self._connect_any(route), self.config.connect_timeout)
        except asyncio.TimeoutError:
            raise _no_answer_in_time(route, self.config)
        except socket.gaierror:
            raise ProxyError(
                502, "The host %s could not be found. Check its spelling, or this machine's name service." % route.host
            )
        except ConnectionRefusedError:
            raise ProxyError(502, "Nothing listens on %s. Is the app running, and is this its port?" % route.place)
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
                return await self._connect_one(address)
            except OSError as error:
                failures.append(error)
        failures.sort(key=lambda error: not isinstance(error, ConnectionRefusedError))
        raise failures[0]

    async def _addresses(self, route: Route) -> List[Address]:
        if route.host == "localhost":
            return [("127.0.0.1", route.port), ("::1", route.port)]
        found = await self.watch.loop.getaddrinfo(route.host, route.port, type=socket.SOCK_STREAM)
        return [info[4][:2] for info in found]  # type: ignore[misc]

    async def _connect_one(self, address: Address) -> Stream:
        loop = self.watch.loop
        _, protocol = await loop.create_connection(lambda: StreamProtocol(self.watch), *address)
        stream = protocol.stream
        assert stream is not None
        here, there = stream.transport.get_extra_info("sockname"), stream.transport.get_extra_info("peername")
        if here[:2] == there[:2]:  # TCP lets a socket connect to itself where nobody listens
            stream.abort()
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
        if any(_reaches(here, there, own) for own in self.listening):
            stream.abort()
            raise ProxyError(508, "Port %d is the proxy's own: the request would go round for ever." % there[1])
        return stream


def _reaches(here: Tuple[Any, ...], there: Tuple[Any, ...], listening: Address) -> bool:
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
# Pages: what people see
# ---------------------------------------------------------------------------------------------------------------------

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:46em;margin:3em auto;padding:0 1em}"
    "h1{font-size:1.4em}code{font-family:ui-monospace,monospace}td,th{text-align:left;padding:.2em 1.5em .2em 0;"
    "vertical-align:top}p.status{color:GrayText}"
)
_SECURITY_POLICY = (
    "default-src 'none'; style-src 'sha256-%s'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    % (base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode())
)
_PAGE = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>{title}</title><style>{style}</style></head>\n<body>{body}</body></html>\n"
)
_FORMS = (
    ("/8080/", "port 8080 of this machine; the app sees the path behind the port"),
    ("/absolute/8080/", "the same for an app that is told to live under this whole path"),
    ("/db1.example.org:8080/", "port 8080 of a host that --host-allowlist allows"),
    ("/absolute/db1.example.org:8080/", "the same for an app that is told to live under this whole path"),
)


class Response(NamedTuple):
    """An answer of our own, whole."""

    status: int
    fields: Fields
    body: bytes


def wants_html(head: Optional[RequestHead]) -> bool:
    """Whether a person looks at the answer: a browser's navigation, not a program and not a page's script."""
    if head is None or head.method not in ("GET", "HEAD", "POST"):
        return False
    mode = field_values(head.fields, "sec-fetch-mode")
    accepts = any("text/html" in value.lower() for value in field_values(head.fields, "accept"))
    return accepts and mode in ([], ["navigate"])


def error_response(error: ProxyError, as_html: bool) -> Response:
    """The answer that says what was wrong; no byte of the request is in it but a checked host or port."""
    phrase = reason_phrase(error.status)
    fields = error.fields + (("Cache-Control", "no-store"),)
    if not as_html:
        return _response(error.status, "text/plain", "%d %s\n%s\n" % (error.status, phrase, error.detail), fields)
    body = '<h1>{}</h1><p>{}</p><p class="status">{} &middot; port_proxy</p>'
    return _page(
        error.status, phrase, body.format(*map(html.escape, (phrase, error.detail, str(error.status)))), fields
    )


def forms_response(base: str, as_html: bool) -> Response:
    """The page at the base, which explains the forms."""
    if not as_html:
        lines = "".join("%-40s %s\n" % (base + form, meaning) for form, meaning in _FORMS)
        return _response(200, "text/plain", "port_proxy: every port of this machine through this one\n\n" + lines)
    rows = "".join(
        "<tr><td><code>%s</code></td><td>%s</td></tr>" % (html.escape(base + form), html.escape(meaning))
        for form, meaning in _FORMS
    )
    title = "Every port of this machine, through this one"
    body = "<h1>%s</h1><p>Put the port of an app into the address:</p><table>%s</table>" % (title, rows)
    return _page(200, title, body)


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


def _page(status: int, title: str, body: str, fields: Fields = ()) -> Response:
    text = _PAGE.format(title=html.escape(title), style=_STYLE, body=body)
    return _response(status, "text/html", text, fields + (("Content-Security-Policy", _SECURITY_POLICY),))


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
# Exchange: one request's whole way, and the tunnel behind a 101
# ---------------------------------------------------------------------------------------------------------------------

_IDEMPOTENT = frozenset("GET HEAD OPTIONS TRACE PUT DELETE PROPFIND REPORT SEARCH".split())  # RFC 9110 section 9.2.2


class Surroundings(NamedTuple):
    """What all exchanges of one proxy share; `stopping` is set once it has been told to stop."""

    config: Config
    watch: Watch
    upstreams: Upstreams
    stopping: asyncio.Event


class Exchange:
    """One request of a client, from its head to the last byte of its answer.

    answered: a final head has gone out, and all that is left on a failure is to cut the answer short.  keep_alive: the
    client's connection stands right behind the request and its answer, and may carry the next.  place, status and sent
    (bytes of the answer's body) are for the log.
    """

    def __init__(self, client: Stream, head: RequestHead, around: Surroundings) -> None:
        self.client = client
        self.head = head
        self.around = around
        self.config = around.config
        self.framing = request_framing(head)
        self.body = Body(client, self.framing, self.config)
        self.visit = Visit(client.address, "http", head.authority)
        self.keep_alive = head.version == "1.1" and "close" not in field_tokens(head.fields, "connection")
        self.answered = False
        self.place = "-"
        self.status = 0
        self.sent = 0
        self.tunnel: Optional[Tunnel] = None
        self._answer_framing = NO_BODY
        self._sending: Optional["asyncio.Task[None]"] = None
        self._client_failure: Optional[Exception] = (
            None  # why the request cannot be finished, if that is the client's doing
        )

    async def run(self) -> None:
        """Serve the request; ProxyError if it is to be answered by us, ClientGone if there is nobody to answer."""
        base, head = self.config.base, self.head
        route = find_route(base, head.target) if head.target != "*" else None
        if route is not None:
            await self._serve(route)
        elif head.target == "*":
            await self.answer(Response(204, (("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),), b""))
        elif head.method in ("GET", "HEAD"):
            await self.answer(forms_response(base, wants_html(head)))
        else:
            raise ProxyError(405, "This page can only be read.", (("Allow", "GET, HEAD"),))

    async def answer(self, response: Response) -> None:
        """Send an answer of our own; a request body that was not read costs the connection."""
        if not self.body.finished:
            self.keep_alive = False
        head = ResponseHead(response.status, reason_phrase(response.status), "1.1", response.fields)
        body = b"" if self.head.method == "HEAD" else response.body
        await self._begin_answer(head, NO_BODY, body, len(body))

    def cut_short(self) -> None:
        """End an answer that cannot be finished, so that the client sees that it is incomplete."""
        if self._answer_framing.kind == UNTIL_CLOSE:
            self.client.reset()
        else:
            self.client.close()  # what was relayed still arrives; the length or the last chunk is missing

    async def _serve(self, route: Route) -> None:
        head = self.head
        self.place = route.authority
        check_access(head, route, self.framing, self.config)
        is_upgrade = is_websocket(head)
        if not route.path and not route.absolute and not is_upgrade and head.method in ("GET", "HEAD"):
            await self.answer(redirect_response(route.prefix + "/" + route.query))
        else:
            request = request_for_upstream(head, route, self.framing, self.visit, self.config.preserve_host, is_upgrade)
            await self._forward(route, serialise_request(request), is_upgrade)

    async def _forward(self, route: Route, request: bytes, is_upgrade: bool) -> None:
        """Send the request and relay its answer, on a pooled connection if there is one."""
        first = framed(self.body.at_hand(), self.framing, self.body.finished)
        replayable = self.head.method in _IDEMPOTENT and self.framing == NO_BODY
        upstream = self.around.upstreams.take(route, replayable)
        if upstream is not None and await self._exchange(route, upstream, request + first, is_upgrade, replayable):
            return
        upstream = await self.around.upstreams.connect(route)
        await self._exchange(route, upstream, request + first, is_upgrade, False)

    async def _exchange(
        self, route: Route, upstream: Stream, request: bytes, is_upgrade: bool, replayable: bool
    ) -> bool:
        """One request and its answer on one connection, which is pooled or closed afterwards.

        False, with nothing done, where the connection turned out to be stale and the request may be sent on another.
        """
        reusable = False
        self._notice_leaving(upstream)
        try:
            upstream.write(request)
            if not self.body.finished:
                self._sending = asyncio.ensure_future(self._send_rest(upstream))
            response = await self._read_final_head(route, upstream)
            if response.status == 101:
                await self._splice(route, upstream, response, is_upgrade)
            else:
                reusable = await self._relay(route, upstream, response)
        except (ProxyError, Truncated, Stalled, OSError) as error:
            if replayable and not upstream.was_heard and not self._client_failure and not isinstance(error, Stalled):
                return False
            raise self._client_failure or _upstream_failure(error, route, upstream, self.config)
        finally:
            self.client.reader.on_end = None
            await self._stop_sending()
            if reusable and self.body.finished:
                self.around.upstreams.give(route, upstream)
            else:
                upstream.abort()
        return True

    def _notice_leaving(self, upstream: Stream) -> None:
        """Close the upstream's connection as soon as the client ends its own.

        A client that had ended its side before its request was sent on, as `nc` does, is given its answer all the same.
        """

        def leave() -> None:
            self._client_failure = self._client_failure or ClientGone()
            upstream.abort()

        if not self.client.reader.ended:
            self.client.reader.on_end = leave

    async def _send_rest(self, upstream: Stream) -> None:
        """Send the rest of the request's body on as it comes, while the answer is already awaited."""
        try:
            while not self.body.finished:
                data = await self.body.read(self.config.stall_timeout)
                upstream.write(framed(data, self.framing, self.body.finished))
                try:
                    await upstream.flush(self.config.stall_timeout)
                except OSError:
                    return  # it takes no more; what it has to say is still heard
            if not self.answered:
                upstream.read_deadline = upstream.now() + self.config.response_timeout
        except (ProxyError, Truncated, Stalled, OSError) as error:
            if isinstance(error, Stalled):
                error = ProxyError(408, "The request's body stopped coming for %g seconds." % self.config.stall_timeout)
            self._client_failure = error if isinstance(error, ProxyError) else ClientGone()
            upstream.abort()

    async def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])

    def _is_sending(self) -> bool:
        return self._sending is not None and not self._sending.done()

    async def _read_final_head(self, route: Route, upstream: Stream) -> ResponseHead:
        """The upstream's final answer, or its 101; other interim answers are passed on as they come."""
        for _ in range(self.config.max_interim_responses + 1):
            deadline = FOREVER if self._is_sending() else upstream.now() + self.config.response_timeout
            response = parse_response(await read_head(upstream, False, deadline, self.config), self.config)
            if response.status == 101 or response.status >= 200:
                return response
            if self.head.version == "1.1":  # RFC 9110 section 15.2
                interim = response_for_client(response, route, NO_BODY, self.visit)
                await self._to_client(serialise_response(interim))
        raise ProxyError(502, "It sent more than %d interim responses." % self.config.max_interim_responses)

    async def _relay(self, route: Route, upstream: Stream, response: ResponseHead) -> bool:
        """Pass the answer on, piece by piece as it comes; whether the upstream's connection may be used again."""
        framing = response_framing(self.head.method, response)
        body = Body(upstream, framing, self.config)
        if framing.kind == CHUNKED or framing.kind == UNTIL_CLOSE:
            self._answer_framing = Framing(CHUNKED if self.head.version == "1.1" else UNTIL_CLOSE)
        else:
            self._answer_framing = framing
        data = body.at_hand()
        if self._is_sending():  # an early answer; the rest of the body may never be read
            self.keep_alive = False
        head = response_for_client(response, route, self._answer_framing, self.visit)
        await self._begin_answer(
            head, self._answer_framing, framed(data, self._answer_framing, body.finished), len(data)
        )
        while not body.finished:
            data = await body.read()
            await self._to_client(framed(data, self._answer_framing, body.finished), len(data))
        return response.version == "1.1" and "close" not in field_tokens(response.fields, "connection")

    async def _begin_answer(self, head: ResponseHead, framing: Framing, data: bytes, count: int) -> None:
        """Send the final head with the first bytes of the body."""
        self.keep_alive = self.keep_alive and framing.kind != UNTIL_CLOSE and not self.around.stopping.is_set()
        if not self.keep_alive and head.status != 101:
            head = head._replace(fields=head.fields + (("Connection", "close"),))
        self.answered = True
        self.status = head.status
        await self._to_client(serialise_response(head) + data, count)

    async def _to_client(self, data: bytes, count: int = 0) -> None:
        self.client.write(data)
        try:
            await self.client.flush(self.config.stall_timeout)
        except OSError:
            raise ClientGone()
        self.sent += count

    async def _splice(self, route: Route, upstream: Stream, response: ResponseHead, is_upgrade: bool) -> None:
        """Answer the client with the upstream's 101, then pass bytes both ways until both sides have ended."""
        switched = "upgrade" in field_tokens(response.fields, "connection")
        if not is_upgrade or not switched or "websocket" not in field_tokens(response.fields, "upgrade"):
            raise ProxyError(502, "It switched protocols (101) to something that was not asked for.")
        self.client.reader.on_end = None
        self.keep_alive = False
        await upstream.flush(self.config.stall_timeout)
        await self._begin_answer(response_for_client(response, route, NO_BODY, self.visit), NO_BODY, b"", 0)
        self.tunnel = Tunnel(self.client, upstream, self.config.stall_timeout)
        await self.tunnel.run()
        self.sent = self.tunnel.received_from(upstream)


def _upstream_failure(error: Exception, route: Route, upstream: Stream, config: Config) -> ProxyError:
    """What a failure of the upstream means for the client, in words."""
    if isinstance(error, ProxyError):
        return ProxyError(502, "What %s sent is not valid HTTP. %s" % (route.place, error.detail))
    if isinstance(error, Stalled):
        return ProxyError(504, "No answer came from %s within %g seconds." % (route.place, config.response_timeout))
    ended = "closed the connection" if isinstance(error, Truncated) else "broke the connection off"
    before = "in the middle of its answer" if upstream.was_heard else "without an answer"
    return ProxyError(502, "The app on %s %s %s." % (route.place, ended, before))


class Tunnel:
    """Two connections whose bytes go to each other, undecoded, until both sides have ended.

    A side that ends while the other goes on is passed on as such; a failure of one is the end of both.
    """

    def __init__(self, client: Stream, upstream: Stream, timeout: float) -> None:
        self.timeout = timeout
        self.client, self.upstream = TunnelEnd(client, self), TunnelEnd(upstream, self)
        self.client.other, self.upstream.other = self.upstream, self.client
        self.open = 2
        self.finished: "asyncio.Future[None]" = client.watch.loop.create_future()

    async def run(self) -> None:
        """Take both connections over, pass on what had already come, and wait for the end of both."""
        ends = (self.client, self.upstream)
        for end in ends:
            end.data_received(await end.stream.hand_over(end))
        for end in ends:
            if end.stream.reader.ended:
                end.eof_received()
        await self.finished

    def close(self) -> None:
        """End both sides, sending what is queued."""
        self.client.stream.close()
        self.upstream.stream.close()

    def received_from(self, stream: Stream) -> int:
        """How many bytes came from one of the two."""
        return (self.client if stream is self.client.stream else self.upstream).received


class TunnelEnd(asyncio.Protocol):
    """One side of a tunnel: what comes from it is written to the other, and its pace is the other's."""

    def __init__(self, stream: Stream, tunnel: Tunnel) -> None:
        self.stream = stream
        self.tunnel = tunnel
        self.other = self
        self.received = 0
        self.ended = False

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.other.stream.write(data)
        if self.other.ended:
            self.stream.write_deadline = self.stream.now() + self.tunnel.timeout

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
            self.other.stream.write_deadline = self.stream.now() + self.tunnel.timeout
        return self.stream.transport.can_write_eof()

    def connection_lost(self, exc: Optional[BaseException]) -> None:
        self.stream.watch.forget(self.stream)
        if exc is None:
            self.other.stream.close()
        else:
            self.other.stream.abort()
        self.tunnel.open -= 1
        if not self.tunnel.open and not self.tunnel.finished.done():
            self.tunnel.finished.set_result(None)


# ---------------------------------------------------------------------------------------------------------------------
# Server: accepting, the requests of a connection one after the other, errors into answers, the log, stopping
# ---------------------------------------------------------------------------------------------------------------------


class PortProxy:
    """The proxy itself: `await PortProxy(config).start()`, then `await proxy.close()`; several can live in one loop.

    Raises ValueError for a configuration that makes no sense; `start` raises OSError where the address cannot be had.
    Logs to the logger "port_proxy" and configures none.
    """

    def __init__(self, config: Config = Config()) -> None:
        self.config = checked_config(config)
        self._server: Optional[asyncio.AbstractServer] = None
        self._around: Optional[Surroundings] = None
        self._clients: Dict[Stream, Optional[Exchange]] = {}  # with the request that each one is at
        self._tasks: Set["asyncio.Task[None]"] = set()
        self._listening: List[Address] = []

    async def start(self) -> "PortProxy":
        """Listen; connections are accepted from now on."""
        loop = asyncio.get_event_loop()
        watch = Watch(loop, _watch_interval(self.config))
        upstreams = Upstreams(self.config, watch, self._listening)
        around = self._around = Surroundings(self.config, watch, upstreams, asyncio.Event())
        try:
            server = await loop.create_server(
                lambda: StreamProtocol(watch, lambda client: self._accepted(client, around)),
                self.config.bind,
                self.config.port,
                backlog=1024,
            )
        except BaseException:
            await watch.close(0)
            raise
        self._server = server
        self._listening.extend(sock.getsockname()[:2] for sock in server.sockets or ())
        return self

    @property
    def port(self) -> int:
        """The port that is listened on; 0 before `start`."""
        return self._listening[0][1] if self._listening else 0

    @property
    def url(self) -> str:
        """The address to open on this machine."""
        host = self.config.bind
        if host in ("", "0.0.0.0", "::"):
            host = socket.gethostname()
        return "http://%s:%d%s/" % ("[%s]" % host if ":" in host else host, self.port, self.config.base)

    async def close(self) -> None:
        """Stop accepting, close idle connections and tunnels, let running requests finish for `shutdown_timeout` s."""
        if self._server is None or self._around is None:
            return
        self._server.close()
        self._around.stopping.set()
        for client, exchange in list(self._clients.items()):
            if exchange is None:
                client.close()
            elif exchange.tunnel:
                exchange.tunnel.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.config.shutdown_timeout)
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._around.upstreams.close()
        await self._around.watch.close(1.0)
        self._server = self._around = None
        self._listening.clear()

    def cut(self) -> None:
        """Cut all running requests off; for whoever cannot wait for `close`, which then goes on at once."""
        for task in list(self._tasks):
            task.cancel()

    def _accepted(self, client: Stream, around: Surroundings) -> None:
        self._clients[client] = None
        task = asyncio.ensure_future(self._serve(client, around))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: Stream, around: Surroundings) -> None:
        """All requests of one client's connection, one after the other."""
        try:
            while not around.stopping.is_set() and await self._serve_next(client, around):
                pass
            client.close()
        except (ClientGone, Truncated, Stalled, OSError):
            client.abort()
        finally:
            if not client.transport.is_closing():  # cancelled
                client.abort()
            del self._clients[client]

    async def _serve_next(self, client: Stream, around: Surroundings) -> bool:
        """Read one request and answer it; whether the connection may carry another."""
        exchange = None
        started = client.now()
        try:
            raw = await self._read_request(client)
            if raw is None:
                return False
            started = client.now()
            exchange = self._clients[client] = Exchange(client, parse_request(raw, self.config), around)
            await exchange.run()
        except ProxyError as error:
            await self._answer_error(client, exchange, error)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:  # a mistake of ours; the request is lost, the proxy goes on
            logger.error("internal error: %r", error)
            logger.debug("", exc_info=True)
            await self._answer_error(client, exchange, ProxyError(500, "The proxy made a mistake. Its log says more."))
        finally:
            self._clients[client] = None
            if exchange is not None:
                self._log(client, exchange, client.now() - started)
        if exchange is None or not exchange.body.finished:
            await self._linger(client)
        return exchange is not None and exchange.keep_alive

    async def _read_request(self, client: Stream) -> Optional[bytes]:
        """The next request's head; None where the client ends, or stays silent for too long, between two requests."""
        try:
            if not client.buffer and not await client.more(client.now() + self.config.keep_alive_timeout):
                return None
        except Stalled:
            return None
        try:
            return await read_head(client, True, client.now() + self.config.head_timeout, self.config)
        except Stalled:
            raise ProxyError(408, "The request's head did not come whole within %g seconds." % self.config.head_timeout)
        except Truncated:
            raise ProxyError(400, "The request broke off before the end of its head.")

    async def _answer_error(self, client: Stream, exchange: Optional[Exchange], error: ProxyError) -> None:
        """The one place where an error becomes an answer, or the end of an answer that has begun."""
        logger.debug("%d: %s", error.status, error.detail)
        if exchange is None:
            response = error_response(error, False)
            fields = response.fields + (("Connection", "close"),)
            client.write(
                serialise_response(ResponseHead(error.status, reason_phrase(error.status), "1.1", fields))
                + response.body
            )
        elif exchange.answered:
            exchange.keep_alive = False
            exchange.cut_short()
        else:
            await exchange.answer(error_response(error, wants_html(exchange.head)))

    async def _linger(self, client: Stream) -> None:
        """Read on, and drop, what a client still sends behind an answer that ends the connection: closing at once would
        reset it and could take the answer from it (RFC 9112 section 9.6)."""
        client.end_writing()
        deadline = client.now() + self.config.linger_timeout
        while await client.more(deadline):
            client.buffer.clear()

    def _log(self, client: Stream, exchange: Exchange, duration: float) -> None:
        """One line per request; without the query, which may hold a secret."""
        path, mark, _ = exchange.head.target.partition("?")
        target = path + ("?..." if mark else "")
        outcome = (exchange.place, exchange.status or "gone", exchange.sent, duration)
        logger.info("%s %s %s -> %s %s, %d bytes, %.3f s", client.address, exchange.head.method, target, *outcome)


def checked_config(config: Config) -> Config:
    """`config` in normal form; ValueError, in words for a person, for what makes no sense."""
    if not 0 <= config.port <= 65535:
        raise ValueError("the port must be a number from 0 to 65535, not %d" % config.port)
    if isinstance(config.host_allowlist, str):
        raise ValueError("host_allowlist is a sequence of hosts or a callable, not a string")
    for name, default in zip(Config._fields, Config()):
        value = getattr(config, name)
        if type(default) in (int, float) and name != "port" and not value > 0:
            raise ValueError("%s must be greater than 0, not %r" % (name, value))
    allowlist = config.host_allowlist if callable(config.host_allowlist) else normal_allowlist(config.host_allowlist)
    return config._replace(base=normal_base(config.base), host_allowlist=allowlist)


def _watch_interval(config: Config) -> float:
    """Fine enough for the shortest deadline, and never more often than twenty times a second."""
    shortest = min(float(getattr(config, name)) for name in Config._fields if name.endswith("_timeout"))
    return min(1.0, max(0.05, shortest / 4))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

_EXAMPLES = """\
examples:
  %(prog)s                                     open http://localhost:8888/proxy/8080/ for port 8080
  %(prog)s --base /user/ana/proxy --port 9000  behind a server that passes /user/ana on
  %(prog)s --host-allowlist '*.example.org'    also /proxy/db1.example.org:8080/
from another machine:
  ssh -N -L 8888:localhost:8888 THIS_MACHINE   then open http://localhost:8888/proxy/ there
"""
# Field of Config, unit, and what it bounds; each becomes an option.
_LIMITS = (
    ("max_head_bytes", "BYTES", "longest head of a request or response"),
    ("max_target_bytes", "BYTES", "longest request target"),
    ("max_fields", "COUNT", "most fields in a head"),
    ("max_chunk_line_bytes", "BYTES", "longest first line of a chunk"),
    ("max_trailer_bytes", "BYTES", "longest trailers"),
    ("max_interim_responses", "COUNT", "most 1xx responses before the final one"),
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


def _parser() -> argparse.ArgumentParser:
    default = Config()
    parser = argparse.ArgumentParser(
        prog="port_proxy.py",
        description="Makes every port of this machine reachable through one HTTP port.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", default=default.base, metavar="PATH", help="path that everything lives under (default: %(default)s)")
    add(
        "--bind",
        default=default.bind,
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s, this machine alone)",
    )
    add(
        "--port",
        default=default.port,
        type=int,
        metavar="N",
        help="port to listen on, 0 for any free one (default: %(default)s)",
    )
    add(
        "--host-allowlist", action="append", default=[], metavar="HOST",
        help="host that may be reached besides this machine's loopback names: a name, an address or a glob such as"
        " '*.example.org'; repeatable, or several with commas between",
    )  # fmt: skip
    add(
        "--preserve-host",
        action="store_true",
        help="pass the browser's Host on instead of the app's own localhost:PORT",
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--verbose", action="store_true", help="log a line for every request")
    volume.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add("--version", action="version", version="port_proxy " + __version__)
    limits = parser.add_argument_group("limits and timeouts")
    for name, unit, meaning in _LIMITS:
        value = getattr(default, name)
        option = "--" + name.replace("_", "-")
        limits.add_argument(
            option, type=type(value), default=value, metavar=unit, help=meaning + " (default: %(default)g)"
        )
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    hosts = [host.strip() for entry in arguments.host_allowlist for host in entry.split(",")]
    options = {name: getattr(arguments, name) for name in Config._fields if name != "host_allowlist"}
    return Config(host_allowlist=tuple(hosts), **options)


def _banner(proxy: PortProxy) -> str:
    hosts = proxy.config.host_allowlist
    others = "" if callable(hosts) or not hosts else ", and on " + ", ".join(hosts)
    text = "port_proxy %s: open %s\n" % (__version__, proxy.url)
    text += "It reaches every port of this machine as %s<port>/%s." % (proxy.url, others)
    if not is_loopback(proxy.config.bind):
        text += "\nAnybody who can reach %s can use it." % proxy.config.bind
    return text


def is_loopback(address: str) -> bool:
    """Whether an address to listen on is this machine's alone."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


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
        except NotImplementedError:  # Windows: KeyboardInterrupt ends run_until_complete
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
    try:
        await proxy.start()
    except OSError as error:
        sys.stderr.write("port_proxy: %s\n" % _why_not_listening(error, config))
        return 2
    if not quiet:
        print(_banner(proxy), flush=True)
    await stop.wait()
    await proxy.close()
    return 0


def _why_not_listening(error: OSError, config: Config) -> str:
    where = "port %d of %s" % (config.port, config.bind)
    if error.errno == errno.EADDRINUSE:
        return "%s is in use by another program; choose another with --port, or --port 0 for any free one" % where
    if error.errno == errno.EACCES:
        return "%s may not be used without further rights; choose one above 1023 with --port" % where
    if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, None):  # None: asyncio from 3.13 on
        return "%s is no address of this machine; see --bind" % config.bind
    return "cannot listen on %s: %s" % (where, os.strerror(error.errno) if error.errno else error)


class _LoopComplaints:
    """What the event loop has to say, in one line and not too often: it goes on by itself."""

    def __init__(self) -> None:
        self.silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Dict[str, Any]) -> None:
        if loop.time() >= self.silent_until:
            self.silent_until = loop.time() + 10
            error = context.get("exception")
            logger.warning("%s%s", context.get("message"), ": %s" % error if error else "")


def _raise_descriptor_limit() -> None:
    """Allow as many connections as the system lets us have without asking for more."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the proxy as the command line says; the exit status: 0 when it was told to stop, 2 for a mistake of usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        config = checked_config(_config(arguments))
    except ValueError as error:
        parser.error(str(error))
    level = logging.INFO if arguments.verbose else logging.ERROR if arguments.quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s")
    _raise_descriptor_limit()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_LoopComplaints())
    try:
        return loop.run_until_complete(_run(config, arguments.quiet))
    except KeyboardInterrupt:
        return 0
    finally:
        loop.close()


if __name__ == "__main__":
    sys.exit(main())
