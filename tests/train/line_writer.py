"""A writer for tests."""


class Lines:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.lines, self.closed = [], False

    def log(self, line):
        self.lines.append(line)

    def close(self):
        self.closed = True
