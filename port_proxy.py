#!/usr/bin/env python3
"""port_proxy: every port of a machine, reachable through one HTTP port.

Run ``python3 port_proxy.py`` and open ``http://localhost:8888/proxy/8080/``: it shows the app that
listens on port 8080 of this machine.  It needs CPython 3.6 or newer and the standard library.

    <base>/<port>/path?q                    /path?q at localhost:<port>; the prefix is stripped
    <base>/absolute/<port>/path?q           the full path at localhost:<port>; the prefix is kept
    <base>/<host>:<port>/path?q             as the first, on a host of the allowlist
    <base>/absolute/<host>:<port>/path?q    as the second, on a host of the allowlist
    http://<port>.localhost:8888/path?q     /path?q at localhost:<port>, an origin of its own

The way of a request.  Every request takes the same one; each client connection has one coroutine.

    accept -> read_head -> parse_request -> Gate.authorize -> Upstreams.take or connect
           -> request_for_upstream -> [a second task sends the request body meanwhile]
           -> read_head -> parse_response -> response_lines -> relay the body -> next request
    after a 101: a Tunnel splices both transports, and the coroutine ends

What always holds.  A message is framed once, strictly; what does not match the grammar is refused
and never repaired.  Bodies are never held: bytes go on as they come, with back-pressure both ways.
An error is raised where it is found and answered in one place; once a response head has gone out,
an error cuts the response short, so that it never looks whole.  Access is decided before any
upstream is touched.  No credential of ours reaches an app.

Sections, each using only names above it: errors, configuration, routes, messages, bodies,
connections, header rewriting, unprefixed requests, local sockets, pages, upstreams, access control,
jupyterhub, exchange, server, jupyter extension, port check, command line.

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
    Dict,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)
from urllib.parse import parse_qsl, quote, unquote, unquote_to_bytes, urlencode, urljoin, urlsplit

__version__ = "0.1.0"
__all__ = ["Config", "PortProxy", "ProxyError", "main"]

logger = logging.getLogger("port_proxy")

Fields = Tuple[Tuple[str, str], ...]  # (name, value) pairs in order; text is latin-1, a byte each
Address = Tuple[str, int]
FOREVER = float("inf")
now = time.monotonic  # the clock of all deadlines, in seconds


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------
# They are raised where they are found.  `PortProxy` turns each into a response, in one place.


class ProxyError(Exception):
    """A request that the proxy answers itself, because it refuses it or cannot serve it.

    status: the HTTP status code.  detail: sentences for the person who reads the response (plain
    text, escaped where it is shown).  fields: further (name, value) pairs of the response head.
    Raises ValueError for a field that cannot stand in a head, such as a value with a line break.
    """

    def __init__(self, status: int, detail: str, fields: Fields = ()) -> None:
        super().__init__(status, detail)
        for name, value in fields:
            if not _OWN_FIELD.fullmatch("%s:%s" % (name, value)):
                raise ValueError("the field %s cannot stand in a message head" % ascii(name))
        self.status = status
        self.detail = detail
        self.fields = fields


_OWN_FIELD = re.compile("[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")  # RFC 9110 section 5.5


class ClientGone(Exception):
    """The client has left, or takes no more bytes: there is nobody to answer."""


class Truncated(Exception):
    """A connection ended in the middle of a message."""


class TimedOut(Exception):
    """A deadline has passed."""


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------
# Every limit and timeout, once, with its reason.


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
    cookie_options: Tuple[
        Tuple[str, str], ...
    ] = ()  # further attributes of cookies; "" for one without a value


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
    domains: Sequence[str] = (
        "localhost",
    )  # where the host is <port>.<domain>, it names the port; not under a Hub
    # Whether every path of our origin is ours, so that what leaves an app's prefix (/static/app.js) can be led back to
    # it, and our cookies may be sent to all paths.  None: where base is the default or the root, and no proxy in front.
    whole_origin: Optional[bool] = None

    # Who may come in.  token: None asks for none where only this machine's users can connect, and makes a random one
    # elsewhere; "any" makes one everywhere; "" never asks for one.
    token: Optional[str] = None
    allow_hostnames: Sequence[
        str
    ] = ()  # further names that a proxy without a token answers to: exact, globs, "*"
    allow_origins: Sequence[
        str
    ] = ()  # further origins whose pages may use it: "https://a.example.org", "*"
    allow_preflight: bool = False  # let CORS preflights, which carry no credentials, reach the apps
    # Instead of all that: `await authorize(head, visit, route)`, asked once per request and Upgrade before anything is
    # connected; it admits by returning, refuses by raising ProxyError(status, detail), and redirects by raising
    # ProxyError(302, "", (("Location", url),)).  `route` is None for the proxy's own page.
    authorize: Optional[Callable[..., Awaitable[None]]] = None
    hub: Optional[Hub] = (
        None  # instead of all that too: sign-in by the JupyterHub that started this server
    )
    trusted_proxies: Sequence[
        str
    ] = ()  # addresses or networks whose X-Forwarded fields are believed, or "unix"
    certfile: Optional[str] = None  # PEM, serves HTTPS; with the key in it, or in keyfile
    keyfile: Optional[str] = None
    client_ca: Optional[str] = (
        None  # PEM: only clients with a certificate that one of these signed may connect
    )
    upstream_tls: Sequence[str] = ()  # "PORT" or "HOST:PORT" of upstreams that speak TLS
    insecure_upstream: bool = False  # do not verify the certificates of those on this machine
    any_owner: bool = (
        False  # also reach ports of this machine on which another ordinary user listens
    )

    max_connections: int = 8192  # of clients; an idle one makes room for a new one
    max_tunnels: int = 6144  # WebSockets, so that requests have room beside them
    max_head_bytes: int = 65536  # cookies of a whole hub fit; Node allows 16 KiB, nginx 32 KiB
    max_target_bytes: int = 16384  # OAuth and notebook URLs fit; nginx and Apache allow 8 KiB
    max_fields: int = 200  # Apache allows 100
    max_chunk_line_bytes: int = 4096  # 15 digits and any sensible extension
    max_trailer_bytes: int = 16384  # trailers are read only to be dropped
    max_interim_responses: int = 32  # 1xx heads before the final one; a server sends one or two

    head_timeout: float = 30.0  # from a head's first byte to its last, however slowly they drip
    keep_alive_timeout: float = (
        120.0  # a client's connection between requests; browsers close sooner
    )
    connect_timeout: float = 10.0  # all addresses of a host together
    response_timeout: float = (
        3600.0  # from the request's last byte to the response's head; models think for long
    )
    stall_timeout: float = (
        3600.0  # a client that neither sends its body on nor takes the response's
    )
    linger_timeout: float = (
        5.0  # reading on behind an early answer, so that the client gets to see it
    )
    shutdown_timeout: float = 5.0  # for requests that run when the proxy is told to stop

    max_idle_upstreams: int = (
        1024  # pooled connections to all upstreams together; as many as were used at once
    )
    idle_upstream_timeout: float = (
        4.0  # below the 5 s of Node and uvicorn, which close without warning
    )


# --------------------------------------------------------------------------------------------------
# Routes
# --------------------------------------------------------------------------------------------------
# A route says where requests with a certain prefix go.  It is found in the raw request target, which
# is never decoded and encoded again: path and query reach the app byte for byte.  Routes depend on
# nothing but the prefix, so they are made once and kept.

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_UNSPECIFIED = ("0.0.0.0", "::")  # some apps call themselves by the address they listen on
_BASE = re.compile(r"(?:/[A-Za-z0-9\-._~!$&'()*+,=:@%]+)*")  # a ";" would end the Path of a cookie
_BELOW_BASE = re.compile(r"(/absolute)?/([^/?]*)(/[^?]*)?(\?.*)?")
_UPSTREAM = re.compile(
    r"(?:(?:([A-Za-z0-9_][A-Za-z0-9_.\-]{0,252})|\[([0-9A-Fa-f:.]{2,45})\]):)?([1-9][0-9]{0,4})"
)
_NAME_PATTERN = re.compile(r"[a-z0-9_.*?\-]+")  # of the allowlist; the next is for IPv6
_ADDRESS_PATTERN = re.compile(r"[0-9a-f.*?]*:[0-9a-f.*?]*[:*?][0-9a-f:.*?]*")
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9\-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9\-]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"[1-9][0-9]{0,4}")
_UP = re.compile(r"(?:\.|%2e){2}", re.IGNORECASE)
_HERE = re.compile(r"(?:\.|%2e)", re.IGNORECASE)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_PREFIX_FIELDS = ("X-Forwarded-Prefix", "X-Forwarded-Context", "X-ProxyContextPath")


class Route(NamedTuple):
    """Where requests with a certain prefix go.

    host: as the client wrote it, in lower case and without brackets; "localhost" if it wrote none.
    prefix: the part of the target in front of the app's own path, as the client wrote it; "" if the
    host names the port.  absolute: the upstream receives the prefix, too.  scheme: "http" or
    "https", as the upstream expects.  authority: host:port for a Host field.  homes: the authorities
    by which the app may call itself, in lower case.  prefix_lines: header lines that tell the app
    its stripped prefix.
    """

    host: str
    port: int
    prefix: str
    absolute: bool
    scheme: str
    authority: str
    homes: FrozenSet[str]
    prefix_lines: Tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether the route leads to this machine's loopback interface."""
        return self.host in LOOPBACK_NAMES

    @property
    def place(self) -> str:
        """The upstream in words."""
        return "port %d of %s" % (self.port, "this machine" if self.is_local else self.host)


def find_route(
    base: str, target: str, upstream_tls: Sequence[str] = ()
) -> Tuple[Optional[Route], str, str]:
    """The route that a target in origin form names below `base`, and the raw path and query behind.

    The route is None for the base itself.  The path is "" if the slash behind the port is missing;
    the query has its "?".  Raises ProxyError 404 if the target names no port, 400 if its dot
    segments lead out of the app.
    """
    rest = path_below(base, target)
    match = _BELOW_BASE.fullmatch(rest) if rest else None
    if match is None:
        if rest is not None and rest[:1] in ("", "?"):
            return None, "", rest
        raise ProxyError(404, "No port is named here. " + forms(base))
    absolute, upstream, path, query = match.groups("")
    if not upstream and not path and not absolute:
        return None, "/", query
    prefix = target[: -len(path + query)] if path or query else target
    route = _make_route(base, prefix, upstream, bool(absolute), upstream_tls)
    if ("/." in path or "/%" in path) and _leads_out(path):
        raise ProxyError(400, "The dot segments of this path lead out of the app.")
    return route, path, query


@functools.lru_cache(maxsize=1024)
def _make_route(
    base: str, prefix: str, upstream: str, absolute: bool, upstream_tls: Sequence[str]
) -> Route:
    """The route to `upstream`, such as "8080" or "[::1]:8080"; ProxyError 400 or 404."""
    match = _UPSTREAM.fullmatch(upstream)
    if not match:
        raise ProxyError(404, "No port is named here. " + forms(base))
    name, literal, port = match.groups()
    if int(port) > 65535:
        raise ProxyError(404, "There is no port %s; the highest is 65535." % port)
    if literal and not _is_ipv6(literal):
        raise ProxyError(400, "The text in brackets is not an IPv6 address.")
    host = (name or literal or "localhost").lower()
    authority = authority_of(host, int(port))
    is_local = host in LOOPBACK_NAMES
    is_tls = authority in upstream_tls or (is_local and port in upstream_tls)
    hosts = LOOPBACK_NAMES + _UNSPECIFIED + (socket.gethostname().lower(),) if is_local else (host,)
    homes = {authority_of(one, int(port)) for one in hosts}
    lines = ["%s: %s" % (field, prefix) for field in _PREFIX_FIELDS if prefix and not absolute]
    scheme = "https" if is_tls else "http"
    return Route(
        host, int(port), prefix, absolute, scheme, authority, frozenset(homes), tuple(lines)
    )


def authority_of(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return "%s:%d" % ("[%s]" % host if ":" in host else host, port)


def route_to_port(port: int, upstream_tls: Sequence[str] = ()) -> Route:
    """The route to a local port that the host names: the whole target is the app's own."""
    return _make_route("", "", str(port), False, upstream_tls)


def port_in_host(authority: str, domains: Sequence[str]) -> int:
    """The port that a host such as 8080.localhost names, 0 if it names none."""
    if not authority[:1].isdigit():
        return 0
    port, _, domain = host_of(authority).partition(".")
    is_port = domain in domains and _PORT_NAME.fullmatch(port) and int(port) <= 65535
    return int(port) if is_port else 0


def host_of(authority: str) -> str:
    """The host in an authority, in lower case and without its port."""
    return re.sub(r":[0-9]*\Z", "", authority).lower()


def forms(base: str) -> str:
    """The forms of a path, in one sentence."""
    return (
        "The forms are {0}/<port>/, {0}/<host>:<port>/, {0}/absolute/<port>/ and"
        " {0}/absolute/<host>:<port>/."
    ).format(base)


def path_below(base: str, path: str) -> Optional[str]:
    """The part of `path`, which may have a query, behind `base`; None if it is not below.

    Segments are compared percent-decoded.
    """
    if path.startswith(base) and path[len(base) : len(base) + 1] in ("", "/", "?"):
        return path[len(base) :]
    path, mark, query = path.partition("?")
    segments = path.split("/")
    count = base.count("/") + 1
    written = [unquote_to_bytes(segment) for segment in segments[:count]]
    if written != [unquote_to_bytes(segment) for segment in base.split("/")]:
        return None
    return path[len("/".join(segments[:count])) :] + mark + query


def is_home(base: str, target: str) -> bool:
    """Whether a target is the base itself, with or without its slash."""
    return path_below(base, target.partition("?")[0]) in ("", "/")


def is_below(base: str, target: str) -> bool:
    """Whether a target is the base or below it."""
    return path_below(base, target.partition("?")[0]) is not None


def _leads_out(path: str) -> bool:
    """Whether dot segments lead above the start of `path` (RFC 3986 section 5.2.4)."""
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


def is_allowed(host: str, allowlist: Union[Sequence[str], Callable[[str], bool]]) -> bool:
    """Whether `host`, as written in lower case, may be reached; no name is looked up for this."""
    if callable(allowlist):
        return bool(allowlist(host))
    return host in LOOPBACK_NAMES or any(fnmatch.fnmatchcase(host, one) for one in allowlist)


def normal_base(base: str) -> str:
    """`base` without its last slash, "" for the root; ValueError if it is not a plain path."""
    path = base[:-1] if base.endswith("/") else base
    dots = any(_UP.fullmatch(part) or _HERE.fullmatch(part) for part in path.split("/"))
    if not _BASE.fullmatch(path) or dots:
        raise ValueError("the base must be a path such as /proxy or /user/ana/proxy, not %r" % base)
    return path


def normal_allowlist(patterns: Iterable[str]) -> Tuple[str, ...]:
    """Patterns in lower case without brackets; ValueError for one that can never match a host."""
    normal = []
    for given in patterns:
        pattern = (given[1:-1] if given[:1] + given[-1:] == "[]" else given).lower()
        if not _NAME_PATTERN.fullmatch(pattern) and not _ADDRESS_PATTERN.fullmatch(pattern):
            text = "an allowed host is a name, an address or a glob such as *.example.org, not %r"
            raise ValueError(text % given)
        normal.append(pattern)
    return tuple(normal)


def is_domain(name: str) -> bool:
    """Whether a name in lower case can be a domain; browsers take one that ends in digits for an
    address."""
    return bool(_DOMAIN.fullmatch(name)) and not name.rpartition(".")[2].isdigit()


def normal_domain(domain: str) -> str:
    """A domain in lower case; ValueError if it is none."""
    if not is_domain(domain.lower()):
        raise ValueError("a domain is a name such as apps.example.org, not %r" % domain)
    return domain.lower()


# --------------------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------------------
# The grammar of RFC 9112 sections 2 to 6.  A head is looked at once.  Parsing makes one immutable
# record with everything that later steps ask for: the header lines and their index, the framing of
# the body, the client, the route, and a few flags.
#
# Heads are decoded as latin-1: one character per byte, both ways.  Character classes are spelt out,
# because \d, \s and \w also match non-ASCII text.  No pattern can match the same text in two ways,
# so none can be made slow.

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
# Browsers send "|", "{", "^" and others raw in a target, against RFC 3986.
_REQUEST_LINE = re.compile(r"(%s) ([!\"$-~]+) HTTP/([0-9])\.([0-9])\r\n" % TOKEN)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?\r\n")
_FIELD_LINE = re.compile(r"%s:[\t -~\x80-\xff]*" % TOKEN)
# Finds the name of each valid line of a field section in lower case.  A line that is not valid is
# not found: the number of names then differs from the number of lines.
_FIELD_NAMES = re.compile(r"^([!#$%&'*+\-.^_`|~0-9a-z]+):[\t -~\x80-\xff]*\r$", re.MULTILINE)
_ABSOLUTE_FORM = re.compile(r"(?:http|https)://([^/?]*)(/[^?]*)?(\?.*)?", re.IGNORECASE)
# RFC 3986 section 3.2.2, without user information and IPvFuture.
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_HTTP_URL = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE)
_PORT = re.compile(r":([0-9]+)\Z")
# Never valid, wherever a head breaks off: control bytes, and CR or LF outside CRLF.
_ILLEGAL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")
_LENGTH = re.compile("[0-9]{1,18}")
_LENGTH_LIST = re.compile(r"[0-9]{1,18}(?:[ \t]*,[ \t]*[0-9]{1,18})*")
_IDEMPOTENT = frozenset("GET HEAD OPTIONS TRACE PUT DELETE PROPFIND REPORT SEARCH".split())
_NO_TOKENS = frozenset()  # type: FrozenSet[str]
_USUAL_TOKENS = {one: frozenset([one]) for one in ("close", "keep-alive", "upgrade")}


class Headers:
    """The field lines of a head, in order, with an index.

    keys: the field names in lower case.  lines: the lines as they came, "Name: value".  index: the
    line of each name, the last one if a field is repeated.
    """

    __slots__ = ("index", "keys", "lines")

    def __init__(self, keys: List[str], lines: List[str]) -> None:
        self.keys = keys
        self.lines = lines
        self.index = dict(zip(keys, lines))

    @classmethod
    def parse(cls, section: str, config: Config) -> "Headers":
        """Parse a field section up to its empty line (RFC 9112 section 5); ProxyError 400 or 431."""
        keys = _FIELD_NAMES.findall(section.lower())
        if len(keys) != section.count("\n") - 1:
            raise ProxyError(400, _explain_field_section(section))
        if len(keys) > config.max_fields:
            text = "The message head has more than %d fields." % config.max_fields
            raise ProxyError(431, text)
        return cls(keys, section.split("\r\n")[:-2])

    def get(self, name: str) -> str:
        """The last value of the field `name` (lower case), "" if it is missing."""
        line = self.index.get(name)
        return "" if line is None else line[len(name) + 1 :].strip(" \t")

    def get_all(self, name: str) -> List[str]:
        """All values of the field `name` (lower case), in order."""
        line = self.index.get(name)
        if line is None:
            return []
        start = len(name) + 1
        if len(self.index) == len(self.keys):
            return [line[start:].strip(" \t")]
        return [
            line[start:].strip(" \t") for key, line in zip(self.keys, self.lines) if key == name
        ]

    def tokens(self, name: str) -> FrozenSet[str]:
        """The members of the list-valued field `name` (lower case), in lower case."""
        if name not in self.index:
            return _NO_TOKENS
        value = ",".join(self.get_all(name)).lower()
        return _USUAL_TOKENS.get(value) or frozenset([one.strip(" \t") for one in value.split(",")])

    def pairs(self) -> Fields:
        """All fields as (name, value) pairs."""
        split = (line.partition(":") for line in self.lines)
        return tuple((name, value.strip(" \t")) for name, _, value in split)


def _explain_field_section(section: str) -> str:
    for line in section.split("\r\n"):
        if line and not _FIELD_LINE.fullmatch(line):
            if line[0] in " \t":
                return "A field line is folded or begins with white space (RFC 9112 section 5.2)."
            if re.match(TOKEN + "[ \t]+:", line):
                return "A field line has white space before its colon (RFC 9112 section 5.1)."
            break
    return "A field line is not 'name: value' without control bytes (RFC 9112 section 5)."


class Framing(NamedTuple):
    """How a body ends: "none", "length", "chunked" or "close"; `length` counts for "length"."""

    kind: str
    length: int = 0


NO_BODY = Framing("none")
CHUNKED = Framing("chunked")
UNTIL_CLOSE = Framing("close")


def request_framing(headers: Headers, minor: str) -> Framing:
    """How a request body ends (RFC 9112 section 6.3); ProxyError 400 or 501 on any doubt."""
    return _declared_framing(headers, minor) or NO_BODY


def response_framing(headers: Headers, minor: str, status: int, method: str) -> Framing:
    """How the body of a response to `method` ends (RFC 9112 section 6.3); ProxyError 400 or 501."""
    declared = _declared_framing(headers, minor)
    if method == "HEAD" or status < 200 or status in (204, 304):
        return NO_BODY
    return declared or UNTIL_CLOSE


def _declared_framing(headers: Headers, minor: str) -> Optional[Framing]:
    if "transfer-encoding" in headers.index:
        if "content-length" in headers.index:
            raise ProxyError(400, "The message has both Transfer-Encoding and Content-Length.")
        if minor == "0":
            raise ProxyError(400, "An HTTP/1.0 message cannot have Transfer-Encoding.")
        codings = headers.get_all("transfer-encoding")
        if len(codings) > 1:
            raise ProxyError(400, "The message has more than one Transfer-Encoding field.")
        if codings[0].lower() != "chunked":
            raise ProxyError(501, "The only transfer coding supported is 'chunked'.")
        return CHUNKED
    if "content-length" not in headers.index:
        return None
    lengths = headers.get_all("content-length")
    if len(lengths) == 1 and _LENGTH.fullmatch(lengths[0]):
        return Framing("length", int(lengths[0]))
    if not all(_LENGTH_LIST.fullmatch(value) for value in lengths):
        raise ProxyError(400, "Content-Length is not a number of at most 18 digits.")
    numbers = {number.strip(" \t") for number in ",".join(lengths).split(",")}
    if len(numbers) > 1:
        raise ProxyError(400, "The message has different values of Content-Length.")
    return Framing("length", int(numbers.pop()))


class ClientInfo(NamedTuple):
    """How the client sees the proxy, and what the app is told of the client.

    address: the client's, "" if it has none.  scheme, authority (host:port): of the origin that the
    client uses; the authority is "" if it sent none.  app_port: the port that the authority's host
    names, 0 if it is our own host.  lines: the X-Forwarded header lines.  home_lines: those that
    hide the public origin from the app.
    """

    address: str
    scheme: str
    authority: str
    app_port: int = 0
    lines: Tuple[str, ...] = ()
    home_lines: Tuple[str, ...] = ()


def client_info(
    headers: Headers, address: str, scheme: str, authority: str, config: Config
) -> ClientInfo:
    """The client of a request that came from `address`.

    X-Forwarded fields count only if they come from a trusted proxy.  The client then is the last
    address that is not a trusted proxy itself.
    """
    hops, port = [address] if address else [], ""
    if _is_trusted(address, config.trusted_proxies):
        before = [
            one.strip(" \t") for one in ",".join(headers.get_all("x-forwarded-for")).split(",")
        ]
        before = [] if before == [""] else before
        hops = before + hops
        while len(before) > 1 and _is_trusted(before[-1], config.trusted_proxies):
            before.pop()
        address = before[-1] if before else address
        proto = _nearest_value(headers, "x-forwarded-proto").lower()
        host = _nearest_value(headers, "x-forwarded-host")
        port = _nearest_value(headers, "x-forwarded-port")
        scheme = proto if proto in _DEFAULT_PORTS else scheme
        authority = host if is_authority(host) else authority
        port = port if re.fullmatch("[0-9]{1,5}", port) else ""
    return _make_client_info(address, scheme, authority, port, ", ".join(hops), config.domains)


