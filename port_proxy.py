#!/usr/bin/env python3
"""port_proxy: every port of a machine, reachable through one HTTP port.

Run ``python3 port_proxy.py``, then open ``http://localhost:8888/proxy/8080/`` to use the app that
listens on port 8080 of this machine.  Requires CPython 3.6 or newer, and nothing else.

    URL                                     upstream and path
    <base>/<port>/path?q                    localhost:<port>, /path?q (prefix stripped)
    <base>/absolute/<port>/path?q           localhost:<port>, the full path (prefix kept)
    <base>/<host>:<port>/path?q             <host>:<port> if allowed, /path?q
    <base>/absolute/<host>:<port>/path?q    <host>:<port> if allowed, the full path
    http://<port>.localhost:8888/path?q     localhost:<port>, /path?q (an origin for each app)

All requests take the same steps, in one coroutine for each busy client connection:

    accept -> read_head -> parse_request -> Gate.authorize -> request_for_upstream
           -> Upstreams.take or connect -> [a second task sends the request body meanwhile]
           -> read_head -> parse_response -> response_lines -> relay the body -> next request
    after a 101: a tunnel splices both transports, and the coroutine ends

The framing of a message is decided once, and messages that do not match the grammar are refused,
never repaired.  Bodies are streamed, with back-pressure in both directions.  Access is decided
before the proxy connects to an upstream.  `Exchange` turns errors into responses; after the
response head was sent, an error truncates the response so that the client can tell.

Sections, each using only names above it: configuration, errors, routes, messages, bodies,
connections, header rewriting, unprefixed requests, local sockets, pages, upstreams, access control,
jupyterhub, exchange, server, jupyter extension, port check, command line.
"""

import argparse
import asyncio
import base64
import contextlib
import errno
import functools
import glob
import hashlib
import hmac
import html
import ipaddress
import itertools
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
import types
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
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

__version__ = "0.1.0"
__all__ = ["Config", "PortProxy", "ProxyError", "main"]

logger = logging.getLogger("port_proxy")

Fields = Tuple[Tuple[str, str], ...]  # (name, value) pairs in order, as latin-1 text
Address = Tuple[str, int]
FOREVER = float("inf")
now = time.monotonic  # the clock of all deadlines, in seconds


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------
# `Config` gives the type, the default and the rationale of each option.  `OPTIONS` gives its flag
# and its help.  `checked_config` (section Server), the command line, Jupyter's configuration, error
# messages and a test of the README use both.


class Hub(NamedTuple):
    """The JupyterHub that started this server, as read from the environment by `hub_in`."""

    prefix: str  # the path of this server, such as /user/ana; the proxy's base lies below it
    user: str  # the owner of this server
    service_url: str  # where the Hub reaches this server
    api_url: str
    api_token: str  # of this server; also its OAuth client secret
    client_id: str
    authorize_url: str  # the Hub's sign-in page
    callback_url: str  # OAuth redirect URI, exactly as the Hub gave it
    access_scopes: FrozenSet[str]  # any of these grants access, for example access:servers
    server_name: str = ""  # "" for the user's default server
    home: str = ""  # requests for the prefix are redirected here; "" for the proxy's base
    activity_url: str = ""
    activity_interval: float = 300.0  # seconds
    host_cookies: bool = False  # cookie names start with __Host-
    cookie_options: Tuple[Tuple[str, str], ...] = ()  # attributes; "" for one without value


class Config(NamedTuple):
    """The settings of one proxy.  Sizes are in bytes, times in seconds.

    Bodies may have any size.  A request may take any time as long as it makes progress.
    """

    base: str = "/proxy"  # path prefix of all addresses; "/" for none
    bind: str = "127.0.0.1"  # address or name to listen on, or "unix:PATH"
    port: int = 8888  # 0 takes any free port
    # Upstream hosts besides the loopback names: names, addresses, patterns ("*.example.org").  Or a
    # function of the host (lower case, no brackets) that decides about every host.
    host_allowlist: Union[Sequence[str], Callable[[str], bool]] = ()
    preserve_host: bool = False  # send the client's Host to the upstream instead of the target's
    domains: Sequence[str] = ("localhost",)  # <port>.<domain> is that port; not used with `hub`
    # Whether the proxy serves all paths of its origin.  If so, unprefixed requests are routed to
    # their app, and the proxy's cookies have the path /.  None: yes if base is the default or the
    # root, and trusted_proxies is empty.
    whole_origin: Optional[bool] = None

    # None: a random token, or no token if only users of this machine can connect.  "any": a random
    # token.  "": no token.  Otherwise at least 16 characters: guesses are slowed, not blocked.
    token: Optional[str] = None
    allow_hostnames: Sequence[str] = ()  # Host names and patterns to accept without a token
    allow_origins: Sequence[str] = ()  # whose pages may use apps: "https://a.example.org", "*"
    allow_preflight: bool = False  # CORS preflights reach the apps without credentials
    # `await authorize(request, client, route)` replaces the token and allow_hostnames: once for
    # each request and Upgrade, before the proxy connects.  It returns None to admit a request, or
    # raises ProxyError.  `route` is None for the proxy's own pages.
    authorize: Optional[Callable[..., Awaitable[None]]] = None
    hub: Optional[Hub] = None  # sign-in at the Hub replaces the token and allow_hostnames
    trusted_proxies: Sequence[str] = ()  # addresses, networks, "unix": trust X-Forwarded
    certfile: Optional[str] = None  # PEM, with the key in it or in keyfile; serves HTTPS
    keyfile: Optional[str] = None
    client_ca: Optional[str] = None  # PEM; clients need a certificate signed by one of these
    upstream_tls: Sequence[str] = ()  # "PORT" or "HOST:PORT" of upstreams that speak TLS
    insecure_upstream: bool = False  # do not verify the certificates of this machine's upstreams
    any_owner: bool = False  # also reach ports of other ordinary users

    max_connections: int = 8192  # of clients; at the limit, an idle one is closed
    max_tunnels: int = 6144  # WebSockets; leaves room for requests
    max_head_bytes: int = 65536  # cookies of many apps fit; Node allows 16 KiB, nginx 32 KiB
    max_target_bytes: int = 16384  # OAuth and notebook URLs fit; nginx and Apache allow 8 KiB
    max_fields: int = 200  # Apache allows 100
    max_chunk_line_bytes: int = 4096  # a size of 15 digits, and any sensible extension
    max_trailer_bytes: int = 16384  # trailers are checked and dropped
    max_idle_upstreams: int = 1024  # pooled connections to all upstreams together

    head_timeout: float = 30.0  # from the first byte of a head to its last
    keep_alive_timeout: float = 120.0  # between requests; browsers close sooner
    connect_timeout: float = 10.0  # all addresses of a host together
    response_timeout: float = 3600.0  # from the end of the request to the response head
    stall_timeout: float = 3600.0  # a body does not arrive from a client, or cannot be sent on
    linger_timeout: float = 5.0  # reading after an early response, so that the client receives it
    shutdown_timeout: float = 5.0  # for running requests when the proxy is stopped
    idle_upstream_timeout: float = 4.0  # Node and uvicorn close after 5 s, without warning


# By group of the help: the options, each with its metavar, "" for a switch, and its help.
OPTIONS = {
    "options": (
        ("--port", "N", "port to listen on, 0 for any free one"),
        ("--bind", "ADDRESS", "address to listen on, or unix:PATH"),
        ("--base", "PATH", "path prefix of all addresses"),
        ("--host-allowlist", "HOST", "also reach this host: name, address or pattern"),
        ("--domain", "NAME", "also reach port 8080 as 8080.NAME"),
        ("--whole-origin", "yes|no", "route requests without the prefix to their app"),
        ("--preserve-host", "", "send the browser's Host to the app, not localhost:PORT"),
    ),
    "access": (
        ("--token", "", "require a token (PORT_PROXY_TOKEN, or a random one)"),
        ("--token-file", "FILE", "require the token in this file"),
        ("--no-token", "", "never require a token"),
        ("--allow-hostname", "NAME", "accept this name, or pattern, in the Host header"),
        ("--allow-origin", "ORIGIN", "let pages of this origin use the apps; * for any"),
        ("--trusted-proxy", "ADDRESS", "trust the X-Forwarded headers of this server"),
        ("--upstream-tls", "[HOST:]PORT", "connect to this upstream with TLS"),
        ("--insecure-upstream", "", "do not verify certificates of this machine's ports"),
        ("--allow-preflight", "", "let CORS preflights reach the apps without a token"),
        ("--any-owner", "", "also reach ports of this machine's other users"),
        ("--certfile", "FILE", "serve HTTPS with this certificate (PEM)"),
        ("--keyfile", "FILE", "the key, if --certfile does not contain it"),
        ("--client-ca", "FILE", "require a client certificate signed by one of these"),
    ),
    "output": (
        ("--check", "[HOST:]PORT", "check an app, show how to open it"),
        ("--json", "", "with --check: print JSON"),
        ("--verbose", "", "log every request"),
        ("--quiet", "", "print errors only"),
        ("--log-json", "", "log as JSON, and every request unless --quiet"),
    ),
    "limits and timeouts": (
        ("--max-head-bytes", "BYTES", "longest head of a request or response"),
        ("--max-target-bytes", "BYTES", "longest request target"),
        ("--max-fields", "COUNT", "most fields in a head"),
        ("--max-chunk-line-bytes", "BYTES", "longest first line of a chunk"),
        ("--max-trailer-bytes", "BYTES", "longest trailers"),
        ("--max-connections", "COUNT", "most connections of clients"),
        ("--max-tunnels", "COUNT", "most open WebSockets"),
        ("--max-idle-upstreams", "COUNT", "most idle connections to apps"),
        ("--head-timeout", "SECONDS", "for the whole head of a request"),
        ("--keep-alive-timeout", "SECONDS", "between requests on a connection"),
        ("--connect-timeout", "SECONDS", "for a connection to an app"),
        ("--response-timeout", "SECONDS", "for the head of a response"),
        ("--stall-timeout", "SECONDS", "for a client that stalls a body"),
        ("--linger-timeout", "SECONDS", "for a request body after its response"),
        ("--idle-upstream-timeout", "SECONDS", "for idle connections to apps"),
        ("--shutdown-timeout", "SECONDS", "for running requests at shutdown"),
    ),
}
METAVARS = {flag: metavar for rows in OPTIONS.values() for flag, metavar, _ in rows}


def _flag(field: str) -> str:
    name = "--" + field.replace("_", "-")
    names = (name, name[:-1], name[:-3] + "y")  # a repeatable option sets a field in the plural
    return next((flag for flag in names if flag in METAVARS), field)


DEFAULTS = Config()
FLAGS = {field: _flag(field) for field in Config._fields}  # the names of options in messages


def _is_strings(value: Any) -> bool:
    is_sequence = isinstance(value, (list, tuple, set, frozenset))
    return is_sequence and all(isinstance(item, str) for item in value)


_STRINGS = "a sequence of strings"
_KINDS = {  # by field, or else by the type of the default; True is also an instance of int
    str: ("a string", lambda value: isinstance(value, str)),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number above 0", lambda value: type(value) is int and value > 0),
    float: ("a number above 0", lambda value: type(value) in (int, float) and value > 0),
    tuple: (_STRINGS, _is_strings),
    type(None): ("a path", lambda value: isinstance(value, (str, os.PathLike))),
    "port": ("a number from 0 to 65535", lambda value: type(value) is int and -1 < value < 65536),
    "host_allowlist": (_STRINGS, lambda value: callable(value) or _is_strings(value)),
    "whole_origin": ("yes or no, or True or False", lambda value: isinstance(value, bool)),
    "token": ("a string", lambda value: isinstance(value, str)),
    "authorize": ("an asynchronous callable", callable),
    "hub": ("a Hub", lambda value: isinstance(value, Hub)),
}  # type: Dict[Any, Tuple[str, Callable[[Any], bool]]]


def check_kind(field: str, value: Any) -> None:
    """ValueError if a value of another kind is given for a field of Config."""
    default = getattr(DEFAULTS, field)
    words, accepts = _KINDS.get(field) or _KINDS[type(default)]
    if not (accepts(value) or value is default is None):
        raise ValueError("%s must be %s" % (FLAGS[field], words))


def parsed_value(field: str, text: str) -> Any:
    """The value that a text means for a field of Config.  ValueError if it has none."""
    default, value = getattr(DEFAULTS, field), text  # type: Any, Any
    if isinstance(default, tuple):
        value = tuple(item.strip() for item in text.split(","))
    elif isinstance(default, bool) or field == "whole_origin":
        value = {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)
    elif isinstance(default, (int, float)):
        with contextlib.suppress(ValueError):
            value = type(default)(text)
    check_kind(field, value)
    return value


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------
# `Exchange` turns a ProxyError into the response.  The others are failures of connections.

# The keys in the advice of a ProxyError: the name of a field stands for its option, "start" for the
# words before an option, and "value" for a value in this form.
COMMAND_LINE_TERMS = dict(FLAGS, start="start the proxy with", value="%s")


def own_command() -> str:
    is_installed = os.path.basename(sys.argv[0]).startswith("port-proxy")
    return "port-proxy" if is_installed else "python3 port_proxy.py"


def printable(text: str) -> str:
    """Untrusted text for a terminal, a log or a page; unprintable characters are escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _escape_record(record: logging.LogRecord) -> bool:
    # Messages contain text from clients and apps.
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logger.addFilter(_escape_record)


class ProxyError(Exception):
    """Ends a request with a response of the proxy itself, such as an error or a redirect.

    status: the HTTP status code.  detail: the explanation for the user, in plain text; the advice
    is appended to it.  fields: additional response headers; ValueError if one is not valid.
    advice: a sentence that names an option, as a `str.format` template with the keys of
    COMMAND_LINE_TERMS, where "{value}" stands for `value`.
    """

    def __init__(
        self, status: int, detail: str, fields: Fields = (), advice: str = "", value: str = ""
    ) -> None:
        super().__init__(status, detail)
        for name, content in fields:
            if not _FIELD_LINE.fullmatch("%s:%s" % (name, content)):
                raise ValueError("the header %s is not valid" % ascii(name))
        self.status, self.fields = status, fields
        self._texts = detail, advice, value
        self.phrase_advice(COMMAND_LINE_TERMS)

    def phrase_advice(self, terms: Mapping[str, str]) -> None:
        """Set `detail` to the explanation and the advice, with these names of the options."""
        self.detail, advice, value = self._texts
        if advice:
            advice = advice.format(**dict(terms, value=terms["value"] % value))
            self.detail += " " + advice[0].upper() + advice[1:]


TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 section 5.6.2
_FIELD_LINE = re.compile(TOKEN + ":[\t -~\x80-\xff]*")  # RFC 9110 section 5.5


class PeerGone(Exception):
    """Nothing more can be sent: the peer has disconnected or stopped reading."""


class Truncated(Exception):
    """EOF in the middle of a message."""


class TimedOut(Exception):
    """A deadline has passed.  The argument "writing" means that the peer did not read."""


# --------------------------------------------------------------------------------------------------
# Routes
# --------------------------------------------------------------------------------------------------
# A route maps a path prefix to an upstream.  It is parsed from the raw request target, which is
# never decoded and re-encoded: path and query reach the app byte for byte.  Routes are cached.

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_UNSPECIFIED = ("0.0.0.0", "::")  # some apps put these into their own URLs
_BASE = re.compile(r"(?:/[A-Za-z0-9\-._~!$&'()*+,=:@%]+)*")  # a ";" would end the Path of a cookie
_BELOW_BASE = re.compile(
    r"(/absolute)?/(?:([A-Za-z0-9_][A-Za-z0-9_.\-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):)?"
    r"([1-9][0-9]{0,4})(/[^\r\n]*)?"
)
_HOST_PATTERN = re.compile(r"[a-z0-9_.*?-]+|[0-9a-f.*?]*:[0-9a-f.*?]*[:*?][0-9a-f:.*?]*")
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_ONLY_IPV4 = r"(?=%s(?:\.%s){3}\Z)" % (_OCTET, _OCTET)
_LABEL = "[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
# Browsers parse 1.2.3 as an IPv4 address.
_DOMAIN = re.compile(r"(?!(?:.*\.)?[0-9]+\Z)%s(?:\.%s)*" % (_LABEL, _LABEL))
_PORT_NUMBER = re.compile(r"[1-9][0-9]{0,4}")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_PREFIX_FIELDS = ("X-Forwarded-Prefix", "X-Forwarded-Context", "X-ProxyContextPath")


class Route(NamedTuple):
    """The upstream for requests with a certain prefix."""

    host: str  # a name or an address in lower case, without brackets
    port: int
    prefix: str  # such as /proxy/8080, as the client spelled it; "" if the host names the port
    absolute: bool  # the prefix is not stripped
    authority: str  # host:port, for the Host header
    scheme: str
    origin: str
    name: str  # PORT or HOST:PORT, as options take it
    place: str  # the upstream, for messages to users
    app_authorities: FrozenSet[str]  # what the app may use in its own URLs
    prefix_lines: Tuple[str, ...]  # header lines with the stripped prefix

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK_NAMES


@functools.lru_cache(maxsize=1024)
def _make_route(
    prefix: str, host: str, port: int, absolute: bool, upstream_tls: Sequence[str]
) -> Route:
    """host: a name, an address, an IPv6 address in brackets, or "" for this machine.

    Raises ProxyError 400 or 404.
    """
    if port > 65535:
        raise ProxyError(404, "There is no port %d; the highest is 65535." % port)
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ProxyError(400, "The text in brackets is not an IPv6 address.")
    host = host.lower() or "localhost"
    authority, is_local = authority_of(host, port), host in LOOPBACK_NAMES
    name = str(port) if is_local else authority
    scheme = "http" if {name, authority}.isdisjoint(upstream_tls) else "https"
    home = LOOPBACK_NAMES + _UNSPECIFIED + (socket.gethostname().lower(),)
    fields = _PREFIX_FIELDS if prefix and not absolute else ()
    return Route(
        host,
        port,
        prefix,
        absolute,
        authority,
        scheme,
        origin="%s://%s" % (scheme, authority),
        name=name,
        place="port %d of %s" % (port, "this machine" if is_local else host),
        app_authorities=frozenset(
            authority_of(known, port) for known in (home if is_local else (host,))
        ),
        prefix_lines=tuple("%s: %s" % (field, prefix) for field in fields),
    )


def find_route(config: Config, target: str, app_port: int = 0) -> Tuple[Optional[Route], str, str]:
    """The route, the raw path and the raw query of a request target in origin form.

    app_port: the port in the host, which overrides the path.  The route is None for the base
    itself.  The path is "" if the slash after the port is missing.  The query includes its "?".
    Raises ProxyError 400 or 404.
    """
    whole_path, mark, query = target.partition("?")
    query = mark + query
    if app_port:
        return _make_route("", "", app_port, False, config.upstream_tls), whole_path, query
    below = path_below(config.base, whole_path)
    if below in ("", "/"):
        return None, below, query
    match = _BELOW_BASE.fullmatch(below or "")
    if not match:
        text = (
            "No port is named here. The forms are {0}/<port>/, {0}/<host>:<port>/,"
            " {0}/absolute/<port>/ and {0}/absolute/<host>:<port>/."
        )
        raise ProxyError(404, text.format(config.base))
    absolute, host, port, path = match.groups("")
    prefix = whole_path[: len(whole_path) - len(path)]
    route = _make_route(prefix, host, int(port), bool(absolute), config.upstream_tls)
    if "/." in path or "/%" in path:  # RFC 3986 section 5.2.4
        steps = ({".": 0, "..": -1}.get(unquote(part), 1) for part in path.split("/")[1:])
        if any(depth < 0 for depth in itertools.accumulate(steps)):
            raise ProxyError(400, "The dot segments of this path lead out of the app.")
    return route, path, query


def authority_of(host: str, port: int) -> str:
    return "%s:%d" % ("[%s]" % host if ":" in host else host, port)


def port_in_host(authority: str, domains: Sequence[str]) -> int:
    """The port in a host such as 8080.localhost, or 0."""
    port, _, domain = host_of(authority).partition(".")
    is_port = domain in domains and _PORT_NUMBER.fullmatch(port) and int(port) <= 65535
    return int(port) if is_port else 0


def host_of(authority: str) -> str:
    """The host in an authority, in lower case and without its port."""
    host, colon, port = authority.lower().rpartition(":")
    return host if colon and not port.endswith("]") else authority.lower()


def path_below(base: str, reference: str) -> Optional[str]:
    """`reference` without `base`, including query and fragment; None if it is not below `base`.

    Segments are compared percent-decoded: "+" may be written as "%2B" (RFC 3986 section 6.2.2.2).
    """
    if not reference.startswith(base) and ("%" in base or "%" in reference):
        path = re.split("[?#]", reference, maxsplit=1)[0]
        start = "/".join(path.split("/")[: base.count("/") + 1])
        base = start if _segments(start) == _segments(base) else base
    is_below = reference.startswith(base) and reference[len(base) : len(base) + 1] in "/?#"
    return reference[len(base) :] if is_below else None


def _segments(path: str) -> List[str]:
    return [unquote(segment, "latin-1") for segment in path.split("/")]


def is_base(base: str, target: str) -> bool:
    """Whether a target is the base itself, with or without a slash at its end."""
    return path_below(base, target.partition("?")[0]) in ("", "/")


def host_regex(patterns: Iterable[str]) -> str:
    """A regex for the hosts (lower case, no brackets) that match one of the normalized patterns.

    A wildcard matches within one label of a name or one group of an IPv6 address; a leading "*."
    matches one or more labels.
    """
    found = []
    for pattern in patterns:
        start, wild = "", "[^.:]"
        if pattern == "*":
            wild = "."
        elif re.fullmatch("[0-9.*?]+", pattern):  # 10.* must not match 10.evil.example
            start, wild = _ONLY_IPV4, "."
        elif pattern.startswith("*."):
            start, pattern = r"(?:[^.:]+\.)+", pattern[2:]
        regex = re.escape(pattern).replace(r"\*", wild + "*").replace(r"\?", wild)
        found.append(start + regex)
    return "|".join(found) or "(?!)"


def normal_base(base: str) -> str:
    """`base` without a slash at its end; ValueError if it is not a plain path."""
    path = base[:-1] if base.endswith("/") else base
    has_dots = any(unquote(segment) in (".", "..") for segment in path.split("/"))
    if not _BASE.fullmatch(path) or has_dots:
        raise ValueError("the base must be a path such as /proxy or /user/ana/proxy, not %r" % base)
    return path


def normal_pattern(given: str) -> str:
    """A host pattern in lower case without brackets; ValueError if it is invalid."""
    pattern = (given[1:-1] if given[:1] + given[-1:] == "[]" else given).lower()
    if not _HOST_PATTERN.fullmatch(pattern):
        text = "a host is a name, an address or a pattern such as *.example.org, not %r"
        raise ValueError(text % given)
    return pattern


def normal_domain(domain: str) -> str:
    """A domain in lower case; ValueError if it is invalid."""
    if not _DOMAIN.fullmatch(domain.lower()):
        raise ValueError("a domain is a name such as apps.example.org, not %r" % domain)
    return domain.lower()


# --------------------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------------------
# The grammar of RFC 9112 sections 2 to 6.  Each head is parsed once, into an immutable record.
# Heads are decoded and encoded as latin-1, one character per byte.  Patterns list their characters,
# because \d, \s and \w also match non-ASCII text.  Patterns are unambiguous, so that no input makes
# them slow.

# Contrary to RFC 3986, browsers send a raw "|", "{" or "^" in targets, and programs send raw UTF-8.
_REQUEST_LINE = re.compile(r"(%s) ([!\"$-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n" % TOKEN)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?\r\n")
_FIELD_NAMES = re.compile("^(%s):[\t -~\x80-\xff]*\r\n" % TOKEN, re.MULTILINE)
_SPACED_NAME = re.compile("^(%s)[\t ]+:" % TOKEN, re.MULTILINE)
# A control byte, except TAB and CRLF.  A CR at the end may be half of a CRLF.
_ILLEGAL = re.compile(rb"[\x00-\x08\n-\x1f\x7f](?<!\r\n)(?<!\r(?=\n|\Z))")
# host or host:port (RFC 3986 section 3.2.2), without user information and IPvFuture.
_AUTHORITY = re.compile(
    r"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?"
)
_HTTP_URL = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE)
_LENGTH = re.compile(r"([0-9]{1,18})(?:[ \t]*,[ \t]*\1)*")  # the same number again is allowed
_IDEMPOTENT = frozenset("GET HEAD OPTIONS TRACE PUT DELETE PROPFIND REPORT SEARCH".split())
_MAX_FORWARDED = 1000  # characters of X-Forwarded-For; 24 IPv6 addresses


class Headers:
    """The field lines of a head, in order, with an index."""

    def __init__(self, section: str, config: Config) -> None:
        """Parse a field section with its empty line (RFC 9112 section 5); ProxyError 400 or 431."""
        self.lines = section.split("\r\n")[:-2]  # unchanged, "Name: value"
        if len(self.lines) > config.max_fields:
            raise ProxyError(431, "The message head has more than %d fields." % config.max_fields)
        self.keys = _FIELD_NAMES.findall(section.lower())  # the field names in lower case
        if not len(self.keys) == len(self.lines) == section.count("\n") - 1:
            text = "A field line must be 'name: value', without white space before the name or the"
            raise ProxyError(400, text + " colon, and without control bytes (RFC 9112 section 5).")
        self.index = dict(zip(self.keys, self.lines))  # for a repeated field, its last line
        self.connection = self.tokens("connection")

    def get(self, name: str) -> str:
        """The last value of the field `name` (lower case), "" if it is missing."""
        line = self.index.get(name)
        return "" if line is None else line[len(name) + 1 :].strip(" \t")

    def get_all(self, name: str) -> List[str]:
        """All values of the field `name` (lower case), in order."""
        if name not in self.index:
            return []
        if len(self.index) == len(self.keys):  # no field is repeated
            return [self.get(name)]
        pairs = zip(self.keys, self.lines)
        return [line[len(name) + 1 :].strip(" \t") for key, line in pairs if key == name]

    def tokens(self, name: str) -> FrozenSet[str]:
        """The members of the list-valued field `name` (lower case), in lower case."""
        if name not in self.index:
            return frozenset()
        members = ",".join(self.get_all(name)).lower().split(",")
        return frozenset([member.strip(" \t") for member in members])


class Framing(NamedTuple):
    """How a body ends."""

    kind: str  # "none", "length", "chunked", or "close" for a body that ends at EOF
    length: int = 0  # in bytes; not for the kind "chunked"


NO_BODY = Framing("none")
CHUNKED = Framing("chunked")
UNTIL_CLOSE = Framing("close", 1 << 63)  # no limit (sys.maxsize may be 2 GiB)


def declared_framing(headers: Headers, minor: str, undeclared: Framing) -> Framing:
    """The framing in a head, or else `undeclared` (RFC 9112 section 6.3); ProxyError 400 or 501."""
    if "transfer-encoding" in headers.index:
        codings = headers.get_all("transfer-encoding")
        if "content-length" in headers.index or minor == "0" or len(codings) > 1:
            text = "Transfer-Encoding is not allowed twice, beside Content-Length or in HTTP/1.0."
            raise ProxyError(400, text)
        if codings[0].lower() != "chunked":
            raise ProxyError(501, "The only transfer coding supported is 'chunked'.")
        return CHUNKED
    if "content-length" not in headers.index:
        return undeclared
    match = _LENGTH.fullmatch(",".join(headers.get_all("content-length")))
    if not match:
        raise ProxyError(400, "Content-Length is not a single number of at most 18 digits.")
    return Framing("length", int(match.group(1)))


_network = functools.lru_cache(maxsize=64)(ipaddress.ip_network)


class ClientInfo(NamedTuple):
    """A client, and the public origin: the proxy's origin as the client sees it."""

    address: str  # "" if unknown
    scheme: str
    authority: str  # host:port; "" if the request has none
    app_port: int = 0  # the port in a host such as 8080.localhost, or 0
    hops: str = ""  # the value of X-Forwarded-For, "" for none
    port: str = ""  # the value of X-Forwarded-Port


