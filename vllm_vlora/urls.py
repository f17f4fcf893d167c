"""Folders at URLs (``s3://``, ``gs://``, ``abfs://``, ``https://``, ...), read through fsspec.

fsspec has the file systems, and their packages the credentials: environment variables, files in the home
folder, ``~/.config/fsspec``. Nothing of what fails is quoted, since it may hold a signed URL or a token:
a ``RemoteError`` has words of its own, and is raised without the error that caused it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from vllm_vlora.connections import why_unreachable
from vllm_vlora.wording import without_secrets

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LOCAL = re.compile(r"(?:file|local)://", re.IGNORECASE)
_HTTP = ("http", "https")
# Their packages take what stands before an @ for a part of the bucket's name.
_BUCKETS = ("s3", "s3a", "gs", "gcs")
# Our extra that brings the package of a scheme.
_EXTRAS = {
    **dict.fromkeys(_HTTP, "http"),
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "azure"),
}
_CHUNK = 8 << 20
# What file systems say of a file that changes with its content, each in a spelling of its own
# (``_is_identity``); not when it was listed, or last read.
_IDENTITY = frozenset({
    "etag", "contentmd5", "md5hash", "md5checksum", "md5", "digest", "checksum", "contenthash", "crc32c",
    "generation", "versionid", "lastmodified", "lastmodifieddatetime", "updated", "uploadedat", "mtime",
    "modified", "modify", "modifiedtime", "modifiedat", "modificationtime", "lastwritetime", "created",
    "blobid", "xethash", "sha", "hex",
})  # fmt: skip
_SHA256 = re.compile("[0-9a-f]{64}")
# Answers that say nothing of what was asked for: it may be had a moment later.
_LATER = (408, 425, 429)


class RemoteError(Exception):
    """Why something at a URL cannot be had, in one line.

    Attributes:
        missing: it is not there. denied: it may not be read; stores say so too of what is not there,
        to who may not list. reached: there was an answer, and asking again would get the same.
    """

    def __init__(
        self, why: str, *, missing: bool = False, denied: bool = False, reached: bool = True
    ) -> None:
        super().__init__(why)
        self.missing = missing
        self.denied = denied
        self.reached = reached


@dataclass(frozen=True)
class RemoteFile:
    """One file below a URL.

    Attributes:
        name: below the folder, with ``/`` between its parts.
        sha256: of its content, in hex, where a manifest or the store says it, to be checked; otherwise
        empty. token: what the file system tells its content from others by; empty where nothing does.
    """

    name: str
    nbytes: int
    sha256: str = ""
    token: str = ""

    @property
    def is_known(self) -> bool:
        """Whether anything tells its content from another one of this name and size."""
        return bool(self.sha256 or self.token)

    @property
    def key(self) -> str:
        """The name of its content, 64 hex digits; where it is not known, for while it comes alone."""
        return (
            self.sha256
            or hashlib.sha256(repr((self.name, self.nbytes, self.token)).encode()).hexdigest()
        )


def is_url(ref: str) -> bool:
    """Whether a reference is a URL, of whatever kind, ``file://`` too."""
    return _URL.match(ref) is not None


def is_remote(ref: str | Path) -> bool:
    """Whether a reference is a URL, and neither a path nor a Hub id nor a local folder's URL."""
    return isinstance(ref, str) and is_url(ref) and not _LOCAL.match(ref)


def local_folder(ref: str | Path) -> Path | None:
    """The folder that ``file://`` names, which is read where it lies; None for any other reference.

    Examples:
        >>> str(local_folder("file:///models/my%20tasks"))
        '/models/my tasks'
    """
    if not isinstance(ref, str) or not _LOCAL.match(ref):
        return None
    return Path(unquote(ref.partition("://")[2]) or "/")


def url_name(url: str) -> str:
    """The last part of a URL's path.

    Examples:
        >>> url_name("https://host/models/my%20tasks/?sig=secret")
        'my tasks'
    """
    path = re.split(r"[?#]", url.partition("://")[2])[0].rstrip("/")
    return unquote(path.rpartition("/")[2].rpartition("@")[2])


def is_inner(name: str) -> bool:
    """Whether a name with ``/`` between its parts stays inside the folder that it is of."""
    parts = PurePosixPath(name).parts
    absolute = PurePosixPath(name).is_absolute()
    return (
        bool(parts)
        and not absolute
        and ".." not in parts
        and "\\" not in name
        and name.isprintable()
    )


