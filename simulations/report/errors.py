"""What can go wrong with a report that its user can set right."""


class ReportError(ValueError):
    """One line: which file or directory, what is wrong with it, and the fix."""
