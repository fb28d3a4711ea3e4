"""Typing a command, for tests."""

from __future__ import annotations

from lorahub.cli.main import app
from lorahub.hub.errors import LoraHubError
from typer.testing import CliRunner


def typed(*arguments: object) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, stdout, and stderr or what the error says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, LoraHubError):
        return result.exception.exit_code, result.stdout, str(result.exception)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