def client_info(
    headers: Headers, address: str, scheme: str, authority: str, config: Config
) -> ClientInfo:
    """address, scheme: of the connection.  Only a trusted proxy's X-Forwarded headers are used: the
    client is the last untrusted address in X-Forwarded-For, or else the first.  ProxyError 400."""
    hops, port = address, ""
    if config.trusted_proxies and _is_trusted(address, config.trusted_proxies):
        value = ",".join(headers.get_all("x-forwarded-for"))
        if len(value) > _MAX_FORWARDED:
            raise ProxyError(400, "X-Forwarded-For is longer than %d characters." % _MAX_FORWARDED)
        forwarded = [hop for hop in (part.strip(" \t") for part in value.split(",")) if hop]
        hops = ", ".join(forwarded + [address] * bool(address))
        for address in reversed(forwarded):
            if not _is_trusted(address, config.trusted_proxies):
                break
        # Of several members, the outermost proxy wrote the first.
        names = ("x-forwarded-proto", "x-forwarded-host", "x-forwarded-port")
        proto, host, port = (headers.get(name).partition(",")[0].strip(" \t") for name in names)
        scheme = proto.lower() if proto.lower() in _DEFAULT_PORTS else scheme
        authority = host if _AUTHORITY.fullmatch(host) else authority
        port = port if re.fullmatch("[0-9]{1,5}", port) else ""
    host, _, own_port = authority.rpartition(":")
    if not port:
        port = own_port if host and own_port.isdigit() else _DEFAULT_PORTS[scheme][1:]
    app_port = port_in_host(authority, config.domains)
    return ClientInfo(address, scheme, authority, app_port, hops, port)


def _is_trusted(address: str, trusted_proxies: Sequence[str]) -> bool:
    try:
        ip_address = ipaddress.ip_address(address)
    except ValueError:
        return not address and "unix" in trusted_proxies  # Unix sockets have no address
    return any(proxy != "unix" and ip_address in _network(proxy) for proxy in trusted_proxies)


class Request(NamedTuple):
    """A parsed, routed request."""

    method: str
    target: str  # raw, in origin form or "*"
    authority: str  # host:port from the absolute form, or else from Host
    minor: str  # the HTTP minor version, "0" or "1"
    headers: Headers
    framing: Framing
    client: ClientInfo
    route: Optional[Route]  # None for the proxy's own pages, and if there is a `route_error`
    path: str  # without the route's prefix
    query: str
    route_error: Optional[ProxyError]
    keep_alive: bool  # the client may send another request
    is_replayable: bool  # may be sent again if a pooled connection turns out to be closed
    is_websocket: bool
    is_navigation: bool  # sent by a browser for a new page, not by a script or a program
    is_page_visit: bool  # a navigation with GET or HEAD
    is_own_origin: bool  # Origin is present and is the public origin
    is_unprefixed: bool = False  # the app was found by Referer or cookie

    @property
    def fields(self) -> Fields:
        """All header fields as (name, value) pairs, for the `authorize` of an embedder."""
        split = (line.partition(":") for line in self.headers.lines)
        return tuple((name, value.strip(" \t")) for name, _, value in split)

    @property
    def is_above_prefix(self) -> bool:
        """Whether the client's path lacks the prefix, or the slash after it as in /proxy/8080.
        Cookies and service workers are then valid outside the app, unless they set a path."""
        return self.is_unprefixed or not self.path


class Response(NamedTuple):
    """A parsed response head."""

    status: int
    reason: str
    headers: Headers
    framing: Framing
    is_reusable: bool  # its connection can carry another request
    body: bytes = b""  # of a response to one of the proxy's own requests, see `fetch`


def parse_request(head: bytes, address: str, scheme: str, config: Config) -> Request:
    """Parse a request head (RFC 9112 sections 3 to 6); ProxyError 4xx, 501 or 505."""
    text = head.decode("latin-1")
    method, target, minor, end = parse_request_line(text, config)
    headers = Headers(text[end:], config)
    # Of two Host or Origin fields, gate and app might use different ones (RFC 6454 section 7.3).
    hosts, origins = headers.get_all("host"), headers.get_all("origin")
    if len(hosts) > 1 or len(origins) > 1 or (minor == "1" and not hosts):
        raise ProxyError(400, "A request has exactly one Host field, and at most one Origin field.")
    authority = "".join(hosts)
    if hosts and not _AUTHORITY.fullmatch(authority):
        raise ProxyError(400, "The Host field does not hold a valid host and port.")
    if method == "CONNECT":
        allow = (("Allow", "GET, HEAD, POST, OPTIONS"),)
        raise ProxyError(405, "CONNECT is refused: this is not a forward proxy.", allow)
    if target[0] != "/" and not (target == "*" and method == "OPTIONS"):
        absolute = _HTTP_URL.fullmatch(target)
        if not absolute or not _AUTHORITY.fullmatch(absolute.group(2)):
            raise ProxyError(400, "The request target is neither a path nor an http URL.")
        _, authority, target = absolute.groups()  # overrides Host (RFC 9112 section 3.2.2)
        if not target.startswith("/"):
            target = "*" if method == "OPTIONS" and not target else "/" + target
    framing = declared_framing(headers, minor, NO_BODY)
    client = client_info(headers, address, scheme, authority, config)
    may_upgrade = "upgrade" in headers.connection and method == "GET" and minor == "1"
    is_websocket = may_upgrade and list(map(str.lower, headers.get_all("upgrade"))) == ["websocket"]
    accepts_pages = "text/html" in headers.get("accept").lower()
    is_navigation = accepts_pages and headers.get("sec-fetch-mode") in ("", "navigate")
    route, path, query, route_error = None, "", "", None  # type: Optional[Route], str, str, Any
    try:
        if target != "*":
            route, path, query = find_route(config, target, client.app_port)
    except ProxyError as error:  # `find_app` raises it, or else finds the app
        route_error = error
    return Request(
        method,
        target,
        authority,
        minor,
        headers,
        framing,
        client,
        route,
        path,
        query,
        route_error,
        minor == "1" and "close" not in headers.connection,  # keep_alive
        framing is NO_BODY and method in _IDEMPOTENT,  # is_replayable: RFC 9110 section 9.2.2
        is_websocket,  # RFC 6455 section 4.1; other upgrades, such as h2c, are ignored
        is_navigation,
        is_navigation and method in ("GET", "HEAD") and not is_websocket,  # is_page_visit
        rest_of_own_url(headers.get("origin"), client.authority) == "",  # is_own_origin
    )


def parse_request_line(text: str, config: Config) -> Tuple[str, str, str, int]:
    """Method, target, minor version and length of the line; ProxyError 400, 414 or 505."""
    match = _REQUEST_LINE.match(text)
    if not match:
        text = "The request line must be 'METHOD TARGET HTTP/1.1' with single spaces."
        raise ProxyError(400, text)
    method, target, major, minor = match.groups()
    if major != "1" or minor not in "01":
        raise ProxyError(505, "Only HTTP/1.0 and HTTP/1.1 are supported.")
    if len(target) > config.max_target_bytes:
        raise ProxyError(414, "The target is longer than %d bytes." % config.max_target_bytes)
    return method, target, minor, match.end()


def parse_response(head: bytes, method: str, config: Config) -> Response:
    """Parse the head of a response to `method` (RFC 9112 section 4); ProxyError 4xx or 501."""
    text = head.decode("latin-1")
    match = _STATUS_LINE.match(text)
    if not match:
        raise ProxyError(400, "The status line is not valid for HTTP/1.0 or HTTP/1.1.")
    minor, code, reason = match.groups()
    status, section = int(code), text[match.end() :]
    try:
        headers = Headers(section, config)
    except ProxyError:  # white space before colons is removed (RFC 9112 section 5.1)
        headers = Headers(_SPACED_NAME.sub(r"\1:", section), config)
    framing = declared_framing(headers, minor, UNTIL_CLOSE)
    if method == "HEAD" or status < 200 or status in (204, 304):
        framing = NO_BODY
    is_reusable = minor == "1" and "close" not in headers.connection
    return Response(status, reason or "", headers, framing, is_reusable)


def check_partial_head(head: bytes, checked: int, is_request: bool, config: Config) -> None:
    """Raise ProxyError if an incomplete head is too long, or invalid after its `checked` bytes."""
    if _ILLEGAL.search(head, max(0, checked - 1)):  # the last checked byte may be a CR
        raise ProxyError(400, "The message head has a control byte, or a CR or LF outside CRLF.")
    end = head.find(b"\r\n") + 2
    if is_request:
        if end > max(1, checked):  # the request line is now complete
            parse_request_line(head[:end].decode("latin-1"), config)
        elif end == 1 and len(head) > config.max_target_bytes:
            raise ProxyError(414, "The target is longer than %d bytes." % config.max_target_bytes)
    elif not head.startswith(b"HTTP/"[: len(head)]):
        raise ProxyError(400, "The response does not begin with HTTP/.")
    if len(head) > config.max_head_bytes:
        raise ProxyError(431, "The message head is longer than %d bytes." % config.max_head_bytes)


def rest_of_own_url(url: str, authority: str) -> Optional[str]:
    """Path, query and fragment of a URL with this authority; None for other URLs.

    Schemes are not compared: a server in front of the proxy may terminate TLS.
    """
    match = url and authority and _HTTP_URL.fullmatch(url)
    if not match:
        return None
    scheme, found, rest = match.groups()
    is_own = found == authority or with_port(found, scheme) == with_port(authority, scheme)
    return rest if is_own else None


def with_port(authority: str, scheme: str) -> str:
    """The authority in lower case, with the default port of the scheme if it has none."""
    authority = authority.lower()
    has_port = ":" in authority and not authority.endswith("]")
    return authority if has_port else authority + _DEFAULT_PORTS[scheme.lower()]


def cookie_name(cookie: str) -> str:
    """The cookie name in a Cookie pair or a Set-Cookie value, as lenient parsers read it."""
    return cookie.partition(";")[0].lstrip(" \t=").partition("=")[0].rstrip(" \t")


def cookie_values(headers: Headers, name: str) -> List[str]:
    cookies = ";".join(headers.get_all("cookie"))
    pairs = [pair.strip(" \t") for pair in cookies.split(";")] if name in cookies else []
    return [pair[len(name) + 1 :] for pair in pairs if pair.startswith(name + "=")]


# --------------------------------------------------------------------------------------------------
# Bodies
# --------------------------------------------------------------------------------------------------
# One decoder without I/O for all framings (RFC 9112 sections 6 and 7).

_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSION = r"[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?" % (TOKEN, TOKEN, _QUOTED)
_EXTENSIONS = ("(?:%s)*" % _EXTENSION).encode("latin-1")
_TRAILER_LINES = (r"(?:%s\r\n)*" % _FIELD_LINE.pattern).encode("latin-1")
# The end of one chunk and the size of the next: at most 15 digits, because parsers differ on more.
_CHUNK_START = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})%b([ \t]*)\r\n" % _EXTENSIONS)
_TRAILERS = re.compile(rb"%b\r\n" % _TRAILER_LINES)
# Beginnings of these two, which more data may complete.
_PARTIAL_START = re.compile(rb"\r(?:\n(?:[0-9A-Fa-f]{1,15}(?:[ \t]*;[^\r\n]*|[ \t]*)\r?)?)?")
_PARTIAL_TRAILERS = re.compile(rb"%b[^\x00-\x08\n-\x1f\x7f]*\r?" % _TRAILER_LINES)
_CHUNKS_IN_A_ROW = 250  # then other requests have their turn


class BodyDecoder:
    """Finds the data of a body.  Chunk extensions and trailers are checked and dropped.

    Responses may have white space after a chunk size, because some devices send it.
    finished: the body is complete.  One that ends at EOF is never finished here; see `Body`.
    """

    def __init__(self, framing: Framing, config: Config, is_response: bool = False) -> None:
        self.rest = b""  # unused bytes of the last `data`; feed them again unless it is finished
        self._config = config
        self._is_response = is_response
        self._framing = framing
        self._remaining = framing.length  # bytes of the body or the chunk that are still to come
        self._in_trailers = False
        # An incomplete _CHUNK_START or _TRAILERS.  The CRLF lets the first size match _CHUNK_START.
        self._partial = b"\r\n" if framing is CHUNKED else b""
        self.finished = framing is not CHUNKED and not self._remaining

    def feed(self, data: bytes) -> bytes:
        """The body data in `data`, of at most _CHUNKS_IN_A_ROW chunks; ProxyError 400."""
        data, self._partial = self._partial + data, b""
        at, found = 0, []  # type: int, List[bytes]
        while at < len(data) and not self.finished and len(found) < _CHUNKS_IN_A_ROW:
            if self._remaining:
                found.append(data[at : at + self._remaining])
                at += len(found[-1])
                self._remaining -= len(found[-1])
                self.finished = self._framing is not CHUNKED and not self._remaining
            else:
                at = self._take_line(data, at)
        self.rest = data[at:]
        return b"".join(found)

    def _take_line(self, data: bytes, at: int) -> int:
        """Process the text between chunks, or the trailers.  Returns the position behind it."""
        if self._in_trailers:
            whole, partial, limit = _TRAILERS, _PARTIAL_TRAILERS, self._config.max_trailer_bytes
            end, text = at + limit + 2, "A trailer is not a valid field line."
        else:
            whole, partial, limit = _CHUNK_START, _PARTIAL_START, self._config.max_chunk_line_bytes
            end = at + limit + 4
            text = "A chunk must begin with its size in hexadecimal digits, and end in CRLF."
        match = whole.match(data, at, end)
        if not match:
            self._partial = data[at:end]
            if not partial.fullmatch(self._partial):
                raise ProxyError(400, text)
            if end <= len(data):
                text = "A chunk size line, or the trailers, are longer than %d bytes."
                raise ProxyError(400, text % limit)
            return len(data)
        self.finished = self._in_trailers
        if not self.finished:
            if match.group(2) and not self._is_response:
                raise ProxyError(400, text)
            self._remaining = int(match.group(1), 16)
            self._in_trailers = not self._remaining
        return match.end()


# --------------------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------------------
# One class for connections from clients and to upstreams.  At most one coroutine reads from a
# connection at a time, and at most one writes.  Data that no coroutine waits for goes to the
# StreamReader.  Above _MAX_UNREAD bytes, the transport pauses.  Deadlines are absolute.  One coarse
# timer checks the deadlines of all connections.

_MAX_UNREAD = 1 << 16  # bytes
_PENDING_BYTES = 1 << 26  # of all clients together; see `Deadlines.set_pending`
_CLOSE_SECONDS = 60.0  # timeout for closing a connection
_UNIX = getattr(socket, "AF_UNIX", None)

# The states of a connection.  One to an upstream is IDLE in the pool, and otherwise ACTIVE.
HANDSHAKE = "handshake"  # the TLS handshake of a client, in `task`; there is no transport yet
IDLE = "idle"  # no request, and no task
READING_HEAD = "reading head"
ACTIVE = "active"  # serves a request
CLOSING = "closing"  # no further request is served, and no data is kept


class StreamWriter(asyncio.StreamWriter):
    """Unlike asyncio's since 3.11.5, its deletion does not close the transport: tunnels use it."""

    def __del__(self, *_: Any) -> None:
        pass


class Connection(asyncio.StreamReaderProtocol):
    """A connection: StreamReader, StreamWriter, deadlines, and callbacks for data and EOF.

    on_accept: called for a new client; None for a connection to an upstream.
    """

    is_lent = False  # by another server, to which unused bytes cannot be given back

    __slots__ = (
        "_on_accept", "_waiting_read", "address", "buffer", "deadlines", "ended", "eof_ends_body",
        "failure", "has_received", "is_admitted", "is_reused", "read_deadline", "read_timeout",
        "reader", "scheme", "served", "state", "task", "transport", "unread", "watcher",
        "write_deadline", "writer",
    )  # fmt: skip

    def __init__(
        self, deadlines: "Deadlines", on_accept: Optional[Callable[["Connection"], None]] = None
    ) -> None:
        self.reader = asyncio.StreamReader(loop=deadlines.loop)
        super().__init__(self.reader, loop=deadlines.loop)
        self.deadlines = deadlines
        self._on_accept = on_accept
        self.state = ACTIVE
        self.task = None  # type: Optional[asyncio.Future[None]]  # serves a client
        self.served = None  # type: Any  # gate and request; see `close_ended_sessions`
        self.watcher = None  # type: Optional[Callable[[Connection], None]]  # of data and EOF
        self._waiting_read = None  # type: Optional[asyncio.Future[bytes]]
        self.buffer = b""  # bytes read but not used
        self.unread = 0  # bytes in the StreamReader
        self.ended = False  # by EOF or a failure
        self.failure = None  # type: Optional[BaseException]  # None after EOF
        self.has_received = False  # since it was taken from the pool
        self.is_reused = False
        self.eof_ends_body = False  # EOF ends the body that is sent to the peer
        self.is_admitted = on_accept is None  # the gate has admitted a request of this client
        self.read_deadline = self.write_deadline = FOREVER
        self.read_timeout = FOREVER  # for more body data

    def connection_made(self, transport: Any) -> None:
        # Without `super`: the StreamReader must not pause the transport.  Before 3.11, a reader
        # that resumes a closed TLS transport raises an error and loses its data.
        self.transport = transport
        self.writer = StreamWriter(self.transport, self, self.reader, self.deadlines.loop)
        peer = transport.get_extra_info("peername")
        self.address = plain_address(peer[0]) if isinstance(peer, tuple) else ""  # an IP address
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self.deadlines.connections.add(self)
        if self._on_accept is not None:
            self._on_accept(self)

    def data_received(self, data: bytes) -> None:
        if not self.is_admitted and self.state is not CLOSING:
            size = self.deadlines.pending.get(self, 0) + len(data)
            self.deadlines.set_pending(self, size)
        if self.ended:  # a deadline has passed, or too many bytes are pending
            return
        self.has_received = True
        if not self._finish_read(data):
            self.unread += len(data)
            self.reader.feed_data(data)
            if self.unread > _MAX_UNREAD:
                with contextlib.suppress(RuntimeError, AttributeError):  # before 3.11, if closed
                    self.transport.pause_reading()
        if self.watcher is not None:
            self.watcher(self)

    def _finish_read(self, data: bytes) -> bool:
        """Let a waiting `read` return `data`; False if none waits."""
        waiting, self._waiting_read = self._waiting_read, None
        if waiting is None or waiting.done():  # done: cancelled
            return False
        waiting.set_result(data)
        return True

    def admit(self) -> None:
        if not self.is_admitted:
            self.is_admitted = True
            self.deadlines.set_pending(self, 0)

    def eof_received(self) -> bool:
        self.end()
        return bool(self.transport.can_write_eof())

    def connection_lost(self, exc: Optional[Exception]) -> None:
        sock = self.transport.get_extra_info("socket")  # None in uvloop, if it is closed
        if isinstance(exc, OSError) and not self.ended and self.scheme == "http" and sock:
            # asyncio stops reading when a write fails.  An upstream that rejects a request body may
            # have sent its response before that: the kernel still holds it.
            fd = sock.fileno()
            with contextlib.suppress(OSError), socket.fromfd(fd, sock.family, sock.type) as copy:
                copy.setblocking(False)
                for data in iter(lambda: copy.recv(65536), b""):
                    self.data_received(data)
        self.deadlines.connections.discard(self)
        self.deadlines.set_pending(self, 0)
        self.end(exc)
        # Without the exception, the reader still returns the data that it holds.
        super().connection_lost(None)

    def end(self, failure: Optional[BaseException] = None) -> None:
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        self.reader.feed_eof()
        self._finish_read(b"")
        if self.watcher is not None:
            self.watcher(self)

    async def read(self) -> bytes:
        """The next bytes, without those in `buffer`; b"" at EOF.  Raises `failure`."""
        if self.unread or self.ended:
            data = await self.reader.read(self.unread)
            if self.unread > _MAX_UNREAD:
                with contextlib.suppress(RuntimeError, AttributeError):
                    self.transport.resume_reading()
            self.unread = 0
        else:  # the data is not copied into the StreamReader and out of it
            self._waiting_read = self.deadlines.loop.create_future()
            data = await self._waiting_read
        if not data and self.failure is not None:
            raise self.failure
        return data

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():  # then uvloop raises RuntimeError
            self.writer.write(data)

    async def drain(self, timeout: float) -> None:
        """Wait for most of the queued bytes to be sent.  Raises PeerGone, also after `timeout`."""
        self.write_deadline = now() + timeout
        try:
            await self.writer.drain()
        except OSError:
            raise PeerGone()
        if self.transport.is_closing():
            raise PeerGone()

    def queued(self) -> int:
        try:
            return int(self.transport.get_write_buffer_size())
        except AttributeError:  # TLS before 3.11, shortly before `connection_lost`
            return 0

    def is_quiet(self) -> bool:
        """Whether the connection is open, all received data was used, and all data was sent."""
        is_open = not self.ended and not self.transport.is_closing()
        return is_open and not (self.buffer or self.unread or self.queued())

    def check_deadlines(self, time: float) -> None:
        is_waiting = self.state is IDLE or self._waiting_read is not None
        if is_waiting and time > self.read_deadline and not self.queued():  # unsent data: not idle
            self.end(TimedOut())
        # asyncio waits for the close_notify of a TLS peer, before 3.11 forever.
        if time > self.write_deadline and (self.queued() or self.transport.is_closing()):
            self.abort(TimedOut("writing"))
        # While it is paused, asyncio does not notice a reset, nor that a Unix socket is closed.
        if (self.unread > _MAX_UNREAD or self.is_lent) and poll(self.transport, "POLLHUP"):
            self.abort()

    def close(self) -> None:
        """Close once the queued bytes are sent, or at the write deadline, a minute by default."""
        if not self.transport.is_closing():
            if not (self.queued() and now() < self.write_deadline < FOREVER):
                self.write_deadline = now() + _CLOSE_SECONDS
            self.transport.close()

    def abort(self, failure: Optional[BaseException] = None) -> None:
        """Close at once, with a reset if the peer could take EOF for the end of its body.

        failure: what a `read` raises from now on.
        """
        sock = self.transport.get_extra_info("socket")
        if self.eof_ends_body and sock and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.end(failure or ConnectionAbortedError(errno.ECONNABORTED, "closed by the proxy"))
        self.transport.abort()


def poll(transport: Any, event: str) -> bool:
    """Whether poll(2) reports an event, such as "POLLIN", which includes EOF and failures."""
    sock, bits = transport.get_extra_info("socket"), getattr(select, event, 0)
    if not bits or sock is None or sock.fileno() < 0:  # Windows has no poll(2)
        return False
    poller = select.poll()
    poller.register(sock.fileno(), bits)
    return bool(dict(poller.poll(0)).get(sock.fileno(), 0) & bits)


def close_once(transport: Any) -> None:
    """Close after the queued bytes.  From 3.11 on, a second `close` of TLS disables `abort`."""
    if not transport.is_closing():
        transport.close()


def end_writing(transport: Any) -> None:
    """Send EOF after the queued bytes.  A TLS transport is closed: TLS has no half-close."""
    if not transport.can_write_eof():
        close_once(transport)
    elif not transport.is_closing():
        try:
            transport.write_eof()
        except OSError:  # in 3.6, if the peer has reset the connection
            transport.abort()


def plain_address(text: str) -> str:
    """An IP address without its zone.  IPv4-mapped IPv6 becomes IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


class Deadlines:
    """All open connections and tunnel ends, and one timer that checks their deadlines."""

    def __init__(self, config: Config) -> None:
        self.loop = asyncio.get_event_loop()
        # Seconds between ticks: a quarter of the shortest timeout, between 0.05 and 1.
        timeouts = [getattr(config, name) for name in Config._fields if name.endswith("_timeout")]
        self._interval = min(1.0, max(0.05, float(min(timeouts)) / 4))
        self.connections = set()  # type: Set[Any]
        self.pending = {}  # type: Dict[Connection, int]
        self._pending_bytes = 0
        self.last_activity = 0.0  # when an app was used, in seconds since the epoch
        self._tasks = []  # type: List[asyncio.Task[None]]
        self._timer = self.loop.call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(self._interval, self._tick)
        time = now()
        for connection in list(self.connections):
            try:
                connection.check_deadlines(time)
            except Exception as error:  # the others keep their deadlines
                logger.error("internal error: %r", error)

    def set_pending(self, connection: Connection, size: int) -> None:
        """Count the bytes of an incomplete request head, or all bytes of a client not yet admitted.

        Above the limit, abort this connection and the one counted for longest.
        """
        size = 0 if connection.transport.is_closing() else size
        self._pending_bytes += size - self.pending.get(connection, 0)
        self.pending[connection] = size
        if not size:
            del self.pending[connection]
        elif self._pending_bytes > _PENDING_BYTES:
            next(iter(self.pending)).abort()  # this frees memory only later: abort both
            connection.abort()

    def run(self, coroutine: Awaitable[None]) -> None:
        """Run a coroutine in the background until `close`."""
        self._tasks.append(asyncio.ensure_future(coroutine, loop=self.loop))

    async def close(self, timeout: float) -> None:
        """Wait `timeout` seconds for connections to close, abort the rest; end tasks and timer."""
        await cancel(self._tasks)
        for seconds in (timeout, 1.0):  # a second for the aborted ones to end
            until = now() + seconds
            while self.connections and now() < until:
                await asyncio.sleep(0.01)
            for connection in list(self.connections):
                connection.abort()
        self._timer.cancel()


async def cancel(tasks: "Sequence[asyncio.Future[None]]") -> None:
    """Cancel tasks, and wait until they have ended."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


