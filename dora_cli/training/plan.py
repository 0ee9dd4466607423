"""What a run is going to do, said before it does it; ``dry_run=true`` stops here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dora_cli.adapters.base import AdapterLayer, linear_shape
from dora_cli.allocation.allocators.kill_and_revive import traffic
from dora_cli.data.encoded import Encoded
from dora_cli.data.sources import buffer_size
from dora_cli.models.quantised import held_bytes, weight_count
from dora_cli.training.doubts import doubts
from dora_cli.training.examples import examples
from dora_cli.training.facts import Facts, adapter_parameters, counted, facts
from dora_cli.training.fits import SIZES, fits, fits_alone, frozen_base, ways
from dora_cli.training.memory import NoEstimate, estimate
from dora_cli.training.setup import Session

CPU_INFO = Path("/proc/cpuinfo")  # Linux


Sections = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Plan:
    """The plan of a run, twice: ``sections`` in words (section → key → text, every number resolved), and ``facts`` in
    numbers, as JSON can hold them."""

    sections: Sections
    facts: Facts


def describe(session: Session, out: str) -> Plan:
    """Say what is going to be done. A dry run adds memory, which takes seconds to estimate, and two inputs."""
    dry = bool(session.config.dry_run)
    known = facts(session, out)
    sections = {
        "run": _run(session, out),
        "data": _data(session),
        "model": _model(session),
        "adapter": _adapter(session, known["adapter"]),
    }
    if known["schedule"]:
        sections["schedule"] = _schedule(session, known["schedule"])
    sections["training"] = _training(known["training"])
    known |= {"memory": None, "examples": examples(session) if dry else {}}
    if session.config.train.base == "apart":
        sections["apart"] = _apart(session)
    elif dry:
        sections["memory"], known["memory"] = _memory(session)
    if dry:
        sections["examples"] = known["examples"]
    notes, warnings = _notes(session), doubts(known)
    if notes:
        sections["note"] = {str(i): text for i, text in enumerate(notes, start=1)}
    if warnings:
        sections["warning"] = {str(i): f"{w.what}; {w.advice}" for i, w in enumerate(warnings, start=1)}
    return Plan(sections, known | {"notes": notes, "warnings": [asdict(w) for w in warnings]})


def _run(session: Session, out: str) -> dict[str, str]:
    composed, config = session.composed, session.config
    lines = {
        "recipe": composed.recipe,
        "method": f"{composed.method}: "
        + ", ".join(composed.names[g] for g in ("adapter", "importance", "schedule", "allocator", "regularizer")),
        "out": out,
        "seed": str(config.seed),
        "device": f"{session.device}, {config.train.precision}",
    }
    if not session.world.alone:
        held = "a part of the base in each" if session.sharded else "all of the base in each"
        lines["processes"] = f"{session.world.size}, which share out every batch, {held}"
    return lines


def _data(session: Session) -> dict[str, str]:
    lines = {role: _size(rows) for role, rows in session.encoded.items()}
    if session.stream is not None:
        lines["train"] = f"streamed, {buffer_size(session.config.data):,} rows at a time, which are shuffled"
    lines |= session.task.facts()
    cut = sum(rows.truncated for rows in session.encoded.values())
    if cut:
        lines["truncated"] = f"{cut:,} rows were longer than data.max_length={session.config.data.max_length} tokens"
        lines["truncated"] += " (of train, among the first that are streamed)" if session.stream is not None else ""
    return lines


def _size(encoded: Encoded) -> str:
    if encoded.windows_of is None:
        return f"{len(encoded):,} rows"
    return f"{encoded.windows_of:,} rows in {len(encoded):,} windows, which batches count as rows"


def _model(session: Session) -> dict[str, str]:
    shapes: Counter[str] = Counter()
    for name in session.targets:
        module = session.model.get_submodule(name)
        base = module.base_layer if isinstance(module, AdapterLayer) else module
        d_out, d_in = linear_shape(base)
        shapes[f"{d_out}×{d_in}"] += 1
    total = weight_count(session.model) - adapter_parameters(session)
    lines = {"base": f"{session.config.model.name}, {total:,} parameters"}
    if session.quantised is not None:
        n, held = len(session.quantised.modules), held_bytes(session.model) / 1e6
        lines["quantised"] = f"{session.quantised.kind}, {n} linear layers; the model is held in {held:,.1f} MB"
    if session.targets:
        lines["targets"] = f"{len(session.targets)} modules: " + ", ".join(f"{n} of {s}" for s, n in shapes.items())
    if session.head_modules:
        lines["head"] = ", ".join(session.head_modules) + " (trained in full, not counted)"
    if session.new_tokens is not None:
        new, rows = session.new_tokens, sum(layer.rows.numel() for layer in session.token_rows.values())
        lines["tokens"] = f"{' '.join(new.words)} (embeddings trained, {rows:,} parameters, not counted)"
    return lines


def _adapter(session: Session, known: Facts) -> dict[str, str]:
    if not session.layers:
        return {"trained": f"{known['trained_start']:,} parameters of the model itself; the budget does not apply"}
    allocation = session.allocation
    unit = allocation.table.kind
    adapter = session.composed.parts["adapter"]
    sizes = session.start_ranks if "components" in adapter.units else [la.rank for la in session.layers.values()]
    lines = {
        "start": f"{allocation.start_count:,} {unit}, {allocation.start_cost:,} parameters "
        f"({adapter.size_word} {span(sizes)})"
    }
    if allocation.schedule.finds_budget:
        lines["end"] = (
            f"found by the run: {span(known['units_end'])} {unit}, {span(known['parameters_end'])} parameters"
        )
    elif allocation.allocator.mode in ("shrink", "grow"):
        units, parameters = known["units_end"], known["parameters_end"]
        if allocation.by_cost:
            lines["end"] = f"{parameters[1]:,} parameters at most, {span(units)} {unit}"
        else:
            lines["end"] = f"{units[1]:,} {unit}, {span(parameters)} parameters"
        lines["end"] += f" (budget={session.config.budget})"
    elif session.config.budget is not None:
        lines["end"] = f"on budget throughout (budget={session.config.budget})"
    return lines


def _schedule(session: Session, known: Facts) -> dict[str, str]:
    allocation, events = session.allocation, known["events"]
    shown = sorted({round(i * (len(events) - 1) / 4) for i in range(5)})  # the first, the last, some between
    counts = [f"{events[i][1]:,}" for i in shown]
    what = " parameters at most" if allocation.by_cost else ""
    after = "event at step " if len(shown) == 1 else "events at steps "
    first, begin, end = f"{known['first']:,}", events[0][0], known["end"]
    start = "" if allocation.by_cost or first == counts[0] else f"{first} at the start, "
    steps = f"step {end}" if begin == end else f"steps {begin} to {end}"
    lines = {
        "window": f"{steps} of {known['steps']}, {counted(len(events), 'allocation event')}",
        alive_word(session): start
        + " → ".join(counts)
        + f"{what} after the {after}"
        + ", ".join(str(events[i][0]) for i in shown)
        + (", if every cut is kept" if known["found"] else ""),
    }
    if found := known["found"]:
        lines["budget"] = (
            f"found by the run: a cut (the first {found['cut']:.3g} of what lives) is kept if the loss on "
            f"{counted(found['rows'], 'validation row')} stays within {found['tolerance']:.3g} of its best, else undone"
        )
    if getattr(allocation.allocator, "revive", False) and len(events) > 1:
        lines["revival"] = "until the last event pruned components keep training and may return, so the steps before"
        lines["revival"] += f" {end} cost as much as at the start (allocator.revive=false drops at once)"
    return lines


def _training(known: Facts) -> dict[str, str]:
    epochs = ""
    if known["epochs"] is not None:
        epochs = f" ({known['epochs']:.3g} epoch{'' if known['epochs'] == 1 else 's'})"
    return {
        "steps": f"{known['steps']:,} of {counted(known['rows_per_step'], 'row')}{epochs}",
        "rate": f"{known['learning_rate']:g} {known['scheduler']}, {counted(known['warmup_steps'], 'step')} of "
        f"warm-up, weight decay {known['weight_decay']:g}, clip {known['clip_norm']}",
    }


def _apart(session: Session) -> dict[str, str]:
    allocation, layers = session.allocation, list(session.layers.values())
    size = 2 if session.autocast_dtype is not None else 4
    values = traffic(layers, [True] * len(layers))
    crossing = (
        f"{values:,} values a token ({values * size / 1024:,.0f} KiB) in a step with all {len(layers)} modules on"
    )
    if allocation.table.kind == "modules" and allocation.last < len(layers):
        if getattr(allocation.allocator, "killed", "") == "drop":
            crossing += f", {allocation.last} of them at the end"
        else:
            crossing += "; idle ones cross as well (allocator.killed=drop switches them off)"
    return {
        "base": "in process 1, the cloud; adapters, head, data and labels in this one",
        "crossing": crossing,
    }


def _memory(session: Session) -> tuple[dict[str, str], Facts]:
    """What this device needs, and what others would: on how many of which size the run fits. In words, and in bytes."""
    config = session.config
    try:
        found = estimate(session)
        base = frozen_base(session.model, config.model.quantization if session.hollow else None)
        rows = config.train.batch_size
        frugal = None
        if not config.train.gradient_checkpointing and not fits_alone(found, base):
            frugal = estimate(session, checkpointing=True)
    except NoEstimate as error:
        return {"here": f"no estimate can be given ({error})"}, {"error": str(error)}
    known = asdict(found) | {"total": found.total, "fits": []}
    for name, each in (("fits", found), ("fits_checkpointing", frugal)):
        if each is not None:
            known[name] = [{"gb": size, "ways": [asdict(w) for w in ways(each, base, rows, size)]} for size in SIZES]
    return {"here": found.sentence()} | fits(found, base, rows, frugal), known


def _notes(session: Session) -> list[str]:
    notes = [*session.rows.notes, *session.notes]
    if session.hollow:
        notes.append(
            "the weights are not here, or larger than this machine's memory: planned from their shapes, taking them to "
            "hold all but the task's head; a start that looks at data or weights may choose other ranks"
        )
    first = " (the first that are streamed)" if session.stream is not None else ""
    for role, rows in session.encoded.items():
        notes += [f"{role}{first if role == 'train' else ''}: {note}" for note in rows.notes]
    notes += [f"a key from a recipe or preset has no effect: {line}" for line in session.composed.dropped]
    if session.world.alone and session.config.train.shard == "full":
        notes.append("train.shard=full: a process alone holds all of the base (torchrun starts several)")
    if session.device.type == "cpu" and session.config.train.precision == "bf16" and not _has_bf16(CPU_INFO):
        notes.append("this CPU has no bfloat16 units: train.precision=bf16 saves memory here, but is many times slower")
    if session.allocation.schedule.finds_budget:
        notes += _found_notes(session)
    elif session.config.budget is not None and session.budget is None:
        notes.append(f"method={session.composed.method} has no budget: budget={session.config.budget} does not apply")
    return notes + _rank_notes(session)


def _found_notes(session: Session) -> list[str]:
    notes, asked = [], session.config.budget
    if asked is not None:
        starts = getattr(session.composed.parts["adapter"], "rank", None) is None
        says = "says alone where the adapter starts" if starts else "has no effect, since adapter.rank is set"
        notes.append(f"schedule=auto finds the budget: the recipe's budget={asked} {says}")
    if not [role for role in session.encoded if role not in ("train", "validation")]:
        notes.append(
            "validation rows choose what is left, so what they say of the result is too good: data.splits.test=… adds "
            "rows that nothing looks at"
        )
    return notes


def _has_bf16(cpu_info: Path) -> bool:
    """Whether the kernel's list of the CPU's features names some for bfloat16; where there is no list, yes."""
    return not cpu_info.exists() or "bf16" in cpu_info.read_text(errors="replace")


def _rank_notes(session: Session) -> list[str]:
    notes = []
    asked = getattr(session.composed.parts["adapter"], "rank", None)
    budget, mode = session.budget, session.allocation.allocator.mode
    if budget is not None and budget.kind != "share" and mode != "shrink" and asked is not None:
        notes.append(f"adapter.rank is not used: budget={budget.text} alone says how large the adapter is")
    full = [layer for layer in session.layers.values() if layer.rank > min(layer.d_in, layer.d_out)]
    if full:
        notes.append(f"{len(full)} modules start with a rank above their smaller side: more than they can use")
    return notes


def alive_word(session: Session) -> str:
    """What the count of an allocation says of its units: that they live, or where that is not in question, train."""
    return "alive" if session.allocation.table.kind == "components" else "in training"


def span(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
