"""What a failed request to a store means: the object is missing or denied, the request is wrong, or it may pass.

Messages are made here and repeat nothing of the answer but its number and its code: requests hold credentials.
"""

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterator

from wan_data.storage.location import StorePath

PATIENCE_VARIABLE = "WAN_DATA_STORE_PATIENCE"
_DEFAULT_PATIENCE = 120.0
# Failures after which it is said that a store is waited for, and the time until it is said again, by whatever request.
_QUIET_SECONDS = 10.0
_SAID_EVERY_SECONDS = 30.0
# Requests that may succeed later, beside those that the server failed at (5xx).
_PASSING = {408, 409, 425, 429}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
    "InvalidOperation",  # of google.auth: a request without credentials was refused
}


class StoreUnavailableError(OSError):
    """A store fails, or answers no request, and went on doing so; this is the store's state and not the object's."""


class UnusableCredentialsError(PermissionError):
    """The store takes no request with these credentials, of whatever object: they are missing, wrong or expired."""


class ChangedObjectError(OSError):
    """An object was replaced while it was read."""


class LocalCopyError(OSError):
    """This machine does not take a copy of an object; nothing is known of the object."""


class UnusableStoreError(ValueError):
    """No request can be made: a package or a profile is missing, or the bucket is elsewhere.

    The message is a sentence for users.
    """


# Answers to credentials, whatever they ask for.
_REFUSED_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# Of this machine, where the copy is written.
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE}


def patience() -> float:
    """Seconds for which a failing store is asked again.

    Raises:
        ValueError: the variable is no number of seconds.
    """
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        seconds = float(text) if text else _DEFAULT_PATIENCE
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ValueError(f"{PATIENCE_VARIABLE} is {text!r}; expected a number of seconds")
    return seconds


def final_error(error: BaseException, path: StorePath, doing: str) -> Exception | None:
    """The error of a request that will not succeed later; None if it may.

    Args:
        error: of multi-storage-client.
        path: the object, or the folder.
        doing: what was tried, such as ``reading``.
    """
    if isinstance(error, ChangedObjectError | LocalCopyError | UnusableCredentialsError | UnusableStoreError):
        return error
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in _LOCAL:
            return OSError(one.errno, os.strerror(one.errno), one.filename)
    status, code = _answer(error)
    names = {type(one).__name__ for one in _chain(error)}
    if names & _NO_CREDENTIALS:
        return UnusableCredentialsError(
            errno.EACCES,
            f"no credentials for {path.root} were found ({', '.join(sorted(names & _NO_CREDENTIALS))}); set those of "
            "the store in the environment, in its configuration file or in the profile",
            str(path),
        )
    if status == 301:
        return UnusableStoreError(
            f"{path.root} is not where it was asked for ({_said(status, code)}); set the region and the endpoint of "
            "the bucket in the environment, in the configuration file of the store or in the profile"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        # The list of a folder that is not there is empty.
        no_bucket = code == "NoSuchBucket" or doing == "listing"
        what = "there is no such bucket" if no_bucket else "it does not exist"
        return FileNotFoundError(errno.ENOENT, what, str(path))
    refused = refuses_credentials(error)
    if refused or isinstance(error, PermissionError) or status == 403:
        why = f" ({code})" if code else ""
        return (UnusableCredentialsError if refused else PermissionError)(
            errno.EACCES, f"{doing} was denied{why}; check the credentials and what they allow", str(path)
        )
    if status is not None and 400 <= status < 500 and status not in _PASSING:
        return OSError(errno.EIO, f"{doing} failed: the store answered {_said(status, code)}", str(path))
    return None


def refuses_credentials(error: BaseException) -> bool:
    """Whether an answer refuses the credentials, whatever object they are for."""
    status, code = _answer(error)
    return code in _REFUSED_CREDENTIALS or status == 401


def has_no_reason(error: BaseException) -> bool:
    """Whether a request was refused by an answer without a code, as one without a body is."""
    status, code = _answer(error)
    return status in (400, 403) and code is None


def is_of_the_object(error: OSError) -> bool:
    """Whether an error of a request is that of its object alone, so that others may be read all the same."""
    others = StoreUnavailableError | UnusableCredentialsError | LocalCopyError
    return not (isinstance(error, others) or error.errno in _LOCAL)


def unavailable(error: BaseException, path: StorePath, doing: str, seconds: float, attempts: int) -> OSError:
    """The error of a store that has failed for too long."""
    return StoreUnavailableError(
        errno.EIO,
        f"{doing} failed {attempts} times in {seconds:.0f} s: {_answer_said(error)}; run the same command again when "
        f"the store answers ({PATIENCE_VARIABLE} is the number of seconds that are waited for it)",
        str(path),
    )


class _Waiting:
    """Says in the log that a store is waited for, once in a while for all threads."""

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), 0.0

    def say(self, error: BaseException, path: StorePath, doing: str, seconds: float) -> None:
        """Say it if it is time.

        Args:
            error, path, doing: see ``final_error``.
            seconds: for which the request has failed so far.
        """
        with self._lock:
            now = time.monotonic()
            if seconds < _QUIET_SECONDS or now < self._next:
                return
            self._next = now + _SAID_EVERY_SECONDS
        logging.getLogger(__name__).warning(
            "%s: %s has failed for %.0f s: %s; it is tried for %g s (%s)",
            *(path, doing, seconds, _answer_said(error), patience(), PATIENCE_VARIABLE),
        )


waiting = _Waiting()


def _answer_said(error: BaseException) -> str:
    status, code = _answer(error)
    return f"it answered {_said(status, code)}" if status else f"no whole answer came ({_cause(error)})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> str:
    """The first error of a chain, by the name of its type: it says most."""
    return type([*_chain(error)][-1]).__name__


def _said(status: int, code: str | None) -> str:
    return f"{status} ({code})" if code else f"{status}"


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """The number and the code of the answer that an error is of."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # of botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = response.get("Error", {}).get("Code")
            if isinstance(status, int):
                return status, code if isinstance(code, str) and re.fullmatch(r"[A-Za-z.]{1,60}", code) else None
        if isinstance(status := getattr(response, "status_code", None), int) and status >= 400:
            return status, None  # of Google's transfers in parts
        if isinstance(code := getattr(one, "code", None), int) and not isinstance(code, bool):  # of google.api_core
            return int(code), None
        # Of multi-storage-client, from an answer of 200 that says of each object whether it was deleted.
        if re.search(r"DeleteObjects reported errors: .*: AccessDenied\b", str(one), re.DOTALL):
            return 403, "AccessDenied"
    # multi-storage-client leaves the answer of a missing object out of the chain.
    found = re.search(r"status_code: (\d{3})\b", str(error))
    return (int(found[1]) if found else None), None
