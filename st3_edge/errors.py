"""The exceptions of st3_edge. Each message is one line that says what is wrong and, where it can, what to do."""


class St3Error(Exception):
    """Base of every exception that this package raises on purpose."""


class LibraryError(St3Error):
    """The native libraries are missing, too old or too new, or others were loaded first."""


class ConfigError(St3Error):
    """A setting is out of its range, or two settings exclude each other."""


class ModelError(St3Error):
    """A model file is missing, damaged, of the wrong kind, or does not fit its other half."""


class ImageError(St3Error):
    """A picture cannot be read, or is outside the bounds of `st3_edge.prompts.images`."""


class PromptError(St3Error):
    """Messages that cannot become a prompt: empty, malformed, or longer than the context."""


class ContextError(PromptError):
    """A prompt that is longer than the context."""


class StateError(St3Error):
    """A conversation cannot be written to a file, or a file holds none that this model can go on with."""


class OutputError(St3Error):
    """A result cannot be written, or would replace a file that is to stay."""


def one_line(text: object) -> str:
    """`text` with every run of white space and control characters made one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
