"""What a run hands to the trackers that its configuration asks for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_cli.config.differences import flat, read_configuration
from dora_cli.config.schema import TrackConfig
from dora_cli.errors import UserError
from dora_cli.reporting.trackers.base import Trackers
from dora_cli.training.setup import Composed


def tracked(config: TrackConfig) -> list[str]:
    """The names in ``track.to``.

    Raises:
        UserError: it is no name and no list of different names.
    """
    names: Any = [config.to] if isinstance(config.to, str) else [] if config.to is None else config.to
    if not isinstance(names, list) or {type(n) for n in names} - {str} or len(set(names)) < len(names):
        raise UserError(
            f"track.to={config.to} is no list of different names", hint="write track.to=[tensorboard,wandb]"
        )
    return names


def build_trackers(composed: Composed, out: Path, say: Callable[[str], None]) -> Trackers:
    """The run's trackers, not started yet. ``say`` takes a line for the user."""
    track = composed.config.track
    return Trackers(
        tracked(track),
        out,
        project=track.project,
        name=track.name or out.absolute().name,
        config={"recipe": composed.recipe, "method": composed.method, **flat(read_configuration(composed.yaml))},
        offline=composed.config.offline,
        say=say,
    )
