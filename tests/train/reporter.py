"""A reporter that keeps what it is told."""


class Lines:
    """What is said, and the lines of progress."""

    def __init__(self):
        self.said, self.steps = [], []

    def say(self, line):
        self.said.append(line)

    def progress(self, done, total, text):
        self.steps.append(text)
