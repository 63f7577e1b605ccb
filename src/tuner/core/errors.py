"""What a user is told when a run cannot go on."""

from __future__ import annotations

from collections.abc import Iterable


class UsageError(Exception):
    """A problem the user can fix: shown without a traceback, exit code 2.

    what: one sentence, the problem itself.  where: file, JSON path or item.  why: the reason, when it is not obvious.
    fix: what to do or type next.  parts: the single problems of an error that lists several, else empty.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        parts: Iterable[UsageError] = (),
    ) -> None:
        self.what, self.where, self.why, self.fix, self.parts = what, where, why, fix, tuple(parts)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors back by pickling them; keyword-only arguments need this.
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix, self.parts)


class NotHereError(UsageError):
    """A file, folder or repository that is not on this machine."""


def _rebuild(
    cls: type[UsageError],
    what: str,
    where: str | None,
    why: str | None,
    fix: str | None,
    parts: tuple[UsageError, ...],
) -> UsageError:
    return cls(what, where=where, why=why, fix=fix, parts=parts)


class Problems:
    """Collects usage errors so that a check reports all of them at once."""

    def __init__(self) -> None:
        self.errors: list[UsageError] = []

    def add(self, error: UsageError) -> None:
        """Note a problem, or each of those that ``error`` lists."""
        self.errors.extend(error.parts or (error,))

    def extend(self, errors: Iterable[UsageError]) -> None:
        for error in errors:
            self.add(error)

    def __bool__(self) -> bool:
        return bool(self.errors)

    def raise_if_any(self) -> None:
        """Raise the single error as it is, or one error that lists all of them."""
        if not self.errors:
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        listed = "\n".join(f"{number}. {error}" for number, error in enumerate(self.errors, 1))
        raise UsageError(f"{len(self.errors)} problems:\n{listed}", parts=self.errors)
