"""Whether servers of adapters can take one: those that know one rank and one scale for all modules.

The rules are those of vLLM's loader (``vllm/lora``: ``peft_helper.py``, ``lora_model.py``, ``utils.py``) and of
llama.cpp's converter, which divides one alpha by each tensor's own rank. Both want nothing but pairs of factors.
"""

from pathlib import Path

from dora_cli.checkpoints.adapter_format import CONFIG, WEIGHTS
from dora_cli.checkpoints.json_io import read_json, strings, take
from dora_cli.checkpoints.safetensors_io import read_header

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
FACTORS = (".lora_A.weight", ".lora_B.weight")


def obstacles(folder: Path) -> list[str]:
    """What of a PEFT adapter a server that knows one rank and one scale would refuse, or get wrong.

    Returns:
        A clause for each; none where it can be served.

    Raises:
        UserError: the folder holds no whole adapter.
    """
    file = folder / CONFIG
    config, entries = read_json(file), read_header(folder / WEIGHTS)
    kind = take(config, "peft_type", str, file)
    if kind != "LORA":
        return [f"its type {kind} is this toolkit's own"]
    found = []
    rank = take(config, "r", int, file)
    if take(config, "use_dora", bool, file, False):
        found.append("its weights are decomposed into magnitude and direction")
    if saved := strings(config, "modules_to_save", file):
        found.append(f"{', '.join(saved)} {'was' if len(saved) == 1 else 'were'} trained in full, beside the adapter")
    if config.get("trainable_token_indices"):
        found.append("new tokens have embeddings of their own")
    if take(config, "bias", str, file, "none") != "none":
        found.append("biases were trained")
    ranks = {entry.shape[0] for name, entry in entries.items() if name.endswith(FACTORS[0])}
    if config.get("rank_pattern") or config.get("alpha_pattern") or ranks != {rank}:
        found.append("rank or scale differ from module to module")
    if rank > MAX_RANKS[-1]:
        found.append(f"its rank of {rank} is above {MAX_RANKS[-1]}")
    if not found and (other := next((name for name in entries if not name.endswith(FACTORS)), None)):
        found.append(f"'{other}' is no factor of an update")
    return found


def serving_note(folder: Path) -> list[str]:
    """What to tell of an adapter that is to be served: what to pass to a server, or why none will take it.

    Returns:
        Lines of at most 80 columns, names apart.
    """
    found = obstacles(folder)
    if found:
        lines = ["a server that takes adapters would refuse this one, or serve it wrong:"]
        return [
            *lines,
            *(f"  {clause}" for clause in found),
            "  dora-merge makes a model of it, which any server takes",
        ]
    rank = take(read_json(folder / CONFIG), "r", int, folder / CONFIG)
    return [f"rank {rank} in every module; for vLLM: --enable-lora --max-lora-rank {max_lora_rank(rank)}"]


def max_lora_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` of vLLM's that takes an adapter of this rank."""
    return next(allowed for allowed in MAX_RANKS if allowed >= rank)
