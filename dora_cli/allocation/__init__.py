"""Which units live: schedules, importances, allocators, regularizers, one file per answer. Imports nothing by itself.

``allocation.controller.Allocation`` joins the four with the adapted layers and is all that a training loop calls.
"""

SCHEDULES = {
    "cubic_late": "dora_cli.allocation.schedules:CubicLate",
    "cubic_early": "dora_cli.allocation.schedules:CubicEarly",
    "linear": "dora_cli.allocation.schedules:Linear",
    "power": "dora_cli.allocation.schedules:Power",
    "cosine": "dora_cli.allocation.schedules:Cosine",
    "exponential": "dora_cli.allocation.schedules:Exponential",
    "geometric": "dora_cli.allocation.schedules:Geometric",
    "sigmoid": "dora_cli.allocation.schedules:Sigmoid",
    "step": "dora_cli.allocation.schedules:Step",
    "one_shot": "dora_cli.allocation.schedules:OneShot",
    "constant": "dora_cli.allocation.schedules:Constant",
    "auto": "dora_cli.allocation.schedules:Auto",
}
IMPORTANCES = {
    "component_norm": "dora_cli.allocation.importance.component_norm:ComponentNorm",
    "fisher": "dora_cli.allocation.importance.fisher:Fisher",
    "gate_probability": "dora_cli.allocation.importance.gate_probability:GateProbability",
    "gate_size": "dora_cli.allocation.importance.gate_size:GateSize",
    "energy": "dora_cli.allocation.importance.energy:Energy",
    "gradient": "dora_cli.allocation.importance.gradient:Gradient",
    "module_sensitivity": "dora_cli.allocation.importance.module_sensitivity:ModuleSensitivity",
    "sensitivity": "dora_cli.allocation.importance.sensitivity:Sensitivity",
    "ablation": "dora_cli.allocation.importance.ablation:Ablation",
    "freezing_score": "dora_cli.allocation.importance.freezing_score:FreezingScore",
    "displacement": "dora_cli.allocation.importance.displacement:Displacement",
    "random": "dora_cli.allocation.importance.random:Random",
    "none": "dora_cli.allocation.importance.none:NoImportance",
}
ALLOCATORS = {
    "prune": "dora_cli.allocation.allocators.prune:Prune",
    "prune_principal": "dora_cli.allocation.allocators.prune_principal:PrunePrincipal",
    "prune_official": "dora_cli.allocation.allocators.prune_official:PruneOfficial",
    "prune_peft": "dora_cli.allocation.allocators.prune_peft:PrunePeft",
    "prune_and_reallocate": "dora_cli.allocation.allocators.prune_and_reallocate:PruneAndReallocate",
    "exchange": "dora_cli.allocation.allocators.exchange:Exchange",
    "grow": "dora_cli.allocation.allocators.grow:Grow",
    "soft_threshold": "dora_cli.allocation.allocators.soft_threshold:SoftThreshold",
    "freeze": "dora_cli.allocation.allocators.freeze:Freeze",
    "kill_and_revive": "dora_cli.allocation.allocators.kill_and_revive:KillAndRevive",
    "none": "dora_cli.allocation.allocators.none:NoAllocator",
}
REGULARIZERS = {
    "dem": "dora_cli.allocation.regularizers.dem:Dem",
    "orthogonal": "dora_cli.allocation.regularizers.orthogonal:Orthogonal",
    "gate_kl": "dora_cli.allocation.regularizers.gate_kl:GateKl",
    "none": "dora_cli.allocation.regularizers.none:NoRegularizer",
}