@functools.lru_cache(maxsize=1024)
def _make_client_info(
    address: str, scheme: str, authority: str, port: str, hops: str, domains: Sequence[str]
) -> ClientInfo:
    home = ["X-Forwarded-For: " + hops] if hops else []
    home.append("X-Forwarded-Proto: " + scheme)
    public = []
    if authority:
        match = _PORT.search(authority)
        port = port or (match.group(1) if match else _DEFAULT_PORTS[scheme][1:])
        public = ["X-Forwarded-Host: " + authority, "X-Forwarded-Port: " + port]
    app_port = port_in_host(authority, domains)
    return ClientInfo(address, scheme, authority, app_port, tuple(home + public), tuple(home))


def _nearest_value(headers: Headers, name: str) -> str:
    """The first member of the last field called `name`: the statement of the nearest proxy that
    replaces the field, or of the outermost one where each appends to it."""
    return headers.get(name).partition(",")[0].strip(" \t")


def _is_trusted(address: str, trusted_proxies: Sequence[str]) -> bool:
    if not trusted_proxies:
        return False
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return not address and "unix" in trusted_proxies
    networks = (ipaddress.ip_network(one, False) for one in trusted_proxies if one != "unix")
    return any(known in network for network in networks)


class Request(NamedTuple):
    """A parsed, routed request.

    target: origin form or "*", raw.  path, query: the part of it behind the route's prefix.
    authority: host:port as the client wrote them, from the absolute form or else from Host.
    route: None for the proxy's own pages, and if routing failed with `route_error`.
    minor: of the HTTP version, "0" or "1".  connection: the tokens of the Connection field.
    keep_alive: the client may send another request.  is_replayable: the request may be sent again
    if its connection turns out to be stale.  is_navigation: a browser goes to this address, rather
    than a script or a program.  is_page_visit: a person wants to see a page.  is_own_origin: it has
    an Origin field, which names the origin that the client uses.  is_unprefixed: the client left
    the prefix out, and the route was found by other means.
    """

    method: str
    target: str
    authority: str
    minor: str
    headers: Headers
    connection: FrozenSet[str]
    framing: Framing
    client: ClientInfo
    route: Optional[Route]
    route_error: Optional[ProxyError]
    path: str
    query: str
    keep_alive: bool
    is_replayable: bool
    is_websocket: bool
    is_navigation: bool
    is_page_visit: bool
    is_own_origin: bool
    is_unprefixed: bool = False

    @property
    def fields(self) -> Fields:
        """All header fields as (name, value) pairs, for the `authorize` of an embedder."""
        return self.headers.pairs()


class Response(NamedTuple):
    """A parsed response head.  is_reusable: its connection can carry another request."""

    status: int
    reason: str
    headers: Headers
    connection: FrozenSet[str]
    framing: Framing
    is_reusable: bool


def parse_request(head: bytes, address: str, scheme: str, config: Config) -> Request:
    """Parse a request head, from its first byte to its empty line (RFC 9112 sections 3 to 6).

    address, scheme: of the connection.  Raises ProxyError 4xx, 501 or 505.
    """
    text = head.decode("latin-1")
    method, target, minor, end = parse_request_line(text, config)
    headers = Headers.parse(text[end:], config)
    hosts = headers.get_all("host")
    if len(hosts) > 1 or (minor == "1" and not hosts):
        text = "A request must have exactly one Host field; this one has %d." % len(hosts)
        raise ProxyError(400, text)
    authority = hosts[0] if hosts else ""
    if hosts and not is_authority(authority):
        raise ProxyError(400, "The Host field does not hold a valid host and port.")
    # RFC 6454 section 7.3.  The gate and the app must not look at different ones.
    if "origin" in headers.index and len(headers.get_all("origin")) > 1:
        raise ProxyError(400, "A request has at most one Origin field.")
    if method == "CONNECT":
        allow = (("Allow", "GET, HEAD, POST, OPTIONS"),)
        raise ProxyError(405, "CONNECT is refused: this is not a forward proxy.", allow)
    if target[0] != "/" and not (target == "*" and method == "OPTIONS"):
        authority, target = _parse_absolute_form(method, target)
    framing = request_framing(headers, minor)
    connection = headers.tokens("connection")
    client = client_info(headers, address, scheme, authority, config)
    route, path, query, route_error = _find_app(target, client, config)
    is_websocket = (
        "upgrade" in connection
        and method == "GET"
        and minor == "1"
        and [value.lower() for value in headers.get_all("upgrade")] == ["websocket"]
    )
    is_navigation = (
        headers.get("sec-fetch-mode") in ("", "navigate")
        and "text/html" in headers.get("accept").lower()
    )
    return Request(
        method,
        target,
        authority,
        minor,
        headers,
        connection,
        framing,
        client,
        route,
        route_error,
        path,
        query,
        keep_alive=minor == "1" and "close" not in connection,
        is_replayable=framing is NO_BODY and method in _IDEMPOTENT,  # RFC 9110 section 9.2.2
        is_websocket=is_websocket,  # RFC 6455 section 4.1; other upgrades, such as h2c, are ignored
        is_navigation=is_navigation,
        is_page_visit=is_navigation and method in ("GET", "HEAD") and not is_websocket,
        is_own_origin="origin" in headers.index
        and is_own_origin(headers.get("origin"), client.authority),
    )


def _find_app(
    target: str, client: ClientInfo, config: Config
) -> Tuple[Optional[Route], str, str, Optional[ProxyError]]:
    """Route, path, query, and the error if there is no route; the host counts before the path."""
    if target == "*":
        return None, "", "", None
    if client.app_port:
        path, mark, query = target.partition("?")
        return route_to_port(client.app_port, config.upstream_tls), path, mark + query, None
    try:
        return find_route(config.base, target, config.upstream_tls) + (None,)
    except ProxyError as error:  # the gate has its say first
        return None, "", "", error


def parse_request_line(text: str, config: Config) -> Tuple[str, str, str, int]:
    """Method, target, minor version and the end of the line; ProxyError 400, 414 or 505."""
    match = _REQUEST_LINE.match(text)
    if not match:
        text = "The request line is not 'METHOD TARGET HTTP/1.1' with single spaces and a target"
        raise ProxyError(400, text + " in ASCII.")
    method, target, major, minor = match.groups()
    if major != "1" or minor not in "01":
        raise ProxyError(505, "Only HTTP/1.0 and HTTP/1.1 are supported.")
    if len(target) > config.max_target_bytes:
        text = "The request target is longer than %d bytes." % config.max_target_bytes
        raise ProxyError(414, text)
    return method, target, minor, match.end()


def _parse_absolute_form(method: str, target: str) -> Tuple[str, str]:
    """Authority and origin form; the authority overrides Host (RFC 9112 section 3.2.2)."""
    match = _ABSOLUTE_FORM.fullmatch(target)
    if not match or not is_authority(match.group(1)):
        raise ProxyError(400, "The request target is neither a path nor an http URL.")
    authority, path, query = match.groups()
    if method == "OPTIONS" and not path and not query:
        return authority, "*"  # RFC 9112 section 3.2.4
    return authority, (path or "/") + (query or "")


def parse_response(head: bytes, method: str, config: Config) -> Response:
    """Parse the head of a response to `method` (RFC 9112 sections 4 to 6); ProxyError 4xx or 501."""
    text = head.decode("latin-1")
    match = _STATUS_LINE.match(text)
    if not match:
        raise ProxyError(400, "The status line is not one of HTTP/1.0 or HTTP/1.1.")
    minor, status, reason = match.groups()
    headers = Headers.parse(text[match.end() :], config)
    connection = headers.tokens("connection")
    framing = response_framing(headers, minor, int(status), method)
    is_reusable = minor == "1" and "close" not in connection
    return Response(int(status), reason or "", headers, connection, framing, is_reusable)


def check_partial_head(head: bytes, start: int, is_request: bool, config: Config) -> None:
    """Refuse the beginning of a head that is too long or can never become valid (ProxyError).

    start: the part before it was checked before.
    """
    if _ILLEGAL.search(head, start):
        raise ProxyError(400, "The message head has a control byte, or a CR or LF outside CRLF.")
    end = head.find(b"\r\n")
    if is_request:
        if end >= max(0, start - 1):  # the line has just become whole
            parse_request_line(head[: end + 2].decode("latin-1"), config)
        elif end < 0 and len(head) > config.max_target_bytes:
            text = "The request line is longer than %d bytes." % config.max_target_bytes
            raise ProxyError(414, text)
    elif not head.startswith(b"HTTP/"[: len(head)]):
        raise ProxyError(400, "It does not begin with HTTP/.")
    if len(head) > config.max_head_bytes:
        text = "The message head is longer than %d bytes." % config.max_head_bytes
        raise ProxyError(431, text)


def is_authority(text: str) -> bool:
    """Whether `text` is a valid host with or without a port, and without user information."""
    return bool(_AUTHORITY.fullmatch(text))


def is_own_origin(origin: str, authority: str) -> bool:
    """Whether `origin` ("http://host:port") has the authority that the client uses.

    The scheme is not compared: a server in front of us may speak TLS where we do not.
    """
    match = _HTTP_URL.fullmatch(origin) if origin and authority else None
    if not match or match.group(3):
        return False
    default = _DEFAULT_PORTS[match.group(1).lower()]
    return _without(default, match.group(2).lower()) == _without(default, authority.lower())


def _without(suffix: str, text: str) -> str:
    return text[: -len(suffix)] if text.endswith(suffix) else text


def cookie_name(cookie: str) -> str:
    """The name in a pair of Cookie or at the start of Set-Cookie, however loosely it is read."""
    return cookie.split(";")[0].lstrip(" \t=").partition("=")[0].rstrip(" \t")


def cookie_values(headers: Headers, name: str) -> List[str]:
    """All values of the cookie `name` in a request."""
    pairs = [pair.strip(" \t") for value in headers.get_all("cookie") for pair in value.split(";")]
    return [pair[len(name) + 1 :] for pair in pairs if pair.startswith(name + "=")]


# --------------------------------------------------------------------------------------------------
# Bodies
# --------------------------------------------------------------------------------------------------
# Decoders without I/O (RFC 9112 sections 6 and 7).  `feed(data)` returns the data of the body in
# `data`, in pieces.  `finished` says whether the body has ended; `rest` then holds the bytes behind
# its end.  `end()` is told that the connection has ended.

_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
# At most 15 digits: parsers differ on larger sizes, and nobody has so much to send.
_CHUNK_LINE = re.compile(
    (
        r"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?)*"
        % (TOKEN, TOKEN, _QUOTED)
    ).encode("latin-1")
)
_CHUNK_LINE_START = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:[ \t]*;[^\r\n]*|[ \t]*)\r?)?")
_TRAILER_LINE = re.compile(_FIELD_LINE.pattern.encode("latin-1"))

Pieces = List[Union[bytes, memoryview]]


class LengthDecoder:
    """A body of known length."""

    __slots__ = ("_remaining", "finished", "rest")

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.finished = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> Pieces:
        """The body data in `data`."""
        if len(data) > self._remaining:
            self.rest = data[self._remaining :]
            data = data[: self._remaining]
        self._remaining -= len(data)
        self.finished = self._remaining == 0
        return [data]

    def end(self) -> None:
        """The connection has ended, before the body: raises Truncated."""
        raise Truncated()


class UntilCloseDecoder:
    """A body that ends with its connection."""

    __slots__ = ("finished", "rest")

    def __init__(self) -> None:
        self.finished = False
        self.rest = b""

    def feed(self, data: bytes) -> Pieces:
        """All of `data`."""
        return [data]

    def end(self) -> None:
        """The connection has ended, and with it the body."""
        self.finished = True


class ChunkedDecoder:
    """A body in the chunked coding.  Extensions and trailers are checked and dropped.

    Raises ProxyError 400 for anything that does not match RFC 9112 section 7.1.
    """

    __slots__ = (
        "_config",
        "_partial",
        "_remaining",
        "_state",
        "_trailer_bytes",
        "finished",
        "rest",
    )

    def __init__(self, config: Config) -> None:
        self.finished = False
        self.rest = b""
        self._config = config
        self._state = "size"  # what comes next: size, data, data end, trailer
        self._partial = b""  # the beginning of a line that has not come whole
        self._remaining = 0  # bytes of the current chunk
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> Pieces:
        """The body data in `data`."""
        if self._partial:
            data, self._partial = self._partial + data, b""
        view, at = memoryview(data), 0
        pieces = []  # type: Pieces
        while at < len(data) and not self.finished:
            if self._state == "data":
                piece = view[at : at + self._remaining]
                pieces.append(piece)
                at += len(piece)
                self._remaining -= len(piece)
                if not self._remaining:
                    self._state = "data end"
                continue
            in_trailer = self._state == "trailer"
            config = self._config
            limit = config.max_trailer_bytes if in_trailer else config.max_chunk_line_bytes
            behind = data.find(b"\n", at, at + limit + 2) + 1
            if not behind:
                self._partial = data[at:]
                self._check_partial_line(limit)
                return pieces
            self._take_line(data[at:behind])
            at = behind
        self.rest = data[at:]
        return pieces

    def end(self) -> None:
        """The connection has ended, before the body: raises Truncated."""
        raise Truncated()

    def _check_partial_line(self, limit: int) -> None:
        """Refuse the beginning of a line as soon as it can never become valid."""
        line = self._partial
        if len(line) > limit + 1:
            raise ProxyError(400, "A chunk size line or trailer is longer than %d bytes." % limit)
        if self._state == "size" and not _CHUNK_LINE_START.fullmatch(line):
            raise ProxyError(400, "A chunk does not begin with its size in hexadecimal digits.")
        if self._state == "data end" and line != b"\r":
            raise ProxyError(400, "A chunk is not followed by CRLF.")

    def _take_line(self, line: bytes) -> None:
        """Act on a line with its line end: a chunk size, the end of a chunk's data, or a trailer."""
        if line[-2:] != b"\r\n":
            raise ProxyError(400, "A line of a chunked body does not end in CRLF.")
        if self._state == "size":
            match = _CHUNK_LINE.fullmatch(line, 0, len(line) - 2)
            if not match:
                raise ProxyError(400, "A chunk does not begin with its size in hexadecimal digits.")
            self._remaining = int(match.group(1), 16)
            self._state = "data" if self._remaining else "trailer"
        elif self._state == "data end":
            if len(line) != 2:
                raise ProxyError(400, "A chunk is not followed by CRLF.")
            self._state = "size"
        elif len(line) == 2:
            self.finished = True
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > self._config.max_trailer_bytes:
                limit = self._config.max_trailer_bytes
                raise ProxyError(400, "The trailers are longer than %d bytes." % limit)
            if not _TRAILER_LINE.fullmatch(line, 0, len(line) - 2):
                raise ProxyError(400, "A trailer is not a valid field line.")


def body_decoder(framing: Framing, config: Config) -> Any:
    """The decoder of a body that is framed so."""
    if framing is CHUNKED:
        return ChunkedDecoder(config)
    return UntilCloseDecoder() if framing is UNTIL_CLOSE else LengthDecoder(framing.length)


# --------------------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------------------
# One class for the connections of clients and to upstreams: an asyncio StreamReader and StreamWriter
# with deadlines, and with notice of data and EOF that nobody awaits.  asyncio does the buffering and
# the flow control.  One coroutine reads from a connection at a time, and one writes to it.
#
# Deadlines are absolute.  One coarse timer looks after those of all connections.

_READER_LIMIT = 1 << 17  # bytes; a StreamReader pauses its transport at twice this
_READ_BYTES = 1 << 20  # more than a StreamReader can hold: a read takes everything there is
_BACKLOG = 1024  # connections that wait to be accepted
_CLOSE_SECONDS = 60.0  # that a peer has to take the bytes that are queued when we close
_UNIX = getattr(socket, "AF_UNIX", None)

# The states of a client connection.  One to an upstream is either ACTIVE or, in the pool, IDLE.
IDLE = "idle"  # waits for a request, without a task
READING_HEAD = "reading head"  # not admitted yet
ACTIVE = "active"  # serves a request
CLOSING = "closing"  # no further request is served


class StreamWriter(asyncio.StreamWriter):
    """A StreamWriter that can be dropped while its transport stays open.

    From 3.11.5 on, asyncio's closes the transport when it is deleted.  A tunnel takes the transport
    over and has no use for the writer.
    """

    def __del__(self, *_: Any) -> None:
        """Leave the transport alone."""


class Connection(asyncio.StreamReaderProtocol):
    """A connection: StreamReader, StreamWriter, deadlines, and notice of data and EOF.

    buffer: bytes that were read but not used.  has_unread: the reader holds bytes.  ended: nothing
    more comes; `failure` is the reason, None for a clean EOF.  was_heard: whether data has come
    since this was last set to False.  watcher: called with the connection when data or EOF comes.
    address: the peer's, "" if it has none.  scheme: "https" over TLS.  ends_body: only the end of
    this connection ends the body that its peer is being sent.  state: see above.
    """

    __slots__ = (
        "_accepted",
        "address",
        "buffer",
        "deadlines",
        "ended",
        "ends_body",
        "failure",
        "has_unread",
        "read_deadline",
        "reader",
        "scheme",
        "state",
        "task",
        "transport",
        "was_heard",
        "watcher",
        "write_deadline",
        "writer",
    )

    def __init__(
        self, deadlines: "Deadlines", accepted: Optional[Callable[["Connection"], None]] = None
    ) -> None:
        self.reader = asyncio.StreamReader(_READER_LIMIT, loop=deadlines.loop)
        super().__init__(self.reader, loop=deadlines.loop)
        self.deadlines = deadlines
        self.buffer = b""
        self.has_unread = self.ended = self.was_heard = self.ends_body = False
        self.failure = None  # type: Optional[BaseException]
        self.watcher = None  # type: Optional[Callable[[Connection], None]]
        self.read_deadline = self.write_deadline = FOREVER
        self.state = ACTIVE
        self.task = None  # type: Optional[asyncio.Future[None]]
        self._accepted = accepted

    # What the transport calls.

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.transport = transport
        self.writer = StreamWriter(self.transport, self, self.reader, self.deadlines.loop)
        peer = transport.get_extra_info("peername")
        self.address = plain_address(peer[0]) if isinstance(peer, tuple) else ""
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self.deadlines.connections.add(self)
        if self._accepted is not None:
            self._accepted(self)

    def data_received(self, data: bytes) -> None:
        if self.ended:  # a deadline has passed
            return
        self.reader.feed_data(data)
        self.has_unread = self.was_heard = True
        if self.watcher is not None:
            self.watcher(self)

    def eof_received(self) -> bool:
        self.end()
        return bool(self.transport.can_write_eof())

    def connection_lost(self, exc: Optional[Exception]) -> None:
        if isinstance(exc, OSError) and not self.ended:
            self._read_remainder()
        self.deadlines.discard(self)
        self.end(exc)
        # Not told of the failure, the reader still gives out the data that came before.
        super().connection_lost(None)

    def _read_remainder(self) -> None:
        """Read what the kernel still holds.

        Transports stop reading when a write fails.  An upstream that refused a body may have sent
        its response before that.
        """
        sock = self.transport.get_extra_info("socket")
        if sock is None or self.scheme == "https":
            return
        try:
            with socket.fromfd(sock.fileno(), sock.family, sock.type) as copy:
                copy.setblocking(False)
                for data in iter(lambda: copy.recv(65536), b""):
                    self.data_received(data)
        except (OSError, RuntimeError):  # no more data; and 3.6 cannot pause a closed transport
            pass

    # Reading and writing.

    def end(self, failure: Optional[BaseException] = None) -> None:
        """Note that nothing more comes, and why, unless that is a clean EOF."""
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        self.reader.feed_eof()
        if self.watcher is not None:
            self.watcher(self)

    async def read(self) -> bytes:
        """The bytes at hand, or else the next that come; b"" at a clean EOF; OSError or TimedOut."""
        if self.buffer:
            data, self.buffer = self.buffer, b""
            return data
        data = await self.reader.read(_READ_BYTES)
        self.has_unread = False
        if not data and self.failure is not None:
            raise self.failure
        return data

    def write(self, pieces: Sequence[Union[bytes, memoryview]]) -> None:
        """Send bytes, or queue them; then `drain`."""
        if not self.transport.is_closing():
            # Not writelines, which never pauses the writer in 3.12.0 to 3.12.8 and 3.13.0
            # (CVE-2024-12254).
            self.writer.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    async def drain(self, timeout: float) -> None:
        """Wait until the peer has taken most of what was written.

        The peer has `timeout` seconds for it, and as long again for what is still queued then.
        Raises OSError if it is gone or too slow.
        """
        self.write_deadline = now() + timeout
        await self.writer.drain()
        if self.transport.is_closing():
            raise ConnectionResetError(errno.ECONNRESET, "the connection is closed")

    def queued(self) -> int:
        """How many bytes wait for the peer to take them."""
        try:
            return int(self.transport.get_write_buffer_size())
        except AttributeError:  # over TLS before 3.11, while the loss of a connection is on its way
            return 0

    def is_quiet(self) -> bool:
        """Whether everything that came was used and everything written was sent."""
        if self.buffer or self.has_unread or self.ended or self.transport.is_closing():
            return False
        return not self.queued()

    def is_fresh(self) -> bool:
        """Whether the connection is quiet, and the kernel holds no data or EOF for it either."""
        return self.is_quiet() and not poll(self.transport, _READABLE)

    def expire(self, time: float) -> None:
        """Act on the deadlines that have passed; called by Deadlines."""
        if time > self.read_deadline and not self.queued():  # a peer with unsent data is not idle
            self.read_deadline = FOREVER
            self.end(TimedOut())
        if (time > self.write_deadline and self.queued()) or has_failed(self.transport):
            self.abort()

    # Ending.

    def end_writing(self) -> None:
        """Send what is queued, then end our side, as far as the transport can."""
        end_writing(self.transport)

    def close(self) -> None:
        """Send what is queued, for as long as the last `drain` allowed or else a minute, and close."""
        if not self.transport.is_closing():
            if self.write_deadline == FOREVER:
                self.write_deadline = now() + _CLOSE_SECONDS
            self.transport.close()

    def abort(self) -> None:
        """Close at once.  A reader or writer here sees a failure, never a clean end.

        So does the peer, if only the end of the connection ends the body that it is being sent.
        """
        sock = self.transport.get_extra_info("socket")
        if self.ends_body and sock is not None and sock.family != _UNIX and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end(ConnectionAbortedError(errno.ECONNABORTED, "the proxy closed the connection"))
        self.transport.abort()


_READABLE = getattr(select, "POLLIN", 0)