async def read_head(connection: Connection, is_request: bool, config: Config) -> bytes:
    """Read a message head up to its empty line.  Further bytes stay in the connection's buffer.

    Raises ProxyError as soon as the head is invalid, Truncated at EOF, TimedOut at the connection's
    read deadline, or another `failure` of the connection.
    """
    checked = 0
    while True:
        if checked == len(connection.buffer):
            data = await connection.read()
            if not data:
                raise Truncated()
            connection.buffer += data
        head = connection.buffer
        end = head.find(b"\r\n\r\n", max(0, checked - 3)) + 4
        if 4 <= end <= config.max_head_bytes:
            connection.buffer = head[end:]
            return head[:end]
        check_partial_head(head, checked, is_request, config)
        checked = len(head)
        if is_request:
            connection.deadlines.set_pending(connection, checked)


class Body(BodyDecoder):
    """A message body that is read from one connection, `source`, and sent to another.

    sent_framing: for the recipient; one that speaks HTTP/1.0 needs UNTIL_CLOSE, not CHUNKED.
    count: bytes of data so far.  When `finished`, the source's buffer holds the bytes after it.
    """

    def __init__(
        self, source: Connection, framing: Framing, config: Config, *, is_response: bool
    ) -> None:
        super().__init__(framing, config, is_response)
        self.source = source
        self.sent_framing = CHUNKED if framing is UNTIL_CLOSE else framing
        self.count = 0

    def buffered(self) -> bytes:
        """The body data in the source's buffer; ProxyError 400 if it is malformed."""
        if self.finished or not self.source.buffer:
            return b""
        data = self.feed(self.source.buffer)
        self.source.buffer = self.rest
        self.count += len(data)
        return data

    async def read(self, timeout: float) -> bytes:
        """The next body data, which may be empty.

        Raises ProxyError 400 if the body is malformed, Truncated if it is incomplete, or the
        `failure` of the connection.  If no data comes for `timeout` seconds, raises ProxyError 408
        for a request, TimedOut for a response.
        """
        if self.source.buffer:  # after the head, or after _CHUNKS_IN_A_ROW
            await asyncio.sleep(0)
            return self.buffered()
        self.source.read_deadline = now() + timeout
        try:
            self.source.buffer = await self.source.read()
        except TimedOut:
            if self._is_response:
                raise
            raise ProxyError(408, "The request body did not arrive in time.")
        if not self.source.buffer:
            if self._framing is not UNTIL_CLOSE:
                raise Truncated()
            self.finished = True
        return self.buffered()

    def encode(self, data: bytes) -> bytes:
        """The bytes to send for the latest body data; at the end, with the last chunk."""
        if self.sent_framing is not CHUNKED:
            return data
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        return chunk + b"0\r\n\r\n" if self.finished else chunk

    async def relay(self, target: Connection, write_timeout: float) -> None:
        """Send the queued bytes, and the rest of the body as it comes."""
        await target.drain(write_timeout)
        while not self.finished:
            target.deadlines.last_activity = time.time()
            target.write(self.encode(await self.read(self.source.read_timeout)))
            await target.drain(write_timeout)


# --------------------------------------------------------------------------------------------------
# Header rewriting
# --------------------------------------------------------------------------------------------------
# Apps get requests as through `ssh -L`: URLs of the public origin become URLs of the upstream.  In
# responses, URLs of the upstream become paths below the prefix.  In the tables of fields, None
# drops a field, and a function translates its value.  Other fields are unchanged.

# RFC 9110 section 7.6.1, with Trailer (trailers are dropped) and proxy authentication (11.7).
_HOP_BY_HOP = (
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer"
    " transfer-encoding upgrade"
).split()
_CONNECTION_OPTIONS = frozenset(["close", "keep-alive", "upgrade"])
# The proxy drops these fields of the client, and sets most of them itself.
_SET_BY_PROXY = (
    "host content-length transfer-encoding forwarded x-forwarded-for x-forwarded-proto"
    " x-forwarded-host x-forwarded-port"
).split() + [name.lower() for name in _PREFIX_FIELDS]
MARK_FIELD = "Port-Proxy-Mark"  # names this process, to detect loops
_UPGRADE_LINES = ["Connection: Upgrade", "Upgrade: websocket"]
# GTK Broadway accepts only the spelling of RFC 6455; a server in front may send lower case.
_HANDSHAKE_NAME = re.compile(r"\A(?:origin|sec-websocket-[a-z]+):", re.IGNORECASE)
# Gradio's API uses X-Forwarded-Host for the URLs of result files, and does not compare it with
# Origin.  The second part is for Gradio 4 and older.
_USES_PUBLIC_ORIGIN = re.compile(r"/gradio_api/|\A/(?:queue/join|run/|call/)")
# _REFRESH and _BRACKETED have three groups: before the URL, the URL, behind it.
_REFRESH = re.compile(
    r"(\A[0-9.]*[ \t]*[;,][ \t]*(?:url[ \t]*=[ \t]*)?['\"]?)([^'\"]*)()", re.IGNORECASE
)
# <URL> outside quoted strings: Link (RFC 8288 section 3) and If (RFC 4918 section 10.4).
_BRACKETED = re.compile(r'"(?:[^"\\]|\\(?:.|\Z))*"?|(<)([^<>]*)(>)')
_OTHER_HOST = re.compile(r"/\t*[/\\]")  # browsers parse the rest as a host


def request_for_upstream(request: Request, gate: Any, mark: str = "") -> bytes:
    """The head of a request for its upstream, with this value of MARK_FIELD."""
    route, client = request.route, request.client
    assert route is not None
    is_hidden = _hides_public_origin(request, gate)
    table = _HIDDEN_ORIGIN_TABLE if is_hidden else _REQUEST_TABLE
    path = (route.prefix + request.path) if route.absolute else (request.path or "/")
    host = (gate.config.preserve_host and client.authority) or route.authority
    target = path + gate.strip_query(request.query)
    lines = ["%s %s HTTP/1.1" % (request.method, target), "Host: " + host]
    lines += _rewritten_lines(request.headers, table, _SET_BY_PROXY, request, route, gate)
    if client.hops:
        lines.append("X-Forwarded-For: " + client.hops)
    lines.append("X-Forwarded-Proto: " + (route.scheme if is_hidden else client.scheme))
    if client.authority and not is_hidden:
        lines += ["X-Forwarded-Host: " + client.authority, "X-Forwarded-Port: " + client.port]
    lines += route.prefix_lines
    if mark:
        lines.append("%s: %s" % (MARK_FIELD, mark))
    if request.is_websocket:
        lines = [
            _HANDSHAKE_NAME.sub(lambda m: m.group().title().replace("Webs", "WebS"), line)
            for line in lines
        ]
        lines += _UPGRADE_LINES
    return serialise(lines, request.framing)


def response_lines(response: Response, request: Request, gate: Any) -> List[str]:
    """The status line and header lines of a response for the client, without its framing."""
    route, headers = request.route, response.headers
    assert route is not None
    lines = ["HTTP/1.1 %d %s" % (response.status, response.reason)]
    lines += _rewritten_lines(headers, _RESPONSE_TABLE, (), request, route, gate)
    if response.framing is NO_BODY and response.status >= 200 and response.status != 204:
        # HEAD and 304: as for GET.
        lines += ["Content-Length: " + length for length in headers.tokens("content-length")]
    if route.prefix and (request.is_above_prefix or "service-worker-allowed" in headers.index):
        # A service worker may control its own app, and nothing else.
        lines.append("Service-Worker-Allowed: %s/" % route.prefix)
    lines += ["%s: %s" % field for field in gate.response_fields()]
    if response.status == 101:
        lines += _UPGRADE_LINES
    return lines


def _rewritten_lines(
    headers: Headers, table: Dict[str, Any], dropped: Sequence[str], *context: Any
) -> List[str]:
    """dropped: names to drop in the spelling with "_", too; to CGI and WSGI, both are the same."""
    if not headers.connection <= _CONNECTION_OPTIONS:  # RFC 9110 section 7.6.1
        table = {**table, **dict.fromkeys(headers.connection)}
    lines = []
    for key, line in zip(headers.keys, headers.lines):
        if key in table:
            action = table[key]
            value = line[len(key) + 1 :].strip(" \t")
            translated = action(value, *context) if action else None
            if translated is None:
                continue
            if translated != value:
                line = "%s: %s" % (line[: len(key)], translated)
        elif "_" in key and key.replace("_", "-") in dropped:
            continue
        lines.append(line)
    return lines


def serialise(lines: List[str], framing: Framing) -> bytes:
    """The bytes of a message head: its lines and the header for its framing."""
    if framing is CHUNKED:
        lines.append("Transfer-Encoding: chunked")
    elif framing.kind == "length":
        lines.append("Content-Length: %d" % framing.length)
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _hides_public_origin(request: Request, gate: Any) -> bool:
    """Whether X-Forwarded headers must not name the public origin: apps compare them with Origin,
    which is translated.  Without Origin, Django uses Referer, and WebDAV servers Destination."""
    headers, is_own = request.headers, request.is_own_origin
    if "origin" not in headers.index and request.method not in ("GET", "HEAD", "OPTIONS"):
        url = headers.get("destination") or headers.get("referer")
        is_own = rest_of_own_url(url, request.client.authority) is not None
    return is_own and not gate.config.preserve_host and not _USES_PUBLIC_ORIGIN.search(request.path)


def _translate_url(
    value: str, request: Request, route: Route, gate: Any, is_referer: bool = True
) -> str:
    """A URL or a path of this app becomes that of the upstream.  In Referer, other URLs of the
    public origin lose their path: browsers send no path to another origin."""
    value, preserve_host = gate.strip_query(value), gate.config.preserve_host
    is_path = value.startswith("/") and not is_referer
    path = value if is_path else rest_of_own_url(value, request.client.authority)
    if path is None or (is_referer and preserve_host):
        return value
    below = path_below(route.prefix, path)
    if below is None:
        return route.origin + "/" if is_referer else value
    start = value[: len(value) - len(path)] if is_path or preserve_host else route.origin
    if not route.absolute:
        path = below if below.startswith("/") else "/" + below
    return start + path


def _with_prefix(path: str, route: Route) -> str:
    """The public path for a path of the app, with the prefix as spelled in the request."""
    below = path_below(route.prefix, path)
    if below is None and route.absolute:
        return path
    return route.prefix + (path if below is None else below)


def _translate_location(value: str, request: Request, route: Route, gate: Any) -> str:
    """Add the prefix to a path.  A URL of the app or the proxy becomes a path with the prefix.
    Relative references, "//host" and other URLs are unchanged."""
    match, path = _HTTP_URL.fullmatch(value), value
    if match:
        scheme, authority, path = match.groups()
        is_app = with_port(authority, scheme) in route.app_authorities
        if not is_app and rest_of_own_url(value, request.client.authority) is None:
            return value
        path = path if path.startswith("/") else "/" + path
    elif not path.startswith("/") or path.startswith("//"):
        return value
    path = _with_prefix(path, route)
    # Browsers parse "//x" as a host, but "/.//x" as the path "//x".
    return "/." + path if match and _OTHER_HOST.match(path) else path


def _translate_each(pattern: Any, translate: Callable[..., str], value: str, *context: Any) -> Any:
    """Translate the URLs in a value: the second of three groups of `pattern`."""

    def replace(match: Any) -> Any:
        before, url, behind = match.groups()
        return match.group() if url is None else before + translate(url, *context) + behind

    return pattern.sub(replace, value)


def _translate_set_cookie(value: str, request: Request, route: Route, gate: Any) -> Optional[str]:
    """Refuse the proxy's own cookies, limit Path to the app, and remove a Domain of the app or the
    proxy.  Path begins with the prefix as spelled in the request: browsers do not decode it.
    __Host- cookies are unchanged: they always have Path=/ and no Domain."""
    if gate.owns_cookie(cookie_name(value), route):
        return None
    if value[:7].lower() == "__host-":
        return value
    pair, *attributes = value.split(";")
    parts, has_path = [pair], False
    for part in attributes:
        name, _, content = part.partition("=")
        name, content = name.strip(" \t").lower(), content.strip(" \t")
        if name == "domain":
            host = host_of(request.client.authority)
            # All apps would get cookies for localhost, the parent of 8080.localhost.
            parent = host.partition(".")[2] if request.client.app_port else host
            if content.lower().lstrip(".") in {host, parent, *map(host_of, route.app_authorities)}:
                continue
        elif name == "path":
            # "Path=x" stands for the default path, and the last Path counts (RFC 6265 section 5).
            has_path = content.startswith("/")
            # For an absolute route, only a path above the prefix is changed.
            is_wider = route.absolute and path_below(content.rstrip("/"), route.prefix)
            path = route.prefix if is_wider else _with_prefix(content, route)
            part = part.replace(content, path) if has_path else part
        parts.append(part)
    if route.prefix and request.is_above_prefix and not has_path:
        parts.append(" Path=%s/" % route.prefix)
    return ";".join(parts)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _start_of_copies(route: Route, gate: Any) -> str:
    """The start of the names of all copies of an app's cookies, see `cookies_for_unprefixed`."""
    return "%s_%s_" % (gate.app_cookie, short_hash(route.prefix))


def _translate_cookie(value: str, request: Request, route: Route, gate: Any) -> Optional[str]:
    if request.is_unprefixed:
        start, pairs = _start_of_copies(route, gate), value.split(";")
        # Without the proxy, a cookie that a script sets with Path=/ replaces the app's.
        replaced = {start + cookie_name(pair) for pair in pairs}
        kept = [pair for pair in pairs if cookie_name(pair) not in replaced]
        value = ";".join(kept).lstrip(" \t").replace(start, "")
    return gate.strip_cookies(value, route) or None


_translate_destination = functools.partial(_translate_url, is_referer=False)
_REQUEST_TABLE = {
    **dict.fromkeys(_HOP_BY_HOP + _SET_BY_PROXY),
    "origin": lambda value, request, route, gate: (
        route.origin if request.is_own_origin and not gate.config.preserve_host else value
    ),
    "referer": _translate_url,
    "destination": _translate_destination,  # RFC 4918 section 10.3
    "if": functools.partial(_translate_each, _BRACKETED, _translate_destination),
    "cookie": _translate_cookie,
    "authorization": lambda value, _, __, gate: None if gate.owns_authorization(value) else value,
    # RFC 9110 section 10.1.1
    "expect": lambda value, request, *_: None if request.minor == "0" else value,
}  # type: Dict[str, Any]
# Other headers with the public scheme.  Rack prefers X-Forwarded-SSL over X-Forwarded-Proto.
_SCHEME_FIELDS = "x-forwarded-ssl x-forwarded-scheme x-forwarded-protocol front-end-https".split()
_HIDDEN_ORIGIN_TABLE = {**_REQUEST_TABLE, **dict.fromkeys(_SCHEME_FIELDS)}
_RESPONSE_TABLE = {
    **dict.fromkeys(_HOP_BY_HOP + ["content-length"]),
    "location": _translate_location,
    "content-location": _translate_location,
    "refresh": functools.partial(_translate_each, _REFRESH, _translate_location),
    "link": functools.partial(_translate_each, _BRACKETED, _translate_location),
    "set-cookie": _translate_set_cookie,
    "service-worker-allowed": lambda value, _, route, __: None if route.prefix else value,
}  # type: Dict[str, Any]


def host_form(port: int, client: ClientInfo, domains: Sequence[str]) -> str:
    """The URL of `port` with a host of its own, for this client; "" if no domain fits."""
    host = host_of(client.authority)
    domain = host.partition(".")[2] if client.app_port else host
    if host.startswith("127.") or host == "[::1]":
        domain = "localhost"
    if domain not in domains:
        domain = next((name for name in domains if name != "localhost"), "")
    if not domain or not host:
        return ""
    return "%s://%d.%s%s/" % (client.scheme, port, domain, client.authority[len(host) :])


# --------------------------------------------------------------------------------------------------
# Unprefixed requests
# --------------------------------------------------------------------------------------------------
# A link such as "/static/app.js" on an app's page lacks the prefix.  With `Config.whole_origin`,
# the proxy finds the app by Referer, or else by a signed cookie with the app that this browser
# opened last.  It redirects the request to the prefix, or serves it without a redirect if the
# client does not follow redirects.  Browsers send an app's cookies only below the prefix, so the
# proxy also sets copies with Path=/, under names of its own.

OWN_SITES = frozenset(("same-origin", "none"))  # Sec-Fetch-Site of our pages and typed addresses


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def sign(key: bytes, purpose: str, text: str) -> str:
    """A signature (HMAC) of 43 characters.  It is not valid for another purpose."""
    return base64url(hmac.new(key, ("%s %s" % (purpose, text)).encode(), "sha256").digest())


def is_signed(key: bytes, purpose: str, text: str, signature: str) -> bool:
    right = sign(key, purpose, text)
    return hmac.compare_digest(signature.encode("latin-1"), right.encode())


def signed_value(headers: Headers, name: str, key: bytes, purpose: str) -> str:
    """The text in the cookie `name`, of the form TEXT.SIGNATURE; "" if it is not valid.

    If there are several, none is used: pages of apps and of other ports can set such a cookie.
    """
    values = cookie_values(headers, name)
    text, _, signature = values[0].rpartition(".") if len(values) == 1 else ("", "", "")
    return text if text and is_signed(key, purpose, text, signature) else ""


def own_cookie(
    name: str, value: str, path: str, client: ClientInfo, options: Fields = ()
) -> Tuple[str, str]:
    """A Set-Cookie field for a cookie of the proxy.

    options: attributes that replace the usual ones or are added; "" for one without value.
    """
    is_host = name.startswith("__Host-")  # browsers then require "/" and Secure
    attributes = {"Path": "/" if is_host else path, "HttpOnly": "", "SameSite": "Lax"}
    if is_host or client.scheme == "https":
        attributes["Secure"] = ""
    attributes.update(options)
    pairs = [key + ("=" + text if text else "") for key, text in attributes.items()]
    return "Set-Cookie", "; ".join(["%s=%s" % (name, value)] + pairs)


def is_foreign(request: Request) -> bool:
    """Whether a page of another origin sent the request.

    Browsers send Sec-Fetch-Site only to HTTPS and localhost.  Without it and Origin, as for an
    image over plain HTTP, the Referer decides.  "same-site" is foreign, too: it includes the hosts
    of apps, and other ports of this host.
    """
    headers, sites = request.headers, request.headers.get_all("sec-fetch-site")
    if not OWN_SITES.issuperset(sites):
        return True
    if "origin" in headers.index:
        # With "Referrer-Policy: no-referrer", forms on our own pages send "Origin: null".
        is_own_form = headers.get("origin") == "null" and sites == ["same-origin"]
        return not (request.is_own_origin or is_own_form)
    # RFC 9110 section 10.1.3: "about:blank" stands for no page.
    pages = set() if sites else set(headers.get_all("referer")) - {"", "about:blank"}
    return None in [rest_of_own_url(page, request.client.authority) for page in pages]


def is_top_level(request: Request) -> bool:
    """Whether a page visit is in a tab or window, not in a frame."""
    return request.is_page_visit and request.headers.tokens("sec-fetch-dest") <= {"document"}


def find_app(request: Request, gate: Any) -> Request:
    """The request with its route, also if it is unprefixed.  ProxyError 302, 400 or 404."""
    error, config = request.route_error, gate.config
    if error is None:
        return request
    if error.status != 404:
        raise error
    prefix = _prefix_of_app(request, gate)
    if prefix:
        route, path, query = find_route(config, prefix + request.target)
        return request._replace(
            route=route, path=path, query=query, route_error=None, is_unprefixed=True
        )
    if request.target == "/" and config.whole_origin and request.is_page_visit:
        raise ProxyError(302, "Redirecting.", (("Location", config.base + "/"),))
    authority, url = request.client.authority, host_form(8080, request.client, config.domains)
    port, _, domain = host_of(authority).partition(".")
    advice = ""
    if config.domains and _DOMAIN.fullmatch(domain) and port_in_host(authority, (domain,)):
        advice = "For %s.%s to be port %s, {start} {domains} {value}." % (port, domain, port)
    elif url:
        advice = "If an app's links begin with a slash, open it at a host of its own, such as "
        advice += url + "."
    raise ProxyError(404, error.detail, (), advice, domain)


def _prefix_of_app(request: Request, gate: Any) -> str:
    """The prefix of the app to which an unprefixed request belongs; "" if there is none."""
    headers, base = request.headers, gate.config.base
    # An unprefixed request is never below the base, or below /absolute if the base is empty.
    is_below_base = path_below(base or "/absolute", request.target) is not None
    if is_below_base or not gate.app_cookie or is_foreign(request):
        return ""
    page = rest_of_own_url(headers.get("referer"), request.client.authority)
    with contextlib.suppress(ProxyError):
        route = find_route(gate.config, page or "")[0]
        if route is not None:
            return route.prefix
        if base:  # the Referer is the ports page; if base is "", it may be an app's origin alone
            return ""
    is_same_origin = request.is_own_origin or headers.get_all("sec-fetch-site") == ["same-origin"]
    is_typed = request.is_page_visit and request.target != "/"  # "/" is the proxy's own page
    if page is None and not is_same_origin and not is_typed:
        return ""
    return signed_value(headers, gate.app_cookie, gate.key, "app")


def cookies_for_unprefixed(
    request: Request, response: Response, lines: List[str], gate: Any
) -> List[str]:
    """Set-Cookie lines: copies of the app's cookies in `lines`, which are the header lines for the
    client; and if a user opens a page of the app, a cookie that names the app."""
    route, opens_page = request.route, is_top_level(request)
    is_concerned = opens_page or "set-cookie" in response.headers.index
    if route is None or not route.prefix or not is_concerned:
        return []
    last_app = signed_value(request.headers, gate.app_cookie, gate.key, "app")
    if not opens_page and not last_app:
        return []
    values = (line[11:].strip(" \t") for line in lines if line[:11].lower() == "set-cookie:")
    # Of two attributes Path, browsers use the last.  Cookies with __Host- have Path=/ already.
    cookies = [
        "%s%s; Path=/; HttpOnly" % (_start_of_copies(route, gate), value)
        for value in values
        if value[:7].lower() != "__host-"
    ]
    if opens_page and response.status < 400 and route.prefix != last_app:
        value = "%s.%s" % (route.prefix, sign(gate.key, "app", route.prefix))
        cookies.append(own_cookie(gate.app_cookie, value, "/", request.client)[1])
    return ["Set-Cookie: " + cookie for cookie in cookies]


# --------------------------------------------------------------------------------------------------
# Local sockets
# --------------------------------------------------------------------------------------------------
# Lists the programs that listen, and finds the user who owns a port.  On Linux, /proc has both
# (proc(5)).  For the owner of one socket, netlink (sock_diag(7)) is much faster if the machine has
# many sockets.  On other systems, no port is listed or refused.

# A row of /proc/net/tcp: local address and port, remote address and port, state, user id, inode.
# Listening sockets have the remote port 0.  Sockets without a process have the inode 0.
_ROW = (
    r"^ *[0-9]+: ([0-9A-F]+):([0-9A-F]{4}) ([0-9A-F]+):%04X \S+ \S+ \S+ \S+ +([0-9]+) +[0-9]+"
    r" ([1-9][0-9]*) "
)
_FIRST_ORDINARY_USER = 1000  # root and system services have lower ids
REACHED = {  # for each loopback name, the listening addresses that it reaches
    "localhost": {"127.0.0.1", "0.0.0.0", "::", "::1"},
    "127.0.0.1": {"127.0.0.1", "0.0.0.0", "::"},
    "::1": {"::1", "::"},
}
_TRUST_ADVICE = "Its pages could use your other apps as you. If you trust it, {start} {any_owner}."
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
# An interpreter and its script or module.  Other flags than these may be followed by code.
_SCRIPT = re.compile(
    r"(?:[^\0]*/)?(?:python|pypy|node|ruby|perl|php|java|bash|sh|deno|bun|Rscript|R)[0-9.]*\0"
    r"(?:-(?:[uEIsSBbqvm]|OO?)\0)*(?:[^\0]*/)?([A-Za-z0-9_][A-Za-z0-9_.@+-]{0,60})(?:\0|\Z)"
)


class TcpSocket(NamedTuple):
    """A TCP socket of a process on this machine, with its local address and port."""

    address: str
    port: int
    user: int
    link: str  # the name of the socket in /proc/<pid>/fd


class Listener(NamedTuple):
    """A program that listens on a port."""

    port: int
    addresses: Tuple[str, ...]
    user: int
    pid: int  # 0 for another user's, or in a container with the host's network
    program: str  # "" if unknown
    started: float  # in seconds since the epoch; 0.0 if unknown

    @property
    def is_own(self) -> bool:
        # Below port 1024, system services listen.
        return bool(self.pid) and self.user == os.geteuid() and self.port >= 1024


def find_listeners() -> List[Listener]:
    """All programs that listen, sorted by port."""
    pids = {}  # type: Dict[str, int]  # for each open file, the first of its processes
    for path in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            pids.setdefault(os.readlink(path), int(path.split("/")[2]))
    groups = {}  # type: Dict[Tuple[int, int], List[TcpSocket]]
    for sock in tcp_sockets():
        groups.setdefault((sock.port, sock.user), []).append(sock)
    found = []
    for (port, user), sockets in sorted(groups.items()):
        addresses = tuple(dict.fromkeys(sock.address for sock in sockets))
        pid = next((pids[sock.link] for sock in sockets if sock.link in pids), 0)
        found.append(Listener(port, addresses, user, pid, _program(pid), _started(pid)))
    return found


def tcp_sockets(peer: Optional[Address] = None) -> List[TcpSocket]:
    """Listening sockets, or those connected to `peer`; IPv4 before IPv6."""
    rows = re.compile(_ROW % (peer[1] if peer else 0), re.MULTILINE)
    tables = _read("/proc/net/tcp") + _read("/proc/net/tcp6")
    return [
        TcpSocket(_parse_address(address), int(port, 16), int(user), "socket:[%s]" % inode)
        for address, port, remote, user, inode in rows.findall(tables)
        if peer is None or _parse_address(remote) == peer[0]
    ]


def _parse_address(text: str) -> str:
    """Parse an address of these tables: 32-bit words in the byte order of this machine."""
    count = len(text) // 8
    words = struct.unpack(">%dI" % count, bytes.fromhex(text))
    return plain_address(str(ipaddress.ip_address(struct.pack("=%dI" % count, *words))))


def has_known_owner(address: Address, peer: Optional[Address] = None) -> bool:
    """Whether the user is known for a socket at `address` that listens, or is connected to `peer`.

    Raises ProxyError 403 if it is another ordinary user.  address: from `local_address`.
    """
    users = _socket_users(address, peer)
    others = [user for user in users if user >= _FIRST_ORDINARY_USER and user != os.geteuid()]
    if others:
        text = "Port %d of this machine belongs to another user, %s."
        raise ProxyError(403, text % (address[1], user_name(others[0])), (), _TRUST_ADVICE)
    return bool(users)


def check_owner(address: Address, peer: Address, had_known_owner: bool) -> None:
    """Refuse a new connection to a port without a known owner, or of another ordinary user.

    The listening socket is checked first, because the kernel reports no user for an accepted
    socket that was closed.  peer: the proxy's end.  had_known_owner: before connecting.
    """
    # A program that serves a single connection may have closed its listening socket.
    is_known = has_known_owner(address) or has_known_owner(address, peer)
    # If no owner was known before, another user's program may have accepted the connection.
    if not is_known or not had_known_owner:
        text = "The user who owns port %d of this machine could not be determined."
        raise ProxyError(403, text % address[1], (), _TRUST_ADVICE)


