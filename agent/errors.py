"""Every error that ckpt-agent raises on purpose: one tree, named for the condition.

Promises: each class has a stable ``code`` (metric label, JSON error, gRPC detail), an
``exit_status`` of the CLI, whether trying again without changing anything can help
(``retryable``), and each instance carries a ``hint``, the way out. Foreign errors are chained
(``raise ... from exc``) at the door where they are understood.
Does not: carry memory contents, environments, command lines or credentials.

Exit statuses: 1 internal, 2 usage (from the argument parser), 3 refused, nothing was touched,
4 failed, the job goes on as before, 5 damaged or missing data, 6 the volume, 7 the environment
(CRIU, kernel, privileges), 130 interrupted.
"""

from __future__ import annotations


class CkptError(Exception):
    """The root of the tree; never raised itself.

    ``facts`` are small values that name the thing (a pid, a path, a part of the store); they are
    shown to people and put into JSON, so they must never hold secrets.
    """

    code: str = "internal"
    exit_status: int = 1
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        if type(self) is CkptError:
            raise TypeError("CkptError is the root of the tree: raise the condition itself")
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        return self.message


class Refused(CkptError):
    """The request was refused before anything was touched."""

    code = "refused"
    exit_status = 3


class InvalidInput(Refused):
    """An argument, name, setting or configuration file does not make sense."""

    code = "invalid-input"


class NotFound(Refused):
    """The named image, group, process or path does not exist."""

    code = "not-found"


class Unauthenticated(Refused):
    """Who calls is not known: no identity, an expired token, a certificate of another authority."""

    code = "unauthenticated"


class Forbidden(Refused):
    """Who calls is known and may not do this."""

    code = "forbidden"


class TargetUnsuitable(Refused):
    """The target cannot be dumped (kernel thread, own ancestor, other container, ...)."""

    code = "target-unsuitable"


class TargetBusy(Refused):
    """Somebody else dumps, traces or restores the target right now."""

    code = "target-busy"
    retryable = True


class Overloaded(Refused):
    """The agent does as much at once as it may, or is shutting down."""

    code = "overloaded"
    retryable = True


class RestoreConflict(Refused):
    """Something on this host is in the way of a restore; ``facts['reasons']`` lists everything."""

    code = "restore-conflict"


class Failed(CkptError):
    """The operation was begun and undone: the job is as it was before."""

    code = "failed"
    exit_status = 4


class DumpFailed(Failed):
    """The engine could not capture the target; it runs (or stays stopped) as before."""

    code = "dump-failed"


class HookFailed(Failed):
    """A hook of the job's owner failed or did not end in time; ``facts['output']`` are the last
    lines of what it said.
    """

    code = "hook-failed"


class CutTorn(DumpFailed):
    """What was captured of a group's members does not fit together; ``facts['reasons']`` names the
    connections.
    """

    code = "cut-torn"
    retryable = True


class ConnectionUnaccepted(DumpFailed):
    """A program had not accepted a connection yet when it was stopped: that end of it would have
    been lost. It usually has a moment later.
    """

    code = "connection-unaccepted"
    retryable = True


class HoldNeeded(DumpFailed):
    """A member may run while others are read: all have to hold before any is."""

    code = "hold-needed"
    retryable = True


class RestoreFailed(Failed):
    """The engine could not bring the tree back; nothing of it is left running."""

    code = "restore-failed"


class TargetExited(Failed):
    """The target ended by itself during the dump."""

    code = "target-exited"


class DeadlineExceeded(Failed):
    """A step did not end in time and was undone."""

    code = "deadline-exceeded"
    retryable = True


class Interrupted(Failed):
    """A person or a service manager asked to stop; the job goes on."""

    code = "interrupted"
    exit_status = 130


class Conflict(Failed):
    """Somebody else committed or changed the same thing first."""

    code = "conflict"
    retryable = True


class Abandoned(Failed):
    """What carried the operation out ended before it did; the job goes on."""

    code = "abandoned"
    retryable = True


class DataError(CkptError):
    """What was read from a volume cannot be used."""

    code = "data"
    exit_status = 5


class Corrupt(DataError):
    """A part of the store does not match its digest or breaks the format."""

    code = "corrupt"


class Missing(DataError):
    """A part of the store that a committed epoch names is not there.

    Not derived from ``Corrupt`` nor the other way round: a handler that tolerates one must not
    swallow the other.
    """

    code = "missing"


class UnknownFormat(DataError):
    """The store or a part of it was written in a format version this program does not know."""

    code = "unknown-format"


class VolumeError(CkptError):
    """The volume did not do what was asked."""

    code = "volume"
    exit_status = 6
    retryable = True


class VolumeFull(VolumeError):
    """No room or quota left; waiting frees nothing."""

    code = "volume-full"
    retryable = False


class VolumeGone(VolumeError):
    """The volume is not reachable, not mounted, or read-only."""

    code = "volume-gone"


class BlobNotFound(VolumeError):
    """The volume holds no blob of this name."""

    code = "blob-not-found"
    retryable = False


class BlobExists(VolumeError):
    """A blob of this name is already there and was left as it is."""

    code = "blob-exists"
    retryable = False


class EnvironmentUnfit(CkptError):
    """CRIU, the kernel or the caller's privileges do not suffice."""

    code = "environment"
    exit_status = 7


class CriuMissing(EnvironmentUnfit):
    """No CRIU, one that is too old, or one whose protocol this program does not know."""

    code = "criu-missing"


class PrivilegeMissing(EnvironmentUnfit):
    """Not root, or a needed capability is missing."""

    code = "privilege-missing"


class Unreachable(EnvironmentUnfit):
    """An API server or an agent did not answer, or what answered could not be trusted."""

    code = "unreachable"
    retryable = True


class AgentDefect(CkptError):
    """An agent that was asked met something nobody meant to happen; its log says what."""

    code = "agent-defect"


class MoveIncomplete(CkptError):
    """A pod was stopped for a move that did not end; its image is committed and nothing is lost.

    ``facts['left']`` says what exists where, ``facts['next']`` which command goes on.
    """

    code = "move-incomplete"
    exit_status = 8
    retryable = True


class CriuFailed(Failed):
    """CRIU answered with a failure or died; ``facts['log_tail']`` holds its last log lines."""

    code = "criu-failed"


class ShortStopFailed(CriuFailed):
    """CRIU gave up where memory was copied beside it; the plain way may still work."""

    code = "short-stop-failed"
    retryable = True
