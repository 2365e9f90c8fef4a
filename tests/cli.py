"""Command lines in tests: words become a command's value, which runs; its errors come as they are raised."""

from ldm.commands.line import load_command, parse


def call(name, words):
    """Run a command, "uncertainty classes" for example, from the words of its command line."""
    return parse(load_command(name), [str(word) for word in words], f"decu {name}").run()