def local_address(address: Address) -> Optional[Address]:
    """The address that a connection to `address` reaches; None if it is on another machine:
    source and destination then differ."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:  # connecting it sends nothing
        sock.connect(address)
        names = sock.getsockname(), sock.getpeername()
    source, destination = (plain_address(name[0]) for name in names)
    is_own = source == destination or ipaddress.ip_address(destination).is_loopback
    return (destination, address[1]) if is_own else None


def _socket_users(address: Address, peer: Optional[Address]) -> Set[int]:
    """The known users of the sockets at `address` that listen, or are connected to `peer`."""
    user = _user_by_netlink(address, peer)
    if user is not None:
        return {user}
    with socket.socket() as probe:  # some kernels and sandboxes do not report sockets by netlink
        probe.bind(("127.0.0.1", 0))
        probe.listen(1)
        if _user_by_netlink(probe.getsockname(), None) is not None:
            return set()
    # An IPv6 socket may also accept IPv4, but not the reverse.  A socket that is bound to the exact
    # address precedes a socket that is bound to all addresses.
    sockets = [sock for sock in tcp_sockets(peer) if sock.port == address[1]]
    unspecified = ("::",) if ":" in address[0] else _UNSPECIFIED
    exact = {sock.user for sock in sockets if sock.address == address[0]}
    return exact or {sock.user for sock in sockets if sock.address in unspecified}


def _user_by_netlink(address: Address, peer: Optional[Address]) -> Optional[int]:
    """The user of a socket at `address` that listens or is connected to `peer`, or None."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    remote = peer or ("::", 0)  # zeros, also for IPv4, find a listening socket
    ends = [ipaddress.ip_address(end[0]).packed for end in (address, remote)]
    # struct nlmsghdr, and struct inet_diag_req_v2: any state, any interface (0), any cookie (-1).
    header = struct.pack("=IHHII", 72, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    kind = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    name = struct.pack("!HH16s16sIq", address[1], remote[1], *ends, 0, -1)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.setblocking(False)
            kernel.send(header + kind + name)
            # nlmsg_type, idiag_uid, idiag_inode
            reply, user, inode = struct.unpack_from("=4xH74xII", kernel.recv(4096))
    except (AttributeError, OSError, struct.error):  # netlink is missing or not allowed
        return None
    return int(user) if inode and reply == _SOCK_DIAG_BY_FAMILY else None


def user_name(user: int) -> str:
    """The name of a user id, or "number N"."""
    import pwd  # not on Windows, which lists no sockets

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return "number %d" % user


def _read(name: str) -> str:
    """The text of a file in /proc; "" if it is gone or may not be read."""
    with contextlib.suppress(OSError), open(name, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def _program(pid: int) -> str:
    """A process's program, or an interpreter's script; other arguments may contain secrets."""
    command = _read("/proc/%d/cmdline" % pid)
    script, first = _SCRIPT.match(command), command.partition("\0")[0]
    if not os.path.exists(first):  # some programs put all arguments into the first one
        first = first.partition(" ")[0]
    program = script.group(1) if script else first
    return os.path.basename(program).rstrip(":")


def _started(pid: int) -> float:
    with contextlib.suppress(ValueError, IndexError):
        ticks = int(_read("/proc/%d/stat" % pid).rpartition(")")[2].split()[19])
        uptime = float(_read("/proc/uptime").split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


# --------------------------------------------------------------------------------------------------
# Pages
# --------------------------------------------------------------------------------------------------
# The responses of the proxy itself: HTML for people, JSON and plain text for programs.  Pages load
# nothing from elsewhere: a Content-Security-Policy allows only their own style and script.  They
# work without the script.  The ports page shows the same rows that programs get as JSON.

# System colours suit light and dark; lines and shades are half transparent for the same reason.
_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\
<link rel="icon" href="data:,"><title>%s</title><style nonce="%s">
:root{color-scheme:light dark}*{box-sizing:border-box}
body{max-width:46rem;margin:0 auto;padding:2rem .6rem;font:16px/1.5 system-ui,sans-serif;
color:CanvasText;background:Canvas;overflow-wrap:anywhere}
h1{font-size:1.4rem;line-height:1.3;margin:0 0 .5rem}p{margin:.5rem 0}
code{font-family:ui-monospace,monospace}.option{white-space:nowrap}
.soft,summary,label{opacity:.8}summary{cursor:pointer}
form{display:flex;flex-wrap:wrap;gap:.5rem;align-items:end;margin:1rem 0}label{flex:1 1 12rem}
input,button{font:inherit;border:1px solid #888;border-radius:.4rem;padding:.4rem .7rem}
input{display:block;width:100%%}
.ports{list-style:none;padding:0;margin:1rem 0}
.ports li{border:1px solid #8886;border-radius:.5rem;background:#88888812;padding:.7rem 1rem;
margin:.5rem 0;transition:opacity .6s}.ports .gone{opacity:.35}
.port{font-weight:600;font-size:1.15rem;margin-right:.6rem}
.ways a{display:inline-block;margin-right:1rem;font-size:.9rem}
td{padding:.2rem 1.2rem .2rem 0;vertical-align:top}
</style></head>
<body><main><h1>%s</h1>%s</main>%s</body></html>
"""
_PORTS_PAGE = """\
<p class="soft" role="status"></p>
<label hidden>Filter <input id="filter" type="search" autocomplete="off"></label>
%s<p id="none"%s>No port to show. On Linux, the ports of your programs appear here.</p>
<form><label>Another port <input name="port" required placeholder="8080 or localhost:8080" \
autocomplete="off"></label><button>Open</button></form>
<details><summary>Forms of an address</summary><table>%s</table></details>"""
_PORT_ITEM = """\
<li id="p{port}"><div><a class="port" href="{best}">{port}</a>{title}\
<div class="soft">{about}</div></div><div class="ways">"""
_PORT_LINK = '<a href="{url}" aria-label="port {port}, {name}">{name}</a> '
_LINK_NAMES = {
    "host": "Open",
    "stripped": "Open under {}",
    "absolute": "For apps with a base path set",
}
# Fetches the list every three seconds.  New ports are inserted in order.  A port that disappears
# fades, and the next list removes it.  The entry with keyboard focus is not replaced.
_PORTS_SCRIPT = """
const list = document.querySelector('.ports'), notice = document.querySelector('[role=status]')
const filter = document.querySelector('#filter'), none = document.querySelector('#none')
const failure = 'This list is out of date. Is the proxy running? Reload the page.'
const portOf = item => Number(item.id.slice(1))
function sift() {
  const wanted = filter.value.trim().toLowerCase(), items = [...list.children]
  for (const item of items)
    item.hidden = !item.firstChild.textContent.toLowerCase().includes(wanted)
  filter.parentNode.hidden = items.length < 8 && !wanted
  none.hidden = items.some(item => !item.hidden)
}
function merge(fresh) {
  for (const gone of list.querySelectorAll('.gone')) gone.remove()
  for (const old of [...list.children]) {
    const item = fresh.querySelector('#' + old.id)
    if (!item) {
      old.className = 'gone'
      notice.textContent = 'Gone: port ' + portOf(old)
    } else if (old.innerHTML !== item.innerHTML && !old.contains(document.activeElement))
      old.replaceWith(item)
    else item.remove()
  }
  for (const item of [...fresh.children]) {
    notice.textContent = 'New: port ' + portOf(item)
    list.insertBefore(item, [...list.children].find(other => portOf(other) > portOf(item)))
  }
  sift()
}
async function refresh() {
  try {
    if (!document.hidden) {
      const response = await fetch('?list', {cache: 'no-store', redirect: 'error'})
      const page = new DOMParser().parseFromString(await response.text(), 'text/html')
      merge(page.querySelector('.ports'))
      if (notice.textContent === failure) notice.textContent = ''
    }
  } catch (error) { notice.textContent = failure }
  setTimeout(refresh, 3000)
}
filter.addEventListener('input', sift)
sift()
setTimeout(refresh, 1500)
"""
_ERROR_PAGE = """\
<p>%s</p>%s<p class="soft"><a href="%s">All ports</a> &middot; %d &middot; port_proxy</p>"""
_WAITING = """\
<noscript><meta http-equiv="refresh" content="5"></noscript>
<p>This page opens the app as soon as it responds.</p>
<p>If nothing happens:</p><ul>
<li>Does the log of the app show an error, or another port?</li>
<li>Does the app listen on 127.0.0.1 or 0.0.0.0, and not only on another address?</li>
<li>On the machine, run <code>{command}</code> to examine the port.</li>
</ul>"""
_WAITING_FIELD = ("Port-Proxy", "waiting")
# Sends HEAD requests for this page until the app responds.
_WAITING_SCRIPT = """
async function look() {
  try {
    const options = {method: 'HEAD', cache: 'no-store', redirect: 'manual'}
    const response = document.hidden ? null : await fetch(location.href, options)
    if (response && response.headers.get('Port-Proxy') !== 'waiting') return location.reload()
  } catch (error) {}  // the proxy does not answer
  setTimeout(look, 3000)
}
setTimeout(look, 1000)
"""
_SIGN_IN_FORM = """\
<p>Enter the token of this proxy. It was printed when the proxy started, in the address after \
<code>?token=</code>, unless you chose the token yourself.</p>\
<form method="post" action="{ports}">\
<input type="hidden" name="next" value="{target}"><label>Token <input type="password" name="token" \
required autofocus autocomplete="current-password"></label> <button>Sign in</button></form>"""
_SIGN_IN_LINK = """\
<p>This proxy asks for its token only at its own address, where no app can \
read it. You then come back to the front page of this app.</p>\
<p><a href="{ports}?open={port}">Sign in there</a></p>"""
_FORMS = (
    ("/8080/", "port 8080 of this machine; the app receives the path after the port"),
    ("/db1.example.org:8080/", "port 8080 of a host that is on the allowlist"),
    ("/absolute/8080/", "for an app that is configured to use this whole path; also with a host"),
)
# Typed before a port, on the ports page or in an address.
_NEEDLESS = re.compile(r"(?:/|https?:/|proxy/|ports?/|(?:localhost|127\.0\.0\.1)[:/])*")
_OPTION = re.compile(r"(?<![^ ])--[a-z][a-z-]*")
_TITLE = re.compile(r"<title(?:\s[^<>]{0,200})?>([^<]{0,600})</title", re.IGNORECASE)
_TITLE_BYTES = 65536  # how much of a page is searched for its title
REASON_PHRASES = {status.value: status.phrase for status in HTTPStatus}
CHALLENGE = (("WWW-Authenticate", "Bearer"),)  # browsers show no password dialog for this scheme


class LocalResponse(NamedTuple):
    """A complete response of the proxy itself."""

    status: int
    fields: Fields
    body: bytes = b""


class SignInNeeded(ProxyError):
    """A page visit without a valid token.  A sign-in at the ports page redirects to `target`."""

    def __init__(self, detail: str, target: str) -> None:
        unframed = (("Content-Security-Policy", "frame-ancestors 'none'"),)
        super().__init__(401, detail, CHALLENGE + unframed)
        self.target = target


def not_listening(route: Route, addresses: Sequence[str]) -> ProxyError:
    """The app does not listen; page visits get a page that waits for it.

    addresses: where something listens on the same port.
    """
    text = "Nothing listens on %s. Is the app running, and is this its port?" % route.place
    advice = address = ""
    if addresses and route.is_local and REACHED[route.host].isdisjoint(addresses):
        text = "The app on port %d listens on %s only, not on %s."
        text %= route.port, " and ".join(addresses), route.host
        if REACHED["localhost"].isdisjoint(addresses):  # else the form /<port>/ reaches it
            address = addresses[0]
            advice = (
                "Start it with 127.0.0.1 as its listen address, or {start} {host_allowlist} {value}"
                " and open %s instead of %d."
            ) % (authority_of(address, route.port), route.port)
    return ProxyError(502, text, (("Retry-After", "2"), _WAITING_FIELD), advice, address)


def title_in(headers: Headers, data: bytes) -> str:
    """The title of an HTML page that begins with `data`; "" if it cannot be read."""
    if "html" not in headers.get("content-type").lower():
        return ""
    with contextlib.suppress(zlib.error):  # the page is not compressed
        data = zlib.decompressobj(47).decompress(data, _TITLE_BYTES)  # 47: gzip or deflate
    match = _TITLE.search(data[:_TITLE_BYTES].decode("utf-8", "replace"))
    title = html.unescape(match.group(1)) if match else ""
    return printable(" ".join(title.split())[:100])


def port_row(base: str, listener: Listener, title: str, host_url: str) -> Dict[str, Any]:
    """A port for the JSON list and the ports page; unknown values are None.

    host_url: the URL of the port's own host, or "".  The best link comes first.
    """
    row = listener._asdict()  # type: Dict[str, Any]
    started, _ = row.pop("started"), row.pop("user")
    row["seconds"] = int(time.time() - started) if started else None
    row["title"] = title or None
    row["links"] = {"host": host_url} if host_url else {}
    row["links"]["stripped"] = "%s/%d/" % (base, listener.port)
    row["links"]["absolute"] = "%s/absolute/%d/" % (base, listener.port)
    return row


def ports_response(base: str, rows: Sequence[Dict[str, Any]], request: Request) -> LocalResponse:
    """The response at the base: the list of ports, and the forms of an address."""
    items = '<ul class="ports">%s</ul>' % "".join(map(_port_item, rows))
    if request.is_navigation:
        form = "<tr><td><code>{path}</code><td>{meaning}"
        forms = [_fill(form, path=base + path, meaning=meaning) for path, meaning in _FORMS]
        body = _PORTS_PAGE % (items, " hidden" if rows else "", "".join(forms))
        return _page(200, "Ports of this machine", body, _PORTS_SCRIPT)
    if request.target.endswith("?list"):  # from the script of the page
        policy = "default-src 'none'; frame-ancestors 'self'"
        return _response(200, "text/html", items, (("Content-Security-Policy", policy),))
    if any("application/json" in value.lower() for value in request.headers.get_all("accept")):
        text = json.dumps({"ports": rows}, indent=1) + "\n"
        return _response(200, "application/json", text)
    lines = ["port_proxy: every port of this machine through one HTTP port", ""]
    lines += ["%-40s %s" % (base + path, meaning) for path, meaning in _FORMS]
    lines.append("")
    lines += ["%-40s %s" % (row["links"]["stripped"], _summary(row)) for row in rows]
    return _response(200, "text/plain", "\n".join(lines) + "\n")


def _port_item(row: Dict[str, Any]) -> str:
    port, links, title = row["port"], row["links"], row["title"] or ""
    best = next(iter(links.values()))
    item = _fill(_PORT_ITEM, port=port, best=best, title=title, about=_summary(row))
    for form, url in links.items():
        item += _fill(_PORT_LINK, url=url, port=port, name=_LINK_NAMES[form].format(url))
    return item + "</div></li>\n"


def _summary(row: Dict[str, Any]) -> str:
    """The program, its age, and its addresses if localhost does not reach it."""
    parts = [printable(row["program"]), "" if row["seconds"] is None else _age(row["seconds"])]
    if REACHED["localhost"].isdisjoint(row["addresses"]):
        parts.append("listens on %s only, not on localhost" % ", ".join(row["addresses"]))
    return " \u00b7 ".join(filter(None, parts))


def _age(seconds: int) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        count = seconds // unit
        if count > 0:
            return "%d %s%s" % (count, name, "" if count == 1 else "s")
    return "just started"


def error_response(
    error: ProxyError, request: Optional[Request] = None, config: Config = Config()
) -> LocalResponse:
    """A page for a person, plain text for a program.  request: None if it could not be parsed."""
    title, meant = REASON_PHRASES.get(error.status, "Error"), ""
    if error.status == 404 and request and request.route is None:  # the path may be mistyped
        with contextlib.suppress(ProxyError):
            typed = path_below(config.base, request.target) or request.target
            meant = typed_route(typed, config).prefix + "/"
    if not (request and request.is_navigation and request.method in ("GET", "HEAD", "POST")):
        text = "%d %s\n%s" % (error.status, title, error.detail)
        text += " Did you mean %s?\n" % meant if meant else "\n"
        return _response(error.status, "text/plain", text, error.fields)
    more = script = ""
    client, ports = request.client, config.base + "/"
    if client.app_port:  # the ports page is at the proxy's own host
        ports = "%s://%s%s" % (client.scheme, client.authority.partition(".")[2], ports)
    if isinstance(error, SignInNeeded):
        # At an app's own host there is no form: the app's pages could read the token.
        title, template = "Sign in", _SIGN_IN_LINK if client.app_port else _SIGN_IN_FORM
        more = _fill(template, target=error.target, ports=ports, port=client.app_port)
    elif _WAITING_FIELD in error.fields and request.is_page_visit and request.route:
        title, script = "Waiting for port %d" % request.route.port, _WAITING_SCRIPT
        more = _fill(_WAITING, command="%s --check %s" % (own_command(), request.route.name))
    elif meant:
        more = _fill('<p>Did you mean <a href="{path}">{path}</a>?</p>', path=meant)
    detail = _OPTION.sub(r'<code class="option">\g<0></code>', html.escape(error.detail))
    body = _ERROR_PAGE % (detail, more, html.escape(ports), error.status)
    return _page(error.status, title, body, script, error.fields)


def typed_route(text: str, config: Config) -> Route:
    """The route for a typed port, host:port, URL or path.  Raises ProxyError if it is not valid."""
    upstream = _NEEDLESS.sub("", text.partition("?")[0].strip(), 1)
    upstream = upstream.replace("absproxy/", "absolute/", 1)
    route, _, _ = find_route(config, "%s/%s/" % (config.base, upstream))
    assert route is not None  # only the base itself has no route
    return route


def _fill(template: str, **texts: Any) -> str:
    """Insert texts into HTML."""
    return template.format(**{name: html.escape(str(text)) for name, text in texts.items()})


# The policy has no form-action.  Browsers check it for every redirect after a form, and an app may
# redirect to a login at another site.
def _page(
    status: int, title: str, body: str, script: str = "", fields: Fields = ()
) -> LocalResponse:
    nonce = secrets.token_urlsafe(16)
    policy = (
        "default-src 'none'; img-src data:; style-src 'nonce-{0}'; script-src 'nonce-{0}';"
        " connect-src 'self'; base-uri 'none'; frame-ancestors 'self'"
    ).format(nonce)
    element = '<script nonce="%s">%s</script>' % (nonce, script) if script else ""
    text = _PAGE % (title, nonce, title, body, element)
    return _response(status, "text/html", text, (("Content-Security-Policy", policy), *fields))


def _response(status: int, media_type: str, text: str, fields: Fields = ()) -> LocalResponse:
    body = text.encode()
    own_fields = (
        ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())),
        ("Content-Type", media_type + "; charset=utf-8"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
    )
    return LocalResponse(status, own_fields + fields, body)


# --------------------------------------------------------------------------------------------------
# Upstreams
# --------------------------------------------------------------------------------------------------
# A connection is pooled only after a complete response without further data.  Data or EOF closes an
# idle connection, and the socket is polled once more before reuse.

_PERSISTENT_SECONDS = 1.0  # shorter than the keep-alive timeout of any known server
_PROBE_SECONDS = 3.0
_RETRY_SOON = (("Retry-After", "5"),)
_FETCH_BYTES = 1 << 22
TLS_RECORDS = b"\x15\x03", b"\x16\x03"  # they begin an alert or a handshake (RFC 8446 section 5.1)


class BoundedDict(Dict[Any, Any]):
    """A dictionary of the latest `size` entries; setting a key makes its entry the latest."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        if len(self) > self.size:
            del self[next(iter(self))]


class Upstreams:
    """Opens connections to upstreams, and pools idle ones.

    listening: the proxy's own addresses.  Connections to them are refused: they could form a loop.
    """

    def __init__(self, config: Config, deadlines: Deadlines, listening: List[Address]) -> None:
        self.config = config
        self.deadlines = deadlines
        self.listening = listening
        # For each function: its last result, and the time until which the result is valid.
        self._lookups = {}  # type: Dict[Callable[[], Any], Tuple[asyncio.Future[Any], float]]
        self._contexts = {}  # type: Dict[bool, ssl.SSLContext]
        # The pool, in the order of use: each connection's authority, and since when it is idle.
        self._idle = {}  # type: Dict[Connection, Tuple[str, float]]

    def take(self, route: Route, is_replayable: bool) -> Optional[Connection]:
        """A usable idle connection to the route's upstream, or None.

        Some upstreams close a connection soon after a response, unannounced.  A replayable request
        can then be sent again.  Other requests need a connection used in the last second, and proof
        that the upstream keeps connections: it has one that was reused or is idle for longer.
        """
        recent = now() - _PERSISTENT_SECONDS
        is_allowed = is_replayable or any(
            authority == route.authority and (connection.is_reused or since < recent)
            for connection, (authority, since) in self._idle.items()
        )
        for connection in reversed(list(self._idle)) if is_allowed else ():
            authority, since = self._idle[connection]
            if authority == route.authority and (is_replayable or since >= recent):
                del self._idle[connection]
                connection.watcher = None
                if connection.is_quiet() and not poll(connection.transport, "POLLIN"):
                    connection.has_received = False
                    connection.is_reused = True
                    connection.state = ACTIVE
                    return connection
                connection.abort()
        return None

    def give(self, route: Route, connection: Connection) -> None:
        """Pool a connection after a complete exchange; any data or EOF then closes it."""
        if connection.is_quiet() and len(self._idle) < self.config.max_idle_upstreams:
            self._idle[connection] = route.authority, now()
            connection.read_deadline = now() + self.config.idle_upstream_timeout
            connection.state = IDLE
            connection.watcher = self._drop
        else:
            connection.close()

    def _drop(self, connection: Connection) -> None:
        if self._idle.pop(connection, None):
            connection.abort()

    def close(self) -> None:
        for connection in list(self._idle):
            connection.abort()  # its watcher is `_drop`

    async def lookup(self, function: Callable[[], Any]) -> Any:
        """The result of a function that looks up sockets, in a thread; valid for a second."""
        future, until = self._lookups.get(function, (None, 0.0))
        if future is None or (future.done() and now() >= until):
            future = self.deadlines.loop.run_in_executor(None, function)
            self._lookups[function] = future, now() + 1.0
        return await asyncio.shield(future)

    async def connect(self, route: Route) -> Connection:
        """A new connection to the route's upstream; ProxyError 403, 502, 503, 504 or 508."""
        try:
            return await asyncio.wait_for(self._connect(route), self.config.connect_timeout)
        except asyncio.TimeoutError:  # a subclass of OSError from 3.11 on
            text = "The connection to %s was not accepted within %g seconds."
            raise ProxyError(504, text % (route.place, self.config.connect_timeout))
        except (ssl.SSLError, ssl.CertificateError) as error:
            if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                text = "The certificate of %s could not be verified." % route.place
                advice = "{start} {insecure_upstream} to accept any certificate on this machine."
                raise ProxyError(502, text, (), advice if route.is_local else "")
            text = "No TLS connection to %s could be made. Does it speak TLS?" % route.place
            raise ProxyError(502, text, (), "See {upstream_tls}.")
        except (socket.gaierror, UnicodeError):  # UnicodeError: not a valid host name
            text = "The host %s could not be found. Check its spelling, or the machine's DNS."
            raise ProxyError(502, text % route.host)
        except ConnectionRefusedError:
            sockets = await self.lookup(tcp_sockets)  # type: List[TcpSocket]
            addresses = dict.fromkeys(sock.address for sock in sockets if sock.port == route.port)
            raise not_listening(route, list(addresses))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                text = "The proxy has no file descriptor left to connect with. Try again shortly."
                raise ProxyError(503, text, _RETRY_SOON)
            reason = os.strerror(error.errno) if error.errno else "unknown reason"
            raise ProxyError(502, "No connection to %s: %s." % (route.place, reason))

    async def _connect(self, route: Route) -> Connection:
        """Try all addresses in order.  Raises the first ConnectionRefusedError, or else OSError."""
        addresses = [("127.0.0.1", route.port), ("::1", route.port)]  # type: List[Any]
        if route.host != "localhost":
            loop = self.deadlines.loop
            found = await loop.getaddrinfo(route.host, route.port, type=socket.SOCK_STREAM)
            addresses = [info[4][:2] for info in found]
        failures = []
        for address in addresses:
            try:
                return await self._connect_to(address, route)
            except ssl.SSLError:
                raise
            except OSError as error:
                failures.append(error)
        raise min(failures, key=lambda error: not isinstance(error, ConnectionRefusedError))

    async def _connect_to(self, address: Address, route: Route) -> Connection:
        tls = {}  # type: Dict[str, Any]
        if route.scheme == "https":
            verified = not (self.config.insecure_upstream and route.is_local)
            if verified not in self._contexts:  # a new context loads all certificates: slow
                context = self._contexts[verified] = ssl.create_default_context()
                context.check_hostname = verified
                context.verify_mode = ssl.CERT_REQUIRED if verified else ssl.CERT_NONE
            tls = {"ssl": self._contexts[verified], "server_hostname": route.host}
        local, had_known_owner = local_address(address), None
        if local is not None:
            if any((name, local[1]) in self.listening for name in (local[0],) + _UNSPECIFIED):
                text = "Port %d is the proxy's own: this is an endless loop."
                raise ProxyError(508, text % local[1])
            if sys.platform.startswith("linux") and not self.config.any_owner:
                had_known_owner = has_known_owner(local)
        connection = Connection(self.deadlines)
        await self.deadlines.loop.create_connection(lambda: connection, *address, **tls)
        try:
            names = [connection.transport.get_extra_info(end) for end in ("sockname", "peername")]
            if not all(names):
                raise ConnectionResetError(errno.ECONNRESET, "reset as soon as it was accepted")
            if names[0] == names[1]:  # without a listener, a TCP socket can connect to itself
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
            if local is not None and had_known_owner is not None:
                check_owner(local, (plain_address(names[0][0]), names[0][1]), had_known_owner)
        except BaseException:
            connection.abort()
            raise
        return connection


async def fetch(
    connection: Connection, lines: List[str], body: bytes, timeout: float, config: Config
) -> Response:
    """Send one of our own requests on a new connection, then close it.

    lines: the request line and the header fields.  A long body of the response is cut off.  Raises
    ProxyError 4xx or 501 if the response is not valid HTTP, TimedOut after `timeout` seconds,
    Truncated or OSError.
    """
    method = lines[0].partition(" ")[0]
    deadline = now() + timeout
    if "Connection: Upgrade" not in lines:
        lines = lines + ["Connection: close"]
    head = serialise(lines, Framing("length", len(body)) if body else NO_BODY)
    try:
        connection.write(head + body)
        connection.read_deadline = deadline
        while True:
            response = parse_response(await read_head(connection, False, config), method, config)
            if response.status >= 200 or response.status == 101:
                break  # else it is interim (RFC 9110 section 15.2)
        source = Body(connection, response.framing, config, is_response=True)
        content = b""
        while not source.finished and len(content) < _FETCH_BYTES:
            content += await source.read(deadline - now())
            if now() > deadline:  # the connection checks it only while a read waits
                raise TimedOut()
        return response._replace(body=content)
    finally:
        connection.abort()


async def accepts_tls(upstreams: Upstreams, route: Route) -> bool:
    """Whether the upstream answers a TLS handshake with TLS."""
    hello, received = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(received, hello, server_hostname="localhost").do_handshake()
    with contextlib.suppress(ProxyError, TimedOut, OSError):
        connection = await upstreams.connect(route._replace(scheme="http"))
        with contextlib.closing(connection):
            connection.write(hello.read())
            connection.read_deadline = now() + _PROBE_SECONDS
            return (await connection.read())[:2] in TLS_RECORDS
    return False


def unexpected_tls(route: Route) -> ProxyError:
    """The error if an upstream speaks TLS without --upstream-tls."""
    advice = "{start} {upstream_tls} {value}"
    if route.is_local:
        advice += ", and {insecure_upstream} if its certificate is self-signed"
    return ProxyError(502, "The app on %s speaks TLS." % route.place, (), advice + ".", route.name)


# --------------------------------------------------------------------------------------------------
# Access control
# --------------------------------------------------------------------------------------------------
# A gate admits or refuses each request before an upstream is contacted, whatever its method.
# `authorize` returns, or raises the ProxyError to respond with.  A gate also removes our own
# credentials from requests to apps.  Connections of ended sessions are closed.

_SAFE = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))  # RFC 9110 section 9.2.1
_TOKEN_FIELD = re.compile(r"(?:token|bearer)[ \t]+(.+)", re.IGNORECASE)
_NO_REFERRER = ("Referrer-Policy", "no-referrer")
# A path, but not "//host".  No backslashes: browsers read them as slashes, except in a query.
_LOCAL_TARGET = re.compile(r'/(?!/)[!"$->@-\[\]-~\x80-\xff]*(?:\?[!"$-~\x80-\xff]*)?')
# All real hosts have this form, and it is safe to paste into a shell.
_PLAIN_HOST = re.compile(r"[a-z0-9_][a-z0-9_.-]*|\[[0-9a-f:.]+\]")
# The host may be a pattern.
_ORIGIN = re.compile(r"(https?)://([a-z0-9_.*-]+|\[[0-9a-f.*]*:[0-9a-f:.*]*\])(:[0-9]{1,5})?")
ANY_TOKEN = "any"  # value of Config.token for a random token
COOKIE_PREFIX = "port_proxy_"  # the port follows: browsers share cookies between ports
_MAX_TICKETS = 1000
_TICKET_SECONDS = 30.0  # lifetime of a ticket, which signs a browser in at an app's host
_WRONG_TOKEN_SECONDS = 1.0  # delay of the response to a wrong token
_RECHECK_SECONDS = 10.0  # interval of the session checks for open connections

ReadForm = Callable[[], Awaitable[bytes]]


def check_route(route: Route, config: Config) -> None:
    """ProxyError 403 if the host of a route is not on the allowlist.  Names are not resolved."""
    allowlist, host = config.host_allowlist, route.host
    if callable(allowlist):
        is_allowed = allowlist(host)
    else:
        is_allowed = route.is_local or re.fullmatch(host_regex(allowlist), host) is not None
    if not is_allowed:
        text = "The host %s is not on the allowlist." % host
        raise ProxyError(403, text, (), "{start} {host_allowlist} {value} to allow it.", host)


class Gate:
    """Base class of the gates: removes our credentials and refuses foreign origins."""

    token = ""  # required of every client; "" for none
    app_cookie = ""  # its name; "" if unprefixed requests are not served
    cookie_name = ""  # of the session
    sessions_can_end = False  # whether `has_access` can change while a request is served
    other_cookies = ()  # type: Tuple[str, ...]  # prefixes of names besides COOKIE_PREFIX
    terms = COMMAND_LINE_TERMS  # the names of options in errors
    no_origin_advice = "{start} {allow_origins} '*' to allow every page."

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = config.base  # redirects after a sign-in stay below this path

    async def respond(self, request: Request, read_form: ReadForm) -> None:
        """Raise the ProxyError that answers a request for the gate itself, such as a sign-in."""

    async def authorize(self, request: Request) -> None:
        """Return to admit the request; raise ProxyError to refuse it."""
        raise NotImplementedError

    async def has_access(self, request: Request) -> bool:
        """Whether the session of an admitted request still exists; see `close_ended_sessions`."""
        try:
            await self.authorize(request)
        except ProxyError as error:
            return error.status == 503  # no response of the Hub: the next check tries again
        return True

    def response_fields(self) -> Fields:
        """Header fields that the gate adds to a response of an app."""
        return ()

    def owns_token(self, token: str) -> bool:
        return bool(self.token) and hmac.compare_digest(token.encode(), self.token.encode())

    def owns_authorization(self, value: str) -> bool:
        match = _TOKEN_FIELD.fullmatch(value)
        return match is not None and self.owns_token(match.group(1))

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        """Whether a cookie belongs to us, or to another port_proxy under the same host name.

        Browsers share cookies between ports.  If the app behind `route` is a port_proxy on this
        machine, it keeps its own cookies.
        """
        bare = name[len("__Host-") :] if name.startswith("__Host-") else name
        if not bare.startswith((COOKIE_PREFIX,) + self.other_cookies):
            return name == self.cookie_name
        inner_cookie = COOKIE_PREFIX + str(route.port if route and route.is_local else "")
        is_inner = bare == inner_cookie or bare.startswith(inner_cookie + "_app")
        return not is_inner or inner_cookie == self.cookie_name

    def strip_cookies(self, value: str, route: Optional[Route]) -> str:
        """The value of a Cookie field without our cookies, otherwise unchanged."""
        if COOKIE_PREFIX not in value and not self.other_cookies:
            return value
        pairs = value.split(";")
        kept = [pair for pair in pairs if not self.owns_cookie(cookie_name(pair), route)]
        return ";".join(kept).lstrip(" \t")

    def strip_query(self, url: str) -> str:
        """A URL, or a query with its "?", without the `token` parameters that hold our token."""
        if "?" not in url or ("token" not in url and "%" not in url):
            return url
        before, hash_mark, fragment = url.partition("#")
        path, mark, query = before.partition("?")
        kept = [
            parameter
            for parameter in query.split("&")
            if not any(map(self.owns_token, query_tokens("?" + parameter)))
        ]
        return path + (mark + "&".join(kept) if kept else "") + hash_mark + fragment

    def redirect_without_token(self, request: Request, cookies: Callable[[], Fields]) -> None:
        """Raise ProxyError 302 for a page visit whose target has our token.

        This keeps the token out of the address bar and of later Referer fields.
        """
        target = public_target(request)
        clean = self.strip_query(target)
        if clean != target and request.is_page_visit:
            root = "" if request.client.app_port else self.root
            location = ("Location", local_target(root, clean))
            raise ProxyError(302, "Signed in.", (location,) + cookies())

    def check_origin(self, request: Request) -> None:
        """Raise ProxyError 403 for a request of a foreign page, except for top-level navigation."""
        headers, allowed = request.headers, self.config.allow_origins
        is_link = "origin" not in headers.index and is_top_level(request)
        if not is_foreign(request) or "*" in allowed or is_link:
            return
        page = headers.get("origin") or "/".join(headers.get("referer").split("/")[:3])
        origin = ""
        with contextlib.suppress(ValueError):  # not valid, such as "null"
            origin = "" if "*" in page else normal_origin(page)
        if origin and allows_origin(allowed, origin):
            return
        parties = origin or "another site", request.client.authority or "no Host"
        text = "A page of %s may not use this address (%s)." % parties
        advice = "{start} {allow_origins} {value} to allow it." if origin else self.no_origin_advice
        if origin and self.config.trusted_proxies:
            advice += " If %s is this proxy, the server in front must pass Host unchanged." % origin
        raise ProxyError(403, text, (), advice, origin)


async def close_ended_sessions(deadlines: Deadlines) -> None:
    """Abort the tunnels, downloads and event streams of ended sessions, until it is cancelled.

    `served`, of a connection or tunnel: the gate and the request that it serves now; None if
    there is no request, or the gate's sessions cannot end.
    """
    while True:
        await asyncio.sleep(_RECHECK_SECONDS)
        for connection in list(deadlines.connections):
            served = connection.served
            if served is None or await served[0].has_access(served[1]):
                continue
            if connection.served is served and connection in deadlines.connections:
                logger.info("%s: closed, its session has ended", served[1].client.address)
                connection.abort()


class TokenGate(Gate):
    """The gate of a proxy that stands alone.

    With a token, it admits requests with the token, or with the signed cookie of an earlier
    sign-in.  Without a token, Host must be a name of this machine: this prevents DNS rebinding.
    Requests admitted without a token must not come from foreign pages.

    Browsers do not share cookies between hosts, so each app's host has a session of its own.  A
    browser that is signed in at our host signs in there with a one-time ticket.

    is_private: only this machine's users can connect.  port: ours, 0 for a Unix socket.
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
        self.key = secrets.token_bytes(32)
        self._tickets = BoundedDict(_MAX_TICKETS)  # by ticket: the app's port, and the deadline
        names = ["localhost", "*.localhost", "127.*", "::1", *config.allow_hostnames]
        for domain in config.domains:
            names += [domain, "*." + domain]
        if not is_private:  # addresses cannot be rebound; `_check_host` accepts those of IPv6
            names += [socket.gethostname().lower(), "*.*.*.*"]
        self._names = re.compile(host_regex(names))

    async def respond(self, request: Request, read_form: ReadForm) -> None:
        client, query = request.client, request.target.partition("?")[2]
        sent = dict(parse_qsl(query)) if request.method == "GET" else {}
        if client.app_port:
            port, deadline = self._tickets.pop(sent.get("ticket", ""), (0, 0.0))
            if port == client.app_port and now() <= deadline:
                self.check_origin(request)
                fields = (("Location", "/"), self._new_cookie(client), _NO_REFERRER)
                raise ProxyError(303, "Signed in.", fields)
        elif is_base(self.config.base, request.target):
            if self.token and request.method == "POST":  # the sign-in form
                self.check_origin(request)
                form = dict(parse_qsl((await read_form()).decode("latin-1")))
                target = local_target(self.root, form.get("next", ""))
                await self._require_token(request, [form.get("token", "").strip()], target)
                location = ("Location", target)
                raise ProxyError(303, "Signed in.", (location, self._new_cookie(client)))
            if _PORT_NUMBER.fullmatch(sent.get("open", "")):
                await self.authorize(request)
                raise self._redirect_to_host(int(sent["open"]), client)

    async def authorize(self, request: Request) -> None:
        preflight = (  # a CORS preflight never carries credentials
            self.config.allow_preflight
            and request.method == "OPTIONS"
            and {"origin", "access-control-request-method"} <= request.headers.index.keys()
        )
        authorize = self.config.authorize  # type: Any
        if authorize is not None:
            result = await authorize(request, request.client, request.route)
            if result is not None:  # such as False, which must not admit the request
                text = "authorize must return None to admit a request, or raise ProxyError, not %s"
                raise TypeError(text % type(result).__name__)
        elif not self.token:
            # After DNS rebinding, a page can set X-Forwarded-Host, but not Host: check both.
            for authority in {request.authority, request.client.authority}:
                self._check_host(authority)
        elif not preflight:
            host = host_of(request.client.authority)
            cookies = cookie_values(request.headers, self.cookie_name)
            signed_in = any(is_signed(self.key, "session", host, cookie) for cookie in cookies)
            if not signed_in:
                # One token of the query and one of Authorization: this limits the guesses.
                shown = query_tokens(request.target)[:1] + authorization_tokens(request.headers)[:1]
                await self._require_token(request, shown, public_target(request))
            self.redirect_without_token(request, lambda: (self._new_cookie(request.client),))
            if not signed_in:
                return  # admitted by the token, which foreign pages do not know
        if not preflight:
            self.check_origin(request)

    def _check_host(self, authority: str) -> None:
        host = host_of(authority)
        bare = host.strip("[]")
        if not bare or self._names.fullmatch(bare) or (bare != host and not self.is_private):
            return
        advice = "{start} {allow_hostnames} {value} if this name belongs to the proxy."
        advice = advice if _PLAIN_HOST.fullmatch(host) else ""
        raise ProxyError(403, "The host name %s is not allowed." % host, (), advice, host)

    async def _require_token(self, request: Request, shown: List[str], target: str) -> None:
        """Raise ProxyError unless a shown token is ours.  target: where a sign-in redirects to."""
        if any(map(self.owns_token, shown)):
            return
        wrong = ""
        if shown:
            # So a connection can try one token per second.  A lockout could be used against others.
            logger.warning("invalid token from %s", request.client.address or "-")
            await asyncio.sleep(_WRONG_TOKEN_SECONDS)
            wrong = "Invalid token. "
        if request.is_websocket:
            text = "A WebSocket needs a signed-in browser, or the proxy's token."
            raise ProxyError(403, wrong + text)
        if request.is_page_visit or (request.is_navigation and request.method == "POST"):
            raise SignInNeeded(wrong, target)
        text = "Sign in with a browser, or send the proxy's token as 'Authorization: token TOKEN'."
        raise ProxyError(401, wrong + text, CHALLENGE)

    def _new_cookie(self, client: ClientInfo) -> Tuple[str, str]:
        session = sign(self.key, "session", host_of(client.authority))
        path = "/" if client.app_port or self.config.whole_origin else self.config.base or "/"
        return own_cookie(self.cookie_name, session, path, client)

    def _redirect_to_host(self, port: int, client: ClientInfo) -> ProxyError:
        url = host_form(port, client, self.config.domains)
        if not url or port > 65535:
            text = "At this host name, apps cannot have hosts of their own."
            advice = "{start} {domains} NAME. All subdomains of NAME must resolve to this machine."
            raise ProxyError(404, text, (), advice)
        if self.token:
            ticket = secrets.token_urlsafe(32)
            self._tickets[ticket] = port, now() + _TICKET_SECONDS
            url += "?ticket=" + ticket
        return ProxyError(303, "Redirecting.", (("Location", url), _NO_REFERRER))


def public_target(request: Request) -> str:
    """The target of a request, with the prefix of its app also if the request is unprefixed."""
    route = request.route
    return route.prefix + request.path + request.query if route else request.target


def local_target(base: str, target: str) -> str:
    """The path of a redirect to `target`; the base itself if `target` is not below the base.

    The base is spelled as in `base`, because browsers compare cookie paths without decoding.
    """
    rest = path_below(base, target) or "/"
    location = base + (rest if rest[0] == "/" else "/" + rest)
    return location if _LOCAL_TARGET.fullmatch(location) else base + "/"


def normal_origin(origin: str) -> str:
    """An origin, or a pattern, in lower case and without a default port.  Raises ValueError."""
    match = _ORIGIN.fullmatch(origin.lower())
    if not match:
        text = "an origin is a scheme, host and port such as https://a.example.org, not %r"
        raise ValueError(text % origin)
    scheme, host, port = match.groups("")
    normal_pattern(host)
    return "%s://%s%s" % (scheme, host, "" if port == _DEFAULT_PORTS[scheme] else port)


def allows_origin(allowed: Iterable[str], origin: str) -> bool:
    """Whether an allowed origin, or a pattern, matches `origin`.  All are in normal form."""
    page, *others = filter(None, map(_ORIGIN.fullmatch, (origin, *allowed)))
    hosts = [match.group(2) for match in others if match.group(1, 3) == page.group(1, 3)]
    return bool(re.fullmatch(host_regex(hosts), page.group(2)))


def query_tokens(target: str) -> List[str]:
    """The values of all `token` parameters in the query of a URL or target."""
    query = target.partition("#")[0].partition("?")[2]
    parameters = [pair.partition("=") for pair in query.split("&")]
    return [unquote(value) for name, _, value in parameters if unquote(name) == "token"]


def authorization_tokens(headers: Headers) -> List[str]:
    found = map(_TOKEN_FIELD.fullmatch, headers.get_all("authorization"))
    return [match.group(1) for match in found if match]


# --------------------------------------------------------------------------------------------------
# JupyterHub
# --------------------------------------------------------------------------------------------------
# If a JupyterHub started this server, the Hub decides about access.  Programs send a token of the
# Hub.  Browsers sign in at the Hub (OAuth 2.0, RFC 6749 section 4.1, with PKCE, RFC 7636) and get a
# cookie with a random session id; the token of the session stays in memory.  Tokens are looked up
# at the Hub, and the results are cached.  Activity is reported, so that the Hub can stop idle
# servers.

# With _RECHECK_SECONDS, an ended session loses its access within less than a minute.
_CACHE_SECONDS = 45.0  # lifetime of a token's cached user
_LOGIN_SECONDS = 600  # timeout of a sign-in
_MAX_REMEMBERED = 1000  # sessions and tokens, each
_MAX_PENDING = 64  # concurrent lookups of tokens that the Hub has not confirmed
_MAX_TOKENS = 8  # distinct tokens in a request
_MAX_LOGIN_TARGET = 2048  # characters; a browser refuses cookies of more than 4096
_HUB_TIMEOUT = 10.0  # seconds
_HUB_COOKIES = "jupyterhub-"
_HUB_SESSION = "jupyterhub-session-id"  # cookie of the Hub; a sign-out changes its value
# Tokens of another form are an app's, and are not sent to the Hub.
_HUB_TOKEN = re.compile("[!-~]{1,1024}")
_FORM = "Content-Type: application/x-www-form-urlencoded"
_JSON = "Content-Type: application/json"


def hub_in(environment: Mapping[str, str]) -> Hub:
    """The Hub that the environment describes.  Raises ValueError for a bad or missing variable."""

    def read(name: str, default: Optional[str] = None, parse: Callable[[str], Any] = str) -> Any:
        text = environment.get("JUPYTERHUB_" + name) or default
        if text is None:
            raise ValueError("JUPYTERHUB_%s is not set, but JupyterHub started this server" % name)
        try:
            return parse(text)
        except (ValueError, TypeError, AttributeError):
            raise ValueError("JUPYTERHUB_%s is not valid: %s" % (name, text))

    prefix = read("SERVICE_PREFIX", parse=normal_base)
    scopes = environment.get("JUPYTERHUB_OAUTH_SCOPES")  # before JupyterHub 3
    is_https = read("PUBLIC_URL", "").startswith("https:")
    secure = (("Secure", ""),) if is_https else ()  # type: Fields
    return Hub(
        prefix=prefix,
        user=read("USER", ""),
        service_url=read("SERVICE_URL", parse=_http_url),
        api_url=read("API_URL", parse=_http_url).rstrip("/"),
        api_token=read("API_TOKEN"),
        client_id=read("CLIENT_ID"),
        authorize_url=read("HOST", "") + read("BASE_URL", "/") + "hub/api/oauth2/authorize",
        callback_url=read("OAUTH_CALLBACK_URL", prefix + "/oauth_callback"),
        access_scopes=read("OAUTH_ACCESS_SCOPES", scopes, lambda text: frozenset(json.loads(text))),
        server_name=read("SERVER_NAME", ""),
        home=read("DEFAULT_URL", "", functools.partial(_hub_home, prefix)),
        activity_url=read("ACTIVITY_URL", "", _http_url),
        activity_interval=max(1.0, read("ACTIVITY_INTERVAL", "300", float)),
        host_cookies=read("COOKIE_HOST_PREFIX_ENABLED", "0").lower() in ("1", "true"),
        cookie_options=secure + read("COOKIE_OPTIONS", "{}", _cookie_options),
    )


def _http_url(text: str) -> str:
    url = urlsplit(text)
    is_usable = url.netloc and url.scheme in _DEFAULT_PORTS and url.port != 0
    if text and not is_usable:  # "" is the default; `url.port` may raise ValueError itself
        raise ValueError
    return text


def _hub_home(prefix: str, path: str) -> str:
    home = prefix + "/" + quote(path.lstrip("/"), safe="/?#[]@!$&'()*+,;=:%~")
    return "" if is_base(prefix, home.partition("#")[0]) else home  # avoids a redirect loop


def _cookie_options(text: str) -> Fields:
    """The cookie attributes in `text`: JSON with the arguments of Tornado's set_cookie."""
    arguments = {name.lower(): value for name, value in json.loads(text).items() if value}
    if "expires_days" in arguments:
        arguments.setdefault("max_age", int(float(arguments["expires_days"]) * 86400))
    names = ("SameSite", "Secure", "Domain", "Max-Age", "Partitioned")
    values = [(name, arguments.get(name.lower().replace("-", "_"))) for name in names]
    options = [(name, "" if value is True else str(value)) for name, value in values if value]
    if not re.fullmatch("[A-Za-z0-9.-]*", "".join(text for _, text in options)):
        raise ValueError  # a ";" would begin another attribute
    return tuple(options)


def _config_under_hub(
    config: Config, flags: Iterable[str], environment: Mapping[str, str]
) -> Config:
    """The configuration of a server that a JupyterHub starts.  Raises ValueError."""
    for flag in "--token --token-file --no-token --certfile --keyfile --client-ca".split():
        if flag in flags:
            text = "JupyterHub started this server (JUPYTERHUB_SERVICE_URL is set): remove %s"
            raise ValueError(text % flag)
    hub = hub_in(environment)
    url = urlsplit(hub.service_url)
    return config._replace(
        hub=hub,
        base=hub.prefix + normal_base(config.base),
        bind=url.hostname or "0.0.0.0",
        port=url.port or int(_DEFAULT_PORTS[url.scheme][1:]),
        token="",
        # Any peer may set X-Forwarded headers: clients must sign in at the Hub in any case.
        trusted_proxies=config.trusted_proxies or ("0.0.0.0/0", "::/0"),
        # The Hub and its user wait until a stopped server has exited.
        shutdown_timeout=min(config.shutdown_timeout, 0.3),
        certfile=environment.get("JUPYTERHUB_SSL_CERTFILE"),
        keyfile=environment.get("JUPYTERHUB_SSL_KEYFILE"),
        client_ca=environment.get("JUPYTERHUB_SSL_CLIENT_CA"),
    )


HubUser = Tuple[str, bool]  # the name, and whether the scopes give access to this server


class HubGate(Gate):
    """The gate of a server that a JupyterHub started: the Hub's scopes decide about access."""

    sessions_can_end = True
    other_cookies = (_HUB_COOKIES,)

    def __init__(self, config: Config, deadlines: Deadlines) -> None:
        super().__init__(config)
        assert config.hub is not None
        self.hub = config.hub
        self.root = self.hub.prefix
        host = "__Host-" if self.hub.host_cookies else ""
        self.cookie_name = host + COOKIE_PREFIX + short_hash(self.hub.prefix)
        self.callback_path = urlsplit(self.hub.callback_url).path
        self._key = secrets.token_bytes(32)
        self._deadlines = deadlines
        self._tls = None  # type: Optional[ssl.SSLContext]
        if urlsplit(self.hub.api_url).scheme == "https":
            # With internal TLS, the Hub supplies our CA and our client certificate.
            self._tls = ssl.create_default_context(cafile=config.client_ca)
            if config.certfile:
                self._tls.load_cert_chain(config.certfile, config.keyfile)
        # By token: the running or finished lookup, and the time at which it expires.  A token is in
        # `_unknown` until the Hub has confirmed it.  Anybody can invent tokens: in a dictionary of
        # their own, they cannot evict confirmed ones.  Their concurrent lookups are limited.
        self._tokens, self._unknown = BoundedDict(_MAX_REMEMBERED), BoundedDict(_MAX_REMEMBERED)
        # By session: its token, and `_hub_session` at the sign-in.  If a later request has another
        # value, the browser has signed out at the Hub.
        self._sessions = BoundedDict(_MAX_REMEMBERED)  # type: Dict[str, Tuple[str, str]]
        self._version = ""  # of the Hub, which compares it with its own
        deadlines.run(self._report_activity())

    async def respond(self, request: Request, read_form: ReadForm) -> None:
        if request.method not in ("GET", "HEAD"):
            return
        if is_base(self.hub.prefix + "/api", request.target):  # a poll of the Hub
            if not self._version:
                # A starting Hub may not respond yet, but it stops servers that do not report ready.
                with contextlib.suppress(ProxyError):
                    await self._user_of(self.hub.api_token, is_known=True)
            raise ProxyError(200, "Ready.", (("X-JupyterHub-Version", self._version),))
        if is_base(self.callback_path, request.target):
            await self._end_login(request)
        if is_base(self.hub.prefix, request.target):
            await self.authorize(request)
            home = self.hub.home or self.config.base + "/"
            raise ProxyError(302, "Redirecting.", (("Location", home),))

    async def authorize(self, request: Request) -> None:
        accepted, in_sessions = authorization_tokens(request.headers), self._session_tokens(request)
        if OWN_SITES.issuperset(request.headers.get_all("sec-fetch-site")):
            # A link of a foreign page must not sign this browser in as another user.
            accepted += query_tokens(request.target)
        # All tokens are looked up, so that every token of the Hub can be removed from the request.
        tokens = all_tokens(request) + in_sessions
        users = {token: await self._user_of(token) for token in tokens}
        valid = [token for token in accepted + in_sessions if users[token]]
        user = users[valid[0]] if valid else None
        if user is None:
            if request.is_page_visit:
                raise self._begin_login(request.target, request.client)
            text = "Sign in at the Hub, or send a Hub token as 'Authorization: token TOKEN'."
            raise ProxyError(403, text, CHALLENGE)
        self._check_access(user)
        is_signed_in = any(users[token] for token in in_sessions)
        self.redirect_without_token(
            request, lambda: () if is_signed_in else (self._new_session(valid[0], request),)
        )
        if valid[0] not in accepted:  # foreign pages do not know tokens
            self.check_origin(request)

    def _session_tokens(self, request: Request) -> List[str]:
        """The tokens of this browser's sessions.  A sign-out at the Hub ends them."""
        tokens = []
        for session in cookie_values(request.headers, self.cookie_name):
            token, hub_session = self._sessions.get(session, ("", ""))
            if hub_session == _hub_session(request):
                tokens.append(token)
            else:
                self._sessions.pop(session, None)
        return tokens

    def _check_access(self, user: HubUser) -> None:
        name, has_access = user
        if not has_access:
            owner = " of " + self.hub.user if self.hub.user else ""  # a service has no owner
            text = "You are signed in as %s, but have no access to this server%s. Sign in at the"
            text += " Hub as another user, or ask for access."
            raise ProxyError(403, text % (name, owner))

    def owns_token(self, token: str) -> bool:
        return token in self._tokens or token == self.hub.api_token

    def _begin_login(self, target: str, client: ClientInfo) -> ProxyError:
        """The redirect to the Hub, which redirects back to `_end_login`.

        Its state is in a signed cookie, so that other clients cannot evict it.
        """
        state = secrets.token_urlsafe(32)
        target = local_target(self.root, target)
        if len(quote(target)) > _MAX_LOGIN_TARGET:
            target = self.root + "/"
        login = "%d.%s" % (now() + _LOGIN_SECONDS, quote(target))
        value = "%s.%s" % (login, sign(self._key, "login " + state, login))
        digest = hashlib.sha256(sign(self._key, "verifier", state).encode()).digest()
        parameters = {
            "client_id": self.hub.client_id,
            "redirect_uri": self.hub.callback_url,
            "response_type": "code",
            "state": state,
            "code_challenge": base64url(digest),
            "code_challenge_method": "S256",
        }
        location = self.hub.authorize_url + "?" + urlencode(parameters)
        name = "%s_%s" % (self.cookie_name, short_hash(state))  # several tabs can sign in at once
        options = self.hub.cookie_options + (("Max-Age", str(_LOGIN_SECONDS)),)
        cookie = own_cookie(name, value, self.callback_path, client, options)
        return ProxyError(302, "Sign in at the Hub.", (("Location", location), cookie))

    async def _end_login(self, request: Request) -> None:
        """Handle the redirect from the Hub.  ProxyError 302 to the requested page, 403 or 503."""
        sent = dict(parse_qsl(request.target.partition("?")[2]))
        state, again = sent.get("state", ""), " Open %s/ again." % self.hub.prefix
        name, purpose = "%s_%s" % (self.cookie_name, short_hash(state)), "login " + state
        deadline, _, target = signed_value(request.headers, name, self._key, purpose).partition(".")
        if not deadline or now() > int(deadline):
            text = "This sign-in was used or has expired, began in another browser, or cookies are"
            raise ProxyError(403, text + " blocked." + again)
        form = {  # RFC 6749 section 4.1.3
            "client_id": self.hub.client_id,
            "client_secret": self.hub.api_token,
            "grant_type": "authorization_code",
            "code": sent.get("code", ""),
            "redirect_uri": self.hub.callback_url,
            "code_verifier": sign(self._key, "verifier", state),
        }
        url = self.hub.api_url + "/oauth2/token"
        response, data = await self._call("POST", url, [_FORM], urlencode(form))
        token = str(data.get("access_token", "")) if response.status == 200 else ""
        user = await self._user_of(token, is_known=True)
        if user is None:
            raise ProxyError(403, "The Hub did not sign you in." + again)
        self._check_access(user)
        location, session = ("Location", unquote(target)), self._new_session(token, request)
        options = self.hub.cookie_options + (("Max-Age", "0"),)
        used = own_cookie(name, "", self.callback_path, request.client, options)
        raise ProxyError(302, "Signed in.", (location, session, used))

    def _new_session(self, token: str, request: Request) -> Tuple[str, str]:
        session, path = secrets.token_urlsafe(32), self.hub.prefix + "/"
        self._sessions[session] = token, _hub_session(request)
        return own_cookie(self.cookie_name, session, path, request.client, self.hub.cookie_options)

    async def _user_of(self, token: str, is_known: bool = False) -> Optional[HubUser]:
        """The user of a token; None if the Hub does not know it.  is_known: the Hub gave it."""
        if not _HUB_TOKEN.fullmatch(token):
            return None
        cache = self._tokens if is_known or token in self._tokens else self._unknown
        lookup, until = cache.get(token, (None, 0.0))
        if now() > until or (lookup.done() and lookup.exception()):  # failures are not cached
            pending = sum(not task.done() for task, _ in self._unknown.values())
            if pending >= _MAX_PENDING and cache is self._unknown:
                text = "There are too many requests to the Hub. Try again shortly."
                raise ProxyError(503, text, _RETRY_SOON)
            lookup = self._deadlines.loop.create_task(self._find_user(token))
            until = now() + _CACHE_SECONDS
            cache[token] = lookup, until
        user = await lookup  # type: Optional[HubUser]
        if user is not None:
            self._tokens[token] = lookup, until
        return user

    async def _find_user(self, token: str) -> Optional[HubUser]:
        lines = ["Authorization: token " + token]
        response, data = await self._call("GET", self.hub.api_url + "/user", lines)
        if response.status in (401, 403, 404):
            return None
        name, scopes = data.get("name"), data.get("scopes")
        if response.status != 200 or not isinstance(name, str) or not isinstance(scopes, list):
            text = "The Hub did not name the user of a token (%d)." % response.status
            raise ProxyError(503, text, _RETRY_SOON)
        wanted = self.hub.access_scopes | {"access:servers"}
        return name, not wanted.isdisjoint(map(str, scopes))

    async def _call(
        self, method: str, url: str, lines: List[str], body: str = ""
    ) -> Tuple[Response, Dict[str, Any]]:
        """The response to one request, and the JSON object in its body; ProxyError 503."""
        hub, connection = urlsplit(self.hub.api_url), Connection(self._deadlines)
        head = ["%s %s HTTP/1.1" % (method, urlsplit(url).path), "Host: " + hub.netloc]
        head += ["Accept: application/json"] + lines
        port = hub.port or int(_DEFAULT_PORTS[hub.scheme][1:])
        opening = self._deadlines.loop.create_connection(
            lambda: connection, hub.hostname or "", port, ssl=self._tls
        )
        try:
            await asyncio.wait_for(opening, _HUB_TIMEOUT)
            response = await fetch(connection, head, body.encode(), _HUB_TIMEOUT, self.config)
            self._version = response.headers.get("x-jupyterhub-version")
            is_json = response.status < 400 and response.body
            data = json.loads(response.body.decode()) if is_json else {}
        except (
            ProxyError, Truncated, TimedOut, OSError, asyncio.TimeoutError, ValueError
        ) as error:  # fmt: skip
            reason = getattr(error, "strerror", None) or type(error).__name__
            logger.warning("no valid response from the Hub at %s: %s", url, reason)
            text = "The Hub, which decides about access, does not respond. Try again shortly."
            raise ProxyError(503, text, _RETRY_SOON)
        return response, data if isinstance(data, dict) else {}

    async def _report_activity(self) -> None:
        """Report the time of the last activity (ISO 8601, UTC) once an interval, if it is new."""
        lines, reported = ["Authorization: token " + self.hub.api_token, _JSON], 0.0
        while self.hub.activity_url:
            await asyncio.sleep(self.hub.activity_interval)
            moment = self._deadlines.last_activity
            if moment != reported:
                iso_time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
                last = {"last_activity": iso_time}
                activity = json.dumps({**last, "servers": {self.hub.server_name: last}})
                with contextlib.suppress(ProxyError):  # it has been logged; tried again next time
                    response, _ = await self._call("POST", self.hub.activity_url, lines, activity)
                    reported = moment if response.status < 400 else reported


def all_tokens(request: Request) -> List[str]:
    """The distinct tokens in Authorization, the query and Referer; ProxyError 400 for too many."""
    headers = request.headers
    found = authorization_tokens(headers) + query_tokens(request.target)
    for value in headers.get_all("referer"):
        found += query_tokens(value)
    tokens = list(dict.fromkeys(found))
    if len(tokens) > _MAX_TOKENS:
        text = "There are more than %d different tokens in this request." % _MAX_TOKENS
        raise ProxyError(400, text)
    return tokens


def _hub_session(request: Request) -> str:
    """A hash of the browser's session at the Hub, whose cookie may be long."""
    return short_hash("".join(cookie_values(request.headers, _HUB_SESSION)[:1]))


# --------------------------------------------------------------------------------------------------
# Exchange
# --------------------------------------------------------------------------------------------------
# One request and its response, from the parsed head to the last byte.
#
# An EOF of the client is ambiguous: it may have left, or only have closed its sending side, as `nc`
# does.  After the EOF, `_HALF_CLOSED_SECONDS` is the timeout for data from the upstream.  A reset,
# and any close over TLS, ends the request at once.

_HALF_CLOSED_SECONDS = 2.0
_MAX_FORM_BYTES = 8192
_ALLOW = (("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),)


class Exchange:
    """One request of a client, and its response.

    status: of the final response; 0 until its head is sent.  keep_alive: the client's connection
    may carry another request.  tunnel: the client's side of it after a 101; otherwise None.
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
        self.body = Body(client, request.framing, self.config, is_response=False)
        self.keep_alive = request.keep_alive
        self.started = now()
        self.status = self.sent = 0
        self.failure = ""
        self.tunnel = None  # type: Optional[TunnelEnd]

    async def run(self) -> None:
        """Serve the request, and turn errors into responses.

        Raises PeerGone, Truncated, TimedOut or OSError if the client's connection must be aborted.
        """
        try:
            await self._serve()
        except ProxyError as error:
            await self._respond_error(error)
        except (PeerGone, Truncated, TimedOut, OSError):
            raise
        except asyncio.CancelledError:
            self.failure = "The proxy was told to stop."
            raise
        except Exception as error:  # a bug: only this request fails
            logger.error("internal error: %r", error)
            logger.debug("", exc_info=True)
            text = "Internal error of the proxy. Its log says more."
            await self._respond_error(ProxyError(500, text))

    async def _serve(self) -> None:
        # Requests for the gate itself have no route, or are sent to an app's host to sign in there.
        if self.request.route is None or self.request.client.app_port:
            await self.gate.respond(self.request, self._read_form)
        request = self.request = find_app(self.request, self.gate)
        await self.gate.authorize(request)
        self.client.admit()
        self.client.deadlines.last_activity = time.time()
        if request.route is not None:
            await self._serve_app(request.route)
        elif request.target == "*":
            await self._respond(LocalResponse(204, _ALLOW))
        elif request.method in ("GET", "HEAD"):
            await self._show_ports()
        else:
            raise ProxyError(405, "This page can only be read.", (("Allow", "GET, HEAD"),))

    async def _serve_app(self, route: Route) -> None:
        request, gate, upstreams = self.request, self.gate, self.proxy.upstreams
        if self.proxy.mark in request.headers.tokens(MARK_FIELD.lower()):
            text = "The server on %s leads back to this proxy: this is an endless loop."
            raise ProxyError(508, text % route.place)
        check_route(route, self.config)
        if request.is_websocket:
            if request.framing is not NO_BODY:
                raise ProxyError(400, "A WebSocket handshake has no body.")
            if len(self.proxy.tunnels) >= self.config.max_tunnels:
                raise ProxyError(503, "There are too many open WebSockets.", _RETRY_SOON)
        # WebSockets and service worker scripts do not follow redirects.
        elif request.is_unprefixed and request.headers.get("sec-fetch-dest") != "serviceworker":
            raise await self._redirect(route, 307)
        elif not request.path and not route.absolute and request.method in ("GET", "HEAD"):
            raise await self._redirect(route, 302)
        # Body data that has already come is validated before a connection is taken.
        data = request_for_upstream(request, gate, self.proxy.mark)
        data += self.body.encode(self.body.buffered())
        pooled = upstreams.take(route, request.is_replayable)
        if pooled is None or not await self._forward(route, pooled, data):
            await self._forward(route, await upstreams.connect(route), data)

    async def _forward(self, route: Route, upstream: Connection, data: bytes) -> bool:
        """Send the request and relay its response on one connection; then pool or close it.

        Returns False if the connection was stale and the request may be sent on another.
        """
        is_reusable, senders = False, []
        try:
            upstream.read_timeout = self.config.response_timeout
            watcher = self.client.watcher = functools.partial(self._on_client_end, upstream)
            watcher(self.client)  # it may have ended already
            if self.gate.sessions_can_end:
                self.client.served = self.gate, self.request
            upstream.write_deadline = now() + self.config.stall_timeout
            upstream.write(data)
            if not self.body.finished:
                senders.append(upstream.deadlines.loop.create_task(self._send_body(upstream)))
            response = await self._read_response(upstream)
            if response.status == 101:
                await self._open_tunnel(upstream, response)
            else:
                is_reusable = await self._relay(route, upstream, response)
        except (ProxyError, Truncated, TimedOut, OSError) as error:
            if isinstance(error, ProxyError) and error is upstream.failure:
                raise  # the request body is malformed, or late
            may_retry = upstream.is_reused and self.request.is_replayable
            if may_retry and not upstream.has_received and not isinstance(error, TimedOut):
                return False
            raise await self._explain(error, route, upstream)
        finally:
            self.client.watcher = None
            self.client.served = None
            await cancel(senders)
            if is_reusable and self.body.finished:
                self.proxy.upstreams.give(route, upstream)
            elif self.tunnel is None:
                upstream.abort()
        return True

    def _on_client_end(self, upstream: Connection, client: Connection) -> None:
        # The request body is late.  (If a client does not read, TimedOut has an argument.)
        is_late = isinstance(client.failure, TimedOut) and not client.failure.args
        if not client.ended or is_late:  # `_send_body` reports that the client is late
            return
        if client.failure is None and client.transport.can_write_eof():
            seconds = upstream.read_timeout = min(upstream.read_timeout, _HALF_CLOSED_SECONDS)
            upstream.read_deadline = min(upstream.read_deadline, now() + seconds)
        else:
            upstream.abort(PeerGone())

    async def _send_body(self, upstream: Connection) -> None:
        """Send the request body.  Its failure is raised where the response is read."""
        self.client.read_timeout = self.config.stall_timeout
        try:
            await self.body.relay(upstream, self.config.stall_timeout)
            if not self.status:
                upstream.read_deadline = now() + upstream.read_timeout
        except PeerGone:
            pass  # an upstream that stops reading may have responded already: that is no error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            upstream.abort(PeerGone() if isinstance(error, Truncated) else error)

    async def _read_response(self, upstream: Connection) -> Response:
        """The final response or a 101; other interim responses are relayed at once."""
        while True:
            timeout = upstream.read_timeout if self.body.finished else FOREVER
            upstream.read_deadline = now() + timeout
            head = await read_head(upstream, False, self.config)
            response = parse_response(head, self.request.method, self.config)
            if response.status >= 200 or response.status == 101:
                return response
            if self.request.minor == "1":  # RFC 9110 section 15.2
                lines = response_lines(response, self.request, self.gate)
                self.client.write(serialise(lines, NO_BODY))
                await self.client.drain(self.config.stall_timeout)
            await asyncio.sleep(0)  # yield: a flood of them must not starve other requests

    async def _relay(self, route: Route, upstream: Connection, response: Response) -> bool:
        """Relay the response.  Returns whether the upstream's connection can be reused."""
        client, request, framing = self.client, self.request, response.framing
        body = Body(upstream, framing, self.config, is_response=True)
        if request.minor == "0" and body.sent_framing is CHUNKED:
            body.sent_framing = UNTIL_CLOSE
        client.eof_ends_body = body.sent_framing is UNTIL_CLOSE
        if not client.ended:
            upstream.read_timeout = FOREVER
        self.keep_alive = self._may_keep_alive() and not client.eof_ends_body
        # Malformed data at the start of the body raises here, before the head is sent.
        data = body.buffered()
        head = self._response_head(response, body.sent_framing)
        self.status = response.status
        client.write(head + body.encode(data))
        while not body.finished and not data:  # the first data may hold the page's title
            await client.drain(self.config.stall_timeout)
            data = await body.read(upstream.read_timeout)
            client.write(body.encode(data))
        if request.is_page_visit and response.status == 200 and route.host == "localhost":
            title = title_in(response.headers, data)
            if title:
                self.proxy.titles[route.port] = title, time.time()
        try:
            await body.relay(client, self.config.stall_timeout)
        finally:
            self.sent = body.count
        return response.is_reusable

    def _response_head(self, response: Response, framing: Framing) -> bytes:
        lines = response_lines(response, self.request, self.gate)
        if self.gate.app_cookie:
            lines += cookies_for_unprefixed(self.request, response, lines, self.gate)
        if not self.keep_alive and response.status >= 200:
            lines.append("Connection: close")
        return serialise(lines, framing)

    def _may_keep_alive(self) -> bool:
        # If the response starts before the end of the request body, the rest may never be read.
        client = self.client
        has_rest = not self.body.finished or (client.is_lent and (client.buffer or client.unread))
        return self.keep_alive and self.proxy.is_running and not has_rest

    async def _open_tunnel(self, upstream: Connection, response: Response) -> None:
        is_upgrade = "upgrade" in response.headers.connection
        is_websocket = "websocket" in response.headers.tokens("upgrade")
        if not self.request.is_websocket or not is_upgrade or not is_websocket:
            text = "The app switched to a protocol (101) that the request did not name."
            raise ProxyError(502, text)
        self.keep_alive = False
        timeout = self.config.stall_timeout
        with contextlib.suppress(PeerGone):  # the upstream may close after its 101
            await upstream.drain(timeout)
        self.status = 101
        self.client.write(self._response_head(response, NO_BODY))
        await self.client.drain(timeout)
        self.tunnel = await open_tunnel(self.client, upstream, self.proxy)

    async def _explain(self, error: Exception, route: Route, upstream: Connection) -> Exception:
        """The ProxyError for a failure of the upstream, or TimedOut after the response head."""
        if isinstance(error, TimedOut):
            if self.status:  # a half-closed client, or an upstream that stopped reading
                return error  # `PortProxy.serve_one` then aborts the connection
            text, timeout = "No response came from %s within %g seconds.", upstream.read_timeout
            if "writing" in error.args:
                text = "The app on %s did not read the request for %g seconds."
                timeout = self.config.stall_timeout
            text += " The client has closed its side." * self.client.ended
            return ProxyError(504, text % (route.place, timeout))
        is_page, is_silent = self.request.is_page_visit, not upstream.has_received
        if route.scheme == "http" and (
            upstream.buffer[:2] in TLS_RECORDS
            or (is_page and is_silent and await accepts_tls(self.proxy.upstreams, route))
        ):
            return unexpected_tls(route)
        if isinstance(error, ProxyError):
            text = "The response of %s is not valid HTTP. %s" % (route.place, error.detail)
            return ProxyError(502, text)
        ended = "closed" if isinstance(error, Truncated) else "reset"
        text = "The app on %s %s the connection " % (route.place, ended)
        if not is_silent:
            return ProxyError(502, text + "in the middle of its response.")
        advice = "If it speaks TLS, {start} {upstream_tls} {value}."
        if is_page or route.scheme == "https":
            advice = "Its log may say why."
        return ProxyError(502, text + "without a response.", (), advice, route.name)

    async def _respond(self, response: LocalResponse) -> None:
        self.keep_alive = self._may_keep_alive()
        is_head = self.request.method == "HEAD"
        self.status = response.status
        self.client.write(local_response(response, self.keep_alive, is_head))
        # Not `stall_timeout`: the response is short, and the client may not be signed in.
        await self.client.drain(self.config.head_timeout)
        self.sent = 0 if is_head else len(response.body)

    async def _respond_error(self, error: ProxyError) -> None:
        """Respond with the error, or end a response so that the client sees it is incomplete."""
        error.phrase_advice(self.gate.terms)
        self.failure = error.detail if error.status >= 400 else ""
        if not self.status:
            await self._respond(error_response(error, self.request, self.config))
            return
        self.keep_alive = False
        if self.client.eof_ends_body:
            self.client.abort()
        else:
            self.client.close()  # Content-Length, or the missing last chunk, shows it

    async def _redirect(self, route: Route, status: int) -> ProxyError:
        """A redirect to the prefix, where browsers send the app's cookies and the right Referer.

        The body of a form is read first, because browsers do not read an earlier response.
        """
        expects = "expect" in self.request.headers.index  # the client waits before it sends a body
        is_form = self.request.method not in ("GET", "HEAD") and not expects
        while is_form and not self.body.finished:
            await self.body.read(self.config.stall_timeout)
        path, query = self.request.path or "/", self.gate.strip_query(self.request.query)
        fields = (("Location", route.prefix + path + query),)
        return ProxyError(status, "Redirecting to %s/." % route.prefix, fields)

    async def _show_ports(self) -> None:
        config, client = self.config, self.request.client
        port = dict(parse_qsl(self.request.target.partition("?")[2])).get("port")
        if port is not None:  # from the form of the page
            location = typed_route(port, config).prefix + "/"
            raise ProxyError(303, "Redirecting.", (("Location", location),))
        own = {port for _, port in self.proxy.upstreams.listening}
        rows = []
        for listener in await self.proxy.upstreams.lookup(find_listeners):
            if listener.port in own or not listener.is_own:
                continue
            host_url = host_form(listener.port, client, config.domains)
            if host_url and self.gate.token:  # the gate redirects to the host, with a ticket
                host_url = "%s/?open=%d" % (config.base, listener.port)
            title, seen = self.proxy.titles.get(listener.port, ("", 0.0))
            title = title if seen >= listener.started else ""  # of an earlier program
            rows.append(port_row(config.base, listener, title, host_url))
        await self._respond(ports_response(config.base, rows, self.request))

    async def _read_form(self) -> bytes:
        """The body of a request to the gate."""
        until, data = now() + self.config.head_timeout, b""
        while not self.body.finished:
            data += await self.body.read(until - now())
            if len(data) > _MAX_FORM_BYTES:
                raise ProxyError(413, "The sign-in form is too long.")
        return data


def local_response(response: LocalResponse, keep_alive: bool, is_head: bool = False) -> bytes:
    phrase = REASON_PHRASES.get(response.status, "Error")
    lines = ["HTTP/1.1 %d %s" % (response.status, phrase)]
    lines += ["%s: %s" % field for field in response.fields]
    if not keep_alive:
        lines.append("Connection: close")
    return serialise(lines, NO_BODY) + (b"" if is_head else response.body)


class TunnelEnd(asyncio.Protocol):
    """One side of a tunnel: writes its data to the other side, `peer`, with back-pressure.

    An EOF of one side is passed on; a failure aborts both.  received: the number of bytes.
    """

    __slots__ = (
        "deadline", "ended", "is_paused", "peer", "proxy", "received", "served", "transport"
    )  # fmt: skip
    peer: "TunnelEnd"  # set by `open_tunnel`

    def __init__(self, connection: Connection, proxy: "PortProxy") -> None:
        self.proxy = proxy
        self.transport = connection.transport
        self.served = connection.served  # type: Optional[Tuple[Gate, Request]]
        self.deadline = FOREVER
        self.received = 0
        self.ended = self.is_paused = False

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.proxy.deadlines.last_activity = time.time()
        self.peer.transport.write(data)
        if self.peer.ended:  # half-closed: data extends the deadline
            self.extend()

    def extend(self) -> None:
        self.deadline = now() + self.proxy.config.stall_timeout

    def pause_writing(self) -> None:
        self.peer.is_paused = True
        with contextlib.suppress(RuntimeError, AttributeError):  # before 3.11, if it is closed
            self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        self.peer.is_paused = False
        with contextlib.suppress(RuntimeError, AttributeError):
            self.peer.transport.resume_reading()

    def eof_received(self) -> bool:
        self.ended = True
        self.peer.extend()
        end_writing(self.peer.transport)
        # If this returns False, asyncio closes the connection after the queued data.
        return not self.peer.ended and bool(self.transport.can_write_eof())

    def connection_lost(self, exc: Optional[BaseException]) -> None:
        connections, tunnels = self.proxy.deadlines.connections, self.proxy.tunnels
        connections.discard(self)
        if exc is None:
            self.peer.extend()
            close_once(self.peer.transport)
        else:
            self.peer.transport.abort()
        if self.peer not in connections:
            on_end = tunnels.pop(self, None) or tunnels.pop(self.peer, None)
            if on_end is not None:
                on_end()

    def check_deadlines(self, time: float) -> None:
        # Not POLLHUP, which can also mean that both sides have sent EOF, with data still unread.
        if time > self.deadline or (self.is_paused and poll(self.transport, "POLLERR")):
            self.abort()

    def close(self) -> None:
        """Close both sides after sending the queued data."""
        for end in (self, self.peer):
            close_once(end.transport)

    def abort(self) -> None:
        for end in (self, self.peer):
            end.transport.abort()


async def open_tunnel(client: Connection, upstream: Connection, proxy: "PortProxy") -> TunnelEnd:
    """Let a tunnel take over two connections.  Returns the client's side."""
    end, connections = TunnelEnd(client, proxy), proxy.deadlines.connections
    end.peer = TunnelEnd(upstream, proxy)
    end.peer.peer = end
    proxy.tunnels[end] = None
    sides = []
    for side, connection in ((end, client), (end.peer, upstream)):
        is_lost = connection not in connections or connection.transport.is_closing()
        sides.append((side, connection, is_lost))
        connection.transport.set_protocol(side)
        connections.discard(connection)
        connections.add(side)
    for side, connection, is_lost in sides:
        if connection.unread:
            connection.buffer += await connection.read()  # returns at once
        if connection.buffer and not side.peer.transport.is_closing():
            side.data_received(connection.buffer)
        if is_lost:
            side.connection_lost(connection.failure)
        elif connection.ended and not side.eof_received():
            close_once(connection.transport)
    return end


# --------------------------------------------------------------------------------------------------
# Server
# --------------------------------------------------------------------------------------------------
# Accepts connections and serves their requests in order.  An idle connection has no task.  The
# first byte of a request starts a task, which serves that request.


class PortProxy:
    """The proxy: `await PortProxy(config).start()`, then `await proxy.close()`.

    Several can run in one event loop.  Raises ValueError for an invalid configuration.  The logger
    is "port_proxy".
    """

    def __init__(self, config: Config = Config()) -> None:
        self.config = checked_config(config)
        self.is_running = False  # from `start` to `close`
        # By the client's side; each with a function to call at its end, or None.
        self.tunnels = {}  # type: Dict[TunnelEnd, Optional[Callable[[], None]]]
        # By port: the title of the last page visited, and when, in seconds since the epoch.
        self.titles = {}  # type: Dict[int, Tuple[str, float]]
        self.mark = secrets.token_hex(8)  # the value of MARK_FIELD
        self._clients = {}  # type: Dict[Connection, None]  # the one idle for longest first
        self._acceptors = []  # type: List[asyncio.Future[None]]  # of connections over TLS
        self._sockets = []  # type: List[socket.socket]
        self._cleanup = contextlib.ExitStack()  # ends what `start` has begun

    async def start(self, sockets: Optional[Sequence[socket.socket]] = None) -> "PortProxy":
        """Listen, and begin to accept connections.

        sockets: bound stream sockets to use in place of `bind` and `port`; they are closed with the
        proxy.  With an empty sequence, requests come through `serve_one` only.  Raises OSError if a
        file or an address is not available, ValueError for bad certificates or an invalid name.
        """
        loop = asyncio.get_event_loop()
        tls = server_context(self.config) if self.config.certfile else None
        self._sockets = _bind(self.config) if sockets is None else list(sockets)
        for sock in self._sockets:
            self._cleanup.callback(sock.close)
            if sockets is None and sock.family == _UNIX:
                self._cleanup.enter_context(contextlib.suppress(OSError))
                self._cleanup.callback(os.unlink, sock.getsockname())
        listening = [sock.getsockname()[:2] for sock in self._sockets if sock.family != _UNIX]
        self.is_running = True
        self.deadlines = Deadlines(self.config)
        self.deadlines.run(close_ended_sessions(self.deadlines))
        self.gate = TokenGate(self.config, self.is_private, self.port)  # type: Gate
        if self.config.hub:
            self.gate = HubGate(self.config, self.deadlines)
        self.upstreams = Upstreams(self.config, self.deadlines, listening)
        protocol = functools.partial(Connection, self.deadlines, self._accepted)
        try:
            for sock in self._sockets:
                if tls is not None:
                    sock.setblocking(False)
                    self._acceptors.append(loop.create_task(self._accept_tls(sock, tls)))
                else:
                    # In asyncio, `backlog` is also the number of attempts to accept in a row.
                    # Without a free file descriptor, all of them fail: hence a small number.
                    # `create_unix_server` is not used: it unlinks sockets of the caller, too.
                    server = await loop.create_server(protocol, sock=sock, backlog=32)
                    self._cleanup.callback(server.close)
                sock.listen(1024)  # the number of connections that wait to be accepted
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def port(self) -> int:
        """The TCP port; 0 before `start`, and for a Unix socket."""
        return next((sock.getsockname()[1] for sock in self._sockets if sock.family != _UNIX), 0)

    @property
    def is_private(self) -> bool:
        """Whether no other machine can connect; for a Unix socket, whether only its owner can."""
        return all(map(_is_private, self._sockets))

    @property
    def token(self) -> str:
        """The token that clients must send; "" if none is required."""
        return self.gate.token if self.is_running else ""

    @property
    def url(self) -> str:
        """The address to open on this machine, without the token."""
        host = self.config.bind
        if host in LOOPBACK_NAMES or host.startswith(_UNIX_PREFIX):
            host = "localhost"
        elif host in ("", "0.0.0.0", "::"):
            host = socket.gethostname()
        scheme = "https" if self.config.certfile else "http"
        authority = authority_of(host, self.port) if self.port else host
        return "%s://%s%s/" % (scheme, authority, self.config.base)

    @property
    def active_requests(self) -> int:
        """The number of requests in progress, without open WebSockets."""
        return sum(client.state is ACTIVE for client in self._clients)

    async def close(self) -> None:
        """Stop accepting connections, and close the idle ones and the tunnels.

        Running requests and queued data have `shutdown_timeout` seconds; then they are cut off.
        """
        if not self.is_running:
            return
        self.is_running = False
        await cancel(self._acceptors)
        self._cleanup.close()
        timeout = self.config.shutdown_timeout
        timer = self.deadlines.loop.call_later(timeout, self.cut)
        for client in list(self._clients):
            if client.state is HANDSHAKE:
                client.end()
            elif client.state is not ACTIVE:
                client.close()
        for tunnel in list(self.tunnels):
            tunnel.close()
        while self._tasks():
            await asyncio.wait(self._tasks())
        self.upstreams.close()
        await self.deadlines.close(timeout if self.tunnels else 1.0)
        timer.cancel()
        self._sockets.clear()
        self._clients.clear()

    def _tasks(self) -> "List[asyncio.Future[None]]":
        tasks = [client.task for client in self._clients if client.task is not None]
        return [task for task in tasks if not task.done()]

    def cut(self) -> None:
        """Cut off all requests, tunnels and queued data; `close` then returns soon."""
        for task in self._tasks():
            task.cancel()
        for connection in list(self.deadlines.connections):
            connection.abort()

    async def serve_one(self, client: Connection, head: bytes, gate: Gate) -> bool:
        """Serve a request; `gate` controls access.

        head: the request head if another server has read it, else b"".  Returns whether another
        request may follow.  If not, the connection is closed or tunnelled.
        """
        self._clients[client] = None
        is_read = may_follow = False
        try:
            request = await self._read_request(client, head)
            if request is not None:
                client.state = ACTIVE
                exchange = Exchange(self, gate, client, request)
                try:
                    await exchange.run()
                finally:
                    self._log(exchange)
                if exchange.tunnel is not None:
                    return False
                is_read = exchange.body.finished
                may_follow = exchange.keep_alive and is_read
            if not may_follow:
                await self._linger(client, is_read)
            return may_follow
        except BaseException as error:  # CancelledError, for example
            client.abort()
            if isinstance(error, (PeerGone, Truncated, TimedOut, OSError)):
                return False
            raise
        finally:
            self._clients.pop(client, None)

    def _accepted(self, client: Connection) -> None:
        if not self._make_room():
            error = ProxyError(503, "There are too many connections.", _RETRY_SOON)
            client.write(local_response(error_response(error), keep_alive=False))
            client.close()
        else:
            self._await_request(client)

    def _make_room(self) -> bool:
        """At the limit, make room for one more connection; False if none can be closed."""
        if len(self._clients) + len(self.tunnels) < self.config.max_connections:
            return True
        living = [client for client in self._clients if not client.ended]
        victims = [client for client in living if not client.is_admitted]
        victims += [client for client in living if client.state is IDLE and client.is_quiet()]
        for victim in victims[:1]:
            if victim.state is HANDSHAKE:
                victim.end()
            else:
                victim.abort()
        return bool(victims)

    async def _accept_tls(self, listener: socket.socket, tls: ssl.SSLContext) -> None:
        # asyncio's servers do not report running handshakes.  Here, max_connections includes them.
        loop = self.deadlines.loop
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError:  # the client has left, or there is no file descriptor
                    await asyncio.sleep(_ACCEPT_PAUSE)
                    continue
                if self._make_room():
                    client = Connection(self.deadlines, self._await_request)
                    client.state = HANDSHAKE
                    client.watcher = functools.partial(_hang_up, sock)
                    self._clients[client] = None
                    client.task = loop.create_task(self._shake_hands(client, sock, tls))
                else:
                    sock.close()
                await asyncio.sleep(0)  # yield: ended handshakes then close their sockets
        finally:
            with contextlib.suppress(NotImplementedError):  # on Windows
                loop.remove_reader(listener.fileno())  # Python 3.6 does not remove it

    async def _shake_hands(
        self, client: Connection, sock: socket.socket, tls: ssl.SSLContext
    ) -> None:
        """Do the TLS handshake, except with plain HTTP, which `_read_request` refuses."""
        loop, is_ready, is_plain = self.deadlines.loop, asyncio.Event(), False
        timer = loop.call_later(self.config.head_timeout, client.end)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(sock)
                with contextlib.suppress(NotImplementedError):  # on Windows
                    loop.add_reader(sock.fileno(), is_ready.set)
                    try:
                        await is_ready.wait()
                    finally:
                        loop.remove_reader(sock.fileno())
                    # Plain HTTP begins with a letter, TLS does not.
                    is_plain = sock.recv(1, socket.MSG_PEEK).isalpha()
                stack.pop_all()  # from here on, asyncio closes the socket
            await loop.connect_accepted_socket(lambda: client, sock, ssl=None if is_plain else tls)
        except OSError:
            pass  # the client has left
        finally:
            timer.cancel()
            if client.state is HANDSHAKE:  # it has failed
                self._clients.pop(client, None)
                client.end()  # calls `_hang_up`: in 3.6, only EOF ends a cancelled handshake

    def _await_request(self, client: Connection) -> None:
        """Serve the next request if it has begun, or wait for it; close after EOF."""
        client.task = None
        has_request = _has_request(client)
        if not self.is_running or (client.ended and not has_request):
            self._clients.pop(client, None)
            client.close()
            return
        self._clients[client] = None
        if has_request:
            client.watcher = None
            client.state = READING_HEAD
            client.task = client.deadlines.loop.create_task(self._serve(client))
        else:
            client.state = IDLE
            client.read_deadline = now() + self.config.keep_alive_timeout
            client.watcher = self._await_request

    async def _serve(self, client: Connection) -> None:
        if client.unread and not client.buffer.lstrip(b"\r\n"):  # no pipelined request
            client.buffer += await client.read()
        client.buffer = _EMPTY_LINES.sub(b"", client.buffer, 1)
        if not _has_request(client):
            client.deadlines.set_pending(client, 0)  # empty lines are dropped
        if not _has_request(client) or await self.serve_one(client, b"", self.gate):
            self._await_request(client)

    async def _read_request(self, client: Connection, head: bytes) -> Optional[Request]:
        """The next request; None after the response to an invalid head."""
        timeout = self.config.head_timeout
        try:
            if not head:
                if self.config.certfile and client.scheme == "http":
                    text = "This port speaks HTTPS. Begin the address with https://."
                    raise ProxyError(400, text)
                client.read_deadline = now() + timeout
                head = await read_head(client, True, self.config)
                # All bytes of a client are pending until the gate admits it.
                unused = 0 if client.is_admitted else len(client.buffer) + client.unread
                client.deadlines.set_pending(client, unused)
            if not self.is_running:
                raise ProxyError(503, "The proxy is closing.")
            return parse_request(head, client.address, client.scheme, self.config)
        except ProxyError as refusal:
            error = refusal
        except TimedOut:
            error = ProxyError(408, "The request head did not arrive within %g seconds." % timeout)
        except Truncated:
            error = ProxyError(400, "The request ended in the middle of its head.")
        logger.info("%s -> %d: %s", client.address or "-", error.status, error.detail)
        client.write(local_response(error_response(error), keep_alive=False))
        return None

    async def _linger(self, client: Connection, is_read: bool) -> None:
        """Close the connection, but first read until EOF or `linger_timeout`.

        Closing with unread data would reset the connection, and the client could lose the response
        (RFC 9112 section 9.6).  is_read: the request was read completely.
        """
        client.state = CLOSING
        has_half_close = client.transport.can_write_eof()  # TLS has none
        if has_half_close:
            end_writing(client.transport)
        if has_half_close or not is_read:
            client.read_deadline = now() + self.config.linger_timeout
            with contextlib.suppress(TimedOut):
                # A read that finds data has no deadline: the client may never stop sending.
                while now() < client.read_deadline and await client.read():
                    pass
        client.close()

    def _log(self, exchange: Exchange) -> None:
        """Log a request, at the end of its tunnel if there is one.  The query may hold a secret."""
        if not logger.isEnabledFor(logging.INFO):
            return  # the tunnel would keep the exchange in memory for nothing
        request, tunnel = exchange.request, exchange.tunnel
        if tunnel is not None and tunnel in self.tunnels:
            self.tunnels[tunnel] = functools.partial(self._log, exchange)
            return
        path, mark, _ = request.target.partition("?")
        record = {
            "client": request.client.address or "-",
            "method": request.method,
            "target": path + mark + "..." * bool(mark),
            "app": request.route.authority if request.route else "-",
            "status": exchange.status or "gone",
            "bytes": tunnel.peer.received if tunnel else exchange.sent,
            "bytes_received": tunnel.received if tunnel else exchange.body.count,
            "seconds": round(now() - exchange.started, 3),
        }  # type: Dict[str, Any]
        line = "%(client)s %(method)s %(target)s -> %(app)s %(status)s, %(bytes)d bytes sent,"
        line += " %(bytes_received)d received, %(seconds).3f s"
        if exchange.failure:
            record["error"] = exchange.failure
            line += ": %(error)s"
        logger.info(line, record, extra={"request": record})


# Some clients send a CRLF after a body: skip empty lines before a request (RFC 9112 section 2.2).
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")


def _has_request(client: Connection) -> bool:
    """Whether data is unread, or `buffer` holds more than an empty line or its beginning."""
    return client.unread > 0 or not b"\r\n".startswith(client.buffer)


_UNIX_PREFIX = "unix:"
_ACCEPT_PAUSE = 0.2  # seconds


def _bind_addresses(config: Config) -> List[Any]:
    """The addresses to listen on, as `socket.getaddrinfo` returns them; none for a Unix socket."""
    if config.bind.startswith(_UNIX_PREFIX):
        return []
    host = config.bind or None
    return socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _bind(config: Config) -> List[socket.socket]:
    """Bound sockets for all addresses of the configuration.  Raises OSError or UnicodeError."""
    sockets, port = [], config.port
    with contextlib.ExitStack() as stack:  # closes all if one cannot be bound
        if config.bind.startswith(_UNIX_PREFIX):
            if _UNIX is None:
                raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
            sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            _bind_unix(sockets[0], config.bind[len(_UNIX_PREFIX) :])
        for family, kind, protocol, _, address in dict.fromkeys(_bind_addresses(config)):
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sockets.append(sock)
            if os.name == "posix":  # on Windows it would let another program take the port over
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port) + address[2:])
            port = sock.getsockname()[1]  # if it was 0: one free port for all addresses
        stack.pop_all()
    return sockets


def _bind_unix(sock: socket.socket, path: str) -> None:
    """Bind a socket for its owner alone.  It replaces an unused socket of this user."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(FileNotFoundError):
        client.settimeout(1.0)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            found = os.lstat(path)
            if stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid():
                os.unlink(path)
    sock.bind(path)  # OSError if there still is a file
    os.chmod(path, 0o600)  # nobody can connect yet: the socket does not listen


def _is_private(sock: socket.socket) -> bool:
    name = sock.getsockname()
    if sock.family != _UNIX:
        return ipaddress.ip_address(name[0].partition("%")[0]).is_loopback
    try:
        return not os.stat(name).st_mode & 0o077
    except (OSError, ValueError):  # ValueError: an abstract socket, whose name begins with NUL
        return False


def _hang_up(sock: socket.socket, _: Connection) -> None:
    """End a handshake by EOF, not by `cancel`: an unstarted task would not clean up."""
    with contextlib.suppress(OSError):  # the client has left
        sock.shutdown(socket.SHUT_RDWR)


def server_context(config: Config) -> ssl.SSLContext:
    """The TLS context for clients, from TLS 1.2 on.

    Raises OSError for a file that does not exist, ValueError for one that cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:  # 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    context.set_alpn_protocols(["http/1.1"])
    certfile = config.certfile or ""
    keyfile = config.keyfile or certfile
    files = [certfile, keyfile]
    for path in files + [config.client_ca or certfile]:
        os.stat(path)  # OpenSSL's errors do not name the file

    def ask_phrase() -> str:  # OpenSSL itself does not ask since Python 3.15
        import getpass

        return getpass.getpass("Enter PEM pass phrase:")

    try:
        context.load_cert_chain(certfile, keyfile, ask_phrase)
        if config.client_ca:
            files = [config.client_ca]
            context.load_verify_locations(config.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (EOFError, AttributeError, SystemError):  # there is no terminal
        print(file=sys.stderr)  # ends the line of the prompt
        raise ValueError("the pass phrase of the key in %s was not given" % keyfile)
    except OSError as error:
        text = "%s cannot be used: %s. Expected: a certificate in PEM, its key in the same file or"
        text += " in --keyfile, and the right pass phrase."
        names = " and ".join(dict.fromkeys(map(str, files)))
        raise ValueError(text % (names, error.strerror or error))
    return context


def _normal_upstream(upstream: str) -> str:
    route = None
    with contextlib.suppress(ProxyError):
        route = find_route(Config(base=""), "/" + upstream)[0]
    if route is None or upstream.lower() not in (str(route.port), route.authority):
        raise ValueError("an upstream is PORT or HOST:PORT, not %r" % upstream)
    return upstream.lower()


_NORMALISERS = {  # of texts, or of the members of sequences
    "base": normal_base,
    "host_allowlist": normal_pattern,
    "domains": normal_domain,
    "allow_hostnames": normal_pattern,
    "allow_origins": lambda origin: origin if origin == "*" else normal_origin(origin),
    "trusted_proxies": lambda proxy: (
        proxy if proxy == "unix" else str(ipaddress.ip_network(proxy, False))
    ),
    "upstream_tls": _normal_upstream,
}  # type: Dict[str, Callable[[str], str]]


def checked_config(config: Config) -> Config:
    """`config` in normal form.  Raises ValueError, which names the option, for invalid values.

    For a wrong type or a bad token, the message does not contain the value: it may be a secret.
    """
    for field in Config._fields:
        value = getattr(config, field)  # type: Any
        check_kind(field, value)
        normalise = _NORMALISERS.get(field)
        if normalise is None or callable(value):
            continue
        try:
            value = normalise(value) if isinstance(value, str) else tuple(map(normalise, value))
        except ValueError as error:
            raise ValueError("%s: %s" % (FLAGS[field], error))
        config = config._replace(**{field: value})
    for flag, path in (("--keyfile", config.keyfile), ("--client-ca", config.client_ca)):
        if path and not config.certfile:
            raise ValueError("%s needs --certfile" % flag)
    if not re.fullmatch("[!-~]{16,}|any|", config.token or ""):
        raise ValueError("the token must consist of visible ASCII characters, at least 16")
    if config.hub:  # which shares its origin with the proxy
        return config._replace(domains=(), whole_origin=False)
    if config.whole_origin is None:
        is_whole = config.base in ("", Config().base) and not config.trusted_proxies
        return config._replace(whole_origin=is_whole)
    return config


# --------------------------------------------------------------------------------------------------
# Jupyter extension
# --------------------------------------------------------------------------------------------------
# Inside a running Jupyter server, a Tornado handler serves `<base>/proxy/`.  Jupyter authenticates
# each request; then the handler detaches Tornado's stream for one exchange, and returns it.
# `TornadoTransport` is an asyncio transport on a Tornado stream.  A LentConnection reads only on
# demand, because the bytes of the next request cannot be given back.

_JUPYTER_COOKIES = "username-"  # of signed-in users; Jupyter's public host and port follow
_JUPYTER_TERMS = {  # like COMMAND_LINE_TERMS
    field: "c.PortProxy.%s%s" % (field, " = True" if default is False else "")
    for field, default in DEFAULTS._asdict().items()
}
_JUPYTER_TERMS.update(start="set", value="= ['%s']")


class LentConnection(Connection):
    """A client connection that belongs to Tornado."""

    is_lent = True

    async def read(self) -> bytes:
        if not self.unread:
            self.transport.resume_reading()
        return await super().read()

    def data_received(self, data: bytes) -> None:
        self.transport.pause_reading()
        super().data_received(data)


class TornadoTransport(asyncio.Transport):
    """A transport on a Tornado stream, over TCP or TLS.  It reads after `resume_reading`."""

    def __init__(self, stream: Any, address: Any, connection: Connection) -> None:
        context = getattr(stream.socket, "context", None)
        super().__init__({"socket": stream.socket, "peername": address, "sslcontext": context})
        self._stream = stream
        self._protocol = connection  # type: Any
        self._queued = 0  # bytes that Tornado has not sent yet
        self._reader = None  # type: Optional[asyncio.Task[None]]
        self._is_paused = self._is_closing = False
        stream.set_nodelay(True)  # as asyncio does: small writes are not held back
        stream.set_close_callback(self.resume_reading)  # reads the rest, then `connection_lost`
        connection.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self.resume_reading()

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False
        if self._reader is None or self._reader.done():
            self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        try:
            while not self._is_paused or self._stream.closed():
                await asyncio.sleep(0)  # yield to other connections
                data = await self._stream.read_bytes(_MAX_UNREAD, partial=True)
                if not self._is_closing:
                    self._protocol.data_received(data)
        except OSError:  # StreamClosedError
            self._is_closing = True
            self._protocol.connection_lost(self._stream.error)

    def write(self, data: Union[bytes, bytearray, memoryview]) -> None:
        if not data or self._is_closing or self._stream.closed():  # the close callback follows
            return
        future = self._stream.write(bytes(data))
        if not future.done():
            if not self._queued:
                self._protocol.pause_writing()
            self._queued += len(data)
            future.add_done_callback(lambda _: self._sent(len(data)))

    def _sent(self, count: int) -> None:
        self._queued -= count
        if not self._queued:
            self._protocol.resume_writing()
            if self._is_closing:
                self._stream.close()

    def get_write_buffer_size(self) -> int:
        return self._queued

    def can_write_eof(self) -> bool:
        return False  # Tornado has no half-close

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True
        if not self._queued:
            self._stream.close()

    def abort(self) -> None:
        self._is_closing = True
        self._stream.close()


class JupyterGate(Gate):
    """The gate for one request, which Jupyter has authenticated; handler: of that request."""

    terms = _JUPYTER_TERMS
    no_origin_advice = "A program can send this request with a Jupyter token."
    other_cookies = (_HUB_COOKIES, _JUPYTER_COOKIES)

    def __init__(self, config: Config, handler: Any) -> None:
        super().__init__(config)
        self.handler = handler
        # Before Jupyter Server 2.0, the handler is its own identity provider.
        provider = self.provider = handler.settings.get("identity_provider") or handler
        self.hub_auth = getattr(provider, "hub_auth", None)  # type: Any
        self.sessions_can_end = self.hub_auth is not None and hasattr(provider, "get_user")
        self.tokens = {handler.token} - {""}
        if handler.token_authenticated and not self.hub_auth and hasattr(provider, "get_token"):
            self.tokens.add(provider.get_token(handler))
        get_name = getattr(provider, "get_cookie_name", lambda handler: handler.cookie_name)
        self.cookie_name = get_name(handler)

    async def authorize(self, request: Request) -> None:
        handler = self.handler
        for token in filter(_HUB_TOKEN.fullmatch, all_tokens(request) if self.hub_auth else ()):
            session = self.hub_auth.get_session_id(handler)
            try:
                user = self.hub_auth.user_for_token(token, session_id=session, sync=False)
            except TypeError:  # before JupyterHub 2.4, whose call would block
                break
            if await self._from_hub(user):
                self.tokens.add(token)
        self.redirect_without_token(request, self.response_fields)
        if handler.token_authenticated:  # a foreign page has no token to send
            return
        # Jupyter's settings decide, except for OPTIONS: Jupyter allows all OPTIONS requests.
        has_origin = "origin" in request.headers.index and request.method != "OPTIONS"
        allowed = has_origin and handler.check_origin()
        is_unsafe = request.method not in _SAFE and not handler.settings.get("disable_check_xsrf")
        if is_unsafe and handler.allow_origin in ("", "*"):  # "": allow_origin_pat applies
            # Pages of apps do not send Jupyter's XSRF token: instead, they must be same-origin.
            allowed = allowed and "same-origin" in request.headers.get_all("sec-fetch-site")
        if not allowed:
            self.check_origin(request)

    async def has_access(self, request: Request) -> bool:
        # A new handler: Jupyter caches the user in each.  (The Hub client's cache expires.)
        handler = type(self.handler)(self.handler.application, self.handler.request)
        with contextlib.suppress(ProxyError):  # no response: the next check tries again
            return await self._from_hub(self.provider.get_user(handler)) is not None
        return True

    async def _from_hub(self, response: Awaitable[Any]) -> Any:
        """The response to a call of the Hub's client; ProxyError 503 without one."""
        try:
            return await response
        except asyncio.CancelledError:  # an Exception before Python 3.8
            raise
        except Exception as error:  # of Tornado or of the connection to the Hub
            logger.warning("no valid response from the Hub: %s", type(error).__name__)
            raise ProxyError(503, "The Hub, which checks tokens, does not respond.", _RETRY_SOON)

    def owns_token(self, token: str) -> bool:
        read = re.sub("[\x00-\x08\x0e-\x1f+]", " ", token).strip()  # as Jupyter reads it
        # Not in constant time: Jupyter has authenticated the request.
        return not self.tokens.isdisjoint((token, read))

    def owns_cookie(self, name: str, route: Optional[Route]) -> bool:
        # The app may be a Jupyter server, with a cookie of its own.
        authority = route.authority if route else ""
        is_apps_own = name == _JUPYTER_COOKIES + re.sub("[^A-Za-z0-9]", "-", authority)
        return name == self.cookie_name or (not is_apps_own and super().owns_cookie(name, route))

    def response_fields(self) -> Fields:
        """The cookies that Jupyter sets with this response."""
        cookies = getattr(self.handler, "_new_cookie", {}).values()
        return tuple(("Set-Cookie", cookie.OutputString(None)) for cookie in cookies)

    def strip_cookies(self, value: str, route: Optional[Route]) -> str:
        """Also removes Jupyter's XSRF cookie from the requests of signed-in browsers.

        Every Tornado app may set a cookie of this name.  Jupyter's cookie has the shortest path, so
        it comes last (RFC 6265 section 5.4).
        """
        kept = super().strip_cookies(value, route)
        pairs = kept.split(";")
        names = [cookie_name(pair) for pair in pairs]
        if kept != value and "_xsrf" in names:
            del pairs[len(names) - 1 - names[::-1].index("_xsrf")]
        return ";".join(pairs).lstrip(" \t")


async def _serve_authenticated(handler: Any, server: Any, proxy: "PortProxy") -> None:
    """Serve a request on the handler's stream, and return the stream to Tornado."""
    gate = JupyterGate(proxy.config, handler)
    if handler.is_page_visit:
        handler.xsrf_token  # noqa: B018  reading it sets its cookie
    if not proxy.is_running:  # not started yet: the event loop was not running
        from datetime import datetime, timezone

        async def note_activity() -> None:
            times = server.web_app.settings["last_activity_times"]  # of Jupyter's extensions
            while True:
                await asyncio.sleep(1.0)
                moment = proxy.deadlines.last_activity
                times["port_proxy"] = datetime.fromtimestamp(moment, timezone.utc)

        await proxy.start([])
        if not getattr(server, "sock", ""):  # Jupyter does not listen on a Unix socket
            proxy.upstreams.listening.append(("0.0.0.0", server.port))
        proxy.deadlines.run(note_activity())
    connection = LentConnection(proxy.deadlines)
    address = handler.request.connection.context.address
    stream = handler.detach()
    if stream.closed():  # the client has left
        return
    TornadoTransport(stream, address, connection)  # calls `connection_made`
    if await proxy.serve_one(connection, handler.head, gate) and not stream.closed():
        connection.deadlines.connections.discard(connection)
        stream.set_close_callback(None)
        server.http_server.handle_stream(stream, address)


def _tornado_rule(base: str, server: Any, proxy: "PortProxy") -> Any:
    from jupyter_server.base.handlers import JupyterHandler
    from jupyter_server.utils import ensure_async
    from tornado import web

    @web.stream_request_body
    class PortProxyHandler(JupyterHandler):  # type: ignore[misc]
        is_page_visit = False

        def initialize(self) -> None:
            request = self.request
            lines = ["%s %s %s" % (request.method, request.uri, request.version)]
            lines += ["%s: %s" % field for field in request.headers.get_all()]
            self.head = serialise(lines, NO_BODY)  # restored for our stricter parser
            with contextlib.suppress(ProxyError):  # `serve_one` responds with it
                parsed = parse_request(self.head, "", "http", proxy.config)
                self.is_page_visit = parsed.is_page_visit
            if request.method not in self.SUPPORTED_METHODS:
                request.method = "POST"  # for Jupyter, which treats unsafe methods alike

        def set_default_headers(self) -> None:
            super().set_default_headers()
            # Tornado closes after a response that precedes the request body: announce that.
            self.set_header("Connection", "close")

        def check_xsrf_cookie(self) -> None:
            """Leave forms to the app; the gate checks the origin."""

        def data_received(self, chunk: bytes) -> None:
            """Drop the body of a request that was refused."""

        def get_login_url(self) -> str:
            if not self.is_page_visit:
                raise web.HTTPError(403, "Sign in first.")
            return str(super().get_login_url())

        async def prepare(self) -> None:
            await ensure_async(super().prepare())
            if not self._finished:
                web.authenticated(lambda handler: None)(self)  # Jupyter's `prepare` may skip this
            if self._finished:  # redirected to sign in
                return
            authorizer = self.settings.get("authorizer")
            if authorizer is not None:
                allowed = authorizer.is_authorized(self, self.current_user, "execute", "proxy")
                if not await ensure_async(allowed):
                    raise web.HTTPError(403)
            await _serve_authenticated(self, server, proxy)

    return web.URLSpec(re.escape(base) + "(?:/.*)?", PortProxyHandler)


def _config_value(name: str, value: Any) -> Any:
    """A value of Jupyter's configuration, or the value that its text means for this field."""
    if isinstance(value, str) and name in FLAGS:
        return parsed_value(name, value)
    if type(value).__name__ == "LazyConfigValue":  # after `append`, or if it was only read
        default = getattr(DEFAULTS, name, None)
        return value.get_value(list(default) if isinstance(default, tuple) else default)
    return value


def _jupyter_server_extension_points() -> List[Dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Serve `<base>/proxy/` of a Jupyter server, which calls this for an enabled extension."""
    base = server.base_url.rstrip("/") + "/proxy"
    trusted = ("0.0.0.0/0", "::/0", "unix") if getattr(server, "trust_xheaders", False) else ()
    given = server.config.get("PortProxy", {}).items()
    try:
        fields = {name: _config_value(name, value) for name, value in given}
        config = Config(base=base, trusted_proxies=trusted)._replace(**fields)
        # Jupyter owns the origin.
        proxy = PortProxy(config._replace(domains=(), whole_origin=False))
    except (TypeError, ValueError) as error:
        text = "port_proxy: %s/ is not served, because c.PortProxy is not valid: %s"
        server.log.error(text, base, error)
        return
    # Other extensions' rules come after this one.
    server.web_app.default_router.rules.insert(0, _tornado_rule(base, server, proxy))
    logger.parent = getattr(server.log, "logger", server.log)
    is_debugging = server.log_level in (logging.DEBUG, "DEBUG")  # then Jupyter logs requests
    logger.setLevel(logging.INFO if is_debugging else logging.WARNING)
    other = server.extension_manager.extensions.get("jupyter_server_proxy")
    if getattr(other, "enabled", False):
        text = "port_proxy: jupyter_server_proxy is enabled too; port_proxy serves %s/."
        server.log.warning(text + " The named servers of jupyter_server_proxy still work.", base)
    server.log.info("port_proxy: every port of this machine is at %s/<port>/", base)


# --------------------------------------------------------------------------------------------------
# Port check
# --------------------------------------------------------------------------------------------------
# `--check PORT` examines one app and reports what keeps it from working behind the proxy.  All
# connections go through `Upstreams`, with the checks of real requests.

_PAGE_SECONDS = 30.0  # some apps compile their page for the first request
_MAX_REDIRECTS = 5
_MAX_SCRIPTS = 4  # scripts of a page that are searched
_FOREIGN_HOST = "port-proxy-check.invalid"  # no such host can exist (RFC 6761)
_LINK = re.compile(r"""\b(?:src|href|action)\s{0,9}=\s{0,9}["']?([^\s"'<>?#]{1,2000})""", re.I)
_APP_ADDRESS = r"(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1?\]|%s)(?::|[^\s\"'<>]{0,20}\bport=)%d\b"
# The second is Streamlit's, then come those of Shiny, Jupyter, Next.js and Socket.IO.
_SOCKET_PATHS = (
    "/ws /_stcore/stream /websocket/ /api/events/subscribe /_next/webpack-hmr"
    " /socket.io/?EIO=4&transport=websocket /"
).split()
_HANDSHAKE = _UPGRADE_LINES + [
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
]
# Apps that work behind the proxy: the name, a pattern of the page, and the option that makes the
# app serve below a path, for which %s stands ("" for none).
_KNOWN_APPS = (
    ("Streamlit", "<title>Streamlit</title>", "--server.baseUrlPath %s"),
    ("Voila", "/voila/", "--base_url=%s/"),
    ("Jupyter", "jupyter-config-data|<title>Jupyter", "--ServerApp.base_url=%s/"),
    ("Dask", "<title>Dask", 'http_prefix="%s"'),
    ("Panel or Bokeh", r"bokeh[.a-z-]{0,40}\.js", "--prefix %s"),
    ("Gradio", "gradio_config", 'root_path="%s"'),
    ("Dash", "_dash-config", 'url_base_pathname="%s/"'),
    ("TensorBoard", "tf-tensorboard|<title>TensorBoard", "--path_prefix %s"),
    ("marimo", "<marimo-", "--base-url %s"),
    ("Shiny", r"shiny(?:\.min)?\.js", ""),
    ("Next.js", "/_next/static/", 'basePath: "%s"'),
    ("Vite", "/@vite/client", "--base %s/"),
)


async def check_port(upstream: str, config: Config) -> Any:
    """The report about an upstream; ProxyError if it is not PORT or HOST:PORT."""
    route, deadlines = typed_route(upstream.lower(), config), Deadlines(config)
    own = []  # type: List[Address]
    with contextlib.suppress(OSError, UnicodeError):  # the proxy cannot listen on this address
        own = [address[:2] for *_, address in _bind_addresses(config)]
    check = PortCheck(route, Upstreams(config, deadlines, own))
    try:
        await check.run()
    except ProxyError as error:
        advice = " If an app uses this port, set the proxy's port with --port."
        check.report.problems.append(error.detail + (advice if error.status == 508 else ""))
    finally:
        await deadlines.close(1.0)
    return check.report


class PortCheck:
    """Examines an upstream; `run` completes the report."""

    def __init__(self, route: Route, upstreams: Upstreams) -> None:
        self.route = route
        self.upstreams = upstreams
        self.config = config = upstreams.config
        # The app may obey X-Forwarded-Host, which is the proxy's address.
        own = [*route.app_authorities, "localhost:%d" % config.port]
        self.own_origins = ["%s://%s" % (route.scheme, authority) for authority in own]
        self.path = "/"  # of the page, without its query
        self.absolute_path = "%s/absolute/%s" % (config.base, route.name)
        # "" and None stand for unknown values.
        self.report = types.SimpleNamespace(
            place=route.place,
            host=route.host,
            port=route.port,
            base=config.base,
            ok=False,  # whether the proxy can reach the app
            addresses=[],
            program="",
            owner="",  # of the listening socket
            speaks="",  # "http" or "https"
            status=None,  # of the page
            title="",
            redirect="",  # the target of the last redirect
            app="",  # the name of a known app
            rooted=[],  # the page's first links that begin with a slash
            refuses_host=None,
            refuses_origin=None,
            socket="",  # the first path that opened a WebSocket
            problems=[],  # full sentences, each with advice
            use=[],  # addresses for a browser on this machine, the best first
            flag="",  # the app's option for the absolute form
            kept=self.absolute_path + "/",  # the path of the absolute form
        )

    async def run(self) -> None:
        """ProxyError if the app cannot be reached."""
        route, config, report = self.route, self.config, self.report
        for listener in find_listeners():
            if listener.port == route.port and (route.is_local or route.host in listener.addresses):
                report.addresses, report.program = listener.addresses, listener.program
                report.owner = user_name(listener.user)
        check_route(route, config)
        page = await self._open("/")
        may_be_absolute = page.status == 404 or self.absolute_path.encode() in page.body
        if may_be_absolute and await self._status(self.absolute_path + "/") not in (0, 404):
            page = await self._open(self.absolute_path + "/")
        base_path = "" if path_below(self.absolute_path, self.path) is None else self.absolute_path
        scheme, authority = "https" if config.certfile else "http", "localhost:%d" % config.port
        origin = "%s://%s" % (scheme, authority) if config.port else ""  # 0: not known yet
        report.use.append("%s%s/" % (origin, base_path or route.prefix))
        host = host_form(route.port, ClientInfo("", scheme, authority), config.domains)
        if host and origin and route.host == "localhost" and not base_path:
            report.use.insert(0, host)
        report.ok, report.speaks = True, route.scheme
        report.status, report.title = page.status, title_in(page.headers, page.body)
        await self._examine_links(page.body.decode("latin-1"), base_path)
        status = await self._status(self.path, host=_FOREIGN_HOST)
        report.refuses_host = status >= 400 > page.status
        status = await self._status(self.path, "X-Forwarded-For: 127.0.0.1")
        if status >= 400 > page.status:
            text = "It answers %d to a request that came through a proxy (X-Forwarded-For). Add"
            text += " 127.0.0.1 to the trusted proxies in the app's configuration."
            report.problems.append(text % status)
        if page.headers.get("www-authenticate").lower().startswith("digest"):
            text = "It uses Digest authentication, which signs the path. Use the app's own host,"
            report.problems.append(text + " where no prefix is removed.")
        own, foreign = ("Origin: " + origin for origin in (route.origin, "http://" + _FOREIGN_HOST))
        for path in [base_path + path for path in _SOCKET_PATHS]:
            if await self._status(path, *_HANDSHAKE, own) == 101:
                report.socket = path.partition("?")[0]
                report.refuses_origin = await self._status(path, *_HANDSHAKE, foreign) != 101
                break

    async def _get(self, target: str, *fields: str, host: str = "") -> Response:
        """The response to a request like a browser's; ProxyError if none comes."""
        route = self.route
        lines = [
            "GET %s HTTP/1.1" % target,
            "Host: " + (host or route.authority),
            "X-Forwarded-Host: localhost:%d" % self.config.port,
            "Accept: text/html, */*;q=0.1",
            "User-Agent: port_proxy",
            *fields,
        ]
        timeout = _PROBE_SECONDS if fields or host else _PAGE_SECONDS
        connection = await self.upstreams.connect(route)
        try:
            return await fetch(connection, lines, b"", timeout, self.config)
        except (ProxyError, TimedOut, Truncated, OSError):
            is_first = not (self.report.ok or self.report.redirect)
            if is_first and route.scheme == "http" and await accepts_tls(self.upstreams, route):
                self.report.speaks = "https"
                raise unexpected_tls(route)
            text = "No valid HTTP came from %s within %g seconds. Is it the port of the app?"
            raise ProxyError(502, text % (route.place, timeout))

    async def _status(self, target: str, *fields: str, host: str = "") -> int:
        """The status of a response; 0 if none came."""
        try:
            return (await self._get(target, *fields, host=host)).status
        except ProxyError:
            return 0

    async def _open(self, target: str) -> Response:
        """The page at a path, after the app's redirects to itself; ProxyError if none comes."""
        for _ in range(_MAX_REDIRECTS + 1):
            page, self.path = await self._get(target), target.partition("?")[0]
            location = page.headers.get("location")
            if not location or not 300 <= page.status < 400:
                return page
            origin, target = self._resolve(location)
            is_own = origin in self.own_origins
            self.report.redirect = ("" if is_own else origin) + target.partition("?")[0]
            if not is_own:
                if origin.replace("https", "http", 1) in self.own_origins:
                    self.report.problems.append(
                        "It redirects to https at its own address. Behind the proxy, this is an"
                        " endless loop. Switch the redirect off in the app; or serve HTTPS"
                        " (--certfile), if the app obeys X-Forwarded-Proto."
                    )
                return page
        text = "It redirected %d times in a row and showed no page. A browser, which keeps cookies,"
        self.report.problems.append(text % _MAX_REDIRECTS + " may get a page.")
        return page

    def _resolve(self, reference: str) -> Tuple[str, str]:
        """The origin and the target of a link or a redirect of the page; "" if it is not valid."""
        try:
            url = urlsplit(urljoin(self.route.origin + self.path, reference))
        except ValueError:
            return "", ""
        origin = "%s://%s" % (url.scheme, url.netloc.rpartition("@")[2].lower())
        target = (url.path or "/") + ("?" + url.query if url.query else "")
        return origin, quote(target, "/?%:@!$&'()*+,;=[]~", "latin-1")

    async def _examine_links(self, content: str, base_path: str) -> None:
        """Report links that lose the prefix, a known app, and an address that bypasses the proxy.

        Known apps are not searched for addresses: libraries have defaults such as localhost:5006.
        """
        report = self.report
        links = list(dict.fromkeys(_LINK.findall(content)))
        rooted = [link for link in links if _LOCAL_TARGET.fullmatch(link)]
        rooted = [link for link in rooted if path_below(self.absolute_path, link) is None]
        report.rooted = rooted[:5]
        if rooted and not self.config.whole_origin:
            text = "Its links that begin with a slash lose the prefix, and nothing restores it. Use"
            text += " the app's own host, its option for a base path, or --whole-origin yes."
            report.problems.append(text)
        for name, pattern, flag in _KNOWN_APPS:
            if re.search(pattern, content):
                report.app = name
                report.flag = flag % self.absolute_path if flag and not base_path else ""
                return
        texts = {self.path: content}
        for link in [link for link in links if link.endswith((".js", ".mjs"))][:_MAX_SCRIPTS]:
            origin, target = self._resolve(link)
            if origin in self.own_origins:
                with contextlib.suppress(ProxyError):
                    texts[target] = (await self._get(target)).body.decode("latin-1")
        address = _APP_ADDRESS % (re.escape(self.route.host), self.route.port)
        found = [path for path, text in texts.items() if re.search(address, text)]
        if found:
            report.problems.append(
                "%s contains an address with port %d. This address bypasses the proxy and works"
                " only on this machine. If the app does not work from other machines, set the"
                " address in the app's configuration to a path, such as /api. (For"
                " webpack-dev-server: --client-web-socket-url auto://0.0.0.0:0/ws.)"
                % (found[0], self.route.port)
            )


def report_text(report: Any) -> str:
    lines = [report.place]
    labels = {"rooted": "rooted links", "socket": "websocket"}
    for name, value in vars(report).items():
        if value and name not in ("place", "host", "port", "base", "ok", "flag", "kept"):
            texts = value if isinstance(value, (list, tuple)) else [value]
            texts = ["yes" if text is True else printable(str(text)) for text in texts]
            label = labels.get(name, name).replace("_", " ")
            lines.append("  %-14s %s" % (label, ("\n" + 17 * " ").join(texts)))
    if report.flag:
        lines.append("  %-14s start it with %s and use %s" % ("or", report.flag, report.kept))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
# The arguments, and the environment that a JupyterHub sets, become a Config; `main` then runs the
# proxy until a signal stops it, or checks one port.  Errors and the log go to stderr.

_INTRODUCTION = """\
Makes every port of this machine reachable through one HTTP port.

  {0:44}then open http://localhost:8888/proxy/
  ssh -N -L 8888:localhost:8888 THIS_MACHINE  forwards the port to your own machine
  {1:44}shows how to open port 8080
"""
_STRAY_VALUE = (
    "a value needs its option, such as --port N, --check N or --token-file FILE. To open the app on"
    " port N, start the proxy and go to http://localhost:8888/proxy/N/"
)
Arguments = Dict[str, List[str]]  # by flag that is given: its values; "yes" for a switch


def _parser(with_limits: bool) -> argparse.ArgumentParser:
    command = own_command()
    parser = argparse.ArgumentParser(
        prog=command,
        usage="%(prog)s [options]",
        description=_INTRODUCTION.format(command, command + " --check 8080"),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30, width=100
        ),
        argument_default=argparse.SUPPRESS,  # only options that are given are in the result
        add_help=False,
        allow_abbrev=False,
    )
    defaults = {flag: getattr(DEFAULTS, field) for field, flag in FLAGS.items()}
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, metavar, text in rows:
            default = defaults.get(flag)
            if isinstance(default, tuple):
                text += " (repeatable)"
            elif metavar and default is not None:
                text += " (default: %s)" % default
            if title == "limits and timeouts" and not with_limits:
                text = argparse.SUPPRESS
            kind, word = ("append", None) if metavar else ("append_const", "yes")
            group.add_argument(flag, dest=flag, metavar=metavar, help=text, action=kind, const=word)
    group = parser.add_argument_group("help")
    version = "port_proxy " + __version__
    group.add_argument("--version", action="version", version=version, help="print the version")
    group.add_argument("-h", "--help", action="help", help="show the options")
    group.add_argument("--help-all", action="help", help="show the limits and timeouts, too")
    return parser


def _parse(argv: Sequence[str]) -> Arguments:
    """The arguments.  Exits with status 2 for mistakes, and suggests the right form."""
    parser = _parser("--help-all" in argv)
    argv = [re.sub("^--token=.*", "TOKEN", word) for word in argv]  # not printed in errors
    parsed, unknown = parser.parse_known_args(argv)
    arguments = vars(parsed)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):  # not printed, because it may be a token
            parser.error(_STRAY_VALUE)
        import difflib  # here, because it takes memory

        similar = difflib.get_close_matches(flag, METAVARS, 1)
        hint = "did you mean %s?" % similar[0] if similar else "see --help"
        parser.error("there is no option %s; %s" % (flag, hint))
    for flags in (("--token", "--token-file", "--no-token"), ("--verbose", "--quiet")):
        given = [flag for flag in flags if flag in arguments]
        if len(given) > 1:
            parser.error("%s is not allowed with %s" % (given[1], given[0]))
    if "--json" in arguments and "--check" not in arguments:
        parser.error("--json prints what --check finds: type --check PORT --json")
    return arguments


def _config(arguments: Arguments) -> Config:
    """The configuration from arguments and environment.  Raises ValueError or OSError."""
    fields = {}  # type: Dict[str, Any]
    for field, default in DEFAULTS._asdict().items():
        given = arguments.get(FLAGS[field])
        if given and isinstance(default, tuple):
            fields[field] = default + parsed_value(field, ",".join(given))
        elif given:
            fields[field] = parsed_value(field, given[-1])
    fields["token"] = _token(arguments)
    # A terminal in a Hub's server has the same environment.  A user who starts a proxy there must
    # set --port or --bind.
    if "JUPYTERHUB_SERVICE_URL" in os.environ and not {"--port", "--bind"} & arguments.keys():
        return _config_under_hub(Config(**fields), arguments, os.environ)
    return Config(**fields)


def _token(arguments: Arguments) -> Optional[str]:
    """The value of Config.token.  Removes PORT_PROXY_TOKEN from the environment."""
    token = os.environ.pop("PORT_PROXY_TOKEN", "")
    if "--no-token" in arguments:
        return ""
    if "--token-file" in arguments:
        path = arguments["--token-file"][-1]
        # latin-1 can decode every file; `checked_config` then refuses characters outside of ASCII.
        with open(path, encoding="latin-1") as file:
            token = file.read().strip()
        if not token:
            raise ValueError("there is no token in %s" % path)
    return token or (ANY_TOKEN if "--token" in arguments else None)


async def _run(config: Config, argv: Sequence[str], is_quiet: bool) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP.  A second signal cancels running requests."""
    loop, stop = asyncio.get_event_loop(), asyncio.Event()
    try:
        sockets = _inherited_sockets()
        if sockets:  # the banner names the address of the first one
            name = sockets[0].getsockname()
            # The name of an abstract Unix socket begins with NUL, which people write as "@".
            path = "" if isinstance(name, tuple) else os.fsdecode(name).replace("\0", "@")
            config = config._replace(bind=_UNIX_PREFIX + path if path else name[0])
        proxy = await PortProxy(config).start(sockets or None)
    except (OSError, ValueError) as error:
        return _failed(error, config, argv)

    def interrupt() -> None:
        if stop.is_set():
            proxy.cut()
        stop.set()

    # nohup ignores SIGHUP, which Windows does not have.
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(
                number, lambda *_: loop.is_closed() or loop.call_soon_threadsafe(interrupt)
            )
    has_new_token = proxy.token != (config.token or "")  # it must be printed, even with --quiet
    if not is_quiet or has_new_token:
        _say(_banner(proxy, has_new_token))
    if config.token == "" and not proxy.is_private and not config.hub:
        text = "port_proxy: no token is required (--no-token): all clients of %s can use every port"
        _say(text % (config.bind or "this machine"), is_error=True)
    await stop.wait()
    count = proxy.active_requests
    if count and not is_quiet:
        text = "waiting up to %g seconds for running requests (%d), Ctrl-C ends them now"
        _say("port_proxy: " + text % (config.shutdown_timeout, count))
    await proxy.close()
    return 0


def _inherited_sockets() -> List[socket.socket]:
    """The sockets that systemd passed to this process (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = []
    for number in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=number)
        # The real family.  Python 3.6 does not find it, and 3.7 names it in an error like a file.
        family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
        sockets.append(socket.socket(family, socket.SOCK_STREAM, 0, fileno=sock.detach()))
    return sockets


def _failed(error: Exception, config: Config, argv: Sequence[str]) -> int:
    """Report an error of the user or of the start; returns the exit status."""
    reason, file = getattr(error, "strerror", None) or error, getattr(error, "filename", None)
    is_unix = config.bind.startswith(_UNIX_PREFIX)
    place = config.bind or "this machine"
    where = place if is_unix else "port %d of %s" % (config.port, place)
    if not isinstance(error, (OSError, UnicodeError)):
        text = str(error)
    elif file is not None:
        text = "cannot read %s: %s" % (file, reason)
    elif getattr(error, "errno", None) == errno.EADDRINUSE and not is_unix:
        import shlex

        command = " ".join([own_command()] + list(map(shlex.quote, argv)))
        command = re.sub(r" --port[ =][0-9]+", "", command)
        text = "%s is in use by %s. To take a free port, type:\n  %s --port 0"
        text %= where, _holder(config.port), command
    else:  # the IDNA codec raises UnicodeError, a ValueError, for a name that is not valid
        text = "cannot listen on %s: %s; choose another --bind or --port" % (where, reason)
    _say("port_proxy: " + text, is_error=True)
    return 2


def _holder(port: int) -> str:
    for listener in find_listeners():
        if listener.port == port and listener.program:
            return "%s (process %d)" % (printable(listener.program), listener.pid)
        if listener.port == port:
            return "a program of " + user_name(listener.user)
    return "another program"


def _banner(proxy: PortProxy, has_new_token: bool) -> str:
    config, url, name = proxy.config, proxy.url, "port_proxy %s:" % __version__
    if config.hub:
        text = "%s reaches every port of this machine as %s/<port>/, for %s"
        return text % (name, config.base, config.hub.user or "users with access at the Hub")
    start, remote = name + " open ", _ssh_destination()
    port, destination = proxy.port, "localhost:%d" % proxy.port
    if config.bind.startswith(_UNIX_PREFIX + "@"):  # ssh cannot forward to an abstract socket
        start, remote = "%s connect to %s and open " % (name, config.bind), ""
    elif config.bind.startswith(_UNIX_PREFIX):
        port, destination = 8888, os.path.abspath(config.bind[len(_UNIX_PREFIX) :])
        remote = remote or socket.gethostname()
    elif config.bind not in LOOPBACK_NAMES + ("", "0.0.0.0", "::"):
        destination = authority_of(config.bind, port)
    if remote:  # ssh -L forwards it to localhost
        url = urlsplit(url)._replace(netloc="localhost:%d" % port).geturl()
        start = "%s on your own machine, run  ssh -N -L %d:%s %s\nand open "
        start %= name, port, destination, remote
    scheme, authority = urlsplit(url)[:2]
    own = host_form(8080, ClientInfo("", scheme, authority), config.domains)
    own = own and " or " + own.replace("8080", "<port>", 1)
    lines = [start + url + ("?token=" + proxy.token if has_new_token else "")]
    lines.append("It reaches every port of this machine as %s<port>/%s" % (url, own))
    if proxy.token and not has_new_token:
        lines.append("It requires the token that you set.")
    return "\n".join(lines)


def _ssh_destination() -> str:
    """The arguments of ssh for this machine; "" outside an SSH session (ssh(1))."""
    words = os.environ.get("SSH_CONNECTION", "").split(" ")
    if len(words) != 4:
        return ""
    address, port = words[2:]
    user = os.environ.get("LOGNAME") or os.environ.get("USERNAME", "")
    return ("" if port == "22" else "-p %s " % port) + (user and user + "@") + address


def _say(text: str, is_error: bool = False) -> None:
    """Print on stdout; on stderr for an error, or if stdout fails.

    A stream fails if it is closed, a broken pipe, or a file on a full disk.  Characters that the
    stream cannot encode are escaped.
    """
    streams = [sys.stderr] if is_error else [sys.stdout, sys.stderr]
    for stream in filter(None, streams):  # None: it was closed when Python started
        coding = stream.encoding or "ascii"
        with contextlib.suppress(OSError):
            encoded = text.encode(coding, "backslashreplace").decode(coding)
            print(encoded, file=stream, flush=True)
            return
        # Python flushes the stream at exit: /dev/null accepts its unwritten text.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout:
            sys.stdout = None


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        data = {"time": "%s.%03dZ" % (moment, record.msecs), "level": record.levelname.lower()}
        data.update(getattr(record, "request", None) or {"message": record.getMessage()})
        return json.dumps(data)


class _LoopErrors:
    """Logs errors of the event loop, at most one line in ten seconds."""

    silent_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: Dict[str, Any]) -> None:
        if loop.time() >= self.silent_until:
            self.silent_until = loop.time() + 10
            logger.warning("%s: %s", context.get("message"), context.get("exception", ""))


def _raise_descriptor_limit(config: Config) -> Config:
    """Raise the limit of file descriptors, and adapt the limits of connections to it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return config
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in limits)
    if soft < 65536:
        soft = min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    most = max(8, (soft - 32) // 2)  # a client may need an upstream connection, too
    return config._replace(
        max_connections=min(config.max_connections, most),
        max_tunnels=min(config.max_tunnels, most * 3 // 4),
        max_idle_upstreams=min(config.max_idle_upstreams, most // 4),
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; `argv` is sys.argv[1:] by default.

    Returns the exit status: 0 after a signal, or if the checked port can be reached; 1 if it
    cannot, 130 if Ctrl-C ends the check; 2 for a mistake, or if the proxy cannot listen.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(argv)
    try:
        config = checked_config(_config(arguments))
        checked = [_normal_upstream(upstream) for upstream in arguments.get("--check", ())]
    except (OSError, ValueError) as error:
        return _failed(error, DEFAULTS, argv)
    handler = logging.StreamHandler()
    formatter = _JsonFormatter if "--log-json" in arguments else logging.Formatter
    handler.setFormatter(formatter("%(asctime)s %(message)s"))
    is_quiet, is_detailed = "--quiet" in arguments, {"--verbose", "--log-json"} & arguments.keys()
    level = logging.ERROR if is_quiet else logging.INFO if is_detailed else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    config = _raise_descriptor_limit(config)
    # Freeing this block makes glibc keep freed blocks of up to its size.  Otherwise, glibc returns
    # those of 128 KiB and more to the kernel after each read (mallopt(3), M_MMAP_THRESHOLD).
    bytes(16 << 20)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_LoopErrors())
    try:
        if not checked:
            return loop.run_until_complete(_run(config, argv, is_quiet))
        report = loop.run_until_complete(check_port(checked[-1], config))
        has_json = "--json" in arguments
        _say(json.dumps(vars(report), indent=1) if has_json else report_text(report))
        return 0 if report.ok else 1
    except KeyboardInterrupt:
        return 130 if checked else 0
    finally:
        loop.close()


if __name__ == "__main__":
    sys.exit(main())