def poll(transport: Any, events: int) -> bool:
    """Whether the kernel reports a failure or hang-up of a connection, or one of `events`."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0 or not hasattr(select, "poll"):  # not on Windows
        return False
    question = select.poll()
    question.register(sock.fileno(), events)
    return bool(question.poll(0))


def has_failed(transport: Any) -> bool:
    """Whether a connection that is not being read, because of back-pressure, was reset."""
    try:
        is_paused = not transport.is_closing() and not transport.is_reading()
    except (AttributeError, RuntimeError):  # not in 3.6; and as in `Connection.queued`
        return False
    return is_paused and poll(transport, 0)


def end_writing(transport: Any) -> None:
    """Send what is queued, then an EOF; over TLS, which has no half-close, close."""
    if transport.is_closing():
        return
    try:
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()
    except OSError:  # in 3.6, if the peer has reset the connection
        transport.abort()


def plain_address(text: str) -> str:
    """An address without its zone, and as IPv4 if it is one that is mapped to IPv6."""
    if ":" not in text:
        return text
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


class Deadlines:
    """All open connections and tunnel ends, and the one timer for their deadlines.

    is_active: an app was used since the last tick.  on_activity: called then, once a tick at most.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self.loop = loop
        self.interval = interval
        self.connections = set()  # type: Set[Any]
        self.is_active = False
        self.on_activity = None  # type: Optional[Callable[[], None]]
        self._empty = None  # type: Optional[asyncio.Future[None]]
        self._timer = loop.call_later(interval, self._tick)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(self.interval, self._tick)
        time = now()
        for connection in list(self.connections):
            connection.expire(time)
        if self.is_active and self.on_activity:
            self.on_activity()
        self.is_active = False

    def discard(self, connection: Any) -> None:
        """Forget a connection that is closed."""
        self.connections.discard(connection)
        if not self.connections and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    async def close(self, timeout: float) -> None:
        """Give connections that are closing `timeout` seconds, abort the rest, stop the timer."""
        for seconds in (timeout, 1.0):
            if self.connections:
                self._empty = self.loop.create_future()
                await asyncio.wait([self._empty], timeout=seconds)
            for connection in list(self.connections):
                connection.abort()
        self._timer.cancel()


async def read_head(
    connection: Connection, is_request: bool, config: Config, head: bytes = b""
) -> bytes:
    """Read a message head up to its empty line; the bytes behind stay in the connection's buffer.

    head: its beginning, if some of it was read before.

    Raises ProxyError as soon as it can never become a valid head, with the bytes in the buffer;
    Truncated at EOF, TimedOut at the connection's read deadline, OSError if the connection fails.
    """
    head = head or await connection.read()
    searched = 0
    while True:
        end = head.find(b"\r\n\r\n", max(0, searched - 3)) + 4
        if 4 <= end <= config.max_head_bytes:
            if end < len(head):
                connection.buffer = head[end:]
                head = head[:end]
            return head
        try:
            check_partial_head(head, max(0, searched - 1), is_request, config)
        except ProxyError:
            connection.buffer = head
            raise
        searched = len(head)
        data = await connection.read()
        if not data:
            raise Truncated()
        head += data


class Body:
    """A message body that is read from one connection, to be written to another.

    in_chunks: the pieces are given in the chunked coding, including the last chunk.  count: bytes
    of body data so far.  finished: the body was read to its end; the connection's buffer holds the
    bytes behind it.
    """

    __slots__ = ("_decoder", "_source", "count", "finished", "in_chunks")

    def __init__(
        self, source: Connection, framing: Framing, in_chunks: bool, config: Config
    ) -> None:
        self._source = source
        self._decoder = body_decoder(framing, config) if framing is not NO_BODY else None  # type: Any
        self.in_chunks = in_chunks
        self.count = 0
        self.finished = framing is NO_BODY or framing == Framing("length", 0)

    def at_hand(self) -> Pieces:
        """The pieces that have been read already; ProxyError 400."""
        if self.finished or not self._source.buffer:
            return []
        data, self._source.buffer = self._source.buffer, b""
        return self._decode(data)

    async def read(self, timeout: float) -> Pieces:
        """The next pieces, which may be none.

        Raises ProxyError 400 if the body is malformed, Truncated if it breaks off, TimedOut if
        nothing comes for `timeout` seconds, OSError if the connection fails.
        """
        self._source.read_deadline = now() + timeout
        data = await self._source.read()
        self._source.read_deadline = FOREVER
        if data:
            return self._decode(data)
        self._decoder.end()
        self.finished = True
        return [b"0\r\n\r\n"] if self.in_chunks else []

    def _decode(self, data: bytes) -> Pieces:
        decoder = self._decoder
        pieces = decoder.feed(data)  # type: Pieces
        size = sum(map(len, pieces))
        self.count += size
        if decoder.finished:
            self.finished = True
            self._source.buffer = decoder.rest
        if self.in_chunks:
            if size:
                pieces = [b"%x\r\n" % size] + pieces + [b"\r\n"]
            if self.finished:
                pieces.append(b"0\r\n\r\n")
        return pieces


# --------------------------------------------------------------------------------------------------
# Header rewriting
# --------------------------------------------------------------------------------------------------
# The app sees what it would see at home under `ssh -L`, and what it says of its home is translated
# into addresses below the prefix.  Each head is written anew by one loop over its fields and a table
# from names to actions: None drops the field, a function translates its value, and a field that is
# not in the table is passed on as it came.

# RFC 9110 section 7.6.1, with Trailer (trailers are dropped) and proxy authentication (11.7).
_HOP_BY_HOP = (
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    " transfer-encoding upgrade"
).split()
# Written by us, so that neither a client nor its Connection field can decide about them.
_WRITTEN_BY_US = [
    "host", "content-length", "forwarded",
    "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-port",
] + [name.lower() for name in _PREFIX_FIELDS]  # fmt: skip
_USUAL_CONNECTION = frozenset(["keep-alive", "close", "upgrade"])
_REFRESH = re.compile(
    r"([0-9.]*[ \t]*[;,][ \t]*(?:url[ \t]*=[ \t]*)?['\"]?)([^'\"]*)(.*)", re.IGNORECASE
)
_OTHER_HOST = re.compile(r"/\t*[/\\]")  # a browser takes the rest for the name of a host
_UPGRADE_LINES = ["Connection: Upgrade", "Upgrade: websocket"]


def request_for_upstream(request: Request, gate: Any) -> bytes:
    """The head of a request as its upstream receives it."""
    route, client = request.route, request.client
    assert route is not None
    table = _table_without(_REQUEST_TABLE, request.connection)
    path = route.prefix + request.path if route.absolute else request.path or "/"
    preserve_host = gate.config.preserve_host and client.authority
    lines = [
        "%s %s%s HTTP/1.1" % (request.method, path, gate.strip_query(request.query)),
        "Host: " + (client.authority if preserve_host else route.authority),
    ]
    for key, line in zip(request.headers.keys, request.headers.lines):
        if key in table:
            translate = table[key]
            if translate is None:
                continue
            value = line[len(key) + 1 :].strip(" \t")
            translated = translate(value, request, gate)
            if translated is None:
                continue
            if translated is not value:
                line = "%s: %s" % (line[: len(key)], translated)
        elif "_" in key and key.replace("_", "-") in _WRITTEN_BY_US:
            continue  # CGI and WSGI cannot tell the two spellings apart
        lines.append(line)
    # An app that compares Origin with Host or X-Forwarded-Host must see home in all of them.
    is_translated = request.is_own_origin and not gate.config.preserve_host
    lines += client.home_lines if is_translated else client.lines
    lines += route.prefix_lines
    if request.is_websocket:
        lines += _UPGRADE_LINES
    return serialise(lines, request.framing)


def response_lines(response: Response, request: Request, gate: Any) -> List[str]:
    """The status line and fields of a response as the client gets them, without the framing."""
    route = request.route
    assert route is not None
    table = _table_without(_RESPONSE_TABLE, response.connection)
    lines = ["HTTP/1.1 %d %s" % (response.status, response.reason)]
    for key, line in zip(response.headers.keys, response.headers.lines):
        if key in table:
            translate = table[key]
            if translate is None:
                continue
            value = line[len(key) + 1 :].strip(" \t")
            translated = translate(value, request, gate)
            if translated is None:
                continue
            if translated is not value:
                line = "%s: %s" % (line[: len(key)], translated)
        lines.append(line)
    is_empty = response.framing is NO_BODY and response.status >= 200 and response.status != 204
    if (
        is_empty and "content-length" in response.headers.index
    ):  # HEAD, 304: the length of a GET's body
        length = response.headers.get_all("content-length")[0].partition(",")[0]
        lines.append("Content-Length: " + length.strip(" \t"))
    is_unclear = request.is_unprefixed or not request.path
    if route.prefix and (is_unclear or "service-worker-allowed" in response.headers.index):
        # A service worker rules its own app, never the other apps or our pages.
        lines.append("Service-Worker-Allowed: %s/" % route.prefix)
    lines += gate.response_lines(response.status)
    if response.status == 101:
        lines += _UPGRADE_LINES
    return lines


def serialise(lines: List[str], framing: Framing) -> bytes:
    """The bytes of a head: its lines, and the field that announces the body."""
    if framing is CHUNKED:
        lines.append("Transfer-Encoding: chunked\r\n\r\n")
    elif framing.kind == "length":
        lines.append("Content-Length: %d\r\n\r\n" % framing.length)
    else:
        lines.append("\r\n")
    return "\r\n".join(lines).encode("latin-1")


def _table_without(table: Dict[str, Any], named: FrozenSet[str]) -> Dict[str, Any]:
    """`table`, with the fields that Connection names dropped, too (RFC 9110 section 7.6.1)."""
    if named <= _USUAL_CONNECTION:
        return table
    table = dict(table)
    table.update((name, None) for name in named)
    return table


def _translate_origin(value: str, request: Request, gate: Any) -> str:
    route = request.route
    if not request.is_own_origin or gate.config.preserve_host or route is None:
        return value
    return "%s://%s" % (route.scheme, route.authority)


def _translate_referer(value: str, request: Request, gate: Any) -> str:
    """A page of this app becomes that page at home.  Of another page of our origin only the origin
    is left, as browsers do it."""
    value = gate.strip_query(value)
    route = request.route
    match = _HTTP_URL.fullmatch(value)
    if not match or route is None or gate.config.preserve_host:
        return value
    origin, authority = "%s://%s" % match.group(1, 2), request.client.authority
    if not authority or (match.group(2) != authority and not is_own_origin(origin, authority)):
        return value
    path = match.group(3)
    if not _has_prefix(path, route.prefix):
        path = "/"
    elif not route.absolute:
        path = path[len(route.prefix) :]
    slash = "" if path.startswith("/") else "/"
    return "%s://%s%s%s" % (route.scheme, route.authority, slash, path)


def _strip_cookies(value: str, request: Request, gate: Any) -> Optional[str]:
    return gate.strip_cookies(value, request.route) or None


def _strip_authorization(value: str, request: Request, gate: Any) -> Optional[str]:
    return None if gate.owns_authorization(value) else value


def _translate_expect(value: str, request: Request, gate: Any) -> Optional[str]:
    return None if request.minor == "0" else value  # RFC 9110 section 10.1.1


_REQUEST_TABLE = dict.fromkeys(_HOP_BY_HOP + _WRITTEN_BY_US)  # type: Dict[str, Any]
_REQUEST_TABLE.update(
    {
        "origin": _translate_origin,
        "referer": _translate_referer,
        "cookie": _strip_cookies,
        "authorization": _strip_authorization,
        "expect": _translate_expect,
    }
)


def _translate_location(value: str, request: Request, gate: Any) -> str:
    """A path gains the prefix.  A URL of the app's home becomes a path, which fits every scheme and
    name that the client may use.  Relative and foreign references and "//host" stay."""
    route = request.route
    assert route is not None
    match = _HTTP_URL.fullmatch(value)
    if not match:
        return value if value.startswith("//") else _with_prefix(value, route)
    authority = match.group(2).lower()
    default = "" if _PORT.search(authority) else _DEFAULT_PORTS[match.group(1).lower()]
    if authority + default not in route.homes and authority != request.client.authority.lower():
        return value
    path = match.group(3) if match.group(3).startswith("/") else "/" + match.group(3)
    path = _with_prefix(path, route)
    return "/." + path if _OTHER_HOST.match(path) else path


def _translate_refresh(value: str, request: Request, gate: Any) -> str:
    match = _REFRESH.fullmatch(value)
    if not match:
        return value
    before, url, behind = match.groups()
    return before + _translate_location(url, request, gate) + behind


def _translate_set_cookie(value: str, request: Request, gate: Any) -> Optional[str]:
    """An app cannot set our cookies.  In the stripped forms Path gains the prefix and a Domain that
    is the target goes; __Host- cookies stay, since neither is allowed for them."""
    route = request.route
    assert route is not None
    if gate.owns_cookie(cookie_name(value), route):
        return None
    if route.absolute or value[:7].lower() == "__host-":
        return value
    parts = value.split(";")
    kept, has_path = parts[:1], False
    for part in parts[1:]:
        name, equals, attribute = part.partition("=")
        name, attribute = name.strip(" \t").lower(), attribute.strip(" \t")
        if name == "domain" and _is_home_domain(attribute.lower().lstrip("."), request):
            continue
        if name == "path":
            has_path = True
            part = part[: part.index("=") + 1 if equals else None] + _with_prefix(attribute, route)
        kept.append(part)
    if request.is_unprefixed and not has_path:  # the default would be the folder that was asked for
        kept.append(" Path=%s/" % route.prefix)
    return ";".join(kept)


def _is_home_domain(domain: str, request: Request) -> bool:
    """Whether a cookie's Domain is the app's home, the proxy, or the domain above an app's host."""
    route, client = request.route, request.client
    homes = {host_of(home) for home in (route.homes if route else ())} | {host_of(client.authority)}
    return domain in homes or bool(
        client.app_port and domain == host_of(client.authority.lower().partition(".")[2])
    )


def _drop_below_prefix(value: str, request: Request, gate: Any) -> Optional[str]:
    return None if request.route and request.route.prefix else value


def _with_prefix(path: str, route: Route) -> str:
    if route.absolute or not path.startswith("/") or _has_prefix(path, route.prefix):
        return path
    return route.prefix + path


def _has_prefix(path: str, prefix: str) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "/", "?", "#")


_RESPONSE_TABLE = dict.fromkeys(_HOP_BY_HOP + ["content-length"])  # type: Dict[str, Any]
_RESPONSE_TABLE.update(
    {
        "location": _translate_location,
        "content-location": _translate_location,
        "refresh": _translate_refresh,
        "set-cookie": _translate_set_cookie,
        "service-worker-allowed": _drop_below_prefix,
    }
)


def host_form(port: int, client: ClientInfo, domains: Sequence[str]) -> str:
    """The URL of the host that names `port`, as this client can reach it; "" if there is none."""
    host = host_of(client.authority)
    domain = host.partition(".")[2] if client.app_port else host
    if domain not in domains:
        named = "localhost" if host.startswith("127.") or host == "[::1]" else ""
        others = (one for one in domains if one != "localhost")
        domain = named if named in domains else next(others, "")
    if not domain or not host:
        return ""
    return "%s://%d.%s%s/" % (client.scheme, port, domain, client.authority[len(host) :])


# --------------------------------------------------------------------------------------------------
# Unprefixed requests
# --------------------------------------------------------------------------------------------------
# A link such as "/static/app.js" on an app's page leaves the prefix.  If all paths of the origin are
# ours (`Config.whole_origin`), the app is found by the page that asks (Referer), or else by a cookie
# that names the app that this browser opened last.  The request is then redirected into the prefix,
# or served as it is if it cannot be redirected.  Browsers keep the app's cookies for the prefix;
# copies of them under names of ours are sent to all paths.


class LocalResponse(NamedTuple):
    """A whole response of the proxy itself."""

    status: int
    fields: Fields
    body: bytes = b""


def find_app(request: Request, config: Config, cookie: str) -> Request:
    """The request with its route, even if the prefix is missing.

    cookie: the name of the cookie that names the last app, "" if unprefixed requests are not
    served.  Raises ProxyError 302 to our own page, 400, or 404 if no app is found.
    """
    error = request.route_error
    if error is None:
        return request
    if cookie and error.status == 404 and not is_below(config.base or "/absolute", request.target):
        app = _find_unprefixed(request, config, cookie)
        if app is not None:
            return app
    raise _not_found(error, request, config)


def _find_unprefixed(request: Request, config: Config, cookie: str) -> Optional[Request]:
    """Only pages of our own origin, and a person who types an address, can mean an app."""
    base = config.base
    if not _comes_from_us(request):
        return None
    for app in _app_of_referer(request, base) or cookie_values(request.headers, cookie):
        if _is_app(base, app):
            target = "%s/%s%s" % (base, app, request.target)
            route, path, query = find_route(base, target, config.upstream_tls)
            return request._replace(
                route=route, path=path, query=query, route_error=None, is_unprefixed=True
            )
    return None


def _not_found(error: ProxyError, request: Request, config: Config) -> ProxyError:
    """The error with advice; or a redirect to our page for a person who asks for the origin."""
    if request.target == "/" and config.whole_origin and request.is_page_visit:
        return ProxyError(302, "Redirecting.", (("Location", config.base + "/"),))
    if error.status != 404:
        return error
    url, advice = host_form(8080, request.client, config.domains), ""
    port, _, domain = host_of(request.client.authority).partition(".")
    if config.domains and is_domain(domain) and port_in_host(request.client.authority, (domain,)):
        advice = " For {0}.{1} to be port {0}, start the proxy with --domain {1}."
        advice = advice.format(port, domain)
    elif url:
        advice = " If an app's links begin with a slash, open it at a host of its own, such as %s."
        advice = advice % url
    return ProxyError(404, error.detail + advice, error.fields)


def can_be_redirected(request: Request) -> bool:
    """Whether the client follows redirects: not for a WebSocket or a service worker's script."""
    is_script = "serviceworker" in request.headers.get_all("sec-fetch-dest")
    return not request.is_websocket and not is_script


def redirect_into_prefix(request: Request, gate: Any) -> LocalResponse:
    """The redirect of an unprefixed request, so that cookies and the next Referer come out right."""
    assert request.route is not None
    location = request.route.prefix + request.path + gate.strip_query(request.query)
    fields = (("Location", location), ("Cache-Control", "no-store"), ("Content-Length", "0"))
    return LocalResponse(307, fields)


def cookies_for_unprefixed(
    request: Request, response: Response, lines: List[str], cookie: str
) -> List[str]:
    """Set-Cookie lines that let unprefixed requests of this browser find the app and its cookies.

    lines: those of the response for the client.  One cookie names the app once a person opens a
    page of it.  Copies of the app's own cookies are sent to all paths.
    """
    route, sets_cookies = request.route, "set-cookie" in response.headers.index
    if route is None or not route.prefix or not (request.is_page_visit or sets_cookies):
        return []
    dest = request.headers.get("sec-fetch-dest")
    is_opened = request.is_page_visit and dest in ("", "document")  # not in a frame
    known = cookie_values(request.headers, cookie)
    if not is_opened and not known:
        return []
    added = []
    for line in lines:
        if line[:11].lower() == "set-cookie:":
            added += [
                "Set-Cookie: " + one for one in _copies(line[11:].strip(" \t"), route, cookie)
            ]
    if is_opened and response.status < 400 and known != [_app_name(route)]:
        secure = "; Secure" if request.client.scheme == "https" else ""
        text = "Set-Cookie: %s=%s; Path=/; HttpOnly; SameSite=Lax%s"
        added.append(text % (cookie, _app_name(route), secure))
    return added


def with_own_cookies(request: Request, cookie: str) -> Request:
    """An unprefixed request that is served as it is, with the app's cookies from their copies."""
    assert request.route is not None
    start = _copy_name(request.route, cookie)
    values = request.headers.get_all("cookie")
    pairs = [pair.strip(" \t") for value in values for pair in value.split(";")]
    names = frozenset(map(cookie_name, pairs))
    restored = [pair[len(start) :] for pair in pairs if pair.startswith(start)]
    own = [pair for pair in restored if cookie_name(pair) not in names]
    if not own:
        return request
    headers = request.headers
    others = [(k, line) for k, line in zip(headers.keys, headers.lines) if k != "cookie"]
    lines = others + [("cookie", "Cookie: " + "; ".join(pairs + own))]
    new = Headers([key for key, _ in lines], [line for _, line in lines])
    return request._replace(headers=new)


def _comes_from_us(request: Request) -> bool:
    """Whether a page of our own origin asks, or a person does in the address bar."""
    authority = request.client.authority
    headers = request.headers
    sites, origins = headers.get_all("sec-fetch-site"), headers.get_all("origin")
    referers = headers.get_all("referer")
    is_typed = request.is_page_visit and request.target != "/"  # "/" means our own page
    if any(not is_own_origin(one, authority) for one in origins) and sites != ["same-origin"]:
        return False
    if sites:
        return sites == ["same-origin"] or (sites == ["none"] and is_typed)
    if referers:
        return all(_own_path(referer, authority) for referer in referers)
    return bool(origins) or is_typed


def _own_path(url: str, authority: str) -> str:
    """The path of a URL of our own origin; "" for any other."""
    match = _HTTP_URL.fullmatch(url)
    if not match or not is_own_origin("%s://%s" % match.group(1, 2), authority):
        return ""
    return re.split("[?#]", match.group(3))[0] or "/"


def _app_of_referer(request: Request, base: str) -> List[str]:
    """The app of the page that asks; [] if it has none, [""] if it is our own page."""
    for referer in request.headers.get_all("referer"):
        path = _own_path(referer, request.client.authority)
        if base and path and is_home(base, path):
            return [""]
        with contextlib.suppress(ProxyError):
            route = find_route(base, path)[0] if path else None
            if route is not None:
                return [_app_name(route)]
    return []


def _is_app(base: str, app: str) -> bool:
    """Whether a name that a browser sent is the name of an app, and nothing else."""
    try:
        route = find_route(base, "%s/%s/" % (base, app))[0]
    except ProxyError:
        return False
    return route is not None and _app_name(route) == app


def _app_name(route: Route) -> str:
    """An app as our cookie names it: its prefix behind the base."""
    parts = route.prefix.split("/")
    return "/".join(parts[-2:] if route.absolute else parts[-1:])


def _copy_name(route: Route, cookie: str) -> str:
    """How the names of the copies of an app's cookies begin."""
    return "%s_%s_" % (cookie, hashlib.sha256(_app_name(route).encode()).hexdigest()[:8])


def _copies(value: str, route: Route, cookie: str) -> List[str]:
    """A copy of a cookie that is not sent to all paths, under a name of ours that is."""
    attributes = value.split(";")[1:]
    keys = [part.partition("=")[0].strip(" \t").lower() for part in attributes]
    split = zip(attributes, keys)
    paths = [part.partition("=")[2].strip(" \t") for part, key in split if key == "path"]
    pair = value.split(";")[0].strip(" \t")
    if not pair.partition("=")[0] or paths[-1:] == ["/"]:
        return []
    dropped = ("path", "domain", "httponly")
    kept = [part for part, key in zip(attributes, keys) if key not in dropped]
    return [";".join([_copy_name(route, cookie) + pair] + kept + [" Path=/", " HttpOnly"])]


# --------------------------------------------------------------------------------------------------
# Local sockets
# --------------------------------------------------------------------------------------------------
# Which programs listen on this machine, and which user owns a port, as Linux reports in /proc and by
# netlink.  On other systems nothing is found.
_LISTEN = "0A"  # the state of a listening socket in /proc/net/tcp
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_FIRST_COMMON_PORT = 1024  # below are the system's own services
_INTERPRETER = re.compile(
    r"(?:python|pypy|node|ruby|perl|php|java|bash|sh|deno|bun|Rscript|R)[0-9.]*\Z"
)


