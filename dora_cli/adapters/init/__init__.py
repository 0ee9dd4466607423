"""Where an adapter's factors start, beside each adapter's own way (``default``). Imports nothing by itself."""

INITS = {
    "eva": "dora_cli.adapters.init.eva:Eva",
    "lora": "dora_cli.adapters.init.lora:LoraStart",
    "open_gates": "dora_cli.adapters.init.open_gates:OpenGates",
    "orthogonal": "dora_cli.adapters.init.orthogonal:OrthogonalStart",
}
