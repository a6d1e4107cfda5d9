"""How requests fail."""

from alpenglow.posterior import Posterior


class SamplingError(RuntimeError):
    """A request that failed; `partial` holds what its finished populations gave, None where none was.

    out_of_memory: whether memory ran out.
    """

    partial: Posterior | None = None
    out_of_memory: bool = False


def caused(where: str, error: BaseException, note: str = "") -> SamplingError:
    """The error of a request to which `error` happened; where: the request, and what it did."""
    failure = SamplingError(f"{where}: {str(error) or type(error).__name__}{note}")
    failure.__cause__ = error
    return failure


class RequestTimeoutError(SamplingError, TimeoutError):
    """A request that its timeout ended."""


class CheckpointError(ValueError):
    """Finished chains on disk that are of another request, or damaged."""