_PLAIN_OPTIONS = (
    "-u -E -I -s -S -O -OO -B -b -q -v -X -W".split()
)  # of Python; behind others there may be code
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
        found += [
            TcpSocket(a, int(p, 16), peer, s, int(user), inode)
            for a, p, peer, s, user, inode in rows
        ]
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
    addresses = tuple(
        _plain_text(one.address) for one in tcp_sockets(port=port) if one.state == _LISTEN
    )
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
        return (
            owner if owner is not None and owner >= _FIRST_ORDINARY_USER and owner != mine else None
        )

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
    return accepted or _told_user(
        nowhere, there
    )  # 0, root's, is also that of one that nobody has accepted yet


def _told_user(here: Address, there: Address) -> Optional[int]:
    """The user id of the socket at `there` that is connected to `here`, or that listens where this has no port; None
    if there is none, or if the kernel does not answer (sock_diag(7))."""
    family = socket.AF_INET6 if ":" in there[0] else socket.AF_INET
    packed = (ipaddress.ip_address(end[0]).packed for end in (there, here))
    ends = (
        struct.pack("!HH16s16s", there[1], here[1], *packed) + b"\0" * 4 + b"\xff" * 8
    )  # any interface and cookie
    question = (
        struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + ends
    )  # in any state
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
    listening: List[
        Tuple[bool, int]
    ] = []  # the ones for that very address precede those for all addresses
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


# --------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------
# The responses of the proxy itself: HTML for people, JSON and plain text for programs.  The pages
# load nothing from elsewhere; a Content-Security-Policy allows their own style and script alone.

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
_TITLE_BYTES = 65536  # of a page in which its title is looked for
_FORMS = (
    ("/8080/", "port 8080 of this machine; the app sees the path behind the port"),
    ("/absolute/8080/", "the same for an app that is told to live under this whole path"),
    ("/db1.example.org:8080/", "port 8080 of a host that --host-allowlist allows"),
    (
        "/absolute/db1.example.org:8080/",
        "the same for an app that is told to live under this whole path",
    ),
)


class NotListening(ProxyError):
    """Nobody accepts connections at the route's port yet: a page visit gets a page that waits."""

    def __init__(self, route: Route, elsewhere: Sequence[str]) -> None:
        detail = _why_nobody_listens(route, elsewhere)
        super().__init__(502, detail, (("Retry-After", "2"), ("Port-Proxy", "waiting")))
        self.route = route


def _why_nobody_listens(route: Route, elsewhere: Sequence[str]) -> str:
    if not elsewhere:
        return "Nothing listens on %s. Is the app running, and is this its port?" % route.place
    there = next((one for one in elsewhere if one in LOOPBACK_NAMES), elsewhere[0])
    place = authority_of(there, route.port)
    text = "The app on port %d listens at %s alone, not at %s."
    text %= route.port, " and ".join(elsewhere), route.host
    if there in LOOPBACK_NAMES:
        return text + " Open %d in place of %s." % (route.port, route.authority)
    advice = (
        " Start it with 127.0.0.1 as the address to listen on, or the proxy with --host-allowlist"
        " %s, and open %s in place of %d."
    )
    return text + advice % (there, place, route.port)


class SignInNeeded(ProxyError):
    """A page visit without a valid token.

    It is answered with the sign-in page, which sends the token to the path `action` and leads on to
    `target`.  If `action` is "", the page only links to `target`, where the token is asked for.
    """

    def __init__(self, detail: str, target: str, action: str) -> None:
        super().__init__(401, detail, CHALLENGE)
        self.target = target
        self.action = action


# Browsers do not know this scheme, so they show the page instead of asking for a password.
CHALLENGE = (("WWW-Authenticate", "Bearer"),)


def error_response(error: ProxyError, as_html: bool) -> LocalResponse:
    """The response that says what was wrong; nothing of the request is in it but a checked name."""
    phrase = reason_phrase(error.status)
    fields = error.fields + (("Cache-Control", "no-store"),)
    if not as_html:
        return _response(
            error.status, "text/plain", "%d %s\n%s\n" % (error.status, phrase, error.detail), fields
        )
    body = '<h1>%s</h1><p>%s</p><p class="soft">%d &middot; port_proxy</p>'
    return _page(
        error.status,
        phrase,
        body % (html.escape(phrase), _marked(error.detail), error.status),
        fields,
    )


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

    def note(self, route: Route, response: Response, data: bytes) -> None:
        """Remember the title in the beginning of a page, if there is one."""
        title = (
            title_in(response.headers, data)
            if route.host == "localhost" and response.status == 200
            else ""
        )
        if title:
            self._seen[route.port] = title, time.time()

    def of(self, ports: Sequence[Listener]) -> Dict[int, str]:
        """The titles of those that have not been started anew since."""
        found = ((one, self._seen.get(one.port, ("", 0.0))) for one in ports)
        return {one.port: title for one, (title, seen) in found if title and seen >= one.started}


def title_in(headers: Headers, data: bytes) -> str:
    """The title of an HTML page, of which `data` is the beginning; "" where none can be read in it."""
    kind = "".join(headers.get_all("content-type")[:1]).lower()
    coding = "".join(headers.get_all("content-encoding")).lower()
    if "html" not in kind or coding not in ("", "gzip", "deflate"):
        return ""
    if coding:
        try:
            data = zlib.decompressobj(47).decompress(
                data, _TITLE_BYTES
            )  # either of the two, told by its head
        except zlib.error:
            return ""
    match = _TITLE.search(data[:_TITLE_BYTES].decode("utf-8", "replace"))
    try:
        title = html.unescape(match.group(1)) if match else ""
    except ValueError:  # a character's number of thousands of digits
        return ""
    return "".join(one if one.isprintable() else " " for one in " ".join(title.split())[:100])


_TITLE = re.compile(r"<title(?:\s[^<>]{0,200})?>([^<]{0,1000})</title", re.IGNORECASE)


def wants_json(headers: Headers) -> bool:
    """Whether a program asks for data."""
    return any("application/json" in value.lower() for value in headers.get_all("accept"))


def ports_response(view: PortsView, request: Request) -> LocalResponse:
    """The answer at the base: the ports that somebody may want to open, and the forms of an address."""
    fields = (("Cache-Control", "no-store"), ("Vary", "Accept"))
    if request.target.endswith("?list"):
        return _response(
            200,
            "text/html",
            _port_items(view),
            fields + (("Content-Security-Policy", _policy("")),),
        )
    if request.is_navigation:
        return _ports_page(view, fields)
    if wants_json(request.headers):
        ports = [_port_data(view, one) for one in view.ports]
        return _response(
            200, "application/json", json.dumps({"ports": ports}, indent=1) + "\n", fields
        )
    lines = ["%-40s %s\n" % (view.base + form, meaning) for form, meaning in _FORMS]
    lines += [
        "\n%-40s %s" % ("%s/%d/" % (view.base, one.port), _summary(one)) for one in view.ports
    ]
    text = "port_proxy: every port of this machine through this one\n\n" + "".join(lines) + "\n"
    return _response(200, "text/plain", text, fields)


def _ports_page(view: PortsView, fields: Fields) -> LocalResponse:
    row = "<tr><td><code>%s</code><td>%s"
    rows = "".join(
        row % (html.escape(view.base + form), html.escape(text)) for form, text in _FORMS
    )
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
        ways = "".join(
            way % (html.escape(url), one.port, _WAYS[name], _WAYS[name])
            for name, url in links.items()
        )
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
    data = {
        "port": one.port,
        "addresses": one.addresses,
        "program": one.program,
        "pid": one.pid,
        "seconds": seconds,
    }
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


def waiting_response(error: ProxyError, port: int) -> LocalResponse:
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


def sign_in_response(error: SignInNeeded) -> LocalResponse:
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


def redirect_response(location: str) -> LocalResponse:
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
) -> LocalResponse:
    """forms, frames: where the page's forms may lead, and what may have it in a frame (Content-Security-Policy)."""
    element = "<script>%s</script>" % script if script else ""
    text = _PAGE.format(
        title=html.escape(title), style=_STYLE, head=head, body=body, script=element
    )
    return _response(
        status,
        "text/html",
        text,
        fields + (("Content-Security-Policy", _policy(script, forms, frames)),),
    )


def _policy(script: str, forms: str = "'none'", frames: str = "'self'") -> str:
    style, code = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (_STYLE, script)
    )
    return _POLICY % (style, "'sha256-%s'" % code if script else "'none'", forms, frames)


def _response(status: int, media_type: str, text: str, fields: Fields = ()) -> LocalResponse:
    body = text.encode()
    ours = (
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Content-Type", media_type + "; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Length", str(len(body))),
    )
    return LocalResponse(status, ours + fields, body)


# --------------------------------------------------------------------------------------------------
# Upstreams
# --------------------------------------------------------------------------------------------------
# Opening connections to upstreams, and keeping idle ones for the next request.  A connection is kept
# only after a response that ended cleanly and exactly.  Data or EOF on an idle connection closes it,
# and the kernel is asked once more before it is used again.  `fetch` is our own small HTTP client.

_FETCH_SECONDS = 3.0
_FETCH_BYTES = 1 << 22


class Upstreams:
    """Opens connections to upstreams, and pools idle ones.

    listening: our own addresses.  A connection that would reach one of them is refused, since the
    request could go round for ever.
    """

    def __init__(self, config: Config, deadlines: Deadlines, listening: Sequence[Address]) -> None:
        self.config = config
        self.deadlines = deadlines
        self.listening = listening
        self.owners = Owners()
        self._contexts = {}  # type: Dict[bool, ssl.SSLContext]
        self._idle = {}  # type: Dict[str, List[Tuple[Connection, float]]]
        self._idle_count = 0

    def take(self, route: Route, is_replayable: bool) -> Optional[Connection]:
        """An idle connection to the route's upstream that is fit for use, or None.

        The upstream may close it at the moment we use it, and only a replayable request may be sent
        again then.  Other requests get one that was used within the last second, which no server is
        known to close.
        """
        idle = self._idle.get(route.authority)
        while idle and (is_replayable or now() - idle[-1][1] < 1.0):
            connection = self._remove(route.authority, idle, len(idle) - 1)
            if connection.is_fresh():
                connection.was_heard = False
                return connection
            connection.abort()
        return None

    def give(self, route: Route, connection: Connection) -> None:
        """Keep a connection whose exchange ended cleanly and exactly; any data or EOF closes it."""
        if not connection.is_quiet() or self._idle_count >= self.config.max_idle_upstreams:
            connection.close()
            return
        idle = self._idle.get(route.authority)
        if idle is None:
            idle = self._idle[route.authority] = []
        time = now()
        idle.append((connection, time))
        self._idle_count += 1
        connection.read_deadline = time + self.config.idle_upstream_timeout
        connection.watcher = functools.partial(self._drop, route.authority)

    def _drop(self, authority: str, connection: Connection) -> None:
        """Close an idle connection on which data or EOF came."""
        idle = self._idle[authority]
        self._remove(authority, idle, [one for one, _ in idle].index(connection))
        connection.abort()

    def _remove(self, authority: str, idle: List[Tuple[Connection, float]], at: int) -> Connection:
        """Take an idle connection out of the pool."""
        connection, _ = idle.pop(at)
        connection.watcher = None
        connection.read_deadline = FOREVER
        self._idle_count -= 1
        if not idle:
            del self._idle[authority]
        return connection

    def close(self) -> None:
        """Close all idle connections."""
        for authority, idle in list(self._idle.items()):
            for at in range(len(idle) - 1, -1, -1):
                self._remove(authority, idle, at).abort()

    async def connect(self, route: Route) -> Connection:
        """A new connection to the route's upstream; ProxyError 403, 502, 503, 504 or 508."""
        try:
            return await asyncio.wait_for(self._connect(route), self.config.connect_timeout)
        except asyncio.TimeoutError:  # an OSError from 3.11 on
            raise _connect_timeout(route, self.config)
        except (ssl.SSLError, ssl.CertificateError) as error:
            raise ProxyError(502, _tls_failure(route, error))
        except (socket.gaierror, UnicodeError):  # the second: a name that cannot be looked up
            text = "The host %s could not be found. Check its spelling, or this machine's name service."
            raise ProxyError(502, text % route.host)
        except ConnectionRefusedError:
            raise NotListening(route, self.owners.elsewhere(route.host, route.port))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                text = "The proxy has no file descriptor left to connect with. Try again shortly."
                raise ProxyError(503, text)
            if error.errno == errno.ETIMEDOUT:
                raise _connect_timeout(route, self.config)
            reason = os.strerror(error.errno) if error.errno else "unknown reason"
            raise ProxyError(502, "No connection to %s: %s." % (route.place, reason))

    async def _connect(self, route: Route) -> Connection:
        """Try the addresses of the route's host in order; the most telling OSError if all fail."""
        failures = []
        for address in await self._addresses(route):
            try:
                return await self._connect_to(address, route)
            except ssl.SSLError:
                raise
            except OSError as error:
                failures.append(error)
        failures.sort(key=lambda error: not isinstance(error, ConnectionRefusedError))
        raise failures[0]

    async def _addresses(self, route: Route) -> List[Address]:
        if route.host == "localhost":
            return [("127.0.0.1", route.port), ("::1", route.port)]
        loop = self.deadlines.loop
        found = await loop.getaddrinfo(route.host, route.port, type=socket.SOCK_STREAM)
        return [info[4][:2] for info in found]  # type: ignore[misc]

    async def _connect_to(self, address: Address, route: Route) -> Connection:
        tls = {}  # type: Dict[str, Any]
        if route.scheme == "https":
            verified = not (self.config.insecure_upstream and route.is_local)
            if verified not in self._contexts:  # making one takes longer than using it
                self._contexts[verified] = upstream_context(verified)
            tls = {"ssl": self._contexts[verified], "server_hostname": route.host}
        connection = Connection(self.deadlines)
        await self.deadlines.loop.create_connection(lambda: connection, *address, **tls)
        try:
            self._check(connection)
        except BaseException:
            connection.abort()
            raise
        return connection

    def _check(self, connection: Connection) -> None:
        """Refuse a connection to ourselves or to another user's port; OSError or ProxyError."""
        names = [connection.transport.get_extra_info(name) for name in ("sockname", "peername")]
        if not all(names):
            raise ConnectionResetError(errno.ECONNRESET, "reset as soon as it was accepted")
        here, there = ((plain_address(name[0]), int(name[1])) for name in names)
        if here == there:  # TCP lets a socket connect to itself if nobody listens
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
        if any(_reaches(here, there, own) for own in self.listening):
            text = "Port %d is the proxy's own: the request would go round for ever." % there[1]
            raise ProxyError(508, text)
        if not self.config.any_owner and ipaddress.ip_address(there[0]).is_loopback:
            owner = self.owners.stranger(here, there)
            if owner is not None:
                raise ProxyError(403, _whose_port(there[1], owner))


def _whose_port(port: int, owner: int) -> str:
    text = (
        "Port %d of this machine belongs to another user, %s. Its pages could use your other apps as"
        " you. If you trust it, start the proxy with --any-owner."
    )
    return text % (port, _user_name(owner))


def upstream_context(verified: bool) -> ssl.SSLContext:
    """The TLS context for upstreams, with their certificates verified or not."""
    context = ssl.create_default_context()
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _tls_failure(route: Route, error: Exception) -> str:
    if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        advice = " --insecure-upstream accepts any on this machine." if route.is_local else ""
        return "The certificate of %s could not be verified.%s" % (route.place, advice)
    text = "No TLS connection to %s could be made. Does it speak TLS? See --upstream-tls."
    return text % route.place


def _reaches(here: Address, there: Address, listening: Address) -> bool:
    """Whether a connection from `here` to `there` ends at the socket that listens at `listening`."""
    if there[1] != listening[1]:
        return False
    if listening[0] not in ("0.0.0.0", "::"):
        return bool(there[0] == listening[0])
    return bool(there[0] == here[0]) or ipaddress.ip_address(there[0]).is_loopback


def _connect_timeout(route: Route, config: Config) -> ProxyError:
    text = "The connection to %s was not accepted within %g seconds."
    return ProxyError(504, text % (route.place, config.connect_timeout))


class Fetched(NamedTuple):
    """The response to a request of the proxy's own: its head, and the body as far as wanted."""

    response: Response
    body: bytes


async def fetch(
    connection: Connection, lines: List[str], body: bytes, timeout: float, config: Config
) -> Fetched:
    """Send one request of our own on a new connection, which is closed afterwards.

    lines: the request line and the header fields.  Raises ProxyError 4xx or 501 if the response is
    not valid HTTP, Truncated, TimedOut after `timeout` seconds, OSError.
    """
    method = lines[0].partition(" ")[0]
    deadline = now() + timeout
    lines = lines + ["Connection: close"] * ("Connection: Upgrade" not in lines)
    head = serialise(lines, Framing("length", len(body)) if body else NO_BODY)
    try:
        connection.write([head, body])
        connection.read_deadline = deadline
        response = parse_response(await read_head(connection, False, config), method, config)
        pieces, source = [], Body(connection, response.framing, False, config)
        pieces += [bytes(piece) for piece in source.at_hand()]
        while not source.finished and source.count < _FETCH_BYTES and response.status != 101:
            pieces += [bytes(piece) for piece in await source.read(deadline - now())]
        return Fetched(response, b"".join(pieces))
    finally:
        connection.abort()


async def probe(
    upstreams: Upstreams,
    route: Route,
    target: str,
    lines: Sequence[str] = (),
    timeout: float = _FETCH_SECONDS,
) -> Fetched:
    """GET a target of the route's upstream; ProxyError 502 or 504 as for any request."""
    connection = await upstreams.connect(route)
    given = {line.partition(":")[0] for line in lines}
    usual = ["Host: " + route.authority, "Accept: text/html, */*;q=0.1", "User-Agent: port_proxy"]
    own = [line for line in usual if line.partition(":")[0] not in given]
    head = ["GET %s HTTP/1.1" % target] + own + list(lines)
    try:
        return await fetch(connection, head, b"", timeout, upstreams.config)
    except TimedOut:
        text = "No response came from %s within %g seconds." % (route.place, timeout)
        raise ProxyError(504, text)
    except (ProxyError, Truncated, OSError):
        raise ProxyError(502, "No valid HTTP came from %s." % route.place)


async def accepts_tls(upstreams: Upstreams, route: Route) -> bool:
    """Whether the upstream answers a TLS handshake with TLS."""
    context = upstream_context(verified=False)
    hello, received = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(received, hello, server_hostname="localhost").do_handshake()
    try:
        connection = await upstreams.connect(route._replace(scheme="http"))
    except ProxyError:
        return False
    try:
        connection.write([hello.read()])
        connection.read_deadline = now() + _FETCH_SECONDS
        return is_tls_record(await connection.read())
    except (TimedOut, OSError):
        return False
    finally:
        connection.abort()


def is_tls_record(data: bytes) -> bool:
    """Whether bytes begin like a handshake or an alert of TLS (RFC 8446 section 5.1)."""
    return data[:2] in (b"\x15\x03", b"\x16\x03")


def tls_advice(route: Route) -> str:
    """What to do if an upstream speaks TLS and the proxy was not told."""
    text = "The app on %s speaks TLS. Start the proxy with --upstream-tls %s"
    text %= route.place, _tls_name(route)
    return text + (
        ", and --insecure-upstream if its certificate is its own." if route.is_local else "."
    )


def _tls_name(route: Route) -> str:
    return str(route.port) if route.is_local else route.authority


# --------------------------------------------------------------------------------------------------
# Access control
# --------------------------------------------------------------------------------------------------
# A gate decides once per request, before any upstream is touched, for every method and for Upgrades
# alike.  It also removes our own credentials from what an app receives.  `TokenGate` is the gate of
# a proxy that stands alone; JupyterHub and Jupyter have gates of their own below.

_SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))  # RFC 9110 section 9.2.1
_TOKEN_FIELD = re.compile(r"(?:token|bearer)[ \t]+(.+)", re.IGNORECASE)
_NO_REFERRER = ("Referrer-Policy", "no-referrer")
# A path, and not "//host"; no backslash, which browsers take for a slash.
_LOCAL_TARGET = re.compile(r'/(?![/\\])[!"$-\[\]-~]*')
ANY_TOKEN = "any"  # as Config.token: make one at random
COOKIE_PREFIX = "port_proxy_"  # the port follows, since browsers do not keep ports apart
ENTRANCE = "/.well-known/port-proxy"  # our only path at an app's own host (RFC 8615)
_MAX_SESSIONS = 1000
_MAX_NAMES = 100
_MAX_TICKETS = 1000
_TICKET_SECONDS = 30.0  # from the ports page to an app's host
_MAX_SOURCES = 1000  # addresses whose wrong tokens are remembered
_TRIES = 10.0  # wrong tokens that an address has before it must wait; one comes back each second

ReadForm = Callable[[], Awaitable[bytes]]


