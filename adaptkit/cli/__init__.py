"""The command line: one command per verb. Commands turn words into arguments, call the verb and print what it returns."""

from .app import main

__all__ = ["main"]
