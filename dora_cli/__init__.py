"""dora_cli: fine-tune transformers under a parameter budget, from the command line or in a loop of one's own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_cli.api import Dora as Dora
    from dora_cli.api import adapt as adapt
    from dora_cli.callback import DoraCallback as DoraCallback

__version__ = "0.1.0"

API = {
    "adapt": "dora_cli.api:adapt",
    "Dora": "dora_cli.api:Dora",
    "DoraCallback": "dora_cli.callback:DoraCallback",
}


def __getattr__(name: str) -> Any:
    """Names of the Python API, imported (and torch with them) when they are first asked for."""
    if name not in API:
        raise AttributeError(f"module 'dora_cli' has no attribute '{name}'")
    from dora_cli.registry import load

    return load(API, name, key="name")