class RemoteFolder:
    """What lies below a URL.

    Raises:
        RemoteError: no such kind of URL, or the package that reads it is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec.core

        if "::" in url:
            raise RemoteError("a chain of file systems (with ::) is no folder; give one URL")
        scheme = url.partition("://")[0].lower()
        _check_address(url, scheme)
        self._query, self._is_http = "", scheme in _HTTP
        self._answers: list[Any] = []
        options = {}
        if self._is_http:
            # A signature for a whole container stands behind every file's path, as it was signed.
            url, mark, query = url.partition("#")[0].partition("?")
            self._query, options = mark + query, {"encoded": True}
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as problem:
            raise RemoteError(_not_installed(scheme, _line(problem))) from None
        except Exception as problem:  # noqa: BLE001
            raise RemoteError(
                f"{scheme}:// cannot be opened ({type(problem).__name__}); check the URL"
            ) from None
        self._root = root.rstrip("/")
        # What an earlier look has listed may be another content now.
        self._fs.invalidate_cache()

    def read(self, name: str, most: int) -> bytes:
        """A file whole.

        Raises:
            RemoteError: it cannot be had, or has more than ``most`` bytes.
        """
        with _explained(name):
            data = b"".join(self._streamed(name, 0, most + 1))
        if len(data) > most:
            raise RemoteError(f"{name} has more than the {most} bytes that it may have")
        return data

    def stream(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, in pieces; at most as many as it is to have.

        Raises:
            RemoteError: it cannot be had.
        """
        with _explained(file.name):
            yield from self._streamed(file.name, start, file.nbytes)

    def close(self) -> None:
        """End what is being read in other threads, where they may wait for bytes that never come."""
        for answer in list(self._answers):
            answer.close()

    @contextmanager
    def _noted(self, answer: Any) -> Iterator[None]:
        self._answers.append(answer)
        try:
            yield
        finally:
            self._answers.remove(answer)

    def files(self, patterns: Iterable[str], required: str | None = None) -> list[RemoteFile]:
        """The files whose names fit one of these patterns.

        Where ``required`` is no file of the folder itself, what fits in any folder below counts. Over
        HTTP nothing can be listed: there it is those of the patterns that are names, and ``required``
        must be there.

        Raises:
            RemoteError: nothing can be listed, or what is required is not there.
        """
        if self._is_http:
            if required is None:
                raise RemoteError(
                    "over HTTP files cannot be listed; copy the folder to this machine, and name that"
                )
            self.read(required, _CHUNK)
            asked = {name: self._described(name) for name in patterns if "*" not in name}
            found = {name: info for name, info in asked.items() if info is not None}
        else:
            found = self._listed()
            whole = required is None or required in found
            found = {n: i for n, i in found.items() if any(_fits(n, p, whole) for p in patterns)}
        return [_file(name, info) for name, info in sorted(found.items()) if is_inner(name)]

    def _listed(self) -> dict[str, Mapping[str, Any]]:
        with _explained("the folder"):
            listed = self._fs.find(self._root, detail=True)
        return {path[len(self._root) :].lstrip("/"): info for path, info in listed.items()}

    def _described(self, name: str) -> Mapping[str, Any] | None:
        """What a web server says of a file; None where it has none."""
        try:
            with _explained(name):
                try:
                    return self._fs.info(self._path(name))
                except FileNotFoundError as problem:
                    # fsspec says so of whatever kept it from an answer, a server that is busy too.
                    raise _in_words(name, problem.__cause__ or problem) from None
        except RemoteError as problem:
            if not problem.missing and not problem.denied:
                raise
            return None

    def _path(self, name: str) -> str:
        return (
            f"{self._root}/{quote(name)}{self._query}" if self._is_http else f"{self._root}/{name}"
        )

    def _streamed(self, name: str, start: int, end: int) -> Iterator[bytes]:
        if self._is_http:
            yield from self._answered(name, start, end)
            return
        while start < end:
            data = self._piece(self._path(name), start, min(start + _CHUNK, end))
            if not data:
                return
            yield data
            start += len(data)

    def _piece(self, path: str, start: int, end: int) -> bytes:
        """What there is of these bytes: stores refuse a range behind a file's end, each in its words."""
        try:
            return self._fs.cat_file(path, start=start, end=end)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:
            # Whatever it was, nothing is lost by it where the file, asked anew and not as it was listed,
            # ends here; elsewhere it is raised.
            self._fs.invalidate_cache()
            size = self._fs.size(path)
            if size is None or size > start:
                raise
            return b""

    def _answered(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """One request, whatever the length; fsspec's own way is one for every block, and one before."""
        headers = {**self._fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        opened = self._fs.open(self._path(name), block_size=0, size=1, headers=headers)
        with closing(opened) as answer, self._noted(answer):
            # A server without ranges sends all of it.
            skip = start if answer.r.status == 200 else 0
            left = end - start
            while left > 0 and (data := answer.read(_CHUNK)):
                data, skip = data[skip:], max(0, skip - len(data))
                if data:
                    yield data[:left]
                    left -= len(data)


def _not_installed(scheme: str, why: str) -> str:
    extra = _EXTRAS.get(scheme)
    advice = f": pip install 'vllm-vlora[{extra}]'" if extra else ""
    return f"{scheme}:// needs a package that is not installed ({why}){advice}"


def _check_address(url: str, scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        pass  # The package that reads it is named when it is opened.
    except ValueError:
        raise RemoteError(
            f"nothing reads {scheme}:// (fsspec does not know it); use s3://, gs://, abfs:// or https://"
        ) from None
    behind = url.partition("://")[2]
    if scheme in _BUCKETS and "@" in behind.partition("/")[0]:
        raise RemoteError(
            f"{scheme}:// takes no keys in the URL; give them in the environment or the files that its "
            "package reads"
        )
    # Other stores may have a default host, as hdfs:///models.
    if not behind.strip("/") or (scheme in _HTTP and behind.startswith(("/", "?", "#"))):
        raise RemoteError(f"the URL names nothing behind {scheme}://; give it whole")


def _fits(name: str, pattern: str, whole: bool) -> bool:
    """Whether a name, or else its last parts, is as a glob pattern says."""
    parts, depth = name.split("/"), len(pattern.split("/"))
    tail = "/".join(parts if whole else parts[-depth:])
    return pattern == "*" or (tail.count("/") == depth - 1 and fnmatchcase(tail, pattern))


def _file(name: str, info: Mapping[str, Any]) -> RemoteFile:
    if info.get("size") is None:
        raise RemoteError(
            f"nothing says how many bytes {name} has (over HTTP it is Content-Length); have the server "
            "say it, or copy the folder to this machine, and name that"
        )
    return RemoteFile(name, int(info["size"]), _sha256(info), _token(info))


def _sha256(info: Mapping[str, Any]) -> str:
    """Of a file in Git LFS, as the Hub's file system has it."""
    lfs = info.get("lfs")
    said = str(lfs.get("sha256")) if isinstance(lfs, Mapping) else ""
    return said if _SHA256.fullmatch(said) else ""


def _token(info: Mapping[str, Any]) -> str:
    said = sorted((key, str(value)) for key, value in info.items() if value and _is_identity(key))
    return repr(said) if said else ""


def _is_identity(key: str) -> bool:
    return re.sub("[_-]", "", key).lower() in _IDENTITY


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever a file system raises becomes a RemoteError without it."""
    try:
        yield
    except (RemoteError, GeneratorExit):
        raise
    # Every file system has errors of its own, and those of its transport.
    except Exception as problem:  # noqa: BLE001
        raise _in_words(name, problem) from None


def _in_words(name: str, problem: BaseException) -> RemoteError:
    status = next(
        (n for key in ("status", "code") if isinstance(n := getattr(problem, key, None), int)), None
    )
    if isinstance(problem, FileNotFoundError) or status in (404, 410):
        return RemoteError(f"{name} is not there", missing=True)
    if isinstance(problem, PermissionError) or status in (401, 403):
        said = "" if status is None else f" ({status})"
        return RemoteError(
            f"access to {name} is denied{said}; check the credentials, or whether a signed URL has "
            "expired",
            # Who is not known (401) is not told that something is not there.
            denied=status != 401,
        )
    if status is not None:
        reached = status < 500 and status not in _LATER
        return RemoteError(f"{name}: the server answers with {status}", reached=reached)
    if "Credential" in type(problem).__name__:
        return RemoteError(
            f"{name}: there are no credentials ({type(problem).__name__}); give them in the environment "
            "or the files that the store's package reads"
        )
    why = why_unreachable(problem)
    check = "the network and the URL"
    if why is None:
        why, check = type(problem).__name__, "the network, the URL and the store's settings"
    return RemoteError(f"{name} cannot be reached ({why}); check {check}", reached=False)


def _line(problem: Exception) -> str:
    return without_secrets(" ".join(str(problem).split()))
