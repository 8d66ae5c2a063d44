"""The lab's one kind of failure, and its own exit statuses."""

EXIT_LAB = 125
EXIT_TIMEOUT = 124
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141


class LabError(Exception):
    """Something the lab cannot get past: what happened, why, and the command to run next."""

    def __init__(self, what: str, why: str = "", next_step: str = "", status: int = EXIT_LAB) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step
        self.status = status

    def render(self) -> str:
        """Return the message as it is shown to the user."""
        lines = [f"lab: {self.what}"]
        if self.why:
            lines += [f"  {line}" for line in self.why.splitlines()]
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)


class NotBooted(LabError):
    """A VM did not reach its first own program: nothing of the project had run in it."""