def remember(table: Dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Add the latest entry to a bounded dictionary; beyond `most`, the earliest goes."""
    table.pop(key, None)
    table[key] = value
    while len(table) > most:
        del table[next(iter(table))]


def check_route(route: Route, config: Config) -> None:
    """ProxyError 403 if the host of a route is not on the allowlist."""
    if not is_allowed(route.host, config.host_allowlist):
        advice = "Start the proxy with --host-allowlist %s to allow it." % route.host
        raise ProxyError(403, "The host %s is not on the allowlist. %s" % (route.host, advice))


class Gate:
    """What all kinds of gate have in common."""

    token = ""  # what clients must show, if it is the same for all
    app_cookie = ""  # the name of the cookie that names the last app; "" for none
    cookie_marks = (COOKIE_PREFIX,)  # type: Tuple[str, ...]  # one is in the name of each of ours

    def __init__(self, config: Config) -> None:
        self.config = config

    async def respond(self, request: Request, read_form: ReadForm) -> Optional[LocalResponse]:
        """The response, if the request is for the gate itself, as a sign-in is; or None.

        read_form: reads the body of the request.  Raises ProxyError.
        """
        return None

    async def authorize(self, request: Request) -> None:
        """Return if the request may come in; raise the ProxyError that answers it otherwise."""
        raise NotImplementedError

    async def close(self) -> None:
        """End what the gate does in the background."""

    def explain(self, error: ProxyError) -> ProxyError:
        """The error with the names that its reader knows the options by."""
        return error

    def owns_token(self, token: str) -> bool:
        """Whether a token in a request is ours, and not the app's."""
        return False

    def owns_authorization(self, value: str) -> bool:
        """Whether the value of an Authorization field holds a token of ours."""
        return any(map(self.owns_token, tokens_in(value)))

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        """Whether a cookie is ours, or that of another proxy like this one under the same host name.

        Browsers do not keep ports apart.  If the app behind `route` is such a proxy itself, its own
        cookies stay.
        """
        if not name.startswith(COOKIE_PREFIX):
            return False
        of_app = COOKIE_PREFIX + str(route.port if route else "")
        return name != of_app and not name.startswith(of_app + "_app")

    def strip_cookies(self, value: str, route: Optional[Route]) -> str:
        """The value of a Cookie field without our cookies; every other byte stays."""
        if not any(mark in value for mark in self.cookie_marks):
            return value
        pairs = value.split(";")
        kept = [pair for pair in pairs if not self.owns_cookie(cookie_name(pair), route)]
        if len(kept) == len(pairs):
            return value
        if kept and kept[0] is not pairs[0]:
            kept[0] = kept[0].lstrip(" \t")
        return ";".join(kept)

    def strip_query(self, url: str) -> str:
        """A URL, or a query with its "?", without the `token` parameters that hold our token."""
        if "?" not in url or ("token" not in url and "%" not in url):
            return url
        before, hash_mark, fragment = url.partition("#")
        path, mark, query = before.partition("?")
        parameters = query.split("&")
        kept = [one for one in parameters if not any(map(self.owns_token, query_tokens("?" + one)))]
        if len(kept) == len(parameters):
            return url
        return path + (mark + "&".join(kept) if kept else "") + hash_mark + fragment

    def response_lines(self, status: int) -> Sequence[str]:
        """Header lines that the gate adds to a response of an app."""
        return ()

    def check_origin(self, request: Request) -> None:
        """Refuse cross-site requests that a page makes a browser send; ProxyError 400 or 403."""
        headers, client = request.headers, request.client
        sites = headers.get_all("sec-fetch-site")
        if "origin" not in headers.index and sites in ([], ["same-origin"], ["none"]):
            return
        origins = headers.get_all("origin")
        if origins == ["null"] and "same-origin" in sites:  # a form of a page without referrer
            origins = []
        foreign = [origin for origin in origins if not is_own_origin(origin, client.authority)]
        allowed = self.config.allow_origins
        if "*" in allowed or (foreign and _is_among(foreign[0], allowed)):
            return
        if foreign and (request.method not in _SAFE or request.is_websocket or client.app_port):
            raise _foreign(foreign[0], client, bool(self.config.trusted_proxies))
        among_apps = client.app_port or host_of(client.authority) in self.config.domains
        if not ("cross-site" in sites or (among_apps and "same-site" in sites)):
            return
        in_frame = any(dest != "document" for dest in headers.get_all("sec-fetch-dest"))
        if request.is_page_visit and not in_frame:
            return
        if foreign:
            raise _foreign(foreign[0], client, bool(self.config.trusted_proxies))
        text = "A page of another site tried to use this address (Sec-Fetch-Site)."
        raise ProxyError(403, text + _ANY_PAGE)


class TokenGate(Gate):
    """The gate of a proxy that stands alone.

    With a token: it admits a request that shows the token, and a browser that has shown it once and
    got a cookie with a random session id.  Without: it admits whoever can connect, as long as Host
    is a name that only this machine has, so that no foreign page can make its own name lead here.
    If a browser comes in on its own, by cookie or because all is open, pages of other sites cannot
    use it (`check_origin`).

    Browsers send no cookie from one host to another, so every app's host has a session of its own.
    A browser that is signed in at our host gets there with a ticket, which is valid once.
    """

    def __init__(self, config: Config, is_private: bool, port: int) -> None:
        super().__init__(config)
        self.is_private = is_private
        self.cookie_name = COOKIE_PREFIX + (str(port) if port else "unix")
        self.app_cookie = self.cookie_name + "_app" if config.whole_origin else ""
        token = config.token if config.authorize is None else ""
        if token is None:
            token = "" if is_private else ANY_TOKEN
        self.token = secrets.token_urlsafe(24) if token == ANY_TOKEN else token
        self._sessions = {}  # type: Dict[str, str]  # by session id: the host that it is for
        self._tickets = {}  # type: Dict[str, Tuple[int, float]]  # the app's port, and the deadline
        # By address and place: the tries left, when that was so, hashes of the last wrong tokens.
        self._wrong = {}  # type: Dict[Tuple[str, str], Tuple[float, float, FrozenSet[int]]]
        self._known_names = {}  # type: Dict[str, None]  # authorities that have passed

    async def respond(self, request: Request, read_form: ReadForm) -> Optional[LocalResponse]:
        client, (path, _, query) = request.client, request.target.partition("?")
        is_ours = path == ENTRANCE if client.app_port else is_home(self.config.base, path)
        if not is_ours:
            return None
        if self.token and request.method == "POST" and not client.app_port:
            self.check_origin(request)
            self._sign_in(await read_form(), client)
        sent = dict(parse_qsl(query)) if request.method == "GET" else {}
        if self.token and client.app_port:
            self.check_origin(request)
            raise self._enter(sent.get("ticket", ""), request)
        if not client.app_port and _PORT_NAME.fullmatch(sent.get("open", "")):
            await self.authorize(request)
            raise self._redirect_to_host(int(sent["open"]), client)
        return None

    async def authorize(self, request: Request) -> None:
        preflight = self.config.allow_preflight and is_preflight(request)
        if self.config.authorize is not None:
            await self.config.authorize(request, request.client, request.route)
        elif not self.token:
            for authority in {request.authority, request.client.authority}:
                self._check_host(authority)  # a page cannot choose the first, but may the second
        elif preflight or not self._check_credentials(request):
            return  # a token in the request itself is no accident
        if not preflight:
            self.check_origin(request)

    def owns_token(self, token: str) -> bool:
        return bool(self.token) and hmac.compare_digest(token.encode("utf-8"), self.token.encode())

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        ours = name == self.cookie_name or name.startswith(self.cookie_name + "_app")
        return ours or super().owns_cookie(name, route)

    def _sign_in(self, form: bytes, client: ClientInfo) -> None:
        """Raise the redirect to where the person was going, or the sign-in page again."""
        sent = dict(parse_qsl(form.decode("latin-1")))
        target = sent.get("next", "")
        if not _LOCAL_TARGET.fullmatch(target) or not is_below(self.config.base, target):
            target = self.config.base + "/"
        if not self._try("form", [sent.get("token", "").strip()], client):
            raise self._sign_in_needed("That is not the token.", target, client)
        raise ProxyError(303, "Signed in.", (("Location", target), self._new_cookie(client)))

    def _sign_in_needed(self, detail: str, target: str, client: ClientInfo) -> SignInNeeded:
        """At an app's host no token is asked for: the app's pages could read what is typed there."""
        if not client.app_port:
            return SignInNeeded(detail, target, self.config.base + "/")
        host = host_of(client.authority)
        port = client.authority[len(host) :]
        ours = "%s://%s%s" % (client.scheme, host.partition(".")[2], port)
        return SignInNeeded(detail, "%s%s/?open=%d" % (ours, self.config.base, client.app_port), "")

    def _redirect_to_host(self, port: int, client: ClientInfo) -> ProxyError:
        """The redirect to the host of a port, with a ticket if one must be signed in there."""
        url = host_form(port, client, self.config.domains)
        if not url or port > 65535:
            text = "By this name of the proxy no app has a host of its own. Start the proxy with"
            raise ProxyError(404, text + " --domain, and a name whose subdomains lead here.")
        if self.token:
            ticket = secrets.token_urlsafe(32)
            remember(self._tickets, ticket, (port, now() + _TICKET_SECONDS), _MAX_TICKETS)
            url += ENTRANCE[1:] + "?ticket=" + ticket
        return ProxyError(303, "Redirecting.", (("Location", url), _NO_REFERRER))

    def _enter(self, ticket: str, request: Request) -> ProxyError:
        """The redirect into an app's host for a browser with a ticket for it."""
        client = request.client
        port, until = self._tickets.pop(ticket, (0, 0.0))
        if port != client.app_port or now() > until:
            detail = "This sign-in link was used or has expired." if ticket else ""
            return self._sign_in_needed(detail, "/", client)
        cookie = () if self._is_signed_in(request) else (self._new_cookie(client),)
        return ProxyError(303, "Signed in.", (("Location", "/"), _NO_REFERRER) + cookie)

    def _is_signed_in(self, request: Request) -> bool:
        # A look-up by hash: how long it takes reveals nothing about 256 random bits.
        host = host_of(request.client.authority)
        sessions = cookie_values(request.headers, self.cookie_name)
        return any(self._sessions.get(session) == host for session in sessions)

    def _check_host(self, authority: str) -> None:
        """ProxyError 403 for a name that a foreign page could have made lead here."""
        if authority in self._known_names:
            return
        host = host_of(authority)
        domains = self.config.domains
        try:
            address = ipaddress.ip_address(host.strip("[]"))
            known = (
                address.is_loopback or not self.is_private
            )  # nobody can make an address lead here
        except ValueError:
            known = host in ("", "localhost") or host.endswith(".localhost")
            known = known or any(host == one or host.endswith("." + one) for one in domains)
            known = known or (not self.is_private and host == socket.gethostname().lower())
        patterns = self.config.allow_hostnames
        if not known and not any(fnmatch.fnmatchcase(host, pattern) for pattern in patterns):
            advice = " Start the proxy with --allow-hostname %s if it leads here." % host
            text = "The host name %s is not allowed." % host
            raise ProxyError(403, text + (advice if _PLAIN_HOST.fullmatch(host) else ""))
        if len(self._known_names) < _MAX_NAMES:
            self._known_names[authority] = None

    def _check_credentials(self, request: Request) -> bool:
        """Whether the cookie, which browsers send on their own, lets the request in.

        False if a token does.  ProxyError 302, 401, 403 or 429 otherwise.
        """
        client, headers = request.client, request.headers
        signed_in = self._is_signed_in(request)
        shown, wrong = False, ""
        if not signed_in:
            fields = headers.get_all("authorization")
            in_fields = [token for value in fields for token in tokens_in(value)]
            # What a foreign page makes a browser ask for must not use up its user's tries.
            is_foreign = "cross-site" in headers.get_all("sec-fetch-site")
            in_query = (
                [] if is_foreign and not request.is_page_visit else query_tokens(request.target)
            )
            shown = self._try("fields", in_fields, client) or self._try("query", in_query, client)
            wrong = "Invalid token. " if in_fields or in_query else ""
        clean = self.strip_query(request.target)
        if (signed_in or shown) and clean != request.target and request.is_page_visit:
            cookie = () if signed_in else (self._new_cookie(client),)
            location = "/." + clean if _OTHER_HOST.match(clean) else clean
            raise ProxyError(302, "Signed in.", (("Location", location),) + cookie)
        if signed_in or shown:
            return signed_in
        if request.is_websocket:
            text = "A WebSocket needs a signed-in browser, or the proxy's token."
            raise ProxyError(403, wrong + text)
        if request.is_page_visit:
            prefix = request.route.prefix if request.route and request.is_unprefixed else ""
            raise self._sign_in_needed(wrong.strip(), prefix + request.target, client)
        text = "The proxy's token is needed, as 'Authorization: token TOKEN'."
        raise ProxyError(401, wrong + text, CHALLENGE)

    def _try(self, where: str, tokens: Sequence[str], client: ClientInfo) -> bool:
        """Whether one of `tokens` is right; ProxyError 429 after too many wrong ones.

        They are counted by the place where they stand, and the same wrong one counts once: an app's
        own token, sent again and again to a proxy that was started anew, keeps nobody out.
        """
        time = now()
        left, since, last = self._wrong.pop((client.address, where), (_TRIES, time, frozenset()))
        left = min(_TRIES, left + time - since)
        seen = {hash(token) for token in tokens}
        is_new = not seen <= last
        if tokens and is_new and left < 1:
            self._wrong[client.address, where] = left, time, last
            text = "Too many wrong tokens came from there. Try again shortly."
            raise ProxyError(429, text, (("Retry-After", "5"),))
        right = any(map(self.owns_token, tokens))
        if tokens and is_new and not right:
            left, last = left - 1, frozenset(seen if len(last) >= _TRIES else seen | last)
        if left < _TRIES:
            remember(self._wrong, (client.address, where), (left, time, last), _MAX_SOURCES)
        return right

    def _new_cookie(self, client: ClientInfo) -> Tuple[str, str]:
        session = secrets.token_urlsafe(32)
        remember(self._sessions, session, host_of(client.authority), _MAX_SESSIONS)
        secure = "; Secure" if client.scheme == "https" else ""
        path = "/" if client.app_port or self.config.whole_origin else self.config.base or "/"
        text = "%s=%s; Path=%s; HttpOnly; SameSite=Lax%s"
        return "Set-Cookie", text % (self.cookie_name, session, path, secure)


def is_preflight(request: Request) -> bool:
    """Whether this is a CORS preflight, which never carries credentials."""
    headers = request.headers
    is_question = "access-control-request-method" in headers.index and "origin" in headers.index
    return request.method == "OPTIONS" and is_question


# Safe to copy into a shell; no real name looks otherwise.
_PLAIN_HOST = re.compile(r"[a-z0-9_][a-z0-9_.-]*|\[[0-9a-f:.]+\]")
_PLAIN_ORIGIN = re.compile("https?://(?:%s)(?::[0-9]{1,5})?" % _PLAIN_HOST.pattern)


def normal_origin(origin: str) -> str:
    """An origin in lower case and without its scheme's default port; ValueError if it is none."""
    match = _HTTP_URL.fullmatch(origin.lower())
    if not match or match.group(3) or not is_authority(match.group(2)):
        text = "an origin is a scheme, host and port such as https://a.example.org, not %r"
        raise ValueError(text % origin)
    return "%s://%s" % (match.group(1), _without(_DEFAULT_PORTS[match.group(1)], match.group(2)))


_ANY_PAGE = " Start the proxy with --allow-origin '*' if any page may."


def _foreign(origin: str, client: ClientInfo, has_server_in_front: bool) -> ProxyError:
    here = client.authority or "a server without a name"
    if not _PLAIN_ORIGIN.fullmatch(origin.lower()):  # null, of a file or a sandbox
        text = "A page without a proper origin may not use this address (%s)." % here
        return ProxyError(403, text + _ANY_PAGE)
    text = (
        "A page of another site, {0}, may not use this address ({1}). Start the proxy with"
        " --allow-origin {0} if it may."
    ).format(normal_origin(origin), here)
    if has_server_in_front:
        text += " If that is this site, the server in front must pass Host on unchanged."
    return ProxyError(403, text)


def _is_among(origin: str, allowed: Sequence[str]) -> bool:
    try:
        return normal_origin(origin) in allowed
    except ValueError:  # "null", for one
        return False


def query_tokens(target: str) -> List[str]:
    """The values of all `token` parameters in the query of a target."""
    parameters = [one.partition("=") for one in target.partition("?")[2].split("&")]
    return [unquote(value) for name, _, value in parameters if unquote(name) == "token"]


def tokens_in(authorization: str) -> List[str]:
    """The token in the value of an Authorization field, in a list; [] if it has none."""
    match = _TOKEN_FIELD.fullmatch(authorization)
    return [match.group(1)] if match else []


# --------------------------------------------------------------------------------------------------
# JupyterHub
# --------------------------------------------------------------------------------------------------
# If a JupyterHub started this server, the Hub decides who comes in.  Browsers sign in there by OAuth
# (RFC 6749 section 4.1, RFC 7636); programs show a token of the Hub.  The server reports activity,
# so that the Hub can stop servers that nobody uses.

_BELIEVED = 60.0  # seconds that the Hub's word on a token is believed
_LOGIN_SECONDS = 600  # that a person may take to sign in
_MAX_REMEMBERED = 1000  # sessions and tokens, each
_MAX_LOGINS = 10000  # under way; anybody can begin one
_MAX_QUESTIONS = 64  # that the Hub is asked at once
_MAX_TOKENS = 8  # different ones in a request
_HUB_PATIENCE = 10.0  # seconds for an answer of the Hub
_HUB_SESSION = (
    "jupyterhub-session-id"  # the Hub's own cookie, which it changes when somebody signs out
)
_HUB_COOKIES = "jupyterhub-"
_HUB_TOKEN = re.compile(
    "[!-~]{1,1024}"
)  # anything else is an app's own, and must not get into the head of a request
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

    def __init__(self, hub: Hub, config: Config, deadlines: Deadlines) -> None:
        self.hub = hub
        self.config = config
        self.deadlines = deadlines
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
        time = now()
        asked, since = self._asked.get((token, session), (None, 0.0))
        if (
            asked is None
            or time - since > _BELIEVED
            or (asked.done() and (asked.cancelled() or asked.exception()))
        ):
            if len(self.under_way) >= _MAX_QUESTIONS:
                raise ProxyError(
                    503, "There are too many questions to the Hub. Try again shortly.", _SHORTLY
                )
            asked = asyncio.ensure_future(self._ask_user(token))
            self.under_way.add(asked)
            asked.add_done_callback(self._answered)
            remember(self._asked, (token, session), (asked, time), _MAX_REMEMBERED)
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
        kind = ["Content-Type: application/x-www-form-urlencoded"]
        url = self.hub.api_url + "/oauth2/token"
        status, _, answer = await self._call("POST", url, kind, urlencode(form))
        token = answer.get("access_token")
        if status != 200 or not isinstance(token, str):
            raise ProxyError(
                403,
                "The Hub did not take this sign-in for valid. Open %s/ again." % self.hub.prefix,
            )
        return token

    async def version(self) -> str:
        """The Hub's version; ""  where it has just not been told."""
        if not self._version and now() >= self._next_try:
            self._next_try = now() + 5
            _, headers, _ = await self._call("GET", self.hub.api_url + "/", [])
            self._version = headers.get("x-jupyterhub-version")
        return self._version

    async def report_activity(self, moment: str) -> None:
        """Say that this server was last used at `moment` (ISO 8601, UTC)."""
        server = {self.hub.server_name: {"last_activity": moment}}
        lines = ["Authorization: token " + self.hub.api_token, "Content-Type: application/json"]
        body = json.dumps({"servers": server, "last_activity": moment})
        status, _, _ = await self._call("POST", self.hub.activity_url, lines, body)
        if status >= 400:
            raise ProxyError(503, "The Hub refused a report of activity (%d)." % status)

    async def _ask_user(self, token: str) -> Optional[HubUser]:
        status, _, answer = await self._call(
            "GET", self.hub.api_url + "/user", ["Authorization: token " + token]
        )
        if status in (401, 403, 404):
            return None
        name, scopes = answer.get("name"), answer.get("scopes")
        if status != 200 or not isinstance(name, str) or not isinstance(scopes, list):
            raise ProxyError(503, "The Hub did not say who you are (%d)." % status, _SHORTLY)
        return HubUser(name, frozenset(map(str, scopes)))

    async def _call(
        self, method: str, url: str, lines: List[str], body: str = ""
    ) -> Tuple[int, Headers, Dict[str, Any]]:
        """One request: the status, the headers, and the members of the JSON object in the body."""
        parts = urlsplit(url)
        own = ["%s %s HTTP/1.1" % (method, parts.path), "Host: " + parts.netloc]
        own.append("Accept: application/json")
        try:
            connection = await asyncio.wait_for(self._connect(url), _HUB_PATIENCE)
            fetched = await fetch(
                connection, own + lines, body.encode(), _HUB_PATIENCE, self.config
            )
            response = fetched.response
            answer = json.loads(fetched.body.decode() or "{}") if response.status < 400 else {}
        except (
            ProxyError, Truncated, TimedOut, OSError, asyncio.TimeoutError, ValueError
        ) as error:  # fmt: skip
            reason = getattr(error, "strerror", None) or type(error).__name__
            logger.warning("the Hub could not be asked at %s: %s", url, reason)
            text = "The Hub, which decides who may come in, does not answer. Try again shortly."
            raise ProxyError(503, text, _SHORTLY)
        return response.status, response.headers, answer if isinstance(answer, dict) else {}

    async def _connect(self, url: str) -> Connection:
        parts = urlsplit(url)
        port = parts.port or int(_DEFAULT_PORTS[parts.scheme][1:])
        tls = {"ssl": self._tls()} if parts.scheme == "https" else {}  # type: Dict[str, Any]
        connection = Connection(self.deadlines)
        loop = self.deadlines.loop
        await loop.create_connection(lambda: connection, parts.hostname or "", port, **tls)
        return connection

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

    def __init__(self, config: Config, deadlines: Deadlines) -> None:
        super().__init__(config)
        assert config.hub is not None
        self.hub = config.hub
        self.api = HubApi(config.hub, config, deadlines)
        self.deadlines = deadlines
        self.callback_path = urlsplit(self.hub.callback_url).path
        self.cookie_marks += (_HUB_COOKIES,)
        host = "__Host-" if self.hub.host_cookies else ""
        self.cookie_name = (
            host + COOKIE_PREFIX + hashlib.sha256(self.hub.prefix.encode()).hexdigest()[:16]
        )
        # By session id: the token, and the Hub session that it goes with, None for any.
        self._sessions: Dict[str, Tuple[str, Optional[str]]] = {}
        self._logins: Dict[str, HubLogin] = {}  # by state
        self._ours: Dict[str, None] = {}  # tokens that the Hub knows
        self._last_activity = ""
        deadlines.on_activity = self._note_activity
        self._reporting = (
            asyncio.ensure_future(self._report_activity()) if self.hub.activity_url else None
        )

    async def respond(self, request: Request, read_form: ReadForm) -> Optional[LocalResponse]:
        if request.method not in ("GET", "HEAD"):
            return None
        if is_home(self.hub.prefix + "/api", request.target):
            return await self._ready()
        if is_home(self.callback_path, request.target):
            await self._end_login(request)
        if is_home(self.hub.prefix, request.target):
            await self.authorize(request)
            home = self.hub.home or self.config.base + "/"
            raise ProxyError(302, "Redirecting.", (("Location", home),))
        return None

    async def authorize(self, request: Request) -> None:
        client, headers = request.client, request.headers
        hub_session = "".join(cookie_values(headers, _HUB_SESSION)[:1])
        signed_in = await self._user_of_session(request, hub_session)
        shown = await self._user_of_token(request, hub_session)
        user = shown[1] if shown else signed_in
        if user is None:
            if request.is_websocket:
                text = "A WebSocket needs a browser that is signed in at the Hub, or a token of it."
                raise ProxyError(403, text)
            if request.is_page_visit:
                raise self._begin_login(request.target, client)
            text = "Sign in at the Hub, or send a token of it as 'Authorization: token TOKEN'."
            raise ProxyError(403, text, CHALLENGE)
        self._check_access(user)
        clean = self.strip_query(request.target)
        if clean != request.target and request.is_page_visit:
            cookie = ()  # type: Fields
            if shown and not signed_in:
                cookie = (self._new_session(shown[0], client, hub_session),)
            raise ProxyError(302, "Signed in.", (("Location", clean),) + cookie)
        if not shown:  # a browser sends the cookie on its own; a token is no accident
            self.check_origin(request)

    async def _user_of_session(self, request: Request, hub_session: str) -> Optional[HubUser]:
        """Who is signed in here in this browser, and at the Hub still."""
        for session in cookie_values(request.headers, self.cookie_name):
            token, bound = self._sessions.get(session, ("", ""))
            if token and bound in (None, hub_session):
                user = await self.api.user_of(token, hub_session)
                if user is not None:
                    return user
            self._sessions.pop(session, None)  # signed out
        return None

    async def _user_of_token(
        self, request: Request, hub_session: str
    ) -> Optional[Tuple[str, HubUser]]:
        """The first token of the Hub that is shown, and whose it is.  All are looked up: none may reach the app."""
        fields = request.headers.get_all("authorization")
        shown = [token for value in fields for token in tokens_in(value)]
        if "cross-site" not in request.headers.get_all("sec-fetch-site"):
            shown += query_tokens(request.target)  # a foreign page could sign in somebody else here
        found = None
        for token in all_tokens(request):
            user = await self.api.user_of(token, hub_session)
            if user is not None:
                remember(self._ours, token, None, _MAX_REMEMBERED)
                found = found or ((token, user) if token in shown else None)
        return found

    def owns_token(self, token: str) -> bool:
        return token in self._ours or token == self.hub.api_token

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        bare = name[len("__Host-") :] if name.startswith("__Host-") else name
        return (
            bare.startswith(_HUB_COOKIES)
            or name == self.cookie_name
            or super().owns_cookie(bare, route)
        )

    async def close(self) -> None:
        self.deadlines.on_activity = None
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

    def _begin_login(self, target: str, client: ClientInfo) -> ProxyError:
        """The redirect to the Hub, which comes back to `_end_login`."""
        state, verifier, browser = (secrets.token_urlsafe(32) for _ in range(3))
        path, mark, query_there = target.partition("?")
        # Spelt as the cookie's Path is, for browsers compare the two undecoded.
        target = self.hub.prefix + (path_below(self.hub.prefix, path) or "/") + mark + query_there
        if not _LOCAL_TARGET.fullmatch(target) or len(target) > 2048:
            target = self.hub.prefix + "/"
        until = now() + _LOGIN_SECONDS
        remember(self._logins, state, HubLogin(target, verifier, browser, until), _MAX_LOGINS)
        challenge = (
            base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest())
            .decode()
            .rstrip("=")
        )
        query = {
            "client_id": self.hub.client_id,
            "redirect_uri": self.hub.callback_url,
            "response_type": "code",
            "state": state,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        cookie = self._cookie(
            self._login_cookie(state), browser, self.callback_path, client, _LOGIN_SECONDS
        )
        return ProxyError(
            302,
            "Sign in at the Hub.",
            (("Location", self.hub.authorize_url + "?" + urlencode(query)), cookie),
        )

    async def _end_login(self, request: Request) -> None:
        """Take what the Hub sent a browser back with; raises the redirect to where the person was going."""
        sent = dict(parse_qsl(request.target.partition("?")[2]))
        state = sent.get("state", "")
        login = self._logins.pop(state, None)
        name = self._login_cookie(state)
        again = " Open %s/ again." % self.hub.prefix
        if login is None or now() > login.until:
            raise ProxyError(
                403, "This sign-in is over: it was used, or took longer than ten minutes." + again
            )
        shown = [value.encode("latin-1") for value in cookie_values(request.headers, name)]
        if not any(hmac.compare_digest(value, login.browser.encode()) for value in shown):
            raise ProxyError(
                403, "This sign-in was begun in another browser, or cookies are blocked." + again
            )
        if "code" not in sent:
            error = sent.get("error", "")
            reason = error if _OAUTH_ERROR.fullmatch(error) else "no reason given"
            raise ProxyError(403, "The Hub did not sign you in: %s.%s" % (reason, again))
        token = await self.api.token_for(sent["code"], login.verifier)
        user = await self.api.user_of(
            token, "".join(cookie_values(request.headers, _HUB_SESSION)[:1])
        )
        if user is None:
            raise ProxyError(403, "The Hub did not say who you are." + again)
        remember(self._ours, token, None, _MAX_REMEMBERED)
        self._check_access(user)
        done = self._cookie(name, "", self.callback_path, request.client, 0)
        raise ProxyError(
            302,
            "Signed in.",
            (("Location", login.target), self._new_session(token, request.client), done),
        )

    async def _ready(self) -> LocalResponse:
        """What the Hub looks for to see whether this server is up, and of the same version as itself."""
        try:
            version = await self.api.version()
        except ProxyError:  # we are up all the same
            version = ""
        fields = (("Content-Type", "application/json"), ("Content-Length", "2"))
        return LocalResponse(
            200, fields + ((("X-JupyterHub-Version", version),) if version else ()), b"{}"
        )

    def _new_session(
        self, token: str, client: ClientInfo, hub_session: Optional[str] = None
    ) -> Tuple[str, str]:
        """The cookie of a new session.  The Hub forgets the token of a login when the person signs out there; one that
        was shown lives on, and so its session is over here when that of the Hub is."""
        session = secrets.token_urlsafe(32)
        remember(self._sessions, session, (token, hub_session), _MAX_REMEMBERED)
        return self._cookie(self.cookie_name, session, self.hub.prefix + "/", client)

    def _login_cookie(self, state: str) -> str:
        """The name of the cookie of one login; logins in several tabs do not meet."""
        return "%s_%s" % (self.cookie_name, hashlib.sha256(state.encode()).hexdigest()[:16])

    def _cookie(
        self, name: str, value: str, path: str, client: ClientInfo, seconds: Optional[int] = None
    ) -> Tuple[str, str]:
        attributes = {
            "Path": "/" if self.hub.host_cookies else path,
            "HttpOnly": "",
            "SameSite": "Lax",
        }
        attributes.update(self.hub.cookie_options)
        if seconds is not None:
            attributes["Max-Age"] = str(seconds)
        if self.hub.host_cookies or self.hub.is_secure or client.scheme == "https":
            attributes["Secure"] = ""
        parts = [
            key + ("=" + attribute if attribute else "") for key, attribute in attributes.items()
        ]
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


def all_tokens(request: Request) -> List[str]:
    """The different tokens in a request, wherever an app would find them; ProxyError 400 for far too
    many."""
    headers = request.headers
    found = [token for value in headers.get_all("authorization") for token in tokens_in(value)]
    found += query_tokens(request.target)
    for value in headers.get_all("referer"):
        found += query_tokens(value.partition("#")[0])
    tokens = list(dict.fromkeys(found))
    if len(tokens) > _MAX_TOKENS:
        text = "There are more than %d different tokens in this request." % _MAX_TOKENS
        raise ProxyError(400, text)
    return tokens


# --------------------------------------------------------------------------------------------------
# Exchange
# --------------------------------------------------------------------------------------------------
# One request and its response, from the parsed head to the last byte.  `Exchange.run` is the story
# of a request.  Errors are raised as ProxyError, or as ClientGone if nobody is there to answer; the
# server answers them.
#
# An EOF of the client is ambiguous: it may have left, or have closed its writing side only, as `nc`
# does.  From then on, the app may be silent for `_HALF_CLOSED_SECONDS`.  A reset, and any close over
# TLS, ends the request at once.

_HALF_CLOSED_SECONDS = 2.0
_MAX_FORM_BYTES = 8192
_ALLOW = (("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),)


class Exchange:
    """One request of a client, and its response.

    status: of the final response, once its head has gone out; 0 before.  keep_alive: the client's
    connection may carry another request.  tunnel: what took both connections over after a 101.
    For the log: `started`, `sent` (bytes of the response body), `failure` (in words).
    """

    def __init__(
        self, proxy: "PortProxy", gate: Gate, client: Connection, request: Request
    ) -> None:
        self.proxy = proxy
        self.gate = gate
        self.config = gate.config
        self.client = client
        self.request = request
        self.body = Body(client, request.framing, request.framing is CHUNKED, self.config)
        self.keep_alive = request.keep_alive
        self.started = now()
        self.status = self.sent = 0
        self.failure = ""
        self.tunnel = None  # type: Optional[Tunnel]
        self._silence = FOREVER  # seconds that the upstream may be silent
        self._sender = None  # type: Optional[asyncio.Task[None]]
        self._client_failure = None  # type: Optional[Exception]

    async def run(self) -> None:
        """Serve the request; ProxyError if it must be answered, ClientGone if nobody is there."""
        if (
            self.request.route is None or self.request.client.app_port
        ):  # it may mean the gate itself
            response = await self.gate.respond(self.request, self._read_form)
            if response is not None:
                await self.respond(response)
                return
        request = self.request = find_app(self.request, self.config, self.gate.app_cookie)
        await self.gate.authorize(request)
        self.client.state = ACTIVE
        self.client.deadlines.is_active = True
        if request.route is not None:
            await self._serve(request.route)
        elif request.target == "*":
            await self.respond(LocalResponse(204, _ALLOW))
        elif request.method in ("GET", "HEAD"):
            await self._show_ports()
        else:
            raise ProxyError(405, "This page can only be read.", (("Allow", "GET, HEAD"),))

    async def _serve(self, route: Route) -> None:
        """Send the request to its upstream, on a pooled connection if there is one."""
        request, gate, upstreams = self.request, self.gate, self.proxy.upstreams
        check_route(route, self.config)
        if request.is_websocket:
            self._check_websocket()
        elif request.is_unprefixed and can_be_redirected(request):
            await self._redirect_into_prefix()
            return
        elif not request.path and not route.absolute and request.method in ("GET", "HEAD"):
            location = route.prefix + "/" + gate.strip_query(request.query)
            await self.respond(redirect_response(location))
            return
        if request.is_unprefixed:
            request = self.request = with_own_cookies(request, gate.app_cookie)
        # The part of the body that is here is checked before an upstream is taken.
        pieces = [request_for_upstream(request, gate)] + self.body.at_hand()
        pooled = upstreams.take(route, request.is_replayable)
        if pooled is None or not await self._forward(pooled, pieces, request.is_replayable):
            await self._forward(await upstreams.connect(route), pieces, False)

    def _check_websocket(self) -> None:
        if self.request.framing is not NO_BODY:
            raise ProxyError(400, "A WebSocket handshake has no body.")
        if len(self.proxy.tunnels) >= self.config.max_tunnels:
            raise ProxyError(503, "There are too many open WebSockets.", (("Retry-After", "10"),))

    async def _forward(self, upstream: Connection, pieces: Pieces, may_retry: bool) -> bool:
        """Exchange the request for its response on one connection; then pool or close it.

        False if the connection turned out to be stale and the request may be sent on another.
        """
        is_reusable = False
        try:
            self._watch_client(upstream)
            upstream.write(pieces)
            if not self.body.finished:
                self._sender = upstream.deadlines.loop.create_task(self._send_body(upstream))
            response = await self._read_response(upstream)
            if response.status == 101:
                await self._open_tunnel(upstream, response)
            else:
                is_reusable = await self._relay(upstream, response)
        except (ProxyError, Truncated, TimedOut, OSError) as error:
            if self._client_failure is not None:
                raise self._client_failure
            if may_retry and not upstream.was_heard and not isinstance(error, TimedOut):
                return False
            raise await self._explain(error, upstream)
        finally:
            self.client.watcher = None
            if self._sender is not None:
                await self._stop_sending(self._sender)
            if is_reusable and self.body.finished and self.request.route is not None:
                self.proxy.upstreams.give(self.request.route, upstream)
            elif self.tunnel is None:
                upstream.abort()
        return True

    # The client may leave at any time.

    def _watch_client(self, upstream: Connection) -> None:
        """Be told when the client ends its side; it may have done so already."""
        self.client.watcher = functools.partial(self._client_stirred, upstream)
        if self.client.ended:
            self._client_stirred(upstream, self.client)
        if self._client_failure is not None:
            raise self._client_failure

    def _client_stirred(self, upstream: Connection, client: Connection) -> None:
        """Data or EOF has come from the client."""
        if not client.ended:
            return
        if client.failure is not None or client.transport.is_closing():
            self._client_failure = self._client_failure or ClientGone()
            upstream.abort()
        else:
            self._silence = _HALF_CLOSED_SECONDS
            upstream.read_deadline = min(upstream.read_deadline, now() + self._silence)

    # The request body goes on while the response is already awaited.

    async def _send_body(self, upstream: Connection) -> None:
        timeout = self.config.stall_timeout
        try:
            while not self.body.finished:
                pieces = await self.body.read(timeout)
                upstream.deadlines.is_active = True
                if pieces:
                    upstream.write(pieces)
                    try:
                        await upstream.drain(timeout)
                    except OSError:
                        return  # it takes no more, but may have sent its response
            if not self.status:
                upstream.read_deadline = self._response_deadline()
        except (ProxyError, Truncated, TimedOut, OSError) as error:
            if isinstance(error, TimedOut):
                error = ProxyError(408, "The request body stopped for %g seconds." % timeout)
            self._client_failure = error if isinstance(error, ProxyError) else ClientGone()
            upstream.abort()

    async def _stop_sending(self, sender: "asyncio.Task[None]") -> None:
        if not sender.done():
            sender.cancel()
            await asyncio.wait([sender])
        if not sender.cancelled() and sender.exception() is not None:
            logger.error("internal error: %r", sender.exception())

    def _is_sending(self) -> bool:
        return self._sender is not None and not self._sender.done()

    def _response_deadline(self) -> float:
        return now() + min(self.config.response_timeout, self._silence)

    # The response.

    async def _read_response(self, upstream: Connection) -> Response:
        """The final response or a 101; other interim responses are passed on as they come."""
        for _ in range(self.config.max_interim_responses + 1):
            upstream.read_deadline = FOREVER if self._is_sending() else self._response_deadline()
            head = await read_head(upstream, False, self.config)
            upstream.read_deadline = FOREVER
            response = parse_response(head, self.request.method, self.config)
            if response.status >= 200 or response.status == 101:
                return response
            if self.request.minor == "1":  # RFC 9110 section 15.2
                lines = response_lines(response, self.request, self.gate)
                self.client.write([serialise(lines, NO_BODY)])
                await self._drain()
        text = "It sent more than %d interim responses." % self.config.max_interim_responses
        raise ProxyError(502, text)

    async def _relay(self, upstream: Connection, response: Response) -> bool:
        """Pass the response on as it comes; whether the upstream's connection can be reused."""
        client, request, came_as = self.client, self.request, response.framing
        sent_as = came_as
        if came_as is CHUNKED or came_as is UNTIL_CLOSE:
            sent_as = CHUNKED if request.minor == "1" else UNTIL_CLOSE
        self.keep_alive = self._may_keep_alive() and sent_as is not UNTIL_CLOSE
        client.ends_body = sent_as is UNTIL_CLOSE
        body = Body(upstream, came_as, sent_as is CHUNKED, self.config)
        # A body that is malformed from the start is refused before the status has gone out.
        pieces = body.at_hand()
        head = self._response_head(response, sent_as)
        self._note_title(response, body, pieces)
        self.status = response.status
        client.write([head] + pieces)
        while not body.finished:
            self.sent = body.count
            await self._drain()
            pieces = await body.read(self._silence)
            upstream.deadlines.is_active = True
            if not self.sent:
                self._note_title(response, body, pieces)
            if pieces:
                client.write(pieces)
        self.sent = body.count
        await self._drain()
        return response.is_reusable

    def _response_head(self, response: Response, sent_as: Framing) -> bytes:
        """The head that the client gets."""
        lines = response_lines(response, self.request, self.gate)
        cookie = self.gate.app_cookie
        if cookie:
            lines += cookies_for_unprefixed(self.request, response, lines, cookie)
        if not self.keep_alive and response.status >= 200:
            lines.append("Connection: close")
        return serialise(lines, sent_as)

    def _note_title(self, response: Response, body: Body, pieces: Pieces) -> None:
        if self.request.is_page_visit and body.count and self.request.route is not None:
            data = b"".join(pieces[1:] if body.in_chunks else pieces)
            self.proxy.titles.note(self.request.route, response, data)

    def _may_keep_alive(self) -> bool:
        """Whether the client may send another request behind the response that begins now.

        After an early response, the rest of the request body may never be read.
        """
        is_read = self.body.finished and not self._is_sending()
        return self.keep_alive and is_read and not self.proxy.is_stopping

    async def _drain(self) -> None:
        try:
            await self.client.drain(self.config.stall_timeout)
        except OSError:
            raise ClientGone()

    async def _open_tunnel(self, upstream: Connection, response: Response) -> None:
        """Send the upstream's 101 to the client, then let a tunnel have both connections."""
        is_upgrade = "upgrade" in response.connection
        is_websocket = "websocket" in response.headers.tokens("upgrade")
        if not self.request.is_websocket or not is_upgrade or not is_websocket:
            text = "It switched protocols (101) to something that was not asked for."
            raise ProxyError(502, text)
        self.keep_alive = False
        await upstream.drain(self.config.stall_timeout)
        self.status = 101
        self.client.write([self._response_head(response, NO_BODY)])
        await self._drain()
        self.client.watcher = None
        timeout, tunnels = self.config.stall_timeout, self.proxy.tunnels
        self.tunnel = Tunnel(self.client, upstream, timeout, tunnels)
        await self.tunnel.start(self.client, upstream)

    # Failures.

    async def _explain(self, error: Exception, upstream: Connection) -> Exception:
        """The ProxyError for a failure of the upstream, or ClientGone."""
        route, is_page = self.request.route, self.request.is_page_visit
        assert route is not None
        if isinstance(error, TimedOut):
            if self.status and self.client.ended:
                return ClientGone()
            if self.status:
                text = "The app on %s stopped in the middle of its response."
                return ProxyError(504, text % route.place)
            timeout = min(self.config.response_timeout, self._silence)
            text = "No response came from %s within %g seconds." % (route.place, timeout)
            return ProxyError(504, text + " The client has closed its side." * self.client.ended)
        if route.scheme == "http" and (
            is_tls_record(upstream.buffer)
            or (
                is_page
                and not upstream.was_heard
                and await accepts_tls(self.proxy.upstreams, route)
            )
        ):
            return ProxyError(502, tls_advice(route))
        if isinstance(error, ProxyError):
            text = "The response of %s is not valid HTTP. %s"
            return ProxyError(502, text % (route.place, error.detail))
        ended = "closed" if isinstance(error, Truncated) else "reset"
        if upstream.was_heard:
            text = "The app on %s %s the connection in the middle of its response."
            return ProxyError(502, text % (route.place, ended))
        text = "The app on %s %s the connection without a response." % (route.place, ended)
        if is_page or route.scheme == "https":
            return ProxyError(502, text + " Its log may say why.")
        advice = " If it speaks TLS, start the proxy with --upstream-tls %s." % _tls_name(route)
        return ProxyError(502, text + advice)

    def cut_short(self) -> None:
        """End a response that cannot be finished, so that the client sees that it is incomplete."""
        self.keep_alive = False
        if self.client.ends_body:
            self.client.abort()
        else:
            self.client.close()  # the rest of the length, or the last chunk, is missing

    # Responses of our own.

    async def respond(self, response: LocalResponse) -> None:
        """Send a response of our own."""
        self.keep_alive = self._may_keep_alive()
        is_head = self.request.method == "HEAD"
        self.status = response.status
        self.client.write([local_response(response, self.keep_alive, is_head)])
        try:
            await self.client.drain(self.config.head_timeout)  # it is short, and may go to anybody
        except OSError:
            raise ClientGone()
        self.sent = 0 if is_head else len(response.body)

    async def respond_error(self, error: ProxyError) -> None:
        """Say what was wrong: as a page to a person, as plain text to anybody else."""
        request = self.request
        shown = self.gate.explain(error)
        self.failure = shown.detail if shown.status >= 400 else ""
        if isinstance(error, SignInNeeded):
            await self.respond(sign_in_response(error))
        elif isinstance(error, NotListening) and request.is_page_visit:
            await self.respond(waiting_response(shown, error.route.port))
        else:
            as_html = request.is_navigation and request.method in ("GET", "HEAD", "POST")
            await self.respond(error_response(shown, as_html))

    async def _redirect_into_prefix(self) -> None:
        """Redirect an unprefixed request once its body has come; browsers read no response before."""
        while not self.body.finished and "expect" not in self.request.headers.index:
            await self.body.read(self.config.stall_timeout)
        await self.respond(redirect_into_prefix(self.request, self.gate))

    async def _show_ports(self) -> None:
        config, client = self.config, self.request.client
        port = dict(parse_qsl(self.request.target.partition("?")[2])).get("port")
        if port is not None:  # typed into the page
            route = find_route(config.base, "%s/%s/" % (config.base, port.strip()))[0]
            location = (route.prefix if route else config.base) + "/"
            raise ProxyError(303, "Redirecting.", (("Location", location),))
        own = {port for _, port in self.proxy.upstreams.listening}
        found = await self.proxy.lookout.listeners(self.client.deadlines.loop)
        ports = [one for one in found if one.port not in own]
        hosts = {one.port: host_form(one.port, client, config.domains) for one in ports}
        if self.gate.token:  # the gate signs in there
            sign_in = config.base + "/?open=%d"
            hosts = {number: sign_in % number if url else "" for number, url in hosts.items()}
        view = PortsView(config.base, ports, self.proxy.titles.of(ports), hosts)
        await self.respond(ports_response(view, self.request))

    async def _read_form(self) -> bytes:
        """The whole body of a request to the gate."""
        timeout = self.config.head_timeout
        until, data = now() + timeout, b""
        self.body.in_chunks = False
        try:
            while not self.body.finished:
                data += b"".join(self.body.at_hand() or await self.body.read(until - now()))
                if len(data) > _MAX_FORM_BYTES:
                    raise ProxyError(413, "This is more than a sign-in page sends.")
        except TimedOut:
            text = "The sign-in did not arrive within %g seconds." % timeout
            raise ProxyError(408, text)
        return data


def local_response(response: LocalResponse, keep_alive: bool, is_head: bool = False) -> bytes:
    """The bytes of a response of our own."""
    lines = ["HTTP/1.1 %d %s" % (response.status, reason_phrase(response.status))]
    lines += ["%s: %s" % field for field in response.fields]
    if not keep_alive:
        lines.append("Connection: close")
    return serialise(lines, NO_BODY) + (b"" if is_head else response.body)


class Tunnel:
    """Two connections whose bytes go to each other as they come, until both sides have ended.

    An EOF of one side is passed on; a failure of one side ends both.  tunnels: the set of the open
    ones, which this one joins.  on_end: called without arguments when it has ended.
    """

    __slots__ = ("client", "on_end", "timeout", "tunnels", "upstream")

    def __init__(
        self, client: Connection, upstream: Connection, timeout: float, tunnels: "Set[Tunnel]"
    ) -> None:
        self.timeout = timeout
        self.client = TunnelEnd(client, upstream, self)
        self.upstream = TunnelEnd(upstream, client, self)
        self.client.peer, self.upstream.peer = self.upstream, self.client
        self.on_end = None  # type: Optional[Callable[[], None]]
        self.tunnels = tunnels
        tunnels.add(self)

    async def start(self, client: Connection, upstream: Connection) -> None:
        """Take both connections over; the bytes that were read from them go first."""
        connections = client.deadlines.connections
        ends = ((self.client, client), (self.upstream, upstream))
        for end, connection in ends:
            connection.transport.set_protocol(end)
            connections.discard(connection)
            connections.add(end)
        for end, connection in ends:
            while connection.buffer or connection.has_unread:
                end.data_received(await connection.read())  # the bytes are here: it does not wait
        for end, connection in ends:
            if connection.transport.is_closing():
                end.connection_lost(connection.failure)
            elif connection.ended:
                end.eof_received()

    def close(self) -> None:
        """End both sides, and send what is queued."""
        for end in (self.client, self.upstream):
            end.deadline = now() + self.timeout
            end.transport.close()

    def abort(self) -> None:
        """End both sides at once."""
        for end in (self.client, self.upstream):
            end.transport.abort()

    def note_lost(self) -> None:
        """One side is closed: the tunnel has ended once both are."""
        if self.client.is_lost and self.upstream.is_lost:
            self.tunnels.discard(self)
            if self.on_end:
                self.on_end()


class TunnelEnd(asyncio.Protocol):
    """One side of a tunnel: its data is written to the peer, at the pace of the peer."""

    __slots__ = (
        "deadline",
        "deadlines",
        "ended",
        "is_lost",
        "peer",
        "received",
        "transport",
        "tunnel",
        "write",
    )
    peer: "TunnelEnd"  # set by the tunnel

    def __init__(self, connection: Connection, other: Connection, tunnel: Tunnel) -> None:
        self.deadlines = connection.deadlines
        self.transport = connection.transport
        self.write = other.transport.write
        self.tunnel = tunnel
        self.deadline = FOREVER
        self.received = 0
        self.ended = self.is_lost = False

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.deadlines.is_active = True
        self.write(data)
        if self.peer.ended:  # it still listens
            self.deadline = now() + self.tunnel.timeout

    def pause_writing(self) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # before 3.11, if it is closed
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):
            self.peer.transport.resume_reading()

    def eof_received(self) -> bool:
        self.ended = True
        if self.peer.ended:
            self.tunnel.close()
        else:
            end_writing(self.peer.transport)
            self.peer.deadline = now() + self.tunnel.timeout
        return bool(self.transport.can_write_eof())

    def connection_lost(self, exc: Optional[BaseException]) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        self.deadlines.discard(self)
        if exc is None:
            self.peer.deadline = now() + self.tunnel.timeout
            self.peer.transport.close()
        else:
            self.peer.transport.abort()
        self.tunnel.note_lost()

    def expire(self, time: float) -> None:
        """Act on a deadline that has passed; called by Deadlines."""
        if time > self.deadline or has_failed(self.transport):
            self.tunnel.abort()

    def abort(self) -> None:
        """End both sides at once."""
        self.tunnel.abort()


# --------------------------------------------------------------------------------------------------
# Server
# --------------------------------------------------------------------------------------------------
# Accepts connections and serves the requests of each, one after the other.  A connection that waits
# for a request has no task: the first byte starts one, which ends when the connection is quiet
# again.  `_serve_request` is the one place that turns errors into responses.


class PortProxy:
    """The proxy: `await PortProxy(config).start()`, then `await proxy.close()`.

    Several can live in one event loop.  Raises ValueError for a configuration that makes no sense.
    It logs to the logger "port_proxy" and configures none.
    """

    def __init__(self, config: Config = Config()) -> None:
        self.config = checked_config(config)
        self.deadlines = None  # type: Optional[Deadlines]
        self.is_stopping = False
        self.tunnels = set()  # type: Set[Tunnel]
        self.titles = Titles()
        self.lookout = Lookout()
        self._clients = set()  # type: Set[Connection]
        self._servers = []  # type: List[asyncio.AbstractServer]
        self._sockets = []  # type: List[socket.socket]
        self._owns_sockets = True

    async def start(
        self,
        sockets: Optional[Sequence[socket.socket]] = None,
        ways_back: Sequence[Address] = (),
    ) -> "PortProxy":
        """Listen and accept connections from now on.

        sockets: bound stream sockets to use in place of `bind` and `port`; they are closed with the
        proxy.  An empty sequence makes a proxy that only serves `serve_one`.  ways_back: addresses
        of servers that pass requests on to this one; they are never an upstream.  Raises OSError if
        a file cannot be read or the address is not available, ValueError for bad certificates.
        """
        loop = asyncio.get_event_loop()
        tls = server_context(self.config) if self.config.certfile else None
        self._owns_sockets = sockets is None
        self._sockets = _bind(self.config) if sockets is None else list(sockets)
        addresses = [sock.getsockname()[:2] for sock in self._sockets if sock.family != _UNIX]
        self.is_stopping = False
        self.deadlines = Deadlines(loop, _tick_interval(self.config))
        self.gate = (
            HubGate(self.config, self.deadlines)
            if self.config.hub
            else TokenGate(self.config, self.is_private, self.port)
        )  # type: Gate
        self.upstreams = Upstreams(self.config, self.deadlines, addresses + list(ways_back))
        try:
            for sock in self._sockets:
                self._servers.append(await self._listen(loop, sock, tls))
        except BaseException:
            await self.close()
            raise
        return self

    async def _listen(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, tls: Optional[ssl.SSLContext]
    ) -> asyncio.AbstractServer:
        assert self.deadlines is not None
        protocol = functools.partial(Connection, self.deadlines, self._accepted)
        options = {"sock": sock, "backlog": _BACKLOG}  # type: Dict[str, Any]
        if tls is not None and sys.version_info < (3, 7):
            make = functools.partial(_tls_protocol, protocol, tls, self.config.head_timeout, loop)
            return await loop.create_server(make, **options)
        if tls is not None:
            options.update(ssl=tls, ssl_handshake_timeout=self.config.head_timeout)
        if sock.family != _UNIX:
            return await loop.create_server(protocol, **options)
        if sys.version_info >= (3, 13):
            options["cleanup_socket"] = False  # the file may be another process's by then
        return await loop.create_unix_server(protocol, **options)

    @property
    def port(self) -> int:
        """The TCP port that is listened on; 0 before `start`, and if there is none."""
        return next((sock.getsockname()[1] for sock in self._sockets if sock.family != _UNIX), 0)

    @property
    def is_private(self) -> bool:
        """Whether only this machine's users can connect."""
        return all(map(_is_private, self._sockets))

    @property
    def token(self) -> str:
        """The token that clients must show; "" if none is asked for."""
        return self.gate.token if self.deadlines else ""

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
        host = "[%s]" % host if ":" in host else host
        return "%s://%s%s%s/" % (scheme, host, port, self.config.base)

    async def close(self) -> None:
        """Stop accepting, close idle connections and tunnels, and wait for running requests.

        They have `shutdown_timeout` seconds.
        """
        deadlines, self.deadlines = self.deadlines, None
        if deadlines is None:
            return
        if self.config.bind.startswith(_UNIX_PREFIX) and self._owns_sockets:
            _unlink(self.config.bind[len(_UNIX_PREFIX) :])
        for server in self._servers:
            server.close()
        for sock in self._sockets:
            sock.close()
        self.is_stopping = True
        until = now() + self.config.shutdown_timeout
        for client in list(self._clients):
            if client.state in (IDLE, READING_HEAD):
                client.close()
        for tunnel in list(self.tunnels):
            tunnel.close()
        tasks = self._tasks()
        if tasks:
            await asyncio.wait(tasks, timeout=self.config.shutdown_timeout)
        for task in self._tasks():
            task.cancel()
        tasks = self._tasks()
        if tasks:
            await asyncio.wait(tasks)
        self.upstreams.close()
        await self.gate.close()
        left = until - now() if self.tunnels else 0.0
        await deadlines.close(max(left, min(1.0, self.config.shutdown_timeout)))
        self._servers.clear()
        self._sockets.clear()

    def _tasks(self) -> "List[asyncio.Future[None]]":
        return [client.task for client in self._clients if client.task is not None]

    def cut(self) -> None:
        """Cut all running requests off, for those who cannot wait for `close`."""
        for task in self._tasks():
            task.cancel()
        for tunnel in list(self.tunnels):
            tunnel.abort()

    async def serve_one(self, client: Connection, head: bytes, gate: Gate) -> bool:
        """Serve the request with this head from another server's connection; `gate` decides.

        Returns whether the connection may carry another request.  Otherwise it is closed.
        """
        self._clients.add(client)
        client.state = ACTIVE
        keep = False
        try:
            request = await self._parse(client, head)
            keep = request is not None and await self._serve_request(client, request, gate)
        except (ClientGone, Truncated, TimedOut, OSError):
            client.abort()
        except asyncio.CancelledError:
            client.abort()
            raise
        finally:
            self._clients.discard(client)
        return keep

    # A client's connection.

    def _accepted(self, client: Connection) -> None:
        count = len(self._clients) + len(self.tunnels)
        if count >= self.config.max_connections and not self._make_room():
            client.write([_FULL])
            client.close()
            return
        self._clients.add(client)
        self._let_idle(client)

    def _let_idle(self, client: Connection) -> None:
        """Let a connection wait for its next request, without a task."""
        client.state = IDLE
        client.task = None
        client.read_deadline = now() + self.config.keep_alive_timeout
        client.watcher = self._wake

    def _wake(self, client: Connection) -> None:
        """Data or EOF has come on an idle connection."""
        client.watcher = None
        client.read_deadline = FOREVER
        client.state = READING_HEAD
        if client.ended:
            self._clients.discard(client)
            client.close()
        else:
            client.task = client.deadlines.loop.create_task(self._serve(client))

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest; whether there was one."""
        idle = [client for client in self._clients if client.state is IDLE]
        if not idle:
            return False
        min(idle, key=lambda client: client.read_deadline).abort()
        return True

    async def _serve(self, client: Connection) -> None:
        """Serve the requests of a connection until it is quiet or must be closed."""
        try:
            while not self.is_stopping:
                client.state = READING_HEAD
                request = await self._read_request(client)
                if request is None or not await self._serve_request(client, request, self.gate):
                    return
                if client.is_quiet() and not self.is_stopping:
                    self._let_idle(client)
                    return
                await asyncio.sleep(0)  # a client that pipelines leaves the others their turns
            client.close()
        except (ClientGone, Truncated, TimedOut, OSError):
            client.abort()
        except BaseException:  # cancelled, above all
            client.abort()
            raise
        finally:
            client.task = None
            if client.state is not IDLE:
                self._clients.discard(client)

    async def _read_request(self, client: Connection) -> Optional[Request]:
        """The next request; None if the client has ended or its head was refused."""
        head = b""
        try:
            head = await _read_request_head(client, self.config)
        except ProxyError as error:
            await self._refuse(client, error)
            return None
        if not head:
            client.close()
            return None
        return await self._parse(client, head)

    async def _parse(self, client: Connection, head: bytes) -> Optional[Request]:
        """The request with this head; None if it was refused."""
        try:
            return parse_request(head, client.address, client.scheme, self.config)
        except ProxyError as error:
            await self._refuse(client, error)
        return None

    async def _refuse(self, client: Connection, error: ProxyError) -> None:
        """Answer bytes that are not a request, and close the connection."""
        logger.info("%s -> %d: %s", client.address or "-", error.status, error.detail)
        client.write([local_response(error_response(error, False), keep_alive=False)])
        await self._linger(client)

    async def _serve_request(self, client: Connection, request: Request, gate: Gate) -> bool:
        """Serve a request; whether another may follow.  Errors become responses here alone."""
        exchange = Exchange(self, gate, client, request)
        try:
            try:
                await exchange.run()
            except ProxyError as error:
                await self._answer_error(exchange, error)
            except (ClientGone, Truncated, TimedOut, OSError):
                raise
            except asyncio.CancelledError:
                exchange.failure = "The proxy was told to stop." if self.is_stopping else ""
                raise
            except Exception as error:  # a bug: the request is lost, the proxy goes on
                logger.error("internal error: %r", error)
                logger.debug("", exc_info=True)
                text = "Internal error of the proxy. Its log says more."
                await self._answer_error(exchange, ProxyError(500, text))
        finally:
            self._log_end(client, exchange)
        if exchange.tunnel is not None:
            client.state = CLOSING
            return False
        if not exchange.body.finished:
            await self._linger(client)
        elif not exchange.keep_alive:
            client.state = CLOSING
            client.close()
        return exchange.keep_alive and exchange.body.finished

    async def _answer_error(self, exchange: Exchange, error: ProxyError) -> None:
        if exchange.status:
            exchange.failure = error.detail
            exchange.cut_short()
        else:
            await exchange.respond_error(error)

    async def _linger(self, client: Connection) -> None:
        """Close, but read on for a while if the client still sends.

        Closing at once would reset the connection, and could take the response from the client (RFC
        9112 section 9.6).
        """
        client.state = CLOSING
        if client.transport.can_write_eof():  # over TLS there is no half-close
            client.end_writing()
        client.read_deadline = now() + self.config.linger_timeout
        try:
            while await client.read():
                pass
        except TimedOut:
            pass
        client.close()

    # The access log.

    def _log_end(self, client: Connection, exchange: Exchange) -> None:
        """Log a request at its end, which is that of its tunnel if it has one."""
        if not logger.isEnabledFor(logging.INFO):
            return  # and so nothing of the request is kept for as long as its tunnel lasts
        tunnel = exchange.tunnel
        if tunnel is not None and tunnel in self.tunnels:
            tunnel.on_end = functools.partial(_log, exchange)
        else:
            _log(exchange)


def _log(exchange: Exchange) -> None:
    """One line per request, without the query, which may hold a secret."""
    request, tunnel = exchange.request, exchange.tunnel
    path, mark, _ = request.target.partition("?")
    record = {
        "client": request.client.address or "-",
        "method": request.method,
        "target": path + ("?..." if mark else ""),
        "app": request.route.authority if request.route else "-",
        "status": exchange.status or "gone",
        "bytes": tunnel.upstream.received if tunnel else exchange.sent,
        "seconds": round(now() - exchange.started, 3),
    }  # type: Dict[str, Any]
    line = (
        "%(client)s %(method)s %(target)s -> %(app)s %(status)s, %(bytes)d bytes, %(seconds).3f s"
    )
    if tunnel:
        record["bytes_received"] = tunnel.client.received
        line = line.replace(" bytes,", " bytes and back %(bytes_received)d,")
    if exchange.failure:
        record["error"] = exchange.failure
        line += ": %(error)s"
    logger.info(line, record, extra={"request": record})


async def _read_request_head(client: Connection, config: Config) -> bytes:
    """The next request head; b"" if the client ends or stays silent before its first byte.

    Some clients send a CRLF behind a body: up to two are tolerated (RFC 9112 section 2.2).
    Raises ProxyError 400 or 408.
    """
    data = b""
    try:
        if not client.has_unread:
            client.read_deadline = now() + config.keep_alive_timeout
        data = await client.read()
        for _ in range(2):
            while data == b"\r":
                data += await client.read() or b"?"  # at EOF, refused below
            if data[:2] == b"\r\n":
                data = data[2:]
                data = data or await client.read()
        if not data:
            return b""
        client.read_deadline = now() + config.head_timeout
        head = await read_head(client, True, config, data)
        client.read_deadline = FOREVER
        return head
    except TimedOut:
        if not data:
            return b""
        text = "The request head did not arrive within %g seconds." % config.head_timeout
        raise ProxyError(408, text)
    except Truncated:
        raise ProxyError(400, "The request ended in the middle of its head.")


_UNIX_PREFIX = "unix:"
_FULL = local_response(
    error_response(
        ProxyError(503, "There are too many connections.", (("Retry-After", "5"),)), False
    ),
    keep_alive=False,
)


def _places(config: Config) -> List[Any]:
    """Where a configuration says to listen, as `socket.getaddrinfo` tells; none for a Unix socket."""
    if config.bind.startswith(_UNIX_PREFIX):
        return []
    return socket.getaddrinfo(
        config.bind or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )


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


def _tls_protocol(
    make: Callable[[], Connection],
    context: ssl.SSLContext,
    timeout: float,
    loop: asyncio.AbstractEventLoop,
) -> Any:
    """TLS with a deadline for the handshake, which asyncio does not have before 3.7."""
    import asyncio.sslproto

    connection = make()

    class TlsProtocol(asyncio.sslproto.SSLProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            loop.call_later(timeout, abort_unless_connected, transport)

    def abort_unless_connected(transport: Any) -> None:
        if not hasattr(connection, "transport"):
            transport.abort()

    return TlsProtocol(loop, connection, context, None, server_side=True)  # type: ignore[arg-type]


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
    """Load the certificate and its key; asks on the terminal for the pass phrase of the key."""
    where = keyfile or certfile
    asked = False

    def ask() -> str:
        nonlocal asked
        asked = True
        return _pass_phrase()

    try:
        context.load_cert_chain(certfile, keyfile, ask)
    except OSError as error:
        if _is_pipe(certfile) or _is_pipe(where):  # and so read once and for all
            raise ValueError(
                "the certificate in %s cannot be used with the key in %s: %s"
                % (certfile, where, error)
            )
        _load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certfile)
        open(where, "rb").close()
        reason = getattr(error, "reason", None)
        if asked and reason in (None, "BAD_PASSWORD_READ", "BAD_DECRYPT"):
            raise ValueError("the pass phrase of the key in %s was not given" % where)
        if reason not in (
            None,
            "KEY_VALUES_MISMATCH",
            "KEY_TYPE_MISMATCH",
            "NO_CERTIFICATE_ASSIGNED",
        ):
            raise ValueError(
                "the certificate in %s cannot be used with its key: %s" % (certfile, reason)
            )
        advice = "" if keyfile else "; if that is in a file of its own, name it with --keyfile"
        raise ValueError(
            "%s does not hold the key (PEM) of the certificate in %s%s" % (where, certfile, advice)
        )


def _pass_phrase() -> str:
    """The pass phrase that a person types, "" for none; OpenSSL does not ask from CPython 3.15 on."""
    import getpass

    try:
        return getpass.getpass("Enter PEM pass phrase:")
    except (EOFError, AttributeError):  # AttributeError: there is no standard input
        print(file=sys.stderr)  # ends the line of the question
        return ""


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        if not _is_pipe(path):
            open(path, "rb").close()  # its error has the name, which OpenSSL leaves out
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            "%s does not hold a certificate (PEM) that can be used: %s" % (path, reason)
        )


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
        whole_origin=not config.hub
        and (plain if config.whole_origin is None else config.whole_origin),
        host_allowlist=config.host_allowlist
        if callable(config.host_allowlist)
        else normal_allowlist(config.host_allowlist),
        domains=() if config.hub else tuple(map(normal_domain, config.domains)),
        allow_hostnames=normal_allowlist(config.allow_hostnames),
        allow_origins=tuple(
            origin if origin == "*" else normal_origin(origin) for origin in config.allow_origins
        ),
        trusted_proxies=tuple(config.trusted_proxies),
        upstream_tls=tuple(upstream.lower() for upstream in config.upstream_tls),
    )


def _check_kinds(config: Config) -> None:
    """Raise ValueError if a field holds another kind of thing than it is for; what it holds is not told."""
    for name, default in Config()._asdict().items():
        value = getattr(config, name)
        if (value is None and default is None) or (
            callable(value) and name in ("authorize", "host_allowlist")
        ):
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


def _tick_interval(config: Config) -> float:
    """Fine enough for the shortest deadline, and never more often than twenty times a second."""
    shortest = min(
        float(getattr(config, name)) for name in Config._fields if name.endswith("_timeout")
    )
    return min(1.0, max(0.05, shortest / 4))


# --------------------------------------------------------------------------------------------------
# Jupyter extension
# --------------------------------------------------------------------------------------------------
# Inside a running Jupyter server.  Jupyter authenticates each request and lends its connection to
# one exchange.

_JUPYTER_COOKIES = (
    "username-"  # of people who are signed in; the host and port that the browser sees follow
)
_XSRF = "_xsrf"
_PLAIN_METHOD = re.compile("[A-Z]+(?:-[A-Z]+)*")


class LentConnection(Connection):
    """A client connection that Tornado lends us: it is read only when a read is asked for, so that
    no byte of the next request is taken from Tornado."""

    async def read(self) -> bytes:
        if not self.buffer and not self.has_unread:
            self.transport.pull()
        return await super().read()

    def expire(self, time: float) -> None:
        super().expire(time)
        if poll(self.transport, _HANG_UP):  # while nothing is read, Tornado may not notice
            self.abort()


_HANG_UP = getattr(select, "POLLRDHUP", 0)  # the peer has ended its side; only on Linux
_PULL_BYTES = 65536


class TornadoTransport(asyncio.Transport):
    """A Tornado stream, over TCP or TLS, as a transport for a `LentConnection`.

    It reads only what is asked for by `pull`, until `set_protocol` makes a tunnel of it.  Raises
    OSError if the client has left.
    """

    def __init__(self, tornado: Any, deadlines: Deadlines) -> None:
        sock = tornado.socket
        if sock is None:
            raise ConnectionResetError(errno.ECONNRESET, "the client has left")
        context = getattr(sock, "context", None)
        super().__init__({"socket": sock, "peername": sock.getpeername(), "sslcontext": context})
        self.tornado = tornado
        self.connection = LentConnection(deadlines)
        self._loop = deadlines.loop
        self._protocol = self.connection  # type: Any
        self._queued = 0
        self._is_reading = self._is_tunnel = self._is_paused = self._is_closing = False
        self._is_lost = self._writer_waits = False
        tornado.set_close_callback(self._closed)
        self.connection.connection_made(self)

    def pull(self) -> None:
        """Ask for the next bytes, which `data_received` then gets."""
        if self._is_reading or self._is_closing or self._is_lost:
            return
        try:
            future = self.tornado.read_bytes(_PULL_BYTES, partial=True)
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
            self.pull()

    def _closed(self) -> None:
        if not self._is_reading:  # otherwise the bytes that were read before come first
            self._lose()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            self._loop.call_soon(self._protocol.connection_lost, self.tornado.error)

    def release(self) -> Any:
        """Give the Tornado stream back; None, and the connection is closed, if bytes behind the
        request were taken from it."""
        connection = self.connection
        if self._is_reading or self._is_closing or connection.buffer or connection.has_unread:
            connection.close()
            return None
        connection.deadlines.discard(connection)
        self._is_lost = self._is_closing = True
        self.tornado.set_close_callback(None)
        return self.tornado

    def write(self, data: Union[bytes, bytearray, memoryview]) -> None:
        if self._is_lost or not data:
            return
        try:
            future = self.tornado.write(bytes(data))
        except OSError:  # StreamClosedError: the close callback follows
            return
        if not future.done():
            self._queued += len(data)
            future.add_done_callback(lambda _: self._sent(len(data)))
            if self._queued > _PULL_BYTES and not self._writer_waits:
                self._writer_waits = True
                self._protocol.pause_writing()

    def _sent(self, count: int) -> None:
        self._queued -= count
        if self._writer_waits and self._queued <= _PULL_BYTES // 4:
            self._writer_waits = False
            self._protocol.resume_writing()
        if self._is_closing and not self._is_lost and not self._queued:
            self.tornado.close()

    def get_write_buffer_size(self) -> int:
        return self._queued

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._is_tunnel = True
        self._loop.call_soon(self.resume_reading)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol  # type: ignore[no-any-return]

    def is_reading(self) -> bool:
        return self._is_reading

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False
        if self._is_tunnel:
            self.pull()

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
        provider = (
            handler.settings.get("identity_provider") or handler
        )  # before 2.0: the handler itself
        self.hub_auth: Any = getattr(provider, "hub_auth", None)
        self.by_token = bool(handler.token_authenticated)
        self.tokens = [token for token in (handler.token, self._shown_to(provider)) if token]
        get_name = getattr(provider, "get_cookie_name", lambda handler: handler.cookie_name)
        self.cookie_name = get_name(handler)
        self.cookie_marks += (_HUB_COOKIES, _JUPYTER_COOKIES, self.cookie_name)

    def _shown_to(self, provider: Any) -> Optional[str]:
        """The token by which the request came in."""
        if not self.by_token:
            return None
        if self.hub_auth is None and hasattr(provider, "get_token"):
            return str(provider.get_token(self.handler))
        return None

    async def authorize(self, request: Request) -> None:
        if self.hub_auth is not None:
            await self._look_up_tokens(request)
        if self.by_token:  # a token in the request is no accident
            return
        headers = request.headers
        allowed = (
            "origin" in headers.index and self.handler.check_origin()
        )  # as Jupyter's options say
        is_same_origin = "same-origin" in headers.get_all("sec-fetch-site")
        is_unsafe = request.method not in _SAFE
        if not allowed or (is_unsafe and self._allows_any_origin() and not is_same_origin):
            self.check_origin(request)

    async def _look_up_tokens(self, request: Request) -> None:
        """Find out which of the tokens in a request are the Hub's; it answers most from a cache."""
        for token in filter(_HUB_TOKEN.fullmatch, all_tokens(request)):
            try:
                session = self.hub_auth.get_session_id(self.handler)
                user = await self.hub_auth.user_for_token(token, session_id=session, sync=False)
            except TypeError:  # before JupyterHub 2.4, which would block
                return
            except Exception as error:  # Tornado's own, or of the connection to the Hub
                logger.warning("the Hub could not be asked: %s", type(error).__name__)
                text = "The Hub, which knows whose a token is, does not answer."
                raise ProxyError(503, text, _SHORTLY)
            if user:
                self.tokens.append(token)

    def _allows_any_origin(self) -> bool:
        """Whether Jupyter's options let any origin in.  Its own handlers still ask for the XSRF token then, which no
        app's page has."""
        handler = self.handler
        if handler.settings.get("disable_check_xsrf"):
            return False
        pattern = handler.allow_origin_pat
        return handler.allow_origin == "*" or bool(
            pattern and re.match(pattern, "https://any.invalid")
        )

    def owns_token(self, token: str) -> bool:
        read = re.sub("[\x00-\x08\x0e-\x1f+]", " ", token).strip()  # as Jupyter reads it
        return any(
            hmac.compare_digest(one.encode(), own.encode())
            for one in (token, read)
            for own in self.tokens
        )

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        bare = name[len("__Host-") :] if name.startswith("__Host-") else name
        if (
            name == self.cookie_name
            or bare.startswith(_HUB_COOKIES)
            or super().owns_cookie(name, route)
        ):
            return True
        of_the_app = _JUPYTER_COOKIES + re.sub(
            "[^A-Za-z0-9]", "-", route.authority if route else ""
        )  # if it is a Jupyter
        return name.startswith(_JUPYTER_COOKIES) and name != of_the_app

    def explain(self, error: ProxyError) -> ProxyError:
        text, advice, rest = error.detail.partition(" Start the proxy with --allow-origin")
        if advice and (
            rest.startswith(" '*'") or self._allows_any_origin()
        ):  # which would not help
            advice, rest = " A program may send it with a token of Jupyter's.", ""
        text = (text + advice + rest).replace(" --allow-origin", " c.ServerApp.allow_origin")
        text = _OPTION.sub(
            lambda option: "c.PortProxy." + option.group()[2:].replace("-", "_"), text
        )
        return ProxyError(
            error.status, re.sub("([Ss])tart the proxy with", r"\1et", text), error.fields
        )

    def response_lines(self, status: int) -> Sequence[str]:
        """The cookies that Jupyter sets with this response."""
        if status < 200 and status != 101:
            return ()
        cookies = getattr(self.handler, "_new_cookie", {}).values()
        return ["Set-Cookie: " + cookie.OutputString(None) for cookie in cookies]

    def strip_cookies(self, value: str, route: Optional[Route]) -> str:
        """Jupyter's XSRF cookie has the same name as that of any Tornado app, but the shortest path
        of all, and so comes last (RFC 6265 section 5.4).  A browser that is signed in has it."""
        pairs = value.split(";")
        names = [cookie_name(pair) for pair in pairs]
        if _XSRF in names and any(self.owns_cookie(name, route) for name in names):
            del pairs[len(names) - 1 - names[::-1].index(_XSRF)]
        return super().strip_cookies(";".join(pairs), route)


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
        told = {
            name: _from_jupyter(name, value)
            for name, value in server.config.get("PortProxy", {}).items()
        }
        config = Config(base=base, trusted_proxies=trusted)._replace(**told)
        proxy = PortProxy(
            config._replace(domains=(), whole_origin=False)
        )  # the origin is Jupyter's
    except (TypeError, ValueError) as error:
        server.log.error(
            "port_proxy: %s/ is not served, for c.PortProxy cannot be used: %s", base, error
        )
        return
    settings = server.web_app.settings

    def note_activity() -> None:
        settings["api_last_activity"] = datetime.now(timezone.utc)

    def is_page_visit(request: Any) -> bool:
        with contextlib.suppress(ProxyError):
            return parse_request(_head_from_tornado(request), "", "http", config).is_page_visit
        return False

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
            if not is_page_visit(self.request):
                raise web.HTTPError(403, "Sign in first.")
            return str(super().get_login_url())

        def __getattr__(self, name: str) -> Any:
            method = self.__dict__["request"].method if "request" in self.__dict__ else ""
            if name != method.lower() or not _PLAIN_METHOD.fullmatch(method):
                raise AttributeError(name)
            # Under the method's name Jupyter looks for an exemption from signing in.

        async def prepare(self) -> None:
            if not _PLAIN_METHOD.fullmatch(self.request.method):  # it would be another attribute
                self.set_status(405)
                self.finish("405 Method Not Allowed\n")
                return
            result = super().prepare()
            if inspect.isawaitable(result):
                await result
            if not self._finished:
                web.authenticated(lambda handler: None)(self)  # some versions do not in `prepare`
            if self._finished:  # redirected
                return
            user = self.current_user
            authorizer = settings.get("authorizer")
            allowed = authorizer is None or authorizer.is_authorized(self, user, "execute", "proxy")
            if not (await allowed if inspect.isawaitable(allowed) else allowed):
                raise web.HTTPError(403)
            await self._serve()

        async def _serve(self) -> None:
            gate = JupyterGate(proxy.config, self)
            if is_page_visit(self.request):
                self.xsrf_token  # noqa: B018  reading it sets its cookie
                clean = gate.strip_query(self.request.uri)
                if clean != self.request.uri:
                    self.redirect(clean)  # with the cookie that a token in the address has earned
                    return
            if proxy.deadlines is None:
                await proxy.start(
                    [], [] if getattr(server, "sock", "") else [("0.0.0.0", server.port)]
                )
            deadlines = proxy.deadlines
            assert deadlines is not None
            deadlines.on_activity = note_activity
            head = _head_from_tornado(self.request)
            tornado = self.detach()
            try:
                transport = TornadoTransport(tornado, deadlines)
            except OSError:  # the client has left meanwhile
                tornado.close()
                return
            address = transport.get_extra_info("peername")
            if await proxy.serve_one(transport.connection, head, gate):
                stream = transport.release()
                if stream is not None:
                    server.http_server.handle_stream(stream, address)

    router = server.web_app
    router.add_handlers(".*$", [(re.escape(base) + "(?:/.*)?", PortProxyHandler)])
    rules = router.default_router.rules
    rules.insert(0, rules.pop(-2))
    logger.parent = getattr(server.log, "logger", server.log)
    logger.setLevel(
        logging.INFO if server.log_level in (logging.DEBUG, "DEBUG") else logging.WARNING
    )  # as for its own
    extensions = getattr(getattr(server, "extension_manager", None), "extensions", {})
    if getattr(extensions.get("jupyter_server_proxy"), "enabled", False):
        server.log.warning(
            "port_proxy: jupyter_server_proxy is enabled too, and both serve %s/: port_proxy answers there. Its named"
            " servers are not touched.",
            base,
        )
    server.log.info("port_proxy: every port of this machine is at %s/<port>/", base)


def _head_from_tornado(request: Any) -> bytes:
    """The head that Tornado parsed; it is parsed again, more strictly, before it is used."""
    lines = ["%s %s %s" % (request.method, request.uri, request.version)]
    lines += ["%s: %s" % field for field in request.headers.get_all()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# --------------------------------------------------------------------------------------------------
# Port check
# --------------------------------------------------------------------------------------------------
# `--check PORT` looks at one port, and says what keeps its app from working through the proxy.

_ROOTED = re.compile(
    rb"""\b(?:src|href|action)\s{0,9}=\s{0,9}["']?(/(?!/)[^\s"'<>?#]{0,2000})""", re.IGNORECASE
)
_PAGE_SECONDS = 30.0  # some apps are compiled when they are first asked for
_STRANGER = "port-proxy-check.invalid"  # a name that leads nowhere (RFC 6761)


_SCRIPT = re.compile(
    rb"""<script\s[^<>]{0,500}?\bsrc\s{0,9}=\s{0,9}["']?([^\s"'<>]{1,2000})""", re.IGNORECASE
)
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
_ROUND = (
    "It redirected %d times in a row and showed no page; to a browser, which keeps cookies, it may."
    % _REDIRECTS
)
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
    KnownApp(
        "Jupyter",
        "jupyter-config-data|<title>Jupyter",
        "/api/events/subscribe",
        "--ServerApp.base_url=%s/",
    ),
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
    deadlines = Deadlines(asyncio.get_event_loop(), _tick_interval(config))
    own: List[Address] = []
    with contextlib.suppress(
        OSError, UnicodeError
    ):  # an address that the proxy could not listen on either
        own = [place[4][:2] for place in _places(config)]
    upstreams = Upstreams(config, deadlines, own)
    try:
        return await _checked(_listening_at(port, config.base), upstreams)
    finally:
        await deadlines.close(1.0)


def _listening_at(port: int, base: str) -> Report:
    """What the system tells of a port."""
    sockets = [one for one in tcp_sockets(port=port) if one.state == _LISTEN]
    addresses = tuple(dict.fromkeys(_plain_text(one.address) for one in sockets))
    program = next((one.program for one in listeners() if one.port == port), "")
    return Report(
        port, base, False, addresses, _user_name(sockets[0].user) if sockets else "", program
    )


async def _checked(report: Report, upstreams: Upstreams) -> Report:
    route = route_to_port(report.port, upstreams.config.upstream_tls)
    try:
        answer = await probe(upstreams, route, "/", timeout=_PAGE_SECONDS)
    except ProxyError as error:
        if error.status == 508:
            return report._replace(problems=(_OWN_PORT % report.port,))
        if error.status != 502 or isinstance(error, NotListening) or route.scheme == "https":
            return report._replace(problems=(error.detail,))
        if await accepts_tls(upstreams, route):
            return report._replace(speaks="https", problems=(tls_advice(route),))
        return report._replace(speaks="other", problems=("It does not answer HTTP.",))
    report = report._replace(ok=True, speaks=route.scheme, status=answer.response.status)
    report, answer = await _followed(report, route, answer, upstreams)
    page = answer.body.decode("latin-1")
    app = next((one for one in _KNOWN_APPS if re.search(one.sign, page)), None)
    rooted = [match.decode("latin-1") for match in dict.fromkeys(_ROOTED.findall(answer.body))]
    stranger = await _status(upstreams, route, "/", ["Host: " + _STRANGER])
    if rooted and not upstreams.config.whole_origin:
        report = report._replace(problems=report.problems + (_LEAVING,))
    past = await _what_goes_past(report, route, answer, upstreams)
    report = report._replace(
        problems=report.problems + ((_GOES_PAST % (past, report.port),) if past else ()),
        title=title_in(answer.response.headers, answer.body),
        app=app.name if app else "",
        rooted=rooted[:5],
        refuses_host=stranger >= 400 > report.status,
        flag=app.flag % ("%s/absolute/%d" % (upstreams.config.base, report.port)) if app else "",
        use=_forms_of(report.port, upstreams.config),
    )
    return await _with_socket(report, route, app.socket if app else "", upstreams)


async def _followed(
    report: Report, route: Route, answer: Fetched, upstreams: Upstreams
) -> Tuple[Report, Fetched]:
    """The page that redirects of a port to itself lead to."""
    own = re.compile(_OWN_ORIGIN % report.port, re.IGNORECASE)
    for left in range(_REDIRECTS, -1, -1):
        location = answer.response.headers.get("location").partition("#")[0]
        if not 300 <= answer.response.status < 400 or not location:
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
            answer = await probe(upstreams, route, path, timeout=_PAGE_SECONDS)
        except ProxyError as error:
            return report._replace(problems=(error.detail,)), answer
    return report, answer


async def _what_goes_past(report: Report, route: Route, page: Fetched, upstreams: Upstreams) -> str:
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
            script = await probe(upstreams, route, path)
        except ProxyError:
            continue
        if own.search(script.body):
            return path.partition("?")[0]
    return ""


async def _with_socket(report: Report, route: Route, known: str, upstreams: Upstreams) -> Report:
    """The report, with whether a WebSocket opens, at the app's own place or at a usual one, and to a foreign page."""
    handshake = _UPGRADE_LINES + [
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    for path in dict.fromkeys(
        (known or "/ws", "/ws", "/socket.io/?EIO=4&transport=websocket", "/")
    ):
        own = ["Origin: %s://%s" % (route.scheme, route.authority)]
        if await _status(upstreams, route, path, handshake + own) == 101:
            foreign = ["Origin: http://" + _STRANGER]
            refuses = await _status(upstreams, route, path, handshake + foreign) != 101
            return report._replace(socket=path.partition("?")[0], refuses_origin=refuses)
    return report


async def _status(upstreams: Upstreams, route: Route, target: str, lines: Sequence[str]) -> int:
    """The status of a response; 0 if none came."""
    try:
        return (await probe(upstreams, route, target, lines)).response.status
    except ProxyError:
        return 0


def _forms_of(port: int, config: Config) -> List[str]:
    """The addresses of a port by which this machine's own browser reaches it; a path where the proxy takes any port."""
    if not config.port:
        return ["%s/%d/" % (config.base, port)]
    name = "localhost:%d" % config.port
    scheme = "https" if config.certfile else "http"
    host = host_form(port, ClientInfo("127.0.0.1", scheme, name), config.domains)
    return ([host] if host else []) + ["%s://%s%s/%d/" % (scheme, name, config.base, port)]


def report_text(report: Report) -> str:
    """A report as a person reads it."""
    lines = ["port %d of this machine" % report.port]

    def say(name: str, text: str) -> None:
        if text:
            lines.append("  %-10s %s" % (name, text))

    who = " ".join(
        filter(
            None, (report.program and "by " + report.program, report.owner and "of " + report.owner)
        )
    )
    say("listens", " ".join(filter(None, (", ".join(report.addresses), who))))
    say("speaks", report.speaks and "%s %s %s" % (report.speaks, report.status or "", report.title))
    say("app", report.app)
    say("redirects", report.redirect)
    some = ", ".join(report.rooted[:3])
    say("links", some and "begin with a slash, such as " + some)
    say(
        "Host",
        "refuses names that are not its own; the proxy sends localhost"
        if report.refuses_host
        else "",
    )
    foreign = "; refuses pages of other origins" if report.refuses_origin else ""
    opened = (
        "opens at " + report.socket + foreign
        if report.socket
        else "none opened at the usual places"
    )
    say("WebSocket", opened if report.ok else "")
    lines += ["  problem    " + problem for problem in report.problems]
    say("use", "  or  ".join(report.use))
    kept = "%s/absolute/%d/" % (report.base, report.port)
    say("", report.flag and "or start it with %s and use %s" % (report.flag, kept))
    shown = "\n".join(lines)  # of which apps have written a part, and which goes to a terminal
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in shown)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

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
    (
        "stall_timeout",
        "SECONDS",
        "time a body that has begun may stand still because of the client",
    ),
    ("linger_timeout", "SECONDS", "time to read on behind an early answer"),
    ("idle_upstream_timeout", "SECONDS", "time an idle connection to an app is kept"),
    (
        "shutdown_timeout",
        "SECONDS",
        "time for running requests to finish when the proxy is told to stop",
    ),
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
    add(
        "--port",
        type=int,
        metavar="N",
        help="port to listen on, 0 for any free one (default: %d)" % default.port,
    )
    add(
        "--bind",
        metavar="ADDRESS",
        help="address to listen on, or unix:PATH (default: %s)" % default.bind,
    )
    add(
        "--base",
        default=default.base,
        metavar="PATH",
        help="path that all lives under (default: %(default)s)",
    )
    add(
        "--host-allowlist",
        action="append",
        default=[],
        metavar="HOST",
        help="reach this host too" + _SEVERAL,
    )
    add(
        "--domain",
        action="append",
        default=[],
        metavar="NAME",
        help="8080.NAME is port 8080, too" + _SEVERAL,
    )
    add(
        "--whole-origin",
        choices=("yes", "no"),
        help="lead links without the prefix back to their app (see README)",
    )
    add(
        "--preserve-host",
        action="store_true",
        help="pass the browser's Host on, not localhost:PORT",
    )
    _add_access_options(parser)
    about = parser.add_argument_group("what it tells")
    about.add_argument(
        "--check", type=_port_number, metavar="PORT", help="look at one port and say how to open it"
    )
    about.add_argument("--json", action="store_true", help="with --check: as data")
    volume = about.add_mutually_exclusive_group()
    volume.add_argument("--verbose", action="store_true", help="log a line for every request")
    volume.add_argument("--log-json", action="store_true", help="the same as JSON")
    volume.add_argument("--quiet", action="store_true", help="print nothing but errors")
    about.add_argument(
        "--version", action="version", version="port_proxy " + __version__, help="print it"
    )
    about.add_argument("--help", "-h", action=_Help, show_limits=False, help="print this")
    about.add_argument(
        "--help-all", action=_Help, show_limits=True, help="print this, with limits and timeouts"
    )
    limits = parser.add_argument_group("limits and timeouts")
    for name, unit, meaning in _LIMITS:
        value = getattr(default, name)
        text = meaning + " (default: %(default)g)" if show_limits else argparse.SUPPRESS
        limits.add_argument(
            "--" + name.replace("_", "-"), type=type(value), default=value, metavar=unit, help=text
        )
    return parser


class _Help(argparse.Action):
    """Prints help, short or whole."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        show_limits: bool,
        help: str,  # noqa: A002
    ) -> None:
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
    token.add_argument(
        "--token", action="store_true", help="ask for a token (PORT_PROXY_TOKEN, or made at random)"
    )
    token.add_argument("--token-file", metavar="FILE", help="ask for the token in this file")
    token.add_argument("--no-token", action="store_true", help="never ask for a token")
    for option, metavar, meaning in (
        ("--allow-hostname", "NAME", "further name, or glob, by which it may be called"),
        ("--allow-origin", "ORIGIN", "origin whose pages may use what is here, or *"),
        ("--trusted-proxy", "ADDRESS", "server in front whose X-Forwarded fields are believed"),
        ("--upstream-tls", "[HOST:]PORT", "upstream that speaks TLS"),
    ):
        access.add_argument(
            option, action="append", default=[], metavar=metavar, help=meaning + _SEVERAL
        )
    for option, meaning in (
        ("--insecure-upstream", "accept any certificate of this machine's own ports"),
        ("--allow-preflight", "let CORS preflights reach the apps unasked"),
        ("--any-owner", "also reach ports of this machine's other users"),
    ):
        access.add_argument(option, action="store_true", help=meaning)
    access.add_argument(
        "--certfile", metavar="FILE", help="serve HTTPS with this certificate (PEM)"
    )
    access.add_argument(
        "--keyfile", metavar="FILE", help="its key, if that is in a file of its own"
    )
    access.add_argument(
        "--client-ca", metavar="FILE", help="let in only clients with a certificate of these (PEM)"
    )


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
        name: tuple(one.strip() for entry in entries for one in entry.split(","))
        for name, entries in lists.items()
    }
    plain = [
        name
        for name in Config._fields
        if name not in options and name not in ("token", "authorize", "hub")
    ]
    options.update(
        (name, getattr(arguments, name)) for name in plain if getattr(arguments, name) is not None
    )
    if arguments.whole_origin:
        options["whole_origin"] = arguments.whole_origin == "yes"
    config = Config(token=_token(arguments), **options)
    # In a terminal inside a Hub's server the environment is the same; a proxy there is told where to listen.
    if arguments.port is None and arguments.bind is None and "JUPYTERHUB_SERVICE_URL" in os.environ:
        return _config_under_hub(config, arguments, os.environ)
    return config


def _config_under_hub(
    config: Config, arguments: argparse.Namespace, environment: Mapping[str, str]
) -> Config:
    """`config` as a JupyterHub that starts this program wants it; ValueError for what does not go with that."""
    for option in ("token", "token_file", "no_token", "certfile", "keyfile", "client_ca"):
        if getattr(arguments, option):
            name = "--" + option.replace("_", "-")
            raise ValueError(
                "JupyterHub started this (JUPYTERHUB_SERVICE_URL is set) and says that itself: no "
                + name
            )
    hub = hub_in(environment)
    url = urlsplit(environment["JUPYTERHUB_SERVICE_URL"])
    if url.scheme not in _DEFAULT_PORTS or not url.netloc:
        raise ValueError(
            "JUPYTERHUB_SERVICE_URL holds what no Hub sets: %s"
            % environment["JUPYTERHUB_SERVICE_URL"]
        )
    names = ("certfile", "keyfile", "client_ca")
    tls: Dict[str, Any] = {
        name: environment.get("JUPYTERHUB_SSL_" + name.upper()) for name in names
    }
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
        access_scopes=told(
            "OAUTH_ACCESS_SCOPES", environment.get("JUPYTERHUB_OAUTH_SCOPES"), _scopes
        ),
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
    given = {
        name.lower(): value
        for name, value in json.loads(text).items()
        if value not in (None, False)
    }
    if "expires_days" in given:
        given.setdefault("max_age", int(float(given["expires_days"]) * 86400))
    names = {"samesite": "SameSite", "secure": "Secure", "domain": "Domain", "max_age": "Max-Age"}
    names["partitioned"] = "Partitioned"
    found = tuple(
        (name, "" if given[key] is True else str(given[key]))
        for key, name in names.items()
        if key in given
    )
    if any(not re.fullmatch("[A-Za-z0-9.-]*", value) for _, value in found):
        raise ValueError("this cannot stand in a cookie")
    return found


def _token(arguments: argparse.Namespace) -> Optional[str]:
    """The token that is asked for, "" for none, None where that depends on who can connect."""
    given = os.environ.pop("PORT_PROXY_TOKEN", "")
    if arguments.no_token:
        return ""
    if arguments.token_file:
        with open(
            arguments.token_file, encoding="latin-1"
        ) as file:  # what else is in it is told later
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
        lines = [
            "port_proxy %s: bring it over with  ssh -N -L 8888:%s %s" % (__version__, path, there)
        ]
        url = url.replace("localhost", "localhost:8888", 1)
        lines.append("and open %s%s" % (url, question))
    parts = urlsplit(url)
    host = host_form(8080, ClientInfo("", parts.scheme, parts.netloc), config.domains).replace(
        "8080", "<port>", 1
    )
    lines.append(
        "It reaches every port of this machine as %s<port>/%s%s."
        % (url, host and " or " + host, others)
    )
    if away and not is_unix:
        local = (
            "localhost" if proxy.is_private or config.bind in ("", "0.0.0.0", "::") else config.bind
        )
        lines.append(
            "On your own machine, first:  ssh -N -L {0}:{1}:{0} {2}".format(proxy.port, local, away)
        )
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
        family = (
            _UNIX
            if isinstance(name, (str, bytes))
            else socket.AF_INET6
            if len(name) == 4
            else socket.AF_INET
        )
        sockets.append(
            socket.socket(family or -1, socket.SOCK_STREAM, 0, fileno=sock.detach())
        )  # 3.6 does not look
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

    try:
        await proxy.start(_inherited_sockets() or None)
    except (OSError, ValueError) as error:
        _complain("port_proxy: " + _why_not_listening(error, config))
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, interrupt)
        except NotImplementedError:  # the event loop of Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
    if not quiet or proxy.token != (
        config.token or ""
    ):  # a token that nobody has seen would be of no use
        _say(_banner(proxy))
    if config.token == "" and not proxy.is_private and not config.hub:
        _complain(
            "port_proxy: anybody who can reach %s can use every port of this machine (--no-token)"
            % config.bind
        )
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
    handler.setFormatter(
        _JsonLines() if arguments.log_json else logging.Formatter("%(asctime)s %(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler])


class _JsonLines(logging.Formatter):
    """A log record as a line of JSON; that of a request with what it is made of."""

    def format(self, record: logging.LogRecord) -> str:
        moment = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + ".%03dZ" % record.msecs
        )
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
        return (
            "%s is in use by another program; choose another with --port, or --port 0 for any free one"
            % where
        )
    if error.errno == errno.EACCES:
        return (
            "%s may not be used without further rights; choose one above 1023 with --port" % where
        )
    if isinstance(error, socket.gaierror) or error.errno in (
        errno.EADDRNOTAVAIL,
        None,
    ):  # None: asyncio from 3.13 on
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
    tunnels, idle = (
        min(config.max_tunnels, most * 3 // 4),
        min(config.max_idle_upstreams, most // 4),
    )
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
    # glibc gives freed blocks of 128 KiB and more back to the kernel, and takes them again for the
    # next read, until it has seen a larger one freed (mallopt(3), M_MMAP_THRESHOLD).
    bytes(16 << 20)
    loop = asyncio.new_event_loop()
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
