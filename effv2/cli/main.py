"""The console script `effv2`: every entry point as a sub-command."""

from __future__ import annotations

import importlib

import click

from effv2 import __version__

# Sub-commands and the modules that hold them; a module is imported when its command is used.
COMMANDS = {
    "train": "effv2.cli.train",
    "ablate": "effv2.cli.ablate",
    "hparam-check": "effv2.cli.hparam_check",
    "search": "effv2.cli.search",
    "evaluate-pretrained": "effv2.cli.evaluate_pretrained",
    "report": "effv2.cli.report",
}


class LazyGroup(click.Group):
    """A group whose commands are imported late."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name.replace("-", "_"))
        return command


@click.group(cls=LazyGroup)
@click.version_option(__version__)
def main() -> None:
    """Train, ablate and compare EfficientNetV2 on small images, tracked in MLflow."""
