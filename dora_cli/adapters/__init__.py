"""How ΔW is written down: one file per parametrisation, usable on any ``nn.Module``. Imports nothing by itself.

A part (the class named here) is a dataclass of options that knows how to wrap one linear layer; the wrapped layer is an
``AdapterLayer`` (see ``base.py``), which declares its units and the verbs that an allocator may use on them.
"""

ADAPTERS = {
    "lora": "dora_cli.adapters.lora:Lora",
    "components": "dora_cli.adapters.components:Components",
    "svd": "dora_cli.adapters.svd:Svd",
    "weight_decomposed": "dora_cli.adapters.weight_decomposed:WeightDecomposed",
    "gated": "dora_cli.adapters.gated:Gated",
    "aflora": "dora_cli.adapters.aflora:Aflora",
    "mora": "dora_cli.adapters.mora:Mora",
    "mora_components": "dora_cli.adapters.mora_components:MoraComponents",
    "bitfit": "dora_cli.adapters.bitfit:Bitfit",
    "full": "dora_cli.adapters.whole:Full",
    "none": "dora_cli.adapters.whole:Frozen",
}
