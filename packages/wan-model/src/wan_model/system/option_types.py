"""Types of the options of commands."""

from typing import Any

import click

from wan_model.system.files import require_local


class LocalPath(click.Path):
    """A path of this machine; the URL of an object is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As of any path."""
        name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name if param else "the path"
        try:
            require_local(name, value)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        return super().convert(value, param, ctx)
