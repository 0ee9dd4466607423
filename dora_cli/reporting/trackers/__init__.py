"""Other tools that follow a run, one file each; none is imported unless it is asked for. Imports nothing by itself."""

TRACKERS = {
    "tensorboard": "dora_cli.reporting.trackers.tensorboard:TensorBoard",
    "wandb": "dora_cli.reporting.trackers.wandb:Wandb",
    "mlflow": "dora_cli.reporting.trackers.mlflow:Mlflow",
    "trackio": "dora_cli.reporting.trackers.trackio:Trackio",
}
STATE = "trackers.json"  # in the run folder: which runs of theirs this one is
FOLDERS = tuple(TRACKERS)  # in the run folder: their local files
