"""Whose adapters are read: one tool a file. All of them keep their settings in ``adapter_config.json``.

Name → the tool's ``Format``. The first that knows the settings as its own reads the folder; PEFT, ours, is the last.
"""

FORMATS = {
    "mlx": "dora_cli.checkpoints.formats.mlx:MLX",
    "adapterhub": "dora_cli.checkpoints.formats.adapterhub:ADAPTERHUB",
    "peft": "dora_cli.checkpoints.formats.peft:PEFT",
}
